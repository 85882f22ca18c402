//! W19: large values from one process to another, beside plain copies in the same run.
//!
//! Run with `cargo bench --bench large` (seconds), or name the parts that are wanted: `cargo bench --bench large -- trips ways
//! imap series whole`. In each part all that is compared takes turns; a figure is the median over the rounds. One copy
//! is memcpy of as many bytes: `fresh` into memory that the program has just asked for, as a receiver's is, `reused` into a buffer
//! that is used again. Ratios are of CPU time in all processes that take part, and in brackets by the clock.
//!
//! - `trips`: put and get within one process, by the cost of as many bare bytes.
//! - `ways`: a value from one process to another by each way, in fresh copies, per direction.
//! - `imap`: items of 1 to 16 MiB to the workers of a pool and back, in fresh copies.
//! - `series`: messages that double in size, queue and pipe: rates, and the cost of a copy by that of a message; `neighbours` is
//!   what a byte costs at this size by what it costs at half of it. Up to 64 MiB, with `whole` up to 256 MiB.

use bytes::Bytes;
use futures_util::StreamExt;
use multiprocess::{Connection, Pool, Process, Queue, Receiver, Sender};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::hint::black_box;
use std::time::Instant;
use tokio::runtime::Runtime;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

trait Value: Serialize + DeserializeOwned + Clone + Send + Sync + 'static {}
impl<T: Serialize + DeserializeOwned + Clone + Send + Sync + 'static> Value for T {}

#[derive(Serialize, Deserialize, Clone)]
struct Holds {
    id: i32,
    samples: Vec<f64>,
}

fn bytes(len: usize) -> Vec<u8> {
    vec![7; len]
}

fn numbers(len: usize) -> Vec<f64> {
    vec![0.5; len / 8]
}

fn holds(len: usize) -> Holds {
    Holds { id: 1, samples: numbers(len) }
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// What something takes, in seconds.
#[derive(Clone, Copy)]
struct Cost {
    /// By the clock.
    wall: f64,
    /// Of the CPUs, in all processes that take part: on a busy machine the figure to look at.
    cpu: f64,
}

impl std::ops::Div<f64> for Cost {
    type Output = Self;
    fn div(self, by: f64) -> Self {
        Self { wall: self.wall / by, cpu: self.cpu / by }
    }
}

/// Seconds that the threads of a process have run.
fn cpu_of(pid: u32) -> f64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of = |path: std::path::PathBuf| -> Option<f64> {
        std::fs::read_to_string(path.join("schedstat")).ok()?.split_whitespace().next()?.parse().ok()
    };
    tasks.filter_map(|task| of(task.path())).sum::<f64>() / 1e9
}

/// What `f` costs, here and in the processes `others`.
fn cost<R>(others: &[u32], f: impl FnOnce() -> R) -> Cost {
    let cpu = || cpu_of(std::process::id()) + others.iter().map(|pid| cpu_of(*pid)).sum::<f64>();
    let (before, start) = (cpu(), Instant::now());
    let result = f();
    let (wall, cpu) = (start.elapsed().as_secs_f64(), cpu() - before);
    drop(black_box(result));
    Cost { wall, cpu }
}

fn fresh_copy(from: &[u8]) -> Cost {
    cost(&[], || black_box(from).to_vec())
}

/// Something that is measured, each time that it is done.
type Way<'a> = Box<dyn FnMut() -> Cost + 'a>;

/// All of them in turns: the median of each.
fn in_turns(ways: &mut [Way<'_>], rounds: usize) -> Vec<Cost> {
    let mut all = vec![Vec::new(); ways.len()];
    ways.iter_mut().for_each(|way| _ = way());
    for _ in 0..rounds {
        all.iter_mut().zip(&mut *ways).for_each(|(costs, way)| costs.push(way()));
    }
    let middle = |costs: &[Cost], of: fn(&Cost) -> f64| median(costs.iter().map(of).collect());
    all.iter()
        .map(|costs| Cost { wall: middle(costs, |cost| cost.wall), cpu: middle(costs, |cost| cost.cpu) })
        .collect()
}

/// The costs of one by those of another, as `cpu (clock)`.
fn by(cost: Cost, other: Cost) -> String {
    format!("{:.2} ({:.2})", cost.cpu / other.cpu, cost.wall / other.wall)
}

fn trip<T: Value>(value: T) -> Way<'static> {
    let queue = Queue::unbounded().expect("a queue");
    Box::new(move || {
        let value = value.clone();
        cost(&[], || {
            queue.try_put(value).map_err(|error| error.to_string()).expect("a put");
            queue.try_get().expect("a value")
        })
    })
}

fn trips() {
    println!("\n| put and get, by bare `Vec<u8>` | 1 MiB | 16 MiB |\n|---|---|---|");
    let names = ["`(i32, Vec<u8>)`", "`(i32, Vec<f64>)`", "a struct with a `Vec<f64>`", "`Vec<f64>`", "`Bytes`"];
    let times = [MIB, 16 * MIB].map(|len| {
        let mut ways = [
            trip(bytes(len)),
            trip((1, bytes(len))),
            trip((1, numbers(len))),
            trip(holds(len)),
            trip(numbers(len)),
            trip(Bytes::from(bytes(len))),
        ];
        in_turns(&mut ways, if len == MIB { 61 } else { 15 })
    });
    for (n, name) in names.iter().enumerate() {
        let [small, large] = times.each_ref().map(|times| by(times[n + 1], times[0]));
        println!("| {name} | {small} | {large} |");
    }
}

fn echo<T: Value>(mut end: Connection<T, T>) {
    while let Ok(value) = end.blocking_recv() {
        end.blocking_send(value).map_err(|error| error.to_string()).expect("a send");
    }
}

fn echo_queues<T: Value>(there: Queue<T>, back: Queue<T>) {
    while let Ok(value) = there.blocking_get() {
        back.blocking_put(value).map_err(|error| error.to_string()).expect("a put");
    }
}

fn same<T: Value>(value: T) -> T {
    value
}

/// Closes what it holds when it goes, so that the process at the other end ends.
struct Ends<T: Value> {
    there: Queue<T>,
    other: Process<()>,
}

impl<T: Value> Drop for Ends<T> {
    fn drop(&mut self) {
        self.there.close();
    }
}

fn by_queues<T: Value>(value: T) -> Way<'static> {
    let (there, back) = (Queue::bounded(2).expect("a queue"), Queue::bounded(2).expect("a queue"));
    let other = Process::spawn(echo_queues::<T>, (there.clone(), back.clone())).expect("a process");
    let ends = Ends { there, other };
    let mut value = Some(value);
    let pid = ends.other.pid();
    Box::new(move || {
        cost(&[pid], || {
            ends.there.blocking_put(value.take().expect("a value")).map_err(|error| error.to_string()).expect("a put");
            value = Some(back.blocking_get().expect("a value"));
        }) / 2.0
    })
}

fn by_pipe<T: Value>(value: T) -> Way<'static> {
    let (mut near, far) = multiprocess::pipe::<T, T>().expect("a pipe");
    let other = Process::spawn(echo::<T>, (far,)).expect("a process");
    let mut value = Some(value);
    Box::new(move || {
        cost(&[other.pid()], || {
            near.blocking_send(value.take().expect("a value")).map_err(|error| error.to_string()).expect("a send");
            value = Some(near.blocking_recv().expect("a value"));
        }) / 2.0
    })
}

/// What a process without anything to carry costs is left out, and the CPU time of the child.
fn by_process<T: Value>(runtime: &Runtime, value: T) -> Way<'_> {
    let mut value = Some(value);
    let none = move || {
        cost(&[], || {
            runtime.block_on(async { Process::spawn(same::<u8>, (1,)).expect("a process").join().await.expect("one") })
        })
    };
    Box::new(move || {
        let with = cost(&[], || {
            let given = value.take().expect("a value");
            let given =
                runtime.block_on(async { Process::spawn(same::<T>, (given,)).expect("a process").join().await });
            value = Some(given.expect("a value"));
        });
        let none = none();
        Cost { wall: with.wall - none.wall, cpu: with.cpu - none.cpu } / 2.0
    })
}

fn by_pool<'a, T: Value>(runtime: &'a Runtime, pool: &'a Pool, value: T) -> Way<'a> {
    let worker = runtime.block_on(pool.apply(std::process::id, ())).expect("a worker");
    let mut value = Some(value);
    Box::new(move || {
        cost(&[worker], || {
            let given = value.take().expect("a value");
            value = Some(runtime.block_on(pool.apply(same::<T>, (given,))).expect("a value"));
        }) / 2.0
    })
}

fn ways() {
    let runtime = Runtime::new().expect("a runtime");
    let pool = runtime.block_on(async { Pool::new(1).expect("a pool") });
    println!("\n| fresh copies per direction | queue | pipe | process | pool |\n|---|---|---|---|---|");
    for len in [MIB, 16 * MIB] {
        macro_rules! line {
            ($name:literal, $value:expr) => {
                let from = bytes(len);
                let mut ways: [Way<'_>; 5] = [
                    Box::new(|| fresh_copy(&from)),
                    by_queues($value),
                    by_pipe($value),
                    by_process(&runtime, $value),
                    by_pool(&runtime, &pool, $value),
                ];
                let times = in_turns(&mut ways, if len == MIB { 41 } else { 15 });
                print!("| {} MiB {}, a copy {:.2} ms |", len / MIB, $name, times[0].cpu * 1e3);
                times[1..].iter().for_each(|cost| print!(" {} |", by(*cost, times[0])));
                println!();
            };
        }
        line!("`Bytes`", Bytes::from(bytes(len)));
        line!("`Vec<u8>`", bytes(len));
        line!("`Vec<f64>`", numbers(len));
        line!("a struct with a `Vec<f64>`", holds(len));
        line!("`(i32, Vec<f64>)`", (1i32, numbers(len)));
    }
}

fn len_of(item: Vec<u8>) -> usize {
    black_box(item).len()
}

fn first_of(item: Vec<f64>) -> f64 {
    black_box(item)[0]
}

fn imap() {
    let runtime = Runtime::new().expect("a runtime");
    let pool = runtime.block_on(async { Pool::new(2).expect("a pool") });
    let workers: Vec<u32> = (pool.stats().workers.iter().map(|worker| worker.pid)).collect();
    println!(
        "\n| `imap`, by fresh copies | `Vec<u8>` | `Vec<f64>` | made by a worker | copy, GB/s |\n|---|---|---|---|---|"
    );
    for mib in [1, 2, 4, 16] {
        let (len, count) = (mib * MIB, (128 / mib).max(8));
        let (from, floats) = (bytes(len), numbers(len));
        let results = async |mut results: multiprocess::Results<usize>| while results.next().await.is_some() {};
        let mut ways: [Way<'_>; 4] = [
            Box::new(|| cost(&[], || (0..count).for_each(|_| drop(black_box(black_box(&from).to_vec()))))),
            Box::new(|| {
                let items: Vec<_> = (0..count).map(|_| from.clone()).collect();
                cost(&workers, || runtime.block_on(results(pool.imap(len_of, items))))
            }),
            Box::new(|| {
                let items: Vec<_> = (0..count).map(|_| floats.clone()).collect();
                cost(&workers, || {
                    runtime.block_on(async {
                        let mut results = pool.imap(first_of, items);
                        while results.next().await.is_some() {}
                    })
                })
            }),
            Box::new(|| {
                cost(&workers, || {
                    runtime.block_on(async {
                        let mut results = pool.imap(bytes, vec![len; count]);
                        while results.next().await.is_some() {}
                    })
                })
            }),
        ];
        let times = in_turns(&mut ways, 5);
        print!("| {mib} MiB |");
        times[1..].iter().for_each(|cost| print!(" {} |", by(*cost, times[0])));
        println!(" {:.2} |", (len * count) as f64 / times[0].wall / 1e9);
    }
}

fn into_queue(queue: Queue<Bytes>, size: usize, count: usize) {
    let message = Bytes::from(bytes(size));
    (0..count).for_each(|_| queue.blocking_put(message.clone()).expect("a put"));
}

fn into_pipe(mut sender: Sender<Bytes>, size: usize, count: usize) {
    let message = Bytes::from(bytes(size));
    (0..count).for_each(|_| sender.blocking_send(message.clone()).expect("a send"));
}

/// The cost of each of `count` messages from `producer`, counted from the third on.
fn each(size: usize, count: usize, producer: u32, mut next: impl FnMut() -> Bytes) -> Cost {
    (0..2).for_each(|_| assert_eq!(next().len(), size));
    let all = cost(&[producer], || {
        for _ in 2..count {
            let message = next();
            assert_eq!((message.len(), message[size - 1]), (size, 7));
        }
    });
    all / (count - 2) as f64
}

fn series(most: usize) {
    println!(
        "\n| KiB | reused GB/s | fresh | queue | pipe | queue / fresh | pipe / fresh | queue / reused | pipe / reused | neighbours |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let runtime = Runtime::new().expect("a runtime");
    let end = |mut process: Process<()>| runtime.block_on(process.join()).expect("no panic");
    let (sizes, mut before) = (std::iter::successors(Some(64 * KIB), |size| Some(2 * size)), None);
    for size in sizes.take_while(|size| *size <= most) {
        let count = (192 * MIB / size).clamp(8, 500);
        let (from, mut to) = (bytes(size), bytes(size));
        let mut ways: [Way<'_>; 4] = [
            Box::new(|| {
                let copy = |_| black_box(&mut to[..]).copy_from_slice(black_box(&from));
                cost(&[], || (0..count).for_each(copy)) / count as f64
            }),
            Box::new(|| {
                cost(&[], || (0..count).for_each(|_| drop(black_box(black_box(&from).to_vec())))) / count as f64
            }),
            Box::new(|| {
                let queue = Queue::bounded(2).expect("a queue");
                let producer = Process::spawn(into_queue, (queue.clone(), size, count)).expect("a producer");
                let each = each(size, count, producer.pid(), || queue.blocking_get().expect("a message"));
                end(producer);
                each
            }),
            Box::new(|| {
                let (sender, mut receiver): (_, Receiver<Bytes>) = multiprocess::simplex().expect("a pipe");
                let producer = Process::spawn(into_pipe, (sender, size, count)).expect("a producer");
                let each = each(size, count, producer.pid(), || receiver.blocking_recv().expect("a message"));
                end(producer);
                each
            }),
        ];
        let costs = in_turns(&mut ways, 3);
        let [reused, fresh, queue, pipe] = costs[..] else { unreachable!("there are four") };
        let rate = |cost: Cost| size as f64 / cost.wall / 1e9;
        let neighbours = before.map_or_else(String::new, |(queue_before, pipe_before)| {
            format!("{}, {}", by(queue, queue_before / 0.5), by(pipe, pipe_before / 0.5))
        });
        print!("| {} | {:.2} | {:.2} | {:.2} | {:.2} ", size / KIB, rate(reused), rate(fresh), rate(queue), rate(pipe));
        let [a, b, c, d] = [by(fresh, queue), by(fresh, pipe), by(reused, queue), by(reused, pipe)];
        println!("| {a} | {b} | {c} | {d} | {neighbours} |");
        before = Some((queue, pipe));
    }
}

fn main() {
    multiprocess::init();
    let named: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let is_wanted = |part: &str| named.is_empty() || named.iter().any(|name| name == part);
    let parts: [(&str, fn()); 4] = [("trips", trips), ("ways", ways), ("imap", imap), ("series", || series(64 * MIB))];
    parts.iter().filter(|(name, _)| is_wanted(name)).for_each(|(_, part)| part());
    if named.iter().any(|name| name == "whole") {
        series(256 * MIB);
    }
}
