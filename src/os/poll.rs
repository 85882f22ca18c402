//! [poll(2)](https://man7.org/linux/man-pages/man2/poll.2.html), which fails where the kernel has no memory for the moment.

use super::refuse;
use rustix::event::{PollFd, Timespec};
use rustix::io::Errno;

/// So often it is asked again: nobody who asks has a way to go on without an answer.
const TRIES: u32 = 16;

/// Waits until something is ready, or for so long; how many are. A signal makes it wait again.
pub(crate) fn poll(fds: &mut [PollFd<'_>], limit: Option<&Timespec>) -> rustix::io::Result<usize> {
    again(|| {
        refuse::at("poll")?;
        rustix::event::poll(fds, limit)
    })
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
