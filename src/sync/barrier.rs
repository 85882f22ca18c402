//! Barriers: nobody goes on before all have come, across processes.
//!
//! # State
//! [`PARTIES`] and [`TIMEOUT`], which never change. [`ROUND`]: `generation:31 | broken:1 | history:32`, where history
//! has a bit for each of the last 32 generations: whether it ended badly. A line. Then a place for each party, in the
//! order of arrival: `generation:31 | acting:1 | slot:12 | epoch:20` of the process that came.
//!
//! # Moves
//! | from -> to | who | ordering | wakes |
//! |---|---|---|---|
//! | the first place that is not of this generation -> mine | an arriving party | AcqRel CAS | - |
//! | the last place -> mine, acting | one that has something to do first | AcqRel CAS | - |
//! | ROUND (g, whole) -> (g + 1, whole), history good | any party that finds the last place taken; if acting, who acts | AcqRel CAS | all |
//! | ROUND (g, whole) -> (g, broken) | `abort`; a wait that ends early; whoever finds a party dead | AcqRel CAS | all |
//! | ROUND (g, any) -> (g + 1, whole), history bad | `reset`, if it is broken or anybody waits | AcqRel CAS | all |
//!
//! # Invariants
//! 1. Places are taken in order and never left, so those of this generation are a prefix: an index is had once.
//! 2. How a generation ended is decided by the one change of ROUND that ends or breaks it, for all its parties alike.
//! 3. A place is taken by who saw the round unchanged after reading it, so a party that is late for its generation
//!    displaces nobody of a later one.
//! 4. Who waited and was kept from looking while 32 generations came and went is told that it was broken, unless
//!    none of them was.
//!
//! # Death
//! | killed | survivors see |
//! |---|---|
//! | before it comes | a party that is missing: they wait, or time out |
//! | waiting, in its place | a place of an unlisted member: whoever looks breaks the barrier; its burial makes all look |
//! | in the last place, before ROUND | the last place taken: whoever looks ends the generation, well |
//! | acting | as waiting |
//! | after ROUND, before the wake | its burial rings every bell |
//!
//! # Cancel
//! A wait that is dropped, or times out, breaks its generation, unless that has ended already.

use super::debug::Report;
use super::object::{self, Core, FIRST};
use crate::error::{Error, ErrorKind, Result};
use crate::os::fault;
use crate::shm::atomic::AtomicU64;
use crate::shm::family::Family;
use crate::shm::mapped::Mapped;
use crate::shm::region::Region;
use crate::wait::event::{self, Event, Sleeper};
use crate::wait::{self, Line, until, until_blocking};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;
use std::time::{Duration, Instant};

const PARTIES: usize = FIRST;
const TIMEOUT: usize = PARTIES + 1;
const ROUND: usize = TIMEOUT + 1;
const LINE: usize = ROUND + 1;
const PLACES: usize = LINE + event::LEN;

/// The most parties: each has a word.
const MOST: usize = 1 << 20;

/// The word `ROUND`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Round(pub(super) u64);

/// How a generation stands, or ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    Open,
    Passed,
    Broken,
}

const GENERATIONS: u64 = 1 << 31;
const BROKEN: u64 = 1 << 32;

impl Round {
    /// Places begin as 0, which is of another generation.
    pub(super) const FIRST: Self = Self(1 << 33);

    fn generation(self) -> u64 {
        self.0 >> 33
    }

    fn is_broken(self) -> bool {
        self.0 & BROKEN != 0
    }

    fn broken(self) -> Self {
        Self(self.0 | BROKEN)
    }

    fn next(self, ended_badly: bool) -> Self {
        let generation = (self.generation() + 1) % GENERATIONS;
        Self(generation << 33 | (self.0 << 1 | u64::from(ended_badly)) & 0xffff_ffff)
    }

    fn outcome(self, generation: u64) -> Outcome {
        let since = self.generation().wrapping_sub(generation) % GENERATIONS;
        match since {
            0 if self.is_broken() => Outcome::Broken,
            0 => Outcome::Open,
            1..=32 if self.0 >> (since - 1) & 1 == 0 => Outcome::Passed,
            33.. if self.0 & 0xffff_ffff == 0 => Outcome::Passed,
            _ => Outcome::Broken,
        }
    }
}

/// A party's place.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place(u64);

impl Place {
    const ACTING: u64 = 1 << 32;

    fn of(generation: u64, sleeper: Sleeper, acting: bool) -> Self {
        Self(generation << 33 | if acting { Self::ACTING } else { 0 } | sleeper.to_bits())
    }

    fn is_of(self, generation: u64) -> bool {
        self.0 >> 33 == generation
    }

    fn is_acting(self) -> bool {
        self.0 & Self::ACTING != 0
    }

    fn sleeper(self) -> Sleeper {
        Sleeper::from_bits(self.0)
    }
}

/// What became of an arrival.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arrival {
    At {
        generation: u64,
        index: usize,
    },
    /// Not the last one, which it wanted to be.
    NotLast,
    /// All have come, and one still acts: the next generation is not open yet.
    Busy,
    Broken,
}

/// The rounds of a barrier, wherever their words are.
pub(super) struct Rounds<'a, L, T> {
    round: &'a AtomicU64,
    places: &'a [AtomicU64],
    is_listed: L,
    /// Wakes all who wait: called by whoever has changed the round.
    tell: T,
}

impl<'a, L: Fn(Sleeper) -> bool, T: Fn()> Rounds<'a, L, T> {
    pub(super) fn new(round: &'a AtomicU64, places: &'a [AtomicU64], is_listed: L, tell: T) -> Self {
        Self { round, places, is_listed, tell }
    }

    fn now(&self) -> Round {
        Round(self.round.load(Acquire))
    }

    fn place(&self, index: usize) -> Place {
        Place(self.places[index].load(Acquire))
    }

    /// How many have come in this generation. Those of it are a prefix.
    fn come(&self, generation: u64) -> usize {
        let (mut low, mut high) = (0, self.places.len());
        while low < high {
            let middle = (low + high) / 2;
            if self.place(middle).is_of(generation) { low = middle + 1 } else { high = middle }
        }
        low
    }

    /// Takes the next place. `acting`: if it is the last, the generation stays open until [`Rounds::end`].
    pub(super) fn arrive(&self, me: Sleeper, only_last: bool, acting: bool) -> Arrival {
        loop {
            let round = self.now();
            let generation = round.generation();
            match self.settle(generation) {
                Outcome::Open => {}
                Outcome::Broken if self.now().is_broken() => return Arrival::Broken,
                // A generation that ended before we came, however it did, was not ours.
                Outcome::Broken | Outcome::Passed => continue,
            }
            let index = self.come(generation);
            let Some(word) = self.places.get(index) else {
                match self.now() == round {
                    true => return Arrival::Busy,
                    false => continue,
                }
            };
            let is_last = index + 1 == self.places.len();
            if only_last && !is_last {
                return Arrival::NotLast;
            }
            let seen = word.load(Acquire);
            if self.now() != round {
                continue; // The place may be one of the next generation.
            }
            let mine = Place::of(generation, me, acting && is_last);
            let is_taken =
                Place(seen).is_of(generation) || word.compare_exchange(seen, mine.0, AcqRel, Acquire).is_err();
            if !is_taken {
                fault::point("barrier.arrived");
                return Arrival::At { generation, index };
            }
        }
    }

    /// How `generation` stands; ends it if all have come, breaks it if one of them is dead.
    pub(super) fn settle(&self, generation: u64) -> Outcome {
        let round = self.now();
        let outcome = round.outcome(generation);
        if outcome != Outcome::Open {
            return outcome;
        }
        let Some(last) = self.places.len().checked_sub(1).map(|last| self.place(last)) else { return Outcome::Broken };
        if last.is_of(generation) && !last.is_acting() {
            return self.end(generation, false);
        }
        let places = (0..self.places.len()).map(|index| self.place(index));
        let mut come = places.take_while(|place| place.is_of(generation));
        if come.any(|place| !(self.is_listed)(place.sleeper())) { self.end(generation, true) } else { Outcome::Open }
    }

    /// Ends `generation`, well or badly, unless it has ended; returns how it did.
    pub(super) fn end(&self, generation: u64, badly: bool) -> Outcome {
        let mut seen = self.now();
        while seen.outcome(generation) == Outcome::Open {
            let next = if badly { seen.broken() } else { seen.next(false) };
            match self.change(seen, next) {
                Ok(()) => seen = next,
                Err(now) => seen = now,
            }
        }
        seen.outcome(generation)
    }

    fn change(&self, seen: Round, next: Round) -> std::result::Result<(), Round> {
        self.round.compare_exchange(seen.0, next.0, AcqRel, Acquire).map_err(Round)?;
        fault::point("barrier.ended");
        (self.tell)();
        Ok(())
    }

    pub(super) fn abort(&self) {
        self.end(self.now().generation(), true);
    }

    /// Makes it whole, for a new generation, unless it is whole and nobody waits.
    pub(super) fn reset(&self) {
        let mut seen = self.now();
        while seen.is_broken() || self.come(seen.generation()) > 0 {
            match self.change(seen, seen.next(true)) {
                Ok(()) => return,
                Err(now) => seen = now,
            }
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        self.settle(self.now().generation()) == Outcome::Broken
    }

    pub(super) fn waiting(&self) -> usize {
        let generation = self.now().generation();
        if self.settle(generation) == Outcome::Open { self.come(generation) } else { 0 }
    }
}

/// A barrier as this process sees it.
pub(super) struct Gate {
    region: Arc<Region>,
    line: Arc<Line>,
    family: &'static Family,
}

static MAPPED: Mapped<Gate> = Mapped::new();

impl Core for Gate {
    const KIND: u64 = u64::from_le_bytes(*b"mpbarr01");
    const NAME: &'static str = "barrier";
    /// And one for each party.
    const WORDS: usize = PLACES;
    const IS_ALL_WORDS: bool = true;

    fn mapped() -> &'static Mapped<Self> {
        &MAPPED
    }

    fn region(&self) -> &Arc<Region> {
        &self.region
    }

    fn report(words: &[AtomicU64]) -> Report {
        Report { waiting: Event::new(&words[LINE..LINE + event::LEN]).sleepers(), ..Report::default() }
    }

    fn view(region: Arc<Region>) -> io::Result<Self> {
        let parties = region.words()[PARTIES].load(Acquire);
        if parties == 0 || parties > (region.words().len() - PLACES) as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a barrier of another shape"));
        }
        let line = Line::new(region.clone(), LINE, None)?;
        Ok(Self { region, line, family: Family::get()? })
    }
}

impl Gate {
    fn words(&self) -> &[AtomicU64] {
        self.region.words()
    }

    fn parties(&self) -> usize {
        self.words()[PARTIES].load(Acquire) as usize
    }

    fn timeout(&self) -> Option<Duration> {
        let nanoseconds = self.words()[TIMEOUT].load(Acquire);
        nanoseconds.checked_sub(1).map(Duration::from_nanos)
    }

    fn rounds(&self) -> Rounds<'_, impl Fn(Sleeper) -> bool + '_, impl Fn() + '_> {
        let is_listed =
            |sleeper: Sleeper| self.family.epoch_of(sleeper.slot).is_some_and(|epoch| sleeper.has_epoch(epoch));
        let places = &self.words()[PLACES..PLACES + self.parties()];
        Rounds::new(&self.words()[ROUND], places, is_listed, || self.line.notify_all())
    }

    /// Whoever changes the round must be known, so that its death is. Without a slot left it goes on all the same.
    fn be_known(&self) {
        let _ = self.family.me();
    }

    /// Comes, unless the last generation still has to end.
    fn try_arrive(&self, only_last: bool, acting: bool) -> Option<Result<Party<'_>>> {
        let me = match self.family.me() {
            Ok(me) => me,
            Err(error) => return Some(Err(failed(error))),
        };
        match self.rounds().arrive(me.into(), only_last, acting) {
            Arrival::At { generation, index } => Some(Ok(Party { gate: self, generation, index, is_over: false })),
            Arrival::NotLast => Some(Err(would_block())),
            Arrival::Busy => None,
            Arrival::Broken => Some(Err(broken())),
        }
    }

    async fn arrive(&self, acting: bool, deadline: Option<Instant>) -> Result<Party<'_>> {
        if let Some(party) = self.try_arrive(false, acting) {
            return party;
        }
        let coming = until(&self.line, || self.try_arrive(false, acting));
        by(deadline, coming).await.map_or_else(|| Err(still_busy()), |party| party.map_err(failed)?)
    }

    async fn wait(&self, timeout: Option<Duration>) -> Result<BarrierWaitResult> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.arrive(false, deadline).await?.wait(deadline).await
    }

    async fn wait_then(&self, action: impl AsyncFnOnce() -> Result<()>) -> Result<BarrierWaitResult> {
        let deadline = self.timeout().and_then(|timeout| Instant::now().checked_add(timeout));
        let party = self.arrive(true, deadline).await?;
        if party.index + 1 < self.parties() {
            return party.wait(deadline).await;
        }
        action().await?;
        fault::point("barrier.acted");
        party.end(false)
    }

    fn blocking_wait(&self, timeout: Option<Duration>) -> Result<BarrierWaitResult> {
        wait::refuse_inside_async();
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let come = until_blocking(&self.line, deadline, || self.try_arrive(false, false)).map_err(failed)?;
        let party = come.unwrap_or_else(|| Err(still_busy()))?;
        match until_blocking(&self.line, deadline, || party.look()).map_err(failed)? {
            Some(outcome) => party.finish(outcome),
            None => party.end(true),
        }
    }
}

/// What `future` yields, if it does so by the deadline.
async fn by<T>(deadline: Option<Instant>, future: impl Future<Output = T>) -> Option<T> {
    match deadline {
        None => Some(future.await),
        Some(deadline) => tokio::time::timeout_at(deadline.into(), future).await.ok(),
    }
}

/// Somebody who waits: if it stops before its generation has ended, that is broken.
struct Party<'a> {
    gate: &'a Gate,
    generation: u64,
    index: usize,
    is_over: bool,
}

impl Party<'_> {
    fn look(&self) -> Option<Outcome> {
        Some(self.gate.rounds().settle(self.generation)).filter(|outcome| *outcome != Outcome::Open)
    }

    /// Ends the generation, if it has not ended meanwhile.
    fn end(self, badly: bool) -> Result<BarrierWaitResult> {
        let outcome = self.gate.rounds().end(self.generation, badly);
        self.finish(outcome)
    }

    fn finish(mut self, outcome: Outcome) -> Result<BarrierWaitResult> {
        self.is_over = true;
        if outcome == Outcome::Passed { Ok(BarrierWaitResult { index: self.index }) } else { Err(broken()) }
    }

    async fn wait(self, deadline: Option<Instant>) -> Result<BarrierWaitResult> {
        // Who comes last does not stand in line with those who came before.
        let outcome = match self.look() {
            Some(outcome) => outcome,
            None => match by(deadline, until(&self.gate.line, || self.look())).await {
                Some(outcome) => outcome.map_err(failed)?,
                None => return self.end(true),
            },
        };
        self.finish(outcome)
    }
}

impl Drop for Party<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.gate.rounds().end(self.generation, true);
        }
    }
}

fn failed(error: io::Error) -> Error {
    Error::io("cannot wait at a barrier", error)
}

fn broken() -> Error {
    let why = "the barrier is broken: a party was killed, gave up or timed out while it waited, or somebody called \
               abort or reset; call reset to use it again";
    Error::new(ErrorKind::BrokenBarrier, why)
}

fn would_block() -> Error {
    Error::new(ErrorKind::WouldBlock, "others have yet to come to the barrier")
}

fn still_busy() -> Error {
    Error::new(ErrorKind::Timeout, "the action of the barrier's last generation was not done in time")
}

/// What a party learns when all have come.
///
/// ```
/// # multiprocess::init();
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let result = multiprocess::Barrier::new(1)?.wait().await?;
/// assert!(result.is_leader() && result.index() == 0);
/// # Ok::<_, multiprocess::Error>(()) }).unwrap();
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarrierWaitResult {
    index: usize,
}

impl BarrierWaitResult {
    /// Its number in this generation: 0 to one less than the parties, in the order they came.
    pub fn index(&self) -> usize {
        self.index
    }

    /// True for one party of each generation: the one with index 0.
    pub fn is_leader(&self) -> bool {
        self.index == 0
    }
}

/// A barrier across processes: `n` parties wait for each other, again and again.
///
/// A handle is cheap to clone and is itself a serde value: it travels as an argument, in a result, inside other
/// values, through queues. A party is whoever calls [`wait`](Barrier::wait): a process, a task, a thread.
///
/// **Waiting.** [`wait`](Barrier::wait) waits until as many have come as there are parties. One that is dropped or
/// times out breaks the barrier: all who wait, and all who come, get an error of kind `BrokenBarrier`, until somebody
/// calls [`reset`](Barrier::reset). [`abort`](Barrier::abort), [`reset`](Barrier::reset) and the other plain calls
/// never wait. **Death.** A party that is killed while it waits breaks the barrier within milliseconds; one that is
/// killed before it comes is only missing, and a timeout finds that out. **Cost.** Without waiting a few atomics and
/// no system call unless somebody must be woken; a barrier is one descriptor, 600 bytes and 8 for each party.
///
/// ```
/// use multiprocess::{self as mp, Barrier, Process};
///
/// async fn phase(barrier: Barrier) -> mp::Result<usize> {
///     Ok(barrier.wait().await?.index())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let barrier = Barrier::new(2)?;
///         let child = Process::spawn(phase, (barrier.clone(),))?;
///         let mine = barrier.wait().await?.index();
///         assert_eq!(mine + child.await??, 1);
///         Ok(())
///     })
/// }
/// ```
#[derive(Clone)]
pub struct Barrier {
    gate: Arc<Gate>,
}

impl Barrier {
    /// A barrier for `parties`.
    ///
    /// # Errors
    /// `Other` for 0 parties or more than 2^20, `Io` if there is no memory or descriptor left.
    pub fn new(parties: usize) -> Result<Self> {
        Self::create(parties, 0)
    }

    /// A barrier whose [`wait`](Self::wait) gives up, and breaks it, after `timeout`.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{Barrier, ErrorKind};
    /// let barrier = Barrier::with_timeout(2, std::time::Duration::from_millis(1))?;
    /// assert_eq!(barrier.wait().await.unwrap_err().kind(), ErrorKind::BrokenBarrier);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_timeout(parties: usize, timeout: Duration) -> Result<Self> {
        Self::create(parties, u64::try_from(timeout.as_nanos()).map_or(u64::MAX, |timeout| timeout.saturating_add(1)))
    }

    fn create(parties: usize, timeout: u64) -> Result<Self> {
        if !(1..=MOST).contains(&parties) {
            return Err(Error::other(format!("a barrier for {parties} parties: use 1 to {MOST}")));
        }
        let fill = |words: &[AtomicU64]| {
            words[PARTIES].store(parties as u64, Release);
            words[TIMEOUT].store(timeout, Release);
            words[ROUND].store(Round::FIRST.0, Release);
        };
        Ok(Self { gate: object::create_of_len::<Gate>(((Gate::WORDS + parties) * size_of::<u64>()) as u64, fill)? })
    }

    /// Waits until all parties have come, or for as long as [`with_timeout`](Self::with_timeout) said. Dropped before
    /// that, it breaks the barrier.
    ///
    /// # Errors
    /// `BrokenBarrier`; `Io` if the system refuses what waiting needs, which breaks the barrier too.
    pub async fn wait(&self) -> Result<BarrierWaitResult> {
        self.gate.wait(self.gate.timeout()).await
    }

    /// [`wait`](Self::wait) for at most `timeout`, after which the barrier is broken.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub async fn wait_timeout(&self, timeout: Duration) -> Result<BarrierWaitResult> {
        self.gate.wait(Some(timeout)).await
    }

    /// [`wait`](Self::wait) for who comes last, whom nobody keeps waiting. Otherwise it has not come at all.
    ///
    /// # Errors
    /// `WouldBlock` if others have yet to come, `BrokenBarrier`.
    pub fn try_wait(&self) -> Result<BarrierWaitResult> {
        self.gate.try_arrive(true, false).unwrap_or_else(|| Err(would_block()))?.end(false)
    }

    /// [`wait`](Self::wait), and who comes last runs its `action` before anybody goes on: once in each generation, if
    /// all parties wait in this way. Others that come meanwhile, for the next generation, wait until it is done.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let barrier = multiprocess::Barrier::new(1)?;
    /// barrier.wait_then(async || { println!("all are here"); Ok(()) }).await?;
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// What `action` says, which breaks the barrier for the others; else as [`wait`](Self::wait).
    pub async fn wait_then(&self, action: impl AsyncFnOnce() -> Result<()>) -> Result<BarrierWaitResult> {
        self.gate.wait_then(action).await
    }

    /// [`wait`](Self::wait) for plain functions: blocks this thread.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn blocking_wait(&self) -> Result<BarrierWaitResult> {
        self.gate.blocking_wait(self.gate.timeout())
    }

    /// [`wait_timeout`](Self::wait_timeout) for plain functions: blocks this thread.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn blocking_wait_timeout(&self, timeout: Duration) -> Result<BarrierWaitResult> {
        self.gate.blocking_wait(Some(timeout))
    }

    /// Breaks the barrier: all who wait, and all who come, get `BrokenBarrier`, until [`reset`](Self::reset).
    pub fn abort(&self) {
        self.gate.be_known();
        self.gate.rounds().abort();
    }

    /// Makes the barrier whole and empty; the dead are forgotten, and who waits gets `BrokenBarrier`.
    pub fn reset(&self) {
        self.gate.be_known();
        self.gate.rounds().reset();
    }

    /// How many must come.
    pub fn parties(&self) -> usize {
        self.gate.parties()
    }

    /// How many have come and wait; 0 while it is broken.
    pub fn waiting(&self) -> usize {
        self.gate.rounds().waiting()
    }

    /// Whether the barrier is broken.
    pub fn is_broken(&self) -> bool {
        self.gate.rounds().is_broken()
    }
}

impl fmt::Debug for Barrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Barrier")
            .field("parties", &self.parties())
            .field("waiting", &self.waiting())
            .field("is_broken", &self.is_broken())
            .finish_non_exhaustive()
    }
}

impl Serialize for Barrier {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        object::serialize(&*self.gate, serializer)
    }
}

impl<'de> Deserialize<'de> for Barrier {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self { gate: object::deserialize(deserializer)? })
    }
}
