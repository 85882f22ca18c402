//! Starts workers, and closes the lanes of those that get no more orders.

use super::deadlines::DueEvent;
use super::effects::{Effects, Spawn};
use super::worker::Phase;
use super::{AGAIN, Scheduler, later};
use std::time::Instant;

impl Scheduler {
    /// Has the least number of workers come.
    pub(super) fn open_seats(&mut self) {
        let (least, most) = (*self.workers.start(), *self.workers.end());
        self.seats.grow(most);
        let now = Instant::now();
        for seat in 0..least {
            if !self.seats.is_taken(seat) {
                self.seats.set_vacant(seat, Some(now));
            }
        }
    }

    /// Returns `true` if more workers may come than there are. The seats were updated.
    pub(super) fn may_grow(&self, effects: &Effects) -> bool {
        // Seats above the most are of workers that are on their way out.
        *self.workers.start() < *self.workers.end()
            && self.seats.index().taken.len() < self.seats.len()
            && self.needs_workers(effects)
    }

    /// Has more workers come for so many chunks, if there may be more; they all come at once if that many are wanted.
    pub(super) fn request_workers(&mut self, chunks: usize, effects: &mut Effects) {
        self.seats.update();
        if !self.may_grow(effects) {
            return;
        }
        let most = *self.workers.end();
        let wanted = chunks.saturating_sub(self.seats.index().coming.len());
        if wanted == 0 {
            return;
        }
        let now = effects.now();
        let free: Vec<_> = (0..most).filter(|seat| !self.seats.is_taken(*seat)).take(wanted).collect();
        for seat in free {
            self.seats.set_vacant(seat, Some(now));
            effects.nudge = true;
        }
    }

    pub(super) fn needs_workers(&self, effects: &Effects) -> bool {
        let is_done = self.is_closed && (self.open == 0 || self.is_shut) && self.out == effects.settled;
        !self.is_terminated && self.broken.is_none() && !is_done
    }

    /// Which seats are to get a worker now.
    pub(super) fn spawns(&mut self, now: Instant, effects: &mut Effects) -> Vec<Spawn> {
        let mut spawns = Vec::new();
        while let Some(spawn) = self.seats.spawn(now, self.generation + 1) {
            self.generation += 1;
            spawns.push(spawn);
        }
        if let Some(at) =
            self.seats.next_vacancy().filter(|at| self.is_spawn_planned.is_none_or(|planned| *at < planned))
        {
            self.is_spawn_planned = Some(at);
            self.at(at, DueEvent::Spawn, effects);
        }
        spawns
    }

    /// Tells a worker that no order will follow, and sees to it that it ends in time.
    pub(super) fn close_lane(&mut self, seat: usize, effects: &mut Effects) {
        let now = effects.now();
        let Some(worker) = self.seats.worker(seat) else { return };
        if !matches!(worker.phase, Phase::Serving | Phase::Beginning) {
            return;
        }
        (worker.phase, worker.leaving) = (Phase::Leaving, Some(now));
        worker.lane.close();
        if worker.running.is_empty() {
            // Its finalizer runs also if this process ends now.
            worker.control.leaves_within(self.config.exit_timeout);
        }
        let event = DueEvent::Exit(seat, worker.generation);
        self.at(later(now, self.config.exit_timeout), event, effects);
    }

    /// Kills a worker that has had the time to end.
    pub(super) fn end_in_time(&mut self, seat: usize, generation: u64, now: Instant, effects: &mut Effects) {
        let timeout = self.config.exit_timeout;
        let Some(worker) = self.worker(seat, generation) else { return };
        if worker.phase != Phase::Leaving {
            return;
        }
        if !worker.running.is_empty() {
            return self.at(later(now, timeout.max(AGAIN)), DueEvent::Exit(seat, generation), effects);
        }
        let since = worker.idle_since.max(worker.leaving).unwrap_or(now);
        if now < later(since, timeout) {
            return self.at(later(since, timeout), DueEvent::Exit(seat, generation), effects);
        }
        effects.late.push((worker.name.clone(), timeout));
        worker.kill(None);
        self.late += 1;
    }
}
