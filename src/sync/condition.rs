//! Condition: tasks of any process wait, with the lock released, until somebody notifies them.
//!
//! # State
//! A [`Mutex`], the event of those who wait, and a table with a row per slot of the family: how many tasks of that
//! process wait and how many notices it has been given (`epoch:20 | NOTIFYING:1 | given:21 | waiting:21`). `ORDER`: the
//! ticket of its longest waiting task that has taken no notice. `HEALER`: who passes on what the dead had.
//! Within a process, `Local`: tickets in order, and notices that a task has taken and not yet returned with.
//!
//! # Moves
//! | from -> to | who | ordering | wakes |
//! |---|---|---|---|
//! | waiting + 1 | a waiter that still holds the lock | SeqCst CAS | - |
//! | given + 1, at most waiting | a notifier; the process with the lowest ORDER, of those with no notice under way | SeqCst CAS | that process |
//! | NOTIFYING set; given = waiting in each row; NOTIFYING cleared | who notifies all | SeqCst CAS | all |
//! | a notice taken | the first task in line, in `Local` only | - | - |
//! | waiting - 1, given - 1 | a waiter that has the lock again | SeqCst CAS | - |
//! | another's given + 1, then waiting - 1, given - 1 | a waiter that leaves with a notice | SeqCst CAS | the other |
//! | another's given + 1, then a dead row's given - 1 | the healer | SeqCst CAS | the other |
//! | a row of an old epoch -> a fresh one | the slot's new owner | SeqCst CAS | - |
//!
//! # Invariants
//! 1. A waiter is in its row before it releases the lock, and in the local line: who notifies later finds it.
//! 2. given <= waiting, so a notice never waits for somebody to come.
//! 3. A notice leaves its row only with a task that has returned from `wait` holding the lock, or after it was passed on.
//! 4. Only its own process lowers a live row; only one healer at a time touches dead ones.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | waiting | a row of an unlisted process: passed over | the slot's next owner |
//! | with a notice, before it had the lock again | given > 0 in a dead row | its burial: all who wait look, the healer passes it on |
//! | notifying one, before the wake | a notice whose owner sleeps | its burial: all look |
//! | notifying all, half-way | NOTIFYING in a dead row | its burial: the healer notifies all, also who came since |
//! | healing, or passing on, half-way | the row as it was, HEALER dead | the next healer; a notice may then wake two |
//!
//! # Cancel
//! A dropped wait leaves its row; if it had a notice, or its process has as many as waiters, one is passed on first. It
//! does not hold the lock.

use super::debug::Report;
use super::mutex::{self, Mutex, Taken, outcome};
use super::object::{self, Core, FIRST};
use crate::error::{Error, ErrorKind, LockError, Result};
use crate::os::fault;
use crate::shm::atomic::{AtomicU64, fence};
use crate::shm::family::{Family, Member, SLOTS};
use crate::shm::mapped::Mapped;
use crate::shm::region::Region;
use crate::wait::event::Sleeper;
use crate::wait::{Line, Turn, event, refuse_inside_async, until_blocking_in_turn, until_in_turn};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::atomic::Ordering::*;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A condition across processes: a lock, and a place to wait for what it protects to change.
///
/// A handle is cheap to clone and is itself a serde value. [`lock`](Condition::lock) gives a guard;
/// [`wait`](Condition::wait) takes it, releases the lock while it waits for a notice, and gives it back. Any number of
/// tasks, in any process, may wait.
///
/// **Notices.** [`notify_one`](Condition::notify_one) wakes exactly one of those who wait when it is called, if any:
/// of processes the one whose task has waited longest, of its tasks the longest waiting. Notifying needs no guard,
/// but who changes what is waited for should hold it. **Cancel.** A dropped wait leaves the lock free and no waiter
/// behind; a notice that it had gets another. **Death.** So does the notice of a waiter that is killed; if somebody is
/// killed while notifying all, all are notified. In both cases, at worst one waiter too many is woken, so look again
/// at what you wait for, as [`wait_for`](Condition::wait_for) does. **Cost.** One descriptor and 70 KiB.
///
/// ```
/// use multiprocess::{self as mp, Condition, Process, Queue};
///
/// async fn consumer(condition: Condition, queue: Queue<u32>) -> mp::Result<u32> {
///     let guard = condition.lock().await?;
///     let _guard = condition.wait_for(guard, || !queue.is_empty()).await?;
///     queue.get().await
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let (condition, queue) = (Condition::new()?, Queue::unbounded()?);
///         let child = Process::spawn(consumer, (condition.clone(), queue.clone()))?;
///         let guard = condition.lock().await?;
///         queue.put(5).await?;
///         condition.notify_one();
///         drop(guard);
///         assert_eq!(child.await??, 5);
///         Ok(())
///     })
/// }
/// ```
#[derive(Clone)]
pub struct Condition(Arc<ConditionCore>);

#[cfg(not(multiprocess_loom))]
const ROWS: usize = SLOTS;
#[cfg(multiprocess_loom)]
const ROWS: usize = if SLOTS > 4 { 4 } else { SLOTS };

const TICKET: usize = 0;
const HEALER: usize = 1;
/// Rows from here on were never used.
const USED: usize = 2;
pub(super) const EVENT: usize = 8;
pub(super) const TABLE: usize = EVENT + event::LEN;
const ORDER: usize = TABLE + ROWS;
/// Words that a room of waiters takes up; zeros are an empty one.
pub(super) const LEN: usize = ORDER + ROWS;

const COUNT_BITS: u32 = 21;
const COUNT: u64 = (1 << COUNT_BITS) - 1;
const ONE_GIVEN: u64 = 1 << COUNT_BITS;
const NOTIFYING: u64 = 1 << 42;
const EPOCH_SHIFT: u32 = 44;
/// What a row counts, without whose it is.
#[cfg(all(test, multiprocess_loom))]
pub(super) const COUNTS: u64 = ONE_GIVEN * ONE_GIVEN - 1;
const EPOCH: u64 = !0 << EPOCH_SHIFT;

fn waiting(row: u64) -> u64 {
    row & COUNT
}

fn given(row: u64) -> u64 {
    row >> COUNT_BITS & COUNT
}

/// Whether a dead row has something that its process can no longer use.
fn is_dirty(row: u64) -> bool {
    given(row) > 0 || row & NOTIFYING != 0
}

fn fresh(me: Member) -> u64 {
    u64::from(me.epoch) << EPOCH_SHIFT
}

/// The table, wherever its words are. `epoch_of` tells who has a slot, `wake` reaches a process.
#[derive(Clone, Copy)]
pub(super) struct Room<'a, E, W> {
    pub(super) words: &'a [AtomicU64],
    pub(super) epoch_of: E,
    pub(super) wake: W,
}

impl<E: Fn(u16) -> Option<u32>, W: Fn(Member)> Room<'_, E, W> {
    fn row(&self, slot: u16) -> &AtomicU64 {
        &self.words[TABLE + usize::from(slot) % ROWS]
    }

    fn used(&self) -> std::ops::Range<u16> {
        0..self.words[USED].load(Acquire) as u16
    }

    /// Whose row this is, if that process is alive.
    fn owner(&self, slot: u16, row: u64) -> Option<Member> {
        let epoch = (self.epoch_of)(slot)?;
        let member = Member { slot, epoch };
        (fresh(member) == row & EPOCH).then_some(member)
    }

    fn change(&self, slot: u16, change: impl Fn(u64) -> Option<u64>) -> Option<u64> {
        self.row(slot).fetch_update(SeqCst, Acquire, change).ok()
    }

    /// The row of this process, made its own at the first need.
    fn claim_row(&self, me: Member) {
        let mut used = self.words[USED].load(Acquire);
        while used <= u64::from(me.slot) {
            match self.words[USED].compare_exchange(used, u64::from(me.slot) + 1, AcqRel, Acquire) {
                Ok(_) => break,
                Err(now) => used = now,
            }
        }
        for round in 0.. {
            let seen = self.row(me.slot).load(Acquire);
            if seen & EPOCH == fresh(me) {
                return;
            }
            // What the slot's last owner had is passed on first, unless who does so is stopped.
            if is_dirty(seen) && round < 1000 {
                self.heal(me);
                if round > 0 {
                    std::thread::yield_now();
                }
            } else if self.row(me.slot).compare_exchange(seen, fresh(me), SeqCst, Relaxed).is_ok() {
                fault::point("condition.claimed");
                return;
            }
        }
    }

    /// Gives a notice to the process that is to have the next one; false if nobody waits.
    fn give_one(&self) -> bool {
        loop {
            let mut best: Option<(bool, u64, u64, Member)> = None;
            for slot in self.used() {
                let row = self.row(slot).load(Acquire);
                let waits = waiting(row) > given(row);
                if waits && let Some(member) = self.owner(slot, row) {
                    let order = self.words[ORDER + usize::from(slot)].load(Acquire);
                    let this = (given(row) > 0, order, row, member);
                    if best.is_none_or(|best| (this.0, this.1) < (best.0, best.1)) {
                        best = Some(this);
                    }
                }
            }
            let Some((_, _, row, member)) = best else { return false };
            if self.row(member.slot).compare_exchange(row, row + ONE_GIVEN, SeqCst, Relaxed).is_ok() {
                fault::point("condition.given");
                (self.wake)(member);
                return true;
            }
        }
    }

    /// Notifies `count` waiters, each on its own.
    pub(super) fn notify(&self, count: usize) {
        fence(SeqCst);
        let _ = (0..count).all(|_| self.give_one());
    }

    fn give_all(&self) {
        for slot in self.used() {
            let all = |row: u64| {
                let missing = waiting(row).saturating_sub(given(row));
                (missing > 0 && self.owner(slot, row).is_some()).then_some(row + missing * ONE_GIVEN)
            };
            if let Some(member) = self.change(slot, all).and_then(|row| self.owner(slot, row)) {
                fault::point("condition.given");
                (self.wake)(member);
            }
        }
    }

    /// Notifies all who wait. One at a time in each process.
    pub(super) fn notify_all(&self, me: Option<Member>) {
        fence(SeqCst);
        let Some(me) = me else { return self.give_all() };
        if self.used().all(|slot| waiting(self.row(slot).load(Acquire)) == 0) {
            return;
        }
        self.claim_row(me);
        self.change(me.slot, |row| Some(row | NOTIFYING));
        fault::point("condition.notifying");
        self.give_all();
        self.change(me.slot, |row| Some(row & !NOTIFYING));
    }

    /// Passes on what the dead had.
    pub(super) fn heal(&self, me: Member) {
        let is_dead = |slot: u16| {
            let row = self.row(slot).load(Acquire);
            (is_dirty(row) && self.owner(slot, row).is_none()).then_some(row)
        };
        // Once more after letting go, for somebody may have died meanwhile whom others left to us.
        while self.used().any(|slot| is_dead(slot).is_some()) {
            fence(SeqCst);
            let healer = self.words[HEALER].load(Acquire);
            let is_busy = healer == me.to_bits()
                || healer != 0 && {
                    let healer = Member::from_bits(healer);
                    (self.epoch_of)(healer.slot) == Some(healer.epoch)
                };
            if is_busy || self.words[HEALER].compare_exchange(healer, me.to_bits(), AcqRel, Relaxed).is_err() {
                return;
            }
            for slot in self.used() {
                while let Some(row) = is_dead(slot) {
                    fault::point("heal.begun");
                    let less = match row & NOTIFYING != 0 {
                        true => {
                            self.give_all();
                            row & !NOTIFYING
                        }
                        false => {
                            self.give_one();
                            row - ONE_GIVEN
                        }
                    };
                    fault::point("heal.given");
                    let _ = self.row(slot).compare_exchange(row, less, SeqCst, Relaxed);
                }
            }
            self.words[HEALER].store(0, SeqCst);
            fence(SeqCst);
        }
    }

    fn waiting(&self) -> u64 {
        let row = |slot| self.row(slot).load(Acquire);
        self.used().filter(|slot| self.owner(*slot, row(*slot)).is_some()).map(|slot| waiting(row(slot))).sum()
    }

    /// Notices that a process has been given.
    fn given_to(&self, me: Member) -> u64 {
        given(self.row(me.slot).load(Acquire))
    }
}

/// Those of this process who wait. All that lowers this process's row happens under its lock.
#[derive(Default)]
pub(super) struct Local {
    /// Of those who have taken no notice.
    tickets: VecDeque<u64>,
    /// Notices taken by those who have not yet returned.
    taken: u64,
}

impl Local {
    fn say_order<E, W>(&self, room: &Room<'_, E, W>, me: Member) {
        if let Some(first) = self.tickets.front() {
            room.words[ORDER + usize::from(me.slot) % ROWS].store(*first, Release);
        }
    }

    /// Enters a waiter; `None` if there are more than 2^21 in this process.
    pub(super) fn enter<E: Fn(u16) -> Option<u32>, W: Fn(Member)>(
        &mut self,
        room: &Room<'_, E, W>,
        me: Member,
    ) -> Option<u64> {
        room.claim_row(me);
        let ticket = room.words[TICKET].fetch_add(1, AcqRel);
        self.tickets.push_back(ticket);
        self.say_order(room, me);
        let entered = room.change(me.slot, |row| (waiting(row) < COUNT).then_some(row + 1));
        if entered.is_none() {
            self.tickets.pop_back();
        }
        fault::point("condition.entered");
        entered.map(|_| ticket)
    }

    fn strike<E, W>(&mut self, room: &Room<'_, E, W>, me: Member, ticket: u64) {
        if let Ok(at) = self.tickets.binary_search(&ticket) {
            self.tickets.remove(at);
        }
        self.say_order(room, me);
    }

    /// Takes a notice for this waiter, if there is one.
    pub(super) fn take<E: Fn(u16) -> Option<u32>, W: Fn(Member)>(
        &mut self,
        room: &Room<'_, E, W>,
        me: Member,
        ticket: u64,
    ) -> bool {
        let taken = room.given_to(me) > self.taken;
        if taken {
            self.taken += 1;
            self.strike(room, me, ticket);
            fault::point("condition.taken");
        }
        taken
    }

    /// A waiter that took a notice has the lock again.
    pub(super) fn finish<E: Fn(u16) -> Option<u32>, W: Fn(Member)>(&mut self, room: &Room<'_, E, W>, me: Member) {
        self.taken -= 1;
        room.change(me.slot, |row| Some(row - ONE_GIVEN - 1));
        fault::point("condition.finished");
    }

    /// A waiter leaves without having returned.
    pub(super) fn leave<E: Fn(u16) -> Option<u32>, W: Fn(Member)>(
        &mut self,
        room: &Room<'_, E, W>,
        me: Member,
        ticket: u64,
        has_taken: bool,
    ) {
        self.strike(room, me, ticket);
        let spare = |row: u64| (has_taken || given(row) == waiting(row)).then_some(row);
        if !has_taken && room.change(me.slot, |row| spare(row).is_none().then(|| row - 1)).is_some() {
            return;
        }
        room.give_one();
        fault::point("condition.passed");
        self.taken -= u64::from(has_taken);
        room.change(me.slot, |row| Some(row - ONE_GIVEN - 1));
    }
}

pub(super) struct ConditionCore {
    family: &'static Family,
    region: Arc<Region>,
    mutex: Mutex,
    waiting: Arc<Line>,
    local: std::sync::Mutex<Local>,
    notifying: std::sync::Mutex<()>,
}

static MAPPED: Mapped<ConditionCore> = Mapped::new();
const ROOM: usize = FIRST + mutex::LEN;

impl Core for ConditionCore {
    const KIND: u64 = 0x6d70_636f_6e64_0001;
    const NAME: &'static str = "condition";
    const WORDS: usize = ROOM + LEN;

    fn mapped() -> &'static Mapped<Self> {
        &MAPPED
    }

    fn region(&self) -> &Arc<Region> {
        &self.region
    }

    fn report(words: &[AtomicU64]) -> Report {
        let room = &words[ROOM..ROOM + LEN];
        let rows = room[TABLE..TABLE + ROWS].iter().take(room[USED].load(Acquire) as usize).zip(0..);
        let rows = rows.map(|(row, slot)| (row.load(Acquire), slot)).filter(|(row, _)| waiting(*row) > 0);
        let waits = rows.map(|(row, slot)| Sleeper::from(Member { slot, epoch: (row >> EPOCH_SHIFT) as u32 }));
        let mut report = mutex::Words(&words[FIRST..FIRST + mutex::LEN]).report();
        report.waiting.extend(waits);
        report
    }

    fn view(region: Arc<Region>) -> io::Result<Self> {
        let waiting = Line::new(region.clone(), ROOM + EVENT, None)?;
        let (mutex, family) = (Mutex::view(&region, FIRST)?, Family::get()?);
        let (local, notifying) = (std::sync::Mutex::default(), std::sync::Mutex::default());
        Ok(Self { family, region, mutex, waiting, local, notifying })
    }
}

impl ConditionCore {
    /// Wakes come last: with no lock of ours held, for a waker may drop other futures.
    fn with_room<R>(&self, act: impl FnOnce(&Room<'_, &dyn Fn(u16) -> Option<u32>, &dyn Fn(Member)>) -> R) -> R {
        let woken = RefCell::new(Vec::new());
        let result = act(&Room {
            words: &self.region.words()[ROOM..ROOM + LEN],
            epoch_of: &|slot| self.family.epoch_of(slot),
            wake: &|member| woken.borrow_mut().push(member),
        });
        woken.into_inner().into_iter().for_each(|member| self.waiting.notify_member(member));
        result
    }

    fn local(&self) -> MutexGuard<'_, Local> {
        // Nothing panics while it is locked.
        self.local.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn outcome(
        self: &Arc<Self>,
        taken: io::Result<Option<Taken>>,
        missed: ErrorKind,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        outcome(Self::NAME, taken, missed, || ConditionGuard(self.clone()))
    }

    /// Enters the caller, who holds the lock, among those who wait, and releases the lock.
    fn enter(self: &Arc<Self>, guard: ConditionGuard) -> Result<(Turn, Waiter), LockError<ConditionGuard>> {
        if !Arc::ptr_eq(self, &guard.0) {
            let error = Error::other("wait was given the guard of another condition: lock this one");
            return Err(LockError::new(error, Some(guard)));
        }
        // First into the line: who enters later, holding the lock, is behind us.
        let turn = self.waiting.join();
        let entered = self.family.me().and_then(|me| {
            let full = || io::Error::other(format!("more than {COUNT} tasks of one process wait for one condition"));
            let ticket = self.with_room(|room| self.local().enter(room, me));
            ticket.map(|ticket| (me, ticket)).ok_or_else(full)
        });
        match entered {
            Ok((me, ticket)) => {
                let waiter = Waiter { core: self.clone(), me, ticket, stage: Stage::Waits };
                drop(guard);
                fault::point("condition.released");
                Ok((turn, waiter))
            }
            Err(error) => Err(LockError::new(Error::io("cannot wait for a condition", error), Some(guard))),
        }
    }
}

#[derive(PartialEq, Eq)]
enum Stage {
    Waits,
    HasTaken,
    HasLeft,
}

/// One task in its process's row, until it returns or leaves.
struct Waiter {
    core: Arc<ConditionCore>,
    me: Member,
    ticket: u64,
    stage: Stage,
}

impl Waiter {
    fn attempt(&mut self) -> Option<()> {
        // Also of what the dead had: their burial is what makes us look.
        self.core.with_room(|room| room.heal(self.me));
        let taken = self.core.with_room(|room| self.core.local().take(room, self.me, self.ticket));
        if taken {
            self.stage = Stage::HasTaken;
        }
        taken.then_some(())
    }

    fn finish(mut self) {
        self.core.with_room(|room| self.core.local().finish(room, self.me));
        self.stage = Stage::HasLeft;
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if self.stage != Stage::HasLeft {
            let has_taken = self.stage == Stage::HasTaken;
            self.core.with_room(|room| self.core.local().leave(room, self.me, self.ticket, has_taken));
        }
    }
}

impl Condition {
    /// A condition whose lock nobody holds.
    ///
    /// # Errors
    /// `Io` if there is no memory or descriptor left.
    pub fn new() -> Result<Self> {
        object::create(|_| ()).map(Self)
    }

    /// Takes the lock; waits while somebody holds it. Cancel-safe: dropped, it has not taken it.
    ///
    /// # Errors
    /// `OwnerDied`, and then the lock is taken: the guard is inside. `Io` if this process has no descriptor left to
    /// wait with.
    pub async fn lock(&self) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        self.0.outcome(self.0.mutex.take().await.map(Some), ErrorKind::Timeout)
    }

    /// Takes the lock if that needs no waiting.
    ///
    /// # Errors
    /// `WouldBlock` if somebody holds it, or has waited for long and gets it next; else as [`lock`](Self::lock).
    pub fn try_lock(&self) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        self.0.outcome(self.0.mutex.try_take(), ErrorKind::WouldBlock)
    }

    /// [`lock`](Self::lock) that gives up after `timeout`.
    ///
    /// # Errors
    /// `Timeout`, else as [`lock`](Self::lock).
    pub async fn lock_timeout(&self, timeout: Duration) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        self.0.outcome(self.0.mutex.take_within(timeout).await, ErrorKind::Timeout)
    }

    /// [`lock`](Self::lock) for plain functions: blocks this thread.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`lock`](Self::lock).
    pub fn blocking_lock(&self) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        refuse_inside_async();
        self.0.outcome(self.0.mutex.take_blocking(None), ErrorKind::Timeout)
    }

    /// [`blocking_lock`](Self::blocking_lock) that gives up after `timeout`.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// `Timeout`, else as [`lock`](Self::lock).
    pub fn blocking_lock_timeout(&self, timeout: Duration) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        refuse_inside_async();
        self.0.outcome(self.0.mutex.take_blocking(Instant::now().checked_add(timeout)), ErrorKind::Timeout)
    }

    /// Releases the lock, waits for a notice, and takes the lock again.
    ///
    /// It counts as waiting from its first poll on, before the lock is released. Dropped, it waits no more, does not
    /// hold the lock, and a notice that it had goes to another.
    ///
    /// # Errors
    /// `OwnerDied` if the holder before us ended without releasing the lock: notified all the same, with the guard
    /// inside. `Other` for the guard of another condition, which comes back. `Io` if this process has no descriptor
    /// left to wait with.
    pub async fn wait(&self, guard: ConditionGuard) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        let (turn, mut waiter) = self.0.enter(guard)?;
        let noticed = until_in_turn(&self.0.waiting, Some(turn), |_| waiter.attempt()).await;
        self.back(noticed.map(Some), waiter).await
    }

    /// [`wait`](Self::wait) that waits for a notice for `timeout` at most. The lock is taken again in any case, however
    /// long that takes.
    ///
    /// # Errors
    /// `Timeout` if no notice came: the guard is inside. Else as [`wait`](Self::wait).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{Condition, ErrorKind};
    /// let condition = Condition::new()?;
    /// let guard = condition.lock().await?;
    /// let error = condition.wait_timeout(guard, std::time::Duration::from_millis(1)).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Timeout);
    /// let _guard = error.into_guard();
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub async fn wait_timeout(
        &self,
        guard: ConditionGuard,
        timeout: Duration,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        let (turn, mut waiter) = self.0.enter(guard)?;
        let waited = until_in_turn(&self.0.waiting, Some(turn), |_| waiter.attempt());
        let noticed = tokio::time::timeout(timeout, waited).await;
        self.back(noticed.map_or(Ok(None), |noticed| noticed.map(Some)), waiter).await
    }

    /// The second half of a wait.
    async fn back(
        &self,
        noticed: io::Result<Option<()>>,
        waiter: Waiter,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        let waiter = match &noticed {
            Ok(Some(())) => Some(waiter),
            _ => None, // It waits no more, also not while it waits for the lock.
        };
        let taken = self.0.mutex.take().await.map(Some);
        self.returned(noticed, waiter, taken)
    }

    fn returned(
        &self,
        noticed: io::Result<Option<()>>,
        waiter: Option<Waiter>,
        taken: io::Result<Option<Taken>>,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        if let (Some(waiter), Ok(Some(_))) = (waiter, &taken) {
            waiter.finish();
        }
        let guard = self.0.outcome(taken, ErrorKind::Timeout)?;
        match noticed {
            Ok(Some(())) => Ok(guard),
            Ok(None) => Err(LockError::new(
                Error::new(ErrorKind::Timeout, "the condition was not notified in time"),
                Some(guard),
            )),
            Err(error) => Err(LockError::new(Error::io("cannot wait for a condition", error), Some(guard))),
        }
    }

    /// [`wait`](Self::wait) for plain functions: blocks this thread.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn blocking_wait(&self, guard: ConditionGuard) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        self.block(guard, None)
    }

    /// [`wait_timeout`](Self::wait_timeout) for plain functions: blocks this thread.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`wait_timeout`](Self::wait_timeout).
    pub fn blocking_wait_timeout(
        &self,
        guard: ConditionGuard,
        timeout: Duration,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        self.block(guard, Instant::now().checked_add(timeout))
    }

    fn block(
        &self,
        guard: ConditionGuard,
        deadline: Option<Instant>,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        refuse_inside_async();
        let (turn, mut waiter) = self.0.enter(guard)?;
        let noticed = until_blocking_in_turn(&self.0.waiting, Some(turn), deadline, |_| waiter.attempt());
        let waiter = matches!(noticed, Ok(Some(()))).then_some(waiter);
        self.returned(noticed, waiter, self.0.mutex.take_blocking(None))
    }

    /// Waits until `is_so`, which is looked at with the lock held: at once, and at each notice.
    ///
    /// Dropped, it leaves the lock free and no waiter behind.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub async fn wait_for(
        &self,
        mut guard: ConditionGuard,
        mut is_so: impl FnMut() -> bool,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        while !is_so() {
            guard = self.wait(guard).await?;
        }
        Ok(guard)
    }

    /// [`wait_for`](Self::wait_for) that gives up after `timeout`, and a last look.
    ///
    /// # Errors
    /// `Timeout` if it is not so by then: the guard is inside. Else as [`wait`](Self::wait).
    pub async fn wait_for_timeout(
        &self,
        mut guard: ConditionGuard,
        mut is_so: impl FnMut() -> bool,
        timeout: Duration,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        let start = Instant::now();
        while !is_so() {
            guard = match self.wait_timeout(guard, timeout.saturating_sub(start.elapsed())).await {
                Err(error) if error.kind() == ErrorKind::Timeout && is_so() => error.into_guard(),
                waited => waited?,
            };
        }
        Ok(guard)
    }

    /// [`wait_for`](Self::wait_for) for plain functions: blocks this thread.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn blocking_wait_for(
        &self,
        mut guard: ConditionGuard,
        mut is_so: impl FnMut() -> bool,
    ) -> Result<ConditionGuard, LockError<ConditionGuard>> {
        while !is_so() {
            guard = self.blocking_wait(guard)?;
        }
        Ok(guard)
    }

    /// How many tasks wait now, in all processes that are alive; those with a notice count until they have the lock.
    pub fn waiting(&self) -> usize {
        self.0.with_room(|room| room.waiting()) as usize
    }

    /// Wakes one of those who wait now, if any. Never waits.
    pub fn notify_one(&self) {
        self.notify(1);
    }

    /// Wakes `count` of those who wait now, or all if they are fewer. Never waits.
    pub fn notify(&self, count: usize) {
        // Killed halfway it is healed by its burial, and only who has a slot is buried.
        let _ = self.0.family.me();
        self.0.with_room(|room| room.notify(count));
    }

    /// Wakes all who wait now. Never waits.
    pub fn notify_all(&self) {
        self.0.with_room(|room| {
            let _one = self.0.notifying.lock().unwrap_or_else(PoisonError::into_inner);
            room.notify_all(self.0.family.me().ok());
        });
    }
}

impl fmt::Debug for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_held = self.0.mutex.is_held();
        f.debug_struct("Condition").field("is_held", &is_held).field("waiting", &self.waiting()).finish()
    }
}

impl Serialize for Condition {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        object::serialize(&*self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for Condition {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        object::deserialize(deserializer).map(Self)
    }
}

/// Holds the lock of a [`Condition`] until it is dropped or given to [`Condition::wait`].
///
/// ```
/// # multiprocess::init();
/// let condition = multiprocess::Condition::new()?;
/// let guard = condition.try_lock()?;
/// assert!(condition.try_lock().is_err());
/// drop(guard);
/// assert!(condition.try_lock().is_ok());
/// # Ok::<(), multiprocess::Error>(())
/// ```
#[must_use = "a guard that is dropped at once protects nothing"]
pub struct ConditionGuard(Arc<ConditionCore>);

impl Drop for ConditionGuard {
    fn drop(&mut self) {
        self.0.mutex.release();
    }
}

impl fmt::Debug for ConditionGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConditionGuard").finish_non_exhaustive()
    }
}
