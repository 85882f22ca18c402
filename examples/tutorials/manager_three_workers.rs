//! Twin of 'Using Manager for Shared Objects' in 'Multiprocessing Module'.

use multiprocess::{self as mp, ListProxy, Manager, Process};

async fn worker(shared_list: ListProxy<String>) -> mp::Result<()> {
    shared_list.push("data".into()).await
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let manager = Manager::start().await?;
        let shared = manager.list().await?;
        let mut processes = Vec::new();
        for _ in 0..3 {
            processes.push(Process::spawn(worker, (shared.clone(),))?);
        }
        for p in processes {
            p.await??;
        }
        println!("{:?}", shared.to_vec().await?);
        manager.shutdown().await
    })
}
