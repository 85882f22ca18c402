//! What one operation of a queue, a pipe or a token costs by itself. `benches/peers` compares with others; this shows a change.
//!
//! Run with `cargo bench`. Each reports the time of one operation (one put and one get, one round trip, one spawn
//! and join) of 64-byte and 1 MiB messages on a current-thread runtime.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use multiprocess::{CancellationToken, Connection, Process, Queue};
use std::hint::black_box;
use tokio::runtime::{Builder, Runtime};

multiprocess::test_support!();

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// One process, one task: what the code costs, without any waiting.
fn queue(c: &mut Criterion) {
    let runtime = runtime();
    let numbers = Queue::unbounded().expect("a queue");
    c.bench_function("queue put+get, [u64; 8]", |b| {
        b.iter(|| runtime.block_on(async { numbers.put(black_box([7u64; 8])).await.and(Ok(numbers.get().await)) }));
    });
    let texts = Queue::unbounded().expect("a queue");
    c.bench_function("queue put+get, (u64, String)", |b| {
        b.iter(|| runtime.block_on(async { texts.put((7u64, "seven".to_string())).await.and(Ok(texts.get().await)) }));
    });
    let bytes = Queue::unbounded().expect("a queue");
    let mut group = c.benchmark_group("large");
    group.throughput(Throughput::Bytes(1 << 20));
    group.bench_function("queue put+get, 1 MiB of Bytes", |b| {
        let message = bytes::Bytes::from(vec![7; 1 << 20]);
        b.iter(|| runtime.block_on(async { bytes.put(message.clone()).await.and(Ok(bytes.get().await)) }));
    });
}

async fn echo(mut connection: Connection<[u64; 8], [u64; 8]>) {
    while let Ok(message) = connection.recv().await {
        if connection.send(message).await.is_err() {
            return;
        }
    }
}

fn pipe(c: &mut Criterion) {
    let runtime = runtime();
    let (mut near, far) = multiprocess::pipe().expect("a pipe");
    let _child = Process::spawn(echo, (far,)).expect("a child");
    c.bench_function("pipe round trip between two processes, 64 B", |b| {
        b.iter(|| runtime.block_on(async { near.send([7; 8]).await.and(Ok(near.recv().await)) }));
    });
}

/// Beside a load of an atomic of this process, which it is to cost.
fn token(c: &mut Criterion) {
    let flag = std::sync::atomic::AtomicU64::new(0);
    c.bench_function("load of an atomic, for comparison", |b| {
        b.iter(|| black_box(&flag).load(std::sync::atomic::Ordering::Acquire) != 0);
    });
    let token = CancellationToken::new().expect("a token");
    c.bench_function("is_cancelled of a token", |b| b.iter(|| black_box(&token).is_cancelled()));
    let child = token.child_token().expect("a token");
    c.bench_function("is_cancelled of a child of a token", |b| b.iter(|| black_box(&child).is_cancelled()));
}

fn spawn(c: &mut Criterion) {
    let runtime = runtime();
    c.bench_function("spawn and join of a no-op", |b| {
        b.iter(|| runtime.block_on(async { Process::spawn(|| (), ())?.await }));
    });
}

criterion_group!(benches, queue, pipe, token, spawn);
criterion_main!(benches);
