//! Twin of 'Lock' in 'Multiprocessing in Python: Introduction'.

use futures::future::try_join_all;
use multiprocess::{self as mp, Lock, Process};

async fn worker(lock: Lock) -> mp::Result<()> {
    let _guard = lock.acquire().await?;
    println!("Locked execution");
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let lock = Lock::new()?;
        let processes = (0..3).map(|_| Process::spawn(worker, (lock.clone(),)));
        for result in try_join_all(processes.collect::<mp::Result<Vec<_>>>()?).await? {
            result?;
        }
        Ok(())
    })
}
