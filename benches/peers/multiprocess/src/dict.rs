//! W11: a dictionary owned by a manager, set and read by clients.

use super::{block_on, block_on_run};
use mpbench::cli::Metrics;
use mpbench::size::{DICT_CLIENTS, DICT_KEYS, DICT_OPS_FAST, DICT_OPS_PAUSED};
use mpbench::stats::{now_ns, per_second, quantile};
use multiprocess::{DictProxy, Manager, Process, Queue};
use std::collections::HashMap;
use std::time::Duration;

type Dict = DictProxy<i64, i64>;

const BATCH: i64 = 100;
const OPS: usize = DICT_OPS_FAST / 5;

/// When a client began and ended.
type Span = (u64, u64);

/// One client: sets and reads back `ops / 2` times among its own keys.
async fn client(dict: Dict, id: i64, ops: usize, ready: Queue<()>, go: Queue<()>) -> Span {
    dict.len().await.unwrap();
    ready.put(()).await.unwrap();
    go.get().await.unwrap();
    let start = now_ns();
    for i in 0..ops as i64 / 2 {
        let key = id * DICT_KEYS + i % DICT_KEYS;
        dict.insert(key, i).await.unwrap();
        assert_eq!(dict.get(&key).await.unwrap(), Some(i));
    }
    (start, now_ns())
}

/// As [`client`], a hundred operations in each message.
async fn batcher(dict: Dict, id: i64, ops: usize, ready: Queue<()>, go: Queue<()>) -> Span {
    dict.len().await.unwrap();
    ready.put(()).await.unwrap();
    go.get().await.unwrap();
    let start = now_ns();
    let get = |dict: &mut HashMap<i64, i64>, key: i64| dict.get(&key).copied();
    for first in (0..ops as i64 / 2).step_by(BATCH as usize / 2) {
        let (mut batch, mut got) = (dict.proxy().batch(), Vec::with_capacity(BATCH as usize / 2));
        for i in first..first + BATCH / 2 {
            let key = id * DICT_KEYS + i % DICT_KEYS;
            batch.call(dict.proxy(), HashMap::insert, (key, i)).unwrap();
            got.push((i, batch.call(dict.proxy(), get, (key,)).unwrap()));
        }
        let mut replies = batch.send().await.unwrap();
        for (i, ticket) in got {
            assert_eq!(replies.take(ticket).unwrap(), Some(i));
        }
    }
    (start, now_ns())
}

/// Clients of [`many_clients`], and operations of all of them together.
const MANY: [usize; 4] = [4, 16, 64, 256];
const MANY_OPS: usize = 100_000;

async fn rate(manager: &Manager, clients: usize, batched: bool) -> f64 {
    rate_of(manager, clients, OPS, batched).await
}

/// Operations per second of all clients together, each of which makes `ops`.
async fn rate_of(manager: &Manager, clients: usize, ops: usize, batched: bool) -> f64 {
    let dict: Dict = manager.dict().await.unwrap();
    let (ready, go) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
    let start = |id| {
        let args = (dict.clone(), id as i64, ops, ready.clone(), go.clone());
        if batched { Process::spawn(batcher, args).unwrap() } else { Process::spawn(client, args).unwrap() }
    };
    let children: Vec<_> = (0..clients).map(start).collect();
    for _ in 0..clients {
        ready.get().await.unwrap();
    }
    for _ in 0..clients {
        go.put(()).await.unwrap();
    }
    let mut spans = Vec::new();
    for child in children {
        spans.push(child.await.unwrap());
    }
    let first = spans.iter().map(|span| span.0).min().unwrap_or_default();
    let last = spans.iter().map(|span| span.1).max().unwrap_or_default();
    per_second(clients * ops, Duration::from_nanos(last - first))
}

async fn both_rates(batched: bool) -> Metrics {
    let manager = Manager::start().await.unwrap();
    let one = rate(&manager, 1, batched).await;
    let four = rate(&manager, DICT_CLIENTS, batched).await;
    manager.shutdown().await.unwrap();
    vec![("one_client_ops_per_s", one), ("four_clients_ops_per_s", four)]
}

pub fn manager() -> Metrics {
    block_on(both_rates(false))
}

pub fn manager_run() -> Metrics {
    block_on_run(both_rates(false))
}

pub fn batches() -> Metrics {
    block_on(both_rates(true))
}

/// CPU time of a process so far, all threads.
fn cpu_ns(pid: u32) -> f64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
    threads.map(|thread| of(thread.unwrap()).split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0.0)).sum()
}

/// W11n: operations per second, and the manager's CPU time for one, with more and more clients.
pub fn many_clients() -> Metrics {
    block_on(async {
        let (mut rates, mut costs) = (Vec::new(), Vec::new());
        for clients in MANY {
            let manager = Manager::start().await.unwrap();
            let ops = MANY_OPS / clients / 2 * 2;
            let before = cpu_ns(manager.pid());
            rates.push(rate_of(&manager, clients, ops, false).await);
            costs.push((cpu_ns(manager.pid()) - before) / (clients * ops) as f64 / 1e3);
            manager.shutdown().await.unwrap();
        }
        let names = ["ops_per_s_4", "ops_per_s_16", "ops_per_s_64", "ops_per_s_256"];
        let mut metrics = vec![("rate_256", rates[3] / rates[0]), ("cpu_growth", costs[3] / costs[0])];
        metrics.extend(names.into_iter().zip(rates));
        metrics.extend(["cpu_us_4", "cpu_us_256"].into_iter().zip([costs[0], costs[3]]));
        metrics
    })
}

/// W11s
async fn sleeper(dict: Dict, ops: usize) -> Vec<f64> {
    let mut us = Vec::with_capacity(ops);
    for i in 0..ops as i64 {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let start = now_ns();
        dict.insert(i % DICT_KEYS, i).await.unwrap();
        us.push((now_ns() - start) as f64 / 1e3);
    }
    us
}

pub fn from_sleep() -> Metrics {
    block_on(async {
        let manager = Manager::start().await.unwrap();
        let dict: Dict = manager.dict().await.unwrap();
        let us = Process::spawn(sleeper, (dict, DICT_OPS_PAUSED)).unwrap().await.unwrap();
        manager.shutdown().await.unwrap();
        vec![("p50_us", quantile(&us, 0.5))]
    })
}
