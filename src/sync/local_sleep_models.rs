//! Tasks of the process that holds a mutex wait for it, unknown to other processes, in every schedule; up to two
//! processes more contend. No task waits for so long that it may reserve the mutex: `models` has that.

use super::mutex::{self, ToWake, Tried, Words};
use crate::shm::atomic::{AtomicU64, Mutex, fence};
use crate::shm::family::Member;
use crate::shm::region::{Plain, explore};
use crate::wait::sleepers::{Place, Sleepers, Wake};
use loom::thread;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

const ME: Member = Member { slot: 0, epoch: 1 };
const OTHERS: [Member; 2] = [Member { slot: 1, epoch: 1 }, Member { slot: 2, epoch: 1 }];

struct Waiting {
    task: usize,
    is_woken: bool,
}

#[derive(Default)]
struct Local {
    tasks: VecDeque<Waiting>,
    place: Option<Place>,
    /// A notification was taken from the list and is not used yet.
    granted: bool,
}

impl Local {
    fn wake_front(&mut self) {
        self.tasks.front_mut().into_iter().for_each(|front| front.is_woken = true);
    }
}

struct World {
    words: Vec<AtomicU64>,
    /// As `wait::local_queue`, without wakers.
    local: Mutex<Local>,
    len: AtomicU64,
    /// The doorbells of the other processes.
    rung: [AtomicU64; 2],
    /// The data that the mutex guards.
    value: Plain<u64>,
}

impl World {
    fn words(&self) -> Words<'_> {
        Words(&self.words)
    }

    fn sleepers(&self) -> Sleepers<'_> {
        Sleepers::new(&self.words[mutex::EVENT..])
    }

    fn has_waiters(&self) -> bool {
        fence(SeqCst);
        self.len.load(SeqCst) != 0
    }

    fn notify(&self, me: Member) {
        let mut is_mine = false;
        self.sleepers().notify_one(
            Some(me.into()),
            |_| true,
            |wake| match wake {
                Wake::Sleeper(sleeper) if sleeper == ME.into() => is_mine = true,
                Wake::Sleeper(sleeper) => {
                    let other = OTHERS.iter().position(|other| sleeper == (*other).into()).expect("one of them");
                    self.rung[other].store(1, SeqCst);
                }
                _ => self.rung.iter().for_each(|rung| rung.store(1, SeqCst)),
            },
        );
        if is_mine {
            let mut local = self.local.lock().unwrap();
            if local.place.is_some_and(|place| self.sleepers().take_notice(place)) {
                (local.place, local.granted) = (None, true);
                local.wake_front();
            }
        }
    }

    fn work(&self, me: Member) {
        self.value.change(|value| *value += 1);
        self.release(me);
    }

    /// As `Mutex::release`.
    fn release(&self, me: Member) {
        let is_awaited = self.words().release(me) | self.sleepers().has_sleepers_after_rmw();
        let is_awaited_here = me == ME && self.has_waiters();
        if is_awaited {
            match self.words().waiters_to_wake(|_| true, || 1) {
                ToWake::Nobody => {}
                ToWake::Longest => self.notify(me),
                other => panic!("{other:?}"),
            }
        }
        if is_awaited_here {
            let mut local = self.local.lock().unwrap();
            if local.place.is_none() {
                local.wake_front();
            }
        }
    }

    fn is_local(&self) -> bool {
        self.words().is_held_alone_by(ME) && !self.sleepers().has_sleepers_after_rmw()
    }

    fn attempt(&self, me: Member, in_line: bool) -> bool {
        matches!(self.words().take(me, in_line.then_some(0), |_| true, || 1), Tried::Taken(_))
    }

    /// True if the task got the mutex and is done; else it sleeps.
    fn start(&self, task: usize) -> bool {
        if !self.has_waiters() && self.words().take_free(ME) {
            self.work(ME);
            return true;
        }
        let mut local = self.local.lock().unwrap();
        local.tasks.push_back(Waiting { task, is_woken: false });
        self.len.store(local.tasks.len() as u64, Release);
        drop(local);
        self.poll(task)
    }

    fn poll(&self, task: usize) -> bool {
        let is_front = |local: &Local| local.tasks.front().is_some_and(|front| front.task == task);
        if !is_front(&self.local.lock().unwrap()) {
            return false;
        }
        let taken = self.try_before_sleep(task);
        if taken {
            self.leave(task, true, || self.is_local());
            self.work(ME);
        }
        taken
    }

    /// As `wait::until` has it.
    fn try_before_sleep(&self, task: usize) -> bool {
        if self.is_local() {
            self.prepare_sleep(task, true);
            let taken = self.attempt(ME, true);
            if taken || self.is_local() {
                return taken;
            }
        }
        self.prepare_sleep(task, false);
        self.attempt(ME, true)
    }

    fn prepare_sleep(&self, task: usize, is_local: bool) {
        let mut local = self.local.lock().unwrap();
        local.tasks.iter_mut().filter(|other| other.task == task).for_each(|me| me.is_woken = false);
        local.granted = false;
        if !is_local && local.place.is_none() {
            local.place = Some(self.sleepers().join(ME.into(), 0, None, |_| true));
        }
        drop(local);
        fence(SeqCst);
    }

    fn leave(&self, task: usize, succeeded: bool, is_local: impl FnOnce() -> bool) {
        let mut local = self.local.lock().unwrap();
        let was_front = local.tasks.front().is_some_and(|front| front.task == task);
        local.tasks.retain(|other| other.task != task);
        self.len.store(local.tasks.len() as u64, Release);
        if !was_front {
            return;
        }
        if !local.tasks.is_empty() {
            if !is_local() {
                local.wake_front();
            }
            return;
        }
        let granted = std::mem::take(&mut local.granted);
        let noticed = local.place.take().is_some_and(|place| self.sleepers().leave(place));
        drop(local);
        if noticed || granted && !succeeded {
            self.notify(ME);
        }
    }

    /// Another process: where it sleeps, if it does.
    fn contend(&self, other: usize) -> Option<Place> {
        if self.words().take_free(OTHERS[other]) {
            self.work(OTHERS[other]);
            return None;
        }
        self.sleep_elsewhere(other)
    }

    fn sleep_elsewhere(&self, other: usize) -> Option<Place> {
        let me = OTHERS[other];
        let place = self.sleepers().join(me.into(), 1, None, |_| true);
        if !self.attempt(me, true) {
            return Some(place);
        }
        if self.sleepers().leave(place) {
            self.notify(me);
        }
        self.work(me);
        None
    }

    /// The doorbell of another process: where it sleeps from then on.
    fn look_elsewhere(&self, other: usize, place: Place) -> Option<Place> {
        if !self.sleepers().take_notice(place) {
            return Some(place);
        }
        if !self.attempt(OTHERS[other], true) {
            return self.sleep_elsewhere(other);
        }
        self.work(OTHERS[other]);
        None
    }
}

/// Tasks, of which those in `cancels` give up if they are not done at once, and other processes.
fn contend(what: &str, preemptions: usize, cancels: &[bool], others: usize) {
    let cancels = cancels.to_vec();
    explore(what, preemptions, move || {
        let words = (0..mutex::LEN).map(|_| AtomicU64::new(0)).collect();
        let (local, len) = (Mutex::new(Local::default()), AtomicU64::new(0));
        let rung = [AtomicU64::new(0), AtomicU64::new(0)];
        let world = Arc::new(World { words, local, len, rung, value: Plain::new(0) });
        let play = |task: usize, cancels: bool| {
            let world = world.clone();
            move || {
                let is_done = world.start(task);
                if !is_done && cancels {
                    world.leave(task, false, || false);
                }
                (is_done, cancels)
            }
        };
        let more: Vec<_> = (1..cancels.len()).map(|task| thread::spawn(play(task, cancels[task]))).collect();
        let elsewhere: Vec<_> = (0..others)
            .map(|other| {
                let world = world.clone();
                thread::spawn(move || world.contend(other))
            })
            .collect();
        let mut ended = vec![play(0, cancels[0])()];
        ended.extend(more.into_iter().map(|task| task.join().unwrap()));
        let mut elsewhere: Vec<_> = elsewhere.into_iter().map(|other| other.join().unwrap()).collect();
        let mut asleep: Vec<_> = (0..ended.len()).filter(|task| ended[*task] == (false, false)).collect();
        let is_woken = |task: usize| {
            world.local.lock().unwrap().tasks.iter().any(|waiting| waiting.task == task && waiting.is_woken)
        };
        loop {
            if let Some(at) = asleep.iter().position(|task| is_woken(*task)) {
                if world.poll(asleep[at]) {
                    asleep.remove(at);
                }
                continue;
            }
            let is_rung = |other: &usize| elsewhere[*other].is_some() && world.rung[*other].swap(0, SeqCst) == 1;
            let Some(other) = (0..others).find(is_rung) else { break };
            elsewhere[other] = elsewhere[other].and_then(|place| world.look_elsewhere(other, place));
        }
        let is_left = !asleep.is_empty() || elsewhere.iter().any(Option::is_some);
        assert!(!is_left, "{asleep:?} and {elsewhere:?} sleep beside a free mutex");
        let gave_up = ended.iter().filter(|ended| **ended == (false, true)).count();
        assert_eq!(world.value.read(), (cancels.len() - gave_up + others) as u64);
        assert!(world.words().take_free(ME), "it is free");
    });
}

#[test]
fn models_tasks_of_the_holders_process_are_woken_by_its_release() {
    contend("two tasks", 3, &[false, false], 0);
    contend("three tasks", 2, &[false, false, false], 0);
    contend("two tasks, one cancels", 3, &[false, true], 0);
    contend("three tasks, two cancel", 2, &[false, true, true], 0);
}

#[test]
fn models_another_process_contends_with_tasks_that_sleep_locally() {
    contend("a task and another process", 3, &[false], 1);
    contend("two tasks and another process", 2, &[false, false], 1);
    contend("two tasks, one cancels, and another process", 2, &[false, true], 1);
    contend("a task that cancels, and two other processes", 2, &[true], 2);
    contend("a task and two other processes", 2, &[false], 2);
}
