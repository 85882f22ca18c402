//! W20: many processes sleep until one wakes them all.

use crate::cli::Metrics;
use crate::shm::Shared;
use crate::size::SLEEPERS;
use crate::stats::{now_ns, quantile};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};
use std::thread::sleep;
use std::time::Duration;

/// How often all of them are woken.
pub const WAKES: u32 = 7;

/// What the processes share beside the thing that they sleep on.
pub struct Crowd {
    about_to_sleep: AtomicU32,
    awake: AtomicU32,
    last_awake: AtomicU64,
}

impl Crowd {
    /// A sleeper: each `sleep_until` returns after one wake.
    pub fn sleeper(&self, sleep_until: impl Fn(u32)) {
        for wake in 0..WAKES {
            self.about_to_sleep.fetch_add(1, AcqRel);
            sleep_until(wake);
            self.last_awake.fetch_max(now_ns(), AcqRel);
            self.awake.fetch_add(1, AcqRel);
        }
    }
}

fn wait_for(count: &AtomicU32, rounds: u32) {
    while count.load(Acquire) < rounds * SLEEPERS as u32 {
        sleep(Duration::from_millis(1));
    }
}

/// How long after each `wake_all` the last of [`SLEEPERS`] processes was awake.
pub fn last_awake(crowd: Shared<Crowd>, wake_all: impl Fn(u32)) -> Metrics {
    let ms = (0..WAKES).map(|wake| {
        wait_for(&crowd.about_to_sleep, wake + 1);
        // The last of them go to sleep meanwhile.
        sleep(Duration::from_millis(100));
        crowd.last_awake.store(0, Release);
        let at = now_ns();
        wake_all(wake);
        wait_for(&crowd.awake, wake + 1);
        crowd.last_awake.load(Acquire).saturating_sub(at) as f64 / 1e6
    });
    vec![("last_ms", quantile(&ms.collect::<Vec<_>>(), 0.5))]
}
