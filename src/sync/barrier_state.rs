//! The shared state of a barrier: the parties that have arrived, and the outcome of each generation.
//!
//! # State
//! `STATE`: `generation:31 | broken:1 | history:32`. History has a bit for each of the last 32 generations: whether it broke.
//! Then a place for each party, in the order of arrival: `generation:31 | acting:1 | slot:12 | epoch:20` of its process.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | the first place that is not of this generation -> mine | an arriving party | AcqRel CAS | - |
//! | the last place -> mine, acting | a party that runs an action first | AcqRel CAS | - |
//! | STATE (g, whole) -> (g + 1, whole), history good | any party that finds the last place taken; if acting, that party | AcqRel CAS | all |
//! | STATE (g, whole) -> (g, broken) | `abort`; a wait that ends early; a party that finds another dead | AcqRel CAS | all |
//! | STATE (g, any) -> (g + 1, whole), history bad | `reset`, if it is broken or a party waits | AcqRel CAS | all |
//!
//! # Invariants
//! 1. Places are taken in order and never left, so those of this generation are a prefix, and each index is given once.
//! 2. The one change of STATE that ends or breaks a generation decides its outcome, for all its parties alike.
//! 3. A party takes a place only if STATE is unchanged after it read the place. So a party that is late for its generation
//!    takes no place of a later one.
//! 4. A waiter that did not run while 32 generations ended gets `BrokenBarrier`, unless none of them broke.
//!
//! # Death
//! | killed | survivors see |
//! |---|---|
//! | before it arrives | a missing party: they wait, or time out |
//! | waiting, in its place | a place of an unlisted member; recovery makes all parties try, and the first breaks the barrier |
//! | in the last place, before STATE | the last place taken: the next party to try ends the generation, well |
//! | acting | as waiting |
//! | after STATE, before the wake | recovery rings every doorbell |
//!
//! # Cancel
//! A wait that is dropped, or times out, breaks its generation, unless that has ended already.

use crate::os::fault;
use crate::shm::atomic::AtomicU64;
use crate::wait::sleepers::Sleeper;
use std::sync::atomic::Ordering::*;

/// The word `STATE`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Round(pub(super) u64);

/// How a generation stands, or ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    Open,
    Passed,
    Broken,
}

const GENERATIONS: u64 = 1 << 31;
const BROKEN: u64 = 1 << 32;

impl Round {
    /// Places begin as 0, which is of another generation.
    pub(super) const FIRST: Self = Self(1 << 33);

    fn generation(self) -> u64 {
        self.0 >> 33
    }

    fn is_broken(self) -> bool {
        self.0 & BROKEN != 0
    }

    fn broken(self) -> Self {
        Self(self.0 | BROKEN)
    }

    fn next(self, ended_badly: bool) -> Self {
        let generation = (self.generation() + 1) % GENERATIONS;
        Self(generation << 33 | (self.0 << 1 | u64::from(ended_badly)) & 0xffff_ffff)
    }

    fn outcome(self, generation: u64) -> Outcome {
        let since = self.generation().wrapping_sub(generation) % GENERATIONS;
        match since {
            0 if self.is_broken() => Outcome::Broken,
            0 => Outcome::Open,
            1..=32 if self.0 >> (since - 1) & 1 == 0 => Outcome::Passed,
            33.. if self.0 & 0xffff_ffff == 0 => Outcome::Passed,
            _ => Outcome::Broken,
        }
    }
}

/// A party's place.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place(u64);

impl Place {
    const ACTING: u64 = 1 << 32;

    fn of(generation: u64, sleeper: Sleeper, acting: bool) -> Self {
        Self(generation << 33 | if acting { Self::ACTING } else { 0 } | sleeper.to_bits())
    }

    fn is_of(self, generation: u64) -> bool {
        self.0 >> 33 == generation
    }

    fn is_acting(self) -> bool {
        self.0 & Self::ACTING != 0
    }

    fn sleeper(self) -> Sleeper {
        Sleeper::from_bits(self.0)
    }
}

/// The outcome of an arrival.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arrival {
    At {
        generation: u64,
        index: usize,
    },
    /// Not the last one, which it wanted to be.
    NotLast,
    /// All have come, and one still acts: the next generation is not open yet.
    Busy,
    Broken,
}

/// The shared words of a barrier, wherever they are.
pub(super) struct BarrierState<'a, L, T> {
    round: &'a AtomicU64,
    places: &'a [AtomicU64],
    is_listed: L,
    /// Wakes all waiters: called after each change of STATE.
    tell: T,
}

impl<'a, L: Fn(Sleeper) -> bool, T: Fn()> BarrierState<'a, L, T> {
    pub(super) fn new(round: &'a AtomicU64, places: &'a [AtomicU64], is_listed: L, tell: T) -> Self {
        Self { round, places, is_listed, tell }
    }

    fn now(&self) -> Round {
        Round(self.round.load(Acquire))
    }

    fn place(&self, index: usize) -> Place {
        Place(self.places[index].load(Acquire))
    }

    /// Returns how many have come in this generation. Those of it are a prefix.
    fn come(&self, generation: u64) -> usize {
        let (mut low, mut high) = (0, self.places.len());
        while low < high {
            let middle = (low + high) / 2;
            if self.place(middle).is_of(generation) { low = middle + 1 } else { high = middle }
        }
        low
    }

    /// Takes the next place. `acting`: if it is the last, the generation stays open until [`BarrierState::end`].
    pub(super) fn arrive(&self, me: Sleeper, only_last: bool, acting: bool) -> Arrival {
        loop {
            let round = self.now();
            let generation = round.generation();
            match self.settle(generation) {
                Outcome::Open => {}
                Outcome::Broken if self.now().is_broken() => return Arrival::Broken,
                // A generation that ended before we came, however it did, was not ours.
                Outcome::Broken | Outcome::Passed => continue,
            }
            let index = self.come(generation);
            let Some(word) = self.places.get(index) else {
                match self.now() == round {
                    true => return Arrival::Busy,
                    false => continue,
                }
            };
            let is_last = index + 1 == self.places.len();
            if only_last && !is_last {
                return Arrival::NotLast;
            }
            let seen = word.load(Acquire);
            if self.now() != round {
                continue; // The place may be one of the next generation.
            }
            let mine = Place::of(generation, me, acting && is_last);
            let is_taken =
                Place(seen).is_of(generation) || word.compare_exchange(seen, mine.0, AcqRel, Acquire).is_err();
            if !is_taken {
                fault::point("barrier.arrived");
                return Arrival::At { generation, index };
            }
        }
    }

    /// How `generation` stands; ends it if all have come, breaks it if one of them is dead.
    pub(super) fn settle(&self, generation: u64) -> Outcome {
        let round = self.now();
        let outcome = round.outcome(generation);
        if outcome != Outcome::Open {
            return outcome;
        }
        let Some(last) = self.places.len().checked_sub(1).map(|last| self.place(last)) else { return Outcome::Broken };
        if last.is_of(generation) && !last.is_acting() {
            return self.end(generation, false);
        }
        let places = (0..self.places.len()).map(|index| self.place(index));
        let mut come = places.take_while(|place| place.is_of(generation));
        if come.any(|place| !(self.is_listed)(place.sleeper())) { self.end(generation, true) } else { Outcome::Open }
    }

    /// Ends `generation`, well or badly, unless it has ended; returns how it did.
    pub(super) fn end(&self, generation: u64, badly: bool) -> Outcome {
        let mut seen = self.now();
        while seen.outcome(generation) == Outcome::Open {
            let next = if badly { seen.broken() } else { seen.next(false) };
            match self.change(seen, next) {
                Ok(()) => seen = next,
                Err(now) => seen = now,
            }
        }
        seen.outcome(generation)
    }

    fn change(&self, seen: Round, next: Round) -> std::result::Result<(), Round> {
        self.round.compare_exchange(seen.0, next.0, AcqRel, Acquire).map_err(Round)?;
        fault::point("barrier.ended");
        (self.tell)();
        Ok(())
    }

    pub(super) fn abort(&self) {
        self.end(self.now().generation(), true);
    }

    /// Repairs it for a new generation, unless it is whole and no party waits.
    pub(super) fn reset(&self) {
        let mut seen = self.now();
        while seen.is_broken() || self.come(seen.generation()) > 0 {
            match self.change(seen, seen.next(true)) {
                Ok(()) => return,
                Err(now) => seen = now,
            }
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        self.settle(self.now().generation()) == Outcome::Broken
    }

    pub(super) fn waiting(&self) -> usize {
        let generation = self.now().generation();
        if self.settle(generation) == Outcome::Open { self.come(generation) } else { 0 }
    }
}
