//! Figures through the `metrics` facade.

use super::sources::{PoolSource, QueueSource, Sources};
use crate::channel::{Item, JoinableQueue, Queue};
use crate::error::Result;
use crate::manager::Manager;
use crate::os::timer;
use crate::pool::{Histogram, Pool, PoolStats};
use ::metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use std::time::Duration;

/// A manager that does not answer within this time counts as down until the next report.
const ANSWER: Duration = Duration::from_secs(1);

/// Reports figures of pools, queues and managers to the recorder of the [`metrics`](::metrics) crate.
///
/// Use a `Dashboard` (feature `dashboard`) instead to look at one program without a server for its figures, and
/// [`Pool::stats`](crate::Pool::stats) for figures in the program itself.
///
/// ```
/// use metrics_util::debugging::{DebugValue, DebuggingRecorder};
/// use multiprocess::{self as mp, MetricsReporter, Pool};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let recorder = DebuggingRecorder::new();
/// let snapshotter = recorder.snapshotter();
/// recorder.install().expect("the first"); // or that of metrics-exporter-prometheus
///
/// let pool = Pool::new(2)?;
/// pool.map(|n: u64| n * n, 0..100).await?;
/// let mut reporter = MetricsReporter::new().pool("squares", &pool);
/// reporter.report().await;
///
/// let figures = snapshotter.snapshot().into_vec();
/// let done = figures.iter().find(|(key, ..)| {
///     key.key().name() == "multiprocess_pool_items_total" && key.key().labels().any(|label| label.value() == "done")
/// });
/// assert!(matches!(done, Some((.., DebugValue::Counter(100)))));
/// # Ok(()) }) }
/// ```
///
/// A service has it report all the time: `tokio::spawn(reporter.run(Duration::from_secs(1)))`.
///
/// | name | kind | labels | meaning |
/// |---|---|---|---|
/// | `multiprocess_pool_items_total` | counter | `pool`, `outcome`: `done`, `panicked`, `died`, `timed_out`, `cancelled`, `failed` | items that have ended; see [`PoolTotals`](crate::PoolTotals) |
/// | `multiprocess_pool_retries_total` | counter | `pool` | attempts after the first |
/// | `multiprocess_pool_rejected_total` | counter | `pool` | calls that were refused because the pool was full |
/// | `multiprocess_pool_workers_recycled_total` | counter | `pool` | workers that ended after their share, their age or for their size |
/// | `multiprocess_pool_workers_restarted_total` | counter | `pool` | workers that died or were killed, and were replaced |
/// | `multiprocess_pool_workers` | gauge | `pool`, `state`: `busy`, `idle` | worker processes |
/// | `multiprocess_pool_items` | gauge | `pool`, `state`: `queued`, `running` | items that have not ended |
/// | `multiprocess_pool_resident_bytes` | gauge | `pool` | memory of all workers |
/// | `multiprocess_pool_wait_seconds` | histogram | `pool` | from the hand-in of an item until it was first given to a worker |
/// | `multiprocess_pool_run_seconds` | histogram | `pool` | run time of an item |
/// | `multiprocess_queue_items` | gauge | `queue` | items in a queue |
/// | `multiprocess_queue_capacity` | gauge | `queue` | items that a bounded queue takes |
/// | `multiprocess_queue_put_total` | counter | `queue` | items that were put into a queue, by any process, since it was created |
/// | `multiprocess_queue_taken_total` | counter | `queue` | items that were taken, also on lease; one that comes back is not counted again |
/// | `multiprocess_manager_up` | gauge | `manager` | 1 if the manager answered within a second, otherwise 0 |
/// | `multiprocess_manager_objects` | gauge | `manager` | objects of a manager |
/// | `multiprocess_manager_requests_total` | counter | `manager` | requests of other processes that a manager has begun: calls, batches, handles that were made, sent or dropped, results of waits that were taken, reports like this one |
/// | `multiprocess_manager_failed_calls_total` | counter | `manager` | calls that it answered by an error of kind `Panicked`, `Decode`, `Encode` or `Other`: a panic, arguments that cannot be read, a function that is not exposed. An empty, full or closed queue and a timeout are none |
///
/// # Accuracy
/// Times are known to within a factor of two, as in [`Histogram`]: each is recorded as three quarters of the limit of its bucket.
///
/// How long items stay in a queue and how long calls of a manager take is not reported: each would read the clock twice, also in
/// programs that report nothing. Nor are bytes. The figures here cost a put or a call nothing. The counters of a queue are right as long
/// as fewer than 2^32 items pass between two reports, and before the first.
///
/// # Cost
/// A report takes the lock of each pool once and reads one small file of /proc per worker. The recorder takes one sample per item for
/// each of the two histograms, some tens of nanoseconds. Nothing is done between reports.
///
/// # Drop
/// A reporter does not keep a pool alive: a pool that is dropped is reported as empty once, and then no more. It holds a handle of each
/// queue and manager. Its drop, and that of the futures that it returns, ends nothing but the reports.
#[derive(Default)]
pub struct MetricsReporter {
    sources: Sources,
    /// Of each pool.
    reported: Vec<Reported>,
    /// Of each queue.
    passed: Vec<Passed>,
}

/// Times of a pool as they were reported last: recorders of histograms take what came since.
#[derive(Default)]
struct Reported {
    waits: Histogram,
    runs: Histogram,
}

/// How many items were put into a queue, and how many taken.
#[derive(Default)]
struct Passed {
    /// As the queue counted them at the last report, modulo 2^32.
    counted: [u32; 2],
    totals: [u64; 2],
}

impl MetricsReporter {
    /// Creates a reporter of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a pool. Its figures have the label `pool` with this name.
    pub fn pool(mut self, name: impl Into<String>, pool: &Pool) -> Self {
        self.sources.add_pool(name.into(), pool);
        self.reported.push(Reported::default());
        self
    }

    /// Adds a queue. Its figures have the label `queue` with this name.
    pub fn queue<T: Item>(mut self, name: impl Into<String>, queue: &Queue<T>) -> Self {
        self.sources.add_queue(name.into(), queue);
        self.passed.push(Passed::default());
        self
    }

    /// Adds a joinable queue. Its figures have the label `queue` with this name.
    pub fn joinable_queue<T: Item>(mut self, name: impl Into<String>, queue: &JoinableQueue<T>) -> Self {
        self.sources.add_joinable_queue(name.into(), queue);
        self.passed.push(Passed::default());
        self
    }

    /// Adds a manager. Its figures have the label `manager` with this name.
    pub fn manager(mut self, name: impl Into<String>, manager: &Manager) -> Self {
        self.sources.add_manager(name.into(), manager);
        self
    }

    /// Hands all figures as they are now to the recorder. Waits for each manager's answer, a second at most. A dropped
    /// future may have reported a part of them.
    pub async fn report(&mut self) {
        describe();
        let pools = self.reported.iter_mut().zip(&self.sources.pools);
        let are_there: Vec<bool> = pools.map(|(reported, pool)| reported.report(pool)).collect();
        retain(&mut self.sources.pools, &are_there);
        retain(&mut self.reported, &are_there);
        self.sources.queues.iter().zip(&mut self.passed).for_each(|(queue, passed)| passed.report(queue));
        for manager in &self.sources.managers {
            let (name, answer) = (&manager.name, timer::within(ANSWER, (manager.counts)()).await);
            let counts = answer.ok().and_then(Result::ok);
            gauge!("multiprocess_manager_up", "manager" => name.clone()).set(f64::from(u8::from(counts.is_some())));
            let [objects, ..] = counts.unwrap_or_default();
            gauge!("multiprocess_manager_objects", "manager" => name.clone()).set(objects as f64);
            if let Some([_, requests, failed]) = counts {
                counter!("multiprocess_manager_requests_total", "manager" => name.clone()).absolute(requests);
                counter!("multiprocess_manager_failed_calls_total", "manager" => name.clone()).absolute(failed);
            }
        }
    }

    /// Reports at once and then after each `interval`, until there is nothing left to report: all its pools were dropped, and it has no
    /// queue or manager.
    pub async fn run(mut self, interval: Duration) {
        loop {
            self.report().await;
            if self.sources.is_empty() {
                return;
            }
            timer::sleep(interval).await;
        }
    }
}

impl std::fmt::Debug for MetricsReporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.sources.fmt("MetricsReporter", f)
    }
}

fn retain<T>(all: &mut Vec<T>, are_there: &[bool]) {
    let mut are_there = are_there.iter();
    all.retain(|_| are_there.next() == Some(&true));
}

impl Passed {
    fn report(&mut self, queue: &QueueSource) {
        gauge!("multiprocess_queue_items", "queue" => queue.name.clone()).set((queue.len)() as f64);
        if let Some(capacity) = queue.capacity {
            gauge!("multiprocess_queue_capacity", "queue" => queue.name.clone()).set(capacity as f64);
        }
        let Some(counted) = (queue.passed)() else { return };
        let before = std::mem::replace(&mut self.counted, counted);
        for ((total, now), before) in self.totals.iter_mut().zip(counted).zip(before) {
            *total += u64::from(now.wrapping_sub(before));
        }
        let [put, taken] = self.totals;
        counter!("multiprocess_queue_put_total", "queue" => queue.name.clone()).absolute(put);
        counter!("multiprocess_queue_taken_total", "queue" => queue.name.clone()).absolute(taken);
    }
}

impl Reported {
    /// Returns whether the pool is still there.
    fn report(&mut self, pool: &PoolSource) -> bool {
        let stats = pool.stats.stats().map(|(stats, _)| stats);
        let is_there = stats.is_some();
        self.report_stats(&pool.name, stats);
        is_there
    }

    fn report_stats(&mut self, name: &str, stats: Option<PoolStats>) {
        let gauges = |stats: &PoolStats| {
            let busy = stats.workers.iter().filter(|worker| worker.is_busy).count();
            let resident: u64 = stats.workers.iter().map(|worker| worker.resident).sum();
            let workers = |state, count: usize| {
                gauge!("multiprocess_pool_workers", "pool" => name.to_string(), "state" => state).set(count as f64);
            };
            workers("busy", busy);
            workers("idle", stats.workers.len() - busy);
            let items = |state, count: usize| {
                gauge!("multiprocess_pool_items", "pool" => name.to_string(), "state" => state).set(count as f64);
            };
            items("queued", stats.queued);
            items("running", stats.running);
            gauge!("multiprocess_pool_resident_bytes", "pool" => name.to_string()).set(resident as f64);
        };
        let Some(stats) = stats else { return gauges(&PoolStats::default()) };
        gauges(&stats);
        let totals = &stats.totals;
        let outcomes = [
            ("done", totals.done),
            ("panicked", totals.panicked),
            ("died", totals.died),
            ("timed_out", totals.timed_out),
            ("cancelled", totals.cancelled),
            ("failed", totals.failed),
        ];
        for (outcome, count) in outcomes {
            let items = counter!("multiprocess_pool_items_total", "pool" => name.to_string(), "outcome" => outcome);
            items.absolute(count);
        }
        counter!("multiprocess_pool_retries_total", "pool" => name.to_string()).absolute(totals.retried);
        counter!("multiprocess_pool_rejected_total", "pool" => name.to_string()).absolute(totals.rejected);
        counter!("multiprocess_pool_workers_recycled_total", "pool" => name.to_string()).absolute(totals.recycled);
        counter!("multiprocess_pool_workers_restarted_total", "pool" => name.to_string()).absolute(totals.restarted);
        let histograms = [
            ("multiprocess_pool_wait_seconds", &mut self.waits, stats.waits),
            ("multiprocess_pool_run_seconds", &mut self.runs, stats.runs),
        ];
        for (figure, before, now) in histograms {
            let histogram = histogram!(figure, "pool" => name.to_string());
            for ((limit, count), (_, known)) in now.fixed_buckets().zip(before.fixed_buckets()) {
                let more = count.saturating_sub(known);
                if more > 0 {
                    histogram.record_many(limit.as_secs_f64() * 0.75, more as usize);
                }
            }
            *before = now;
        }
    }
}

/// The recorder may have been installed since the last report.
fn describe() {
    let counters = [
        ("multiprocess_pool_items_total", "Items of a pool that have ended, by outcome"),
        ("multiprocess_pool_retries_total", "Attempts of items of a pool after the first"),
        ("multiprocess_pool_rejected_total", "Calls that were refused because the pool was full"),
        (
            "multiprocess_pool_workers_recycled_total",
            "Workers that ended after their share, their age or for their size",
        ),
        ("multiprocess_pool_workers_restarted_total", "Workers that died or were killed, and were replaced"),
        ("multiprocess_queue_put_total", "Items that were put into a queue"),
        ("multiprocess_queue_taken_total", "Items that were taken from a queue"),
        ("multiprocess_manager_requests_total", "Requests that a manager has begun"),
        ("multiprocess_manager_failed_calls_total", "Calls that a manager answered by an error"),
    ];
    counters.iter().for_each(|(name, meaning)| describe_counter!(*name, Unit::Count, *meaning));
    let gauges = [
        ("multiprocess_pool_workers", "Worker processes of a pool, by state"),
        ("multiprocess_pool_items", "Items of a pool that have not ended, by state"),
        ("multiprocess_queue_items", "Items in a queue"),
        ("multiprocess_queue_capacity", "Items that a bounded queue takes"),
        ("multiprocess_manager_up", "Whether the manager answered in time"),
        ("multiprocess_manager_objects", "Objects of a manager"),
    ];
    gauges.iter().for_each(|(name, meaning)| describe_gauge!(*name, Unit::Count, *meaning));
    describe_gauge!("multiprocess_pool_resident_bytes", Unit::Bytes, "Memory of all workers of a pool");
    let histograms = [
        ("multiprocess_pool_wait_seconds", "Time until an item was first given to a worker"),
        ("multiprocess_pool_run_seconds", "Run time of an item"),
    ];
    histograms.iter().for_each(|(name, meaning)| describe_histogram!(*name, Unit::Seconds, *meaning));
}
