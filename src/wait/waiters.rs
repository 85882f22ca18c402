//! Waiters that all see what they wait for, as the setting of an event: each tries for itself, and a notification wakes all of this
//! process. Each change that may let one of them go on is followed by a notification of all.
//!
//! # State
//! `sleeping`: the wakers of the tasks and threads that sleep, in the order in which they fell asleep. The place of this process in
//! the shared list belongs to the wait queue, which is used as an alarm: it is armed while anybody sleeps.
//!
//! # Moves
//! | move | by | then |
//! |---|---|---|
//! | a waker is added | a waiter that has tried in vain | it arms the alarm, and tries once more |
//! | all wakers are taken and called | the doorbell | each waiter tries again |
//! | a waker is removed | its waiter, when it ends | if none is left the alarm is disarmed |
//!
//! # Invariants
//! 1. While there is a waker, the alarm is armed, or its waiter is about to try again.
//! 2. A waker runs, and is dropped, without a lock of ours.
//! 3. Success takes from no other what that one waits for, so a waiter that is not polled, or that waits for something else, delays nobody.
//!
//! # Death
//! All of it dies with the process; see `sleepers` for the shared part.
//!
//! # Cancel
//! A dropped wait has removed its waker.

use super::doorbell::Parker;
use super::local_queue::WaitQueue;
use super::until::until_read;
use crate::os::fork;
use crate::os::sync::lock;
use std::io;
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::Instant;

/// The waiters of this process for one thing that all of them see.
pub(crate) struct Waiters {
    line: Arc<WaitQueue>,
    sleeping: Arc<Mutex<Sleeping>>,
}

#[derive(Default)]
struct Sleeping {
    next_id: u64,
    /// By id, in ascending order.
    wakers: Vec<(u64, Waker)>,
}

impl Sleeping {
    fn position(&self, id: u64) -> Option<usize> {
        self.wakers.binary_search_by_key(&id, |(id, _)| *id).ok()
    }
}

impl Waiters {
    pub(crate) fn new(line: Arc<WaitQueue>) -> Self {
        let sleeping: Arc<Mutex<Sleeping>> = Arc::default();
        let woken = sleeping.clone();
        line.set_reader(move || {
            let wakers = std::mem::take(&mut lock(&woken).wakers);
            wakers.into_iter().for_each(|(_, waker)| waker.wake());
        });
        Self { line, sleeping }
    }

    /// Returns `true` if any task or thread of this process sleeps.
    pub(crate) fn has_sleepers(&self) -> bool {
        !lock(&self.sleeping).wakers.is_empty()
    }

    /// Wakes all waiters of every process. To be called after the change that they wait for.
    pub(crate) fn notify_all(&self) {
        self.line.notify_all();
    }

    fn waiter(&self) -> Waiter<'_> {
        Waiter { waiters: self, id: None }
    }

    /// Resolves to the result of `attempt`. A dropped future has changed nothing.
    pub(crate) async fn until<T>(&self, attempt: impl FnMut() -> Option<T>) -> io::Result<T> {
        let mut waiter = self.waiter();
        until_read(&self.line, attempt, |waker| waiter.sleep(waker)).await
    }

    /// The same for a thread without a runtime; `None` at the deadline.
    pub(crate) fn until_blocking<T>(
        &self,
        deadline: Option<Instant>,
        mut attempt: impl FnMut() -> Option<T>,
    ) -> io::Result<Option<T>> {
        fork::check()?;
        if let Some(value) = attempt() {
            return Ok(Some(value));
        }
        let spin = &self.line.spin;
        let window = self.line.spin_among_all();
        // This thread has no other tasks, and yielding the CPU while another thread wants it would lose a time slice.
        while let Some(window) = &window {
            if let Some(value) = spin.in_place(window, &mut attempt) {
                return Ok(Some(value));
            }
            if spin.is_over(window) {
                break;
            }
        }
        let parker = Parker::of_thread(self.line.family(), self.line.hangup())?;
        let mut waiter = self.waiter();
        loop {
            waiter.sleep(&parker.waker);
            self.line.arm_parked()?;
            if let Some(value) = attempt() {
                return Ok(Some(value));
            }
            if !parker.until(deadline)? {
                return Ok(None);
            }
        }
    }
}

/// One waiter, which may sleep.
struct Waiter<'a> {
    waiters: &'a Waiters,
    id: Option<u64>,
}

impl Waiter<'_> {
    /// From now on a notification calls `waker`; the alarm is still to be armed.
    fn sleep(&mut self, waker: &Waker) {
        let mut sleeping = lock(&self.waiters.sleeping);
        let old = match self.id.and_then(|id| sleeping.position(id)) {
            Some(at) if sleeping.wakers[at].1.will_wake(waker) => None,
            Some(at) => Some(std::mem::replace(&mut sleeping.wakers[at].1, waker.clone())),
            None => {
                let id = sleeping.next_id;
                sleeping.next_id += 1;
                sleeping.wakers.push((id, waker.clone()));
                self.id = Some(id);
                None
            }
        };
        drop(sleeping);
        drop(old);
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id.filter(|_| !fork::is_forked()) else { return };
        let mut sleeping = lock(&self.waiters.sleeping);
        let gone = sleeping.position(id).map(|at| sleeping.wakers.remove(at));
        if sleeping.wakers.is_empty() {
            // Under the lock: a waiter that adds a waker after this arms the alarm after this, and so does one that was woken and tries.
            self.waiters.line.disarm();
        }
        drop(sleeping);
        drop(gone);
    }
}
