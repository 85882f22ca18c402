//! This process's connection to a manager, shared by all its handles and tasks.
//!
//! Requests go out and answers come back under a number. A task that waits reads the answers of others too while it spins; one
//! that sleeps is woken by the reader, which the transport calls when something has come.
//!
//! # Cancel
//! A call dropped while it waits for room was never made; after that it is done, and its answer is thrown away. What that answer
//! brings goes.

use super::pending::PendingCalls;
use crate::connection::ByteConnection;
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::manager::wire::greeting::Id;
use crate::manager::wire::local::{self, AT_WORK_ON, HOST};
use crate::manager::wire::marshal::End;
use crate::manager::wire::messages::{self, CONNECTION, ID_AT, Reader, Writer};
use crate::manager::wire::pipe::Pipe;
use crate::manager::wire::stream::Stream;
use crate::manager::wire::transport::{Changed, Transport};
use crate::manager::wire::waiting;
use crate::os::fork;
use crate::os::sync::lock;
use crate::process::{Cause, Process};
use crate::wait::until_read;
use crate::wire::{Attachment, EncodedMessage};
use std::collections::HashMap;
use std::fmt;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, Weak};
use std::task::{Poll, Waker};
use tokio::sync::Notify;

/// The managers that this process has handles of.
static LINKS: LazyLock<Mutex<HashMap<Id, Weak<Link>>>> = LazyLock::new(Mutex::default);

/// The process of a manager, until it has been shut down.
pub(crate) type Running = tokio::sync::Mutex<Option<Process<Result<()>>>>;

pub(crate) struct Link {
    pub(crate) id: Id,
    pub(crate) pid: u32,
    /// Where processes of the manager's machine connect, which handles bring along. No other can.
    pub(crate) connector: Option<Arc<OwnedFd>>,
    /// From the first use on.
    transport: OnceLock<Arc<dyn Transport>>,
    connecting: Mutex<()>,
    pub(crate) calls: PendingCalls,
    /// Wakes all that wait for room.
    has_room: Notify,
    pub(crate) last_lease: AtomicU64,
    /// Of the manager, where this process has started it.
    process: OnceLock<Weak<Running>>,
}

impl Link {
    /// The link to the manager of this name, which has its connector at `connector`.
    pub(crate) fn to(id: Id, pid: u32, connector: OwnedFd) -> Result<Arc<Self>> {
        if HOST.get().is_some_and(|host| host.id == id) {
            return Self::here();
        }
        let mut links = lock(&LINKS);
        if let Some(link) = links.get(&id).and_then(Weak::upgrade) {
            return Ok(link);
        }
        let link = Self::new(id, pid, Some(Arc::new(connector)));
        links.retain(|_, link| link.strong_count() > 0);
        links.insert(id, Arc::downgrade(&link));
        Ok(link)
    }

    /// The link of handles that are made in the manager's own process.
    pub(crate) fn here() -> Result<Arc<Self>> {
        static HERE: OnceLock<Arc<Link>> = OnceLock::new();
        let host = HOST.get().ok_or_else(messages::malformed)?;
        let new = || {
            let link = Self::new(host.id, std::process::id(), Some(host.connector.clone()));
            link.transport.get_or_init(|| local::ClientEnd::open(host, link.changed()));
            link
        };
        Ok(HERE.get_or_init(new).clone())
    }

    /// The link to the manager at the other end of `connection`, which this one keeps to itself.
    pub(crate) fn over(id: Id, pid: u32, connection: ByteConnection) -> Arc<Self> {
        let link = Self::new(id, pid, None);
        link.transport.get_or_init(|| Stream::open(connection, link.changed()));
        link
    }

    fn new(id: Id, pid: u32, connector: Option<Arc<OwnedFd>>) -> Arc<Self> {
        let (transport, connecting, calls, has_room, last_lease, process) = Default::default();
        Arc::new(Self { id, pid, connector, transport, connecting, calls, has_room, last_lease, process })
    }

    /// In the process that started the manager: from now on errors name the reason why it has ended, if it reported one.
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

    /// An error of its transport; if the connection has ended, with the reason.
    pub(crate) fn explain(&self, error: Error) -> Error {
        if error.kind() != ErrorKind::Closed {
            return error;
        }
        self.calls.why().unwrap_or_else(|| {
            let cause = self.cause();
            let unknown: &dyn fmt::Display = &"it was shut down, or its process was killed";
            let why = cause.as_ref().map_or(unknown, |cause| cause);
            let text = format!("the manager (pid {}) is gone: {why}", self.pid);
            let error = Error::new(ErrorKind::Closed, text).explained_by(Topic::ManagerGone);
            match cause.as_ref().and_then(Cause::panic) {
                Some(panic) => error.with_panic(panic.clone()),
                None => error,
            }
        })
    }

    /// The callback of the transport, called when a message may have come.
    fn changed(self: &Arc<Self>) -> Changed {
        let link = Arc::downgrade(self);
        Box::new(move || {
            if let Some(link) = link.upgrade() {
                link.read_for_sleepers();
                link.has_room.notify_waiters();
            }
        })
    }

    pub(crate) fn transport(self: &Arc<Self>) -> Result<&Arc<dyn Transport>> {
        fork::check().map_err(|error| Error::io("cannot use a manager", error))?;
        if let Some(transport) = self.transport.get() {
            return Ok(transport);
        }
        fork::check_pid().map_err(|error| Error::io("cannot use a manager", error))?;
        let _one = lock(&self.connecting);
        let Some(connector) = self.connector.as_ref().filter(|_| self.transport.get().is_none()) else {
            return self.transport.get().ok_or_else(messages::malformed);
        };
        let made = Pipe::connect(connector, self.changed()).map_err(|error| self.explain(error))?;
        Ok(self.transport.get_or_init(|| made))
    }

    /// If the manager is gone, handles of it still travel, and are of no use here or elsewhere.
    pub(crate) fn be_connected(self: &Arc<Self>) -> Result<()> {
        match self.transport() {
            Err(error) if error.kind() != ErrorKind::Closed => Err(error),
            _ => Ok(()),
        }
    }

    /// Takes all answers there are to the tasks that wait for them.
    fn read(self: &Arc<Self>) {
        while let Some(next) = self.transport.get().and_then(|transport| transport.recv()) {
            match next.and_then(|answer| self.calls.deliver(answer)) {
                // Read all the same: it may bring something, which goes.
                Ok(unwanted) => unwanted.into_iter().for_each(|answer| drop(self.open(answer))),
                // Closed; or an answer was lost, and nobody can say whose.
                Err(error) => return self.end(error),
            }
        }
    }

    /// There will be no answer any more, and nothing more is sent.
    fn end(&self, why: Error) {
        let says_why = why.kind() != ErrorKind::Closed || self.connector.is_none();
        self.calls.fail(says_why.then_some(why));
        self.transport.get().iter().for_each(|transport| transport.close());
        self.has_room.notify_waiters();
    }

    /// Reads, and has the reader come for answers that are still to be read and that no task polls for.
    fn read_for_sleepers(self: &Arc<Self>) {
        self.read();
        if self.calls.has_sleepers()
            && let Some(queue) = self.transport.get().and_then(|transport| transport.queue())
        {
            // It fails outside a runtime, where those that have listened before go on.
            let _ = queue.arm();
            self.read();
        }
    }

    pub(crate) fn open(self: &Arc<Self>, answer: EncodedMessage) -> Result<Reader> {
        let mut reader = Reader::new(answer, Some(self.clone()))?;
        reader.number()?;
        Ok(reader)
    }

    /// A request, whose number stands at [`ID_AT`].
    pub(crate) fn request(self: &Arc<Self>, kind: u8) -> Writer {
        Writer::request(kind, self.clone())
    }

    /// Sends a request and reads its answer.
    pub(crate) async fn ask(self: &Arc<Self>, request: Writer) -> Result<Reader> {
        let answer = self.send(request, None).await?.answer().await?;
        self.open(answer)
    }

    /// Sends a request once there is room. Dropped before, it was never made. See [`Pending`] for what `settles` it.
    pub(crate) async fn send(self: &Arc<Self>, mut request: Writer, settles: Option<waiting::End>) -> Result<Pending> {
        let transport = self.transport()?;
        let id = self.calls.begin();
        let mut pending = Pending { link: self.clone(), id, settles, is_sent: false };
        request.amend(ID_AT, id);
        // Until it is sent.
        let _kept = request.take_kept();
        let request = request.into_encoded();
        if !transport.has_room() {
            self.wait_for_room(transport, id).await?;
        }
        if !transport.send(request).map_err(|error| self.explain(error))?
            && let Some(queue) = transport.queue()
        {
            queue.encourage();
        }
        pending.is_sent = true;
        Ok(pending)
    }

    async fn wait_for_room(self: &Arc<Self>, transport: &Arc<dyn Transport>, id: u64) -> Result<()> {
        // It waits for answers, too, which nobody else need read: the manager takes no more before they are.
        let waker = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
        self.calls.sleep(id, &waker);
        loop {
            let mut noticed = pin!(self.has_room.notified());
            noticed.as_mut().enable();
            // The runtimes that listen notice room, and the end of the connection.
            transport.arm().map_err(|error| Error::io("cannot wait for room in the pipe to a manager", error))?;
            if transport.has_room() {
                return Ok(());
            }
            self.read_for_sleepers();
            noticed.await;
        }
    }

    /// Tells the manager something that has no answer. If it is gone, it need not know.
    pub(crate) fn post(&self, request: Writer) {
        // A forked process must not release objects that its parent holds.
        if !fork::is_forked()
            && let Some(transport) = self.transport.get()
        {
            transport.post(request.into_encoded());
        }
    }

    /// [`post`](Self::post) of a request of these numbers.
    pub(crate) fn tell(&self, what: u8, numbers: &[u64]) {
        self.post(Writer::plain(what, numbers));
    }

    /// The owner of handles that are made on this thread.
    pub(crate) fn owner_of_new_handles(&self) -> u64 {
        let is_inside = self.transport.get().is_some_and(|transport| transport.is_inside());
        if is_inside { AT_WORK_ON.get() } else { CONNECTION }
    }

    /// [`tell`](Self::tell) with a descriptor, which the manager closes or keeps.
    pub(crate) fn hand_over(&self, what: u8, numbers: &[u64], fd: OwnedFd) {
        let mut request = Writer::plain(what, numbers);
        request.attach(Attachment::owned(fd));
        self.post(request);
    }

    pub(crate) fn lease(&self, lease: u64, object: u64) {
        self.tell(messages::LEASE, &[lease, object]);
        // Should this process die at once, the manager must know of the handle that has left.
        self.transport.get().iter().for_each(|transport| transport.press());
    }
}

impl End for Link {
    fn carries_descriptors(&self) -> bool {
        self.connector.is_some()
    }

    fn give(&self, _: Id, _: u64, link: *const ()) -> bool {
        std::ptr::addr_eq(self, link)
    }

    fn accept(&self, _: u64) -> bool {
        true
    }

    fn hold(&self, object: u64) {
        self.tell(messages::CLAIM, &[object, CONNECTION]);
    }

    fn release(&self, object: u64) {
        self.tell(messages::RELEASE, &[object, CONNECTION]);
    }
}

/// A call that waits for its answer; dropped, nobody does.
pub(crate) struct Pending {
    link: Arc<Link>,
    pub(crate) id: u64,
    /// What the manager learns of the answer of a wait, which must be taken or given back, as it stands when this is dropped.
    pub(crate) settles: Option<waiting::End>,
    is_sent: bool,
}

impl Pending {
    /// The answer, or why there is none.
    pub(crate) async fn answer(&self) -> Result<EncodedMessage> {
        let (link, id) = (&self.link, self.id);
        let answered = match link.transport()?.queue() {
            Some(queue) => {
                let attempt = || {
                    link.read();
                    link.calls.take(id)
                };
                let waited = until_read(queue, attempt, |waker: &Waker| link.calls.sleep(id, waker)).await;
                waited.map_err(|error| Error::io("cannot wait for a manager's answer", error))?
            }
            None => {
                poll_fn(|cx| {
                    // An answer that another thread or task is yet to bring finds the waker.
                    link.calls.sleep(id, cx.waker());
                    link.calls.take(id).map_or(Poll::Pending, Poll::Ready)
                })
                .await
            }
        };
        answered.map_err(|error| link.explain(error))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // Another thread may have held the locks when the process was forked.
        if fork::is_forked() {
            return;
        }
        let (link, id) = (&self.link, self.id);
        // An answer to a wait that is dropped may never come.
        let is_abandoned = self.is_sent && self.settles.is_none();
        if let Some(answer) = link.calls.leave(id, is_abandoned) {
            answer.into_iter().for_each(|answer| drop(link.open(answer)));
            if is_abandoned {
                // It may have been the last that polled.
                link.read_for_sleepers();
            }
        }
        if let (Some(end), true) = (self.settles, self.is_sent) {
            link.tell(messages::SETTLE, &[id, end as u64]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::mock::until;
    use crate::os::socket::{Wait, packet_pair};
    use crate::wire::frame;
    use futures_util::FutureExt;
    use std::os::fd::AsFd;

    /// The manager takes no request of a client that does not read its answers.
    #[tokio::test]
    async fn call_that_waits_for_room_reads_answers_that_nobody_else_reads() {
        let (connector, intake) = packet_pair().unwrap();
        let link = Link::to((77, 0), 1, connector).unwrap();
        let transport = link.transport().unwrap();
        let ends = frame::recv(intake.as_fd(), Wait::No).unwrap().unwrap();
        let manager = Pipe::accept(ends, Box::new(|| ())).unwrap();
        let not_polled = link.send(link.request(messages::COUNT), None).await.unwrap();
        while transport.has_room() {
            transport.post(EncodedMessage::new(vec![0; 1 << 18], Vec::new()));
        }
        let mut waits = Box::pin(link.ask(link.request(messages::COUNT)));
        assert!((&mut waits).now_or_never().is_none());
        let mut answer = Writer::default();
        answer.number(not_polled.id).append_part(&7u64).unwrap();
        manager.send(answer.into_encoded()).unwrap();
        tokio::select! {
            () = until(|| link.calls.take(not_polled.id).is_some()) => {}
            _ = &mut waits => panic!("nobody has answered"),
        }
    }
}
