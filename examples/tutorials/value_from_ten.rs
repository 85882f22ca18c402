//! Twin of 'Using Value (Shared Variable)' in 'Multiprocessing in Python'.

use multiprocess::{self as mp, Process, Value};

async fn increment(shared_value: Value<i32>) -> mp::Result<()> {
    // `+=` reads and writes, so it takes the guard.
    *shared_value.lock().await? += 1;
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let shared_value = Value::new(10)?;
        let mut p = Process::spawn(increment, (shared_value.clone(),))?;
        p.join().await??;
        println!("{}", shared_value.get());
        Ok(())
    })
}
