//! Signals: what the user ignored, what a terminal or a service manager sends to everybody, and how a program ends in order.
#![allow(clippy::unwrap_used)] // A test, though clippy sees none in a harness of our own.

mod common;

use common::alone::{Scenario, scenarios};
use common::{eventually, within};
use multiprocess::{self as mp, Manager, Pool, Process, Queue, ShutdownSignal, StartMethod};
use rustix::process::{Pid, Signal, kill_current_process_group, kill_process, kill_process_group};
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

const SCENARIOS: &[Scenario] = scenarios! {
    #[late] a_server_that_is_hit_at_its_start_is_started_again
    signals_ignored_at_the_start_and_no_others_are_ignored_by_all
    a_hang_up_hurts_no_child_of_a_nohupped_program
    group_signals_do_not_reach_the_workers_of_a_pool
    group_signals_at_any_moment_of_a_start_hurt_no_worker
    group_signals_do_not_reach_a_manager
    a_program_that_a_worker_executes_has_the_default_actions
    a_plain_child_has_the_default_actions_unless_it_is_shielded
    a_preload_runs_with_nothing_blocked_and_survives_group_signals
    shutdown_signal_returns_the_signal_that_came
    shutdown_signal_reaches_all_waiters_and_the_next_call_waits_for_the_next
    shutdown_signal_that_comes_between_two_calls_is_not_lost
    shutdown_signal_leaves_an_ignored_interrupt_ignored
    shutdown_signal_outside_a_runtime_is_an_error
    a_graceful_stop_lets_running_tasks_finish
    run_names_the_children_it_waits_for_and_an_interrupt_ends_all
    run_that_waits_dies_of_an_unhandled_interrupt
    a_child_that_waits_for_its_own_children_names_them
    kill_on_drop_kills_the_dropped_child_and_no_other
    run_does_not_wait_for_a_child_killed_by_its_drop
};

fn main() -> ExitCode {
    if std::env::var_os("SCENARIO").is_some() {
        // Signals to the group are for this scenario alone.
        let _ = rustix::process::setpgid(None, None);
    }
    // Its `run` comes before the `init` of the others.
    match std::env::var("MAIN").as_deref() {
        Ok("waits") => main_that_waits(),
        Ok("drops") => main_that_drops(),
        _ => common::alone::main_of(SCENARIOS),
    }
}

/// This test program again, in a process group of its own.
fn again(main: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env("MAIN", main).env("RUST_BACKTRACE", "0").process_group(0);
    command
}

const STOPS: [Signal; 4] = [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT];

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(within(future))
}

async fn hang() {
    std::future::pending().await
}

fn me() -> u32 {
    std::process::id()
}

/// The `SigIgn` of a process, without the two signals that the C library keeps for itself.
fn ignored() -> u64 {
    mask("SigIgn:") & !(0b11 << 31)
}

fn mask(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    u64::from_str_radix(line.trim(), 16).unwrap()
}

fn to_group(signal: Signal) {
    kill_current_process_group(signal).unwrap();
}

/// This process survives what it sends to its group.
async fn survive_stops() {
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()] {
        let mut signals = signal(kind).unwrap();
        tokio::spawn(async move { while signals.recv().await.is_some() {} });
    }
}

/// Runs this scenario again where the user ignores `signals`; `true` in that copy.
fn ignoring(signals: &str) -> bool {
    if std::env::var_os("INNER").is_some() {
        return true;
    }
    let scenario = std::env::var("SCENARIO").unwrap();
    let mut env = Command::new("env");
    env.arg(format!("--ignore-signal={signals}")).arg(std::env::current_exe().unwrap()).process_group(0);
    assert!(env.env("INNER", "1").env("SCENARIO", scenario).status().unwrap().success());
    false
}

fn signals_ignored_at_the_start_and_no_others_are_ignored_by_all() {
    if !ignoring("HUP,USR2,CHLD") {
        return;
    }
    let of = |signal: Signal| 1u64 << (signal.as_raw() - 1);
    let wanted = of(Signal::HUP) | of(Signal::USR2) | of(Signal::CHILD) | of(Signal::PIPE);
    assert_eq!(ignored() & wanted, wanted);
    let wanted = ignored();
    // What the program changes later is its own.
    // SAFETY: neither is a handler that could run.
    unsafe {
        libc::signal(libc::SIGUSR1, libc::SIG_IGN);
        libc::signal(libc::SIGHUP, libc::SIG_DFL);
    }
    block_on(async {
        let below = async || {
            let forked = Process::spawn(ignored, ()).unwrap().await.unwrap();
            let builder = Process::builder().start_method(StartMethod::Spawn);
            (ignored(), forked, builder.spawn(ignored, ()).unwrap().await.unwrap())
        };
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            for shield in [false, true] {
                let builder = Process::builder().start_method(method).shield_signals(shield);
                let (child, forked, executed) = builder.spawn(below, ()).unwrap().await.unwrap();
                assert_eq!([child, forked, executed], [wanted; 3], "{method:?} {shield}");
            }
            let pool = Pool::builder().workers(1).start_method(method).build().unwrap();
            assert_eq!(pool.apply(ignored, ()).await.unwrap(), wanted);
        }
    });
}

fn a_hang_up_hurts_no_child_of_a_nohupped_program() {
    if !ignoring("HUP") {
        return;
    }
    block_on(async {
        let pool = Pool::new(1).unwrap();
        let worker = pool.apply(me, ()).await.unwrap();
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            let (mut tx, rx) = mp::simplex::<u32>().unwrap();
            let next = async |mut rx: mp::Receiver<u32>| rx.recv().await.unwrap();
            let mut child = Process::builder().start_method(method).spawn(next, (rx,)).unwrap();
            to_group(Signal::HUP);
            // It is there when this is taken, however early the signal came.
            tx.send(7).await.unwrap();
            to_group(Signal::HUP);
            assert_eq!(child.join().await.unwrap(), 7);
        }
        assert_eq!(pool.apply(me, ()).await.unwrap(), worker);
    });
}

fn group_signals_do_not_reach_the_workers_of_a_pool() {
    block_on(async {
        survive_stops().await;
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            let (begun, go_on) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
            let task = |begun: Queue<u32>, go_on: Queue<u32>| {
                begun.blocking_put(me()).unwrap();
                (me(), go_on.blocking_get().unwrap())
            };
            let pool = Pool::builder().workers(1).start_method(method).build().unwrap();
            let running = pool.apply_async(task, (begun.clone(), go_on.clone()));
            let worker = begun.get().await.unwrap();
            for signal in STOPS {
                to_group(signal);
                // And to the worker alone, so that it has surely come.
                kill_process(Pid::from_raw(worker as i32).unwrap(), signal).unwrap();
            }
            go_on.put(5).await.unwrap();
            assert_eq!(running.await.unwrap(), (worker, 5));
            assert_eq!(pool.apply(me, ()).await.unwrap(), worker);
        }
    });
}

fn group_signals_at_any_moment_of_a_start_hurt_no_worker() {
    static IS_OVER: AtomicBool = AtomicBool::new(false);
    block_on(async {
        survive_stops().await;
        Process::spawn(me, ()).unwrap().await.unwrap();
        let pester = std::thread::spawn(|| {
            while !IS_OVER.load(SeqCst) {
                STOPS.into_iter().for_each(to_group);
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        for method in [StartMethod::ForkServer, StartMethod::Spawn, StartMethod::ForkServer] {
            for _ in 0..5 {
                let slow = || std::thread::sleep(Duration::from_millis(1));
                let pool = Pool::builder().workers(2).start_method(method).initializer(slow, ()).build().unwrap();
                let pids = pool.map(|_: u32| me(), 0..20).chunksize(1).await.unwrap();
                let workers: std::collections::BTreeSet<u32> =
                    pool.stats().workers.iter().map(|worker| worker.pid).collect();
                assert!(pids.iter().all(|pid| workers.contains(pid)), "a worker died: {pids:?} {workers:?}");
            }
        }
        IS_OVER.store(true, SeqCst);
        pester.join().unwrap();
    });
}

fn group_signals_do_not_reach_a_manager() {
    block_on(async {
        survive_stops().await;
        let manager = Manager::start().await.unwrap();
        let list = manager.list::<u32>().await.unwrap();
        STOPS.into_iter().for_each(to_group);
        list.push(1).await.unwrap();
        assert_eq!(list.to_vec().await.unwrap(), [1]);
    });
}

fn a_program_that_a_worker_executes_has_the_default_actions() {
    block_on(async {
        let pool = Pool::new(1).unwrap();
        let status = || {
            let output = Command::new("cat").arg("/proc/self/status").output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let status = pool.apply(status, ()).await.unwrap();
        for name in ["SigIgn:", "SigBlk:", "SigCgt:"] {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            let stops: u64 = STOPS.iter().map(|signal| 1 << (signal.as_raw() - 1)).sum();
            let theirs = u64::from_str_radix(line.trim(), 16).unwrap();
            let inherited = if name == "SigIgn:" { ignored() } else { 0 };
            assert_eq!(theirs & stops, inherited & stops, "{name} {line}");
        }
    });
}

fn a_plain_child_has_the_default_actions_unless_it_is_shielded() {
    block_on(async {
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            for kind in STOPS {
                let mut plain = Process::builder().start_method(method).spawn(hang, ()).unwrap();
                kill_process(Pid::from_raw(plain.pid() as i32).unwrap(), kind).unwrap();
                assert_eq!(plain.wait().await.unwrap().signal(), Some(kind.as_raw()));
            }
            let (mut tx, rx) = mp::simplex::<u32>().unwrap();
            let begun = Queue::<u32>::unbounded().unwrap();
            let next = async |begun: Queue<u32>, mut rx: mp::Receiver<u32>| {
                begun.put(1).await.unwrap();
                rx.recv().await.unwrap()
            };
            let builder = Process::builder().start_method(method).shield_signals(true);
            let mut shielded = builder.spawn(next, (begun.clone(), rx)).unwrap();
            begun.get().await.unwrap();
            for kind in STOPS {
                kill_process(Pid::from_raw(shielded.pid() as i32).unwrap(), kind).unwrap();
            }
            shielded.terminate().unwrap();
            tx.send(3).await.unwrap();
            assert_eq!(shielded.join().await.unwrap(), 3);
            let mut shielded = Process::builder().start_method(method).shield_signals(true).spawn(hang, ()).unwrap();
            shielded.kill().unwrap();
            assert_eq!(shielded.wait().await.unwrap().signal(), Some(9));
        }
    });
}

fn a_preload_runs_with_nothing_blocked_and_survives_group_signals() {
    static SEEN: std::sync::OnceLock<(u64, i32)> = std::sync::OnceLock::new();
    fn load() {
        let me = rustix::process::getpid();
        STOPS.into_iter().for_each(|signal| kill_process(me, signal).unwrap());
        let program = Command::new("sh").args(["-c", "kill -TERM $$; exit 3"]).status().unwrap();
        SEEN.set((mask("SigBlk:"), program.signal().unwrap_or(0))).unwrap();
    }
    mp::preload(load).unwrap();
    block_on(async {
        let seen = || (*SEEN.get().unwrap(), mask("SigCgt:"));
        let (seen, caught) = Process::spawn(seen, ()).unwrap().await.unwrap();
        assert_eq!(seen, (0, libc::SIGTERM));
        let stops: u64 = STOPS.iter().map(|signal| 1 << (signal.as_raw() - 1)).sum();
        assert_eq!(caught & stops, 0, "a plain child has none of the server's handlers");
    });
}

fn a_server_that_is_hit_at_its_start_is_started_again() {
    let mark = std::env::temp_dir().join(format!("multiprocess-hit-{}", std::env::var("HIT").unwrap_or_default()));
    if std::env::var_os("HIT").is_some() {
        // Started for a role: the first one is hit by a Ctrl-C before it gets there.
        if std::fs::File::create_new(&mark).is_ok() {
            to_me(Signal::INT);
        }
        mp::init();
        unreachable!("it had no role");
    }
    let mark = std::env::temp_dir().join(format!("multiprocess-hit-{}", me()));
    mp::init();
    // SAFETY: this process has one thread.
    unsafe { std::env::set_var("HIT", me().to_string()) };
    block_on(async { assert_eq!(Process::spawn(|| 4, ()).unwrap().await.unwrap(), 4) });
    std::fs::remove_file(mark).expect("a server was hit");
}

fn to_me(signal: Signal) {
    kill_process(rustix::process::getpid(), signal).unwrap();
}

/// Polls once: from then on the program is not ended by the signals.
async fn listen() {
    use futures::FutureExt;
    assert!(mp::shutdown_signal().now_or_never().is_none());
}

fn shutdown_signal_returns_the_signal_that_came() {
    block_on(async {
        listen().await;
        for (kind, wanted, code) in
            [(Signal::TERM, ShutdownSignal::Terminate, 143), (Signal::INT, ShutdownSignal::Interrupt, 130)]
        {
            to_me(kind);
            let signal = mp::shutdown_signal().await.unwrap();
            assert_eq!((signal, signal.exit_code()), (wanted, code));
        }
    });
    // In another runtime too.
    block_on(async {
        to_me(Signal::TERM);
        assert_eq!(mp::shutdown_signal().await.unwrap(), ShutdownSignal::Terminate);
    });
}

fn shutdown_signal_reaches_all_waiters_and_the_next_call_waits_for_the_next() {
    block_on(async {
        let mut waiting = futures::future::join_all((0..3).map(|_| Box::pin(mp::shutdown_signal())));
        assert!(futures::poll!(&mut waiting).is_pending());
        to_me(Signal::TERM);
        for heard in (&mut waiting).await {
            assert_eq!(heard.unwrap(), ShutdownSignal::Terminate);
        }
        let mut next = std::pin::pin!(mp::shutdown_signal());
        assert!(futures::poll!(&mut next).is_pending(), "that one was heard");
        to_me(Signal::INT);
        assert_eq!(next.await.unwrap(), ShutdownSignal::Interrupt);
    });
}

fn shutdown_signal_that_comes_between_two_calls_is_not_lost() {
    block_on(async {
        for _ in 0..100 {
            // Each of these is dropped, as by a `select!` whose other branch was ready.
            listen().await;
            to_me(Signal::INT);
            tokio::task::yield_now().await;
            assert_eq!(mp::shutdown_signal().await.unwrap(), ShutdownSignal::Interrupt);
        }
    });
}

fn shutdown_signal_leaves_an_ignored_interrupt_ignored() {
    if !ignoring("INT") {
        return;
    }
    block_on(async {
        listen().await;
        assert_eq!(ignored() & 0b10, 0b10);
        to_me(Signal::INT);
        to_me(Signal::TERM);
        assert_eq!(mp::shutdown_signal().await.unwrap(), ShutdownSignal::Terminate);
    });
}

fn shutdown_signal_outside_a_runtime_is_an_error() {
    let error = futures::executor::block_on(mp::shutdown_signal()).unwrap_err();
    assert_eq!(error.kind(), mp::ErrorKind::Io);
    let bare = tokio::runtime::Builder::new_current_thread().build().unwrap();
    assert_eq!(bare.block_on(mp::shutdown_signal()).unwrap_err().kind(), mp::ErrorKind::Io);
}

fn a_graceful_stop_lets_running_tasks_finish() {
    block_on(async {
        listen().await;
        let pool = Pool::new(1).unwrap();
        let (begun, go_on) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
        let task = |begun: Queue<u32>, go_on: Queue<u32>| {
            begun.blocking_put(0).unwrap();
            go_on.blocking_get().unwrap()
        };
        let running = pool.apply_async(task, (begun.clone(), go_on.clone()));
        begun.get().await.unwrap();
        let queued = pool.apply_async(|| 1, ());
        to_group(Signal::INT);
        mp::shutdown_signal().await.unwrap();
        let mut shutdown = std::pin::pin!(pool.shutdown(Duration::from_secs(20)));
        assert!(futures::poll!(&mut shutdown).is_pending());
        go_on.put(8).await.unwrap();
        let report = shutdown.await;
        assert_eq!((report.not_begun(), report.killed()), (1, 0));
        assert_eq!(running.await.unwrap(), 8);
        assert_eq!(queued.await.unwrap_err().kind(), mp::ErrorKind::Cancelled);
    });
}

/// The `main` of a program that fails while a child waits for something that never comes.
fn main_that_waits() -> ExitCode {
    let done: Result<(), mp::Error> = mp::run(async {
        if std::env::var_os("LISTENS").is_some() {
            listen().await;
        }
        let stuck = Process::builder().name("stuck").shield_signals(true).spawn(hang, ())?;
        println!("{}", stuck.pid());
        Err(mp::Error::other("it failed"))
    });
    assert!(done.is_err());
    ExitCode::from(7)
}

/// That program, until it has said on stderr for whom it waits; and the pid of its child.
fn waiting_program(listens: bool) -> (std::process::Child, u32) {
    let mut command = again("waits");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    if listens {
        command.env("LISTENS", "1");
    }
    let started = Instant::now();
    let mut program = command.spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(program.stderr.take().unwrap()), &mut line).unwrap();
    assert!(started.elapsed() > Duration::from_millis(1500), "at once: {line}");
    let (mut stdout, mut pid) = (program.stdout.take().unwrap(), [0; 16]);
    let len = stdout.read(&mut pid).unwrap();
    let pid: u32 = std::str::from_utf8(&pid[..len]).unwrap().trim().parse().unwrap();
    assert!(line.contains(&format!("stuck (pid {pid})")) && line.contains("Ctrl-C"), "{line}");
    (program, pid)
}

fn is_gone(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_none_or(|rest| rest.is_empty() || rest.trim_start().starts_with('Z'))
}

fn run_names_the_children_it_waits_for_and_an_interrupt_ends_all() {
    let _deadline = common::Deadline::start();
    let (mut program, child) = waiting_program(true);
    assert!(!is_gone(child) && program.try_wait().unwrap().is_none());
    kill_process_group(Pid::from_child(&program), Signal::INT).unwrap();
    assert_eq!(program.wait().unwrap().code(), Some(7), "`run` returned what its future did");
    block_on(eventually("the child is gone", || is_gone(child)));
}

fn run_that_waits_dies_of_an_unhandled_interrupt() {
    let _deadline = common::Deadline::start();
    let (mut program, child) = waiting_program(false);
    kill_process_group(Pid::from_child(&program), Signal::INT).unwrap();
    assert_eq!(program.wait().unwrap().signal(), Some(libc::SIGINT));
    block_on(eventually("the child is gone", || is_gone(child)));
}

fn a_child_that_waits_for_its_own_children_names_them() {
    block_on(async {
        let leaves_one = || {
            let stuck = Process::builder().name("stuck").spawn(hang, ()).unwrap();
            stuck.pid()
        };
        let (read, write) = std::io::pipe().unwrap();
        let mut child = Process::builder()
            .name("parent")
            .stderr(mp::Stdio::from(std::os::fd::OwnedFd::from(write)))
            .spawn(leaves_one, ())
            .unwrap();
        let line = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            std::io::BufRead::read_line(&mut std::io::BufReader::new(read), &mut line).unwrap();
            line
        });
        let line = line.await.unwrap();
        assert!(line.contains("parent") && line.contains("stuck (pid "), "{line}");
        child.kill().unwrap();
        child.wait().await.unwrap();
    });
}

fn kill_on_drop_kills_the_dropped_child_and_no_other() {
    block_on(async {
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            let spawn = |kill| Process::builder().start_method(method).kill_on_drop(kill).spawn(hang, ()).unwrap();
            let (killed, kept) = (spawn(true), spawn(false));
            let pids = [killed.pid(), kept.pid()];
            drop((killed, kept));
            eventually("it is killed", || is_gone(pids[0])).await;
            assert!(!is_gone(pids[1]));
            kill_process(Pid::from_raw(pids[1] as i32).unwrap(), Signal::KILL).unwrap();
        }
        // A future that has the handle takes it along; one that only waits does not.
        let mut waited = Process::builder().kill_on_drop(true).spawn(hang, ()).unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(1), waited.join()).await.is_err());
        assert!(waited.is_alive());
        let pid = waited.pid();
        assert!(tokio::time::timeout(Duration::from_millis(1), waited).await.is_err());
        eventually("it is killed", || is_gone(pid)).await;
        // One that has ended has its result and its status all the same.
        let mut ended = Process::builder().kill_on_drop(true).spawn(|| 3, ()).unwrap();
        assert_eq!(ended.join().await.unwrap(), 3);
        assert!(ended.exit_status().is_none_or(|status| status.success()));
    });
}

fn main_that_drops() -> ExitCode {
    mp::run(async {
        let child = Process::builder().kill_on_drop(true).spawn(hang, ()).unwrap();
        drop(child);
    });
    ExitCode::SUCCESS
}

fn run_does_not_wait_for_a_child_killed_by_its_drop() {
    let _deadline = common::Deadline::start();
    assert!(again("drops").status().unwrap().success());
}
