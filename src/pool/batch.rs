//! Encoded results of consecutive items, on their way back to the caller.

use crate::channel::spsc;
use crate::error::{Error, ErrorKind, Result};
use crate::process::entry::{IS_VALUE, Outcome};
use crate::wire::EncodedMessage;
use bytes::{Buf, Bytes};
use serde::de::DeserializeOwned;

/// Results as they came from a worker, one after the other.
pub(super) struct Records {
    first: u64,
    count: u32,
    /// How many of them are no values.
    failures: u32,
    /// The kinds of the errors, by their items, if they are known.
    kinds: Vec<(u64, ErrorKind)>,
    bytes: Bytes,
    at: usize,
}

/// The results of some items with consecutive numbers.
pub(super) enum ResultBatch {
    Records(Records),
    /// One that did not come through the ring: it is large, brings descriptors, or failed here.
    One(u64, Option<Result<(u8, EncodedMessage)>>),
}

impl ResultBatch {
    pub(super) fn records(first: u64, count: u32, failures: u32, bytes: Bytes) -> Self {
        Self::Records(Records { first, count, failures, kinds: Vec::new(), bytes, at: 0 })
    }

    /// Sets the kinds of the failures, for results of a pool elsewhere.
    pub(super) fn with_kinds(mut self, of: Vec<(u64, ErrorKind)>) -> Self {
        if let Self::Records(Records { kinds, .. }) = &mut self {
            *kinds = of;
        }
        self
    }

    /// The kinds of its failures, if they are records and that is known.
    pub(super) fn kinds(&self) -> &[(u64, ErrorKind)] {
        match self {
            ResultBatch::Records(records) => &records.kinds,
            ResultBatch::One(..) => &[],
        }
    }

    pub(super) fn failed(index: u64, error: Error) -> Self {
        Self::One(index, Some(Err(error)))
    }

    /// The end of an item that did not come as a record: the tag of its report, or the kind of its error.
    pub(super) fn outcome_of_one(&self) -> Option<std::result::Result<u8, ErrorKind>> {
        match self {
            ResultBatch::One(_, Some(Ok((tag, _)))) => Some(Ok(*tag)),
            ResultBatch::One(_, Some(Err(error))) => Some(Err(error.kind())),
            ResultBatch::One(_, None) | ResultBatch::Records(_) => None,
        }
    }

    pub(super) fn first(&self) -> u64 {
        match self {
            ResultBatch::Records(records) => records.first,
            ResultBatch::One(index, _) => *index,
        }
    }

    pub(super) fn count(&self) -> u32 {
        match self {
            ResultBatch::Records(records) => records.count,
            ResultBatch::One(..) => 1,
        }
    }

    /// Returns how many items in it failed, as far as their tags show.
    pub(super) fn failures(&self) -> u32 {
        match self {
            ResultBatch::One(_, outcome) => u32::from(!matches!(outcome, Some(Ok((IS_VALUE, _))))),
            ResultBatch::Records(records) => records.failures,
        }
    }

    /// The first item, how many there are, and a record for each. One that did not come as a record stays as it is.
    #[expect(clippy::type_complexity, reason = "two parts of two variants")]
    pub(super) fn into_records(self) -> std::result::Result<(u64, u32, Vec<u8>), (u64, Result<(u8, EncodedMessage)>)> {
        match self {
            ResultBatch::Records(Records { first, count, mut bytes, at, .. }) => {
                bytes.advance(at);
                Ok((first, count, bytes.into()))
            }
            ResultBatch::One(index, outcome) => {
                Err((index, outcome.unwrap_or_else(|| Err(Error::other("a result is missing")))))
            }
        }
    }

    /// The results of those items that are `wanted`, the others left out.
    pub(super) fn only(self, wanted: impl Fn(u64) -> bool) -> Vec<Self> {
        let (first, count) = (self.first(), self.count());
        match self {
            _ if (0..count).all(|at| wanted(first + u64::from(at))) => vec![self],
            ResultBatch::Records(Records { bytes, mut at, kinds, .. }) => {
                let mut batches = Vec::new();
                for index in first..first + u64::from(count) {
                    let Some((tag, _, len)) = spsc::first(bytes.get(at..).unwrap_or_default()) else { break };
                    if wanted(index) {
                        let kinds = kinds.iter().filter(|(of, _)| *of == index).copied().collect();
                        // A result that is kept for long keeps those that came with it.
                        let record = match len * 4 < bytes.len() {
                            true => Bytes::copy_from_slice(&bytes[at..at + len]),
                            false => bytes.slice(at..at + len),
                        };
                        let batch = Self::records(index, 1, u32::from(tag != IS_VALUE), record);
                        batches.push(batch.with_kinds(kinds));
                    }
                    at += len;
                }
                batches
            }
            ResultBatch::One(..) => Vec::new(),
        }
    }

    /// The next result, if there is one left.
    #[inline]
    pub(super) fn next<R: DeserializeOwned + 'static>(&mut self) -> Option<Result<R>> {
        match self {
            ResultBatch::Records(records) => records.next(),
            ResultBatch::One(_, outcome) => outcome.take().map(|outcome| outcome.and_then(read_encoded)),
        }
    }

    /// Gives all results to `take`, until that fails.
    pub(super) fn drain<R: DeserializeOwned + 'static>(
        &mut self,
        mut take: impl FnMut(Result<R>) -> Result<()>,
    ) -> Result<()> {
        std::iter::from_fn(|| self.next()).try_for_each(&mut take)
    }
}

impl Records {
    /// The next result, if there is one.
    #[inline]
    pub(super) fn next<R: DeserializeOwned + 'static>(&mut self) -> Option<Result<R>> {
        if self.count == 0 {
            return None;
        }
        self.count -= 1;
        let Some((tag, payload, len)) = spsc::first(self.bytes.get(self.at..).unwrap_or_default()) else {
            return Some(Err(Error::new(ErrorKind::Decode, "a result is missing")));
        };
        self.at += len;
        Some(Outcome::read_reported(tag, payload, Vec::new()))
    }
}

fn read_encoded<R: DeserializeOwned + 'static>((tag, encoded): (u8, EncodedMessage)) -> Result<R> {
    Outcome::read_parcel(tag, encoded.open()?)
}
