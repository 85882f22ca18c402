//! Read-write locks: many readers or one writer, nobody starves, and a dead writer is told of.

mod common;

use common::{Deadline, Random, eventually, falls_asleep_in_line, go_on, in_child, stop, within};
use futures::{FutureExt, poll};
use multiprocess::{
    self as mp, ErrorKind, Event, LockError, Process, RwLock, RwLockReadGuard, RwLockWriteGuard, debug,
};
use std::pin::pin;
use std::time::{Duration, Instant};

mp::test_support!();

const SHORT: Duration = Duration::from_millis(50);

fn kind<G>(got: Result<G, LockError<G>>) -> ErrorKind {
    got.map(drop).expect_err("it could not be had").kind()
}

async fn killed<R: serde::de::DeserializeOwned + 'static>(mut process: Process<R>) {
    process.kill().unwrap();
    within(process.wait()).await.unwrap();
}

fn all_the_same<G>(got: Result<G, LockError<G>>) -> G {
    match got {
        Err(error) if error.kind() == ErrorKind::OwnerDied => error.into_guard(),
        guard => guard.unwrap(),
    }
}

async fn hold_read(lock: RwLock, ready: Event) {
    let _guard = lock.read().await.unwrap();
    ready.set();
    std::future::pending::<()>().await;
}

async fn hold_write(lock: RwLock, ready: Event) {
    let _guard = all_the_same(lock.write().await);
    ready.set();
    std::future::pending::<()>().await;
}

async fn read(lock: RwLock) {
    drop(lock.read().await.unwrap());
}

async fn write(lock: RwLock) {
    drop(lock.write().await.unwrap());
}

/// A child that has got to where it waits.
async fn waiting<R: serde::de::DeserializeOwned + 'static>(process: Process<R>) -> Process<R> {
    falls_asleep_in_line(process.pid()).await;
    process
}

#[tokio::test]
async fn many_readers_or_one_writer() {
    let lock = RwLock::new().unwrap();
    let readers = (lock.read().await.unwrap(), lock.try_read().unwrap());
    assert_eq!(kind(lock.try_write()), ErrorKind::WouldBlock);
    drop(readers.0);
    assert_eq!(kind(lock.try_write()), ErrorKind::WouldBlock);
    drop(readers.1);
    let writer = lock.write().await.unwrap();
    assert_eq!(kind(lock.try_read()), ErrorKind::WouldBlock);
    assert_eq!(kind(lock.try_write()), ErrorKind::WouldBlock);
    drop(writer);
    drop(lock.try_read().unwrap());
}

#[test]
fn every_form_of_acquire_waits_for_its_timeout() {
    let _deadline = Deadline::start();
    let lock = RwLock::new().unwrap();
    drop((lock.blocking_read().unwrap(), lock.blocking_read_timeout(SHORT).unwrap()));
    drop(lock.blocking_write().unwrap());
    let guard = lock.blocking_write_timeout(SHORT).unwrap();
    let start = Instant::now();
    assert_eq!(kind(lock.blocking_read_timeout(SHORT)), ErrorKind::Timeout);
    assert_eq!(kind(lock.blocking_write_timeout(SHORT)), ErrorKind::Timeout);
    assert!(start.elapsed() >= 2 * SHORT);
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let start = Instant::now();
        assert_eq!(kind(lock.read_timeout(SHORT).await), ErrorKind::Timeout);
        assert_eq!(kind(lock.write_timeout(SHORT).await), ErrorKind::Timeout);
        assert!(start.elapsed() >= 2 * SHORT);
        drop(guard);
        drop(lock.read_timeout(SHORT).await.unwrap());
        drop(lock.write_timeout(SHORT).await.unwrap());
    });
}

#[test]
fn guards_are_send_and_have_no_lifetime() {
    fn is_send<T: Send + Sync + 'static>() {}
    is_send::<RwLockReadGuard>();
    is_send::<RwLockWriteGuard>();
    fn future_is_send<T: Send>(_: T) {}
    let lock = RwLock::new().unwrap();
    future_is_send(lock.read());
    future_is_send(lock.write());
    let guard = lock.try_write().unwrap();
    drop(lock);
    std::thread::spawn(move || drop(guard)).join().unwrap();
}

#[tokio::test]
async fn handle_travels() {
    let lock = RwLock::new().unwrap();
    let same = in_child(
        async |lock: RwLock| {
            drop(lock.write().await.unwrap());
            lock
        },
        (lock.clone(),),
    )
    .await;
    let guard = lock.try_write().unwrap();
    assert!(same.try_read().is_err());
    drop(guard);
}

/// A file in two halves, written in two steps, is never seen between them.
#[tokio::test]
async fn readers_never_see_half_a_write() {
    use std::os::unix::fs::FileExt;
    let lock = RwLock::new().unwrap();
    let file = rustix::fs::memfd_create("halves", rustix::fs::MemfdFlags::CLOEXEC).map(std::fs::File::from).unwrap();
    file.write_all_at(&[0; 16], 0).unwrap();
    let work = async |lock: RwLock, file: mp::Fd<std::fs::File>, seed: u64| {
        let (mut random, mut halves) = (Random::new(seed), [0; 16]);
        for _ in 0..1000 {
            if random.below(4) == 0 {
                let _guard = lock.write().await.unwrap();
                let new = random.next().to_le_bytes();
                file.write_all_at(&new, 0).unwrap();
                file.write_all_at(&new, 8).unwrap();
            } else {
                let _guard = lock.read().await.unwrap();
                file.read_exact_at(&mut halves, 0).unwrap();
                assert_eq!(halves[..8], halves[8..]);
            }
        }
    };
    let child = |seed| {
        let file = mp::Fd::new(file.try_clone().unwrap());
        Process::spawn(work, (lock.clone(), file, seed)).unwrap()
    };
    for child in (0..4).map(child).collect::<Vec<_>>() {
        within(child).await.unwrap();
    }
}

#[tokio::test]
async fn waiting_writer_precedes_new_readers_and_waiting_readers_the_next_writer() {
    let lock = RwLock::new().unwrap();
    let reading = lock.read().await.unwrap();
    let writer = waiting(Process::spawn(write, (lock.clone(),)).unwrap()).await;
    assert_eq!(kind(lock.try_read()), ErrorKind::WouldBlock);
    let mut reader = pin!(lock.read());
    assert!(poll!(&mut reader).is_pending());
    drop(reading);
    within(writer).await.unwrap();
    let reading = within(reader).await.unwrap();
    drop(reading);
    drop(lock.try_write().unwrap());
}

/// Readers that overlap for ever do not keep a writer out, nor writers that follow each other the readers.
#[tokio::test]
async fn neither_readers_nor_writers_starve() {
    let (lock, stop) = (RwLock::new().unwrap(), Event::new().unwrap());
    let spin = |time| {
        let start = Instant::now();
        while start.elapsed() < time {}
    };
    let reader = async |lock: RwLock, stop: Event| {
        let mut turns = 0_u64;
        let mut last = lock.read().await.unwrap();
        while !stop.is_set() {
            // The next before the last is gone: there is always one, unless a writer waits.
            match lock.try_read() {
                Ok(next) => last = next,
                Err(_) => {
                    drop(last);
                    last = lock.read().await.unwrap();
                }
            }
            turns += 1;
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
        drop(last);
        turns
    };
    let writer = async |lock: RwLock, stop: Event| {
        let mut turns = 0_u64;
        while !stop.is_set() {
            let guard = lock.write().await.unwrap();
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(50) {}
            drop(guard);
            turns += 1;
        }
        turns
    };
    let readers: Vec<_> = (0..2).map(|_| Process::spawn(reader, (lock.clone(), stop.clone())).unwrap()).collect();
    let writes = async || {
        let mut waits = Vec::new();
        for _ in 0..50 {
            let start = Instant::now();
            drop(within(lock.write()).await.unwrap());
            waits.push(start.elapsed());
            spin(Duration::from_micros(100));
        }
        waits
    };
    common::assert_nobody_starves(writes).await;
    let writer = Process::spawn(writer, (lock.clone(), stop.clone())).unwrap();
    let reads = async || {
        let mut waits = Vec::new();
        for _ in 0..50 {
            let start = Instant::now();
            drop(within(lock.read()).await.unwrap());
            waits.push(start.elapsed());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        waits
    };
    common::assert_nobody_starves(reads).await;
    stop.set();
    let mut turns = vec![within(writer).await.unwrap()];
    for reader in readers {
        turns.push(within(reader).await.unwrap());
    }
    println!("turns of the writer and the readers {turns:?}");
}

#[tokio::test]
async fn dead_writer_is_reported_to_readers_until_the_next_writer() {
    let (lock, ready) = (RwLock::new().unwrap(), Event::new().unwrap());
    let victim = Process::spawn(hold_write, (lock.clone(), ready.clone())).unwrap();
    within(ready.wait()).await.unwrap();
    let mut reader = pin!(lock.read());
    assert!(poll!(&mut reader).is_pending());
    let start = Instant::now();
    victim.kill().unwrap();
    let error = within(reader).await.expect_err("the owner died");
    println!("told after {:?}", start.elapsed());
    assert_eq!(error.kind(), ErrorKind::OwnerDied);
    let first = error.into_guard();
    assert_eq!(kind(lock.try_write()), ErrorKind::WouldBlock, "the guard inside holds");
    assert_eq!(kind(lock.try_read()), ErrorKind::OwnerDied);
    drop(first);
    let error = within(lock.write()).await.expect_err("no writer has come since");
    assert_eq!(error.kind(), ErrorKind::OwnerDied);
    let guard = error.into_guard();
    assert!(lock.try_read().is_err());
    drop(guard);
    drop(lock.try_read().expect("put right by a writer"));
    drop(lock.try_write().expect("put right by a writer"));
    // By `?` it becomes an error that says what happened.
    ready.clear();
    let victim = Process::spawn(hold_write, (lock.clone(), ready.clone())).unwrap();
    within(ready.wait()).await.unwrap();
    killed(victim).await;
    let error: mp::Error = within(lock.write()).await.unwrap_err().into();
    assert_eq!(error.kind(), ErrorKind::OwnerDied);
}

#[tokio::test]
async fn dead_reader_releases_its_share() {
    let (lock, ready) = (RwLock::new().unwrap(), Event::new().unwrap());
    let victim = Process::spawn(hold_read, (lock.clone(), ready.clone())).unwrap();
    within(ready.wait()).await.unwrap();
    let writer = waiting(Process::spawn(write, (lock.clone(),)).unwrap()).await;
    killed(victim).await;
    within(writer).await.unwrap();
    drop(lock.try_read().unwrap());
}

#[tokio::test]
async fn writer_killed_while_waiting_releases_the_readers_behind_it() {
    let lock = RwLock::new().unwrap();
    let reading = lock.read().await.unwrap();
    let victim = waiting(Process::spawn(write, (lock.clone(),)).unwrap()).await;
    let reader = waiting(Process::spawn(read, (lock.clone(),)).unwrap()).await;
    assert_eq!(kind(lock.try_read()), ErrorKind::WouldBlock);
    killed(victim).await;
    within(reader).await.unwrap();
    drop(reading);
}

#[tokio::test]
async fn dropped_write_releases_the_readers_behind_it() {
    let lock = RwLock::new().unwrap();
    let reading = lock.read().await.unwrap();
    let mut writing = Box::pin(lock.write());
    assert!(tokio::time::timeout(SHORT, &mut writing).await.is_err());
    assert_eq!(kind(lock.try_read()), ErrorKind::WouldBlock);
    let reader = waiting(Process::spawn(read, (lock.clone(),)).unwrap()).await;
    drop(writing);
    within(reader).await.unwrap();
    drop(reading);
    drop(within(lock.write()).await.unwrap());
}

#[tokio::test]
async fn random_cancels_lose_nothing() {
    let lock = RwLock::new().unwrap();
    let work = async |lock: RwLock, seed: u64| {
        let mut random = Random::new(seed);
        for _ in 0..2000 {
            let patience = Duration::from_micros(random.below(200));
            match random.below(6) {
                0 => drop(lock.read_timeout(patience).await),
                1 => drop(lock.write_timeout(patience).await),
                2 => drop(lock.read().now_or_never()),
                3 => drop(lock.write().now_or_never()),
                4 => drop(lock.read().await.unwrap()),
                _ => drop(lock.write().await.unwrap()),
            }
        }
    };
    let children: Vec<_> = (0..3).map(|n| Process::spawn(work, (lock.clone(), n)).unwrap()).collect();
    for child in children {
        within(child).await.unwrap();
    }
    drop(lock.try_write().unwrap());
    drop(lock.try_read().unwrap());
}

#[tokio::test]
async fn random_kills_leave_the_lock_usable() {
    let lock = RwLock::new().unwrap();
    let work = async |lock: RwLock, seed: u64| {
        let mut random = Random::new(seed);
        loop {
            match random.below(3) {
                0 => drop(all_the_same(lock.write().await)),
                _ => drop(all_the_same(lock.read().await)),
            }
        }
    };
    let mut random = Random::new(11);
    for round in 0..15 {
        let children: Vec<Process<()>> =
            (0..4).map(|n| Process::spawn(work, (lock.clone(), round * 10 + n)).unwrap()).collect();
        tokio::time::sleep(Duration::from_micros(2000 + random.below(20_000))).await;
        for child in children {
            killed(child).await;
        }
        // It says at most once that a writer died.
        let first = within(lock.write()).await;
        assert!(first.as_ref().err().is_none_or(|error| error.kind() == ErrorKind::OwnerDied));
        drop(first);
        drop(within(lock.write()).await.unwrap());
        drop(within(lock.read()).await.unwrap());
    }
}

/// `dump` lists the readers, the writer, and the waiters for either.
#[tokio::test]
async fn dump_lists_readers_and_writers() {
    let (lock, ready) = (RwLock::new().unwrap(), Event::new().unwrap());
    let start = |name: &str| Process::builder().name(name);
    let named = |name: &str| {
        let name = name.to_string();
        move |who: &debug::Participant| who.name() == name
    };
    let find = |is_it: &dyn Fn(&debug::Object) -> bool| debug::dump().objects().iter().find(|o| is_it(o)).cloned();
    let quin = start("quin").spawn(hold_read, (lock.clone(), ready.clone())).unwrap();
    within(ready.wait()).await.unwrap();
    let rosa = start("rosa").spawn(write, (lock.clone(),)).unwrap();
    let is_quin = named("quin");
    let read_by_quin = || find(&|object| object.shares().iter().any(|(who, held)| is_quin(who) && *held == 1));
    eventually("it waits", || read_by_quin().is_some_and(|object| !object.waiting().is_empty())).await;
    let object = read_by_quin().unwrap();
    assert_eq!((object.kind(), object.holder()), ("read-write lock", None));
    assert_eq!(object.shares().iter().map(|(who, _)| who.pid()).collect::<Vec<_>>(), [Some(quin.pid())]);
    assert_eq!(object.waiting().iter().map(|who| who.pid()).collect::<Vec<_>>(), [Some(rosa.pid())]);
    killed(quin).await;
    within(rosa).await.unwrap();

    let ready = Event::new().unwrap();
    let sven = start("sven").spawn(hold_write, (lock.clone(), ready.clone())).unwrap();
    within(ready.wait()).await.unwrap();
    let read = async |lock: RwLock| drop(all_the_same(lock.read().await));
    let tina = start("tina").spawn(read, (lock.clone(),)).unwrap();
    let is_sven = named("sven");
    let written_by_sven = || find(&|object| object.holder().is_some_and(&is_sven));
    eventually("it waits", || written_by_sven().is_some_and(|object| !object.waiting().is_empty())).await;
    let object = written_by_sven().unwrap();
    assert_eq!((object.holder().unwrap().pid(), object.shares().len()), (Some(sven.pid()), 0));
    assert_eq!(object.waiting().iter().map(|who| who.pid()).collect::<Vec<_>>(), [Some(tina.pid())]);
    assert!(object.to_string().contains("writing; waiting: tina (pid "), "{object}");
    killed(sven).await;
    within(tina).await.unwrap();
}

/// Stopped is not dead: what it holds is held, and others' timeouts fire.
#[tokio::test]
async fn stopped_holder_or_waiter_delays_others_up_to_their_timeouts() {
    let (lock, ready) = (RwLock::new().unwrap(), Event::new().unwrap());
    let holder = Process::spawn(hold_write, (lock.clone(), ready.clone())).unwrap();
    within(ready.wait()).await.unwrap();
    let writer = waiting(Process::spawn(write_all_the_same, (lock.clone(),)).unwrap()).await;
    for pid in [holder.pid(), writer.pid()] {
        stop(pid);
    }
    let (reading, writing) = within(async { tokio::join!(lock.read_timeout(SHORT), lock.write_timeout(SHORT)) }).await;
    assert_eq!((kind(reading), kind(writing)), (ErrorKind::Timeout, ErrorKind::Timeout));
    killed(holder).await;
    // Who was told of the death is stopped, and so is its wish: new readers stand back for it no longer than they like.
    assert_eq!(kind(within(lock.read_timeout(SHORT)).await), ErrorKind::Timeout);
    drop(all_the_same(within(lock.write()).await));
    go_on(writer.pid());
    within(writer).await.unwrap();
    drop(within(lock.read()).await.unwrap());
}

async fn write_all_the_same(lock: RwLock) {
    drop(all_the_same(lock.write().await));
}

#[tokio::test]
async fn reader_that_is_not_polled_delays_no_other_reader_of_its_process() {
    let lock = RwLock::new().unwrap();
    let writing = lock.try_write().unwrap();
    let mut idle = pin!(lock.read());
    assert!(poll!(&mut idle).is_pending());
    let mut behind = pin!(lock.read());
    assert!(poll!(&mut behind).is_pending());
    drop(writing);
    drop(within(behind).await.unwrap());
    drop(within(idle).await.unwrap());
}
