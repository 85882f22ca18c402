//! A method's result has to have a serde form; its object need not.
use multiprocess::{Manager, Proxy};

struct MyError;
struct Tally(u64);

impl Tally {
    fn new(start: u64) -> Self {
        Self(start)
    }
    fn half(&mut self) -> Result<u64, MyError> {
        if self.0 % 2 == 0 { Ok(self.0 / 2) } else { Err(MyError) }
    }
}

async fn halve(manager: Manager) -> multiprocess::Result<()> {
    let tally: Proxy<Tally> = manager.create(Tally::new, (3,)).await?;
    let _ = tally.call(Tally::half, ()).await;
    Ok(())
}

fn main() {}
