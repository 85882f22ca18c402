//! How a task finds out that it has been asked to stop.

use super::{asked, word};
use crate::shm::region::Region;
use crate::wait::{WaitQueue, until_blocking};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

/// Where a task looks whether it has been asked to stop.
#[derive(Clone)]
pub(crate) struct StopSign {
    pub(super) region: Arc<Region>,
    pub(super) number: u32,
    pub(super) index: u32,
}

impl StopSign {
    /// The same for another item of the order.
    pub(crate) fn of_item(&self, index: u32) -> Self {
        Self { index, ..self.clone() }
    }

    fn item(&self) -> u64 {
        asked(self.number, self.index)
    }

    /// Returns `true` if it is the same item's.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.item() == other.item()
    }

    pub(crate) fn is_shown(&self) -> bool {
        self.region.words()[word::ASKED].load(Acquire) == self.item()
    }

    /// From now on a thread waits for it, until [`dismiss`](Self::dismiss).
    pub(crate) fn watch(&self) {
        self.region.words()[word::WATCHED].store(self.item(), Release);
    }

    /// Blocks until it is shown (true) or need not be watched any more.
    pub(crate) fn blocking_wait(&self) -> io::Result<bool> {
        let queue = WaitQueue::new(self.region.clone(), word::STOP, None)?;
        let is_over = || self.region.words()[word::WATCHED].load(Acquire) != self.item();
        let shown = until_blocking(&queue, None, || match self.is_shown() {
            false if is_over() => Some(false),
            shown => shown.then_some(true),
        })?;
        Ok(shown == Some(true))
    }

    /// The item is done: waiting threads need not wait any more.
    pub(crate) fn dismiss(&self) {
        self.region.words()[word::WATCHED].store(0, Release);
        if let Ok(queue) = WaitQueue::new(self.region.clone(), word::STOP, None) {
            queue.notify_all();
        }
    }
}
