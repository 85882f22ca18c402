//! [pidfd_open(2)](https://man7.org/linux/man-pages/man2/pidfd_open.2.html): a process by descriptor, immune to pid reuse.

use super::call::named;
use super::poll::poll;
use crate::error::{Explained, Topic};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, waitid};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::OnceLock;
use std::time::Duration;

pub(crate) fn open(pid: u32) -> io::Result<OwnedFd> {
    // A number that the kernel never gives may come from damaged memory: it is no process's.
    let Some(pid @ 1..) = i32::try_from(pid).ok() else { return Err(Errno::SRCH.into()) };
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    super::refuse::at("pidfd_open")?;
    match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Err(error @ Errno::NOSYS) => {
            let why =
                "the kernel, or what this program runs under (valgrind up to 3.20, a sandbox), has no `pidfd_open`";
            Err(Explained::error(io::ErrorKind::Unsupported, Topic::NoPidfd, format!("{why}: {error}")))
        }
        done => done.map_err(named("pidfd_open")),
    }
}

/// Returns `true` if the process has ended, reaped or not.
pub(crate) fn has_exited(pidfd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|n| n > 0)
}

/// Distinguishes a process from a later one with its pid: the inode of its pidfd, which kernels from 6.9 on never give
/// twice. 0 if it has none, and the same for everybody on older kernels.
pub(crate) fn identity(pidfd: BorrowedFd<'_>) -> u64 {
    super::refuse::at("fstat").and_then(|()| rustix::fs::fstat(pidfd)).map_or(0, |stat| stat.st_ino)
}

/// Blocks this thread until the process has ended, or also been reaped (on newer kernels), or `limit` has passed.
pub(crate) fn wait(pidfd: BorrowedFd<'_>, reaped: bool, limit: Option<Duration>) -> bool {
    let mut fds = [PollFd::new(&pidfd, if reaped { PollFlags::empty() } else { PollFlags::IN })];
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    poll(&mut fds, limit.as_ref()).is_ok_and(|n| n > 0)
}

/// Sends `signal`, never to another process that got the same pid. One that has ended is no error.
pub(crate) fn signal(pidfd: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    let sent = super::refuse::at("pidfd_send_signal").and_then(|()| rustix::process::pidfd_send_signal(pidfd, signal));
    match sent {
        Err(Errno::SRCH) => Ok(()),
        done => Ok(done?),
    }
}

/// [`signal`] for a child of this process, also where that call is refused or missing. `pid` is the child's: as long as it has
/// not been reaped no other process has that.
pub(crate) fn signal_child(pidfd: BorrowedFd<'_>, pid: u32, by: Signal) -> io::Result<()> {
    let refused = match signal(pidfd, by) {
        Err(error) => error,
        done => return done,
    };
    match i32::try_from(pid).ok().and_then(Pid::from_raw) {
        Some(pid) if is_child(pidfd) => rustix::process::kill_process(pid, by).map_err(|_| refused),
        _ => Err(refused),
    }
}

/// Reaps the process if it is a child of this one and has ended.
pub(crate) fn reap(pidfd: BorrowedFd<'_>) -> Option<ExitStatus> {
    reap_by(WaitId::PidFd(pidfd))
}

/// The same for a process that is known by its pid only.
pub(crate) fn reap_by(id: WaitId<'_>) -> Option<ExitStatus> {
    let status = waitid(id, WaitIdOptions::EXITED | WaitIdOptions::NOHANG).ok()??;
    let signal = || status.terminating_signal().map(|signal| signal | if status.dumped() { 0x80 } else { 0 });
    status.exit_status().map(|code| code << 8).or_else(signal).map(ExitStatus::from_raw)
}

/// Returns `true` if the process is a child of this one that has not been reaped.
pub(crate) fn is_child(pidfd: BorrowedFd<'_>) -> bool {
    is_child_by(WaitId::PidFd(pidfd))
}

/// The same for a process that is known by its pid only.
pub(crate) fn is_child_by(id: WaitId<'_>) -> bool {
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    waitid(id, look).is_ok()
}

/// The same for a pid of any value.
pub(crate) fn is_child_of_pid(pid: u32) -> bool {
    i32::try_from(pid).ok().and_then(Pid::from_raw).is_some_and(|pid| is_child_by(WaitId::Pid(pid)))
}

/// The kernel's knowledge of the exit of a process that is not a child of this one.
#[derive(Debug, PartialEq)]
pub(crate) enum Exit {
    /// It runs, or has not been reaped yet.
    NotReaped,
    Known(ExitStatus),
    /// This kernel does not report it (before 6.15).
    Unknown,
}

/// [ioctl_pidfd(2)](https://man7.org/linux/man-pages/man2/PIDFD_GET_INFO.2const.html).
pub(crate) fn exit(pidfd: BorrowedFd<'_>) -> Exit {
    match ask(pidfd) {
        // Reaped while the kernel looked: it first found no status, then no process. Now there is one.
        Exit::Unknown => ask(pidfd),
        exit => exit,
    }
}

/// For tests: behaves as on kernels that do not report it.
fn is_old_kernel() -> bool {
    static IS_OLD: OnceLock<bool> = OnceLock::new();
    *IS_OLD.get_or_init(|| !super::secure::is_secure() && std::env::var_os("MULTIPROCESS_OLD_KERNEL").is_some())
}

fn ask(pidfd: BorrowedFd<'_>) -> Exit {
    if is_old_kernel() {
        return Exit::Unknown;
    }
    /// `struct pidfd_info`, first version.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        mask: u64,
        cgroup: u64,
        ids: [u32; 11],
        exit_code: i32,
    }
    const EXIT: u64 = 1 << 3;
    const GET_INFO: libc::Ioctl = (3 << 30 | size_of::<Info>() << 16 | 0xff << 8 | 11) as libc::Ioctl;
    // The kernel looks for the status first and for the process second: reaped in between, it finds neither.
    for _ in 0..2 {
        let mut info = Info { mask: EXIT, ..Info::default() };
        // SAFETY: the request's size field is that of `info`, so the kernel writes nothing beyond it.
        let done = unsafe { libc::ioctl(pidfd.as_raw_fd(), GET_INFO, &raw mut info) };
        match done {
            0 if info.mask & EXIT != 0 => return Exit::Known(ExitStatus::from_raw(info.exit_code)),
            0 => return Exit::NotReaped,
            _ if Errno::from_io_error(&io::Error::last_os_error()) != Some(Errno::SRCH) => {
                break;
            }
            _ => {}
        }
    }
    Exit::Unknown
}
