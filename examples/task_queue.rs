//! Port of `task_queue.py`: four processes take tasks from a queue until they get a STOP, here `None`.
//!
//! Unlike there, a worker has its task on lease: if it is killed, another one does the task.
//!
//! `cargo run --example task_queue`

use multiprocess::{self as mp, Group, Queue, Task};
use std::{thread::sleep, time::Duration};

fn mul(a: i64, b: i64) -> i64 {
    sleep(Duration::from_millis(30));
    a * b
}

fn plus(a: i64, b: i64) -> i64 {
    sleep(Duration::from_millis(30));
    a + b
}

async fn worker(tasks: Queue<Option<(String, Task<i64>)>>, done: Queue<String>) -> mp::Result<()> {
    loop {
        let lease = tasks.lease().await?;
        let Some((text, task)) = &*lease else { return lease.commit().map(drop) };
        let result = task.clone().run().await?;
        done.put(format!("{} says that {text} = {result}", mp::current_process().name())).await?;
        lease.commit()?;
    }
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let (tasks, done) = (Queue::unbounded()?, Queue::unbounded()?);
        let products = (0..20).map(|i| (format!("mul({i}, 7)"), Task::of(mul, (i, 7))));
        let sums = (0..10).map(|i| (format!("plus({i}, 8)"), Task::of(plus, (i, 8))));
        for task in products.chain(sums) {
            tasks.put(Some(task)).await?;
        }
        let mut workers = Group::new();
        for _ in 0..4 {
            workers.spawn(worker, (tasks.clone(), done.clone()))?;
        }
        for _ in 0..30 {
            println!("{}", done.get().await?);
        }
        for _ in 0..4 {
            tasks.put(None).await?;
        }
        for ended in workers.join_all().await {
            ended??;
        }
        Ok(())
    })
}
