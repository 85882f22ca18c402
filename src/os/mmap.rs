//! [mmap(2)](https://man7.org/linux/man-pages/man2/mmap.2.html) of shared memory.

use super::refuse;
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

/// A shared view of part of a file, unmapped on drop.
pub(crate) struct Map {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a `Map` is an address range; what may be done with the bytes in it is the business of
// `shm::view`, which hands out only atomics and copies.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    /// `offset` and `len` are multiples of the page size, and the file is at least that long.
    pub(crate) fn shared(fd: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        Self::with(ProtFlags::READ | ProtFlags::WRITE, fd, offset, len)
    }

    /// The first `len` bytes, which this process cannot write to by this view.
    pub(crate) fn read_only(fd: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        Self::with(ProtFlags::READ, fd, 0, len)
    }

    fn with(access: ProtFlags, fd: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        refuse::at("mmap")?;
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of ours.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, fd, offset)? };
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap returned the null page"))?;
        Ok(Self { start, len })
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Faults all pages in for writing, where the kernel can (5.14); else they are when they are touched.
    pub(crate) fn populate(&self) {
        self.populate_first(self.len);
    }

    /// The same for the first `bytes`.
    pub(crate) fn populate_first(&self, bytes: usize) {
        self.populate_part(0, bytes);
    }

    /// The same for `len` bytes from `at` on, and what else is in their pages.
    pub(crate) fn populate_part(&self, at: usize, len: usize) {
        let end = at.saturating_add(len).min(self.len);
        let at = at.min(end) / rustix::param::page_size() * rustix::param::page_size();
        // SAFETY: the range is in our own mapping; populating changes no byte of it.
        let populate = |()| unsafe {
            let start = self.start.as_ptr().add(at).cast();
            rustix::mm::madvise(start, end - at, rustix::mm::Advice::LinuxPopulateWrite)
        };
        let _ = refuse::at("madvise").and_then(populate);
    }

    /// Lets go of the whole pages among `len` bytes from `at` on. They stay in the file, and are no memory of this process
    /// until it touches them again.
    pub(crate) fn forget_part(&self, at: usize, len: usize) {
        let page = rustix::param::page_size();
        let end = at.saturating_add(len).min(self.len) / page * page;
        let at = at.next_multiple_of(page);
        if at < end {
            // SAFETY: the range is in our own mapping, which is shared: no byte of it changes.
            let forget = |()| unsafe {
                let start = self.start.as_ptr().add(at).cast();
                rustix::mm::madvise(start, end - at, rustix::mm::Advice::LinuxDontNeed)
            };
            let _ = refuse::at("madvise").and_then(forget);
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range is the one that `shared` mapped, and nothing outlives its `Map`.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
