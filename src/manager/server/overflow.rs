//! Threads that take over: from a leader that was left behind, or a call that is known to be slow.

use super::state::{CHECK_EVERY, Overflow, OverflowState, Server, Task};
use crate::error::Topic;
use crate::os::background;
use crate::os::sync::{lock, unpoisoned};
use crate::process::entry::survive;
use crate::process::trace;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// An overflow thread without work ends after this.
const THREAD_IDLE: Duration = Duration::from_secs(10);

impl Overflow {
    /// Has a thread do `task`. A call comes back if no thread is free and none can be started. A leader then waits for one
    /// of those at work, or for [`try_again`](Self::try_again), and comes back only if there is none at all.
    pub(crate) fn run(&self, server: &Arc<Server>, task: Task) -> Result<(), (Task, io::Error)> {
        let mut state = lock(&self.state);
        if server.faults.of_thread().is_ok() && state.idle > state.tasks.len() {
            state.tasks.push_back(task);
            self.called.notify_one();
            return Ok(());
        }
        let Err(error) = self.start(&mut state, server) else {
            state.tasks.push_back(task);
            return Ok(());
        };
        let mut left = Some(task);
        if matches!(left, Some(Task::Lead(_))) && state.threads > 0 {
            self.is_short.store(true, Relaxed);
            state.tasks.extend(left.take());
        }
        drop(state);
        let help = Topic::ProcessLimit.name();
        tracing::warn!(%error, help, "the manager cannot start another thread");
        left.map_or(Ok(()), |task| Err((task, error)))
    }

    fn start(&self, state: &mut OverflowState, server: &Arc<Server>) -> io::Result<()> {
        server.faults.of_thread()?;
        let runs = server.clone();
        background::spawn(std::thread::Builder::new().name("mp-manager".into()), move || runs.run_tasks())?;
        state.threads += 1;
        Ok(())
    }

    /// Returns `true` if a leader waits for a thread.
    pub(crate) fn is_short(&self) -> bool {
        self.is_short.load(Relaxed)
    }

    /// For a leader that waits: those at work may stay there for ever.
    pub(crate) fn try_again(&self, server: &Arc<Server>) {
        let state = &mut *lock(&self.state);
        if state.tasks.is_empty() || self.start(state, server).is_ok() {
            self.is_short.store(false, Relaxed);
        }
    }
}

impl Server {
    fn run_tasks(self: Arc<Self>) {
        // What methods record is for the process that started the manager.
        let _forwards = trace::on_this_thread();
        while let Some(task) = self.next_task() {
            match task {
                Task::Lead(pulse) => self.lead(&pulse),
                Task::Work(job) => {
                    let entry = job.entry();
                    let start = Instant::now();
                    survive(|| self.work_here(job));
                    self.let_go();
                    if start.elapsed() < CHECK_EVERY
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
        let mut state = lock(&self.overflow.state);
        loop {
            if let Some(task) = state.tasks.pop_front() {
                return Some(task);
            }
            state.idle += 1;
            let waited = self.overflow.called.wait_timeout(state, THREAD_IDLE);
            let timeout;
            (state, timeout) = unpoisoned(waited);
            state.idle -= 1;
            if timeout.timed_out() && state.tasks.is_empty() {
                state.threads -= 1;
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::client::proxy;
    use crate::manager::mock::{in_time, test_manager, until};
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    /// The leader is a thread, too, but waits for what comes by the pipes.
    #[tokio::test]
    async fn call_without_a_thread_runs_on_its_callers_thread() {
        let test_manager = test_manager().await;
        let here = test_manager.here();
        test_manager.server.faults.has_no_threads.store(true, Relaxed);
        let number = in_time(proxy::create(&here, || 4u32, ())).await.unwrap();
        assert_eq!(in_time(number.call(|n: &mut u32| *n, ())).await.unwrap(), 4);
    }

    #[tokio::test]
    async fn thread_left_behind_leads_on_if_there_is_no_other_leader() {
        let test_manager = test_manager().await;
        let number = proxy::create(&test_manager.client, || 4u32, ()).await.unwrap();
        test_manager.server.faults.has_no_threads.store(true, Relaxed);
        let slow = |n: &mut u32| {
            std::thread::sleep(20 * CHECK_EVERY);
            *n
        };
        for _ in 0..3 {
            assert_eq!(in_time(number.call(slow, ())).await.unwrap(), 4);
        }
    }

    /// Set while there is no leader, and read by a call that was left behind.
    static MAY_END: AtomicBool = AtomicBool::new(false);

    #[tokio::test]
    async fn leader_without_a_thread_gets_the_next_one() {
        let test_manager = test_manager().await;
        let stuck = proxy::create(&test_manager.client, || 4u32, ()).await.unwrap();
        let free = proxy::create(&test_manager.client, || 5u32, ()).await.unwrap();
        test_manager.server.faults.has_no_threads.store(true, Relaxed);
        let stay = |n: &mut u32| {
            while !MAY_END.load(SeqCst) {
                std::thread::yield_now();
            }
            *n
        };
        let call = stuck.call(stay, ());
        let others = async {
            until(|| test_manager.server.overflow.is_short()).await;
            test_manager.server.faults.has_no_threads.store(false, Relaxed);
            let answer = tokio::time::timeout(Duration::from_secs(20), free.call(|n: &mut u32| *n, ())).await;
            MAY_END.store(true, SeqCst);
            answer.expect("another leads").unwrap()
        };
        let (stayed, answered) = in_time(async { futures::join!(call, others) }).await;
        assert_eq!((stayed.unwrap(), answered), (4, 5));
    }
}
