//! [memfd_create(2)](https://man7.org/linux/man-pages/man2/memfd_create.2.html): memory that travels as a descriptor and has no name to leak.

use super::call::named;
use super::refuse;
use super::sync::lock;
use crate::error::{Explained, Topic};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// `len` bytes of zeros, reserved now, so that touching them later cannot raise SIGBUS.
/// Nobody can shrink it; only a growable one can grow.
pub(crate) fn create(name: &str, len: u64, growable: bool) -> io::Result<OwnedFd> {
    create_with(name, &[], len, growable)
}

/// [`create`] with these first bytes. Memory that is written completely need not be reserved: a failed write is an
/// error, too.
pub(crate) fn create_with(name: &str, first: &[u8], len: u64, growable: bool) -> io::Result<OwnedFd> {
    check_room(len)?;
    check_file_size(len)?;
    refuse::at("memfd_create")?;
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(named("memfd_create"))?;
    if len > first.len() as u64 {
        reserve(rustix::fd::AsFd::as_fd(&fd), 0, len)?;
    }
    let write = || {
        refuse::at("pwrite")?;
        rustix::io::pwrite(&fd, first, 0)
    };
    if !first.is_empty() && rustix::io::retry_on_intr(write)? < first.len() {
        return Err(shortage(Errno::NOSPC, len));
    }
    let seals = if growable { SealFlags::SHRINK } else { SealFlags::SHRINK | SealFlags::GROW };
    refuse::at("fcntl")?;
    rustix::fs::fcntl_add_seals(&fd, seals | SealFlags::SEAL)?;
    Ok(fd)
}

/// Backs `offset..offset + len` with memory, growing the file where needed.
pub(crate) fn reserve(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    check_file_size(offset.saturating_add(len))?;
    let reserved = rustix::io::retry_on_intr(|| {
        refuse::at("fallocate")?;
        rustix::fs::fallocate(fd, FallocateFlags::empty(), offset, len)
    });
    reserved.map_err(|error| named("fallocate")(shortage(error, len)))
}

/// An error of a call that takes shared memory. That is a file to the kernel, which speaks of space where memory is short.
pub(super) fn shortage(error: Errno, len: u64) -> io::Error {
    if error != Errno::NOSPC {
        return error.into();
    }
    let why = format!(
        "there is no room for {len} more bytes of shared memory (ENOSPC): memory is short, or the file system that it lies \
         in is full (/dev/shm, for memory with a name)"
    );
    Explained::error(io::ErrorKind::OutOfMemory, Topic::NoSharedMemory, why)
}

/// Refuses a size beyond RLIMIT_FSIZE, for which the kernel would end this process by SIGXFSZ.
pub(crate) fn check_file_size(end: u64) -> io::Result<()> {
    match rustix::process::getrlimit(rustix::process::Resource::Fsize).current {
        Some(limit) if end > limit => {
            let why = format!(
                "shared memory counts as a file, and this process is limited to files of {limit} bytes, where {end} are \
                 needed: raise RLIMIT_FSIZE (`ulimit -f`, LimitFSIZE= of systemd)"
            );
            Err(Explained::error(io::ErrorKind::FileTooLarge, Topic::FileSize, why))
        }
        _ => Ok(()),
    }
}

/// From this size on, the available memory is checked before reserving.
const LARGE: u64 = 4 << 20;

/// Refuses a size that the machine or the control group does not have: the kernel would reclaim page by page, and kill
/// processes, before it failed.
pub(crate) fn check_room(len: u64) -> io::Result<()> {
    if len > i64::MAX as u64 || len >= LARGE && !has_room(len) {
        return Err(Errno::NOMEM.into());
    }
    Ok(())
}

/// When the kernel was last asked, and how much there was, less what was taken since.
static ROOM: Mutex<Option<(Instant, u64)>> = Mutex::new(None);
/// For so long its answer is used.
const FRESH: Duration = Duration::from_millis(100);

/// Returns `true` if there are `len` bytes, which are then taken for taken.
fn has_room(len: u64) -> bool {
    let mut room = lock(&ROOM);
    let known = room.filter(|(asked, left)| asked.elapsed() < FRESH && *left >= len);
    let Some((asked, left)) = known.or_else(|| Some((Instant::now(), available()?))) else { return true };
    *room = Some((asked, left.saturating_sub(len)));
    left >= len
}

/// Returns the bytes of memory that are available, if the kernel reports them.
fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |name: &str| -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().nth(1)?.parse().ok())
    };
    let machine: u64 = kib("MemAvailable")? + kib("SwapFree").unwrap_or(0_u64);
    Some(groups().filter_map(|group| room_of(&group)).fold(machine << 10, u64::min))
}

/// This process's control group (of version 2) and those it is in.
fn groups() -> impl Iterator<Item = std::path::PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = text.lines().find_map(|line| Some(line.strip_prefix("0::/")?.to_owned())).unwrap_or_default();
    let root = std::path::Path::new("/sys/fs/cgroup");
    let all: Vec<_> =
        root.join(own).ancestors().take_while(|at| at.starts_with(root)).map(|at| at.to_owned()).collect();
    all.into_iter()
}

fn room_of(group: &std::path::Path) -> Option<u64> {
    let number = |file| std::fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
    let limit = number("memory.max")?;
    let stat = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cached = |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    let cache = cached("inactive_file ").unwrap_or(0) + cached("active_file ").unwrap_or(0);
    Some(limit.saturating_sub(number("memory.current")?.saturating_sub(cache)))
}

/// Gives the memory of `offset..offset + len` back; it reads as zeros afterwards.
pub(crate) fn give_back(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::io::retry_on_intr(|| {
        refuse::at("fallocate")?;
        rustix::fs::fallocate(fd, flags, offset, len)
    })?)
}

/// The size in bytes of a memfd that cannot shrink, or `None` if it is something else.
pub(crate) fn sealed_len(fd: BorrowedFd<'_>) -> Option<u64> {
    refuse::at("fcntl").ok()?;
    let seals = rustix::fs::fcntl_get_seals(fd).ok()?;
    refuse::at("fstat").ok()?;
    let len = rustix::fs::fstat(fd).ok()?.st_size;
    seals.contains(SealFlags::SHRINK).then_some(len as u64)
}

/// Which file this descriptor is: equal for all descriptors of one memfd.
pub(crate) fn identity(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    refuse::at("fstat")?;
    let stat = rustix::fs::fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn want_of_space_for_shared_memory_is_want_of_memory() {
        let error = shortage(Errno::NOSPC, 4096);
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
        assert!(error.to_string().contains("4096 more bytes of shared memory"), "{error}");
        assert_eq!(shortage(Errno::INTR, 1).raw_os_error(), Some(Errno::INTR.raw_os_error()));
    }

    #[test]
    fn more_than_there_is_is_refused_before_any_of_it_is_taken() {
        let all = available().unwrap();
        assert!(all > LARGE && check_room(2 * all + (1 << 30)).is_err() && check_room(u64::MAX).is_err());
        check_room(1 << 20).unwrap();
    }
}
