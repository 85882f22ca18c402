//! Handing a mutex from task to task of one process, while no other process waits for it.
//!
//! # State
//! A flag of this process, beside the local queue of the mutex. True: this process holds the mutex for the front of that queue.
//! The shared words of the mutex say only that this process holds it, and stay as they are.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | false -> true | the holder, if its process has waiters | SeqCst | the front |
//! | true -> false | the front, which holds the mutex from then on | SeqCst swap | - |
//! | true -> false | the holder, or a waiter that gives up, if it finds the queue empty; it then releases the mutex for all | SeqCst swap | - |
//!
//! # Invariants
//! 1. One swap finds the flag true, so one of these has the mutex.
//! 2. The holder sets the flag, then reads the length of the queue. A waiter changes the length, then reads the flag. So a flag that is
//!    set beside an empty queue is found by one of them.
//! 3. Fairness towards other processes is the mutex's: it hands over only while none of them sleeps.
//!
//! # Death
//! The flag dies with the process, whose mutex the next taker finds with a dead holder.
//!
//! # Cancel
//! A front that is dropped leaves the flag to the task behind it, which leaving wakes; the last one releases the mutex.

use crate::shm::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

/// The local queue of a mutex, as far as handing over needs it.
pub(super) trait LocalQueue {
    fn has_waiters(&self) -> bool;
    /// Lets the front try.
    fn wake_front(&self);
}

/// The flag.
pub(super) struct HandOver(AtomicU64);

impl HandOver {
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Hands what the caller holds to the front of `queue`; false if nobody is there, and the caller holds it still.
    pub(super) fn give(&self, queue: &impl LocalQueue) -> bool {
        self.0.store(1, SeqCst);
        queue.wake_front();
        queue.has_waiters() || !self.take()
    }

    /// Takes what was handed over: as the front of the queue.
    #[inline]
    pub(super) fn take(&self) -> bool {
        self.0.load(SeqCst) == 1 && self.0.swap(0, SeqCst) == 1
    }

    /// Takes what was handed to a waiter that has left the queue, if it was the last; the caller has to release it.
    #[inline]
    pub(super) fn take_abandoned(&self, queue: &impl LocalQueue) -> bool {
        !queue.has_waiters() && self.take()
    }
}
