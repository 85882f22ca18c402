//! Children that end early, preloads that take long, and processes that were forked from one that uses the crate. Each
//! scenario runs in a process of its own.
#![allow(clippy::unwrap_used)] // A test, though clippy sees none in a harness of our own.

#[path = "common/alone.rs"]
mod alone;

use alone::{Scenario, block_on, children_of, kill, processes, scenarios, server, until, within};
use multiprocess::{self as mp, ErrorKind, Process, StartMethod};
use rustix::process::Signal;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

const SCENARIOS: &[Scenario] = scenarios! {
    the_end_of_each_early_child_is_reported
    two_thousand_children_in_bursts_leave_neither_a_zombie_nor_a_lost_status
    a_parent_that_waits_for_any_child_takes_no_status_away
    a_preload_that_starts_processes_takes_no_status_away
    a_preload_that_leaves_a_thread_which_waits_for_any_child_hangs_no_call
    action_that_a_preload_sets_for_sigchld_is_for_children_only
    a_server_that_cannot_poll_loses_no_child_and_goes_on
    each_use_in_a_forked_process_is_an_error_whatever_other_threads_are_at
    waiter_is_woken_though_a_forked_process_has_tried_the_same_queue
    calls_and_streams_that_have_begun_end_with_an_error_in_a_forked_process
    drop_in_a_forked_process_takes_nothing_from_its_parent
    children_end_with_their_parent_though_a_forked_process_goes_on
    forking_after_init_and_before_the_first_use_works_in_both
    each_use_in_a_process_forked_from_a_child_is_an_error_and_its_parent_goes_on
    a_runtime_ticks_on_while_a_pool_or_a_task_waits_for_a_slow_preload
    a_preload_that_fails_slowly_is_an_error_of_each_waiter
    preloads_run_beside_the_program_until_its_first_spawn
    preloads_run_in_their_order_and_once_each
    a_server_that_is_killed_while_it_preloads_is_replaced_and_its_preloads_run_again
    a_preload_that_failed_before_the_first_spawn_is_an_error_of_each_spawn
    a_task_that_spawns_before_the_preloads_are_done_holds_no_other_task_up
    a_local_task_can_spawn_before_the_preloads_are_done
    a_spawn_keeps_the_only_thread_of_its_runtime_until_the_preloads_are_done_and_nothing_else
    a_group_of_its_own_ends_with_the_parent_whatever_it_has_started_or_executed
    a_child_that_has_closed_everything_goes_on_without_its_parent_unless_its_group_has_the_tie
    a_child_that_closes_everything_is_seen_to_its_end
    a_child_whose_handle_is_dropped_at_once_runs_all_the_same
    a_result_is_there_though_a_blocking_task_of_its_process_runs_on
    a_result_is_there_though_its_process_waits_for_a_child
    counters_of_an_instrumented_program_are_written_by_children_that_end
    each_child_and_worker_has_random_numbers_of_its_own
};

fn main() -> ExitCode {
    alone::main_of(SCENARIOS)
}

fn zombies_of(parent: u32) -> usize {
    children_of(parent).iter().filter(|(_, state)| *state == 'Z').count()
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
async fn assert_status(how: u64, mut child: Process<u64>) {
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

/// Starts `bursts` times `size` children, one in `exec` of them afresh. On a busy machine a fifth of them must do, and it says so.
async fn bursts(bursts: u64, size: u64, exec: u64) {
    let (begun, enough) = (Instant::now(), Duration::from_secs(40));
    let (all, mut ended) = (bursts * size, 0);
    let method = |n: u64| if n.is_multiple_of(exec) { StartMethod::Spawn } else { StartMethod::ForkServer };
    for burst in 0..bursts {
        // Neither way to end goes with one method alone.
        let all: Vec<_> = (0..size).map(|n| (n / exec + n + burst, method(n))).collect();
        let started: Vec<_> = all.into_iter().map(|(how, method)| (how, start(how, method))).collect();
        for (how, child) in started {
            assert_status(how, child).await;
            ended += 1;
        }
        if burst + 1 >= bursts.div_ceil(5) && begun.elapsed() > enough {
            break;
        }
    }
    let rest = if ended < all { "SKIPPED: the rest, as the machine is busy. " } else { "" };
    println!("{rest}{ended} of {all} children in {:?}", begun.elapsed());
    assert!(5 * ended >= all, "{ended} of {all}");
    assert!(mp::active_children().is_empty());
}

fn the_end_of_each_early_child_is_reported() {
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

fn a_preload_that_leaves_a_thread_which_waits_for_any_child_hangs_no_call() {
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

fn action_that_a_preload_sets_for_sigchld_is_for_children_only() {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal as Number, sigaction};
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

fn a_server_that_cannot_poll_loses_no_child_and_goes_on() {
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

/// Runs `f` in a process that is forked from this one the plain way, and has it say what it found. The fork must end in
/// time, whatever locks other threads had.
fn in_fork(f: impl FnOnce() -> String) -> String {
    let (mut read, mut write) = std::io::pipe().unwrap();
    // SAFETY: the C library makes its own locks good in the child; that ours are not in the way is what is tested.
    match unsafe { libc::fork() } {
        -1 => panic!("{}", std::io::Error::last_os_error()),
        0 => {
            drop(read);
            let said = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
            let said = said.unwrap_or_else(|panic| match panic.downcast_ref::<String>() {
                Some(text) => format!("panicked: {text}"),
                None => "panicked".to_string(),
            });
            let _ = write.write_all(said.as_bytes());
            // SAFETY: it does not return.
            unsafe { libc::_exit(0) }
        }
        pid => {
            drop(write);
            use std::os::fd::AsFd;
            let deadline = Instant::now() + Duration::from_secs(20);
            let mut said = String::new();
            let mut fds = [nix::poll::PollFd::new(read.as_fd(), nix::poll::PollFlags::POLLIN)];
            let came = nix::poll::poll(&mut fds, 20_000u16).unwrap();
            if came == 0 || Instant::now() > deadline {
                kill(pid as u32, Signal::KILL);
                panic!("the forked process hangs");
            }
            read.read_to_string(&mut said).unwrap();
            // SAFETY: no status is asked for.
            unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
            said
        }
    }
}

/// Everything that a program may have of this crate when it forks.
struct All {
    pool: mp::Pool,
    manager: mp::Manager,
    list: mp::ListProxy<u64>,
    queue: mp::Queue<u64>,
    lock: mp::Lock,
    rlock: mp::RLock,
    rwlock: mp::RwLock,
    event: mp::Event,
    semaphore: mp::Semaphore,
    condition: mp::Condition,
    barrier: mp::Barrier,
    value: mp::Value<[u64; 4]>,
    array: mp::Array<u64>,
    sender: mp::Sender<u64>,
    receiver: mp::Receiver<u64>,
    child: Process<u64>,
}

impl All {
    async fn used() -> Self {
        let child = Process::spawn(
            async || {
                hang().await;
                1
            },
            (),
        );
        let (sender, receiver) = mp::simplex().unwrap();
        let manager = mp::Manager::start().await.unwrap();
        let list = manager.list().await.unwrap();
        let all = Self {
            pool: mp::Pool::new(2).unwrap(),
            manager,
            list,
            queue: mp::Queue::unbounded().unwrap(),
            lock: mp::Lock::new().unwrap(),
            rlock: mp::RLock::new().unwrap(),
            rwlock: mp::RwLock::new().unwrap(),
            event: mp::Event::new().unwrap(),
            semaphore: mp::Semaphore::new(2).unwrap(),
            condition: mp::Condition::new().unwrap(),
            barrier: mp::Barrier::new(1).unwrap(),
            value: mp::Value::new([1; 4]).unwrap(),
            array: mp::Array::from_slice(&[1, 2, 3]).unwrap(),
            sender,
            receiver,
            child: child.unwrap(),
        };
        assert_eq!(all.pool.apply(add, (1, 2)).await.unwrap(), 3);
        all
    }

    /// The kinds of the errors of one use each.
    async fn use_each(&mut self) -> Vec<(&'static str, ErrorKind)> {
        fn kind<T>(result: Result<T, impl Into<mp::Error>>) -> ErrorKind {
            result.map_or_else(|error| error.into().kind(), |_| ErrorKind::Other)
        }
        let second = Duration::from_secs(1);
        vec![
            ("spawn", kind(Process::spawn(add, (1, 2)))),
            ("join", kind(self.child.join().await)),
            ("wait", kind(self.child.wait().await)),
            ("kill", kind(self.child.kill())),
            ("pool", kind(self.pool.apply(add, (1, 2)).await)),
            ("map", kind(self.pool.map(|n: u64| n, [1, 2, 3]).await)),
            ("new pool", kind(mp::Pool::new(1))),
            ("pool's join", kind(self.pool.join().await)),
            ("put", kind(self.queue.put(1).await)),
            ("try_put", kind(self.queue.try_put(1))),
            ("get", kind(self.queue.get().await)),
            ("get_timeout", kind(self.queue.get_timeout(second).await)),
            ("try_get", kind(self.queue.try_get())),
            ("new queue", kind(mp::Queue::<u64>::unbounded())),
            ("lock", kind(self.lock.acquire().await)),
            ("try_lock", kind(self.lock.try_acquire())),
            ("rlock", kind(self.rlock.acquire().await)),
            ("rlock in time", kind(self.rlock.acquire_timeout(second).await)),
            ("try_rlock", kind(self.rlock.try_acquire())),
            ("read", kind(self.rwlock.read().await)),
            ("write", kind(self.rwlock.write().await)),
            ("event", kind(self.event.wait().await)),
            ("semaphore", kind(self.semaphore.acquire().await)),
            ("release", kind(self.semaphore.release())),
            ("condition", kind(self.condition.lock().await)),
            ("barrier", kind(self.barrier.wait().await)),
            ("value", kind(self.value.lock().await)),
            ("array", kind(self.array.lock().await)),
            ("send", kind(self.sender.send(1).await)),
            ("receive", kind(self.receiver.recv().await)),
            ("manager", kind(self.list.push(1).await)),
            ("new object", kind(self.manager.list::<u64>().await)),
            ("new manager", kind(mp::Manager::start().await)),
            ("shared memory", kind(mp::SharedMemory::create(&format!("forked-{}", std::process::id()), 10))),
        ]
    }

    async fn assert_well(&mut self) {
        within(async {
            assert_eq!(self.pool.map(|n: u64| 2 * n, [1, 2, 3]).await.unwrap(), [2, 4, 6]);
            self.queue.put(5).await.unwrap();
            assert_eq!(self.queue.get().await.unwrap(), 5);
            self.sender.send(6).await.unwrap();
            assert_eq!(self.receiver.recv().await.unwrap(), 6);
            assert_eq!(self.lock.acquire().await.map(drop).map_err(|error| error.kind()), Ok(()));
            assert_eq!(self.rwlock.write().await.map(drop).map_err(|error| error.kind()), Ok(()));
            let both = [self.semaphore.try_acquire(), self.semaphore.try_acquire()].map(|permit| permit.is_ok());
            assert_eq!(both, [true, true]);
            assert!(self.semaphore.try_acquire().is_ok());
            self.barrier.wait().await.unwrap();
            assert_eq!(self.value.lock().await.map(|value| *value).map_err(|error| error.kind()), Ok([1; 4]));
            let before = self.list.len().await.unwrap();
            self.list.push(7).await.unwrap();
            assert_eq!(self.list.len().await.unwrap(), before + 1);
            assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
            assert!(self.child.is_alive());
        })
        .await;
    }
}

fn each_use_in_a_forked_process_is_an_error_whatever_other_threads_are_at() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap();
    let mut all = runtime.block_on(within(All::used()));
    static ROUNDS: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];
    // This thread has one, and so has its copy, by its number.
    let held = all.rlock.try_acquire().unwrap();
    // Others hold the locks of this process again and again while it forks.
    let (pool, queue, list) = (all.pool.clone(), mp::Queue::unbounded().unwrap(), all.list.clone());
    runtime.spawn(async move {
        loop {
            pool.apply(add, (1, 2)).await.unwrap();
            ROUNDS[0].fetch_add(1, SeqCst);
        }
    });
    runtime.spawn(async move {
        loop {
            queue.put(1).await.unwrap();
            let got: u64 = queue.get().await.unwrap();
            list.len().await.unwrap();
            assert_eq!(got, 1);
            ROUNDS[1].fetch_add(1, SeqCst);
        }
    });
    runtime.spawn(async move {
        loop {
            assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
            ROUNDS[2].fetch_add(1, SeqCst);
        }
    });
    for _ in 0..8 {
        let rounds = || ROUNDS.each_ref().map(|round| round.load(SeqCst));
        let before = rounds();
        until("the others are at it", || rounds().iter().zip(before).all(|(now, before)| *now > before));
        let found = in_fork(|| {
            assert!(mp::active_children().is_empty());
            let found = block_on(all.use_each());
            format!("{:?}", found.into_iter().filter(|(_, kind)| *kind != ErrorKind::Forked).collect::<Vec<_>>())
        });
        assert_eq!(found, "[]");
    }
    let said = in_fork(|| Process::spawn(add, (1, 2)).unwrap_err().to_string());
    assert!(said.contains("daemonize before the first use"), "{said}");
    let said = in_fork(|| {
        let set = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| all.array.set(0, 1)));
        let panicked = set.expect_err("it cannot be set");
        panicked.downcast_ref::<String>().cloned().unwrap_or_default()
    });
    assert!(said.contains("[forked]"), "{said}");
    drop(held);
    runtime.block_on(all.assert_well());
    all.child.kill().unwrap();
    assert_eq!(runtime.block_on(within(all.child.wait())).unwrap().signal(), Some(9));
    runtime.shutdown_background();
}

/// Its refused uses wake nobody, and take nobody's notification.
fn waiter_is_woken_though_a_forked_process_has_tried_the_same_queue() {
    block_on(async {
        let (queue, begins) = (mp::Queue::<u64>::unbounded().unwrap(), mp::Event::new().unwrap());
        let take = async |queue: mp::Queue<u64>, begins: mp::Event| {
            begins.set();
            queue.get().await.unwrap()
        };
        let child = Process::spawn(take, (queue.clone(), begins.clone())).unwrap();
        within(begins.wait()).await.unwrap();
        until("it sleeps", || processes().iter().any(|(pid, _, state)| *pid == child.pid() && *state == 'S'));
        let said = in_fork(|| {
            let kinds = [queue.try_get().unwrap_err().kind(), queue.try_put(7).unwrap_err().kind()];
            queue.close();
            format!("{kinds:?}")
        });
        assert_eq!(said, "[Forked, Forked]");
        queue.put(1).await.unwrap();
        assert_eq!(within(child).await.unwrap(), 1);
    });
}

/// Also if results of a stream in order have come before their turn, and whichever began before the fork. It stops nothing of its parent's.
fn calls_and_streams_that_have_begun_end_with_an_error_in_a_forked_process() {
    use futures::{Stream, StreamExt};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let slow = |n: u64| {
        let wait = if n == 2 { 200 } else { 0 };
        std::thread::sleep(Duration::from_millis(wait));
        2 * n
    };
    let fails = |result: &mp::Result<u64>| result.is_err();
    let queue = mp::Queue::<u64>::unbounded().unwrap();
    let (pool, mut in_order, mut in_any) = runtime.block_on(within(async {
        let pool = mp::Pool::new(2).unwrap();
        let (mut in_order, mut in_any) = (pool.imap(slow, 1..=10).chunksize(1), pool.imap_unordered(slow, 1..=10));
        assert_eq!(in_order.next().await.unwrap().unwrap(), 2);
        in_any.next().await.unwrap().unwrap();
        (pool, in_order, in_any)
    }));
    let mut singles = pool.imap(slow, 1..=10).retries(3).retry_if(fails);
    let mut call = std::pin::pin!(pool.apply(hang, ()).into_future());
    let mut map = std::pin::pin!(pool.map(slow, 1..=100).retries(3).retry_if(fails).into_future());
    let (running, asked) = runtime.block_on(within(async {
        singles.next().await.unwrap().unwrap();
        let running = pool.apply_async(slow, (2,));
        assert!(futures::poll!(&mut call).is_pending() && futures::poll!(&mut map).is_pending());
        let asked = pool.apply_async(slow, (3,));
        (running, asked)
    }));
    let mut group = mp::Group::new();
    group.spawn(hang, ()).unwrap();
    let mut joins = std::pin::pin!(group.join_next());
    let restarts = Process::builder().restart(mp::Restart::always());
    let mut kept = runtime.block_on(async { restarts.spawn(hang, ()) }).unwrap();
    let mut waits = std::pin::pin!(kept.wait());
    runtime.block_on(async {
        assert!(futures::poll!(&mut joins).is_pending() && futures::poll!(&mut waits).is_pending());
    });
    let said = in_fork(|| {
        running.cancel();
        asked.cancel();
        let kinds = |results: &mut (dyn Stream<Item = mp::Result<u64>> + Unpin)| {
            block_on(results.map(|result| result.map_err(|error| error.kind())).collect::<Vec<_>>())
        };
        let streams = [kinds(&mut in_order), kinds(&mut in_any), kinds(&mut singles), kinds(&mut queue.stream())];
        let kind = |error: Option<mp::Error>| error.map(|error| error.kind());
        let called = block_on(async { (kind(call.await.err()), kind(map.await.err())) });
        let joined = block_on(joins).and_then(|joined| kind(joined.err()));
        let waited = kind(block_on(waits).err());
        format!("{streams:?} {called:?} {joined:?} {waited:?}")
    });
    let forked = "Some(Forked)";
    let ends = "[Err(Forked)]";
    assert_eq!(said, format!("[{ends}, {ends}, {ends}, {ends}] ({forked}, {forked}) {forked} {forked}"));
    runtime.block_on(within(async {
        assert_eq!((running.await.unwrap(), asked.await.unwrap()), (4, 6));
        assert_eq!(in_order.next().await.unwrap().unwrap(), 4);
    }));
}

fn drop_in_a_forked_process_takes_nothing_from_its_parent() {
    block_on(async {
        let mut all = within(All::used()).await;
        let name = format!("kept-{}", std::process::id());
        let memory = mp::SharedMemory::create(&name, 10).unwrap();
        let mut waited = Process::spawn(hang, ()).unwrap();
        let waiting = all.queue.clone();
        let (mut get, mut join) = (Box::pin(waiting.get()), Box::pin(waited.wait()));
        // Both sleep: the runtime's epoll watches for them.
        let asleep =
            tokio::time::timeout(Duration::from_millis(300), async { tokio::join!(&mut get, &mut join) }).await;
        assert!(asleep.is_err());
        let guard = all.lock.acquire().await.unwrap();
        let reads = all.rwlock.read().await.unwrap();
        let permit = all.semaphore.acquire().await.unwrap();
        let mut value = all.value.lock().await.unwrap();
        value[0] = 9;
        let said = in_fork(|| {
            // SAFETY: each is read once here, in another process, and the originals are not touched in it.
            unsafe {
                drop((std::ptr::read(&get), std::ptr::read(&join)));
                drop((std::ptr::read(&guard), std::ptr::read(&reads), std::ptr::read(&permit)));
                drop((std::ptr::read(&value), std::ptr::read(&memory), std::ptr::read(&all)));
            }
            "dropped".to_string()
        });
        assert_eq!(said, "dropped");
        let lock = all.lock.clone();
        let others =
            async |lock: mp::Lock, rwlock: mp::RwLock, semaphore: mp::Semaphore, value: mp::Value<[u64; 4]>| {
                let one = semaphore.try_acquire().is_ok();
                let two =
                    [semaphore.try_acquire(), semaphore.try_acquire()].iter().filter(|permit| permit.is_ok()).count();
                (lock.try_acquire().is_ok(), rwlock.try_write().is_ok(), one, two, value.get())
            };
        let arguments = (lock, all.rwlock.clone(), all.semaphore.clone(), all.value.clone());
        let seen = within(Process::spawn(others, arguments).unwrap()).await.unwrap();
        assert_eq!(seen, (false, false, true, 1, [1; 4]), "all is held, and nothing is put back");
        assert!(std::path::Path::new("/dev/shm").join(&name).exists());
        drop(value);
        drop((guard, reads, permit, memory));
        all.value.set([1; 4]);
        all.queue.put(8).await.unwrap();
        assert_eq!(within(get).await.unwrap(), 8);
        drop(join);
        waited.kill().unwrap();
        assert_eq!(within(waited.wait()).await.unwrap().signal(), Some(9));
        all.assert_well().await;
    });
}

fn children_end_with_their_parent_though_a_forked_process_goes_on() {
    if std::env::var_os("INNER").is_some() {
        block_on(async {
            let child = Process::spawn(hang, ()).unwrap();
            let server = server();
            let memory = mp::SharedMemory::create(&format!("gone-{}", std::process::id()), 10).unwrap();
            // SAFETY: the child only sleeps.
            let fork = unsafe { libc::fork() };
            if fork == 0 {
                std::thread::sleep(Duration::from_secs(90)); // Until it is killed.
                // SAFETY: it does not return.
                unsafe { libc::_exit(0) }
            }
            println!("{server} {} {fork}", child.pid());
            std::mem::forget(memory);
            hang().await
        });
    }
    let mut root = Command::new(std::env::current_exe().unwrap());
    let mut root = root.env("INNER", "1").stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(root.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let pids: Vec<u32> = line.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
    let runs = |pid: u32| processes().iter().any(|(other, _, state)| *other == pid && *state != 'Z');
    assert!(pids.iter().all(|pid| runs(*pid)), "{line}");
    root.kill().unwrap();
    root.wait().unwrap();
    until("the server and the child have ended", || !runs(pids[0]) && !runs(pids[1]));
    let name = format!("/dev/shm/gone-{}", root.id());
    until("the name is gone", || !std::path::Path::new(&name).exists());
    let goes_on = runs(pids[2]);
    kill(pids[2], Signal::KILL);
    assert!(goes_on, "the forked process is nobody's child here");
}

fn forking_after_init_and_before_the_first_use_works_in_both() {
    let use_it = || {
        block_on(within(async {
            let mut all = All::used().await;
            all.assert_well().await;
        }));
        "used".to_string()
    };
    assert_eq!(in_fork(use_it), "used");
    // As a daemon does: twice, in a session of its own.
    let daemon = in_fork(|| {
        rustix::process::setsid().unwrap();
        in_fork(use_it)
    });
    assert_eq!(daemon, "used");
    assert_eq!(use_it(), "used");
}

fn each_use_in_a_process_forked_from_a_child_is_an_error_and_its_parent_goes_on() {
    async fn forks(queue: mp::Queue<u64>) -> (String, u64) {
        let said = in_fork(|| format!("{:?}", queue.try_get().unwrap_err().kind()));
        (said, within(queue.get()).await.unwrap())
    }
    block_on(async {
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            let queue = mp::Queue::unbounded().unwrap();
            let child = Process::builder().start_method(method).spawn(forks, (queue.clone(),)).unwrap();
            queue.put(3).await.unwrap();
            assert_eq!(within(child).await.unwrap(), ("Forked".to_string(), 3));
        }
    });
}

/// A child, and what it has started: by `Command`, and by `fork`; it tells of them on its standard output.
#[allow(clippy::zombie_processes)] // All of them are to be killed.
fn starts_others() {
    let program = Command::new("sleep").arg("90").stdout(std::process::Stdio::null()).spawn().unwrap().id();
    // SAFETY: the child only sleeps, and ends.
    let fork = unsafe { libc::fork() };
    if fork == 0 {
        std::thread::sleep(Duration::from_secs(90));
        // SAFETY: it does not return.
        unsafe { libc::_exit(0) }
    }
    println!("{} {program} {fork}", std::process::id());
    std::thread::sleep(Duration::from_secs(90));
}

/// Becomes another program.
fn executes() {
    use std::os::unix::process::CommandExt;
    println!("{}", std::process::id());
    let error = Command::new("sleep").arg("90").exec();
    panic!("{error}");
}

fn a_group_of_its_own_ends_with_the_parent_whatever_it_has_started_or_executed() {
    if let Some(own) = std::env::var_os("INNER") {
        block_on(async {
            let mut children = Vec::new();
            for method in [StartMethod::ForkServer, StartMethod::ForkServer, StartMethod::Spawn] {
                let builder = || Process::builder().own_group(own == "own").start_method(method);
                children.push(builder().spawn(starts_others, ()).unwrap());
                children.push(builder().spawn(executes, ()).unwrap());
            }
            hang().await
        });
    }
    let runs = |pid: u32| processes().iter().any(|(other, _, state)| *other == pid && *state != 'Z');
    // Asleep: while the kernel is still at the exec it has not let go yet of what the program before had open.
    let is_sleep =
        |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains("(sleep) S "));
    for own in ["own", "none"] {
        let mut root = Command::new(std::env::current_exe().unwrap());
        let mut root = root.env("INNER", own).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(root.stdout.take().unwrap()).lines().take(6).map(Result::unwrap);
        let told: Vec<Vec<u32>> =
            lines.map(|line| line.split_whitespace().map(|pid| pid.parse().unwrap()).collect()).collect();
        let executed: Vec<u32> = told.iter().filter(|pids| pids.len() == 1).map(|pids| pids[0]).collect();
        let pids: Vec<u32> = told.iter().flatten().copied().collect();
        assert_eq!((executed.len(), pids.len()), (3, 12), "{told:?}");
        until("they are other programs", || executed.iter().all(|pid| is_sleep(*pid)));
        root.kill().unwrap();
        root.wait().unwrap();
        if own == "own" {
            until("all have ended", || !pids.iter().any(|pid| runs(*pid)));
        } else {
            // The plain rule, as it is documented: it is about the children alone, while they are this program.
            let children: Vec<u32> = told.iter().filter(|pids| pids.len() == 3).map(|pids| pids[0]).collect();
            until("the children have ended", || !children.iter().any(|pid| runs(*pid)));
            let others: Vec<u32> = pids.into_iter().filter(|pid| !children.contains(pid)).collect();
            let go_on = others.iter().all(|pid| runs(*pid));
            others.iter().for_each(|pid| kill(*pid, Signal::KILL));
            assert!(go_on);
        }
    }
}

fn close_everything() {
    (0..1024).for_each(|fd| _ = nix::unistd::close(fd));
}

fn closes_everything_and_goes_on() {
    println!("{}", std::process::id());
    close_everything();
    std::thread::sleep(Duration::from_secs(90));
}

/// The same, beside a program that it has started and that has the tie of their group.
#[allow(clippy::zombie_processes)] // Both are to be killed.
fn starts_a_program_and_closes_everything() {
    let program = Command::new("sleep").arg("90").stdout(std::process::Stdio::null()).spawn().unwrap().id();
    println!("{} {program}", std::process::id());
    close_everything();
    std::thread::sleep(Duration::from_secs(90));
}

fn a_child_that_has_closed_everything_goes_on_without_its_parent_unless_its_group_has_the_tie() {
    if std::env::var_os("INNER").is_some() {
        block_on(async {
            let builder = |method| Process::builder().start_method(method);
            let _alone = [StartMethod::ForkServer, StartMethod::Spawn]
                .map(|method| builder(method).spawn(closes_everything_and_goes_on, ()).unwrap());
            let group = builder(StartMethod::ForkServer).own_group(true);
            let _group = group.spawn(starts_a_program_and_closes_everything, ()).unwrap();
            hang().await
        });
    }
    let runs = |pid: &u32| processes().iter().any(|(other, _, state)| other == pid && *state != 'Z');
    let mut root = Command::new(std::env::current_exe().unwrap());
    let mut root = root.env("INNER", "1").stdout(std::process::Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(root.stdout.take().unwrap()).lines().take(3).map(Result::unwrap);
    let told: Vec<Vec<u32>> =
        lines.map(|line| line.split_whitespace().map(|pid| pid.parse().unwrap()).collect()).collect();
    let (group, alone): (Vec<_>, Vec<_>) = told.into_iter().partition(|pids| pids.len() == 2);
    let (group, alone) = (group.concat(), alone.concat());
    assert_eq!((group.len(), alone.len()), (2, 2));
    let has_none = |pid: &u32| std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().next().is_none();
    until("they have closed everything", || alone.iter().chain(&group[..1]).all(has_none));
    root.kill().unwrap();
    root.wait().unwrap();
    until("the group has ended", || !group.iter().any(runs));
    let go_on = alone.iter().all(runs);
    alone.iter().for_each(|pid| kill(*pid, Signal::KILL));
    assert!(go_on);
}

fn a_child_that_closes_everything_is_seen_to_its_end() {
    block_on(async {
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            let returns = || {
                close_everything();
                5
            };
            let mut child = Process::builder().start_method(method).spawn(returns, ()).unwrap();
            // Its result has no way to its parent; and Rust ends a debug build that finds a descriptor of its own closed.
            let error = within(child.join()).await.unwrap_err();
            let status = within(child.wait()).await.unwrap();
            assert_eq!((error.kind(), error.exit_status()), (ErrorKind::ProcessDied, Some(status)));
            let mut child = Process::builder().start_method(method).spawn(closes_everything_and_goes_on, ()).unwrap();
            let has_none =
                || std::fs::read_dir(format!("/proc/{}/fd", child.pid())).is_ok_and(|mut all| all.next().is_none());
            until("it has closed everything", has_none);
            assert!(tokio::time::timeout(Duration::from_millis(50), child.join()).await.is_err());
            assert!(child.is_alive() && child.exit_status().is_none());
            child.kill().unwrap();
            assert_eq!(within(child.wait()).await.unwrap().signal(), Some(9));
        }
    });
}

/// Calls `f` while a task of the same thread ticks; the longest time between two ticks.
async fn ticking<T>(f: impl Future<Output = T>) -> (T, Duration) {
    let mut f = std::pin::pin!(f);
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    loop {
        let tick = tokio::time::sleep(Duration::from_millis(5));
        let done = tokio::select! { biased; done = &mut f => Some(done), () = tick => None };
        longest = longest.max(last.elapsed());
        last = Instant::now();
        if let Some(done) = done {
            return (done, longest);
        }
    }
}

/// Far below what a preload here takes, with room for a machine that is busy with other things.
const SHORT: Duration = Duration::from_millis(1500);

fn a_runtime_ticks_on_while_a_pool_or_a_task_waits_for_a_slow_preload() {
    use std::sync::OnceLock;
    static LOADED: OnceLock<u32> = OnceLock::new();
    fn load() {
        std::thread::sleep(Duration::from_secs(3));
        LOADED.get_or_init(std::process::id);
    }
    mp::preload(load).unwrap();
    block_on(within(async {
        let start = Instant::now();
        let work = async {
            let pool = mp::Pool::new(2).unwrap();
            let waits = mp::preloaded();
            let loaded = pool.apply(|| LOADED.get().copied(), ());
            let (waited, loaded) = tokio::join!(waits, loaded);
            waited.unwrap();
            let spawned = Process::spawn(|| LOADED.get().copied(), ()).unwrap();
            (loaded.unwrap(), spawned.await.unwrap())
        };
        let ((of_worker, of_child), longest) = ticking(work).await;
        assert!(start.elapsed() > Duration::from_secs(3));
        assert!(longest < SHORT, "{longest:?}");
        // It was loaded once, in the fork server.
        assert_eq!((of_worker, of_child), (Some(server()), Some(server())));
    }));
}

fn a_preload_that_fails_slowly_is_an_error_of_each_waiter() {
    fn fails() {
        std::thread::sleep(Duration::from_secs(2));
        panic!("no model here");
    }
    mp::preload(fails).unwrap();
    block_on(within(async {
        let (result, longest) = ticking(mp::preloaded()).await;
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Spawn);
        assert!(error.to_string().contains("no model here"), "{error}");
        assert!(longest < SHORT, "{longest:?}");
    }));
}

/// A file that preloads write to, and the program that they are of: made and named by the first call, in the environment.
fn journal() -> std::path::PathBuf {
    let path = std::env::var_os("JOURNAL").map(std::path::PathBuf::from).unwrap_or_else(|| {
        let path = std::env::temp_dir().join(format!("multiprocess-preload-{}", alone::unique()));
        std::fs::write(&path, "").unwrap();
        // SAFETY: no other thread of this process reads the environment yet.
        unsafe { std::env::set_var("JOURNAL", &path) };
        path
    });
    assert!(path.exists());
    path
}

fn note(what: &str) {
    // One write, so that nobody reads half a line.
    let mut file = std::fs::File::options().append(true).open(journal()).unwrap();
    file.write_all(format!("{what}\n").as_bytes()).unwrap();
}

fn notes() -> Vec<String> {
    std::fs::read_to_string(journal()).unwrap().lines().map(String::from).collect()
}

fn note_me() {
    note(&std::process::id().to_string());
}

fn preloads_run_beside_the_program_until_its_first_spawn() {
    static LOADED: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    fn load() {
        note_me();
        LOADED.get_or_init(std::process::id);
    }
    let path = journal();
    mp::preload(load).unwrap();
    until("it runs though nobody spawns", || !notes().is_empty());
    block_on(within(async {
        let loaded = Process::spawn(|| LOADED.get().copied(), ()).unwrap().await.unwrap();
        assert_eq!(loaded, Some(server()));
    }));
    assert_eq!(notes(), [server().to_string()]);
    std::fs::remove_file(path).unwrap();
}

fn preloads_run_in_their_order_and_once_each() {
    use std::sync::Mutex;
    static LOADED: Mutex<Vec<u32>> = Mutex::new(Vec::new());
    fn load<const N: u32>() {
        LOADED.lock().unwrap().push(N);
        note(&N.to_string());
    }
    let path = journal();
    mp::preload(load::<1>).unwrap();
    until("the first runs", || notes() == ["1"]);
    mp::preload(load::<2>).unwrap();
    mp::preload(load::<3>).unwrap();
    block_on(within(async {
        let loaded = || LOADED.lock().unwrap().clone();
        assert_eq!(Process::spawn(loaded, ()).unwrap().await.unwrap(), [1, 2, 3]);
        let late = mp::preload(load::<4>).unwrap_err();
        assert!(late.to_string().contains("before the first spawn"), "{late}");
        assert_eq!(notes(), ["1", "2", "3"]);
        let mut killed = Process::spawn(async || std::future::pending::<()>().await, ()).unwrap();
        rustix::process::kill_process(pid_of(server()), Signal::KILL).unwrap();
        // A spare child may serve the next one or two.
        while notes().len() < 6 {
            assert_eq!(Process::spawn(loaded, ()).unwrap().await.unwrap(), [1, 2, 3]);
        }
        killed.kill().unwrap();
        let _ = killed.wait().await; // Init may have taken its status.
    }));
    assert_eq!(notes(), ["1", "2", "3", "1", "2", "3"]);
    std::fs::remove_file(path).unwrap();
}

fn pid_of(pid: u32) -> rustix::process::Pid {
    rustix::process::Pid::from_raw(pid as i32).unwrap()
}

fn a_server_that_is_killed_while_it_preloads_is_replaced_and_its_preloads_run_again() {
    fn load() {
        note_me();
        // The first two are killed here.
        if notes().len() < 3 {
            std::thread::sleep(Duration::from_secs(60));
        }
    }
    let path = journal();
    mp::preload(load).unwrap();
    let kill = |nth: usize| {
        until("it preloads", || notes().len() > nth);
        rustix::process::kill_process(pid_of(notes()[nth].parse().unwrap()), Signal::KILL).unwrap();
    };
    kill(0); // Nobody waits for it yet,
    let killer = std::thread::spawn(move || kill(1)); // and for this one a spawn does.
    block_on(within(async {
        assert_eq!(Process::spawn(|| 5, ()).unwrap().await.unwrap(), 5);
    }));
    killer.join().unwrap();
    assert_eq!(notes().len(), 3);
    assert_eq!(notes()[2], server().to_string());
    std::fs::remove_file(path).unwrap();
}

fn a_preload_that_failed_before_the_first_spawn_is_an_error_of_each_spawn() {
    fn fails() {
        note_me();
        panic!("no model here");
    }
    let path = journal();
    mp::preload(fails).unwrap();
    until("it has ended", || !notes().is_empty() && zombies_of(std::process::id()) == 1);
    mp::preload(|| ()).unwrap();
    block_on(within(async {
        for run in 1..3 {
            let error = Process::spawn(|| 5, ()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Spawn);
            assert!(error.to_string().contains("no model here"), "{error}");
            assert_eq!(notes().len(), run);
        }
    }));
    assert_eq!(children_of(std::process::id()).len(), 0);
    std::fs::remove_file(path).unwrap();
}

/// Preloads something that waits until the program has written to the journal, and knows whether it has.
fn preload_a_waiting_function() {
    mp::preload(wait_for_a_note).unwrap();
}

static WAS_TOLD: std::sync::OnceLock<bool> = std::sync::OnceLock::new();

fn wait_for_a_note() {
    let deadline = Instant::now() + Duration::from_secs(15);
    while notes().is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    WAS_TOLD.get_or_init(|| !notes().is_empty());
}

fn a_task_that_spawns_before_the_preloads_are_done_holds_no_other_task_up() {
    let path = journal();
    preload_a_waiting_function();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(within(async {
        let (begins, has_begun) = tokio::sync::oneshot::channel();
        let spawns = tokio::spawn(async {
            begins.send(()).unwrap();
            Process::spawn(|| WAS_TOLD.get().copied(), ()).unwrap().await.unwrap()
        });
        // On the same worker, as there is one; it goes on while the first task waits.
        let tells = tokio::spawn(async {
            has_begun.await.unwrap();
            note("go on");
        });
        tells.await.unwrap();
        assert_eq!(spawns.await.unwrap(), Some(true));
    }));
    std::fs::remove_file(path).unwrap();
}

fn a_local_task_can_spawn_before_the_preloads_are_done() {
    let path = journal();
    preload_a_waiting_function();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let tells = tokio::spawn(async { note("go on") });
        // Tokio would panic if this thread were given to others.
        let spawned =
            tokio::task::spawn_local(async { Process::spawn(|| WAS_TOLD.get().copied(), ()).unwrap().await.unwrap() });
        assert_eq!(within(spawned).await.unwrap(), Some(true));
        tells.await.unwrap();
    });
    std::fs::remove_file(path).unwrap();
}

fn a_spawn_keeps_the_only_thread_of_its_runtime_until_the_preloads_are_done_and_nothing_else() {
    let path = journal();
    preload_a_waiting_function();
    let this = rustix::thread::gettid();
    // Other threads go on meanwhile, with runtimes of their own.
    let other = std::thread::spawn(move || {
        until("the spawn waits", || alone::thread_is_asleep(this));
        block_on(async { tokio::time::sleep(Duration::from_millis(5)).await });
        note("go on");
    });
    block_on(within(async {
        let timer = tokio::spawn(tokio::time::sleep(Duration::from_millis(1)));
        tokio::task::yield_now().await;
        let child = Process::spawn(|| (std::process::id(), WAS_TOLD.get().copied()), ()).unwrap();
        // It is the process that runs the function, from the start.
        let pid = child.pid();
        // A timer of this runtime that came due meanwhile fires now.
        assert!(!timer.is_finished());
        timer.await.unwrap();
        assert_eq!(child.await.unwrap(), (pid, Some(true)));
    }));
    other.join().unwrap();
    std::fs::remove_file(path).unwrap();
}

fn a_child_whose_handle_is_dropped_at_once_runs_all_the_same() {
    block_on(async {
        let done = mp::Queue::<u32>::unbounded().unwrap();
        let put = |done: mp::Queue<u32>, n: u32| done.blocking_put(n).unwrap();
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            for n in 0..30 {
                drop(Process::builder().start_method(method).spawn(put, (done.clone(), n)).unwrap());
            }
            let mut all = Vec::new();
            while all.len() < 30 {
                all.push(within(done.get()).await.unwrap());
            }
            all.sort_unstable();
            assert_eq!(all, (0..30).collect::<Vec<_>>());
        }
    });
}

/// Checks two children that go on after their result: `leaves` waits for a value of `go_on`, and starts work that goes on until it
/// has another one.
async fn result_before_the_end<F, M>(method: StartMethod, leaves: F)
where
    F: mp::Function<(mp::Receiver<u32>,), M, Output = u32>,
{
    for is_awaited in [false, true] {
        let (mut go_on, rx) = mp::simplex::<u32>().unwrap();
        let mut child = Process::builder().start_method(method).spawn(leaves, (rx,)).unwrap();
        if is_awaited {
            assert!(tokio::time::timeout(Duration::from_millis(1), child.join()).await.is_err());
        }
        go_on.send(0).await.unwrap();
        assert_eq!(within(child.join()).await.unwrap(), 7);
        assert!(child.is_alive() && child.exit_status().is_none(), "{method:?} {is_awaited}");
        assert!(mp::active_children().iter().any(|listed| listed.pid() == child.pid()), "it is still there");
        go_on.send(1).await.unwrap();
        assert!(within(child.wait()).await.unwrap().success());
        assert!(!child.is_alive());
    }
}

fn a_result_is_there_though_a_blocking_task_of_its_process_runs_on() {
    let leaves = async |mut rx: mp::Receiver<u32>| {
        rx.recv().await.unwrap();
        tokio::task::spawn_blocking(move || rx.blocking_recv());
        7
    };
    for method in [StartMethod::ForkServer, StartMethod::Spawn] {
        block_on(result_before_the_end(method, leaves));
    }
    // One that is killed then has given its result all the same.
    let (mut tx, rx) = mp::simplex::<u32>().unwrap();
    block_on(async {
        let mut child = Process::spawn(leaves, (rx,)).unwrap();
        tx.send(0).await.unwrap();
        assert_eq!(within(child.join()).await.unwrap(), 7);
        child.kill().unwrap();
        assert_eq!(within(child.wait()).await.unwrap().signal(), Some(9));
    });
}

fn a_result_is_there_though_its_process_waits_for_a_child() {
    let leaves = |mut rx: mp::Receiver<u32>| {
        rx.blocking_recv().unwrap();
        let next = |mut rx: mp::Receiver<u32>| rx.blocking_recv().unwrap();
        Process::spawn(next, (rx,)).unwrap();
        7
    };
    for method in [StartMethod::ForkServer, StartMethod::Spawn] {
        block_on(result_before_the_end(method, leaves));
    }
}

/// What gcc's `--coverage` links into a program, called by the crate if it is there.
#[unsafe(no_mangle)]
extern "C" fn __gcov_dump() {
    if let Some(path) = std::env::var_os("COUNTS") {
        let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
        std::io::Write::write_all(&mut file, format!("{}\n", std::process::id()).as_bytes()).unwrap();
    }
}

fn counters_of_an_instrumented_program_are_written_by_children_that_end() {
    let path = std::env::temp_dir().join(format!("multiprocess-counts-{}", alone::unique()));
    block_on(async {
        let mut child = Process::builder().env("COUNTS", &path).spawn(std::process::id, ()).unwrap();
        let pid = within(child.join()).await.unwrap();
        let counts = std::fs::read_to_string(&path).unwrap();
        assert_eq!(counts, format!("{pid}\n"));
        let pool = mp::Pool::builder().workers(1).env("COUNTS", &path).build().unwrap();
        let worker = within(pool.apply(std::process::id, ())).await.unwrap();
        pool.close();
        within(pool.join()).await.unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{pid}\n{worker}\n"));
    });
    std::fs::remove_file(path).unwrap();
}

/// The first random number of its thread, by the keys of `HashMap`.
fn first_random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

async fn first_random_of_a_task() -> u64 {
    first_random()
}

fn each_child_and_worker_has_random_numbers_of_its_own() {
    block_on(async {
        let mut seen = Vec::new();
        for n in 0..16 {
            let child = if n % 2 == 0 {
                Process::spawn(first_random, ()).unwrap()
            } else {
                Process::spawn(first_random_of_a_task, ()).unwrap()
            };
            seen.push(within(child).await.unwrap());
        }
        let pool = mp::Pool::builder().workers(2).max_tasks_per_worker(1).build().unwrap();
        for _ in 0..8 {
            seen.push(within(pool.apply(first_random, ())).await.unwrap());
            seen.push(within(pool.apply_async(first_random_of_a_task, ())).await.unwrap());
        }
        let distinct: std::collections::BTreeSet<_> = seen.iter().collect();
        assert_eq!(distinct.len(), seen.len(), "{seen:?}");
    });
}
