//! Moves a worker off the CPU of the process that wakes it.
//!
//! The scheduler leaves a woken thread where it was, and on a virtual machine it may think a CPU idle that the hypervisor has taken away.
//! Two processes that wake each other in turn are no more load than one, so they stay on one CPU though another is idle. Tasks
//! given one by one go twice as fast on two CPUs (`./check.py --only W3` in `benches/peers`). A single call at a time gains
//! nothing: both sides sleep in between, and the scheduler brings a sleeper back to its waker.
//!
//! A worker that finds repeatedly that it was woken from its own CPU leaves that CPU once. If that did not help, because no other
//! CPU has time for it, it tries more and more rarely.

use crate::os::cpu;

pub(super) struct CpuMigration {
    /// Wakes from the own CPU, in a row.
    wakes_from_own_cpu: u32,
    /// So many of them make the worker leave.
    threshold: u32,
    /// How often in a row it was found awake.
    found_awake: u32,
}

/// A worker leaves its CPU for the first time after so many wakes from it.
const FIRST: u32 = 8;
const RAREST: u32 = 1 << 20;
/// A worker that was found awake so often in a row has a CPU of its own.
const STEADY: u32 = 64;

impl Default for CpuMigration {
    fn default() -> Self {
        Self { wakes_from_own_cpu: 0, threshold: FIRST, found_awake: 0 }
    }
}

impl CpuMigration {
    /// Notes that something has come, and from which CPU this thread was woken for it, if it slept.
    #[inline]
    pub(super) fn note(&mut self, woken_from: Option<usize>) {
        match woken_from {
            None => {
                self.found_awake += 1;
                if self.found_awake >= STEADY {
                    (self.wakes_from_own_cpu, self.threshold) = (0, FIRST);
                }
            }
            Some(cpu) => {
                self.found_awake = 0;
                if self.count_wake(cpu == cpu::current()) {
                    cpu::leave();
                }
            }
        }
    }

    /// Counts a wake, and returns `true` if the worker should leave its CPU.
    fn count_wake(&mut self, is_here: bool) -> bool {
        self.wakes_from_own_cpu = if is_here { self.wakes_from_own_cpu + 1 } else { 0 };
        let leaves = self.wakes_from_own_cpu >= self.threshold;
        if leaves {
            self.wakes_from_own_cpu = 0;
            self.threshold = (self.threshold * 4).min(RAREST);
        }
        leaves
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worker_leaves_its_cpu_ever_more_rarely_until_it_was_awake_for_long() {
        let mut migration = CpuMigration::default();
        let mut woken = |times: u32| (0..times).filter(|_| migration.count_wake(true)).count();
        assert_eq!((woken(FIRST - 1), woken(1), woken(4 * FIRST - 1), woken(1), woken(15 * FIRST)), (0, 1, 0, 1, 0));
        assert!(!migration.count_wake(false));
        assert!((1..16 * FIRST).all(|_| !migration.count_wake(true)), "only in a row do they count");
        (0..STEADY).for_each(|_| migration.note(None));
        assert_eq!((0..FIRST).filter(|_| migration.count_wake(true)).count(), 1);
    }
}
