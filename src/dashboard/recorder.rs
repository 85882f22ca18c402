//! The thread that samples pools and queues and draws what it has.
//!
//! It alone has the histories, so nothing is locked while it draws. Samples are taken here and not on a thread of the runtime, because each
//! reads a file of /proc per worker, which takes some tens of microseconds and may wait for a busy kernel. One thread for the whole life of a
//! dashboard is cheaper than one for each of four samples a second. Requests arrive through a channel, and a sample that is due is taken
//! before the next one.

use super::drawings::Drawings;
use super::history::{PoolHistory, QueueHistory};
use super::page::{self, ManagerState, View};
use crate::observe::{PoolSource, QueueSource};
use crate::os::background;
use crate::os::sync::lock;
use crate::sync::debug::{self, Dump};
use hyper::body::Bytes;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// The time between two samples, usually and at most.
pub(super) const SAMPLE: Duration = Duration::from_millis(250);
const RAREST_SAMPLE: Duration = Duration::from_secs(2);
/// Sampling, and reading the locks, take at most one in so many parts of the time.
const SHARE: u32 = 100;
/// The locks are not read more often.
const READ_LOCKS: Duration = Duration::from_secs(1);
/// The stack of the thread.
pub(super) const STACK: usize = 1 << 20;
/// So many requests wait at most.
const WAITING: usize = 128;

/// Why there is no drawing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NoDrawing {
    /// Slow readers hold as many as may be, or too many requests wait.
    Busy,
    /// Drawing has failed.
    Failed,
}

type Answer = Result<Bytes, NoDrawing>;

struct Order {
    width: u32,
    answer: oneshot::Sender<Answer>,
}

/// Where drawings are asked for. The thread ends after the drop of the last one.
#[derive(Clone)]
pub(super) struct Orders(SyncSender<Order>);

impl Orders {
    /// The contents of the page, drawn for this width.
    pub(super) async fn content(&self, width: u32) -> Answer {
        let (answer, drawn) = oneshot::channel();
        self.0.try_send(Order { width, answer }).map_err(|_| NoDrawing::Busy)?;
        drawn.await.unwrap_or(Err(NoDrawing::Failed))
    }
}

/// The state of each manager, as the page shows it. The tasks that ask the managers write it.
pub(super) type Managers = Arc<Mutex<Vec<ManagerState>>>;

pub(super) struct Recorder {
    started: Instant,
    pool_sources: Vec<PoolSource>,
    pools: Vec<PoolHistory>,
    queue_sources: Vec<QueueSource>,
    queues: Vec<QueueHistory>,
    managers: Managers,
    locks: Locks,
    pub(super) drawings: Drawings,
}

/// What [`debug::dump`] has returned, when, and how long that took.
#[derive(Default)]
struct Locks(Option<(Instant, Duration, Dump)>);

impl Locks {
    fn dump(&mut self) -> &Dump {
        let is_old = |(at, took, _): &(Instant, Duration, Dump)| at.elapsed() >= READ_LOCKS.max(*took * SHARE);
        if self.0.as_ref().is_none_or(is_old) {
            let begun = Instant::now();
            let dump = debug::dump();
            self.0 = Some((Instant::now(), begun.elapsed(), dump));
        }
        &self.0.get_or_insert_with(|| (Instant::now(), Duration::ZERO, Dump::default())).2
    }
}

impl Recorder {
    pub(super) fn new(pool_sources: Vec<PoolSource>, queue_sources: Vec<QueueSource>, managers: Managers) -> Self {
        let pools = pool_sources.iter().map(|pool| PoolHistory::new(pool.name.clone())).collect();
        let queues = queue_sources.iter().map(|queue| QueueHistory::new(queue.name.clone(), queue.capacity)).collect();
        let (started, locks, drawings) = (Instant::now(), Locks::default(), Drawings::default());
        Self { started, pool_sources, pools, queue_sources, queues, managers, locks, drawings }
    }

    /// Starts the thread, which ends with the first of both: the orders, and `owner`. Tasks of a runtime that rests keep their orders.
    ///
    /// # Errors
    /// No thread can be had.
    pub(super) fn start(self, owner: &Arc<()>) -> io::Result<Orders> {
        let ((orders, receiver), owner) = (sync_channel(WAITING), Arc::downgrade(owner));
        background::start_with_stack("mp-dashboard", STACK, move || self.run(&receiver, &owner))?;
        Ok(Orders(orders))
    }

    fn run(mut self, orders: &Receiver<Order>, owner: &Weak<()>) {
        let mut due = Instant::now();
        while owner.strong_count() > 0 {
            if Instant::now() >= due {
                // The last drop of a pool in the midst of a sample runs code of its callers.
                let took = catch_unwind(AssertUnwindSafe(|| self.sample())).unwrap_or(RAREST_SAMPLE);
                due = Instant::now() + (took * SHARE).clamp(SAMPLE, RAREST_SAMPLE);
            }
            match orders.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(order) => self.answer(order),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Returns how long it took.
    fn sample(&mut self) -> Duration {
        let begun = Instant::now();
        for (source, history) in self.pool_sources.iter().zip(&mut self.pools) {
            history.record(begun, source.stats.stats());
        }
        for (source, history) in self.queue_sources.iter().zip(&mut self.queues) {
            history.record(begun, (source.len)());
        }
        begun.elapsed()
    }

    fn answer(&mut self, order: Order) {
        // A client that has gone leaves its order behind.
        if order.answer.is_closed() {
            return;
        }
        // The histories are only read, and a drawing is kept when it is complete.
        let drawn = catch_unwind(AssertUnwindSafe(|| self.content(order.width).ok_or(NoDrawing::Busy)));
        let _ = order.answer.send(drawn.unwrap_or(Err(NoDrawing::Failed)));
    }

    fn content(&mut self, width: u32) -> Option<Bytes> {
        let Self { started, pools, queues, managers, locks, drawings, .. } = self;
        drawings.get(width, |width| {
            let managers = lock(managers).clone();
            let (now, started, locks) = (Instant::now(), *started, locks.dump());
            page::content(&View { now, started, pools, queues, managers: &managers, locks }, width)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn queue(len: impl Fn() -> usize + Send + Sync + 'static) -> QueueSource {
        QueueSource { name: "q".into(), capacity: None, len: Box::new(len), passed: Box::new(|| None) }
    }

    #[tokio::test]
    async fn nothing_of_the_page_is_locked_or_done_on_the_runtime_while_it_samples_and_draws() {
        let (here, managers) = (std::thread::current().id(), Managers::default());
        let (sampled, samples) = mpsc::channel();
        let recorder = Recorder::new(
            Vec::new(),
            vec![queue(move || {
                let _ = sampled.send(std::thread::current().id());
                3
            })],
            managers.clone(),
        );
        let owner = Arc::new(());
        let orders = recorder.start(&owner).unwrap();
        assert_ne!(samples.recv_timeout(Duration::from_secs(60)).unwrap(), here);
        let content = orders.content(400).await.unwrap();
        assert!(String::from_utf8_lossy(&content).contains("items: 3 now"));
        assert!(managers.try_lock().is_ok());
        drop(orders);
        // The thread ends, and what it sampled is let go of.
        while samples.recv_timeout(Duration::from_secs(60)).is_ok() {}
        assert_eq!(samples.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Disconnected));
    }

    #[test]
    fn the_thread_ends_with_its_owner_also_while_a_task_that_rests_has_orders() {
        let (alive, ended) = mpsc::channel::<()>();
        let source = queue(move || {
            let _ = &alive;
            0
        });
        let owner = Arc::new(());
        let orders = Recorder::new(Vec::new(), vec![source], Managers::default()).start(&owner).unwrap();
        drop(owner);
        assert_eq!(ended.recv_timeout(Duration::from_secs(60)), Err(RecvTimeoutError::Disconnected));
        drop(orders);
    }

    #[tokio::test]
    async fn an_order_of_a_client_that_has_gone_draws_nothing() {
        let mut recorder = Recorder::new(Vec::new(), Vec::new(), Managers::default());
        let (answer, gone) = oneshot::channel();
        drop(gone);
        recorder.answer(Order { width: 400, answer });
        assert_eq!(recorder.drawings.held().load(std::sync::atomic::Ordering::Relaxed), 0);
    }
}
