//! What a test cannot do to the process that runs the other tests: kill its fork server, close its streams, delete
//! its program. Each scenario runs in a process of its own, started by a harness that is as small as it can be.
#![allow(clippy::unwrap_used)] // A test, though clippy sees none in a harness of our own.

#[path = "common/alone.rs"]
mod alone;
#[path = "common/rounds.rs"]
mod rounds;

use alone::{Scenario, block_on, children_of, kill, processes, runs, scenarios, server, until};
use multiprocess::{self as mp, ErrorKind, Fd, Process, StartMethod, Stdio};
use rounds::{blocking_rounds, rounds};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

const SCENARIOS: &[Scenario] = scenarios! {
    #[late] flags_03_without_init_spawning_is_an_error_and_main_never_runs_again
    #[late] init_after_threads_started_works_slowly_and_warns
    #[late] a_server_that_lets_go_of_its_socket_is_started_once
    proc_02_a_copy_of_the_program_will_do
    proc_27_start_works_when_streams_are_closed
    proc_29_a_signal_to_the_group_does_not_hurt_the_server
    proc_30_a_killed_server_harms_no_child
    proc_30_a_function_runs_exactly_once_whenever_the_server_is_killed
    a_killed_server_is_replaced_without_a_spawn
    lock_of_a_child_that_dies_after_its_server_goes_to_the_next
    a_server_that_a_child_started_ends_with_it
    a_status_that_came_before_the_join_is_kept
    process_that_inherits_children_of_a_killed_server_learns_their_status
    a_preload_that_spawns_is_an_error_at_once
    p16_a_killed_parent_takes_its_whole_tree
    shm_16_a_killed_program_leaves_no_name
    p7_start_from_a_busy_runtime
    fds_01_a_high_inheritable_descriptor_is_not_in_the_child
    mainh_01_a_renamed_or_deleted_program_goes_on
    another_image_is_refused
    sm_06_preloaded_state_is_in_every_child
    preloaded_lock_is_held_by_each_child_as_itself
    a_preload_that_panics_is_an_error
    environment_directory_and_streams_are_those_at_the_spawn
    a_spawn_that_fails_changes_no_later_child
    rt_01_nothing_is_left_behind
    proc_21_handles_and_children_leave_no_descriptor
    spare_children_are_like_their_parent_at_the_spawn
    spare_children_that_are_killed_or_not_wanted_are_no_loss
    a_signal_to_a_spare_child_does_not_reach_its_function
    a_signal_right_after_the_spawn_finds_a_spare_child_as_it_is_to_be
    a_spare_child_reports_why_it_cannot_take_its_order
    spare_children_end_with_their_starter
    spare_children_come_back_after_a_shortage
    a_ticker_goes_on_during_a_thousand_spawns
    rule_10_an_idle_pool_does_not_wake_up
    at_the_descriptor_limit_there_are_errors_and_no_hang
    a_server_at_its_descriptor_limit_starts_a_whole_child_or_none
    run_waits_for_children_and_ends_daemons
    run_ends_though_a_preload_never_does
    run_ends_quickly_with_a_daemon_that_ignores_sigterm
};

fn main() -> ExitCode {
    alone::main_of(SCENARIOS)
}

fn never_ends() {
    loop {
        std::thread::park();
    }
}

fn run_ends_though_a_preload_never_does() {
    let waits = async || {
        mp::preload(never_ends).unwrap();
        let waiting = tokio::spawn(mp::preloaded());
        tokio::time::timeout(Duration::from_millis(50), waiting).await.unwrap_err();
    };
    mp::run(waits());
    until("the server is gone", || children_of(std::process::id()).iter().all(|(_, state)| *state == 'Z'));
}

fn add(a: u64, b: u64) -> u64 {
    a + b
}

async fn hang() {
    std::future::pending().await
}

/// Whether the fork server has no child left but the spare ones.
fn is_idle(server: u32) -> bool {
    let children = children_of(server);
    children.len() <= 4 && children.iter().all(|(_, state)| *state == 'S')
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn flags_03_without_init_spawning_is_an_error_and_main_never_runs_again() {
    let error = Process::spawn(add, (1, 2)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotInitialized);
    for word in ["multiprocess::run", "multiprocess::init()", "test_support!"] {
        assert!(error.to_string().contains(word), "{error}");
    }
    assert_eq!(mp::preload(|| ()).unwrap_err().kind(), ErrorKind::NotInitialized);
    assert!(children_of(std::process::id()).is_empty());
}

fn a_server_that_lets_go_of_its_socket_is_started_once() {
    let is_socket = |fd: &i32| {
        std::fs::read_link(format!("/proc/self/fd/{fd}")).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
    };
    if let Some(role) = (3..100).find(is_socket) {
        // A program that does not reach `init`, but closes what it was given.
        eprintln!("started in a role");
        nix::unistd::close(role).unwrap();
        std::thread::sleep(Duration::from_secs(3600)); // Until it is killed.
    }
    let (read, write) = std::io::pipe().unwrap();
    let stderr = rustix::io::dup(std::io::stderr()).unwrap();
    rustix::stdio::dup2_stderr(&write).unwrap();
    drop(write);
    mp::init();
    let error = Process::spawn(add, (1, 2)).unwrap_err();
    rustix::stdio::dup2_stderr(stderr).unwrap();
    assert_eq!(error.kind(), ErrorKind::Spawn);
    assert!(error.to_string().contains("closed the socket that its role comes over and went on"), "{error}");
    let starts = BufReader::new(read).lines().map_while(Result::ok).filter(|line| line == "started in a role");
    assert_eq!(starts.count(), 1);
}

/// Counts warnings, as an application's subscriber would see them.
struct Warnings;
static WARNINGS: AtomicU64 = AtomicU64::new(0);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        if *event.metadata().level() == tracing::Level::WARN {
            WARNINGS.fetch_add(1, SeqCst);
        }
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

fn init_after_threads_started_works_slowly_and_warns() {
    let (park, go) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || go.recv());
    mp::init();
    tracing::subscriber::set_global_default(Warnings).unwrap();
    let (said, stderr) = (temporary("stderr"), rustix::io::dup(std::io::stderr()).unwrap());
    rustix::stdio::dup2_stderr(std::fs::File::create(&said).unwrap()).unwrap();
    let sums = block_on(async {
        let sum = async || Process::spawn(add, (1, 2))?.await;
        (sum().await, sum().await)
    });
    rustix::stdio::dup2_stderr(stderr).unwrap();
    assert!(matches!(sums, (Ok(3), Ok(3))), "{sums:?}");
    let said = std::fs::read_to_string(said).unwrap();
    let lines = said.lines().filter(|line| line.contains("it cannot fork safely: every child is exec'd instead"));
    assert_eq!(lines.count(), 1, "{said}");
    block_on(async {
        let mut killed = Process::spawn(hang, ()).unwrap();
        killed.kill().unwrap();
        assert_eq!(killed.wait().await.unwrap().signal(), Some(9));
    });
    assert_eq!(WARNINGS.load(SeqCst), 1);
    drop(park);
    let _ = thread.join();
}

fn temporary(name: &str) -> PathBuf {
    let directory = std::env::temp_dir().join(format!("multiprocess-test-{}", alone::unique()));
    std::fs::create_dir_all(&directory).unwrap();
    directory.join(name)
}

fn proc_02_a_copy_of_the_program_will_do() {
    let copy = temporary("copy");
    std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    mp::private::use_program(&copy);
    block_on(async {
        let program = || std::fs::read_link("/proc/self/exe").unwrap();
        assert_eq!(Process::spawn(program, ()).unwrap().await.unwrap(), copy);
    });
    std::fs::remove_file(copy).unwrap();
}

fn another_image_is_refused() {
    let other = temporary("other");
    let mut bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    // Another build: one byte of its build id differs.
    let at = bytes.windows(8).position(|bytes| bytes == b"\x03\0\0\0GNU\0").expect("a build id");
    bytes[at + 8] ^= 1;
    std::fs::write(&other, bytes).unwrap();
    std::fs::set_permissions(&other, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    mp::private::use_program(&other);
    let error = Process::spawn(add, (1, 2)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Spawn);
    assert!(error.to_string().contains("not the same build"), "{error}");
    std::fs::remove_file(other).unwrap();
    // Programs that are none of ours.
    for (path, why) in [("/bin/true", "ended before it was ready"), ("/etc/hostname", ""), ("/does/not/exist", "exist")]
    {
        mp::private::use_program(path);
        let error = Process::spawn(add, (1, 2)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Spawn, "{error}");
        assert!(error.to_string().contains(why), "{error}");
    }
    assert!(children_of(std::process::id()).is_empty());
}

fn proc_27_start_works_when_streams_are_closed() {
    // What a daemon does that closes its streams the hard way.
    let script = "exec 0<&- 1>&- 2>&-; exec \"$0\"";
    if std::env::var_os("INNER").is_none() {
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).arg(std::env::current_exe().unwrap()).env("INNER", "1");
        assert!(shell.status().unwrap().success());
        return;
    }
    // std opens /dev/null for what is closed at the start; close it again.
    rustix::io::fcntl_setfd(std::io::stdout(), rustix::io::FdFlags::CLOEXEC).unwrap();
    block_on(async {
        let prints = || {
            println!("nobody sees this");
            std::fs::read_link("/proc/self/fd/1").unwrap()
        };
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            let child = Process::builder().start_method(method).spawn(prints, ()).unwrap();
            assert_eq!(child.await.unwrap().to_str(), Some("/dev/null"));
        }
    });
}

fn proc_29_a_signal_to_the_group_does_not_hurt_the_server() {
    use rustix::process::Signal;
    block_on(async {
        let mut running = Process::spawn(hang, ()).unwrap();
        let before = server();
        for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT, Signal::TSTP, Signal::USR1] {
            kill(before, signal);
        }
        assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
        assert_eq!(server(), before);
        assert!(running.is_alive());
        running.kill().unwrap();
        assert_eq!(running.wait().await.unwrap().signal(), Some(9));
    });
}

fn proc_30_a_killed_server_harms_no_child() {
    block_on(async {
        let (read, write) = std::io::pipe().unwrap();
        let waits = |mut read: Fd<std::io::PipeReader>| read.read_to_end(&mut Vec::new()).unwrap();
        let mut old = Process::spawn(waits, (Fd::new(read),)).unwrap();
        kill(server(), rustix::process::Signal::KILL);
        assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
        assert!(old.is_alive() && old.exit_status().is_none());
        drop(write);
        assert_eq!(old.join().await.unwrap(), 0);
        assert!(!old.is_alive());
        // The status is the truth or unknown, never invented.
        assert!(old.exit_status().is_none_or(|status| status.success()));
    });
}

fn a_killed_server_is_replaced_without_a_spawn() {
    block_on(async {
        // Nobody awaits the child, and each server that comes is killed as well.
        let mut running = Process::spawn(hang, ()).unwrap();
        for _ in 0..3 {
            let before = server();
            kill(before, rustix::process::Signal::KILL);
            let deadline = Instant::now() + Duration::from_secs(10);
            while !children_of(std::process::id()).iter().any(|(pid, state)| *pid != before && *state != 'Z') {
                assert!(Instant::now() < deadline);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        running.kill().unwrap();
        let error = running.join().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ProcessDied);
    });
}

fn lock_of_a_child_that_dies_after_its_server_goes_to_the_next() {
    block_on(async {
        let lock = mp::Lock::new().unwrap();
        let (tx, mut held) = mp::simplex().unwrap();
        let hold = async |lock: mp::Lock, mut tx: mp::Sender<()>| {
            let _guard = lock.acquire().await.unwrap();
            tx.send(()).await.unwrap();
            hang().await
        };
        let holder = Process::spawn(hold, (lock.clone(), tx)).unwrap();
        held.recv().await.unwrap();
        kill(server(), rustix::process::Signal::KILL);
        let acquire = async { lock.acquire().await.map(drop).unwrap_err().kind() };
        let die = async {
            tokio::task::yield_now().await;
            holder.kill().unwrap();
        };
        let both = async { tokio::join!(acquire, die).0 };
        let kind = tokio::time::timeout(Duration::from_secs(10), both).await.expect("the dead are recovered");
        assert_eq!(kind, ErrorKind::OwnerDied);
    });
}

fn a_server_that_a_child_started_ends_with_it() {
    block_on(async {
        let spawns = async |mut go_on: mp::Receiver<()>| {
            go_on.recv().await.unwrap();
            Process::spawn(add, (1, 2)).unwrap().await.unwrap()
        };
        let (mut tx, rx) = mp::simplex().unwrap();
        let child = Process::spawn(spawns, (rx,)).unwrap();
        let servers = || {
            let named = |pid: &u32| {
                std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm == "mp-server\n")
            };
            // In a container the session may be one of outside, which has no number.
            let in_session = |pid: &u32| {
                nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(*pid as i32))) == nix::unistd::getsid(None)
            };
            processes()
                .into_iter()
                .filter(|(_, _, state)| *state != 'Z')
                .map(|(pid, ..)| pid)
                .filter(|pid| named(pid) && in_session(pid))
                .count()
        };
        let others = servers() - 1;
        kill(server(), rustix::process::Signal::KILL);
        tx.send(()).await.unwrap();
        assert_eq!(child.await.unwrap(), 3);
        until("the child's own server has ended", || servers() <= others + 1);
    });
}

fn a_status_that_came_before_the_join_is_kept() {
    block_on(async {
        let mut child = Process::spawn(add, (1, 2)).unwrap();
        let mut killed = Process::spawn(hang, ()).unwrap();
        killed.kill().unwrap();
        until("both have ended", || !child.is_alive() && !killed.is_alive());
        // A server that has to tell it has told it by the time that it starts another child.
        assert_eq!(Process::spawn(add, (3, 4)).unwrap().await.unwrap(), 7);
        assert_eq!(child.join().await.unwrap(), 3);
        assert!(child.wait().await.unwrap().success() && child.exit_status().unwrap().success());
        assert_eq!(killed.join().await.unwrap_err().exit_status().unwrap().signal(), Some(9));
        assert_eq!(killed.wait().await.unwrap().signal(), Some(9));
    });
}

fn process_that_inherits_children_of_a_killed_server_learns_their_status() {
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1)).unwrap();
    block_on(async {
        let (mut killed, mut late) = (Process::spawn(hang, ()).unwrap(), Process::spawn(hang, ()).unwrap());
        kill(server(), rustix::process::Signal::KILL);
        killed.kill().unwrap();
        assert_eq!(killed.wait().await.unwrap().signal(), Some(9));
        kill(late.pid(), rustix::process::Signal::TERM);
        until("it has ended", || !runs(late.pid()));
        assert_eq!(late.wait().await.unwrap().signal(), Some(15));
    });
}

fn a_preload_that_spawns_is_an_error_at_once() {
    fn spawns() {
        let error = Process::spawn(add, (1, 2)).unwrap_err();
        panic!("{error}");
    }
    mp::preload(spawns).unwrap();
    let error = Process::spawn(add, (1, 2)).unwrap_err();
    assert!(error.to_string().contains("a preload function runs in the fork server"), "{error}");
}

fn proc_30_a_function_runs_exactly_once_whenever_the_server_is_killed() {
    static KILLED: AtomicU64 = AtomicU64::new(0);
    let (read, write) = std::io::pipe().unwrap();
    let stop = std::sync::Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    assert_eq!(block_on(async { Process::spawn(add, (1, 2)).unwrap().await.unwrap() }), 3);
    // A server that is killed before it can be ready every time starts nothing.
    let longest = (3 * start.elapsed().as_micros() as u64).max(9000);
    let killer = {
        let stop = stop.clone();
        std::thread::spawn(move || {
            let mut random = 0x9e37_79b9_7f4a_7c15_u64;
            while stop.load(SeqCst) == 0 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                std::thread::sleep(Duration::from_micros(random % longest));
                for (pid, _) in children_of(std::process::id()) {
                    kill(pid, rustix::process::Signal::KILL);
                    KILLED.fetch_add(1, SeqCst);
                }
            }
        })
    };
    let notes = |mut write: Fd<std::io::PipeWriter>, n: u32| write.write_all(&n.to_le_bytes()).unwrap();
    let ran = block_on(async {
        let (mut started, mut round, mut ran) = (0u32, 0, BTreeSet::new());
        // A first start that took long makes kills rare, and one that takes long now makes them too many: then there are more
        // rounds.
        let is_enough = |ran: usize| KILLED.load(SeqCst) > 10 && ran > 200;
        while round < 40 || (!is_enough(ran.len()) && start.elapsed() < Duration::from_secs(60)) {
            round += 1;
            let mut children = Vec::new();
            for _ in 0..10 {
                let write = Fd::new(write.try_clone().unwrap());
                match Process::spawn(notes, (write, started)) {
                    Ok(child) => children.push((started, child)),
                    // Killed so often while it started that spawn gave up, and says so.
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Spawn, "{error}"),
                }
                started += 1;
            }
            for (number, child) in children {
                tokio::time::timeout(Duration::from_secs(10), child).await.expect("no hang").expect("it ran");
                ran.insert(number);
            }
        }
        ran
    });
    stop.store(1, SeqCst);
    killer.join().unwrap();
    let killed = KILLED.load(SeqCst);
    drop(write);
    let mut seen = BTreeSet::new();
    let mut read = BufReader::new(read);
    let mut number = [0; 4];
    // The lifeline of the last server's children is ours: only those that were let go can hold the pipe.
    while read.read_exact(&mut number).is_ok() {
        let number = u32::from_le_bytes(number);
        assert!(seen.insert(number), "{number} ran twice");
    }
    assert!(killed > 10, "{killed} kills");
    assert!(ran.len() > 200, "{} ran", ran.len());
    assert!(seen.is_superset(&ran), "{:?} did not run", ran.difference(&seen));
    assert!(mp::active_children().is_empty());
}

fn p16_a_killed_parent_takes_its_whole_tree() {
    if std::env::var_os("INNER").is_some() {
        fn spin(mut write: Fd<std::io::PipeWriter>) {
            write.write_all(&std::process::id().to_le_bytes()).unwrap();
            loop {
                std::hint::spin_loop();
            }
        }
        async fn middle(write: Fd<std::io::PipeWriter>) {
            let copy = Fd::new(write.try_clone().unwrap());
            let _below = Process::builder().start_method(StartMethod::Spawn).spawn(spin, (copy,)).unwrap();
            tokio::task::spawn_blocking(|| spin(write));
            hang().await
        }
        let stdout = std::io::stdout();
        let copy = || Fd::new(std::os::fd::AsFd::as_fd(&stdout).try_clone_to_owned().unwrap().into());
        block_on(async {
            let _middle = Process::spawn(middle, (copy(),)).unwrap();
            let _daemon = Process::builder().daemon(true).spawn(spin, (copy(),)).unwrap();
            hang().await
        });
        return;
    }
    let kill_with = |signal| {
        let mut root = Command::new(std::env::current_exe().unwrap());
        let root = root.env("INNER", "1").stdout(std::process::Stdio::piped());
        let mut root = root.spawn().unwrap();
        let mut stdout = root.stdout.take().unwrap();
        let mut pids = Vec::new();
        for _ in 0..3 {
            let mut pid = [0; 4];
            stdout.read_exact(&mut pid).unwrap();
            pids.push(u32::from_le_bytes(pid));
        }
        pids.extend(children_of(root.id()).into_iter().map(|(pid, _)| pid));
        assert_eq!(pids.len(), 4);
        let start = Instant::now();
        kill(root.id(), signal);
        root.wait().unwrap();
        assert_eq!(stdout.read(&mut [0]).unwrap(), 0);
        until("the tree is gone", || !pids.iter().any(|pid| runs(*pid)));
        start.elapsed()
    };
    for signal in [rustix::process::Signal::KILL, rustix::process::Signal::TERM] {
        blocking_rounds(|| kill_with(signal), |took| *took < Duration::from_secs(1));
    }
}

/// Killed alone, after the fork server, after the process that takes names away, and together with its whole group. If
/// that process is killed too, the next program that gives a name takes away what is left.
fn shm_16_a_killed_program_leaves_no_name() {
    let named = |pid: u32, what: &str| format!("test-{pid}-{what}");
    if let Some(how) = std::env::var_os("INNER") {
        let find = |what: &str| {
            let name = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let mut children = children_of(std::process::id()).into_iter().map(|(pid, _)| pid);
            children.rfind(|pid| name(*pid).trim() == what).unwrap()
        };
        block_on(async {
            let _first = mp::SharedMemory::create(&named(std::process::id(), "first"), 100).unwrap();
            Process::spawn(add, (1, 1)).unwrap().await.unwrap();
            match how.to_str() {
                Some("server") => kill(find("mp-server"), rustix::process::Signal::KILL),
                Some("cleaner") => {
                    let cleaner = find("mp-cleaner");
                    kill(cleaner, rustix::process::Signal::KILL);
                    until("it is gone", || {
                        std::fs::read(format!("/proc/{cleaner}/cmdline")).is_ok_and(|l| l.is_empty())
                    });
                }
                _ => {}
            }
            let _second = mp::SharedMemory::create(&named(std::process::id(), "second"), 100).unwrap();
            let third = mp::SharedMemory::create(&named(std::process::id(), "third"), 100).unwrap();
            third.persist().unwrap();
            println!("{}", find("mp-cleaner"));
            hang().await
        });
        return;
    }
    let begin = |how: &str| {
        let mut root = Command::new(std::env::current_exe().unwrap());
        let root = std::os::unix::process::CommandExt::process_group(&mut root, 0);
        let mut root = root.env("INNER", how).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut cleaner = String::new();
        BufReader::new(root.stdout.as_mut().unwrap()).read_line(&mut cleaner).unwrap();
        (root, cleaner.trim().parse::<u32>().unwrap())
    };
    let kill_it = |how: &str| {
        let (mut root, cleaner) = begin(how);
        let id = root.id();
        let there = |what| std::fs::exists(format!("/dev/shm/{}", named(id, what))).unwrap();
        assert!(there("first") && there("second") && there("third"), "{how}");
        let mut start = Instant::now();
        match how {
            "group" => {
                let group = rustix::process::Pid::from_raw(root.id() as i32).unwrap();
                rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
            }
            "exit" => kill(root.id(), rustix::process::Signal::TERM),
            "both" => {
                kill(cleaner, rustix::process::Signal::KILL);
                until("its name cleaner is gone", || {
                    std::fs::read(format!("/proc/{cleaner}/cmdline")).is_ok_and(|l| l.is_empty())
                });
                kill(root.id(), rustix::process::Signal::KILL);
                root.wait().unwrap();
                assert!(there("first") && there("second"), "nobody is left that could take them away");
                let (mut next, _) = begin("alone");
                start = Instant::now();
                kill(next.id(), rustix::process::Signal::KILL);
                next.wait().unwrap();
                mp::SharedMemory::open(&named(next.id(), "third")).unwrap().unlink().unwrap();
            }
            _ => kill(root.id(), rustix::process::Signal::KILL),
        }
        until("the names are gone", || !there("first") && !there("second"));
        let took = start.elapsed();
        assert!(there("third"), "{how}: what shall persist does");
        mp::SharedMemory::open(&named(root.id(), "third")).unwrap().unlink().unwrap();
        until("no process is left", || !runs(cleaner));
        root.wait().unwrap();
        took
    };
    for how in ["both", "alone", "server", "cleaner", "group", "exit"] {
        blocking_rounds(|| kill_it(how), |took| *took < Duration::from_secs(1));
    }
}

fn p7_start_from_a_busy_runtime() {
    let starts = if std::env::var_os("MULTIPROCESS_OLD_KERNEL").is_some() { 1000 } else { 10_000 };
    // On a busy machine a fifth of them must do.
    let (begun, enough) = (Instant::now(), Duration::from_secs(40));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    runtime.block_on(async {
        let stop = std::sync::Arc::new(AtomicU64::new(0));
        for _ in 0..4 {
            let stop = stop.clone();
            tokio::spawn(async move {
                while stop.load(SeqCst) == 0 {
                    std::hint::black_box(vec![0u8; 100_000]); // Holds malloc's locks much of the time.
                    tokio::task::yield_now().await;
                }
            });
        }
        for first in (0..starts).step_by(100) {
            let children = (first..first + 100).map(|n| Process::spawn(add, (n, 1)).unwrap());
            let sums = futures::future::try_join_all(children).await.unwrap();
            assert!(sums.into_iter().eq(first + 1..=first + 100));
            if first + 100 >= starts / 5 && begun.elapsed() > enough {
                break;
            }
        }
        stop.store(1, SeqCst);
    });
}

fn fds_01_a_high_inheritable_descriptor_is_not_in_the_child() {
    let (read, _write) = std::io::pipe().unwrap();
    let high = rustix::io::fcntl_dupfd_cloexec(&read, 777).unwrap();
    rustix::io::fcntl_setfd(&high, rustix::io::FdFlags::empty()).unwrap();
    assert_eq!(high.as_raw_fd(), 777);
    block_on(async {
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            let is_open = || std::fs::symlink_metadata("/proc/self/fd/777").is_ok();
            assert!(!Process::builder().start_method(method).spawn(is_open, ()).unwrap().await.unwrap());
        }
    });
}

fn mainh_01_a_renamed_or_deleted_program_goes_on() {
    if std::env::var_os("INNER").is_none() {
        let copy = temporary("odd name.not-py");
        std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
        let status = Command::new(&copy).arg("--odd").arg("arguments").env("INNER", "1").status().unwrap();
        assert!(status.success());
        return;
    }
    let program = std::env::current_exe().unwrap();
    let renamed = program.with_extension("renamed");
    std::fs::rename(&program, &renamed).unwrap();
    std::fs::write(&program, "another file under the old name").unwrap();
    block_on(async {
        let arguments = || std::env::args().skip(1).collect::<Vec<_>>();
        assert_eq!(Process::spawn(arguments, ()).unwrap().await.unwrap(), ["--odd", "arguments"]);
        std::fs::remove_file(&renamed).unwrap();
        std::fs::remove_file(&program).unwrap();
        let exec = Process::builder().start_method(StartMethod::Spawn).spawn(add, (1, 2)).unwrap();
        assert_eq!(exec.await.unwrap(), 3);
        kill(server(), rustix::process::Signal::KILL);
        assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
    });
}

static LOADED: AtomicU64 = AtomicU64::new(0);

fn sm_06_preloaded_state_is_in_every_child() {
    fn load() {
        LOADED.fetch_add(7, SeqCst);
    }
    mp::preload(load).unwrap();
    mp::preload(load).unwrap();
    block_on(async {
        let loaded = || LOADED.load(SeqCst);
        assert_eq!(Process::spawn(loaded, ()).unwrap().await.unwrap(), 14);
        let fresh = Process::builder().start_method(StartMethod::Spawn).spawn(loaded, ()).unwrap();
        assert_eq!(fresh.await.unwrap(), 0);
        assert!(mp::preload(load).unwrap_err().to_string().contains("before the first spawn"));
        kill(server(), rustix::process::Signal::KILL);
        assert_eq!(Process::spawn(loaded, ()).unwrap().await.unwrap(), 14);
    });
    assert_eq!(LOADED.load(SeqCst), 0);
}

fn preloaded_lock_is_held_by_each_child_as_itself() {
    use std::sync::OnceLock;
    static SHARED: OnceLock<(mp::Array<u32>, mp::Value<[u64; 4]>)> = OnceLock::new();
    fn load() {
        SHARED.get_or_init(|| (mp::Array::from_slice(&[1, 2, 3]).unwrap(), mp::Value::new([5; 4]).unwrap()));
    }
    async fn hold(locked: mp::Queue<()>) {
        let (array, value) = SHARED.get().unwrap();
        let _array = array.lock().await.unwrap();
        let mut value = value.lock().await.unwrap();
        value[0] = 6;
        locked.put(()).await.unwrap();
        hang().await
    }
    async fn follow() -> (bool, ErrorKind, u64) {
        let (array, value) = SHARED.get().unwrap();
        let refused = array.try_lock().is_err() && value.try_lock().is_err();
        let told = array.lock().await.unwrap_err().kind();
        value.set([7; 4]);
        (refused, told, value.lock().await.unwrap()[0])
    }
    mp::preload(load).unwrap();
    block_on(async {
        let locked = mp::Queue::unbounded().unwrap();
        let holder = Process::spawn(hold, (locked.clone(),)).unwrap();
        locked.get().await.unwrap();
        let follower = Process::spawn(follow, ()).unwrap();
        let is_it = |who: &mp::debug::Participant| who.pid() == Some(follower.pid());
        let is_in_line = |object: &mp::debug::Object| object.waiting().iter().any(is_it);
        until("it waits for the lock", || mp::debug::dump().objects().iter().any(is_in_line));
        holder.kill().unwrap();
        let followed = tokio::time::timeout(Duration::from_secs(20), follower).await.unwrap().unwrap();
        assert_eq!(followed, (true, ErrorKind::OwnerDied, 7));
    });
}

fn a_preload_that_panics_is_an_error() {
    fn fails() {
        panic!("no model here")
    }
    mp::preload(fails).unwrap();
    let error = Process::spawn(add, (1, 2)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Spawn);
    assert!(error.to_string().contains("no model here"), "{error}");
}

fn a_spawn_that_fails_changes_no_later_child() {
    fn look() -> (Option<String>, PathBuf) {
        (std::env::var("ONE").ok(), std::env::current_dir().unwrap())
    }
    // SAFETY: this process has one thread.
    let set = |value| unsafe { std::env::set_var("ONE", value) };
    block_on(async {
        let before = (Some("before".to_string()), PathBuf::from("/proc"));
        set("before");
        std::env::set_current_dir("/proc").unwrap();
        assert_eq!(Process::spawn(look, ()).unwrap().await.unwrap(), before);
        set("meanwhile");
        std::env::set_current_dir("/proc/sys").unwrap();
        // No exec takes a variable of that length, and the fork server finds that out when it has the order.
        let builder = Process::builder().start_method(StartMethod::Spawn).env("LONG", "x".repeat(4 << 20));
        assert_eq!(builder.spawn(look, ()).unwrap_err().kind(), ErrorKind::Spawn);
        set("before");
        std::env::set_current_dir("/proc").unwrap();
        for _ in 0..5 {
            assert_eq!(Process::spawn(look, ()).unwrap().await.unwrap(), before);
        }
    });
}

fn environment_directory_and_streams_are_those_at_the_spawn() {
    fn look() -> (Option<String>, Option<String>, PathBuf) {
        println!("out");
        (std::env::var("ONE").ok(), std::env::var("TWO").ok(), std::env::current_dir().unwrap())
    }
    // SAFETY: this process has one thread.
    let set = |key, value: Option<&str>| unsafe {
        match value {
            Some(value) => std::env::set_var(key, value),
            None => std::env::remove_var(key),
        }
    };
    block_on(async {
        for method in [StartMethod::ForkServer, StartMethod::Spawn] {
            set("ONE", Some("1"));
            set("TWO", None);
            std::env::set_current_dir("/proc").unwrap();
            let seen = Process::builder().start_method(method).spawn(look, ()).unwrap().await.unwrap();
            assert_eq!(seen, (Some("1".into()), None, "/proc".into()));
            set("ONE", None);
            set("TWO", Some("2=2"));
            std::env::set_current_dir("/proc/sys").unwrap();
            let (mut read, write) = std::io::pipe().unwrap();
            let saved = rustix::io::dup(std::io::stdout()).unwrap();
            rustix::stdio::dup2_stdout(&write).unwrap();
            drop(write);
            let child = Process::builder().start_method(method).env("ONE", "own").spawn(look, ()).unwrap();
            rustix::stdio::dup2_stdout(saved).unwrap();
            assert_eq!(child.await.unwrap(), (Some("own".into()), Some("2=2".into()), "/proc/sys".into()));
            let mut text = String::new();
            read.read_to_string(&mut text).unwrap();
            assert_eq!(text, "out\n");
            let seen = Process::builder().start_method(method).spawn(look, ()).unwrap().await.unwrap();
            assert_eq!(seen.0, None, "what one child was given is not in the next");
        }
    });
}

fn rt_01_nothing_is_left_behind() {
    // Tests of shared memory may run at the same time.
    let is_ours = |name: &str| !name.starts_with("test-") && !name.starts_with("psm_");
    let names = || std::fs::read_dir("/dev/shm").unwrap().map(|entry| entry.unwrap().file_name());
    let shm = || names().filter(|name| is_ours(&name.to_string_lossy())).count();
    let before = shm();
    block_on(async {
        let children: Vec<_> = (0..50).map(|n| Process::spawn(add, (n, n)).unwrap()).collect();
        for child in &children[..25] {
            child.kill().unwrap();
        }
        drop(children); // Nobody asks how they ended.
        let server = server();
        until("all are reaped", || is_idle(server));
    });
    assert_eq!(shm(), before);
}

fn proc_21_handles_and_children_leave_no_descriptor() {
    block_on(async {
        Process::spawn(add, (1, 1)).unwrap().await.unwrap();
        let round = async || {
            for n in 0..100 {
                let mut child = Process::spawn(add, (n, 1)).unwrap();
                match n % 3 {
                    0 => drop(child.join().await),
                    1 => drop(tokio::time::timeout(Duration::ZERO, child.join()).await),
                    _ => child.kill().unwrap(),
                }
            }
            let server = server();
            until("all are reaped", || is_idle(server));
            assert!(mp::active_children().is_empty());
        };
        round().await;
        let ours = open_descriptors();
        let count = |pid: u32| std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        let theirs = count(server());
        round().await;
        round().await;
        until("as many are open as before", || (open_descriptors(), count(server())) == (ours, theirs));
    });
}

/// The children of the fork server that wait for an order.
fn spares() -> Vec<u32> {
    let children = children_of(server()).into_iter().map(|(pid, _)| pid);
    let is_spare =
        |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "mp-spare\n");
    children.filter(is_spare).collect()
}

/// Spawns until there are spares, if this kernel allows for them.
async fn have_spares() -> Vec<u32> {
    let deadline = Instant::now() + Duration::from_secs(10);
    assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
    while spares().is_empty() && Instant::now() < deadline && std::env::var_os("MULTIPROCESS_OLD_KERNEL").is_none() {
        assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
    }
    spares()
}

fn spare_children_are_like_their_parent_at_the_spawn() {
    fn seen() -> (Option<String>, PathBuf, u32) {
        (std::env::var("COLOR").ok(), std::env::current_dir().unwrap(), std::process::id())
    }
    block_on(async {
        for (color, directory) in [("blue", "/"), ("green", "/"), ("green", "/proc"), ("red", "/usr")] {
            let old = have_spares().await;
            // SAFETY: this program has one thread.
            unsafe { std::env::set_var("COLOR", color) };
            std::env::set_current_dir(directory).unwrap();
            for _ in 0..6 {
                let (saw, was_in, pid) = Process::spawn(seen, ()).unwrap().await.unwrap();
                assert_eq!((saw.as_deref(), was_in.to_str().unwrap()), (Some(color), directory));
                assert!(!old.contains(&pid));
            }
        }
    });
}

fn spare_children_that_are_killed_or_not_wanted_are_no_loss() {
    block_on(async {
        for _ in 0..10 {
            for spare in have_spares().await {
                kill(spare, rustix::process::Signal::KILL);
                until("it is dead", || !runs(spare));
            }
            for _ in 0..3 {
                assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
            }
        }
        have_spares().await;
        until("spares that nobody wants end", || spares().is_empty());
        assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
    });
}

fn a_signal_to_a_spare_child_does_not_reach_its_function() {
    block_on(async {
        for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT, rustix::process::Signal::HUP] {
            for spare in have_spares().await {
                kill(spare, signal);
                until("it is no spare any more", || !runs(spare));
            }
            for _ in 0..3 {
                assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
            }
        }
    });
}

fn a_signal_right_after_the_spawn_finds_a_spare_child_as_it_is_to_be() {
    use rustix::process::Signal;
    block_on(async {
        let deadline = Instant::now() + Duration::from_secs(20);
        for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
            for is_shielded in [true, false] {
                // A spare may end, and another come, between the list and the spawn: only one that was on the list counts.
                while !meets_spare(signal, is_shielded).await {
                    assert!(Instant::now() < deadline, "no child was a spare");
                }
            }
        }
    });
}

/// Spawns, and gives a signal before a spare child can look what it is told. Returns `false` if the child was none of the spares.
async fn meets_spare(signal: rustix::process::Signal, is_shielded: bool) -> bool {
    let spares = have_spares().await;
    spares.iter().for_each(|spare| kill(*spare, rustix::process::Signal::STOP));
    let mut child = Process::builder().shield_signals(is_shielded).spawn(add, (1, 2)).unwrap();
    let was_spare = spares.contains(&child.pid());
    kill(child.pid(), signal);
    spares.iter().for_each(|spare| kill(*spare, rustix::process::Signal::CONT));
    let ended = tokio::time::timeout(Duration::from_secs(20), child.join()).await.unwrap();
    if is_shielded {
        assert!(!was_spare || ended.is_ok_and(|sum| sum == 3), "{signal:?}");
    } else if was_spare {
        assert_eq!(child.wait().await.unwrap().signal(), Some(signal.as_raw()));
    }
    was_spare || spares.is_empty()
}

fn a_spare_child_reports_why_it_cannot_take_its_order() {
    let many = |files: Vec<mp::Fd<std::fs::File>>| files.len();
    block_on(async {
        let files = || (0..200).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect();
        let deadline = Instant::now() + Duration::from_secs(20);
        // A spare may end, and another come, between the list and the spawn: only one that was limited counts.
        loop {
            let mut spares = have_spares().await;
            spares.retain(|spare| {
                let limit = rustix::process::Rlimit { current: Some(100), maximum: Some(100) };
                let pid = rustix::process::Pid::from_raw(*spare as i32);
                rustix::process::prlimit(pid, rustix::process::Resource::Nofile, limit).is_ok()
            });
            let child = Process::spawn(many, (files(),)).unwrap();
            let is_limited = spares.contains(&child.pid());
            match child.await {
                Err(error) => {
                    assert!(is_limited, "{error}");
                    assert_eq!(error.kind(), ErrorKind::Spawn, "{error}");
                    assert!(error.to_string().contains("descriptor limit"), "{error}");
                    break;
                }
                Ok(count) => assert_eq!((count, is_limited), (200, false)),
            }
            if std::env::var_os("MULTIPROCESS_OLD_KERNEL").is_some() {
                break;
            }
            assert!(Instant::now() < deadline, "no spare was asked");
        }
        until("the rest have ended", || spares().is_empty());
        assert_eq!(Process::spawn(many, (files(),)).unwrap().await.unwrap(), 200);
    });
}

fn spare_children_end_with_their_starter() {
    let end = async || {
        let spawns = async |mut waits: mp::Sender<()>| {
            for _ in 0..4 {
                Process::spawn(add, (1, 2)).unwrap().await.unwrap();
            }
            waits.send(()).await.unwrap();
            hang().await
        };
        let (tx, mut rx) = mp::simplex().unwrap();
        let mut starter = Process::spawn(spawns, (tx,)).unwrap();
        rx.recv().await.unwrap();
        let has_none = std::env::var_os("MULTIPROCESS_OLD_KERNEL").is_some();
        until("it has spares", || has_none || !spares().is_empty());
        let theirs = spares();
        let start = Instant::now();
        starter.kill().unwrap();
        assert!(!starter.wait().await.unwrap().success());
        until("its spares have ended", || !theirs.iter().any(|spare| runs(*spare)));
        if theirs.is_empty() { Duration::ZERO } else { start.elapsed() }
    };
    // Those that nobody wants end after 5 s.
    block_on(rounds(async || Ok(end().await), |took| *took < Duration::from_secs(3))).unwrap();
}

fn spare_children_come_back_after_a_shortage() {
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
    block_on(async {
        let had = have_spares().await;
        let (server, usual) = (server(), getrlimit(Resource::Nofile));
        let set =
            |current| prlimit(Pid::from_raw(server as i32), Resource::Nofile, Rlimit { current, ..usual }).unwrap();
        set(Some(3));
        // Those that are there go on being told, and none can be made in their place.
        let mut refused = None;
        for _ in 0..10 {
            let added = async { Process::spawn(add, (1, 2))?.await }.await;
            refused = refused.or(added.err());
        }
        assert_eq!(refused.unwrap().kind(), ErrorKind::Spawn);
        assert!(spares().is_empty());
        set(usual.current);
        assert_eq!(have_spares().await.is_empty(), had.is_empty());
    });
}

fn a_ticker_goes_on_during_a_thousand_spawns() {
    block_on(async {
        Process::spawn(add, (1, 1)).unwrap().await.unwrap();
        let ticker = tokio::spawn(async {
            let (mut ticks, mut slow, mut last) = (0u32, 0u32, Instant::now());
            loop {
                tokio::time::sleep(Duration::from_millis(1)).await;
                ticks += 1;
                slow += (last.elapsed() > Duration::from_millis(50)) as u32;
                last = Instant::now();
                TICKS.store(u64::from(ticks) << 32 | u64::from(slow), SeqCst);
            }
        });
        static TICKS: AtomicU64 = AtomicU64::new(0);
        // A thread that has nothing to do with all of this: what delays it comes from others that have the CPUs.
        static IS_OVER: AtomicU64 = AtomicU64::new(0);
        let control = std::thread::spawn(|| {
            let (mut ticks, mut slow, mut last) = (0u32, 0u32, Instant::now());
            while IS_OVER.load(SeqCst) == 0 {
                std::thread::sleep(Duration::from_millis(1));
                ticks += 1;
                slow += (last.elapsed() > Duration::from_millis(50)) as u32;
                last = Instant::now();
            }
            (ticks, slow)
        });
        let start = Instant::now();
        for n in 0..1000 {
            assert_eq!(Process::spawn(add, (n, 1)).unwrap().await.unwrap(), n + 1);
        }
        let (elapsed, seen) = (start.elapsed(), TICKS.load(SeqCst));
        let (ticks, slow) = (seen >> 32, seen & 0xffff_ffff);
        ticker.abort();
        IS_OVER.store(1, SeqCst);
        let (others, slow_others) = control.join().unwrap();
        println!("{ticks} ticks, {slow} slow, beside {others} and {slow_others} of a thread, in {elapsed:?}");
        // One tick in 5 ms on average, or one for every second spawn where a busy machine makes a spawn take longer.
        let least = (elapsed.as_millis() / 5).min(500).min(u128::from(others) / 4);
        assert!(u128::from(ticks) > least, "{ticks} ticks in {elapsed:?}");
        assert!(slow < 10 + u64::from(slow_others), "{slow} slow ticks");
    });
}

/// Voluntary and involuntary context switches of all threads of a process.
fn switches(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let statuses = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok());
    let counts = |status: String| -> u64 {
        let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
        lines.filter_map(|line| line.rsplit(char::is_whitespace).next()?.parse::<u64>().ok()).sum()
    };
    statuses.map(counts).sum()
}

fn rule_10_an_idle_pool_does_not_wake_up() {
    fn pid_after_a_while(_: u32) -> u32 {
        std::thread::sleep(Duration::from_millis(20));
        std::process::id()
    }
    if std::env::var_os("MULTIPROCESS_OLD_KERNEL").is_some() {
        return; // How an exit is told makes no difference to who is idle.
    }
    block_on(async {
        let pool = mp::Pool::new(2).unwrap();
        let pids = pool.map(pid_after_a_while, 0..8).chunksize(1).await.unwrap();
        let pids: std::collections::HashSet<u32> = pids.into_iter().chain([std::process::id(), server()]).collect();
        // The spare children, and what a worker does after its last task, come to an end first.
        until("nothing moves", || {
            let before: u64 = pids.iter().map(|pid| switches(*pid)).sum();
            std::thread::sleep(Duration::from_millis(500));
            pids.iter().map(|pid| switches(*pid)).sum::<u64>() <= before + 2
        });
        let all = || pids.iter().map(|pid| switches(*pid)).sum::<u64>();
        let round = async || {
            let before = all();
            // One sleep of ours is one wake-up of this process, and one or two switches.
            tokio::time::sleep(Duration::from_secs(10)).await;
            Ok(all() - before)
        };
        rounds(round, |switches| *switches <= 8).await.unwrap();
    });
}

fn at_the_descriptor_limit_there_are_errors_and_no_hang() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    block_on(async {
        Process::spawn(add, (1, 1)).unwrap().await.unwrap();
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(open_descriptors() as u64 + 12), ..limit }).unwrap();
        let mut running = Vec::new();
        let error = loop {
            match Process::spawn(add, (1, 2)) {
                Ok(child) => running.push(child),
                Err(error) => break error,
            }
            assert!(running.len() < 50);
        };
        assert_eq!(error.kind(), ErrorKind::Spawn, "{error}");
        setrlimit(Resource::Nofile, limit).unwrap();
        for child in running {
            assert_eq!(tokio::time::timeout(Duration::from_secs(10), child).await.unwrap().unwrap(), 3);
        }
        assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
    });
}

fn run_waits_for_children_and_ends_daemons() {
    let (read, write) = std::io::pipe().unwrap();
    let daemon = mp::run(async {
        let slow = |mut write: Fd<std::io::PipeWriter>| {
            std::thread::sleep(Duration::from_millis(30));
            write.write_all(b"done\n").unwrap();
        };
        let nested = async |write: Fd<std::io::PipeWriter>| {
            // Not awaited: the end of this function waits for it.
            let late = |mut write: Fd<std::io::PipeWriter>| {
                std::thread::sleep(Duration::from_millis(60));
                write.write_all(b"below\n").unwrap();
            };
            drop(Process::spawn(late, (write,)).unwrap());
        };
        drop(Process::spawn(slow, (Fd::new(write.try_clone().unwrap()),)).unwrap());
        drop(Process::spawn(nested, (Fd::new(write),)).unwrap());
        Some(Process::builder().daemon(true).spawn(hang, ()).unwrap())
    });
    assert!(daemon.is_some_and(|daemon| !daemon.is_alive()));
    assert!(mp::active_children().is_empty());
    let lines: BTreeSet<String> = BufReader::new(read).lines().map(Result::unwrap).collect();
    assert_eq!(lines.into_iter().collect::<Vec<_>>(), ["below", "done"]);
}

fn run_ends_quickly_with_a_daemon_that_ignores_sigterm() {
    let start = Instant::now();
    mp::run(async {
        async fn stubborn() {
            let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
            println!("ready");
            while terminate.recv().await.is_some() {}
        }
        let builder = Process::builder().daemon(true).stdout(Stdio::piped());
        let mut child = builder.spawn(stubborn, ()).unwrap();
        let mut line = String::new();
        BufReader::new(child.take_stdout().unwrap()).read_line(&mut line).unwrap();
        child.terminate().unwrap();
        assert!(child.is_alive());
    });
    assert!(start.elapsed() < Duration::from_secs(10));
}

fn a_server_at_its_descriptor_limit_starts_a_whole_child_or_none() {
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
    let notes = |mut write: Fd<std::io::PipeWriter>, n: u32| write.write_all(&n.to_le_bytes()).unwrap();
    let (read, write) = std::io::pipe().unwrap();
    let mut told = BTreeSet::new();
    block_on(async {
        assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
        let (server, usual) = (server(), getrlimit(Resource::Nofile));
        let set =
            |current| prlimit(Pid::from_raw(server as i32), Resource::Nofile, Rlimit { current, ..usual }).unwrap();
        let count = || std::fs::read_dir(format!("/proc/{server}/fd")).unwrap().count();
        let held = count();
        // Descriptors that this program was started with may have any numbers: so many are free below the limit.
        let limit_with = |pid: u32, room: usize| {
            let numbers = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
            let taken: BTreeSet<u64> =
                numbers.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
            (0..).filter(|number| !taken.contains(number)).nth(room).unwrap()
        };
        for room in 0..16 {
            for (at, method) in [mp::StartMethod::ForkServer, mp::StartMethod::Spawn].into_iter().enumerate() {
                set(Some(limit_with(server, room)));
                let n = (2 * room + at) as u32;
                let write = Fd::new(write.try_clone().unwrap());
                match Process::builder().start_method(method).spawn(notes, (write, n)) {
                    Ok(child) => {
                        let result = tokio::time::timeout(Duration::from_secs(10), child).await.expect("no hang");
                        // Its own limit is as low, so it may fail as well; then it has not begun.
                        if result.is_ok() {
                            told.insert(n);
                        }
                    }
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Spawn, "{error}"),
                }
            }
        }
        set(usual.current);
        assert_eq!(Process::spawn(add, (1, 2)).unwrap().await.unwrap(), 3);
        until("the server holds no more than before", || count() <= held);
    });
    drop(write);
    let (mut read, mut seen, mut number) = (BufReader::new(read), BTreeSet::new(), [0; 4]);
    while read.read_exact(&mut number).is_ok() {
        assert!(seen.insert(u32::from_le_bytes(number)));
    }
    assert_eq!(seen, told);
    assert!(!told.is_empty() && told.len() < 32, "{told:?}");
}
