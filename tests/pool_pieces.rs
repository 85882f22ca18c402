//! What services add to a pool: which failures are tried again, refusals, state of workers, tasks as values, counters.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::pool::{all_serve, is_idle};
use common::{Random, assert_no_growth, cancelled, eventually, holdings, in_child, rounds, within};
use futures::StreamExt;
use multiprocess::{self as mp, ErrorKind, Event, Histogram, Pool, Queue, Retry, Task, Value};
use std::time::Duration;

mp::test_support!();
common::quiet::quiet_stderr!();

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
    let call = pool.apply(overruns, (calls(),)).timeout(20 * SHORT).retries(5).retry_if(Retry::TIMED_OUT);
    assert_eq!(within(call).await.unwrap(), 1);
    // All, which is what `retries` alone means.
    for all in [Some(Retry::DIED | Retry::TIMED_OUT | Retry::MEMORY_LIMIT), None] {
        let call = pool.apply(dies, (calls(), 1)).retries(1);
        let call = all.into_iter().fold(call, |call, all| call.retry_if(all));
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

/// Waits for `gate`; returns how often it was called before.
fn counts(calls: Value<u32>, gate: Event) -> u32 {
    gate.blocking_wait().unwrap();
    calls.fetch_add(1)
}

#[tokio::test]
async fn attempts_by_a_predicate_do_not_wait_for_room_behind_calls_that_came_later() {
    let pool = Pool::builder().workers(1).max_waiting(1).build().unwrap();
    let (first, then) = (Event::new().unwrap(), Event::new().unwrap());
    let one = (Value::new(0_u32).unwrap(), first.clone());
    let is_zero = |result: &mp::Result<u32>| matches!(result, Ok(0));
    let call = pool.apply(counts, one).retries(1).retry_if(is_zero);
    let other = || pool.apply(counts, (Value::new(5_u32).unwrap(), then.clone()));
    let all = async { tokio::join!(call, other(), other()) };
    let watch = async {
        // One runs, one waits, and one waits for room; then the second runs, and the third and the attempt wait.
        eventually("two handed in", || pool.stats().queued == 1).await;
        first.set();
        eventually("the attempt waits", || pool.stats().queued == 2).await;
        then.set();
    };
    let ((call, second, third), ()) = within(async { tokio::join!(all, watch) }).await;
    assert_eq!((call.unwrap(), second.unwrap(), third.unwrap()), (1, 5, 5));
}

#[tokio::test]
async fn item_that_exceeds_the_memory_limit_is_not_retried_as_a_death() {
    let pool = Pool::builder().workers(1).memory_limit(1 << 30).env("RUST_BACKTRACE", "0").build().unwrap();
    let takes = |calls: Value<u32>, bytes: usize| match calls.fetch_add(1) {
        0 => vec![1_u8; bytes].len() as u32,
        call => call,
    };
    let calls = || Value::new(0_u32).unwrap();
    for (which, result) in [
        (Retry::DIED | Retry::TIMED_OUT, Err(ErrorKind::MemoryLimit)),
        (Retry::MEMORY_LIMIT, Ok(1)),
        (Retry::DIED | Retry::MEMORY_LIMIT, Ok(1)),
    ] {
        let call = pool.apply(takes, (calls(), 4 << 30)).retries(1).retry_if(which);
        assert_eq!(within(call).await.map_err(|error| error.kind()), result, "{which:?}");
    }
    assert_eq!(within(pool.apply(takes, (calls(), 4 << 30)).retries(1)).await.unwrap(), 1);
}

#[tokio::test]
async fn a_predicate_alone_decides_about_deaths_and_overruns_too() {
    let pool = Pool::new(1).unwrap();
    let calls = || Value::new(0_u32).unwrap();
    let died = |result: &mp::Result<u32>| result.as_ref().is_err_and(|error| error.kind() == ErrorKind::ProcessDied);
    assert_eq!(within(pool.apply(dies, (calls(), 2)).retries(2).retry_if(died)).await.unwrap(), 2);
    let call = pool.apply(overruns, (calls(),)).timeout(SHORT).retries(5).retry_if(died);
    assert_eq!(within(call).await.unwrap_err().kind(), ErrorKind::Timeout);
    // A death that the predicate refuses, and one that it permits: as often as `retries` says, and no more.
    let all = calls();
    let call = pool.apply(dies, (all.clone(), 9)).retries(5).retry_if(|_: &mp::Result<u32>| false);
    assert_eq!(within(call).await.unwrap_err().kind(), ErrorKind::ProcessDied);
    assert_eq!(all.get(), 1);
    let call = pool.apply(dies, (all.clone(), 9)).retries(3).retry_if(died);
    assert_eq!(within(call).await.unwrap_err().kind(), ErrorKind::ProcessDied);
    assert_eq!(all.get(), 5);
    // The last one counts.
    let call = pool.apply(dies, (calls(), 1)).retries(1).retry_if(|_: &mp::Result<u32>| false).retry_if(Retry::DIED);
    assert_eq!(within(call).await.unwrap(), 1);
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
    is_idle(&pool).await;
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

/// How long a call of a loaded pool takes.
const SERVICE: Duration = Duration::from_millis(6);
const CLIENTS: usize = 6;

fn serve() {
    std::thread::sleep(SERVICE);
}

/// Two workers, which are up, and room for four: six clients keep it full.
async fn shedding() -> Pool {
    let pool = Pool::builder().workers(2).max_waiting(CLIENTS - 2).build().unwrap();
    all_serve(&pool, 2).await;
    pool
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// One call, in either way that a service has: how long it took if it was accepted.
async fn ask(pool: &Pool, tries: bool) -> mp::Result<Duration> {
    let start = std::time::Instant::now();
    match tries {
        true => pool.try_apply(serve, ())?.await?,
        false => pool.apply(serve, ()).reject_when_full().await?,
    }
    Ok(start.elapsed())
}

/// So many clients that each ask again once they are answered: the median time of accepted calls, and how many were refused.
async fn closed_loop(pool: &Pool, clients: usize, tries: bool) -> (Duration, u64) {
    let client = async || {
        let (mut accepted, mut refused) = (Vec::new(), 0);
        while accepted.len() < 20 {
            match ask(pool, tries).await {
                Ok(took) => accepted.push(took),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Full);
                    refused += 1;
                    tokio::time::sleep(SERVICE).await;
                }
            }
        }
        (accepted, refused)
    };
    let clients = futures::future::join_all((0..clients).map(|_| client())).await;
    let refused = clients.iter().map(|(_, refused)| refused).sum();
    (median(clients.into_iter().flat_map(|(accepted, _)| accepted).collect()), refused)
}

/// Calls that come at a rate, whatever becomes of those before.
async fn open_loop(
    pool: &Pool,
    each: Duration,
    calls: u32,
    ask: impl AsyncFn() -> mp::Result<Duration>,
) -> (Vec<Duration>, u64) {
    let start = tokio::time::Instant::now();
    let call = async |n: u32| {
        tokio::time::sleep_until(start + each * n).await;
        ask().await
    };
    let results = futures::future::join_all((0..calls).map(call)).await;
    let refused =
        results.iter().flat_map(|result| result.as_ref().err()).filter(|error| error.kind() == ErrorKind::Full);
    let refused = refused.count() as u64;
    let accepted: Vec<_> = results.into_iter().filter_map(Result::ok).collect();
    assert_eq!(accepted.len() as u64 + refused, u64::from(calls));
    assert!(pool.stats().totals.rejected >= refused);
    (accepted, refused)
}

#[tokio::test]
async fn at_three_times_the_load_accepted_calls_of_a_closed_loop_keep_their_latency() {
    for tries in [false, true] {
        let pool = shedding().await;
        let mut rejected = 0;
        let round = async || {
            let (full, refused) = within(closed_loop(&pool, CLIENTS, tries)).await;
            assert_eq!(refused, 0, "as many clients as it has room for");
            is_idle(&pool).await;
            let (loaded, refused) = within(closed_loop(&pool, 3 * CLIENTS, tries)).await;
            println!("full: median {full:?}; three times as many clients: median {loaded:?}, {refused} refused");
            is_idle(&pool).await;
            rejected += refused;
            assert!(refused > 0 && pool.stats().totals.rejected == rejected, "{refused} refused");
            Ok((full, loaded))
        };
        rounds(round, |(full, loaded)| *loaded < 2 * *full + 3 * SERVICE).await.unwrap();
    }
}

#[tokio::test]
async fn at_three_times_the_load_accepted_calls_of_an_open_loop_keep_their_latency() {
    // Two workers serve one call in each half of the service time.
    let (each, calls) = (SERVICE / 6, 400);
    for tries in [false, true] {
        let pool = shedding().await;
        let round = async || {
            let (full, _) = within(closed_loop(&pool, CLIENTS, tries)).await;
            let (accepted, refused) = within(open_loop(&pool, each, calls, async || ask(&pool, tries).await)).await;
            let (count, loaded) = (accepted.len(), median(accepted));
            println!("full: median {full:?}; open loop: {count} accepted, median {loaded:?}, {refused} refused");
            assert!(refused > 0, "three times as many as can be served");
            is_idle(&pool).await;
            Ok((full, loaded))
        };
        rounds(round, |(full, loaded)| *loaded < 2 * *full + 3 * SERVICE).await.unwrap();
    }
    // Without refusals the last calls wait for all of the surplus.
    let pool = Pool::new(2).unwrap();
    within(pool.map(|_: u8| serve(), 0..4)).await.unwrap();
    let waits = async || {
        let start = std::time::Instant::now();
        pool.apply(serve, ()).await.map(|()| start.elapsed())
    };
    let (accepted, _) = within(open_loop(&pool, each, calls, waits)).await;
    let longest = accepted.iter().max().unwrap();
    assert!(*longest > 30 * SERVICE, "{longest:?}");
}

#[tokio::test]
async fn a_dropped_stream_with_a_predicate_takes_no_more_items() {
    let pool = Pool::new(2).unwrap();
    let (taken, always) = (std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0)), |_: &mp::Result<u32>| true);
    let counted = taken.clone();
    let source = (0..u32::MAX).inspect(move |_| {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    });
    let mut results = pool.imap(|n: u32| n, source).retries(2).retry_if(always);
    for n in 0..10 {
        assert_eq!(within(results.next()).await.unwrap().unwrap(), n);
    }
    // Items are taken as results are: four for each worker ahead.
    assert!(taken.load(std::sync::atomic::Ordering::Relaxed) <= 10 + 8, "{taken:?}");
    drop(results);
    eventually("nothing runs", || pool.stats().running == 0 && pool.stats().queued == 0).await;
    within(pool.map(|n: u32| n, 0..10)).await.unwrap();
}

/// Nothing of earlier calls runs or waits.
async fn is_quiet(pool: &Pool) {
    eventually("nothing runs or waits", || {
        let stats = pool.stats();
        stats.running == 0 && stats.queued == 0
    })
    .await;
}

/// Long enough that no worker is killed for a dropped call.
const GRACE: Duration = Duration::from_secs(600);

static MADE: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

/// In the worker: counts the attempts that were made there, and returns the number of this one of its item.
fn made() -> u32 {
    MADE.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    mp::current_task().unwrap().attempt()
}

fn all_made() -> u64 {
    MADE.load(std::sync::atomic::Ordering::Relaxed)
}

/// Calls of one worker with room for two, each made three times by a predicate: in every way that such a call can be made.
async fn drop_calls(pool: &Pool, random: &mut Random, count: u32) -> u32 {
    let again = |result: &mp::Result<u32>| result.as_ref().is_ok_and(|attempt| *attempt < 2);
    let rest = Duration::from_micros(50);
    let mut dropped = 0;
    let mut accepted = Vec::new();
    while dropped < count {
        let call = pool.apply(made, ()).retries(5).grace(GRACE);
        let is_refused = |error: &mp::Error| error.kind() == ErrorKind::Full;
        let done = match random.below(5) {
            0 => cancelled(random, call.retry_if(again)).await.map(|result| result.unwrap() == 2),
            1 => cancelled(random, call.back_off(rest).retry_if(again)).await.map(|result| result.unwrap() == 2),
            2 => cancelled(random, call.retry_if(Retry::DIED)).await.map(|result| result.unwrap() == 0),
            3 => cancelled(random, call.reject_when_full().retry_if(again))
                .await
                .map(|result| result.map_or_else(|error| is_refused(&error), |attempt| attempt == 2)),
            _ => match pool.try_apply(made, ()) {
                // Kept for a while, so that others find no room.
                Ok(call) if random.below(2) == 0 => {
                    accepted.insert(0, call);
                    accepted.truncate(2);
                    Some(true)
                }
                Ok(call) => cancelled(random, call).await.map(|result| result.unwrap() == 0),
                Err(error) => Some(is_refused(&error)),
            },
        };
        match done {
            Some(is_right) => assert!(is_right),
            None => dropped += 1,
        }
    }
    dropped
}

#[tokio::test]
async fn ten_thousand_dropped_calls_make_no_further_attempt_and_leave_all_room() {
    let drops = async || {
        let pool = Pool::builder().workers(1).max_waiting(2).grace(GRACE).build().unwrap();
        let mut random = Random::new(31);
        drop_calls(&pool, &mut random, 500).await;
        is_quiet(&pool).await;
        let before = holdings();
        drop_calls(&pool, &mut random, 10_000).await;
        is_quiet(&pool).await;
        assert_no_growth(before, holdings());
        let made_by_now = within(pool.apply(all_made, ())).await.unwrap();
        tokio::time::sleep(SHORT).await;
        assert_eq!(within(pool.apply(all_made, ())).await.unwrap(), made_by_now, "no attempt is made any more");
        // The room for two is there, and no more.
        let (begun, go_on) = (Event::new().unwrap(), Event::new().unwrap());
        let wait = async |begun: Event, go_on: Event| {
            begun.set();
            go_on.wait().await.unwrap();
        };
        let running = pool.apply_async(wait, (begun.clone(), go_on.clone()));
        within(begun.wait()).await.unwrap();
        let waiting: Vec<_> = (0..2).map(|_| pool.try_apply(made, ()).unwrap()).collect();
        assert_eq!(pool.try_apply(made, ()).map(drop).unwrap_err().kind(), ErrorKind::Full);
        go_on.set();
        within(running).await.unwrap();
        for call in waiting {
            within(call).await.unwrap();
        }
        assert_eq!(pool.stats().totals.restarted, 0);
    };
    in_child(drops, ()).await;
}

/// Each step of an item at its worker: each worker dies at it, not with its first item.
#[cfg(debug_assertions)]
#[tokio::test]
async fn worker_killed_at_any_step_costs_an_attempt_only_if_the_item_had_begun() {
    let died = |result: &mp::Result<u32>| result.as_ref().is_err_and(|error| error.kind() == ErrorKind::ProcessDied);
    for (point, costs) in
        [("lane.ordered:3", false), ("lane.started:3", true), ("lane.written:3", true), ("lane.published:3", false)]
    {
        let attempt = || mp::current_task().unwrap().attempt();
        for by_kind in [true, false] {
            let pool = Pool::builder().workers(1).max_waiting(2).env("MULTIPROCESS_KILL_AT", point).build().unwrap();
            let mut attempts = Vec::new();
            for _ in 0..6 {
                let call = pool.apply(attempt, ()).retries(1);
                let call = if by_kind { call.retry_if(Retry::DIED) } else { call.retry_if(died) };
                attempts.push(within(call).await.unwrap());
            }
            assert!(attempts.iter().all(|attempt| *attempt <= 1), "{point}: {attempts:?}");
            assert_eq!(attempts.contains(&1), costs, "{point}, by kind {by_kind}: {attempts:?}");
            eventually("a worker has died", || pool.stats().totals.restarted > 0).await;
            // Without an attempt left an item is lost if it had begun.
            let (mut lost, mut done) = (0, 0);
            for _ in 0..6 {
                match within(pool.apply(attempt, ()).reject_when_full()).await {
                    Ok(_) => done += 1,
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::ProcessDied, "{point}");
                        lost += 1;
                    }
                }
            }
            assert!(lost + done == 6 && (lost > 0) == costs, "{point}: {lost} lost");
            is_quiet(&pool).await;
            let totals = pool.stats().totals;
            assert_eq!(totals.rejected, 0, "{point}: the dead leave their room");
        }
    }
}

/// A worker dies while items wait and others wait for room: all of them get it.
#[cfg(debug_assertions)]
#[tokio::test]
async fn the_death_of_a_worker_at_any_step_takes_no_room_from_those_that_wait() {
    for point in ["lane.ordered:2", "lane.started:2", "lane.written:2", "lane.published:2", "lane.read:2"] {
        let pool = Pool::builder().workers(1).max_waiting(1).env("MULTIPROCESS_KILL_AT", point).build().unwrap();
        let call = || pool.apply(|| std::thread::sleep(Duration::from_millis(1)), ()).retries(9).retry_if(Retry::DIED);
        let results = within(futures::future::join_all((0..8).map(|_| call()))).await;
        assert!(results.iter().all(Result::is_ok), "{point}: {results:?}");
        is_quiet(&pool).await;
        within(call().reject_when_full()).await.unwrap();
    }
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
    async fn all_calls_lend_the_state_of_the_worker() {
        let gone = Queue::unbounded().unwrap();
        let pool = Pool::builder().workers(1).max_waiting(1).state(open, (0, gone.clone())).build().unwrap();
        let add_both = |tally: &mut Tally, n: u32, m: u32| add(tally, n + m);
        assert_eq!(within(pool.with_state().starmap(add_both, [(1, 0), (1, 1), (1, 2)])).await.unwrap(), [1, 3, 6]);
        assert_eq!(within(pool.with_state().map_async(add, [1, 1, 1])).await.unwrap(), [7, 8, 9]);
        for results in [pool.with_state().imap(add, [1, 1, 1]), pool.with_state().imap_unordered(add, [1, 1, 1])] {
            assert_eq!(within(results.count()).await, 3);
        }
        // One at work, one that waits, and no room for another one.
        let add_later = |tally: &mut Tally, n: u32, gate: Event| {
            gate.blocking_wait().unwrap();
            add(tally, n)
        };
        let gate = Event::new().unwrap();
        let try_apply = |n: u32| pool.with_state().try_apply(add_later, (n, gate.clone()));
        let first = try_apply(10).unwrap();
        eventually("it is at work", || pool.stats().running == 1 && pool.stats().queued == 0).await;
        let second = try_apply(100).unwrap();
        assert_eq!(try_apply(1000).map(drop).unwrap_err().kind(), ErrorKind::Full);
        gate.set();
        assert_eq!((within(first).await.unwrap(), within(second).await.unwrap()), (25, 125));
        pool.close();
        within(pool.join()).await.unwrap();
        assert_eq!(gone.try_get().unwrap(), 125);
    }

    #[tokio::test]
    async fn ten_thousand_dropped_calls_leave_the_state_whole() {
        /// Both are the same, but while a task is at it.
        struct Pair(u64, u64);
        fn bump(pair: &mut Pair) -> u64 {
            pair.0 += 1;
            std::hint::black_box(&mut *pair);
            pair.1 += 1;
            assert_eq!(pair.0, pair.1, "one task at a time");
            pair.0
        }
        fn bump_for(pair: &mut Pair, _: u8) -> u64 {
            bump(pair)
        }
        let drops = async || {
            let pool = Pool::builder().workers(1).grace(GRACE).state(|| Pair(0, 0), ()).build().unwrap();
            let mut random = Random::new(32);
            let mut last = 0;
            let mut run = async |count: u32| {
                let mut dropped = 0;
                while dropped < count {
                    let state = pool.with_state();
                    let done = match random.below(3) {
                        0 => cancelled(&mut random, state.apply(bump, ())).await,
                        1 => cancelled(&mut random, state.apply_async(bump, ())).await,
                        _ => {
                            let mut results = state.imap(bump_for, 0..5);
                            cancelled(&mut random, results.next()).await.flatten()
                        }
                    };
                    match done {
                        Some(count) => {
                            let count = count.unwrap();
                            assert!(count > last, "a later task finds what an earlier one has left");
                            last = count;
                        }
                        None => dropped += 1,
                    }
                }
            };
            run(500).await;
            is_quiet(&pool).await;
            let before = holdings();
            run(10_000).await;
            is_quiet(&pool).await;
            assert_no_growth(before, holdings());
            let (one, other) = within(pool.with_state().apply(|pair: &mut Pair| (pair.0, pair.1), ())).await.unwrap();
            assert!(one == other && one >= last, "{one} {other}");
            assert_eq!(pool.stats().totals.restarted, 0);
        };
        in_child(drops, ()).await;
    }

    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_while_the_state_is_made_the_pool_is_broken() {
        let pool = Pool::builder().workers(1).env("MULTIPROCESS_KILL_AT", "state.made");
        let pool = pool.state(|| 1_u8, ()).build().unwrap();
        let error = within(pool.with_state().apply(|n: &mut u8| *n, ())).await.unwrap_err();
        assert!(error.to_string().contains("initializer"), "{error}");
        assert!(pool.broken().is_some());
    }

    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_at_any_step_of_a_task_with_state_the_next_has_a_new_one() {
        for point in ["state.lent:3", "state.returned:3", "lane.written:4"] {
            let gone = Queue::unbounded().unwrap();
            let pool = Pool::builder().workers(1).env("MULTIPROCESS_KILL_AT", point);
            let pool = pool.state(open, (100, gone.clone())).build().unwrap();
            let call = || pool.with_state().apply(add, (1,));
            assert_eq!(within(call()).await.unwrap(), 101, "{point}");
            assert_eq!(within(call()).await.unwrap(), 102, "{point}");
            assert_eq!(within(call()).await.unwrap_err().kind(), ErrorKind::ProcessDied, "{point}");
            for n in [101, 102] {
                assert_eq!(within(call()).await.unwrap(), n, "{point}");
            }
            // Tried again, it has the new state as well.
            assert_eq!(within(call().retries(1).retry_if(Retry::DIED)).await.unwrap(), 101, "{point}");
            assert!(gone.is_empty(), "{point}: a killed worker drops nothing");
        }
    }

    #[cfg(debug_assertions)]
    #[tokio::test]
    async fn killed_while_it_drops_the_state_the_worker_has_ended() {
        let gone = Queue::unbounded().unwrap();
        let pool = Pool::builder().workers(2).env("MULTIPROCESS_KILL_AT", "state.dropping");
        let pool = pool.state(open, (7, gone.clone())).build().unwrap();
        assert_eq!(within(pool.with_state().apply(add, (1,))).await.unwrap(), 8);
        pool.close();
        within(pool.join()).await.unwrap();
        assert!(gone.is_empty());
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
    async fn worker_whose_state_function_returns_an_error_fails_as_by_its_initializer() {
        let make = |n: u32| if n == 0 { Err(mp::Error::other("no such thing")) } else { Ok(vec![n]) };
        let len = |numbers: &mut Vec<u32>| numbers.len();
        let pool = Pool::builder().workers(1).try_state(make, (3,)).build().unwrap();
        assert_eq!(within(pool.with_state().apply(len, ())).await.unwrap(), 1);
        let pool = Pool::builder().workers(1).try_state(make, (0,)).build().unwrap();
        let error = within(pool.with_state().apply(len, ())).await.unwrap_err();
        assert!(error.to_string().contains("initializer") && error.to_string().contains("no such thing"), "{error}");
        assert!(pool.broken().is_some());
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
