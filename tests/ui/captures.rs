//! A closure that captures cannot travel. What it captures is `Copy` here, so only a build finds out.
use multiprocess::{Manager, Pool, Process};

fn main() {
    let n = 5;
    let _ = Process::spawn(move |x: i32| x + n, (1,));
    let pool = Pool::new(1).unwrap();
    let _ = pool.map(move |x: i32| x + n, vec![1]);
    let _ = async |manager: Manager| manager.create(move |x: i32| x + n, (1,)).await;
}
