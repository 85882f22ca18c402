//! A condition variable with its lock. Its shared words are in [`super::mutex`] and [`super::condition_state`].

use super::acquire::{self, Held};
use super::condition_state::{self, COUNT, ConditionState, LocalWaiters};
use super::mutex::{self, ByMutex, Mutex, Taken};
use super::object::{self, Core, FIRST, Report};
use crate::error::{Error, ErrorKind, LockError, Result, Topic};
use crate::os::sync::lock;
use crate::os::{fault, fork, reactor, timer};
use crate::shm::atomic::AtomicU64;
use crate::shm::family::{Family, Member};
use crate::shm::mapped::Mapped;
use crate::shm::region::Region;
use crate::wait::{Turn, WaitQueue, refuse_inside_async, until_blocking_in_turn, until_in_turn};
use std::cell::RefCell;
use std::fmt;
use std::io;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

/// A condition variable between processes, together with the lock that it releases.
///
/// Use instead:
/// - [`Event`](crate::Event) for a flag;
/// - [`Queue`](crate::Queue) to pass values on.
///
/// Use it to wait until data that the lock protects has changed. [`lock`](Condition::lock) returns a guard.
/// [`wait`](Condition::wait) takes the guard, releases the lock while it waits for a notification, and returns the guard.
/// Any number of tasks in any process may wait.
///
/// ```
/// use multiprocess::{self as mp, Condition, Process, Queue};
///
/// async fn consumer(condition: Condition, queue: Queue<u32>) -> mp::Result<u32> {
///     let guard = condition.lock().await?;
///     let _guard = condition.wait_for(guard, || !queue.is_empty()).await?;
///     queue.get().await
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let (condition, queue) = (Condition::new()?, Queue::unbounded()?);
///         let child = Process::spawn(consumer, (condition.clone(), queue.clone()))?;
///         let guard = condition.lock().await?;
///         queue.put(5).await?;
///         condition.notify_one();
///         drop(guard);
///         assert_eq!(child.await??, 5);
///         Ok(())
///     })
/// }
/// ```
///
/// # Handles
/// A handle is cheap to clone and is a serde value. It can be an argument, a result, or part of a value in a queue or a
/// pipe. The condition exists as long as any process or message has a handle.
///
/// # Details
/// - **Notifying.** [`notify_one`](Condition::notify_one) wakes exactly one waiter, if there is one: as a rule the task that has waited longest. A process
///   that has not yet used its last notification comes after the others. It needs no guard, but hold one while you change the data.
/// - **Waiting.** Dropping a future that waits leaves the lock free and no waiter behind. A notification that it had goes to
///   another waiter. A waiter that is not polled holds up later waiters of its process.
/// - **Death.** A notification of a killed waiter goes to another waiter. If a process is killed in
///   [`notify_all`](Condition::notify_all), all waiters are notified, also those that came later. If a notified process is killed, one more waiter may
///   wake. So check your condition again, as [`wait_for`](Condition::wait_for) does.
/// - **Stopped processes.** A process stopped by SIGSTOP keeps its notification until it continues.
/// - **Cost.** One descriptor and 70 KiB.
#[derive(Clone)]
pub struct Condition(Arc<ConditionCore>);

pub(super) struct ConditionCore {
    family: &'static Family,
    region: Arc<Region>,
    mutex: Mutex,
    waiting: Arc<WaitQueue>,
    local: std::sync::Mutex<LocalWaiters>,
    notifying: std::sync::Mutex<()>,
}

static MAPPED: Mapped<ConditionCore> = Mapped::new();
const STATE: usize = FIRST + mutex::LEN;

impl Core for ConditionCore {
    const KIND: u64 = 0x6d70_636f_6e64_0001;
    const NAME: &'static str = "condition";
    const WORDS: usize = STATE + condition_state::LEN;

    fn mapped() -> &'static Mapped<Self> {
        &MAPPED
    }

    fn region(&self) -> &Arc<Region> {
        &self.region
    }

    fn report(words: &[AtomicU64]) -> Report {
        let mut report = mutex::Words(&words[FIRST..FIRST + mutex::LEN]).report();
        report.waiting.extend(condition_state::sleepers(&words[STATE..STATE + condition_state::LEN]));
        report
    }

    fn view(region: Arc<Region>) -> io::Result<Self> {
        let waiting = WaitQueue::new(region.clone(), STATE + condition_state::EVENT, None)?;
        let (mutex, family) = (Mutex::view(&region, FIRST, Self::NAME)?, Family::get()?);
        let (local, notifying) = (std::sync::Mutex::default(), std::sync::Mutex::default());
        Ok(Self { family, region, mutex, waiting, local, notifying })
    }
}

impl ConditionCore {
    /// Closes it for all; waiters get an error.
    #[cold]
    fn damaged(&self) -> io::Error {
        let error = self.mutex.damaged("impossible counts of waiters");
        self.waiting.notify_all();
        error
    }

    /// Wakes come last: with no lock of ours held, for a waker may drop other futures.
    fn with_state<R>(
        &self,
        act: impl FnOnce(&ConditionState<'_, &dyn Fn(u16) -> Option<u32>, &dyn Fn(Member)>) -> R,
    ) -> R {
        let woken = RefCell::new(Vec::new());
        let result = act(&ConditionState {
            words: &self.region.words()[STATE..STATE + condition_state::LEN],
            epoch_of: &|slot| self.family.epoch_of(slot),
            wake: &|member| woken.borrow_mut().push(member),
        });
        woken.into_inner().into_iter().for_each(|member| self.waiting.notify_member(member));
        result
    }

    fn local(&self) -> MutexGuard<'_, LocalWaiters> {
        lock(&self.local)
    }

    /// Adds the caller, which holds the lock, to the waiters, and releases the lock.
    fn enter(self: &Arc<Self>, guard: ConditionGuard) -> Result<(Turn, Waiter), LockError<ConditionGuard>> {
        if !Arc::ptr_eq(self, &guard.0) {
            let error = Error::other("wait was given the guard of another condition: lock this one");
            return Err(LockError::new(error.explained_by(Topic::GuardOfAnother), Some(guard)));
        }
        // Join the queue first: a caller that enters later, holding the lock, is behind us.
        let turn = self.waiting.join();
        let entered = self.family.me().and_then(|me| {
            let full = || io::Error::other(format!("more than {COUNT} tasks of one process wait for one condition"));
            let ticket = self.with_state(|state| self.local().enter(state, me));
            ticket.map(|ticket| (me, ticket)).ok_or_else(full)
        });
        match entered {
            Ok((me, ticket)) => {
                let waiter = Waiter { core: self.clone(), me, ticket, stage: Stage::Waits };
                drop(guard);
                fault::point("condition.released");
                Ok((turn, waiter))
            }
            Err(error) => Err(LockError::new(Error::io("cannot wait for a condition", error), Some(guard))),
        }
    }
}

#[derive(PartialEq, Eq)]
enum Stage {
    Waits,
    HasTaken,
    HasLeft,
}

/// One task in its process's row, until it returns or leaves.
struct Waiter {
    core: Arc<ConditionCore>,
    me: Member,
    ticket: u64,
    stage: Stage,
}

impl Waiter {
    fn attempt(&mut self) -> Option<io::Result<()>> {
        // Also the notifications of the dead: their recovery is what made us try.
        self.core.with_state(|state| state.heal(self.me));
        let taken = self.core.with_state(|state| {
            let mut local = self.core.local();
            local.is_sound(state, self.me).then(|| local.take(state, self.me, self.ticket))
        });
        match taken {
            Some(true) => {
                self.stage = Stage::HasTaken;
                Some(Ok(()))
            }
            Some(false) => self.core.mutex.check().err().map(Err),
            None => Some(Err(self.core.damaged())),
        }
    }

    fn finish(mut self) {
        self.core.with_state(|state| self.core.local().finish(state, self.me));
        self.stage = Stage::HasLeft;
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if self.stage != Stage::HasLeft && !fork::is_forked() {
            let has_taken = self.stage == Stage::HasTaken;
            self.core.with_state(|state| self.core.local().leave(state, self.me, self.ticket, has_taken));
        }
    }
}

impl ByMutex for Condition {
    const NAME: &'static str = ConditionCore::NAME;
    type Guard = ConditionGuard;

    fn mutex(&self) -> &Mutex {
        &self.0.mutex
    }

    fn guard(&self, taken: Taken) -> io::Result<Held<ConditionGuard>> {
        Ok(Held { guard: ConditionGuard(self.0.clone()), owner_died: taken == Taken::OwnerDied })
    }
}

impl Condition {
    /// Creates a condition whose lock is free.
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
    pub async fn lock(&self) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        acquire::wait(self).await
    }

    /// Attempts to acquire the lock without waiting.
    ///
    /// # Errors
    /// `WouldBlock` if the lock is held, or is reserved for a task that has waited long. Otherwise as
    /// [`lock`](Self::lock).
    pub fn try_lock(&self) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        acquire::attempt(self)
    }

    /// Acquires the lock, waiting at most `timeout`.
    ///
    /// Cancel safe: a dropped future has not acquired the lock. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// # Errors
    /// `Timeout` if the lock was not released in time. Otherwise as [`lock`](Self::lock).
    pub async fn lock_timeout(&self, timeout: Duration) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        acquire::wait_timeout(self, timeout).await
    }

    /// Acquires the lock, blocking this thread until it is free.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`lock`](Self::lock).
    #[track_caller]
    pub fn blocking_lock(&self) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        acquire::block(self)
    }

    /// Acquires the lock, blocking this thread for at most `timeout`.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`lock_timeout`](Self::lock_timeout).
    #[track_caller]
    pub fn blocking_lock_timeout(&self, timeout: Duration) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        acquire::block_timeout(self, timeout)
    }

    /// Releases the lock, waits for a notification, and acquires the lock again.
    ///
    /// It counts as a waiter from its first poll, before it releases the lock. A dropped future no longer waits and does
    /// not hold the lock. A notification that it had goes to another waiter.
    ///
    /// # Errors
    /// - `OwnerDied` if the last holder of the lock died, whether it was notified or not. The guard is inside the error.
    /// - `Other` if `guard` belongs to another condition. It is inside the error.
    /// - `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs, such as
    ///   a descriptor. With a timeout also if the runtime has no timer.
    pub async fn wait(&self, guard: ConditionGuard) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        let (turn, mut waiter) = self.0.enter(guard)?;
        let noticed = until_in_turn(&self.0.waiting, Some(turn), |_| waiter.attempt()).await;
        self.back(noticed.and_then(|noticed| noticed).map(Some), waiter).await
    }

    /// Waits as [`wait`](Self::wait), but at most `timeout` for the notification.
    ///
    /// It then acquires the lock in any case, however long that takes. The timeout is real time: see
    /// [Timeouts](crate#timeouts). A dropped future behaves as with [`wait`](Self::wait).
    ///
    /// # Errors
    /// `Timeout` if no notification came. The guard is inside the error. Otherwise as [`wait`](Self::wait).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{Condition, ErrorKind};
    /// let condition = Condition::new()?;
    /// let guard = condition.lock().await?;
    /// let error = condition.wait_timeout(guard, std::time::Duration::from_millis(1)).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Timeout);
    /// let _guard = error.into_guard();
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub async fn wait_timeout(
        &self,
        guard: ConditionGuard,
        timeout: Duration,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        if let Err(error) = reactor::has_timer() {
            return Err(LockError::new(Error::io("cannot wait for a condition", error), Some(guard)));
        }
        let (turn, mut waiter) = self.0.enter(guard)?;
        let waited = until_in_turn(&self.0.waiting, Some(turn), |_| waiter.attempt());
        let noticed = timer::within(timeout, waited).await;
        let noticed = noticed.map_or(Ok(None), |noticed| noticed.and_then(|noticed| noticed).map(Some));
        self.back(noticed, waiter).await
    }

    /// The second half of a wait.
    async fn back(
        &self,
        noticed: io::Result<Option<()>>,
        waiter: Waiter,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        let waiter = match &noticed {
            Ok(Some(())) => Some(waiter),
            _ => None, // It waits no more, also not while it waits for the lock.
        };
        let taken = self.0.mutex.take().await.map(Some);
        self.returned(noticed, waiter, taken)
    }

    fn returned(
        &self,
        noticed: io::Result<Option<()>>,
        waiter: Option<Waiter>,
        taken: io::Result<Option<Taken>>,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        if let (Some(waiter), Ok(Some(_))) = (waiter, &taken) {
            waiter.finish();
        }
        let guard = acquire::finish(self, taken, ErrorKind::Timeout)?;
        match noticed {
            Ok(Some(())) => Ok(guard),
            Ok(None) => Err(LockError::new(
                Error::new(ErrorKind::Timeout, "the condition was not notified in time"),
                Some(guard),
            )),
            Err(error) => Err(LockError::new(Error::io("cannot wait for a condition", error), Some(guard))),
        }
    }

    /// Waits as [`wait`](Self::wait), but blocks this thread.
    ///
    /// ```
    /// # multiprocess::init();
    /// let condition = multiprocess::Condition::new()?;
    /// let guard = condition.blocking_lock()?;
    /// let other = condition.clone();
    /// let notifier = std::thread::spawn(move || {
    ///     let guard = other.blocking_lock().unwrap(); // once the waiter has released it
    ///     other.notify(1);
    ///     drop(guard);
    /// });
    /// let guard = condition.blocking_wait(guard)?;
    /// drop(guard);
    /// notifier.join().unwrap();
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    #[track_caller]
    pub fn blocking_wait(&self, guard: ConditionGuard) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        self.block(guard, None)
    }

    /// Waits as [`wait_timeout`](Self::wait_timeout), but blocks this thread.
    ///
    /// ```
    /// # multiprocess::init();
    /// use multiprocess::{Condition, ErrorKind};
    /// use std::time::Duration;
    /// let condition = Condition::new()?;
    /// let guard = condition.blocking_lock()?;
    /// let error = condition.blocking_wait_timeout(guard, Duration::from_millis(1)).unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Timeout);
    /// let guard = error.into_guard(); // the lock is held again
    /// drop(guard);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`wait_timeout`](Self::wait_timeout).
    #[track_caller]
    pub fn blocking_wait_timeout(
        &self,
        guard: ConditionGuard,
        timeout: Duration,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        self.block(guard, Instant::now().checked_add(timeout))
    }

    #[track_caller]
    fn block(
        &self,
        guard: ConditionGuard,
        deadline: Option<Instant>,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        refuse_inside_async();
        let (turn, mut waiter) = self.0.enter(guard)?;
        let noticed = until_blocking_in_turn(&self.0.waiting, Some(turn), deadline, |_| waiter.attempt());
        let noticed = noticed.and_then(Option::transpose);
        let waiter = matches!(noticed, Ok(Some(()))).then_some(waiter);
        self.returned(noticed, waiter, self.0.mutex.take_blocking(None))
    }

    /// Waits until `is_so` returns true.
    ///
    /// It calls `is_so` with the lock held: at once, and after each notification. A dropped future leaves the lock free and
    /// no waiter behind.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub async fn wait_for(
        &self,
        mut guard: ConditionGuard,
        mut is_so: impl FnMut() -> bool,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        while !is_so() {
            guard = self.wait(guard).await?;
        }
        Ok(guard)
    }

    /// Waits until `is_so` returns true, for at most `timeout`.
    ///
    /// It calls `is_so` once more after the timeout. The timeout is real time: see [Timeouts](crate#timeouts). A dropped
    /// future leaves the lock free and no waiter behind.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{self as mp, ErrorKind};
    /// use std::time::Duration;
    /// let condition = mp::Condition::new()?;
    /// let guard = condition.lock().await?;
    /// let error = condition.wait_for_timeout(guard, || false, Duration::from_millis(1)).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Timeout);
    /// assert!(error.has_guard());
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Timeout` if `is_so` still returns false. The guard is inside the error. Otherwise as [`wait`](Self::wait).
    pub async fn wait_for_timeout(
        &self,
        mut guard: ConditionGuard,
        mut is_so: impl FnMut() -> bool,
        timeout: Duration,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        let start = Instant::now();
        while !is_so() {
            guard = match self.wait_timeout(guard, timeout.saturating_sub(start.elapsed())).await {
                Err(error) if error.kind() == ErrorKind::Timeout && is_so() => error.into_guard(),
                waited => waited?,
            };
        }
        Ok(guard)
    }

    /// Waits as [`wait_for`](Self::wait_for), but blocks this thread.
    ///
    /// ```
    /// # multiprocess::init();
    /// let condition = multiprocess::Condition::new()?;
    /// let guard = condition.blocking_lock()?;
    /// let guard = condition.blocking_wait_for(guard, || true)?;
    /// drop(guard);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    #[track_caller]
    pub fn blocking_wait_for(
        &self,
        mut guard: ConditionGuard,
        mut is_so: impl FnMut() -> bool,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        while !is_so() {
            guard = self.blocking_wait(guard)?;
        }
        Ok(guard)
    }

    /// Returns the number of waiting tasks in all living processes.
    ///
    /// A notified task counts until it has the lock again.
    pub fn waiting(&self) -> usize {
        self.0.with_state(|state| state.waiting()) as usize
    }

    /// Wakes one waiter, if there is one. Never waits.
    ///
    /// # Panics
    /// In a process that was forked from one that had used the crate.
    pub fn notify_one(&self) {
        self.notify(1);
    }

    /// Wakes `count` waiters, or all if there are fewer. Never waits.
    ///
    /// # Panics
    /// In a process that was forked from one that had used the crate.
    pub fn notify(&self, count: usize) {
        fork::refuse("notify a condition");
        // If this process is killed halfway, others repair it, but only if it has a slot.
        let _ = self.0.family.me();
        self.0.with_state(|state| state.notify(count));
    }

    /// Wakes all waiters. Never waits.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let condition = multiprocess::Condition::new()?;
    /// let guard = condition.lock().await?;
    /// let notify = async {
    ///     let guard = condition.lock().await?; // once the waiter has released it
    ///     condition.notify_all();
    ///     drop(guard);
    ///     Ok::<_, multiprocess::Error>(())
    /// };
    /// let wait = async { Ok::<_, multiprocess::Error>(condition.wait(guard).await?) };
    /// let (guard, ()) = tokio::try_join!(wait, notify)?;
    /// drop(guard);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Panics
    /// In a process that was forked from one that had used the crate.
    pub fn notify_all(&self) {
        fork::refuse("notify a condition");
        self.0.with_state(|state| {
            let _one = lock(&self.0.notifying);
            state.notify_all(self.0.family.me().ok());
        });
    }
}

impl fmt::Debug for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_held = self.0.mutex.is_held();
        f.debug_struct("Condition").field("is_held", &is_held).field("waiting", &self.waiting()).finish()
    }
}

object::travels!(Condition, 0);

/// A guard of the lock of a [`Condition`], which dropping it or passing it to [`Condition::wait`] releases.
///
/// ```
/// # multiprocess::init();
/// let condition = multiprocess::Condition::new()?;
/// let guard = condition.try_lock()?;
/// assert!(condition.try_lock().is_err());
/// drop(guard);
/// assert!(condition.try_lock().is_ok());
/// # Ok::<(), multiprocess::Error>(())
/// ```
#[must_use = "a guard that is dropped at once protects nothing"]
pub struct ConditionGuard(Arc<ConditionCore>);

impl Drop for ConditionGuard {
    fn drop(&mut self) {
        self.0.mutex.release();
    }
}

impl fmt::Debug for ConditionGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConditionGuard").finish_non_exhaustive()
    }
}
