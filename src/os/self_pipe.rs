//! What tokio hears signals by: a handler writes to one end of a pair of sockets, and a runtime reads at the other. There is one
//! pair for each process, made with its first runtime that has an I/O driver, and kept for good.
//!
//! Processes that are forked after that share the pair. The first one to read takes the news from the others, and one that
//! was busy at that moment never hears of its signal. So where the fork server has such a pair, because a preload or `main`
//! before `init` has built a runtime, each of its children puts a pair of its own in the place of the shared one. tokio does
//! not tell which descriptors those are: a signal is sent once, and the two sockets are those where a byte moves.

use super::{reactor, spawn};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use tokio::signal::unix::SignalKind;

/// Nobody listens to it, and by default it does nothing.
const QUIET: libc::c_int = libc::SIGURG;

/// The descriptors of each end.
struct Ends {
    receivers: Vec<RawFd>,
    senders: Vec<RawFd>,
}

static SHARED: OnceLock<Ends> = OnceLock::new();

/// In the fork server, once it has run what it preloads, and nothing of the program runs any more: finds out whether there is
/// a pair, and where.
pub(crate) fn find() -> io::Result<()> {
    if streams().is_empty() {
        return Ok(());
    }
    let Ends { mut receivers, mut senders } = look()?;
    // The runtime that looked is gone, and its copy of an end with it.
    let left = streams();
    receivers.retain(|fd| left.contains(fd));
    senders.retain(|fd| left.contains(fd));
    // Found once.
    let _ = SHARED.set(Ends { receivers, senders });
    Ok(())
}

fn look() -> io::Result<Ends> {
    // Inside `#[tokio::main]` there is one, within which no other can be dropped.
    let runtime = match tokio::runtime::Handle::try_current() {
        Ok(_) => None,
        Err(_) => Some(tokio::runtime::Builder::new_current_thread().enable_io().build()?),
    };
    let _inside = runtime.as_ref().map(|runtime| runtime.enter());
    let _listener = reactor::signals(SignalKind::from_raw(QUIET))?;
    let streams = streams();
    let before: Vec<_> = streams.iter().map(|fd| traffic(*fd)).collect();
    send_quietly()?;
    let (mut receivers, mut senders) = (Vec::new(), Vec::new());
    for (fd, (unread, unsent)) in streams.into_iter().zip(before) {
        let (unread_now, unsent_now) = traffic(fd);
        if unread_now > unread {
            receivers.push(fd);
        } else if unsent_now > unsent {
            senders.push(fd);
        }
    }
    Ok(Ends { receivers, senders })
}

/// In a process that was forked from the fork server, before anything else there builds a runtime.
pub(crate) fn renew() -> io::Result<()> {
    let Some(Ends { receivers, senders }) = SHARED.get() else { return Ok(()) };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (receiver, sender) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    receivers.iter().try_for_each(|fd| replace(&receiver, *fd))?;
    senders.iter().try_for_each(|fd| replace(&sender, *fd))
}

fn replace(own: &OwnedFd, fd: RawFd) -> io::Result<()> {
    // SAFETY: the number is that of tokio's socket, here as in the process that this one was forked from, and stays taken;
    // what owns it goes on with a socket of the same kind.
    match unsafe { libc::dup3(own.as_raw_fd(), fd, libc::O_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The Unix stream sockets of this process.
fn streams() -> Vec<RawFd> {
    let is_stream = |fd: BorrowedFd<'_>| {
        let kind = (sockopt::socket_domain(fd).ok(), sockopt::socket_type(fd).ok());
        kind == (Some(AddressFamily::UNIX), Some(SocketType::STREAM))
    };
    spawn::open_descriptors().into_iter().filter(|fd| spawn::look_at(*fd, is_stream) == Some(true)).collect()
}

/// How many bytes can be read there, and how much of what was sent has not been read.
fn traffic(fd: RawFd) -> (libc::c_int, libc::c_int) {
    let ask = |request| {
        let mut count = 0;
        // SAFETY: both requests write one number, to which the pointer leads.
        unsafe { libc::ioctl(fd, request, &raw mut count) };
        count
    };
    (ask(libc::FIONREAD), ask(libc::TIOCOUTQ))
}

/// Has the handler of [`QUIET`] run in this thread, now.
fn send_quietly() -> io::Result<()> {
    let signal = Signal::try_from(QUIET)?;
    let mut quiet = SigSet::empty();
    quiet.add(signal);
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&quiet), Some(&mut before))?;
    nix::sys::signal::raise(signal)?;
    Ok(sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?)
}
