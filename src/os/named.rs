//! Memory with a name: files of the tmpfs that [shm_open(3)](https://man7.org/linux/man-pages/man3/shm_open.3.html)
//! opens, and so every program that knows the name.

use super::{memfd, owner, refuse};
use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

const DIRECTORY: &str = "/dev/shm";

/// The file's owner alone reads and writes it.
const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);
/// The sticky bit, which means nothing to others in a file: its name goes with the process that gave it. That process
/// has the file locked as long as it lives.
const GOES: Mode = PRIVATE.union(Mode::SVTX);

/// Device and inode.
pub(crate) type Identity = (u64, u64);

fn path(name: &str) -> io::Result<String> {
    let refuse = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    match name {
        "" | "." | ".." => refuse("not a name"),
        name if name.contains('\0') => refuse("a name cannot have a NUL in it"),
        name if name.contains('/') => refuse("a name cannot have a slash in it, but for one at its beginning"),
        name => Ok(format!("{DIRECTORY}/{name}")),
    }
}

/// Whether `name` can be one.
pub(crate) fn check(name: &str) -> io::Result<()> {
    path(name).map(drop)
}

/// `len` bytes of zeros, reserved now, that have no name yet. The name goes with this process, if need be by the hand
/// of a later [`sweep`].
pub(crate) fn create(len: u64) -> io::Result<OwnedFd> {
    memfd::check_room(len)?;
    refuse::at("open")?;
    let fd = rustix::fs::open(DIRECTORY, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, PRIVATE)?;
    memfd::reserve(fd.as_fd(), 0, len)?;
    let lock = |()| rustix::fs::flock(&fd, FlockOperation::NonBlockingLockShared);
    if refuse::at("flock").and_then(lock).is_ok() {
        refuse::at("fchmod")?;
        rustix::fs::fchmod(&fd, GOES)?;
    }
    Ok(fd)
}

/// The name stays when this process ends.
pub(crate) fn keep(fd: BorrowedFd<'_>) -> io::Result<()> {
    refuse::at("fchmod")?;
    Ok(rustix::fs::fchmod(fd, PRIVATE)?)
}

/// Removes names of this user's dead processes that their name cleaners did not remove.
pub(crate) fn sweep() {
    let files = std::fs::read_dir(DIRECTORY).into_iter().flatten();
    for name in files.filter_map(|file| file.ok()?.file_name().into_string().ok()) {
        // A file that cannot be opened, or is locked, is left alone.
        let _ = sweep_one(&name);
    }
}

fn sweep_one(name: &str) -> io::Result<()> {
    let goes = |stat: &Stat| {
        let is_ours = stat.st_uid == rustix::process::geteuid().as_raw();
        is_ours && Mode::from_raw_mode(stat.st_mode) == GOES && FileType::from_raw_mode(stat.st_mode).is_file()
    };
    if goes(&lstat(&path(name)?)?) {
        let (fd, _) = open(name, None)?;
        refuse::at("flock")?;
        rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive)?;
        let stat = fstat(fd.as_fd())?;
        if goes(&stat) {
            unlink(name, (stat.st_dev, stat.st_ino))?;
        }
    }
    Ok(())
}

fn lstat(path: &str) -> rustix::io::Result<Stat> {
    refuse::at("stat")?;
    rustix::fs::lstat(path)
}

fn fstat(fd: BorrowedFd<'_>) -> rustix::io::Result<Stat> {
    refuse::at("fstat")?;
    rustix::fs::fstat(fd)
}

/// Gives a file its name; if that is taken, the error names the owner.
pub(crate) fn link(fd: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let own = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let path = path(name)?;
    let linked = refuse::at("linkat").and_then(|()| rustix::fs::linkat(CWD, own, CWD, &path, AtFlags::SYMLINK_FOLLOW));
    match linked {
        // It may be gone again by now.
        Err(Errno::EXIST) => match lstat(&path) {
            Ok(stat) => Err(owner::taken(io::ErrorKind::AlreadyExists, &stat)),
            Err(_) => Err(Errno::EXIST.into()),
        },
        linked => Ok(linked?),
    }
}

/// Opens the file of this name, and returns its length. It must belong to this user or the permitted one; a symbolic link is not
/// followed.
pub(crate) fn open(name: &str, permitted: Option<u32>) -> io::Result<(OwnedFd, u64)> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    refuse::at("open")?;
    let fd = rustix::fs::open(path(name)?, flags, Mode::empty())?;
    owner::check(&fstat(fd.as_fd())?, permitted)?;
    let len = len(fd.as_fd())?;
    Ok((fd, len))
}

/// The length of a block; anything but a plain file is an error.
pub(crate) fn len(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let stat = fstat(fd)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not shared memory"));
    }
    Ok(stat.st_size as u64)
}

/// Takes the name away from the file that `identity` is; one that has come to be called so meanwhile keeps it.
pub(crate) fn unlink(name: &str, identity: Identity) -> io::Result<()> {
    let path = path(name)?;
    // No system call does both: a name that is given to another file in between is removed.
    let stat = lstat(&path)?;
    if (stat.st_dev, stat.st_ino) != identity {
        return Err(io::Error::new(io::ErrorKind::NotFound, "other memory has this name by now"));
    }
    refuse::at("unlink")?;
    Ok(rustix::fs::unlink(path)?)
}

/// Reads at `offset` without mapping: a file that another process has shortened is an error, not SIGBUS.
pub(crate) fn read(fd: BorrowedFd<'_>, mut offset: u64, mut to: &mut [u8]) -> io::Result<()> {
    while !to.is_empty() {
        match rustix::io::retry_on_intr(|| refuse::at("pread").and_then(|()| rustix::io::pread(fd, &mut *to, offset)))?
        {
            0 => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "somebody has made it shorter")),
            n => (to, offset) = (&mut to[n..], offset + n as u64),
        }
    }
    Ok(())
}

/// Writes at `offset` without mapping. A write beyond RLIMIT_FSIZE is an error, not SIGXFSZ.
pub(crate) fn write(fd: BorrowedFd<'_>, mut offset: u64, mut from: &[u8]) -> io::Result<()> {
    memfd::check_file_size(offset.saturating_add(from.len() as u64))?;
    while !from.is_empty() {
        let written =
            rustix::io::retry_on_intr(|| refuse::at("pwrite").and_then(|()| rustix::io::pwrite(fd, from, offset)));
        match written.map_err(|error| memfd::shortage(error, from.len() as u64))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => (from, offset) = (&from[n..], offset + n as u64),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_goes_only_with_the_file_it_was_given_to() {
        // An earlier run in another pid namespace may have had this pid.
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos();
        let name = format!("multiprocess-test-{}-{now:x}", std::process::id());
        let (one, two) = (create(10).unwrap(), create(20).unwrap());
        link(one.as_fd(), &name).unwrap();
        assert_eq!(link(two.as_fd(), &name).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(open(&name, None).unwrap().1, 10);
        let identity = |fd: &OwnedFd| memfd::identity(fd.as_fd()).unwrap();
        assert_eq!(unlink(&name, identity(&two)).unwrap_err().kind(), io::ErrorKind::NotFound);
        unlink(&name, identity(&one)).unwrap();
        assert_eq!(open(&name, None).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn memory_that_was_cut_short_is_an_error() {
        let fd = create(8192).unwrap();
        rustix::fs::ftruncate(&fd, 100).unwrap();
        assert_eq!(read(fd.as_fd(), 90, &mut [0; 20]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        write(fd.as_fd(), 90, &[1; 20]).unwrap();
        let mut back = [0; 20];
        read(fd.as_fd(), 90, &mut back).unwrap();
        assert_eq!(back, [1; 20]);
    }
}
