//! Moves a worker off the CPU of the process that wakes it.
//!
//! The scheduler leaves a woken thread where it was, and on a virtual machine it takes a CPU for idle that the host has taken away.
//! Two processes that wake each other in turn are no more load than one, so they stay on one CPU though another is idle. Tasks
//! given one by one go twice as fast on two CPUs (`./check.py --only W3` in `benches/peers`). A single call at a time gains
//! nothing: both sides sleep in between, and the scheduler brings a sleeper back to its waker.
//!
//! A worker that finds repeatedly that it was woken from its own CPU leaves that CPU once. If that did not help, because no other
//! CPU has time for it, it tries more and more rarely.

use crate::os::cpu;

pub(super) struct CpuMigration {
    together: u32,
    enough: u32,
    in_step: u32,
}

/// A worker leaves its CPU for the first time after so many wakes from it.
const FIRST: u32 = 8;
const RAREST: u32 = 1 << 20;
/// A worker that was found awake so often in a row has a CPU of its own.
const STEADY: u32 = 64;

impl Default for CpuMigration {
    fn default() -> Self {
        Self { together: 0, enough: FIRST, in_step: 0 }
    }
}

impl CpuMigration {
    /// Notes that something has come, and from which CPU this thread was woken for it, if it slept.
    #[inline]
    pub(super) fn note(&mut self, woken_from: Option<usize>) {
        match woken_from {
            None => {
                self.in_step += 1;
                if self.in_step >= STEADY {
                    (self.together, self.enough) = (0, FIRST);
                }
            }
            Some(cpu) => {
                self.in_step = 0;
                if self.is_enough(cpu == cpu::current()) {
                    cpu::leave();
                }
            }
        }
    }

    fn is_enough(&mut self, is_here: bool) -> bool {
        self.together = if is_here { self.together + 1 } else { 0 };
        let is_enough = self.together >= self.enough;
        if is_enough {
            self.together = 0;
            self.enough = (self.enough * 4).min(RAREST);
        }
        is_enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_leaves_rarely_while_that_is_in_vain_and_soon_again_after_it_paid() {
        let mut migration = CpuMigration::default();
        let mut woken = |times: u32| (0..times).filter(|_| migration.is_enough(true)).count();
        assert_eq!((woken(FIRST - 1), woken(1), woken(4 * FIRST - 1), woken(1), woken(15 * FIRST)), (0, 1, 0, 1, 0));
        assert!(!migration.is_enough(false));
        assert!((1..16 * FIRST).all(|_| !migration.is_enough(true)), "only in a row do they count");
        (0..STEADY).for_each(|_| migration.note(None));
        assert_eq!((0..FIRST).filter(|_| migration.is_enough(true)).count(), 1);
    }
}
