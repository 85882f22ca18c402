//! The items of one call in flight: pulled from their input as far ahead as is useful, and waited for.

use super::batch::ResultBatch;
use super::call_items::{CallItems, next_number};
use super::chunk::Chunk;
use super::engine::{PoolLifetime, Shared, check_forked};
use super::events::{self, EndOfEvents, Events};
use super::input::{Input, Most, Stop};
use super::options::{Options, Progress};
use crate::channel::Item;
use crate::error::{Error, Result};
use crate::os::{clock, fork};
use crate::process::{Function, entry};
use crate::wait::{Spin, Spinner, Spun};
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// The function to call.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) call: entry::Call,
    pub(super) label: &'static str,
}

impl Target {
    pub(super) fn of<F, A, M>(f: F) -> Self
    where
        F: Function<A, M>,
        A: DeserializeOwned + 'static,
    {
        Self { call: entry::Call::of(f), label: std::any::type_name::<F>() }
    }
}

/// When chunks were begun that are to be submitted together.
struct Since {
    exact: Instant,
    coarse_ns: u64,
}

impl Since {
    fn now() -> Self {
        Self { exact: Instant::now(), coarse_ns: clock::coarse_ns() }
    }

    fn is_long_ago(&self) -> bool {
        self.exact.elapsed() >= HELD
    }

    /// For small chunks, of which each costs less than a look at the exact clock may.
    fn is_a_tick_ago(&self) -> bool {
        clock::coarse_ns() != self.coarse_ns
    }
}

/// A call made while the pool was open, which `close` lets complete. When it is dropped, the call adds no more items.
pub(super) struct OpenCall(Arc<Shared>);

impl OpenCall {
    /// The checkout that this call belongs to, by its number; the checkout has the ticket. 0 is none.
    pub(super) fn of(pool: &PoolLifetime, checkout: u64) -> Result<Self> {
        pool.shared().open(checkout)?;
        Ok(Self(pool.shared().clone()))
    }

    /// One more for the same call.
    pub(super) fn again(&self) -> Self {
        self.0.open_again();
        Self(self.0.clone())
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        if !fork::is_forked() {
            self.0.finish();
        }
    }
}

/// The items of one call in flight: pulls them in, hands them on, gives their outcomes back as they come.
pub(super) struct Flight {
    pub(super) pool: Arc<PoolLifetime>,
    pub(super) group: Arc<CallItems>,
    input: Option<(Box<dyn Input>, OpenCall)>,
    /// The place in line for room, if the pool lets only so many items wait and has none now.
    place: Option<u64>,
    /// The source's own error, in the place of an item.
    failed: Option<(u64, Error)>,
    pulled: u64,
    returned: u64,
    spinner: Spinner,
    /// When the call began, if progress is reported.
    began: Option<Instant>,
    /// It ends with this, however long something else knows of the items.
    progress: Option<watch::Sender<Progress>>,
}

/// Bytes of arguments that are handed to the pool in one go.
const TOGETHER: usize = 16 << 10;
/// So long one of a KiB or more waits for others at most.
const HELD: Duration = Duration::from_micros(100);
/// Items in flight per worker, in chunks.
const CHUNKS_AHEAD: usize = 4;
/// So many items in a chunk are many, and so are those that take so long together.
const BULK: usize = 256;
const WORTH_SLEEPING_NS: u64 = 20_000;
/// In half of this workers do not run out of work before a caller that is woken has submitted more.
const WORTH_HALVING_NS: u64 = 4_000_000;
/// Bytes of arguments in flight, beyond which only one item is pulled.
const BYTES_AHEAD: usize = 64 << 20;

impl Flight {
    pub(super) fn start(
        pool: Arc<PoolLifetime>,
        target: Target,
        mut options: Options,
        input: Box<dyn Input>,
        ticket: Option<OpenCall>,
    ) -> Result<Self> {
        let ticket = ticket.map_or_else(|| OpenCall::of(&pool, options.checkout), Ok)?;
        options.limits = pool.shared().chunk_limits();
        options.keeps_traces = pool.shared().config.keeps_traces;
        let first = options.first_index;
        let progress = options.progress.take();
        let group = Arc::new(CallItems::new(target.call, target.label, options));
        let (input, spinner) = (Some((input, ticket)), Spinner::default());
        let (place, failed, began) = (None, None, None);
        Ok(Self { pool, group, input, place, failed, pulled: first, returned: first, spinner, began, progress })
    }

    fn in_flight(&self) -> usize {
        (self.pulled - self.returned) as usize
    }

    /// Pulls until enough is in flight, or the source ends or is not ready.
    pub(super) fn refill(&mut self, held: usize, cx: &mut Context<'_>) {
        if self.progress.is_some() {
            self.began.get_or_insert_with(Instant::now);
        }
        if self.pool.shared().config.max_waiting.is_some() && self.group.items().is_cancelled {
            // It was cancelled before there was room for it.
            return self.end();
        }
        let options = &self.group.options;
        let (limits, first_attempt) = (options.limits, options.first_attempt);
        // Their number may change meanwhile; waiting callers are then woken.
        let workers = self.pool.shared().slots(self.group.is_brief());
        let (mut chunks, mut bytes, mut is_large_ahead) = (Vec::new(), 0, false);
        let mut since = None;
        while let Some((input, _)) = &mut self.input {
            let size = self.group.chunk_size().max(1);
            let in_flight = (self.pulled - self.returned) as usize;
            let is_enough = in_flight + held >= workers * size * CHUNKS_AHEAD;
            is_large_ahead = !is_enough && in_flight > 0 && self.group.bytes() >= BYTES_AHEAD;
            if is_enough || is_large_ahead {
                // A place in line whose turn has come goes to the next caller.
                self.leave_line();
                break;
            }
            // Towards the end chunks become smaller, so that all workers end at about the same time.
            let most = match (self.group.options.chunk, input.remaining()) {
                (0, remaining) if remaining > 0 => size.min((remaining / (2 * workers)).max(1)),
                _ => size,
            };
            // A caller that only tries does not stay in line.
            let waker = Some(cx.waker()).filter(|waker| !waker.will_wake(Waker::noop()));
            let most = self.pool.shared().reserve(&self.group, most, &mut self.place, waker);
            if most == 0 {
                break;
            }
            let mut chunk = Chunk::new(self.pulled);
            chunk.attempt = first_attempt;
            if most > 1 {
                chunk.body.reserve((most * 16).min(limits.bytes));
            }
            // A single one waits for none.
            if since.is_none() && input.remaining() != 1 {
                since = Some(Since::now());
            }
            let stop = input.fill(&mut chunk, Most { items: most, bytes: limits.bytes }, cx);
            self.pulled += u64::from(chunk.count);
            self.pool.shared().give_back(&self.group, most - chunk.count as usize);
            // Small ones are submitted together: the first worker that is woken may take this CPU before the others are.
            let len = chunk.bytes().len();
            bytes += len;
            // Nor do workers wait for a source that takes its time.
            if chunk.count > 0 {
                chunks.push(chunk);
            }
            let is_late = since.as_ref().is_some_and(|since| match len >= TOGETHER / 16 {
                true => since.is_long_ago(),
                // Fewer looks at a source that has been quick so far; one that is slow now holds at most two back.
                false => matches!(chunks.len(), 0..=2 | 4 | 6 | 8 | 10 | 12 | 14) && since.is_a_tick_ago(),
            });
            let is_over = !matches!(stop, Stop::Full);
            if is_over || is_late || bytes >= TOGETHER || chunks.len() >= 16 {
                self.submit(&mut chunks);
                (bytes, since) = (0, None);
            }
            match stop {
                Stop::Full => {}
                Stop::NotYet => return self.group.wake_at(usize::MAX),
                Stop::Failed(error) => {
                    self.group.settle_here(self.pulled, error);
                    self.pulled += 1;
                }
                Stop::Panicked(error) => {
                    self.failed = Some((self.pulled, error));
                    self.end();
                }
                Stop::End => self.end(),
            }
        }
        self.submit(&mut chunks);
        if self.group.options.gathers {
            // With half of the items still out, workers have enough to do until more comes, unless that is over before we are awake.
            // Without more, only the end matters.
            let low = match &self.input {
                // A few large items do not keep all workers busy until half of them are done.
                Some(_) if is_large_ahead || self.group.order_ns(self.in_flight()) < WORTH_HALVING_NS => usize::MAX,
                Some(_) => self.in_flight() / 2,
                None => 0,
            };
            self.group.wake_at(low);
        }
    }

    fn submit(&self, chunks: &mut Vec<Chunk>) {
        if !chunks.is_empty() {
            self.pool.shared().submit(&self.group, std::mem::take(chunks));
        }
    }

    fn end(&mut self) {
        self.input = None;
        self.leave_line();
    }

    /// Waits for room no longer.
    fn leave_line(&mut self) {
        if let Some(place) = self.place.take() {
            self.pool.shared().leave_line(place);
        }
    }

    /// The next outcomes in any order; `None` after the last. `held` outcomes wait for their turn.
    pub(super) fn poll_next(&mut self, held: usize, cx: &mut Context<'_>) -> Poll<Option<ResultBatch>> {
        if let Err(error) = check_forked() {
            return Poll::Ready(Some(ResultBatch::failed(0, error)));
        }
        let coop = ready!(tokio::task::coop::poll_proceed(cx));
        self.refill(held, cx);
        let next = ready!(self.poll_batch(cx));
        coop.made_progress();
        self.spinner = Spinner::default();
        if let Some(batch) = &next {
            // The source's own error is no item.
            self.returned = (self.returned + u64::from(batch.count())).min(self.pulled);
            self.report_progress(batch);
            // A caller that takes its time with slow items may leave other callers waiting for results that come meanwhile.
            if self.others_wait() || self.in_flight() > 0 && !self.group.is_quick() {
                self.pool.shared().arm_alarm();
            }
        }
        Poll::Ready(next)
    }

    #[inline]
    fn report_progress(&mut self, batch: &ResultBatch) {
        let Some(progress) = &self.progress else { return };
        let elapsed = self.began.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
        let total = self.pulled - self.group.options.first_index
            + self.input.as_ref().map_or(0, |(input, _)| input.remaining() as u64);
        progress.send_modify(|progress| {
            progress.done += u64::from(batch.count());
            progress.failed += u64::from(batch.failures());
            progress.total = total.max(progress.done);
            progress.rate = if elapsed > 0.0 { progress.done as f64 / elapsed } else { 0.0 };
        });
    }

    fn poll_batch(&mut self, cx: &mut Context<'_>) -> Poll<Option<ResultBatch>> {
        if let Some(batch) = self.group.take_done() {
            return Poll::Ready(Some(batch));
        }
        if self.in_flight() == 0 {
            // Without a source this is the end; with one, it wakes us.
            return match &self.input {
                Some(_) => {
                    if self.place.is_some() {
                        // Whoever spins for the items before it may not be polled again.
                        self.pool.shared().arm_alarm();
                    }
                    Poll::Pending
                }
                None => Poll::Ready(self.failed.take().map(|(index, error)| ResultBatch::failed(index, error))),
            };
        }
        let (shared, group) = (self.pool.shared(), &self.group);
        if !shared.has_processes() {
            // The taker wakes us when it settles an item.
            return group.take_done_or_wait(cx).map_or(Poll::Pending, |batch| Poll::Ready(Some(batch)));
        }
        let Some(alarm) = shared.alarm() else { return Poll::Pending };
        if self.is_bulk() {
            if shared.should_collect() {
                shared.pump();
            }
            if let Some(batch) = group.take_done_or_wait(cx) {
                return Poll::Ready(Some(batch));
            }
            shared.arm_alarm_for_bulk();
            return group.take_done().map_or(Poll::Pending, |batch| Poll::Ready(Some(batch)));
        }
        let mut attempt = || {
            shared.try_pump();
            group.take_done()
        };
        if let Some(batch) = attempt() {
            return Poll::Ready(Some(batch));
        }
        // A caller that spins need not be woken. But other callers must not depend on our being polled.
        if !self.others_wait() {
            alarm.disarm();
            // A caller that came, armed it and went to sleep in between is seen now.
            if self.others_wait() {
                shared.arm_alarm();
            }
        }
        // As a rule its result is not there before spinning has given up.
        let is_long = !group.options.is_many && group.item_time().is_some_and(|time| time > Spin::LONGEST);
        let spun = if is_long { Spun::Over } else { self.spinner.spin(alarm, &mut attempt) };
        match spun {
            Spun::Found(batch) => Poll::Ready(Some(batch)),
            Spun::Again => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Spun::Over => {
                if let Some(batch) = group.take_done_or_wait(cx) {
                    return Poll::Ready(Some(batch));
                }
                shared.arm_alarm();
                // It may have been delivered to the waker just left there, by ourselves.
                group.take_done().map_or(Poll::Pending, |batch| Poll::Ready(Some(batch)))
            }
        }
    }

    /// Returns `true` if it is better to leave the CPU to the workers than to spin.
    fn is_bulk(&self) -> bool {
        let chunk = self.group.chunk_size();
        if !self.group.is_bulk() || chunk < BULK && self.group.order_ns(chunk) < WORTH_SLEEPING_NS {
            return false;
        }
        let out = self.group.items().out;
        out >= 2 * chunk && !self.others_wait()
    }

    /// Returns `true` if other callers wait for items of theirs, or for what becomes of these.
    fn others_wait(&self) -> bool {
        // Its own place in line is not another's.
        self.pool.shared().out() > self.group.items().out + usize::from(self.place.is_some())
    }

    /// Returns `true` if its source has something that was not submitted.
    pub(super) fn is_held_back(&self) -> bool {
        self.input.is_some()
    }

    /// The caller does not wait any more: items that run are stopped, and items that were not submitted never are.
    pub(super) fn cancel(&self) {
        self.pool.shared().cancel(&self.group);
        if let Some(place) = self.place {
            self.pool.shared().leave_line(place);
        }
    }

    /// Lets the items that were submitted go on alone.
    pub(super) fn detach(&mut self) {
        self.returned = self.pulled;
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if fork::is_forked() {
            return;
        }
        self.leave_line();
        if self.in_flight() > 0 {
            self.pool.shared().cancel(&self.group);
        }
        // Others may have relied on our looking.
        self.pool.shared().arm_alarm();
        // Last, as the source is the user's, and its drop may panic.
        self.end();
    }
}

/// A call that has not begun, or a flight.
pub(super) enum Stage {
    /// With a ticket if it counts as asked for, and not only once it is begun.
    Planned {
        pool: Arc<PoolLifetime>,
        target: Target,
        options: Options,
        input: Box<dyn Input>,
        ticket: Option<OpenCall>,
    },
    Flying(Flight),
    Failed(Error),
    Over,
}

/// A call of one item, to be made again.
pub(super) struct Plan {
    pool: Arc<PoolLifetime>,
    target: Target,
    pub(super) options: Options,
    input: Box<dyn Input>,
    /// The call stays open between its attempts. `None` if the pool was closed before the first.
    ticket: Option<OpenCall>,
}

impl Plan {
    /// The call, for the attempt of this number.
    pub(super) fn stage(&self, attempt: u32) -> Option<Stage> {
        let (pool, target, input) = (self.pool.clone(), self.target, self.input.again()?);
        let options = Options { first_attempt: attempt, is_admitted: true, ..self.options.clone() };
        let ticket = Some(self.ticket.as_ref()?.again());
        Some(Stage::Planned { pool, target, options, input, ticket })
    }
}

impl Stage {
    /// The parts for making this call again, if it has not begun.
    pub(super) fn plan(&mut self) -> Option<Plan> {
        let Stage::Planned { pool, target, options, input, ticket } = self else { return None };
        options.number.get_or_insert_with(next_number);
        let (options, input) = (options.clone(), input.again()?);
        let ticket = match ticket {
            Some(ticket) => Some(ticket.again()),
            None => OpenCall::of(pool, options.checkout).ok(),
        };
        Some(Plan { pool: pool.clone(), target: *target, options, input, ticket })
    }

    /// Gives this call a listener for the events of its items, if it has not begun and has none.
    pub(super) fn listen<E: Item>(&mut self) -> (Events<E>, Option<EndOfEvents>) {
        let (pool, options, input) = match self {
            Stage::Planned { pool, options, input, .. } if !options.has_events => (pool, options, input),
            Stage::Failed(error) => return (Events::failed(Error::copy(error)), None),
            _ => return (Events::late(), None),
        };
        let is_here = pool.shared().taker().is_none_or(|taker| taker.is_here());
        let made = if is_here { events::listen(input) } else { Err(events::elsewhere()) };
        match made {
            Ok((events, end)) => {
                // Items that travel alone are pulled ahead as such.
                (options.has_events, options.chunk) = (true, 1);
                (events, Some(end))
            }
            Err(error) => {
                *self = Stage::Failed(Error::copy(&error));
                (Events::failed(error), None)
            }
        }
    }

    /// Returns `true` if all of its items were submitted, or cannot be.
    pub(super) fn has_begun(&self) -> bool {
        match self {
            Stage::Planned { .. } => false,
            Stage::Flying(flight) => !flight.is_held_back(),
            Stage::Failed(_) | Stage::Over => true,
        }
    }

    /// Its caller does something else now: it stands in no line meanwhile.
    pub(super) fn leave_line(&mut self) {
        if let Stage::Flying(flight) = self {
            flight.leave_line();
        }
    }

    pub(super) fn options(&mut self) -> Option<&mut Options> {
        match self {
            Stage::Planned { options, .. } => Some(options),
            _ => None,
        }
    }

    pub(super) fn flight(&mut self) -> Result<Option<&mut Flight>> {
        if matches!(self, Stage::Planned { .. } | Stage::Failed(_)) {
            match std::mem::replace(self, Stage::Over) {
                Stage::Planned { pool, target, options, input, ticket } => {
                    *self = Stage::Flying(Flight::start(pool, target, options, input, ticket)?);
                }
                Stage::Failed(error) => return Err(error),
                Stage::Flying(_) | Stage::Over => {}
            }
        }
        Ok(match self {
            Stage::Flying(flight) => Some(flight),
            _ => None,
        })
    }

    pub(super) fn poll_next(&mut self, held: usize, cx: &mut Context<'_>) -> Poll<Option<ResultBatch>> {
        match self.flight() {
            Ok(Some(flight)) => flight.poll_next(held, cx),
            Ok(None) => Poll::Ready(None),
            Err(error) => Poll::Ready(Some(ResultBatch::failed(0, error))),
        }
    }
}
