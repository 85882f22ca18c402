//! Takes results from the lanes of workers and hands them to their calls. Decodes nothing.

use super::Scheduler;
use super::deadlines::DueEvent;
use super::effects::Effects;
use super::worker::{Phase, Running, Took, Worker};
use crate::channel::{lane, spsc};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::pool::batch::ResultBatch;
use crate::pool::call_items::CallItems;
use crate::pool::protocol::{IN_PIPE, LATE, TRACE};
use crate::pool::stats::Histogram;
use crate::process::entry::{IS_PANIC, IS_VALUE};
use crate::wire::EncodedMessage;
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

/// Results in a side channel that their callers have not fetched are fetched by the driver after this.
const FETCH_AFTER: Duration = Duration::from_millis(5);

impl Scheduler {
    /// Returns `true` if some worker has something, or is to be looked at for another reason.
    #[inline]
    pub(in crate::pool) fn has_results(&self) -> bool {
        self.seats.has_suspects()
            || match self.looks_into_all() {
                true => self.seats.workers().any(|(_, worker)| worker.has_come()),
                false => self.board.has_marks(self.seats.len()),
            }
    }

    /// Returns `true` if all lanes are looked into, and not only those that are marked: a mark is one more word that travels from
    /// CPU to CPU.
    pub(super) fn looks_into_all(&self) -> bool {
        self.seats.len() <= self.few
    }

    /// Returns `true` if some worker has put results that it may not notify of any more, or will soon have no orders.
    pub(in crate::pool) fn should_collect(&self) -> bool {
        let tells = |worker: &Worker, last: &Running| {
            last.is_quiet && last.end >= lane::MANY && worker.lane.will_notify(last.number)
        };
        let will_announce = |worker: &Worker| worker.running.back().is_some_and(|last| tells(worker, last));
        let should_collect =
            |worker: &Worker| worker.has_room_again() || !will_announce(worker) && worker.lane.has_results();
        self.seats.has_suspects()
            || match self.looks_into_all() {
                true => self.seats.workers().any(|(_, worker)| should_collect(worker)),
                false => {
                    let mut marked = self.board.marked(self.seats.len());
                    marked.any(|seat| self.seats.get(seat).is_some_and(should_collect))
                }
            }
    }

    /// Takes results from the lanes that are marked, or from all if those are few. Returns whether anything has come, be it room.
    pub(super) fn collect(&mut self, effects: &mut Effects) -> bool {
        let mut any = false;
        if self.looks_into_all() {
            for seat in 0..self.seats.len() {
                any |= self.collect_from(seat, effects);
            }
        } else {
            let board = self.board.clone();
            for seat in board.take_marked(self.seats.len()) {
                any |= self.collect_from(seat, effects);
            }
        }
        while let Some(seat) = self.seats.next_suspect() {
            any |= self.collect_from(seat, effects);
        }
        for (group, chunk, who) in std::mem::take(&mut effects.late_items) {
            self.fail_or_retry(&group, &chunk, 0, group.was_late(&who), effects);
        }
        if effects.has_side_results && !std::mem::replace(&mut self.is_fetch_planned, true) {
            let at = effects.now() + FETCH_AFTER;
            self.at(at, DueEvent::Fetch, effects);
        }
        any
    }

    /// Collects the results of one worker.
    fn collect_from(&mut self, seat: usize, effects: &mut Effects) -> bool {
        if !self.seats.get(seat).is_some_and(Worker::has_come) {
            return false;
        }
        let Some(worker) = self.seats.worker(seat) else { return false };
        if worker.has_room_again() {
            worker.full = None;
            worker.stalled = worker.stalled.filter(|(then, _)| *then == worker.lane.given_up());
        }
        if worker.unsent.is_some() {
            // It may have made room in its pipe, too.
            let given_up = worker.lane.given_up();
            worker.unsent = (!worker.side_orders.is_empty()).then_some(given_up);
            effects.side_orders.extend(worker.unsent.map(|_| worker.side_orders.clone()));
        }
        if worker.side_results.is_damaged() && worker.phase != Phase::Killed {
            let damage = worker.side_results.damage().filter(|error| error.kind() != ErrorKind::Corrupt);
            worker.kill(Some(damage.map_or_else(|| corrupt(&worker.name), |error| not_received(&worker.name, &error))));
        }
        if !worker.lane.has_results() {
            return true;
        }
        // There may be room again.
        (worker.full, worker.is_lagging) = (None, false);
        let mut bytes = Vec::new();
        let taken = worker.lane.take_results(&mut bytes).map_err(|_| corrupt(&worker.name));
        self.results_taken += taken.as_ref().map_or(0, |count| u64::from(*count));
        let mut has_side_results = std::mem::take(&mut effects.has_side_results);
        let delivered = taken.and_then(|count| worker.deliver(bytes, count, &mut self.runs, effects));
        if effects.has_side_results {
            self.side_result_seats.insert(seat);
            has_side_results = true;
        }
        effects.has_side_results = has_side_results;
        match delivered {
            Ok(None) => {}
            Ok(Some(report)) => {
                // Decoded by the driver, as it is the user's.
                worker.has_reported = true;
                self.reports.push((seat, worker.generation, report));
                effects.nudge = true;
            }
            Err(error) => worker.kill(Some(error)),
        }
        let is_large = |limit: u64| worker.phase == Phase::Serving && worker.lane.memory().0 > limit;
        if self.config.recycle_above.is_some_and(is_large) {
            self.retire(seat, effects);
        }
        true
    }
}

impl Worker {
    #[inline]
    fn has_come(&self) -> bool {
        self.lane.has_results()
            || self.has_room_again()
            || self.side_results.is_damaged() && self.phase != Phase::Killed
    }

    /// Returns `true` if it has given up an order since there was no room for another, in its lane or its pipe, or since it was taken
    /// for stopped.
    #[inline]
    fn has_room_again(&self) -> bool {
        (self.full.is_some() || self.unsent.is_some() || self.stalled.is_some()) && {
            let now = self.lane.given_up();
            let stalled = self.stalled.map(|(then, _)| then);
            [self.full, self.unsent, stalled].into_iter().flatten().any(|then| then != now)
        }
    }

    /// Takes in `count` results. The first of a worker with an initializer is that one's.
    fn deliver(
        &mut self,
        bytes: Vec<u8>,
        count: u32,
        runs: &mut Histogram,
        effects: &mut Effects,
    ) -> Result<Option<Result<EncodedMessage>>> {
        let (now, mut begun) = (effects.now(), None);
        let since = self.running.front().map_or(now, |running| running.since);
        let (mut bytes, mut at, mut left) = (Bytes::from(bytes), 0, count);
        self.has_worked |= count > 0 && !self.is_awaited;
        self.moved = now;
        if self.is_awaited && left > 0 {
            self.is_awaited = false;
            let (_, _, len) = spsc::first(&bytes).ok_or_else(|| corrupt(&self.name))?;
            begun = Some(self.side_results.report());
            (at, left) = (len, left - 1);
        }
        while left > 0 {
            self.pop_complete(Some((since, now)), &mut effects.ended);
            let Some(running) = self.running.front_mut() else {
                // Items that were given up, such as by a termination, may still be answered.
                return if self.phase == Phase::Killed { Ok(None) } else { Err(corrupt(&self.name)) };
            };
            let (start, first, most) =
                (at, running.chunk.first + u64::from(running.done), left.min(running.end - running.done));
            let (mut plain, mut failures, mut panics) = (0, 0, 0);
            let (mut in_pipe, mut is_trace, mut late) = (None, false, None);
            while plain < most {
                let (tag, _, len) =
                    spsc::first(bytes.get(at..).unwrap_or_default()).ok_or_else(|| corrupt(&self.name))?;
                if tag == TRACE {
                    is_trace = true;
                    break;
                }
                if tag == LATE {
                    late = Some(len);
                    break;
                }
                if tag & IN_PIPE != 0 {
                    in_pipe = Some((tag & !IN_PIPE, len));
                    break;
                }
                at += len;
                plain += 1;
                failures += u32::from(tag != IS_VALUE);
                panics += u32::from(tag == IS_PANIC);
            }
            if plain > 0 {
                let batch = match start == 0 && at == bytes.len() {
                    true => std::mem::take(&mut bytes),
                    // A result that is kept for long keeps those that came with it.
                    false if (at - start) * 4 < bytes.len() => Bytes::copy_from_slice(&bytes[start..at]),
                    false => bytes.slice(start..at),
                };
                running.done += plain;
                self.answered += u64::from(plain);
                left -= plain;
                effects.deliver(&running.group, ResultBatch::records(first, plain, failures, batch));
                effects.totals.failed -= u64::from(panics);
                effects.totals.panicked += u64::from(panics);
            }
            if is_trace {
                let (_, said, len) =
                    spsc::first(bytes.get(at..).unwrap_or_default()).ok_or_else(|| corrupt(&self.name))?;
                if let Some(caller) = &running.group.caller {
                    self.trace_sink.receive(caller, said);
                    effects.trace_sinks.push(self.trace_sink.clone());
                }
                at += len;
                left -= 1;
            }
            if let Some(len) = late {
                let chunk = running.chunk.part(running.done, running.done + 1);
                effects.late_items.push((running.group.clone(), chunk, self.name.clone()));
                at += len;
                running.done += 1;
                self.answered += 1;
                left -= 1;
            }
            if let Some((tag, len)) = in_pipe {
                at += len;
                running.done += 1;
                self.answered += 1;
                left -= 1;
                effects.announce(&self.side_results, &running.group, first + u64::from(plain), tag);
            }
        }
        self.pop_complete(Some((since, now)), &mut effects.ended);
        teach(&effects.ended, now.saturating_duration_since(since), runs);
        effects.groups.extend(effects.ended.drain(..).map(|(group, ..)| group));
        Ok(begun)
    }
}

/// Has groups learn from items that one worker has done in `time`, where it has not measured them; items that came
/// together is taken to have taken equally long.
fn teach(ended: &[(Arc<CallItems>, u32, Took)], time: Duration, runs: &mut Histogram) {
    let total = ended.iter().map(|(_, count, _)| *count).sum::<u32>().max(1);
    for (group, count, took) in ended.iter().filter(|(_, count, _)| *count > 0) {
        let time = match took {
            Took::Reported(time) => *time,
            Took::Unknown => time / total * *count,
            Took::Usual => {
                runs.add(group.usual_time(), u64::from(*count));
                continue;
            }
        };
        group.learn(time, *count);
        runs.add(time / *count, u64::from(*count));
    }
}

fn not_received(who: &str, error: &Error) -> Error {
    let why = error.text();
    let text = format!("{who} was killed, as a result of it could not be received: {why}; another takes its place");
    Error::new(error.kind(), text).explained_by(error.topic())
}

fn corrupt(who: &str) -> Error {
    let why = "the memory between it and the pool is damaged; it was killed, and another takes its place";
    let text = format!("{who} or another process wrote where it must not: {why}");
    Error::new(ErrorKind::Corrupt, text).explained_by(Topic::Damaged)
}
