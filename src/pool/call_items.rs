//! The items of one call, as the scheduler has them: chunks that wait, results that have come, and how long an item takes.

use super::batch::ResultBatch;
use super::chunk::Chunk;
use super::options::Options;
use super::protocol::{Header, HeaderBytes, Origin};
use super::side_channel::{Recipient, SideResults};
use crate::channel::lane::Pace;
use crate::error::{Error, ErrorKind, Topic};
use crate::os::random;
use crate::os::sync::lock;
use crate::process::entry;
use crate::process::trace::Caller;
use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::task::{Context, Waker};
use std::time::Duration;

/// The items of one call, as the pool has them.
pub(super) struct CallItems {
    /// The number of the call, among all of this process.
    pub(super) number: u64,
    pub(super) call: entry::Call,
    pub(super) label: &'static str,
    pub(super) options: Options,
    /// The span and subscriber that get the items' traces.
    pub(super) caller: Option<Arc<Caller>>,
    items: Mutex<Items>,
    /// Bytes of the arguments of items submitted and not settled. Changed with the pool's lock held, so that no change is lost.
    bytes: AtomicUsize,
    /// How long an item takes, smoothed; 0 while unknown.
    item_ns: AtomicU64,
    /// A caller that gathers is not woken while more items than this are out.
    low: AtomicUsize,
    /// How long items of this function take in this pool, known once something was submitted.
    usual_time: OnceLock<Arc<UsualTime>>,
}

/// How long items of one function usually take: their median, about. A few that were interrupted do not count.
#[derive(Default)]
pub(super) struct UsualTime(AtomicU64);

impl UsualTime {
    fn ns(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// Goes a quarter of the way up at most, or down: as many are above it as below in the long run.
    pub(super) fn learn(&self, ns: u64) {
        let old = self.ns();
        let new = match old {
            0 => ns,
            _ if ns > old => ns.min(old + old / 4 + 1),
            _ => ns.max(old - old / 4),
        };
        self.0.store(new, Relaxed);
    }
}

/// The seats at which items of a call have been, one or some.
#[derive(Default)]
enum Visited {
    #[default]
    None,
    One(usize),
    /// A bit for each seat.
    Many(Vec<u64>),
}

#[derive(Default)]
pub(super) struct Items {
    pub(super) pending: VecDeque<Chunk>,
    done: VecDeque<ResultBatch>,
    /// Where results of these items lie that are still to be fetched, and how many those are.
    side_results: Vec<Arc<SideResults>>,
    announced: usize,
    waker: Option<Waker>,
    /// Whether the pool's queue lists this group.
    pub(super) is_queued: bool,
    /// Its caller does not wait for the rest any more.
    pub(super) is_cancelled: bool,
    /// A timer watches the `queue_timeout` of its items.
    pub(super) is_watched: bool,
    /// Items that wait before they are tried again.
    pub(super) resting: usize,
    /// Items submitted and not settled.
    pub(super) out: usize,
    visited: Visited,
    /// Orders that a taker has.
    pub(super) taken: BTreeSet<u64>,
}

impl Visited {
    #[inline]
    fn note(&mut self, seat: usize) {
        match self {
            Visited::None => *self = Visited::One(seat),
            Visited::One(one) if *one == seat => {}
            Visited::One(one) => {
                let one = *one;
                *self = Visited::Many(Vec::new());
                [one, seat].into_iter().for_each(|seat| self.note(seat));
            }
            Visited::Many(words) => {
                words.resize(words.len().max(seat / 64 + 1), 0);
                words[seat / 64] |= 1 << (seat % 64);
            }
        }
    }
}

impl Items {
    /// An order of it goes to a worker at this seat.
    #[inline]
    pub(super) fn note_seat(&mut self, seat: usize) {
        self.visited.note(seat);
    }

    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }
}

/// A call may wait behind an item that takes no longer. Of a call with many items that take no longer, results are notified of together.
const QUICK_NS: u64 = 2_000_000;
/// To move an item that takes longer to an idle worker costs less than the item. Unoptimised builds go the same ways.
const MOVE_NS: u64 = if cfg!(debug_assertions) { 250_000 } else { 50_000 };
/// A look at the clock after an item that takes no longer would cost a part of it.
const CLOCK_NS: u64 = 1000;
/// To time an order that takes no longer would cost a percent of it.
const TIMED_NS: u64 = 5000;
/// So many microseconds a result may wait at its worker while there are others behind it, unless its call gathers.
const DEFERRED_US: u16 = 400;
/// An item that takes no longer is over before another worker could be woken for it. Unoptimised builds go the same ways.
const BRIEF_NS: u64 = if cfg!(debug_assertions) { 200_000 } else { 20_000 };

/// This process, among all that submit calls.
pub(super) fn submitter() -> u64 {
    static SUBMITTER: OnceLock<u64> = OnceLock::new();
    // Without random numbers the process id does: it is unique among those that share this machine.
    *SUBMITTER.get_or_init(|| random::bytes().map_or(std::process::id().into(), u64::from_ne_bytes))
}

/// The number of a new call of this process.
pub(super) fn next_number() -> u64 {
    static NUMBERS: AtomicU64 = AtomicU64::new(0);
    NUMBERS.fetch_add(1, Relaxed)
}

impl CallItems {
    pub(super) fn new(call: entry::Call, label: &'static str, options: Options) -> Self {
        let number = options.number.unwrap_or_else(next_number);
        let caller = if options.keeps_traces { None } else { Caller::here() };
        let (items, bytes) = Default::default();
        let (item_ns, low, usual_time) = (AtomicU64::new(0), AtomicUsize::new(usize::MAX), OnceLock::new());
        Self { number, call, label, options, caller, items, bytes, item_ns, low, usual_time }
    }

    /// Which call it is, among those of all processes.
    pub(super) fn origin(&self) -> Origin {
        self.options.origin.unwrap_or_else(|| Origin { submitter: submitter(), call: self.number })
    }

    /// Locked after the pool's state, never before.
    pub(super) fn items(&self) -> MutexGuard<'_, Items> {
        lock(&self.items)
    }

    /// Returns `true` if its items are for one certain worker.
    pub(super) fn is_certain(&self) -> bool {
        self.options.checkout > 0 && !self.options.acquires
    }

    /// Returns `true` if its items are submitted only once there is room for them.
    pub(super) fn needs_room(&self) -> bool {
        self.is_bounded() && !self.options.is_admitted
    }

    /// Returns `true` if its items count among those of which only so many may wait.
    pub(super) fn is_bounded(&self) -> bool {
        self.options.checkout == 0
    }

    /// Returns `true` if an item is known to be so brief that a reading of the clock would cost a part of it.
    pub(super) fn is_tiny(&self) -> bool {
        self.usual_ns() <= CLOCK_NS
    }

    /// When a worker is to notify of the results of an order. `is_alone` if it has no other orders.
    pub(super) fn pace(&self, is_alone: bool) -> Pace {
        let item_ns = self.item_ns.load(Relaxed);
        match (self.options.is_many, self.usual_ns()) {
            (true, _) if !(1..=QUICK_NS).contains(&item_ns) => Pace::Each,
            (true, _) if self.options.gathers || item_ns <= CLOCK_NS => Pace::Last,
            (true, _) => Pace::Within(DEFERRED_US),
            (false, ns) if !is_alone && (BRIEF_NS..=QUICK_NS).contains(&ns) => Pace::Within(DEFERRED_US),
            (false, _) => Pace::Each,
        }
    }

    /// Returns `true` if an order with so many items is to be timed. Those of a call with many items are not always if that call has shown that
    /// they are over at once.
    pub(super) fn is_timed(&self, items: u32) -> bool {
        !self.options.is_many || !(1..=TIMED_NS).contains(&self.order_ns(items as usize))
    }

    /// How long items of this function usually take; zero while unknown.
    pub(super) fn usual_time(&self) -> Duration {
        Duration::from_nanos(self.usual_time.get().map_or(0, |usual_time| usual_time.ns()))
    }

    /// The header of an order with `chunk`; `grace` is that of the pool.
    pub(super) fn header(&self, chunk: &Chunk, pace: Pace, grace: Duration, is_timed: bool) -> HeaderBytes {
        let (call, attempt) = (self.call, chunk.attempt);
        let limit = self.options.timeout.map(|timeout| {
            let limit = timeout.saturating_add(self.options.grace.unwrap_or(grace));
            // The highest number is none, and the start of an item with a timeout is to be noted.
            limit.as_micros().try_into().unwrap_or(u64::MAX).min(u64::MAX - 1)
        });
        let level = if self.caller.is_some() { Caller::level() } else { 0 };
        let (is_remote, origin) = (self.options.origin.is_some(), self.origin());
        let has_events = self.options.has_events;
        Header { call, attempt, limit, level, pace, is_timed, is_remote, has_events, origin, first: chunk.first }
            .to_bytes(submitter())
    }

    /// Returns how many items a chunk should have now.
    pub(super) fn chunk_size(&self) -> usize {
        let limits = self.options.limits;
        match (self.options.chunk, self.item_ns.load(Relaxed)) {
            // Each item brings the listener.
            _ if self.options.has_events => 1,
            (0, 0) => 1,
            (0, ns) => (limits.time.as_nanos() as u64 / ns).clamp(1, limits.items.max(1) as u64) as usize,
            (chunk, _) => chunk.min(crate::channel::lane::MOST_ITEMS),
        }
    }

    /// Returns `true` if an item is known to be quiet, so that others may wait behind it.
    pub(super) fn is_quick(&self) -> bool {
        (1..=QUICK_NS).contains(&self.usual_ns())
    }

    /// Returns `true` if an item is known to take so long that an idle worker should rather have it than that it waits behind another.
    pub(super) fn is_worth_moving(&self) -> bool {
        self.usual_ns() >= MOVE_NS
    }

    /// Returns `true` if an item is known to be over before another worker could be woken for it.
    pub(super) fn is_brief(&self) -> bool {
        let usual = self.usual_time.get().map_or(0, |usual_time| usual_time.ns());
        (1..=BRIEF_NS).contains(&usual)
    }

    /// How long an item takes: of this call if that is known, else of others of the same function. 0 while unknown.
    fn usual_ns(&self) -> u64 {
        match self.item_ns.load(Relaxed) {
            0 => self.usual_time.get().map_or(0, |usual_time| usual_time.ns()),
            ns => ns,
        }
    }

    pub(super) fn item_time(&self) -> Option<Duration> {
        Some(self.usual_ns()).filter(|ns| *ns > 0).map(Duration::from_nanos)
    }

    pub(super) fn set_usual_time(&self, usual_time: impl FnOnce() -> Arc<UsualTime>) {
        self.usual_time.get_or_init(usual_time);
    }

    /// Where its orders may be.
    pub(super) fn seats(&self) -> Vec<usize> {
        match &self.items().visited {
            Visited::None => Vec::new(),
            Visited::One(seat) => vec![*seat],
            Visited::Many(words) => {
                (0..64 * words.len()).filter(|seat| words[seat / 64] >> (seat % 64) & 1 != 0).collect()
            }
        }
    }

    /// How long so many items take; 0 while unknown.
    pub(super) fn order_ns(&self, items: usize) -> u64 {
        self.item_ns.load(Relaxed).saturating_mul(items as u64)
    }

    /// Returns `true` if it has many items, each too short to be waited for one by one: its caller sleeps until there
    /// is room for more.
    pub(super) fn is_bulk(&self) -> bool {
        self.options.is_many && (1..=QUICK_NS).contains(&self.item_ns.load(Relaxed))
    }

    /// `count` items took `time`.
    pub(super) fn learn(&self, time: Duration, count: u32) {
        let ns = (time.as_nanos() as u64 / u64::from(count.max(1))).max(1);
        self.usual_time.get().into_iter().for_each(|usual_time| usual_time.learn(ns));
        let old = self.item_ns.load(Relaxed);
        // Chunks grow by a factor at most: the first items may be the cheap ones.
        let least = if old == 0 { self.options.limits.time.as_nanos() as u64 / 16 } else { old / 4 };
        self.item_ns.store(ns.max(least), Relaxed);
    }

    /// Hands a batch to the caller; its waker is called without any lock held, and comes with how many items are still
    /// out. Results of a cancelled call are dropped.
    #[must_use]
    pub(super) fn deliver(&self, batch: ResultBatch) -> Option<(Waker, usize)> {
        let mut items = self.items();
        items.out = items.out.saturating_sub(batch.count() as usize);
        if items.is_cancelled {
            return None;
        }
        // An error ends the call of one that gathers.
        let is_enough = items.out <= self.low.load(Relaxed) || batch.failures() > 0;
        items.done.push_back(batch);
        if !is_enough {
            return None;
        }
        items.waker.take().map(|waker| (waker, items.out))
    }

    /// From now on its caller is woken once no more than `low` items are out.
    pub(super) fn wake_at(&self, low: usize) {
        self.low.store(low, Relaxed);
    }

    /// A result is there, and is to be fetched from `side_results`; the rest as [`deliver`](Self::deliver).
    #[must_use]
    pub(super) fn announce(&self, side_results: &Arc<SideResults>) -> Option<(Waker, usize)> {
        let mut items = self.items();
        items.out = items.out.saturating_sub(1);
        if items.is_cancelled {
            return None;
        }
        items.announced += 1;
        if !items.side_results.iter().any(|other| Arc::ptr_eq(other, side_results)) {
            items.side_results.push(side_results.clone());
        }
        items.waker.take().map(|waker| (waker, items.out))
    }

    /// Settles an item whose outcome did not come from the pool.
    pub(super) fn settle_here(&self, index: u64, error: Error) {
        let mut items = self.items();
        items.done.push_back(ResultBatch::failed(index, error));
        let waker = items.waker.take();
        drop(items);
        waker.into_iter().for_each(Waker::wake);
    }

    /// The only item was cancelled, and fails unless an outcome is there. An announced one does not count: a result that is
    /// fetched from now on is dropped.
    pub(super) fn settle_cancelled(&self) {
        let mut items = self.items();
        if !items.done.is_empty() {
            return;
        }
        items.done.push_back(ResultBatch::failed(0, self.was_cancelled()));
        let waker = items.waker.take();
        drop(items);
        waker.into_iter().for_each(Waker::wake);
    }

    /// The waker of this call's caller, to be woken for another reason than a result.
    pub(super) fn take_waker(&self) -> Option<Waker> {
        self.items().waker.take()
    }

    /// Bytes of the arguments of items submitted and not settled.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    /// So many bytes more are kept.
    pub(super) fn keep(&self, bytes: usize) {
        self.bytes.store(self.bytes() + bytes, Relaxed);
    }

    /// So many bytes are kept no longer.
    pub(super) fn release(&self, bytes: usize) {
        self.bytes.store(self.bytes().saturating_sub(bytes), Relaxed);
    }

    /// A chunk's bytes are kept no longer.
    pub(super) fn forget(&self, chunk: &Chunk) {
        self.release(chunk.bytes().len());
    }

    /// Returns `true` if a result is there, fetched or not.
    pub(super) fn has_done(&self) -> bool {
        let items = self.items();
        !items.done.is_empty() || items.announced > 0
    }

    pub(super) fn take_done(&self) -> Option<ResultBatch> {
        loop {
            let side_results = {
                let mut items = self.items();
                match items.done.pop_front() {
                    None if !items.side_results.is_empty() => std::mem::take(&mut items.side_results),
                    batch => return batch,
                }
            };
            side_results.iter().for_each(|side_results| side_results.fetch());
        }
    }

    /// Takes a batch that is done, or has `cx` woken when one is.
    pub(super) fn take_done_or_wait(&self, cx: &Context<'_>) -> Option<ResultBatch> {
        let mut waker = None;
        loop {
            if let Some(batch) = self.take_done() {
                return Some(batch);
            }
            let mut items = self.items();
            if !items.done.is_empty() || !items.side_results.is_empty() {
                continue;
            }
            if items.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                return None;
            }
            // Cloned and dropped without a lock: a waker is foreign code.
            let Some(waker) = waker.take() else {
                drop(items);
                waker = Some(cx.waker().clone());
                continue;
            };
            let before = items.waker.replace(waker);
            drop(items);
            drop(before);
            return None;
        }
    }

    pub(super) fn timed_out(&self, who: &str) -> Error {
        let (label, limit) = (self.label, self.options.timeout.unwrap_or_default());
        let text = format!("{label} ran longer than {limit:?}; {who} was killed and is replaced");
        Error::new(ErrorKind::Timeout, text).explained_by(Topic::Timeout)
    }

    pub(super) fn was_late(&self, who: &str) -> Error {
        let (label, limit) = (self.label, self.options.timeout.unwrap_or_default());
        let text =
            format!("{label} ran longer than {limit:?} and its grace; it ended in {who} before that could be killed");
        Error::new(ErrorKind::Timeout, text).explained_by(Topic::Timeout)
    }

    pub(super) fn was_not_begun(&self, who: &str) -> Error {
        let (label, limit) = (self.label, self.options.timeout.unwrap_or_default());
        let why = "it does not run, or is stopped; it was killed and is replaced";
        let text = format!("{label} was not begun within {limit:?} by {who}, which had it alone: {why}");
        Error::new(ErrorKind::Timeout, text).explained_by(Topic::Timeout)
    }

    pub(super) fn queued_out(&self) -> Error {
        let (label, limit) = (self.label, self.options.queue_timeout.unwrap_or_default());
        let text = format!("{label} did not start within {limit:?}: no worker was free");
        Error::new(ErrorKind::Timeout, text).explained_by(Topic::NoWorkerWasFree)
    }

    pub(super) fn was_let_go(&self) -> Error {
        let why = format!("{} cannot run: the worker that was checked out has ended, or was given back", self.label);
        Error::new(ErrorKind::ProcessDied, why).explained_by(Topic::CheckoutGone)
    }

    pub(super) fn was_cancelled(&self) -> Error {
        Error::new(ErrorKind::Cancelled, format!("{} was cancelled", self.label))
    }
}

impl Recipient for CallItems {
    fn fetched(&self, batch: ResultBatch) {
        let mut items = self.items();
        items.announced = items.announced.saturating_sub(1);
        if items.is_cancelled {
            return;
        }
        items.done.push_back(batch);
        let waker = items.waker.take();
        drop(items);
        waker.into_iter().for_each(Waker::wake);
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;
    use crate::channel::{self, lane};
    use crate::process::entry::IS_VALUE;
    use crate::wire::EncodedMessage;

    /// A result is large, and is announced between the look for one and the cancellation.
    #[test]
    fn a_result_that_was_announced_and_is_not_fetched_leaves_a_cancelled_call_its_error() {
        let (mut sender, receiver) = channel::simplex::<EncodedMessage>().unwrap();
        let side_results = SideResults::new(receiver, lane::Board::create().unwrap().marker(0));
        let group = Arc::new(CallItems::new(entry::Call::of(|| ()), "f", Options::default()));
        group.items().out = 1;
        sender.try_send(EncodedMessage::new(vec![0], Vec::new())).unwrap();
        let recipient: std::sync::Weak<dyn Recipient> = Arc::<CallItems>::downgrade(&group);
        side_results.expect(recipient, 0, IS_VALUE);
        assert!(group.announce(&side_results).is_none());
        group.items().is_cancelled = true;
        group.settle_cancelled();
        group.settle_cancelled();
        let error = group.take_done().and_then(|mut batch| batch.next::<()>()).expect("an outcome").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        side_results.fetch();
        assert!(group.take_done().is_none());
    }

    /// Without one its worker would not note the starts of its items, and a timeout would be found late.
    #[test]
    fn order_with_a_timeout_has_a_limit_however_long_the_grace_is() {
        let options =
            Options { timeout: Some(Duration::from_secs(1)), grace: Some(Duration::MAX), ..Options::default() };
        let group = CallItems::new(entry::Call::of(|| ()), "f", options);
        let bytes = group.header(&Chunk::new(0), Pace::Each, Duration::ZERO, true);
        let (header, _) = Header::read(&bytes, submitter()).expect("a header");
        assert_eq!(header.limit, Some(u64::MAX - 1));
    }
}
