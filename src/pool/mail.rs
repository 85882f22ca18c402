//! What is large goes through a pipe beside the lane, and never under the pool's lock, for a copy of many megabytes takes
//! longer than others may be held up. Results lie in their pipe until somebody fetches them: their caller, at best. Orders
//! are given under the lock, and sent by whoever has given them; their worker waits for them.

use super::group::{Block, Group};
use crate::channel::{Receiver, Sender};
use crate::error::{Error, ErrorKind, Result};
use crate::wire::Sealed;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::*};
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

/// What goes to one worker beside its lane.
pub(super) struct Outbox {
    pipe: Mutex<Sender<Sealed>>,
    /// Numbers of orders that were given, and what their worker waits for.
    waiting: Mutex<VecDeque<(u32, Sealed)>>,
    /// How many those are.
    count: AtomicUsize,
}

/// An order that cannot be sent.
pub(super) struct Unsent {
    pub(super) number: u32,
    pub(super) error: Error,
    /// Nothing can be sent in its place either: its worker waits for ever.
    pub(super) is_final: bool,
}

impl Outbox {
    pub(super) fn new(pipe: Sender<Sealed>) -> Arc<Self> {
        Arc::new(Self { pipe: Mutex::new(pipe), waiting: Mutex::default(), count: AtomicUsize::new(0) })
    }

    fn change<T>(&self, change: impl FnOnce(&mut VecDeque<(u32, Sealed)>) -> T) -> T {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut waiting);
        self.count.store(waiting.len(), Release);
        result
    }

    /// Order `number` was given. Under the pool's lock, so that they stay in order.
    pub(super) fn add(&self, number: u32, order: Sealed) {
        self.change(|waiting| waiting.push_back((number, order)));
    }

    /// Nothing of order `number` is wanted any more, and if it is not on its way already an empty one does.
    pub(super) fn forget(&self, number: u32) {
        if !self.is_empty() {
            let nothing = |(of, order): &mut (u32, Sealed)| {
                if *of == number {
                    *order = Sealed::new(Vec::new(), Vec::new());
                }
            };
            self.change(|waiting| waiting.iter_mut().for_each(nothing));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Acquire) == 0
    }

    /// Sends what waits, as far as there is room; if somebody else is at it, that one sees to all of it.
    #[must_use]
    pub(super) fn send(&self) -> Vec<Unsent> {
        let mut unsent: Vec<Unsent> = Vec::new();
        while !self.is_empty() {
            let mut pipe = match self.pipe.try_lock() {
                Ok(pipe) => pipe,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return unsent,
            };
            while let Some((number, order)) = self.change(VecDeque::pop_front) {
                let Err(error) = pipe.try_send(order) else { continue };
                match error.kind() {
                    // What is under way makes room, and that is told.
                    ErrorKind::Full => {
                        self.change(|waiting| waiting.push_front((number, error.into_inner())));
                        return unsent;
                    }
                    // It is gone; its exit will be told.
                    ErrorKind::Closed => self.change(VecDeque::clear),
                    _ => {
                        let is_final = unsent.last().is_some_and(|last| last.number == number);
                        unsent.push(Unsent { number, error: error.into_error(), is_final });
                        match is_final {
                            true => self.change(VecDeque::clear),
                            false => self.change(|waiting| {
                                waiting.push_front((number, Sealed::new(Vec::new(), Vec::new())));
                            }),
                        }
                    }
                }
            }
        }
        unsent
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;
    use crate::channel;

    fn order(byte: u8, len: usize) -> Sealed {
        Sealed::new(vec![byte; len], Vec::new())
    }

    fn next(receiver: &mut Receiver<Sealed>) -> Option<(u8, usize)> {
        let bytes = receiver.try_recv().ok()?.open().ok()?.bytes;
        Some((bytes.first().copied().unwrap_or_default(), bytes.len()))
    }

    /// Whoever gives and takes back orders does so under the pool's lock.
    #[test]
    fn nobody_waits_for_somebody_else_who_sends() {
        let (sender, mut receiver) = channel::simplex::<Sealed>().unwrap();
        let outbox = Outbox::new(sender);
        {
            let _sends = outbox.pipe.lock();
            (0..3).for_each(|n| outbox.add(n, order(n as u8 + 1, 5)));
            outbox.forget(1);
            assert!(outbox.send().is_empty() && !outbox.is_empty() && next(&mut receiver).is_none());
        }
        assert!(outbox.send().is_empty() && outbox.is_empty());
        let all: Vec<_> = std::iter::from_fn(|| next(&mut receiver)).collect();
        assert_eq!(all, [(1, 5), (0, 0), (3, 5)]);
    }

    #[test]
    fn what_finds_no_room_is_kept_in_order_and_what_nobody_takes_is_not() {
        let (sender, mut receiver) = channel::simplex::<Sealed>().unwrap();
        let outbox = Outbox::new(sender);
        // As many as there is room for, and three more.
        let (mut given, mut more) = (0, 0);
        while more < 3 {
            outbox.add(given.into(), order(given, 1 << 20));
            assert!(outbox.send().is_empty());
            (given, more) = (given + 1, more + usize::from(!outbox.is_empty()));
        }
        let mut taken = 0;
        while let Some((byte, len)) = next(&mut receiver) {
            assert_eq!((byte, len), (taken, 1 << 20));
            taken += 1;
            assert!(outbox.send().is_empty());
        }
        assert!(outbox.is_empty() && taken == given);
        outbox.add(3, order(3, 1));
        drop(receiver);
        assert!(outbox.send().is_empty() && outbox.is_empty());
    }
}
