//! Twin of 'Queue' under 'Key Concepts' in 'Multiprocessing in Python'.

use multiprocess::{self as mp, Process, Queue};

async fn producer(q: Queue<String>) -> mp::Result<()> {
    q.put("Hello from Process".into()).await?;
    Ok(())
}

async fn consumer(q: Queue<String>) -> mp::Result<()> {
    println!("{}", q.get().await?);
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let q = Queue::unbounded()?;
        let p1 = Process::spawn(producer, (q.clone(),))?;
        let p2 = Process::spawn(consumer, (q,))?;
        let (sent, received) = futures::try_join!(p1, p2)?;
        sent.and(received)
    })
}
