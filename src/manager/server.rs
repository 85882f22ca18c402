//! The process that owns the objects, and how it runs calls.
//!
//! One thread leads: it waits for requests on the runtime and runs them in place, so that a quick call meets no other
//! thread. The main thread watches it: a leader that is still in the same call after a while is left behind with it,
//! and another thread leads on. So a slow object delays nobody but its own callers, who wait in line at it.
//!
//! # State
//! `pulse`, of the present leader: how many calls it has begun, `RUNNING` while it is outside of the runtime, and
//! `LEFT_BEHIND`. `is_dozing`: the watcher sleeps until it is called.
//!
//! # Moves
//! | move | who | then |
//! |---|---|---|
//! | idle -> RUNNING | the leader, with a request | it calls a dozing watcher |
//! | RUNNING -> idle | the leader, done | it waits for the next request |
//! | RUNNING -> RUNNING, LEFT_BEHIND | the watcher, after two looks at the same call | another thread leads |
//! | the leader finds LEFT_BEHIND when it is done | itself | it becomes a helper |
//!
//! # Invariants
//! 1. At most one thread waits on the runtime, and it is the leader.
//! 2. A call that holds an object's turn is in one thread's hand; others for that object wait in its line.
//! 3. What a client sent is taken in order; what it releases is released after everything it sent before.
//!
//! # Death
//! | killed | what happens |
//! |---|---|
//! | a client | its pipes or its socket hang up; what it had sent is done, then what it held is released |
//! | a client that waits, or has got something and not said that it took it | its place goes, the item goes back |
//! | a client that holds a lock or a permit | it is free for the next, who is told if it is a lock |
//! | who carried a handle | the kernel closes its lease's other end |
//! | the server | every client's pipe hangs up: all its calls fail |
//!
//! # Cancel
//! A call whose future is dropped is done if it was sent; its answer is thrown away by the client. Of one that waits
//! see `waits.rs`.

use super::abroad::Abroad;
use super::inboxes::{Inboxes, Open};
use super::link::{Handle, Link};
use super::method::{Attempt, Doors, Frame};
use super::objects::{Lease, Object, Objects, lock};
use super::protocol::{self, Op, Reader, Writer};
use super::waits::{End, Ticket};
use crate::channel::{Receiver, Sender};
#[cfg(feature = "tls")]
use crate::connection::rustls;
use crate::connection::{ByteConnection, ByteReceiver, ByteSender, Listener};
use crate::error::{Error, ErrorKind, Result};
use crate::os::socket::Wait;
use crate::os::{fault, image, reactor};
use crate::wait::{Look, Seen, Watchful};
use crate::wire::{self, Fd, Sealed, frame};
use futures::SinkExt;
use futures::stream::{FuturesUnordered, StreamExt};
use std::cell::Cell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::future::poll_fn;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::task::{Context, Poll, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Notify, oneshot};

/// Between two looks at the leader. A call is left behind after one to two of them.
const LOOK: Duration = Duration::from_millis(1);
/// So many looks without a call, and the watcher dozes.
const DOZE_AFTER: u32 = 50;
/// A helper without work ends after this.
const HELPER_IDLE: Duration = Duration::from_secs(10);
/// Requests taken in place before the runtime looks around.
const TURN: u32 = 32;

/// In which a client from elsewhere must have said who it is.
pub(super) const GREETING_TIME: Duration = Duration::from_secs(10);

const RUNNING: u64 = 1;
const LEFT_BEHIND: u64 = 2;
const ONE_CALL: u64 = 4;

/// Names one server in the world.
pub(super) type Id = (u64, u64);

/// What a server is started with.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct Setup {
    pub(super) id: Id,
    /// Where clients say hello.
    pub(super) intake: Fd<OwnedFd>,
    /// The clients' end, for handles that leave from here.
    pub(super) door: Fd<OwnedFd>,
    /// The entries that may be called; `None` is all.
    pub(super) exposed: Option<HashSet<u64>>,
    /// Where clients from elsewhere connect.
    pub(super) bind: Option<Bind>,
}

/// Where and how clients from elsewhere connect.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct Bind {
    pub(super) address: String,
    pub(super) key: Vec<u8>,
    /// Certificates and the key to them, in DER.
    #[cfg(feature = "tls")]
    pub(super) tls: Option<(Vec<Vec<u8>>, Vec<u8>)>,
}

impl Bind {
    async fn listen(self) -> Result<Listener> {
        let bind = Listener::bind(&self.address).authkey(self.key).allow_md5(false);
        #[cfg(feature = "tls")]
        let bind = match self.tls {
            Some((certificates, key)) => bind.tls(tls(certificates, key)?),
            None => bind,
        };
        bind.await
    }
}

#[cfg(feature = "tls")]
fn tls(certificates: Vec<Vec<u8>>, key: Vec<u8>) -> Result<Arc<rustls::ServerConfig>> {
    let unfit = |why: String| Error::new(ErrorKind::Other, format!("this certificate cannot be used: {why}"));
    let key = rustls::pki_types::PrivateKeyDer::try_from(key).map_err(|why| unfit(why.into()))?;
    let certificates = certificates.into_iter().map(Into::into).collect();
    let config = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(certificates, key);
    config.map(Arc::new).map_err(|why| unfit(why.to_string()))
}

/// What a client from elsewhere is told.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct Welcome {
    pub(super) id: Id,
    pub(super) pid: u32,
    pub(super) build: u64,
}

/// The server of this process, if it is one.
static HERE: OnceLock<Arc<Server>> = OnceLock::new();

/// The server of this process, if it is the one of this name.
pub(super) fn here(id: Id) -> Option<&'static Arc<Server>> {
    HERE.get().filter(|server| server.id == id)
}

thread_local! {
    /// The object that a call on this thread works on; 0 is none.
    static AT_WORK_ON: Cell<u64> = const { Cell::new(0) };
    /// The function that this thread called last.
    static LAST_ENTRY: Cell<Option<u64>> = const { Cell::new(None) };
    static DOORS: Cell<Option<Box<Doors>>> = const { Cell::new(None) };
}

/// The object that handles decoded on this thread become part of.
pub(super) fn owner_of_new_handles() -> u64 {
    AT_WORK_ON.get()
}

pub(super) struct Server {
    id: Id,
    intake: Arc<OwnedFd>,
    door: Arc<OwnedFd>,
    exposed: Option<HashSet<u64>>,
    /// Where clients from elsewhere connect.
    address: Option<String>,
    pub(super) objects: Objects<Box<Job>>,
    runtime: Runtime,
    /// Where requests of this machine's clients come in, and how long it pays to look for them.
    inboxes: Inboxes<Arc<Connection>>,
    look: Look,
    /// What else happens.
    readers: Mutex<FuturesUnordered<Pin<Box<dyn Future<Output = Event> + Send>>>>,
    /// To be read from now on, said by threads that do not lead.
    arrivals: Mutex<Vec<Pin<Box<dyn Future<Output = Event> + Send>>>>,
    arrived: Notify,
    pulse: Mutex<Arc<AtomicU64>>,
    is_dozing: AtomicBool,
    watcher: Thread,
    helpers: Helpers,
    /// Functions that have kept a leader too long.
    slow: Mutex<HashSet<u64>>,
    has_slow: AtomicBool,
    connections: AtomicUsize,
    last_connection: AtomicU64,
    last_lease: AtomicU64,
    has_ended: AtomicBool,
}

enum Event {
    /// A client may have said hello.
    Intake(tokio::io::unix::AsyncFd<Arc<OwnedFd>>),
    Request(Arc<Connection>, Incoming, Result<Sealed>),
    /// It is worth to look into the inboxes again.
    Changed,
    /// Somebody from elsewhere has connected, or could not.
    Peer(Arc<Listener>, Result<ByteConnection>),
    /// And has said who it is.
    Hello(Result<(ByteSender, ByteReceiver)>),
    LeaseEnded(Lease),
    Flushed(Arc<Connection>),
}

impl Event {
    fn of(open: Open<Arc<Connection>>, request: Result<Sealed>) -> Self {
        Self::Request(open.client.clone(), Incoming::Near(open), request)
    }
}

/// One client.
pub(super) struct Connection {
    number: u64,
    server: Arc<Server>,
    /// It shares no memory with this process: handles go as references that it holds.
    is_far: bool,
    held: Mutex<HashMap<u64, u64>>,
    /// Where requests that may wait were made, and what they brought may be held.
    asked: Mutex<HashMap<u64, Arc<Object<Box<Job>>>>>,
    out: Mutex<Out>,
}

/// The way back to a client.
struct Out {
    /// `None` while a flush has it.
    sender: Option<Outgoing>,
    backlog: VecDeque<Sealed>,
    is_flushing: bool,
    is_gone: bool,
    /// Read again when the backlog is gone: a client that does not read is not read either.
    parked: Option<Incoming>,
}

/// Where requests come from; a near one is in the server's hand.
enum Incoming {
    Near(Open<Arc<Connection>>),
    Far(ByteReceiver),
}

enum Outgoing {
    Near(Sender<Sealed>),
    Far(ByteSender),
}

impl Outgoing {
    async fn send(&mut self, answer: Sealed) -> Result<()> {
        match self {
            Self::Near(sender) => sender.send(answer).await.map_err(Into::into),
            Self::Far(sender) => sender.feed(answer.bytes().to_vec()).await,
        }
    }

    async fn flush(&mut self) -> Result<()> {
        match self {
            Self::Near(_) => Ok(()),
            Self::Far(sender) => sender.flush().await,
        }
    }
}

impl Connection {
    fn abroad(self: &Arc<Self>) -> Option<Abroad> {
        self.is_far.then(|| Abroad::Server(self.clone()))
    }

    /// Holds the object of a handle that leaves this way; false if it is no object of this manager.
    pub(super) fn give(&self, handle: &Handle) -> bool {
        let is_ours = handle.link.id == self.server.id && self.server.objects.hold(handle.object);
        if is_ours {
            *lock(&self.held).entry(handle.object).or_default() += 1;
        }
        is_ours
    }

    /// A handle of an object that it holds.
    pub(super) fn receive(&self, object: u64) -> Option<Handle> {
        if object != protocol::NAMES && !lock(&self.held).contains_key(&object) {
            return None;
        }
        Handle::inside(self.server.link().ok()?, object).ok()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.server.objects.release(std::mem::take(&mut *lock(&self.held)));
    }
}

/// A call that is being worked off, operation by operation.
pub(super) struct Job {
    frame: Frame,
    left: u64,
    reply_to: ReplyTo,
    /// The operation that is next, if it has been read.
    next: Option<Next>,
    /// It has the turn of its next object.
    object: Option<Arc<Object<Box<Job>>>>,
}

enum Next {
    Run(Op),
    /// What a waiting operation brought, or still waits for, is taken or given back.
    Settle(Ticket, End),
    /// The time of a waiting operation is over.
    Expire(Ticket),
}

impl Job {
    /// Boxed, for it goes from hand to hand.
    fn new(reader: Reader, left: u64, answer: Writer, reply_to: ReplyTo) -> Box<Self> {
        let frame = Frame::new(reader, answer);
        Box::new(Self { frame, left, reply_to, next: None, object: None })
    }

    fn entry(&self) -> Option<u64> {
        match &self.next {
            Some(Next::Run(op)) => Some(op.entry),
            _ => None,
        }
    }
}

enum ReplyTo {
    Client(Arc<Connection>),
    Nobody,
    /// A task of this process.
    Here(oneshot::Sender<Sealed>),
}

/// Runs the server until it is told to end or nobody holds anything of it.
pub(super) fn serve(setup: Setup) -> Result<()> {
    let built = Builder::new_current_thread().enable_all().build();
    let runtime = built.map_err(|error| Error::io("cannot build a tokio runtime in the manager", error))?;
    let listener = setup.bind.map(|bind| runtime.block_on(bind.listen())).transpose()?.map(Arc::new);
    let server = Arc::new(Server {
        id: setup.id,
        intake: Arc::new(setup.intake.into_inner()),
        door: Arc::new(setup.door.into_inner()),
        exposed: setup.exposed,
        address: listener.as_ref().map(|listener| listener.local_addr()),
        objects: Objects::new(),
        runtime,
        inboxes: Inboxes::new(),
        look: Look::default(),
        readers: Mutex::default(),
        arrivals: Mutex::default(),
        arrived: Notify::new(),
        pulse: Mutex::default(),
        is_dozing: AtomicBool::new(false),
        watcher: std::thread::current(),
        helpers: Helpers::default(),
        slow: Mutex::default(),
        has_slow: AtomicBool::new(false),
        connections: AtomicUsize::new(0),
        last_connection: AtomicU64::new(0),
        last_lease: AtomicU64::new(0),
        has_ended: AtomicBool::new(false),
    });
    let _ = HERE.set(server.clone());
    // It has the number that clients know, and is held for ever.
    let names = server.objects.add(Box::new(super::namespace::Names::new()));
    debug_assert_eq!(names, protocol::NAMES);
    if let Some(listener) = &listener {
        server.read(until_peer(listener.clone()));
    }
    let intake = {
        let _inside = server.runtime.enter();
        reactor::watch(server.intake.clone(), Interest::READABLE)?
    };
    server.read(until_hello(intake));
    server.read(server.clone().until_change());
    let pulse = lock(&server.pulse).clone();
    server.helpers.run(&server, Task::Lead(pulse));
    server.watch();
    // Its socket file goes.
    listener.iter().for_each(|listener| listener.close());
    Ok(())
}

async fn until_hello(intake: tokio::io::unix::AsyncFd<Arc<OwnedFd>>) -> Event {
    if let Ok(mut ready) = intake.readable().await {
        ready.clear_ready();
    }
    Event::Intake(intake)
}

async fn until_ended(lease: Lease, reader: Arc<OwnedFd>) -> Event {
    match reactor::watch(reader, Interest::READABLE) {
        Ok(watch) => drop(watch.readable().await.map(|mut ready| ready.clear_ready())),
        // Without a way to learn of its end it must not end.
        Err(error) => {
            tracing::warn!(%error, "a handle on its way cannot be watched; its object stays");
            std::future::pending::<()>().await;
        }
    }
    Event::LeaseEnded(lease)
}

/// The first words of a client from elsewhere, and of the manager to it.
pub(super) const GREETING: &[u8; 16] = b"multiprocess mgr";

/// Lets in who runs the same build.
async fn greet(id: Id, peer: ByteConnection) -> Event {
    let greeted = async {
        let build = image::fingerprint();
        let theirs = peer.recv_bytes().await?;
        let Some(theirs) = theirs.strip_prefix(GREETING).and_then(|rest| <[u8; 8]>::try_from(rest).ok()) else {
            return Err(Error::new(ErrorKind::Decode, "the other end is no client of a manager"));
        };
        let welcome = Welcome { id, pid: std::process::id(), build };
        let message = wire::encode(&welcome)?;
        peer.send_bytes(&[GREETING, message.payload(&welcome)].concat()).await?;
        match u64::from_le_bytes(theirs) == build {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Decode, "it is another build of this program, or another program")),
        }
    };
    let greeted = tokio::time::timeout(GREETING_TIME, greeted).await;
    let greeted = greeted.unwrap_or_else(|_| Err(Error::new(ErrorKind::Timeout, "it did not say who it is")));
    Event::Hello(greeted.map(|()| peer.split()))
}

async fn until_peer(listener: Arc<Listener>) -> Event {
    let peer = listener.accept().await;
    Event::Peer(listener, peer)
}

async fn next_request(connection: Arc<Connection>, receiver: ByteReceiver) -> Event {
    let request = receiver.recv_bytes().await.map(|bytes| Sealed::new(bytes, Vec::new()));
    Event::Request(connection, Incoming::Far(receiver), request)
}

async fn flush(connection: Arc<Connection>, mut sender: Outgoing) -> Event {
    loop {
        let next = lock(&connection.out).backlog.pop_front();
        let is_flushed = next.is_none();
        let sent = match next {
            Some(answer) => sender.send(answer).await,
            None => sender.flush().await,
        };
        let mut out = lock(&connection.out);
        if sent.is_err() {
            // The client is gone, as its other pipe will tell.
            out.backlog.clear();
        }
        if out.backlog.is_empty() && (is_flushed || sent.is_err()) {
            out.sender = (!out.is_gone).then_some(sender);
            out.is_flushing = false;
            break;
        }
    }
    Event::Flushed(connection)
}

/// The watcher's part: the main thread.
impl Server {
    fn watch(self: &Arc<Self>) {
        let (mut last, mut calm, mut next_collection) = (0, 0, Instant::now());
        while !self.has_ended.load(SeqCst) {
            std::thread::park_timeout(LOOK);
            let pulse = lock(&self.pulse).clone();
            let seen = pulse.load(SeqCst);
            if seen & RUNNING != 0 && seen == last {
                self.leave_behind(&pulse, seen);
            }
            calm = if seen & RUNNING == 0 && seen == last { calm + 1 } else { 0 };
            last = seen;
            if self.objects.may_have_circles() && Instant::now() >= next_collection {
                let start = Instant::now();
                self.objects.collect();
                // A twentieth of the time at most.
                next_collection = Instant::now() + 20 * start.elapsed() + LOOK;
            } else if calm >= DOZE_AFTER && !self.objects.has_lost_holders() {
                self.doze(&pulse, seen);
                calm = 0;
            }
        }
    }

    fn leave_behind(self: &Arc<Self>, pulse: &AtomicU64, seen: u64) {
        if pulse.compare_exchange(seen, seen | LEFT_BEHIND, SeqCst, SeqCst).is_ok() {
            let new = Arc::<AtomicU64>::default();
            *lock(&self.pulse) = new.clone();
            self.helpers.run(self, Task::Lead(new));
        }
    }

    fn doze(&self, pulse: &AtomicU64, seen: u64) {
        self.is_dozing.store(true, SeqCst);
        // A leader that began just before has not seen it.
        let is_calm = || pulse.load(SeqCst) == seen && !self.objects.has_lost_holders();
        while self.is_dozing.load(SeqCst) && is_calm() && !self.has_ended.load(SeqCst) {
            std::thread::park();
        }
        self.is_dozing.store(false, SeqCst);
    }

    /// A thread that does not lead has done what may have kept objects in its hand.
    fn let_go(&self) {
        if self.objects.look_again_if_in_hand() {
            self.wake_watcher();
        }
    }

    fn wake_watcher(&self) {
        if self.is_dozing.load(SeqCst) {
            self.is_dozing.store(false, SeqCst);
            self.watcher.unpark();
        }
    }

    fn begin(&self, pulse: &AtomicU64) {
        pulse.fetch_add(ONE_CALL | RUNNING, SeqCst);
        self.wake_watcher();
    }

    /// False if this thread leads no more.
    fn end(&self, pulse: &AtomicU64) -> bool {
        pulse.fetch_and(!RUNNING, SeqCst) & LEFT_BEHIND == 0
    }
}

/// The leader's part.
impl Server {
    /// Waits for `event` too from now on. If another thread leads meanwhile, it is told.
    fn read(&self, event: impl Future<Output = Event> + Send + 'static) {
        match self.readers.try_lock() {
            Ok(readers) => readers.push(Box::pin(event)),
            Err(_) => {
                lock(&self.arrivals).push(Box::pin(event));
                self.arrived.notify_one();
            }
        }
    }

    async fn until_change(self: Arc<Self>) -> Event {
        self.inboxes.changed().await;
        Event::Changed
    }

    /// A request of one of this machine's clients.
    fn next_near(&self) -> Option<Event> {
        let (open, request) = self.inboxes.next()?;
        Some(Event::of(open, request))
    }

    /// What is next to do. It looks for it, for a while, before it sleeps.
    fn next_event(&self, taken: u32) -> Event {
        let is_turn = taken.is_multiple_of(TURN);
        if !is_turn && let Some(event) = self.next_near() {
            return event;
        }
        let mut watchful = Watchful::default();
        if !is_turn
            && self.inboxes.has_hot()
            && let Seen::Found(event) = watchful.look_as(&self.look, &mut || self.next_near())
        {
            return event;
        }
        let mut readers = lock(&self.readers);
        self.runtime.block_on(async {
            if is_turn {
                // A request that is always there already would keep the runtime from looking at others.
                tokio::task::yield_now().await;
            }
            let mut arrived = pin!(self.arrived.notified());
            poll_fn(|cx| {
                // Only who holds the readers may take in what others leave, for it may sleep on them at any time.
                while arrived.as_mut().poll(cx).is_ready() {
                    arrived.set(self.arrived.notified());
                }
                readers.extend(std::mem::take(&mut *lock(&self.arrivals)));
                // There is none while all are in the hands of those who were left behind.
                if let Poll::Ready(Some(event)) = readers.poll_next_unpin(cx) {
                    return Poll::Ready(event);
                }
                let seen = match self.inboxes.has_hot() {
                    true => watchful.look_as(&self.look, &mut || self.next_near()),
                    false => Seen::Over,
                };
                match seen {
                    Seen::Found(event) => return Poll::Ready(event),
                    Seen::Again => cx.waker().wake_by_ref(),
                    Seen::Over => {
                        if let Some((open, request)) = self.inboxes.leave() {
                            return Poll::Ready(Event::of(open, request));
                        }
                    }
                }
                Poll::Pending
            })
            .await
        })
    }

    fn lead(self: &Arc<Self>, pulse: &AtomicU64) {
        let mut taken = 0u32;
        loop {
            taken = taken.wrapping_add(1);
            let event = self.next_event(taken);
            self.begin(pulse);
            LAST_ENTRY.set(None);
            survive(|| self.react(event));
            if !self.end(pulse) {
                if let Some(entry) = LAST_ENTRY.get() {
                    lock(&self.slow).insert(entry);
                    self.has_slow.store(true, Relaxed);
                }
                self.let_go();
                return;
            }
            if self.has_ended.load(SeqCst) {
                return;
            }
        }
    }

    fn react(self: &Arc<Self>, event: Event) {
        match event {
            Event::Intake(intake) => {
                self.take_hellos();
                self.read(until_hello(intake));
            }
            Event::Request(connection, receiver, Ok(request)) => {
                // What is next is taken only when this one has its place, for another thread may take it.
                let job = match self.take_request(&connection, request) {
                    Ok(job) => job,
                    Err(error) => {
                        tracing::warn!(%error, "a client of the manager is cut off");
                        drop(receiver);
                        return self.lose(connection);
                    }
                };
                let mut out = lock(&connection.out);
                if out.backlog.is_empty() {
                    drop(out);
                    self.go_on_reading(connection, receiver);
                } else {
                    out.parked = Some(receiver);
                    drop(out);
                }
                job.into_iter().for_each(|job| self.work(job));
            }
            Event::Request(connection, receiver, Err(_)) => {
                // Closed; or a request was lost, and then so is whoever waits for its answer: better they know.
                drop(receiver);
                self.lose(connection);
            }
            Event::Peer(listener, peer) => {
                match peer {
                    Ok(peer) => self.read(greet(self.id, peer)),
                    Err(error) => tracing::debug!(%error, "a stranger was not let in to the manager"),
                }
                self.read(until_peer(listener));
            }
            Event::Hello(Ok((sender, receiver))) => {
                let connection = self.admit(Outgoing::Far(sender));
                self.read(next_request(connection, receiver));
            }
            Event::Hello(Err(error)) => tracing::warn!(%error, "a client from elsewhere was not let in"),
            Event::LeaseEnded(lease) => {
                self.objects.end_lease(lease);
                self.end_if_forgotten();
            }
            Event::Flushed(connection) => {
                let parked = lock(&connection.out).parked.take();
                if let Some(receiver) = parked {
                    self.go_on_reading(connection, receiver);
                }
            }
            Event::Changed => {
                self.inboxes.look_again();
                self.read(self.clone().until_change());
            }
        }
    }

    fn lose(self: &Arc<Self>, connection: Arc<Connection>) {
        let mut out = lock(&connection.out);
        out.is_gone = true;
        let gone = (out.sender.take(), out.parked.take(), std::mem::take(&mut out.backlog));
        drop(out);
        drop(gone);
        let asked = std::mem::take(&mut *lock(&connection.asked));
        for (id, object) in asked {
            self.tell(object, Next::Settle((connection.number, id), End::Lost));
        }
        drop(connection);
        self.connections.fetch_sub(1, SeqCst);
        self.end_if_forgotten();
    }

    fn go_on_reading(&self, connection: Arc<Connection>, receiver: Incoming) {
        match receiver {
            Incoming::Near(open) => self.inboxes.put_back(open),
            Incoming::Far(receiver) => self.read(next_request(connection, receiver)),
        }
    }

    fn admit(self: &Arc<Self>, sender: Outgoing) -> Arc<Connection> {
        self.connections.fetch_add(1, SeqCst);
        let is_far = matches!(sender, Outgoing::Far(_));
        let out =
            Out { sender: Some(sender), backlog: VecDeque::new(), is_flushing: false, is_gone: false, parked: None };
        let number = self.last_connection.fetch_add(1, Relaxed) + 1;
        let (server, held, out) = (self.clone(), Mutex::default(), Mutex::new(out));
        Arc::new(Connection { number, server, is_far, held, asked: Mutex::default(), out })
    }

    fn take_hellos(self: &Arc<Self>) {
        while let Ok(Some(parcel)) = frame::recv(self.intake.as_fd(), Wait::No) {
            match wire::decode::<(Receiver<Sealed>, Sender<Sealed>)>(parcel) {
                Ok((receiver, sender)) => {
                    let connection = self.admit(Outgoing::Near(sender));
                    let _inside = self.runtime.enter();
                    self.inboxes.add(connection, receiver);
                }
                // Its pipes are closed by now, which tells the client.
                Err(error) => tracing::warn!(%error, "a client of the manager could not be taken in"),
            }
        }
    }

    /// Nobody is connected and no handle is on its way: nobody will ever ask again.
    fn end_if_forgotten(self: &Arc<Self>) {
        self.take_hellos();
        if self.connections.load(SeqCst) == 0 && !self.objects.has_leases() {
            self.finish();
        }
    }

    fn finish(&self) {
        self.has_ended.store(true, SeqCst);
        self.watcher.unpark();
    }

    /// Does what a request says. A call is returned if it can go on, and waits in line at its object if not.
    fn take_request(self: &Arc<Self>, connection: &Arc<Connection>, request: Sealed) -> Result<Option<Box<Job>>> {
        let mut reader = Reader::new(request)?;
        fault::point("manager.request");
        match reader.byte()? {
            protocol::CALL => {
                let (id, left) = (reader.number()?, reader.number()?);
                let reply_to = ReplyTo::Client(connection.clone());
                let answer = Writer::answer(id).to(connection.abroad());
                return Ok(self.prepare(Job::new(reader, left, answer, reply_to), None));
            }
            protocol::WAIT => {
                let id = reader.number()?;
                if lock(&connection.asked).contains_key(&id) {
                    return Err(protocol::torn());
                }
                let reply_to = ReplyTo::Client(connection.clone());
                let mut job = Job::new(reader, 1, Writer::answer(id).to(connection.abroad()), reply_to);
                job.frame.wait = Some(Attempt::new((connection.number, id)));
                return Ok(self.prepare(job, None));
            }
            kind @ (protocol::TOOK | protocol::GIVE_BACK | protocol::UNREAD) => {
                let id = reader.number()?;
                let object = lock(&connection.asked).remove(&id);
                if let Some(object) = object {
                    let end = match kind {
                        protocol::TOOK => End::Took,
                        protocol::GIVE_BACK => End::GaveBack,
                        _ => End::Unread,
                    };
                    self.tell(object, Next::Settle((connection.number, id), end));
                }
            }
            protocol::EXPIRE => {
                let id = reader.number()?;
                let object = lock(&connection.asked).get(&id).cloned();
                if let Some(object) = object {
                    self.tell(object, Next::Expire((connection.number, id)));
                }
            }
            // Leases are for families, and ending the manager is for who started it.
            protocol::LEASE_OPEN | protocol::LEASE | protocol::CLAIMED | protocol::END if connection.is_far => {
                return Err(protocol::torn());
            }
            protocol::LEASE_OPEN => {
                let lease = (connection.number, reader.number()?);
                self.objects.open_lease(lease);
                self.read(until_ended(lease, Arc::new(reader.fd()?)));
            }
            protocol::LEASE => self.objects.lease((connection.number, reader.number()?), reader.number()?),
            protocol::CLAIM => {
                let object = reader.number()?;
                if self.objects.hold(object) {
                    *lock(&connection.held).entry(object).or_default() += 1;
                }
            }
            // The descriptor closes as the reader drops.
            protocol::CLAIMED => {}
            protocol::RELEASE => {
                let object = reader.number()?;
                let mut held = lock(&connection.held);
                if let Some(count) = held.get_mut(&object) {
                    *count -= 1;
                    if *count == 0 {
                        held.remove(&object);
                    }
                    drop(held);
                    self.objects.release([(object, 1)]);
                }
            }
            protocol::COUNT => {
                // Without the namespace that is always there.
                let count = self.objects.len().saturating_sub(1) as u64;
                let mut answer = Writer::answer(reader.number()?).to(connection.abroad());
                answer.append_part(&count)?;
                connection.reply(answer.seal());
            }
            protocol::WHERE => {
                let mut answer = Writer::answer(reader.number()?).to(connection.abroad());
                answer.append_part(&self.address)?;
                connection.reply(answer.seal());
            }
            protocol::END => {
                let mut answer = Writer::answer(reader.number()?);
                answer.append_part(&())?;
                connection.reply(answer.seal());
                self.finish();
            }
            _ => return Err(protocol::torn()),
        }
        Ok(None)
    }
}

/// Calls.
impl Server {
    /// Runs a call of this process's own.
    pub(super) fn submit(self: &Arc<Self>, call: Sealed) -> Result<oneshot::Receiver<Sealed>> {
        let mut reader = Reader::new(call)?;
        let (_, id, left) = (reader.byte()?, reader.number()?, reader.number()?);
        let (sender, answer) = oneshot::channel();
        let reply_to = ReplyTo::Here(sender);
        let job = Job::new(reader, left, Writer::answer(id), reply_to);
        if let Some(job) = self.prepare(job, None) {
            self.helpers.run(self, Task::Work(job));
        }
        Ok(answer)
    }

    /// Works off `job` and all that this lets go on, unless it has to wait, or is better left to a helper.
    fn work(self: &Arc<Self>, job: Box<Job>) {
        if self.has_slow.load(Relaxed) && self.is_slow(&job) {
            self.helpers.run(self, Task::Work(job));
        } else {
            self.work_here(job);
        }
    }

    fn is_slow(&self, job: &Job) -> bool {
        job.entry().is_some_and(|entry| lock(&self.slow).contains(&entry))
    }

    /// Tells an object of what became of a request that may wait, after everything that came to it before.
    fn tell(self: &Arc<Self>, object: Arc<Object<Box<Job>>>, what: Next) {
        let mut job = Job::new(Reader::default(), 0, Writer::default(), ReplyTo::Nobody);
        (job.next, job.object) = (Some(what), Some(object.clone()));
        if let Some(job) = object.take_turn(job) {
            self.work_here(job);
        }
    }

    fn work_here(self: &Arc<Self>, job: Box<Job>) {
        let mut todo = VecDeque::from([job]);
        while let Some(job) = todo.pop_front() {
            self.advance(job, &mut todo);
        }
    }

    /// Runs the operations of a job until it is done or waits for an object. Jobs whose turn has come join `todo`.
    fn advance(self: &Arc<Self>, job: Box<Job>, todo: &mut VecDeque<Box<Job>>) {
        let mut prepared = Some(job);
        while let Some(mut job) = prepared {
            prepared = match (job.next.take(), job.object.take()) {
                (Some(next), Some(object)) => {
                    let has_to_wait = run(&object, next, &mut job);
                    fault::point("manager.ran");
                    self.retry(&object, todo);
                    let job = match has_to_wait {
                        Some(next) => {
                            job.next = Some(next);
                            lock(&object.parked).push(job);
                            None
                        }
                        None => self.prepare(job, Some(&object)),
                    };
                    let is_kept = |job: &Box<Job>| job.object.as_ref().is_some_and(|next| Arc::ptr_eq(next, &object));
                    if !job.as_ref().is_some_and(is_kept) {
                        todo.extend(object.pass_on());
                    }
                    job
                }
                (Some(Next::Run(op)), None) => {
                    self.make(&mut job, &op);
                    self.prepare(job, None)
                }
                (Some(Next::Settle(..) | Next::Expire(_)), None) => return,
                (None, _) => return job.finish(),
            };
        }
    }

    /// Tries what is parked at an object whose turn is held; the first to come is the first to go.
    fn retry(&self, object: &Object<Box<Job>>, todo: &mut VecDeque<Box<Job>>) {
        loop {
            let parked = std::mem::take(&mut *lock(&object.parked));
            if parked.is_empty() {
                return;
            }
            let (count, mut left) = (parked.len(), Vec::new());
            for mut job in parked {
                let Some(next) = job.next.take() else { continue };
                match run(object, next, &mut job) {
                    Some(next) => {
                        job.next = Some(next);
                        left.push(job);
                    }
                    // It has only one operation, so it is done.
                    None => todo.push_back(job),
                }
            }
            let is_settled = left.len() == count;
            *lock(&object.parked) = left;
            if is_settled {
                return;
            }
        }
    }

    /// Gets a job ready for its next operation, or for its end. `None`: it waits in line at its object. It keeps the turn
    /// at the object where it `has` it if that is the next one, too, and nobody waits there.
    fn prepare(&self, mut job: Box<Job>, has: Option<&Arc<Object<Box<Job>>>>) -> Option<Box<Job>> {
        while job.next.is_none() && job.left > 0 {
            job.left -= 1;
            let frame = &mut job.frame;
            let (op, arguments) = match frame.reader.op().and_then(|op| Ok((op, frame.reader.value()?))) {
                Ok(next) => next,
                Err(error) => {
                    frame.out.error(&error);
                    job.left = 0;
                    return Some(job);
                }
            };
            frame.arguments = Some(arguments);
            if self.exposed.as_ref().is_some_and(|exposed| !exposed.contains(&op.entry)) {
                frame.out.error(&Error::other("this function is not exposed by the manager"));
            } else if op.object == protocol::MAKER {
                job.next = Some(Next::Run(op));
            } else if let Some(object) = has.filter(|has| has.number == op.object && has.is_nobody_waiting()) {
                (job.next, job.object) = (Some(Next::Run(op)), Some(object.clone()));
            } else if let Some(object) = self.objects.find(op.object) {
                if let (Some(wait), ReplyTo::Client(connection)) = (&frame.wait, &job.reply_to) {
                    lock(&connection.asked).insert(wait.ticket.1, object.clone());
                }
                (job.next, job.object) = (Some(Next::Run(op)), Some(object.clone()));
                return object.take_turn(job);
            } else {
                frame.out.error(&Error::closed("object of this proxy"));
            }
        }
        Some(job)
    }

    fn make(&self, job: &mut Job, op: &Op) {
        // Handles among the arguments are the new object's.
        let number = self.objects.reserve();
        let outer = AT_WORK_ON.replace(number);
        let result = enter(op, &mut job.frame);
        AT_WORK_ON.set(outer);
        match (result, job.frame.object.take()) {
            (Ok(()), Some(value)) => {
                self.objects.add_as(number, value);
                if let ReplyTo::Client(connection) = &job.reply_to {
                    *lock(&connection.held).entry(number).or_default() += 1;
                }
                job.frame.out.made(number);
            }
            (Ok(()), None) => job.frame.out.error(&protocol::torn()),
            (Err(error), _) => job.frame.out.error(&error),
        }
    }
}

/// The drop of an object is user code too. Its panic has been reported by the hook.
fn survive(work: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(work));
}

fn enter(op: &Op, frame: &mut Frame) -> Result<()> {
    LAST_ENTRY.set(Some(op.entry));
    // User code in it may come back here, on another object.
    let mut doors = DOORS.take().unwrap_or_default();
    let result = doors.enter(op, frame);
    DOORS.set(Some(doors));
    result
}

/// Runs one operation of a job on an object whose turn is held, and returns it if it has to wait.
fn run(object: &Object<Box<Job>>, next: Next, job: &mut Job) -> Option<Next> {
    let outer = AT_WORK_ON.replace(object.number);
    let mut value = lock(&object.value).take();
    let again = match next {
        Next::Run(op) => {
            let frame = &mut job.frame;
            frame.object = value.take();
            let result = enter(&op, frame);
            value = frame.object.take();
            if let Some(settle) = frame.wait.as_ref().and_then(|wait| wait.settle) {
                object.settle.get_or_init(|| settle);
            }
            let has_to_wait = result.is_ok() && frame.wait.as_ref().is_some_and(|wait| wait.has_to_wait);
            if let Err(error) = result {
                frame.out.error(&error);
            }
            has_to_wait.then_some(Next::Run(op))
        }
        Next::Settle(ticket, end) => {
            let is_its = |job: &mut Box<Job>| job.frame.wait.as_ref().is_some_and(|wait| wait.ticket == ticket);
            let waited: Vec<_> = lock(&object.parked).extract_if(.., is_its).collect();
            if let (Some(settle), Some(value)) = (object.settle.get(), &mut value) {
                survive(|| settle(&mut **value, ticket, end));
            }
            survive(|| drop(waited));
            None
        }
        Next::Expire(ticket) => {
            let mut parked = lock(&object.parked);
            let wait = parked.iter_mut().filter_map(|job| job.frame.wait.as_mut()).find(|wait| wait.ticket == ticket);
            // It is tried again, as all are.
            wait.into_iter().for_each(|wait| wait.is_late = true);
            None
        }
    };
    *lock(&object.value) = value;
    AT_WORK_ON.set(outer);
    again
}

impl Job {
    fn finish(self: Box<Self>) {
        fault::point("manager.answer");
        let Self { frame: Frame { out, wait, .. }, reply_to, .. } = *self;
        // What it kept is the user's.
        survive(|| drop(wait));
        let answer = out.seal();
        match reply_to {
            ReplyTo::Nobody => {}
            ReplyTo::Client(connection) => connection.reply(answer),
            // Who asked may have gone.
            ReplyTo::Here(sender) => drop(sender.send(answer)),
        }
    }
}

impl Connection {
    /// Sends an answer, or keeps it until the client reads again.
    fn reply(self: &Arc<Self>, answer: Sealed) {
        let id = protocol::id_of(answer.bytes()).unwrap_or_default();
        let mut out = lock(&self.out);
        let Out { sender, backlog, is_flushing, .. } = &mut *out;
        let refused = match sender {
            Some(Outgoing::Near(sender)) if backlog.is_empty() => match sender.try_send_blindly(answer) {
                Ok(true) => return,
                // It may ask again at once.
                Ok(false) => return self.server.look.encourage(),
                Err(refused) => Some(refused),
            },
            Some(Outgoing::Far(sender)) if backlog.is_empty() => {
                let mut now = Context::from_waker(Waker::noop());
                let sent = sender.start_send_unpin(answer.bytes().to_vec());
                match sent.is_ok() && sender.poll_flush_unpin(&mut now).is_pending() {
                    true => None,
                    // An error is the end of the connection, which its other half tells of.
                    false => return,
                }
            }
            None if !*is_flushing => return, // The client is gone.
            _ => return backlog.push_back(answer),
        };
        match refused {
            None => {}
            Some(refused) => match refused.kind() {
                ErrorKind::Closed => return,
                ErrorKind::Full => out.backlog.push_back(refused.into_inner()),
                _ => {
                    let mut answer = Writer::answer(id);
                    answer.error(&refused.into_error());
                    out.backlog.push_back(answer.seal());
                }
            },
        }
        if let Some(sender) = out.sender.take() {
            out.is_flushing = true;
            drop(out);
            self.server.read(flush(self.clone(), sender));
        }
    }
}

/// Handles that leave from here.
impl Server {
    /// The link of handles that are made in this process.
    fn link(&self) -> Result<Arc<Link>> {
        Link::to(self.id, std::process::id(), || Err(protocol::torn()))
    }

    pub(super) fn door(&self) -> &Arc<OwnedFd> {
        &self.door
    }

    /// A lease that ends when the other end of `reader` is closed everywhere.
    pub(super) fn open_lease(self: &Arc<Self>, reader: OwnedFd) -> Lease {
        let lease = (0, self.last_lease.fetch_add(1, Relaxed));
        self.objects.open_lease(lease);
        self.read(until_ended(lease, Arc::new(reader)));
        lease
    }
}

enum Task {
    Lead(Arc<AtomicU64>),
    Work(Box<Job>),
}

/// Threads that take over: from a leader that was left behind, or a call that is known to be slow.
#[derive(Default)]
struct Helpers {
    state: Mutex<HelpersState>,
    called: Condvar,
}

#[derive(Default)]
struct HelpersState {
    tasks: VecDeque<Task>,
    idle: usize,
}

impl Helpers {
    fn run(&self, server: &Arc<Server>, task: Task) {
        let mut state = lock(&self.state);
        state.tasks.push_back(task);
        if state.idle >= state.tasks.len() {
            drop(state);
            self.called.notify_one();
            return;
        }
        drop(state);
        let helper = server.clone();
        let spawned = std::thread::Builder::new().name("mp-manager".into()).spawn(move || helper.help());
        if let Err(error) = spawned {
            // One of those that are at work takes it when it is done.
            tracing::warn!(%error, "the manager cannot start another thread");
        }
    }
}

impl Server {
    fn help(self: Arc<Self>) {
        while let Some(task) = self.next_task() {
            match task {
                Task::Lead(pulse) => self.lead(&pulse),
                Task::Work(job) => {
                    let entry = job.entry();
                    let start = Instant::now();
                    survive(|| self.work_here(job));
                    self.let_go();
                    if start.elapsed() < LOOK
                        && let Some(entry) = entry
                    {
                        let mut slow = lock(&self.slow);
                        slow.remove(&entry);
                        self.has_slow.store(!slow.is_empty(), Relaxed);
                    }
                }
            }
        }
    }

    fn next_task(&self) -> Option<Task> {
        let mut state = lock(&self.helpers.state);
        loop {
            if let Some(task) = state.tasks.pop_front() {
                return Some(task);
            }
            state.idle += 1;
            let waited = self.helpers.called.wait_timeout(state, HELPER_IDLE);
            let (guard, timeout) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if timeout.timed_out() && state.tasks.is_empty() {
                return None;
            }
        }
    }
}
