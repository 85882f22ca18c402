//! A read-write lock. Its shared words are in [`super::rwlock_state`]; here are its waiters.

use super::acquire::{self, Acquire, Held};
use super::fairness::{Acquirer, Fairness};
use super::holders::Taken;
use super::object::{self, Core, FIRST, Report};
use super::rwlock_state::{self, Own, RwLockState};
use crate::error::{Damage, ErrorKind, LockError, Result};
use crate::os::fork;
use crate::shm::atomic::AtomicU64;
use crate::shm::family::{Family, Member};
use crate::shm::mapped::Mapped;
use crate::shm::region::Region;
use crate::wait::sleepers::{self, Sleepers};
use crate::wait::{WaitQueue, Waiters, until, until_blocking};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

const FAIRNESS: usize = FIRST;
const STATE: usize = FAIRNESS + 1;
const READERS: usize = STATE + rwlock_state::LEN;
const WRITERS: usize = READERS + sleepers::LEN;

/// A read-write lock as this process sees it.
pub(super) struct RwLockCore {
    region: Arc<Region>,
    readers: Waiters,
    writers: Arc<WaitQueue>,
    family: &'static Family,
    own: Own,
}

static MAPPED: Mapped<RwLockCore> = Mapped::new();

impl Core for RwLockCore {
    const KIND: u64 = u64::from_le_bytes(*b"mprwlo01");
    const NAME: &'static str = "read-write lock";
    const WORDS: usize = WRITERS + sleepers::LEN;

    fn mapped() -> &'static Mapped<Self> {
        &MAPPED
    }

    fn region(&self) -> &Arc<Region> {
        &self.region
    }

    fn report(words: &[AtomicU64]) -> Report {
        let lists = [READERS, WRITERS].map(|first| Sleepers::new(&words[first..first + sleepers::LEN]).list());
        let (writer, shares) = RwLockState::<Family>::list(&words[STATE..READERS]);
        Report { writer, shares, waiting: lists.concat(), ..Report::default() }
    }

    fn view(region: Arc<Region>) -> io::Result<Self> {
        let queue = |first| WaitQueue::new(region.clone(), first, None);
        let (readers, writers) = (Waiters::new(queue(READERS)?), queue(WRITERS)?);
        Ok(Self { region, readers, writers, family: Family::get()?, own: Own::default() })
    }
}

/// The share of a guard, to be given back when it is dropped.
struct Share {
    lock: Arc<RwLockCore>,
    row: usize,
}

impl RwLockCore {
    #[inline]
    fn state(&self) -> RwLockState<'_, Family> {
        RwLockState::new(&self.region.words()[STATE..READERS], &self.own, self.family)
    }

    fn fairness(&self) -> Fairness<'_> {
        Fairness(&self.region.words()[FAIRNESS])
    }

    #[inline]
    fn share(self: &Arc<Self>, taken: Taken) -> Share {
        Share { lock: self.clone(), row: taken.row }
    }

    #[inline]
    fn reading(self: &Arc<Self>, taken: Taken) -> Held<RwLockReadGuard> {
        Held { guard: RwLockReadGuard { share: self.share(taken) }, owner_died: taken.is_poisoned }
    }

    #[inline]
    fn writing(self: &Arc<Self>, taken: Taken) -> Held<RwLockWriteGuard> {
        Held { guard: RwLockWriteGuard { share: self.share(taken) }, owner_died: taken.is_poisoned }
    }

    #[inline]
    fn take_read(self: &Arc<Self>, since: u64) -> io::Result<Option<Held<RwLockReadGuard>>> {
        let taken = self.state().take_read(self.family.me()?, since);
        self.sound(taken.map(|taken| self.reading(taken)))
    }

    #[inline]
    fn take_write(self: &Arc<Self>) -> io::Result<Option<Held<RwLockWriteGuard>>> {
        let taken = self.state().take_write(self.family.me()?);
        self.sound(taken.map(|taken| self.writing(taken)))
    }

    /// An error if nothing was taken because the memory is damaged.
    #[inline]
    fn sound<G>(&self, got: Option<G>) -> io::Result<Option<G>> {
        if got.is_none() && self.state().is_damaged() { Err(self.damaged()) } else { Ok(got) }
    }

    #[cold]
    fn damaged(&self) -> io::Error {
        if self.state().is_first_report() {
            self.readers.notify_all();
            self.writers.notify_all();
        }
        Damage::error(Self::NAME, self.region.identity(), "impossible counts, or damage found before")
    }

    fn read_attempt(self: &Arc<Self>) -> impl FnMut() -> Option<io::Result<Held<RwLockReadGuard>>> + '_ {
        let (phase, mut acquirer) = (self.state().phase(), Acquirer::default());
        move || {
            let got = self.take_read(phase).transpose();
            acquirer.looked(&self.fairness(), got.is_some());
            got
        }
    }

    fn write_attempt(self: &Arc<Self>) -> impl FnMut() -> Option<io::Result<Held<RwLockWriteGuard>>> + '_ {
        let (mut wanting, mut acquirer) = (None::<WaitingWriter<'_>>, Acquirer::default());
        move || {
            let got = self.take_write().transpose().or_else(|| {
                acquirer.looked(&self.fairness(), false);
                self.take_write_or_announce(&mut wanting).transpose()
            });
            if let (Some(Ok(_)), Some(wanting)) = (&got, &mut wanting) {
                wanting.got_it = true;
                acquirer.looked(&self.fairness(), true);
            }
            got
        }
    }

    fn take_write_or_announce<'a>(
        self: &'a Arc<Self>,
        wanting: &mut Option<WaitingWriter<'a>>,
    ) -> io::Result<Option<Held<RwLockWriteGuard>>> {
        let me = self.family.me()?;
        wanting.get_or_insert_with(|| WaitingWriter::begin(self, me));
        self.sound(self.state().take_write_or_announce(me).map(|taken| self.writing(taken)))
    }
}

/// A waiting writer. As long as there is one, new readers let it go first.
struct WaitingWriter<'a> {
    lock: &'a RwLockCore,
    me: Member,
    got_it: bool,
}

impl<'a> WaitingWriter<'a> {
    fn begin(lock: &'a RwLockCore, me: Member) -> Self {
        lock.state().begin_wait();
        Self { lock, me, got_it: false }
    }
}

impl Drop for WaitingWriter<'_> {
    fn drop(&mut self) {
        if fork::is_forked() {
            return;
        }
        if self.lock.state().end_wait(self.me) && !self.got_it {
            self.lock.readers.notify_all();
            self.lock.writers.notify_one();
        }
    }
}

/// A read-write lock, to be acquired for reading.
struct Reading<'a>(&'a Arc<RwLockCore>);

/// A read-write lock, to be acquired for writing.
struct Writing<'a>(&'a Arc<RwLockCore>);

impl Acquire for Reading<'_> {
    type Taken = Held<RwLockReadGuard>;
    type Guard = RwLockReadGuard;

    fn try_take(&self) -> io::Result<Option<Self::Taken>> {
        self.0.take_read(self.0.state().phase())
    }

    async fn take(&self) -> io::Result<Self::Taken> {
        let attempt = self.0.read_attempt();
        self.0.fairness().yield_to_sleepers(|| self.0.readers.has_sleepers()).await;
        self.0.readers.until(attempt).await?
    }

    #[track_caller]
    fn take_blocking(&self, deadline: Option<Instant>) -> io::Result<Option<Self::Taken>> {
        let attempt = self.0.read_attempt();
        self.0.fairness().blocking_yield_to_sleepers(|| self.0.readers.has_sleepers());
        self.0.readers.until_blocking(deadline, attempt)?.transpose()
    }

    #[inline]
    fn guard(&self, held: Self::Taken) -> io::Result<Held<RwLockReadGuard>> {
        Ok(held)
    }

    fn message(kind: ErrorKind) -> String {
        message(kind)
    }
}

impl Acquire for Writing<'_> {
    type Taken = Held<RwLockWriteGuard>;
    type Guard = RwLockWriteGuard;

    fn try_take(&self) -> io::Result<Option<Self::Taken>> {
        self.0.take_write()
    }

    async fn take(&self) -> io::Result<Self::Taken> {
        let attempt = self.0.write_attempt();
        self.0.fairness().yield_to_sleepers(|| self.0.writers.has_waiters()).await;
        until(&self.0.writers, attempt).await?
    }

    #[track_caller]
    fn take_blocking(&self, deadline: Option<Instant>) -> io::Result<Option<Self::Taken>> {
        let attempt = self.0.write_attempt();
        self.0.fairness().blocking_yield_to_sleepers(|| self.0.writers.has_waiters());
        until_blocking(&self.0.writers, deadline, attempt)?.transpose()
    }

    #[inline]
    fn guard(&self, held: Self::Taken) -> io::Result<Held<RwLockWriteGuard>> {
        Ok(held)
    }

    fn message(kind: ErrorKind) -> String {
        message(kind)
    }
}

#[cold]
fn message(kind: ErrorKind) -> String {
    match kind {
        ErrorKind::OwnerDied => {
            "a process was killed while it held the read-write lock for writing: \
             what the lock guards may be half changed"
        }
        ErrorKind::WouldBlock => "the read-write lock is held or waited for",
        ErrorKind::Timeout => "the read-write lock was not free in time",
        _ => "cannot acquire a read-write lock",
    }
    .to_string()
}

/// A shared guard of a [`RwLock`], which dropping it releases.
///
/// It may be held across `.await` and moved to other threads. Dropping it never waits. If its process is killed, its share
/// is free again within milliseconds.
///
/// ```
/// # multiprocess::init();
/// let lock = multiprocess::RwLock::new()?;
/// let (one, two) = (lock.try_read()?, lock.try_read()?);
/// assert!(lock.try_write().is_err());
/// drop((one, two));
/// assert!(lock.try_write().is_ok());
/// # Ok::<(), multiprocess::Error>(())
/// ```
#[must_use = "a guard that is dropped gives the lock back at once"]
pub struct RwLockReadGuard {
    share: Share,
}

/// An exclusive guard of a [`RwLock`], which dropping it releases.
///
/// It may be held across `.await` and moved to other threads. Dropping it never waits. If its process is killed, the next
/// holders get an error of kind `OwnerDied`.
///
/// ```
/// # multiprocess::init();
/// let lock = multiprocess::RwLock::new()?;
/// let guard = lock.try_write()?;
/// assert!(lock.try_read().is_err());
/// drop(guard);
/// assert!(lock.try_read().is_ok());
/// # Ok::<(), multiprocess::Error>(())
/// ```
#[must_use = "a guard that is dropped gives the lock back at once"]
pub struct RwLockWriteGuard {
    share: Share,
}

impl Drop for RwLockReadGuard {
    #[inline]
    fn drop(&mut self) {
        if fork::is_forked() {
            return;
        }
        let Share { lock, row } = &self.share;
        match lock.state().give_read(*row) {
            Some(false) => {}
            Some(true) => {
                lock.fairness().after_release();
                lock.writers.notify_one();
            }
            None => drop(lock.damaged()),
        }
    }
}

impl Drop for RwLockWriteGuard {
    #[inline]
    fn drop(&mut self) {
        if fork::is_forked() {
            return;
        }
        let Share { lock, row } = &self.share;
        lock.state().give_write(*row);
        lock.fairness().after_release();
        lock.readers.notify_all();
        // If it is damaged, the woken process finds that and wakes the others.
        lock.writers.notify_one();
    }
}

/// A read-write lock between processes: many readers at a time, or one writer.
///
/// Use instead:
/// - [`Lock`](crate::Lock) if most holders are writers, or hold it only briefly;
/// - [`Value`](crate::Value) for a value that is replaced as a whole: its readers never wait.
///
/// It protects anything that processes share, such as a file or an [`Array`](crate::Array). [`read`](RwLock::read) and
/// [`write`](RwLock::write) return guards; dropping a guard releases the lock.
///
/// ```
/// use multiprocess::{self as mp, ErrorKind, Process, RwLock};
///
/// async fn writer(lock: RwLock) -> mp::Result<()> {
///     let _guard = match lock.write().await {
///         Err(error) if error.kind() == ErrorKind::OwnerDied => error.into_guard(), // Time to repair.
///         guard => guard?,
///     };
///     Ok(()) // Alone until here.
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let lock = RwLock::new()?;
///         let guard = lock.read().await?;
///         let child = Process::spawn(writer, (lock.clone(),))?;
///         drop(guard);
///         child.await??;
///         Ok(())
///     })
/// }
/// ```
///
/// # Handles
/// A handle is cheap to clone and is a serde value. It can be an argument, a result, or part of a value in a queue or a
/// pipe. The lock exists as long as any process or message has a handle.
///
/// # Details
/// - **Waiting.** [`read`](RwLock::read) waits while a process writes or waits to write. [`write`](RwLock::write) waits
///   while any process reads or writes. Both queue from their first poll. Dropping a future that waits is safe: it has
///   taken nothing. Releasing and the `try_` methods never wait.
/// - **Fairness.** Nobody starves. New readers let a waiting writer go first, and readers that waited for a writer go
///   before the next writer. So hold one guard at a time: a task that reads twice can wait for a writer, which waits for
///   the task's first guard.
/// - **Futures that are not polled.** A `write` that has been polled keeps its place: while it is not polled, new readers and other writers wait behind it.
///   Poll it on, or drop it. A `read` delays nobody.
/// - **Death.** If a process is killed while it writes, all readers from then on and the next writer get their guard
///   inside an error of kind `OwnerDied`. The data may be half changed; that writer is expected to repair it. A process
///   killed while it reads or waits harms no other.
/// - **Stopped processes.** A process stopped by SIGSTOP still holds the lock. If it waits to write, new readers wait until
///   it continues or is killed.
/// - **Cost.** Without waiting a few atomic operations, no system call and no allocation. A lock is one descriptor and
///   8 KiB.
#[derive(Clone)]
pub struct RwLock {
    core: Arc<RwLockCore>,
}

impl RwLock {
    /// Creates an unlocked lock.
    ///
    /// # Errors
    /// `Io` if no memory or descriptor is left.
    pub fn new() -> Result<Self> {
        Ok(Self { core: object::create(|words| RwLockState::<Family>::fill(&words[STATE..READERS]))? })
    }

    /// Acquires shared access, waiting until no process writes or waits to write.
    ///
    /// Cancel safe: a dropped future has taken nothing.
    ///
    /// # Errors
    /// - `OwnerDied` if a writer was killed and none has acquired the lock since. The guard is inside the error.
    /// - `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs, such as
    ///   a descriptor. With a timeout also if the runtime has no timer.
    pub async fn read(&self) -> Result<RwLockReadGuard, LockError<RwLockReadGuard>> {
        acquire::wait(&Reading(&self.core)).await
    }

    /// Acquires exclusive access, waiting until no process reads or writes.
    ///
    /// Cancel safe: a dropped future has taken nothing, and readers that waited behind it continue.
    ///
    /// # Errors
    /// - `OwnerDied` if the last writer was killed. The guard is inside the error.
    /// - `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs, such as
    ///   a descriptor. With a timeout also if the runtime has no timer.
    pub async fn write(&self) -> Result<RwLockWriteGuard, LockError<RwLockWriteGuard>> {
        acquire::wait(&Writing(&self.core)).await
    }

    /// Attempts to acquire shared access without waiting.
    ///
    /// # Errors
    /// `WouldBlock` if a process writes or waits to write. Otherwise as [`read`](Self::read).
    pub fn try_read(&self) -> Result<RwLockReadGuard, LockError<RwLockReadGuard>> {
        acquire::attempt(&Reading(&self.core))
    }

    /// Attempts to acquire exclusive access without waiting.
    ///
    /// # Errors
    /// `WouldBlock` if a process reads or writes. Otherwise as [`write`](Self::write).
    pub fn try_write(&self) -> Result<RwLockWriteGuard, LockError<RwLockWriteGuard>> {
        acquire::attempt(&Writing(&self.core))
    }

    /// Acquires shared access, waiting at most `timeout`.
    ///
    /// Cancel safe: a dropped future has taken nothing. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use std::time::Duration;
    /// let lock = multiprocess::RwLock::new()?;
    /// let guard = lock.read_timeout(Duration::from_secs(1)).await?;
    /// drop(guard);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Timeout` if the lock was not free in time. Otherwise as [`read`](Self::read).
    pub async fn read_timeout(&self, timeout: Duration) -> Result<RwLockReadGuard, LockError<RwLockReadGuard>> {
        acquire::wait_timeout(&Reading(&self.core), timeout).await
    }

    /// Acquires exclusive access, waiting at most `timeout`.
    ///
    /// Cancel safe: a dropped future has taken nothing. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{self as mp, ErrorKind};
    /// use std::time::Duration;
    /// let lock = mp::RwLock::new()?;
    /// let _reader = lock.read().await?;
    /// let error = lock.write_timeout(Duration::from_millis(1)).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Timeout);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Timeout` if the lock was not free in time. Otherwise as [`write`](Self::write).
    pub async fn write_timeout(&self, timeout: Duration) -> Result<RwLockWriteGuard, LockError<RwLockWriteGuard>> {
        acquire::wait_timeout(&Writing(&self.core), timeout).await
    }

    /// Acquires shared access, blocking this thread until the lock is free.
    ///
    /// ```
    /// # multiprocess::init();
    /// let lock = multiprocess::RwLock::new()?;
    /// let guard = lock.blocking_read()?;
    /// drop(guard);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    #[track_caller]
    pub fn blocking_read(&self) -> Result<RwLockReadGuard, LockError<RwLockReadGuard>> {
        acquire::block(&Reading(&self.core))
    }

    /// Acquires exclusive access, blocking this thread until the lock is free.
    ///
    /// ```
    /// # multiprocess::init();
    /// let lock = multiprocess::RwLock::new()?;
    /// let guard = lock.blocking_write()?;
    /// drop(guard);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    #[track_caller]
    pub fn blocking_write(&self) -> Result<RwLockWriteGuard, LockError<RwLockWriteGuard>> {
        acquire::block(&Writing(&self.core))
    }

    /// Acquires shared access, blocking this thread for at most `timeout`.
    ///
    /// ```
    /// # multiprocess::init();
    /// use std::time::Duration;
    /// let lock = multiprocess::RwLock::new()?;
    /// let guard = lock.blocking_read_timeout(Duration::from_secs(1))?;
    /// drop(guard);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`read_timeout`](Self::read_timeout).
    #[track_caller]
    pub fn blocking_read_timeout(&self, timeout: Duration) -> Result<RwLockReadGuard, LockError<RwLockReadGuard>> {
        acquire::block_timeout(&Reading(&self.core), timeout)
    }

    /// Acquires exclusive access, blocking this thread for at most `timeout`.
    ///
    /// ```
    /// # multiprocess::init();
    /// use std::time::Duration;
    /// let lock = multiprocess::RwLock::new()?;
    /// let guard = lock.blocking_write_timeout(Duration::from_secs(1))?;
    /// drop(guard);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`write_timeout`](Self::write_timeout).
    #[track_caller]
    pub fn blocking_write_timeout(&self, timeout: Duration) -> Result<RwLockWriteGuard, LockError<RwLockWriteGuard>> {
        acquire::block_timeout(&Writing(&self.core), timeout)
    }
}

macro_rules! opaque {
    ($($name:ident)*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        }
    )*};
}

opaque!(RwLock RwLockReadGuard RwLockWriteGuard);

impl Serialize for RwLock {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        object::serialize(&*self.core, serializer)
    }
}

impl<'de> Deserialize<'de> for RwLock {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self { core: object::deserialize(deserializer)? })
    }
}
