//! How a sleeping process is reached: its eventfd, watched by every runtime in it that has a sleeper.
//!
//! An eventfd under EPOLLET fires on each write without being read. Tokio wakes our own waker right inside its
//! I/O driver. That reads which wait queues are concerned (`rung_for`) and wakes their tasks: no task of ours, no extra hop.

use crate::os::epoll::{self, Epoll};
use crate::os::eventfd;
use crate::os::reactor::{self, Watched};
use crate::os::sync::lock;
use crate::shm::family::Family;
use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::Ordering::*;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::ThreadId;
use std::time::Instant;
use tokio::runtime::{Handle, Id};

/// Calls `react` in tokio's I/O driver at each edge of a descriptor, until dropped.
pub(crate) struct Watch<F: AsFd + AsRawFd> {
    fd: Watched<F>,
    react: Box<dyn Fn() + Send + Sync>,
    /// Turns this very watch.
    waker: Waker,
}

/// Calls `react` in the I/O driver of the current runtime each time that `doorbell` is rung, until the result is dropped.
pub(crate) fn watch(
    doorbell: Arc<OwnedFd>,
    react: impl Fn() + Send + Sync + 'static,
) -> io::Result<Arc<Watch<Arc<OwnedFd>>>> {
    let watch = Watch::new(doorbell, react)?;
    watch.turn();
    Ok(watch)
}

struct Rearm<F: AsFd + AsRawFd>(Weak<Watch<F>>);

impl<F: AsFd + AsRawFd + Send + Sync + 'static> Watch<F> {
    fn new(fd: F, react: impl Fn() + Send + Sync + 'static) -> io::Result<Arc<Self>> {
        let (fd, react) = (epoll::register(fd)?, Box::new(react));
        Ok(Arc::new_cyclic(|me: &Weak<Self>| Self { fd, react, waker: Waker::from(Arc::new(Rearm(me.clone()))) }))
    }

    /// Reacts to what has happened and arms itself for the next edge.
    fn turn(self: &Arc<Self>) {
        let step = std::future::poll_fn(|cx| {
            // An error is the end of the runtime: its tasks sleep no more.
            while let Poll::Ready(Ok(mut guard)) = self.fd.poll_read_ready(cx) {
                // A hang-up is for ever: readiness that cannot be cleared is not waited for again.
                let is_last = guard.ready().is_read_closed();
                guard.clear_ready();
                (self.react)();
                if is_last {
                    break;
                }
            }
            Poll::Ready(())
        });
        // Without a budget: this runs in the I/O driver, or on behalf of all tasks of the runtime.
        let step = pin!(tokio::task::coop::unconstrained(step));
        let _ = step.poll(&mut Context::from_waker(&self.waker));
    }
}

impl<F: AsFd + AsRawFd + Send + Sync + 'static> Wake for Rearm<F> {
    fn wake(self: Arc<Self>) {
        if let Some(watch) = self.0.upgrade() {
            watch.turn();
        }
    }
}

/// A descriptor's watches, one on each runtime that has had a sleeper: any runtime may end while others go on.
pub(super) struct Watches<F: AsFd + AsRawFd>(Mutex<Vec<(Id, Arc<Watch<F>>)>>);

impl<F: AsFd + AsRawFd + Send + Sync + 'static> Watches<F> {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Watches the descriptor that `make` returns on the runtime that polls, too; an edge that came before counts. May react at once, so
    /// the caller holds no lock that the reaction takes.
    pub(super) fn listen<R: Fn() + Send + Sync + 'static>(
        &self,
        runtime: Id,
        make: impl FnOnce() -> (F, R),
    ) -> io::Result<()> {
        let mut watches = lock(&self.0);
        if watches.iter().any(|(id, _)| *id == runtime) {
            return Ok(());
        }
        let (fd, react) = make();
        watches.retain(|(_, watch)| !watch.has_ended());
        let watch = Watch::new(fd, react)?;
        watches.push((runtime, watch.clone()));
        drop(watches);
        watch.turn();
        Ok(())
    }
}

/// The doorbell of this process; it is never closed.
type OwnDoorbell = BorrowedFd<'static>;

static DOORBELL: Watches<OwnDoorbell> = Watches::new();
/// The wait queues that have had a sleeper, by their hint.
static SLEEPING: [Mutex<Vec<Weak<dyn Answers>>>; 64] = [const { Mutex::new(Vec::new()) }; 64];

/// A wait queue that the doorbell is answered for.
pub(super) trait Answers: Send + Sync {
    /// The doorbell was rung: wakes the front if its notice has come, or in any case if `anyway`.
    fn rung(&self, anyway: bool);
}

/// The runtime that polls.
pub(super) fn runtime() -> io::Result<Id> {
    let outside = |_| reactor::no_runtime("a future of this crate must be polled inside a tokio runtime");
    Ok(Handle::try_current().map_err(outside)?.id())
}

/// Makes a runtime listen to this process's doorbell.
pub(super) fn listen(family: &'static Family, runtime: Id) -> io::Result<()> {
    let doorbell = family.doorbell(family.me()?.slot);
    DOORBELL.listen(runtime, || (doorbell, || answer(family)))
}

impl<F: AsFd + AsRawFd> Watch<F> {
    /// Returns `true` if the runtime has ended. Asks for the write side, so that the armed read side stays as it is.
    fn has_ended(&self) -> bool {
        let ask = std::future::poll_fn(|cx| Poll::Ready(matches!(self.fd.poll_write_ready(cx), Poll::Ready(Err(_)))));
        let ask = pin!(tokio::task::coop::unconstrained(ask));
        matches!(ask.poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(true))
    }
}

/// Serves all wait queues that the doorbell may have been rung for.
fn answer(family: &Family) {
    let Ok(me) = family.me() else { return };
    let rung_for = family.rung_for(me.slot);
    if rung_for.load(Relaxed) == 0 {
        return;
    }
    let rung = rung_for.swap(0, AcqRel);
    let mut bits = rung;
    while bits != 0 {
        answer_hint(bits.trailing_zeros(), rung == u64::MAX);
        bits &= bits - 1;
    }
}

/// Serves the wait queues of one hint. They are several only if they share it by chance.
fn answer_hint(bit: u32, anyway: bool) {
    let bucket = lock(&SLEEPING[bit as usize]);
    let mut lines = bucket.iter().filter_map(Weak::upgrade);
    let first = lines.next();
    let others: Vec<_> = lines.collect();
    drop(bucket);
    first.iter().chain(&others).for_each(|line| line.rung(anyway));
}

/// Serves a notification that this process gave to itself, without the doorbell.
pub(super) fn answer_here(bit: u32) {
    answer_hint(bit, false);
}

/// From now on the doorbell of this process is answered for `line`.
pub(super) fn list(line: Weak<dyn Answers>, bit: u32) {
    lock(&SLEEPING[bit as usize]).push(line);
}

/// The reverse of [`list`].
pub(super) fn unlist<L>(line: &L, bit: u32) {
    lock(&SLEEPING[bit as usize]).retain(|other| !std::ptr::addr_eq(other.as_ptr(), line));
}

/// Wakes a thread in [`Parker::until`] by ringing the doorbell of its own process, unless it is that thread.
struct RingMyself(&'static Family, ThreadId);

impl Wake for RingMyself {
    fn wake(self: Arc<Self>) {
        if std::thread::current().id() == self.1 {
            STAYS_UP.set(true);
        } else if let Ok(me) = self.0.me() {
            eventfd::notify(self.0.doorbell(me.slot));
        }
    }
}

/// How a thread without a runtime sleeps: on an epoll of its own that watches the doorbell of its process.
pub(super) struct Parker {
    family: &'static Family,
    epoll: Option<Epoll>,
    pub(super) waker: Waker,
    is_kept: bool,
}

thread_local! {
    /// The epoll of the last parker, if it watched the doorbell alone: a thread that waits often makes it once.
    static KEPT: Cell<Option<Epoll>> = const { Cell::new(None) };
    static KEEPS: Cell<bool> = const { Cell::new(false) };
    /// This thread has woken itself.
    static STAYS_UP: Cell<bool> = const { Cell::new(false) };
}

/// From now on this thread keeps the epoll of its parker, which is one descriptor: for threads that wait again and again.
pub(crate) fn keep_parker() {
    KEEPS.set(true);
}

impl Drop for Parker {
    fn drop(&mut self) {
        if self.is_kept {
            // At the thread's end there is nothing to keep it for.
            let _ = KEPT.try_with(|kept| kept.set(self.epoll.take()));
        }
    }
}

impl Parker {
    /// `hangup` is a second thing that ends a parker.
    pub(super) fn of_thread(family: &'static Family, hangup: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let is_kept = hangup.is_none() && KEEPS.get();
        let kept = if is_kept { KEPT.try_with(Cell::take).ok().flatten() } else { None };
        let epoll = match kept {
            // An edge that came meanwhile ends the sleep at once, and the caller tries again.
            Some(epoll) => epoll,
            None => {
                let epoll = Epoll::new()?;
                epoll.watch_edges(family.doorbell(family.me()?.slot).as_fd())?;
                hangup.map_or(Ok(()), |fd| epoll.watch_edges(fd))?;
                epoll
            }
        };
        let waker = Waker::from(Arc::new(RingMyself(family, std::thread::current().id())));
        Ok(Self { family, epoll: Some(epoll), waker, is_kept })
    }

    /// Sleeps until something may have changed; false at the deadline.
    pub(super) fn until(&self, deadline: Option<Instant>) -> io::Result<bool> {
        if STAYS_UP.take() {
            return Ok(true);
        }
        let woken = self.epoll.as_ref().map_or(Ok(false), |epoll| epoll.wait(deadline))?;
        answer(self.family);
        // The caller tries again now in any case.
        Ok(STAYS_UP.take() | woken)
    }
}
