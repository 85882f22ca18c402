//! Looking again for a short while before sleeping, for a wake costs 20 us and the answer often comes sooner.
//!
//! The while is learned per event: it grows when looking paid, halves when it did not, down to a glance, and is tried
//! anew now and then. So waits that are long, or that need the CPU we look with, stop being looked for. An answer that
//! took as long as a wake pays once, for the peer may be in step from now on; twice in a row it is asleep each time.
//!
//! Two who take turns get into step so: one of them tries a long look, in which the other wakes up and answers. That one
//! then takes its glance, and the next request comes within it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Longer than this is never worth it: it is the price of the wakes that it saves, there and back. It is also long enough
/// for a sleeping peer to wake up and answer, which is how two sleepers get into step again.
const LONGEST_NS: u32 = 50_000;
/// A glance: the next request of a peer that is awake comes within it. It costs less than the sleep that it may save.
const SHORTEST_NS: u32 = 2_000;
/// An answer from a peer that is awake comes sooner, and one from a peer that has to be woken later.
const AWAKE_NS: u32 = 12_000;
/// The part spent without letting other tasks run.
const IN_PLACE: Duration = Duration::from_micros(4);
/// Of so many waits that only glance, one tries whether looking pays again.
const TRY_ONE_IN: u32 = 32;

pub(crate) struct Look {
    window_ns: AtomicU32,
    skipped: AtomicU32,
    /// The last answer that looking found came from a peer that had been asleep.
    was_asleep: AtomicBool,
}

impl Default for Look {
    fn default() -> Self {
        let window = if has_spare_cpu() { LONGEST_NS } else { 0 };
        Self { window_ns: AtomicU32::new(window), skipped: AtomicU32::new(0), was_asleep: AtomicBool::new(false) }
    }
}

/// On one CPU the other side cannot run while we look.
fn has_spare_cpu() -> bool {
    static CPUS: OnceLock<bool> = OnceLock::new();
    *CPUS.get_or_init(|| std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1))
}

/// One while of looking.
pub(super) struct Looking {
    started: Instant,
    window: Duration,
}

impl Look {
    pub(super) fn begin(&self) -> Option<Looking> {
        let mut window = self.window_ns.load(Relaxed);
        if window == 0 {
            let skipped = self.skipped.fetch_add(1, Relaxed);
            if !has_spare_cpu() {
                return None;
            }
            window = if skipped % TRY_ONE_IN == TRY_ONE_IN - 1 { LONGEST_NS } else { SHORTEST_NS };
        }
        Some(Looking { started: Instant::now(), window: Duration::from_nanos(window.into()) })
    }

    /// Looks without a break for a while; `Some` if it was worth it.
    pub(super) fn in_place<T>(&self, looking: &Looking, attempt: &mut impl FnMut() -> Option<T>) -> Option<T> {
        let end = Instant::now() + looking.window.min(IN_PLACE);
        loop {
            for _ in 0..4 {
                std::hint::spin_loop();
            }
            let found = attempt();
            if found.is_some() {
                self.paid(looking);
                return found;
            }
            if Instant::now() >= end {
                return None;
            }
        }
    }

    pub(super) fn is_over(&self, looking: &Looking) -> bool {
        let over = looking.started.elapsed() >= looking.window;
        if over {
            let window = self.window_ns.load(Relaxed) / 2;
            self.window_ns.store(if window < SHORTEST_NS { 0 } else { window }, Relaxed);
        }
        over
    }

    pub(super) fn paid(&self, looking: &Looking) {
        let took = looking.started.elapsed().as_nanos().min(LONGEST_NS.into()) as u32;
        let faded = self.window_ns.load(Relaxed) / 16 * 15;
        let window = match took > AWAKE_NS {
            true if self.was_asleep.swap(true, Relaxed) => 0,
            true => LONGEST_NS,
            false => {
                self.was_asleep.store(false, Relaxed);
                faded.max(8 * took).clamp(2 * SHORTEST_NS, LONGEST_NS)
            }
        };
        self.window_ns.store(window, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_that_never_pays_becomes_a_glance_and_is_tried_again_now_and_then() {
        let look = Look { window_ns: AtomicU32::new(LONGEST_NS), ..Look::default() };
        for _ in 0..8 {
            if let Some(looking) = look.begin() {
                while !look.is_over(&looking) {}
            }
        }
        assert_eq!(look.window_ns.load(Relaxed), 0);
        let windows: Vec<_> =
            (0..2 * TRY_ONE_IN).filter_map(|_| Some(look.begin()?.window.as_nanos() as u32)).collect();
        let count = |window| windows.iter().filter(|other| **other == window).count() as u32;
        let expected = if has_spare_cpu() { (2, 2 * (TRY_ONE_IN - 1)) } else { (0, 0) };
        assert_eq!((count(LONGEST_NS), count(SHORTEST_NS)), expected);
    }
}
