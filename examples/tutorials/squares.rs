//! Twin of 'Process Pools' in 'Multiprocessing Module', which is also 'Using a Process Pool' in
//! 'What is multiprocessing?' and 'Using multiprocessing.Pool' in 'Multiprocessing in Python'.

use multiprocess::{self as mp, Pool};

fn square(n: i64) -> i64 {
    n * n
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let pool = Pool::new(4)?; // 4 worker processes
        let results = pool.map(square, [1, 2, 3, 4, 5]).await?;
        println!("{results:?}");
        Ok(())
    })
}
