//! How costs grow: with the number of items, of workers, of processes, and with the size of messages.
//!
//! Run by `benches/peers/growth.py`, which draws the figures; alone with `cargo bench --bench growth -- CURVE[=MOST]..`, such as
//! `items=100000 sizes`. Prints a line for each point: curve, series, x, and the median of some rounds in seconds, divided by tabs.

use bytes::Bytes;
use multiprocess::{self as mp, Pool, Process, Receiver, Sender, Value};
use std::time::{Duration, Instant};

type Run<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// The curves and the largest x of each.
const CURVES: [(&str, u64); 4] = [("items", 10_000_000), ("workers", 1024), ("processes", 512), ("sizes", 256 << 20)];

fn increment(n: u64) -> u64 {
    n + 1
}

fn show(curve: &str, series: &str, x: u64, mut rounds: Vec<f64>) {
    rounds.sort_by(f64::total_cmp);
    println!("{curve}\t{series}\t{x}\t{:e}", rounds[rounds.len() / 2]);
}

/// A few rounds, but not more than some seconds of them.
fn rounds(seconds: f64) -> usize {
    ((2.0 / seconds.max(1e-6)) as usize).clamp(3, 15)
}

/// By tens, or by twos, up to `most`.
fn steps(first: u64, factor: u64, most: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(first), move |x| x.checked_mul(factor)).take_while(move |x| *x <= most)
}

/// What one of so many items of a `map` takes.
async fn items(most: u64) -> Run {
    let pool = Pool::new(2)?;
    pool.map(increment, 0..100_000).await?;
    for items in steps(100, 10, most) {
        let (mut all, mut wanted) = (Vec::new(), 1);
        while all.len() < wanted {
            let start = Instant::now();
            pool.map(increment, 0..items).await?;
            let took = start.elapsed().as_secs_f64();
            wanted = rounds(took);
            all.push(took / items as f64);
        }
        show("items", "map, an item", items, all);
    }
    Ok(())
}

fn begin(begun: Value<u64>) {
    begun.fetch_add(1);
}

/// Pools of so many workers.
async fn workers(most: u64) -> Run {
    const ITEMS: u64 = 100_000;
    for workers in steps(2, 2, most) {
        let (start, begun) = (Instant::now(), Value::new(0)?);
        let pool = Pool::builder().workers(workers as usize).initializer(begin, (begun.clone(),)).build()?;
        while begun.get() < workers {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        show("workers", "start, a worker", workers, vec![start.elapsed().as_secs_f64() / workers as f64]);
        let (mut bulk, mut single) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            let start = Instant::now();
            pool.map(increment, 0..ITEMS).await?;
            bulk.push(start.elapsed().as_secs_f64() / ITEMS as f64);
            let start = Instant::now();
            for n in 0..1000 {
                pool.apply(increment, (n,)).await?;
            }
            single.push(start.elapsed().as_secs_f64() / 1000.0);
        }
        show("workers", "map, an item", workers, bulk);
        show("workers", "apply, one at a time", workers, single);
        pool.terminate();
        pool.join().await?;
    }
    Ok(())
}

/// So many children at the same time.
async fn processes(most: u64) -> Run {
    for processes in steps(2, 2, most) {
        let mut all = Vec::new();
        for _ in 0..5 {
            let start = Instant::now();
            let children = (0..processes).map(|n| Process::spawn(increment, (n,))).collect::<mp::Result<Vec<_>>>()?;
            for child in children {
                child.await?;
            }
            all.push(start.elapsed().as_secs_f64() / processes as f64);
        }
        show("processes", "spawn and join, a process", processes, all);
    }
    Ok(())
}

async fn echo(mut orders: Receiver<Bytes>, mut answers: Sender<u64>) -> mp::Result<()> {
    while let Ok(message) = orders.recv().await {
        answers.send(message.len() as u64).await?;
    }
    Ok(())
}

/// Messages of so many bytes to another process, each answered by a number.
async fn sizes(most: u64) -> Run {
    let (mut there, orders) = mp::simplex::<Bytes>()?;
    let (answers, mut back) = mp::simplex::<u64>()?;
    let child = Process::spawn(echo, (orders, answers))?;
    for size in steps(8, 2, most) {
        let message = Bytes::from(vec![7_u8; size as usize]);
        let (mut all, mut wanted) = (Vec::new(), 1);
        let batch = ((1 << 20) / size).clamp(1, 1000);
        while all.len() < wanted {
            let start = Instant::now();
            for _ in 0..batch {
                there.send(message.clone()).await?;
                assert_eq!(back.recv().await?, size);
            }
            let took = start.elapsed().as_secs_f64();
            wanted = rounds(took);
            all.push(took / batch as f64);
        }
        show("sizes", "there and back, a message", size, all);
    }
    drop(there);
    child.await??;
    Ok(())
}

fn main() -> Run {
    mp::run(async {
        let named: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
        for (curve, usual) in CURVES {
            let asked = named.iter().find(|name| name.split('=').next() == Some(curve));
            if !named.is_empty() && asked.is_none() {
                continue;
            }
            let most = asked.and_then(|name| name.split_once('=')?.1.parse().ok()).unwrap_or(usual);
            match curve {
                "items" => items(most).await?,
                "workers" => workers(most).await?,
                "processes" => processes(most).await?,
                _ => sizes(most).await?,
            }
        }
        Ok(())
    })
}
