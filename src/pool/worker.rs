//! The loop of a worker process: it runs items on its main thread, one at a time.

use super::protocol::{BARE, Conditions, Contract, EncodedTask, Header, IN_PIPE, LATE, TRACE};
use super::side_channel::{Inbox, Unreceived};
use super::{events, task, trace, worker_state};
use crate::channel::lane::{self, LaneOrder, Pace, WorkerEnd};
use crate::channel::{Sender, spsc};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::{attributes, clock, memory};
use crate::process::entry::{Arguments, Batch, Executor, IS_VALUE, encode_error, report_error};
use crate::process::note_memory_limit;
use crate::wait::doorbell;
use crate::wire::{Attachment, EncodedMessage, Payload};
use rustix::process::Resource;
use std::any::Any;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use tracing::dispatcher::DefaultGuard;

/// Runs orders until the pool closes the lane. The first result is the initializer's, if there is one.
pub(super) fn work(contract: Contract) -> Result<()> {
    doorbell::keep_parker();
    let Contract { lane, orders, results, initializer, finalizer, conditions, submitter } = contract;
    conditions.apply()?;
    let mut executor = Executor::default();
    let mut context = Context {
        lane,
        orders: Inbox::new(orders),
        results,
        bytes: Vec::new(),
        at: 0,
        submitter,
        fds: Vec::new(),
        order: None,
        header: None,
        listens: None,
        sampled: None,
        peak: 0,
        read: None,
        started: 0,
        index: 0,
        begun: Instant::now(),
        done: None,
        begun_about: 0,
        failed: None,
    };
    if let Some(EncodedTask { call, arguments }) = initializer {
        let outcome = call.run(arguments.open()?, &mut executor);
        context.put(IN_PIPE, Payload::Borrowed(&outcome.parts().concat()), outcome.attachments());
        context.lane.notify_pending();
    }
    let mut context = Box::new(context);
    while let Some(header) = context.take_order()? {
        context.listens = (header.level > 0)
            .then(|| context.lane.event_writer(TRACE).ok())
            .flatten()
            .and_then(|writer| trace::listen(header.level, writer));
        let (batch, entered) = header.call.run_batch(context, &mut executor);
        context = (batch as Box<dyn Any>).downcast().map_err(|_| Error::other("a batch did not come back"))?;
        if let Err(error) = entered {
            while context.next().is_some() {
                report_error(&mut *context, Error::copy(&error));
            }
        }
        context.finish();
    }
    if let Some(EncodedTask { call, arguments }) = finalizer {
        let outcome = call.run(arguments.open()?, &mut executor);
        drop(outcome);
    }
    worker_state::drop_state();
    Ok(())
}

/// One order at a time, and where its results go.
struct Context {
    lane: WorkerEnd,
    orders: Inbox,
    results: Sender<EncodedMessage>,
    /// The order's bytes, and where the next item begins in them.
    bytes: Vec<u8>,
    at: usize,
    /// The submitter of orders whose heads name none.
    submitter: u64,
    fds: Vec<OwnedFd>,
    order: Option<LaneOrder>,
    header: Option<Header>,
    /// While traces of items are sent.
    listens: Option<DefaultGuard>,
    /// When it last looked how much memory it has.
    sampled: Option<Instant>,
    /// How much it had at most when it last looked at that, and when.
    peak: u64,
    read: Option<Instant>,
    /// When the item at work started, in microseconds, if it has a limit.
    started: u64,
    /// Which item of the order that is.
    index: u32,
    /// When the order at work was begun, and when the one before it was done.
    begun: Instant,
    done: Option<Instant>,
    /// When an order that is not timed was begun, in nanoseconds, to some milliseconds.
    begun_about: u64,
    /// A result could not be put. Later ones would be taken for it, so there are none.
    failed: Option<Error>,
}

/// How often a worker looks at its memory at most: how much it has, and how much it had at most, unless it has more than that.
const SAMPLE_EVERY: Duration = Duration::from_millis(5);
const READ_EVERY: Duration = Duration::from_millis(50);
/// An order that was expected to be over at once and took longer than this is timed after all. It is at least two ticks of the clock that says so.
fn long() -> Duration {
    (2 * clock::coarse_tick()).max(Duration::from_millis(8))
}

impl Conditions {
    fn apply(&self) -> Result<()> {
        let failed = |what| move |error| Error::io(format!("a worker cannot have its {what}"), error);
        if let Some(nice) = self.nice {
            attributes::set_nice(nice).map_err(failed("priority"))?;
        }
        if let Some(cpu) = self.cpu {
            attributes::tie_to(cpu).map_err(failed("CPU"))?;
        }
        for (resource, limit) in [(Resource::As, self.memory), (Resource::Nofile, self.descriptors)] {
            limit.map_or(Ok(()), |limit| attributes::limit(resource, limit)).map_err(failed("limits"))?;
        }
        note_memory_limit();
        Ok(())
    }
}

impl Context {
    /// Tells how much memory it has, if an order has taken a while.
    fn sample_memory(&mut self, now: Instant) {
        let is_due = |then: Option<Instant>, every| then.is_none_or(|then| now.duration_since(then) >= every);
        if !is_due(self.sampled, SAMPLE_EVERY) {
            return;
        }
        self.sampled = Some(now);
        let mut resident = memory::resident_now();
        if resident > self.peak || is_due(self.read, READ_EVERY) {
            self.read = Some(now);
            (resident, self.peak) = memory::resident();
        }
        self.lane.note_memory(resident, self.peak);
    }

    /// Waits for the next order; `None` after the last.
    fn take_order(&mut self) -> Result<Option<Header>> {
        loop {
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            // An order that was there already is begun when the one before it is done: no other look at the clock.
            let follows = self.done.take().filter(|_| self.lane.has_any());
            let next = self.lane.next(&mut self.bytes).map_err(|error| Error::io("cannot take an order", error))?;
            let Some(order) = next else { return Ok(None) };
            let corrupt = |text| Error::new(ErrorKind::Decode, text);
            let (header, len) =
                Header::read(&self.bytes, self.submitter).ok_or_else(|| corrupt("an order without a head"))?;
            self.at = len;
            if order.kind & IN_PIPE != 0 {
                // The order may be on its way for as long as the pool needs for results that it does not know of.
                self.lane.notify_pending();
                // An order that cannot be read is one whose items cannot.
                match self.orders.blocking_recv().map(EncodedMessage::open) {
                    // Nothing came in its place, as all was taken back before.
                    Ok(Ok(parcel)) if parcel.bytes.is_empty() && parcel.fds.is_empty() => {
                        if self.lane.start(&order).is_some() {
                            return Err(corrupt("an order without its arguments"));
                        }
                        self.lane.finish(order);
                        continue;
                    }
                    Ok(Ok(parcel)) => (self.bytes, self.fds, self.at) = (parcel.bytes, parcel.fds, 0),
                    Ok(Err(error)) => {
                        self.refuse(order, &error);
                        continue;
                    }
                    Err(Unreceived { error, .. }) if error.kind() == ErrorKind::Closed => return Ok(None),
                    Err(Unreceived { error, is_left }) => {
                        self.refuse(order, &error);
                        if is_left {
                            // The next order would find it: this is the end of the pipe, and of the worker.
                            self.lane.notify_pending();
                            return Err(error);
                        }
                        continue;
                    }
                }
            }
            if header.pace != Pace::Each {
                self.lane.defer_notification(&order, header.pace);
            }
            (self.order, self.header) = (Some(order), Some(header));
            match header.is_timed {
                true => self.begun = follows.unwrap_or_else(Instant::now),
                false => self.begun_about = clock::coarse_ns(),
            }
            return Ok(Some(header));
        }
    }

    /// An order that cannot be read is one whose items cannot.
    fn refuse(&mut self, order: LaneOrder, error: &Error) {
        while self.lane.start(&order).is_some() {
            report_error(self, Error::copy(error));
        }
        self.lane.finish(order);
    }

    fn finish(&mut self) {
        task::end();
        self.listens = None;
        if self.order.as_ref().is_some_and(|order| order.kind & IN_PIPE != 0) {
            // Its bytes and descriptors go with it, also if it was taken back before it was begun.
            (self.bytes, self.fds) = (Vec::new(), Vec::new());
        }
        let is_timed = self.header.is_none_or(|header| header.is_timed);
        if is_timed {
            let now = self.done.unwrap_or_else(Instant::now);
            self.done = Some(now);
            self.sample_memory(now);
        }
        // Its limit is not that of the next, which may be one that cannot be read.
        self.header = None;
        if let Some(order) = self.order.take() {
            self.lane.finish(order);
        }
        // Before it is idle, perhaps for long, it looks in any case.
        if !is_timed && !self.lane.has_any() {
            self.sample_memory(Instant::now());
        }
    }

    /// Says how long the order took, if this is the end of its last item.
    #[inline]
    fn note_took(&mut self) {
        let Some(order) = self.order.as_ref().filter(|order| self.lane.is_last(order, self.index)) else { return };
        if self.header.is_some_and(|header| header.is_timed) {
            let now = Instant::now();
            self.lane.note_took(order, now.duration_since(self.begun));
            self.done = Some(now);
            return;
        }
        // It was expected to be over at once.
        let about = Duration::from_nanos(clock::coarse_ns().saturating_sub(self.begun_about));
        if about >= long() {
            self.lane.note_took(order, about);
        }
    }

    /// Puts a result, unless one before it could not be put. Returns `true` if it is there.
    fn report_to_lane(&mut self, tag: u8, payload: &[u8]) -> bool {
        if self.failed.is_none() {
            let failed = self.lane.report(tag, [payload, &[]]).err();
            self.failed = failed.map(|error| Error::io("a result cannot be put where the pool finds it", error));
        }
        self.failed.is_none()
    }

    fn put(&mut self, tag: u8, payload: Payload<'_>, attachments: &[Attachment]) -> bool {
        if tag < IN_PIPE && attachments.is_empty() && self.lane.can_carry(payload.len()) {
            return self.report_to_lane(tag, payload.bytes());
        }
        // The pipe may be full until the pool takes results, so it is notified of those that came before.
        self.lane.notify_pending();
        match self.results.blocking_send_encoded(payload, attachments) {
            Ok(()) => self.report_to_lane(tag | IN_PIPE, &[]),
            Err(error) if error.kind() == ErrorKind::Closed => false,
            Err(error) => {
                let text = format!("a result cannot be sent: {}", error.text());
                report_error(self, Error::new(error.kind(), text).explained_by(error.topic()))
            }
        }
    }
}

impl Batch for Context {
    fn begin(&mut self, label: &'static str) {
        if let (Some(order), Some(header)) = (&self.order, &self.header) {
            task::begin(label, header, self.lane.stop_sign(order, 0));
        }
    }

    #[inline]
    fn next(&mut self) -> Option<Result<Arguments<'_>>> {
        let order = self.order.as_ref()?;
        let has_limit = self.header.is_some_and(|header| header.limit.is_some());
        if has_limit {
            // Before it is claimed: a worker that is stopped in between has begun it.
            self.started = lane::now_us();
        }
        let is_bare = order.kind & BARE != 0;
        let index = self.lane.start(order)?;
        self.index = index;
        if has_limit {
            self.lane.note_start(order, index, self.started);
        }
        task::starts(index);
        if self.listens.is_some() {
            trace::open();
        }
        let mut fds = std::mem::take(&mut self.fds);
        let has_events = self.header.is_some_and(|header| header.has_events);
        if is_bare {
            let mut bytes = std::mem::take(&mut self.bytes);
            let listener =
                has_events.then(|| events::split(&bytes, &mut fds).map(|(rest, emitter)| (rest.len(), emitter)));
            if let Some(listener) = listener {
                let (len, emitter) = match listener {
                    Ok(listener) => listener,
                    Err(error) => return Some(Err(error)),
                };
                bytes.truncate(len);
                task::has_listener(emitter);
            }
            return Some(Ok(Arguments { bytes: bytes.into(), fds }));
        }
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some((_, bytes, len)) = spsc::first(rest) else {
            return Some(Err(Error::new(ErrorKind::Decode, "an order with fewer items than it says")));
        };
        self.at += len;
        if !has_events {
            return Some(Ok(Arguments { bytes: bytes.into(), fds }));
        }
        Some(events::split(bytes, &mut fds).map(|(bytes, emitter)| {
            task::has_listener(emitter);
            Arguments { bytes: bytes.into(), fds }
        }))
    }

    #[inline]
    fn report(&mut self, tag: u8, payload: Payload<'_>, attachments: &[Attachment]) -> bool {
        self.note_took();
        if self.header.is_some_and(|header| header.has_events) {
            task::sends_no_more();
        }
        if self.listens.is_some() {
            trace::close();
            self.lane.catch_up();
        }
        let limit = self.header.and_then(|header| header.limit);
        if limit.is_some_and(|limit| lane::now_us().saturating_sub(self.started) > limit) {
            return self.report_to_lane(LATE, &[]);
        }
        if let Some(attachment) = attachments.first().filter(|_| self.header.is_some_and(|header| header.is_remote)) {
            let (label, kind) = (task::label().unwrap_or("a function"), attachment.kind());
            let text = format!("a result of {label} is or holds {kind}, which cannot cross to another host");
            let error = Error::new(ErrorKind::Encode, text).explained_by(Topic::CannotCrossHosts);
            let (tag, payload) = encode_error(&error);
            return self.put(tag, Payload::Borrowed(&payload), &[]);
        }
        self.put(tag, payload, attachments)
    }
}

const _: () = assert!(IS_VALUE == 0, "a batch of values is told by its tags");
