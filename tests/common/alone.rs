//! A harness for tests that each need a process of their own, and what they look at.
#![allow(dead_code, unused_imports, unused_macros)] // No file uses all of it.

use rustix::process::{Pid, Signal, kill_process};
use std::io::Read;
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A part of a name that no other process has, not even one of an earlier run or of another pid namespace with its pid.
pub fn unique() -> &'static str {
    static UNIQUE: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    UNIQUE.get_or_init(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        format!("{}-{:x}", std::process::id(), now.as_nanos())
    })
}

/// A test: its name, and what it does in a process of its own, before which `main` has called `init` or not.
pub struct Scenario {
    pub name: &'static str,
    pub calls_init: bool,
    pub run: fn(),
}

/// Scenarios by the names of their functions; `#[late]` before those for which `main` does not call `init`.
macro_rules! scenarios {
    ($($(#[$late:ident])? $name:ident)*) => {
        &[$(Scenario { name: stringify!($name), calls_init: scenarios!(@ $($late)?), run: $name }),*]
    };
    (@) => { true };
    (@ late) => { false };
}
pub(crate) use scenarios;

/// Runs the scenario that this process was started for, or all that the arguments choose, each twice: as the kernel is,
/// and as one that tells an exit status to the parent alone.
pub fn main_of(scenarios: &[Scenario]) -> ExitCode {
    run_all(scenarios, &[], &[false, true])
}

/// The same, each once. `parts` are run by scenarios only, which start this program again.
pub fn main_once_of(scenarios: &[Scenario], parts: &[Scenario]) -> ExitCode {
    run_all(scenarios, parts, &[false])
}

fn run_all(scenarios: &[Scenario], parts: &[Scenario], old_kernels: &[bool]) -> ExitCode {
    if let Some(name) = std::env::var_os("SCENARIO") {
        let mut all = scenarios.iter().chain(parts);
        let scenario = all.find(|scenario| scenario.name == name).expect("a scenario of this name");
        if scenario.calls_init {
            multiprocess::init();
        }
        (scenario.run)();
        return ExitCode::SUCCESS;
    }
    multiprocess::init(); // Only copies that a late scenario starts come by here in a role.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        if !arguments.iter().any(|argument| argument == "--ignored") {
            scenarios.iter().for_each(|scenario| println!("{}: test", scenario.name));
        }
        return ExitCode::SUCCESS;
    }
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let chosen = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let mut failed = 0;
    for name in scenarios.iter().map(|scenario| scenario.name).filter(|name| chosen(name)) {
        for old_kernel in old_kernels {
            let way = if *old_kernel { " (exits by message)" } else { "" };
            match run(name, *old_kernel) {
                Ok(skips) => println!("test {name}{way} ... ok{skips}"),
                Err(why) => {
                    println!("test {name}{way} ... FAILED\n{why}");
                    failed += 1;
                }
            }
        }
    }
    println!("{failed} failed");
    ExitCode::from((failed > 0) as u8)
}

/// In which a scenario must be done.
const LIMIT: Duration = Duration::from_secs(100);
/// In which what a scenario said has been read, though a process that it left may still have the other end.
const READ: Duration = Duration::from_millis(300);

/// What it said about what it could not do here, or why it failed.
fn run(name: &str, old_kernel: bool) -> Result<String, String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env("SCENARIO", name).env("RUST_BACKTRACE", "0");
    if old_kernel {
        command.env("MULTIPROCESS_OLD_KERNEL", "1");
    }
    let (mut read, write) = std::io::pipe().unwrap();
    let mut process = command.stdout(write.try_clone().unwrap()).stderr(write).spawn().unwrap();
    drop(command);
    let text = Arc::new(Mutex::new(Vec::new()));
    let (said, filled) = (text.clone(), text);
    let reading = std::thread::spawn(move || {
        let mut room = [0; 4096];
        while let Ok(len @ 1..) = read.read(&mut room) {
            filled.lock().unwrap().extend_from_slice(&room[..len]);
        }
    });
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        match process.try_wait().unwrap() {
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            None => {
                process.kill().unwrap();
                process.wait().unwrap();
                break None;
            }
            status => break status,
        }
    };
    let deadline = Instant::now() + READ;
    while !reading.is_finished() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    remove_places_of(process.id());
    let text = String::from_utf8_lossy(&said.lock().unwrap()).into_owned();
    match status {
        Some(status) if status.success() => {
            let skips = text.lines().filter(|line| line.contains("SKIPPED"));
            Ok(skips.map(|line| format!("\n{line}")).collect())
        }
        Some(status) => Err(format!("{status}\n{text}")),
        None => Err(format!("not done after {LIMIT:?}\n{text}")),
    }
}

/// Removes the empty directories of a scenario that has given up the right to do so.
fn remove_places_of(pid: u32) {
    for entry in std::fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("multiprocess-") && name.ends_with(&format!("-{pid}")) {
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Nothing here may hang.
#[track_caller]
pub fn within<T>(future: impl Future<Output = T>) -> impl Future<Output = T> {
    let place = std::panic::Location::caller();
    async move {
        let limited = tokio::time::timeout(Duration::from_secs(40), future).await;
        limited.unwrap_or_else(|_| panic!("not done in time: {place}"))
    }
}

/// Waits until `done`, looking often.
#[track_caller]
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Pid, parent and state of every process there is.
pub fn processes() -> Vec<(u32, u32, char)> {
    let all = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut rest = stat[stat.rfind(')')? + 2..].split(' ');
        let state = rest.next()?.chars().next()?;
        Some((pid, rest.next()?.parse().ok()?, state))
    });
    all.collect()
}

pub fn children_of(parent: u32) -> Vec<(u32, char)> {
    processes().into_iter().filter(|(_, of, _)| *of == parent).map(|(pid, _, state)| (pid, state)).collect()
}

pub fn runs(pid: u32) -> bool {
    processes().iter().any(|(other, _, state)| *other == pid && *state != 'Z')
}

/// The fork server: the one child of this process.
#[track_caller]
pub fn server() -> u32 {
    let children: Vec<_> = children_of(std::process::id()).into_iter().filter(|(_, state)| *state != 'Z').collect();
    assert_eq!(children.len(), 1, "{children:?}");
    children[0].0
}

/// Whether a thread of this process sleeps in the kernel.
pub fn thread_is_asleep(thread: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{}/stat", thread.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('S'))
}

/// Whether a process of one thread has had the signals that were sent to it, and sleeps again: its handlers have run.
pub fn has_handled_its_signals(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
    let none_is_pending = pending.map(|set| u64::from_str_radix(set.trim(), 16)).all(|set| set == Ok(0));
    none_is_pending && processes().iter().any(|(other, _, state)| *other == pid && *state == 'S')
}

pub fn kill(pid: u32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), signal);
}
