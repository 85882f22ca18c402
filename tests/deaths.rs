//! Processes killed or stopped at random moments: the survivors lose nothing and wait for no dead process.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::{
    Random, eventually, holdings, in_child, is_asleep, no_growth, payload, read_payload, rounds, settled, within,
};
use multiprocess::{self as mp, ErrorKind, Fd, Process, Queue};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

mp::test_support!();

const KILLS: u32 = 300;

/// A message of any size, now and then with descriptors.
#[derive(Serialize, Deserialize)]
struct Message {
    // Not a `Vec`, which serde walks byte by byte.
    payload: bytes::Bytes,
    files: Vec<Fd<std::fs::File>>,
}

impl Message {
    fn new(producer: u32, number: u64, random: &mut Random) -> Self {
        let count = if random.below(4) == 0 { 1 + random.below(3) } else { 0 };
        let files = (0..count).map(|_| Fd::new(std::fs::File::open("/dev/null").unwrap())).collect();
        Self { payload: payload(producer, number, random.size(100_000)).into(), files }
    }

    fn read(&self) -> (u32, u64) {
        read_payload(&self.payload)
    }
}

fn zombies() -> usize {
    let is_zombie =
        |stat: String| stat.contains("(deaths-") && stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z"));
    let stats = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path().join("stat"));
    stats.filter(|path| std::fs::read_to_string(path).is_ok_and(is_zombie)).count()
}

/// Whether this process has memory mapped that has a name: nothing has, so a death leaves nothing behind.
/// The program itself may well be somewhere in /tmp.
fn maps_named_memory() -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let program = std::env::current_exe().unwrap();
    let named = |line: &str| line.contains("/dev/shm") || line.contains("/tmp/");
    maps.lines().any(|line| named(line) && !line.contains(program.to_str().unwrap()))
}

async fn kill<R: serde::de::DeserializeOwned + 'static>(mut process: Process<R>) {
    process.kill().unwrap();
    // How it ended is not what these tests are about.
    let _ = within(process.wait()).await;
}

async fn random_nap(random: &mut Random) {
    let nap = Duration::from_micros(random.below(3000));
    let start = Instant::now();
    while start.elapsed() < nap {
        tokio::task::yield_now().await;
    }
}

/// Puts until `stop` is closed; returns how many.
fn produce(queue: Queue<Message>, stop: Queue<()>, me: u32) -> u64 {
    let mut random = Random::new(me.into());
    for number in 0.. {
        // An unbounded queue is not filled faster than it is emptied.
        while queue.len() > 50 && !stop.is_closed() {
            std::thread::sleep(Duration::from_micros(200));
        }
        if stop.is_closed() || queue.blocking_put(Message::new(me, number, &mut random)).is_err() {
            return number;
        }
    }
    0
}

#[tokio::test]
async fn queue_30_producers_killed_at_any_moment_harm_nobody() {
    let whole = async |bounded: bool| {
        let queue = if bounded { Queue::bounded(16).unwrap() } else { Queue::unbounded().unwrap() };
        let stop = Queue::unbounded().unwrap();
        let spawn = |me: u32| Process::spawn(produce, (queue.clone(), stop.clone(), me)).unwrap();
        let mut next: HashMap<u32, u64> = HashMap::new();
        let mut seen = |message: Message| {
            let (producer, number) = message.read();
            let next = next.entry(producer).or_default();
            assert_eq!(number, *next, "the next of producer {producer}");
            *next += 1;
        };
        let mut random = Random::new(5);
        let mut before = None;
        let survivors = [spawn(0), spawn(1)];
        for victim in 0..KILLS / 2 {
            let process = spawn(100 + victim);
            {
                let consume = async {
                    loop {
                        seen(within(queue.get()).await.unwrap())
                    }
                };
                tokio::select! { _ = consume => {} () = random_nap(&mut random) => {} }
            }
            process.kill().unwrap();
            // Survivors go on, and so does the consumer, whatever the victim held.
            for _ in 0..5 {
                seen(within(queue.get()).await.unwrap());
            }
            kill(process).await;
            if victim == 10 {
                before = Some(holdings());
            }
        }
        stop.close();
        let mut counts = Vec::new();
        for survivor in survivors {
            let mut done = Box::pin(within(survivor));
            counts.push(loop {
                tokio::select! {
                    count = &mut done => break count.unwrap(),
                    message = queue.get() => seen(message.unwrap()),
                }
            });
        }
        while let Ok(message) = queue.try_get() {
            seen(message);
        }
        assert_eq!((next[&0], next[&1]), (counts[0], counts[1]));
        // The queue is as good as new.
        assert_eq!((queue.len(), queue.try_get().err().unwrap().kind()), (0, ErrorKind::Empty));
        queue.put(Message::new(7, 0, &mut random)).await.unwrap();
        assert_eq!(queue.get().await.unwrap().read(), (7, 0));
        let before = before.unwrap();
        (before, settled(before, holdings).await)
    };
    for bounded in [true, false] {
        let (before, after) = in_child(whole, (bounded,)).await;
        // The survivors were there before.
        assert!(after.descriptors <= before.descriptors);
        assert!(after.mappings <= before.mappings + 10, "{before:?} {after:?}");
    }
    eventually("no zombie is left", || zombies() == 0).await;
    assert!(!maps_named_memory());
}

/// Takes until the end, and says what it took.
fn consume(queue: Queue<Message>, took: Queue<(u32, u64)>, me: u32) {
    loop {
        match queue.blocking_get() {
            Ok(message) => took.blocking_put((me, message.read().1)).unwrap(),
            Err(error) if error.kind() == ErrorKind::Closed => return,
            // Its descriptors went with the process that was taking it.
            Err(error) => assert_eq!(error.kind(), ErrorKind::Decode, "{error}"),
        }
    }
}

#[tokio::test]
async fn queue_30_consumers_killed_at_any_moment_lose_only_items_they_took() {
    let whole = async |bounded: bool| {
        let queue = if bounded { Queue::bounded(16).unwrap() } else { Queue::unbounded().unwrap() };
        let took = Queue::unbounded().unwrap();
        let spawn = |me: u32| Process::spawn(consume, (queue.clone(), took.clone(), me)).unwrap();
        let mut random = Random::new(6);
        let mut sizes = Random::new(7);
        let mut numbers = HashSet::new();
        let mut last: HashMap<u32, u64> = HashMap::new();
        let mut seen = |(consumer, number): (u32, u64)| {
            assert!(numbers.insert(number), "{number} was taken twice");
            let last = last.insert(consumer, number);
            assert!(last.is_none_or(|last| last < number), "in order at each consumer");
        };
        let mut number = 0;
        let mut before = None;
        let survivors = [spawn(0), spawn(1)];
        for victim in 0..KILLS / 2 {
            let process = spawn(100 + victim);
            {
                let put = async {
                    loop {
                        within(queue.put(Message::new(0, number, &mut sizes))).await.unwrap();
                        number += 1;
                        while let Ok(taken) = took.try_get() {
                            seen(taken);
                        }
                        // An unbounded queue is not filled faster than it is emptied.
                        while queue.len() > 50 {
                            tokio::time::sleep(Duration::from_millis(1)).await;
                        }
                    }
                };
                tokio::select! { () = put => {} () = random_nap(&mut random) => {} }
            }
            process.kill().unwrap();
            for _ in 0..5 {
                within(queue.put(Message::new(0, number, &mut sizes))).await.unwrap();
                number += 1;
            }
            kill(process).await;
            if victim == 10 {
                before = Some(holdings());
            }
        }
        queue.close();
        for survivor in survivors {
            within(survivor).await.unwrap();
        }
        while let Ok(taken) = took.try_get() {
            seen(taken);
        }
        assert!(queue.is_empty());
        let missing = number as usize - numbers.len();
        assert!(missing <= KILLS as usize / 2, "{missing} are missing");
        let before = before.unwrap();
        (before, settled(before, holdings).await)
    };
    for bounded in [true, false] {
        let (before, after) = in_child(whole, (bounded,)).await;
        assert!(after.descriptors <= before.descriptors);
        assert!(after.mappings <= before.mappings + 10, "{before:?} {after:?}");
    }
    eventually("no zombie is left", || zombies() == 0).await;
}

#[tokio::test]
async fn pipes_whose_other_end_is_killed_end_at_once() {
    let whole = async || {
        let mut random = Random::new(8);
        let (mut before, mut delays) = (None, Vec::new());
        for round in 0..KILLS {
            if round == 20 {
                before = Some(holdings());
            }
            let (mut here, there) = mp::pipe::<Message, Message>().unwrap();
            let sends = round % 2 == 0;
            let peer = |mut pipe: mp::Connection<Message, Message>, sends: bool| {
                let mut random = Random::new(9);
                for number in 0.. {
                    if sends {
                        pipe.blocking_send(Message::new(0, number, &mut random)).unwrap();
                    } else {
                        assert_eq!(pipe.blocking_recv().unwrap().read(), (0, number));
                    }
                }
            };
            let mut process = Process::spawn(peer, (there, sends)).unwrap();
            let kill_it = async {
                random_nap(&mut random).await;
                process.kill().unwrap();
                Instant::now()
            };
            let use_it = async {
                let mut random = Random::new(9);
                for number in 0.. {
                    let failed = if sends {
                        match here.recv().await {
                            Ok(message) => {
                                assert_eq!(message.read(), (0, number));
                                continue;
                            }
                            Err(error) => error.kind(),
                        }
                    } else {
                        match here.send(Message::new(0, number, &mut random)).await {
                            Ok(()) => continue,
                            Err(error) => error.kind(),
                        }
                    };
                    assert_eq!(failed, ErrorKind::Closed);
                    break;
                }
                Instant::now()
            };
            let (killed, closed) = within(async { futures::join!(kill_it, use_it) }).await;
            delays.push(closed.saturating_duration_since(killed));
            let _ = within(process.wait()).await;
        }
        delays.sort();
        no_growth(before.unwrap(), holdings).await;
        // One that is slower than that was not given a CPU.
        Ok(delays[delays.len() * 9 / 10])
    };
    rounds(async || in_child(whole, ()).await, |delay| *delay < Duration::from_millis(100)).await.unwrap();
    eventually("no zombie is left", || zombies() == 0).await;
}

/// Takes one item, says so, and again.
fn wait_and_take(queue: Queue<u32>, took: Queue<(u32, u32)>, me: u32) {
    while let Ok(item) = queue.blocking_get() {
        took.blocking_put((me, item)).unwrap();
    }
}

#[tokio::test]
async fn a_waiter_killed_in_line_does_not_keep_the_item_from_the_next() {
    let queue = Queue::unbounded().unwrap();
    let took = Queue::unbounded().unwrap();
    let spawn = |me: u32| Process::spawn(wait_and_take, (queue.clone(), took.clone(), me)).unwrap();
    let mut waiters: Vec<_> = (0..4).map(|me| (me, spawn(me))).collect();
    let mut random = Random::new(1);
    for round in 0..KILLS / 3 {
        for (_, waiter) in &waiters {
            eventually("it waits", || is_asleep(waiter.pid())).await;
        }
        // One that has not said what it took does not sleep.
        while took.try_get().is_ok() {}
        let (_, victim) = waiters.swap_remove(random.below(4) as usize);
        // Before its death is known, and while it is being told.
        let put_first = round % 2 == 0;
        if put_first {
            queue.put(2 * round).await.unwrap();
            victim.kill().unwrap();
        } else {
            victim.kill().unwrap();
        }
        queue.put(2 * round + 1).await.unwrap();
        loop {
            let (_, item) = within(took.get()).await.unwrap();
            if item == 2 * round + 1 {
                break;
            }
            assert_eq!(item, 2 * round, "nothing is left over of earlier rounds");
        }
        kill(victim).await;
        if put_first && !queue.is_empty() {
            eventually("the item of the victim is taken", || queue.is_empty()).await;
        }
        waiters.push((100 + round, spawn(100 + round)));
    }
    queue.close();
    for (_, waiter) in waiters {
        within(waiter).await.unwrap();
    }
}

#[tokio::test]
async fn putters_killed_in_line_do_not_keep_the_room_from_the_next() {
    let queue = Queue::bounded(1).unwrap();
    let put = |queue: Queue<u32>, me: u32| while queue.blocking_put(me).is_ok() {};
    let spawn = |me: u32| Process::spawn(put, (queue.clone(), me)).unwrap();
    let mut putters: Vec<_> = (0..3).map(spawn).collect();
    let mut random = Random::new(2);
    for round in 0..KILLS / 3 {
        eventually("it is full", || queue.is_full()).await;
        let victim = putters.swap_remove(random.below(3) as usize);
        victim.kill().unwrap();
        for _ in 0..5 {
            within(queue.get()).await.unwrap();
        }
        kill(victim).await;
        putters.push(spawn(100 + round));
    }
    queue.close();
    for putter in putters {
        within(putter).await.unwrap();
    }
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

#[tokio::test]
async fn stopped_processes_delay_no_process_that_does_not_need_them() {
    let stop = Queue::unbounded().unwrap();
    for round in 0..20 {
        let (full, other) = (Queue::bounded(16).unwrap(), Queue::unbounded().unwrap());
        let producer = Process::spawn(produce, (full.clone(), stop.clone(), round)).unwrap();
        eventually("it has put something", || full.len() > 3).await;
        signal(producer.pid(), rustix::process::Signal::STOP);
        let mut number = 0;
        let mut seen = |message: Message| match message.read() {
            (1000, 0) => {}
            read => {
                assert_eq!(read, (round, number));
                number += 1;
            }
        };
        // What is there can be taken, and other queues do not notice.
        for _ in 0..full.len() {
            seen(within(full.get()).await.unwrap());
        }
        within(other.put(1)).await.unwrap();
        assert_eq!(within(other.get()).await.unwrap(), 1);
        // A try comes back, even if the stopped one is in the middle of a put.
        let start = Instant::now();
        let _ = full.try_put(Message::new(1000, 0, &mut Random::new(0)));
        assert!(start.elapsed() < Duration::from_secs(5));
        signal(producer.pid(), rustix::process::Signal::CONT);
        for _ in 0..20 {
            seen(within(full.get()).await.unwrap());
        }
        full.close();
        within(producer).await.unwrap();
    }
}

#[tokio::test]
async fn a_killed_process_takes_its_unread_pipe_ends_with_it() {
    // The end that is in a queue's message of a dead sender still works: it is under way, not lost.
    let carrier = Queue::unbounded().unwrap();
    let (sender, mut receiver) = mp::simplex::<u32>().unwrap();
    carrier.put(sender).await.unwrap();
    let take = async |carrier: Queue<mp::Sender<u32>>| {
        let mut sender = carrier.get().await.unwrap();
        sender.send(1).await.unwrap();
        std::future::pending::<()>().await;
    };
    let holder = Process::spawn(take, (carrier,)).unwrap();
    assert_eq!(within(receiver.recv()).await.unwrap(), 1);
    assert!(!receiver.poll(Duration::from_millis(20)).await.unwrap());
    holder.kill().unwrap();
    assert_eq!(within(receiver.recv()).await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn a_split_half_that_dies_elsewhere_ends_its_direction() {
    let (here, mut there) = mp::pipe::<u32, u32>().unwrap();
    let (sender, mut receiver) = here.split();
    let hold = async |mut sender: mp::Sender<u32>| {
        sender.send(1).await.unwrap();
        std::future::pending::<()>().await;
    };
    let holder = Process::spawn(hold, (sender,)).unwrap();
    assert_eq!(within(there.recv()).await.unwrap(), 1);
    holder.kill().unwrap();
    assert_eq!(within(there.recv()).await.unwrap_err().kind(), ErrorKind::Closed);
    // The other direction is as it was.
    there.send(2).await.unwrap();
    assert_eq!(within(receiver.recv()).await.unwrap(), 2);
}
