//! The shared state of a read-write lock: readers side by side or one writer, without starvation of either.
//!
//! # State
//! [`LEN`] words at any place in the region of an object. [`WANTED`]: a [`Member`] in which a writer waits, or 0; new readers
//! let it go first. [`PHASE`]: the number of releases by writers. A reader for which PHASE has changed since it began to wait
//! lets no writer go first any more. Then a table of [`Holders`] with [`MAX`](super::holders::MAX) shares: a reader holds one,
//! a writer all.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | one share taken (`holders`) | a reader, unless it lets a writer go first | - | - |
//! | WANTED 0, or of a dead member -> me | a writer that finds the lock held | SeqCst CAS | - |
//! | all shares taken (`holders`) | a writer | - | - |
//! | WANTED me -> 0 | the last waiting writer of this process, as it stops waiting | SeqCst CAS | unless it got the lock: all readers, one writer |
//! | one share given (`holders`) | a reader | - | the last: one writer |
//! | PHASE + 1, then all shares given (`holders`) | the writer | Release | all readers, one writer |
//!
//! # Invariants
//! 1. A reader sleeps because a writer holds the lock or waits for it. Either writer wakes it.
//! 2. A writer sleeps because it has seen a share held. The release of the last share wakes a writer.
//! 3. A reader waits for at most one writer that came after it. A writer waits for the readers that were there or waited when
//!    the last writer released. Each waits for newcomers of its own kind no longer than `fairness` allows.
//! 4. WANTED is a live member's only while a writer of it waits: a process counts its own under a mutex of its own.
//!
//! # Death
//! | killed | survivors see |
//! |---|---|
//! | reading | its share is free again, without an error, for it changed nothing |
//! | writing | `is_poisoned`: each reader, until and including the first writer |
//! | waiting to write, or after WANTED, before the wake | WANTED of an unlisted member, which counts as 0 |
//! | between PHASE and the give | a phase too many: readers that waited go first, as they would anyway |
//! | at any move of the table; waiting, or with its notification | see `holders` and `wait::sleepers` |
//!
//! # Cancel
//! | dropped | effect |
//! |---|---|
//! | a read that waits | nothing has been taken |
//! | a write that waits | nothing has been taken; WANTED is cleared, and readers and writers behind it are woken |

use super::holders::{self, Holders, MAX, Taken};
use crate::os::fault;
use crate::os::sync::unpoisoned;
use crate::shm::atomic::{AtomicU64, Mutex};
use crate::shm::family::Member;
use crate::shm::robust_lock::Liveness;
use std::sync::atomic::{AtomicUsize, Ordering::*};

const WANTED: usize = 0;
const PHASE: usize = 1;
const HOLDERS: usize = 2;
/// Words that it takes up.
pub(super) const LEN: usize = HOLDERS + holders::LEN;

/// The part of the state that belongs to this process.
#[derive(Default)]
pub(super) struct Own {
    /// Our row in the table of holders.
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

impl<'a, L: Liveness> RwLockState<'a, L> {
    #[inline]
    pub(super) fn new(words: &'a [AtomicU64], own: &'a Own, lives: &'a L) -> Self {
        debug_assert_eq!(words.len(), LEN);
        Self { words, own, lives }
    }

    /// Initialises an unlocked state, before any other process can see it.
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

    /// The phase in which a reader that begins to wait now began.
    pub(super) fn phase(&self) -> u64 {
        self.words[PHASE].load(Acquire)
    }

    fn is_listed(&self, wanted: u64) -> bool {
        wanted != 0 && self.lives.is_listed(Member::from_bits(wanted))
    }

    /// Returns `true` if a reader that came in phase `since` lets a waiting writer go first.
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

    /// All shares, for a writer that has just found too few. If there still are too few, new readers let it go first from now on.
    pub(super) fn take_write_or_announce(&self, me: Member) -> Option<Taken> {
        let seen = self.wanted().load(SeqCst);
        if !self.is_listed(seen) {
            // If it fails another writer has announced itself.
            let _ = self.wanted().compare_exchange(seen, me.to_bits(), SeqCst, Relaxed);
            fault::point("write.announced");
        }
        // The last share may have been given between our attempt and our announcement: try once more.
        self.take_write(me)
    }

    fn count_waiting(&self, count: impl FnOnce(&mut usize)) -> usize {
        let mut waiting = unpoisoned(self.own.waiting_writers.lock());
        count(&mut waiting);
        *waiting
    }

    /// A writer of this process begins to wait: before its first announcement.
    pub(super) fn begin_wait(&self) {
        self.count_waiting(|waiting| *waiting += 1);
    }

    /// A writer of this process waits no more. True if that was the last announcement: unless the writer got the lock, readers may
    /// have waited for it in vain.
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

    /// True if it was the last share that was missing: a writer may take all. `None`: the table is damaged.
    #[must_use]
    #[inline]
    pub(super) fn give_read(&self, row: usize) -> Option<bool> {
        self.holders().give_one(row).map(|free| free == MAX)
    }

    #[inline]
    pub(super) fn give_write(&self, row: usize) {
        self.words[PHASE].fetch_add(1, Release);
        fault::point("write.phase");
        // Damaged or not, the caller wakes all.
        self.holders().give_all(row);
    }

    /// Returns `true` if nothing can be taken or given any more.
    pub(super) fn is_damaged(&self) -> bool {
        self.holders().is_damaged()
    }

    /// See [`Holders::is_first_report`].
    pub(super) fn is_first_report(&self) -> bool {
        self.holders().is_first_report()
    }

    /// The writer and the readers.
    pub(super) fn list(words: &[AtomicU64]) -> (Option<Member>, Vec<(Member, u32)>) {
        let holders = Holders::<L>::list(&words[HOLDERS..]);
        let (writer, readers): (Vec<_>, Vec<_>) = holders.into_iter().partition(|(_, held)| *held == MAX);
        (writer.first().map(|(member, _)| *member), readers)
    }
}
