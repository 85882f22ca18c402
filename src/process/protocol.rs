//! What a process, the fork server and a child say to each other. All over packet sockets, one frame each.
//!
//! ```text
//! starter -> started  Hello, then Addressed                      over the socket that a process was started with
//! starter -> server   Hello::Server, then Preparation::Preload, any number, then Preparation::Serve, answered by Ready;
//!                     or an error in place of Ready, at any time  over the socket the server was started with
//! anyone  -> server   one empty frame with a socket in it        over the intake: a new connection
//! anyone  -> server   Request::Child + Order + arguments, answered by Reply::Child      over its connection
//! anyone  -> server   Request::Spares, answered by a Reply::Spare for each              over its connection
//! anyone  -> server   Request::Signal, Request::Retire                                  over its connection
//! anyone  -> child    the Order, answered by Report::Outcome     over the socket that came with a spare
//! server  -> child    Hello::Child, then the Order as it came    over the socket the child was exec'd with
//! anyone  -> child    the Attributes that it shall have, or an empty frame if all are as they were: begin
//!                                                                over the socket that it reports over
//! child   -> starter  Report::Born, then Report::Outcome         over the socket that came with the order
//! child   -> starter  Report::Lingers, Panicked, OutOfMemory      over the same, where they apply
//! server  -> starter  Report::Exited, on older kernels           over the same
//! owner   -> cleaner  Hello::NameCleaner and CleanerRequest, answered by Ready
//!                                                                over the socket the name cleaner was started with
//! ```
#![forbid(unsafe_code)]

use super::entry::Call;
use super::info;
use crate::error::{Error, PanicInfo, Result};
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
    /// What tells it from whatever else may wait in a socket.
    tag: String,
    /// [`crate::os::image::fingerprint`] of the sender.
    pub(super) image: u64,
    /// The signals that the program ignored when it began.
    pub(super) ignored: u64,
    pub(super) role: Role,
}

const HELLO: &str = "multiprocess: a role";

impl Hello {
    pub(super) fn new(image: u64, role: Role) -> Self {
        Self { tag: HELLO.into(), image, ignored: signal::ignored_at_start(), role }
    }

    /// Whether `bytes` are the beginning of one as it was sent.
    pub(super) fn is_in(bytes: &[u8]) -> bool {
        bytes.windows(HELLO.len()).any(|window| window == HELLO.as_bytes())
    }
}

/// The second one: whom the role is for.
#[derive(Serialize, Deserialize)]
pub(super) struct Addressed {
    pub(super) pid: u32,
}

#[derive(Serialize, Deserialize)]
pub(super) enum Role {
    /// With the program, a lifeline and the family. It keeps no more rights than these of its starter.
    Server { preload: Vec<Call>, credentials: Credentials },
    /// With the program, a lifeline, the intake and the family. It keeps no more rights than the server.
    Child { base: Base },
    /// With no descriptors: it only removes names.
    NameCleaner,
}

/// What the fork server may do, and what its children are like unless they are told otherwise.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Base {
    pub(super) credentials: Credentials,
    pub(super) attributes: Attributes,
}

/// What a process asks its name cleaner for.
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

/// What a starter says to a fork server that has its role and does not serve yet.
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
    /// What its children are like unless they are told otherwise.
    pub(super) attributes: Attributes,
}

/// What a process asks the server for.
#[derive(Serialize, Deserialize)]
pub(super) enum Request {
    /// A child that does the order that follows, by a number that is not 0.
    Child { number: u64 },
    /// So many children that wait for their order, like those of the last one in environment and directory.
    Spares { count: u32, generation: u64 },
    /// This signal for the child whose pidfd comes along: the one that asks may not send it itself any more. No answer.
    Signal(i32),
    /// No order will come over this connection any more, and none is to be taken. No answer.
    Retire,
}

/// What the server answers.
#[derive(Serialize, Deserialize)]
pub(super) enum Reply {
    /// The pidfd comes along. Number 0 stands for an order that could not be read.
    Child { number: u64, answer: Answer<Born> },
    /// A pidfd and the socket that takes the order come along, unless it could not be had, now or ever.
    Spare { pid: Option<u32>, generation: u64, never: bool },
}

/// The server's answer to an order.
#[derive(Serialize, Deserialize)]
pub(super) struct Born {
    pub(super) pid: u32,
    /// The server will send [`Report::Exited`], because this kernel tells an exit only to the parent.
    pub(super) reports_exit: bool,
}

/// What a starter reads about one child, before the last byte, which names it.
pub(super) enum Report {
    /// The child's pid.
    Born(u32),
    /// An [`super::outcome::Outcome`].
    Outcome(Parcel),
    /// The wait status.
    Exited(i32),
    /// It has sent its outcome, and goes on for a while: something of it still runs.
    Lingers,
    /// It is about to end by a panic that cannot be caught.
    Panicked(PanicInfo),
    /// It is about to abort because an allocation failed, at this limit of its address space.
    OutOfMemory(u64),
}

const BORN: u8 = 0;
const OUTCOME: u8 = 1;
const EXITED: u8 = 2;
const LINGERS: u8 = 3;
const PANICKED: u8 = 4;
const OUT_OF_MEMORY: u8 = 5;

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

    /// What is sent for [`Self::OutOfMemory`].
    pub(super) fn out_of_memory(limit: u64) -> Vec<u8> {
        frame::packet(&[&limit.to_le_bytes()[..], &[OUT_OF_MEMORY]].concat())
    }

    pub(super) fn send_outcome(to: BorrowedFd<'_>, outcome: &super::outcome::Outcome) -> io::Result<()> {
        use std::os::fd::AsFd;
        let fds: Vec<BorrowedFd<'_>> = outcome.attachments().iter().map(|attachment| attachment.as_fd()).collect();
        let [payload, tag] = outcome.parts();
        frame::send(to, &[payload, tag, &[OUTCOME]], &fds, Wait::Yes)
    }

    /// The next report if it is there, or `None` when there will be no more. What has come of one that is not there as a whole is
    /// kept in `begun`.
    pub(super) fn recv(from: BorrowedFd<'_>, begun: &mut Option<Begun>) -> io::Result<Option<Self>> {
        let Some(mut parcel) = frame::recv_some(from, begun)? else { return Ok(None) };
        let torn = || io::Error::new(io::ErrorKind::InvalidData, "a report that says nothing");
        let kind = parcel.bytes.pop().ok_or_else(torn)?;
        let number = || Some(u32::from_le_bytes(parcel.bytes.get(..4)?.try_into().ok()?));
        match kind {
            BORN => Ok(Some(Self::Born(number().ok_or_else(torn)?))),
            EXITED => Ok(Some(Self::Exited(number().ok_or_else(torn)? as i32))),
            LINGERS => Ok(Some(Self::Lingers)),
            PANICKED => Ok(Some(Self::Panicked(wire::from_bytes(&parcel.bytes)?))),
            OUT_OF_MEMORY => {
                let limit = parcel.bytes.get(..8).and_then(|bytes| bytes.try_into().ok()).ok_or_else(torn)?;
                Ok(Some(Self::OutOfMemory(u64::from_le_bytes(limit))))
            }
            _ => Ok(Some(Self::Outcome(parcel))),
        }
    }
}

/// Sends a value of the protocol, then raw bytes in the same frame.
pub(super) fn send<T: Serialize>(to: BorrowedFd<'_>, value: &T, tail: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let head = to_bytes(value)?;
    frame::send(to, &[&head, tail], fds, Wait::Yes)
}

/// A value of the protocol as [`recv`] reads it.
pub(super) fn to_bytes<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let value = wire::to_bytes(value)?;
    Ok([&(value.len() as u32).to_le_bytes(), &value[..]].concat())
}

/// [`send`] without a tail, if there is room now.
pub(super) fn try_send<T: Serialize>(to: BorrowedFd<'_>, value: &T) -> io::Result<()> {
    frame::send(to, &[&to_bytes(value)?], &[], Wait::No)
}

/// Receives what [`send`] sent: the value, and a parcel of the raw bytes and the descriptors.
pub(super) fn recv<T: DeserializeOwned>(from: BorrowedFd<'_>) -> io::Result<Option<(T, Parcel)>> {
    read(frame::recv(from, Wait::Yes)?)
}

/// The same for who must not wait until a message begins: `WouldBlock` then. For the rest of one that has begun it waits
/// as long as the socket's limit says.
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

/// What a program needs at a low limit: its streams, the program, the family with its least number of doorbells, the
/// connection, the lifeline, and what a start takes for a moment. See `README.md`.
const FIRST_DESCRIPTORS: usize = 32;

/// Its pidfd and its reports; three more where its streams are piped.
const DESCRIPTORS_OF_A_CHILD: usize = 2;

/// An error of the protocol as the caller of `spawn` sees it.
pub(super) fn spawn_error(what: impl std::fmt::Display, error: io::Error) -> Error {
    let is_proc_missing = error.kind() == io::ErrorKind::NotFound && !std::path::Path::new("/proc/self/fd").exists();
    let hint = match error.raw_os_error() {
        _ if is_proc_missing => "; there is no /proc in this root directory, and it is needed".into(),
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
    Error::new(crate::ErrorKind::Spawn, format!("{what}: {error}{hint}")).with_source(error)
}

pub(super) type Answer<T> = Result<T, Error>;
