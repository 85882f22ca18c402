//! A closure that captures cannot travel. What it captures is `Copy` here, so only a build finds out.
use multiprocess::{Manager, Pool, Process};

fn main() -> multiprocess::Result<()> {
    let n = 5;
    let _ = Process::spawn(move |x: i32| x + n, (1,));
    let pool = Pool::new(1).unwrap();
    let _ = pool.map(move |x: i32| x + n, vec![1]);
    multiprocess::run(async move {
        let manager = Manager::start().await?;
        manager.create(move |x: i32| x + n, (1,)).await?;
        Ok(())
    })
}
