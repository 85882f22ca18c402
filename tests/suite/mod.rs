//! What a pool promises wherever its items run: on this machine, within this process, or at hosts of a cluster.
//!
//! Each test is a function of what makes its pools ([`Pools`]). [`everywhere`] makes tests for any kind of pool, and
//! [`with_processes`] those for pools whose items have processes of their own, which can be killed.
//!
//! Tests of pools that are not here, and why (`pool` checks that each is here, asks for what only worker processes have, or is named as an exception):
//!
//! | tests | reason |
//! |---|---|
//! | `pool_rules`, `pool_behaviours`: killed, stopped, idle, recycled workers, resize, checkout, initializer, finalizer, limits | they ask for worker processes of this pool; a cluster's belong to its hosts (`cluster_pool`, `cluster_loss`) |
//! | handles, descriptors or shared memory in arguments or results; state of workers | they cannot cross hosts (`cluster_pool`: each kind is refused) |
//! | how far a source is pulled ahead | another bound, by the slots of hosts (`cluster_pool`) |
//! | upper bounds on time | those of a cluster are its server's; `benches/peers` measures them |
//! | events of tasks | a cluster pool refuses them (`cluster_pool`) |
//! | a pool whose runtime has ended, or in a static | they are about the process that makes the pool |
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use crate::common::pool::{Gate, MS, die, nap, square, stuck};
use crate::common::{eventually, falls_asleep, within};
use futures::future::{join_all, select_all};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt, TryStreamExt};
use multiprocess::{self as mp, ErrorKind, Pool, PoolBuilder, PoolStreamExt, Retry};
use std::future::IntoFuture;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Makes the pools of a test.
pub trait Pools {
    /// A pool that runs so many items at a time.
    fn with(&self, places: usize, options: impl FnOnce(PoolBuilder) -> PoolBuilder) -> mp::Result<Pool>;

    fn pool(&self, places: usize) -> mp::Result<Pool> {
        self.with(places, |builder| builder)
    }
}

/// Makes one test of each name. `$pools` is `None` where there can be no such pools.
macro_rules! each {
    ($pools:expr; $($name:ident)*) => {$(
        #[tokio::test]
        async fn $name() -> multiprocess::Result<()> {
            let _deadline = crate::common::Deadline::after(std::time::Duration::from_secs(200));
            let Some(pools) = $pools else { return Ok(()) };
            crate::suite::$name(&pools).await
        }
    )*};
}

macro_rules! everywhere {
    ($pools:expr) => {
        crate::suite::each! { $pools;
            the_whole_program_of_the_documentation
            every_kind_of_function_and_call
            a_panic_touches_its_own_item_only
            a_source_that_panics_is_one_error_after_the_good_ones
            pool_07_exec_10_p22_any_chunk_size_gives_every_result
            pool_23_large_errors_and_a_close_in_between_delay_no_caller
            dead_16_waitf_08_thousands_of_calls_at_once_are_each_answered
            rule_13_a_future_dropped_at_any_poll_leaks_no_slot
            calls_made_before_close_complete
            large_values_travel_among_small_ones_in_order
            large_results_of_a_caller_that_is_not_polled_delay_no_other_caller
            many_tasks_share_one_pool
            progress_of_a_call_ends_with_it_however_long_its_items_might_have_waited
            stream_mapped_in_a_pool_reports_its_progress
            a_predicate_decides_by_the_result_and_no_longer_than_the_retries_go
            a_predicate_decides_for_each_item_of_maps_and_streams
            the_sum_of_a_histogram_is_the_time_that_items_took
        }
    };
}

macro_rules! with_processes {
    ($pools:expr) => {
        crate::suite::each! { $pools;
            a_panic_and_a_death_touch_their_own_item_only
            an_overrun_is_killed_and_a_retry_runs_again
            cancelled_calls_free_their_worker
            close_completes_and_terminate_resolves_everything
            pool_32_pool_33_fut_07_caller_that_stops_waiting_loses_no_result
            dead_05_a_task_that_kills_every_worker_breaks_no_pool
            dead_13_dead_14_shut_04_after_a_close_everything_is_still_answered
            fut_05_fut_06_fut_08_a_cancel_is_final_unless_the_result_was_there
            waitf_02_waitf_04_waitf_06_asc_01_results_work_with_the_combinators_of_futures
            new_02_terminating_again_and_with_dead_workers_is_fine
            rule_3_an_item_overruns_alone_also_in_the_middle_of_a_chunk
            rule_6_the_clock_starts_with_the_item_and_waiting_has_its_own
            a_retry_backs_off_and_knows_which_attempt_it_is
            retries_are_for_the_failures_that_were_named
            a_cancelled_item_never_starts
            cancelled_items_are_dropped_while_all_workers_are_busy
            item_that_stops_in_time_when_it_is_cancelled_keeps_its_result
            shutdown_returns_the_number_of_lost_items
            perr_02_rule_12_value_that_cannot_be_encoded_fails_its_item_only
            a_time_that_never_comes_is_no_mistake
            try_apply_of_a_pool_with_as_many_waiting_as_may_is_full_at_once_and_apply_waits_for_room
            a_call_that_waits_for_room_and_is_dropped_leaves_its_place_to_the_next
            a_map_hands_in_no_more_items_than_may_wait_and_all_get_done
            totals_count_each_item_once_by_how_it_ended
            a_call_whose_source_panics_when_it_is_dropped_is_cancelled_all_the_same
            a_stream_that_is_not_polled_holds_no_place_in_the_line_for_room
        }
    };
}
pub(crate) use {each, everywhere, with_processes};

async fn later(n: i64) -> i64 {
    tokio::time::sleep(MS).await;
    n + 1
}

/// Dies at 3, panics at 5.
fn perilous(n: i64) -> i64 {
    match n {
        3 => std::process::abort(),
        5 => panic!("five"),
        n => n,
    }
}

fn squares(count: i64) -> Vec<i64> {
    (0..count).map(square).collect()
}

fn kinds<T: Copy>(results: &[mp::Result<T>]) -> Vec<Result<T, ErrorKind>> {
    results.iter().map(|result| result.as_ref().copied().map_err(|error| error.kind())).collect()
}

/// A gate of a test that runs for several kinds of pools, perhaps at the same time.
fn gate(name: &str) -> Gate {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    Gate::new(&format!("suite-{name}-{}", COUNT.fetch_add(1, Relaxed)))
}

/// Opens the first gate and waits for the other one.
fn meet(begun: Gate, go: Gate) -> u32 {
    begun.open();
    go.pass();
    7
}

/// A call that has begun, and ends when its gate opens.
async fn begun(pool: &Pool, name: &str) -> (mp::AsyncResult<u32>, Gate) {
    let (begun, go) = (gate(name), gate(&format!("{name}-go")));
    let call = pool.apply_async(meet, (begun.clone(), go.clone()));
    eventually("it has begun", || begun.is_open()).await;
    begun.remove();
    (call, go)
}

// Everywhere.

pub async fn the_whole_program_of_the_documentation(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(4)?;
    let squares: Vec<i64> = pool.map(square, 1..=5).await?;
    let total: i64 = pool.imap_unordered(square, 0..1_000).try_fold(0, async |sum, x| Ok(sum + x)).await?;
    let some: Vec<i64> =
        futures::stream::iter(0..10).map(|i| pool.apply_async(square, (i,))).buffer_unordered(4).try_collect().await?;
    assert_eq!((squares, total, some.len()), (vec![1, 4, 9, 16, 25], 332_833_500, 10));
    Ok(())
}

pub async fn every_kind_of_function_and_call(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    assert_eq!(pool.apply(square, (7,)).await?, 49);
    assert_eq!(pool.map(later, 0..20).await?, (1..=20).collect::<Vec<_>>());
    assert_eq!(pool.starmap(|a: i32, b: i32| a - b, vec![(3, 1), (5, 9)]).await?, [2, -4]);
    assert_eq!(pool.map_async(square, vec![1, 2]).await?, [1, 4]);
    assert_eq!(pool.starmap_async(i32::pow, vec![(2, 3), (3, 2)]).await?, [8, 9]);
    let ordered: Vec<i64> = pool.imap(square, 0..100).chunksize(7).try_collect().await?;
    assert_eq!(ordered, squares(100));
    let streamed: Vec<i64> = pool.imap_stream(square, futures::stream::iter(0..10)).try_collect().await?;
    assert_eq!(streamed, squares(10));
    assert_eq!(pool.map(square, std::iter::empty()).await?, Vec::<i64>::new());
    assert_eq!(within(pool.run(mp::Task::of(square, (5,)))).await?, 25);
    Ok(())
}

pub async fn a_panic_touches_its_own_item_only(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    let fails = |n: i64| {
        assert_ne!(n, 5, "five");
        n
    };
    for chunk in [1, 10] {
        let results: Vec<_> = within(pool.imap(fails, 0..40).chunksize(chunk).collect()).await;
        let expected = (0..40).map(|n| if n == 5 { Err(ErrorKind::Panicked) } else { Ok(n) });
        assert_eq!(kinds(&results), expected.collect::<Vec<_>>());
        let message = results[5].as_ref().unwrap_err().panic().expect("a panic").message();
        assert!(message.contains("five"), "{message}");
    }
    Ok(())
}

pub async fn a_source_that_panics_is_one_error_after_the_good_ones(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    let source = || (0i64..).inspect(|n| assert!(*n < 3, "no fourth"));
    let results: Vec<_> = within(pool.imap(square, source()).collect()).await;
    assert_eq!(kinds(&results), [Ok(0), Ok(1), Ok(4), Err(ErrorKind::Panicked)]);
    assert_eq!(within(pool.map(square, source())).await.unwrap_err().kind(), ErrorKind::Panicked);
    Ok(())
}

pub async fn pool_07_exec_10_p22_any_chunk_size_gives_every_result(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    assert!(pool.map_async(square, Vec::new()).await?.is_empty());
    for chunk in [0, 1, 2, 6, 40, 50, usize::MAX] {
        assert_eq!(pool.map(square, 0..40).chunksize(chunk).await?, squares(40), "{chunk}");
        let fails = |n: i64| {
            assert_ne!(n % 7, 3, "this one");
            n
        };
        let results: Vec<_> = pool.imap(fails, 0..40).chunksize(chunk).collect().await;
        let good: Vec<_> =
            results.iter().enumerate().filter(|(_, result)| result.is_ok()).map(|(n, _)| n % 7).collect();
        assert!(results.len() == 40 && good.len() == 34 && good.iter().all(|n| *n != 3), "{chunk}: {good:?}");
    }
    Ok(())
}

pub async fn pool_23_large_errors_and_a_close_in_between_delay_no_caller(pools: &impl Pools) -> mp::Result<()> {
    const LEN: usize = 1_000_000;
    let pool = pools.pool(2)?;
    let fails = |n: usize| -> usize { std::panic::panic_any(n.to_string()[..1].repeat(LEN)) };
    let mut results = pool.imap(fails, 0..20).chunksize(1);
    let mapped = pool.map_async(fails, 0..20);
    // Each of them is of a megabyte, and all come: those that had not begun at the close, too.
    let is_whole = |result: Option<mp::Result<usize>>| {
        let error = result.expect("one for each item").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Panicked);
        assert_eq!(error.panic().expect("a panic").message().len(), LEN);
    };
    is_whole(within(results.next()).await);
    pool.close();
    for _ in 1..20 {
        is_whole(within(results.next()).await);
    }
    assert!(within(results.next()).await.is_none());
    within(pool.join()).await?;
    assert_eq!(mapped.await.unwrap_err().kind(), ErrorKind::Panicked);
    Ok(())
}

pub async fn dead_16_waitf_08_thousands_of_calls_at_once_are_each_answered(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    let calls: Vec<_> = (0..5_000).map(|n| pool.apply_async(square, (n,))).collect();
    let results = within(join_all(calls)).await.into_iter().collect::<mp::Result<Vec<_>>>()?;
    assert_eq!(results, squares(5_000));
    Ok(())
}

pub async fn rule_13_a_future_dropped_at_any_poll_leaks_no_slot(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    for polls in 0..40 {
        let mut call = pool.apply(square, (2,)).boxed();
        let mut stream = pool.imap_unordered(square, 0..1000).chunksize(3).boxed();
        for _ in 0..polls {
            if futures::poll!(&mut call).is_ready() {
                call = pool.apply(square, (2,)).boxed();
            }
            let _ = futures::poll!(stream.next());
        }
        drop((call, stream));
        assert_eq!(within(pool.map(square, 0..10)).await?, squares(10));
    }
    Ok(())
}

/// What was asked for before `close` completes, whatever form it has and whenever it is waited for.
pub async fn calls_made_before_close_complete(pools: &impl Pools) -> mp::Result<()> {
    let squares = squares(20);
    let pool = pools.pool(2)?;
    let single = pool.apply_async(square, (5,));
    let (map, starmap) = (pool.map_async(square, 0..20), pool.starmap_async(square, (0..20).map(|n| (n,))));
    let (imap, unordered) = (pool.imap(square, 0..20), pool.imap_unordered(square, 0..20));
    let stream = pool.imap_stream(square, futures::stream::iter(0..20));
    pool.close();
    assert_eq!(within(single).await?, 25);
    assert_eq!(within(map).await?, squares);
    assert_eq!(within(starmap).await?, squares);
    assert_eq!(within(imap.try_collect::<Vec<_>>()).await?, squares);
    assert_eq!(within(unordered.try_fold(0, async |sum, n| Ok(sum + n))).await?, squares.iter().sum::<i64>());
    assert_eq!(within(stream.try_collect::<Vec<_>>()).await?, squares);
    within(pool.join()).await?;
    // What comes after it does not, in any form.
    let closed = |error: mp::Error| assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    closed(pool.apply(square, (5,)).await.unwrap_err());
    closed(pool.apply_async(square, (5,)).await.unwrap_err());
    closed(pool.map(square, 0..20).await.unwrap_err());
    closed(pool.map_async(square, 0..20).await.unwrap_err());
    closed(pool.starmap_async(square, (0..20).map(|n| (n,))).await.unwrap_err());
    closed(pool.imap(square, 0..20).next().await.expect("an item").unwrap_err());
    // A stream that nobody wants any more holds up no end.
    let pool = pools.pool(1)?;
    let stream = pool.imap(square, 0..20);
    pool.close();
    let mut join = std::pin::pin!(pool.join());
    falls_asleep(join.as_mut()).await;
    drop(stream);
    within(join).await
}

pub async fn large_values_travel_among_small_ones_in_order(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    let size = |n: usize| if n.is_multiple_of(5) { 300_000 + n } else { n };
    let same = |bytes: Vec<u8>| bytes;
    let results = pool.imap(same, (0..60).map(move |n| vec![n as u8; size(n)]));
    let results: Vec<_> = within(results.try_collect()).await?;
    for (n, bytes) in results.iter().enumerate() {
        assert!(bytes.len() == size(n) && bytes.iter().all(|byte| *byte == n as u8), "{n}");
    }
    let big = within(pool.map(|n: usize| vec![7u8; n << 20], [1, 9, 3]).chunksize(3)).await?;
    assert_eq!(big.iter().map(Vec::len).collect::<Vec<_>>(), [1 << 20, 9 << 20, 3 << 20]);
    Ok(())
}

pub async fn large_results_of_a_caller_that_is_not_polled_delay_no_other_caller(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    let large: Vec<_> = (0..5).map(|n| pool.apply_async(|n: u8| vec![n; 3 << 20], (n,))).collect();
    assert_eq!(within(pool.apply(square, (3,))).await?, 9);
    eventually("all are there", || large.iter().all(|result| result.ready())).await;
    large[3].cancel();
    for (n, result) in large.into_iter().enumerate() {
        assert!(within(result).await? == vec![n as u8; 3 << 20], "what was there is not cancelled, and whole");
    }
    // Nobody comes for these at all.
    drop((0..5).map(|n| pool.apply_async(|n: u8| vec![n; 3 << 20], (n,))).collect::<Vec<_>>());
    assert_eq!(within(pool.apply(square, (4,))).await?, 16);
    Ok(())
}

pub async fn many_tasks_share_one_pool(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    let callers = (0..16).map(|n| {
        let pool = pool.clone();
        tokio::spawn(async move {
            for i in 0..50 {
                assert_eq!(pool.apply(square, (n * i,)).await?, square(n * i));
            }
            let sum: i64 = pool.imap_unordered(square, 0..300).try_fold(0, async |sum, x| Ok(sum + x)).await?;
            assert_eq!(sum, (0..300).map(square).sum::<i64>());
            Ok::<_, mp::Error>(())
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        within(caller).await.expect("no panic")?;
    }
    Ok(())
}

pub async fn progress_of_a_call_ends_with_it_however_long_its_items_might_have_waited(
    pools: &impl Pools,
) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    let mut map = pool.map(square, 0..100).queue_timeout(Duration::from_secs(3600));
    let mut progress = map.progress();
    within(map).await?;
    within(async { while progress.changed().await.is_ok() {} }).await;
    assert_eq!(progress.borrow().done, 100);
    Ok(())
}

pub async fn stream_mapped_in_a_pool_reports_its_progress(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    let mapped: Vec<i64> = futures::stream::iter(0..50).map_in_pool(&pool, square).try_collect().await?;
    assert_eq!(mapped, squares(50));
    let odd_fails = |n: u64| {
        assert!(n.is_multiple_of(2), "odd");
        n
    };
    let mut results = pool.imap_unordered(odd_fails, 0..10);
    let mut progress = results.progress();
    let results: Vec<_> = results.collect().await;
    let last = *progress.borrow_and_update();
    assert_eq!((results.len(), last.done, last.failed, last.total), (10, 10, 5, 10));
    assert!(last.rate > 0.0 && progress.changed().await.is_err(), "it is over");
    Ok(())
}

pub async fn a_predicate_decides_by_the_result_and_no_longer_than_the_retries_go(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    let attempt = || mp::current_task().expect("inside a task").attempt();
    let is_below_three = |result: &mp::Result<u32>| result.as_ref().is_ok_and(|n| *n < 3);
    let call = || pool.apply(attempt, ());
    assert_eq!(within(call().retries(5).retry_if(is_below_three)).await?, 3);
    assert_eq!(within(call().retries(2).retry_if(is_below_three)).await?, 2);
    assert_eq!(within(call().retry_if(is_below_three)).await?, 0);
    let start = Instant::now();
    assert_eq!(within(call().retries(2).back_off(30 * MS).retry_if(is_below_three)).await?, 2);
    assert!(start.elapsed() >= 90 * MS);
    // Panics, and an attempt that the task sees.
    let panics = || {
        let attempt = mp::current_task().expect("inside a task").attempt();
        assert!(attempt == 2, "attempt {attempt}");
        attempt
    };
    let panicked = |result: &mp::Result<u32>| result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Panicked);
    assert_eq!(within(pool.apply(panics, ()).retries(5).retry_if(panicked)).await?, 2);
    assert_eq!(pool.stats().totals.panicked, 2);
    Ok(())
}

pub async fn a_predicate_decides_for_each_item_of_maps_and_streams(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    // An odd item is done at its third attempt, an even one at its first.
    let attempts = |n: u32| {
        let task = mp::current_task().expect("inside a task");
        (n, task.attempt(), task.index())
    };
    let too_early =
        |result: &mp::Result<(u32, u32, u64)>| result.as_ref().is_ok_and(|(n, attempt, _)| attempt / 2 < n % 2);
    let expected: Vec<_> = (0..100).map(|n| (n, 2 * (n % 2), u64::from(n))).collect();
    let mut map = pool.map(attempts, 0..100).retries(5).retry_if(too_early);
    let progress = map.progress();
    assert_eq!(within(map).await?, expected);
    assert_eq!((progress.borrow().done, progress.borrow().total), (100, 100));
    let ordered = pool.imap(attempts, 0..100).retries(5).retry_if(too_early);
    assert_eq!(within(ordered.try_collect::<Vec<_>>()).await?, expected);
    let any = pool.imap_unordered(attempts, 0..100).retries(5).retry_if(too_early);
    let mut any = within(any.try_collect::<Vec<_>>()).await?;
    any.sort_unstable();
    assert_eq!(any, expected);
    let stream = pool.imap_stream(attempts, futures::stream::iter(0..100)).retries(5).retry_if(too_early);
    assert_eq!(within(stream.try_collect::<Vec<_>>()).await?, expected);
    // No longer than the retries go.
    let map = pool.map(attempts, 0..4).retries(1).retry_if(too_early);
    assert_eq!(within(map).await?.iter().map(|(_, attempt, _)| *attempt).collect::<Vec<_>>(), [0, 1, 0, 1]);
    // Failures, in their places; the first ends a map.
    let panics = |n: u32| assert_ne!(n, 2, "two");
    let never = |_: &mp::Result<()>| false;
    let results: Vec<_> = within(pool.imap(panics, 0..5).retries(2).retry_if(never).collect()).await;
    assert_eq!(results.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, true, false, true, true]);
    let error = within(pool.map(panics, 0..u32::MAX).retries(2).retry_if(never)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Panicked);
    let source = (0..3).map(|n| if n < 2 { n } else { panic!("no more") });
    let results: Vec<_> = within(pool.imap(|_: u32| (), source).retries(2).retry_if(never).collect()).await;
    assert_eq!(results.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, true, false]);
    // A stream that was made before a close is completed, attempts included.
    let left = pool.imap(attempts, 0..10).retries(5).retry_if(too_early);
    pool.close();
    assert_eq!(within(left.try_collect::<Vec<_>>()).await?, expected[..10]);
    within(pool.join()).await?;
    let error = within(pool.map(attempts, 0..4).retries(1).retry_if(too_early)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    Ok(())
}

pub async fn the_sum_of_a_histogram_is_the_time_that_items_took(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    for _ in 0..3 {
        within(pool.apply(nap, (20,))).await?;
    }
    // A host tells of it with the last word on its message.
    eventually("all have run", || pool.stats().runs.count() == 3).await;
    let runs = pool.stats().runs;
    assert_eq!(runs.fixed_buckets().map(|(_, count)| count).sum::<u64>(), 3);
    assert!(runs.sum() >= 60 * MS, "{:?}", runs.sum());
    Ok(())
}

// With processes.

pub async fn a_panic_and_a_death_touch_their_own_item_only(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    let expected = (0..40).map(|n| match n {
        3 => Err(ErrorKind::ProcessDied),
        5 => Err(ErrorKind::Panicked),
        n => Ok(n),
    });
    let expected: Vec<_> = expected.collect();
    let results: Vec<_> = within(pool.imap(perilous, 0..40).collect()).await;
    assert_eq!(kinds(&results), expected);
    let results: Vec<_> = within(pool.imap(perilous, 0..40).chunksize(10).collect()).await;
    assert_eq!(kinds(&results), expected, "also in the middle of a batch");
    let died = results[3].as_ref().unwrap_err();
    assert!(died.exit_status().is_some() && died.to_string().contains("SIGABRT"), "{died}");
    assert_eq!(pool.apply(square, (2,)).await?, 4);
    Ok(())
}

pub async fn an_overrun_is_killed_and_a_retry_runs_again(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    let error = within(pool.apply(stuck, ()).timeout(50 * MS)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    let second_time_lucky = || match mp::current_task().expect("inside a task").attempt() {
        0 => std::process::abort(),
        attempt => attempt,
    };
    assert_eq!(within(pool.apply(second_time_lucky, ()).retries(1)).await?, 1);
    Ok(())
}

pub async fn cancelled_calls_free_their_worker(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    let running = pool.apply_async(stuck, ());
    let waiting = pool.apply_async(square, (1,));
    waiting.cancel();
    assert_eq!(within(waiting).await.unwrap_err().kind(), ErrorKind::Cancelled);
    running.cancel();
    assert_eq!(within(running).await.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(tokio::time::timeout(20 * MS, pool.apply(stuck, ())).await.is_err());
    assert_eq!(within(pool.apply(square, (3,))).await?, 9);
    Ok(())
}

pub async fn close_completes_and_terminate_resolves_everything(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    assert!(pool.join().await.is_err(), "an open pool would be joined for ever");
    let begun = pool.apply_async(later, (1,));
    pool.close();
    assert_eq!(pool.apply(square, (1,)).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(within(begun).await?, 2);
    within(pool.join()).await?;

    let pool = pools.pool(2)?;
    let pending: Vec<_> = (0..100).map(|_| pool.apply_async(stuck, ())).collect();
    pool.terminate();
    for result in pending {
        assert_eq!(within(result).await.unwrap_err().kind(), ErrorKind::Cancelled);
    }
    within(pool.join()).await
}

pub async fn pool_32_pool_33_fut_07_caller_that_stops_waiting_loses_no_result(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    let (mut result, go) = begun(&pool, "pool_32").await;
    for _ in 0..3 {
        assert!(tokio::time::timeout(Duration::ZERO, &mut result).await.is_err() && !result.ready());
    }
    go.open();
    assert_eq!(within(&mut result).await?, 7);
    assert!(result.await.is_err(), "a result can be had once");
    go.remove();
    let mut results = pool.imap(nap, [0, 30, 0, 30, 0]);
    let mut all = Vec::new();
    loop {
        match tokio::time::timeout(MS, results.next()).await {
            Ok(Some(value)) => all.push(value?),
            Ok(None) => break,
            Err(_) => {}
        }
    }
    assert_eq!(all, [0, 30, 0, 30, 0]);
    Ok(())
}

pub async fn dead_05_a_task_that_kills_every_worker_breaks_no_pool(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    for n in 0..20 {
        assert_eq!(within(pool.apply(die, ())).await.unwrap_err().kind(), ErrorKind::ProcessDied);
        if n % 10 == 9 {
            assert_eq!(within(pool.apply(square, (n,))).await?, n * n);
        }
    }
    assert_eq!(pool.broken(), None);
    Ok(())
}

pub async fn dead_13_dead_14_shut_04_after_a_close_everything_is_still_answered(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    let naps: Vec<_> = (0..50).map(|_| pool.apply_async(nap, (2,))).collect();
    let (dies, fails) = (pool.apply_async(die, ()), pool.apply_async(|| -> () { panic!("late") }, ()));
    pool.close();
    pool.close();
    within(pool.join()).await?;
    assert!(within(join_all(naps)).await.into_iter().all(|result| result.is_ok_and(|ms| ms == 2)));
    assert_eq!(dies.await.unwrap_err().kind(), ErrorKind::ProcessDied);
    assert_eq!(fails.await.unwrap_err().kind(), ErrorKind::Panicked);
    pool.terminate();
    within(pool.join()).await
}

pub async fn fut_05_fut_06_fut_08_a_cancel_is_final_unless_the_result_was_there(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    let finished = pool.apply_async(square, (3,));
    eventually("it is finished", || finished.ready()).await;
    let (running, _go) = begun(&pool, "fut_05").await;
    let pending = pool.apply_async(square, (4,));
    assert!(!running.ready() && !pending.ready());
    for result in [&pending, &finished] {
        result.cancel();
        result.cancel();
    }
    assert!(pending.ready());
    assert_eq!(within(pending).await.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(within(finished).await?, 9);
    // P9: one that runs is stopped, and its waiter hears of it.
    running.cancel();
    assert_eq!(within(running).await.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(within(pool.apply(square, (5,))).await?, 25);
    Ok(())
}

pub async fn waitf_02_waitf_04_waitf_06_asc_01_results_work_with_the_combinators_of_futures(
    pools: &impl Pools,
) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    // There are two places from here on.
    within(pool.map(nap, [1, 1])).await?;
    let (first, _, rest) = within(select_all([pool.apply_async(nap, (3000,)), pool.apply_async(nap, (1,))])).await;
    assert_eq!(first?, 1);
    assert_eq!(within(join_all(rest)).await.len(), 1);
    let fails = |n: u64| {
        assert_ne!(n, 2, "two");
        nap(n)
    };
    let calls: FuturesUnordered<_> = [100, 2, 1].map(|n| pool.apply_async(fails, (n,))).into_iter().collect();
    let results: Vec<_> = within(calls.collect()).await;
    assert_eq!(results.iter().filter(|result| result.is_err()).count(), 1);
    let failed = futures::future::try_join_all([600_000, 2].map(|n| pool.apply(fails, (n,))));
    assert_eq!(within(failed).await.unwrap_err().kind(), ErrorKind::Panicked);
    Ok(())
}

pub async fn new_02_terminating_again_and_with_dead_workers_is_fine(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    pool.terminate();
    pool.terminate();
    within(pool.join()).await?;
    let pool = pools.pool(1)?;
    let lost: Vec<_> = (0..100).map(|_| pool.apply_async(die, ())).collect();
    pool.terminate();
    // P14: all of it is told, now.
    for result in within(join_all(lost)).await {
        assert!(matches!(result.unwrap_err().kind(), ErrorKind::Cancelled | ErrorKind::ProcessDied));
    }
    within(pool.join()).await?;
    assert_eq!(pool.apply(square, (1,)).await.unwrap_err().kind(), ErrorKind::Closed);
    Ok(())
}

pub async fn rule_3_an_item_overruns_alone_also_in_the_middle_of_a_chunk(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    let slow = |n: u64| nap(if n == 5 { 60_000 } else { 1 });
    let results: Vec<_> = within(pool.imap(slow, 0..20).chunksize(10).timeout(1000 * MS).collect()).await;
    for (n, result) in results.iter().enumerate() {
        match n {
            5 => assert_eq!(result.as_ref().unwrap_err().kind(), ErrorKind::Timeout),
            _ => assert_eq!(*result.as_ref().unwrap(), 1, "{n}"),
        }
    }
    Ok(())
}

pub async fn rule_6_the_clock_starts_with_the_item_and_waiting_has_its_own(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    let (first, go) = begun(&pool, "rule_6").await;
    // It waits longer than it may run.
    let second = pool.apply(nap, (1,)).timeout(2000 * MS);
    let third = async {
        let third = pool.apply(nap, (1,)).queue_timeout(3000 * MS).await;
        go.open();
        third.unwrap_err()
    };
    let (second, error) = within(async { futures::join!(second, third) }).await;
    assert_eq!(second?, 1);
    assert!(error.kind() == ErrorKind::Timeout && error.to_string().contains("did not start"), "{error}");
    assert_eq!(within(first).await?, 7);
    assert_eq!(within(pool.apply(nap, (2,)).queue_timeout(Duration::from_secs(10))).await?, 2);
    go.remove();
    Ok(())
}

pub async fn a_retry_backs_off_and_knows_which_attempt_it_is(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    let third_time = || match mp::current_task().map(|task| task.attempt()) {
        Some(2) => 2,
        _ => std::process::abort(),
    };
    let start = Instant::now();
    assert_eq!(within(pool.apply(third_time, ()).retries(2).back_off(20 * MS)).await?, 2);
    assert!(start.elapsed() >= 60 * MS, "20 and 40 ms between the attempts");
    let error = within(pool.apply(third_time, ()).retries(1)).await.unwrap_err();
    assert!(error.to_string().contains("attempt 2"), "{error}");
    Ok(())
}

pub async fn retries_are_for_the_failures_that_were_named(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    let attempt = || mp::current_task().expect("inside a task").attempt();
    let dies_twice = move || if attempt() < 2 { std::process::abort() } else { attempt() };
    let overruns_once = move || {
        if attempt() == 0 {
            stuck();
        }
        attempt()
    };
    // Deaths, and not overruns.
    assert_eq!(within(pool.apply(dies_twice, ()).retries(5).retry_if(Retry::DIED)).await?, 2);
    let call = pool.apply(overruns_once, ()).timeout(50 * MS).retries(5).retry_if(Retry::DIED);
    assert_eq!(within(call).await.unwrap_err().kind(), ErrorKind::Timeout);
    // The other way round.
    let call = pool.apply(dies_twice, ()).retries(5).retry_if(Retry::TIMED_OUT);
    assert_eq!(within(call).await.unwrap_err().kind(), ErrorKind::ProcessDied);
    let call = pool.apply(overruns_once, ()).timeout(1000 * MS).retries(5).retry_if(Retry::TIMED_OUT);
    assert_eq!(within(call).await?, 1);
    // All, which is what `retries` alone means.
    for all in [Some(Retry::DIED | Retry::TIMED_OUT), None] {
        let call = pool.apply(dies_twice, ()).retries(2);
        let call = all.into_iter().fold(call, |call, all| call.retry_if(all));
        assert_eq!(within(call).await?, 2);
    }
    // The items of a map.
    let dies_first = move |n: u32| if n == 1 && attempt() == 0 { std::process::abort() } else { n };
    assert_eq!(within(pool.map(dies_first, 0..3).retries(1).retry_if(Retry::DIED)).await?, [0, 1, 2]);
    let totals = pool.stats().totals;
    assert_eq!((totals.timed_out, totals.died), (1, 1));
    Ok(())
}

pub async fn a_cancelled_item_never_starts(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    let (running, _go) = begun(&pool, "never_starts").await;
    let started = gate("started");
    let waiting: Vec<_> =
        (0..20).map(|_| pool.apply_async(|started: Gate| started.open(), (started.clone(),))).collect();
    waiting.iter().for_each(|result| result.cancel());
    running.cancel();
    assert_eq!(within(pool.apply(square, (3,))).await?, 9);
    for result in waiting {
        assert_eq!(result.await.unwrap_err().kind(), ErrorKind::Cancelled);
    }
    assert_eq!(running.await.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(!started.is_open(), "something began that was cancelled");
    Ok(())
}

/// A call that was given up leaves the queue though what is in front of it stays there, and however many there are.
pub async fn cancelled_items_are_dropped_while_all_workers_are_busy(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    let (_running, _go) = begun(&pool, "busy").await;
    let _first_in_line = pool.apply_async(square, (1,));
    for late in [false, true] {
        let mut map = pool.map(square, 0..100);
        let mut progress = map.progress();
        if late {
            let mut map = Box::pin(map.queue_timeout(20 * MS).into_future());
            assert_eq!(within(map.as_mut()).await.unwrap_err().kind(), ErrorKind::Timeout);
        } else {
            assert!(futures::poll!(Box::pin(map.into_future())).is_pending());
        }
        // Whoever tells of it is gone.
        within(async { while progress.changed().await.is_ok() {} }).await;
    }
    Ok(())
}

pub async fn item_that_stops_in_time_when_it_is_cancelled_keeps_its_result(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    let patient = || {
        let task = mp::current_task().expect("in a worker");
        assert!(task.label().contains("item_that_stops_in_time") && task.attempt() == 0, "{}", task.label());
        while !task.is_cancelled() {
            std::thread::sleep(MS);
        }
        7
    };
    assert_eq!(within(pool.apply(patient, ()).timeout(20 * MS).grace(Duration::from_secs(10))).await?, 7);
    let by_token = async || {
        mp::current_task().expect("in a worker").cancellation().cancelled().await;
        8
    };
    assert_eq!(within(pool.apply(by_token, ()).timeout(20 * MS).grace(Duration::from_secs(10))).await?, 8);
    Ok(())
}

pub async fn shutdown_returns_the_number_of_lost_items(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    let (running, go) = begun(&pool, "shutdown").await;
    let waiting: Vec<_> = (0..5).map(|_| pool.apply_async(nap, (1,))).collect();
    let (report, ()) = futures::join!(within(pool.shutdown(Duration::from_secs(10))), async { go.open() });
    assert_eq!((report.not_begun(), report.killed()), (5, 0));
    assert_eq!(within(running).await?, 7);
    for result in waiting {
        assert_eq!(within(result).await.unwrap_err().kind(), ErrorKind::Cancelled);
    }
    assert_eq!(pool.apply(square, (1,)).await.unwrap_err().kind(), ErrorKind::Closed);

    let pool = pools.pool(1)?;
    let (running, _go) = begun(&pool, "shutdown-2").await;
    let report = within(pool.shutdown(20 * MS)).await;
    assert_eq!((report.not_begun(), report.killed()), (0, 1));
    assert_eq!(within(running).await.unwrap_err().kind(), ErrorKind::Cancelled);
    Ok(())
}

/// Refuses to be written, or to be read, or does worse, when it is told to.
#[derive(Debug)]
struct Odd(u8);

impl serde::Serialize for Odd {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            1 => Err(serde::ser::Error::custom("not this one")),
            2 => std::process::abort(),
            n => serializer.serialize_u8(n),
        }
    }
}

impl<'de> serde::Deserialize<'de> for Odd {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match <u8 as serde::Deserialize>::deserialize(deserializer)? {
            3 => Err(serde::de::Error::custom("not to be read")),
            4 if mp::current_task().is_some() || mp::parent_process().is_some() => std::process::abort(),
            n => Ok(Self(n)),
        }
    }
}

pub async fn perr_02_rule_12_value_that_cannot_be_encoded_fails_its_item_only(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(1)?;
    let kind = async |call: mp::Call<()>| within(call).await.unwrap_err().kind();
    // POOL-06, DEAD-01: an argument that cannot be written.
    assert_eq!(kind(pool.apply(|_: Odd| (), (Odd(1),))).await, ErrorKind::Encode);
    let results: Vec<_> = within(pool.imap(|odd: Odd| odd.0, [0, 1, 9].map(Odd)).collect()).await;
    assert_eq!(kinds(&results), [Ok(0), Err(ErrorKind::Encode), Ok(9)]);
    // DEAD-03, DEAD-04: one that the worker cannot read, and one that kills it.
    assert_eq!(kind(pool.apply(|_: Odd| (), (Odd(3),))).await, ErrorKind::Decode);
    assert_eq!(kind(pool.apply(|_: Odd| (), (Odd(4),))).await, ErrorKind::ProcessDied);
    // PERR-02, DEAD-10, DEAD-08: results.
    for _ in 0..20 {
        assert_eq!(within(pool.apply(|| Odd(1), ())).await.unwrap_err().kind(), ErrorKind::Encode);
    }
    assert_eq!(within(pool.apply(|| Odd(2), ())).await.unwrap_err().kind(), ErrorKind::ProcessDied);
    // POOL-37, DEAD-11: a result that we cannot read.
    assert_eq!(within(pool.apply(|| Odd(3), ())).await.unwrap_err().kind(), ErrorKind::Decode);
    assert_eq!(within(pool.apply(square, (4,))).await?, 16);
    Ok(())
}

pub async fn a_time_that_never_comes_is_no_mistake(pools: &impl Pools) -> mp::Result<()> {
    let never = Duration::MAX;
    let pool = pools.pool(2)?;
    assert_eq!(within(pool.apply(square, (2,)).timeout(never).queue_timeout(never).grace(never)).await?, 4);
    assert_eq!(within(pool.map(square, 0..50).timeout(never).retries(1).back_off(never)).await?, squares(50));
    drop(pool.apply_async(stuck, ()));
    drop(pool);
    Ok(())
}

/// A pool of one place, which is taken until the gate opens, and of which `most` items may wait.
async fn bounded(pools: &impl Pools, most: usize) -> mp::Result<(Pool, mp::AsyncResult<u32>, Gate)> {
    let pool = pools.with(1, |builder| builder.max_waiting(most))?;
    let (busy, gate) = begun(&pool, "bounded").await;
    eventually("it is at work", || pool.stats().queued == 0).await;
    Ok((pool, busy, gate))
}

pub async fn try_apply_of_a_pool_with_as_many_waiting_as_may_is_full_at_once_and_apply_waits_for_room(
    pools: &impl Pools,
) -> mp::Result<()> {
    let (pool, busy, gate) = bounded(pools, 2).await?;
    let waiting = [pool.try_apply(square, (1,))?, pool.try_apply(square, (2,))?];
    let error = pool.try_apply(square, (3,)).err().expect("it is full");
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    let mut held_back = Box::pin(async { pool.apply(square, (4,)).await });
    let mut begun = pool.apply_async(square, (5,));
    assert!(held_back.as_mut().now_or_never().is_none() && (&mut begun).now_or_never().is_none());
    assert_eq!(pool.stats().queued, 2, "who waits for room has handed nothing in");
    // Those behind them do not come before them.
    assert_eq!(pool.try_apply(square, (6,)).err().map(|error| error.kind()), Some(ErrorKind::Full));
    gate.open();
    within(busy).await?;
    assert_eq!((within(held_back).await?, within(begun).await?), (16, 25));
    for (n, result) in (1..).zip(waiting) {
        assert_eq!(within(result).await?, square(n));
    }
    assert_eq!(within(pool.try_apply(square, (7,))?).await?, 49);
    gate.remove();
    Ok(())
}

pub async fn a_call_that_waits_for_room_and_is_dropped_leaves_its_place_to_the_next(
    pools: &impl Pools,
) -> mp::Result<()> {
    let (pool, busy, gate) = bounded(pools, 1).await?;
    let waiting = pool.try_apply(square, (1,))?;
    let mut dropped = [2, 3].map(|n| Box::pin(pool.apply(square, (n,))));
    assert!(dropped.iter_mut().all(|call| call.now_or_never().is_none()));
    let last = tokio::spawn({
        let pool = pool.clone();
        async move { pool.apply(square, (4,)).await }
    });
    tokio::task::yield_now().await;
    let [first, second] = dropped;
    drop(first);
    gate.open();
    within(busy).await?;
    within(waiting).await?;
    // It has been woken by now, or will be; nobody polls it.
    drop(second);
    assert_eq!(within(last).await.expect("no panic")?, 16);
    gate.remove();
    Ok(())
}

pub async fn a_map_hands_in_no_more_items_than_may_wait_and_all_get_done(pools: &impl Pools) -> mp::Result<()> {
    for places in [1, 3] {
        let pool = pools.with(places, |builder| builder.max_waiting(5))?;
        let both = futures::future::join(
            pool.map(square, 0..2000),
            pool.imap(square, 0..2000).chunksize(100).try_collect::<Vec<_>>(),
        );
        let (map, imap) = within(both).await;
        assert_eq!((map?, imap?), (squares(2000), squares(2000)));
    }
    let (pool, busy, gate) = bounded(pools, 5).await?;
    let map = tokio::spawn(pool.map(square, 0..2000).chunksize(3).into_future());
    // Those that are at the server of a cluster wait, too: 64 messages at most.
    let (least, most) = (5, 5 + 3 * 64);
    eventually("as many wait as may", || pool.stats().queued >= least).await;
    assert!(pool.stats().queued <= most, "{}", pool.stats().queued);
    // Those that wait for room hear of the end, too.
    pool.terminate();
    gate.open();
    assert_eq!(within(map).await.expect("no panic").unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(within(busy).await.is_err());
    gate.remove();
    Ok(())
}

pub async fn totals_count_each_item_once_by_how_it_ended(pools: &impl Pools) -> mp::Result<()> {
    let pool = pools.pool(2)?;
    within(pool.map(square, 0..1000)).await?;
    let _ = within(pool.apply(|| -> u8 { panic!("no") }, ())).await.unwrap_err();
    let _ = within(pool.apply(die, ())).await.unwrap_err();
    let _ = within(pool.apply(stuck, ()).timeout(50 * MS)).await.unwrap_err();
    let (running, _go) = begun(&pool, "totals").await;
    running.cancel();
    within(running).await.unwrap_err();
    // What is large comes another way.
    within(pool.apply(|| vec![0_u8; 3 << 20], ())).await?;
    let ended = || {
        let totals = pool.stats().totals;
        (totals.done, totals.panicked, totals.died, totals.timed_out, totals.cancelled, totals.failed)
    };
    eventually("all is counted", || ended() == (1001, 1, 1, 1, 1, 0)).await;
    pool.terminate();
    within(pool.join()).await?;
    assert_eq!(pool.stats().totals.done, 1001, "they stay");
    Ok(())
}

/// Its source is dropped last.
pub async fn a_call_whose_source_panics_when_it_is_dropped_is_cancelled_all_the_same(
    pools: &impl Pools,
) -> mp::Result<()> {
    struct Thorny;
    impl Iterator for Thorny {
        type Item = ();
        fn next(&mut self) -> Option<()> {
            Some(())
        }
    }
    impl Drop for Thorny {
        fn drop(&mut self) {
            panic!("thorns")
        }
    }
    let pool = pools.with(1, |builder| builder.grace(MS))?;
    let mut results = pool.imap(|()| stuck(), Thorny.take(100)).chunksize(1).map(drop);
    assert!(results.next().now_or_never().is_none());
    eventually("it runs", || pool.stats().running > 0).await;
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(results)));
    assert!(panic.is_err());
    eventually("it is cancelled", || pool.stats().running + pool.stats().queued == 0).await;
    assert_eq!(within(pool.apply(square, (3,))).await?, 9);
    Ok(())
}

pub async fn a_stream_that_is_not_polled_holds_no_place_in_the_line_for_room(pools: &impl Pools) -> mp::Result<()> {
    for places in [1, 2] {
        let pool = pools.with(places, |builder| builder.max_waiting(1))?;
        // The predicate makes each item a call of its own. Slow items wait in the pool, and not at its workers.
        let never = |_: &mp::Result<i64>| false;
        let slow = |n: i64| {
            std::thread::sleep(5 * MS);
            square(n)
        };
        let streams = [
            (pool.imap(square, 0..200), 200),
            (pool.imap(square, 0..20).retries(1).retry_if(never), 20),
            (pool.imap(slow, 0..20).retries(1).retry_if(never), 20),
            (pool.imap_unordered(slow, 0..20).retries(1).retry_if(never), 20),
        ];
        for (mut results, count) in streams {
            let mut sum = 0;
            while let Some(result) = within(results.next()).await {
                sum += within(pool.apply(square, (result? % 7,))).await?;
            }
            assert_eq!(sum, (0..count).map(|n| square(square(n) % 7)).sum::<i64>());
        }
    }
    Ok(())
}
