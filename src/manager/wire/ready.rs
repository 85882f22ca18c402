//! Which clients have sent something: a bitmap in shared memory, so that a manager finds those few among many.
//!
//! # State
//! The event on which the manager sleeps, then a bit for each of [`CLIENTS`] connections; beside it, an eventfd that wakes
//! the manager and nobody else. The manager makes both, and gives each client their descriptors and the number of its bit by
//! the first message of the pipe of answers.
//!
//! # Moves
//! | from -> to | who | ordering | wakes |
//! |---|---|---|---|
//! | bit 0 -> 1 | a client that has put a request into its pipe, or whose pipe is damaged | SeqCst, then it looks for a sleeper | the manager, if it sleeps |
//! | bit 0 -> 1 | the manager itself, about a client that has hung up or has read its answers | SeqCst | - |
//! | bits -> 0 | the manager, which then looks into the pipes | SeqCst | - |
//!
//! # Invariants
//! 1. A request is put before its bit is set, and a bit is cleared before its pipe is looked into: so a request whose bit
//!    was cleared is found, and one whose bit was set later is found by the next pass.
//! 2. The manager announces its sleep and then makes one more pass; a client sets its bit and then looks for a sleeper. One of
//!    them sees the other.
//! 3. A client without its bit looks for it after it has put a request. The manager hands the bit out and then looks into
//!    the pipe, with a fence between on both sides: one of them sees the other. The thread that finds the bit sets it once, for
//!    requests that other threads have put while it looked.
//! 4. A bit is a claim: one that is set for no reason costs a look into an empty pipe. One that damage has cleared delays its
//!    client's request until the next.
//!
//! # Death
//! | killed | what happens |
//! |---|---|
//! | a client between the request and its bit, or between the bit and the wake | its hang-up sets the bit: what it had sent is done |
//! | the manager | every client's pipe hangs up |
//!
//! A stopped client delays its own request only.
//!
//! # Cancel
//! Nothing here waits.

use crate::os::eventfd;
use crate::shm::atomic::AtomicU64;
use crate::shm::region::Region;
use crate::wait::{WaitQueue, sleepers};
use crate::wire::Attachment;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

/// Connections at the same time, which are as many as a family has members that can wait.
pub(crate) const CLIENTS: u32 = 4096;

const BITS: usize = sleepers::LEN;
const LEN: usize = (BITS + CLIENTS as usize / 64) * 8;

pub(crate) struct ReadyMap {
    region: Arc<Region>,
    bell: Arc<OwnedFd>,
    /// Where the manager sleeps.
    pub(crate) line: Arc<WaitQueue>,
}

impl ReadyMap {
    pub(crate) fn create() -> io::Result<Self> {
        Self::of(Region::create("multiprocess-ready", LEN, LEN as u64)?, eventfd::create()?)
    }

    /// The one that another process has made.
    pub(crate) fn open(memory: OwnedFd, bell: OwnedFd) -> io::Result<Self> {
        Self::of(Region::open(memory, LEN)?, bell)
    }

    fn of(region: Region, bell: OwnedFd) -> io::Result<Self> {
        let (region, bell) = (Arc::new(region), Arc::new(bell));
        let line = WaitQueue::new(region.clone(), 0, None)?;
        line.set_own_doorbell(bell.clone());
        Ok(Self { region, bell, line })
    }

    /// What [`open`](Self::open) takes.
    pub(crate) fn fds(&self) -> [Attachment; 2] {
        [self.region.fd(), &self.bell].map(|fd| Attachment::Shared(fd.clone()))
    }

    fn words(&self) -> &[AtomicU64] {
        &self.region.words()[BITS..]
    }

    /// Sets a bit, which is less than [`CLIENTS`].
    #[inline]
    pub(crate) fn set(&self, bit: u32) {
        self.words()[bit as usize / 64].fetch_or(1 << (bit % 64), SeqCst);
    }

    /// Sets a bit and wakes the manager; true if it slept.
    #[inline]
    pub(crate) fn ring(&self, bit: u32) -> bool {
        self.set(bit);
        let is_asleep = self.line.has_sleepers_after_rmw();
        if is_asleep {
            // Not by a notice, which a stopped client would keep from the manager: others would find it taken, and not ring.
            eventfd::ring(self.bell.as_fd());
        }
        is_asleep
    }

    /// Clears the bits below `end`, and calls `each` with those that were set.
    #[inline]
    pub(crate) fn take(&self, end: usize, mut each: impl FnMut(usize)) {
        for (at, word) in self.words()[..end.div_ceil(64)].iter().enumerate() {
            if word.load(SeqCst) != 0 {
                let mut bits = word.swap(0, SeqCst);
                while bits != 0 {
                    each(64 * at + bits.trailing_zeros() as usize);
                    bits &= bits - 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_that_was_set_is_taken_once_and_by_who_looks_that_far() {
        let map = ReadyMap::create().unwrap();
        let taken = |end| {
            let mut bits = Vec::new();
            map.take(end, |bit| bits.push(bit));
            bits
        };
        [0, 5, 63, 64, CLIENTS - 1, 5].into_iter().for_each(|bit| map.set(bit));
        assert_eq!(taken(1), [0, 5, 63]);
        assert_eq!(taken(CLIENTS as usize), [64, CLIENTS as usize - 1]);
        assert!(taken(CLIENTS as usize).is_empty());
    }
}
