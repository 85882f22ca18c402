//! When a worker notifies the pool of its results: with the start of the next item, or, in an order of brief items, when its last
//! order begins.
//!
//! # State
//! In the worker: whether a result is pending, that is, was put after the pool was last notified; and whether notification is
//! deferred for the current order. Shared: `NOTIFY_EACH`, the top bit of an order's claim; the number of its started items; and
//! the mark of the worker's lane, a bit that asks the pool to look into that lane.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | an order of brief items begins -> deferred | a worker that has another order behind it | - | - |
//! | the last of such orders begins -> pending, if there are results in the ring | the worker | Acquire | - |
//! | next -> next + 1 in the claim | the worker | SeqCst, also the fence between the results before it and the check for sleepers | the pool, if it sleeps, and notification is not deferred or the claim has `NOTIFY_EACH` |
//! | mark 0 -> 1, if it is not 1 | the worker, after that start if a result came before it, deferred or not | SeqCst, before the check for sleepers | - |
//! | marks -> 0 | the pool, awake, or after it has armed its alarm | SeqCst, then it looks into the lanes | - |
//! | claim -> `NOTIFY_EACH` | a pool that has slept for a while | SeqCst, then it looks for results | - |
//!
//! # Invariants
//! 1. The pool arms an alarm and then finds that the last order it gave, of brief items, has not begun. Then it is notified when
//!    that order begins: of all results before it, including those that came while the pool was awake. If the order has begun, the
//!    pool finds the results that were put before that, and is notified of those put later, as a last order is never deferred.
//! 2. A start after the claim got `NOTIFY_EACH` notifies of all results before it. The pool finds the results of earlier starts.
//! 3. The pool takes a result that was put before a start when it follows the mark: the worker finds the mark set, and the pool
//!    clears it later and looks then, or the worker sets it. So a pool need not look into unmarked lanes, except that of a worker
//!    that has ended and those whose claims just got `NOTIFY_EACH`.
//!
//! # Death
//! | the worker is killed | the pool |
//! |---|---|
//! | deferring, with pending results | is woken by the recovery, which rings its doorbell: the results count |
//! | between a start and its mark, or its check for sleepers | notices the exit, and then looks into the lane, marked or not |
//!
//! # Cancel
//! No move awaits. If the order behind is taken back while the worker defers, the worker begins that order all the same, and
//! notifies with that.

use crate::os::fault;
use crate::shm::atomic::AtomicU64;
#[cfg(multiprocess_loom)]
use crate::shm::atomic::fence;
use std::cell::Cell;
use std::sync::atomic::Ordering::*;

const NOTIFY_EACH: u64 = 1 << 63;

/// The pool, as its workers notify it.
pub(super) trait NotifyTarget {
    /// The word and the bit that say that this lane has something.
    fn mark(&self) -> (&AtomicU64, u64);
    /// Whether it may sleep. The caller has made its change, and a SeqCst read-modify-write after that.
    fn may_sleep(&self) -> bool;
    fn wake(&self);
}

/// Which results the pool has not been notified of.
#[derive(Default)]
pub(super) struct ResultNotifier {
    is_pending: Cell<bool>,
    is_deferred: Cell<bool>,
    /// The pool was awake when it was last notified.
    was_awake: Cell<bool>,
}

impl ResultNotifier {
    /// A result has been put.
    #[inline]
    pub(super) fn note_result(&self) {
        self.is_pending.set(true);
    }

    /// An order begins: the pool is to be notified of each of its results.
    pub(super) fn notify_each(&self) {
        self.is_deferred.set(false);
    }

    /// An order of brief items begins: notification is deferred if it `has_more` behind it. The pool relies on being notified when
    /// the last one begins, also of results that it knew of and has not taken.
    pub(super) fn defer(&self, has_more: bool, has_untaken: impl FnOnce() -> bool) {
        self.is_deferred.set(has_more);
        if !has_more && has_untaken() {
            self.note_result();
        }
    }

    /// Starts the next item, if there is one. Notifies the pool of pending results, unless that is deferred.
    #[inline]
    pub(super) fn start(&self, claim: &AtomicU64, pool: &impl NotifyTarget) -> Option<u32> {
        let (started, is_each) = start(claim);
        if !self.is_pending.get() {
            return started;
        }
        let (word, bit) = pool.mark();
        mark_after_rmw(word, bit);
        if !self.is_deferred.get() || is_each {
            self.is_pending.set(false);
            // A fence for each result would cost as much as the rest of its way.
            let sleeps = pool.may_sleep();
            self.was_awake.set(!sleeps);
            if sleeps {
                pool.wake();
            }
        }
        started
    }

    /// Notifies the pool of results that no start has followed.
    pub(super) fn notify_pending(&self, pool: &impl NotifyTarget) {
        if self.is_pending.replace(false) {
            let (word, bit) = pool.mark();
            mark(word, bit);
            pool.wake();
        }
    }

    /// Returns, once, whether the pool was awake when it was last notified.
    pub(super) fn found_pool_awake(&self) -> bool {
        self.was_awake.replace(false)
    }
}

/// The worker's move: starts the next item, if there is one. Returns also whether the pool wants each result notified.
#[inline]
fn start(claim: &AtomicU64) -> (Option<u32>, bool) {
    // SeqCst: the check for sleepers that follows relies on it.
    let before = claim.fetch_add(1 << 16, SeqCst);
    let (next, end) = (before as u32 >> 16, before as u32 & 0xffff);
    fault::point("lane.started");
    ((next < end).then_some(next), before & NOTIFY_EACH != 0)
}

/// The worker's move: the pool should look into its lane.
pub(super) fn mark(word: &AtomicU64, bit: u64) {
    word.fetch_or(bit, SeqCst);
}

/// The same after a SeqCst read-modify-write that came after the change, so that a mark which is there need not be set
/// again: the process that takes it away sees the change. The model checker knows only fences.
#[inline]
fn mark_after_rmw(word: &AtomicU64, bit: u64) {
    #[cfg(multiprocess_loom)]
    fence(SeqCst);
    if word.load(SeqCst) & bit == 0 {
        mark(word, bit);
    }
}

/// The pool's move: which lanes of this word are marked. It looks into them after this.
pub(super) fn take_marks(word: &AtomicU64) -> u64 {
    if word.load(Relaxed) == 0 {
        return 0;
    }
    let marks = word.swap(0, SeqCst);
    #[cfg(multiprocess_loom)]
    fence(SeqCst);
    marks
}

/// Whether the worker will notify of all results when it begins the order of this claim, the last that was given. The caller has
/// armed an alarm before: that, this load, the worker's start and its check for sleepers have one order in all processes.
pub(super) fn will_notify(claim: &AtomicU64) -> bool {
    claim.load(SeqCst) as u32 >> 16 == 0
}

/// The pool's move: it is notified of each result from now on, and looks after this for results that were put before.
pub(super) fn enable_notification(claim: &AtomicU64) {
    claim.fetch_or(NOTIFY_EACH, SeqCst);
}
