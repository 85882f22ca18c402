//! The scheduler as a state machine: events in any order, with invariants after each.
//!
//! The lanes are real. The test plays the workers at their other ends, step by step, and sets the clock.

use super::deadlines::DueEvent;
use super::worker::Phase;
use super::*;
use crate::channel::lane::{self, LaneOrder, WorkerEnd};
use crate::channel::{self, spsc};
use crate::pool::call_items::CallItems;
use crate::pool::chunk::Chunk;
use crate::pool::options::Options;
use crate::pool::side_channel::{SideOrders, SideResults, Unsent};
use crate::process::entry;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

const SEATS: usize = 4;
const MS: Duration = Duration::from_millis(1);

struct Kill(Arc<AtomicBool>);

impl Control for Kill {
    fn kill(&self) {
        self.0.store(true, Relaxed);
    }
    fn leaves_within(&self, _: Duration) {}
}

/// A worker process, as far as its lane shows it.
struct MockWorker {
    generation: u64,
    lane: WorkerEnd,
    order: Option<(LaneOrder, u32)>,
    is_killed: Arc<AtomicBool>,
    _pipes: (channel::Receiver<EncodedMessage>, channel::Sender<EncodedMessage>),
}

impl MockWorker {
    /// One move: it takes an order, starts an item, puts a result, or gives an order up. Whether there was any.
    fn step(&mut self) -> bool {
        let Some((order, at_work)) = &mut self.order else {
            if !self.lane.has_any() {
                self.lane.notify_pending();
                return false;
            }
            let mut bytes = Vec::new();
            let Ok(Some(order)) = self.lane.next(&mut bytes) else { panic!("an order") };
            self.order = Some((order, 0));
            return true;
        };
        if *at_work > 0 {
            // The item that it ran is done.
            if self.lane.is_last(order, *at_work - 1) {
                self.lane.note_took(order, Duration::from_micros(1));
            }
            self.lane.report(entry::IS_VALUE, [&[7], &[]]).unwrap();
            *at_work = 0;
        } else if let Some(index) = self.lane.start(order) {
            *at_work = index + 1;
        } else if let Some((order, _)) = self.order.take() {
            self.lane.finish(order);
        }
        true
    }
}

/// A call, and how often each of its items was settled.
struct Asked {
    group: Arc<CallItems>,
    items: u32,
    settled: Vec<u32>,
}

struct World {
    scheduler: Scheduler,
    now: Instant,
    mocks: Vec<Option<MockWorker>>,
    asked: Vec<Asked>,
    checkout: u64,
    /// The call that takes the worker of that.
    acquires: Option<Arc<CallItems>>,
    wakers: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Act {
    Apply,
    Deadline,
    Brief,
    Chunk,
    Many,
    Retry,
    Step(usize),
    Collect,
    Die(usize),
    Time(u32),
    Cancel,
    Checkout,
    CallCheckout,
    Release,
    Resize(usize, usize),
    Sleep,
    Shut,
    Terminate,
}

impl World {
    /// A pool that looks into lanes that are marked, or into all of its few.
    fn new(few: usize) -> Self {
        Self::of(few, Config { workers: 2..=2, grace: MS, ..Config::default() })
    }

    fn of(few: usize, config: Config) -> Self {
        let board = Arc::new(Board::create().unwrap());
        let mut scheduler = Scheduler::new(Arc::new(config), board);
        (scheduler.awake, scheduler.few) = (1, few);
        let mocks = (0..SEATS).map(|_| None).collect();
        let mut world = Self {
            scheduler,
            now: Instant::now() + MS,
            mocks,
            asked: Vec::new(),
            checkout: 0,
            acquires: None,
            wakers: 0,
        };
        world.time(0);
        world
    }

    fn event<T>(&mut self, happens: impl FnOnce(&mut Scheduler, &mut Effects) -> T) -> T {
        self.now += Duration::from_nanos(100);
        let mut effects = Effects { now: Some(self.now), ..Effects::default() };
        let result = happens(&mut self.scheduler, &mut effects);
        self.scheduler.leave(&mut effects);
        self.wakers += effects.wakers.len();
        effects.side_orders.iter().for_each(|side_orders| assert!(side_orders.send().is_empty()));
        self.check();
        result
    }

    /// The driver's turn, after `ms`: it starts workers, and receives the exits of those that were killed.
    fn time(&mut self, ms: u32) {
        self.now += MS * ms;
        for seat in 0..self.mocks.len() {
            let Some(mocks) = &self.mocks[seat] else { continue };
            let is_over = |worker: &Worker| worker.phase == Phase::Leaving && !mocks.lane.has_any();
            let has_ended = mocks.order.is_none() && self.scheduler.seats.get(seat).is_some_and(is_over);
            if has_ended || mocks.is_killed.load(Relaxed) {
                self.die(seat);
            }
        }
        let step = self.event(|scheduler, effects| scheduler.time_passed(effects));
        for spawn in step.spawns {
            let (lane, end) = lane::create(&self.scheduler.board, spawn.seat).unwrap();
            let ((orders, taken), (put, results)) = (channel::simplex().unwrap(), channel::simplex().unwrap());
            let is_killed = Arc::new(AtomicBool::new(false));
            let spawned = Spawned {
                name: format!("worker {}", spawn.seat),
                // Of a process that is asleep, if there is one.
                pid: u32::MAX,
                control: Box::new(Kill(is_killed.clone())),
                lane,
                side_orders: SideOrders::new(spawn.seat, orders),
                side_results: SideResults::new(results, self.scheduler.board.marker(spawn.seat)),
            };
            self.event(|scheduler, effects| scheduler.spawned(&spawn, spawned, effects));
            let _pipes = (taken, put);
            self.mocks[spawn.seat] =
                Some(MockWorker { generation: spawn.generation, lane: end, order: None, is_killed, _pipes });
        }
    }

    fn die(&mut self, seat: usize) {
        let Some(mocks) = self.mocks[seat].take() else { return };
        let status = Ok(ExitStatus::from_raw(9));
        self.event(|scheduler, effects| {
            scheduler.exited(seat, mocks.generation, &status, Circumstances::default(), effects);
        });
    }

    fn submit(&mut self, items: u32, chunk: u32, is_brief: bool, options: Options) {
        let group = Arc::new(CallItems::new(entry::Call::of(|| ()), "f", options));
        if is_brief {
            let usual_time = Arc::new(UsualTime::default());
            usual_time.learn(100);
            group.set_usual_time(|| usual_time);
        } else {
            group.set_usual_time(Arc::default);
        }
        self.asked.push(Asked { group: group.clone(), items, settled: vec![0; items as usize] });
        let chunks = (0..items).step_by(chunk as usize).map(|first| {
            let mut chunk_ = Chunk::new(first.into());
            (first..(first + chunk).min(items)).for_each(|_| {
                spsc::append_record(&mut chunk_.body, &[1]).unwrap();
                chunk_.count += 1;
            });
            chunk_
        });
        let chunks = chunks.collect();
        self.event(|scheduler, effects| scheduler.submitted(&group, chunks, effects));
    }

    fn act(&mut self, act: Act) {
        let options = Options::default;
        match act {
            Act::Apply => self.submit(1, 1, false, options()),
            Act::Deadline => {
                let limits = Options { timeout: Some(5 * MS), queue_timeout: Some(20 * MS), ..options() };
                self.submit(2, 1, false, limits);
            }
            Act::Brief => self.submit(6, 1, true, options()),
            Act::Chunk => self.submit(4, 3, false, options()),
            Act::Many => self.submit_many(5, MS),
            Act::Retry => self.submit(1, 1, false, Options { retries: 1, back_off: 3 * MS, ..options() }),
            Act::Step(seat) => {
                let _ = self.mocks[seat].as_mut().is_some_and(MockWorker::step);
                self.check();
            }
            Act::Collect => _ = self.event(Scheduler::results_arrived),
            Act::Die(seat) => self.die(seat),
            Act::Time(ms) => self.time(ms),
            Act::Cancel => {
                if let Some(asked) = self.asked.last() {
                    let group = asked.group.clone();
                    self.event(|scheduler, effects| scheduler.cancelled(&group, effects));
                }
            }
            Act::Checkout if self.checkout == 0 => {
                self.checkout = self.scheduler.new_checkout();
                let (checkout, acquires) = (self.checkout, true);
                self.submit(1, 1, false, Options { checkout, acquires, ..options() });
                self.acquires = self.asked.last().map(|asked| asked.group.clone());
            }
            Act::CallCheckout => {
                let is_taken = |checked_out: &CheckedOut| checked_out.seat.is_some();
                if self.scheduler.checkouts.get(&self.checkout).is_some_and(is_taken) {
                    self.submit(2, 1, false, Options { checkout: self.checkout, ..options() });
                }
            }
            Act::Release if self.checkout > 0 => {
                let checkout = std::mem::take(&mut self.checkout);
                // As a checkout that is dropped while it is waited for: its call goes first.
                if let Some(group) = self.acquires.take().filter(|group| group.items().out > 0) {
                    self.event(|scheduler, effects| scheduler.cancelled(&group, effects));
                }
                self.event(|scheduler, effects| scheduler.released(checkout, effects));
            }
            Act::Checkout | Act::Release => {}
            Act::Resize(least, most) => self.event(|scheduler, effects| scheduler.resized(least..=most, effects)),
            Act::Sleep => self.event(Scheduler::about_to_sleep),
            Act::Shut => _ = self.event(Scheduler::shut),
            Act::Terminate => self.event(Scheduler::terminated),
        }
    }

    /// The invariants, checked after each event.
    fn check(&mut self) {
        let scheduler = &mut self.scheduler;
        assert!(scheduler.given.is_empty(), "a worker was not notified of an order");
        scheduler.seats.update();
        let index = scheduler.seats.index();
        let (mut out, mut pending, mut chunks) = (0, 0, 0);
        for asked in &mut self.asked {
            while let Some(batch) = asked.group.take_done() {
                (0..batch.count()).for_each(|at| asked.settled[batch.first() as usize + at as usize] += 1);
            }
            let items = asked.group.items();
            assert!(asked.settled.iter().all(|times| *times <= 1), "settled twice: {:?}", asked.settled);
            let settled = asked.settled.iter().sum::<u32>() as usize;
            if !items.is_cancelled {
                assert_eq!(items.out + settled, asked.items as usize, "an item is neither out nor settled");
            }
            out += items.out;
            if asked.group.options.checkout == 0 {
                pending += items.pending.iter().map(|chunk| chunk.count as usize).sum::<usize>();
            }
            chunks += if asked.group.is_certain() { 0 } else { items.pending.len() };
        }
        assert_eq!((scheduler.out, scheduler.waiting, scheduler.waiting_chunks), (out, pending, chunks));
        // No item waits while a worker is idle, but for brief ones while enough are awake with such.
        for waiting in scheduler.queue.iter().take(4).filter(|group| group.items().has_pending()) {
            let enough = waiting.is_brief() && index.awake.len() >= scheduler.awake << scheduler.boost;
            assert!(index.open[0].is_empty() || enough, "an item waits, and a worker is idle");
            let is_planned = scheduler.is_share_planned || index.open[0].is_empty();
            assert!(is_planned, "nobody looks whether those that are awake get on");
        }
        for (seat, worker) in scheduler.seats.workers() {
            let serves = worker.phase == Phase::Serving && worker.checkout == 0 && worker.full.is_none();
            let level = (serves && worker.given < worker.share).then_some(worker.running.len());
            let found = index.open.iter().position(|set| set.contains(seat));
            // That its items are quiet may be known from another worker since, and is seen when it comes to something.
            let takes_more = scheduler.seats.takes_more(seat);
            assert!(!(takes_more && worker.is_vacating), "others might wait behind orders of a worker that is vacated");
            let level = level.filter(|level| *level < DEPTH && (*level == 0 || takes_more));
            // The state of the orders that it was stopped at is known when its mark is seen.
            let is_right = worker.stalled.is_some() || found == level;
            assert!(is_right, "a worker with {} orders is in set {found:?}", worker.running.len());
            assert!(index.taken.contains(seat));
            // No deadline is forgotten.
            for running in worker.running.iter().filter(|running| running.group.options.timeout.is_some()) {
                let mut events = scheduler.timers.iter().map(|Reverse(timer)| &timer.event);
                let is_its = |place: &Place| {
                    (place.seat, place.generation, place.number) == (seat, worker.generation, running.number)
                };
                let is_timed = events.any(|event| match event {
                    DueEvent::Overrun(place) | DueEvent::Kill(place, _) => is_its(place),
                    _ => false,
                });
                assert!(is_timed || worker.phase == Phase::Killed, "an order with a deadline has no timer");
            }
        }
    }

    fn unsettled(&self) -> String {
        let open = self.asked.iter().filter(|asked| asked.settled.contains(&0)).map(|asked| {
            let (items, options) = (asked.group.items(), &asked.group.options);
            format!(
                "{:?} checkout {} of {}, {} pending",
                asked.settled,
                options.checkout,
                options.acquires,
                items.pending.len()
            )
        });
        let seats = self.scheduler.seats.workers().map(|(seat, worker)| {
            let (checkout, orders) = (worker.checkout, worker.running.len());
            format!(
                "seat {seat}: {:?}, checkout {checkout}, {orders} orders, stalled {}",
                worker.phase,
                worker.is_stalled()
            )
        });
        format!("{:#?}", open.chain(seats).collect::<Vec<_>>())
    }

    /// Everybody does what is to be done until all is settled.
    fn finish(&mut self) {
        for round in 0.. {
            assert!(round < 500, "never settled: {}", self.unsettled());
            (0..SEATS).for_each(|seat| while self.mocks[seat].as_mut().is_some_and(MockWorker::step) {});
            self.act(Act::Collect);
            self.time(if round % 10 == 9 { 1500 } else { 3 });
            if self.scheduler.out == 0 {
                break;
            }
        }
        for asked in &self.asked {
            let is_whole = asked.settled.iter().all(|times| *times == 1);
            assert!(is_whole || asked.group.items().is_cancelled, "{:?}", asked.settled);
        }
    }
}

fn run(few: usize, acts: impl Iterator<Item = Act>) {
    let (mut world, mut done) = (World::new(few), Vec::new());
    struct Done<'a>(&'a mut Vec<Act>);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("after {:?}", self.0);
            }
        }
    }
    let acts_done = Done(&mut done);
    for act in acts {
        acts_done.0.push(act);
        world.act(act);
    }
    // Each checkout gives its worker back.
    world.act(Act::Release);
    world.finish();
    drop(acts_done);
}

#[test]
fn more_workers_are_called_in_when_brief_items_turn_out_long() {
    let mut world = World::new(0);
    world.act(Act::Resize(1, 1));
    world.time(0);
    world.act(Act::Resize(1, SEATS));
    assert!(world.mocks[1..].iter().all(Option::is_none), "one worker");
    // One order each, all of which the one worker takes; a worker that begins one does not get on.
    world.submit(DEPTH as u32, 1, true, Options::default());
    for _ in 0..8 {
        for mocks in world.mocks.iter_mut().flatten().filter(|mocks| mocks.order.is_none()) {
            let _ = mocks.step() && mocks.step();
        }
        world.time(3);
    }
    assert!(world.mocks.iter().all(Option::is_some), "three wait behind the long one, and two may come");
    let orders = |(_, worker): (usize, &Worker)| worker.running.len();
    assert!(world.scheduler.seats.workers().map(orders).min() > Some(0), "they have their parts");
    world.finish();
}

impl World {
    /// Lets a worker go on until it has nothing left to do.
    fn run_worker(&mut self, seat: usize) {
        while self.mocks[seat].as_mut().is_some_and(MockWorker::step) {}
    }
}

#[test]
fn results_whose_marks_are_wiped_are_found_though_the_pool_sleeps() {
    let mut world = World::new(0);
    world.act(Act::Apply);
    world.run_worker(0);
    // Damage.
    assert_eq!(world.scheduler.board.take_marked(SEATS).count(), 1);
    world.act(Act::Sleep);
    for _ in 0..3 {
        let Some(at) = world.scheduler.alert else { panic!("nothing would wake the driver") };
        let wait = at.saturating_duration_since(world.now);
        assert!(wait <= Duration::from_secs(1), "{wait:?}");
        world.time(wait.as_millis() as u32 + 1);
        if world.scheduler.out == 0 {
            return;
        }
    }
    panic!("it was not found: {}", world.unsettled());
}

#[test]
fn an_elastic_pool_whose_only_worker_is_stopped_grows_and_the_item_goes_to_the_new_worker() {
    let mut world = World::new(0);
    world.act(Act::Resize(1, 1));
    world.time(0);
    world.act(Act::Resize(1, SEATS));
    world.act(Act::Apply);
    world.run_worker(0);
    world.act(Act::Collect);
    assert_eq!(world.scheduler.out, 0, "it takes orders");
    // From here on it does nothing.
    world.act(Act::Apply);
    for _ in 0..10 {
        world.time(6);
        (1..SEATS).for_each(|seat| world.run_worker(seat));
        world.act(Act::Collect);
    }
    assert_eq!(world.scheduler.out, 0, "{}", world.unsettled());
}

#[test]
fn the_number_of_workers_kept_awake_stays_raised_while_one_still_lags() {
    let mut world = World::new(0);
    world.submit(12, 1, true, Options::default());
    // It begins the first item, and does not get on.
    let stuck = world.mocks[0].as_mut().unwrap();
    assert!(stuck.step() && stuck.step());
    world.time(3);
    assert_eq!(world.scheduler.boost, 1);
    for _ in 0..2 {
        // The other does, but has more.
        world.run_worker(1);
        world.act(Act::Collect);
        world.submit(6, 1, true, Options::default());
        world.time(3);
        assert!(world.scheduler.boost >= 1, "the first still lags");
    }
    world.finish();
}

impl World {
    /// A call with `items` items, each in an order of its own, that are known to take `time`.
    fn submit_many(&mut self, items: u32, time: Duration) {
        self.submit(1, 1, false, Options { is_many: true, ..Options::default() });
        let asked = self.asked.last_mut().unwrap();
        let group = asked.group.clone();
        group.learn(time, 1);
        // As if another worker had done one.
        (0..SEATS).for_each(|seat| _ = self.scheduler.seats.worker(seat));
        (asked.items, asked.settled) = (items, vec![0; items as usize]);
        let chunks = (1..items).map(|first| {
            let mut chunk = Chunk::new(first.into());
            spsc::append_record(&mut chunk.body, &[1]).unwrap();
            chunk.count = 1;
            chunk
        });
        let chunks = chunks.collect();
        self.event(|scheduler, effects| scheduler.submitted(&group, chunks, effects));
    }

    /// Items of the call `at` that no worker has.
    fn pending(&self, at: usize) -> usize {
        self.asked[at].group.items().pending.iter().map(|chunk| chunk.count as usize).sum()
    }

    /// Orders of each worker, without those that were taken back.
    fn orders(&self) -> Vec<usize> {
        let left = |worker: &Worker| worker.running.iter().filter(|running| running.done < running.end).count();
        self.scheduler.seats.workers().map(|(_, worker)| left(worker)).collect()
    }

    /// The worker takes its first order, and starts an item.
    fn start(&mut self, seat: usize) {
        let worker = self.mocks[seat].as_mut().unwrap();
        assert!(worker.step() && worker.step());
    }
}

#[test]
fn call_of_one_item_gets_the_first_worker_that_is_done_though_a_map_had_orders_ahead_there() {
    let mut world = World::new(0);
    world.submit_many(13, MS);
    assert_eq!((world.orders(), world.pending(0)), (vec![DEPTH; 2], 13 - 2 * DEPTH), "orders lie ahead at both");
    (0..2).for_each(|seat| world.start(seat));
    world.act(Act::Apply);
    assert_eq!((world.pending(0), world.pending(1)), (13 - DEPTH - 1, 1), "one worker has its item only");
    let (seat, _) = world.scheduler.seats.workers().find(|(_, worker)| worker.is_vacating).unwrap();
    assert!(world.mocks[seat].as_mut().unwrap().step(), "it ends that item");
    world.act(Act::Collect);
    assert_eq!(world.pending(1), 0, "the call is next there");
    assert!(world.scheduler.seats.workers().all(|(_, worker)| !worker.is_vacating));
    world.finish();
}

#[test]
fn call_of_one_item_does_not_go_behind_a_map_whose_worker_has_room() {
    let mut world = World::new(0);
    world.submit_many(4, MS);
    assert_eq!(world.orders(), [2, 2]);
    (0..2).for_each(|seat| world.start(seat));
    // It is known to be quiet.
    world.submit(1, 1, true, Options::default());
    assert_eq!(world.pending(1), 1);
    world.finish();
}

#[test]
fn idle_worker_takes_over_some_items_behind_long_ones_at_another() {
    let mut world = World::new(0);
    world.submit_many(8, MS);
    world.start(0);
    while world.mocks[1].as_mut().is_some_and(MockWorker::step) {}
    world.act(Act::Collect);
    assert_eq!(world.orders(), [1, 3]);
    world.finish();
}

#[test]
fn two_maps_that_both_have_orders_at_workers_do_not_take_workers_from_each_other() {
    let mut world = World::new(0);
    (0..2).for_each(|_| world.submit_many(40, MS));
    let (mut vacated, mut before) = (0, 0);
    for round in 0.. {
        if world.scheduler.out == 0 {
            break;
        }
        assert!(round < 2000, "never settled: {}", world.unsettled());
        for seat in 0..2 {
            let _ = world.mocks[seat].as_mut().unwrap().step();
            world.act(Act::Collect);
            let now = world.scheduler.seats.workers().filter(|(_, worker)| worker.is_vacating).count();
            vacated += now.saturating_sub(before);
            before = now;
        }
    }
    assert!(vacated <= 2, "a worker was vacated {vacated} times");
}

#[test]
fn one_call_of_one_item_vacates_one_worker() {
    let mut world = World::new(0);
    world.submit_many(20, MS);
    (0..2).for_each(|seat| world.start(seat));
    world.act(Act::Apply);
    (0..3).for_each(|_| world.act(Act::Sleep));
    world.time(0);
    assert_eq!(world.scheduler.seats.workers().filter(|(_, worker)| worker.is_vacating).count(), 1);
    world.finish();
}

#[test]
fn quick_call_of_one_item_does_not_go_behind_one_that_may_be_long() {
    let mut world = World::new(0);
    world.act(Act::Apply);
    world.start(0);
    world.submit_many(13, MS);
    assert_eq!(world.orders(), [1, DEPTH], "the map does not go behind it either");
    world.start(1);
    // It is known to be quiet.
    world.submit(1, 1, true, Options::default());
    assert_eq!((world.orders(), world.pending(2)), (vec![1, 1], 1), "the worker of the map is next");
    world.run_worker(1);
    world.act(Act::Collect);
    assert_eq!(world.pending(2), 0);
    world.finish();
}

#[test]
fn call_that_may_be_long_gets_the_idle_worker_though_brief_calls_wait_before_it() {
    let mut world = World::new(0);
    world.submit(DEPTH as u32, 1, true, Options::default());
    assert_eq!(world.orders(), [DEPTH, 0]);
    (0..2).for_each(|_| world.submit(1, 1, true, Options::default()));
    world.act(Act::Apply);
    assert_eq!((world.pending(1), world.pending(2), world.pending(3)), (1, 1, 0), "{:?}", world.orders());
    world.finish();
}

#[test]
fn brief_call_of_one_item_gets_an_idle_worker_rather_than_wait_for_a_map() {
    let mut world = World::new(0);
    // All of them brief, and one worker is enough for them.
    world.submit_many(3, Duration::from_nanos(100));
    world.finish();
    let idle = world.orders().iter().filter(|orders| **orders == 0).count();
    assert_eq!(idle, 2);
    let usual_time = Arc::new(UsualTime::default());
    usual_time.learn(100);
    let group = Arc::new(CallItems::new(entry::Call::of(|| ()), "f", Options { is_many: true, ..Options::default() }));
    group.set_usual_time(|| usual_time);
    group.learn(Duration::from_nanos(100), 1);
    world.asked.push(Asked { group: group.clone(), items: 1, settled: vec![0] });
    let mut chunk = Chunk::new(0);
    spsc::append_record(&mut chunk.body, &[1]).unwrap();
    chunk.count = 1;
    world.event(|scheduler, effects| scheduler.submitted(&group, vec![chunk], effects));
    world.submit(1, 1, true, Options::default());
    assert_eq!(world.orders(), [1, 1]);
    world.finish();
}

#[test]
fn order_with_large_arguments_is_not_taken_back_while_those_may_be_on_their_way() {
    let mut world = World::new(0);
    let large = |world: &mut World| {
        let group = Arc::new(CallItems::new(entry::Call::of(|| ()), "f", Options::default()));
        let usual_time = Arc::new(UsualTime::default());
        usual_time.learn(100);
        group.set_usual_time(|| usual_time);
        world.asked.push(Asked { group: group.clone(), items: 1, settled: vec![0] });
        let mut chunk = Chunk::new(0);
        spsc::append_record(&mut chunk.body, &vec![1; 4 << 20]).unwrap();
        chunk.count = 1;
        world.event(|scheduler, effects| scheduler.submitted(&group, vec![chunk], effects));
    };
    (0..2).for_each(|_| large(&mut world));
    assert_eq!(world.orders(), [2, 0]);
    world.time(4);
    assert_eq!(world.orders(), [2, 0], "4 MiB take 40 ms");
    world.time(60);
    assert_eq!(world.orders().iter().sum::<usize>(), 2);
    assert_ne!(world.orders(), [2, 0], "it was stopped");
}

#[test]
fn driver_checks_quiet_orders_that_a_worker_gets_when_its_initializer_has_ended() {
    let mut world = World::new(0);
    world.act(Act::Resize(1, 1));
    world.finish();
    let generation = world.mocks[0].as_ref().unwrap().generation;
    world.scheduler.seats.worker(0).unwrap().phase = Phase::Beginning;
    world.submit_many(8, MS);
    assert_eq!(world.orders()[0], 0);
    world.act(Act::Sleep);
    world.time(0);
    world.event(|scheduler, effects| scheduler.initialized(0, generation, Ok(()), effects));
    assert!(!world.scheduler.seats.index_mut().quiet.is_empty(), "{:?}", world.orders());
    assert!(world.scheduler.is_quiet_check_planned);
    world.finish();
}

#[test]
fn worker_that_dies_on_its_way_out_was_not_recycled() {
    for (status, totals) in [(9, (0, 1)), (0, (1, 0)), (1 << 8, (0, 1))] {
        let mut world = World::new(0);
        world.event(|scheduler, effects| scheduler.retire(0, effects));
        let mock = world.mocks[0].take().unwrap();
        let status = Ok(ExitStatus::from_raw(status));
        world.event(|scheduler, effects| {
            scheduler.exited(0, mock.generation, &status, Circumstances::default(), effects);
        });
        assert_eq!((world.scheduler.totals.recycled, world.scheduler.totals.restarted), totals);
    }
}

#[test]
fn quiet_workers_stay_quiet_while_results_come() {
    let mut world = World::new(0);
    world.submit_many(7, MS / 2);
    let quiet = |world: &World| {
        let running = world.scheduler.seats.workers().flat_map(|(_, worker)| &worker.running);
        running.filter(|running| running.is_quiet).count()
    };
    world.act(Act::Sleep);
    let before = quiet(&world);
    assert!(before > 2, "{before}");
    let step = |world: &mut World| world.mocks[0].as_mut().is_some_and(MockWorker::step);
    assert!(step(&mut world) && step(&mut world) && step(&mut world));
    world.time(3);
    assert!(quiet(&world) + 1 >= before, "a result has come");
    world.time(3);
    assert_eq!(quiet(&world), 0, "nothing has come since");
    world.finish();
}

#[test]
fn call_with_long_items_gets_its_part_of_the_workers_of_a_quick_one_and_no_more() {
    let mut world = World::of(0, Config { workers: 4..=4, grace: MS, ..Config::default() });
    // It has orders ahead everywhere, so that no worker becomes idle by itself.
    world.submit_many(4000, MS);
    world.submit_many(40, 10_000 * MS);
    let [quick, slow] = [0, 1].map(|at| world.asked[at].group.clone());
    let has = |world: &World, group: &Arc<CallItems>| {
        let is_its = |worker: &Worker| worker.running.front().is_some_and(|front| Arc::ptr_eq(&front.group, group));
        world.scheduler.seats.workers().filter(|(_, worker)| is_its(worker)).count()
    };
    let (mut vacated, mut before) = (0, 0);
    for _ in 0..300 {
        world.time(1);
        for seat in 0..4 {
            let front = world.scheduler.seats.get(seat).and_then(|worker| worker.running.front());
            // Long items do not come to their end here.
            let is_long = front.is_some_and(|front| Arc::ptr_eq(&front.group, &slow));
            let worker = world.mocks[seat].as_mut().unwrap();
            let has_begun = worker.order.as_ref().is_some_and(|(_, at_work)| *at_work > 0);
            if !(is_long && has_begun) {
                worker.step();
            }
            world.act(Act::Collect);
            let now = world.scheduler.seats.workers().filter(|(_, worker)| worker.is_vacating).count();
            vacated += now.saturating_sub(before);
            before = now;
        }
    }
    assert_eq!((has(&world, &slow), has(&world, &quick)), (2, 2), "{:?}", world.orders());
    assert!((1..=2).contains(&vacated), "a worker was vacated {vacated} times");
}

#[test]
fn worker_that_has_all_its_orders_gives_those_back_that_it_has_not_begun() {
    let config = Config { workers: 2..=2, grace: MS, max_tasks_per_worker: Some(4), ..Config::default() };
    let mut world = World::of(0, config);
    world.submit(8, 4, false, Options { is_many: true, ..Options::default() });
    (0..2).for_each(|seat| world.start(seat));
    world.act(Act::Apply);
    let taken_back = world.pending(0);
    assert_eq!(taken_back, 3, "one of them goes on with its item only");
}

#[test]
fn caller_that_was_not_woken_still_counts_when_another_got_results_of_several_workers() {
    let mut world = World::of(0, Config { workers: 3..=3, grace: MS, ..Config::default() });
    world.submit(3, 1, false, Options { is_many: true, ..Options::default() });
    let group = world.asked[0].group.clone();
    assert_eq!(world.orders(), [1, 1, 1]);
    (0..2).for_each(|seat| world.run_worker(seat));
    world.act(Act::Apply);
    // Its waker is left there.
    assert!(group.take_done_or_wait(&std::task::Context::from_waker(std::task::Waker::noop())).is_none());
    let is_another_out = world.event(|scheduler, effects| scheduler.results_arrived(effects));
    assert!(is_another_out, "the other caller is to have the alarm armed");
    world.finish();
}

#[test]
fn order_that_is_over_is_not_taken_back_as_unsent() {
    let mut world = World::new(0);
    world.act(Act::Apply);
    let (_, worker) = world.scheduler.seats.workers().find(|(_, worker)| worker.given == 1).unwrap();
    let (side_orders, number) = (worker.side_orders.clone(), worker.running[0].number);
    // The same row of the table.
    let unsent =
        Unsent { number: number.wrapping_add(lane::AHEAD), error: Error::other("it is too large"), is_final: false };
    world.event(|scheduler, effects| scheduler.not_sent(&side_orders, &unsent, effects));
    assert_eq!(world.scheduler.out, 1);
    world.run_worker(0);
    world.act(Act::Collect);
    assert_eq!(world.scheduler.out, 0, "{}", world.unsettled());
}

#[test]
fn cancelled_items_that_never_started_do_not_count_as_given() {
    let mut world = World::new(0);
    world.act(Act::Chunk);
    world.act(Act::Cancel);
    assert!(world.scheduler.seats.workers().all(|(_, worker)| worker.given == 0));
}

#[test]
fn items_of_an_unsent_order_do_not_count_as_given() {
    let mut world = World::new(0);
    world.act(Act::Apply);
    let (_, worker) = world.scheduler.seats.workers().find(|(_, worker)| worker.given == 1).unwrap();
    let (side_orders, number) = (worker.side_orders.clone(), worker.running[0].number);
    let unsent = Unsent { number, error: Error::other("it is too large"), is_final: false };
    world.event(|scheduler, effects| scheduler.not_sent(&side_orders, &unsent, effects));
    assert!(world.scheduler.seats.workers().all(|(_, worker)| worker.given == 0));
    assert_eq!(world.scheduler.out, 0);
}

#[test]
fn short_sequences_of_events_settle_every_item_once_in_every_order() {
    let acts = [
        Act::Deadline,
        Act::Brief,
        Act::Many,
        Act::Step(0),
        Act::Collect,
        Act::Die(0),
        Act::Time(3),
        Act::Cancel,
        Act::Checkout,
    ];
    // A call first, else nothing happens.
    for first in [Act::Apply, Act::Chunk, Act::Many] {
        for sequence in 0..acts.len().pow(3) {
            let at = |digit: u32| acts[sequence / acts.len().pow(digit) % acts.len()];
            run(0, [first, at(0), at(1), at(2)].into_iter());
        }
    }
}

#[test]
fn long_random_sequences_of_events_settle_every_item_once() {
    let mut random = 1u64;
    let mut next = move |most: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as usize % most
    };
    for round in 0..200 {
        let len = 20 + next(150);
        let mut acts = Vec::new();
        for _ in 0..len {
            let seat = next(SEATS);
            acts.push(match next(34) {
                0 | 1 => Act::Apply,
                2 => Act::Deadline,
                3 | 4 => Act::Brief,
                5 | 6 => Act::Chunk,
                7 => Act::Retry,
                8..=17 => Act::Step(seat),
                18..=21 => Act::Collect,
                22 => Act::Die(seat),
                23 => Act::Time(1),
                24 => Act::Time(next(30) as u32),
                25 => Act::Cancel,
                26 => Act::Checkout,
                27 => Act::CallCheckout,
                28 => Act::Release,
                29 => Act::Resize(next(2), 1 + seat),
                30 => Act::Sleep,
                32 | 33 => Act::Many,
                _ => Act::Step(seat),
            });
        }
        match next(6) {
            0 => acts.push(Act::Shut),
            1 => acts.push(Act::Terminate),
            _ => {}
        }
        run(round % 2 * SEATS, acts.into_iter());
    }
}
