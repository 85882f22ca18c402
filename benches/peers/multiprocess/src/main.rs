//! multiprocess: the crate whose benches these are, through its public face only, but for the codec of W17.
//! The caller is a current-thread runtime, as in `limits`; in the `_run` variants
//! it is the multi-thread runtime that `multiprocess::run` would build.

mod dict;
mod locks;
mod memory;
mod tasks;
mod values;

#[path = "../../../../src/os"]
#[allow(dead_code)]
mod os {
    pub(crate) mod identity;
    pub(crate) mod stack;

    pub(crate) mod memory {
        pub(crate) fn with_room<P>(mut buffer: Vec<P>, len: usize) -> Vec<P> {
            buffer.reserve_exact(len);
            buffer
        }
    }
}

#[path = "../../../../src/wire"]
#[allow(dead_code, unused_imports)]
mod wire {
    mod format;
    pub(crate) mod limits;
    pub(crate) mod list;

    /// Nothing is kept here: each contender has a buffer of its own.
    pub(crate) mod buffers {
        pub(crate) fn make_room(buffer: &mut Vec<u8>, len: usize) {
            buffer.reserve(len);
        }

        pub(crate) fn with_room(len: usize) -> Vec<u8> {
            Vec::with_capacity(len)
        }

        pub(crate) fn keep(_: Vec<u8>) {}
    }
    pub(crate) use buffers::{keep, with_room};

    pub(crate) fn append<T: serde::Serialize>(value: &T, to: &mut Vec<u8>) {
        format::append(value, to).unwrap();
    }

    pub(crate) fn read<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> T {
        format::from_slice(bytes).unwrap()
    }
}

use bytes::Bytes;
use futures::{SinkExt, TryStreamExt};
use mpbench::cli::{Metrics, case, serve};
use mpbench::shm::{self, Shared};
use mpbench::stats::{FirstToLast, latency, per_second, quantile};
use mpbench::work::{burn, increment, increment_total, stamp, touch, with_heap};
use mpbench::{size, stats, sys};
use multiprocess::connection::{ByteConnection, Listener, connect};
use multiprocess::{Connection, ErrorKind, Fd, Function, Lock, Pool, Process, Queue, StartMethod, pipe};
use serde::{Serialize, de::DeserializeOwned};
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs::File;
use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Runtime};

type Message = [u64; 8];

/// A message of W5, by its number.
trait Small: Serialize + DeserializeOwned + Send + 'static {
    fn of(number: u64) -> Self;
    fn number(&self) -> u64;
}

impl Small for Message {
    fn of(number: u64) -> Self {
        [number; 8]
    }
    fn number(&self) -> u64 {
        self[0]
    }
}

impl Small for values::Eight {
    fn of(number: u64) -> Self {
        Self::of(|| number)
    }
    fn number(&self) -> u64 {
        self.first
    }
}

const CAPACITY: usize = 4096;
const LARGE_CAPACITY: usize = 4;
/// Runs of W5, and maps of W3 and W3b: the median counts.
const RUNS: usize = 5;
const MAPS: usize = 11;

fn block_on<F: Future>(future: F) -> F::Output {
    build(Builder::new_current_thread()).block_on(future)
}

fn block_on_run<F: Future>(future: F) -> F::Output {
    build(Builder::new_multi_thread()).block_on(future)
}

fn build(mut builder: Builder) -> Runtime {
    builder.enable_all().build().unwrap()
}

fn with_rate(samples: &[Duration]) -> Metrics {
    let mut metrics = latency(samples);
    metrics.push(("per_s", per_second(samples.len(), samples.iter().sum())));
    metrics
}

// W1

fn noop() {}

fn fork_server() -> Process<()> {
    Process::builder().start_method(StartMethod::ForkServer).spawn(noop, ()).unwrap()
}

fn spawn() -> Process<()> {
    Process::builder().start_method(StartMethod::Spawn).spawn(noop, ()).unwrap()
}

/// Awaits the result and then the exit, whichever of them `join` stands for.
async fn finish(mut child: Process<()>) {
    child.join().await.unwrap();
    assert!(child.wait().await.unwrap().success());
}

async fn spawn_join(start: fn() -> Process<()>) -> Metrics {
    for _ in 0..size::SPAWN_SEQUENTIAL / 10 {
        finish(start()).await;
    }
    let mut us = Vec::new();
    for _ in 0..size::SPAWN_SEQUENTIAL {
        let at = Instant::now();
        finish(start()).await;
        us.push(at.elapsed().as_secs_f64() * 1e6);
    }
    let at = Instant::now();
    let children: Vec<_> = (0..size::SPAWN_BURST).map(|_| start()).collect();
    for child in children {
        finish(child).await;
    }
    let burst = at.elapsed().as_secs_f64() * 1e6 / size::SPAWN_BURST as f64;
    vec![("seq_p50_us", quantile(&us, 0.5)), ("seq_p99_us", quantile(&us, 0.99)), ("burst_us", burst)]
}

// W2, W3, W3b, W4, W12, W13

/// Blocks its worker, so that the others get the next of these.
fn hold(milliseconds: u64) -> u32 {
    std::thread::sleep(Duration::from_millis(milliseconds));
    std::process::id()
}

/// A pool of which every worker has run a task, and their pids.
async fn warm_pool(workers: usize) -> (Pool, Vec<i32>) {
    let (pool, mut pids) = (Pool::new(workers).unwrap(), BTreeSet::new());
    while pids.len() < workers {
        pids.extend(pool.map(hold, vec![50; workers]).chunksize(1).await.unwrap());
    }
    (pool, pids.into_iter().map(|pid| pid as i32).collect())
}

async fn pool_call() -> Metrics {
    let (pool, _) = warm_pool(size::WORKERS).await;
    let calls = if stats::pause().is_some() { size::PAUSED_ROUND_TRIPS } else { size::CALLS };
    let (warm_up, mut samples) = (calls / 10, Vec::new());
    for i in 0..(warm_up + calls) as i64 {
        if let Some(pause) = stats::pause() {
            tokio::time::sleep(pause).await;
        }
        let start = Instant::now();
        assert_eq!(pool.apply(increment, (i,)).await.unwrap(), i + 1);
        samples.push(start.elapsed());
    }
    with_rate(&samples[warm_up..])
}

fn inputs() -> impl Iterator<Item = i64> + Send + 'static {
    (0..size::MAP_TASKS as i64).map(std::hint::black_box)
}

async fn maps(map: impl AsyncFn(&Pool) -> i64) -> Metrics {
    let ((pool, _), mut rates) = (warm_pool(size::WORKERS).await, Vec::new());
    for _ in 0..MAPS {
        let start = Instant::now();
        let total = map(&pool).await;
        rates.push(per_second(size::MAP_TASKS, start.elapsed()));
        assert_eq!(total, increment_total(size::MAP_TASKS));
    }
    vec![("tasks_per_s", quantile(&rates, 0.5))]
}

/// Automatic with a chunk size of 0.
async fn map(chunk: usize) -> Metrics {
    maps(async |pool| pool.map(increment, inputs()).chunksize(chunk).await.unwrap().into_iter().sum()).await
}

async fn stream(chunk: usize) -> Metrics {
    let add = async |total, result| Ok(total + result);
    maps(async |pool| pool.imap_unordered(increment, inputs()).chunksize(chunk).try_fold(0, add).await.unwrap()).await
}

fn own_memory_kib() -> f64 {
    sys::smaps_kib(std::process::id() as i32, "Rss")
}

/// Costs of an item by decades of one stream, and how much memory came between 10^3 items and the end.
async fn endless() -> Metrics {
    let ((pool, _), [mut growths, mut rates]) = (warm_pool(size::WORKERS).await, [const { Vec::new() }; 2]);
    let (mut before, mut after) = (0.0, 0.0f64);
    for _ in 0..MAPS {
        let mut results = pool.imap_unordered(increment, (0..).map(std::hint::black_box));
        let (start, mut taken, mut marks) = (Instant::now(), 0, Vec::new());
        for mark in [1_000, 10_000, 100_000, size::ENDLESS_TASKS] {
            while taken < mark {
                results.try_next().await.unwrap().unwrap();
                taken += 1;
            }
            marks.push((mark as f64, start.elapsed().as_secs_f64()));
            match mark {
                1_000 if before == 0.0 => before = own_memory_kib(),
                _ => after = after.max(own_memory_kib()),
            }
        }
        let cost = |from: usize| (marks[from + 1].1 - marks[from].1) / (marks[from + 1].0 - marks[from].0);
        growths.push(cost(2) / cost(0));
        rates.push(marks[3].0 / marks[3].1);
    }
    let memory = (after - before) / 1024.0;
    vec![("growth", quantile(&growths, 0.5)), ("memory_mib", memory), ("tasks_per_s", quantile(&rates, 0.5))]
}

// W16

/// Has `tasks` done by `run`, some times over: tasks per second, and CPU time of this process for each.
async fn width(pool: &Pool, tasks: usize, run: &impl AsyncFn(&Pool, usize) -> i64) -> (f64, f64) {
    let (mut rates, mut costs) = (Vec::new(), Vec::new());
    for round in 0..size::WIDTH_ROUNDS + 1 {
        let (cpu, start) = (sys::own_cpu_time(), Instant::now());
        assert_eq!(run(pool, tasks).await, increment_total(tasks));
        if round > 0 {
            rates.push(per_second(tasks, start.elapsed()));
            costs.push((sys::own_cpu_time() - cpu).as_secs_f64() / tasks as f64);
        }
    }
    (quantile(&rates, 0.5), quantile(&costs, 0.5))
}

async fn widths(tasks: usize, run: impl AsyncFn(&Pool, usize) -> i64) -> Metrics {
    let mut figures = Vec::new();
    for workers in size::WIDTHS {
        let (pool, _) = warm_pool(workers).await;
        figures.push(width(&pool, tasks, &run).await);
        pool.close();
        pool.join().await.unwrap();
    }
    let (rate, cost) = figures[0];
    let of_256 = size::WIDTHS.iter().position(|workers| *workers == 256).unwrap();
    let most_cpu = figures.iter().map(|(_, other)| other / cost).fold(0.0, f64::max);
    let names = ["per_s_2", "per_s_8", "per_s_32", "per_s_128", "per_s_256", "per_s_1024"];
    let mut metrics = vec![("rate_256", figures[of_256].0 / rate), ("cpu_growth", most_cpu)];
    metrics.extend(names.into_iter().zip(figures).map(|(name, (rate, _))| (name, rate)));
    metrics
}

async fn map_of(pool: &Pool, tasks: usize, chunk: usize) -> i64 {
    pool.map(increment, 0..tasks as i64).chunksize(chunk).await.unwrap().into_iter().sum()
}

/// `tasks` calls, of which `outstanding` are begun before the first of them is awaited.
async fn calls_of(pool: &Pool, tasks: usize, outstanding: usize) -> i64 {
    let mut total = 0;
    for first in (0..tasks).step_by(outstanding) {
        let calls = (first..first + outstanding).map(|n| pool.apply_async(increment, (n as i64,)));
        for call in calls.collect::<Vec<_>>() {
            total += call.await.unwrap();
        }
    }
    total
}

async fn one_by_one(pool: &Pool, tasks: usize) -> i64 {
    let mut total = 0;
    for n in 0..tasks as i64 {
        total += pool.apply(increment, (n,)).await.unwrap();
    }
    total
}

async fn cpu_bound(chunk: usize) -> Metrics {
    let (pool, _) = warm_pool(size::WORKERS).await;
    let (serial, ()) = stats::timed(|| (0..size::CPU_TASKS).for_each(|_| _ = burn(size::CPU_STEPS)));
    let start = Instant::now();
    let results = pool.map(burn, [size::CPU_STEPS; size::CPU_TASKS]).chunksize(chunk).await.unwrap();
    let parallel = start.elapsed();
    assert_eq!(results, [burn(size::CPU_STEPS); size::CPU_TASKS]);
    vec![
        ("task_ms", serial.as_secs_f64() * 1e3 / size::CPU_TASKS as f64),
        ("speedup", serial.as_secs_f64() / parallel.as_secs_f64()),
    ]
}

async fn idle_workers() -> Metrics {
    let (_pool, workers) = warm_pool(size::IDLE_WORKERS).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    sys::idle_memory(&workers)
}

fn say_pid_and_sleep(pids: Queue<u32>) {
    pids.blocking_put(std::process::id()).unwrap();
    std::thread::sleep(Duration::from_secs(30));
}

async fn killed_worker() -> Metrics {
    let (pool, _) = warm_pool(size::WORKERS).await;
    let pids = Queue::unbounded().unwrap();
    let task = pool.apply_async(say_pid_and_sleep, (pids.clone(),));
    let pid = pids.get().await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let start = Instant::now();
    sys::kill(pid as i32);
    assert_eq!(task.await.unwrap_err().kind(), ErrorKind::ProcessDied);
    let error_ms = start.elapsed().as_secs_f64() * 1e3;
    assert_eq!(pool.apply(increment, (1,)).await.unwrap(), 2);
    vec![("error_ms", error_ms), ("next_task_ms", start.elapsed().as_secs_f64() * 1e3)]
}

// W5, W6

async fn produce_small<T: Small>(queue: Queue<T>, numbers: Range<u64>) {
    for n in numbers {
        queue.put(T::of(n)).await.unwrap();
    }
}

fn bounded<T: Small>() -> Queue<T> {
    Queue::bounded(CAPACITY).unwrap()
}

fn unbounded() -> Queue<Message> {
    Queue::unbounded().unwrap()
}

async fn small<T: Small>(queue: fn() -> Queue<T>, producers: u64) -> Metrics {
    let mut rates = Vec::new();
    for _ in 0..RUNS {
        rates.push(small_rate(queue(), producers).await);
    }
    vec![("msgs_per_s", quantile(&rates, 0.5))]
}

async fn small_rate<T: Small>(queue: Queue<T>, producers: u64) -> f64 {
    let messages = size::SMALL_MESSAGES as u64;
    let share = messages / producers;
    let start = |p| Process::spawn(produce_small::<T>, (queue.clone(), p * share..(p + 1) * share)).unwrap();
    let children: Vec<_> = (0..producers).map(start).collect();
    let (mut clock, mut total) = (FirstToLast::new(), 0);
    for _ in 0..messages {
        total += queue.get().await.unwrap().number();
        clock.message();
    }
    let rate = clock.per_second();
    assert_eq!(total, messages * (messages - 1) / 2);
    for child in children {
        finish(child).await;
    }
    rate
}

/// The time of W5 with a struct of named fields, by that with an array of as many numbers. They take turns.
async fn named_by_bounded() -> Metrics {
    let mut ratios = Vec::new();
    for _ in 0..RUNS {
        ratios.push(small_rate(bounded::<Message>(), 1).await / small_rate(bounded::<values::Eight>(), 1).await);
    }
    vec![("ratio", quantile(&ratios, 0.5))]
}

trait Large: From<Vec<u8>> + Deref<Target = [u8]> + Serialize + DeserializeOwned + Debug + Send + Sync + 'static {}
impl Large for Bytes {}
impl Large for Vec<u8> {}

/// A queue takes its messages, so each is made anew: less work than a copy of a stamped one.
async fn produce_large<T: Large>(queue: Queue<T>) {
    for n in 0..size::LARGE_MESSAGES {
        let mut message = vec![7; size::LARGE_MESSAGE];
        stamp(&mut message, n as u64);
        queue.put(message.into()).await.unwrap();
    }
}

async fn large<T: Large>() -> Metrics {
    let queue = Queue::<T>::bounded(LARGE_CAPACITY).unwrap();
    let child = Process::spawn(produce_large::<T>, (queue.clone(),)).unwrap();
    let (mut clock, mut total) = (FirstToLast::new(), 0);
    for _ in 0..size::LARGE_MESSAGES {
        total += touch(&queue.get().await.unwrap());
        clock.message();
    }
    let rate = clock.per_second() * (size::LARGE_MESSAGE as f64 / (1 << 20) as f64);
    let pages = (size::LARGE_MESSAGE / 4096 * 7) as u64;
    assert_eq!(total, (0..size::LARGE_MESSAGES as u64).map(|n| n + pages).sum::<u64>());
    finish(child).await;
    vec![("mib_per_s", rate)]
}

// W7

/// Returns the CPU time of its process, which need not be a child of the caller's.
async fn echo(mut connection: Connection<Message, Message>, rounds: usize) -> Duration {
    for _ in 0..rounds {
        let [n, ..] = connection.recv().await.unwrap();
        connection.send([n + 1; 8]).await.unwrap();
    }
    sys::own_cpu_time()
}

async fn pingpong() -> Metrics {
    let (mut connection, theirs) = pipe::<Message, Message>().unwrap();
    let rounds = stats::round_trips();
    let mut child = Process::spawn(echo, (theirs, rounds)).unwrap();
    let mut samples = Vec::with_capacity(rounds);
    for n in 0..rounds as u64 {
        if let Some(pause) = stats::pause() {
            tokio::time::sleep(pause).await;
        }
        let start = Instant::now();
        connection.send([n; 8]).await.unwrap();
        assert_eq!(connection.recv().await.unwrap(), [n + 1; 8]);
        samples.push(start.elapsed());
    }
    let cpu = child.join().await.unwrap() + sys::own_cpu_time();
    let mut metrics = with_rate(&samples[rounds / 10..]);
    metrics.push(("cpu_us", cpu.as_secs_f64() * 1e6 / rounds as f64));
    metrics
}

// W14, W15

const KEY: &[u8] = b"a key of both ends";

/// A client process that runs `send`, and this end of its connection.
async fn connected<F, M>(send: F) -> (Process<()>, ByteConnection)
where
    F: Function<(String,), M, Output = ()>,
{
    let path = std::env::temp_dir().join(format!("mpbench-connection-{}", std::process::id()));
    let listener = Listener::bind(path.to_str().unwrap()).authkey(KEY).await.unwrap();
    let child = Process::spawn(send, (listener.local_addr(),)).unwrap();
    (child, listener.accept().await.unwrap())
}

async fn send_small(address: String) {
    let connection = connect(&address, Some(KEY)).await.unwrap();
    for n in 0..size::SMALL_MESSAGES as u64 {
        let mut message = [0; size::SMALL_MESSAGE];
        message[..8].copy_from_slice(&n.to_le_bytes());
        connection.send_bytes(&message).await.unwrap();
    }
}

async fn feed_small(address: String) {
    let mut connection = connect(&address, Some(KEY)).await.unwrap();
    for n in 0..size::SMALL_MESSAGES as u64 {
        let mut message = vec![0; size::SMALL_MESSAGE];
        message[..8].copy_from_slice(&n.to_le_bytes());
        connection.feed(message).await.unwrap();
    }
    SinkExt::<Vec<u8>>::flush(&mut connection).await.unwrap();
}

async fn small_over<F, M>(send: F) -> Metrics
where
    F: Function<(String,), M, Output = ()> + Copy,
{
    let mut rates = Vec::new();
    for _ in 0..RUNS {
        let (child, connection) = connected(send).await;
        let (mut clock, mut total) = (FirstToLast::new(), 0);
        for _ in 0..size::SMALL_MESSAGES {
            let message = connection.recv_bytes().await.unwrap();
            total += u64::from_le_bytes(message[..8].try_into().unwrap());
            clock.message();
        }
        rates.push(clock.per_second());
        let messages = size::SMALL_MESSAGES as u64;
        assert_eq!(total, messages * (messages - 1) / 2);
        finish(child).await;
    }
    vec![("msgs_per_s", quantile(&rates, 0.5))]
}

/// Each message is made anew, as those of W6 are.
async fn send_large(address: String) {
    let connection = connect(&address, Some(KEY)).await.unwrap();
    for n in 0..size::LARGE_MESSAGES {
        let mut message = vec![7; size::LARGE_MESSAGE];
        stamp(&mut message, n as u64);
        connection.send_bytes(&message).await.unwrap();
    }
}

async fn large_over() -> Metrics {
    let (child, connection) = connected(send_large).await;
    let (mut clock, mut total) = (FirstToLast::new(), 0);
    for _ in 0..size::LARGE_MESSAGES {
        total += touch(&connection.recv_bytes().await.unwrap());
        clock.message();
    }
    let rate = clock.per_second() * (size::LARGE_MESSAGE as f64 / (1 << 20) as f64);
    assert!(total > 0);
    finish(child).await;
    vec![("mib_per_s", rate)]
}

// W8, W9

fn uncontended(mut run: impl FnMut()) -> (&'static str, f64) {
    let ns = stats::median_of(5, || stats::timed(&mut run).0.as_nanos() as f64 / size::LOCK_OPS as f64);
    ("uncontended_ns", ns)
}

fn lock_tried() -> Metrics {
    let lock = Lock::new().unwrap();
    let mut metrics = contended(false);
    metrics.push(uncontended(|| (0..size::LOCK_OPS).for_each(|_| drop(lock.try_acquire().unwrap()))));
    metrics
}

fn lock_blocking() -> Metrics {
    let lock = Lock::new().unwrap();
    let mut metrics = contended(false);
    metrics.push(uncontended(|| (0..size::LOCK_OPS).for_each(|_| drop(lock.blocking_acquire().unwrap()))));
    metrics
}

fn lock_awaited() -> Metrics {
    let lock = Lock::new().unwrap();
    let runtime = build(Builder::new_current_thread());
    let acquire = async || {
        for _ in 0..size::LOCK_OPS {
            drop(lock.acquire().await.unwrap());
        }
    };
    let mut metrics = contended(true);
    metrics.push(uncontended(|| runtime.block_on(acquire())));
    metrics
}

struct Contended {
    arrived: AtomicU64,
    counter: AtomicU64,
}

impl Contended {
    fn start(page: &Fd<File>, cpu: usize) -> Shared<Self> {
        let shared: Shared<Self> = unsafe { Shared::in_file(page) };
        sys::pin_to_cpu(cpu);
        shared.arrived.fetch_add(1, AcqRel);
        while shared.arrived.load(Acquire) < 2 {
            std::hint::spin_loop();
        }
        shared
    }

    fn increment(&self) {
        self.counter.store(self.counter.load(Relaxed) + 1, Relaxed);
    }
}

fn contend(lock: Lock, page: Fd<File>, cpu: usize) {
    let shared = Contended::start(&page, cpu);
    for _ in 0..size::CONTENDED_OPS {
        let _guard = lock.blocking_acquire().unwrap();
        shared.increment();
    }
}

async fn contend_async(lock: Lock, page: Fd<File>, cpu: usize) {
    let shared = Contended::start(&page, cpu);
    for _ in 0..size::CONTENDED_OPS {
        let _guard = lock.acquire().await.unwrap();
        shared.increment();
    }
}

/// Two processes, a CPU each, that start together.
fn contended(is_async: bool) -> Metrics {
    let (lock, page) = (Lock::new().unwrap(), shm::page());
    let file = || Fd::new(page.try_clone().unwrap());
    let run = |lock: Lock, page: Fd<File>, cpu: usize, is_async: bool| match is_async {
        true => block_on(contend_async(lock, page, cpu)),
        false => contend(lock, page, cpu),
    };
    let child = Process::spawn(run, (lock.clone(), file(), 1, is_async)).unwrap();
    let shared: Shared<Contended> = unsafe { Shared::in_file(&page) };
    while shared.arrived.load(Acquire) < 1 {
        std::hint::spin_loop();
    }
    let (elapsed, ()) = stats::timed(|| {
        run(lock, file(), 0, is_async);
        block_on(finish(child));
    });
    assert_eq!(shared.counter.load(Relaxed), 2 * size::CONTENDED_OPS as u64);
    vec![("contended_ops_per_s", per_second(2 * size::CONTENDED_OPS, elapsed))]
}

fn increments() -> Metrics {
    contended(false).into_iter().map(|(_, rate)| ("increments_per_s", rate)).collect()
}

fn main() {
    const P: u64 = size::PRODUCERS as u64;
    multiprocess::init();
    serve(
        &[
            case("W1", "forkserver", || block_on(spawn_join(fork_server))),
            case("W1", "forkserver_run", || block_on_run(spawn_join(fork_server))),
            case("W1", "spawn", || block_on(spawn_join(spawn))),
            case("W1h", "forkserver", || with_heap(|| block_on(spawn_join(fork_server)))),
            case("W1h", "spawn", || with_heap(|| block_on(spawn_join(spawn)))),
            case("W2", "pool", || block_on(pool_call())),
            case("W2", "pool_run", || block_on_run(pool_call())),
            case("W2s", "pool", || stats::paused(|| block_on(pool_call()))),
            case("W2s", "pool_run", || stats::paused(|| block_on_run(pool_call()))),
            case("W3", "chunk_default", || block_on(map(0))),
            case("W3", "chunk_1", || block_on(map(1))),
            case("W3b", "chunk_default", || block_on(stream(0))),
            case("W3b", "chunk_1", || block_on(stream(1))),
            case("W3e", "endless", || block_on(endless())),
            case("W4", "chunk_default", || block_on(cpu_bound(0))),
            case("W4", "chunk_1", || block_on(cpu_bound(1))),
            case("W5", "bounded", || block_on(small(bounded::<Message>, 1))),
            case("W5", "bounded_named", || block_on(small(bounded::<values::Eight>, 1))),
            case("W5", "unbounded", || block_on(small(unbounded, 1))),
            case("W5", "bounded_run", || block_on_run(small(bounded::<Message>, 1))),
            case("W5x4", "bounded", || block_on(small(bounded::<Message>, P))),
            case("W5x4", "unbounded", || block_on(small(unbounded, P))),
            case("W6", "bytes", || block_on(large::<Bytes>())),
            case("W6", "vec", || block_on(large::<Vec<u8>>())),
            case("W7", "pipe", || block_on(pingpong())),
            case("W7", "pipe_run", || block_on_run(pingpong())),
            case("W7s", "pipe", || stats::paused(|| block_on(pingpong()))),
            case("W7s", "pipe_run", || stats::paused(|| block_on_run(pingpong()))),
            case("W14", "send", || block_on(small_over(send_small))),
            case("W14", "send_run", || block_on_run(small_over(send_small))),
            case("W14", "sink", || block_on(small_over(feed_small))),
            case("W15", "send", || block_on(large_over())),
            case("W15", "send_run", || block_on_run(large_over())),
            case("W16", "chunk_default", || block_on(widths(10 * size::MAP_TASKS, async |pool, n| map_of(pool, n, 0).await))),
            case("W16", "chunk_1", || block_on(widths(size::MAP_TASKS, async |pool, n| map_of(pool, n, 1).await))),
            case("W16", "async_1000", || block_on(widths(50_000, async |pool, n| calls_of(pool, n, 1000).await))),
            case("W16", "async_100000", || block_on(widths(100_000, async |pool, n| calls_of(pool, n, n).await))),
            case("W16", "apply", || block_on(widths(size::CALLS, async |pool, n| one_by_one(pool, n).await))),
            case("W8", "try", lock_tried),
            case("W8", "blocking", lock_blocking),
            case("W8", "async", lock_awaited),
            case("W8m", "blocking", locks::crowds),
            case("W8n", "lock", locks::create),
            case("W20", "event", locks::wake_all),
            case("W21", "lock", locks::hand_over),
            case("W9", "lock", increments),
            case("W9", "fetch_add", memory::fetch_add),
            case("W10", "array", || block_on(memory::array())),
            case("W11", "manager", dict::manager),
            case("W11", "manager_run", dict::manager_run),
            case("W11", "manager_batches", dict::batches),
            case("W11n", "manager", dict::many_clients),
            case("W11s", "manager", dict::from_sleep),
            case("W12", "pool", || block_on(idle_workers())),
            case("W13", "pool", || block_on(killed_worker())),
            case("W22", "map", tasks::map),
            case("W22", "imap_unordered", tasks::stream),
            case("W22", "apply_64", tasks::apply),
            case("W22", "apply_beside_map", tasks::beside_map),
            case("W18", "apply", tasks::as_they_arrive),
            case("W17", "queue_of_eight", || block_on(named_by_bounded())),
            case("W17", "pair_bytes_1_mib", values::pair_bytes::<1>),
            case("W17", "pair_bytes_16_mib", values::pair_bytes::<16>),
            case("W17", "pair_f64_1_mib", values::pair_f64::<1>),
            case("W17", "pair_f64_16_mib", values::pair_f64::<16>),
            case("W17", "struct_f64_1_mib", values::struct_f64::<1>),
            case("W17", "struct_f64_16_mib", values::struct_f64::<16>),
            case("W17", "string_1_mib", values::string),
            case("W17", "list_f64_1_mib", values::list_f64),
            case("W17", "arrays", values::arrays),
            case("W17", "pairs", values::pairs),
            case("W17", "pairs_small", values::pairs_small),
            case("W17", "structs", values::structs),
            case("W17", "structs_small", values::structs_small),
            case("W17", "strings", values::strings),
            case("W17", "map", values::map),
            case("W17", "eight", values::eight),
            case("W17", "eight_small", values::eight_small),
        ],
        &[],
    );
}
