//! The shared list of sleepers in every schedule: nobody sleeps while there is something for it and no notice under way.

use super::sleepers::{LEN, Place, Sleeper, Sleepers, Wake};
use crate::shm::atomic::{AtomicU64, fence};
use crate::shm::family::Member;
use crate::shm::region::{Members, explore, play};
use loom::thread;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

/// A doorbell that was rung for one list of sleepers, and one that was rung for all.
const RUNG: u64 = 1;
const FOR_ALL: u64 = 2;

struct World {
    words: Vec<AtomicU64>,
    /// The tokens that sleepers wait for: each takes one.
    items: AtomicU64,
    doorbells: Vec<AtomicU64>,
}

/// How a sleeper's part ended.
#[derive(Debug)]
enum Part {
    Got,
    Asleep(Place),
    Left,
}

fn member(slot: u16) -> Member {
    Member { slot, epoch: 1 }
}

fn is_listed(sleeper: Sleeper) -> bool {
    Members.is_listed(member(sleeper.slot))
}

fn ticket(place: Place) -> Option<u64> {
    match place {
        Place::Entry { ticket, .. } => Some(ticket),
        Place::Crowd => None,
    }
}

impl World {
    fn new(items: u64) -> Arc<Self> {
        let zeros = |len| (0..len).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self { words: zeros(LEN), items: AtomicU64::new(items), doorbells: zeros(4) })
    }

    fn sleepers(&self) -> Sleepers<'_> {
        Sleepers::new(&self.words)
    }

    fn take(&self) -> bool {
        let mut seen = self.items.load(Acquire);
        while seen > 0 {
            match self.items.compare_exchange(seen, seen - 1, AcqRel, Acquire) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    fn put(&self, me: u16) {
        let mut seen = self.items.load(Relaxed);
        // By a compare-exchange that orders nothing but the release, as the store of a tail does.
        while let Err(now) = self.items.compare_exchange(seen, seen + 1, Release, Relaxed) {
            seen = now;
        }
        self.notify(me);
    }

    fn notify(&self, me: u16) {
        self.sleepers().notify_one(Some(member(me).into()), is_listed, |wake| self.wake(wake));
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

    /// The effect of recovery after the slot is free.
    fn wake_all(&self) {
        fence(SeqCst);
        for doorbell in &self.doorbells {
            doorbell.fetch_or(FOR_ALL, AcqRel);
        }
    }

    fn try_or_join(&self, me: u16, keeps: Option<u64>) -> Part {
        let place = self.sleepers().join(member(me).into(), me.into(), keeps, is_listed);
        if self.take() { self.got(me, place) } else { Part::Asleep(place) }
    }

    fn got(&self, me: u16, place: Place) -> Part {
        if self.sleepers().leave(place) {
            self.notify(me);
        }
        Part::Got
    }

    fn sleep(&self, me: u16) -> Part {
        if self.take() { Part::Got } else { self.look(me, self.try_or_join(me, None)) }
    }

    /// Runs a sleeper while its doorbell is rung.
    fn look(&self, me: u16, mut part: Part) -> Part {
        while let Part::Asleep(place) = part {
            let rung = self.doorbells[usize::from(me)].swap(0, AcqRel);
            if rung == 0 {
                break;
            }
            part = match self.sleepers().take_notice(place) {
                true if self.take() => Part::Got,
                true => self.try_or_join(me, ticket(place)),
                false if rung & FOR_ALL != 0 && self.take() => self.got(me, place),
                false => Part::Asleep(place),
            };
        }
        part
    }

    fn cancel(&self, me: u16, part: Part) -> Part {
        let Part::Asleep(place) = part else { return part };
        if self.sleepers().leave(place) {
            self.notify(me);
        }
        Part::Left
    }

    /// Lets every process whose doorbell was rung try, and checks that no other doorbell had to be rung.
    fn settle(&self, parts: Vec<(u16, Part)>) {
        let mut parts: Vec<_> = parts.into_iter().map(|(me, part)| (me, self.look(me, part))).collect();
        while parts
            .iter()
            .any(|(me, part)| matches!(part, Part::Asleep(_)) && self.doorbells[usize::from(*me)].load(Acquire) != 0)
        {
            parts = parts.into_iter().map(|(me, part)| (me, self.look(me, part))).collect();
        }
        let sleeps = parts.iter().any(|(_, part)| matches!(part, Part::Asleep(_)));
        assert!(!sleeps || self.items.load(Acquire) == 0, "asleep with an item there: {parts:?}");
    }
}

fn spawn<T: 'static>(
    world: &Arc<World>,
    slot: u16,
    dies_at: Option<&'static str>,
    part: impl FnOnce(&World) -> T + 'static,
) -> thread::JoinHandle<Option<T>> {
    let world = world.clone();
    thread::spawn(move || {
        let played = play(slot, dies_at, || part(&world));
        if played.is_none() {
            world.wake_all();
        }
        played
    })
}

fn sleepers_left(parts: Vec<(u16, thread::JoinHandle<Option<Part>>)>) -> Vec<(u16, Part)> {
    parts.into_iter().filter_map(|(slot, part)| Some((slot, part.join().unwrap()?))).collect()
}

/// Sleepers, each with where it dies and whether it cancels; then putters, each with where it dies.
fn act(sleepers: &[(Option<&'static str>, bool)], putters: &[Option<&'static str>], first: u64) {
    let world = World::new(first);
    let mut parts = Vec::new();
    for (n, &(dies_at, cancels)) in sleepers.iter().enumerate() {
        let me = n as u16;
        let part = move |world: &World| {
            let part = world.sleep(me);
            if cancels { world.cancel(me, part) } else { part }
        };
        parts.push((me, spawn(&world, me, dies_at, part)));
    }
    let mut putters: Vec<_> = putters.iter().enumerate().collect();
    let (n, dies_at) = putters.pop().expect("a putter");
    let mut others = Vec::new();
    for (n, dies_at) in putters {
        let me = (sleepers.len() + n) as u16;
        others.push(spawn(&world, me, *dies_at, move |world| world.put(me)));
    }
    // The last one plays in this thread: a thread less to schedule.
    let me = (sleepers.len() + n) as u16;
    if play(me, *dies_at, || world.put(me)).is_none() {
        world.wake_all();
    }
    for other in others {
        other.join().unwrap();
    }
    world.settle(sleepers_left(parts));
}

const LIVES: (Option<&str>, bool) = (None, false);

#[test]
fn models_one_sleeper_one_notifier() {
    explore("one sleeper, one notifier", 4, || act(&[LIVES], &[None], 0));
}

#[test]
fn models_two_sleepers_two_notifiers() {
    explore("two sleepers, two notifiers", 1, || act(&[LIVES, LIVES], &[None, None], 0));
}

/// A waiter that succeeds at its second attempt, by a change that notified nobody, must not keep the notification for its next wait.
#[test]
fn models_success_passes_a_later_notification_on() {
    explore("two sleepers, two puts", 2, || {
        let world = World::new(0);
        let parts = (0..2).map(|me| (me, spawn(&world, me, None, move |world| world.sleep(me)))).collect();
        play(2, None, || (0..2).for_each(|_| world.put(2)));
        world.settle(sleepers_left(parts));
    });
}

#[test]
fn models_cancelled_sleeper_passes_its_notification_on() {
    explore("cancel, two sleepers", 2, || act(&[(None, true), LIVES], &[None], 0));
}

#[test]
fn models_sleeper_that_dies_blocks_nobody() {
    for at in ["sleep.entered", "sleep.noticed", "sleep.unmarked"] {
        explore(at, 2, move || act(&[(Some(at), false), LIVES], &[None], 0));
    }
}

#[test]
fn models_sleeper_that_dies_asleep_blocks_nobody() {
    explore("dies asleep", 2, || {
        let world = World::new(0);
        let victim = spawn(&world, 0, Some("asleep"), |world| {
            world.try_or_join(0, None);
            crate::os::fault::point("asleep");
        });
        let other = spawn(&world, 1, None, |world| world.sleep(1));
        play(2, None, || world.put(2));
        // The victim may have got what was put, and died with it: then there is another.
        victim.join().unwrap();
        let part = other.join().unwrap().unwrap();
        world.settle(vec![(1, part)]);
    });
}

#[test]
fn models_notifier_that_dies_loses_no_wake() {
    explore("notify.marked", 3, || act(&[LIVES], &[Some("notify.marked")], 0));
    explore("notify.marked, two sleepers", 1, || act(&[LIVES, LIVES], &[Some("notify.marked")], 0));
}

/// With two entries in a model, a third sleeper is in the crowd.
#[test]
fn models_crowd_loses_no_wake() {
    let crowd = |putter: Option<&'static str>, sleeper: Option<&'static str>| {
        move || {
            let world = World::new(0);
            let mut parts: Vec<_> = (0..2).map(|me| (me, world.try_or_join(me, None))).collect();
            let third = spawn(&world, 2, sleeper, |world| world.sleep(2));
            for dies_at in [putter, None, None] {
                if play(3, dies_at, || world.put(3)).is_none() {
                    world.wake_all();
                }
            }
            parts.extend(third.join().unwrap().map(|part| (2, part)));
            world.settle(parts);
        }
    };
    explore("crowd", 2, crowd(None, None));
    explore("crowd, notify.crowd", 2, crowd(Some("notify.crowd"), None));
    explore("crowd, sleep.crowded", 2, crowd(None, Some("sleep.crowded")));
}

/// A dead entry is taken over by any process that needs it, which may die as well.
#[test]
fn models_entries_of_the_dead_are_reused() {
    let takes_over = |dies_at: Option<&'static str>| {
        move || {
            let world = World::new(0);
            for me in 0..2 {
                play(me, Some("sleep.noticed"), || {
                    world.try_or_join(me, None);
                    crate::os::fault::point("sleep.noticed");
                });
            }
            let two = spawn(&world, 2, None, |world| world.sleep(2));
            if play(3, dies_at, || world.put(3)).is_none() {
                world.wake_all();
            }
            let part = two.join().unwrap().unwrap();
            world.settle(vec![(2, part)]);
        }
    };
    explore("two dead entries", 3, takes_over(None));
    explore("two dead entries, recover.entry", 3, takes_over(Some("recover.entry")));
}
