//! Twin of 'Using Shared Memory (Value)' in 'Python multiprocessing Package', and of its Practice Question 2: there
//! `+=` may lose increments, here it cannot.

use futures::future::try_join_all;
use multiprocess::{self as mp, Process, Value};

fn increment(val: Value<i32>) {
    val.fetch_add(1);
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let val = Value::new(0)?;
        let procs = (0..5).map(|_| Process::spawn(increment, (val.clone(),)));
        try_join_all(procs.collect::<mp::Result<Vec<_>>>()?).await?;
        println!("Final value: {}", val.get());
        Ok(())
    })
}
