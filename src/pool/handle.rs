//! The futures and streams that callers await. Encoding and decoding happen here, in the caller's task.

use super::attempts::{Again, Singles, poll_one};
use super::batch::ResultBatch;
use super::engine::{PoolLifetime, check_forked};
use super::events::{EndOfEvents, Events};
use super::flight::{Flight, OpenCall, Stage, Target};
use super::input::{Input, One};
use super::options::{Options, Progress};
use super::retry::{Predicate, RetryIf};
use super::scheduler::stranded;
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::fork;
use crate::process::Function;
use crate::process::function::Arguments;
use futures_util::Stream;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::watch;

macro_rules! options {
    ($name:ident) => {
        impl<R> $name<R> {
            /// Asks an item that has run for `timeout` to stop, and fails it with kind `Timeout` if it has not returned
            /// when the [`grace`](Self::grace) is over. A result that it returns within the grace is a normal result.
            ///
            /// - If the item does not return within the grace, its worker is killed and replaced. Other items are not
            ///   touched.
            /// - The worker measures the time too: an item that returns after `timeout` and the grace fails, even if
            ///   the pool was too busy to kill its worker.
            /// - If the worker does not begin the item although nothing is before it (it is stopped or frozen), the timeout and the grace count from
            ///   when the pool gave it the item. An idle worker takes such an item over after about 10 ms.
            /// - The time is real time: see [Timeouts](crate#timeouts).
            pub fn timeout(mut self, timeout: Duration) -> Self {
                self.stage.options().into_iter().for_each(|options| options.timeout = Some(timeout));
                self
            }

            /// Runs an item again, up to `retries` times, if its worker died or reached its limit of memory, or it overran its
            /// timeout. By default 0.
            pub fn retries(mut self, retries: u32) -> Self {
                self.stage.options().into_iter().for_each(|options| options.retries = retries);
                self
            }

            /// Waits `first` before the first retry of an item, and twice as long before each further one. By default not at all.
            pub fn back_off(mut self, first: Duration) -> Self {
                self.stage.options().into_iter().for_each(|options| options.back_off = first);
                self
            }

            /// Fails an item with kind `Timeout` if it has not started within `timeout` after it was submitted.
            pub fn queue_timeout(mut self, timeout: Duration) -> Self {
                self.stage.options().into_iter().for_each(|options| options.queue_timeout = Some(timeout));
                self
            }

            /// Sets how long an item that was asked to stop may go on before its worker is killed. By default the
            /// [`grace`](crate::PoolBuilder::grace) of the pool. The function learns from [`current_task`](crate::current_task)
            /// that it should stop.
            pub fn grace(mut self, grace: Duration) -> Self {
                self.stage.options().into_iter().for_each(|options| options.grace = Some(grace));
                self
            }

            /// Returns a stream of the events of type `E` that the functions of this call send by
            /// [`CurrentTask::emit`](crate::CurrentTask::emit) while they run, such as progress or partial results.
            ///
            /// - Call it at most once, before the first poll.
            /// - Poll the stream together with the call, or drop it: a task waits while 1024 events, or 1 to 2 MiB, are unread.
            /// - To start the call at once, pass it to `tokio::spawn`. A call of `apply_async` has no events.
            ///
            /// See [`Events`] for an example, the errors, and what happens on drop and death.
            pub fn events<E>(&mut self) -> Events<E>
            where
                E: Serialize + DeserializeOwned + Send + 'static,
            {
                let (events, end) = self.stage.listen();
                if end.is_some() {
                    self.events = end;
                }
                events
            }
        }
    };
}

macro_rules! chunksize {
    ($name:ident) => {
        impl<R> $name<R> {
            /// Sets which results of an item are retried: failures of a kind, or results for which a predicate returns `true`. By default
            /// the failures listed at [`retries`](Self::retries). See [`Call::retry_if`].
            ///
            /// With a predicate each item is sent alone, whatever the [`chunksize`](Self::chunksize). The predicate runs in this process,
            /// before the next attempt.
            ///
            /// ```
            /// use multiprocess::{self as mp, Pool};
            /// # fn main() -> mp::Result<()> { mp::run(async {
            /// let pool = Pool::new(2)?;
            /// let attempt = |_: u8| mp::current_task().expect("in a worker").attempt();
            /// let is_first = |result: &mp::Result<u32>| result.as_ref().is_ok_and(|attempt| *attempt == 0);
            /// assert_eq!(pool.map(attempt, [7, 8, 9]).retries(3).retry_if(is_first).await?, [1, 1, 1]);
            /// # Ok(()) }) }
            /// ```
            pub fn retry_if(mut self, condition: impl RetryIf<R>) -> Self {
                let (which, condition) = condition.condition().parts();
                self.stage.options().into_iter().for_each(|options| options.retry_on = which);
                self.condition = condition;
                self
            }

            /// Sets how many items travel to a worker together. With 0, the default, chunks aim at about a millisecond of work.
            ///
            /// ```
            /// # multiprocess::init();
            /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
            /// let pool = multiprocess::Pool::new(2)?;
            /// assert_eq!(pool.map(|n: u64| n + 1, 0..4).chunksize(2).await?, [1, 2, 3, 4]);
            /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
            /// ```
            pub fn chunksize(mut self, items: usize) -> Self {
                self.stage.options().into_iter().for_each(|options| options.chunk = items);
                self
            }

            /// Returns a channel that shows how far this is, and changes as results arrive here, in order or not.
            ///
            /// Ask for it before the first poll. The channel closes when this ends or is dropped.
            pub fn progress(&mut self) -> watch::Receiver<Progress> {
                let (sender, receiver) = watch::channel(Progress::default());
                self.stage.options().into_iter().for_each(|options| {
                    (options.progress, options.gathers) = (Some(sender.clone()), false);
                });
                receiver
            }
        }
    };
}

/// A call that runs when it is awaited; made by [`Pool::apply`](crate::Pool::apply).
///
/// Use [`Pool::apply_async`](crate::Pool::apply_async) instead to have it run while other things are done.
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// use std::time::Duration;
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(1)?;
/// fn stuck() {
///     loop {
///         std::hint::spin_loop();
///     }
/// }
/// let error = pool.apply(stuck, ()).timeout(Duration::from_millis(50)).await.unwrap_err();
/// assert_eq!(error.kind(), mp::ErrorKind::Timeout);
/// # Ok(()) }) }
/// ```
///
/// # Drop
/// Cancels the call. An item that has not started never starts. A running item is asked to stop
/// ([`CurrentTask::is_cancelled`](crate::CurrentTask::is_cancelled)), and its worker is killed and replaced after the
/// [`grace`](Self::grace).
#[must_use = "a call runs when it is awaited"]
pub struct Call<R> {
    stage: Stage,
    again: Option<Again<R>>,
    rejects: bool,
    /// After the stage, which is cancelled first.
    events: Option<EndOfEvents>,
    result: PhantomData<fn() -> R>,
}

options!(Call);

impl<R> Call<R> {
    /// For a checkout: the call that `acquires` its worker, or one that runs there.
    pub(super) fn checked_out(mut self, checkout: u64, acquires: bool) -> Self {
        if let Some(options) = self.stage.options() {
            (options.checkout, options.acquires) = (checkout, acquires);
        }
        self
    }

    /// There is room for its item, which the caller has reserved.
    #[cfg(feature = "tower")]
    pub(super) fn admitted(mut self) -> Self {
        self.stage.options().into_iter().for_each(|options| options.is_admitted = true);
        self
    }

    /// Returns `true` if its item was handed in, or cannot be.
    #[cfg(feature = "tower")]
    pub(super) fn has_begun(&self) -> bool {
        self.stage.has_begun()
    }

    pub(super) fn of<F, A, M>(pool: Arc<PoolLifetime>, f: F, args: A) -> Self
    where
        F: Function<A, M, Output = R>,
        A: Arguments,
    {
        Self::new(pool, Target::of(f), One::input(&args))
    }

    pub(super) fn new(pool: Arc<PoolLifetime>, target: Target, input: Result<Box<dyn Input>>) -> Self {
        Self { stage: planned_one(pool, target, input), again: None, rejects: false, events: None, result: PhantomData }
    }

    /// Sets which results are retried: failures of a kind, or results for which a predicate returns `true`. By default the failures
    /// listed at [`retries`](Self::retries).
    ///
    /// The predicate runs in this process, with the decoded result. The last `retry_if` of a call counts. A call that was cancelled
    /// or refused is not retried.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool, Value};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(1)?;
    /// let calls = Value::new(0_u32)?;
    /// let is_small = |result: &mp::Result<u32>| result.as_ref().is_ok_and(|n| *n < 3);
    /// let call = pool.apply(|calls: Value<u32>| calls.fetch_add(1), (calls,)).retries(10).retry_if(is_small);
    /// assert_eq!(call.await?, 3);
    /// # Ok(()) }) }
    /// ```
    pub fn retry_if(mut self, condition: impl RetryIf<R>) -> Self {
        let (which, condition) = condition.condition().parts();
        self.stage.options().into_iter().for_each(|options| options.retry_on = which);
        self.again = condition.map(Again::new);
        self
    }

    /// Fails at once with kind `Full` if the limit of waiting items ([`max_waiting`](crate::PoolBuilder::max_waiting)) is reached,
    /// instead of waiting for room. So a service sheds load, and the calls that it has accepted keep their latency.
    ///
    /// ```
    /// use multiprocess::{self as mp, ErrorKind, Pool};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::builder().workers(1).max_waiting(1).build()?;
    /// let call = || pool.apply(|| std::thread::sleep(std::time::Duration::from_millis(200)), ()).reject_when_full();
    /// let results = futures::future::join_all((0..10).map(|_| call())).await;
    /// assert!(results.iter().any(|result| result.is_ok()));
    /// assert!(results.iter().flat_map(|result| result.as_ref().err()).all(|error| error.kind() == ErrorKind::Full));
    /// # Ok(()) }) }
    /// ```
    pub fn reject_when_full(mut self) -> Self {
        self.rejects = true;
        self
    }

    /// Submits the call, or fails if there is no room.
    fn begin_or_reject(&mut self) -> Result<()> {
        self.stage = started(std::mem::replace(&mut self.stage, Stage::Over));
        match &self.stage {
            Stage::Flying(flight) if flight.is_held_back() => {
                let error = rejected(flight);
                self.stage = Stage::Over;
                Err(error)
            }
            _ => Ok(()),
        }
    }
}

/// Returns the error of a call that found no room.
fn rejected(flight: &Flight) -> Error {
    let shared = flight.pool.shared();
    shared.rejected();
    let most = shared.config.max_waiting.unwrap_or_default();
    let text = format!("{most} items wait for a worker of the pool, as many as may wait: await `apply`, or try later");
    Error::new(ErrorKind::Full, text).explained_by(Topic::NoRoom)
}

fn planned_one(pool: Arc<PoolLifetime>, target: Target, input: Result<Box<dyn Input>>) -> Stage {
    match input {
        Ok(input) => Stage::Planned { pool, target, options: Options::default(), input, ticket: None },
        Err(error) => Stage::Failed(error),
    }
}

impl<R: DeserializeOwned + 'static> Future for Call<R> {
    type Output = Result<R>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<R>> {
        check_forked()?;
        let this = &mut *self;
        loop {
            if let Some(again) = &mut this.again {
                ready!(again.poll_ready(&mut this.stage, cx));
            }
            // Another attempt of a call that was accepted needs no room.
            if matches!(this.stage, Stage::Planned { .. }) && std::mem::take(&mut this.rejects) {
                this.begin_or_reject().inspect_err(|_| this.events = None)?;
            }
            let result = ready!(poll_one(&mut this.stage, cx));
            match this.again.as_mut().and_then(|again| again.next(&result)) {
                Some(stage) => {
                    this.stage = stage;
                    // Attempts that end at once leave other tasks their turns.
                    ready!(tokio::task::coop::poll_proceed(cx)).made_progress();
                }
                None => {
                    (this.again, this.events) = (None, None);
                    return Poll::Ready(result);
                }
            }
        }
    }
}

/// The result of a call that was started at once; made by [`Pool::apply_async`](crate::Pool::apply_async).
///
/// Use [`Pool::apply`](crate::Pool::apply) instead for a call that ends with the future that waits for it.
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(2)?;
/// let one = pool.apply_async(|x: u32| x + 1, (1,));
/// let other = pool.apply_async(|x: u32| x + 1, (2,));
/// assert_eq!(one.await? + other.await?, 5);
/// # Ok(()) }) }
/// ```
///
/// # Drop
/// Does not cancel the call, unless it still waits for room in a pool with [`max_waiting`](crate::PoolBuilder::max_waiting).
pub struct AsyncResult<R> {
    stage: Stage,
    result: PhantomData<fn() -> R>,
}

impl<R> AsyncResult<R> {
    pub(super) fn start(pool: Arc<PoolLifetime>, target: Target, input: Result<Box<dyn Input>>) -> Self {
        Self { stage: started(planned_one(pool, target, input)), result: PhantomData }
    }

    /// Starts the call if there is room for it.
    pub(super) fn try_start(pool: Arc<PoolLifetime>, target: Target, input: Result<Box<dyn Input>>) -> Result<Self> {
        let mut call = Self::start(pool, target, input);
        match std::mem::replace(&mut call.stage, Stage::Over) {
            Stage::Failed(error) => Err(error),
            Stage::Flying(flight) if flight.is_held_back() => Err(rejected(&flight)),
            stage => {
                call.stage = stage;
                Ok(call)
            }
        }
    }

    /// Returns `true` if awaiting this would return at once. Does not wait.
    pub fn ready(&self) -> bool {
        match &self.stage {
            Stage::Flying(flight) => fork::is_forked() || flight.group.has_done(),
            Stage::Failed(_) | Stage::Over => true,
            Stage::Planned { .. } => false,
        }
    }

    /// Cancels the call. An item that has not started never starts. A running item is asked to stop
    /// ([`CurrentTask::is_cancelled`](crate::CurrentTask::is_cancelled)), and its worker is killed after the grace.
    ///
    /// The result is then an error of kind `Cancelled`, unless it was there already. In a forked process this does nothing: the call is its parent's.
    pub fn cancel(&self) {
        if let Stage::Flying(flight) = &self.stage
            && !fork::is_forked()
            && !flight.group.has_done()
        {
            flight.cancel();
            // From here on nothing is delivered any more; results that came before count.
            flight.group.settle_cancelled();
        }
    }
}

/// Submits everything the source has now.
fn started(mut stage: Stage) -> Stage {
    match stage.flight() {
        Ok(Some(flight)) => {
            flight.refill(0, &mut Context::from_waker(std::task::Waker::noop()));
            flight.pool.shared().arm_alarm();
        }
        Ok(None) => {}
        Err(error) => return Stage::Failed(error),
    }
    stage
}

impl<R> Drop for AsyncResult<R> {
    fn drop(&mut self) {
        if let Stage::Flying(flight) = &mut self.stage {
            flight.detach();
        }
    }
}

impl<R: DeserializeOwned + 'static> Future for AsyncResult<R> {
    type Output = Result<R>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<R>> {
        poll_one(&mut self.stage, cx)
    }
}

/// All results of a call on many items, in order; made by [`Pool::map`](crate::Pool::map). Runs when it is awaited.
///
/// Use [`Pool::imap`](crate::Pool::imap) instead to get results as they come, or for more items than fit into memory.
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(2)?;
/// let squares: Vec<u64> = pool.map(|x: u64| x * x, 1..=4).await?;
/// assert_eq!(squares, [1, 4, 9, 16]);
/// # Ok(()) }) }
/// ```
///
/// The failure that arrives first, of whichever item, ends the map with its error and cancels the rest.
///
/// # Drop
/// Cancels the rest: items that have not started never start, and running items are asked to stop and then killed.
#[must_use = "a map runs when it is awaited"]
pub struct Map<R> {
    stage: Stage,
    results: Vec<R>,
    early: Early,
    /// Results that are made again are made so here.
    condition: Option<Predicate<R>>,
    singles: Option<Box<Singles<R>>>,
    /// After the items, which are cancelled first.
    events: Option<EndOfEvents>,
}

options!(Map);
chunksize!(Map);

impl<R> Map<R> {
    pub(super) fn new(pool: Arc<PoolLifetime>, target: Target, input: Box<dyn Input>) -> Self {
        let options = Options { is_many: true, gathers: true, ..Options::default() };
        let stage = Stage::Planned { pool, target, options, input, ticket: None };
        let (condition, singles, events) = (None, None, None);
        Self { stage, results: Vec::new(), early: Early::default(), condition, singles, events }
    }
}

impl<R: DeserializeOwned + Unpin + 'static> Map<R> {
    /// Adds the results that are in order; an error is that of an item.
    fn take(&mut self, mut batch: ResultBatch) -> Result<()> {
        if batch.failures() > 0 {
            // Its error now, rather than when its turn comes.
            return batch.drain(|result: Result<R>| result.map(drop));
        }
        if batch.first() == self.results.len() as u64 {
            self.add(batch)?;
        } else {
            self.early.insert(batch);
        }
        while let Some(batch) = self.early.take(self.results.len() as u64) {
            self.add(batch)?;
        }
        Ok(())
    }

    /// Cancels the rest, and ends the events.
    fn end(&mut self) {
        (self.stage, self.singles) = (Stage::Over, None);
        self.events = None;
    }

    /// Polls items that are made again by a predicate.
    fn poll_singles(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<R>>> {
        if let Some(condition) = self.condition.take() {
            self.singles = Singles::start(&mut self.stage, condition)?.map(Box::new);
        }
        match &mut self.singles {
            Some(singles) => singles.poll_failing_first(cx),
            None => Poll::Ready(None),
        }
    }

    fn add(&mut self, mut batch: ResultBatch) -> Result<()> {
        self.results.reserve(batch.count() as usize);
        batch.drain(|result| result.map(|result| self.results.push(result)))
    }
}

impl<R: DeserializeOwned + Unpin + 'static> Future for Map<R> {
    type Output = Result<Vec<R>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        check_forked()?;
        let this = &mut *self;
        while this.condition.is_some() || this.singles.is_some() {
            match ready!(this.poll_singles(cx)) {
                Some(Ok(result)) => this.results.push(result),
                Some(Err(error)) => {
                    this.end();
                    return Poll::Ready(Err(error));
                }
                None => {
                    this.end();
                    return Poll::Ready(Ok(std::mem::take(&mut this.results)));
                }
            }
        }
        loop {
            // Results that wait for their turn count as taken: all of them are wanted.
            let taken = match ready!(this.stage.poll_next(0, cx)) {
                Some(batch) => this.take(batch),
                None => {
                    this.end();
                    return Poll::Ready(Ok(std::mem::take(&mut this.results)));
                }
            };
            if let Err(error) = taken {
                this.end();
                return Poll::Ready(Err(error));
            }
        }
    }
}

/// Batches whose turn has not come, in order. Each comes near to the end, as workers get items in order.
#[derive(Default)]
struct Early {
    batches: VecDeque<ResultBatch>,
    held: usize,
}

impl Early {
    fn insert(&mut self, batch: ResultBatch) {
        self.held += batch.count() as usize;
        let is_last = self.batches.back().is_none_or(|last| last.first() < batch.first());
        match is_last {
            true => self.batches.push_back(batch),
            false => self.batches.insert(self.batches.partition_point(|other| other.first() < batch.first()), batch),
        }
    }

    /// The batch that begins with item `next`.
    fn take(&mut self, next: u64) -> Option<ResultBatch> {
        let first = self.batches.front()?.first();
        debug_assert!(first >= next, "batch {first} comes after its turn, which is {next}");
        if first != next {
            return None;
        }
        let batch = self.batches.pop_front()?;
        self.held -= batch.count() as usize;
        Some(batch)
    }

    fn held(&self) -> usize {
        self.held
    }
}

/// All results of a map that already runs, in order; made by [`Pool::map_async`](crate::Pool::map_async).
///
/// Use [`Pool::map`](crate::Pool::map) instead if the map should end with the future that waits for it, or needs options.
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(2)?;
/// let cubes = pool.map_async(|x: u64| x * x * x, vec![1, 2, 3]);
/// assert_eq!(cubes.await?, [1, 8, 27]);
/// # Ok(()) }) }
/// ```
///
/// # Drop
/// Does not cancel the items.
pub struct MapAsync<R>(tokio::task::JoinHandle<Result<Vec<R>>>);

impl<R: DeserializeOwned + Send + Unpin + 'static> MapAsync<R> {
    pub(super) fn start(mut map: Map<R>) -> Self {
        let runtime = map.stage_runtime();
        // Begun here and not by its task: a `close` may come before that is polled.
        map.stage = started(std::mem::replace(&mut map.stage, Stage::Over));
        Self(runtime.spawn(map))
    }
}

impl<R> Map<R> {
    fn stage_runtime(&self) -> tokio::runtime::Handle {
        match &self.stage {
            Stage::Planned { pool, .. } => pool.runtime().clone(),
            _ => tokio::runtime::Handle::current(),
        }
    }
}

impl<R> Future for MapAsync<R> {
    type Output = Result<Vec<R>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        check_forked()?;
        let joined = ready!(Pin::new(&mut self.0).poll(cx));
        // Only the end of the pool's runtime cancels it.
        Poll::Ready(joined.unwrap_or_else(|error| match error.is_cancelled() {
            true => Err(stranded()),
            false => Err(Error::other(error)),
        }))
    }
}

/// The results of a call on many items, as a stream; made by [`Pool::imap`](crate::Pool::imap) and its like.
///
/// Use [`Pool::map`](crate::Pool::map) instead to get all at once, or the first error.
///
/// ```
/// use futures::{StreamExt, TryStreamExt};
/// use multiprocess::{self as mp, Pool};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(2)?;
/// let endless = pool.imap(|x: u64| x * x, 1..);
/// assert_eq!(endless.take(3).try_collect::<Vec<_>>().await?, [1, 4, 9]);
/// # Ok(()) }) }
/// ```
///
/// An item that fails is an `Err` in the stream, which goes on.
///
/// # Waiting
/// Items are taken from their source as results are taken from the stream: a few chunks per worker ahead, never more. A stream that is not
/// polled keeps the results that have come, and takes no more items.
///
/// A worker announces several results of items that take less than 2 ms together. Each reaches the stream within about half a millisecond, unless the
/// next item of that worker is long. The stream is then woken less than once for each item.
///
/// # Drop
/// Cancels the rest, as the drop of a [`Map`].
#[must_use = "a stream does nothing unless it is polled"]
pub struct Results<R> {
    stage: Stage,
    is_ordered: bool,
    next: u64,
    current: Option<ResultBatch>,
    early: Early,
    condition: Option<Predicate<R>>,
    singles: Option<Box<Singles<R>>>,
    events: Option<EndOfEvents>,
    result: PhantomData<fn() -> R>,
}

options!(Results);
chunksize!(Results);

impl<R> Results<R> {
    pub(super) fn new(pool: Arc<PoolLifetime>, target: Target, input: Box<dyn Input>, is_ordered: bool) -> Self {
        let stage = match OpenCall::of(&pool, 0) {
            Ok(ticket) => {
                let options = Options { is_many: true, ..Options::default() };
                Stage::Planned { pool, target, options, input, ticket: Some(ticket) }
            }
            Err(error) => Stage::Failed(error),
        };
        let (current, early) = (None, Early::default());
        let (condition, singles, events) = (None, None, None);
        Self { stage, is_ordered, next: 0, current, early, condition, singles, events, result: PhantomData }
    }
}

impl<R: DeserializeOwned + 'static> Stream for Results<R> {
    type Item = Result<R>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<R>>> {
        let this = &mut *self;
        let is_over = matches!(this.stage, Stage::Over) && this.singles.is_none();
        if !is_over && let Err(error) = check_forked() {
            // The drop of timers and of the source may need locks that a thread of the parent held.
            std::mem::forget((std::mem::replace(&mut this.stage, Stage::Over), this.singles.take()));
            (this.condition, this.current, this.events) = (None, None, None);
            this.early = Early::default();
            return Poll::Ready(Some(Err(error)));
        }
        if let Some(condition) = this.condition.take() {
            match Singles::start(&mut this.stage, condition) {
                Ok(singles) => this.singles = singles.map(Box::new),
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
        if let Some(singles) = &mut this.singles {
            let next = match this.is_ordered {
                true => ready!(singles.poll_in_order(cx)),
                false => ready!(singles.poll_any(cx)).map(|(_, result)| result),
            };
            // As below.
            singles.leave_line();
            if next.is_none() {
                (this.singles, this.events) = (None, None);
            }
            return Poll::Ready(next);
        }
        loop {
            if let Some(batch) = &mut this.current {
                if let Some(result) = batch.next() {
                    this.next += 1;
                    // What the caller does next may need the room.
                    this.stage.leave_line();
                    return Poll::Ready(Some(result));
                }
                this.current = None;
            }
            if this.is_ordered {
                this.current = this.early.take(this.next);
                if this.current.is_some() {
                    continue;
                }
            }
            match ready!(this.stage.poll_next(this.early.held(), cx)) {
                Some(batch) if this.is_ordered => this.early.insert(batch),
                Some(batch) => this.current = Some(batch),
                None => {
                    this.stage = Stage::Over;
                    this.events = None;
                    return Poll::Ready(None);
                }
            }
        }
    }
}
