//! The memory that a pool and one of its workers share: a ring of orders, a ring of results, and the claims of items.
//!
//! # State
//! The words of the region's head, by name in [`word`]; then the two rings. An order has a number, which is its place in
//! the ring, and some items. `CLAIMS` has a row for each order that may be under way:
//! `NOTIFY_EACH:1 | number:31 | next:16 | end:16`, which item started last, and when (`microseconds:48 | item + 1:16`; 0 is
//! none), and how many nanoseconds the order took (0: not known); for `NOTIFY_EACH`, and when the pool is notified, see `result_notification`.
//! The board is a second region that all workers of a pool have: one event, for the pool to sleep on, and a bit for each
//! lane, its mark, by which the pool is asked to look into that lane.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | a row is made, then the order put | the pool | Release, by the ring | the worker, if it sleeps: once for all orders that were given in one go |
//! | next -> next + 1: an item starts, if next was below end | the worker | SeqCst | the pool, by the rules of `result_notification` |
//! | end -> lower, never below next: items are taken back | the pool | AcqRel CAS | - |
//! | a result is put | the worker | Release, by the ring | the pool, with the next start, or that of the last order |
//! | a mark 0 -> 1 | the worker, with the start after a result, and before each wake | SeqCst | - |
//! | all marks of a word -> 0 | the pool, which then looks into those lanes | SeqCst | - |
//! | the time that an order took | the worker, before the result of its last item | Relaxed: published with that result | - |
//! | a trace event of an item is put, before its result | the worker | Release, by the ring | the pool, if it sleeps |
//! | `WAKER` is set before a wake, and cleared by the woken worker | both | Relaxed: a hint, see `cpu_migration` | - |
//! | results are taken | the pool | Release, by the ring | the worker, if it waits for room |
//! | an order is given up, after its last item | the worker | Release, by the ring | the pool, if no item of it was started, or some were taken back since the worker came to it: no result shows that the worker goes on |
//! | `READY`: the worker looks for its first order | the worker | Release | - |
//! | `ASKED` -> an item that should stop | the pool | Release | the threads of the worker that wait for it |
//! | `CLOSED` | the pool | Release | the worker |
//! | `WATCHED` -> the item at work, and to 0 after it | the worker | Release | with 0: its threads that wait for `ASKED` |
//! | `RESIDENT`, `PEAK` | the worker | Release | - |
//!
//! # Invariants
//! 1. An item is started by the worker or taken back by the pool, never both: both change one word.
//! 2. Results come in the order of starts, one for each item that was started, so their count identifies the item of each.
//!    Trace events of an item come before its result and are of another kind.
//! 3. A row is used again only after the order that had it was given up.
//! 4. Any word that the worker stores may be damaged. The pool remembers the end of each order as it last read it: an end only
//!    becomes lower, and no more items than that start. An impossible word makes the lane damaged, and reading its results
//!    fails: the pool kills the worker and gives the next one a new lane.
//!
//! # Death
//! | the worker is killed | the pool sees |
//! |---|---|
//! | before it starts an item | all items of the order may go to another worker |
//! | between an item's start and its result | one item started beyond the results: that one, and no other, was running |
//! | after the result | the result, which counts |
//! | between a result and its mark, or its notice | the exit of the worker: the pool looks into that lane, marked or not |
//! | between giving an order up and the notice of that | the same |
//!
//! The pool's own process killed, between an order and its wake or while it reads: the worker's lifeline closes, and it
//! is killed as well.
//!
//! # Cancel
//! No await point.

mod board;
mod pool_end;
mod stop_sign;
mod worker_end;

pub(crate) use super::result_notification::Pace;
pub(crate) use board::{Board, Marker};
pub(crate) use pool_end::{PoolEnd, create};
pub(crate) use stop_sign::StopSign;
pub(crate) use worker_end::{EventWriter, LaneOrder, WorkerEnd};

use super::segment::Bytes;
use super::spsc::Words;
use crate::os::clock;
use crate::shm::atomic::AtomicU64;
#[cfg(multiprocess_loom)]
use crate::shm::region as view;
use crate::shm::region::{Map, Region};
#[cfg(not(multiprocess_loom))]
use crate::shm::view;
use crate::wait::sleepers;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

mod word {
    use super::sleepers;
    pub(super) const MAGIC: usize = 0;
    pub(super) const ORDERS_TAIL: usize = 16;
    pub(super) const ORDERS_HEAD: usize = 32;
    pub(super) const RESULTS_TAIL: usize = 48;
    pub(super) const RESULTS_HEAD: usize = 64;
    pub(super) const CLOSED: usize = 80;
    pub(super) const ASKED: usize = 81;
    /// The item for which a thread of the worker waits for `ASKED`, as it is there; 0 is none.
    pub(super) const WATCHED: usize = 82;
    /// Bytes of memory that the worker had when it last looked, now and at most.
    pub(super) const RESIDENT: usize = 83;
    pub(super) const PEAK: usize = 84;
    /// The CPU of the process that last had to wake the worker, plus 1; 0 once the worker has seen it.
    pub(super) const WAKER: usize = 85;
    /// 1 once the worker takes orders.
    pub(super) const READY: usize = 86;
    /// Rows of [`super::ROW`] words, so that no two share a cache line.
    pub(super) const CLAIMS: usize = 96;
    pub(super) const WORK: usize = CLAIMS + super::ROW * super::AHEAD as usize;
    pub(super) const ROOM: usize = WORK + sleepers::LEN;
    pub(super) const STOP: usize = ROOM + sleepers::LEN;
}

const MAGIC: u64 = u64::from_be_bytes(*b"mpLane01");
const ROW: usize = 16;
/// Orders that may be under way.
pub(crate) const AHEAD: u32 = 8;
/// A pool relies on the notification at the begin of an order only if the order has so many items: to check for such an order
/// costs as much as a few items.
pub(crate) const MANY: u32 = 64;
/// Items that one order may have.
pub(crate) const MOST_ITEMS: usize = 1 << 15;
const HEAD_LEN: usize = 4096;
const ORDERS: u32 = 64 << 10;
const RESULTS: u32 = 64 << 10;

#[derive(Clone)]
struct Ring(Arc<Map>);

impl Bytes for Ring {
    #[inline]
    fn write(&self, at: usize, from: &[u8]) {
        view::copy_in(&self.0, at, from);
    }

    fn word(&self, at: usize) -> u64 {
        view::word(&self.0, at)
    }

    #[inline]
    fn read(&self, at: usize, len: usize, to: &mut Vec<u8>) {
        view::append(&self.0, at, len, to);
    }
}

fn orders(region: &Region) -> Words<'_> {
    let words = region.words();
    Words { tail: &words[word::ORDERS_TAIL], head: &words[word::ORDERS_HEAD] }
}

fn results(region: &Region) -> Words<'_> {
    let words = region.words();
    Words { tail: &words[word::RESULTS_TAIL], head: &words[word::RESULTS_HEAD] }
}

fn rings(region: &Region) -> io::Result<[Ring; 2]> {
    let orders = region.extent(HEAD_LEN as u64, ORDERS.into())?;
    Ok([Ring(orders), Ring(region.extent(HEAD_LEN as u64 + u64::from(ORDERS), RESULTS.into())?)])
}

/// The row of order `number`: its claim, and when its last item started.
fn row(region: &Region, number: u32) -> (&AtomicU64, &AtomicU64) {
    let at = word::CLAIMS + (number % AHEAD) as usize * ROW;
    (&region.words()[at], &region.words()[at + 1])
}

/// How long order `number` took its worker, in nanoseconds; 0 if it has not reported that.
fn took(region: &Region, number: u32) -> &AtomicU64 {
    &region.words()[word::CLAIMS + (number % AHEAD) as usize * ROW + 2]
}

/// Which items of an order have been started, and which may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) started: u32,
    pub(crate) end: u32,
}

impl Claim {
    pub(super) fn of(bits: u64) -> Self {
        let end = bits as u32 & 0xffff;
        // The worker's last look for an item finds none and counts all the same.
        Self { started: (bits as u32 >> 16).min(end), end }
    }
}

/// Returns the value of an order's claim when it is given, with `items` items.
pub(super) fn claimable(number: u32, items: usize) -> u64 {
    u64::from(number & (u32::MAX >> 1)) << 32 | items as u64
}

/// The pool's move: takes items back that have not started, all from `keep` on; how far the order goes now.
pub(super) fn take_back(claim: &AtomicU64, keep: u32) -> Claim {
    let shorten = |bits: u64| {
        let Claim { started, end } = Claim::of(bits);
        Some(bits & !0xffff | u64::from(end.min(started.max(keep))))
    };
    let _ = claim.fetch_update(AcqRel, Acquire, shorten);
    Claim::of(claim.load(Acquire))
}

/// Of a note of a start: which item it was, from 1; and above that the time.
const INDEX_BITS: u32 = 16;
const INDEX: u64 = (1 << INDEX_BITS) - 1;

/// Microseconds, begun ones too, of the clock that all processes share.
pub(crate) fn now_us() -> u64 {
    clock::now_ns().div_ceil(1000)
}

/// Never 0.
fn asked(number: u32, index: u32) -> u64 {
    u64::from(number) << 32 | u64::from(index) << 1 | 1
}

#[cold]
fn corrupt(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the memory of {what} between a pool and its worker is damaged"))
}
