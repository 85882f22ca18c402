//! Port of `log_listener.py`: many processes log, and one writes all of it to a file.
//!
//! Unlike there, the listener may be killed: it is started again, and a record that it had not written is in the queue again.
//!
//! `cargo run --example log_listener -- all.log`

use multiprocess::{self as mp, Group, Process, Queue, Restart};
use serde::{Deserialize, Serialize};
use std::{fs::File, io::Write, time::Duration};

#[derive(Serialize, Deserialize)]
struct Record {
    process: String,
    level: String,
    message: String,
}

async fn listener(records: Queue<Record>, path: String) -> mp::Result<()> {
    let mut file = File::options().append(true).create(true).open(path)?;
    while let Ok(record) = records.lease().await {
        file.write_all(format!("{} {} {}\n", record.process, record.level, record.message).as_bytes())?;
        record.commit()?;
    }
    Ok(())
}

async fn worker(records: Queue<Record>) -> mp::Result<()> {
    let process = mp::current_process();
    for n in 0..20 {
        tokio::time::sleep(Duration::from_millis(5)).await;
        let (level, message) = (["INFO", "WARNING", "ERROR"][n % 3].into(), format!("message {n}"));
        records.put(Record { process: process.name().into(), level, message }).await?;
    }
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let path = std::env::args().nth(1).ok_or_else(|| mp::Error::other("usage: log_listener FILE"))?;
        let records = Queue::unbounded()?;
        let options = Process::builder().name("listener").restart(Restart::on_failure());
        let mut listening = options.spawn(listener, (records.clone(), path))?;
        let mut workers = Group::new();
        for n in 0..4 {
            workers.spawn_with(Process::builder().name(format!("worker-{n}")), worker, (records.clone(),))?;
        }
        let ended = workers.join_all().await;
        records.close();
        listening.wait().await??;
        ended.into_iter().collect::<mp::Result<Vec<_>>>()?.into_iter().collect()
    })
}
