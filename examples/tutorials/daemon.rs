//! Twin of 'Daemon Processes (Background Tasks)' in 'What is multiprocessing?'.
//!
//! A daemon is not waited for: it ends when the main process does, in the middle of whatever it does.

use multiprocess::{self as mp, Process};
use std::{thread, time::Duration};

fn background_task() {
    loop {
        println!("Running in background...");
        thread::sleep(Duration::from_millis(100));
    }
}

fn main() -> mp::Result<()> {
    mp::run(async {
        Process::builder().daemon(true).spawn(background_task, ())?;
        tokio::time::sleep(Duration::from_millis(500)).await; // so that there is something to see
        Ok(())
    })
}
