//! Twin of 'Process' under 'Key Concepts' in 'Multiprocessing in Python'.

use multiprocess::{self as mp, Process};

fn main() -> mp::Result<()> {
    mp::run(async {
        let mut p = Process::spawn(|| println!("Worker process"), ())?;
        p.join().await
    })
}
