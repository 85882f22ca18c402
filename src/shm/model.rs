//! A region for models: heap memory of the model checker, where every unsynchronised access is an error, and processes
//! that are threads and die at named points.

use super::family::Member;
use crate::os::fault::{DIES_AT, Death};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{self, fence};
use std::cell::Cell;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering::{self, *};
use std::sync::{Arc, Mutex};

pub(crate) const PAGE: u64 = 8;
/// The head of an extent; of its bytes only the first words exist.
const HEAD: usize = 4096;
const HEAD_WORDS: usize = 33;
const REGION_WORDS: usize = 512;

fn zeros(len: usize) -> Vec<AtomicU64> {
    (0..len).map(|_| AtomicU64::new(0)).collect()
}

/// An atomic whose every access is a point where another process may come first. Loom alone remembers only the last
/// access to an atomic, and so overlooks that a store comes after another thread's load if a load of its own is between.
pub(crate) struct AtomicU64 {
    value: atomic::AtomicU64,
    /// Changed in passing by each access, without ordering anything.
    turn: atomic::AtomicU64,
}

impl AtomicU64 {
    pub(crate) fn new(value: u64) -> Self {
        Self { value: atomic::AtomicU64::new(value), turn: atomic::AtomicU64::new(0) }
    }

    fn value(&self) -> &atomic::AtomicU64 {
        self.turn.fetch_add(1, Relaxed);
        &self.value
    }

    pub(crate) fn load(&self, order: Ordering) -> u64 {
        self.value().load(order)
    }

    pub(crate) fn store(&self, value: u64, order: Ordering) {
        self.value().store(value, order);
    }

    pub(crate) fn swap(&self, value: u64, order: Ordering) -> u64 {
        self.value().swap(value, order)
    }

    pub(crate) fn compare_exchange(&self, old: u64, new: u64, yes: Ordering, no: Ordering) -> Result<u64, u64> {
        self.value().compare_exchange(old, new, yes, no)
    }

    pub(crate) fn fetch_update(
        &self,
        yes: Ordering,
        no: Ordering,
        change: impl FnMut(u64) -> Option<u64>,
    ) -> Result<u64, u64> {
        self.value().fetch_update(yes, no, change)
    }

    pub(crate) fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        self.value().fetch_add(value, order)
    }

    pub(crate) fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
        self.value().fetch_or(value, order)
    }

    pub(crate) fn fetch_and(&self, value: u64, order: Ordering) -> u64 {
        self.value().fetch_and(value, order)
    }
}

/// Plain memory: loom reports every access that is not ordered with the others.
pub(crate) struct Plain<T>(UnsafeCell<T>);

// SAFETY: an unordered access ends the model, with a report.
unsafe impl<T: Send> Send for Plain<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Plain<T> {}

impl<T: Copy> Plain<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    pub(crate) fn read(&self) -> T {
        // SAFETY: as above; nothing refers to it, it is copied.
        self.0.with(|value| unsafe { *value })
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut T)) {
        // SAFETY: as above; `change` calls nothing of the model.
        self.0.with_mut(|value| change(unsafe { &mut *value }));
    }
}

/// An extent: words at its head, then bytes, in units of 8 as they are never shared by two records.
pub(crate) struct Map {
    words: Vec<AtomicU64>,
    units: Vec<Plain<[u8; 8]>>,
    len: u64,
}

impl Map {
    fn of(len: u64) -> Arc<Self> {
        let units = (0..(len as usize - HEAD) / 8).map(|_| Plain::new([0; 8])).collect();
        Arc::new(Self { words: zeros(HEAD_WORDS), units, len })
    }

    pub(crate) fn populate(&self) {}

    pub(crate) fn populate_part(&self, _at: usize, _len: usize) {}

    pub(crate) fn forget_part(&self, _at: usize, _len: usize) {}

    fn unit(&self, at: usize) -> &Plain<[u8; 8]> {
        &self.units[(at - HEAD) / 8]
    }
}

pub(crate) fn words(map: &Map) -> &[AtomicU64] {
    &map.words
}

pub(crate) fn copy_in(map: &Map, at: usize, from: &[u8]) {
    for (n, bytes) in from.chunks(8).enumerate() {
        map.unit(at + 8 * n).change(|unit| unit[..bytes.len()].copy_from_slice(bytes));
    }
}

pub(crate) fn word(map: &Map, at: usize) -> u64 {
    u64::from_ne_bytes(map.unit(at).read())
}

pub(crate) fn append(map: &Map, at: usize, len: usize, to: &mut Vec<u8>) {
    for n in (0..len).step_by(8) {
        to.extend(&map.unit(at + n).read()[..8.min(len - n)]);
    }
}

pub(crate) struct Region {
    words: Vec<AtomicU64>,
    extents: Mutex<HashMap<u64, Arc<Map>>>,
}

impl Region {
    pub(crate) fn create(_name: &str, head_len: usize, len: u64) -> io::Result<Self> {
        let base = head_len as u64;
        let extents = Mutex::new(HashMap::from([(base, Map::of(len - base))]));
        Ok(Self { words: zeros(REGION_WORDS), extents })
    }

    pub(crate) fn create_with(name: &str, first: &[AtomicU64], head_len: usize, len: u64) -> io::Result<Self> {
        let region = Self::create(name, head_len, len)?;
        region.words.iter().zip(first).for_each(|(word, first)| word.store(first.load(Relaxed), Relaxed));
        Ok(region)
    }

    pub(crate) fn open(_fd: OwnedFd, _head_len: usize) -> io::Result<Self> {
        unimplemented!("a model has no descriptors")
    }

    pub(crate) fn fd(&self) -> &Arc<OwnedFd> {
        unimplemented!("a model has no descriptors")
    }

    pub(crate) fn identity(&self) -> (u64, u64) {
        (0, 0)
    }

    pub(crate) fn words(&self) -> &[AtomicU64] {
        &self.words
    }

    pub(crate) fn extent(&self, offset: u64, len: u64) -> io::Result<Arc<Map>> {
        let map = self.extents.lock().unwrap()[&offset].clone();
        assert_eq!(map.len, len, "an extent keeps its size");
        Ok(map)
    }

    /// A model has memory from the start.
    pub(crate) fn reserve(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn reserve_around(&self, offset: u64, len: u64, _skip: u64, _later: u64) -> io::Result<()> {
        self.extents.lock().unwrap().entry(offset).or_insert_with(|| Map::of(len));
        Ok(())
    }

    /// Zeros the memory, which is a race with every other use of it.
    pub(crate) fn give_back(&self, offset: u64, skip: u64, len: u64) -> io::Result<()> {
        let Some(map) = self.extents.lock().unwrap().get(&offset).cloned() else { return Ok(()) };
        if skip == 0 {
            map.words.iter().for_each(|word| word.store(0, Relaxed));
        }
        (HEAD..map.len as usize)
            .step_by(8)
            .take(len as usize / 8)
            .for_each(|at| map.unit(at).change(|unit| *unit = [0; 8]));
        Ok(())
    }
}

/// The members of a model, in place of the family's table.
pub(crate) struct Members;

loom::lazy_static! {
    static ref DEAD: Vec<AtomicU64> = zeros(4);
}

loom::thread_local! {
    static SLOT: Cell<u16> = Cell::new(0);
}

impl Members {
    pub(crate) fn get() -> io::Result<&'static Self> {
        Ok(&Self)
    }

    pub(crate) fn me(&self) -> io::Result<Member> {
        Ok(Member { slot: SLOT.with(Cell::get), epoch: 1 })
    }

    pub(crate) fn me_if_listed(&self) -> Option<Member> {
        self.me().ok()
    }

    pub(crate) fn is_listed(&self, member: Member) -> bool {
        DEAD[member.slot as usize].load(Acquire) == 0
    }

    pub(crate) fn is_alive(&self, member: Member) -> bool {
        self.is_listed(member)
    }
}

/// Plays process `slot` until it is done or gets to the point where it dies, and is recovered. `None` if it died.
pub(crate) fn play<T>(slot: u16, dies_at: Option<&'static str>, part: impl FnOnce() -> T) -> Option<T> {
    SLOT.with(|own| own.set(slot));
    DIES_AT.with(|at| at.set(dies_at));
    let played = catch_unwind(AssertUnwindSafe(part));
    DIES_AT.with(|at| at.set(None));
    match played {
        Ok(value) => Some(value),
        Err(death) if death.is::<Death>() => {
            DEAD[slot as usize].store(1, Release);
            fence(SeqCst);
            None
        }
        Err(panic) => resume_unwind(panic),
    }
}

/// `cargo test -p multiprocess-models models` runs them all.
///
/// Runs `model` in every schedule with at most `preemptions` of them, and prints how many those were.
#[cfg(test)]
pub(crate) fn explore(what: &str, preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    static ALL: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let schedules = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = schedules.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
    builder.max_branches = 20_000;
    builder.check(move || {
        counted.fetch_add(1, Relaxed);
        model();
    });
    let schedules = schedules.load(Relaxed);
    println!("{what}: {schedules} schedules, {} so far", ALL.fetch_add(schedules, Relaxed) + schedules);
}

/// The head of a region in a process that only reads it. Models have none.
pub(crate) struct ReadOnly(Region);

impl ReadOnly {
    pub(crate) fn open(fd: OwnedFd, len: usize) -> io::Result<Self> {
        Region::open(fd, len).map(Self)
    }

    pub(crate) fn load(&self, at: usize) -> u64 {
        self.0.words()[at].load(SeqCst)
    }
}
