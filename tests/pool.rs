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

/// A test that names one of these asks for something that only a pool of worker processes on this machine has.
const OF_THIS_MACHINE: [&str; 21] = [
    "Queue",
    "Barrier",
    "Event::",
    "Fd::",
    "Fd<",
    "pid()",
    "pid,",
    ".workers.",
    "initializer",
    "finalizer",
    "checkout",
    "resize",
    "revive",
    "idle_timeout",
    "max_age",
    "max_tasks_per_worker",
    "memory_limit",
    "holdings",
    "threads()",
    "fault::",
    "Process::spawn",
];

/// The other tests of pools that are not in the suite, and why.
const EXCEPTIONS: &[(&str, &[&str])] = &[
    (
        "they kill or stop worker processes of this pool",
        &[
            "rule_1_rule_4_a_worker_killed_at_any_step_costs_at_most_the_item_it_was_at",
            "rule_1_a_worker_killed_between_its_moves_loses_nothing_it_has_not_begun_or_has_done",
            "rule_3_an_item_whose_start_is_not_noted_has_its_full_time_and_no_more",
            "when_all_workers_are_stopped_deadlines_hold_and_all_are_replaced",
        ],
    ),
    (
        "they are about one worker's orders, results or process",
        &[
            "idle_worker_takes_over_items_behind_a_slow_one",
            "large_items_behind_one_that_hangs_leave_its_deadline_in_force",
            "call_that_is_not_polled_any_more_delays_neither_callers_without_room_nor_the_end",
            "ppe_04_exec_09_an_argument_is_dropped_in_the_worker_right_after_its_task",
            "ppe_16_dead_02_dead_06_dead_09_p12_an_exit_is_the_error_of_its_item",
            "tpe_04_pools_come_and_go_in_a_busy_runtime",
        ],
    ),
    (
        "a cluster pool pulls ahead, and keeps, as much as its hosts have slots for (`cluster_pool`)",
        &[
            "rule_9_a_million_items_of_an_endless_source_take_flat_memory",
            "new_03_new_04_ppe_17_exec_05_p11_little_is_pulled_ahead_and_a_close_comes_through",
            "input_is_pulled_as_results_are_taken",
        ],
    ),
];

#[test]
fn each_test_of_a_pool_is_in_the_suite_or_an_exception_from_it() {
    let suite = include_str!("suite/mod.rs");
    let files = [include_str!("pool.rs"), include_str!("pool_rules.rs"), include_str!("pool_behaviours.rs")];
    let tests = files.iter().flat_map(|text| text.split(concat!("#[tokio", "::test")).skip(1));
    let named: Vec<_> =
        tests.filter_map(|text| Some((text.split("async fn ").nth(1)?.split('(').next()?, text))).collect();
    let is_excepted = |name: &str| EXCEPTIONS.iter().any(|(_, names)| names.contains(&name));
    let is_in_suite = |name: &str| suite.contains(&format!("pub async fn {name}("));
    let is_local = |text: &str| OF_THIS_MACHINE.iter().any(|what| text.contains(what));
    let lacking: Vec<_> = named
        .iter()
        .filter(|(name, text)| !is_local(text) && !is_excepted(name) && !is_in_suite(name))
        .map(|(name, _)| name)
        .collect();
    assert!(named.len() > 60 && lacking.is_empty(), "neither in the suite nor an exception: {lacking:#?}");
    let names = EXCEPTIONS.iter().flat_map(|(_, names)| names.iter());
    let gone: Vec<_> = names.filter(|name| !named.iter().any(|(named, _)| named == *name)).collect();
    assert!(gone.is_empty(), "exceptions that are no tests: {gone:?}");
}
