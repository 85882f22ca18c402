//! The public type `Pool`, with `apply`, `map`, `imap` and the life of a pool.

use super::checkout::Checkout;
use super::config::{PoolBuilder, Workers, checked};
use super::driver;
use super::encoded::{EncodedItems, EncodedRun};
use super::engine::{PoolLifetime, Shared, check_forked};
use super::flight::Target;
use super::handle::{AsyncResult, Call, Map, MapAsync, Results};
use super::input::{Input, OfIterator, OfStream, One, Packer};
use super::local;
use super::options::ChunkLimits;
#[cfg(feature = "tower")]
use super::service::PoolService;
use super::stats::{Deaths, PoolStats};
use super::taker::External;
use crate::error::{Error, Result, Topic};
use crate::os::{fork, memory, reactor, timer};
use crate::process::function::{Arguments, captures_nothing};
use crate::process::{Function, Task, entry};
use futures_util::{Stream, StreamExt};
use serde::Serialize;
use std::fmt;
use std::sync::Arc;
#[cfg(any(feature = "dashboard", feature = "metrics"))]
use std::sync::Weak;
use std::time::Duration;
use tokio::runtime;

/// A pool of worker processes that run functions. Cheap to clone: all clones are one pool.
///
/// Use instead:
/// - [`Process`](crate::Process) for one function that runs long;
/// - [`Group`](crate::Group) for several children that end together;
/// - `tokio::task::spawn_blocking` for work that needs no process.
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
///
/// An *item* is one call of a function: `apply` has one, `map` has one for each value. (Options and counts with `tasks` in their
/// name mean the same.) An item is *submitted* when the pool accepts it: at once, or, with
/// [`max_waiting`](PoolBuilder::max_waiting), when there is room.
///
/// The workers start with the pool and live until it is closed, terminated or dropped. A function that panics, a worker that is
/// killed and an item that overruns its time fail their own item and no other; the pool replaces a worker that is gone.
///
/// A pool must be made inside a tokio runtime. That runtime starts the workers and keeps the deadlines of all calls, so the pool ends
/// with it: pending calls then fail with kind `Cancelled`, and new calls with kind `Closed`.
///
/// # Waiting
/// - [`apply`](Self::apply), [`map`](Self::map) and [`imap`](Self::imap) run when they are awaited or polled, their `_async` forms at once.
/// - Each result wakes its own caller; there is no task in between, and callers do not depend on each other.
/// - In a pool with [`max_waiting`](PoolBuilder::max_waiting), a call waits for room before its item is submitted.
///
/// # Death
/// - A worker that dies fails the one item that it ran, with kind `ProcessDied`; [`retries`](Call::retries) run it again. Items it had not
///   begun go to other workers.
/// - If several workers die one after the other before they have done anything, the pool is [`broken`](Self::broken).
/// - Workers never outlive this process: the kernel kills them with it.
///
/// # Cost
/// - An `apply` on a worker that is awake takes a few µs and no system call; one that has to wake the worker takes some tens of µs.
/// - Items of a `map` are sent in chunks of about a millisecond of work: small ones cost about 0.1 µs each.
/// - Arguments and results above 16 KiB are copied once more than small ones, through a pipe beside the worker's ring.
///
/// # Drop
/// The pool ends when the last `Pool`, call and stream of it is dropped. Workers without work exit normally: they run their
/// [`finalizer`](PoolBuilder::finalizer) and exit within the [`exit_timeout`](PoolBuilder::exit_timeout). Workers that still run an item or
/// their initializer are killed. The drop itself does not wait. [`run`](crate::run) waits for workers that exit normally, and so does a
/// child process at its end. A `main` that uses neither does not: [`close`](Self::close) and [`join`](Self::join) the pool there.
#[derive(Clone)]
pub struct Pool {
    handle: Arc<PoolLifetime>,
}

impl PoolBuilder {
    /// Starts the pool. Its workers start in parallel, in the background; calls may be made at once.
    ///
    /// # Errors
    /// - `Other` for 0 or more than 4096 workers, `max_tasks_per_worker(0)`, `max_waiting(0)`, a CPU number that cannot
    ///   exist, an option of worker processes on a pool of a cluster, or outside a tokio runtime.
    /// - `Io` in a runtime without its I/O or its timer, or if there is no memory that the workers can share.
    /// - `Encode` if an argument of the initializer or the finalizer cannot be serialised.
    /// - `NotInitialized` as for [`Process::spawn`](crate::Process::spawn).
    pub fn build(self) -> Result<Pool> {
        let (config, start) = self.config()?;
        let outside = |error| {
            let text = format!("a pool must be made inside a tokio runtime: {error}");
            Error::other(text).explained_by(Topic::NoRuntime)
        };
        let runtime = runtime::Handle::try_current().map_err(outside)?;
        let failed = |error| Error::io("a pool cannot run here", error);
        reactor::has_io().and_then(|()| reactor::has_timer()).map_err(failed)?;
        crate::process::check_initialized()?;
        let shared = Shared::new(config, start)?;
        runtime.spawn(driver::drive(shared.clone()));
        Ok(Pool { handle: Arc::new(PoolLifetime::new(shared, runtime)) })
    }
}

fn tuples<A: Serialize + 'static>(tuples: impl Iterator<Item = A> + Send + 'static) -> Box<dyn Input> {
    Box::new(OfIterator(Packer::new(tuples)))
}

/// The figures of a pool without its deaths, and these as they are shared.
fn stats_of(handle: &PoolLifetime) -> (PoolStats, Deaths) {
    if fork::is_forked() {
        return Default::default();
    }
    let (mut stats, deaths) = handle.shared().stats();
    handle.shared().taker().into_iter().for_each(|taker| taker.add_stats(&mut stats));
    for worker in &mut stats.workers {
        (worker.resident, worker.peak) = match memory::resident_of(worker.pid) {
            (0, _) => (0, worker.peak),
            now => now,
        };
    }
    (stats, deaths)
}

/// The stats of a pool that it does not keep alive.
#[cfg(any(feature = "dashboard", feature = "metrics"))]
pub(crate) struct StatsSource(Weak<PoolLifetime>);

#[cfg(any(feature = "dashboard", feature = "metrics"))]
impl StatsSource {
    /// The stats without the deaths, and these; `None` after the drop of the pool. Reads a file of /proc per worker.
    pub(crate) fn stats(&self) -> Option<(PoolStats, Deaths)> {
        let handle = self.0.upgrade()?;
        // What reads stats may be a thread of no runtime, and may be left with the last handle: the end of a pool runs code of others.
        let runtime = handle.runtime().clone();
        let _entered = runtime.enter();
        let stats = stats_of(&handle);
        drop(handle);
        Some(stats)
    }
}

impl Pool {
    /// Starts a pool of `workers` processes: a number, or a range as in [`PoolBuilder::workers`].
    ///
    /// # Errors
    /// As [`PoolBuilder::build`].
    pub fn new(workers: impl Workers) -> Result<Self> {
        Self::builder().workers(workers).build()
    }

    /// Starts a pool whose only worker is a thread of this process, for tests and debuggers.
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
    /// All calls work as in any pool: arguments and results are encoded and decoded, and a panic is an error of its item. The thread runs one
    /// item at a time. Guarantees that need a process do not hold:
    ///
    /// - An item that has begun is not stopped by a timeout or a cancellation.
    /// - An item that crashes ends this process.
    /// - There is no [`checkout`](Self::checkout) or [`resize`](Self::resize).
    ///
    /// # Errors
    /// As [`PoolBuilder::build`].
    pub fn in_process() -> Result<Self> {
        let chunks = ChunkLimits::LOCAL;
        Self::builder().external(External { chunks, start: Box::new(local::start) }).build()
    }

    /// Returns a builder, to start a pool with options.
    pub fn builder() -> PoolBuilder {
        PoolBuilder::default()
    }

    /// Runs `f(args..)` on a worker and returns its result, when awaited.
    ///
    /// Dropping the call cancels it. An item that has not started never starts. A running item is asked to stop
    /// ([`CurrentTask::is_cancelled`](crate::CurrentTask::is_cancelled)), and its worker is killed after the [`grace`](PoolBuilder::grace).
    ///
    /// # Errors
    /// When awaited:
    /// - `Panicked` if the function panics.
    /// - `ProcessDied` if its worker dies, `MemoryLimit` if the worker died because it reached its [`memory_limit`](PoolBuilder::memory_limit).
    /// - `Timeout` after [`timeout`](Call::timeout) and the grace, or after [`queue_timeout`](Call::queue_timeout);
    ///   `Full` with [`reject_when_full`](Call::reject_when_full).
    /// - `Encode` if an argument or the result cannot be serialised, `Decode` if either cannot be read.
    /// - `Cancelled` if the pool is terminated or shut down first, `Closed` after [`close`](Self::close).
    /// - `Closed` if the runtime that the pool was made in had ended before the call, `Cancelled` if it ends during the call.
    /// - `Io` if there is no memory for the argument or the result.
    /// - `Corrupt` if the memory that the pool shares with the worker is damaged. The worker is replaced.
    /// - `Forked` in a process forked from the one that made the pool.
    /// - `Other` if the pool is [`broken`](Self::broken).
    pub fn apply<F, A, M>(&self, f: F, args: A) -> Call<F::Output>
    where
        F: Function<A, M>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        Call::of(self.handle.clone(), f, args)
    }

    /// Returns a [`tower::Service`](PoolService) whose requests are arguments of `f`, a function of one argument.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// use tower::ServiceExt;
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(2)?;
    /// assert_eq!(pool.service(|n: u64| n * n).oneshot(7).await?, 49);
    /// # Ok(()) }) }
    /// ```
    ///
    /// The service keeps the pool alive. It is ready when the pool has room for one more waiting item.
    #[cfg(feature = "tower")]
    pub fn service<F, T, M>(&self, f: F) -> PoolService<T, F::Output>
    where
        F: Function<(T,), M>,
        T: Arguments,
    {
        const { captures_nothing::<F>() };
        PoolService::new(self.handle.clone(), f)
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

    /// Starts `f(args..)` on a worker now, and returns a future of the result.
    ///
    /// Dropping the future does not cancel the call; [`AsyncResult::cancel`] cancels it. In a pool that is full by
    /// [`max_waiting`](crate::PoolBuilder::max_waiting) the call is submitted only while its future is awaited, and a drop cancels it until then.
    /// The call has no options such as a timeout: for these give [`apply`](Self::apply) to `tokio::spawn`.
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

    /// Starts `f(args..)` on a worker now, if the pool has room for one more waiting item. Never waits.
    ///
    /// The same as [`apply_async`](Self::apply_async) for a pool without [`max_waiting`](PoolBuilder::max_waiting).
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
    /// - `Full` if the limit of waiting items is reached, or other callers wait for room.
    /// - `Closed`, `Encode` and `Forked` as [`apply`](Self::apply), and `Other` for a broken pool. The awaited result has the other errors.
    pub fn try_apply<F, A, M>(&self, f: F, args: A) -> Result<AsyncResult<F::Output>>
    where
        F: Function<A, M>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        AsyncResult::try_start(self.handle.clone(), Target::of(f), One::input(&args))
    }

    /// Runs `f` on each item when awaited, and returns all results in order.
    ///
    /// The failure that arrives first, of whichever item, ends the map with its error and cancels the rest. An `Err` that `f` returns is no failure but
    /// a part of the results. Dropping the map cancels the rest.
    ///
    /// The task that polls the map calls `next` of the iterator and encodes the items, so an iterator that takes long delays that task.
    ///
    /// # Errors
    /// When awaited, the error that arrives first; see [`apply`](Self::apply) for the kinds. `Panicked` if the iterator
    /// panics.
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

    /// Runs `f` on each tuple of arguments. Apart from that it behaves as [`map`](Self::map).
    ///
    /// # Errors
    /// As [`map`](Self::map).
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

    /// Starts a [`map`](Self::map) now, and returns a future of its results. Dropping the future does not cancel the map.
    ///
    /// # Errors
    /// As [`map`](Self::map).
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

    /// Starts a [`starmap`](Self::starmap) now, and returns a future of its results. Dropping the future does not cancel it.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let pool = multiprocess::Pool::new(2)?;
    /// let sums = pool.starmap_async(|a: u32, b: u32| a + b, [(1, 2), (3, 4)]);
    /// assert_eq!(sums.await?, [3, 7]);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`map`](Self::map).
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

    /// Runs `f` on each item and returns the results as a stream, in order.
    ///
    /// Items are taken from the iterator as results are taken from the stream, some chunks per worker ahead. An item that fails is an `Err` in the
    /// stream, which goes on. Dropping the stream cancels the rest.
    ///
    /// # Errors
    /// Each item of the stream as [`apply`](Self::apply). The stream ends after `Closed`, and after `Panicked` if the iterator panics.
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

    /// Runs `f` on each item and returns the results as a stream, each as soon as it is there, in any order.
    ///
    /// Apart from that it behaves as [`imap`](Self::imap).
    ///
    /// # Errors
    /// As [`imap`](Self::imap).
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

    /// Runs `f` on each item of a stream and returns the results as a stream, in order.
    ///
    /// Apart from that it behaves as [`imap`](Self::imap).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use futures::{TryStreamExt, stream};
    /// let pool = multiprocess::Pool::new(2)?;
    /// let squares = pool.imap_stream(|x: u64| x * x, stream::iter(1..=3));
    /// assert_eq!(squares.try_collect::<Vec<_>>().await?, [1, 4, 9]);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`imap`](Self::imap).
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

    /// Closes the pool: calls made from now on fail with kind `Closed`. Calls made before complete; then the workers end. Returns at
    /// once; [`join`](Self::join) waits.
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
    ///
    /// A call counts as made when it is first polled. One with `_async` in its name, and a stream of [`imap`](Self::imap) and its like, counts
    /// when it is created; such a stream must then be read to its end, or dropped. A [`Checkout`] that was taken before the close keeps its worker until it is
    /// dropped, and calls on it work.
    pub fn close(&self) {
        self.handle.shared().close();
    }

    /// Kills the workers, and fails all pending items with kind `Cancelled`. Returns at once; [`join`](Self::join) waits.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{self as mp, ErrorKind};
    /// use std::time::Duration;
    /// let pool = mp::Pool::new(1)?;
    /// let call = pool.apply_async(std::thread::sleep, (Duration::from_secs(60),));
    /// pool.terminate();
    /// assert_eq!(call.await.unwrap_err().kind(), ErrorKind::Cancelled);
    /// pool.join().await?;
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn terminate(&self) {
        self.handle.shared().terminate();
    }

    /// Changes the number of workers, and waits until those beyond it have ended.
    ///
    /// Surplus workers end after the item that they run; new workers start in the background. The wait ends early if a later `resize` asks
    /// for more.
    ///
    /// Cancel safe: dropping the future leaves the new size in force.
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
    /// - `Other` for 0 workers or more than 4096, and for a pool within this process; `Unsupported` for a cluster pool.
    /// - `Forked` in a process forked from the one that made the pool.
    pub async fn resize(&self, workers: impl Workers) -> Result<()> {
        check_forked()?;
        self.has_processes("resized")?;
        let range = checked(workers)?;
        let mut running = self.handle.shared().running.subscribe();
        self.handle.shared().resize(range.clone());
        // We hold the sender. Another resize may want more than this one.
        while *running.borrow_and_update() > *range.end() && self.handle.shared().most_workers() <= *range.end() {
            let _ = running.changed().await;
        }
        Ok(())
    }

    /// Fails for a pool without worker processes; `why` names the operation.
    fn has_processes(&self, why: &str) -> Result<()> {
        self.handle.shared().taker().map_or(Ok(()), |taker| Err(taker.refuse(why)))
    }

    /// The executor of the items, if that is not worker processes.
    #[cfg(feature = "cluster")]
    pub(crate) fn taker(&self) -> Option<&Arc<dyn super::taker::Taker>> {
        self.handle.shared().taker()
    }

    #[cfg(feature = "cluster")]
    pub(crate) fn runtime(&self) -> &runtime::Handle {
        self.handle.runtime()
    }

    /// Returns how many items it may run at the same time.
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

    /// Takes one worker out of the pool, for several calls that share state in it, such as a connection or a cache in a `static`.
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
    /// Waits until a worker is free, first come, first served. Until the [`Checkout`] is dropped no other call uses that worker, and it is not replaced for its
    /// age, size or number of tasks. If it dies, the calls of the checkout fail.
    ///
    /// Cancel safe: a dropped future has taken no worker. A future that is not polled keeps the worker that it was given.
    ///
    /// A worker stopped by SIGSTOP or a debugger is passed over as soon as another one is free. If all free workers are stopped, `checkout` waits
    /// until one of them goes on or another becomes free; put a timeout around it to limit that.
    ///
    /// # Errors
    /// - `Closed` after [`close`](Self::close), and once the pool's runtime has ended.
    /// - `Other` for a pool that is [`broken`](Self::broken), and for a pool within this process; `Unsupported` for a cluster pool.
    /// - `Cancelled` if the pool is terminated or shut down while it waits.
    /// - `Forked` in a process forked from the one that made the pool.
    pub async fn checkout(&self) -> Result<Checkout> {
        self.has_processes("checked out")?;
        Checkout::take(self.handle.clone()).await
    }

    /// Returns the number of workers, including those that are starting or about to end.
    pub fn workers(&self) -> usize {
        let running = *self.handle.shared().running.borrow();
        match self.handle.shared().taker() {
            Some(_) if running > 0 => self.handle.shared().external_slots(),
            _ => running,
        }
    }

    /// Shuts the pool down: cancels items that have not started, lets running items go on for at most `grace`, then kills the workers.
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
    ///
    /// New calls fail with kind `Closed`, and cancelled items with kind `Cancelled`. Returns the number of items that were lost.
    ///
    /// Cancel safe: if the future is dropped, the pool still closes, but running items are not killed.
    pub async fn shutdown(&self, grace: Duration) -> Shutdown {
        if fork::is_forked() {
            return Shutdown { not_begun: 0, killed: 0 };
        }
        let shared = self.handle.shared();
        let not_begun = shared.shut();
        let _wait = shared.wait_for_end();
        let mut running = shared.running.subscribe();
        let ended = async |running: &mut tokio::sync::watch::Receiver<usize>| {
            // We hold the sender.
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

    /// Returns a snapshot of the pool: its items and workers, and histograms of how long items waited and ran.
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
    ///
    /// Takes the pool's lock for a moment and reads one small file of /proc per worker, for its memory. The pool keeps the figures all the time, at a
    /// few additions for each chunk of items.
    pub fn stats(&self) -> PoolStats {
        let (stats, deaths) = stats_of(&self.handle);
        PoolStats { deaths: Arc::unwrap_or_clone(deaths), ..stats }
    }

    /// Its stats as long as it is there, without keeping it alive.
    #[cfg(any(feature = "dashboard", feature = "metrics"))]
    pub(crate) fn stats_source(&self) -> StatsSource {
        StatsSource(Arc::downgrade(&self.handle))
    }

    /// Returns the reason if the pool has no working worker and starts none, and `None` otherwise.
    ///
    /// - An initializer that panics or returns an error breaks the pool at once, in a replacement worker too: the other workers are killed, and their
    ///   items fail.
    /// - Workers that die before they have done anything, or cannot be started, break the pool if several in a row do so and no other worker
    ///   serves. As long as one worker serves, missing ones are tried again, in the end every few seconds.
    ///
    /// All calls then fail with this reason. [`revive`](Self::revive) starts workers again.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// fn fail() -> multiprocess::Result<()> {
    ///     Err(multiprocess::Error::other("no licence"))
    /// }
    ///
    /// let pool = multiprocess::Pool::builder().workers(1).initializer(fail, ()).build()?;
    /// assert!(pool.apply(|| 1, ()).await.is_err());
    /// assert!(pool.broken().unwrap().contains("no licence"));
    /// pool.revive(); // once the cause is mended
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn broken(&self) -> Option<String> {
        self.handle.shared().is_broken()
    }

    /// Starts the workers of a [`broken`](Self::broken) pool again. Does nothing if the pool is not broken.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(1)?;
    /// if let Some(why) = pool.broken() {
    ///     eprintln!("no worker: {why}; trying again");
    ///     pool.revive()?;
    /// }
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `Unsupported` for a cluster pool, whose workers belong to the pools that serve; `Other` for a pool within this process; `Forked` in a forked process.
    pub fn revive(&self) -> Result<()> {
        check_forked()?;
        self.has_processes("revived")?;
        self.handle.shared().revive();
        Ok(())
    }

    /// Waits until all workers have ended, after [`close`](Self::close) or [`terminate`](Self::terminate).
    ///
    /// After a `close` it waits for the calls made before, too: also for a stream that is neither read nor dropped, and for a
    /// [`Checkout`] that is held.
    ///
    /// Cancel safe: dropping the future changes nothing.
    ///
    /// # Errors
    /// - `Other` if the pool is neither closed nor terminated.
    /// - `Forked` in a process forked from the one that made the pool.
    pub async fn join(&self) -> Result<()> {
        check_forked()?;
        if !self.handle.shared().is_closed() {
            let why = "close or terminate a pool before joining it";
            return Err(Error::other(why).explained_by(Topic::CloseFirst));
        }
        let _wait = self.handle.shared().wait_for_end();
        let mut running = self.handle.shared().running.subscribe();
        // We hold the sender.
        let _ = running.wait_for(|running| *running == 0).await;
        Ok(())
    }
}

/// Runs the items of a stream in a pool, as a method of the stream.
///
/// Use [`Pool::imap`] instead for items that an iterator yields.
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
    /// Runs `f` on each item in the pool, and returns the results as a stream, in order. The same as [`Pool::imap_stream`].
    ///
    /// Dropping the stream cancels the rest.
    ///
    /// # Errors
    /// As [`Pool::imap_stream`].
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

/// A report, returned by [`Pool::shutdown`]: how many items it lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shutdown {
    not_begun: usize,
    killed: usize,
}

impl Shutdown {
    /// Returns the number of items that were submitted and never started.
    pub fn not_begun(&self) -> usize {
        self.not_begun
    }

    /// Returns the number of items that ran, and were killed when the grace was over.
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
