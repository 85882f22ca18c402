//! Twin of 'Process Creation' in 'Multiprocessing Module'.

use multiprocess::{self as mp, Process};

fn worker(name: String) {
    println!("Hello from {name}");
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let mut p = Process::spawn(worker, ("Process-1".to_string(),))?;
        p.join().await
    })
}
