//! The messages between the pool and a worker.

use crate::channel::lane::{self, Pace};
use crate::process::entry;
use crate::wire::EncodedMessage;
use serde::{Deserialize, Serialize};
use std::ops::Deref;

/// One function and its arguments.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct EncodedTask {
    pub(super) call: entry::Call,
    pub(super) arguments: EncodedMessage,
}

/// The header of an order. The arguments of each item follow, as a ring of records would hold them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) call: entry::Call,
    pub(super) attempt: u32,
    /// Microseconds that an item may take, its grace included; `None` is for ever. The start of one with a limit is noted,
    /// and instead of its result it has a record of kind [`LATE`] if it ends later.
    pub(super) limit: Option<u64>,
    /// The level of traces that is of interest; 0 is none.
    pub(super) level: u8,
    /// When the pool is notified of its results; see [`lane::WorkerEnd::defer_notification`].
    pub(super) pace: Pace,
    /// The worker is to report how long it takes.
    pub(super) is_timed: bool,
    /// Its results go to another host: what is or holds a handle cannot be one.
    pub(super) is_remote: bool,
    /// Its one item brings the queue for its events.
    pub(super) has_events: bool,
    pub(super) origin: Origin,
    /// The index of its first item in its call.
    pub(super) first: u64,
}

/// A call, unlike all others: the process that asked for it by a random number, and its number there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Origin {
    pub(crate) submitter: u64,
    pub(crate) call: u64,
}

/// A [`Pace`] in an order's head: until the last order begins. Lower values are microseconds.
const LAST: u16 = u16::MAX;

/// Which words an order's head has behind the first four.
const IS_WIDE: u64 = 1 << 24;
const HAS_LIMIT: u64 = 1 << 25;
const HAS_SUBMITTER: u64 = 1 << 26;

impl Header {
    /// Four words: the call's two, what fits into bits, and the numbers of the call and of the first item, if both are
    /// below 2^32. Then those that most orders do not have.
    pub(super) const LONGEST: usize = 56;

    /// `submitter` is that of this process, which its workers know.
    pub(super) fn to_bytes(self, submitter: u64) -> HeaderBytes {
        let [offset, fingerprint] = self.call.to_words();
        let pace = match self.pace {
            Pace::Each => 0,
            Pace::Within(us) => us.clamp(1, LAST - 1),
            Pace::Last => LAST,
        };
        let is_wide = (self.origin.call | self.first) >> 32 != 0;
        let is_others = self.origin.submitter != submitter;
        // A limit that is never reached is none.
        let limit = self.limit.filter(|limit| *limit < u64::MAX);
        let rest = u64::from(self.attempt) << 32
            | if is_others { HAS_SUBMITTER } else { 0 }
            | if limit.is_some() { HAS_LIMIT } else { 0 }
            | if is_wide { IS_WIDE } else { 0 }
            | u64::from(pace) << 8
            | u64::from(self.is_timed) << 7
            | u64::from(self.has_events) << 6
            | u64::from(self.is_remote) << 5
            | u64::from(self.level) << 1;
        let place = if is_wide { self.origin.call } else { self.origin.call << 32 | self.first };
        let more = [Some(self.first).filter(|_| is_wide), limit, is_others.then_some(self.origin.submitter)];
        let words = [offset, fingerprint, rest, place].into_iter().chain(more.into_iter().flatten());
        let mut head = HeaderBytes { bytes: [0; Self::LONGEST], len: 0 };
        for (at, word) in head.bytes.chunks_exact_mut(8).zip(words) {
            at.copy_from_slice(&word.to_ne_bytes());
            head.len += 8;
        }
        head
    }

    /// And how many bytes it takes up.
    pub(super) fn read(bytes: &[u8], submitter: u64) -> Option<(Self, usize)> {
        let mut len = 0;
        let mut word = || {
            let word = bytes.get(len..len + 8)?.try_into().ok()?;
            len += 8;
            Some(u64::from_ne_bytes(word))
        };
        let call = entry::Call::from_words([word()?, word()?]);
        let (rest, place) = (word()?, word()?);
        let (number, first) = match rest & IS_WIDE {
            0 => (place >> 32, place & u64::from(u32::MAX)),
            _ => (place, word()?),
        };
        let limit = if rest & HAS_LIMIT != 0 { Some(word()?) } else { None };
        let submitter = if rest & HAS_SUBMITTER != 0 { word()? } else { submitter };
        let (level, is_remote, has_events) = ((rest >> 1) as u8 & 7, rest & 32 != 0, rest & 64 != 0);
        let is_timed = rest & 128 != 0;
        let pace = match (rest >> 8) as u16 {
            0 => Pace::Each,
            LAST => Pace::Last,
            us => Pace::Within(us),
        };
        let (attempt, origin) = ((rest >> 32) as u32, Origin { submitter, call: number });
        Some((Self { call, attempt, limit, level, pace, is_timed, is_remote, has_events, origin, first }, len))
    }
}

/// An order's head as its worker gets it.
pub(super) struct HeaderBytes {
    bytes: [u8; Header::LONGEST],
    len: usize,
}

impl Deref for HeaderBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// An order, or a result of this kind plus that of its outcome, lies in the pipe beside the lane: it is large, or
/// brings descriptors.
pub(super) const IN_PIPE: u8 = 8;

/// With [`IN_PIPE`], an order of one item, whose arguments lie there as they are, without the head of a record: the worker need
/// not copy them out of it.
pub(super) const BARE: u8 = 1;

/// A record among the results that is none: a trace message of an item.
pub(super) const TRACE: u8 = 4;

/// A record that stands for the result of an item that ended after its limit, by the worker's own clock. It is empty.
pub(super) const LATE: u8 = 5;

/// Everything that a worker gets when it starts.
#[derive(Serialize, Deserialize)]
pub(super) struct Contract {
    pub(super) lane: lane::WorkerEnd,
    pub(super) orders: crate::channel::Receiver<EncodedMessage>,
    pub(super) results: crate::channel::Sender<EncodedMessage>,
    /// Its outcome is the first result, if there is one.
    pub(super) initializer: Option<EncodedTask>,
    pub(super) finalizer: Option<EncodedTask>,
    pub(super) conditions: Conditions,
    /// The submitter of most of its orders; see [`Origin`].
    pub(super) submitter: u64,
}

/// Under which a worker works.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Conditions {
    pub(super) nice: Option<i32>,
    pub(super) cpu: Option<usize>,
    /// Bytes of address space.
    pub(super) memory: Option<u64>,
    /// Descriptors.
    pub(super) descriptors: Option<u64>,
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    #[test]
    fn header_of_an_order_has_rare_words_only_where_they_are_used() {
        let origin = Origin { submitter: 7, call: u64::from(u32::MAX) };
        let plain = Header {
            call: entry::Call::of(|| ()),
            attempt: u32::MAX,
            limit: None,
            level: 5,
            pace: Pace::Within(400),
            is_timed: true,
            is_remote: false,
            has_events: true,
            origin,
            first: u64::from(u32::MAX),
        };
        let rest = Header { pace: Pace::Last, is_timed: false, is_remote: true, has_events: false, level: 0, ..plain };
        let cases = [
            (plain, 32),
            (Header { limit: Some(u64::MAX - 1), ..plain }, 40),
            (Header { first: 1 << 32, pace: Pace::Each, ..plain }, 40),
            (Header { origin: Origin { submitter: 8, call: 1 }, ..rest }, 40),
            (Header { limit: Some(1), first: u64::MAX, origin: Origin { submitter: 0, call: u64::MAX }, ..rest }, 56),
        ];
        for (header, len) in cases {
            let mut bytes = header.to_bytes(7).to_vec();
            assert_eq!(bytes.len(), len);
            bytes.extend([1; 70]);
            assert_eq!(Header::read(&bytes, 7), Some((header, len)));
            assert_eq!(Header::read(&bytes[..len - 1], 7), None);
        }
    }
}
