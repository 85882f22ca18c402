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
//!    could be woken for them, while one worker for each CPU is awake with such items with such items (see `dispatch`).
//! 3. No event walks over seats or calls on the path of an item: `seats` has a set for each question.
//! 4. An item with a deadline has a timer, as long as it matters.

mod deadlines;
mod dispatch;
mod effects;
mod errors;
mod events;
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

use super::call_items::UsualTime;
use super::config::Config;
use super::stats::{Deaths, Histogram, PoolStats, PoolTotals, WorkerStats};
use crate::channel::lane::Board;
use crate::error::{Error, Result};
use crate::process::cpu_count;
use crate::wire::EncodedMessage;
use deadlines::Timer;
use effects::Place;
pub(super) use effects::{Effects, Spawn, Spawned, Step};
pub(super) use errors::stranded;
use errors::{shut, terminated};
use queue::Queue;
use room::Room;
use seats::{SeatSet, Seats};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};
pub(super) use taken::TakenOrder;
use taken::TakenOrders;
use worker::Worker;
pub(super) use worker::{Circumstances, Control};

/// Orders that wait at a worker behind the one it runs, if they are known to be quiet.
const PREFETCH: usize = 3;
const DEPTH: usize = 1 + PREFETCH;

/// A check is repeated after this at the earliest, however short its time: a timer that is due at once, again and
/// again, would never let go of the lock.
const AGAIN: Duration = Duration::from_millis(1);

/// While items are out the driver looks into all lanes, marked or not, after the first time, and then after twice as long
/// each time that nothing was found, up to the second.
const SWEEP: Duration = Duration::from_millis(100);
const RAREST_SWEEP: Duration = Duration::from_secs(1);

/// To look into so many lanes costs less than to look for their marks.
const FEW: usize = 8;

/// A worker that has not come up after this does not come up.
const STARTS: Duration = Duration::from_secs(10);

/// So many deaths of workers are remembered.
const DEATHS: usize = 32;

/// The name of the process in this seat.
pub(super) fn worker_name(seat: usize) -> String {
    format!("PoolWorker-{}", seat + 1)
}

pub(super) struct Scheduler {
    config: Arc<Config>,
    board: Arc<Board>,
    /// How many workers there are to be, from the least to the most.
    workers: RangeInclusive<usize>,
    seats: Seats,
    /// Those whose workers were given orders and have not been notified of them.
    given: SeatSet,
    queue: Queue,
    /// Workers that are checked out, and the calls that wait for each.
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
    /// Items submitted and not settled.
    out: usize,
    /// Items that no worker has, but for those of checkouts.
    waiting: usize,
    /// Chunks that any worker may have and none has.
    waiting_chunks: usize,
    /// The room for items that wait.
    room: Room,
    /// In a pool of so many seats all lanes are looked into.
    few: usize,
    /// So many workers are kept awake with brief items before another is woken.
    awake: usize,
    /// How often that number was doubled, because those workers did not get on.
    boost: u32,
    is_closed: bool,
    /// Callers that wait for the end.
    joining: usize,
    is_terminated: bool,
    is_shut: bool,
    /// The driver has ended.
    is_abandoned: bool,
    /// The pool's runtime ended before the pool.
    is_orphaned: bool,
    is_share_planned: bool,
    /// When a call with long items was last given a worker of a quick one.
    balanced: Option<Instant>,
    is_idle_planned: bool,
    is_quiet_check_planned: bool,
    is_fetch_planned: bool,
    is_spawn_planned: Option<Instant>,
    /// Workers that were killed because they did not end.
    late: u64,
    totals: PoolTotals,
    /// The last workers that died, at most [`DEATHS`].
    deaths: Deaths,
    broken: Option<Error>,
    generation: u64,
    waits: Histogram,
    runs: Histogram,
    checkouts_made: u64,
    /// Reports of initializers, until the driver has read them.
    reports: Vec<(usize, u64, Result<EncodedMessage>)>,
    /// Workers in whose pipes results may lie.
    side_result_seats: SeatSet,
    /// Orders that are executed elsewhere, in a pool without worker processes.
    taken: TakenOrders,
    /// Damage to the marks costs time, but no caller waits for ever: the driver looks into all lanes after this.
    sweep_after: Duration,
    is_sweep_planned: bool,
    /// Results that were taken in, and how many those were when quiet workers were last checked.
    results_taken: u64,
    results_checked: u64,
    /// A quiet order of tiny items was given since that check.
    has_tiny: bool,
}

/// A worker that is checked out.
#[derive(Default)]
struct CheckedOut {
    /// Its seat, as long as it lives.
    seat: Option<usize>,
    queue: Queue,
}
impl Scheduler {
    pub(super) fn new(config: Arc<Config>, board: Arc<Board>) -> Self {
        let workers = config.workers.clone();
        // If the user has bound workers to CPUs, all of them are to be used.
        let awake = if config.cpus.is_empty() { cpu_count() } else { usize::MAX };
        let room = Room::new(config.max_waiting);
        let mut scheduler = Self {
            config,
            board,
            workers,
            seats: Seats::default(),
            given: SeatSet::default(),
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
            joining: 0,
            is_terminated: false,
            is_shut: false,
            is_abandoned: false,
            is_orphaned: false,
            is_share_planned: false,
            balanced: None,
            is_idle_planned: false,
            is_quiet_check_planned: false,
            is_fetch_planned: false,
            is_spawn_planned: None,
            late: 0,
            totals: PoolTotals::default(),
            deaths: Deaths::default(),
            broken: None,
            generation: 0,
            waits: Histogram::default(),
            runs: Histogram::default(),
            checkouts_made: 0,
            reports: Vec::new(),
            side_result_seats: SeatSet::default(),
            taken: TakenOrders::default(),
            sweep_after: SWEEP,
            is_sweep_planned: false,
            results_taken: 0,
            results_checked: 0,
            has_tiny: false,
        };
        scheduler.open_seats();
        scheduler
    }

    /// The end of every event: gives out orders, and ends the pool if it is done.
    fn advance(&mut self, effects: &mut Effects) {
        self.dispatch(effects);
        self.end_if_done(effects);
    }

    /// The caller lets go of the lock: how many items are out now, workers at their initializers included.
    pub(super) fn leave(&mut self, effects: &mut Effects) -> usize {
        effects.notify_taker = self.taken.take_notice();
        self.totals.add(std::mem::take(&mut effects.totals));
        // Those who keep room may never hand anything in then, and those in line get an error or are the last.
        let is_over = self.is_closed || self.is_orphaned || self.broken.is_some();
        self.room.lift(is_over, &mut effects.wakers);
        self.room.pass_on(self.waiting, &mut effects.wakers);
        self.out -= effects.settled;
        // All orders lie there by now: a worker that is woken may take this CPU at once.
        while let Some(seat) = self.given.pop_first() {
            self.seats.get(seat).into_iter().for_each(|worker| worker.lane.notify_given());
        }
        self.seats.update();
        let others = if self.out > 0 { self.waits_for_others() } else { 0 };
        self.out + others + self.seats.index().beginning.len()
    }

    /// Callers that wait for what becomes of the items of others: for room, or for the end of the pool.
    pub(super) fn waits_for_others(&self) -> usize {
        self.room.in_line() + self.joining
    }
}

// Queries.
impl Scheduler {
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }

    pub(super) fn broken(&self) -> Option<String> {
        self.broken.as_ref().map(Error::to_string)
    }

    pub(super) fn most_workers(&self) -> usize {
        *self.workers.end()
    }

    /// Items that are not settled.
    pub(super) fn unsettled(&self) -> usize {
        self.out
    }

    /// So many workers are kept awake with items that are quiet, if there are that many.
    pub(super) fn most_awake(&self) -> usize {
        self.awake.min(self.most_workers()).max(1)
    }

    /// Returns how many workers run or are to run; 1 for a pool without worker processes that has not ended.
    pub(super) fn alive(&mut self) -> usize {
        let is_done = self.is_closed && (self.open == 0 || self.is_shut || self.is_terminated) && self.out == 0;
        self.seats.update();
        match self.config.is_external {
            _ if self.is_abandoned => 0,
            true => usize::from(!is_done || !self.taken.is_empty()),
            false => self.seats.index().taken.len(),
        }
    }

    /// The number that the taker has set.
    pub(super) fn external_slots(&self) -> usize {
        self.taken.slots()
    }

    /// Returns how many orders can be executed at the same time, and how many of those workers get items that are quiet.
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

    /// The figures of the pool, without its deaths, and these as they are shared.
    pub(super) fn stats(&self) -> (PoolStats, Deaths) {
        let (waits, runs, late, totals) = (self.waits.clone(), self.runs.clone(), self.late, self.totals);
        let mut stats = PoolStats { waits, runs, late, totals, ..PoolStats::default() };
        for (seat, worker) in self.seats.workers() {
            let front = worker.running.front();
            // Only the first order can have an item at work.
            let at_work = front.filter(|order| worker.lane.claim(order.number).started > order.done);
            stats.workers.push(WorkerStats {
                name: worker_name(seat),
                pid: worker.pid,
                age: worker.born.elapsed(),
                tasks: worker.answered,
                is_busy: at_work.is_some(),
                task: at_work.map(|order| order.group.label),
                running_for: at_work.map(|order| order.since.max(worker.moved).elapsed()),
                resident: 0,
                peak: worker.lane.memory().1,
            });
        }
        stats.running = self.taken.running() + stats.workers.iter().filter(|worker| worker.is_busy).count();
        stats.queued = self.out.saturating_sub(stats.running);
        (stats, self.deaths.clone())
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
/// `while_` after `now`, but at most some decades.
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
