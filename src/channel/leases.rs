//! The table of leased items: what was taken from a queue and is not yet done with.
//!
//! # State
//! Words of the region's head: `LEASED`, all entries from there on are free or dead letters; `TABLE`, where the table lies in the
//! region's file, 0 until the first lease; `DEAD`, whether there ever was a dead letter; `ORDER`, how many items were ever leased;
//! `MOST_DELIVERIES`, 0 for no limit. The table has [`ENTRIES`] entries of [`ENTRY`] words: the state, and of the item its order,
//! how often it was delivered, where its bytes lie, how many there are and how many fit, its descriptors and their number, and
//! the ring's count from which it was taken. A state is 0 for free, `HELD` and the [`Member`] that has the lease, `RETURNED`, or
//! `DEAD_LETTER`.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | free -> held | get lock, before the ring's `head` is stored | Release | - |
//! | held -> free | its holder: the commit | AcqRel CAS | waiters that join; of a closed queue, all consumers |
//! | held -> returned | its holder: the lease is dropped | AcqRel CAS | a consumer |
//! | held -> dead letter | its holder: the lease is dropped, and the item was delivered often enough | AcqRel CAS | waiters for dead letters, and joins |
//! | returned, or held by the dead -> held by me | get lock, by a lease | Release | - |
//! | returned, or held by the dead -> free | get lock, by a get | Release | - |
//! | returned, or held by the dead -> dead letter | get lock, delivered often enough | Release | waiters for dead letters, and joins |
//! | dead letter -> free | get lock | Release | - |
//!
//! # Invariants
//! 1. An item is in the ring or in an entry, and for a moment in both: until the `head` is stored that follows. `count` shows which.
//! 2. Bytes and words of an entry change under the get lock, while it is free.
//! 3. An entry that is held by a living process is changed by that process alone. All other states but free are changed under the get lock.
//! 4. `LEASED` is stored before the entry that it covers is held, and set back only under the get lock.
//! 5. Words here are claims, as those of the ring: what leads out of the file is an error.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | leasing, before `held` | the item in the ring | - |
//! | leasing, after `held` and before `head` | the item in the ring, and an entry whose `count` is that of the ring | the next consumer completes the move; descriptors that were not kept yet are still with those of the ring |
//! | leasing, after `head`, with descriptors | a copy of them with those of the ring | the next process that looks for descriptors |
//! | leasing, after `head`, or with a lease | an entry held by the dead: its recovery makes all consumers try | the next consumer |
//! | committing, before the CAS | the same | the next consumer |
//! | committing, after it | nothing of the item; its descriptors may be kept open until the next item with descriptors is looked for | - |
//! | giving back, after the CAS | a returned item or a dead letter: the recovery makes all sleepers try, also those that wait for a dead letter or a join | the next consumer |
//! | making a dead letter of an item that was leased by the dead, or returned | a dead letter, with the same recovery | - |
//! | taking a dead letter, before `free` | the dead letter, with its descriptors | - |
//! | taking a dead letter, after `free` | nothing of it; its descriptors may be kept open until the next item with descriptors is looked for | - |
//! | looking for the descriptors of an item | those of another item twice, of which one copy may be kept open until the next item with descriptors is looked for | - |
//! | leasing an item of more descriptors than a packet takes, before they are kept | an item whose descriptors are gone: an error for its next consumer | - |
//!
//! # Cancel
//! No await point.

use super::extents::{Extents, corrupt};
use crate::os::{fault, memfd, named};
use crate::shm::atomic::AtomicU64;
use crate::shm::family::{Family, Member};
use crate::shm::region::{Map, Region};
use crate::shm::view;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

/// Where things are in the head of the region. The first is read by every get, and lies beside what that reads anyway.
pub(super) mod word {
    pub(in crate::channel) const LEASED: usize = 34;
    pub(super) const TABLE: usize = 35;
    pub(super) const DEAD: usize = 36;
    pub(super) const ORDER: usize = 37;
    pub(in crate::channel) const MOST_DELIVERIES: usize = 38;
}

/// How many items can be leased, or be dead letters, at one time.
pub(super) const ENTRIES: usize = 1024;
/// Words of an entry.
const ENTRY: usize = 12;
const TABLE_LEN: u64 = (ENTRIES * ENTRY * 8) as u64;

const STATE: usize = 0;
const ORDER: usize = 1;
const DELIVERIES: usize = 2;
const OFFSET: usize = 3;
const ROOM: usize = 4;
const LEN: usize = 5;
const FDS: usize = 6;
const NUMBER: usize = 7;
const COUNT: usize = 8;

const FREE: u64 = 0;
const HELD: u64 = 1 << 62;
const RETURNED: u64 = 1 << 61;
const DEAD_LETTER: u64 = 1 << 60;
const MEMBER: u64 = (1 << 48) - 1;

/// A count that no entry of a ring is compared with.
const COMMITTED: u64 = u64::MAX;
/// The memory of an item larger than this is given back when its entry is free. The entry keeps the addresses.
const KEEP: u64 = 64 << 10;
/// From this size on a length that is read is checked against the file before memory is taken for it.
const LARGE: u64 = 1 << 20;
/// In the number of an item's descriptors: they are kept for a lease, in the socket's other direction.
pub(super) const KEPT: u64 = 1 << 63;

/// The leased item that a consumer can get.
pub(super) enum Scan<'a> {
    /// This one is to be delivered again.
    Again(Entry<'a>),
    /// All are held by the living.
    Held,
    /// None is left.
    Nothing,
    /// Its holder died before the ring had let go of the item: the move is to be completed.
    InBoth(Entry<'a>),
}

/// An item that is about to be leased.
pub(super) struct Item<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) fds: u32,
    pub(super) number: u64,
    /// The ring's count before it is taken.
    pub(super) count: u32,
}

/// The table, as this process sees it.
pub(super) struct Leases<'a> {
    region: &'a Region,
    table: &'a [AtomicU64],
    family: &'static Family,
}

/// One entry.
#[derive(Clone, Copy)]
pub(super) struct Entry<'a> {
    region: &'a Region,
    words: &'a [AtomicU64],
    pub(super) index: usize,
}

/// The place of the table; made with `create`, under the get lock. `None` if there is none.
pub(super) fn table(region: &Region, extents: &Extents, create: bool) -> io::Result<Option<Arc<Map>>> {
    let place = &region.words()[word::TABLE];
    if place.load(Acquire) == 0 {
        if !create {
            return Ok(None);
        }
        let offset = extents.place(TABLE_LEN)?;
        region.reserve(offset, TABLE_LEN)?;
        place.store(offset, Release);
    }
    region.extent(place.load(Acquire), TABLE_LEN).map(Some).map_err(|_| corrupt("where its leases are"))
}

impl<'a> Leases<'a> {
    pub(super) fn new(region: &'a Region, map: &'a Map, family: &'static Family) -> Self {
        Self { region, table: view::words(map), family }
    }

    fn word(&self, index: usize) -> &'a AtomicU64 {
        &self.region.words()[index]
    }

    pub(super) fn entry(&self, index: usize) -> Entry<'a> {
        Entry { region: self.region, words: &self.table[index * ENTRY..(index + 1) * ENTRY], index }
    }

    fn in_use(&self) -> impl Iterator<Item = Entry<'a>> {
        let most = (self.word(word::LEASED).load(Acquire) as usize).min(ENTRIES);
        (0..most).map(|index| self.entry(index))
    }

    fn holder_lives(&self, state: u64) -> bool {
        self.family.is_listed(Member::from_bits(state & MEMBER))
    }

    /// Returns how many items are leased, or wait to be delivered again.
    ///
    /// `next`: the ring's count. An item that is in the ring as well counts there.
    pub(super) fn len(&self, next: Option<u32>) -> usize {
        let is_in_ring = |entry: &Entry<'_>| next.is_some_and(|next| entry.load(COUNT) == u64::from(next));
        let counts =
            |entry: &Entry<'_>| entry.state() & (HELD | RETURNED) != 0 && !self.is_spent(entry) && !is_in_ring(entry);
        self.in_use().filter(counts).count()
    }

    /// Returns `true` if an item that nobody holds was delivered often enough: the next that scans makes it a dead letter.
    fn is_spent(&self, entry: &Entry<'_>) -> bool {
        let (most, state) = (self.word(word::MOST_DELIVERIES).load(Acquire), entry.state());
        let is_free = state == RETURNED || state & HELD != 0 && !self.holder_lives(state);
        most != 0 && is_free && entry.load(DELIVERIES) >= most
    }

    /// Finds the item that a consumer can get. `count`: that of the ring's next record. `found_dead`: an item became a dead letter. Under the get
    /// lock.
    pub(super) fn scan(&self, count: Option<u32>, found_dead: &mut bool) -> Scan<'a> {
        let (mut oldest, mut is_held): (Option<Entry<'a>>, bool) = (None, false);
        for entry in self.in_use() {
            let state = entry.state();
            match state & (HELD | RETURNED) {
                HELD if self.holder_lives(state) => {
                    is_held = true;
                    continue;
                }
                HELD if count.is_some_and(|count| entry.load(COUNT) == u64::from(count)) => {
                    return Scan::InBoth(entry);
                }
                HELD | RETURNED => {}
                _ => continue,
            }
            if self.is_spent(&entry) {
                self.word(word::DEAD).store(1, Release);
                entry.set_state(DEAD_LETTER);
                fault::point("scan.dead");
                *found_dead = true;
                continue;
            }
            if oldest.is_none_or(|oldest| entry.load(ORDER) < oldest.load(ORDER)) {
                oldest = Some(entry);
            }
        }
        match oldest {
            Some(entry) => Scan::Again(entry),
            None if is_held => Scan::Held,
            None => {
                self.word(word::LEASED).store(0, Release);
                Scan::Nothing
            }
        }
    }

    /// An entry for one more of `len` bytes, if there is one. Under the get lock.
    pub(super) fn free(&self, len: u64) -> Option<Entry<'a>> {
        let mut free = (0..ENTRIES).map(|index| self.entry(index)).filter(|entry| entry.state() == FREE);
        let first = free.next()?;
        // A large item goes where one has been: addresses are taken as for the most that were leased at one time.
        let fits = |entry: &Entry<'a>| entry.load(ROOM) >= len;
        let entry = if len <= KEEP || fits(&first) { first } else { free.find(fits).unwrap_or(first) };
        entry.give_back();
        Some(entry)
    }

    /// The oldest dead letter. Under the get lock.
    pub(super) fn dead_letter(&self) -> Option<Entry<'a>> {
        self.dead_letters().min_by_key(|entry| entry.load(ORDER))
    }

    fn dead_letters(&self) -> impl Iterator<Item = Entry<'a>> {
        let all = if self.word(word::DEAD).load(Acquire) == 0 { 0 } else { ENTRIES };
        (0..all).map(|index| self.entry(index)).filter(|entry| entry.state() == DEAD_LETTER)
    }

    pub(super) fn dead_letters_len(&self) -> usize {
        self.dead_letters().count() + self.in_use().filter(|entry| self.is_spent(entry)).count()
    }

    /// Fills a free entry. Under the get lock.
    pub(super) fn fill(&self, entry: Entry<'a>, extents: &Extents, item: &Item<'_>) -> io::Result<()> {
        let len = item.bytes.len() as u64;
        memfd::check_room(len)?;
        if entry.load(ROOM) < len {
            // Sizes that double take twice the addresses of the largest, and no memory before it is written.
            let room = len.next_power_of_two().max(crate::shm::region::PAGE);
            let offset = extents.place(room)?;
            entry.punch();
            entry.store(OFFSET, offset);
            entry.store(ROOM, room);
        }
        let offset = entry.load(OFFSET);
        if !extents.may_have(offset, entry.load(ROOM)) && len > 0 {
            return Err(corrupt("a leased item beyond its memory"));
        }
        // Before the bytes: what a death leaves of them is given back.
        entry.store(LEN, len);
        named::write(self.region.fd().as_fd(), offset, item.bytes)?;
        entry.store(DELIVERIES, 0);
        entry.store(FDS, u64::from(item.fds));
        entry.store(NUMBER, item.number);
        entry.store(COUNT, u64::from(item.count));
        entry.store(ORDER, self.word(word::ORDER).fetch_add(1, AcqRel));
        Ok(())
    }

    /// Gives an entry to `me`, once more. Returns the state that this is. Under the get lock.
    pub(super) fn hold(&self, entry: Entry<'a>, me: Member) -> Held {
        let state = HELD | me.to_bits();
        let deliveries = entry.load(DELIVERIES).saturating_add(1);
        entry.store(DELIVERIES, deliveries);
        self.word(word::LEASED).fetch_max(entry.index as u64 + 1, AcqRel);
        entry.set_state(state);
        Held { index: entry.index, state, fds: entry.fds(), deliveries: deliveries.min(u32::MAX.into()) as u32 }
    }

    /// Its holder is done with the item; false if it is not its holder any more.
    pub(super) fn commit(&self, held: &Held) -> bool {
        self.entry(held.index).change(held.state, FREE)
    }

    /// Its holder gives the item back, to be delivered again or as a dead letter.
    pub(super) fn give_back(&self, held: &Held) -> Back {
        let most = self.word(word::MOST_DELIVERIES).load(Acquire);
        let is_spent = most != 0 && u64::from(held.deliveries) >= most;
        if is_spent {
            self.word(word::DEAD).store(1, Release);
        }
        self.entry(held.index).change(held.state, if is_spent { DEAD_LETTER } else { RETURNED });
        if is_spent { Back::DeadLetter } else { Back::Again }
    }

    /// Returns `true` if descriptors are those of an item that is not done with.
    pub(super) fn has_number(&self, number: u64) -> bool {
        let mut all = (0..ENTRIES).map(|index| self.entry(index));
        all.any(|entry| entry.state() != FREE && entry.load(FDS) != 0 && entry.load(NUMBER) == number)
    }
}

/// The fate of an item that was given back.
pub(super) enum Back {
    Again,
    DeadLetter,
}

/// A lease, as its holder knows it.
#[derive(Debug)]
pub(super) struct Held {
    index: usize,
    state: u64,
    /// How many descriptors are kept for it, and under which number.
    fds: (u64, usize),
    pub(super) deliveries: u32,
}

impl Held {
    pub(super) fn fds(&self) -> (u64, usize) {
        self.fds
    }

    pub(super) fn index(&self) -> usize {
        self.index
    }
}

impl Entry<'_> {
    fn load(&self, word: usize) -> u64 {
        self.words[word].load(Acquire)
    }

    fn store(&self, word: usize, value: u64) {
        self.words[word].store(value, Release);
    }

    fn state(&self) -> u64 {
        self.load(STATE)
    }

    fn set_state(&self, state: u64) {
        self.store(STATE, state);
    }

    fn change(&self, from: u64, to: u64) -> bool {
        self.words[STATE].compare_exchange(from, to, AcqRel, Acquire).is_ok()
    }

    /// Returns how many descriptors the item has, and under which number they are kept.
    pub(super) fn fds(&self) -> (u64, usize) {
        (self.load(NUMBER) | KEPT, self.load(FDS) as usize)
    }

    /// The ring has let go of the item.
    pub(super) fn is_committed(&self) {
        self.store(COUNT, COMMITTED);
    }

    /// Nobody needs it any more. Under the get lock.
    pub(super) fn set_free(&self) {
        self.set_state(FREE);
        self.give_back();
    }

    /// Gives the memory of a large item back. It is free, and this is under the get lock.
    fn give_back(&self) {
        if self.is_large() {
            self.punch();
            self.store(LEN, 0);
        }
    }

    /// Gives all memory back, and keeps the addresses.
    fn punch(&self) {
        let (offset, room) = (self.load(OFFSET), self.load(ROOM));
        // Damaged words must not give away memory of the ring itself.
        if room != 0 && offset >= Extents::first_len() {
            // Failing to give memory back costs memory, nothing else.
            let _ = memfd::give_back(self.region.fd().as_fd(), offset, room);
        }
    }

    /// The same for one that was just committed, if it is still free.
    pub(super) fn give_back_if_free(&self) {
        if self.state() == FREE {
            self.give_back();
        }
    }

    pub(super) fn is_large(&self) -> bool {
        self.load(LEN) > KEEP
    }

    /// Appends the bytes of the item to `to`.
    pub(super) fn read(&self, to: &mut Vec<u8>) -> io::Result<()> {
        let (offset, len) = (self.load(OFFSET), self.load(LEN));
        if len >= LARGE {
            self.region.check_extent(offset, len).map_err(|_| corrupt("a leased item beyond its memory"))?;
        }
        let start = to.len();
        to.resize(start + len as usize, 0);
        named::read(self.region.fd().as_fd(), offset, &mut to[start..]).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => corrupt("a leased item beyond its memory"),
            _ => error,
        })
    }
}
