//! The lifeline of this process: a pipe that the kernel closes when the process ends, which kills its children.
//!
//! A process that becomes another user may not be allowed to open the pipe again, and makes another one.
#![forbid(unsafe_code)]

use crate::os::sync::lock;
use crate::os::{fork, refuse, signal};
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;

/// Opens the read end of the lifeline once more. It hangs up when this process ends, and not before.
pub(super) fn reopened() -> io::Result<OwnedFd> {
    static LIFELINES: Mutex<Vec<(PipeReader, PipeWriter)>> = Mutex::new(Vec::new());
    let mut lifelines = lock(&LIFELINES);
    for (read, _) in lifelines.iter().rev() {
        match signal::reopen(read.as_fd()) {
            // This thread or process was another user when it made that pipe.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            reopened => return reopened,
        }
    }
    refuse::at("pipe")?;
    let (read, write) = io::pipe()?;
    let reopened = signal::reopen(read.as_fd());
    // In a process forked from this one it would keep the children alive after the end of this one. It is never closed here.
    std::mem::forget(fork::Private::mark(write.as_fd()));
    lifelines.push((read, write));
    reopened
}
