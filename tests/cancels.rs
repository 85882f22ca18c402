//! Futures dropped at random moments, in two processes at once: nothing is lost, doubled, torn or out of order.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::{Random, holdings, in_child, no_growth, payload, read_payload, within};
use futures::FutureExt;
use multiprocess::{self as mp, ErrorKind, Fd, Lock, Process, Queue, Value};
use std::io::{Read, Write};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

mp::test_support!();

const CANCELS: u32 = 10_000;

/// Mostly small, now and then large.
fn size(random: &mut Random) -> usize {
    if random.below(200) == 0 { random.below(8 << 20) as usize } else { random.size(4096) }
}

/// Polls `future` for a random while, in one of three ways, and then drops it: `None`.
async fn cancelled<T>(random: &mut Random, future: impl Future<Output = T>) -> Option<T> {
    let while_ = Duration::from_micros(random.below(300));
    match random.below(3) {
        0 => tokio::time::timeout(while_, future).await.ok(),
        1 => {
            let other = async {
                for _ in 0..random.below(10) {
                    tokio::task::yield_now().await;
                }
            };
            tokio::select! { biased; value = future => Some(value), () = other => None }
        }
        _ => {
            let mut future = pin!(future);
            for _ in 0..random.below(4) {
                if let Some(value) = future.as_mut().now_or_never() {
                    return Some(value);
                }
                tokio::task::yield_now().await;
            }
            None
        }
    }
}

/// Either a queue or a pipe.
trait Way {
    async fn put(&mut self, value: Vec<u8>) -> Result<(), (ErrorKind, Vec<u8>)>;
    async fn put_timeout(&mut self, value: Vec<u8>, timeout: Duration) -> Result<(), (ErrorKind, Vec<u8>)>;
    async fn get(&mut self) -> mp::Result<Vec<u8>>;
    async fn get_timeout(&mut self, timeout: Duration) -> mp::Result<Vec<u8>>;
}

impl Way for Queue<Vec<u8>> {
    async fn put(&mut self, value: Vec<u8>) -> Result<(), (ErrorKind, Vec<u8>)> {
        Queue::put(self, value).await.map_err(|error| (error.kind(), error.into_inner()))
    }
    async fn put_timeout(&mut self, value: Vec<u8>, timeout: Duration) -> Result<(), (ErrorKind, Vec<u8>)> {
        Queue::put_timeout(self, value, timeout).await.map_err(|error| (error.kind(), error.into_inner()))
    }
    async fn get(&mut self) -> mp::Result<Vec<u8>> {
        Queue::get(self).await
    }
    async fn get_timeout(&mut self, timeout: Duration) -> mp::Result<Vec<u8>> {
        Queue::get_timeout(self, timeout).await
    }
}

impl Way for mp::Connection<Vec<u8>, Vec<u8>> {
    async fn put(&mut self, value: Vec<u8>) -> Result<(), (ErrorKind, Vec<u8>)> {
        self.send(value).await.map_err(|error| (error.kind(), error.into_inner()))
    }
    async fn put_timeout(&mut self, value: Vec<u8>, timeout: Duration) -> Result<(), (ErrorKind, Vec<u8>)> {
        // A pipe has no such form: a timeout around a clone is how one writes it.
        let sent = tokio::time::timeout(timeout, self.send(value.clone())).await;
        sent.map_err(|_| (ErrorKind::Timeout, value))?.map_err(|error| (error.kind(), error.into_inner()))
    }
    async fn get(&mut self) -> mp::Result<Vec<u8>> {
        self.recv().await
    }
    async fn get_timeout(&mut self, timeout: Duration) -> mp::Result<Vec<u8>> {
        self.recv_timeout(timeout).await
    }
}

/// Puts numbers 0, 1, 2.. until so many puts were cancelled. A cancelled put has put nothing, so it is tried again.
async fn put_with_cancels<W: Way>(mut way: W, seed: u64, cancels: u32) -> u64 {
    let mut random = Random::new(seed);
    let (mut cancelled_puts, mut number) = (0, 0);
    // While the other side is not given a CPU, puts are only cancelled.
    while cancelled_puts < cancels || number <= 60 {
        let bytes = payload(0, number, size(&mut random));
        let put = match random.below(3) {
            0 => {
                let timeout = Duration::from_micros(random.below(300));
                match way.put_timeout(bytes.clone(), timeout).await {
                    Ok(()) => true,
                    Err((kind, value)) => {
                        assert_eq!((kind, value == bytes), (ErrorKind::Timeout, true));
                        false
                    }
                }
            }
            _ => match cancelled(&mut random, way.put(bytes)).await {
                Some(result) => result.is_ok(),
                None => false,
            },
        };
        if put {
            number += 1;
        } else {
            cancelled_puts += 1;
        }
    }
    // The last word.
    way.put(Vec::new()).await.unwrap();
    number
}

/// Gets until the last word, giving up at random; returns how many it got, and how often it gave up.
async fn get_with_cancels<W: Way>(mut way: W, seed: u64) -> (u64, u32) {
    let mut random = Random::new(seed);
    let (mut cancelled_gets, mut number) = (0, 0);
    loop {
        let got = match random.below(3) {
            0 => match way.get_timeout(Duration::from_micros(random.below(300))).await {
                Err(error) if error.kind() == ErrorKind::Timeout => None,
                got => Some(got.unwrap()),
            },
            _ => cancelled(&mut random, way.get()).await.map(|got| got.unwrap()),
        };
        match got {
            None => cancelled_gets += 1,
            Some(bytes) if bytes.is_empty() => return (number, cancelled_gets),
            Some(bytes) => {
                assert_eq!(read_payload(&bytes), (0, number));
                number += 1;
            }
        }
        // Now slower, now faster than the other side.
        if random.below(2000) == 0 {
            tokio::time::sleep(Duration::from_millis(random.below(40))).await;
        }
    }
}

async fn both_ways(queue: bool, child_puts: bool) {
    let whole = async |queue: bool, child_puts: bool| {
        let (mut warm_up, mut all_given_up) = (None, 0);
        for round in 0..2u64 {
            let cancels = if round == 0 { 200 } else { CANCELS };
            let (put, got, gave_up) = if queue {
                let queue = Queue::bounded(3).unwrap();
                if child_puts {
                    let child = Process::spawn(put_with_cancels::<Queue<Vec<u8>>>, (queue.clone(), 1 + round, cancels))
                        .unwrap();
                    let (got, gave_up) = get_with_cancels(queue, 11 + round).await;
                    (child.await.unwrap(), got, gave_up)
                } else {
                    let child =
                        Process::spawn(get_with_cancels::<Queue<Vec<u8>>>, (queue.clone(), 21 + round)).unwrap();
                    let put = put_with_cancels(queue, 31 + round, cancels).await;
                    let (got, gave_up) = child.await.unwrap();
                    (put, got, gave_up)
                }
            } else {
                let (here, there) = mp::pipe::<Vec<u8>, Vec<u8>>().unwrap();
                if child_puts {
                    type End = mp::Connection<Vec<u8>, Vec<u8>>;
                    let child = Process::spawn(put_with_cancels::<End>, (there, 41 + round, cancels)).unwrap();
                    let (got, gave_up) = get_with_cancels(here, 51 + round).await;
                    (child.await.unwrap(), got, gave_up)
                } else {
                    type End = mp::Connection<Vec<u8>, Vec<u8>>;
                    let child = Process::spawn(get_with_cancels::<End>, (there, 61 + round)).unwrap();
                    let put = put_with_cancels(here, 71 + round, cancels).await;
                    let (got, gave_up) = child.await.unwrap();
                    (put, got, gave_up)
                }
            };
            assert_eq!(put, got);
            assert!(put > 50, "{put} arrived");
            all_given_up += gave_up;
            warm_up.get_or_insert_with(holdings);
        }
        assert!(all_given_up > 10, "{all_given_up} gets were given up");
        no_growth(warm_up.unwrap(), holdings).await;
    };
    in_child(whole, (queue, child_puts)).await;
}

#[tokio::test]
async fn puts_into_a_queue_in_a_child() {
    both_ways(true, true).await;
}

#[tokio::test]
async fn puts_into_a_queue_here() {
    both_ways(true, false).await;
}

#[tokio::test]
async fn sends_into_a_pipe_in_a_child() {
    both_ways(false, true).await;
}

#[tokio::test]
async fn sends_into_a_pipe_here() {
    both_ways(false, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gets_of_many_tasks_in_two_processes_lose_nothing() {
    const ITEMS: u64 = 5000;
    let (queue, took) = (Queue::<u64>::unbounded().unwrap(), Queue::<u64>::unbounded().unwrap());
    let take = async |queue: Queue<u64>, took: Queue<u64>, seed: u64| {
        let take = |seed| {
            let (queue, took) = (queue.clone(), took.clone());
            async move {
                let mut random = Random::new(seed);
                loop {
                    match cancelled(&mut random, queue.get()).await {
                        None => {}
                        Some(Ok(item)) => took.put(item).await.unwrap(),
                        Some(Err(error)) => return assert_eq!(error.kind(), ErrorKind::Closed),
                    }
                }
            }
        };
        futures::future::join_all((0..4).map(|n| take(seed + n))).await;
    };
    let child = Process::spawn(take, (queue.clone(), took.clone(), 100)).unwrap();
    let here = tokio::spawn({
        let (queue, took) = (queue.clone(), took.clone());
        async move { take(queue, took, 200).await }
    });
    let mut random = Random::new(300);
    for item in 0..ITEMS {
        queue.put(item).await.unwrap();
        if random.below(10) == 0 {
            tokio::time::sleep(Duration::from_micros(random.below(200))).await;
        }
    }
    let mut seen = vec![false; ITEMS as usize];
    for _ in 0..ITEMS {
        let item = within(took.get()).await.unwrap() as usize;
        assert!(!std::mem::replace(&mut seen[item], true), "{item} was taken twice");
    }
    queue.close();
    within(child).await.unwrap();
    within(here).await.unwrap();
    assert!(took.is_empty());
}

#[tokio::test]
async fn a_notice_of_a_dropped_future_wakes_the_next_in_another_process() {
    let (queue, took) = (Queue::<u32>::unbounded().unwrap(), Queue::<u32>::unbounded().unwrap());
    let forward = async |queue: Queue<u32>, took: Queue<u32>| {
        while let Ok(item) = queue.get().await {
            took.put(item).await.unwrap();
        }
    };
    let child = Process::spawn(forward, (queue.clone(), took.clone())).unwrap();
    for n in 0..500 {
        {
            // Asleep, maybe first in line, and gone at the moment the item comes.
            let mut get = pin!(queue.get());
            if get.as_mut().now_or_never().is_some() {
                panic!("the queue is empty");
            }
            tokio::task::yield_now().await;
            assert!(futures::poll!(&mut get).is_pending());
            queue.put(n).await.unwrap();
        }
        assert_eq!(within(took.get()).await.unwrap(), n);
    }
    queue.close();
    within(child).await.unwrap();
}

/// A million in a release build; an unoptimised one needs half a minute for that.
const DROPS: u64 = if cfg!(debug_assertions) { 100_000 } else { 1_000_000 };

/// Polls `future` a few times and drops it: `None`, and one more is counted.
async fn dropped_soon<T>(random: &mut Random, drops: &Value<u64>, future: impl Future<Output = T>) -> Option<T> {
    {
        let mut future = pin!(future);
        for _ in 0..=random.below(3) {
            if let Poll::Ready(value) = futures::poll!(&mut future) {
                return Some(value);
            }
            if random.below(2) == 0 {
                tokio::task::yield_now().await;
            }
        }
    }
    drops.fetch_add(1);
    None
}

#[tokio::test]
async fn p10_dropped_gets_and_puts_lose_and_double_nothing_in_a_million() {
    let put = async |queue: Queue<u64>, drops: Value<u64>| {
        let (mut random, mut number) = (Random::new(1), 0);
        // On one CPU most of them are dropped.
        while drops.get() < DROPS || number <= DROPS / 1000 {
            number += u64::from(dropped_soon(&mut random, &drops, queue.put(number)).await.is_some());
        }
        queue.put(u64::MAX).await.unwrap();
        number
    };
    let (queue, drops) = (Queue::bounded(1).unwrap(), Value::new(0).unwrap());
    let child = Process::spawn(put, (queue.clone(), drops.clone())).unwrap();
    let (mut random, mut number) = (Random::new(2), 0);
    let get = async {
        loop {
            match dropped_soon(&mut random, &drops, queue.get()).await.map(|got| got.unwrap()) {
                None => {}
                Some(u64::MAX) => break,
                Some(got) => {
                    assert_eq!(got, number);
                    number += 1;
                }
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(120), get).await.expect("all drops in time");
    assert_eq!(within(child).await.unwrap(), number);
    assert!(number > DROPS / 1000 && drops.get() >= DROPS, "{number} arrived, {} futures were dropped", drops.get());
}

#[tokio::test]
async fn p10_dropped_acquires_leave_a_lock_that_works_in_a_million() {
    let turns = async |lock: Lock, drops: Value<u64>, inside: Value<u64>, seed: u64| {
        let (mut random, mut turns) = (Random::new(seed), 0u64);
        while drops.get() < DROPS || turns <= DROPS / 1000 {
            if let Some(guard) = dropped_soon(&mut random, &drops, lock.acquire()).await {
                let _guard = guard.unwrap();
                assert_eq!(inside.fetch_add(1), 0, "somebody else has the lock as well");
                if random.below(2) == 0 {
                    tokio::task::yield_now().await;
                }
                inside.fetch_sub(1);
                turns += 1;
            }
        }
        turns
    };
    let (lock, drops, inside) = (Lock::new().unwrap(), Value::new(0).unwrap(), Value::new(0).unwrap());
    let child = Process::spawn(turns, (lock.clone(), drops.clone(), inside.clone(), 1)).unwrap();
    let tasks = futures::future::join(
        turns(lock.clone(), drops.clone(), inside.clone(), 2),
        turns(lock.clone(), drops.clone(), inside.clone(), 3),
    );
    let (a, b) = tokio::time::timeout(Duration::from_secs(120), tasks).await.expect("all drops in time");
    let c = within(child).await.unwrap();
    assert!([a, b, c].iter().all(|turns| *turns > DROPS / 1000), "{a}, {b} and {c} turns");
    drop(within(lock.acquire()).await.unwrap());
}

/// A pipe that holds `number`, as a descriptor that proves whose it is.
fn numbered(number: u64) -> Fd<std::io::PipeReader> {
    let (read, mut write) = std::io::pipe().unwrap();
    write.write_all(&number.to_le_bytes()).unwrap();
    Fd::new(read)
}

type Item = (u64, Vec<Fd<std::io::PipeReader>>);

async fn put_descriptors(queue: Queue<Item>, drops: u32) -> u64 {
    let (mut random, mut number, mut dropped) = (Random::new(5), 0, 0);
    while dropped < drops {
        // None, some, or more than fit into one packet.
        let count = [0, 1, 3, 300][random.below(4) as usize];
        let item = (number, (0..count).map(|n| numbered(number + n)).collect());
        match cancelled(&mut random, queue.put(item)).await {
            Some(put) => {
                put.unwrap();
                number += 1;
            }
            None => dropped += 1,
        }
    }
    queue.close();
    number
}

#[tokio::test]
async fn dropped_puts_and_gets_of_descriptors_lose_mix_up_and_leak_none() {
    let whole = async |_: ()| {
        let mut before = None;
        for drops in [20, 300] {
            let queue = Queue::<Item>::bounded(2).unwrap();
            let child = Process::spawn(put_descriptors, (queue.clone(), drops)).unwrap();
            let (mut random, mut number) = (Random::new(6), 0);
            loop {
                let Some(got) = cancelled(&mut random, queue.get()).await else { continue };
                let Ok((got, descriptors)) = got else { break };
                assert_eq!(got, number);
                for (n, mut descriptor) in descriptors.into_iter().enumerate() {
                    let mut bytes = [0; 8];
                    descriptor.read_exact(&mut bytes).unwrap();
                    assert_eq!(u64::from_le_bytes(bytes), number + n as u64);
                }
                number += 1;
            }
            assert_eq!(within(child).await.unwrap(), number);
            drop(queue);
            before.get_or_insert_with(holdings);
        }
        no_growth(before.unwrap(), holdings).await;
    };
    in_child(whole, ((),)).await;
}
