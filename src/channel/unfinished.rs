//! Which process holds how many unfinished items of a joinable queue. The rows are part of the state at the top of
//! [`channel_core`](super::channel_core).

use super::ring::{Ring, word};
use crate::shm::atomic::AtomicU64;
use crate::shm::family::Member;
use std::sync::atomic::Ordering::*;

/// Rows of the table.
const HOLDERS: usize = 96;

/// The holder of what nobody else has a row for.
const ANYBODY: u64 = u64::MAX;

pub(super) struct Unfinished<'a>(pub(super) &'a Ring);

impl Unfinished<'_> {
    fn rows(&self) -> impl Iterator<Item = (&AtomicU64, &AtomicU64)> {
        let words = &self.0.region().words()[word::HOLDERS..word::HOLDERS + 2 * HOLDERS];
        words.chunks_exact(2).map(|row| (&row[0], &row[1]))
    }

    fn is_listed(&self, holder: u64) -> bool {
        holder == ANYBODY || holder != 0 && self.0.family().is_listed(Member::from_bits(holder))
    }

    /// Notes that `me` has one more unfinished item. Under the get lock, before the commit.
    pub(super) fn add(&self, me: Member) {
        if let Some((_, count)) = self.rows().find(|(holder, _)| holder.load(Acquire) == me.to_bits()) {
            count.fetch_add(1, AcqRel);
            return;
        }
        let mut rows = self.rows().take(HOLDERS - 1);
        // A row without items is as good as none: its process gets another with its next item.
        let is_free =
            |holder: &AtomicU64, count: &AtomicU64| count.load(Acquire) == 0 || !self.is_listed(holder.load(Acquire));
        match rows.find(|(holder, count)| is_free(holder, count)) {
            Some((holder, count)) => {
                holder.store(0, Release);
                count.store(1, Release);
                holder.store(me.to_bits(), Release);
            }
            // More such consumers than rows: the last row is everybody's and outlives its processes.
            None => self.rows().skip(HOLDERS - 1).for_each(|(holder, count)| {
                count.fetch_add(1, AcqRel);
                holder.store(ANYBODY, Release);
            }),
        }
    }

    /// Notes that one item is finished: one that `me` holds, or else one of another process. False if there is none.
    pub(super) fn remove_one(&self, me: Member) -> bool {
        let me = me.to_bits();
        let finish = |count: &AtomicU64| count.fetch_update(AcqRel, Acquire, |count| count.checked_sub(1)).is_ok();
        let mine = self.rows().find(|(holder, _)| holder.load(Acquire) == me).is_some_and(|(_, count)| finish(count));
        let mut others = self.rows().filter(|(holder, _)| self.is_listed(holder.load(Acquire)));
        mine || others.any(|(_, count)| finish(count))
    }

    /// Returns `true` if a living process holds one.
    pub(super) fn has_any(&self) -> bool {
        self.rows().any(|(holder, count)| count.load(Acquire) != 0 && self.is_listed(holder.load(Acquire)))
    }
}
