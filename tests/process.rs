//! Processes: start, join, exit, signals, streams. Names begin with the row of CPython's behaviour they restate.
#![allow(clippy::unwrap_used)] // Tests, though clippy does not see it in the functions that run elsewhere.

mod common;

use common::{handle_signals, pestered};
use multiprocess::{self as mp, ErrorKind, Fd, Process, ProcessInfo, Queue, StartMethod, Stdio};
use std::future::Future;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

mp::test_support!();

/// The deadline of every test.
async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("in time")
}

fn add(a: i64, b: i64) -> i64 {
    a + b
}

/// Runs until it is told to stop, or killed.
async fn hang() {
    std::future::pending().await
}

/// Runs until the pipe closes.
fn until_closed(mut pipe: Fd<std::io::PipeReader>) -> usize {
    pipe.read_to_end(&mut Vec::new()).expect("readable")
}

fn is_listed(pid: u32) -> bool {
    mp::active_children().iter().any(|child| child.pid() == pid)
}

#[tokio::test]
async fn proc_01_the_root_is_alive_no_daemon_and_has_no_parent() {
    let me = mp::current_process();
    assert_eq!((me.pid(), me.name(), me.is_daemon()), (std::process::id(), "MainProcess", false));
    assert!(mp::parent_process().is_none());
}

#[tokio::test]
async fn proc_03_arguments_arrive_as_they_were() {
    let all = |a: i32, b: String, c: Vec<u8>, d: (u8, Option<char>), e: f64| (a, b, c, d, e);
    let sent = (-1, "text".to_string(), vec![1, 2, 255], (7, Some('x')), 0.5);
    let mut child = Process::spawn(all, sent.clone()).unwrap();
    assert_eq!(within(child.join()).await.unwrap(), sent);
    let twelve = |a: u8, b: u8, c: u8, d: u8, e: u8, f: u8, g: u8, h: u8, i: u8, j: u8, k: u8, l: u8| {
        [a, b, c, d, e, f, g, h, i, j, k, l].map(u32::from).iter().sum::<u32>()
    };
    let mut child = Process::spawn(twelve, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)).unwrap();
    assert_eq!(within(child.join()).await.unwrap(), 78);
}

async fn daemon_flags() -> (bool, bool, bool) {
    let is_daemon = || mp::current_process().is_daemon();
    let inherited = Process::spawn(is_daemon, ()).unwrap().await.unwrap();
    let explicit = Process::builder().daemon(false).spawn(is_daemon, ()).unwrap().await.unwrap();
    (mp::current_process().is_daemon(), inherited, explicit)
}

#[tokio::test]
async fn proc_04_daemon_defaults_to_the_creators_flag() {
    let mut child = Process::spawn(daemon_flags, ()).unwrap();
    assert_eq!(within(child.join()).await.unwrap(), (false, false, false));
    let mut child = Process::builder().daemon(true).spawn(daemon_flags, ()).unwrap();
    assert!(child.is_daemon());
    assert_eq!(within(child.join()).await.unwrap(), (true, true, false));
}

#[tokio::test]
async fn proc_05_a_child_knows_its_parent() {
    async fn chain() -> Vec<(u32, String)> {
        let parent = mp::parent_process().unwrap();
        let grand = |()| mp::parent_process().map(|parent| (parent.pid(), parent.name().to_string())).unwrap();
        let below = Process::spawn(grand, ((),)).unwrap().await.unwrap();
        vec![(parent.pid(), parent.name().to_string()), below]
    }
    let mut child = Process::builder().name("middle").spawn(chain, ()).unwrap();
    let seen = within(child.join()).await.unwrap();
    assert_eq!(seen, [(std::process::id(), "MainProcess".into()), (child.pid(), "middle".into())]);
}

async fn spawn_grandchild(write: Fd<std::io::PipeWriter>) {
    async fn grandchild(mut write: Fd<std::io::PipeWriter>) {
        let parent = mp::parent_process().unwrap();
        assert!(parent.is_alive());
        write.write_all(b"alive").unwrap();
        parent.wait().await.unwrap(); // Killed here together with the parent.
    }
    let _grandchild = Process::spawn(grandchild, (write,)).unwrap();
    hang().await
}

#[tokio::test]
async fn parent_that_cannot_be_watched_for_want_of_descriptors_is_an_error_and_not_its_end() {
    fn at_the_limit() -> (bool, Option<mp::ErrorKind>) {
        let mut files = Vec::new();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            files.push(file);
        }
        let parent = mp::parent_process().unwrap();
        let is_alive = parent.is_alive();
        drop(files);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        (is_alive, runtime.block_on(parent.wait()).err().map(|error| error.kind()))
    }
    let child = Process::builder().descriptor_limit(100).spawn(at_the_limit, ()).unwrap();
    assert_eq!(within(child).await.unwrap(), (true, Some(mp::ErrorKind::Io)));
}

#[tokio::test]
async fn proc_06_a_grandchild_sees_its_parent_alive_and_ends_with_it() {
    let end = async || {
        let (mut read, write) = std::io::pipe().unwrap();
        let child = Process::spawn(spawn_grandchild, (Fd::new(write),))?;
        let mut alive = [0; 5];
        read.read_exact(&mut alive).unwrap();
        child.terminate()?;
        let start = Instant::now();
        assert_eq!(read.read(&mut alive).unwrap(), 0); // The grandchild had the last writer.
        Ok(start.elapsed())
    };
    common::rounds(end, |took| *took < Duration::from_secs(1)).await.unwrap();
}

#[tokio::test]
async fn proc_08_a_running_child_is_alive_and_listed() {
    let (read, write) = std::io::pipe().unwrap();
    let mut child = Process::builder().name("worker").spawn(until_closed, (Fd::new(read),)).unwrap();
    assert!(child.is_alive() && is_listed(child.pid()));
    assert_eq!((child.name(), child.exit_status()), ("worker", None));
    drop(write);
    within(child.join()).await.unwrap();
    let mut child = Process::builder().name("me").spawn(mp::current_process, ()).unwrap();
    let seen: ProcessInfo = within(child.join()).await.unwrap();
    assert_eq!((seen.name(), seen.pid()), ("me", child.pid()));
}

#[tokio::test]
async fn proc_09_after_join_it_is_over_with_code_0() {
    let mut child = Process::spawn(add, (2, 3)).unwrap();
    assert_eq!(within(child.join()).await.unwrap(), 5);
    assert!(!child.is_alive() && !is_listed(child.pid()));
    assert_eq!(child.exit_status().unwrap().code(), Some(0));
    assert!(within(child.wait()).await.unwrap().success());
}

#[tokio::test]
async fn proc_10_a_plain_function_runs_on_the_only_thread_of_its_process() {
    let threads = || std::fs::read_dir("/proc/self/task").map(|dir| dir.count()).unwrap_or(0);
    assert_eq!(within(Process::spawn(threads, ()).unwrap()).await.unwrap(), 1);
    // Also with arguments whose buffer is worth keeping.
    let threads = |_: i32, _: Vec<u8>, _: Vec<f64>| std::fs::read_dir("/proc/self/task").map_or(0, |dir| dir.count());
    let large = (1, vec![0; 100_000], vec![0.5; 100_000]);
    assert_eq!(within(Process::spawn(threads, large).unwrap()).await.unwrap(), 1);
}

#[tokio::test]
async fn proc_11_a_join_that_is_given_up_at_once_changes_nothing() {
    let (read, write) = std::io::pipe().unwrap();
    let mut child = Process::spawn(until_closed, (Fd::new(read),)).unwrap();
    for _ in 0..3 {
        assert!(tokio::time::timeout(Duration::ZERO, child.join()).await.is_err());
        assert!(child.is_alive());
    }
    tokio::select! { biased; _ = &mut child => panic!("it runs"), () = std::future::ready(()) => {} }
    drop(write);
    assert_eq!(within(child.join()).await.unwrap(), 0);
}

async fn ends_by(send: impl Fn(&Process<()>) -> mp::Result<()>, signal: i32) {
    let mut child = Process::spawn(hang, ()).unwrap();
    send(&child).unwrap();
    let error = within(child.join()).await.unwrap_err();
    assert_eq!((error.kind(), error.exit_status().unwrap().signal()), (ErrorKind::ProcessDied, Some(signal)));
    assert!(error.to_string().contains(child.name()) && error.to_string().contains(&child.pid().to_string()));
    let again = within(child.join()).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::ProcessDied);
    assert_eq!(within(child.wait()).await.unwrap().signal(), Some(signal));
    assert_eq!(child.exit_status().unwrap().signal(), Some(signal));
}

#[tokio::test]
async fn proc_12_terminate_gives_sigterm() {
    ends_by(Process::terminate, 15).await;
}

#[tokio::test]
async fn proc_13_kill_gives_sigkill_and_interrupt_sigint() {
    ends_by(Process::kill, 9).await;
    ends_by(Process::interrupt, 2).await;
}

#[test]
fn proc_14_cpu_count_is_at_least_one() {
    assert!(mp::cpu_count() >= 1);
}

#[tokio::test]
async fn proc_15_active_children_is_a_fresh_list() {
    let child = Process::spawn(hang, ()).unwrap();
    let (one, two) = (mp::active_children(), mp::active_children());
    assert!(one.iter().any(|info| info.pid() == child.pid()) && two.iter().any(|info| info.pid() == child.pid()));
    child.kill().unwrap();
    let pid = child.pid();
    assert!(within(child).await.is_err());
    assert!(!is_listed(pid));
}

#[tokio::test]
async fn proc_16_children_start_grandchildren_recursively() {
    async fn recurse(mut write: Fd<std::io::PipeWriter>, path: Vec<u8>) {
        write.write_all(&[path.len() as u8]).unwrap();
        if path.len() < 2 {
            for n in 0..2 {
                let path = [path.as_slice(), &[n]].concat();
                let copy = Fd::new(write.try_clone().unwrap());
                Process::spawn(recurse, (copy, path)).unwrap().await.unwrap();
            }
        }
    }
    let (mut read, write) = std::io::pipe().unwrap();
    within(Process::spawn(recurse, (Fd::new(write), Vec::new())).unwrap()).await.unwrap();
    let mut order = Vec::new();
    read.read_to_end(&mut order).unwrap();
    assert_eq!(order, [0, 1, 2, 2, 1, 2, 2]);
}

#[tokio::test]
async fn proc_18_the_exit_can_be_awaited_any_number_of_times() {
    let mut child = Process::spawn(add, (1, 1)).unwrap();
    for _ in 0..3 {
        assert!(within(child.wait()).await.unwrap().success());
    }
    assert_eq!(within(child.join()).await.unwrap(), 2);
    assert!(within(child.wait()).await.unwrap().success());
}

#[tokio::test]
async fn proc_19_a_dropped_handle_lets_the_child_go_on() {
    let (mut read, write) = std::io::pipe().unwrap();
    let (wait, go) = std::io::pipe().unwrap();
    let goes_on = |wait: Fd<std::io::PipeReader>, mut write: Fd<std::io::PipeWriter>| {
        until_closed(wait);
        write.write_all(b"done").unwrap();
    };
    drop(Process::spawn(goes_on, (Fd::new(wait), Fd::new(write))).unwrap());
    drop(go);
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "done");
}

#[tokio::test]
async fn proc_20_a_result_can_be_had_once() {
    let mut child = Process::spawn(add, (1, 1)).unwrap();
    assert_eq!(within(child.join()).await.unwrap(), 2);
    let error = within(child.join()).await.unwrap_err();
    assert!(error.to_string().contains("already taken"), "{error}");
}

#[tokio::test]
async fn proc_22_many_children() {
    let children: Vec<_> = (0..100).map(|n| Process::spawn(add, (n, 1)).unwrap()).collect();
    let sums = within(futures::future::try_join_all(children)).await.unwrap();
    assert_eq!(sums, (1..=100).collect::<Vec<_>>());
}

#[tokio::test]
async fn proc_24_the_parent_keeps_nothing_of_the_arguments() {
    let (mut read, write) = std::io::pipe().unwrap();
    let closes = |write: Fd<std::io::PipeWriter>| drop(write);
    let _child = Process::spawn(closes, (Fd::new(write),)).unwrap();
    let end = tokio::task::spawn_blocking(move || read.read_to_end(&mut Vec::new()));
    assert_eq!(within(end).await.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn proc_26_a_child_waits_for_blocking_tasks_of_its_runtime() {
    async fn leaves_a_task(mut write: Fd<std::io::PipeWriter>) {
        tokio::task::spawn_blocking(move || {
            // The function has returned, and the process waits for this task.
            while !common::is_asleep(std::process::id()) {
                std::thread::yield_now();
            }
            write.write_all(b"late").unwrap();
        });
    }
    let (mut read, write) = std::io::pipe().unwrap();
    within(Process::spawn(leaves_a_task, (Fd::new(write),)).unwrap()).await.unwrap();
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "late");
}

#[tokio::test]
async fn proc_28_a_child_that_loses_its_streams_still_ends_well() {
    let closes = || {
        print!("never seen");
        rustix::stdio::dup2_stdout(std::fs::File::open("/dev/null").unwrap()).unwrap(); // Read-only: writes fail.
        rustix::stdio::dup2_stderr(std::fs::File::open("/dev/null").unwrap()).unwrap();
    };
    let mut child = Process::builder().stdout(Stdio::null()).spawn(closes, ()).unwrap();
    within(child.join()).await.unwrap();
    assert!(within(child.wait()).await.unwrap().success());
}

#[tokio::test]
async fn proc_33_signals_after_the_exit_do_nothing() {
    let mut child = Process::spawn(add, (1, 1)).unwrap();
    within(child.wait()).await.unwrap();
    child.terminate().unwrap();
    child.kill().unwrap();
    child.interrupt().unwrap();
    assert!(within(child.wait()).await.unwrap().success());
}

#[tokio::test]
async fn proc_34_a_daemon_may_have_children() {
    async fn parent() -> i64 {
        Process::spawn(add, (1, 1)).unwrap().await.unwrap()
    }
    let mut child = Process::builder().daemon(true).spawn(parent, ()).unwrap();
    assert_eq!(within(child.join()).await.unwrap(), 2);
}

#[tokio::test]
async fn proc_35_an_empty_name_means_the_default() {
    let mut child = Process::builder().name("").spawn(add, (1, 1)).unwrap();
    assert!(child.name().starts_with("Process-"), "{}", child.name());
    within(child.join()).await.unwrap();
}

#[tokio::test]
async fn subp_02_the_stack_of_a_panic_is_kept_only_if_it_is_asked_for() {
    fn fails() {
        panic!("no luck")
    }
    type Variables = &'static [(&'static str, &'static str)];
    let variants: [(Variables, Option<bool>, bool); 7] = [
        (&[("RUST_BACKTRACE", "0")], None, false),
        (&[("RUST_BACKTRACE", "1")], None, true),
        (&[("RUST_BACKTRACE", "1"), ("RUST_LIB_BACKTRACE", "0")], None, false),
        (&[("RUST_BACKTRACE", "0"), ("RUST_LIB_BACKTRACE", "1")], None, true),
        (&[("RUST_BACKTRACE", "0")], Some(true), true),
        (&[("RUST_BACKTRACE", "1")], Some(false), false),
        (&[("RUST_BACKTRACE", "1"), ("RUST_LIB_BACKTRACE", "1")], Some(false), false),
    ];
    for (variables, said, wanted) in variants {
        let mut builder = Process::builder().stderr(Stdio::null());
        for (name, value) in variables {
            builder = builder.env(name, value);
        }
        if let Some(keep) = said {
            builder = builder.backtraces(keep);
        }
        let error = within(builder.spawn(fails, ()).unwrap()).await.unwrap_err();
        let backtrace = error.panic().unwrap().backtrace();
        assert_eq!(!backtrace.is_empty(), wanted, "{variables:?} {said:?}: {backtrace}");
    }
}

#[tokio::test]
async fn a_panic_that_nothing_can_catch_is_reported_before_it_ends_the_process() {
    extern "C" fn of_a_library() {
        panic!("no luck")
    }
    fn by_callback() {
        of_a_library();
    }
    struct Worse;
    impl Drop for Worse {
        fn drop(&mut self) {
            panic!("worse luck")
        }
    }
    fn by_drop() {
        let _worse = Worse;
        panic!("no luck")
    }
    for method in [StartMethod::ForkServer, StartMethod::Spawn] {
        for (is_callback, text) in [(true, "no luck"), (false, "luck")] {
            let builder = || Process::builder().start_method(method).stderr(Stdio::null());
            let child = match is_callback {
                true => builder().spawn(by_callback, ()),
                false => builder().spawn(by_drop, ()),
            };
            let error = within(child.unwrap()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Panicked, "{error}");
            assert!(error.panic().unwrap().message().contains(text), "{error}");
            assert!(error.panic().unwrap().location().unwrap().starts_with("tests/process.rs:"), "{error}");
            assert_eq!(error.exit_status().unwrap().signal(), Some(libc::SIGABRT));
        }
    }
}

#[tokio::test]
async fn subp_02_a_panic_is_on_stderr_before_the_exit_and_whole_in_the_error() {
    let line = line!() + 2;
    fn fails() -> u8 {
        panic!("no {}", "luck")
    }
    let mut child = Process::builder().stderr(Stdio::piped()).env("RUST_BACKTRACE", "1").spawn(fails, ()).unwrap();
    let error = within(child.join()).await.unwrap_err();
    let panic = error.panic().unwrap();
    assert_eq!((error.kind(), panic.message()), (ErrorKind::Panicked, "no luck"));
    assert!(panic.location().unwrap().starts_with(&format!("tests/process.rs:{line}:")), "{panic:?}");
    assert!(panic.backtrace().contains("fails"), "{}", panic.backtrace());
    let mut text = String::new();
    child.take_stderr().unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains("no luck") && text.contains("stack backtrace"), "{text}");
    assert!(within(child.wait()).await.unwrap().success());
}

#[tokio::test]
async fn subp_02_an_async_panic_and_a_string_payload_too() {
    async fn fails(text: String) -> u8 {
        tokio::task::yield_now().await;
        std::panic::panic_any(text)
    }
    let error = within(Process::builder().stderr(Stdio::null()).spawn(fails, ("why".into(),)).unwrap()).await;
    let error = error.unwrap_err();
    assert_eq!(error.panic().unwrap().message(), "why");
    assert!(error.panic().unwrap().location().unwrap().starts_with("tests/process.rs:"));
}

fn exits(code: i32) {
    std::process::exit(code)
}

async fn exit_code(code: i32) -> Option<i32> {
    let mut child = Process::spawn(exits, (code,)).unwrap();
    let error = within(child.join()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ProcessDied);
    error.exit_status().unwrap().code()
}

#[tokio::test]
async fn subp_04_exit_codes() {
    for code in [0, 1, 8] {
        assert_eq!(exit_code(code).await, Some(code));
    }
}

/// 88 is also that of a process that cannot take its role, because its `main` forks.
#[tokio::test]
async fn subp_04_exit_code_of_the_function_is_not_explained() {
    for method in [StartMethod::ForkServer, StartMethod::Spawn] {
        for code in 86..=91 {
            let mut child = Process::builder().start_method(method).spawn(exits, (code,)).unwrap();
            let error = within(child.join()).await.unwrap_err();
            assert!(error.to_string().ends_with(&format!("exit status: {code} [died]")), "{error}");
        }
    }
}

#[tokio::test]
async fn subp_05_only_8_bits_of_an_exit_code_survive() {
    assert_eq!(exit_code(-1).await, Some(255));
    assert_eq!(exit_code(256).await, Some(0));
    assert_eq!(exit_code(300).await, Some(44));
}

#[tokio::test]
async fn subp_06_death_by_any_signal_is_reported() {
    fn raise(signal: i32) {
        let me = rustix::process::getpid().as_raw_nonzero().get().to_string();
        std::process::Command::new("kill").args([&format!("-{signal}"), &me]).status().unwrap();
        loop {
            std::thread::park();
        }
    }
    for signal in [11, 6, 40, 2] {
        let mut child = Process::spawn(raise, (signal,)).unwrap();
        let error = within(child.join()).await.unwrap_err();
        assert_eq!(error.exit_status().unwrap().signal(), Some(signal));
    }
    fn aborts() {
        std::process::abort()
    }
    let mut child = Process::spawn(aborts, ()).unwrap();
    assert_eq!(within(child.join()).await.unwrap_err().exit_status().unwrap().signal(), Some(6));
}

#[tokio::test]
async fn subp_03_an_error_result_is_a_value() {
    fn fails() -> mp::Result<u8> {
        Err(mp::Error::other("no luck"))
    }
    let mut child = Process::spawn(fails, ()).unwrap();
    assert_eq!(within(child.join()).await.unwrap().unwrap_err().to_string(), "no luck");
    assert!(within(child.wait()).await.unwrap().success());
}

#[tokio::test]
async fn eintr_01_join_survives_signals() {
    let (tx, mut ready) = mp::simplex().unwrap();
    let parent = async |mut ready: mp::Sender<()>| {
        handle_signals();
        ready.send(()).await.unwrap();
        let mut sum = 0;
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            for n in 0..10 {
                // Long enough for several signals to come while it is joined.
                let slow = |n: i64| {
                    std::thread::sleep(Duration::from_millis(3));
                    n
                };
                sum += Process::builder().start_method(method).spawn(slow, (n,)).unwrap().await.unwrap();
            }
        }
        sum
    };
    let parent = Process::spawn(parent, (tx,)).unwrap();
    within(ready.recv()).await.unwrap();
    assert_eq!(pestered(parent).await, 90);
}

#[tokio::test]
async fn stdin_01_a_queue_works_in_a_grandchild_while_stdin_is_replaced() {
    for method in [StartMethod::ForkServer, StartMethod::Spawn] {
        let queue = Queue::<(String, String)>::unbounded().unwrap();
        let child = async |queue: Queue<(String, String)>| {
            let read_all = || std::io::read_to_string(std::io::stdin()).unwrap();
            let mine = read_all();
            let grandchild = async |queue: Queue<(String, String)>, theirs: String| {
                queue.put((theirs, std::io::read_to_string(std::io::stdin()).unwrap())).await.unwrap();
            };
            let builder = Process::builder().stdin(Stdio::piped());
            let mut process = builder.spawn(grandchild, (queue, mine)).unwrap();
            process.take_stdin().unwrap().write_all(b"grandchild's").unwrap();
            process.await.unwrap();
        };
        let builder = Process::builder().start_method(method).stdin(Stdio::piped());
        let mut process = builder.spawn(child, (queue.clone(),)).unwrap();
        process.take_stdin().unwrap().write_all(b"child's").unwrap();
        within(process).await.unwrap();
        assert_eq!(queue.try_get().unwrap(), ("child's".into(), "grandchild's".into()));
    }
}

#[tokio::test]
async fn stdin_02_a_child_with_a_runtime_has_children_of_its_own() {
    async fn nested() -> i64 {
        let children: Vec<_> = (0..4).map(|n| Process::spawn(add, (n, n)).unwrap()).collect();
        futures::future::try_join_all(children).await.unwrap().iter().sum()
    }
    assert_eq!(within(Process::spawn(nested, ()).unwrap()).await.unwrap(), 12);
}

#[tokio::test]
async fn sm_01_a_child_reports_its_start_method() {
    let method = || mp::current_process().start_method();
    for wanted in [StartMethod::ForkServer, StartMethod::Spawn] {
        let child = Process::builder().start_method(wanted).spawn(method, ()).unwrap();
        assert_eq!(within(child).await.unwrap(), Some(wanted));
    }
    assert_eq!(mp::current_process().start_method(), None);
}

#[tokio::test]
async fn sm_07_a_spawned_child_is_like_a_forked_one() {
    fn life(mut write: Fd<std::io::PipeWriter>, big: Vec<u8>) -> (String, usize) {
        write.write_all(b"x").unwrap();
        println!("out");
        (std::env::var("MARK").unwrap_or_default(), big.len())
    }
    for method in [StartMethod::ForkServer, StartMethod::Spawn] {
        let (mut read, write) = std::io::pipe().unwrap();
        let builder = Process::builder().start_method(method).env("MARK", "m").stdout(Stdio::piped());
        let mut child = builder.spawn(life, (Fd::new(write), vec![0; 1 << 20])).unwrap();
        assert_eq!(within(child.join()).await.unwrap(), ("m".into(), 1 << 20));
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        child.take_stdout().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "xout\n");
        let mut child = Process::builder().start_method(method).spawn(hang, ()).unwrap();
        child.kill().unwrap();
        assert_eq!(within(child.wait()).await.unwrap().signal(), Some(9));
    }
}

#[tokio::test]
async fn sm_08_a_child_passes_its_arguments_on() {
    async fn pass_on(write: Fd<std::io::PipeWriter>) {
        let writes = |mut write: Fd<std::io::PipeWriter>| write.write_all(b"from below").unwrap();
        Process::spawn(writes, (write,)).unwrap().await.unwrap();
    }
    let (mut read, write) = std::io::pipe().unwrap();
    within(Process::spawn(pass_on, (Fd::new(write),)).unwrap()).await.unwrap();
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "from below");
}

#[tokio::test]
async fn piped_streams_are_a_conversation() {
    fn upper() {
        let line = std::io::stdin().lines().next().unwrap().unwrap();
        print!("{}", line.to_uppercase());
        eprint!("done");
    }
    let builder = Process::builder().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = builder.spawn(upper, ()).unwrap();
    child.take_stdin().unwrap().write_all(b"hello\n").unwrap();
    within(child.join()).await.unwrap();
    let mut text = String::new();
    child.take_stdout().unwrap().read_to_string(&mut text).unwrap();
    child.take_stderr().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "HELLOdone");
}

#[tokio::test]
async fn a_directory_of_its_own() {
    let here = || std::env::current_dir().unwrap();
    let mut child = Process::builder().current_dir("/proc/sys").spawn(here, ()).unwrap();
    assert_eq!(within(child.join()).await.unwrap().to_str(), Some("/proc/sys"));
    let error = Process::builder().current_dir("/does/not/exist").spawn(here, ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Spawn);
    assert!(error.to_string().contains("/does/not/exist"), "{error}");
}

#[tokio::test]
async fn a_variable_that_cannot_be_one_is_refused() {
    for (key, value) in [("A=B", "x"), ("", "x"), ("A", "x\0y")] {
        let error = Process::builder().env(key, value).spawn(add, (1, 1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Spawn);
    }
}

#[tokio::test]
async fn large_arguments_and_results() {
    let echo = |bytes: Vec<u8>| bytes;
    let sent: Vec<u8> = (0..64 << 20).map(|n: u32| (n >> 8) as u8).collect();
    let back = within(Process::spawn(echo, (sent.clone(),)).unwrap()).await.unwrap();
    assert!(back == sent);
    for len in [0, 1, 8000, 8191, 8192, 8193, 16_300, 16_384, 16_385, 100_000] {
        let numbers = |len: usize, bytes: Vec<u32>| (len == bytes.len(), bytes);
        let sent: Vec<u32> = (0..len as u32).collect();
        assert_eq!(within(Process::spawn(numbers, (len, sent.clone())).unwrap()).await.unwrap(), (true, sent));
    }
}

#[tokio::test]
async fn more_descriptors_than_one_message_carries() {
    let echo = |fds: Vec<Fd<std::fs::File>>| fds;
    let sent: Vec<_> = (0..600).map(|_| Fd::new(std::fs::File::open("/dev/null").unwrap())).collect();
    let back = within(Process::spawn(echo, (sent,)).unwrap()).await.unwrap();
    assert_eq!(back.len(), 600);
}

#[tokio::test]
async fn arguments_that_do_not_encode_or_decode_are_errors_of_these_kinds() {
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Picky(#[serde(serialize_with = "never")] u8);
    fn never<S: serde::Serializer>(_: &u8, _: S) -> Result<S::Ok, S::Error> {
        Err(serde::ser::Error::custom("not today"))
    }
    let error = Process::spawn(|picky: Picky| picky.0, (Picky(1),)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Encode);

    #[derive(serde::Serialize)]
    struct OneWay(u8);
    impl<'de> serde::Deserialize<'de> for OneWay {
        fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
            Err(serde::de::Error::custom("not here"))
        }
    }
    let error = within(Process::spawn(|one: OneWay| one.0, (OneWay(1),)).unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Decode);
    let error = within(Process::spawn(|| OneWay(1), ()).unwrap()).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Decode);
    let error = within(Process::spawn(|| Picky(1), ()).unwrap()).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Encode);
}

#[test]
fn a_process_moves_from_runtime_to_runtime() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (read, write) = std::io::pipe().unwrap();
    let mut child = Process::spawn(until_closed, (Fd::new(read),)).unwrap(); // No runtime is needed to spawn.
    for _ in 0..3 {
        let short = runtime();
        assert!(short.block_on(async { tokio::time::timeout(Duration::from_millis(5), child.join()).await }).is_err());
    }
    let (one, two) = (runtime(), runtime());
    assert!(one.block_on(async { tokio::time::timeout(Duration::from_millis(5), child.join()).await }).is_err());
    std::thread::spawn(move || drop(write));
    assert_eq!(two.block_on(within(child.join())).unwrap(), 0);
}

#[test]
fn awaiting_without_a_runtime_is_an_error_not_a_panic() {
    let (read, write) = std::io::pipe().unwrap();
    let mut child = Process::spawn(until_closed, (Fd::new(read),)).unwrap();
    let error = futures::executor::block_on(child.join()).unwrap_err();
    assert!(error.to_string().contains("tokio runtime"), "{error}");
    drop(write);
}

#[test]
fn process_is_send_sync_and_a_future() {
    fn is<T: Send + Sync + Unpin + std::fmt::Debug>() {}
    is::<Process<i32>>();
    is::<Process<String>>();
    fn sends<T: Send>(_: T) {}
    let mut child = Process::spawn(add, (1, 1)).unwrap();
    sends(child.join());
}

#[tokio::test]
async fn signals_and_their_mask_are_as_in_a_fresh_program() {
    let status = || std::fs::read_to_string("/proc/self/status").unwrap();
    for method in [StartMethod::ForkServer, StartMethod::Spawn] {
        let child = Process::builder().start_method(method).spawn(status, ()).unwrap();
        let theirs = within(child).await.unwrap();
        let mask = |status: &str, name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
        };
        assert_eq!(mask(&theirs, "SigBlk:"), 0);
        // The C library keeps 32 and 33 for itself.
        let ignored = |status: &str| mask(status, "SigIgn:") & !(0b11 << (32 - 1)) | 1 << (13 - 1);
        assert_eq!(ignored(&theirs), ignored(&status()), "what this program ignores, and SIGPIPE");
    }
}

#[tokio::test]
async fn a_child_keeps_only_the_descriptors_it_should() {
    fn listed() -> Vec<String> {
        let dir = std::fs::read_dir("/proc/self/fd").unwrap();
        dir.filter_map(|entry| Some(std::fs::read_link(entry.ok()?.path()).ok()?.to_string_lossy().into_owned()))
            .collect()
    }
    for method in [StartMethod::ForkServer, StartMethod::Spawn] {
        let builder = Process::builder().start_method(method).stdin(Stdio::null());
        let child = builder.stdout(Stdio::null()).stderr(Stdio::null()).spawn(listed, ()).unwrap();
        let listed = within(child).await.unwrap();
        let count = |what: &str| listed.iter().filter(|name| name.starts_with(what)).count();
        assert_eq!(count("anon_inode:[eventfd]"), 64 + 1, "the doorbells and the supervisor's: {listed:?}");
        assert_eq!(count("socket:"), 2, "intake and report: {listed:?}");
        assert_eq!(count("pipe:"), 2, "the root's lifeline and its starter's: {listed:?}");
        assert_eq!(count("anon_inode:[signalfd]"), 0);
        assert_eq!(count("anon_inode:[pidfd]") + count("pidfd:"), 0, "{listed:?}");
        assert!(listed.len() <= 3 + 65 + 2 + 2 + 3, "{listed:?}");
    }
}
