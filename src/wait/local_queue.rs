//! The local wait queue: the tasks of this process that wait for one thing, behind one entry of the shared list.
//!
//! # State
//! `queue`: the waiting tasks, first come first served; only the front may try. `place`: the entry of this process in the
//! shared list while its front sleeps. `granted`: a notification was taken from the list and is not used yet.
//!
//! # Moves
//! | move | by | then |
//! |---|---|---|
//! | join the queue | a future at its first poll | if in front, it tries |
//! | take a place | the front, before it sleeps | it tries once more |
//! | sleep locally, without a place | the front, while this process alone decides when it succeeds | it tries once more |
//! | front woken (`wake_front`) | the task that decided so | the front tries |
//! | place -> granted, front woken | the doorbell (`rung`) | the front tries |
//! | leave with success | the front | a granted notification is used up, one still in the list is passed on; the next task is woken to try, unless this process will wake it later |
//! | leave without | a future that is dropped | see Cancel |
//! | place -> none, all there is read | the doorbell, if the queue has a reader | the reader wakes the tasks that it read for |
//!
//! # Invariants
//! 1. Only the front tries, so tasks of one process are served in the order of their first poll.
//! 2. While the queue is not empty, the front is awake (polled, or its waker called), or `place` is set, or a task of this process
//!    is bound to call `wake_front` later: see [`Attempt::is_local`](super::Attempt::is_local).
//! 3. No lock of ours is held while a waker runs or is dropped: it may drop other futures.
//! 4. A sleeping front has a runtime, or a parker, of its own that answers the doorbell.
//!
//! # Death
//! All of it dies with the process; see `sleepers` for the shared part.
//!
//! # Cancel
//! | dropped | effect |
//! |---|---|
//! | not in front | it is gone from the queue |
//! | in front, others behind | the next one is woken and tries; the notification stays for it |
//! | in front, none behind | the place is given up; a notification that had come goes to another process |

use super::doorbell::{self, Answers, Watches};
use super::sleepers::{self, Place, Sleeper, Sleepers, Wake};
use super::spin::{self, Spin, SpinWindow};
use crate::os::eventfd;
use crate::os::fork;
use crate::os::socket;
use crate::os::sync::lock;
use crate::shm::atomic::{AtomicU64, fence};
use crate::shm::family::{Family, Member};
use crate::shm::region::Region;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::task::Waker;
use tokio::runtime::Id;

/// One event of one mapped object, as this process sees it.
pub(crate) struct WaitQueue {
    family: &'static Family,
    region: Arc<Region>,
    first_word: usize,
    /// Which of the 64 hints stands for this event: the same in every process.
    hint: u32,
    hangup: Option<Arc<Hangup>>,
    /// A doorbell of the one process that sleeps here, where there are many that would share those of the family.
    own_doorbell: OnceLock<(Arc<OwnedFd>, Watches<Arc<OwnedFd>>)>,
    /// The reaction to the doorbell, in place of waking the front.
    react: OnceLock<Box<dyn Fn() + Send + Sync>>,
    waiting: AtomicUsize,
    local: Mutex<Local>,
    pub(super) spin: Spin,
}

#[derive(Default)]
struct Local {
    queue: VecDeque<Waiting>,
    next_id: u64,
    place: Option<Place>,
    ticket: Option<u64>,
    granted: bool,
    is_listed: bool,
}

struct Waiting {
    id: u64,
    waker: Option<Waker>,
}

impl WaitQueue {
    pub(crate) fn new(region: Arc<Region>, first_word: usize, hangup: Option<Arc<Hangup>>) -> io::Result<Arc<Self>> {
        let family = Family::get()?;
        let (_, inode) = region.identity();
        let hint =
            (inode as u32).wrapping_mul(0x9e37_79b9).wrapping_add(first_word as u32 / sleepers::LEN as u32) >> 3 & 63;
        let (own_doorbell, react) = (OnceLock::new(), OnceLock::new());
        let (waiting, local, spin) = (AtomicUsize::new(0), Mutex::default(), Spin::default());
        Ok(Arc::new(Self { family, region, first_word, hint, hangup, own_doorbell, react, waiting, local, spin }))
    }

    /// An alarm, which has no waiting tasks. While it is armed, a notification calls `react` in the I/O driver of the runtime, or in
    /// the call that arms it. It may be called more often than asked for.
    pub(crate) fn alarm(
        region: Arc<Region>,
        first_word: usize,
        react: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Arc<Self>> {
        let line = Self::new(region, first_word, None)?;
        line.set_reader(react);
        Ok(line)
    }

    pub(super) fn family(&self) -> &'static Family {
        self.family
    }

    fn sleepers(&self) -> Sleepers<'_> {
        let words: &[AtomicU64] = self.region.words();
        Sleepers::new(&words[self.first_word..self.first_word + sleepers::LEN])
    }

    fn is_listed(&self, sleeper: Sleeper) -> bool {
        self.family.epoch_of(sleeper.slot).is_some_and(|epoch| sleeper.has_epoch(epoch))
    }

    fn wake(&self, wake: Wake, mine: Option<Sleeper>) -> bool {
        match wake {
            Wake::Sleeper(sleeper) if Some(sleeper) == mine => return true,
            Wake::Sleeper(sleeper) => match self.own_doorbell.get() {
                Some((doorbell, _)) => eventfd::notify(doorbell.as_fd()),
                None => self.family.wake(sleeper.slot, 1 << self.hint),
            },
            Wake::Doorbells(doorbells) => self.family.ring_doorbells(doorbells, 1 << self.hint),
        }
        false
    }

    /// Wakes the process that has waited longest, if any. To be called after the change that it waits for.
    #[inline]
    pub(crate) fn notify_one(&self) {
        if fork::is_forked() {
            // It would take the notification from a process, and cannot wake it.
            return;
        }
        let (mine, mut is_mine) = (self.family.me_if_listed().map(Sleeper::from), false);
        self.sleepers().notify_one(mine, |sleeper| self.is_listed(sleeper), |wake| is_mine |= self.wake(wake, mine));
        if is_mine {
            doorbell::answer_here(self.hint);
        }
    }

    /// Sets once the eventfd by which the one process that sleeps here is woken; to be set there and in the processes that wake it. Only
    /// its runtimes listen to that, so it must not wait here without one.
    pub(crate) fn set_own_doorbell(&self, doorbell: Arc<OwnedFd>) {
        let _ = self.own_doorbell.set((doorbell, Watches::new()));
    }

    /// Begins to spin, for a wait that ends with those of all other processes. If more of them sleep than there are CPUs, nobody spins: it would take
    /// the CPUs that they are to wake up on.
    pub(super) fn spin_among_all(&self) -> Option<SpinWindow> {
        (self.sleepers().count() < spin::cpus()).then(|| self.spin.begin()).flatten()
    }

    /// The process that will notify this queue is awake, so the next wait here should spin first.
    pub(crate) fn encourage(&self) {
        self.spin.encourage();
    }

    /// Returns `true` if any process may sleep here, for a caller that has just made its change by a SeqCst read-modify-write.
    #[inline]
    pub(crate) fn has_sleepers_after_rmw(&self) -> bool {
        self.sleepers().has_sleepers_after_rmw()
    }

    /// [`WaitQueue::notify_one`] for a caller that has made its change, and after it a SeqCst read-modify-write. The change itself
    /// may be a store with Release: no CPU lets such a read-modify-write pass it, or a load pass that.
    #[inline]
    pub(crate) fn notify_one_after_rmw(&self) {
        if self.has_sleepers_after_rmw() {
            self.notify_one();
        }
    }

    /// Wakes this process, if it sleeps here. To be called after the change that it waits for.
    pub(crate) fn notify_member(&self, member: Member) {
        if fork::is_forked() {
            return;
        }
        let (mine, mut is_mine) = (self.family.me_if_listed().map(Sleeper::from), false);
        self.sleepers().notify_sleeper(member.into(), |wake| is_mine |= self.wake(wake, mine));
        if is_mine {
            doorbell::answer_here(self.hint);
        }
    }

    /// Wakes every process that waits.
    pub(crate) fn notify_all(&self) {
        if fork::is_forked() {
            return;
        }
        let (mine, mut is_mine) = (self.family.me_if_listed().map(Sleeper::from), false);
        self.sleepers().notify_all(mine, |sleeper| self.is_listed(sleeper), |wake| is_mine |= self.wake(wake, mine));
        if is_mine {
            doorbell::answer_here(self.hint);
        }
    }

    /// Sets once the reader for all tasks that sleep by [`until_read`](super::until_read): `read` is called at each
    /// notice, in the I/O driver of a runtime. It takes all there is, and [`arm`](Self::arm)s again if somebody goes on
    /// waiting.
    pub(crate) fn set_reader(&self, read: impl Fn() + Send + Sync + 'static) {
        let _ = self.react.set(Box::new(read));
    }

    /// Has the next notice call an alarm's reaction; the caller must look once more afterwards. It holds no lock that
    /// the reaction takes. Cheap if it is armed already.
    pub(crate) fn arm(self: &Arc<Self>) -> io::Result<()> {
        let me = self.family.me()?;
        if lock(&self.local).place.is_some_and(|place| self.sleepers().keep(place, me.into())) {
            return Ok(());
        }
        // Outside a runtime the doorbell is answered by those runtimes that have listened before.
        let heard = self.listen();
        self.take_place(&mut lock(&self.local), me);
        heard
    }

    /// [`arm`](Self::arm) for a thread that answers the doorbell itself, by its parker.
    pub(super) fn arm_parked(self: &Arc<Self>) -> io::Result<()> {
        let me = self.family.me()?;
        self.take_place(&mut lock(&self.local), me);
        Ok(())
    }

    /// Returns `true` if it is armed, and no notice has come since.
    pub(crate) fn is_armed(&self) -> bool {
        lock(&self.local).place.is_some()
    }

    /// The reverse of [`WaitQueue::arm`], by a caller that tries from now on.
    pub(crate) fn disarm(&self) {
        let mut local = lock(&self.local);
        if let Some(place) = local.place.take() {
            // A notification is for the process that tries, and that is the caller.
            let _ = self.sleepers().leave(place);
        }
    }

    /// Enters the shared list, unless this process is there, and sees to it that the doorbell is answered.
    fn take_place(self: &Arc<Self>, local: &mut Local, me: Member) {
        if local.place.is_some_and(|place| self.sleepers().keep(place, me.into())) {
            return;
        }
        self.family.repair_own_slot();
        self.answer_doorbell(local);
        let doorbell = u32::from(me.slot) % crate::shm::family::DOORBELLS as u32;
        let place = self.sleepers().join(me.into(), doorbell, local.ticket, |sleeper| self.is_listed(sleeper));
        if let Place::Entry { ticket, .. } = place {
            local.ticket = Some(ticket);
        }
        local.place = Some(place);
    }

    /// From now on the doorbell of this process is answered for this queue.
    fn answer_doorbell(self: &Arc<Self>, local: &mut Local) {
        if !local.is_listed {
            let weak: Weak<Self> = Arc::downgrade(self);
            doorbell::list(weak, self.hint);
            local.is_listed = true;
        }
    }

    /// Makes sure that the current runtime wakes the front when there is something to try for.
    pub(crate) fn listen(self: &Arc<Self>) -> io::Result<()> {
        let runtime = doorbell::runtime()?;
        doorbell::listen(self.family, runtime)?;
        if let Some((doorbell, watches)) = self.own_doorbell.get() {
            let line = Arc::downgrade(self);
            let answer = move || line.upgrade().iter().for_each(|line| line.rung(false));
            watches.listen(runtime, || (doorbell.clone(), answer))?;
        }
        self.hangup.as_ref().map_or(Ok(()), |hangup| hangup.listen(runtime))
    }

    pub(super) fn hangup(&self) -> Option<BorrowedFd<'_>> {
        self.hangup.as_ref().map(|hangup| hangup.fd.as_fd())
    }

    /// Returns `true` if someone in this process already waits, so that a newcomer must queue.
    #[inline]
    pub(crate) fn has_waiters(&self) -> bool {
        self.waiting.load(Acquire) != 0
    }

    /// The same for a caller that has just made its change by a SeqCst read-modify-write.
    #[inline]
    pub(crate) fn has_waiters_after_rmw(&self) -> bool {
        self.waiting.load(SeqCst) != 0
    }

    /// Lets the front of the local queue try, if no notification of the shared list will: it has no place there.
    pub(crate) fn wake_front(&self) {
        let mut local = lock(&self.local);
        let front = if local.place.is_none() { local.queue.front_mut() } else { None };
        let waker = front.and_then(|front| front.waker.take());
        drop(local);
        waker.into_iter().for_each(Waker::wake);
    }

    /// Joins the local queue, to wait there.
    pub(crate) fn join(self: &Arc<Self>) -> Turn {
        let mut local = lock(&self.local);
        let id = local.next_id;
        local.next_id += 1;
        local.queue.push_back(Waiting { id, waker: None });
        self.waiting.store(local.queue.len(), Release);
        Turn { line: self.clone(), id, has_left: false }
    }
}

impl Answers for WaitQueue {
    /// The doorbell was rung: lets the front try if its notice has come, or whatever has come if `anyway`.
    fn rung(&self, anyway: bool) {
        let mut local = lock(&self.local);
        let noticed = local.place.is_some_and(|place| self.sleepers().take_notice(place));
        if noticed {
            local.place = None;
            local.granted = true;
        }
        let waker = if noticed || anyway { local.queue.front_mut().and_then(|front| front.waker.take()) } else { None };
        drop(local);
        waker.into_iter().for_each(Waker::wake);
        if let Some(react) = self.react.get() {
            react();
        }
    }
}

impl Drop for WaitQueue {
    fn drop(&mut self) {
        if fork::is_forked() {
            return;
        }
        doorbell::unlist(self, self.hint);
    }
}

/// A socket whose hang-up wakes the wait queues of a pipe end.
pub(crate) struct Hangup {
    fd: Arc<OwnedFd>,
    lines: OnceLock<Vec<Weak<WaitQueue>>>,
    watches: Watches<Arc<OwnedFd>>,
    /// Once it is known it is for ever.
    is_gone: Arc<AtomicBool>,
    /// A runtime watches it, so that no call need ask.
    is_watched: AtomicBool,
}

impl Hangup {
    pub(crate) fn new(fd: Arc<OwnedFd>) -> Arc<Self> {
        let (lines, watches, is_gone) = (OnceLock::new(), Watches::new(), Arc::default());
        Arc::new(Self { fd, lines, watches, is_gone, is_watched: AtomicBool::new(false) })
    }

    /// Sets the wait queues that a hang-up wakes, once.
    pub(crate) fn concerns(&self, lines: &[&Arc<WaitQueue>]) {
        let _ = self.lines.set(lines.iter().map(|line| Arc::downgrade(line)).collect());
    }

    /// Returns `true` if the other end is gone, as of now: a system call unless it is known.
    pub(crate) fn has_happened(&self) -> bool {
        let gone = self.is_gone.load(Acquire) || socket::is_hung_up(self.fd.as_fd());
        if gone {
            self.is_gone.store(true, Release);
        }
        gone
    }

    /// The same for a caller that will be woken when it happens, and then asks again: no system call.
    pub(crate) fn is_known(&self) -> bool {
        if self.is_watched.load(Acquire) { self.is_gone.load(Acquire) } else { self.has_happened() }
    }

    fn listen(&self, runtime: Id) -> io::Result<()> {
        self.watches.listen(runtime, || {
            let (fd, lines, is_gone) =
                (self.fd.clone(), self.lines.get().cloned().unwrap_or_default(), self.is_gone.clone());
            let nudge = move || {
                if socket::is_hung_up(fd.as_fd()) {
                    is_gone.store(true, Release);
                }
                lines.iter().filter_map(Weak::upgrade).for_each(|line| line.rung(true));
            };
            (self.fd.clone(), nudge)
        })?;
        self.is_watched.store(true, Release);
        Ok(())
    }
}

/// A place in the local queue. Dropping it leaves the queue without success.
pub(crate) struct Turn {
    line: Arc<WaitQueue>,
    id: u64,
    has_left: bool,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.has_left && !fork::is_forked() {
            self.leave(false, || false);
        }
    }
}

impl Turn {
    /// Returns `true` if it is this one's turn to try; if not, `waker` is called when it is.
    pub(super) fn is_front(&self, waker: &Waker) -> bool {
        let mut local = lock(&self.line.local);
        if local.queue.front().is_some_and(|front| front.id == self.id) {
            return true;
        }
        let old = self.replace_waker(&mut local, waker);
        drop(local);
        drop(old);
        false
    }

    /// Returns the waker that was there, to be dropped without the lock.
    #[must_use]
    fn replace_waker(&self, local: &mut Local, waker: &Waker) -> Option<Waker> {
        let at = local.queue.binary_search_by_key(&self.id, |waiting| waiting.id).ok()?;
        let old = &mut local.queue[at].waker;
        if old.as_ref().is_some_and(|old| old.will_wake(waker)) { None } else { old.replace(waker.clone()) }
    }

    /// Prepares the front for sleep; it must try once more afterwards. `is_local`: a task of this process will wake it.
    /// `listen` makes sure that a runtime or parker of this process answers its doorbell.
    pub(super) fn prepare_sleep(
        &self,
        waker: &Waker,
        is_local: bool,
        listen: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let line = &self.line;
        let me = line.family.me()?;
        // Also with a place already taken: it may have been taken on another runtime, which need not run any more. And also without
        // a place, as the doorbell is rung for all when the memory turns out to be damaged.
        listen()?;
        let mut local = lock(&line.local);
        let old = self.replace_waker(&mut local, waker);
        local.granted = false;
        if is_local {
            line.answer_doorbell(&mut local);
        } else {
            line.take_place(&mut local, me);
        }
        drop(local);
        drop(old);
        // Between the count of waiters and the next attempt: the other side changes its word and then reads the count.
        fence(SeqCst);
        Ok(())
    }

    /// Leaves with success: the notice that led to it is used up. The next task tries now, or later if `is_local`.
    pub(super) fn succeed(mut self, is_local: impl FnOnce() -> bool) {
        self.leave(true, is_local);
        self.has_left = true;
    }

    fn leave(&self, succeeded: bool, is_local: impl FnOnce() -> bool) {
        let line = &self.line;
        // Goes after the lock, whose guard comes later.
        let _gone;
        let mut local = lock(&line.local);
        let Ok(at) = local.queue.binary_search_by_key(&self.id, |waiting| waiting.id) else { return };
        _gone = local.queue.remove(at);
        // A higher count, seen for longer, costs a look into the queue.
        line.waiting.store(local.queue.len(), Release);
        if at != 0 {
            return;
        }
        local.ticket = None;
        if let Some(next) = local.queue.front_mut() {
            let waker = if is_local() { None } else { next.waker.take() };
            drop(local);
            waker.into_iter().for_each(Waker::wake);
            return;
        }
        let granted = std::mem::take(&mut local.granted);
        // A notice that comes while we succeed may be for another change than the one we used.
        let noticed = local.place.take().is_some_and(|place| line.sleepers().leave(place));
        drop(local);
        if noticed || granted && !succeeded {
            line.notify_one();
        }
    }
}
