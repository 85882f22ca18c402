//! The behaviours that all kinds of pools share (`suite`), of pools with worker processes and within this process; workers and initializers.

use futures::StreamExt;
use multiprocess::{self as mp, Pool, PoolBuilder, Process, Queue};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

mod common;
mod suite;
use common::Deadline;
use common::pool::square;
use suite::Pools;

multiprocess::test_support!();
common::quiet::quiet_stderr!();

/// Pools of worker processes.
struct Local;

impl Pools for Local {
    fn with(&self, places: usize, options: impl FnOnce(PoolBuilder) -> PoolBuilder) -> mp::Result<Pool> {
        options(Pool::builder().workers(places)).build()
    }
}

mod local {
    crate::suite::everywhere!(Some(crate::Local));
    crate::suite::with_processes!(Some(crate::Local));
}

/// Pools within this process, which have one place and no options.
struct InProcess;

impl Pools for InProcess {
    fn with(&self, _: usize, _: impl FnOnce(PoolBuilder) -> PoolBuilder) -> mp::Result<Pool> {
        Pool::in_process()
    }
}

mod in_process {
    crate::suite::everywhere!(Some(crate::InProcess));
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
