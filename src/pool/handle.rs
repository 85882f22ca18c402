//! What a caller awaits. Encoding and decoding happen here, in the caller's task.

use super::group::{Group, Job, Options};
use super::pool::Handle;
use super::protocol::Report;
use crate::error::{Error, ErrorKind, Result};
use crate::process::entry::{self, Outcome};
use crate::wire::Sealed;
use futures::Stream;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// Where the encoded arguments of the items come from.
pub(super) enum Source {
    Iterator(Box<dyn FnMut() -> Option<Result<Sealed>> + Send>),
    Stream(Pin<Box<dyn Stream<Item = Result<Sealed>> + Send>>),
}

/// What is to be called.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) call: entry::Call,
    pub(super) label: &'static str,
}

/// The items of one call in flight: pulls them in, hands them on, gives their outcomes back as they come.
struct Flight {
    pool: Arc<Handle>,
    group: Arc<Group>,
    source: Option<Source>,
    /// What the source itself had to say, in the place of an item.
    failed: Option<(u64, Error)>,
    pulled: u64,
    returned: u64,
}

/// Items in flight per worker, in batches.
const BATCHES_AHEAD: usize = 4;
/// Bytes of arguments in flight, beyond which only one item per worker is pulled.
const BYTES_AHEAD: usize = 64 << 20;

impl Flight {
    fn start(pool: Arc<Handle>, target: Target, options: Options, source: Source) -> Result<Self> {
        pool.shared().open()?;
        let group = Arc::new(Group::new(target.call, target.label, options));
        Ok(Self { pool, group, source: Some(source), failed: None, pulled: 0, returned: 0 })
    }

    fn in_flight(&self) -> usize {
        (self.pulled - self.returned) as usize
    }

    fn window(&self) -> usize {
        self.pool.shared().settings.workers * self.group.batch_size().max(1) * BATCHES_AHEAD
    }

    /// Pulls until enough is in flight, or the source ends or is not ready.
    fn refill(&mut self, held: usize, cx: &mut Context<'_>) {
        let mut bytes = 0;
        while self.in_flight() + held < self.window() && (bytes < BYTES_AHEAD || self.in_flight() == 0) {
            let Some(source) = &mut self.source else { return };
            let next = match source {
                Source::Iterator(next) => catch_unwind(AssertUnwindSafe(next)).unwrap_or_else(|payload| {
                    let text = entry::text_of(&*payload);
                    self.failed = Some((
                        self.pulled,
                        Error::new(ErrorKind::Panicked, format!("the source of items panicked: {text}")),
                    ));
                    None
                }),
                Source::Stream(stream) => match stream.as_mut().poll_next(cx) {
                    Poll::Ready(next) => next,
                    Poll::Pending => return,
                },
            };
            match next {
                Some(Ok(arguments)) => {
                    bytes += arguments.len();
                    self.pool.shared().submit(&self.group, Job { index: self.pulled, arguments, attempts: 0 });
                }
                Some(Err(error)) => self.group.settle(self.pulled, Err(error)),
                None => {
                    self.source = None;
                    self.pool.shared().finish();
                    return;
                }
            }
            self.pulled += 1;
        }
    }

    /// The next outcome in whatever order; `None` after the last. `held` outcomes are waiting for their turn.
    fn poll_next(&mut self, held: usize, cx: &mut Context<'_>) -> Poll<Option<(u64, Result<Report>)>> {
        self.refill(held, cx);
        if self.in_flight() == 0 && self.source.is_none() {
            return Poll::Ready(self.failed.take().map(|(index, error)| (index, Err(error))));
        }
        let done = ready!(self.group.poll_done(cx));
        self.returned += 1;
        Poll::Ready(Some(done))
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if self.source.take().is_some() {
            self.pool.shared().finish();
        }
        if self.in_flight() > 0 {
            self.group.cancel();
        }
    }
}

fn read<R: DeserializeOwned + 'static>(outcome: Result<Report>) -> Result<R> {
    Outcome::read(outcome?.open()?)
}

/// A call that has not begun, or a flight.
enum Stage {
    Planned { pool: Arc<Handle>, target: Target, options: Options, source: Source },
    Flying(Flight),
    Failed(Error),
    Over,
}

impl Stage {
    fn options(&mut self) -> Option<&mut Options> {
        match self {
            Stage::Planned { options, .. } => Some(options),
            _ => None,
        }
    }

    fn flight(&mut self) -> Result<Option<&mut Flight>> {
        if matches!(self, Stage::Planned { .. } | Stage::Failed(_)) {
            match std::mem::replace(self, Stage::Over) {
                Stage::Planned { pool, target, options, source } => {
                    *self = Stage::Flying(Flight::start(pool, target, options, source)?);
                }
                Stage::Failed(error) => return Err(error),
                Stage::Flying(_) | Stage::Over => {}
            }
        }
        Ok(match self {
            Stage::Flying(flight) => Some(flight),
            _ => None,
        })
    }

    fn poll_next(&mut self, held: usize, cx: &mut Context<'_>) -> Poll<Option<(u64, Result<Report>)>> {
        match self.flight() {
            Ok(Some(flight)) => flight.poll_next(held, cx),
            Ok(None) => Poll::Ready(None),
            Err(error) => Poll::Ready(Some((0, Err(error)))),
        }
    }
}

macro_rules! options {
    ($name:ident) => {
        impl<R> $name<R> {
            /// Kills the worker of an item that runs longer than `timeout`, counted from the item's start, and
            /// replaces it; the item fails with kind `Timeout`, others are not touched. Items then travel one by one.
            pub fn timeout(mut self, timeout: Duration) -> Self {
                self.stage.options().into_iter().for_each(|options| options.timeout = Some(timeout));
                self
            }

            /// Tries an item again, up to `retries` times, whose worker died or that overran its time.
            pub fn retries(mut self, retries: u32) -> Self {
                self.stage.options().into_iter().for_each(|options| options.retries = retries);
                self
            }
        }
    };
}

macro_rules! chunksize {
    ($name:ident) => {
        impl<R> $name<R> {
            /// How many items travel to a worker together; 0, the default, aims at about a millisecond of work.
            pub fn chunksize(mut self, items: usize) -> Self {
                self.stage.options().into_iter().for_each(|options| options.chunk = items);
                self
            }
        }
    };
}

/// One lazy call; made by [`Pool::apply`](crate::Pool::apply). Awaiting it runs it; dropping it cancels it: not yet
/// begun, it never is; running, its worker is stopped and replaced.
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
#[must_use = "a call runs when it is awaited"]
pub struct Call<R> {
    stage: Stage,
    result: PhantomData<fn() -> R>,
}

options!(Call);

impl<R> Call<R> {
    pub(super) fn new(pool: Arc<Handle>, target: Target, arguments: Result<Sealed>) -> Self {
        Self { stage: planned_one(pool, target, arguments), result: PhantomData }
    }
}

fn planned_one(pool: Arc<Handle>, target: Target, arguments: Result<Sealed>) -> Stage {
    match arguments {
        Ok(arguments) => {
            let mut arguments = Some(Ok(arguments));
            let source = Source::Iterator(Box::new(move || arguments.take()));
            Stage::Planned { pool, target, options: Options::default(), source }
        }
        Err(error) => Stage::Failed(error),
    }
}

fn poll_one<R: DeserializeOwned + 'static>(stage: &mut Stage, cx: &mut Context<'_>) -> Poll<Result<R>> {
    let done = ready!(stage.poll_next(0, cx));
    *stage = Stage::Over;
    Poll::Ready(match done {
        Some((_, outcome)) => read(outcome),
        None => Err(Error::other("the result of this call has already been taken")),
    })
}

impl<R: DeserializeOwned + 'static> Future for Call<R> {
    type Output = Result<R>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<R>> {
        poll_one(&mut self.stage, cx)
    }
}

/// A call that already runs; made by [`Pool::apply_async`](crate::Pool::apply_async). Dropping it lets it go on.
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
pub struct AsyncResult<R> {
    stage: Stage,
    result: PhantomData<fn() -> R>,
}

impl<R> AsyncResult<R> {
    pub(super) fn start(pool: Arc<Handle>, target: Target, arguments: Result<Sealed>) -> Self {
        Self { stage: started(planned_one(pool, target, arguments)), result: PhantomData }
    }

    /// Whether the result is there.
    pub fn ready(&self) -> bool {
        match &self.stage {
            Stage::Flying(flight) => flight.group.has_done(),
            Stage::Failed(_) | Stage::Over => true,
            Stage::Planned { .. } => false,
        }
    }

    /// Cancels the call: if it has not begun it never does; if it runs its worker is stopped and replaced. The
    /// result is then of kind `Cancelled`, unless it was there already.
    pub fn cancel(&self) {
        if let Stage::Flying(Flight { group, .. }) = &self.stage
            && !group.has_done()
        {
            group.fail_pending(|| group.was_cancelled());
            group.cancel();
        }
    }
}

/// Hands everything the source has to the pool now.
fn started(mut stage: Stage) -> Stage {
    match stage.flight() {
        Ok(Some(flight)) => flight.refill(0, &mut Context::from_waker(std::task::Waker::noop())),
        Ok(None) => {}
        Err(error) => return Stage::Failed(error),
    }
    stage
}

impl<R> Drop for AsyncResult<R> {
    fn drop(&mut self) {
        if let Stage::Flying(flight) = &mut self.stage {
            // Nothing is in flight any more as far as dropping the flight is concerned: it is not cancelled.
            flight.returned = flight.pulled;
        }
    }
}

impl<R: DeserializeOwned + 'static> Future for AsyncResult<R> {
    type Output = Result<R>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<R>> {
        poll_one(&mut self.stage, cx)
    }
}

/// All results in order; made by [`Pool::map`](crate::Pool::map). Awaiting it runs it; dropping it cancels the rest.
/// The first item that fails is its error, and cancels the rest.
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(2)?;
/// let squares: Vec<u64> = pool.map(|x: u64| x * x, 1..=4).await?;
/// assert_eq!(squares, [1, 4, 9, 16]);
/// # Ok(()) }) }
/// ```
#[must_use = "a map runs when it is awaited"]
pub struct Map<R> {
    stage: Stage,
    results: BTreeMap<u64, R>,
}

options!(Map);
chunksize!(Map);

impl<R> Map<R> {
    pub(super) fn new(pool: Arc<Handle>, target: Target, source: Source) -> Self {
        let stage = Stage::Planned { pool, target, options: Options::default(), source };
        Self { stage, results: BTreeMap::new() }
    }
}

impl<R: DeserializeOwned + Unpin + 'static> Future for Map<R> {
    type Output = Result<Vec<R>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        loop {
            match ready!(this.stage.poll_next(0, cx)) {
                Some((index, outcome)) => match read(outcome) {
                    Ok(result) => drop(this.results.insert(index, result)),
                    Err(error) => {
                        this.stage = Stage::Over;
                        return Poll::Ready(Err(error));
                    }
                },
                None => {
                    this.stage = Stage::Over;
                    return Poll::Ready(Ok(std::mem::take(&mut this.results).into_values().collect()));
                }
            }
        }
    }
}

/// All results in order, of items that already run; made by [`Pool::map_async`](crate::Pool::map_async). Dropping it
/// lets them go on.
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(2)?;
/// let cubes = pool.map_async(|x: u64| x * x * x, vec![1, 2, 3]);
/// assert_eq!(cubes.await?, [1, 8, 27]);
/// # Ok(()) }) }
/// ```
pub struct MapAsync<R>(tokio::task::JoinHandle<Result<Vec<R>>>);

impl<R: DeserializeOwned + Send + Unpin + 'static> MapAsync<R> {
    pub(super) fn start(map: Map<R>) -> Self {
        Self(map.stage_runtime().spawn(map))
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
        let joined = ready!(Pin::new(&mut self.0).poll(cx));
        Poll::Ready(joined.unwrap_or_else(|error| Err(Error::other(error))))
    }
}

/// The results as a stream; made by [`Pool::imap`](crate::Pool::imap) and its like. Input is pulled as results are
/// taken: a few batches per worker ahead, never more. An item that fails is an `Err` in the stream, which goes on.
/// Dropping it cancels the rest.
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
#[must_use = "a stream does nothing unless it is polled"]
pub struct Results<R> {
    stage: Stage,
    is_ordered: bool,
    next: u64,
    early: BTreeMap<u64, Result<Report>>,
    result: PhantomData<fn() -> R>,
}

options!(Results);
chunksize!(Results);

impl<R> Results<R> {
    pub(super) fn new(pool: Arc<Handle>, target: Target, source: Source, is_ordered: bool) -> Self {
        let stage = Stage::Planned { pool, target, options: Options::default(), source };
        Self { stage, is_ordered, next: 0, early: BTreeMap::new(), result: PhantomData }
    }
}

impl<R: DeserializeOwned + 'static> Stream for Results<R> {
    type Item = Result<R>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<R>>> {
        let this = &mut *self;
        loop {
            if let Some(outcome) = this.early.remove(&this.next) {
                this.next += 1;
                return Poll::Ready(Some(read(outcome)));
            }
            match ready!(this.stage.poll_next(this.early.len(), cx)) {
                Some((_, outcome)) if !this.is_ordered => return Poll::Ready(Some(read(outcome))),
                Some((index, outcome)) => drop(this.early.insert(index, outcome)),
                None => {
                    this.stage = Stage::Over;
                    return Poll::Ready(None);
                }
            }
        }
    }
}
