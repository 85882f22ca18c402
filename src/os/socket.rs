//! [unix(7)](https://man7.org/linux/man-pages/man7/unix.7.html) sockets that carry descriptors.
//!
//! Packets keep their borders, so a packet is sent whole or not at all, whichever process dies. Through rustix: nix's
//! `recvmsg` gives up on a truncated control message and so leaks the descriptors that did arrive.

use super::poll::poll;
use super::refuse;
use crate::error::{Explained, Topic};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// The most descriptors in one packet (SCM_MAX_FD).
pub(crate) const MAX_FDS: usize = 253;

/// Two connected packet sockets, close-on-exec.
pub(crate) fn packet_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    refuse::at("socketpair")?;
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// The process that made a socket pair, as this process sees it.
pub(crate) struct Maker {
    /// 0 if it is not of this process's pid namespace.
    pub(crate) pid: i32,
    /// Effective ones, at that time.
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// The maker of this end of a [`packet_pair`]; `None` if it is anything else. Not by rustix, which takes for granted that
/// there is a pid.
pub(crate) fn maker_of_pair(socket: BorrowedFd<'_>) -> Option<Maker> {
    use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
    use rustix::net::sockopt::{socket_domain, socket_type};
    let is_packet =
        socket_type(socket).ok()? == SocketType::SEQPACKET && socket_domain(socket).ok()? == AddressFamily::UNIX;
    let maker = getsockopt(&socket, PeerCredentials).ok().filter(|_| is_packet)?;
    Some(Maker { pid: maker.pid(), uid: maker.uid(), gid: maker.gid() })
}

/// How a call behaves when it would have to wait.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    Yes,
    No,
}

/// Sends one packet of at most [`MAX_FDS`] descriptors; never raises SIGPIPE.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[IoSlice<'_>],
    fds: &[BorrowedFd<'_>],
    wait: Wait,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::NOSIGNAL | if wait == Wait::No { SendFlags::DONTWAIT } else { SendFlags::empty() };
    let mut since = None;
    loop {
        let asked = refuse::at_waiting("sendmsg", wait == Wait::Yes);
        match asked.and_then(|()| rustix::net::sendmsg(socket, bytes, &mut control, flags)) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            // It passes as soon as other receivers take their descriptors.
            Err(Errno::TOOMANYREFS | Errno::NOBUFS) if wait == Wait::Yes && is_worth_another(&mut since) => {}
            Err(Errno::TOOMANYREFS) => return Err(too_many_on_their_way(fds.len())),
            Err(error) => return Err(error.into()),
        }
    }
}

/// How long a sender waits for the kernel to let it send, and how often it asks.
const KERNEL_PATIENCE: Duration = Duration::from_secs(5);
const ASKED_AGAIN: Duration = Duration::from_millis(1);

/// Waits for a moment, unless there have been enough of them.
fn is_worth_another(since: &mut Option<Instant>) -> bool {
    let is_worth_it = since.get_or_insert_with(Instant::now).elapsed() < KERNEL_PATIENCE;
    if is_worth_it {
        std::thread::sleep(ASKED_AGAIN);
    }
    is_worth_it
}

fn too_many_on_their_way(more: usize) -> io::Error {
    let limit = descriptor_limit();
    let why = format!(
        "too many descriptors of this user are on their way between processes to send {more} more: as many as one process \
         may have open (RLIMIT_NOFILE, here {limit}); raise that limit, or start fewer processes at a time"
    );
    Explained::error(io::ErrorKind::Other, Topic::DescriptorsOnTheirWay, why)
}

/// Returns how many descriptors this process may have, in words.
pub(crate) fn descriptor_limit() -> String {
    use rustix::process::{Resource, getrlimit};
    getrlimit(Resource::Nofile).current.map_or_else(|| "unlimited".into(), |limit| limit.to_string())
}

/// Limits the wait of each send over this end of the socket, in whichever process: see
/// [socket(7)](https://man7.org/linux/man-pages/man7/socket.7.html), `SO_SNDTIMEO`. It is `WouldBlock` then.
pub(crate) fn limit_sends(socket: BorrowedFd<'_>, time: Duration) -> io::Result<()> {
    use rustix::net::sockopt::{Timeout, set_socket_timeout};
    Ok(set_socket_timeout(socket, Timeout::Send, Some(time))?)
}

/// Has the kernel report the sender with each later packet.
pub(crate) fn learn_senders(socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::net::sockopt::set_socket_passcred(socket, true)?)
}

/// The sender of a packet, as the kernel reports it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Sender {
    /// There is no packet.
    Nobody,
    /// It has the real user and group of this process, or has hung up.
    SameUser,
    /// Also one that could not be found out.
    Other,
}

/// The sender of the next packet of a socket that [learns its senders](learn_senders). The packet is not received.
pub(crate) fn sender(socket: BorrowedFd<'_>) -> Sender {
    use std::os::fd::AsRawFd;
    // By libc: a list of control messages that was cut short is not gone through by nix, and the descriptors of the packet
    // are to be cut off here, not received.
    let (mut byte, mut space) = (0_u8, [0_u64; 4]);
    let mut slice = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: all zeroes is a value of this C structure.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut slice, 1);
    (message.msg_control, message.msg_controllen) = (space.as_mut_ptr().cast(), size_of_val(&space) as _);
    let peek = || {
        refuse::at_waiting("recvmsg", false)?;
        // SAFETY: the structure names memory of this stack, with its sizes.
        match unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_PEEK | libc::MSG_DONTWAIT) } {
            // Not a failure that passes.
            -1 if Errno::from_io_error(&io::Error::last_os_error()) == Some(Errno::AGAIN) => Ok(-1),
            -1 => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
            len => Ok(len),
        }
    };
    match super::poll::again(peek) {
        Ok(1..) => {}
        Ok(-1) => return Sender::Nobody,
        // An end, which the receiver meets again.
        Ok(_) | Err(Errno::CONNRESET) => return Sender::SameUser,
        Err(_) => return Sender::Other,
    }
    // SAFETY: the kernel has filled `space` as `message` says, which is aligned as a header must be; the payload of a
    // message of this kind is a `ucred`, wherever it lies.
    let sender = unsafe {
        let first = libc::CMSG_FIRSTHDR(&message);
        let is_sender =
            !first.is_null() && ((*first).cmsg_level, (*first).cmsg_type) == (libc::SOL_SOCKET, libc::SCM_CREDENTIALS);
        is_sender.then(|| libc::CMSG_DATA(first).cast::<libc::ucred>().read_unaligned())
    };
    let mine = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    match sender {
        Some(sender) if (sender.uid, sender.gid) == mine => Sender::SameUser,
        _ => Sender::Other,
    }
}

/// No send and no receipt by this end of the socket waits longer.
pub(crate) fn limit_waits(socket: BorrowedFd<'_>, time: Duration) -> io::Result<()> {
    use rustix::net::sockopt::{Timeout, set_socket_timeout};
    set_socket_timeout(socket, Timeout::Recv, Some(time))?;
    limit_sends(socket, time)
}

/// One packet as it arrived.
pub(crate) struct Packet {
    /// Bytes received; 0 when the other end is gone.
    pub(crate) len: usize,
    pub(crate) fds: Vec<OwnedFd>,
    /// Descriptors were dropped on the way, because this process is at its limit.
    pub(crate) fds_lost: bool,
}

/// Receives one packet. Its descriptors are owned before anything else can fail.
pub(crate) fn recv(socket: BorrowedFd<'_>, buffer: &mut [u8], wait: Wait) -> io::Result<Packet> {
    recv_by(socket, buffer, wait, RecvFlags::empty())
}

/// Copies the next packet, which stays where it is, with its descriptors.
pub(crate) fn copy(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Packet> {
    recv_by(socket, buffer, Wait::No, RecvFlags::PEEK)
}

/// Drops the next packet, and its descriptors.
pub(crate) fn discard(socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut byte = [0_u8];
    let recv = || {
        refuse::at_waiting("recv", false)?;
        rustix::net::recv(socket, &mut byte[..], RecvFlags::DONTWAIT)
    };
    rustix::io::retry_on_intr(recv).map(drop).map_err(io::Error::from)
}

fn recv_by(socket: BorrowedFd<'_>, buffer: &mut [u8], wait: Wait, more: RecvFlags) -> io::Result<Packet> {
    // With room for the sender, which comes first if it was asked for.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS), ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags =
        more | RecvFlags::CMSG_CLOEXEC | if wait == Wait::No { RecvFlags::DONTWAIT } else { RecvFlags::empty() };
    let mut slices = [IoSliceMut::new(buffer)];
    let message = rustix::io::retry_on_intr(|| {
        refuse::at_waiting("recvmsg", wait == Wait::Yes)?;
        rustix::net::recvmsg(socket, &mut slices, &mut control, flags)
    })?;
    let rights = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok(Packet {
        len: message.bytes,
        fds: rights.flatten().collect(),
        fds_lost: message.flags.contains(ReturnFlags::CTRUNC),
    })
}

/// The bytes of the next packet, which stays where it is, without its descriptors.
pub(crate) fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let recv = || {
        refuse::at_waiting("recv", false)?;
        rustix::net::recv(socket, &mut *buffer, flags)
    };
    Ok(rustix::io::retry_on_intr(recv)?.0)
}

/// Waits until there is something to read, an end included; `false` if that cannot be found out.
pub(crate) fn until_readable(socket: BorrowedFd<'_>) -> bool {
    use rustix::event::{PollFd, PollFlags};
    poll(&mut [PollFd::new(&socket, PollFlags::IN)], None).is_ok()
}

/// Waits at most `limit` for something to read, an end included.
pub(crate) fn is_readable_within(socket: BorrowedFd<'_>, limit: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec};
    let mut fds = [PollFd::new(&socket, PollFlags::IN)];
    let limit = Timespec::try_from(limit).ok();
    poll(&mut fds, limit.as_ref()).is_ok_and(|n| n > 0)
}

/// Waits at most `limit` for room to send in, or for the other end to be gone.
pub(crate) fn is_writable_within(socket: BorrowedFd<'_>, limit: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec};
    let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
    let limit = Timespec::try_from(limit).ok();
    poll(&mut fds, limit.as_ref()).is_ok_and(|n| n > 0)
}

/// The same as [`is_readable_within`] for a process that blocks signals and has no function yet: a signal that arrives meanwhile has its effect at
/// once, and none on the function later. The signals that `stops` watches end the wait and stay pending: if something can be
/// read, it is read before they take effect.
pub(crate) fn is_readable_within_open_to_signals(
    socket: BorrowedFd<'_>,
    limit: Duration,
    stops: Option<(BorrowedFd<'_>, nix::sys::signal::SigSet)>,
) -> bool {
    use nix::poll::{PollFd, PollFlags, ppoll};
    let blocked = stops.map_or_else(nix::sys::signal::SigSet::empty, |(_, blocked)| blocked);
    let watched = [Some(socket), stops.map(|(watch, _)| watch)];
    let mut fds: Vec<_> = watched.into_iter().flatten().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    // A look at the clock costs a child three pages, so there is none without a signal.
    let mut deadline = None;
    loop {
        let left = deadline.map_or(limit, |deadline: Instant| deadline.saturating_duration_since(Instant::now()));
        let refused = refuse::at("poll").map_err(|errno| nix::errno::Errno::from_raw(errno.raw_os_error()));
        match refused.and_then(|()| ppoll(&mut fds, Some(left.into()), Some(blocked))) {
            Err(nix::errno::Errno::EINTR) => {
                deadline.get_or_insert_with(|| Instant::now() + limit);
            }
            found => return found.is_ok() && fds[0].any() == Some(true),
        }
    }
}

/// Stops the other end from sending. Its earlier messages can still be received.
pub(crate) fn refuse_more(socket: BorrowedFd<'_>) {
    // Fails only if the other end is gone, and then nothing more comes either.
    let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Read);
}

/// After this much silence a [tcp(7)](https://man7.org/linux/man-pages/man7/tcp.7.html) host is asked whether it is there.
const SILENCE: Duration = Duration::from_secs(30);
/// So often it is asked before it counts as gone, and how long each answer may take.
const ASKED: u32 = 3;
const ANSWER: Duration = Duration::from_secs(10);

/// Has the kernel notice that a TCP peer's host has vanished: switched off, or cut off. A peer that closes or dies is
/// noticed anyway.
pub(crate) fn watch_host(socket: BorrowedFd<'_>) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_tcp_keepidle(socket, SILENCE)?;
    sockopt::set_tcp_keepintvl(socket, ANSWER)?;
    sockopt::set_tcp_keepcnt(socket, ASKED)?;
    Ok(sockopt::set_socket_keepalive(socket, true)?)
}

/// Returns `true` if every read end of a pipe is closed.
pub(crate) fn has_no_reader(pipe: BorrowedFd<'_>) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec};
    let mut fds = [PollFd::new(&pipe, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let found = poll(&mut fds, Some(&now));
    found.is_ok_and(|n| n > 0) && fds[0].revents().contains(PollFlags::ERR)
}

/// Returns `true` if every holder of the other end has closed it or died.
pub(crate) fn is_hung_up(socket: BorrowedFd<'_>) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec};
    let mut fds = [PollFd::new(&socket, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let found = poll(&mut fds, Some(&now));
    found.is_ok_and(|n| n > 0) && fds[0].revents().contains(PollFlags::HUP)
}
