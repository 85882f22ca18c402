//! Twin of 'Create and Run Processes' in 'Python multiprocessing Package', and of its Practice Question 1.

use futures::future::try_join_all;
use multiprocess::{self as mp, Process};

fn show_pid() {
    println!("Process ID: {}", std::process::id());
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let processes = (0..3).map(|_| Process::spawn(show_pid, ()));
        try_join_all(processes.collect::<mp::Result<Vec<_>>>()?).await?;
        Ok(())
    })
}
