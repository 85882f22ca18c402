//! `Lock` and `RLock`: exclusion across tasks, threads and processes, fairness, death, cost.

mod common;

use common::{
    Deadline, eventually, falls_asleep, falls_asleep_in_line, go_on, in_child, rounds, stop, thread_falls_asleep,
    within,
};
use futures::{FutureExt, poll};
use multiprocess::{self as mp, ErrorKind, Lock, Process, Queue, RLock};
use std::pin::pin;
use std::time::{Duration, Instant};

mp::test_support!();

fn is_send<T: Send>(value: T) -> T {
    value
}

/// Starts a child that holds `lock` until it is killed, and waits until it does.
async fn held_by_child(lock: &Lock) -> Process<()> {
    let told = Queue::unbounded().unwrap();
    let hold = async |lock: Lock, told: Queue<()>| {
        let _guard = lock.acquire().await.unwrap();
        told.put(()).await.unwrap();
        std::future::pending::<()>().await
    };
    let child = Process::spawn(hold, (lock.clone(), told.clone())).unwrap();
    within(told.get()).await.unwrap();
    child
}

#[tokio::test]
async fn lock_01_held_once_and_free_after_the_guard() {
    let lock = Lock::new().unwrap();
    let guard = within(is_send(lock.acquire())).await.unwrap();
    assert_eq!(lock.try_acquire().unwrap_err().kind(), ErrorKind::WouldBlock);
    let timed = within(lock.acquire_timeout(Duration::from_millis(20))).await;
    assert_eq!(timed.unwrap_err().kind(), ErrorKind::Timeout);
    drop(is_send(guard));
    drop(lock.try_acquire().unwrap());
    drop(within(lock.acquire_timeout(Duration::from_millis(20))).await.unwrap());
}

#[test]
fn lock_01_for_plain_functions() {
    let _deadline = Deadline::start();
    let lock = Lock::new().unwrap();
    let guard = lock.blocking_acquire().unwrap();
    let start = Instant::now();
    let timed = lock.blocking_acquire_timeout(Duration::from_millis(20));
    assert_eq!(timed.unwrap_err().kind(), ErrorKind::Timeout);
    assert!(start.elapsed() >= Duration::from_millis(20));
    let (sender, thread) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            sender.send(rustix::thread::gettid()).unwrap();
            drop(lock.blocking_acquire().unwrap());
        });
        thread_falls_asleep(thread.recv().unwrap());
        drop(guard);
        waiting.join().unwrap();
    });
}

#[tokio::test]
#[should_panic(expected = "block")]
async fn lock_01_blocking_inside_async_code_panics() {
    let _ = Lock::new().unwrap().blocking_acquire();
}

#[tokio::test]
async fn lock_01_excludes_across_processes() {
    let lock = Lock::new().unwrap();
    let child = held_by_child(&lock).await;
    assert_eq!(lock.try_acquire().unwrap_err().kind(), ErrorKind::WouldBlock);
    let mut waiting = pin!(lock.acquire());
    assert!(poll!(&mut waiting).is_pending());
    child.kill().unwrap();
    assert_eq!(within(waiting).await.unwrap_err().kind(), ErrorKind::OwnerDied);
}

#[tokio::test]
async fn lock_02_owner_acquires_again_and_must_release_as_often() {
    let lock = RLock::new().unwrap();
    let (one, two, three) = (lock.acquire().await.unwrap(), lock.try_acquire().unwrap(), lock.acquire().await.unwrap());
    let other = async |lock: RLock| lock.try_acquire().map(drop).map_err(|error| error.kind());
    for guard in [one, three, two] {
        let here = tokio::spawn({
            let lock = lock.clone();
            async move { other(lock).await }
        });
        assert_eq!(within(here).await.unwrap(), Err(ErrorKind::WouldBlock));
        assert!(in_child(async |lock: RLock| lock.try_acquire().is_err(), (lock.clone(),)).await);
        drop(guard);
    }
    assert_eq!(tokio::spawn(other(lock.clone())).await.unwrap(), Ok(()));
    assert!(in_child(async |lock: RLock| lock.try_acquire().is_ok(), (lock.clone(),)).await);
}

#[tokio::test]
async fn lock_02_the_owner_is_the_task_also_when_it_moves_between_threads() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let lock = RLock::new().unwrap();
    let task = runtime.spawn({
        let lock = lock.clone();
        async move {
            let _outer = lock.acquire().await.unwrap();
            for _ in 0..100 {
                tokio::task::yield_now().await;
                let _inner = lock.try_acquire().unwrap();
            }
        }
    });
    within(task).await.unwrap();
    drop(lock.try_acquire().unwrap());
    runtime.shutdown_background();
}

#[tokio::test]
async fn lock_03_the_guard_is_its_scope() {
    let lock = Lock::new().unwrap();
    {
        let _guard = lock.acquire().await.unwrap();
        tokio::task::yield_now().await;
        assert!(lock.try_acquire().is_err());
    }
    assert!(lock.try_acquire().is_ok());
}

#[tokio::test]
async fn lock_04_a_guard_may_be_dropped_in_another_task_or_thread() {
    let lock = Lock::new().unwrap();
    let guard = lock.acquire().await.unwrap();
    let dropped = tokio::spawn(async move { drop(guard) });
    within(lock.acquire()).await.map(drop).unwrap();
    within(dropped).await.unwrap();
    let guard = lock.acquire().await.unwrap();
    std::thread::spawn(move || drop(guard));
    within(lock.acquire()).await.map(drop).unwrap();
}

#[tokio::test]
async fn lock_06_killed_holder_is_reported_as_owner_died() {
    rounds(killed_holder, |took| *took < Duration::from_millis(50)).await.unwrap();
}

/// Returns after which time a waiter has learned of the death.
async fn killed_holder() -> mp::Result<Duration> {
    let lock = Lock::new()?;
    let child = held_by_child(&lock).await;
    let mut waiting = pin!(lock.acquire());
    falls_asleep(waiting.as_mut()).await;
    let killed_at = Instant::now();
    child.kill().unwrap();
    let error = within(waiting).await.unwrap_err();
    let took = killed_at.elapsed();
    assert_eq!(error.kind(), ErrorKind::OwnerDied);
    let guard = error.into_guard();
    assert_eq!(lock.try_acquire().unwrap_err().kind(), ErrorKind::WouldBlock);
    drop(guard);
    drop(lock.try_acquire().unwrap());
    Ok(took)
}

#[tokio::test]
async fn lock_06_dropped_owner_died_error_releases_the_lock() {
    let lock = Lock::new().unwrap();
    let child = held_by_child(&lock).await;
    child.kill().unwrap();
    let error: mp::Error = within(lock.acquire()).await.unwrap_err().into();
    assert_eq!(error.kind(), ErrorKind::OwnerDied);
    drop(lock.try_acquire().unwrap());
}

#[tokio::test]
async fn lock_06_holder_that_exits_with_a_leaked_guard_counts_as_dead() {
    let lock = Lock::new().unwrap();
    let forget = async |lock: Lock| std::mem::forget(lock.acquire().await.unwrap());
    within(Process::spawn(forget, (lock.clone(),)).unwrap()).await.unwrap();
    assert_eq!(within(lock.acquire()).await.unwrap_err().kind(), ErrorKind::OwnerDied);
}

#[test]
fn lock_06_for_plain_functions() {
    let _deadline = Deadline::start();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let lock = Lock::new().unwrap();
    let child = runtime.block_on(held_by_child(&lock));
    let (sender, thread) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            sender.send(rustix::thread::gettid()).unwrap();
            lock.blocking_acquire().map(drop).map_err(|error| error.kind())
        });
        thread_falls_asleep(thread.recv().unwrap());
        child.kill().unwrap();
        assert_eq!(waiting.join().unwrap(), Err(ErrorKind::OwnerDied));
    });
}

/// A process that is stopped right after it was woken delays the sleepers behind it until the next release, and no longer.
#[tokio::test]
async fn stopped_process_that_was_woken_is_overtaken() {
    let once = async |lock: Lock| lock.acquire().await.map(drop).is_ok();
    let lock = Lock::new().unwrap();
    let guard = lock.acquire().await.unwrap();
    let mut waiting = Vec::new();
    for _ in 0..2 {
        let child = Process::spawn(once, (lock.clone(),)).unwrap();
        falls_asleep_in_line(child.pid()).await;
        waiting.push(child);
    }
    let (second, first) = (waiting.pop().unwrap(), waiting.pop().unwrap());
    stop(first.pid());
    drop(guard);
    eventually("the second has it", || {
        drop(lock.try_acquire());
        !second.is_alive()
    })
    .await;
    assert!(within(second).await.unwrap() && first.is_alive());
    go_on(first.pid());
    assert!(within(first).await.unwrap());
}

/// Each of these is a lock of its own: nothing is shared that a death could break.
#[tokio::test]
async fn lock_07_travels_in_any_value_at_any_time() {
    let (to, from) = (Queue::<Vec<Lock>>::unbounded().unwrap(), Queue::<Lock>::unbounded().unwrap());
    let take = async |to: Queue<Vec<Lock>>, from: Queue<Lock>| {
        let locks = to.get().await.unwrap();
        from.put(locks[1].clone()).await.unwrap();
        locks.iter().map(|lock| lock.try_acquire().is_ok()).collect::<Vec<_>>()
    };
    let child = Process::spawn(take, (to.clone(), from.clone())).unwrap();
    let locks = [Lock::new().unwrap(), Lock::new().unwrap()];
    let guard = locks[0].acquire().await.unwrap();
    to.put(locks.to_vec()).await.unwrap();
    let back = within(from.get()).await.unwrap();
    assert_eq!(within(child).await.unwrap(), [false, true]);
    let _same = back.acquire().await.unwrap();
    assert!(locks[1].try_acquire().is_err());
    drop(guard);
}

/// An `RLock` to its sender, a `Lock` to its receiver.
enum Disguised {
    Sent(RLock),
    Received,
}

impl serde::Serialize for Disguised {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self::Sent(lock) = self else { panic!("sent on") };
        lock.serialize(serializer)
    }
}

impl<'de> serde::Deserialize<'de> for Disguised {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Lock::deserialize(deserializer).map(|_| Self::Received)
    }
}

#[tokio::test]
async fn lock_07_other_kinds_of_object_and_other_formats_are_refused() {
    let queue = Queue::unbounded().unwrap();
    queue.put(Disguised::Sent(RLock::new().unwrap())).await.unwrap();
    let Err(error) = within(queue.get()).await else { panic!("taken for a lock") };
    assert_eq!(error.kind(), ErrorKind::Decode);
    assert!(error.to_string().contains("lock"), "{error}");
    let bytes = serde_json::to_vec(&Lock::new().unwrap());
    assert!(bytes.unwrap_err().to_string().contains("on its way to another process"));
}

#[test]
fn uncontended_acquire_makes_no_system_call_and_no_allocation() {
    let _deadline = Deadline::start();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let operate = |rounds: u32| {
        let (lock, rlock, condition) = (Lock::new().unwrap(), RLock::new().unwrap(), mp::Condition::new().unwrap());
        let work = || {
            drop(lock.try_acquire().unwrap());
            drop(lock.blocking_acquire().unwrap());
            drop(rlock.try_acquire().unwrap());
            drop(condition.try_lock().unwrap());
            condition.notify_one();
            condition.notify_all();
            let waited = lock.acquire().now_or_never().unwrap();
            drop(waited.unwrap());
        };
        work();
        let before = ALLOCATED.get();
        // Strict mode lets a thread read, write and exit: any other system call kills it.
        rustix::thread::set_secure_computing_mode(rustix::thread::SecureComputingMode::Strict).unwrap();
        (0..rounds).for_each(|_| work());
        let allocated = ALLOCATED.get() - before;
        // SAFETY: `exit`, the one call that is left to this thread; its process has nothing more to do.
        unsafe { libc::syscall(libc::SYS_exit, i64::from(u8::from(allocated > 0))) };
    };
    let child = runtime.block_on(async { Process::spawn(operate, (100,)).unwrap().wait().await });
    assert_eq!(within_code(child), Some(0), "9 for a system call, 1 for an allocation");
}

fn within_code(status: mp::Result<std::process::ExitStatus>) -> Option<i32> {
    use std::os::unix::process::ExitStatusExt;
    let status = status.unwrap();
    status.code().or(status.signal())
}

thread_local! {
    static ALLOCATED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Counts what each thread allocates.
struct Counting;

// SAFETY: the system's allocator does the work.
unsafe impl std::alloc::GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: std::alloc::Layout) -> *mut u8 {
        ALLOCATED.set(ALLOCATED.get() + 1);
        // SAFETY: as promised to us.
        unsafe { std::alloc::System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: std::alloc::Layout) {
        // SAFETY: as promised to us.
        unsafe { std::alloc::System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// A child that has the lock is sent it again: nothing more is open or mapped there.
#[tokio::test]
async fn lock_that_returns_is_the_same_descriptor_and_mapping() {
    let lock = Lock::new().unwrap();
    let (to, counts) = (Queue::<Lock>::unbounded().unwrap(), Queue::<common::Holdings>::unbounded().unwrap());
    let keep = async |to: Queue<Lock>, counts: Queue<common::Holdings>| {
        let mut kept = Vec::new();
        while let Ok(lock) = to.get().await {
            kept.push(lock);
            counts.put(common::holdings()).await.unwrap();
        }
    };
    let child = Process::spawn(keep, (to.clone(), counts.clone())).unwrap();
    let mut seen = Vec::new();
    for _ in 0..5 {
        to.put(lock.clone()).await.unwrap();
        seen.push(within(counts.get()).await.unwrap());
    }
    assert!(seen[1..].iter().all(|holdings| *holdings == seen[1]), "{seen:?}");
    to.close();
    within(child).await.unwrap();
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Many processes on one lock: everybody gets its turns, and each costs no more than twice what it does with two.
#[tokio::test]
async fn no_contender_starves() {
    let contend = |lock: Lock, go: Queue<()>, turns: u32| {
        go.blocking_get().unwrap();
        let (before, mut longest) = (cpu_time(), Duration::ZERO);
        for _ in 0..turns {
            let start = Instant::now();
            let _guard = lock.blocking_acquire().unwrap();
            longest = longest.max(start.elapsed());
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(5) {}
        }
        (longest, cpu_time() - before)
    };
    let turns_of = async |count: u32| {
        let (lock, go) = (Lock::new().unwrap(), Queue::unbounded().unwrap());
        let turns = 16_000 / count;
        let children: Vec<_> =
            (0..count).map(|_| Process::spawn(contend, (lock.clone(), go.clone(), turns)).unwrap()).collect();
        for _ in 0..count {
            go.put(()).await.unwrap();
        }
        let (mut cpu, mut longest) = (Duration::ZERO, Duration::ZERO);
        for child in children {
            let (longest_of_one, own) = within(child).await.unwrap();
            longest = longest.max(longest_of_one);
            cpu += own;
        }
        (cpu / 16_000, longest)
    };
    // The least of several rounds, for others that take the CPUs change what spinning is worth.
    let mut least = [(Duration::MAX, Duration::MAX); 3];
    let round = async || {
        for ((cost, longest), count) in least.iter_mut().zip([2, 8, 32]) {
            let (now, waited) = turns_of(count).await;
            (*cost, *longest) = ((*cost).min(now), (*longest).min(waited));
        }
        println!("CPU time of an acquisition and the longest wait, by 2, 8 and 32 processes: {least:?}");
        Ok(least)
    };
    let is_fair = |least: &[(Duration, Duration); 3]| {
        let is_fair = |(cost, longest): &(Duration, Duration)| {
            *longest < Duration::from_secs(5) && cost.as_nanos() < 2 * least[0].0.as_nanos()
        };
        least.iter().all(is_fair)
    };
    rounds(round, is_fair).await.unwrap();
}

/// Tasks and a thread that get a lock in turn and give up now and then; each round ends with a lock that is free.
async fn pass_on_with_drops(lock: &Lock, seed: u32) {
    let inside = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let enter = |guard: mp::LockGuard, inside: &std::sync::atomic::AtomicU32| {
        assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::AcqRel), 0, "two hold it");
        guard
    };
    let leave = |guard: mp::LockGuard, inside: &std::sync::atomic::AtomicU32| {
        inside.fetch_sub(1, std::sync::atomic::Ordering::AcqRel);
        drop(guard);
    };
    let tasks: Vec<_> = (0..12u32)
        .map(|task| {
            let (lock, inside) = (lock.clone(), inside.clone());
            tokio::spawn(async move {
                for turn in 0..40u32 {
                    let polls = (seed.wrapping_mul(31) ^ task.wrapping_mul(7) ^ turn.wrapping_mul(13)) % 9;
                    let mut acquire = pin!(lock.acquire());
                    let mut taken = None;
                    for _ in 0..polls {
                        if let std::task::Poll::Ready(guard) = poll!(&mut acquire) {
                            taken = Some(guard.unwrap());
                            break;
                        }
                        tokio::task::yield_now().await;
                    }
                    // With an odd number of polls the wait is given up here.
                    let guard = match taken {
                        None if polls.is_multiple_of(2) => acquire.await.unwrap(),
                        None => continue,
                        Some(guard) => guard,
                    };
                    let guard = enter(guard, &inside);
                    tokio::task::yield_now().await;
                    leave(guard, &inside);
                }
            })
        })
        .collect();
    let (in_thread, seen) = (lock.clone(), inside.clone());
    let thread = std::thread::spawn(move || {
        for _ in 0..40 {
            let Ok(guard) = in_thread.blocking_acquire_timeout(Duration::from_secs(20)) else { panic!("starved") };
            leave(enter(guard, &seen), &seen);
        }
    });
    for task in tasks {
        within(task).await.unwrap();
    }
    within(tokio::task::spawn_blocking(move || thread.join().unwrap())).await.unwrap();
    drop(lock.try_acquire().unwrap());
}

#[tokio::test]
async fn waits_dropped_while_tasks_pass_a_lock_on_leave_it_free() {
    let lock = Lock::new().unwrap();
    for seed in 0..20 {
        pass_on_with_drops(&lock, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn waits_dropped_while_threads_pass_a_lock_on_leave_it_free() {
    let lock = Lock::new().unwrap();
    for seed in 0..20 {
        pass_on_with_drops(&lock, seed).await;
    }
}

#[tokio::test]
async fn another_process_gets_a_lock_that_tasks_pass_on_among_themselves() {
    let (lock, got) = (Lock::new().unwrap(), Queue::unbounded().unwrap());
    let pass_on = async |lock: Lock| loop {
        let _guard = lock.acquire().await.unwrap();
        tokio::task::yield_now().await;
    };
    let tasks: Vec<_> = (0..3).map(|_| tokio::spawn(pass_on(lock.clone()))).collect();
    let take = async |lock: Lock, got: Queue<u32>| {
        for turn in 0..50 {
            let guard = lock.acquire().await.unwrap();
            got.put(turn).await.unwrap();
            drop(guard);
        }
    };
    let child = Process::spawn(take, (lock.clone(), got.clone())).unwrap();
    for turn in 0..50 {
        assert_eq!(within(got.get()).await.unwrap(), turn);
    }
    within(child).await.unwrap();
    tasks.iter().for_each(|task| task.abort());
    for task in tasks {
        assert!(within(task).await.unwrap_err().is_cancelled());
    }
    drop(lock.try_acquire().unwrap());
}

#[tokio::test]
async fn guard_dropped_beside_a_waiter_that_is_not_polled_frees_the_lock() {
    let lock = Lock::new().unwrap();
    let guard = within(lock.acquire()).await.unwrap();
    let mut waiting = pin!(lock.acquire());
    assert!(poll!(&mut waiting).is_pending());
    drop(guard);
    // It may be kept for the waiter at first.
    eventually("the lock is free", || lock.try_acquire().is_ok()).await;
    let take = async |lock: Lock| lock.acquire_timeout(Duration::from_secs(20)).await.is_ok();
    assert!(within(Process::spawn(take, (lock.clone(),)).unwrap()).await.unwrap());
    drop(within(waiting).await.unwrap());
}

#[test]
fn array_can_be_set_on_a_thread_whose_other_task_waits_for_its_lock() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _deadline = Deadline::start();
    runtime.block_on(async {
        let array = mp::Array::<u64>::zeroed(4).unwrap();
        let guard = array.lock().await.unwrap();
        let mut waiting = pin!(array.lock());
        assert!(poll!(&mut waiting).is_pending());
        drop(guard);
        array.set(0, 7);
        assert_eq!(within(waiting).await.unwrap()[0], 7);
    });
}

#[test]
fn array_can_be_set_beside_a_waiter_of_the_same_thread_that_is_to_have_its_lock_next() {
    let both = |runtime: tokio::runtime::Runtime| {
        let _deadline = Deadline::start();
        runtime.block_on(async {
            let array = mp::Array::<u64>::zeroed(4).unwrap();
            let guard = array.lock().await.unwrap();
            let mut waiting = pin!(array.lock());
            // Having tried for more than a millisecond, it has the lock handed over.
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(5) {
                assert!(poll!(&mut waiting).is_pending());
            }
            drop(guard);
            array.set(0, 7);
            assert_eq!(within(waiting).await.unwrap()[0], 7);
        });
    };
    both(tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap());
    both(tokio::runtime::Runtime::new().unwrap());
}

#[tokio::test]
async fn process_killed_while_its_tasks_pass_a_lock_on_leaves_it_usable() {
    let (lock, ready) = (Lock::new().unwrap(), Queue::unbounded().unwrap());
    let pass_on = async |lock: Lock, ready: Queue<()>| {
        let turns = async || loop {
            let _guard = lock.acquire().await.unwrap();
            tokio::task::yield_now().await;
        };
        ready.put(()).await.unwrap();
        let _: ((), ()) = futures::join!(turns(), turns());
    };
    for _ in 0..10 {
        let mut child = Process::spawn(pass_on, (lock.clone(), ready.clone())).unwrap();
        within(ready.get()).await.unwrap();
        let waiting = lock.acquire();
        child.kill().unwrap();
        let _ = within(child.wait()).await;
        let got = within(waiting).await.map(drop).map_err(|error| error.kind());
        assert!(matches!(got, Ok(()) | Err(ErrorKind::OwnerDied)), "{got:?}");
        drop(lock.try_acquire().unwrap());
    }
}

/// A lock that a thread holds until the sender is dropped.
fn held_by_a_thread(lock: &RLock) -> std::sync::mpsc::Sender<()> {
    let (held, until) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
    let lock = lock.clone();
    std::thread::spawn(move || {
        let _guard = lock.blocking_acquire().unwrap();
        held.0.send(()).unwrap();
        let _ = until.1.recv();
    });
    held.1.recv().unwrap();
    until.0
}

#[tokio::test]
async fn futures_of_one_task_that_wait_for_a_reentrant_lock_get_it_together() {
    let lock = RLock::new().unwrap();
    let within_limit = || lock.acquire_timeout(Duration::from_secs(20));
    for _ in 0..20 {
        let holder = held_by_a_thread(&lock);
        let (mut one, mut two, mut three) = (pin!(lock.acquire()), pin!(lock.acquire()), pin!(within_limit()));
        assert!(poll!(&mut one).is_pending() && poll!(&mut two).is_pending() && poll!(&mut three).is_pending());
        drop(holder);
        // The later ones are polled first.
        let (three, two, one) = within(async { futures::join!(three, two, one) }).await;
        drop((one.unwrap(), two.unwrap(), three.unwrap()));
        drop(held_by_a_thread(&lock));
        // Each of these has a waker of its own.
        let holder = held_by_a_thread(&lock);
        let mut all = pin!(futures::future::join_all((0..40).map(|_| lock.acquire())));
        assert!(poll!(&mut all).is_pending());
        drop(holder);
        assert_eq!(within(all).await.iter().filter(|guard| guard.is_ok()).count(), 40);
        drop(held_by_a_thread(&lock));
    }
}

#[test]
fn array_is_set_on_another_thread_than_its_guard_was_taken_and_refused_on_the_same() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _deadline = Deadline::start();
    let array = mp::Array::<u64>::zeroed(4).unwrap();
    let set = {
        let array = array.clone();
        move || array.set(0, 7)
    };
    // The guard's thread goes on while the other waits.
    runtime.block_on(async {
        let guard = array.lock().await.unwrap();
        let (says, thread) = tokio::sync::oneshot::channel();
        let set = set.clone();
        let setting = tokio::task::spawn_blocking(move || {
            says.send(rustix::thread::gettid()).unwrap();
            set();
        });
        thread_falls_asleep(within(thread).await.unwrap());
        drop(guard);
        within(setting).await.unwrap();
        assert_eq!(array.get(0), Some(7));
    });
    let guard = array.try_lock().unwrap();
    let refused = runtime.block_on(async { within(tokio::spawn(async move { set() })).await });
    assert!(refused.unwrap_err().is_panic());
    drop(guard);
    // Only this thread can drive the task that has it, though none is driven now.
    let held = array.clone();
    runtime.block_on(async {
        tokio::spawn(async move {
            let _guard = held.lock().await.unwrap();
            std::future::pending::<()>().await;
        });
        eventually("it is held", || array.try_lock().is_err()).await;
    });
    let _entered = runtime.enter();
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| array.set(0, 1))).is_err());
}
