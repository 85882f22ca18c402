//! Signals: what a process of ours blocks, inherits and dies of.

use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Blocks every signal for this process and makes SIGCHLD readable instead.
pub(crate) fn block_all_but_children() -> io::Result<OwnedFd> {
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
    let mut child = SigSet::empty();
    child.add(nix::sys::signal::Signal::SIGCHLD);
    let signals = SignalFd::with_flags(&child, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    signals.as_fd().try_clone_to_owned()
}

/// Empties what [`block_all_but_children`] made, so that the next signal makes it readable again.
pub(crate) fn drain(signals: BorrowedFd<'_>) {
    let mut buffer = [0; 128];
    while rustix::io::read(signals, &mut buffer).is_ok_and(|n| n > 0) {}
}

/// For a process with several threads, where blocking is not enough: ignores what a terminal or a shell sends to a
/// whole group. Programs that it execs must [`reset_ignored`].
pub(crate) fn ignore_group_signals() {
    for signal in
        [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGTSTP, libc::SIGUSR1, libc::SIGUSR2]
    {
        // SAFETY: SIG_IGN is no handler that could run.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Whether the kernel reaps the children of this process as they end. One that has ended before stays to be reaped.
pub(crate) fn reap_by_kernel(yes: bool) {
    // SAFETY: SIG_IGN and SIG_DFL are no handlers that could run.
    unsafe { libc::signal(libc::SIGCHLD, if yes { libc::SIG_IGN } else { libc::SIG_DFL }) };
}

/// What SIGCHLD did when [`keep_child_action`] looked.
static CHILD_ACTION: std::sync::OnceLock<libc::sigaction> = std::sync::OnceLock::new();

fn child_action() -> Option<libc::sigaction> {
    // SAFETY: all zeros is a valid `sigaction`; it lives on this stack, and nothing is changed.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        (libc::sigaction(libc::SIGCHLD, std::ptr::null(), &mut now) == 0).then_some(now)
    }
}

/// Remembers what SIGCHLD does now, for [`restore_child_action`] in processes that are forked from this one.
pub(crate) fn keep_child_action() {
    if let Some(action) = child_action() {
        // Kept once; a second look would find what we set.
        let _ = CHILD_ACTION.set(action);
    }
}

/// Gives SIGCHLD the action that was kept, a handler included; without one its default.
pub(crate) fn restore_child_action() {
    match CHILD_ACTION.get() {
        // SAFETY: the action was this program's own before, so a handler in it is one that may run here.
        Some(action) => _ = unsafe { libc::sigaction(libc::SIGCHLD, action, std::ptr::null_mut()) },
        None => reap_by_kernel(false),
    }
}

/// Has children that end wait for being reaped, whoever handles SIGCHLD in this process.
pub(crate) fn stop_reaping_by_kernel() {
    let Some(mut action) = child_action() else { return };
    if action.sa_sigaction == libc::SIG_IGN {
        reap_by_kernel(false);
    } else if action.sa_flags & libc::SA_NOCLDWAIT != 0 {
        action.sa_flags &= !libc::SA_NOCLDWAIT;
        // SAFETY: the handler, if there is one, stays the one that the program has set.
        let _ = unsafe { libc::sigaction(libc::SIGCHLD, &action, std::ptr::null_mut()) };
    }
}

/// Ignores what Ctrl-C sends to everybody in the foreground.
pub(crate) fn ignore_interrupt() {
    // SAFETY: SIG_IGN is no handler that could run.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
}

pub(crate) fn unblock_all() {
    // Cannot fail: the arguments are constants.
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
}

/// Undoes what an exec inherited: ignored signals get their default action again, except SIGPIPE, which Rust
/// programs ignore. Handlers that this process has set since stay.
pub(crate) fn reset_ignored() {
    for signal in 1..=64 {
        let wanted = if signal == libc::SIGPIPE { libc::SIG_IGN } else { libc::SIG_DFL };
        // SAFETY: both structures live on this stack; SIG_IGN and SIG_DFL are no handlers that could run. Numbers
        // that the C library keeps for itself are refused with EINVAL.
        unsafe {
            let mut now: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(signal, std::ptr::null(), &mut now) != 0 {
                continue;
            }
            let is_default_pipe = signal == libc::SIGPIPE && now.sa_sigaction == libc::SIG_DFL;
            let is_ignored = signal != libc::SIGPIPE && now.sa_sigaction == libc::SIG_IGN;
            if is_default_pipe || is_ignored {
                now.sa_sigaction = wanted;
                libc::sigaction(signal, &now, std::ptr::null_mut());
            }
        }
    }
}

/// A second description of the read end of `pipe`, for one process to [`die_with`].
pub(crate) fn reopen(pipe: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
}

/// Ties this process to the holder of the write end of a pipe: when that closes, the kernel kills us, whatever we
/// are doing. `own` is a description that only this process uses, because the tie belongs to the description.
/// Gives it back, to be kept, or `None` if the holder is gone already.
/// See [fcntl(2)](https://man7.org/linux/man-pages/man2/fcntl.2.html), F_SETSIG.
pub(crate) fn die_with(own: OwnedFd) -> io::Result<Option<OwnedFd>> {
    const F_SETSIG: libc::c_int = 10;
    let fcntl = |command, argument: libc::c_int| {
        // SAFETY: the descriptor is open, and none of the three commands takes a pointer.
        match unsafe { libc::fcntl(own.as_raw_fd(), command, argument) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    fcntl(F_SETSIG, libc::SIGKILL)?;
    fcntl(libc::F_SETOWN, std::process::id() as libc::c_int)?;
    fcntl(libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK)?;
    Ok((!super::socket::is_hung_up(own.as_fd())).then_some(own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_too_late_is_told() {
        let (read, write) = std::io::pipe().unwrap();
        let tied = die_with(reopen(read.as_fd()).unwrap()).unwrap();
        assert!(tied.is_some());
        drop(tied);
        drop(write);
        // SIGKILL would come only to a description that was armed before; this one is armed after.
        assert!(crate::os::socket::is_hung_up(read.as_fd()));
    }
}
