//! The cores on heap memory, by threads that play processes, of which some die at any point: what sanitizers watch.
//!
//! The data of each lock is plain memory, so ThreadSanitizer checks whether acquire and release order the accesses.
//! Fences, which it does not understand, order nothing plain here: the wake of a sleeper rests on them, and one that is
//! lost is found by the deadline.

use super::barrier_state::{Arrival, BarrierState, Outcome, Round};
use super::condition_state::{self, ConditionState, LocalWaiters};
use super::double_buffer::{self, DoubleBuffer};
use super::holders::{self, Holders};
use super::mutex::{self, ToWake, Tried, Words};
use crate::os::{clock, fault};
use crate::shm::atomic::{AtomicU64, fence};
use crate::shm::family::Member;
use crate::shm::heap::{Members, Plain};
use crate::shm::robust_lock::{Liveness, RobustLock};
use crate::wait::sleepers::{self, Place, Sleeper, Sleepers, Wake};
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::time::{Duration, Instant};

/// Longer than any of these takes, also under a sanitizer on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);
const PROCESSES: u16 = 4;
const ROUNDS: u32 = if cfg!(debug_assertions) { 5_000 } else { 20_000 };

/// A doorbell that was rung for one list of sleepers, and one that was rung for all.
const RUNG: u64 = 1;
const FOR_ALL: u64 = 2;

fn zeros(len: usize) -> Vec<AtomicU64> {
    (0..len).map(|_| AtomicU64::new(0)).collect()
}

/// The family, and its members that are to wake up.
struct World {
    members: Members,
    doorbells: Vec<AtomicU64>,
    deaths: AtomicU64,
    has_failed: AtomicBool,
}

impl World {
    fn ring(&self, wake: Wake) {
        match wake {
            Wake::Sleeper(sleeper) => drop(self.doorbells[usize::from(sleeper.slot)].fetch_or(RUNG, AcqRel)),
            Wake::Doorbells(doorbells) => (0..PROCESSES).filter(|slot| doorbells >> slot & 1 == 1).for_each(|slot| {
                self.doorbells[usize::from(slot)].fetch_or(RUNG, AcqRel);
            }),
        }
    }

    /// Recovers a slot, as the fork server does; another process then gets it.
    fn recover(&self, slot: u16) {
        self.deaths.fetch_add(1, Relaxed);
        self.members.recover(slot);
        fence(SeqCst);
        for doorbell in &self.doorbells {
            doorbell.fetch_or(FOR_ALL, AcqRel);
        }
        self.members.succeed(slot);
    }
}

/// One life of a process.
struct Process<'a> {
    world: &'a World,
    me: Member,
    is_last: bool,
    random: &'a Cell<u64>,
}

impl Process<'_> {
    /// xorshift: below `end`.
    fn random(&self, end: u64) -> u64 {
        let mut state = self.random.get();
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        self.random.set(state);
        state % end
    }

    fn is_listed(&self) -> impl Fn(Member) -> bool + use<'_> {
        |member| self.world.members.is_listed(member)
    }

    fn is_sleeper_listed(&self) -> impl Fn(Sleeper) -> bool + use<'_> {
        |sleeper| self.world.members.epoch_of(sleeper.slot).is_some_and(|epoch| sleeper.has_epoch(epoch))
    }

    fn notify_one(&self, sleepers: Sleepers<'_>) {
        sleepers.notify_one(Some(self.me.into()), self.is_sleeper_listed(), |wake| self.world.ring(wake));
    }

    fn notify_all(&self, sleepers: Sleepers<'_>) {
        sleepers.notify_all(Some(self.me.into()), self.is_sleeper_listed(), |wake| self.world.ring(wake));
    }

    fn sleep(&self) -> u64 {
        let (doorbell, start) = (&self.world.doorbells[usize::from(self.me.slot)], Instant::now());
        for look in 0.. {
            if doorbell.load(Relaxed) != 0 {
                return doorbell.swap(0, AcqRel);
            }
            assert!(!self.world.has_failed.load(Relaxed), "another process has failed");
            assert!(start.elapsed() < DEADLINE, "{:?} has lost its wake", self.me);
            match look {
                0..20 => std::thread::yield_now(),
                // Others need the CPU more.
                _ => std::thread::sleep(Duration::from_micros(20)),
            }
        }
        unreachable!("it looks for ever")
    }

    /// Waits as `wait::until` and `wait::local_queue` do it. The argument of `attempt`: it is made from the queue.
    fn until<T>(&self, sleepers: Sleepers<'_>, mut attempt: impl FnMut(bool) -> Option<T>) -> T {
        match attempt(false) {
            Some(value) => value,
            None => self.in_line(sleepers, u32::MAX, || attempt(true)).expect("it does not give up"),
        }
    }

    /// Gives up, with `None`, after it has slept `sleeps` times.
    fn in_line<T>(&self, sleepers: Sleepers<'_>, mut sleeps: u32, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
        let mut ticket = None;
        let leave = |place| {
            if sleepers.leave(place) {
                self.notify_one(sleepers);
            }
        };
        loop {
            let place = sleepers.join(self.me.into(), self.me.slot.into(), ticket, self.is_sleeper_listed());
            if let Some(value) = attempt() {
                leave(place);
                return Some(value);
            }
            loop {
                if sleeps == 0 {
                    leave(place);
                    return None;
                }
                sleeps -= 1;
                let rung = self.sleep();
                if sleepers.take_notice(place) {
                    if let Some(value) = attempt() {
                        return Some(value);
                    }
                    ticket = if let Place::Entry { ticket, .. } = place { Some(ticket) } else { None };
                    break;
                }
                if rung & FOR_ALL != 0
                    && let Some(value) = attempt()
                {
                    leave(place);
                    return Some(value);
                }
            }
        }
    }
}

/// Each process plays its `part` so many times. What it keeps from one time to the next, `L`, it loses when it dies.
/// Returns how many have died.
fn play<L: Default>(rounds: u32, are_mortal: bool, part: impl Fn(&Process<'_>, &mut L) + Sync) -> u64 {
    // The state of the fault points is initialised before there are threads: an uninstrumented std hides that they share it.
    fault::point("beginning");
    let (doorbells, deaths, has_failed) = (zeros(PROCESSES.into()), AtomicU64::new(0), AtomicBool::new(false));
    let world = World { members: Members::new(PROCESSES), doorbells, deaths, has_failed };
    let life = |slot: u16| {
        let (mut own, random) = (L::default(), Cell::new(u64::from(slot) + 0x9e37_79b9_7f4a_7c15));
        for round in 1..=rounds {
            let me = world.members.member(slot);
            let process = Process { world: &world, me, is_last: round == rounds, random: &random };
            if are_mortal && process.random(4) == 0 {
                fault::die_after(1 + process.random(10) as u32);
            }
            let played = catch_unwind(AssertUnwindSafe(|| part(&process, &mut own)));
            fault::die_after(0);
            match played {
                Ok(()) => {}
                Err(death) if death.is::<fault::Death>() => {
                    world.recover(slot);
                    own = L::default();
                }
                Err(panic) => {
                    world.has_failed.store(true, Relaxed);
                    resume_unwind(panic);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let life = &life;
        let lives: Vec<_> = (0..PROCESSES).map(|slot| scope.spawn(move || life(slot))).collect();
        // Joined one by one: a sanitizer knows that this orders what they did.
        lives.into_iter().for_each(|life| life.join().unwrap_or_else(|panic| resume_unwind(panic)));
    });
    let deaths = world.deaths.load(Relaxed);
    assert_eq!(deaths > 0, are_mortal, "{deaths} have died");
    deaths
}

/// A clock that runs fast, so that waiters have waited long soon, and hand-off waiters are late.
fn now() -> u64 {
    clock::now_ns() * 100
}

/// A mutex: its words and its waiters.
#[derive(Clone, Copy)]
struct Mutex<'a>(&'a [AtomicU64]);

impl Mutex<'_> {
    fn sleepers(&self) -> Sleepers<'_> {
        Sleepers::new(&self.0[mutex::EVENT..mutex::LEN])
    }

    /// False if it gave up.
    fn lock(&self, process: &Process<'_>, gives_up: bool) -> bool {
        let (words, me, mut since, mut is_handoff) = (Words(self.0), process.me, None, false);
        let mut attempt = |in_line: bool| {
            if !in_line && words.take_free(me) {
                return Some(());
            }
            let now = now();
            let waited = now - *since.get_or_insert(now);
            match words.take(me, in_line.then_some(waited), process.is_listed(), || now) {
                Tried::Taken(_) => Some(()),
                Tried::Damaged => panic!("nobody has damaged it"),
                Tried::Refused { is_handoff: named } => {
                    is_handoff |= named;
                    None
                }
            }
        };
        let sleeps = if gives_up { 1 } else { u32::MAX };
        let taken = attempt(false).or_else(|| process.in_line(self.sleepers(), sleeps, || attempt(true)));
        if is_handoff && words.give_up_handoff(me) {
            process.notify_one(self.sleepers());
        }
        taken.is_some()
    }

    fn unlock(&self, process: &Process<'_>) {
        let (words, sleepers) = (Words(self.0), self.sleepers());
        if words.release(process.me) | sleepers.has_sleepers_after_rmw() {
            match words.waiters_to_wake(process.is_listed(), now) {
                ToWake::Nobody => {}
                ToWake::All => panic!("nobody has damaged it"),
                ToWake::Longest => process.notify_one(sleepers),
                ToWake::Handoff(next) => sleepers.notify_sleeper(next.into(), |wake| process.world.ring(wake)),
            }
        }
    }
}

fn a_mutex_excludes(are_mortal: bool, some_give_up: bool) {
    let (words, value, done) = (zeros(mutex::LEN), Plain::new([0_u64; 2]), AtomicU64::new(0));
    let deaths = play(ROUNDS, are_mortal, |process, ()| {
        let mutex = Mutex(&words);
        if mutex.lock(process, some_give_up && process.random(4) == 0) {
            value.change(|value| value[0] += 1);
            fault::point("changing");
            value.change(|value| value[1] = value[0]);
            mutex.unlock(process);
            done.fetch_add(1, Relaxed);
        }
    });
    let ([changed, _], done) = (value.read(), done.load(Relaxed));
    assert!((done..=done + deaths).contains(&changed), "{changed} changes by {done} and {deaths} dead");
}

#[test]
fn a_mutex_excludes_on_the_heap() {
    a_mutex_excludes(false, false);
    a_mutex_excludes(false, true);
}

#[test]
fn mutex_excludes_on_the_heap_at_any_death() {
    a_mutex_excludes(true, false);
    a_mutex_excludes(true, true);
}

/// So many permits of which each protects a plain counter while there is one; more of them are counted.
fn permits(free: u32, are_mortal: bool) {
    let (words, line, value, done) = (zeros(holders::LEN), zeros(sleepers::LEN), Plain::new(0_u64), AtomicU64::new(0));
    let inside = AtomicU64::new(0);
    Holders::<Members>::fill(&words, free);
    let deaths = play(ROUNDS, are_mortal, |process, mine: &mut Row| {
        let (table, sleepers) = (Holders::new(&words, &process.world.members), Sleepers::new(&line));
        let taken = process.until(sleepers, |_| table.take_one(process.me, &mine.0));
        if free == 1 {
            value.change(|value| *value += 1);
        } else if !are_mortal {
            assert!(inside.fetch_add(1, Relaxed) < u64::from(free), "more inside than permits");
            inside.fetch_sub(1, Relaxed);
        }
        fault::point("held");
        table.give_one(taken.row);
        process.notify_one(sleepers);
        done.fetch_add(1, Relaxed);
    });
    let nobody = Members::new(0);
    assert_eq!(Holders::new(&words, &nobody).free(), free, "all have come back");
    let (changed, done) = (value.read(), done.load(Relaxed));
    assert!(free > 1 || (done..=done + deaths).contains(&changed), "{changed} changes by {done} and {deaths} dead");
}

/// Its own row in the table of holders.
struct Row(AtomicUsize);

impl Default for Row {
    fn default() -> Self {
        Self(AtomicUsize::new(usize::MAX))
    }
}

#[test]
fn permits_pass_from_holder_to_waiter_on_the_heap() {
    permits(1, false);
    permits(3, false);
}

#[test]
fn permits_of_the_dead_come_back_on_the_heap() {
    permits(1, true);
    permits(3, true);
}

fn readers_and_writers(are_mortal: bool) {
    let (words, line, value) = (zeros(holders::LEN), zeros(sleepers::LEN), Plain::new([0_u64; 2]));
    Holders::<Members>::fill(&words, holders::MAX);
    play(ROUNDS, are_mortal, |process, mine: &mut Row| {
        let (table, sleepers) = (Holders::new(&words, &process.world.members), Sleepers::new(&line));
        if process.random(3) == 0 {
            let taken = process.until(sleepers, |_| table.take_all(process.me, &mine.0));
            let [first, second] = value.read();
            assert!(taken.is_poisoned || first == second, "a writer died and nobody says so");
            value.change(|value| value[0] = first + 1);
            fault::point("writing");
            value.change(|value| value[1] = first + 1);
            table.give_all(taken.row);
            process.notify_all(sleepers);
        } else {
            let taken = process.until(sleepers, |_| table.take_one(process.me, &mine.0));
            let [first, second] = value.read();
            assert!(taken.is_poisoned || first == second, "a reader beside a writer, or after a dead one");
            if table.give_one(taken.row) == Some(holders::MAX) {
                process.notify_all(sleepers);
            }
        }
    });
    let nobody = Members::new(0);
    assert_eq!(Holders::new(&words, &nobody).free(), holders::MAX, "all have come back");
}

#[test]
fn readers_and_writers_exclude_each_other_on_the_heap() {
    readers_and_writers(false);
    readers_and_writers(true);
}

/// A mutex with two conditions: a process that finds nothing to do waits at one until a process of the other side notifies it.
struct Store {
    mutex: Vec<AtomicU64>,
    conditions: [Vec<AtomicU64>; 2],
    /// How many have been put, and taken.
    items: Plain<[u32; 2]>,
}

/// The other side takes.
const PUTS: usize = 0;
/// As many may be there; so a notice that is lost brings all to a halt.
const ROOM_FOR: u32 = 2;

impl Store {
    fn sleepers(&self, side: usize) -> Sleepers<'_> {
        Sleepers::new(&self.conditions[side][condition_state::EVENT..condition_state::TABLE])
    }

    fn with_state<R>(
        &self,
        process: &Process<'_>,
        side: usize,
        act: impl FnOnce(&ConditionState<'_, &dyn Fn(u16) -> Option<u32>, &dyn Fn(Member)>) -> R,
    ) -> R {
        let woken = RefCell::new(Vec::new());
        let result = act(&ConditionState {
            words: &self.conditions[side],
            epoch_of: &|slot| process.world.members.epoch_of(slot),
            wake: &|member| woken.borrow_mut().push(member),
        });
        for member in woken.into_inner() {
            self.sleepers(side).notify_sleeper(member.into(), |wake| process.world.ring(wake));
        }
        result
    }

    fn can(&self, side: usize) -> bool {
        let [put, taken] = self.items.read();
        if side == PUTS { put - taken < ROOM_FOR } else { put > taken }
    }

    /// As `Condition::wait`: with the mutex, and without it meanwhile. False if it gave up, and then without it.
    fn wait(&self, process: &Process<'_>, local: &mut LocalWaiters, side: usize, gives_up: bool) -> bool {
        let (me, mutex) = (process.me, Mutex(&self.mutex));
        let ticket = self.with_state(process, side, |state| local.enter(state, me)).expect("there is room");
        mutex.unlock(process);
        let sleeps = if gives_up { 1 } else { u32::MAX };
        let noticed = process.in_line(self.sleepers(side), sleeps, || {
            self.with_state(process, side, |state| state.heal(me));
            self.with_state(process, side, |state| local.take(state, me, ticket)).then_some(())
        });
        if noticed.is_none() {
            self.with_state(process, side, |state| local.leave(state, me, ticket, false));
            return false;
        }
        mutex.lock(process, false);
        self.with_state(process, side, |state| local.finish(state, me));
        true
    }
}

/// Processes with an even slot put, the others take, until all has been put and taken.
fn a_store(are_mortal: bool, some_give_up: bool) {
    let all = 2 * ROUNDS;
    let conditions = [zeros(condition_state::LEN), zeros(condition_state::LEN)];
    let store = Store { mutex: zeros(mutex::LEN), conditions, items: Plain::new([0; 2]) };
    play(4 * all, are_mortal, |process, (local, has_done): &mut (LocalWaiters, bool)| {
        let (side, mutex) = (usize::from(process.me.slot % 2), Mutex(&store.mutex));
        if *has_done {
            return;
        }
        mutex.lock(process, false);
        while !store.can(side) && store.items.read()[side] < all {
            let gives_up = some_give_up && process.random(4) == 0;
            if !store.wait(process, local, side, gives_up) {
                return;
            }
        }
        if store.items.read()[side] < all {
            // Between these two no process dies, so the other side is always notified.
            store.items.change(|items| items[side] += 1);
            store.with_state(process, 1 - side, |state| state.notify(1));
        }
        let is_end = store.items.read()[side] == all;
        if is_end {
            store.with_state(process, side, |state| state.notify_all(Some(process.me)));
        }
        mutex.unlock(process);
        // A process that dies before this has a successor that wakes the others once more.
        *has_done = is_end;
    });
    assert_eq!(store.items.read(), [all; 2]);
}

#[test]
fn notices_of_a_condition_arrive_on_the_heap() {
    a_store(false, false);
    a_store(false, true);
}

#[test]
fn notices_of_the_dead_are_passed_on_on_the_heap() {
    a_store(true, false);
    a_store(true, true);
}

struct Gate {
    round: AtomicU64,
    places: Vec<AtomicU64>,
    line: Vec<AtomicU64>,
}

impl Gate {
    fn new() -> Self {
        Self { round: AtomicU64::new(Round::FIRST.0), places: zeros(PROCESSES.into()), line: zeros(sleepers::LEN) }
    }

    fn state<'a>(&'a self, process: &'a Process<'a>) -> BarrierState<'a, impl Fn(Sleeper) -> bool, impl Fn()> {
        let tell = || process.notify_all(Sleepers::new(&self.line));
        BarrierState::new(&self.round, &self.places, process.is_sleeper_listed(), tell)
    }

    /// Generation, index and outcome; `None` if it was broken before it came.
    fn wait(&self, process: &Process<'_>) -> Option<(u64, usize, Outcome)> {
        let rounds = self.state(process);
        match rounds.arrive(process.me.into(), false, false) {
            Arrival::At { generation, index } => {
                let settled = || Some(rounds.settle(generation)).filter(|outcome| *outcome != Outcome::Open);
                Some((generation, index, process.until(Sleepers::new(&self.line), |_| settled())))
            }
            Arrival::Broken => None,
            other => panic!("{other:?}"),
        }
    }
}

/// All parties see, after they have passed, the writes of each before it arrived.
#[test]
fn barrier_orders_writes_before_it_on_the_heap() {
    let gate = Gate::new();
    let cells: Vec<_> = (0..PROCESSES).map(|_| Plain::new(0_u64)).collect();
    play(ROUNDS, false, |process, round: &mut u64| {
        *round += 1;
        cells[usize::from(process.me.slot)].change(|cell| *cell = *round);
        assert!(matches!(gate.wait(process), Some((_, _, Outcome::Passed))));
        assert!(cells.iter().all(|cell| cell.read() == *round), "somebody has not come, or has gone on");
        assert!(matches!(gate.wait(process), Some((_, _, Outcome::Passed))));
    });
}

/// A generation has one outcome for all its parties, whichever of them die; each index is returned once.
#[test]
fn barrier_ends_alike_for_all_on_the_heap_at_any_death() {
    let gate = Gate::new();
    // More generations than there can be: each round of a process ends one at most, and resets one at most.
    let most = 2 * usize::from(PROCESSES) * ROUNDS as usize + 2;
    let (outcomes, indices, is_over) = (zeros(most), zeros(most), AtomicBool::new(false));
    play(ROUNDS, true, |process, ()| {
        let rounds = gate.state(process);
        // It is left broken, so that no party waits for those that have done all their rounds.
        let leave = || {
            is_over.store(true, SeqCst);
            rounds.abort();
        };
        if process.is_last || is_over.load(SeqCst) {
            return leave();
        }
        let came = gate.wait(process);
        if let Some((generation, index, outcome)) = came {
            let (at, bit) = ((generation - 1) as usize, 1 << index);
            let is = if outcome == Outcome::Passed { 1 } else { 2 };
            // A waiter that has not tried for 32 generations learns only that its own may have been broken.
            if gate.round.load(Acquire) >> 33 <= generation + 32 {
                assert_ne!(outcomes[at].fetch_or(is, AcqRel) | is, 3, "generation {generation} ended in two ways");
            }
            assert_eq!(indices[at].fetch_or(bit, AcqRel) & bit, 0, "index {index} was had twice");
        }
        if came.is_none_or(|(_, _, outcome)| outcome == Outcome::Broken) {
            rounds.reset();
            if is_over.load(SeqCst) {
                leave();
            }
        }
    });
    let counts = [1, 2].map(|is| outcomes.iter().filter(|outcome| outcome.load(Relaxed) == is).count());
    assert!(counts[0] > 0 && counts[1] > 0, "passed and broken: {counts:?}");
}

/// A reader of a value sees the earlier writes of its writer; the value is never torn.
fn double_buffer(are_mortal: bool) {
    let (control, buffers) = (zeros(double_buffer::CONTROL), zeros(double_buffer::buffer_words(32)));
    let register = DoubleBuffer { control: &control, buffers: &buffers };
    let most = u64::from(PROCESSES) * u64::from(ROUNDS) + 1;
    let (book, next) = ((0..most).map(|_| Plain::new(0_u64)).collect::<Vec<_>>(), AtomicU64::new(1));
    play(ROUNDS, are_mortal, |process, ()| {
        let number = next.fetch_add(1, Relaxed);
        book[number as usize].change(|entry| *entry = 3 * number);
        while !register.try_write(&[number.to_ne_bytes(); 4].concat(), process.me, &process.world.members) {
            std::thread::yield_now();
        }
        let mut bytes = [0; 32];
        register.read(&mut bytes);
        let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect::<Vec<_>>();
        assert!(words.iter().all(|word| *word == words[0]), "torn: {words:?}");
        assert_eq!(book[words[0] as usize].read(), 3 * words[0]);
    });
}

#[test]
fn double_buffer_publishes_whole_values_on_the_heap() {
    double_buffer(false);
    double_buffer(true);
}

fn robust_lock_trial(are_mortal: bool) {
    let (word, value, done) = (AtomicU64::new(0), Plain::new(0_u64), AtomicU64::new(0));
    let deaths = play(ROUNDS, are_mortal, |process, ()| {
        while RobustLock(&word).try_take(process.me, &process.world.members).is_none() {
            std::thread::yield_now();
        }
        value.change(|value| *value += 1);
        fault::point("held");
        let _ = RobustLock(&word).release();
        done.fetch_add(1, Relaxed);
    });
    let (changed, done) = (value.read(), done.load(Relaxed));
    assert!((done..=done + deaths).contains(&changed), "{changed} changes by {done} and {deaths} dead");
}

#[test]
fn robust_lock_excludes_on_the_heap() {
    robust_lock_trial(false);
    robust_lock_trial(true);
}
