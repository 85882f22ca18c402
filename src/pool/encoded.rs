//! Runs items that arrive encoded, such as an order of another pool's taker, on this pool's workers. Results stay encoded.

use super::batch::ResultBatch;
use super::chunk::Chunk;
use super::engine::PoolLifetime;
use super::flight::{Flight, Target};
use super::input::{Input, Most, Stop};
use super::options::Options;
use super::protocol::Origin;
use super::taker::{EncodedResults, Limits};
use crate::channel::{lane, spsc};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::process::entry;
use bytes::Bytes;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// Some items of one call, encoded elsewhere by a process of the same build.
#[derive(Clone, Debug)]
pub(crate) struct EncodedItems {
    pub(crate) call: entry::Call,
    /// The index of the first item in its call, for errors and for the results.
    pub(crate) first: u64,
    pub(crate) count: u32,
    /// How often these items were given to an executor before. A worker's `attempt()` begins with that.
    pub(crate) attempt: u32,
    /// The arguments of each item, a record each.
    pub(crate) records: Bytes,
    pub(crate) limits: Limits,
    /// How long an item is known to take elsewhere. Without it the first chunks have one item each.
    pub(crate) item_time: Option<Duration>,
    /// They are to have begun within this.
    pub(crate) start_in: Option<Duration>,
    /// The call that they are of.
    pub(crate) origin: Origin,
}

impl EncodedItems {
    /// Checks items that a stranger may have sent: the function is one of this build and made for such arguments, and there are as
    /// many records as stated. Returns the function's name.
    fn check(&self) -> Result<&'static str> {
        let label = self.call.label()?;
        let wrong = |what: &str| {
            let text = format!("{} items of {label} that are not whole: {what}", self.count);
            Err(Error::new(ErrorKind::Decode, text))
        };
        if self.first.checked_add(self.count.into()).is_none() {
            return wrong("their indexes have no end");
        }
        let mut rest = &self.records[..];
        for _ in 0..self.count {
            let Some((_, _, len)) = spsc::first(rest) else { return wrong("there are fewer") };
            rest = rest.get(len..).unwrap_or_default();
        }
        if rest.is_empty() { Ok(label) } else { wrong("there are more") }
    }
}

/// A whole record is a multiple of so many bytes.
const ALIGN: usize = 4;

/// A source of items that are encoded already.
struct Records {
    bytes: Bytes,
    at: usize,
    left: u32,
}

impl Input for Records {
    fn fill(&mut self, chunk: &mut Chunk, most: Most, _: &mut Context<'_>) -> Stop {
        while self.left > 0 && most.has_room(chunk) {
            let rest = self.bytes.get(self.at..).unwrap_or_default();
            // They were counted before.
            let Some((_, _, len)) = spsc::first(rest) else { break };
            let is_most = len * 4 >= self.bytes.len();
            if self.left == 1 && chunk.count == 0 && is_most && len.is_multiple_of(ALIGN) {
                // It may be large. A small one would keep all others.
                chunk.set_only(self.bytes.slice(self.at..self.at + len));
                (self.at, self.left) = (self.at + len, 0);
                break;
            }
            chunk.body.extend_from_slice(&rest[..len]);
            // The last record may lack its padding.
            chunk.body.resize(chunk.body.len().next_multiple_of(ALIGN), 0);
            (self.at, self.left, chunk.count) = (self.at + len, self.left - 1, chunk.count + 1);
        }
        if self.left == 0 { Stop::End } else { Stop::Full }
    }

    fn remaining(&self) -> usize {
        self.left as usize
    }
}

/// Encoded items that run in a pool. Dropping it cancels them.
pub(crate) struct EncodedRun {
    flight: Flight,
}

#[allow(dead_code)] // For the room above.
impl EncodedRun {
    pub(super) fn start(pool: Arc<PoolLifetime>, items: EncodedItems) -> Result<Self> {
        let label = items.check()?;
        let EncodedItems { call, first, count, attempt, records, limits, item_time, start_in, origin } = items;
        let Limits { timeout, grace, retries, retry_on, back_off, chunk } = limits;
        let chunk = chunk.min(lane::MOST_ITEMS);
        let options = Options {
            timeout,
            queue_timeout: start_in,
            grace: Some(grace),
            retries,
            retry_on,
            back_off,
            chunk,
            is_many: true,
            first_index: first,
            first_attempt: attempt,
            origin: Some(origin),
            ..Options::default()
        };
        let input = Box::new(Records { bytes: records, at: 0, left: count });
        let flight = Flight::start(pool, Target { call, label }, options, input, None)?;
        item_time.into_iter().for_each(|time| flight.group.learn(time, 1));
        Ok(Self { flight })
    }

    /// The next results, in any order; `None` after the last.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<EncodedResults>> {
        self.flight.poll_next(0, cx).map(|batch| batch.map(|batch| self.encode(batch)))
    }

    /// Waits for the next results.
    pub(crate) async fn next(&mut self) -> Option<EncodedResults> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Returns `true` if some of them were given to a worker.
    pub(crate) fn has_begun(&self) -> bool {
        !self.flight.group.seats().is_empty()
    }

    /// How long an item takes, by this pool's workers; `None` until one has ended.
    pub(crate) fn item_time(&self) -> Option<Duration> {
        self.flight.group.item_time()
    }

    fn encode(&self, batch: ResultBatch) -> EncodedResults {
        let label = self.flight.group.label;
        let (index, outcome) = match batch.into_records() {
            Ok((first, count, records)) => return EncodedResults { first, count, records },
            Err(single) => single,
        };
        let encoded = outcome.and_then(|(tag, sealed)| match sealed.has_attachments() {
            true => {
                let text = format!("a result of {label} is or holds a handle, which cannot cross to another host");
                Err(Error::new(ErrorKind::Encode, text).explained_by(Topic::CannotCrossHosts))
            }
            false => EncodedResults::one(index, tag, sealed.bytes()),
        });
        encoded.unwrap_or_else(|error| EncodedResults::failed(index, &error))
    }
}
