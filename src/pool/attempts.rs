//! Calls that are made again after results for which a predicate holds. The predicate is asked in the caller's task, with the decoded
//! result, so each item is a call of its own here.

use super::call_items::next_number;
use super::chunk::Chunk;
use super::engine::PoolLifetime;
use super::flight::{OpenCall, Plan, Stage, Target};
use super::input::{Input, Most, One, Stop};
use super::options::{Options, Progress};
use super::retry::Predicate;
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::timer;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;
use tokio::sync::watch;

/// The parts for making a call again after its result.
pub(super) struct Again<R> {
    condition: Predicate<R>,
    tried: u32,
    /// The call as it was submitted; made when it begins.
    plan: Option<Plan>,
    /// The time before the next attempt.
    rest: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl<R> Again<R> {
    pub(super) fn new(condition: Predicate<R>) -> Self {
        Self { condition, tried: 0, plan: None, rest: None }
    }

    /// To be called before each poll of `stage`: keeps what another attempt needs, and is ready when it is time for that.
    pub(super) fn poll_ready(&mut self, stage: &mut Stage, cx: &mut Context<'_>) -> Poll<()> {
        if self.plan.is_none() {
            self.plan = stage.plan();
        }
        if let Some(rest) = &mut self.rest {
            ready!(rest.as_mut().poll(cx));
            self.rest = None;
        }
        Poll::Ready(())
    }

    /// The call once more, if its result is one to be tried again.
    pub(super) fn next(&mut self, result: &Result<R>) -> Option<Stage> {
        let plan = self.plan.as_ref()?;
        let is_over =
            |error: &Error| matches!(error.kind(), ErrorKind::Cancelled | ErrorKind::Closed | ErrorKind::Full);
        if self.tried >= plan.options.retries || result.as_ref().is_err_and(is_over) || !(self.condition)(result) {
            return None;
        }
        let stage = plan.stage(self.tried + 1)?;
        let wait = plan.options.back_off.saturating_mul(1 << self.tried.min(16));
        self.rest = (!wait.is_zero()).then(|| Box::pin(timer::sleep(wait)) as _);
        self.tried += 1;
        Some(stage)
    }
}

/// The result of a call of one item.
pub(super) fn poll_one<R: DeserializeOwned + 'static>(stage: &mut Stage, cx: &mut Context<'_>) -> Poll<Result<R>> {
    let done = ready!(stage.poll_next(0, cx));
    *stage = Stage::Over;
    Poll::Ready(match done {
        Some(mut batch) => batch.next().unwrap_or_else(|| Err(Error::other("a result is missing"))),
        None => Err(Error::other("the result of this call has already been taken").explained_by(Topic::ResultTaken)),
    })
}

/// One item of a call on many, with its attempts.
struct Single<R> {
    index: u64,
    stage: Stage,
    again: Again<R>,
}

impl<R> Unpin for Single<R> {}

impl<R: DeserializeOwned + 'static> Future for Single<R> {
    type Output = (u64, Result<R>);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        loop {
            ready!(this.again.poll_ready(&mut this.stage, cx));
            let result = ready!(poll_one(&mut this.stage, cx));
            match this.again.next(&result) {
                Some(stage) => {
                    this.stage = stage;
                    // Attempts that end at once leave other tasks their turns.
                    ready!(tokio::task::coop::poll_proceed(cx)).made_progress();
                }
                None => return Poll::Ready((this.index, result)),
            }
        }
    }
}

/// Items in flight per worker.
const AHEAD: usize = 4;

/// The items of a call on many, each with its attempts.
pub(super) struct Singles<R> {
    pool: Arc<PoolLifetime>,
    target: Target,
    options: Options,
    condition: Predicate<R>,
    input: Option<(Box<dyn Input>, OpenCall)>,
    running: FuturesUnordered<Single<R>>,
    /// The one that waits for room in the pool.
    held: Option<Single<R>>,
    /// Items that could not be submitted, or ended as they were.
    ended: VecDeque<(u64, Result<R>)>,
    /// The source's own error, which comes last.
    last: Option<(u64, Error)>,
    pulled: u64,
    /// Results whose turn has not come.
    early: BTreeMap<u64, Result<R>>,
    next: u64,
    progress: Option<(watch::Sender<Progress>, Instant)>,
}

impl<R> Singles<R> {
    /// Takes `stage` over, which has not begun.
    ///
    /// # Errors
    /// `Closed` if the pool is; and the error that the call has already.
    pub(super) fn start(stage: &mut Stage, condition: Predicate<R>) -> Result<Option<Self>> {
        let (pool, target, mut options, input, ticket) = match std::mem::replace(stage, Stage::Over) {
            Stage::Planned { pool, target, options, input, ticket } => (pool, target, options, input, ticket),
            Stage::Failed(error) => return Err(error),
            other => {
                *stage = other;
                return Ok(None);
            }
        };
        let ticket = ticket.map_or_else(|| OpenCall::of(&pool, options.checkout), Ok)?;
        options.number.get_or_insert_with(next_number);
        let progress = options.progress.take().map(|progress| (progress, Instant::now()));
        Ok(Some(Self {
            pool,
            target,
            options,
            condition,
            input: Some((input, ticket)),
            running: FuturesUnordered::new(),
            held: None,
            ended: VecDeque::new(),
            last: None,
            pulled: 0,
            early: BTreeMap::new(),
            next: 0,
            progress,
        }))
    }

    /// `held` results wait for their turn.
    fn refill(&mut self, held: usize, cx: &mut Context<'_>)
    where
        R: DeserializeOwned + 'static,
    {
        let most = AHEAD * self.pool.shared().slots(false).max(1);
        if let Some(held) = self.held.take() {
            self.begin(held, cx);
        }
        while self.held.is_none() && self.running.len() + held + self.ended.len() < most {
            let Some((input, ticket)) = &mut self.input else { return };
            let mut chunk = Chunk::new(self.pulled);
            let stop = input.fill(&mut chunk, Most { items: 1, bytes: usize::MAX }, cx);
            if chunk.count > 0 {
                let (pool, target, ticket) = (self.pool.clone(), self.target, Some(ticket.again()));
                let options = Options { first_index: self.pulled, ..self.options.clone() };
                let stage = Stage::Planned { pool, target, options, input: Box::new(One::of_chunk(chunk)), ticket };
                let again = Again::new(self.condition.clone());
                self.begin(Single { index: self.pulled, stage, again }, cx);
                self.pulled += 1;
            }
            match stop {
                Stop::Full => {}
                Stop::NotYet => return,
                Stop::Failed(error) => {
                    self.ended.push_back((self.pulled, Err(error)));
                    self.pulled += 1;
                }
                Stop::Panicked(error) => {
                    self.last = Some((self.pulled, error));
                    self.input = None;
                }
                Stop::End => self.input = None,
            }
        }
    }

    /// Submits an item. If there is no room for it, it waits for that: one at a time, which gives up its place in line with
    /// [`leave_line`](Self::leave_line).
    fn begin(&mut self, mut single: Single<R>, cx: &mut Context<'_>)
    where
        R: DeserializeOwned + 'static,
    {
        if self.pool.shared().config.max_waiting.is_none() {
            return self.running.push(single);
        }
        match Pin::new(&mut single).poll(cx) {
            Poll::Ready(ended) => self.ended.push_back(ended),
            // A further attempt needs no room.
            Poll::Pending if single.again.tried == 0 && !single.stage.has_begun() => self.held = Some(single),
            Poll::Pending => self.running.push(single),
        }
    }

    /// The caller does something else now.
    pub(super) fn leave_line(&mut self) {
        self.held.iter_mut().for_each(|single| single.stage.leave_line());
    }

    fn report_progress(&self, result: &Result<R>) {
        let Some((progress, began)) = &self.progress else { return };
        let total = self.pulled + self.input.as_ref().map_or(0, |(input, _)| input.remaining() as u64);
        let elapsed = began.elapsed().as_secs_f64();
        progress.send_modify(|progress| {
            progress.done += 1;
            progress.failed += u64::from(result.is_err());
            progress.total = total.max(progress.done);
            progress.rate = if elapsed > 0.0 { progress.done as f64 / elapsed } else { 0.0 };
        });
    }
}

impl<R: DeserializeOwned + 'static> Singles<R> {
    /// The next result, in any order; `None` after the last.
    pub(super) fn poll_any(&mut self, cx: &mut Context<'_>) -> Poll<Option<(u64, Result<R>)>> {
        self.poll_beside(self.early.len(), cx)
    }

    /// `held` results wait for their turn.
    fn poll_beside(&mut self, held: usize, cx: &mut Context<'_>) -> Poll<Option<(u64, Result<R>)>> {
        self.refill(held, cx);
        let next = match self.ended.pop_front() {
            Some(ended) => Some(ended),
            None => match self.running.poll_next_unpin(cx) {
                Poll::Ready(None) if self.input.is_some() || self.held.is_some() => return Poll::Pending,
                next => ready!(next).or_else(|| self.last.take().map(|(index, error)| (index, Err(error)))),
            },
        };
        if let Some((_, result)) = &next {
            self.report_progress(result);
        }
        Poll::Ready(next)
    }

    /// The next result in order, or the first failure at once; `None` after the last.
    pub(super) fn poll_failing_first(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<R>>> {
        loop {
            if let Some(result) = self.early.remove(&self.next) {
                self.next += 1;
                return Poll::Ready(Some(result));
            }
            // Results that wait for their turn count as taken: all of them are wanted.
            match ready!(self.poll_beside(0, cx)) {
                Some((_, Err(error))) => return Poll::Ready(Some(Err(error))),
                Some((index, result)) => self.early.insert(index, result),
                None => return Poll::Ready(None),
            };
        }
    }

    /// The next result in order; `None` after the last.
    pub(super) fn poll_in_order(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<R>>> {
        loop {
            if let Some(result) = self.early.remove(&self.next) {
                self.next += 1;
                return Poll::Ready(Some(result));
            }
            match ready!(self.poll_any(cx)) {
                Some((index, result)) => self.early.insert(index, result),
                None => return Poll::Ready(None),
            };
        }
    }
}
