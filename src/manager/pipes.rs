//! The pipes of a process to a manager of its own machine.
//!
//! What cannot be sent at once waits in an outbox, in order, and is sent by whoever comes by, or by the reader of the
//! pipe's room: nobody holds the pipe while it waits, so that nobody need be polled for others to go on.
//!
//! # Cancel
//! A request that is dropped while it waits in the outbox is not sent.

use super::objects::lock;
use super::slots::Slots;
use crate::channel::{self, Inbox, Sender};
use crate::error::{Error, ErrorKind, Result, SendError};
use crate::os::socket::Wait;
use crate::wait::{Line, until_read};
use crate::wire::{self, Sealed, frame};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// How long a handle that leaves waits for a pipe that is full.
const PATIENCE: Duration = Duration::from_millis(100);

/// After which what could not be told is tried again.
const LATER: Duration = Duration::from_millis(10);

pub(super) struct Wire {
    this: Weak<Self>,
    tx: Mutex<Sender<Sealed>>,
    /// What goes out before anything else.
    outbox: Mutex<VecDeque<Outgoing>>,
    is_trying_later: AtomicBool,
    /// Where room in the pipe is told, and how often it was.
    room: Arc<Line>,
    rooms: AtomicU64,
    rx: Inbox<Sealed>,
    pub(super) slots: Slots,
    /// Nothing can be sent, as if memory had run out.
    #[cfg(test)]
    is_out_of_memory: AtomicBool,
}

struct Outgoing {
    request: Sealed,
    /// Who waits for room, and can be told of a failure. Closed, the request is not wanted any more.
    asker: Option<oneshot::Sender<Result<()>>>,
}

impl Wire {
    pub(super) fn connect(door: &Arc<OwnedFd>) -> Result<Arc<Self>> {
        let ((tx, theirs), (back, rx)) = (channel::simplex::<Sealed>()?, channel::simplex::<Sealed>()?);
        let hello = (theirs, back);
        let message = wire::encode(&hello)?;
        let fds: Vec<_> = message.attachments.iter().map(AsFd::as_fd).collect();
        frame::send(door.as_fd(), &[message.payload(&hello)], &fds, Wait::Yes).map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => Error::closed("manager"),
            _ => Error::io("cannot connect to the manager", error),
        })?;
        let (rx, outbox, slots) = (rx.into_inbox(), Mutex::default(), Slots::default());
        // Outside of a runtime: whoever waits first will listen.
        let _ = rx.listen();
        let (room, rooms, tx) = (tx.room().clone(), AtomicU64::new(0), Mutex::new(tx));
        let wire = Arc::new_cyclic(|this| {
            let (this, is_trying_later) = (this.clone(), AtomicBool::new(false));
            Self {
                this,
                tx,
                outbox,
                is_trying_later,
                room,
                rooms,
                rx,
                slots,
                #[cfg(test)]
                is_out_of_memory: AtomicBool::new(false),
            }
        });
        let (reader, teller) = (Arc::downgrade(&wire), Arc::downgrade(&wire));
        wire.room.set_reader(move || {
            if let Some(wire) = teller.upgrade() {
                wire.rooms.fetch_add(1, SeqCst);
                wire.send_what_waits();
                if !lock(&wire.outbox).is_empty() {
                    // Or the other end is gone.
                    wire.read();
                }
            }
        });
        wire.rx.line().set_reader(move || {
            if let Some(wire) = reader.upgrade() {
                wire.read_for_sleepers();
            }
        });
        Ok(wire)
    }

    /// Takes all answers there are to those who wait for them.
    fn read(&self) {
        while let Some(next) = self.rx.next() {
            match next {
                // Of one that nobody waits for, the caller was dropped.
                Ok(answer) => _ = self.slots.deliver(answer),
                // Closed; or an answer was lost, and nobody can say whose.
                Err(_) => {
                    self.slots.fail();
                    // Its askers learn of it.
                    let unsent = std::mem::take(&mut *lock(&self.outbox));
                    return drop(unsent);
                }
            }
        }
    }

    fn read_for_sleepers(&self) {
        self.read();
        let someone_sleeps = self.slots.has_sleepers();
        if someone_sleeps {
            // It fails outside a runtime, where those that have listened before go on.
            let _ = self.rx.line().arm();
            self.read();
        }
    }

    pub(super) async fn answer(&self, id: u64) -> Result<Sealed> {
        let attempt = || {
            self.read();
            self.slots.take(id)
        };
        let sleep = |waker: &Waker| self.slots.sleep(id, waker);
        let waited = until_read(self.rx.line(), attempt, sleep).await;
        waited.map_err(|error| Error::io("cannot wait for a manager's answer", error))?
    }

    /// Sends a request after everything that was told before it. That the manager is gone is learned from its answers.
    pub(super) async fn send(&self, mut request: Sealed) -> Result<()> {
        if self.slots.is_gone() {
            return Err(Error::closed("manager"));
        }
        if let Ok(mut tx) = self.tx.try_lock() {
            let sent = match self.send_told(&mut tx)? {
                true => self.try_send(&mut tx, request),
                false => Err(SendError::new(Error::new(ErrorKind::Full, "others wait for room"), request)),
            };
            drop(tx);
            match sent {
                Ok(was_asleep) => {
                    if !was_asleep {
                        self.rx.line().encourage();
                    }
                    // Others may have come meanwhile, and found the pipe taken.
                    self.send_what_waits();
                    return Ok(());
                }
                Err(refused) if refused.kind() == ErrorKind::Closed => return Err(refused.into_error()),
                Err(refused) => request = refused.into_inner(),
            }
        }
        // The lines' readers hear of room, and of the other end's going, in the runtimes that listen.
        let listens = self.room.listen().and_then(|()| self.rx.listen());
        listens.map_err(|error| Error::io("cannot wait for room in the pipe to a manager", error))?;
        let (asker, sent) = oneshot::channel();
        self.put_out(Outgoing { request, asker: Some(asker) });
        let unsent = Unsent { wire: self, sent };
        unsent.await
    }

    pub(super) fn tell(&self, request: Sealed) {
        if !self.slots.is_gone() {
            self.put_out(Outgoing { request, asker: None });
        }
    }

    fn put_out(&self, outgoing: Outgoing) {
        lock(&self.outbox).push_back(outgoing);
        self.send_what_waits();
        if self.slots.is_gone() {
            let unsent = std::mem::take(&mut *lock(&self.outbox));
            drop(unsent);
        }
    }

    /// What has to wait for room is sent by the reader of its line.
    fn send_what_waits(&self) {
        let mut is_armed = false;
        while !lock(&self.outbox).is_empty() {
            let rooms = self.rooms.load(SeqCst);
            // Who has the pipe comes here after it.
            let Ok(mut tx) = self.tx.try_lock() else { return };
            let told = self.send_told(&mut tx);
            drop(tx);
            match told {
                Ok(true) => {}
                Ok(false) if !is_armed => {
                    is_armed = true;
                    // It fails outside a runtime, where those that have listened before go on.
                    let _ = self.room.arm();
                }
                // The reader came while the pipe was taken.
                Ok(false) if self.rooms.load(SeqCst) != rooms => is_armed = false,
                _ => return,
            }
        }
    }

    /// Sends from the outbox what need not wait; true if that is all.
    fn send_told(&self, tx: &mut Sender<Sealed>) -> Result<bool> {
        loop {
            let Some(Outgoing { request, asker }) = lock(&self.outbox).pop_front() else { return Ok(true) };
            if asker.as_ref().is_some_and(|asker| asker.is_closed()) {
                continue;
            }
            match (self.try_send(tx, request), asker) {
                // Its asker may have gone just now: then it was sent all the same.
                (Ok(_), asker) => drop(asker.map(|asker| asker.send(Ok(())))),
                (Err(refused), asker) if refused.kind() == ErrorKind::Full => {
                    lock(&self.outbox).push_front(Outgoing { request: refused.into_inner(), asker });
                    return Ok(false);
                }
                (Err(refused), _) if refused.kind() == ErrorKind::Closed => return Err(refused.into_error()),
                // Memory or descriptors run out. Who waits is told why.
                (Err(refused), Some(asker)) => drop(asker.send(Err(refused.into_error()))),
                // But what was told must not be lost, and nothing must overtake it.
                (Err(refused), None) => {
                    let (why, request) = (refused.to_string(), refused.into_inner());
                    tracing::warn!(why, "a manager cannot be told of something yet");
                    lock(&self.outbox).push_front(Outgoing { request, asker: None });
                    let waiting = self.take_back(|one| one.asker.is_some());
                    for asker in waiting.into_iter().filter_map(|one| one.asker) {
                        drop(asker.send(Err(Error::new(ErrorKind::Io, why.clone()))));
                    }
                    self.try_later();
                    return Ok(false);
                }
            }
        }
    }

    /// Takes out of the outbox what `is_it` says.
    fn take_back(&self, is_it: impl FnMut(&Outgoing) -> bool) -> Vec<Outgoing> {
        let mut outbox = lock(&self.outbox);
        let (taken, left) = std::mem::take(&mut *outbox).into_iter().partition::<Vec<_>, _>(is_it);
        *outbox = left.into();
        taken
    }

    fn try_send(&self, tx: &mut Sender<Sealed>, request: Sealed) -> Result<bool, SendError<Sealed>> {
        #[cfg(test)]
        if self.is_out_of_memory.load(SeqCst) {
            return Err(SendError::new(Error::new(ErrorKind::Io, "there is no memory"), request));
        }
        tx.try_send_blindly(request)
    }

    /// Tries again after a while, if there is a runtime. Without, the next call does, or whoever makes room.
    fn try_later(&self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if !self.is_trying_later.swap(true, SeqCst) {
            let later = Later(self.this.clone());
            runtime.spawn(async move {
                tokio::time::sleep(LATER).await;
                let wire = later.0.upgrade();
                drop(later);
                wire.iter().for_each(|wire| wire.send_what_waits());
            });
        }
    }

    /// Waits a little, without a runtime's help, until what was told is in the pipe.
    pub(super) fn press(&self) {
        let start = Instant::now();
        while !lock(&self.outbox).is_empty() && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_micros(50));
            self.send_what_waits();
        }
    }
}

/// Dropped, also with its runtime, nobody tries later any more.
struct Later(Weak<Wire>);

impl Drop for Later {
    fn drop(&mut self) {
        self.0.upgrade().iter().for_each(|wire| wire.is_trying_later.store(false, SeqCst));
    }
}

/// A request in the outbox. Dropped there, it is not sent.
struct Unsent<'a> {
    wire: &'a Wire,
    sent: oneshot::Receiver<Result<()>>,
}

impl Future for Unsent<'_> {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // Whoever had it is gone with the manager.
        let gone = |_| Err(Error::closed("manager"));
        Pin::new(&mut self.sent).poll(cx).map(|sent| sent.unwrap_or_else(gone))
    }
}

impl Drop for Unsent<'_> {
    fn drop(&mut self) {
        self.sent.close();
        drop(self.wire.take_back(|one| one.asker.as_ref().is_some_and(|asker| asker.is_closed())));
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::{self, Writer};
    use super::*;
    use crate::channel::Receiver;
    use futures::FutureExt;
    use futures::future::BoxFuture;

    /// A wire, and the manager's ends of it.
    fn wire() -> (Arc<Wire>, Receiver<Sealed>, Sender<Sealed>) {
        let (door, intake) = crate::os::socket::packet_pair().unwrap();
        let wire = Wire::connect(&Arc::new(door)).unwrap();
        let hello = frame::recv(intake.as_fd(), Wait::No).unwrap().unwrap();
        let (receiver, sender) = wire::decode(hello).unwrap();
        (wire, receiver, sender)
    }

    fn told(object: u64) -> Sealed {
        let mut request = Writer::request(protocol::RELEASE);
        request.number(object);
        request.seal()
    }

    async fn comes(receiver: &mut Receiver<Sealed>, object: u64) {
        let next = receiver.recv_timeout(Duration::from_secs(20)).await.unwrap();
        assert_eq!(next.bytes(), told(object).bytes());
    }

    #[tokio::test]
    async fn what_cannot_be_told_now_keeps_its_place_and_calls_say_why() {
        let (wire, mut receiver, _sender) = wire();
        wire.is_out_of_memory.store(true, SeqCst);
        wire.tell(told(1));
        wire.tell(told(2));
        let error = wire.send(told(3)).await.unwrap_err();
        assert!(error.to_string().contains("no memory"), "{error}");
        wire.is_out_of_memory.store(false, SeqCst);
        // It goes out by itself.
        comes(&mut receiver, 1).await;
        comes(&mut receiver, 2).await;
        wire.send(told(3)).await.unwrap();
        comes(&mut receiver, 3).await;
    }

    /// Sends large requests until one has to wait, which is the last of so many.
    fn fill(wire: &Wire) -> (BoxFuture<'_, Result<()>>, usize) {
        let mut count = 0;
        loop {
            count += 1;
            let mut sending = wire.send(Sealed::new(vec![0; 1 << 18], Vec::new())).boxed();
            if (&mut sending).now_or_never().is_none() {
                return (sending, count);
            }
        }
    }

    #[tokio::test]
    async fn who_waits_for_room_and_is_not_polled_holds_nobody_up() {
        let (wire, mut receiver, sender) = wire();
        let (first, large) = fill(&wire);
        let mut dropped = wire.send(told(1)).boxed();
        assert!((&mut dropped).now_or_never().is_none());
        drop(dropped);
        let last = async {
            wire.tell(told(2));
            wire.send(told(3)).await.unwrap();
        };
        let read = async {
            for _ in 0..large {
                assert_eq!(receiver.recv().await.unwrap().bytes().len(), 1 << 18);
            }
            comes(&mut receiver, 2).await;
            comes(&mut receiver, 3).await;
        };
        let both = async { futures::join!(last, read) };
        tokio::time::timeout(Duration::from_secs(20), both).await.expect("the first is not polled, and is sent");
        first.await.unwrap();
        let (waiting, _) = fill(&wire);
        drop((receiver, sender));
        let error = tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
    }
}
