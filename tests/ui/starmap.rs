//! `map` calls a function of one argument.
use multiprocess::Pool;

fn add(a: i32, b: i32) -> i32 {
    a + b
}

async fn sums(pool: Pool) {
    let _ = pool.map(add, vec![(1, 2), (3, 4)]).await;
}

fn main() {}
