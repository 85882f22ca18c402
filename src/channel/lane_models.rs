//! A lane in every schedule: rings for one writer and one reader, and the right to start each item, by processes that die.

use super::lane::{Claim, claimable, take_back};
use super::result_notification::{NotifyTarget, ResultNotifier};
use super::segment::Bytes;
use super::spsc::{Reader, Words, Writer, first};
use crate::shm::atomic::AtomicU64;
use crate::shm::region::{Plain, explore, play};
use loom::thread;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

/// Bytes in units of 4, as no two records share one.
#[derive(Clone)]
pub(super) struct Units(Arc<Vec<Plain<[u8; 4]>>>);

impl Units {
    fn new(len: u32) -> Self {
        Self(Arc::new((0..len / 4).map(|_| Plain::new([0; 4])).collect()))
    }
}

impl Bytes for Units {
    fn write(&self, at: usize, from: &[u8]) {
        assert!(at.is_multiple_of(4) && from.len().is_multiple_of(4));
        for (unit, bytes) in self.0[at / 4..].iter().zip(from.chunks_exact(4)) {
            unit.change(|unit| unit.copy_from_slice(bytes));
        }
    }
    fn word(&self, _: usize) -> u64 {
        0
    }
    fn read(&self, at: usize, len: usize, to: &mut Vec<u8>) {
        assert!(at.is_multiple_of(4) && len.is_multiple_of(4));
        self.0[at / 4..][..len / 4].iter().for_each(|unit| to.extend_from_slice(&unit.read()));
    }
}

/// A ring and its two words.
pub(super) struct Ring {
    units: Units,
    size: u32,
    words: [AtomicU64; 2],
}

impl Ring {
    pub(super) fn new(size: u32) -> Self {
        Self { units: Units::new(size), size, words: [AtomicU64::new(0), AtomicU64::new(0)] }
    }
    pub(super) fn words(&self) -> Words<'_> {
        Words { tail: &self.words[0], head: &self.words[1] }
    }
    pub(super) fn writer(&self) -> Writer<Units> {
        Writer::new(self.units.clone(), self.size)
    }
    pub(super) fn reader(&self) -> Reader<Units> {
        Reader::new(self.units.clone(), self.size)
    }
    pub(super) fn put(&self, writer: &mut Writer<Units>, n: u8) -> bool {
        writer.push(self.words(), 0, [&[n; 4], &[]])
    }
    pub(super) fn take(&self, reader: &mut Reader<Units>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let count = reader.take_all(self.words(), &mut bytes).expect("whole records");
        let numbers = numbers(&bytes);
        assert_eq!(numbers.len(), count as usize);
        numbers
    }
}

fn numbers(mut bytes: &[u8]) -> Vec<u8> {
    std::iter::from_fn(|| {
        let (_, payload, len) = first(bytes)?;
        assert!(payload.len() == 4 && payload.iter().all(|byte| *byte == payload[0]), "a torn record: {payload:?}");
        bytes = &bytes[len..];
        Some(payload[0])
    })
    .collect()
}

/// Three records through a ring that has room for two.
fn ring(what: &str, writer_dies: Option<&'static str>, reader_dies: Option<&'static str>) {
    explore(what, 3, move || {
        let ring = Arc::new(Ring::new(16));
        let writing = thread::spawn({
            let ring = ring.clone();
            move || {
                let (mut writer, mut put) = (ring.writer(), 0);
                let lives = play(1, writer_dies, || {
                    for n in 1..=3 {
                        if ring.put(&mut writer, n) { put = n } else { break }
                    }
                });
                (put, lives.is_some())
            }
        });
        let (mut reader, mut got) = (ring.reader(), Vec::new());
        let reads = play(2, reader_dies, || (0..2).for_each(|_| got.extend(ring.take(&mut reader))));
        let (put, writes) = writing.join().unwrap();
        // A reader killed before it has moved the head has taken nothing: the next reader finds all of it.
        got.extend(ring.take(&mut reader));
        assert_eq!(got, (1..=got.len() as u8).collect::<Vec<_>>());
        let extra = got.len() - usize::from(put);
        assert!(extra == 0 || extra == 1 && !writes, "{got:?} of {put}");
        assert!(reads.is_some() || reader_dies.is_some());
    });
}

#[test]
fn models_of_a_lane_a_ring_of_records() {
    ring("a lane's ring", None, None);
    for at in ["lane.written", "lane.published"] {
        ring(at, Some(at), None);
    }
    ring("lane.read", None, Some("lane.read"));
}

const ITEMS: usize = 3;

/// A pool that never sleeps.
struct Nobody(AtomicU64);

impl NotifyTarget for Nobody {
    fn mark(&self) -> (&AtomicU64, u64) {
        (&self.0, 1)
    }
    fn may_sleep(&self) -> bool {
        false
    }
    fn wake(&self) {}
}

/// The pool gives an order, takes back what has not begun, and collects; the worker may die at any step.
fn claims(what: &str, dies: Option<&'static str>, keep: u32) {
    explore(what, 3, move || {
        let (orders, results) = (Arc::new(Ring::new(16)), Arc::new(Ring::new(32)));
        let claim = Arc::new(AtomicU64::new(0));
        let working = thread::spawn({
            let (orders, results, claim) = (orders.clone(), results.clone(), claim.clone());
            move || {
                let (reader, mut writer) = (orders.reader(), results.writer());
                play(1, dies, || {
                    let mut bytes = Vec::new();
                    let has_order = (0..2).any(|_| reader.peek(orders.words(), &mut bytes).unwrap().is_some());
                    if !has_order {
                        return false;
                    }
                    let (notifier, nobody) = (ResultNotifier::default(), Nobody(AtomicU64::new(0)));
                    while let Some(item) = notifier.start(&claim, &nobody, || false) {
                        assert!(results.put(&mut writer, item as u8), "there is room for all");
                    }
                    true
                })
            }
        });
        let (mut writer, mut reader) = (orders.writer(), results.reader());
        claim.store(claimable(0, ITEMS), Relaxed);
        assert!(orders.put(&mut writer, 9));
        let Claim { end, .. } = take_back(&claim, keep);
        let mut done = results.take(&mut reader);
        let worked = working.join().unwrap();
        done.extend(results.take(&mut reader));
        let Claim { started, end: at_last } = Claim::of(claim.load(Acquire));
        assert_eq!(end, at_last, "nobody else moves the end");
        assert!(started <= end && end >= keep.min(ITEMS as u32));
        assert_eq!(done, (0..done.len() as u8).collect::<Vec<_>>(), "in the order of starts");
        // Items taken back are not among them, and only the item of a dead worker is lost.
        let lost = started as usize - done.len();
        match worked {
            Some(true) => assert!(lost == 0 && started == end, "{started} of {end}"),
            Some(false) => assert_eq!((started, done.len()), (0, 0)),
            None => assert!(lost <= 1 && (dies != Some("lane.published") || lost == 0), "{lost} lost"),
        }
    });
}

#[test]
fn models_of_a_lane_an_item_is_started_or_taken_back() {
    for keep in [0, 2] {
        claims("claims", None, keep);
        for at in ["lane.started", "lane.written", "lane.published"] {
            claims(at, Some(at), keep);
        }
    }
}
