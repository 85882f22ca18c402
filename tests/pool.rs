//! The pool, first cut: calls, order, streams, failures of single items, endings.

use futures::{StreamExt, TryStreamExt};
use multiprocess::{self as mp, ErrorKind, Pool, Process, Queue};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

mod common;
use common::Deadline;
use common::pool::{square, stuck};

multiprocess::test_support!();
common::quiet::quiet_stderr!();

async fn later(n: i64) -> i64 {
    tokio::time::sleep(Duration::from_millis(1)).await;
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

fn kinds(results: &[mp::Result<i64>]) -> Vec<Result<i64, ErrorKind>> {
    results.iter().map(|result| result.as_ref().copied().map_err(|error| error.kind())).collect()
}

#[tokio::test]
async fn the_whole_program_of_the_documentation() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(4)?;
    let squares: Vec<i64> = pool.map(square, 1..=5).await?;
    let total: i64 = pool.imap_unordered(square, 0..1_000).try_fold(0, async |sum, x| Ok(sum + x)).await?;
    let some: Vec<i64> =
        futures::stream::iter(0..10).map(|i| pool.apply_async(square, (i,))).buffer_unordered(4).try_collect().await?;
    assert_eq!((squares, total, some.len()), (vec![1, 4, 9, 16, 25], 332_833_500, 10));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_function_and_call() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    assert_eq!(pool.apply(square, (7,)).await?, 49);
    assert_eq!(pool.map(later, 0..20).await?, (1..=20).collect::<Vec<_>>());
    assert_eq!(pool.starmap(|a: i32, b: i32| a - b, vec![(3, 1), (5, 9)]).await?, [2, -4]);
    assert_eq!(pool.map_async(square, vec![1, 2]).await?, [1, 4]);
    assert_eq!(pool.starmap_async(i32::pow, vec![(2, 3), (3, 2)]).await?, [8, 9]);
    let ordered: Vec<i64> = pool.imap(square, 0..100).chunksize(7).try_collect().await?;
    assert_eq!(ordered, (0..100).map(square).collect::<Vec<_>>());
    let streamed: Vec<i64> = pool.imap_stream(square, futures::stream::iter(0..10)).try_collect().await?;
    assert_eq!(streamed, (0..10).map(square).collect::<Vec<_>>());
    assert_eq!(pool.map(square, std::iter::empty()).await?, Vec::<i64>::new());
    Ok(())
}

#[tokio::test]
async fn a_panic_and_a_death_touch_their_own_item_only() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    let expected = (0..40).map(|n| match n {
        3 => Err(ErrorKind::ProcessDied),
        5 => Err(ErrorKind::Panicked),
        n => Ok(n),
    });
    let expected: Vec<_> = expected.collect();
    let results: Vec<_> = pool.imap(perilous, 0..40).collect().await;
    assert_eq!(kinds(&results), expected);
    let results: Vec<_> = pool.imap(perilous, 0..40).chunksize(10).collect().await;
    assert_eq!(kinds(&results), expected, "also in the middle of a batch");
    let died = results[3].as_ref().unwrap_err();
    assert!(died.exit_status().is_some() && died.to_string().contains("SIGABRT"), "{died}");
    assert_eq!(pool.apply(square, (2,)).await?, 4);
    Ok(())
}

#[tokio::test]
async fn an_overrun_is_killed_and_a_retry_runs_again() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let error = pool.apply(stuck, ()).timeout(Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    // Whoever comes second finds what the first has left in the queue, and returns.
    let attempts = Queue::unbounded()?;
    let second_time_lucky = |attempts: Queue<u32>| match attempts.try_put(0).is_ok() && attempts.len() < 2 {
        true => std::process::abort(),
        false => attempts.len(),
    };
    assert_eq!(pool.apply(second_time_lucky, (attempts.clone(),)).retries(1).await?, 2);
    Ok(())
}

#[tokio::test]
async fn cancelled_calls_free_their_worker() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(1)?;
    let running = pool.apply_async(stuck, ());
    let waiting = pool.apply_async(square, (1,));
    waiting.cancel();
    assert_eq!(waiting.await.unwrap_err().kind(), ErrorKind::Cancelled);
    running.cancel();
    assert_eq!(running.await.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(tokio::time::timeout(Duration::from_millis(20), pool.apply(stuck, ())).await.is_err());
    assert_eq!(pool.apply(square, (3,)).await?, 9);
    Ok(())
}

#[tokio::test]
async fn input_is_pulled_as_results_are_taken() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    let pulled = Arc::new(AtomicUsize::new(0));
    let count = pulled.clone();
    let endless = (0i64..).inspect(move |_| {
        count.fetch_add(1, SeqCst);
    });
    let mut results = pool.imap_unordered(square, endless).chunksize(1);
    for _ in 0..10 {
        results.next().await.unwrap()?;
    }
    assert!(pulled.load(SeqCst) <= 10 + 2 * 4, "{} items pulled", pulled.load(SeqCst));
    Ok(())
}

#[tokio::test]
async fn a_source_that_panics_is_one_error_after_the_good_ones() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    let source = || (0i64..).inspect(|n| assert!(*n < 3, "no fourth"));
    let results: Vec<_> = pool.imap(square, source()).collect().await;
    assert_eq!(kinds(&results), [Ok(0), Ok(1), Ok(4), Err(ErrorKind::Panicked)]);
    assert_eq!(pool.map(square, source()).await.unwrap_err().kind(), ErrorKind::Panicked);
    Ok(())
}

#[tokio::test]
async fn close_completes_and_terminate_resolves_everything() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::new(2)?;
    assert!(pool.join().await.is_err(), "an open pool would be joined for ever");
    let begun = pool.apply_async(later, (1,));
    pool.close();
    assert_eq!(pool.apply(square, (1,)).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(begun.await?, 2);
    pool.join().await?;

    let pool = Pool::new(2)?;
    let pending: Vec<_> = (0..100).map(|_| pool.apply_async(stuck, ())).collect();
    pool.terminate();
    for result in pending {
        assert_eq!(result.await.unwrap_err().kind(), ErrorKind::Cancelled);
    }
    pool.join().await
}

#[tokio::test]
async fn workers_are_replaced_after_their_share() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let pool = Pool::builder().workers(1).max_tasks_per_worker(2).build()?;
    let pids = pool.map(|_: u32| std::process::id(), 0..10).await?;
    assert_eq!(pids.iter().collect::<HashSet<_>>().len(), 5, "{pids:?}");
    assert!(Pool::builder().workers(0).build().is_err());
    Ok(())
}

#[tokio::test]
async fn init_02_the_initializer_runs_in_each_worker_even_if_no_task_comes() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let started = Queue::unbounded()?;
    let announce = |started: Queue<u32>| started.blocking_put(std::process::id()).is_ok();
    let _pool = Pool::builder().workers(2).initializer(announce, (started.clone(),)).build()?;
    assert_ne!(started.get().await?, started.get().await?);
    Ok(())
}

#[tokio::test]
async fn init_03_a_failing_initializer_is_an_error_and_no_fork_storm() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let started = Queue::unbounded()?;
    let fail = |started: Queue<u32>| -> mp::Result<()> {
        started.try_put(std::process::id())?;
        Err(mp::Error::other("no model"))
    };
    let pool = Pool::builder().workers(2).initializer(fail, (started.clone(),)).build()?;
    let error = pool.apply(square, (1,)).await.unwrap_err();
    assert!(error.to_string().contains("no model"), "{error}");
    let panics = Pool::builder().workers(1).initializer(|| -> u8 { panic!("no luck") }, ()).build()?;
    let error = panics.apply(square, (1,)).await.unwrap_err();
    assert!(error.to_string().contains("no luck"), "{error}");
    assert!(started.len() <= 2, "{} workers were started", started.len());
    Ok(())
}

#[tokio::test]
async fn stdin_02_a_pool_inside_a_child() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let sum = async |n: i64| -> mp::Result<i64> { Ok(Pool::new(2)?.map(square, 0..n).await?.into_iter().sum()) };
    assert_eq!(Process::spawn(sum, (5,))?.await??, 30);
    Ok(())
}
