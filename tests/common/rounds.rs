//! Bounds on wall time, on a machine that does other things as well.
#![allow(dead_code)] // No file uses all of it.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// Repeats a round until what it measured is as it should be. Others may have the CPUs at any time, so this needs to hold
/// in one round only; what the round itself asserts holds in each.
pub async fn rounds<T: Debug>(
    mut round: impl AsyncFnMut() -> multiprocess::Result<T>,
    is_right: impl Fn(&T) -> bool,
) -> multiprocess::Result<()> {
    let (start, mut seen) = (Instant::now(), Vec::new());
    while seen.len() < 3 || seen.len() < 20 && start.elapsed() < Duration::from_secs(15) {
        let measured = round().await?;
        if is_right(&measured) {
            return Ok(());
        }
        seen.push(measured);
    }
    panic!("right in none of {} rounds: {seen:?}", seen.len());
}

/// The same, where each round blocks.
pub fn blocking_rounds<T: Debug>(mut round: impl FnMut() -> T, is_right: impl Fn(&T) -> bool) {
    futures::executor::block_on(rounds(async || Ok(round()), is_right)).expect("it returns no error");
}
