//! Another build of a test program: a copy of it with another build id, which is what tells builds apart.
#![allow(dead_code, clippy::unwrap_used, reason = "each test program uses a part of it, and a test fails by it")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const ROLE: &str = "MULTIPROCESS_TEST_ROLE";
const URL: &str = "MULTIPROCESS_TEST_URL";

pub struct OtherBuild {
    pub program: PathBuf,
}

impl OtherBuild {
    /// Copies this program into a folder.
    pub fn in_folder(dir: &Path) -> Self {
        let program = dir.join("another-build");
        let mut bytes = std::fs::read("/proc/self/exe").unwrap();
        // A note begins with the lengths of its name and its contents; of this kind, 3, and this name is the build id.
        let is_head = |bytes: &[u8]| bytes[..4] == [4, 0, 0, 0] && bytes[8..] == *b"\x03\0\0\0GNU\0";
        let head = bytes.windows(16).position(is_head).expect("a build id, which the linker makes");
        bytes[head + 16] ^= 1;
        std::fs::write(&program, bytes).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        Self { program }
    }

    /// Starts it as the test `name`, which asks for its [`role`].
    pub fn start(&self, name: &str, role: &str, url: &str) -> OtherProgram {
        let mut command = Command::new(&self.program);
        command.args(["--exact", name, "--ignored"]).env(ROLE, role).env(URL, url);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        loop {
            match command.spawn() {
                // A process that somebody else forks just now still has the file open, as it was written.
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                child => return OtherProgram(child.unwrap()),
            }
        }
    }
}

/// What a process of another build is to do, and at which address; `None` in any other process.
pub fn role() -> Option<(String, String)> {
    Some((std::env::var(ROLE).ok()?, std::env::var(URL).ok()?))
}

/// A process of another build, killed at the end.
pub struct OtherProgram(Child);

impl OtherProgram {
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for OtherProgram {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
