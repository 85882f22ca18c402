//! Twin of 'Synchronization Example' in 'Multiprocessing Module'.

use futures::future::try_join_all;
use multiprocess::{self as mp, Lock, Process};

async fn worker(lock: Lock, n: u32) -> mp::Result<()> {
    let _guard = lock.acquire().await?;
    println!("Process {n} acquired lock");
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let lock = Lock::new()?;
        let processes = (0..3).map(|i| Process::spawn(worker, (lock.clone(), i)));
        for result in try_join_all(processes.collect::<mp::Result<Vec<_>>>()?).await? {
            result?;
        }
        Ok(())
    })
}
