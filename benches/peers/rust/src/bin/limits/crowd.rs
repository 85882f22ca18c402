//! W20 by one futex.

use mpbench::cli::Metrics;
use mpbench::crowd::{Crowd, last_awake};
use mpbench::shm::{Shared, futex_wait, futex_wake};
use mpbench::size::SLEEPERS;
use mpbench::sys::fork;
use std::sync::atomic::{AtomicU32, Ordering::*};

pub fn futex() -> Metrics {
    let crowd: Shared<Crowd> = unsafe { Shared::zeroed() };
    let word: Shared<AtomicU32> = unsafe { Shared::zeroed() };
    let sleeper = || {
        crowd.sleeper(|wake| {
            while word.load(Acquire) == wake {
                futex_wait(&word, wake);
            }
        });
    };
    let children: Vec<_> = (0..SLEEPERS).map(|_| fork(sleeper)).collect();
    let metrics = last_awake(crowd, |wake| {
        word.store(wake + 1, Release);
        futex_wake(&word, i32::MAX);
    });
    children.into_iter().for_each(|child| child.wait());
    metrics
}
