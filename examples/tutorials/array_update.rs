//! Twin of 'Using Array (Shared List)' in 'Multiprocessing in Python'.

use multiprocess::{self as mp, Array, Process};

fn update(shared_array: Array<i32>) {
    shared_array.set(0, 100);
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let shared_array = Array::from_slice(&[1, 2, 3])?;
        let mut p = Process::spawn(update, (shared_array.clone(),))?;
        p.join().await?;
        println!("{:?}", shared_array.to_vec());
        Ok(())
    })
}
