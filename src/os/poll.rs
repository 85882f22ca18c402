//! [poll(2)](https://man7.org/linux/man-pages/man2/poll.2.html), which fails where the kernel has no memory for the moment.

use super::refuse;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// How often a call is repeated: no caller can go on without an answer.
const TRIES: u32 = 16;

/// Waits until something is ready, or for so long; how many are. After a signal it waits for the rest of the time.
pub(crate) fn poll(fds: &mut [PollFd<'_>], limit: Option<&Timespec>) -> rustix::io::Result<usize> {
    let limit = limit.copied();
    let patience = limit.and_then(|limit| Duration::try_from(limit).ok()).filter(|patience| !patience.is_zero());
    let deadline = patience.and_then(|patience| Instant::now().checked_add(patience));
    let mut left = limit;
    again(|| {
        refuse::at("poll")?;
        let polled = rustix::event::poll(fds, left.as_ref());
        if polled.is_err()
            && let Some(deadline) = deadline
        {
            left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).ok();
        }
        polled
    })
}

/// Which of `fds` can be read or have hung up, once one has; none of them after `limit`.
pub(crate) fn readable(fds: &[BorrowedFd<'_>], limit: Option<Duration>) -> io::Result<Vec<bool>> {
    let mut fds: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    poll(&mut fds, limit.as_ref())?;
    Ok(fds.iter().map(|fd| !fd.revents().is_empty()).collect())
}

/// A call that must not be lost, again if it is interrupted or there is no memory for it at the moment.
pub(super) fn again<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    for _ in 1..TRIES {
        match rustix::io::retry_on_intr(&mut call) {
            Err(Errno::NOMEM | Errno::NOBUFS | Errno::AGAIN | Errno::MFILE) => std::thread::yield_now(),
            called => return called,
        }
    }
    call()
}
