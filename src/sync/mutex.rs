//! A mutex with hand-off: one holder at a time, also when processes die. Locks, conditions, values and arrays use it.
//!
//! # State
//! [`LEN`] words at any place in the region of an object:
//! - `STATE`: 0 if free, otherwise the [`Member`] that holds it (48 bits). The top bit, `IS_HANDOFF`, reserves the next
//!   release for the hand-off waiter.
//! - `WOKEN`: the time at which a sleeper was last notified; 0 once that sleeper has tried.
//! - `HANDOFF`, `HANDOFF_SINCE`: the member that is to have the mutex next, and when that was last confirmed.
//! - `SINCE`: when it was taken, to a tick of the kernel's clock.
//! - The [`sleepers`]: the list of sleeping processes.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | STATE 0 -> me | any acquirer, also ahead of sleepers | Acquire CAS | - |
//! | STATE dead M -> me | an acquirer that finds M dead | Acquire CAS | - |
//! | STATE me -> 0, IS_HANDOFF kept | the holder | SeqCst subtraction, then reads the sleepers' marks | see below |
//! | WOKEN 0 -> now | a releaser that will notify | SeqCst CAS | the longest sleeper; none if a wake is fresh |
//! | WOKEN -> 0 | an acquirer in the queue | AcqRel swap | - |
//! | word HANDOFF 0 or dead -> me, then STATE with IS_HANDOFF | an acquirer that has waited [`FAIRNESS_NS`] and finds it held | AcqRel CAS | - |
//! | HANDOFF_SINCE -> now | a releaser that finds IS_HANDOFF | Relaxed | the hand-off waiter |
//! | STATE IS_HANDOFF -> me, then word HANDOFF -> 0 | the hand-off waiter; any acquirer if that one is dead or late | Acquire CAS | - |
//! | STATE without IS_HANDOFF, then word HANDOFF -> 0 | a hand-off waiter that gives up | AcqRel | the longest sleeper, if it was free |
//! | impossible STATE -> DAMAGED, for good | the process that finds it | AcqRel | all |
//!
//! # Invariants
//! 1. Only the holder, or an acquirer that has found it dead, changes the member in STATE.
//! 2. A sleeper enters the list, clears WOKEN, tries, then sleeps. A releaser frees STATE, sets WOKEN, then notifies. So if
//!    WOKEN keeps a releaser from notifying, some sleeper has yet to try and will see its release.
//! 3. Only the member in the word HANDOFF sets IS_HANDOFF. If the bit is lost to a race, that member sets it again.
//! 4. An acquirer that overtakes a late hand-off waiter, or a late woken one, harms no other: it was only first. Late means
//!    stopped, or on a busy runtime.
//! 5. While this process holds the mutex and no process sleeps in the list, the front of its local queue sleeps without an entry there.
//!    A release reads the length of that queue after its change of STATE, and wakes such a front. The front counts itself, then
//!    reads STATE.
//! 6. STATE with bits that no member has, or released by a process that does not hold it, is damage. The mutex is then closed
//!    for good: all waiters and newcomers get an error. Times in the future are treated as old.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | holding | STATE of an unlisted member | the next acquirer takes it and gets `OwnerDied`; recovery makes all sleepers try |
//! | between release and notification, or between WOKEN and the notification | sleepers beside a free mutex | recovery: all try, which clears WOKEN |
//! | woken, before it tried | WOKEN set | likewise |
//! | as hand-off waiter, at any move | the word HANDOFF of an unlisted member | recovery: all try, and acquirers pass over it |
//!
//! A process stopped by SIGSTOP keeps what it holds. If it was the one notified, newcomers can take the free mutex. Sleepers
//! behind it are notified by the next release that is `LATE_NS` later, or when it continues or is killed.
//!
//! # Cancel
//! A dropped waiter leaves the queue, which passes a notification on. A hand-off waiter first gives up its reservation, as
//! if it had released.

use super::acquire::{Acquire, Held};
use super::object::Report;
use crate::error::{Damage, ErrorKind};
use crate::os::{clock, fault, fork};
use crate::shm::atomic::AtomicU64;
use crate::shm::family::{Family, Member};
use crate::shm::region::Region;
use crate::wait::sleepers;
use crate::wait::{Attempt, WaitQueue, at_once, until_blocking_in_turn, until_in_turn};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::time::Instant;

const STATE: usize = 0;
const WOKEN: usize = 1;
const HANDOFF: usize = 2;
const HANDOFF_SINCE: usize = 3;
const SINCE: usize = 4;
/// On a cache line of its own: the holder reads it, waiters write it.
pub(super) const EVENT: usize = 8;

/// Words that a mutex takes up; zeros are a free one.
pub(super) const LEN: usize = EVENT + sleepers::LEN;

const IS_HANDOFF: u64 = 1 << 63;
const MEMBER: u64 = (1 << 48) - 1;
/// Bits of STATE that no move sets; all of them close it for good.
const DAMAGED: u64 = !IS_HANDOFF & !MEMBER;

/// A waiter may become the hand-off waiter after this time, and at most one does in such a time: each hand-off costs a wake.
pub(super) const FAIRNESS_NS: u64 = 1_000_000;
/// A hand-off waiter, or a woken sleeper, that has not tried for so long is not waited for any more.
const LATE_NS: u64 = 5_000_000;
/// Pauses after a refusal, beside those of spinning. Each attempt takes the words from the holder's cache, and a lock that changes its process costs several
/// times what one does that stays.
const PAUSES: u32 = 16;

/// How a mutex was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Taken {
    Free,
    /// The last holder died, or ended without releasing; the data may be half changed.
    OwnerDied,
}

/// The waiters that a release has to wake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ToWake {
    Nobody,
    Longest,
    Handoff(Member),
    /// It is damaged.
    All,
}

/// The outcome of an attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Tried {
    Taken(Taken),
    Refused { is_handoff: bool },
    Damaged,
}

/// The words, wherever they are.
#[derive(Clone, Copy)]
pub(super) struct Words<'a>(pub(super) &'a [AtomicU64]);

impl Words<'_> {
    #[inline]
    pub(super) fn take_free(self, me: Member) -> bool {
        let taken = self.0[STATE].compare_exchange(0, me.to_bits(), Acquire, Relaxed).is_ok();
        if taken {
            fault::point("lock.taken");
        }
        taken
    }

    /// A full attempt. `waited`: the time since the first attempt, if it is made from the queue.
    #[cold]
    pub(super) fn take(
        self,
        me: Member,
        waited: Option<u64>,
        is_listed: impl Fn(Member) -> bool,
        now: impl Fn() -> u64,
    ) -> Tried {
        if waited.is_some() {
            self.clear_woken();
        }
        loop {
            let seen = self.0[STATE].load(Acquire);
            if seen & DAMAGED != 0 {
                return Tried::Damaged;
            }
            let holder = Member::from_bits(seen & MEMBER);
            let is_free = seen & MEMBER == 0;
            if !is_free && is_listed(holder) {
                let patient = waited.is_some_and(|waited| waited >= FAIRNESS_NS);
                match patient && self.become_handoff(me, &is_listed, &now) {
                    true if !self.mark_handoff(seen) => continue,
                    is_handoff => return Tried::Refused { is_handoff },
                }
            }
            let waiter = self.0[HANDOFF].load(Acquire);
            let is_mine = waited.is_some() && waiter == me.to_bits();
            if seen & IS_HANDOFF != 0 && !is_mine && self.is_awaited(waiter, is_free, &is_listed, &now) {
                return Tried::Refused { is_handoff: false };
            }
            if self.0[STATE].compare_exchange(seen, me.to_bits(), AcqRel, Relaxed).is_ok() {
                fault::point("lock.taken");
                if seen & IS_HANDOFF != 0 {
                    let _ = self.0[HANDOFF].compare_exchange(waiter, 0, AcqRel, Relaxed);
                }
                return Tried::Taken(if is_free { Taken::Free } else { Taken::OwnerDied });
            }
        }
    }

    fn is_awaited(
        self,
        waiter: u64,
        is_free: bool,
        is_listed: &impl Fn(Member) -> bool,
        now: &impl Fn() -> u64,
    ) -> bool {
        let is_late = || is_free && now().abs_diff(self.0[HANDOFF_SINCE].load(Relaxed)) > LATE_NS;
        waiter != 0 && is_listed(Member::from_bits(waiter)) && !is_late()
    }

    fn become_handoff(self, me: Member, is_listed: &impl Fn(Member) -> bool, now: &impl Fn() -> u64) -> bool {
        let waiter = self.0[HANDOFF].load(Acquire);
        if waiter == me.to_bits() {
            return true;
        }
        let (now, since) = (now(), self.0[HANDOFF_SINCE].load(Relaxed));
        if waiter != 0 && is_listed(Member::from_bits(waiter)) || now.abs_diff(since) < FAIRNESS_NS {
            return false;
        }
        let named = self.0[HANDOFF].compare_exchange(waiter, me.to_bits(), AcqRel, Relaxed).is_ok();
        if named {
            self.0[HANDOFF_SINCE].store(now, Relaxed);
            fault::point("handoff.named");
        }
        named
    }

    /// False if STATE is no longer `seen`.
    fn mark_handoff(self, seen: u64) -> bool {
        let marked =
            seen & IS_HANDOFF != 0 || self.0[STATE].compare_exchange(seen, seen | IS_HANDOFF, AcqRel, Relaxed).is_ok();
        if marked {
            fault::point("handoff.marked");
        }
        marked
    }

    /// Returns `true` if this member holds it, and no other is to have it next.
    #[inline]
    pub(super) fn is_held_alone_by(self, me: Member) -> bool {
        self.0[STATE].load(SeqCst) == me.to_bits()
    }

    /// Records that the process that was notified last has tried.
    #[inline]
    fn clear_woken(self) {
        if self.0[WOKEN].load(Relaxed) != 0 {
            self.0[WOKEN].swap(0, AcqRel);
        }
    }

    /// Gives up the place of hand-off waiter. True if another waiter is to be woken.
    #[must_use]
    pub(super) fn give_up_handoff(self, me: Member) -> bool {
        if self.0[HANDOFF].load(Acquire) != me.to_bits() {
            return false;
        }
        let before = self.0[STATE].fetch_and(!IS_HANDOFF, SeqCst);
        fault::point("handoff.unmarked");
        let _ = self.0[HANDOFF].compare_exchange(me.to_bits(), 0, AcqRel, Relaxed);
        before == IS_HANDOFF || before & DAMAGED != 0
    }

    /// Releases it; true if [`Words::waiters_to_wake`] has to be called.
    #[must_use]
    #[inline]
    pub(super) fn release(self, me: Member) -> bool {
        // A subtraction, which keeps the flag and is one instruction, unlike an `and` that yields what was there.
        let before = self.0[STATE].fetch_add(me.to_bits().wrapping_neg(), SeqCst);
        fault::point("lock.released");
        before != me.to_bits() && self.is_unusual(me, before)
    }

    /// STATE that was not just this member's has a hand-off waiter, or is damaged.
    #[cold]
    fn is_unusual(self, me: Member, before: u64) -> bool {
        if before & !IS_HANDOFF != me.to_bits() {
            self.close();
        }
        true
    }

    /// Closes it for good: its memory is damaged. True if it was not closed before.
    #[cold]
    pub(super) fn close(self) -> bool {
        self.0[STATE].swap(DAMAGED, SeqCst) != DAMAGED
    }

    /// Returns `true` if it is closed for good, or to be.
    pub(super) fn is_damaged(self) -> bool {
        self.0[STATE].load(Acquire) & DAMAGED != 0
    }

    /// The waiters to wake, after a release.
    #[cold]
    pub(super) fn waiters_to_wake(self, is_listed: impl Fn(Member) -> bool, now: impl Fn() -> u64) -> ToWake {
        let now = now().max(1);
        let state = self.0[STATE].load(Relaxed);
        if state & DAMAGED != 0 {
            return ToWake::All;
        }
        if state & IS_HANDOFF != 0 {
            let waiter = Member::from_bits(self.0[HANDOFF].load(Acquire));
            if waiter.to_bits() != 0 && is_listed(waiter) {
                self.0[HANDOFF_SINCE].store(now, Relaxed);
                return ToWake::Handoff(waiter);
            }
        }
        loop {
            let woken = self.0[WOKEN].load(Relaxed);
            let is_fresh = woken != 0 && now.abs_diff(woken) <= LATE_NS;
            let next = if is_fresh { woken } else { now };
            // Also if it stays as it is: the sleeper that clears it later must see our release.
            if self.0[WOKEN].compare_exchange(woken, next, SeqCst, Relaxed).is_ok() {
                fault::point("lock.woken");
                return if is_fresh { ToWake::Nobody } else { ToWake::Longest };
            }
        }
    }

    fn sleepers(&self) -> sleepers::Sleepers<'_> {
        sleepers::Sleepers::new(&self.0[EVENT..EVENT + sleepers::LEN])
    }

    /// The holder and the waiters: a snapshot.
    pub(super) fn report(self) -> Report {
        Report { holder: self.holder(), waiting: self.sleepers().list(), ..Report::default() }
    }

    fn holder(&self) -> Option<(Member, u64)> {
        let holder = self.0[STATE].load(Acquire) & MEMBER;
        (holder != 0).then(|| (Member::from_bits(holder), self.0[SINCE].load(Relaxed)))
    }
}

/// A primitive that is held by holding its mutex.
pub(super) trait ByMutex {
    /// The name of the primitive in errors.
    const NAME: &'static str;
    type Guard;

    fn mutex(&self) -> &Mutex;
    /// The guard of a mutex that was just taken.
    fn guard(&self, taken: Taken) -> io::Result<Held<Self::Guard>>;
    /// See [`Acquire::guard_again`].
    fn guard_again(&self) -> Option<Self::Guard> {
        None
    }
}

impl<P: ByMutex> Acquire for P {
    type Taken = Taken;
    type Guard = P::Guard;

    #[inline]
    fn try_take(&self) -> io::Result<Option<Taken>> {
        self.mutex().try_take()
    }

    #[inline]
    fn take(&self) -> impl Future<Output = io::Result<Taken>> {
        self.mutex().take()
    }

    #[inline]
    fn take_blocking(&self, deadline: Option<Instant>) -> io::Result<Option<Taken>> {
        self.mutex().take_blocking(deadline)
    }

    #[inline]
    fn guard(&self, taken: Taken) -> io::Result<Held<P::Guard>> {
        ByMutex::guard(self, taken)
    }

    #[inline]
    fn guard_again(&self) -> Option<P::Guard> {
        ByMutex::guard_again(self)
    }

    fn try_at_deadline(&self) -> io::Result<Option<Taken>> {
        self.mutex().try_take()
    }

    #[cold]
    fn message(kind: ErrorKind) -> String {
        let name = P::NAME;
        match kind {
            ErrorKind::OwnerDied => format!(
                "the last holder of the {name} ended without releasing it, and may have left half changed what it \
                 protects: the guard in this error (into_guard) holds the {name} now"
            ),
            ErrorKind::Timeout => format!("the {name} was not released in time"),
            ErrorKind::WouldBlock => format!("the {name} is held by another"),
            _ => format!("cannot take a {name}"),
        }
    }
}

const IMPOSSIBLE: &str = "an impossible holder, or damage found before";

/// A mutex in a mapped object.
pub(super) struct Mutex {
    family: &'static Family,
    region: Arc<Region>,
    first: usize,
    queue: Arc<WaitQueue>,
    /// Whether it was acquired through this view: a hint, so that waiters of this process look at the words of all processes only if those may
    /// say that the holder is here.
    is_held_here: AtomicBool,
    /// The object's name in errors.
    what: &'static str,
}

impl Mutex {
    /// The mutex whose words begin at `first`.
    pub(super) fn view(region: &Arc<Region>, first: usize, what: &'static str) -> io::Result<Self> {
        let queue = WaitQueue::new(region.clone(), first + EVENT, None)?;
        Ok(Self {
            family: Family::get()?,
            region: region.clone(),
            first,
            queue,
            is_held_here: AtomicBool::new(false),
            what,
        })
    }

    /// Closes it for good, for all processes, because the memory of the object is damaged. `why`: the impossible words.
    #[cold]
    pub(super) fn damaged(&self, why: &'static str) -> io::Error {
        if self.words().close() {
            self.queue.notify_all();
            // Also those that sleep in the local queues of other processes.
            self.family.wake_all();
        }
        Damage::error(self.what, self.region.identity(), why)
    }

    /// That error, if it is closed for good.
    pub(super) fn check(&self) -> io::Result<()> {
        if self.words().is_damaged() { Err(self.damaged(IMPOSSIBLE)) } else { Ok(()) }
    }

    #[inline]
    fn words(&self) -> Words<'_> {
        Words(&self.region.words()[self.first..self.first + LEN])
    }

    #[inline]
    fn is_listed(&self) -> impl Fn(Member) -> bool + use<> {
        let family = self.family;
        move |member| family.is_listed(member)
    }

    #[inline]
    fn stamp(&self) {
        self.is_held_here.store(true, Relaxed);
        self.words().0[SINCE].store(clock::coarse_ns(), Relaxed);
    }

    /// Takes it if that needs no waiting.
    #[inline]
    pub(super) fn try_take(&self) -> io::Result<Option<Taken>> {
        let me = self.family.me()?;
        let taken = if self.words().take_free(me) { Some(Taken::Free) } else { self.try_take_slowly(me)? };
        if taken.is_some() {
            self.stamp();
        }
        Ok(taken)
    }

    #[cold]
    fn try_take_slowly(&self, me: Member) -> io::Result<Option<Taken>> {
        match self.words().take(me, None, self.is_listed(), clock::now_ns) {
            Tried::Taken(taken) => Ok(Some(taken)),
            Tried::Refused { .. } => Ok(None),
            Tried::Damaged => Err(self.damaged(IMPOSSIBLE)),
        }
    }

    /// Acquires it when it is free. A dropped future has not acquired it.
    #[inline]
    pub(super) async fn take(&self) -> io::Result<Taken> {
        let me = self.family.me()?;
        let take_free = || (!self.queue.has_waiters() && self.words().take_free(me)).then_some(Taken::Free);
        if let Some(taken) = at_once(take_free).await {
            self.stamp();
            return Ok(taken);
        }
        let acquisition = Acquisition { mutex: self, me, since: None, is_handoff: false };
        until_in_turn(&self.queue, None, acquisition).await.and_then(|taken| taken)
    }

    /// [`Mutex::take`] for a thread without a runtime; `None` at the deadline.
    #[inline]
    pub(super) fn take_blocking(&self, deadline: Option<Instant>) -> io::Result<Option<Taken>> {
        let me = self.family.me()?;
        if !self.queue.has_waiters() && self.words().take_free(me) {
            self.stamp();
            return Ok(Some(Taken::Free));
        }
        self.take_blocking_slowly(me, deadline)
    }

    #[cold]
    fn take_blocking_slowly(&self, me: Member, deadline: Option<Instant>) -> io::Result<Option<Taken>> {
        let acquisition = Acquisition { mutex: self, me, since: None, is_handoff: false };
        until_blocking_in_turn(&self.queue, None, deadline, acquisition)?.transpose()
    }

    /// Returns `true` if any task or thread of this process waits for it.
    pub(super) fn has_waiters(&self) -> bool {
        self.queue.has_waiters()
    }

    /// Returns `true` if a live process holds it, which may have changed by now.
    pub(super) fn is_held(&self) -> bool {
        self.words().holder().is_some_and(|(holder, _)| self.family.is_listed(holder))
    }

    /// Releases it.
    #[inline]
    pub(super) fn release(&self) {
        // A holder has a slot.
        let Some(me) = self.family.me_if_listed() else { return };
        self.is_held_here.store(false, Relaxed);
        let is_awaited = self.words().release(me) | self.queue.has_sleepers_after_rmw();
        let is_awaited_here = self.queue.has_waiters_after_rmw();
        if is_awaited | is_awaited_here {
            self.wake_waiters(is_awaited, is_awaited_here);
        }
    }

    #[cold]
    fn wake_waiters(&self, is_awaited: bool, is_awaited_here: bool) {
        if is_awaited {
            self.wake_next();
        }
        if is_awaited_here {
            self.queue.wake_front();
        }
    }

    #[cold]
    fn wake_next(&self) {
        match self.words().waiters_to_wake(self.is_listed(), clock::now_ns) {
            ToWake::Nobody => {}
            ToWake::Longest => self.queue.notify_one(),
            ToWake::All => self.queue.notify_all(),
            ToWake::Handoff(waiter) => self.queue.notify_member(waiter),
        }
    }
}

/// One wait for a mutex.
struct Acquisition<'a> {
    mutex: &'a Mutex,
    me: Member,
    since: Option<u64>,
    is_handoff: bool,
}

impl Attempt<io::Result<Taken>> for Acquisition<'_> {
    #[inline]
    fn attempt(&mut self, in_queue: bool) -> Option<io::Result<Taken>> {
        let words = self.mutex.words();
        if in_queue {
            words.clear_woken();
        }
        let taken = if words.take_free(self.me) { Some(Ok(Taken::Free)) } else { self.attempt_slowly(in_queue) };
        if let Some(Ok(_)) = taken {
            self.mutex.stamp();
        }
        taken
    }

    #[inline]
    fn is_local(&self) -> bool {
        self.mutex.is_held_here.load(Relaxed)
            && self.mutex.words().is_held_alone_by(self.me)
            && !self.mutex.queue.has_sleepers_after_rmw()
    }
}

impl Acquisition<'_> {
    #[cold]
    fn attempt_slowly(&mut self, in_queue: bool) -> Option<io::Result<Taken>> {
        let now = clock::now_ns();
        let waited = now - *self.since.get_or_insert(now);
        let words = self.mutex.words();
        match words.take(self.me, in_queue.then_some(waited), self.mutex.is_listed(), || now) {
            Tried::Taken(taken) => Some(Ok(taken)),
            Tried::Damaged => Some(Err(self.mutex.damaged(IMPOSSIBLE))),
            Tried::Refused { is_handoff } => {
                self.is_handoff |= is_handoff;
                // A holder of this process may need this thread.
                if !self.is_local() {
                    (0..PAUSES).for_each(|_| std::hint::spin_loop());
                }
                None
            }
        }
    }
}

impl Drop for Acquisition<'_> {
    fn drop(&mut self) {
        if fork::is_forked() {
            return;
        }
        if self.is_handoff && self.mutex.words().give_up_handoff(self.me) {
            self.mutex.queue.notify_one();
        }
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    const A: Member = Member { slot: 1, epoch: 1 };
    const B: Member = Member { slot: 2, epoch: 1 };

    fn words() -> Vec<AtomicU64> {
        (0..LEN).map(|_| AtomicU64::new(0)).collect()
    }

    #[test]
    fn impossible_holder_closes_the_mutex_for_all() {
        for bit in 48..63 {
            let words = words();
            words[STATE].store(A.to_bits() | 1 << bit, Release);
            let mutex = Words(&words);
            assert_eq!(mutex.take(B, Some(0), |_| true, || 1), Tried::Damaged);
            assert!(mutex.close() && !mutex.close() && !mutex.take_free(B));
            assert_eq!(mutex.take(B, None, |_| false, || 1), Tried::Damaged);
        }
    }

    #[test]
    fn release_by_another_than_the_holder_closes_the_mutex_and_wakes_all() {
        let words = words();
        let mutex = Words(&words);
        assert!(mutex.take_free(A));
        words[STATE].store(B.to_bits(), Release);
        assert!(mutex.release(A));
        assert_eq!(mutex.waiters_to_wake(|_| true, || 1), ToWake::All);
        assert_eq!(mutex.take(B, None, |_| true, || 1), Tried::Damaged);
    }

    #[test]
    fn wake_time_in_the_future_keeps_nobody_asleep() {
        let words = words();
        words[WOKEN].store(u64::MAX, Release);
        assert_eq!(Words(&words).waiters_to_wake(|_| true, || 1), ToWake::Longest);
    }
}
