//! One task per worker: hands it batches, settles their items, replaces it when it is gone.
//!
//! No user code runs here and nothing is decoded. Each item is settled once: by its report, or by what happened
//! to its worker.

use super::group::{Group, Job};
use super::protocol::{Batch, Report, Task};
use super::worker;
use crate::channel::{self, Receiver, Sender};
use crate::error::{Error, ErrorKind, Result};
use crate::process::{Process, StartMethod};
use crate::wire::Parcel;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

/// Workers that end this soon, so often in a row, without having done anything, are a crash loop.
const CRASH_LOOP: u32 = 5;
const BACK_OFF: Duration = Duration::from_millis(20);
/// What runs when its call is cancelled may finish within this; then its worker need not be killed.
const GRACE: Duration = Duration::from_millis(10);

/// What all dispatchers of a pool share.
pub(super) struct Shared {
    pub(super) settings: Settings,
    state: Mutex<State>,
    work: Notify,
    pub(super) terminated: CancellationToken,
    /// Dispatchers that still run.
    pub(super) running: watch::Sender<usize>,
}

pub(super) struct Settings {
    pub(super) workers: usize,
    pub(super) start_method: StartMethod,
    pub(super) initializer: Option<Task>,
    /// What the initializer's report says.
    pub(super) read_initialized: fn(Parcel) -> Result<()>,
    pub(super) max_tasks_per_worker: Option<usize>,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Arc<Group>>,
    /// Calls that may still add items.
    open: usize,
    is_closed: bool,
    broken: Option<String>,
}

enum Next {
    Batch(Arc<Group>, Vec<Job>),
    Closed,
}

impl Shared {
    pub(super) fn new(settings: Settings) -> Arc<Self> {
        let running = watch::Sender::new(settings.workers);
        let (state, work, terminated) = (Mutex::default(), Notify::new(), CancellationToken::new());
        Arc::new(Self { settings, state, work, terminated, running })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call begins to add items.
    pub(super) fn open(&self) -> Result<()> {
        let mut state = self.state();
        if state.is_closed {
            return Err(Error::closed("pool"));
        }
        if let Some(why) = &state.broken {
            return Err(broken(why));
        }
        state.open += 1;
        Ok(())
    }

    /// A call adds no more.
    pub(super) fn finish(&self) {
        let mut state = self.state();
        state.open -= 1;
        if state.is_closed && state.open == 0 {
            self.work.notify_waiters();
        }
    }

    pub(super) fn close(&self) {
        self.state().is_closed = true;
        self.work.notify_waiters();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state().is_closed
    }

    pub(super) fn terminate(&self) {
        self.close();
        self.terminated.cancel();
        let queue = std::mem::take(&mut self.state().queue);
        queue.iter().for_each(|group| group.fail_pending(terminated));
    }

    pub(super) fn submit(&self, group: &Arc<Group>, job: Job) {
        if group.add(job) {
            self.list(group.clone());
        }
    }

    fn list(&self, group: Arc<Group>) {
        let mut state = self.state();
        if self.terminated.is_cancelled() {
            drop(state);
            return group.fail_pending(terminated);
        }
        if let Some(why) = state.broken.clone() {
            drop(state);
            return group.fail_pending(|| broken(&why));
        }
        state.queue.push_back(group);
        drop(state);
        self.work.notify_one();
    }

    fn take_back(&self, group: &Arc<Group>, jobs: impl DoubleEndedIterator<Item = Job>) {
        if group.put_back(jobs) {
            self.list(group.clone());
        }
    }

    /// No worker can be had: everybody is told why.
    fn break_down(&self, why: &Error) {
        let queue = {
            let mut state = self.state();
            state.broken = Some(why.to_string());
            std::mem::take(&mut state.queue)
        };
        queue.iter().for_each(|group| group.fail_pending(|| broken(&why.to_string())));
    }

    async fn next(&self, at_most: usize) -> Next {
        loop {
            let mut notified = std::pin::pin!(self.work.notified());
            notified.as_mut().enable();
            {
                let mut state = self.state();
                while let Some(group) = state.queue.pop_front() {
                    let (jobs, has_more) = group.take(at_most);
                    if has_more {
                        state.queue.push_back(group.clone());
                    }
                    if !jobs.is_empty() {
                        if !state.queue.is_empty() {
                            self.work.notify_one();
                        }
                        return Next::Batch(group, jobs);
                    }
                }
                if state.is_closed && state.open == 0 {
                    return Next::Closed;
                }
            }
            notified.await;
        }
    }
}

fn terminated() -> Error {
    Error::new(ErrorKind::Cancelled, "the pool was terminated before this item was done")
}

fn broken(why: &str) -> Error {
    Error::other(format!("the pool has no working worker: {why}"))
}

/// Keeps one worker running until the pool ends.
pub(super) async fn dispatch(shared: Arc<Shared>, number: usize) {
    let mut failures = 0;
    loop {
        let end = match Worker::start(&shared, number) {
            Ok(worker) => worker.serve(&shared).await,
            Err(error) => End::Failed(error),
        };
        match end {
            End::Finished => break,
            End::Gone => failures = 0,
            End::Failed(error) => {
                failures += 1;
                if failures >= CRASH_LOOP || error.kind() == ErrorKind::NotInitialized {
                    shared.break_down(&error);
                    break;
                }
                tokio::time::sleep(BACK_OFF * failures).await;
            }
            End::Broken(error) => {
                shared.break_down(&error);
                break;
            }
        }
    }
    shared.running.send_modify(|running| *running -= 1);
}

/// How a worker's time ended.
enum End {
    /// The pool is closed or terminated.
    Finished,
    /// It is to be replaced: recycled, killed or dead.
    Gone,
    /// It died without having done anything.
    Failed(Error),
    /// Its initializer failed: the next one's would too.
    Broken(Error),
}

struct Worker {
    process: Process<Result<()>>,
    batches: Sender<Batch>,
    reports: Receiver<Report>,
    name: String,
    tasks: usize,
}

/// How one item ended.
enum Ended {
    Reported(Report),
    /// Its report came and could not be read: too many descriptors for this process, say. The worker is fine.
    Unreadable(Error),
    Overran,
    Cancelled,
    Terminated,
    Died,
}

impl Ended {
    fn of(report: Result<Report>) -> Self {
        match report {
            Ok(report) => Self::Reported(report),
            Err(error) if error.kind() == ErrorKind::Closed => Self::Died,
            Err(error) => Self::Unreadable(error),
        }
    }
}

impl Worker {
    fn start(shared: &Shared, number: usize) -> Result<Self> {
        let (batches, worker_batches) = channel::simplex()?;
        let (worker_reports, reports) = channel::simplex()?;
        let name = format!("PoolWorker-{}", number + 1);
        let builder = Process::<()>::builder().name(&name).daemon(true).start_method(shared.settings.start_method);
        let process =
            builder.spawn(worker::work, (worker_batches, worker_reports, shared.settings.initializer.clone()))?;
        let name = format!("{name} (pid {})", process.pid());
        Ok(Self { process, batches, reports, name, tasks: 0 })
    }

    async fn serve(mut self, shared: &Arc<Shared>) -> End {
        if shared.settings.initializer.is_some() {
            let initialized = tokio::select! {
                report = self.reports.recv() => report,
                () = shared.terminated.cancelled() => return self.stop().await,
            };
            match initialized {
                Ok(report) => {
                    if let Err(error) = report.open().and_then(shared.settings.read_initialized) {
                        return End::Broken(Error::other(format!("the initializer of {} failed: {error}", self.name)));
                    }
                }
                Err(_) => {
                    let _ = self.process.kill();
                    return End::Failed(self.death("its initializer").await);
                }
            }
        }
        loop {
            let quota = shared.settings.max_tasks_per_worker.map_or(usize::MAX, |max| max - self.tasks);
            if quota == 0 {
                drop(self.batches);
                let _ = self.process.wait().await;
                return End::Gone;
            }
            let next = tokio::select! {
                biased;
                () = shared.terminated.cancelled() => return self.stop().await,
                next = shared.next(quota) => next,
                // Nothing was asked, so whatever this is, the worker is of no use any more.
                _ = self.reports.recv() => {
                    let _ = self.process.kill();
                    let died = self.death("nothing").await;
                    return if self.tasks == 0 { End::Failed(died) } else { End::Gone };
                }
            };
            match next {
                Next::Batch(group, jobs) => {
                    if let Some(end) = self.run(shared, group, jobs).await {
                        return end;
                    }
                }
                Next::Closed => {
                    drop(self.batches);
                    let _ = self.process.wait().await;
                    return End::Finished;
                }
            }
        }
    }

    /// Runs one batch; `Some` if the worker is gone afterwards.
    async fn run(&mut self, shared: &Arc<Shared>, group: Arc<Group>, jobs: Vec<Job>) -> Option<End> {
        let items = jobs.iter().map(|job| job.arguments.clone()).collect();
        let started = Instant::now();
        let count = jobs.len();
        let mut jobs = jobs.into_iter();
        if let Err(error) = self.batches.send(Batch { call: group.call, items }).await {
            if error.kind() != ErrorKind::Closed {
                let error = Error::from(error);
                jobs.for_each(|job| group.settle(job.index, Err(Error::new(error.kind(), error.to_string()))));
                return None;
            }
            // It died before it had them: they go to somebody else and nobody need know.
            shared.take_back(&group, jobs);
            let died = self.death("nothing").await;
            return Some(if self.tasks == 0 { End::Failed(died) } else { End::Gone });
        }
        while let Some(mut job) = jobs.next() {
            let ended = self.item(shared, &group).await;
            let ended = match ended {
                Ended::Reported(report) => {
                    self.tasks += 1;
                    group.settle(job.index, Ok(report));
                    continue;
                }
                Ended::Unreadable(error) => {
                    self.tasks += 1;
                    group.settle(job.index, Err(error));
                    continue;
                }
                ended => ended,
            };
            // The worker is not to be used again; what it had not begun goes to others.
            let error = match ended {
                Ended::Died => self.death(group.label).await,
                Ended::Overran => group.timed_out(&self.name),
                Ended::Terminated => terminated(),
                _ => group.was_cancelled(),
            };
            let _ = self.process.kill();
            let may_retry = matches!(error.kind(), ErrorKind::ProcessDied | ErrorKind::Timeout);
            if may_retry && job.attempts < group.options.retries {
                job.attempts += 1;
                shared.take_back(&group, std::iter::once(job).chain(jobs));
            } else {
                group.settle(job.index, Err(error));
                shared.take_back(&group, jobs);
            }
            let _ = self.process.wait().await;
            return Some(if shared.terminated.is_cancelled() { End::Finished } else { End::Gone });
        }
        group.learn(started.elapsed(), count);
        None
    }

    async fn item(&mut self, shared: &Shared, group: &Group) -> Ended {
        let overrun = async {
            match group.options.timeout {
                Some(timeout) => tokio::time::sleep(timeout).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            report = self.reports.recv() => return Ended::of(report),
            () = shared.terminated.cancelled() => return Ended::Terminated,
            () = overrun => return Ended::Overran,
            () = group.cancelled.cancelled() => {}
        }
        let finished = tokio::time::timeout(GRACE, self.reports.recv()).await;
        finished.map_or(Ended::Cancelled, Ended::of)
    }

    /// What to tell about a worker that is gone.
    async fn death(&mut self, doing: &str) -> Error {
        let status = self.process.wait().await;
        let how = match &status {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        Error::new(ErrorKind::ProcessDied, format!("{} died while it ran {doing}: {how}", self.name))
            .with_exit_status(status.ok())
    }

    async fn stop(mut self) -> End {
        let _ = self.process.kill();
        let _ = self.process.wait().await;
        End::Finished
    }
}
