//! The kinds of errors, and what is known of a panic.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// The kind of an [`Error`](crate::Error); match on it to decide what to do.
///
/// ```
/// use multiprocess::{Error, ErrorKind};
/// assert_eq!(Error::other("no luck").kind(), ErrorKind::Other);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The queue, pipe or pool was closed, or the other end is gone.
    Closed,
    /// There was no room, and the call does not wait for it: `try_put`, `try_send`, `try_emit`, `try_apply`,
    /// `reject_when_full`. Or 1024 items of a queue are on lease or dead letters.
    Full,
    /// A `try_get`, `try_recv` or `try_lease` found nothing.
    Empty,
    /// A receiver of a broadcast was too slow and has missed values; [`Error::lagged`](crate::Error::lagged) says how many.
    Lagged,
    /// The deadline passed first.
    Timeout,
    /// A `try_*` call would have had to wait.
    WouldBlock,
    /// The operation was cancelled.
    Cancelled,
    /// The function panicked; [`Error::panic`](crate::Error::panic) has the message and the place.
    Panicked,
    /// The process ended before its function returned; [`Error::exit_status`](crate::Error::exit_status) has its status.
    ProcessDied,
    /// The process ended because an allocation failed at the limit of its address space (`memory_limit`).
    MemoryLimit,
    /// A supervised process failed too often and is not started again; `source()` returns the last cause.
    RestartLimit,
    /// The last holder of a lock was killed while it held it, or ended with its guard leaked. The caller has the lock
    /// now.
    OwnerDied,
    /// A barrier was broken.
    BrokenBarrier,
    /// The other end did not prove that it knows the key.
    Authentication,
    /// A value could not be serialised: its own code refused, it is nested deeper than 1024 levels
    /// ([`with_depth_limit`](crate::with_depth_limit)), or it is larger than 4 GiB less 1 MiB.
    ///
    /// Put larger data in an [`Array`](crate::Array), in [`SharedMemory`](crate::SharedMemory) or in a file. While a
    /// value is sent, sender and receiver each need its size in memory once more. Below 32 MiB the sender needs it
    /// twice for a moment, unless the value consists of bytes or numbers only.
    Encode,
    /// Bytes could not be decoded into a value.
    Decode,
    /// A process could not be started.
    Spawn,
    /// A system call failed.
    Io,
    /// The memory of a shared object is damaged, for example by a crash in foreign code of some process. The object is closed
    /// for all processes; create a new one.
    Corrupt,
    /// Neither `run`, `init` nor `test_support!` was called.
    NotInitialized,
    /// This process was forked (by `fork`, or to become a daemon) from one that had used the crate. Fork before the first use.
    Forked,
    /// The server of a cluster pool is not there, or does not let this program take part.
    Unavailable,
    /// This kind of object does not have the operation; the error says where to do it instead.
    Unsupported,
    /// Any other error, and errors made with [`Error::other`](crate::Error::other).
    Other,
}

/// The message and place of a panic in another process.
///
/// ```
/// # fn show(error: &multiprocess::Error) {
/// if let Some(panic) = error.panic() {
///     eprintln!("{} at {:?}", panic.message(), panic.location());
/// }
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PanicInfo {
    message: String,
    location: Option<String>,
    backtrace: String,
}

impl PanicInfo {
    pub(crate) fn new(message: String, location: Option<String>, backtrace: String) -> Self {
        Self { message, location, backtrace }
    }

    /// Returns the message of the panic, from a `&str` or `String` payload.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Returns the place as `file:line:column`, if it is known.
    pub fn location(&self) -> Option<&str> {
        self.location.as_deref()
    }

    /// Returns the stack at the panic, or an empty text if it was not asked for.
    ///
    /// [`ProcessBuilder::backtraces`] asks for it, and so do `RUST_BACKTRACE` and `RUST_LIB_BACKTRACE` in the environment of
    /// the process that panicked. Symbols need debug information in the binary.
    ///
    /// [`ProcessBuilder::backtraces`]: crate::ProcessBuilder::backtraces
    pub fn backtrace(&self) -> &str {
        &self.backtrace
    }
}
