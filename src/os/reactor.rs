//! tokio's reactor: a descriptor that wakes a task.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{Interest, unix::AsyncFd};
use tokio::runtime::Handle;
use tokio::time::Timeout;

/// Registers `fd` with the reactor of the current runtime.
///
/// # Errors
/// Outside a runtime, and in one that was built without I/O.
pub(crate) fn watch(fd: Arc<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the `Arc` is moved into the result, so the descriptor stays open, and the same, until it is
    // deregistered.
    or_error(|| Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?))
}

/// `future`, for so long.
///
/// # Errors
/// Outside a runtime, and in one that was built without a timer.
pub(crate) fn limited<F: Future>(timeout: Duration, future: F) -> io::Result<Timeout<F>> {
    let missing = || io::Error::other("a timeout needs a tokio runtime with its timer (`enable_all` or `enable_time`)");
    Handle::try_current().map_err(|_| missing())?;
    unless_it_panics(|| Ok(tokio::time::timeout(timeout, future)), missing)
}

/// Whether [`limited`] works here.
pub(crate) fn has_timer() -> io::Result<()> {
    limited(Duration::ZERO, std::future::ready(())).map(drop)
}

pub(super) fn or_error<T>(register: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let missing = || io::Error::other("this needs a tokio runtime with its I/O driver (`enable_all` or `enable_io`)");
    unless_it_panics(register, missing)
}

/// tokio panics where there is no such driver, and has no way to ask first.
fn unless_it_panics<T>(make: impl FnOnce() -> io::Result<T>, missing: impl FnOnce() -> io::Error) -> io::Result<T> {
    // Nothing of ours is touched by it but what it drops.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(make)).unwrap_or_else(|_| Err(missing()))
}
