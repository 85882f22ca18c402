//! The end of a worker and its item, of items that cannot be run any more, and of the pool.

use super::deadlines::DueEvent;
use super::effects::Effects;
use super::errors::{broken, stranded, terminated};
use super::worker::{Phase, Running, Worker};
use super::{DEATHS, Scheduler, later, worker_name};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::call_items::CallItems;
use crate::pool::chunk::Chunk;
use crate::pool::stats::WorkerDeath;
use std::cmp::Reverse;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Workers that end this soon, so often in a row, without having done anything, are a crash loop.
const CRASH_LOOP: u32 = 5;
const BACK_OFF: Duration = Duration::from_millis(20);

impl Scheduler {
    /// Retires a worker: it ends after the item that it runs.
    pub(super) fn retire(&mut self, seat: usize, effects: &mut Effects) {
        if let Some(worker) = self.seats.worker(seat).filter(|worker| worker.checkout > 0) {
            worker.is_due = true;
            return;
        }
        self.reclaim(seat, 1, effects);
        self.close_lane(seat, effects);
    }

    /// Retires workers that have been idle for long enough.
    pub(super) fn retire_idle(&mut self, now: Instant, effects: &mut Effects) {
        let (least, idle_timeout) = (*self.workers.start(), self.config.idle_timeout);
        self.seats.update();
        let index = self.seats.index();
        let mut spare = index.taken.len().saturating_sub(least);
        let (mut gone, mut next) = (Vec::new(), None);
        if spare > 0 {
            for seat in index.serving.iter() {
                let Some(worker) = self.seats.get(seat).filter(|worker| worker.checkout == 0) else { continue };
                let Some(at) = worker.idle_since.map(|since| later(since, idle_timeout)) else { continue };
                if spare > 0 && now >= at {
                    spare -= 1;
                    gone.push(seat);
                } else if spare > 0 {
                    next = Some(next.map_or(at, |next: Instant| next.min(at)));
                }
            }
        }
        gone.into_iter().for_each(|seat| self.retire(seat, effects));
        if let Some(next) = next.filter(|_| !std::mem::replace(&mut self.is_idle_planned, true)) {
            self.at(next, DueEvent::Idle, effects);
        }
    }

    /// Plans to retire idle workers.
    fn plan_to_retire_idle(&mut self, effects: &mut Effects) {
        let least = *self.workers.start();
        if self.is_idle_planned || least == *self.workers.end() {
            return;
        }
        self.seats.update();
        let index = self.seats.index();
        if index.taken.len() > least && !index.open[0].is_empty() {
            self.is_idle_planned = true;
            let at = later(effects.now(), self.config.idle_timeout);
            self.at(at, DueEvent::Idle, effects);
        }
    }

    /// A worker has ended: its items go to others, except the one that it ran.
    pub(super) fn reap(&mut self, seat: usize, generation: u64, status: &Result<ExitStatus>, effects: &mut Effects) {
        effects.nudge = true;
        if self.worker(seat, generation).is_none() {
            return;
        }
        self.reclaim(seat, 1, effects);
        let Some(mut worker) = self.seats.take_worker(seat) else { return };
        let was_planned = worker.phase == Phase::Leaving;
        // It may have died on its way out.
        let ended_in_order = was_planned && status.as_ref().is_ok_and(ExitStatus::success);
        if !ended_in_order && !self.is_terminated {
            self.note_death(seat, &worker, status, effects);
        }
        // A worker that was killed by its item is no sign that workers cannot start.
        worker.has_worked |= worker.running.iter().any(|running| running.done < running.end);
        for running in std::mem::take(&mut worker.running) {
            let Running { group, chunk, done, end, .. } = running;
            group.forget(&chunk);
            // At most one item was at work; more would be a worker that lies.
            for item in done..end {
                let error = match worker.kill_reason.take() {
                    Some(kill_reason) => kill_reason,
                    None => worker.death(status, &item_of(&group, &chunk, item)),
                };
                self.fail_or_retry(&group, &chunk, item, error, effects);
            }
            effects.groups.push(group);
        }
        // Its open spans are closed without the lock, too.
        effects.trace_sinks.push(worker.trace_sink.clone());
        let is_wanted = seat < *self.workers.start() || seat < *self.workers.end() && !self.queue.is_empty();
        if !self.needs_workers(effects) || !is_wanted {
            return;
        }
        match ended_in_order {
            true => effects.totals.recycled += 1,
            false => effects.totals.restarted += 1,
        }
        if let Some(error) = &worker.overdue {
            return self.failed(seat, error, effects);
        }
        let has_worked = worker.has_worked || was_planned || worker.phase == Phase::Killed;
        match has_worked {
            true => {
                self.seats.forgive(seat);
                self.seats.set_vacant(seat, Some(effects.now()));
            }
            false => {
                self.failed(seat, &worker.death(status, without_item(&worker)), effects);
            }
        }
    }

    /// Keeps the circumstances of a worker's end for the figures of the pool.
    fn note_death(&mut self, seat: usize, worker: &Worker, status: &Result<ExitStatus>, effects: &mut Effects) {
        let at_work = worker.running.front().filter(|running| running.done < running.end);
        let doing = at_work.map(|running| item_of(&running.group, &running.chunk, running.done));
        let doing = doing.as_deref().unwrap_or_else(|| without_item(worker));
        let why = match &worker.kill_reason {
            Some(kill_reason) => kill_reason.to_string(),
            None => worker.death(status, doing).to_string(),
        };
        let (name, pid, at) = (worker_name(seat), worker.pid, effects.now());
        self.remember(WorkerDeath { name, pid, at, status: status.as_ref().ok().copied(), why });
    }

    fn remember(&mut self, death: WorkerDeath) {
        let deaths = Arc::make_mut(&mut self.deaths);
        deaths.push(death);
        deaths.drain(..deaths.len().saturating_sub(DEATHS));
    }

    /// Item `item` of `chunk` has come to this end; it is tried again if it may be.
    pub(super) fn fail_or_retry(
        &mut self,
        group: &Arc<CallItems>,
        chunk: &Chunk,
        item: u32,
        error: Error,
        effects: &mut Effects,
    ) {
        let may_retry = group.options.retry_on.is_for(error.kind());
        // Once the pool has ended no worker would run it.
        let tried = chunk.attempt.saturating_sub(group.options.first_attempt);
        let is_last = tried >= group.options.retries || self.is_terminated;
        if !may_retry || is_last || group.items().is_cancelled {
            return effects.fail(group, chunk, (item, item + 1), || Error::copy(&error));
        }
        effects.totals.retried += 1;
        let mut again = chunk.part(item, item + 1);
        // It has been given to a worker once; from here on it may wait.
        (again.attempt, again.queued) = (again.attempt + 1, None);
        let wait = group.options.back_off.saturating_mul(1 << tried.min(16));
        match wait.is_zero() {
            true => self.again(group, again, effects),
            false => {
                group.items().resting += 1;
                self.at(later(effects.now(), wait), DueEvent::Retry(group.clone(), again), effects);
            }
        }
    }

    /// A seat's worker did not come to anything.
    pub(super) fn failed(&mut self, seat: usize, error: &Error, effects: &mut Effects) {
        effects.nudge = true;
        let is_wanted = seat < *self.workers.end() && self.needs_workers(effects);
        let Some(failures) = self.seats.failed(seat) else { return };
        // As long as others serve, the pool does: it only has fewer workers than it is to have.
        self.seats.update();
        let is_loop = failures >= CRASH_LOOP && self.seats.index().serving.is_empty();
        if is_loop || error.kind() == ErrorKind::NotInitialized {
            return self.break_down(error, effects);
        }
        let back_off = BACK_OFF * (1 << failures.min(8)) / 2;
        self.seats.set_vacant(seat, is_wanted.then(|| effects.now() + back_off));
    }

    /// The pool has no worker and gets none: all calls fail with the reason.
    pub(super) fn break_down(&mut self, why: &Error, effects: &mut Effects) {
        // The first reason counts: others that were being started may fail after it.
        let error = broken(self.broken.get_or_insert_with(|| Error::copy(why)));
        self.fail_all(effects, || Error::copy(&error));
        self.seats.fill_vacancies();
    }

    /// Settles everything there is.
    pub(super) fn fail_all(&mut self, effects: &mut Effects, error: impl Fn() -> Error) {
        // Results that have come count.
        (0..self.seats.len()).for_each(|seat| self.seats.suspect(seat));
        self.collect(effects);
        self.fail_waiting(effects, &error);
        self.cancel_all_taken(effects, &error);
        for seat in 0..self.seats.len() {
            let Some(worker) = self.seats.worker(seat) else { continue };
            for running in worker.running.drain(..) {
                let Running { group, chunk, done, end, number, .. } = running;
                worker.lane.take_back(number, 0);
                effects.fail(&group, &chunk, (done, end), &error);
                group.forget(&chunk);
            }
            // Its further results are dropped.
            worker.kill(None);
        }
    }

    /// Fails all items. Idle workers exit normally, busy ones are killed.
    pub(super) fn abandon_all(&mut self, effects: &mut Effects) {
        let error = if self.is_orphaned { stranded } else { terminated };
        self.fail_waiting(effects, error);
        self.cancel_all_taken(effects, error);
        for seat in 0..self.seats.len() {
            // From here on nothing begins there.
            self.reclaim(seat, 1, effects);
        }
        self.fail_waiting(effects, error);
        // Results that have come count.
        (0..self.seats.len()).for_each(|seat| self.seats.suspect(seat));
        self.collect(effects);
        for seat in 0..self.seats.len() {
            let Some(worker) = self.seats.worker(seat) else { continue };
            let is_idle = worker.running.is_empty() && matches!(worker.phase, Phase::Serving | Phase::Leaving);
            for running in worker.running.drain(..) {
                let Running { group, chunk, done, end, .. } = running;
                effects.fail(&group, &chunk, (done, end), error);
                group.forget(&chunk);
            }
            match is_idle {
                true => self.close_lane(seat, effects),
                false => worker.kill(None),
            }
        }
    }

    /// Settles everything that no worker has.
    pub(super) fn fail_waiting(&mut self, effects: &mut Effects, error: impl Fn() -> Error) {
        let mut queues = vec![std::mem::take(&mut self.queue)];
        queues.extend(self.checkouts.values_mut().map(|checked_out| std::mem::take(&mut checked_out.queue)));
        for group in queues.into_iter().flatten() {
            group.items().is_queued = false;
            let pending = self.take_pending(&group);
            pending.iter().for_each(|chunk| effects.fail_pending(&group, chunk, &error));
        }
        for Reverse(timer) in std::mem::take(&mut self.timers) {
            match timer.event {
                DueEvent::Retry(group, chunk) => effects.fail(&group, &chunk, (0, chunk.count), &error),
                // Timers of other kinds stay.
                _ => self.timers.push(Reverse(timer)),
            }
        }
        effects.nudge = true;
    }

    /// Items of `call_items` that wait for a retry are not tried again.
    pub(super) fn forget_retries(&mut self, group: &Arc<CallItems>, effects: &mut Effects) {
        if std::mem::take(&mut group.items().resting) == 0 {
            return;
        }
        self.timers.retain(|Reverse(timer)| match &timer.event {
            DueEvent::Retry(of, chunk) if Arc::ptr_eq(of, group) => {
                effects.fail(group, chunk, (0, chunk.count), || group.was_cancelled());
                false
            }
            _ => true,
        });
    }

    /// Sends the workers home when nothing is left and nothing can come.
    pub(super) fn end_if_done(&mut self, effects: &mut Effects) {
        self.plan_to_share(effects);
        self.plan_to_retire_idle(effects);
        if !self.is_closed || self.open > 0 && !self.is_shut || self.out > effects.settled {
            return;
        }
        effects.nudge |= self.seats.fill_vacancies();
        (0..self.seats.len()).for_each(|seat| self.close_lane(seat, effects));
        // In a pool whose workers never started no exit would wake the driver.
        self.seats.update();
        effects.nudge |= self.seats.index().taken.is_empty();
    }
}

fn item_of(group: &CallItems, chunk: &Chunk, item: u32) -> String {
    let place = format!("item {} of {}", chunk.first + u64::from(item), group.label);
    match chunk.attempt {
        0 => place,
        n => format!("{place} (attempt {})", n + 1),
    }
}

/// What a worker that has no item does.
fn without_item(worker: &Worker) -> &'static str {
    if worker.phase == Phase::Beginning { "its initializer" } else { "nothing" }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;
    use crate::pool::options::Options;
    use crate::process::entry;

    /// The last report of its worker may be that it was late.
    #[test]
    fn an_item_that_fails_when_the_pool_has_ended_is_not_tried_again() {
        let (mut state, mut effects) = (Scheduler::of_test(), Effects::default());
        let group = Arc::new(CallItems::new(entry::Call::of(|| ()), "f", Options { retries: 3, ..Options::default() }));
        group.items().out = 1;
        let mut chunk = Chunk::new(0);
        chunk.count = 1;
        state.is_terminated = true;
        state.fail_or_retry(&group, &chunk, 0, Error::new(ErrorKind::Timeout, "late"), &mut effects);
        assert_eq!((effects.settled, state.queue.len(), state.timers.len()), (1, 0, 0));
    }

    #[test]
    fn the_last_deaths_are_shared_with_readers_and_not_copied_for_each() {
        let mut state = Scheduler::of_test();
        let death =
            |pid| WorkerDeath { name: worker_name(0), pid, at: Instant::now(), status: None, why: "why".into() };
        (0..100).for_each(|pid| state.remember(death(pid)));
        let pids = |deaths: &[WorkerDeath]| deaths.iter().map(|death| death.pid).collect::<Vec<_>>();
        let (first, second) = (state.stats().1, state.stats().1);
        assert!(Arc::ptr_eq(&first, &second) && Arc::ptr_eq(&first, &state.deaths));
        assert_eq!(pids(&first), (68..100).collect::<Vec<_>>());
        state.remember(death(100));
        assert_eq!(pids(&first), (68..100).collect::<Vec<_>>(), "as it was read");
        assert_eq!(pids(&state.stats().1), (69..=100).collect::<Vec<_>>());
    }
}
