//! One message over a packet socket, whatever its size and number of descriptors.
//!
//! Small ones are inline; large ones ride as a sealed memfd; more descriptors than one packet carries follow
//! in further packets. Everything is sent in order, and the last packet completes the message.

use super::Parcel;
use crate::error::{Explained, Topic};
use crate::os::socket::{self, MAX_FDS, Packet, Wait};
use crate::os::{memfd, memory, mmap};
use crate::shm::view;
use std::cell::Cell;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// From here on a memfd costs less than the socket's copies.
pub(crate) const INLINE: usize = 16 << 10;

/// From here on pages are mapped by one call rather than by a fault for each.
const LARGE: usize = 256 << 10;

const HEADER: usize = 16;

struct Header {
    len: u64,
    fds: u32,
    in_memfd: bool,
}

impl Header {
    fn to_bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&self.len.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.fds.to_le_bytes());
        bytes[12] = self.in_memfd.into();
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..HEADER)?;
        Some(Self {
            len: u64::from_le_bytes(bytes[..8].try_into().ok()?),
            fds: u32::from_le_bytes(bytes[8..12].try_into().ok()?),
            in_memfd: bytes[12] != 0,
        })
    }
}

/// Sends one message made of `parts`.
pub(crate) fn send(to: BorrowedFd<'_>, parts: &[&[u8]], fds: &[BorrowedFd<'_>], wait: Wait) -> io::Result<()> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    let memory = if len > INLINE { Some(in_memfd(parts, len)?) } else { None };
    let all: Vec<BorrowedFd<'_>> = memory.iter().map(|fd| fd.as_fd()).chain(fds.iter().copied()).collect();
    let header = Header { len: len as u64, fds: all.len() as u32, in_memfd: memory.is_some() }.to_bytes();
    let mut slices = vec![IoSlice::new(&header)];
    if memory.is_none() {
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
    }
    let (first, rest) = all.split_at(all.len().min(MAX_FDS));
    socket::send(to, &slices, first, wait)?;
    rest.chunks(MAX_FDS).try_for_each(|chunk| socket::send(to, &[IoSlice::new(&[0])], chunk, wait))
}

/// A small message without descriptors as the one packet that it is, for a caller that sends it later by other means.
pub(crate) fn packet(payload: &[u8]) -> Vec<u8> {
    let header = Header { len: payload.len() as u64, fds: 0, in_memfd: false };
    [&header.to_bytes(), payload].concat()
}

/// A payload as memory that travels by descriptor.
pub(crate) fn in_memfd(parts: &[&[u8]], len: usize) -> io::Result<OwnedFd> {
    let fd = memfd::create("multiprocess-message", len as u64, false)?;
    let map = mmap::Map::shared(fd.as_fd(), 0, len)?;
    if len >= LARGE {
        map.populate();
    }
    let mut at = 0;
    for part in parts {
        view::copy_in(&map, at, part);
        at += part.len();
    }
    Ok(fd)
}

/// Receives one message, or `None` when the other end is gone.
pub(crate) fn recv(from: BorrowedFd<'_>, wait: Wait) -> io::Result<Option<Parcel>> {
    recv_parts(from, wait, wait)
}

/// Receives a message that has begun; `WouldBlock` if none has. The rest of it is waited for.
///
/// An error of the kernel with its number (`raw_os_error`) leaves it open whether a message was taken.
pub(crate) fn recv_begun(from: BorrowedFd<'_>) -> io::Result<Option<Parcel>> {
    recv_parts(from, Wait::No, Wait::Yes)
}

fn recv_parts(from: BorrowedFd<'_>, first: Wait, rest: Wait) -> io::Result<Option<Parcel>> {
    let Some(mut begun) = Begun::recv(from, first)? else { return Ok(None) };
    match begun.go_on(from, rest) {
        // As for a caller that does not wait: the next packet is not the beginning of a message.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock && rest == Wait::Yes => {
            Err(torn("the sender stopped in the middle of its descriptors"))
        }
        done => done.and_then(|()| begun.end()).map(Some),
    }
}

/// The same for a caller that must not wait, and calls again: `WouldBlock` if the message is not there as a whole. What has come
/// of it is kept in `begun`.
pub(crate) fn recv_some(from: BorrowedFd<'_>, begun: &mut Option<Begun>) -> io::Result<Option<Parcel>> {
    let mut message = match begun.take() {
        Some(message) => message,
        None => match Begun::recv(from, Wait::No)? {
            Some(message) => message,
            None => return Ok(None),
        },
    };
    match message.go_on(from, Wait::No) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            *begun = Some(message);
            Err(error)
        }
        done => done.and_then(|()| message.end()).map(Some),
    }
}

fn torn(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_string())
}

/// A message whose first packet has come.
pub(crate) struct Begun {
    header: Header,
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    lost: bool,
    /// How many descriptors further packets bring.
    expected: usize,
}

impl Begun {
    fn recv(from: BorrowedFd<'_>, wait: Wait) -> io::Result<Option<Self>> {
        let (packet, bytes) = recv_packet(from, wait)?;
        if packet.len == 0 {
            return Ok(None);
        }
        let header = Header::from_bytes(&bytes).ok_or_else(|| torn("a packet without a header"))?;
        let expected = (header.fds as usize).saturating_sub(MAX_FDS);
        Ok(Some(Self { header, bytes, fds: packet.fds, lost: packet.fds_lost, expected }))
    }

    fn go_on(&mut self, from: BorrowedFd<'_>, wait: Wait) -> io::Result<()> {
        while self.expected > 0 {
            let more = socket::recv(from, &mut [0], wait)?;
            if more.len == 0 {
                return Err(torn("the sender died in the middle of its descriptors"));
            }
            self.lost |= more.fds_lost;
            self.fds.extend(more.fds);
            self.expected = self.expected.saturating_sub(MAX_FDS);
        }
        Ok(())
    }

    fn end(self) -> io::Result<Parcel> {
        let Self { header, mut bytes, mut fds, lost, .. } = self;
        if lost || fds.len() != header.fds as usize {
            return Err(too_many_fds(header.fds as usize, fds.len()));
        }
        let bytes = if header.in_memfd {
            if fds.is_empty() {
                return Err(torn("a large message without its memory"));
            }
            let read = out_of_memfd(fds.remove(0), header.len);
            read.map_err(|error| Explained::after("a large message cannot be read", &error))?
        } else {
            bytes.drain(..HEADER);
            bytes
        };
        if bytes.len() as u64 != header.len {
            return Err(torn("a message of another length than it says"));
        }
        Ok(Parcel { bytes, fds })
    }
}

thread_local! {
    /// Room for any packet, cleared once.
    static ROOM: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// One packet and its bytes.
fn recv_packet(from: BorrowedFd<'_>, wait: Wait) -> io::Result<(Packet, Vec<u8>)> {
    // At the end of a thread there is nothing to keep it for.
    let mut room = ROOM.try_with(Cell::take).unwrap_or_default();
    room.resize(HEADER + INLINE, 0);
    let packet = socket::recv(from, &mut room, wait);
    let received = packet.map(|packet| {
        let bytes = room[..packet.len].to_vec();
        (packet, bytes)
    });
    let _ = ROOM.try_with(|kept| kept.set(room));
    received
}

/// The error of a receiver at its descriptor limit.
pub(crate) fn too_many_fds(sent: usize, arrived: usize) -> io::Error {
    let why =
        format!("{sent} descriptors were sent, {arrived} fit: this process is at its descriptor limit (RLIMIT_NOFILE)");
    Explained::error(io::ErrorKind::Other, Topic::TooManyDescriptors, why)
}

/// The reverse of [`in_memfd`].
pub(crate) fn out_of_memfd(fd: OwnedFd, len: u64) -> io::Result<Vec<u8>> {
    if memfd::sealed_len(fd.as_fd()).is_none_or(|actual| actual < len) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a large message whose memory is too small"));
    }
    let len = len as usize;
    let map = mmap::Map::shared(fd.as_fd(), 0, len)?;
    if len >= LARGE {
        map.populate();
    }
    let mut bytes = memory::with_room(Vec::new(), len);
    view::append(&map, 0, len, &mut bytes);
    Ok(bytes)
}
