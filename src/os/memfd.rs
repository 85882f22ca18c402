//! [memfd_create(2)](https://man7.org/linux/man-pages/man2/memfd_create.2.html): memory that travels as a descriptor and has no name to leak.

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

/// `len` bytes of zeros, reserved now, so that touching them later cannot raise SIGBUS.
/// Nobody can shrink it; only a growable one can grow.
pub(crate) fn create(name: &str, len: u64, growable: bool) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    reserve(rustix::fd::AsFd::as_fd(&fd), 0, len)?;
    let seals = if growable { SealFlags::SHRINK } else { SealFlags::SHRINK | SealFlags::GROW };
    rustix::fs::fcntl_add_seals(&fd, seals | SealFlags::SEAL)?;
    Ok(fd)
}

/// Backs `offset..offset + len` with memory, growing the file where needed.
pub(crate) fn reserve(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    Ok(rustix::io::retry_on_intr(|| rustix::fs::fallocate(fd, FallocateFlags::empty(), offset, len))?)
}

/// Gives the memory of `offset..offset + len` back; it reads as zeros afterwards.
pub(crate) fn give_back(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::io::retry_on_intr(|| rustix::fs::fallocate(fd, flags, offset, len))?)
}

/// The size in bytes of a memfd that cannot shrink, or `None` if it is something else.
pub(crate) fn sealed_len(fd: BorrowedFd<'_>) -> Option<u64> {
    let seals = rustix::fs::fcntl_get_seals(fd).ok()?;
    let len = rustix::fs::fstat(fd).ok()?.st_size;
    seals.contains(SealFlags::SHRINK).then_some(len as u64)
}

/// Which file this descriptor is: equal for all descriptors of one memfd.
pub(crate) fn identity(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}
