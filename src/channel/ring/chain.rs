//! The chain of a ring's segments: where to put and to take, how it grows, and what is given back. Its state and its moves
//! stand at the top of [`ring`](super).

use super::{AHEAD, Ring, SEVERAL, Side, word};
use crate::channel::extents::{self, BASE, Extent, corrupt};
use crate::channel::segment::Mark;
use crate::os::fault;
use crate::shm::family::Member;
use crate::shm::robust_lock::{RobustLock, Taken};
use std::io;
use std::sync::atomic::Ordering::*;

impl Ring {
    /// Finds the segment to put into, and where.
    pub(super) fn settle_putter(&self, side: &mut Side) -> io::Result<Mark> {
        for _ in 0..=extents::MOST {
            self.settle(side, self.word(word::PUT_SEGMENT).load(Acquire))?;
            let segment = side.segment()?;
            match segment.next() {
                0 => return Ok(segment.tail()),
                // Somebody died after the link: invariant 2.
                next => self.word(word::PUT_SEGMENT).store(next, Release),
            }
        }
        Err(corrupt("a chain without an end"))
    }

    /// Makes `side` be about the segment `name`.
    #[inline]
    fn settle(&self, side: &mut Side, name: u64) -> io::Result<()> {
        if side.name != name || side.extent.is_none() {
            *side = Side { name, extent: Some(self.extents.open(name)?) };
        }
        Ok(())
    }

    /// Links a segment with room for `units`; `None` if the limit in bytes forbids it.
    pub(super) fn grow(&self, side: &mut Side, tail: Mark, units: u32) -> io::Result<Option<Mark>> {
        let Some((old, name)) = self.extent_for(side, tail, units, 0)? else { return Ok(None) };
        let linked = self.link(side, &old, name, tail.count);
        if let (Ok(_), Some(extent)) = (&linked, &side.extent) {
            extent.populate(u64::from(units) * 8 + AHEAD);
        }
        linked.inspect_err(|_| self.extents.retire(name)).map(Some)
    }

    /// The last segment, and an extent to follow it with room for `units`; the first `later` bytes of that are without
    /// memory. `None` if the limit in bytes forbids it.
    pub(super) fn extent_for(
        &self,
        side: &Side,
        tail: Mark,
        units: u32,
        later: u64,
    ) -> io::Result<Option<(Extent, u64)>> {
        let Some(old) = side.extent.clone() else { return Ok(None) };
        let is_empty = self.head()?.count == tail.count;
        if self.byte_limit != 0 && !is_empty && old.size() >= self.byte_limit {
            return Ok(None);
        }
        let alone = u64::from(units).next_power_of_two();
        let several = (u64::from(units) * 4).next_power_of_two().min(SEVERAL / 8).max(alone);
        let doubled = if is_empty { 0 } else { old.capacity() * 2 };
        // Never less than the base: whole pages, so that the extent after it begins at one.
        let capacity = several.max(doubled).max(BASE / 8);
        if capacity > 1 << 31 {
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, "a queue of more than 16 GiB"));
        }
        let least = alone.max(BASE / 8);
        let name = match self.extents.allocate(capacity, later) {
            // Twice as much as before is more than there is: just what is needed, then.
            Err(error) if error.kind() == io::ErrorKind::OutOfMemory && least < capacity => {
                self.extents.allocate(least, later)?
            }
            allocated => allocated?,
        };
        Ok(Some((old, name)))
    }

    /// Begins the segment `name` and makes it the one to put into. If this fails, nothing has happened.
    pub(super) fn link(&self, side: &mut Side, old: &Extent, name: u64, count: u32) -> io::Result<Mark> {
        let extent = self.extents.open(name)?;
        extent.segment().begin(count);
        fault::point("grow.begun");
        old.segment().link(name);
        fault::point("grow.linked");
        self.word(word::PUT_SEGMENT).store(name, Release);
        let tail = extent.segment().tail();
        *side = Side { name, extent: Some(extent) };
        Ok(tail)
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

    /// Replaces a large segment that has just been drained by the base, if no putter is at work.
    /// True if a putter asked for a wake meanwhile.
    #[cold]
    pub(super) fn give_back(&self, side: &mut Side, large: &Extent) -> bool {
        let (Ok(me), Ok(mut put)) = (self.family.me(), self.put.try_lock()) else { return false };
        let robust_lock = self.put_lock();
        match robust_lock.try_take(me, self.family) {
            None => return false,
            Some(Taken::Free) => {}
            Some(Taken::OwnerDied) => self.repair(),
        }
        let name = self.word(word::GET_SEGMENT).load(Acquire);
        let (head, tail) = (large.segment().head(), large.segment().tail());
        let is_last = self.word(word::PUT_SEGMENT).load(Acquire) == name && large.segment().next() == 0;
        if is_last
            && head == tail
            && let Some(base) = self.extents.reuse_base()
        {
            match self.link(&mut put, large, base, tail.count) {
                Ok(_) => {
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
            // What follows an extent that cannot be mapped now is not lost; better to free nothing.
            let Ok(extent) = self.extents.open(name) else { return };
            name = extent.segment().next();
        }
        self.extents.free_all_but(&chain);
        self.word(word::REPAIR).store(0, Release);
    }
}
