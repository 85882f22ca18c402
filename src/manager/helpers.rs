//! Threads that take over: from a leader that was left behind, or a call that is known to be slow.

use super::jobs::Job;
use super::objects::lock;
use super::server::{LOOK, Server};
use crate::process::entry::survive;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// A helper without work ends after this.
const HELPER_IDLE: Duration = Duration::from_secs(10);

pub(super) enum Task {
    Lead(Arc<AtomicU64>),
    Work(Box<Job>),
}

#[derive(Default)]
pub(super) struct Helpers {
    state: Mutex<HelpersState>,
    called: Condvar,
}

#[derive(Default)]
struct HelpersState {
    tasks: VecDeque<Task>,
    threads: usize,
    idle: usize,
}

impl Helpers {
    /// Has a thread do `task`. It comes back if there is none, and none can be started.
    #[must_use]
    pub(super) fn run(&self, server: &Arc<Server>, task: Task) -> Option<Task> {
        let mut state = lock(&self.state);
        state.tasks.push_back(task);
        if state.idle >= state.tasks.len() {
            drop(state);
            self.called.notify_one();
            return None;
        }
        state.threads += 1;
        drop(state);
        let helper = server.clone();
        let spawned = std::thread::Builder::new().name("mp-manager".into()).spawn(move || helper.help());
        let error = spawned.err()?;
        tracing::warn!(%error, "the manager cannot start another thread");
        let mut state = lock(&self.state);
        state.threads -= 1;
        // One of those that are at work takes it when it is done.
        if state.threads > 0 { None } else { state.tasks.pop_back() }
    }
}

impl Server {
    fn help(self: Arc<Self>) {
        while let Some(task) = self.next_task() {
            match task {
                Task::Lead(pulse) => self.lead(&pulse),
                Task::Work(job) => {
                    let entry = job.entry();
                    let start = Instant::now();
                    survive(|| self.work_here(job));
                    self.let_go();
                    if start.elapsed() < LOOK
                        && let Some(entry) = entry
                    {
                        let mut slow = lock(&self.slow);
                        slow.remove(&entry);
                        self.has_slow.store(!slow.is_empty(), Relaxed);
                    }
                }
            }
        }
    }

    fn next_task(&self) -> Option<Task> {
        let mut state = lock(&self.helpers.state);
        loop {
            if let Some(task) = state.tasks.pop_front() {
                return Some(task);
            }
            state.idle += 1;
            let waited = self.helpers.called.wait_timeout(state, HELPER_IDLE);
            let (guard, timeout) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if timeout.timed_out() && state.tasks.is_empty() {
                state.threads -= 1;
                return None;
            }
        }
    }
}
