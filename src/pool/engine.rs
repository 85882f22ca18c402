//! The scheduler: one state behind one short lock. Events go in, orders and kills go out.
//!
//! No user code runs under the lock and nothing is decoded there. Whoever has a reason to drives it: a caller that
//! submits gives the order itself, a caller that waits collects results itself, the bell collects them when nobody
//! looks, and the driver does the rest: exits, deadlines, replacements. Each item is settled once: by its result, or by
//! what happened to its worker.

use super::group::{Block, Chunk, Group};
use super::local;
use super::mail::{Mail, Outbox, Unsent};
use super::protocol::{Conditions, Task};
use super::scheduler::{
    Circumstances, Effects, Event, Hire, Phase, Rules, Scheduler, Worker, broken, later, orphaned, shut, terminated,
};
use super::stats::{PoolStats, WorkerStats};
use super::trace::Ear;
use crate::channel::lane::{Board, PoolEnd};
use crate::channel::{Receiver, Sender};
use crate::error::{Error, Result};
use crate::os::fork;
use crate::process::{Killer, StartMethod};
use crate::wait::Line;
use crate::wire::{Parcel, Sealed};
use std::cmp::Reverse;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak, mpsc};
use std::task::Waker;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

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
    pub(super) backtraces: Option<bool>,
    /// Its one worker is a thread here.
    pub(super) is_local: bool,
    /// What was asked to stop may finish within this; then its worker is killed.
    pub(super) grace: Duration,
}

/// What all who drive a pool share.
pub(super) struct Shared {
    pub(super) settings: Settings,
    state: Mutex<Scheduler>,
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

/// What the driver is to do.
pub(super) struct Step {
    pub(super) hires: Vec<Hire>,
    /// What initializers had to say.
    pub(super) begun: Vec<(usize, u64, Result<Sealed>)>,
    /// Where results lie that nobody fetches.
    pub(super) unfetched: Vec<Arc<Mail>>,
    pub(super) until: Option<Instant>,
    /// No worker is to be started any more.
    pub(super) is_unneeded: bool,
    pub(super) is_over: bool,
}

/// The workers are those of the process that this one was forked from, and its lock may be held by a thread of that one.
pub(super) fn check_forked() -> Result<()> {
    fork::check().map_err(|error| Error::io("cannot use a pool", error))
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
        let mut state = Scheduler { rules, ..Scheduler::default() };
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

    fn state(&self) -> MutexGuard<'_, Scheduler> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn alarm(&self) -> Option<&Arc<Line>> {
        self.alarm.get()
    }

    /// Ends a change of the state.
    fn leave(&self, mut state: MutexGuard<'_, Scheduler>, effects: Effects) {
        state.out -= effects.settled;
        let beginning = state.seats.iter().filter(|seat| seat.is_beginning()).count();
        self.out.store(state.out + beginning, Release);
        drop(state);
        effects.ears.iter().for_each(|ear| ear.pass_on());
        for (worker, timeout) in effects.late {
            tracing::warn!(%worker, ?timeout, "a worker that was to end did not; it was killed");
        }
        if effects.nudge {
            self.nudge.notify_one();
        }
        effects.wakers.into_iter().for_each(Waker::wake);
        effects.unsent.iter().for_each(|(outbox, unsent)| self.was_unsent(outbox, unsent));
        // Large orders last of all, as they take their time.
        for outbox in &effects.outboxes {
            outbox.send().iter().for_each(|unsent| self.was_unsent(outbox, unsent));
        }
    }

    fn was_unsent(&self, outbox: &Arc<Outbox>, unsent: &Unsent) {
        self.with(|state, effects| {
            state.was_unsent(outbox, unsent, effects);
            state.dispatch(effects);
            state.end_if_done(effects);
        });
    }

    fn with<T>(&self, change: impl FnOnce(&mut Scheduler, &mut Effects) -> T) -> T {
        let (mut state, mut effects) = (self.state(), Effects::default());
        let result = change(&mut state, &mut effects);
        self.leave(state, effects);
        result
    }

    /// Something begins that adds items: a call, or a checkout. Calls of a checkout, whose number is `lease`, go on after a
    /// close, for it was taken before.
    pub(super) fn open(&self, lease: u64) -> Result<()> {
        check_forked()?;
        let mut state = self.state();
        if state.is_orphaned {
            return Err(orphaned());
        }
        if state.is_closed && (lease == 0 || state.is_shut || state.is_terminated) {
            return Err(Error::closed("pool"));
        }
        if let Some(why) = &state.broken {
            return Err(broken(why));
        }
        state.open += 1;
        Ok(())
    }

    /// It adds no more.
    pub(super) fn finish(&self) {
        self.with(|state, effects| {
            state.open -= 1;
            state.end_if_done(effects);
        });
    }

    pub(super) fn close(&self) {
        if fork::is_forked() {
            return;
        }
        self.with(|state, effects| {
            state.is_closed = true;
            state.end_if_done(effects);
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
        self.with(|state, effects| {
            if state.broken.take().is_some() {
                state.seats.iter_mut().for_each(|seat| seat.failures = 0);
                // Others come when they are needed, and those that are dying are replaced at their burial.
                if state.needs_workers(effects) {
                    state.open_seats();
                }
                effects.nudge = true;
            }
        });
    }

    pub(super) fn terminate(&self) {
        if fork::is_forked() {
            return;
        }
        self.with(|state, effects| {
            (state.is_closed, state.is_terminated) = (true, true);
            state.fail_all(effects, terminated);
            state.seats.iter_mut().for_each(|seat| seat.vacant = None);
        });
    }

    /// The last holder is gone, or the pool's runtime: nothing is waited for any more, or can be done.
    pub(super) fn let_go(&self) {
        self.with(|state, effects| {
            (state.is_closed, state.is_terminated) = (true, true);
            state.let_go(effects);
            state.seats.iter_mut().for_each(|seat| seat.vacant = None);
        });
    }

    /// Hands chunks in, and on to workers that are free.
    pub(super) fn submit(&self, group: &Arc<Group>, mut chunks: Vec<Chunk>) {
        self.with(|state, effects| {
            let items = chunks.iter().map(|chunk| chunk.count as usize).sum::<usize>();
            group.items().out += items;
            state.out += items;
            if group.options.queue_timeout.is_some() {
                let now = effects.now();
                chunks.iter_mut().for_each(|chunk| chunk.queued = Some(now));
                state.watch_queue(group, now, effects);
            }
            let refused = state.gave_up().or_else(|| state.broken.as_deref().map(broken));
            if let Some(error) = refused {
                chunks.iter().for_each(|chunk| effects.fail(group, chunk, (0, chunk.count), || Error::copy(&error)));
                return;
            }
            let new = chunks.len();
            state.enqueue(group, chunks.drain(..), false);
            state.dispatch(effects);
            // What found a worker at once needs no clock to tell how long it waited.
            let mut items = group.items();
            let waiting = items.pending.len().min(new);
            if waiting > 0 {
                let now = effects.now();
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
        state.gave_up().or_else(|| is_cancelled.then(|| group.was_cancelled()))
    }

    /// An item's outcome, from that thread.
    pub(super) fn settle(&self, group: &Group, block: Block) {
        self.with(|state, effects| {
            effects.deliver(group, block);
            state.end_if_done(effects);
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
        self.with(|state, effects| {
            let leased = state.workers().find(|(_, worker)| worker.lease == lease).map(|(seat, worker)| {
                worker.lease = 0;
                (seat, worker.is_due || worker.given >= worker.share)
            });
            if let Some((seat, true)) = leased {
                state.retire(seat, effects);
            }
            state.dispatch(effects);
            state.plan_to_look(effects);
            state.end_if_done(effects);
        });
    }

    /// Collects what has come from the workers and gives out what waits for them; whether there are items out whose
    /// callers have not been woken.
    pub(super) fn pump(&self) -> bool {
        self.with(|state, effects| {
            if state.collect(effects) {
                state.dispatch(effects);
                state.end_if_done(effects);
            }
            state.out - effects.settled > effects.woken
        })
    }

    /// The same for who does so again and again: not if somebody else is at it.
    #[inline]
    pub(super) fn try_pump(&self) {
        let Ok(mut state) = self.state.try_lock() else { return };
        if !state.has_results() {
            return;
        }
        let mut effects = Effects::default();
        if state.collect(&mut effects) {
            state.dispatch(&mut effects);
            state.end_if_done(&mut effects);
        }
        self.leave(state, effects);
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
        self.with(|state, effects| {
            if state.has_results() && state.collect(effects) {
                state.dispatch(effects);
                state.end_if_done(effects);
            }
            state.plan_to_look(effects);
        });
    }

    /// The same for who has many quick items out: it need not hear of results before a worker begins its last order.
    pub(super) fn rest(&self) {
        if let Some(alarm) = self.alarm.get() {
            let _ = alarm.arm();
        }
        self.with(|state, effects| {
            if state.has_news() && state.collect(effects) {
                state.dispatch(effects);
                state.end_if_done(effects);
            }
            state.plan_to_look(effects);
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
        self.with(|state, effects| {
            let (pending, was_cancelled, is_queued) = {
                let mut items = group.items();
                let was = std::mem::replace(&mut items.is_cancelled, true);
                (std::mem::take(&mut items.pending), was, items.is_queued)
            };
            if was_cancelled {
                return;
            }
            if is_queued {
                state.queue.was_emptied();
            }
            pending.iter().for_each(|chunk| effects.fail_pending(group, chunk, || group.was_cancelled()));
            state.forget_retries(group, effects);
            state.revoke(group, effects);
            state.dispatch(effects);
            state.plan_to_look(effects);
            state.end_if_done(effects);
        });
    }

    /// From now on there are so many workers.
    pub(super) fn resize(&self, workers: RangeInclusive<usize>) {
        self.with(|state, effects| {
            (state.rules.least, state.rules.most) = (*workers.start(), *workers.end());
            if state.needs_workers(effects) {
                state.open_seats();
            }
            for seat in state.rules.most..state.seats.len() {
                state.seats[seat].vacant = None;
                state.retire(seat, effects);
            }
            state.dispatch(effects);
            effects.nudge = true;
        });
        // Whoever waits for an earlier resize is to see that this one has come.
        self.running.send_modify(|running| *running = self.alive(&self.state()));
    }

    /// How many workers run or are to run.
    fn alive(&self, state: &Scheduler) -> usize {
        let is_done = state.is_closed && (state.open == 0 || state.is_shut) && state.out == 0;
        match self.local {
            _ if state.is_abandoned => 0,
            Some(_) => usize::from(!is_done),
            None => state.seats.iter().filter(|seat| seat.is_taken()).count(),
        }
    }

    /// Tells those who want to know how many that are. Without the lock, for it wakes them; whoever tells last has looked
    /// last.
    fn tell_count(&self) {
        self.running.send_if_modified(|running| {
            let alive = self.alive(&self.state());
            std::mem::replace(running, alive) != alive
        });
    }

    pub(super) fn most_workers(&self) -> usize {
        self.state().rules.most
    }

    /// Takes nothing more and gives up what has not started: how many items that is.
    pub(super) fn shut(&self) -> usize {
        self.with(|state, effects| {
            (state.is_closed, state.is_shut) = (true, true);
            let before = effects.settled;
            for seat in 0..state.seats.len() {
                state.reclaim(seat, 1, effects);
            }
            state.fail_waiting(effects, shut);
            let lost = effects.settled - before;
            state.end_if_done(effects);
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
        let step = self.with(|state, effects| {
            let now = Instant::now();
            if state.collect(effects) {
                state.dispatch(effects);
            }
            let mut has_looked = false;
            while state.timers.peek().is_some_and(|Reverse(timer)| timer.at <= now) {
                let Some(Reverse(timer)) = state.timers.pop() else { break };
                has_looked |= matches!(timer.event, Event::Look);
                state.on(timer.event, now, effects);
            }
            state.dispatch(effects);
            state.end_if_done(effects);
            // What was given out just now may be slow, too; but who gives out all the time is awake.
            if !has_looked {
                state.plan_to_look(effects);
            }
            let hires = state.hires(now, effects);
            let begun = state
                .workers()
                .filter_map(|(seat, worker)| worker.begun.take().map(|report| (seat, worker.generation, report)));
            let begun = begun.collect();
            state.alert = state.timers.peek().map(|Reverse(timer)| timer.at);
            let is_over = state.is_closed && self.alive(state) == 0;
            let is_unneeded = state.is_closed && !state.needs_workers(effects);
            effects.nudge = false;
            let unfetched = std::mem::take(&mut effects.unfetched);
            Step { hires, begun, unfetched, until: state.alert, is_unneeded, is_over }
        });
        self.tell_count();
        step
    }

    /// An initializer's report was read.
    pub(super) fn began(&self, seat: usize, generation: u64, outcome: Result<()>) {
        self.with(|state, effects| {
            let Some(worker) = state.worker(seat, generation) else { return };
            match outcome {
                Ok(()) if worker.phase == Phase::Beginning => worker.phase = Phase::Serving,
                Ok(()) => {}
                Err(error) => {
                    let why = Error::other(format!("the initializer of {} failed: {error}", worker.name));
                    worker.kill(None);
                    state.break_down(&why, effects);
                }
            }
            state.dispatch(effects);
            state.end_if_done(effects);
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
        self.with(|state, effects| {
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
            let spread = |most: u64| (generation.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % most.saturating_add(1);
            let jitter = (spread(state.rules.tasks_jitter as u64) as usize).min(state.rules.max_tasks - 1);
            let share = state.rules.max_tasks - jitter;
            let worker = Worker {
                generation: *generation,
                name,
                pid,
                killer,
                lane,
                outbox: Outbox::new(orders),
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
                full: None,
                unsent: None,
                stalled: None,
                moved: now,
                is_ready: false,
                begun: None,
                leaving: None,
                overdue: None,
                end: Circumstances::default(),
                doom: None,
            };
            if let Some(seat) = state.seats.get_mut(*seat) {
                (seat.worker, seat.is_hiring) = (Some(worker), false);
            }
            if let Some(timeout) = self.settings.initializer_timeout.filter(|_| phase == Phase::Beginning) {
                state.at(later(now, timeout), Event::Initializer(*seat, *generation, timeout), effects);
            }
            if let Some(age) = state.rules.max_age {
                // Up to a tenth earlier, so that they do not all go at once.
                let age = age - age / 1000 * spread(100) as u32;
                state.at(later(now, age), Event::Age(*seat, *generation), effects);
            }
            if *seat >= state.rules.most {
                // There was a resize while it was on its way.
                state.retire(*seat, effects);
            }
            state.dispatch(effects);
            state.end_if_done(effects);
        });
        self.stir();
    }

    /// A worker could not be started.
    pub(super) fn not_hired(&self, hire: &Hire, error: &Error) {
        self.with(|state, effects| state.failed(hire.seat, error, effects));
    }

    /// A worker has ended.
    pub(super) fn died(&self, seat: usize, generation: u64, status: Result<ExitStatus>, end: Circumstances) {
        self.with(|state, effects| {
            state.collect(effects);
            if let Some(worker) = state.worker(seat, generation) {
                worker.end = end;
            }
            state.bury(seat, generation, &status, effects);
            state.dispatch(effects);
            state.end_if_done(effects);
        });
    }

    /// Nobody drives any more: all is over, or the runtime that the driver ran on has ended.
    pub(super) fn abandon(&self, is_over: bool) {
        let mut state = self.state();
        if !state.is_terminated {
            state.is_orphaned = !is_over;
            drop(state);
            self.let_go();
        } else {
            drop(state);
        }
        self.state().is_abandoned = true;
        self.tell_count();
    }
}
