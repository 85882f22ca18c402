//! The starter's end: reads the records of a child and replays them.
#![forbid(unsafe_code)]

use super::outbox::{LONGEST, dropped_before, records};
use super::replay::{Caller, Replay};
use crate::error::{Error, Topic};
use crate::os::fork;
use crate::os::reactor::{self, Watched};
use crate::os::socket::{self, Wait};
use crate::os::sync::{lock, try_lock};
use std::cell::Cell;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use tokio::io::Interest;
use tokio::runtime::Handle;

/// A way for the records of a child that is about to be started.
pub(in crate::process) struct Traces {
    runtime: Handle,
    watched: Watched<Arc<OwnedFd>>,
    ours: Arc<OwnedFd>,
    theirs: Arc<OwnedFd>,
    caller: Arc<Caller>,
}

impl Traces {
    /// Makes it for `caller`; `None` outside a runtime, where no task could read. A child without descriptors for it starts all the same.
    pub(in crate::process) fn open(caller: Arc<Caller>) -> Option<Self> {
        let runtime = Handle::try_current().ok()?;
        let opened = socket::packet_pair().and_then(|(ours, theirs)| {
            let (ours, theirs) = (Arc::new(ours), Arc::new(theirs));
            Ok((reactor::watch(ours.clone(), Interest::READABLE)?, ours, theirs))
        });
        match opened {
            Ok((watched, ours, theirs)) => Some(Self { runtime, watched, ours, theirs, caller }),
            Err(error) => {
                let error = Error::from(error);
                let help = Topic::TracesDropped.name();
                tracing::warn!(%error, help, "what a child records by tracing cannot be forwarded");
                None
            }
        }
    }

    /// Returns the fields for the order: the level that is of interest, and the child's end.
    pub(in crate::process) fn theirs(&self) -> (u8, Arc<OwnedFd>) {
        (Caller::level(), self.theirs.clone())
    }

    /// Returns `true` if this process has hardly a descriptor left, so that a start may succeed without a way for records.
    pub(in crate::process) fn may_have_taken_the_last_descriptors() -> bool {
        (0..PAIRS_OF_A_START).map(|_| socket::packet_pair()).collect::<io::Result<Vec<_>>>().is_err()
    }

    /// Reads from now on: the child has been started, as `pid`.
    pub(in crate::process) fn read(self, pid: u32) -> Arc<TraceInbox> {
        let Self { runtime, watched, ours, theirs, caller } = self;
        drop(theirs);
        let reading = Mutex::new(Reading { replay: Replay::of_child(pid), is_over: false });
        let (dropped, waiting) = (AtomicU64::new(0), Mutex::default());
        let inbox = Arc::new(TraceInbox { pid, socket: ours, caller, reading, waiting, dropped });
        list(inbox.clone());
        runtime.spawn(inbox.clone().read_on(watched));
        inbox
    }
}

/// More descriptors than a start takes for a moment, as pairs.
const PAIRS_OF_A_START: usize = 8;

/// The records of a child that have arrived.
pub(in crate::process) struct TraceInbox {
    pid: u32,
    socket: Arc<OwnedFd>,
    caller: Arc<Caller>,
    reading: Mutex<Reading>,
    /// Those that found another at it.
    waiting: Mutex<Vec<Waker>>,
    /// How many records the child has dropped since that was last reported.
    dropped: AtomicU64,
}

struct Reading {
    replay: Replay,
    is_over: bool,
}

/// The inboxes that have not come to their end: this process reads them at its own, when their tasks may be gone.
static LISTED: Mutex<Listed> = Mutex::new(Listed { inboxes: Vec::new(), read_at: 16 });

struct Listed {
    inboxes: Vec<Arc<TraceInbox>>,
    /// The length at which all are read once, for those whose runtime is gone.
    read_at: usize,
}

fn list(inbox: Arc<TraceInbox>) {
    let all = {
        let mut listed = lock(&LISTED);
        listed.inboxes.push(inbox);
        let is_long = listed.inboxes.len() >= listed.read_at;
        is_long.then(|| listed.inboxes.clone())
    };
    // Without the lock: subscribers are the user's code.
    if let Some(all) = all {
        all.iter().for_each(|inbox| _ = inbox.read());
        let mut listed = lock(&LISTED);
        listed.read_at = 2 * listed.inboxes.len() + 16;
    }
}

fn listed() -> Vec<Arc<TraceInbox>> {
    if fork::is_forked() { Vec::new() } else { lock(&LISTED).inboxes.clone() }
}

/// Replays what children that have ended have recorded.
pub(in crate::process) async fn read_rest() {
    for inbox in listed() {
        while inbox.read_next().await == Read::Some {
            tokio::task::yield_now().await;
        }
    }
}

/// [`read_rest`] for a process without a runtime.
pub(in crate::process) fn blocking_read_rest() {
    for inbox in listed() {
        while inbox.read_locked(lock(&inbox.reading)) == Read::Some {}
    }
}

/// How a [`TraceInbox::read`] has ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::process) enum Read {
    /// All that was there is replayed.
    All,
    /// There may be more.
    Some,
    /// Another thread reads at the moment.
    Busy,
    /// No more can come.
    Over,
}

/// So many packets are replayed before other tasks have their turn.
const PACKETS: usize = 64;

thread_local! {
    /// Room for any packet, cleared once.
    static ROOM: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl TraceInbox {
    async fn read_on(self: Arc<Self>, watched: Watched<Arc<OwnedFd>>) {
        loop {
            match self.read_next().await {
                Read::Over => return,
                Read::Some | Read::Busy => tokio::task::yield_now().await,
                Read::All => match watched.readable().await {
                    Ok(mut event) => event.clear_ready(),
                    Err(_) => return,
                },
            }
        }
    }

    /// Replays packets that are here.
    fn read(&self) -> Read {
        try_lock(&self.reading).map_or(Read::Busy, |reading| self.read_locked(reading))
    }

    async fn read_next(&self) -> Read {
        poll_fn(|cx| self.poll_read(cx)).await
    }

    /// Replays packets that are here; waits while another thread does, which may be inside a slow subscriber.
    pub(in crate::process) fn poll_read(&self, cx: &mut Context<'_>) -> Poll<Read> {
        match self.read() {
            Read::Busy => self.wait_for_the_other(cx.waker()),
            read => Poll::Ready(read),
        }
    }

    fn wait_for_the_other(&self, waker: &Waker) -> Poll<Read> {
        let mut waiting = lock(&self.waiting);
        if !waiting.iter().any(|other| other.will_wake(waker)) {
            waiting.push(waker.clone());
        }
        drop(waiting);
        // It may have ended before it could see the waker.
        match self.read() {
            Read::Busy => Poll::Pending,
            read => Poll::Ready(read),
        }
    }

    fn read_locked(&self, reading: MutexGuard<'_, Reading>) -> Read {
        // Dropped after the lock.
        let _wakes = WakesOthers(self);
        let mut reading = reading;
        if reading.is_over {
            self.warn();
            return Read::Over;
        }
        // At the end of a thread there is nothing to keep it for.
        let mut room = ROOM.try_with(Cell::take).unwrap_or_default();
        room.resize(LONGEST, 0);
        let read = reading.read(self, &mut room);
        let _ = ROOM.try_with(|kept| kept.set(room));
        drop(reading);
        if read == Read::Over {
            self.unlist();
        }
        read
    }

    fn unlist(&self) {
        let unlisted = {
            let mut listed = lock(&LISTED);
            let at = listed.inboxes.iter().position(|inbox| std::ptr::eq(&**inbox, self));
            at.map(|at| listed.inboxes.swap_remove(at))
        };
        // Without the lock: the last holder gives up a span of the user's subscriber.
        drop(unlisted);
    }

    /// Adds records that the child had to drop, to those that the next [`read`](Self::read) reports when it has come to the end.
    pub(in crate::process) fn add_dropped(&self, dropped: u64) {
        self.dropped.fetch_add(dropped, Relaxed);
    }

    fn warn(&self) {
        let dropped = self.dropped.swap(0, Relaxed);
        if dropped > 0 {
            self.caller.warn_of_dropped(self.pid, dropped);
        }
    }
}

/// The end of a reading: those that found it under way try again.
struct WakesOthers<'a>(&'a TraceInbox);

impl Drop for WakesOthers<'_> {
    fn drop(&mut self) {
        let waiting = std::mem::take(&mut *lock(&self.0.waiting));
        // Without the lock: a waker is foreign code.
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Reading {
    fn read(&mut self, inbox: &TraceInbox, room: &mut [u8]) -> Read {
        for _ in 0..PACKETS {
            match socket::recv(inbox.socket.as_fd(), room, Wait::No) {
                Ok(packet) if packet.len > 0 => {
                    let (dropped, packet) = dropped_before(&room[..packet.len]);
                    inbox.add_dropped(dropped);
                    records(packet).for_each(|record| self.replay.tell(&inbox.caller, record));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    inbox.warn();
                    return Read::All;
                }
                _ => {
                    inbox.warn();
                    self.replay.end();
                    self.is_over = true;
                    return Read::Over;
                }
            }
        }
        Read::Some
    }
}
