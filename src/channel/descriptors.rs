//! The descriptors of items: sent through a socket under the number of their record, taken by the receiver of that record.

use crate::os::socket::{self, MAX_FDS, Packet, Wait};
use crate::wire::Attachment;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Sends descriptors ahead of their record, whole or not at all; false if the socket is full.
pub(super) fn send_fds(socket: BorrowedFd<'_>, number: u64, attachments: &[Attachment]) -> io::Result<bool> {
    let fds: Vec<BorrowedFd<'_>> = attachments.iter().map(|attachment| attachment.as_fd()).collect();
    send(socket, number, &fds)
}

fn send(socket: BorrowedFd<'_>, number: u64, fds: &[BorrowedFd<'_>]) -> io::Result<bool> {
    let bundle = if fds.len() > MAX_FDS { Some(bundle(fds)?) } else { None };
    let bundle = bundle.as_ref().map(|bundle| [bundle.as_fd()]);
    let sent = bundle.as_ref().map_or(fds, |bundle| bundle);
    match socket::send(socket, &[IoSlice::new(&number.to_ne_bytes())], sent, Wait::No) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        result => result.map(|()| true),
    }
}

/// More descriptors than one packet takes, as one: a socket that holds them. Sent one packet after the other they
/// could fill the socket halfway, and no record would ever make a taker clear it.
fn bundle(fds: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
    let (inlet, outlet) = socket::packet_pair()?;
    for chunk in fds.chunks(MAX_FDS) {
        socket::send(inlet.as_fd(), &[IoSlice::new(&[0])], chunk, Wait::No).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => {
                io::Error::new(io::ErrorKind::InvalidInput, format!("{} descriptors are too many", fds.len()))
            }
            _ => error,
        })?;
    }
    Ok(outlet)
}

/// Takes the `count` descriptors of record `number` and drops those of earlier numbers: their senders died.
pub(super) fn take_fds(socket: BorrowedFd<'_>, number: u64, count: usize) -> io::Result<Vec<OwnedFd>> {
    loop {
        let mut bytes = [0; 8];
        let next = socket::peek(socket, &mut bytes).is_ok_and(|len| len == 8).then(|| u64::from_ne_bytes(bytes));
        if next.is_none_or(|next| next > number) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the descriptors of this item were lost: the process that was taking it died",
            ));
        }
        let packet = socket::recv(socket, &mut bytes, Wait::No)?;
        if next == Some(number) {
            return if count > MAX_FDS { unbundle(packet, count) } else { all_of(count, packet.fds) };
        }
    }
}

/// Keeps a copy of descriptors under a number; false if the socket is full.
#[cfg(not(multiprocess_loom))]
pub(super) fn keep_fds(socket: BorrowedFd<'_>, number: u64, fds: &[OwnedFd]) -> io::Result<bool> {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    send(socket, number, &fds)
}

/// Takes the `count` descriptors that were kept under `number`, wherever in the socket they are. Those of other numbers go to its
/// end, or are dropped if they are not `wanted` any more.
#[cfg(not(multiprocess_loom))]
pub(super) fn take_kept_fds(
    outlet: BorrowedFd<'_>,
    inlet: BorrowedFd<'_>,
    number: u64,
    count: usize,
    wanted: impl Fn(u64) -> bool,
) -> io::Result<Vec<OwnedFd>> {
    let lost = || {
        let why =
            "the descriptors of this item were lost: the process that had it on lease died, or too many were leased";
        io::Error::new(io::ErrorKind::InvalidData, why)
    };
    let mut first = None;
    loop {
        let mut bytes = [0; 8];
        let packet = match socket::recv(outlet, &mut bytes, Wait::No) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(lost()),
            packet => packet?,
        };
        let next = u64::from_ne_bytes(bytes);
        if next == number {
            return if count > MAX_FDS { unbundle(packet, count) } else { all_of(count, packet.fds) };
        }
        if wanted(next) {
            let fds: Vec<BorrowedFd<'_>> = packet.fds.iter().map(AsFd::as_fd).collect();
            socket::send(inlet, &[IoSlice::new(&bytes)], &fds, Wait::No)?;
            if first == Some(next) {
                return Err(lost());
            }
            first.get_or_insert(next);
        }
    }
}

/// The reverse of [`bundle`].
fn unbundle(packet: Packet, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut fds = Vec::new();
    for bundle in &packet.fds {
        while fds.len() < count {
            let packet = socket::recv(bundle.as_fd(), &mut [0], Wait::No)?;
            if packet.len == 0 || packet.fds_lost {
                break;
            }
            fds.extend(packet.fds);
        }
    }
    all_of(count, fds)
}

/// The kernel drops what does not fit into this process.
fn all_of(count: usize, fds: Vec<OwnedFd>) -> io::Result<Vec<OwnedFd>> {
    if fds.len() == count { Ok(fds) } else { Err(crate::wire::frame::too_many_fds(count, fds.len())) }
}
