//! Twin of 'Using Multiple Processes' in 'Multiprocessing in Python'.

use futures::{TryStreamExt, stream::FuturesUnordered};
use multiprocess::{self as mp, Process};

fn worker(num: u32) {
    println!("Worker {num} is running");
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let processes = (0..5).map(|i| Process::spawn(worker, (i,)));
        let processes = processes.collect::<mp::Result<FuturesUnordered<_>>>()?;
        processes.try_collect().await // in whatever order they finish
    })
}
