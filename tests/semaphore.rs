//! Semaphores: counts, limits, fairness, deaths and cancellations.

mod common;

use common::{
    Deadline, Random, blocking_rounds, eventually, falls_asleep_in_line, go_on, in_child, is_asleep, rounds, stop,
    within,
};
use futures::FutureExt;
use multiprocess::{
    self as mp, BoundedSemaphore, ErrorKind, Event, LockError, Permit, Process, Queue, Semaphore, debug,
};
use std::time::{Duration, Instant};

mp::test_support!();

fn kind<G>(got: Result<G, LockError<G>>) -> ErrorKind {
    got.map(drop).expect_err("it could not be had").kind()
}

/// Takes `count` permits, says so, and holds them for ever.
async fn hold(semaphore: Semaphore, count: usize, ready: Event) {
    let mut held = Vec::new();
    for _ in 0..count {
        held.push(semaphore.acquire().await.unwrap());
    }
    ready.set();
    std::future::pending::<()>().await;
    drop(held);
}

async fn killed<R: serde::de::DeserializeOwned + 'static>(mut process: Process<R>) {
    process.kill().unwrap();
    within(process.wait()).await.unwrap();
}

#[tokio::test]
async fn sem_01_count_goes_down_and_up_and_at_zero_a_try_fails() {
    let semaphore = Semaphore::new(2).unwrap();
    assert_eq!(semaphore.available(), 2);
    let first = semaphore.acquire().await.unwrap();
    assert_eq!(semaphore.available(), 1);
    let second = semaphore.acquire().await.unwrap();
    assert_eq!(semaphore.available(), 0);
    assert_eq!(kind(semaphore.try_acquire()), ErrorKind::WouldBlock);
    drop(first);
    assert_eq!(semaphore.available(), 1);
    drop(second);
    assert_eq!(semaphore.available(), 2);
}

#[test]
fn sem_02_release_adds_permits_beyond_the_first_ones_in_any_process() {
    let semaphore = Semaphore::new(2).unwrap();
    semaphore.release().unwrap();
    semaphore.release().unwrap();
    let permits: Vec<Permit> = (0..4).map(|_| semaphore.try_acquire().unwrap()).collect();
    assert!(semaphore.try_acquire().is_err());
    drop(permits);
    assert_eq!(semaphore.available(), 4);
}

#[tokio::test]
async fn sem_03_bounded_semaphore_refuses_a_release_beyond_its_limit() {
    let semaphore = BoundedSemaphore::new(2).unwrap();
    let too_many = || semaphore.release().unwrap_err();
    assert_eq!(too_many().kind(), ErrorKind::Other);
    let held = (semaphore.acquire().await.unwrap(), semaphore.acquire().await.unwrap());
    assert_eq!((semaphore.available(), kind(semaphore.try_acquire())), (0, ErrorKind::WouldBlock));
    too_many(); // Those that are held come back by themselves.
    held.0.forget();
    semaphore.release().unwrap();
    too_many();
    assert_eq!(semaphore.available(), 1);
    drop(held.1);
    assert_eq!(semaphore.available(), 2);
    too_many();
}

#[test]
fn sem_05_at_zero_a_try_takes_no_time_and_a_timeout_its_time() {
    let _deadline = Deadline::start();
    let semaphore = Semaphore::new(0).unwrap();
    let short = Duration::from_millis(100);
    let at_once = || {
        let start = Instant::now();
        assert_eq!(kind(semaphore.try_acquire()), ErrorKind::WouldBlock);
        assert_eq!(kind(semaphore.blocking_acquire_timeout(Duration::ZERO)), ErrorKind::Timeout);
        start.elapsed()
    };
    blocking_rounds(at_once, |took| *took < short);
    let start = Instant::now();
    assert_eq!(kind(semaphore.blocking_acquire_timeout(short)), ErrorKind::Timeout);
    assert!(start.elapsed() >= short);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let at_once = async || {
            let start = Instant::now();
            assert_eq!(kind(semaphore.acquire_timeout(Duration::ZERO).await), ErrorKind::Timeout);
            Ok(start.elapsed())
        };
        rounds(at_once, |took| *took < short).await.unwrap();
        let start = Instant::now();
        assert_eq!(kind(semaphore.acquire_timeout(short).await), ErrorKind::Timeout);
        assert!(start.elapsed() >= short);
        semaphore.release().unwrap();
        semaphore.acquire_timeout(short).await.unwrap().forget();
        semaphore.release().unwrap();
    });
    semaphore.blocking_acquire().unwrap().forget();
    assert_eq!(semaphore.available(), 0);
}

#[test]
fn sem_06_more_permits_than_can_be_counted_are_refused() {
    let most = (1 << 31) - 1;
    assert_eq!(Semaphore::new(most + 1).unwrap_err().kind(), ErrorKind::Other);
    assert_eq!(BoundedSemaphore::new(usize::MAX).unwrap_err().kind(), ErrorKind::Other);
    let semaphore = Semaphore::new(most).unwrap();
    assert_eq!(semaphore.release().unwrap_err().kind(), ErrorKind::Other);
    let permit = semaphore.try_acquire().unwrap();
    // One that is held counts: it comes back.
    assert_eq!(semaphore.release().unwrap_err().kind(), ErrorKind::Other);
    drop(permit);
    assert_eq!(semaphore.available(), most);
}

#[test]
fn handles_and_permits_are_send_and_permits_have_no_lifetime() {
    fn is_send<T: Send + Sync + 'static>() {}
    is_send::<Permit>();
    is_send::<Semaphore>();
    fn future_is_send<T: Send>(_: T) {}
    let semaphore = Semaphore::new(1).unwrap();
    future_is_send(semaphore.acquire());
    future_is_send(semaphore.acquire_timeout(Duration::ZERO));
    let permit = semaphore.try_acquire().unwrap();
    drop(semaphore);
    std::thread::spawn(move || drop(permit)).join().unwrap();
}

#[test]
fn blocking_call_inside_async_code_panics() {
    let semaphore = Semaphore::new(1).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        runtime.block_on(async { drop(semaphore.blocking_acquire()) })
    }));
    assert!(panicked.is_err());
}

/// Sent as one kind and received as the other.
enum Disguised {
    Plain(Semaphore),
    Bounded(BoundedSemaphore),
}

impl serde::Serialize for Disguised {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Plain(semaphore) => semaphore.serialize(serializer),
            Self::Bounded(semaphore) => semaphore.serialize(serializer),
        }
    }
}

impl<'de> serde::Deserialize<'de> for Disguised {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        BoundedSemaphore::deserialize(deserializer).map(Self::Bounded)
    }
}

#[tokio::test]
async fn handle_travels_as_one_descriptor_and_keeps_its_kind() {
    let semaphore = Semaphore::new(1).unwrap();
    let travel = async |semaphore: Semaphore, again: Semaphore| {
        let permit = semaphore.acquire().await.unwrap();
        assert_eq!(again.available(), 0);
        drop(permit);
        again
    };
    let back = in_child(travel, (semaphore.clone(), semaphore.clone())).await;
    let permit = back.try_acquire().unwrap();
    assert_eq!(semaphore.available(), 0);
    drop(permit);
    let queue = Queue::<Semaphore>::unbounded().unwrap();
    queue.put(semaphore).await.unwrap();
    assert_eq!(queue.get().await.unwrap().available(), 1);
    let queue = Queue::<Disguised>::unbounded().unwrap();
    queue.put(Disguised::Plain(Semaphore::new(1).unwrap())).await.unwrap();
    assert_eq!(queue.get().await.err().expect("it is of another kind").kind(), ErrorKind::Decode);
}

#[tokio::test]
async fn waiters_of_a_process_are_served_in_the_order_of_their_first_poll() {
    let semaphore = Semaphore::new(0).unwrap();
    let (sender, mut order) = tokio::sync::mpsc::unbounded_channel();
    let mut waiting = Vec::new();
    for n in 0..10 {
        let (semaphore, sender) = (semaphore.clone(), sender.clone());
        let mut acquire = Box::pin(async move {
            let permit = semaphore.acquire().await.unwrap();
            sender.send(n).unwrap();
            drop(permit);
        });
        assert!(acquire.as_mut().now_or_never().is_none());
        waiting.push(tokio::spawn(acquire));
    }
    semaphore.release().unwrap();
    for n in 0..10 {
        assert_eq!(within(order.recv()).await, Some(n));
    }
    for waiter in waiting {
        waiter.await.unwrap();
    }
    assert_eq!(semaphore.available(), 1);
}

#[tokio::test]
async fn dropped_permit_and_release_wake_a_sleeper_in_another_process() {
    for by_release in [false, true] {
        let semaphore = Semaphore::new(1).unwrap();
        let permit = semaphore.acquire().await.unwrap();
        let child =
            Process::spawn(async |semaphore: Semaphore| drop(semaphore.acquire().await.unwrap()), (semaphore.clone(),))
                .unwrap();
        eventually("it sleeps", || is_asleep(child.pid())).await;
        if by_release {
            semaphore.release().unwrap();
            within(child).await.unwrap();
            drop(permit);
        } else {
            drop(permit);
            within(child).await.unwrap();
        }
        assert_eq!(semaphore.available(), 1 + usize::from(by_release));
    }
}

#[tokio::test]
async fn there_are_never_more_holders_than_permits() {
    let (semaphore, inside) = (Semaphore::new(3).unwrap(), Semaphore::new(3).unwrap());
    let work = async |semaphore: Semaphore, inside: Semaphore| {
        for _ in 0..2000 {
            let permit = semaphore.acquire().await.unwrap();
            // As many as the first lets in can have one of these at once.
            let seen = inside.try_acquire().expect("no more inside than permits");
            drop(seen);
            drop(permit);
        }
    };
    let children: Vec<_> = (0..6).map(|_| Process::spawn(work, (semaphore.clone(), inside.clone())).unwrap()).collect();
    for child in children {
        within(child).await.unwrap();
    }
    assert_eq!((semaphore.available(), inside.available()), (3, 3));
}

#[tokio::test]
async fn permits_of_a_killed_process_go_to_waiters() {
    let semaphore = Semaphore::new(3).unwrap();
    let ready = Event::new().unwrap();
    let mut victim = Process::spawn(hold, (semaphore.clone(), 3, ready.clone())).unwrap();
    within(ready.wait()).await.unwrap();
    assert_eq!(semaphore.available(), 0);
    let waiters: Vec<_> = (0..3)
        .map(|_| {
            let semaphore = semaphore.clone();
            tokio::spawn(async move { within(semaphore.acquire()).await.map_err(|error| error.kind()) })
        })
        .collect();
    let child =
        Process::spawn(async |semaphore: Semaphore| semaphore.acquire().await.unwrap().forget(), (semaphore.clone(),))
            .unwrap();
    eventually("it sleeps", || is_asleep(child.pid())).await;
    let start = Instant::now();
    victim.kill().unwrap();
    let mut permits = Vec::new();
    for waiter in waiters {
        permits.push(waiter.await.unwrap().expect("a permit, and no word of a death"));
        if permits.len() == 2 {
            break; // The child may have the third.
        }
    }
    println!("two permits came back after {:?}", start.elapsed());
    within(victim.wait()).await.unwrap();
    permits.clear();
    within(child).await.unwrap();
    eventually("all but the forgotten one", || semaphore.available() == 2).await;
}

#[tokio::test]
async fn killed_waiter_takes_no_permit() {
    let semaphore = Semaphore::new(0).unwrap();
    let wait = async |semaphore: Semaphore| drop(semaphore.acquire().await);
    let victim = Process::spawn(wait, (semaphore.clone(),)).unwrap();
    eventually("it sleeps", || is_asleep(victim.pid())).await;
    let other = Process::spawn(wait, (semaphore.clone(),)).unwrap();
    eventually("it sleeps", || is_asleep(other.pid())).await;
    killed(victim).await;
    semaphore.release().unwrap();
    within(other).await.unwrap();
    assert_eq!(semaphore.available(), 1);
}

#[tokio::test]
async fn release_never_waits_for_a_stopped_process() {
    let (semaphore, ready) = (Semaphore::new(1).unwrap(), Event::new().unwrap());
    let victim = Process::spawn(hold, (semaphore.clone(), 1, ready.clone())).unwrap();
    within(ready.wait()).await.unwrap();
    stop(victim.pid());
    semaphore.release().unwrap();
    drop(within(semaphore.acquire()).await.unwrap());
    assert_eq!(semaphore.available(), 1);
    killed(victim).await;
    eventually("both", || semaphore.available() == 2).await;
}

#[tokio::test]
async fn cancelled_acquires_lose_no_permit() {
    let semaphore = Semaphore::new(2).unwrap();
    let work = async |semaphore: Semaphore, seed: u64| {
        let mut random = Random::new(seed);
        for _ in 0..3000 {
            let acquire = semaphore.acquire();
            match random.below(3) {
                0 => drop(tokio::time::timeout(Duration::from_micros(random.below(200)), acquire).await),
                1 => drop(acquire.now_or_never()),
                _ => drop(acquire.await),
            }
        }
    };
    let children: Vec<_> = (0..3).map(|n| Process::spawn(work, (semaphore.clone(), n)).unwrap()).collect();
    for child in children {
        within(child).await.unwrap();
    }
    assert_eq!(semaphore.available(), 2);
    drop((within(semaphore.acquire()).await.unwrap(), within(semaphore.acquire()).await.unwrap()));
}

#[tokio::test]
async fn random_kills_lose_no_permit_and_make_none() {
    let semaphore = Semaphore::new(3).unwrap();
    let work = async |semaphore: Semaphore, seed: u64| {
        let mut random = Random::new(seed);
        loop {
            let permit = semaphore.acquire().await.unwrap();
            if random.below(4) == 0 {
                drop(semaphore.try_acquire());
            }
            drop(permit);
        }
    };
    let mut random = Random::new(7);
    for round in 0..15 {
        let children: Vec<Process<()>> =
            (0..4).map(|n| Process::spawn(work, (semaphore.clone(), round * 10 + n)).unwrap()).collect();
        tokio::time::sleep(Duration::from_micros(2000 + random.below(20_000))).await;
        for child in children {
            killed(child).await;
        }
        eventually("all permits are back", || semaphore.available() == 3).await;
        let all: Vec<_> = (0..3).map(|_| semaphore.try_acquire().unwrap()).collect();
        assert_eq!(kind(semaphore.try_acquire()), ErrorKind::WouldBlock);
        drop(all);
    }
}

/// One that sleeps is not overtaken for ever by one that runs.
#[tokio::test]
async fn no_waiter_starves() {
    let (semaphore, stop) = (Semaphore::new(1).unwrap(), Event::new().unwrap());
    let greedy = async |semaphore: Semaphore, stop: Event| {
        let mut turns = 0_u64;
        while !stop.is_set() {
            let permit = semaphore.acquire().await.unwrap();
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(50) {}
            drop(permit);
            turns += 1;
        }
        turns
    };
    let child = Process::spawn(greedy, (semaphore.clone(), stop.clone())).unwrap();
    eventually("it runs", || semaphore.available() == 0).await;
    let acquires = async || {
        let mut waits = Vec::new();
        for _ in 0..50 {
            let start = Instant::now();
            drop(within(semaphore.acquire()).await.unwrap());
            waits.push(start.elapsed());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        waits
    };
    common::assert_nobody_starves(acquires).await;
    stop.set();
    println!("{} turns of the other", within(child).await.unwrap());
}

/// `dump` lists the holders with their permits, and the waiters.
#[tokio::test]
async fn dump_lists_holders_of_permits() {
    let semaphore = Semaphore::new(3).unwrap();
    let start = |name: &str, count, ready: &Event| {
        Process::builder().name(name).spawn(hold, (semaphore.clone(), count, ready.clone())).unwrap()
    };
    let (one, two) = (Event::new().unwrap(), Event::new().unwrap());
    let (olga, otto) = (start("olga", 2, &one), start("otto", 1, &two));
    within(one.wait()).await.unwrap();
    within(two.wait()).await.unwrap();
    let paul = start("paul", 1, &Event::new().unwrap());
    let found = || {
        let is_it = |who: &debug::Participant| who.name() == "olga";
        let objects = debug::dump().objects().to_vec();
        objects.into_iter().find(|object| object.shares().iter().any(|(who, _)| is_it(who)))
    };
    eventually("it waits", || found().is_some_and(|object| !object.waiting().is_empty())).await;
    let object = found().unwrap();
    assert_eq!((object.kind(), object.holder(), object.held_for()), ("semaphore", None, None));
    let mut shares: Vec<_> = object.shares().iter().map(|(who, held)| (who.pid().unwrap(), *held)).collect();
    shares.sort();
    let mut expected = vec![(olga.pid(), 2), (otto.pid(), 1)];
    expected.sort();
    assert_eq!(shares, expected);
    assert_eq!(object.waiting().iter().map(|who| who.pid().unwrap()).collect::<Vec<_>>(), [paul.pid()]);
    let line = object.to_string();
    assert!(line.contains("2 by olga (pid ") && line.contains("waiting: paul (pid "), "{line}");
    killed(olga).await;
    eventually("it holds nothing any more", || found().is_none()).await;
}

/// Stopped is not dead: what it holds is held, others' timeouts fire, and a newcomer gets a permit that is free.
#[tokio::test]
async fn stopped_holder_or_waiter_delays_others_up_to_their_timeouts() {
    let (semaphore, ready) = (Semaphore::new(1).unwrap(), Event::new().unwrap());
    let holder = Process::spawn(hold, (semaphore.clone(), 1, ready.clone())).unwrap();
    within(ready.wait()).await.unwrap();
    let once = async |semaphore: Semaphore| drop(semaphore.acquire().await.unwrap());
    let waiter = Process::spawn(once, (semaphore.clone(),)).unwrap();
    falls_asleep_in_line(waiter.pid()).await;
    for pid in [holder.pid(), waiter.pid()] {
        stop(pid);
    }
    let timeout = Duration::from_millis(50);
    assert_eq!(kind(within(semaphore.acquire_timeout(timeout)).await), ErrorKind::Timeout);
    assert_eq!(semaphore.available(), 0);
    killed(holder).await;
    drop(within(semaphore.acquire()).await.unwrap());
    go_on(waiter.pid());
    within(waiter).await.unwrap();
    assert_eq!(semaphore.available(), 1);
}
