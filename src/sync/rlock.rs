//! A lock that its owner may take again: the depth is this process's own affair, the rest is [`super::mutex`].

use super::acquire::{self, Held};
use super::mutex::{self, ByMutex, Mutex, Taken, Words};
use super::object::{self, Core, FIRST, Owner, Report};
use crate::error::{LockError, Result};
use crate::os::fork;
use crate::os::sync::lock;
use crate::shm::atomic::AtomicU64;
use crate::shm::mapped::Mapped;
use crate::shm::region::Region;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// A lock across processes that its owner may take again.
///
/// The owner is the tokio task, or outside of tasks the thread. (The future that a runtime's `block_on` drives is
/// outside; so a future that holds the lock and moves into another task is another owner.) Each acquisition has its
/// guard; when the last of them is dropped, wherever, the lock is free.
///
/// In all else it is a [`Lock`](crate::Lock): waiting, cancelling, death, cost (and a mutex of this process).
///
/// ```
/// # multiprocess::init();
/// let lock = multiprocess::RLock::new()?;
/// let outer = lock.try_acquire()?;
/// let inner = lock.try_acquire()?;
/// let of_another_thread = || std::thread::scope(|scope| scope.spawn(|| lock.try_acquire().is_ok()).join().unwrap());
/// drop(outer);
/// assert!(!of_another_thread());
/// drop(inner);
/// assert!(of_another_thread());
/// # Ok::<(), multiprocess::Error>(())
/// ```
#[derive(Clone)]
pub struct RLock(Arc<RLockCore>);

pub(super) struct RLockCore {
    region: Arc<Region>,
    mutex: Mutex,
    /// Who in this process has it, and how often.
    held: std::sync::Mutex<Option<(Owner, usize)>>,
}

static MAPPED: Mapped<RLockCore> = Mapped::new();

impl Core for RLockCore {
    const KIND: u64 = 0x6d70_726c_6f63_0001;
    const NAME: &'static str = "rlock";
    const WORDS: usize = FIRST + mutex::LEN;

    fn mapped() -> &'static Mapped<Self> {
        &MAPPED
    }

    fn region(&self) -> &Arc<Region> {
        &self.region
    }

    fn report(words: &[AtomicU64]) -> Report {
        Words(&words[FIRST..FIRST + mutex::LEN]).report()
    }

    fn view(region: Arc<Region>) -> io::Result<Self> {
        Ok(Self { mutex: Mutex::view(&region, FIRST, Self::NAME)?, region, held: std::sync::Mutex::new(None) })
    }
}

impl RLockCore {
    fn held(&self) -> std::sync::MutexGuard<'_, Option<(Owner, usize)>> {
        lock(&self.held)
    }

    /// Takes it once more if the caller has it.
    fn take_again(&self) -> bool {
        match &mut *self.held() {
            Some((owner, depth)) if *owner == Owner::here() => {
                *depth += 1;
                true
            }
            _ => false,
        }
    }

    fn is_mine_now(&self) {
        *self.held() = Some((Owner::here(), 1));
    }

    fn release(&self) {
        let mut held = self.held();
        match &mut *held {
            Some((_, depth)) if *depth > 1 => *depth -= 1,
            _ => {
                *held = None;
                drop(held);
                self.mutex.release();
            }
        }
    }
}

impl ByMutex for RLock {
    const NAME: &'static str = RLockCore::NAME;
    type Guard = RLockGuard;

    fn mutex(&self) -> &Mutex {
        &self.0.mutex
    }

    fn guard(&self, taken: Taken) -> io::Result<Held<RLockGuard>> {
        self.0.is_mine_now();
        Ok(Held { guard: RLockGuard(self.0.clone()), owner_died: taken == Taken::OwnerDied })
    }

    fn guard_again(&self) -> Option<RLockGuard> {
        self.0.take_again().then(|| RLockGuard(self.0.clone()))
    }
}

impl RLock {
    /// A lock that nobody holds.
    ///
    /// # Errors
    /// `Io` if there is no memory or descriptor left.
    pub fn new() -> Result<Self> {
        object::create(|_| ()).map(Self)
    }

    /// Takes the lock; waits while another owner holds it. Cancel-safe: dropped, it has not taken it.
    ///
    /// # Errors
    /// `OwnerDied`, and then the lock is taken: the guard is inside. `Io` if this process has no descriptor left to
    /// wait with.
    pub async fn acquire(&self) -> Result<RLockGuard, LockError<RLockGuard>> {
        acquire::wait(self).await
    }

    /// Takes the lock if that needs no waiting.
    ///
    /// # Errors
    /// `WouldBlock` if another owner holds it, or has waited for long and gets it next; else as
    /// [`acquire`](Self::acquire).
    pub fn try_acquire(&self) -> Result<RLockGuard, LockError<RLockGuard>> {
        acquire::attempt(self)
    }

    /// [`acquire`](Self::acquire) that gives up after `timeout`. Counted in real time: see [Timeouts](crate#timeouts).
    ///
    /// # Errors
    /// `Timeout`, else as [`acquire`](Self::acquire).
    pub async fn acquire_timeout(&self, timeout: Duration) -> Result<RLockGuard, LockError<RLockGuard>> {
        acquire::wait_timeout(self, timeout).await
    }

    /// [`acquire`](Self::acquire) for plain functions: blocks this thread.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    #[track_caller]
    pub fn blocking_acquire(&self) -> Result<RLockGuard, LockError<RLockGuard>> {
        acquire::block(self)
    }

    /// [`blocking_acquire`](Self::blocking_acquire) that gives up after `timeout`.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// `Timeout`, else as [`acquire`](Self::acquire).
    #[track_caller]
    pub fn blocking_acquire_timeout(&self, timeout: Duration) -> Result<RLockGuard, LockError<RLockGuard>> {
        acquire::block_timeout(self, timeout)
    }
}

impl fmt::Debug for RLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RLock").field("is_held", &self.0.mutex.is_held()).finish()
    }
}

object::travels!(RLock, 0);

/// One acquisition of an [`RLock`], until it is dropped, in whichever task or thread of its process.
///
/// ```
/// # multiprocess::init();
/// let lock = multiprocess::RLock::new()?;
/// let guards = [lock.try_acquire()?, lock.try_acquire()?, lock.try_acquire()?];
/// drop(guards); // and the lock is free
/// # Ok::<(), multiprocess::Error>(())
/// ```
#[must_use = "a guard that is dropped at once protects nothing"]
pub struct RLockGuard(Arc<RLockCore>);

impl Drop for RLockGuard {
    fn drop(&mut self) {
        if fork::is_forked() {
            return;
        }
        self.0.release();
    }
}

impl fmt::Debug for RLockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RLockGuard").finish_non_exhaustive()
    }
}
