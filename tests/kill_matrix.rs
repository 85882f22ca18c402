//! Each row of the Death and Cancel tables: a child dies exactly there, or a future is dropped exactly there, and
//! what the row promises holds.
#![cfg(debug_assertions)] // The points are there in debug builds only.

mod common;

use common::{eventually, falls_asleep_in_line, is_asleep, is_in_line, ring_memory, rounds, within};
use futures::poll;
use multiprocess::{
    self as mp, Barrier, Condition, ErrorKind, Event, Fd, JoinableQueue, ListProxy, Lock, Manager, Process, Queue,
    RwLock, Semaphore,
};
use serde::{Deserialize, Serialize};
use std::os::unix::process::ExitStatusExt;
use std::pin::pin;
use std::time::{Duration, Instant};

mp::test_support!();

#[derive(Serialize, Deserialize)]
struct Item {
    number: u32,
    bytes: Vec<u8>,
    files: Vec<Fd<std::fs::File>>,
}

impl Item {
    fn new(number: u32, size: usize, files: usize) -> Self {
        let open = |_| Fd::new(std::fs::File::open("/dev/null").unwrap());
        Self { number, bytes: vec![number as u8; size], files: (0..files).map(open).collect() }
    }

    /// Its number, if it is whole.
    fn check(&self) -> u32 {
        assert!(self.bytes.iter().all(|byte| *byte == self.number as u8));
        self.number
    }
}

async fn put(queue: Queue<Item>, number: u32, size: usize, files: usize) {
    queue.put(Item::new(number, size, files)).await.map_err(|error| error.to_string()).unwrap();
}

async fn get(queue: Queue<Item>, count: usize) -> Vec<u32> {
    let mut got = Vec::new();
    for _ in 0..count {
        got.push(queue.get().await.unwrap().check());
    }
    got
}

/// One test at a time: each death makes the whole family look, and so would stir the sleepers of another test.
async fn alone() -> tokio::sync::MutexGuard<'static, ()> {
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    ALONE.lock().await
}

/// Starts `f` in a process that will be killed at `point`.
macro_rules! doomed {
    ($point:expr, $f:expr, $args:expr) => {
        Process::builder().env("MULTIPROCESS_KILL_AT", $point).spawn($f, $args).unwrap()
    };
}

/// Waits until `victim` has been killed, by its own hand.
async fn death<R: serde::de::DeserializeOwned + 'static>(mut victim: Process<R>, point: &str) {
    let Err(error) = within(victim.join()).await else { panic!("it never got to {point}") };
    assert_eq!(error.exit_status().and_then(|status| status.signal()), Some(9), "{point}: {error}");
}

/// A child that is in line, and asleep over it.
async fn asleep<R: serde::de::DeserializeOwned + 'static>(process: Process<R>) -> Process<R> {
    let pid = process.pid();
    asleep_where(process, || is_in_line(pid)).await
}

/// The same of a queue, of which nobody can ask for whom it keeps in line.
async fn asleep_at_a_queue<R: serde::de::DeserializeOwned + 'static>(process: Process<R>) -> Process<R> {
    // It also sleeps for a moment while it begins, and what it waits for then does not say that it is in line.
    tokio::time::sleep(Duration::from_millis(50)).await;
    asleep_where(process, || true).await
}

/// A child that has begun what it was told, and is asleep over it.
async fn asleep_where<R: serde::de::DeserializeOwned + 'static>(
    process: Process<R>,
    is_there: impl Fn() -> bool,
) -> Process<R> {
    let of = |what| std::fs::read_to_string(format!("/proc/{}/{what}", process.pid())).unwrap_or_default();
    // A process that waits for its order has another name, and waits in another call. Where the kernel does not tell
    // the call, it says 0.
    let has_begun = || !of("comm").trim_end().is_empty() && process.name().starts_with(of("comm").trim_end());
    let is_in_epoll = || matches!(of("wchan"), call if call.contains("epoll") || call.is_empty() || call == "0");
    // A wake in vain may have taken it to where it is killed already.
    let sleeps = || has_begun() && is_there() && is_asleep(process.pid()) && is_in_epoll();
    eventually("it sleeps", || sleeps() || !process.is_alive()).await;
    process
}

async fn drain(queue: &Queue<Item>) -> Vec<u32> {
    queue.close();
    let mut got = Vec::new();
    loop {
        match within(queue.get()).await {
            Ok(item) => got.push(item.check()),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Closed);
                return got;
            }
        }
    }
}

/// `family`: killed while claiming a slot, of which the fork server does not know yet. Others wait and are woken all the same,
/// also one in that slot.
#[tokio::test]
async fn killed_claimant_of_a_slot_leaves_no_waiter_asleep() {
    let _alone = alone().await;
    for point in ["claim.entered", "claim.named"] {
        let queue = Queue::unbounded().unwrap();
        for _ in 0..3 {
            death(doomed!(point, get, (queue.clone(), 1)), point).await;
        }
        let next = asleep_at_a_queue(Process::spawn(get, (queue.clone(), 2)).unwrap()).await;
        queue.put(Item::new(1, 10, 0)).await.unwrap();
        eventually("it is taken", || queue.is_empty()).await;
        queue.put(Item::new(2, 10, 1)).await.unwrap();
        assert_eq!(within(next).await.unwrap(), [1, 2], "{point}");
    }
}

/// `ring`, `segment` and `robust_lock`: killed while putting. The record is there if it was published, and nothing else changed.
#[tokio::test]
async fn killed_putter_leaves_the_item_whole_or_absent() {
    let _alone = alone().await;
    for (point, size, files, is_there) in [
        ("put.taken", 10, 0, false),
        ("put.written", 10, 0, false),
        ("put.written", 300_000, 0, false),
        ("put.sent", 10, 2, false),
        ("put.written", 10, 2, false),
        ("put.published", 10, 2, true),
        ("put.released", 10, 0, true),
        ("grow.begun", 300_000, 0, false),
        ("grow.linked", 300_000, 0, false),
        ("grow.linked", 300_000, 3, false),
    ] {
        let queue = Queue::unbounded().unwrap();
        queue.put(Item::new(1, 100, 1)).await.unwrap();
        death(doomed!(point, put, (queue.clone(), 2, size, files)), point).await;
        assert_eq!(queue.len(), 1 + usize::from(is_there), "{point}");
        within(queue.put(Item::new(3, 100_000, 1))).await.unwrap();
        assert_eq!(queue.len(), 2 + usize::from(is_there), "{point}");
        let all = if is_there { vec![1, 2, 3] } else { vec![1, 3] };
        assert_eq!(drain(&queue).await, all, "{point}");
    }
}

/// `ring`: an extent that a putter had made and not linked is given back by the process that takes its lock over.
#[tokio::test]
async fn killed_putter_that_grows_the_ring_leaks_no_memory() {
    let _alone = alone().await;
    // In a process of its own: other tests have rings too.
    let alone = async |point: String, size: usize| {
        let queue = Queue::unbounded().unwrap();
        death(doomed!(&point, put, (queue.clone(), 1, size, 0)), &point).await;
        let lost = ring_memory();
        within(queue.put(Item::new(2, 10, 0))).await.unwrap();
        let left = ring_memory();
        (lost, left, drain(&queue).await)
    };
    // The memory of a very large item is taken piece by piece.
    for (point, size) in [("grow.begun", 9 << 20), ("put.piece", 40 << 20), ("put.written", 40 << 20)] {
        let (lost, left, all) = within(Process::spawn(alone, (point.to_string(), size)).unwrap()).await.unwrap();
        assert!(lost > 4 << 20 && left < 1 << 20, "{point}: {lost} bytes, then {left}");
        assert_eq!(all, [2]);
    }
}

/// `ring`: a putter died between link and `PUT_SEGMENT`; the taker leaves the old segment before the next putter comes.
#[tokio::test]
async fn putter_killed_after_the_link_loses_no_item_when_the_segment_is_left() {
    let _alone = alone().await;
    let queue = Queue::unbounded().unwrap();
    queue.put(Item::new(1, 100_000, 0)).await.unwrap();
    death(doomed!("grow.linked", put, (queue.clone(), 2, 3 << 20, 0)), "grow.linked").await;
    assert_eq!(within(queue.get()).await.unwrap().check(), 1);
    assert_eq!(queue.try_get().err().unwrap().kind(), ErrorKind::Empty);
    assert_eq!(queue.len(), 0);
    within(queue.put(Item::new(3, 10, 0))).await.unwrap();
    assert_eq!(queue.len(), 1);
    assert_eq!(drain(&queue).await, [3]);
}

/// `ring` and `segment`: killed while getting. The record is still there until its head is stored.
#[tokio::test]
async fn killed_getter_leaves_the_item_until_its_head_is_stored() {
    let _alone = alone().await;
    for (point, is_there) in [("get.taken", true), ("get.read", true), ("get.consumed", false), ("get.released", false)]
    {
        let queue = Queue::unbounded().unwrap();
        for number in 1..=2 {
            queue.put(Item::new(number, 1000, 0)).await.unwrap();
        }
        death(doomed!(point, get, (queue.clone(), 1)), point).await;
        assert_eq!(queue.len(), 1 + usize::from(is_there), "{point}");
        assert_eq!(drain(&queue).await, if is_there { vec![1, 2] } else { vec![2] }, "{point}");
    }
}

/// `channel_core`: the descriptors died with the process that took them; the item is an error, once, and the next one is whole.
#[tokio::test]
async fn killed_getter_of_descriptors_makes_one_error_and_the_next_item_is_whole() {
    let _alone = alone().await;
    let queue = Queue::unbounded().unwrap();
    for number in 1..=2 {
        queue.put(Item::new(number, 10, 3)).await.unwrap();
    }
    death(doomed!("get.read", get, (queue.clone(), 1)), "get.read").await;
    assert_eq!(queue.len(), 2);
    assert_eq!(within(queue.get()).await.err().unwrap().kind(), ErrorKind::Decode);
    let second = within(queue.get()).await.unwrap();
    assert_eq!((second.check(), second.files.len(), queue.len()), (2, 3, 0));
}

/// `ring`: killed between leaving a drained segment and giving it back.
#[tokio::test]
async fn process_killed_while_it_leaves_a_segment_loses_no_memory() {
    let _alone = alone().await;
    let queue = Queue::unbounded().unwrap();
    for number in 1..=20 {
        queue.put(Item::new(number, 20_000, 0)).await.unwrap();
    }
    death(doomed!("leave.moved", get, (queue.clone(), 20)), "leave.moved").await;
    let left = queue.len() as u32;
    assert!((1..20).contains(&left), "{left}");
    within(queue.put(Item::new(21, 200_000, 0))).await.unwrap();
    assert_eq!(drain(&queue).await, (21 - left..=21).collect::<Vec<_>>());
}

/// `ring`: killed while a large drained segment is replaced by the base: by `reclaim` after a time, or at once.
#[tokio::test]
async fn process_killed_while_it_gives_a_large_segment_back_loses_no_item() {
    let _alone = alone().await;
    let get_and_stay = async |queue: Queue<Item>| {
        // The next one never comes, so the handle stays.
        get(queue, 2).await;
    };
    for (point, size) in [("grow.begun", 9 << 20), ("grow.linked", 9 << 20), ("grow.linked", 40 << 20)] {
        let queue = Queue::unbounded().unwrap();
        queue.put(Item::new(1, size, 0)).await.unwrap();
        death(doomed!(point, get_and_stay, (queue.clone(),)), point).await;
        assert_eq!(queue.len(), 0, "{point}");
        for number in 2..=3 {
            within(queue.put(Item::new(number, 100_000, 0))).await.unwrap();
        }
        assert_eq!(drain(&queue).await, [2, 3], "{point}");
    }
}

/// `channel_core`: items that a dead consumer had taken and not finished count as done; the others are still to do.
#[tokio::test]
async fn items_taken_by_a_killed_consumer_of_a_joinable_queue_count_as_done() {
    let _alone = alone().await;
    for (point, is_there) in [("get.noted", true), ("get.consumed", false)] {
        let queue = JoinableQueue::<u32>::unbounded().unwrap();
        queue.put(1).await.unwrap();
        let take = async |queue: JoinableQueue<u32>| queue.get().await.unwrap();
        death(doomed!(point, take, (queue.clone(),)), point).await;
        assert_eq!(queue.len(), usize::from(is_there), "{point}");
        if is_there {
            assert!(tokio::time::timeout(Duration::from_millis(50), queue.join()).await.is_err());
            assert_eq!(within(queue.get()).await.unwrap(), 1);
            queue.task_done().unwrap();
        }
        within(queue.join()).await.unwrap();
    }
}

/// `sleepers` and `robust_lock`: if a process dies before a wake that it owes, a sleeper is woken.
#[tokio::test]
async fn putter_killed_before_its_wake_leaves_no_getter_asleep() {
    let _alone = alone().await;
    for point in ["put.published", "put.released", "notify.marked"] {
        let queue = Queue::unbounded().unwrap();
        let getter = asleep_at_a_queue(Process::spawn(get, (queue.clone(), 1)).unwrap()).await;
        death(doomed!(point, put, (queue.clone(), 5, 10, 0)), point).await;
        assert_eq!(within(getter).await.unwrap(), [5], "{point}");
    }
}

#[tokio::test]
async fn getter_killed_before_its_wake_leaves_no_putter_asleep() {
    let _alone = alone().await;
    for point in ["get.consumed", "get.released", "notify.marked"] {
        let queue = Queue::bounded(1).unwrap();
        queue.put(Item::new(1, 10, 0)).await.unwrap();
        let putter = asleep_at_a_queue(Process::spawn(put, (queue.clone(), 2, 10, 0)).unwrap()).await;
        death(doomed!(point, get, (queue.clone(), 1)), point).await;
        within(putter).await.unwrap();
        assert_eq!(drain(&queue).await, [2], "{point}");
    }
}

/// `sleepers`: a sleeper dies before, at and after its notice; the one behind it gets the item.
#[tokio::test]
async fn killed_sleeper_passes_its_notification_to_the_next() {
    let _alone = alone().await;
    for point in ["sleep.entered", "asleep", "sleep.noticed", "sleep.unmarked"] {
        let queue = Queue::unbounded().unwrap();
        let mut victim = doomed!(point, get, (queue.clone(), 1));
        match point {
            "sleep.entered" => death(victim, point).await,
            "asleep" => {
                victim = asleep_at_a_queue(victim).await;
                let other = asleep_at_a_queue(Process::spawn(get, (queue.clone(), 1)).unwrap()).await;
                victim.kill().unwrap();
                within(queue.put(Item::new(1, 10, 0))).await.unwrap();
                assert_eq!(within(other).await.unwrap(), [1]);
                continue;
            }
            _ => {
                victim = asleep_at_a_queue(victim).await;
                let other = asleep_at_a_queue(Process::spawn(get, (queue.clone(), 1)).unwrap()).await;
                within(queue.put(Item::new(1, 10, 0))).await.unwrap();
                death(victim, point).await;
                assert_eq!(within(other).await.unwrap(), [1], "{point}");
                continue;
            }
        }
        // Its entry has no mark: the next sleeper is notified all the same.
        let other = asleep_at_a_queue(Process::spawn(get, (queue.clone(), 1)).unwrap()).await;
        within(queue.put(Item::new(1, 10, 0))).await.unwrap();
        assert_eq!(within(other).await.unwrap(), [1]);
    }
}

/// `sleepers`: a process that takes a dead entry over dies on the way.
#[tokio::test]
async fn process_killed_while_it_takes_a_dead_entry_leaves_it_usable() {
    let _alone = alone().await;
    let queue = Queue::unbounded().unwrap();
    death(doomed!("sleep.entered", get, (queue.clone(), 1)), "sleep.entered").await;
    // The next sleeper finds the dead entry first.
    death(doomed!("recover.entry", get, (queue.clone(), 1)), "recover.entry").await;
    let other = asleep_at_a_queue(Process::spawn(get, (queue.clone(), 1)).unwrap()).await;
    within(queue.put(Item::new(1, 10, 0))).await.unwrap();
    assert_eq!(within(other).await.unwrap(), [1]);
}

/// `robust_lock`: a holder that is stopped is waited for; when it is killed, a waiting process takes the lock over.
#[tokio::test]
async fn stopped_holder_of_a_robust_lock_is_waited_for_until_it_is_killed() {
    let _alone = alone().await;
    let queue = Queue::unbounded().unwrap();
    let victim =
        Process::builder().env("MULTIPROCESS_STOP_AT", "put.written").spawn(put, (queue.clone(), 1, 10, 0)).unwrap();
    let is_stopped =
        || std::fs::read_to_string(format!("/proc/{}/stat", victim.pid())).is_ok_and(|stat| stat.contains(") T "));
    eventually("it is stopped", is_stopped).await;
    let mut waiting = pin!(queue.put(Item::new(2, 10, 0)));
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut waiting).await.is_err(), "held");
    victim.kill().unwrap();
    within(waiting).await.unwrap();
    assert_eq!(drain(&queue).await, [2]);
}

/// How many items there are once everything is done.
fn left_after_join(queue: JoinableQueue<u32>) -> usize {
    queue.blocking_join().unwrap();
    queue.len()
}

/// `channel_core`: a process that checks whether all is done is stopped in the middle, and meanwhile an item is followed up by another.
#[tokio::test]
async fn join_stopped_while_it_checks_misses_no_item() {
    let _alone = alone().await;
    let queue = JoinableQueue::unbounded().unwrap();
    queue.put(1).await.unwrap();
    within(queue.get()).await.unwrap();
    let joiner =
        Process::builder().env("MULTIPROCESS_STOP_AT", "join.empty").spawn(left_after_join, (queue.clone(),)).unwrap();
    let is = |state: &str| {
        std::fs::read_to_string(format!("/proc/{}/stat", joiner.pid())).is_ok_and(|stat| stat.contains(state))
    };
    eventually("it is stopped", || is(") T ")).await;
    queue.put(2).await.unwrap();
    queue.task_done().unwrap();
    common::go_on(joiner.pid());
    eventually("it waits, or not", || is(") S ") || !joiner.is_alive()).await;
    within(queue.get()).await.unwrap();
    queue.task_done().unwrap();
    assert_eq!(within(joiner).await.unwrap(), 0, "items left");
}

/// Takes `count` permits, and gives them back one by one.
async fn take_turns(semaphore: Semaphore, count: usize) {
    let mut held = Vec::new();
    for _ in 0..count {
        held.push(semaphore.acquire().await.unwrap());
    }
    held.clear();
}

/// `holders`: killed at any move of a take or of a give, no permit is lost and none is made.
#[tokio::test]
async fn killed_mover_of_a_semaphore_loses_and_makes_no_permit() {
    let _alone = alone().await;
    // The takes are passages 1 and 2, the gives 3 and 4.
    let counted = (1..=4).flat_map(|n| [format!("holders.counted:{n}"), format!("holders.written:{n}")]);
    for point in counted.chain(["holders.entered".to_string()]) {
        let semaphore = Semaphore::new(2).unwrap();
        death(doomed!(&point, take_turns, (semaphore.clone(), 2)), &point).await;
        eventually(&point, || semaphore.available() == 2).await;
        let both = (semaphore.try_acquire().unwrap(), semaphore.try_acquire().unwrap());
        assert!(semaphore.try_acquire().is_err(), "{point}");
        drop(both);
    }
}

/// `holders` and `sleepers`: if a process dies with a permit, or before the wake for one, a sleeper is woken.
#[tokio::test]
async fn releaser_killed_before_its_wake_leaves_no_acquirer_asleep() {
    let _alone = alone().await;
    let release = async |semaphore: Semaphore| semaphore.release().unwrap();
    for point in ["holders.counted", "holders.written", "notify.marked"] {
        let semaphore = Semaphore::new(0).unwrap();
        let sleeper = asleep(Process::spawn(take_turns, (semaphore.clone(), 1)).unwrap()).await;
        death(doomed!(point, release, (semaphore.clone(),)), point).await;
        within(sleeper).await.unwrap();
        assert_eq!(semaphore.available(), 1, "{point}");
    }
    // Stopped while it holds, then killed: what it held wakes the sleeper.
    let semaphore = Semaphore::new(1).unwrap();
    let mut victim = Process::builder()
        .env("MULTIPROCESS_STOP_AT", "holders.written")
        .spawn(take_turns, (semaphore.clone(), 1))
        .unwrap();
    eventually("it holds the permit", || semaphore.available() == 0).await;
    let sleeper = asleep(Process::spawn(take_turns, (semaphore.clone(), 1)).unwrap()).await;
    victim.kill().unwrap();
    within(sleeper).await.unwrap();
    within(victim.wait()).await.unwrap();
    assert_eq!(semaphore.available(), 1);
}

/// `holders`: the row of a process that died with its move half done is used by the next one.
#[tokio::test]
async fn row_of_a_process_killed_in_its_move_is_reused() {
    let _alone = alone().await;
    let semaphore = Semaphore::new(3).unwrap();
    for round in 0..20 {
        let point = ["holders.entered", "holders.counted", "holders.written"][round % 3];
        death(doomed!(point, take_turns, (semaphore.clone(), 1)), point).await;
    }
    eventually("all are back", || semaphore.available() == 3).await;
    within(Process::spawn(take_turns, (semaphore.clone(), 3)).unwrap()).await.unwrap();
    assert_eq!(semaphore.available(), 3);
}

/// Takes a permit of each; once the first is free again, this process has been recovered.
async fn take_both(witness: Semaphore, semaphore: Semaphore, forgets: bool) {
    let (_seen, permit) = (witness.acquire().await.unwrap(), semaphore.acquire().await.unwrap());
    match forgets {
        true => permit.forget(),
        false => std::future::pending().await,
    }
}

/// `holders`: killed while it forgets a permit: it is gone from then on, and not before.
#[tokio::test]
async fn permit_forgotten_by_a_killed_process_is_gone_once() {
    let _alone = alone().await;
    // The takes are passages 1 and 2.
    for (point, left) in [("holders.written:2", 1), ("holders.counted:3", 0), ("holders.written:3", 0)] {
        let (witness, semaphore) = (Semaphore::new(1).unwrap(), Semaphore::new(1).unwrap());
        death(doomed!(point, take_both, (witness.clone(), semaphore.clone(), true)), point).await;
        eventually("it is recovered", || witness.available() == 1).await;
        assert_eq!(semaphore.available(), left, "{point}");
        semaphore.release().unwrap();
        assert_eq!(semaphore.available(), left + 1, "{point}");
    }
}

/// `holders`: a process that recovers permits of the dead dies as well: they come back once.
#[tokio::test]
async fn permits_of_the_dead_return_once_though_their_recoverer_is_killed() {
    let _alone = alone().await;
    let look = async |semaphore: Semaphore| semaphore.available();
    for point in ["holders.counted", "holders.written"] {
        let (witness, semaphore) = (Semaphore::new(1).unwrap(), Semaphore::new(2).unwrap());
        let at = "holders.written:2";
        death(doomed!(at, take_both, (witness.clone(), semaphore.clone(), false)), at).await;
        eventually("it is recovered", || witness.available() == 1).await;
        death(doomed!(point, look, (semaphore.clone(),)), point).await;
        assert_eq!(semaphore.available(), 2, "{point}");
        let both = (semaphore.try_acquire().unwrap(), semaphore.try_acquire().unwrap());
        assert!(semaphore.try_acquire().is_err(), "{point}");
        drop(both);
    }
}

/// `fairness`: a process that has reported a long wait dies: newcomers pause, but not for long.
#[tokio::test]
async fn killed_long_waiter_delays_newcomers_only_briefly() {
    let _alone = alone().await;
    rounds(killed_long_waiter, |took| *took < Duration::from_secs(1)).await.unwrap();
}

/// Returns how long newcomers take for ten turns.
async fn killed_long_waiter() -> mp::Result<Duration> {
    let semaphore = Semaphore::new(1)?;
    let permit = semaphore.acquire().await.unwrap();
    let victim = asleep(doomed!("fairness.long_wait", take_turns, (semaphore.clone(), 1))).await;
    // The recovery of a bystander makes it look, in vain.
    let mut bystander = Process::spawn(lock_once, (Lock::new().unwrap(),)).unwrap();
    within(bystander.wait()).await.unwrap();
    death(victim, "fairness.long_wait").await;
    drop(permit);
    let start = std::time::Instant::now();
    for _ in 0..10 {
        drop(within(semaphore.acquire()).await.unwrap());
    }
    Ok(start.elapsed())
}

/// `rwlock`: killed at the moves of a writer. Its death is reported if the writer had the lock and had not released it.
#[tokio::test]
async fn killed_writer_is_reported_if_it_had_the_lock() {
    let _alone = alone().await;
    let write = async |lock: RwLock| drop(lock.write().await.unwrap());
    for (point, is_told) in [
        ("holders.entered", false),
        ("holders.counted:1", true),
        ("holders.written:1", true),
        ("write.phase", true),
        ("holders.counted:2", false),
        ("holders.written:2", false),
    ] {
        let lock = RwLock::new().unwrap();
        death(doomed!(point, write, (lock.clone(),)), point).await;
        let got = within(lock.write()).await;
        assert_eq!(got.as_ref().err().map(|error| error.kind()), is_told.then_some(ErrorKind::OwnerDied), "{point}");
        drop(got);
        drop(lock.try_read().unwrap());
        drop(lock.try_write().unwrap());
    }
}

/// `rwlock`: killed at the moves of a reader, which is not reported.
#[tokio::test]
async fn killed_reader_is_not_reported_and_blocks_no_writer() {
    let _alone = alone().await;
    let read = async |lock: RwLock| drop(lock.read().await.unwrap());
    for point in ["holders.entered", "holders.counted:1", "holders.written:1", "holders.counted:2", "holders.written:2"]
    {
        let lock = RwLock::new().unwrap();
        let writer = Process::spawn(async |lock: RwLock| drop(lock.write().await.unwrap()), (lock.clone(),));
        death(doomed!(point, read, (lock.clone(),)), point).await;
        within(writer.unwrap()).await.unwrap();
        drop(lock.try_write().unwrap());
        drop(lock.try_read().unwrap());
    }
}

/// `rwlock`: a writer dies waiting, at its wish and after taking it back; readers that stood back go on.
#[tokio::test]
async fn killed_waiting_writer_lets_readers_go_on() {
    let _alone = alone().await;
    let write = async |lock: RwLock| drop(lock.write().await.unwrap());
    let give_up = async |lock: RwLock| drop(lock.write_timeout(Duration::from_secs(3)).await);
    let read = async |lock: RwLock| drop(lock.read().await.unwrap());
    let lock = RwLock::new().unwrap();
    let reading = lock.read().await.unwrap();
    death(doomed!("write.announced", write, (lock.clone(),)), "write.announced").await;
    within(Process::spawn(read, (lock.clone(),)).unwrap()).await.unwrap();
    let victim = doomed!("write.withdrawn", give_up, (lock.clone(),));
    eventually("it wants to write", || lock.try_read().is_err()).await;
    let sleeper = Process::spawn(read, (lock.clone(),)).unwrap();
    death(victim, "write.withdrawn").await;
    within(sleeper).await.unwrap();
    drop(reading);
    drop(lock.try_write().unwrap());
}

/// `rwlock` and `sleepers`: a holder dies after its release and before the wake.
#[tokio::test]
async fn holder_killed_before_its_wake_leaves_no_reader_or_writer_asleep() {
    let _alone = alone().await;
    let hold = async |lock: RwLock, held: Event, go: Event| {
        let guard = lock.write().await.unwrap();
        held.set();
        go.wait().await.unwrap();
        drop(guard);
    };
    let all_the_same = async |lock: RwLock, writes: bool| {
        let kind = if writes {
            lock.write().await.err().map(|error| error.kind())
        } else {
            lock.read().await.err().map(|error| error.kind())
        };
        assert!(kind.is_none_or(|kind| kind == ErrorKind::OwnerDied));
    };
    for point in ["write.phase", "holders.counted:2", "holders.written:2", "notify.marked"] {
        let (lock, held, go) = (RwLock::new().unwrap(), Event::new().unwrap(), Event::new().unwrap());
        let victim = doomed!(point, hold, (lock.clone(), held.clone(), go.clone()));
        // Not by sleeping: that would be a notice more.
        eventually("it has the lock", || held.is_set()).await;
        let mut sleepers = Vec::new();
        for writes in [false, true, false] {
            sleepers.push(asleep(Process::spawn(all_the_same, (lock.clone(), writes)).unwrap()).await);
        }
        go.set();
        death(victim, point).await;
        for sleeper in sleepers {
            within(sleeper).await.unwrap();
        }
        drop(within(lock.write()).await);
        drop(lock.try_write().unwrap());
    }
}

/// `event` of `sync`: the setter dies before the wake, or in the middle of the waking.
#[tokio::test]
async fn killed_setter_of_an_event_leaves_no_waiter_asleep() {
    let _alone = alone().await;
    let set = async |event: Event| event.set();
    let wait = async |event: Event| event.wait().await.unwrap();
    for point in ["event.set", "notify.marked:1", "notify.marked:2"] {
        let event = Event::new().unwrap();
        let mut sleepers = Vec::new();
        for _ in 0..3 {
            sleepers.push(asleep(Process::spawn(wait, (event.clone(),)).unwrap()).await);
        }
        let all_wait = || mp::debug::dump().objects().iter().any(|object| object.waiting().len() == 3);
        eventually("all are in line", all_wait).await;
        death(doomed!(point, set, (event.clone(),)), point).await;
        for sleeper in sleepers {
            within(sleeper).await.unwrap();
        }
        assert!(event.is_set(), "{point}");
    }
}

/// `event` of `sync`, `barrier`, `rwlock`: woken together with others, one dies with its notice: the others go on.
#[tokio::test]
async fn waiter_killed_with_a_notification_of_all_stops_no_other() {
    let _alone = alone().await;
    let wait = async |event: Event| event.wait().await.unwrap();
    let pass = async |barrier: Barrier| barrier.wait().await.map(drop).map_err(|error| error.kind());
    let read = async |lock: RwLock| drop(lock.read().await.unwrap());
    for point in ["sleep.noticed", "sleep.unmarked"] {
        let event = Event::new().unwrap();
        let victim = asleep(doomed!(point, wait, (event.clone(),))).await;
        let other = asleep(Process::spawn(wait, (event.clone(),)).unwrap()).await;
        event.set();
        death(victim, point).await;
        within(other).await.unwrap();

        let barrier = Barrier::new(3).unwrap();
        let victim = asleep(doomed!(point, pass, (barrier.clone(),))).await;
        let other = asleep(Process::spawn(pass, (barrier.clone(),)).unwrap()).await;
        within(barrier.wait()).await.unwrap();
        death(victim, point).await;
        assert_eq!(within(other).await.unwrap(), Ok(()), "{point}");
        assert!(!barrier.is_broken(), "{point}");

        let lock = RwLock::new().unwrap();
        let writing = lock.write().await.unwrap();
        let victim = asleep(doomed!(point, read, (lock.clone(),))).await;
        let other = asleep(Process::spawn(read, (lock.clone(),)).unwrap()).await;
        drop(writing);
        death(victim, point).await;
        within(other).await.unwrap();
        drop(within(lock.write()).await.unwrap());
    }
}

/// `barrier`: a party dies in its place, not the last one: it is broken. In the last place: all pass.
#[tokio::test]
async fn killed_party_breaks_the_barrier_unless_it_came_last() {
    let _alone = alone().await;
    let wait = async |barrier: Barrier| barrier.wait().await.map(|result| result.index()).map_err(|error| error.kind());
    let act = async |barrier: Barrier| barrier.wait_then(async || Ok(())).await.map(drop);
    // As the first of three.
    let barrier = Barrier::new(3).unwrap();
    let other = Process::spawn(wait, (barrier.clone(),)).unwrap();
    eventually("one waits", || barrier.waiting() == 1).await;
    death(doomed!("barrier.arrived", wait, (barrier.clone(),)), "barrier.arrived").await;
    assert_eq!(within(other).await.unwrap(), Err(ErrorKind::BrokenBarrier));
    assert!(barrier.is_broken());
    barrier.reset();
    // As the last of three: after the place all pass, while it acts nobody does.
    for (point, acts, passes) in [
        ("barrier.arrived", false, true),
        ("barrier.ended", false, true),
        ("notify.marked", false, true),
        ("barrier.arrived", true, false),
        ("barrier.acted", true, false),
        ("barrier.ended", true, true),
    ] {
        let mut others = Vec::new();
        for n in 0..2 {
            others.push(Process::spawn(wait, (barrier.clone(),)).unwrap());
            eventually("they wait", || barrier.waiting() == n + 1).await;
        }
        match acts {
            false => death(doomed!(point, wait, (barrier.clone(),)), point).await,
            true => death(doomed!(point, act, (barrier.clone(),)), point).await,
        }
        for (index, other) in others.into_iter().enumerate() {
            let expected = if passes { Ok(index) } else { Err(ErrorKind::BrokenBarrier) };
            assert_eq!(within(other).await.unwrap(), expected, "{point} {acts}");
        }
        assert_eq!(barrier.is_broken(), !passes, "{point} {acts}");
        barrier.reset();
    }
    // Who aborts dies before the wake.
    let others: Vec<_> = (0..2).map(|_| Process::spawn(wait, (barrier.clone(),)).unwrap()).collect();
    eventually("they wait", || barrier.waiting() == 2).await;
    let abort = async |barrier: Barrier| barrier.abort();
    death(doomed!("barrier.ended", abort, (barrier.clone(),)), "barrier.ended").await;
    for other in others {
        assert_eq!(within(other).await.unwrap(), Err(ErrorKind::BrokenBarrier));
    }
}

/// `semaphore`: dropped with its notice, the permit goes to another process.
#[tokio::test]
async fn acquire_dropped_with_its_notification_passes_the_permit_on() {
    let _alone = alone().await;
    let semaphore = Semaphore::new(0).unwrap();
    let mut acquiring = Box::pin(semaphore.acquire());
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut acquiring).await.is_err());
    let other = asleep(Process::spawn(take_turns, (semaphore.clone(), 1)).unwrap()).await;
    within(Process::spawn(async |semaphore: Semaphore| semaphore.release().unwrap(), (semaphore.clone(),)).unwrap())
        .await
        .unwrap();
    drop(acquiring);
    within(other).await.unwrap();
    assert_eq!(semaphore.available(), 1);
}

/// `ring` and `channel_core`: a dropped put has not put, a dropped get has not taken.
#[tokio::test]
async fn dropped_put_has_not_put_and_dropped_get_has_not_taken() {
    let _alone = alone().await;
    let queue = Queue::bounded(1).unwrap();
    {
        let mut getting = pin!(queue.get());
        assert!(poll!(&mut getting).is_pending());
    }
    queue.put(Item::new(1, 10, 0)).await.unwrap();
    {
        let mut putting = pin!(queue.put(Item::new(2, 10, 2)));
        assert!(poll!(&mut putting).is_pending());
    }
    assert_eq!(queue.len(), 1);
    assert_eq!(drain(&queue).await, [1]);
}

/// `local_queue`: dropped in front with others behind, and not in front.
#[tokio::test]
async fn dropped_waiter_delays_no_other_of_its_process() {
    let _alone = alone().await;
    for dropped in 0..3 {
        let queue = Queue::unbounded().unwrap();
        let mut waiting: Vec<_> = (0..3).map(|_| Some(Box::pin(queue.get()))).collect();
        for getting in waiting.iter_mut().flatten() {
            assert!(tokio::time::timeout(Duration::from_millis(5), getting).await.is_err());
        }
        queue.put(Item::new(1, 10, 0)).await.unwrap();
        waiting[dropped] = None;
        queue.put(Item::new(2, 10, 0)).await.unwrap();
        let mut got = Vec::new();
        for getting in waiting.into_iter().flatten() {
            got.push(within(getting).await.unwrap().check());
        }
        assert_eq!(got, [1, 2], "without {dropped}");
    }
}

/// `local_queue` and `sleepers`: dropped after the notice had come, with nobody behind: another process gets it.
#[tokio::test]
async fn waiter_dropped_with_its_notification_passes_it_to_another_process() {
    let _alone = alone().await;
    let queue = Queue::unbounded().unwrap();
    let mut getting = Box::pin(queue.get());
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut getting).await.is_err());
    let other = asleep_at_a_queue(Process::spawn(get, (queue.clone(), 1)).unwrap()).await;
    let putter = Process::spawn(put, (queue.clone(), 1, 10, 0)).unwrap();
    within(putter).await.unwrap();
    drop(getting);
    assert_eq!(within(other).await.unwrap(), [1]);
}

/// `local_queue`: the runtime of the front waiter ends while others wait on another.
#[test]
fn waiter_dropped_with_its_runtime_delays_no_other() {
    let queue = Queue::<Item>::unbounded().unwrap();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = runtime();
    let mut in_front = Box::pin(queue.get());
    first.block_on(async { assert!(tokio::time::timeout(Duration::from_millis(20), &mut in_front).await.is_err()) });
    let waiting = std::thread::spawn({
        let queue = queue.clone();
        move || runtime().block_on(within(queue.get())).unwrap().check()
    });
    std::thread::sleep(Duration::from_millis(100));
    drop(in_front);
    drop(first);
    std::thread::sleep(Duration::from_millis(100));
    runtime().block_on(async { within(Process::spawn(put, (queue.clone(), 7, 10, 0)).unwrap()).await.unwrap() });
    assert_eq!(waiting.join().unwrap(), 7);
}

async fn lock_once(lock: Lock) -> Result<(), ErrorKind> {
    lock.acquire().await.map(drop).map_err(|error| error.kind())
}

/// `mutex`: killed holding, and between release and notice. A waiter gets it, and gets `OwnerDied` if it was held.
#[tokio::test]
async fn killed_holder_of_a_lock_is_reported_to_the_next() {
    let _alone = alone().await;
    for (point, is_told) in [("lock.taken", true), ("lock.released", false), ("lock.woken", false)] {
        let lock = Lock::new().unwrap();
        let guard = lock.acquire().await.unwrap();
        let victim = asleep(doomed!(point, lock_once, (lock.clone(),))).await;
        let other = asleep(Process::spawn(lock_once, (lock.clone(),)).unwrap()).await;
        drop(guard);
        death(victim, point).await;
        assert_eq!(within(other).await.unwrap(), if is_told { Err(ErrorKind::OwnerDied) } else { Ok(()) }, "{point}");
        drop(within(lock.acquire()).await.unwrap());
    }
}

/// `mutex`: the one that was woken dies before it has tried, and a barger's release wakes nobody for its sake.
#[tokio::test]
async fn killed_woken_waiter_of_a_lock_leaves_no_other_asleep() {
    let _alone = alone().await;
    for point in ["sleep.noticed", "sleep.unmarked"] {
        let lock = Lock::new().unwrap();
        let guard = lock.acquire().await.unwrap();
        let victim = asleep(doomed!(point, lock_once, (lock.clone(),))).await;
        let other = asleep(Process::spawn(lock_once, (lock.clone(),)).unwrap()).await;
        drop(guard);
        for _ in 0..1000 {
            drop(lock.try_acquire());
        }
        death(victim, point).await;
        assert_eq!(within(other).await.unwrap(), Ok(()), "{point}");
    }
}

/// `mutex`: a waiter dies as it becomes the hand-off waiter, or as one; nobody waits for a dead hand-off waiter.
#[tokio::test]
async fn killed_hand_off_waiter_of_a_lock_delays_nobody() {
    let _alone = alone().await;
    for point in ["handoff.named", "handoff.marked", "asleep"] {
        let lock = Lock::new().unwrap();
        let guard = lock.acquire().await.unwrap();
        let mut victim = match point {
            "asleep" => Process::spawn(lock_once, (lock.clone(),)).unwrap(),
            _ => doomed!(point, lock_once, (lock.clone(),)),
        };
        // One that is to die may look, and die, at any recovery from now on.
        falls_asleep_in_line(victim.pid()).await;
        tokio::time::sleep(LONG_FOR_A_LOCK).await;
        let before = switches(victim.pid());
        // Woken in vain after a long wait, it becomes the hand-off waiter: the recovery of a bystander makes it look.
        let mut bystander = Process::spawn(lock_once, (Lock::new().unwrap(),)).unwrap();
        within(bystander.wait()).await.unwrap();
        match point {
            "asleep" => {
                asleep_again(&victim, before).await;
                victim.kill().unwrap();
                drop(within(victim.wait()).await);
            }
            _ => death(victim, point).await,
        }
        let other = asleep(Process::spawn(lock_once, (lock.clone(),)).unwrap()).await;
        drop(guard);
        assert_eq!(within(other).await.unwrap(), Ok(()), "{point}");
        assert_eq!(within(lock_once(lock)).await, Ok(()), "{point}");
    }
}

/// `mutex`: a hand-off waiter dies as it gives up, or as it takes what was kept for it.
#[tokio::test]
async fn hand_off_waiter_killed_while_it_gives_up_or_takes_delays_nobody() {
    let _alone = alone().await;
    let give_up = async |lock: Lock| lock.acquire_timeout(Duration::from_secs(5)).await.map(drop).map_err(|e| e.kind());
    for point in ["handoff.unmarked", "lock.taken"] {
        let lock = Lock::new().unwrap();
        let guard = lock.acquire().await.unwrap();
        let victim = match point {
            "handoff.unmarked" => doomed!(point, give_up, (lock.clone(),)),
            _ => doomed!(point, lock_once, (lock.clone(),)),
        };
        falls_asleep_in_line(victim.pid()).await;
        tokio::time::sleep(LONG_FOR_A_LOCK).await;
        let before = switches(victim.pid());
        // The recovery of a bystander makes it look in vain: it is the hand-off waiter.
        let mut bystander = Process::spawn(lock_once, (Lock::new().unwrap(),)).unwrap();
        within(bystander.wait()).await.unwrap();
        let mut is_told = false;
        if point == "handoff.unmarked" {
            death(victim, point).await;
            let other = asleep(Process::spawn(lock_once, (lock.clone(),)).unwrap()).await;
            drop(guard);
            assert_eq!(within(other).await.unwrap(), Ok(()), "{point}");
        } else {
            asleep_again(&victim, before).await;
            let other = asleep(Process::spawn(lock_once, (lock.clone(),)).unwrap()).await;
            let released = Instant::now();
            drop(guard);
            // It is kept for the hand-off waiter for some milliseconds, unless that has taken it and died by now, which is told.
            match lock.try_acquire() {
                Ok(_) => assert!(released.elapsed() > Duration::from_millis(5), "there is no hand-off waiter"),
                Err(error) => is_told |= error.kind() == ErrorKind::OwnerDied,
            }
            death(victim, point).await;
            is_told |= within(other).await.unwrap() == Err(ErrorKind::OwnerDied);
            assert!(is_told);
        }
        assert_eq!(within(lock_once(lock)).await, Ok(()), "{point}");
    }
}

/// Who has waited for so long becomes the hand-off waiter when it looks in vain.
const LONG_FOR_A_LOCK: Duration = Duration::from_millis(2);

/// How often a process has gone to sleep.
fn switches(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    count.map_or(0, |count| count.trim().parse().unwrap())
}

async fn asleep_again<R: serde::de::DeserializeOwned + 'static>(process: &Process<R>, before: u64) {
    eventually("it has looked", || switches(process.pid()) > before && is_asleep(process.pid())).await;
}

/// `mutex`: a dropped hand-off waiter gives up its place, and the lock is anybody's.
#[tokio::test]
async fn dropped_hand_off_waiter_of_a_lock_frees_its_reservation() {
    let _alone = alone().await;
    let round = async || {
        let lock = Lock::new()?;
        let guard = lock.acquire().await.unwrap();
        let mut waiting = Box::pin(lock.acquire());
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut waiting).await.is_err());
        assert!(poll!(&mut waiting).is_pending(), "and has looked once more: it is the hand-off waiter");
        let released = Instant::now();
        drop(guard);
        let refused = lock.try_acquire().err().map(|error| error.kind());
        // It is kept for the hand-off waiter for some milliseconds.
        let is_kept = refused == Some(ErrorKind::WouldBlock);
        assert!(is_kept || refused.is_none() && released.elapsed() > Duration::from_millis(1), "{refused:?}");
        drop(waiting);
        drop(lock.try_acquire().unwrap());
        Ok(is_kept)
    };
    rounds(round, |is_kept| *is_kept).await.unwrap();
}

async fn wait_once(condition: Condition, told: Queue<u32>) -> u32 {
    let guard = condition.lock().await.unwrap();
    told.put(1).await.unwrap();
    condition.wait(guard).await.map(drop).unwrap();
    1
}

async fn waits(point: Option<&str>, condition: &Condition, told: &Queue<u32>) -> Process<u32> {
    let process = match point {
        Some(point) => doomed!(point, wait_once, (condition.clone(), told.clone())),
        None => Process::spawn(wait_once, (condition.clone(), told.clone())).unwrap(),
    };
    within(told.get()).await.unwrap();
    process
}

/// `condition`: killed on the way into it: it does not count as a waiter, and the death of the lock's holder is reported.
#[tokio::test]
async fn waiter_killed_while_it_enters_a_condition_takes_no_notification() {
    let _alone = alone().await;
    for (point, held) in [("condition.claimed", true), ("condition.entered", true), ("condition.released", false)] {
        let (condition, told) = (Condition::new().unwrap(), Queue::unbounded().unwrap());
        death(waits(Some(point), &condition, &told).await, point).await;
        let kind = within(condition.lock()).await.err().map(|error| error.kind());
        assert_eq!(kind, held.then_some(ErrorKind::OwnerDied), "{point}");
        assert_eq!(condition.waiting(), 0);
        let other = waits(None, &condition, &told).await;
        drop(within(condition.lock()).await.unwrap());
        condition.notify_one();
        assert_eq!(within(other).await.unwrap(), 1, "{point}");
    }
}

/// `condition`: killed with its notice, at each step of its way back; the next one gets it.
#[tokio::test]
async fn waiter_killed_with_a_notification_of_a_condition_leaves_it_to_the_next() {
    let _alone = alone().await;
    for point in ["sleep.noticed", "sleep.unmarked", "condition.taken"] {
        let (condition, told) = (Condition::new().unwrap(), Queue::unbounded().unwrap());
        let victim = waits(Some(point), &condition, &told).await;
        let other = waits(None, &condition, &told).await;
        let guard = within(condition.lock()).await.unwrap();
        let (victim, other) = (asleep(victim).await, asleep(other).await);
        condition.notify_one();
        drop(guard);
        death(victim, point).await;
        assert_eq!(within(other).await.unwrap(), 1, "{point}");
    }
}

/// `condition`: killed when it has the lock again and has used its notice: that wakes nobody else.
#[tokio::test]
async fn waiter_killed_after_it_used_its_notification_wakes_no_other() {
    let _alone = alone().await;
    let (condition, told) = (Condition::new().unwrap(), Queue::unbounded().unwrap());
    let victim = waits(Some("condition.finished"), &condition, &told).await;
    let other = waits(None, &condition, &told).await;
    drop(within(condition.lock()).await.unwrap());
    condition.notify_one();
    death(victim, "condition.finished").await;
    let error = within(condition.lock()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OwnerDied, "it held the lock");
    assert_eq!(condition.waiting(), 1);
    assert!(other.is_alive());
    condition.notify_one();
    drop(error);
    assert_eq!(within(other).await.unwrap(), 1);
    assert_eq!(condition.waiting(), 0);
}

/// `condition`: a notifier of all is killed after its first notice, or before it: all wake, and so after it healed half.
#[tokio::test]
async fn killed_notifier_of_all_leaves_no_waiter_asleep() {
    let _alone = alone().await;
    let notify = async |condition: Condition| condition.notify_all();
    for (point, healer) in [
        ("condition.notifying", None),
        ("condition.given", None),
        ("notify.marked", None),
        ("condition.notifying", Some("heal.begun")),
        ("condition.notifying", Some("heal.given")),
    ] {
        let (condition, told) = (Condition::new().unwrap(), Queue::unbounded().unwrap());
        let dying = match healer {
            Some(at) => Some((waits(Some(at), &condition, &told).await, at)),
            None => None,
        };
        let mut others = Vec::new();
        for _ in 0..3 {
            others.push(waits(None, &condition, &told).await);
        }
        drop(within(condition.lock()).await.unwrap());
        death(doomed!(point, notify, (condition.clone(),)), point).await;
        for other in others {
            assert_eq!(within(other).await.unwrap(), 1, "{point}, {healer:?}");
        }
        // The one that looked first may have healed it.
        if let Some((mut dying, at)) = dying {
            let ended = within(dying.join()).await;
            assert!(ended.is_err_and(|e| e.exit_status().and_then(|s| s.signal()) == Some(9)) || healer == Some(at));
        }
    }
}

/// `condition`: a notifier of one is killed before the wake.
#[tokio::test]
async fn killed_notifier_of_one_leaves_no_waiter_asleep() {
    let _alone = alone().await;
    let notify = async |condition: Condition| condition.notify_one();
    for point in ["condition.given", "notify.marked"] {
        let (condition, told) = (Condition::new().unwrap(), Queue::unbounded().unwrap());
        let waiter = asleep(waits(None, &condition, &told).await).await;
        death(doomed!(point, notify, (condition.clone(),)), point).await;
        assert_eq!(within(waiter).await.unwrap(), 1, "{point}");
    }
}

/// `condition`: a waiter that leaves with a notification is killed after it has passed it on: one wakes, at worst one more.
#[tokio::test]
async fn waiter_killed_after_it_passed_a_notification_on_wakes_one_or_two() {
    let _alone = alone().await;
    let (condition, told) = (Condition::new().unwrap(), Queue::unbounded().unwrap());
    let leave = async |condition: Condition, told: Queue<u32>| {
        let guard = condition.lock().await.unwrap();
        let mut waiting = Box::pin(condition.wait(guard));
        assert!(poll!(&mut waiting).is_pending());
        told.put(1).await.unwrap();
        condition.notify_one();
        drop(waiting);
    };
    let victim = doomed!("condition.passed", leave, (condition.clone(), told.clone()));
    within(told.get()).await.unwrap();
    death(victim, "condition.passed").await;
    assert_eq!(condition.waiting(), 0);
}

/// Uses a manager that is killed at some point, through pipes or a socket, until it is gone.
async fn use_a_doomed_manager(far: bool) -> Result<usize, String> {
    let start = Manager::builder().bind("127.0.0.1:0").authkey(b"key").start();
    let manager = start.await.map_err(|error| error.to_string())?;
    let there = match far {
        true => {
            let address = manager.address().await.map_err(|error| error.to_string())?.ok_or("no address")?;
            Manager::connect(&address, b"key").await.map_err(|error| error.to_string())?
        }
        false => manager,
    };
    let list: ListProxy<u32> = there.list().await.map_err(|error| error.to_string())?;
    let queue = there.queue::<u32>(None).await.map_err(|error| error.to_string())?;
    let mut waits = pin!(queue.get());
    assert!(poll!(waits.as_mut()).is_pending());
    for n in 0..1_000 {
        let pushes = futures::future::join_all((0..10).map(|n| list.push(n))).await;
        if let Some(error) = pushes.into_iter().find_map(Result::err) {
            assert_eq!(error.kind(), ErrorKind::Closed);
            assert_eq!(waits.await.unwrap_err().kind(), ErrorKind::Closed);
            return Ok(n);
        }
    }
    Err("it was not killed".to_string())
}

/// Pushes numbers without end, and notes before each how many it has begun.
async fn push_on(list: ListProxy<u32>, begun: mp::Value<usize>) {
    for n in 1.. {
        begun.set(n);
        list.push(n as u32).await.unwrap();
    }
}

/// `manager/wire/ready`: what a client had sent is done, whether its bit was set or not.
#[tokio::test]
async fn client_killed_between_request_and_wake_has_made_its_call() {
    let _alone = alone().await;
    let manager = Manager::start().await.unwrap();
    for point in ["manager.put:40", "manager.marked:40"] {
        let (list, begun) = (manager.list::<u32>().await.unwrap(), mp::Value::new(0).unwrap());
        death(doomed!(point, push_on, (list.clone(), begun.clone())), point).await;
        let all = begun.get();
        within(async {
            while list.len().await.unwrap() < all {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert_eq!(list.len().await.unwrap(), all, "{point}");
    }
    manager.shutdown().await.unwrap();
}

/// `manager/wire/ready`: a client that is stopped before it wakes the manager delays its own request only.
#[tokio::test]
async fn client_stopped_before_it_wakes_the_manager_delays_no_other() {
    let _alone = alone().await;
    let manager = Manager::start().await.unwrap();
    let (list, begun) = (manager.list::<u32>().await.unwrap(), mp::Value::new(0).unwrap());
    let stopping = Process::builder().env("MULTIPROCESS_STOP_AT", "manager.marked:40");
    let client = stopping.spawn(push_on, (list.clone(), begun.clone())).unwrap();
    let is_stopped =
        || std::fs::read_to_string(format!("/proc/{}/stat", client.pid())).is_ok_and(|stat| stat.contains(") T "));
    eventually("it is stopped", is_stopped).await;
    for n in 0..100 {
        within(list.len()).await.unwrap();
        // The manager falls asleep in between.
        tokio::time::sleep(Duration::from_micros(100 * (n % 5))).await;
    }
    let before = begun.get();
    let pid = rustix::process::Pid::from_raw(client.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    eventually("it goes on", || begun.get() > before + 100).await;
    client.kill().unwrap();
    manager.shutdown().await.unwrap();
}

/// `manager/server`: every pending call fails.
#[tokio::test]
async fn manager_killed_at_any_step_fails_every_call() {
    let _alone = alone().await;
    for point in ["manager.request:60", "manager.ran:60", "manager.answer:60"] {
        for far in [false, true] {
            let mut client = doomed!(point, use_a_doomed_manager, (far,));
            let outcome = within(client.join()).await.unwrap();
            assert!(outcome.is_ok(), "{point}: {outcome:?}");
        }
    }
}

async fn get_of_manager(address: String, name: String) {
    let manager = Manager::connect(&address, b"key").await.unwrap();
    match name.as_str() {
        "queue" => {
            let queue: mp::QueueProxy<u32> = manager.names().get(&name).await.unwrap().unwrap();
            queue.get().await.unwrap();
        }
        "seats" => {
            let seats: mp::SemaphoreProxy = manager.names().get(&name).await.unwrap().unwrap();
            std::mem::forget(seats.acquire().await.unwrap());
        }
        _ => {
            let lock: mp::LockProxy = manager.names().get(&name).await.unwrap().unwrap();
            std::mem::forget(lock.acquire().await.unwrap());
        }
    }
}

/// `manager/server`, `manager/waits`: what a killed client had got and not taken goes back, what it held is free.
#[tokio::test]
async fn grants_and_items_of_killed_client_go_back() {
    let _alone = alone().await;
    let manager = Manager::builder().bind("127.0.0.1:0").authkey(b"key").start().await.unwrap();
    let address = manager.address().await.unwrap().unwrap();
    let queue = manager.queue::<u32>(None).await.unwrap();
    let (seats, lock) = (manager.semaphore(1).await.unwrap(), manager.lock().await.unwrap());
    manager.names().set("queue", queue.clone()).await.unwrap();
    manager.names().set("seats", seats.clone()).await.unwrap();
    manager.names().set("lock", lock.clone()).await.unwrap();
    queue.put(1).await.unwrap();
    queue.put(2).await.unwrap();
    for name in ["queue", "seats", "lock"] {
        death(doomed!("manager.got", get_of_manager, (address.clone(), name.into())), name).await;
    }
    assert_eq!(within(queue.get()).await.unwrap(), 1);
    assert_eq!(within(queue.get()).await.unwrap(), 2);
    drop(within(seats.acquire()).await.unwrap());
    let error = within(lock.acquire()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OwnerDied);
    drop(error);
    drop(within(lock.acquire()).await.unwrap());
    manager.shutdown().await.unwrap();
}
