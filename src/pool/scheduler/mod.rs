//! What the scheduler knows: seats with their workers, orders under way, timers, and what is to be done once the lock is free.

mod deadlines;
mod dispatch;
mod results;
mod scaling;
mod teardown;

use crate::channel::lane::PoolEnd;
use crate::error::{Error, ErrorKind, Result};
use crate::pool::group::{Block, Chunk, Group};
use crate::pool::mail::{Mail, Outbox, Unsent};
use crate::pool::stats::Histogram;
use crate::pool::trace::Ear;
use crate::process::{Cause, Killer};
use crate::wire::Sealed;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fmt::Write;
use std::process::ExitStatus;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

/// What is to be looked at again is not before this, however short its time: a timer that is due at once, again and
/// again, would never let go of the lock.
pub(in crate::pool) const AGAIN: Duration = Duration::from_millis(1);

/// A worker that has not come up after this does not come up.
pub(in crate::pool) const STARTS: Duration = Duration::from_secs(10);
/// So long a worker may take to copy so much of an order.
const SENDS_64_KIB: Duration = Duration::from_millis(1);

#[derive(Default)]
pub(in crate::pool) struct Scheduler {
    pub(in crate::pool) seats: Vec<Seat>,
    pub(in crate::pool) queue: Queue,
    pub(in crate::pool) timers: BinaryHeap<Reverse<Timer>>,
    /// With more than this, those that matter no more are let go of.
    pub(in crate::pool) most_timers: usize,
    /// When the driver looks at the timers next.
    pub(in crate::pool) alert: Option<Instant>,
    /// Calls that may still add items.
    pub(in crate::pool) open: usize,
    /// Items handed in and not settled.
    pub(in crate::pool) out: usize,
    pub(in crate::pool) rules: Rules,
    pub(in crate::pool) is_closed: bool,
    pub(in crate::pool) is_terminated: bool,
    pub(in crate::pool) is_shut: bool,
    /// Nobody drives any more.
    pub(in crate::pool) is_abandoned: bool,
    /// The pool's runtime ended before the pool.
    pub(in crate::pool) is_orphaned: bool,
    pub(in crate::pool) is_share_planned: bool,
    pub(in crate::pool) is_idle_planned: bool,
    pub(in crate::pool) is_look_planned: bool,
    pub(in crate::pool) is_fetch_planned: bool,
    /// Workers that were killed because they did not end.
    pub(in crate::pool) late: u64,
    pub(in crate::pool) broken: Option<String>,
    pub(in crate::pool) generation: u64,
    pub(in crate::pool) waits: Histogram,
    pub(in crate::pool) runs: Histogram,
    pub(in crate::pool) leases: u64,
}

/// Calls with something to give out, each once, in their turns: those for one certain worker first, for they hold up nobody.
#[derive(Default)]
pub(in crate::pool) struct Queue {
    groups: VecDeque<Arc<Group>>,
    /// So many at the front are for one certain worker.
    certain: usize,
    /// About so many have nothing left to give out.
    empty: usize,
}

impl Queue {
    pub(in crate::pool) fn front(&self) -> Option<&Arc<Group>> {
        self.groups.front()
    }

    pub(in crate::pool) fn pop_front(&mut self) -> Option<Arc<Group>> {
        self.certain = self.certain.saturating_sub(1);
        self.groups.pop_front()
    }

    pub(in crate::pool) fn push_front(&mut self, group: Arc<Group>) {
        self.certain += usize::from(group.is_certain());
        self.groups.push_front(group);
    }

    pub(in crate::pool) fn push_back(&mut self, group: Arc<Group>) {
        if group.is_certain() {
            self.groups.insert(self.certain, group);
            self.certain += 1;
        } else {
            self.groups.push_back(group);
        }
    }

    pub(in crate::pool) fn iter(&self) -> impl Iterator<Item = &Arc<Group>> {
        self.groups.iter()
    }

    pub(in crate::pool) fn len(&self) -> usize {
        self.groups.len()
    }

    pub(in crate::pool) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// What one of them had to give out is gone. When that is so for half of them they are let go of: a pool whose
    /// workers are busy for long may be asked for much that is given up again meanwhile.
    pub(in crate::pool) fn was_emptied(&mut self) {
        self.empty += 1;
        if 2 * self.empty < self.groups.len() {
            return;
        }
        self.empty = 0;
        self.groups.retain(|group| {
            let mut items = group.items();
            items.is_queued = !items.pending.is_empty();
            items.is_queued
        });
        self.certain = self.groups.iter().take_while(|group| group.is_certain()).count();
    }
}

/// What the state needs of the settings, and what changes of them.
#[derive(Clone, Default)]
pub(in crate::pool) struct Rules {
    pub(in crate::pool) least: usize,
    pub(in crate::pool) most: usize,
    pub(in crate::pool) idle_timeout: Duration,
    pub(in crate::pool) max_tasks: usize,
    pub(in crate::pool) tasks_jitter: usize,
    pub(in crate::pool) max_age: Option<Duration>,
    pub(in crate::pool) recycle_above: Option<u64>,
    pub(in crate::pool) exit_timeout: Duration,
    pub(in crate::pool) grace: Duration,
}

/// The place of one worker after the other.
#[derive(Default)]
pub(in crate::pool) struct Seat {
    pub(in crate::pool) worker: Option<Worker>,
    /// When the next one may start, if there is to be one.
    pub(in crate::pool) vacant: Option<Instant>,
    /// The driver is starting it.
    pub(in crate::pool) is_hiring: bool,
    pub(in crate::pool) failures: u32,
}

/// A worker that is to be started.
pub(in crate::pool) struct Hire {
    pub(in crate::pool) seat: usize,
    pub(in crate::pool) generation: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::pool) enum Phase {
    /// Its initializer runs.
    Beginning,
    Serving,
    /// It has all the orders it will get, and ends after them.
    Leaving,
    /// It was killed, or cannot be reached any more.
    Doomed,
}

pub(in crate::pool) struct Worker {
    pub(in crate::pool) generation: u64,
    pub(in crate::pool) name: String,
    pub(in crate::pool) pid: u32,
    pub(in crate::pool) killer: Killer,
    pub(in crate::pool) lane: PoolEnd,
    pub(in crate::pool) outbox: Arc<Outbox>,
    pub(in crate::pool) mail: Arc<Mail>,
    pub(in crate::pool) ear: Arc<Ear>,
    pub(in crate::pool) phase: Phase,
    pub(in crate::pool) running: VecDeque<Running>,
    /// Items it was given, and may be given.
    pub(in crate::pool) given: usize,
    pub(in crate::pool) share: usize,
    /// The checkout that has it; 0 is none.
    pub(in crate::pool) lease: u64,
    /// It is to go once it is given back.
    pub(in crate::pool) is_due: bool,
    /// Items that it has answered.
    pub(in crate::pool) answered: u64,
    pub(in crate::pool) born: Instant,
    pub(in crate::pool) idle_since: Option<Instant>,
    pub(in crate::pool) has_worked: bool,
    /// The initializer's report has not come.
    pub(in crate::pool) is_awaited: bool,
    /// There was no room for an order in its lane; how far it was with giving orders up then.
    pub(in crate::pool) full: Option<u64>,
    /// The same for when something was put into its outbox, as long as that may be there.
    pub(in crate::pool) unsent: Option<u64>,
    /// It let others have what it was given and had not begun: it may be stopped. How far it was with giving orders up
    /// then, and since when.
    pub(in crate::pool) stalled: Option<(u64, Instant)>,
    /// When it last came to something, as far as the pool knows: an item at its front waits for nothing else since then.
    pub(in crate::pool) moved: Instant,
    /// It was seen to take orders.
    pub(in crate::pool) is_ready: bool,
    /// That report, until the driver has read it.
    pub(in crate::pool) begun: Option<Result<Sealed>>,
    /// Since when it is to end once it has nothing to do.
    pub(in crate::pool) leaving: Option<Instant>,
    /// Why it was killed, if that says something about those to come.
    pub(in crate::pool) overdue: Option<Error>,
    /// What is known of its end.
    pub(in crate::pool) end: Circumstances,
    /// Why it was killed, for the item that it was at.
    pub(in crate::pool) doom: Option<Error>,
}

/// What the driver has learned of a worker's end, beyond its status.
#[derive(Default)]
pub(in crate::pool) struct Circumstances {
    /// The kernel killed it for its memory.
    pub(in crate::pool) was_starved: bool,
    pub(in crate::pool) last_words: Option<String>,
    /// What it could say itself.
    pub(in crate::pool) cause: Option<Cause>,
}

/// An order at a worker.
pub(in crate::pool) struct Running {
    pub(in crate::pool) group: Arc<Group>,
    pub(in crate::pool) chunk: Chunk,
    pub(in crate::pool) number: u32,
    pub(in crate::pool) done: u32,
    pub(in crate::pool) end: u32,
    pub(in crate::pool) since: Instant,
    /// The item that was found begun, by who looked whether others should have it.
    pub(in crate::pool) begun: Option<u32>,
    /// The item that was found started when its start was not noted.
    pub(in crate::pool) unnoted: Option<u32>,
    /// Its results are told of together.
    pub(in crate::pool) is_quiet: bool,
}

/// Which order, of which worker.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::pool) struct Place {
    pub(in crate::pool) seat: usize,
    pub(in crate::pool) generation: u64,
    pub(in crate::pool) number: u32,
}

pub(in crate::pool) enum Event {
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

pub(in crate::pool) struct Timer {
    pub(in crate::pool) at: Instant,
    pub(in crate::pool) event: Event,
}

impl Seat {
    pub(in crate::pool) fn is_taken(&self) -> bool {
        self.worker.is_some() || self.vacant.is_some() || self.is_hiring
    }

    pub(in crate::pool) fn is_beginning(&self) -> bool {
        self.worker.as_ref().is_some_and(|worker| worker.phase == Phase::Beginning && worker.begun.is_none())
    }
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
pub(in crate::pool) struct Effects {
    pub(in crate::pool) wakers: Vec<Waker>,
    pub(in crate::pool) settled: usize,
    pub(in crate::pool) nudge: bool,
    /// Something lies in a pipe, and for too long in these.
    pub(in crate::pool) has_mail: bool,
    pub(in crate::pool) unfetched: Vec<Arc<Mail>>,
    /// Where large orders are to be sent from.
    pub(in crate::pool) outboxes: Vec<Arc<Outbox>>,
    /// What could not be sent.
    pub(in crate::pool) unsent: Vec<(Arc<Outbox>, Unsent)>,
    /// Items that ended after their time, each as a chunk of its own, and at whom.
    pub(in crate::pool) late_items: Vec<(Arc<Group>, Chunk, String)>,
    /// Who has heard something.
    pub(in crate::pool) ears: Vec<Arc<Ear>>,
    /// Unsettled items of those who are woken.
    pub(in crate::pool) woken: usize,
    /// Who was killed because it did not end within its time.
    pub(in crate::pool) late: Vec<(String, Duration)>,
    pub(in crate::pool) now: Option<Instant>,
    /// Whose orders have come to their end, and how many items those were.
    pub(in crate::pool) ended: Vec<(Arc<Group>, u32)>,
}

impl Effects {
    /// When this was begun: one look at the clock does for all that is done in one go.
    pub(in crate::pool) fn now(&mut self) -> Instant {
        *self.now.get_or_insert_with(Instant::now)
    }

    pub(in crate::pool) fn deliver(&mut self, group: &Group, block: Block) {
        self.settled += block.count() as usize;
        if let Some((waker, out)) = group.deliver(block) {
            self.wakers.push(waker);
            self.woken += out;
        }
    }

    /// The next result in a worker's pipe is that of an item.
    pub(in crate::pool) fn announce(&mut self, mail: &Arc<Mail>, group: &Arc<Group>, index: u64, tag: u8) {
        self.settled += 1;
        self.has_mail = true;
        if let Some((waker, out)) = mail.expect(group, index, tag) {
            self.wakers.push(waker);
            self.woken += out;
        }
    }

    /// Settles the items of `chunk` from `from` on, before `to`.
    pub(in crate::pool) fn fail(
        &mut self,
        group: &Group,
        chunk: &Chunk,
        (from, to): (u32, u32),
        error: impl Fn() -> Error,
    ) {
        (from..to).for_each(|at| self.deliver(group, Block::failed(chunk.first + u64::from(at), error())));
    }

    /// The same for all of a chunk that was never given out.
    pub(in crate::pool) fn fail_pending(&mut self, group: &Group, chunk: &Chunk, error: impl Fn() -> Error) {
        self.fail(group, chunk, (0, chunk.count), error);
        group.forget(chunk);
    }
}

impl Scheduler {
    /// Why nothing is taken in any more, if all of it was given up.
    pub(in crate::pool) fn gave_up(&self) -> Option<Error> {
        match self.is_terminated {
            true if self.is_orphaned => Some(stranded()),
            true => Some(terminated()),
            false => self.is_shut.then(shut),
        }
    }

    /// Has `event` happen at `at`.
    pub(in crate::pool) fn at(&mut self, at: Instant, event: Event, effects: &mut Effects) {
        self.timers.push(Reverse(Timer { at, event }));
        if self.timers.len() > self.most_timers.max(64) {
            self.forget_timers();
        }
        if self.alert.is_none_or(|alert| at < alert) {
            self.alert = Some(at);
            effects.nudge = true;
        }
    }

    /// Lets go of timers whose time would come long after what they are for: a deadline of an hour is mostly for an item
    /// of a millisecond.
    fn forget_timers(&mut self) {
        let timers = std::mem::take(&mut self.timers);
        self.timers = timers.into_iter().filter(|Reverse(timer)| self.matters(&timer.event)).collect();
        self.most_timers = 2 * self.timers.len();
    }

    fn matters(&self, event: &Event) -> bool {
        let worker = |seat: usize, generation: u64| {
            let worker = self.seats.get(seat).and_then(|seat| seat.worker.as_ref());
            worker.filter(|worker| worker.generation == generation)
        };
        match event {
            Event::Overrun(place) | Event::Kill(place, _) => {
                worker(place.seat, place.generation).is_some_and(|worker| {
                    let mut running = worker.running.iter();
                    worker.stalled.is_some() || running.any(|running| running.number == place.number)
                })
            }
            Event::Queued(group) => {
                let mut items = group.items();
                // The next item has it watched again.
                items.is_watched = items.out > 0;
                items.is_watched
            }
            Event::Age(seat, generation) | Event::Exit(seat, generation) | Event::Initializer(seat, generation, _) => {
                worker(*seat, *generation).is_some()
            }
            Event::Retry(..) | Event::Share | Event::Hire | Event::Idle | Event::Look | Event::Fetch => true,
        }
    }

    pub(in crate::pool) fn workers(&mut self) -> impl Iterator<Item = (usize, &mut Worker)> {
        self.seats.iter_mut().enumerate().filter_map(|(seat, place)| Some((seat, place.worker.as_mut()?)))
    }

    pub(in crate::pool) fn worker(&mut self, seat: usize, generation: u64) -> Option<&mut Worker> {
        let worker = self.seats.get_mut(seat)?.worker.as_mut()?;
        (worker.generation == generation).then_some(worker)
    }

    /// Where an order is, if it is not complete: its worker's seat, and how far it is.
    pub(in crate::pool) fn find(&mut self, place: Place) -> Option<(&mut Worker, usize)> {
        let worker = self.worker(place.seat, place.generation)?;
        let at = worker.running.iter().position(|running| running.number == place.number)?;
        Some((worker, at))
    }
}

impl Worker {
    /// Ends it; `doom` is what to tell about the item that it is at.
    pub(in crate::pool) fn kill(&mut self, doom: Option<Error>) {
        self.phase = Phase::Doomed;
        self.doom = doom;
        // Whoever cannot be killed has ended.
        let _ = self.killer.kill();
    }

    /// What to tell about one that is gone.
    pub(in crate::pool) fn death(&self, status: &Result<ExitStatus>, doing: &str) -> Error {
        let how = match status {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
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
        let error = Error::new(kind, text).with_exit_status(status.as_ref().ok().copied());
        let panic = self.end.cause.as_ref().and_then(Cause::panic);
        panic.cloned().into_iter().fold(error, Error::with_panic)
    }

    /// Whether it has not come to anything since others were given what it had.
    pub(in crate::pool) fn is_stalled(&self) -> bool {
        self.stalled.is_some_and(|(then, _)| self.lane.given_up() == then)
    }

    /// When the item that it is to begin next should have been begun, if that may take `limit`; not what is being sent
    /// to it, or while the process starts.
    pub(in crate::pool) fn due(&mut self, limit: Duration, now: Instant) -> Option<Instant> {
        if !self.is_ready && self.lane.is_ready() {
            (self.is_ready, self.moved) = (true, now);
        }
        let running = self.running.front()?;
        let blocks = running.chunk.bytes().len() >> 16;
        let mut limit = limit.saturating_add(SENDS_64_KIB.saturating_mul(blocks.try_into().unwrap_or(u32::MAX)));
        if !self.is_ready || self.outbox.has(running.number) {
            limit = limit.max(STARTS);
        }
        Some(later(self.moved.max(running.since), limit))
    }

    /// Lets go of orders that are done; `now` if they came to their end just now, and are to be counted among `ended`.
    pub(in crate::pool) fn pop_complete(&mut self, now: Option<Instant>, ended: &mut Vec<(Arc<Group>, u32)>) {
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
}

pub(in crate::pool) fn terminated() -> Error {
    Error::new(ErrorKind::Cancelled, "the pool was terminated before this item was done")
}

/// Of an item that was not done when the pool's runtime ended.
pub(in crate::pool) fn stranded() -> Error {
    Error::new(ErrorKind::Cancelled, format!("{RUNTIME_ENDED} before this item was done"))
}

/// Of what is asked of such a pool.
pub(in crate::pool) fn orphaned() -> Error {
    let text = format!("{RUNTIME_ENDED}: make a pool in a runtime that lives as long as it is used");
    Error::new(ErrorKind::Closed, text)
}

const RUNTIME_ENDED: &str = "the pool has ended, because its runtime has ended";

pub(in crate::pool) fn shut() -> Error {
    Error::new(ErrorKind::Cancelled, "the pool was shut down before this item was begun")
}

pub(in crate::pool) fn broken(why: &str) -> Error {
    Error::other(format!("the pool has no working worker: {why}"))
}

/// `while_` after `now`; what is too far off to be told is never.
pub(in crate::pool) fn later(now: Instant, while_: Duration) -> Instant {
    const NEVER: Duration = Duration::from_secs(30 * 365 * 86400);
    now + while_.min(NEVER)
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    #[test]
    fn timers_for_what_is_over_do_not_pile_up() {
        let (mut state, mut effects) = (Scheduler::default(), Effects::default());
        let far_off = Instant::now() + Duration::from_secs(3600);
        for number in 0..100_000 {
            state.at(far_off, Event::Overrun(Place { seat: 0, generation: 1, number }), &mut effects);
            state.at(far_off, Event::Age(0, u64::from(number)), &mut effects);
        }
        assert!(state.timers.len() <= 65, "{}", state.timers.len());
        for _ in 0..200 {
            state.at(far_off, Event::Hire, &mut effects);
        }
        assert!(state.timers.len() >= 200, "what matters is kept");
    }
}
