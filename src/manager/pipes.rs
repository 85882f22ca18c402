//! The pipes of a process to a manager of its own machine.

use super::objects::lock;
use super::slots::Slots;
use crate::channel::{self, Inbox, Sender};
use crate::error::{Error, ErrorKind, Result};
use crate::os::socket::Wait;
use crate::wait::{Line, until_read};
use crate::wire::{self, Sealed, frame};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};
use std::task::Waker;
use std::time::{Duration, Instant};

/// How long a handle that leaves waits for a pipe that is full.
const PATIENCE: Duration = Duration::from_millis(100);

/// After which what could not be told is tried again.
const LATER: Duration = Duration::from_millis(10);

pub(super) struct Wire {
    this: Weak<Self>,
    tx: tokio::sync::Mutex<Sender<Sealed>>,
    /// What goes out before anything else: said by those who cannot wait.
    outbox: Mutex<VecDeque<Sealed>>,
    is_trying_later: AtomicBool,
    /// Where room in the pipe is told, and how often it was.
    room: Arc<Line>,
    rooms: AtomicU64,
    rx: Inbox<Sealed>,
    pub(super) slots: Slots,
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
        let (room, rooms, tx) = (tx.room().clone(), AtomicU64::new(0), tokio::sync::Mutex::new(tx));
        let wire = Arc::new_cyclic(|this| {
            let (this, is_trying_later) = (this.clone(), AtomicBool::new(false));
            Self { this, tx, outbox, is_trying_later, room, rooms, rx, slots }
        });
        let (reader, teller) = (Arc::downgrade(&wire), Arc::downgrade(&wire));
        wire.room.set_reader(move || {
            if let Some(wire) = teller.upgrade() {
                wire.rooms.fetch_add(1, SeqCst);
                wire.send_what_was_told_meanwhile();
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
                Err(_) => return self.slots.fail(),
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
        // After the pipe is let go, also if this future is dropped.
        let _meanwhile = Meanwhile(self);
        if let Ok(mut tx) = self.tx.try_lock()
            && self.send_told(&mut tx)?
        {
            match tx.try_send_blindly(request) {
                Ok(was_asleep) => {
                    drop(tx);
                    if !was_asleep {
                        self.rx.line().encourage();
                    }
                    return Ok(());
                }
                Err(refused) if refused.kind() == ErrorKind::Full => request = refused.into_inner(),
                Err(refused) => return Err(refused.into_error()),
            }
        }
        let mut tx = self.tx.lock().await;
        // What waits stays in its place until it is sent, for this future may be dropped.
        loop {
            let first = lock(&self.outbox).front().cloned();
            let Some(first) = first else { break };
            tx.send(first).await?;
            lock(&self.outbox).pop_front();
        }
        tx.send(request).await?;
        Ok(())
    }

    pub(super) fn tell(&self, request: Sealed) {
        if self.slots.is_gone() {
            return;
        }
        lock(&self.outbox).push_back(request);
        self.send_what_was_told_meanwhile();
    }

    /// What has to wait for room is sent by the reader of its line.
    fn send_what_was_told_meanwhile(&self) {
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
            let Some(first) = lock(&self.outbox).pop_front() else { return Ok(true) };
            match tx.try_send_blindly(first) {
                Ok(_) => {}
                Err(refused) if refused.kind() == ErrorKind::Full => {
                    lock(&self.outbox).push_front(refused.into_inner());
                    return Ok(false);
                }
                Err(refused) if refused.kind() == ErrorKind::Closed => return Err(refused.into_error()),
                // Memory or descriptors run out. What was told must not be lost, and nothing must overtake it.
                Err(refused) => {
                    tracing::warn!(error = %refused, "a manager cannot be told of something yet");
                    lock(&self.outbox).push_front(refused.into_inner());
                    self.try_later();
                    return Ok(false);
                }
            }
        }
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
                wire.iter().for_each(|wire| wire.send_what_was_told_meanwhile());
            });
        }
    }

    /// Waits a little, without a runtime's help, until what was told is in the pipe.
    pub(super) fn press(&self) {
        let start = Instant::now();
        while !lock(&self.outbox).is_empty() && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_micros(50));
            self.send_what_was_told_meanwhile();
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

/// Dropped, it sends what was told meanwhile.
struct Meanwhile<'a>(&'a Wire);

impl Drop for Meanwhile<'_> {
    fn drop(&mut self) {
        self.0.send_what_was_told_meanwhile();
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::{self, Writer};
    use super::*;
    use crate::channel::Receiver;
    use crate::wire::Attachment;

    /// A wire, and the manager's ends of it.
    fn wire() -> (Arc<Wire>, Receiver<Sealed>, Sender<Sealed>) {
        let (door, intake) = crate::os::socket::packet_pair().unwrap();
        let wire = Wire::connect(&Arc::new(door)).unwrap();
        let hello = frame::recv(intake.as_fd(), Wait::No).unwrap().unwrap();
        let (receiver, sender) = wire::decode(hello).unwrap();
        (wire, receiver, sender)
    }

    #[tokio::test]
    async fn what_cannot_be_told_now_keeps_its_place_and_calls_say_why() {
        let (wire, mut receiver, _sender) = wire();
        let told = |object| {
            let mut request = Writer::request(protocol::RELEASE);
            request.number(object);
            request
        };
        // More descriptors than a message can have: like one that comes when none are left.
        let (mut refused, fd) = (told(1), Attachment::owned(std::io::pipe().unwrap().0.into()));
        for _ in 0..100_000 {
            refused.attach(fd.clone());
        }
        wire.tell(refused.seal());
        wire.tell(told(2).seal());
        let error = wire.send(told(3).seal()).await.unwrap_err();
        assert_ne!(error.kind(), ErrorKind::Closed, "{error}");
        assert_eq!(receiver.try_recv().unwrap_err().kind(), ErrorKind::Empty);
        // It has become possible: what was told goes out by itself.
        *lock(&wire.outbox).front_mut().unwrap() = told(1).seal();
        for object in [1, 2] {
            let next = receiver.recv_timeout(Duration::from_secs(20)).await.unwrap();
            assert_eq!(next.bytes(), told(object).seal().bytes());
        }
        wire.send(told(3).seal()).await.unwrap();
        assert_eq!(receiver.recv().await.unwrap().bytes(), told(3).seal().bytes());
    }
}
