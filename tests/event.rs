//! Events: set, clear, and all waiters.

mod common;

use common::{Deadline, blocking_rounds, falls_asleep_in_line, go_on, in_child, rounds, stop, within};
use futures::poll;
use multiprocess::{self as mp, ErrorKind, Event, Process, Queue};
use std::pin::pin;
use std::time::{Duration, Instant};

mp::test_support!();

const SHORT: Duration = Duration::from_millis(50);

#[test]
fn event_01_waits_of_an_unset_event_time_out() {
    let _deadline = Deadline::start();
    let event = Event::new().unwrap();
    assert!(!event.is_set());
    assert_eq!(event.try_wait().unwrap_err().kind(), ErrorKind::WouldBlock);
    let at_once = || {
        let start = Instant::now();
        assert_eq!(event.blocking_wait_timeout(Duration::ZERO).unwrap_err().kind(), ErrorKind::Timeout);
        start.elapsed()
    };
    blocking_rounds(at_once, |took| *took < SHORT);
    let start = Instant::now();
    assert_eq!(event.blocking_wait_timeout(SHORT).unwrap_err().kind(), ErrorKind::Timeout);
    assert!(start.elapsed() >= SHORT);
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        assert_eq!(event.wait_timeout(Duration::ZERO).await.unwrap_err().kind(), ErrorKind::Timeout);
        let start = Instant::now();
        assert_eq!(event.wait_timeout(SHORT).await.unwrap_err().kind(), ErrorKind::Timeout);
        assert!(start.elapsed() >= SHORT);
    });
}

#[test]
fn event_02_waits_of_a_set_event_return_at_once() {
    let _deadline = Deadline::start();
    let event = Event::new().unwrap();
    event.set();
    assert!(event.is_set());
    event.try_wait().unwrap();
    event.blocking_wait().unwrap();
    event.blocking_wait_timeout(Duration::ZERO).unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        event.wait().await.unwrap();
        event.wait_timeout(Duration::ZERO).await.unwrap();
    });
}

#[tokio::test]
async fn event_03_set_in_a_child_wakes_waiters() {
    let event = Event::new().unwrap();
    event.set();
    event.clear();
    assert!(!event.is_set());
    let child = Process::spawn(
        async |event: Event| {
            tokio::time::sleep(SHORT).await;
            event.set();
        },
        (event.clone(),),
    )
    .unwrap();
    within(event.wait()).await.unwrap();
    within(child).await.unwrap();
}

#[test]
fn event_04_debug_shows_whether_it_is_set() {
    let event = Event::new().unwrap();
    assert!(format!("{event:?}").contains("is_set: false"));
    event.set();
    assert!(format!("{event:?}").contains("is_set: true"));
}

#[tokio::test]
async fn event_05_set_and_clear_twice_are_fine() {
    let event = Event::new().unwrap();
    event.set();
    event.set();
    assert!(event.is_set());
    event.clear();
    event.clear();
    assert!(!event.is_set());
    assert!(event.wait_timeout(Duration::ZERO).await.is_err());
}

/// P4: CPython's `set` hangs here, and then even `is_set` does.
#[tokio::test]
async fn event_06_p4_killed_waiters_delay_neither_set_nor_the_others() {
    rounds(set_with_killed_waiters, |took| *took < SHORT).await.unwrap();
}

/// Returns how long `set` takes.
async fn set_with_killed_waiters() -> mp::Result<Duration> {
    let (event, done) = (Event::new()?, Queue::<u32>::unbounded()?);
    let wait = async |event: Event, done: Queue<u32>| {
        event.wait().await.unwrap();
        done.put(std::process::id()).await.unwrap();
    };
    let mut children: Vec<_> = (0..6).map(|_| Process::spawn(wait, (event.clone(), done.clone())).unwrap()).collect();
    for child in &children {
        falls_asleep_in_line(child.pid()).await;
    }
    for child in children.iter_mut().step_by(2) {
        child.kill().unwrap();
    }
    let start = Instant::now();
    event.set();
    let took = start.elapsed();
    assert!(event.is_set());
    for child in children.into_iter().skip(1).step_by(2) {
        within(child).await.unwrap();
    }
    println!("set took {took:?}, all others were through after {:?}", start.elapsed());
    assert_eq!(done.len(), 3);
    Ok(took)
}

#[tokio::test]
async fn waiters_continue_though_the_event_is_cleared_at_once() {
    let event = Event::new().unwrap();
    let mut here: Vec<_> = (0..3).map(|_| Box::pin(event.wait())).collect();
    for wait in &mut here {
        assert!(poll!(wait).is_pending());
    }
    let children: Vec<_> =
        (0..3).map(|_| Process::spawn(async |event: Event| event.wait().await, (event.clone(),)).unwrap()).collect();
    for child in &children {
        falls_asleep_in_line(child.pid()).await;
    }
    event.set();
    event.clear();
    for wait in here {
        within(wait).await.unwrap();
    }
    for child in children {
        within(child).await.unwrap().unwrap();
    }
    let mut late = pin!(event.wait());
    assert!(poll!(&mut late).is_pending(), "who comes after the clear waits");
}

#[tokio::test]
async fn cancelled_wait_leaves_no_waiter() {
    let event = Event::new().unwrap();
    {
        let mut dropped = pin!(event.wait());
        assert!(poll!(&mut dropped).is_pending());
    }
    assert!(event.wait_timeout(SHORT).await.is_err());
    let mut waiting = pin!(event.wait());
    assert!(poll!(&mut waiting).is_pending());
    event.set();
    within(waiting).await.unwrap();
}

#[tokio::test]
async fn handle_travels() {
    let event = Event::new().unwrap();
    let same = in_child(
        async |event: Event| {
            event.set();
            event
        },
        (event.clone(),),
    )
    .await;
    assert!(event.is_set() && same.is_set());
    same.clear();
    assert!(!event.is_set());
}

/// Stopped is not dead: the setter does not wait for it, the others go on, and it learns of it when it goes on.
#[tokio::test]
async fn stopped_waiter_delays_no_other_and_misses_nothing() {
    let event = Event::new().unwrap();
    let wait = async |event: Event| event.wait().await.is_ok();
    let children: Vec<_> = (0..2).map(|_| Process::spawn(wait, (event.clone(),)).unwrap()).collect();
    for child in &children {
        falls_asleep_in_line(child.pid()).await;
    }
    stop(children[0].pid());
    assert_eq!(within(event.wait_timeout(SHORT)).await.unwrap_err().kind(), ErrorKind::Timeout);
    event.set();
    event.clear();
    let mut children = children.into_iter();
    let (stopped, other) = (children.next().unwrap(), children.next().unwrap());
    assert!(within(other).await.unwrap() && stopped.is_alive());
    go_on(stopped.pid());
    assert!(within(stopped).await.unwrap(), "it was set while it waited");
}
