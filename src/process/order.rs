//! The order that a child is started for: the function, its arguments, and the options of the child.
#![forbid(unsafe_code)]

use super::entry::Call;
use super::info::{ProcessInfo, StartMethod};
use super::variables::Variables;
use crate::os::attributes::Attributes;
use crate::os::socket::Wait;
use crate::wire::{self, Parcel, frame};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

/// The function and the options of a child. Its descriptors are attached in the order of [`Order::split`].
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
    /// The server passes this order on, and may die before it has answered the starter. Otherwise the order goes to
    /// a spare child, which reports over the same socket and is tied to the starter already.
    pub(super) is_passed_on: bool,
    /// The starter's environment, if it has changed since its last order.
    pub(super) environment: Option<Variables>,
    /// The starter's working directory is attached, because it has changed since its last order.
    pub(super) has_directory: bool,
    /// A directory for this child is attached.
    pub(super) has_own_directory: bool,
    /// Attributes from the builder, which replace the starter's.
    pub(super) attributes: Option<Attributes>,
    /// Environment variables from the builder.
    pub(super) variables: Variables,
    /// Signals that are sent to whole groups do nothing in this child.
    pub(super) is_shielded: bool,
    /// This child leads a process group, which ends with its starter.
    pub(super) leads_group: bool,
    /// Whether the stacks of panics are kept; `None`: the environment decides.
    pub(super) backtraces: Option<bool>,
    /// Which standard streams are attached.
    pub(super) streams: [bool; 3],
    /// The length of arguments in an attached memfd; `None`: they follow the order.
    pub(super) arguments_in_memfd: Option<u64>,
}

/// The descriptors of an order, by purpose.
pub(super) struct Descriptors {
    pub(super) report: OwnedFd,
    /// `None` for a spare, which is tied already.
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
            self.environment.as_ref().map_or(&[], Variables::as_bytes),
            self.variables.as_bytes(),
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

    /// Decodes the order at the beginning of `bytes`; returns it and its length, or `None` if there is none.
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
        let variables = Variables::from_bytes;
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

    /// Assigns the attached descriptors: report, lifeline, streams, directories, arguments, attachments. The
    /// first two are not attached if `report` is given.
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

#[cfg(test)]
mod tests {
    use super::*;

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
