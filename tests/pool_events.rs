//! Events: what a task sends to its caller before its result.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::{
    Deadline, Random, all_asleep, eventually, holdings, holdings_of, in_child, no_growth, polled, ring_memory, within,
};
use futures::{FutureExt, StreamExt, TryStreamExt};
use multiprocess::{self as mp, Error, ErrorKind, Event, Events, Pool, Process, Queue, Retry, Value};
use std::pin::pin;
use std::time::Duration;

mp::test_support!();

const SHORT: Duration = Duration::from_millis(50);

fn task() -> mp::CurrentTask {
    mp::current_task().unwrap()
}

/// Sends the numbers below `n`.
fn counts(n: u64) -> mp::Result<u64> {
    (0..n).try_for_each(|n| task().blocking_emit(n))?;
    Ok(n)
}

async fn counts_later(n: u64) -> mp::Result<u64> {
    for n in 0..n {
        task().emit(n).await?;
    }
    Ok(n)
}

/// Sends without an end, each event of `len` bytes, and tells how many have gone.
fn floods(sent: Value<u64>, len: usize) -> mp::Result<u64> {
    loop {
        task().blocking_emit(vec![0_u8; len])?;
        sent.fetch_add(1);
        if task().is_cancelled() {
            return Ok(sent.get());
        }
    }
}

async fn all<E: serde::Serialize + serde::de::DeserializeOwned + Send + 'static>(events: Events<E>) -> Vec<E> {
    events.try_collect().await.unwrap()
}

/// Waits until a count stands still while those that might raise it sleep.
async fn stands_still(count: &Value<u64>, sleeps: impl Fn() -> bool) -> u64 {
    let (mut seen, mut looks) = (0, 0);
    eventually("it stands still", || {
        std::thread::sleep(SHORT / 3);
        let before = std::mem::replace(&mut seen, count.get());
        looks = if before == seen && seen > 0 && sleeps() { looks + 1 } else { 0 };
        looks == 3
    })
    .await;
    seen
}

/// Whether all workers that are at work sleep.
fn busy_sleep(pool: &Pool) -> bool {
    pool.stats().workers.iter().filter(|worker| worker.is_busy).all(|worker| all_asleep(worker.pid))
}

#[tokio::test]
async fn events_come_in_order_before_the_end_and_beside_the_result() {
    let pool = Pool::new(2).unwrap();
    let mut call = pool.apply(counts, (5,));
    let events = call.events::<u64>();
    let (result, events) = within(async { tokio::join!(call, all(events)) }).await;
    assert_eq!((result.unwrap().unwrap(), events), (5, vec![0, 1, 2, 3, 4]));
    let mut call = pool.apply(counts_later, (3000,));
    let events = call.events::<u64>();
    let (result, events) = within(async { tokio::join!(call, all(events)) }).await;
    assert_eq!((result.unwrap().unwrap(), events), (3000, (0..3000).collect()));
    // After the result too, as many as fit.
    let mut call = pool.apply(counts, (7,));
    let events = call.events::<u64>();
    within(call).await.unwrap().unwrap();
    assert_eq!(within(all(events)).await.len(), 7);
    // None, of a function that sends none.
    let mut call = pool.apply(|| 1, ());
    let events = call.events::<String>();
    assert_eq!(within(call).await.unwrap(), 1);
    assert!(within(all(events)).await.is_empty());
}

#[tokio::test]
async fn all_items_of_maps_and_streams_send_to_one_stream() {
    let pool = Pool::new(2).unwrap();
    let tells = |n: u64| task().blocking_emit((task().index(), n)).map(|()| n);
    let expected: Vec<_> = (0..100).map(|n| (n, n + 7)).collect();
    let sorted = |mut events: Vec<(u64, u64)>| {
        events.sort_unstable();
        events
    };
    let mut map = pool.map(tells, 7..107);
    let events = map.events();
    let (results, events) = within(async { tokio::join!(map, all(events)) }).await;
    assert_eq!((results.unwrap().len(), sorted(events)), (100, expected.clone()));
    for mut results in [pool.imap(tells, 7..107), pool.imap_unordered(tells, 7..107)] {
        let events = results.events();
        let (results, events) = within(async { tokio::join!(results.collect::<Vec<_>>(), all(events)) }).await;
        assert_eq!((results.len(), sorted(events)), (100, expected.clone()));
    }
    let mut results = pool.imap_stream(tells, futures::stream::iter(7..107)).chunksize(10);
    let events = results.events();
    let (results, events) = within(async { tokio::join!(results.collect::<Vec<_>>(), all(events)) }).await;
    assert_eq!((results.len(), sorted(events)), (100, expected));
    // A checkout, a task as a value, and a pool with state.
    let worker = within(pool.checkout()).await.unwrap();
    let calls = [worker.apply(counts, (1,)), pool.run(mp::Task::of(counts, (1,)))];
    for mut call in calls {
        let events = call.events::<u64>();
        let (result, events) = within(async { tokio::join!(call, all(events)) }).await;
        assert_eq!((result.unwrap().unwrap(), events), (1, vec![0]));
    }
    let pool = Pool::builder().workers(1).state(|| 5_u8, ()).build().unwrap();
    let mut call = pool.with_state().apply(|state: &mut u8| task().blocking_emit(*state), ());
    let events = call.events::<u8>();
    let (result, events) = within(async { tokio::join!(call, all(events)) }).await;
    assert_eq!((result.unwrap().is_ok(), events), (true, vec![5]));
}

#[tokio::test]
async fn large_events_and_handles_arrive_beside_arguments_with_handles() {
    let pool = Pool::new(1).unwrap();
    let sends = |handle: Value<u32>, bytes: Vec<u8>| {
        task().blocking_emit((Some(handle), vec![7_u8; 20 << 20]))?;
        task().blocking_emit((None::<Value<u32>>, bytes.clone()))?;
        Ok::<_, Error>(bytes)
    };
    let (value, large) = (Value::new(3).unwrap(), vec![1_u8; 5 << 20]);
    let mut call = pool.apply(sends, (value.clone(), large.clone()));
    let events = call.events::<(Option<Value<u32>>, Vec<u8>)>();
    let (result, events) = within(async { tokio::join!(call, all(events)) }).await;
    assert_eq!(result.unwrap().unwrap(), large);
    assert_eq!((events[0].1.len(), events[1].1 == large), (20 << 20, true));
    events[0].0.as_ref().unwrap().set(4);
    assert_eq!(value.get(), 4);
}

#[tokio::test]
async fn a_slow_listener_slows_its_own_task_only() {
    let pool = Pool::new(2).unwrap();
    let sent = Value::new(0_u64).unwrap();
    let mut slow = pool.apply(floods, (sent.clone(), 100)).grace(Duration::from_millis(100));
    let mut events = slow.events::<Vec<u8>>();
    let mut slow = pin!(slow);
    assert!(futures::poll!(&mut slow).is_pending());
    let most = stands_still(&sent, || busy_sleep(&pool)).await;
    assert!((100..=1100).contains(&most), "{most} events wait");
    // The other worker serves, with events and without.
    within(pool.map(|n: u64| n, 0..1000)).await.unwrap();
    let mut call = pool.apply(counts, (2000,));
    let others = call.events::<u64>();
    let (result, others) = within(async { tokio::join!(call, all(others)) }).await;
    assert_eq!((result.unwrap().unwrap(), others.len()), (2000, 2000));
    assert_eq!(sent.get(), most);
    // Each that is received makes room.
    for _ in 0..500 {
        assert_eq!(within(events.next()).await.unwrap().unwrap().len(), 100);
    }
    eventually("it goes on", || sent.get() > most).await;
    // By size: one or two mebibytes, or two events.
    for (len, bound) in [(10_000, 250), (3 << 20, 3)] {
        let sent = Value::new(0_u64).unwrap();
        let mut call = pool.apply(floods, (sent.clone(), len)).grace(Duration::ZERO);
        let _events = call.events::<Vec<u8>>();
        let mut call = pin!(call);
        assert!(futures::poll!(&mut call).is_pending());
        let most = stands_still(&sent, || busy_sleep(&pool)).await;
        assert!(most <= bound, "{most} events of {len} bytes");
    }
}

#[tokio::test]
async fn an_event_of_another_type_is_an_error_with_both_names() {
    struct _Unused;
    let pool = Pool::new(1).unwrap();
    let names = |error: &Error, sent: &str, wanted: &str| {
        assert_eq!(error.kind(), ErrorKind::Encode);
        let text = error.to_string();
        assert!(text.contains(sent) && text.contains(wanted), "{text}");
    };
    let mut call = pool.apply(|| task().blocking_emit(1_u32), ());
    let events = call.events::<i32>();
    let (result, events) = within(async { tokio::join!(call, all(events)) }).await;
    names(&result.unwrap().unwrap_err(), "u32", "i32");
    assert!(events.is_empty());
    // Also of a type that would fit, and after one that was right.
    let sends = async || {
        task().emit((1_u8, String::new())).await?;
        task().emit([1_u8]).await
    };
    let mut call = pool.apply(sends, ());
    let events = call.events::<(u8, String)>();
    let (result, events) = within(async { tokio::join!(call, all(events)) }).await;
    names(&result.unwrap().unwrap_err(), "[u8; 1]", "(u8, alloc::string::String)");
    assert_eq!(events.len(), 1);
    // One that cannot be encoded.
    let mut call = pool.apply(|| task().try_emit(Stubborn), ());
    let events = call.events::<Stubborn>();
    let (result, events) = within(async { tokio::join!(call, events.count()) }).await;
    assert_eq!((result.unwrap().unwrap_err().kind(), events), (ErrorKind::Encode, 0));
}

/// Cannot be encoded.
#[derive(serde::Deserialize)]
struct Stubborn;

impl serde::Serialize for Stubborn {
    fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        Err(serde::ser::Error::custom("no"))
    }
}

#[tokio::test]
async fn events_for_which_nobody_listens_are_discarded() {
    let pool = Pool::new(1).unwrap();
    // Not asked for: nothing is encoded, whatever the type.
    let sends = || {
        assert!(!task().has_listener());
        task().blocking_emit(1_u8)?;
        task().try_emit(Stubborn)
    };
    within(pool.apply(sends, ())).await.unwrap().unwrap();
    within(pool.map(|n: u64| task().blocking_emit(n).is_ok(), 0..1000)).await.unwrap();
    // Dropped before the call begins, and while it waits.
    let mut call = pool.apply(counts, (100_000,));
    drop(call.events::<u64>());
    assert_eq!(within(call).await.unwrap().unwrap(), 100_000);
    let (sent, go_on) = (Value::new(0_u64).unwrap(), Event::new().unwrap());
    let sends = |sent: Value<u64>, go_on: Event| -> mp::Result<bool> {
        assert!(task().has_listener());
        for _ in 0..2000 {
            task().blocking_emit(0_u64)?;
            sent.fetch_add(1);
        }
        go_on.blocking_wait()?;
        Ok(task().has_listener())
    };
    let mut call = pool.apply(sends, (sent.clone(), go_on.clone()));
    let events = call.events::<u64>();
    let mut call = pin!(call);
    assert!(futures::poll!(&mut call).is_pending());
    assert!(stands_still(&sent, || busy_sleep(&pool)).await < 2000);
    drop(events);
    eventually("all are sent", || sent.get() == 2000).await;
    go_on.set();
    assert!(!within(call).await.unwrap().unwrap(), "it learns that nobody listens");
    assert_eq!(pool.stats().totals.restarted, 0);
}

#[tokio::test]
async fn a_task_that_is_over_and_a_process_without_one_send_nothing() {
    assert!(mp::current_task().is_none());
    let pool = Pool::new(1).unwrap();
    // What a task leaves behind.
    let leaves = |told: Queue<(bool, Option<ErrorKind>)>, go_on: Event| {
        let task = task();
        std::thread::spawn(move || {
            go_on.blocking_wait().unwrap();
            let kind = task.blocking_emit(1_u8).err().map(|error| error.kind());
            told.blocking_put((task.has_listener(), kind)).unwrap();
        });
    };
    for listens in [true, false] {
        let (told, go_on) = (Queue::unbounded().unwrap(), Event::new().unwrap());
        let mut call = pool.apply(leaves, (told.clone(), go_on.clone()));
        let events = listens.then(|| call.events::<u8>());
        within(call).await.unwrap();
        // Another one is at work by then.
        within(pool.apply(|| (), ())).await.unwrap();
        go_on.set();
        assert_eq!(within(told.get()).await.unwrap(), (false, Some(ErrorKind::Closed)));
        if let Some(events) = events {
            assert!(within(all(events)).await.is_empty());
        }
    }
}

#[tokio::test]
async fn thread_left_behind_sends_no_event_of_the_next_item_of_its_call() {
    let pool = Pool::new(1).unwrap();
    let leaves = |n: u8, told: Queue<Option<ErrorKind>>, go_on: Event, done: Event| -> mp::Result<()> {
        if n == 0 {
            let task = task();
            let mine = task.clone();
            std::thread::spawn(move || {
                go_on.blocking_wait().unwrap();
                let sent = [task.blocking_emit(100_u8), task.try_emit(101_u8)];
                sent.into_iter().for_each(|sent| told.blocking_put(sent.err().map(|error| error.kind())).unwrap());
                done.set();
            });
            return mine.blocking_emit(n);
        }
        // The thread of the first item sends while this one runs.
        go_on.set();
        done.blocking_wait()?;
        task().blocking_emit(n)
    };
    let (told, go_on, done) = (Queue::unbounded().unwrap(), Event::new().unwrap(), Event::new().unwrap());
    let items = (0..2).map(|n| (n, told.clone(), go_on.clone(), done.clone()));
    let mut map = pool.starmap(leaves, items.collect::<Vec<_>>());
    let events = map.events::<u8>();
    let (results, events) = within(async { tokio::join!(map, all(events)) }).await;
    results.unwrap().into_iter().for_each(|result| result.unwrap());
    assert_eq!(events, [0, 1]);
    for _ in 0..2 {
        assert_eq!(within(told.get()).await.unwrap(), Some(ErrorKind::Closed));
    }
}

#[tokio::test]
async fn stream_that_is_dropped_frees_its_events_while_the_call_goes_on() {
    let frees = async || {
        let pool = Pool::new(1).unwrap();
        let sends = |sent: Event, go_on: Event| -> mp::Result<()> {
            (0..2).try_for_each(|_| task().blocking_emit((vec![7_u8; 8 << 20], Event::new()?)))?;
            sent.set();
            go_on.blocking_wait()
        };
        let (sent, go_on) = (Event::new().unwrap(), Event::new().unwrap());
        let mut call = pool.apply(sends, (sent.clone(), go_on.clone()));
        let events = call.events::<(Vec<u8>, Event)>();
        let call = tokio::spawn(call);
        within(sent.wait()).await.unwrap();
        assert!(ring_memory() >= 16 << 20);
        drop(events);
        assert!(ring_memory() < 4 << 20, "at once, and not after a time without use");
        go_on.set();
        within(call).await.unwrap().unwrap().unwrap();
    };
    in_child(frees, ()).await;
}

#[tokio::test]
async fn events_are_asked_for_once_and_before_the_call_begins() {
    let pool = Pool::new(1).unwrap();
    let late = async |events: Events<u8>| {
        let events: Vec<_> = within(events.collect()).await;
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].as_ref().unwrap_err().kind(), ErrorKind::Other);
    };
    let mut call = pool.apply(counts, (2,));
    let events = call.events::<u64>();
    late(call.events()).await;
    let (result, events) = within(async { tokio::join!(call, all(events)) }).await;
    assert_eq!((result.unwrap().unwrap(), events.len()), (2, 2));
    let mut call = pool.apply(std::thread::sleep, (SHORT,));
    assert!((&mut call).now_or_never().is_none());
    late(call.events()).await;
    within(call).await.unwrap();
    // Arguments that cannot be sent.
    let mut call = pool.apply(|_: Stubborn| (), (Stubborn,));
    let events: Vec<_> = within(call.events::<u8>().collect()).await;
    assert_eq!(events[0].as_ref().unwrap_err().kind(), ErrorKind::Encode);
    assert_eq!(within(call).await.unwrap_err().kind(), ErrorKind::Encode);
}

#[tokio::test]
async fn the_death_of_a_worker_ends_the_events_of_its_task_and_of_no_other() {
    let pool = Pool::new(2).unwrap();
    let dies = |n: u64| -> mp::Result<()> {
        counts(n)?;
        std::process::abort()
    };
    let go_on = Event::new().unwrap();
    let waits = async |go_on: Event| -> mp::Result<()> {
        task().emit(1_u64).await?;
        go_on.wait().await?;
        task().emit(2_u64).await
    };
    let mut other = pool.apply(waits, (go_on.clone(),));
    let mut others = other.events::<u64>();
    let other = tokio::spawn(other);
    assert_eq!(within(others.next()).await.unwrap().unwrap(), 1);
    let mut call = pool.apply(dies, (3,));
    let events = call.events::<u64>();
    let (result, events) = within(async { tokio::join!(call, all(events)) }).await;
    assert_eq!((result.unwrap_err().kind(), events), (ErrorKind::ProcessDied, vec![0, 1, 2]));
    go_on.set();
    within(other).await.unwrap().unwrap().unwrap();
    assert_eq!(within(all(others)).await, [2]);
    // What an earlier attempt has sent stays sent.
    fn attempts() -> mp::Result<u32> {
        let attempt = task().attempt();
        task().blocking_emit(attempt)?;
        if attempt < 2 { std::process::abort() } else { Ok(attempt) }
    }
    let mut call = pool.apply(attempts, ()).retries(2).retry_if(Retry::DIED);
    let events = call.events::<u32>();
    let (result, events) = within(async { tokio::join!(call, all(events)) }).await;
    assert_eq!((result.unwrap().unwrap(), events), (2, vec![0, 1, 2]));
    let mut map = pool.map(|_: u8| attempts(), 0..3).retries(2);
    let events = map.events::<u32>();
    let (results, events) = within(async { tokio::join!(map, all(events)) }).await;
    assert_eq!((results.unwrap().len(), events.len()), (3, 9));
    // By a predicate.
    let again = |result: &mp::Result<mp::Result<u32>>| matches!(result, Ok(Ok(attempt)) if *attempt < 2);
    let tells = || task().blocking_emit(task().attempt()).map(|()| task().attempt());
    let mut call = pool.apply(tells, ()).retries(5).retry_if(again);
    let events = call.events::<u32>();
    let (result, events) = within(async { tokio::join!(call, all(events)) }).await;
    assert_eq!((result.unwrap().unwrap(), events), (2, vec![0, 1, 2]));
    let tells = |_: u8| task().blocking_emit(task().attempt()).map(|()| task().attempt());
    let mut map = pool.map(tells, 0..3).retries(5).retry_if(again);
    let events = map.events::<u32>();
    let (results, mut events) = within(async { tokio::join!(map, all(events)) }).await;
    events.sort_unstable();
    assert_eq!((results.unwrap().len(), events), (3, vec![0, 0, 0, 1, 1, 1, 2, 2, 2]));
}

/// Killed at each step of sending an event: the event is whole or not there, those before it are there, and the stream ends.
#[cfg(debug_assertions)]
#[tokio::test]
async fn a_worker_killed_at_any_step_of_an_event_loses_that_one_at_most() {
    for (point, arrives) in
        [("put.taken:3", false), ("put.written:3", false), ("put.published:3", true), ("put.released:3", true)]
    {
        let pool = Pool::builder().workers(1).env("MULTIPROCESS_KILL_AT", point).build().unwrap();
        let mut call = pool.apply(counts, (5,));
        let events = call.events::<u64>();
        let (result, events) = within(async { tokio::join!(call, all(events)) }).await;
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ProcessDied, "{point}");
        assert_eq!(events.len(), if arrives { 3 } else { 2 }, "{point}");
        // The next is unharmed, in a new worker, and so is another item of the same call.
        let mut map = pool.map(counts, [2, 5, 1]).retries(0).chunksize(1);
        let events = map.events::<u64>();
        let (result, events) = within(async { tokio::join!(map, all(events)) }).await;
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ProcessDied, "{point}");
        assert!(events.len() >= 2, "{point}: {events:?}");
    }
}

#[tokio::test]
async fn a_cancelled_call_ends_a_task_that_waits_for_room() {
    let pool = Pool::new(1).unwrap();
    for is_async in [false, true] {
        let floods_later = async |sent: Value<u64>, _: usize| -> mp::Result<u64> {
            loop {
                task().emit(vec![0_u8; 100]).await?;
                sent.fetch_add(1);
                if task().is_cancelled() {
                    return Ok(sent.get());
                }
            }
        };
        let sent = Value::new(0_u64).unwrap();
        let args = (sent.clone(), 100);
        let mut call = if is_async { pool.apply(floods_later, args) } else { pool.apply(floods, args) };
        call = call.grace(Duration::from_secs(600));
        let events = call.events::<Vec<u8>>();
        {
            let mut call = pin!(call);
            assert!(futures::poll!(&mut call).is_pending());
            stands_still(&sent, || busy_sleep(&pool)).await;
        }
        // Its worker serves at once, as the task did not wait for its grace.
        within(pool.apply(|| (), ())).await.unwrap();
        assert!(within(all(events)).await.len() as u64 >= sent.get() - 1);
    }
    // By its time, while nobody receives: it is told so.
    let tells = |kinds: Queue<ErrorKind>| {
        let error = loop {
            if let Err(error) = task().blocking_emit(vec![0_u8; 1000]) {
                break error;
            }
        };
        kinds.blocking_put(error.kind()).unwrap();
    };
    let kinds = Queue::unbounded().unwrap();
    let mut call = pool.apply(tells, (kinds.clone(),)).timeout(4 * SHORT).grace(Duration::from_secs(600));
    let events = call.events::<Vec<u8>>();
    let _ = within(call).await;
    assert_eq!(within(kinds.get()).await.unwrap(), ErrorKind::Cancelled);
    assert!(within(events.count()).await > 100);
    assert_eq!(pool.stats().totals.restarted, 0, "no worker was killed");
}

/// A task that waits for room in its caller's queue must not outlive its caller.
#[tokio::test]
async fn a_task_that_waits_for_room_ends_with_its_caller() {
    let caller = async |pids: Queue<u32>, sent: Value<u64>| {
        let pool = Pool::new(1).unwrap();
        let pid = within(pool.apply(std::process::id, ())).await.unwrap();
        pids.put(pid).await.unwrap();
        let mut call = pool.apply(floods, (sent, 100));
        let _events = call.events::<Vec<u8>>();
        call.await.unwrap().unwrap();
    };
    let (pids, sent) = (Queue::unbounded().unwrap(), Value::new(0_u64).unwrap());
    let mut caller = Process::spawn(caller, (pids.clone(), sent.clone())).unwrap();
    let worker = within(pids.get()).await.unwrap();
    stands_still(&sent, || all_asleep(worker)).await;
    caller.kill().unwrap();
    let _ = within(caller.join()).await;
    eventually("the worker is gone", || common::pool::is_gone(worker)).await;
}

#[tokio::test]
async fn a_pool_within_this_process_has_events_and_a_current_task() {
    let _deadline = Deadline::start();
    let pool = Pool::in_process().unwrap();
    let mut call = pool.apply(counts, (3000,));
    let events = call.events::<u64>();
    let (result, events) = within(async { tokio::join!(call, all(events)) }).await;
    assert_eq!((result.unwrap().unwrap(), events.len()), (3000, 3000));
    let tells = async |n: u64| {
        let task = task();
        task.emit((task.index(), task.attempt())).await.map(|()| (n, task.label().is_empty()))
    };
    let mut map = pool.map(tells, 5..8);
    let events = map.events::<(u64, u32)>();
    let (results, events) = within(async { tokio::join!(map, all(events)) }).await;
    assert_eq!(events, [(0, 0), (1, 0), (2, 0)]);
    assert_eq!(
        results.unwrap().into_iter().map(Result::unwrap).collect::<Vec<_>>(),
        [(5, false), (6, false), (7, false)]
    );
    assert!(mp::current_task().is_none());
    // A cancelled one learns of it, also while it waits for room.
    let sent = Value::new(0_u64).unwrap();
    let mut call = pool.apply(floods, (sent.clone(), 100));
    let events = call.events::<Vec<u8>>();
    {
        let mut call = pin!(call);
        assert!(futures::poll!(&mut call).is_pending());
        stands_still(&sent, || true).await;
    }
    drop(events);
    let waits = async || task().cancellation().cancelled().await;
    let cancelled = pool.apply_async(waits, ());
    eventually("it runs", || pool.stats().running == 1).await;
    cancelled.cancel();
    assert_eq!(within(pool.apply(|| 1, ())).await.unwrap(), 1);
}

#[tokio::test]
async fn ten_thousand_dropped_polls_and_streams_leave_nothing_behind() {
    let drops = async || {
        let mut random = Random::new(16);
        let pool = Pool::new(2).unwrap();
        let mut call = pool.apply(counts_later, (u64::MAX,));
        let mut events = call.events::<u64>();
        let call = tokio::spawn(call);
        let mut expected = 0;
        // Polls of the stream: none loses an event.
        for _ in 0..10_000 {
            let next = tokio::time::timeout(Duration::from_micros(random.below(100)), events.next());
            if let Ok(event) = next.await {
                assert_eq!(event.unwrap().unwrap(), expected);
                expected += 1;
            }
        }
        assert!(expected > 0);
        call.abort();
        let _ = call.await;
        drop(events);
        // Calls and streams, dropped at any time.
        let run = async |random: &mut Random| {
            let n = random.below(40);
            let mut call = pool.apply(counts_later, (n,)).grace(Duration::from_secs(600));
            let events = call.events::<u64>();
            match random.below(3) {
                0 => drop(events),
                1 => drop(tokio::time::timeout(Duration::from_micros(random.below(500)), call).await),
                _ => {
                    let (result, events) = within(async { tokio::join!(call, all(events)) }).await;
                    assert_eq!((result.unwrap().unwrap(), events.len() as u64), (n, n));
                }
            }
        };
        for _ in 0..50 {
            run(&mut random).await;
        }
        let idle = async || {
            within(pool.map(|_: u8| (), 0..100)).await.unwrap();
            let idle = || pool.stats().running == 0 && pool.stats().queued == 0;
            eventually("all is over", idle).await;
        };
        idle().await;
        let workers: Vec<_> = pool.stats().workers.iter().map(|worker| worker.pid).collect();
        let before = (holdings(), holdings_of(workers[0]), holdings_of(workers[1]));
        for _ in 0..1000 {
            run(&mut random).await;
        }
        idle().await;
        no_growth(before.0, holdings).await;
        no_growth(before.1, || holdings_of(workers[0])).await;
        no_growth(before.2, || holdings_of(workers[1])).await;
        assert_eq!(pool.stats().totals.restarted, 0);
    };
    in_child(drops, ()).await;
}

/// Drops so many sends at a random time; how many events it has sent.
async fn drops_sends(drops: u32) -> mp::Result<u64> {
    let (task, mut random) = (task(), Random::new(17));
    let (mut sent, mut dropped) = (0, 0);
    while dropped < drops {
        let send = task.emit(sent);
        // Few by a clock, whose tick is long.
        let done = match random.below(20) {
            0 => tokio::time::timeout(Duration::from_micros(random.below(300)), send).await.ok(),
            _ => polled(&mut random, send).await,
        };
        match done {
            Some(done) => sent += done.map(|()| 1)?,
            None => dropped += 1,
        }
    }
    Ok(sent)
}

#[tokio::test]
async fn ten_thousand_dropped_sends_send_nothing_and_lose_no_event_of_others() {
    let pool = Pool::new(1).unwrap();
    let run = async |drops: u32| {
        let mut call = pool.apply(drops_sends, (drops,));
        let mut events = call.events::<u64>();
        let (call, mut received) = (tokio::spawn(call), 0);
        while let Some(event) = within(events.next()).await {
            assert_eq!(event.unwrap(), received);
            received += 1;
            if !call.is_finished() {
                // There is rarely room.
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        assert_eq!(within(call).await.unwrap().unwrap().unwrap(), received);
        received
    };
    run(300).await;
    let worker = pool.stats().workers[0].pid;
    let before = holdings_of(worker);
    assert!(run(10_000).await > 1024, "more than there is room for");
    no_growth(before, || holdings_of(worker)).await;
    assert_eq!(pool.stats().totals.restarted, 0);
}

#[test]
fn streams_and_tasks_can_be_sent() {
    fn is_send<T: Send>(_: &T) {}
    fn check(events: &Events<std::cell::Cell<u8>>, task: &mp::CurrentTask) {
        is_send(events);
        is_send(&task.emit(std::cell::Cell::new(1_u8)));
    }
    let _ = check;
}
