//! Twin of 'Pool' under 'Key Concepts' in 'Multiprocessing in Python'.

use multiprocess::{self as mp, Pool};

fn main() -> mp::Result<()> {
    mp::run(async {
        let pool = Pool::new(4)?;
        let result = pool.map(|n: i64| n * n, [1, 2, 3, 4]).await?;
        println!("{result:?}");
        Ok(())
    })
}
