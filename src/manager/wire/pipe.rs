//! The transport of one machine: a pipe of requests and a pipe of answers.
//!
//! A call is begun when its pipe has room for it. One that waits for room has sent nothing, and holds nobody up: all that wait
//! are woken, and each that is polled tries. A message that must not wait, such as the release of a handle, may exceed the limit.
//!
//! Memory of a pipe that is found damaged ends the connection: waiting calls get an error that names the damage, and nothing is tried
//! again. So does a lack of memory for what must arrive: the manager then lets go of all that its client holds. Descriptors
//! that the kernel does not take now are tried again after a while, and later messages follow them.
//!
//! # Cancel
//! A call that is dropped before it is sent was never made.

use super::messages;
use super::outlet::Outlet;
use super::ready::Ready;
use super::transport::{Changed, Transport};
use crate::channel::{self, Receiver, Sender, SharedReceiver};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::background;
use crate::os::eventfd;
use crate::os::socket::Wait;
use crate::os::sync::{lock, try_lock};
use crate::shm::atomic::fence;
use crate::wait::WaitQueue;
use crate::wire::{self, EncodedMessage, Fd, Parcel, frame};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::Duration;
use std::{io, thread};

/// How a handle that leaves waits for a socket that is full of descriptors.
const PRESSES: u32 = 1000;
const PAUSE: Duration = Duration::from_micros(50);
/// When descriptors that the kernel has refused are tried again.
const RETRY: Duration = Duration::from_millis(10);

pub(crate) struct Pipe {
    me: Weak<Self>,
    /// `None` once the connection has ended: the other end sees this one go.
    outlet: Mutex<Option<Outlet>>,
    /// Posted messages, until the thread that has the outlet has sent them; also those whose descriptors do not fit into the socket.
    unsent: Mutex<VecDeque<EncodedMessage>>,
    receiver: SharedReceiver<EncodedMessage>,
    /// A client's: how it signals that there is something in the pipe; from the manager's first message on.
    ready: OnceLock<Ready>,
    is_client: bool,
    has_ended: AtomicBool,
    /// Why, if a message was lost.
    lost: OnceLock<Error>,
    will_retry: AtomicBool,
    changed: Changed,
}

/// The outcome of sending messages that did not fail.
enum Sent {
    /// All, and whether the other end had to be woken for the last one.
    All(bool),
    /// The rest goes when there is room.
    NoRoom,
    /// The kernel takes no descriptors now; the rest is still there.
    Refused,
}

impl Pipe {
    /// A client's end. The thread waits while more are at the connector than it holds, as long as the connector allows.
    pub(crate) fn connect(connector: &OwnedFd, changed: Changed) -> Result<Arc<Self>> {
        let ((tx, theirs), (back, rx)) = (channel::simplex::<EncodedMessage>()?, channel::simplex::<EncodedMessage>()?);
        let failed = |error| Error::io("cannot connect to the manager", error);
        let doorbell = eventfd::create().map_err(failed)?;
        let theirs_of_doorbell = Fd::new(doorbell.try_clone().map_err(failed)?);
        let ends = (theirs, back, theirs_of_doorbell);
        let message = wire::encode(&ends)?;
        let fds: Vec<_> = message.attachments.iter().map(AsFd::as_fd).collect();
        frame::send(connector.as_fd(), &[message.payload(&ends)], &fds, Wait::Yes).map_err(|error| {
            match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Error::closed("manager"),
                io::ErrorKind::WouldBlock => {
                    let why = "the manager takes no clients in: it is stopped, or has more to do than it can";
                    Error::new(ErrorKind::Timeout, why).explained_by(Topic::ManagerSilent)
                }
                _ => failed(error),
            }
        })?;
        let pipe = Self::new(tx, rx, true, changed);
        pipe.receiver.wait_queue().set_own_doorbell(Arc::new(doorbell));
        // Outside of a runtime: the first waiting call will listen.
        let _ = pipe.receiver.listen();
        Ok(pipe)
    }

    /// The manager's end, of what [`connect`](Self::connect) has sent, inside the runtime that is to listen to it.
    pub(crate) fn accept(ends: Parcel, changed: Changed) -> Result<Arc<Self>> {
        let (receiver, sender, doorbell): (_, Sender<EncodedMessage>, Fd<OwnedFd>) = wire::decode(ends)?;
        sender.items().set_own_doorbell(Arc::new(doorbell.into_inner()));
        let pipe = Self::new(sender, receiver, false, changed);
        pipe.receiver.listen().map_err(|error| Error::io("the end of a client cannot be noticed", error))?;
        Ok(pipe)
    }

    fn new(
        sender: Sender<EncodedMessage>,
        receiver: Receiver<EncodedMessage>,
        is_client: bool,
        changed: Changed,
    ) -> Arc<Self> {
        let (outlet, receiver) = (Outlet::new(sender), receiver.into_shared());
        let room = outlet.room().clone();
        let pipe = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            outlet: Mutex::new(Some(outlet)),
            unsent: Mutex::default(),
            receiver,
            ready: OnceLock::new(),
            is_client,
            has_ended: AtomicBool::new(false),
            lost: OnceLock::new(),
            will_retry: AtomicBool::new(false),
            changed,
        });
        let (reader, sender) = (pipe.me.clone(), pipe.me.clone());
        pipe.receiver.wait_queue().set_reader(move || reader.upgrade().iter().for_each(|pipe| (pipe.changed)()));
        room.set_reader(move || {
            if let Some(pipe) = sender.upgrade() {
                pipe.send_rest();
                (pipe.changed)();
            }
        });
        pipe
    }

    /// The manager's first message: which bit of its map this client has.
    fn greeted(&self, greeting: EncodedMessage) -> Result<()> {
        self.ready.set(Ready::open(greeting)?).map_err(|_| messages::malformed())?;
        // Another thread may have put a request meanwhile, and found neither a bit nor this message.
        fence(SeqCst);
        self.ready.get().iter().for_each(|ready| _ = ready.ring());
        Ok(())
    }

    /// Signals to the manager that there is something in the pipe; true if it slept. Without a bit yet, this client has one in the
    /// pipe of answers, or the manager will poll the pipe by itself.
    fn ring(&self) -> bool {
        if self.ready.get().is_none() && self.is_client {
            fence(SeqCst);
            (self.changed)();
        }
        self.ready.get().is_none_or(Ready::ring)
    }

    /// A message that had to arrive is lost, or memory is damaged.
    fn fail(&self, error: Error) {
        let _ = self.lost.set(error);
        self.close();
        (self.changed)();
    }

    /// Ends a use of the outlet. If the connection has ended, the pipe is closed: whoever ended it may have found the outlet taken.
    fn let_go(&self, outlet: MutexGuard<'_, Option<Outlet>>) {
        drop(outlet);
        if self.has_ended.load(SeqCst)
            && let Some(mut outlet) = try_lock(&self.outlet)
        {
            let gone = (outlet.take(), std::mem::take(&mut *lock(&self.unsent)));
            drop(outlet);
            drop(gone);
        }
    }

    /// Sends the posted messages, in order. After an error one of them is lost.
    fn flush(&self, outlet: &mut Outlet) -> Result<Sent> {
        let mut sent = Sent::All(true);
        while let Sent::All(_) = sent {
            let posted = lock(&self.unsent).pop_front();
            let Some(next) = posted else { break };
            sent = self.put(outlet, next)?;
        }
        Ok(sent)
    }

    /// Sends a message, or puts it before those that were posted.
    fn put(&self, outlet: &mut Outlet, message: EncodedMessage) -> Result<Sent> {
        let has_descriptors = message.has_attachments();
        let refused = match outlet.send(message) {
            Ok(has_woken) => return Ok(Sent::All(has_woken)),
            Err(refused) => refused,
        };
        let sent = match refused.kind() {
            // It goes when the other end has taken others.
            ErrorKind::Full => Sent::NoRoom,
            // The kernel has no room for more descriptors, of whatever process.
            ErrorKind::Io if has_descriptors => Sent::Refused,
            _ => return Err(refused.into_error()),
        };
        lock(&self.unsent).push_front(refused.into_inner());
        Ok(sent)
    }

    fn has_unsent(&self) -> bool {
        !lock(&self.unsent).is_empty()
    }

    /// Sends the posted messages. A thread that has used the outlet comes here after it.
    fn send_rest(&self) {
        while self.has_unsent() {
            let Some(mut outlet) = try_lock(&self.outlet) else { return };
            let Some(open) = outlet.as_mut() else {
                drop(outlet);
                return lock(&self.unsent).clear();
            };
            let (flushed, room) = (self.flush(open), open.room().clone());
            self.let_go(outlet);
            self.ring();
            match flushed {
                Ok(Sent::All(_)) => {}
                Ok(Sent::NoRoom) => {
                    // Armed in any case, which repairs what damage has changed.
                    let was_armed = room.is_armed();
                    match room.arm() {
                        // The reader of room goes on. If room came before the message was back, it has not seen that, and room was not armed.
                        Ok(()) if was_armed => return,
                        Ok(()) => {}
                        // Outside a runtime those that have listened before go on.
                        Err(_) => return self.retry(),
                    }
                }
                Ok(Sent::Refused) => return self.retry(),
                Err(error) => return self.fail(error),
            }
        }
    }

    /// It is not announced when the kernel takes descriptors again, and there may be no runtime here.
    fn retry(&self) {
        if self.will_retry.swap(true, SeqCst) {
            return;
        }
        let pipe = self.me.clone();
        let again = move || {
            thread::sleep(RETRY);
            if let Some(pipe) = pipe.upgrade() {
                pipe.will_retry.store(false, SeqCst);
                pipe.send_rest();
            }
        };
        if background::spawn(thread::Builder::new().name("mp-retry".into()), again).is_err() {
            // It goes with the next message.
            self.will_retry.store(false, SeqCst);
        }
    }
}

impl Transport for Pipe {
    fn has_room(&self) -> bool {
        // While another thread copies a message, however large, nobody waits for that: one more is begun meanwhile.
        let Some(mut outlet) = try_lock(&self.outlet) else { return true };
        let has_room = outlet.as_mut().is_none_or(Outlet::has_room);
        self.let_go(outlet);
        // Others may have come meanwhile, and found the outlet taken.
        self.send_rest();
        has_room && !self.has_unsent()
    }

    fn send(&self, message: EncodedMessage) -> Result<bool> {
        let mut outlet = lock(&self.outlet);
        let Some(open) = outlet.as_mut().filter(|_| !self.has_ended.load(SeqCst)) else {
            self.let_go(outlet);
            return Err(Error::closed("manager"));
        };
        let flushed = self.flush(open);
        let has_lost = flushed.is_err();
        let sent = flushed.and_then(|sent| match sent {
            Sent::All(_) => self.put(open, message),
            rest => {
                lock(&self.unsent).push_back(message);
                Ok(rest)
            }
        });
        self.let_go(outlet);
        let manager_slept = self.ring();
        // Others may have come meanwhile, and found the outlet taken; and there may be a rest.
        self.send_rest();
        match sent {
            Ok(Sent::All(has_woken)) if !self.is_client => Ok(has_woken),
            Ok(_) => Ok(manager_slept),
            Err(error) => {
                if has_lost || self.is_client && error.kind() == ErrorKind::Corrupt {
                    self.fail(Error::copy(&error));
                }
                Err(error)
            }
        }
    }

    fn post(&self, message: EncodedMessage) {
        if !self.has_ended.load(SeqCst) {
            lock(&self.unsent).push_back(message);
            self.send_rest();
        }
    }

    /// Without a runtime's help.
    fn press(&self) {
        for _ in 0..PRESSES {
            self.send_rest();
            // A message that another thread is sending is neither there nor in the pipe.
            let in_hand = lock(&self.outlet);
            let is_done = !self.has_unsent();
            self.let_go(in_hand);
            if is_done {
                // Messages that came meanwhile found the outlet taken.
                return self.send_rest();
            }
            thread::sleep(PAUSE);
        }
    }

    fn recv(&self) -> Option<Result<EncodedMessage>> {
        if let Some(error) = self.lost.get() {
            return Some(Err(Error::copy(error)));
        }
        match self.receiver.next()? {
            Ok(message) if self.is_client && messages::id_of(message.bytes()) == Some(0) => {
                self.greeted(message).map_or_else(|error| Some(Err(error)), |()| self.recv())
            }
            next => Some(next),
        }
    }

    fn has_message(&self) -> bool {
        !self.receiver.has_nothing()
    }

    fn has_hung_up(&self) -> bool {
        self.receiver.has_hung_up()
    }

    fn queue(&self) -> Option<&Arc<WaitQueue>> {
        Some(self.receiver.wait_queue())
    }

    fn arm(&self) -> io::Result<()> {
        // Kept for longer, it would keep the other end from seeing this one go.
        let room = lock(&self.outlet).as_ref().map(|outlet| outlet.room().clone());
        let Some(room) = room else { return Ok(()) };
        room.listen().and_then(|()| self.receiver.listen()).and_then(|()| room.arm())
    }

    fn close(&self) {
        self.has_ended.store(true, SeqCst);
        try_lock(&self.outlet).into_iter().for_each(|outlet| self.let_go(outlet));
        // It finds the same damage, or this end gone.
        self.ready.get().iter().for_each(|ready| _ = ready.ring());
    }
}

#[cfg(test)]
mod tests {
    use super::super::ready::ReadyMap;
    use super::*;
    use crate::manager::mock::until;
    use crate::os::socket;

    /// The ends of a client and of a manager.
    fn connected() -> [Arc<Pipe>; 2] {
        let (connector, intake) = socket::packet_pair().unwrap();
        let client = Pipe::connect(&connector, Box::new(|| ())).unwrap();
        let ends = frame::recv(intake.as_fd(), Wait::No).unwrap().unwrap();
        [client, Pipe::accept(ends, Box::new(|| ())).unwrap()]
    }

    fn message() -> EncodedMessage {
        EncodedMessage::new(vec![1; 9], Vec::new())
    }

    #[tokio::test]
    async fn connection_that_ends_while_a_thread_sends_is_closed_after_it() {
        let [client, manager] = connected();
        {
            let sending = lock(&client.outlet);
            client.close();
            assert!(sending.is_some(), "it is not taken away");
        }
        assert_eq!(client.send(message()).unwrap_err().kind(), ErrorKind::Closed);
        let mut end = None;
        until(|| {
            end = manager.recv();
            end.is_some()
        })
        .await;
        assert_eq!(end.unwrap().unwrap_err().kind(), ErrorKind::Closed);
    }

    #[tokio::test]
    async fn press_returns_when_messages_posted_beside_another_sender_are_in_the_pipe() {
        let [client, manager] = connected();
        let sending = lock(&client.outlet);
        client.post(message());
        assert!(client.has_unsent() && manager.recv().is_none());
        thread::scope(|scope| {
            let pressing = scope.spawn(|| client.press());
            drop(sending);
            pressing.join().unwrap();
        });
        assert_eq!(manager.recv().unwrap().unwrap().bytes(), message().bytes());
    }

    #[tokio::test]
    async fn bit_that_another_thread_finds_announces_earlier_requests() {
        let [client, manager] = connected();
        client.post(message());
        let (map, mut bits) = (ReadyMap::create().unwrap(), Vec::new());
        manager.send(map.greeting(5)).unwrap();
        thread::scope(|scope| scope.spawn(|| assert!(client.recv().is_none())).join().unwrap());
        map.take(64, |bit| bits.push(bit));
        assert_eq!(bits, [5]);
        // It is known from now on.
        client.post(message());
        map.take(64, |bit| bits.push(bit));
        assert_eq!(bits, [5, 5]);
    }

    #[test]
    fn connecting_to_a_full_connector_times_out() {
        let (connector, _intake) = socket::packet_pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&connector, 1).unwrap();
        socket::limit_sends(connector.as_fd(), Duration::from_millis(10)).unwrap();
        let refused = (0..1_000).find_map(|_| Pipe::connect(&connector, Box::new(|| ())).err()).unwrap();
        assert_eq!(refused.kind(), ErrorKind::Timeout, "{refused}");
    }
}
