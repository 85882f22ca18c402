//! The side channel of a worker: pipes beside its lane, for payloads that are large or bring descriptors.
//!
//! A copy of many megabytes takes longer than the pool's lock may be held, so none is made under it. A large result stays in its pipe until
//! its caller fetches it, or, after a while, the driver. A large order is given under the lock and sent after it is released, by the same
//! thread; its worker waits for it.
//!
//! Results are told apart by their order, so a worker passes over an order only if all its items were taken back before. One that cannot
//! be sent therefore holds those behind it until the scheduler has taken it back; then an empty message goes in its place.

use super::batch::ResultBatch;
use crate::channel::lane::Marker;
use crate::channel::{Receiver, Sender};
use crate::error::{Error, ErrorKind, Result};
use crate::os::sync::lock;
use crate::wire::EncodedMessage;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, TryLockError, Weak};

/// The receiving end of a side channel, which knows after an error whether the message is out of it.
pub(super) struct Inbox {
    pipe: Receiver<EncodedMessage>,
    /// Messages that were taken out, as a number that wraps around.
    taken: u32,
}

/// A message that could not be received.
pub(super) struct Unreceived {
    pub(super) error: Error,
    /// It may lie there still: the next message would be taken for another.
    pub(super) is_left: bool,
}

impl Inbox {
    pub(super) fn new(pipe: Receiver<EncodedMessage>) -> Self {
        Self { pipe, taken: 0 }
    }

    fn try_recv(&mut self) -> Result<EncodedMessage, Unreceived> {
        let received = self.pipe.try_recv();
        self.note(received)
    }

    pub(super) fn blocking_recv(&mut self) -> Result<EncodedMessage, Unreceived> {
        let received = self.pipe.blocking_recv();
        self.note(received)
    }

    fn note(&mut self, received: Result<EncodedMessage>) -> Result<EncodedMessage, Unreceived> {
        let next = self.taken.wrapping_add(1);
        let is_taken = received.is_ok() || self.pipe.taken() == Some(next);
        if is_taken {
            self.taken = next;
        }
        received.map_err(|error| Unreceived { error, is_left: !is_taken })
    }
}

/// Large results of one worker.
pub(super) struct SideResults {
    pipe: Mutex<Inbox>,
    /// The owners of the results in the pipe, in order.
    expected: Mutex<VecDeque<Expected>>,
    /// A result was missing or could not be received: the worker is to be killed.
    is_damaged: AtomicBool,
    /// The reason. What lies in the pipe is not read any more: the next result may be one that was to be received before.
    damage: OnceLock<Error>,
    /// Has the pool look at this worker.
    marker: Marker,
}

/// A call, as far as results that are fetched for it go.
pub(super) trait Recipient: Send + Sync {
    /// The announced result has been fetched.
    fn fetched(&self, batch: ResultBatch);
}

struct Expected {
    /// As long as it is wanted: a call that is not must not be kept, nor this side channel by it.
    recipient: Weak<dyn Recipient>,
    index: u64,
    tag: u8,
}

impl SideResults {
    pub(super) fn new(pipe: Receiver<EncodedMessage>, marker: Marker) -> Arc<Self> {
        let (expected, is_damaged, damage) = Default::default();
        Arc::new(Self { pipe: Mutex::new(Inbox::new(pipe)), expected, is_damaged, damage, marker })
    }

    pub(super) fn is_damaged(&self) -> bool {
        self.is_damaged.load(Acquire)
    }

    /// Why its worker is to be killed, if it is.
    pub(super) fn damage(&self) -> Option<Error> {
        self.damage.get().map(Error::copy)
    }

    /// A result that was announced lies there, or the pipe is damaged.
    fn next(&self, pipe: &mut Inbox) -> Result<EncodedMessage> {
        if let Some(damage) = self.damage() {
            return Err(damage);
        }
        pipe.try_recv().map_err(|Unreceived { error, is_left }| {
            let error = match error.kind() {
                ErrorKind::Empty => Error::new(ErrorKind::Corrupt, "the result is not where its worker said it put it"),
                _ => error,
            };
            if is_left {
                let _ = self.damage.set(Error::copy(&error));
                self.is_damaged.store(true, Release);
                self.marker.mark();
            }
            error
        })
    }

    fn expected(&self) -> MutexGuard<'_, VecDeque<Expected>> {
        lock(&self.expected)
    }

    /// The first message: the initializer's report.
    pub(super) fn report(&self) -> Result<EncodedMessage> {
        lock(&self.pipe).try_recv().map_err(|unreceived| unreceived.error)
    }

    /// The next result in the pipe is that of item `index`. It is announced after this.
    pub(super) fn expect(&self, recipient: Weak<dyn Recipient>, index: u64, tag: u8) {
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
                if let Some(recipient) = recipient.upgrade() {
                    recipient.fetched(ResultBatch::One(index, Some(encoded)));
                }
            }
        }
    }
}

/// Large orders for one worker.
pub(super) struct SideOrders {
    seat: usize,
    pipe: Mutex<Sender<EncodedMessage>>,
    /// Orders that were given and not sent yet, by their numbers.
    waiting: Mutex<VecDeque<(u32, Waiting)>>,
    /// How many those are, with the one that is being sent.
    count: AtomicUsize,
    /// Another thread wanted to send while one was at it.
    is_wanted: AtomicBool,
}

/// An order that was given, as far as its way through the pipe goes.
enum Waiting {
    Order(EncodedMessage),
    /// Goes through the pipe in the place of an order all of whose items were taken back. No order is empty, so its worker starts no
    /// item of it.
    Nothing,
    /// It keeps its place, so that the queue does not look empty.
    BeingSent,
    /// It could not be sent. It waits until its items are taken back: a worker must not pass over an item that may be its own, as
    /// results are told apart by their order.
    Failed,
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

    fn change<T>(&self, change: impl FnOnce(&mut VecDeque<(u32, Waiting)>) -> T) -> T {
        let mut waiting = lock(&self.waiting);
        let result = change(&mut waiting);
        self.count.store(waiting.len(), Release);
        result
    }

    /// Order `number` was given. Under the pool's lock, so that they stay in order.
    pub(super) fn add(&self, number: u32, order: EncodedMessage) {
        self.change(|waiting| waiting.push_back((number, Waiting::Order(order))));
    }

    /// All items of order `number` were taken back. If it is not on its way already, nothing goes in its place.
    pub(super) fn forget(&self, number: u32) {
        if !self.is_empty() {
            let clear = |(of, order): &mut (u32, Waiting)| {
                if *of == number && !matches!(order, Waiting::BeingSent) {
                    *order = Waiting::Nothing;
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

    /// The first order, which is being sent from now on; `None` if there is none, or it could not be sent before.
    fn take_first(&self) -> Option<(u32, Option<EncodedMessage>)> {
        let mut waiting = lock(&self.waiting);
        let (number, first) = waiting.front_mut()?;
        match std::mem::replace(first, Waiting::BeingSent) {
            Waiting::Order(order) => Some((*number, Some(order))),
            Waiting::Nothing => Some((*number, None)),
            // Only the holder of the pipe sends, so the one that was at it has panicked.
            Waiting::BeingSent | Waiting::Failed => {
                *first = Waiting::Failed;
                None
            }
        }
    }

    fn put_back(&self, content: Waiting) {
        self.change(|waiting| {
            if let Some(first) = waiting.front_mut() {
                first.1 = content;
            }
        });
    }

    fn send_by(&self, pipe: &mut Sender<EncodedMessage>, unsent: &mut Vec<Unsent>) {
        while let Some((number, order)) = self.take_first() {
            let is_nothing = order.is_none();
            let order = order.unwrap_or_else(|| EncodedMessage::new(Vec::new(), Vec::new()));
            let Err(error) = pipe.try_send(order) else {
                self.change(VecDeque::pop_front);
                continue;
            };
            match error.kind() {
                // Orders under way make room, which the worker reports.
                ErrorKind::Full if is_nothing => return self.put_back(Waiting::Nothing),
                ErrorKind::Full => return self.put_back(Waiting::Order(error.into_inner())),
                // It is gone; its exit will be reported.
                ErrorKind::Closed => return self.change(VecDeque::clear),
                _ => {
                    unsent.push(Unsent { number, error: error.into_error(), is_final: is_nothing });
                    match is_nothing {
                        true => self.change(VecDeque::clear),
                        false => self.put_back(Waiting::Failed),
                    }
                    return;
                }
            }
        }
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;
    use crate::channel;
    use crate::wire::Attachment;

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
        let first = side_orders.take_first();
        assert!(first.is_some_and(|(number, order)| number == 0 && order.is_some_and(|order| order.bytes() == [1; 5])));
        assert!(!side_orders.is_empty());
        assert!(side_orders.send().is_empty() && side_orders.is_wanted.load(Acquire));
    }

    /// Otherwise its worker would go on to the next order, whose result would be taken for that of this one.
    #[test]
    fn order_that_cannot_be_sent_holds_those_behind_it_until_its_items_are_taken_back() {
        let (sender, mut receiver) = channel::simplex::<EncodedMessage>().unwrap();
        let side_orders = SideOrders::new(0, sender);
        // More than a message may bring.
        let (_, file) = rustix::pipe::pipe().unwrap();
        let attachments = vec![Attachment::Shared(Arc::new(file)); 100_000];
        side_orders.add(0, EncodedMessage::new(vec![1; 5], attachments));
        side_orders.add(1, order(2, 5));
        let unsent = side_orders.send();
        assert!(unsent.len() == 1 && unsent[0].number == 0 && !unsent[0].is_final);
        assert!(side_orders.send().is_empty() && side_orders.has(0) && next(&mut receiver).is_none());
        side_orders.forget(0);
        assert!(side_orders.send().is_empty() && side_orders.is_empty());
        let all: Vec<_> = std::iter::from_fn(|| next(&mut receiver)).collect();
        assert_eq!(all, [(0, 0), (2, 5)]);
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
