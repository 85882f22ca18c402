//! What the surroundings refuse: an error that says so, and never a panic, a signal or a hang.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use multiprocess::connection::{Listener, connect};
use multiprocess::{self as mp, Event, Lock, Manager, Pool, Process, Queue, SharedMemory};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tokio::runtime::Builder;

mod common;

mp::test_support!();

/// Panics of threads of this name are counted, and not printed.
const QUIET: &str = "whose panics are counted";

/// Runs `f` on a thread of its own, and tells how often the panic hook was called there.
fn panics_in(f: impl FnOnce() + Send + 'static) -> usize {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| match std::thread::current().name() {
            Some(QUIET) => drop(COUNT.fetch_add(1, SeqCst)),
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
        Process::spawn(|| 1, ()).unwrap().await.unwrap_err();
    }
    if !has_io || !has_time {
        queue.get_timeout(soon).await.unwrap_err();
        event.wait_timeout(soon).await.unwrap_err();
        lock.acquire_timeout(soon).await.map(drop).unwrap_err();
    }
}

#[test]
fn what_needs_a_runtime_fails_without_one_or_its_drivers_and_the_panic_hook_hears_nothing() {
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

/// By SIGXFSZ the kernel ends who reserves or writes more.
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
