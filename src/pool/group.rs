//! The items of one call to the pool: what is to do, what is being done, what is done.

use super::protocol::Report;
use crate::error::{Error, ErrorKind, Result};
use crate::process::entry;
use crate::wire::Sealed;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// What a caller may ask of each of its items.
#[derive(Clone, Copy, Default)]
pub(super) struct Options {
    /// From an item's start; whoever overruns is killed.
    pub(super) timeout: Option<Duration>,
    /// How often an item that killed its worker, or was killed for its time, is tried again.
    pub(super) retries: u32,
    /// Items in a batch; 0 is by measured time.
    pub(super) chunk: usize,
}

/// One item on its way to a worker.
pub(super) struct Job {
    pub(super) index: u64,
    pub(super) arguments: Sealed,
    pub(super) attempts: u32,
}

pub(super) struct Group {
    pub(super) call: entry::Call,
    pub(super) label: &'static str,
    pub(super) options: Options,
    /// Nobody waits for the rest any more.
    pub(super) cancelled: CancellationToken,
    items: Mutex<Items>,
    /// How long an item takes, smoothed; 0 while unknown.
    item_ns: AtomicU64,
}

#[derive(Default)]
struct Items {
    pending: VecDeque<Job>,
    done: VecDeque<(u64, Result<Report>)>,
    waker: Option<Waker>,
    /// Whether the pool's queue lists this group.
    is_queued: bool,
}

/// Aim for so much work in one batch.
const BATCH: Duration = Duration::from_millis(1);
const LARGEST_BATCH: u64 = 1024;

impl Group {
    pub(super) fn new(call: entry::Call, label: &'static str, options: Options) -> Self {
        let (cancelled, items) = (CancellationToken::new(), Mutex::default());
        Self { call, label, options, cancelled, items, item_ns: AtomicU64::new(0) }
    }

    fn items(&self) -> MutexGuard<'_, Items> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job; true if the pool is to list the group.
    #[must_use]
    pub(super) fn add(&self, job: Job) -> bool {
        let mut items = self.items();
        items.pending.push_back(job);
        !std::mem::replace(&mut items.is_queued, true)
    }

    /// Puts jobs that were not run back to the front; true if the pool is to list the group.
    #[must_use]
    pub(super) fn put_back(&self, jobs: impl DoubleEndedIterator<Item = Job>) -> bool {
        let mut items = self.items();
        jobs.rev().for_each(|job| items.pending.push_front(job));
        let is_new = !items.pending.is_empty() && !items.is_queued;
        items.is_queued |= is_new;
        is_new
    }

    /// How many items a batch should have now.
    pub(super) fn batch_size(&self) -> usize {
        if self.options.timeout.is_some() {
            // The clock of an item starts when it does, so nothing may wait in front of it.
            return 1;
        }
        match (self.options.chunk, self.item_ns.load(Relaxed)) {
            (0, 0) => 1,
            (0, ns) => (BATCH.as_nanos() as u64 / ns).clamp(1, LARGEST_BATCH) as usize,
            (chunk, _) => chunk,
        }
    }

    /// The next jobs for one worker; true if there are more, and the group stays listed.
    /// Workers share what is there: a batch is at most half of it, for somebody else may be free.
    pub(super) fn take(&self, at_most: usize) -> (Vec<Job>, bool) {
        if self.cancelled.is_cancelled() {
            self.fail_pending(|| self.was_cancelled());
        }
        let mut items = self.items();
        let fair = if self.options.chunk == 0 { items.pending.len().div_ceil(2) } else { usize::MAX };
        let count = self.batch_size().min(at_most).min(fair).min(items.pending.len());
        let jobs = items.pending.drain(..count).collect();
        items.is_queued = !items.pending.is_empty();
        (jobs, items.is_queued)
    }

    /// A batch of `count` items took `time`.
    pub(super) fn learn(&self, time: Duration, count: usize) {
        let ns = (time.as_nanos() as u64 / count.max(1) as u64).max(1);
        let old = self.item_ns.load(Relaxed);
        // Batches grow by halves at most: the first items may be the cheap ones.
        self.item_ns.store(if old == 0 { ns.max(BATCH.as_nanos() as u64 / 16) } else { ns.max(old / 4) }, Relaxed);
    }

    pub(super) fn settle(&self, index: u64, outcome: Result<Report>) {
        let mut items = self.items();
        items.done.push_back((index, outcome));
        let waker = items.waker.take();
        drop(items);
        waker.into_iter().for_each(Waker::wake);
    }

    /// Settles everything that has not started.
    pub(super) fn fail_pending(&self, error: impl Fn() -> Error) {
        let pending = std::mem::take(&mut self.items().pending);
        pending.into_iter().for_each(|job| self.settle(job.index, Err(error())));
    }

    /// Gives the caller up: nothing more starts, what runs is stopped.
    pub(super) fn cancel(&self) {
        self.items().pending.clear();
        self.cancelled.cancel();
    }

    pub(super) fn has_done(&self) -> bool {
        !self.items().done.is_empty()
    }

    pub(super) fn poll_done(&self, cx: &mut Context<'_>) -> Poll<(u64, Result<Report>)> {
        let mut items = self.items();
        if let Some(done) = items.done.pop_front() {
            return Poll::Ready(done);
        }
        match &mut items.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    pub(super) fn timed_out(&self, who: &str) -> Error {
        let (label, limit) = (self.label, self.options.timeout.unwrap_or_default());
        Error::new(ErrorKind::Timeout, format!("{label} took longer than {limit:?}; {who} was killed and is replaced"))
    }

    pub(super) fn was_cancelled(&self) -> Error {
        Error::new(ErrorKind::Cancelled, format!("{} was cancelled", self.label))
    }
}
