//! W19: large values from one process to another, by queue and by pipe, beside a plain copy in the same run.
//!
//! Run with `cargo bench --bench large` (add `-- 256` for messages of up to 256 KiB only). Message sizes double from 64 KiB to
//! 256 MiB; each rate is the median of several rounds, in which all ways take turns. A producer process has the message as
//! `Bytes`; the consumer gets each as `Bytes` of its own. The queue is bounded to two.
//! - `reused`: memcpy into a buffer that is used again.
//! - `fresh`: memcpy into memory that the program has just asked for, as a receiver's is.
//! - `queue / fresh`, `pipe / fresh`, `queue / reused`, `pipe / reused`: the rate of messages by that of the copy.
//! - `neighbours`: the rate at half the size by that at this size, queue and pipe.
//!
//! Then 16 MiB there and back, per direction, in copies into fresh memory.

use bytes::Bytes;
use multiprocess::{Connection, Process, Queue, Receiver, Sender};
use std::hint::black_box;
use std::time::{Duration, Instant};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const ROUNDS: usize = 5;

fn into_queue(queue: Queue<Bytes>, size: usize, count: usize) {
    let message = Bytes::from(vec![7; size]);
    (0..count).for_each(|_| queue.blocking_put(message.clone()).expect("a put"));
}

fn into_pipe(mut sender: Sender<Bytes>, size: usize, count: usize) {
    let message = Bytes::from(vec![7; size]);
    (0..count).for_each(|_| sender.blocking_send(message.clone()).expect("a send"));
}

fn echo<T: serde::Serialize + serde::de::DeserializeOwned + Send + 'static>(mut end: Connection<T, T>) {
    while let Ok(value) = end.blocking_recv() {
        end.blocking_send(value).expect("a send");
    }
}

fn join(mut process: Process<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(process.join()).expect("no panic");
}

/// Bytes per nanosecond of `count` messages, counted from the first on.
fn rate(size: usize, count: usize, mut next: impl FnMut() -> Bytes) -> f64 {
    assert_eq!(next().len(), size);
    let start = Instant::now();
    for _ in 1..count {
        let message = next();
        assert_eq!((message.len(), message[size - 1]), (size, 7));
    }
    ((count - 1) * size) as f64 / start.elapsed().as_nanos() as f64
}

fn by_queue(size: usize, count: usize) -> f64 {
    let queue = Queue::bounded(2).expect("a queue");
    let producer = Process::spawn(into_queue, (queue.clone(), size, count)).expect("a producer");
    let rate = rate(size, count, || queue.blocking_get().expect("a message"));
    join(producer);
    rate
}

fn by_pipe(size: usize, count: usize) -> f64 {
    let (sender, mut receiver): (_, Receiver<Bytes>) = multiprocess::simplex().expect("a pipe");
    let producer = Process::spawn(into_pipe, (sender, size, count)).expect("a producer");
    let rate = rate(size, count, || receiver.blocking_recv().expect("a message"));
    join(producer);
    rate
}

fn copies(size: usize, count: usize, mut copy: impl FnMut(&[u8])) -> f64 {
    let from = vec![7u8; size];
    copy(&from);
    let start = Instant::now();
    (0..count).for_each(|_| copy(black_box(&from)));
    (count * size) as f64 / start.elapsed().as_nanos() as f64
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn series(most: usize) {
    println!(
        "| KiB | reused GB/s | fresh | queue | pipe | queue / fresh | pipe / fresh | queue / reused | pipe / reused | neighbours |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let (mut size, mut before) = (64 * KIB, None);
    while size <= most {
        let count = (512 * MIB / size).clamp(8, 1000);
        let mut rates = [const { Vec::new() }; 4];
        for _ in 0..ROUNDS {
            let mut to = vec![0u8; size];
            rates[0].push(copies(size, count, |from| black_box(&mut to[..]).copy_from_slice(from)));
            rates[1].push(copies(size, count, |from| drop(black_box(from.to_vec()))));
            rates[2].push(by_queue(size, count));
            rates[3].push(by_pipe(size, count));
        }
        let [reused, fresh, queue, pipe] = rates.map(median);
        let by =
            |(queue_before, pipe_before): (f64, f64)| format!("{:.2}, {:.2}", queue_before / queue, pipe_before / pipe);
        println!(
            "| {} | {reused:.2} | {fresh:.2} | {queue:.2} | {pipe:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {} |",
            size / KIB,
            queue / fresh,
            pipe / fresh,
            queue / reused,
            pipe / reused,
            before.map_or_else(String::new, by),
        );
        before = Some((queue, pipe));
        size *= 2;
    }
}

fn there_and_back<T>(name: &str, value: T, bytes: usize)
where
    T: serde::Serialize + serde::de::DeserializeOwned + Clone + Send + 'static,
{
    let (mut near, far) = multiprocess::pipe::<T, T>().expect("a pipe");
    let other = Process::spawn(echo::<T>, (far,)).expect("a process");
    let mut times = Vec::new();
    let mut value = Some(value);
    for _ in 0..30 {
        let start = Instant::now();
        near.blocking_send(value.take().expect("a value")).map_err(|error| error.to_string()).expect("a send");
        value = Some(near.blocking_recv().expect("a value"));
        let there_and_back = start.elapsed();
        let from = vec![7u8; bytes];
        let start = Instant::now();
        drop(black_box(black_box(&from).to_vec()));
        times.push((there_and_back.as_secs_f64() / 2.0 / start.elapsed().as_secs_f64(), there_and_back));
    }
    drop(near);
    join(other);
    let copies = median(times.iter().map(|(copies, _)| *copies).collect());
    let mut whole: Vec<Duration> = times.iter().map(|(_, time)| *time).collect();
    whole.sort();
    println!("| {name} | {copies:.2} | {:?} |", whole[whole.len() / 2]);
}

fn main() {
    multiprocess::init();
    let most = std::env::args().filter_map(|word| word.parse::<usize>().ok()).next();
    series(most.map_or(256 * MIB, |kib| kib * KIB));
    println!("\n| 16 MiB there and back | copies per direction | both |\n|---|---|---|");
    there_and_back("Bytes", Bytes::from(vec![7u8; 16 * MIB]), 16 * MIB);
    there_and_back("Vec<u8>", vec![7u8; 16 * MIB], 16 * MIB);
    there_and_back("Vec<f64>", vec![0.5f64; 2 * MIB], 16 * MIB);
    there_and_back("(u32, Vec<f64>)", (7u32, vec![0.5f64; 2 * MIB]), 16 * MIB);
}
