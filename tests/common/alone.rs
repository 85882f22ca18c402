//! A harness for tests that each need a process of their own, and what they look at.
#![allow(dead_code)] // No file uses all of it.

use rustix::process::{Pid, Signal, kill_process};
use std::io::Read;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// A test: its name, and what it does in a process of its own, before which `main` has called `init` or not.
pub struct Scenario {
    pub name: &'static str,
    pub calls_init: bool,
    pub run: fn(),
}

/// Runs the scenario that this process was started for, or all that the arguments choose, each twice: as the kernel is,
/// and as one that tells an exit status to the parent alone.
pub fn main_of(scenarios: &[Scenario]) -> ExitCode {
    if let Some(name) = std::env::var_os("SCENARIO") {
        let scenario = scenarios.iter().find(|scenario| scenario.name == name).expect("a scenario of this name");
        if scenario.calls_init {
            multiprocess::init();
        }
        (scenario.run)();
        return ExitCode::SUCCESS;
    }
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
        for old_kernel in [false, true] {
            let way = if old_kernel { " (exits by message)" } else { "" };
            match run(name, old_kernel) {
                Ok(()) => println!("test {name}{way} ... ok"),
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

fn run(name: &str, old_kernel: bool) -> Result<(), String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env("SCENARIO", name).env("RUST_BACKTRACE", "0");
    if old_kernel {
        command.env("MULTIPROCESS_OLD_KERNEL", "1");
    }
    let (mut read, write) = std::io::pipe().unwrap();
    let mut process = command.stdout(write.try_clone().unwrap()).stderr(write).spawn().unwrap();
    drop(command);
    let text = std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = read.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let deadline = Instant::now() + Duration::from_secs(100);
    loop {
        match process.try_wait().unwrap() {
            Some(status) if status.success() => return Ok(()),
            // The output ends when the last descendant has ended; it is in the report for that.
            Some(status) => return Err(format!("{status}\n{}", text.join().unwrap())),
            None if Instant::now() > deadline => {
                process.kill().unwrap();
                process.wait().unwrap();
                return Err(format!("not done in time\n{}", text.join().unwrap()));
            }
            None => std::thread::sleep(Duration::from_millis(5)),
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
        let limited = tokio::time::timeout(Duration::from_secs(30), future).await;
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

pub fn kill(pid: u32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), signal);
}
