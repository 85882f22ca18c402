//! One ring of bytes: records are written, and then published by a single store.
//!
//! # State
//! `tail` and `head`: `count:32 | position:32`, positions in units of 8 bytes, free-running. Counts go on from
//! segment to segment, so that the difference of any tail and any head is a number of records. `next`: the
//! offset of the segment that follows, 0 while this is the last. `known_head` and `known_tail`: the other side's
//! mark as the holders of a lock last saw it, beside their own. `gives_back`: whether it keeps no memory when it is drained,
//! for a record came whose consumer needed that. `missing`: how many bytes at the end of the segment have no
//! memory yet, for a segment gets its memory as records come to it.
//!
//! A record is a head and a payload. The payload follows the head, or it begins at the start of the segment
//! (`REWOUND`): then the units between belong to the record and hold nothing. A putter does that where it needs less
//! memory than to go on.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | bytes beyond tail | the holder of the put lock | plain, nobody reads them yet | - |
//! | tail -> tail + record | the holder of the put lock | Release: publishes the bytes | a consumer |
//! | head -> head + record | the holder of the get lock, after copying out | Release: gives the room back | a putter |
//! | next 0 -> offset | the holder of the put lock | Release: no record follows here | - |
//! | missing -> less, once there is memory | the holder of the put lock | Release | - |
//! | gives_back 0 -> 1 | the holder of the get lock, before `head` | Release | - |
//! | known_head, known_tail -> the other's mark | the holder of the lock of that side | Release: hands on what it saw | - |
//!
//! # Invariants
//! 1. Bytes from head to tail are whole records and change for nobody.
//! 2. Once `next` is set, tail does not change.
//! 3. No byte is written before it has memory: its put found `missing` low enough, or made it so.
//! 4. A known mark is at most one round behind, for a process that would pass it reads the word again. It is shared because what one
//!    process remembers may be any number of rounds old, and marks wrap around.
//!
//! # Death
//! | killed | survivors see |
//! |---|---|
//! | before tail is stored | nothing: the bytes beyond tail are garbage |
//! | before missing is stored | memory that is asked for once more, which changes nothing |
//! | after tail is stored | the record |
//! | before head is stored | the record, still there |
//!
//! # Cancel
//! No await point.

use crate::shm::atomic::AtomicU64;
use bytemuck::Pod;
use std::sync::atomic::Ordering::*;

/// Words of a segment's head, apart so that the two sides share no cache line.
pub(super) const TAIL: usize = 0;
const KNOWN_HEAD: usize = 1;
/// Bytes at the end of the room for records that have no memory yet.
const MISSING: usize = 2;
pub(super) const HEAD: usize = 16;
const KNOWN_TAIL: usize = 17;
/// Whether a record came whose memory was needed elsewhere.
const GIVES_BACK: usize = 18;
pub(super) const NEXT: usize = 32;
/// Bytes of a segment's head.
pub(super) const HEAD_LEN: u64 = 4096;

const UNIT: usize = 8;

/// A position in the stream of records.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Mark {
    pub(super) count: u32,
    pub(super) position: u32,
}

impl Mark {
    pub(super) fn from_bits(bits: u64) -> Self {
        Self { count: (bits >> 32) as u32, position: bits as u32 }
    }

    pub(super) fn to_bits(self) -> u64 {
        u64::from(self.count) << 32 | u64::from(self.position)
    }

    fn after_record(self, units: u32) -> Self {
        Self { count: self.count.wrapping_add(1), position: self.position.wrapping_add(units) }
    }
}

/// Where the bytes of a segment are: mapped memory in life, a vector in models.
pub(super) trait Bytes {
    fn write(&self, at: usize, from: &[u8]);
    /// The 8 bytes at `at`, a multiple of 8.
    fn word(&self, at: usize) -> u64;
    /// Appends `len` bytes to `to`.
    fn read(&self, at: usize, len: usize, to: &mut Vec<u8>);
    /// The same of bytes that are whole numbers.
    fn read_numbers<N: Pod>(&self, at: usize, len: usize, to: &mut Vec<N>) {
        let mut bytes = Vec::new();
        self.read(at, len, &mut bytes);
        to.extend(bytes.chunks_exact(size_of::<N>()).map(bytemuck::pod_read_unaligned::<N>));
    }
    /// This process needs `len` bytes at `at` no more. They keep their memory.
    fn forget(&self, _at: usize, _len: usize) {}
}

/// The header before each record: its length, the number of its descriptors, and the number under which they were sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct RecordHead {
    pub(super) len: u32,
    pub(super) fds: u32,
    pub(super) number: u64,
    /// Units from the head to the start of the segment, where the payload is; 0: it follows the head.
    gap: u32,
}

/// The bit of a record's first word that is set if its payload begins at the start of the segment.
const REWOUND: u64 = 1 << 63;

impl RecordHead {
    const LEN: usize = 8;
    const LEN_WITH_FDS: usize = 16;
    /// Bytes that a head has at most.
    pub(super) const MOST_LEN: u64 = Self::LEN_WITH_FDS as u64;

    pub(super) fn new(len: u32, fds: u32) -> Self {
        Self { len, fds, ..Self::default() }
    }

    /// The same in the same place with a payload of so many bytes.
    pub(super) fn of_len(self, len: u32) -> Self {
        Self { len, ..self }
    }

    pub(super) fn len(&self) -> usize {
        if self.fds == 0 { Self::LEN } else { Self::LEN_WITH_FDS }
    }

    /// Units that the whole record takes.
    pub(super) fn units(&self) -> u32 {
        match self.gap {
            0 => (self.len() + self.len as usize).div_ceil(UNIT) as u32,
            gap => gap + self.len.div_ceil(UNIT as u32),
        }
    }

    /// Where the payload is, given where the record is: a position, and how many bytes after that.
    fn payload(&self, position: u32) -> (u32, usize) {
        match self.gap {
            0 => (position, self.len()),
            gap => (position.wrapping_add(gap), 0),
        }
    }
}

pub(super) struct Segment<'a, B> {
    pub(super) words: &'a [AtomicU64],
    pub(super) bytes: &'a B,
    /// Units of room; a power of two.
    pub(super) capacity: u32,
}

impl<B: Bytes> Segment<'_, B> {
    pub(super) fn tail(&self) -> Mark {
        Mark::from_bits(self.words[TAIL].load(Acquire))
    }

    pub(super) fn head(&self) -> Mark {
        Mark::from_bits(self.words[HEAD].load(Acquire))
    }

    pub(super) fn next(&self) -> u64 {
        self.words[NEXT].load(Acquire)
    }

    /// Bytes of room for records.
    pub(super) fn size(&self) -> u64 {
        u64::from(self.capacity) * UNIT as u64
    }

    /// Returns how many of them, from the first on, have memory. Under the put lock.
    #[inline]
    pub(super) fn backed(&self) -> u64 {
        self.size().saturating_sub(self.words[MISSING].load(Acquire))
    }

    /// The first `bytes` have memory now. Under the put lock.
    pub(super) fn set_backed(&self, bytes: u64) {
        self.words[MISSING].store(self.size().saturating_sub(bytes), Release);
    }

    /// Units from the start of the segment to `position`.
    #[inline]
    fn offset(&self, position: u32) -> u32 {
        position & (self.capacity - 1)
    }

    /// Returns how many bytes, from the first on, must have memory for a record at `tail`.
    pub(super) fn reach(&self, tail: Mark, record: RecordHead) -> u64 {
        let at = u64::from(self.offset(tail.position)) * UNIT as u64;
        match record.gap {
            0 => (at + (record.len() + record.len as usize) as u64).min(self.size()),
            _ => (at + record.len() as u64).max(record.len.into()),
        }
    }

    /// Bytes between the consumer and `tail`.
    pub(super) fn used(&self, tail: Mark) -> u64 {
        u64::from(tail.position.wrapping_sub(self.head().position)) * UNIT as u64
    }

    /// The same record with its payload at the start of the segment, if that is free, and if it leaves room for another of its
    /// kind and for what is under way: the gap counts as used until the record is taken. Under the put lock.
    pub(super) fn rewound(&self, tail: Mark, record: RecordHead) -> Option<RecordHead> {
        let at = self.offset(tail.position);
        let rewound = RecordHead { gap: self.capacity - at, ..record };
        let has_place = at >= record.len.div_ceil(UNIT as u32) + record.units();
        let fits = rewound.gap as usize * UNIT >= record.len() && self.has_room(tail, rewound.units());
        (has_place && fits && self.used(tail) * 2 <= self.backed()).then_some(rewound)
    }

    /// Returns `true` if `units` beyond `tail` are free. Under the put lock.
    #[inline]
    pub(super) fn has_room(&self, tail: Mark, units: u32) -> bool {
        units <= self.room(tail, Mark::from_bits(self.words[KNOWN_HEAD].load(Acquire))) || {
            let head = self.head();
            self.words[KNOWN_HEAD].store(head.to_bits(), Release);
            units <= self.room(tail, head)
        }
    }

    /// Returns `true` if a segment may have these two at one moment, or `head` at an earlier one.
    pub(super) fn is_possible(&self, head: Mark, tail: Mark) -> bool {
        let (units, count) = (tail.position.wrapping_sub(head.position), tail.count.wrapping_sub(head.count));
        units <= self.capacity && count <= units && (count == 0) == (units == 0)
    }

    /// Units free between `tail` and `head`, never more than the capacity whatever they say.
    fn room(&self, tail: Mark, head: Mark) -> u32 {
        self.capacity.saturating_sub(tail.position.wrapping_sub(head.position))
    }

    /// A tail beyond `head`, if there is one. Under the get lock.
    #[inline]
    pub(super) fn tail_beyond(&self, head: Mark) -> Option<Mark> {
        let known = Mark::from_bits(self.words[KNOWN_TAIL].load(Acquire));
        if known != head {
            return Some(known);
        }
        let tail = self.tail();
        (tail != head).then(|| {
            self.words[KNOWN_TAIL].store(tail.to_bits(), Release);
            tail
        })
    }

    fn write(&self, position: u32, skip: usize, from: &[u8]) {
        let size = self.capacity as usize * UNIT;
        let at = (self.offset(position) as usize * UNIT + skip) & (size - 1);
        let (first, rest) = from.split_at(from.len().min(size - at));
        self.bytes.write(at, first);
        if !rest.is_empty() {
            self.bytes.write(0, rest);
        }
    }

    fn read(&self, position: u32, skip: usize, len: usize, to: &mut Vec<u8>) {
        let size = self.capacity as usize * UNIT;
        let at = (self.offset(position) as usize * UNIT + skip) & (size - 1);
        let first = len.min(size - at);
        self.bytes.read(at, first, to);
        if first < len {
            self.bytes.read(0, len - first, to);
        }
    }

    /// Writes a record beyond `tail`, where it fits by [`Segment::room`].
    pub(super) fn write_record(&self, tail: Mark, record: RecordHead, payload: &[u8]) {
        self.write_head(tail, record);
        self.write_part(tail, record, 0, payload);
    }

    /// Writes what precedes a record.
    pub(super) fn write_head(&self, tail: Mark, record: RecordHead) {
        let mut head = [0; RecordHead::LEN_WITH_FDS];
        let rewound = if record.gap > 0 { REWOUND } else { 0 };
        head[..8].copy_from_slice(&(rewound | u64::from(record.fds) << 32 | u64::from(record.len)).to_ne_bytes());
        head[8..].copy_from_slice(&record.number.to_ne_bytes());
        self.write(tail.position, 0, &head[..record.len()]);
    }

    /// Writes a part of a record, from the `skip`th byte of its payload on.
    pub(super) fn write_part(&self, tail: Mark, record: RecordHead, skip: usize, part: &[u8]) {
        let (position, before) = record.payload(tail.position);
        self.write(position, before + skip, part);
    }

    /// Writes a record beyond `tail`, if it is known that it fits, in one piece. Under the put lock.
    #[inline]
    pub(super) fn write_here(&self, tail: Mark, record: RecordHead, payload: &[u8]) -> bool {
        let known = Mark::from_bits(self.words[KNOWN_HEAD].load(Acquire));
        let at = self.offset(tail.position) as usize * UNIT;
        let end = at + RecordHead::LEN + payload.len();
        let fits = record.units() <= self.room(tail, known) && end as u64 <= self.backed();
        if fits {
            self.bytes.write(at, &u64::from(record.len).to_ne_bytes());
            self.bytes.write(at + RecordHead::LEN, payload);
        }
        fits
    }

    /// Appends the payload of `record`, the one at `head`, if it has no descriptors and lies in one piece of `most` bytes at most
    /// behind its head.
    #[inline(always)]
    pub(super) fn read_here(&self, head: Mark, record: RecordHead, most: usize, to: &mut Vec<u8>) -> bool {
        let at = self.offset(head.position) as usize * UNIT + RecordHead::LEN;
        let len = record.len as usize;
        let is_usual = record.fds == 0 && record.gap == 0 && len <= most && at + len <= self.capacity as usize * UNIT;
        if is_usual {
            self.bytes.read(at, len, to);
        }
        is_usual
    }

    /// The commit of a put.
    pub(super) fn publish(&self, tail: Mark, record: RecordHead) -> Mark {
        let after = tail.after_record(record.units());
        self.words[TAIL].store(after.to_bits(), Release);
        after
    }

    /// The record at `head`, which is before `tail`; `None` if the bytes there make no record.
    #[inline]
    pub(super) fn record(&self, head: Mark, tail: Mark) -> Option<RecordHead> {
        let available = tail.position.wrapping_sub(head.position);
        let word = |position: u32| self.bytes.word(self.offset(position) as usize * UNIT);
        let first = word(head.position);
        let mut record = RecordHead::new(first as u32, ((first & !REWOUND) >> 32) as u32);
        if first & REWOUND != 0 {
            record.gap = self.capacity - self.offset(head.position);
        }
        if available > self.capacity || record.units() > available {
            return None;
        }
        let is_last = tail.count.wrapping_sub(head.count) == 1;
        if is_last != (record.units() == available) {
            return None;
        }
        if record.fds > 0 {
            record.number = word(head.position.wrapping_add(1));
        }
        Some(record)
    }

    /// The payload of the record at `head`.
    pub(super) fn read_payload(&self, head: Mark, record: RecordHead, to: &mut Vec<u8>) {
        self.read_part(head, record, 0, record.len as usize, to);
    }

    /// This process has copied it, and needs it no more where it is shared.
    pub(super) fn forget_payload(&self, head: Mark, record: RecordHead) {
        let (position, before) = record.payload(head.position);
        let (size, len) = (self.capacity as usize * UNIT, record.len as usize);
        let at = (self.offset(position) as usize * UNIT + before) & (size - 1);
        let first = len.min(size - at);
        self.bytes.forget(at, first);
        self.bytes.forget(0, len - first);
    }

    /// `len` bytes of that, from the `skip`th on.
    pub(super) fn read_part(&self, head: Mark, record: RecordHead, skip: usize, len: usize, to: &mut Vec<u8>) {
        let (position, before) = record.payload(head.position);
        self.read(position, before + skip, len, to);
    }

    /// [`read_part`](Self::read_part) of bytes that are whole numbers.
    pub(super) fn read_numbers<N: Pod>(
        &self,
        head: Mark,
        record: RecordHead,
        skip: usize,
        len: usize,
        to: &mut Vec<N>,
    ) {
        let (position, before) = record.payload(head.position);
        let size = self.capacity as usize * UNIT;
        let at = (self.offset(position) as usize * UNIT + before + skip) & (size - 1);
        // Those that lie around the end, one of them perhaps on both sides of it.
        let first = if at + len <= size { len } else { (size - at) / size_of::<N>() * size_of::<N>() };
        self.bytes.read_numbers(at, first, to);
        if first < len {
            let (mut number, width) = (Vec::new(), size_of::<N>());
            self.read_part(head, record, skip + first, width, &mut number);
            to.extend(bytemuck::try_pod_read_unaligned::<N>(&number));
            let at = (at + first + width) & (size - 1);
            self.bytes.read_numbers(at, len - first - width, to);
        }
    }

    /// The commit of a get.
    pub(super) fn consume(&self, head: Mark, record: RecordHead) {
        self.words[HEAD].store(head.after_record(record.units()).to_bits(), Release);
    }

    /// Says that `next` follows, which nobody may write to before.
    pub(super) fn link(&self, next: u64) {
        self.words[NEXT].store(next, Release);
    }

    /// Makes this an empty segment whose counts go on from `count`, and of whose room the first `backed` bytes have memory.
    pub(super) fn begin(&self, count: u32, backed: u64) {
        self.set_backed(backed);
        self.begin_at(Mark { count, position: 0 });
    }

    pub(super) fn begin_at(&self, start: Mark) {
        let start = start.to_bits();
        for word in [TAIL, KNOWN_HEAD, HEAD, KNOWN_TAIL] {
            self.words[word].store(start, Relaxed);
        }
        self.words[GIVES_BACK].store(0, Relaxed);
        self.words[NEXT].store(0, Release);
    }

    /// The record that is about to be taken needs its memory elsewhere: this segment is to keep none. Under the get lock.
    pub(super) fn give_back_when_drained(&self) {
        self.words[GIVES_BACK].store(1, Release);
    }

    /// Returns `true` if it is to keep no memory when it is drained. Under the get lock.
    #[inline]
    pub(super) fn is_to_be_given_back(&self) -> bool {
        self.words[GIVES_BACK].load(Acquire) != 0
    }
}
