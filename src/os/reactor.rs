//! tokio's reactor: a descriptor that wakes a task.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tokio::io::{Interest, unix::AsyncFd};

/// Registers `fd` with the reactor of the current runtime.
///
/// # Panics
/// Outside a runtime, and in one that was built without I/O, as all of tokio does.
#[track_caller]
pub(crate) fn watch(fd: Arc<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the `Arc` is moved into the result, so the descriptor stays open, and the same, until it is
    // deregistered.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
