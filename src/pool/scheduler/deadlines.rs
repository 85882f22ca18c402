//! Timers: what each does when its time has come.

use super::effects::{Effects, Place};
use super::queue::Queue;
use super::worker::{Phase, Worker, take_back};
use super::{AGAIN, RAREST_SWEEP, STARTS, SWEEP, Scheduler, later};
use crate::error::{Error, ErrorKind, Topic};
use crate::os::proc;
use crate::pool::call_items::CallItems;
use crate::pool::chunk::Chunk;
use std::cmp::Reverse;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Results of which a worker is quiet are looked for after this; those of tiny items sooner.
const QUIET_CHECK_AFTER: Duration = Duration::from_millis(2);
const TINY_CHECK_AFTER: Duration = Duration::from_millis(1);

/// A worker that had a deadline, and does not move for so long after its items went to others, is replaced.
const STALLED: Duration = Duration::from_secs(1);

pub(super) enum DueEvent {
    /// An item may have run for its time.
    Overrun(Place),
    /// An item that was asked to stop has had its grace.
    Kill(Place, u32),
    Retry(Arc<CallItems>, Chunk),
    /// Something may have waited too long for its start.
    Queued(Weak<CallItems>),
    /// A worker is idle while another has items ahead.
    Share,
    /// A seat's back-off is over.
    Spawn,
    /// A worker is old enough.
    Age(usize, u64),
    /// A worker's initializer has run for its time.
    Initializer(usize, u64, Duration),
    /// A worker that was to end has had the time for it.
    Exit(usize, u64),
    /// A worker may have been idle for long enough.
    Idle,
    /// Quiet workers may have put results.
    CheckQuiet,
    /// A caller may not fetch its large results.
    Fetch,
    /// Results may lie in lanes whose marks are gone.
    Sweep,
}

pub(super) struct Timer {
    pub(super) at: Instant,
    pub(super) event: DueEvent,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}
impl Eq for Timer {}
impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

impl Scheduler {
    /// Has `event` happen at `at`.
    pub(super) fn at(&mut self, at: Instant, event: DueEvent, effects: &mut Effects) {
        self.timers.push(Reverse(Timer { at, event }));
        if self.timers.len() > self.most_timers.max(64) {
            self.forget_timers();
        }
        if self.alert.is_none_or(|alert| at < alert) {
            self.alert = Some(at);
            effects.nudge = true;
        }
    }

    /// Drops timers that do not matter any more: a deadline of an hour is mostly for an item
    /// of a millisecond.
    fn forget_timers(&mut self) {
        let timers = std::mem::take(&mut self.timers);
        self.timers = timers.into_iter().filter(|Reverse(timer)| self.matters(&timer.event)).collect();
        self.most_timers = 2 * self.timers.len();
    }

    fn matters(&self, event: &DueEvent) -> bool {
        let worker =
            |seat: usize, generation: u64| self.seats.get(seat).filter(|worker| worker.generation == generation);
        match event {
            DueEvent::Overrun(place) | DueEvent::Kill(place, _) => {
                worker(place.seat, place.generation).is_some_and(|worker| {
                    let mut running = worker.running.iter();
                    worker.stalled.is_some() || running.any(|running| running.number == place.number)
                })
            }
            DueEvent::Queued(group) => group.upgrade().is_some_and(|group| {
                let mut items = group.items();
                // The next item has it watched again.
                items.is_watched = items.out > 0;
                items.is_watched
            }),
            DueEvent::Age(seat, generation)
            | DueEvent::Exit(seat, generation)
            | DueEvent::Initializer(seat, generation, _) => worker(*seat, *generation).is_some(),
            DueEvent::Retry(..)
            | DueEvent::Share
            | DueEvent::Spawn
            | DueEvent::Idle
            | DueEvent::CheckQuiet
            | DueEvent::Fetch
            | DueEvent::Sweep => true,
        }
    }

    pub(super) fn on(&mut self, event: DueEvent, now: Instant, effects: &mut Effects) {
        match event {
            DueEvent::Overrun(place) => self.overrun(place, now, effects),
            DueEvent::Kill(place, item) => self.kill(place, item, effects),
            DueEvent::Retry(group, chunk) => {
                let resting = group.items().resting;
                group.items().resting = resting.saturating_sub(1);
                self.again(&group, chunk, effects);
            }
            DueEvent::Queued(group) => group.upgrade().iter().for_each(|group| self.queued_out(group, now, effects)),
            DueEvent::Share => self.share(now, effects),
            DueEvent::Spawn => self.is_spawn_planned = None,
            DueEvent::CheckQuiet => self.check_quiet(effects),
            DueEvent::Sweep => self.sweep(effects),
            DueEvent::Fetch => {
                self.is_fetch_planned = false;
                while let Some(seat) = self.side_result_seats.pop_first() {
                    let side_results = self.seats.get(seat).map(|worker| worker.side_results.clone());
                    effects.unfetched.extend(side_results.filter(|side_results| !side_results.is_empty()));
                }
            }
            DueEvent::Age(seat, generation) => {
                if self.worker(seat, generation).is_some() {
                    self.retire(seat, effects);
                }
            }
            DueEvent::Initializer(seat, generation, timeout) => {
                if let Some(worker) = self.worker(seat, generation).filter(|worker| worker.is_awaited) {
                    let text = format!("the initializer of {} did not end within {timeout:?}", worker.name);
                    worker.kill(None);
                    worker.overdue = Some(Error::new(ErrorKind::Timeout, text).explained_by(Topic::Initializer));
                }
            }
            DueEvent::Exit(seat, generation) => self.end_in_time(seat, generation, now, effects),
            DueEvent::Idle => {
                self.is_idle_planned = false;
                self.retire_idle(now, effects);
            }
        }
    }

    fn overrun(&mut self, place: Place, now: Instant, effects: &mut Effects) {
        let default_grace = self.config.grace;
        let Some((worker, at)) = self.find(place) else { return self.replace_stalled(place, now, effects) };
        let running = &worker.running[at];
        let Some(timeout) = running.group.options.timeout else { return };
        let grace = running.group.options.grace.unwrap_or(default_grace);
        let claim = worker.lane.claim(place.number);
        if claim.started <= running.done {
            return self.not_begun(place, (timeout, grace), now, effects);
        }
        let item = claim.started - 1;
        let has_run = match worker.lane.has_run(place.number, item) {
            Some(has_run) => has_run,
            // Not noted yet; if it was like that the last time, its worker has been stopped right there.
            None if worker.running[at].unnoted == Some(item) => timeout,
            None => {
                worker.running[at].unnoted = Some(item);
                Duration::ZERO
            }
        };
        if has_run < timeout {
            return self.at(later(now, timeout - has_run), DueEvent::Overrun(place), effects);
        }
        worker.lane.ask_to_stop(place.number, item);
        self.at(later(now, grace), DueEvent::Kill(place, item), effects);
        // Items behind it need not wait for its end. The rest of its order is timed by the next timer.
        self.reclaim(place.seat, 1, effects);
        self.at(later(now, timeout.saturating_add(grace).max(AGAIN)), DueEvent::Overrun(place), effects);
    }

    /// The next item of an order has not begun: it waits behind another, its worker is about to begin it, or that does
    /// not run.
    fn not_begun(&mut self, place: Place, (timeout, grace): (Duration, Duration), now: Instant, effects: &mut Effects) {
        let Some((worker, at)) = self.find(place) else { return };
        let due = match at {
            0 => worker.due(timeout.saturating_add(grace), now).unwrap_or(now),
            // Behind another: its time has not come.
            _ => later(now, timeout.max(AGAIN)),
        };
        if now < due {
            // It may begin long before that, and then has no more than its time.
            let next = due.min(later(now, timeout)).max(now + AGAIN);
            return self.at(next, DueEvent::Overrun(place), effects);
        }
        if proc::is_runnable(worker.pid) {
            // On a busy machine it has not had its turn; it is neither stopped nor frozen.
            return self.at(later(now, timeout.max(AGAIN)), DueEvent::Overrun(place), effects);
        }
        let running = &mut worker.running[at];
        let claim = take_back(&worker.lane, &worker.side_orders, place.number, running.done);
        let (from, end) = (claim.end.max(running.done), std::mem::replace(&mut running.end, claim.end));
        let has_begun = claim.started > running.done;
        worker.given -= end.saturating_sub(from) as usize;
        let (group, back) = (running.group.clone(), (from < end).then(|| running.chunk.part(from, end)));
        let Some(back) = back else {
            return self.at(later(now, timeout.max(AGAIN)), DueEvent::Overrun(place), effects);
        };
        if has_begun {
            // Just now.
            self.again(&group, back, effects);
            return self.at(later(now, timeout.max(AGAIN)), DueEvent::Overrun(place), effects);
        }
        let error = group.was_not_begun(&worker.name);
        worker.pop_complete(None, &mut Vec::new());
        if back.count > 1 {
            self.again(&group, back.part(1, back.count), effects);
        }
        self.fail_or_retry(&group, &back, 0, error, effects);
        self.reclaim(place.seat, 1, effects);
        if let Some(worker) = self.worker(place.seat, place.generation) {
            worker.kill(None);
        }
    }

    /// A worker's items went to others, as it did not begin them. If it still has not moved it is replaced.
    fn replace_stalled(&mut self, place: Place, now: Instant, effects: &mut Effects) {
        let Some(worker) = self.worker(place.seat, place.generation) else { return };
        let is_stalled = worker.phase == Phase::Serving && worker.running.is_empty() && worker.is_stalled();
        let Some((_, since)) = worker.stalled.filter(|_| is_stalled) else { return };
        let due = if worker.lane.is_ready() { since + STALLED } else { worker.born + STARTS };
        let due = if proc::is_runnable(worker.pid) { due.max(now + STALLED) } else { due };
        match now < due {
            true => self.at(due, DueEvent::Overrun(place), effects),
            false => worker.kill(None),
        }
    }

    /// Kills the worker, if it is still at that very item.
    pub(super) fn kill(&mut self, place: Place, item: u32, effects: &mut Effects) {
        // From here on nothing else can start there, so the kill hits this item or none.
        if self.find(place).is_none() {
            return;
        }
        self.reclaim(place.seat, 1, effects);
        self.seats.suspect(place.seat);
        self.collect(effects);
        let Some((worker, at)) = self.find(place) else { return };
        let running = &worker.running[at];
        if at > 0 || running.done > item || worker.lane.claim(place.number).started != item + 1 {
            return;
        }
        let is_cancelled = running.group.items().is_cancelled;
        let kill_reason = match is_cancelled {
            true => running.group.was_cancelled(),
            false => running.group.timed_out(&worker.name),
        };
        worker.kill(Some(kill_reason));
    }

    /// Sees to it that nothing of `call_items` waits for too long, from `now` on: one timer at a time does for all of it.
    pub(super) fn watch_queue(&mut self, group: &Arc<CallItems>, now: Instant, effects: &mut Effects) {
        let Some(limit) = group.options.queue_timeout else { return };
        if !std::mem::replace(&mut group.items().is_watched, true) {
            self.at(later(now, limit), DueEvent::Queued(Arc::downgrade(group)), effects);
        }
    }

    fn queued_out(&mut self, group: &Arc<CallItems>, now: Instant, effects: &mut Effects) {
        let Some(limit) = group.options.queue_timeout else { return };
        let is_late = |chunk: &Chunk| chunk.queued.is_some_and(|queued| now >= later(queued, limit));
        let (late, mut next, is_empty) = {
            let mut items = group.items();
            items.is_watched = false;
            let (late, rest): (Vec<_>, Vec<_>) = items.pending.drain(..).partition(is_late);
            items.pending = rest.into();
            let is_empty = items.is_queued && items.pending.is_empty();
            (late, items.pending.iter().filter_map(|chunk| chunk.queued).min(), is_empty)
        };
        self.no_longer_wait(group, late.iter());
        if is_empty {
            self.queue_of(group).into_iter().for_each(Queue::was_emptied);
        }
        late.iter().for_each(|chunk| effects.fail_pending(group, chunk, || group.queued_out()));
        // Items that a worker has and has not begun wait as well.
        for seat in group.seats() {
            let Some(worker) = self.seats.worker(seat) else { continue };
            for running in worker.running.iter_mut() {
                if !Arc::ptr_eq(&running.group, group) {
                    continue;
                }
                if !is_late(&running.chunk) {
                    next = next.into_iter().chain(running.chunk.queued).min();
                } else {
                    let claim = take_back(&worker.lane, &worker.side_orders, running.number, running.done);
                    worker.given -= (running.end - claim.end) as usize;
                    effects.fail(group, &running.chunk, (claim.end, running.end), || group.queued_out());
                    running.end = claim.end;
                }
            }
            worker.pop_complete(None, &mut Vec::new());
        }
        if let Some(next) = next {
            self.watch_queue(group, next, effects);
        }
    }

    /// Sees to it that results are found whose marks are gone, in a pool that looks into marked lanes only.
    pub(super) fn plan_sweep(&mut self, effects: &mut Effects) {
        if self.out > effects.settled && !self.looks_into_all() && !std::mem::replace(&mut self.is_sweep_planned, true)
        {
            let at = effects.now() + self.sweep_after;
            self.at(at, DueEvent::Sweep, effects);
        }
    }

    /// Looks into all lanes.
    fn sweep(&mut self, effects: &mut Effects) {
        self.is_sweep_planned = false;
        self.collect(effects);
        (0..self.seats.len()).for_each(|seat| self.seats.suspect(seat));
        self.sweep_after = match self.collect(effects) {
            true => SWEEP,
            false => (2 * self.sweep_after).min(RAREST_SWEEP),
        };
        self.plan_sweep(effects);
    }

    /// Plans a check of quiet workers: a caller must not sleep for long because items turn out to be slow.
    pub(super) fn plan_quiet_check(&mut self, effects: &mut Effects) {
        if !self.is_quiet_check_planned && !self.seats.index_mut().quiet.is_empty() {
            self.is_quiet_check_planned = true;
            let after = if self.has_tiny { TINY_CHECK_AFTER } else { QUIET_CHECK_AFTER };
            let at = effects.now() + after;
            self.at(at, DueEvent::CheckQuiet, effects);
        }
    }

    /// Takes the results that quiet workers have put. If none has come since the last check, or items are tiny and their caller should
    /// submit more, workers notify of each result of the orders that they have by now.
    fn check_quiet(&mut self, effects: &mut Effects) {
        self.is_quiet_check_planned = false;
        let quiet: Vec<usize> = self.seats.index_mut().quiet.iter().collect();
        quiet.iter().for_each(|seat| self.seats.suspect(*seat));
        self.collect(effects);
        let has_come = std::mem::replace(&mut self.results_checked, self.results_taken) != self.results_taken;
        if !std::mem::take(&mut self.has_tiny) && has_come {
            for seat in quiet {
                let is_quiet = |worker: &Worker| worker.running.iter().any(|running| running.is_quiet);
                let is_quiet = self.seats.get(seat).is_some_and(is_quiet);
                self.seats.index_mut().quiet.set(seat, is_quiet);
            }
            return self.plan_quiet_check(effects);
        }
        while let Some(seat) = self.seats.index_mut().quiet.pop_first() {
            let Some(worker) = self.seats.worker(seat) else { continue };
            for running in worker.running.iter_mut().filter(|running| running.is_quiet) {
                running.is_quiet = false;
                worker.lane.enable_notification(running.number);
            }
            self.seats.suspect(seat);
        }
        self.collect(effects);
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;
    use crate::pool::options::Options;
    use crate::process::entry;

    #[test]
    fn many_waiting_items_of_a_call_share_one_timer() {
        let (mut state, mut effects) = (Scheduler::of_test(), Effects::default());
        let options = Options { queue_timeout: Some(Duration::from_secs(3600)), ..Options::default() };
        let group = Arc::new(CallItems::new(entry::Call::of(|| ()), "f", options));
        let now = Instant::now();
        for first in 0..1000 {
            group.items().out += 1;
            let mut chunk = Chunk::new(first);
            (chunk.count, chunk.queued) = (1, Some(now + Duration::from_secs(first)));
            state.watch_queue(&group, now, &mut effects);
            state.enqueue(&group, [chunk].into_iter(), false);
        }
        assert_eq!(state.timers.len(), 1);
        // The first half has waited for too long, and the next of the others is watched.
        state.timers.clear();
        state.queued_out(&group, now + Duration::from_secs(3600 + 499), &mut effects);
        assert_eq!((effects.settled, group.items().pending.len(), state.timers.len()), (500, 500, 1));
        assert_eq!(state.timers.peek().map(|timer| timer.0.at), Some(now + Duration::from_secs(3600 + 500)));
    }

    #[test]
    fn timers_of_completed_items_are_dropped() {
        let (mut state, mut effects) = (Scheduler::of_test(), Effects::default());
        let far_off = Instant::now() + Duration::from_secs(3600);
        for number in 0..100_000 {
            state.at(far_off, DueEvent::Overrun(Place { seat: 0, generation: 1, number }), &mut effects);
            state.at(far_off, DueEvent::Age(0, u64::from(number)), &mut effects);
        }
        assert!(state.timers.len() <= 65, "{}", state.timers.len());
        for _ in 0..200 {
            state.at(far_off, DueEvent::Spawn, &mut effects);
        }
        assert!(state.timers.len() >= 200, "what matters is kept");
    }
}
