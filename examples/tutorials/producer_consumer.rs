//! Twin of 'Communication with Queue' in 'Multiprocessing Module'.

use multiprocess::{self as mp, Process, Queue};

async fn producer(q: Queue<String>) -> mp::Result<()> {
    q.put("Hello from producer".into()).await?;
    Ok(())
}

async fn consumer(q: Queue<String>) -> mp::Result<()> {
    println!("Consumer received: {}", q.get().await?);
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let q = Queue::unbounded()?;
        let mut p1 = Process::spawn(producer, (q.clone(),))?;
        let mut p2 = Process::spawn(consumer, (q,))?;
        p1.join().await??;
        p2.join().await?
    })
}
