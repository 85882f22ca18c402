//! A re-entrant lock. The count of acquisitions and the wakers of futures that wait belong to this process; the rest is [`super::mutex`].

use super::acquire::{self, Held};
use super::mutex::{self, ByMutex, Mutex, Taken, Words};
use super::object::{self, Core, FIRST, Owner, Report};
use crate::error::{LockError, Result};
use crate::os::fork;
use crate::os::sync::lock;
use crate::shm::atomic::AtomicU64;
use crate::shm::mapped::Mapped;
use crate::shm::region::Region;
use std::collections::BTreeMap;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

/// A re-entrant lock between processes: its owner may acquire it again.
///
/// Use [`Lock`](crate::Lock) instead if no holder acquires it twice: it has no owner but its guard.
///
/// The owner is a tokio task, or a thread outside of tasks. Each acquisition has its own guard. The lock is free when the
/// last of them is dropped.
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
///
/// # Details
/// - **Owner.** The future that `block_on` drives is outside of tasks, so its owner is the thread. A future that holds the
///   lock and moves into another task has another owner there, and so has one that waits, once it is polled there. Guards may be dropped in any task or thread.
/// - **Waiting, death, handles.** As with [`Lock`](crate::Lock).
/// - **Cost.** That of a [`Lock`](crate::Lock), and two mutexes within this process.
#[derive(Clone)]
pub struct RLock(Arc<RLockCore>);

pub(super) struct RLockCore {
    region: Arc<Region>,
    mutex: Mutex,
    /// The owner in this process and the number of its acquisitions.
    held: std::sync::Mutex<Option<(Owner, usize)>>,
    /// The futures that wait, by number, and their owners: one that acquires the lock wakes the others of its own.
    waits: std::sync::Mutex<BTreeMap<u64, (Owner, Waker)>>,
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
        Ok(Self {
            mutex: Mutex::view(&region, FIRST, Self::NAME)?,
            region,
            held: Default::default(),
            waits: Default::default(),
        })
    }
}

impl RLockCore {
    fn held(&self) -> std::sync::MutexGuard<'_, Option<(Owner, usize)>> {
        lock(&self.held)
    }

    /// Takes it once more if the caller has it.
    fn take_again(&self) -> bool {
        // The thread's number is the same there.
        if fork::is_forked() {
            return false;
        }
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
        self.wake_all_of(Owner::here());
    }

    /// Wakes all futures of this owner that wait.
    fn wake_all_of(&self, owner: Owner) {
        let waits = lock(&self.waits);
        let of_owner = waits.values().filter(|(of, _)| *of == owner);
        let wakers: Vec<_> = of_owner.map(|(_, waker)| waker.clone()).collect();
        drop(waits);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Resolves to the outcome of `taking`, or to a further guard as soon as another future of the same owner has acquired the lock.
    async fn unless_held<T>(self: &Arc<Self>, taking: impl Future<Output = T>) -> Result<T, RLockGuard> {
        let (mut taking, mut wait) = (pin!(taking), Wait { core: self, noted: None });
        poll_fn(|cx| {
            let moved = |owner: &Owner| *owner != Owner::here() && !fork::is_forked();
            let before = wait.noted.map(|(_, owner)| owner).filter(moved);
            let polled = if self.take_again() {
                Poll::Ready(Err(RLockGuard(self.clone())))
            } else {
                taking.as_mut().poll(cx).map(Ok)
            };
            if polled.is_pending() {
                // None of the same owner is polled meanwhile.
                wait.note(cx.waker());
            }
            // Those that moved here with it are to learn of their new owner.
            before.into_iter().for_each(|owner| self.wake_all_of(owner));
            polled
        })
        .await
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

/// A future that waits.
struct Wait<'a> {
    core: &'a RLockCore,
    /// Its number, and its owner at the last poll.
    noted: Option<(u64, Owner)>,
}

impl Wait<'_> {
    fn note(&mut self, waker: &Waker) {
        let mut waits = lock(&self.core.waits);
        let next = || waits.last_key_value().map_or(0, |(last, _)| last + 1);
        let (number, owner) = (self.noted.map_or_else(next, |(number, _)| number), Owner::here());
        let old = waits.insert(number, (owner, waker.clone()));
        drop(waits);
        drop(old);
        self.noted = Some((number, owner));
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if let Some((number, _)) = self.noted.filter(|_| !fork::is_forked()) {
            let old = lock(&self.core.waits).remove(&number);
            drop(old);
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
        // First, as a waker may panic.
        let guard = RLockGuard(self.0.clone());
        self.0.is_mine_now();
        Ok(Held { guard, owner_died: taken == Taken::OwnerDied })
    }

    fn guard_again(&self) -> Option<RLockGuard> {
        self.0.take_again().then(|| RLockGuard(self.0.clone()))
    }
}

impl RLock {
    /// Creates an unlocked lock.
    ///
    /// # Errors
    /// `Io` if no memory or descriptor is left.
    pub fn new() -> Result<Self> {
        object::create(|_| ()).map(Self)
    }

    /// Acquires the lock, waiting until no other owner holds it.
    ///
    /// Cancel safe: a dropped future has not acquired the lock.
    ///
    /// # Errors
    /// - `OwnerDied` if the last holder died. The lock is acquired: the guard is inside the error.
    /// - `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs, such as
    ///   a descriptor. With a timeout also if the runtime has no timer.
    pub async fn acquire(&self) -> Result<RLockGuard, LockError<RLockGuard>> {
        self.0.unless_held(acquire::wait(self)).await.unwrap_or_else(Ok)
    }

    /// Attempts to acquire the lock without waiting.
    ///
    /// # Errors
    /// `WouldBlock` if another owner holds the lock, or it is reserved for one that has waited long. Otherwise as
    /// [`acquire`](Self::acquire).
    pub fn try_acquire(&self) -> Result<RLockGuard, LockError<RLockGuard>> {
        acquire::attempt(self)
    }

    /// Acquires the lock, waiting at most `timeout`.
    ///
    /// Cancel safe: a dropped future has not acquired the lock. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use std::time::Duration;
    /// let lock = multiprocess::RLock::new()?;
    /// let guard = lock.acquire_timeout(Duration::from_secs(1)).await?;
    /// drop(guard);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Timeout` if the lock was not released in time. Otherwise as [`acquire`](Self::acquire).
    pub async fn acquire_timeout(&self, timeout: Duration) -> Result<RLockGuard, LockError<RLockGuard>> {
        self.0.unless_held(acquire::wait_timeout(self, timeout)).await.unwrap_or_else(Ok)
    }

    /// Acquires the lock, blocking this thread until no other owner holds it.
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

    /// Acquires the lock, blocking this thread for at most `timeout`.
    ///
    /// ```
    /// # multiprocess::init();
    /// use std::time::Duration;
    /// let lock = multiprocess::RLock::new()?;
    /// let guard = lock.blocking_acquire_timeout(Duration::from_secs(1))?;
    /// drop(guard);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`acquire_timeout`](Self::acquire_timeout).
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

/// A guard of an [`RLock`]: one acquisition, which dropping it ends.
///
/// It may be held across `.await` and dropped in another task or thread of its process. Dropping it never waits.
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
