//! What programs do that nobody here wrote: functions and preloads that fork, handlers from before `init`, processes that
//! confine themselves, servers that are stopped, cgroups that are frozen. Each scenario runs in a process of its own.
#![allow(clippy::unwrap_used)] // A test, though clippy sees none in a harness of our own.

#[path = "common/alone.rs"]
mod alone;

use alone::{
    Scenario, block_on, children_of, has_handled_its_signals, kill, processes, runs, scenarios, server,
    thread_is_asleep, until, within,
};
use futures::FutureExt;
use multiprocess::connection::{Listener, connect};
use multiprocess::{self as mp, ErrorKind, Fd, Pool, Process, StartMethod};
use rustix::process::Signal;
use std::fs::File;
use std::future::IntoFuture;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
use std::time::{Duration, Instant};

const SCENARIOS: &[Scenario] = scenarios! {
    a_spawn_that_failed_because_the_server_is_stopped_never_runs_its_function
    signals_that_come_all_the_time_do_not_keep_a_wait_from_its_end
    a_join_does_not_wait_for_the_spawn_of_another_thread
    a_function_that_forks_and_returns_in_both_has_one_result
    a_task_of_a_pool_that_forks_and_returns_in_both_has_one_result
    a_preload_that_forks_and_returns_in_both_leaves_one_server
    drop_of_connections_in_a_forked_process_takes_nothing_from_its_parent
    drop_of_a_guard_in_a_forked_process_cancels_nothing
    a_result_with_hundreds_of_descriptors_arrives_whole_though_it_is_awaited
    #[late] a_handler_that_main_has_set_before_init_stays_in_started_processes
    #[late] descriptors_that_main_has_opened_before_init_stay_in_started_processes
    #[late] threads_that_call_init_at_once_take_one_role
    a_parent_that_has_confined_itself_by_landlock_has_confined_children
    signals_reach_each_child_though_a_preload_has_built_a_runtime
    #[late] signals_reach_each_child_though_main_has_built_a_runtime
    a_frozen_server_is_an_error_of_the_spawn_in_time_which_never_runs
    waits_for_a_frozen_child_end_in_time_and_it_goes_on_when_it_is_thawed
    a_frozen_worker_of_a_pool_keeps_no_item_and_times_out_like_any_other
    a_socket_file_with_a_relative_path_goes_with_its_listener_wherever_the_program_is_by_then
};

fn main() -> ExitCode {
    alone::main_of(SCENARIOS)
}

fn temporary(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("multiprocess-hostile-{name}-{}", alone::unique()))
}

fn add(a: u64, b: u64) -> u64 {
    a + b
}

async fn hang() {
    std::future::pending().await
}

/// The name that `ps` shows.
fn comm(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_string()
}

fn stop(pid: u32) {
    kill(pid, Signal::STOP);
    until("it is stopped", || processes().iter().any(|(other, _, state)| *other == pid && *state == 'T'));
}

fn touch(path: PathBuf) {
    File::create(path).unwrap();
}

fn a_spawn_that_failed_because_the_server_is_stopped_never_runs_its_function() {
    block_on(async {
        let path = temporary("touched");
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            assert_eq!(within(Process::spawn(add, (1, 2)).unwrap()).await.unwrap(), 3);
            let server = server();
            stop(server);
            let error = Process::builder().start_method(method).spawn(touch, (path.clone(),)).unwrap_err();
            assert!(error.to_string().contains("stopped"), "{error}");
            kill(server, Signal::CONT);
            // It comes after what failed, over the same connection.
            assert_eq!(within(Process::spawn(add, (1, 2)).unwrap()).await.unwrap(), 3);
            until("what has been started has ended", || {
                children_of(server).iter().all(|(pid, state)| comm(*pid) == "mp-spare" || *state == 'Z')
            });
            assert!(!path.exists(), "{method:?}");
        }
    });
}

extern "C" fn on_alarm(_: libc::c_int) {}

fn signals_that_come_all_the_time_do_not_keep_a_wait_from_its_end() {
    block_on(async {
        assert_eq!(within(Process::spawn(add, (1, 2)).unwrap()).await.unwrap(), 3);
        let server = server();
        stop(server);
        // As a profiler does it.
        let often = libc::timeval { tv_sec: 0, tv_usec: 20_000 };
        let timer = libc::itimerval { it_interval: often, it_value: often };
        // SAFETY: the handler does nothing, and the timer is read by the call.
        unsafe {
            libc::signal(libc::SIGALRM, on_alarm as *const () as libc::sighandler_t);
            libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut());
        }
        let error = Process::spawn(add, (1, 2)).unwrap_err();
        assert!(error.to_string().contains("stopped"), "{error}");
        kill(server, Signal::CONT);
    });
}

fn a_join_does_not_wait_for_the_spawn_of_another_thread() {
    block_on(async {
        let (mut tell, told) = mp::simplex::<u32>().unwrap();
        let next = async |mut told: mp::Receiver<u32>| told.recv().await;
        let child = Process::spawn(next, (told,)).unwrap();
        let server = server();
        stop(server);
        let (id, thread) = std::sync::mpsc::channel();
        let spawning = std::thread::spawn(move || {
            id.send(rustix::thread::gettid()).unwrap();
            Process::spawn(add, (3, 4)).map(drop)
        });
        let thread = thread.recv().unwrap();
        until("it waits for the server", || thread_is_asleep(thread));
        let (joined, ()) = tokio::join!(within(child), async {
            tokio::task::yield_now().await;
            tell.send(3).await.unwrap();
        });
        let is_first = !spawning.is_finished();
        kill(server, Signal::CONT);
        let _ = spawning.join().unwrap();
        assert_eq!(joined.unwrap().unwrap(), 3);
        assert!(is_first, "it has waited");
    });
}

/// Forks the plain way; both processes return. The one that was forked says 1, before the other one goes on.
fn returns_twice() -> (u32, u32) {
    // SAFETY: the forked process returns and is to be ended by that.
    match unsafe { libc::fork() } {
        0 => (1, std::process::id()),
        pid => {
            let mut status = 0;
            // SAFETY: the status is ours to write.
            unsafe { libc::waitpid(pid, &mut status, 0) };
            (2, pid as u32)
        }
    }
}

fn returns_once_and_aborts() -> u32 {
    match returns_twice() {
        (1, _) => 1,
        _ => std::process::abort(),
    }
}

fn panics_once_and_aborts() -> u32 {
    match returns_twice() {
        (1, _) => panic!("in the forked process"),
        _ => std::process::abort(),
    }
}

fn a_function_that_forks_and_returns_in_both_has_one_result() {
    block_on(async {
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            let start = || Process::builder().start_method(method);
            let (who, forked) = within(start().spawn(returns_twice, ()).unwrap()).await.unwrap();
            assert_eq!(who, 2);
            until("the forked process has ended", || !runs(forked));
            for error in [
                within(start().spawn(returns_once_and_aborts, ()).unwrap()).await.unwrap_err(),
                within(start().spawn(panics_once_and_aborts, ()).unwrap()).await.unwrap_err(),
            ] {
                assert_eq!(error.kind(), ErrorKind::ProcessDied, "{error}");
            }
        }
    });
}

fn a_task_of_a_pool_that_forks_and_returns_in_both_has_one_result() {
    block_on(within(async {
        let pool = Pool::new(1).unwrap();
        for _ in 0..5 {
            let (who, forked) = pool.apply(returns_twice, ()).await.unwrap();
            assert_eq!(who, 2);
            until("the forked process has ended", || !runs(forked));
        }
        assert_eq!(pool.map(|n: u64| 2 * n, 0..50).await.unwrap(), (0..50).map(|n| 2 * n).collect::<Vec<_>>());
        pool.shutdown(Duration::from_secs(5)).await;
    }));
}

fn a_preload_that_forks_and_returns_in_both_leaves_one_server() {
    block_on(async {
        mp::preload(|| _ = returns_twice()).unwrap();
        assert_eq!(within(Process::spawn(add, (1, 2)).unwrap()).await.unwrap(), 3);
        let mine = children_of(std::process::id());
        assert_eq!(mine.len(), 1, "{mine:?}");
        // One that was forked just now has the name of its server for a moment.
        until("the server has spare children only", || {
            children_of(mine[0].0).iter().all(|(pid, _)| comm(*pid) == "mp-spare")
        });
    });
}

/// Runs `f` in a process that is forked from this one the plain way, and waits for its end.
fn in_fork(f: impl FnOnce()) {
    // SAFETY: what `f` does there is what is tested; the forked process then ends at once.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
        // SAFETY: it does not return.
        unsafe { libc::_exit(i32::from(done.is_err())) }
    }
    let mut status = -1;
    until("the forked process has ended", || {
        // SAFETY: the status is ours to write.
        unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) == pid }
    });
    assert_eq!(status, 0);
}

fn drop_of_a_guard_in_a_forked_process_cancels_nothing() {
    let token = mp::CancellationToken::new().unwrap();
    let guard = token.clone().drop_guard();
    // SAFETY: it is read once here, in another process, and the original is not touched in it.
    in_fork(|| drop(unsafe { std::ptr::read(&guard) }));
    assert!(!token.is_cancelled());
    drop(guard);
    assert!(token.is_cancelled());
}

fn drop_of_connections_in_a_forked_process_takes_nothing_from_its_parent() {
    block_on(async {
        let path = temporary("socket");
        for address in ["127.0.0.1:0", path.to_str().unwrap(), &format!("\0hostile-{}", alone::unique())] {
            let child = Process::builder().kill_on_drop(true).spawn(hang, ()).unwrap();
            let listener = Listener::bind(address).authkey(b"key").await.unwrap();
            let at = listener.local_addr();
            let there = within(connect(&at, Some(b"key")).into_future()).await.unwrap();
            let here = within(listener.accept()).await.unwrap();
            let (sender, receiver) = within(connect(&at, Some(b"key")).into_future()).await.unwrap().split();
            let halves = within(listener.accept()).await.unwrap();
            in_fork(|| {
                let refused = here.send_bytes(b"lost").now_or_never().unwrap().unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::Forked, "{refused}");
                let refused = receiver.recv_bytes().now_or_never().unwrap().unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::Forked, "{refused}");
                let refused = listener.accept().now_or_never().unwrap().unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::Forked, "{refused}");
                listener.close();
                // SAFETY: each is read once here, in another process, and the originals are not touched in it.
                unsafe {
                    drop((std::ptr::read(&child), std::ptr::read(&here), std::ptr::read(&there)));
                    drop((std::ptr::read(&listener), std::ptr::read(&sender), std::ptr::read(&receiver)));
                }
            });
            assert!(child.is_alive(), "{at}");
            there.send_bytes(b"there").await.unwrap();
            assert_eq!(within(here.recv_bytes()).await.unwrap(), b"there");
            here.send_bytes(b"here").await.unwrap();
            assert_eq!(within(there.recv_bytes()).await.unwrap(), b"here");
            sender.send_bytes(b"half").await.unwrap();
            assert_eq!(within(halves.recv_bytes()).await.unwrap(), b"half");
            halves.send_bytes(b"other half").await.unwrap();
            assert_eq!(within(receiver.recv_bytes()).await.unwrap(), b"other half");
            let again = within(connect(&at, Some(b"key")).into_future()).await.unwrap();
            let accepted = within(listener.accept()).await.unwrap();
            again.send_bytes(b"again").await.unwrap();
            assert_eq!(within(accepted.recv_bytes()).await.unwrap(), b"again");
            assert!(child.is_alive());
        }
    });
}

fn many_descriptors(count: usize) -> Vec<Fd<File>> {
    let file = File::open("/dev/null").unwrap();
    (0..count).map(|_| Fd::from(file.try_clone().unwrap())).collect()
}

fn a_result_with_hundreds_of_descriptors_arrives_whole_though_it_is_awaited() {
    block_on(async {
        for _ in 0..100 {
            let mut child = Process::spawn(many_descriptors, (300,)).unwrap();
            // Polled again and again while the result is on its way.
            let result = within(async {
                loop {
                    if let Ok(result) = tokio::time::timeout(Duration::ZERO, child.join()).await {
                        break result;
                    }
                    tokio::task::yield_now().await;
                }
            });
            assert_eq!(result.await.unwrap().len(), 300);
        }
    });
}

extern "C" fn on_child(_: libc::c_int) {}

fn has_handler() -> bool {
    // SAFETY: the structure is ours, valid when zeroed, and the kernel fills it.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGCHLD, std::ptr::null(), &mut now);
        now.sa_sigaction == on_child as *const () as libc::sighandler_t
    }
}

fn a_handler_that_main_has_set_before_init_stays_in_started_processes() {
    // SAFETY: the handler does nothing.
    unsafe { libc::signal(libc::SIGCHLD, on_child as *const () as libc::sighandler_t) };
    mp::init();
    block_on(async {
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            let child = Process::builder().start_method(method).spawn(has_handler, ()).unwrap();
            assert!(within(child).await.unwrap(), "{method:?}");
        }
        assert!(has_handler());
    });
}

static OPENED: AtomicI32 = AtomicI32::new(-1);

fn reads_zeros() -> bool {
    let mut byte = [1u8];
    // SAFETY: one byte is read to where there is room for it.
    let len = unsafe { libc::read(OPENED.load(SeqCst), byte.as_mut_ptr().cast(), 1) };
    (len, byte) == (1, [0])
}

fn descriptors_that_main_has_opened_before_init_stay_in_started_processes() {
    // As a C library does that does not care for programs which are executed.
    // SAFETY: the path is a C string.
    OPENED.store(unsafe { libc::open(c"/dev/zero".as_ptr(), libc::O_RDONLY) }, SeqCst);
    mp::init();
    assert!(reads_zeros());
    block_on(async {
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            let child = Process::builder().start_method(method).spawn(reads_zeros, ()).unwrap();
            assert!(within(child).await.unwrap(), "{method:?}");
        }
    });
}

fn threads_that_call_init_at_once_take_one_role() {
    let threads: Vec<_> = (0..4).map(|_| std::thread::spawn(mp::init)).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    block_on(async {
        for _ in 0..20 {
            let child = Process::builder().start_method(StartMethod::Spawn).spawn(add, (1, 2)).unwrap();
            assert_eq!(within(child).await.unwrap(), 3);
        }
    });
}

/// From now on this thread makes no files. False where the kernel has no Landlock.
fn confine() -> bool {
    const MAKE_REG: u64 = 1 << 8;
    // SAFETY: the structure has the size that is told, and all its fields are numbers.
    unsafe {
        let attributes = [MAKE_REG];
        let rules = libc::syscall(libc::SYS_landlock_create_ruleset, attributes.as_ptr(), 8, 0);
        rules >= 0 && libc::syscall(libc::SYS_landlock_restrict_self, rules, 0) == 0
    }
}

fn makes_a_file(path: PathBuf) -> bool {
    File::create(&path).and_then(|mut file| file.write_all(b"made")).is_ok()
}

fn a_parent_that_has_confined_itself_by_landlock_has_confined_children() {
    // So that nothing else changes with the rules.
    rustix::thread::set_no_new_privs(true).unwrap();
    block_on(async {
        let path = temporary("made");
        for _ in 0..6 {
            assert!(within(Process::spawn(makes_a_file, (path.clone(),)).unwrap()).await.unwrap());
        }
        std::fs::remove_file(&path).unwrap();
        if !confine() {
            return eprintln!("SKIPPED: the kernel has no Landlock");
        }
        assert!(!makes_a_file(path.clone()));
        for method in [StartMethod::ForkServer, StartMethod::Spawn, StartMethod::ForkServer] {
            let child = Process::builder().start_method(method).spawn(makes_a_file, (path.clone(),)).unwrap();
            assert!(!within(child).await.unwrap(), "{method:?}");
        }
        let servers = || children_of(std::process::id()).into_iter().map(|(pid, _)| pid).collect::<Vec<_>>();
        let before = servers();
        assert_eq!(within(Process::spawn(add, (1, 2)).unwrap()).await.unwrap(), 3);
        // The first one ends some time.
        assert!(servers().iter().all(|pid| before.contains(pid)), "the next ones come from the same server");
    });
}

async fn does_nothing() {}

/// Sends its pid; waits for one SIGUSR1, and for the close of `busy` if it is given; reports that.
async fn listens(told: mp::Queue<u32>, busy: Option<Fd<File>>) {
    let mut signals = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::user_defined1()).unwrap();
    told.put(std::process::id()).await.unwrap();
    if let Some(mut busy) = busy {
        busy.read_to_end(&mut Vec::new()).unwrap();
    }
    signals.recv().await;
    told.put(std::process::id()).await.unwrap();
}

fn signals_reach_each_child_though_a_preload_has_built_a_runtime() {
    block_on(async {
        // It makes what tokio hears signals by, in the fork server.
        mp::preload(does_nothing).unwrap();
        signals_reach_each_child().await;
    });
}

fn signals_reach_each_child_though_main_has_built_a_runtime() {
    block_on(async {
        mp::init();
        signals_reach_each_child().await;
    });
}

async fn signals_reach_each_child() {
    let told = mp::Queue::unbounded().unwrap();
    let (read, go_on) = std::io::pipe().unwrap();
    let read = Fd::from(File::from(std::os::fd::OwnedFd::from(read)));
    let idle = Process::spawn(listens, (told.clone(), None)).unwrap();
    let busy = Process::spawn(listens, (told.clone(), Some(read))).unwrap();
    for _ in 0..2 {
        within(told.get()).await.unwrap();
    }
    until("the idle one sleeps", || processes().iter().any(|(pid, _, state)| *pid == idle.pid() && *state == 'S'));
    kill(busy.pid(), Signal::USR1);
    // Its handler has run by then. Had that woken the idle one, this would be running, or have read what is not its own.
    until("the signal is handled", || has_handled_its_signals(busy.pid()));
    until("the idle one sleeps", || processes().iter().any(|(pid, _, state)| *pid == idle.pid() && *state == 'S'));
    drop(go_on);
    assert_eq!(within(told.get()).await.unwrap(), busy.pid());
    kill(idle.pid(), Signal::USR1);
    assert_eq!(within(told.get()).await.unwrap(), idle.pid());
    within(busy).await.unwrap();
    within(idle).await.unwrap();
}

/// A control group, of the second version, that can be frozen.
struct Freezer(PathBuf);

impl Freezer {
    /// `None`, and a word about it, where there is none to be had. The mount is for this process alone.
    fn new() -> Option<Self> {
        use nix::mount::{MsFlags, mount};
        let nothing = None::<&str>;
        let place = temporary("cgroups");
        std::fs::create_dir_all(&place).unwrap();
        let made = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
            .and_then(|()| mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing))
            .and_then(|()| mount(Some("none"), &place, Some("cgroup2"), MsFlags::empty(), nothing));
        let group = place.join(format!("multiprocess-{}", std::process::id()));
        let made = made.map_err(std::io::Error::from).and_then(|()| std::fs::create_dir(&group));
        let freezer = Self(group);
        match made.and_then(|()| std::fs::metadata(freezer.0.join("cgroup.freeze"))) {
            Ok(_) => Some(freezer),
            Err(error) => {
                eprintln!("SKIPPED, as it needs root and the second version of control groups: {error}");
                None
            }
        }
    }

    fn freeze(&self, pid: u32) {
        std::fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
        std::fs::write(self.0.join("cgroup.freeze"), "1").unwrap();
        let events = || std::fs::read_to_string(self.0.join("cgroup.events")).unwrap();
        until("it is frozen", || events().contains("frozen 1"));
    }

    fn thaw(&self) {
        std::fs::write(self.0.join("cgroup.freeze"), "0").unwrap();
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0.join("cgroup.freeze"), "0");
        let _ = std::fs::write(self.0.join("cgroup.kill"), "1");
        until("the group is empty", || std::fs::remove_dir(&self.0).is_ok() || !self.0.exists());
        let place = self.0.parent().unwrap();
        let _ = nix::mount::umount(place);
        let _ = std::fs::remove_dir(place);
    }
}

fn a_frozen_server_is_an_error_of_the_spawn_in_time_which_never_runs() {
    block_on(async {
        let Some(freezer) = Freezer::new() else { return };
        let path = temporary("touched");
        assert_eq!(within(Process::spawn(add, (1, 2)).unwrap()).await.unwrap(), 3);
        let server = server();
        freezer.freeze(server);
        let start = Instant::now();
        let error = Process::spawn(touch, (path.clone(),)).unwrap_err();
        assert!(error.to_string().contains("frozen"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
        freezer.thaw();
        assert_eq!(within(Process::spawn(add, (1, 2)).unwrap()).await.unwrap(), 3);
        until("what has been started has ended", || {
            children_of(server).iter().all(|(pid, state)| comm(*pid) == "mp-spare" || *state == 'Z')
        });
        assert!(!path.exists());
    });
}

fn waits_for_a_frozen_child_end_in_time_and_it_goes_on_when_it_is_thawed() {
    async fn answers(lock: mp::Lock, asked: mp::Queue<u32>, answers: mp::Queue<u32>) {
        let guard = lock.acquire().await.unwrap();
        answers.put(0).await.unwrap();
        let question = asked.get().await.unwrap();
        drop(guard);
        answers.put(question + 1).await.unwrap();
    }
    block_on(async {
        let Some(freezer) = Freezer::new() else { return };
        let (lock, asked, told) =
            (mp::Lock::new().unwrap(), mp::Queue::unbounded().unwrap(), mp::Queue::unbounded().unwrap());
        let mut child = Process::spawn(answers, (lock.clone(), asked.clone(), told.clone())).unwrap();
        assert_eq!(within(told.get()).await.unwrap(), 0);
        freezer.freeze(child.pid());
        asked.put(1).await.unwrap();
        let short = Duration::from_millis(50);
        let got = within(told.get_timeout(short)).await.map(drop).unwrap_err();
        assert_eq!(got.kind(), ErrorKind::Timeout);
        let locked = within(lock.acquire_timeout(short)).await.map(drop).unwrap_err();
        assert_eq!(locked.kind(), ErrorKind::Timeout, "its holder lives");
        assert!(tokio::time::timeout(short, child.join()).await.is_err());
        assert!(child.is_alive() && child.exit_status().is_none());
        freezer.thaw();
        assert_eq!(within(told.get()).await.unwrap(), 2);
        within(child.join()).await.unwrap();
        // One that is frozen can be killed.
        let mut child = Process::spawn(hang, ()).unwrap();
        freezer.freeze(child.pid());
        child.kill().unwrap();
        within(child.wait()).await.unwrap();
    });
}

fn a_frozen_worker_of_a_pool_keeps_no_item_and_times_out_like_any_other() {
    block_on(within(async {
        let Some(freezer) = Freezer::new() else { return };
        let pool = Pool::new(2).unwrap();
        let one = pool.apply(std::process::id, ()).await.unwrap();
        freezer.freeze(one);
        for n in 0..8 {
            let done = pool.apply(add, (n, 1)).timeout(Duration::from_secs(20)).await;
            assert_eq!(done.unwrap(), n + 1);
        }
        pool.shutdown(Duration::from_millis(100)).await;
        let pool = Pool::new(1).unwrap();
        let only = pool.apply(std::process::id, ()).await.unwrap();
        freezer.freeze(only);
        let error = pool.apply(add, (1, 1)).timeout(Duration::from_millis(200)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        assert_eq!(pool.apply(add, (1, 1)).await.unwrap(), 2, "another worker has taken its place");
        pool.shutdown(Duration::from_secs(1)).await;
    }));
}

fn a_socket_file_with_a_relative_path_goes_with_its_listener_wherever_the_program_is_by_then() {
    block_on(async {
        let place = temporary("place");
        std::fs::create_dir(&place).unwrap();
        std::env::set_current_dir(&place).unwrap();
        let listener = Listener::bind("./socket").await.unwrap();
        assert!(place.join("socket").exists());
        std::env::set_current_dir("/").unwrap();
        drop(listener);
        assert!(!place.join("socket").exists());
        std::fs::remove_dir(&place).unwrap();
    });
}
