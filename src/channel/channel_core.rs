//! One channel as all its public types use it: a ring, the wait queues of its putters and consumers, and a socket for descriptors.
//!
//! # State
//! The ring's region; a wait queue for room and one for items (and one for `join`); a packet socket for each direction. A joinable
//! queue also has `HOLDERS`: pairs of a process and the number of items that it took and has not finished (`unfinished`).
//!
//! # Moves
//! | move | then |
//! |---|---|
//! | put | the consumer that has waited longest is notified |
//! | taken | the putter that has waited longest is notified |
//! | the lock of a side is held | its holder is asked for a wake, and the caller waits as for room or an item |
//! | closed | all waiters are notified |
//! | found damaged | all waiters are notified: the ring is closed |
//! | taken from a joinable queue, and not readable | the item counts as finished |
//! | descriptors sent ahead under a number, then the push | - |
//! | row of `HOLDERS` empty or of the dead -> 0, count 1, then this process | a consumer of a joinable queue, under the get lock; a row that is its own: count + 1 |
//! | all other rows taken: the last row is anybody's, count + 1 | likewise; it stays when the processes end |
//! | count of a row - 1 | `task_done`, also for another process's item |
//!
//! # Invariants
//! 1. Descriptors are sent under the put lock, so their order in the socket is that of their records.
//! 2. A record has one packet at most, so a socket full of packets has records that make consumers clear it.
//! 3. A consumer takes exactly the packet of its record's number; lower numbers are orphans of the dead.
//! 4. A joinable queue is finished if at one moment the ring is empty and no process holds an item. The holders are read one after
//!    the other, so the ring must still be as it was after that: a holder may have put an item before it finished its last.
//! 5. An attempt that fails with an error passes its notification on.
//!
//! # Death
//! | killed | survivors see |
//! |---|---|
//! | between the descriptors and the put | orphans in the socket, which the next consumer of descriptors drops; until then their files stay open |
//! | between taking descriptors and taking the record | a record without descriptors: one error for the next consumer |
//! | with a lease | an item that is there again, at the front: see [`leases`](super::leases) |
//! | between taking an item and `task_done` | a holder that is not listed: its items count as finished |
//!
//! # Cancel
//! A dropped put has put nothing, and a dropped get has taken nothing: neither has an await point after its commit.

use super::descriptors::send_fds;
#[cfg(multiprocess_loom)]
use super::descriptors::take_fds;
use super::reclaim::{self, Notifies};
use super::ring::{Pop, Push, Ring, Unread, WakeRequests, word};
use super::unfinished::Unfinished;
use crate::error::{Damage, Error, ErrorKind, Result, Topic};
use crate::os::{fault, timer};
use crate::shm::atomic::fence;
use crate::wait::{Hangup, WaitQueue, Waiters, refuse_inside_async, until, until_blocking};
use crate::wire::{self, Attachment, Buffer, Message, Payload};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
#[cfg(not(multiprocess_loom))]
use std::sync::OnceLock;
use std::sync::atomic::Ordering::*;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

#[cfg(not(multiprocess_loom))]
mod leasing;

pub(super) struct ChannelCore {
    ring: Arc<Ring>,
    room: Arc<WaitQueue>,
    items: Arc<WaitQueue>,
    joined: Waiters,
    #[cfg(not(multiprocess_loom))]
    dead_letters: OnceLock<Arc<WaitQueue>>,
    tx: Arc<OwnedFd>,
    rx: Arc<OwnedFd>,
    /// For a pipe: hangs up when the other end is gone.
    hangup: Option<Arc<Hangup>>,
    is_joinable: bool,
    what: &'static str,
    this: Weak<Self>,
}

/// An item and the descriptors that came with it.
type Received = (Buffer, Vec<OwnedFd>);

/// Why a put, or a try of one, took nothing.
pub(super) type Refused<T> = (Error, T);

/// An item of a joinable queue that is being decoded by code of the user, which may fail or panic: then it is done.
struct BeingDecoded<'a>(&'a ChannelCore);

impl Drop for BeingDecoded<'_> {
    fn drop(&mut self) {
        self.0.forget();
    }
}

impl ChannelCore {
    pub(super) fn new(
        mut ring: Ring,
        (tx, rx): (Arc<OwnedFd>, Arc<OwnedFd>),
        hangup: Option<Arc<Hangup>>,
        is_joinable: bool,
        what: &'static str,
    ) -> io::Result<Arc<Self>> {
        ring.is_called(what);
        let wait_queue = |first| WaitQueue::new(ring.region().clone(), first, hangup.clone());
        let (room, items, joined) = (wait_queue(word::ROOM)?, wait_queue(word::ITEMS)?, wait_queue(word::JOINED)?);
        let ring = Arc::new(ring);
        let core = |this: &Weak<Self>| Self {
            ring,
            room,
            items,
            joined: Waiters::new(joined),
            #[cfg(not(multiprocess_loom))]
            dead_letters: OnceLock::new(),
            tx,
            rx,
            hangup,
            is_joinable,
            what,
            this: this.clone(),
        };
        Ok(Arc::new_cyclic(core))
    }

    pub(super) fn wait_queues(&self) -> [&Arc<WaitQueue>; 2] {
        [&self.room, &self.items]
    }

    /// See [`Ring::ignore_byte_limit`].
    pub(super) fn ignore_byte_limit(&self) {
        self.ring.ignore_byte_limit();
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The descriptors that make this channel up elsewhere: its memory and its sockets.
    pub(super) fn attachments(&self) -> [Attachment; 3] {
        [self.ring.region().fd(), &self.tx, &self.rx].map(|fd| Attachment::Shared(fd.clone()))
    }

    pub(super) fn is_joinable(&self) -> bool {
        self.is_joinable
    }

    fn closed(&self) -> Error {
        match self.hangup {
            None => Error::new(ErrorKind::Closed, format!("the {} is closed", self.what)),
            Some(_) => Error::new(ErrorKind::Closed, format!("the other end of the {} is gone", self.what))
                .explained_by(Topic::OtherEndGone),
        }
    }

    fn failed(&self, doing: &str, error: io::Error) -> Error {
        if Damage::is_in(&error) {
            return Error::io(format_args!("cannot {doing} a {}", self.what), error);
        }
        let kind = match error.kind() {
            io::ErrorKind::InvalidInput => ErrorKind::Encode,
            io::ErrorKind::InvalidData => ErrorKind::Decode,
            io::ErrorKind::QuotaExceeded => ErrorKind::Full,
            _ => ErrorKind::Io,
        };
        Error::new(kind, format!("cannot {doing} a {}: {error}", self.what)).with_source(error)
    }

    pub(super) fn is_hung_up(&self) -> bool {
        self.hangup.as_ref().is_some_and(|hangup| hangup.has_happened())
    }

    /// For an attempt that is made again when the other end hangs up.
    pub(super) fn is_known_hung_up(&self) -> bool {
        self.hangup.as_ref().is_some_and(|hangup| hangup.is_known())
    }

    /// Waits until the other end hangs up.
    #[cfg(not(multiprocess_loom))]
    pub(super) async fn hung_up(&self) -> Result<()> {
        let attempt = || self.is_known_hung_up().then_some(());
        until(&self.room, attempt).await.map_err(|error| self.failed("wait for", error))
    }

    #[inline]
    fn notify(&self, requests: WakeRequests) {
        if requests != WakeRequests::default() {
            self.notify_requesters(requests);
        }
    }

    #[cold]
    fn notify_requesters(&self, requests: WakeRequests) {
        if requests.putters || requests.all {
            self.room.notify_all();
        }
        if requests.takers || requests.all {
            self.items.notify_all();
        }
        // Waiters for dead letters take as well.
        if requests.all || requests.joiners || requests.takers {
            self.joined.notify_all();
        }
        #[cfg(not(multiprocess_loom))]
        if requests.one_less || requests.joiners {
            self.one_less();
        }
    }

    /// After something was taken, or nothing was there: the ring may keep memory that is to be given back some time.
    #[inline]
    pub(super) fn watch_idle(&self) {
        if self.ring.take_idle() {
            reclaim::watch(&self.ring, self.this.clone());
        }
    }

    /// One push, with its notices. `is_hung_up`: asked now, or not here. Done, it returns whether a consumer had to be woken.
    fn push(
        &self,
        (mut payload, attachments): (Payload<'_>, &[Attachment]),
        is_hung_up: fn(&Self) -> bool,
    ) -> Result<Tried<bool>> {
        if is_hung_up(self) {
            return Err(self.closed());
        }
        if let (Payload::Borrowed(payload), []) = (&payload, attachments) {
            let (done, requests) = self.ring.push_here(payload);
            self.notify(requests);
            if done {
                let has_sleepers = self.items.has_sleepers_after_rmw();
                if has_sleepers {
                    self.items.notify_one();
                }
                return Ok(Tried::Done(has_sleepers));
            }
        }
        loop {
            let send = |number| send_fds(self.tx.as_fd(), number, attachments);
            let (result, requests) = self.ring.push(&mut payload, attachments.len(), send);
            self.notify(requests);
            let is_short = result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::OutOfMemory);
            // Of one that is discarded a part is gone.
            if is_short && matches!(payload, Payload::Borrowed(_)) && reclaim::give_back_all() {
                continue;
            }
            if result.as_ref().is_err_and(|error| !Damage::is_in(error)) {
                // The room is still there.
                self.room.notify_one();
            }
            let failed = |error: io::Error| match error.kind() {
                // The other end went between our look and the send of the descriptors.
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => self.closed(),
                _ => self.failed("put into", error),
            };
            match result.map_err(failed)? {
                Push::Done => {
                    self.items.notify_one();
                    return Ok(Tried::Done(true));
                }
                Push::Full => return Ok(Tried::NotNow),
                Push::Closed => return Err(self.closed()),
                // Asking fails if it has become free: then it is worth trying at once.
                Push::Busy if self.ring.contend_put() => return Ok(Tried::Busy),
                Push::Busy => {}
            }
        }
    }

    /// One pop of a `T`, with its notices. `is_hung_up`: asked now, or notified when it happens.
    fn pop<T: 'static>(&self, is_hung_up: fn(&Self) -> bool) -> Result<Tried<Received>> {
        let payload = |len: usize| (Buffer::of::<T>(len), wire::needs_memory::<T>(len));
        if !self.is_joinable {
            let mut bytes = if wire::takes_buffer::<T>() { Vec::new() } else { wire::spare() };
            let (done, requests) = self.ring.pop_here(wire::most_through_buffer::<T>(), &mut bytes);
            self.notify(requests);
            if done {
                if self.ring.is_limited() {
                    self.room.notify_one_after_rmw();
                }
                return Ok(Tried::Done((bytes.into(), Vec::new())));
            }
            wire::keep(bytes);
        }
        let mut was_hung_up = false;
        loop {
            let take = |number, count| self.take_descriptors(number, count);
            let mut is_held = false;
            let commit = |me| {
                if self.is_joinable {
                    self.unfinished().add(me);
                    is_held = true;
                }
            };
            let (result, requests) = self.ring.pop(payload, take, commit);
            self.notify(requests);
            self.watch_idle();
            if is_held && result.is_err() {
                self.forget();
            }
            let made_room = match &result {
                Ok(Pop::Empty | Pop::Closed | Pop::Busy) => false,
                // Without a limit only the socket can be full.
                Ok(Pop::Got(_, fds)) => self.ring.is_limited() || !fds.is_empty(),
                Err(error) => !Damage::is_in(error),
            };
            if made_room {
                self.room.notify_one();
            }
            if result.as_ref().is_err_and(|error| !Damage::is_in(error)) {
                // Perhaps the record is, too.
                self.items.notify_one();
            }
            match result.map_err(|error| self.failed("take from", error))? {
                Pop::Got(buffer, fds) => return Ok(Tried::Done((buffer, fds))),
                Pop::Closed => return Err(self.closed()),
                Pop::Empty if was_hung_up => return Err(self.closed()),
                // Items put before the hang-up come first: look once more.
                Pop::Empty if is_hung_up(self) => was_hung_up = true,
                Pop::Empty => return Ok(Tried::NotNow),
                Pop::Busy if self.ring.contend_get() => return Ok(Tried::Busy),
                Pop::Busy => {}
            }
        }
    }

    /// See [`Ring::taken`].
    pub(super) fn taken(&self) -> Option<u32> {
        self.ring.taken()
    }

    pub(super) async fn put<T: Serialize + 'static>(&self, mut value: T) -> Result<(), Refused<T>> {
        let put = match wire::encode(&value) {
            Ok(message) => self.put_held(message, Held(&mut value)).await,
            Err(error) => Err(error),
        };
        put.map_err(|error| (error, value))
    }

    pub(super) async fn put_timeout<T: Serialize + 'static>(
        &self,
        mut value: T,
        timeout: Duration,
    ) -> Result<(), Refused<T>> {
        let put = match wire::encode(&value) {
            Ok(message) => self.in_time(timeout, self.put_held(message, Held(&mut value))).await,
            Err(error) => Err(error),
        };
        put.map_err(|error| (error, value))
    }

    async fn put_held<T: 'static>(&self, mut message: Message, mut value: Held<'_, T>) -> Result<()> {
        let attempt = || self.push(value.parts(&mut message), Self::is_hung_up).later();
        flatten(until(&self.room, attempt).await.map_err(|error| self.failed("wait for", error))).map(drop)
    }

    pub(super) async fn get_timeout<T: DeserializeOwned + 'static>(&self, timeout: Duration) -> Result<T> {
        self.in_time(timeout, self.get()).await
    }

    async fn in_time<T>(&self, timeout: Duration, waits: impl Future<Output = Result<T>>) -> Result<T> {
        let limited = timer::limited(timeout, waits).map_err(|error| self.failed("wait for", error))?;
        limited.await.unwrap_or_else(|_| Err(self.timed_out()))
    }

    pub(super) async fn get<T: DeserializeOwned + 'static>(&self) -> Result<T> {
        let waited = until(&self.items, || self.pop::<T>(Self::is_known_hung_up).later()).await;
        self.decode(flatten(waited.map_err(|error| self.failed("wait for", error)))?)
    }

    pub(super) fn try_put<T: Serialize + 'static>(&self, value: T) -> Result<(), Refused<T>> {
        self.try_put_unless(Self::is_hung_up, value).map(drop)
    }

    /// [`try_put`](Self::try_put) by a caller that learns of the other end's death by another way, and not here. Returns
    /// whether a consumer had to be woken.
    pub(super) fn try_put_blindly<T: Serialize + 'static>(&self, value: T) -> Result<bool, Refused<T>> {
        self.try_put_unless(|_| false, value)
    }

    fn try_put_unless<T: Serialize + 'static>(
        &self,
        is_hung_up: fn(&Self) -> bool,
        value: T,
    ) -> Result<bool, Refused<T>> {
        let tried = wire::encode(&value).and_then(|mut message| {
            let pushed = when_not_busy(|| self.push(message.parts(&value), is_hung_up))?;
            pushed.ok_or_else(|| Error::new(ErrorKind::Full, format!("the {} is full", self.what)))
        });
        tried.map_err(|error| (error, value))
    }

    pub(super) fn try_get<T: DeserializeOwned + 'static>(&self) -> Result<T> {
        let empty = || Err(Error::new(ErrorKind::Empty, format!("the {} is empty", self.what)));
        self.next_now().unwrap_or_else(empty)
    }

    /// The next item, if there is one now.
    pub(super) fn next_now<T: DeserializeOwned + 'static>(&self) -> Option<Result<T>> {
        let popped = when_not_busy(|| self.pop::<T>(Self::is_hung_up)).transpose()?;
        Some(popped.and_then(|received| self.decode(received)))
    }

    /// Returns `true` if the next take would yield neither an item nor the end, as far as is known here.
    pub(super) fn has_nothing_known(&self) -> bool {
        let is_empty = self.ring.is_empty_here();
        self.watch_idle();
        is_empty && !self.is_known_hung_up()
    }

    /// The next item for a caller that is notified when there may be one, and then asks again.
    pub(super) fn next_when_notified<T: DeserializeOwned + 'static>(&self) -> Option<Result<T>> {
        // Most looks find nothing: they need no lock.
        if self.has_nothing_known() {
            return None;
        }
        let popped = self.pop::<T>(Self::is_known_hung_up).later()?;
        Some(popped.and_then(|received| self.decode(received)))
    }

    #[track_caller]
    pub(super) fn blocking_put<T: Serialize + 'static>(&self, value: T) -> Result<(), Refused<T>> {
        refuse_inside_async();
        let tried = wire::encode(&value).and_then(|mut message| {
            let attempt = || self.push(message.parts(&value), Self::is_hung_up).later();
            self.block(&self.room, None, attempt).map(drop)
        });
        tried.map_err(|error| (error, value))
    }

    /// Puts until `gives_up` returns `true`; it is called after each `interval`. Returns whether the value was put.
    #[track_caller]
    pub(super) fn blocking_put_unless<T: Serialize + 'static>(
        &self,
        value: T,
        interval: Duration,
        gives_up: impl Fn() -> bool,
    ) -> Result<bool> {
        refuse_inside_async();
        let mut message = wire::encode(&value)?;
        loop {
            let attempt = || self.push(message.parts(&value), Self::is_hung_up).later();
            // Asked at a deadline that is over, it tries once.
            let gives_up = gives_up();
            let deadline = if gives_up { Instant::now() } else { Instant::now() + interval };
            match self.block(&self.room, Some(deadline), attempt) {
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Timeout && !gives_up => {}
                Err(error) if error.kind() == ErrorKind::Timeout => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    /// Puts an encoded message from where it lies. After an error it is lost.
    pub(super) fn blocking_put_encoded(&self, mut payload: Payload<'_>, attachments: &[Attachment]) -> Result<()> {
        let attempt = || self.push((payload.again(), attachments), Self::is_hung_up).later();
        self.block(&self.room, None, attempt).map(drop)
    }

    #[track_caller]
    pub(super) fn blocking_get<T: DeserializeOwned + 'static>(&self) -> Result<T> {
        refuse_inside_async();
        self.decode(self.block(&self.items, None, || self.pop::<T>(Self::is_hung_up).later())?)
    }

    fn block<T>(
        &self,
        queue: &Arc<WaitQueue>,
        deadline: Option<Instant>,
        attempt: impl FnMut() -> Option<Result<T>>,
    ) -> Result<T> {
        let waited = until_blocking(queue, deadline, attempt).map_err(|error| self.failed("wait for", error))?;
        waited.unwrap_or_else(|| Err(self.timed_out()))
    }

    pub(super) fn timed_out(&self) -> Error {
        Error::new(ErrorKind::Timeout, format!("the {} was not ready in time", self.what))
    }

    #[inline]
    fn decode<T: DeserializeOwned + 'static>(&self, (buffer, fds): Received) -> Result<T> {
        if !self.is_joinable {
            return buffer.decode(fds);
        }
        let unread = BeingDecoded(self);
        let value = buffer.decode(fds)?;
        std::mem::forget(unread);
        Ok(value)
    }

    /// An item that was taken and that nobody got is done.
    #[cold]
    fn forget(&self) {
        // It fails only if it is closed already.
        let _ = self.task_done();
    }

    /// Waits until a get would not have to; true also if the get would then fail with `Closed`.
    pub(super) async fn poll(&self, timeout: Duration) -> Result<bool> {
        let ready = || match self.ring.len() {
            Ok(0) => (self.ring.is_closed() || self.is_hung_up()).then_some(Ok(())),
            Ok(_) => Some(Ok(())),
            Err(error) => Some(Err(error)),
        };
        if let Some(ready) = ready() {
            return ready.map(|()| true).map_err(|error| self.failed("look into", error));
        }
        let failed = |error| self.failed("wait for", error);
        match timer::limited(timeout, until(&self.items, ready)).map_err(failed)?.await {
            Err(_) => Ok(false),
            Ok(waited) => waited.and_then(|ready| ready).map(|()| true).map_err(failed),
        }
    }

    /// Lets nothing more in and wakes everybody.
    pub(super) fn close(&self) {
        // It fails only in a process that is one too many to wait or lock (`family`), which has put nothing either.
        let _ = self.ring.close();
        self.notify_of_close();
    }

    /// [`close`](Self::close), which does not wait for an item that is being copied.
    pub(super) fn abandon(&self) {
        let _ = self.ring.close_within(Duration::ZERO);
        self.notify_of_close();
    }

    /// Drops the items that are there, with their memory and their descriptors, and reads none of them. It may leave some if another process
    /// stays in the middle of taking one.
    pub(super) fn discard(&self) {
        let one = || {
            let take = |number, count| self.take_descriptors(number, count);
            let (popped, requests) = self.ring.pop(|_| (Unread, true), take, |_| {});
            self.notify(requests);
            Ok(match popped.map_err(|error| self.failed("take from", error))? {
                Pop::Got(Unread, _) => Tried::Done(()),
                Pop::Empty | Pop::Closed => Tried::NotNow,
                Pop::Busy => Tried::Busy,
            })
        };
        while let Ok(Some(())) = when_not_busy(one) {}
    }

    fn notify_of_close(&self) {
        self.wait_queues().into_iter().for_each(|queue| queue.notify_all());
        self.joined.notify_all();
    }

    pub(super) fn len(&self) -> usize {
        self.waiting() + self.leased()
    }

    /// Returns how many items are in the ring.
    pub(super) fn waiting(&self) -> usize {
        self.ring.len().unwrap_or(0)
    }

    /// Returns how many items were ever put, and how many taken, each modulo 2^32; `None` if the memory is damaged.
    #[cfg(any(feature = "dashboard", feature = "metrics"))]
    pub(super) fn passed(&self) -> Option<[u32; 2]> {
        self.ring.passed().ok()
    }

    /// Returns how many items are leased, or wait to be delivered again.
    fn leased(&self) -> usize {
        #[cfg(not(multiprocess_loom))]
        return self.ring.leased();
        #[cfg(multiprocess_loom)]
        0
    }

    #[cfg(multiprocess_loom)]
    fn take_descriptors(&self, number: u64, count: usize) -> io::Result<Vec<OwnedFd>> {
        take_fds(self.rx.as_fd(), number, count)
    }

    fn unfinished(&self) -> Unfinished<'_> {
        Unfinished(&self.ring)
    }

    pub(super) fn task_done(&self) -> Result<()> {
        if !self.unfinished().remove_one(self.ring.family().me()?) {
            let why = "task_done was called more often than items were taken from the queue";
            return Err(Error::other(why).explained_by(Topic::TaskDone));
        }
        // Of two that finish the last two items at once, one sees both done.
        fence(SeqCst);
        // Waiters find the damage as well.
        if self.is_finished().unwrap_or(true) {
            self.joined.notify_all();
        }
        Ok(())
    }

    fn is_finished(&self) -> Result<bool> {
        let drained_at = || self.ring.drained_at().map_err(|error| self.failed("wait for", error));
        // In this order: a consumer notes what it holds before it commits.
        while let Some(at) = drained_at()? {
            fault::point("join.empty");
            // Leased items first: a process that gets one after it came back notes that it holds it, and then frees it.
            if self.leased() > 0 || self.unfinished().has_any() {
                return Ok(false);
            }
            // A process that finished one meanwhile may have put another before.
            if drained_at()? == Some(at) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// As an attempt for `until`.
    fn finished(&self) -> Option<Result<()>> {
        self.is_finished().map(|finished| finished.then_some(())).transpose()
    }

    pub(super) async fn join(&self) -> Result<()> {
        flatten(self.joined.until(|| self.finished()).await.map_err(|error| self.failed("wait for", error)))
    }

    #[track_caller]
    pub(super) fn blocking_join(&self) -> Result<()> {
        refuse_inside_async();
        let waited = self.joined.until_blocking(None, || self.finished());
        waited.map_err(|error| self.failed("wait for", error))?.unwrap_or_else(|| Err(self.timed_out()))
    }
}

/// The last handle of this process goes: it can be no keeper any more.
impl Drop for ChannelCore {
    fn drop(&mut self) {
        if self.ring.watched() > 0 {
            self.notify(self.ring.give_back_kept());
        }
    }
}

impl Notifies for ChannelCore {
    fn notify(&self, requests: WakeRequests) {
        self.notify(requests);
    }
}

/// A value that waits to be put, held exclusively so that a future that holds it is `Send` without `T: Sync`.
struct Held<'a, T>(&'a mut T);

impl<T: 'static> Held<'_, T> {
    fn parts<'a>(&'a mut self, message: &'a mut Message) -> (Payload<'a>, &'a [Attachment]) {
        message.parts(self.0)
    }
}

/// The outcome of an attempt.
enum Tried<T> {
    Done(T),
    NotNow,
    /// Another process is at it, for the length of a copy.
    Busy,
}

trait Later<T> {
    /// As an attempt for `until`: `None` is to be tried again when notified.
    fn later(self) -> Option<Result<T>>;
}

impl<T> Later<T> for Result<Tried<T>> {
    fn later(self) -> Option<Result<T>> {
        match self {
            Ok(Tried::Done(value)) => Some(Ok(value)),
            Ok(Tried::NotNow | Tried::Busy) => None,
            Err(error) => Some(Err(error)),
        }
    }
}

fn flatten<T>(result: Result<Result<T>>) -> Result<T> {
    result.and_then(|result| result)
}

/// For calls that do not wait: gives a process that is at it the CPU until it is done, within reason.
fn when_not_busy<T>(mut attempt: impl FnMut() -> Result<Tried<T>>) -> Result<Option<T>> {
    for round in 0..1000 {
        match attempt()? {
            Tried::Done(value) => return Ok(Some(value)),
            Tried::NotNow => return Ok(None),
            Tried::Busy if round < 100 => std::thread::yield_now(),
            // It copies something huge, or is stopped, perhaps for good.
            Tried::Busy => std::thread::sleep(Duration::from_micros(100)),
        }
    }
    Ok(None)
}
