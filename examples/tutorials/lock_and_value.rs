//! Twin of 'Synchronize with Locks' in 'Python multiprocessing Package'.

use futures::future::try_join_all;
use multiprocess::{self as mp, Lock, Process, Value};

async fn safe_increment(lock: Lock, val: Value<i32>) -> mp::Result<()> {
    let _guard = lock.acquire().await?;
    val.set(val.get() + 1);
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let (lock, val) = (Lock::new()?, Value::new(0)?);
        let procs = (0..5).map(|_| Process::spawn(safe_increment, (lock.clone(), val.clone())));
        for result in try_join_all(procs.collect::<mp::Result<Vec<_>>>()?).await? {
            result?;
        }
        println!("Final value: {}", val.get());
        Ok(())
    })
}
