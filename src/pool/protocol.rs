//! The messages between the pool and a worker.

use crate::channel::lane::{self, Pace};
use crate::process::entry;
use crate::wire::EncodedMessage;
use serde::{Deserialize, Serialize};

/// One function and its arguments.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Task {
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

/// Of a [`Pace`], in an order's head: until the last order begins. Less are microseconds.
const LAST: u16 = u16::MAX;

impl Header {
    pub(super) const LEN: usize = 56;

    pub(super) fn to_bytes(self) -> [u8; Self::LEN] {
        let [offset, fingerprint] = self.call.to_words();
        let pace = match self.pace {
            Pace::Each => 0,
            Pace::Within(us) => us.clamp(1, LAST - 1),
            Pace::Last => LAST,
        };
        let rest = u64::from(self.attempt) << 32
            | u64::from(self.has_events) << 6
            | u64::from(self.is_remote) << 5
            | u64::from(pace) << 8
            | u64::from(self.level) << 1;
        // A limit that is never reached is none.
        let limit = self.limit.unwrap_or(u64::MAX);
        let mut bytes = [0; Self::LEN];
        for (at, word) in bytes.chunks_exact_mut(8).zip([
            offset,
            fingerprint,
            rest,
            limit,
            self.origin.submitter,
            self.origin.call,
            self.first,
        ]) {
            at.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let (head, _) = bytes.split_first_chunk::<{ Self::LEN }>()?;
        let mut words = head.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_ne_bytes));
        let (offset, fingerprint) = (words.next()?, words.next()?);
        let (rest, limit) = (words.next()?, words.next()?);
        let (origin, first) = (Origin { submitter: words.next()?, call: words.next()? }, words.next()?);
        let call = entry::Call::from_words([offset, fingerprint]);
        let (limit, level) = (Some(limit).filter(|limit| *limit < u64::MAX), (rest >> 1) as u8 & 7);
        let (is_remote, has_events) = (rest & 32 != 0, rest & 64 != 0);
        let pace = match (rest >> 8) as u16 {
            0 => Pace::Each,
            LAST => Pace::Last,
            us => Pace::Within(us),
        };
        let attempt = (rest >> 32) as u32;
        Some(Self { call, attempt, limit, level, pace, is_remote, has_events, origin, first })
    }
}

/// An order, or a result of this kind plus that of its outcome, lies in the pipe beside the lane: it is large, or
/// brings descriptors.
pub(super) const IN_PIPE: u8 = 8;

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
    pub(super) initializer: Option<Task>,
    pub(super) finalizer: Option<Task>,
    pub(super) conditions: Conditions,
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
