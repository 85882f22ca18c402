//! Servers that tests start and end.
#![allow(dead_code, clippy::unwrap_used, reason = "each test program uses a part of it, and a test fails by it")]

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

/// The server to test with: `$NATS_SERVER`, else one of the path. Without one a test fails where `CI` is set, and is skipped
/// elsewhere.
pub fn binary() -> Option<PathBuf> {
    let of_path = || {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|dir| dir.join("nats-server")).find(|file| file.is_file())
    };
    let found = std::env::var_os("NATS_SERVER").map(PathBuf::from).or_else(of_path);
    if found.is_none() {
        assert!(
            std::env::var_os("CI").is_none(),
            "no nats-server: `.ci/nats DIR`, and NATS_SERVER=DIR/2.15/nats-server"
        );
        eprintln!(
            "SKIPPED: there is no nats-server here (`.ci/nats DIR` installs one; then NATS_SERVER=DIR/2.15/nats-server)"
        );
    }
    found
}

/// A server with a folder of its own.
pub struct Server {
    binary: PathBuf,
    dir: PathBuf,
    pub port: u16,
    config: String,
    child: Option<Child>,
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

impl Server {
    pub fn start(binary: PathBuf, config: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("mp-nats-{}-{}", crate::common::alone::unique(), COUNT.fetch_add(1, Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let mut server = Self { binary, dir, port: free_port(), config: config.into(), child: None };
        server.run();
        server
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts it, where it was.
    pub fn run(&mut self) {
        let listen = format!("listen: \"127.0.0.1:{}\"\n", self.port);
        let store = match self.config.contains("jetstream") {
            true => String::new(),
            // By default a part of what the disk has left, which may be less than one stream reserves.
            false => format!("jetstream {{ store_dir: {:?}, max_file_store: 8GB }}\n", self.dir.join("store")),
        };
        let file = self.dir.join("server.conf");
        std::fs::write(&file, format!("{listen}{store}{}", self.config)).unwrap();
        let log = std::fs::File::create(self.dir.join("log")).unwrap();
        // It is not to outlive this process, however that ends.
        let has_setpriv = Path::new("/usr/bin/setpriv").exists();
        let mut command = Command::new(if has_setpriv { Path::new("/usr/bin/setpriv") } else { &self.binary });
        if has_setpriv {
            command.args(["--pdeathsig", "KILL"]).arg(&self.binary);
        }
        let child = command.arg("-c").arg(file).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        self.child = Some(child);
        self.wait_until_it_listens();
    }

    fn wait_until_it_listens(&mut self) {
        let start = Instant::now();
        loop {
            if let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)) {
                stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
                if stream.read(&mut [0; 4]).is_ok_and(|read| read == 4) {
                    return;
                }
            }
            let ended = self.child.as_mut().and_then(|child| child.try_wait().unwrap());
            let log = || std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            assert!(ended.is_none(), "nats-server has ended: {}", log());
            assert!(start.elapsed() < PATIENCE, "nats-server does not listen: {}", log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Killed, and started again with what it has in its folder.
    pub fn restart(&mut self) {
        self.kill();
        self.run();
    }

    /// Killed, and started again with nothing in its folder.
    pub fn restart_empty(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(self.dir.join("store"));
        self.run();
    }

    /// The same, with another configuration.
    pub fn restart_empty_with(&mut self, config: &str) {
        self.config = config.into();
        self.restart_empty();
    }

    /// The address of a pool.
    pub fn url_of(&self, pool: &str) -> String {
        format!("nats://127.0.0.1:{}/{pool}", self.port)
    }
}

/// Processes that are in a folder, run a program of it or have a file of it open; each with what shows that.
fn processes_in(dir: &Path) -> Vec<(PathBuf, PathBuf)> {
    let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let links = entries("/proc".as_ref()).flat_map(|process| {
        let files = entries(&process.join("fd")).collect::<Vec<_>>();
        files.into_iter().chain(["cwd", "exe"].map(|link| process.join(link)))
    });
    let in_it = links.filter_map(|link| Some((std::fs::read_link(&link).ok()?, link)));
    in_it.filter(|(target, _)| target.starts_with(dir)).map(|(target, link)| (link, target)).collect()
}

/// Connections to a port that somebody has a descriptor of.
fn connections_to(port: u16) -> Vec<String> {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    let is_one = |row: &&str| {
        let fields: Vec<_> = row.split_whitespace().collect();
        fields[2].ends_with(&format!(":{port:04X}")) && fields[9] != "0"
    };
    table.lines().skip(1).filter(is_one).map(str::to_string).collect()
}

impl Server {
    /// Waits until nothing is left of those who used it: no process in its folder, where hosts are, and, if it runs, no descriptor of a
    /// connection.
    fn nothing_is_left(&self) {
        // Tasks that close connections do not go on while the only thread of their runtime waits here.
        let goes_on =
            |runtime: tokio::runtime::Handle| runtime.runtime_flavor() != tokio::runtime::RuntimeFlavor::CurrentThread;
        let closes = self.child.is_some() && tokio::runtime::Handle::try_current().map_or(true, goes_on);
        let own = PathBuf::from(format!("/proc/{}", self.child.as_ref().map_or(0, Child::id)));
        let start = Instant::now();
        loop {
            let processes: Vec<_> =
                processes_in(&self.dir).into_iter().filter(|(link, _)| !link.starts_with(&own)).collect();
            let connections = if closes { connections_to(self.port) } else { Vec::new() };
            if processes.is_empty() && connections.is_empty() {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "left behind: {processes:?} {connections:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.nothing_is_left();
        }
        self.kill();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            let last: Vec<_> = log.lines().rev().take(15).collect();
            eprintln!("the server's last words:\n{}", last.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
