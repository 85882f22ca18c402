//! Gives orders to workers that are free, and takes back orders that have not begun.
//!
//! # Which worker gets an order
//! | items of the call | worker that gets the order |
//! |---|---|
//! | of unknown length, or long | an idle one, in the lowest seat |
//! | quiet (2 ms) | the same; if none is idle, the one with the fewest orders, all of them quiet, at most three behind the one that runs. A call of one item is not put behind orders of calls with many |
//! | brief (20 us): over before a worker could be woken | one that is awake with brief items, once as many are awake as there are CPUs; else as above. A call of one item gets an idle worker rather than wait for a call with many items |
//!
//! **An idle worker takes over.** If nothing waits and a worker is idle, it gets a part of the orders that lie behind an item of 50 us or more at another.
//!
//! **A call that waits vacates a worker.** If no worker is free for a call that has no order at any worker, orders that a call with many items has
//! ahead at some worker are taken back, and that worker gets nothing more until it is idle. So orders ahead never make another call wait for more
//! than one item, and calls that all have orders at workers do not take workers from each other.
//!
//! **Brief items wake few workers.** More workers than CPUs do not get through brief items faster, and waking one costs as much as several of
//! them. If the awake workers do not get on (an item is long after all, or another program has their CPUs), the number is doubled every
//! 2 ms, and what they have not begun goes to others. If no worker is idle and the pool may grow, more are started for that.

use super::deadlines::DueEvent;
use super::effects::{Effects, Place};
use super::queue::Queue;
use super::worker::{Orders, Phase, Running, Worker, take_back};
use super::{CheckedOut, DEPTH, STARTS, Scheduler, later};
use crate::channel::lane::Pace;
use crate::error::Error;
use crate::os::proc;
use crate::pool::call_items::CallItems;
use crate::pool::chunk::Chunk;
use crate::pool::protocol::{BARE, Header, IN_PIPE};
use crate::pool::side_channel::{SideOrders, Unsent};
use crate::pool::stats::Histogram;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// So many bytes are copied in less time than a wake takes.
const SOON_COPIED: usize = 64 << 10;
/// A chunk with items that have not started is shared with an idle worker after this.
const SHARE_AFTER: Duration = Duration::from_millis(2);
/// At most so many workers are asked for their orders ahead at a time.
const MOST_ASKED: usize = 4;
/// So many waiting calls at most are looked at for one that a worker is free for, or that has no order at any.
const MOST_TRIED: usize = 8;
/// A call with long items gets a worker of a quick one no more often than this.
const BALANCE: Duration = Duration::from_millis(10);
/// So often the number of workers that are kept awake is doubled.
const MOST_BOOST: u32 = 12;
/// An item that its worker does not begin is given to an idle one after this: longer than a wake takes on a busy machine.
const TAKE_OVER_AFTER: Duration = Duration::from_millis(10);
/// And after the time in which its arguments come, at 100 MB/s: given to another, they would have to come once more.
const TRANSFER_PER_KIB: Duration = Duration::from_micros(10);

impl Scheduler {
    /// Where `call_items` waits; `None` for the calls of a checkout that is over.
    pub(super) fn queue_of(&mut self, group: &CallItems) -> Option<&mut Queue> {
        match group.is_certain() {
            true => self.checkouts.get_mut(&group.options.checkout).map(|checked_out| &mut checked_out.queue),
            false => Some(&mut self.queue),
        }
    }

    pub(super) fn enqueue(
        &mut self,
        group: &Arc<CallItems>,
        chunks: impl DoubleEndedIterator<Item = Chunk>,
        in_front: bool,
    ) {
        let (mut items, mut waiting, mut new) = (group.items(), 0, 0);
        let mut count = |chunk: &Chunk| {
            (waiting, new) = (waiting + chunk.count as usize, new + 1);
            chunk.bytes().len()
        };
        match in_front {
            true => chunks.rev().for_each(|chunk| {
                group.keep(count(&chunk));
                items.pending.push_front(chunk);
            }),
            false => chunks.for_each(|chunk| {
                group.keep(count(&chunk));
                items.pending.push_back(chunk);
            }),
        }
        self.waiting += if group.is_bounded() { waiting } else { 0 };
        self.waiting_chunks += if group.is_certain() { 0 } else { new };
        if items.has_pending() {
            self.taken.notify();
        }
        if items.has_pending() && !std::mem::replace(&mut items.is_queued, true) {
            drop(items);
            if group.is_certain() {
                // Also if the checkout is over: it fails where it is looked for.
                self.checkouts.entry(group.options.checkout).or_default().queue.push_back(group.clone());
                self.seats.changed(group.options.checkout);
            } else {
                self.queue.push_back(group.clone());
            }
        }
    }

    /// All of `call_items` that no worker has. It stays where it is queued.
    pub(super) fn take_pending(&mut self, group: &CallItems) -> VecDeque<Chunk> {
        let pending = std::mem::take(&mut group.items().pending);
        self.no_longer_wait(group, pending.iter());
        pending
    }

    pub(super) fn no_longer_wait<'a>(&mut self, group: &CallItems, chunks: impl Iterator<Item = &'a Chunk>) {
        for chunk in chunks {
            self.waiting -= if group.is_bounded() { chunk.count as usize } else { 0 };
            self.waiting_chunks -= usize::from(!group.is_certain());
        }
    }

    /// The next chunk of the first group of a queue, for the worker at `seat` if it has one, and whether it has more.
    pub(super) fn next_chunk(&mut self, group: &CallItems, seat: Option<usize>) -> (Option<Chunk>, bool) {
        let mut items = group.items();
        seat.into_iter().for_each(|seat| items.note_seat(seat));
        let chunk = items.pending.pop_front();
        items.is_queued = items.has_pending();
        let has_more = items.is_queued;
        drop(items);
        self.no_longer_wait(group, chunk.iter());
        (chunk, has_more)
    }

    /// The next chunk of the first call that waits, for the worker at `seat` if it has one: the one way by which orders are
    /// taken, by workers and takers alike. Calls take turns.
    pub(super) fn next_order(&mut self, group: &Arc<CallItems>, seat: Option<usize>) -> Option<Chunk> {
        let (chunk, has_more) = self.next_chunk(group, seat);
        if !has_more || self.queue.len() > 1 {
            self.queue.pop_front();
            if has_more {
                self.queue.push_back(group.clone());
            }
        }
        chunk
    }

    /// Gives waiting chunks to workers, as long as there are workers for them.
    pub(super) fn dispatch(&mut self, effects: &mut Effects) {
        if self.config.is_external {
            // It is taken.
            return;
        }
        loop {
            self.seats.update();
            if let Some(checkout) = self.seats.changed_checkout() {
                self.dispatch_checkout(checkout, effects);
                continue;
            }
            let Some(group) = self.queue.front().cloned() else {
                if !self.divide(effects) {
                    return;
                }
                continue;
            };
            let Some(len) = next_len(&group) else {
                self.queue.pop_front();
                continue;
            };
            let (seat, group, len) = match self.choose(&group, effects) {
                // Should a chunk of it that was taken back stand before that one by now, the lane may refuse it, and it is looked at again.
                Some(seat) => (seat, group, len),
                None => {
                    let Some((seat, chosen)) = self.choose_for_others(&group, effects) else { return };
                    let Some(len) = next_len(&chosen) else { continue };
                    (seat, chosen, len)
                }
            };
            let Some(worker) = self.seats.worker(seat) else { return };
            if !worker.takes(len) {
                continue;
            }
            let Some(chunk) = self.next_order(&group, Some(seat)) else { continue };
            if group.options.acquires {
                self.check_out(seat, group.options.checkout);
            }
            self.give(seat, group, chunk, effects);
        }
    }

    /// No worker is free for `first`, the first call that waits. The first of the next few calls that has one, or for which one will be
    /// idle, goes before it. Returns that worker's seat, if there is one now.
    fn choose_for_others(&mut self, first: &CallItems, effects: &mut Effects) -> Option<(usize, Arc<CallItems>)> {
        self.seats.update();
        let index = self.seats.index();
        let vacating = index.vacating.len();
        if index.open[0].is_empty() && !first.options.is_many {
            // Those behind it wait for the same workers.
            return None;
        }
        for at in 1..self.queue.len().min(MOST_TRIED) {
            let group = self.queue.get(at)?.clone();
            if !group.items().has_pending() {
                continue;
            }
            let seat = self.choose(&group, effects);
            self.seats.update();
            if seat.is_some() || self.seats.index().vacating.len() > vacating {
                self.queue.bring_forward(at);
                return Some((seat?, group));
            }
        }
        None
    }

    /// The seat that gets the next order of `call_items`.
    fn choose(&mut self, group: &CallItems, effects: &mut Effects) -> Option<usize> {
        self.seats.update();
        let index = self.seats.index();
        let idle = index.open[0].first();
        let lowest = |sets: &[super::SeatSet; DEPTH]| sets[1..].iter().find_map(super::SeatSet::first);
        let is_soon_over = !group.options.acquires && group.is_quick();
        if is_soon_over && group.is_brief() && index.awake.len() >= self.awake.saturating_mul(1 << self.boost) {
            // A call of one item does not wait behind the many of another.
            let mut levels = index.brief.iter().zip(&index.single).skip(1);
            let brief = match group.options.is_many {
                true => lowest(&index.brief),
                false => levels.find_map(|(brief, single)| brief.iter().find(|seat| single.contains(*seat))),
            };
            let has_many = |seat| self.seats.get(seat).is_some_and(|worker| !worker.orders().only_single);
            return match (brief, idle) {
                // Those that are awake will not be free for it soon.
                (None, Some(idle)) => {
                    let is_for_it = match group.options.is_many {
                        true => self.is_empty_handed(group),
                        false => index.awake.iter().any(has_many),
                    };
                    is_for_it.then_some(idle)
                }
                (None, None) => self.vacate(group, effects),
                (Some(_), _) => brief,
            };
        }
        let sets = if group.options.is_many { &index.open } else { &index.single };
        let busy = if idle.is_none() && is_soon_over { lowest(sets) } else { None };
        if idle.is_none() {
            self.request_workers(self.waiting_chunks, effects);
        }
        idle.or(busy).or_else(|| self.vacate(group, effects))
    }

    /// Returns `true` if no worker has an order of `call_items`.
    fn is_empty_handed(&self, group: &CallItems) -> bool {
        let is_its = |running: &Running| std::ptr::eq(&*running.group, group);
        let has_some = |seat: usize| self.seats.get(seat).is_some_and(|worker| worker.running.iter().any(is_its));
        !group.options.is_many || !group.seats().into_iter().any(has_some)
    }

    /// Has one more worker become idle after the item that it runs, for `call_items`: the orders that a call with many items has ahead there
    /// wait again. Returns a worker that has become idle at once.
    ///
    /// At most as many workers do so as calls wait that have no order at any. A call that has some, and whose items take long, gets one
    /// more now and then from a call that has at least two workers more: such a call gets idle workers only, and there would be none
    /// beside a quick call with many items.
    fn vacate(&mut self, group: &CallItems, effects: &mut Effects) -> Option<usize> {
        self.seats.update();
        let index = self.seats.index();
        let is_quick = |seat: &usize| self.seats.get(*seat).is_some_and(|worker| worker.orders().only_quick);
        let is_others = |running: &Running| running.is_many && !std::ptr::eq(&*running.group, group);
        let may = |worker: &Worker| worker.has_started() && worker.running.iter().any(is_others);
        let asked = || index.reclaimable.iter().take(MOST_ASKED).filter(|seat| self.seats.get(*seat).is_some_and(may));
        let vacating = index.vacating.len();
        let seat = match self.is_empty_handed(group) {
            true => {
                let waiting = self
                    .queue
                    .iter()
                    .take(vacating + MOST_TRIED)
                    .filter(|group| group.items().has_pending() && self.is_empty_handed(group))
                    .take(vacating + 1)
                    .count();
                // One that is at a long item may not be idle soon, so it does not count as coming if there are others that will be.
                let soon = index.vacating.iter().filter(is_quick).count();
                let quick = asked().find(is_quick).filter(|_| waiting > soon);
                quick.or_else(|| asked().next().filter(|_| waiting > vacating))?
            }
            false => {
                if group.is_quick() || vacating > 0 || self.balanced.is_some_and(|then| effects.now() < then + BALANCE)
                {
                    return None;
                }
                self.balanced = Some(effects.now());
                let held = |group: &CallItems| {
                    let has = |seat: &usize| {
                        let mut running = self.seats.get(*seat)?.running.iter();
                        running.any(|running| std::ptr::eq(&*running.group, group)).then_some(())
                    };
                    group.seats().iter().filter(|seat| has(seat).is_some()).count()
                };
                let own = held(group);
                let has_more = |seat: &usize| {
                    let front = self.seats.get(*seat).and_then(|worker| worker.running.front());
                    front.is_some_and(|front| is_others(front) && held(&front.group) >= own + 2)
                };
                asked().filter(is_quick).find(has_more)?
            }
        };
        self.seats.worker(seat)?.is_vacating = true;
        self.reclaim(seat, 1, effects);
        self.seats.update();
        self.seats.index().open[0].first()
    }

    /// Nothing waits: an idle worker gets a part of the orders that lie behind long items at others. Returns whether anything waits now.
    fn divide(&mut self, effects: &mut Effects) -> bool {
        let index = self.seats.index();
        let idle = index.open[0].len() as u32;
        if idle == 0 || index.divisible.is_empty() {
            return false;
        }
        let seats: Vec<usize> = index.divisible.iter().take(MOST_ASKED).collect();
        for seat in seats {
            // It goes on with what it has started, so this is no sign that it is stopped.
            if self.seats.get(seat).is_some_and(Worker::has_started) {
                self.reclaim(seat, idle + 1, effects);
            }
            if !self.queue.is_empty() {
                return true;
            }
        }
        false
    }

    fn check_out(&mut self, seat: usize, checkout: u64) {
        self.checkouts.entry(checkout).or_default().seat = Some(seat);
        if let Some(worker) = self.seats.worker(seat) {
            worker.checkout = checkout;
        }
    }

    /// Gives the worker of a checkout its next order. If there is no such worker any more, the checkout's calls fail.
    fn dispatch_checkout(&mut self, checkout: u64, effects: &mut Effects) {
        let Some(CheckedOut { seat, queue }) = self.checkouts.get_mut(&checkout) else { return };
        let worker = seat.and_then(|seat| self.seats.get(seat)).filter(|worker| worker.checkout == checkout);
        let Some(worker) = worker else { return self.fail_checkout(checkout, effects) };
        let Some(group) = queue.front().cloned() else { return };
        let Some(len) = next_len(&group) else {
            queue.pop_front();
            return self.seats.changed(checkout);
        };
        let depth = if group.is_quick() { DEPTH } else { 1 };
        let is_free = worker.phase == Phase::Serving && worker.running.len() < depth && !worker.is_stalled();
        let Some(seat) = seat.filter(|_| is_free && worker.full.is_none()) else { return };
        if !self.seats.worker(seat).is_some_and(|worker| worker.takes(len)) {
            return;
        }
        let (chunk, has_more) = self.next_chunk(&group, Some(seat));
        if let Some(queue) = self.queue_of(&group) {
            queue.pop_front();
            if has_more {
                queue.push_back(group.clone());
            }
        }
        chunk.into_iter().for_each(|chunk| self.give(seat, group.clone(), chunk, effects));
    }

    /// A checkout is over, or its worker has ended: calls that wait for that worker fail.
    pub(super) fn fail_checkout(&mut self, checkout: u64, effects: &mut Effects) {
        let Some(CheckedOut { mut queue, .. }) = self.checkouts.remove(&checkout) else { return };
        while let Some(group) = queue.pop_front() {
            group.items().is_queued = false;
            let pending = self.take_pending(&group);
            pending.iter().for_each(|chunk| effects.fail_pending(&group, chunk, || group.was_let_go()));
        }
    }

    fn give(&mut self, seat: usize, group: Arc<CallItems>, mut chunk: Chunk, effects: &mut Effects) {
        let Some(worker) = self.seats.worker(seat) else { return };
        let quota = if worker.checkout > 0 { usize::MAX } else { worker.share - worker.given };
        let (mut rest, grace) = (None, self.config.grace);
        if chunk.count as usize > quota {
            group.forget(&chunk);
            rest = Some(chunk.part(quota as u32, chunk.count));
            chunk = chunk.part(0, quota as u32);
            group.keep(chunk.bytes().len());
        }
        let pace = group.pace(worker.running.is_empty());
        let is_timed = group.is_timed(chunk.count) || is_sampled(worker.lane.next_number());
        match worker.give(&group, &mut chunk, (pace, grace, is_timed), effects) {
            Some(number) => {
                self.given.insert(seat);
                worker.given += chunk.count as usize;
                worker.idle_since = None;
                let generation = worker.generation;
                let now = effects.now();
                note_wait(&mut self.waits, &mut chunk, now);
                let (done, end, is_quiet, is_brief) = (0, chunk.count, pace != Pace::Each, group.is_brief());
                // Large arguments would have to come once more.
                let is_long = !is_brief && group.is_worth_moving() && chunk.bytes().len() <= SOON_COPIED;
                let is_many = group.options.is_many;
                let (begun, unnoted, since) = (None, None, now);
                let group_there = group.clone();
                worker.running.push_back(Running {
                    group: group_there,
                    chunk,
                    number,
                    done,
                    end,
                    since,
                    begun,
                    unnoted,
                    is_quiet,
                    is_brief,
                    is_long,
                    is_many,
                    is_timed,
                });
                let is_last = worker.given >= worker.share && worker.checkout == 0;
                if is_quiet {
                    self.seats.index_mut().quiet.insert(seat);
                    self.has_tiny |= group.is_tiny();
                }
                if is_last {
                    self.close_lane(seat, effects);
                }
                if let Some(timeout) = group.options.timeout {
                    self.at(later(now, timeout), DueEvent::Overrun(Place { seat, generation, number }), effects);
                }
            }
            None => {
                group.forget(&chunk);
                self.enqueue(&group, [chunk].into_iter(), true);
            }
        }
        self.enqueue(&group, rest.into_iter(), true);
    }

    /// An order could not be sent: its items fail, and its worker goes on to the next.
    pub(super) fn was_unsent(&mut self, side_orders: &SideOrders, unsent: &Unsent, effects: &mut Effects) {
        let Some(worker) = self.seats.worker(side_orders.seat()) else { return };
        if !std::ptr::eq(&*worker.side_orders, side_orders) {
            return;
        }
        if unsent.is_final {
            // It would wait for ever. Items it has not begun go to others.
            return worker.kill(None);
        }
        if let Some(running) = worker.running.iter_mut().find(|running| running.number == unsent.number) {
            let claim = take_back(&worker.lane, &worker.side_orders, unsent.number, running.done);
            let from = claim.end.max(running.done);
            worker.given -= running.end.saturating_sub(from) as usize;
            effects.fail(&running.group, &running.chunk, (from, running.end), || Error::copy(&unsent.error));
            running.end = from;
        }
        // Only now may its worker pass over it.
        worker.side_orders.forget(unsent.number);
        effects.side_orders.push(worker.side_orders.clone());
        worker.pop_complete(None, &mut Vec::new());
    }

    /// Runs an item again, unless its call was cancelled.
    pub(super) fn again(&mut self, group: &Arc<CallItems>, chunk: Chunk, effects: &mut Effects) {
        let is_cancelled = group.items().is_cancelled;
        match is_cancelled {
            true => effects.fail(group, &chunk, (0, chunk.count), || group.was_cancelled()),
            false => self.enqueue(group, [chunk].into_iter(), true),
        }
    }

    /// Takes back items of `call_items` that have not started, and asks those that run to stop.
    pub(super) fn revoke(&mut self, group: &Arc<CallItems>, effects: &mut Effects) {
        let grace = group.options.grace.unwrap_or(self.config.grace);
        // An item that is done by now is not asked to stop.
        group.seats().into_iter().for_each(|seat| self.seats.suspect(seat));
        self.collect(effects);
        let mut asked = Vec::new();
        for seat in group.seats() {
            let Some(worker) = self.seats.worker(seat) else { continue };
            let generation = worker.generation;
            for running in worker.running.iter_mut().filter(|running| Arc::ptr_eq(&running.group, group)) {
                let claim = take_back(&worker.lane, &worker.side_orders, running.number, running.done);
                effects.fail(group, &running.chunk, (claim.end, running.end), || group.was_cancelled());
                worker.given -= (running.end - claim.end) as usize;
                running.end = claim.end;
                if claim.started > running.done {
                    worker.lane.ask_to_stop(running.number, claim.started - 1);
                    asked.push((Place { seat, generation, number: running.number }, claim.started - 1));
                }
            }
            worker.pop_complete(None, &mut Vec::new());
        }
        let at = later(effects.now(), grace);
        asked.into_iter().for_each(|(place, item)| self.at(at, DueEvent::Kill(place, item), effects));
    }

    /// Takes back items that have not started at a worker, each order in `pieces`, for workers that are free.
    pub(super) fn reclaim(&mut self, seat: usize, pieces: u32, effects: &mut Effects) {
        let Some(worker) = self.seats.worker(seat) else { return };
        let mut back = Vec::new();
        for running in worker.running.iter_mut().rev() {
            let claim = take_back(&worker.lane, &worker.side_orders, running.number, running.done);
            if claim.end == running.end {
                continue;
            }
            worker.given -= (running.end - claim.end) as usize;
            let size = (running.end - claim.end).div_ceil(pieces.max(1));
            let parts = running.chunk.parts(claim.end, running.end, size);
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
            parts.iter().for_each(|part| effects.fail(&group, part, (0, part.count), || group.was_cancelled()));
        }
    }

    /// Plans to share: no worker is to be idle for long while another has items that it has not begun, and more workers are to start for those
    /// if there may be more.
    pub(super) fn plan_to_share(&mut self, effects: &mut Effects) {
        if self.is_share_planned {
            return;
        }
        self.seats.update();
        let index = self.seats.index();
        let has_idle = !index.open[0].is_empty();
        let may_come = !has_idle && index.coming.is_empty() && self.may_grow(effects);
        let while_ = match has_idle {
            true if !index.behind.is_empty() || !self.queue.is_empty() => SHARE_AFTER,
            true if !index.unbegun.is_empty() => TAKE_OVER_AFTER,
            false if may_come && !index.behind.is_empty() => SHARE_AFTER,
            false if may_come && !index.unbegun.is_empty() => TAKE_OVER_AFTER,
            _ => return,
        };
        self.is_share_planned = true;
        let at = effects.now() + while_;
        self.at(at, DueEvent::Share, effects);
    }

    /// Gives idle workers a part of the items that others have not begun. Looks at busy workers only.
    pub(super) fn share(&mut self, now: Instant, effects: &mut Effects) {
        self.is_share_planned = false;
        self.seats.update();
        let index = self.seats.index();
        let idle = index.open[0].len() as u32;
        let lagging = index.awake.iter().filter(|seat| self.seats.get(*seat).is_some_and(|worker| worker.lags(now)));
        let lagging: Vec<usize> = lagging.collect();
        // Items of a worker that is checked out are for it alone.
        let mut slow: Vec<usize> = index.behind.iter().collect();
        slow.extend(index.unbegun.iter().filter(|seat| !index.behind.contains(*seat)));
        self.boost = match (lagging.is_empty(), index.lagging.is_empty()) {
            (false, _) => (self.boost + 1).min(MOST_BOOST),
            // Those that were found before still do not get on.
            (true, false) => self.boost,
            (true, true) => 0,
        };
        for seat in lagging {
            self.seats.worker(seat).into_iter().for_each(|worker| worker.is_lagging = true);
        }
        slow.retain(|seat| self.seats.worker(*seat).is_some_and(|worker| worker.is_slow(now)));
        if idle == 0 {
            // New workers will get a part of the items that lie behind, and all of those of a stopped worker.
            let behind = |seat: &usize| {
                self.seats.get(*seat).map_or(0, |worker| match worker.is_stopped() {
                    true => worker.running.len(),
                    false => worker.orders_behind(),
                })
            };
            let chunks = slow.iter().map(behind).sum::<usize>() + self.waiting_chunks;
            self.request_workers(chunks, effects);
        }
        for seat in slow.into_iter().filter(|_| idle > 0) {
            // Read before the take-back: orders given up after that are a sign of life.
            let Some(given_up) = self.seats.get(seat).map(|worker| worker.lane.given_up()) else {
                continue;
            };
            self.reclaim(seat, idle + 1, effects);
            if let Some(worker) = self.seats.worker(seat).filter(|worker| worker.running.is_empty()) {
                // It had begun none of it. One that was to be checked out is not: the checkout gets another.
                worker.stalled = Some((given_up, now));
                let checkout = std::mem::take(&mut worker.checkout);
                let is_due = worker.is_due || worker.given >= worker.share;
                if let Some(checked_out) = self.checkouts.get_mut(&checkout) {
                    checked_out.seat = None;
                }
                if checkout > 0 && is_due {
                    self.retire(seat, effects);
                }
            }
        }
        self.dispatch(effects);
        self.plan_to_share(effects);
    }
}

/// Returns `true` for one order in eight, in no order that items could follow: of orders that take no longer than a clock, so many are timed.
fn is_sampled(number: u32) -> bool {
    // Knuth's multiplicative hash.
    number.wrapping_mul(0x9e37_79b1) >> 29 == 0
}

/// A chunk is given out: counts how long it has waited, once.
pub(super) fn note_wait(waits: &mut Histogram, chunk: &mut Chunk, now: Instant) {
    if !std::mem::replace(&mut chunk.has_waited, true) {
        let waited = chunk.handed.map_or(Duration::ZERO, |handed| now.saturating_duration_since(handed));
        waits.add(waited, u64::from(chunk.count));
    }
}

/// Bytes that the next chunk of `call_items` takes up in a ring, if there is one.
fn next_len(group: &CallItems) -> Option<usize> {
    let mut items = group.items();
    items.is_queued = items.has_pending();
    items.pending.front().map(Chunk::len_in_ring)
}

impl Worker {
    /// Returns `true` if items it has not begun may go to others: it is not checked out, or only about to be.
    pub(super) fn is_shared(&self) -> bool {
        self.checkout == 0 || self.running.front().is_some_and(|running| running.group.options.acquires)
    }

    /// Looks at its orders, once for all that is asked of them.
    pub(super) fn orders(&self) -> Orders {
        let mut orders = Orders { only_quick: true, only_single: true, only_brief: true, ..Orders::default() };
        let mut only_small = true;
        for (at, running) in self.running.iter().enumerate() {
            orders.only_quick &= running.group.is_quick();
            orders.only_single &= !running.is_many;
            orders.only_brief &= running.is_brief;
            orders.has_more |= running.end > running.done + u32::from(at == 0);
            orders.has_long |= running.is_long;
            only_small &= running.chunk.bytes().len() <= SOON_COPIED;
        }
        // Large arguments would have to come once more.
        orders.has_long &= only_small;
        orders
    }

    /// Returns `true` if it has items behind the one that runs.
    fn has_more(&self) -> bool {
        self.orders().has_more
    }

    /// Returns `true` if it has started its next item.
    fn has_started(&self) -> bool {
        self.running.front().is_some_and(|running| self.lane.claim(running.number).started > running.done)
    }

    /// Returns how many orders others might be given in its stead.
    fn orders_behind(&self) -> usize {
        if self.has_more() { (self.running.len() - 1).max(1) } else { 0 }
    }

    /// Returns `true` if it takes orders, has begun none of those that it has, and does not wait for a CPU either.
    fn is_stopped(&self) -> bool {
        let has_begun = self.running.front().is_none_or(|running| running.begun == Some(running.done));
        !has_begun && (self.is_ready || self.lane.is_ready()) && !proc::is_runnable(self.pid)
    }

    /// Returns `true` if it is not known to have begun its first item.
    pub(super) fn may_not_begin(&self) -> bool {
        self.is_shared() && self.running.front().is_some_and(|running| running.begun != Some(running.done))
    }

    /// Returns `true` if others should get the items that it has not begun.
    fn is_slow(&mut self, now: Instant) -> bool {
        let (has_more, moved) = (self.has_more(), self.moved);
        let Some(running) = self.running.front_mut() else { return false };
        if self.lane.claim(running.number).started > running.done {
            running.begun = Some(running.done);
        }
        let has_begun = running.begun == Some(running.done);
        let len = running.chunk.bytes().len();
        let mut transfer = TRANSFER_PER_KIB * (len >> 10).try_into().unwrap_or(u32::MAX);
        if !has_begun && self.side_orders.has(running.number) {
            transfer = transfer.max(STARTS);
        }
        let in_transfer = if has_begun { Duration::ZERO } else { transfer };
        let is_slow = has_more && now.saturating_duration_since(running.since) >= SHARE_AFTER + in_transfer
            || !has_begun && now.saturating_duration_since(running.since.max(moved)) >= TAKE_OVER_AFTER + transfer;
        // On a busy machine it may take its time to receive them, but it does not sleep then.
        is_slow && (has_begun || len <= SOON_COPIED || !proc::is_runnable(self.pid))
    }

    /// Returns `true` if it is at items that should long be over.
    fn lags(&self, now: Instant) -> bool {
        let front = self.running.front();
        front.is_some_and(|front| now.saturating_duration_since(front.since.max(self.moved)) >= SHARE_AFTER)
    }

    /// Returns `true` if there is room for an order of `len` bytes. If not, it has no more before it gives up one that it has.
    fn takes(&mut self, len: usize) -> bool {
        let is_carried = self.lane.can_carry(len + Header::LONGEST);
        // Read before the look: an order given up after it is a change.
        let given_up = self.lane.given_up();
        // An order whose results have not been taken in is still told by its row.
        let is_row_free = self.running.front().is_none_or(|front| !self.lane.would_reuse_row_of(front.number));
        let takes = is_row_free && self.lane.takes(if is_carried { len } else { 0 } + Header::LONGEST);
        if !takes {
            self.full = Some(given_up);
        }
        takes
    }

    /// Gives an order for which there is room in the lane, or finds that there is none any more. What is large is sent when
    /// the lock is free.
    fn give(
        &mut self,
        group: &CallItems,
        chunk: &mut Chunk,
        (pace, grace, is_timed): (Pace, Duration, bool),
        effects: &mut Effects,
    ) -> Option<u32> {
        let (header, items) = (group.header(chunk, pace, grace, is_timed), chunk.count as usize);
        if chunk.attachments.is_empty() && self.lane.can_carry(chunk.bytes().len() + Header::LONGEST) {
            return self.lane.give(0, [&header, chunk.bytes()], items);
        }
        if !self.lane.takes(Header::LONGEST) {
            return None;
        }
        // Read before it is sent: an order given up after that is a change.
        let given_up = self.lane.given_up();
        self.side_orders.add(self.lane.next_number(), chunk.encoded());
        if chunk.bytes().len() <= SOON_COPIED {
            // Its worker is to find it there, and not to sleep once more.
            let unsent = self.side_orders.send().into_iter().map(|unsent| (self.side_orders.clone(), unsent));
            effects.unsent.extend(unsent);
        }
        if !self.side_orders.is_empty() {
            self.unsent = Some(given_up);
            effects.side_orders.push(self.side_orders.clone());
        }
        let number = self.lane.give(if items == 1 { IN_PIPE | BARE } else { IN_PIPE }, [&header, &[]], items);
        // Not once those of others are sent, too.
        self.lane.notify_given();
        number
    }
}
