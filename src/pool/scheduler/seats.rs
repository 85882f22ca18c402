//! The seats of a pool, and a set of seats for each question of the scheduler, so that none needs a walk.
//!
//! Code that changes a worker borrows it from here, which notes its seat as touched. [`Seats::update`] then moves touched seats to the sets that they
//! belong to; the scheduler calls it before it asks.

use super::DEPTH;
use super::effects::Spawn;
use super::worker::{Phase, Worker};
use crate::shm::family::SLOTS;
use std::collections::BTreeSet;
use std::time::Instant;

const WORDS: usize = SLOTS / 64;
const _: () = assert!(WORDS <= 64, "one word says which words have a bit");

/// A set of seats. Everything but [`iter`](Self::iter) takes constant time.
#[derive(Clone)]
pub(super) struct SeatSet {
    words: [u64; WORDS],
    /// Which of them are not 0.
    summary: u64,
    len: usize,
}

impl Default for SeatSet {
    fn default() -> Self {
        Self { words: [0; WORDS], summary: 0, len: 0 }
    }
}

impl SeatSet {
    #[inline]
    pub(super) fn contains(&self, seat: usize) -> bool {
        self.words.get(seat / 64).is_some_and(|word| word >> (seat % 64) & 1 != 0)
    }

    #[inline]
    pub(super) fn set(&mut self, seat: usize, is_in: bool) {
        let Some(word) = self.words.get_mut(seat / 64) else { return };
        let bit = 1 << (seat % 64);
        if (*word & bit != 0) == is_in {
            return;
        }
        *word ^= bit;
        self.len = if is_in { self.len + 1 } else { self.len - 1 };
        let summary = 1 << (seat / 64);
        self.summary = if *word != 0 { self.summary | summary } else { self.summary & !summary };
    }

    pub(super) fn insert(&mut self, seat: usize) {
        self.set(seat, true);
    }

    /// The lowest seat.
    #[inline]
    pub(super) fn first(&self) -> Option<usize> {
        let at = (self.summary != 0).then(|| self.summary.trailing_zeros() as usize)?;
        Some(64 * at + self.words[at].trailing_zeros() as usize)
    }

    #[inline]
    pub(super) fn pop_first(&mut self) -> Option<usize> {
        let seat = self.first()?;
        self.set(seat, false);
        Some(seat)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of them, lowest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = usize> {
        let words = self.words.iter().enumerate().filter(|(_, word)| **word != 0);
        words.flat_map(|(at, word)| (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| 64 * at + bit))
    }
}

/// The place of one worker after the other.
#[derive(Default)]
pub(super) struct Seat {
    worker: Option<Worker>,
    /// When the next one may start, if there is to be one.
    vacant: Option<Instant>,
    /// The driver is starting it.
    is_spawning: bool,
    failures: u32,
    /// The sets that it is in.
    class: Class,
}

/// A set of seats for each question.
#[derive(Default)]
pub(super) struct Index {
    /// Workers that anybody may give another order, by how many they have. The first are idle; all orders of the others are quiet.
    pub(super) open: [SeatSet; DEPTH],
    /// The workers of these that have only orders of calls with one item.
    pub(super) single: [SeatSet; DEPTH],
    /// The workers of these that are awake with quiet items, and at none for long.
    pub(super) brief: [SeatSet; DEPTH],
    /// All such workers, those included that may not be given more.
    pub(super) awake: SeatSet,
    /// Workers whose items should be over by now, and are not.
    pub(super) lagging: SeatSet,
    /// Workers that have items behind the one that runs, which others could run.
    pub(super) behind: SeatSet,
    /// The workers of these that have it from calls with many items, and were not asked to give it back.
    pub(super) reclaimable: SeatSet,
    /// Workers whose orders ahead were taken back, so that they become idle.
    pub(super) vacating: SeatSet,
    /// The workers of these whose items are so long that an idle worker should rather have them.
    pub(super) divisible: SeatSet,
    /// Workers that are not known to have begun their first item.
    pub(super) unbegun: SeatSet,
    /// Workers whose results are announced together.
    pub(super) quiet: SeatSet,
    /// Workers at their initializer.
    pub(super) beginning: SeatSet,
    pub(super) serving: SeatSet,
    /// Seats that have a worker, or will.
    pub(super) taken: SeatSet,
    /// Workers that are about to come, or at their initializer.
    pub(super) coming: SeatSet,
}

/// The sets that a seat is in.
#[derive(Clone, Copy, Default, PartialEq)]
struct Class {
    open: Option<usize>,
    /// Others may wait behind its orders: as far as was known when this was made.
    takes_more: bool,
    single: Option<usize>,
    brief: Option<usize>,
    /// In the order in which [`Index::change`] has them.
    flags: [bool; 11],
}

impl Index {
    fn change(&mut self, seat: usize, old: Class, new: Class) {
        let levels = [
            (&mut self.open, old.open, new.open),
            (&mut self.single, old.single, new.single),
            (&mut self.brief, old.brief, new.brief),
        ];
        for (sets, old, new) in levels {
            if old != new {
                old.into_iter().for_each(|orders| sets[orders].set(seat, false));
                new.into_iter().for_each(|orders| sets[orders].set(seat, true));
            }
        }
        if old.flags == new.flags {
            return;
        }
        let sets = [
            &mut self.awake,
            &mut self.lagging,
            &mut self.behind,
            &mut self.reclaimable,
            &mut self.vacating,
            &mut self.divisible,
            &mut self.unbegun,
            &mut self.beginning,
            &mut self.serving,
            &mut self.taken,
            &mut self.coming,
        ];
        for (set, (old, new)) in sets.into_iter().zip(old.flags.into_iter().zip(new.flags)) {
            if old != new {
                set.set(seat, new);
            }
        }
    }
}

#[derive(Default)]
pub(super) struct Seats {
    all: Vec<Seat>,
    /// Seats that may be in the wrong sets.
    touched: SeatSet,
    index: Index,
    /// When seats that are to have a worker may have one.
    vacancies: BTreeSet<(Instant, usize)>,
    /// Checkouts whose worker has changed.
    checkouts: Vec<u64>,
    /// Seats whose lanes are to be looked into, whether they are marked or not.
    suspect: SeatSet,
}

impl Seats {
    /// Returns how many there are, with a worker or without.
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn grow(&mut self, len: usize) {
        self.all.resize_with(self.all.len().max(len), Seat::default);
    }

    /// The sets, as they were when the seats were [updated](Self::update).
    pub(super) fn index(&self) -> &Index {
        debug_assert!(self.touched.is_empty(), "asked before the seats were updated");
        &self.index
    }

    pub(super) fn index_mut(&mut self) -> &mut Index {
        &mut self.index
    }

    pub(super) fn get(&self, seat: usize) -> Option<&Worker> {
        self.all.get(seat)?.worker.as_ref()
    }

    pub(super) fn worker(&mut self, seat: usize) -> Option<&mut Worker> {
        self.touched.insert(seat);
        self.all.get_mut(seat)?.worker.as_mut()
    }

    /// All workers; a walk, for rare events.
    pub(super) fn workers(&self) -> impl Iterator<Item = (usize, &Worker)> {
        self.all.iter().enumerate().filter_map(|(seat, place)| Some((seat, place.worker.as_ref()?)))
    }

    pub(super) fn set_worker(&mut self, seat: usize, worker: Worker) {
        self.touched.insert(seat);
        if let Some(seat) = self.all.get_mut(seat) {
            (seat.worker, seat.is_spawning) = (Some(worker), false);
        }
    }

    pub(super) fn take_worker(&mut self, seat: usize) -> Option<Worker> {
        self.touched.insert(seat);
        let worker = self.all.get_mut(seat)?.worker.take()?;
        self.checkouts.extend((worker.checkout > 0).then_some(worker.checkout));
        Some(worker)
    }

    pub(super) fn is_taken(&self, seat: usize) -> bool {
        self.all.get(seat).is_some_and(|seat| seat.worker.is_some() || seat.vacant.is_some() || seat.is_spawning)
    }

    /// The next worker of `seat` may start then; `None` is never.
    pub(super) fn set_vacant(&mut self, seat: usize, at: Option<Instant>) {
        self.touched.insert(seat);
        let Some(place) = self.all.get_mut(seat) else { return };
        let before = std::mem::replace(&mut place.vacant, at);
        before.into_iter().for_each(|at| _ = self.vacancies.remove(&(at, seat)));
        self.vacancies.extend(at.map(|at| (at, seat)));
    }

    /// No more workers start. Whether one was to, or is being started.
    pub(super) fn fill_vacancies(&mut self) -> bool {
        let vacant: Vec<_> = self.vacancies.iter().map(|(_, seat)| *seat).collect();
        vacant.iter().for_each(|seat| self.set_vacant(*seat, None));
        !vacant.is_empty() || self.all.iter().any(|seat| seat.is_spawning)
    }

    /// A seat that is to have a worker now, which the driver will start.
    pub(super) fn spawn(&mut self, now: Instant, generation: u64) -> Option<Spawn> {
        let seat = self.vacancies.first().filter(|(at, _)| *at <= now)?.1;
        self.set_vacant(seat, None);
        self.all[seat].is_spawning = true;
        Some(Spawn { seat, generation })
    }

    /// When the next one is to have one.
    pub(super) fn next_vacancy(&self) -> Option<Instant> {
        self.vacancies.first().map(|(at, _)| *at)
    }

    /// The seat, whose worker did not come to anything.
    pub(super) fn failed(&mut self, seat: usize) -> Option<u32> {
        self.touched.insert(seat);
        let seat = self.all.get_mut(seat)?;
        seat.is_spawning = false;
        seat.failures += 1;
        Some(seat.failures)
    }

    pub(super) fn forgive(&mut self, seat: usize) {
        self.all.get_mut(seat).into_iter().for_each(|seat| seat.failures = 0);
    }

    /// Puts the seats that were changed into the sets that they belong to.
    pub(super) fn update(&mut self) {
        while let Some(seat) = self.touched.pop_first() {
            self.classify(seat);
        }
    }

    fn classify(&mut self, seat: usize) {
        let Some(place) = self.all.get_mut(seat) else { return };
        let worker = place.worker.as_ref();
        let is_coming = place.vacant.is_some() || place.is_spawning;
        let mut class = Class::default();
        let [awake, lagging, behind, reclaimable, vacating, divisible, unbegun, beginning, serving, taken, coming] =
            &mut class.flags;
        (*taken, *coming) = (is_coming, is_coming);
        if let Some(worker) = worker {
            let orders = worker.orders();
            let (count, is_busy) = (worker.running.len(), !worker.running.is_empty());
            let has_shared_more = orders.has_more && worker.is_shared();
            let is_everybodys = worker.phase == Phase::Serving && worker.checkout == 0;
            class.takes_more = !worker.is_vacating && orders.only_quick;
            *awake = is_everybodys && is_busy && !worker.is_lagging && orders.only_brief;
            *lagging = is_busy && worker.is_lagging;
            *behind = has_shared_more;
            let has_orders = matches!(worker.phase, Phase::Serving | Phase::Leaving);
            *reclaimable =
                orders.has_more && !orders.only_single && worker.checkout == 0 && !worker.is_vacating && has_orders;
            *vacating = is_busy && worker.is_vacating;
            *divisible = has_shared_more && orders.has_long;
            *unbegun = worker.may_not_begin();
            *beginning = worker.is_beginning();
            *serving = worker.phase == Phase::Serving;
            *taken = true;
            *coming |= *beginning;
            if is_everybodys && worker.given < worker.share && worker.full.is_none() && !worker.is_stalled() {
                class.open = Some(count).filter(|count| *count < DEPTH && (*count == 0 || class.takes_more));
            }
            class.single = class.open.filter(|_| orders.only_single);
            class.brief = class.open.filter(|_| *awake);
            if worker.checkout > 0 {
                self.checkouts.push(worker.checkout);
            }
            if worker.lane.is_damaged() {
                self.suspect.insert(seat);
            }
        }
        let old = std::mem::replace(&mut place.class, class);
        if old != class {
            self.index.change(seat, old, class);
        }
    }

    /// Returns `true` if others might wait behind the orders of a worker, when it was looked at last.
    #[cfg(test)]
    pub(super) fn takes_more(&self, seat: usize) -> bool {
        self.all[seat].class.takes_more
    }

    /// Something waits for the worker of a checkout.
    pub(super) fn changed(&mut self, checkout: u64) {
        self.checkouts.push(checkout);
    }

    /// A checkout whose worker has changed since this was asked last.
    pub(super) fn changed_checkout(&mut self) -> Option<u64> {
        self.checkouts.pop()
    }

    pub(super) fn suspect(&mut self, seat: usize) {
        self.suspect.insert(seat);
    }

    pub(super) fn has_suspects(&self) -> bool {
        !self.suspect.is_empty()
    }

    pub(super) fn next_suspect(&mut self) -> Option<usize> {
        self.suspect.pop_first()
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    #[test]
    fn set_of_seats_yields_its_seats_lowest_first() {
        let mut set = SeatSet::default();
        assert_eq!((set.first(), set.len(), set.is_empty()), (None, 0, true));
        for seat in [4095, 64, 0, 63, 64] {
            set.insert(seat);
        }
        set.insert(SLOTS);
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 63, 64, 4095]);
        assert!(set.contains(63) && !set.contains(62) && !set.contains(SLOTS));
        set.set(0, false);
        assert_eq!((set.pop_first(), set.first(), set.len()), (Some(63), Some(64), 2));
        assert_eq!(std::iter::from_fn(|| set.pop_first()).collect::<Vec<_>>(), [64, 4095]);
        assert!(set.is_empty());
    }
}
