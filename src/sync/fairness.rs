//! Fairness: newcomers pause for a moment when a sleeper has waited long.
//!
//! A wake takes 20 us, so running tasks may overtake sleepers. A sleeper that has come too late each time for [`LONG`]
//! reports that. After the next release newcomers pause until a sleeper has been served. Nothing else depends on it, and it is
//! bounded in time: a process that dies, stops or gives up in between delays others by [`A_MOMENT`] at most. The idea, a fair
//! turn after about a millisecond, is parking_lot's "eventual fairness".
//!
//! # State
//! One word: 0, `LONG_WAIT`, or the time until which newcomers pause, in nanoseconds of a clock that all processes share.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | 0 -> LONG_WAIT | a waiter that has waited long and finds nothing | Relaxed CAS | - |
//! | LONG_WAIT -> a moment from now | a releaser | Relaxed CAS | - |
//! | a moment -> 0 | a waiter that has been served; a newcomer, when it is over | Relaxed CAS | - |
//!
//! # Invariants
//! 1. A task that is in the queue never pauses, so a wake that it was given is never lost.
//!
//! # Death
//! Killed between any two moves, a process leaves a report that costs newcomers one moment.
//!
//! # Cancel
//! As in death.

use crate::os::clock::now_ns;
use crate::os::fault;
use crate::shm::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

const LONG_WAIT: u64 = 1;
/// Waiting longer than this is long.
const LONG: Duration = Duration::from_millis(1);
/// Enough for a wake on a busy machine.
const A_MOMENT: Duration = Duration::from_millis(5);

/// The word, wherever it is.
pub(super) struct Fairness<'a>(pub(super) &'a AtomicU64);

impl Fairness<'_> {
    /// Reports a waiter that began at `since` and has tried in vain once more, if it has waited long.
    fn report_long_wait(&self, since: Instant) {
        if since.elapsed() > LONG && self.0.load(Relaxed) == 0 {
            let _ = self.0.compare_exchange(0, LONG_WAIT, Relaxed, Relaxed);
            fault::point("fairness.long_wait");
        }
    }

    /// To be called after a release, before its notification.
    #[inline]
    pub(super) fn after_release(&self) {
        if self.0.load(Relaxed) == LONG_WAIT {
            let until = now_ns() + A_MOMENT.as_nanos() as u64;
            let _ = self.0.compare_exchange(LONG_WAIT, until, Relaxed, Relaxed);
        }
    }

    /// Ends the pause, as a waiter has been served.
    fn served(&self) {
        let until = self.0.load(Relaxed);
        if until > LONG_WAIT {
            let _ = self.0.compare_exchange(until, 0, Relaxed, Relaxed);
        }
    }

    /// Returns `true` if a newcomer should let sleepers go first, for now.
    #[inline]
    fn pauses_newcomers(&self) -> bool {
        let until = self.0.load(Relaxed);
        until > LONG_WAIT && !self.is_over(until)
    }

    /// Lets sleepers go first during a pause, unless there are waiters of this process.
    pub(super) async fn yield_to_sleepers(&self, has_waiters: impl Fn() -> bool) {
        while self.pauses_newcomers() && !has_waiters() {
            std::thread::yield_now();
            tokio::task::yield_now().await;
        }
    }

    /// [`Fairness::yield_to_sleepers`] for a thread without a runtime.
    #[track_caller]
    pub(super) fn blocking_yield_to_sleepers(&self, has_waiters: impl Fn() -> bool) {
        while self.pauses_newcomers() && !has_waiters() {
            std::thread::yield_now();
        }
    }

    #[cold]
    fn is_over(&self, until: u64) -> bool {
        // A clock that this word did not come from would ask for more than a moment.
        let is_over = until.wrapping_sub(now_ns()) > A_MOMENT.as_nanos() as u64;
        if is_over {
            let _ = self.0.compare_exchange(until, 0, Relaxed, Relaxed);
        }
        is_over
    }
}

/// The waiting time of one acquirer.
#[derive(Default)]
pub(super) struct Acquirer {
    since: Option<Instant>,
}

impl Acquirer {
    /// To be called after each attempt. `found`: it succeeded.
    pub(super) fn looked(&mut self, fairness: &Fairness<'_>, found: bool) {
        match self.since {
            _ if !found => fairness.report_long_wait(*self.since.get_or_insert_with(Instant::now)),
            Some(_) => fairness.served(),
            None => {}
        }
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    #[test]
    fn newcomers_are_no_longer_paused_once_a_sleeper_was_served() {
        let word = AtomicU64::new(0);
        let fairness = Fairness(&word);
        fairness.report_long_wait(Instant::now() - 2 * LONG);
        fairness.served();
        assert_eq!(word.load(Relaxed), LONG_WAIT, "a complaint stands until a give");
        fairness.after_release();
        fairness.served();
        assert!(!fairness.pauses_newcomers());
    }

    #[test]
    fn newcomers_pause_for_a_moment_after_a_long_wait_and_a_release() {
        let word = AtomicU64::new(0);
        let fairness = Fairness(&word);
        fairness.after_release();
        assert!(!fairness.pauses_newcomers());
        // However late it is looked at.
        fairness.report_long_wait(Instant::now() + LONG);
        assert_eq!(word.load(Relaxed), 0, "it has not waited long");
        fairness.report_long_wait(Instant::now() - 2 * LONG);
        assert!(!fairness.pauses_newcomers(), "there is nothing to take yet");
        let start = Instant::now();
        fairness.after_release();
        let stood_back = fairness.pauses_newcomers();
        assert!(stood_back || start.elapsed() > A_MOMENT / 2);
        while fairness.pauses_newcomers() {}
        assert_eq!(word.load(Relaxed), 0);
        assert!(start.elapsed() > A_MOMENT / 2, "{:?}", start.elapsed());
    }
}
