//! The memory of a ring's segments: extents of one region, which are made, given back and made use of again.
//!
//! # State
//! Words of the region's head: `GENERATION` counts the lives of extents, `END` is where the next new one begins, and
//! `LIST` has a pair for every extent: its offset, and `capacity | state`. An extent begins with no memory but that of its
//! head, and gets more as it is filled (`missing` of its segment). A life of an extent is named
//! `generation:24 | offset:40`. The first one, the base, is made with the region and never given back.
//!
//! # Moves
//! | from -> to | by | commits by | wakes |
//! |---|---|---|---|
//! | none, or free and of this size -> in use | put lock | the store of its state | - |
//! | in use -> free, its memory given back | get lock, once it left the chain | the store of its state | - |
//! | free -> none, if there is no row for a new one | put lock, once `PUT_SEGMENT` is in the chain | the store of its state | - |
//!
//! # Invariants
//! 1. An extent is listed before it has memory, so no death leaves memory behind that is in no list.
//! 2. Its head stays when its memory is given back: a late process still finds where the chain went on.
//! 3. A process that takes, and has not addresses enough for all of an extent, has mapped as much of it as had memory when it
//!    last loaded a tail: no record lies beyond that.
//! 4. Every word of the list is checked before it is used: where it leads, and how far (`is_possible`); what lies beyond the
//!    file cannot be mapped.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | making, after the offset was taken | a part of the region that nobody uses, without memory | nobody: it costs addresses only |
//! | making, after another was forgotten for it | a row without an extent | the next that makes one |
//! | making, after the list | an extent in use that is in no chain | the process that takes a lock over ([`Extents::free_all_but`]) |
//! | giving back, before its state | an extent in use, without memory, in no chain | likewise |
//!
//! # Cancel
//! No await point.

use super::segment::{self, Bytes, Segment};
use crate::error::{Explained, Topic};
use crate::os::memfd;
use crate::shm::atomic::AtomicU64;
#[cfg(multiprocess_loom)]
use crate::shm::region as view;
use crate::shm::region::{Map, PAGE, Region};
#[cfg(not(multiprocess_loom))]
use crate::shm::view;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

/// Where things are in the head of the region.
mod word {
    pub(super) const GENERATION: usize = 19;
    pub(super) const END: usize = 48;
    pub(super) const LIST: usize = 64;
}

/// Models have small rings: what matters happens at their ends.
pub(super) const IS_MODEL: bool = cfg!(multiprocess_loom);

/// Bytes of the region's head, and where the base is.
pub(super) const HEAD_LEN: usize = 4096;
/// Bytes of the base.
pub(super) const BASE: u64 = if IS_MODEL { 32 } else { 64 << 10 };
/// How many a list has room for.
pub(super) const MOST: usize = if IS_MODEL { 4 } else { 32 };

const OFFSET_MASK: u64 = (1 << 40) - 1;

const EMPTY: u64 = 0;
const IN_USE: u64 = 1;
const FREE: u64 = 2;

pub(super) struct Extents {
    region: Arc<Region>,
}

/// One of them, mapped.
#[derive(Clone)]
pub(super) struct Extent {
    map: Arc<Map>,
    capacity: u32,
}

impl Extents {
    /// In a region that holds the base and nothing else.
    pub(super) fn begin(region: &Region) {
        let words = region.words();
        words[word::END].store(Self::first_len(), Relaxed);
        words[word::LIST].store(HEAD_LEN as u64, Relaxed);
        words[word::LIST + 1].store((BASE / 8) << 8 | IN_USE, Relaxed);
    }

    /// Bytes of a region that holds the base and nothing else.
    pub(super) fn first_len() -> u64 {
        HEAD_LEN as u64 + segment::HEAD_LEN + BASE
    }

    pub(super) fn of(region: Arc<Region>) -> Self {
        Self { region }
    }

    pub(super) fn region(&self) -> &Arc<Region> {
        &self.region
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &self.region.words()[index]
    }

    /// The offset and the state of every row.
    fn rows(&self) -> impl Iterator<Item = (&AtomicU64, &AtomicU64)> {
        (0..MOST).map(|row| (self.word(word::LIST + 2 * row), self.word(word::LIST + 2 * row + 1)))
    }

    fn row_of(&self, name: u64) -> Option<&AtomicU64> {
        let mut rows = self.rows();
        rows.find(|(offset, _)| offset.load(Acquire) == name & OFFSET_MASK).map(|(_, state)| state)
    }

    /// The extent, all of it mapped.
    pub(super) fn open(&self, name: u64) -> io::Result<Extent> {
        let (offset, capacity) = self.place_of(name)?;
        let map = self.map(offset, segment::HEAD_LEN + capacity * 8)?;
        Ok(Extent { map, capacity: capacity as u32 })
    }

    /// Opens one to take from it. If there are not addresses enough (a `memory_limit`), only the part with memory is mapped: the head,
    /// and all records of which the tail was loaded before.
    pub(super) fn open_to_take(&self, name: u64) -> io::Result<Extent> {
        #[cfg(not(multiprocess_loom))]
        {
            let (offset, capacity) = self.place_of(name)?;
            let of_map = |map| Extent { map, capacity: capacity as u32 };
            let mapped = self.region().mapped(offset).map(of_map);
            if let Some(extent) = mapped.filter(|extent| extent.maps(extent.segment().backed())) {
                return Ok(extent);
            }
            match self.open(name) {
                Err(error) if error.kind() == io::ErrorKind::OutOfMemory => {}
                opened => return opened,
            }
            let backed = of_map(self.map(offset, segment::HEAD_LEN)?).segment().backed();
            // Not both at once.
            self.region().unmap(offset);
            self.map(offset, segment::HEAD_LEN + backed.next_multiple_of(PAGE)).map(of_map)
        }
        #[cfg(multiprocess_loom)]
        self.open(name)
    }

    fn map(&self, offset: u64, len: u64) -> io::Result<Arc<Map>> {
        self.region.extent(offset, len).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => corrupt("a segment beyond its memory"),
            _ => error,
        })
    }

    /// Where an extent lies, and its capacity.
    fn place_of(&self, name: u64) -> io::Result<(u64, u64)> {
        let offset = name & OFFSET_MASK;
        let capacity = self.row_of(name).ok_or_else(|| corrupt("a segment that is not listed"))?.load(Acquire) >> 8;
        if !is_possible(offset, capacity) {
            return Err(corrupt("an impossible segment"));
        }
        Ok((offset, capacity))
    }

    fn live(&self, offset: u64) -> u64 {
        let generation = self.word(word::GENERATION).fetch_add(1, Relaxed).wrapping_add(1) & ((1 << 24) - 1);
        generation << 40 | offset
    }

    /// An extent of this capacity, in use and in no chain. Only its head has memory: see [`back`](Self::back). Only under the
    /// put lock.
    pub(super) fn allocate(&self, capacity: u64) -> io::Result<u64> {
        let len = segment::HEAD_LEN + capacity * 8;
        let reusable = self.rows().find(|(_, state)| state.load(Acquire) == capacity << 8 | FREE);
        let (offset, state) = match reusable {
            Some((offset, state)) => (offset.load(Acquire), state),
            None => {
                let full = |why| Explained::error(io::ErrorKind::OutOfMemory, Topic::QueueTooLong, why);
                let (row, state) = self.empty_row().ok_or_else(|| full("a queue of more extents than it can list"))?;
                if !self.is_end_possible() {
                    return Err(corrupt("where its memory ends"));
                }
                memfd::check_file_size(self.word(word::END).load(Acquire).saturating_add(len))?;
                let offset = self.raise_end(len);
                let offset = offset.ok_or_else(|| full("a queue of more extents than it has addresses for"))?;
                row.store(offset, Release);
                (offset, state)
            }
        };
        state.store(capacity << 8 | IN_USE, Release);
        let reserved = self.region.reserve_around(offset, len, segment::HEAD_LEN, capacity * 8);
        reserved.inspect_err(|_| self.retire(offset))?;
        Ok(self.live(offset))
    }

    /// A place for `len` bytes, whole pages, that are no extent. It has no memory yet. Under either lock.
    #[cfg(not(multiprocess_loom))]
    pub(super) fn place(&self, len: u64) -> io::Result<u64> {
        if !self.is_end_possible() {
            return Err(corrupt("where its memory ends"));
        }
        let why = "a queue has no addresses left for a leased item";
        let full = || Explained::error(io::ErrorKind::OutOfMemory, Topic::QueueTooLong, why);
        self.raise_end(len).ok_or_else(full)
    }

    /// Returns `true` if a [place](Self::place) may lie there.
    #[cfg(not(multiprocess_loom))]
    pub(super) fn may_have(&self, offset: u64, len: u64) -> bool {
        let past = offset.checked_add(len);
        let end = self.word(word::END).load(Acquire).min(OFFSET_MASK);
        offset.is_multiple_of(PAGE) && offset >= Self::first_len() && past.is_some_and(|past| past <= end)
    }

    /// Takes `len` bytes of addresses at the end, if there are so many.
    fn raise_end(&self, len: u64) -> Option<u64> {
        let raised = |end: u64| end.checked_add(len).filter(|end| *end <= OFFSET_MASK);
        self.word(word::END).fetch_update(AcqRel, Acquire, raised).ok()
    }

    /// Gives memory to the bytes `from..to` of the room for records, and maps it: one call costs less than a fault for each page.
    pub(super) fn back(&self, name: u64, extent: &Extent, from: u64, to: u64) -> io::Result<()> {
        self.region.reserve((name & OFFSET_MASK) + segment::HEAD_LEN + from, to - from)?;
        extent.map.populate_part((segment::HEAD_LEN + from) as usize, (to - from) as usize);
        Ok(())
    }

    /// Returns `true` if a new extent, made at the recorded end of the last one, overlaps none.
    fn is_end_possible(&self) -> bool {
        let past = |(offset, state): (&AtomicU64, &AtomicU64)| {
            let (offset, state) = (offset.load(Acquire), state.load(Acquire));
            if state == EMPTY {
                return Some(0);
            }
            let len = (state >> 8).checked_mul(8)?.checked_add(segment::HEAD_LEN)?;
            offset.checked_add(len)
        };
        let Some(last) = self.rows().try_fold(0, |last, row| Some(past(row)?.max(last))) else { return false };
        // After the rows: the other side may be making an extent, and raises the end before it stores the row.
        let end = self.word(word::END).load(Acquire);
        end.is_multiple_of(PAGE) && end >= Self::first_len() && last <= end
    }

    /// A row for a new extent. If there is none, a free extent of another size is forgotten: no process will come to it any
    /// more, as a producer has found the chain, and a free extent is not in it.
    pub(super) fn empty_row(&self) -> Option<(&AtomicU64, &AtomicU64)> {
        let empty = self.rows().find(|(_, state)| state.load(Acquire) == EMPTY);
        empty.or_else(|| {
            let mut rows = self.rows().skip(1);
            let forgotten = rows.find(|(_, state)| state.load(Acquire) & 0xff == FREE)?;
            forgotten.1.store(EMPTY, Release);
            Some(forgotten)
        })
    }

    /// Makes use of the base again, if it is free. Only under the put lock.
    pub(super) fn reuse_base(&self) -> Option<u64> {
        let state = self.row_of(HEAD_LEN as u64)?;
        (state.load(Acquire) & 0xff == FREE).then(|| {
            state.store((BASE / 8) << 8 | IN_USE, Release);
            self.live(HEAD_LEN as u64)
        })
    }

    /// Gives back the memory of a segment that left the chain, all but its head.
    pub(super) fn retire(&self, name: u64) {
        let Some(state) = self.row_of(name) else { return };
        let (offset, capacity) = (name & OFFSET_MASK, state.load(Acquire) >> 8);
        if offset != HEAD_LEN as u64 && is_possible(offset, capacity) {
            // Failing to give memory back costs memory, nothing else.
            let _ = self.region.give_back(offset, segment::HEAD_LEN, capacity * 8);
        }
        state.store(capacity << 8 | FREE, Release);
    }

    /// Gives back what a death left in use and in no chain. Nobody else is at work.
    pub(super) fn free_all_but(&self, chain: &[u64]) {
        self.in_use()
            .filter(|offset| chain.iter().all(|name| name & OFFSET_MASK != *offset))
            .for_each(|lost| self.retire(lost));
    }

    fn in_use(&self) -> impl Iterator<Item = u64> {
        self.rows().filter(|(_, state)| state.load(Acquire) & 0xff == IN_USE).map(|(offset, _)| offset.load(Acquire))
    }

    /// Of the chain that is one segment nothing else is in use.
    #[cfg(all(test, multiprocess_loom))]
    pub(super) fn check_that_only(&self, name: u64) {
        assert_eq!(self.in_use().collect::<Vec<_>>(), [name & OFFSET_MASK], "extents in use");
    }
}

/// Returns `true` if there can be an extent of so many units there.
fn is_possible(offset: u64, capacity: u64) -> bool {
    let is_place = offset.is_multiple_of(PAGE) && (HEAD_LEN as u64..=OFFSET_MASK).contains(&offset);
    is_place && capacity.is_power_of_two() && capacity <= 1 << 31
}

/// An impossible word, inside an [`io::Error`]. The caller that knows the object's name makes the error for users of it.
#[derive(Debug)]
pub(super) struct Impossible(pub(super) &'static str);

impl std::fmt::Display for Impossible {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the memory of a queue or pipe is damaged: {}", self.0)
    }
}

impl std::error::Error for Impossible {}

#[cold]
pub(super) fn corrupt(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, Impossible(what))
}

impl Bytes for Extent {
    #[inline]
    fn write(&self, at: usize, from: &[u8]) {
        view::copy_in(&self.map, segment::HEAD_LEN as usize + at, from);
    }

    #[inline]
    fn word(&self, at: usize) -> u64 {
        // No record lies beyond the mapped part.
        if self.maps(at as u64 + 8) { view::word(&self.map, segment::HEAD_LEN as usize + at) } else { 0 }
    }

    #[inline]
    fn read(&self, at: usize, len: usize, to: &mut Vec<u8>) {
        view::append(&self.map, segment::HEAD_LEN as usize + at, len, to);
    }

    fn forget(&self, at: usize, len: usize) {
        self.map.forget_part(segment::HEAD_LEN as usize + at, len);
    }

    #[cfg(not(multiprocess_loom))]
    fn read_numbers<N: bytemuck::Pod>(&self, at: usize, len: usize, to: &mut Vec<N>) {
        view::append(&self.map, segment::HEAD_LEN as usize + at, len, to);
    }
}

impl Extent {
    #[inline]
    pub(super) fn segment(&self) -> Segment<'_, Self> {
        Segment { words: view::words(&self.map), bytes: self, capacity: self.capacity }
    }

    #[inline]
    pub(super) fn size(&self) -> u64 {
        u64::from(self.capacity) * 8
    }

    /// Returns `true` if all of it is mapped.
    #[cfg(not(multiprocess_loom))]
    #[inline]
    pub(super) fn is_whole(&self) -> bool {
        self.map.len() as u64 >= segment::HEAD_LEN + self.size()
    }

    #[cfg(multiprocess_loom)]
    pub(super) fn is_whole(&self) -> bool {
        true
    }

    /// Returns `true` if the first `bytes` of the room for records are mapped.
    #[cfg(not(multiprocess_loom))]
    #[inline]
    pub(super) fn maps(&self, bytes: u64) -> bool {
        self.map.len() as u64 >= segment::HEAD_LEN + bytes
    }

    #[cfg(multiprocess_loom)]
    pub(super) fn maps(&self, bytes: u64) -> bool {
        bytes <= self.size()
    }
}
