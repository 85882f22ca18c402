//! Listening [unix(7)](https://man7.org/linux/man-pages/man7/unix.7.html) sockets with a path.

use super::{owner, refuse};
use crate::error::{Explained, Topic};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

/// As many as the kernel allows (net.core.somaxconn).
const BACKLOG: i32 = 4096;

/// A socket file as it was made: another one of the same name is another's. While the socket is open, no other file can have
/// its inode.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Made {
    device: u64,
    inode: u64,
}

/// Listens at `path`, to which only this user can connect. Replaces a stale socket file of this user. A file of another user
/// stays, and is an error that names the user.
pub(crate) fn at_path(path: &Path) -> io::Result<(UnixListener, Made)> {
    match bind(path) {
        Err(Errno::ADDRINUSE) => {}
        other => return Ok(other?),
    }
    // Two listeners that find the same stale file must not remove each other's new one, so the directory is held meanwhile.
    let _directory = lock_parent(path)?;
    let stat = lstat(path)?;
    if owner::check(&stat, None).is_err() || !is_stale(path, &stat)? {
        return Err(owner::taken(io::ErrorKind::AddrInUse, &stat));
    }
    unlink(path)?;
    Ok(bind(path)?)
}

fn lstat(path: &Path) -> rustix::io::Result<Stat> {
    refuse::at("stat")?;
    rustix::fs::lstat(path)
}

fn unlink(path: &Path) -> rustix::io::Result<()> {
    refuse::at("unlink")?;
    rustix::fs::unlink(path)
}

/// The socket file at `path`, which must not be a link, and must belong to this user or to the permitted one.
pub(crate) fn file_at(path: &Path, permitted: Option<u32>) -> io::Result<OwnedFd> {
    refuse::at("open")?;
    let file = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    refuse::at("fstat")?;
    let stat = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
        let why = "it is a symbolic link, which is not followed: anybody may have put it there";
        return Err(Explained::error(io::ErrorKind::PermissionDenied, Topic::NameTaken, why));
    }
    owner::check(&stat, permitted)?;
    Ok(file)
}

/// Removes the socket file, if it still is the one that was made here.
///
/// It holds the directory meanwhile: the file may be stale by now, and between the check and the removal another listener
/// may replace it. If another process holds the directory for longer, the file stays; the next listener there replaces it.
pub(crate) fn remove(path: &Path, made: Made) {
    let held = lock_parent(path);
    // A directory that this user may not open cannot be held by a listener of this user's, either.
    let is_held_elsewhere = held.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse);
    if !is_held_elsewhere && found(path).is_ok_and(|there| there == made) {
        let _ = unlink(path);
    }
}

fn bind(path: &Path) -> rustix::io::Result<(UnixListener, Made)> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket(SocketType::STREAM)?;
    // Before there is a file: on Linux the file takes the mode of its socket, so at no time others can connect.
    refuse::at("fchmod")?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    refuse::at("bind")?;
    rustix::net::bind(&socket, &address)?;
    let listening =
        refuse::at("listen").and_then(|()| rustix::net::listen(&socket, BACKLOG)).and_then(|()| found(path));
    match listening {
        Ok(made) => Ok((socket.into(), made)),
        Err(error) => {
            let _ = unlink(path);
            Err(error)
        }
    }
}

fn socket(kind: SocketType) -> rustix::io::Result<OwnedFd> {
    refuse::at("socket")?;
    rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

fn found(path: &Path) -> rustix::io::Result<Made> {
    let stat = lstat(path)?;
    Ok(Made { device: stat.st_dev, inode: stat.st_ino })
}

/// Whether `path` is a socket file that no socket is bound to.
///
/// It connects with a socket of another type: for a live one the kernel answers that the type is wrong, without notifying it.
fn is_stale(path: &Path, stat: &Stat) -> io::Result<bool> {
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Ok(false);
    }
    let (socket, address) = (socket(SocketType::DGRAM)?, SocketAddrUnix::new(path)?);
    let answer = refuse::at("connect").and_then(|()| rustix::net::connect(socket, &address));
    Ok(answer == Err(Errno::CONNREFUSED))
}

/// Locks the directory of `path` for as long as the result lives. A listener holds it while it replaces or removes a file
/// there, which takes microseconds. After 20 ms the lock must be another program's, and this fails with `AddrInUse`.
fn lock_parent(path: &Path) -> io::Result<OwnedFd> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    refuse::at("open")?;
    let directory = rustix::fs::open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    for _ in 0..20 {
        let lock = |()| rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive);
        match refuse::at("flock").and_then(lock) {
            Err(Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(1)),
            locked => return Ok(locked.map(|()| directory)?),
        }
    }
    Err(Errno::ADDRINUSE.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removal_leaves_the_file_to_a_listener_that_is_replacing_it() {
        let directory = std::env::temp_dir().join(format!("multiprocess-listen-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("socket");
        let (_own, made) = at_path(&path).unwrap();
        // Another listener takes the file for a stale one and holds the directory, as `at_path` does.
        let held = lock_parent(&path).unwrap();
        remove(&path, made);
        assert!(path.exists(), "the other listener is about to remove this very name");
        rustix::fs::unlink(&path).unwrap();
        let (_serving, other) = bind(&path).unwrap();
        drop(held);
        remove(&path, made);
        assert!(path.exists(), "that file is the other listener's");
        remove(&path, other);
        assert!(!path.exists());
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
