//! The pair of sockets by which tokio learns of signals: a handler writes to one end, and a runtime reads from the other.
//! Each process has one pair, made with its first runtime that has an I/O driver, and keeps it for good.
//!
//! Processes that are forked after that share the pair. The first one to read takes the bytes from the others, and one that
//! was busy at that moment never learns of its signal. So where the fork server has such a pair, because a preload or `main`
//! before `init` has built a runtime, each of its children puts a pair of its own in the place of the shared one.
//!
//! tokio does not expose these descriptors. To find them this module raises a signal a few times: each time one byte moves
//! from one end to the other. A socket of the program may get bytes at the same moment, so the counts must match exactly,
//! several times, and leave one socket for each end. Otherwise nothing is replaced, and the children share the pair.

use super::{reactor, refuse, spawn};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use tokio::signal::unix::SignalKind;

/// A signal that by default does nothing, and that no program is likely to use.
const QUIET: libc::c_int = libc::SIGURG;

/// The descriptors of each end.
struct Ends {
    receivers: Vec<RawFd>,
    senders: Vec<RawFd>,
}

static SHARED: OnceLock<Ends> = OnceLock::new();

/// In the fork server, after the preloads, when nothing of the program runs any more: finds out whether there is
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
    ends_among(&streams(), send_quietly)
}

/// How many bytes are sent before each count. A socket of the program would have to get the same numbers at the same moments.
const ROUNDS: [libc::c_int; 3] = [2, 3, 1];

/// The two ends between which each `send` moves one byte; an error if more than one socket could be an end.
fn ends_among(streams: &[RawFd], mut send: impl FnMut() -> io::Result<()>) -> io::Result<Ends> {
    let (mut receivers, mut senders) = (streams.to_vec(), streams.to_vec());
    for sent in ROUNDS {
        let counts = || streams.iter().map(|fd| (*fd, traffic(*fd))).collect::<BTreeMap<_, _>>();
        let before = counts();
        for _ in 0..sent {
            send()?;
        }
        let after = counts();
        let arrived = |fd: &RawFd| after[fd].unread - before[fd].unread;
        receivers.retain(|fd| arrived(fd) == sent);
        senders.retain(|fd| arrived(fd) == 0 && after[fd].unsent > before[fd].unsent);
    }
    match (is_one_socket(&receivers), is_one_socket(&senders)) {
        (true, true) => Ok(Ends { receivers, senders }),
        _ => Err(io::Error::other("the sockets by which tokio learns of signals cannot be told from others")),
    }
}

/// Returns `true` if all of `fds`, and at least one, are descriptors of the same socket.
fn is_one_socket(fds: &[RawFd]) -> bool {
    let stat = |fd: BorrowedFd<'_>| refuse::at("fstat").and_then(|()| rustix::fs::fstat(fd)).ok();
    let identity = |fd: &RawFd| spawn::look_at(*fd, |fd| stat(fd).map(|stat| (stat.st_dev, stat.st_ino)));
    let identities: Vec<_> = fds.iter().map(|fd| identity(fd).flatten()).collect();
    identities.first().is_some_and(Option::is_some) && identities.iter().all(|identity| *identity == identities[0])
}

/// In a process that was forked from the fork server, before anything else there builds a runtime.
pub(crate) fn renew() -> io::Result<()> {
    let Some(Ends { receivers, senders }) = SHARED.get() else { return Ok(()) };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    refuse::at("socketpair")?;
    let (receiver, sender) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    receivers.iter().try_for_each(|fd| replace(&receiver, *fd))?;
    senders.iter().try_for_each(|fd| replace(&sender, *fd))
}

fn replace(own: &OwnedFd, fd: RawFd) -> io::Result<()> {
    refuse::at("dup")?;
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

/// The bytes in a socket.
struct Traffic {
    /// Bytes that can be read from it.
    unread: libc::c_int,
    /// Memory of the bytes that were sent over it and have not been read.
    unsent: libc::c_int,
}

fn traffic(fd: RawFd) -> Traffic {
    let ask = |request| {
        let mut count = 0;
        // SAFETY: both requests write one number, to which the pointer leads.
        unsafe { libc::ioctl(fd, request, &raw mut count) };
        count
    };
    Traffic { unread: ask(libc::FIONREAD), unsent: ask(libc::TIOCOUTQ) }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    /// Sends `mine` over a pair, and at each time `others` over another one: the ends that are found, and those of the pair.
    fn found(others: &[u8]) -> (io::Result<Ends>, Vec<RawFd>, Vec<RawFd>) {
        let ((mut sender, receiver), (mut other, far)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let copy = receiver.try_clone().unwrap();
        let streams = [&far, &sender, &receiver, &other, &copy].map(AsRawFd::as_raw_fd);
        let ends = ends_among(&streams, || {
            other.write_all(others)?;
            sender.write_all(&[1])
        });
        (ends, vec![receiver.as_raw_fd(), copy.as_raw_fd()], vec![sender.as_raw_fd()])
    }

    #[test]
    fn both_ends_are_found_with_their_duplicates() {
        let (ends, receivers, senders) = found(&[]);
        let ends = ends.unwrap();
        assert_eq!((ends.receivers, ends.senders), (receivers, senders));
    }

    #[test]
    fn a_socket_that_gets_bytes_at_the_same_moment_is_not_taken() {
        let (ends, receivers, _) = found(b"of the program");
        // Its sender cannot be distinguished from tokio's by the unsent bytes, so nothing is replaced.
        assert!(ends.is_err_and(|error| error.to_string().contains("cannot be told")), "{receivers:?}");
    }

    #[test]
    fn sockets_that_get_the_same_bytes_at_the_same_moment_are_an_error() {
        assert!(found(&[1]).0.is_err());
    }
}
