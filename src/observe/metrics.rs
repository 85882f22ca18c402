//! Figures through the `metrics` facade.

use crate::channel::{Item, JoinableQueue, Queue};
use crate::error::Result;
use crate::manager::Manager;
use crate::os::timer;
use crate::pool::{Histogram, Pool, PoolStats, StatsSource};
use ::metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use futures_util::future::BoxFuture;
use std::time::Duration;

/// A manager that does not answer within this time counts as down until the next report.
const ANSWER: Duration = Duration::from_secs(1);

/// Reports figures of pools, queues and managers to the recorder of the [`metrics`](::metrics) crate.
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
/// | `multiprocess_manager_up` | gauge | `manager` | 1 if the manager answered within a second, otherwise 0 |
/// | `multiprocess_manager_objects` | gauge | `manager` | objects of a manager |
///
/// # Accuracy
/// Times are known to within a factor of two, as in [`Histogram`]: each is recorded as three quarters of the limit of its bucket.
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
    pools: Vec<PoolSource>,
    queues: Vec<QueueSource>,
    managers: Vec<(String, CountObjects)>,
}

type CountObjects = Box<dyn Fn() -> BoxFuture<'static, Result<usize>> + Send + Sync>;

struct PoolSource {
    name: String,
    stats: StatsSource,
    /// As they were reported last: recorders of histograms take what came since.
    waits: Histogram,
    runs: Histogram,
}

struct QueueSource {
    name: String,
    capacity: Option<usize>,
    len: Box<dyn Fn() -> usize + Send + Sync>,
}

impl MetricsReporter {
    /// Creates a reporter of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a pool. Its figures have the label `pool` with this name.
    pub fn pool(mut self, name: impl Into<String>, pool: &Pool) -> Self {
        let (waits, runs) = Default::default();
        self.pools.push(PoolSource { name: name.into(), stats: pool.stats_source(), waits, runs });
        self
    }

    /// Adds a queue. Its figures have the label `queue` with this name.
    pub fn queue<T: Item>(self, name: impl Into<String>, queue: &Queue<T>) -> Self {
        let (capacity, queue) = (queue.capacity(), queue.clone());
        self.queue_source(name.into(), capacity, move || queue.len())
    }

    /// Adds a joinable queue. Its figures have the label `queue` with this name.
    pub fn joinable_queue<T: Item>(self, name: impl Into<String>, queue: &JoinableQueue<T>) -> Self {
        let (capacity, queue) = (queue.capacity(), queue.clone());
        self.queue_source(name.into(), capacity, move || queue.len())
    }

    fn queue_source(
        mut self,
        name: String,
        capacity: Option<usize>,
        len: impl Fn() -> usize + Send + Sync + 'static,
    ) -> Self {
        self.queues.push(QueueSource { name, capacity, len: Box::new(len) });
        self
    }

    /// Adds a manager. Its figures have the label `manager` with this name.
    pub fn manager(mut self, name: impl Into<String>, manager: &Manager) -> Self {
        self.managers.push((name.into(), Box::new(manager.object_counter())));
        self
    }

    /// Hands all figures as they are now to the recorder. Waits for each manager's answer, a second at most. A dropped
    /// future may have reported a part of them.
    pub async fn report(&mut self) {
        describe();
        self.pools.retain_mut(PoolSource::report);
        self.queues.iter().for_each(QueueSource::report);
        for (name, count_objects) in &self.managers {
            let answer = timer::within(ANSWER, count_objects()).await;
            let objects = answer.ok().and_then(Result::ok);
            gauge!("multiprocess_manager_up", "manager" => name.clone()).set(f64::from(u8::from(objects.is_some())));
            let objects = objects.unwrap_or_default() as f64;
            gauge!("multiprocess_manager_objects", "manager" => name.clone()).set(objects);
        }
    }

    /// Reports at once and then after each `interval`, until there is nothing left to report: all its pools were dropped, and it has no
    /// queue or manager.
    pub async fn run(mut self, interval: Duration) {
        loop {
            self.report().await;
            if self.pools.is_empty() && self.queues.is_empty() && self.managers.is_empty() {
                return;
            }
            timer::sleep(interval).await;
        }
    }
}

impl std::fmt::Debug for MetricsReporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let pools = self.pools.iter().map(|pool| &pool.name).collect::<Vec<_>>();
        let queues = self.queues.iter().map(|queue| &queue.name).collect::<Vec<_>>();
        let managers = self.managers.iter().map(|(name, _)| name).collect::<Vec<_>>();
        let mut reporter = f.debug_struct("MetricsReporter");
        reporter.field("pools", &pools).field("queues", &queues).field("managers", &managers).finish()
    }
}

impl QueueSource {
    fn report(&self) {
        gauge!("multiprocess_queue_items", "queue" => self.name.clone()).set((self.len)() as f64);
        if let Some(capacity) = self.capacity {
            gauge!("multiprocess_queue_capacity", "queue" => self.name.clone()).set(capacity as f64);
        }
    }
}

impl PoolSource {
    /// Returns whether the pool is still there.
    fn report(&mut self) -> bool {
        let stats = self.stats.stats();
        let is_there = stats.is_some();
        self.report_stats(stats);
        is_there
    }

    fn report_stats(&mut self, stats: Option<PoolStats>) {
        let name = &self.name;
        let gauges = |stats: &PoolStats| {
            let busy = stats.workers.iter().filter(|worker| worker.is_busy).count();
            let resident: u64 = stats.workers.iter().map(|worker| worker.resident).sum();
            let workers = |state, count: usize| {
                gauge!("multiprocess_pool_workers", "pool" => name.clone(), "state" => state).set(count as f64);
            };
            workers("busy", busy);
            workers("idle", stats.workers.len() - busy);
            let items = |state, count: usize| {
                gauge!("multiprocess_pool_items", "pool" => name.clone(), "state" => state).set(count as f64);
            };
            items("queued", stats.queued);
            items("running", stats.running);
            gauge!("multiprocess_pool_resident_bytes", "pool" => name.clone()).set(resident as f64);
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
            let items = counter!("multiprocess_pool_items_total", "pool" => name.clone(), "outcome" => outcome);
            items.absolute(count);
        }
        counter!("multiprocess_pool_retries_total", "pool" => name.clone()).absolute(totals.retried);
        counter!("multiprocess_pool_rejected_total", "pool" => name.clone()).absolute(totals.rejected);
        counter!("multiprocess_pool_workers_recycled_total", "pool" => name.clone()).absolute(totals.recycled);
        counter!("multiprocess_pool_workers_restarted_total", "pool" => name.clone()).absolute(totals.restarted);
        let histograms = [
            ("multiprocess_pool_wait_seconds", &mut self.waits, stats.waits),
            ("multiprocess_pool_run_seconds", &mut self.runs, stats.runs),
        ];
        for (figure, before, now) in histograms {
            let histogram = histogram!(figure, "pool" => name.clone());
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
