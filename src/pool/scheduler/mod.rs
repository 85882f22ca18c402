//! The scheduler of a pool: a state machine. Events go in, orders and kills go out.
//!
//! Each method that is public to the pool is an event: items were submitted, results have arrived, a worker has come or
//! has ended, a deadline has passed, the pool was resized or closed. Each ends in [`Scheduler::advance`], the one place
//! that gives orders. What is left to do once the lock is free comes out as [`Effects`]. Nothing in here waits, decodes,
//! or runs code of the user's.
//!
//! # Invariants
//! 1. Each item is settled once: by its result, or by what happened to its worker, its call or the pool.
//! 2. When an event is over no item waits while a worker is idle, but for items that are over before another worker
//!    could be woken for them, as long as as many workers as there are CPUs are awake with such items (see `dispatch`).
//! 3. No event walks over seats or calls on the path of an item: `seats` has a set for each question.
//! 4. An item with a deadline has a timer, as long as it matters.

mod deadlines;
mod dispatch;
mod queue;
mod results;
mod room;
mod scaling;
mod seats;
mod taken;
mod teardown;
mod worker;

#[cfg(all(test, not(multiprocess_loom)))]
mod tests;

use super::config::Config;
use super::group::{Chunk, Group, ResultBatch, UsualTime};
use super::side_channel::{SideOrders, SideResults, Unsent};
use super::stats::{Histogram, PoolStats, WorkerStats};
use super::trace::TraceSink;
use crate::channel::lane::{Board, PoolEnd};
use crate::error::{Error, ErrorKind, Result};
use crate::process::cpu_count;
use crate::wire::EncodedMessage;
use deadlines::{Event, Timer};
use queue::Queue;
use room::Room;
use seats::{SeatSet, Seats};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::ops::RangeInclusive;
use std::process::ExitStatus;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};
pub(super) use taken::TakenOrder;
use taken::TakenOrders;
pub(super) use worker::{Circumstances, Control};
use worker::{Phase, Worker};

/// Orders that wait at a worker behind the one it runs, if they are known to be over soon.
const PREFETCH: usize = 3;
const DEPTH: usize = 1 + PREFETCH;

/// What is to be looked at again is not before this, however short its time: a timer that is due at once, again and
/// again, would never let go of the lock.
const AGAIN: Duration = Duration::from_millis(1);

/// The driver looks into all lanes this often at most.
const SWEEP: Duration = Duration::from_millis(100);

/// To look into so many lanes costs less than to look for their marks.
const FEW: usize = 8;

/// A worker that has not come up after this does not come up.
const STARTS: Duration = Duration::from_secs(10);

pub(super) struct Scheduler {
    config: Arc<Config>,
    board: Arc<Board>,
    /// How many workers there are to be, from the least to the most.
    workers: RangeInclusive<usize>,
    seats: Seats,
    queue: Queue,
    /// Workers that are checked out, and what waits for each.
    checkouts: HashMap<u64, CheckedOut>,
    /// How long items of each function take.
    usual_times: HashMap<[u64; 2], Arc<UsualTime>>,
    timers: BinaryHeap<Reverse<Timer>>,
    /// With more than this, those that matter no more are let go of.
    most_timers: usize,
    /// When the driver looks at the timers next.
    alert: Option<Instant>,
    /// Calls that may still add items.
    open: usize,
    /// Items handed in and not settled.
    out: usize,
    /// Items that no worker has, but for those of checkouts.
    waiting: usize,
    /// Chunks that any worker may have and none has.
    waiting_chunks: usize,
    /// For items that wait.
    room: Room,
    /// In a pool of so many seats all lanes are looked into.
    few: usize,
    /// So many workers are kept awake with brief items before another is woken.
    awake: usize,
    /// That number is doubled so often, as those did not get on.
    boost: u32,
    is_closed: bool,
    is_terminated: bool,
    is_shut: bool,
    /// Nobody drives any more.
    is_abandoned: bool,
    /// The pool's runtime ended before the pool.
    is_orphaned: bool,
    is_share_planned: bool,
    is_idle_planned: bool,
    is_quiet_check_planned: bool,
    is_fetch_planned: bool,
    is_spawn_planned: Option<Instant>,
    /// Workers that were killed because they did not end.
    late: u64,
    broken: Option<String>,
    generation: u64,
    waits: Histogram,
    runs: Histogram,
    checkouts_made: u64,
    /// What initializers had to say, until the driver has read it.
    reports: Vec<(usize, u64, Result<EncodedMessage>)>,
    /// Workers in whose pipes results may lie.
    side_result_seats: SeatSet,
    /// Orders that are executed elsewhere, in a pool without worker processes.
    taken: TakenOrders,
    /// When the driver looks into all lanes again, if it is awake.
    next_sweep: Instant,
}

/// A worker that is checked out.
#[derive(Default)]
struct CheckedOut {
    /// As long as it lives.
    seat: Option<usize>,
    queue: Queue,
}

/// A worker that is to be started.
pub(super) struct Spawn {
    pub(super) seat: usize,
    pub(super) generation: u64,
}

/// A worker that was started.
pub(super) struct Spawned {
    pub(super) name: String,
    pub(super) pid: u32,
    pub(super) control: Box<dyn Control>,
    pub(super) lane: PoolEnd,
    pub(super) side_orders: Arc<SideOrders>,
    pub(super) side_results: Arc<SideResults>,
}

/// Which order, of which worker.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    seat: usize,
    generation: u64,
    number: u32,
}

/// What the driver is to do.
pub(super) struct Step {
    pub(super) spawns: Vec<Spawn>,
    /// What initializers had to say.
    pub(super) begun: Vec<(usize, u64, Result<EncodedMessage>)>,
    /// Where results lie that nobody fetches.
    pub(super) unfetched: Vec<Arc<SideResults>>,
    pub(super) until: Option<Instant>,
    /// No worker is to be started any more.
    pub(super) is_unneeded: bool,
    pub(super) is_over: bool,
}

/// What is left to do once the lock is free.
#[derive(Default)]
pub(super) struct Effects {
    pub(super) wakers: Vec<Waker>,
    settled: usize,
    pub(super) nudge: bool,
    /// What executes this pool's items is to look at the pool.
    pub(super) notify_taker: bool,
    /// Something lies in a pipe, and for too long in these.
    has_side_results: bool,
    unfetched: Vec<Arc<SideResults>>,
    /// Where large orders are to be sent from.
    pub(super) side_orders: Vec<Arc<SideOrders>>,
    /// What could not be sent.
    pub(super) unsent: Vec<(Arc<SideOrders>, Unsent)>,
    /// Items that ended after their time, each as a chunk of its own, and at whom.
    late_items: Vec<(Arc<Group>, Chunk, String)>,
    /// Who has received something.
    pub(super) trace_sinks: Vec<Arc<TraceSink>>,
    /// Unsettled items of those who are woken.
    woken: usize,
    /// Who was killed because it did not end within its time.
    pub(super) late: Vec<(String, Duration)>,
    now: Option<Instant>,
    /// Whose orders have come to their end, how many items those were, and how long they took if their worker says so.
    ended: Vec<(Arc<Group>, u32, Option<Duration>)>,
}

impl Effects {
    /// When this was begun: one look at the clock does for all that is done in one go.
    fn now(&mut self) -> Instant {
        *self.now.get_or_insert_with(Instant::now)
    }

    fn deliver(&mut self, group: &Group, batch: ResultBatch) {
        self.settled += batch.count() as usize;
        if let Some((waker, out)) = group.deliver(batch) {
            self.wakers.push(waker);
            self.woken += out;
        }
    }

    /// The next result in a worker's pipe is that of an item.
    fn announce(&mut self, side_results: &Arc<SideResults>, group: &Arc<Group>, index: u64, tag: u8) {
        self.settled += 1;
        self.has_side_results = true;
        if let Some((waker, out)) = side_results.expect(group, index, tag) {
            self.wakers.push(waker);
            self.woken += out;
        }
    }

    /// Settles the items of `chunk` from `from` on, before `to`.
    fn fail(&mut self, group: &Group, chunk: &Chunk, (from, to): (u32, u32), error: impl Fn() -> Error) {
        (from..to).for_each(|at| self.deliver(group, ResultBatch::failed(chunk.first + u64::from(at), error())));
    }

    /// The same for all of a chunk that was never given out.
    fn fail_pending(&mut self, group: &Group, chunk: &Chunk, error: impl Fn() -> Error) {
        self.fail(group, chunk, (0, chunk.count), error);
        group.forget(chunk);
    }
}

// Events of callers.
impl Scheduler {
    pub(super) fn new(config: Arc<Config>, board: Arc<Board>) -> Self {
        let workers = config.workers.clone();
        // Who says which CPUs its workers have does not want them to be chosen by us.
        let awake = if config.cpus.is_empty() { cpu_count() } else { usize::MAX };
        let room = Room::new(config.max_waiting);
        let mut scheduler = Self {
            config,
            board,
            workers,
            seats: Seats::default(),
            queue: Queue::default(),
            checkouts: HashMap::new(),
            usual_times: HashMap::new(),
            timers: BinaryHeap::new(),
            most_timers: 0,
            alert: None,
            open: 0,
            out: 0,
            waiting: 0,
            waiting_chunks: 0,
            room,
            few: FEW,
            awake,
            boost: 0,
            is_closed: false,
            is_terminated: false,
            is_shut: false,
            is_abandoned: false,
            is_orphaned: false,
            is_share_planned: false,
            is_idle_planned: false,
            is_quiet_check_planned: false,
            is_fetch_planned: false,
            is_spawn_planned: None,
            late: 0,
            broken: None,
            generation: 0,
            waits: Histogram::default(),
            runs: Histogram::default(),
            checkouts_made: 0,
            reports: Vec::new(),
            side_result_seats: SeatSet::default(),
            taken: TakenOrders::default(),
            next_sweep: Instant::now(),
        };
        scheduler.open_seats();
        scheduler
    }

    /// The end of every event: gives out what waits, and sees to what follows from that.
    fn advance(&mut self, effects: &mut Effects) {
        self.dispatch(effects);
        self.end_if_done(effects);
    }

    /// The caller lets go of the lock: how many items are out now, workers at their initializers included.
    pub(super) fn leave(&mut self, effects: &mut Effects) -> usize {
        effects.notify_taker = self.taken.take_notice();
        self.room.pass_on(self.waiting, &mut effects.wakers);
        self.out -= effects.settled;
        self.seats.update();
        self.out + self.seats.index().beginning.len()
    }

    /// Something begins that adds items: a call, or a checkout. Calls of a checkout, whose number is `checkout`, go on after a
    /// close, for it was taken before.
    pub(super) fn opened(&mut self, checkout: u64) -> Result<()> {
        if self.is_orphaned {
            return Err(orphaned());
        }
        if self.is_closed && (checkout == 0 || self.is_shut || self.is_terminated) {
            return Err(Error::closed("pool"));
        }
        if let Some(why) = &self.broken {
            return Err(broken(why));
        }
        self.open += 1;
        Ok(())
    }

    /// It adds no more.
    pub(super) fn finished(&mut self, effects: &mut Effects) {
        self.open -= 1;
        self.end_if_done(effects);
    }

    /// Chunks were handed in.
    pub(super) fn submitted(&mut self, group: &Arc<Group>, mut chunks: Vec<Chunk>, effects: &mut Effects) {
        let items = chunks.iter().map(|chunk| chunk.count as usize).sum::<usize>();
        group.items().out += items;
        self.out += items;
        if group.is_bounded() {
            self.room.give_back(items);
        }
        group.set_usual_time(|| self.usual_time(group));
        if group.options.queue_timeout.is_some() {
            let now = effects.now();
            chunks.iter_mut().for_each(|chunk| chunk.queued = Some(now));
            self.watch_queue(group, now, effects);
        }
        let refused = self.gave_up().or_else(|| self.broken.as_deref().map(broken));
        if let Some(error) = refused {
            chunks.iter().for_each(|chunk| effects.fail(group, chunk, (0, chunk.count), || Error::copy(&error)));
            return;
        }
        let new = chunks.len();
        self.enqueue(group, chunks.drain(..), false);
        self.advance(effects);
        // What found a worker at once needs no clock to tell how long it waited.
        let mut items = group.items();
        let waiting = items.pending.len().min(new);
        if waiting > 0 {
            let now = effects.now();
            items.pending.iter_mut().rev().take(waiting).for_each(|chunk| _ = chunk.handed.get_or_insert(now));
        }
    }

    /// A caller is about to take up to `wanted` items from their source: for how many there is room. If for none, `waker` is
    /// woken when there is.
    pub(super) fn room_wanted(&mut self, wanted: usize, ticket: &mut Option<u64>, waker: Option<&Waker>) -> usize {
        self.room.reserve(self.waiting, wanted, ticket, waker)
    }

    /// There were fewer items than there was room for.
    pub(super) fn room_left_over(&mut self, items: usize) {
        self.room.give_back(items);
    }

    /// A caller waits for room no longer.
    pub(super) fn room_not_wanted(&mut self, ticket: u64) {
        self.room.leave(ticket);
    }

    fn usual_time(&mut self, group: &Group) -> Arc<UsualTime> {
        self.usual_times.entry(group.call.to_words()).or_default().clone()
    }

    /// Nobody waits for the rest of these items: what has not started never does, what runs is asked, then killed.
    pub(super) fn cancelled(&mut self, group: &Arc<Group>, effects: &mut Effects) {
        if std::mem::replace(&mut group.items().is_cancelled, true) {
            return;
        }
        let is_queued = group.items().is_queued;
        let pending = self.take_pending(group);
        if is_queued {
            self.queue_of(group).into_iter().for_each(Queue::was_emptied);
        }
        pending.iter().for_each(|chunk| effects.fail_pending(group, chunk, || group.was_cancelled()));
        self.forget_retries(group, effects);
        self.revoke(group, effects);
        self.cancel_taken(group, effects);
        self.plan_quiet_check(effects);
        self.advance(effects);
    }

    /// The number of a new checkout.
    pub(super) fn new_checkout(&mut self) -> u64 {
        self.checkouts_made += 1;
        self.checkouts_made
    }

    /// The worker of a checkout is everybody's again.
    pub(super) fn released(&mut self, checkout: u64, effects: &mut Effects) {
        if let Some(seat) = self.checkouts.get(&checkout).and_then(|checked_out| checked_out.seat)
            && let Some(worker) = self.seats.worker(seat).filter(|worker| worker.checkout == checkout)
        {
            worker.checkout = 0;
            if worker.is_due || worker.given >= worker.share {
                self.retire(seat, effects);
            }
        }
        self.fail_checkout(checkout, effects);
        self.plan_quiet_check(effects);
        self.advance(effects);
    }

    // Events of workers.

    /// Results may have arrived: takes them in, if there are any. Whether there are items out whose callers have not been
    /// woken.
    pub(super) fn results_arrived(&mut self, effects: &mut Effects) -> bool {
        if self.collect(effects) {
            self.advance(effects);
        }
        self.out - effects.settled > effects.woken
    }

    /// Somebody is about to sleep, and has armed the alarm before.
    pub(super) fn about_to_sleep(&mut self, effects: &mut Effects) {
        if self.has_results() && self.collect(effects) {
            self.advance(effects);
        }
        self.plan_quiet_check(effects);
    }

    /// The same for who has many quick items out: it need not hear of results before a worker begins its last order.
    pub(super) fn about_to_sleep_in_bulk(&mut self, effects: &mut Effects) {
        if self.should_collect() && self.collect(effects) {
            self.advance(effects);
        }
        self.plan_quiet_check(effects);
    }

    /// A worker was started.
    pub(super) fn spawned(&mut self, Spawn { seat, generation }: &Spawn, spawned: Spawned, effects: &mut Effects) {
        let (seat, generation) = (*seat, *generation);
        let has_initializer = self.config.initializer.is_some();
        let phase = match (self.is_terminated, has_initializer) {
            (true, _) => Phase::Killed,
            (false, true) => Phase::Beginning,
            (false, false) => Phase::Serving,
        };
        if phase == Phase::Killed {
            spawned.control.kill();
        }
        let now = effects.now();
        // Any number will do that differs from worker to worker.
        let spread = |most: u64| (generation.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % most.saturating_add(1);
        let max_tasks = self.config.max_tasks_per_worker.unwrap_or(usize::MAX);
        let jitter = (spread(self.config.tasks_jitter as u64) as usize).min(max_tasks - 1);
        let Spawned { name, pid, control, lane, side_orders, side_results } = spawned;
        let worker = Worker {
            generation,
            name,
            pid,
            control,
            lane,
            side_orders,
            side_results,
            trace_sink: TraceSink::new(pid),
            phase,
            running: VecDeque::new(),
            given: 0,
            share: max_tasks - jitter,
            checkout: 0,
            is_due: false,
            answered: 0,
            born: now,
            idle_since: Some(now),
            has_worked: false,
            is_awaited: has_initializer,
            full: None,
            unsent: None,
            stalled: None,
            is_lagging: false,
            moved: now,
            is_ready: false,
            has_reported: false,
            leaving: None,
            overdue: None,
            end: Circumstances::default(),
            kill_reason: None,
        };
        self.seats.set_worker(seat, worker);
        // It may have had something to say before anybody knew it.
        self.seats.suspect(seat);
        if let Some(timeout) = self.config.initializer_timeout.filter(|_| phase == Phase::Beginning) {
            self.at(later(now, timeout), Event::Initializer(seat, generation, timeout), effects);
        }
        if let Some(age) = self.config.max_age {
            // Up to a tenth earlier, so that they do not all go at once.
            let age = age - age / 1000 * spread(100) as u32;
            self.at(later(now, age), Event::Age(seat, generation), effects);
        }
        if seat >= *self.workers.end() {
            // There was a resize while it was on its way.
            self.retire(seat, effects);
        }
        self.advance(effects);
    }

    /// A worker could not be started.
    pub(super) fn spawn_failed(&mut self, spawn: &Spawn, error: &Error, effects: &mut Effects) {
        self.failed(spawn.seat, error, effects);
    }

    /// An initializer's report was read.
    pub(super) fn initialized(&mut self, seat: usize, generation: u64, outcome: Result<()>, effects: &mut Effects) {
        let Some(worker) = self.worker(seat, generation) else { return };
        match outcome {
            Ok(()) if worker.phase == Phase::Beginning => worker.phase = Phase::Serving,
            Ok(()) => {}
            Err(error) => {
                let why = Error::other(format!("the initializer of {} failed: {error}", worker.name));
                worker.kill(None);
                self.break_down(&why, effects);
            }
        }
        self.advance(effects);
    }

    /// A worker has ended.
    pub(super) fn exited(
        &mut self,
        seat: usize,
        generation: u64,
        status: &Result<ExitStatus>,
        end: Circumstances,
        effects: &mut Effects,
    ) {
        // Also what it had no time to leave word of.
        self.seats.suspect(seat);
        self.collect(effects);
        if let Some(worker) = self.worker(seat, generation) {
            worker.end = end;
        }
        self.reap(seat, generation, status, effects);
        self.advance(effects);
    }

    /// An order could not be sent to its worker.
    pub(super) fn not_sent(&mut self, side_orders: &SideOrders, unsent: &Unsent, effects: &mut Effects) {
        self.was_unsent(side_orders, unsent, effects);
        self.advance(effects);
    }

    // Events of the pool.

    pub(super) fn closed(&mut self, effects: &mut Effects) {
        self.is_closed = true;
        self.taken.notify();
        self.end_if_done(effects);
    }

    /// Gives a broken pool another chance.
    pub(super) fn revived(&mut self, effects: &mut Effects) {
        if self.broken.take().is_some() {
            (0..self.seats.len()).for_each(|seat| self.seats.forgive(seat));
            // Others come when they are needed, and those that are dying are replaced at their end.
            if self.needs_workers(effects) {
                self.open_seats();
            }
            effects.nudge = true;
        }
    }

    pub(super) fn terminated(&mut self, effects: &mut Effects) {
        (self.is_closed, self.is_terminated) = (true, true);
        self.fail_all(effects, terminated);
        self.seats.fill_vacancies();
    }

    /// The last holder is gone, or the pool's runtime: nothing is waited for any more, or can be done.
    pub(super) fn let_go(&mut self, effects: &mut Effects) {
        (self.is_closed, self.is_terminated) = (true, true);
        self.abandon_all(effects);
        self.seats.fill_vacancies();
    }

    /// Nobody drives any more: all is over, or the runtime that the driver ran on has ended.
    pub(super) fn abandoned(&mut self, is_over: bool, effects: &mut Effects) {
        if !self.is_terminated {
            self.is_orphaned = !is_over;
            self.let_go(effects);
        }
        self.is_abandoned = true;
        self.taken.notify();
    }

    /// Takes nothing more and gives up what has not started: how many items that is.
    pub(super) fn shut(&mut self, effects: &mut Effects) -> usize {
        (self.is_closed, self.is_shut) = (true, true);
        let before = effects.settled;
        for seat in 0..self.seats.len() {
            self.reclaim(seat, 1, effects);
        }
        self.fail_waiting(effects, shut);
        let lost = effects.settled - before;
        self.end_if_done(effects);
        lost
    }

    /// From now on there are so many workers.
    pub(super) fn resized(&mut self, workers: RangeInclusive<usize>, effects: &mut Effects) {
        let has_more = workers.end() > self.workers.end();
        self.workers = workers;
        if has_more {
            self.wake_callers(effects);
        }
        if self.needs_workers(effects) {
            self.open_seats();
        }
        for seat in *self.workers.end()..self.seats.len() {
            self.seats.set_vacant(seat, None);
            self.retire(seat, effects);
        }
        self.dispatch(effects);
        effects.nudge = true;
    }

    /// Time has passed: what is due is done. What the driver has to do now.
    pub(super) fn time_passed(&mut self, effects: &mut Effects) -> Step {
        let now = effects.now();
        if now >= self.next_sweep {
            // Lanes that nobody marked, too: damage to the marks costs time, but nobody waits for ever.
            self.next_sweep = now + SWEEP;
            (0..self.seats.len()).for_each(|seat| self.seats.suspect(seat));
        }
        self.collect(effects);
        let mut has_checked = false;
        while self.timers.peek().is_some_and(|Reverse(timer)| timer.at <= now) {
            let Some(Reverse(timer)) = self.timers.pop() else { break };
            has_checked |= matches!(timer.event, Event::CheckQuiet);
            self.on(timer.event, now, effects);
        }
        self.advance(effects);
        // What was given out just now may be slow, too; but who gives out all the time is awake.
        if !has_checked {
            self.plan_quiet_check(effects);
        }
        let spawns = self.spawns(now, effects);
        let begun = std::mem::take(&mut self.reports);
        self.alert = self.timers.peek().map(|Reverse(timer)| timer.at);
        self.out -= std::mem::take(&mut effects.settled);
        let is_over = self.is_closed && self.alive() == 0;
        let is_unneeded = self.is_closed && !self.needs_workers(effects);
        effects.nudge = false;
        let unfetched = std::mem::take(&mut effects.unfetched);
        Step { spawns, begun, unfetched, until: self.alert, is_unneeded, is_over }
    }
}

// What can be asked.
impl Scheduler {
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }

    pub(super) fn broken(&self) -> Option<String> {
        self.broken.clone()
    }

    pub(super) fn most_workers(&self) -> usize {
        *self.workers.end()
    }

    /// Items that are not settled.
    pub(super) fn unsettled(&self) -> usize {
        self.out
    }

    /// So many workers are kept awake with items that are over soon, if there are that many.
    pub(super) fn most_awake(&self) -> usize {
        self.awake.min(self.most_workers()).max(1)
    }

    /// How many workers run or are to run; 1 for a pool without worker processes that has not ended.
    pub(super) fn alive(&mut self) -> usize {
        let is_done = self.is_closed && (self.open == 0 || self.is_shut || self.is_terminated) && self.out == 0;
        self.seats.update();
        match self.config.is_external {
            _ if self.is_abandoned => 0,
            true => usize::from(!is_done || !self.taken.is_empty()),
            false => self.seats.index().taken.len(),
        }
    }

    /// As many as what executes them says.
    pub(super) fn external_slots(&self) -> usize {
        self.taken.slots()
    }

    /// How many orders can be executed at the same time, and how many of those workers get items that are over soon.
    pub(super) fn slots(&self) -> (usize, usize) {
        match self.config.is_external {
            true => (self.taken.slots().max(1), self.taken.slots().max(1)),
            false => (self.most_workers().max(1), self.most_awake()),
        }
    }

    /// Why nothing is taken in any more, if all of it was given up.
    fn gave_up(&self) -> Option<Error> {
        match self.is_terminated {
            true if self.is_orphaned => Some(stranded()),
            true => Some(terminated()),
            false => self.is_shut.then(shut),
        }
    }

    /// What the pool is doing.
    pub(super) fn stats(&self) -> PoolStats {
        let (waits, runs, late) = (self.waits.clone(), self.runs.clone(), self.late);
        let mut stats = PoolStats { waits, runs, late, ..PoolStats::default() };
        for (_, worker) in self.seats.workers() {
            let front = worker.running.front();
            // Only the first order can have an item at work.
            let at_work = front.filter(|order| worker.lane.claim(order.number).started > order.done);
            stats.workers.push(WorkerStats {
                pid: worker.pid,
                age: worker.born.elapsed(),
                tasks: worker.answered,
                is_busy: at_work.is_some(),
                task: at_work.map(|order| order.group.label),
                resident: 0,
                peak: worker.lane.memory().1,
            });
        }
        stats.running = self.taken.running() + stats.workers.iter().filter(|worker| worker.is_busy).count();
        stats.queued = self.out.saturating_sub(stats.running);
        stats
    }

    fn worker(&mut self, seat: usize, generation: u64) -> Option<&mut Worker> {
        self.seats.worker(seat).filter(|worker| worker.generation == generation)
    }

    /// Where an order is, if it is not complete: its worker's seat, and how far it is.
    fn find(&mut self, place: Place) -> Option<(&mut Worker, usize)> {
        let worker = self.worker(place.seat, place.generation)?;
        let at = worker.running.iter().position(|running| running.number == place.number)?;
        Some((worker, at))
    }
}

fn terminated() -> Error {
    Error::new(ErrorKind::Cancelled, "the pool was terminated before this item was done")
}

/// Of an item that was not done when the pool's runtime ended.
pub(super) fn stranded() -> Error {
    Error::new(ErrorKind::Cancelled, format!("{RUNTIME_ENDED} before this item was done"))
}

/// Of what is asked of such a pool.
fn orphaned() -> Error {
    let text = format!("{RUNTIME_ENDED}: make a pool in a runtime that lives as long as it is used");
    Error::new(ErrorKind::Closed, text)
}

const RUNTIME_ENDED: &str = "the pool has ended, because its runtime has ended";

fn shut() -> Error {
    Error::new(ErrorKind::Cancelled, "the pool was shut down before this item was begun")
}

fn broken(why: &str) -> Error {
    Error::other(format!("the pool has no working worker: {why}"))
}

/// `while_` after `now`; what is too far off to be told is never.
fn later(now: Instant, while_: Duration) -> Instant {
    const NEVER: Duration = Duration::from_secs(30 * 365 * 86400);
    now + while_.min(NEVER)
}

#[cfg(all(test, not(multiprocess_loom)))]
impl Scheduler {
    /// One without workers.
    fn of_test() -> Self {
        let config = Config { workers: 0..=0, ..Config::default() };
        Self::new(Arc::new(config), Arc::new(Board::create().unwrap()))
    }
}
