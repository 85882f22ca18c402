//! [epoll(7)](https://man7.org/linux/man-pages/man7/epoll.7.html): waiting for several descriptors at once, by edges.

use super::reactor::{self, Watched};
use super::refuse;
use rustix::event::{Timespec, epoll};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers `fd` with the current tokio runtime, for edges of readiness to read.
///
/// # Errors
/// If there is no runtime, it has no I/O driver, or the descriptor cannot be polled.
pub(crate) fn register<F: AsFd + AsRawFd>(fd: F) -> io::Result<Watched<F>> {
    reactor::or_error(|| {
        refuse::at("epoll_ctl")?;
        // SAFETY: `F` owns or borrows an open descriptor (`AsFd`) for as long as the `AsyncFd` holds it.
        Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE)? })
    })
    .map(Watched::new)
}

pub(crate) struct Epoll(OwnedFd);

impl Epoll {
    pub(crate) fn new() -> io::Result<Self> {
        refuse::at("epoll_create")?;
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    pub(crate) fn watch_edges(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        refuse::at("epoll_ctl")?;
        Ok(epoll::add(&self.0, fd, epoll::EventData::new_u64(0), flags)?)
    }

    /// Waits for an edge; false at the deadline. A signal counts as an edge.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> io::Result<bool> {
        let timeout = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = timeout.map(|d| Timespec { tv_sec: d.as_secs() as i64, tv_nsec: i64::from(d.subsec_nanos()) });
        let mut events = [MaybeUninit::uninit(); 4];
        match refuse::at("epoll_wait").and_then(|()| epoll::wait(&self.0, &mut events, timeout.as_ref())) {
            Ok((events, _)) => Ok(!events.is_empty()),
            Err(rustix::io::Errno::INTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }
}
