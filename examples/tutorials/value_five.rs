//! Twin of 'Shared Memory (Value & Array)' in 'Multiprocessing in Python: Introduction'.

use futures::future::try_join_all;
use multiprocess::{self as mp, Process, Value};

fn increment(shared_value: Value<i32>) {
    shared_value.fetch_add(1);
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let val = Value::new(0)?;
        let processes = (0..5).map(|_| Process::spawn(increment, (val.clone(),)));
        try_join_all(processes.collect::<mp::Result<Vec<_>>>()?).await?;
        println!("{}", val.get());
        Ok(())
    })
}
