//! The options of a pool: an option is a field of [`Config`], a setter of [`PoolBuilder`], and its use.

use super::options::ChunkLimits;
use super::protocol::{Conditions, EncodedTask};
use super::taker::{External, Start};
use crate::error::{Error, Result};
use crate::process::entry::{self, Outcome};
use crate::process::function::{Arguments, captures_nothing};
use crate::process::{Function, StartMethod, cpu_count};
use crate::shm::family::SLOTS;
use crate::wire::{EncodedMessage, Parcel};
use rustix::thread::CpuSet;
use serde::de::DeserializeOwned;
use std::any::Any;
use std::ffi::{OsStr, OsString};
use std::ops::RangeInclusive;
use std::time::Duration;

/// Configures and starts a [`Pool`](crate::Pool).
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::builder().workers(2).max_tasks_per_worker(100).build()?;
/// assert_eq!(pool.apply(|| 1, ()).await?, 1);
/// # Ok(()) }) }
/// ```
#[derive(Default)]
pub struct PoolBuilder {
    config: Config,
    /// An argument of the initializer or the finalizer that could not be encoded.
    failed: Option<Error>,
    /// The executor of the items, if that is not worker processes.
    start: Option<Start>,
    /// The options that were set and are about worker processes.
    of_workers: Vec<&'static str>,
}

/// The options of a pool, with their defaults.
pub(super) struct Config {
    pub(super) workers: RangeInclusive<usize>,
    /// Workers beyond the least end when they have idled for this.
    pub(super) idle_timeout: Duration,
    pub(super) start_method: StartMethod,
    pub(super) initializer: Option<EncodedTask>,
    /// Reads the initializer's report.
    pub(super) read_initialized: fn(Parcel) -> Result<()>,
    /// From a worker's start to the end of its initializer.
    pub(super) initializer_timeout: Option<Duration>,
    pub(super) finalizer: Option<EncodedTask>,
    /// From a worker's last item, or from when it was asked to end, to its end.
    pub(super) exit_timeout: Duration,
    pub(super) max_tasks_per_worker: Option<usize>,
    /// A worker's share is up to this much smaller than the most.
    pub(super) tasks_jitter: usize,
    pub(super) max_age: Option<Duration>,
    pub(super) recycle_above: Option<u64>,
    pub(super) conditions: Conditions,
    /// The seats' CPUs, taken in turn; empty is any.
    pub(super) cpus: Vec<usize>,
    pub(super) variables: Vec<(OsString, OsString)>,
    /// Items that may wait; see [`PoolBuilder::max_waiting`].
    pub(super) max_waiting: Option<usize>,
    /// How long an item that was asked to stop may go on before its worker is killed.
    pub(super) grace: Duration,
    /// How much of a dead worker's stderr its error quotes; with 0 the stream is not touched.
    pub(super) stderr_lines: usize,
    pub(super) backtraces: Option<bool>,
    /// See [`PoolBuilder::forward_tracing`].
    pub(super) keeps_traces: bool,
    /// It has no worker processes: its items are executed by a [`Taker`](super::taker::Taker).
    pub(super) is_external: bool,
    pub(super) chunks: ChunkLimits,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            workers: cpu_count().range(),
            idle_timeout: Duration::from_secs(30),
            start_method: StartMethod::default(),
            initializer: None,
            read_initialized: read_initialized::<()>,
            initializer_timeout: None,
            finalizer: None,
            exit_timeout: Duration::from_secs(30),
            max_tasks_per_worker: None,
            tasks_jitter: 0,
            max_age: None,
            recycle_above: None,
            conditions: Conditions::default(),
            cpus: Vec::new(),
            variables: Vec::new(),
            max_waiting: None,
            grace: Duration::from_millis(10),
            stderr_lines: 0,
            backtraces: None,
            keeps_traces: false,
            is_external: false,
            chunks: ChunkLimits::LOCAL,
        }
    }
}

impl Config {
    /// Fails if a pool cannot have these options.
    fn check(&self) -> Result<()> {
        if !self.is_external {
            checked(self.workers.clone())?;
        }
        if self.max_tasks_per_worker == Some(0) {
            return Err(Error::other("the workers of a pool need to have at least one task each"));
        }
        if self.max_waiting == Some(0) {
            return Err(Error::other("a pool needs to let at least one item wait: how else would it reach a worker?"));
        }
        if let Some(cpu) = self.cpus.iter().find(|cpu| **cpu >= CpuSet::MAX_CPU) {
            return Err(Error::other(format!("there is no CPU {cpu} to tie a worker to")));
        }
        Ok(())
    }
}

/// A number of workers, or a range from the least to the most.
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let fixed = Pool::builder().workers(2).build()?;
/// let elastic = Pool::builder().workers(0..=4).build()?;
/// assert_eq!(fixed.apply(|| 1, ()).await? + elastic.apply(|| 1, ()).await?, 2);
/// # Ok(()) }) }
/// ```
pub trait Workers {
    /// Returns the least and the most number of workers.
    fn range(self) -> RangeInclusive<usize>;
}

impl Workers for usize {
    fn range(self) -> RangeInclusive<usize> {
        self..=self
    }
}

impl Workers for RangeInclusive<usize> {
    fn range(self) -> RangeInclusive<usize> {
        self
    }
}

/// A number that a pool can have.
pub(super) fn checked(workers: impl Workers) -> Result<RangeInclusive<usize>> {
    let range = workers.range();
    if *range.end() == 0 || range.is_empty() {
        return Err(Error::other(format!("a pool needs at least one worker, not {range:?}")));
    }
    if *range.end() > SLOTS {
        return Err(Error::other(format!("a pool may have {SLOTS} workers at most, not {range:?}")));
    }
    Ok(range)
}

impl PoolBuilder {
    /// Sets the number of workers, at most 4096. By default [`cpu_count`].
    ///
    /// With a range such as `1..=8`, workers start when they are needed, all at once if need be, and end when they have been idle for the
    /// [`idle_timeout`](Self::idle_timeout).
    #[must_use]
    pub fn workers(mut self, workers: impl Workers) -> Self {
        self.of_workers.push("workers");
        self.config.workers = workers.range();
        self
    }

    /// Ends a worker beyond the least number once it has been idle for `timeout`. By default 30 s.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use std::time::Duration;
    /// let pool = multiprocess::Pool::builder()
    ///     .workers(1..=4)
    ///     .idle_timeout(Duration::from_secs(10)) // ends workers that are not needed
    ///     .max_tasks_per_worker(1000) // replaces a worker after 900 to 1000 items,
    ///     .tasks_jitter(100)
    ///     .max_age(Duration::from_secs(3600)) // after an hour,
    ///     .recycle_above(1 << 30) // or when it has more than 1 GiB
    ///     .descriptor_limit(512)
    ///     .cpus([0])
    ///     .build()?;
    /// assert_eq!(pool.apply(|n: u32| n + 1, (1,)).await?, 2);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    #[must_use]
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.of_workers.push("idle_timeout");
        self.config.idle_timeout = timeout;
        self
    }

    /// Lowers the [`max_tasks_per_worker`](Self::max_tasks_per_worker) of each worker by up to `tasks`, so that they are not all replaced at once.
    /// By default 0.
    #[must_use]
    pub fn tasks_jitter(mut self, tasks: usize) -> Self {
        self.of_workers.push("tasks_jitter");
        self.config.tasks_jitter = tasks;
        self
    }

    /// Replaces a worker that is older than `age`, between two items; up to a tenth earlier, so that they are not all replaced at once. By default never.
    #[must_use]
    pub fn max_age(mut self, age: Duration) -> Self {
        self.of_workers.push("max_age");
        self.config.max_age = Some(age);
        self
    }

    /// Replaces a worker that has more than `bytes` in memory after an item. By default never.
    #[must_use]
    pub fn recycle_above(mut self, bytes: u64) -> Self {
        self.of_workers.push("recycle_above");
        self.config.recycle_above = Some(bytes);
        self
    }

    /// Limits the address space of each worker to `bytes`.
    ///
    /// An allocation beyond that fails in the worker, and usually aborts it: its item then fails with kind
    /// [`MemoryLimit`](crate::ErrorKind::MemoryLimit), or is retried. `bytes` is the soft limit. The hard limit is 64 MiB plus four
    /// times the size of the program's file above it, because the report of a panic may need that much for its backtrace.
    #[must_use]
    pub fn memory_limit(mut self, bytes: u64) -> Self {
        self.of_workers.push("memory_limit");
        self.config.conditions.memory = Some(bytes);
        self
    }

    /// Limits how many file descriptors each worker may have open.
    #[must_use]
    pub fn descriptor_limit(mut self, descriptors: u64) -> Self {
        self.of_workers.push("descriptor_limit");
        self.config.conditions.descriptors = Some(descriptors);
        self
    }

    /// Sets the nice value of the workers, from -20 to 19. A lower one than this process's needs a privilege.
    #[must_use]
    pub fn nice(mut self, nice: i32) -> Self {
        self.of_workers.push("nice");
        self.config.conditions.nice = Some(nice);
        self
    }

    /// Binds each worker to one of these CPUs, in turn. ([`ProcessBuilder::cpus`](crate::ProcessBuilder::cpus) binds a
    /// process to all of them.)
    #[must_use]
    pub fn cpus(mut self, cpus: impl IntoIterator<Item = usize>) -> Self {
        self.of_workers.push("cpus");
        self.config.cpus = cpus.into_iter().collect();
        self
    }

    /// Sets an environment variable in the workers.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.of_workers.push("env");
        self.config.variables.push((key.as_ref().into(), value.as_ref().into()));
        self
    }

    /// Sets how workers are started. By default through the fork server.
    #[must_use]
    pub fn start_method(mut self, method: StartMethod) -> Self {
        self.of_workers.push("start_method");
        self.config.start_method = method;
        self
    }

    /// Runs `f(args..)` first in every worker.
    ///
    /// If it panics, or returns an `Err` of type [`Result<()>`](crate::Result), the pool is [`broken`](crate::Pool::broken): all calls fail with that
    /// reason. A result of any other type is dropped, an `Err` in it too.
    #[must_use]
    pub fn initializer<F, A, M>(mut self, f: F, args: A) -> Self
    where
        F: Function<A, M>,
        A: Arguments,
    {
        self.of_workers.push("initializer");
        const { captures_nothing::<F>() };
        let call = entry::Call::of(f);
        self.config.initializer = self.task(call, &args);
        self.config.read_initialized = read_initialized::<F::Output>;
        self
    }

    /// Runs `f(args..)` last in every worker that exits normally.
    ///
    /// It runs when the pool ends, when the worker is replaced, and when the pool is dropped while the worker is idle. A worker that
    /// is killed does not run it. Its result is dropped.
    #[must_use]
    pub fn finalizer<F, A, M>(mut self, f: F, args: A) -> Self
    where
        F: Function<A, M>,
        A: Arguments,
    {
        self.of_workers.push("finalizer");
        const { captures_nothing::<F>() };
        let call = entry::Call::of(f);
        self.config.finalizer = self.task(call, &args);
        self
    }

    /// Kills a worker whose [`initializer`](Self::initializer) has not ended within `timeout`, counted from the worker's start. By default it may
    /// take for ever.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// use std::time::Duration;
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let hangs = || std::thread::sleep(Duration::from_secs(3600));
    /// let pool = Pool::builder().workers(1).initializer(hangs, ());
    /// let pool = pool.initializer_timeout(Duration::from_millis(20)).build()?;
    /// let error = pool.apply(|| 1, ()).await.unwrap_err();
    /// assert!(error.to_string().contains("did not end within 20ms"), "{error}");
    /// # Ok(()) }) }
    /// ```
    ///
    /// Another worker is started in its place, later each time; after several in a row the pool is [`broken`](crate::Pool::broken). Items wait
    /// meanwhile, for as long as their [`queue_timeout`](crate::Call::queue_timeout) allows.
    #[must_use]
    pub fn initializer_timeout(mut self, timeout: Duration) -> Self {
        self.of_workers.push("initializer_timeout");
        self.config.initializer_timeout = Some(timeout);
        self
    }

    /// Kills a worker that has not ended within `timeout` after it was asked to. By default 30 s.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// use std::time::Duration;
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let hangs = || std::thread::sleep(Duration::from_secs(3600));
    /// let pool = Pool::builder().workers(1).finalizer(hangs, ()).exit_timeout(Duration::from_millis(20)).build()?;
    /// assert_eq!(pool.apply(|| 1, ()).await?, 1);
    /// pool.close();
    /// pool.join().await?;
    /// assert_eq!(pool.stats().late, 1);
    /// # Ok(()) }) }
    /// ```
    ///
    /// The time counts from the worker's last item, or, if it is idle, from when it is asked to end. A worker exceeds it when its
    /// [`finalizer`](Self::finalizer), its initializer or the destructor of a `static` hangs. No item is touched;
    /// [`PoolStats::late`](crate::PoolStats::late) counts such workers, and `tracing` has a warning.
    #[must_use]
    pub fn exit_timeout(mut self, timeout: Duration) -> Self {
        self.of_workers.push("exit_timeout");
        self.config.exit_timeout = timeout;
        self
    }

    /// Sets how long an item that was asked to stop may go on before its worker is killed. By default 10 ms.
    ///
    /// Items are asked to stop when their call is cancelled or they overrun their timeout.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.config.grace = grace;
        self
    }

    /// Sets whether the `tracing` spans and events of tasks reach the subscriber of their caller. By default they do.
    ///
    /// They appear under the caller's span, with a field `worker.pid`. What an initializer or a finalizer records is not forwarded. A task waits while its
    /// caller's process does not take them. Without a subscriber a call reads one atomic variable.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// fn square(n: u64) -> u64 { tracing::trace!(n, "squared"); n * n }
    /// let quiet = Pool::builder().workers(1).forward_tracing(false).build()?;
    /// assert_eq!(quiet.apply(square, (3,)).await?, 9);
    /// # Ok(()) }) }
    /// ```
    #[must_use]
    pub fn forward_tracing(mut self, forward: bool) -> Self {
        self.config.keeps_traces = !forward;
        self
    }

    /// Sets whether errors of panics carry the backtrace. By default the workers' environment decides; see
    /// [`ProcessBuilder::backtraces`](crate::ProcessBuilder::backtraces).
    #[must_use]
    pub fn backtraces(mut self, keep: bool) -> Self {
        self.of_workers.push("backtraces");
        self.config.backtraces = Some(keep);
        self
    }

    /// Adds the last `lines` lines that a worker wrote to stderr, up to 4 KiB, to the error of its death. By default 0.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// fn fails() {
    ///     eprintln!("the disk is on fire");
    ///     std::process::abort();
    /// }
    /// let pool = Pool::builder().workers(1).keep_stderr(5).build()?;
    /// let error = pool.apply(fails, ()).await.unwrap_err();
    /// assert!(error.to_string().ends_with("it last wrote:\nthe disk is on fire\n[died]"));
    /// # Ok(()) }) }
    /// ```
    ///
    /// With 0, workers write to this process's own stderr. With more, each writes into a pipe, and the pool copies that here: one wake-up of this
    /// process per write, once the pool's runtime gets to run. A worker blocks while 64 KiB of its stderr have not been copied. Its stderr
    /// is then no terminal, so programs that check this write no colours.
    #[must_use]
    pub fn keep_stderr(mut self, lines: usize) -> Self {
        self.of_workers.push("keep_stderr");
        self.config.stderr_lines = lines;
        self
    }

    /// Bounds how many items may wait for a worker. By default any number may.
    ///
    /// ```
    /// use multiprocess::{self as mp, ErrorKind, Pool};
    /// use std::time::Duration;
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::builder().workers(1).max_waiting(2).build()?;
    /// let slow = || std::thread::sleep(Duration::from_millis(100));
    /// let mut begun = Vec::new();
    /// let error = loop {
    ///     // One is at work, two wait.
    ///     match pool.try_apply(slow, ()) {
    ///         Ok(result) => begun.push(result),
    ///         Err(error) => break error,
    ///     }
    /// };
    /// assert_eq!(error.kind(), ErrorKind::Full);
    /// pool.apply(slow, ()).await?; // waits for room, and then for its turn
    /// # Ok(()) }) }
    /// ```
    ///
    /// An item waits when it was submitted and no worker has it. Of a cluster pool, an item waits here until it is sent
    /// to the server, where up to 64 chunks wait, or 4 for each worker of all hosts if that is more. While the limit is reached:
    ///
    /// - [`apply`](crate::Pool::apply), and the result of [`apply_async`](crate::Pool::apply_async), submit their item once there is
    ///   room, first come, first served, while they are awaited.
    /// - `map` and `imap` take no more from their source.
    /// - [`try_apply`](crate::Pool::try_apply) fails at once.
    ///
    /// An item that waits for room is not submitted yet: dropping its future cancels it, even that of `apply_async`,
    /// and its [`queue_timeout`](crate::Call::queue_timeout) does not count yet. A future that has waited for room and
    /// is no longer polled keeps its place, and later callers wait behind it. Drop it instead. A chunk has no more
    /// items than may wait. Calls of a [`Checkout`](crate::Checkout) and retries do not wait for room.
    #[must_use]
    pub fn max_waiting(mut self, items: usize) -> Self {
        self.config.max_waiting = Some(items);
        self
    }

    /// Replaces a worker after `tasks` items. By default never.
    #[must_use]
    pub fn max_tasks_per_worker(mut self, tasks: usize) -> Self {
        self.of_workers.push("max_tasks_per_worker");
        self.config.max_tasks_per_worker = Some(tasks);
        self
    }

    pub(super) fn has_initializer(&self) -> bool {
        self.config.initializer.is_some()
    }

    fn task<A: Arguments>(&mut self, call: entry::Call, args: &A) -> Option<EncodedTask> {
        EncodedMessage::of(args)
            .map(|arguments| EncodedTask { call, arguments })
            .map_err(|error| self.failed = Some(error))
            .ok()
    }

    /// The configuration, checked, and the executor of the items if that is not worker processes.
    pub(super) fn config(self) -> Result<(Config, Option<Start>)> {
        if let Some(option) = self.of_workers.first().filter(|_| self.start.is_some()) {
            let text = format!(
                "a pool without worker processes of its own has no option `{option}`: it belongs to the pool that serves"
            );
            return Err(Error::other(text));
        }
        self.failed.map_or(Ok(()), Err)?;
        self.config.check()?;
        Ok((self.config, self.start))
    }

    /// Has the items executed by something else than worker processes; see [`taker`](super::taker).
    pub(crate) fn external(mut self, External { chunks, start }: External) -> Self {
        let Config { workers, is_external, chunks: limits, .. } = &mut self.config;
        (*workers, *is_external, *limits) = (0..=0, true, chunks);
        self.start = Some(start);
        self
    }
}

/// Returns `true` if an initializer that returns `R` has succeeded.
pub(super) fn read_initialized<R: DeserializeOwned + 'static>(parcel: Parcel) -> Result<()> {
    let returned: R = Outcome::read(parcel)?;
    match (&mut Some(returned) as &mut dyn Any).downcast_mut::<Option<Result<()>>>() {
        Some(result) => result.take().unwrap_or(Ok(())),
        None => Ok(()),
    }
}
