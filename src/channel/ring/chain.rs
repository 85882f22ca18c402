//! The chain of a ring's segments: where to put and to take, how it grows, and what is given back. Its state and its moves
//! stand at the top of [`ring`](super).

use super::{AHEAD, MOST_UNITS, Ring, SEVERAL, Side, word};
use crate::channel::extents::{self, BASE, Extent, corrupt};
use crate::channel::segment::{Mark, RecordHead};
use crate::error::{Explained, Topic};
use crate::os::{fault, memfd};
use crate::shm::family::Member;
use crate::shm::region::PAGE;
use crate::shm::robust_lock::{RobustLock, Taken};
use std::io;
use std::sync::atomic::Ordering::*;

/// A segment that has begun and is not in the chain yet.
pub(super) struct Next {
    pub(super) old: Extent,
    pub(super) name: u64,
    pub(super) extent: Extent,
}

impl Ring {
    /// Finds the segment to put into, and where.
    pub(super) fn settle_putter(&self, side: &mut Side) -> io::Result<Mark> {
        for _ in 0..=extents::MOST {
            let name = self.word(word::PUT_SEGMENT).load(Acquire);
            if side.name != name || side.extent.is_none() {
                *side = Side { name, extent: Some(self.extents.open(name)?) };
            }
            let segment = side.segment()?;
            match segment.next() {
                0 => return Ok(segment.tail()),
                // Somebody died after the link: invariant 2.
                next => self.word(word::PUT_SEGMENT).store(next, Release),
            }
        }
        Err(corrupt("a chain without an end"))
    }

    /// Makes `side` be about the segment `name`, from which something is taken.
    #[inline]
    fn settle(&self, side: &mut Side, name: u64) -> io::Result<()> {
        if side.name != name || side.extent.is_none() {
            self.map_to_take(side, name)?;
        }
        Ok(())
    }

    #[cold]
    fn map_to_take(&self, side: &mut Side, name: u64) -> io::Result<()> {
        // A map that is replaced goes first: there may be no addresses for both.
        *side = Side::default();
        *side = Side { name, extent: Some(self.extents.open_to_take(name)?) };
        Ok(())
    }

    /// Links a segment with room for `record`, whose memory is there; where to put the record. `None` if the limit in bytes
    /// forbids it. After an error nothing has changed.
    pub(super) fn grow(&self, side: &mut Side, tail: Mark, record: RecordHead) -> io::Result<Option<Mark>> {
        let Some(next) = self.next_segment(side, tail, record.units())? else { return Ok(None) };
        let segment = next.extent.segment();
        let tail = segment.tail();
        self.back(next.name, &next.extent, segment.reach(tail, record))
            .inspect_err(|_| self.extents.retire(next.name))?;
        self.link(side, next);
        Ok(Some(tail))
    }

    /// A new segment to follow the last one, with room for `units`; it has no memory yet. `None` if the limit in bytes
    /// forbids it.
    pub(super) fn next_segment(&self, side: &Side, tail: Mark, units: u32) -> io::Result<Option<Next>> {
        let Some(old) = side.extent.clone() else { return Ok(None) };
        let is_empty = self.head()?.count == tail.count;
        if self.byte_limit() != 0 && !is_empty && old.size() >= self.byte_limit() {
            return Ok(None);
        }
        // Room costs addresses, not memory. With room for two a record can be put while the one before it is taken.
        let alone = u64::from(units).next_power_of_two();
        let two = (u64::from(units) * 2).next_power_of_two();
        let several = (u64::from(units) * 4).next_power_of_two().min(SEVERAL / 8).max(two);
        let doubled = if is_empty { 0 } else { (old.segment().backed() / 4).next_power_of_two() };
        // Never less than the base: whole pages, so that the extent after it begins at one.
        let least = alone.max(BASE / 8);
        if least.max(doubled) > MOST_UNITS {
            let why = "a queue of more than 16 GiB";
            return Err(Explained::error(io::ErrorKind::OutOfMemory, Topic::QueueTooLong, why));
        }
        let capacity = several.max(doubled).max(least).min(MOST_UNITS);
        let (name, extent) = match self.begin_extent(capacity, tail.count) {
            // More addresses than there are, or a longer file than may be: just what is needed, then.
            Err(error) if least < capacity && is_too_much(&error) => self.begin_extent(least, tail.count)?,
            begun => begun?,
        };
        Ok(Some(Next { old, name, extent }))
    }

    fn begin_extent(&self, capacity: u64, count: u32) -> io::Result<(u64, Extent)> {
        let name = self.extents.allocate(capacity)?;
        let extent = self.extents.open(name).inspect_err(|_| self.extents.retire(name))?;
        extent.segment().begin(count, 0);
        Ok((name, extent))
    }

    /// Sees to it that the first `reach` bytes of a segment have memory.
    pub(super) fn back(&self, name: u64, extent: &Extent, reach: u64) -> io::Result<()> {
        let segment = extent.segment();
        let (backed, size) = (segment.backed(), segment.size());
        if reach <= backed {
            return Ok(());
        }
        let back = |to| self.extents.back(name, extent, backed, to).map(|()| segment.set_backed(to));
        // With the head of the next record, which may be the start of one whose payload is elsewhere.
        let least = (reach + RecordHead::MOST_LEN).next_multiple_of(PAGE).min(size);
        let ahead = (backed + AHEAD).min(size);
        if backed >= AHEAD {
            // A queue that fills ends in an error of its put, and not in the kernel's choice of a process to kill.
            memfd::check_room(AHEAD)?;
        }
        if ahead > least && back(ahead).is_ok() { Ok(()) } else { back(least) }
    }

    /// Where in its segment a record goes for which there is room: at `tail`, or with its payload at the start of the segment
    /// rather than in memory that is not there yet. `None` if the limit in bytes forbids it.
    pub(super) fn place(&self, side: &Side, tail: Mark, record: RecordHead) -> io::Result<Option<RecordHead>> {
        let segment = side.segment()?;
        if segment.reach(tail, record) <= segment.backed() {
            return Ok(Some(record));
        }
        let limit = self.byte_limit().max(u64::from(record.units()) * 8);
        if self.byte_limit() != 0 && segment.used(tail) > limit {
            return Ok(None);
        }
        Ok(Some(segment.rewound(tail, record).unwrap_or(record)))
    }

    /// Makes a segment that has begun the one to put into.
    pub(super) fn link(&self, side: &mut Side, Next { old, name, extent }: Next) {
        fault::point("grow.begun");
        old.segment().link(name);
        fault::point("grow.linked");
        self.word(word::PUT_SEGMENT).store(name, Release);
        *side = Side { name, extent: Some(extent) };
    }

    /// Finds the segment to take from: its head and a tail beyond it, if there is anything.
    pub(super) fn settle_taker(&self, side: &mut Side) -> io::Result<Option<(Mark, Mark)>> {
        for _ in 0..=extents::MOST {
            let name = self.word(word::GET_SEGMENT).load(Acquire);
            self.settle(side, name)?;
            let segment = side.segment()?;
            let head = segment.head();
            // Order matters: once `next` is seen, `tail` is final (segment invariant 2).
            let next = segment.next();
            if let Some(tail) = segment.tail_beyond(head) {
                if side.extent.as_ref().is_some_and(|extent| !extent.is_whole()) {
                    // Memory may have come to it since, and records.
                    self.map_to_take(side, name)?;
                }
                return Ok(Some((head, tail)));
            }
            if next == 0 {
                return Ok(None);
            }
            self.word(word::GET_SEGMENT).store(next, Release);
            fault::point("leave.moved");
            self.extents.retire(name);
        }
        Err(corrupt("a chain without an end"))
    }

    /// Replaces a large segment that is drained by the base, if no putter is at work. Under the get lock. True if a putter
    /// asked for a wake meanwhile.
    #[cold]
    pub(super) fn give_back(&self, side: &mut Side) -> bool {
        let (Ok(me), Ok(mut put), Some(large)) = (self.family.me(), self.put.try_lock(), side.extent.clone()) else {
            return false;
        };
        let robust_lock = self.put_lock();
        match robust_lock.try_take(me, self.family) {
            None => return false,
            Some(Taken::Free) => {}
            Some(Taken::OwnerDied) => self.repair(),
        }
        let name = self.word(word::GET_SEGMENT).load(Acquire);
        let (head, tail) = (large.segment().head(), large.segment().tail());
        let is_last = self.word(word::PUT_SEGMENT).load(Acquire) == name && large.segment().next() == 0;
        if name == side.name
            && is_last
            && head == tail
            && let Some(base) = self.extents.reuse_base()
        {
            match self.extents.open(base) {
                Ok(extent) => {
                    extent.segment().begin(tail.count, BASE);
                    self.link(&mut put, Next { old: large, name: base, extent });
                    self.word(word::GET_SEGMENT).store(base, Release);
                    self.extents.retire(name);
                    *side = Side::default();
                }
                Err(_) => self.extents.retire(base),
            }
        }
        robust_lock.release()
    }

    pub(super) fn owes_repair(&self) -> bool {
        self.word(word::REPAIR).load(Acquire) != 0
    }

    /// With one lock taken, after a death: frees what is in no chain, or leaves that to the next, if somebody holds
    /// the `other`. True if somebody asked for that one meanwhile.
    #[cold]
    pub(super) fn repair_beside(&self, other: RobustLock<'_>, me: Member) -> bool {
        self.word(word::REPAIR).store(1, Release);
        other.try_take(me, self.family).is_some() && {
            self.repair();
            other.release()
        }
    }

    /// Gives back every extent that a death left in use and in no chain, or owes that still. Under both locks.
    fn repair(&self) {
        self.word(word::REPAIR).store(1, Release);
        let mut chain = Vec::new();
        let mut name = self.word(word::GET_SEGMENT).load(Acquire);
        while name != 0 && chain.len() < extents::MOST {
            chain.push(name);
            // The chain behind an extent that cannot be mapped now is not lost; better to free nothing.
            let Ok(extent) = self.extents.open_to_take(name) else { return };
            name = extent.segment().next();
        }
        self.extents.free_all_but(&chain);
        self.word(word::REPAIR).store(0, Release);
    }
}

fn is_too_much(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::OutOfMemory | io::ErrorKind::FileTooLarge)
}
