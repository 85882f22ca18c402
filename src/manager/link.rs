//! This process's connection to a manager, shared by all its handles and tasks.
//!
//! Requests go out by one pipe and answers come back by another, each under a number. Whoever waits reads the answers
//! of others too while it looks; who sleeps is woken by name, by the reader that runs in the runtime's driver.
//!
//! # Cancel
//! A call dropped before its request is in the pipe was never made; after that it is done, and its answer is thrown
//! away. If that answer made an object, the object goes.

use super::abroad::{self, Abroad};
use super::objects::{Lease, lock};
use super::protocol::{self, Reader, Writer};
use super::server::{self, Id, Server};
use crate::channel::{self, Inbox, Sender};
use crate::connection::{ByteConnection, ByteSender};
use crate::error::{Error, ErrorKind, Result};
use crate::os::fault;
use crate::os::socket::Wait;
use crate::wait::{Line, until_read};
use crate::wire::{self, Attachment, Sealed, attach, frame};
use futures::SinkExt;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// How long a handle that leaves waits for a pipe that is full.
const PATIENCE: Duration = Duration::from_millis(100);

/// After which what could not be told is tried again.
const LATER: Duration = Duration::from_millis(10);

/// The managers that this process has handles of.
static LINKS: Mutex<Option<HashMap<Id, Weak<Link>>>> = Mutex::new(None);

pub(super) struct Link {
    pub(super) id: Id,
    pub(super) pid: u32,
    end: End,
    last_lease: AtomicU64,
}

enum End {
    /// A client's: its door, and its pipes from the first use on.
    Client { door: Arc<OwnedFd>, wire: OnceLock<Arc<Wire>>, connecting: Mutex<()> },
    /// The manager is this very process.
    Here(&'static Arc<Server>),
    /// A client's that shares no memory with the manager.
    Far(Arc<Far>),
}

impl Link {
    /// The link to the manager of this name, which has its door at `door`.
    pub(super) fn to(id: Id, pid: u32, door: impl FnOnce() -> Result<OwnedFd>) -> Result<Arc<Self>> {
        let mut links = lock(&LINKS);
        let links = links.get_or_insert_default();
        if let Some(link) = links.get(&id).and_then(Weak::upgrade) {
            return Ok(link);
        }
        let end = match server::here(id) {
            Some(server) => End::Here(server),
            None => {
                let (wire, connecting) = (OnceLock::new(), Mutex::default());
                End::Client { door: Arc::new(door()?), wire, connecting }
            }
        };
        let link = Arc::new(Self { id, pid, end, last_lease: AtomicU64::new(0) });
        links.retain(|_, link| link.strong_count() > 0);
        links.insert(id, Arc::downgrade(&link));
        Ok(link)
    }

    pub(super) fn new(id: Id, pid: u32, door: OwnedFd) -> Result<Arc<Self>> {
        Self::to(id, pid, || Ok(door))
    }

    /// The link to the manager at the other end of `connection`, which this one keeps to itself.
    pub(super) fn far(id: Id, pid: u32, connection: ByteConnection) -> Arc<Self> {
        let end = End::Far(Far::open(connection));
        Arc::new(Self { id, pid, end, last_lease: AtomicU64::new(0) })
    }

    /// What a request through here is written for, if that is another host.
    pub(super) fn abroad(self: &Arc<Self>) -> Option<Abroad> {
        matches!(self.end, End::Far(_)).then(|| Abroad::Client(self.clone()))
    }

    /// A request that goes through here.
    pub(super) fn request(self: &Arc<Self>, kind: u8) -> Writer {
        Writer::request(kind).to(self.abroad())
    }

    fn is_gone(&self) -> Error {
        if let End::Far(far) = &self.end {
            let why = format!("the connection to the manager at {} is lost: connect again", far.peer);
            return Error::new(ErrorKind::Closed, why);
        }
        let why = format!("the manager (pid {}) is gone: it was shut down, or its process was killed", self.pid);
        Error::new(ErrorKind::Closed, why)
    }

    fn wire(&self) -> Result<&Arc<Wire>> {
        let End::Client { door, wire, connecting } = &self.end else { return Err(protocol::torn()) };
        if let Some(wire) = wire.get() {
            return Ok(wire);
        }
        let _one = lock(connecting);
        match wire.get() {
            Some(wire) => Ok(wire),
            None => {
                let made = Wire::connect(door).map_err(|error| match error.kind() {
                    ErrorKind::Closed => self.is_gone(),
                    _ => error,
                })?;
                Ok(wire.get_or_init(|| made))
            }
        }
    }

    /// Sends a request whose number is at `at`, and reads its answer. `makes` an object, or not.
    pub(super) async fn ask(self: &Arc<Self>, request: Writer, at: usize, makes: bool) -> Result<Reader> {
        self.ask_as(request, at, makes, &AtomicU64::new(0)).await
    }

    /// As [`ask`](Self::ask), and tells the request's number once it is sent.
    async fn ask_as(self: &Arc<Self>, mut request: Writer, at: usize, makes: bool, id: &AtomicU64) -> Result<Reader> {
        let answer = match &self.end {
            End::Here(server) => server.submit(request.seal())?.await.map_err(|_| self.is_gone())?,
            End::Far(far) => {
                let mut pending = Pending::new(self, &far.slots, makes);
                request.amend(at, pending.id);
                pending.kept = request.take_kept();
                pending.is_sent = true;
                far.tell(request.seal());
                id.store(pending.id, Relaxed);
                far.slots.answered(pending.id).await.map_err(|_| self.is_gone())?
            }
            End::Client { .. } => {
                let wire = self.wire()?;
                let mut pending = Pending::new(self, &wire.slots, makes);
                request.amend(at, pending.id);
                let asked = async {
                    wire.send(request.seal()).await?;
                    pending.is_sent = true;
                    id.store(pending.id, Relaxed);
                    wire.answer(pending.id).await
                };
                asked.await.map_err(|error| match error.kind() {
                    ErrorKind::Closed => self.is_gone(),
                    _ => error,
                })?
            }
        };
        let mut reader = Reader::from(answer, self.abroad())?;
        reader.number()?;
        Ok(reader)
    }

    /// Tells the manager something that has no answer. If it is gone, it need not know.
    fn tell(&self, request: Writer) {
        match &self.end {
            End::Client { wire, .. } => {
                if let Some(wire) = wire.get() {
                    wire.tell(request.seal());
                }
            }
            End::Far(far) => far.tell(request.seal()),
            End::Here(_) => {}
        }
    }

    pub(super) fn release(&self, object: u64) {
        let mut request = Writer::request(protocol::RELEASE);
        request.number(object);
        self.tell(request);
    }
}

/// The pipes.
struct Wire {
    this: Weak<Self>,
    tx: tokio::sync::Mutex<Sender<Sealed>>,
    /// What goes out before anything else: said by those who cannot wait.
    outbox: Mutex<VecDeque<Sealed>>,
    is_trying_later: AtomicBool,
    /// Where room in the pipe is told, and how often it was.
    room: Arc<Line>,
    rooms: AtomicU64,
    rx: Inbox<Sealed>,
    slots: Slots,
}

/// Who waits for which answer.
#[derive(Default)]
struct Slots(Mutex<SlotsState>);

#[derive(Default)]
struct SlotsState {
    last: u64,
    slots: HashMap<u64, Slot>,
    is_gone: bool,
}

enum Slot {
    Awake,
    Asleep(Waker),
    Answered(Sealed),
    /// Nobody waits any more, but the answer must be looked at.
    Abandoned(Weak<Link>, #[expect(dead_code, reason = "kept, not used")] Vec<Arc<Handle>>),
}

impl Wire {
    fn connect(door: &Arc<OwnedFd>) -> Result<Arc<Self>> {
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

    async fn answer(&self, id: u64) -> Result<Sealed> {
        let attempt = || {
            self.read();
            self.slots.take(id)
        };
        let sleep = |waker: &Waker| self.slots.sleep(id, waker);
        let waited = until_read(self.rx.line(), attempt, sleep).await;
        waited.map_err(|error| Error::io("cannot wait for a manager's answer", error))?
    }

    /// Sends a request after everything that was told before it. That the manager is gone is learned from its answers.
    async fn send(&self, mut request: Sealed) -> Result<()> {
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

    fn tell(&self, request: Sealed) {
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
    fn press(&self) {
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

impl Slots {
    fn has_sleepers(&self) -> bool {
        lock(&self.0).slots.values().any(|slot| matches!(slot, Slot::Asleep(_)))
    }

    fn is_gone(&self) -> bool {
        lock(&self.0).is_gone
    }

    /// There will be no answer any more.
    fn fail(&self) {
        let mut slots = lock(&self.0);
        slots.is_gone = true;
        let wakers: Vec<_> = slots.slots.values_mut().filter_map(Slot::wake).collect();
        let abandoned: Vec<_> = slots.slots.extract_if(|_, slot| matches!(slot, Slot::Abandoned(..))).collect();
        drop(slots);
        drop(abandoned);
        wakers.into_iter().for_each(Waker::wake);
    }

    fn take(&self, id: u64) -> Option<Result<Sealed>> {
        let mut slots = lock(&self.0);
        match slots.slots.get_mut(&id) {
            Some(Slot::Answered(_)) => match slots.slots.remove(&id) {
                Some(Slot::Answered(answer)) => Some(Ok(answer)),
                _ => None,
            },
            _ => slots.is_gone.then(|| Err(Error::closed("manager"))),
        }
    }

    fn sleep(&self, id: u64, waker: &Waker) {
        if let Some(slot) = lock(&self.0).slots.get_mut(&id)
            && !matches!(slot, Slot::Answered(_))
        {
            *slot = Slot::Asleep(waker.clone());
        }
    }

    /// Waits for an answer that another task brings.
    async fn answered(&self, id: u64) -> Result<Sealed> {
        poll_fn(|cx| {
            if let Some(answer) = self.take(id) {
                return Poll::Ready(answer);
            }
            self.sleep(id, cx.waker());
            // It may have come in between.
            self.take(id).map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// False if nobody has a slot for it: of an answer that is always looked at, nobody has asked.
    fn deliver(&self, answer: Sealed) -> bool {
        let Some(id) = protocol::id_of(answer.bytes()) else { return false };
        let mut slots = lock(&self.0);
        match slots.slots.get_mut(&id) {
            // Its caller was dropped.
            None => return false,
            Some(Slot::Abandoned(link, _)) => {
                let link = link.upgrade();
                let kept = slots.slots.remove(&id);
                drop(slots);
                drop(kept);
                link.into_iter().for_each(|link| link.discard(answer.clone()));
            }
            Some(slot) => {
                let waker = slot.wake();
                *slot = Slot::Answered(answer);
                drop(slots);
                waker.into_iter().for_each(Waker::wake);
            }
        }
        true
    }
}

/// The connection to a manager on another host. What can go out at once does; the rest, and all that comes in, is
/// moved by two tasks, in the runtime that the connection was made in.
struct Far {
    sender: Mutex<FarSender>,
    /// There is a rest.
    is_pressed: Arc<Notify>,
    slots: Slots,
    peer: String,
    tasks: Mutex<Vec<AbortHandle>>,
}

struct FarSender {
    sender: ByteSender,
    /// The writing task is at it, and must be the one that the socket wakes.
    is_flushing: bool,
}

impl Far {
    fn open(connection: ByteConnection) -> Arc<Self> {
        let peer = connection.peer_addr().to_string();
        let (sender, receiver) = connection.split();
        let far = Arc::new(Self {
            sender: Mutex::new(FarSender { sender, is_flushing: false }),
            is_pressed: Arc::default(),
            slots: Slots::default(),
            peer,
            tasks: Mutex::default(),
        });
        let (reads, writes) = (Arc::downgrade(&far), Arc::downgrade(&far));
        let reader = tokio::spawn(async move {
            loop {
                let answer = receiver.recv_bytes().await;
                let Some(far) = reads.upgrade() else { return };
                match answer.map(|answer| far.slots.deliver(Sealed::new(answer, Vec::new()))) {
                    Ok(true) => {}
                    Ok(false) => {
                        tracing::warn!(peer = far.peer, "a manager answers what it was not asked");
                        return far.lose();
                    }
                    Err(error) => {
                        tracing::debug!(%error, "the connection to a manager is lost");
                        return far.slots.fail();
                    }
                }
            }
        });
        let is_pressed = far.is_pressed.clone();
        let writer = tokio::spawn(async move {
            loop {
                is_pressed.notified().await;
                let flush = |cx: &mut Context<'_>| writes.upgrade().map_or(Poll::Ready(()), |far| far.poll_flush(cx));
                poll_fn(flush).await;
            }
        });
        lock(&far.tasks).extend([reader.abort_handle(), writer.abort_handle()]);
        far
    }

    fn tell(&self, request: Sealed) {
        let out = &mut *lock(&self.sender);
        let told = out.sender.start_send_unpin(request.bytes().to_vec());
        if !out.is_flushing && told.is_ok() {
            let mut now = Context::from_waker(Waker::noop());
            out.is_flushing = out.sender.poll_flush_unpin(&mut now).is_pending();
            if out.is_flushing {
                self.is_pressed.notify_one();
            }
        }
    }

    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut out = lock(&self.sender);
        let flushed = out.sender.poll_flush_unpin(cx);
        out.is_flushing = flushed.is_pending();
        // What fails now may drop handles, which tell of it here.
        drop(out);
        flushed.map(|flushed| {
            if let Err(error) = flushed {
                // The reading task learns of it, too.
                tracing::debug!(%error, "the connection to a manager is lost");
                self.slots.fail();
            }
        })
    }
}

impl Far {
    /// Hangs up.
    fn lose(&self) {
        self.slots.fail();
        let out = &mut *lock(&self.sender);
        // What cannot be sent at once need not be sent any more.
        let _ = out.sender.poll_close_unpin(&mut Context::from_waker(Waker::noop()));
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        lock(&self.tasks).drain(..).for_each(|task| task.abort());
    }
}

impl Slot {
    /// The waker to call, if its caller sleeps.
    fn wake(&mut self) -> Option<Waker> {
        match std::mem::replace(self, Self::Awake) {
            Self::Asleep(waker) => Some(waker),
            other => {
                *self = other;
                None
            }
        }
    }
}

/// A call that waits for its answer; dropped, nobody does.
struct Pending<'a> {
    link: &'a Arc<Link>,
    slots: &'a Slots,
    id: u64,
    makes: bool,
    is_sent: bool,
    kept: Vec<Arc<Handle>>,
}

impl<'a> Pending<'a> {
    fn new(link: &'a Arc<Link>, slots: &'a Slots, makes: bool) -> Self {
        let mut state = lock(&slots.0);
        state.last += 1;
        let id = state.last;
        state.slots.insert(id, Slot::Awake);
        Self { link, slots, id, makes, is_sent: false, kept: Vec::new() }
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let mut slots = lock(&self.slots.0);
        let Some(slot) = slots.slots.remove(&self.id) else { return };
        let is_looked_at = self.makes || matches!(self.link.end, End::Far(_));
        match slot {
            _ if !is_looked_at => {}
            Slot::Answered(answer) => {
                drop(slots);
                self.link.discard(answer);
            }
            _ if self.is_sent && !slots.is_gone => {
                let kept = std::mem::take(&mut self.kept);
                slots.slots.insert(self.id, Slot::Abandoned(Arc::downgrade(self.link), kept));
            }
            _ => {}
        }
    }
}

impl Link {
    /// Lets go of what an answer brings that nobody reads.
    fn discard(self: &Arc<Self>, answer: Sealed) {
        if let Some(object) = protocol::made_in(answer.bytes()) {
            self.release(object);
        }
        drop(Reader::from(answer, self.abroad()));
    }
}

/// Something that was asked for, and must be taken or given back. Dropped, it is given back.
pub(super) struct Asked {
    handle: Arc<Handle>,
    /// 0 if nothing was asked yet, or it is settled.
    id: AtomicU64,
    /// The answer was read.
    pub(super) is_read: bool,
}

impl Asked {
    /// Asks by a request that may have to wait. After `timeout` the manager is told that it is too late, and answers what came
    /// of it; only what was not even sent is over without its word.
    pub(super) async fn ask(handle: Arc<Handle>, request: Writer, timeout: Option<Duration>) -> Result<(Reader, Self)> {
        if let End::Here(_) = handle.link.end {
            return Err(Error::other("an object of a manager cannot wait in there for another one"));
        }
        let asked = Self { handle, id: AtomicU64::new(0), is_read: false };
        let reader = {
            let mut answer = pin!(asked.handle.link.ask_as(request, 1, false, &asked.id));
            match timeout {
                None => answer.await?,
                Some(timeout) => match tokio::time::timeout(timeout, &mut answer).await {
                    Ok(answer) => answer?,
                    Err(_) if asked.id() == 0 => {
                        return Err(Error::new(ErrorKind::Timeout, "the manager could not be asked in time"));
                    }
                    Err(_) => {
                        asked.tell(protocol::EXPIRE, asked.id());
                        answer.await?
                    }
                },
            }
        };
        fault::point("manager.got");
        Ok((reader, asked))
    }

    /// The number of the request that asked.
    pub(super) fn id(&self) -> u64 {
        self.id.load(Relaxed)
    }

    /// What it brought is taken for good.
    pub(super) fn take(mut self) {
        self.settle(protocol::TOOK);
    }

    fn settle(&mut self, how: u8) {
        let id = std::mem::take(self.id.get_mut());
        if id != 0 {
            self.tell(how, id);
        }
    }

    fn tell(&self, what: u8, id: u64) {
        let mut request = Writer::request(what);
        request.number(id);
        self.handle.link.tell(request);
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.settle(if self.is_read { protocol::GIVE_BACK } else { protocol::UNREAD });
    }
}

/// One hold on an object, given back when dropped. It is a serde value; on its way a lease holds the object.
pub(super) struct Handle {
    pub(super) link: Arc<Link>,
    pub(super) object: u64,
    /// The object that this handle is part of, in the manager itself.
    owner: u64,
}

impl Handle {
    /// A handle of an object that the manager already counts for this process.
    pub(super) fn counted(link: &Arc<Link>, object: u64) -> Self {
        let owner = server::owner_of_new_handles();
        if let End::Here(server) = &link.end {
            server.objects.hold_inside(owner, object);
            server.objects.release([(object, 1)]);
        }
        Self { link: link.clone(), object, owner }
    }

    /// A handle that a client counts already.
    pub(super) fn held(link: &Arc<Link>, object: u64) -> Self {
        Self { link: link.clone(), object, owner: 0 }
    }

    /// One more handle of an object that is there anyway.
    pub(super) fn claimed(link: &Arc<Link>, object: u64) -> Self {
        // Without a pipe to the manager the handle is of no use, as the first call on it says.
        let owner = link.claim(object).unwrap_or_default();
        Self { link: link.clone(), object, owner }
    }

    /// One more handle, in the manager itself.
    pub(super) fn inside(link: Arc<Link>, object: u64) -> Result<Self> {
        let owner = link.claim(object)?;
        Ok(Self { link, object, owner })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        match &self.link.end {
            End::Client { .. } | End::Far(_) => self.link.release(self.object),
            End::Here(server) => server.objects.release_inside(self.owner, self.object),
        }
    }
}

/// What the handles in one message have in common when they leave.
struct Leaving {
    manager: Id,
    door: u32,
    end: u32,
    lease: Lease,
}

impl Link {
    fn open_lease<E: serde::ser::Error>(&self) -> Result<Leaving, E> {
        let failed = |why: &str| E::custom(format_args!("a handle cannot leave: {why}"));
        if let End::Far(_) = self.end {
            return Err(failed("it is of a manager on another host, to which its receiver must connect itself"));
        }
        let (reader, writer) = std::io::pipe().map_err(|error| failed(&error.to_string()))?;
        let end = attach::leave::<E>(Attachment::owned(writer.into()))?;
        let (door, lease) = match &self.end {
            End::Here(server) => (server.door(), server.open_lease(reader.into())),
            End::Client { door, .. } => {
                let lease = (0, self.last_lease.fetch_add(1, Relaxed));
                self.be_connected().map_err(|error| E::custom(format_args!("a handle cannot leave: {error}")))?;
                let mut request = Writer::request(protocol::LEASE_OPEN);
                request.number(lease.1).attach(Attachment::owned(reader.into()));
                self.tell(request);
                (door, lease)
            }
            End::Far(_) => return Err(failed("it is of a manager on another host")),
        };
        let door = attach::leave::<E>(Attachment::Shared(door.clone()))?;
        Ok(Leaving { manager: self.id, door, end, lease })
    }

    fn lease(&self, lease: Lease, object: u64) {
        match &self.end {
            End::Here(server) => server.objects.lease(lease, object),
            End::Client { wire, .. } => {
                let mut request = Writer::request(protocol::LEASE);
                request.number(lease.1).number(object);
                self.tell(request);
                // Should this process die at once, the manager must know of the handle that has left.
                if let Some(wire) = wire.get() {
                    wire.press();
                }
            }
            End::Far(_) => {}
        }
    }

    fn claim(&self, object: u64) -> Result<u64> {
        let owner = server::owner_of_new_handles();
        match &self.end {
            End::Here(server) => server.objects.hold_inside(owner, object),
            End::Client { .. } | End::Far(_) => {
                self.be_connected()?;
                let mut request = Writer::request(protocol::CLAIM);
                request.number(object);
                self.tell(request);
            }
        }
        Ok(owner)
    }

    /// If the manager is gone, handles of it still travel, and are of no use here or elsewhere.
    fn be_connected(&self) -> Result<()> {
        if let End::Far(_) = self.end {
            return Ok(());
        }
        match self.wire() {
            Err(error) if error.kind() != ErrorKind::Closed => Err(error),
            _ => Ok(()),
        }
    }
}

/// What the handles in one message have in common when they arrive.
struct Arriving {
    manager: Id,
    link: Arc<Link>,
    end: Option<OwnedFd>,
}

impl Drop for Arriving {
    /// After the last claim: the end of the lease follows it, by the same pipe.
    fn drop(&mut self) {
        if let (End::Client { .. }, Some(end)) = (&self.link.end, self.end.take()) {
            let mut request = Writer::request(protocol::CLAIMED);
            request.attach(Attachment::owned(end));
            self.link.tell(request);
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Told {
    manager: Id,
    pid: u32,
    object: u64,
    door: u32,
    end: u32,
}

/// The serde form of a handle that others may have too.
pub(super) fn serialize<S: Serializer>(handle: &Arc<Handle>, serializer: S) -> Result<S::Ok, S::Error> {
    match abroad::leave(handle) {
        Some(Ok(object)) => object.serialize(serializer),
        Some(Err(why)) => Err(serde::ser::Error::custom(why)),
        None => handle.serialize(serializer),
    }
}

impl Handle {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let is_it = |leaving: &Leaving| leaving.manager == self.link.id;
        let leaving = attach::in_common(is_it, || self.link.open_lease::<S::Error>())?;
        self.link.lease(leaving.lease, self.object);
        let (manager, pid, object) = (self.link.id, self.link.pid, self.object);
        Told { manager, pid, object, door: leaving.door, end: leaving.end }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Handle {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if abroad::is_arriving() {
            let object = u64::deserialize(deserializer)?;
            return abroad::take(object).ok_or_else(|| D::Error::custom("a handle of an object that was not given"));
        }
        let told = Told::deserialize(deserializer)?;
        let arriving = attach::in_common(
            |arriving: &Arriving| arriving.manager == told.manager,
            || {
                let end = attach::take::<D::Error>(told.end)?;
                let door = attach::take::<D::Error>(told.door)?;
                let link = Link::to(told.manager, told.pid, || Ok(door)).map_err(D::Error::custom)?;
                Ok::<_, D::Error>(Arriving { manager: told.manager, link, end: Some(end) })
            },
        )?;
        let owner = arriving.link.claim(told.object).map_err(D::Error::custom)?;
        Ok(Self { link: arriving.link.clone(), object: told.object, owner })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::Receiver;
    use crate::connection::{Listener, connect};
    use std::sync::mpsc;

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

    /// The handles that an abandoned call kept go with the connection, by the writer that finds it lost.
    #[test]
    fn a_writer_that_finds_the_connection_lost_can_drop_handles() {
        let (done, is_done) = mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = Listener::bind("127.0.0.1:0").authkey(b"key").await.unwrap();
                let address = listener.local_addr();
                let client = async { connect(&address, Some(b"key")).await.unwrap() };
                let (client, server) = tokio::join!(client, listener.accept());
                let far = Far::open(client);
                // The writer's part is done here, and nobody else's.
                lock(&far.tasks).drain(..).for_each(|task| task.abort());
                let link =
                    Arc::new(Link { id: (1, 1), pid: 1, end: End::Far(far.clone()), last_lease: AtomicU64::new(0) });
                let kept = vec![Arc::new(Handle::held(&link, 7))];
                lock(&far.slots.0).slots.insert(1, Slot::Abandoned(Arc::downgrade(&link), kept));
                drop(server.unwrap());
                while !far.slots.is_gone() {
                    far.tell(Writer::request(protocol::RELEASE).seal());
                    poll_fn(|cx| far.poll_flush(cx)).await;
                    tokio::task::yield_now().await;
                }
                assert!(lock(&far.slots.0).slots.is_empty());
            });
            done.send(()).unwrap();
        });
        is_done.recv_timeout(Duration::from_secs(20)).expect("the writer does not wait for itself");
    }
}
