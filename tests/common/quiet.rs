//! Keeps the standard error of a test program out of the results, as long as all tests pass.
//!
//! The test harness captures what a test prints on its own thread. Children, worker processes and other threads write to the
//! standard error itself: panics that a test expects, lines that a test has a worker write. [`quiet_stderr`] points it at a
//! file for the whole program. If a test fails, or is not done in time, the end of that file is printed; after a crash the file is
//! left in `target/tmp`. With `--nocapture` nothing is redirected.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Once in a file of tests, beside `mod common`.
macro_rules! quiet_stderr {
    () => {
        #[used]
        #[unsafe(link_section = ".init_array")]
        static QUIET_STDERR: extern "C" fn() = common::quiet::begin;
    };
}
pub(crate) use quiet_stderr;

/// How much of the file is printed.
const SHOWN: u64 = 64 << 10;

struct Kept {
    pid: u32,
    path: PathBuf,
    stderr: OwnedFd,
}

static KEPT: Mutex<Option<Kept>> = Mutex::new(None);

unsafe extern "C" {
    /// See on_exit(3).
    fn on_exit(handler: extern "C" fn(libc::c_int, *mut libc::c_void), argument: *mut libc::c_void) -> libc::c_int;
}

pub extern "C" fn begin() {
    let shows_all = |argument: String| ["--nocapture", "--no-capture", "--list"].contains(&&*argument);
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    // A process that this program starts has the file already, or nothing.
    let is_kept = |target: PathBuf| target.starts_with(directory) || target == Path::new("/dev/null");
    if std::fs::read_link("/proc/self/fd/2").is_ok_and(is_kept)
        || std::env::args().any(shows_all)
        || std::env::var_os("RUST_TEST_NOCAPTURE").is_some()
    {
        return;
    }
    // Without it the tests only print more.
    let _ = redirect(directory);
}

fn redirect(directory: &Path) -> std::io::Result<()> {
    let pid = std::process::id();
    let path = directory.join(format!("{}-{pid}.stderr", env!("CARGO_CRATE_NAME")));
    let file = File::options().create(true).append(true).open(&path)?;
    let stderr = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stderr(), 3)?;
    rustix::stdio::dup2_stderr(&file)?;
    *KEPT.lock().unwrap() = Some(Kept { pid, path, stderr });
    // SAFETY: the handler takes no argument, and lives as long as the program.
    unsafe { on_exit(at_exit, std::ptr::null_mut()) };
    Ok(())
}

extern "C" fn at_exit(status: libc::c_int, _: *mut libc::c_void) {
    let kept = KEPT.lock().ok().and_then(|mut kept| kept.take());
    if let Some(kept) = kept.filter(|kept| kept.pid == std::process::id()) {
        if status != 0 {
            let _ = show(&kept);
        }
        let _ = std::fs::remove_file(&kept.path);
    }
}

/// Prints what was kept so far, and keeps nothing more: before a program is aborted.
pub fn give_back() {
    let kept = KEPT.lock().ok().and_then(|mut kept| kept.take());
    if let Some(kept) = kept {
        let _ = show(&kept);
        let _ = rustix::stdio::dup2_stderr(kept.stderr.as_fd());
        let _ = std::fs::remove_file(&kept.path);
    }
}

fn show(kept: &Kept) -> std::io::Result<()> {
    let mut file = File::open(&kept.path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(SHOWN)))?;
    let mut end = Vec::new();
    file.read_to_end(&mut end)?;
    let mut stderr = File::from(kept.stderr.try_clone()?);
    writeln!(stderr, "\nthe standard error of the test program and its children (the last of {len} bytes):")?;
    stderr.write_all(&end)
}
