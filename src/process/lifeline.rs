//! The lifeline of this process: a pipe that the kernel closes when the process ends, which kills its children.
//!
//! A process that becomes another user may not be allowed to open the pipe again, and makes another one. The former pipe stays as
//! long as somebody is tied to it, and a few stay for a process that becomes the same user again.
#![forbid(unsafe_code)]

use crate::os::sync::lock;
use crate::os::{fork, pipe, signal, socket};
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;

/// Pipes that can be opened again, if this user made them.
const KEPT: usize = 4;

struct Lifeline {
    /// `None`: nobody is tied to it any more from now on.
    read: Option<PipeReader>,
    /// In a process forked from this one the other end would keep the children alive after the end of this one.
    _private: fork::Private,
    write: PipeWriter,
}

impl Lifeline {
    fn make() -> io::Result<Self> {
        let (read, write) = pipe::pair()?;
        Ok(Self { read: Some(read), _private: fork::Private::mark(write.as_fd()), write })
    }

    /// Whether somebody is, or can be, tied to it.
    fn is_needed(&self) -> bool {
        self.read.is_some() || !socket::has_no_reader(self.write.as_fd())
    }
}

/// Opens the read end of the lifeline once more. It hangs up when this process ends, and not before.
pub(super) fn reopened() -> io::Result<OwnedFd> {
    static LIFELINES: Mutex<Vec<Lifeline>> = Mutex::new(Vec::new());
    let mut lifelines = lock(&LIFELINES);
    lifelines.retain(Lifeline::is_needed);
    for read in lifelines.iter().rev().filter_map(|lifeline| lifeline.read.as_ref()) {
        match signal::reopen(read.as_fd()) {
            // This thread or process was another user when it made that pipe.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            reopened => return reopened,
        }
    }
    let lifeline = Lifeline::make()?;
    let reopened =
        lifeline.read.as_ref().map_or(Err(io::ErrorKind::NotFound.into()), |read| signal::reopen(read.as_fd()));
    lifelines.push(lifeline);
    let newest = lifelines.iter_mut().rev().filter(|lifeline| lifeline.read.is_some());
    newest.skip(KEPT).for_each(|lifeline| lifeline.read = None);
    reopened
}
