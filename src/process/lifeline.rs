//! The lifeline of this process: a pipe that the kernel closes when the process ends, which kills its children.
#![forbid(unsafe_code)]

use crate::os::sync::lock;
use crate::os::{fork, refuse, signal};
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;

/// A description of its own of the read end of a pipe that closes when this process ends, and not before.
pub(super) fn reopened() -> io::Result<OwnedFd> {
    static LIFELINES: Mutex<Vec<(PipeReader, PipeWriter)>> = Mutex::new(Vec::new());
    let mut lifelines = lock(&LIFELINES);
    for (read, _) in lifelines.iter().rev() {
        match signal::reopen(read.as_fd()) {
            // This thread, or the process, was another user when it made that pipe.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            reopened => return reopened,
        }
    }
    refuse::at("pipe")?;
    let (read, write) = io::pipe()?;
    let reopened = signal::reopen(read.as_fd());
    // Held by a process that is forked from this one it would keep the children after our end. It is never closed here.
    std::mem::forget(fork::Private::mark(write.as_fd()));
    lifelines.push((read, write));
    reopened
}
