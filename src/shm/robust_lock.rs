//! A robust lock: short, in shared memory, and taken over when its holder dies.
//!
//! # State
//! One word: 0 is free, otherwise the [`Member`] that holds it (48 bits) and `CONTENDED` (the top bit).
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | 0 -> me | an acquirer | Acquire CAS | - |
//! | M -> M with CONTENDED | an acquirer that will sleep | AcqRel | - |
//! | dead M -> me, CONTENDED kept | an acquirer that finds M dead | Acquire CAS | - |
//! | me -> 0 | the holder | SeqCst swap | if CONTENDED, all that wait on this side |
//!
//! # Invariants
//! 1. The data is consistent after each single store, so a lock taken over from a dead holder guards consistent data.
//! 2. A holder never waits: it holds the lock for a copy and a few stores.
//! 3. A holder stopped by SIGSTOP is alive, and acquirers wait until it continues or is killed: it may be about to store. Data that
//!    must not wait for that has no robust lock (`sync::holders`, readers of `sync::double_buffer`).
//! 4. A word that no member can be is damage, and is taken over like that of the dead. One that looks like a living holder is
//!    waited for, up to the deadline of the acquirer.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | holding | a word of an unlisted member | the next acquirer: it takes the lock over |
//! | between the swap and the wake | a free lock, sleepers not woken | recovery rings every doorbell |
//!
//! # Cancel
//! A holder has no await point. An acquirer that is dropped while it waits leaves CONTENDED behind: one wake too many.

use super::atomic::AtomicU64;
use super::family::{Family, Member};
use std::sync::atomic::Ordering::*;

const CONTENDED: u64 = 1 << 63;
const MEMBER: u64 = (1 << 48) - 1;
const SPINS: u32 = if cfg!(multiprocess_loom) { 1 } else { 100 };

#[derive(Clone, Copy)]
pub(crate) struct RobustLock<'a>(pub(crate) &'a AtomicU64);

/// How a lock was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Taken {
    Free,
    /// Its holder died: its stores may be only partly made, each of them whole.
    OwnerDied,
}

/// Whether members are alive.
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
    /// Takes a lock that is free and not contended.
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

    /// Releases it; true if an acquirer asked for a wake. SeqCst: a caller that then reads the marks of sleepers needs no fence.
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
    fn lock_is_held_by_one_and_a_contender_gets_a_wake() {
        let word = AtomicU64::new(0);
        let lock = RobustLock(&word);
        let nobody = Dead(vec![]);
        assert!(!lock.contend());
        assert_eq!(lock.try_take(A, &nobody), Some(Taken::Free));
        assert_eq!(lock.try_take(B, &nobody), None);
        assert!(lock.contend());
        assert!(lock.release());
        assert_eq!(lock.try_take(B, &nobody), Some(Taken::Free));
        assert!(!lock.release());
    }

    #[test]
    fn impossible_holder_is_taken_over() {
        for bit in 48..63 {
            let word = AtomicU64::new(A.to_bits() | 1 << bit);
            assert_eq!(RobustLock(&word).try_take(B, &Dead(vec![])), Some(Taken::OwnerDied));
            assert!(!RobustLock(&word).release());
        }
    }

    #[test]
    fn lock_of_a_dead_holder_is_taken_over_and_stays_contended() {
        let word = AtomicU64::new(0);
        let lock = RobustLock(&word);
        assert_eq!(lock.try_take(A, &Dead(vec![])), Some(Taken::Free));
        assert!(lock.contend());
        assert_eq!(lock.try_take(B, &Dead(vec![1])), Some(Taken::OwnerDied));
        assert!(lock.release());
    }
}
