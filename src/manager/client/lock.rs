//! Locks, semaphores and conditions in a manager, for programs that share no memory.

use crate::error::{Error, ErrorKind, LockError, Result, Topic};
use crate::manager::client::proxy::{Proxy, calls, proxies, shows};
use crate::manager::client::waits::{Asked, in_time};
use crate::manager::wire::messages::Writer;
use crate::manager::wire::waiting::{End, Ticket, Try, Waits, too_late};
use std::collections::{HashMap, VecDeque};
use std::task::Poll;
use std::time::Duration;

proxies!(LockProxy SemaphoreProxy ConditionProxy);

/// The permits of a semaphore in the manager, or a lock: one permit, whose next holder learns if the last one was lost.
pub(crate) struct Permits<const IS_LOCK: bool> {
    available: usize,
    /// The holders, and whether each has got `OwnerDied`.
    held: HashMap<Ticket, bool>,
    /// The last holder of the lock was lost with it.
    is_orphaned: bool,
}

pub(crate) type LockObject = Permits<true>;
pub(crate) type SemaphoreObject = Permits<false>;

impl Default for LockObject {
    fn default() -> Self {
        Self::new(1)
    }
}

impl<const IS_LOCK: bool> Permits<IS_LOCK> {
    pub(crate) fn new(available: usize) -> Self {
        Self { available, held: HashMap::new(), is_orphaned: false }
    }

    /// True if the last holder of the lock was lost.
    fn take(&mut self, ticket: Ticket) -> Option<bool> {
        self.available = self.available.checked_sub(1)?;
        let was_orphaned = std::mem::take(&mut self.is_orphaned);
        self.held.insert(ticket, was_orphaned);
        Some(was_orphaned)
    }

    fn acquire(&mut self, may_wait: &mut Option<(bool,)>, now: Try, answer: &mut Writer) -> Poll<Result<()>> {
        let why = if IS_LOCK { "the lock is held" } else { "there is no permit" };
        match (self.take(now.ticket), *may_wait) {
            (Some(is_orphaned), _) => Poll::Ready(answer.lend_part(&is_orphaned)),
            (None, Some((false,))) => Poll::Ready(Err(Error::new(ErrorKind::WouldBlock, why))),
            (None, _) => Poll::Pending,
        }
    }
}

impl<const IS_LOCK: bool> Waits for Permits<IS_LOCK> {
    fn settle(&mut self, ticket: Ticket, end: End) {
        if let Some(was_orphaned) = self.held.remove(&ticket)
            && (IS_LOCK || end != End::Took)
        {
            self.available = self.available.saturating_add(1);
            // A holder that has not read the answer has not learned of the loss.
            self.is_orphaned = IS_LOCK && (end == End::Lost || end == End::Unread && was_orphaned);
        }
    }
}

/// A lock or a permit of a manager that this process holds. Dropping it releases it.
///
/// If the connection to the manager is lost, the manager releases it too. See [`LockProxy`] and
/// [`SemaphoreProxy`](crate::manager::SemaphoreProxy) for examples.
#[must_use = "a grant that is dropped at once protects nothing"]
pub struct Grant(pub(crate) Asked);

impl Grant {
    /// Keeps the permit of a semaphore for good: nothing releases it. A lock is released all the same, without
    /// [`OwnerDied`](ErrorKind::OwnerDied).
    pub fn forget(self) {
        self.0.take();
    }
}

shows!(Grant(grant) { request: grant.0.id() });

fn granted(answer: Result<(bool, Asked)>) -> Result<Grant, LockError<Grant>> {
    let (is_orphaned, asked) = answer.map_err(|error| LockError::new(error, None))?;
    if !is_orphaned {
        return Ok(Grant(asked));
    }
    let why = "the last holder of the lock was killed or disconnected: what the lock protects may be half changed";
    let error = Error::new(ErrorKind::OwnerDied, why).explained_by(Topic::OwnerDied);
    Err(LockError::new(error, Some(Grant(asked))))
}

/// A handle of a mutual exclusion lock that lives in a manager's process.
///
/// Created by [`Manager::lock`](crate::Manager::lock). It is for programs that share no memory, such as those on several
/// hosts; among processes of one program, [`Lock`](crate::Lock) is faster.
///
/// ```
/// use multiprocess::{self as mp, Manager};
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::start().await?;
///         let lock = manager.lock().await?;
///         let held = lock.acquire().await?;
///         assert_eq!(lock.try_acquire().await.unwrap_err().kind(), mp::ErrorKind::WouldBlock);
///         drop(held);
///         let _again = lock.acquire().await?;
///         manager.shutdown().await
///     })
/// }
/// ```
///
/// # Details
/// - **Waiting.** First come, first served. A call that waits holds no thread of the manager.
/// - **Dropped futures.** A dropped method that acquires has not acquired the lock. One that is not polled any more may hold it.
/// - **Death.** If the holder is killed or disconnected, the lock is free at once. The next holder gets
///   [`OwnerDied`](ErrorKind::OwnerDied), with the grant inside the error.
/// - **Disconnection.** A holder on another host may notice only at its next call that it is disconnected, while another holds the lock
///   already. Do what the lock protects through the manager itself where that matters.
/// - **Cost.** One call to acquire the lock, and one message to release it.
pub struct LockProxy(pub(crate) Proxy<LockObject>);

impl LockProxy {
    /// Acquires the lock, and waits while another caller holds it.
    ///
    /// Cancel safe: a dropped future has not acquired the lock.
    ///
    /// # Errors
    /// `OwnerDied` if the previous holder was killed or disconnected: the lock is acquired, and the grant is inside the error. Else as
    /// [`Proxy::call`].
    pub async fn acquire(&self) -> Result<Grant, LockError<Grant>> {
        granted(self.0.wait(None, LockObject::acquire, (true,)).await)
    }

    /// Acquires the lock if it is free.
    ///
    /// # Errors
    /// `WouldBlock` if another caller holds it; else as [`acquire`](Self::acquire).
    pub async fn try_acquire(&self) -> Result<Grant, LockError<Grant>> {
        granted(self.0.wait(None, LockObject::acquire, (false,)).await)
    }

    /// Acquires the lock as [`acquire`](Self::acquire), but gives up after `timeout`. The timeout is real time: see
    /// [Timeouts](crate#timeouts). Cancel safe: a dropped future has not acquired the lock.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{ErrorKind, Manager};
    /// use std::time::Duration;
    /// let manager = Manager::start().await?;
    /// let lock = manager.lock().await?;
    /// let _held = lock.acquire_timeout(Duration::from_secs(5)).await?;
    /// let error = lock.acquire_timeout(Duration::from_millis(1)).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Timeout);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Timeout` if the lock was not free in time; else as [`acquire`](Self::acquire).
    pub async fn acquire_timeout(&self, timeout: Duration) -> Result<Grant, LockError<Grant>> {
        let waiting = self.0.wait(None, LockObject::acquire, (true,));
        granted(in_time(timeout, waiting, "the lock was not free").await)
    }
}

/// A handle of a counting semaphore that lives in a manager's process.
///
/// Created by [`Manager::semaphore`](crate::Manager::semaphore). It is for programs that share no memory, such as those on
/// several hosts; among processes of one program, [`Semaphore`](crate::Semaphore) is faster.
///
/// ```
/// use multiprocess::{self as mp, Manager};
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::start().await?;
///         let seats = manager.semaphore(2).await?;
///         let (_one, two) = (seats.acquire().await?, seats.acquire().await?);
///         assert_eq!(seats.try_acquire().await.unwrap_err().kind(), mp::ErrorKind::WouldBlock);
///         drop(two);
///         assert_eq!(seats.available().await?, 1);
///         manager.shutdown().await
///     })
/// }
/// ```
///
/// # Details
/// - **Waiting.** First come, first served. A call that waits holds no thread of the manager.
/// - **Dropped futures.** A dropped method that acquires has acquired no permit, and none is lost. For the others see [`Proxy`].
/// - **Death.** The permits of a process that is killed or disconnected are available again at once.
/// - **Cost.** One call to acquire a permit, and one message to release it.
pub struct SemaphoreProxy(pub(crate) Proxy<SemaphoreObject>);

impl SemaphoreProxy {
    /// Acquires a permit, and waits while there is none.
    ///
    /// Cancel safe: a dropped future has acquired none, and none is lost.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn acquire(&self) -> Result<Grant> {
        self.0.wait(None, SemaphoreObject::acquire, (true,)).await.map(|(_, asked): (bool, _)| Grant(asked))
    }

    /// Acquires a permit if one is available.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; else as [`Proxy::call`].
    pub async fn try_acquire(&self) -> Result<Grant> {
        self.0.wait(None, SemaphoreObject::acquire, (false,)).await.map(|(_, asked): (bool, _)| Grant(asked))
    }

    /// Acquires a permit as [`acquire`](Self::acquire), but gives up after `timeout`. The timeout is real time: see
    /// [Timeouts](crate#timeouts). Cancel safe: a dropped future has acquired none.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use std::time::Duration;
    /// let manager = multiprocess::Manager::start().await?;
    /// let semaphore = manager.semaphore(1).await?;
    /// let permit = semaphore.acquire_timeout(Duration::from_secs(5)).await?;
    /// drop(permit);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Timeout` if there was no permit in time; else as [`acquire`](Self::acquire).
    pub async fn acquire_timeout(&self, timeout: Duration) -> Result<Grant> {
        in_time(timeout, self.acquire(), "there was no permit").await
    }

    calls! { permits: SemaphoreObject;
        /// Adds a permit. Permits that are held stay held.
        call fn release() -> () { permits.available = permits.available.saturating_add(1) }

        /// Returns the number of permits that are available.
        call fn available() -> usize { permits.available }
    }
}

/// The condition in the manager.
#[derive(Default)]
pub(crate) struct ConditionObject {
    lock: LockObject,
    waiting: VecDeque<Ticket>,
    /// Noticed, or too late for it, and not holding the lock again.
    woken: HashMap<Ticket, bool>,
    /// The holder has the lock by a notice.
    used: Option<Ticket>,
}

impl ConditionObject {
    fn lock(&mut self, _: &mut Option<()>, now: Try, answer: &mut Writer) -> Poll<Result<()>> {
        self.lock.take(now.ticket).map_or(Poll::Pending, |is_orphaned| Poll::Ready(answer.lend_part(&is_orphaned)))
    }

    /// `guard` is the request that the asker got the lock by. Answers whether the lock was left by the dead, and whether
    /// there was a notice.
    fn wait(&mut self, guard: &mut Option<(u64,)>, now: Try, answer: &mut Writer) -> Poll<Result<()>> {
        let ticket = now.ticket;
        if let Some((guard,)) = guard.take() {
            if self.lock.held.remove(&(ticket.0, guard)).is_none() {
                return Poll::Ready(Err(Error::other("a caller that waits at a condition must hold its lock")));
            }
            (self.lock.available, self.used) = (1, None);
            self.waiting.push_back(ticket);
        }
        if now.is_late && !self.woken.contains_key(&ticket) {
            self.waiting.retain(|waiting| *waiting != ticket);
            self.woken.insert(ticket, false);
        }
        let Some(is_noticed) = self.woken.get(&ticket).copied() else { return Poll::Pending };
        let Some(is_orphaned) = self.lock.take(ticket) else { return Poll::Pending };
        self.woken.remove(&ticket);
        self.used = is_noticed.then_some(ticket);
        Poll::Ready(answer.lend_part(&(is_orphaned, is_noticed)))
    }

    fn notify(&mut self, count: usize) {
        let count = count.min(self.waiting.len());
        self.woken.extend(self.waiting.drain(..count).map(|ticket| (ticket, true)));
    }
}

impl Waits for ConditionObject {
    fn settle(&mut self, ticket: Ticket, end: End) {
        self.lock.settle(ticket, end);
        self.waiting.retain(|waiting| *waiting != ticket);
        let was_used = self.used.take_if(|used| *used == ticket).is_some();
        // It is not known whether a dead waiter has used it, so another is notified, which learns of the death.
        let is_unused = was_used && matches!(end, End::Unread | End::Lost);
        if self.woken.remove(&ticket) == Some(true) || is_unused {
            self.notify(1);
        }
    }
}

/// A handle of a condition variable with its lock that lives in a manager's process.
///
/// Created by [`Manager::condition`](crate::Manager::condition). It is for programs that share no memory, such as those on
/// several hosts; among processes of one program, [`Condition`](crate::Condition) is faster.
///
/// ```
/// use multiprocess::{self as mp, Manager};
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::start().await?;
///         let condition = manager.condition().await?;
///         let held = condition.lock().await?;
///         let notify = async {
///             let _held = condition.lock().await?; // Once the other waits.
///             condition.notify_one().await
///         };
///         let (held, notified) = futures::join!(condition.wait(held), notify);
///         drop((held?, notified?));
///         manager.shutdown().await
///     })
/// }
/// ```
///
/// # Details
/// - **Waiting.** Callers are notified in the order in which they began to wait.
/// - **Dropped futures.** A dropped wait leaves the lock free and no waiter behind. A dropped [`lock`](Self::lock) has not
///   acquired it. For the other methods see [`Proxy`].
/// - **Death.** As for [`LockProxy`]. The notification of a process that is killed before it has released the lock goes to the next
///   waiter.
/// - **Cost.** One call for each method.
pub struct ConditionProxy(pub(crate) Proxy<ConditionObject>);

impl ConditionProxy {
    /// Acquires the lock of the condition.
    ///
    /// Cancel safe: a dropped future has not acquired it.
    ///
    /// # Errors
    /// As [`LockProxy::acquire`].
    pub async fn lock(&self) -> Result<Grant, LockError<Grant>> {
        granted(self.0.wait(None, ConditionObject::lock, ()).await)
    }

    /// Releases the lock, waits for a notification, and acquires the lock again.
    ///
    /// If the future is dropped, it leaves the lock free and no waiter behind. A notification that had come goes to the next waiter.
    ///
    /// # Errors
    /// `Other` if `held` is not this condition's lock: the grant is inside the error. Else as [`LockProxy::acquire`].
    pub async fn wait(&self, held: Grant) -> Result<Grant, LockError<Grant>> {
        self.wait_until(held, None).await
    }

    /// Waits as [`wait`](Self::wait), but at most `timeout` for a notification.
    ///
    /// The lock is acquired again in any case, however long that takes. Time is real time: see
    /// [Timeouts](crate#timeouts). A dropped future behaves as that of [`wait`](Self::wait).
    ///
    /// # Errors
    /// `Timeout` if no notification came in time: the grant is inside the error. Else as [`wait`](Self::wait).
    pub async fn wait_timeout(&self, held: Grant, timeout: Duration) -> Result<Grant, LockError<Grant>> {
        self.wait_until(held, Some(timeout)).await
    }

    async fn wait_until(&self, held: Grant, timeout: Option<Duration>) -> Result<Grant, LockError<Grant>> {
        if !held.0.is_of(&self.0) {
            // The manager knows it by its number, which one of another object or connection may have as well.
            let why = "the grant is not of this condition: wait with the one that its `lock` returned";
            return Err(LockError::new(Error::other(why), Some(held)));
        }
        // While it waits, `held` is the manager's word for nothing any more, and so is its drop.
        let waited = self.0.wait(timeout, ConditionObject::wait, (held.0.id(),)).await;
        let ((is_orphaned, is_noticed), asked) = waited.map_err(|error| {
            // If the manager was not asked, it is still the lock.
            let held = (error.kind() == ErrorKind::Timeout).then_some(held);
            LockError::new(error, held)
        })?;
        let grant = granted(Ok((is_orphaned, asked)))?;
        if is_noticed {
            return Ok(grant);
        }
        Err(LockError::new(too_late("the condition was not notified"), Some(grant)))
    }

    /// Waits until `is_so` returns `true`. It is called with the lock held: at once, and after each notification.
    ///
    /// If the future is dropped, it leaves the lock free and no waiter behind.
    ///
    /// # Errors
    /// The error of `is_so`, with the grant inside; else as [`wait`](Self::wait).
    pub async fn wait_for(
        &self,
        mut held: Grant,
        mut is_so: impl AsyncFnMut() -> Result<bool>,
    ) -> Result<Grant, LockError<Grant>> {
        loop {
            match is_so().await {
                Ok(true) => return Ok(held),
                Ok(false) => held = self.wait(held).await?,
                Err(error) => return Err(LockError::new(error, Some(held))),
            }
        }
    }

    calls! { waiters: ConditionObject;
        /// Wakes the caller that has waited longest.
        call fn notify_one() -> () { waiters.notify(1) }

        /// Wakes up to `count` callers, those that have waited longest.
        call fn notify(count: usize) -> () { waiters.notify(count) }

        /// Wakes all callers that wait.
        ///
        /// ```
        /// # multiprocess::init();
        /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
        /// let manager = multiprocess::Manager::start().await?;
        /// let condition = manager.condition().await?;
        /// let held = condition.lock().await?;
        /// let notify = async {
        ///     let _held = condition.lock().await?; // once the other waits
        ///     condition.notify(0).await?; // nobody
        ///     condition.notify_all().await
        /// };
        /// let (held, notified) = futures::join!(condition.wait(held), notify);
        /// drop((held?, notified?));
        /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
        /// ```
        call fn notify_all() -> () { waiters.notify(usize::MAX) }

        /// Returns the number of callers that wait for a notification.
        call fn waiting() -> usize { waiters.waiting.len() }
    }
}
