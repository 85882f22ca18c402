//! Items that are taken on lease, and those that come back. Their table, its moves and deaths stand at the top of
//! [`leases`](crate::channel::leases).

use super::{Pop, Ring, Side, WakeRequests};
use crate::channel::descriptors::lost;
use crate::channel::extents::corrupt;
use crate::channel::leases::{self, Held, Item, Leases, Scan};
use crate::channel::segment::Mark;
use crate::error::{Explained, Topic};
use crate::os::fault;
use crate::shm::family::Member;
use std::io;
use std::os::fd::OwnedFd;

/// The outcome of a try to lease.
pub(in crate::channel) enum Leasing {
    Leased(Held, Vec<u8>, Vec<OwnedFd>),
    Empty,
    Closed,
    /// Somebody else is taking.
    Busy,
}

/// Where the descriptors of items are.
pub(in crate::channel) trait Descriptors {
    /// Copies those of the record of this number, which stay where they are; `None` if they are lost. An error has lost nothing.
    fn copy(&self, number: u64, count: usize) -> io::Result<Option<Vec<OwnedFd>>>;
    /// Drops those of this number, if they are there.
    fn drop(&self, number: u64);
    /// Keeps a copy of those of a leased item, as far as there is room.
    fn keep(&self, number: u64, fds: &[OwnedFd]) -> io::Result<()>;
}

impl Ring {
    /// The table, if any item was ever leased.
    pub(in crate::channel) fn leases(&self) -> io::Result<Option<Leases<'_>>> {
        self.table(false)
    }

    fn table(&self, create: bool) -> io::Result<Option<Leases<'_>>> {
        let map = match self.leases.get() {
            Some(map) => map,
            None => match leases::table(self.region(), &self.extents, create)? {
                Some(map) => self.leases.get_or_init(|| map),
                None => return Ok(None),
            },
        };
        Ok(Some(Leases::new(self.region(), map, self.family)))
    }

    /// Returns how many items are leased, or wait to be delivered again.
    pub(in crate::channel) fn leased(&self) -> usize {
        if !self.has_leases() {
            return 0;
        }
        let next = self.head().ok().map(|head| head.count);
        self.leases().ok().flatten().map_or(0, |leases| leases.len(next))
    }

    /// An item that is to be delivered again, in place of the ring's next.
    #[cold]
    pub(super) fn scan(
        &self,
        side: &mut Side,
        mut next: Option<(Mark, Mark)>,
        requests: &mut WakeRequests,
    ) -> io::Result<(Scan<'_>, Option<(Mark, Mark)>)> {
        let leases = self.leases()?.ok_or_else(|| corrupt("leases without a table"))?;
        // No more of them than entries.
        for _ in 0..=leases::ENTRIES {
            match (leases.scan(next.map(|(head, _)| head.count), &mut requests.joiners), next) {
                (Scan::InBoth(entry), Some((head, tail))) => {
                    let segment = side.segment()?;
                    let record = segment.record(head, tail).ok_or_else(|| corrupt("no item where one should be"))?;
                    segment.consume(head, record);
                    entry.is_committed();
                    requests.putters = true;
                    next = self.settle_taker(side)?;
                }
                (scan, _) => return Ok((scan, next)),
            }
        }
        Err(corrupt("leases of items that are not leased"))
    }

    /// Takes one item on lease: one that came back, or else the ring's next.
    pub(in crate::channel) fn lease(
        &self,
        payload: impl FnOnce(usize) -> (Vec<u8>, bool),
        fds: &impl Descriptors,
    ) -> (io::Result<Leasing>, WakeRequests) {
        self.take_locked(Leasing::Busy, |side, requests, me| self.lease_locked(side, requests, me, payload, fds))
    }

    fn lease_locked(
        &self,
        side: &mut Side,
        requests: &mut WakeRequests,
        me: Member,
        payload: impl FnOnce(usize) -> (Vec<u8>, bool),
        fds: &impl Descriptors,
    ) -> io::Result<Leasing> {
        let mut found = self.settle_taker(side)?;
        let mut is_awaited = false;
        if self.has_leases() {
            let (scan, next) = self.scan(side, found, requests)?;
            found = next;
            match scan {
                Scan::Again(entry) => {
                    let leases = self.leases()?.ok_or_else(|| corrupt("leases without a table"))?;
                    let (mut payload, _) = payload(0);
                    entry.read(&mut payload)?;
                    let (number, count) = entry.fds();
                    let copied = if count > 0 { fds.copy(number, count)? } else { Some(Vec::new()) };
                    let Some(copied) = copied else {
                        entry.set_free();
                        requests.one_less = true;
                        return Err(lost());
                    };
                    fault::point("lease.again");
                    return Ok(Leasing::Leased(leases.hold(entry, me), payload, copied));
                }
                Scan::Held => is_awaited = true,
                Scan::Nothing | Scan::InBoth(_) => {}
            }
        }
        if found.is_none() && self.check_closed()? {
            // `CLOSED` is set after the last put: look once more.
            found = self.settle_taker(side)?;
            if found.is_none() {
                return Ok(if is_awaited { Leasing::Empty } else { Leasing::Closed });
            }
        }
        let Some((head, tail)) = found else {
            self.note_idle(side);
            return Ok(Leasing::Empty);
        };
        let leases = self.table(true)?.ok_or_else(|| corrupt("leases without a table"))?;
        let (segment, record) = (side.segment()?, side.record(head, tail)?);
        let Some(entry) = leases.free(record.len.into()) else {
            let why = format!(
                "{} items of the {} are leased or dead letters, which is the limit: commit some, or take the dead letters",
                leases::ENTRIES,
                self.what
            );
            return Err(Explained::error(io::ErrorKind::QuotaExceeded, Topic::Leases, why));
        };
        let (mut payload, needs_memory) = payload(record.len as usize);
        segment.read_payload(head, record, &mut payload);
        let item = Item { bytes: &payload, fds: record.fds, number: record.number, count: head.count };
        leases.fill(entry, &self.extents, &item)?;
        fault::point("lease.filled");
        let held = leases.hold(entry, me);
        fault::point("lease.held");
        // In this order a death loses nothing: a process that finds the item in the ring and in the entry completes the move.
        let copied = match record.fds {
            0 => Ok(Some(Vec::new())),
            count => fds.copy(record.number, count as usize).and_then(|copied| {
                copied.iter().try_for_each(|copied| fds.keep(record.number, copied))?;
                Ok(copied)
            }),
        };
        let copied = copied.inspect_err(|_| entry.set_free())?;
        fault::point("lease.kept");
        if needs_memory {
            segment.give_back_when_drained();
            segment.forget_payload(head, record);
        }
        segment.consume(head, record);
        fault::point("lease.consumed");
        entry.is_committed();
        if record.fds > 0 {
            fds.drop(record.number);
        }
        if head.position.wrapping_add(record.units()) == tail.position {
            self.drained(side, requests);
        }
        match copied {
            Some(copied) => Ok(Leasing::Leased(held, payload, copied)),
            // Reported once, and the item is gone, as by a get.
            None => {
                entry.set_free();
                requests.one_less = true;
                Err(lost())
            }
        }
    }

    /// Takes the oldest dead letter.
    pub(in crate::channel) fn pop_dead_letter(&self, fds: &impl Descriptors) -> (io::Result<Pop>, WakeRequests) {
        self.take_locked(Pop::Busy, |side, requests, _| {
            let found = self.settle_taker(side)?;
            // One may become a dead letter just now: nobody else may look at it any more.
            if self.has_leases() {
                let _ = self.scan(side, found, requests)?;
            }
            let Some(leases) = self.leases()? else { return Ok(Pop::Empty) };
            let Some(entry) = leases.dead_letter() else { return Ok(Pop::Empty) };
            let mut payload = Vec::new();
            entry.read(&mut payload)?;
            let (number, count) = entry.fds();
            // They are dropped last: neither a death nor a limit of descriptors loses the item.
            let copied = if count > 0 { fds.copy(number, count)? } else { Some(Vec::new()) };
            fault::point("letter.copied");
            entry.set_free();
            fault::point("letter.freed");
            if count > 0 {
                fds.drop(number);
            }
            Ok(Pop::Got(payload, copied.ok_or_else(lost)?))
        })
    }

    /// The holder of a lease is done with its item: its descriptors are kept no more. False if somebody is taking.
    pub(in crate::channel) fn drop_kept(
        &self,
        held: &Held,
        fds: &impl Descriptors,
    ) -> (io::Result<bool>, WakeRequests) {
        self.take_locked(false, |_, _, _| {
            fds.drop(held.fds().0);
            Ok(true)
        })
    }

    /// The holder of a lease is done with its item: the memory of a large one is given back, if nobody is taking.
    pub(in crate::channel) fn tidy(&self, held: &Held) -> WakeRequests {
        let Ok(Some(leases)) = self.leases() else { return WakeRequests::default() };
        let entry = leases.entry(held.index());
        if !entry.is_large() {
            return WakeRequests::default();
        }
        let give_back = |_: &mut Side, _: &mut WakeRequests, _| {
            entry.give_back_if_free();
            Ok(())
        };
        self.take_locked((), give_back).1
    }
}
