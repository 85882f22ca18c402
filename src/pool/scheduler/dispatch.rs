//! Who does what: orders are given to workers that are free, and taken back from those that have not begun them.

use super::{Effects, Event, Phase, Place, Running, Scheduler, Worker, later};
use crate::channel::lane::{Claim, PoolEnd};
use crate::error::Error;
use crate::pool::group::{Chunk, Group};
use crate::pool::mail::{Outbox, Unsent};
use crate::pool::protocol::{Header, IN_PIPE};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Orders that wait at a worker behind the one it runs, if they are known to be over soon.
const PREFETCH: usize = 3;
/// So many bytes are copied in less time than a wake takes.
const SOON_COPIED: usize = 64 << 10;
/// A chunk with items that have not started is shared with an idle worker after this.
const SHARE_AFTER: Duration = Duration::from_millis(2);
/// An item that its worker does not begin is given to an idle one after this: longer than a wake takes on a busy machine.
const TAKE_OVER_AFTER: Duration = Duration::from_millis(10);

impl Scheduler {
    pub(in crate::pool) fn enqueue(
        &mut self,
        group: &Arc<Group>,
        chunks: impl DoubleEndedIterator<Item = Chunk>,
        in_front: bool,
    ) {
        let mut items = group.items();
        match in_front {
            true => chunks.rev().for_each(|chunk| {
                items.bytes += chunk.bytes().len();
                items.pending.push_front(chunk);
            }),
            false => chunks.for_each(|chunk| {
                items.bytes += chunk.bytes().len();
                items.pending.push_back(chunk);
            }),
        }
        if !items.pending.is_empty() && !std::mem::replace(&mut items.is_queued, true) {
            self.queue.push_back(group.clone());
        }
    }

    /// Gives out what waits, as long as there is a worker for it.
    pub(in crate::pool) fn dispatch(&mut self, effects: &mut Effects) {
        let mut aside = Vec::new();
        while let Some(group) = self.queue.front().cloned() {
            let next = {
                let mut items = group.items();
                items.is_queued = !items.pending.is_empty();
                items.pending.front().map(Chunk::len_in_ring)
            };
            let Some(len) = next else {
                self.queue.pop_front();
                continue;
            };
            let depth = if group.is_quick() { 1 + PREFETCH } else { 1 };
            let (lease, acquires) = (group.options.lease, group.options.acquires);
            let is_certain = group.is_certain();
            let serves = |worker: &Worker| match acquires {
                true => worker.lease == 0 && worker.running.is_empty(),
                false => worker.lease == lease,
            };
            let free = self.workers().filter(|(_, worker)| serves(worker));
            let free = free.filter_map(|(seat, worker)| worker.takes(depth, len).then_some((seat, worker)));
            let best = free.map(|(seat, worker)| (seat, worker.running.len())).min_by_key(|(_, running)| *running);
            if !is_certain && best.is_none_or(|(_, running)| running > 0) {
                self.call_in(effects);
            }
            let Some((seat, _)) = best else {
                // Nobody is free for those behind it either; or they stand back, so that one has nothing to do.
                if !is_certain {
                    break;
                }
                self.queue.pop_front();
                if !self.workers().any(|(_, worker)| worker.lease == lease) {
                    let pending = {
                        let mut items = group.items();
                        items.is_queued = false;
                        std::mem::take(&mut items.pending)
                    };
                    pending.iter().for_each(|chunk| effects.fail_pending(&group, chunk, || group.was_let_go()));
                } else {
                    aside.push(group);
                }
                continue;
            };
            let (chunk, has_more) = {
                let mut items = group.items();
                let chunk = items.pending.pop_front();
                items.is_queued = !items.pending.is_empty();
                (chunk, items.is_queued)
            };
            // Calls take turns.
            if !has_more || self.queue.len() > 1 {
                self.queue.pop_front();
                if has_more {
                    self.queue.push_back(group.clone());
                }
            }
            let Some(chunk) = chunk else { continue };
            if acquires && let Some(worker) = self.seats.get_mut(seat).and_then(|seat| seat.worker.as_mut()) {
                worker.lease = lease;
            }
            self.give(seat, group, chunk, effects);
        }
        aside.into_iter().rev().for_each(|group| self.queue.push_front(group));
    }

    fn give(&mut self, seat: usize, group: Arc<Group>, mut chunk: Chunk, effects: &mut Effects) {
        let Some(worker) = self.seats.get_mut(seat).and_then(|seat| seat.worker.as_mut()) else { return };
        let quota = if worker.lease > 0 { usize::MAX } else { worker.share - worker.given };
        let (mut rest, grace) = (None, self.rules.grace);
        if chunk.count as usize > quota {
            group.forget(&chunk);
            rest = Some(chunk.part(quota as u32, chunk.count));
            chunk = chunk.part(0, quota as u32);
            group.items().bytes += chunk.bytes().len();
        }
        match worker.give(&group, &mut chunk, grace, effects) {
            Some(number) => {
                worker.given += chunk.count as usize;
                worker.idle_since = None;
                let generation = worker.generation;
                let now = effects.now();
                if !std::mem::replace(&mut chunk.has_waited, true) {
                    let waited = chunk.handed.map_or(Duration::ZERO, |handed| now.duration_since(handed));
                    self.waits.add(waited, u64::from(chunk.count));
                }
                let (done, end, is_quiet) = (0, chunk.count, group.is_bulk());
                let (begun, unnoted, since) = (None, None, now);
                let order = Running { group: group.clone(), chunk, number, done, end, since, begun, unnoted, is_quiet };
                worker.running.push_back(order);
                let is_last = worker.given >= worker.share && worker.lease == 0;
                if is_last {
                    self.dismiss(seat, effects);
                }
                if let Some(timeout) = group.options.timeout {
                    self.at(later(now, timeout), Event::Overrun(Place { seat, generation, number }), effects);
                }
            }
            None => {
                group.forget(&chunk);
                self.enqueue(&group, [chunk].into_iter(), true);
            }
        }
        self.enqueue(&group, rest.into_iter(), true);
    }

    /// An order could not be sent: its items fail, and its worker goes on to the next.
    pub(in crate::pool) fn was_unsent(&mut self, outbox: &Arc<Outbox>, unsent: &Unsent, effects: &mut Effects) {
        let Some((_, worker)) = self.workers().find(|(_, worker)| Arc::ptr_eq(&worker.outbox, outbox)) else { return };
        if unsent.is_final {
            // It would wait for ever. What it has not begun goes to others.
            return worker.kill(None);
        }
        let running = worker.running.iter().find(|running| running.number == unsent.number);
        let done = running.map_or(0, |running| running.done);
        let claim = take_back(&worker.lane, &worker.outbox, unsent.number, done);
        if let Some(running) = worker.running.iter_mut().find(|running| running.number == unsent.number) {
            let from = claim.end.max(running.done);
            effects.fail(&running.group, &running.chunk, (from, running.end), || Error::copy(&unsent.error));
            running.end = from;
        }
        worker.pop_complete(None, &mut Vec::new());
    }

    /// Runs an item again, unless nobody waits for it any more.
    pub(in crate::pool) fn again(&mut self, group: &Arc<Group>, chunk: Chunk, effects: &mut Effects) {
        let is_cancelled = group.items().is_cancelled;
        match is_cancelled {
            true => effects.fail(group, &chunk, (0, chunk.count), || group.was_cancelled()),
            false => self.enqueue(group, [chunk].into_iter(), true),
        }
    }

    /// Takes back what of `group` has not started, and asks what runs to stop.
    pub(in crate::pool) fn revoke(&mut self, group: &Arc<Group>, effects: &mut Effects) {
        let grace = group.options.grace.unwrap_or(self.rules.grace);
        let mut asked = Vec::new();
        for (seat, worker) in self.workers() {
            let generation = worker.generation;
            for running in worker.running.iter_mut().filter(|running| Arc::ptr_eq(&running.group, group)) {
                let claim = take_back(&worker.lane, &worker.outbox, running.number, running.done);
                effects.fail(group, &running.chunk, (claim.end, running.end), || group.was_cancelled());
                running.end = claim.end;
                if claim.started > running.done {
                    worker.lane.ask_to_stop(running.number, claim.started - 1);
                    asked.push((Place { seat, generation, number: running.number }, claim.started - 1));
                }
            }
            worker.pop_complete(None, &mut Vec::new());
        }
        let at = later(Instant::now(), grace);
        asked.into_iter().for_each(|(place, item)| self.at(at, Event::Kill(place, item), effects));
    }

    /// Takes back what has not started at a worker, in `pieces` for whoever is free.
    pub(in crate::pool) fn reclaim(&mut self, seat: usize, pieces: u32, effects: &mut Effects) {
        let Some(worker) = self.seats.get_mut(seat).and_then(|seat| seat.worker.as_mut()) else { return };
        let mut back = Vec::new();
        for running in worker.running.iter_mut().rev() {
            let claim = take_back(&worker.lane, &worker.outbox, running.number, running.done);
            if claim.end == running.end {
                continue;
            }
            worker.given -= (running.end - claim.end) as usize;
            let size = (running.end - claim.end).div_ceil(pieces.max(1));
            let starts = (claim.end..running.end).step_by(size as usize);
            let parts: Vec<_> = starts.map(|from| running.chunk.part(from, (from + size).min(running.end))).collect();
            back.push((running.group.clone(), parts));
            running.end = claim.end;
        }
        worker.pop_complete(None, &mut Vec::new());
        for (group, parts) in back {
            let is_cancelled = group.items().is_cancelled;
            if !is_cancelled {
                self.enqueue(&group, parts.into_iter(), true);
                continue;
            }
            parts.iter().for_each(|part| effects.fail(&group, part, (0, part.count), || group.was_cancelled()));
        }
    }

    /// Sees to it that nobody idles for long while another has what it has not begun.
    pub(in crate::pool) fn plan_to_share(&mut self, effects: &mut Effects) {
        // What waits for the worker of a checkout, which is busy, says nothing of the others.
        if self.is_share_planned || self.queue.iter().any(|group| !group.is_certain()) {
            return;
        }
        let mut workers = self.seats.iter().filter_map(|seat| seat.worker.as_ref());
        if !workers.clone().any(Worker::is_idle) {
            return;
        }
        let while_ = match workers.clone().any(Worker::has_more) {
            true => SHARE_AFTER,
            false if workers.any(Worker::may_not_begin) => TAKE_OVER_AFTER,
            false => return,
        };
        self.is_share_planned = true;
        let at = effects.now() + while_;
        self.at(at, Event::Share, effects);
    }

    pub(in crate::pool) fn share(&mut self, now: Instant, effects: &mut Effects) {
        self.is_share_planned = false;
        let idle = self.workers().filter(|(_, worker)| worker.is_idle()).count() as u32;
        // What one that is checked out has is for it alone.
        let slow =
            self.workers().filter_map(|(seat, worker)| (worker.is_shared() && worker.is_slow(now)).then_some(seat));
        let slow: Vec<usize> = slow.collect();
        for seat in slow.into_iter().filter(|_| idle > 0) {
            // Before it is taken back: what the worker gives up after that is a sign of life.
            let Some(given_up) = self.seats[seat].worker.as_ref().map(|worker| worker.lane.given_up()) else {
                continue;
            };
            self.reclaim(seat, idle + 1, effects);
            if let Some(worker) = self.seats[seat].worker.as_mut().filter(|worker| worker.running.is_empty()) {
                // It had begun none of it. One that was to be checked out is not: the checkout gets another.
                worker.stalled = Some((given_up, now));
                let lease = std::mem::take(&mut worker.lease);
                if lease > 0 && (worker.is_due || worker.given >= worker.share) {
                    self.retire(seat, effects);
                }
            }
        }
        self.dispatch(effects);
        self.plan_to_share(effects);
    }
}

impl Worker {
    /// Whether it could do what another has.
    fn is_idle(&self) -> bool {
        self.phase == Phase::Serving && self.running.is_empty() && self.lease == 0 && !self.is_stalled()
    }

    /// Whether what it has not begun may go to others: it is not checked out, or only about to be.
    fn is_shared(&self) -> bool {
        self.lease == 0 || self.running.front().is_some_and(|running| running.group.options.acquires)
    }

    /// Whether it has something behind what it is at.
    fn has_more(&self) -> bool {
        let mut unbegun = self.running.iter().enumerate();
        unbegun.any(|(at, running)| running.end > running.done + u32::from(at == 0))
    }

    /// Whether it is not known to have begun what it is at.
    fn may_not_begin(&self) -> bool {
        self.is_shared() && self.running.front().is_some_and(|running| running.begun != Some(running.done))
    }

    /// Whether others should have what it has not begun.
    fn is_slow(&mut self, now: Instant) -> bool {
        let (has_more, moved) = (self.has_more(), self.moved);
        let Some(running) = self.running.front_mut() else { return false };
        if self.lane.claim(running.number).started > running.done {
            running.begun = Some(running.done);
        }
        let has_begun = running.begun == Some(running.done);
        has_more && now.saturating_duration_since(running.since) >= SHARE_AFTER
            || !has_begun && now.saturating_duration_since(running.since.max(moved)) >= TAKE_OVER_AFTER
    }

    /// Whether it may have an order of `len` bytes, with at most `depth` under way.
    fn takes(&mut self, depth: usize, len: usize) -> bool {
        let is_free =
            self.phase == Phase::Serving && self.running.len() < depth && (self.given < self.share || self.lease > 0);
        let is_free = is_free && !self.is_stalled();
        let is_carried = self.lane.can_carry(len + Header::LEN);
        if !is_free {
            return false;
        }
        // Before the look: what is given up after it is a change.
        let given_up = self.lane.given_up();
        let takes = self.lane.takes(if is_carried { len } else { 0 } + Header::LEN);
        if !takes {
            self.full = Some(given_up);
        }
        takes
    }

    /// Gives an order for which there is room in the lane, or finds that there is none any more. What is large is sent when
    /// the lock is free.
    fn give(&mut self, group: &Group, chunk: &mut Chunk, grace: Duration, effects: &mut Effects) -> Option<u32> {
        let (header, items) = (chunk.header(group, grace), chunk.count as usize);
        if chunk.attachments.is_empty() && self.lane.can_carry(chunk.bytes().len() + Header::LEN) {
            return self.lane.give(0, [&header, chunk.bytes()], items);
        }
        if !self.lane.takes(Header::LEN) {
            return None;
        }
        // Before it is sent: what is given up after that is a change.
        let given_up = self.lane.given_up();
        self.outbox.add(self.lane.next_number(), chunk.seal());
        if chunk.bytes().len() <= SOON_COPIED {
            // Its worker is to find it there, and not to sleep once more.
            let unsent = self.outbox.send().into_iter().map(|unsent| (self.outbox.clone(), unsent));
            effects.unsent.extend(unsent);
        }
        if !self.outbox.is_empty() {
            self.unsent = Some(given_up);
            effects.outboxes.push(self.outbox.clone());
        }
        self.lane.give(IN_PIPE, [&header, &[]], items)
    }
}

/// Takes back what has not started of a worker's order, of which `done` items are done; how far it goes now.
pub(in crate::pool) fn take_back(lane: &PoolEnd, outbox: &Outbox, number: u32, done: u32) -> Claim {
    let claim = lane.take_back(number, done);
    if claim.end == 0 {
        outbox.forget(number);
    }
    claim
}
