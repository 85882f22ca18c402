//! Twin of 'Using Queue for Inter-Process Communication' in 'What is multiprocessing?', with a plain
//! function in the child: `blocking_put` is for those.

use multiprocess::{self as mp, Process, Queue};

fn worker(q: Queue<String>) -> mp::Result<()> {
    q.blocking_put("Hello from process".into())?;
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let q = Queue::unbounded()?;
        let mut process = Process::spawn(worker, (q.clone(),))?;
        process.join().await??;

        println!("{}", q.get().await?);
        Ok(())
    })
}
