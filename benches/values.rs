//! What it costs to encode and decode a value, and to send it through a queue, beside other formats and a plain copy.
//!
//! Run with `cargo bench --bench values`. The codec of this crate is not public; a queue within one process shows it:
//! `put` encodes and copies into the ring, `get` copies out and decodes. The row `bytes` is that way without a codec.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use multiprocess::Queue;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::hint::black_box;

multiprocess::test_support!();

const MIB: usize = 1 << 20;

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

#[derive(Serialize, Deserialize, Clone)]
struct Eight {
    first: u64,
    second: u64,
    third: u64,
    fourth: u64,
    fifth: u64,
    sixth: u64,
    seventh: u64,
    eighth: u64,
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

/// The same value by each format, and by a queue.
fn compare<T>(c: &mut Criterion, name: &str, bytes: usize, value: &T)
where
    T: Serialize + DeserializeOwned + Clone + Send + 'static,
{
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes(bytes as u64));
    let (from, mut to) = (vec![1u8; bytes], vec![0u8; bytes]);
    group.bench_function(BenchmarkId::from_parameter("memcpy"), |b| {
        b.iter(|| black_box(&mut to[..]).copy_from_slice(black_box(&from)));
    });
    let queue = Queue::unbounded().expect("a queue");
    group.bench_function(BenchmarkId::from_parameter("queue"), |b| {
        b.iter(|| {
            queue.try_put(black_box(value.clone())).expect("room");
            queue.try_get().expect("a value")
        });
    });
    let queue = Queue::unbounded().expect("a queue");
    group.bench_function(BenchmarkId::from_parameter("queue, bytes"), |b| {
        b.iter(|| {
            queue.try_put(black_box(from.clone())).expect("room");
            queue.try_get().expect("a value")
        });
    });
    group.bench_function(BenchmarkId::from_parameter("rmp-serde"), |b| {
        b.iter(|| rmp_serde::from_slice::<T>(&rmp_serde::to_vec(black_box(value)).expect("bytes")).expect("a value"));
    });
    group.bench_function(BenchmarkId::from_parameter("postcard"), |b| {
        b.iter(|| postcard::from_bytes::<T>(&postcard::to_stdvec(black_box(value)).expect("bytes")).expect("a value"));
    });
    group.bench_function(BenchmarkId::from_parameter("bincode"), |b| {
        b.iter(|| bincode::deserialize::<T>(&bincode::serialize(black_box(value)).expect("bytes")).expect("a value"));
    });
}

fn runs(c: &mut Criterion) {
    for len in [MIB, 16 * MIB] {
        let mib = len / MIB;
        compare(c, &format!("(i32, Vec<u8>), {mib} MiB"), len, &(1i32, vec![7u8; len]));
        compare(c, &format!("(i32, Vec<f64>), {mib} MiB"), len, &(1i32, vec![0.5f64; len / 8]));
        compare(c, &format!("struct with Vec<f64>, {mib} MiB"), len, &Holds { id: 1, samples: vec![0.5; len / 8] });
    }
    compare(c, "Vec<[f32; 3]>, 1 MiB", MIB, &vec![[0.5f32; 3]; MIB / 12]);
    compare(c, "Vec<f64>, 1 MiB", MIB, &vec![0.5f64; MIB / 8]);
    compare(c, "String, 1 MiB", MIB, &"x".repeat(MIB));
}

fn lists(c: &mut Criterion) {
    let mut random = random();
    let pairs: Vec<(u32, f32)> = (0..MIB / 8).map(|_| (random() as u32, random() as f32)).collect();
    compare(c, "Vec<(u32, f32)>, full range", MIB, &pairs);
    let pairs: Vec<(u32, f32)> = (0..MIB / 8).map(|n| (n as u32 % 100, 0.5)).collect();
    compare(c, "Vec<(u32, f32)>, small", MIB, &pairs);
    let four = |id, flags| Four { id, x: 0.5, y: 1.5, flags };
    let fours: Vec<_> = (0..MIB / 16).map(|_| four(random() as u32, random() as u32)).collect();
    compare(c, "Vec<struct of 4>, full range", MIB, &fours);
    let fours: Vec<_> = (0..MIB / 16).map(|n| four(n as u32 % 100, 1)).collect();
    compare(c, "Vec<struct of 4>, small", MIB, &fours);
    let texts: Vec<_> = (0..MIB / 32).map(|n| format!("text number {n}")).collect();
    compare(c, "Vec<String>", MIB, &texts);
    let map: HashMap<_, _> = (0..MIB as u64 / 16).map(|n| (n * 7919, n as f64)).collect();
    compare(c, "HashMap<u64, f64>", MIB, &map);
}

fn small(c: &mut Criterion) {
    let mut random = random();
    let mut next = || random();
    let eight = Eight {
        first: next(),
        second: next(),
        third: next(),
        fourth: next(),
        fifth: next(),
        sixth: next(),
        seventh: next(),
        eighth: next(),
    };
    compare(c, "struct of 8 u64", 64, &eight);
    compare(c, "[u64; 8]", 64, &[7u64; 8]);
    compare(c, "(u64, String)", 16, &(7u64, "seven".to_string()));
}

criterion_group!(benches, runs, lists, small);
criterion_main!(benches);
