//! The family: a root process and all its descendants, and a table of those that have waited or locked.
//!
//! # State
//! A table of [`SLOTS`] slots in one sealed memfd, and eventfds: at most [`DOORBELLS`], and one that notifies the fork server of
//! each slot that is taken. Every member has them from its birth. The first word of a slot is `epoch << 32 | pid`; pid 0 is a
//! free slot. A member takes a slot when it first waits or locks; most children never do. `rung_for` is the set of wait queues
//! that its doorbell was rung for. `IDENTITY` is `epoch:24 | inode:40` of the member's pidfd, once it has published it.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | free(e) -> (e+1, pid) | the member | AcqRel CAS | the fork server |
//! | (e, pid) -> free(e) | a process that sees its death, also after a regular exit | AcqRel CAS | every doorbell |
//!
//! # Invariants
//! 1. A [`Member`] (slot, epoch) is alive only while the slot's word has that epoch and a pid.
//! 2. A process that frees the slot of a dead member rings all doorbells afterwards, so that all its waiters try again. This is
//!    the recovery of what the member held.
//! 3. No member frees its slot while it runs: its threads may hold robust locks until the kernel stops them.
//! 4. A slot is named by 12 bits, so no number leads out of the table. Damage can make the living look dead and the dead alive. A
//!    member that finds its own words changed corrects them before it sleeps.
//! 5. A pid that another process has by now is not alive: `IDENTITY` differs, if the kernel provides one.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | before it published its identity | a later process of its pid counts as it | the end of that process |
//! | before it notified the fork server of its slot | an unwatched slot | the next notification, or a waiter that checks the owner |
//! | with a slot | its slot | the fork server, within one wake-up of its pidfd; earlier a waiter that checks ([`Family::is_alive`]) |
//! | after freeing a slot, before the doorbells | sleepers not woken | its own recovery, or the successor of a fork server |
//!
//! Every move is one compare-exchange.
//!
//! # Cancel
//! No await point.

use crate::error::{Explained, Topic};
use crate::os::{eventfd, fault, fork, memfd, mmap::Map, pidfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*, fence};

/// Members that can wait or hold locks at the same time.
pub(crate) const SLOTS: usize = 4096;
/// Doorbells; slots beyond share by modulo, and a shared doorbell only means a spurious wake. At a low limit of descriptors
/// there are fewer, and more of them are shared: each process of the family has them all.
pub(crate) const DOORBELLS: usize = 64;
/// The part of its descriptors that a process may have as doorbells, and as many it has in any case.
const SHARE_OF_DOORBELLS: u64 = 32;
const LEAST_DOORBELLS: u64 = 4;

/// Words of one slot.
const WORDS: usize = 4;
const HINTS: usize = 1;
const IDENTITY: usize = 2;
const INODE_BITS: u32 = 40;
const LEN: usize = SLOTS * WORDS * 8;

/// A process of the family, never confused with a later one in the same slot. Never 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Member {
    pub(crate) slot: u16,
    pub(crate) epoch: u32,
}

impl Member {
    /// 48 bits, never 0.
    pub(crate) fn to_bits(self) -> u64 {
        u64::from(self.epoch) << 16 | u64::from(self.slot)
    }

    pub(crate) fn from_bits(bits: u64) -> Self {
        Self { slot: bits as u16, epoch: (bits >> 16) as u32 }
    }
}

/// The table and the doorbells.
pub(crate) struct Family {
    memory: OwnedFd,
    map: Map,
    doorbells: Vec<OwnedFd>,
    new_slots: OwnedFd,
}

static FAMILY: OnceLock<Family> = OnceLock::new();
static SELF: AtomicU64 = AtomicU64::new(0);
/// The pid in this process's slot. Set before `SELF`.
static OWN_PID: AtomicU32 = AtomicU32::new(0);

impl Family {
    /// Returns the family of this process; the root creates it at its first need.
    pub(crate) fn get() -> io::Result<&'static Family> {
        fork::check()?;
        if let Some(family) = FAMILY.get() {
            return Ok(family);
        }
        let created = Self::create()?;
        Ok(FAMILY.get_or_init(|| created))
    }

    fn create() -> io::Result<Self> {
        let memory = memfd::create("multiprocess-family", LEN as u64, false)?;
        let doorbells = (0..doorbells_at(descriptor_limit())).map(|_| eventfd::create()).collect::<io::Result<_>>()?;
        Self::of(memory, doorbells, eventfd::create()?)
    }

    fn of(memory: OwnedFd, doorbells: Vec<OwnedFd>, new_slots: OwnedFd) -> io::Result<Self> {
        let map = Map::shared(memory.as_fd(), 0, LEN)?;
        fork::watch(&SELF);
        Ok(Self { memory, map, doorbells, new_slots })
    }

    /// Joins the family whose [`Family::descriptors`] these are: once, at birth, before any other call.
    pub(crate) fn join(mut descriptors: Vec<OwnedFd>) -> io::Result<()> {
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, "not the descriptors of a family");
        if descriptors.len() < 3 || descriptors.len() > 2 + DOORBELLS {
            return Err(invalid());
        }
        let doorbells = descriptors.split_off(2);
        let new_slots = descriptors.pop().ok_or_else(invalid)?;
        let memory = descriptors.pop().ok_or_else(invalid)?;
        if memfd::sealed_len(memory.as_fd()).is_none_or(|len| len < LEN as u64) {
            return Err(invalid());
        }
        FAMILY.set(Self::of(memory, doorbells, new_slots)?).map_err(|_| invalid())
    }

    /// The descriptors that a new member which does not inherit by fork must be given.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [&self.memory, &self.new_slots].into_iter().chain(&self.doorbells).map(AsFd::as_fd)
    }

    fn word(&self, slot: u16, index: usize) -> &AtomicU64 {
        let at = (slot as usize % SLOTS) * WORDS + index;
        // SAFETY: the map is LEN bytes long, page-aligned and lives as long as `self`; these words are only
        // ever accessed as atomics, by every process.
        unsafe { &*self.map.start().as_ptr().cast::<AtomicU64>().add(at) }
    }

    fn state(&self, slot: u16) -> &AtomicU64 {
        self.word(slot, 0)
    }

    /// Returns the set of wait queues that the doorbell of `slot` was rung for.
    pub(crate) fn rung_for(&self, slot: u16) -> &AtomicU64 {
        self.word(slot, HINTS)
    }

    /// Returns `true` if the process with this identity may be the member that has `slot` in `epoch`.
    fn may_be(&self, slot: u16, epoch: u32, identity: u64) -> bool {
        let said = self.word(slot, IDENTITY).load(Acquire);
        let expected = to_identity(epoch, identity);
        identity == 0 || said >> INODE_BITS != expected >> INODE_BITS || said == expected
    }

    /// Returns `true` if the member that has `slot` in `epoch` has ended, by the kernel.
    fn is_gone(&self, slot: u16, epoch: u32, pid: u32) -> bool {
        match pidfd::open(pid) {
            Ok(pidfd) => pidfd::has_exited(pidfd.as_fd()) || !self.may_be(slot, epoch, pidfd::identity(pidfd.as_fd())),
            Err(error) => error.raw_os_error() == Some(libc::ESRCH),
        }
    }

    pub(crate) fn doorbell(&self, slot: u16) -> BorrowedFd<'_> {
        self.doorbells[slot as usize % DOORBELLS % self.doorbells.len()].as_fd()
    }

    /// The member that this process is; takes a slot the first time.
    #[inline]
    pub(crate) fn me(&self) -> io::Result<Member> {
        match SELF.load(Acquire) {
            0 => self.take_slot(),
            bits => Ok(Member::from_bits(bits)),
        }
    }

    #[cold]
    fn take_slot(&self) -> io::Result<Member> {
        fork::check_pid()?;
        let pid = std::process::id();
        OWN_PID.store(pid, Release);
        for slot in 0..SLOTS as u16 {
            let word = self.state(slot);
            let seen = word.load(Acquire);
            if seen as u32 != 0 {
                continue;
            }
            let epoch = ((seen >> 32) as u32).wrapping_add(1).max(1);
            if word.compare_exchange(seen, u64::from(epoch) << 32 | u64::from(pid), AcqRel, Relaxed).is_err() {
                continue;
            }
            let member = Member { slot, epoch };
            return match SELF.compare_exchange(0, member.to_bits(), AcqRel, Acquire) {
                Ok(_) => {
                    fault::point("claim.entered");
                    // If no descriptor is left, a later process of this pid cannot be distinguished from this one.
                    let identity = pidfd::open(pid).map_or(0, |pidfd| pidfd::identity(pidfd.as_fd()));
                    if identity != 0 {
                        self.word(slot, IDENTITY).store(to_identity(epoch, identity), Release);
                    }
                    fault::point("claim.named");
                    eventfd::notify(self.new_slots.as_fd());
                    Ok(member)
                }
                Err(other) => {
                    self.release(member, pid);
                    Ok(Member::from_bits(other))
                }
            };
        }
        let why = format!("more than {SLOTS} processes of one program wait at the same time");
        Err(Explained::error(io::ErrorKind::Other, Topic::TooManyProcesses, why))
    }

    /// Repairs the words of this process's own slot, if something else wrote there.
    #[inline]
    pub(crate) fn repair_own_slot(&self) {
        let Some(me) = self.me_if_listed() else { return };
        let mine = u64::from(me.epoch) << 32 | u64::from(OWN_PID.load(Relaxed));
        let seen = self.state(me.slot).load(Relaxed);
        if seen != mine {
            self.rewrite_own_slot(me, seen, mine);
        }
    }

    #[cold]
    fn rewrite_own_slot(&self, me: Member, seen: u64, mine: u64) {
        let is_anothers = seen as u32 != 0 && {
            let member = Member { slot: me.slot, epoch: (seen >> 32) as u32 };
            self.is_alive(member)
        };
        if !is_anothers && self.state(me.slot).compare_exchange(seen, mine, AcqRel, Relaxed).is_ok() {
            let identity = pidfd::open(std::process::id()).map_or(0, |pidfd| pidfd::identity(pidfd.as_fd()));
            self.word(me.slot, IDENTITY).store(to_identity(me.epoch, identity), Release);
            eventfd::notify(self.new_slots.as_fd());
        }
    }

    /// Returns the eventfd that notifies the fork server of each slot that is taken.
    pub(crate) fn new_slots(&self) -> BorrowedFd<'_> {
        self.new_slots.as_fd()
    }

    fn release(&self, member: Member, pid: u32) -> bool {
        let taken = u64::from(member.epoch) << 32 | u64::from(pid);
        let free = u64::from(member.epoch) << 32;
        self.state(member.slot).compare_exchange(taken, free, AcqRel, Relaxed).is_ok()
    }

    /// Forgets the slot of the parent, in a process that was just forked.
    pub(crate) fn forget_me() {
        SELF.store(0, Release);
    }

    /// The member that this process is, if it has taken a slot.
    #[inline]
    pub(crate) fn me_if_listed(&self) -> Option<Member> {
        match SELF.load(Acquire) {
            0 => None,
            bits => Some(Member::from_bits(bits)),
        }
    }

    /// The epoch of the member that has `slot`, if there is one.
    pub(crate) fn epoch_of(&self, slot: u16) -> Option<u32> {
        let word = self.state(slot).load(Acquire);
        (word as u32 != 0).then_some((word >> 32) as u32)
    }

    /// The pid and epoch of the member that has `slot`, if there is one.
    pub(crate) fn pid_of(&self, slot: u16) -> Option<(u32, u32)> {
        let word = self.state(slot).load(Acquire);
        (word as u32 != 0).then_some((word as u32, (word >> 32) as u32))
    }

    /// Rings these doorbells for the events that `hint` stands for.
    pub(crate) fn ring_doorbells(&self, doorbells: u64, hint: u64) {
        if fork::is_forked() {
            return;
        }
        for doorbell in (0..DOORBELLS as u16).filter(|doorbell| doorbells & 1 << doorbell != 0) {
            let slots =
                (doorbell..SLOTS as u16).step_by(DOORBELLS).take_while(|slot| self.state(*slot).load(Acquire) != 0);
            for slot in slots {
                self.rung_for(slot).fetch_or(hint, AcqRel);
            }
            eventfd::notify(self.doorbell(doorbell));
        }
    }

    /// Returns `true` if `member` still runs, as far as the table knows.
    pub(crate) fn is_listed(&self, member: Member) -> bool {
        let word = self.state(member.slot).load(Acquire);
        (word >> 32) as u32 == member.epoch && word as u32 != 0
    }

    /// Returns `true` if `member` still runs, by asking the kernel; recovers it if not.
    #[cold]
    pub(crate) fn is_alive(&self, member: Member) -> bool {
        let word = self.state(member.slot).load(Acquire);
        if (word >> 32) as u32 != member.epoch || word as u32 == 0 {
            return false;
        }
        let gone = self.is_gone(member.slot, member.epoch, word as u32);
        if gone && self.release(member, word as u32) {
            self.wake_all();
        }
        !gone
    }

    /// Slot, epoch and pid of all members. Slots are taken from the bottom, so none above an unused one was ever taken.
    fn members(&self) -> impl Iterator<Item = (Member, u32)> {
        let words = (0..SLOTS as u16).map(|slot| (slot, self.state(slot).load(Acquire)));
        let used = words.take_while(|(_, word)| *word != 0).filter(|(_, word)| *word as u32 != 0);
        used.map(|(slot, word)| (Member { slot, epoch: (word >> 32) as u32 }, word as u32))
    }

    /// Frees the slots of a process that has ended, and makes all members try again.
    pub(crate) fn recover(&self, pid: u32, pidfd: BorrowedFd<'_>) {
        self.recover_those(|member, of| of == pid && self.may_be(member.slot, member.epoch, pidfd::identity(pidfd)));
    }

    /// Recovers the slots of a pid that no process has any more, or that another process has.
    pub(crate) fn recover_if_gone(&self, pid: u32) {
        self.recover_those(|member, of| of == pid && self.is_gone(member.slot, member.epoch, pid));
    }

    /// Recovers the slots of earlier processes with the pid of this process.
    pub(crate) fn recover_predecessors(&self, pid: u32, pidfd: BorrowedFd<'_>) {
        self.recover_those(|member, of| of == pid && !self.may_be(member.slot, member.epoch, pidfd::identity(pidfd)));
    }

    fn recover_those(&self, has_ended: impl Fn(Member, u32) -> bool) {
        let ended = self.members().filter(|(member, pid)| has_ended(*member, *pid));
        if ended.filter(|(member, pid)| self.release(*member, *pid)).count() > 0 {
            self.wake_all();
        }
    }

    /// The pids of all members that hold a slot.
    pub(crate) fn pids(&self) -> Vec<u32> {
        self.members().map(|(_, pid)| pid).collect()
    }

    /// Rings `slot`'s doorbell for the events that `hint` stands for.
    pub(crate) fn wake(&self, slot: u16, hint: u64) {
        if fork::is_forked() {
            return;
        }
        self.rung_for(slot).fetch_or(hint, AcqRel);
        eventfd::notify(self.doorbell(slot));
    }

    /// Makes every member try again everything it waits for.
    pub(crate) fn wake_all(&self) {
        if fork::is_forked() {
            return;
        }
        // A process that saw a member still listed had published its change before: the members woken here see that change.
        fence(SeqCst);
        let mut used = 0;
        for slot in (0..SLOTS as u16).take_while(|slot| self.state(*slot).load(Acquire) != 0) {
            self.rung_for(slot).fetch_or(u64::MAX, AcqRel);
            used += 1;
        }
        self.doorbells[..used.min(self.doorbells.len())].iter().for_each(|doorbell| eventfd::notify(doorbell.as_fd()));
    }
}

/// Returns how many doorbells a family has whose founder may have so many descriptors.
fn doorbells_at(limit: Option<u64>) -> usize {
    limit.map_or(DOORBELLS, |limit| (limit / SHARE_OF_DOORBELLS).clamp(LEAST_DOORBELLS, DOORBELLS as u64) as usize)
}

fn descriptor_limit() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current
}

fn to_identity(epoch: u32, inode: u64) -> u64 {
    u64::from(epoch) << INODE_BITS | inode & ((1 << INODE_BITS) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn member_is_listed_until_it_is_released_and_never_confused_with_its_successor() {
        let family = Family::create().unwrap();
        let put = |epoch: u64, pid: u64| family.state(0).store(epoch << 32 | pid, Release);
        put(1, u64::from(std::process::id()));
        let first = Member { slot: 0, epoch: 1 };
        assert!(family.is_listed(first) && family.is_alive(first));
        family.recover(std::process::id(), pidfd::open(std::process::id()).unwrap().as_fd());
        assert!(!family.is_listed(first) && !family.is_alive(first));
        put(2, u64::from(std::process::id()));
        assert!(!family.is_listed(first) && family.is_listed(Member { slot: 0, epoch: 2 }));
        assert_eq!(family.rung_for(0).load(Acquire), u64::MAX);
    }

    #[test]
    fn dead_pid_is_found_by_asking_the_kernel() {
        let family = Family::create().unwrap();
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let member = Member { slot: 0, epoch: 7 };
        family.state(0).store(7 << 32 | u64::from(child.id()), Release);
        child.wait().unwrap();
        assert!(family.is_listed(member));
        assert!(!family.is_alive(member));
        assert!(!family.is_listed(member));
    }

    #[test]
    fn pid_of_another_process_by_now_is_a_dead_member() {
        let family = Family::create().unwrap();
        let me = std::process::id();
        let identity = pidfd::identity(pidfd::open(me).unwrap().as_fd());
        let other = pidfd::identity(
            pidfd::open(rustix::process::getppid().unwrap().as_raw_nonzero().get() as u32).unwrap().as_fd(),
        );
        if identity == other {
            return; // This kernel does not distinguish them.
        }
        let put = |epoch: u32, inode| {
            family.state(0).store(u64::from(epoch) << 32 | u64::from(me), Release);
            family.word(0, IDENTITY).store(to_identity(epoch, inode), Release);
            Member { slot: 0, epoch }
        };
        let member = put(1, identity);
        family.recover_if_gone(me);
        assert!(family.is_alive(member));
        let member = put(2, other);
        assert!(!family.is_alive(member) && !family.is_listed(member));
        let member = put(3, other);
        family.recover(me, pidfd::open(me).unwrap().as_fd());
        assert!(family.is_listed(member), "it was not this one that ended");
        family.recover_predecessors(me, pidfd::open(me).unwrap().as_fd());
        assert!(!family.is_listed(member));
        // The state of the slot's last member does not apply to the next one.
        put(4, other);
        family.state(0).store(5 << 32 | u64::from(me), Release);
        assert!(family.is_alive(Member { slot: 0, epoch: 5 }));
    }
}
