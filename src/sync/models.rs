//! The hand-off of a mutex and the notices of a condition in every schedule, by processes that die and cancel.

use super::condition_state::{self, ConditionState, LocalWaiters};
use super::mutex::{self, FAIRNESS_NS, ToWake, Tried, Words};
use crate::os::fault;
use crate::shm::atomic::{AtomicU64, fence};
use crate::shm::family::Member;
use crate::shm::region::{Members, Plain, explore, play};
use crate::wait::sleepers::{Place, Sleeper, Sleepers, Wake};
use loom::thread;
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

/// A doorbell that was rung for one list of sleepers, and one that was rung for all.
const RUNG: u64 = 1;
const FOR_ALL: u64 = 2;

/// Late enough for a waiter that has waited long to become the hand-off waiter; time stands still.
const NOW: u64 = 10 * FAIRNESS_NS;

fn member(slot: u16) -> Member {
    Member { slot, epoch: 1 }
}

fn is_listed(sleeper: Sleeper) -> bool {
    Members.is_listed(member(sleeper.slot))
}

fn zeros(len: usize) -> Vec<AtomicU64> {
    (0..len).map(|_| AtomicU64::new(0)).collect()
}

struct Doorbells(Vec<AtomicU64>);

impl Doorbells {
    fn ring(&self, wake: Wake) {
        match wake {
            Wake::Sleeper(sleeper) => drop(self.0[usize::from(sleeper.slot)].fetch_or(RUNG, AcqRel)),
            Wake::Doorbells(doorbells) => {
                (0..4).filter(|doorbell| doorbells >> doorbell & 1 == 1).for_each(|doorbell| {
                    self.0[doorbell].fetch_or(RUNG, AcqRel);
                })
            }
        }
    }

    /// The effect of recovery after the slot is free.
    fn wake_all(&self) {
        fence(SeqCst);
        for doorbell in &self.0 {
            doorbell.fetch_or(FOR_ALL, AcqRel);
        }
    }

    fn rung(&self, me: u16) -> u64 {
        self.0[usize::from(me)].swap(0, AcqRel)
    }

    fn is_rung(&self, me: u16) -> bool {
        self.0[usize::from(me)].load(Acquire) != 0
    }
}

/// How a process's part ended.
#[derive(Debug)]
enum Part {
    Done,
    Asleep(Place),
    Left,
}

/// A process that waits, as `until` and `local_queue` do it.
trait Waits {
    fn sleepers(&self) -> Sleepers<'_>;
    fn doorbells(&self) -> &Doorbells;
    /// Tries, from the line or ahead of it, and does its work if that succeeds.
    fn attempt(&mut self, in_line: bool) -> bool;
    /// Gives up for good.
    fn give_up(&mut self);
    fn me(&self) -> u16;

    fn pass_on(&self) {
        self.sleepers().notify_one(Some(member(self.me()).into()), is_listed, |wake| self.doorbells().ring(wake));
    }

    fn done(&self, place: Place) -> Part {
        if self.sleepers().leave(place) {
            self.pass_on();
        }
        Part::Done
    }

    fn sleep(&mut self, keeps: Option<u64>) -> Part {
        let me = self.me();
        let place = self.sleepers().join(member(me).into(), me.into(), keeps, is_listed);
        if self.attempt(true) { self.done(place) } else { Part::Asleep(place) }
    }

    fn start(&mut self) -> Part {
        if self.attempt(false) { Part::Done } else { self.sleep(None) }
    }

    fn look(&mut self, mut part: Part) -> Part {
        while let Part::Asleep(place) = part {
            let rung = self.doorbells().rung(self.me());
            if rung == 0 {
                break;
            }
            let ticket = match place {
                Place::Entry { ticket, .. } => Some(ticket),
                Place::Crowd => None,
            };
            part = match self.sleepers().take_notice(place) {
                true if self.attempt(true) => Part::Done,
                true => self.sleep(ticket),
                false if rung & FOR_ALL != 0 && self.attempt(true) => self.done(place),
                false => Part::Asleep(place),
            };
        }
        part
    }

    fn cancel(&mut self, part: Part) -> Part {
        let Part::Asleep(place) = part else { return part };
        if self.sleepers().leave(place) {
            self.pass_on();
        }
        self.give_up();
        Part::Left
    }
}

type Played<W> = Option<(W, Part)>;

fn spawn<W: Waits + 'static>(
    mut waits: W,
    dies_at: Option<&'static str>,
    cancels: bool,
    recover: impl Fn() + 'static,
) -> thread::JoinHandle<Played<W>> {
    thread::spawn(move || {
        let me = waits.me();
        let played = play(me, dies_at, move || {
            let part = waits.start();
            let part = waits.look(part);
            let part = if cancels { waits.cancel(part) } else { part };
            (waits, part)
        });
        if played.is_none() {
            recover();
        }
        played
    })
}

/// Lets every process whose doorbell was rung try, until no doorbell is rung.
fn settle<W: Waits>(mut parts: Vec<(W, Part)>) -> Vec<(W, Part)> {
    while parts.iter().any(|(waits, part)| matches!(part, Part::Asleep(_)) && waits.doorbells().is_rung(waits.me())) {
        parts = parts
            .into_iter()
            .map(|(mut waits, part)| {
                let me = waits.me();
                // The thread that plays here has died elsewhere, perhaps; this one has not.
                let part = play(me, None, || waits.look(part)).expect("nobody dies any more");
                (waits, part)
            })
            .collect();
    }
    parts
}

struct Guarded {
    words: Vec<AtomicU64>,
    doorbells: Doorbells,
    /// The data that the mutex guards.
    value: Plain<u64>,
}

struct Acquirer {
    world: Arc<Guarded>,
    me: u16,
    waited: u64,
    is_handoff: bool,
}

impl Acquirer {
    fn words(&self) -> Words<'_> {
        Words(&self.world.words)
    }

    fn wake(&self, next: ToWake) {
        match next {
            ToWake::Nobody => {}
            ToWake::All => panic!("nobody has damaged it"),
            ToWake::Longest => self.pass_on(),
            ToWake::Handoff(waiter) => {
                self.sleepers().notify_sleeper(waiter.into(), |wake| self.world.doorbells.ring(wake))
            }
        }
    }

    fn work(&mut self) {
        self.world.value.change(|value| *value += 1);
        fault::point("changed");
        let me = member(self.me);
        if self.words().release(me) | self.sleepers().has_sleepers_after_rmw() {
            self.wake(self.words().waiters_to_wake(|other| Members.is_listed(other), || NOW));
        }
        self.give_up();
    }
}

impl Waits for Acquirer {
    fn sleepers(&self) -> Sleepers<'_> {
        Sleepers::new(&self.world.words[mutex::EVENT..])
    }

    fn doorbells(&self) -> &Doorbells {
        &self.world.doorbells
    }

    fn me(&self) -> u16 {
        self.me
    }

    fn attempt(&mut self, in_line: bool) -> bool {
        let me = member(self.me);
        let taken = !in_line && self.words().take_free(me) || {
            let waited = in_line.then_some(self.waited);
            match self.words().take(me, waited, |other| Members.is_listed(other), || NOW) {
                Tried::Taken(_) => true,
                Tried::Damaged => panic!("nobody has damaged it"),
                Tried::Refused { is_handoff } => {
                    self.is_handoff |= is_handoff;
                    false
                }
            }
        };
        if taken {
            self.work();
        }
        taken
    }

    fn give_up(&mut self) {
        if std::mem::take(&mut self.is_handoff) && self.words().give_up_handoff(member(self.me)) {
            self.pass_on();
        }
    }
}

#[derive(Clone, Copy)]
struct Role {
    dies_at: Option<&'static str>,
    cancels: bool,
    is_patient: bool,
}

const LIVES: Role = Role { dies_at: None, cancels: false, is_patient: false };
const PATIENT: Role = Role { is_patient: true, ..LIVES };
const CANCELS: Role = Role { cancels: true, ..PATIENT };

fn dies(at: &'static str) -> Role {
    Role { dies_at: Some(at), ..PATIENT }
}

fn exclusion(what: &str, preemptions: usize, roles: &[Role]) {
    let roles = roles.to_vec();
    explore(what, preemptions, move || {
        let doorbells = Doorbells(zeros(4));
        let world = Arc::new(Guarded { words: zeros(mutex::LEN), doorbells, value: Plain::new(0) });
        let acquirer = |n: usize| {
            let waited = if roles[n].is_patient { FAIRNESS_NS } else { 0 };
            Acquirer { world: world.clone(), me: n as u16, waited, is_handoff: false }
        };
        let playing = |n: usize| {
            let recover = {
                let world = world.clone();
                move || world.doorbells.wake_all()
            };
            spawn(acquirer(n), roles[n].dies_at, roles[n].cancels, recover)
        };
        let others: Vec<_> = (1..roles.len()).map(playing).collect();
        let mut first = acquirer(0);
        let mine = play(0, roles[0].dies_at, || {
            let part = first.start();
            let part = first.look(part);
            if roles[0].cancels { first.cancel(part) } else { part }
        });
        if mine.is_none() {
            world.doorbells.wake_all();
        }
        let mut parts: Vec<_> = mine.map(|part| (first, part)).into_iter().collect();
        parts.extend(others.into_iter().filter_map(|other| other.join().unwrap()));
        let parts = settle(parts);
        let asleep: Vec<_> =
            parts.iter().filter(|(_, part)| matches!(part, Part::Asleep(_))).map(|(acquirer, _)| acquirer.me).collect();
        assert!(asleep.is_empty(), "{asleep:?} asleep, the holder is {:x}", world.words[0].load(Acquire));
        let done = parts.iter().filter(|(_, part)| matches!(part, Part::Done)).count() as u64;
        let dead = (roles.len() - parts.len()) as u64;
        let value = world.value.read();
        assert!((done..=done + dead).contains(&value), "{value} changes by {done} and {dead} dead");
        // A newcomer gets it.
        let mut last = Acquirer { world: world.clone(), me: 3, waited: 0, is_handoff: false };
        assert!(play(3, None, || last.attempt(false)).unwrap());
    });
}

#[test]
fn models_mutex_excludes_and_nobody_sleeps_beside_a_free_one() {
    exclusion("two takers", 4, &[LIVES, LIVES]);
    exclusion("two takers, patient", 4, &[PATIENT, PATIENT]);
    exclusion("three takers", 2, &[LIVES, LIVES, LIVES]);
    exclusion("three takers, patient", 2, &[PATIENT, PATIENT, PATIENT]);
    exclusion("three takers, one patient", 2, &[LIVES, PATIENT, LIVES]);
}

#[test]
fn models_cancelled_taker_takes_nothing_and_loses_no_wake() {
    exclusion("two takers, one cancels", 3, &[PATIENT, CANCELS]);
    exclusion("three takers, one cancels", 2, &[PATIENT, CANCELS, PATIENT]);
    exclusion("three takers, two cancel", 2, &[LIVES, CANCELS, CANCELS]);
}

macro_rules! deaths {
    ($preemptions:expr, $($at:expr),* $(,)?) => {
        $(
            exclusion(concat!($at, ", two"), $preemptions, &[PATIENT, Role { dies_at: Some($at), ..PATIENT }]);
            exclusion(concat!($at, ", three"), 1, &[PATIENT, Role { dies_at: Some($at), ..PATIENT }, PATIENT]);
        )*
    };
}

#[test]
fn models_taker_that_dies_blocks_nobody() {
    deaths!(
        3,
        "lock.taken",
        "changed",
        "lock.released",
        "lock.woken",
        "handoff.named",
        "handoff.marked",
        "handoff.unmarked"
    );
    deaths!(3, "sleep.entered", "sleep.noticed", "notify.marked");
    exclusion("two die", 2, &[PATIENT, dies("lock.taken"), dies("handoff.marked")]);
}

struct Waited {
    words: Vec<AtomicU64>,
    doorbells: Doorbells,
}

impl Waited {
    fn with_state<R>(&self, act: impl FnOnce(&ConditionState<'_, fn(u16) -> Option<u32>, &dyn Fn(Member)>) -> R) -> R {
        let woken = RefCell::new(Vec::new());
        let epoch_of = |slot| Members.is_listed(member(slot)).then_some(1);
        let wake = |member| woken.borrow_mut().push(member);
        let result = act(&ConditionState { words: &self.words, epoch_of, wake: &wake });
        for woken in woken.into_inner() {
            let sleepers = Sleepers::new(&self.words[condition_state::EVENT..condition_state::TABLE]);
            sleepers.notify_sleeper(woken.into(), |wake| self.doorbells.ring(wake));
        }
        result
    }
}

/// One process with one task that waits for a condition; its lock is always free.
struct Waiter {
    world: Arc<Waited>,
    me: u16,
    local: LocalWaiters,
    ticket: u64,
}

impl Waits for Waiter {
    fn sleepers(&self) -> Sleepers<'_> {
        Sleepers::new(&self.world.words[condition_state::EVENT..condition_state::TABLE])
    }

    fn doorbells(&self) -> &Doorbells {
        &self.world.doorbells
    }

    fn me(&self) -> u16 {
        self.me
    }

    fn attempt(&mut self, _in_line: bool) -> bool {
        let me = member(self.me);
        self.world.with_state(|state| state.heal(me));
        let taken = self.world.with_state(|state| self.local.take(state, me, self.ticket));
        if taken {
            self.world.with_state(|state| self.local.finish(state, me));
        }
        taken
    }

    fn give_up(&mut self) {
        self.world.with_state(|state| self.local.leave(state, member(self.me), self.ticket, false));
    }
}

/// The number that a notifier wakes, and the number that wake if no process dies.
#[derive(Clone, Copy)]
enum Notify {
    One,
    All,
}

/// Waiters that all wait when the notifier begins; each may die or cancel. `at_least` of the living are woken, and at
/// most `at_most`.
fn notices(
    what: &str,
    preemptions: usize,
    roles: &[Role],
    notify: &[Notify],
    dies_at: Option<&'static str>,
    (at_least, at_most): (usize, usize),
) {
    let (roles, notify) = (roles.to_vec(), notify.to_vec());
    explore(what, preemptions, move || {
        let world = Arc::new(Waited { words: zeros(condition_state::LEN), doorbells: Doorbells(zeros(4)) });
        let entered: Vec<_> = (0..roles.len() as u16)
            .map(|me| {
                let mut local = LocalWaiters::default();
                let enter = || world.with_state(|state| local.enter(state, member(me))).expect("room");
                let ticket = play(me, None, enter).expect("alive");
                Waiter { world: world.clone(), me, local, ticket }
            })
            .collect();
        // Those that live and stay sleep when the others begin, but for the first.
        let moves = |(waiter, role): &(Waiter, &Role)| waiter.me == 0 || role.cancels || role.dies_at.is_some();
        let (moving, asleep): (Vec<_>, Vec<_>) = entered.into_iter().zip(&roles).partition(moves);
        let start = |(mut waiter, _): (Waiter, _)| {
            let part = play(waiter.me, None, || waiter.start()).expect("it lives");
            (waiter, part)
        };
        let asleep: Vec<_> = asleep.into_iter().map(start).collect();
        let play_role = |(waiter, role): (Waiter, &Role)| {
            let world = world.clone();
            spawn(waiter, role.dies_at, role.cancels, move || world.doorbells.wake_all())
        };
        let playing: Vec<_> = moving.into_iter().map(play_role).collect();
        let notifier = play(3, dies_at, || {
            for notify in &notify {
                world.with_state(|state| match notify {
                    Notify::One => state.notify(1),
                    Notify::All => state.notify_all(Some(member(3))),
                });
            }
        });
        if notifier.is_none() {
            world.doorbells.wake_all();
        }
        let moved = playing.into_iter().filter_map(|part| part.join().unwrap());
        let parts = settle(moved.chain(asleep).collect());
        let done = parts.iter().filter(|(_, part)| matches!(part, Part::Done)).count();
        assert!(
            (at_least..=at_most).contains(&done),
            "{done} woken: {:?}",
            parts.iter().map(|p| &p.1).collect::<Vec<_>>()
        );
        for (waiter, part) in &parts {
            let asleep = matches!(part, Part::Asleep(_));
            let row = world.words[condition_state::TABLE + usize::from(waiter.me)].load(Acquire);
            assert_eq!(row & condition_state::COUNTS, u64::from(asleep), "a row of who sleeps, or of nobody");
        }
    });
}

#[test]
fn models_notify_one_wakes_exactly_one() {
    notices("one waiter, one notice", 4, &[LIVES], &[Notify::One], None, (1, 1));
    notices("two waiters, one notice", 2, &[LIVES, LIVES], &[Notify::One], None, (1, 1));
    notices("two waiters, two notices", 2, &[LIVES, LIVES], &[Notify::One, Notify::One], None, (2, 2));
    notices("two waiters, all", 2, &[LIVES, LIVES], &[Notify::All], None, (2, 2));
}

#[test]
fn models_notice_of_a_cancelled_waiter_is_passed_on() {
    // One that leaves may have been woken first, and then stays.
    notices("one of two cancels", 2, &[CANCELS, LIVES], &[Notify::One], None, (1, 1));
    notices("the other of two cancels", 1, &[LIVES, CANCELS], &[Notify::One], None, (1, 1));
    notices("one of two cancels, two notices", 2, &[CANCELS, LIVES], &[Notify::One, Notify::One], None, (1, 2));
}

#[test]
fn models_notice_of_a_dead_waiter_is_passed_on() {
    static AT: [&str; 4] = ["condition.taken", "sleep.entered", "sleep.noticed", "sleep.unmarked"];
    static DYING: [[Role; 2]; 4] = [
        [Role { dies_at: Some(AT[0]), ..LIVES }, LIVES],
        [Role { dies_at: Some(AT[1]), ..LIVES }, LIVES],
        [Role { dies_at: Some(AT[2]), ..LIVES }, LIVES],
        [Role { dies_at: Some(AT[3]), ..LIVES }, LIVES],
    ];
    for (at, roles) in AT.iter().zip(&DYING) {
        // A process that leaves the list may have used its notification.
        let at_least = usize::from(*at != "sleep.unmarked");
        notices(at, 2, roles, &[Notify::One], None, (at_least, 1));
        notices(&format!("{at}, all"), 2, roles, &[Notify::All], None, (1, 2));
    }
}

#[test]
fn models_notifier_that_dies_loses_no_notice() {
    for at in ["condition.given", "condition.notifying", "notify.marked"] {
        notices(&format!("{at}, all"), 2, &[LIVES, LIVES], &[Notify::All], Some(at), (2, 2));
    }
    for at in ["condition.given", "notify.marked"] {
        notices(at, 2, &[LIVES, LIVES], &[Notify::One], Some(at), (1, 1));
    }
}

/// Two processes die with notices, the second while that of the first is passed on. Those that try then leave it to the
/// recovering process, which has gone by: both notices still wake a waiter.
#[test]
fn models_death_during_a_recovery_is_recovered() {
    explore("two die with notices", 1, || {
        let world = Arc::new(Waited { words: zeros(condition_state::LEN), doorbells: Doorbells(zeros(4)) });
        let enter = |me: u16| {
            let mut local = LocalWaiters::default();
            let enter = || world.with_state(|state| local.enter(state, member(me))).expect("room");
            let ticket = play(me, None, enter).expect("alive");
            Waiter { world: world.clone(), me, local, ticket }
        };
        let [mut first, mut second, mut third, mut fourth] = [0, 1, 2, 3].map(enter);
        let asleep =
            [&mut third, &mut fourth].map(|waiter| play(waiter.me, None, || waiter.start()).expect("it lives"));
        let [healing, looking] = asleep;
        play(3, None, || world.with_state(|state| state.notify(2)));
        assert!(play(0, Some("condition.taken"), || drop(first.start())).is_none(), "the first has a notice");
        world.doorbells.wake_all();
        let dying = {
            let world = world.clone();
            thread::spawn(move || {
                assert!(play(1, Some("condition.taken"), || drop(second.start())).is_none(), "and so has the second");
                world.doorbells.wake_all();
            })
        };
        let healing = thread::spawn(move || {
            let part = play(2, None, || third.look(healing)).expect("it lives");
            (third, part)
        });
        dying.join().unwrap();
        let looking = play(3, None, || fourth.look(looking)).expect("it lives");
        let parts = settle(vec![healing.join().unwrap(), (fourth, looking)]);
        assert!(parts.iter().all(|(_, part)| matches!(part, Part::Done)), "{:?} {:?}", parts[0].1, parts[1].1);
    });
}

#[test]
fn models_recovery_that_dies_is_finished_by_another() {
    static ROLES: [[Role; 2]; 2] = [
        [Role { dies_at: Some("heal.begun"), ..LIVES }, LIVES],
        [Role { dies_at: Some("heal.given"), ..LIVES }, LIVES],
    ];
    for roles in &ROLES {
        notices("healer", 2, roles, &[Notify::All], Some("condition.notifying"), (1, 2));
    }
}
