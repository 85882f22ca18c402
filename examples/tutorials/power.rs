//! Twin of 'Using apply_async() for Asynchronous Execution' in 'Multiprocessing in Python'.

use multiprocess::{self as mp, Pool};

fn power(n: i64) -> i64 {
    n.pow(2)
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let pool = Pool::new(2)?;
        let result = pool.apply_async(power, (5,));
        // Anything may happen here meanwhile.
        println!("{}", result.await?);
        Ok(())
    })
}
