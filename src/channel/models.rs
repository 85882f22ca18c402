//! RobustLock and ring in every schedule, on memory where an unsynchronised access is an error, by processes that die.

use super::ring::{Pop, Push, Ring};
use crate::os::fault;
use crate::shm::atomic::AtomicU64;
use crate::shm::region::{Members, Plain, Region, explore, play};
use crate::shm::robust_lock::RobustLock;
use crate::wire::Payload;
use loom::thread;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

struct Guarded {
    word: AtomicU64,
    /// The data that the lock guards.
    value: Plain<u64>,
    requests: AtomicU64,
}

impl Guarded {
    /// One turn at the lock; false if it was busy and a wake has been asked for.
    fn work(&self) -> bool {
        let robust_lock = RobustLock(&self.word);
        loop {
            if robust_lock.try_take(Members.me().unwrap(), &Members).is_some() {
                fault::point("taken");
                self.value.change(|value| *value += 1);
                fault::point("changed");
                let requests = robust_lock.release();
                fault::point("released");
                if requests {
                    self.requests.fetch_add(1, AcqRel);
                }
                return true;
            }
            if robust_lock.contend() {
                return false;
            }
        }
    }
}

fn lock(what: &str, dies_at: Option<&'static str>) {
    explore(what, 3, move || {
        let guarded = Arc::new(Guarded { word: AtomicU64::new(0), value: Plain::new(0), requests: AtomicU64::new(0) });
        let other = thread::spawn({
            let guarded = guarded.clone();
            move || play(1, dies_at, || guarded.work())
        });
        let third = thread::spawn({
            let guarded = guarded.clone();
            move || play(2, None, || guarded.work()).unwrap()
        });
        let mine = play(3, None, || guarded.work()).unwrap();
        let (other, third) = (other.join().unwrap(), third.join().unwrap());
        // A refused process is woken: by a release, or by the recovery, or it finds the lock taken from the dead.
        if [other == Some(false), !third, !mine].contains(&true) {
            let held = guarded.word.load(Acquire) != 0;
            assert!(guarded.requests.load(Acquire) > 0 || other.is_none(), "nobody wakes the refused process");
            assert!(!held || other.is_none(), "held by nobody");
        }
        assert!(play(3, None, || guarded.work()).unwrap(), "free, or taken from the dead");
    });
}

#[test]
fn models_robust_lock_has_one_holder_and_wakes_refused_processes() {
    lock("lock", None);
    for at in ["taken", "changed", "released"] {
        lock(at, Some(at));
    }
}

fn ring(region: &Arc<Region>) -> Ring {
    Ring::of_model(region.clone()).unwrap()
}

/// The memory of payloads of this length is given back piece by piece.
const DISCARDED: usize = 14 * 8;

fn push(ring: &Ring, n: u8, len: usize) -> Option<Push> {
    let mut bytes = vec![n; len];
    let mut payload = if len == DISCARDED { Payload::Discardable(&mut bytes) } else { Payload::Borrowed(&bytes) };
    let pushed = ring.push(&mut payload, 0, |_| Ok(true)).0.unwrap();
    (pushed != Push::Busy).then_some(pushed)
}

/// `None` if somebody else is taking.
fn pop(ring: &Ring) -> Option<Result<u8, Pop>> {
    let popped = ring.pop(|_| (Vec::<u8>::new(), false), |_, _| Ok(Vec::new()), |_| ()).0.unwrap();
    if ring.take_idle() {
        // In a real queue this happens some time later.
        let _ = ring.give_back_kept();
    }
    match popped {
        Pop::Got(bytes, _) => {
            assert!(bytes.iter().all(|byte| *byte == bytes[0]) && bytes.len() >= 8, "a torn record: {bytes:?}");
            Some(Ok(bytes[0]))
        }
        Pop::Busy => None,
        end => Some(Err(end)),
    }
}

fn drain(ring: &Ring) -> Vec<u8> {
    std::iter::from_fn(|| pop(ring).expect("nobody else is here").ok()).collect()
}

/// A putter of two records and a consumer that tries twice, either of which may die; then a third process goes on.
/// Records of `long` units do not fit beside each other into the base segment: the chain grows.
fn pair(what: &str, preemptions: usize, long: usize, putter: Option<&'static str>, taker: Option<&'static str>) {
    explore(what, preemptions, move || {
        let region = Ring::create_model().unwrap();
        let (puts, takes) = (ring(&region), ring(&region));
        let taking = thread::spawn(move || {
            let mut got = Vec::new();
            let is_alive = play(1, taker, || {
                for _ in 0..2 {
                    assert!(takes.len().unwrap() <= 3);
                    got.extend(pop(&takes).into_iter().flatten());
                }
            })
            .is_some();
            (got, is_alive)
        });
        let mut put = 0;
        let put_all = play(2, putter, || {
            for n in 1..=2 {
                // Busy only for a consumer that gives a segment back, for a moment.
                if push(&puts, n, long * 8) == Some(Push::Done) { put = n } else { break }
            }
        });
        let (mut got, taker_lives) = taking.join().unwrap();
        let third = ring(&region);
        play(3, None, || {
            // The victim's own record is there, or not.
            let ours = u64::from(push(&third, 3, 8) == Some(Push::Done));
            assert_eq!(ours, 1);
            let len = third.len().unwrap();
            let rest = drain(&third);
            assert_eq!(rest.len(), len, "the length is exact");
            got.extend(rest);
            assert_eq!(got.last(), Some(&3));
            got.pop();
            let is_whole = |got: &[u8]| got.len() >= usize::from(put) && got.len() <= usize::from(put) + 1;
            let in_order = |got: &[u8]| got.windows(2).all(|pair| pair[0] < pair[1]);
            assert!(in_order(&got), "{got:?}");
            match (put_all, taker_lives) {
                (Some(()), true) => assert_eq!(got, (1..=put).collect::<Vec<_>>()),
                (None, _) => assert!(is_whole(&got), "put {put}, got {got:?}"),
                // A process that dies after its commit takes its own record along.
                (_, false) => assert!(got.len() + 1 >= usize::from(put), "put {put}, got {got:?}"),
            }
            assert_eq!(third.len().unwrap(), 0);
            third.check_that_nothing_is_lost();
        });
    });
}

#[test]
fn models_ring_with_one_segment_loses_no_record_at_any_death() {
    pair("one segment", 2, 1, None, None);
    for at in ["put.taken", "put.written", "put.published", "put.released"] {
        pair(at, 2, 1, Some(at), None);
    }
    for at in ["get.taken", "get.read", "get.consumed", "get.released"] {
        pair(at, 2, 1, None, Some(at));
    }
}

#[test]
fn models_growing_ring_loses_no_record_at_any_death() {
    pair("growing", 2, 3, None, None);
    for at in ["grow.begun", "grow.linked", "put.written"] {
        pair(&format!("growing, {at}"), 2, 3, Some(at), None);
    }
    for at in ["leave.moved", "get.consumed"] {
        pair(&format!("growing, {at}"), 2, 3, None, Some(at));
    }
}

#[test]
fn models_ring_that_gives_a_large_segment_back_loses_no_record() {
    pair("large", 1, 15, None, None);
    for at in ["grow.begun", "grow.linked"] {
        pair(&format!("large, putter {at}"), 1, 15, Some(at), None);
        pair(&format!("large, taker {at}"), 1, 15, None, Some(at));
    }
}

#[test]
fn models_ring_of_discardable_payloads_loses_no_record() {
    let long = DISCARDED / 8;
    pair("discarding", 1, long, None, None);
    for at in ["put.piece", "put.written", "grow.begun", "grow.linked", "put.published"] {
        pair(&format!("discarding, {at}"), 1, long, Some(at), None);
    }
    pair("discarding, get.consumed", 1, long, None, Some("get.consumed"));
}

#[test]
fn models_two_putters_and_a_close() {
    explore("two putters and a close", 2, || {
        let region = Ring::create_model().unwrap();
        let (one, two, closer) = (ring(&region), ring(&region), ring(&region));
        let putting = thread::spawn(move || play(1, None, || push(&one, 1, 8) == Some(Push::Done)).unwrap());
        let closing = thread::spawn(move || {
            play(2, None, || {
                while !closer.try_close().unwrap() {
                    thread::yield_now()
                }
            })
            .unwrap()
        });
        let mine = play(3, None, || push(&two, 2, 8) == Some(Push::Done)).unwrap();
        let theirs = putting.join().unwrap();
        closing.join().unwrap();
        play(3, None, || {
            assert_eq!(two.len().unwrap(), usize::from(mine) + usize::from(theirs));
            assert_eq!(push(&two, 3, 8), Some(Push::Closed));
            assert_eq!(drain(&two).len(), usize::from(mine) + usize::from(theirs));
            assert!(matches!(pop(&two), Some(Err(Pop::Closed))));
        });
    });
}

/// The base holds two records of two units: putting goes on only in the room that taking gives back.
#[test]
fn models_ring_that_wraps_around_loses_no_record() {
    explore("wrapping around", 2, || {
        let region = Ring::create_model_of(2).unwrap();
        let (puts, takes) = (ring(&region), ring(&region));
        play(0, None, || {
            for n in 1..=2 {
                assert_eq!(push(&puts, n, 8), Some(Push::Done));
            }
        });
        let taking = thread::spawn(move || {
            play(1, None, || (0..2).filter_map(|_| pop(&takes)).flatten().collect::<Vec<_>>()).unwrap()
        });
        let mut put =
            play(2, None, || (3..=4).filter(|n| push(&puts, *n, 8) == Some(Push::Done)).collect::<Vec<_>>()).unwrap();
        let mut got = taking.join().unwrap();
        got.extend(play(2, None, || drain(&puts)).unwrap());
        put.splice(0..0, [1, 2]);
        assert_eq!(got, put);
    });
}
