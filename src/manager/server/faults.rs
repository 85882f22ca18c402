//! Faults: the one place where the tests of this room have a server fail. In other builds nothing does.

use crate::error::Result;
use std::io;
#[cfg(test)]
use {
    crate::error::{Error, ErrorKind},
    crate::os::sync::lock,
    std::collections::VecDeque,
    std::sync::Mutex,
    std::sync::atomic::{AtomicBool, Ordering::Relaxed},
};

#[derive(Default)]
pub(crate) struct Faults {
    /// Of the next answers.
    #[cfg(test)]
    pub(crate) answers: Mutex<VecDeque<ErrorKind>>,
    #[cfg(test)]
    pub(crate) has_no_threads: AtomicBool,
}

impl Faults {
    /// Why an answer cannot be sent.
    pub(crate) fn of_answer(&self) -> Result<()> {
        #[cfg(test)]
        if let Some(kind) = lock(&self.answers).pop_front() {
            return Err(Error::new(kind, "a test refuses it"));
        }
        Ok(())
    }

    /// Why no thread is free, and none can be started.
    pub(crate) fn of_thread(&self) -> io::Result<()> {
        #[cfg(test)]
        if self.has_no_threads.load(Relaxed) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(())
    }
}
