//! Causes that modules without this crate's error type put inside an [`std::io::Error`].
#![forbid(unsafe_code)]

use super::{Error, ErrorKind};
use std::fmt;

/// Memory of a shared object that was found damaged, inside an [`std::io::Error`].
#[derive(Debug)]
pub(crate) struct Damage {
    /// Of which kind the object is, and which memory (device and inode of its memfd).
    what: &'static str,
    identity: (u64, u64),
    why: &'static str,
}

impl Damage {
    /// `why`: which word is impossible, in the terms of the object.
    #[cold]
    pub(crate) fn error(what: &'static str, identity: (u64, u64), why: &'static str) -> std::io::Error {
        std::io::Error::new(std::io::ErrorKind::InvalidData, Self { what, identity, why })
    }

    pub(crate) fn is_in(error: &std::io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Self>())
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, identity: (device, inode), why } = self;
        write!(
            f,
            "the shared memory of {what} {device}:{inode} is damaged ({why}): some process wrote where it must not; \
             the {what} is closed, create a new one"
        )
    }
}

impl std::error::Error for Damage {}

/// Why a process that was forked from one that uses the crate cannot use it.
#[derive(Debug)]
pub(crate) struct ForkedProcess;

impl fmt::Display for ForkedProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "this process was forked from one that had used multiprocess before, and cannot use it: daemonize before the \
             first use (after `multiprocess::init`), or exec",
        )
    }
}

impl std::error::Error for ForkedProcess {}

pub(super) fn is_of_forked_process(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    let inner = |error: &std::io::Error| error.get_ref().is_some_and(|inner| inner.is::<ForkedProcess>());
    error.downcast_ref::<std::io::Error>().is_some_and(inner)
        || error.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::Forked)
}
