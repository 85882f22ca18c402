//! Which clients have sent something: a bitmap in shared memory, so that a manager finds those few among many.
//!
//! # State
//! A bit for each of [`CLIENTS`] connections; a word that is 1 while the manager sleeps, which clients map read-only; and an
//! eventfd that wakes the manager and nobody else. The manager makes them, and gives each client their descriptors and the
//! number of its bit by the first message of the pipe of answers.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | bit 0 -> 1 | a client that has put a request into its pipe, or whose pipe is damaged | SeqCst, then it reads the word | the manager, if the word is 1 |
//! | bit 0 -> 1 | the manager itself, about a client that has hung up or has read its answers | SeqCst | - |
//! | bits -> 0 | the manager, which then polls the pipes | SeqCst | - |
//! | word 0 -> 1 | the manager, which then makes one more pass over the bits before it sleeps | SeqCst | - |
//! | word 1 -> 0 | the manager, awake | SeqCst | - |
//!
//! # Invariants
//! 1. A request is put before its bit is set, and a bit is cleared before its pipe is polled: so a request whose bit
//!    was cleared is found, and one whose bit was set later is found by the next pass.
//! 2. The manager announces its sleep and then makes one more pass; a client sets its bit and then reads the word. One of
//!    them sees the other.
//! 3. A client without its bit reads for it after it has put a request. The manager hands the bit out and then looks into
//!    the pipe, with a fence between on both sides: one of them sees the other. The thread that finds the bit sets it once, for
//!    requests that other threads have put meanwhile.
//! 4. A bit is a claim: one that is set for no reason costs one poll of an empty pipe. Damage that clears a bit delays the
//!    requests of one client until its next. No client can damage the word, so none keeps the manager asleep for the others.
//!
//! # Death
//! | killed | what happens |
//! |---|---|
//! | a client between the request and its bit, or between the bit and the wake | its hang-up sets the bit: what it had sent is done |
//! | the manager | every client's pipe hangs up |
//!
//! A client that is stopped between bit and wake delays its own request only: the others find the word as it is, and wake.
//!
//! # Cancel
//! Nothing here waits.

use super::messages::{Reader, Writer, malformed};
use crate::error::{Error, Result};
use crate::os::{eventfd, fault};
use crate::shm::region::{ReadOnly, Region};
use crate::wire::{Attachment, EncodedMessage};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

/// Connections at the same time.
pub(crate) const CLIENTS: u32 = 1 << 14;

const LEN: usize = CLIENTS as usize / 8;
const ASLEEP_LEN: usize = 8;

/// The manager's end.
pub(crate) struct ReadyMap {
    bits: Region,
    asleep: Region,
    pub(crate) doorbell: Arc<OwnedFd>,
}

impl ReadyMap {
    pub(crate) fn create() -> io::Result<Self> {
        let bits = Region::create("multiprocess-ready", LEN, LEN as u64)?;
        let asleep = Region::create("multiprocess-asleep", ASLEEP_LEN, ASLEEP_LEN as u64)?;
        Ok(Self { bits, asleep, doorbell: Arc::new(eventfd::create()?) })
    }

    /// The manager's first message to a client, which then has this bit, for [`Ready::open`].
    pub(crate) fn greeting(&self, bit: u32) -> EncodedMessage {
        let mut greeting = Writer::default();
        greeting.number(0).number(bit.into());
        for fd in [self.bits.fd(), self.asleep.fd(), &self.doorbell] {
            greeting.attach(Attachment::Shared(fd.clone()));
        }
        greeting.into_encoded()
    }

    /// Sets a bit, which is less than [`CLIENTS`].
    #[inline]
    pub(crate) fn set(&self, bit: u32) {
        set(&self.bits, bit);
    }

    /// Announces that the manager sleeps unless it finds something in one more pass, or that it is awake.
    pub(crate) fn set_asleep(&self, is_asleep: bool) {
        self.asleep.words()[0].store(is_asleep.into(), SeqCst);
    }

    /// Clears the bits below `end`, and calls `each` with those that were set.
    #[inline]
    pub(crate) fn take(&self, end: usize, mut each: impl FnMut(usize)) {
        for (at, word) in self.bits.words()[..end.div_ceil(64)].iter().enumerate() {
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

#[inline]
fn set(bits: &Region, bit: u32) {
    bits.words()[bit as usize / 64].fetch_or(1 << (bit % 64), SeqCst);
}

/// A client's end.
pub(crate) struct Ready {
    bits: Region,
    asleep: ReadOnly,
    doorbell: OwnedFd,
    bit: u32,
}

impl Ready {
    /// Of the map that the manager has made.
    pub(crate) fn open(greeting: EncodedMessage) -> Result<Self> {
        let mut reader = Reader::new(greeting, None)?;
        let (_, bit, bits, asleep) = (reader.number()?, reader.number()?, reader.fd()?, reader.fd()?);
        let bit = u32::try_from(bit).ok().filter(|bit| *bit < CLIENTS).ok_or_else(malformed)?;
        let failed = |error| Error::io("cannot map a manager's memory", error);
        let bits = Region::open(bits, LEN).map_err(failed)?;
        Ok(Self { bits, asleep: ReadOnly::open(asleep, ASLEEP_LEN).map_err(failed)?, doorbell: reader.fd()?, bit })
    }

    /// Sets the client's bit and wakes the manager; true if it slept.
    #[inline]
    pub(crate) fn ring(&self) -> bool {
        fault::point("manager.put");
        set(&self.bits, self.bit);
        fault::point("manager.marked");
        let is_asleep = self.asleep.load(0) != 0;
        if is_asleep {
            eventfd::notify(self.doorbell.as_fd());
        }
        is_asleep
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_bit_is_taken_once_by_a_pass_that_covers_it() {
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
