//! The shared state of a condition: a table of waiters and notifications, and this process's part of it.
//!
//! # State
//! The list of sleeping processes, and a table with a row per slot of the family. A row has the number of waiting tasks of
//! that process and the number of notifications that it was given (`epoch:20 | NOTIFYING:1 | given:21 | waiting:21`).
//! `ORDER`: the ticket of its longest waiting task without a notification. `HEALER`: the member that passes on the
//! notifications of the dead. Within a process, `LocalWaiters`: tickets in order, and the notifications that tasks have taken
//! but not yet returned with.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | waiting + 1 | a waiter that still holds the lock | SeqCst CAS | - |
//! | given + 1, at most waiting | a notifier, for the process with the lowest ORDER among those with no notification under way | SeqCst CAS | that process |
//! | NOTIFYING set; given = waiting in each row; NOTIFYING cleared | a notifier of all | SeqCst CAS | all |
//! | a notification taken | the first task in the queue, in `LocalWaiters` only | - | - |
//! | waiting - 1, given - 1 | a waiter that has the lock again | SeqCst CAS | - |
//! | another's given + 1, then waiting - 1, given - 1 | a waiter that leaves with a notification | SeqCst CAS | the other |
//! | another's given + 1, then a dead row's given - 1 | the healer | SeqCst CAS | the other |
//! | a row of an old epoch -> a fresh one | the slot's new owner | SeqCst CAS | - |
//!
//! # Invariants
//! 1. A waiter is in its row and in the local queue before it releases the lock, so later notifiers find it.
//! 2. given <= waiting, so a notification never waits for a waiter to come.
//! 3. A notification leaves its row only with a task that returned from `wait` holding the lock, or after it was passed on.
//! 4. Every word is untrusted. A row counts as many tasks as its process knows of (`LocalWaiters`). Otherwise it is damaged,
//!    and the waits of that process end with an error. Of other rows, nothing that leads out of the table is believed.
//! 5. Only its own process lowers a live row. Only one healer at a time changes dead ones.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | waiting | a row of an unlisted process, which is passed over | the slot's next owner |
//! | with a notification, before it had the lock again | given > 0 in a dead row | recovery: all waiters try, the healer passes it on |
//! | notifying one, before the wake | a notification whose owner sleeps | recovery: all try |
//! | notifying all, half-way | NOTIFYING in a dead row | recovery: the healer notifies all, also later waiters |
//! | healing, or passing on, half-way | the row as it was, HEALER dead | the next healer; a notification may then wake two |
//!
//! # Cancel
//! A dropped wait leaves its row and does not hold the lock. If it had a notification, or its process has as many as waiters,
//! one is passed on first.

use crate::os::fault;
use crate::shm::atomic::{AtomicU64, fence};
use crate::shm::family::{Member, SLOTS};
use crate::wait::sleepers::{self, Sleeper};
use std::collections::VecDeque;
use std::sync::atomic::Ordering::*;

#[cfg(not(multiprocess_loom))]
const ROWS: usize = SLOTS;
#[cfg(multiprocess_loom)]
const ROWS: usize = if SLOTS > 4 { 4 } else { SLOTS };

const TICKET: usize = 0;
const HEALER: usize = 1;
/// Rows from here on were never used.
const USED: usize = 2;
pub(super) const EVENT: usize = 8;
pub(super) const TABLE: usize = EVENT + sleepers::LEN;
const ORDER: usize = TABLE + ROWS;
/// Words that the state of a condition takes up; all zeros is a condition without waiters.
pub(super) const LEN: usize = ORDER + ROWS;

const COUNT_BITS: u32 = 21;
/// As many tasks of one process can wait.
pub(super) const COUNT: u64 = (1 << COUNT_BITS) - 1;
const ONE_GIVEN: u64 = 1 << COUNT_BITS;
const NOTIFYING: u64 = 1 << 42;
const EPOCH_SHIFT: u32 = 44;
/// The counts of a row, without its epoch.
#[cfg(all(test, multiprocess_loom))]
pub(super) const COUNTS: u64 = ONE_GIVEN * ONE_GIVEN - 1;
const EPOCH: u64 = !0 << EPOCH_SHIFT;

fn waiting(row: u64) -> u64 {
    row & COUNT
}

fn given(row: u64) -> u64 {
    row >> COUNT_BITS & COUNT
}

/// Returns `true` if a dead row has something that its process can no longer use.
fn is_dirty(row: u64) -> bool {
    given(row) > 0 || row & NOTIFYING != 0
}

fn fresh(me: Member) -> u64 {
    u64::from(me.epoch) << EPOCH_SHIFT
}

/// The table, wherever its words are. `epoch_of` returns the epoch of the process in a slot, `wake` wakes a process.
#[derive(Clone, Copy)]
pub(super) struct ConditionState<'a, E, W> {
    pub(super) words: &'a [AtomicU64],
    pub(super) epoch_of: E,
    pub(super) wake: W,
}

impl<E: Fn(u16) -> Option<u32>, W: Fn(Member)> ConditionState<'_, E, W> {
    fn row(&self, slot: u16) -> &AtomicU64 {
        &self.words[TABLE + usize::from(slot) % ROWS]
    }

    fn used(&self) -> std::ops::Range<u16> {
        0..self.words[USED].load(Acquire).min(ROWS as u64) as u16
    }

    /// Returns the owner of a row, if that process is alive.
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
            // The notifications of the slot's last owner are passed on first, unless the healer is stopped.
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

    /// Gives a notification to the process that is next; false if there is no waiter.
    fn give_one(&self) -> bool {
        loop {
            let mut best: Option<(bool, u64, u64, Member)> = None;
            for slot in self.used() {
                let row = self.row(slot).load(Acquire);
                let waits = waiting(row) > given(row);
                if waits && let Some(member) = self.owner(slot, row) {
                    let order = self.words[ORDER + usize::from(slot) % ROWS].load(Acquire);
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

    /// Notifies all waiters. Only one call at a time in each process.
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

    /// Passes on the notifications of the dead.
    pub(super) fn heal(&self, me: Member) {
        let is_dead = |slot: u16| {
            let row = self.row(slot).load(Acquire);
            (is_dirty(row) && self.owner(slot, row).is_none()).then_some(row)
        };
        // Once more after the release: others may have left to us a process that died meanwhile.
        for _ in 0..ROWS {
            if !self.used().any(|slot| is_dead(slot).is_some()) {
                return;
            }
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
                        false if self.give_one() => row - ONE_GIVEN,
                        // There is no waiter: the notifications are dropped.
                        false => row & !(COUNT << COUNT_BITS),
                    };
                    fault::point("heal.given");
                    let _ = self.row(slot).compare_exchange(row, less, SeqCst, Relaxed);
                }
            }
            self.words[HEALER].store(0, SeqCst);
            fence(SeqCst);
        }
    }

    pub(super) fn waiting(&self) -> u64 {
        let row = |slot| self.row(slot).load(Acquire);
        self.used().filter(|slot| self.owner(*slot, row(*slot)).is_some()).map(|slot| waiting(row(slot))).sum()
    }

    /// Notices that a process has been given.
    fn given_to(&self, me: Member) -> u64 {
        given(self.row(me.slot).load(Acquire))
    }
}

/// The waiters of this process. Its row is lowered only under the lock of this table.
#[derive(Default)]
pub(super) struct LocalWaiters {
    /// The tickets of waiters that have taken no notification.
    tickets: VecDeque<u64>,
    /// Notifications taken by waiters that have not yet returned.
    taken: u64,
}

impl LocalWaiters {
    fn say_order<E, W>(&self, state: &ConditionState<'_, E, W>, me: Member) {
        if let Some(first) = self.tickets.front() {
            state.words[ORDER + usize::from(me.slot) % ROWS].store(*first, Release);
        }
    }

    /// Enters a waiter; `None` if there are more than 2^21 in this process.
    pub(super) fn enter<E: Fn(u16) -> Option<u32>, W: Fn(Member)>(
        &mut self,
        state: &ConditionState<'_, E, W>,
        me: Member,
    ) -> Option<u64> {
        state.claim_row(me);
        let ticket = state.words[TICKET].fetch_add(1, AcqRel);
        self.tickets.push_back(ticket);
        self.say_order(state, me);
        let entered = state.change(me.slot, |row| (waiting(row) < COUNT).then_some(row + 1));
        if entered.is_none() {
            self.tickets.pop_back();
        }
        fault::point("condition.entered");
        entered.map(|_| ticket)
    }

    fn strike<E, W>(&mut self, state: &ConditionState<'_, E, W>, me: Member, ticket: u64) {
        // They are in order, unless the word that they come from was damaged.
        let found = self.tickets.binary_search(&ticket).ok();
        let found = found.or_else(|| self.tickets.iter().position(|other| *other == ticket));
        found.and_then(|at| self.tickets.remove(at));
        self.say_order(state, me);
    }

    /// Returns `true` if this process's row can be true: it counts those that we know of, and as many notices at most.
    pub(super) fn is_sound<E: Fn(u16) -> Option<u32>, W: Fn(Member)>(
        &self,
        state: &ConditionState<'_, E, W>,
        me: Member,
    ) -> bool {
        let row = state.row(me.slot).load(Acquire);
        let known = self.tickets.len() as u64 + self.taken;
        row & EPOCH == fresh(me) && waiting(row) == known && (self.taken..=known).contains(&given(row))
    }

    /// Takes a notice for this waiter, if there is one.
    pub(super) fn take<E: Fn(u16) -> Option<u32>, W: Fn(Member)>(
        &mut self,
        state: &ConditionState<'_, E, W>,
        me: Member,
        ticket: u64,
    ) -> bool {
        let taken = state.given_to(me) > self.taken;
        if taken {
            self.taken += 1;
            self.strike(state, me, ticket);
            fault::point("condition.taken");
        }
        taken
    }

    /// A waiter that took a notice has the lock again.
    pub(super) fn finish<E: Fn(u16) -> Option<u32>, W: Fn(Member)>(
        &mut self,
        state: &ConditionState<'_, E, W>,
        me: Member,
    ) {
        self.taken -= 1;
        state.change(me.slot, one_less);
        fault::point("condition.finished");
    }

    /// A waiter leaves without having returned.
    pub(super) fn leave<E: Fn(u16) -> Option<u32>, W: Fn(Member)>(
        &mut self,
        state: &ConditionState<'_, E, W>,
        me: Member,
        ticket: u64,
        has_taken: bool,
    ) {
        self.strike(state, me, ticket);
        let spare = |row: u64| (has_taken || given(row) == waiting(row)).then_some(row);
        let leaves = |row: u64| (spare(row).is_none() && waiting(row) > 0).then(|| row - 1);
        if !has_taken && state.change(me.slot, leaves).is_some() {
            return;
        }
        state.give_one();
        fault::point("condition.passed");
        self.taken -= u64::from(has_taken);
        state.change(me.slot, one_less);
    }
}

/// A row without one that waits and its notice, if it has both.
fn one_less(row: u64) -> Option<u64> {
    (waiting(row) > 0 && given(row) > 0).then(|| row - ONE_GIVEN - 1)
}

/// Returns the waiters, read from the rows.
pub(super) fn sleepers(words: &[AtomicU64]) -> impl Iterator<Item = Sleeper> {
    let rows = words[TABLE..TABLE + ROWS].iter().take(words[USED].load(Acquire).min(ROWS as u64) as usize).zip(0..);
    let rows = rows.map(|(row, slot)| (row.load(Acquire), slot)).filter(|(row, _)| waiting(*row) > 0);
    rows.map(|(row, slot)| Sleeper::from(Member { slot, epoch: (row >> EPOCH_SHIFT) as u32 }))
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    const ME: Member = Member { slot: 3, epoch: 1 };

    fn state_of(words: &[AtomicU64]) -> ConditionState<'_, impl Fn(u16) -> Option<u32>, impl Fn(Member)> {
        ConditionState { words, epoch_of: |slot| (slot == ME.slot).then_some(ME.epoch), wake: |_| () }
    }

    #[test]
    fn rows_of_noise_are_recognised_and_lead_nowhere() {
        let noise =
            [u64::MAX, 1 << 16, u64::from(u16::MAX), COUNT, given_all(), 1 << EPOCH_SHIFT | given_all() | COUNT];
        for (at, value) in [USED, HEALER, TICKET, TABLE, TABLE + 3, ORDER + 3]
            .into_iter()
            .flat_map(|at| noise.map(|value| (at, value)))
        {
            let words: Vec<_> = (0..LEN).map(|_| AtomicU64::new(0)).collect();
            let (state, mut local) = (state_of(&words), LocalWaiters::default());
            let tickets: Vec<_> = (0..2).map(|_| local.enter(&state, ME).unwrap()).collect();
            assert!(local.is_sound(&state, ME));
            words[at].store(value, Release);
            assert!(at != TABLE + 3 || !local.is_sound(&state, ME));
            state.notify(3);
            state.notify_all(Some(ME));
            state.heal(ME);
            assert!(sleepers(&words).count() <= ROWS);
            let has_taken = local.take(&state, ME, tickets[0]);
            local.leave(&state, ME, tickets[0], has_taken);
            local.leave(&state, ME, tickets[1], false);
            state.waiting();
        }
    }

    fn given_all() -> u64 {
        COUNT << COUNT_BITS
    }
}
