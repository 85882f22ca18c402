//! The messages between submitters and hosts.
//!
//! Each message begins with the version of this format and a byte for its kind; numbers are little-endian, and what follows is
//! checked against the bytes that are there. Subjects, in the pool `P`:
//!
//! | subject | from, to | message |
//! |---|---|---|
//! | `mp.P.t.BUILD.SUBMITTER` | submitter, to the stream, to one host | [`Tasks`] |
//! | `mp.P.s.SUBMITTER.a.NUMBER` | stream to submitter | the stream has it (JSON, of the server) |
//! | `mp.P.s.SUBMITTER.r` | host to submitter, which confirms | [`Answer`] |
//! | `mp.P.s.SUBMITTER.q` | host to submitter, which answers [`Wanted`] | [`Ask`]: is it wanted? |
//! | `mp.P.s.SUBMITTER.h` | host to submitter, which answers [`Numbers`] that it does not want | [`HeldMessages`] |
//! | `mp.P.s.SUBMITTER.b` | host to submitter | [`HeldMessages`], of the items that were given back before they began |
//! | `mp.P.s.SUBMITTER.k` | host to submitter | [`HeldMessages`], of the items that were given back and may have begun |
//! | `mp.P.s.SUBMITTER.p`, `mp.P.h.HOST.p` | to the owner of a large value, which answers with it | [`Piece`] |
//! | `mp.P.h.HOST.in`, `mp.P.h.HOST.n.SUBMITTER` | what a host gets for its requests | |
//! | `mp.P.h.HOST.e`, `mp.P.h.HOST.z` | host to itself: whether the server is there, and the last of what it sends | |
//! | `mp.P.c` | submitter to all hosts | [`Cancel`] |
//! | `mp.P.beat` | host to all submitters | [`Beat`] |
//! | `mp.P.roll` | submitter to all hosts: asks for a beat | empty |

use crate::pool::{Limits, Origin, Retry};
use crate::process::entry;
use bytes::Bytes;
use std::time::Duration;

const VERSION: u8 = 1;

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Malformed {
    /// It is of this version of the format, which another release of the crate may have.
    Version(u8),
    Damaged,
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Version(other) => {
                write!(
                    f,
                    "it is of version {other} of the cluster's messages; this release of multiprocess knows {VERSION}"
                )
            }
            Self::Damaged => f.write_str("it is damaged, or not from multiprocess"),
        }
    }
}

pub(super) trait Message: Sized {
    const KIND: u8;

    fn write(&self, to: &mut Writer);

    fn read(from: &mut Reader) -> Option<Self>;

    fn encode(&self) -> Bytes {
        let mut writer = Writer(vec![VERSION, Self::KIND]);
        self.write(&mut writer);
        writer.0.into()
    }

    /// Decodes all of the bytes, without taking more memory than they do.
    fn decode(bytes: &Bytes) -> Result<Self, Malformed> {
        match bytes.first() {
            Some(&VERSION) => {}
            Some(&other) => return Err(Malformed::Version(other)),
            None => return Err(Malformed::Damaged),
        }
        let mut reader = Reader { bytes: bytes.slice(1..) };
        let is_kind = reader.u8() == Some(Self::KIND);
        let message = is_kind.then(|| Self::read(&mut reader)).flatten();
        message.filter(|_| reader.bytes.is_empty()).ok_or(Malformed::Damaged)
    }
}

pub(super) struct Writer(Vec<u8>);

impl Writer {
    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, value: &[u8]) {
        self.u64(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    fn time(&mut self, value: Duration) {
        self.u64(value.as_nanos().min(u128::from(u64::MAX)) as u64);
    }

    fn optional(&mut self, value: Option<Duration>) {
        self.u8(u8::from(value.is_some()));
        self.time(value.unwrap_or_default());
    }

    fn list<T>(&mut self, values: &[T], write: impl Fn(&mut Self, &T)) {
        self.u32(values.len() as u32);
        values.iter().for_each(|value| write(self, value));
    }
}

pub(super) struct Reader {
    bytes: Bytes,
}

impl Reader {
    fn take(&mut self, len: usize) -> Option<Bytes> {
        (len <= self.bytes.len()).then(|| self.bytes.split_to(len))
    }

    fn u8(&mut self) -> Option<u8> {
        Some(*self.take(1)?.first()?)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.as_ref().try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.as_ref().try_into().ok()?))
    }

    fn bytes(&mut self) -> Option<Bytes> {
        let len = self.u64()?;
        self.take(len.try_into().ok()?)
    }

    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?.into()).ok()
    }

    fn bool(&mut self) -> Option<bool> {
        match self.u8()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    fn time(&mut self) -> Option<Duration> {
        self.u64().map(Duration::from_nanos)
    }

    fn optional(&mut self) -> Option<Option<Duration>> {
        let (is_some, time) = (self.bool()?, self.time()?);
        Some(is_some.then_some(time))
    }

    /// Each element takes a byte at least, so a list has no more of them than there are bytes.
    fn list<T>(&mut self, read: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = self.u32()? as usize;
        if count > self.bytes.len() {
            return None;
        }
        let mut values = Vec::new();
        for _ in 0..count {
            values.push(read(self)?);
        }
        Some(values)
    }
}

/// The bytes of a message that may be large.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Body {
    Here(Bytes),
    /// Its owner has so many bytes under this key, and gives them out in pieces.
    There {
        key: u64,
        len: u64,
    },
}

impl Body {
    fn write(&self, to: &mut Writer) {
        match self {
            Self::Here(bytes) => {
                to.u8(0);
                to.bytes(bytes);
            }
            Self::There { key, len } => {
                to.u8(1);
                to.u64(*key);
                to.u64(*len);
            }
        }
    }

    fn read(from: &mut Reader) -> Option<Self> {
        match from.u8()? {
            0 => from.bytes().map(Self::Here),
            1 => Some(Self::There { key: from.u64()?, len: from.u64()? }),
            _ => None,
        }
    }
}

/// Orders of one submitter, which one host executes together.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tasks {
    pub(super) submitter: u64,
    /// The number of this message, among all of its submitter's.
    pub(super) number: u64,
    /// A host asks before it begins: only its submitter knows some of the limits.
    pub(super) is_to_ask: bool,
    pub(super) orders: Vec<MessageOrder>,
    /// The arguments of all orders, one behind the other.
    pub(super) body: Body,
}

/// One order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct MessageOrder {
    /// Among the orders of its message, for answers and cancellations.
    pub(super) place: u32,
    pub(super) call: [u64; 2],
    /// Which call it is of.
    pub(super) origin: Origin,
    pub(super) first: u64,
    pub(super) count: u32,
    pub(super) attempt: u32,
    pub(super) limits: Limits,
    pub(super) item_time: Option<Duration>,
    /// Bytes of its arguments.
    pub(super) len: u64,
}

impl MessageOrder {
    fn write(to: &mut Writer, task: &Self) {
        let Self { place, call, origin, first, count, attempt, limits, item_time, len } = task;
        to.u32(*place);
        call.iter().for_each(|word| to.u64(*word));
        to.u64(origin.submitter);
        to.u64(origin.call);
        to.u64(*first);
        to.u32(*count);
        to.u32(*attempt);
        let Limits { timeout, grace, retries, retry_on, back_off, chunk } = limits;
        to.optional(*timeout);
        to.time(*grace);
        to.u32(*retries);
        to.u8(retry_on.to_bits());
        to.time(*back_off);
        to.u32((*chunk).try_into().unwrap_or(u32::MAX));
        to.optional(*item_time);
        to.u64(*len);
    }

    fn read(from: &mut Reader) -> Option<Self> {
        let (place, call) = (from.u32()?, [from.u64()?, from.u64()?]);
        let origin = Origin { submitter: from.u64()?, call: from.u64()? };
        let (first, count, attempt) = (from.u64()?, from.u32()?, from.u32()?);
        let limits = Limits {
            timeout: from.optional()?,
            grace: from.time()?,
            retries: from.u32()?,
            retry_on: Retry::from_bits(from.u8()?)?,
            back_off: from.time()?,
            chunk: from.u32()? as usize,
        };
        let (item_time, len) = (from.optional()?, from.u64()?);
        Some(Self { place, call, origin, first, count, attempt, limits, item_time, len })
    }

    pub(super) fn entry(&self) -> entry::Call {
        entry::Call::from_words(self.call)
    }
}

impl Tasks {
    /// The bytes with which a message of this number begins.
    pub(super) fn head(submitter: u64, number: u64) -> [u8; 18] {
        let mut head = [0; 18];
        head[..2].copy_from_slice(&[VERSION, Self::KIND]);
        head[2..10].copy_from_slice(&submitter.to_le_bytes());
        head[10..].copy_from_slice(&number.to_le_bytes());
        head
    }
}

impl Message for Tasks {
    const KIND: u8 = 1;

    fn write(&self, to: &mut Writer) {
        to.u64(self.submitter);
        to.u64(self.number);
        to.u8(u8::from(self.is_to_ask));
        to.list(&self.orders, MessageOrder::write);
        self.body.write(to);
    }

    fn read(from: &mut Reader) -> Option<Self> {
        let (submitter, number, is_to_ask) = (from.u64()?, from.u64()?, from.bool()?);
        let tasks =
            Self { submitter, number, is_to_ask, orders: from.list(MessageOrder::read)?, body: Body::read(from)? };
        let len = match &tasks.body {
            Body::Here(bytes) => bytes.len() as u64,
            Body::There { len, .. } => *len,
        };
        let said = tasks.orders.iter().try_fold(0_u64, |sum, order| sum.checked_add(order.len));
        (said == Some(len) && !tasks.orders.is_empty()).then_some(tasks)
    }
}

/// Results of some items of a message.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Answer {
    pub(super) number: u64,
    pub(super) host: u64,
    /// There will be no more.
    pub(super) is_last: bool,
    pub(super) parts: Vec<Part>,
    /// For each order that has ended: its place in the message, how long its items took in all, and how many those were.
    pub(super) ran: Vec<(u32, Duration, u32)>,
    pub(super) body: Body,
}

/// Results of consecutive items of one order: where it is in the message, which items, and how many bytes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Part {
    pub(super) order: u32,
    pub(super) first: u64,
    pub(super) count: u32,
    pub(super) len: u64,
}

impl Message for Answer {
    const KIND: u8 = 2;

    fn write(&self, to: &mut Writer) {
        to.u64(self.number);
        to.u64(self.host);
        to.u8(u8::from(self.is_last));
        to.list(&self.parts, |to, part| {
            to.u32(part.order);
            to.u64(part.first);
            to.u32(part.count);
            to.u64(part.len);
        });
        to.list(&self.ran, |to, (order, time, items)| {
            to.u32(*order);
            to.time(*time);
            to.u32(*items);
        });
        self.body.write(to);
    }

    fn read(from: &mut Reader) -> Option<Self> {
        let (number, host, is_last) = (from.u64()?, from.u64()?, from.bool()?);
        let parts = from
            .list(|from| Some(Part { order: from.u32()?, first: from.u64()?, count: from.u32()?, len: from.u64()? }))?;
        let ran = from.list(|from| Some((from.u32()?, from.time()?, from.u32()?)))?;
        Some(Self { number, host, is_last, parts, ran, body: Body::read(from)? })
    }
}

/// Whether this message is still wanted, which was delivered for the `delivered`th time.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ask {
    pub(super) number: u64,
    pub(super) host: u64,
    pub(super) delivered: u32,
}

impl Message for Ask {
    const KIND: u8 = 3;

    fn write(&self, to: &mut Writer) {
        to.u64(self.number);
        to.u64(self.host);
        to.u32(self.delivered);
    }

    fn read(from: &mut Reader) -> Option<Self> {
        Some(Self { number: from.u64()?, host: from.u64()?, delivered: from.u32()? })
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Wanted {
    pub(super) is_wanted: bool,
    /// How often its items were given to other hosts, which were lost.
    pub(super) losses: u32,
    /// Its items are to have begun within this.
    pub(super) start_in: Option<Duration>,
}

impl Message for Wanted {
    const KIND: u8 = 4;

    fn write(&self, to: &mut Writer) {
        to.u8(u8::from(self.is_wanted));
        to.u32(self.losses);
        to.optional(self.start_in);
    }

    fn read(from: &mut Reader) -> Option<Self> {
        Some(Self { is_wanted: from.bool()?, losses: from.u32()?, start_in: from.optional()? })
    }
}

/// The items of one submitter that a host holds.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct HeldMessages {
    pub(super) host: u64,
    pub(super) numbers: Vec<u64>,
}

impl Message for HeldMessages {
    const KIND: u8 = 5;

    fn write(&self, to: &mut Writer) {
        to.u64(self.host);
        to.list(&self.numbers, |to, number| to.u64(*number));
    }

    fn read(from: &mut Reader) -> Option<Self> {
        Some(Self { host: from.u64()?, numbers: from.list(Reader::u64)? })
    }
}

/// Messages of one submitter.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Numbers(pub(super) Vec<u64>);

impl Message for Numbers {
    const KIND: u8 = 6;

    fn write(&self, to: &mut Writer) {
        to.list(&self.0, |to, number| to.u64(*number));
    }

    fn read(from: &mut Reader) -> Option<Self> {
        from.list(Reader::u64).map(Self)
    }
}

/// Orders that nobody wants any more: their messages, and their places in these.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Cancel {
    pub(super) submitter: u64,
    pub(super) orders: Vec<(u64, u32)>,
}

impl Message for Cancel {
    const KIND: u8 = 7;

    fn write(&self, to: &mut Writer) {
        to.u64(self.submitter);
        to.list(&self.orders, |to, (number, order)| {
            to.u64(*number);
            to.u32(*order);
        });
    }

    fn read(from: &mut Reader) -> Option<Self> {
        Some(Self { submitter: from.u64()?, orders: from.list(|from| Some((from.u64()?, from.u32()?)))? })
    }
}

/// A host shows that it is there.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Beat {
    pub(super) host: u64,
    pub(super) build: u64,
    pub(super) pid: u32,
    pub(super) hostname: String,
    pub(super) name: String,
    pub(super) slots: u32,
    pub(super) busy: u32,
    pub(super) tasks: u64,
    pub(super) age: Duration,
    pub(super) is_leaving: bool,
}

impl Message for Beat {
    const KIND: u8 = 8;

    fn write(&self, to: &mut Writer) {
        to.u64(self.host);
        to.u64(self.build);
        to.u32(self.pid);
        to.bytes(self.hostname.as_bytes());
        to.bytes(self.name.as_bytes());
        to.u32(self.slots);
        to.u32(self.busy);
        to.u64(self.tasks);
        to.time(self.age);
        to.u8(u8::from(self.is_leaving));
    }

    fn read(from: &mut Reader) -> Option<Self> {
        Some(Self {
            host: from.u64()?,
            build: from.u64()?,
            pid: from.u32()?,
            hostname: from.text()?,
            name: from.text()?,
            slots: from.u32()?,
            busy: from.u32()?,
            tasks: from.u64()?,
            age: from.time()?,
            is_leaving: from.bool()?,
        })
    }
}

/// Asks for some bytes of a large value. The answer is those bytes; none if it is not there any more.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub(super) key: u64,
    pub(super) at: u64,
    pub(super) len: u32,
}

impl Message for Piece {
    const KIND: u8 = 9;

    fn write(&self, to: &mut Writer) {
        to.u64(self.key);
        to.u64(self.at);
        to.u32(self.len);
    }

    fn read(from: &mut Reader) -> Option<Self> {
        Some(Self { key: from.u64()?, at: from.u64()?, len: from.u32()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task() -> MessageOrder {
        let limits = Limits {
            timeout: Some(Duration::from_millis(3)),
            grace: Duration::from_millis(10),
            retries: 2,
            retry_on: Retry::DIED,
            back_off: Duration::from_micros(7),
            chunk: 5,
        };
        let item_time = Some(Duration::from_nanos(9));
        MessageOrder {
            place: 6,
            call: [1, u64::MAX],
            origin: Origin { submitter: 2, call: 3 },
            first: 4,
            count: 2,
            attempt: 1,
            limits,
            item_time,
            len: 4,
        }
    }

    fn tasks() -> Tasks {
        let body = Body::Here(Bytes::from_static(b"abcdefgh"));
        Tasks { submitter: 7, number: 8, is_to_ask: true, orders: vec![task(), task()], body }
    }

    fn answer() -> Answer {
        let part = Part { order: 1, first: 4, count: 2, len: 99 };
        let ran = vec![(1, Duration::from_secs(1), 2)];
        Answer { number: 8, host: 5, is_last: true, parts: vec![part], ran, body: Body::There { key: 1, len: 99 } }
    }

    fn beat() -> Beat {
        let (hostname, name) = ("box".into(), "render".into());
        let age = Duration::from_secs(3);
        Beat { host: 1, build: 2, pid: 3, hostname, name, slots: 4, busy: 5, tasks: 6, age, is_leaving: false }
    }

    fn check<M: Message + PartialEq + std::fmt::Debug>(message: &M) {
        let bytes = message.encode();
        assert_eq!(M::decode(&bytes).as_ref(), Ok(message));
        for len in 0..bytes.len() {
            assert!(M::decode(&bytes.slice(..len)).is_err(), "cut at {len}: {message:?}");
        }
        let longer: Bytes = [&bytes[..], &[0]].concat().into();
        assert_eq!(M::decode(&longer), Err(Malformed::Damaged));
        let mut newer = bytes.to_vec();
        newer[0] = 2;
        assert_eq!(M::decode(&newer.into()), Err(Malformed::Version(2)));
        assert_eq!(M::decode(&vec![0; 1 << 20].into()), Err(Malformed::Version(0)));
        let mut zeros = vec![0; 1 << 20];
        (zeros[0], zeros[1]) = (VERSION, M::KIND);
        assert!(M::decode(&zeros.into()).is_err());
    }

    #[test]
    fn messages_come_back_as_they_were_and_not_if_they_are_cut_longer_newer_or_zeros() {
        check(&tasks());
        check(&answer());
        check(&Ask { number: 1, host: 2, delivered: 3 });
        check(&Wanted { is_wanted: true, losses: 1, start_in: Some(Duration::from_secs(1)) });
        check(&HeldMessages { host: 1, numbers: vec![2, 3] });
        check(&Numbers(vec![2, 3]));
        check(&Cancel { submitter: 1, orders: vec![(2, 3)] });
        check(&beat());
        check(&Piece { key: 1, at: 2, len: 3 });
    }

    #[test]
    fn tasks_begin_with_their_head() {
        assert!(tasks().encode().starts_with(&Tasks::head(7, 8)));
    }

    #[test]
    fn counts_and_lengths_that_lie_are_refused() {
        let mut lies = tasks();
        lies.orders[0].len = u64::MAX;
        assert!(Tasks::decode(&lies.encode()).is_err());
        lies.orders[0].len = 5;
        assert!(Tasks::decode(&lies.encode()).is_err());
        lies.orders.clear();
        assert!(Tasks::decode(&lies.encode()).is_err());
        let mut writer = Writer(vec![VERSION, Numbers::KIND]);
        writer.u32(u32::MAX);
        assert!(Numbers::decode(&writer.0.into()).is_err());
        let mut writer = Writer(vec![VERSION, Beat::KIND]);
        (0..2).for_each(|_| writer.u64(0));
        writer.u32(0);
        writer.u64(u64::MAX);
        assert!(Beat::decode(&writer.0.into()).is_err());
    }

    /// Random changes of whole messages: never a panic, never more memory than the message has.
    #[test]
    fn changed_messages_are_errors_or_other_messages() {
        let originals = [
            tasks().encode(),
            answer().encode(),
            beat().encode(),
            HeldMessages { host: 1, numbers: vec![2, 3] }.encode(),
        ];
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed % below.max(1) as u64) as usize
        };
        let mut survivors = 0;
        for round in 0..100_000 {
            let mut bytes = originals[round % originals.len()].to_vec();
            for _ in 0..=random(3) {
                let at = random(bytes.len());
                match random(4) {
                    0 => bytes[at] = random(256) as u8,
                    1 => bytes[at] ^= 1 << random(8),
                    2 => bytes.truncate(at),
                    _ => bytes.insert(at, random(256) as u8),
                }
                if bytes.is_empty() {
                    break;
                }
            }
            let bytes = Bytes::from(bytes);
            survivors += usize::from(Tasks::decode(&bytes).is_ok());
            survivors += usize::from(Answer::decode(&bytes).is_ok());
            survivors += usize::from(Beat::decode(&bytes).is_ok());
            survivors += usize::from(HeldMessages::decode(&bytes).is_ok());
        }
        assert!(survivors > 0, "some changes are of values only");
    }
}
