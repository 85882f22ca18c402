//! The pipes of a process to a manager of its own machine.
//!
//! A call is begun when the pipe has room for it. One that waits for room has sent nothing, and holds nobody up: all who wait
//! are woken, and each that is polled tries. A message that must not wait, such as the release of a handle, may exceed the limit.
//!
//! Memory of a pipe that is found damaged ends the connection: those who wait are told so, and nothing is tried again. So does a
//! lack of memory for what must be told: the manager then lets go of all that this process holds.
//!
//! # Cancel
//! A call that is dropped before it is sent was never made.

use super::pending::PendingCalls;
use crate::channel::{self, SharedReceiver};
use crate::error::{Error, ErrorKind, Result};
use crate::manager::wire::messages::{self, Reader};
use crate::manager::wire::outlet::Outlet;
use crate::manager::wire::ready::{CLIENTS, ReadyMap};
use crate::os::eventfd;
use crate::os::socket::{self, Wait};
use crate::os::sync::lock;
use crate::shm::atomic::fence;
use crate::wait::{WaitQueue, until_read};
use crate::wire::{self, EncodedMessage, Fd, frame};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, TryLockError};
use std::task::Waker;
use std::time::Duration;
use tokio::sync::Notify;

/// How a handle that leaves waits for a socket that is full of descriptors.
const PRESSES: u32 = 1000;
const PAUSE: Duration = Duration::from_micros(50);

pub(crate) struct Wire {
    /// `None` once the connection has ended: the manager sees this end go.
    outlet: Mutex<Option<Outlet>>,
    /// What was told, until whoever has the pipe has sent it; or descriptors do not fit into the socket.
    unsent: Mutex<VecDeque<EncodedMessage>>,
    room: Arc<WaitQueue>,
    /// How often room was told.
    rooms: AtomicU64,
    /// Those that wait for room are woken, all of them; and how many they are.
    has_room: Notify,
    waiting: AtomicUsize,
    rx: SharedReceiver<EncodedMessage>,
    /// Where the manager is told that there is something in the pipe, by which bit; from its first message on.
    ready: OnceLock<(ReadyMap, u32)>,
    pub(crate) slots: PendingCalls,
}

/// Counts one that waits, until dropped.
struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, SeqCst);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// Has nobody wait longer at the door of a manager.
pub(crate) fn limit_waiting(door: &OwnedFd, time: Duration) -> std::io::Result<()> {
    socket::limit_sends(door.as_fd(), time)
}

/// What came of sending the messages that must not wait.
enum Flushed {
    All,
    /// The rest goes when there is room.
    NoRoom,
    /// The kernel has no memory for descriptors now; the rest is still there.
    Refused(Error),
    /// A message could not be kept.
    Lost(Error),
}

/// The pipe, unless a thread has it in its hand.
fn free(outlet: &Mutex<Option<Outlet>>) -> Option<MutexGuard<'_, Option<Outlet>>> {
    match outlet.try_lock() {
        Ok(outlet) => Some(outlet),
        Err(TryLockError::Poisoned(outlet)) => Some(outlet.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

impl Wire {
    /// The thread waits while more are at the door than it holds, as long as [`limit_waiting`] has said.
    pub(crate) fn connect(door: &Arc<OwnedFd>) -> Result<Arc<Self>> {
        let ((tx, theirs), (back, rx)) = (channel::simplex::<EncodedMessage>()?, channel::simplex::<EncodedMessage>()?);
        let failed = |error| Error::io("cannot connect to the manager", error);
        let bell = eventfd::create().map_err(failed)?;
        let theirs_of_bell = Fd::new(bell.try_clone().map_err(failed)?);
        let hello = (theirs, back, theirs_of_bell);
        let message = wire::encode(&hello)?;
        let fds: Vec<_> = message.attachments.iter().map(AsFd::as_fd).collect();
        frame::send(door.as_fd(), &[message.payload(&hello)], &fds, Wait::Yes).map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => Error::closed("manager"),
            std::io::ErrorKind::WouldBlock => {
                let why = "the manager takes no clients in: it is stopped, or has more to do than it can";
                Error::new(ErrorKind::Timeout, why)
            }
            _ => failed(error),
        })?;
        let rx = rx.into_shared();
        rx.wait_queue().set_own_doorbell(Arc::new(bell));
        // Outside of a runtime: whoever waits first will listen.
        let _ = rx.listen();
        let outlet = Outlet::new(tx);
        let room = outlet.room().clone();
        let (outlet, unsent) = (Mutex::new(Some(outlet)), Mutex::default());
        let (rooms, has_room, waiting) = (AtomicU64::new(0), Notify::new(), AtomicUsize::new(0));
        let (ready, slots) = (OnceLock::new(), PendingCalls::default());
        let wire = Arc::new(Self { outlet, unsent, room, rooms, has_room, waiting, rx, ready, slots });
        let (reader, sender) = (Arc::downgrade(&wire), Arc::downgrade(&wire));
        wire.room.set_reader(move || {
            if let Some(wire) = sender.upgrade() {
                wire.rooms.fetch_add(1, SeqCst);
                wire.tell_rest();
                // Or the other end is gone.
                wire.read();
                wire.has_room.notify_waiters();
            }
        });
        wire.rx.wait_queue().set_reader(move || {
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
                Ok(answer) if messages::id_of(answer.bytes()) == Some(0) => {
                    if let Err(error) = self.greeted(answer) {
                        self.slots.fail_because(Some(&error));
                        return self.end(&error);
                    }
                }
                // Of one that nobody waits for, the caller was dropped.
                Ok(answer) => _ = self.slots.deliver(answer),
                // Closed; or an answer was lost, and nobody can say whose.
                Err(error) => return self.end(&error),
            }
        }
    }

    /// The manager's first message: which bit of its map this client has.
    fn greeted(&self, answer: EncodedMessage) -> Result<()> {
        let mut reader = Reader::new(answer)?;
        let (_, bit, memory, bell) = (reader.number()?, reader.number()?, reader.fd()?, reader.fd()?);
        let bit = u32::try_from(bit).ok().filter(|bit| *bit < CLIENTS).ok_or_else(messages::torn)?;
        let map = ReadyMap::open(memory, bell).map_err(|error| Error::io("cannot map a manager's memory", error))?;
        let _ = self.ready.set((map, bit));
        // Another thread may have put a request meanwhile, and found neither a bit nor this message.
        fence(SeqCst);
        self.ready.get().iter().for_each(|(map, bit)| _ = map.ring(*bit));
        Ok(())
    }

    /// Tells the manager that there is something in the pipe; true if it slept. Without a bit yet, this client has one in the
    /// pipe of answers, or the manager will look into the pipe by itself.
    fn ring(&self) -> bool {
        if self.ready.get().is_none() {
            fence(SeqCst);
            self.read();
        }
        self.ready.get().is_none_or(|(map, bit)| map.ring(*bit))
    }

    /// There will be no answer any more, and nothing more is sent.
    fn end(&self, why: &Error) {
        self.slots.fail_because((why.kind() != ErrorKind::Closed).then_some(why));
        self.shut_if_gone();
        // It finds the same damage, or this end gone.
        self.ready.get().iter().for_each(|(map, bit)| _ = map.ring(*bit));
    }

    /// Closes the pipe if the connection has ended. A thread that has the pipe in its hand, which may be this one, comes here
    /// when it has let go of it.
    fn shut_if_gone(&self) {
        if self.slots.is_gone()
            && let Some(mut outlet) = free(&self.outlet)
        {
            let gone = (outlet.take(), std::mem::take(&mut *lock(&self.unsent)));
            drop(outlet);
            drop(gone);
            self.has_room.notify_waiters();
        }
    }

    /// Reads, and has the reader come for what is still to be read and nobody looks for.
    pub(crate) fn read_for_sleepers(&self) {
        self.read();
        // Who waits for room waits for answers, too, that nobody else need read: the manager takes no more before they are.
        let someone_sleeps = self.slots.has_sleepers() || self.waiting.load(SeqCst) > 0;
        if someone_sleeps {
            // It fails outside a runtime, where those that have listened before go on.
            let _ = self.rx.wait_queue().arm();
            self.read();
        }
    }

    pub(crate) async fn answer(&self, id: u64) -> Result<EncodedMessage> {
        let attempt = || {
            self.read();
            self.slots.take(id)
        };
        let sleep = |waker: &Waker| self.slots.sleep(id, waker);
        let waited = until_read(self.rx.wait_queue(), attempt, sleep).await;
        waited.map_err(|error| Error::io("cannot wait for a manager's answer", error))?
    }

    /// Sends a request after everything that was told before it, once there is room. Dropped, it has not sent it.
    pub(crate) async fn send(&self, request: EncodedMessage) -> Result<()> {
        let mut request = Some(request);
        if self.try_send(&mut request)? {
            return Ok(());
        }
        let _waits = Waits::new(&self.waiting);
        loop {
            let mut noticed = pin!(self.has_room.notified());
            noticed.as_mut().enable();
            // In the runtimes that listen it is told, and so is the other end's going.
            let armed = self.room.listen().and_then(|()| self.rx.listen()).and_then(|()| self.room.arm());
            armed.map_err(|error| Error::io("cannot wait for room in the pipe to a manager", error))?;
            if self.try_send(&mut request)? {
                return Ok(());
            }
            self.read_for_sleepers();
            noticed.await;
        }
    }

    /// Takes the request and sends it; false if there is no room.
    fn try_send(&self, request: &mut Option<EncodedMessage>) -> Result<bool> {
        let mut outlet = lock(&self.outlet);
        let Some(open) = outlet.as_mut().filter(|_| !self.slots.is_gone()) else {
            drop(outlet);
            self.shut_if_gone();
            return Err(self.slots.gone().unwrap_or_else(|| Error::closed("manager")));
        };
        let flushed = self.flush(open);
        let sent = match &flushed {
            Flushed::All if open.has_room() => request.take().map(|request| open.send(request)).transpose(),
            _ => Ok(None),
        };
        drop(outlet);
        self.shut_if_gone();
        if matches!(sent, Ok(Some(_))) && !self.ring() {
            self.rx.wait_queue().encourage();
        }
        match flushed {
            Flushed::All | Flushed::NoRoom => {}
            Flushed::Refused(error) => return Err(error),
            // What was to be told is lost.
            Flushed::Lost(error) => {
                self.end(&error);
                return Err(error);
            }
        }
        // Others may have come meanwhile, and found the pipe taken.
        self.tell_rest();
        match sent {
            Ok(sent) => Ok(sent.is_some()),
            Err(refused) if refused.kind() == ErrorKind::Full => {
                *request = Some(refused.into_inner());
                Ok(false)
            }
            Err(refused) => {
                let error = refused.into_error();
                if error.kind() == ErrorKind::Corrupt {
                    self.end(&error);
                }
                Err(error)
            }
        }
    }

    /// Sends what was told, in order.
    fn flush(&self, outlet: &mut Outlet) -> Flushed {
        loop {
            let Some(next) = lock(&self.unsent).pop_front() else { return Flushed::All };
            let has_descriptors = next.has_attachments();
            let Err(refused) = outlet.send(next) else { continue };
            match refused.kind() {
                // It goes when the manager has taken others.
                ErrorKind::Full => {
                    lock(&self.unsent).push_front(refused.into_inner());
                    return Flushed::NoRoom;
                }
                // The kernel has no room for more descriptors, of whatever process: it goes with what is sent next.
                ErrorKind::Io if has_descriptors => {
                    let why = Error::new(ErrorKind::Io, format!("cannot send to the manager: {refused}"));
                    lock(&self.unsent).push_front(refused.into_inner());
                    return Flushed::Refused(why);
                }
                _ => return Flushed::Lost(refused.into_error()),
            }
        }
    }

    fn has_unsent(&self) -> bool {
        !lock(&self.unsent).is_empty()
    }

    /// Sends at once what must not wait.
    pub(crate) fn tell(&self, request: EncodedMessage) {
        if !self.slots.is_gone() {
            lock(&self.unsent).push_back(request);
            self.tell_rest();
        }
    }

    /// Sends what was told. A thread that has the pipe in its hand comes here after it.
    fn tell_rest(&self) {
        let mut armed_at = None;
        while self.has_unsent() {
            let Some(mut outlet) = free(&self.outlet) else { return };
            let Some(open) = outlet.as_mut() else {
                lock(&self.unsent).clear();
                return;
            };
            let flushed = self.flush(open);
            drop(outlet);
            self.shut_if_gone();
            self.ring();
            match flushed {
                Flushed::All => {}
                // The reader of room goes on, unless it came before the message was back.
                Flushed::NoRoom if armed_at == Some(self.rooms.load(SeqCst)) => return,
                Flushed::NoRoom => {
                    armed_at = Some(self.rooms.load(SeqCst));
                    // Outside a runtime it fails, and those that have listened before go on.
                    let _ = self.room.arm();
                }
                Flushed::Refused(error) => {
                    tracing::debug!(%error, "it is tried again with what is sent next");
                    return;
                }
                Flushed::Lost(error) => return self.end(&error),
            }
        }
    }

    /// Waits a little, without a runtime's help, until what was told is in the pipe.
    pub(crate) fn press(&self) {
        for _ in 0..PRESSES {
            self.tell_rest();
            // What another thread has in its hand is neither there nor in the pipe.
            let in_hand = lock(&self.outlet);
            let is_done = !self.has_unsent();
            drop(in_hand);
            self.shut_if_gone();
            if is_done {
                // What came meanwhile found the pipe taken.
                return self.tell_rest();
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Whether a call would wait for room.
    #[cfg(test)]
    pub(crate) fn is_full(&self) -> bool {
        lock(&self.outlet).as_mut().is_none_or(|outlet| !outlet.has_room())
    }
}

#[cfg(test)]
mod tests {
    use super::super::link::Link;
    use super::super::pending::Brings;
    use super::*;
    use crate::manager::mock::{fill, linked};
    use crate::manager::wire::messages::{COUNT, RELEASE};
    use futures_util::FutureExt;

    async fn ask(link: &Arc<Link>) -> Result<u64> {
        let mut request = link.request(COUNT);
        request.number(0);
        link.ask(request, 1, Brings::Values).await?.part()
    }

    #[tokio::test]
    async fn who_waits_for_room_and_is_not_polled_holds_nobody_up() {
        let (link, mut manager) = linked();
        fill(&link);
        let (mut first, mut dropped, mut third) = (Box::pin(ask(&link)), Box::pin(ask(&link)), Box::pin(ask(&link)));
        assert!((&mut first).now_or_never().is_none() && (&mut dropped).now_or_never().is_none());
        drop(dropped);
        link.release(2);
        let answers = async {
            // What was told goes past those who wait, and the first is not polled.
            assert_eq!(manager.next().await, (RELEASE, 2));
            let (kind, id) = manager.next().await;
            assert_eq!(kind, COUNT);
            manager.answer(id, |answer| answer.append_part(&7u64).unwrap()).await;
        };
        let (third, ()) = futures::join!(&mut third, answers);
        assert_eq!(third.unwrap(), 7);
        fill(&link);
        let mut waits = Box::pin(ask(&link));
        assert!((&mut waits).now_or_never().is_none());
        drop(manager);
        for asked in [&mut waits, &mut first] {
            let error = tokio::time::timeout(Duration::from_secs(20), asked).await.unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Closed);
        }
    }

    /// The manager takes no request of who does not read its answers.
    #[tokio::test]
    async fn who_waits_for_room_reads_answers_that_nobody_else_reads() {
        let (link, mut manager) = linked();
        let mut request = link.request(COUNT);
        request.number(0);
        let not_polled = link.send(request, 1, Brings::Values).await.unwrap();
        fill(&link);
        let mut waits = Box::pin(ask(&link));
        assert!((&mut waits).now_or_never().is_none());
        manager.answer(not_polled.id, |answer| answer.append_part(&7u64).unwrap()).await;
        let read = async {
            while manager.unread_answers() > 0 {
                tokio::task::yield_now().await;
            }
        };
        let read = async {
            tokio::select! {
                () = read => {}
                _ = &mut waits => panic!("nobody has answered"),
            }
        };
        tokio::time::timeout(Duration::from_secs(20), read).await.unwrap();
    }

    #[test]
    fn who_is_not_let_in_in_time_is_told() {
        let (door, _intake) = socket::packet_pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&door, 1).unwrap();
        limit_waiting(&door, Duration::from_millis(10)).unwrap();
        let door = Arc::new(door);
        let refused = (0..1_000).find_map(|_| Wire::connect(&door).err()).unwrap();
        assert_eq!(refused.kind(), ErrorKind::Timeout, "{refused}");
    }
}
