//! Twin of 'Running Multiple Processes' in 'What is multiprocessing?'.

use multiprocess::{self as mp, Process};

fn task(name: u32) {
    println!("Task {name} is running");
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let mut processes = Vec::new();
        for i in 0..3 {
            processes.push(Process::spawn(task, (i,))?);
        }
        for mut p in processes {
            p.join().await?;
        }
        Ok(())
    })
}
