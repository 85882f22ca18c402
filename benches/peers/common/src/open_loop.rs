//! W18: tasks that arrive whether or not those before them are done.

use crate::cli::Metrics;
use crate::size::WORKERS;
use crate::stats::quantile;
use crate::work::steps_of;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::sync::mpsc::unbounded_channel;

/// W18: tasks of 100 µs arrive at random times that are set beforehand, so that half and then six tenths of the workers' time is
/// asked for. A thread of its own has each handed to `runtime` when its time has come. Its latency counts from that time.
pub fn latencies<F: Future<Output = ()> + Send + 'static>(runtime: &Runtime, call: impl Fn(u64) -> F) -> Metrics {
    const NAMES: [[&str; 4]; 2] = [
        ["load_50_p50_us", "load_50_p90_us", "load_50_p99_us", "load_50_p999_us"],
        ["load_60_p50_us", "load_60_p90_us", "load_60_p99_us", "load_60_p999_us"],
    ];
    const TASK_US: u64 = 100;
    const ARRIVALS: usize = 20_000;
    let steps = steps_of(TASK_US);
    runtime.block_on(async { for _ in 0..1000 { call(steps).await } });
    let mut metrics = Metrics::new();
    for (load, names) in [0.5, 0.6].into_iter().zip(NAMES) {
        let mean = TASK_US as f64 * 1e-6 / (WORKERS as f64 * load);
        let latencies = Arc::new(Mutex::new(Vec::with_capacity(ARRIVALS)));
        let (sender, mut receiver) = unbounded_channel();
        let arrivals = thread::spawn(move || {
            let (mut random, mut due) = (88_172_645_463_325_252u64, Instant::now());
            for _ in 0..ARRIVALS {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                due += Duration::from_secs_f64(-mean * (((random >> 11) + 1) as f64 / (1u64 << 53) as f64).ln());
                thread::sleep(due.saturating_duration_since(Instant::now()));
                sender.send(due).expect("the receiver waits for all");
            }
        });
        runtime.block_on(async {
            let mut tasks = Vec::with_capacity(ARRIVALS);
            while let Some(due) = receiver.recv().await {
                let (call, latencies) = (call(steps), latencies.clone());
                tasks.push(tokio::spawn(async move {
                    call.await;
                    latencies.lock().expect("no panic").push(due.elapsed().as_secs_f64() * 1e6);
                }));
            }
            for task in tasks {
                task.await.expect("no panic");
            }
        });
        arrivals.join().expect("no panic");
        let latencies = latencies.lock().expect("no panic");
        metrics.extend(names.into_iter().zip([0.5, 0.9, 0.99, 0.999]).map(|(name, q)| (name, quantile(&latencies, q))));
    }
    metrics
}
