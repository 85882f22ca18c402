//! [clock_gettime(2)](https://man7.org/linux/man-pages/man2/clock_gettime.2.html): a time that all processes share.
//!
//! By the C library: rustix finds the kernel's vDSO by itself, by a table that under valgrind is that of valgrind's process.

use nix::time::{ClockId, clock_getres, clock_gettime};
use std::sync::OnceLock;
use std::time::Duration;

/// Nanoseconds since some moment before this machine's first process, exact to a tick of the kernel (1 to 10 ms).
#[inline]
pub(crate) fn coarse_ns() -> u64 {
    ns(ClockId::CLOCK_MONOTONIC_COARSE)
}

/// The tick of [`coarse_ns`].
pub(crate) fn coarse_tick() -> Duration {
    static TICK: OnceLock<Duration> = OnceLock::new();
    // The longest of Linux, if it is not known.
    *TICK.get_or_init(|| clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).map_or(Duration::from_millis(10), Into::into))
}

/// The same clock, exact.
#[inline]
pub(crate) fn now_ns() -> u64 {
    ns(ClockId::CLOCK_MONOTONIC)
}

#[inline]
fn ns(clock: ClockId) -> u64 {
    // Both clocks are there on every Linux.
    clock_gettime(clock).map_or(0, |now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}
