//! Workers come and go: who is to be started, and who is told that no order will follow.

use super::{AGAIN, Effects, Event, Hire, Phase, Rules, Scheduler, Seat, later};
use std::time::Instant;

impl Scheduler {
    /// Has the least number of workers come.
    pub(in crate::pool) fn open_seats(&mut self) {
        let Rules { least, most, .. } = self.rules;
        self.seats.resize_with(self.seats.len().max(most), Seat::default);
        let now = Instant::now();
        for seat in self.seats[..least].iter_mut().filter(|seat| !seat.is_taken()) {
            seat.vacant = Some(now);
        }
    }

    /// Has one more worker come, if there may be more; they all come at once if that many are wanted.
    pub(in crate::pool) fn call_in(&mut self, effects: &mut Effects) {
        if self.rules.least == self.rules.most || !self.needs_workers(effects) {
            return;
        }
        let free = self.seats[..self.rules.most].iter().filter(|seat| !seat.is_taken()).count();
        if free == 0 {
            return;
        }
        let coming = self.seats.iter().filter(|seat| seat.vacant.is_some() || seat.is_hiring || seat.is_beginning());
        let coming = coming.count();
        // As far as it matters: this is asked for each call that finds nobody free.
        let mut waiting = 0;
        for group in self.queue.iter() {
            waiting += group.items().pending.len();
            if waiting >= coming + free {
                break;
            }
        }
        let wanted = waiting.saturating_sub(coming);
        let now = Instant::now();
        let free = self.seats[..self.rules.most].iter_mut().filter(|seat| !seat.is_taken());
        for seat in free.take(wanted) {
            seat.vacant = Some(now);
            effects.nudge = true;
        }
    }

    pub(in crate::pool) fn needs_workers(&self, effects: &Effects) -> bool {
        let is_done = self.is_closed && (self.open == 0 || self.is_shut) && self.out == effects.settled;
        !self.is_terminated && self.broken.is_none() && !is_done
    }

    /// Which seats are to get a worker now.
    pub(in crate::pool) fn hires(&mut self, now: Instant, effects: &mut Effects) -> Vec<Hire> {
        let (mut hires, mut later) = (Vec::new(), None);
        for (number, seat) in self.seats.iter_mut().enumerate() {
            match seat.vacant {
                Some(at) if at <= now => {
                    (seat.vacant, seat.is_hiring) = (None, true);
                    self.generation += 1;
                    hires.push(Hire { seat: number, generation: self.generation });
                }
                Some(at) => later = Some(later.map_or(at, |later: Instant| later.min(at))),
                None => {}
            }
        }
        if let Some(at) = later {
            self.at(at, Event::Hire, effects);
        }
        hires
    }

    /// Tells a worker that no order will follow, and sees to it that it ends in time.
    pub(in crate::pool) fn dismiss(&mut self, seat: usize, effects: &mut Effects) {
        let now = effects.now();
        let Some(worker) = self.seats.get_mut(seat).and_then(|seat| seat.worker.as_mut()) else { return };
        if !matches!(worker.phase, Phase::Serving | Phase::Beginning) {
            return;
        }
        (worker.phase, worker.leaving) = (Phase::Leaving, Some(now));
        worker.lane.close();
        if worker.running.is_empty() {
            // Its finalizer runs also if this process ends now.
            worker.killer.leaves_within(self.rules.exit_timeout);
        }
        let event = Event::Exit(seat, worker.generation);
        self.at(later(now, self.rules.exit_timeout), event, effects);
    }

    /// Kills a worker that has had the time to end.
    pub(in crate::pool) fn see_out(&mut self, seat: usize, generation: u64, now: Instant, effects: &mut Effects) {
        let timeout = self.rules.exit_timeout;
        let Some(worker) = self.worker(seat, generation) else { return };
        if worker.phase != Phase::Leaving {
            return;
        }
        if !worker.running.is_empty() {
            return self.at(later(now, timeout.max(AGAIN)), Event::Exit(seat, generation), effects);
        }
        let since = worker.idle_since.max(worker.leaving).unwrap_or(now);
        if now < later(since, timeout) {
            return self.at(later(since, timeout), Event::Exit(seat, generation), effects);
        }
        effects.late.push((worker.name.clone(), timeout));
        worker.kill(None);
        self.late += 1;
    }
}
