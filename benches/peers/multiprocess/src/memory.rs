//! W9 without a lock, and W10.

use super::{block_on, finish};
use mpbench::cli::Metrics;
use mpbench::size::{ARRAY_LEN, CONTENDED_OPS};
use mpbench::stats::{per_second, quantile, timed};
use mpbench::sys;
use mpbench::work::sum;
use multiprocess::{Array, Connection, Process, Value, pipe};

/// As in `limits`.
const ROUNDS: u64 = 9;

fn count(counter: Value<u64>, arrived: Value<u32>, cpu: usize) {
    sys::pin_to_cpu(cpu);
    arrived.fetch_add(1);
    while arrived.get() < 2 {
        std::hint::spin_loop();
    }
    for _ in 0..CONTENDED_OPS {
        counter.fetch_add(1);
    }
}

/// Two processes, a CPU each, that start together.
pub fn fetch_add() -> Metrics {
    let (counter, arrived) = (Value::new(0).unwrap(), Value::new(0).unwrap());
    let child = Process::spawn(count, (counter.clone(), arrived.clone(), 1)).unwrap();
    while arrived.get() < 1 {
        std::hint::spin_loop();
    }
    let (elapsed, ()) = timed(|| {
        count(counter.clone(), arrived, 0);
        block_on(finish(child));
    });
    assert_eq!(counter.get(), 2 * CONTENDED_OPS as u64);
    vec![("increments_per_s", per_second(2 * CONTENDED_OPS, elapsed))]
}

async fn add_up(array: Array<f64>, mut line: Connection<f64, ()>) {
    while line.recv().await.is_ok() {
        let total = sum(&array.lock().await.unwrap());
        line.send(total).await.unwrap();
    }
}

/// The child has the array from its start, and has touched none of it in the first round.
pub async fn array() -> Metrics {
    let array = Array::<f64>::zeroed(ARRAY_LEN).unwrap();
    let (mut line, theirs) = pipe::<(), f64>().unwrap();
    let child = Process::spawn(add_up, (array.clone(), theirs)).unwrap();
    array.lock().await.unwrap().fill(0.0);
    let mut ms = Vec::new();
    for round in 1..=ROUNDS {
        array.lock().await.unwrap().fill(round as f64);
        let start = std::time::Instant::now();
        line.send(()).await.unwrap();
        let total = line.recv().await.unwrap();
        ms.push(start.elapsed().as_secs_f64() * 1e3);
        assert_eq!(total, round as f64 * ARRAY_LEN as f64);
    }
    drop(line);
    finish(child).await;
    vec![("first_ms", ms[0]), ("again_ms", quantile(&ms[1..], 0.5))]
}
