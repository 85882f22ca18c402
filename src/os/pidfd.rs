//! [pidfd_open(2)](https://man7.org/linux/man-pages/man2/pidfd_open.2.html): a process by descriptor, immune to pid reuse.

use rustix::process::{Pid, PidfdFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

pub(crate) fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid as i32).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Whether the process has ended, reaped or not.
pub(crate) fn has_exited(pidfd: BorrowedFd<'_>) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    rustix::io::retry_on_intr(|| poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))).is_ok_and(|n| n > 0)
}

/// Whether no process of this pid runs.
pub(crate) fn is_gone(pid: u32) -> bool {
    match open(pid) {
        Ok(pidfd) => has_exited(pidfd.as_fd()),
        Err(error) => error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()),
    }
}
