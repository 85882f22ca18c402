//! What is done when its time has come.

use super::dispatch::take_back;
use super::{AGAIN, Effects, Event, Phase, Place, STARTS, Scheduler, Worker, later};
use crate::error::{Error, ErrorKind};
use crate::os::proc;
use crate::pool::group::{Chunk, Group};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Results of which a worker is quiet are looked for after this.
const LOOK_AFTER: Duration = Duration::from_millis(1);

/// A worker that had a deadline, and does not move for so long after others were given what it had, is replaced.
const STALLED: Duration = Duration::from_secs(1);

impl Scheduler {
    pub(in crate::pool) fn on(&mut self, event: Event, now: Instant, effects: &mut Effects) {
        match event {
            Event::Overrun(place) => self.overrun(place, now, effects),
            Event::Kill(place, item) => self.kill(place, item, effects),
            Event::Retry(group, chunk) => {
                let resting = group.items().resting;
                group.items().resting = resting.saturating_sub(1);
                self.again(&group, chunk, effects);
            }
            Event::Queued(group) => self.queued_out(&group, now, effects),
            Event::Share => self.share(now, effects),
            Event::Hire => {}
            Event::Look => self.look(effects),
            Event::Fetch => {
                self.is_fetch_planned = false;
                let mail = self.workers().map(|(_, worker)| worker.mail.clone()).filter(|mail| !mail.is_empty());
                effects.unfetched = mail.collect();
            }
            Event::Age(seat, generation) => {
                if self.worker(seat, generation).is_some() {
                    self.retire(seat, effects);
                }
            }
            Event::Initializer(seat, generation, timeout) => {
                if let Some(worker) = self.worker(seat, generation).filter(|worker| worker.is_awaited) {
                    let text = format!("the initializer of {} did not end within {timeout:?}", worker.name);
                    worker.kill(None);
                    worker.overdue = Some(Error::new(ErrorKind::Timeout, text));
                }
            }
            Event::Exit(seat, generation) => self.see_out(seat, generation, now, effects),
            Event::Idle => {
                self.is_idle_planned = false;
                self.send_home(now, effects);
            }
        }
    }

    fn overrun(&mut self, place: Place, now: Instant, effects: &mut Effects) {
        let default_grace = self.rules.grace;
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
            return self.at(later(now, timeout - has_run), Event::Overrun(place), effects);
        }
        worker.lane.ask_to_stop(place.number, item);
        self.at(later(now, grace), Event::Kill(place, item), effects);
        // What waits behind it need not wait for its end. The rest of its order is timed by the next timer.
        self.reclaim(place.seat, 1, effects);
        self.at(later(now, timeout.saturating_add(grace).max(AGAIN)), Event::Overrun(place), effects);
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
            return self.at(next, Event::Overrun(place), effects);
        }
        if proc::is_runnable(worker.pid) {
            // On a busy machine it has not had its turn; it is neither stopped nor frozen.
            return self.at(later(now, timeout.max(AGAIN)), Event::Overrun(place), effects);
        }
        let running = &mut worker.running[at];
        let claim = take_back(&worker.lane, &worker.outbox, place.number, running.done);
        let (from, end) = (claim.end.max(running.done), std::mem::replace(&mut running.end, claim.end));
        let has_begun = claim.started > running.done;
        worker.given -= end.saturating_sub(from) as usize;
        let (group, back) = (running.group.clone(), (from < end).then(|| running.chunk.part(from, end)));
        let Some(back) = back else { return self.at(later(now, timeout.max(AGAIN)), Event::Overrun(place), effects) };
        if has_begun {
            // Just now.
            self.again(&group, back, effects);
            return self.at(later(now, timeout.max(AGAIN)), Event::Overrun(place), effects);
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

    /// What a worker had went to others, as it did not begin it. If it still has not moved it is replaced.
    fn replace_stalled(&mut self, place: Place, now: Instant, effects: &mut Effects) {
        let Some(worker) = self.worker(place.seat, place.generation) else { return };
        let is_stalled = worker.phase == Phase::Serving && worker.running.is_empty() && worker.is_stalled();
        let Some((_, since)) = worker.stalled.filter(|_| is_stalled) else { return };
        let due = if worker.lane.is_ready() { since + STALLED } else { worker.born + STARTS };
        let due = if proc::is_runnable(worker.pid) { due.max(now + STALLED) } else { due };
        match now < due {
            true => self.at(due, Event::Overrun(place), effects),
            false => worker.kill(None),
        }
    }

    /// Kills the worker, if it is still at that very item.
    pub(in crate::pool) fn kill(&mut self, place: Place, item: u32, effects: &mut Effects) {
        // From here on nothing else can start there, so the kill hits this item or none.
        if self.find(place).is_none() {
            return;
        }
        self.reclaim(place.seat, 1, effects);
        self.collect(effects);
        let Some((worker, at)) = self.find(place) else { return };
        let running = &worker.running[at];
        if at > 0 || running.done > item || worker.lane.claim(place.number).started != item + 1 {
            return;
        }
        let is_cancelled = running.group.items().is_cancelled;
        let doom = match is_cancelled {
            true => running.group.was_cancelled(),
            false => running.group.timed_out(&worker.name),
        };
        worker.kill(Some(doom));
    }

    /// Sees to it that nothing of `group` waits for too long, from `now` on: one timer at a time does for all of it.
    pub(in crate::pool) fn watch_queue(&mut self, group: &Arc<Group>, now: Instant, effects: &mut Effects) {
        let Some(limit) = group.options.queue_timeout else { return };
        if !std::mem::replace(&mut group.items().is_watched, true) {
            self.at(later(now, limit), Event::Queued(group.clone()), effects);
        }
    }

    fn queued_out(&mut self, group: &Arc<Group>, now: Instant, effects: &mut Effects) {
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
        if is_empty {
            self.queue.was_emptied();
        }
        late.iter().for_each(|chunk| effects.fail_pending(group, chunk, || group.queued_out()));
        // What a worker has and has not begun waits as well.
        for (_, worker) in self.workers() {
            for running in worker.running.iter_mut() {
                if !Arc::ptr_eq(&running.group, group) {
                    continue;
                }
                if !is_late(&running.chunk) {
                    next = next.into_iter().chain(running.chunk.queued).min();
                } else {
                    let claim = take_back(&worker.lane, &worker.outbox, running.number, running.done);
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

    /// Sees to it that nobody sleeps for long because a worker is quiet about what turns out to be slow.
    pub(in crate::pool) fn plan_to_look(&mut self, effects: &mut Effects) {
        let is_quiet = |worker: &Worker| worker.running.iter().any(|running| running.is_quiet);
        if !self.is_look_planned && self.seats.iter().filter_map(|seat| seat.worker.as_ref()).any(is_quiet) {
            self.is_look_planned = true;
            let at = effects.now() + LOOK_AFTER;
            self.at(at, Event::Look, effects);
        }
    }

    /// Has workers tell of each result of the orders that they have by now, and takes in what came before.
    fn look(&mut self, effects: &mut Effects) {
        self.is_look_planned = false;
        for (_, worker) in self.workers() {
            for running in worker.running.iter_mut().filter(|running| running.is_quiet) {
                running.is_quiet = false;
                worker.lane.hark(running.number);
            }
        }
        self.collect(effects);
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;
    use crate::pool::group::Options;
    use crate::process::entry;

    #[test]
    fn what_waits_has_one_timer_however_much_it_is() {
        let (mut state, mut effects) = (Scheduler::default(), Effects::default());
        let options = Options { queue_timeout: Some(Duration::from_secs(3600)), ..Options::default() };
        let group = Arc::new(Group::new(entry::Call::of(|| ()), "f", options));
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
}
