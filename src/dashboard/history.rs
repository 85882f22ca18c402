//! What was sampled of pools and queues in the last minutes, in bounded memory.

use super::lanes::Lanes;
use crate::pool::{Histogram, PoolStats, PoolTotals, WorkerDeath};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The time that curves show.
pub(super) const WINDOW: Duration = Duration::from_secs(300);
/// A point of a curve is about so much time.
const STEP: Duration = Duration::from_secs(1);
/// So many functions have a letter and a colour of their own.
const FUNCTIONS: usize = 26;
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
    /// The latest sample; `None` after the drop of the pool.
    pub(super) stats: Option<PoolStats>,
    pub(super) deaths: Vec<WorkerDeath>,
    /// Functions of items, in the order in which they were first seen.
    pub(super) functions: Vec<&'static str>,
    /// As they were at the last point.
    before: Option<(Instant, PoolStats)>,
    /// The most items that waited since then.
    most_waiting: usize,
}

fn failures(totals: &PoolTotals) -> u64 {
    totals.panicked + totals.died + totals.timed_out + totals.cancelled + totals.failed
}

impl PoolHistory {
    pub(super) fn new(name: String) -> Self {
        Self { name, ..Self::default() }
    }

    /// Takes in a sample; `None` after the drop of the pool, whose past stays for a while.
    pub(super) fn record(&mut self, now: Instant, stats: Option<PoolStats>) {
        let is_there = stats.is_some();
        let mut sample = stats.unwrap_or_default();
        sample.workers.iter().filter_map(|worker| worker.task).for_each(|function| self.note(function));
        self.lanes.record(now, &sample);
        self.most_waiting = self.most_waiting.max(sample.queued);
        keep_newest(&mut self.points, now, |point| point.at);
        if is_there {
            self.deaths = std::mem::take(&mut sample.deaths);
            self.add_point(now, &sample);
        }
        self.stats = is_there.then_some(sample);
    }

    fn note(&mut self, function: &'static str) {
        if self.functions.len() < FUNCTIONS && !self.functions.contains(&function) {
            self.functions.push(function);
        }
    }

    /// Adds a point if it is time for one.
    fn add_point(&mut self, now: Instant, sample: &PoolStats) {
        let Some((then, before)) = &self.before else {
            self.before = Some((now, sample.clone()));
            return;
        };
        let time = now.saturating_duration_since(*then);
        if time < STEP {
            return;
        }
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / time.as_secs_f64();
        self.points.push_back(Point {
            at: now,
            waiting: std::mem::take(&mut self.most_waiting),
            running: sample.running,
            done: rate(sample.totals.done, before.totals.done),
            failed: rate(failures(&sample.totals), failures(&before.totals)),
            runs: quantiles(&before.runs, &sample.runs),
            waits: quantiles(&before.waits, &sample.waits),
        });
        self.before = Some((now, sample.clone()));
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
                self.points.push_back((now, len));
                self.since = Some(now);
            }
        }
        keep_newest(&mut self.points, now, |(at, _)| *at);
    }
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

    #[test]
    fn a_point_has_the_rates_and_times_of_its_second_alone() {
        let (mut history, start) = (PoolHistory::new("p".into()), Instant::now());
        let mut stats = PoolStats::default();
        history.record(start, Some(stats.clone()));
        stats.totals.done = 100;
        stats.runs.add(Duration::from_millis(1), 100);
        history.record(start + STEP, Some(stats.clone()));
        stats.totals.done = 110;
        stats.totals.died = 4;
        stats.queued = 7;
        stats.runs.add(Duration::from_secs(1), 10);
        history.record(start + STEP * 3 / 2, Some(stats.clone()));
        stats.queued = 1;
        history.record(start + STEP * 3, Some(stats.clone()));
        history.record(start + STEP * 4, Some(stats));
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
            history.record(now, Some(PoolStats::default()));
            queue.record(now, n as usize);
        }
        assert!((290..=301).contains(&history.points.len()), "{}", history.points.len());
        assert!((290..=302).contains(&queue.points.len()), "{}", queue.points.len());
        history.record(now + STEP, None);
        assert!(history.stats.is_none() && history.points.len() > 290);
        history.record(now + WINDOW * 2, None);
        assert!(history.points.is_empty());
    }
}
