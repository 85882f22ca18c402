//! Faults: the one place where the tests of this room have a server fail. In other builds nothing does.

use crate::error::Result;
use std::io;

#[cfg(not(test))]
#[derive(Default)]
pub(crate) struct Faults {}

#[cfg(not(test))]
impl Faults {
    /// Why an answer cannot be sent.
    pub(crate) fn of_answer(&self) -> Result<()> {
        Ok(())
    }

    /// Why no thread is free, and none can be started.
    pub(crate) fn of_thread(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
pub(crate) use tests::Faults;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};
    use crate::os::sync::lock;
    use std::collections::VecDeque;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    #[derive(Default)]
    pub(crate) struct Faults {
        /// Of the next answers.
        pub(crate) answers: Mutex<VecDeque<ErrorKind>>,
        pub(crate) has_no_threads: AtomicBool,
    }

    impl Faults {
        pub(crate) fn of_answer(&self) -> Result<()> {
            lock(&self.answers).pop_front().map_or(Ok(()), |kind| Err(Error::new(kind, "a test refuses it")))
        }

        pub(crate) fn of_thread(&self) -> io::Result<()> {
            if self.has_no_threads.load(Relaxed) { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
        }
    }
}
