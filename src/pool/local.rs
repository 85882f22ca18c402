//! The taker of a pool within this process: a thread that executes orders, one item at a time.

use super::events;
use super::taker::{Order, Orders, Taker};
use super::task::{RunsHere, StopHere};
use crate::channel::spsc;
use crate::error::{Error, ErrorKind, Result};
use crate::os::background;
use crate::os::sync::lock;
use crate::process::entry::{Arguments, Batch, Executor, report_error};
use crate::wire::{Attachment, EncodedMessage, Payload};
use std::any::Any;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Starts the thread, which ends with the pool.
pub(super) fn start(orders: Orders) -> Result<Arc<dyn Taker>> {
    let (sender, receiver) = mpsc::channel();
    let at_work = AtWork::default();
    let shown = at_work.clone();
    let thread = std::thread::Builder::new().name("mp-in-process".into());
    orders.set_capacity(1);
    let started = background::spawn(thread, move || work(&orders, &receiver, &shown));
    started.map_err(|error| Error::io("cannot start the thread of a pool", error))?;
    Ok(Arc::new(Thread { notices: Mutex::new(sender), at_work }))
}

/// The item that the thread runs.
type AtWork = Arc<Mutex<Option<Arc<StopHere>>>>;

/// How the pool reaches the thread.
struct Thread {
    /// Each message has it look for work, and without a sender it ends.
    notices: Mutex<Sender<()>>,
    at_work: AtWork,
}

impl Taker for Thread {
    fn notify(&self) {
        // A thread that has ended needs no notice.
        let _ = lock(&self.notices).send(());
        // An item that waits for its cancellation sees it.
        let at_work = lock(&self.at_work).clone();
        at_work.iter().for_each(|item| item.pass_on());
    }

    fn refuse(&self, what: &str) -> Error {
        Error::other(format!("a pool within this process has no workers that can be {what}"))
    }
}

fn work(orders: &Orders, notices: &Receiver<()>, at_work: &AtWork) {
    let mut executor = Executor::default();
    while notices.recv().is_ok() {
        while let Some(order) = orders.take() {
            let call = order.call();
            let (label, at_work) = (order.label(), at_work.clone());
            let run = Run { order, next: 0, at: 0, began: Instant::now(), label, runs: None, at_work };
            let (batch, entered) = call.run_batch(Box::new(run), &mut executor);
            let Ok(mut run) = (batch as Box<dyn Any>).downcast::<Run>() else { return };
            if let Err(error) = entered {
                while run.next().is_some() {
                    report_error(&mut *run, Error::copy(&error));
                }
            }
        }
        // A cancelled order notices that itself.
        orders.cancelled();
    }
}

/// An order that is being executed.
struct Run {
    order: Order,
    /// The item after the one at work, and where it lies.
    next: u32,
    at: usize,
    began: Instant,
    label: &'static str,
    /// The item at work, for `current_task`.
    runs: Option<RunsHere>,
    at_work: AtWork,
}

impl Run {
    fn is_late(&self) -> bool {
        self.order.start_by().is_some_and(|limit| Instant::now() >= limit)
    }

    /// Returns the index of the item at work.
    fn index(&self) -> u64 {
        self.order.first() + u64::from(self.next) - 1
    }

    /// Returns the arguments of the item whose record begins at `start`, and starts it.
    fn arguments(&mut self, start: usize) -> Result<Arguments<'_>> {
        let Some((_, bytes, _)) = spsc::first(self.order.records().get(start..).unwrap_or_default()) else {
            return Err(Error::new(ErrorKind::Decode, "an order with fewer items than it says"));
        };
        // Descriptors travel as they would to a process.
        let mut fds = EncodedMessage::new(Vec::new(), self.order.attachments().to_vec()).open()?.fds;
        let (bytes, emitter) = match self.order.has_events() {
            true => events::split(bytes, &mut fds).map(|(bytes, emitter)| (bytes, Some(emitter)))?,
            false => (bytes, None),
        };
        let item = (self.label, self.order.attempt(), self.order.origin(), self.index());
        let runs = RunsHere::start(item, self.order.cancel_flag(), emitter);
        *lock(&self.at_work) = Some(runs.stop().clone());
        self.runs = Some(runs);
        Ok(Arguments { bytes: bytes.into(), fds })
    }

    /// The item at work is done.
    fn end(&mut self) {
        if self.runs.take().is_some() {
            *lock(&self.at_work) = None;
        }
    }
}

impl Batch for Run {
    fn begin(&mut self, label: &'static str) {
        self.label = label;
    }

    fn next(&mut self) -> Option<Result<Arguments<'_>>> {
        self.end();
        while self.next < self.order.count() && !self.order.is_cancelled() {
            let is_late = self.is_late();
            let start = self.at;
            let rest = self.order.records().get(start..).unwrap_or_default();
            self.at += spsc::first(rest).map_or(0, |(_, _, len)| len);
            self.next += 1;
            if is_late {
                let (index, error) = (self.index(), self.order.not_begun());
                self.order.fail(index, error);
                continue;
            }
            self.began = Instant::now();
            return Some(self.arguments(start));
        }
        None
    }

    fn report(&mut self, tag: u8, payload: Payload<'_>, attachments: &[Attachment]) -> bool {
        self.end();
        let (index, time) = (self.index(), self.began.elapsed());
        self.order.settle_encoded(
            index,
            tag,
            EncodedMessage::new(payload.bytes().to_vec(), attachments.to_vec()),
            time,
        );
        !self.order.is_cancelled()
    }
}
