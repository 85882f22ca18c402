//! The scheduler: one state behind one short lock. Events go in, orders and kills go out.
//!
//! No user code runs under the lock and nothing is decoded there. Whoever has a reason to drives it: a caller that
//! submits gives the order itself, a caller that waits collects results itself, the bell collects them when nobody
//! looks, and the driver does the rest: exits, deadlines, replacements. Each item is settled once: by its result, or by
//! what happened to its worker.

use super::group::{Block, Chunk, Group};
use super::local;
use super::mail::Mail;
use super::protocol::{Conditions, Header, IN_PIPE, TOLD, Task};
use super::stats::{Histogram, PoolStats, WorkerStats};
use super::trace::Ear;
use crate::channel::lane::{self, Board, PoolEnd};
use crate::channel::{Receiver, Sender, spsc};
use crate::error::{Error, ErrorKind, Result};
use crate::process::entry::IS_VALUE;
use crate::process::{Killer, StartMethod};
use crate::wait::Line;
use crate::wire::{Parcel, Sealed};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::ffi::OsString;
use std::fmt::Write;
use std::ops::RangeInclusive;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak, mpsc};
use std::task::Waker;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// Workers that end this soon, so often in a row, without having done anything, are a crash loop.
const CRASH_LOOP: u32 = 5;
const BACK_OFF: Duration = Duration::from_millis(20);
/// Orders that wait at a worker behind the one it runs, if they are known to be over soon.
const PREFETCH: usize = 3;
/// Results of which a worker is quiet are looked for after this.
const LOOK_AFTER: Duration = Duration::from_millis(1);
/// Results that lie in a pipe are fetched for those who do not come for them after this.
const FETCH_AFTER: Duration = Duration::from_millis(5);
/// A chunk with items that have not started is shared with an idle worker after this.
const SHARE_AFTER: Duration = Duration::from_millis(2);

pub(super) struct Settings {
    pub(super) workers: RangeInclusive<usize>,
    /// Workers beyond the least end when they have idled for this.
    pub(super) idle_timeout: Duration,
    pub(super) conditions: Conditions,
    /// The seats' CPUs, taken in turn; empty is any.
    pub(super) cpus: Vec<usize>,
    pub(super) variables: Vec<(OsString, OsString)>,
    /// A worker's share is up to this much smaller than the most.
    pub(super) tasks_jitter: usize,
    pub(super) max_age: Option<Duration>,
    pub(super) recycle_above: Option<u64>,
    /// From a worker's start to the end of its initializer.
    pub(super) initializer_timeout: Option<Duration>,
    /// From a worker's last item, or from when it was told to go, to its end.
    pub(super) exit_timeout: Duration,
    pub(super) start_method: StartMethod,
    pub(super) initializer: Option<Task>,
    pub(super) finalizer: Option<Task>,
    /// What the initializer's report says.
    pub(super) read_initialized: fn(Parcel) -> Result<()>,
    pub(super) max_tasks_per_worker: Option<usize>,
    /// How much of a dead worker's stderr its error quotes; with 0 the stream is not touched.
    pub(super) stderr_lines: usize,
    /// Its one worker is a thread here.
    pub(super) is_local: bool,
    /// What was asked to stop may finish within this; then its worker is killed.
    pub(super) grace: Duration,
}

/// What all who drive a pool share.
pub(super) struct Shared {
    pub(super) settings: Settings,
    state: Mutex<State>,
    pub(super) board: Board,
    alarm: OnceLock<Arc<Line>>,
    /// Tells the thread that is the only worker of a pool within this process.
    local: Option<Mutex<mpsc::Sender<()>>>,
    /// Items handed in and not settled.
    out: AtomicUsize,
    /// The driver has something to do.
    pub(super) nudge: Notify,
    /// Workers that run or are to run.
    pub(super) running: watch::Sender<usize>,
}

#[derive(Default)]
struct State {
    seats: Vec<Seat>,
    queue: VecDeque<Arc<Group>>,
    timers: BinaryHeap<Reverse<Timer>>,
    /// When the driver looks at the timers next.
    alert: Option<Instant>,
    /// Calls that may still add items.
    open: usize,
    /// Items handed in and not settled.
    out: usize,
    rules: Rules,
    is_closed: bool,
    is_terminated: bool,
    is_shut: bool,
    is_share_planned: bool,
    is_idle_planned: bool,
    is_look_planned: bool,
    is_fetch_planned: bool,
    /// Workers that were killed because they did not end.
    late: u64,
    broken: Option<String>,
    generation: u64,
    waits: Histogram,
    runs: Histogram,
    leases: u64,
}

/// What the state needs of the settings, and what changes of them.
#[derive(Clone, Default)]
struct Rules {
    least: usize,
    most: usize,
    idle_timeout: Duration,
    max_tasks: usize,
    tasks_jitter: usize,
    max_age: Option<Duration>,
    recycle_above: Option<u64>,
    exit_timeout: Duration,
    grace: Duration,
}

/// The place of one worker after the other.
#[derive(Default)]
struct Seat {
    worker: Option<Worker>,
    /// When the next one may start, if there is to be one.
    vacant: Option<Instant>,
    /// The driver is starting it.
    is_hiring: bool,
    failures: u32,
}

impl Seat {
    fn is_taken(&self) -> bool {
        self.worker.is_some() || self.vacant.is_some() || self.is_hiring
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Its initializer runs.
    Beginning,
    Serving,
    /// It has all the orders it will get, and ends after them.
    Leaving,
    /// It was killed, or cannot be reached any more.
    Doomed,
}

struct Worker {
    generation: u64,
    name: String,
    pid: u32,
    killer: Killer,
    lane: PoolEnd,
    orders: Sender<Sealed>,
    mail: Arc<Mail>,
    ear: Arc<Ear>,
    phase: Phase,
    running: VecDeque<Running>,
    /// Items it was given, and may be given.
    given: usize,
    share: usize,
    /// The checkout that has it; 0 is none.
    lease: u64,
    /// It is to go once it is given back.
    is_due: bool,
    /// Items that it has answered.
    answered: u64,
    born: Instant,
    idle_since: Option<Instant>,
    has_worked: bool,
    /// The initializer's report has not come.
    is_awaited: bool,
    /// There was no room for an order in its pipe, and no result has come since.
    is_full: bool,
    /// That report, until the driver has read it.
    begun: Option<Result<Sealed>>,
    /// Since when it is to end once it has nothing to do.
    leaving: Option<Instant>,
    /// Why it was killed, if that says something about those to come.
    overdue: Option<Error>,
    /// What is known of its end.
    end: Circumstances,
    /// Why it was killed, for the item that it was at.
    doom: Option<Error>,
}

/// What the driver has learned of a worker's end, beyond its status.
#[derive(Default)]
pub(super) struct Circumstances {
    /// The kernel killed it for its memory.
    pub(super) was_starved: bool,
    pub(super) last_words: Option<String>,
}

/// An order at a worker.
struct Running {
    group: Arc<Group>,
    chunk: Chunk,
    number: u32,
    done: u32,
    end: u32,
    since: Instant,
    /// Its results are told of together.
    is_quiet: bool,
}

/// A worker that is to be started.
pub(super) struct Hire {
    pub(super) seat: usize,
    pub(super) generation: u64,
}

/// Which order, of which worker.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    seat: usize,
    generation: u64,
    number: u32,
}

enum Event {
    /// An item may have run for its time.
    Overrun(Place),
    /// What was asked to stop has had its grace.
    Kill(Place, u32),
    Retry(Arc<Group>, Chunk),
    /// Something may have waited too long for its start.
    Queued(Arc<Group>),
    /// Somebody idles while somebody else has more than enough.
    Share,
    /// A seat's back-off is over.
    Hire,
    /// A worker is old enough.
    Age(usize, u64),
    /// A worker's initializer has run for its time.
    Initializer(usize, u64, Duration),
    /// A worker that was to end has had the time for it.
    Exit(usize, u64),
    /// Somebody may have idled for long enough.
    Idle,
    /// Results may lie about of which nobody was told.
    Look,
    /// Somebody may not fetch what has come for it.
    Fetch,
}

struct Timer {
    at: Instant,
    event: Event,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}
impl Eq for Timer {}
impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

/// What is left to do once the lock is free.
#[derive(Default)]
struct After {
    wakers: Vec<Waker>,
    settled: usize,
    nudge: bool,
    /// Something lies in a pipe, and for too long in these.
    has_mail: bool,
    unfetched: Vec<Arc<Mail>>,
    /// Who has heard something.
    ears: Vec<Arc<Ear>>,
    /// Unsettled items of those who are woken.
    woken: usize,
    /// Who was killed because it did not end within its time.
    late: Vec<(String, Duration)>,
    now: Option<Instant>,
    /// Whose orders have come to their end, and how many items those were.
    ended: Vec<(Arc<Group>, u32)>,
}

impl After {
    /// When this was begun: one look at the clock does for all that is done in one go.
    fn now(&mut self) -> Instant {
        *self.now.get_or_insert_with(Instant::now)
    }

    fn deliver(&mut self, group: &Group, block: Block) {
        self.settled += block.count() as usize;
        if let Some((waker, out)) = group.deliver(block) {
            self.wakers.push(waker);
            self.woken += out;
        }
    }

    /// The next result in a worker's pipe is that of an item.
    fn announce(&mut self, mail: &Arc<Mail>, group: &Arc<Group>, index: u64, tag: u8) {
        self.settled += 1;
        self.has_mail = true;
        if let Some((waker, out)) = mail.expect(group, index, tag) {
            self.wakers.push(waker);
            self.woken += out;
        }
    }

    /// Settles the items of `chunk` from `from` on, before `to`.
    fn fail(&mut self, group: &Group, chunk: &Chunk, (from, to): (u32, u32), error: impl Fn() -> Error) {
        (from..to).for_each(|at| self.deliver(group, Block::failed(chunk.first + u64::from(at), error())));
    }

    /// The same for all of a chunk that was never given out.
    fn fail_pending(&mut self, group: &Group, chunk: &Chunk, error: impl Fn() -> Error) {
        self.fail(group, chunk, (0, chunk.count), error);
        group.forget(chunk);
    }
}

/// What the driver is to do.
pub(super) struct Step {
    pub(super) hires: Vec<Hire>,
    /// What initializers had to say.
    pub(super) begun: Vec<(usize, u64, Result<Sealed>)>,
    /// Where results lie that nobody fetches.
    pub(super) unfetched: Vec<Arc<Mail>>,
    pub(super) until: Option<Instant>,
    pub(super) is_over: bool,
}

impl Shared {
    pub(super) fn new(settings: Settings) -> Result<Arc<Self>> {
        let failed = |error| Error::io("cannot create a pool", error);
        let board = Board::create().map_err(failed)?;
        let rules = Rules {
            least: *settings.workers.start(),
            most: *settings.workers.end(),
            idle_timeout: settings.idle_timeout,
            max_tasks: settings.max_tasks_per_worker.unwrap_or(usize::MAX),
            tasks_jitter: settings.tasks_jitter,
            max_age: settings.max_age,
            recycle_above: settings.recycle_above,
            exit_timeout: settings.exit_timeout,
            grace: settings.grace,
        };
        let running = watch::Sender::new(rules.least);
        let mut state = State { rules, ..State::default() };
        state.open_seats();
        let mut start_failed = None;
        let (state, alarm, nudge) = (Mutex::new(state), OnceLock::new(), Notify::new());
        let is_local = settings.is_local;
        let create = |weak: &Weak<Self>| {
            let local = is_local.then(|| local::start(weak.clone())).transpose();
            let (failed, local) = match local {
                Ok(local) => (None, local.map(Mutex::new)),
                Err(error) => (Some(error), None),
            };
            start_failed = failed;
            Self { settings, state, board, alarm, local, out: AtomicUsize::new(0), nudge, running }
        };
        let shared = Arc::new_cyclic(create);
        if let Some(error) = start_failed {
            return Err(error);
        }
        let weak = Arc::downgrade(&shared);
        let react = move || weak.upgrade().into_iter().for_each(|shared| shared.answer());
        let alarm = shared.board.alarm(react).map_err(failed)?;
        // From now on this runtime answers the bell, also for callers who have none.
        alarm.arm().map_err(failed)?;
        alarm.disarm();
        let _ = shared.alarm.set(alarm);
        Ok(shared)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn alarm(&self) -> Option<&Arc<Line>> {
        self.alarm.get()
    }

    /// Ends a change of the state.
    fn leave(&self, mut state: MutexGuard<'_, State>, after: After) {
        state.out -= after.settled;
        let beginning = state.seats.iter().filter(|seat| seat.is_beginning()).count();
        self.out.store(state.out + beginning, Release);
        drop(state);
        after.ears.iter().for_each(|ear| ear.pass_on());
        for (worker, timeout) in after.late {
            tracing::warn!(%worker, ?timeout, "a worker that was to end did not; it was killed");
        }
        if after.nudge {
            self.nudge.notify_one();
        }
        after.wakers.into_iter().for_each(Waker::wake);
    }

    fn with<T>(&self, change: impl FnOnce(&mut State, &mut After) -> T) -> T {
        let (mut state, mut after) = (self.state(), After::default());
        let result = change(&mut state, &mut after);
        self.leave(state, after);
        result
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
        self.with(|state, after| {
            state.open -= 1;
            state.end_if_done(after);
        });
    }

    pub(super) fn close(&self) {
        self.with(|state, after| {
            state.is_closed = true;
            state.end_if_done(after);
        });
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state().is_closed
    }

    pub(super) fn is_broken(&self) -> Option<String> {
        self.state().broken.clone()
    }

    /// Gives a broken pool another chance.
    pub(super) fn revive(&self) {
        self.with(|state, after| {
            if state.broken.take().is_some() {
                let now = Instant::now();
                for seat in state.seats.iter_mut().filter(|seat| seat.worker.is_none()) {
                    (seat.failures, seat.vacant) = (0, Some(now));
                }
                after.nudge = true;
            }
        });
    }

    pub(super) fn terminate(&self) {
        self.with(|state, after| {
            (state.is_closed, state.is_terminated) = (true, true);
            state.fail_all(after, terminated);
            state.seats.iter_mut().for_each(|seat| seat.vacant = None);
        });
    }

    /// Hands chunks in, and on to workers that are free.
    pub(super) fn submit(&self, group: &Arc<Group>, mut chunks: Vec<Chunk>) {
        self.with(|state, after| {
            let items = chunks.iter().map(|chunk| chunk.count as usize).sum::<usize>();
            group.items().out += items;
            state.out += items;
            if let Some(limit) = group.options.queue_timeout {
                let now = after.now();
                chunks.iter_mut().for_each(|chunk| chunk.queued = Some(now));
                state.at(later(now, limit), Event::Queued(group.clone()), after);
            }
            let refused = match &state.broken {
                _ if state.is_shut => Some(shut()),
                _ if state.is_terminated => Some(terminated()),
                Some(why) => Some(broken(why)),
                None => None,
            };
            if let Some(error) = refused {
                chunks.iter().for_each(|chunk| after.fail(group, chunk, (0, chunk.count), || Error::copy(&error)));
                return;
            }
            let new = chunks.len();
            state.enqueue(group, chunks.drain(..), false);
            state.dispatch(after);
            // What found a worker at once needs no clock to tell how long it waited.
            let mut items = group.items();
            let waiting = items.pending.len().min(new);
            if waiting > 0 {
                let now = after.now();
                items.pending.iter_mut().rev().take(waiting).for_each(|chunk| _ = chunk.handed.get_or_insert(now));
            }
        });
        if let Some(local) = &self.local {
            let _ = local.lock().unwrap_or_else(PoisonError::into_inner).send(());
        }
    }

    /// What the thread of a pool within this process is to run next.
    pub(super) fn take_order(&self) -> Option<(Arc<Group>, Chunk)> {
        self.with(|state, _| {
            loop {
                let group = state.queue.pop_front()?;
                let mut items = group.items();
                let Some(chunk) = items.pending.pop_front() else {
                    items.is_queued = false;
                    continue;
                };
                // Calls take turns.
                items.is_queued = !items.pending.is_empty();
                if items.is_queued {
                    state.queue.push_back(group.clone());
                }
                drop(items);
                return Some((group, chunk));
            }
        })
    }

    /// Why that thread should run no more items of `group`.
    pub(super) fn gives_up(&self, group: &Group) -> Option<Error> {
        let state = self.state();
        let is_cancelled = group.items().is_cancelled;
        match (state.is_terminated, state.is_shut) {
            (true, _) => Some(terminated()),
            (_, true) => Some(shut()),
            _ => is_cancelled.then(|| group.was_cancelled()),
        }
    }

    /// An item's outcome, from that thread.
    pub(super) fn settle(&self, group: &Group, block: Block) {
        self.with(|state, after| {
            after.deliver(group, block);
            state.end_if_done(after);
        });
    }

    pub(super) fn is_local(&self) -> bool {
        self.local.is_some()
    }

    /// The number of a new checkout.
    pub(super) fn new_lease(&self) -> u64 {
        let mut state = self.state();
        state.leases += 1;
        state.leases
    }

    /// The worker of a checkout is everybody's again.
    pub(super) fn release(&self, lease: u64) {
        self.with(|state, after| {
            let leased = state.workers().find(|(_, worker)| worker.lease == lease).map(|(seat, worker)| {
                worker.lease = 0;
                (seat, worker.is_due || worker.given >= worker.share)
            });
            if let Some((seat, true)) = leased {
                state.retire(seat, after);
            }
            state.dispatch(after);
            state.plan_to_look(after);
            state.end_if_done(after);
        });
    }

    /// Collects what has come from the workers and gives out what waits for them; whether there are items out whose
    /// callers have not been woken.
    pub(super) fn pump(&self) -> bool {
        self.with(|state, after| {
            if state.collect(after) {
                state.dispatch(after);
                state.end_if_done(after);
            }
            state.out - after.settled > after.woken
        })
    }

    /// The same for who does so again and again: not if somebody else is at it.
    #[inline]
    pub(super) fn try_pump(&self) {
        let Ok(mut state) = self.state.try_lock() else { return };
        if !state.has_results() {
            return;
        }
        let mut after = After::default();
        if state.collect(&mut after) {
            state.dispatch(&mut after);
            state.end_if_done(&mut after);
        }
        self.leave(state, after);
    }

    /// The bell has rung, or may have.
    fn answer(&self) {
        // Who was woken sees to itself.
        if self.pump() {
            self.stir();
        }
    }

    /// Sees to it that results which nobody looks for are heard of.
    pub(super) fn stir(&self) {
        if self.out.load(Acquire) == 0 {
            return;
        }
        if let Some(alarm) = self.alarm.get() {
            // Without a runtime here that of the pool answers.
            let _ = alarm.arm();
        }
        // What came before is for us; of what comes later the alarm tells.
        self.with(|state, after| {
            if state.has_results() && state.collect(after) {
                state.dispatch(after);
                state.end_if_done(after);
            }
            state.plan_to_look(after);
        });
    }

    /// The same for who has many quick items out: it need not hear of results before a worker begins its last order.
    pub(super) fn rest(&self) {
        if let Some(alarm) = self.alarm.get() {
            let _ = alarm.arm();
        }
        self.with(|state, after| {
            if state.has_news() && state.collect(after) {
                state.dispatch(after);
                state.end_if_done(after);
            }
            state.plan_to_look(after);
        });
    }

    /// Whether to collect results now, for who has many quick items out.
    pub(super) fn has_news(&self) -> bool {
        self.state().has_news()
    }

    pub(super) fn out(&self) -> usize {
        self.out.load(Acquire)
    }

    /// Nobody waits for the rest of these items: what has not started never does, what runs is asked, then killed.
    pub(super) fn cancel(&self, group: &Arc<Group>) {
        self.with(|state, after| {
            let (pending, was_cancelled) = {
                let mut items = group.items();
                let was = std::mem::replace(&mut items.is_cancelled, true);
                (std::mem::take(&mut items.pending), was)
            };
            if was_cancelled {
                return;
            }
            pending.iter().for_each(|chunk| after.fail_pending(group, chunk, || group.was_cancelled()));
            state.revoke(group, after);
            state.dispatch(after);
            state.plan_to_look(after);
            state.end_if_done(after);
        });
    }

    /// From now on there are so many workers.
    pub(super) fn resize(&self, workers: RangeInclusive<usize>) {
        self.with(|state, after| {
            (state.rules.least, state.rules.most) = (*workers.start(), *workers.end());
            if state.needs_workers(after) {
                state.open_seats();
            }
            for seat in state.rules.most..state.seats.len() {
                state.seats[seat].vacant = None;
                state.retire(seat, after);
            }
            state.dispatch(after);
            after.nudge = true;
            self.count(state);
        });
    }

    /// Tells those who want to know how many workers there are.
    fn count(&self, state: &State) -> usize {
        let is_done = state.is_closed && (state.open == 0 || state.is_shut) && state.out == 0;
        let alive = match self.local {
            Some(_) => usize::from(!is_done),
            None => state.seats.iter().filter(|seat| seat.is_taken()).count(),
        };
        self.running.send_if_modified(|running| std::mem::replace(running, alive) != alive);
        alive
    }

    pub(super) fn most_workers(&self) -> usize {
        self.state().rules.most
    }

    /// Takes nothing more and gives up what has not started: how many items that is.
    pub(super) fn shut(&self) -> usize {
        self.with(|state, after| {
            (state.is_closed, state.is_shut) = (true, true);
            let before = after.settled;
            for seat in 0..state.seats.len() {
                state.reclaim(seat, 1, after);
            }
            state.fail_waiting(after, shut);
            let lost = after.settled - before;
            state.end_if_done(after);
            lost
        })
    }

    /// What the pool is doing.
    pub(super) fn stats(&self) -> PoolStats {
        let mut state = self.state();
        let (waits, runs, late) = (state.waits.clone(), state.runs.clone(), state.late);
        let mut stats = PoolStats { waits, runs, late, ..PoolStats::default() };
        for (_, worker) in state.workers() {
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
        stats.running = stats.workers.iter().filter(|worker| worker.is_busy).count();
        stats.queued = state.out.saturating_sub(stats.running);
        stats
    }

    /// Items that are not settled.
    pub(super) fn unsettled(&self) -> usize {
        self.state().out
    }

    /// What the driver has to do now.
    pub(super) fn step(&self) -> Step {
        self.with(|state, after| {
            let now = Instant::now();
            if state.collect(after) {
                state.dispatch(after);
            }
            while state.timers.peek().is_some_and(|Reverse(timer)| timer.at <= now) {
                let Some(Reverse(timer)) = state.timers.pop() else { break };
                state.on(timer.event, now, after);
            }
            state.dispatch(after);
            state.end_if_done(after);
            state.plan_to_look(after);
            let hires = state.hires(now, after);
            let begun = state
                .workers()
                .filter_map(|(seat, worker)| worker.begun.take().map(|report| (seat, worker.generation, report)));
            let begun = begun.collect();
            state.alert = state.timers.peek().map(|Reverse(timer)| timer.at);
            let alive = self.count(state);
            after.nudge = false;
            let unfetched = std::mem::take(&mut after.unfetched);
            Step { hires, begun, unfetched, until: state.alert, is_over: state.is_closed && alive == 0 }
        })
    }

    /// An initializer's report was read.
    pub(super) fn began(&self, seat: usize, generation: u64, outcome: Result<()>) {
        self.with(|state, after| {
            let Some(worker) = state.worker(seat, generation) else { return };
            match outcome {
                Ok(()) if worker.phase == Phase::Beginning => worker.phase = Phase::Serving,
                Ok(()) => {}
                Err(error) => {
                    let why = Error::other(format!("the initializer of {} failed: {error}", worker.name));
                    worker.kill(None);
                    state.break_down(&why, after);
                }
            }
            state.dispatch(after);
            state.end_if_done(after);
        });
    }

    /// A worker was started.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn hired(
        &self,
        Hire { seat, generation }: &Hire,
        (name, pid): (String, u32),
        killer: Killer,
        lane: PoolEnd,
        orders: Sender<Sealed>,
        results: Receiver<Sealed>,
    ) {
        let has_initializer = self.settings.initializer.is_some();
        self.with(|state, after| {
            let phase = match (state.is_terminated, has_initializer) {
                (true, _) => {
                    let _ = killer.kill();
                    Phase::Doomed
                }
                (false, true) => Phase::Beginning,
                (false, false) => Phase::Serving,
            };
            let now = Instant::now();
            // Any number will do that differs from worker to worker.
            let spread = |most: u64| (generation.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % (most + 1);
            let jitter = (spread(state.rules.tasks_jitter as u64) as usize).min(state.rules.max_tasks - 1);
            let share = state.rules.max_tasks - jitter;
            if let Some(timeout) = self.settings.initializer_timeout.filter(|_| phase == Phase::Beginning) {
                state.at(later(now, timeout), Event::Initializer(*seat, *generation, timeout), after);
            }
            if let Some(age) = state.rules.max_age {
                // Up to a tenth earlier, so that they do not all go at once.
                let age = age - age / 1000 * spread(100) as u32;
                state.at(later(now, age), Event::Age(*seat, *generation), after);
            }
            let worker = Worker {
                generation: *generation,
                name,
                pid,
                killer,
                lane,
                orders,
                mail: Mail::new(results),
                ear: Ear::new(pid),
                phase,
                running: VecDeque::new(),
                given: 0,
                share,
                lease: 0,
                is_due: false,
                answered: 0,
                born: now,
                idle_since: Some(now),
                has_worked: false,
                is_awaited: has_initializer,
                is_full: false,
                begun: None,
                leaving: None,
                overdue: None,
                end: Circumstances::default(),
                doom: None,
            };
            if let Some(seat) = state.seats.get_mut(*seat) {
                (seat.worker, seat.is_hiring) = (Some(worker), false);
            }
            state.dispatch(after);
            state.end_if_done(after);
        });
        self.stir();
    }

    /// A worker could not be started.
    pub(super) fn not_hired(&self, hire: &Hire, error: &Error) {
        self.with(|state, after| state.failed(hire.seat, error, after));
    }

    /// A worker has ended.
    pub(super) fn died(&self, seat: usize, generation: u64, status: Result<ExitStatus>, end: Circumstances) {
        self.with(|state, after| {
            state.collect(after);
            if let Some(worker) = state.worker(seat, generation) {
                worker.end = end;
            }
            state.bury(seat, generation, &status, after);
            state.dispatch(after);
            state.end_if_done(after);
        });
    }

    /// Nobody drives any more.
    pub(super) fn abandon(&self) {
        if !self.state().is_terminated {
            self.terminate();
        }
        self.running.send_replace(0);
    }
}

fn terminated() -> Error {
    Error::new(ErrorKind::Cancelled, "the pool was terminated before this item was done")
}

fn shut() -> Error {
    Error::new(ErrorKind::Cancelled, "the pool was shut down before this item was begun")
}

fn broken(why: &str) -> Error {
    Error::other(format!("the pool has no working worker: {why}"))
}

impl State {
    /// Has `event` happen at `at`.
    fn at(&mut self, at: Instant, event: Event, after: &mut After) {
        self.timers.push(Reverse(Timer { at, event }));
        if self.alert.is_none_or(|alert| at < alert) {
            self.alert = Some(at);
            after.nudge = true;
        }
    }

    fn enqueue(&mut self, group: &Arc<Group>, chunks: impl DoubleEndedIterator<Item = Chunk>, in_front: bool) {
        let mut items = group.items();
        match in_front {
            true => chunks.rev().for_each(|chunk| {
                items.bytes += chunk.bytes().len();
                items.pending.push_front(chunk);
            }),
            false => chunks.for_each(|chunk| {
                items.bytes += chunk.bytes().len();
                items.pending.push_back(chunk);
            }),
        }
        if !items.pending.is_empty() && !std::mem::replace(&mut items.is_queued, true) {
            self.queue.push_back(group.clone());
        }
    }

    fn workers(&mut self) -> impl Iterator<Item = (usize, &mut Worker)> {
        self.seats.iter_mut().enumerate().filter_map(|(seat, place)| Some((seat, place.worker.as_mut()?)))
    }

    #[inline]
    fn has_results(&self) -> bool {
        self.seats.iter().filter_map(|seat| seat.worker.as_ref()).any(|worker| worker.lane.has_results())
    }

    /// Whether some worker has put results that it may not tell of any more, or will soon have no orders.
    fn has_news(&self) -> bool {
        let mut workers = self.seats.iter().filter_map(|seat| seat.worker.as_ref());
        let will_tell = |worker: &Worker| {
            worker.running.back().is_some_and(|last| last.is_quiet && worker.lane.will_tell(last.number))
        };
        workers.any(|worker| !will_tell(worker) && worker.lane.has_results())
    }

    /// Takes in what has come; whether anything has.
    fn collect(&mut self, after: &mut After) -> bool {
        let mut any = false;
        let mut initialized = Vec::new();
        let Self { seats, runs, .. } = self;
        let workers = seats.iter_mut().enumerate().filter_map(|(seat, place)| Some((seat, place.worker.as_mut()?)));
        for (seat, worker) in workers {
            if !worker.lane.has_results() {
                continue;
            }
            any = true;
            let mut bytes = Vec::new();
            let taken = worker.lane.take_results(&mut bytes).map_err(|_| corrupt(&worker.name));
            let delivered = taken.and_then(|count| worker.deliver(bytes, count, runs, after));
            match delivered {
                Ok(None) => {}
                Ok(Some(report)) => initialized.push((seat, report)),
                Err(error) => worker.kill(Some(error)),
            }
        }
        for (seat, report) in initialized {
            self.initialized(seat, report, after);
        }
        if after.has_mail && !std::mem::replace(&mut self.is_fetch_planned, true) {
            let at = after.now() + FETCH_AFTER;
            self.at(at, Event::Fetch, after);
        }
        if let Some(limit) = self.rules.recycle_above.filter(|_| any) {
            let is_large = |worker: &Worker| worker.phase == Phase::Serving && worker.lane.memory().0 > limit;
            let large: Vec<_> = self.workers().filter_map(|(seat, worker)| is_large(worker).then_some(seat)).collect();
            large.into_iter().for_each(|seat| self.retire(seat, after));
        }
        any
    }

    /// What a worker's initializer had to say; decoded by the driver, as it is the user's.
    fn initialized(&mut self, seat: usize, report: Result<Sealed>, after: &mut After) {
        after.nudge = true;
        if let Some(worker) = self.seats.get_mut(seat).and_then(|seat| seat.worker.as_mut()) {
            worker.begun = Some(report);
        }
    }

    /// Gives out what waits, as long as there is a worker for it.
    fn dispatch(&mut self, after: &mut After) {
        // What waits for one certain worker, or for one to itself, holds up no checkout.
        let mut aside = Vec::new();
        while let Some(group) = self.queue.front().cloned() {
            let next = {
                let mut items = group.items();
                items.is_queued = !items.pending.is_empty();
                items.pending.front().map(Chunk::len_in_ring)
            };
            let Some(len) = next else {
                self.queue.pop_front();
                continue;
            };
            let depth = if group.is_quick() { 1 + PREFETCH } else { 1 };
            let (lease, acquires) = (group.options.lease, group.options.acquires);
            let is_certain = lease > 0 && !acquires;
            if !is_certain && !aside.is_empty() && aside.iter().any(|group: &Arc<Group>| group.options.acquires) {
                self.queue.pop_front();
                aside.push(group);
                continue;
            }
            let serves = |worker: &Worker| match acquires {
                true => worker.lease == 0 && worker.running.is_empty(),
                false => worker.lease == lease,
            };
            let free = self.workers().filter(|(_, worker)| serves(worker));
            let free = free.filter_map(|(seat, worker)| worker.takes(depth, len).then_some((seat, worker)));
            let best = free.map(|(seat, worker)| (seat, worker.running.len())).min_by_key(|(_, running)| *running);
            if !is_certain && best.is_none_or(|(_, running)| running > 0) {
                self.call_in(after);
            }
            let Some((seat, _)) = best else {
                if lease == 0 && self.leases == 0 {
                    break;
                }
                self.queue.pop_front();
                if is_certain && !self.workers().any(|(_, worker)| worker.lease == lease) {
                    let pending = {
                        let mut items = group.items();
                        items.is_queued = false;
                        std::mem::take(&mut items.pending)
                    };
                    pending.iter().for_each(|chunk| after.fail_pending(&group, chunk, || group.was_let_go()));
                } else {
                    aside.push(group);
                }
                continue;
            };
            let (chunk, has_more) = {
                let mut items = group.items();
                let chunk = items.pending.pop_front();
                items.is_queued = !items.pending.is_empty();
                (chunk, items.is_queued)
            };
            // Calls take turns.
            if !has_more || self.queue.len() > 1 {
                self.queue.pop_front();
                if has_more {
                    self.queue.push_back(group.clone());
                }
            }
            let Some(chunk) = chunk else { continue };
            if acquires && let Some(worker) = self.seats.get_mut(seat).and_then(|seat| seat.worker.as_mut()) {
                worker.lease = lease;
            }
            self.give(seat, group, chunk, after);
        }
        aside.into_iter().rev().for_each(|group| self.queue.push_front(group));
    }

    fn worker(&mut self, seat: usize, generation: u64) -> Option<&mut Worker> {
        let worker = self.seats.get_mut(seat)?.worker.as_mut()?;
        (worker.generation == generation).then_some(worker)
    }

    fn give(&mut self, seat: usize, group: Arc<Group>, mut chunk: Chunk, after: &mut After) {
        let Some(worker) = self.seats.get_mut(seat).and_then(|seat| seat.worker.as_mut()) else { return };
        let quota = if worker.lease > 0 { usize::MAX } else { worker.share - worker.given };
        let mut rest = None;
        if chunk.count as usize > quota {
            group.forget(&chunk);
            rest = Some(chunk.part(quota as u32, chunk.count));
            chunk = chunk.part(0, quota as u32);
            group.items().bytes += chunk.bytes().len();
        }
        match worker.give(&group, &mut chunk) {
            Ok(Some(number)) => {
                worker.given += chunk.count as usize;
                worker.idle_since = None;
                let generation = worker.generation;
                let now = after.now();
                if !std::mem::replace(&mut chunk.has_waited, true) {
                    let waited = chunk.handed.map_or(Duration::ZERO, |handed| now.duration_since(handed));
                    self.waits.add(waited, u64::from(chunk.count));
                }
                let (done, end, is_quiet) = (0, chunk.count, group.is_bulk());
                let order = Running { group: group.clone(), chunk, number, done, end, since: now, is_quiet };
                worker.running.push_back(order);
                let is_last = worker.given >= worker.share && worker.lease == 0;
                if is_last {
                    self.dismiss(seat, after);
                }
                if let Some(timeout) = group.options.timeout {
                    self.at(later(now, timeout), Event::Overrun(Place { seat, generation, number }), after);
                }
            }
            Ok(None) => {
                group.forget(&chunk);
                self.enqueue(&group, [chunk].into_iter(), true);
            }
            Err(error) => after.fail_pending(&group, &chunk, || Error::new(error.kind(), error.to_string())),
        }
        self.enqueue(&group, rest.into_iter(), true);
    }

    /// Takes back what of `group` has not started, and asks what runs to stop.
    fn revoke(&mut self, group: &Arc<Group>, after: &mut After) {
        let grace = group.options.grace.unwrap_or(self.rules.grace);
        let mut asked = Vec::new();
        for (seat, worker) in self.workers() {
            let generation = worker.generation;
            for running in worker.running.iter_mut().filter(|running| Arc::ptr_eq(&running.group, group)) {
                let claim = worker.lane.take_back(running.number, 0);
                after.fail(group, &running.chunk, (claim.end, running.end), || group.was_cancelled());
                running.end = claim.end;
                if claim.started > running.done {
                    worker.lane.ask_to_stop(running.number, claim.started - 1);
                    asked.push((Place { seat, generation, number: running.number }, claim.started - 1));
                }
            }
            worker.pop_complete(None, &mut Vec::new());
        }
        let at = later(Instant::now(), grace);
        asked.into_iter().for_each(|(place, item)| self.at(at, Event::Kill(place, item), after));
    }

    /// Takes back what has not started at a worker, in `pieces` for whoever is free.
    fn reclaim(&mut self, seat: usize, pieces: u32, after: &mut After) {
        let Some(worker) = self.seats.get_mut(seat).and_then(|seat| seat.worker.as_mut()) else { return };
        let mut back = Vec::new();
        for running in worker.running.iter_mut().rev() {
            let claim = worker.lane.take_back(running.number, 0);
            if claim.end == running.end {
                continue;
            }
            worker.given -= (running.end - claim.end) as usize;
            let size = (running.end - claim.end).div_ceil(pieces.max(1));
            let starts = (claim.end..running.end).step_by(size as usize);
            let parts: Vec<_> = starts.map(|from| running.chunk.part(from, (from + size).min(running.end))).collect();
            back.push((running.group.clone(), parts));
            running.end = claim.end;
        }
        worker.pop_complete(None, &mut Vec::new());
        for (group, parts) in back {
            let is_cancelled = group.items().is_cancelled;
            if !is_cancelled {
                self.enqueue(&group, parts.into_iter(), true);
                continue;
            }
            parts.iter().for_each(|part| after.fail(&group, part, (0, part.count), || group.was_cancelled()));
        }
    }

    fn on(&mut self, event: Event, now: Instant, after: &mut After) {
        match event {
            Event::Overrun(place) => self.overrun(place, now, after),
            Event::Kill(place, item) => self.kill(place, item, after),
            Event::Retry(group, chunk) => self.again(&group, chunk, after),
            Event::Queued(group) => self.queued_out(&group, now, after),
            Event::Share => self.share(now, after),
            Event::Hire => {}
            Event::Look => self.look(after),
            Event::Fetch => {
                self.is_fetch_planned = false;
                let mail = self.workers().map(|(_, worker)| worker.mail.clone()).filter(|mail| !mail.is_empty());
                after.unfetched = mail.collect();
            }
            Event::Age(seat, generation) => {
                if self.worker(seat, generation).is_some() {
                    self.retire(seat, after);
                }
            }
            Event::Initializer(seat, generation, timeout) => {
                if let Some(worker) = self.worker(seat, generation).filter(|worker| worker.is_awaited) {
                    let text = format!("the initializer of {} did not end within {timeout:?}", worker.name);
                    worker.kill(None);
                    worker.overdue = Some(Error::new(ErrorKind::Timeout, text));
                }
            }
            Event::Exit(seat, generation) => self.see_out(seat, generation, now, after),
            Event::Idle => {
                self.is_idle_planned = false;
                self.send_home(now, after);
            }
        }
    }

    /// Sees to it that nobody sleeps for long because a worker is quiet about what turns out to be slow.
    fn plan_to_look(&mut self, after: &mut After) {
        let is_quiet = |worker: &Worker| worker.running.iter().any(|running| running.is_quiet);
        if !self.is_look_planned && self.seats.iter().filter_map(|seat| seat.worker.as_ref()).any(is_quiet) {
            self.is_look_planned = true;
            let at = after.now() + LOOK_AFTER;
            self.at(at, Event::Look, after);
        }
    }

    /// Has workers tell of each result of the orders that they have by now, and takes in what came before.
    fn look(&mut self, after: &mut After) {
        self.is_look_planned = false;
        for (_, worker) in self.workers() {
            for running in worker.running.iter_mut().filter(|running| running.is_quiet) {
                running.is_quiet = false;
                worker.lane.hark(running.number);
            }
        }
        self.collect(after);
    }

    /// Runs an item again, unless nobody waits for it any more.
    fn again(&mut self, group: &Arc<Group>, chunk: Chunk, after: &mut After) {
        let is_cancelled = group.items().is_cancelled;
        match is_cancelled {
            true => after.fail(group, &chunk, (0, chunk.count), || group.was_cancelled()),
            false => self.enqueue(group, [chunk].into_iter(), true),
        }
    }

    /// Where an order is, if it is not complete: its worker's seat, and how far it is.
    fn find(&mut self, place: Place) -> Option<(&mut Worker, usize)> {
        let worker = self.worker(place.seat, place.generation)?;
        let at = worker.running.iter().position(|running| running.number == place.number)?;
        Some((worker, at))
    }

    fn overrun(&mut self, place: Place, now: Instant, after: &mut After) {
        let default_grace = self.rules.grace;
        let Some((worker, at)) = self.find(place) else { return };
        let running = &worker.running[at];
        let Some(timeout) = running.group.options.timeout else { return };
        let grace = running.group.options.grace.unwrap_or(default_grace);
        let claim = worker.lane.claim(place.number);
        let has_run = match claim.started > running.done {
            true => {
                let started = worker.lane.started_at(place.number);
                Duration::from_nanos(lane::now_ns().saturating_sub(started))
            }
            // It waits behind another, or is between two items.
            false => Duration::ZERO,
        };
        if has_run < timeout {
            return self.at(later(now, timeout - has_run), Event::Overrun(place), after);
        }
        let item = claim.started - 1;
        worker.lane.ask_to_stop(place.number, item);
        self.at(later(now, grace), Event::Kill(place, item), after);
        // What waits behind it need not wait for its end. The rest of its order is timed by the next timer.
        self.reclaim(place.seat, 1, after);
        self.at(later(now, timeout.saturating_add(grace)), Event::Overrun(place), after);
    }

    /// Kills the worker, if it is still at that very item.
    fn kill(&mut self, place: Place, item: u32, after: &mut After) {
        // From here on nothing else can start there, so the kill hits this item or none.
        if self.find(place).is_none() {
            return;
        }
        self.reclaim(place.seat, 1, after);
        self.collect(after);
        let Some((worker, at)) = self.find(place) else { return };
        let running = &worker.running[at];
        if at > 0 || running.done > item || worker.lane.claim(place.number).started != item + 1 {
            return;
        }
        let is_cancelled = running.group.items().is_cancelled;
        let doom = match is_cancelled {
            true => running.group.was_cancelled(),
            false => running.group.timed_out(&worker.name),
        };
        worker.kill(Some(doom));
    }

    fn queued_out(&mut self, group: &Arc<Group>, now: Instant, after: &mut After) {
        let Some(limit) = group.options.queue_timeout else { return };
        let is_late = |chunk: &Chunk| chunk.queued.is_some_and(|queued| now >= later(queued, limit));
        let (late, next) = {
            let mut items = group.items();
            let (late, rest): (Vec<_>, Vec<_>) = items.pending.drain(..).partition(is_late);
            items.pending = rest.into();
            (late, items.pending.iter().filter_map(|chunk| chunk.queued).min())
        };
        late.iter().for_each(|chunk| after.fail_pending(group, chunk, || group.queued_out()));
        // What a worker has and has not begun waits as well.
        for (_, worker) in self.workers() {
            for running in worker.running.iter_mut() {
                if Arc::ptr_eq(&running.group, group) && is_late(&running.chunk) {
                    let claim = worker.lane.take_back(running.number, 0);
                    worker.given -= (running.end - claim.end) as usize;
                    after.fail(group, &running.chunk, (claim.end, running.end), || group.queued_out());
                    running.end = claim.end;
                }
            }
            worker.pop_complete(None, &mut Vec::new());
        }
        if let Some(next) = next {
            self.at(later(next, limit), Event::Queued(group.clone()), after);
        }
    }

    /// Sees to it that nobody idles for long while another has what it has not begun.
    fn plan_to_share(&mut self, after: &mut After) {
        if self.is_share_planned || !self.queue.is_empty() {
            return;
        }
        let is_idle =
            |worker: &Worker| worker.phase == Phase::Serving && worker.running.is_empty() && worker.lease == 0;
        let has_more = |worker: &Worker| {
            let mut unbegun = worker.running.iter().enumerate();
            unbegun.any(|(at, running)| running.end > running.done + u32::from(at == 0))
        };
        let mut workers = self.seats.iter().filter_map(|seat| seat.worker.as_ref());
        let has_idle = workers.clone().any(is_idle);
        if has_idle && workers.any(has_more) {
            self.is_share_planned = true;
            self.at(Instant::now() + SHARE_AFTER, Event::Share, after);
        }
    }

    fn share(&mut self, now: Instant, after: &mut After) {
        self.is_share_planned = false;
        let is_idle = |worker: &Worker| worker.phase == Phase::Serving && worker.running.is_empty();
        let idle = self.workers().filter(|(_, worker)| is_idle(worker)).count() as u32;
        let is_slow = |worker: &Worker| {
            worker.running.front().is_some_and(|running| now.duration_since(running.since) >= SHARE_AFTER)
        };
        let slow: Vec<usize> = self.workers().filter_map(|(seat, worker)| is_slow(worker).then_some(seat)).collect();
        if idle > 0 {
            slow.into_iter().for_each(|seat| self.reclaim(seat, idle + 1, after));
        }
        self.dispatch(after);
        self.plan_to_share(after);
    }

    /// Has the least number of workers come.
    fn open_seats(&mut self) {
        let Rules { least, most, .. } = self.rules;
        self.seats.resize_with(self.seats.len().max(most), Seat::default);
        let now = Instant::now();
        for seat in self.seats[..least].iter_mut().filter(|seat| !seat.is_taken()) {
            seat.vacant = Some(now);
        }
    }

    /// Has one more worker come, if there may be more; they all come at once if that many are wanted.
    fn call_in(&mut self, after: &mut After) {
        if self.rules.least == self.rules.most || !self.needs_workers(after) {
            return;
        }
        let wanted: usize = self.queue.iter().map(|group| group.items().pending.len()).sum();
        let coming = self.seats.iter().filter(|seat| seat.vacant.is_some() || seat.is_hiring || seat.is_beginning());
        let wanted = wanted.saturating_sub(coming.count());
        let now = Instant::now();
        let free = self.seats[..self.rules.most].iter_mut().filter(|seat| !seat.is_taken());
        for seat in free.take(wanted) {
            seat.vacant = Some(now);
            after.nudge = true;
        }
    }

    /// Lets a worker go when it is done with what it has begun.
    fn retire(&mut self, seat: usize, after: &mut After) {
        if let Some(worker) = self.seats.get_mut(seat).and_then(|seat| seat.worker.as_mut())
            && worker.lease > 0
        {
            worker.is_due = true;
            return;
        }
        self.reclaim(seat, 1, after);
        self.dismiss(seat, after);
        self.dispatch(after);
    }

    /// Tells a worker that no order will follow, and sees to it that it ends in time.
    fn dismiss(&mut self, seat: usize, after: &mut After) {
        let now = after.now();
        let Some(worker) = self.seats.get_mut(seat).and_then(|seat| seat.worker.as_mut()) else { return };
        if !matches!(worker.phase, Phase::Serving | Phase::Beginning) {
            return;
        }
        (worker.phase, worker.leaving) = (Phase::Leaving, Some(now));
        worker.lane.close();
        let event = Event::Exit(seat, worker.generation);
        self.at(later(now, self.rules.exit_timeout), event, after);
    }

    /// Kills a worker that has had the time to end.
    fn see_out(&mut self, seat: usize, generation: u64, now: Instant, after: &mut After) {
        let timeout = self.rules.exit_timeout;
        let Some(worker) = self.worker(seat, generation) else { return };
        let since = match worker.running.is_empty() {
            true => worker.idle_since.max(worker.leaving).unwrap_or(now),
            false => now,
        };
        if worker.phase != Phase::Leaving {
            return;
        }
        if now < later(since, timeout) {
            return self.at(later(since, timeout), Event::Exit(seat, generation), after);
        }
        after.late.push((worker.name.clone(), timeout));
        worker.kill(None);
        self.late += 1;
    }

    /// Lets those go who have idled for long enough, or have grown too large.
    fn send_home(&mut self, now: Instant, after: &mut After) {
        let Rules { least, most, idle_timeout, .. } = self.rules;
        if least == most {
            return;
        }
        let mut spare = self.seats.iter().filter(|seat| seat.is_taken()).count().saturating_sub(least);
        let (mut gone, mut next) = (Vec::new(), None);
        for (seat, worker) in self.workers().filter(|(_, worker)| worker.phase == Phase::Serving && worker.lease == 0) {
            let Some(since) = worker.idle_since else { continue };
            if spare > 0 && now >= later(since, idle_timeout) {
                spare -= 1;
                gone.push(seat);
            } else if spare > 0 {
                let at = later(since, idle_timeout);
                next = Some(next.map_or(at, |next: Instant| next.min(at)));
            }
        }
        gone.into_iter().for_each(|seat| self.retire(seat, after));
        if let Some(next) = next.filter(|_| !std::mem::replace(&mut self.is_idle_planned, true)) {
            self.at(next, Event::Idle, after);
        }
    }

    /// Which seats are to get a worker now.
    fn hires(&mut self, now: Instant, after: &mut After) -> Vec<Hire> {
        let (mut hires, mut later) = (Vec::new(), None);
        for (number, seat) in self.seats.iter_mut().enumerate() {
            match seat.vacant {
                Some(at) if at <= now => {
                    (seat.vacant, seat.is_hiring) = (None, true);
                    self.generation += 1;
                    hires.push(Hire { seat: number, generation: self.generation });
                }
                Some(at) => later = Some(later.map_or(at, |later: Instant| later.min(at))),
                None => {}
            }
        }
        if let Some(at) = later {
            self.at(at, Event::Hire, after);
        }
        hires
    }

    /// A seat's worker did not come to anything.
    fn failed(&mut self, seat: usize, error: &Error, after: &mut After) {
        after.nudge = true;
        let needs = self.needs_workers(after);
        let Some(place) = self.seats.get_mut(seat) else { return };
        place.is_hiring = false;
        place.failures += 1;
        if place.failures >= CRASH_LOOP || error.kind() == ErrorKind::NotInitialized {
            return self.break_down(error, after);
        }
        place.vacant = needs.then(|| Instant::now() + BACK_OFF * (1 << place.failures.min(8)) / 2);
    }

    fn needs_workers(&self, after: &After) -> bool {
        let is_done = self.is_closed && (self.open == 0 || self.is_shut) && self.out == after.settled;
        !self.is_terminated && self.broken.is_none() && !is_done
    }

    /// No worker can be had: everybody is told why.
    fn break_down(&mut self, why: &Error, after: &mut After) {
        let why = why.to_string();
        self.broken = Some(why.clone());
        self.fail_all(after, || broken(&why));
        self.seats.iter_mut().for_each(|seat| seat.vacant = None);
    }

    /// Settles everything there is.
    fn fail_all(&mut self, after: &mut After, error: impl Fn() -> Error) {
        self.fail_waiting(after, &error);
        for (_, worker) in self.workers() {
            for running in worker.running.drain(..) {
                let Running { group, chunk, done, end, number, .. } = running;
                worker.lane.take_back(number, 0);
                after.fail(&group, &chunk, (done, end), &error);
                group.forget(&chunk);
            }
            // Whatever it still says is nobody's.
            worker.kill(None);
        }
    }

    /// Settles everything that no worker has.
    fn fail_waiting(&mut self, after: &mut After, error: impl Fn() -> Error) {
        for group in std::mem::take(&mut self.queue) {
            let pending = {
                let mut items = group.items();
                items.is_queued = false;
                std::mem::take(&mut items.pending)
            };
            pending.iter().for_each(|chunk| after.fail_pending(&group, chunk, &error));
        }
        for Reverse(timer) in std::mem::take(&mut self.timers) {
            match timer.event {
                Event::Retry(group, chunk) => after.fail(&group, &chunk, (0, chunk.count), &error),
                // What is over needs no deadline, and what runs on keeps its own.
                _ => self.timers.push(Reverse(timer)),
            }
        }
        after.nudge = true;
    }

    /// A worker has ended: what it had goes to others, but for the item that it was at.
    fn bury(&mut self, seat: usize, generation: u64, status: &Result<ExitStatus>, after: &mut After) {
        after.nudge = true;
        if self.worker(seat, generation).is_none() {
            return;
        }
        self.reclaim(seat, 1, after);
        let Some(mut worker) = self.seats.get_mut(seat).and_then(|seat| seat.worker.take()) else { return };
        let was_planned = worker.phase == Phase::Leaving;
        // An item that kills whoever runs it says nothing about the workers.
        worker.has_worked |= worker.running.iter().any(|running| running.done < running.end);
        for running in std::mem::take(&mut worker.running) {
            let Running { group, chunk, done, end, .. } = running;
            group.forget(&chunk);
            // At most one item was at work; more would be a worker that lies.
            for item in done..end {
                let error = match worker.doom.take() {
                    Some(doom) => doom,
                    None => {
                        let doing = match chunk.attempt {
                            0 => format!("item {} of {}", chunk.first + u64::from(item), group.label),
                            n => {
                                format!("item {} of {} (attempt {})", chunk.first + u64::from(item), group.label, n + 1)
                            }
                        };
                        worker.death(status, &doing)
                    }
                };
                let may_retry = matches!(error.kind(), ErrorKind::ProcessDied | ErrorKind::Timeout);
                if !may_retry || chunk.attempt >= group.options.retries || group.items().is_cancelled {
                    after.fail(&group, &chunk, (item, item + 1), || Error::copy(&error));
                    continue;
                }
                let mut again = chunk.part(item, item + 1);
                again.attempt += 1;
                let wait = group.options.back_off.saturating_mul(1 << chunk.attempt.min(16));
                match wait.is_zero() {
                    true => self.again(&group, again, after),
                    false => self.at(later(Instant::now(), wait), Event::Retry(group.clone(), again), after),
                }
            }
        }
        let is_wanted = seat < self.rules.least || seat < self.rules.most && !self.queue.is_empty();
        if !self.needs_workers(after) || !is_wanted {
            return;
        }
        if let Some(error) = &worker.overdue {
            return self.failed(seat, error, after);
        }
        let has_worked = worker.has_worked || was_planned || worker.phase == Phase::Doomed;
        match has_worked {
            true => {
                let place = &mut self.seats[seat];
                (place.failures, place.vacant) = (0, Some(Instant::now()));
            }
            false => {
                let doing = if worker.phase == Phase::Beginning { "its initializer" } else { "nothing" };
                self.failed(seat, &worker.death(status, doing), after);
            }
        }
    }

    /// Sends the workers home when nothing is left and nothing can come.
    fn end_if_done(&mut self, after: &mut After) {
        self.plan_to_share(after);
        if self.rules.least < self.rules.most && !self.is_idle_planned {
            self.send_home(Instant::now(), after);
        }
        if !self.is_closed || self.open > 0 && !self.is_shut || self.out > after.settled {
            return;
        }
        for seat in 0..self.seats.len() {
            after.nudge |= self.seats[seat].vacant.take().is_some();
            self.dismiss(seat, after);
        }
        // A pool whose workers never came has nobody whose end would tell the driver.
        after.nudge |= self.seats.iter().all(|seat| !seat.is_taken());
    }
}

/// Has groups learn from items that one worker has done in `time`; what came together is taken to have taken equally long.
fn teach(ended: &mut Vec<(Arc<Group>, u32)>, time: Duration, runs: &mut Histogram) {
    let total = ended.iter().map(|(_, count)| *count).sum::<u32>().max(1);
    for (group, count) in ended.drain(..).filter(|(_, count)| *count > 0) {
        group.learn(time / total * count, count);
        runs.add(time / total, u64::from(count));
    }
}

/// `while_` after `now`; what is too far off to be told is never.
fn later(now: Instant, while_: Duration) -> Instant {
    const NEVER: Duration = Duration::from_secs(30 * 365 * 86400);
    now + while_.min(NEVER)
}

fn corrupt(who: &str) -> Error {
    Error::new(ErrorKind::Decode, format!("{who} wrote into the memory that its results come through; it was killed"))
}

impl Seat {
    fn is_beginning(&self) -> bool {
        self.worker.as_ref().is_some_and(|worker| worker.phase == Phase::Beginning && worker.begun.is_none())
    }
}

impl Worker {
    /// Whether it may have an order of `len` bytes, with at most `depth` under way.
    fn takes(&mut self, depth: usize, len: usize) -> bool {
        let is_carried = self.lane.can_carry(len + Header::LEN);
        let carried = if is_carried { len } else { 0 };
        self.phase == Phase::Serving
            && (is_carried || !self.is_full || self.running.is_empty())
            && self.running.len() < depth
            && (self.given < self.share || self.lease > 0)
            && self.lane.takes(carried + Header::LEN)
    }

    /// Sends an order; `None` if there is no room now.
    fn give(&mut self, group: &Group, chunk: &mut Chunk) -> Result<Option<u32>> {
        let (header, items) = (chunk.header(group), chunk.count as usize);
        if chunk.attachments.is_empty() && self.lane.can_carry(chunk.bytes().len() + Header::LEN) {
            return Ok(self.lane.give(0, [&header, chunk.bytes()], items));
        }
        match self.orders.try_send(chunk.seal()) {
            Ok(()) => Ok(self.lane.give(IN_PIPE, [&header, &[]], items)),
            Err(error) if error.kind() == ErrorKind::Full => {
                self.is_full = true;
                Ok(None)
            }
            Err(error) if error.kind() == ErrorKind::Closed => {
                // It is gone; its exit will be told.
                self.phase = Phase::Doomed;
                Ok(None)
            }
            Err(error) => Err(error.into_error()),
        }
    }

    /// Takes in `count` results. The first of a worker with an initializer is that one's.
    fn deliver(
        &mut self,
        mut bytes: Vec<u8>,
        count: u32,
        runs: &mut Histogram,
        after: &mut After,
    ) -> Result<Option<Result<Sealed>>> {
        let (now, mut begun) = (after.now(), None);
        let since = self.running.front().map(|running| running.since);
        let (mut at, mut left) = (0, count);
        self.has_worked |= count > 0 && !self.is_awaited;
        self.is_full &= count == 0;
        if self.is_awaited && left > 0 {
            self.is_awaited = false;
            let (_, _, len) = spsc::first(&bytes).ok_or_else(|| corrupt(&self.name))?;
            begun = Some(self.mail.report());
            (at, left) = (len, left - 1);
        }
        while left > 0 {
            self.pop_complete(Some(now), &mut after.ended);
            let Some(running) = self.running.front_mut() else {
                // What was given up, such as by a termination, may still be answered.
                return if self.phase == Phase::Doomed { Ok(None) } else { Err(corrupt(&self.name)) };
            };
            let (start, first, most) =
                (at, running.chunk.first + u64::from(running.done), left.min(running.end - running.done));
            let (mut plain, mut failures, mut in_pipe, mut told) = (0, 0, None, false);
            while plain < most {
                let (tag, _, len) =
                    spsc::first(bytes.get(at..).unwrap_or_default()).ok_or_else(|| corrupt(&self.name))?;
                if tag == TOLD {
                    told = true;
                    break;
                }
                if tag & IN_PIPE != 0 {
                    in_pipe = Some((tag & !IN_PIPE, len));
                    break;
                }
                at += len;
                plain += 1;
                failures += u32::from(tag != IS_VALUE);
            }
            if plain > 0 {
                let block = match start == 0 && at == bytes.len() {
                    true => std::mem::take(&mut bytes),
                    false => bytes[start..at].to_vec(),
                };
                running.done += plain;
                self.answered += u64::from(plain);
                left -= plain;
                after.deliver(&running.group, Block::told(first, plain, failures, block));
            }
            if told {
                let (_, said, len) =
                    spsc::first(bytes.get(at..).unwrap_or_default()).ok_or_else(|| corrupt(&self.name))?;
                if let Some(caller) = &running.group.caller {
                    self.ear.hear(caller, said);
                    after.ears.push(self.ear.clone());
                }
                at += len;
                left -= 1;
            }
            if let Some((tag, len)) = in_pipe {
                at += len;
                running.done += 1;
                self.answered += 1;
                left -= 1;
                after.announce(&self.mail, &running.group, first + u64::from(plain), tag);
            }
        }
        self.pop_complete(Some(now), &mut after.ended);
        teach(&mut after.ended, since.map_or(Duration::ZERO, |since| now.duration_since(since)), runs);
        Ok(begun)
    }

    /// Lets go of orders that are done; `now` if they came to their end just now, and are to be counted among `ended`.
    fn pop_complete(&mut self, now: Option<Instant>, ended: &mut Vec<(Arc<Group>, u32)>) {
        while self.running.front().is_some_and(|running| running.done >= running.end) {
            let Some(running) = self.running.pop_front() else { return };
            running.group.forget(&running.chunk);
            if let Some(now) = now {
                match ended.last_mut() {
                    Some((group, count)) if Arc::ptr_eq(group, &running.group) => *count += running.done,
                    _ => ended.push((running.group, running.done)),
                }
                self.running.front_mut().into_iter().for_each(|next| next.since = now);
            }
            if self.running.is_empty() {
                self.idle_since = Some(now.unwrap_or_else(Instant::now));
            }
        }
    }

    /// Ends it; `doom` is what to tell about the item that it is at.
    fn kill(&mut self, doom: Option<Error>) {
        self.phase = Phase::Doomed;
        self.doom = doom;
        // Whoever cannot be killed has ended.
        let _ = self.killer.kill();
    }

    /// What to tell about one that is gone.
    fn death(&self, status: &Result<ExitStatus>, doing: &str) -> Error {
        let how = match status {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        let mut text = format!("{} died while it ran {doing}: {how}", self.name);
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
        Error::new(ErrorKind::ProcessDied, text).with_exit_status(status.as_ref().ok().copied())
    }
}
