//! Figures of a pool: `PoolStats`, `WorkerStats`, `Histogram`.

use crate::error::ErrorKind;
use crate::process::entry::{IS_PANIC, IS_VALUE};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A snapshot of a pool; made by [`Pool::stats`](crate::Pool::stats).
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct PoolStats {
    /// The workers. Empty for a pool without worker processes.
    pub workers: Vec<WorkerStats>,
    /// Items that were submitted and have not started, including those that wait for a retry.
    pub queued: usize,
    /// Items that run now.
    pub running: usize,
    /// How long items waited until they were first given to a worker.
    pub waits: Histogram,
    /// How long items ran, as measured by their workers; for items that travelled together, their mean. Of a call whose items take less than 5 us
    /// one in eight is measured, and all that take longer than 8 ms; the others count as the function usually takes. Items that did not end are not
    /// counted.
    pub runs: Histogram,
    /// Workers that were killed because they did not end in time; see [`exit_timeout`](crate::PoolBuilder::exit_timeout).
    pub late: u64,
    /// Counts of finished items and of workers since the start of the pool.
    pub totals: PoolTotals,
    /// The last workers that died or were killed, at most 32, the latest last.
    pub deaths: Vec<WorkerDeath>,
    /// Of a cluster pool: how often items were handed out again, because the host that had them was lost.
    #[cfg(feature = "cluster")]
    pub redelivered: u64,
    /// Of a cluster pool: how many second answers arrived for items that had been answered. They are dropped.
    #[cfg(feature = "cluster")]
    pub duplicates: u64,
    /// Of a cluster pool: the time from sending an item to receiving its result, without the time for which it ran.
    #[cfg(feature = "cluster")]
    pub round_trip: Histogram,
}

/// Counts of finished items and of workers since the start of a pool: numbers that only grow, for counters of Prometheus or
/// OpenTelemetry. They stay when the pool is closed.
///
/// Each item ends as one of `done`, `panicked`, `died`, `timed_out`, `cancelled` and `failed`.
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(1)?;
/// pool.map(|x: u64| x + 1, 0..10).await?;
/// assert!(pool.apply(|n: u64| assert_eq!(n, 1), (0,)).await.is_err());
/// let totals = pool.stats().totals;
/// assert_eq!((totals.done, totals.panicked, totals.died), (10, 1, 0));
/// # Ok(()) }) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolTotals {
    /// Items whose function returned, whatever it returned.
    pub done: u64,
    /// Items whose function panicked.
    pub panicked: u64,
    /// Items whose worker died, and that were not tried again, or not any more.
    pub died: u64,
    /// Items that overran their time, or did not start in time, and were not tried again, or not any more.
    pub timed_out: u64,
    /// Items that were cancelled: their call was dropped, or the pool was shut down or terminated first.
    pub cancelled: u64,
    /// Items that failed otherwise: their arguments could not be read or their result could not be encoded, or there is no worker.
    pub failed: u64,
    /// How often an item was tried again.
    pub retried: u64,
    /// Workers that exited normally after `max_tasks_per_worker`, for their age or for their size, and were replaced.
    pub recycled: u64,
    /// Workers that died or were killed, and were replaced.
    pub restarted: u64,
    /// Calls that were refused because the limit of waiting items was reached.
    pub rejected: u64,
}

impl PoolTotals {
    /// An item has come to this end.
    pub(super) fn count(&mut self, kind: ErrorKind) {
        let which = match kind {
            ErrorKind::Panicked => &mut self.panicked,
            ErrorKind::ProcessDied | ErrorKind::MemoryLimit => &mut self.died,
            ErrorKind::Timeout => &mut self.timed_out,
            ErrorKind::Cancelled => &mut self.cancelled,
            _ => &mut self.failed,
        };
        *which += 1;
    }

    /// An outcome with this tag has come from a worker.
    pub(super) fn count_tag(&mut self, tag: u8) {
        let which = match tag {
            IS_VALUE => &mut self.done,
            IS_PANIC => &mut self.panicked,
            _ => &mut self.failed,
        };
        *which += 1;
    }

    /// Adds what has been counted since the last time.
    pub(super) fn add(&mut self, more: Self) {
        let Self { done, panicked, died, timed_out, cancelled, failed, retried, recycled, restarted, rejected } = more;
        self.done += done;
        self.panicked += panicked;
        self.died += died;
        self.timed_out += timed_out;
        self.cancelled += cancelled;
        self.failed += failed;
        self.retried += retried;
        self.recycled += recycled;
        self.restarted += restarted;
        self.rejected += rejected;
    }
}

/// A snapshot of one worker of a pool.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct WorkerStats {
    /// Its name, as it was started with: `PoolWorker-1`. Its replacement has the same.
    pub name: String,
    /// Its process id.
    pub pid: u32,
    /// Time since it was started.
    pub age: Duration,
    /// Items that it has completed.
    pub tasks: u64,
    /// `true` if it runs an item.
    pub is_busy: bool,
    /// The name of the function that it runs, as the compiler spells it.
    pub task: Option<&'static str>,
    /// How long ago it began that item, as far as the pool knows: one that it began unnoticed counts from its last result.
    pub running_for: Option<Duration>,
    /// Its resident memory in bytes; 0 if it is gone.
    pub resident: u64,
    /// The most resident memory that it ever had, in bytes.
    pub peak: u64,
}

/// A worker that died or was killed while its pool was to go on; one of [`PoolStats::deaths`].
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(1)?;
/// assert!(pool.apply(|| std::process::abort() as (), ()).await.is_err());
/// let death = &pool.stats().deaths[0];
/// assert_eq!(death.name, "PoolWorker-1");
/// assert!(death.status.is_some_and(|status| !status.success()));
/// assert!(death.why.contains("SIGABRT"), "{}", death.why);
/// # Ok(()) }) }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct WorkerDeath {
    /// Its name, which its replacement has as well.
    pub name: String,
    /// Its process id.
    pub pid: u32,
    /// When the pool noticed its end.
    pub at: Instant,
    /// How it exited, or the signal that killed it; `None` if that is not known.
    pub status: Option<ExitStatus>,
    /// The reason: what it ran, its exit status or why it was killed, and what is known beyond that.
    pub why: String,
}

/// The last deaths of a pool, the latest last. They are shared: the pool copies them when a worker dies while somebody has them.
pub(crate) type Deaths = Arc<Vec<WorkerDeath>>;

const BUCKETS: usize = 64;

/// A histogram of times, with buckets that double.
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// use std::time::Duration;
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(1)?;
/// pool.apply(|| std::thread::sleep(Duration::from_millis(5)), ()).await?;
/// let runs = pool.stats().runs;
/// assert_eq!(runs.count(), 1);
/// assert!(runs.quantile(0.5) >= Duration::from_millis(5));
/// assert!(runs.buckets().all(|(limit, count)| count == 1 && limit >= Duration::from_millis(5)));
/// # Ok(()) }) }
/// ```
#[derive(Clone)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    sum_ns: u128,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], sum_ns: 0 }
    }
}

/// The upper limit of a bucket, exclusive.
fn limit(bucket: usize) -> Duration {
    if bucket == 0 { Duration::ZERO } else { Duration::from_nanos(1 << bucket) }
}

impl Histogram {
    /// Bucket `n` has what took less than `2^n` ns, and at least half of that.
    pub(crate) fn add(&mut self, time: Duration, count: u64) {
        let ns = time.as_nanos().min(u128::from(u64::MAX >> 1)) as u64;
        let bucket = (u64::BITS - ns.leading_zeros()) as usize;
        self.buckets.get_mut(bucket).into_iter().for_each(|bucket| *bucket += count);
        self.sum_ns += u128::from(ns) * u128::from(count);
    }

    /// Returns the sum of all times.
    pub fn sum(&self) -> Duration {
        Duration::new((self.sum_ns / 1_000_000_000) as u64, (self.sum_ns % 1_000_000_000) as u32)
    }

    /// Returns all buckets in order, also those that are empty: the upper limit and the number of times in it. The limits
    /// are always the same, each twice the one before: add the numbers up for the cumulative buckets of Prometheus.
    ///
    /// ```
    /// # use multiprocess::Histogram;
    /// # use std::time::Duration;
    /// let limits: Vec<Duration> = Histogram::default().fixed_buckets().map(|(limit, _)| limit).collect();
    /// assert_eq!((limits.len(), limits[10], limits[20]), (64, Duration::from_nanos(1 << 10), Duration::from_nanos(1 << 20)));
    /// ```
    pub fn fixed_buckets(&self) -> impl Iterator<Item = (Duration, u64)> {
        self.buckets.iter().enumerate().map(|(bucket, count)| (limit(bucket), *count))
    }

    /// Returns the number of times recorded.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Returns an upper bound of the given quantile (0 to 1): the limit of its bucket, or zero if the histogram is empty.
    pub fn quantile(&self, part: f64) -> Duration {
        let wanted = ((self.count() as f64 * part.clamp(0.0, 1.0)).ceil() as u64).max(1);
        let mut seen = 0;
        let bucket = self.buckets().find(|(_, count)| {
            seen += count;
            seen >= wanted
        });
        bucket.map_or(Duration::ZERO, |(limit, _)| limit)
    }

    /// Returns the buckets that are not empty: the upper limit and the number of times in it.
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, u64)> {
        self.fixed_buckets().filter(|(_, count)| *count > 0)
    }
}

impl std::fmt::Debug for Histogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.buckets()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_is_exact_to_within_a_factor_of_two() {
        let mut histogram = Histogram::default();
        assert_eq!((histogram.count(), histogram.quantile(0.5)), (0, Duration::ZERO));
        (1..=1000).for_each(|us| histogram.add(Duration::from_micros(us), 1));
        histogram.add(Duration::MAX, 1);
        histogram.add(Duration::ZERO, 1);
        assert_eq!(histogram.count(), 1002);
        let median = histogram.quantile(0.5);
        assert!((Duration::from_micros(500)..=Duration::from_micros(1002)).contains(&median), "{median:?}");
        assert_eq!(histogram.quantile(0.0), Duration::ZERO);
        assert!(histogram.quantile(1.0) > Duration::from_secs(1 << 30));
    }
}
