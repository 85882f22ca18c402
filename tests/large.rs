//! Large values: that they arrive, and how much memory they take on their way.

use multiprocess::{self as mp, Pool, Process, Queue};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs;
use std::time::Duration;

mod common;
use common::{Deadline, ring_memory};

multiprocess::test_support!();

const MIB: usize = 1 << 20;
/// So large are the values whose memory is measured, in MiB.
const LARGE: usize = 64;

fn field(file: &str, key: &str) -> usize {
    let text = fs::read_to_string(file).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or_else(|| panic!("no {key} in {file}"))
}

/// If this machine has so many MiB of memory left, they are for the caller alone of all that ask, until it drops this.
async fn memory(mib: usize) -> Option<tokio::sync::MutexGuard<'static, ()>> {
    static MEMORY: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let memory = MEMORY.lock().await;
    let has = field("/proc/meminfo", "MemAvailable:") / 1024 >= mib;
    if !has {
        eprintln!("skipped: less than {mib} MiB of memory are available");
    }
    has.then_some(memory)
}

fn len_of(bytes: Vec<u8>) -> usize {
    bytes.len()
}

#[tokio::test]
async fn an_argument_of_300_mib_reaches_the_worker_of_a_pool() -> mp::Result<()> {
    let Some(_memory) = memory(3 << 10).await else { return Ok(()) };
    let _deadline = Deadline::after(Duration::from_secs(180));
    let len = 300 * MIB;
    assert_eq!(Pool::new(1)?.apply(len_of, (vec![0; len],)).await?, len);
    Ok(())
}

#[derive(Serialize, Deserialize)]
struct Holds {
    id: i32,
    samples: Vec<f64>,
}

trait Large: Serialize + DeserializeOwned + Send + Sync + 'static {
    fn of(mib: usize) -> Self;

    fn make() -> Self {
        Self::of(LARGE)
    }
}

impl Large for (i32, Vec<u8>) {
    fn of(mib: usize) -> Self {
        (1, vec![1; mib * MIB])
    }
}

impl Large for Vec<f64> {
    fn of(mib: usize) -> Self {
        vec![1.0; mib * MIB / 8]
    }
}

impl Large for Holds {
    fn of(mib: usize) -> Self {
        Self { id: 1, samples: Large::of(mib) }
    }
}

/// Decoded from a buffer: it has no large part.
impl Large for Vec<String> {
    fn of(mib: usize) -> Self {
        vec!["x".repeat(1000); mib * MIB / 1024]
    }
}

/// How many MiB this process has had at most since then, beyond what it had then.
struct Since(usize);

impl Since {
    fn now() -> Self {
        fs::write("/proc/self/clear_refs", "5").unwrap();
        Self(field("/proc/self/status", "VmRSS:"))
    }

    fn peak(&self) -> usize {
        field("/proc/self/status", "VmHWM:").saturating_sub(self.0) / 1024
    }
}

/// A worker that is idle must not take over what another one only has not received yet.
#[tokio::test]
async fn large_argument_is_sent_to_one_worker() -> mp::Result<()> {
    let Some(_memory) = memory(2 << 10).await else { return Ok(()) };
    let _deadline = Deadline::after(Duration::from_secs(60));
    let pool = Pool::new(2)?;
    assert_eq!(pool.map(|n: u8| n, 0..10).await?.len(), 10);
    assert_eq!(pool.apply(len_of, (vec![1; 2 * LARGE * MIB],)).await?, 2 * LARGE * MIB);
    let peaks: Vec<u64> = pool.stats().workers.iter().map(|worker| worker.peak).collect();
    assert_eq!(peaks.iter().filter(|peak| **peak > (LARGE * MIB) as u64).count(), 1, "{peaks:?}");
    Ok(())
}

fn put<T: Large>(queue: Queue<T>) -> mp::Result<usize> {
    let value = T::make();
    let since = Since::now();
    queue.try_put(value).map_err(mp::Error::other)?;
    Ok(since.peak())
}

fn send<T: Large>((mut sender, _receiver): (mp::Sender<T>, mp::Receiver<T>)) -> mp::Result<usize> {
    let value = T::make();
    let since = Since::now();
    sender.blocking_send(value).map_err(mp::Error::other)?;
    Ok(since.peak())
}

/// The other end puts it there and goes.
fn receive<T: Large>(mut receiver: mp::Receiver<T>) -> mp::Result<usize> {
    let since = Since::now();
    let _value = receiver.blocking_recv()?;
    Ok(since.peak())
}

fn send_and_go<T: Large>(mut sender: mp::Sender<T>) -> mp::Result<()> {
    sender.blocking_send(T::make()).map_err(mp::Error::other)
}

fn get<T: Large>(queue: Queue<T>) -> mp::Result<usize> {
    let since = Since::now();
    let _value = queue.blocking_get()?;
    Ok(since.peak())
}

fn nothing() {}

/// The peak of the process at the beginning of a call, which has its arguments.
fn take<T: Large>(_: T) -> usize {
    peak()
}

/// Sends an argument and receives a result: the peaks here, and that of the child.
async fn through_a_process<T: Large>() -> mp::Result<[usize; 3]> {
    Process::spawn(nothing, ())?.join().await?;
    let value = T::make();
    let since = Since::now();
    let mut child = Process::spawn(take::<T>, (value,))?;
    let sender = since.peak();
    let receiver = child.join().await?;
    let since = Since::now();
    let _value = Process::spawn(T::make, ())?.join().await?;
    Ok([sender, receiver, since.peak()])
}

fn peak() -> usize {
    field("/proc/self/status", "VmHWM:") / 1024
}

/// The peaks of an argument, here and in the worker, and of a result.
async fn through_a_pool<T: Large>() -> mp::Result<[usize; 4]> {
    let pool = Pool::new(1)?;
    pool.apply(nothing, ()).await?;
    let value = T::make();
    let since = Since::now();
    let receiver = pool.apply(take::<T>, (value,)).await?;
    let sender = since.peak();
    // One whose memory no argument has been in.
    let pool = Pool::new(1)?;
    pool.apply(nothing, ()).await?;
    let since = Since::now();
    let _value = pool.apply(T::make, ()).await?;
    let result = since.peak();
    Ok([sender, receiver, result, pool.apply(peak, ()).await?])
}

/// Checks the peaks of each way: a sender needs the value's size beyond the value, and so does a receiver.
async fn check_peaks_of<T: Large>() -> mp::Result<()> {
    let what = std::any::type_name::<T>();
    let at_most = |way: &str, peak: usize, copies: usize| {
        assert!(peak <= copies * LARGE + LARGE / 2, "{what}, {way}: {peak} MiB for a value of {LARGE}");
    };
    let queue = Queue::<T>::unbounded()?;
    at_most("put", Process::spawn(put::<T>, (queue.clone(),))?.join().await??, 1);
    // The value itself is one of the two.
    at_most("get", Process::spawn(get::<T>, (queue,))?.join().await??, 2);
    // Its memory stays in the queue when another item lies behind it.
    let queue = Queue::<T>::unbounded()?;
    Process::spawn(put::<T>, (queue.clone(),))?.join().await??;
    queue.try_put(T::of(0)).map_err(mp::Error::other)?;
    at_most("get with another item behind", Process::spawn(get::<T>, (queue,))?.join().await??, 2);
    at_most("send", Process::spawn(send::<T>, (mp::simplex()?,))?.join().await??, 1);
    let [argument, taken, result] = Process::spawn(through_a_process::<T>, ())?.join().await??;
    at_most("argument of a process", argument, 1);
    at_most("argument in a process", taken, 2);
    at_most("result of a process", result, 2);
    let (sender, receiver) = mp::simplex()?;
    let mut sends = Process::spawn(send_and_go::<T>, (sender,))?;
    at_most("receive", Process::spawn(receive::<T>, (receiver,))?.join().await??, 2);
    sends.join().await??;
    let [argument, taken, result, made] = Process::spawn(through_a_pool::<T>, ())?.join().await??;
    at_most("argument of a pool", argument, 1);
    at_most("argument in a worker", taken, 2);
    at_most("result of a worker", result, 2);
    // The value itself is one of the two.
    at_most("result in a worker", made, 2);
    Ok(())
}

#[tokio::test]
async fn large_value_takes_no_more_memory_than_documented() -> mp::Result<()> {
    let Some(_memory) = memory(2 << 10).await else { return Ok(()) };
    let _deadline = Deadline::after(Duration::from_secs(400));
    check_peaks_of::<(i32, Vec<u8>)>().await?;
    check_peaks_of::<Vec<f64>>().await?;
    check_peaks_of::<Vec<String>>().await?;
    check_peaks_of::<Holds>().await
}

/// Puts and gets `count` items of `mib` MiB through as many queues, which stay; the memory that the queues had at most, and
/// whether it goes.
async fn fill_and_drain(count: usize, mib: usize) -> mp::Result<(u64, bool)> {
    let (mut queues, mut most) = (Vec::new(), 0);
    for _ in 0..count {
        let queue = Queue::unbounded()?;
        queue.put(vec![1u8; mib * MIB]).await.map_err(mp::Error::other)?;
        assert_eq!(queue.get().await?.len(), mib * MIB);
        queues.push(queue);
        most = most.max(ring_memory());
    }
    let start = std::time::Instant::now();
    while ring_memory() > (count * MIB) as u64 && start.elapsed() < Duration::from_secs(60) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for queue in &queues {
        queue.put(vec![2; 10]).await.map_err(mp::Error::other)?;
        assert_eq!(queue.get().await?, [2; 10]);
    }
    Ok((most, ring_memory() <= (count * MIB) as u64))
}

/// `reclaim`: what a drained queue keeps is bounded, and goes after a time.
#[tokio::test]
async fn drained_queue_keeps_little_memory_and_gives_it_back() -> mp::Result<()> {
    let Some(_memory) = memory(3 << 10).await else { return Ok(()) };
    let _deadline = Deadline::after(Duration::from_secs(300));
    // In a process of its own: other tests have queues too.
    for (count, mib, bound) in [(1, 8, 13), (1, 40, 50), (1, 560, 4)] {
        let (most, is_given_back) = Process::spawn(fill_and_drain, (count, mib))?.join().await??;
        assert!(most <= (bound + 2 * count) as u64 * MIB as u64, "{} MiB of {count} x {mib}", most / MIB as u64);
        assert!(is_given_back, "{count} x {mib}");
    }
    Ok(())
}

fn get_and_end(queue: Queue<Vec<u8>>) {
    assert_eq!(queue.blocking_get().unwrap().len(), 40 * MIB);
    // Before it has given anything back.
    std::process::abort();
}

/// How somebody waits for the next item.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum Wait {
    Get,
    Lease,
    Select,
}

/// Whether what a killed process kept is given back by a process that waits for an item.
async fn waits_after_a_death(wait: Wait) -> mp::Result<bool> {
    let queue = Queue::<Vec<u8>>::unbounded()?;
    queue.put(vec![1; 40 * MIB]).await.map_err(mp::Error::other)?;
    assert!(ring_memory() >= 40 << 20);
    assert!(Process::spawn(get_and_end, (queue.clone(),))?.join().await.is_err());
    let waits = tokio::spawn({
        let queue = queue.clone();
        async move {
            match wait {
                Wait::Get => queue.get().await,
                Wait::Lease => queue.lease().await?.commit(),
                Wait::Select => {
                    let mut set = mp::QueueSet::new();
                    set.insert((), &queue)?;
                    set.get().await.map(|((), item)| item)
                }
            }
        }
    });
    let start = std::time::Instant::now();
    while ring_memory() > 2 << 20 && start.elapsed() < Duration::from_secs(60) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let is_given_back = ring_memory() <= 2 << 20;
    queue.put(vec![7]).await.map_err(mp::Error::other)?;
    assert_eq!(waits.await.map_err(mp::Error::other)??, [7]);
    Ok(is_given_back)
}

/// `reclaim`: a process that waits for an item takes over from a keeper that was killed.
#[tokio::test]
async fn waiting_consumer_gives_back_memory_kept_by_a_killed_one() -> mp::Result<()> {
    let _deadline = Deadline::after(Duration::from_secs(180));
    for wait in [Wait::Get, Wait::Lease, Wait::Select] {
        assert!(Process::spawn(waits_after_a_death, (wait,))?.join().await??, "{wait:?}");
    }
    Ok(())
}

/// The memory of a queue after an item of 40 MiB that is decoded, and a small one behind it.
async fn memory_after_a_small_item(is_leased: bool) -> mp::Result<u64> {
    let queue = Queue::unbounded()?;
    for item in [(1, vec![1u8; 40 * MIB]), (2, vec![2; 10])] {
        queue.put(item).await.map_err(mp::Error::other)?;
    }
    for (number, len) in [(1, 40 * MIB), (2, 10)] {
        let item = if is_leased { queue.lease().await?.commit()? } else { queue.get().await? };
        assert_eq!((item.0, item.1.len()), (number, len));
    }
    Ok(ring_memory())
}

/// `reclaim`: a sender that has no memory for a second copy finds none in the queue.
#[tokio::test]
async fn memory_of_a_large_item_goes_with_the_small_one_that_follows_it() -> mp::Result<()> {
    let _deadline = Deadline::after(Duration::from_secs(180));
    for is_leased in [false, true] {
        let left = Process::spawn(memory_after_a_small_item, (is_leased,))?.join().await??;
        assert!(left < 2 << 20, "{left} bytes are kept, leased: {is_leased}");
    }
    Ok(())
}

/// Gets an item of 64 MiB with addresses for 160 MiB more than it has: the value, and the item in the queue.
fn get_within_a_limit(queue: Queue<Vec<u8>>) -> mp::Result<usize> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let limit = ((field("/proc/self/status", "VmSize:") << 10) + 160 * MIB) as u64;
    setrlimit(Resource::As, Rlimit { current: Some(limit), maximum: Some(limit) }).map_err(mp::Error::other)?;
    let len = queue.blocking_get()?.len();
    assert_eq!((queue.blocking_get()?, queue.len()), (vec![7; 10], 0));
    Ok(len)
}

#[tokio::test]
async fn receiver_at_its_memory_limit_takes_an_item_of_less_than_half_of_it() -> mp::Result<()> {
    let _deadline = Deadline::after(Duration::from_secs(180));
    let queue = Queue::unbounded()?;
    for item in [vec![1; LARGE * MIB], vec![7; 10]] {
        queue.put(item).await.map_err(mp::Error::other)?;
    }
    assert_eq!(Process::spawn(get_within_a_limit, (queue,))?.join().await??, LARGE * MIB);
    Ok(())
}

fn bytes_of(len: usize) -> Vec<u8> {
    vec![1; len]
}

fn numbers_of(len: usize) -> (i32, Vec<f64>) {
    (1, vec![1.0; len / 8])
}

/// Prints how long results of 1 and 2 GiB take from a pool, and from a process. By hand: `--ignored --nocapture`.
#[tokio::test]
#[ignore = "it takes 10 GiB of memory, and prints times"]
async fn huge_results_of_a_pool_and_of_a_process() -> mp::Result<()> {
    let Some(_memory) = memory(12 << 10).await else { return Ok(()) };
    let _deadline = Deadline::after(Duration::from_secs(500));
    for len in [1 << 30, 2 << 30] {
        let pool = Pool::new(1)?;
        pool.apply(nothing, ()).await?;
        for round in 0..2 {
            let mut times = Vec::new();
            let mut timed = |start: std::time::Instant, got: usize| {
                assert_eq!(got, len);
                times.push(start.elapsed().as_secs_f64());
            };
            let start = std::time::Instant::now();
            timed(start, Process::spawn(bytes_of, (len,))?.join().await?.len());
            let start = std::time::Instant::now();
            timed(start, pool.apply(bytes_of, (len,)).await?.len());
            let start = std::time::Instant::now();
            timed(start, Process::spawn(numbers_of, (len,))?.join().await?.1.len() * 8);
            let start = std::time::Instant::now();
            timed(start, pool.apply(numbers_of, (len,)).await?.1.len() * 8);
            println!("{} MiB, round {round}: process, pool by bytes, then with numbers: {times:.2?} s", len / MIB);
        }
    }
    Ok(())
}
