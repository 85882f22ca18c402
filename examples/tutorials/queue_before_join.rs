//! Twin of 'Using Queue for Process Communication' in 'Multiprocessing in Python'.

use multiprocess::{self as mp, Process, Queue};

async fn worker(q: Queue<String>) -> mp::Result<()> {
    q.put("Hello from Process!".into()).await?;
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let q = Queue::unbounded()?;
        let mut p = Process::spawn(worker, (q.clone(),))?;
        println!("{}", q.get().await?); // waits until the child has put it
        p.join().await?
    })
}
