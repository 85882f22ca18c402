//! When a worker tells the pool of its results: with the next start, or, of many quick ones, when its last order begins.
//!
//! # State
//! In the worker: whether something was put that the pool has not been told of, and whether it is quiet about the order
//! that it is at. Shared: `NOTIFY_EACH`, the top bit of an order's claim, and how many of its items were started; and the mark of
//! the worker's lane, a bit that says that the pool should look into it.
//!
//! # Moves
//! | from -> to | who | ordering | wakes |
//! |---|---|---|---|
//! | an order of quick items begins -> quiet | a worker that has another one behind it | - | - |
//! | the last of such orders begins -> untold, if there are results in the ring | the worker | Acquire | - |
//! | next -> next + 1 in the claim | the worker | SeqCst, also the fence between the results before it and the look for sleepers | the pool, if it sleeps and the worker is not quiet, or the claim is loud |
//! | mark 0 -> 1, if it is not 1 | the worker, after that start if a result came before it, quiet or not | SeqCst, before the look for sleepers | - |
//! | marks -> 0 | the pool, awake, or after it has armed its alarm | SeqCst, then it looks into the lanes | - |
//! | claim -> loud | a pool that has slept for a while | SeqCst, then it looks for results | - |
//!
//! # Invariants
//! 1. A pool that has an alarm armed, and then finds the last order that it gave not begun, and that one of quick items,
//!    will be told when that begins: of all results before, also of such as came when it was awake. If that has begun, a look now finds the results that were put before; of those put later
//!    the worker tells, as it is quiet about no last order.
//! 2. A start that comes after the claim became loud tells of all results before. One that came earlier is seen, with them.
//! 3. A result that was put before a start is taken by a look that the mark leads to: the worker finds the mark set, and
//!    the pool takes it away later and looks then, or sets it. So a pool need not look into lanes that are not marked, but
//!    for that of a worker that has ended, and those of which it has just made the claims loud.
//!
//! # Death
//! | the worker is killed | the pool hears |
//! |---|---|
//! | quiet, with results that it has not told of | of its burial, which rings the doorbell: the results count |
//! | between a start and its mark, or its look for sleepers | of its exit, and then looks into its lane, marked or not |
//!
//! # Cancel
//! No move awaits. An order taken back while the worker is quiet, so that there is no other behind it, is begun all the
//! same, and with that told.

use crate::os::fault;
use crate::shm::atomic::AtomicU64;
#[cfg(multiprocess_loom)]
use crate::shm::atomic::fence;
use std::cell::Cell;
use std::sync::atomic::Ordering::*;

const NOTIFY_EACH: u64 = 1 << 63;

/// Whom a worker tells.
pub(super) trait NotifyTarget {
    /// The word and the bit that say that this lane has something.
    fn mark(&self) -> (&AtomicU64, u64);
    /// For who has just made its change, and after it a SeqCst read-modify-write.
    fn may_sleep(&self) -> bool;
    fn wake(&self);
}

/// What the pool has not been told of.
#[derive(Default)]
pub(super) struct ResultNotifier {
    is_pending: Cell<bool>,
    is_deferred: Cell<bool>,
    /// The pool was awake when it was told last.
    was_awake: Cell<bool>,
}

impl ResultNotifier {
    /// A result has been put.
    #[inline]
    pub(super) fn note_result(&self) {
        self.is_pending.set(true);
    }

    /// An order begins: each of its results is to be told of.
    pub(super) fn notify_each(&self) {
        self.is_deferred.set(false);
    }

    /// The results of the order that begins need not be told of one by one if it `has_more` behind it. About the last one
    /// the pool relies on being told when it begins, also of what it knew of and has not taken.
    pub(super) fn defer(&self, has_more: bool, has_untaken: impl FnOnce() -> bool) {
        self.is_deferred.set(has_more);
        if !has_more && has_untaken() {
            self.note_result();
        }
    }

    /// Starts the next item, if there is one; either way the pool is told, unless it need not be.
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

    /// Tells of what no start has followed.
    pub(super) fn notify_pending(&self, pool: &impl NotifyTarget) {
        if self.is_pending.replace(false) {
            let (word, bit) = pool.mark();
            mark(word, bit);
            pool.wake();
        }
    }

    /// Whether the pool was awake when it was last told; says so once.
    pub(super) fn found_pool_awake(&self) -> bool {
        self.was_awake.replace(false)
    }
}

/// The worker's move: starts the next item, if there is one; whether the pool wants to know of each result.
#[inline]
fn start(claim: &AtomicU64) -> (Option<u32>, bool) {
    // SeqCst: the look for sleepers that follows relies on it.
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

/// Whether the worker will tell of all it has put when it begins the order of this claim, the last that was given. For
/// who has armed an alarm before: between that and this look, and the worker's start and its look for sleepers, there is
/// an order that all agree on.
pub(super) fn will_notify(claim: &AtomicU64) -> bool {
    claim.load(SeqCst) as u32 >> 16 == 0
}

/// The pool's move: wants to know of each result from now on. It looks for what was put before, after this.
pub(super) fn enable_notification(claim: &AtomicU64) {
    claim.fetch_or(NOTIFY_EACH, SeqCst);
}
