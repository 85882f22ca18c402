//! Directories to start in: the [working directory](https://man7.org/linux/man-pages/man2/chdir.2.html) of this process, and
//! others by their path.

use super::{refuse, spawn};
use rustix::fs::{Mode, OFlags, Stat};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Device and inode.
pub(crate) type Identity = (u64, u64);

const FLAGS: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Which directory this process is in, also where it may not search it.
pub(crate) fn identity() -> io::Result<Identity> {
    let stat = match stat(".") {
        Err(Errno::ACCESS) => stat("/proc/self/cwd")?,
        stat => stat?,
    };
    Ok((stat.st_dev, stat.st_ino))
}

fn stat(path: &str) -> rustix::io::Result<Stat> {
    refuse::at("stat")?;
    rustix::fs::stat(path)
}

/// The working directory, which may have been removed; `None` if this process may not search it and so could not enter it
/// again.
pub(crate) fn open_current() -> io::Result<Option<OwnedFd>> {
    refuse::at("open")?;
    match rustix::fs::open(".", FLAGS, Mode::empty()) {
        Ok(directory) => Ok(Some(spawn::above_standard(directory)?)),
        Err(Errno::ACCESS) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The directory at `path`.
pub(crate) fn open(path: &Path) -> io::Result<OwnedFd> {
    refuse::at("open")?;
    Ok(rustix::fs::open(path, FLAGS, Mode::empty())?)
}

/// Makes `directory` the working directory of this process.
pub(crate) fn enter(directory: impl AsFd) -> io::Result<()> {
    refuse::at("fchdir")?;
    Ok(rustix::process::fchdir(directory)?)
}
