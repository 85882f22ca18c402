//! A barrier: no party continues before all have arrived. Its shared words are in [`super::barrier_state`], beside the
//! number of parties and the timeout, which never change, and the sleepers.

use super::barrier_state::{Arrival, BarrierState, Outcome, Round};
use super::object::{self, Core, FIRST, Report};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::{fault, fork, reactor, timer};
use crate::shm::atomic::AtomicU64;
use crate::shm::family::Family;
use crate::shm::mapped::Mapped;
use crate::shm::region::Region;
use crate::wait::sleepers::{self, Sleeper, Sleepers};
use crate::wait::{self, WaitQueue, Waiters};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;
use std::time::{Duration, Instant};

const PARTIES: usize = FIRST;
const TIMEOUT: usize = PARTIES + 1;
const STATE: usize = TIMEOUT + 1;
const SLEEPERS: usize = STATE + 1;
const PLACES: usize = SLEEPERS + sleepers::LEN;

/// The most parties: each has a word.
const MOST: usize = 1 << 20;
/// A barrier as this process sees it.
pub(super) struct BarrierCore {
    region: Arc<Region>,
    waiters: Waiters,
    family: &'static Family,
    /// The values of `PARTIES` and `TIMEOUT`, which never change.
    parties: usize,
    timeout: Option<Duration>,
}

static MAPPED: Mapped<BarrierCore> = Mapped::new();

impl Core for BarrierCore {
    const KIND: u64 = u64::from_le_bytes(*b"mpbarr01");
    const NAME: &'static str = "barrier";
    /// And one for each party.
    const WORDS: usize = PLACES;
    const IS_ALL_WORDS: bool = true;

    fn mapped() -> &'static Mapped<Self> {
        &MAPPED
    }

    fn region(&self) -> &Arc<Region> {
        &self.region
    }

    fn report(words: &[AtomicU64]) -> Report {
        Report { waiting: Sleepers::new(&words[SLEEPERS..SLEEPERS + sleepers::LEN]).list(), ..Report::default() }
    }

    fn view(region: Arc<Region>) -> io::Result<Self> {
        let parties = region.words()[PARTIES].load(Acquire);
        if parties == 0 || parties > (region.words().len() - PLACES) as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a barrier of another shape"));
        }
        let nanoseconds = region.words()[TIMEOUT].load(Acquire);
        let (parties, timeout) = (parties as usize, nanoseconds.checked_sub(1).map(Duration::from_nanos));
        let waiters = Waiters::new(WaitQueue::new(region.clone(), SLEEPERS, None)?);
        Ok(Self { region, waiters, family: Family::get()?, parties, timeout })
    }
}

impl BarrierCore {
    fn words(&self) -> &[AtomicU64] {
        self.region.words()
    }

    fn parties(&self) -> usize {
        self.parties
    }

    fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    fn state(&self) -> BarrierState<'_, impl Fn(Sleeper) -> bool + '_, impl Fn() + '_> {
        let is_listed =
            |sleeper: Sleeper| self.family.epoch_of(sleeper.slot).is_some_and(|epoch| sleeper.has_epoch(epoch));
        let places = &self.words()[PLACES..PLACES + self.parties()];
        BarrierState::new(&self.words()[STATE], places, is_listed, || self.waiters.notify_all())
    }

    /// A process that changes the state needs a slot, so that its death is noticed. If no slot is left it continues all the same.
    #[track_caller]
    fn claim_slot(&self) {
        fork::refuse("change a barrier");
        let _ = self.family.me();
    }

    /// Comes, unless the last generation still has to end.
    fn try_arrive(&self, only_last: bool, acting: bool) -> Option<Result<Party<'_>>> {
        let me = match self.family.me() {
            Ok(me) => me,
            Err(error) => return Some(Err(failed(error))),
        };
        match self.state().arrive(me.into(), only_last, acting) {
            Arrival::At { generation, index } => Some(Ok(Party { core: self, generation, index, is_over: false })),
            Arrival::NotLast => Some(Err(would_block())),
            Arrival::Busy => None,
            Arrival::Broken => Some(Err(broken())),
        }
    }

    async fn arrive(&self, acting: bool, deadline: Option<Instant>) -> Result<Party<'_>> {
        if let Some(party) = self.try_arrive(false, acting) {
            return party;
        }
        let coming = self.waiters.until(|| self.try_arrive(false, acting));
        by(deadline, coming).await.map_or_else(|| Err(still_busy()), |party| party.map_err(failed)?)
    }

    async fn wait(&self, timeout: Option<Duration>) -> Result<BarrierWaitResult> {
        timeout.map_or(Ok(()), |_| reactor::has_timer()).map_err(failed)?;
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.arrive(false, deadline).await?.wait(deadline).await
    }

    async fn wait_then(&self, action: impl AsyncFnOnce() -> Result<()>) -> Result<BarrierWaitResult> {
        self.timeout().map_or(Ok(()), |_| reactor::has_timer()).map_err(failed)?;
        let deadline = self.timeout().and_then(|timeout| Instant::now().checked_add(timeout));
        let party = self.arrive(true, deadline).await?;
        if party.index + 1 < self.parties() {
            return party.wait(deadline).await;
        }
        action().await?;
        fault::point("barrier.acted");
        party.end(false)
    }

    #[track_caller]
    fn blocking_wait(&self, timeout: Option<Duration>) -> Result<BarrierWaitResult> {
        wait::refuse_inside_async();
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let come = self.waiters.until_blocking(deadline, || self.try_arrive(false, false)).map_err(failed)?;
        let party = come.unwrap_or_else(|| Err(still_busy()))?;
        match self.waiters.until_blocking(deadline, || party.look()).map_err(failed)? {
            Some(outcome) => party.finish(outcome),
            None => party.end(true),
        }
    }
}

/// Awaits `future` until the deadline.
async fn by<T>(deadline: Option<Instant>, future: impl Future<Output = T>) -> Option<T> {
    match deadline {
        None => Some(future.await),
        Some(deadline) => timer::by(deadline, future).await.ok(),
    }
}

/// A waiting party. Dropped before its generation has ended, it breaks the generation.
struct Party<'a> {
    core: &'a BarrierCore,
    generation: u64,
    index: usize,
    is_over: bool,
}

impl Party<'_> {
    fn look(&self) -> Option<Outcome> {
        Some(self.core.state().settle(self.generation)).filter(|outcome| *outcome != Outcome::Open)
    }

    /// Ends the generation, if it has not ended meanwhile.
    fn end(self, badly: bool) -> Result<BarrierWaitResult> {
        let outcome = self.core.state().end(self.generation, badly);
        self.finish(outcome)
    }

    fn finish(mut self, outcome: Outcome) -> Result<BarrierWaitResult> {
        self.is_over = true;
        if outcome == Outcome::Passed { Ok(BarrierWaitResult { index: self.index }) } else { Err(broken()) }
    }

    async fn wait(self, deadline: Option<Instant>) -> Result<BarrierWaitResult> {
        // The last party does not sleep.
        let outcome = match self.look() {
            Some(outcome) => outcome,
            None => match by(deadline, self.core.waiters.until(|| self.look())).await {
                Some(outcome) => outcome.map_err(failed)?,
                None => return self.end(true),
            },
        };
        self.finish(outcome)
    }
}

impl Drop for Party<'_> {
    fn drop(&mut self) {
        if !self.is_over && !fork::is_forked() {
            self.core.state().end(self.generation, true);
        }
    }
}

fn failed(error: io::Error) -> Error {
    Error::io("cannot wait at a barrier", error)
}

fn broken() -> Error {
    let why = "the barrier is broken: a party was killed, gave up or timed out while it waited, or somebody called \
               abort or reset; call reset to use it again";
    Error::new(ErrorKind::BrokenBarrier, why).explained_by(Topic::BarrierBroken)
}

fn would_block() -> Error {
    Error::new(ErrorKind::WouldBlock, "others have yet to come to the barrier")
}

fn still_busy() -> Error {
    Error::new(ErrorKind::Timeout, "the action of the barrier's last generation was not done in time")
}

/// The result of [`Barrier::wait`]: the place of this party among the others.
///
/// ```
/// # multiprocess::init();
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let result = multiprocess::Barrier::new(1)?.wait().await?;
/// assert!(result.is_leader() && result.index() == 0);
/// # Ok::<_, multiprocess::Error>(()) }).unwrap();
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarrierWaitResult {
    index: usize,
}

impl BarrierWaitResult {
    /// Returns the number of this party in its generation, by order of arrival: 0 for the first.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Returns true for exactly one party of each generation: the one with index 0.
    pub fn is_leader(&self) -> bool {
        self.index == 0
    }
}

/// A barrier between processes: a number of parties wait for each other, again and again.
///
/// Use instead:
/// - [`Event`](crate::Event) to wait for one of them;
/// - [`Process::join`](crate::Process::join) to wait for the end of a process.
///
/// Use it to separate the phases of a computation. A party is any caller of [`wait`](Barrier::wait): a process, a task or a
/// thread. When the last party of a generation arrives, all continue, and the next generation begins.
///
/// ```
/// use multiprocess::{self as mp, Barrier, Process};
///
/// async fn phase(barrier: Barrier) -> mp::Result<usize> {
///     Ok(barrier.wait().await?.index())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let barrier = Barrier::new(2)?;
///         let child = Process::spawn(phase, (barrier.clone(),))?;
///         let mine = barrier.wait().await?.index();
///         assert_eq!(mine + child.await??, 1);
///         Ok(())
///     })
/// }
/// ```
///
/// # Handles
/// A handle is cheap to clone and is a serde value. It can be an argument, a result, or part of a value in a queue or a
/// pipe. The barrier exists as long as any process or message has a handle.
///
/// # Details
/// - **Broken barriers.** A party that is dropped, times out or is killed while it waits breaks the barrier. All parties
///   that wait or arrive then get an error of kind `BrokenBarrier`, until [`reset`](Barrier::reset) is called.
/// - **Waiting.** Only the `wait` methods wait. [`abort`](Barrier::abort), [`reset`](Barrier::reset) and the queries never
///   do.
/// - **Death.** A party killed while it waits breaks the barrier within milliseconds. A party killed before it arrives is
///   missing: use a timeout to notice that.
/// - **Cost.** Without waiting a few atomic operations. A system call is made only to wake a process. A barrier is one
///   descriptor, 600 bytes, and 8 bytes for each party.
#[derive(Clone)]
pub struct Barrier {
    core: Arc<BarrierCore>,
}

impl Barrier {
    /// Creates a barrier for `parties` parties.
    ///
    /// # Errors
    /// - `Other` for 0 parties, or more than 2^20.
    /// - `Io` if no memory or descriptor is left.
    pub fn new(parties: usize) -> Result<Self> {
        Self::create(parties, 0)
    }

    /// Creates a barrier whose [`wait`](Self::wait) breaks it after `timeout`.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{Barrier, ErrorKind};
    /// let barrier = Barrier::with_timeout(2, std::time::Duration::from_millis(1))?;
    /// assert_eq!(barrier.wait().await.unwrap_err().kind(), ErrorKind::BrokenBarrier);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_timeout(parties: usize, timeout: Duration) -> Result<Self> {
        Self::create(parties, u64::try_from(timeout.as_nanos()).map_or(u64::MAX, |timeout| timeout.saturating_add(1)))
    }

    fn create(parties: usize, timeout: u64) -> Result<Self> {
        if !(1..=MOST).contains(&parties) {
            return Err(Error::other(format!("a barrier for {parties} parties: use 1 to {MOST}")));
        }
        let fill = |words: &[AtomicU64]| {
            words[PARTIES].store(parties as u64, Release);
            words[TIMEOUT].store(timeout, Release);
            words[STATE].store(Round::FIRST.0, Release);
        };
        Ok(Self {
            core: object::create_of_len::<BarrierCore>(
                ((BarrierCore::WORDS + parties) * size_of::<u64>()) as u64,
                fill,
            )?,
        })
    }

    /// Waits until all parties have arrived.
    ///
    /// It waits at most as long as [`with_timeout`](Self::with_timeout) was given. Dropping the future before it is ready
    /// breaks the barrier.
    ///
    /// # Errors
    /// - `BrokenBarrier` if the barrier is broken, or breaks while this waits.
    /// - `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs, such as
    ///   a descriptor. This breaks the barrier too.
    pub async fn wait(&self) -> Result<BarrierWaitResult> {
        self.core.wait(self.core.timeout()).await
    }

    /// Waits until all parties have arrived, and breaks the barrier after `timeout`.
    ///
    /// The timeout is real time: see [Timeouts](crate#timeouts). Dropping the future before it is ready breaks the
    /// barrier.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{self as mp, ErrorKind};
    /// use std::time::Duration;
    /// let barrier = mp::Barrier::new(2)?;
    /// let error = barrier.wait_timeout(Duration::from_millis(1)).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::BrokenBarrier);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// - `BrokenBarrier` if not all parties arrived in time: the barrier is broken then, for all parties.
    /// - `Timeout` if the action of the last generation ([`wait_then`](Self::wait_then)) did not end in time.
    /// - `Io` if the runtime has no timer.
    /// - Otherwise as [`wait`](Self::wait).
    pub async fn wait_timeout(&self, timeout: Duration) -> Result<BarrierWaitResult> {
        self.core.wait(Some(timeout)).await
    }

    /// Arrives if this is the last party, which need not wait. Otherwise it does not arrive at all.
    ///
    /// ```
    /// # multiprocess::init();
    /// use multiprocess::{Barrier, ErrorKind};
    /// assert_eq!(Barrier::new(2)?.try_wait().unwrap_err().kind(), ErrorKind::WouldBlock);
    /// assert!(Barrier::new(1)?.try_wait()?.is_leader());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// - `WouldBlock` if other parties have yet to arrive.
    /// - `BrokenBarrier` if the barrier is broken.
    pub fn try_wait(&self) -> Result<BarrierWaitResult> {
        self.core.try_arrive(true, false).unwrap_or_else(|| Err(would_block()))?.end(false)
    }

    /// Waits until all parties have arrived and the last of them has run its `action`.
    ///
    /// If all parties wait in this way, one action runs in each generation, before any party continues. Parties of the next
    /// generation wait until it has ended. Dropping the future before it is ready breaks the barrier.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let barrier = multiprocess::Barrier::new(1)?;
    /// barrier.wait_then(async || { println!("all are here"); Ok(()) }).await?;
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// The error of `action`, which breaks the barrier for the others. Otherwise as [`wait`](Self::wait).
    pub async fn wait_then(&self, action: impl AsyncFnOnce() -> Result<()>) -> Result<BarrierWaitResult> {
        self.core.wait_then(action).await
    }

    /// Blocks this thread until all parties have arrived.
    ///
    /// ```
    /// # multiprocess::init();
    /// assert!(multiprocess::Barrier::new(1)?.blocking_wait()?.is_leader());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    #[track_caller]
    pub fn blocking_wait(&self) -> Result<BarrierWaitResult> {
        self.core.blocking_wait(self.core.timeout())
    }

    /// Blocks this thread until all parties have arrived, and breaks the barrier after `timeout`.
    ///
    /// ```
    /// # multiprocess::init();
    /// use multiprocess::{Barrier, ErrorKind};
    /// use std::time::Duration;
    /// let error = Barrier::new(2)?.blocking_wait_timeout(Duration::from_millis(1)).unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::BrokenBarrier);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`wait_timeout`](Self::wait_timeout).
    #[track_caller]
    pub fn blocking_wait_timeout(&self, timeout: Duration) -> Result<BarrierWaitResult> {
        self.core.blocking_wait(Some(timeout))
    }

    /// Breaks the barrier: all parties that wait or arrive get `BrokenBarrier`, until [`reset`](Self::reset).
    pub fn abort(&self) {
        self.core.claim_slot();
        self.core.state().abort();
    }

    /// Repairs the barrier and empties it. Parties that wait get `BrokenBarrier`.
    ///
    /// ```
    /// # multiprocess::init();
    /// let barrier = multiprocess::Barrier::new(2)?;
    /// barrier.abort();
    /// assert!(barrier.is_broken());
    /// barrier.reset();
    /// assert!(!barrier.is_broken());
    /// assert_eq!((barrier.parties(), barrier.waiting()), (2, 0));
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn reset(&self) {
        self.core.claim_slot();
        self.core.state().reset();
    }

    /// Returns the number of parties that must arrive.
    pub fn parties(&self) -> usize {
        self.core.parties()
    }

    /// Returns the number of parties that have arrived and wait; 0 while the barrier is broken.
    pub fn waiting(&self) -> usize {
        self.core.state().waiting()
    }

    /// Returns `true` if the barrier is broken.
    pub fn is_broken(&self) -> bool {
        self.core.state().is_broken()
    }
}

impl fmt::Debug for Barrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Barrier")
            .field("parties", &self.parties())
            .field("waiting", &self.waiting())
            .field("is_broken", &self.is_broken())
            .finish_non_exhaustive()
    }
}

object::travels!(Barrier, core);
