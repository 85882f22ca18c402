//! Whose turn it is with a read-write lock: readers side by side or one writer, and neither starves.
//!
//! # State
//! [`LEN`] words at any place in an object's region. [`WANTED`]: a [`Member`] in which a writer waits, or 0; new readers
//! stand back for it. [`PHASE`]: how often a writer has let go; a reader that has seen one come and go since it began to
//! wait stands back no more. Then a [`Holders`] of [`MAX`](super::holders::MAX) shares: a reader holds one, a writer all.
//!
//! # Moves
//! | from -> to | who | ordering | wakes |
//! |---|---|---|---|
//! | one share taken (`holders`) | a reader, unless it stands back | - | - |
//! | WANTED 0, or of a dead member -> me | a writer that finds the lock held | SeqCst CAS | - |
//! | all shares taken (`holders`) | a writer | - | - |
//! | WANTED me -> 0 | the last waiting writer of this process, as it stops waiting | SeqCst CAS | unless it got the lock: all readers, one writer |
//! | one share given (`holders`) | a reader | - | the last: one writer |
//! | PHASE + 1, then all shares given (`holders`) | the writer | Release | all readers, one writer |
//!
//! # Invariants
//! 1. A reader that sleeps does so because of a writer that holds the lock, or of one that waits; either wakes it.
//! 2. A writer that sleeps has seen a share held; whoever gives the last one wakes a writer.
//! 3. A reader waits for one writer that came after it at most, a writer for the readers that were there or waited
//!    when the last writer let go; and for newcomers of its own kind no longer than `patience` allows.
//! 4. WANTED is a live member's only while a writer of it waits: a process counts its own under a mutex of its own.
//!
//! # Death
//! | killed | survivors see |
//! |---|---|
//! | reading | its share is free again: nobody is told, for it changed nothing |
//! | writing | `is_poisoned`: each reader, until the first writer, that one included |
//! | waiting to write, or after WANTED, before the wake | WANTED of an unlisted member, which counts as 0 |
//! | between PHASE and the give | a phase too many: readers that waited go first, as they would anyway |
//! | at any move of the ledger; waiting, or with its notice | see there, and `wait::event` |
//!
//! # Cancel
//! | dropped | what happens |
//! |---|---|
//! | a read that waits | nothing has been taken |
//! | a write that waits | nothing has been taken; WANTED is cleared, and those who stood back for it are woken |

use super::holders::{self, Holders, MAX, Taken};
use crate::os::fault;
use crate::os::sync::unpoisoned;
use crate::shm::atomic::{AtomicU64, Mutex};
use crate::shm::family::Member;
use crate::shm::latch::Lives;
use std::sync::atomic::{AtomicUsize, Ordering::*};

const WANTED: usize = 0;
const PHASE: usize = 1;
const HOLDERS: usize = 2;
/// Words that it takes up.
pub(super) const LEN: usize = HOLDERS + holders::LEN;

/// What this process knows of itself.
#[derive(Default)]
pub(super) struct Own {
    /// Which row of the ledger is ours.
    row: Row,
    /// Writers of this process that have found the lock held and wait.
    waiting_writers: Mutex<usize>,
}

struct Row(AtomicUsize);

impl Default for Row {
    fn default() -> Self {
        Self(AtomicUsize::new(usize::MAX))
    }
}

/// The words, wherever they are.
pub(super) struct RwLockState<'a, L> {
    words: &'a [AtomicU64],
    own: &'a Own,
    lives: &'a L,
}

impl<'a, L: Lives> RwLockState<'a, L> {
    #[inline]
    pub(super) fn new(words: &'a [AtomicU64], own: &'a Own, lives: &'a L) -> Self {
        debug_assert_eq!(words.len(), LEN);
        Self { words, own, lives }
    }

    /// Nobody's turn yet, before anybody else can see it.
    pub(super) fn fill(words: &[AtomicU64]) {
        Holders::<L>::fill(&words[HOLDERS..], MAX);
    }

    #[inline]
    fn holders(&self) -> Holders<'a, L> {
        Holders::new(&self.words[HOLDERS..], self.lives)
    }

    fn wanted(&self) -> &'a AtomicU64 {
        &self.words[WANTED]
    }

    /// What a reader that begins to wait now has to remember.
    pub(super) fn phase(&self) -> u64 {
        self.words[PHASE].load(Acquire)
    }

    fn is_listed(&self, wanted: u64) -> bool {
        wanted != 0 && self.lives.is_listed(Member::from_bits(wanted))
    }

    /// Whether a reader that came in phase `since` lets a waiting writer go first.
    #[inline]
    fn stands_back(&self, since: u64) -> bool {
        let wanted = self.wanted().load(SeqCst);
        wanted != 0 && self.phase() == since && self.is_listed(wanted)
    }

    /// A share for a reader that came in phase `since`.
    #[inline]
    pub(super) fn take_read(&self, me: Member, since: u64) -> Option<Taken> {
        if self.stands_back(since) {
            return None;
        }
        self.holders().take_one(me, &self.own.row.0)
    }

    /// All shares.
    #[inline]
    pub(super) fn take_write(&self, me: Member) -> Option<Taken> {
        self.holders().take_all(me, &self.own.row.0)
    }

    /// All shares for a writer that has just found too few; if there still are too few, new readers stand back now.
    pub(super) fn take_write_or_announce(&self, me: Member) -> Option<Taken> {
        let seen = self.wanted().load(SeqCst);
        if !self.is_listed(seen) {
            // If it fails somebody else's wish is there.
            let _ = self.wanted().compare_exchange(seen, me.to_bits(), SeqCst, Relaxed);
            fault::point("write.announced");
        }
        // Between our look and our wish the last share may have been given: look once more.
        self.take_write(me)
    }

    fn count_waiting(&self, count: impl FnOnce(&mut usize)) -> usize {
        let mut waiting = unpoisoned(self.own.waiting_writers.lock());
        count(&mut waiting);
        *waiting
    }

    /// A writer of this process begins to wait: before its first wish.
    pub(super) fn begin_wait(&self) {
        self.count_waiting(|waiting| *waiting += 1);
    }

    /// A writer of this process waits no more. True if nobody wishes any more: if it did not get the lock, readers may have stood
    /// back for nothing.
    #[must_use]
    pub(super) fn end_wait(&self, me: Member) -> bool {
        let mut is_withdrawn = false;
        self.count_waiting(|waiting| {
            *waiting -= 1;
            is_withdrawn = *waiting == 0 && self.wanted().compare_exchange(me.to_bits(), 0, SeqCst, Relaxed).is_ok();
        });
        if is_withdrawn {
            fault::point("write.withdrawn");
        }
        is_withdrawn
    }

    /// True if it was the last share that was missing: a writer may take all. `None`: the ledger is damaged.
    #[must_use]
    #[inline]
    pub(super) fn give_read(&self, row: usize) -> Option<bool> {
        self.holders().give_one(row).map(|free| free == MAX)
    }

    #[inline]
    pub(super) fn give_write(&self, row: usize) {
        self.words[PHASE].fetch_add(1, Release);
        fault::point("write.phase");
        // Damaged or not, everybody is told.
        self.holders().give_all(row);
    }

    /// Whether nothing can be taken or given any more.
    pub(super) fn is_damaged(&self) -> bool {
        self.holders().is_damaged()
    }

    /// See [`Holders::is_first_report`].
    pub(super) fn is_first_report(&self) -> bool {
        self.holders().is_first_report()
    }

    /// Who writes, and who reads.
    pub(super) fn list(words: &[AtomicU64]) -> (Option<Member>, Vec<(Member, u32)>) {
        let holders = Holders::<L>::list(&words[HOLDERS..]);
        let (writer, readers): (Vec<_>, Vec<_>) = holders.into_iter().partition(|(_, held)| *held == MAX);
        (writer.first().map(|(member, _)| *member), readers)
    }
}
