//! A counting semaphore.
//!
//! # State
//! [`LIMIT`]: one more than the greatest number of permits, or 0 if there is no limit but that of the count. The word of
//! [`Fairness`], the table of [`Holders`], and the list of sleeping processes.
//!
//! # Moves
//! | move | then |
//! |---|---|
//! | a permit taken (`holders`) | - |
//! | a permit given back or added (`holders`) | newcomers pause if a long wait was reported; the longest sleeper is notified |
//! | a permit forgotten (`holders`) | - |
//!
//! # Invariants
//! 1. A permit that becomes free notifies one waiter. The permits of the dead are found by all waiters, after the recovery.
//! 2. A bounded semaphore never has more permits, free and held and forgotten, than it was created with.
//!
//! # Death
//! | killed | survivors see |
//! |---|---|
//! | holding permits | they are free again after its recovery; no error, for a permit guards no data |
//! | at any move of the table | see `holders` |
//! | waiting, or with its notification | see `wait::sleepers`: the next is notified |
//!
//! # Cancel
//! A dropped acquire has taken nothing: there is no await point after the take.

use super::acquire::{self, Acquire, Held};
use super::fairness::{Acquirer, Fairness};
use super::holders::{self, Holders, MAX};
use super::object::{self, Core, FIRST, Report};
use crate::error::{Damage, Error, ErrorKind, LockError, Result};
use crate::os::fork;
use crate::shm::atomic::AtomicU64;
use crate::shm::family::Family;
use crate::shm::mapped::Mapped;
use crate::shm::region::Region;
use crate::wait::sleepers::{self, Sleepers};
use crate::wait::{WaitQueue, until, until_blocking};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::*};
use std::time::{Duration, Instant};

const LIMIT: usize = FIRST;
const FAIRNESS: usize = LIMIT + 1;
const HOLDERS: usize = FAIRNESS + 1;
const SLEEPERS: usize = HOLDERS + holders::LEN;

/// A semaphore as this process sees it.
pub(super) struct SemaphoreCore {
    region: Arc<Region>,
    queue: Arc<WaitQueue>,
    family: &'static Family,
    /// The limit of `LIMIT`, which never changes.
    limit: Option<u32>,
    /// The row of this process in the table.
    mine: AtomicUsize,
}

static MAPPED: Mapped<SemaphoreCore> = Mapped::new();

impl Core for SemaphoreCore {
    const KIND: u64 = u64::from_le_bytes(*b"mpsema01");
    const NAME: &'static str = "semaphore";
    const WORDS: usize = SLEEPERS + sleepers::LEN;

    fn mapped() -> &'static Mapped<Self> {
        &MAPPED
    }

    fn region(&self) -> &Arc<Region> {
        &self.region
    }

    fn report(words: &[AtomicU64]) -> Report {
        let shares = Holders::<Family>::list(&words[HOLDERS..SLEEPERS]);
        Report {
            shares,
            waiting: Sleepers::new(&words[SLEEPERS..SLEEPERS + sleepers::LEN]).list(),
            ..Report::default()
        }
    }

    fn view(region: Arc<Region>) -> io::Result<Self> {
        let queue = WaitQueue::new(region.clone(), SLEEPERS, None)?;
        let limit = match region.words()[LIMIT].load(Acquire).checked_sub(1).map(u32::try_from) {
            None => None,
            Some(Ok(limit @ 0..=MAX)) => Some(limit),
            Some(_) => return Err(Damage::error(Self::NAME, region.identity(), "an impossible limit")),
        };
        Ok(Self { region, queue, family: Family::get()?, limit, mine: AtomicUsize::new(usize::MAX) })
    }
}

impl SemaphoreCore {
    fn create(permits: usize, is_bounded: bool) -> Result<Arc<Self>> {
        let Ok(permits @ 0..=MAX) = u32::try_from(permits) else {
            return Err(Error::other(format!("{permits} permits are more than a semaphore can count, {MAX}")));
        };
        object::create(|words| {
            words[LIMIT].store(if is_bounded { u64::from(permits) + 1 } else { 0 }, Release);
            Holders::<Family>::fill(&words[HOLDERS..SLEEPERS], permits);
        })
    }

    fn words(&self) -> &[AtomicU64] {
        self.region.words()
    }

    #[inline]
    fn holders(&self) -> Holders<'_, Family> {
        Holders::new(&self.words()[HOLDERS..SLEEPERS], self.family)
    }

    fn fairness(&self) -> Fairness<'_> {
        Fairness(&self.words()[FAIRNESS])
    }

    fn limit(&self) -> Option<u32> {
        self.limit
    }

    #[inline]
    fn take_permit(self: &Arc<Self>) -> io::Result<Option<Permit>> {
        match self.holders().take_one(self.family.me()?, &self.mine) {
            Some(taken) => Ok(Some(Permit { core: self.clone(), row: Some(taken.row) })),
            None if self.holders().is_damaged() => Err(self.damaged()),
            None => Ok(None),
        }
    }

    #[cold]
    fn damaged(&self) -> io::Error {
        if self.holders().is_first_report() {
            self.queue.notify_all();
        }
        Damage::error(Self::NAME, self.region.identity(), "impossible counts, or damage found before")
    }

    /// [`Self::take_permit`] for a caller that waits if there is none.
    fn attempt(self: &Arc<Self>) -> impl FnMut() -> Option<io::Result<Permit>> + '_ {
        let mut acquirer = Acquirer::default();
        move || {
            let taken = self.take_permit().transpose();
            acquirer.looked(&self.fairness(), taken.is_some());
            taken
        }
    }

    fn release(&self) -> Result<()> {
        self.family.me().map_err(|error| Error::io("cannot release a semaphore", error))?;
        if !self.holders().add_one(self.limit().unwrap_or(MAX)) {
            if self.holders().is_damaged() {
                return Err(Error::io("cannot release a semaphore", self.damaged()));
            }
            return Err(Error::other(match self.limit() {
                Some(limit) => format!("the bounded semaphore has all its {limit} permits: none is missing to release"),
                None => format!("the semaphore has {MAX} permits and cannot count more"),
            }));
        }
        self.tell();
        Ok(())
    }

    /// After a permit has become free.
    #[inline]
    fn tell(&self) {
        self.fairness().after_release();
        self.queue.notify_one();
    }
}

impl Acquire for Arc<SemaphoreCore> {
    type Taken = Permit;
    type Guard = Permit;

    fn try_take(&self) -> io::Result<Option<Permit>> {
        self.take_permit()
    }

    async fn take(&self) -> io::Result<Permit> {
        self.fairness().yield_to_sleepers(|| self.queue.has_waiters()).await;
        until(&self.queue, self.attempt()).await?
    }

    #[track_caller]
    fn take_blocking(&self, deadline: Option<Instant>) -> io::Result<Option<Permit>> {
        self.fairness().blocking_yield_to_sleepers(|| self.queue.has_waiters());
        until_blocking(&self.queue, deadline, self.attempt())?.transpose()
    }

    #[inline]
    fn guard(&self, permit: Permit) -> io::Result<Held<Permit>> {
        Ok(Held { guard: permit, owner_died: false })
    }

    #[cold]
    fn message(kind: ErrorKind) -> String {
        match kind {
            ErrorKind::WouldBlock => "no permit of the semaphore is free",
            ErrorKind::Timeout => "no permit of the semaphore became free in time",
            _ => "cannot acquire a semaphore",
        }
        .to_string()
    }
}

/// A permit of a [`Semaphore`] or [`BoundedSemaphore`], which dropping it returns.
///
/// It may be held across `.await` and moved to other threads. Dropping it never waits. If its process is killed, the
/// permit is free again within milliseconds.
///
/// ```
/// # multiprocess::init();
/// let semaphore = multiprocess::Semaphore::new(1)?;
/// let permit = semaphore.try_acquire()?;
/// assert_eq!(semaphore.available(), 0);
/// drop(permit);
/// assert_eq!(semaphore.available(), 1);
/// # Ok::<(), multiprocess::Error>(())
/// ```
#[must_use = "a permit that is dropped is given back at once"]
pub struct Permit {
    core: Arc<SemaphoreCore>,
    /// The row that holds it, unless it is forgotten.
    row: Option<usize>,
}

impl Permit {
    /// Drops the permit without returning it to the semaphore.
    ///
    /// It does not come back when this process dies. A `release`, in any process, adds one in its place.
    ///
    /// ```
    /// # multiprocess::init();
    /// let semaphore = multiprocess::BoundedSemaphore::new(1)?;
    /// semaphore.try_acquire()?.forget();
    /// assert_eq!(semaphore.available(), 0);
    /// semaphore.release()?;
    /// assert_eq!(semaphore.available(), 1);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn forget(mut self) {
        if let Some(row) = self.row.take() {
            self.core.holders().forget_one(row);
        }
    }
}

impl Drop for Permit {
    #[inline]
    fn drop(&mut self) {
        if let Some(row) = self.row.filter(|_| !fork::is_forked()) {
            match self.core.holders().give_one(row) {
                Some(_) => self.core.tell(),
                None => drop(self.core.damaged()),
            }
        }
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit").finish_non_exhaustive()
    }
}

/// A counting semaphore between processes: it admits as many holders at a time as it has permits.
///
/// Use instead:
/// - [`Lock`](crate::Lock) for one holder at a time: its next holder gets `OwnerDied` if the last one was killed;
/// - [`BoundedSemaphore`] if permits are released by hand: it fails when one too many is released;
/// - the number of [workers](crate::PoolBuilder::workers) to limit the tasks of a pool.
///
/// Use it to bound how many processes do something at once, such as downloads or builds. [`acquire`](Semaphore::acquire)
/// returns a [`Permit`]; dropping the permit returns it.
///
/// ```
/// use multiprocess::{self as mp, Process, Semaphore};
///
/// async fn work(semaphore: Semaphore) -> mp::Result<()> {
///     let _permit = semaphore.acquire().await?; // At most two of us are here.
///     Ok(())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let semaphore = Semaphore::new(2)?;
///         let children: mp::Result<Vec<_>> =
///             (0..4).map(|_| Process::spawn(work, (semaphore.clone(),))).collect();
///         for child in children? {
///             child.await??;
///         }
///         assert_eq!(semaphore.available(), 2);
///         Ok(())
///     })
/// }
/// ```
///
/// # Handles
/// A handle is cheap to clone and is a serde value. It can be an argument, a result, or part of a value in a queue or a
/// pipe. The semaphore exists as long as any process or message has a handle.
///
/// # Details
/// - **Waiting.** [`acquire`](Semaphore::acquire) queues from its first poll. Running tasks may overtake sleeping ones, but
///   a task that has waited for a millisecond is not overtaken for long. Dropping a future that waits is safe: it has
///   taken nothing. Returning a permit, [`release`](Semaphore::release) and the `try_` methods never wait, not even for a
///   process stopped in the middle of one.
/// - **Futures that are not polled.** A future that has been polled keeps its place, and later waiters of this process wait behind it. Poll it on, or drop
///   it.
/// - **Death.** The permits of a killed process are free again within milliseconds, and waiters are woken. There is no
///   `OwnerDied`: a permit guards no data.
/// - **Stopped processes.** A process stopped by SIGSTOP keeps its permits and the wake that it was given. The next permit
///   goes to another.
/// - **Cost.** Without waiting a few atomic operations, no system call and no allocation. A semaphore is one descriptor and
///   8 KiB.
/// - **Limits.** 2^31 - 1 permits. If more than 440 living processes have held one, permits of those beyond do not come
///   back when they die.
#[derive(Clone)]
pub struct Semaphore {
    core: Arc<SemaphoreCore>,
}

/// A [`Semaphore`] that never has more permits than it was created with.
///
/// Dropping a [`Permit`] returns it. [`release`](BoundedSemaphore::release) replaces a permit that was
/// [forgotten](Permit::forget); it fails if none is missing. Otherwise this is a [`Semaphore`]: use that one if `release` is never called by hand,
/// or if permits may be added.
///
/// ```
/// # multiprocess::init();
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let semaphore = multiprocess::BoundedSemaphore::new(1)?;
/// let permit = semaphore.acquire().await?;
/// drop(permit);
/// assert!(semaphore.release().is_err());
/// # Ok::<_, multiprocess::Error>(()) }).unwrap();
/// ```
#[derive(Clone)]
pub struct BoundedSemaphore {
    core: Arc<SemaphoreCore>,
}

macro_rules! semaphore {
    ($name:ident, $is_bounded:literal) => {
        impl $name {
            /// Creates a semaphore with `permits` free permits, which may be 0.
            ///
            /// # Errors
            /// - `Other` for more than 2^31 - 1 permits.
            /// - `Io` if no memory or descriptor is left.
            pub fn new(permits: usize) -> Result<Self> {
                Ok(Self { core: SemaphoreCore::create(permits, $is_bounded)? })
            }

            /// Acquires a permit, waiting until one is free.
            ///
            /// Cancel safe: a dropped future has taken nothing.
            ///
            /// # Errors
            /// `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs,
            /// such as a descriptor. With a timeout also if the runtime has no timer.
            pub async fn acquire(&self) -> Result<Permit, LockError<Permit>> {
                acquire::wait(&self.core).await
            }

            /// Attempts to acquire a permit without waiting.
            ///
            /// # Errors
            /// `WouldBlock` if no permit is free.
            pub fn try_acquire(&self) -> Result<Permit, LockError<Permit>> {
                acquire::attempt(&self.core)
            }

            /// Acquires a permit, waiting at most `timeout`.
            ///
            /// Cancel safe: a dropped future has taken nothing. The timeout is real time: see
            /// [Timeouts](crate#timeouts).
            ///
            /// ```
            /// # multiprocess::init();
            /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
            /// use multiprocess::{self as mp, ErrorKind};
            /// use std::time::Duration;
            /// let semaphore = mp::Semaphore::new(1)?;
            /// let _permit = semaphore.acquire_timeout(Duration::from_secs(1)).await?;
            /// let error = semaphore.acquire_timeout(Duration::from_millis(1)).await.unwrap_err();
            /// assert_eq!(error.kind(), ErrorKind::Timeout);
            /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
            /// ```
            ///
            /// # Errors
            /// `Timeout` if no permit became free in time. Otherwise as [`acquire`](Self::acquire).
            pub async fn acquire_timeout(&self, timeout: Duration) -> Result<Permit, LockError<Permit>> {
                acquire::wait_timeout(&self.core, timeout).await
            }

            /// Acquires a permit, blocking this thread until one is free.
            ///
            /// # Panics
            /// Inside async code, as tokio's blocking calls do.
            ///
            /// # Errors
            /// As [`acquire`](Self::acquire).
            #[track_caller]
            pub fn blocking_acquire(&self) -> Result<Permit, LockError<Permit>> {
                acquire::block(&self.core)
            }

            /// Acquires a permit, blocking this thread for at most `timeout`.
            ///
            /// ```
            /// # multiprocess::init();
            /// use multiprocess::{ErrorKind, Semaphore};
            /// use std::time::Duration;
            /// let semaphore = Semaphore::new(1)?;
            /// let _permit = semaphore.blocking_acquire_timeout(Duration::from_secs(5))?;
            /// let error = semaphore.blocking_acquire_timeout(Duration::from_millis(1)).unwrap_err();
            /// assert_eq!(error.kind(), ErrorKind::Timeout);
            /// # Ok::<(), multiprocess::Error>(())
            /// ```
            ///
            /// # Panics
            /// Inside async code, as tokio's blocking calls do.
            ///
            /// # Errors
            /// As [`acquire_timeout`](Self::acquire_timeout).
            #[track_caller]
            pub fn blocking_acquire_timeout(&self, timeout: Duration) -> Result<Permit, LockError<Permit>> {
                acquire::block_timeout(&self.core, timeout)
            }

            /// Adds a permit and wakes one waiter.
            ///
            /// Any process may call it, also one that holds no permit. It never waits.
            ///
            /// # Errors
            /// `Other` if there are as many permits as there can be, free or held. Nothing has changed then.
            pub fn release(&self) -> Result<()> {
                self.core.release()
            }

            /// Returns the number of free permits, including those that killed processes held.
            ///
            /// It is a snapshot: other processes may have changed it when you read it.
            pub fn available(&self) -> usize {
                self.core.holders().free() as usize
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut debug = f.debug_struct(stringify!($name));
                debug.field("available", &self.available());
                self.core.limit().iter().for_each(|limit| {
                    debug.field("limit", limit);
                });
                debug.finish_non_exhaustive()
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                object::serialize(&*self.core, serializer)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let core: Arc<SemaphoreCore> = object::deserialize(deserializer)?;
                match core.limit().is_some() {
                    $is_bounded => Ok(Self { core }),
                    _ => Err(D::Error::custom("a semaphore of another kind")),
                }
            }
        }
    };
}

semaphore!(Semaphore, false);
semaphore!(BoundedSemaphore, true);

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    #[tokio::test]
    async fn free_permit_is_taken_at_the_deadline_by_a_newcomer_that_let_sleepers_go_first() {
        let semaphore = Semaphore::new(1).unwrap();
        let fairness = semaphore.core.fairness();
        let mut acquirer = Acquirer::default();
        acquirer.looked(&fairness, false);
        std::thread::sleep(Duration::from_millis(2));
        acquirer.looked(&fairness, false);
        // Somebody has waited for long, so newcomers pause for a moment.
        fairness.after_release();
        drop(semaphore.acquire_timeout(Duration::ZERO).await.unwrap());
    }
}
