//! The side channel of a worker: pipes beside its lane, for payloads that are large or bring descriptors.
//!
//! A copy of many megabytes takes longer than the pool's lock may be held, so none is made under it. A large result stays in its pipe until
//! its caller fetches it, or, after a while, the driver. A large order is given under the lock and sent after it is released, by the same
//! thread; its worker waits for it.

use super::batch::ResultBatch;
use crate::channel::lane::Marker;
use crate::channel::{Receiver, Sender};
use crate::error::{Error, ErrorKind, Result};
use crate::os::sync::lock;
use crate::wire::EncodedMessage;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*, fence};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

/// Large results of one worker.
pub(super) struct SideResults {
    pipe: Mutex<Receiver<EncodedMessage>>,
    /// The owners of the results in the pipe, in order.
    expected: Mutex<VecDeque<Expected>>,
    /// A result was missing or could not be read: the worker is to be killed.
    is_damaged: AtomicBool,
    /// Has the pool look at this worker.
    marker: Marker,
}

/// A call, as far as results that are fetched for it go.
pub(super) trait Recipient: Send + Sync {
    /// The announced result has been fetched.
    fn fetched(&self, batch: ResultBatch);
}

struct Expected {
    recipient: Arc<dyn Recipient>,
    index: u64,
    tag: u8,
}

impl SideResults {
    pub(super) fn new(pipe: Receiver<EncodedMessage>, marker: Marker) -> Arc<Self> {
        let (expected, is_damaged) = Default::default();
        Arc::new(Self { pipe: Mutex::new(pipe), expected, is_damaged, marker })
    }

    pub(super) fn is_damaged(&self) -> bool {
        self.is_damaged.load(Relaxed)
    }

    /// A result that was announced lies there, or the pipe is damaged.
    fn next(&self, pipe: &mut Receiver<EncodedMessage>) -> Result<EncodedMessage> {
        pipe.try_recv().map_err(|error| {
            let is_damage = matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Empty);
            if is_damage {
                self.is_damaged.store(true, Relaxed);
                self.marker.mark();
            }
            match error.kind() {
                ErrorKind::Empty => Error::new(ErrorKind::Corrupt, "the result is not where its worker said it put it"),
                _ => error,
            }
        })
    }

    fn expected(&self) -> MutexGuard<'_, VecDeque<Expected>> {
        lock(&self.expected)
    }

    /// The first message: the initializer's report.
    pub(super) fn report(&self) -> Result<EncodedMessage> {
        lock(&self.pipe).try_recv()
    }

    /// The next result in the pipe is that of item `index`. It is announced after this.
    pub(super) fn expect(&self, recipient: Arc<dyn Recipient>, index: u64, tag: u8) {
        self.expected().push_back(Expected { recipient, index, tag });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.expected().is_empty()
    }

    /// Fetches all results that lie there, for all calls. If another thread is at it, that thread fetches them.
    pub(super) fn fetch(&self) {
        while !self.is_empty() {
            let mut pipe = match self.pipe.try_lock() {
                Ok(pipe) => pipe,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            loop {
                let next = self.expected().pop_front();
                let Some(Expected { recipient, index, tag }) = next else { break };
                let encoded = self.next(&mut pipe).map(|encoded| (tag, encoded));
                recipient.fetched(ResultBatch::One(index, Some(encoded)));
            }
        }
    }
}

/// Large orders for one worker.
pub(super) struct SideOrders {
    seat: usize,
    pipe: Mutex<Sender<EncodedMessage>>,
    /// Orders that were given and not sent yet, by their numbers.
    waiting: Mutex<VecDeque<(u32, EncodedMessage)>>,
    /// How many those are, with the one that is being sent.
    count: AtomicUsize,
    /// Another thread wanted to send while one was at it.
    is_wanted: AtomicBool,
}

/// The message that replaces an order that was taken back or cannot be sent. No order is empty: its worker
/// starts no item of it.
fn nothing() -> EncodedMessage {
    EncodedMessage::new(Vec::new(), Vec::new())
}

/// An order that cannot be sent.
pub(super) struct Unsent {
    pub(super) number: u32,
    pub(super) error: Error,
    /// Nothing can be sent in its place either: its worker waits for ever.
    pub(super) is_final: bool,
}

impl SideOrders {
    pub(super) fn new(seat: usize, pipe: Sender<EncodedMessage>) -> Arc<Self> {
        let (waiting, count, is_wanted) = Default::default();
        Arc::new(Self { seat, pipe: Mutex::new(pipe), waiting, count, is_wanted })
    }

    /// Returns the seat of its worker.
    pub(super) fn seat(&self) -> usize {
        self.seat
    }

    fn change<T>(&self, change: impl FnOnce(&mut VecDeque<(u32, EncodedMessage)>) -> T) -> T {
        let mut waiting = lock(&self.waiting);
        let result = change(&mut waiting);
        self.count.store(waiting.len(), Release);
        result
    }

    /// Order `number` was given. Under the pool's lock, so that they stay in order.
    pub(super) fn add(&self, number: u32, order: EncodedMessage) {
        self.change(|waiting| waiting.push_back((number, order)));
    }

    /// Nothing of order `number` is wanted any more, and if it is not on its way already a [`nothing`] does.
    pub(super) fn forget(&self, number: u32) {
        if !self.is_empty() {
            let clear = |(of, order): &mut (u32, EncodedMessage)| {
                if *of == number {
                    *order = nothing();
                }
            };
            self.change(|waiting| waiting.iter_mut().for_each(clear));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Acquire) == 0
    }

    /// Returns `true` if order `number` is still to be sent, or is being sent.
    pub(super) fn has(&self, number: u32) -> bool {
        !self.is_empty() && self.change(|waiting| waiting.iter().any(|(of, _)| *of == number))
    }

    /// Sends waiting orders, as far as there is room. If another thread is at it, that thread sends them.
    #[must_use]
    pub(super) fn send(&self) -> Vec<Unsent> {
        let mut unsent = Vec::new();
        loop {
            // Between the two of us one sees the other: I that it is at it, or it that there is more, or room again.
            self.is_wanted.store(true, Release);
            fence(SeqCst);
            let mut pipe = match self.pipe.try_lock() {
                Ok(pipe) => pipe,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return unsent,
            };
            self.is_wanted.swap(false, AcqRel);
            self.send_by(&mut pipe, &mut unsent);
            drop(pipe);
            fence(SeqCst);
            if !self.is_wanted.load(Acquire) {
                return unsent;
            }
        }
    }

    /// An order that is being sent keeps its place, empty, so that the queue does not look empty.
    fn take_first(&self) -> Option<(u32, EncodedMessage)> {
        let mut waiting = lock(&self.waiting);
        waiting.front_mut().map(|(number, order)| (*number, std::mem::replace(order, nothing())))
    }

    fn send_by(&self, pipe: &mut Sender<EncodedMessage>, unsent: &mut Vec<Unsent>) {
        while let Some((number, order)) = self.take_first() {
            let Err(error) = pipe.try_send(order) else {
                self.change(VecDeque::pop_front);
                continue;
            };
            match error.kind() {
                // Orders under way make room, which the worker reports.
                ErrorKind::Full => {
                    let order = error.into_inner();
                    return self.change(|waiting| {
                        if let Some(first) = waiting.front_mut() {
                            first.1 = order;
                        }
                    });
                }
                // It is gone; its exit will be reported.
                ErrorKind::Closed => self.change(VecDeque::clear),
                _ => {
                    let is_final = unsent.last().is_some_and(|last| last.number == number);
                    unsent.push(Unsent { number, error: error.into_error(), is_final });
                    if is_final {
                        self.change(VecDeque::clear);
                    }
                }
            }
        }
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;
    use crate::channel;

    fn order(byte: u8, len: usize) -> EncodedMessage {
        EncodedMessage::new(vec![byte; len], Vec::new())
    }

    fn next(receiver: &mut Receiver<EncodedMessage>) -> Option<(u8, usize)> {
        let bytes = receiver.try_recv().ok()?.open().ok()?.bytes;
        Some((bytes.first().copied().unwrap_or_default(), bytes.len()))
    }

    /// Orders are given and taken back under the pool's lock, where nothing may wait.
    #[test]
    fn order_added_while_another_thread_sends_is_sent_by_it() {
        let (sender, mut receiver) = channel::simplex::<EncodedMessage>().unwrap();
        let side_orders = SideOrders::new(0, sender);
        {
            let _sends = side_orders.pipe.lock();
            (0..3).for_each(|n| side_orders.add(n, order(n as u8 + 1, 5)));
            side_orders.forget(1);
            assert!(side_orders.send().is_empty() && !side_orders.is_empty() && next(&mut receiver).is_none());
        }
        assert!(side_orders.send().is_empty() && side_orders.is_empty());
        let all: Vec<_> = std::iter::from_fn(|| next(&mut receiver)).collect();
        assert_eq!(all, [(1, 5), (0, 0), (3, 5)]);
    }

    /// Otherwise a thread that learns of room while an order is being sent would not come back for it.
    #[test]
    fn order_that_is_being_sent_still_counts_and_a_request_meanwhile_is_kept() {
        let (sender, _receiver) = channel::simplex::<EncodedMessage>().unwrap();
        let side_orders = SideOrders::new(0, sender);
        side_orders.add(0, order(1, 5));
        let _sends = side_orders.pipe.lock();
        assert!(side_orders.take_first().is_some_and(|(number, order)| number == 0 && order.bytes() == [1; 5]));
        assert!(!side_orders.is_empty());
        assert!(side_orders.send().is_empty() && side_orders.is_wanted.load(Acquire));
    }

    #[test]
    fn orders_arrive_in_order_from_several_sending_threads() {
        let (sender, mut receiver) = channel::simplex::<EncodedMessage>().unwrap();
        let side_orders = SideOrders::new(0, sender);
        // Two of these find no room at once.
        let large = 900 << 10;
        let (start, is_over) = (std::time::Instant::now(), AtomicBool::new(false));
        let all = std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !is_over.load(Acquire) {
                        assert!(side_orders.send().is_empty());
                    }
                });
            }
            (0..60).for_each(|n| side_orders.add(n, order(n as u8 + 1, large)));
            let mut all = Vec::new();
            while all.len() < 60 && start.elapsed() < std::time::Duration::from_secs(20) {
                // At any moment: an order that has not arrived still waits.
                let is_empty = side_orders.is_empty();
                match next(&mut receiver) {
                    Some((byte, _)) => all.push(byte),
                    None => assert!(!is_empty, "it is neither waiting nor there"),
                }
            }
            is_over.store(true, Release);
            all
        });
        assert_eq!(all, (1..=60).collect::<Vec<u8>>());
    }

    #[test]
    fn orders_without_room_are_kept_in_order_and_dropped_with_the_receiver() {
        let (sender, mut receiver) = channel::simplex::<EncodedMessage>().unwrap();
        let side_orders = SideOrders::new(0, sender);
        // As many as there is room for, and three more.
        let (mut given, mut more) = (0, 0);
        while more < 3 {
            side_orders.add(given.into(), order(given, 1 << 20));
            assert!(side_orders.send().is_empty());
            (given, more) = (given + 1, more + usize::from(!side_orders.is_empty()));
        }
        let mut taken = 0;
        while let Some((byte, len)) = next(&mut receiver) {
            assert_eq!((byte, len), (taken, 1 << 20));
            taken += 1;
            assert!(side_orders.send().is_empty());
        }
        assert!(side_orders.is_empty() && taken == given);
        side_orders.add(3, order(3, 1));
        drop(receiver);
        assert!(side_orders.send().is_empty() && side_orders.is_empty());
    }
}
