//! What was sampled of pools and queues in the last minutes, in bounded memory.

#[cfg(test)]
use super::lanes;
use super::lanes::Lanes;
use crate::pool::{Deaths, Histogram, PoolStats, PoolTotals, WorkerStats};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The time that curves show.
pub(super) const WINDOW: Duration = Duration::from_secs(300);
/// A point of a curve is about so much time.
const STEP: Duration = Duration::from_secs(1);
/// So many functions have a letter and a colour of their own.
const FUNCTIONS: usize = 26;
/// So many workers are kept of a sample; of all there are sums.
pub(super) const WORKERS: usize = 64;
/// The longest name of a worker, with what its allocation takes beside it.
#[cfg(test)]
const NAME: usize = 32;
/// So many points of a curve are kept. The room of a growing list is a power of two.
const MOST_POINTS: usize = (WINDOW.as_secs() / STEP.as_secs()) as usize + 2;
#[cfg(test)]
const ROOM: usize = MOST_POINTS.next_power_of_two();
/// So much memory the history of a pool takes at most, beside the name that it was given. Deaths belong to the pool.
#[cfg(test)]
pub(super) const MOST_POOL_BYTES: usize = size_of::<PoolHistory>()
    + lanes::MOST_BYTES
    + ROOM * size_of::<Point>()
    + WORKERS * (size_of::<WorkerStats>() + NAME)
    + FUNCTIONS.next_power_of_two() * size_of::<&str>();
/// The same of a queue.
#[cfg(test)]
pub(super) const MOST_QUEUE_BYTES: usize = size_of::<QueueHistory>() + ROOM * size_of::<(Instant, usize)>();
/// Shorter times are shown as this.
const SHORTEST: f64 = 1e-6;

/// Median and 99th percentile.
pub(super) type Quantiles = Option<[f64; 2]>;

/// Some time of a pool.
#[derive(Clone, Debug)]
pub(super) struct Point {
    pub(super) at: Instant,
    pub(super) waiting: usize,
    pub(super) running: usize,
    /// Items a second that were done, and that came to another end.
    pub(super) done: f64,
    pub(super) failed: f64,
    /// Seconds that items ran and waited.
    pub(super) runs: Quantiles,
    pub(super) waits: Quantiles,
}

/// A pool.
#[derive(Default)]
pub(super) struct PoolHistory {
    pub(super) name: String,
    pub(super) lanes: Lanes,
    pub(super) points: VecDeque<Point>,
    /// The latest sample, with at most [`WORKERS`] workers; `None` before the first one, and after the drop of the pool.
    pub(super) stats: Option<PoolStats>,
    /// When the pool was first found dropped.
    pub(super) gone: Option<Instant>,
    /// Of all workers of that sample.
    pub(super) workers: WorkerSums,
    pub(super) deaths: Deaths,
    /// Functions of items, in the order in which they were first seen.
    pub(super) functions: Vec<&'static str>,
    /// As they were at the last point.
    before: Option<Before>,
    /// The most items that waited since then.
    most_waiting: usize,
}

/// What a rate is computed from.
struct Before {
    at: Instant,
    totals: PoolTotals,
    runs: Histogram,
    waits: Histogram,
}

impl Before {
    fn new(at: Instant, sample: &PoolStats) -> Self {
        Self { at, totals: sample.totals, runs: sample.runs.clone(), waits: sample.waits.clone() }
    }
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) struct WorkerSums {
    pub(super) count: usize,
    pub(super) busy: usize,
    pub(super) resident: u64,
}

impl WorkerSums {
    fn of(workers: &[WorkerStats]) -> Self {
        let busy = workers.iter().filter(|worker| worker.is_busy).count();
        Self { count: workers.len(), busy, resident: workers.iter().map(|worker| worker.resident).sum() }
    }
}

fn failures(totals: &PoolTotals) -> u64 {
    totals.panicked + totals.died + totals.timed_out + totals.cancelled + totals.failed
}

impl PoolHistory {
    pub(super) fn new(name: String) -> Self {
        Self { name, ..Self::default() }
    }

    /// Takes in a sample; `None` after the drop of the pool, whose past stays for [`WINDOW`].
    pub(super) fn record(&mut self, now: Instant, stats: Option<(PoolStats, Deaths)>) {
        let is_there = stats.is_some();
        let (mut sample, deaths) = stats.unwrap_or_default();
        sample.workers.iter().filter_map(|worker| worker.task).for_each(|function| self.note(function));
        self.lanes.record(now, &sample.workers, &deaths);
        self.most_waiting = self.most_waiting.max(sample.queued);
        keep_newest(&mut self.points, now, |point| point.at);
        if is_there {
            self.deaths = deaths;
            self.add_point(now, &sample);
        } else {
            self.gone.get_or_insert(now);
        }
        if self.is_past(now) {
            self.deaths = Deaths::default();
        }
        self.workers = WorkerSums::of(&sample.workers);
        sample.workers.truncate(WORKERS);
        sample.workers.shrink_to_fit();
        self.stats = is_there.then_some(sample);
    }

    /// Returns `true` if the pool was dropped before the time that is shown.
    pub(super) fn is_past(&self, now: Instant) -> bool {
        self.gone.is_some_and(|gone| now.saturating_duration_since(gone) >= WINDOW)
    }

    fn note(&mut self, function: &'static str) {
        if self.functions.len() < FUNCTIONS && !self.functions.contains(&function) {
            self.functions.push(function);
        }
    }

    /// Adds a point if it is time for one.
    fn add_point(&mut self, now: Instant, sample: &PoolStats) {
        let Some(before) = &self.before else {
            self.before = Some(Before::new(now, sample));
            return;
        };
        let time = now.saturating_duration_since(before.at);
        if time < STEP {
            return;
        }
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / time.as_secs_f64();
        let point = Point {
            at: now,
            waiting: std::mem::take(&mut self.most_waiting),
            running: sample.running,
            done: rate(sample.totals.done, before.totals.done),
            failed: rate(failures(&sample.totals), failures(&before.totals)),
            runs: quantiles(&before.runs, &sample.runs),
            waits: quantiles(&before.waits, &sample.waits),
        };
        add_newest(&mut self.points, point);
        self.before = Some(Before::new(now, sample));
    }

    /// The memory that it has been given, beside that of its name.
    #[cfg(test)]
    fn bytes(&self) -> usize {
        let workers = self.stats.as_ref().map(|stats| &stats.workers);
        let of_worker = |worker: &WorkerStats| size_of::<WorkerStats>() + worker.name.capacity();
        size_of::<Self>()
            + self.lanes.bytes()
            + self.points.capacity() * size_of::<Point>()
            + workers.map_or(0, |workers| {
                (workers.capacity() - workers.len()) * size_of::<WorkerStats>()
                    + workers.iter().map(of_worker).sum::<usize>()
            })
            + self.functions.capacity() * size_of::<&str>()
    }
}

/// A queue.
pub(super) struct QueueHistory {
    pub(super) name: String,
    pub(super) capacity: Option<usize>,
    pub(super) points: VecDeque<(Instant, usize)>,
    /// When the step of the last point began.
    since: Option<Instant>,
}

impl QueueHistory {
    pub(super) fn new(name: String, capacity: Option<usize>) -> Self {
        Self { name, capacity, points: VecDeque::new(), since: None }
    }

    /// Takes in a sample. Samples of one step are one point, which has the most items of them.
    pub(super) fn record(&mut self, now: Instant, len: usize) {
        let is_new = self.since.is_none_or(|since| now.saturating_duration_since(since) >= STEP);
        match self.points.back_mut() {
            Some(last) if !is_new => *last = (now, last.1.max(len)),
            _ => {
                add_newest(&mut self.points, (now, len));
                self.since = Some(now);
            }
        }
        keep_newest(&mut self.points, now, |(at, _)| *at);
    }
}

/// Adds a point, in place of the oldest one if there are too many.
fn add_newest<T>(points: &mut VecDeque<T>, point: T) {
    points.drain(..(points.len() + 1).saturating_sub(MOST_POINTS));
    points.push_back(point);
}

fn keep_newest<T>(points: &mut VecDeque<T>, now: Instant, at: impl Fn(&T) -> Instant) {
    let oldest = now.checked_sub(WINDOW);
    while points.front().is_some_and(|first| Some(at(first)) < oldest) {
        points.pop_front();
    }
}

/// The median and the 99th percentile of what has come to a histogram, in seconds; each as three quarters of the limit of its bucket.
fn quantiles(before: &Histogram, now: &Histogram) -> Quantiles {
    let more = || {
        let pairs = now.fixed_buckets().zip(before.fixed_buckets());
        pairs.map(|((limit, count), (_, known))| {
            ((limit.as_secs_f64() * 0.75).max(SHORTEST), count.saturating_sub(known))
        })
    };
    let count: u64 = more().map(|(_, count)| count).sum();
    let quantile = |part: f64| {
        let wanted = ((count as f64 * part).ceil() as u64).max(1);
        let mut seen = 0;
        more().find(|(_, count)| {
            seen += count;
            seen >= wanted
        })
    };
    Some([quantile(0.5)?.0, quantile(0.99)?.0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::WorkerDeath;

    #[test]
    fn a_point_has_the_rates_and_times_of_its_second_alone() {
        let (mut history, start) = (PoolHistory::new("p".into()), Instant::now());
        let mut stats = PoolStats::default();
        let mut record = |at, stats: &PoolStats| history.record(at, Some((stats.clone(), Deaths::default())));
        record(start, &stats);
        stats.totals.done = 100;
        stats.runs.add(Duration::from_millis(1), 100);
        record(start + STEP, &stats);
        stats.totals.done = 110;
        stats.totals.died = 4;
        stats.queued = 7;
        stats.runs.add(Duration::from_secs(1), 10);
        record(start + STEP * 3 / 2, &stats);
        stats.queued = 1;
        record(start + STEP * 3, &stats);
        record(start + STEP * 4, &stats);
        let shown: Vec<_> = history.points.iter().map(|point| (point.done, point.failed, point.waiting)).collect();
        assert_eq!(shown, [(100.0, 0.0, 0), (5.0, 2.0, 7), (0.0, 0.0, 1)]);
        let near = |runs: Quantiles, seconds: f64| {
            runs.is_some_and(|all| all.iter().all(|one| (seconds / 2.0..seconds * 2.0).contains(one)))
        };
        let runs: Vec<_> = history.points.iter().map(|point| point.runs).collect();
        assert!(near(runs[0], 0.001) && near(runs[1], 1.0) && runs[2].is_none(), "{runs:?}");
    }

    #[test]
    fn what_is_kept_is_bounded_and_outlives_the_pool_for_a_while() {
        let (mut history, mut queue, start) =
            (PoolHistory::new("p".into()), QueueHistory::new("q".into(), None), Instant::now());
        let mut now = start;
        for n in 0..4000 {
            now = start + STEP / 4 * n;
            history.record(now, Some(Default::default()));
            queue.record(now, n as usize);
        }
        assert!((290..=301).contains(&history.points.len()), "{}", history.points.len());
        assert!((290..=302).contains(&queue.points.len()), "{}", queue.points.len());
        let death = WorkerDeath { name: "w".into(), pid: 1, at: now, status: None, why: String::new() };
        history.record(now, Some((PoolStats::default(), Deaths::new(vec![death]))));
        history.record(now + STEP, None);
        assert!(history.stats.is_none() && history.points.len() > 290 && history.deaths.len() == 1);
        history.record(now + WINDOW, None);
        assert!(!history.is_past(now + WINDOW) && history.deaths.len() == 1);
        history.record(now + WINDOW + STEP, None);
        assert!(history.is_past(now + WINDOW + STEP) && history.deaths.is_empty() && history.points.is_empty());
    }

    fn worker(n: u32, round: u32) -> WorkerStats {
        WorkerStats {
            name: format!("PoolWorker-{n}"),
            pid: n,
            age: Duration::from_secs(1000),
            tasks: u64::from(round),
            is_busy: round.is_multiple_of(2),
            task: Some(["f", "g", "h"][(round % 3) as usize]),
            running_for: Some(Duration::from_millis(1)),
            resident: 1,
            peak: 1,
        }
    }

    /// Thousands of workers that do and become something else all the time and die, sampled more often than ever happens.
    #[test]
    fn the_busiest_pool_and_queue_take_no_more_memory_than_is_stated() {
        let (mut history, mut queue, start) =
            (PoolHistory::new(String::new()), QueueHistory::new(String::new(), None), Instant::now());
        for round in 0..2000 {
            let now = start + STEP / 10 * round;
            let workers = (4000..4100).map(|n| worker(n, round)).collect();
            let died = |n: u32| WorkerDeath {
                name: format!("PoolWorker-{n}"),
                pid: n,
                at: now - Duration::from_millis(u64::from(4064 - n)),
                status: None,
                why: "x".repeat(1000),
            };
            let stats = PoolStats { workers, ..PoolStats::default() };
            history.record(now, Some((stats, Deaths::new((4000..4064).map(died).collect()))));
            queue.record(now + STEP * round, round as usize);
        }
        assert_eq!(history.workers, WorkerSums { count: 100, busy: 0, resident: 100 });
        assert_eq!(history.stats.as_ref().map(|stats| stats.workers.len()), Some(WORKERS));
        let bytes = history.bytes();
        assert!(bytes <= MOST_POOL_BYTES, "{bytes} and not {MOST_POOL_BYTES}");
        assert!(bytes > MOST_POOL_BYTES / 2, "the limit is far from the truth: {bytes} of {MOST_POOL_BYTES}");
        let bytes = size_of::<QueueHistory>() + queue.points.capacity() * size_of::<(Instant, usize)>();
        assert!((MOST_QUEUE_BYTES / 2..=MOST_QUEUE_BYTES).contains(&bytes), "{bytes} and not {MOST_QUEUE_BYTES}");
    }
}
