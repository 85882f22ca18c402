//! Mutual exclusion across processes; the protocol is in [`super::mutex`].

use super::acquire::{self, Held};
use super::mutex::{self, ByMutex, Mutex, Taken, Words};
use super::object::{self, Core, FIRST, Report};
use crate::error::{LockError, Result};
use crate::shm::atomic::AtomicU64;
use crate::shm::mapped::Mapped;
use crate::shm::region::Region;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// A lock across processes.
///
/// A handle is cheap to clone and is itself a serde value: it travels as an argument, in a result, inside other
/// values, through queues and pipes. Tasks and threads of one process exclude each other as processes do.
///
/// **Waiting.** [`acquire`](Lock::acquire) waits while somebody holds the lock; who runs may take a free lock ahead of
/// those who sleep, and who has waited for about a millisecond gets it next. Cancel-safe: a dropped future has not
/// taken it. **Death.** If the holder is killed, or ends with its guard forgotten, one of those who wait is told so at
/// once: it gets [`OwnerDied`](crate::ErrorKind::OwnerDied) with the guard inside. A process that is only stopped (SIGSTOP) still
/// holds what it holds; if it is the one that was woken for the lock, those who sleep behind it are woken by the next
/// release, or when it goes on. **Cost.** A lock that is free and that
/// nobody waits for is taken and released by a few atomics, without a system call or an allocation; a lock is one
/// descriptor and a page of memory.
///
/// ```
/// use multiprocess::{self as mp, Lock, Process};
///
/// async fn work(lock: Lock) -> mp::Result<()> {
///     let _guard = lock.acquire().await?;
///     // Nobody else is here now, in any process.
///     Ok(())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let lock = Lock::new()?;
///         let child = Process::spawn(work, (lock.clone(),))?;
///         work(lock).await?;
///         child.await?
///     })
/// }
/// ```
#[derive(Clone)]
pub struct Lock(Arc<LockCore>);

pub(super) struct LockCore {
    region: Arc<Region>,
    mutex: Mutex,
}

static MAPPED: Mapped<LockCore> = Mapped::new();

impl Core for LockCore {
    const KIND: u64 = 0x6d70_6c6f_636b_0001;
    const NAME: &'static str = "lock";
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
        Ok(Self { mutex: Mutex::view(&region, FIRST, Self::NAME)?, region })
    }
}

impl ByMutex for Lock {
    const NAME: &'static str = LockCore::NAME;
    type Guard = LockGuard;

    #[inline]
    fn mutex(&self) -> &Mutex {
        &self.0.mutex
    }

    #[inline]
    fn guard(&self, taken: Taken) -> io::Result<Held<LockGuard>> {
        Ok(Held { guard: LockGuard(self.0.clone()), owner_died: taken == Taken::OwnerDied })
    }
}

impl Lock {
    /// A lock that nobody holds.
    ///
    /// # Errors
    /// `Io` if there is no memory or descriptor left.
    pub fn new() -> Result<Self> {
        object::create(|_| ()).map(Self)
    }

    /// Takes the lock; waits while somebody holds it. Cancel-safe: dropped, it has not taken it.
    ///
    /// # Errors
    /// `OwnerDied`, and then the lock is taken: the guard is inside. `Io` if this process has no descriptor left to
    /// wait with.
    pub async fn acquire(&self) -> Result<LockGuard, LockError<LockGuard>> {
        acquire::wait(self).await
    }

    /// Takes the lock if that needs no waiting.
    ///
    /// # Errors
    /// `WouldBlock` if somebody holds it, or has waited for long and gets it next; else as [`acquire`](Self::acquire).
    #[inline]
    pub fn try_acquire(&self) -> Result<LockGuard, LockError<LockGuard>> {
        acquire::attempt(self)
    }

    /// [`acquire`](Self::acquire) that gives up after `timeout`. Counted in real time: see [Timeouts](crate#timeouts).
    ///
    /// # Errors
    /// `Timeout`, else as [`acquire`](Self::acquire).
    pub async fn acquire_timeout(&self, timeout: Duration) -> Result<LockGuard, LockError<LockGuard>> {
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
    pub fn blocking_acquire(&self) -> Result<LockGuard, LockError<LockGuard>> {
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
    pub fn blocking_acquire_timeout(&self, timeout: Duration) -> Result<LockGuard, LockError<LockGuard>> {
        acquire::block_timeout(self, timeout)
    }
}

impl fmt::Debug for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lock").field("is_held", &self.0.mutex.is_held()).finish()
    }
}

object::travels!(Lock, 0);

/// Holds a [`Lock`] until it is dropped, in whichever task or thread of its process.
///
/// ```
/// # multiprocess::init();
/// let lock = multiprocess::Lock::new()?;
/// let guard = lock.try_acquire()?;
/// assert!(lock.try_acquire().is_err());
/// std::thread::spawn(move || drop(guard)).join().unwrap();
/// assert!(lock.try_acquire().is_ok());
/// # Ok::<(), multiprocess::Error>(())
/// ```
#[must_use = "a guard that is dropped at once protects nothing"]
pub struct LockGuard(Arc<LockCore>);

impl Drop for LockGuard {
    #[inline]
    fn drop(&mut self) {
        self.0.mutex.release();
    }
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard").finish_non_exhaustive()
    }
}
