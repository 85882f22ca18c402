//! The notifications of a worker, and the checks of a pool before it sleeps, in every schedule: no result stays unnoticed.

use super::lane::{claimable, take_back};
use super::lane_models::Ring;
use super::result_notification::{NotifyTarget, Pace, ResultNotifier, enable_notification, take_marks, will_notify};
use crate::shm::atomic::{AtomicU64, fence};
use crate::shm::family::Member;
use crate::shm::region::{Members, explore, play};
use crate::wait::sleepers::{LEN, Sleeper, Sleepers, Wake};
use loom::thread;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

const POOL: Member = Member { slot: 0, epoch: 1 };
const WORKER: Member = Member { slot: 1, epoch: 1 };

struct World {
    orders: Ring,
    results: Ring,
    claims: [AtomicU64; 2],
    words: Vec<AtomicU64>,
    mark: AtomicU64,
    doorbell: AtomicU64,
}

impl NotifyTarget for World {
    fn mark(&self) -> (&AtomicU64, u64) {
        (&self.mark, 1)
    }

    fn may_sleep(&self) -> bool {
        self.event().has_sleepers_after_rmw()
    }

    fn wake(&self) {
        let is_listed = |sleeper: Sleeper| Members.is_listed(Member { slot: sleeper.slot, epoch: 1 });
        self.event().notify_one(Some(WORKER.into()), is_listed, |wake| {
            assert_eq!(wake, Wake::Sleeper(POOL.into()));
            self.doorbell.fetch_or(1, AcqRel);
        });
    }
}

impl World {
    fn new() -> Arc<Self> {
        let zero = || AtomicU64::new(0);
        let words = (0..LEN).map(|_| zero()).collect();
        let (orders, results) = (Ring::new(32), Ring::new(32));
        Arc::new(Self { orders, results, claims: [zero(), zero()], words, mark: zero(), doorbell: zero() })
    }

    fn event(&self) -> Sleepers<'_> {
        Sleepers::new(&self.words)
    }

    /// Runs a worker with two orders of many quiet items; in item `stuck` it stays for ever.
    fn work(&self, stuck: Option<u8>) {
        let (mut reader, mut writer, notifier) =
            (self.orders.reader(), self.results.writer(), ResultNotifier::default());
        let (mut bytes, mut item) = (Vec::new(), 0);
        for claim in &self.claims {
            notifier.notify_each();
            if !reader.has_any(self.orders.words()) {
                notifier.notify_pending(self);
            }
            while reader.peek(self.orders.words(), &mut bytes).unwrap().is_none() {
                thread::yield_now();
            }
            let has_untaken = || writer.under_way(self.results.words()) > 0;
            notifier.defer(Pace::Last, reader.has_more(self.orders.words()), has_untaken);
            while notifier.start(claim, self, || reader.has_more(self.orders.words())).is_some() {
                if stuck == Some(item) {
                    return;
                }
                assert!(self.results.put(&mut writer, item), "there is room for all");
                notifier.note_result();
                item += 1;
            }
            reader.consume(self.orders.words(), bytes.len());
        }
        notifier.notify_each();
        notifier.notify_pending(self);
    }
}

#[derive(Clone, Copy)]
struct Plan {
    items: [usize; 2],
    /// Where the worker dies, or in which item it stays.
    dies: Option<&'static str>,
    stuck: Option<u8>,
    /// Whether the pool gives its second order up, before it sleeps.
    takes_back: bool,
    /// Whether it looks again while it sleeps, and asks for a notification of each result then.
    enables: bool,
    /// Whether it gives its second order only after it went to sleep.
    gives_late: bool,
}

const PLAN: Plan =
    Plan { items: [1, 1], dies: None, stuck: None, takes_back: false, enables: false, gives_late: false };

fn act(what: &str, plan: Plan) {
    explore(what, 2, move || {
        let world = World::new();
        let working = thread::spawn({
            let world = world.clone();
            move || {
                let lives = play(WORKER.slot, plan.dies, || world.work(plan.stuck)).is_some();
                if !lives {
                    // Recovers the row, as the fork server does.
                    fence(SeqCst);
                    world.doorbell.fetch_or(1, AcqRel);
                }
                lives
            }
        });
        let (mut writer, mut reader) = (world.orders.writer(), world.results.reader());
        let mut give = |at: usize| {
            world.claims[at].store(claimable(0, plan.items[at]), Relaxed);
            assert!(world.orders.put(&mut writer, 9));
        };
        give(0);
        let mut last = &world.claims[0];
        if !plan.gives_late {
            give(1);
            last = &world.claims[1];
        }
        if plan.takes_back && take_back(last, 0).end == 0 {
            last = &world.claims[0];
        }
        // The pool goes to sleep.
        world.event().join(POOL.into(), 0, None, |_| true);
        let mut got = match will_notify(last) || take_marks(&world.mark) == 0 {
            true => Vec::new(),
            false => world.results.take(&mut reader),
        };
        if plan.gives_late {
            give(1);
        }
        if plan.enables {
            world.claims.iter().for_each(enable_notification);
            got.extend(world.results.take(&mut reader));
        }
        let lives = working.join().unwrap();
        let is_woken = world.doorbell.load(Acquire) != 0;
        let is_marked = take_marks(&world.mark) != 0;
        let late = world.results.take(&mut reader);
        assert!(is_woken || late.is_empty(), "asleep, and nobody tells of {late:?}");
        assert!(is_marked || late.is_empty() || !lives, "told, and looks past {late:?}");
        got.extend(late);
        assert_eq!(got, (0..got.len() as u8).collect::<Vec<_>>(), "each once");
        if lives && plan.stuck.is_none() && !plan.takes_back {
            assert_eq!(got.len(), plan.items.iter().sum::<usize>());
        }
    });
}

#[test]
fn models_of_result_notification_a_deferring_worker_notifies_when_its_last_order_begins() {
    act("result notification", PLAN);
    act("result notification, two items", Plan { items: [2, 1], ..PLAN });
}

#[test]
fn models_of_result_notification_a_worker_dies_with_pending_results() {
    for at in ["lane.started", "lane.written", "lane.published"] {
        act(at, Plan { dies: Some(at), ..PLAN });
    }
}

#[test]
fn models_of_result_notification_the_order_behind_is_taken_back() {
    act("result notification, taken back", Plan { takes_back: true, ..PLAN });
}

#[test]
fn models_of_result_notification_an_order_given_to_a_worker_at_its_last_is_begun_with_a_notice() {
    act("result notification, given late", Plan { gives_late: true, ..PLAN });
    act("result notification, given late, two items", Plan { items: [2, 1], gives_late: true, ..PLAN });
    let slow = Plan { items: [2, 1], stuck: Some(2), gives_late: true, ..PLAN };
    act("result notification, given late, and slow", slow);
    let slow = Plan { items: [2, 1], stuck: Some(1), gives_late: true, enables: true, ..PLAN };
    act("result notification, given late behind a slow item, enabled", slow);
}

#[test]
fn models_of_result_notification_enabled_by_the_pool_it_covers_items_before_a_slow_one() {
    act("result notification, enabled", Plan { enables: true, ..PLAN });
    act("result notification, a slow second item", Plan { items: [2, 1], stuck: Some(1), enables: true, ..PLAN });
    act("result notification, a slow last item", Plan { items: [1, 1], stuck: Some(1), ..PLAN });
}
