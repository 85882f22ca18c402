//! Twin of 'Using Lock to Prevent Race Conditions' in 'What is multiprocessing?'.

use futures::future::try_join_all;
use multiprocess::{self as mp, Lock, Process, Value};

async fn increment(counter: Value<i32>, lock: Lock) -> mp::Result<()> {
    let _guard = lock.acquire().await?;
    counter.set(counter.get() + 1);
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let (counter, lock) = (Value::new(0)?, Lock::new()?);
        let processes = (0..5).map(|_| Process::spawn(increment, (counter.clone(), lock.clone())));
        for result in try_join_all(processes.collect::<mp::Result<Vec<_>>>()?).await? {
            result?;
        }
        println!("Final Counter: {}", counter.get());
        Ok(())
    })
}
