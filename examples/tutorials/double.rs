//! Twin of 'Using apply_async() for Non-Blocking Execution' in 'What is multiprocessing?'.

use multiprocess::{self as mp, Pool};

fn double(n: i64) -> i64 {
    n * 2
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let pool = Pool::new(2)?;
        let result = pool.apply_async(double, (5,)); // a worker has it now
        println!("{}", result.await?);
        Ok(())
    })
}
