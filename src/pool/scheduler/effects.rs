//! Work that an event leaves for after the scheduler's lock is released, and the tasks of the driver.

use super::worker::{Control, Took};
use crate::channel::lane::PoolEnd;
use crate::error::{Error, Result};
use crate::pool::batch::ResultBatch;
use crate::pool::call_items::CallItems;
use crate::pool::chunk::Chunk;
use crate::pool::side_channel::{Recipient, SideOrders, SideResults, Unsent};
use crate::pool::stats::PoolTotals;
use crate::pool::trace::TraceSink;
use crate::wire::EncodedMessage;
use std::sync::{Arc, Weak};
use std::task::Waker;
use std::time::{Duration, Instant};

/// A worker that is to be started.
pub(in crate::pool) struct Spawn {
    pub(in crate::pool) seat: usize,
    pub(in crate::pool) generation: u64,
}

/// A worker that was started.
pub(in crate::pool) struct Spawned {
    pub(in crate::pool) name: String,
    pub(in crate::pool) pid: u32,
    pub(in crate::pool) control: Box<dyn Control>,
    pub(in crate::pool) lane: PoolEnd,
    pub(in crate::pool) side_orders: Arc<SideOrders>,
    pub(in crate::pool) side_results: Arc<SideResults>,
}

/// Which order, of which worker.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) seat: usize,
    pub(super) generation: u64,
    pub(super) number: u32,
}

/// The work of the driver.
pub(in crate::pool) struct Step {
    pub(in crate::pool) spawns: Vec<Spawn>,
    /// Reports of initializers.
    pub(in crate::pool) begun: Vec<(usize, u64, Result<EncodedMessage>)>,
    /// Side channels with results that their callers do not fetch.
    pub(in crate::pool) unfetched: Vec<Arc<SideResults>>,
    pub(in crate::pool) until: Option<Instant>,
    /// No worker is to be started any more.
    pub(in crate::pool) is_unneeded: bool,
    pub(in crate::pool) is_over: bool,
}

/// Work for after the lock is released.
#[derive(Default)]
pub(in crate::pool) struct Effects {
    pub(in crate::pool) wakers: Vec<Waker>,
    pub(in crate::pool) settled: usize,
    pub(in crate::pool) nudge: bool,
    /// The pool's taker is to be notified.
    pub(in crate::pool) notify_taker: bool,
    /// Something lies in a pipe, and for too long in these.
    pub(super) has_side_results: bool,
    pub(super) unfetched: Vec<Arc<SideResults>>,
    /// Where large orders are to be sent from.
    pub(in crate::pool) side_orders: Vec<Arc<SideOrders>>,
    /// Orders that could not be sent.
    pub(in crate::pool) unsent: Vec<(Arc<SideOrders>, Unsent)>,
    /// Items that ended after their time, each as a chunk of its own, with the name of the worker.
    pub(super) late_items: Vec<(Arc<CallItems>, Chunk, String)>,
    /// Trace sinks with new messages.
    pub(in crate::pool) trace_sinks: Vec<Arc<TraceSink>>,
    /// Groups that may be at their end. They are dropped without the lock, as the spans and progress receivers of their callers
    /// run code of the user then.
    pub(super) groups: Vec<Arc<CallItems>>,
    /// Unsettled items of the callers that are woken.
    pub(super) woken: usize,
    /// The fates of items and workers, counted.
    pub(super) totals: PoolTotals,
    /// Workers that were killed because they did not end within their time.
    pub(in crate::pool) late: Vec<(String, Duration)>,
    pub(super) now: Option<Instant>,
    /// The calls whose orders have come to their end, with the number of items.
    pub(super) ended: Vec<(Arc<CallItems>, u32, Took)>,
}

impl Effects {
    /// When this was begun: one look at the clock does for all that is done in one go.
    pub(super) fn now(&mut self) -> Instant {
        *self.now.get_or_insert_with(Instant::now)
    }

    pub(super) fn deliver(&mut self, group: &CallItems, batch: ResultBatch) {
        self.settled += batch.count() as usize;
        match batch.outcome_of_one() {
            None => {
                self.totals.done += u64::from(batch.count() - batch.failures());
                let kinds = batch.kinds();
                self.totals.failed += u64::from(batch.failures()).saturating_sub(kinds.len() as u64);
                kinds.iter().for_each(|(_, kind)| self.totals.count(*kind));
            }
            Some(Ok(tag)) => self.totals.count_tag(tag),
            Some(Err(kind)) => self.totals.count(kind),
        }
        let count = batch.count() as usize;
        self.wake(group.deliver(batch), count);
    }

    /// The next result in a worker's pipe is that of an item.
    pub(super) fn announce(&mut self, side_results: &Arc<SideResults>, group: &Arc<CallItems>, index: u64, tag: u8) {
        self.settled += 1;
        self.totals.count_tag(tag);
        self.has_side_results = true;
        let recipient: Weak<dyn Recipient> = Arc::<CallItems>::downgrade(group);
        side_results.expect(recipient, index, tag);
        self.wake(group.announce(side_results), 1);
    }

    /// Notes that results of `count` items were delivered. `woken` is the caller that they woke, if any, with the number of its items that are still out.
    fn wake(&mut self, woken: Option<(Waker, usize)>, count: usize) {
        match woken {
            Some((waker, out)) => {
                self.wakers.push(waker);
                self.woken += out;
            }
            // Perhaps of a caller that was woken before: its items are fewer now. Too few are counted rather than too many, as then
            // another caller is not left waiting.
            None => self.woken = self.woken.saturating_sub(count),
        }
    }

    /// Settles the items of `chunk` from `from` on, before `to`.
    pub(super) fn fail(&mut self, group: &CallItems, chunk: &Chunk, (from, to): (u32, u32), error: impl Fn() -> Error) {
        (from..to).for_each(|at| self.deliver(group, ResultBatch::failed(chunk.first + u64::from(at), error())));
    }

    /// Fails all items of a chunk that no worker got.
    pub(super) fn fail_pending(&mut self, group: &CallItems, chunk: &Chunk, error: impl Fn() -> Error) {
        self.fail(group, chunk, (0, chunk.count), error);
        group.forget(chunk);
    }
}
