//! Tasks of one process that hand a mutex over, and give up, in every schedule.

use super::hand_over::{HandOver, LocalQueue};
use super::mutex::{self, Tried, Words};
use crate::shm::atomic::{AtomicU64, Mutex, fence};
use crate::shm::family::Member;
use crate::shm::region::{Plain, explore};
use loom::thread;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

const ME: Member = Member { slot: 0, epoch: 1 };

struct Waiting {
    task: usize,
    is_woken: bool,
}

/// As `wait::local_queue`, without wakers.
struct Queue {
    tasks: Mutex<VecDeque<Waiting>>,
    len: AtomicU64,
}

impl Queue {
    fn join(&self, task: usize) {
        let mut tasks = self.tasks.lock().unwrap();
        tasks.push_back(Waiting { task, is_woken: false });
        self.len.store(tasks.len() as u64, SeqCst);
    }

    fn is_front(&self, task: usize) -> bool {
        self.tasks.lock().unwrap().front().is_some_and(|front| front.task == task)
    }

    fn prepare_local_sleep(&self, task: usize) {
        self.tasks.lock().unwrap().iter_mut().filter(|other| other.task == task).for_each(|me| me.is_woken = false);
        fence(SeqCst);
    }

    fn leave(&self, task: usize, is_local: bool) {
        let mut tasks = self.tasks.lock().unwrap();
        let was_front = tasks.front().is_some_and(|front| front.task == task);
        tasks.retain(|other| other.task != task);
        self.len.store(tasks.len() as u64, SeqCst);
        if was_front && !is_local {
            tasks.front_mut().into_iter().for_each(|next| next.is_woken = true);
        }
    }

    fn is_woken(&self, task: usize) -> bool {
        self.tasks.lock().unwrap().iter().any(|other| other.task == task && other.is_woken)
    }
}

impl LocalQueue for Queue {
    fn has_waiters(&self) -> bool {
        #[cfg(multiprocess_loom)]
        fence(SeqCst);
        self.len.load(SeqCst) != 0
    }

    fn wake_front(&self) {
        self.tasks.lock().unwrap().front_mut().into_iter().for_each(|front| front.is_woken = true);
    }
}

struct World {
    words: Vec<AtomicU64>,
    hand_over: HandOver,
    queue: Queue,
    /// What the mutex guards.
    value: Plain<u64>,
}

impl World {
    fn words(&self) -> Words<'_> {
        Words(&self.words)
    }

    fn work(&self) {
        self.value.change(|value| *value += 1);
        self.release();
    }

    /// As `Mutex::release`.
    fn release(&self) {
        if self.queue.has_waiters() && self.words().is_held_alone_by(ME) && self.hand_over.give(&self.queue) {
            return;
        }
        let _ = self.words().release(ME);
        if self.queue.has_waiters() {
            self.queue.wake_front();
        }
    }

    fn attempt_in_line(&self) -> bool {
        self.hand_over.take() || matches!(self.words().take(ME, Some(0), |_| true, || 1), Tried::Taken(_))
    }

    /// True if the task got the mutex and is done; else it sleeps.
    fn start(&self, task: usize) -> bool {
        if !self.queue.has_waiters() && self.words().take_free(ME) {
            self.work();
            return true;
        }
        self.queue.join(task);
        self.poll(task)
    }

    fn poll(&self, task: usize) -> bool {
        if !self.queue.is_front(task) {
            return false;
        }
        self.queue.prepare_local_sleep(task);
        let taken = self.attempt_in_line() || !self.words().is_held_alone_by(ME) && self.attempt_in_line();
        if taken {
            self.queue.leave(task, self.words().is_held_alone_by(ME));
            self.work();
        }
        taken
    }

    fn cancel(&self, task: usize) {
        self.queue.leave(task, false);
        if self.hand_over.take_abandoned(&self.queue) {
            self.release();
        }
    }
}

/// Tasks, of which those in `cancels` give up if they are not done at once.
fn hand_over(what: &str, preemptions: usize, cancels: &[bool]) {
    let cancels = cancels.to_vec();
    explore(what, preemptions, move || {
        let words = (0..mutex::LEN).map(|_| AtomicU64::new(0)).collect();
        let queue = Queue { tasks: Mutex::new(VecDeque::new()), len: AtomicU64::new(0) };
        let world = Arc::new(World { words, hand_over: HandOver::new(), queue, value: Plain::new(0) });
        let play = |task: usize, cancels: bool| {
            let world = world.clone();
            move || {
                let is_done = world.start(task);
                if !is_done && cancels {
                    world.cancel(task);
                }
                (is_done, cancels)
            }
        };
        let others: Vec<_> = (1..cancels.len()).map(|task| thread::spawn(play(task, cancels[task]))).collect();
        let mut ended = vec![play(0, cancels[0])()];
        ended.extend(others.into_iter().map(|other| other.join().unwrap()));
        let mut done = ended.iter().filter(|(is_done, _)| *is_done).count() as u64;
        let mut asleep: Vec<_> = (0..ended.len()).filter(|task| ended[*task] == (false, false)).collect();
        while let Some(at) = asleep.iter().position(|task| world.queue.is_woken(*task)) {
            let task = asleep[at];
            if world.poll(task) {
                asleep.remove(at);
                done += 1;
            }
        }
        assert!(asleep.is_empty(), "{asleep:?} sleep beside a mutex that nobody holds");
        assert_eq!(world.value.read(), done);
        assert!(world.words().take_free(ME), "it is free");
    });
}

#[test]
fn models_mutex_is_handed_over_and_nobody_sleeps_beside_it() {
    hand_over("two tasks", 3, &[false, false]);
    hand_over("three tasks", 2, &[false, false, false]);
}

#[test]
fn models_what_was_handed_to_a_dropped_waiter_is_released_or_passed_on() {
    hand_over("two tasks, one cancels", 3, &[false, true]);
    hand_over("three tasks, one cancels", 2, &[false, true, false]);
    hand_over("three tasks, two cancel", 2, &[false, true, true]);
}
