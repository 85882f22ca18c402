//! What the surroundings refuse: an error that says so, and never a panic, a signal or a hang.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use multiprocess::connection::{Listener, connect};
use multiprocess::{self as mp, Event, Lock, Manager, Pool, Process, Queue};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tokio::runtime::Builder;

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
