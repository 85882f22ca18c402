//! Twin of 'Using apply() for Single Task Execution' in 'What is multiprocessing?', which is also
//! 'Using apply()' in 'Multiprocessing in Python'.

use multiprocess::{self as mp, Pool};

fn cube(n: i64) -> i64 {
    n.pow(3)
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let pool = Pool::new(2)?;
        let result = pool.apply(cube, (3,)).await?;
        println!("{result}");
        Ok(())
    })
}
