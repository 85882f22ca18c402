//! Twin of 'Creating and Running a Process' in 'What is multiprocessing?', which is also 'Creating a
//! Process' in 'Multiprocessing in Python'.

use multiprocess::{self as mp, Process};

fn worker() {
    println!("Worker process is running");
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let process = Process::spawn(worker, ())?; // it runs from here on
        process.await // wait for it to finish
    })
}
