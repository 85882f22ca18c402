//! Timeouts measure real time, whatever tokio's clock shows: a test that pauses it neither ends a wait for another
//! process early nor keeps it from ending.

mod common;

use common::pool::{MS, nap, stuck};
use common::{Deadline, in_child, within};
use multiprocess::connection::{Listener, connect};
use multiprocess::{self as mp, Barrier, Condition, ErrorKind, Event, Lock, Manager, Pool, Process, Queue, RwLock};
use multiprocess::{Semaphore, simplex};
use std::future::Future;
use std::time::{Duration, Instant};

mp::test_support!();

const LONG: Duration = Duration::from_secs(15);
const SHORT: Duration = Duration::from_millis(60);

/// `future` ends with `Timeout`, after as much real time as it was given.
async fn times_out<T>(what: &str, future: impl Future<Output = mp::Result<T>>) {
    let start = Instant::now();
    let error = future.await.err().unwrap_or_else(|| panic!("{what} does not time out"));
    let kinds = [ErrorKind::Timeout, ErrorKind::BrokenBarrier];
    assert!(kinds.contains(&error.kind()), "{what}: {error}");
    assert!(start.elapsed() >= SHORT, "{what} timed out after {:?}", start.elapsed());
}

/// How much CPU time this process has used.
fn cpu_time() -> Duration {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(used.tv_sec as u64, used.tv_nsec as u32)
}

#[tokio::test(start_paused = true)]
async fn get_with_a_paused_clock_waits_for_a_child_that_works() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let queue = Queue::unbounded()?;
    let put = |queue: Queue<u64>| queue.blocking_put(nap(100)).expect("put");
    let child = Process::spawn(put, (queue.clone(),))?;
    assert_eq!(queue.get_timeout(LONG).await?, 100);
    child.await
}

#[tokio::test(start_paused = true)]
async fn recv_and_poll_with_a_paused_clock_wait_for_a_child_that_works() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let (sender, mut receiver) = simplex::<u64>()?;
    let send = |mut sender: mp::Sender<u64>| {
        sender.blocking_send(nap(100)).expect("send");
        sender.blocking_send(nap(100)).expect("send");
    };
    let child = Process::spawn(send, (sender,))?;
    assert!(receiver.poll(LONG).await?);
    assert_eq!(receiver.recv_timeout(LONG).await?, 100);
    assert_eq!(receiver.recv_timeout(LONG).await?, 100);
    child.await
}

#[tokio::test(start_paused = true)]
async fn event_lock_and_barrier_with_a_paused_clock_wait_for_a_child_that_works() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let (event, lock, barrier) = (Event::new()?, Lock::new()?, Barrier::new(2)?);
    let work = |event: Event, lock: Lock, barrier: Barrier| {
        let guard = lock.blocking_acquire().expect("a lock");
        event.set();
        nap(100);
        drop(guard);
        nap(100);
        barrier.blocking_wait().expect("a barrier");
    };
    let child = Process::spawn(work, (event.clone(), lock.clone(), barrier.clone()))?;
    event.wait_timeout(LONG).await?;
    drop(lock.acquire_timeout(LONG).await.map_err(|error| error.into_error())?);
    barrier.wait_timeout(LONG).await?;
    child.await
}

#[tokio::test(start_paused = true)]
async fn timeouts_with_a_paused_clock_come_after_their_real_time() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let (queue, event, lock) = (Queue::<u8>::unbounded()?, Event::new()?, Lock::new()?);
    let (semaphore, rwlock, condition) = (Semaphore::new(0)?, RwLock::new()?, Condition::new()?);
    let (_sender, mut receiver) = simplex::<u8>()?;
    times_out("get", queue.get_timeout(SHORT)).await;
    times_out("recv", receiver.recv_timeout(SHORT)).await;
    times_out("event", event.wait_timeout(SHORT)).await;
    times_out("semaphore", async { semaphore.acquire_timeout(SHORT).await.map_err(|error| error.into_error()) }).await;
    let _held = lock.acquire().await.map_err(|error| error.into_error())?;
    times_out("lock", async { lock.acquire_timeout(SHORT).await.map_err(|error| error.into_error()) }).await;
    let _read = rwlock.read().await.map_err(|error| error.into_error())?;
    times_out("write", async { rwlock.write_timeout(SHORT).await.map_err(|error| error.into_error()) }).await;
    let guard = condition.lock().await.map_err(|error| error.into_error())?;
    let waited = async { condition.wait_timeout(guard, SHORT).await.map_err(|error| error.into_error()) };
    times_out("condition", waited).await;
    times_out("barrier", Barrier::new(2)?.wait_timeout(SHORT)).await;
    let manager = Manager::start().await?;
    let (queue, event) = (manager.queue::<u8>(0).await?, manager.event().await?);
    times_out("get of a manager's queue", queue.get_timeout(SHORT)).await;
    times_out("wait for a manager's event", event.wait_timeout(SHORT)).await;
    manager.shutdown().await
}

/// A blocking task keeps a paused clock from going on by itself.
#[tokio::test(start_paused = true)]
async fn a_clock_that_stands_still_keeps_no_wait_from_ending() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let blocking = tokio::task::spawn_blocking(move || released.recv());
    times_out("get", Queue::<u8>::unbounded()?.get_timeout(SHORT)).await;
    let pool = Pool::new(1)?;
    times_out("an item", pool.apply(stuck, ()).timeout(SHORT)).await;
    drop(release);
    let _ = blocking.await;
    Ok(())
}

#[tokio::test]
async fn a_clock_that_is_paused_or_turned_during_a_wait_does_not_end_it() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let queue = Queue::<u8>::unbounded()?;
    let turn = async {
        tokio::task::yield_now().await;
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(3600)).await;
    };
    let waited = async {
        times_out("get", queue.get_timeout(SHORT)).await;
    };
    futures::join!(waited, turn);
    tokio::time::resume();
    times_out("get with a clock that was paused", queue.get_timeout(SHORT)).await;
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_handshake_with_a_paused_clock_waits_for_a_child_that_is_slow() -> mp::Result<()> {
    let _deadline = Deadline::start();
    let listener = Listener::bind("127.0.0.1:0").authkey(b"key").await?;
    let address = listener.local_addr().to_string();
    // It has a clock of its own, and lets half of the handshake wait.
    let slow = async |address: String| -> mp::Result<()> {
        nap(100);
        let connection = connect(&address, Some(b"key")).await?;
        connection.send_bytes(b"here").await
    };
    let child = Process::spawn(slow, (address,))?;
    assert_eq!(listener.accept().await?.recv_bytes().await?, b"here");
    child.await??;
    // The other way round: nobody answers for a while.
    let (address, told) = (Queue::unbounded()?, Queue::unbounded()?);
    let late = async |address: Queue<String>, told: Queue<u8>| -> mp::Result<()> {
        let socket = std::net::TcpListener::bind("127.0.0.1:0")?;
        address.put(socket.local_addr()?.to_string()).await?;
        let _peer = socket.accept()?;
        told.get().await.map(drop)
    };
    let child = Process::spawn(late, (address.clone(), told.clone()))?;
    let start = Instant::now();
    let silent = connect(&address.get().await?, Some(b"key")).handshake_timeout(SHORT).await;
    assert_eq!(silent.expect_err("no word").kind(), ErrorKind::Authentication);
    assert!(start.elapsed() >= SHORT, "{:?}", start.elapsed());
    told.put(0).await?;
    child.await?
}

#[tokio::test(start_paused = true)]
async fn deadlines_of_a_pool_with_a_paused_clock_are_real_and_cost_no_cpu() -> mp::Result<()> {
    let _deadline = Deadline::start();
    // In a process where nobody else computes.
    let costs = async || -> mp::Result<Duration> {
        tokio::time::pause();
        let pool = Pool::new(1)?;
        assert_eq!(pool.apply(nap, (1,)).await?, 1);
        let before = cpu_time();
        assert_eq!(pool.apply(nap, (600,)).timeout(LONG).queue_timeout(LONG).await?, 600);
        Ok(cpu_time() - before)
    };
    let spun = Process::spawn(costs, ())?.await??;
    assert!(spun < 300 * MS, "it has spun for {spun:?}");
    let pool = Pool::new(1)?;
    times_out("an item", pool.apply(stuck, ()).timeout(SHORT)).await;
    let begun = Queue::unbounded()?;
    let running = pool.apply_async(common::pool::say_and_stay, (begun.clone(),));
    begun.get().await?;
    let start = Instant::now();
    assert_eq!(pool.shutdown(SHORT).await.killed(), 1);
    assert!(start.elapsed() >= SHORT, "the grace is real, too: {:?}", start.elapsed());
    assert!(running.await.is_err());
    Ok(())
}

/// With a clock that runs the timer is tokio's own, which is no system call. In a process where nobody else opens anything.
#[tokio::test]
async fn a_wait_with_a_timeout_takes_no_descriptor_while_the_clock_runs() -> mp::Result<()> {
    in_child(waits_take_no_descriptor, ()).await
}

async fn waits_take_no_descriptor() -> mp::Result<()> {
    let queue = Queue::<u8>::unbounded()?;
    assert!(queue.get_timeout(MS).await.is_err());
    let before = common::holdings().descriptors;
    let mut waits: Vec<_> = (0..10).map(|_| Box::pin(queue.get_timeout(LONG))).collect();
    for wait in &mut waits {
        assert!(futures::poll!(wait).is_pending());
    }
    assert_eq!(common::holdings().descriptors, before);
    drop(waits);
    within(queue.put(1)).await?;
    assert_eq!(within(queue.get_timeout(LONG)).await?, 1);
    Ok(())
}
