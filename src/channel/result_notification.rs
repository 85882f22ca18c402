//! When a worker notifies the pool of its results: with the start of the next item, or, in an order whose results may wait, when its
//! last order begins or a time has passed.
//!
//! # State
//! In the worker: whether a result is pending, that is, was put after the pool was last notified; whether one of these is of an order
//! whose results may not wait; the [`Pace`] of the current order, and since when its notification is deferred. Shared: `NOTIFY_EACH`, the top bit of an order's claim; the number of its started items; and
//! the mark of the worker's lane, a bit that asks the pool to look into that lane.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | the last order begins, its results may wait -> pending, if there are results in the ring | the worker | Acquire | - |
//! | next -> next + 1 in the claim | the worker | SeqCst, also the fence between the results before it and the check for sleepers | the pool, if it sleeps, and notification is not deferred |
//! | mark 0 -> 1, if it is not 1 | the worker, after that start if a result came before it, deferred or not | SeqCst, before the check for sleepers | - |
//! | marks -> 0 | the pool, awake, or after it has armed its alarm | SeqCst, then it looks into the lanes | - |
//! | claim -> `NOTIFY_EACH` | a pool that has slept for a while | SeqCst, then it looks for results | - |
//!
//! A start defers notification if all pending results may wait, the claim has no `NOTIFY_EACH`, another order lies behind the current
//! one, and the shortest time of the paces of the pending results and of the current order has not passed since the first start that
//! deferred.
//!
//! # Invariants
//! 1. The pool arms an alarm and then finds that the last order it gave, whose results may wait, has not begun. Then it is notified when
//!    that order begins: of all results before it, including those that came while the pool was awake. If the order has begun, the
//!    pool finds the results that were put before that, and is notified of those put later, as a last order is never deferred. A pool
//!    that gives another order behind the last one is notified when that one begins instead; whether the worker gets that far it
//!    checks after a while, by `NOTIFY_EACH`. Both hold for each start anew, as the worker looks for an order behind at each.
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
//! No await point. If the order behind is taken back while the worker defers, the worker begins that order all the same, and
//! notifies with that.

use crate::os::{clock, fault};
use crate::shm::atomic::AtomicU64;
#[cfg(multiprocess_loom)]
use crate::shm::atomic::fence;
use std::cell::Cell;
use std::sync::atomic::Ordering::*;

const NOTIFY_EACH: u64 = 1 << 63;

/// The pool, as its workers notify it.
pub(super) trait NotifyTarget {
    /// The word and the bit by which this lane shows that it has results.
    fn mark(&self) -> (&AtomicU64, u64);
    /// Returns `true` if it may sleep. The caller has made its change, and a SeqCst read-modify-write after that.
    fn may_sleep(&self) -> bool;
    fn wake(&self);
}

/// How long the results of an order may wait before the pool is notified of them, while the worker has another order behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Pace {
    /// The pool is notified of each.
    #[default]
    Each,
    /// For so many microseconds.
    Within(u16),
    /// Until the last order begins.
    Last,
}

const MAY_WAIT: u8 = 1;
const OWED: u8 = 2;

/// Which results the pool has not been notified of.
pub(super) struct ResultNotifier {
    /// [`MAY_WAIT`] if there are any, and [`OWED`] if one of them may not wait.
    pending: Cell<u8>,
    /// The number that the results of the current order add to that.
    adds: Cell<u8>,
    /// That of the current order, and whether another lies behind it, if that is known: it stays there.
    pace: Cell<Pace>,
    has_more: Cell<bool>,
    /// For how long the pending results may wait, in nanoseconds: the shortest of their limits. `u64::MAX` is none.
    limit_ns: Cell<u64>,
    /// When notification was first deferred, in nanoseconds, if there is such a limit; 0 is not.
    deferred_ns: Cell<u64>,
    /// The pool was awake when it was last notified.
    was_awake: Cell<bool>,
}

impl ResultNotifier {
    /// A result has been put.
    #[inline]
    pub(super) fn note_result(&self) {
        self.pending.set(self.pending.get() | self.adds.get());
        self.add_limit();
    }

    /// The results of the current order are among those that wait.
    #[inline]
    fn add_limit(&self) {
        if let Pace::Within(us) = self.pace.get() {
            self.limit_ns.set(self.limit_ns.get().min(u64::from(us) * 1000));
        }
    }

    /// An order begins: the pool is to be notified of each of its results.
    pub(super) fn notify_each(&self) {
        self.pace.set(Pace::Each);
        self.adds.set(MAY_WAIT | OWED);
        self.has_more.set(false);
    }

    /// The results of the order that begins may wait, if it `has_more` behind it. The pool relies on being notified when the last one
    /// begins, also of results that it knew of and has not taken.
    pub(super) fn defer(&self, pace: Pace, has_more: bool, has_untaken: impl FnOnce() -> bool) {
        self.pace.set(pace);
        self.adds.set(if pace == Pace::Each { MAY_WAIT | OWED } else { MAY_WAIT });
        self.has_more.set(has_more);
        if !has_more && has_untaken() {
            self.note_result();
        }
    }

    /// Starts the next item, if there is one. Notifies the pool of pending results, unless that is deferred, which it can only be if
    /// the worker `has_more` orders behind this one.
    #[inline]
    pub(super) fn start(
        &self,
        claim: &AtomicU64,
        pool: &impl NotifyTarget,
        has_more: impl FnOnce() -> bool,
    ) -> Option<u32> {
        let (started, is_each) = start(claim);
        if self.pending.get() == 0 {
            return started;
        }
        let (word, bit) = pool.mark();
        mark_after_rmw(word, bit);
        if is_each || self.pending.get() & OWED != 0 || !self.has_more(has_more) || self.is_due() {
            self.clear();
            // A fence for each result would cost as much as the rest of its way.
            let sleeps = pool.may_sleep();
            self.was_awake.set(!sleeps);
            if sleeps {
                pool.wake();
            }
        }
        started
    }

    #[inline]
    fn has_more(&self, look: impl FnOnce() -> bool) -> bool {
        if !self.has_more.get() {
            self.has_more.set(look());
        }
        self.has_more.get()
    }

    /// Nothing is pending any more.
    #[inline]
    fn clear(&self) {
        self.pending.set(0);
        self.limit_ns.set(u64::MAX);
        self.deferred_ns.set(0);
    }

    /// Returns `true` if the pending results have waited for as long as they may.
    #[inline]
    fn is_due(&self) -> bool {
        if self.pace.get() == Pace::Each {
            return true;
        }
        self.add_limit();
        let limit = self.limit_ns.get();
        if limit == u64::MAX {
            return false;
        }
        let now = clock::now_ns();
        match self.deferred_ns.get() {
            0 => self.deferred_ns.set(now),
            since => return now.saturating_sub(since) >= limit,
        }
        false
    }

    /// Notifies the pool of results that no start has followed.
    pub(super) fn notify_pending(&self, pool: &impl NotifyTarget) {
        if self.pending.get() != 0 {
            self.clear();
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

impl Default for ResultNotifier {
    fn default() -> Self {
        let (pending, pace, has_more, deferred_ns, was_awake) = Default::default();
        let (adds, limit_ns) = (Cell::new(MAY_WAIT | OWED), Cell::new(u64::MAX));
        Self { pending, adds, pace, has_more, limit_ns, deferred_ns, was_awake }
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

/// Returns `true` if the worker will notify of all results when it begins the order of this claim, the last that was given. The caller has
/// armed an alarm before: that, this load, the worker's start and its check for sleepers have one order in all processes.
pub(super) fn will_notify(claim: &AtomicU64) -> bool {
    claim.load(SeqCst) as u32 >> 16 == 0
}

/// The pool's move: it is notified of each result from now on, and looks after this for results that were put before.
pub(super) fn enable_notification(claim: &AtomicU64) {
    claim.fetch_or(NOTIFY_EACH, SeqCst);
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;
    use crate::channel::lane::claimable;

    /// A pool that sleeps, and how often it was woken.
    #[derive(Default)]
    struct Asleep(AtomicU64, Cell<u32>);

    impl NotifyTarget for Asleep {
        fn mark(&self) -> (&AtomicU64, u64) {
            (&self.0, 1)
        }
        fn may_sleep(&self) -> bool {
            true
        }
        fn wake(&self) {
            self.1.set(self.1.get() + 1);
        }
    }

    /// Does an order of one item, with another behind it or not, and returns how often the pool has been woken since the begin.
    fn order(notifier: &ResultNotifier, pool: &Asleep, pace: Pace, has_more: bool) -> u32 {
        let (claim, before) = (AtomicU64::new(claimable(0, 1)), pool.1.get());
        notifier.notify_each();
        if pace != Pace::Each {
            notifier.defer(pace, has_more, || false);
        }
        assert_eq!(notifier.start(&claim, pool, || has_more), Some(0));
        notifier.note_result();
        pool.1.get() - before
    }

    #[test]
    fn results_that_may_wait_are_notified_of_when_the_last_order_begins() {
        let (notifier, pool) = (ResultNotifier::default(), Asleep::default());
        assert_eq!(
            [true, true, true, false].map(|has_more| order(&notifier, &pool, Pace::Last, has_more)),
            [0, 0, 0, 1]
        );
    }

    #[test]
    fn result_that_may_not_wait_is_notified_of_though_orders_that_may_lie_behind_it() {
        let (notifier, pool) = (ResultNotifier::default(), Asleep::default());
        let paces = [Pace::Last, Pace::Each, Pace::Last, Pace::Last];
        assert_eq!(paces.map(|pace| order(&notifier, &pool, pace, true)), [0, 1, 1, 0]);
    }

    #[test]
    fn results_are_notified_of_once_the_time_of_their_pace_has_passed() {
        let (notifier, pool) = (ResultNotifier::default(), Asleep::default());
        let far = Pace::Within(u16::MAX);
        assert_eq!([far, far].map(|pace| order(&notifier, &pool, pace, true)), [0, 0]);
        let at = clock::now_ns();
        while clock::now_ns() < at + 2000 {}
        assert_eq!(order(&notifier, &pool, Pace::Within(1), true), 1);
    }

    #[test]
    fn limit_of_a_result_holds_though_the_orders_after_it_have_none() {
        let (notifier, pool) = (ResultNotifier::default(), Asleep::default());
        let paces = [Pace::Within(1), Pace::Last];
        assert_eq!(paces.map(|pace| order(&notifier, &pool, pace, true)), [0, 0]);
        let at = clock::now_ns();
        while clock::now_ns() < at + 2000 {}
        assert_eq!(order(&notifier, &pool, Pace::Last, true), 1);
        assert_eq!(order(&notifier, &pool, Pace::Last, true), 0, "it is told");
    }
}
