//! The short lock around one side of a ring, which outlives its holder.
//!
//! # State
//! One word: 0 is free, else the [`Member`] that holds it (48 bits) and `CONTENDED` (the top bit).
//!
//! # Moves
//! | from -> to | who | ordering | wakes |
//! |---|---|---|---|
//! | 0 -> me | a taker | Acquire CAS | - |
//! | M -> M with CONTENDED | a taker that will sleep | AcqRel | - |
//! | dead M -> me, CONTENDED kept | a taker that finds M dead | Acquire CAS | - |
//! | me -> 0 | the holder | SeqCst swap | if CONTENDED, all that wait on this side |
//!
//! # Invariants
//! 1. What a latch guards is whole after each single store, so a latch taken from the dead guards whole data.
//! 2. A holder never waits: it holds the latch for a copy and a few stores.
//! 3. A holder that is stopped (SIGSTOP) is alive and is waited for, until it goes on or is killed: it may be about to
//!    store. What must not wait for that has no latch (`sync::ledger`, `sync::register` for readers).
//! 4. A word that no member can be is damage, and is taken over like that of the dead; one that looks like a living holder
//!    is waited for, by whoever has a deadline for that.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | holding | a word of an unlisted member | the next taker: it takes the latch over |
//! | between the swap and the wake | a free latch, sleepers not woken | its burial rings every doorbell |
//!
//! # Cancel
//! A holder has no await point; a taker that is dropped while it waits leaves CONTENDED behind: one wake too many.

use super::atomic::AtomicU64;
use super::family::{Family, Member};
use std::sync::atomic::Ordering::*;

const CONTENDED: u64 = 1 << 63;
const MEMBER: u64 = (1 << 48) - 1;
const SPINS: u32 = if cfg!(multiprocess_loom) { 1 } else { 100 };

#[derive(Clone, Copy)]
pub(crate) struct RobustLock<'a>(pub(crate) &'a AtomicU64);

/// How a latch was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Taken {
    Free,
    /// Its holder died; what it was about may be half done, each store whole.
    OwnerDied,
}

/// What a taker can find out about a holder.
pub(crate) trait Liveness {
    /// By the table: a few loads.
    fn is_listed(&self, member: Member) -> bool;
    /// By the kernel: a few system calls.
    fn is_alive(&self, member: Member) -> bool;
}

macro_rules! lives {
    ($family:ty) => {
        impl Liveness for $family {
            fn is_listed(&self, member: Member) -> bool {
                <$family>::is_listed(self, member)
            }

            fn is_alive(&self, member: Member) -> bool {
                <$family>::is_alive(self, member)
            }
        }
    };
}

lives!(Family);
#[cfg(multiprocess_loom)]
lives!(super::region::Members);

impl RobustLock<'_> {
    /// Takes a latch that nobody has or asks for.
    #[inline]
    pub(crate) fn try_take_free(self, me: Member) -> bool {
        self.0.compare_exchange(0, me.to_bits(), Acquire, Relaxed).is_ok()
    }

    #[inline]
    pub(crate) fn try_take(self, me: Member, lives: &impl Liveness) -> Option<Taken> {
        if self.try_take_free(me) { Some(Taken::Free) } else { self.try_take_held(me, lives) }
    }

    #[cold]
    fn try_take_held(self, me: Member, lives: &impl Liveness) -> Option<Taken> {
        for _ in 0..SPINS {
            std::hint::spin_loop();
            let seen = self.0.load(Relaxed);
            if seen & !CONTENDED != 0 {
                continue;
            }
            if self.0.compare_exchange(seen, me.to_bits() | seen, Acquire, Relaxed).is_ok() {
                return Some(Taken::Free);
            }
        }
        let seen = self.0.load(Relaxed);
        let holder = Member::from_bits(seen & MEMBER);
        let is_member = seen & !(CONTENDED | MEMBER) == 0;
        if seen & !CONTENDED == 0 || is_member && (lives.is_listed(holder) && (holder == me || lives.is_alive(holder)))
        {
            return None;
        }
        let mine = me.to_bits() | seen & CONTENDED;
        self.0.compare_exchange(seen, mine, Acquire, Relaxed).is_ok().then_some(Taken::OwnerDied)
    }

    /// Asks the holder for a wake; false if there is no holder any more.
    pub(crate) fn contend(self) -> bool {
        let held = |seen: u64| (seen & !CONTENDED != 0).then_some(seen | CONTENDED);
        self.0.fetch_update(AcqRel, Relaxed, held).is_ok()
    }

    /// Lets go; true if somebody asked for a wake. SeqCst: who then looks for sleepers needs no fence.
    #[must_use]
    #[inline]
    pub(crate) fn release(self) -> bool {
        self.0.swap(0, SeqCst) & CONTENDED != 0
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    struct Dead(Vec<u16>);

    impl Liveness for Dead {
        fn is_listed(&self, member: Member) -> bool {
            self.is_alive(member)
        }
        fn is_alive(&self, member: Member) -> bool {
            !self.0.contains(&member.slot)
        }
    }

    const A: Member = Member { slot: 1, epoch: 1 };
    const B: Member = Member { slot: 2, epoch: 1 };

    #[test]
    fn a_latch_is_held_by_one_and_a_contender_gets_a_wake() {
        let word = AtomicU64::new(0);
        let latch = RobustLock(&word);
        let nobody = Dead(vec![]);
        assert!(!latch.contend());
        assert_eq!(latch.try_take(A, &nobody), Some(Taken::Free));
        assert_eq!(latch.try_take(B, &nobody), None);
        assert!(latch.contend());
        assert!(latch.release());
        assert_eq!(latch.try_take(B, &nobody), Some(Taken::Free));
        assert!(!latch.release());
    }

    #[test]
    fn a_word_that_no_member_is_holds_nobody_up() {
        for bit in 48..63 {
            let word = AtomicU64::new(A.to_bits() | 1 << bit);
            assert_eq!(RobustLock(&word).try_take(B, &Dead(vec![])), Some(Taken::OwnerDied));
            assert!(!RobustLock(&word).release());
        }
    }

    #[test]
    fn death_holding_the_next_taker_takes_over_and_keeps_the_promise_of_a_wake() {
        let word = AtomicU64::new(0);
        let latch = RobustLock(&word);
        assert_eq!(latch.try_take(A, &Dead(vec![])), Some(Taken::Free));
        assert!(latch.contend());
        assert_eq!(latch.try_take(B, &Dead(vec![1])), Some(Taken::OwnerDied));
        assert!(latch.release());
    }
}
