//! The face: `apply`, `map`, `imap` on a fixed set of worker processes.

use super::checkout::Checkout;
use super::config::{PoolBuilder, Workers, checked};
use super::driver;
use super::encoded::{EncodedItems, EncodedRun};
use super::engine::{Handle, Shared, check_forked};
use super::flight::Target;
use super::handle::{AsyncResult, Call, Map, MapAsync, Results};
use super::input::{Input, OfIterator, OfStream, One, Packer};
use super::local;
use super::options::ChunkLimits;
use super::stats::PoolStats;
use super::taker::External;
use crate::error::{Error, Result};
use crate::os::{fork, memory, reactor, timer};
use crate::process::function::{Arguments, captures_nothing};
use crate::process::{Function, Task, entry};
use futures_util::{Stream, StreamExt};
use serde::Serialize;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime;

/// Worker processes that run functions: a handle, cheap to clone.
///
/// Workers are started with the pool and live until it is closed, terminated or dropped with its last result. A
/// function that panics, a worker that is killed and a task that overruns touch their own item and no other; a
/// worker that is gone is replaced. Must be made inside a tokio runtime, which then runs its dispatchers.
///
/// # Drop
/// With the last holder of a pool (`Pool`s and what they returned) those of its workers that have nothing to do end in
/// order: they run their [`finalizer`](PoolBuilder::finalizer) and exit, within the
/// [`exit_timeout`](PoolBuilder::exit_timeout). Those that still run an item or their initializer are killed. The drop
/// itself does not wait. [`run`](crate::run) waits for workers that end in order, and so does a child at its end; a
/// `main` that uses neither does not: there [`close`](Self::close) and [`join`](Self::join) the pool.
///
/// ```
/// use futures::TryStreamExt;
/// use multiprocess::{self as mp, Pool};
///
/// fn square(n: u64) -> u64 {
///     n * n
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let pool = Pool::new(2)?;
///         assert_eq!(pool.apply(square, (7,)).await?, 49);
///         let sum = pool.imap_unordered(square, 0..100).try_fold(0, async |sum, n| Ok(sum + n)).await?;
///         assert_eq!(sum, 328_350);
///         Ok(())
///     })
/// }
/// ```
#[derive(Clone)]
pub struct Pool {
    handle: Arc<Handle>,
}

impl PoolBuilder {
    /// Starts the pool; its workers come up in parallel.
    ///
    /// # Errors
    /// `Other` for 0 workers or tasks, or outside a tokio runtime; `Io` in one without its I/O or its timer; `Encode` if an argument of the initializer cannot be
    /// serialised; `NotInitialized` as for processes.
    pub fn build(self) -> Result<Pool> {
        let (config, start) = self.config()?;
        let outside = |error| Error::other(format!("a pool must be made inside a tokio runtime: {error}"));
        let runtime = runtime::Handle::try_current().map_err(outside)?;
        let failed = |error| Error::io("a pool cannot run here", error);
        reactor::has_io().and_then(|()| reactor::has_timer()).map_err(failed)?;
        crate::process::check_initialized()?;
        let shared = Shared::new(config, start)?;
        runtime.spawn(driver::drive(shared.clone()));
        Ok(Pool { handle: Arc::new(Handle::new(shared, runtime)) })
    }
}

fn tuples<A: Serialize + 'static>(tuples: impl Iterator<Item = A> + Send + 'static) -> Box<dyn Input> {
    Box::new(OfIterator(Packer::new(tuples)))
}

impl Pool {
    /// A pool of `workers` processes: a number, or a range as for [`PoolBuilder::workers`].
    ///
    /// # Errors
    /// As [`PoolBuilder::build`].
    pub fn new(workers: impl Workers) -> Result<Self> {
        Self::builder().workers(workers).build()
    }

    /// A pool whose one worker is a thread of this process, for tests and debuggers: the same calls, encoded and decoded
    /// as ever, one item at a time. A panic is an error as ever. What takes a process to promise is not promised: an
    /// item that has begun is not stopped by a timeout or a cancellation, one that crashes takes this process along,
    /// there is no [`current_task`](crate::current_task), and no [`checkout`](Self::checkout) or
    /// [`resize`](Self::resize).
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::in_process()?;
    /// assert_eq!(pool.apply(std::process::id, ()).await?, std::process::id());
    /// assert_eq!(pool.map(|x: u64| x * x, 1..=3).await?, [1, 4, 9]);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`PoolBuilder::build`].
    pub fn in_process() -> Result<Self> {
        let chunks = ChunkLimits::LOCAL;
        Self::builder().external(External { chunks, start: Box::new(local::start) }).build()
    }

    /// A pool with options.
    pub fn builder() -> PoolBuilder {
        PoolBuilder::default()
    }

    /// Runs `f(args..)` on a worker when awaited. Dropping the call cancels it.
    ///
    /// # Errors
    /// When awaited: `Panicked`, `ProcessDied`, `Timeout`, `Encode`, `Decode`, or `Closed` after [`close`](Self::close)
    /// and once the runtime that the pool was made in has ended.
    pub fn apply<F, A, M>(&self, f: F, args: A) -> Call<F::Output>
    where
        F: Function<A, M>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        Call::of(self.handle.clone(), f, args)
    }

    /// Runs a [`Task`] when awaited, as [`apply`](Self::apply) does with a function and its arguments.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool, Task};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(2)?;
    /// let tasks = vec![Task::of(|n: u64| n * n, (5,)), Task::of(|text: String| text.len() as u64, ("four".into(),))];
    /// let results = futures::future::try_join_all(tasks.into_iter().map(|task| pool.run(task))).await?;
    /// assert_eq!(results, [25, 4]);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// When awaited, as [`apply`](Self::apply).
    pub fn run<R>(&self, task: Task<R>) -> Call<R> {
        let label = std::any::type_name::<Task<R>>();
        let (target, input) = match task.into_work() {
            Ok(work) => {
                let input = One::of_encoded(&work.arguments).map(|one| Box::new(one) as Box<dyn Input>);
                (Target { call: work.call, label }, input)
            }
            // It is never called.
            Err(error) => (Target { call: entry::Call::of(|| ()), label }, Err(error)),
        };
        Call::new(self.handle.clone(), target, input)
    }

    /// Runs `f(args..)` on a worker from now on. Dropping the result lets it go on.
    ///
    /// # Errors
    /// When awaited, as [`apply`](Self::apply).
    pub fn apply_async<F, A, M>(&self, f: F, args: A) -> AsyncResult<F::Output>
    where
        F: Function<A, M>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        AsyncResult::start(self.handle.clone(), Target::of(f), One::input(&args))
    }

    /// [`apply_async`](Self::apply_async) if the pool lets one more item wait; never waits. The same as `apply_async` for
    /// a pool without [`max_waiting`](PoolBuilder::max_waiting).
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::builder().workers(1).max_waiting(100).build()?;
    /// assert_eq!(pool.try_apply(|x: u32| x + 1, (1,))?.await?, 2);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `Full` if as many items wait as may, or others wait for room; `Closed` and `Encode` as [`apply`](Self::apply). Those of
    /// the call itself come when the result is awaited.
    pub fn try_apply<F, A, M>(&self, f: F, args: A) -> Result<AsyncResult<F::Output>>
    where
        F: Function<A, M>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        AsyncResult::try_start(self.handle.clone(), Target::of(f), One::input(&args))
    }

    /// Runs `f` on each item when awaited; the results are in order.
    ///
    /// # Errors
    /// When awaited: that of the first item that fails.
    pub fn map<F, T, M, I>(&self, f: F, items: I) -> Map<F::Output>
    where
        F: Function<(T,), M>, // of one argument: for tuples of several there is `starmap`
        T: Arguments,
        I: IntoIterator<Item = T>,
        I::IntoIter: Send + 'static,
    {
        const { captures_nothing::<F>() };
        Map::new(self.handle.clone(), Target::of(f), tuples(items.into_iter().map(|item| (item,))))
    }

    /// [`map`](Self::map) for functions of several arguments: each item is a tuple of them.
    ///
    /// # Errors
    /// When awaited: that of the first item that fails.
    pub fn starmap<F, A, M, I>(&self, f: F, items: I) -> Map<F::Output>
    where
        F: Function<A, M>,
        A: Arguments,
        I: IntoIterator<Item = A>,
        I::IntoIter: Send + 'static,
    {
        const { captures_nothing::<F>() };
        Map::new(self.handle.clone(), Target::of(f), tuples(items.into_iter()))
    }

    /// [`map`](Self::map) that begins now. Dropping the result lets it go on.
    ///
    /// # Errors
    /// When awaited: that of the first item that fails.
    pub fn map_async<F, T, M, I>(&self, f: F, items: I) -> MapAsync<F::Output>
    where
        F: Function<(T,), M>, // of one argument: for tuples of several there is `starmap`
        F::Output: Unpin,
        T: Arguments,
        I: IntoIterator<Item = T>,
        I::IntoIter: Send + 'static,
    {
        const { captures_nothing::<F>() };
        MapAsync::start(self.map(f, items))
    }

    /// [`starmap`](Self::starmap) that begins now. Dropping the result lets it go on.
    ///
    /// # Errors
    /// When awaited: that of the first item that fails.
    pub fn starmap_async<F, A, M, I>(&self, f: F, items: I) -> MapAsync<F::Output>
    where
        F: Function<A, M>,
        F::Output: Unpin,
        A: Arguments,
        I: IntoIterator<Item = A>,
        I::IntoIter: Send + 'static,
    {
        const { captures_nothing::<F>() };
        MapAsync::start(self.starmap(f, items))
    }

    /// Runs `f` on each item and yields the results in order, as they come.
    pub fn imap<F, T, M, I>(&self, f: F, items: I) -> Results<F::Output>
    where
        F: Function<(T,), M>, // of one argument: for tuples of several there is `starmap`
        T: Arguments,
        I: IntoIterator<Item = T>,
        I::IntoIter: Send + 'static,
    {
        const { captures_nothing::<F>() };
        let source = tuples(items.into_iter().map(|item| (item,)));
        Results::new(self.handle.clone(), Target::of(f), source, true)
    }

    /// Runs `f` on each item and yields the results in any order, each as soon as it is made.
    pub fn imap_unordered<F, T, M, I>(&self, f: F, items: I) -> Results<F::Output>
    where
        F: Function<(T,), M>, // of one argument: for tuples of several there is `starmap`
        T: Arguments,
        I: IntoIterator<Item = T>,
        I::IntoIter: Send + 'static,
    {
        const { captures_nothing::<F>() };
        let source = tuples(items.into_iter().map(|item| (item,)));
        Results::new(self.handle.clone(), Target::of(f), source, false)
    }

    /// [`imap`](Self::imap) with a stream as its input.
    pub fn imap_stream<F, T, M, S>(&self, f: F, items: S) -> Results<F::Output>
    where
        F: Function<(T,), M>, // of one argument: for tuples of several there is `starmap`
        T: Arguments,
        S: Stream<Item = T> + Send + 'static,
    {
        const { captures_nothing::<F>() };
        let source = Box::new(OfStream(Packer::new(Box::pin(items.map(|item| (item,))))));
        Results::new(self.handle.clone(), Target::of(f), source, true)
    }

    /// Takes nothing more: what is asked for from now on fails with kind `Closed`. What was asked for before completes;
    /// then the workers end.
    ///
    /// A call counts as asked for when it is first polled. One with `_async` in its name, and a stream of [`imap`](Self::imap)
    /// and its like, do so when they are made; a stream must then be read to its end, or dropped. A
    /// [`Checkout`] that was waited for before keeps its worker, and its calls work, until it is dropped.
    ///
    /// ```
    /// use futures::TryStreamExt;
    /// use multiprocess::{self as mp, Pool};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(2)?;
    /// let squares = pool.imap(|x: u64| x * x, 1..=3);
    /// pool.close();
    /// assert_eq!(squares.try_collect::<Vec<_>>().await?, [1, 4, 9]);
    /// assert_eq!(pool.apply(|| 7, ()).await.unwrap_err().kind(), mp::ErrorKind::Closed);
    /// pool.join().await?;
    /// # Ok(()) }) }
    /// ```
    pub fn close(&self) {
        self.handle.shared().close();
    }

    /// Stops everything: workers are killed, and what is not done fails with kind `Cancelled`.
    pub fn terminate(&self) {
        self.handle.shared().terminate();
    }

    /// Changes how many workers there are. Those too many end when they are done with their task, which this waits
    /// for, unless somebody else wants more meanwhile; new ones are on their way. Cancel-safe: dropped, it goes on all the
    /// same.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(1)?;
    /// pool.resize(3).await?;
    /// assert_eq!(pool.workers(), 3);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `Other` for 0 workers.
    pub async fn resize(&self, workers: impl Workers) -> Result<()> {
        check_forked()?;
        self.has_processes("resized")?;
        let range = checked(workers)?;
        let mut running = self.handle.shared().running.subscribe();
        self.handle.shared().resize(range.clone());
        // The sender lives in what we hold. Another resize may want more than this one.
        while *running.borrow_and_update() > *range.end() && self.handle.shared().most_workers() <= *range.end() {
            let _ = running.changed().await;
        }
        Ok(())
    }

    /// Fails for a pool without worker processes, which cannot be `why`.
    fn has_processes(&self, why: &str) -> Result<()> {
        self.handle.shared().taker().map_or(Ok(()), |taker| Err(taker.refuse(why)))
    }

    /// What executes the items, if that is not worker processes.
    #[cfg(feature = "cluster")]
    pub(crate) fn taker(&self) -> Option<&Arc<dyn super::taker::Taker>> {
        self.handle.shared().taker()
    }

    #[cfg(feature = "cluster")]
    pub(crate) fn runtime(&self) -> &runtime::Handle {
        self.handle.runtime()
    }

    /// How many items it may run at the same time.
    #[cfg(feature = "cluster")]
    pub(crate) fn slots(&self) -> usize {
        self.handle.shared().slots(false)
    }

    /// Runs items that are encoded already, and gives their results back encoded; see [`encoded`](super::encoded).
    ///
    /// # Errors
    /// `Decode` if the function is none of this program's, or the records are not whole; `Closed` after
    /// [`close`](Self::close).
    #[allow(dead_code)] // For the room above.
    pub(crate) fn run_encoded(&self, items: EncodedItems) -> Result<EncodedRun> {
        EncodedRun::start(self.handle.clone(), items)
    }

    /// Takes one worker out of the pool, for a run of calls that share what they leave in it, such as a connection or
    /// a cache in a `static`. Waits until a worker is free; others wait as long as that takes. While it is out,
    /// nobody else uses it and it is not replaced for its age, size or share of tasks. If it dies, the calls of the
    /// checkout fail. Cancel-safe.
    ///
    /// A worker that is stopped (SIGSTOP, a debugger) is passed over as soon as another one is free. If all free workers are
    /// stopped, it waits until one of them goes on or another one becomes free; a timeout around it limits that.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    ///
    /// static COUNT: AtomicU32 = AtomicU32::new(0);
    ///
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(2)?;
    /// let worker = pool.checkout().await?;
    /// for n in 0..10 {
    ///     assert_eq!(worker.apply(|| COUNT.fetch_add(1, Relaxed), ()).await?, n);
    /// }
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `Closed` after [`close`](Self::close) and once the pool's runtime has ended, `Other` for a pool that is broken or has no
    /// processes.
    pub async fn checkout(&self) -> Result<Checkout> {
        self.has_processes("checked out")?;
        Checkout::take(self.handle.clone()).await
    }

    /// How many workers there are, those included that are being started or are about to end.
    pub fn workers(&self) -> usize {
        let running = *self.handle.shared().running.borrow();
        match self.handle.shared().taker() {
            Some(_) if running > 0 => self.handle.shared().external_slots(),
            _ => running,
        }
    }

    /// Takes nothing more, gives up what has not begun, and lets what runs go on for at most `grace`; then workers are
    /// killed. What is given up fails with kind `Cancelled`. Dropped, the pool goes on ending, without the kill.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// use std::time::Duration;
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(1)?;
    /// let result = pool.apply_async(|| 7, ());
    /// result.await?;
    /// let report = pool.shutdown(Duration::from_secs(5)).await;
    /// assert_eq!((report.not_begun(), report.killed()), (0, 0));
    /// # Ok(()) }) }
    /// ```
    pub async fn shutdown(&self, grace: Duration) -> Shutdown {
        if fork::is_forked() {
            return Shutdown { not_begun: 0, killed: 0 };
        }
        let shared = self.handle.shared();
        let not_begun = shared.shut();
        let mut running = shared.running.subscribe();
        let ended = async |running: &mut tokio::sync::watch::Receiver<usize>| {
            // The sender lives in what we hold.
            let _ = running.wait_for(|running| *running == 0).await;
        };
        let mut killed = 0;
        // By the pool's runtime: that of the caller may have no timer. If it has ended, the grace is over.
        let mut alarm = self.handle.runtime().spawn(timer::sleep(grace));
        let is_over = tokio::select! {
            biased;
            () = ended(&mut running) => false,
            _ = &mut alarm => true,
        };
        alarm.abort();
        if is_over {
            killed = shared.unsettled();
            shared.terminate();
            ended(&mut running).await;
        }
        Shutdown { not_begun, killed }
    }

    /// What the pool is doing now, and how long items have waited and run.
    ///
    /// Costs the pool's lock for a moment, and one small file of /proc per worker for its memory. The figures are
    /// kept all the time: a few additions per order.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(2)?;
    /// pool.map(|x: u64| x + 1, 0..100).await?;
    /// let stats = pool.stats();
    /// assert_eq!((stats.queued, stats.running), (0, 0));
    /// assert_eq!(stats.workers.iter().map(|worker| worker.tasks).sum::<u64>(), 100);
    /// assert!(stats.runs.quantile(0.5) <= stats.runs.quantile(0.99));
    /// # Ok(()) }) }
    /// ```
    pub fn stats(&self) -> PoolStats {
        if fork::is_forked() {
            return PoolStats::default();
        }
        let mut stats = self.handle.shared().stats();
        self.handle.shared().taker().into_iter().for_each(|taker| taker.add_stats(&mut stats));
        for worker in &mut stats.workers {
            (worker.resident, worker.peak) = match memory::resident_of(worker.pid) {
                (0, _) => (0, worker.peak),
                now => now,
            };
        }
        stats
    }

    /// Why no worker can be had any more, if that is so: the initializer failed, or workers died one after the other without
    /// having done anything, or could not be started, and no other serves. Everything asked of the pool then fails and
    /// says so. As long as some worker serves, those that are missing are tried again, every few seconds at last.
    pub fn broken(&self) -> Option<String> {
        self.handle.shared().is_broken()
    }

    /// Gives a [`broken`](Self::broken) pool another chance: workers are started again.
    pub fn revive(&self) {
        self.handle.shared().revive();
    }

    /// Waits until all workers have ended, after [`close`](Self::close) or [`terminate`](Self::terminate). Cancel-safe.
    /// After a close that includes what was asked for before it: a stream that is neither read nor dropped, or a
    /// [`Checkout`] that is held, keeps this waiting.
    ///
    /// # Errors
    /// `Other` if the pool is neither closed nor terminated: it would wait for ever.
    pub async fn join(&self) -> Result<()> {
        check_forked()?;
        if !self.handle.shared().is_closed() {
            return Err(Error::other("close or terminate a pool before joining it"));
        }
        let mut running = self.handle.shared().running.subscribe();
        // The sender lives in what we hold.
        let _ = running.wait_for(|running| *running == 0).await;
        Ok(())
    }
}

/// Streams whose items run in a pool.
///
/// ```
/// use futures::{StreamExt, TryStreamExt, stream};
/// use multiprocess::{self as mp, Pool, PoolStreamExt};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(2)?;
/// let squares = stream::iter(1..=4).map_in_pool(&pool, |x: u64| x * x);
/// assert_eq!(squares.map_ok(|x| x + 1).try_collect::<Vec<_>>().await?, [2, 5, 10, 17]);
/// # Ok(()) }) }
/// ```
pub trait PoolStreamExt: Stream + Sized {
    /// Runs `f` on each item, and yields the results in order: [`Pool::imap_stream`] from the other side.
    fn map_in_pool<F, M>(self, pool: &Pool, f: F) -> Results<F::Output>
    where
        F: Function<(Self::Item,), M>,
        Self: Send + 'static,
        Self::Item: Arguments,
    {
        const { captures_nothing::<F>() };
        pool.imap_stream(f, self)
    }
}

impl<S: Stream> PoolStreamExt for S {}

/// What a [`Pool::shutdown`] lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shutdown {
    not_begun: usize,
    killed: usize,
}

impl Shutdown {
    /// Items that were handed to the pool and never started.
    pub fn not_begun(&self) -> usize {
        self.not_begun
    }

    /// Items that ran, and were killed when the grace was over.
    pub fn killed(&self) -> usize {
        self.killed
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = self.handle.shared();
        let mut debug = f.debug_struct("Pool");
        debug.field("workers", &*shared.running.borrow()).field("is_closed", &shared.is_closed()).finish()
    }
}
