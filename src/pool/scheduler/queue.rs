//! The calls that have chunks to give out. Each is in the queue once, and they take turns.

use crate::pool::call_items::CallItems;
use std::collections::VecDeque;
use std::sync::Arc;

#[derive(Default)]
pub(super) struct Queue {
    groups: VecDeque<Arc<CallItems>>,
    /// About so many have nothing left to give out.
    empty: usize,
}

impl IntoIterator for Queue {
    type Item = Arc<CallItems>;
    type IntoIter = std::collections::vec_deque::IntoIter<Arc<CallItems>>;

    fn into_iter(self) -> Self::IntoIter {
        self.groups.into_iter()
    }
}

impl Queue {
    pub(super) fn front(&self) -> Option<&Arc<CallItems>> {
        self.groups.front()
    }

    pub(super) fn pop_front(&mut self) -> Option<Arc<CallItems>> {
        self.groups.pop_front()
    }

    pub(super) fn push_back(&mut self, group: Arc<CallItems>) {
        self.groups.push_back(group);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<CallItems>> {
        self.groups.iter()
    }

    pub(super) fn get(&self, at: usize) -> Option<&Arc<CallItems>> {
        self.groups.get(at)
    }

    /// The call there goes before all others.
    pub(super) fn bring_forward(&mut self, at: usize) {
        let group = self.groups.remove(at);
        group.into_iter().for_each(|group| self.groups.push_front(group));
    }

    pub(super) fn len(&self) -> usize {
        self.groups.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// One of them has no chunks left. When that is so for half of them those are dropped: a pool whose
    /// workers are busy for long may be asked for much that is given up again meanwhile.
    pub(super) fn was_emptied(&mut self) {
        self.empty += 1;
        if 2 * self.empty < self.groups.len() {
            return;
        }
        self.empty = 0;
        self.groups.retain(|group| {
            let mut items = group.items();
            items.is_queued = items.has_pending();
            items.is_queued
        });
    }
}
