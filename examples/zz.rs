//! x
use multiprocess::{self as mp, Process};
use std::time::Instant;
fn nothing() {}
fn clock() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}
fn main() -> mp::Result<()> {
    mp::init();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut a, mut b, mut c, mut d) = (vec![], vec![], vec![], vec![]);
        for _ in 0..500 {
            let s = Instant::now();
            let p = Process::spawn(nothing, ())?;
            a.push(s.elapsed().as_micros());
            p.await?;
            b.push(s.elapsed().as_micros());
        }
        for _ in 0..500 {
            let s = clock();
            let p = Process::spawn(clock, ())?;
            let t = p.await?;
            c.push((t - s) as u128 / 1000);
            d.push((clock() - t) as u128 / 1000);
        }
        for v in [&mut a, &mut b, &mut c, &mut d] {
            v.sort();
        }
        println!("spawn {} total {} | start->fn {} fn->joined {}", a[250], b[250], c[250], d[250]);
        Ok(())
    })
}
