//! What a child costs: `cargo run --release --example spawn_cost [MiB of heap]`.
//!
//! A no-op one by one and 100 at once, against posix_spawn of /bin/true.

use multiprocess::{self as mp, Process};
use std::time::Instant;

fn nothing() {}

async fn one_by_one(rounds: usize) -> mp::Result<Vec<f64>> {
    let mut micros = Vec::new();
    for _ in 0..rounds {
        let start = Instant::now();
        Process::spawn(nothing, ())?.await?;
        micros.push(start.elapsed().as_secs_f64() * 1e6);
    }
    micros.sort_by(f64::total_cmp);
    Ok(micros)
}

fn main() -> mp::Result<()> {
    mp::init();
    let heap: usize = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    let ballast = vec![1u8; heap << 20];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        one_by_one(20).await?;
        let micros = one_by_one(1000).await?;
        println!("one by one: p50 {:.0} us, p99 {:.0} us", micros[500], micros[990]);
        for _ in 0..3 {
            let start = Instant::now();
            let children = (0..100).map(|_| Process::spawn(nothing, ())).collect::<mp::Result<Vec<_>>>()?;
            futures::future::try_join_all(children).await?;
            println!("100 at once: {:.0} us each", start.elapsed().as_secs_f64() * 1e4);
        }
        let mut micros: Vec<f64> = (0..300)
            .map(|_| {
                let start = Instant::now();
                let child = std::process::Command::new("/bin/true").spawn();
                child.and_then(|mut child| child.wait()).expect("/bin/true runs");
                start.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        micros.sort_by(f64::total_cmp);
        println!("/bin/true: p50 {:.0} us", micros[150]);
        std::hint::black_box(&ballast);
        Ok(())
    })
}
