//! The pool's end of a lane: gives orders, takes items back, takes results.

use super::board::Board;
use super::worker_end::WorkerEnd;
use super::{
    AHEAD, Claim, HEAD_LEN, INDEX, INDEX_BITS, MAGIC, ORDERS, RESULTS, Ring, asked, claimable, now_us, orders, results,
    rings, row, take_back, took, word,
};
use crate::channel::result_notification;
use crate::channel::spsc::{Corrupt, Reader, Writer};
use crate::os::{cpu, fault};
use crate::shm::region::Region;
use crate::wait::WaitQueue;
use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;
use std::time::Duration;

/// The pool's end.
pub(crate) struct PoolEnd {
    region: Arc<Region>,
    work: Arc<WaitQueue>,
    room: Arc<WaitQueue>,
    stop: Arc<WaitQueue>,
    orders: Writer<Ring>,
    results: Reader<Ring>,
    given: u32,
    /// How far each order that may be under way goes at most.
    ends: [Cell<u32>; AHEAD as usize],
    /// An impossible value was found; it is reported once, instead of results.
    is_damaged: Cell<bool>,
    is_over: bool,
}

/// A new lane, number `lane` on its board: the pool's end, and the worker's to be sent there.
pub(crate) fn create(board: &Board, lane: usize) -> io::Result<(PoolEnd, WorkerEnd)> {
    let len = HEAD_LEN as u64 + u64::from(ORDERS) + u64::from(RESULTS);
    let region = Arc::new(Region::create("multiprocess-lane", HEAD_LEN, len)?);
    region.words()[word::MAGIC].store(MAGIC, Release);
    let wait_queue = |first| WaitQueue::new(region.clone(), first, None);
    let (work, room, stop) = (wait_queue(word::WORK)?, wait_queue(word::ROOM)?, wait_queue(word::STOP)?);
    let [orders, results] = rings(&region)?;
    let worker = WorkerEnd::of(region.clone(), board.0.clone(), lane)?;
    let (orders, results) = (Writer::new(orders, ORDERS), Reader::new(results, RESULTS));
    let (ends, is_damaged) = Default::default();
    Ok((PoolEnd { region, work, room, stop, orders, results, given: 0, ends, is_damaged, is_over: false }, worker))
}

impl PoolEnd {
    /// Returns `true` if an order of `len` bytes can travel through the ring at all.
    pub(crate) fn can_carry(&self, len: usize) -> bool {
        // A quarter, so that prefetched ones find room.
        len <= ORDERS as usize / 4
    }

    /// Returns `true` if an order of `len` bytes may be given now.
    pub(crate) fn takes(&mut self, len: usize) -> bool {
        let words = orders(&self.region);
        if !self.orders.is_sound(words) {
            self.is_damaged.set(true);
            return false;
        }
        self.orders.under_way(words) < AHEAD && self.orders.has_room_for(words, len)
    }

    /// The number of the order that is given next.
    pub(crate) fn next_number(&self) -> u32 {
        self.given
    }

    /// Whether the next order would get the row of order `number`.
    pub(crate) fn would_reuse_row_of(&self, number: u32) -> bool {
        self.given.wrapping_sub(number) >= AHEAD
    }

    /// How far the worker is with giving orders up: there can be more room than before once this has changed.
    pub(crate) fn given_up(&self) -> u64 {
        orders(&self.region).head.load(Acquire)
    }

    /// Returns `true` if the worker takes orders by now, or has ever.
    pub(crate) fn is_ready(&self) -> bool {
        self.region.words()[word::READY].load(Acquire) != 0
    }

    /// Gives an order of `items` items; its number, or `None` if there is no room now. A worker that is awake finds it; [`notify_given`](Self::notify_given)
    /// wakes one that sleeps.
    pub(crate) fn give(&mut self, kind: u8, parts: [&[u8]; 2], items: usize) -> Option<u32> {
        if !self.takes(parts[0].len() + parts[1].len()) {
            return None;
        }
        let number = self.given;
        let (claim, started) = row(&self.region, number);
        self.ends[(number % AHEAD) as usize].set(items as u32);
        claim.store(claimable(number, items), Relaxed);
        started.store(0, Relaxed);
        took(&self.region, number).store(0, Relaxed);
        if !self.orders.push(orders(&self.region), kind, parts) {
            return None;
        }
        self.given = number.wrapping_add(1);
        fault::point("lane.given");
        Some(number)
    }

    /// Wakes the worker, if it sleeps, for all orders that were given before this.
    pub(crate) fn notify_given(&self) {
        if self.work.has_sleepers_after_rmw() {
            self.region.words()[word::WAKER].store(cpu::current() as u64 + 1, Relaxed);
        }
        self.work.notify_one();
    }

    /// How far an order is that was given and is not complete.
    pub(crate) fn claim(&self, number: u32) -> Claim {
        self.believed(number, Claim::of(row(&self.region, number).0.load(Acquire)), 0)
    }

    /// A claim as far as it can be true of an order of which `done` items are done.
    fn believed(&self, number: u32, claim: Claim, done: u32) -> Claim {
        let known = &self.ends[(number % AHEAD) as usize];
        let end = claim.end.clamp(done.min(known.get()), known.get());
        if end != claim.end {
            self.is_damaged.set(true);
        }
        Claim { started: claim.started.min(end), end }
    }

    /// For how long item `index` of an order has run; `None` as long as its start is not noted.
    pub(crate) fn has_run(&self, number: u32, index: u32) -> Option<Duration> {
        let note = row(&self.region, number).1.load(Acquire);
        let is_its = note & INDEX == u64::from(index) + 1;
        is_its.then(|| Duration::from_micros(now_us().saturating_sub(note >> INDEX_BITS)))
    }

    /// How long the worker was at order `number`, by its own clock, if it reported that. For an order whose last result has come.
    pub(crate) fn took(&self, number: u32) -> Option<Duration> {
        let ns = took(&self.region, number).load(Relaxed);
        (ns > 0).then(|| Duration::from_nanos(ns))
    }

    /// Returns `true` if an impossible value was found.
    pub(crate) fn is_damaged(&self) -> bool {
        self.is_damaged.get()
    }

    /// Takes items back that have not started, of an order of which `done` are done; how far it goes now.
    pub(crate) fn take_back(&self, number: u32, done: u32) -> Claim {
        let claim = self.believed(number, take_back(row(&self.region, number).0, done), done);
        self.ends[(number % AHEAD) as usize].set(claim.end);
        claim
    }

    /// Returns `true` if the worker will announce its results when it begins order `number`, the last that was given, about which
    /// it may be quiet, and which has [`MANY`] items. The caller has armed its alarm before.
    pub(crate) fn will_notify(&self, number: u32) -> bool {
        result_notification::will_notify(row(&self.region, number).0)
    }

    /// Asks for a notification of each result of order `number` from now on, and looks for those that were put before after this.
    pub(crate) fn enable_notification(&self, number: u32) {
        result_notification::enable_notification(row(&self.region, number).0);
    }

    /// Returns `true` if results have come. No system call, no wake.
    #[inline]
    pub(crate) fn has_results(&self) -> bool {
        (self.results.has_any(results(&self.region)) || self.is_damaged.get()) && !self.is_over
    }

    /// Appends the records of all results that have come; how many.
    pub(crate) fn take_results(&mut self, to: &mut Vec<u8>) -> Result<u32, Corrupt> {
        let taken = match self.is_damaged.get() {
            true => Err(Corrupt),
            false => self.results.take_all(results(&self.region), to),
        };
        self.is_over |= taken.is_err();
        let count = taken?;
        self.room.notify_one();
        Ok(count)
    }

    /// Asks the item that runs as `index` of an order to stop.
    pub(crate) fn ask_to_stop(&self, number: u32, index: u32) {
        self.region.words()[word::ASKED].store(asked(number, index), Release);
        self.stop.notify_all();
    }

    /// Bytes of memory that the worker had when it last looked: now, and at most.
    pub(crate) fn memory(&self) -> (u64, u64) {
        let words = self.region.words();
        (words[word::RESIDENT].load(Relaxed), words[word::PEAK].load(Relaxed))
    }

    /// No order will follow.
    pub(crate) fn close(&self) {
        self.region.words()[word::CLOSED].store(1, Release);
        self.work.notify_all();
    }
}
