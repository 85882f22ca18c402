//! `Condition`: which waiters are woken, in which order, how often, and after drops and deaths.

mod common;

use common::{Deadline, eventually, go_on, in_child, stop, within};
use futures::{FutureExt, StreamExt, poll};
use multiprocess::{
    self as mp, Barrier, Condition, ErrorKind, Event, Lock, Process, Queue, RLock, RwLock, Semaphore, Value, debug,
};
use std::pin::pin;
use std::time::{Duration, Instant};

mp::test_support!();

const MOMENT: Duration = Duration::from_millis(30);

fn is_send<T: Send>(value: T) -> T {
    value
}

/// Waits once and sends its number, before and after.
async fn sleeper(condition: Condition, sleeping: Queue<u32>, woken: Queue<u32>, who: u32) {
    let guard = condition.lock().await.unwrap();
    sleeping.put(who).await.unwrap();
    let guard = condition.wait(guard).await.unwrap();
    woken.put(who).await.unwrap();
    drop(guard);
}

struct Sleepers {
    condition: Condition,
    sleeping: Queue<u32>,
    woken: Queue<u32>,
}

impl Sleepers {
    fn new() -> Self {
        let queue = || Queue::unbounded().unwrap();
        Self { condition: Condition::new().unwrap(), sleeping: queue(), woken: queue() }
    }

    fn args(&self, who: u32) -> (Condition, Queue<u32>, Queue<u32>, u32) {
        (self.condition.clone(), self.sleeping.clone(), self.woken.clone(), who)
    }

    /// Until the next one waits: it holds the lock from before it says so until it does.
    async fn next_waits(&self) {
        within(self.sleeping.get()).await.unwrap();
        drop(within(self.condition.lock()).await.unwrap());
    }

    async fn child(&self, who: u32) -> Process<()> {
        let child = Process::spawn(sleeper, self.args(who)).unwrap();
        self.next_waits().await;
        child
    }

    async fn task(&self, who: u32) -> tokio::task::JoinHandle<()> {
        let (condition, sleeping, woken, who) = self.args(who);
        let task = tokio::spawn(sleeper(condition, sleeping, woken, who));
        self.next_waits().await;
        task
    }

    async fn woken(&self, count: usize) -> Vec<u32> {
        let mut woken: Vec<_> = self.woken.stream().take(count).map(Result::unwrap).collect::<Vec<_>>().await;
        woken.sort_unstable();
        woken
    }

    async fn assert_nobody_wakes(&self) {
        assert_eq!(self.woken.get_timeout(MOMENT).await.unwrap_err().kind(), ErrorKind::Timeout);
    }

    /// Three processes and three tasks of this one.
    async fn six(&self) -> (Vec<Process<()>>, Vec<tokio::task::JoinHandle<()>>) {
        let (mut children, mut tasks) = (Vec::new(), Vec::new());
        for who in 0..3 {
            children.push(self.child(2 * who).await);
            tasks.push(self.task(2 * who + 1).await);
        }
        (children, tasks)
    }
}

#[tokio::test]
async fn cond_01_notify_one_wakes_exactly_one_and_the_next_the_other() {
    let all = Sleepers::new();
    let child = all.child(1).await;
    let task = all.task(2).await;
    all.assert_nobody_wakes().await;
    for who in [1, 2] {
        let guard = within(all.condition.lock()).await.unwrap();
        all.condition.notify_one();
        drop(guard);
        assert_eq!(within(all.woken(1)).await, [who], "first come, first served");
        all.assert_nobody_wakes().await;
    }
    within(child).await.unwrap();
    within(task).await.unwrap();
    assert_eq!(all.condition.waiting(), 0);
}

#[tokio::test]
async fn cond_02_notifying_without_waiters_leaves_no_waiter_behind() {
    let condition = Condition::new().unwrap();
    let guard = condition.lock().await.unwrap();
    {
        let mut waiting = pin!(condition.wait_timeout(guard, MOMENT));
        assert!(poll!(&mut waiting).is_pending());
        assert_eq!(condition.waiting(), 1);
        assert_eq!(within(waiting).await.unwrap_err().kind(), ErrorKind::Timeout);
    }
    assert_eq!(condition.waiting(), 0);
    drop(condition.try_lock().unwrap());
}

#[tokio::test]
async fn cond_03_six_waits_that_time_out_are_no_waiters_any_more() {
    let condition = Condition::new().unwrap();
    let time_out = async |condition: Condition| {
        let guard = condition.lock().await.unwrap();
        condition.wait_timeout(guard, MOMENT).await.map(drop).map_err(|error| (error.kind(), error.has_guard()))
    };
    let children: Vec<_> = (0..3).map(|_| Process::spawn(time_out, (condition.clone(),)).unwrap()).collect();
    let mut timed = Vec::new();
    for _ in 0..3 {
        timed.push(time_out(condition.clone()));
    }
    let timed = within(futures::future::join_all(timed)).await;
    assert_eq!(timed, [Err((ErrorKind::Timeout, true)); 3]);
    for child in children {
        assert_eq!(within(child).await.unwrap(), Err((ErrorKind::Timeout, true)));
    }
    // A notification kept for waiters that are gone would be missing for later ones.
    condition.notify(6);
    let guard = condition.lock().await.unwrap();
    assert_eq!(condition.wait_timeout(guard, MOMENT).await.unwrap_err().kind(), ErrorKind::Timeout);
}

#[tokio::test]
async fn cond_04_all_wake_when_all_are_notified() {
    let all = Sleepers::new();
    let (children, tasks) = all.six().await;
    let guard = all.condition.lock().await.unwrap();
    all.condition.notify_all();
    drop(guard);
    assert_eq!(within(all.woken(6)).await, [0, 1, 2, 3, 4, 5]);
    for child in children {
        within(child).await.unwrap();
    }
    for task in tasks {
        within(task).await.unwrap();
    }
    assert_eq!(all.condition.waiting(), 0);
}

#[tokio::test]
async fn cond_05_notify_wakes_as_many_as_it_is_given() {
    let all = Sleepers::new();
    let (_children, _tasks) = all.six().await;
    all.condition.notify(2);
    within(all.woken(2)).await;
    all.assert_nobody_wakes().await;
    all.condition.notify(4);
    within(all.woken(4)).await;
    all.condition.notify(3);
    let _late = all.child(9).await;
    all.assert_nobody_wakes().await;
    all.condition.notify_one();
    assert_eq!(within(all.woken(1)).await, [9]);
}

#[tokio::test]
async fn cond_05_a_process_counts_its_tasks() {
    let all = Sleepers::new();
    let many = async |condition: Condition, sleeping: Queue<u32>, woken: Queue<u32>, count: u32| {
        let tasks = (0..count).map(|who| sleeper(condition.clone(), sleeping.clone(), woken.clone(), who));
        futures::future::join_all(tasks).await;
    };
    let (condition, sleeping, woken, _) = all.args(0);
    let child = Process::spawn(many, (condition, sleeping, woken, 500)).unwrap();
    for _ in 0..500 {
        all.next_waits().await;
    }
    all.condition.notify(123);
    within(all.woken(123)).await;
    all.assert_nobody_wakes().await;
    all.condition.notify_all();
    within(all.woken(377)).await;
    within(child).await.unwrap();
}

#[tokio::test]
async fn cond_06_and_09_timed_wait_holds_the_lock_again_notified_or_not() {
    let condition = Condition::new().unwrap();
    for timeout in [Duration::ZERO, Duration::from_millis(100)] {
        let guard = condition.lock().await.unwrap();
        let start = Instant::now();
        let error = within(condition.wait_timeout(guard, timeout)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        assert!(start.elapsed() >= timeout);
        let guard = error.into_guard();
        assert!(condition.try_lock().is_err());
        drop(guard);
    }
    let notify = async |condition: Condition| {
        let _guard = condition.lock().await.unwrap();
        condition.notify_one();
    };
    let guard = condition.lock().await.unwrap();
    let child = Process::spawn(notify, (condition.clone(),)).unwrap();
    let guard = within(condition.wait_timeout(guard, Duration::from_secs(60))).await.unwrap();
    assert!(condition.try_lock().is_err());
    drop(guard);
    within(child).await.unwrap();
}

#[test]
fn cond_06_for_plain_functions() {
    let _deadline = Deadline::start();
    let condition = Condition::new().unwrap();
    let guard = condition.blocking_lock().unwrap();
    let error = condition.blocking_wait_timeout(guard, MOMENT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    std::thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (condition, guard) = (&condition, error.into_guard());
        let waiting = scope.spawn(move || {
            sender.send(()).unwrap();
            drop(condition.blocking_wait(guard).unwrap());
        });
        receiver.recv().unwrap();
        // It has the lock until it waits.
        let guard = condition.blocking_lock().unwrap();
        condition.notify_one();
        drop(guard);
        waiting.join().unwrap();
    });
}

#[tokio::test]
async fn cond_07_predicate_is_checked_at_each_notification() {
    let (condition, state) = (Condition::new().unwrap(), Queue::<u32>::unbounded().unwrap());
    let looks = Value::new(0_u32).unwrap();
    let count = async |condition: Condition, state: Queue<u32>, looks: Value<u32>| {
        let guard = condition.lock().await.unwrap();
        let is_four = || {
            looks.fetch_add(1);
            state.len() == 4
        };
        let guard = is_send(condition.wait_for(guard, is_four)).await.unwrap();
        drop(guard);
    };
    let child = Process::spawn(count, (condition.clone(), state.clone(), looks.clone())).unwrap();
    for n in 0..4 {
        // It looks with the lock held, and gives that up when it is in line.
        eventually("it waits again", || looks.get() == n + 1 && condition.waiting() == 1).await;
        let guard = within(condition.lock()).await.unwrap();
        state.put(n).await.unwrap();
        condition.notify_one();
        drop(guard);
    }
    within(child).await.unwrap();
    assert_eq!(looks.get(), 5);
    let guard = condition.lock().await.unwrap();
    let error = within(condition.wait_for_timeout(guard, || false, MOMENT)).await.unwrap_err();
    assert_eq!((error.kind(), error.has_guard()), (ErrorKind::Timeout, true));
    let guard = within(condition.wait_for_timeout(error.into_guard(), || true, Duration::ZERO)).await.unwrap();
    drop(guard);
}

#[tokio::test]
async fn cond_10_cancelled_wait_leaves_the_lock_free_and_no_waiter() {
    let condition = Condition::new().unwrap();
    for polls in 0..3 {
        let guard = condition.lock().await.unwrap();
        {
            let mut waiting = pin!(condition.wait(guard));
            for _ in 0..polls {
                assert!(poll!(&mut waiting).is_pending());
            }
        }
        drop(condition.try_lock().unwrap());
    }
    let guard = condition.lock().await.unwrap();
    assert!(tokio::time::timeout(MOMENT, condition.wait_for(guard, || false)).await.is_err());
    drop(condition.try_lock().unwrap());
    // No other waiter is behind: the notification is for the present one.
    let guard = condition.lock().await.unwrap();
    let mut waiting = pin!(condition.wait(guard));
    assert!(poll!(&mut waiting).is_pending());
    condition.notify_one();
    within(waiting).await.map(drop).unwrap();
}

#[tokio::test]
async fn cond_10_notification_of_a_cancelled_wait_is_passed_on() {
    let all = Sleepers::new();
    // Once while it waits to be woken, once while it waits for the lock.
    for is_woken in [false, true] {
        let guard = all.condition.lock().await.unwrap();
        let mut waiting = Box::pin(all.condition.wait(guard));
        assert!(poll!(&mut waiting).is_pending());
        let child = all.child(1).await;
        let guard = all.condition.lock().await.unwrap();
        all.condition.notify_one();
        if is_woken {
            assert!(tokio::time::timeout(MOMENT, &mut waiting).await.is_err());
        }
        drop(guard);
        drop(waiting);
        assert_eq!(within(all.woken(1)).await, [1]);
        within(child).await.unwrap();
    }
    // And within one process, where the one behind has been woken too.
    for dropped in 0..2 {
        let mut waiting = Vec::new();
        for _ in 0..3 {
            let guard = all.condition.lock().await.unwrap();
            waiting.push(Box::pin(all.condition.wait(guard)));
            assert!(poll!(waiting.last_mut().unwrap()).is_pending());
        }
        all.condition.notify(2);
        drop(waiting.remove(dropped));
        for wait in waiting {
            drop(within(wait).await.unwrap());
        }
    }
}

#[tokio::test]
async fn cond_11_guard_of_another_condition_is_returned_in_the_error() {
    let (one, other) = (Condition::new().unwrap(), Condition::new().unwrap());
    let guard = one.lock().await.unwrap();
    let error = other.wait(guard).now_or_never().unwrap().unwrap_err();
    assert_eq!((error.kind(), error.has_guard()), (ErrorKind::Other, true));
    assert!(one.try_lock().is_err());
    drop(error);
    assert!(one.try_lock().is_ok());
}

#[tokio::test]
async fn cond_12_notifying_zero_or_without_waiters_does_nothing() {
    let all = Sleepers::new();
    all.condition.notify_one();
    all.condition.notify_all();
    let _child = all.child(1).await;
    all.condition.notify(0);
    all.assert_nobody_wakes().await;
    all.condition.notify(usize::MAX);
    assert_eq!(within(all.woken(1)).await, [1]);
}

#[tokio::test]
async fn cond_01_notification_of_a_killed_waiter_is_passed_on() {
    let all = Sleepers::new();
    let (first, second) = (all.child(1).await, all.child(2).await);
    first.kill().unwrap();
    eventually("it is gone", || !first.is_alive()).await;
    all.condition.notify_one();
    assert_eq!(within(all.woken(1)).await, [2]);
    within(second).await.unwrap();
    // Killed with the notice in its hands: it waits for the lock, which we hold.
    let (first, second) = (all.child(1).await, all.child(2).await);
    let guard = all.condition.lock().await.unwrap();
    all.condition.notify_one();
    tokio::time::sleep(MOMENT).await;
    first.kill().unwrap();
    drop(guard);
    assert_eq!(within(all.woken(1)).await, [2]);
    within(second).await.unwrap();
}

#[tokio::test]
async fn cond_01_holder_killed_while_others_return_from_wait_is_reported() {
    let all = Sleepers::new();
    let waits = async |condition: Condition, sleeping: Queue<u32>| {
        let guard = condition.lock().await.unwrap();
        sleeping.put(1).await.unwrap();
        condition.wait(guard).await.map(drop).map_err(|error| (error.kind(), error.has_guard()))
    };
    let child = Process::spawn(waits, (all.condition.clone(), all.sleeping.clone())).unwrap();
    all.next_waits().await;
    let hold = async |condition: Condition, told: Queue<u32>| {
        let _guard = condition.lock().await.unwrap();
        condition.notify_one();
        told.put(1).await.unwrap();
        std::future::pending::<()>().await
    };
    let holder = Process::spawn(hold, (all.condition.clone(), all.woken.clone())).unwrap();
    within(all.woken.get()).await.unwrap();
    holder.kill().unwrap();
    assert_eq!(within(child).await.unwrap(), Err((ErrorKind::OwnerDied, true)));
}

/// `dump` says what is needed to find a deadlock, in any process of the family.
#[tokio::test]
async fn dump_shows_a_deadlock() {
    let (one, two) = (Lock::new().unwrap(), Lock::new().unwrap());
    let (told, go) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
    let both = async |first: Lock, second: Lock, told: Queue<()>, go: Queue<()>| {
        let _first = first.acquire().await.unwrap();
        told.put(()).await.unwrap();
        go.get().await.unwrap();
        let _second = second.acquire().await.unwrap();
    };
    let start = |name: &str, args| Process::builder().name(name).spawn(both, args).unwrap();
    let anna = start("anna", (one.clone(), two.clone(), told.clone(), go.clone()));
    within(told.get()).await.unwrap();
    let bert = start("bert", (two.clone(), one.clone(), told.clone(), go.clone()));
    within(told.get()).await.unwrap();
    go.put(()).await.unwrap();
    go.put(()).await.unwrap();
    let is_ours = |lock: &debug::Object| lock.holder().is_some_and(|holder| ["anna", "bert"].contains(&holder.name()));
    let locks = || {
        let objects = debug::dump().objects().to_vec();
        objects.into_iter().filter(|object| object.kind() == "lock" && is_ours(object)).collect::<Vec<_>>()
    };
    eventually("both wait", || locks().iter().filter(|lock| lock.waiting().len() == 1).count() == 2).await;
    let facts = |who: &debug::Participant| (who.name().to_string(), who.pid().unwrap());
    let mut found: Vec<_> =
        locks().iter().map(|lock| (facts(lock.holder().unwrap()), facts(&lock.waiting()[0]))).collect();
    found.sort();
    let (a, b) = (("anna".to_string(), anna.pid()), ("bert".to_string(), bert.pid()));
    assert_eq!(found, [(a.clone(), b.clone()), (b, a)]);
    let held_for = locks()[0].held_for().unwrap();
    eventually("time goes on", || locks()[0].held_for().unwrap() >= held_for + MOMENT).await;
    for dump in [debug::dump().to_string(), within(in_child(|| debug::dump().to_string(), ())).await] {
        assert!(dump.contains("held by anna (pid ") && dump.contains("waiting: bert (pid "), "{dump}");
    }
}

/// Stopped is not dead: it keeps the lock that it holds and the notice that it has, and others' timeouts fire.
#[tokio::test]
async fn stopped_holder_or_waiter_delays_others_up_to_their_timeouts() {
    let sleepers = Sleepers::new();
    let (first, second) = (sleepers.child(1).await, sleepers.child(2).await);
    stop(first.pid());
    let guard = within(sleepers.condition.lock()).await.unwrap();
    sleepers.condition.notify_all();
    let timed_out = within(sleepers.condition.wait_timeout(guard, MOMENT)).await.unwrap_err();
    assert_eq!(timed_out.kind(), ErrorKind::Timeout);
    drop(timed_out.into_guard());
    assert_eq!(within(sleepers.woken(1)).await, [2]);
    within(second).await.unwrap();
    go_on(first.pid());
    assert_eq!(within(sleepers.woken(1)).await, [1]);
    within(first).await.unwrap();
    let hold = async |condition: Condition, sleeping: Queue<u32>| {
        let _guard = condition.lock().await.unwrap();
        sleeping.put(3).await.unwrap();
        std::future::pending::<()>().await;
    };
    let holder = Process::spawn(hold, (sleepers.condition.clone(), sleepers.sleeping.clone())).unwrap();
    within(sleepers.sleeping.get()).await.unwrap();
    stop(holder.pid());
    let missed = within(sleepers.condition.lock_timeout(MOMENT)).await.map(drop).unwrap_err();
    assert_eq!(missed.kind(), ErrorKind::Timeout);
}

/// Not a panic, as tokio's own would be; and nobody is left waiting, or without its guard.
#[test]
fn timeouts_in_a_runtime_without_timer_are_errors() {
    let (lock, rlock, semaphore) = (Lock::new().unwrap(), RLock::new().unwrap(), Semaphore::new(0).unwrap());
    let (rwlock, event, barrier) = (RwLock::new().unwrap(), Event::new().unwrap(), Barrier::new(2).unwrap());
    let (condition, value) = (Condition::new().unwrap(), Value::new(0u64).unwrap());
    let all = async || {
        assert_eq!(lock.acquire_timeout(MOMENT).await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(rlock.acquire_timeout(MOMENT).await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(semaphore.acquire_timeout(MOMENT).await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(rwlock.read_timeout(MOMENT).await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(rwlock.write_timeout(MOMENT).await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(event.wait_timeout(MOMENT).await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(barrier.wait_timeout(MOMENT).await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!((barrier.waiting(), barrier.is_broken()), (0, false));
        assert_eq!(value.lock_timeout(MOMENT).await.unwrap_err().kind(), ErrorKind::Io);
        let error = condition.wait_timeout(condition.try_lock().unwrap(), MOMENT).await.unwrap_err();
        assert_eq!((error.kind(), error.has_guard(), condition.waiting()), (ErrorKind::Io, true, 0));
    };
    futures::executor::block_on(all());
    tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap().block_on(all());
    assert!(lock.try_acquire().is_ok() && condition.try_lock().is_ok());
}
