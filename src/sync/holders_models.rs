//! The table of holders with its waiters, and the generations of a barrier, in every schedule, with processes that die.

use super::barrier_state::{Arrival, BarrierState, Outcome, Round};
use super::holders::{self, Holders, MAX, Taken};
use crate::os::fault;
use crate::shm::atomic::{AtomicU64, fence};
use crate::shm::family::Member;
use crate::shm::region::{Members, explore, play};
use crate::wait::sleepers::{self, Place, Sleeper, Sleepers, Wake};
use loom::thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::*};

const RUNG: u64 = 1;
const FOR_ALL: u64 = 2;

pub(super) fn zeros(len: usize) -> Vec<AtomicU64> {
    (0..len).map(|_| AtomicU64::new(0)).collect()
}

pub(super) fn member(slot: u16) -> Member {
    Member { slot, epoch: 1 }
}

fn is_listed(sleeper: Sleeper) -> bool {
    Members.is_listed(member(sleeper.slot))
}

/// Events and the doorbells of up to four processes.
pub(super) struct Doorbells {
    doorbells: Vec<AtomicU64>,
}

impl Doorbells {
    pub(super) fn new() -> Self {
        Self { doorbells: zeros(4) }
    }

    pub(super) fn is_rung(&self, me: u16) -> bool {
        self.doorbells[usize::from(me)].load(Acquire) != 0
    }

    fn wake(&self, wake: Wake) {
        match wake {
            Wake::Sleeper(sleeper) => drop(self.doorbells[usize::from(sleeper.slot)].fetch_or(RUNG, AcqRel)),
            Wake::Doorbells(doorbells) => {
                (0..4).filter(|doorbell| doorbells >> doorbell & 1 == 1).for_each(|doorbell| {
                    self.doorbells[doorbell].fetch_or(RUNG, AcqRel);
                })
            }
        }
    }

    pub(super) fn notify(&self, me: u16, sleepers: Sleepers<'_>, all: bool) {
        let (me, wake) = (Some(member(me).into()), |wake| self.wake(wake));
        if all { sleepers.notify_all(me, is_listed, wake) } else { sleepers.notify_one(me, is_listed, wake) }
    }

    pub(super) fn recover(&self) {
        fence(SeqCst);
        for doorbell in &self.doorbells {
            doorbell.fetch_or(FOR_ALL, AcqRel);
        }
    }
}

/// A waiter: what it has got, or where it sleeps.
#[derive(Debug)]
pub(super) enum Part<T> {
    Got(T),
    Asleep(Place),
    Left,
}

/// One try, a place, one more try: what `wait::until` does before it sleeps.
pub(super) fn wait<T>(
    doorbells: &Doorbells,
    me: u16,
    sleepers: Sleepers<'_>,
    attempt: &dyn Fn() -> Option<T>,
) -> Part<T> {
    match attempt() {
        Some(got) => Part::Got(got),
        None => join(doorbells, me, sleepers, attempt, None),
    }
}

fn join<T>(
    doorbells: &Doorbells,
    me: u16,
    sleepers: Sleepers<'_>,
    attempt: &dyn Fn() -> Option<T>,
    ticket: Option<u64>,
) -> Part<T> {
    let place = sleepers.join(member(me).into(), me.into(), ticket, is_listed);
    match attempt() {
        Some(got) => {
            if sleepers.leave(place) {
                doorbells.notify(me, sleepers, false);
            }
            Part::Got(got)
        }
        None => Part::Asleep(place),
    }
}

/// Runs a sleeper while its doorbell is rung.
pub(super) fn look<T>(
    doorbells: &Doorbells,
    me: u16,
    sleepers: Sleepers<'_>,
    attempt: &dyn Fn() -> Option<T>,
    mut part: Part<T>,
) -> Part<T> {
    while let Part::Asleep(place) = part {
        let rung = doorbells.doorbells[usize::from(me)].swap(0, AcqRel);
        if rung == 0 {
            break;
        }
        let ticket = match place {
            Place::Entry { ticket, .. } => Some(ticket),
            Place::Crowd => None,
        };
        let noticed = sleepers.take_notice(place);
        part = match (noticed, if noticed || rung & FOR_ALL != 0 { attempt() } else { None }) {
            (_, None) if noticed => join(doorbells, me, sleepers, attempt, ticket),
            (true, Some(got)) => Part::Got(got),
            (false, Some(got)) => {
                if sleepers.leave(place) {
                    doorbells.notify(me, sleepers, false);
                }
                Part::Got(got)
            }
            _ => Part::Asleep(place),
        };
    }
    part
}

pub(super) fn cancel<T>(doorbells: &Doorbells, me: u16, sleepers: Sleepers<'_>, part: Part<T>) -> Part<T> {
    let Part::Asleep(place) = part else { return part };
    if sleepers.leave(place) {
        doorbells.notify(me, sleepers, false);
    }
    Part::Left
}

/// A semaphore, or a read-write lock without courtesy, with its waiters.
struct SemaphoreCore {
    table: Vec<AtomicU64>,
    sleepers: Vec<AtomicU64>,
    doorbells: Doorbells,
}

impl SemaphoreCore {
    fn new(free: u32) -> Arc<Self> {
        let permits = Self { table: zeros(holders::LEN), sleepers: zeros(sleepers::LEN), doorbells: Doorbells::new() };
        Holders::<Members>::fill(&permits.table, free);
        Arc::new(permits)
    }

    fn holders(&self) -> Holders<'_, Members> {
        Holders::new(&self.table, &Members)
    }

    fn sleepers(&self) -> Sleepers<'_> {
        Sleepers::new(&self.sleepers)
    }

    fn take(&self, me: u16) -> Option<Taken> {
        self.holders().take_one(member(me), &AtomicUsize::new(usize::MAX))
    }

    fn take_all(&self, me: u16) -> Option<Taken> {
        self.holders().take_all(member(me), &AtomicUsize::new(usize::MAX))
    }

    fn give(&self, me: u16, taken: Taken) {
        self.holders().give_one(taken.row);
        fault::point("given");
        self.doorbells.notify(me, self.sleepers(), false);
    }

    fn give_all(&self, me: u16, taken: Taken) {
        self.holders().give_all(taken.row);
        fault::point("given");
        self.doorbells.notify(me, self.sleepers(), true);
    }

    fn wait(&self, me: u16) -> Part<Taken> {
        wait(&self.doorbells, me, self.sleepers(), &|| self.take(me))
    }

    fn look(&self, me: u16, part: Part<Taken>) -> Part<Taken> {
        look(&self.doorbells, me, self.sleepers(), &|| self.take(me), part)
    }

    /// Waits, as process `me`, and gives back what it got, or gives up.
    fn wait_or_cancel(&self, me: u16, cancels: bool) -> Part<Taken> {
        let part = || match self.wait(me) {
            Part::Got(taken) => {
                self.give(me, taken);
                Part::Left
            }
            part if cancels => cancel(&self.doorbells, me, self.sleepers(), part),
            part => part,
        };
        play(me, None, part).expect("it lives")
    }

    /// When nobody moves any more: nobody sleeps beside a free permit, and all are there.
    fn end(&self, free: u32, parts: Vec<(u16, Part<Taken>)>) {
        play(3, None, || {
            self.settle(parts);
            assert_eq!(self.holders().free(), free, "permits are lost or made");
            assert_eq!(self.holders().sum(), u64::from(free));
        });
    }

    /// Lets every process whose doorbell was rung try; each gives back what it got.
    fn settle(&self, parts: Vec<(u16, Part<Taken>)>) {
        let mut parts = parts;
        loop {
            let mut moved = false;
            for (me, part) in &mut parts {
                let is_rung = self.doorbells.is_rung(*me);
                *part = match std::mem::replace(part, Part::Left) {
                    Part::Asleep(place) if is_rung => {
                        moved = true;
                        self.look(*me, Part::Asleep(place))
                    }
                    Part::Got(taken) => {
                        moved = true;
                        self.give(*me, taken);
                        Part::Left
                    }
                    other => other,
                };
            }
            if !moved {
                break;
            }
        }
        let sleeps = parts.iter().any(|(_, part)| matches!(part, Part::Asleep(_)));
        assert!(!sleeps || self.holders().free() == 0, "asleep with a permit free: {parts:?}");
    }
}

fn spawn<T: 'static>(
    permits: &Arc<SemaphoreCore>,
    slot: u16,
    dies_at: Option<&'static str>,
    part: impl FnOnce(&SemaphoreCore) -> T + 'static,
) -> thread::JoinHandle<Option<T>> {
    let permits = permits.clone();
    thread::spawn(move || {
        let played = play(slot, dies_at, || part(&permits));
        if played.is_none() {
            permits.doorbells.recover();
        }
        played
    })
}

/// One takes and gives and may die at it; the other waits, and may cancel that.
fn semaphore(what: &str, free: u32, dies_at: Option<&'static str>, cancels: bool) {
    explore(what, 2, move || {
        let permits = SemaphoreCore::new(free);
        let victim = spawn(&permits, 0, dies_at, move |permits| {
            let Some(taken) = permits.take(0) else { return };
            fault::point("held");
            permits.give(0, taken);
        });
        let mine = permits.wait_or_cancel(2, cancels);
        victim.join().unwrap();
        permits.end(free, vec![(2, mine)]);
    });
}

/// As [`semaphore`], but the permit is held and somebody is in line for it when they begin.
fn line(what: &str, dies_at: Option<&'static str>, cancels: bool) {
    explore(what, 2, move || {
        let permits = SemaphoreCore::new(1);
        let held = play(0, None, || permits.take(0)).unwrap().unwrap();
        let first = play(1, None, || permits.wait(1)).unwrap();
        let victim = spawn(&permits, 0, dies_at, move |permits| {
            fault::point("held");
            permits.give(0, held);
        });
        let mine = permits.wait_or_cancel(2, cancels);
        victim.join().unwrap();
        permits.end(1, vec![(1, first), (2, mine)]);
    });
}

#[test]
fn models_permit_passes_from_holder_to_waiter() {
    for (what, cancels) in [("hand to hand", false), ("hand to hand, cancel", true)] {
        semaphore(what, 1, None, cancels);
        line(&format!("{what}, in line"), None, cancels);
    }
    semaphore("two permits", 2, None, false);
}

#[test]
fn models_permit_of_a_dead_holder_comes_back() {
    for at in ["holders.entered", "holders.counted", "holders.written", "held", "given", "notify.marked"] {
        semaphore(at, 1, Some(at), false);
    }
    for at in ["held", "holders.counted", "holders.written", "given", "notify.marked"] {
        line(&format!("{at}, in line"), Some(at), false);
        line(&format!("{at}, in line, cancel"), Some(at), true);
    }
}

/// The second move of a process dies: what it gave.
#[test]
fn models_holder_that_dies_releasing_loses_no_permit() {
    for at in ["holders.counted", "holders.written"] {
        explore(&format!("giving, {at}"), 3, move || {
            let permits = SemaphoreCore::new(1);
            let taken = play(0, None, || permits.take(0)).unwrap().unwrap();
            let victim = spawn(&permits, 0, Some(at), move |permits| permits.give(0, taken));
            let part = play(1, None, || permits.wait(1)).unwrap();
            victim.join().unwrap();
            permits.end(1, vec![(1, part)]);
        });
    }
}

/// Rows of the dead are taken over while others take back what they held.
#[test]
fn models_rows_of_the_dead_are_reused() {
    explore("rows of the dead", 2, || {
        let permits = SemaphoreCore::new(2);
        for victim in 0..2 {
            play(victim, Some("held"), || {
                permits.take(victim);
                fault::point("held");
            });
        }
        let other = spawn(&permits, 2, None, |permits| permits.take(2).is_some());
        let mine = play(3, None, || permits.take(3)).unwrap();
        let theirs = other.join().unwrap().unwrap();
        assert!(mine.is_some() && theirs, "there is one for each");
        play(3, None, || assert_eq!((permits.holders().free(), permits.holders().sum()), (0, 2)));
    });
}

/// A process that only queries takes back what the dead held, while a waiter tries for it.
#[test]
fn models_permit_recovered_by_a_query_reaches_a_waiter() {
    explore("asking", 2, || {
        let permits = SemaphoreCore::new(1);
        let dead = play(0, Some("held"), || {
            permits.take(0);
            fault::point("held");
        });
        assert!(dead.is_none());
        let asking = spawn(&permits, 1, None, |permits| permits.holders().free());
        let part = play(2, None, || permits.wait(2)).unwrap();
        assert!(asking.join().unwrap().unwrap() <= 1);
        permits.doorbells.recover();
        permits.end(1, vec![(2, part)]);
    });
}

/// Releases beyond what is held never make more than the limit.
#[test]
fn models_bounded_table_keeps_its_limit() {
    explore("limit", 2, || {
        let permits = SemaphoreCore::new(1);
        let taken = play(0, None, || permits.take(0)).unwrap().unwrap();
        let giving = spawn(&permits, 0, None, move |permits| permits.give(0, taken));
        let other = spawn(&permits, 1, None, |permits| permits.holders().add_one(2));
        let mine = play(2, None, || permits.holders().add_one(2)).unwrap();
        giving.join().unwrap();
        let theirs = other.join().unwrap().unwrap();
        assert!(mine != theirs, "room for one more");
        play(3, None, || assert_eq!((permits.holders().free(), permits.holders().sum()), (2, 2)));
    });
}

/// A writer that may die while it writes, and a reader, twice: never both inside, and the death is reported until a writer comes.
fn rwlock(what: &str, dies_at: Option<&'static str>) {
    explore(what, 1, move || {
        let lock = SemaphoreCore::new(MAX);
        let writing = Arc::new(AtomicU64::new(0));
        let writer = spawn(&lock, 0, dies_at, {
            let writing = writing.clone();
            move |lock| {
                let taken = lock.take_all(0)?;
                writing.store(1, Relaxed);
                fault::point("held");
                writing.store(0, Relaxed);
                lock.give_all(0, taken);
                Some(())
            }
        });
        let read = move |lock: &SemaphoreCore, me: u16| {
            lock.take(me).map(|taken| {
                assert!(taken.is_poisoned || writing.load(Relaxed) == 0, "a reader beside a writer");
                lock.holders().give_one(taken.row);
                taken.is_poisoned
            })
        };
        let (mine, theirs) = play(2, None, || (read(&lock, 2), read(&lock, 2))).unwrap();
        let wrote = writer.join().unwrap();
        assert!(wrote.is_none() || mine != Some(true) && theirs != Some(true), "nobody died");
        play(3, None, || {
            let reading = lock.take(3).expect("free");
            assert!(
                reading.is_poisoned || mine != Some(true) && theirs != Some(true),
                "forgotten before a writer came"
            );
            assert!(!reading.is_poisoned || wrote.is_none());
            lock.holders().give_one(reading.row);
            let writing = lock.take_all(3).expect("free");
            assert_eq!(writing.is_poisoned, reading.is_poisoned);
            lock.holders().give_all(writing.row);
            assert!(!lock.take(3).expect("free").is_poisoned, "a writer has come");
        });
    });
}

#[test]
fn models_writer_excludes_others_and_its_death_is_reported() {
    rwlock("writer", None);
    for at in ["holders.counted", "held", "holders.written"] {
        rwlock(&format!("writer, {at}"), Some(at));
    }
}

/// A barrier and its waiters.
struct World {
    round: AtomicU64,
    places: Vec<AtomicU64>,
    sleepers: Vec<AtomicU64>,
    doorbells: Doorbells,
    /// The last party has something to do first, and has done it.
    acts: bool,
    has_acted: AtomicU64,
}

impl World {
    fn new(parties: usize, acts: bool) -> Arc<Self> {
        let (round, has_acted) = (AtomicU64::new(Round::FIRST.0), AtomicU64::new(0));
        let (places, sleepers, doorbells) = (zeros(parties), zeros(sleepers::LEN), Doorbells::new());
        Arc::new(Self { round, places, sleepers, doorbells, acts, has_acted })
    }

    fn sleepers(&self) -> Sleepers<'_> {
        Sleepers::new(&self.sleepers)
    }

    fn state(&self, me: u16) -> BarrierState<'_, fn(Sleeper) -> bool, impl Fn() + '_> {
        BarrierState::new(&self.round, &self.places, is_listed as fn(Sleeper) -> bool, move || {
            self.doorbells.notify(me, self.sleepers(), true);
        })
    }

    fn attempt(&self, me: u16, generation: u64) -> Option<Outcome> {
        let outcome = self.state(me).settle(generation);
        let is_early = self.acts && outcome == Outcome::Passed && self.has_acted.load(Relaxed) == 0;
        assert!(!is_early, "passed before the action was done");
        Some(outcome).filter(|outcome| *outcome != Outcome::Open)
    }

    /// Comes and waits; the generation and index with what became of it.
    fn wait(&self, me: u16) -> (u64, usize, Part<Outcome>) {
        match self.state(me).arrive(member(me).into(), false, self.acts) {
            Arrival::At { generation, index } if self.acts && index + 1 == self.places.len() => {
                fault::point("acting");
                self.has_acted.store(1, Relaxed);
                (generation, index, Part::Got(self.state(me).end(generation, false)))
            }
            Arrival::At { generation, index } => {
                let part = wait(&self.doorbells, me, self.sleepers(), &|| self.attempt(me, generation));
                (generation, index, part)
            }
            Arrival::Broken => (0, usize::MAX, Part::Got(Outcome::Broken)),
            other => panic!("{other:?}"),
        }
    }

    fn settle(&self, parts: Vec<(u16, (u64, usize, Part<Outcome>))>) -> Vec<(usize, Outcome)> {
        let outcomes = parts.into_iter().map(|(me, (generation, index, part))| {
            let part =
                play(me, None, || look(&self.doorbells, me, self.sleepers(), &|| self.attempt(me, generation), part));
            match part.unwrap() {
                Part::Got(outcome) => (index, outcome),
                other => panic!("{other:?} though all have come, or somebody is dead"),
            }
        });
        outcomes.collect()
    }
}

fn spawn_at_barrier<T: 'static>(
    barrier: &Arc<World>,
    slot: u16,
    dies_at: Option<&'static str>,
    part: impl FnOnce(&World) -> T + 'static,
) -> thread::JoinHandle<Option<T>> {
    let barrier = barrier.clone();
    thread::spawn(move || {
        let played = play(slot, dies_at, || part(&barrier));
        if played.is_none() {
            barrier.doorbells.recover();
        }
        played
    })
}

/// Two parties, one of which may die, or give up.
fn barrier(what: &str, dies_at: Option<&'static str>, gives_up: bool, acting: bool) {
    explore(what, 2, move || {
        let barrier = World::new(2, acting);
        let other = spawn_at_barrier(&barrier, 0, dies_at, move |barrier| {
            let (generation, index, part) = barrier.wait(0);
            fault::point("asleep");
            if gives_up && matches!(part, Part::Asleep(_)) {
                cancel(&barrier.doorbells, 0, barrier.sleepers(), part);
                return (generation, index, Part::Got(barrier.state(0).end(generation, true)));
            }
            (generation, index, part)
        });
        let mine = play(1, None, || barrier.wait(1)).unwrap();
        let theirs = other.join().unwrap();
        let mut parts = vec![(1, mine)];
        let lives = theirs.is_some();
        parts.extend(theirs.map(|part| (0, part)));
        let mut outcomes = barrier.settle(parts);
        outcomes.sort_by_key(|(index, _)| *index);
        let passed = outcomes.iter().filter(|(_, outcome)| *outcome == Outcome::Passed).count();
        assert!(passed == 0 || passed == outcomes.len(), "all alike: {outcomes:?}");
        if lives && !gives_up {
            assert_eq!(outcomes, [(0, Outcome::Passed), (1, Outcome::Passed)]);
        }
    });
}

#[test]
fn models_both_parties_pass_or_neither() {
    barrier("barrier", None, false, false);
    barrier("barrier, one gives up", None, true, false);
    barrier("barrier, acting", None, false, true);
    for at in ["barrier.arrived", "asleep", "barrier.ended", "notify.marked"] {
        barrier(&format!("barrier, {at}"), Some(at), false, false);
    }
    for at in ["acting", "barrier.ended"] {
        barrier(&format!("barrier, acting, {at}"), Some(at), false, true);
    }
}

/// A waiting party learns how its own generation ended, whatever comes after. A newcomer belongs to the next generation.
#[test]
fn models_reset_ends_one_generation() {
    explore("reset", 2, || {
        let barrier = World::new(2, false);
        let mine = play(1, None, || barrier.wait(1)).unwrap();
        let other = spawn_at_barrier(&barrier, 0, None, |barrier| barrier.wait(0));
        play(2, None, || barrier.state(2).reset());
        let theirs = other.join().unwrap().unwrap();
        assert!(mine.1 < 2 && theirs.1 < 2, "sent away without having come");
        if mine.0 == theirs.0 {
            let outcomes = barrier.settle(vec![(1, mine), (0, theirs)]);
            assert!(outcomes[0].1 == outcomes[1].1, "{outcomes:?}");
            return;
        }
        // One was sent away by the reset; the other waits for the next.
        let (first, second) = if mine.0 < theirs.0 { ((1, mine), (0, theirs)) } else { ((0, theirs), (1, mine)) };
        assert_eq!(barrier.settle(vec![first])[0].1, Outcome::Broken);
        let third = play(3, None, || barrier.wait(3)).unwrap();
        let outcomes = barrier.settle(vec![second, (3, third)]);
        assert!(outcomes.iter().all(|(_, outcome)| *outcome == Outcome::Passed), "{outcomes:?}");
    });
}

/// A party that is late for a generation takes no place from those of the next.
#[test]
fn models_late_party_displaces_nobody() {
    explore("late for a reset", 2, || {
        let barrier = World::new(3, false);
        let arrive = |barrier: &World, me| match barrier.state(me).arrive(member(me).into(), false, false) {
            Arrival::At { generation, .. } => generation,
            other => panic!("{other:?}"),
        };
        let first = play(0, None, || arrive(&barrier, 0)).unwrap();
        let late = spawn_at_barrier(&barrier, 1, None, move |barrier| arrive(barrier, 1));
        play(2, None, || barrier.state(2).reset());
        let next = play(2, None, || arrive(&barrier, 2)).unwrap();
        assert_eq!(play(3, None, || arrive(&barrier, 3)).unwrap(), next);
        let late = late.join().unwrap().unwrap();
        play(3, None, || {
            let outcome = if late == next { Outcome::Passed } else { Outcome::Open };
            assert_eq!(
                barrier.state(3).settle(next),
                outcome,
                "two have come, and one that was late for {first} or not"
            );
            assert_eq!(barrier.state(3).waiting(), if late == next { 0 } else { 2 });
        });
    });
}
