//! Practice Question 5 of 'Python multiprocessing Package': a lock lets several processes update a shared list safely.

use futures::future::try_join_all;
use multiprocess::{self as mp, Array, Process};

async fn add(list: Array<u32>, n: u32) -> mp::Result<()> {
    // Its own lock: the whole list is ours until the end of the scope.
    let mut list = list.lock().await?;
    list.iter_mut().for_each(|element| *element += n);
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let list = Array::from_slice(&[0, 10, 20])?;
        let procs = (1..=4).map(|n| Process::spawn(add, (list.clone(), n)));
        for result in try_join_all(procs.collect::<mp::Result<Vec<_>>>()?).await? {
            result?;
        }
        println!("{:?}", list.to_vec());
        Ok(())
    })
}
