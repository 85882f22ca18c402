//! What services add to a pool: which failures are tried again, refusals, state of workers, tasks as values, counters.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::{eventually, within};
use multiprocess::{self as mp, ErrorKind, Event, Histogram, Pool, Queue, Retry, Task, Value};
use std::time::Duration;

mp::test_support!();

const SHORT: Duration = Duration::from_millis(50);

/// Dies the first `deaths` times.
fn dies(calls: Value<u32>, deaths: u32) -> u32 {
    let call = calls.fetch_add(1);
    if call < deaths {
        std::process::abort();
    }
    call
}

/// Overruns the first time.
fn overruns(calls: Value<u32>) -> u32 {
    let call = calls.fetch_add(1);
    if call == 0 {
        std::thread::sleep(Duration::from_secs(600));
    }
    call
}

#[tokio::test]
async fn retries_are_for_the_failures_that_were_named() {
    let pool = Pool::new(1).unwrap();
    let calls = || Value::new(0_u32).unwrap();
    // Deaths, and not overruns.
    let call = pool.apply(dies, (calls(), 2)).retries(5).retry_if(Retry::DIED);
    assert_eq!(within(call).await.unwrap(), 2);
    let call = pool.apply(overruns, (calls(),)).timeout(SHORT).retries(5).retry_if(Retry::DIED);
    assert_eq!(within(call).await.unwrap_err().kind(), ErrorKind::Timeout);
    // The other way round.
    let call = pool.apply(dies, (calls(), 1)).retries(5).retry_if(Retry::TIMED_OUT);
    assert_eq!(within(call).await.unwrap_err().kind(), ErrorKind::ProcessDied);
    let call = pool.apply(overruns, (calls(),)).timeout(SHORT).retries(5).retry_if(Retry::TIMED_OUT);
    assert_eq!(within(call).await.unwrap(), 1);
    // Both, which is what `retries` alone means.
    for both in [Some(Retry::DIED | Retry::TIMED_OUT), None] {
        let call = pool.apply(dies, (calls(), 1)).retries(1);
        let call = both.into_iter().fold(call, |call, both| call.retry_if(both));
        assert_eq!(within(call).await.unwrap(), 1);
    }
    // The items of a map.
    let calls = calls();
    let items = vec![(calls.clone(), 1), (calls, 1)];
    let map = pool.starmap(dies, items).retries(3).retry_if(Retry::DIED);
    assert_eq!(within(map).await.unwrap().len(), 2);
    let totals = pool.stats().totals;
    assert_eq!((totals.timed_out, totals.died), (1, 1));
    assert!(totals.retried >= 6 && totals.restarted >= 5, "{totals:?}");
}

#[tokio::test]
async fn attempts_by_a_predicate_are_one_call_for_close_rejection_and_the_id_of_the_task() {
    let count = |calls: Value<u32>| (calls.fetch_add(1), mp::current_task().unwrap().task_id());
    let is_first = |result: &mp::Result<(u32, String)>| result.as_ref().is_ok_and(|(n, _)| *n == 0);
    // A pool that is closed between two attempts completes the call, and ends.
    let pool = Pool::new(1).unwrap();
    let first = std::sync::Arc::new(std::sync::Mutex::new(None));
    let (closing, seen) = (pool.clone(), first.clone());
    let call = pool.apply(count, (Value::new(0_u32).unwrap(),)).retries(3).retry_if(move |result: &mp::Result<_>| {
        closing.close();
        if let Ok((0, id)) = result {
            *seen.lock().unwrap() = Some(String::clone(id));
        }
        is_first(result)
    });
    let (n, id) = within(call).await.unwrap();
    assert_eq!((n, Some(id)), (1, first.lock().unwrap().take()), "both attempts have the id of the one task");
    within(pool.join()).await.unwrap();
    // A queue that is full by then refuses no further attempt of an accepted call.
    let pool = Pool::builder().workers(1).max_waiting(1).build().unwrap();
    let filling = (pool.clone(), std::sync::Mutex::new(Vec::new()));
    let call = pool.apply(count, (Value::new(0_u32).unwrap(),)).retries(3).reject_when_full();
    let call = call.retry_if(move |result: &mp::Result<_>| {
        let (pool, filled) = &filling;
        while let Ok(waiting) = pool.try_apply(|| std::thread::sleep(SHORT), ()) {
            filled.lock().unwrap().push(waiting);
        }
        is_first(result)
    });
    assert_eq!(within(call).await.unwrap().0, 1);
    // A call that is refused is not asked again, however often it may be tried.
    pool.terminate();
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let counted = asked.clone();
    let call = pool.apply(count, (Value::new(0_u32).unwrap(),)).retries(u32::MAX).retry_if(move |_: &mp::Result<_>| {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        true
    });
    assert_eq!(within(call).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(asked.load(std::sync::atomic::Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_predicate_decides_by_the_result_and_no_longer_than_the_retries_go() {
    let pool = Pool::new(1).unwrap();
    let count = |calls: Value<u32>| calls.fetch_add(1);
    let is_below_three = |result: &mp::Result<u32>| result.as_ref().is_ok_and(|n| *n < 3);
    let call = || pool.apply(count, (Value::new(0_u32).unwrap(),));
    assert_eq!(within(call().retries(5).retry_if(is_below_three)).await.unwrap(), 3);
    assert_eq!(within(call().retries(2).retry_if(is_below_three)).await.unwrap(), 2);
    assert_eq!(within(call().retry_if(is_below_three)).await.unwrap(), 0);
    let start = std::time::Instant::now();
    let rested = call().retries(2).back_off(Duration::from_millis(30)).retry_if(is_below_three);
    assert_eq!(within(rested).await.unwrap(), 2);
    assert!(start.elapsed() >= Duration::from_millis(90));
    // Panics, and an attempt that the task sees.
    let panics = || {
        let attempt = mp::current_task().unwrap().attempt();
        assert!(attempt == 2, "attempt {attempt}");
        attempt
    };
    let panicked = |result: &mp::Result<u32>| result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Panicked);
    assert_eq!(within(pool.apply(panics, ()).retries(5).retry_if(panicked)).await.unwrap(), 2);
    assert_eq!(pool.stats().totals.panicked, 2);
}

#[tokio::test]
async fn a_dropped_call_with_a_predicate_is_not_made_again() {
    let pool = Pool::new(1).unwrap();
    let calls = Value::new(0_u32).unwrap();
    let count = |calls: Value<u32>| calls.fetch_add(1);
    let always = |_: &mp::Result<u32>| true;
    {
        let call = pool.apply(count, (calls.clone(),)).retries(1_000_000).back_off(SHORT).retry_if(always);
        tokio::select! {
            _ = call => unreachable!("it is made again and again"),
            () = eventually("it was made", || calls.get() >= 1) => {}
        }
    }
    // The attempt that was at work may still have counted.
    tokio::time::sleep(SHORT).await;
    let seen = calls.get();
    tokio::time::sleep(3 * SHORT).await;
    assert_eq!(calls.get(), seen);
}

#[tokio::test]
async fn a_call_that_finds_no_room_is_refused_at_once_and_counted() {
    let pool = Pool::builder().workers(1).max_waiting(2).build().unwrap();
    let (begun, go_on) = (Event::new().unwrap(), Event::new().unwrap());
    let wait = async |begun: Event, go_on: Event| {
        begun.set();
        go_on.wait().await.unwrap();
    };
    let running = pool.apply_async(wait, (begun.clone(), go_on.clone()));
    within(begun.wait()).await.unwrap();
    let waiting: Vec<_> = (0..2).map(|_| pool.try_apply(|| (), ()).unwrap()).collect();
    let error = within(pool.apply(|| (), ()).reject_when_full()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full);
    assert_eq!(pool.try_apply(|| (), ()).map(|_| ()).unwrap_err().kind(), ErrorKind::Full);
    assert_eq!(pool.stats().totals.rejected, 2);
    go_on.set();
    within(running).await.unwrap();
    for call in waiting {
        within(call).await.unwrap();
    }
    within(pool.apply(|| (), ()).reject_when_full()).await.unwrap();
    assert_eq!(pool.stats().totals.done, 4);
    // Without a bound there is always room.
    within(Pool::new(1).unwrap().apply(|| (), ()).reject_when_full()).await.unwrap();
}

/// A call takes a millisecond and there is one worker: callers come at three times the rate that it can serve.
#[tokio::test]
async fn at_three_times_the_load_the_accepted_calls_keep_their_latency() {
    let work = || std::thread::sleep(Duration::from_millis(2));
    let pool = Pool::builder().workers(1).max_waiting(4).build().unwrap();
    within(pool.apply(work, ())).await.unwrap();
    let mut calls = Vec::new();
    for _ in 0..300 {
        let call = pool.apply(work, ()).reject_when_full();
        calls.push(tokio::spawn(async move {
            let start = std::time::Instant::now();
            call.await.map(|()| start.elapsed())
        }));
        tokio::time::sleep(Duration::from_micros(700)).await;
    }
    let mut accepted = Vec::new();
    let mut refused = 0;
    for call in calls {
        match within(call).await.unwrap() {
            Ok(took) => accepted.push(took),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Full);
                refused += 1;
            }
        }
    }
    accepted.sort();
    let median = accepted[accepted.len() / 2];
    println!("{} accepted, median {median:?}; {refused} refused", accepted.len());
    // An open loop without refusals would end with a wait of hundreds of milliseconds.
    assert!(refused > 0 && median < Duration::from_millis(250), "{median:?}");
    assert_eq!(pool.stats().totals.rejected, refused);
}

#[tokio::test]
async fn totals_count_each_item_once_by_how_it_ended() {
    let pool = Pool::new(2).unwrap();
    within(pool.map(|n: u64| n, 0..1000)).await.unwrap();
    let _ = within(pool.apply(|| -> u8 { panic!("no") }, ())).await.unwrap_err();
    let _ = within(pool.apply(|| -> u8 { std::process::abort() }, ())).await.unwrap_err();
    let stuck = || std::thread::sleep(Duration::from_secs(600));
    let _ = within(pool.apply(stuck, ()).timeout(SHORT)).await.unwrap_err();
    let running = pool.apply_async(stuck, ());
    eventually("it runs", || pool.stats().running == 1).await;
    running.cancel();
    within(running).await.unwrap_err();
    // What is large, or brings descriptors, comes another way.
    within(pool.apply(|| vec![0_u8; 3 << 20], ())).await.unwrap();
    within(pool.apply(|| mp::Lock::new().unwrap(), ())).await.unwrap();
    eventually("all is counted", || {
        let totals = pool.stats().totals;
        let ended = (totals.done, totals.panicked, totals.died, totals.timed_out, totals.cancelled, totals.failed);
        ended == (1002, 1, 1, 1, 1, 0) && totals.restarted == 3
    })
    .await;
    pool.terminate();
    within(pool.join()).await.unwrap();
    assert_eq!(pool.stats().totals.done, 1002, "they stay");

    let pool = Pool::builder().workers(1).max_tasks_per_worker(1).build().unwrap();
    for _ in 0..3 {
        within(pool.apply(|| (), ())).await.unwrap();
    }
    eventually("workers are replaced", || pool.stats().totals.recycled >= 2).await;
    assert_eq!(pool.stats().totals.restarted, 0);
}

#[test]
fn a_histogram_has_fixed_buckets_and_a_sum() {
    let empty = Histogram::default();
    assert_eq!(
        (empty.sum(), empty.fixed_buckets().count(), empty.fixed_buckets().map(|(_, n)| n).sum::<u64>()),
        (Duration::ZERO, 64, 0)
    );
    let limits: Vec<_> = empty.fixed_buckets().map(|(limit, _)| limit).collect();
    assert!(limits.windows(2).all(|pair| pair[0] < pair[1]));
}

#[tokio::test]
async fn the_sum_of_a_histogram_is_the_time_that_items_took() {
    let pool = Pool::new(1).unwrap();
    for _ in 0..3 {
        within(pool.apply(|| std::thread::sleep(Duration::from_millis(20)), ())).await.unwrap();
    }
    let runs = pool.stats().runs;
    assert_eq!(runs.fixed_buckets().map(|(_, count)| count).sum::<u64>(), 3);
    assert!(runs.sum() >= Duration::from_millis(60), "{:?}", runs.sum());
}

#[tokio::test]
async fn tasks_run_in_pools_with_all_options_of_a_call() {
    let pool = Pool::new(1).unwrap();
    let task = |n: u64| Task::of(|n: u64| n * n, (n,));
    assert_eq!(within(pool.run(task(5))).await.unwrap(), 25);
    let calls = Value::new(0_u32).unwrap();
    assert_eq!(within(pool.run(Task::of(dies, (calls, 1))).retries(1)).await.unwrap(), 1);
    // From another process, by way of a queue.
    let tasks = Queue::unbounded().unwrap();
    let put = async |tasks: Queue<Task<u64>>| {
        for n in 0..10 {
            tasks.put(Task::of(|n: u64| n + 1, (n,))).await.unwrap();
        }
        tasks.close();
    };
    within(mp::Process::spawn(put, (tasks.clone(),)).unwrap()).await.unwrap();
    let mut sum = 0;
    while let Ok(task) = within(tasks.get()).await {
        sum += within(pool.run(task)).await.unwrap();
    }
    assert_eq!(sum, 55);
    let error = within(pool.run(Task::of(|| -> u8 { panic!("no") }, ()))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Panicked);
}

mod state {
    use super::*;

    /// Not a serde value; tells when it goes.
    struct Tally {
        count: u32,
        gone: Queue<u32>,
    }

    impl Drop for Tally {
        fn drop(&mut self) {
            let _ = self.gone.try_put(self.count);
        }
    }

    fn open(start: u32, gone: Queue<u32>) -> Tally {
        Tally { count: start, gone }
    }

    fn add(tally: &mut Tally, n: u32) -> u32 {
        tally.count += n;
        tally.count
    }

    #[tokio::test]
    async fn tasks_get_the_state_of_their_worker_and_it_is_dropped_in_order() {
        let gone = Queue::unbounded().unwrap();
        let pool = Pool::builder().workers(1).state(open, (100, gone.clone())).build().unwrap();
        assert_eq!(within(pool.with_state().apply(add, (1,))).await.unwrap(), 101);
        assert_eq!(within(pool.with_state().map(add, [1, 1, 1])).await.unwrap(), [102, 103, 104]);
        assert_eq!(within(pool.with_state().apply_async(|tally: &mut Tally| tally.count, ())).await.unwrap(), 104);
        // A panic leaves the state to the next.
        let fails = |tally: &mut Tally| {
            tally.count += 1;
            assert!(tally.count == 0, "no");
        };
        assert_eq!(within(pool.with_state().apply(fails, ())).await.unwrap_err().kind(), ErrorKind::Panicked);
        assert_eq!(within(pool.with_state().apply(add, (0,))).await.unwrap(), 105);
        assert_eq!(within(pool.apply(|n: u32| n, (7,))).await.unwrap(), 7);
        pool.close();
        within(pool.join()).await.unwrap();
        assert_eq!(gone.try_get().unwrap(), 105);
    }

    #[tokio::test]
    async fn each_worker_has_a_state_of_its_own_and_a_new_worker_a_new_one() {
        let gone = Queue::unbounded().unwrap();
        let pool = Pool::builder().workers(1).state(open, (0, gone.clone())).build().unwrap();
        assert_eq!(within(pool.with_state().apply(add, (5,))).await.unwrap(), 5);
        let dies = |_: &mut Tally| -> u32 { std::process::abort() };
        within(pool.with_state().apply(dies, ())).await.unwrap_err();
        assert_eq!(within(pool.with_state().apply(add, (1,))).await.unwrap(), 1);
        assert!(gone.is_empty(), "who is killed drops nothing");
    }

    #[tokio::test]
    async fn a_state_that_cannot_be_made_is_reported_as_a_failing_initializer() {
        let fails = || -> Vec<u8> { panic!("no state") };
        let pool = Pool::builder().workers(1).state(fails, ()).build().unwrap();
        let error = within(pool.with_state().apply(|bytes: &mut Vec<u8>| bytes.len(), ())).await.unwrap_err();
        assert!(error.to_string().contains("initializer") && error.to_string().contains("no state"), "{error}");
        assert!(pool.broken().is_some());
        let both = Pool::builder().workers(1).initializer(|| (), ()).state(|| 1_u8, ()).build();
        assert!(both.map(|_| ()).unwrap_err().to_string().contains("initializer"));
    }
}
