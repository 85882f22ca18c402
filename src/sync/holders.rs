//! A table of holders: how many permits of a semaphore, or shares of a read-write lock, each process holds.
//!
//! It is lock-free. The count records the last move. The process that makes the next move first writes the last one into
//! the row that made it. So a move is one compare-exchange, and any process can complete each later step.
//!
//! # State
//! `COUNT`: `seq:20 | odd:1 | kind:2 | row:9 | poisoned:1 | free:31`. It has the free permits, and the last move: its kind,
//! its row, and whether it was an odd or even move of that row. Then [`ROWS`] rows of two words: the [`Member`] that owns the
//! row (0 if never used; the last row may be shared by all), and `moves:33 | held:31`.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | owner 0 -> me, or a dead member with nothing held -> me | a process at its first take | AcqRel CAS | - |
//! | COUNT: free-1, take one by row r | an acquirer, if any is free | AcqRel CAS | - |
//! | COUNT: free MAX -> 0, take all by row r; not poisoned | a writer, if all are free | AcqRel CAS | - |
//! | COUNT: free+1, give one by row r | the holder that drops a permit | AcqRel CAS | its caller, one |
//! | COUNT: free as it was, give one by row r | the holder that forgets a permit | AcqRel CAS | - |
//! | COUNT: free+held, empty row r; poisoned if it held all | a holder that releases all; any process, if the owner of r is dead | AcqRel CAS | its caller; the recovery did |
//! | COUNT: free+1 by no row | a process that adds a permit | AcqRel CAS | its caller, one |
//! | row r: the last move done, moves+1 | any process that finds it in COUNT and not in the row | AcqRel CAS | - |
//! | COUNT -> a move by an impossible row, for good | the process that finds damage | Release | its caller, all |
//!
//! # Invariants
//! 1. COUNT moves on only from a move that is in its row. So at most one move is not, and `odd` shows whether it is: the row
//!    lacks it if its number of moves has the other parity.
//! 2. A row that was read is changed only if its 33 bits of moves are still the same, so a process that was stopped in between
//!    changes nothing. A process stopped between reading and changing COUNT goes wrong only if it missed a multiple of 2^20
//!    moves that left everything else equal.
//! 3. free + all held + all forgotten = all created and added. It is at most [`MAX`].
//! 4. A row gets a new owner only when the last one is dead and holds nothing. A process that empties the row of a dead
//!    member checks that it is still the owner after reading the row.
//! 5. Every word is untrusted. An impossible row, more than [`MAX`] free or held, or a release by a row that holds nothing
//!    closes the table for good: nothing is taken or given any more, and [`Holders::is_damaged`] is true.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | after it got a row | a row of a dead member, with nothing held | the next process that needs a row |
//! | holding | a row of an unlisted member | the next process that finds too little free; recovery makes all waiters try |
//! | holding all | the same, and from then on `poisoned`, until the next take of all | as above |
//! | between COUNT and its row | a move that is not in its row | the next to move, which first writes it into the row |
//! | after a give, before the wake | a free permit, sleepers not woken | recovery rings every doorbell |
//!
//! # Cancel
//! No await point.

use crate::os::fault;
use crate::shm::atomic::AtomicU64;
use crate::shm::family::Member;
use crate::shm::robust_lock::Liveness;
use std::sync::atomic::{AtomicUsize, Ordering::*};

/// The most permits there can be.
pub(super) const MAX: u32 = (1 << 31) - 1;

/// Processes that can be alive at the same time, have held something, and have a row each.
#[cfg(not(multiprocess_loom))]
const ROWS: usize = 440;
#[cfg(multiprocess_loom)]
const ROWS: usize = 5;

const COUNT: usize = 0;
const FIRST: usize = 1;
pub(super) const LEN: usize = FIRST + 2 * ROWS;

/// The owner of the last row, when no other row is left: permits held there do not come back by themselves.
const EVERYBODY: u64 = u64::MAX;
/// A move that concerns no row.
const NO_ROW: usize = 511;
/// The move of a table that is closed for good: by an impossible row.
const DAMAGED: u64 = 510 << 32;
/// The same before the waiters have been notified.
const UNREPORTED: u64 = DAMAGED | 1;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    TakeOne,
    TakeAll,
    GiveOne,
    Empty,
}

/// The word `COUNT`.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Count(u64);

impl Count {
    const POISONED: u64 = 1 << 31;

    fn first(free: u32) -> Self {
        Self((NO_ROW as u64) << 32 | u64::from(free))
    }

    /// The move after this one.
    fn next(self, plan: Plan, row: usize, held_row: Row) -> Self {
        let odd = held_row.0 >> 31 & 1 ^ 1;
        let poisoned = if plan.is_poisoned { Self::POISONED } else { 0 };
        let seq = self.0 >> 44;
        let last = seq.wrapping_add(1) << 44 | odd << 43 | (plan.kind as u64) << 41 | (row as u64) << 32;
        Self(last | poisoned | u64::from(plan.free))
    }

    fn free(self) -> u32 {
        self.0 as u32 & MAX
    }

    fn is_poisoned(self) -> bool {
        self.0 & Self::POISONED != 0
    }

    fn row(self) -> usize {
        (self.0 >> 32 & 511) as usize
    }

    fn kind(self) -> Kind {
        [Kind::TakeOne, Kind::TakeAll, Kind::GiveOne, Kind::Empty][(self.0 >> 41 & 3) as usize]
    }

    /// Returns `true` if a row has had this move, given that it can lack no other.
    fn is_in(self, held_row: Row) -> bool {
        self.0 >> 43 & 1 == held_row.0 >> 31 & 1
    }
}

/// The second word of a row.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Row(u64);

impl Row {
    fn held(self) -> u32 {
        self.0 as u32 & MAX
    }

    fn after(self, kind: Kind) -> Self {
        let held = match kind {
            // A damaged row may have as much already; the next move finds that.
            Kind::TakeOne => (self.held() + 1).min(MAX),
            Kind::TakeAll => MAX,
            Kind::GiveOne => self.held().saturating_sub(1),
            Kind::Empty => 0,
        };
        Self((self.0 >> 31).wrapping_add(1) << 31 | u64::from(held))
    }
}

/// The effect of a move on the count.
#[derive(Clone, Copy)]
struct Plan {
    kind: Kind,
    free: u32,
    is_poisoned: bool,
}

impl Plan {
    /// Returns `true` if the result can be counted. `held_row`: the row before the move.
    #[inline]
    fn is_possible(&self, held_row: Row) -> bool {
        let is_row = match self.kind {
            Kind::TakeOne => held_row.held() < MAX,
            Kind::GiveOne => held_row.held() > 0,
            Kind::TakeAll | Kind::Empty => true,
        };
        is_row && self.free <= MAX
    }
}

/// A take, to be given back by the same row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Taken {
    pub(super) row: usize,
    /// A process died holding all, and all has not been taken since.
    pub(super) is_poisoned: bool,
}

/// The table, wherever its words are.
pub(super) struct Holders<'a, L> {
    words: &'a [AtomicU64],
    lives: &'a L,
}

impl<'a, L: Liveness> Holders<'a, L> {
    pub(super) fn new(words: &'a [AtomicU64], lives: &'a L) -> Self {
        debug_assert_eq!(words.len(), LEN); // As its callers slice.
        Self { words, lives }
    }

    /// Initialises a table of `free` permits, before any other process can see it.
    pub(super) fn fill(words: &[AtomicU64], free: u32) {
        words[COUNT].store(Count::first(free).0, Release);
    }

    #[inline]
    fn count(&self) -> Count {
        Count(self.words[COUNT].load(Acquire))
    }

    fn owner(&self, row: usize) -> &'a AtomicU64 {
        &self.words[FIRST + 2 * row]
    }

    fn word_of(&self, row: usize) -> &'a AtomicU64 {
        &self.words[FIRST + 2 * row + 1]
    }

    /// The free permits, including those of the dead.
    pub(super) fn free(&self) -> u32 {
        self.take_back();
        self.count().free()
    }

    /// One permit for `me`, whose row is remembered in `mine`.
    #[inline]
    pub(super) fn take_one(&self, me: Member, mine: &AtomicUsize) -> Option<Taken> {
        let row = self.row_of(me, mine);
        let plan = |count: Count, _| {
            let free = count.free().checked_sub(1)?;
            Some(Plan { kind: Kind::TakeOne, free, is_poisoned: count.is_poisoned() })
        };
        let before = self.change(row, plan).or_else(|| self.change_after_deaths(row, plan))?;
        Some(Taken { row, is_poisoned: before.is_poisoned() })
    }

    /// Everything for `me`, if there are [`MAX`] permits and all are free.
    #[inline]
    pub(super) fn take_all(&self, me: Member, mine: &AtomicUsize) -> Option<Taken> {
        let row = self.row_of(me, mine);
        let plan = |count: Count, _| {
            (count.free() == MAX).then_some(Plan { kind: Kind::TakeAll, free: 0, is_poisoned: false })
        };
        let before = self.change(row, plan).or_else(|| self.change_after_deaths(row, plan))?;
        Some(Taken { row, is_poisoned: before.is_poisoned() })
    }

    /// Gives back one permit of `row`; returns the number of free permits then, or `None` if the table is damaged.
    #[inline]
    pub(super) fn give_one(&self, row: usize) -> Option<u32> {
        let give = |count: Count, _| {
            Some(Plan { kind: Kind::GiveOne, free: count.free() + 1, is_poisoned: count.is_poisoned() })
        };
        self.change(row, give).map(|before| before.free() + 1)
    }

    /// Gives back all that `row` holds; false if the table is damaged.
    #[inline]
    pub(super) fn give_all(&self, row: usize) -> bool {
        let give = |count: Count, held| {
            Some(Plan { kind: Kind::Empty, free: count.free() + held, is_poisoned: count.is_poisoned() })
        };
        self.change(row, give).is_some()
    }

    /// Removes one permit of `row` from the table: it is neither held nor free.
    pub(super) fn forget_one(&self, row: usize) {
        let forget =
            |count: Count, _| Some(Plan { kind: Kind::GiveOne, free: count.free(), is_poisoned: count.is_poisoned() });
        self.change(row, forget);
    }

    /// Adds a permit; false if there are `limit` already, free or held.
    pub(super) fn add_one(&self, limit: u32) -> bool {
        let add = |count: Count, _| {
            let held: u64 = self.used().map(|row| u64::from(Row(self.word_of(row).load(Acquire)).held())).sum();
            let is_room = u64::from(count.free()) + held < u64::from(limit);
            is_room.then_some(Plan { kind: Kind::Empty, free: count.free() + 1, is_poisoned: count.is_poisoned() })
        };
        self.change(NO_ROW, add).is_some()
    }

    /// Returns `true` if it is closed for good.
    pub(super) fn is_damaged(&self) -> bool {
        (ROWS..NO_ROW).contains(&self.count().row())
    }

    #[cold]
    fn close(&self) {
        self.words[COUNT].store(UNREPORTED, Release);
    }

    /// Closes it for good. True for the first caller, which is to notify the waiters.
    #[cold]
    pub(super) fn is_first_report(&self) -> bool {
        self.words[COUNT].swap(DAMAGED, AcqRel) != DAMAGED
    }

    /// Makes one move by `row`, unless `plan` returns `None` or the memory is damaged. Returns the count before it.
    #[inline]
    fn change(&self, row: usize, mut plan: impl FnMut(Count, u32) -> Option<Plan>) -> Option<Count> {
        let mut seen = self.count();
        loop {
            if !self.write_down(seen) {
                return None;
            }
            // It has all moves up to `seen`; if it has later ones, `seen` is no longer the count.
            let held_row = if row == NO_ROW { Row(0) } else { Row(self.word_of(row).load(Acquire)) };
            let plan = plan(seen, held_row.held())?;
            if !plan.is_possible(held_row) {
                if self.count() != seen {
                    seen = self.count();
                    continue;
                }
                self.close();
                return None;
            }
            let next = seen.next(plan, row, held_row);
            match self.words[COUNT].compare_exchange(seen.0, next.0, AcqRel, Acquire) {
                Ok(_) => {
                    fault::point("holders.counted");
                    self.write_down(next);
                    fault::point("holders.written");
                    return Some(seen);
                }
                Err(now) => seen = Count(now),
            }
        }
    }

    /// Makes sure that the move of `count` is in its row; false if there is no such row.
    #[inline]
    fn write_down(&self, count: Count) -> bool {
        if count.row() >= ROWS {
            return count.row() == NO_ROW;
        }
        let word = self.word_of(count.row());
        let held_row = Row(word.load(Acquire));
        // In this order: a process that wrote a later move into the row has seen the count go past this one.
        if !count.is_in(held_row) && self.count() == count {
            // If it fails another process has done it.
            let _ = word.compare_exchange(held_row.0, held_row.after(count.kind()).0, AcqRel, Acquire);
        }
        true
    }

    /// The rows that ever had an owner: they are taken from the bottom.
    fn used(&self) -> impl Iterator<Item = usize> {
        (0..ROWS).take_while(|row| self.owner(*row).load(Acquire) != 0)
    }

    fn is_dead(&self, owner: u64) -> bool {
        owner != 0 && owner != EVERYBODY && !self.lives.is_listed(Member::from_bits(owner))
    }

    #[cold]
    fn change_after_deaths(&self, row: usize, plan: impl FnMut(Count, u32) -> Option<Plan>) -> Option<Count> {
        self.take_back();
        // Also if that was nothing: another process may have taken it back since we read, without notifying anyone.
        self.change(row, plan)
    }

    /// Takes back the permits of the dead.
    fn take_back(&self) {
        self.used().for_each(|row| self.take_back_from(row));
    }

    fn take_back_from(&self, row: usize) {
        let owner = self.owner(row).load(Acquire);
        if !self.is_dead(owner) {
            return;
        }
        let empty = |count: Count, held: u32| {
            // A new owner would be there by now if the row that was read is its row.
            let is_his = held > 0 && self.owner(row).load(Acquire) == owner;
            let is_poisoned = count.is_poisoned() || held == MAX;
            is_his.then(|| Plan { kind: Kind::Empty, free: count.free() + held, is_poisoned })
        };
        self.change(row, empty);
    }

    #[inline]
    fn row_of(&self, me: Member, mine: &AtomicUsize) -> usize {
        let row = mine.load(Relaxed);
        if row < ROWS && self.owner(row).load(Relaxed) == me.to_bits() { row } else { self.find_row(me, mine) }
    }

    #[cold]
    fn find_row(&self, me: Member, mine: &AtomicUsize) -> usize {
        let is_mine = |row: &usize| self.owner(*row).load(Acquire) == me.to_bits();
        let row = self.used().find(is_mine).or_else(|| (0..ROWS - 1).find(|row| self.get_row(*row, me)));
        match row {
            Some(row) => {
                fault::point("holders.entered");
                mine.store(row, Relaxed);
                row
            }
            None => {
                self.owner(ROWS - 1).store(EVERYBODY, Release);
                ROWS - 1
            }
        }
    }

    /// Makes `row` mine, if it was never owned or its owner is dead.
    fn get_row(&self, row: usize, me: Member) -> bool {
        let owner = self.owner(row).load(Acquire);
        if owner == me.to_bits() {
            return true; // Another thread of ours was faster.
        }
        if owner != 0 && !self.is_dead(owner) {
            return false;
        }
        if owner != 0 {
            self.take_back_from(row);
        }
        match self.owner(row).compare_exchange(owner, me.to_bits(), AcqRel, Acquire) {
            Ok(_) => true,
            Err(now) => now == me.to_bits(),
        }
    }

    /// The holders and the number of permits of each, read from the rows. The last move may be missing. A writer holds [`MAX`].
    pub(super) fn list(words: &[AtomicU64]) -> Vec<(Member, u32)> {
        let rows = words[FIRST..].chunks_exact(2).map(|row| (row[0].load(Acquire), Row(row[1].load(Acquire)).held()));
        let rows = rows.take_while(|(owner, _)| *owner != 0).filter(|(owner, held)| *held > 0 && *owner != EVERYBODY);
        rows.map(|(owner, held)| (Member::from_bits(owner), held)).collect()
    }

    /// All held and free permits: for models, while no process moves.
    #[cfg(all(test, multiprocess_loom))]
    pub(super) fn sum(&self) -> u64 {
        self.write_down(self.count());
        let held: u64 = self.used().map(|row| u64::from(Row(self.word_of(row).load(Acquire)).held())).sum();
        held + u64::from(self.count().free())
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;
    use crate::shm::heap::Members;

    fn words(free: u32) -> Vec<AtomicU64> {
        let words: Vec<_> = (0..LEN).map(|_| AtomicU64::new(0)).collect();
        Holders::<Members>::fill(&words, free);
        words
    }

    #[test]
    fn move_by_an_impossible_row_closes_the_table() {
        for row in ROWS..NO_ROW {
            let (words, members, mine) = (words(3), Members::new(2), AtomicUsize::new(usize::MAX));
            let holders = Holders::new(&words, &members);
            let taken = holders.take_one(members.member(1), &mine).unwrap();
            words[COUNT].store((row as u64) << 32 | 3, Release);
            assert_eq!(holders.take_one(members.member(1), &mine), None);
            assert_eq!((holders.give_one(taken.row), holders.add_one(9)), (None, false));
            assert!(holders.is_damaged() && holders.is_first_report() && !holders.is_first_report());
        }
    }

    #[test]
    fn impossible_counts_close_the_table() {
        let (words, members, mine) = (words(MAX), Members::new(2), AtomicUsize::new(usize::MAX));
        let holders = Holders::new(&words, &members);
        let taken = holders.take_one(members.member(1), &mine).unwrap();
        words[FIRST + 2 * taken.row + 1].fetch_and(!u64::from(MAX), AcqRel);
        assert_eq!(holders.give_one(taken.row), None, "it holds none");
        assert!(holders.is_damaged());
    }

    #[test]
    fn no_word_causes_a_panic_or_an_endless_loop() {
        for (at, value) in (0..9).flat_map(|at| [0, 1, u64::MAX, 1 << 31, !0 << 32].map(|value| (at, value))) {
            let (words, members, mine) = (words(MAX), Members::new(2), AtomicUsize::new(usize::MAX));
            let holders = Holders::new(&words, &members);
            let taken = holders.take_one(members.member(1), &mine).unwrap();
            words[at].store(value, Release);
            let _ = (holders.take_one(members.member(0), &AtomicUsize::new(7)), holders.free(), holders.add_one(5));
            let _ =
                (holders.give_one(taken.row), holders.take_all(members.member(1), &mine), holders.give_all(taken.row));
            let _ = Holders::<Members>::list(&words);
        }
    }
}
