//! A lock: one holder at a time, in all processes. The protocol is in [`super::mutex`].

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

/// A mutual exclusion lock between processes.
///
/// Use instead:
/// - [`RwLock`](crate::RwLock) if readers need not exclude each other;
/// - [`Semaphore`](crate::Semaphore) for up to n holders at a time;
/// - [`RLock`](crate::RLock) if a holder acquires it again;
/// - the lock that is inside each [`Value`](crate::Value) and [`Array`](crate::Array) to protect these.
///
/// It protects anything that processes share: a file, a device, a step that only one of them may do at a time. Tasks and
/// threads of one process exclude each other as processes do. [`acquire`](Lock::acquire) returns a guard; dropping the
/// guard releases the lock.
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
///
/// # Handles
/// A handle is cheap to clone and is a serde value. It can be an argument, a result, or part of a value in a queue or a
/// pipe. All handles refer to the same lock, which exists as long as any process or message has a handle.
///
/// # Details
/// - **Waiting.** A running task may acquire a free lock before tasks that sleep. The first waiter of a process can reserve the lock after 1 ms: the
///   next release hands it over, unless that task does not run within 5 ms. There is one reservation at a time, and at most one in a millisecond.
/// - **Futures that are not polled.** A future that has been polled keeps its place, and later waiters of this process wait behind it. Poll it on, or drop
///   it.
/// - **Cancel.** Cancel safe: a dropped future has not acquired the lock.
/// - **Death.** If the holder is killed, or ends with its guard leaked, the next holder gets
///   [`OwnerDied`](crate::ErrorKind::OwnerDied) at once, with the guard inside the error.
/// - **Stopped processes.** A process stopped by SIGSTOP still holds the lock. If it is the one that was woken for the
///   lock, other sleepers are woken by the first release at least 5 ms later, or when it continues or is killed.
/// - **Cost.** An uncontended lock is acquired and released by a few atomic operations, without a system call or an
///   allocation. A lock is one descriptor and a page of memory.
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
    /// Creates an unlocked lock.
    ///
    /// # Errors
    /// `Io` if no memory or descriptor is left.
    pub fn new() -> Result<Self> {
        object::create(|_| ()).map(Self)
    }

    /// Acquires the lock, waiting until it is free.
    ///
    /// Cancel safe: a dropped future has not acquired the lock.
    ///
    /// # Errors
    /// - `OwnerDied` if the last holder died. The lock is acquired: the guard is inside the error.
    /// - `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs, such as
    ///   a descriptor. With a timeout also if the runtime has no timer.
    pub async fn acquire(&self) -> Result<LockGuard, LockError<LockGuard>> {
        acquire::wait(self).await
    }

    /// Attempts to acquire the lock without waiting.
    ///
    /// # Errors
    /// `WouldBlock` if the lock is held, or is reserved for a task that has waited long. Otherwise as
    /// [`acquire`](Self::acquire).
    #[inline]
    pub fn try_acquire(&self) -> Result<LockGuard, LockError<LockGuard>> {
        acquire::attempt(self)
    }

    /// Acquires the lock, waiting at most `timeout`.
    ///
    /// Cancel safe: a dropped future has not acquired the lock. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{self as mp, ErrorKind};
    /// use std::time::Duration;
    /// let lock = mp::Lock::new()?;
    /// let _guard = lock.acquire_timeout(Duration::from_secs(1)).await?;
    /// let error = lock.acquire_timeout(Duration::from_millis(1)).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Timeout);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Timeout` if the lock was not released in time. Otherwise as [`acquire`](Self::acquire).
    pub async fn acquire_timeout(&self, timeout: Duration) -> Result<LockGuard, LockError<LockGuard>> {
        acquire::wait_timeout(self, timeout).await
    }

    /// Acquires the lock, blocking this thread until it is free.
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

    /// Acquires the lock, blocking this thread for at most `timeout`.
    ///
    /// ```
    /// # multiprocess::init();
    /// use std::time::Duration;
    /// let lock = multiprocess::Lock::new()?;
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

/// A guard of a [`Lock`]. Dropping the guard releases the lock.
///
/// It may be held across `.await` and dropped in another task or thread of its process. Dropping it never waits.
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
