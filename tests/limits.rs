//! What the surroundings refuse: an error that says so, and never a panic, a signal or a hang.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use multiprocess::connection::{Listener, connect};
use multiprocess::{self as mp, Event, Lock, Manager, Pool, Process, Queue, SharedMemory};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};
use tokio::runtime::Builder;

mod common;

mp::test_support!();

/// Panics of threads of this name are counted.
const QUIET: &str = "whose panics are counted";

/// Runs `f` on a thread of its own, and tells how often the panic hook was called there.
fn panics_in(f: impl FnOnce() + Send + 'static) -> usize {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| match std::thread::current().name() {
            Some(QUIET) => {
                eprintln!("the hook of this test heard: {info}");
                COUNT.fetch_add(1, SeqCst);
            }
            _ => before(info),
        }));
    });
    let start = COUNT.load(SeqCst);
    std::thread::Builder::new().name(QUIET.into()).spawn(f).unwrap().join().expect("no panic leaves it");
    COUNT.load(SeqCst) - start
}

/// What waits for the kernel or for time, each with the drivers of the runtime that it needs.
async fn fails_without_drivers(has_io: bool, has_time: bool) {
    let error = Listener::bind("127.0.0.1:0").authkey(b"key").await.unwrap_err();
    assert_eq!(error.kind(), mp::ErrorKind::Io);
    let error = connect("127.0.0.1:1", None).await.unwrap_err();
    assert!(error.kind() == mp::ErrorKind::Io && error.to_string().contains("tokio runtime"), "{error}");
    let error = connect("/nobody/is/here", None).await.unwrap_err();
    assert!(error.to_string().contains("tokio runtime"), "{error}");
    assert_eq!(Manager::start().await.unwrap_err().kind(), mp::ErrorKind::Io);
    assert_eq!(Manager::connect("127.0.0.1:1", b"key").await.map(drop).unwrap_err().kind(), mp::ErrorKind::Io);
    assert!(Pool::new(1).is_err());
    let (queue, event, lock) = (Queue::<u32>::unbounded().unwrap(), Event::new().unwrap(), Lock::new().unwrap());
    let (soon, _held) = (Duration::from_millis(1), lock.try_acquire().unwrap());
    if !has_io {
        queue.get().await.unwrap_err();
        event.wait().await.unwrap_err();
        lock.acquire().await.map(drop).unwrap_err();
        let mut process = Process::spawn(async || std::future::pending::<()>().await, ()).unwrap();
        process.join().await.unwrap_err();
        process.kill().unwrap();
    }
    if !has_io || !has_time {
        queue.get_timeout(soon).await.unwrap_err();
        event.wait_timeout(soon).await.unwrap_err();
        lock.acquire_timeout(soon).await.map(drop).unwrap_err();
    }
}

#[test]
fn call_that_needs_a_runtime_fails_without_one_or_its_drivers_and_without_a_panic() {
    let panics = panics_in(|| {
        futures::executor::block_on(fails_without_drivers(false, false));
        let runtime = |has_io: bool, has_time: bool| {
            let mut builder = Builder::new_current_thread();
            let builder = if has_io { builder.enable_io() } else { &mut builder };
            let builder = if has_time { builder.enable_time() } else { builder };
            builder.build().unwrap()
        };
        for (has_io, has_time) in [(false, false), (false, true), (true, false)] {
            runtime(has_io, has_time).block_on(fails_without_drivers(has_io, has_time));
        }
        let whole = runtime(true, true);
        whole.block_on(async { Listener::bind("127.0.0.1:0").await.unwrap() });
    });
    assert_eq!(panics, 0);
}

/// By SIGXFSZ the kernel ends a process that reserves or writes more.
async fn fails_at_the_limit_of_file_sizes(memory: SharedMemory) {
    let queue = Queue::<Vec<u8>>::unbounded().unwrap();
    setrlimit(Resource::Fsize, Rlimit { current: Some(100), maximum: None }).unwrap();
    let names_it = |error: mp::Error| {
        assert!(error.kind() == mp::ErrorKind::Io && error.to_string().contains("RLIMIT_FSIZE"), "{error}");
        assert!(error.to_string().contains("files of 100 bytes"), "{error}");
    };
    names_it(Lock::new().map(drop).unwrap_err());
    names_it(Queue::<u32>::unbounded().map(drop).unwrap_err());
    names_it(mp::Value::new(1u64).map(drop).unwrap_err());
    names_it(mp::Array::<u64>::zeroed(1000).map(drop).unwrap_err());
    names_it(SharedMemory::anonymous(1 << 20).unwrap_err());
    names_it(SharedMemory::create("multiprocess-test-fsize", 1 << 20).unwrap_err());
    names_it(queue.put(vec![1; 4 << 20]).await.unwrap_err().into_error());
    names_it(memory.write(8000, &[1; 10]).unwrap_err());
    names_it(memory.write(95, &[1; 10]).unwrap_err());
    memory.write(10, b"below").unwrap();
    // A process needs none of it, its arguments may.
    assert_eq!(Process::spawn(|| 1, ()).unwrap().await.unwrap(), 1);
    let large = Process::spawn(|bytes: Vec<u8>| bytes.len(), (vec![1; 1 << 20],)).map(drop).unwrap_err();
    assert!(large.to_string().contains("RLIMIT_FSIZE"), "{large}");
}

#[tokio::test]
async fn at_the_limit_of_file_sizes_creating_growing_and_writing_shared_memory_are_errors() {
    let memory = SharedMemory::anonymous(1 << 16).unwrap();
    common::in_child(fails_at_the_limit_of_file_sizes, (memory.clone(),)).await;
    let mut text = [0; 5];
    memory.read(10, &mut text).unwrap();
    assert_eq!(&text, b"below");
}

/// A child of this process by the name that the kernel shows.
fn child_called(name: &str) -> Option<u32> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let children = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default());
    let children: Vec<u32> =
        children.flat_map(|list| list.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
    let is_it = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name);
    children.into_iter().find(is_it)
}

/// Gives names while the process that removes them is stopped, then dies of SIGKILL.
fn gives_names_though_their_remover_is_stopped(names: Vec<String>, times: Queue<(Duration, Duration)>) {
    let _deadline = common::Deadline::start();
    let first = SharedMemory::create(&names[0], 10).unwrap();
    let kept = SharedMemory::create(&names[1], 10).unwrap();
    let remover = child_called("mp-cleaner").unwrap();
    common::stop(remover);
    let start = Instant::now();
    // One gives a name and waits, another takes one away.
    let name = names[2].clone();
    let giving = std::thread::spawn(move || SharedMemory::create(&name, 10).unwrap());
    while std::fs::exists(format!("/dev/shm/{}", names[0])).unwrap() && start.elapsed() < Duration::from_millis(500) {
        std::thread::yield_now(); // The other has begun by then, most likely.
    }
    let dropping = Instant::now();
    drop(first);
    let dropped = dropping.elapsed();
    let _third = giving.join().unwrap();
    times.blocking_put((dropped, start.elapsed())).unwrap();
    kept.persist().unwrap();
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}

#[tokio::test]
async fn a_stopped_name_cleaner_blocks_no_call_and_the_names_are_removed() {
    let names = ["first", "kept", "third"].map(|what| format!("multiprocess-{}-{what}", common::alone::unique()));
    let path = |at: usize| format!("/dev/shm/{}", names[at]);
    let round = async || {
        let times = Queue::unbounded()?;
        let args = (names.to_vec(), times.clone());
        let child = Process::spawn(gives_names_though_their_remover_is_stopped, args)?;
        let error = common::within(child).await.unwrap_err();
        assert_eq!(error.kind(), mp::ErrorKind::ProcessDied, "{error}");
        common::eventually("its name goes", || !std::fs::exists(path(2)).unwrap()).await;
        assert!(!std::fs::exists(path(0)).unwrap() && std::fs::exists(path(1)).unwrap());
        SharedMemory::open(&names[1])?.unlink()?;
        times.try_get()
    };
    // The drop does not wait, and a name that is given waits for a few seconds only.
    let is_in_time =
        |(dropped, all): &(Duration, Duration)| *dropped < Duration::from_secs(2) && *all < Duration::from_secs(10);
    common::rounds(round, is_in_time).await.unwrap();
}

/// How often `needle` is in the memory of another process; `None` where that may not be read.
fn copies_in(pid: u32, needle: &[u8]) -> Option<Vec<String>> {
    use std::os::unix::fs::FileExt;
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).ok()?;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let mut found = Vec::new();
    for line in maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|may| may.starts_with("rw"))) {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        let mut bytes = vec![0; (end - start) as usize];
        // Not all that is mapped can be read.
        let read = memory.read_at(&mut bytes, start).unwrap_or(0);
        let here = bytes[..read].windows(needle.len()).filter(|window| *window == needle).count();
        found.extend((0..here).map(|_| line.to_string()));
    }
    Some(found)
}

/// Where a key must be: once in the manager, which has to know it for each peer that comes.
async fn starts_a_manager_and_looks_for_its_key() {
    // Made here, so that it is in no image, and as text, so that it is no pointer or counter by chance.
    let key = format!("{:032x}", u128::from_le_bytes(random()));
    let manager = Manager::builder().bind("127.0.0.1:0").authkey(&key).start().await.unwrap();
    let there = manager.address().await.unwrap().unwrap();
    let client = Manager::connect(&there, key.as_bytes()).await.unwrap();
    client.names().set("n", 1u32).await.unwrap();
    assert!(Manager::connect(&there, b"wrong").await.is_err());
    let later = Process::spawn(async || std::future::pending::<()>().await, ()).unwrap();
    let mut in_the_server = 0;
    let mut ancestors = vec![later.pid()];
    while let Some(parent) = ancestors.last().and_then(|pid| parent_of(*pid)).filter(|pid| *pid > 1) {
        ancestors.push(parent);
        if std::fs::read_to_string(format!("/proc/{parent}/comm")).unwrap().trim() == "mp-server" {
            in_the_server += 1;
            let Some(copies) = copies_in(parent, key.as_bytes()) else {
                return eprintln!("SKIPPED: the memory of another process may not be read here");
            };
            assert_eq!(copies, Vec::<String>::new(), "the fork server knows the key");
            break;
        }
    }
    assert_eq!(in_the_server, 1, "{ancestors:?}");
    assert_eq!(copies_in(later.pid(), key.as_bytes()).unwrap(), Vec::<String>::new(), "a later child knows the key");
    let copies = copies_in(manager.pid(), key.as_bytes()).unwrap();
    assert_eq!(copies.len(), 1, "{copies:?}");
    later.kill().unwrap();
}

fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).unwrap();
    bytes
}

fn parent_of(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok())
}

#[tokio::test]
async fn an_authkey_is_in_no_memory_that_later_children_get_and_once_in_its_manager() {
    common::within(starts_a_manager_and_looks_for_its_key()).await;
}

/// The dynamic loader of this program, if it has one.
fn loader() -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let mut files = maps.lines().filter_map(|line| Some(&line[line.find('/')?..]));
    files.find(|file| file.rsplit('/').next().is_some_and(|name| name.starts_with("ld-"))).map(str::to_string)
}

#[tokio::test]
#[ignore = "the next test runs it, through the dynamic loader"]
async fn named_memory_and_spawn_by_the_loader_need_an_absolute_path() {
    let name = format!("multiprocess-loader-{}", common::alone::unique());
    if std::env::var_os("AWAY").is_none() {
        assert_eq!(SharedMemory::create(&name, 10).unwrap().len(), 10);
        assert_eq!(Process::spawn(|| 1, ()).unwrap().await.unwrap(), 1);
        return;
    }
    std::env::set_current_dir("/").unwrap();
    let error = SharedMemory::create(&name, 10).unwrap_err();
    assert!(error.to_string().contains("by an absolute path"), "{error}");
    let error = Process::spawn(|| 1, ()).map(drop).unwrap_err();
    assert!(error.to_string().contains("by an absolute path"), "{error}");
}

#[test]
fn a_program_started_by_the_loader_with_a_relative_path_works_or_the_error_names_the_cause() {
    let Some(loader) = loader() else {
        return eprintln!("SKIPPED: this program has no dynamic loader");
    };
    let program = std::env::current_exe().unwrap();
    for away in [false, true] {
        let mut command = std::process::Command::new(&loader);
        command.arg(format!("./{}", program.file_name().unwrap().to_str().unwrap()));
        command
            .args(["named_memory_and_spawn_by_the_loader_need_an_absolute_path", "--exact", "--ignored"])
            .current_dir(program.parent().unwrap());
        if away {
            command.env("AWAY", "1");
        }
        let output = command.env("RUST_BACKTRACE", "0").output().unwrap();
        assert!(output.status.success(), "{away}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

#[tokio::test]
#[ignore = "the next test runs it, in a process of its own"]
async fn with_a_fork_server_of_its_own() {
    let _deadline = common::Deadline::after(Duration::from_secs(80));
    let round = async || {
        assert_eq!(Process::spawn(|| 1, ())?.await?, 1);
        let server = child_called("mp-server").unwrap();
        common::stop(server);
        let start = Instant::now();
        let error = Process::spawn(|| 2, ()).map(drop).unwrap_err();
        let took = start.elapsed();
        assert!(error.kind() == mp::ErrorKind::Spawn && error.to_string().contains("is stopped"), "{error}");
        common::go_on(server);
        assert_eq!(Process::spawn(|| 3, ())?.await?, 3);
        Ok(took)
    };
    common::rounds(round, |took| *took < Duration::from_secs(15)).await.unwrap();
}

#[test]
fn a_spawn_while_the_fork_server_is_stopped_is_an_error_in_time_and_the_next_one_works() {
    let mut inner = std::process::Command::new(std::env::current_exe().unwrap());
    inner.args(["with_a_fork_server_of_its_own", "--exact", "--ignored"]).env("RUST_BACKTRACE", "0");
    let output = inner.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
