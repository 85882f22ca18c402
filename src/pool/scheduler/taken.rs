//! Orders that a taker holds, in a pool without worker processes.

use super::Scheduler;
use super::dispatch::note_wait;
use super::effects::Effects;
use crate::error::Error;
use crate::pool::batch::ResultBatch;
use crate::pool::call_items::CallItems;
use crate::pool::chunk::Chunk;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Release};
use std::time::Duration;

#[derive(Default)]
pub(super) struct TakenOrders {
    /// Those that the taker holds, settled or not.
    held: HashMap<u64, HeldOrder>,
    last: u64,
    /// Those that were cancelled, until the taker has asked for them.
    cancelled: Vec<u64>,
    /// How many can be executed at the same time.
    slots: usize,
    /// The taker is to be notified.
    is_notice_due: bool,
}

struct HeldOrder {
    group: Arc<CallItems>,
    first: u64,
    count: u32,
    /// The bytes of the arguments.
    bytes: usize,
    /// A bit for each item that is settled.
    settled: Vec<u64>,
    left: u32,
    is_cancelled: Arc<AtomicBool>,
}

impl HeldOrder {
    /// Returns `true` if that item is one of it, and neither settled nor cancelled.
    fn is_open(&self, index: u64) -> bool {
        if self.left == 0 {
            return false;
        }
        let Some(at) = index.checked_sub(self.first).filter(|at| *at < u64::from(self.count)) else { return false };
        self.settled[at as usize / 64] >> (at % 64) & 1 == 0
    }

    /// From now on these items are settled.
    fn settle(&mut self, first: u64, count: u32) {
        for at in first - self.first..first - self.first + u64::from(count) {
            self.settled[at as usize / 64] |= 1 << (at % 64);
        }
        self.left -= count;
    }

    /// The first and the last of each run of items that are not settled, counted from 0.
    fn open_runs(&self) -> Vec<(u32, u32)> {
        let mut runs = Vec::<(u32, u32)>::new();
        for at in (0..self.count).filter(|at| self.is_open(self.first + u64::from(*at))) {
            match runs.last_mut() {
                Some((_, end)) if *end == at => *end = at + 1,
                _ => runs.push((at, at + 1)),
            }
        }
        runs
    }

    /// All of it is settled.
    fn end(&mut self, id: u64) {
        self.left = 0;
        self.group.items().taken.remove(&id);
        self.group.release(self.bytes);
    }

    fn fail_open(&mut self, id: u64, error: impl Fn() -> Error, effects: &mut Effects) {
        if self.left == 0 {
            return;
        }
        for at in self.open_runs().into_iter().flat_map(|(from, to)| from..to) {
            effects.deliver(&self.group, ResultBatch::failed(self.first + u64::from(at), error()));
        }
        self.end(id);
    }
}

impl TakenOrders {
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Returns how many items are at work, if as many are as can be.
    pub(super) fn running(&self) -> usize {
        let left = self.held.values().map(|taken| taken.left as usize).sum::<usize>();
        left.min(self.slots)
    }

    pub(super) fn slots(&self) -> usize {
        self.slots
    }

    /// Something may have changed for the taker.
    pub(super) fn notify(&mut self) {
        self.is_notice_due = true;
    }

    pub(super) fn take_notice(&mut self) -> bool {
        std::mem::take(&mut self.is_notice_due)
    }
}

/// An order that was taken just now.
pub(in crate::pool) struct TakenOrder {
    pub(in crate::pool) id: u64,
    pub(in crate::pool) group: Arc<CallItems>,
    pub(in crate::pool) chunk: Chunk,
    pub(in crate::pool) is_cancelled: Arc<AtomicBool>,
}

// Events of the taker.
impl Scheduler {
    /// The taker takes its next order.
    pub(in crate::pool) fn order_taken(&mut self, effects: &mut Effects) -> Option<TakenOrder> {
        loop {
            let group = self.queue.front()?.clone();
            let Some(mut chunk) = self.next_order(&group, None) else { continue };
            note_wait(&mut self.waits, &mut chunk, effects.now());
            self.taken.last += 1;
            let id = self.taken.last;
            let is_cancelled = Arc::<AtomicBool>::default();
            let taken = HeldOrder {
                group: group.clone(),
                first: chunk.first,
                count: chunk.count,
                bytes: chunk.bytes().len(),
                settled: vec![0; chunk.count.div_ceil(64) as usize],
                left: chunk.count,
                is_cancelled: is_cancelled.clone(),
            };
            self.taken.held.insert(id, taken);
            group.items().taken.insert(id);
            return Some(TakenOrder { id, group, chunk, is_cancelled });
        }
    }

    /// Some items have their outcomes. Items that are settled already are passed over.
    ///
    /// `ran` is how long they took, if the taker has measured that.
    pub(in crate::pool) fn items_settled(
        &mut self,
        id: u64,
        batch: ResultBatch,
        ran: Option<Duration>,
        effects: &mut Effects,
    ) {
        let Some(taken) = self.taken.held.get_mut(&id) else { return };
        if let Some(time) = ran.filter(|_| batch.count() > 0) {
            taken.group.learn(time, batch.count());
            self.runs.add(time / batch.count(), batch.count().into());
        }
        for batch in batch.only(|index| taken.is_open(index)) {
            taken.settle(batch.first(), batch.count());
            if taken.left == 0 {
                taken.end(id);
            }
            effects.deliver(&taken.group, batch);
        }
        self.end_if_done(effects);
    }

    /// The taker has measured how long `items` items took.
    pub(in crate::pool) fn items_ran(&mut self, group: &CallItems, time: Duration, items: u32) {
        if items > 0 {
            group.learn(time, items);
            self.runs.add(time / items, items.into());
        }
    }

    /// The items of an order that are not settled wait again.
    pub(in crate::pool) fn order_given_back(&mut self, id: u64, chunk: &Chunk, effects: &mut Effects) {
        let taken = self.taken.held.remove(&id);
        // The end of the pool may wait for this.
        effects.nudge |= self.is_closed;
        let Some(mut taken) = taken.filter(|taken| taken.left > 0) else { return self.end_if_done(effects) };
        let parts = taken.open_runs().into_iter().map(|(from, to)| chunk.part(from, to)).collect::<Vec<_>>();
        taken.end(id);
        if let Some(error) = self.gave_up() {
            // Items that had not begun then are given up, also those of a taker.
            parts.iter().for_each(|part| effects.fail(&taken.group, part, (0, part.count), || Error::copy(&error)));
            return self.end_if_done(effects);
        }
        // While it was taken, nothing watched how long it waits.
        let queued = parts.iter().filter_map(|part| part.queued).min();
        self.enqueue(&taken.group, parts.into_iter(), true);
        queued.into_iter().for_each(|queued| self.watch_queue(&taken.group, queued, effects));
    }

    /// The taker has dropped an order. Items that it has not settled fail.
    pub(in crate::pool) fn order_dropped(&mut self, id: u64, error: impl Fn() -> Error, effects: &mut Effects) {
        let Some(mut taken) = self.taken.held.remove(&id) else { return };
        taken.fail_open(id, error, effects);
        self.end_if_done(effects);
        effects.nudge |= self.is_closed;
    }

    /// Which orders were cancelled since this was asked last.
    pub(in crate::pool) fn cancelled_orders(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.taken.cancelled)
    }

    /// So many orders can be executed at the same time from now on.
    pub(in crate::pool) fn slots_changed(&mut self, slots: usize, effects: &mut Effects) {
        let before = std::mem::replace(&mut self.taken.slots, slots);
        if slots > before {
            self.wake_callers(effects);
        }
    }

    /// Returns `true` if the taker will never have another order.
    pub(in crate::pool) fn has_ended(&mut self) -> bool {
        self.is_abandoned || self.is_closed && self.alive() == 0
    }

    /// Settles the items of `call_items` that the taker has, and has it notified.
    pub(super) fn cancel_taken(&mut self, group: &CallItems, effects: &mut Effects) {
        let ids = std::mem::take(&mut group.items().taken);
        ids.into_iter().for_each(|id| self.cancel_order(id, || group.was_cancelled(), effects));
    }

    /// Cancels all orders that the taker has.
    pub(super) fn cancel_all_taken(&mut self, effects: &mut Effects, error: impl Fn() -> Error) {
        let ids = self.taken.held.keys().copied().collect::<Vec<_>>();
        ids.into_iter().for_each(|id| self.cancel_order(id, &error, effects));
        self.taken.notify();
    }

    fn cancel_order(&mut self, id: u64, error: impl Fn() -> Error, effects: &mut Effects) {
        let Some(taken) = self.taken.held.get_mut(&id).filter(|taken| taken.left > 0) else { return };
        taken.fail_open(id, error, effects);
        taken.is_cancelled.store(true, Release);
        self.taken.cancelled.push(id);
        self.taken.notify();
    }

    /// Has callers look whether they may submit more items.
    pub(super) fn wake_callers(&mut self, effects: &mut Effects) {
        let at_workers =
            self.seats.workers().flat_map(|(_, worker)| worker.running.iter().map(|running| &running.group));
        let groups = self.queue.iter().chain(self.taken.held.values().map(|taken| &taken.group)).chain(at_workers);
        effects.wakers.extend(groups.filter_map(|group| group.take_waker()));
    }
}
