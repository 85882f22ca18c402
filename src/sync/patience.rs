//! Who has waited long gets its turn: those who come running stand back for a moment.
//!
//! A wake takes 20 us, so whoever runs may take ahead of sleepers; but a sleeper that came too late each time for
//! [`LONG`] complains, and after the next give newcomers stand back until a sleeper has been served. Nothing else
//! depends on it: it is a courtesy with an end, so whoever dies, stops or gives up in between delays others by
//! [`A_MOMENT`].
//! The idea, a fair turn after about a millisecond, is parking_lot's "eventual fairness".
//!
//! # State
//! One word: 0, `COMPLAINT`, or until when newcomers stand back, in nanoseconds of a clock that all processes share.
//!
//! # Moves
//! | from -> to | who | ordering | wakes |
//! |---|---|---|---|
//! | 0 -> COMPLAINT | a waiter that finds nothing and has waited long | Relaxed CAS | - |
//! | COMPLAINT -> a moment from now | who gives | Relaxed CAS | - |
//! | a moment -> 0 | a waiter that has been served; a newcomer, when it is over | Relaxed CAS | - |
//!
//! # Invariants
//! 1. Who has taken its place in line never stands back, so a wake that it was given is never lost.
//!
//! # Death
//! Killed between any two moves: a complaint of nobody, which costs newcomers one moment.
//!
//! # Cancel
//! As in death.

use crate::os::clock::now_ns;
use crate::os::fault;
use crate::shm::atomic::AtomicU64;
use crate::wait::Line;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

const COMPLAINT: u64 = 1;
/// Waiting longer than this is long.
const LONG: Duration = Duration::from_millis(1);
/// Enough for a wake on a busy machine.
const A_MOMENT: Duration = Duration::from_millis(5);

/// The word, wherever it is.
pub(super) struct Patience<'a>(pub(super) &'a AtomicU64);

impl Patience<'_> {
    /// Notes that who began to wait at `since` has looked in vain once more.
    fn complain(&self, since: Instant) {
        if since.elapsed() > LONG && self.0.load(Relaxed) == 0 {
            let _ = self.0.compare_exchange(0, COMPLAINT, Relaxed, Relaxed);
            fault::point("patience.complained");
        }
    }

    /// To be called after a give, before its notice.
    #[inline]
    pub(super) fn give_way(&self) {
        if self.0.load(Relaxed) == COMPLAINT {
            let until = now_ns() + A_MOMENT.as_nanos() as u64;
            let _ = self.0.compare_exchange(COMPLAINT, until, Relaxed, Relaxed);
        }
    }

    /// Notes that somebody who waited need not wait any more.
    fn served(&self) {
        let until = self.0.load(Relaxed);
        if until > COMPLAINT {
            let _ = self.0.compare_exchange(until, 0, Relaxed, Relaxed);
        }
    }

    /// Whether a newcomer should let others go first, for now.
    #[inline]
    fn asks_to_stand_back(&self) -> bool {
        let until = self.0.load(Relaxed);
        until > COMPLAINT && !self.is_over(until)
    }

    /// Lets others go first, if it is asked to and nobody of this process waits before it.
    pub(super) async fn stand_back(&self, line: &Line) {
        while self.asks_to_stand_back() && !line.has_waiters() {
            std::thread::yield_now();
            tokio::task::yield_now().await;
        }
    }

    /// [`Patience::stand_back`] for a thread without a runtime.
    #[track_caller]
    pub(super) fn blocking_stand_back(&self, line: &Line) {
        while self.asks_to_stand_back() && !line.has_waiters() {
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

/// One who takes when there is something, and complains when it has waited long.
#[derive(Default)]
pub(super) struct Taker {
    since: Option<Instant>,
}

impl Taker {
    /// To be called after each look. `found`: it has what it looked for.
    pub(super) fn looked(&mut self, patience: &Patience<'_>, found: bool) {
        match self.since {
            _ if !found => patience.complain(*self.since.get_or_insert_with(Instant::now)),
            Some(_) => patience.served(),
            None => {}
        }
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    #[test]
    fn they_stand_back_no_longer_when_somebody_has_been_served() {
        let word = AtomicU64::new(0);
        let patience = Patience(&word);
        patience.complain(Instant::now() - 2 * LONG);
        patience.served();
        assert_eq!(word.load(Relaxed), COMPLAINT, "a complaint stands until a give");
        patience.give_way();
        patience.served();
        assert!(!patience.asks_to_stand_back());
    }

    #[test]
    fn newcomers_stand_back_for_a_moment_after_a_complaint_and_a_give() {
        let word = AtomicU64::new(0);
        let patience = Patience(&word);
        patience.give_way();
        assert!(!patience.asks_to_stand_back());
        patience.complain(Instant::now());
        assert_eq!(word.load(Relaxed), 0, "it has not waited long");
        patience.complain(Instant::now() - 2 * LONG);
        assert!(!patience.asks_to_stand_back(), "there is nothing to take yet");
        patience.give_way();
        let start = Instant::now();
        let stood_back = patience.asks_to_stand_back();
        assert!(stood_back || start.elapsed() > A_MOMENT / 2);
        while patience.asks_to_stand_back() {}
        assert_eq!(word.load(Relaxed), 0);
        assert!(start.elapsed() > A_MOMENT / 2, "{:?}", start.elapsed());
    }
}
