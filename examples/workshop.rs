//! A workshop of four processes: how they wait for each other and take turns. Each does what its machine, the price list and the store permit.
//!
//! All begin together (`Barrier`), two machines are for four (`Semaphore`), prices are read by many and changed by one (`RwLock`), a store is refilled when it
//! is empty (`Condition`), the door closes once (`Event`), and a failure of the program itself sends everybody home (`CancellationGuard`).
//!
//! `cargo run --example workshop`

use multiprocess::{
    self as mp, Barrier, BoundedSemaphore, CancellationToken, Condition, Event, Group, RLock, RwLock, Semaphore, Value,
};
use serde::{Deserialize, Serialize};

const WORKERS: u64 = 4;
const PIECES: u64 = 5;

/// Handles are values: a struct of them is one, too.
#[derive(Clone, Serialize, Deserialize)]
struct Workshop {
    start: Barrier,
    machines: Semaphore,
    running: Value<u64>,
    prices: RwLock,
    price: Value<[u64; 2]>,
    store: Condition,
    material: Value<u64>,
    closed: Event,
    home: CancellationToken,
}

impl Workshop {
    fn new() -> mp::Result<Self> {
        Ok(Self {
            start: Barrier::new(WORKERS as usize)?,
            machines: Semaphore::new(2)?,
            running: Value::new(0)?,
            prices: RwLock::new()?,
            price: Value::new([10, 10])?,
            store: Condition::new()?,
            material: Value::new(0)?,
            closed: Event::new()?,
            home: CancellationToken::new()?,
        })
    }

    /// Takes one piece of material, and waits while there is none.
    async fn take(&self) -> mp::Result<()> {
        let guard = self.store.lock().await?;
        let _guard = self.store.wait_for(guard, || self.material.get() > 0).await?;
        self.material.fetch_sub(1);
        Ok(())
    }

    async fn refill(&self, pieces: u64) -> mp::Result<()> {
        let _guard = self.store.lock().await?;
        self.material.fetch_add(pieces);
        self.store.notify_all();
        Ok(())
    }

    /// Two numbers that belong together: nobody sees one of them changed and the other not.
    async fn raise_prices(&self) -> mp::Result<()> {
        let _guard = self.prices.write().await?;
        let [buy, sell] = self.price.get();
        self.price.set([buy + 1, sell + 1]);
        Ok(())
    }

    /// What this worker has made, and at how many pieces the two prices differed.
    async fn work(&self) -> mp::Result<(u64, u64)> {
        let is_first = self.start.wait().await?.is_leader();
        if is_first {
            self.raise_prices().await?;
        }
        let mut differed = 0;
        for _ in 0..PIECES {
            self.take().await?;
            let _machine = self.machines.acquire().await?;
            assert!(self.running.fetch_add(1) < 2, "a machine has one user");
            let _guard = self.prices.read().await?;
            let [buy, sell] = self.price.get();
            differed += u64::from(buy != sell);
            self.running.fetch_sub(1);
        }
        self.closed.wait().await?;
        Ok((PIECES, differed))
    }
}

async fn worker(workshop: Workshop) -> mp::Result<Option<(u64, u64)>> {
    workshop.home.run_until_cancelled(workshop.work()).await.transpose()
}

/// A function that has the lock calls one that takes it too: an `RLock` counts, where a `Lock` would wait for itself.
fn tidy(bench: &RLock, depth: u32) -> mp::Result<u32> {
    let _guard = bench.blocking_acquire()?;
    if depth == 0 { Ok(0) } else { Ok(1 + tidy(bench, depth - 1)?) }
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let workshop = Workshop::new()?;
        // Dropped by an early return, it sends the workers home.
        let sends_home = workshop.home.clone().drop_guard();
        let mut workers = Group::new();
        for _ in 0..WORKERS {
            workers.spawn(worker, (workshop.clone(),))?;
        }
        for _ in 0..PIECES {
            workshop.refill(WORKERS).await?;
        }
        workshop.closed.set();
        let (mut made, mut differed) = (0, 0);
        for done in workers.join_all().await {
            let (pieces, differences) = done??.expect("nobody was sent home");
            (made, differed) = (made + pieces, differed + differences);
        }
        sends_home.disarm();
        println!("{made} pieces, {differed} with two prices, the price is {:?} now", workshop.price.get());

        let bench = RLock::new()?;
        let child = mp::Process::spawn(|bench: RLock| tidy(&bench, 3), (bench.clone(),))?;
        println!("tidied {} levels deep", child.await??);

        // A bounded semaphore refuses to have more permits than it began with: a `release` too many is found.
        let keys = BoundedSemaphore::new(1)?;
        keys.acquire().await?.forget();
        keys.release()?;
        println!("one key too many: {}", keys.release().is_err());
        Ok(())
    })
}
