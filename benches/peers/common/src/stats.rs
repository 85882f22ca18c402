//! Timing and summary statistics.

use crate::cli::Metrics;
use crate::{size, sys};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

pub fn timed<T>(f: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let value = f();
    (start.elapsed(), value)
}

/// Nanoseconds on CLOCK_MONOTONIC, comparable across processes.
pub fn now_ns() -> u64 {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut ts) };
    ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64
}

pub fn quantile(samples: &[f64], q: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * q).round() as usize]
}

/// `p50_us` and `p99_us` of per-operation latencies.
pub fn latency(samples: &[Duration]) -> Metrics {
    let us: Vec<f64> = samples.iter().map(|d| d.as_secs_f64() * 1e6).collect();
    vec![("p50_us", quantile(&us, 0.5)), ("p99_us", quantile(&us, 0.99))]
}

/// Runs `f` `n` times after `n / 10` warm-up runs and returns each duration.
pub fn samples(n: usize, mut f: impl FnMut()) -> Vec<Duration> {
    (0..n / 10).for_each(|_| f());
    let one = |_| {
        pause().inspect(|p| std::thread::sleep(*p));
        timed(&mut f).0
    };
    (0..n).map(one).collect()
}

static PAUSED: AtomicBool = AtomicBool::new(false);

/// Turns a W7 measurement into W7s: a pause before each round trip, in which the
/// other side falls asleep. Adds the CPU time of both processes per round trip, unless
/// the run knows it better: only children that this process reaped are counted here.
pub fn paused(run: fn() -> Metrics) -> Metrics {
    PAUSED.store(true, Relaxed);
    let mut metrics = run();
    if metrics.iter().all(|(key, _)| *key != "cpu_us") {
        metrics.push(("cpu_us", sys::cpu_time().as_secs_f64() * 1e6 / round_trips() as f64));
    }
    metrics
}

/// What to wait before each measured operation.
pub fn pause() -> Option<Duration> {
    PAUSED.load(Relaxed).then_some(Duration::from_millis(1))
}

/// How many of W7's round trips are measured.
pub fn round_trips() -> usize {
    if PAUSED.load(Relaxed) { size::PAUSED_ROUND_TRIPS } else { size::ROUND_TRIPS }
}

/// Median of `n` evaluations of a whole measurement.
pub fn median_of(n: usize, mut f: impl FnMut() -> f64) -> f64 {
    let values: Vec<f64> = (0..n).map(|_| f()).collect();
    quantile(&values, 0.5)
}

pub fn per_second(count: usize, elapsed: Duration) -> f64 {
    count as f64 / elapsed.as_secs_f64()
}

pub fn mib_per_second(bytes: usize, elapsed: Duration) -> f64 {
    per_second(bytes, elapsed) / (1 << 20) as f64
}

/// Throughput as a consumer sees it: the clock runs from the first message in.
pub struct FirstToLast {
    start: Option<Instant>,
    count: usize,
}

impl FirstToLast {
    pub fn new() -> Self {
        Self { start: None, count: 0 }
    }

    #[inline]
    pub fn message(&mut self) {
        match self.start {
            None => self.start = Some(Instant::now()),
            Some(_) => self.count += 1,
        }
    }

    pub fn per_second(&self) -> f64 {
        per_second(self.count, self.start.expect("no message").elapsed())
    }
}

impl Default for FirstToLast {
    fn default() -> Self {
        Self::new()
    }
}
