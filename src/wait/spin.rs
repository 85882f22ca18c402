//! Adaptive spinning: trying again for a short while before sleeping, as a wake costs 20 us and the answer often comes sooner.
//!
//! The length of that while, the window, is learned for each wait queue. It grows when spinning paid, halves down to none when
//! it did not, and is tried anew now and then. So waits that are long, or that need the CPU that spins, stop spinning. An answer
//! that took as long as a wake pays once, for the peer may be in step from now on. Twice in a row means that it sleeps each time.
//!
//! A process that has just seen its peer awake can encourage the next wait to spin: shortly at first, then for the longest
//! window. After a failure that is ignored for a number of times, which doubles with each failure. A late answer from a peer that
//! was awake took work, not a wake: the next may take as long.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Longer than this is never worth it: it is the price of the wakes that it saves, there and back. It is also long enough
/// for a sleeping peer to wake up and answer, which is how two sleepers get into step again.
const LONGEST_NS: u32 = 50_000;
/// A shorter while is none.
const SHORTEST_NS: u32 = 1_000;
/// An answer from a peer that is awake comes sooner, and one from a peer that has to be woken later.
const AWAKE_NS: u32 = 12_000;
/// The first window after an encouragement.
const ENCOURAGED_NS: u32 = 10_000;
const MOST_IGNORED: u32 = 64;
/// The part spent without letting other tasks run.
const IN_PLACE: Duration = Duration::from_micros(4);
/// Of so many waits that go straight to sleep, one tries whether spinning pays again.
const TRY_ONE_IN: u32 = 32;

pub(crate) struct Spin {
    window_ns: AtomicU32,
    skipped: AtomicU32,
    /// The last answer that spinning found came from a peer that had been asleep.
    was_asleep: AtomicBool,
    /// Encouragements to be ignored, and how many it will be after the next that was in vain.
    ignored: AtomicU32,
    ignores: AtomicU32,
    is_encouraged: AtomicBool,
    /// The while of the next that is encouraged.
    encouraged_ns: AtomicU32,
    /// The peer of the next wait is known to be awake.
    is_peer_awake: AtomicBool,
}

impl Default for Spin {
    fn default() -> Self {
        let window = if has_spare_cpu() { LONGEST_NS } else { 0 };
        let (window_ns, ignores) = (AtomicU32::new(window), AtomicU32::new(1));
        let (skipped, was_asleep, ignored, is_encouraged, is_peer_awake) = Default::default();
        let encouraged_ns = AtomicU32::new(ENCOURAGED_NS);
        Self { window_ns, skipped, was_asleep, ignored, ignores, is_encouraged, encouraged_ns, is_peer_awake }
    }
}

/// CPUs that this process may use, as far as is known.
pub(super) fn cpus() -> u32 {
    static CPUS: OnceLock<u32> = OnceLock::new();
    *CPUS.get_or_init(|| std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32))
}

/// On one CPU the other side cannot run while we spin.
fn has_spare_cpu() -> bool {
    cpus() > 1
}

/// One spell of spinning.
pub(super) struct SpinWindow {
    started: Instant,
    window: Duration,
}

impl Spin {
    /// No wait spins for longer.
    pub(crate) const LONGEST: Duration = Duration::from_nanos(LONGEST_NS as u64);

    /// The other side is awake: the next answer may come at once.
    pub(crate) fn encourage(&self) {
        self.is_peer_awake.store(true, Relaxed);
        let encouraged = self.encouraged_ns.load(Relaxed);
        if self.window_ns.load(Relaxed) >= encouraged || !has_spare_cpu() {
            return;
        }
        match self.ignored.load(Relaxed) {
            0 => {
                self.window_ns.store(encouraged, Relaxed);
                self.is_encouraged.store(true, Relaxed);
            }
            left => self.ignored.store(left - 1, Relaxed),
        }
    }

    pub(super) fn begin(&self) -> Option<SpinWindow> {
        let mut window = self.window_ns.load(Relaxed);
        if window == 0 {
            let skipped = self.skipped.fetch_add(1, Relaxed);
            if skipped % TRY_ONE_IN != TRY_ONE_IN - 1 || !has_spare_cpu() {
                return None;
            }
            window = LONGEST_NS;
        }
        Some(SpinWindow { started: Instant::now(), window: Duration::from_nanos(window.into()) })
    }

    /// Spins without a break for a while; `Some` if the attempt succeeded.
    pub(super) fn in_place<T>(&self, run: &SpinWindow, attempt: &mut impl FnMut() -> Option<T>) -> Option<T> {
        let end = Instant::now() + run.window.min(IN_PLACE);
        loop {
            for _ in 0..16 {
                std::hint::spin_loop();
            }
            let found = attempt();
            if found.is_some() {
                self.paid(run);
                return found;
            }
            if Instant::now() >= end {
                return None;
            }
        }
    }

    pub(super) fn is_over(&self, run: &SpinWindow) -> bool {
        let over = run.started.elapsed() >= run.window;
        if over {
            self.is_peer_awake.store(false, Relaxed);
            if self.is_encouraged.swap(false, Relaxed) && self.encouraged_ns.swap(LONGEST_NS, Relaxed) == LONGEST_NS {
                let ignores = self.ignores.load(Relaxed);
                self.ignored.store(ignores, Relaxed);
                self.ignores.store((2 * ignores).min(MOST_IGNORED), Relaxed);
                self.encouraged_ns.store(ENCOURAGED_NS, Relaxed);
            }
            let window = self.window_ns.load(Relaxed) / 2;
            self.window_ns.store(if window < SHORTEST_NS { 0 } else { window }, Relaxed);
        }
        over
    }

    pub(super) fn paid(&self, run: &SpinWindow) {
        let took = run.started.elapsed().as_nanos().min(LONGEST_NS.into()) as u32;
        if self.is_encouraged.swap(false, Relaxed) {
            self.ignores.store(1, Relaxed);
        }
        let faded = self.window_ns.load(Relaxed) / 16 * 15;
        let was_awake = self.is_peer_awake.swap(false, Relaxed);
        let window = match took > AWAKE_NS && !was_awake {
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
    fn looking_that_never_pays_stops_and_is_tried_again_now_and_then() {
        let look = Spin { window_ns: AtomicU32::new(LONGEST_NS), ..Spin::default() };
        for _ in 0..8 {
            if let Some(run) = look.begin() {
                while !look.is_over(&run) {}
            }
        }
        assert_eq!(look.window_ns.load(Relaxed), 0);
        let tried = (0..2 * TRY_ONE_IN).filter(|_| look.begin().is_some()).count();
        assert_eq!(tried, if has_spare_cpu() { 2 } else { 0 });
    }
}
