//! Twin of 'Task Distribution with Pool' in 'Python multiprocessing Package'.

use multiprocess::{self as mp, Pool};

fn factorial(n: u64) -> u64 {
    if n == 0 { 1 } else { n * factorial(n - 1) }
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let pool = Pool::new(4)?;
        let results = pool.map(factorial, 1..6).await?;
        println!("{results:?}");
        Ok(())
    })
}
