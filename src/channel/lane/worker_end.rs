//! The worker's end of a lane: takes orders, starts their items, puts results.

use super::board::{BOARD_LEN, PoolDoorbell};
use super::stop_sign::StopSign;
use super::{
    Claim, HEAD_LEN, INDEX, INDEX_BITS, MAGIC, MANY, ORDERS, RESULTS, Ring, corrupt, orders, results, rings, row, took,
    word,
};
use crate::channel::cpu_migration::CpuMigration;
use crate::channel::result_notification::{Pace, ResultNotifier};
use crate::channel::spsc::{Corrupt, Reader, Writer};
use crate::error::Error;
use crate::os::fault;
use crate::shm::family::SLOTS;
use crate::shm::region::Region;
use crate::wait::{WaitQueue, until_blocking};
use crate::wire::{Attachment, attach};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;
use std::time::Duration;

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

/// An order as the worker finds it.
pub(crate) struct LaneOrder {
    pub(crate) number: u32,
    pub(crate) kind: u8,
    len: usize,
    /// How far it went when the worker came to it.
    end: u32,
}

impl WorkerEnd {
    pub(super) fn of(region: Arc<Region>, board: Arc<Region>, lane: usize) -> io::Result<Self> {
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
    pub(crate) fn next(&mut self, to: &mut Vec<u8>) -> io::Result<Option<LaneOrder>> {
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
            // Orders from before the close come first.
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
        Ok(Some(LaneOrder { number, kind, len: to.len(), end }))
    }

    /// Starts the next item of `order`, if there is one; either way the pool now knows of all results, or will when
    /// the last order begins.
    #[inline]
    pub(crate) fn start(&self, order: &LaneOrder) -> Option<u32> {
        let has_more = || self.orders.has_more(orders(&self.region));
        self.notifier.start(row(&self.region, order.number).0, &self.pool, has_more)
    }

    /// The pool need not know of the results of this order one by one: it is notified at `pace`, and when the last order that it has
    /// given begins. It gives more then.
    pub(crate) fn defer_notification(&self, order: &LaneOrder, pace: Pace) {
        let claim = row(&self.region, order.number).0;
        let has_untaken =
            || Claim::of(claim.load(Acquire)).end >= MANY && self.results.under_way(results(&self.region)) > 0;
        self.notifier.defer(pace, self.orders.has_more(orders(&self.region)), has_untaken);
    }

    /// Lets the pool know of results that no start has followed.
    pub(crate) fn notify_pending(&self) {
        self.notifier.notify_pending(&self.pool);
    }

    /// Notes that an item started at `now_us`, for the pool, which measures its time.
    pub(crate) fn note_start(&self, order: &LaneOrder, index: u32, now_us: u64) {
        let note = now_us << INDEX_BITS | (u64::from(index) + 1) & INDEX;
        row(&self.region, order.number).1.store(note, Release);
    }

    /// Returns `true` if item `index` is the last of an order, unless items were taken back since.
    #[inline]
    pub(crate) fn is_last(&self, order: &LaneOrder, index: u32) -> bool {
        index + 1 >= order.end
    }

    /// Says how long an order took, before the result of its last item is put.
    pub(crate) fn note_took(&self, order: &LaneOrder, time: Duration) {
        took(&self.region, order.number).store((time.as_nanos() as u64).max(1), Relaxed);
    }

    /// Returns `true` if another order is there already.
    pub(crate) fn has_any(&self) -> bool {
        self.orders.has_any(orders(&self.region))
    }

    /// Returns `true` if a result of `len` bytes can travel through the ring at all.
    #[inline]
    pub(crate) fn can_carry(&self, len: usize) -> bool {
        len <= RESULTS as usize / 4 && self.results.can_hold(len)
    }

    /// Puts the result of the item that was started last; waits for room. The pool is notified with the next
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

    /// Returns a writer that writes among the results while an item runs; call [`catch_up`](Self::catch_up) after it.
    pub(crate) fn event_writer(&self, kind: u8) -> io::Result<EventWriter> {
        let Self { region, room, pool, .. } = self;
        let (region, room, pool) = (region.clone(), room.clone(), pool.clone());
        Ok(EventWriter { results: Writer::new(rings(&region)?[1].clone(), RESULTS), region, room, pool, kind })
    }

    /// Continues behind the records of an event writer.
    pub(crate) fn catch_up(&mut self) {
        self.results.catch_up(results(&self.region));
    }

    /// Gives an order up: all its items are done, or were taken back. If all were, or some since it came to it, a pool that
    /// has taken this worker for stopped is notified that it goes on.
    pub(crate) fn finish(&mut self, order: LaneOrder) {
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

    pub(crate) fn stop_sign(&self, order: &LaneOrder, index: u32) -> StopSign {
        StopSign { region: self.region.clone(), number: order.number, index }
    }
}

/// Events of an item before its result go among the results, as records of a kind of their own. They belong to
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
        open().map_err(|error| D::Error::custom(Error::io("a lane cannot be opened", error)))
    }
}
