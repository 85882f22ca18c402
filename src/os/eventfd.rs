//! [eventfd(2)](https://man7.org/linux/man-pages/man2/eventfd.2.html): a doorbell that any holder of the descriptor can ring.

use super::poll::again;
use super::refuse;
use rustix::event::EventfdFlags;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

pub(crate) fn create() -> io::Result<OwnedFd> {
    refuse::at("eventfd")?;
    Ok(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Resets the count, so that the next ring makes it readable again.
pub(crate) fn drain(eventfd: BorrowedFd<'_>) {
    // It fails if another holder has reset it.
    let _ = rustix::io::retry_on_intr(|| {
        refuse::at("read")?;
        rustix::io::read(eventfd, &mut [0; 8])
    });
}

/// Makes a new edge for every epoll that watches `eventfd`, read or not.
/// The counter cannot fill up: that takes 2^64 rings.
pub(crate) fn notify(eventfd: BorrowedFd<'_>) {
    // A lost ring would leave a process asleep.
    let _ = again(|| {
        refuse::at("write")?;
        rustix::io::write(eventfd, &1u64.to_ne_bytes())
    });
}
