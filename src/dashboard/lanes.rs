//! What each worker did and when, as seen by samples of [`PoolStats`](crate::pool::PoolStats).
//!
//! A sample shows the item that a worker runs at that moment and how many it has completed. Items that take longer than the time
//! between two samples have a span each; shorter ones are one span together.

use crate::pool::{WorkerDeath, WorkerStats};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// The time that lanes show.
pub(super) const WINDOW: Duration = Duration::from_secs(60);
/// So many workers have a lane: more are not readable.
pub(super) const MOST: usize = 64;
/// So many spans of a lane are kept: one for each sample, and some more. It is a power of two, as the room of a growing list is.
const MOST_SPANS: usize = 256;
/// The longest name of a worker, with what its allocation takes beside it.
#[cfg(test)]
const NAME: usize = 32;
/// So much memory lanes take at most. The nodes of their map may be half empty.
#[cfg(test)]
pub(super) const MOST_BYTES: usize =
    MOST * (MOST_SPANS * size_of::<Span>() + NAME + 2 * (size_of::<Key>() + size_of::<Lane>()));

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Doing {
    Nothing,
    /// One item of this function.
    Item(&'static str),
    /// Several short items of it. `None` if none was caught at work.
    Items(Option<&'static str>),
    /// It is dead, and not yet replaced.
    Dead,
}

#[derive(Clone, Debug)]
pub(super) struct Span {
    pub(super) doing: Doing,
    pub(super) from: Instant,
    pub(super) to: Instant,
}

/// One worker, and those that took its place.
#[derive(Default, Debug)]
pub(super) struct Lane {
    pid: u32,
    completed: u64,
    /// The function that it was last seen to run.
    task: Option<&'static str>,
    pub(super) spans: VecDeque<Span>,
}

impl Lane {
    /// When it last lost a worker, if that is shown.
    pub(super) fn died(&self) -> Option<Instant> {
        self.spans.iter().rev().find(|span| span.doing == Doing::Dead).map(|span| span.from)
    }

    fn push(&mut self, doing: Doing, from: Instant, to: Instant) {
        match self.spans.back_mut() {
            Some(last) if last.doing == doing && !matches!(doing, Doing::Item(_)) => last.to = to,
            _ => {
                self.spans.drain(..(self.spans.len() + 1).saturating_sub(MOST_SPANS));
                self.spans.push_back(Span { doing, from, to });
            }
        }
    }

    /// Extends what it did last until `to`.
    fn stretch(&mut self, to: Instant) {
        self.spans.back_mut().into_iter().for_each(|last| last.to = last.to.max(to));
    }

    /// Takes in a sample of its worker.
    fn record(&mut self, now: Instant, worker: &WorkerStats) {
        if self.pid != worker.pid {
            // Until this one was there, it was as before.
            self.stretch(now.checked_sub(worker.age).unwrap_or(now));
            (self.pid, self.completed) = (worker.pid, 0);
        }
        let completed = worker.tasks.saturating_sub(self.completed);
        self.completed = worker.tasks;
        self.task = worker.task.or(self.task);
        let last = self.spans.back();
        let (doing, since) = (last.map(|last| last.doing), last.map_or(now, |last| last.to));
        match (worker.task.filter(|_| worker.is_busy), completed) {
            (Some(task), 0) if doing == Some(Doing::Item(task)) => self.stretch(now),
            (Some(task), 0 | 1) => {
                let begun = worker.running_for.and_then(|time| now.checked_sub(time)).unwrap_or(now);
                let begun = if doing.is_some() { begun.max(since) } else { begun };
                self.stretch(begun);
                self.push(Doing::Item(task), begun, now);
            }
            // The item has ended between the two samples.
            (None, 1) if matches!(doing, Some(Doing::Item(_))) => self.stretch(now),
            (None, 0) => self.push(Doing::Nothing, since, now),
            _ => self.push(Doing::Items(self.task), since, now),
        }
    }

    fn record_death(&mut self, death: &WorkerDeath) {
        self.stretch(death.at);
        self.push(Doing::Dead, death.at, death.at);
        self.pid = death.pid;
    }
}

/// The name of a worker, and before that its length: the tenth comes after the ninth.
type Key = (usize, String);

/// The lanes of a pool.
#[derive(Default)]
pub(super) struct Lanes {
    lanes: BTreeMap<Key, Lane>,
    /// The time of the latest death that was recorded.
    last_death: Option<Instant>,
    /// Workers of the last sample that have no lane.
    pub(super) hidden: usize,
}

impl Lanes {
    /// The lanes with the names of their workers, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Lane)> {
        self.lanes.iter().map(|((_, name), lane)| (name.as_str(), lane))
    }

    pub(super) fn len(&self) -> usize {
        self.lanes.len()
    }

    /// Takes in a sample.
    pub(super) fn record(&mut self, now: Instant, workers: &[WorkerStats], deaths: &[WorkerDeath]) {
        let oldest = now.checked_sub(WINDOW);
        let known = self.last_death.or(oldest);
        for death in deaths.iter().filter(|death| Some(death.at) > known) {
            self.last_death = Some(death.at);
            self.lane(&death.name).into_iter().for_each(|lane| lane.record_death(death));
        }
        self.hidden = 0;
        for worker in workers {
            match self.lane(&worker.name) {
                Some(lane) => lane.record(now, worker),
                None => self.hidden += 1,
            }
        }
        for lane in self.lanes.values_mut() {
            if lane.spans.back().is_some_and(|last| last.doing == Doing::Dead) {
                lane.stretch(now);
            }
            while lane.spans.front().is_some_and(|first| Some(first.to) < oldest) {
                lane.spans.pop_front();
            }
        }
        self.lanes.retain(|_, lane| !lane.spans.is_empty());
    }

    /// `None` if it is one too many.
    fn lane(&mut self, name: &str) -> Option<&mut Lane> {
        let (has_room, key) = (self.lanes.len() < MOST, (name.len(), name.to_string()));
        match self.lanes.entry(key) {
            Entry::Occupied(entry) => Some(entry.into_mut()),
            Entry::Vacant(entry) => has_room.then(|| entry.insert(Lane::default())),
        }
    }

    /// The memory that they have been given.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        let of_lane = |((_, name), lane): (&Key, &Lane)| {
            name.capacity() + size_of::<Key>() + size_of::<Lane>() + lane.spans.capacity() * size_of::<Span>()
        };
        self.lanes.iter().map(of_lane).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn sample(pid: u32, tasks: u64, running: Option<(&'static str, Duration)>) -> [WorkerStats; 1] {
        let (is_busy, task, running_for) = (running.is_some(), running.map(|at| at.0), running.map(|at| at.1));
        let name = "PoolWorker-1".to_string();
        let (age, resident, peak) = (MS * 10, 0, 0);
        [WorkerStats { name, pid, age, tasks, is_busy, task, running_for, resident, peak }]
    }

    /// What the one lane shows: what, and from when to when in milliseconds.
    fn shown(lanes: &Lanes, start: Instant) -> Vec<(Doing, u128, u128)> {
        let (_, lane) = lanes.iter().next().unwrap();
        let ms = |at: Instant| at.saturating_duration_since(start).as_millis();
        lane.spans.iter().map(|span| (span.doing, ms(span.from), ms(span.to))).collect()
    }

    #[test]
    fn long_items_have_a_span_each_and_short_ones_share_one() {
        let (mut lanes, start) = (Lanes::default(), Instant::now());
        let samples = [
            (100, 0, None),
            (200, 0, Some(("long", MS * 50))),
            (300, 0, Some(("long", MS * 150))),
            (400, 1, Some(("long", MS * 20))),
            (500, 2, None),
            (600, 2, None),
            (700, 50, Some(("short", MS))),
            (800, 99, None),
        ];
        for (at, tasks, running) in samples {
            lanes.record(start + MS * at, &sample(1, tasks, running), &[]);
        }
        let wanted = [
            (Doing::Nothing, 100, 150),
            (Doing::Item("long"), 150, 380),
            (Doing::Item("long"), 380, 500),
            (Doing::Nothing, 500, 600),
            (Doing::Items(Some("short")), 600, 800),
        ];
        assert_eq!(shown(&lanes, start), wanted);
    }

    #[test]
    fn a_death_ends_a_span_and_lasts_until_the_replacement_is_there() {
        let (mut lanes, start) = (Lanes::default(), Instant::now());
        lanes.record(start + MS * 100, &sample(1, 0, Some(("f", MS * 100))), &[]);
        let (name, at) = ("PoolWorker-1".to_string(), start + MS * 150);
        let deaths = [WorkerDeath { name, pid: 1, at, status: None, why: String::new() }];
        lanes.record(start + MS * 200, &[], &deaths);
        assert_eq!(shown(&lanes, start), [(Doing::Item("f"), 0, 150), (Doing::Dead, 150, 200)]);
        lanes.record(start + MS * 300, &sample(2, 0, None), &deaths);
        let wanted = [(Doing::Item("f"), 0, 150), (Doing::Dead, 150, 290), (Doing::Nothing, 290, 300)];
        assert_eq!(shown(&lanes, start), wanted);
        let lane = lanes.iter().next().unwrap().1;
        assert_eq!((lane.pid, lane.died()), (2, Some(at)));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let (mut lanes, start) = (Lanes::default(), Instant::now());
        for n in 0..1000 {
            // Every other sample finds it idle.
            let running = (n % 2 == 0).then_some(("f", MS));
            lanes.record(start + MS * 250 * n, &sample(1, u64::from(n), running), &[]);
        }
        assert!(shown(&lanes, start).len() <= 2 + 60 * 4);
        let named = |n: u32| sample(n, 0, None).map(|worker| WorkerStats { name: format!("PoolWorker-{n}"), ..worker });
        let many: Vec<_> = (1..=1000).flat_map(named).collect();
        lanes.record(start + MS * 250_000, &many, &[]);
        assert_eq!((lanes.len(), lanes.hidden), (MOST, 1000 - MOST));
        let names: Vec<_> = lanes.iter().map(|(name, _)| name).collect();
        assert_eq!((names[0], names[9]), ("PoolWorker-1", "PoolWorker-10"));
        // Workers that left in order are forgotten.
        lanes.record(start + MS * 250_000 + WINDOW * 2, &[], &[]);
        assert_eq!(lanes.len(), 0);
    }
}
