//! The descriptors of items: sent through a socket under the number of their record, taken by the receiver of that record.

use crate::error::{Explained, Topic};
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
/// could fill the socket halfway, and no record would ever make a consumer clear it.
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

/// The number of the packet at the front; `None` if there is none.
fn front(socket: BorrowedFd<'_>) -> Option<u64> {
    let mut bytes = [0; 8];
    socket::peek(socket, &mut bytes).is_ok_and(|len| len == 8).then(|| u64::from_ne_bytes(bytes))
}

/// Takes the `count` descriptors of record `number` and drops those of earlier numbers: their senders died.
pub(super) fn take_fds(socket: BorrowedFd<'_>, number: u64, count: usize) -> io::Result<Vec<OwnedFd>> {
    match comes_to(socket, number) {
        true => take_front(socket, count),
        false => Err(lost()),
    }
}

/// Returns `true` if the packet of this number is at the front. Those of earlier numbers are dropped: their senders died.
fn comes_to(socket: BorrowedFd<'_>, number: u64) -> bool {
    loop {
        match front(socket) {
            Some(next) if next < number => {
                if socket::discard(socket).is_err() {
                    return false;
                }
            }
            next => return next == Some(number),
        }
    }
}

fn take_front(socket: BorrowedFd<'_>, count: usize) -> io::Result<Vec<OwnedFd>> {
    let packet = socket::recv(socket, &mut [0; 8], Wait::No)?;
    if count > MAX_FDS { unbundle(packet, count) } else { all_of(count, packet.fds) }
}

#[cold]
pub(super) fn lost() -> io::Error {
    let why = "the descriptors of this item were lost: the process that was taking it died, or too many were leased";
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Copies the descriptors of the packet at the front, which stays. A bundle is taken, as it can be unpacked once.
#[cfg(not(multiprocess_loom))]
fn copy_front(socket: BorrowedFd<'_>, count: usize) -> io::Result<Vec<OwnedFd>> {
    if count > MAX_FDS {
        return take_front(socket, count);
    }
    let packet = socket::copy(socket, &mut [0; 8])?;
    all_copied(&packet)?;
    all_of(count, packet.fds)
}

/// That some are missing is the fault of this process, and the packet is still there.
#[cfg(not(multiprocess_loom))]
fn all_copied(packet: &Packet) -> io::Result<()> {
    if !packet.fds_lost {
        return Ok(());
    }
    let limit = socket::descriptor_limit();
    let why = format!(
        "the descriptors of the item do not fit into this process, whose limit is {limit} (RLIMIT_NOFILE); the item is \
         still in the queue"
    );
    Err(Explained::error(io::ErrorKind::Other, Topic::TooManyDescriptors, why))
}

/// Copies the `count` descriptors of record `number`, which stay in the socket until [`drop_fds`]; `None` if they are lost. An error
/// has changed nothing. Those of earlier numbers are dropped.
#[cfg(not(multiprocess_loom))]
pub(super) fn copy_fds(socket: BorrowedFd<'_>, number: u64, count: usize) -> io::Result<Option<Vec<OwnedFd>>> {
    if comes_to(socket, number) { copy_front(socket, count).map(Some) } else { Ok(None) }
}

/// Drops the descriptors of record `number`, if they are there, and of earlier ones.
#[cfg(not(multiprocess_loom))]
pub(super) fn drop_fds(socket: BorrowedFd<'_>, number: u64) {
    if comes_to(socket, number) {
        // The next process that looks for descriptors drops those that stay.
        let _ = socket::discard(socket);
    }
}

/// Keeps a copy of descriptors under a number; false if the socket is full.
#[cfg(not(multiprocess_loom))]
pub(super) fn keep_fds(socket: BorrowedFd<'_>, number: u64, fds: &[OwnedFd]) -> io::Result<bool> {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    send(socket, number, &fds)
}

/// The descriptors of leased items: those that come out of `outlet` were sent into `inlet`.
#[cfg(not(multiprocess_loom))]
pub(super) struct Kept<'a> {
    pub(super) outlet: BorrowedFd<'a>,
    pub(super) inlet: BorrowedFd<'a>,
}

#[cfg(not(multiprocess_loom))]
impl Kept<'_> {
    /// Turns the socket until the packet of this number is at the front; false if there is none. Those that are not `wanted` any
    /// more are dropped. An error has lost nothing.
    fn comes_to(&self, number: u64, wanted: impl Fn(u64) -> bool) -> io::Result<bool> {
        let (mut first, mut rounds) = (None, 0);
        loop {
            let Some(next) = front(self.outlet) else { return Ok(false) };
            if next == number {
                return Ok(true);
            }
            if !wanted(next) {
                socket::discard(self.outlet)?;
                continue;
            }
            // More than once, for a death in here leaves a packet twice.
            rounds += u32::from(*first.get_or_insert(next) == next);
            if rounds > 4 {
                return Ok(false);
            }
            self.turn(next)?;
        }
    }

    /// Sends a copy of the packet at the front to the end, and then drops it: a death in here loses nothing.
    fn turn(&self, number: u64) -> io::Result<()> {
        let packet = socket::copy(self.outlet, &mut [0; 8])?;
        all_copied(&packet)?;
        let fds: Vec<BorrowedFd<'_>> = packet.fds.iter().map(AsFd::as_fd).collect();
        let send = || socket::send(self.inlet, &[IoSlice::new(&number.to_ne_bytes())], &fds, Wait::No);
        match send() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                socket::discard(self.outlet)?;
                send()
            }
            sent => sent.and_then(|()| socket::discard(self.outlet)),
        }
    }

    /// Takes the `count` descriptors that are kept under `number`; `None` if they are not there.
    pub(super) fn take(
        &self,
        number: u64,
        count: usize,
        wanted: impl Fn(u64) -> bool,
    ) -> io::Result<Option<Vec<OwnedFd>>> {
        if self.comes_to(number, wanted)? { take_front(self.outlet, count).map(Some) } else { Ok(None) }
    }

    /// Copies them, and keeps them.
    pub(super) fn copy(
        &self,
        number: u64,
        count: usize,
        wanted: impl Fn(u64) -> bool,
    ) -> io::Result<Option<Vec<OwnedFd>>> {
        if !self.comes_to(number, wanted)? {
            return Ok(None);
        }
        let fds = copy_front(self.outlet, count)?;
        if count > MAX_FDS {
            keep_fds(self.inlet, number, &fds)?;
        }
        Ok(Some(fds))
    }

    /// Drops them.
    pub(super) fn drop(&self, number: u64, wanted: impl Fn(u64) -> bool) -> io::Result<()> {
        if self.comes_to(number, wanted)? { socket::discard(self.outlet) } else { Ok(()) }
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
