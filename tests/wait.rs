//! Waiting for several things at once: with futures it is `select`, and nothing is lost by it.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::{eventually, is_asleep, payload, read_payload, within};
use futures::stream::{FuturesUnordered, SelectAll};
use futures::{FutureExt, StreamExt};
use multiprocess::{self as mp, Fd, Process, Queue, Receiver, Sender};
use std::io::{Read, Write};
use std::time::{Duration, Instant};

mp::test_support!();

#[test]
fn a_runtime_without_io_is_an_error_and_no_panic() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let queue = mp::Queue::<u32>::unbounded().unwrap();
    let error = runtime.block_on(queue.get()).unwrap_err();
    assert!(error.to_string().contains("enable_io"), "{error}");
    let child = mp::Process::spawn(|| 1, ()).unwrap();
    runtime.block_on(async { drop(mp::Process::spawn(|| 2, ()).unwrap()) });
    queue.try_put(3).unwrap();
    assert_eq!(runtime.block_on(queue.get()).unwrap(), 3, "what need not wait needs no driver");
    drop(child);
}

#[tokio::test]
async fn wait_01_four_pipes_until_each_ends() {
    for slow in [false, true] {
        let send = async |mut tx: Sender<(u32, u32)>, me: u32, slow: bool| {
            for n in 0..10 {
                if slow {
                    tokio::time::sleep(Duration::from_millis(u64::from(me + n) % 3)).await;
                }
                tx.send((n, me)).await.unwrap();
            }
        };
        let mut readers = SelectAll::new();
        let mut children = Vec::new();
        for me in 0..4 {
            let (tx, rx) = mp::simplex().unwrap();
            children.push(Process::spawn(send, (tx, me, slow)).unwrap());
            readers.push(rx);
        }
        let mut messages = Vec::new();
        within(async {
            while let Some(message) = readers.next().await {
                messages.push(message.unwrap());
            }
        })
        .await;
        messages.sort_unstable();
        let expected: Vec<_> = (0..10).flat_map(|n| (0..4).map(move |me| (n, me))).collect();
        assert_eq!(messages, expected);
    }
}

#[tokio::test]
async fn wait_02_four_sockets_of_children() {
    let write = |stream: Fd<std::os::unix::net::UnixStream>, me: u8| {
        for n in 0..10 {
            (&*stream).write_all(&[n, me]).unwrap();
        }
    };
    let mut reads = FuturesUnordered::new();
    let mut children = Vec::new();
    for me in 0..4 {
        let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
        children.push(Process::spawn(write, (Fd::new(there), me)).unwrap());
        reads.push(tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            (&here).read_to_end(&mut bytes).unwrap();
            bytes.len()
        }));
    }
    while let Some(len) = within(reads.next()).await {
        assert_eq!(len.unwrap(), 20);
    }
}

#[tokio::test]
async fn wait_03_a_timeout_is_not_early_and_then_the_ready_one_is_found() {
    let (mut tx, mut a) = mp::simplex::<u32>().unwrap();
    let (_keep, mut b) = mp::simplex::<u32>().unwrap();
    let start = Instant::now();
    let timeout = Duration::from_millis(50);
    let either = async {
        tokio::select! { n = a.recv() => n.unwrap(), n = b.recv() => n.unwrap() }
    };
    assert!(tokio::time::timeout(timeout, either).await.is_err());
    assert!(start.elapsed() >= timeout);
    tx.send(4).await.unwrap();
    let either = async {
        tokio::select! { n = a.recv() => n.unwrap(), n = b.recv() => n.unwrap() }
    };
    assert_eq!(within(either).await, 4);
}

#[tokio::test]
async fn wait_04_select_over_pipe_and_process_returns_the_ready_one() {
    let (mut tx, mut rx) = mp::simplex::<u32>().unwrap();
    let (go, go_there) = mp::simplex::<()>().unwrap();
    let wait = async |mut go: Receiver<()>| drop(go.recv().await);
    let mut process = Process::spawn(wait, (go_there,)).unwrap();
    assert!(rx.recv().now_or_never().is_none());
    tx.send(1).await.unwrap();
    let first = within(async {
        tokio::select! { n = rx.recv() => Some(n.unwrap()), _ = process.wait() => None }
    });
    assert_eq!(first.await, Some(1));
    drop(go);
    let second = within(async {
        tokio::select! { n = rx.recv() => Some(n.unwrap()), _ = process.wait() => None }
    });
    assert_eq!(second.await, None);
    // Both: an ended process stays ended.
    tx.send(2).await.unwrap();
    let (n, status) = within(async { futures::join!(rx.recv(), process.wait()) }).await;
    assert_eq!((n.unwrap(), status.unwrap().code()), (2, Some(0)));
}

#[tokio::test]
async fn wait_06_nothing_and_the_same_thing_twice() {
    let mut nothing = FuturesUnordered::<futures::future::Ready<()>>::new();
    assert!(nothing.next().await.is_none());
    let queue = Queue::<u32>::unbounded().unwrap();
    queue.put(1).await.unwrap();
    let (first, second) = futures::join!(queue.get().map(Some), async {
        tokio::time::timeout(Duration::from_millis(20), queue.get()).await.ok()
    });
    assert_eq!((first.unwrap().unwrap(), second.is_none()), (1, true));
}

#[tokio::test]
async fn wait_07_a_hundred_processes_wait_for_one_queue() {
    // More than an event has entries for: those beyond are woken by their bells.
    const MANY: u32 = 100;
    let (queue, took) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
    let take = |queue: Queue<u32>, took: Queue<u32>| took.blocking_put(queue.blocking_get().unwrap()).unwrap();
    let takers: Vec<_> = (0..MANY).map(|_| Process::spawn(take, (queue.clone(), took.clone())).unwrap()).collect();
    for taker in &takers {
        eventually("it waits", || is_asleep(taker.pid())).await;
    }
    for n in 0..MANY {
        queue.put(n).await.unwrap();
    }
    let mut seen = [false; MANY as usize];
    for _ in 0..MANY {
        seen[within(took.get()).await.unwrap() as usize] = true;
    }
    assert_eq!(seen, [true; MANY as usize]);
    for done in within(futures::future::join_all(takers)).await {
        done.unwrap();
    }
}

#[tokio::test]
async fn wait_07_hundreds_of_pipes_in_one_task() {
    let echo = async |pipes: Vec<mp::Connection<Vec<u8>, Vec<u8>>>| {
        let echo_one = |mut pipe: mp::Connection<Vec<u8>, Vec<u8>>| async move {
            while let Ok(bytes) = pipe.recv().await {
                pipe.send(bytes).await.unwrap();
            }
        };
        futures::future::join_all(pipes.into_iter().map(echo_one)).await;
    };
    let (here, there): (Vec<_>, Vec<_>) = (0..200).map(|_| mp::pipe::<Vec<u8>, Vec<u8>>().unwrap()).unzip();
    let child = Process::spawn(echo, (there,)).unwrap();
    let talk = |(me, mut pipe): (usize, mp::Connection<Vec<u8>, Vec<u8>>)| async move {
        for n in 0..5 {
            pipe.send(payload(me as u32, n, 100)).await.unwrap();
            assert_eq!(read_payload(&pipe.recv().await.unwrap()), (me as u32, n));
        }
    };
    within(futures::future::join_all(here.into_iter().enumerate().map(talk))).await;
    within(child).await.unwrap();
}

#[tokio::test]
async fn a_select_loop_loses_nothing_of_either_queue() {
    let (a, b) = (Queue::<u32>::unbounded().unwrap(), Queue::<u32>::unbounded().unwrap());
    let feed = async |a: Queue<u32>, b: Queue<u32>| {
        for n in 0..2000 {
            a.put(n).await.unwrap();
            b.put(n).await.unwrap();
        }
    };
    let child = Process::spawn(feed, (a.clone(), b.clone())).unwrap();
    let (mut next_a, mut next_b) = (0, 0);
    within(async {
        while next_a < 2000 || next_b < 2000 {
            tokio::select! {
                n = a.get() => { assert_eq!(n.unwrap(), next_a); next_a += 1; }
                n = b.get() => { assert_eq!(n.unwrap(), next_b); next_b += 1; }
            }
        }
    })
    .await;
    within(child).await.unwrap();
    assert!(a.is_empty() && b.is_empty());
}

#[tokio::test]
async fn a_round_trip_works_from_every_kind_of_runtime_in_a_child() {
    let plain = |from: Queue<u32>, to: Queue<u32>| to.blocking_put(from.blocking_get().unwrap()).unwrap();
    let own_runtime = |from: Queue<u32>, to: Queue<u32>| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async { to.put(from.get().await.unwrap()).await.unwrap() });
    };
    let provided = async |from: Queue<u32>, to: Queue<u32>| to.put(from.get().await.unwrap()).await.unwrap();
    let (to, from) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
    let arguments = || (to.clone(), from.clone());
    for n in 0..10 {
        let children = [
            Process::spawn(plain, arguments()).unwrap(),
            Process::spawn(own_runtime, arguments()).unwrap(),
            Process::spawn(provided, arguments()).unwrap(),
        ];
        for m in 0..3 {
            to.put(3 * n + m).await.unwrap();
        }
        for child in children {
            within(child).await.unwrap();
        }
        let mut sum = 0;
        for _ in 0..3 {
            sum += from.try_get().unwrap();
        }
        assert_eq!(sum, 9 * n + 3);
    }
}

/// The place of the panic that `blocking` causes, as `file:line`.
fn place_of_panic(blocking: impl FnOnce()) -> Option<String> {
    use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
    thread_local!(static PLACE: std::cell::RefCell<Option<String>> = const { std::cell::RefCell::new(None) });
    static ONE_HOOK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = ONE_HOOK.lock();
    let before = take_hook();
    set_hook(Box::new(|panic| {
        PLACE.set(panic.location().map(|place| format!("{}:{}", place.file(), place.line())));
    }));
    PLACE.set(None);
    let panicked = catch_unwind(AssertUnwindSafe(blocking)).is_err();
    set_hook(before);
    PLACE.take().filter(|_| panicked)
}

#[tokio::test]
async fn blocking_call_inside_async_code_panics_at_the_callers_line() {
    let soon = Duration::from_millis(1);
    let (queue, joinable) = (Queue::<u8>::bounded(1).unwrap(), mp::JoinableQueue::<u8>::unbounded().unwrap());
    let (mut tx, mut rx) = mp::simplex::<u8>().unwrap();
    let (mut left, _right) = mp::pipe::<u8, u8>().unwrap();
    let (lock, rlock, rwlock) = (mp::Lock::new().unwrap(), mp::RLock::new().unwrap(), mp::RwLock::new().unwrap());
    let (semaphore, bounded) = (mp::Semaphore::new(1).unwrap(), mp::BoundedSemaphore::new(1).unwrap());
    let (event, condition) = (mp::Event::new().unwrap(), mp::Condition::new().unwrap());
    let barrier = mp::Barrier::new(2).unwrap();
    let (value, array) = (mp::Value::new(1u32).unwrap(), mp::Array::<u8>::zeroed(2).unwrap());
    macro_rules! panics_here {
        ($($call:expr;)*) => {$(
            let here = format!("{}:{}", file!(), line!());
            let place = place_of_panic(|| { let _ = $call; });
            assert_eq!(place.as_deref(), Some(&*here), "{}", stringify!($call));
        )*};
    }
    panics_here!(queue.blocking_put(1););
    panics_here!(queue.blocking_get(););
    panics_here!(joinable.blocking_join(););
    panics_here!(tx.blocking_send(1););
    panics_here!(rx.blocking_recv(););
    panics_here!(left.blocking_send(1););
    panics_here!(left.blocking_recv(););
    panics_here!(lock.blocking_acquire(););
    panics_here!(lock.blocking_acquire_timeout(soon););
    panics_here!(rlock.blocking_acquire(););
    panics_here!(rlock.blocking_acquire_timeout(soon););
    panics_here!(rwlock.blocking_read(););
    panics_here!(rwlock.blocking_read_timeout(soon););
    panics_here!(rwlock.blocking_write(););
    panics_here!(rwlock.blocking_write_timeout(soon););
    panics_here!(semaphore.blocking_acquire(););
    panics_here!(semaphore.blocking_acquire_timeout(soon););
    panics_here!(bounded.blocking_acquire(););
    panics_here!(event.blocking_wait(););
    panics_here!(event.blocking_wait_timeout(soon););
    panics_here!(barrier.blocking_wait(););
    panics_here!(barrier.blocking_wait_timeout(soon););
    panics_here!(value.blocking_lock(););
    panics_here!(value.blocking_lock_timeout(soon););
    panics_here!(array.blocking_lock(););
    panics_here!(array.blocking_lock_timeout(soon););
    panics_here!(condition.blocking_lock(););
    panics_here!(condition.blocking_lock_timeout(soon););
    let guard = condition.lock().await.unwrap();
    panics_here!(condition.blocking_wait(guard););
    let guard = condition.lock().await.unwrap();
    panics_here!(condition.blocking_wait_timeout(guard, soon););
    let guard = condition.lock().await.unwrap();
    panics_here!(condition.blocking_wait_for(guard, || false););
    panics_here!(mp::run(async {}););
}
