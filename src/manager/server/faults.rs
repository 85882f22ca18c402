//! Faults: the one place where the tests of this room have a server fail. In other builds nothing does.

use crate::error::Result;
use crate::wire::EncodedMessage;
use std::io;

#[cfg(not(test))]
#[derive(Default)]
pub(crate) struct Faults {}

#[cfg(not(test))]
impl Faults {
    /// Why this answer cannot be sent.
    pub(crate) fn of_answer(&self, _: &EncodedMessage) -> Result<()> {
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
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    /// Sees whenever an answer is sent, and may have it refused.
    type FaultInjector = Box<dyn FnMut(&EncodedMessage) -> Option<ErrorKind> + Send>;

    #[derive(Default)]
    pub(crate) struct Faults {
        pub(crate) injector: Mutex<Option<FaultInjector>>,
        pub(crate) has_no_threads: AtomicBool,
    }

    impl Faults {
        pub(crate) fn of_answer(&self, answer: &EncodedMessage) -> Result<()> {
            let refused = lock(&self.injector).as_mut().and_then(|injector| injector(answer));
            refused.map_or(Ok(()), |kind| Err(Error::new(kind, "a test refuses it")))
        }

        pub(crate) fn of_thread(&self) -> io::Result<()> {
            if self.has_no_threads.load(Relaxed) { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
        }
    }
}
