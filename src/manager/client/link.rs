//! This process's connection to a manager, shared by all its handles and tasks.
//!
//! Requests go out by one pipe and answers come back by another, each under a number. Whoever waits reads the answers
//! of others too while it looks; who sleeps is woken by name, by the reader that runs in the runtime's driver.
//!
//! # Cancel
//! A call dropped while it waits for room in the pipe was never made; after that it is done, and its answer is thrown away. If
//! that answer made an object, the object goes.

use super::pending::{Brings, Discards, PendingCalls, Slot};
use super::pipe::Wire;
use super::stream::Far;
use crate::connection::ByteConnection;
use crate::error::{Error, ErrorKind, Result};
use crate::manager::wire::greeting::Id;
use crate::manager::wire::local::{self, Lease, Local, Unread};
use crate::manager::wire::marshal::{self, Abroad, ClientEnd, Kept};
use crate::manager::wire::messages::{self, Reader, Writer};
use crate::os::sync::lock;
use crate::os::{fork, refuse};
use crate::process::{Cause, Process};
use crate::wire::{Attachment, EncodedMessage, attach};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::any::Any;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, Weak};

/// The managers that this process has handles of.
static LINKS: Mutex<Option<HashMap<Id, Weak<Link>>>> = Mutex::new(None);

/// The process of a manager, until it has been shut down.
pub(crate) type Running = tokio::sync::Mutex<Option<Process<Result<()>>>>;

pub(crate) struct Link {
    pub(crate) id: Id,
    pub(crate) pid: u32,
    end: End,
    last_lease: AtomicU64,
    /// Of the manager, where this process has started it.
    process: OnceLock<Weak<Running>>,
}

enum End {
    /// A client's: its door, and its pipes from the first use on.
    Client { door: Arc<OwnedFd>, wire: OnceLock<Arc<Wire>>, connecting: Mutex<()> },
    /// The manager is this very process.
    Here(&'static dyn Local),
    /// A client's that shares no memory with the manager.
    Far(Arc<Far>),
}

impl Link {
    /// The link to the manager of this name, which has its door at `door`.
    pub(crate) fn to(id: Id, pid: u32, door: impl FnOnce() -> Result<OwnedFd>) -> Result<Arc<Self>> {
        let mut links = lock(&LINKS);
        let links = links.get_or_insert_default();
        if let Some(link) = links.get(&id).and_then(Weak::upgrade) {
            return Ok(link);
        }
        let end = match local::get().filter(|local| local.id() == id) {
            Some(server) => End::Here(server),
            None => {
                let (wire, connecting) = (OnceLock::new(), Mutex::default());
                End::Client { door: Arc::new(door()?), wire, connecting }
            }
        };
        let link = Arc::new(Self { id, pid, end, last_lease: AtomicU64::new(0), process: OnceLock::new() });
        links.retain(|_, link| link.strong_count() > 0);
        links.insert(id, Arc::downgrade(&link));
        Ok(link)
    }

    /// The link of handles that are made in the manager's own process.
    pub(crate) fn here() -> Result<Arc<Self>> {
        let local = local::get().ok_or_else(messages::torn)?;
        Self::to(local.id(), std::process::id(), || Err(messages::torn()))
    }

    pub(crate) fn new(id: Id, pid: u32, door: OwnedFd) -> Result<Arc<Self>> {
        Self::to(id, pid, || Ok(door))
    }

    /// The link to the manager at the other end of `connection`, which this one keeps to itself.
    pub(crate) fn far(id: Id, pid: u32, connection: ByteConnection) -> Arc<Self> {
        Self::of(id, pid, Far::open(connection))
    }

    pub(crate) fn of(id: Id, pid: u32, far: Arc<Far>) -> Arc<Self> {
        Arc::new(Self { id, pid, end: End::Far(far), last_lease: AtomicU64::new(0), process: OnceLock::new() })
    }

    /// Whether a request through here goes to another host.
    pub(crate) fn is_far(&self) -> bool {
        matches!(self.end, End::Far(_))
    }

    /// Whether the manager is this very process.
    pub(crate) fn is_here(&self) -> bool {
        matches!(self.end, End::Here(_))
    }

    /// What a request through here is written for, if that is another host.
    pub(crate) fn abroad(self: &Arc<Self>) -> Option<Abroad> {
        self.is_far().then(|| Abroad::Client(self.clone()))
    }

    /// A request that goes through here.
    pub(crate) fn request(self: &Arc<Self>, kind: u8) -> Writer {
        Writer::request(kind).to(self.abroad())
    }

    fn is_gone(&self) -> Error {
        if let End::Far(far) = &self.end {
            let why = format!("the connection to the manager at {} {}", far.peer, far.why_lost());
            return Error::new(ErrorKind::Closed, why);
        }
        match self.cause() {
            None => {
                let why =
                    format!("the manager (pid {}) is gone: it was shut down, or its process was killed", self.pid);
                Error::new(ErrorKind::Closed, why)
            }
            Some(cause) => {
                let error = Error::new(ErrorKind::Closed, format!("the manager (pid {}) is gone: {cause}", self.pid));
                match cause.panic() {
                    Some(panic) => error.with_panic(panic.clone()),
                    None => error,
                }
            }
        }
    }

    /// In the process that started the manager: from now on errors say why that has ended, if it could tell.
    pub(crate) fn know_process(&self, process: &Arc<Running>) {
        // A manager is started once.
        let _ = self.process.set(Arc::downgrade(process));
    }

    fn cause(&self) -> Option<Cause> {
        let process = self.process.get()?.upgrade()?;
        // A process that holds this end can end the manager.
        let process = process.try_lock().ok()?;
        process.as_ref()?.cause()
    }

    /// An error of its pipes, which says what has ended if one has.
    pub(crate) fn told_gone(&self, error: Error) -> Error {
        match error.kind() {
            ErrorKind::Closed => self.is_gone(),
            _ => error,
        }
    }

    pub(crate) fn wire(&self) -> Result<&Arc<Wire>> {
        check_forked()?;
        let End::Client { door, wire, connecting } = &self.end else { return Err(messages::torn()) };
        if let Some(wire) = wire.get() {
            return Ok(wire);
        }
        let _one = lock(connecting);
        match wire.get() {
            Some(wire) => Ok(wire),
            None => {
                let made = Wire::connect(door).map_err(|error| self.told_gone(error))?;
                Ok(wire.get_or_init(|| made))
            }
        }
    }

    /// Sends a request whose number is at `at`, and reads its answer.
    pub(crate) async fn ask(self: &Arc<Self>, request: Writer, at: usize, brings: Brings) -> Result<Reader> {
        check_forked()?;
        let answer = match &self.end {
            End::Here(server) => {
                let answer = server.submit(request.into_encoded())?.await;
                answer.ok().and_then(Unread::read).ok_or_else(|| self.is_gone())?
            }
            _ => self.send(request, at, brings).await?.answer().await?,
        };
        self.open(answer)
    }

    /// Sends a request whose number is at `at` to another process, once there is room. Dropped before, it was never made.
    pub(crate) async fn send(self: &Arc<Self>, mut request: Writer, at: usize, brings: Brings) -> Result<Pending<'_>> {
        check_forked()?;
        let mut pending;
        match &self.end {
            End::Here(_) => return Err(messages::torn()),
            End::Far(far) => {
                pending = Pending::new(self, &far.slots, brings);
                request.amend(at, pending.id);
                pending.kept = request.take_kept();
                far.tell(request.into_encoded());
            }
            End::Client { .. } => {
                let wire = self.wire()?;
                pending = Pending::new(self, &wire.slots, brings);
                request.amend(at, pending.id);
                pending.wire = Some(wire);
                wire.send(request.into_encoded()).await.map_err(|error| self.told_gone(error))?;
            }
        }
        pending.is_sent = true;
        Ok(pending)
    }

    pub(crate) fn open(self: &Arc<Self>, answer: EncodedMessage) -> Result<Reader> {
        let mut reader = Reader::from(answer, self.abroad())?;
        reader.number()?;
        Ok(reader)
    }

    /// Tells the manager something that has no answer. If it is gone, it need not know.
    pub(crate) fn tell(&self, request: Writer) {
        // What the process that this one was forked from holds is no business of this one.
        if fork::is_forked() {
            return;
        }
        match &self.end {
            End::Client { wire, .. } => {
                if let Some(wire) = wire.get() {
                    wire.tell(request.into_encoded());
                }
            }
            End::Far(far) => far.tell(request.into_encoded()),
            End::Here(_) => {}
        }
    }

    /// Tells the manager something of an object, or of a request of this link.
    pub(crate) fn tell_of(&self, what: u8, number: u64) {
        let mut request = Writer::request(what);
        request.number(number);
        self.tell(request);
    }

    pub(crate) fn release(&self, object: u64) {
        self.tell_of(messages::RELEASE, object);
    }
}

impl Discards for Link {
    fn discard(self: Arc<Self>, answer: EncodedMessage) {
        if let Some(object) = messages::made_in(answer.bytes()) {
            self.release(object);
        }
        drop(Reader::from(answer, self.abroad()));
    }
}

impl ClientEnd for Link {
    fn release(&self, object: u64) {
        self.tell_of(messages::RELEASE, object);
    }
}

/// A call that waits for its answer; dropped, nobody does.
pub(crate) struct Pending<'a> {
    link: &'a Arc<Link>,
    slots: &'a PendingCalls,
    pub(crate) id: u64,
    brings: Brings,
    pub(crate) is_sent: bool,
    /// By which pipe, if it is one.
    pub(crate) wire: Option<&'a Wire>,
    pub(crate) kept: Vec<Kept>,
}

impl<'a> Pending<'a> {
    pub(crate) fn new(link: &'a Arc<Link>, slots: &'a PendingCalls, brings: Brings) -> Self {
        let mut state = lock(&slots.0);
        state.last += 1;
        let id = state.last;
        state.slots.insert(id, Slot::Awake);
        Self { link, slots, id, brings, is_sent: false, wire: None, kept: Vec::new() }
    }

    /// The answer, or why there is none.
    pub(crate) async fn answer(&self) -> Result<EncodedMessage> {
        let answered = match self.wire {
            Some(wire) => wire.answer(self.id).await,
            None => self.slots.answered(self.id).await,
        };
        answered.map_err(|error| self.link.told_gone(error))
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let mut slots = lock(&self.slots.0);
        // It was taken.
        let Some(slot) = slots.slots.remove(&self.id) else { return };
        let is_looked_at = self.brings == Brings::AnObject || self.link.is_far();
        let is_answered = matches!(slot, Slot::Answered(_));
        let is_abandoned = is_looked_at && self.is_sent && !is_answered && !slots.is_gone;
        if is_abandoned {
            let kept = std::mem::take(&mut self.kept);
            slots.slots.insert(self.id, Slot::Abandoned(Arc::<Link>::downgrade(self.link), kept));
        }
        drop(slots);
        match slot {
            Slot::Answered(answer) if is_looked_at => self.link.clone().discard(answer),
            // Its waker's drop may be the end of another task.
            slot => drop(slot),
        }
        if is_abandoned {
            // It may have been the last that looked.
            self.wire.into_iter().for_each(Wire::read_for_sleepers);
        }
        if self.is_sent && self.brings == Brings::AGrant {
            self.link.tell_of(messages::UNREAD, self.id);
        }
    }
}

fn check_forked() -> Result<()> {
    fork::check().map_err(|error| Error::io("cannot use a manager", error))
}

/// One hold on an object, given back when dropped. It is a serde value; on its way a lease holds the object.
pub(crate) struct Handle {
    pub(crate) link: Arc<Link>,
    pub(crate) object: u64,
    /// The object that this handle is part of, in the manager itself.
    owner: u64,
}

impl Handle {
    /// A handle of an object that the manager already counts for this process.
    pub(crate) fn counted(link: &Arc<Link>, object: u64) -> Self {
        let owner = local::owner_of_new_handles();
        if let End::Here(server) = &link.end {
            server.hold_inside(owner, object);
            server.release(object);
        }
        Self { link: link.clone(), object, owner }
    }

    /// A handle that a client counts already.
    pub(crate) fn held(link: &Arc<Link>, object: u64) -> Self {
        Self { link: link.clone(), object, owner: 0 }
    }

    /// One more handle of an object that is there anyway.
    pub(crate) fn claimed(link: &Arc<Link>, object: u64) -> Self {
        // Without a pipe to the manager the handle is of no use, as the first call on it says.
        let owner = link.claim(object).unwrap_or_default();
        Self { link: link.clone(), object, owner }
    }

    /// One more handle, in the manager itself.
    pub(crate) fn inside(link: Arc<Link>, object: u64) -> Result<Self> {
        let owner = link.claim(object)?;
        Ok(Self { link, object, owner })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if fork::is_forked() {
            return;
        }
        match &self.link.end {
            End::Client { .. } | End::Far(_) => self.link.release(self.object),
            End::Here(server) => server.release_inside(self.owner, self.object),
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
        let pipe = || {
            refuse::at("pipe")?;
            std::io::pipe()
        };
        let (reader, writer) = pipe().map_err(|error| failed(&error.to_string()))?;
        let end = attach::leave::<E>(Attachment::owned(writer.into()).of("proxy of a manager"))?;
        let (door, lease) = match &self.end {
            End::Here(server) => (server.door(), server.open_lease(reader.into())),
            End::Client { door, .. } => {
                let lease = (0, self.last_lease.fetch_add(1, Relaxed));
                self.be_connected().map_err(|error| E::custom(format_args!("a handle cannot leave: {error}")))?;
                let mut request = Writer::request(messages::LEASE_OPEN);
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
            End::Here(server) => server.lease(lease, object),
            End::Client { wire, .. } => {
                let mut request = Writer::request(messages::LEASE);
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
        let owner = local::owner_of_new_handles();
        match &self.end {
            End::Here(server) => server.hold_inside(owner, object),
            End::Client { .. } | End::Far(_) => {
                self.be_connected()?;
                self.tell_of(messages::CLAIM, object);
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
            let mut request = Writer::request(messages::CLAIMED);
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
pub(crate) fn serialize<S: Serializer>(handle: &Arc<Handle>, serializer: S) -> Result<S::Ok, S::Error> {
    let kept: Kept = handle.clone();
    match marshal::leave(handle.link.id, handle.object, Arc::as_ptr(&handle.link).cast(), &kept) {
        Some(Ok(object)) => object.serialize(serializer),
        Some(Err(why)) => Err(serde::ser::Error::custom(why)),
        None => handle.serialize(serializer),
    }
}

impl Handle {
    /// A handle that came as a reference.
    fn taken(end: Abroad, object: u64) -> Option<Self> {
        match end {
            Abroad::Client(end) => {
                let end: Arc<dyn Any + Send + Sync> = end;
                Some(Self::held(&end.downcast::<Link>().ok()?, object))
            }
            Abroad::Server(_) => Self::inside(Link::here().ok()?, object).ok(),
        }
    }

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
        if marshal::is_arriving() {
            let object = u64::deserialize(deserializer)?;
            let taken = marshal::take(object).and_then(|end| Self::taken(end, object));
            return taken.ok_or_else(|| D::Error::custom("a handle of an object that was not given"));
        }
        let told = Told::deserialize(deserializer)?;
        let arriving = attach::in_common(
            |arriving: &Arriving| arriving.manager == told.manager,
            || {
                let end = attach::take::<D>(told.end)?;
                let door = attach::take::<D>(told.door)?;
                let link = Link::to(told.manager, told.pid, || Ok(door)).map_err(D::Error::custom)?;
                Ok::<_, D::Error>(Arriving { manager: told.manager, link, end: Some(end) })
            },
        )?;
        let owner = arriving.link.claim(told.object).map_err(D::Error::custom)?;
        Ok(Self { link: arriving.link.clone(), object: told.object, owner })
    }
}
