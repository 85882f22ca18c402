//! W17: values. The codec is not public, so it is built here from the crate's own files.

use crate::wire;
use mpbench::cli::Metrics;
use mpbench::stats::quantile;
use mpbench::sys;
use multiprocess::Queue;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
/// Each round runs everybody once, for so long.
const SAMPLE: Duration = Duration::from_millis(4);
const ROUNDS: usize = 25;

#[derive(Serialize, Deserialize, Clone)]
struct Holds {
    id: i32,
    samples: Vec<f64>,
}

#[derive(Serialize, Deserialize, Clone)]
struct Four {
    id: u32,
    x: f32,
    y: f32,
    flags: u32,
}

/// The message of W5 with names.
#[derive(Serialize, Deserialize, Clone)]
pub struct Eight {
    pub first: u64,
    second: u64,
    third: u64,
    fourth: u64,
    fifth: u64,
    sixth: u64,
    seventh: u64,
    eighth: u64,
}

impl Eight {
    pub fn of(mut next: impl FnMut() -> u64) -> Self {
        let [first, second, third, fourth, fifth, sixth, seventh, eighth] = std::array::from_fn(|_| next());
        Self { first, second, third, fourth, fifth, sixth, seventh, eighth }
    }
}

/// What ours is compared with.
#[derive(Clone, Copy)]
enum Peer {
    /// One copy in the place of each of encode and decode.
    Memcpy,
    Postcard,
    Bincode,
    Rmp,
}

/// The CPU time of one call of `f`, which waits for nothing: others that use the machine do not count.
fn time(f: &mut dyn FnMut()) -> f64 {
    let (start, mut count) = (sys::own_cpu_time(), 0);
    loop {
        f();
        count += 1;
        let elapsed = sys::own_cpu_time() - start;
        if elapsed >= SAMPLE {
            return elapsed.as_secs_f64() / f64::from(count);
        }
    }
}

/// `time` for what takes less than a look at the clock.
fn time_small(f: &mut dyn FnMut()) -> f64 {
    time(&mut || (0..100).for_each(|_| f())) / 100.0
}

fn median(samples: impl Iterator<Item = f64>) -> f64 {
    quantile(&samples.collect::<Vec<_>>(), 0.5)
}

/// Encode and decode, with a buffer that is used again, of ours and of a peer: the median of the ratios within a round.
fn codec<T: Serialize + DeserializeOwned>(value: &T, bytes: usize, peer: Peer) -> Metrics {
    let time: fn(&mut dyn FnMut()) -> f64 = if bytes < 10_000 { time_small } else { time };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let (from, mut to) = (vec![1u8; bytes], vec![0u8; bytes]);
    let mut round = || {
        let our = time(&mut || {
            ours.clear();
            wire::append(black_box(value), &mut ours);
            black_box(wire::read::<T>(black_box(&ours)));
        });
        let their = match peer {
            Peer::Memcpy => 2.0 * time(&mut || black_box(&mut to[..]).copy_from_slice(black_box(&from))),
            Peer::Postcard => time(&mut || {
                theirs.clear();
                theirs = postcard::to_extend(black_box(value), std::mem::take(&mut theirs)).unwrap();
                black_box(postcard::from_bytes::<T>(black_box(&theirs)).unwrap());
            }),
            Peer::Bincode => time(&mut || {
                theirs.clear();
                bincode::serialize_into(&mut theirs, black_box(value)).unwrap();
                black_box(bincode::deserialize::<T>(black_box(&theirs)).unwrap());
            }),
            Peer::Rmp => time(&mut || {
                theirs.clear();
                rmp_serde::encode::write(&mut theirs, black_box(value)).unwrap();
                black_box(rmp_serde::from_slice::<T>(black_box(&theirs)).unwrap());
            }),
        };
        (our, their)
    };
    round();
    let rounds: Vec<_> = (0..ROUNDS).map(|_| round()).collect();
    vec![
        ("codec_us", median(rounds.iter().map(|(our, _)| our * 1e6))),
        ("ratio", median(rounds.iter().map(|(our, their)| our / their))),
    ]
}

/// Put and get within one process; what is put is made before the clock runs.
fn trip<T: Serialize + DeserializeOwned + Clone + Send + 'static>(queue: &Queue<T>, value: &T) -> f64 {
    let (start, mut total, mut count) = (Instant::now(), Duration::ZERO, 0);
    while start.elapsed() < 2 * SAMPLE || count == 0 {
        let value = black_box(value.clone());
        let begin = sys::own_cpu_time();
        queue.try_put(value).unwrap();
        let back = queue.try_get().unwrap();
        total += sys::own_cpu_time() - begin;
        drop(black_box(back));
        count += 1;
    }
    total.as_secs_f64() / f64::from(count)
}

/// The codec against copies, and the whole trip against that of as many bare bytes.
fn large<T: Serialize + DeserializeOwned + Clone + Send + 'static>(value: T, bytes: usize) -> Metrics {
    let mut metrics = codec(&value, bytes, Peer::Memcpy);
    let (ours, bare, raw) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap(), vec![7u8; bytes]);
    let round = || (trip(&ours, &value), trip(&bare, &raw));
    round();
    let rounds: Vec<_> = (0..ROUNDS).map(|_| round()).collect();
    metrics.push(("trip_us", median(rounds.iter().map(|(our, _)| our * 1e6))));
    metrics.push(("trip", median(rounds.iter().map(|(our, bare)| our / bare))));
    metrics
}

pub fn pair_bytes<const N: usize>() -> Metrics {
    large((1i32, vec![7u8; N * MIB]), N * MIB)
}

pub fn pair_f64<const N: usize>() -> Metrics {
    large((1i32, vec![0.5f64; N * MIB / 8]), N * MIB)
}

pub fn struct_f64<const N: usize>() -> Metrics {
    large(Holds { id: 1, samples: vec![0.5; N * MIB / 8] }, N * MIB)
}

pub fn string() -> Metrics {
    large("x".repeat(MIB), MIB)
}

pub fn list_f64() -> Metrics {
    large(vec![0.5f64; MIB / 8], MIB)
}

/// Numbers that use all their bits.
fn random() -> impl FnMut() -> u64 {
    let mut state = 0x5eed;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

pub fn arrays() -> Metrics {
    codec(&vec![[0.5f32, 1.5, 2.5]; MIB / 12], MIB, Peer::Postcard)
}

pub fn pairs() -> Metrics {
    let mut random = random();
    let value: Vec<(u32, f32)> = (0..MIB / 8).map(|_| (random() as u32, random() as f32)).collect();
    codec(&value, MIB, Peer::Postcard)
}

pub fn pairs_small() -> Metrics {
    let value: Vec<(u32, f32)> = (0..MIB / 8).map(|n| (n as u32 % 100, 0.5)).collect();
    codec(&value, MIB, Peer::Postcard)
}

pub fn structs() -> Metrics {
    let mut random = random();
    let mut four = || Four { id: random() as u32, x: 0.5, y: 1.5, flags: random() as u32 };
    codec(&(0..MIB / 16).map(|_| four()).collect::<Vec<_>>(), MIB, Peer::Postcard)
}

pub fn structs_small() -> Metrics {
    let four = |n| Four { id: n as u32 % 100, x: 0.5, y: 1.5, flags: 1 };
    codec(&(0..MIB / 16).map(four).collect::<Vec<_>>(), MIB, Peer::Postcard)
}

pub fn strings() -> Metrics {
    let value: Vec<_> = (0..MIB / 32).map(|n| format!("text number {n}")).collect();
    codec(&value, MIB, Peer::Bincode)
}

pub fn map() -> Metrics {
    let value: HashMap<u64, f64> = (0..MIB as u64 / 16).map(|n| (n * 7919, n as f64)).collect();
    codec(&value, MIB, Peer::Bincode)
}

pub fn eight() -> Metrics {
    codec(&Eight::of(random()), 64, Peer::Rmp)
}

pub fn eight_small() -> Metrics {
    codec(&Eight::of(|| 7), 64, Peer::Rmp)
}
