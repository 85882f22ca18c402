//! The pipes of a process to a manager of its own machine.
//!
//! What cannot be sent at once waits in an outbox, in order, and is sent by whoever comes by, or by the reader of the
//! pipe's room: nobody holds the pipe while it waits, so that nobody need be polled for others to go on.
//!
//! Memory of a pipe that is found damaged ends the connection: those who wait are told so, and nothing is tried again.
//!
//! # Cancel
//! A request that is withdrawn while it waits in the outbox is not sent. One that is taken out of there to be sent cannot
//! be withdrawn, also if it has to go back for want of room once more: the outbox's lock decides.

use super::pending::PendingCalls;
use crate::channel::{self, Inbox, Sender};
use crate::error::{Error, ErrorKind, Result, SendError};
use crate::manager::wire::lock::lock;
use crate::manager::wire::messages::{self, Reader, Writer};
use crate::manager::wire::ready::{CLIENTS, ReadyMap};
use crate::os::eventfd;
use crate::os::reactor;
use crate::os::socket::{self, Wait};
use crate::os::timer;
use crate::shm::atomic::fence;
use crate::wait::{WaitQueue, until_read};
use crate::wire::{self, Fd, Sealed, frame};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::task::Waker;
use std::time::{Duration, Instant};

/// How long a handle that leaves waits for a pipe that is full.
const PATIENCE: Duration = Duration::from_millis(100);

/// After which what could not be told is tried again.
const LATER: Duration = Duration::from_millis(10);

/// Tries in a row that found no room though some was told.
const MOST_IN_VAIN: u32 = 64;

pub(crate) struct Wire {
    this: Weak<Self>,
    tx: Mutex<Sender<Sealed>>,
    outbox: Mutex<Outbox>,
    is_trying_later: AtomicBool,
    /// Where room in the pipe is told, and how often it was.
    room: Arc<WaitQueue>,
    rooms: AtomicU64,
    rx: Inbox<Sealed>,
    /// Where the manager is told that there is something in the pipe, by which bit; from its first message on.
    ready: OnceLock<(ReadyMap, u32)>,
    pub(crate) slots: PendingCalls,
    #[cfg(test)]
    meddler: Mutex<Option<Meddler>>,
}

/// Is there whenever something is sent, and may have it refused.
#[cfg(test)]
pub(crate) type Meddler = Box<dyn FnMut(&Wire) -> Option<ErrorKind> + Send>;

/// What goes out before anything else, in the order of its places.
#[derive(Default)]
struct Outbox {
    waiting: BTreeMap<u64, Outgoing>,
    last: u64,
}

struct Outgoing {
    request: Sealed,
    /// The number of a request that will be answered; `None` is something that is told.
    asks: Option<u64>,
}

/// Has nobody wait longer at the door of a manager.
pub(crate) fn limit_waiting(door: &OwnedFd, time: Duration) -> std::io::Result<()> {
    socket::limit_sends(door.as_fd(), time)
}

impl Wire {
    /// The thread waits while more are at the door than it holds, as long as [`limit_waiting`] has said.
    pub(crate) fn connect(door: &Arc<OwnedFd>) -> Result<Arc<Self>> {
        let ((tx, theirs), (back, rx)) = (channel::simplex::<Sealed>()?, channel::simplex::<Sealed>()?);
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
        let (rx, outbox, slots) = (rx.into_inbox(), Mutex::default(), PendingCalls::default());
        rx.line().set_own_doorbell(Arc::new(bell));
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
                ready: OnceLock::new(),
                slots,
                #[cfg(test)]
                meddler: Mutex::default(),
            }
        });
        let (reader, teller) = (Arc::downgrade(&wire), Arc::downgrade(&wire));
        wire.room.set_reader(move || {
            if let Some(wire) = teller.upgrade() {
                wire.rooms.fetch_add(1, SeqCst);
                wire.send_what_waits();
                if wire.has_what_waits() {
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
    fn greeted(&self, answer: Sealed) -> Result<()> {
        let mut reader = Reader::new(answer)?;
        let (_, bit, memory, bell) = (reader.number()?, reader.number()?, reader.fd()?, reader.fd()?);
        let bit = u32::try_from(bit).ok().filter(|bit| *bit < CLIENTS).ok_or_else(messages::torn)?;
        let map = ReadyMap::open(memory, bell).map_err(|error| Error::io("cannot map a manager's memory", error))?;
        let _ = self.ready.set((map, bit));
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
        self.slots.fail_because((why.kind() == ErrorKind::Corrupt).then_some(why));
        self.empty_outbox();
        // It finds the same damage.
        self.ready.get().iter().for_each(|(map, bit)| _ = map.ring(*bit));
    }

    /// Reads, and has the reader come for what is still to be read and nobody looks for.
    pub(crate) fn read_for_sleepers(&self) {
        self.read();
        let someone_sleeps = self.slots.has_sleepers();
        if someone_sleeps {
            // It fails outside a runtime, where those that have listened before go on.
            let _ = self.rx.line().arm();
            self.read();
        }
    }

    pub(crate) async fn answer(&self, id: u64) -> Result<Sealed> {
        let attempt = || {
            self.read();
            self.slots.take(id)
        };
        let sleep = |waker: &Waker| self.slots.sleep(id, waker);
        let waited = until_read(self.rx.line(), attempt, sleep).await;
        waited.map_err(|error| Error::io("cannot wait for a manager's answer", error))?
    }

    /// Sends a request after everything that was told before it. If it has to wait for room, its place in the outbox is
    /// returned. That it could not be sent from there, and that the manager is gone, is learned from its answer.
    pub(crate) fn send(&self, mut request: Sealed, number: u64) -> Result<Option<u64>> {
        if let Some(gone) = self.slots.gone() {
            return Err(gone);
        }
        if let Ok(mut tx) = self.tx.try_lock() {
            let sent = match self.send_told(&mut tx) {
                Ok(true) => self.try_send(&mut tx, request),
                Ok(false) => Err(SendError::new(Error::new(ErrorKind::Full, "others wait for room"), request)),
                Err(error) => Err(SendError::new(error, request)),
            };
            drop(tx);
            match sent {
                Ok(_) => {
                    if !self.ring() {
                        self.rx.line().encourage();
                    }
                    // Others may have come meanwhile, and found the pipe taken.
                    self.send_what_waits();
                    return Ok(None);
                }
                Err(refused) if refused.kind() == ErrorKind::Closed => return Err(refused.into_error()),
                Err(refused) if refused.kind() == ErrorKind::Corrupt => {
                    let error = refused.into_error();
                    self.end(&error);
                    return Err(error);
                }
                Err(refused) => request = refused.into_inner(),
            }
        }
        // The lines' readers hear of room, and of the other end's going, in the runtimes that listen.
        if let Err(error) = self.room.listen().and_then(|()| self.rx.listen()) {
            // Others may have come meanwhile, here too.
            self.send_what_waits();
            return Err(Error::io("cannot wait for room in the pipe to a manager", error));
        }
        Ok(Some(self.put_out(request, Some(number))))
    }

    pub(crate) fn tell(&self, request: Sealed) {
        if !self.slots.is_gone() {
            self.put_out(request, None);
        }
    }

    fn put_out(&self, request: Sealed, asks: Option<u64>) -> u64 {
        let mut outbox = lock(&self.outbox);
        outbox.last += 1;
        let place = outbox.last;
        outbox.waiting.insert(place, Outgoing { request, asks });
        drop(outbox);
        self.send_what_waits();
        if self.slots.is_gone() {
            self.empty_outbox();
        }
        place
    }

    /// Takes a request out of the outbox; false if it was sent, or is to be sent in any case.
    pub(crate) fn withdraw(&self, place: u64) -> bool {
        let withdrawn = lock(&self.outbox).waiting.remove(&place);
        withdrawn.is_some()
    }

    /// The manager is gone, as those who wait for its answers learn.
    fn empty_outbox(&self) {
        let unsent = std::mem::take(&mut lock(&self.outbox).waiting);
        drop(unsent);
    }

    pub(crate) fn has_what_waits(&self) -> bool {
        !lock(&self.outbox).waiting.is_empty()
    }

    /// What has to wait for room is sent by the reader of its line.
    fn send_what_waits(&self) {
        let (mut armed_at, mut in_vain) = (None, 0);
        while self.has_what_waits() {
            // Who has the pipe comes here after it.
            let Ok(mut tx) = self.tx.try_lock() else { return };
            let told = self.send_told(&mut tx);
            drop(tx);
            self.ring();
            match told {
                Ok(true) => in_vain = 0,
                // Room is told again and again, and never there: it comes later, or what tells of it is damaged.
                Ok(false) if in_vain >= MOST_IN_VAIN => return self.try_later(),
                Ok(false) => {
                    in_vain += 1;
                    // A change of it by us as well: of this and the reader's, whoever's is the later sees what the other
                    // did before, the reader that the pipe is free.
                    let rooms = self.rooms.fetch_add(0, SeqCst);
                    if armed_at.replace(rooms) == Some(rooms) {
                        return;
                    }
                    // The reader may have come meanwhile, and used up what was armed. Outside a runtime it fails, and
                    // those that have listened before go on.
                    let _ = self.room.arm();
                }
                Err(error) => {
                    if error.kind() == ErrorKind::Corrupt {
                        self.end(&error);
                    }
                    return;
                }
            }
        }
    }

    /// Sends from the outbox what need not wait; true if that is all.
    fn send_told(&self, tx: &mut Sender<Sealed>) -> Result<bool> {
        loop {
            let first = lock(&self.outbox).waiting.pop_first();
            let Some((place, Outgoing { request, asks })) = first else { return Ok(true) };
            let Err(refused) = self.try_send(tx, request) else { continue };
            match (refused.kind(), asks) {
                (ErrorKind::Full, _) => {
                    self.put_back(place, refused.into_inner(), asks);
                    return Ok(false);
                }
                (ErrorKind::Closed | ErrorKind::Corrupt, _) => {
                    let error = refused.into_error();
                    let told =
                        if error.kind() == ErrorKind::Closed { Error::closed("manager") } else { Error::copy(&error) };
                    asks.into_iter().for_each(|number| self.refuse(number, &told));
                    return Err(error);
                }
                // Memory or descriptors run out. Who waits is told why.
                (_, Some(number)) => self.refuse(number, &refused.into_error()),
                // But what was told must not be lost, and nothing must overtake it.
                (_, None) => {
                    let (why, request) = (refused.to_string(), refused.into_inner());
                    tracing::warn!(why, "a manager cannot be told of something yet");
                    self.put_back(place, request, None);
                    let error = Error::new(ErrorKind::Io, why);
                    self.take_askers().into_iter().for_each(|number| self.refuse(number, &error));
                    self.try_later();
                    return Ok(false);
                }
            }
        }
    }

    fn put_back(&self, place: u64, request: Sealed, asks: Option<u64>) {
        lock(&self.outbox).waiting.insert(place, Outgoing { request, asks });
    }

    /// Takes all that will be answered out of the outbox.
    fn take_askers(&self) -> Vec<u64> {
        let mut outbox = lock(&self.outbox);
        let (asking, telling) =
            std::mem::take(&mut outbox.waiting).into_iter().partition(|(_, one)| one.asks.is_some());
        outbox.waiting = telling;
        drop(outbox);
        let asking: BTreeMap<u64, Outgoing> = asking;
        asking.into_values().filter_map(|one| one.asks).collect()
    }

    /// Answers a request that cannot be sent.
    fn refuse(&self, number: u64, error: &Error) {
        let mut answer = Writer::answer(number);
        answer.error(error);
        // Its asker may have gone.
        let _ = self.slots.deliver(answer.seal());
    }

    fn try_send(&self, tx: &mut Sender<Sealed>, request: Sealed) -> Result<bool, SendError<Sealed>> {
        #[cfg(test)]
        if let Some(kind) = self.meddle() {
            return Err(SendError::new(Error::new(kind, "a test refuses it"), request));
        }
        tx.try_send_blindly(request)
    }

    #[cfg(test)]
    fn meddle(&self) -> Option<ErrorKind> {
        let mut meddler = lock(&self.meddler).take()?;
        let refused = meddler(self);
        lock(&self.meddler).get_or_insert(meddler);
        refused
    }

    /// Tries again after a while, if there is a runtime. Without, the next call does, or whoever makes room.
    fn try_later(&self) {
        // Without a timer it is as without a runtime.
        let (Ok(runtime), Ok(())) = (tokio::runtime::Handle::try_current(), reactor::has_timer()) else { return };
        if !self.is_trying_later.swap(true, SeqCst) {
            let later = Later(self.this.clone());
            runtime.spawn(async move {
                timer::sleep(LATER).await;
                let wire = later.0.upgrade();
                drop(later);
                wire.iter().for_each(|wire| wire.send_what_waits());
            });
        }
    }

    /// Waits a little, without a runtime's help, until what was told is in the pipe.
    pub(crate) fn press(&self) {
        let start = Instant::now();
        loop {
            // What another thread has in its hand is neither in the outbox nor in the pipe.
            let tx = lock(&self.tx);
            let is_sent = !self.has_what_waits();
            drop(tx);
            if is_sent || start.elapsed() >= PATIENCE {
                return;
            }
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

#[cfg(test)]
mod tests {
    use super::super::link::Pending;
    use super::super::pending::Brings;
    use super::*;
    use crate::manager::client::link::Link;
    use crate::manager::client::primitives::{Held, LockProxy};
    use crate::manager::mock::{fill, linked, proxy};
    use crate::manager::wire::messages::{COUNT, RELEASE, UNREAD, WAIT};
    use futures_util::FutureExt;
    use std::sync::mpsc;

    fn meddle(wire: &Wire, meddler: impl FnMut(&Wire) -> Option<ErrorKind> + Send + 'static) {
        *lock(&wire.meddler) = Some(Box::new(meddler));
    }

    /// Has a request sent, or wait for room.
    fn ask(link: &Arc<Link>) -> Pending<'_> {
        let mut request = link.request(COUNT);
        request.number(0);
        link.send(request, 1, Brings::Values).unwrap()
    }

    #[tokio::test]
    async fn what_cannot_be_told_now_keeps_its_place_and_calls_say_why() {
        let (link, mut manager) = linked();
        let wire = link.wire().unwrap();
        meddle(wire, |_| Some(ErrorKind::Full));
        link.release(1);
        let first = ask(&link);
        link.release(2);
        meddle(wire, |_| Some(ErrorKind::Io));
        let second = ask(&link);
        for asked in [first, second] {
            let error = link.open(asked.answer().await.unwrap()).unwrap().part::<u64>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io);
        }
        meddle(wire, |_| None);
        // It goes out by itself.
        assert_eq!(manager.next().await, (RELEASE, 1));
        assert_eq!(manager.next().await, (RELEASE, 2));
        let third = ask(&link);
        assert_eq!(manager.next().await, (COUNT, third.id));
    }

    #[tokio::test]
    async fn who_waits_for_room_and_is_not_polled_holds_nobody_up() {
        let (link, mut manager) = linked();
        fill(&link);
        let (first, dropped) = (ask(&link), ask(&link));
        drop(dropped);
        link.release(2);
        let third = ask(&link);
        assert_eq!(manager.next().await, (COUNT, first.id));
        assert_eq!(manager.next().await, (RELEASE, 2));
        assert_eq!(manager.next().await, (COUNT, third.id));
        fill(&link);
        let waits = ask(&link);
        drop(manager);
        let error = tokio::time::timeout(Duration::from_secs(20), waits.answer()).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
    }

    #[test]
    fn what_another_thread_is_about_to_send_is_waited_for() {
        let (link, _manager) = linked();
        let (in_hand, is_in_hand) = mpsc::channel();
        let (press, is_pressing) = mpsc::channel();
        let is_sent = Arc::new(AtomicBool::new(false));
        let sent = is_sent.clone();
        meddle(link.wire().unwrap(), move |_| {
            in_hand.send(()).unwrap();
            is_pressing.recv_timeout(Duration::from_secs(20)).unwrap();
            // So that who does not wait is caught at it.
            std::thread::sleep(Duration::from_millis(10));
            sent.store(true, SeqCst);
            None
        });
        std::thread::scope(|threads| {
            threads.spawn(|| link.release(1));
            is_in_hand.recv_timeout(Duration::from_secs(20)).unwrap();
            press.send(()).unwrap();
            link.wire().unwrap().press();
            assert!(is_sent.load(SeqCst));
        });
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

    /// It is dropped by another thread, say, while it is being sent, and the pipe is full again.
    #[tokio::test]
    async fn what_is_dropped_as_it_is_sent_is_sent_and_given_back() {
        let (link, mut manager) = linked();
        let wire = link.wire().unwrap();
        meddle(wire, |_| Some(ErrorKind::Full));
        let lock = LockProxy(proxy::<Held>(&link));
        let mut acquiring = async move { lock.acquire().await.map(drop) }.boxed();
        assert!((&mut acquiring).now_or_never().is_none());
        let mut acquiring = Some(acquiring);
        meddle(wire, move |_| acquiring.take().map(|_| ErrorKind::Full));
        wire.send_what_waits();
        assert_eq!(manager.next().await, (WAIT, 1));
        assert_eq!(manager.next().await, (UNREAD, 1));
    }

    /// Somebody finds the pipe taken, by one who then cannot wait for room.
    #[test]
    fn who_cannot_wait_for_room_still_sends_what_others_left() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (link, mut manager) = {
            let _inside = runtime.enter();
            linked()
        };
        let mut told = false;
        meddle(link.wire().unwrap(), move |wire| {
            let mut request = Writer::request(RELEASE);
            request.number(5);
            (!std::mem::replace(&mut told, true)).then(|| wire.tell(request.seal())).map(|()| ErrorKind::Full)
        });
        let mut request = link.request(COUNT);
        request.number(0);
        assert!(link.send(request, 1, Brings::Values).is_err(), "outside of a runtime nobody can wait");
        assert_eq!(runtime.block_on(manager.next()), (RELEASE, 5));
    }
}
