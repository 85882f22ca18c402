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

/// The function and the options of a child. Its descriptors are attached in the order of [`Order::assign_descriptors`].
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
    /// The order goes by the fork server, which may die before it has answered the starter. `false`: it goes straight to a spare
    /// child, which has its lifeline and report socket already.
    pub(super) goes_by_server: bool,
    /// The starter's environment, if it has changed since its last order.
    pub(super) starter_environment: Option<Variables>,
    /// The starter's working directory is attached, because it has changed since its last order.
    pub(super) has_directory: bool,
    /// A directory for this child is attached.
    pub(super) has_own_directory: bool,
    /// Attributes from the builder, which replace the starter's.
    pub(super) attributes: Option<Attributes>,
    /// Environment variables from the builder.
    pub(super) own_variables: Variables,
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
    /// The level of the spans and events that the starter wants, over the attached socket; 0 is none, and no socket.
    pub(super) trace_level: u8,
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
    pub(super) traces: Option<OwnedFd>,
    pub(super) attachments: Vec<OwnedFd>,
}

impl Descriptors {
    /// Returns the number of descriptors.
    pub(super) fn count(&self) -> usize {
        let Self { report: _, lifeline, streams, directory, own_directory, arguments, traces, attachments } = self;
        let others = [lifeline, directory, own_directory, arguments, traces];
        1 + attachments.len() + streams.iter().chain(others).flatten().count()
    }

    /// Moves all of them into `all`.
    pub(super) fn into_all(self, all: &mut Vec<OwnedFd>) {
        let Self {
            report,
            lifeline,
            streams: [stdin, stdout, stderr],
            directory,
            own_directory,
            arguments,
            traces,
            ..
        } = self;
        all.push(report);
        // No `flatten`: in a child its code would be one more page to enter.
        #[allow(clippy::manual_flatten)]
        for fd in [lifeline, stdin, stdout, stderr, directory, own_directory, arguments, traces] {
            if let Some(fd) = fd {
                all.push(fd);
            }
        }
        for attachment in self.attachments {
            all.push(attachment);
        }
    }
}

/// Where each number stands in the head.
mod number {
    pub(super) const FUNCTION: usize = 0;
    pub(super) const FINGERPRINT: usize = 1;
    pub(super) const FLAGS: usize = 2;
    pub(super) const PARENT_PID: usize = 3;
    pub(super) const LEN_IN_MEMFD: usize = 4;
    pub(super) const COUNT: usize = 5;
}

/// Where each text stands. Their lengths follow the numbers in the head.
mod text {
    pub(super) const NAME: usize = 0;
    pub(super) const NAME_OF_PARENT: usize = 1;
    pub(super) const ENVIRONMENT: usize = 2;
    pub(super) const OWN_VARIABLES: usize = 3;
    pub(super) const ATTRIBUTES: usize = 4;
    pub(super) const COUNT: usize = 5;
}

/// The bits of the flags.
mod flag {
    pub(super) const DAEMON: u64 = 1;
    pub(super) const BY_EXEC: u64 = 1 << 1;
    pub(super) const PASSED_ON: u64 = 1 << 2;
    pub(super) const DIRECTORY: u64 = 1 << 3;
    pub(super) const OWN_DIRECTORY: u64 = 1 << 4;
    pub(super) const SHIELDED: u64 = 1 << 5;
    pub(super) const LEADS_GROUP: u64 = 1 << 6;
    pub(super) const STREAMS: [u64; 3] = [1 << 7, 1 << 8, 1 << 9];
    pub(super) const PARENT_IS_DAEMON: u64 = 1 << 10;
    pub(super) const PARENT_BY_EXEC: u64 = 1 << 11;
    pub(super) const PARENT_WAS_STARTED: u64 = 1 << 12;
    pub(super) const BACKTRACES: u64 = 1 << 13;
    pub(super) const BACKTRACES_ARE_SET: u64 = 1 << 14;
    pub(super) const ENVIRONMENT: u64 = 1 << 15;
    pub(super) const ATTRIBUTES: u64 = 1 << 16;
    pub(super) const ARGUMENTS_IN_MEMFD: u64 = 1 << 17;
    /// Where the three bits of the level of traces begin.
    pub(super) const TRACE_LEVEL: u32 = 18;
}

const HEAD: usize = 8 * (number::COUNT + text::COUNT);

fn method_of(is_by_exec: bool) -> StartMethod {
    if is_by_exec { StartMethod::Spawn } else { StartMethod::ForkServer }
}

impl Order {
    pub(super) fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let attributes = self.attributes.as_ref().map(wire::to_bytes).transpose()?;
        let mut texts: [&[u8]; text::COUNT] = [&[]; text::COUNT];
        texts[text::NAME] = self.name.as_bytes();
        texts[text::NAME_OF_PARENT] = self.parent.name.as_bytes();
        texts[text::ENVIRONMENT] = self.starter_environment.as_ref().map_or(&[], Variables::as_bytes);
        texts[text::OWN_VARIABLES] = self.own_variables.as_bytes();
        texts[text::ATTRIBUTES] = attributes.as_deref().unwrap_or_default();
        let mut numbers = [0; number::COUNT];
        [numbers[number::FUNCTION], numbers[number::FINGERPRINT]] = self.call.to_words();
        numbers[number::FLAGS] = self.flags();
        numbers[number::PARENT_PID] = self.parent.pid.into();
        numbers[number::LEN_IN_MEMFD] = self.arguments_in_memfd.unwrap_or(0);
        let mut bytes = Vec::with_capacity(HEAD + texts.iter().map(|text| text.len()).sum::<usize>());
        for number in numbers.into_iter().chain(texts.map(|text| text.len() as u64)) {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        texts.into_iter().for_each(|text| bytes.extend_from_slice(text));
        Ok(bytes)
    }

    fn flags(&self) -> u64 {
        let streams = self.streams.into_iter().zip(flag::STREAMS).map(|(is_set, bit)| (bit, is_set));
        let others = [
            (flag::DAEMON, self.daemon),
            (flag::BY_EXEC, self.start_method == StartMethod::Spawn),
            (flag::PASSED_ON, self.goes_by_server),
            (flag::DIRECTORY, self.has_directory),
            (flag::OWN_DIRECTORY, self.has_own_directory),
            (flag::SHIELDED, self.is_shielded),
            (flag::LEADS_GROUP, self.leads_group),
            (flag::PARENT_IS_DAEMON, self.parent.daemon),
            (flag::PARENT_BY_EXEC, self.parent.start_method == Some(StartMethod::Spawn)),
            (flag::PARENT_WAS_STARTED, self.parent.start_method.is_some()),
            (flag::BACKTRACES, self.backtraces == Some(true)),
            (flag::BACKTRACES_ARE_SET, self.backtraces.is_some()),
            (flag::ENVIRONMENT, self.starter_environment.is_some()),
            (flag::ATTRIBUTES, self.attributes.is_some()),
            (flag::ARGUMENTS_IN_MEMFD, self.arguments_in_memfd.is_some()),
        ];
        let level = u64::from(self.trace_level & 7) << flag::TRACE_LEVEL;
        streams.chain(others).filter(|(_, is_set)| *is_set).fold(level, |flags, (bit, _)| flags | bit)
    }

    /// Decodes the order at the beginning of `bytes`; returns it and its length, or `None` if there is none.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<(Self, usize)> {
        let (head, mut rest) = bytes.split_at_checked(HEAD)?;
        let number = |at: usize| Some(u64::from_le_bytes(head.get(8 * at..8 * at + 8)?.try_into().ok()?));
        let mut texts: [&[u8]; text::COUNT] = [&[]; text::COUNT];
        for (at, text) in texts.iter_mut().enumerate() {
            (*text, rest) = rest.split_at_checked(number(number::COUNT + at)?.try_into().ok()?)?;
        }
        let name = |at: usize| std::str::from_utf8(texts[at]).ok().map(str::to_owned);
        let variables = |at: usize| Variables::from_bytes(texts[at]);
        let flags = number(number::FLAGS)?;
        let is_set = |bit: u64| flags & bit != 0;
        let attributes =
            if is_set(flag::ATTRIBUTES) { Some(wire::from_bytes(texts[text::ATTRIBUTES]).ok()?) } else { None };
        let parent = ProcessInfo {
            name: name(text::NAME_OF_PARENT)?,
            pid: number(number::PARENT_PID)?.try_into().ok()?,
            daemon: is_set(flag::PARENT_IS_DAEMON),
            start_method: is_set(flag::PARENT_WAS_STARTED).then(|| method_of(is_set(flag::PARENT_BY_EXEC))),
        };
        let order = Self {
            call: Call::from_words([number(number::FUNCTION)?, number(number::FINGERPRINT)?]),
            name: name(text::NAME)?,
            daemon: is_set(flag::DAEMON),
            start_method: method_of(is_set(flag::BY_EXEC)),
            parent,
            goes_by_server: is_set(flag::PASSED_ON),
            starter_environment: is_set(flag::ENVIRONMENT).then(|| variables(text::ENVIRONMENT)),
            has_directory: is_set(flag::DIRECTORY),
            has_own_directory: is_set(flag::OWN_DIRECTORY),
            attributes,
            own_variables: variables(text::OWN_VARIABLES),
            is_shielded: is_set(flag::SHIELDED),
            leads_group: is_set(flag::LEADS_GROUP),
            backtraces: is_set(flag::BACKTRACES_ARE_SET).then(|| is_set(flag::BACKTRACES)),
            streams: flag::STREAMS.map(is_set),
            arguments_in_memfd: match is_set(flag::ARGUMENTS_IN_MEMFD) {
                true => Some(number(number::LEN_IN_MEMFD)?),
                false => None,
            },
            trace_level: (flags >> flag::TRACE_LEVEL) as u8 & 7,
        };
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

    /// Assigns the attached descriptors: report, lifeline, streams, directories, arguments, traces, attachments. The
    /// first two are not attached if `report` is given.
    pub(super) fn assign_descriptors(&self, report: Option<OwnedFd>, fds: Vec<OwnedFd>) -> io::Result<Descriptors> {
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
            traces: take(self.trace_level > 0)?,
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
            goes_by_server: true,
            starter_environment: None,
            has_directory: false,
            has_own_directory: true,
            attributes: None,
            own_variables: Variables::default(),
            is_shielded: true,
            leads_group: false,
            backtraces: None,
            streams: [false, true, false],
            arguments_in_memfd: None,
            trace_level: 0,
        };
        let full = Order {
            call: Call::of(|| ()),
            name: "né".into(),
            daemon: true,
            start_method: StartMethod::Spawn,
            parent,
            goes_by_server: false,
            starter_environment: Some(Variables::default()),
            has_directory: true,
            has_own_directory: false,
            attributes: Some(attributes),
            own_variables: [("A".into(), "1".into())].into_iter().collect(),
            is_shielded: false,
            leads_group: true,
            backtraces: Some(false),
            streams: [true, false, true],
            arguments_in_memfd: Some(u64::MAX),
            trace_level: 5,
        };
        [plain, full]
    }

    #[test]
    fn order_arrives_as_sent_and_leaves_the_following_bytes() {
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
            for at in 8 * number::COUNT..HEAD {
                let mut damaged = bytes.clone();
                damaged[at] ^= 0x80;
                assert_ne!(Order::from_bytes(&damaged).map(|(order, _)| order), Some(order.clone()), "byte {at}");
            }
        }
    }
}
