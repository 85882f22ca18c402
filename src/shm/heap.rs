//! Processes that threads play, and plain memory between them: for tests of the algorithms on the heap, where a
//! sanitizer sees every access.

use super::family::Member;
use super::robust_lock::Liveness;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering::*};

/// Plain memory: ThreadSanitizer reports every access that is not ordered with the others.
pub(crate) struct Plain<T>(UnsafeCell<T>);

// SAFETY: its user holds the lock that its test is about; that this orders the accesses is what the sanitizer checks.
unsafe impl<T: Send> Sync for Plain<T> {}

impl<T: Copy> Plain<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    pub(crate) fn read(&self) -> T {
        // SAFETY: as above; nothing refers to it, it is copied.
        unsafe { *self.0.get() }
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut T)) {
        // SAFETY: as above; no reference to it lives on.
        change(unsafe { &mut *self.0.get() });
    }
}

/// The members of a test, in place of the family's table: for each slot `epoch:63 | alive:1`.
pub(crate) struct Members(Vec<AtomicU64>);

impl Members {
    pub(crate) fn new(count: u16) -> Self {
        Self((0..count).map(|_| AtomicU64::new(1 << 1 | 1)).collect())
    }

    fn state(&self, slot: u16) -> u64 {
        self.0[usize::from(slot)].load(Acquire)
    }

    pub(crate) fn member(&self, slot: u16) -> Member {
        Member { slot, epoch: (self.state(slot) >> 1) as u32 }
    }

    /// The epoch of the member that has `slot`, if there is one.
    pub(crate) fn epoch_of(&self, slot: u16) -> Option<u32> {
        let state = self.0.get(usize::from(slot))?.load(Acquire);
        (state & 1 == 1).then_some((state >> 1) as u32)
    }

    /// The member that has `slot` is dead from now on.
    pub(crate) fn recover(&self, slot: u16) {
        self.0[usize::from(slot)].fetch_and(!1, AcqRel);
    }

    /// A new process gets the slot of a dead one.
    pub(crate) fn succeed(&self, slot: u16) {
        self.0[usize::from(slot)].fetch_add(1 << 1 | 1, AcqRel);
    }
}

impl Liveness for Members {
    fn is_listed(&self, member: Member) -> bool {
        self.epoch_of(member.slot) == Some(member.epoch)
    }

    fn is_alive(&self, member: Member) -> bool {
        self.is_listed(member)
    }
}
