//! A queue of byte records in one region: segments that grow and are given back, a lock for either side.
//!
//! # State
//! The words of the region's head, by name in [`word`]; then the base segment. The chain runs from
//! `GET_SEGMENT` over `next` to `PUT_SEGMENT`; all hold names of extents (`extents`).
//!
//! # Moves
//! | from -> to | under | commits by | wakes |
//! |---|---|---|---|
//! | a record is put | put lock | the store of `tail` | a consumer |
//! | a record is got | get lock | the store of `head` | a putter |
//! | the chain grows: extent made, begun, linked, `PUT_SEGMENT` moved | put lock | the store of `next` | - |
//! | the chain grows by a record whose payload is discarded, which is written before its extent is linked | put lock | the stores of `next`, then `tail` | a consumer |
//! | a segment gets memory for a record (`missing` in [`segment`](super::segment)) | put lock | the store of `missing` | - |
//! | a drained segment is left: `GET_SEGMENT` moved, extent given back | get lock | the store of `GET_SEGMENT` | - |
//! | a drained large segment is replaced by the base, at once or after a time ([`reclaim`](super::reclaim)) | both locks | the store of `next` | - |
//! | closed | put lock | the store of `CLOSED` | all |
//! | closed for good, as [`DAMAGED`], by a process that finds an impossible word | - | the store of `CLOSED` | all |
//!
//! # Invariants
//! 1. Each move is committed by one store; before it nothing has happened, after it the rest can be redone.
//! 2. `PUT_SEGMENT` may lag behind a linked `next`; a putter follows `next` first.
//! 3. An extent is reused only after its segment left the chain; the generation distinguishes its two lives.
//! 4. After `CLOSED` no tail moves: it is stored under the put lock.
//! 5. A segment that left the chain keeps its tail and its `next` until it is begun anew, which takes the put lock:
//!    so a putter finds the chain again from a `PUT_SEGMENT` that lags.
//! 6. Any word may be damaged. A word that leads out of the region, or is impossible, closes the ring for good, with an error
//!    of its own kind. A word that looks like a full or an empty ring, or a living holder, counts as that. No walk is longer
//!    than the list of extents.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | putting, before `tail` | nothing; descriptors sent ahead are orphans; the segment may have more memory than before | the consumer of the next descriptors drops them by number |
//! | getting, before `head` | the record, still there, perhaps without its descriptors | the next consumer gets an error if they are gone |
//! | growing, before `next` | an extent in use that is in no chain, perhaps without all its memory | the process that takes the lock over ([`Ring::repair`]), or the next one if the other side is at work then |
//! | growing, after `next` | `PUT_SEGMENT` lags | the next putter |
//! | leaving, after `GET_SEGMENT` | an extent in use that is in no chain | the process that takes the lock over |
//! | with a drained large segment, before its memory is given back | the segment, in the chain | the next consumer, also one that waits ([`reclaim`](super::reclaim)) |
//!
//! # Cancel
//! No await point: a dropped future has moved nothing, or everything.

use super::extents::{Extent, Extents, HEAD_LEN, IS_MODEL, Impossible, corrupt};
#[cfg(not(multiprocess_loom))]
use super::leases::{self, Entry, Scan};
use super::segment::{Mark, RecordHead, Segment};
use crate::error::{Damage, Explained, Topic};
use crate::os::sync::lock;
use crate::os::{fault, memory};
#[cfg(not(multiprocess_loom))]
use crate::shm::family::Family;
use crate::shm::family::Member;
#[cfg(not(multiprocess_loom))]
use crate::shm::region::Map;
#[cfg(multiprocess_loom)]
use crate::shm::region::Members as Family;
use crate::shm::region::Region;
use crate::shm::robust_lock::{RobustLock, Taken};
use crate::wait::sleepers;
use crate::wire::{Buffer, Payload, Source};
use bytemuck::Pod;
use std::io;
use std::os::fd::OwnedFd;
#[cfg(not(multiprocess_loom))]
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

mod chain;
#[cfg(not(multiprocess_loom))]
pub(super) mod lease;
#[cfg(all(test, not(multiprocess_loom)))]
mod tests;

/// Where things are in the head of the region.
pub(super) mod word {
    use super::sleepers;
    pub(super) const MAGIC: usize = 0;
    pub(super) const ITEM_LIMIT: usize = 1;
    pub(super) const BYTE_LIMIT: usize = 2;
    pub(super) const CLOSED: usize = 8;
    /// A death may have left extents in no chain, and the other side was busy when that was found out.
    pub(super) const REPAIR: usize = 9;
    pub(super) const PUT_LOCK: usize = 16;
    pub(super) const PUT_SEGMENT: usize = 17;
    pub(super) const NUMBER: usize = 18;
    /// How many records had been taken when a putter last looked.
    pub(super) const KNOWN_TAKEN: usize = 20;
    pub(super) const GET_LOCK: usize = 32;
    pub(super) const GET_SEGMENT: usize = 33;
    /// The events are for `channel_core`.
    pub(in crate::channel) const ITEMS: usize = 128;
    pub(in crate::channel) const ROOM: usize = ITEMS + sleepers::LEN;
    pub(in crate::channel) const JOINED: usize = ROOM + sleepers::LEN;
    /// The processes that hold unfinished items of a joinable queue, and how many.
    pub(in crate::channel) const HOLDERS: usize = JOINED + sleepers::LEN;
}

const MAGIC: u64 = u64::from_be_bytes(*b"mpRing01");
/// The value of `CLOSED` in a ring whose memory was found damaged.
const DAMAGED: u64 = u64::from_be_bytes(*b"mpDamage");
/// Nobody holds a lock for so long: a copy takes less, so its holder is stopped, or it is damaged.
const LONG: Duration = Duration::from_secs(5);
/// A drained segment with more memory than this is kept for a time only (`reclaim`).
const KEEP: u64 = if IS_MODEL { 64 } else { 1 << 20 };
/// A segment gets at least as many bytes of memory at a time.
const AHEAD: u64 = if IS_MODEL { 8 } else { 4 << 20 };
/// A segment made for a large message has room for some more of its kind, up to this; for one more in any case.
const SEVERAL: u64 = if IS_MODEL { 64 } else { 16 << 20 };
/// Units that a segment has at most.
const MOST_UNITS: u64 = 1 << 31;

/// The memory that a drained channel keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) bytes: u64,
    /// How far its records have come, in bytes that wrap around.
    pub(super) passed: u64,
}

/// The outcome of a push.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Push {
    Done,
    Full,
    Closed,
    /// Somebody else is putting.
    Busy,
}

/// The outcome of a pop.
#[derive(Debug)]
pub(super) enum Pop<V = Vec<u8>> {
    Got(V, Vec<OwnedFd>),
    Empty,
    Closed,
    /// Somebody else is taking.
    Busy,
}

/// The processes that asked for a wake while we held a lock.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[must_use]
pub(super) struct WakeRequests {
    pub(super) putters: bool,
    pub(super) takers: bool,
    /// The ring was found damaged just now, which concerns everybody.
    pub(super) all: bool,
    /// An item became a dead letter: waiters for those, and joins.
    pub(super) joiners: bool,
    /// An item is gone, leased or not: a consumer of a closed queue, or a join, may be at the end.
    pub(super) one_less: bool,
}

pub(super) struct Ring {
    family: &'static Family,
    extents: Extents,
    item_limit: u64,
    byte_limit: AtomicU64,
    /// Its name in errors.
    what: &'static str,
    put: Mutex<Side>,
    get: Mutex<Side>,
    /// It was found drained, with a large segment that nobody else here has to give back.
    is_idle: AtomicBool,
    /// Of how many bytes this process is the keeper (`reclaim`).
    watched: AtomicU64,
    /// The table of leased items, once one was leased.
    #[cfg(not(multiprocess_loom))]
    leases: OnceLock<Arc<Map>>,
}

/// The state of one side of this process: the segment it works on.
#[derive(Default)]
struct Side {
    name: u64,
    extent: Option<Extent>,
}

impl Side {
    #[inline]
    fn segment(&self) -> io::Result<Segment<'_, Extent>> {
        self.extent.as_ref().map(Extent::segment).ok_or_else(|| corrupt("no segment"))
    }

    /// The record at `head`, which is before `tail`, all of which is mapped.
    fn record(&self, head: Mark, tail: Mark) -> io::Result<RecordHead> {
        let (Some(extent), segment) = (&self.extent, self.segment()?) else { return Err(corrupt("no segment")) };
        let record = segment.record(head, tail).filter(|record| extent.maps(segment.reach(head, *record)));
        record.ok_or_else(|| corrupt("no item where one should be"))
    }
}

/// So many bytes of a payload are copied before their memory is given back.
const PIECE: usize = if IS_MODEL { 8 } else { 4 << 20 };

/// Receives the payload of a record.
pub(super) trait Collect: From<Vec<u8>> {
    /// Takes all of the record at `head`.
    fn collect(&mut self, segment: &Segment<'_, Extent>, head: Mark, record: RecordHead);
}

impl Collect for Vec<u8> {
    fn collect(&mut self, segment: &Segment<'_, Extent>, head: Mark, record: RecordHead) {
        segment.read_payload(head, record, self);
    }
}

/// Stands for a record that nobody reads.
pub(super) struct Unread;

impl From<Vec<u8>> for Unread {
    fn from(_: Vec<u8>) -> Self {
        Self
    }
}

impl Collect for Unread {
    fn collect(&mut self, _: &Segment<'_, Extent>, _: Mark, _: RecordHead) {}
}

impl Collect for Buffer {
    fn collect(&mut self, segment: &Segment<'_, Extent>, head: Mark, record: RecordHead) {
        self.receive(&Shared { segment, head, record });
    }
}

/// What a record carries, where it is shared.
struct Shared<'a> {
    segment: &'a Segment<'a, Extent>,
    head: Mark,
    record: RecordHead,
}

impl Source for Shared<'_> {
    fn len(&self) -> usize {
        self.record.len as usize
    }
    fn append(&self, skip: usize, len: usize, to: &mut Vec<u8>) {
        self.segment.read_part(self.head, self.record, skip, len, to);
    }
    fn append_numbers<N: Pod>(&self, skip: usize, len: usize, to: &mut Vec<N>) {
        self.segment.read_numbers(self.head, self.record, skip, len, to);
    }
}

/// Takes an item that came back: [`Ring::pop`] of it.
#[cfg(not(multiprocess_loom))]
#[cold]
fn pop_again<V: Collect>(
    entry: Entry<'_>,
    take_fds: impl FnOnce(u64, usize) -> io::Result<Vec<OwnedFd>>,
    commit: impl FnOnce(),
) -> io::Result<Pop<V>> {
    let mut payload = Vec::new();
    entry.read(&mut payload)?;
    let (number, count) = entry.fds();
    let fds = if count > 0 { take_fds(number, count) } else { Ok(Vec::new()) };
    commit();
    fault::point("again.noted");
    entry.set_free();
    Ok(Pop::Got(payload.into(), fds?))
}

impl Ring {
    /// A new ring of at most `item_limit` records and, when it is not empty, about `byte_limit` bytes; 0 is no limit.
    pub(super) fn create(item_limit: u64, byte_limit: u64) -> io::Result<Self> {
        let region = Region::create("multiprocess-ring", HEAD_LEN, Extents::first_len())?;
        Self::begin(&region, item_limit, byte_limit);
        Self::of(Arc::new(region))
    }

    fn begin(region: &Region, item_limit: u64, byte_limit: u64) {
        let words = region.words();
        words[word::ITEM_LIMIT].store(item_limit, Relaxed);
        words[word::BYTE_LIMIT].store(byte_limit, Relaxed);
        words[word::PUT_SEGMENT].store(HEAD_LEN as u64, Relaxed);
        words[word::GET_SEGMENT].store(HEAD_LEN as u64, Relaxed);
        Extents::begin(region);
        words[word::MAGIC].store(MAGIC, Release);
    }

    /// The ring in a region that arrived from another process.
    pub(super) fn open(fd: OwnedFd) -> io::Result<Self> {
        Self::of(Arc::new(Region::open(fd, HEAD_LEN)?))
    }

    fn of(region: Arc<Region>) -> io::Result<Self> {
        let words = region.words();
        if words[word::MAGIC].load(Acquire) != MAGIC {
            return Err(corrupt("it is no ring"));
        }
        let (item_limit, byte_limit) = (words[word::ITEM_LIMIT].load(Relaxed), words[word::BYTE_LIMIT].load(Relaxed));
        let (put, get, is_idle, watched) = Default::default();
        let what = "queue";
        Ok(Self {
            family: Family::get()?,
            extents: Extents::of(region),
            item_limit,
            byte_limit: byte_limit.into(),
            what,
            put,
            get,
            is_idle,
            watched,
            #[cfg(not(multiprocess_loom))]
            leases: OnceLock::new(),
        })
    }

    pub(super) fn is_called(&mut self, what: &'static str) {
        self.what = what;
    }

    /// Impossible words close the ring for good. The first process that finds them wakes all others: `is_new`.
    #[cold]
    fn judge(&self, error: io::Error, is_new: &mut bool) -> io::Error {
        let error = self.describe(error);
        *is_new |= Damage::is_in(&error) && self.word(word::CLOSED).swap(DAMAGED, AcqRel) != DAMAGED;
        error
    }

    /// Describes the error for a caller that only looks, and leaves closing to those that put or get.
    #[cold]
    fn describe(&self, error: io::Error) -> io::Error {
        let Some(Impossible(why)) = error.get_ref().and_then(|inner| inner.downcast_ref()) else { return error };
        Damage::error(self.what, self.region().identity(), why)
    }

    /// Whether nothing may be put any more, and why.
    fn check_closed(&self) -> io::Result<bool> {
        match self.word(word::CLOSED).load(Acquire) {
            0 => Ok(false),
            DAMAGED => Err(corrupt("as was found before")),
            _ => Ok(true),
        }
    }

    pub(super) fn region(&self) -> &Arc<Region> {
        self.extents.region()
    }

    pub(super) fn family(&self) -> &'static Family {
        self.family
    }

    /// Returns `true` if a put may have to wait for records to be taken.
    #[inline]
    pub(super) fn is_limited(&self) -> bool {
        self.item_limit != 0 || self.byte_limit() != 0
    }

    /// From now on this end puts beyond the limit in bytes. The other end notifies of room as before.
    pub(super) fn ignore_byte_limit(&self) {
        self.byte_limit.store(0, Relaxed);
    }

    #[inline]
    fn byte_limit(&self) -> u64 {
        self.byte_limit.load(Relaxed)
    }

    pub(super) fn item_limit(&self) -> Option<usize> {
        (self.item_limit != 0).then_some(self.item_limit as usize)
    }

    #[inline]
    fn word(&self, index: usize) -> &crate::shm::atomic::AtomicU64 {
        &self.region().words()[index]
    }

    fn put_lock(&self) -> RobustLock<'_> {
        RobustLock(self.word(word::PUT_LOCK))
    }

    fn get_lock(&self) -> RobustLock<'_> {
        RobustLock(self.word(word::GET_LOCK))
    }

    /// Asks the process that is putting for a wake; false if none is, so that it is worth trying at once.
    pub(super) fn contend_put(&self) -> bool {
        self.put_lock().contend()
    }

    /// Asks the process that is getting for a wake; false if none is, so that it is worth trying at once.
    pub(super) fn contend_get(&self) -> bool {
        self.get_lock().contend()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.word(word::CLOSED).load(Acquire) != 0
    }

    /// The usual put: no descriptors, nobody else at it, and room at hand. False: nothing was done, and [`Ring::push`]
    /// finds out why.
    #[inline]
    pub(super) fn push_here(&self, payload: &[u8]) -> (bool, WakeRequests) {
        let (Some(me), Ok(side)) = (self.family.me_if_listed(), self.put.try_lock()) else {
            return (false, WakeRequests::default());
        };
        let Some(extent) = &side.extent else { return (false, WakeRequests::default()) };
        let robust_lock = self.put_lock();
        if !robust_lock.try_take_free(me) {
            return (false, WakeRequests::default());
        }
        fault::point("put.taken");
        let done = self.push_locked_here(side.name, extent, payload);
        let putters = robust_lock.release();
        fault::point("put.released");
        (done, WakeRequests { putters, ..WakeRequests::default() })
    }

    #[inline]
    fn push_locked_here(&self, name: u64, extent: &Extent, payload: &[u8]) -> bool {
        let segment = extent.segment();
        let is_here = self.word(word::PUT_SEGMENT).load(Acquire) == name && segment.next() == 0;
        let Ok(len) = u32::try_from(payload.len()) else { return false };
        let (tail, record) = (segment.tail(), RecordHead::new(len, 0));
        let taken = self.word(word::KNOWN_TAKEN).load(Acquire) as u32;
        let is_full = self.item_limit != 0 && u64::from(tail.count.wrapping_sub(taken)) >= self.item_limit;
        if !is_here || is_full || self.is_closed() || !segment.write_here(tail, record, payload) {
            return false;
        }
        fault::point("put.written");
        segment.publish(tail, record);
        fault::point("put.published");
        true
    }

    /// Puts one record, whole. `send_fds` gets its number just before the commit and returns whether they fit.
    pub(super) fn push(
        &self,
        payload: &mut Payload<'_>,
        fds: usize,
        send_fds: impl FnOnce(u64) -> io::Result<bool>,
    ) -> (io::Result<Push>, WakeRequests) {
        let mut requests = WakeRequests::default();
        let me = match self.family.me() {
            Ok(me) => me,
            Err(error) => return (Err(error), requests),
        };
        let mut side = lock(&self.put);
        let robust_lock = self.put_lock();
        match robust_lock.try_take(me, self.family) {
            None => return (Ok(Push::Busy), requests),
            Some(Taken::Free) if !self.owes_repair() => {}
            Some(_) => requests.takers = self.repair_beside(self.get_lock(), me),
        }
        fault::point("put.taken");
        let result = self.push_locked(&mut side, payload, fds, send_fds);
        let result = result.map_err(|error| self.judge(error, &mut requests.all));
        requests.putters = robust_lock.release();
        fault::point("put.released");
        (result, requests)
    }

    fn push_locked(
        &self,
        side: &mut Side,
        payload: &mut Payload<'_>,
        fds: usize,
        send_fds: impl FnOnce(u64) -> io::Result<bool>,
    ) -> io::Result<Push> {
        if self.check_closed()? {
            return Ok(Push::Closed);
        }
        let Ok(len) = u32::try_from(payload.len()) else {
            let why = "a message is larger than 4 GiB";
            return Err(Explained::error(io::ErrorKind::InvalidInput, Topic::TooLarge, why));
        };
        let mut tail = self.settle_putter(side)?;
        if self.item_limit != 0 && !self.has_room_for_one(tail)? {
            return Ok(Push::Full);
        }
        let mut record = RecordHead::new(len, fds as u32);
        let segment = side.segment()?;
        if !segment.has_room(tail, record.units()) {
            if !segment.is_possible(segment.head(), tail) {
                return Err(corrupt("a segment with an impossible tail"));
            }
            if let Payload::Discardable(payload) = payload {
                debug_assert_eq!(fds, 0, "whose payload is discarded brings no descriptors");
                return self.push_discarding(side, tail, record, payload);
            }
            let Some(grown) = self.grow(side, tail, record)? else { return Ok(Push::Full) };
            tail = grown;
        } else {
            let Some(placed) = self.place(side, tail, record)? else { return Ok(Push::Full) };
            record = placed;
        }
        let Side { name, extent: Some(extent) } = side else { return Err(corrupt("no segment")) };
        if let Payload::Borrowed(_) = payload {
            self.back(*name, extent, extent.segment().reach(tail, record))?;
        }
        if fds > 0 {
            record.number = self.word(word::NUMBER).fetch_add(1, Relaxed).wrapping_add(1);
            if !send_fds(record.number)? {
                return Ok(Push::Full);
            }
            fault::point("put.sent");
        }
        let segment = extent.segment();
        match payload {
            Payload::Borrowed(payload) => segment.write_record(tail, record, payload),
            Payload::Discardable(payload) => {
                self.write_and_discard((*name, extent), tail, record, payload)?;
                // It took long, and a close that waits for a putter gives up after a while.
                if self.check_closed()? {
                    return Ok(Push::Closed);
                }
            }
        }
        fault::point("put.written");
        segment.publish(tail, record);
        fault::point("put.published");
        Ok(Push::Done)
    }

    /// Puts a record into a new segment, which is linked when it is all there: its memory is taken piece by piece, as
    /// that of the payload is given back. After an error nothing was put.
    fn push_discarding(&self, side: &mut Side, tail: Mark, record: RecordHead, payload: &mut [u8]) -> io::Result<Push> {
        let Some(next) = self.next_segment(side, tail, record.units())? else { return Ok(Push::Full) };
        let tail = next.extent.segment().tail();
        let filled = self.write_and_discard((next.name, &next.extent), tail, record, payload);
        fault::point("put.written");
        // It took long, and a close that waits for a putter gives up after a while.
        if filled.and_then(|()| self.check_closed()).inspect_err(|_| self.extents.retire(next.name))? {
            self.extents.retire(next.name);
            return Ok(Push::Closed);
        }
        self.link(side, next);
        side.segment()?.publish(tail, record);
        fault::point("put.published");
        Ok(Push::Done)
    }

    /// Writes a record beyond `tail`, and gives the memory of its payload back as the segment gets its own.
    fn write_and_discard(
        &self,
        (name, extent): (u64, &Extent),
        tail: Mark,
        record: RecordHead,
        payload: &mut [u8],
    ) -> io::Result<()> {
        let (segment, mut written) = (extent.segment(), 0);
        for piece in payload.chunks_mut(PIECE) {
            let end = written + piece.len();
            self.back(name, extent, segment.reach(tail, record.of_len(end as u32)))?;
            segment.write_part(tail, record, written, piece);
            fault::point("put.piece");
            memory::discard(piece);
            written = end;
        }
        segment.write_head(tail, record);
        Ok(())
    }

    /// Whether the limit in items allows for one more.
    #[inline]
    fn has_room_for_one(&self, tail: Mark) -> io::Result<bool> {
        let known = self.word(word::KNOWN_TAKEN);
        let fits = |taken: u32| u64::from(tail.count.wrapping_sub(taken)) < self.item_limit;
        if fits(known.load(Acquire) as u32) {
            return Ok(true);
        }
        let taken = self.head()?.count;
        known.store(taken.into(), Release);
        if u64::from(tail.count.wrapping_sub(taken)) > self.item_limit {
            return Err(corrupt("more items than it may have"));
        }
        Ok(fits(taken))
    }

    /// The usual get: no descriptors, nobody else at it, and a record of `most` bytes at hand, which is appended to `to`. False: nothing
    /// was done, and [`Ring::pop`] finds out why.
    #[inline]
    pub(super) fn pop_here(&self, most: usize, to: &mut Vec<u8>) -> (bool, WakeRequests) {
        let (Some(me), Ok(side)) = (self.family.me_if_listed(), self.get.try_lock()) else {
            return (false, WakeRequests::default());
        };
        let Some(extent) = &side.extent else { return (false, WakeRequests::default()) };
        let robust_lock = self.get_lock();
        if !robust_lock.try_take_free(me) {
            return (false, WakeRequests::default());
        }
        fault::point("get.taken");
        let done = self.pop_locked_here((side.name, extent), most, to);
        let takers = robust_lock.release();
        fault::point("get.released");
        (done, WakeRequests { takers, ..WakeRequests::default() })
    }

    #[inline]
    fn pop_locked_here(&self, (name, extent): (u64, &Extent), most: usize, to: &mut Vec<u8>) -> bool {
        // A leased item that came back comes first.
        if self.word(word::GET_SEGMENT).load(Acquire) != name || self.has_leases() {
            return false;
        }
        let segment = extent.segment();
        let head = segment.head();
        let Some(tail) = segment.tail_beyond(head) else { return false };
        let Some(record) = segment.record(head, tail) else { return false };
        if !extent.is_whole() || extent.size() > KEEP && !self.is_usual(&segment, record, head, tail) {
            return false;
        }
        if !segment.read_here(head, record, most, to) {
            return false;
        }
        fault::point("get.read");
        fault::point("get.noted");
        segment.consume(head, record);
        fault::point("get.consumed");
        true
    }

    /// Returns `true` if taking the record at `head` of a segment with room for large ones leaves nothing to see to: it is small, and does not
    /// drain the segment, or this process has seen to its memory already.
    #[inline]
    fn is_usual(&self, segment: &Segment<'_, Extent>, record: RecordHead, head: Mark, tail: Mark) -> bool {
        let drains = tail.count.wrapping_sub(head.count) == 1;
        u64::from(record.len) <= KEEP && !(drains && (segment.is_to_be_given_back() || self.has_idle(segment)))
    }

    /// Returns `true` if there is no record: a look without the lock, for a caller that is notified of each put after it, and looks again.
    ///
    /// With several processes that take it may come to a wrong yes, and only by a put that begins after the look: the tail is read
    /// before the head, so if a record is beyond this tail it was put after the look began; and a segment that is not the last one,
    /// or that has left the chain, got its successor after `next` was read. Its head and tail stay readable in any case.
    #[inline]
    pub(super) fn is_empty_here(&self) -> bool {
        let Ok(side) = self.get.try_lock() else { return false };
        let Some(extent) = &side.extent else { return false };
        let segment = extent.segment();
        let is_here = self.word(word::GET_SEGMENT).load(Acquire) == side.name && segment.next() == 0;
        let is_empty = is_here && segment.tail() == segment.head();
        if is_empty {
            self.note_idle(&side);
        }
        is_empty && !self.is_closed() && !self.has_leases()
    }

    /// Takes one record, whole. `payload` makes a buffer for so many bytes, and returns whether their memory is needed, so that the
    /// segment keeps none when it is drained. `take_fds` gets the record's number and how many, just before the commit; `commit` is
    /// called at the very last.
    pub(super) fn pop<V: Collect>(
        &self,
        payload: impl FnOnce(usize) -> (V, bool),
        take_fds: impl FnOnce(u64, usize) -> io::Result<Vec<OwnedFd>>,
        commit: impl FnOnce(Member),
    ) -> (io::Result<Pop<V>>, WakeRequests) {
        let work = |side: &mut Side, requests: &mut WakeRequests, me| {
            self.pop_locked(side, requests, payload, take_fds, || commit(me))
        };
        self.take_locked(Pop::Busy, work)
    }

    /// Runs `work` under the get lock, or returns `busy` if somebody else has it.
    fn take_locked<R>(
        &self,
        busy: R,
        work: impl FnOnce(&mut Side, &mut WakeRequests, Member) -> io::Result<R>,
    ) -> (io::Result<R>, WakeRequests) {
        let mut requests = WakeRequests::default();
        let me = match self.family.me() {
            Ok(me) => me,
            Err(error) => return (Err(error), requests),
        };
        let mut side = lock(&self.get);
        let robust_lock = self.get_lock();
        match robust_lock.try_take(me, self.family) {
            None => return (Ok(busy), requests),
            Some(Taken::Free) if !self.owes_repair() => {}
            Some(_) => requests.putters = self.repair_beside(self.put_lock(), me),
        }
        fault::point("get.taken");
        let result = work(&mut side, &mut requests, me);
        let result = result.map_err(|error| self.judge(error, &mut requests.all));
        requests.takers = robust_lock.release();
        fault::point("get.released");
        (result, requests)
    }

    fn pop_locked<V: Collect>(
        &self,
        side: &mut Side,
        requests: &mut WakeRequests,
        payload: impl FnOnce(usize) -> (V, bool),
        take_fds: impl FnOnce(u64, usize) -> io::Result<Vec<OwnedFd>>,
        commit: impl FnOnce(),
    ) -> io::Result<Pop<V>> {
        #[cfg_attr(multiprocess_loom, expect(unused_mut, reason = "models have no leases"))]
        let mut found = self.settle_taker(side)?;
        #[cfg(not(multiprocess_loom))]
        let is_awaited = match self.has_leases() {
            false => false,
            true => match self.scan(side, found, requests).map(|(scan, next)| {
                found = next;
                scan
            })? {
                Scan::Again(entry) => {
                    requests.one_less = true;
                    return pop_again(entry, take_fds, commit);
                }
                Scan::Held => true,
                Scan::Nothing | Scan::InBoth(_) => false,
            },
        };
        #[cfg(multiprocess_loom)]
        let is_awaited = false;
        let (head, tail) = match found {
            Some(found) => found,
            None if !self.check_closed()? => {
                self.note_idle(side);
                return Ok(Pop::Empty);
            }
            // `CLOSED` is set after the last put: look once more.
            None => match self.settle_taker(side)? {
                Some(found) => found,
                // A leased item may come back.
                None if is_awaited => return Ok(Pop::Empty),
                None => return Ok(Pop::Closed),
            },
        };
        let (segment, record) = (side.segment()?, side.record(head, tail)?);
        let (mut payload, needs_memory) = payload(record.len as usize);
        payload.collect(&segment, head, record);
        let fds = if record.fds > 0 { take_fds(record.number, record.fds as usize) } else { Ok(Vec::new()) };
        fault::point("get.read");
        commit();
        fault::point("get.noted");
        if needs_memory {
            segment.give_back_when_drained();
            segment.forget_payload(head, record);
        }
        segment.consume(head, record);
        fault::point("get.consumed");
        if head.position.wrapping_add(record.units()) == tail.position {
            self.drained(side, requests);
        }
        Ok(Pop::Got(payload, fds?))
    }

    /// Returns `true` if this is a segment whose memory is given back some time after it is drained.
    fn is_large(&self, side: &Side) -> bool {
        side.segment().is_ok_and(|segment| segment.size() > KEEP && segment.backed() > KEEP)
    }

    /// Returns `true` if this process has not yet seen to the memory of a large segment.
    fn has_idle(&self, segment: &Segment<'_, Extent>) -> bool {
        segment.backed() > self.watched().max(KEEP)
    }

    /// The last record was taken: the memory of a large segment is kept for now, or given back.
    fn drained(&self, side: &mut Side, requests: &mut WakeRequests) {
        let is_to_be_given_back = side.segment().is_ok_and(|segment| segment.is_to_be_given_back());
        if is_to_be_given_back && self.is_large(side) {
            requests.putters |= self.give_back(side);
        }
        self.note_idle(side);
    }

    #[inline]
    fn note_idle(&self, side: &Side) {
        if side.segment().is_ok_and(|segment| segment.size() > KEEP && self.has_idle(&segment)) {
            self.is_idle.store(true, Release);
        }
    }

    /// Of how many bytes this process is the keeper.
    #[inline]
    pub(super) fn watched(&self) -> u64 {
        self.watched.load(Acquire)
    }

    pub(super) fn set_watched(&self, bytes: u64) {
        self.watched.store(bytes, Release);
    }

    /// Returns `true` if it was found drained since this was asked last, with memory that is to be given back some time.
    #[inline]
    pub(super) fn take_idle(&self) -> bool {
        self.is_idle.load(Relaxed) && self.is_idle.swap(false, AcqRel)
    }

    /// The memory of a drained large segment.
    pub(super) fn kept(&self) -> Option<Kept> {
        let name = self.word(word::GET_SEGMENT).load(Acquire);
        let extent = self.extents.open_to_take(name).ok().filter(|extent| extent.size() > KEEP)?;
        let segment = extent.segment();
        let (head, tail) = (segment.head(), segment.tail());
        let is_last = self.word(word::PUT_SEGMENT).load(Acquire) == name && segment.next() == 0;
        let is_kept = is_last && head == tail && segment.backed() > KEEP;
        is_kept.then(|| Kept { bytes: segment.backed(), passed: u64::from(tail.position) * 8 })
    }

    /// Gives the memory of a drained large segment back, unless somebody is at work.
    pub(super) fn give_back_kept(&self) -> WakeRequests {
        let mut requests = WakeRequests::default();
        let (Ok(me), Ok(mut side)) = (self.family.me(), self.get.try_lock()) else { return requests };
        let robust_lock = self.get_lock();
        match robust_lock.try_take(me, self.family) {
            None => return requests,
            Some(Taken::Free) => {}
            Some(Taken::OwnerDied) => requests.putters |= self.repair_beside(self.put_lock(), me),
        }
        if let Ok(None) = self.settle_taker(&mut side)
            && self.is_large(&side)
        {
            requests.putters |= self.give_back(&mut side);
        }
        requests.takers = robust_lock.release();
        requests
    }

    /// Returns `true` if any item may be leased, or wait to be delivered again.
    #[inline]
    pub(super) fn has_leases(&self) -> bool {
        #[cfg(not(multiprocess_loom))]
        return self.word(leases::word::LEASED).load(Acquire) != 0;
        #[cfg(multiprocess_loom)]
        false
    }

    /// Lets no further record in. Waits only for a putter at work, and not for ever.
    pub(super) fn close(&self) -> io::Result<()> {
        self.close_within(LONG)
    }

    /// [`close`](Self::close), which waits for so long for an item that is being copied.
    pub(super) fn close_within(&self, limit: Duration) -> io::Result<()> {
        let (mut rounds, start) = (0, Instant::now());
        while !self.try_close()? {
            rounds += 1;
            match rounds {
                ..100 => std::thread::yield_now(),
                // It copies something huge, or is stopped.
                _ if start.elapsed() < limit => std::thread::sleep(Duration::from_micros(100)),
                _ => {
                    self.close_anyway();
                    break;
                }
            }
        }
        Ok(())
    }

    /// Closes without the lock. What its holder was putting, if there is one, may come after the end and be lost.
    #[cold]
    fn close_anyway(&self) {
        // Damage that was found is permanent.
        let _ = self.word(word::CLOSED).compare_exchange(0, 1, AcqRel, Relaxed);
    }

    /// False if a putter is at work.
    pub(super) fn try_close(&self) -> io::Result<bool> {
        let me = self.family.me()?;
        let _side = lock(&self.put);
        let Some(taken) = self.put_lock().try_take(me, self.family) else { return Ok(false) };
        let _ = self.word(word::CLOSED).compare_exchange(0, 1, AcqRel, Relaxed);
        if taken == Taken::OwnerDied {
            // Processes that asked for either lock are woken with all others: closing concerns all.
            let _ = self.repair_beside(self.get_lock(), me);
        }
        let _ = self.put_lock().release();
        Ok(true)
    }

    /// How many records were taken, as a number that wraps around; `None` if that cannot be seen.
    pub(super) fn taken(&self) -> Option<u32> {
        self.head().ok().map(|mark| mark.count)
    }

    /// The mark up to which records were taken.
    fn head(&self) -> io::Result<Mark> {
        self.stable(word::GET_SEGMENT, |segment| segment.head())
    }

    fn stable(&self, index: usize, read: impl Fn(Segment<'_, Extent>) -> Mark) -> io::Result<Mark> {
        loop {
            let name = self.word(index).load(Acquire);
            let mark = self.extents.open_to_take(name).map(|extent| read(extent.segment()));
            // If the segment is still the one, it was it when we read.
            if self.word(index).load(Acquire) == name {
                return mark;
            }
        }
    }

    /// Returns how many records there are.
    pub(super) fn len(&self) -> io::Result<usize> {
        let (head, tail) = self.ends().map_err(|error| self.describe(error))?;
        Ok(tail.count.wrapping_sub(head.count) as usize)
    }

    /// Returns how many records were ever put, and how many taken, each modulo 2^32.
    #[cfg(any(feature = "dashboard", feature = "metrics"))]
    pub(super) fn passed(&self) -> io::Result<[u32; 2]> {
        let (head, tail) = self.ends().map_err(|error| self.describe(error))?;
        Ok([tail.count, head.count])
    }

    /// Returns how many records there ever were, if none of them is left.
    pub(super) fn drained_at(&self) -> io::Result<Option<u32>> {
        let ends = self.check_closed().and_then(|_| self.ends());
        let (head, tail) = ends.map_err(|error| self.describe(error))?;
        Ok((tail.count == head.count).then_some(tail.count))
    }

    /// Head and tail of one moment.
    fn ends(&self) -> io::Result<(Mark, Mark)> {
        loop {
            let head = self.head()?;
            let tail = self.stable(word::PUT_SEGMENT, |segment| segment.tail())?;
            if self.head()? == head {
                return Ok((head, tail));
            }
        }
    }
}

#[cfg(all(test, multiprocess_loom))]
impl Ring {
    pub(super) fn create_model() -> io::Result<Arc<Region>> {
        Self::create_model_of(0)
    }

    pub(super) fn create_model_of(item_limit: u64) -> io::Result<Arc<Region>> {
        let region = Region::create("", HEAD_LEN, Extents::first_len())?;
        Self::begin(&region, item_limit, 0);
        Ok(Arc::new(region))
    }

    /// This ring as another process has it.
    pub(super) fn of_model(region: Arc<Region>) -> io::Result<Self> {
        Self::of(region)
    }

    /// With everything taken, the chain is one segment, and all other extents are free.
    pub(super) fn check_that_nothing_is_lost(&self) {
        self.extents.check_that_only(self.word(word::GET_SEGMENT).load(Acquire));
    }
}
