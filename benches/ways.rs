//! How many MiB a second go each way from one process to another, for the table in `docs/guide/sharing.md`.
//!
//! `cargo bench --bench ways -- MIB` prints a row for each way: the median of some rounds with a value of so many MiB (64). Each value
//! is made before the clock starts; the worker adds up all of it, which the last column takes alone.

use multiprocess::{self as mp, Array, Manager, Pool, Proxy, Queue, Receiver, SharedMemory, Value};
use serde::{Deserialize, Serialize};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

const ROUNDS: usize = 7;
/// So much is loaded before the first worker starts; larger values leave that way out.
const PRELOADED: usize = 64;
/// Numbers in one `Value`, which is for small ones.
const SMALL: usize = 8192;

static TABLE: OnceLock<Vec<f64>> = OnceLock::new();

/// A struct that holds the numbers, as programs have it.
#[derive(Serialize, Deserialize)]
struct Measured {
    name: String,
    numbers: Vec<f64>,
}

fn sum(numbers: &[f64]) -> f64 {
    // In lanes, as fast as memory can be read.
    let mut lanes = [0.0; 8];
    for eight in numbers.chunks_exact(8) {
        lanes.iter_mut().zip(eight).for_each(|(lane, number)| *lane += number);
    }
    lanes.iter().sum()
}

fn of_list(numbers: Vec<f64>) -> f64 {
    sum(&numbers)
}

fn of_struct(measured: Measured) -> f64 {
    sum(&measured.numbers)
}

fn of_numbers_in(bytes: &[u8]) -> f64 {
    bytes.chunks_exact(8).map(|number| f64::from_le_bytes(number.try_into().unwrap_or_default())).sum()
}

fn of_bytes(bytes: Vec<u8>) -> f64 {
    of_numbers_in(&bytes)
}

fn of_table(len: usize) -> f64 {
    TABLE.get().map_or(f64::NAN, |table| sum(&table[..len]))
}

fn of_value(value: Value<[f64; SMALL]>, times: usize) -> f64 {
    (0..times).map(|_| sum(&value.get())).sum()
}

async fn of_manager(list: Proxy<Vec<f64>>) -> mp::Result<f64> {
    Ok(sum(&list.call(|list: &mut Vec<f64>| list.clone(), ()).await?))
}

async fn of_pipe(mut receiver: Receiver<Vec<f64>>) -> mp::Result<f64> {
    Ok(sum(&receiver.recv().await?))
}

async fn of_queue(queue: Queue<Vec<f64>>) -> mp::Result<f64> {
    Ok(sum(&queue.get().await?))
}

fn of_array(array: Array<f64>) -> f64 {
    array.blocking_lock().map_or(f64::NAN, |guard| sum(&guard))
}

fn of_memory(memory: SharedMemory, len: usize) -> mp::Result<f64> {
    let mut bytes = vec![0; len];
    memory.read(0, &mut bytes)?;
    Ok(of_numbers_in(&bytes))
}

fn of_file(path: std::path::PathBuf) -> mp::Result<f64> {
    Ok(of_numbers_in(&std::fs::read(path)?))
}

/// Prints the median rate of a way that takes a value of its own in each round.
async fn way<V>(
    name: &str,
    mib: usize,
    make: impl Fn() -> mp::Result<V>,
    go: impl AsyncFn(V) -> mp::Result<f64>,
) -> mp::Result<()> {
    let mut took = Vec::new();
    for _ in 0..ROUNDS {
        let value = make()?;
        let start = Instant::now();
        let total = go(value).await?;
        took.push(start.elapsed());
        assert_eq!(total, (mib << 17) as f64, "{name}");
    }
    took.sort();
    let median: Duration = took[ROUNDS / 2];
    println!("| {name} | {:.0} |", mib as f64 / median.as_secs_f64());
    Ok(())
}

async fn ways(mib: usize) -> mp::Result<()> {
    let len = mib << 17;
    let list = || Ok(vec![1.0_f64; len]);
    let bytes = vec![1.0_f64; len].iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>();
    mp::preload(|| drop(TABLE.set(vec![1.0; PRELOADED << 17])))?;
    let pool = Pool::new(1)?;
    println!("| way, {mib} MiB | MiB/s |\n|---|---|");
    way("added up where it is, for comparison", mib, list, async |numbers| Ok(sum(&numbers))).await?;
    way("a `Vec<f64>` as an argument", mib, list, async |numbers| pool.apply(of_list, (numbers,)).await).await?;
    let copied = || Ok(bytes.clone());
    way("a `Vec<u8>` as an argument", mib, copied, async |bytes| pool.apply(of_bytes, (bytes,)).await).await?;
    let named = || Ok(Measured { name: "measured".into(), numbers: vec![1.0; len] });
    way("a struct that holds one, as an argument", mib, named, async |value| pool.apply(of_struct, (value,)).await)
        .await?;
    let queue = Queue::unbounded()?;
    way("a `Vec<f64>` through a `Queue`", mib, list, async |numbers| {
        let got = pool.apply_async(of_queue, (queue.clone(),));
        queue.put(numbers).await?;
        got.await?
    })
    .await?;
    let with_pipe = || Ok((vec![1.0_f64; len], mp::simplex()?));
    way("a `Vec<f64>` through a pipe", mib, with_pipe, async |(numbers, (mut sender, receiver))| {
        let got = pool.apply_async(of_pipe, (receiver,));
        sender.send(numbers).await?;
        got.await?
    })
    .await?;
    let manager = Manager::start().await?;
    way("a `Vec<f64>` into a `Manager` and out of it", mib, list, async |numbers| {
        let list = manager.create(|numbers: Vec<f64>| numbers, (numbers,)).await?;
        pool.apply(of_manager, (list,)).await?
    })
    .await?;
    manager.shutdown().await?;
    let value = Value::new([0.0; SMALL])?;
    way("a `Value` of 64 KiB, set and got again and again", mib, list, async |numbers| {
        let parts = numbers.chunks_exact(SMALL);
        parts.for_each(|part| value.set(part.try_into().unwrap_or([0.0; SMALL])));
        pool.apply(of_value, (value.clone(), len / SMALL)).await
    })
    .await?;
    let array = Array::<f64>::zeroed(len)?;
    way("an `Array`, written under its guard and read under that of the worker", mib, list, async |numbers| {
        array.lock().await?.copy_from_slice(&numbers);
        pool.apply(of_array, (array.clone(),)).await
    })
    .await?;
    way("an `Array` that is there already", mib, || Ok(()), async |()| pool.apply(of_array, (array.clone(),)).await)
        .await?;
    let memory = SharedMemory::anonymous(len * 8)?;
    way(
        "`SharedMemory`, by `write` and `read`",
        mib,
        || Ok(()),
        async |()| {
            memory.write(0, &bytes)?;
            pool.apply(of_memory, (memory.clone(), len * 8)).await?
        },
    )
    .await?;
    let path = std::env::temp_dir().join(format!("multiprocess-ways-{}", std::process::id()));
    std::fs::write(&path, &bytes)?;
    way(
        "a file in the page cache, read by the worker",
        mib,
        || Ok(()),
        async |()| pool.apply(of_file, (path.clone(),)).await?,
    )
    .await?;
    std::fs::remove_file(&path)?;
    if mib <= PRELOADED {
        way("a part of what is `preload`ed", mib, || Ok(()), async |()| pool.apply(of_table, (len,)).await).await?;
    }
    Ok(())
}

fn main() -> mp::Result<()> {
    let mib = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(64);
    mp::run(ways(mib))
}
