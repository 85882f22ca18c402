//! tokio's reactor: a descriptor that wakes a task.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tokio::io::{Interest, unix::AsyncFd};

/// Registers `fd` with the reactor of the current runtime.
///
/// # Errors
/// Outside a runtime, and in one that was built without I/O.
pub(crate) fn watch(fd: Arc<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the `Arc` is moved into the result, so the descriptor stays open, and the same, until it is
    // deregistered.
    or_error(|| Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?))
}

/// tokio panics where there is no reactor, and has no way to ask first.
pub(super) fn or_error<T>(register: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let missing = |_| io::Error::other("this needs a tokio runtime with its I/O driver (`enable_all` or `enable_io`)");
    // Nothing of ours is touched by it but what it drops.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(register)).unwrap_or_else(|panic| Err(missing(panic)))
}
