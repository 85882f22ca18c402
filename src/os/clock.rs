//! [clock_gettime(2)](https://man7.org/linux/man-pages/man2/clock_gettime.2.html): a time that all processes share.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since some moment before this machine's first process, exact to a tick of the kernel (1 to 10 ms).
#[inline]
pub(crate) fn coarse_ns() -> u64 {
    ns(ClockId::MonotonicCoarse)
}

/// The same clock, exact.
#[inline]
pub(crate) fn now_ns() -> u64 {
    ns(ClockId::Monotonic)
}

#[inline]
fn ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
