//! Twin of 'Using Queue' in 'Python multiprocessing Package'.
//!
//! The queue lives in memory that both share, so the message outlives the process that put it.

use multiprocess::{self as mp, Process, Queue};

async fn worker(q: Queue<String>) -> mp::Result<()> {
    q.put("Hello from worker!".into()).await?;
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let q = Queue::unbounded()?;
        let mut p = Process::spawn(worker, (q.clone(),))?;
        p.join().await??;
        println!("{}", q.get().await?);
        Ok(())
    })
}
