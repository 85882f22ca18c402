//! A worker as the scheduler knows it, and the orders that it has.

use super::{STARTS, later};
use crate::channel::lane::{Claim, PoolEnd};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::pool::call_items::CallItems;
use crate::pool::chunk::Chunk;
use crate::pool::side_channel::{SideOrders, SideResults};
use crate::pool::trace::TraceSink;
use crate::process::{Cause, Killer};
use std::collections::VecDeque;
use std::fmt::Write;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An order that took no longer by the pool's own clock took no longer at its worker.
const LONG: Duration = Duration::from_millis(2);
/// So long a worker may take to copy so much of an order.
const SENDS_64_KIB: Duration = Duration::from_millis(1);

/// Control over the process at the other end of a lane.
pub(in crate::pool) trait Control: Send {
    /// Kills it, also in the middle of an item. Its exit is reported like any other.
    fn kill(&self);
    /// It has nothing left to do, and is to end by itself within this.
    fn leaves_within(&self, time: Duration);
}

impl Control for Killer {
    fn kill(&self) {
        // A process that cannot be killed has ended.
        let _ = Killer::kill(self);
    }

    fn leaves_within(&self, time: Duration) {
        Killer::leaves_within(self, time);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Its initializer runs.
    Beginning,
    Serving,
    /// It has all the orders it will get, and ends after them.
    Leaving,
    /// It was killed, or cannot be reached any more.
    Killed,
}

pub(super) struct Worker {
    pub(super) generation: u64,
    pub(super) name: String,
    pub(super) pid: u32,
    pub(super) control: Box<dyn Control>,
    pub(super) lane: PoolEnd,
    pub(super) side_orders: Arc<SideOrders>,
    pub(super) side_results: Arc<SideResults>,
    pub(super) trace_sink: Arc<TraceSink>,
    pub(super) phase: Phase,
    pub(super) running: VecDeque<Running>,
    /// Items it was given, and may be given.
    pub(super) given: usize,
    pub(super) share: usize,
    /// The checkout that has it; 0 is none.
    pub(super) checkout: u64,
    /// It is to go once it is given back.
    pub(super) is_due: bool,
    /// Items that it has answered.
    pub(super) answered: u64,
    pub(super) born: Instant,
    pub(super) idle_since: Option<Instant>,
    pub(super) has_worked: bool,
    /// The initializer's report has not come.
    pub(super) is_awaited: bool,
    /// There was no room for an order in its lane; how far it was with giving orders up then.
    pub(super) full: Option<u64>,
    /// When something was put into its `side_orders`, as long as it may still lie there.
    pub(super) unsent: Option<u64>,
    /// Its items, of which it had begun none, went to others: it may be stopped. How far it was with giving orders up
    /// then, and since when.
    pub(super) stalled: Option<(u64, Instant)>,
    /// Its orders ahead were taken back, as another call waits: it gets no more before it is idle.
    pub(super) is_vacating: bool,
    /// Its items were expected to be over by now, and are not.
    pub(super) is_lagging: bool,
    /// When it last came to something, as far as the pool knows: an item at its front waits for nothing else since then.
    pub(super) moved: Instant,
    /// It was seen to take orders.
    pub(super) is_ready: bool,
    /// The report has come, and is being read.
    pub(super) has_reported: bool,
    /// Since when it is to end once it has nothing to do.
    pub(super) leaving: Option<Instant>,
    /// The reason why it was killed, if later workers may be killed for it, too.
    pub(super) overdue: Option<Error>,
    /// The circumstances of its end, once known.
    pub(super) end: Circumstances,
    /// Why it was killed, for the item that it was at.
    pub(super) kill_reason: Option<Error>,
}

/// The circumstances of a worker's end, beyond its exit status.
#[derive(Default)]
pub(in crate::pool) struct Circumstances {
    /// The kernel killed it for its memory.
    pub(in crate::pool) was_starved: bool,
    pub(in crate::pool) last_words: Option<String>,
    /// The cause as the worker reported it.
    pub(in crate::pool) cause: Option<Cause>,
}

/// An order at a worker.
pub(super) struct Running {
    pub(super) group: Arc<CallItems>,
    pub(super) chunk: Chunk,
    pub(super) number: u32,
    pub(super) done: u32,
    pub(super) end: u32,
    pub(super) since: Instant,
    /// The item that was found begun when its worker was last checked.
    pub(super) begun: Option<u32>,
    /// The item that was found started when its start was not noted.
    pub(super) unnoted: Option<u32>,
    /// Its results are notified of together.
    pub(super) is_quiet: bool,
    /// Its items are expected to be over before another worker could be woken for them.
    pub(super) is_brief: bool,
    /// They take so long that an idle worker should rather have them.
    pub(super) is_long: bool,
    /// Its call has many items, and not one.
    pub(super) is_many: bool,
    /// Its worker reports how long it takes.
    pub(super) is_timed: bool,
}

/// How long some items took.
#[derive(Clone, Copy, Debug)]
pub(super) enum Took {
    /// As their worker has measured it.
    Reported(Duration),
    /// It was to be measured, and was not.
    Unknown,
    /// It was not measured, as items of their call are over at once.
    Usual,
}

impl Took {
    /// Adds the time of other items; false if it is not of the same kind.
    fn add(&mut self, other: Self) -> bool {
        match (self, other) {
            (Took::Reported(time), Took::Reported(more)) => *time += more,
            (Took::Unknown, Took::Unknown) | (Took::Usual, Took::Usual) => {}
            _ => return false,
        }
        true
    }
}

/// What the orders of a worker have in common.
#[derive(Default)]
pub(super) struct Orders {
    /// All items are known to be quiet, so that others may wait behind them.
    pub(super) only_quick: bool,
    /// All are of calls with one item.
    pub(super) only_single: bool,
    /// All items are expected to be over before another worker could be woken for them.
    pub(super) only_brief: bool,
    /// There are items behind the one that runs.
    pub(super) has_more: bool,
    /// Some items take so long that an idle worker should rather have them, and none is large.
    pub(super) has_long: bool,
}

impl Worker {
    /// Returns `true` if its initializer is not known to have ended.
    pub(super) fn is_beginning(&self) -> bool {
        self.phase == Phase::Beginning && !self.has_reported
    }

    /// Kills it; `kill_reason` is the error of the item that it runs.
    pub(super) fn kill(&mut self, kill_reason: Option<Error>) {
        self.phase = Phase::Killed;
        // The first reason becomes the error of its item.
        self.kill_reason = self.kill_reason.take().or(kill_reason);
        self.control.kill();
    }

    /// The error of an item whose worker has died.
    pub(super) fn death(&self, status: &Result<ExitStatus>, doing: &str) -> Error {
        let how = match status {
            Ok(status) => status.to_string(),
            Err(error) => error.text().to_string(),
        };
        let mut text = format!("{} died while it ran {doing}: {how}", self.name);
        if let Some(cause) = &self.end.cause {
            text = format!("{} died while it ran {doing}: {cause} ({how})", self.name);
        }
        let (age, (_, peak)) = (self.born.elapsed(), self.lane.memory());
        let _ = write!(text, "; it was {age:.1?} old");
        if peak > 0 {
            let _ = write!(text, " and had used {} MiB at most when it last looked", peak >> 20);
        }
        if self.end.was_starved {
            text.push_str("; the kernel killed it because memory ran out");
        }
        if let Some(words) = &self.end.last_words {
            let _ = write!(text, "; it last wrote:\n{words}");
        }
        let kind = self.end.cause.as_ref().map_or(ErrorKind::ProcessDied, Cause::kind);
        let died = if self.end.was_starved { Topic::OutOfMemory } else { Topic::Died };
        let topic = self.end.cause.as_ref().map_or(died, Cause::topic);
        let error = Error::new(kind, text).explained_by(topic).with_exit_status(status.as_ref().ok().copied());
        let panic = self.end.cause.as_ref().and_then(Cause::panic);
        panic.cloned().into_iter().fold(error, Error::with_panic)
    }

    /// Returns `true` if it has given up no order since its items went to others.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled.is_some_and(|(then, _)| self.lane.given_up() == then)
    }

    /// When the item that it is to begin next should have been begun, if that may take `limit`; not what is being sent
    /// to it, or while the process starts.
    pub(super) fn due(&mut self, limit: Duration, now: Instant) -> Option<Instant> {
        if !self.is_ready && self.lane.is_ready() {
            (self.is_ready, self.moved) = (true, now);
        }
        let running = self.running.front()?;
        let pieces = running.chunk.bytes().len() >> 16;
        let mut limit = limit.saturating_add(SENDS_64_KIB.saturating_mul(pieces.try_into().unwrap_or(u32::MAX)));
        if !self.is_ready || self.side_orders.has(running.number) {
            limit = limit.max(STARTS);
        }
        Some(later(self.moved.max(running.since), limit))
    }

    /// Lets go of orders that are done. `times`: since when the worker has been at them, and now, if they came to their end just now and
    /// are to be counted among `ended`.
    pub(super) fn pop_complete(
        &mut self,
        times: Option<(Instant, Instant)>,
        ended: &mut Vec<(Arc<CallItems>, u32, Took)>,
    ) {
        while self.running.front().is_some_and(|running| running.done >= running.end) {
            let Some(running) = self.running.pop_front() else { return };
            running.group.forget(&running.chunk);
            if let Some((since, now)) = times {
                // A worker reports also of an order that took long though it was not to be timed.
                let may_be_reported = running.is_timed || now.saturating_duration_since(since) >= LONG;
                let reported = if may_be_reported { self.lane.took(running.number) } else { None };
                let took = match (reported, running.is_timed) {
                    (Some(time), _) => Took::Reported(time),
                    (None, true) => Took::Unknown,
                    (None, false) => Took::Usual,
                };
                let before = ended.last_mut().filter(|(group, ..)| Arc::ptr_eq(group, &running.group));
                match before.and_then(|(_, count, before)| before.add(took).then_some(count)) {
                    Some(count) => *count += running.done,
                    None => ended.push((running.group, running.done, took)),
                }
                self.running.front_mut().into_iter().for_each(|next| next.since = now);
            }
            if self.running.is_empty() {
                self.is_vacating = false;
                self.idle_since = Some(times.map_or_else(Instant::now, |(_, now)| now));
            }
        }
    }
}

/// Takes back the items of a worker's order that have not started; `done` are done. Returns how far the order goes now.
pub(super) fn take_back(lane: &PoolEnd, side_orders: &SideOrders, number: u32, done: u32) -> Claim {
    let claim = lane.take_back(number, done);
    if claim.end == 0 {
        side_orders.forget(number);
    }
    claim
}
