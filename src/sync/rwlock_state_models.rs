//! Readers and writers in every schedule, by processes that wait, sleep, give up and die.

use super::holders::Taken;
use super::holders_models::{Doorbells, Part, cancel, look, member, wait, zeros};
use super::rwlock_state::{self, Own, RwLockState};
use crate::os::fault;
use crate::shm::atomic::AtomicU64;
use crate::shm::region::{Members, Plain, explore, play};
use crate::wait::sleepers::{self, Sleepers};
use loom::thread;
use std::cell::Cell;
use std::sync::Arc;

struct Doors {
    words: Vec<AtomicU64>,
    readers: Vec<AtomicU64>,
    writers: Vec<AtomicU64>,
    doorbells: Doorbells,
    /// Of each process.
    own: Vec<Own>,
    /// The data that the lock guards: a writer changes one after the other.
    value: Plain<[u64; 2]>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Does {
    Reads,
    Writes,
}
use Does::*;

/// How far somebody has got when the model begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    Outside,
    Asleep,
    Inside,
}
use At::*;

/// A process that acquires and releases.
#[derive(Clone, Copy, Debug)]
struct Role {
    slot: u16,
    does: Does,
    at: At,
    dies_at: Option<&'static str>,
    gives_up: bool,
}

fn role(slot: u16, does: Does, at: At) -> Role {
    Role { slot, does, at, dies_at: None, gives_up: false }
}

impl Role {
    fn dies(self, at: &'static str) -> Self {
        Self { dies_at: Some(at), ..self }
    }

    fn gives_up(self) -> Self {
        Self { gives_up: true, ..self }
    }
}

/// A role with what it remembers.
struct Actor {
    role: Role,
    since: u64,
    is_counted: Cell<bool>,
    part: Part<Taken>,
}

impl Doors {
    fn new() -> Arc<Self> {
        let words = zeros(rwlock_state::LEN);
        RwLockState::<Members>::fill(&words);
        let own = (0..4).map(|_| Own::default()).collect();
        let (readers, writers, value) = (zeros(sleepers::LEN), zeros(sleepers::LEN), Plain::new([0; 2]));
        Arc::new(Self { words, readers, writers, doorbells: Doorbells::new(), own, value })
    }

    fn state(&self, me: u16) -> RwLockState<'_, Members> {
        RwLockState::new(&self.words, &self.own[usize::from(me)], &Members)
    }

    fn sleepers(&self, does: Does) -> Sleepers<'_> {
        Sleepers::new(if does == Reads { &self.readers } else { &self.writers })
    }

    fn attempt(&self, actor: &Actor) -> Option<Taken> {
        let (slot, me) = (actor.role.slot, member(actor.role.slot));
        match actor.role.does {
            Reads => self.state(slot).take_read(me, actor.since),
            Writes => self.state(slot).take_write(me).or_else(|| {
                if !actor.is_counted.replace(true) {
                    self.state(slot).begin_wait();
                }
                self.state(slot).take_write_or_announce(me)
            }),
        }
    }

    /// As `until` does it.
    fn wait(&self, actor: &mut Actor) {
        let (slot, sleepers) = (actor.role.slot, self.sleepers(actor.role.does));
        actor.since = self.state(slot).phase();
        actor.part = wait(&self.doorbells, slot, sleepers, &|| self.attempt(actor));
        self.wait_no_more_if_got(actor);
    }

    fn look(&self, actor: &mut Actor) {
        let (slot, sleepers) = (actor.role.slot, self.sleepers(actor.role.does));
        let part = std::mem::replace(&mut actor.part, Part::Left);
        actor.part = look(&self.doorbells, slot, sleepers, &|| self.attempt(actor), part);
        self.wait_no_more_if_got(actor);
    }

    fn wait_no_more_if_got(&self, actor: &Actor) {
        if matches!(actor.part, Part::Got(_)) && actor.is_counted.take() {
            let _ = self.state(actor.role.slot).end_wait(member(actor.role.slot));
        }
    }

    fn give_up(&self, actor: &mut Actor) {
        let (slot, sleepers) = (actor.role.slot, self.sleepers(actor.role.does));
        let part = std::mem::replace(&mut actor.part, Part::Left);
        cancel(&self.doorbells, slot, sleepers, part);
        if actor.is_counted.take() && self.state(slot).end_wait(member(slot)) {
            self.doorbells.notify(slot, self.sleepers(Reads), true);
            self.doorbells.notify(slot, self.sleepers(Writes), false);
        }
    }

    /// Does what it has waited for.
    fn work(&self, actor: &mut Actor) {
        let Part::Got(taken) = actor.part else { return };
        actor.part = Part::Left;
        let slot = actor.role.slot;
        let [first, second] = self.value.read();
        assert!(taken.is_poisoned || first == second, "half a write");
        if actor.role.does == Reads {
            fault::point("reading");
            if self.state(slot).give_read(taken.row).unwrap() {
                self.doorbells.notify(slot, self.sleepers(Writes), false);
            }
        } else {
            self.value.change(|value| value[0] = first + 1);
            fault::point("writing");
            self.value.change(|value| value[1] = first + 1);
            self.state(slot).give_write(taken.row);
            fault::point("given");
            self.doorbells.notify(slot, self.sleepers(Reads), true);
            self.doorbells.notify(slot, self.sleepers(Writes), false);
        }
    }

    fn act(&self, mut actor: Actor) -> Option<Actor> {
        let Role { slot, dies_at, gives_up, at, .. } = actor.role;
        let played = play(slot, dies_at, || {
            match at {
                Outside => self.wait(&mut actor),
                Asleep => self.look(&mut actor),
                Inside => {}
            }
            self.work(&mut actor);
            if gives_up {
                self.give_up(&mut actor);
            }
            actor
        });
        if played.is_none() {
            self.doorbells.recover();
        }
        played
    }

    /// Lets each holder release and each process whose doorbell was rung try, until nothing is left to do.
    fn settle(&self, actors: &mut [Actor]) {
        let mut has_moved = true;
        while std::mem::take(&mut has_moved) {
            for actor in actors.iter_mut() {
                let is_due = match actor.part {
                    Part::Got(_) => true,
                    Part::Asleep(_) => self.doorbells.is_rung(actor.role.slot),
                    Part::Left => false,
                };
                if is_due {
                    has_moved = true;
                    play(actor.role.slot, None, || {
                        self.look(actor);
                        self.work(actor);
                    });
                }
            }
        }
    }
}

/// The first begin where they are, and stay there until the others, which play their roles at once, have done so. In the
/// end no process sleeps, and a newcomer may read and write.
fn doors(what: &str, preemptions: usize, stay: &[Role], play_at_once: &[Role]) {
    let (stay, play_at_once) = (stay.to_vec(), play_at_once.to_vec());
    explore(what, preemptions, move || {
        let doors = Doors::new();
        let begin = |role: &Role| {
            let mut actor = Actor { role: *role, since: 0, is_counted: Cell::new(false), part: Part::Left };
            if role.at != Outside {
                play(role.slot, None, || doors.wait(&mut actor));
                assert_eq!(matches!(actor.part, Part::Got(_)), role.at == Inside, "{role:?}");
            }
            actor
        };
        // The holders are inside before others fall asleep.
        let is_inside = |role: &&Role| role.at == Inside;
        let (mut playing, mut staying): (Vec<_>, Vec<_>) = (Vec::new(), Vec::new());
        playing.extend(play_at_once.iter().filter(is_inside).map(begin));
        staying.extend(stay.iter().map(begin));
        playing.extend(play_at_once.iter().filter(|role| !is_inside(role)).map(begin));
        // The last one plays in this thread: a thread less to schedule.
        let last = playing.pop().expect("somebody plays");
        let start = |actor| {
            let doors = doors.clone();
            thread::spawn(move || doors.act(actor))
        };
        let playing: Vec<_> = playing.into_iter().map(start).collect();
        let last = doors.act(last);
        let mut actors: Vec<_> = playing.into_iter().filter_map(|actor| actor.join().unwrap()).chain(last).collect();
        actors.extend(staying);
        doors.settle(&mut actors);
        let asleep: Vec<_> = actors.iter().filter(|actor| matches!(actor.part, Part::Asleep(_))).collect();
        assert!(asleep.is_empty(), "asleep: {:?}", asleep.iter().map(|actor| actor.role).collect::<Vec<_>>());
        let died_writing = play_at_once.iter().any(|role| role.does == Writes && role.dies_at.is_some());
        play(3, None, || {
            let words = doors.state(3);
            let reading = words.take_read(member(3), words.phase()).expect("nobody writes, or wants to");
            assert!(!reading.is_poisoned || died_writing, "nobody died");
            assert!(words.give_read(reading.row).unwrap(), "all other shares are back");
            let writing = words.take_write(member(3)).expect("nobody is there");
            assert_eq!(writing.is_poisoned, reading.is_poisoned);
            words.give_write(writing.row);
            assert!(!words.take_read(member(3), words.phase()).expect("free").is_poisoned, "a writer has come");
        });
    });
}

#[test]
fn models_readers_and_writers_exclude_each_other_and_all_proceed() {
    let (reader, writer) = (role(0, Reads, Outside), role(1, Writes, Outside));
    let (reading, writing) = (role(0, Reads, Inside), role(0, Writes, Inside));
    doors("a reader and a writer", 2, &[], &[reader, writer]);
    doors("two writers", 1, &[], &[role(0, Writes, Outside), writer]);
    doors("a reader leaves a writer", 2, &[], &[reading, writer]);
    doors("a writer leaves a reader", 2, &[], &[writing, role(2, Reads, Outside)]);
    doors("a reader leaves", 2, &[role(1, Writes, Asleep)], &[reading, role(2, Reads, Outside)]);
    doors("a writer leaves", 2, &[role(2, Reads, Asleep)], &[writing, writer]);
    doors("a writer leaves both", 2, &[role(1, Writes, Asleep), role(2, Reads, Asleep)], &[writing]);
}

#[test]
fn models_writer_that_gives_up_releases_the_readers_behind_it() {
    let (reading, writer) = (role(0, Reads, Inside), role(1, Writes, Outside).gives_up());
    let asleep = Role { at: Asleep, ..writer };
    doors("a writer gives up beside a reader", 1, &[reading], &[role(2, Reads, Outside), writer]);
    doors("a writer gives up beside a writer", 1, &[reading], &[role(2, Writes, Outside), writer]);
    doors("a reader leaves a writer that gives up", 1, &[], &[reading, asleep]);
    doors(
        "a reader leaves a reader that gives up",
        1,
        &[role(1, Writes, Asleep)],
        &[reading, role(2, Reads, Outside).gives_up()],
    );
}

/// One announcement stands for all writers of a process. Only the last of them takes it back.
#[test]
fn models_writers_of_one_process_share_one_announcement() {
    explore("two of one process give up", 3, || {
        let doors = Doors::new();
        let reading = play(0, None, || doors.state(0).take_read(member(0), 0)).unwrap().expect("free");
        let wish = |doors: &Doors| {
            let words = doors.state(1);
            words.begin_wait();
            assert!(words.take_write_or_announce(member(1)).is_none(), "a writer beside a reader");
            words.end_wait(member(1))
        };
        let other = {
            let doors = doors.clone();
            thread::spawn(move || play(1, None, || wish(&doors)).unwrap())
        };
        let mine = play(1, None, || wish(&doors)).unwrap();
        assert!(other.join().unwrap() | mine, "somebody tells those who stood back");
        play(3, None, || {
            let words = doors.state(3);
            assert!(words.take_read(member(3), words.phase()).is_some(), "a wish of nobody");
            assert!(!words.give_read(reading.row).unwrap(), "two read");
        });
    });
}

#[test]
fn models_writer_that_dies_blocks_nobody() {
    let (reading, writer) = (role(0, Reads, Inside), role(1, Writes, Outside));
    for at in
        ["write.announced", "holders.counted", "holders.written", "writing", "write.phase", "given", "sleep.entered"]
    {
        doors(&format!("a writer dies, {at}"), 2, &[], &[reading, writer.dies(at)]);
    }
    for at in ["write.announced", "sleep.entered", "write.withdrawn"] {
        let writer = writer.gives_up().dies(at);
        doors(&format!("a writer dies, {at}, beside a reader"), 1, &[reading], &[role(2, Reads, Outside), writer]);
    }
    for at in ["writing", "write.phase", "holders.counted", "given", "notify.marked"] {
        let (writing, asleep) = (role(0, Writes, Inside).dies(at), [role(1, Writes, Asleep), role(2, Reads, Asleep)]);
        doors(&format!("a writer dies, {at}, others asleep"), 2, &asleep, &[writing]);
    }
}

#[test]
fn models_reader_that_dies_blocks_nobody() {
    for at in ["reading", "holders.counted", "holders.written", "notify.marked"] {
        let reading = role(0, Reads, Inside).dies(at);
        doors(&format!("a reader dies, {at}"), 2, &[], &[reading, role(1, Writes, Outside)]);
        doors(
            &format!("a reader dies, {at}, writer asleep"),
            1,
            &[role(1, Writes, Asleep)],
            &[reading, role(2, Reads, Outside)],
        );
    }
}
