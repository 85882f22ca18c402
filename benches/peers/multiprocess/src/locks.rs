//! W8m, W8n, W20 and W21.

use super::block_on;
use mpbench::cli::Metrics;
use mpbench::crowd::{Crowd, WAKES, last_awake};
use mpbench::shm::{self, Shared};
use mpbench::size::SLEEPERS;
use mpbench::stats::{quantile, timed};
use mpbench::sys;
use multiprocess::{Event, Fd, Lock, Process, Queue};
use std::fs::File;
use std::time::{Duration, Instant};

/// Acquisitions of all processes together.
const TURNS: u32 = 32_000;
const CRITICAL: Duration = Duration::from_micros(5);
const CREATIONS: usize = 500;

fn contend(lock: Lock, go: Queue<()>, turns: u32) -> Duration {
    go.blocking_get().unwrap();
    let before = sys::own_cpu_time();
    for _ in 0..turns {
        let _guard = lock.blocking_acquire().unwrap();
        let start = Instant::now();
        while start.elapsed() < CRITICAL {}
    }
    sys::own_cpu_time() - before
}

/// CPU time of one acquisition and its critical section, in microseconds.
async fn crowd(processes: u32) -> f64 {
    let (lock, go) = (Lock::new().unwrap(), Queue::unbounded().unwrap());
    let start = |_| Process::spawn(contend, (lock.clone(), go.clone(), TURNS / processes)).unwrap();
    let children: Vec<_> = (0..processes).map(start).collect();
    for _ in 0..processes {
        go.put(()).await.unwrap();
    }
    let mut cpu = Duration::ZERO;
    for child in children {
        cpu += child.await.unwrap();
    }
    cpu.as_secs_f64() * 1e6 / f64::from(TURNS)
}

pub fn crowds() -> Metrics {
    let [two, eight, many] = [2, 8, 32].map(|processes| block_on(crowd(processes)));
    vec![("growth", eight.max(many) / two), ("cpu_us_2", two), ("cpu_us_8", eight), ("cpu_us_32", many)]
}

/// The first lock founds the family; that is not counted.
pub fn create() -> Metrics {
    let _first = Lock::new().unwrap();
    let mut us = Vec::new();
    for _ in 0..CREATIONS {
        let (elapsed, lock) = timed(|| Lock::new().unwrap());
        us.push(elapsed.as_secs_f64() * 1e6);
        drop(lock);
    }
    vec![("create_us", quantile(&us, 0.5)), ("create_p99_us", quantile(&us, 0.99))]
}

/// Acquisitions of all tasks together.
const HANDED: usize = 100_000;

async fn repeat<F: Future<Output = ()>>(times: usize, work: impl Fn() -> F) {
    for _ in 0..times {
        work().await;
    }
}

/// Microseconds for each acquisition of a lock by `tasks` tasks of one runtime, each of which lets the others run meanwhile.
fn handed_over<F: Future<Output = ()> + Send + 'static>(
    runtime: &tokio::runtime::Runtime,
    tasks: usize,
    work: impl Fn() -> F + Clone + Send + 'static,
) -> f64 {
    let each = HANDED / tasks;
    let all = async {
        let tasks: Vec<_> = (0..tasks).map(|_| tokio::spawn(repeat(each, work.clone()))).collect();
        for task in tasks {
            task.await.unwrap();
        }
    };
    timed(|| runtime.block_on(all)).0.as_secs_f64() * 1e6 / (each * tasks) as f64
}

/// A lock that goes from task to task within this process, and tokio's mutex in the same way.
pub fn hand_over() -> Metrics {
    let mut metrics = Vec::new();
    let runtimes = [
        (tokio::runtime::Builder::new_current_thread(), ["current_2", "current_10", "current_1000"]),
        (tokio::runtime::Builder::new_multi_thread(), ["multi_2", "multi_10", "multi_1000"]),
    ];
    for (mut builder, names) in runtimes {
        let runtime = builder.worker_threads(2).enable_all().build().unwrap();
        for (tasks, name) in [2, 10, 1000].into_iter().zip(names) {
            let _entered = runtime.enter();
            let lock = Lock::new().unwrap();
            let ours = move || {
                let lock = lock.clone();
                async move {
                    let _guard = lock.acquire().await.unwrap();
                    tokio::task::yield_now().await;
                }
            };
            let mutex = std::sync::Arc::new(tokio::sync::Mutex::new(()));
            let tokios = move || {
                let mutex = mutex.clone();
                async move {
                    let _guard = mutex.lock().await;
                    tokio::task::yield_now().await;
                }
            };
            let ratios: Vec<_> = (0..5)
                .map(|_| handed_over(&runtime, tasks, ours.clone()) / handed_over(&runtime, tasks, tokios.clone()))
                .collect();
            metrics.push((name, quantile(&ratios, 0.5)));
        }
    }
    metrics
}

fn sleep(events: Vec<Event>, page: Fd<File>) {
    let crowd: Shared<Crowd> = unsafe { Shared::in_file(&page) };
    crowd.sleeper(|wake| events[wake as usize].blocking_wait().unwrap());
}

pub(crate) fn wake_all() -> Metrics {
    block_on(async {
        let events: Vec<_> = (0..WAKES).map(|_| Event::new().unwrap()).collect();
        let page = shm::page();
        let start = |_| Process::spawn(sleep, (events.clone(), Fd::new(page.try_clone().unwrap()))).unwrap();
        let children: Vec<_> = (0..SLEEPERS).map(start).collect();
        let metrics = last_awake(unsafe { Shared::in_file(&page) }, |wake| events[wake as usize].set());
        for mut child in children {
            child.join().await.unwrap();
        }
        metrics
    })
}
