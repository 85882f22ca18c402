//! Twin of 'Using Manager for Shared Data Structures' in 'What is multiprocessing?'.

use multiprocess::{self as mp, ListProxy, Manager, Process};

async fn add_item(shared_list: ListProxy<String>) -> mp::Result<()> {
    shared_list.push("Hello".into()).await
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let manager = Manager::start().await?;
        let shared_list = manager.list().await?;
        let mut process = Process::spawn(add_item, (shared_list.clone(),))?;
        process.join().await??;

        println!("{:?}", shared_list.to_vec().await?);
        manager.shutdown().await
    })
}
