//! The list of sleepers: the processes that sleep until a shared word changes, in shared memory, in order.
//!
//! # State
//! [`LEN`] words. `MARKS`: bit i means that entry i may hold a sleeper, the top bit that `OVERFLOW` is not empty. `TICKET`: the
//! next place in the order. `OVERFLOW`: the doorbells of the sleepers that found no free entry, the crowd. Then the entries: 0 is
//! free, otherwise `NOTIFIED:1 | ticket:31 | slot:12 | epoch:20` of the sleeping process.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | entry 0 -> mine, then mark i set | the sleeper | SeqCst, then tries again | - |
//! | entry E -> E with NOTIFIED | a notifier, oldest ticket first | AcqRel CAS | the sleeper's doorbell |
//! | mark i cleared, then entry -> 0 | the sleeper, when notified or when it leaves | Release | - |
//! | entry of a dead process -> mine with NOTIFIED, then as above | any notifier or sleeper | AcqRel CAS | - |
//! | overflow doorbell set, then the top mark | the sleeper | SeqCst, then tries again | - |
//! | top mark cleared, then OVERFLOW -> 0 | a notifier | AcqRel | all doorbells taken |
//!
//! # Invariants
//! 1. Only the process that owns entry i changes mark i, so it never hides a later sleeper.
//! 2. A sleeper publishes its entry and its mark, and tries again before it sleeps. A notifier publishes its change, and then reads
//!    the marks. By sequential consistency one of them sees the other.
//! 3. Damage can only lose a wake or add one: marks beyond the entries are ignored, a walk ends after a bounded number of steps,
//!    and a sleeper that finds its entry changed takes another before it sleeps again.
//! 4. An entry is notified at most once. A notification that was taken is used by one success or passed on. One found while
//!    leaving is always passed on, for it may have come after the change that made for the success.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | sleeper between entry and mark | an entry without a mark: never chosen, never waited for | the next sleeper that needs the entry |
//! | sleeper asleep | an entry of an unlisted member | the notifier that meets it takes it over and goes on |
//! | sleeper after NOTIFIED | the notification died with it | recovery rings every doorbell: all try again |
//! | notifier between NOTIFIED and the doorbell, or between top mark and OVERFLOW | a sleeper without a wake | recovery rings every doorbell |
//! | process that takes a dead entry over | an entry of a dead member with NOTIFIED | the next that needs the entry |
//!
//! # Cancel
//! Leaving returns whether a notification had come; `wait::local_queue` then passes it on.

use crate::os::fault;
use crate::shm::atomic::{AtomicU64, fence};
use crate::shm::family::Member;
use std::sync::atomic::Ordering::*;

#[cfg(not(multiprocess_loom))]
const ENTRIES: usize = 61;
#[cfg(multiprocess_loom)]
const ENTRIES: usize = 2;

const MARKS: usize = 0;
const TICKET: usize = 1;
const OVERFLOW: usize = 2;
const FIRST: usize = 3;

/// Words that a list of sleepers takes up; all zeros is an empty list.
pub(crate) const LEN: usize = FIRST + ENTRIES;

const CROWD: u64 = 1 << 63;
/// The possible marks, without that of the crowd. Any other is damage and is ignored.
const MARKED: u64 = (1 << ENTRIES) - 1;
/// The most entries that one notifier reads, including those that change meanwhile.
const MOST_STEPS: usize = 16 * ENTRIES;
const NOTIFIED: u64 = 1 << 63;
const TICKET_MASK: u64 = (1 << 31) - 1;
const MEMBER_MASK: u64 = (1 << 32) - 1;
const EPOCH_BITS: u32 = 20;

/// As much of a [`Member`] as an entry has room for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Sleeper {
    pub(crate) slot: u16,
    epoch: u32,
}

impl Sleeper {
    /// Returns `true` if a slot's epoch is this sleeper's.
    pub(crate) fn has_epoch(self, epoch: u32) -> bool {
        epoch & ((1 << EPOCH_BITS) - 1) == self.epoch
    }

    /// The low 32 bits.
    pub(crate) fn from_bits(bits: u64) -> Self {
        Self { slot: (bits >> EPOCH_BITS & 0xfff) as u16, epoch: bits as u32 & ((1 << EPOCH_BITS) - 1) }
    }

    /// 32 bits.
    pub(crate) fn to_bits(self) -> u64 {
        u64::from(self.slot) << EPOCH_BITS | u64::from(self.epoch)
    }

    fn to_entry(self, ticket: u64) -> u64 {
        (ticket & TICKET_MASK) << 32 | self.to_bits()
    }
}

impl From<Member> for Sleeper {
    fn from(member: Member) -> Self {
        Self { slot: member.slot, epoch: member.epoch & ((1 << EPOCH_BITS) - 1) }
    }
}

/// Where a process sleeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    Entry { index: usize, ticket: u64 },
    Crowd,
}

/// The processes that a notifier must wake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wake {
    Sleeper(Sleeper),
    /// All processes that listen to these doorbells.
    Doorbells(u64),
}

/// The list, wherever its words are.
#[derive(Clone, Copy)]
pub(crate) struct Sleepers<'a> {
    words: &'a [AtomicU64],
}

impl<'a> Sleepers<'a> {
    pub(crate) fn new(words: &'a [AtomicU64]) -> Self {
        debug_assert_eq!(words.len(), LEN);
        Self { words }
    }

    fn entry(&self, index: usize) -> &'a AtomicU64 {
        &self.words[FIRST + index]
    }

    /// Takes a place at the end of the list, or the place that `ticket` still gives. The caller must try again before it sleeps.
    pub(crate) fn join(
        &self,
        me: Sleeper,
        doorbell: u32,
        ticket: Option<u64>,
        is_listed: impl Fn(Sleeper) -> bool,
    ) -> Place {
        let ticket = ticket.unwrap_or_else(|| self.words[TICKET].fetch_add(1, Relaxed) & TICKET_MASK);
        for index in 0..ENTRIES {
            let entry = self.entry(index);
            let seen = entry.load(Relaxed);
            let free = seen == 0 || (!is_listed(Sleeper::from_bits(seen)) && self.take_over(index, seen, me));
            if free && entry.compare_exchange(0, me.to_entry(ticket), AcqRel, Relaxed).is_ok() {
                fault::point("sleep.entered");
                self.words[MARKS].fetch_or(1 << index, SeqCst);
                fence(SeqCst);
                return Place::Entry { index, ticket };
            }
        }
        self.words[OVERFLOW].fetch_or(1 << doorbell, SeqCst);
        fault::point("sleep.crowded");
        self.words[MARKS].fetch_or(CROWD, SeqCst);
        fence(SeqCst);
        Place::Crowd
    }

    /// Frees an entry whose owner is dead; false if someone else is at it.
    #[cold]
    fn take_over(&self, index: usize, seen: u64, me: Sleeper) -> bool {
        let mine = me.to_entry(0) | NOTIFIED;
        let taken = self.entry(index).compare_exchange(seen, mine, AcqRel, Relaxed).is_ok();
        if taken {
            fault::point("recover.entry");
            self.free(index);
        }
        taken
    }

    fn free(&self, index: usize) {
        self.words[MARKS].fetch_and(!(1 << index), AcqRel);
        fault::point("sleep.unmarked");
        self.entry(index).store(0, Release);
    }

    /// Returns `true` if the notice for `place` has come; if so the place is gone.
    pub(crate) fn take_notice(&self, place: Place) -> bool {
        match place {
            Place::Entry { index, .. } => {
                let noticed = self.entry(index).load(Acquire) & NOTIFIED != 0;
                if noticed {
                    fault::point("sleep.noticed");
                    self.free(index);
                }
                noticed
            }
            Place::Crowd => true,
        }
    }

    /// Returns `true` if `place` is still this sleeper's; if not its entry was damaged. A mark that was lost is set again.
    pub(crate) fn keep(&self, place: Place, me: Sleeper) -> bool {
        let Place::Entry { index, ticket } = place else { return true };
        let entry = self.entry(index).load(Acquire);
        let is_mine = entry & !NOTIFIED == me.to_entry(ticket);
        if is_mine && entry & NOTIFIED == 0 && self.words[MARKS].load(Acquire) & 1 << index == 0 {
            self.words[MARKS].fetch_or(1 << index, SeqCst);
            fence(SeqCst);
        }
        is_mine
    }

    /// Leaves `place`; true if a notice had come, which the caller must pass on.
    #[must_use]
    pub(crate) fn leave(&self, place: Place) -> bool {
        match place {
            Place::Entry { index, .. } => {
                let before = self.entry(index).fetch_or(NOTIFIED, AcqRel);
                self.free(index);
                before & NOTIFIED != 0
            }
            Place::Crowd => false,
        }
    }

    /// Notifies the process that has waited longest. To be called after the change that it waits for.
    #[inline]
    pub(crate) fn notify_one(&self, me: Option<Sleeper>, is_listed: impl Fn(Sleeper) -> bool, wake: impl FnMut(Wake)) {
        fence(SeqCst);
        if self.words[MARKS].load(Relaxed) != 0 {
            self.notify(me, false, is_listed, wake);
        }
    }

    /// Notifies every process that waits.
    #[inline]
    pub(crate) fn notify_all(&self, me: Option<Sleeper>, is_listed: impl Fn(Sleeper) -> bool, wake: impl FnMut(Wake)) {
        fence(SeqCst);
        if self.words[MARKS].load(Relaxed) != 0 {
            self.notify(me, true, is_listed, wake);
        }
    }

    /// Returns `true` if any process may sleep here, for a caller that has just published its change by a SeqCst read-modify-write: between
    /// that and a SeqCst load there is no need of a fence. The model checker knows only fences.
    #[inline]
    pub(crate) fn has_sleepers_after_rmw(&self) -> bool {
        #[cfg(multiprocess_loom)]
        fence(SeqCst);
        self.words[MARKS].load(SeqCst) != 0
    }

    /// Notifies this process, if it is in the list. The crowd is woken too.
    #[cold]
    pub(crate) fn notify_sleeper(&self, who: Sleeper, mut wake: impl FnMut(Wake)) {
        fence(SeqCst);
        self.notify_crowd(&mut wake);
        let mut marks = self.words[MARKS].load(Acquire) & MARKED;
        while marks != 0 {
            let index = marks.trailing_zeros() as usize;
            marks &= marks - 1;
            let entry = self.entry(index).load(Acquire);
            let is_it = entry & NOTIFIED == 0 && Sleeper::from_bits(entry) == who;
            if is_it && self.entry(index).compare_exchange(entry, entry | NOTIFIED, AcqRel, Relaxed).is_ok() {
                fault::point("notify.marked");
                return wake(Wake::Sleeper(who));
            }
        }
    }

    fn notify_crowd(&self, wake: &mut impl FnMut(Wake)) {
        if self.words[MARKS].load(Acquire) & CROWD != 0 {
            self.words[MARKS].fetch_and(!CROWD, SeqCst);
            fault::point("notify.crowd");
            let doorbells = self.words[OVERFLOW].swap(0, SeqCst);
            if doorbells != 0 {
                wake(Wake::Doorbells(doorbells));
            }
        }
    }

    #[cold]
    fn notify(&self, me: Option<Sleeper>, all: bool, is_listed: impl Fn(Sleeper) -> bool, mut wake: impl FnMut(Wake)) {
        self.notify_crowd(&mut wake);
        // Later sleepers have seen the change. So this ends, however often woken sleepers come back.
        let seen = self.words[MARKS].load(Acquire);
        if seen & !(MARKED | CROWD) != 0 {
            // Else every notifier would come here for nothing.
            self.words[MARKS].fetch_and(MARKED | CROWD, AcqRel);
        }
        let mut marks = seen & MARKED;
        for _ in 0..MOST_STEPS {
            let Some((index, entry)) = self.oldest(marks) else { return };
            let sleeper = Sleeper::from_bits(entry);
            if !is_listed(sleeper) {
                // Without a name of our own we cannot take it over; marking it is enough to get past it.
                match me {
                    Some(me) => drop(self.take_over(index, entry, me)),
                    None => drop(self.entry(index).compare_exchange(entry, entry | NOTIFIED, AcqRel, Relaxed)),
                }
                continue;
            }
            if self.entry(index).compare_exchange(entry, entry | NOTIFIED, AcqRel, Relaxed).is_ok() {
                fault::point("notify.marked");
                wake(Wake::Sleeper(sleeper));
                marks &= !(1 << index);
                if !all {
                    return;
                }
            }
        }
    }

    /// The entry among these with the oldest ticket that has not been notified.
    fn oldest(&self, mut marks: u64) -> Option<(usize, u64)> {
        let is_older = |entry: u64, other: u64| (entry >> 32).wrapping_sub(other >> 32) & TICKET_MASK > TICKET_MASK / 2;
        let mut oldest: Option<(usize, u64)> = None;
        while marks != 0 {
            let index = marks.trailing_zeros() as usize;
            marks &= marks - 1;
            let entry = self.entry(index).load(Acquire);
            let sleeps = entry & MEMBER_MASK != 0 && entry & NOTIFIED == 0;
            if sleeps && oldest.is_none_or(|(_, best)| is_older(entry, best)) {
                oldest = Some((index, entry));
            }
        }
        oldest
    }

    /// Returns how many processes may sleep here, dead or alive; those of the crowd are one.
    pub(crate) fn count(&self) -> u32 {
        (self.words[MARKS].load(Relaxed) & (MARKED | CROWD)).count_ones()
    }

    /// The processes in the list, dead or alive, without the crowd.
    pub(crate) fn list(&self) -> Vec<Sleeper> {
        let entries = self.words[FIRST..].iter().map(|entry| entry.load(Acquire));
        entries.filter(|entry| entry & MEMBER_MASK != 0).map(Sleeper::from_bits).collect()
    }

    /// Returns `true` if the list is empty, as at the end of every test.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.words[FIRST..].iter().all(|entry| entry.load(Acquire) == 0) && self.words[OVERFLOW].load(Acquire) == 0
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    fn sleeper(slot: u16) -> Sleeper {
        Sleeper { slot, epoch: 1 }
    }

    fn words() -> Vec<AtomicU64> {
        (0..LEN).map(|_| AtomicU64::new(0)).collect()
    }

    fn woken(sleepers: Sleepers<'_>, all: bool, dead: &[u16]) -> Vec<Wake> {
        let mut woken = Vec::new();
        let listed = |sleeper: Sleeper| !dead.contains(&sleeper.slot);
        match all {
            false => sleepers.notify_one(Some(sleeper(99)), listed, |wake| woken.push(wake)),
            true => sleepers.notify_all(Some(sleeper(99)), listed, |wake| woken.push(wake)),
        }
        woken
    }

    #[test]
    fn sleepers_are_notified_once_each_in_order_of_arrival() {
        let words = words();
        let sleepers = Sleepers::new(&words);
        let places: Vec<_> = [5, 3, 4].map(|slot| sleepers.join(sleeper(slot), 0, None, |_| true)).into();
        for slot in [5, 3, 4] {
            assert_eq!(woken(sleepers, false, &[]), [Wake::Sleeper(sleeper(slot))]);
        }
        assert_eq!(woken(sleepers, false, &[]), []);
        assert!(places.into_iter().all(|place| sleepers.take_notice(place)));
        assert!(sleepers.is_empty());
    }

    #[test]
    fn notify_sleeper_notifies_one_by_name_and_once() {
        let words = words();
        let sleepers = Sleepers::new(&words);
        let places: Vec<_> = [5, 3, 4].map(|slot| sleepers.join(sleeper(slot), 0, None, |_| true)).into();
        let mut woken = Vec::new();
        for slot in [3, 3, 9] {
            sleepers.notify_sleeper(sleeper(slot), |wake| woken.push(wake));
        }
        assert_eq!(woken, [Wake::Sleeper(sleeper(3))]);
        assert_eq!(
            places.into_iter().map(|place| sleepers.take_notice(place)).collect::<Vec<_>>(),
            [false, true, false]
        );
    }

    #[test]
    fn sleeper_that_tried_in_vain_keeps_its_ticket() {
        let words = words();
        let sleepers = Sleepers::new(&words);
        let first = sleepers.join(sleeper(1), 0, None, |_| true);
        let _second = sleepers.join(sleeper(2), 0, None, |_| true);
        assert_eq!(woken(sleepers, false, &[]), [Wake::Sleeper(sleeper(1))]);
        assert!(sleepers.take_notice(first));
        let Place::Entry { ticket, .. } = first else { panic!("no entry") };
        sleepers.join(sleeper(1), 0, Some(ticket), |_| true);
        assert_eq!(woken(sleepers, false, &[]), [Wake::Sleeper(sleeper(1))]);
    }

    #[test]
    fn notifier_passes_over_a_dead_sleeper() {
        let words = words();
        let sleepers = Sleepers::new(&words);
        for slot in [1, 2, 3] {
            sleepers.join(sleeper(slot), 0, None, |_| true);
        }
        assert_eq!(woken(sleepers, false, &[1, 2]), [Wake::Sleeper(sleeper(3))]);
    }

    #[test]
    fn entry_of_a_death_before_its_mark_is_reused() {
        let words = words();
        let sleepers = Sleepers::new(&words);
        for index in 0..ENTRIES {
            words[FIRST + index].store(sleeper(7).to_entry(0), Release);
        }
        assert_eq!(sleepers.join(sleeper(8), 0, None, |other| other.slot != 7), Place::Entry { index: 0, ticket: 0 });
        assert_eq!(woken(sleepers, false, &[7]), [Wake::Sleeper(sleeper(8))]);
    }

    #[test]
    fn crowd_is_woken_by_doorbells_at_the_next_notification() {
        let words = words();
        let sleepers = Sleepers::new(&words);
        let places: Vec<_> =
            (0..ENTRIES as u16 + 2).map(|n| sleepers.join(sleeper(n), n as u32 % 64, None, |_| true)).collect();
        assert_eq!(places[ENTRIES..], [Place::Crowd, Place::Crowd]);
        assert_eq!(woken(sleepers, false, &[]), [Wake::Doorbells(3 << ENTRIES), Wake::Sleeper(sleeper(0))]);
        assert_eq!(woken(sleepers, true, &[]).len(), ENTRIES - 1);
    }

    #[test]
    fn impossible_marks_are_ignored_and_cleared() {
        for bit in 61..63 {
            let words = words();
            let sleepers = Sleepers::new(&words);
            sleepers.join(sleeper(1), 0, None, |_| true);
            words[MARKS].fetch_or(1 << bit, Release);
            sleepers.notify_sleeper(sleeper(9), |wake| panic!("{wake:?}"));
            assert_eq!(woken(sleepers, false, &[]), [Wake::Sleeper(sleeper(1))]);
            assert_eq!(words[MARKS].load(Acquire), 1);
            words[MARKS].fetch_or(1 << bit, Release);
            assert_eq!(woken(sleepers, true, &[]), []);
        }
    }

    #[test]
    fn changed_entry_or_mark_is_found_before_the_next_sleep() {
        let words = words();
        let sleepers = Sleepers::new(&words);
        let place = sleepers.join(sleeper(1), 0, None, |_| true);
        words[MARKS].store(0, Release);
        assert!(sleepers.keep(place, sleeper(1)));
        assert_eq!(words[MARKS].load(Acquire), 1);
        words[FIRST].store(0, Release);
        assert!(!sleepers.keep(place, sleeper(1)));
    }

    #[test]
    fn notifier_ends_among_entries_of_noise() {
        let words = words();
        words.iter().for_each(|word| word.store(0x7fff_ffff_ffff_ffff, Release));
        let sleepers = Sleepers::new(&words);
        assert!(woken(sleepers, true, &[]).len() <= ENTRIES + 1);
        assert_eq!(woken(sleepers, true, &[0xfff]), []);
    }

    #[test]
    fn leave_returns_whether_a_notification_had_come() {
        let words = words();
        let sleepers = Sleepers::new(&words);
        let (first, second) =
            (sleepers.join(sleeper(1), 0, None, |_| true), sleepers.join(sleeper(2), 0, None, |_| true));
        assert_eq!(woken(sleepers, false, &[]), [Wake::Sleeper(sleeper(1))]);
        assert!(sleepers.leave(first));
        assert!(!sleepers.leave(second));
        assert!(sleepers.is_empty());
    }
}
