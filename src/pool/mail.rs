//! Large results lie in a worker's pipe until somebody fetches them: their caller, at best, and never under the pool's
//! lock, for a copy of many megabytes takes longer than others may be held up.

use super::group::{Block, Group};
use crate::channel::Receiver;
use crate::error::Result;
use crate::wire::Sealed;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::Waker;

/// What comes from one worker beside its lane.
pub(super) struct Mail {
    pipe: Mutex<Receiver<Sealed>>,
    /// Whose results lie in the pipe, in order.
    expected: Mutex<VecDeque<Expected>>,
}

struct Expected {
    group: Arc<Group>,
    index: u64,
    tag: u8,
}

impl Mail {
    pub(super) fn new(pipe: Receiver<Sealed>) -> Arc<Self> {
        Arc::new(Self { pipe: Mutex::new(pipe), expected: Mutex::default() })
    }

    fn expected(&self) -> MutexGuard<'_, VecDeque<Expected>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What lies there before anything is expected: the initializer's report.
    pub(super) fn report(&self) -> Result<Sealed> {
        self.pipe.lock().unwrap_or_else(PoisonError::into_inner).try_recv()
    }

    /// The next result in the pipe is that of item `index`. Whoever waits for it is to be woken, and how many items of
    /// its are still out.
    #[must_use]
    pub(super) fn expect(self: &Arc<Self>, group: &Arc<Group>, index: u64, tag: u8) -> Option<(Waker, usize)> {
        self.expected().push_back(Expected { group: group.clone(), index, tag });
        group.announce(self)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.expected().is_empty()
    }

    /// Fetches all that lies there, for whomever; if somebody else is at it, that one sees to all of it.
    pub(super) fn fetch(&self) {
        while !self.is_empty() {
            let mut pipe = match self.pipe.try_lock() {
                Ok(pipe) => pipe,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            loop {
                let next = self.expected().pop_front();
                let Some(Expected { group, index, tag }) = next else { break };
                let sealed = pipe.try_recv().map(|sealed| (tag, sealed));
                group.fetched(Block::Single(index, Some(sealed)));
            }
        }
    }
}
