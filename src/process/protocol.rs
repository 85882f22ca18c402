//! The messages between a process, the fork server and a child. All over packet sockets, one frame each.
//!
//! ```text
//! starter -> started  Hello, then Addressed                      over the socket that a process was started with
//! starter -> server   Hello::Server, then Preparation::Preload, any number, then Preparation::Serve, answered by Ready;
//!                     or an error in place of Ready, at any time  over the socket that the server was started with
//! member  -> server   one empty frame with a socket in it        over the intake: a new connection
//! member  -> server   Request::Child + Order + arguments, answered by Reply::Child or Refused  over its connection
//! member  -> server   Request::Spares, answered by a Reply::Spare for each              over its connection
//! member  -> server   Request::Signal, Request::Retire                                  over its connection
//! starter -> spare    the Order, answered by Report::Outcome     over the socket that came with the spare
//! server  -> child    Hello::Child, then the Order as it came    over the socket that the child was exec'd with
//! starter -> child    the permission to begin: the Attributes that it shall have, or an empty frame for the usual ones
//!                                                                over the socket over which it reports
//! child   -> starter  Report::Born, then Report::Outcome         over the socket that came with the order
//! child   -> starter  Report::Lingers, Panicked, OutOfMemory, DroppedTraces  over the same, where they apply
//! child   -> starter  packets of spans and events (see `trace`)  over the socket for them that came with the order
//! server  -> starter  Report::Exited, on older kernels           over the same
//! owner   -> cleaner  Hello::NameCleaner and CleanerRequest, answered by Ready
//!                                                                over the socket that the name cleaner was started with
//! ```
#![forbid(unsafe_code)]

use super::entry::Call;
use super::info;
use crate::error::{Error, ErrorKind, PanicInfo, Result, Topic};
use crate::os::attributes::Attributes;
use crate::os::{credentials::Credentials, named, signal, socket::Wait};
use crate::wire::{self, Parcel, frame, frame::Begun};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::BorrowedFd;

/// The first message to a process that was exec'd to take a role.
#[derive(Serialize, Deserialize)]
pub(super) struct Hello {
    /// Distinguishes it from other messages that may wait in a socket, and from those of other programs: [`HELLO`] and `image`.
    tag: String,
    /// [`crate::os::image::fingerprint`] of the sender.
    pub(super) image: u64,
    /// The signals that the program ignored when it began.
    pub(super) ignored: u64,
    pub(super) role: Role,
}

const HELLO: &str = "multiprocess: a role of ";

impl Hello {
    pub(super) fn new(image: u64, role: Role) -> Self {
        Self { tag: format!("{HELLO}{image:016x}"), image, ignored: signal::ignored_at_start(), role }
    }

    /// The image of the sender, if `bytes` are the beginning of an encoded one.
    pub(super) fn image_in(bytes: &[u8]) -> Option<u64> {
        let at = bytes.windows(HELLO.len()).position(|window| window == HELLO.as_bytes())? + HELLO.len();
        u64::from_str_radix(std::str::from_utf8(bytes.get(at..at + 16)?).ok()?, 16).ok()
    }
}

/// The second message: the pid of the process that the role is for.
#[derive(Serialize, Deserialize)]
pub(super) struct Addressed {
    pub(super) pid: u32,
}

#[derive(Serialize, Deserialize)]
pub(super) enum Role {
    /// With the program, a lifeline and the family. It gives up all rights but these, which its starter has.
    Server { preload: Vec<Call>, credentials: Credentials },
    /// With the program, a lifeline, the intake and the family. It gives up all rights that the server does not have.
    Child { base: Base },
    /// With no descriptors: it only removes names.
    NameCleaner,
}

/// The rights of a fork server, and the attributes that its children have by themselves.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Base {
    pub(super) credentials: Credentials,
    pub(super) attributes: Attributes,
}

/// A request to a name cleaner.
#[derive(Serialize, Deserialize)]
pub(super) enum CleanerRequest {
    /// Remove this name when I end, if it still belongs to this file. Answered by [`Ready`].
    Register(Named),
    /// Do not remove this name any more. No answer.
    Forget(Named),
}

/// A name in /dev/shm.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Named {
    pub(super) name: String,
    pub(super) identity: named::Identity,
}

/// A request to a fork server that has its role and does not serve yet.
#[derive(Serialize, Deserialize)]
pub(super) enum Preparation {
    /// Run this, too. No answer.
    Preload(Call),
    /// There is no more to run: serve. Answered by [`Ready`].
    Serve,
}

/// The server's answer when it begins to serve.
#[derive(Serialize, Deserialize)]
pub(super) struct Ready {
    /// It had threads before `init`, and so must exec every child.
    pub(super) must_exec: bool,
    /// The attributes that its children have by themselves.
    pub(super) attributes: Attributes,
}

/// A request to a fork server that serves.
#[derive(Serialize, Deserialize)]
pub(super) enum Request {
    /// Start a child for the order that follows. The number is not 0.
    Child { number: u64 },
    /// Make so many spare children, with the environment and directory of the last order.
    Spares { count: u32, generation: u64 },
    /// Send this signal to a child that was ordered over this connection: its starter may not do so any more. No answer.
    Signal { pid: u32, signal: i32 },
    /// Take no more orders over this connection. No answer.
    Retire,
}

/// An answer of the server.
#[derive(Serialize, Deserialize)]
pub(super) enum Reply {
    /// The pidfd is attached. Number 0 stands for an order that could not be read.
    Child { number: u64, answer: Answer<Born> },
    /// The order is not executed: its sender is another user than the server, or the connection is retired.
    Refused { number: u64 },
    /// A pidfd and the socket for the order are attached, unless there is no spare now, or never will be.
    Spare { pid: Option<u32>, generation: u64, never: bool },
}

/// The server's answer to an order.
#[derive(Serialize, Deserialize)]
pub(super) struct Born {
    pub(super) pid: u32,
    /// The server will send [`Report::Exited`], because this kernel reports an exit to the parent only.
    pub(super) reports_exit: bool,
}

/// A report about one child. Its last byte is its kind.
pub(super) enum Report {
    /// The child's pid.
    Born(u32),
    /// An [`super::outcome::Outcome`].
    Outcome(Parcel),
    /// The wait status.
    Exited(i32),
    /// The child has sent its outcome and goes on for a while: a task or a child of it still runs.
    Lingers,
    /// The child is about to end by a panic that cannot be caught.
    Panicked(PanicInfo),
    /// The child is about to abort because an allocation failed, at this limit of its address space.
    OutOfMemory(u64),
    /// So many spans and events of the child found no room, and are lost.
    DroppedTraces(u64),
}

const BORN: u8 = 0;
const OUTCOME: u8 = 1;
const EXITED: u8 = 2;
const LINGERS: u8 = 3;
const PANICKED: u8 = 4;
const OUT_OF_MEMORY: u8 = 5;
const DROPPED_TRACES: u8 = 6;

impl Report {
    pub(super) fn send_born(to: BorrowedFd<'_>, pid: u32) -> io::Result<()> {
        frame::send(to, &[&pid.to_le_bytes(), &[BORN]], &[], Wait::Yes)
    }

    pub(super) fn send_exited(to: BorrowedFd<'_>, status: i32) -> io::Result<()> {
        frame::send(to, &[&status.to_le_bytes(), &[EXITED]], &[], Wait::No)
    }

    pub(super) fn send_lingers(to: BorrowedFd<'_>) -> io::Result<()> {
        frame::send(to, &[&[LINGERS]], &[], Wait::No)
    }

    pub(super) fn send_panicked(to: BorrowedFd<'_>, panic: &PanicInfo) -> io::Result<()> {
        let panic = wire::to_bytes(panic)?;
        frame::send(to, &[&panic, &[PANICKED]], &[], Wait::No)
    }

    pub(super) fn send_dropped_traces(to: BorrowedFd<'_>, dropped: u64) -> io::Result<()> {
        frame::send(to, &[&dropped.to_le_bytes(), &[DROPPED_TRACES]], &[], Wait::No)
    }

    /// The encoded [`Self::OutOfMemory`].
    pub(super) fn out_of_memory(limit: u64) -> Vec<u8> {
        frame::packet(&[&limit.to_le_bytes()[..], &[OUT_OF_MEMORY]].concat())
    }

    pub(super) fn send_outcome(to: BorrowedFd<'_>, outcome: &super::outcome::Outcome) -> io::Result<()> {
        use std::os::fd::AsFd;
        let fds: Vec<BorrowedFd<'_>> = outcome.attachments().iter().map(|attachment| attachment.as_fd()).collect();
        let [payload, tag] = outcome.parts();
        frame::send(to, &[payload, tag, &[OUTCOME]], &fds, Wait::Yes)
    }

    /// Receives the next report if it is there; `None` when no more can come. The received part of an incomplete one is
    /// kept in `begun`.
    pub(super) fn recv(from: BorrowedFd<'_>, begun: &mut Option<Begun>) -> io::Result<Option<Self>> {
        let Some(mut parcel) = frame::recv_some(from, begun)? else { return Ok(None) };
        let torn = || io::Error::new(io::ErrorKind::InvalidData, "a report that says nothing");
        let kind = parcel.bytes.pop().ok_or_else(torn)?;
        let number = || Some(u32::from_le_bytes(parcel.bytes.get(..4)?.try_into().ok()?));
        let long = || Some(u64::from_le_bytes(parcel.bytes.get(..8)?.try_into().ok()?));
        match kind {
            BORN => Ok(Some(Self::Born(number().ok_or_else(torn)?))),
            EXITED => Ok(Some(Self::Exited(number().ok_or_else(torn)? as i32))),
            LINGERS => Ok(Some(Self::Lingers)),
            PANICKED => Ok(Some(Self::Panicked(wire::from_bytes(&parcel.bytes)?))),
            OUT_OF_MEMORY => Ok(Some(Self::OutOfMemory(long().ok_or_else(torn)?))),
            DROPPED_TRACES => Ok(Some(Self::DroppedTraces(long().ok_or_else(torn)?))),
            _ => Ok(Some(Self::Outcome(parcel))),
        }
    }
}

/// Sends a value of the protocol, then raw bytes in the same frame.
pub(super) fn send<T: Serialize>(to: BorrowedFd<'_>, value: &T, tail: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let head = to_bytes(value)?;
    frame::send(to, &[&head, tail], fds, Wait::Yes)
}

/// Encodes a value of the protocol for [`recv`].
pub(super) fn to_bytes<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let value = wire::to_bytes(value)?;
    Ok([&(value.len() as u32).to_le_bytes(), &value[..]].concat())
}

/// Sends a value without a tail, if there is room now.
pub(super) fn try_send<T: Serialize>(to: BorrowedFd<'_>, value: &T) -> io::Result<()> {
    frame::send(to, &[&to_bytes(value)?], &[], Wait::No)
}

/// Receives what [`send`] sent: the value, and a parcel of the raw bytes and the descriptors.
pub(super) fn recv<T: DeserializeOwned>(from: BorrowedFd<'_>) -> io::Result<Option<(T, Parcel)>> {
    read(frame::recv(from, Wait::Yes)?)
}

/// Like [`recv`], but fails with `WouldBlock` if no message has begun. For the rest of a message it waits as long as the
/// socket's limit says.
pub(super) fn try_recv<T: DeserializeOwned>(from: BorrowedFd<'_>) -> io::Result<Option<(T, Parcel)>> {
    read(frame::recv_begun(from)?)
}

fn read<T: DeserializeOwned>(parcel: Option<Parcel>) -> io::Result<Option<(T, Parcel)>> {
    let Some(mut parcel) = parcel else { return Ok(None) };
    let torn = || io::Error::new(io::ErrorKind::InvalidData, "a message that is not of this protocol");
    let len: [u8; 4] = parcel.bytes.get(..4).and_then(|len| len.try_into().ok()).ok_or_else(torn)?;
    let end = 4 + u32::from_le_bytes(len) as usize;
    let head = parcel.bytes.get(4..end).ok_or_else(torn)?;
    let value = wire::from_bytes(head)?;
    parcel.bytes.drain(..end);
    Ok(Some((value, parcel)))
}

/// The descriptors that a program needs at a low limit: streams, the program, the family with its least number of doorbells,
/// the connection, the lifeline, and some for a moment during a start. See `docs/guide/limits.md`.
const FIRST_DESCRIPTORS: usize = 32;

/// The pidfd and the report socket; three more if streams are piped.
const DESCRIPTORS_OF_A_CHILD: usize = 2;

/// An error of kind `Spawn`, with hints for common causes.
pub(super) fn spawn_error(what: impl std::fmt::Display, error: io::Error) -> Error {
    let is_proc_missing = error.kind() == io::ErrorKind::NotFound && !std::path::Path::new("/proc/self/fd").exists();
    let mut topic = None;
    let hint = match error.raw_os_error() {
        _ if is_proc_missing => {
            topic = Some(Topic::NoProc);
            "; there is no /proc in this root directory, and it is needed".into()
        }
        Some(libc::EMFILE) => {
            let limit = crate::os::socket::descriptor_limit();
            format!(
                "; {who} may have {limit} (RLIMIT_NOFILE), and a program needs {FIRST_DESCRIPTORS} for its first child and \
                 {DESCRIPTORS_OF_A_CHILD} for each more that it has not let go of",
                who = info::current_process().name(),
            )
        }
        _ => String::new(),
    };
    Error::new(ErrorKind::Spawn, format!("{what}: {error}{hint}")).explained_by(topic).with_source(error)
}

pub(super) type Answer<T> = Result<T, Error>;
