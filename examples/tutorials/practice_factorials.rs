//! Twin of Practice Question 3 in 'Python multiprocessing Package': factorials from 1 to 10, printed as they come.

use futures::TryStreamExt;
use multiprocess::{self as mp, Pool};

fn factorial(n: u64) -> (u64, u64) {
    (n, (1..=n).product())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let pool = Pool::builder().build()?;
        let mut results = pool.imap(factorial, 1..=10);
        while let Some((n, result)) = results.try_next().await? {
            println!("{n}! = {result}");
        }
        Ok(())
    })
}
