//! The scheduler's lock, and the work that is left once it is released: wake callers, send large orders.
//!
//! No user code runs under the lock, and nothing is decoded there. Each party drives the scheduler for its own purpose:
//!
//! | party | does |
//! |---|---|
//! | a caller that submits | gives the order to a worker |
//! | a caller that waits | collects results, its own and those of others |
//! | the reaction to the doorbell | collects results while no caller polls for them |
//! | the driver | handles exits, deadlines and replacements |

use super::batch::ResultBatch;
use super::call_items::CallItems;
use super::chunk::Chunk;
use super::config::Config;
use super::options::ChunkLimits;
use super::scheduler::{Circumstances, Control, Effects, Scheduler, Spawn, Spawned, Step, TakenOrder};
use super::side_channel::{SideOrders, SideResults, Unsent};
use super::stats::{Deaths, PoolStats};
use super::taker::{Handed, Orders, Source, Start, Taker};
use crate::channel::lane::{Board, PoolEnd};
use crate::channel::{Receiver, Sender};
use crate::error::{Error, Result, Topic};
use crate::os::fork;
use crate::os::sync::lock;
use crate::wait::WaitQueue;
use crate::wire::EncodedMessage;
use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::task::Waker;
use std::time::Duration;
use tokio::runtime;
use tokio::sync::{Notify, watch};

/// The state that all parties of a pool share.
pub(super) struct Shared {
    pub(super) config: Arc<Config>,
    scheduler: Mutex<Scheduler>,
    pub(super) board: Arc<Board>,
    alarm: OnceLock<Arc<WaitQueue>>,
    /// The executor of a pool without worker processes.
    taker: OnceLock<Arc<dyn Taker>>,
    /// How many orders can be executed at the same time, of items that take a while and of quiet ones.
    slots: [AtomicUsize; 2],
    /// Items submitted and not settled.
    out: AtomicUsize,
    /// The driver has something to do.
    pub(super) nudge: Notify,
    /// Workers that run or are to run.
    pub(super) running: watch::Sender<usize>,
}

/// The workers are those of the process that this one was forked from, and its lock may be held by a thread of that one.
pub(super) fn check_forked() -> Result<()> {
    fork::check().map_err(|error| Error::io("cannot use a pool", error))
}

/// A wait for the end of the pool.
pub(super) struct Joining<'a>(&'a Shared);

impl Drop for Joining<'_> {
    fn drop(&mut self) {
        if !fork::is_forked() {
            self.0.event(|scheduler, _| scheduler.join_ended());
        }
    }
}

impl Shared {
    pub(super) fn new(config: Config, start: Option<Start>) -> Result<Arc<Self>> {
        let failed = |error| Error::io("cannot create a pool", error);
        let (config, board) = (Arc::new(config), Arc::new(Board::create().map_err(failed)?));
        let running = watch::Sender::new(config.workers.start() + usize::from(config.is_external));
        let scheduler = Scheduler::new(config.clone(), board.clone());
        let (slots, brief) = scheduler.slots();
        let shared = Arc::new(Self {
            config,
            scheduler: Mutex::new(scheduler),
            board,
            alarm: OnceLock::new(),
            taker: OnceLock::new(),
            slots: [slots, brief].map(AtomicUsize::new),
            out: AtomicUsize::new(0),
            nudge: Notify::new(),
            running,
        });
        if let Some(start) = start {
            let source: Weak<dyn Source> = Arc::<Self>::downgrade(&shared);
            let _ = shared.taker.set(start(Orders::of(source))?);
        }
        let weak = Arc::downgrade(&shared);
        let react = move || weak.upgrade().into_iter().for_each(|shared| shared.answer());
        let alarm = shared.board.alarm(react).map_err(failed)?;
        // From now on this runtime reacts to the doorbell, also for callers without a runtime.
        alarm.arm().map_err(failed)?;
        alarm.disarm();
        let _ = shared.alarm.set(alarm);
        Ok(shared)
    }

    fn scheduler(&self) -> MutexGuard<'_, Scheduler> {
        lock(&self.scheduler)
    }

    pub(super) fn alarm(&self) -> Option<&Arc<WaitQueue>> {
        self.alarm.get()
    }

    /// Ends an event, and those that follow from it.
    fn leave(&self, scheduler: MutexGuard<'_, Scheduler>, effects: Effects) {
        let mut unsent = VecDeque::from(self.leave_once(scheduler, effects));
        // Each may have its worker given another order that cannot be sent either.
        while let Some((side_orders, one)) = unsent.pop_front() {
            let (mut scheduler, mut effects) = (self.scheduler(), Effects::default());
            scheduler.not_sent(&side_orders, &one, &mut effects);
            unsent.extend(self.leave_once(scheduler, effects));
        }
    }

    /// Returns the orders that could not be sent.
    #[must_use]
    fn leave_once(
        &self,
        mut scheduler: MutexGuard<'_, Scheduler>,
        mut effects: Effects,
    ) -> Vec<(Arc<SideOrders>, Unsent)> {
        self.out.store(scheduler.leave(&mut effects), Release);
        drop(scheduler);
        effects.trace_sinks.iter().for_each(|trace_sink| trace_sink.pass_on());
        if effects.nudge {
            self.nudge.notify_one();
        }
        if let Some(taker) = self.taker.get().filter(|_| effects.notify_taker) {
            taker.notify();
        }
        effects.wakers.into_iter().for_each(Waker::wake);
        let mut unsent = effects.unsent;
        // Large orders last of all, as they take their time.
        for side_orders in effects.side_orders {
            unsent.extend(side_orders.send().into_iter().map(|unsent| (side_orders.clone(), unsent)));
        }
        // It runs code of a subscriber, whose panic must not keep the rest from being done.
        for (worker, timeout) in effects.late {
            let help = Topic::WorkerLate.name();
            tracing::warn!(%worker, ?timeout, help, "a worker that was to end did not; it was killed");
        }
        unsent
    }

    fn event<T>(&self, happens: impl FnOnce(&mut Scheduler, &mut Effects) -> T) -> T {
        let (mut scheduler, mut effects) = (self.scheduler(), Effects::default());
        let result = happens(&mut scheduler, &mut effects);
        self.leave(scheduler, effects);
        result
    }

    /// Something begins that adds items; see [`Scheduler::opened`].
    pub(super) fn open(&self, checkout: u64) -> Result<()> {
        check_forked()?;
        self.scheduler().opened(checkout)
    }

    /// Another attempt of a call that is open.
    pub(super) fn open_again(&self) {
        self.scheduler().opened_again();
    }

    /// It adds no more.
    pub(super) fn finish(&self) {
        self.event(Scheduler::finished);
    }

    pub(super) fn close(&self) {
        if !fork::is_forked() {
            self.event(Scheduler::closed);
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.scheduler().is_closed()
    }

    /// From now on a caller waits for the end of the pool, until the guard is dropped: callers that spin for their results no longer count on being
    /// polled.
    pub(super) fn wait_for_end(&self) -> Joining<'_> {
        self.event(|scheduler, _| scheduler.joined());
        self.arm_alarm();
        Joining(self)
    }

    pub(super) fn is_broken(&self) -> Option<String> {
        self.scheduler().broken()
    }

    pub(super) fn revive(&self) {
        self.event(Scheduler::revived);
    }

    pub(super) fn terminate(&self) {
        if !fork::is_forked() {
            self.event(Scheduler::terminated);
        }
    }

    pub(super) fn let_go(&self) {
        self.event(Scheduler::let_go);
    }

    /// Reserves room for up to `wanted` items of `group`, and returns for how many. If for none, `waker` is woken when there is room, and `ticket`
    /// keeps the place until then.
    pub(super) fn reserve(
        &self,
        group: &CallItems,
        wanted: usize,
        ticket: &mut Option<u64>,
        waker: Option<&Waker>,
    ) -> usize {
        match self.config.max_waiting {
            Some(_) if group.needs_room() => {
                // Cloned and dropped without the lock: a waker is foreign code.
                let mut waker = waker.cloned();
                let room = self.scheduler().room_wanted(wanted, ticket, &mut waker);
                drop(waker);
                self.note_line(room);
                room
            }
            _ => wanted,
        }
    }

    /// A caller that got no room is in line now, which those that spin are to know.
    fn note_line(&self, room: usize) {
        if room == 0 {
            self.event(|_, _| ());
        }
    }

    /// There were so many items fewer than there was room for.
    pub(super) fn give_back(&self, group: &CallItems, items: usize) {
        if self.config.max_waiting.is_some() && group.needs_room() && items > 0 {
            self.event(|scheduler, _| scheduler.room_left_over(items));
        }
    }

    /// Whether there is room for one item. If there is none, `waker` is woken when there is; see [`reserve`](Self::reserve).
    #[cfg(feature = "tower")]
    pub(super) fn reserve_one(&self, ticket: &mut Option<u64>, waker: &Waker) -> bool {
        let mut waker = Some(waker.clone());
        let room = self.scheduler().room_wanted(1, ticket, &mut waker);
        drop(waker);
        self.note_line(room);
        if room == 0 {
            self.arm_alarm();
        }
        room == 1
    }

    /// That room is not wanted any more, or its item has been handed in.
    #[cfg(feature = "tower")]
    pub(super) fn give_back_one(&self) {
        self.event(|scheduler, _| scheduler.room_left_over(1));
    }

    /// Whether a call could be made now.
    #[cfg(feature = "tower")]
    pub(super) fn check_open(&self) -> Result<()> {
        self.scheduler().check_open(0)
    }

    /// The caller with `ticket` waits for room no longer.
    pub(super) fn leave_line(&self, ticket: u64) {
        let waker = self.event(|scheduler, _| scheduler.room_not_wanted(ticket));
        drop(waker);
    }

    /// Hands chunks in, and on to workers that are free.
    pub(super) fn submit(&self, group: &Arc<CallItems>, chunks: Vec<Chunk>) {
        self.event(|scheduler, effects| scheduler.submitted(group, chunks, effects));
    }

    /// The executor of the items, if that is not worker processes.
    pub(super) fn taker(&self) -> Option<&Arc<dyn Taker>> {
        self.taker.get()
    }

    pub(super) fn has_processes(&self) -> bool {
        !self.config.is_external
    }

    /// How much goes into one chunk.
    pub(super) fn chunk_limits(&self) -> ChunkLimits {
        self.config.chunks
    }

    /// Returns how many orders can be executed at the same time, at least 1; fewer workers get `brief` items.
    pub(super) fn slots(&self, brief: bool) -> usize {
        self.slots[usize::from(brief)].load(Relaxed)
    }

    /// The number that the taker has set.
    pub(super) fn external_slots(&self) -> usize {
        self.scheduler().external_slots()
    }

    fn slots_changed<T>(&self, happens: impl FnOnce(&mut Scheduler, &mut Effects) -> T) -> T {
        // Before callers are woken.
        self.event(|scheduler, effects| {
            let result = happens(scheduler, effects);
            let (slots, brief) = scheduler.slots();
            self.slots[0].store(slots, Relaxed);
            self.slots[1].store(brief, Relaxed);
            result
        })
    }

    pub(super) fn new_checkout(&self) -> u64 {
        self.scheduler().new_checkout()
    }

    pub(super) fn release(&self, checkout: u64) {
        self.event(|scheduler, effects| scheduler.released(checkout, effects));
    }

    /// Collects what has come from the workers and gives out what waits for them; whether there are items out whose
    /// callers have not been woken.
    pub(super) fn pump(&self) -> bool {
        self.event(Scheduler::results_arrived)
    }

    /// Collects results for a caller that spins: returns at once if another thread has the lock.
    #[inline]
    pub(super) fn try_pump(&self) {
        let Ok(mut scheduler) = self.scheduler.try_lock() else { return };
        if !scheduler.has_results() {
            return;
        }
        let mut effects = Effects::default();
        scheduler.results_arrived(&mut effects);
        self.leave(scheduler, effects);
    }

    /// The bell has rung, or may have.
    fn answer(&self) {
        // A caller that was woken looks for itself.
        if self.pump() {
            self.arm_alarm();
        }
    }

    /// Arms the alarm, so that results are noticed while no caller spins.
    pub(super) fn arm_alarm(&self) {
        if self.out.load(Acquire) == 0 || !self.has_processes() {
            return;
        }
        if let Some(alarm) = self.alarm.get() {
            // Without a runtime here that of the pool answers.
            let _ = alarm.arm();
        }
        // Results that came before are found here; later ones ring the alarm.
        self.event(Scheduler::about_to_sleep);
    }

    /// Arms the alarm for a caller with many quiet items out, which needs no notice before a worker begins its last order.
    pub(super) fn arm_alarm_for_bulk(&self) {
        if let Some(alarm) = self.alarm.get() {
            let _ = alarm.arm();
        }
        self.event(Scheduler::about_to_sleep_in_bulk);
    }

    /// Returns `true` if results should be collected now, for a caller with many quiet items out.
    pub(super) fn should_collect(&self) -> bool {
        self.scheduler().should_collect()
    }

    /// Items that are out, and, if there are any, callers that wait for room or for the end of the pool.
    pub(super) fn out(&self) -> usize {
        self.out.load(Acquire)
    }

    pub(super) fn cancel(&self, group: &Arc<CallItems>) {
        if fork::is_forked() {
            return;
        }
        self.event(|scheduler, effects| scheduler.cancelled(group, effects));
    }

    /// From now on there are so many workers.
    pub(super) fn resize(&self, workers: RangeInclusive<usize>) {
        self.slots_changed(|scheduler, effects| scheduler.resized(workers, effects));
        // Callers that wait for an earlier resize are to see this one.
        self.running.send_modify(|running| *running = self.scheduler().alive());
    }

    /// Publishes the number of workers, without the lock, because it wakes the waiters. The last call publishes the latest number.
    fn publish_count(&self) {
        self.running.send_if_modified(|running| {
            let alive = self.scheduler().alive();
            std::mem::replace(running, alive) != alive
        });
    }

    pub(super) fn most_workers(&self) -> usize {
        self.scheduler().most_workers()
    }

    /// Takes nothing more and gives up all items that have not started. Returns how many those are.
    pub(super) fn shut(&self) -> usize {
        self.event(Scheduler::shut)
    }

    /// A call was refused, because as many items wait as may.
    pub(super) fn rejected(&self) {
        self.event(Scheduler::rejected);
    }

    pub(super) fn stats(&self) -> (PoolStats, Deaths) {
        self.scheduler().stats()
    }

    /// Items that are not settled.
    pub(super) fn unsettled(&self) -> usize {
        self.scheduler().unsettled()
    }

    /// The work of the driver now.
    pub(super) fn step(&self) -> Step {
        let step = self.event(Scheduler::time_passed);
        self.publish_count();
        step
    }

    /// An initializer's report was read.
    pub(super) fn initialized(&self, seat: usize, generation: u64, outcome: Result<()>) {
        self.event(|scheduler, effects| scheduler.initialized(seat, generation, outcome, effects));
    }

    /// A worker was started.
    pub(super) fn spawned(
        &self,
        spawn: &Spawn,
        (name, pid): (String, u32),
        control: Box<dyn Control>,
        lane: PoolEnd,
        (orders, results): (Sender<EncodedMessage>, Receiver<EncodedMessage>),
    ) {
        let (side_orders, side_results) =
            (SideOrders::new(spawn.seat, orders), SideResults::new(results, self.board.marker(spawn.seat)));
        let spawned = Spawned { name, pid, control, lane, side_orders, side_results };
        self.event(|scheduler, effects| scheduler.spawned(spawn, spawned, effects));
        self.arm_alarm();
    }

    /// A worker could not be started.
    pub(super) fn spawn_failed(&self, spawn: &Spawn, error: &Error) {
        self.event(|scheduler, effects| scheduler.spawn_failed(spawn, error, effects));
    }

    /// A worker has ended.
    pub(super) fn exited(&self, seat: usize, generation: u64, status: &Result<ExitStatus>, end: Circumstances) {
        self.event(|scheduler, effects| scheduler.exited(seat, generation, status, end, effects));
    }

    /// The driver has ended: all is over, or its runtime has ended.
    pub(super) fn abandon(&self, is_over: bool) {
        self.event(|scheduler, effects| scheduler.abandoned(is_over, effects));
        self.publish_count();
    }
}

/// Ends the pool with its last holder: `Pool`s, and the calls and results that they returned.
pub(super) struct PoolLifetime {
    shared: Arc<Shared>,
    runtime: runtime::Handle,
}

impl PoolLifetime {
    pub(super) fn new(shared: Arc<Shared>, runtime: runtime::Handle) -> Self {
        Self { shared, runtime }
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(super) fn runtime(&self) -> &runtime::Handle {
        &self.runtime
    }
}

impl Drop for PoolLifetime {
    fn drop(&mut self) {
        if !fork::is_forked() && !self.shared.is_closed() {
            self.shared.let_go();
        }
    }
}

impl Source for Shared {
    fn take(&self) -> Option<Handed> {
        let TakenOrder { id, group, chunk, is_cancelled } = self.event(Scheduler::order_taken)?;
        Some(Handed { id, group, chunk, is_cancelled, grace: self.config.grace })
    }

    fn settle(&self, order: u64, batch: ResultBatch, ran: Option<Duration>) {
        self.event(|scheduler, effects| scheduler.items_settled(order, batch, ran, effects));
    }

    fn ran(&self, group: &CallItems, time: Duration, items: u32) {
        self.scheduler().items_ran(group, time, items);
    }

    fn give_back(&self, order: u64, chunk: Chunk) {
        self.event(|scheduler, effects| scheduler.order_given_back(order, &chunk, effects));
    }

    fn dropped(&self, order: u64, why: &dyn Fn() -> Error) {
        self.event(|scheduler, effects| scheduler.order_dropped(order, why, effects));
    }

    fn cancelled(&self) -> Vec<u64> {
        self.scheduler().cancelled_orders()
    }

    fn set_capacity(&self, slots: usize) {
        self.slots_changed(|scheduler, effects| scheduler.slots_changed(slots, effects));
    }

    fn is_over(&self) -> bool {
        self.scheduler().has_ended()
    }
}
