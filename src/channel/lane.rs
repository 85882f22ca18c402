//! What a pool and one of its workers share: a ring of orders, a ring of results, and who may start which item.
//!
//! # State
//! The words of the region's head, by name in [`word`]; then the two rings. An order has a number, which is its place in
//! the ring, and some items. `CLAIMS` has a row for each order that may be under way:
//! `NOTIFY_EACH:1 | number:31 | next:16 | end:16`, which item started last, and when (`microseconds:48 | item + 1:16`; 0 is
//! none), and how many nanoseconds the order took (0: not known); for `NOTIFY_EACH`, and when the pool is notified, see `result_notification`.
//! The board is a second region that all workers of a pool have: one event, for the pool to sleep on, and a bit for each
//! lane, its mark, which says that the pool should look into that lane.
//!
//! # Moves
//! | from -> to | who | ordering | wakes |
//! |---|---|---|---|
//! | a row is made, then the order put | the pool | Release, by the ring | the worker, if it sleeps |
//! | next -> next + 1: an item starts, if next was below end | the worker | SeqCst | the pool, as `result_notification` says |
//! | end -> lower, never below next: items are taken back | the pool | AcqRel CAS | - |
//! | a result is put | the worker | Release, by the ring | the pool, with the next start, or that of the last order |
//! | a mark 0 -> 1 | the worker, with the start after a result, and before each wake | SeqCst | - |
//! | all marks of a word -> 0 | the pool, which then looks into those lanes | SeqCst | - |
//! | the time that an order took | the worker, before the result of its last item | Relaxed: published with that result | - |
//! | what an item says before its result is put | the worker | Release, by the ring | the pool, if it sleeps |
//! | `WAKER` is set before a wake, and cleared by who was woken | both | Relaxed: a hint, see `cpu_migration` | - |
//! | results are taken | the pool | Release, by the ring | the worker, if it waits for room |
//! | an order is given up, after its last item | the worker | Release, by the ring | the pool, if no item of it was started, or some were taken back since the worker came to it: no result tells that it goes on |
//! | `READY`: the worker looks for its first order | the worker | Release | - |
//! | `ASKED` -> an item that should stop | the pool | Release | who waits for it in the worker |
//! | `CLOSED` | the pool | Release | the worker |
//! | `WATCHED` -> the item at work, and to 0 after it | the worker | Release | with 0: its threads that wait for `ASKED` |
//! | `RESIDENT`, `PEAK` | the worker | Release | - |
//!
//! # Invariants
//! 1. An item is started by the worker or taken back by the pool, never both: both change one word.
//! 2. Results come in the order of starts, one for each item that was started, so counting them tells whose they are.
//!    What an item says comes before its result and is of another kind.
//! 3. A row is used again only after the order that had it was given up.
//! 4. What the worker's process stored is a claim. The pool remembers how far each order went when it last looked: a claim
//!    can only have become shorter, and less than its end have been started. What cannot be makes the lane damaged, which
//!    shows as results that cannot be read: the pool kills the worker and gives the next one a lane of its own.
//!
//! # Death
//! | the worker is killed | the pool sees |
//! |---|---|
//! | before it starts an item | all items of the order may go to somebody else |
//! | between an item's start and its result | one item started beyond the results: that one, and no other, was running |
//! | after the result | the result, which counts |
//! | between a result and its mark, or its notice | the exit of the worker: the pool looks into that lane, marked or not |
//! | between giving an order up and the notice of that | the same |
//!
//! The pool's own process killed, between an order and its wake or while it reads: the worker's lifeline closes, and it
//! is killed as well.
//!
//! # Cancel
//! No move awaits.

use super::cpu_migration::CpuMigration;
use super::result_notification::{self, NotifyTarget, ResultNotifier};
use super::segment::Bytes;
use super::spsc::{Corrupt, Reader, Words, Writer};
use crate::os::{clock, cpu, fault};
use crate::shm::atomic::AtomicU64;
use crate::shm::family::SLOTS;
#[cfg(multiprocess_loom)]
use crate::shm::region as view;
use crate::shm::region::{Map, Region};
#[cfg(not(multiprocess_loom))]
use crate::shm::view;
use crate::wait::{WaitQueue, sleepers, until_blocking};
use crate::wire::{Attachment, attach};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;
use std::time::Duration;

mod word {
    use super::sleepers;
    pub(super) const MAGIC: usize = 0;
    pub(super) const ORDERS_TAIL: usize = 16;
    pub(super) const ORDERS_HEAD: usize = 32;
    pub(super) const RESULTS_TAIL: usize = 48;
    pub(super) const RESULTS_HEAD: usize = 64;
    pub(super) const CLOSED: usize = 80;
    pub(super) const ASKED: usize = 81;
    /// The item for which a thread of the worker waits for `ASKED`, as it is there; 0 is none.
    pub(super) const WATCHED: usize = 82;
    /// Bytes of memory that the worker had when it last looked, now and at most.
    pub(super) const RESIDENT: usize = 83;
    pub(super) const PEAK: usize = 84;
    /// The CPU of who last had to wake the worker, and 1; 0 once the worker has seen it.
    pub(super) const WAKER: usize = 85;
    /// 1 once the worker takes orders.
    pub(super) const READY: usize = 86;
    /// Rows of [`super::ROW`] words, so that no two share a cache line.
    pub(super) const CLAIMS: usize = 96;
    pub(super) const WORK: usize = CLAIMS + super::ROW * super::AHEAD as usize;
    pub(super) const ROOM: usize = WORK + sleepers::LEN;
    pub(super) const STOP: usize = ROOM + sleepers::LEN;
}

const MAGIC: u64 = u64::from_be_bytes(*b"mpLane01");
const ROW: usize = 16;
/// Orders that may be under way.
pub(crate) const AHEAD: u32 = 8;
/// Only of an order of so many items does a pool rely on being told when it begins, of what it knew of, too: to look
/// whether there is such costs as much as a few items.
pub(crate) const MANY: u32 = 64;
/// Items that one order may have.
pub(crate) const MOST_ITEMS: usize = 1 << 15;
const HEAD_LEN: usize = 4096;
const ORDERS: u32 = 64 << 10;
const RESULTS: u32 = 64 << 10;
const BOARD_LEN: usize = 4096;

/// Marks of the board, behind its event: lane `n` has bit `n % 64` of word `n / 64`.
const MARKS: usize = sleepers::LEN;
const MARK_WORDS: usize = SLOTS.div_ceil(64);

/// Where the pool sleeps, and sees which lanes have something for it; shared by all its workers.
pub(crate) struct Board(Arc<Region>);

fn mark_of(board: &Region, lane: usize) -> (&AtomicU64, u64) {
    (&board.words()[MARKS + lane / 64 % MARK_WORDS], 1 << (lane % 64))
}

impl Board {
    pub(crate) fn create() -> io::Result<Self> {
        Ok(Self(Arc::new(Region::create("multiprocess-board", BOARD_LEN, BOARD_LEN as u64)?)))
    }

    fn marks(&self, lanes: usize) -> &[AtomicU64] {
        &self.0.words()[MARKS..MARKS + lanes.div_ceil(64).min(MARK_WORDS)]
    }

    /// Whether any of the first `lanes` lanes is marked. One load for every 64 of them.
    #[inline]
    pub(crate) fn has_marks(&self, lanes: usize) -> bool {
        self.marks(lanes).iter().any(|word| word.load(SeqCst) != 0)
    }

    /// Which of them are marked, as bits of their words.
    pub(crate) fn marked(&self, lanes: usize) -> impl Iterator<Item = usize> {
        self.marks(lanes).iter().enumerate().flat_map(|(at, word)| bits(at, word.load(SeqCst)))
    }

    /// The same, and takes the marks away. The caller then looks into each of these lanes.
    pub(crate) fn take_marked(&self, lanes: usize) -> impl Iterator<Item = usize> {
        self.marks(lanes).iter().enumerate().flat_map(|(at, word)| bits(at, result_notification::take_marks(word)))
    }

    /// Marks a lane for somebody in this process.
    pub(crate) fn marker(&self, lane: usize) -> Marker {
        Marker { board: self.0.clone(), lane }
    }

    /// Calls `react` when a result has come while it is armed.
    pub(crate) fn alarm(&self, react: impl Fn() + Send + Sync + 'static) -> io::Result<Arc<WaitQueue>> {
        WaitQueue::alarm(self.0.clone(), 0, react)
    }
}

/// The bits of word `at` that are set, lowest first.
fn bits(at: usize, mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (word != 0).then(|| word.trailing_zeros() as usize)?;
        word &= word - 1;
        Some(64 * at + bit)
    })
}

/// Has the pool look into one lane.
pub(crate) struct Marker {
    board: Arc<Region>,
    lane: usize,
}

impl Marker {
    pub(crate) fn mark(&self) {
        let (word, bit) = mark_of(&self.board, self.lane);
        result_notification::mark(word, bit);
    }
}

#[derive(Clone)]
struct Ring(Arc<Map>);

impl Bytes for Ring {
    #[inline]
    fn write(&self, at: usize, from: &[u8]) {
        view::copy_in(&self.0, at, from);
    }

    fn word(&self, at: usize) -> u64 {
        view::word(&self.0, at)
    }

    #[inline]
    fn read(&self, at: usize, len: usize, to: &mut Vec<u8>) {
        view::append(&self.0, at, len, to);
    }
}

fn orders(region: &Region) -> Words<'_> {
    let words = region.words();
    Words { tail: &words[word::ORDERS_TAIL], head: &words[word::ORDERS_HEAD] }
}

fn results(region: &Region) -> Words<'_> {
    let words = region.words();
    Words { tail: &words[word::RESULTS_TAIL], head: &words[word::RESULTS_HEAD] }
}

fn rings(region: &Region) -> io::Result<[Ring; 2]> {
    let orders = region.extent(HEAD_LEN as u64, ORDERS.into())?;
    Ok([Ring(orders), Ring(region.extent(HEAD_LEN as u64 + u64::from(ORDERS), RESULTS.into())?)])
}

/// The row of order `number`: its claim, and when its last item started.
fn row(region: &Region, number: u32) -> (&AtomicU64, &AtomicU64) {
    let at = word::CLAIMS + (number % AHEAD) as usize * ROW;
    (&region.words()[at], &region.words()[at + 1])
}

/// How long order `number` took its worker, in nanoseconds; 0 if it has not said so.
fn took(region: &Region, number: u32) -> &AtomicU64 {
    &region.words()[word::CLAIMS + (number % AHEAD) as usize * ROW + 2]
}

/// Which items of an order have been started, and which may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) started: u32,
    pub(crate) end: u32,
}

impl Claim {
    pub(super) fn of(bits: u64) -> Self {
        let end = bits as u32 & 0xffff;
        // The worker's last look for an item finds none and counts all the same.
        Self { started: (bits as u32 >> 16).min(end), end }
    }
}

/// What the row of an order with `items` items holds when it is given.
pub(super) fn claimable(number: u32, items: usize) -> u64 {
    u64::from(number & (u32::MAX >> 1)) << 32 | items as u64
}

/// The pool's move: takes items back that have not started, all from `keep` on; how far the order goes now.
pub(super) fn take_back(claim: &AtomicU64, keep: u32) -> Claim {
    let shorten = |bits: u64| {
        let Claim { started, end } = Claim::of(bits);
        Some(bits & !0xffff | u64::from(end.min(started.max(keep))))
    };
    let _ = claim.fetch_update(AcqRel, Acquire, shorten);
    Claim::of(claim.load(Acquire))
}

/// Of a note of a start: which item it was, from 1; and above that the time.
const INDEX_BITS: u32 = 16;
const INDEX: u64 = (1 << INDEX_BITS) - 1;

/// Microseconds, begun ones too, of the clock that all processes share.
pub(crate) fn now_us() -> u64 {
    clock::now_ns().div_ceil(1000)
}

/// The pool's end.
pub(crate) struct PoolEnd {
    region: Arc<Region>,
    work: Arc<WaitQueue>,
    room: Arc<WaitQueue>,
    stop: Arc<WaitQueue>,
    orders: Writer<Ring>,
    results: Reader<Ring>,
    given: u32,
    /// How far each order that may be under way goes at most.
    ends: [Cell<u32>; AHEAD as usize],
    /// Something that cannot be was found; it is told once, instead of results.
    is_damaged: Cell<bool>,
    is_over: bool,
}

/// A new lane, number `lane` on its board: the pool's end, and the worker's to be sent there.
pub(crate) fn create(board: &Board, lane: usize) -> io::Result<(PoolEnd, WorkerEnd)> {
    let len = HEAD_LEN as u64 + u64::from(ORDERS) + u64::from(RESULTS);
    let region = Arc::new(Region::create("multiprocess-lane", HEAD_LEN, len)?);
    region.words()[word::MAGIC].store(MAGIC, Release);
    let wait_queue = |first| WaitQueue::new(region.clone(), first, None);
    let (work, room, stop) = (wait_queue(word::WORK)?, wait_queue(word::ROOM)?, wait_queue(word::STOP)?);
    let [orders, results] = rings(&region)?;
    let worker = WorkerEnd::of(region.clone(), board.0.clone(), lane)?;
    let (orders, results) = (Writer::new(orders, ORDERS), Reader::new(results, RESULTS));
    let (ends, is_damaged) = Default::default();
    Ok((PoolEnd { region, work, room, stop, orders, results, given: 0, ends, is_damaged, is_over: false }, worker))
}

impl PoolEnd {
    /// Whether an order of `len` bytes can travel through the ring at all.
    pub(crate) fn can_carry(&self, len: usize) -> bool {
        // A quarter, so that prefetched ones find room.
        len <= ORDERS as usize / 4
    }

    /// Whether an order of `len` bytes may be given now.
    pub(crate) fn takes(&mut self, len: usize) -> bool {
        let words = orders(&self.region);
        if !self.orders.is_sound(words) {
            self.is_damaged.set(true);
            return false;
        }
        self.orders.under_way(words) < AHEAD && self.orders.has_room_for(words, len)
    }

    /// The number of the order that is given next.
    pub(crate) fn next_number(&self) -> u32 {
        self.given
    }

    /// How far the worker is with giving orders up: there can be more room than before once this has changed.
    pub(crate) fn given_up(&self) -> u64 {
        orders(&self.region).head.load(Acquire)
    }

    /// Whether the worker takes orders by now, or has ever.
    pub(crate) fn is_ready(&self) -> bool {
        self.region.words()[word::READY].load(Acquire) != 0
    }

    /// Gives an order of `items` items; its number, or `None` if there is no room now.
    pub(crate) fn give(&mut self, kind: u8, parts: [&[u8]; 2], items: usize) -> Option<u32> {
        if !self.takes(parts[0].len() + parts[1].len()) {
            return None;
        }
        let number = self.given;
        let (claim, started) = row(&self.region, number);
        self.ends[(number % AHEAD) as usize].set(items as u32);
        claim.store(claimable(number, items), Relaxed);
        started.store(0, Relaxed);
        took(&self.region, number).store(0, Relaxed);
        if !self.orders.push(orders(&self.region), kind, parts) {
            return None;
        }
        self.given = number.wrapping_add(1);
        fault::point("lane.given");
        if self.work.has_sleepers_after_rmw() {
            self.region.words()[word::WAKER].store(cpu::current() as u64 + 1, Relaxed);
        }
        self.work.notify_one();
        Some(number)
    }

    /// How far an order is that was given and is not complete.
    pub(crate) fn claim(&self, number: u32) -> Claim {
        self.believed(number, Claim::of(row(&self.region, number).0.load(Acquire)), 0)
    }

    /// A claim as far as it can be true of an order of which `done` items are done.
    fn believed(&self, number: u32, claim: Claim, done: u32) -> Claim {
        let known = &self.ends[(number % AHEAD) as usize];
        let end = claim.end.clamp(done.min(known.get()), known.get());
        if end != claim.end {
            self.is_damaged.set(true);
        }
        Claim { started: claim.started.min(end), end }
    }

    /// For how long item `index` of an order has run; `None` as long as its start is not noted.
    pub(crate) fn has_run(&self, number: u32, index: u32) -> Option<Duration> {
        let note = row(&self.region, number).1.load(Acquire);
        let is_its = note & INDEX == u64::from(index) + 1;
        is_its.then(|| Duration::from_micros(now_us().saturating_sub(note >> INDEX_BITS)))
    }

    /// How long the worker was at order `number`, by its own clock, if it says so. For an order whose last result has come.
    pub(crate) fn took(&self, number: u32) -> Option<Duration> {
        let ns = took(&self.region, number).load(Relaxed);
        (ns > 0).then(|| Duration::from_nanos(ns))
    }

    /// Whether something was found that cannot be.
    pub(crate) fn is_damaged(&self) -> bool {
        self.is_damaged.get()
    }

    /// Takes items back that have not started, of an order of which `done` are done; how far it goes now.
    pub(crate) fn take_back(&self, number: u32, done: u32) -> Claim {
        let claim = self.believed(number, take_back(row(&self.region, number).0, done), done);
        self.ends[(number % AHEAD) as usize].set(claim.end);
        claim
    }

    /// Whether the worker will tell of what it has put when it begins order `number`, the last that was given, about which
    /// it may be quiet, and which has [`MANY`] items. For who has armed its alarm before.
    pub(crate) fn will_notify(&self, number: u32) -> bool {
        result_notification::will_notify(row(&self.region, number).0)
    }

    /// Wants to hear of each result of order `number` from now on, and looks for those that were put before after this.
    pub(crate) fn enable_notification(&self, number: u32) {
        result_notification::enable_notification(row(&self.region, number).0);
    }

    /// Whether results have come. No system call, no wake.
    #[inline]
    pub(crate) fn has_results(&self) -> bool {
        (self.results.has_any(results(&self.region)) || self.is_damaged.get()) && !self.is_over
    }

    /// Appends the records of all results that have come; how many.
    pub(crate) fn take_results(&mut self, to: &mut Vec<u8>) -> Result<u32, Corrupt> {
        let taken = match self.is_damaged.get() {
            true => Err(Corrupt),
            false => self.results.take_all(results(&self.region), to),
        };
        self.is_over |= taken.is_err();
        let count = taken?;
        self.room.notify_one();
        Ok(count)
    }

    /// Asks the item that runs as `index` of an order to stop.
    pub(crate) fn ask_to_stop(&self, number: u32, index: u32) {
        self.region.words()[word::ASKED].store(asked(number, index), Release);
        self.stop.notify_all();
    }

    /// Bytes of memory that the worker had when it last looked: now, and at most.
    pub(crate) fn memory(&self) -> (u64, u64) {
        let words = self.region.words();
        (words[word::RESIDENT].load(Relaxed), words[word::PEAK].load(Relaxed))
    }

    /// No order will follow.
    pub(crate) fn close(&self) {
        self.region.words()[word::CLOSED].store(1, Release);
        self.work.notify_all();
    }
}

/// Never 0.
fn asked(number: u32, index: u32) -> u64 {
    u64::from(number) << 32 | u64::from(index) << 1 | 1
}

/// The worker's end; it travels there.
pub(crate) struct WorkerEnd {
    region: Arc<Region>,
    pool: PoolDoorbell,
    work: Arc<WaitQueue>,
    room: Arc<WaitQueue>,
    orders: Reader<Ring>,
    results: Writer<Ring>,
    next: u32,
    notifier: ResultNotifier,
    migration: CpuMigration,
}

/// How a worker reaches its pool.
#[derive(Clone)]
struct PoolDoorbell {
    board: Arc<Region>,
    lane: usize,
    queue: Arc<WaitQueue>,
}

impl PoolDoorbell {
    fn mark(&self) -> (&AtomicU64, u64) {
        mark_of(&self.board, self.lane)
    }

    /// Has the pool look into the lane, asleep or not.
    fn notify(&self) {
        let (word, bit) = self.mark();
        result_notification::mark(word, bit);
        self.queue.notify_one();
    }
}

impl NotifyTarget for PoolDoorbell {
    #[inline]
    fn mark(&self) -> (&AtomicU64, u64) {
        Self::mark(self)
    }

    #[inline]
    fn may_sleep(&self) -> bool {
        self.queue.has_sleepers_after_rmw()
    }

    fn wake(&self) {
        self.queue.notify_one();
    }
}

/// Where a task looks whether it has been asked to stop.
#[derive(Clone)]
pub(crate) struct StopSign {
    region: Arc<Region>,
    number: u32,
    index: u32,
}

impl StopSign {
    /// The same for another item of the order.
    pub(crate) fn of_item(&self, index: u32) -> Self {
        Self { index, ..self.clone() }
    }

    fn item(&self) -> u64 {
        asked(self.number, self.index)
    }

    /// Whether it is the same item's.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.item() == other.item()
    }

    pub(crate) fn is_shown(&self) -> bool {
        self.region.words()[word::ASKED].load(Acquire) == self.item()
    }

    /// From now on a thread waits for it, until [`dismiss`](Self::dismiss).
    pub(crate) fn watch(&self) {
        self.region.words()[word::WATCHED].store(self.item(), Release);
    }

    /// Blocks until it is shown (true) or need not be watched any more.
    pub(crate) fn blocking_wait(&self) -> io::Result<bool> {
        let queue = WaitQueue::new(self.region.clone(), word::STOP, None)?;
        let is_over = || self.region.words()[word::WATCHED].load(Acquire) != self.item();
        let shown = until_blocking(&queue, None, || match self.is_shown() {
            false if is_over() => Some(false),
            shown => shown.then_some(true),
        })?;
        Ok(shown == Some(true))
    }

    /// The item is done: whoever waits need not any more.
    pub(crate) fn dismiss(&self) {
        self.region.words()[word::WATCHED].store(0, Release);
        if let Ok(queue) = WaitQueue::new(self.region.clone(), word::STOP, None) {
            queue.notify_all();
        }
    }
}

#[cold]
fn corrupt(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the memory of {what} between a pool and its worker is damaged"))
}

/// An order as the worker finds it.
pub(crate) struct Order {
    pub(crate) number: u32,
    pub(crate) kind: u8,
    len: usize,
    /// How far it went when the worker came to it.
    end: u32,
}

impl WorkerEnd {
    fn of(region: Arc<Region>, board: Arc<Region>, lane: usize) -> io::Result<Self> {
        let corrupt = || io::Error::new(io::ErrorKind::InvalidData, "it is no lane");
        if region.words()[word::MAGIC].load(Acquire) != MAGIC || lane >= SLOTS {
            return Err(corrupt());
        }
        let wait_queue = |first| WaitQueue::new(region.clone(), first, None);
        let (work, room) = (wait_queue(word::WORK)?, wait_queue(word::ROOM)?);
        let queue = WaitQueue::new(board.clone(), 0, None)?;
        let pool = PoolDoorbell { board, lane, queue };
        let [orders, results] = rings(&region)?;
        let (orders, results) = (Reader::new(orders, ORDERS), Writer::new(results, RESULTS));
        Ok(Self {
            region,
            pool,
            work,
            room,
            orders,
            results,
            next: 0,
            notifier: ResultNotifier::default(),
            migration: CpuMigration::default(),
        })
    }

    /// Blocks until there is an order, whose bytes go to `to`; `None` after the last.
    pub(crate) fn next(&mut self, to: &mut Vec<u8>) -> io::Result<Option<Order>> {
        self.notifier.notify_each();
        if self.next == 0 {
            self.region.words()[word::READY].store(1, Release);
        }
        if !self.orders.has_any(orders(&self.region)) {
            self.notify_pending();
            if self.notifier.found_pool_awake() {
                self.work.encourage();
            }
        }
        let Self { region, work, orders: reader, migration, .. } = self;
        let attempt = || match reader.peek(orders(region), to) {
            Ok(Some(kind)) => Some(Ok(Some(kind))),
            Ok(None) if region.words()[word::CLOSED].load(Acquire) == 0 => None,
            // What was given before the close comes first.
            Ok(None) if reader.has_any(orders(region)) => None,
            Ok(None) => Some(Ok(None)),
            Err(Corrupt) => Some(Err(corrupt("orders"))),
        };
        let Some(kind) = until_blocking(work, None, attempt)?.transpose()?.flatten() else { return Ok(None) };
        let waker = &region.words()[word::WAKER];
        let woken_from = Some(waker.load(Relaxed)).filter(|waker| *waker != 0).map(|waker| waker as usize - 1);
        if woken_from.is_some() {
            waker.store(0, Relaxed);
        }
        migration.note(woken_from);
        fault::point("lane.ordered");
        let number = self.next;
        self.next = number.wrapping_add(1);
        let end = Claim::of(row(region, number).0.load(Acquire)).end;
        Ok(Some(Order { number, kind, len: to.len(), end }))
    }

    /// Starts the next item of `order`, if there is one; either way the pool now knows of all results, or will when
    /// the last order begins.
    #[inline]
    pub(crate) fn start(&self, order: &Order) -> Option<u32> {
        self.notifier.start(row(&self.region, order.number).0, &self.pool)
    }

    /// The pool wants to know of the results of this order not one by one, but when the last order that it has given
    /// begins: it gives more then.
    pub(crate) fn defer_notification(&self, order: &Order) {
        let claim = row(&self.region, order.number).0;
        let has_untaken =
            || Claim::of(claim.load(Acquire)).end >= MANY && self.results.under_way(results(&self.region)) > 0;
        self.notifier.defer(self.orders.has_more(orders(&self.region)), has_untaken);
    }

    /// Lets the pool know of results that no start has followed.
    pub(crate) fn notify_pending(&self) {
        self.notifier.notify_pending(&self.pool);
    }

    /// Notes that an item started at `now_us`, for who counts its time.
    pub(crate) fn note_start(&self, order: &Order, index: u32, now_us: u64) {
        let note = now_us << INDEX_BITS | (u64::from(index) + 1) & INDEX;
        row(&self.region, order.number).1.store(note, Release);
    }

    /// Whether item `index` is the last of an order, unless items were taken back since.
    #[inline]
    pub(crate) fn is_last(&self, order: &Order, index: u32) -> bool {
        index + 1 >= order.end
    }

    /// Says how long an order took, before the result of its last item is put.
    pub(crate) fn note_took(&self, order: &Order, time: Duration) {
        took(&self.region, order.number).store((time.as_nanos() as u64).max(1), Relaxed);
    }

    /// Whether another order is there already.
    pub(crate) fn has_any(&self) -> bool {
        self.orders.has_any(orders(&self.region))
    }

    /// Whether a result of `len` bytes can travel through the ring at all.
    #[inline]
    pub(crate) fn can_carry(&self, len: usize) -> bool {
        len <= RESULTS as usize / 4 && self.results.can_hold(len)
    }

    /// Puts the result of the item that was started last; waits for room. The pool is told with the next
    /// [`start`](Self::start), or by [`notify_pending`](Self::notify_pending).
    #[inline]
    pub(crate) fn report(&mut self, kind: u8, parts: [&[u8]; 2]) -> io::Result<()> {
        if !self.results.push(results(&self.region), kind, parts) {
            self.report_late(kind, parts)?;
        }
        self.notifier.note_result();
        Ok(())
    }

    #[cold]
    fn report_late(&mut self, kind: u8, parts: [&[u8]; 2]) -> io::Result<()> {
        self.notify_pending();
        let Self { region, room, results: writer, .. } = self;
        let attempt = || match writer.push(results(region), kind, parts) {
            true => Some(Ok(())),
            false if !writer.is_sound(results(region)) => Some(Err(corrupt("results"))),
            false => None,
        };
        until_blocking(room, None, attempt)?.unwrap_or(Ok(()))
    }

    /// Who writes among the results while an item runs; [`catch_up`](Self::catch_up) then.
    pub(crate) fn event_writer(&self, kind: u8) -> io::Result<EventWriter> {
        let Self { region, room, pool, .. } = self;
        let (region, room, pool) = (region.clone(), room.clone(), pool.clone());
        Ok(EventWriter { results: Writer::new(rings(&region)?[1].clone(), RESULTS), region, room, pool, kind })
    }

    /// Goes on behind what an event writer has written.
    pub(crate) fn catch_up(&mut self) {
        self.results.catch_up(results(&self.region));
    }

    /// Gives an order up: all its items are done, or were taken back. If all were, or some since it came to it, a pool that
    /// has taken this worker for stopped is told that it goes on.
    pub(crate) fn finish(&mut self, order: Order) {
        let claim = Claim::of(row(&self.region, order.number).0.load(Acquire));
        self.orders.consume(orders(&self.region), order.len);
        if claim.started == 0 || claim.end < order.end {
            fault::point("lane.given_up");
            self.pool.notify();
        }
    }

    /// Tells how much memory this process has.
    pub(crate) fn note_memory(&self, resident: u64, peak: u64) {
        let words = self.region.words();
        words[word::RESIDENT].store(resident, Release);
        words[word::PEAK].store(peak, Release);
    }

    pub(crate) fn stop_sign(&self, order: &Order, index: u32) -> StopSign {
        StopSign { region: self.region.clone(), number: order.number, index }
    }
}

/// What an item has to say before its result goes among the results, as records of a kind of their own. It belongs to
/// the thread that runs the items, between an item's start and its result.
pub(crate) struct EventWriter {
    region: Arc<Region>,
    room: Arc<WaitQueue>,
    pool: PoolDoorbell,
    results: Writer<Ring>,
    kind: u8,
}

impl EventWriter {
    /// Waits for room. What is too long for the ring is left out.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        let Self { region, room, pool, results: writer, kind } = self;
        if bytes.len() > RESULTS as usize / 4 {
            return;
        }
        writer.catch_up(results(region));
        let told = until_blocking(room, None, || writer.push(results(region), *kind, [bytes, &[]]).then_some(()));
        if told.is_ok() {
            pool.notify();
        }
    }
}

impl Serialize for WorkerEnd {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let fds = [&self.region, &self.pool.board].map(|region| Attachment::Shared(region.fd().clone()));
        attach::serialize_handle(serializer, fds, self.pool.lane)
    }
}

impl<'de> Deserialize<'de> for WorkerEnd {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let ([lane, board], number): ([OwnedFd; 2], usize) = attach::deserialize_handle(deserializer)?;
        let open = || {
            let (lane, board) = (Region::open(lane, HEAD_LEN)?, Region::open(board, BOARD_LEN)?);
            Self::of(Arc::new(lane), Arc::new(board), number)
        };
        open().map_err(|error| D::Error::custom(format_args!("a lane cannot be opened: {error}")))
    }
}
