//! W22 and W18: tasks of 10 to 1000 µs, all at once and as they arrive.

use bytes::Bytes;
use futures::TryStreamExt;
use futures::stream::{self, StreamExt};
use mpbench::cli::Metrics;
use mpbench::stats::{now_ns, quantile};
use mpbench::work::{burn, over_ideal, steps_of};
use mpbench::{open_loop, size};
use multiprocess::Pool;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Calls that are outstanding in the variant `apply_64`.
const OUTSTANDING: usize = 64;

fn task(steps: u64, argument: Bytes) -> u64 {
    burn(steps) ^ argument.len() as u64
}

/// Returns when it ended.
fn timed_task(steps: u64) -> u64 {
    std::hint::black_box(burn(steps));
    now_ns()
}

fn arguments(steps: u64, bytes: usize, count: usize) -> impl Iterator<Item = (u64, Bytes)> {
    let argument = Bytes::from(vec![7; bytes]);
    (0..count).map(move |_| (steps, argument.clone()))
}

fn on_pool(run: impl AsyncFn(&Pool, u64, usize, usize) -> usize) -> Metrics {
    let runtime = super::build(tokio::runtime::Builder::new_current_thread());
    let pool = runtime.block_on(async { Pool::new(size::WORKERS).unwrap() });
    over_ideal(|steps, bytes, count| {
        assert_eq!(runtime.block_on(run(&pool, steps, bytes, count)), count);
    })
}

pub(crate) fn map() -> Metrics {
    on_pool(async |pool, steps, bytes, count| pool.starmap(task, arguments(steps, bytes, count)).await.unwrap().len())
}

pub(crate) fn stream() -> Metrics {
    let mut metrics = on_pool(async |pool, steps, bytes, count| {
        let one = |(steps, argument): (u64, Bytes)| task(steps, argument);
        let results = pool.imap_unordered(one, arguments(steps, bytes, count));
        results.try_fold(0, async |sum, _| Ok(sum + 1)).await.unwrap()
    });
    metrics.extend(late(&super::build(tokio::runtime::Builder::new_current_thread())));
    metrics
}

/// How long after it was made each result of a stream comes.
pub(crate) fn late(runtime: &tokio::runtime::Runtime) -> Metrics {
    let late_ms = runtime.block_on(async {
        let pool = Pool::new(size::WORKERS).unwrap();
        let steps = steps_of(100);
        let mut results = pool.imap_unordered(timed_task, vec![steps; 10_000]);
        let mut late_ms = Vec::new();
        while let Some(made) = results.try_next().await.unwrap() {
            late_ms.push(now_ns().saturating_sub(made) as f64 / 1e6);
        }
        late_ms
    });
    let names = ["late_p50_ms", "late_p90_ms", "late_p99_ms"];
    names.into_iter().zip([0.5, 0.9, 0.99]).map(|(name, q)| (name, quantile(&late_ms, q))).collect()
}

pub(crate) fn apply() -> Metrics {
    on_pool(async |pool, steps, bytes, count| {
        let calls = stream::iter(arguments(steps, bytes, count));
        let results = calls.map(|(steps, argument)| pool.apply(task, (steps, argument))).buffer_unordered(OUTSTANDING);
        results.try_fold(0, async |sum, _| Ok(sum + 1)).await.unwrap()
    })
}

/// A small call now and then beside a map of tasks of 1 ms.
pub(crate) fn beside_map() -> Metrics {
    let runtime = super::build(tokio::runtime::Builder::new_current_thread());
    let ms = runtime.block_on(async {
        let pool = Pool::new(size::WORKERS).unwrap();
        let steps = steps_of(1000);
        let map = pool.map_async(burn, vec![steps; 4000]);
        let mut ms = Vec::new();
        for _ in 0..150 {
            tokio::time::sleep(Duration::from_millis(7)).await;
            let at = Instant::now();
            pool.apply(burn, (1000,)).await.unwrap();
            ms.push(at.elapsed().as_secs_f64() * 1e3);
        }
        drop(map);
        ms
    });
    vec![("beside_p50_ms", quantile(&ms, 0.5)), ("beside_max_ms", quantile(&ms, 1.0))]
}

pub(crate) fn as_they_arrive() -> Metrics {
    let runtime = super::build(tokio::runtime::Builder::new_current_thread());
    let pool = Arc::new(runtime.block_on(async { Pool::new(size::WORKERS).unwrap() }));
    open_loop::latencies(&runtime, |steps| {
        let pool = pool.clone();
        async move { _ = pool.apply(burn, (steps,)).await.unwrap() }
    })
}
