//! Twin of 'Using Value and Array for Shared Memory' in 'What is multiprocessing?'.

use multiprocess::{self as mp, Process, Value};

fn worker(val: Value<i32>) {
    val.fetch_add(1);
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let val = Value::new(0)?;
        let mut process = Process::spawn(worker, (val.clone(),))?;
        process.join().await?;
        println!("{}", val.get());
        Ok(())
    })
}
