//! Running example programs with a deadline.
#![allow(dead_code, reason = "each test file uses a part of this")]

use rustix::process::{Pid, Signal, kill_process_group};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// An example's binary: `target/debug/examples/name` beside this test's `target/debug/deps/test-hash`.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let binary = test.ancestors().nth(2).expect("tests live in target/*/deps").join("examples").join(name);
    assert!(binary.exists(), "{} is not built; plain `cargo test` builds it", binary.display());
    binary
}

/// Starts a program in a process group of its own, with its output captured.
pub fn start(program: &Path, arguments: impl IntoIterator<Item = impl AsRef<std::ffi::OsStr>>) -> Child {
    let mut command = Command::new(program);
    command.args(arguments).process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A debug build takes longer to name its frames than some deadlines are.
    command.env("RUST_BACKTRACE", "0");
    command.spawn().expect("the program starts")
}

/// Waits until the program has ended and all processes that inherited its output have closed it.
pub fn finish(child: Child, deadline: Duration) -> Output {
    let (name, group) = (format!("{child:?}"), Pid::from_child(&child));
    let (done, output) = channel();
    std::thread::spawn(move || done.send(child.wait_with_output()));
    let output = output.recv_timeout(deadline).unwrap_or_else(|_| {
        let _ = kill_process_group(group, Signal::KILL);
        panic!("it or a child of it still runs after {deadline:?}: {name}")
    });
    output.expect("its output can be read")
}

/// The processes of a program, itself left out, whose name begins with `name`, as long as they are not zombies.
pub fn processes(program: &Child, name: &str) -> Vec<Pid> {
    let group = program.id().to_string();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    let is_one = |pid: &Pid| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).unwrap_or_default();
        // `pid (name) state parent group ..`, and a name may have anything in it.
        let Some((own, rest)) = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(") ")) else { return false };
        let mut fields = rest.split(' ');
        fields.next() != Some("Z") && fields.nth(1) == Some(&group) && own.starts_with(name)
    };
    pids.filter(|pid| *pid != Pid::from_child(program)).filter(is_one).collect()
}

/// What `run` returns, which runs a program and kills parts of it; `None` if the program was over before all of them were killed, as it may be on
/// a busy machine. Then it is run again.
pub fn with_kills<T>(mut run: impl FnMut() -> Option<T>) -> T {
    (0..10).find_map(|_| run()).expect("a part of it is killed in time, in one of ten runs")
}

/// What `get` returns as soon as it returns something.
pub fn until<T>(what: &str, mut get: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        match get() {
            Some(value) => return value,
            None => assert!(start.elapsed() < Duration::from_secs(60), "never: {what}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
