//! Events from callers, from the driver and from the pool's holders. Each ends in [`Scheduler::advance`].

use super::deadlines::DueEvent;
use super::effects::{Effects, Spawn, Spawned, Step};
use super::errors::{broken, orphaned, shut, terminated};
use super::queue::Queue;
use super::worker::{Circumstances, Phase, Worker};
use super::{Scheduler, later};
use crate::error::{Error, Result, Topic};
use crate::pool::call_items::{CallItems, UsualTime};
use crate::pool::chunk::Chunk;
use crate::pool::side_channel::{SideOrders, Unsent};
use crate::pool::trace::TraceSink;
use std::cmp::Reverse;
use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::process::ExitStatus;
use std::sync::Arc;
use std::task::Waker;

// Events of callers.
impl Scheduler {
    /// Something begins that adds items: a call, or a checkout. Calls of a checkout, whose number is `checkout`, go on after a
    /// close, for it was taken before.
    pub(in crate::pool) fn opened(&mut self, checkout: u64) -> Result<()> {
        self.check_open(checkout)?;
        self.open += 1;
        Ok(())
    }

    /// Whether calls of checkout `checkout` may begin; 0 is none.
    pub(in crate::pool) fn check_open(&self, checkout: u64) -> Result<()> {
        if self.is_orphaned {
            return Err(orphaned());
        }
        if self.is_closed && (checkout == 0 || self.is_shut || self.is_terminated) {
            return Err(Error::closed("pool"));
        }
        if let Some(why) = &self.broken {
            return Err(broken(why));
        }
        Ok(())
    }

    /// A call that is open will add items as another attempt, also if the pool is closed by now.
    pub(in crate::pool) fn opened_again(&mut self) {
        self.open += 1;
    }

    /// It adds no more.
    pub(in crate::pool) fn finished(&mut self, effects: &mut Effects) {
        self.open -= 1;
        self.end_if_done(effects);
    }

    /// Chunks were submitted.
    pub(in crate::pool) fn submitted(&mut self, group: &Arc<CallItems>, mut chunks: Vec<Chunk>, effects: &mut Effects) {
        let items = chunks.iter().map(|chunk| chunk.count as usize).sum::<usize>();
        group.items().out += items;
        self.out += items;
        if group.needs_room() {
            self.room.give_back(items);
        }
        group.set_usual_time(|| self.usual_time(group));
        if group.options.queue_timeout.is_some() {
            let now = effects.now();
            chunks.iter_mut().for_each(|chunk| chunk.queued = Some(now));
            self.watch_queue(group, now, effects);
        }
        let refused = self.gave_up().or_else(|| self.broken.as_ref().map(broken));
        if let Some(error) = refused {
            chunks.iter().for_each(|chunk| effects.fail(group, chunk, (0, chunk.count), || Error::copy(&error)));
            return;
        }
        let new = chunks.len();
        self.enqueue(group, chunks.drain(..), false);
        self.advance(effects);
        // A chunk that found a worker at once has not waited, which needs no look at the clock.
        let mut items = group.items();
        let waiting = items.pending.len().min(new);
        if waiting > 0 {
            let now = effects.now();
            items.pending.iter_mut().rev().take(waiting).for_each(|chunk| _ = chunk.handed.get_or_insert(now));
        }
    }

    /// A caller is about to take up to `wanted` items from their source: for how many there is room. If for none, `waker` is
    /// woken when there is.
    pub(in crate::pool) fn room_wanted(
        &mut self,
        wanted: usize,
        ticket: &mut Option<u64>,
        waker: &mut Option<Waker>,
    ) -> usize {
        self.room.reserve(self.waiting, wanted, ticket, waker)
    }

    /// There were fewer items than there was room for.
    pub(in crate::pool) fn room_left_over(&mut self, items: usize) {
        self.room.give_back(items);
    }

    /// A caller waits for room no longer.
    pub(in crate::pool) fn room_not_wanted(&mut self, ticket: u64) -> Option<Waker> {
        self.room.leave(ticket)
    }

    fn usual_time(&mut self, group: &CallItems) -> Arc<UsualTime> {
        self.usual_times.entry(group.call.to_words()).or_default().clone()
    }

    /// The caller does not wait for these items any more: those that have not started never do, those that run are asked to stop, then killed.
    pub(in crate::pool) fn cancelled(&mut self, group: &Arc<CallItems>, effects: &mut Effects) {
        if std::mem::replace(&mut group.items().is_cancelled, true) {
            return;
        }
        let is_queued = group.items().is_queued;
        let pending = self.take_pending(group);
        if is_queued {
            self.queue_of(group).into_iter().for_each(Queue::was_emptied);
        }
        pending.iter().for_each(|chunk| effects.fail_pending(group, chunk, || group.was_cancelled()));
        self.forget_retries(group, effects);
        self.revoke(group, effects);
        self.cancel_taken(group, effects);
        self.plan_quiet_check(effects);
        self.advance(effects);
    }

    /// The number of a new checkout.
    pub(in crate::pool) fn new_checkout(&mut self) -> u64 {
        self.checkouts_made += 1;
        self.checkouts_made
    }

    /// The worker of a checkout is everybody's again.
    pub(in crate::pool) fn released(&mut self, checkout: u64, effects: &mut Effects) {
        if let Some(seat) = self.checkouts.get(&checkout).and_then(|checked_out| checked_out.seat)
            && let Some(worker) = self.seats.worker(seat).filter(|worker| worker.checkout == checkout)
        {
            worker.checkout = 0;
            if worker.is_due || worker.given >= worker.share {
                self.retire(seat, effects);
            }
        }
        self.fail_checkout(checkout, effects);
        self.plan_quiet_check(effects);
        self.advance(effects);
    }

    // Events of workers.

    /// Results may have arrived: takes them in, if there are any. Whether there are items out whose callers have not been
    /// woken, or for which others wait.
    pub(in crate::pool) fn results_arrived(&mut self, effects: &mut Effects) -> bool {
        if self.collect(effects) {
            self.advance(effects);
        }
        let out = self.out - effects.settled;
        out > effects.woken || out > 0 && self.waits_for_others() > 0
    }

    /// A caller is about to sleep, and has armed the alarm before.
    pub(in crate::pool) fn about_to_sleep(&mut self, effects: &mut Effects) {
        if self.has_results() && self.collect(effects) {
            self.advance(effects);
        }
        self.plan_quiet_check(effects);
        self.plan_sweep(effects);
    }

    /// Collects before a sleep, for a caller with many quiet items out, which needs no notice before a worker begins its last order.
    pub(in crate::pool) fn about_to_sleep_in_bulk(&mut self, effects: &mut Effects) {
        if self.should_collect() && self.collect(effects) {
            self.advance(effects);
        }
        self.plan_quiet_check(effects);
        self.plan_sweep(effects);
    }

    /// A worker was started.
    pub(in crate::pool) fn spawned(
        &mut self,
        Spawn { seat, generation }: &Spawn,
        spawned: Spawned,
        effects: &mut Effects,
    ) {
        let (seat, generation) = (*seat, *generation);
        let has_initializer = self.config.initializer.is_some();
        let phase = match (self.is_terminated, has_initializer) {
            (true, _) => Phase::Killed,
            (false, true) => Phase::Beginning,
            (false, false) => Phase::Serving,
        };
        if phase == Phase::Killed {
            spawned.control.kill();
        }
        let now = effects.now();
        // Any number will do that differs from worker to worker.
        let spread = |most: u64| (generation.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % most.saturating_add(1);
        let max_tasks = self.config.max_tasks_per_worker.unwrap_or(usize::MAX);
        let jitter = (spread(self.config.tasks_jitter as u64) as usize).min(max_tasks - 1);
        let Spawned { name, pid, control, lane, side_orders, side_results } = spawned;
        let worker = Worker {
            generation,
            name,
            pid,
            control,
            lane,
            side_orders,
            side_results,
            trace_sink: TraceSink::new(pid),
            phase,
            running: VecDeque::new(),
            given: 0,
            share: max_tasks - jitter,
            checkout: 0,
            is_due: false,
            answered: 0,
            born: now,
            idle_since: Some(now),
            has_worked: false,
            is_awaited: has_initializer,
            full: None,
            unsent: None,
            stalled: None,
            is_vacating: false,
            is_lagging: false,
            moved: now,
            is_ready: false,
            has_reported: false,
            leaving: None,
            overdue: None,
            end: Circumstances::default(),
            kill_reason: None,
        };
        self.seats.set_worker(seat, worker);
        // It may have sent results before the pool knew it.
        self.seats.suspect(seat);
        if let Some(timeout) = self.config.initializer_timeout.filter(|_| phase == Phase::Beginning) {
            self.at(later(now, timeout), DueEvent::Initializer(seat, generation, timeout), effects);
        }
        if let Some(age) = self.config.max_age {
            // Up to a tenth earlier, so that they do not all go at once.
            let age = age - age / 1000 * spread(100) as u32;
            self.at(later(now, age), DueEvent::Age(seat, generation), effects);
        }
        if seat >= *self.workers.end() {
            // There was a resize while it was on its way.
            self.retire(seat, effects);
        }
        self.advance(effects);
        self.plan_quiet_check(effects);
    }

    /// A worker could not be started.
    pub(in crate::pool) fn spawn_failed(&mut self, spawn: &Spawn, error: &Error, effects: &mut Effects) {
        self.failed(spawn.seat, error, effects);
    }

    /// An initializer's report was read.
    pub(in crate::pool) fn initialized(
        &mut self,
        seat: usize,
        generation: u64,
        outcome: Result<()>,
        effects: &mut Effects,
    ) {
        let Some(worker) = self.worker(seat, generation) else { return };
        match outcome {
            Ok(()) if worker.phase == Phase::Beginning => worker.phase = Phase::Serving,
            Ok(()) => {}
            Err(error) => {
                let why = format!("the initializer of {} failed: {}", worker.name, error.text());
                let why = Error::other(why).explained_by(Topic::Initializer);
                worker.kill(None);
                self.break_down(&why, effects);
            }
        }
        self.advance(effects);
        // All callers may sleep by now.
        self.plan_quiet_check(effects);
    }

    /// A worker has ended.
    pub(in crate::pool) fn exited(
        &mut self,
        seat: usize,
        generation: u64,
        status: &Result<ExitStatus>,
        end: Circumstances,
        effects: &mut Effects,
    ) {
        // Also results that it had no time to mark.
        self.seats.suspect(seat);
        self.collect(effects);
        if let Some(worker) = self.worker(seat, generation) {
            worker.end = end;
        }
        self.reap(seat, generation, status, effects);
        self.advance(effects);
    }

    /// An order could not be sent to its worker.
    pub(in crate::pool) fn not_sent(&mut self, side_orders: &SideOrders, unsent: &Unsent, effects: &mut Effects) {
        self.was_unsent(side_orders, unsent, effects);
        self.advance(effects);
        self.plan_quiet_check(effects);
    }

    /// A call was refused, because as many items wait as may.
    pub(in crate::pool) fn rejected(&mut self, effects: &mut Effects) {
        effects.totals.rejected += 1;
    }

    // Events of the pool.

    pub(in crate::pool) fn closed(&mut self, effects: &mut Effects) {
        self.is_closed = true;
        self.taken.notify();
        self.end_if_done(effects);
    }

    /// A caller begins to wait for the end of the pool.
    pub(in crate::pool) fn joined(&mut self) {
        self.joining += 1;
    }

    /// It waits no longer.
    pub(in crate::pool) fn join_ended(&mut self) {
        self.joining -= 1;
    }

    /// Gives a broken pool another chance.
    pub(in crate::pool) fn revived(&mut self, effects: &mut Effects) {
        if self.broken.take().is_some() {
            (0..self.seats.len()).for_each(|seat| self.seats.forgive(seat));
            // Others come when they are needed, and those that are dying are replaced at their end.
            if self.needs_workers(effects) {
                self.open_seats();
            }
            effects.nudge = true;
        }
    }

    pub(in crate::pool) fn terminated(&mut self, effects: &mut Effects) {
        (self.is_closed, self.is_terminated) = (true, true);
        self.fail_all(effects, terminated);
        self.seats.fill_vacancies();
    }

    /// The last holder is gone, or the pool's runtime: nothing is waited for any more, or can be done.
    pub(in crate::pool) fn let_go(&mut self, effects: &mut Effects) {
        (self.is_closed, self.is_terminated) = (true, true);
        self.abandon_all(effects);
        self.seats.fill_vacancies();
    }

    /// The driver has ended: all is over, or its runtime has ended.
    pub(in crate::pool) fn abandoned(&mut self, is_over: bool, effects: &mut Effects) {
        if !self.is_terminated {
            self.is_orphaned = !is_over;
            self.let_go(effects);
        }
        self.is_abandoned = true;
        self.taken.notify();
    }

    /// Takes nothing more and gives up all items that have not started. Returns how many those are.
    pub(in crate::pool) fn shut(&mut self, effects: &mut Effects) -> usize {
        (self.is_closed, self.is_shut) = (true, true);
        let before = effects.settled;
        for seat in 0..self.seats.len() {
            self.reclaim(seat, 1, effects);
        }
        self.fail_waiting(effects, shut);
        let lost = effects.settled - before;
        self.end_if_done(effects);
        lost
    }

    /// From now on there are so many workers.
    pub(in crate::pool) fn resized(&mut self, workers: RangeInclusive<usize>, effects: &mut Effects) {
        let has_more = workers.end() > self.workers.end();
        self.workers = workers;
        if has_more {
            self.wake_callers(effects);
        }
        if self.needs_workers(effects) {
            self.open_seats();
        }
        for seat in *self.workers.end()..self.seats.len() {
            self.seats.set_vacant(seat, None);
            self.retire(seat, effects);
        }
        self.dispatch(effects);
        effects.nudge = true;
    }

    /// Time has passed: runs the timers that are due. Returns the work of the driver.
    pub(in crate::pool) fn time_passed(&mut self, effects: &mut Effects) -> Step {
        let now = effects.now();
        self.collect(effects);
        while self.timers.peek().is_some_and(|Reverse(timer)| timer.at <= now) {
            let Some(Reverse(timer)) = self.timers.pop() else { break };
            self.on(timer.event, now, effects);
        }
        self.advance(effects);
        // Orders that were given just now may be slow, too, and all callers may sleep.
        self.plan_quiet_check(effects);
        let spawns = self.spawns(now, effects);
        let begun = std::mem::take(&mut self.reports);
        self.alert = self.timers.peek().map(|Reverse(timer)| timer.at);
        self.out -= std::mem::take(&mut effects.settled);
        let is_over = self.is_closed && self.alive() == 0;
        let is_unneeded = self.is_closed && !self.needs_workers(effects);
        effects.nudge = false;
        let unfetched = std::mem::take(&mut effects.unfetched);
        Step { spawns, begun, unfetched, until: self.alert, is_unneeded, is_over }
    }
}
