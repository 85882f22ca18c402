//! A versioned double buffer: bytes that are read and replaced as a whole, for a [`super::Value`] larger than one word.
//!
//! # State
//! `VERSION`: the number of replacements; its lowest bit selects the current buffer. `LOCK`: the writer that is replacing
//! it, in a [`RobustLock`]. Two buffers of atomic words, of which the last may have unused bytes.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | lock 0 or dead M -> me | a writer | Acquire CAS | - |
//! | words of the other buffer | the holder of the lock | fence(Release), Relaxed | - |
//! | VERSION v -> v + 1 | the holder of the lock | Release | - |
//! | lock me -> 0 | its holder | Release | - |
//! | lock M -> 0 | a writer that has found the same M there for five seconds: stopped, or damage | AcqRel | - |
//!
//! # Invariants
//! 1. Only the holder of the lock writes, and only to the other buffer: that of version v is untouched until v + 1 is out.
//! 2. A reader copies the words and then checks that the version is the one it began with. If so, nothing was written to
//!    the words it copied. (A seqlock, after Boehm's "Can seqlocks get along with programming language memory models?", with
//!    two buffers, so that a stopped or killed writer delays no reader.)
//! 3. The two fences: a reader that copies a word of a later write sees the version with which that write began.
//! 4. A writer whose lock was taken away, because it was stopped in its copy for so long, may leave a value of two parts when
//!    it continues. The alternative was that one damaged word blocks all others for ever.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | holding the lock, before VERSION | the old value | the next writer takes the lock and writes over it |
//! | after VERSION | the new value | the next writer takes the lock |
//!
//! # Cancel
//! No await point: a writer that finds the lock held gets `false`.

use crate::os::fault;
use crate::shm::atomic::{AtomicU64, fence};
use crate::shm::family::Member;
use crate::shm::robust_lock::{Liveness, RobustLock};
use std::sync::atomic::Ordering::*;

const LOCK: usize = 0;
const VERSION: usize = 1;
/// Words beside the buffers.
pub(super) const CONTROL: usize = 2;

/// The words, wherever they are.
#[derive(Clone, Copy)]
pub(super) struct DoubleBuffer<'a> {
    pub(super) control: &'a [AtomicU64],
    /// Both, one after the other.
    pub(super) buffers: &'a [AtomicU64],
}

/// Words in both buffers of a register of `len` bytes.
pub(super) const fn buffer_words(len: usize) -> usize {
    2 * len.div_ceil(8)
}

impl<'a> DoubleBuffer<'a> {
    fn buffer(self, version: u64) -> &'a [AtomicU64] {
        let (even, odd) = self.buffers.split_at(self.buffers.len() / 2);
        if version.is_multiple_of(2) { even } else { odd }
    }

    /// Copies the current bytes to `to`.
    #[inline]
    pub(super) fn read(self, to: &mut [u8]) {
        let mut version = self.control[VERSION].load(Acquire);
        loop {
            for (chunk, word) in to.chunks_mut(8).zip(self.buffer(version)) {
                chunk.copy_from_slice(&word.load(Relaxed).to_ne_bytes()[..chunk.len()]);
            }
            fence(Acquire);
            let now = self.control[VERSION].load(Acquire);
            if now == version {
                return;
            }
            version = now;
        }
    }

    /// The writer that holds the lock.
    pub(super) fn holder(self) -> u64 {
        self.control[LOCK].load(Relaxed)
    }

    /// Takes the lock away from a writer that has held it for longer than any write takes.
    #[cold]
    pub(super) fn take_from(self, holder: u64) {
        let _ = self.control[LOCK].compare_exchange(holder, 0, AcqRel, Relaxed);
    }

    /// Replaces the bytes by `from`; false if another writer holds the lock.
    #[inline]
    pub(super) fn try_write(self, from: &[u8], me: Member, lives: &impl Liveness) -> bool {
        let lock = RobustLock(&self.control[LOCK]);
        if lock.try_take(me, lives).is_none() {
            return false;
        }
        fault::point("set.taken");
        let version = self.control[VERSION].load(Acquire);
        fence(Release);
        for (chunk, word) in from.chunks(8).zip(self.buffer(version.wrapping_add(1))) {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            word.store(u64::from_ne_bytes(bytes), Relaxed);
        }
        fault::point("set.written");
        self.control[VERSION].store(version.wrapping_add(1), Release);
        fault::point("set.published");
        // No writer asks for a wake: a writer that finds it held tries again.
        let _ = lock.release();
        true
    }
}

#[cfg(all(test, multiprocess_loom))]
mod models {
    use super::*;
    use crate::shm::region::{Members, explore, play};
    use loom::thread;
    use std::sync::Arc;

    struct Memory {
        control: Vec<AtomicU64>,
        buffers: Vec<AtomicU64>,
    }

    impl Memory {
        fn new() -> Arc<Self> {
            let zeros = |len| (0..len).map(|_| AtomicU64::new(0)).collect();
            Arc::new(Self { control: zeros(CONTROL), buffers: zeros(4) })
        }

        fn buffer_pair(&self) -> DoubleBuffer<'_> {
            DoubleBuffer { control: &self.control, buffers: &self.buffers }
        }

        fn write(&self, number: u64) -> bool {
            let word = number.to_ne_bytes();
            self.buffer_pair().try_write(&[word, word].concat(), Members.me().unwrap(), &Members)
        }

        /// The current bytes, which must be those of one write.
        fn read(&self) -> u64 {
            let mut bytes = [0; 16];
            self.buffer_pair().read(&mut bytes);
            assert_eq!(bytes[..8], bytes[8..], "torn");
            u64::from_ne_bytes(bytes[..8].try_into().unwrap())
        }
    }

    #[test]
    fn models_double_buffer_is_never_torn_and_never_goes_back() {
        explore("double buffer, two writers and a reader", 2, || {
            let memory = Memory::new();
            let writer = |slot, number| {
                let memory = memory.clone();
                thread::spawn(move || play(slot, None, || memory.write(number)).unwrap())
            };
            let (one, two) = (writer(1, 1), writer(2, 2));
            let (first, second) = play(3, None, || (memory.read(), memory.read())).unwrap();
            let written = (one.join().unwrap(), two.join().unwrap());
            let last = play(3, None, || memory.read()).unwrap();
            assert!(first == 0 || second != 0, "a write that was seen is seen from then on");
            assert!(written != (false, false) && last != 0, "one of two has the lock");
            assert!(written.0 || last == 2);
            assert!(written.1 || last == 1);
        });
        explore("double buffer, one writes three times", 2, || {
            let memory = Memory::new();
            let writer = {
                let memory = memory.clone();
                thread::spawn(move || play(1, None, || (1..=3).for_each(|n| assert!(memory.write(n)))).unwrap())
            };
            let (first, second) = play(3, None, || (memory.read(), memory.read())).unwrap();
            assert!(first <= second);
            writer.join().unwrap();
            assert_eq!(play(3, None, || memory.read()).unwrap(), 3);
        });
    }

    #[test]
    fn models_death_while_writing_leaves_the_old_value_or_the_new() {
        for (at, after) in [("set.taken", 5), ("set.written", 5), ("set.published", 7)] {
            explore(at, 2, move || {
                let memory = Memory::new();
                assert!(play(2, None, || memory.write(5)).unwrap());
                let victim = {
                    let memory = memory.clone();
                    thread::spawn(move || play(1, Some(at), || memory.write(7)))
                };
                let (seen, mine) = play(2, None, || (memory.read(), memory.write(9))).unwrap();
                assert!(seen == 5 || seen == after);
                assert!(victim.join().unwrap().is_none_or(|written| !written));
                let last = play(3, None, || memory.read()).unwrap();
                assert!(last == after || mine && last == 9, "{last}");
                assert!(play(3, None, || memory.write(11)).unwrap(), "the next writer takes the lock over");
                assert_eq!(play(3, None, || memory.read()).unwrap(), 11);
            });
        }
    }
}
