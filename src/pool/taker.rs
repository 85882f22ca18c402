//! The seam between a pool and whatever executes its items.
//!
//! A pool turns each call into *orders*: some items of one call, as encoded bytes, with the function to call. Worker
//! processes take them by their lanes; everything else takes them here. The thread of a pool within this process
//! (`local`) does, and so can a task that sends orders to other hosts. Calls, handles, look-ahead, chunks, progress and
//! cancellation do not know the difference.
//!
//! # What an executor brings
//! | decision | by |
//! |---|---|
//! | how long, and how large, an order should be | [`ChunkLimits`], given with the [`External`] that makes the pool |
//! | how many orders can be executed at the same time | [`Orders::set_capacity`], at any time; it decides how far ahead items are pulled from their source |
//! | when an order is taken, and when its items are settled | [`Orders::take`] and the methods of [`Order`] |
//!
//! # The life of an order
//! ```text
//!          take                  settle, fail: each item once
//! waiting ------> an Order is held -------------------------> all settled: drop it
//!    ^               |        |
//!    '---------------'        '--- its call is cancelled, or the pool ends: `Orders::cancelled` names it, `is_cancelled`
//!        give_back                 is true, its open items are settled by the pool; drop it
//! ```
//!
//! [`Taker::notify`] is called, without a lock held, from any thread, when orders may wait, when orders were cancelled, and
//! when the pool has ended. A taker then takes orders until there is none, reads [`Orders::cancelled`], and ends once
//! [`Orders::is_over`]. A pool that was closed counts as ended when each order that was taken has been dropped.
//!
//! # Items
//! An order's arguments are records one after the other, as `channel::spsc` appends them; [`Order::records`] has all of them,
//! [`Order::items`] one by one. Results go back as records as well: [`EncodedResults`]. An order whose item brings descriptors
//! has that one item only.
//!
//! # Limits
//! The pool keeps an item's `queue_timeout` until its order is taken; from then on the taker does, by [`Order::start_by`].
//! `timeout`, `grace`, `retries`, `retry_on` and `back_off` are for the taker to keep, or to pass on: an error that it settles an item
//! with is final.

use super::batch::ResultBatch;
use super::call_items::CallItems;
use super::chunk::Chunk;
use super::options::ChunkLimits;
use super::protocol::Origin;
use super::retry::Retry;
use super::stats::PoolStats;
use crate::channel::spsc;
use crate::error::{Error, ErrorKind, Result};
use crate::process::entry::{self, IS_VALUE};
use crate::wire::{self, Attachment, EncodedMessage};
use bytes::Bytes;
use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Executes a pool's items outside of worker processes.
pub(crate) trait Taker: Any + Send + Sync {
    /// Something has changed: see the head of this file. Must not block, nor call into the pool.
    fn notify(&self);

    /// The error of an operation that needs worker processes of the pool's own: `what` is "resized", "checked out" or "revived".
    fn refuse(&self, what: &str) -> Error;

    /// Returns `true` if it executes items on this machine, so that they may bring descriptors.
    fn is_here(&self) -> bool {
        true
    }

    /// Adds what it knows to the figures of its pool.
    fn add_stats(&self, _stats: &mut PoolStats) {}
}

/// Starts the executor of a pool that is being built; it takes orders from `Orders` until that [is over](Orders::is_over).
pub(crate) type Start = Box<dyn FnOnce(Orders) -> Result<Arc<dyn Taker>> + Send + Sync>;

/// Options of a pool whose items are executed elsewhere; see `PoolBuilder::external`.
pub(crate) struct External {
    pub(crate) chunks: ChunkLimits,
    pub(crate) start: Start,
}

/// The pool, as the seam sees it.
pub(super) trait Source: Send + Sync {
    fn take(&self) -> Option<Handed>;
    fn settle(&self, order: u64, batch: ResultBatch, ran: Option<Duration>);
    fn ran(&self, group: &CallItems, time: Duration, items: u32);
    fn give_back(&self, order: u64, chunk: Chunk);
    fn dropped(&self, order: u64, why: &dyn Fn() -> Error);
    fn cancelled(&self) -> Vec<u64>;
    fn set_capacity(&self, slots: usize);
    fn is_over(&self) -> bool;
}

/// An order that was taken just now.
pub(super) struct Handed {
    pub(super) id: u64,
    pub(super) group: Arc<CallItems>,
    pub(super) chunk: Chunk,
    pub(super) is_cancelled: Arc<AtomicBool>,
    pub(super) grace: Duration,
}

/// Where a taker gets its orders. Does not keep the pool alive.
#[derive(Clone)]
pub(crate) struct Orders(Weak<dyn Source>);

#[allow(dead_code)] // A part of it is for takers of other modules.
impl Orders {
    pub(super) fn of(source: Weak<dyn Source>) -> Self {
        Self(source)
    }

    /// Takes the next order, if one waits. Calls take turns.
    pub(crate) fn take(&self) -> Option<Order> {
        let Handed { id, group, chunk, is_cancelled, grace } = self.0.upgrade()?.take()?;
        Some(Order { source: self.0.clone(), id, group, chunk: Some(chunk), is_cancelled, grace })
    }

    /// The orders that were taken and have been cancelled since this was called last, by their ids. All of their items are
    /// settled, and later results of them are dropped.
    pub(crate) fn cancelled(&self) -> Vec<u64> {
        self.0.upgrade().map(|source| source.cancelled()).unwrap_or_default()
    }

    /// From now on so many orders can be executed at the same time; 0, as at the start, if that is not known or none can.
    /// Calls then pull more, or fewer, items ahead.
    pub(crate) fn set_capacity(&self, slots: usize) {
        self.0.upgrade().into_iter().for_each(|source| source.set_capacity(slots));
    }

    /// Returns `true` if no order will ever come any more: the pool has ended or is gone.
    pub(crate) fn is_over(&self) -> bool {
        self.0.upgrade().is_none_or(|source| source.is_over())
    }
}

/// The limits of each item of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// From an item's start; then it is asked to stop, and killed after `grace`.
    pub(crate) timeout: Option<Duration>,
    pub(crate) grace: Duration,
    /// How often an item that killed its worker, or was killed for its time, is tried again; and after which of these failures.
    pub(crate) retries: u32,
    pub(crate) retry_on: Retry,
    /// How long the first retry waits; each further one twice as long.
    pub(crate) back_off: Duration,
    /// The caller's `chunksize`; 0 is by measured time.
    pub(crate) chunk: usize,
}

/// Some items of one call, held by a taker. Dropping it fails those that are not settled.
pub(crate) struct Order {
    source: Weak<dyn Source>,
    id: u64,
    group: Arc<CallItems>,
    /// There until the order is given back.
    chunk: Option<Chunk>,
    is_cancelled: Arc<AtomicBool>,
    grace: Duration,
}

#[allow(dead_code)] // A part of it is for takers of other modules.
impl Order {
    fn chunk(&self) -> Option<&Chunk> {
        self.chunk.as_ref()
    }

    /// Names this order among all of its pool.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The function to call.
    pub(crate) fn call(&self) -> entry::Call {
        self.group.call
    }

    /// Returns `true` if its item brings the queue for its events; see `events`.
    pub(super) fn has_events(&self) -> bool {
        self.group.options.has_events
    }

    /// The flag that [`is_cancelled`](Self::is_cancelled) reads.
    pub(super) fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.is_cancelled.clone()
    }

    /// The function's name, as the compiler spells it.
    pub(crate) fn label(&self) -> &'static str {
        self.group.label
    }

    /// Which call it is of, among those of all processes.
    pub(crate) fn origin(&self) -> Origin {
        self.group.origin()
    }

    /// The index of the first item in its call. Those of the others follow.
    pub(crate) fn first(&self) -> u64 {
        self.chunk().map_or(0, |chunk| chunk.first)
    }

    pub(crate) fn count(&self) -> u32 {
        self.chunk().map_or(0, |chunk| chunk.count)
    }

    /// How often its items were given to an executor before.
    pub(crate) fn attempt(&self) -> u32 {
        self.chunk().map_or(0, |chunk| chunk.attempt)
    }

    /// The encoded arguments of all items, a record each.
    pub(crate) fn records(&self) -> &[u8] {
        self.chunk().map_or(&[], Chunk::bytes)
    }

    /// The same bytes as [`records`](Self::records), for parts of them to be sent without a copy.
    pub(crate) fn shared_records(&mut self) -> Bytes {
        self.chunk.as_mut().map(Chunk::share).unwrap_or_default()
    }

    /// The encoded arguments of each item, with its index.
    pub(crate) fn items(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let (first, mut rest) = (self.first(), self.records());
        (0..u64::from(self.count())).map_while(move |at| {
            let (_, payload, len) = spsc::first(rest)?;
            rest = rest.get(len..)?;
            Some((first + at, payload))
        })
    }

    /// The descriptors that the only item brings.
    pub(crate) fn attachments(&self) -> &[Attachment] {
        self.chunk().map_or(&[], |chunk| &chunk.attachments)
    }

    pub(crate) fn limits(&self) -> Limits {
        let options = &self.group.options;
        Limits {
            timeout: options.timeout,
            grace: options.grace.unwrap_or(self.grace),
            retries: options.retries,
            retry_on: options.retry_on,
            back_off: options.back_off,
            chunk: options.chunk,
        }
    }

    /// Until when its items are to have begun, by the call's `queue_timeout`. One that has not is failed with
    /// [`not_begun`](Self::not_begun).
    pub(crate) fn start_by(&self) -> Option<Instant> {
        let limit = self.group.options.queue_timeout?;
        self.chunk()?.queued?.checked_add(limit)
    }

    /// The error of an item that has not begun in time.
    pub(crate) fn not_begun(&self) -> Error {
        self.group.queued_out()
    }

    /// How long an item of this call usually takes, if that is known.
    pub(crate) fn item_time(&self) -> Option<Duration> {
        self.group.item_time()
    }

    /// Returns `true` if its results are not wanted any more: its call was cancelled, or the pool has ended.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Acquire)
    }

    /// Says that `items` items took `time` in all, waits excluded. Later chunks of this call, and the pool's figures, are
    /// made from that.
    pub(crate) fn ran(&self, time: Duration, items: u32) {
        self.source.upgrade().into_iter().for_each(|source| source.ran(&self.group, time, items));
    }

    /// Settles items. The first result of an item counts: one that is settled already is passed over.
    ///
    /// # Errors
    /// `Decode` if the records are malformed, or are of items that are not of this order: nothing is settled.
    pub(crate) fn settle(&mut self, results: EncodedResults) -> Result<()> {
        let failures = results.check()?;
        if results.count == 0 {
            // It would stand in the place of the item that it begins with.
            return Ok(());
        }
        let end = self.first() + u64::from(self.count());
        if results.first < self.first() || results.first + u64::from(results.count) > end {
            let text = format!("results of items {} of {} that were not asked for", results.first, self.label());
            return Err(Error::new(ErrorKind::Decode, text));
        }
        let kinds = if failures > 0 { results.kinds() } else { Vec::new() };
        let EncodedResults { first, count, records } = results;
        self.settle_batch(ResultBatch::records(first, count, failures, records.into()).with_kinds(kinds));
        Ok(())
    }

    /// Settles one item, which took `time`, with an outcome that may bring descriptors; includes [`ran`](Self::ran).
    pub(crate) fn settle_encoded(&mut self, index: u64, tag: u8, outcome: EncodedMessage, time: Duration) {
        if let Some(source) = self.source.upgrade() {
            source.settle(self.id, ResultBatch::One(index, Some(Ok((tag, outcome)))), Some(time));
        }
    }

    /// Settles one item with an error of the taker's.
    pub(crate) fn fail(&mut self, index: u64, error: Error) {
        self.settle_batch(ResultBatch::failed(index, error));
    }

    /// Settles all items that are not settled with copies of `error`.
    pub(crate) fn fail_rest(self, error: &Error) {
        if let Some(source) = self.source.upgrade() {
            source.dropped(self.id, &|| Error::copy(error));
        }
        // Dropped once more, which finds nothing.
    }

    fn settle_batch(&mut self, batch: ResultBatch) {
        if let Some(source) = self.source.upgrade() {
            source.settle(self.id, batch, None);
        }
    }

    /// Puts the items that are not settled back in front of those that wait, as if they had never been taken.
    pub(crate) fn give_back(mut self) {
        if let (Some(source), Some(chunk)) = (self.source.upgrade(), self.chunk.take()) {
            source.give_back(self.id, chunk);
        }
    }
}

impl Drop for Order {
    fn drop(&mut self) {
        if let Some(source) = self.source.upgrade() {
            let lost =
                || Error::other(format!("an item of {} was given up by what executes this pool", self.group.label));
            source.dropped(self.id, &lost);
        }
    }
}

/// Results of items with consecutive indexes, as they are sent: a record each, whose kind shows whether it is a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EncodedResults {
    pub(crate) first: u64,
    pub(crate) count: u32,
    pub(crate) records: Vec<u8>,
}

#[allow(dead_code)] // For takers of other modules.
impl EncodedResults {
    /// The outcome of one item, as [`Batch::report`](entry::Batch::report) has it.
    ///
    /// # Errors
    /// `Encode` if it is too large for a record.
    pub(crate) fn one(index: u64, tag: u8, payload: &[u8]) -> Result<Self> {
        let mut records = Vec::new();
        spsc::append_record_of(&mut records, tag, payload)?;
        Ok(Self { first: index, count: 1, records })
    }

    /// An error as the outcome of one item.
    pub(crate) fn failed(index: u64, error: &Error) -> Self {
        let (tag, payload) = entry::encode_error(error);
        let mut records = Vec::new();
        // An error is made of texts, far shorter than the longest record.
        let _ = spsc::append_record_of(&mut records, tag, &payload);
        Self { first: index, count: 1, records }
    }

    /// Replaces each error by the result of `change`.
    pub(crate) fn map_errors(self, mut change: impl FnMut(Error) -> Error) -> Self {
        if matches!(self.check(), Ok(0)) {
            return self;
        }
        let (mut records, mut rest) = (Vec::with_capacity(self.records.len()), &self.records[..]);
        while let Some((tag, payload, len)) = spsc::first(rest) {
            let record = &rest[..len];
            rest = &rest[len..];
            match matches!(tag, entry::IS_ERROR | entry::IS_PANIC)
                .then(|| wire::decode_bytes::<Error>(payload, Vec::new()))
            {
                Some(Ok(error)) => {
                    let (tag, payload) = entry::encode_error(&change(error));
                    // An error is made of texts, far shorter than the longest record.
                    let _ = spsc::append_record_of(&mut records, tag, &payload);
                }
                _ => records.extend_from_slice(record),
            }
        }
        Self { records, ..self }
    }

    /// Returns the kinds of the errors among the results, by their items.
    fn kinds(&self) -> Vec<(u64, ErrorKind)> {
        let (mut rest, mut kinds) = (&self.records[..], Vec::new());
        for index in self.first.. {
            let Some((tag, payload, len)) = spsc::first(rest) else { break };
            rest = rest.get(len..).unwrap_or_default();
            match tag {
                IS_VALUE => {}
                entry::IS_PANIC => kinds.push((index, ErrorKind::Panicked)),
                entry::IS_ERROR => {
                    let error = wire::decode_bytes::<Error>(payload, Vec::new());
                    kinds.push((index, error.map_or(ErrorKind::Other, |error| error.kind())));
                }
                _ => kinds.push((index, ErrorKind::Other)),
            }
        }
        kinds
    }

    /// Returns how many of them are no values.
    ///
    /// # Errors
    /// `Decode` if the number of outcomes is not the stated one, or other bytes are among them or behind.
    pub(crate) fn check(&self) -> Result<u32> {
        let (mut rest, mut failures) = (&self.records[..], 0);
        let wrong =
            |what: &str| Error::new(ErrorKind::Decode, format!("{} results that are not whole: {what}", self.count));
        self.first.checked_add(self.count.into()).ok_or_else(|| wrong("their indexes have no end"))?;
        for _ in 0..self.count {
            let (tag, _, len) = spsc::first(rest).ok_or_else(|| wrong("there are fewer"))?;
            if tag > entry::LAST_TAG {
                return Err(wrong("one of an unknown kind"));
            }
            failures += u32::from(tag != IS_VALUE);
            rest = rest.get(len..).unwrap_or_default();
        }
        if rest.is_empty() { Ok(failures) } else { Err(wrong("there are more")) }
    }
}
