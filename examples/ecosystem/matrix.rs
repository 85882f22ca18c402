//! A matrix in shared memory, in place as views of `ndarray` in each process: a heat map whose two halves two processes compute.
//!
//! `cargo run -p multiprocess-ecosystem --example matrix`

use multiprocess::{self as mp, Array, Process};
use ndarray::{Axis, s};

const ROWS: usize = 4;
const COLUMNS: usize = 6;

/// Fills some rows of the matrix: nothing is copied on the way.
fn heat(matrix: Array<f64>, from: usize, to: usize) -> mp::Result<()> {
    let mut guard = matrix.blocking_lock()?;
    let mut view = guard.view_mut((ROWS, COLUMNS))?;
    for ((row, column), cell) in view.slice_mut(s![from..to, ..]).indexed_iter_mut() {
        *cell = ((from + row) * column) as f64;
    }
    Ok(())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let matrix = Array::zeroed(ROWS * COLUMNS)?;
        let halves = [(0, ROWS / 2), (ROWS / 2, ROWS)];
        let children = halves.map(|(from, to)| Process::spawn(heat, (matrix.clone(), from, to)));
        for child in children {
            child?.await??;
        }
        let guard = matrix.lock().await?;
        let view = guard.view((ROWS, COLUMNS))?;
        println!("{view}");
        println!("sums of the rows: {}", view.sum_axis(Axis(1)));
        println!("a wrong shape: {}", guard.view((ROWS, ROWS)).unwrap_err());
        Ok(())
    })
}
