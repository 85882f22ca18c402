//! Twin of 'Shared Memory (Value & Array)' in 'Multiprocessing Module'.

use multiprocess::{self as mp, Array, Process, Value};

async fn worker(val: Value<i32>, arr: Array<i32>) -> mp::Result<()> {
    val.fetch_add(1);
    arr.lock().await?[0] *= 2;
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let v = Value::new(0)?;
        let a = Array::from_slice(&[1, 2, 3])?;
        let mut p = Process::spawn(worker, (v.clone(), a.clone()))?;
        p.join().await??;
        println!("{} {:?}", v.get(), a.to_vec());
        Ok(())
    })
}
