//! An error without a serde form, such as `anyhow::Error`, becomes the crate's own.
use multiprocess::{Manager, Pool, Process, Proxy};

struct Store;

impl Store {
    fn new() -> Self {
        Self
    }
    fn read(&mut self, path: String) -> anyhow::Result<String> {
        Ok(std::fs::read_to_string(path)?)
    }
}

fn read(path: String) -> anyhow::Result<String> {
    Ok(std::fs::read_to_string(path)?)
}

async fn read_later(path: String) -> anyhow::Result<String> {
    read(path)
}

async fn all(pool: Pool, manager: Manager) -> multiprocess::Result<()> {
    let _ = Process::spawn(read, (String::new(),));
    let _ = Process::spawn(read_later, (String::new(),));
    let _ = pool.map(read, vec![String::new()]).await;
    let store: Proxy<Store> = manager.create(Store::new, ()).await?;
    let _ = store.call(Store::read, (String::new(),)).await;
    Ok(())
}

fn main() {}
