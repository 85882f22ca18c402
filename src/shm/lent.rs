//! Mapped memory by reference, for one holder at a time in this process.
//!
//! Shared bytes are otherwise reached by atomics and copies only. The owner of a [`Lent`] has them as Rust's own memory: this
//! process makes no other access to that mapping meanwhile (a second mapping of the same memory is other memory, as far
//! as the language is concerned, that another thread changes), and other processes are kept away by the lock that the caller holds.

use crate::os::mmap::Map;
use bytemuck::Pod;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};

/// A mapping that is used by reference only.
pub(crate) struct Lendable {
    map: Map,
    is_lent: AtomicBool,
}

impl Lendable {
    pub(crate) fn new(map: Map) -> Arc<Self> {
        Arc::new(Self { map, is_lent: AtomicBool::new(false) })
    }

    /// The memory, unless it is lent in this process.
    pub(crate) fn lend(self: &Arc<Self>) -> Option<Lent> {
        (!self.is_lent.swap(true, Acquire)).then(|| Lent(self.clone()))
    }
}

/// The only way to the memory of a [`Lendable`].
pub(crate) struct Lent(Arc<Lendable>);

impl Lent {
    fn check<T>(&self, len: usize) {
        let fits = len.checked_mul(size_of::<T>()).is_some_and(|bytes| bytes <= self.0.map.len());
        assert!(fits && align_of::<T>() as u64 <= crate::shm::region::PAGE);
    }

    /// The first `len` elements.
    ///
    /// # Panics
    /// If there are not so many: a bug of this crate.
    #[inline]
    pub(crate) fn slice<T: Pod>(&self, len: usize) -> &[T] {
        self.check::<T>(len);
        // SAFETY: the map is page-aligned and long enough, as just checked; any bytes are a `T`; nobody in this process
        // has a mutable reference, for that borrows this one holder. Other processes keep off, by the caller's lock.
        unsafe { std::slice::from_raw_parts(self.0.map.start().as_ptr().cast(), len) }
    }

    /// The first `len` elements.
    ///
    /// # Panics
    /// If there are not so many: a bug of this crate.
    #[inline]
    pub(crate) fn slice_mut<T: Pod>(&mut self, len: usize) -> &mut [T] {
        self.check::<T>(len);
        // SAFETY: as above, and this one holder is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.0.map.start().as_ptr().cast(), len) }
    }

    /// Faults all pages in, where the kernel can.
    pub(crate) fn populate(&self) {
        self.0.map.populate();
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.0.is_lent.store(false, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::memfd;
    use std::os::fd::AsFd;

    #[test]
    fn memory_is_lent_to_one_at_a_time() {
        let fd = memfd::create("multiprocess-test", 4096, false).unwrap();
        let memory = Lendable::new(Map::shared(fd.as_fd(), 0, 4096).unwrap());
        let mut lent = memory.lend().unwrap();
        assert!(memory.lend().is_none());
        lent.slice_mut::<u32>(1024)[1023] = 7;
        drop(lent);
        assert_eq!(memory.lend().unwrap().slice::<u32>(1024)[1022..], [0, 7]);
    }

    #[test]
    fn next_borrower_sees_the_written_values() {
        let fd = memfd::create("multiprocess-test", 4096, false).unwrap();
        let memory = Lendable::new(Map::shared(fd.as_fd(), 0, 4096).unwrap());
        let add = || {
            for _ in 0..1000 {
                let mut lent = std::iter::repeat_with(|| memory.lend()).find_map(|lent| lent).unwrap();
                lent.slice_mut::<u64>(1)[0] += 1;
            }
        };
        std::thread::scope(|scope| {
            let threads = [scope.spawn(add), scope.spawn(add)];
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
        assert_eq!(memory.lend().unwrap().slice::<u64>(1), [2000]);
    }
}
