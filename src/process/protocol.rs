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

use super::StartMethod;
use super::entry::Call;
use super::info::{self, ProcessInfo};
use crate::error::{Error, PanicInfo, Result};
use crate::os::attributes::Attributes;
use crate::os::{credentials::Credentials, named, signal, socket::Wait};
use crate::wire::{self, Parcel, frame, frame::Begun};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

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

/// What a child is to do. Its descriptors come in the order of [`Order::split`].
///
/// It travels as a head of numbers and then the texts whose lengths the head holds. A new child reads it with code on few
/// pages: each page that a general format would enter costs every child a page fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) call: Call,
    pub(super) name: String,
    pub(super) daemon: bool,
    pub(super) start_method: StartMethod,
    pub(super) parent: ProcessInfo,
    /// The server passes this on, and may die before it has told the starter whose order it is. One that is not goes to
    /// a spare child: it reports where it was told, and is tied to the starter already.
    pub(super) is_passed_on: bool,
    /// The starter's environment, if it has changed since its last order.
    pub(super) environment: Option<Variables>,
    /// The starter's working directory comes along, because it has changed since its last order.
    pub(super) has_directory: bool,
    /// A directory for this child comes along.
    pub(super) has_own_directory: bool,
    /// What this child shall have, whatever its starter has.
    pub(super) attributes: Option<Attributes>,
    /// Variables for this child.
    pub(super) variables: Variables,
    /// What is sent to a whole group to end it does nothing in this child.
    pub(super) is_shielded: bool,
    /// This child leads a process group, which ends with its starter.
    pub(super) leads_group: bool,
    /// Whether the stacks of panics are kept; if nothing is said, the environment decides.
    pub(super) backtraces: Option<bool>,
    /// Which standard streams come along.
    pub(super) streams: [bool; 3],
    /// The length of arguments that come as memory; otherwise they follow the order.
    pub(super) arguments_in_memfd: Option<u64>,
}

/// The descriptors of an order, by purpose.
pub(super) struct Descriptors {
    pub(super) report: OwnedFd,
    /// None for who is tied already.
    pub(super) lifeline: Option<OwnedFd>,
    pub(super) streams: [Option<OwnedFd>; 3],
    pub(super) directory: Option<OwnedFd>,
    pub(super) own_directory: Option<OwnedFd>,
    pub(super) arguments: Option<OwnedFd>,
    pub(super) attachments: Vec<OwnedFd>,
}

impl Descriptors {
    /// How many there are.
    pub(super) fn count(&self) -> usize {
        let Self { report: _, lifeline, streams, directory, own_directory, arguments, attachments } = self;
        let others = [lifeline, directory, own_directory, arguments];
        1 + attachments.len() + streams.iter().chain(others).flatten().count()
    }

    /// Moves all of them into `all`.
    pub(super) fn into_all(self, all: &mut Vec<OwnedFd>) {
        let Self { report, lifeline, streams: [stdin, stdout, stderr], directory, own_directory, arguments, .. } = self;
        all.push(report);
        // No `flatten`: in a child its code would be one more page to enter.
        #[allow(clippy::manual_flatten)]
        for fd in [lifeline, stdin, stdout, stderr, directory, own_directory, arguments] {
            if let Some(fd) = fd {
                all.push(fd);
            }
        }
        for attachment in self.attachments {
            all.push(attachment);
        }
    }
}

/// The function, its fingerprint, the flags, the pid of the parent, the length of arguments in memory.
const NUMBERS: usize = 5;
/// The name, that of the parent, the environment, the child's own variables, its attributes.
const TEXTS: usize = 5;
const HEAD: usize = 8 * (NUMBERS + TEXTS);

/// The bits of a number, the lowest first.
struct Flags(u64);

impl Flags {
    fn of(bits: &[bool]) -> Self {
        Self(bits.iter().rev().fold(0, |flags, bit| flags << 1 | u64::from(*bit)))
    }

    fn next(&mut self) -> bool {
        let bit = self.0 & 1 != 0;
        self.0 >>= 1;
        bit
    }

    fn next_method(&mut self) -> StartMethod {
        if self.next() { StartMethod::Spawn } else { StartMethod::ForkServer }
    }
}

impl Order {
    pub(super) fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let Self { parent, streams: [stdin, stdout, stderr], .. } = self;
        let flags = Flags::of(&[
            self.daemon,
            self.start_method == StartMethod::Spawn,
            self.is_passed_on,
            self.has_directory,
            self.has_own_directory,
            self.is_shielded,
            self.leads_group,
            *stdin,
            *stdout,
            *stderr,
            parent.daemon,
            parent.start_method == Some(StartMethod::Spawn),
            parent.start_method.is_some(),
            self.backtraces == Some(true),
            self.backtraces.is_some(),
            self.environment.is_some(),
            self.attributes.is_some(),
            self.arguments_in_memfd.is_some(),
        ]);
        let attributes = self.attributes.as_ref().map(wire::to_bytes).transpose()?;
        let texts: [&[u8]; TEXTS] = [
            self.name.as_bytes(),
            parent.name.as_bytes(),
            self.environment.as_ref().map_or(&[], |environment| &environment.0),
            &self.variables.0,
            attributes.as_deref().unwrap_or_default(),
        ];
        let [offset, fingerprint] = self.call.to_words();
        let numbers = [offset, fingerprint, flags.0, parent.pid.into(), self.arguments_in_memfd.unwrap_or(0)];
        let mut bytes = Vec::with_capacity(HEAD + texts.iter().map(|text| text.len()).sum::<usize>());
        for number in numbers.into_iter().chain(texts.map(|text| text.len() as u64)) {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        texts.into_iter().for_each(|text| bytes.extend_from_slice(text));
        Ok(bytes)
    }

    /// The order that `bytes` begin with, and its length; `None` if they begin with none.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<(Self, usize)> {
        let (head, texts) = bytes.split_at_checked(HEAD)?;
        let number = |at: usize| Some(u64::from_le_bytes(head.get(8 * at..8 * at + 8)?.try_into().ok()?));
        let mut rest = texts;
        let mut text = |at: usize| {
            let (text, others) = rest.split_at_checked(number(NUMBERS + at)?.try_into().ok()?)?;
            rest = others;
            Some(text)
        };
        let name = |text: &[u8]| std::str::from_utf8(text).ok().map(str::to_owned);
        let variables = |text: &[u8]| Variables(Bytes::copy_from_slice(text));
        let mut flags = Flags(number(2)?);
        let mut order = Self {
            call: Call::from_words([number(0)?, number(1)?]),
            name: name(text(0)?)?,
            daemon: flags.next(),
            start_method: flags.next_method(),
            is_passed_on: flags.next(),
            has_directory: flags.next(),
            has_own_directory: flags.next(),
            is_shielded: flags.next(),
            leads_group: flags.next(),
            streams: [flags.next(), flags.next(), flags.next()],
            parent: ProcessInfo {
                name: name(text(1)?)?,
                pid: number(3)?.try_into().ok()?,
                daemon: flags.next(),
                start_method: Some(flags.next_method()).filter(|_| flags.next()),
            },
            backtraces: Some(flags.next()).filter(|_| flags.next()),
            environment: Some(variables(text(2)?)).filter(|_| flags.next()),
            variables: variables(text(3)?),
            attributes: None,
            arguments_in_memfd: None,
        };
        let attributes = text(4)?;
        if flags.next() {
            order.attributes = Some(wire::from_bytes(attributes).ok()?);
        }
        order.arguments_in_memfd = Some(number(4)?).filter(|_| flags.next());
        Some((order, bytes.len() - rest.len()))
    }

    /// Sends an order, then raw bytes in the same frame.
    pub(super) fn send(&self, to: BorrowedFd<'_>, tail: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        frame::send(to, &[&self.to_bytes()?, tail], fds, Wait::Yes)
    }

    /// Receives what [`send`](Self::send) sent: the order, and a parcel of the raw bytes and the descriptors.
    pub(super) fn recv(from: BorrowedFd<'_>) -> io::Result<Option<(Self, Parcel)>> {
        let Some(mut parcel) = frame::recv(from, Wait::Yes)? else { return Ok(None) };
        let order = Self::take(&mut parcel)?;
        Ok(Some((order, parcel)))
    }

    /// Takes an order from the beginning of a parcel.
    pub(super) fn take(parcel: &mut Parcel) -> io::Result<Self> {
        let torn = || io::Error::new(io::ErrorKind::InvalidData, "a message that is not an order");
        let (order, len) = Self::from_bytes(&parcel.bytes).ok_or_else(torn)?;
        parcel.bytes.drain(..len);
        Ok(order)
    }

    /// Tells the descriptors of an order apart: report, lifeline, streams, directories, arguments, attachments. The
    /// first two do not come along if `report` is where to report.
    pub(super) fn split(&self, report: Option<OwnedFd>, fds: Vec<OwnedFd>) -> io::Result<Descriptors> {
        let mut fds = fds;
        fds.reverse();
        let missing = || io::Error::new(io::ErrorKind::InvalidData, "an order without its descriptors");
        let mut take = |wanted: bool| if wanted { fds.pop().map(Some).ok_or_else(missing) } else { Ok(None) };
        let (report, lifeline) = match report {
            Some(report) => (report, None),
            None => (take(true)?.ok_or_else(missing)?, take(true)?),
        };
        Ok(Descriptors {
            report,
            lifeline,
            streams: [take(self.streams[0])?, take(self.streams[1])?, take(self.streams[2])?],
            directory: take(self.has_directory)?,
            own_directory: take(self.has_own_directory)?,
            arguments: take(self.arguments_in_memfd.is_some())?,
            attachments: {
                fds.reverse();
                fds
            },
        })
    }
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
    /// An [`super::entry::Outcome`].
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

    pub(super) fn send_outcome(to: BorrowedFd<'_>, outcome: &super::entry::Outcome) -> io::Result<()> {
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

/// Environment variables, as one run of bytes: cheap to compare, to send and to keep.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Variables(Bytes);

impl Variables {
    pub(super) fn of_this_process() -> Self {
        std::env::vars_os().collect()
    }

    /// As an exec takes them.
    pub(super) fn for_exec(&self) -> Vec<CString> {
        self.0
            .split(|byte| *byte == 0)
            .filter_map(|pair| (!pair.is_empty()).then(|| CString::new(pair).ok())?)
            .collect()
    }

    /// These, but for what `own` says otherwise.
    pub(super) fn with(&self, own: &Self) -> Self {
        let kept = self.iter().filter(|(key, _)| !own.iter().any(|(other, _)| other == *key));
        kept.chain(own.iter()).map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&OsStr, &OsStr)> {
        self.0.split(|byte| *byte == 0).filter_map(|pair| {
            // A name may begin with `=`; the first one after that ends it.
            let at = 1 + pair.get(1..)?.iter().position(|byte| *byte == b'=')?;
            Some((OsStr::from_bytes(&pair[..at]), OsStr::from_bytes(&pair[at + 1..])))
        })
    }
}

impl FromIterator<(OsString, OsString)> for Variables {
    fn from_iter<I: IntoIterator<Item = (OsString, OsString)>>(variables: I) -> Self {
        let mut bytes = Vec::new();
        for (key, value) in variables {
            bytes.extend(key.into_vec());
            bytes.push(b'=');
            bytes.extend(value.into_vec());
            bytes.push(0);
        }
        Self(bytes.into())
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_keep_odd_names_and_values() {
        let pairs = [("A", "1=2"), ("EMPTY", ""), ("=C:", "x")].map(|(k, v)| (OsString::from(k), OsString::from(v)));
        let variables: Variables = pairs.clone().into_iter().collect();
        let back: Vec<_> = variables.iter().map(|(k, v)| (k.to_os_string(), v.to_os_string())).collect();
        assert_eq!(back, pairs);
    }

    fn orders() -> [Order; 2] {
        let parent =
            ProcessInfo { name: "parent".into(), pid: 7, daemon: true, start_method: Some(StartMethod::Spawn) };
        let mut attributes = Attributes::default();
        (attributes.nice, attributes.cpus) = (Some(-3), Some(vec![0, 9]));
        let plain = Order {
            call: Call::of(|| ()),
            name: String::new(),
            daemon: false,
            start_method: StartMethod::ForkServer,
            parent: ProcessInfo { name: "MainProcess".into(), pid: 1, daemon: false, start_method: None },
            is_passed_on: true,
            environment: None,
            has_directory: false,
            has_own_directory: true,
            attributes: None,
            variables: Variables::default(),
            is_shielded: true,
            leads_group: false,
            backtraces: None,
            streams: [false, true, false],
            arguments_in_memfd: None,
        };
        let full = Order {
            call: Call::of(|| ()),
            name: "né".into(),
            daemon: true,
            start_method: StartMethod::Spawn,
            parent,
            is_passed_on: false,
            environment: Some(Variables::default()),
            has_directory: true,
            has_own_directory: false,
            attributes: Some(attributes),
            variables: [("A".into(), "1".into())].into_iter().collect(),
            is_shielded: false,
            leads_group: true,
            backtraces: Some(false),
            streams: [true, false, true],
            arguments_in_memfd: Some(u64::MAX),
        };
        [plain, full]
    }

    #[test]
    fn an_order_arrives_as_it_was_sent_and_leaves_what_follows() {
        for order in orders() {
            let mut bytes = order.to_bytes().unwrap();
            bytes.extend(b"arguments");
            let mut parcel = Parcel { bytes, fds: Vec::new() };
            assert_eq!(Order::take(&mut parcel).unwrap(), order);
            assert_eq!(parcel.bytes, b"arguments");
        }
    }

    #[test]
    fn bytes_that_are_no_order_are_refused() {
        for order in orders() {
            let bytes = order.to_bytes().unwrap();
            for len in 0..bytes.len() {
                assert_eq!(Order::from_bytes(&bytes[..len]), None, "{len} of {}", bytes.len());
            }
            for at in 8 * NUMBERS..HEAD {
                let mut damaged = bytes.clone();
                damaged[at] ^= 0x80;
                assert_ne!(Order::from_bytes(&damaged).map(|(order, _)| order), Some(order.clone()), "byte {at}");
            }
        }
    }
}
