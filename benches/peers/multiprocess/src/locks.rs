//! W8m and W8n.

use super::block_on;
use mpbench::cli::Metrics;
use mpbench::stats::{quantile, timed};
use mpbench::sys;
use multiprocess::{Lock, Process, Queue};
use std::time::{Duration, Instant};

/// Acquisitions of all processes together.
const TURNS: u32 = 32_000;
const CRITICAL: Duration = Duration::from_micros(5);
const CREATIONS: usize = 500;

fn contend(lock: Lock, go: Queue<()>, turns: u32) -> Duration {
    go.blocking_get().unwrap();
    let before = sys::own_cpu_time();
    for _ in 0..turns {
        let _guard = lock.blocking_acquire().unwrap();
        let start = Instant::now();
        while start.elapsed() < CRITICAL {}
    }
    sys::own_cpu_time() - before
}

/// CPU time of one acquisition and its critical section, in microseconds.
async fn crowd(processes: u32) -> f64 {
    let (lock, go) = (Lock::new().unwrap(), Queue::unbounded().unwrap());
    let start = |_| Process::spawn(contend, (lock.clone(), go.clone(), TURNS / processes)).unwrap();
    let children: Vec<_> = (0..processes).map(start).collect();
    for _ in 0..processes {
        go.put(()).await.unwrap();
    }
    let mut cpu = Duration::ZERO;
    for child in children {
        cpu += child.await.unwrap();
    }
    cpu.as_secs_f64() * 1e6 / f64::from(TURNS)
}

pub fn crowds() -> Metrics {
    let [two, eight, many] = [2, 8, 32].map(|processes| block_on(crowd(processes)));
    vec![("growth", eight.max(many) / two), ("cpu_us_2", two), ("cpu_us_8", eight), ("cpu_us_32", many)]
}

/// The first lock founds the family; that is not counted.
pub fn create() -> Metrics {
    let _first = Lock::new().unwrap();
    let mut us = Vec::new();
    for _ in 0..CREATIONS {
        let (elapsed, lock) = timed(|| Lock::new().unwrap());
        us.push(elapsed.as_secs_f64() * 1e6);
        drop(lock);
    }
    vec![("create_us", quantile(&us, 0.5)), ("create_p99_us", quantile(&us, 0.99))]
}
