//! Children that end early, preloads that take long, and processes that were forked from one that uses the crate. Each
//! scenario runs in a process of its own.
#![allow(clippy::unwrap_used)] // A test, though clippy sees none in a harness of our own.

#[path = "common/alone.rs"]
mod alone;

use alone::Scenario;
use multiprocess::{self as mp, ErrorKind, Process, StartMethod};
use rustix::process::Signal;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

macro_rules! scenarios {
    ($($(#[$late:ident])? $name:ident)*) => {
        &[$(Scenario { name: stringify!($name), calls_init: scenarios!(@ $($late)?), run: $name }),*]
    };
    (@) => { true };
    (@ late) => { false };
}

const SCENARIOS: &[Scenario] = scenarios! {
    children_that_end_early_are_all_heard_of
    two_thousand_children_in_bursts_leave_neither_a_zombie_nor_a_lost_status
    a_parent_that_waits_for_any_child_takes_no_status_away
    a_preload_that_starts_processes_takes_no_status_away
    a_preload_that_leaves_a_thread_which_waits_for_any_child_hangs_nobody
    what_a_preload_does_with_sigchld_is_so_in_children_alone
    a_server_that_cannot_poll_loses_nobody_and_goes_on
};

fn main() -> ExitCode {
    alone::main_of(SCENARIOS)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Nothing here may hang.
#[track_caller]
fn within<T>(future: impl Future<Output = T>) -> impl Future<Output = T> {
    let place = std::panic::Location::caller();
    async move {
        let limited = tokio::time::timeout(Duration::from_secs(40), future).await;
        limited.unwrap_or_else(|_| panic!("not done in time: {place}"))
    }
}

/// Waits until `done`, looking often.
#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Pid, parent and state of every process there is.
fn processes() -> Vec<(u32, u32, char)> {
    let all = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut rest = stat[stat.rfind(')')? + 2..].split(' ');
        let state = rest.next()?.chars().next()?;
        Some((pid, rest.next()?.parse().ok()?, state))
    });
    all.collect()
}

fn children_of(parent: u32) -> Vec<(u32, char)> {
    processes().into_iter().filter(|(_, of, _)| *of == parent).map(|(pid, _, state)| (pid, state)).collect()
}

/// The fork server: the one child of this process that runs.
fn server() -> u32 {
    let children: Vec<_> = children_of(std::process::id()).into_iter().filter(|(_, state)| *state != 'Z').collect();
    assert_eq!(children.len(), 1, "{children:?}");
    children[0].0
}

fn zombies_of(parent: u32) -> usize {
    children_of(parent).iter().filter(|(_, state)| *state == 'Z').count()
}

fn kill(pid: u32, signal: Signal) {
    let _ = rustix::process::kill_process(rustix::process::Pid::from_raw(pid as i32).unwrap(), signal);
}

fn add(a: u64, b: u64) -> u64 {
    a + b
}

async fn hang() {
    std::future::pending().await
}

/// Ends at once in one of four ways.
fn ends(how: u64) -> u64 {
    match how % 4 {
        0 => std::process::exit(3),
        1 => kill(std::process::id(), Signal::KILL),
        2 => kill(std::process::id(), Signal::TERM),
        _ => {}
    }
    how
}

/// That it ended as it was to, by every question that there is.
async fn assert_heard(how: u64, mut child: Process<u64>) {
    let result = within(child.join()).await;
    let status = within(child.wait()).await.unwrap();
    assert!(!child.is_alive());
    assert_eq!(child.exit_status(), Some(status));
    match how % 4 {
        0 => assert_eq!((result.unwrap_err().kind(), status.code()), (ErrorKind::ProcessDied, Some(3))),
        1 => assert_eq!((result.unwrap_err().kind(), status.signal()), (ErrorKind::ProcessDied, Some(9))),
        2 => assert_eq!((result.unwrap_err().kind(), status.signal()), (ErrorKind::ProcessDied, Some(15))),
        _ => assert_eq!((result.unwrap(), status.code()), (how, Some(0))),
    }
}

fn start(how: u64, method: StartMethod) -> Process<u64> {
    let builder = Process::builder().start_method(method).stderr(mp::Stdio::null());
    builder.spawn(ends, (how,)).unwrap()
}

/// Starts `bursts` times `size` children, one in `exec` of them afresh.
async fn bursts(bursts: u64, size: u64, exec: u64) {
    let method = |n: u64| if n.is_multiple_of(exec) { StartMethod::Spawn } else { StartMethod::ForkServer };
    for burst in 0..bursts {
        // Neither way to end goes with one method alone.
        let all: Vec<_> = (0..size).map(|n| (n / exec + n + burst, method(n))).collect();
        let started: Vec<_> = all.into_iter().map(|(how, method)| (how, start(how, method))).collect();
        for (how, child) in started {
            assert_heard(how, child).await;
        }
    }
    assert!(mp::active_children().is_empty());
}

fn children_that_end_early_are_all_heard_of() {
    block_on(async {
        bursts(1, 40, 1).await;
        bursts(1, 40, 2).await;
        let server = server();
        until("the server has no zombie", || zombies_of(server) == 0);
    });
}

fn two_thousand_children_in_bursts_leave_neither_a_zombie_nor_a_lost_status() {
    block_on(async {
        bursts(20, 100, 10).await;
        let server = server();
        until("the server has no zombie", || zombies_of(server) == 0);
        assert_eq!(zombies_of(std::process::id()), 0);
    });
}

fn a_parent_that_waits_for_any_child_takes_no_status_away() {
    std::thread::spawn(|| {
        loop {
            // SAFETY: no status is asked for.
            unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) };
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    block_on(async {
        bursts(2, 40, 4).await;
        // What takes the place of a killed server does as well, though somebody else has reaped that one.
        let before = server();
        kill(before, Signal::KILL);
        until("it is gone", || !processes().iter().any(|(pid, ..)| *pid == before));
        bursts(2, 40, 4).await;
        let server = server();
        until("the server has no zombie", || zombies_of(server) == 0);
    });
}

fn a_preload_that_starts_processes_takes_no_status_away() {
    fn starts_and_waits() {
        assert!(Command::new("true").status().unwrap().success());
    }
    #[allow(clippy::zombie_processes)] // It is what is tried.
    fn starts_and_lets_go() {
        Command::new("true").spawn().unwrap();
        Command::new("sleep").arg("0.3").spawn().unwrap();
    }
    mp::preload(starts_and_waits).unwrap();
    mp::preload(starts_and_lets_go).unwrap();
    block_on(async {
        bursts(2, 40, 4).await;
        let server = server();
        until("the server has no zombie", || zombies_of(server) == 0);
    });
}

fn a_preload_that_leaves_a_thread_which_waits_for_any_child_hangs_nobody() {
    fn leaves_a_thread() {
        std::thread::spawn(|| {
            loop {
                // SAFETY: no status is asked for.
                unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) };
                std::thread::sleep(Duration::from_micros(100));
            }
        });
    }
    mp::preload(leaves_a_thread).unwrap();
    block_on(async {
        for how in 0..24 {
            let mut child = start(how, StartMethod::ForkServer);
            let result = within(child.join()).await;
            assert_eq!(result.is_ok(), how % 4 == 3);
            // The thread may have taken the status, and no older kernel tells it to others. It is never invented.
            match within(child.wait()).await {
                Ok(status) => assert_eq!(status.signal().is_some(), matches!(how % 4, 1 | 2)),
                Err(error) => assert_eq!(error.kind(), ErrorKind::ProcessDied),
            }
            assert!(!child.is_alive());
        }
    });
}

fn what_a_preload_does_with_sigchld_is_so_in_children_alone() {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal as Number, sigaction};
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
    static HEARD: AtomicU64 = AtomicU64::new(0);
    extern "C" fn hear(_: libc::c_int) {
        HEARD.fetch_add(1, SeqCst);
    }
    fn ignores() {
        let action = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
        // SAFETY: no handler.
        unsafe { sigaction(Number::SIGCHLD, &action) }.unwrap();
    }
    fn handles() {
        let action = SigAction::new(SigHandler::Handler(hear), SaFlags::SA_NOCLDWAIT, SigSet::empty());
        // SAFETY: the handler only counts.
        unsafe { sigaction(Number::SIGCHLD, &action) }.unwrap();
        let action = SigAction::new(SigHandler::Handler(hear), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler only counts.
        unsafe { sigaction(Number::SIGCHLD, &action) }.unwrap();
    }
    fn hears() -> bool {
        let before = HEARD.load(SeqCst);
        assert!(Command::new("true").status().unwrap().success());
        HEARD.load(SeqCst) > before
    }
    mp::preload(ignores).unwrap();
    mp::preload(handles).unwrap();
    block_on(async {
        bursts(1, 40, 4).await;
        assert!(within(Process::spawn(hears, ()).unwrap()).await.unwrap());
        let fresh = Process::builder().start_method(StartMethod::Spawn).spawn(hears, ()).unwrap();
        assert!(!within(fresh).await.unwrap());
        let server = server();
        until("the server has no zombie", || zombies_of(server) == 0);
    });
}

fn a_server_that_cannot_poll_loses_nobody_and_goes_on() {
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
    block_on(async {
        let lock = mp::Lock::new().unwrap();
        let (mut tell, told) = mp::simplex().unwrap();
        let (held, mut holds) = mp::simplex().unwrap();
        // A second starter, whose connection is idle; and it holds a lock all the time.
        let holder = async |lock: mp::Lock, mut told: mp::Receiver<()>, mut held: mp::Sender<()>| {
            assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
            let _guard = lock.acquire().await.unwrap();
            held.send(()).await.unwrap();
            told.recv().await.unwrap();
        };
        let holder = Process::spawn(holder, (lock.clone(), told, held)).unwrap();
        within(holds.recv()).await.unwrap();
        let (server, usual) = (server(), getrlimit(Resource::Nofile));
        let set =
            |current| prlimit(Pid::from_raw(server as i32), Resource::Nofile, Rlimit { current, ..usual }).unwrap();
        // No poll of more descriptors than the limit says is allowed, whatever their numbers.
        set(Some(2));
        for _ in 0..3 {
            let error = Process::spawn(add, (1, 2)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Spawn, "{error}");
        }
        assert_eq!(lock.try_acquire().map(drop).unwrap_err().kind(), ErrorKind::WouldBlock, "its holder lives");
        set(usual.current);
        assert_eq!(within(Process::spawn(add, (1, 2)).unwrap()).await.unwrap(), 3);
        assert_eq!(self::server(), server, "it is the same server");
        let mut killed = Process::spawn(hang, ()).unwrap();
        killed.kill().unwrap();
        assert_eq!(within(killed.wait()).await.unwrap().signal(), Some(9));
        tell.send(()).await.unwrap();
        within(holder).await.unwrap();
    });
}
