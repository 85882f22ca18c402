//! The crate's one error type: a kind, a message that names the object or process, and the facts of the kind.
//!
//! [`Error::kind`] is what to match on. The guide's page on [troubleshooting](crate::guide::troubleshooting) goes from what an error says to its cause.
//! All names are re-exported at the root of the crate.
//!
//! Two kinds are not listed at each method: every method of a shared object can also fail with
//! [`Corrupt`](ErrorKind::Corrupt) (its memory is damaged) and [`Forked`](ErrorKind::Forked) (this process was forked
//! from one that had used the crate). In a forked process, methods that return no `Result`, such as `Event::set`,
//! panic.
#![forbid(unsafe_code)]

mod cause;
mod kind;
mod message;
mod topic;
mod with_value;

pub(crate) use cause::{Damage, Explained, ForkedProcess};
pub use kind::{ErrorKind, PanicInfo};
pub(crate) use topic::Topic;
pub use with_value::{LockError, PutError, SendError, TryPutError};

use cause::{in_words, is_of_forked_process};
use std::fmt;
use std::process::ExitStatus;

/// The result of this crate's operations.
///
/// ```
/// fn half(n: u32) -> multiprocess::Result<u32> {
///     if n % 2 == 0 { Ok(n / 2) } else { Err(multiprocess::Error::other("odd")) }
/// }
/// assert_eq!(half(4)?, 2);
/// # Ok::<(), multiprocess::Error>(())
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error type of this crate: a kind, a message, and facts such as an exit status.
///
/// The message names the object or process, and says what to do where that is known. A short name in brackets at its end leads to the
/// guide's page on [troubleshooting](crate::guide::troubleshooting) ([`help`](Self::help)).
///
/// ```
/// use multiprocess as mp;
///
/// fn port(text: String) -> mp::Result<u16> {
///     Ok(text.trim().parse()?) // `ParseIntError`
/// }
/// assert_eq!(port("80".into())?, 80);
/// assert_eq!(port("x".into()).unwrap_err().to_string(), "invalid digit found in string");
///
/// let error = mp::Error::other(std::io::Error::other("disk on fire"));
/// assert_eq!(error.to_string(), "disk on fire");
/// # Ok::<(), mp::Error>(())
/// ```
///
/// - A function that runs in another process can return `mp::Result<T>`. The error arrives with its facts; its sources arrive
///   as text.
/// - `?` converts the errors of std, and boxed errors. For other errors use `.map_err(mp::Error::other)?`.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    /// Without the short name of `topic`, which `Display` adds.
    message: String,
    topic: Option<Topic>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    panic: Option<PanicInfo>,
    exit_status: Option<ExitStatus>,
    lagged: Option<u64>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let (topic, source, panic, exit_status, lagged) = (None, None, None, None, None);
        Self(Box::new(Inner { kind, message: message.into(), topic, source, panic, exit_status, lagged }))
    }

    /// A copy for a second receiver: without the source, whose text is in the message.
    pub(crate) fn copy(other: &Self) -> Self {
        let Inner { kind, message, topic, panic, exit_status, lagged, .. } = &*other.0;
        let (message, panic, exit_status) = (message.clone(), panic.clone(), *exit_status);
        Self(Box::new(Inner { kind: *kind, message, topic: *topic, source: None, panic, exit_status, lagged: *lagged }))
    }

    /// The error of a system call; or of damaged memory, which other modules report as [`Damage`] inside an `io::Error`.
    pub(crate) fn io(doing: impl fmt::Display, source: impl Into<std::io::Error>) -> Self {
        let source = source.into();
        let kind = if Damage::is_in(&source) { ErrorKind::Corrupt } else { ErrorKind::Io };
        Self::new(kind, format!("{doing}: {}", in_words(&source).0)).with_source(source)
    }

    pub(crate) fn closed(what: &str) -> Self {
        Self::new(ErrorKind::Closed, format!("the {what} is closed"))
    }

    /// The error of a receiver of a broadcast that has missed so many values.
    pub(crate) fn lagged_by(values: u64) -> Self {
        let message = format!("the receiver of a broadcast was too slow: {values} values are not kept any more");
        let mut error = Self::new(ErrorKind::Lagged, message).explained_by(Topic::Lagged);
        error.0.lagged = Some(values);
        error
    }

    pub(crate) fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let source = source.into();
        if is_of_forked_process(&*source) {
            self.0.kind = ErrorKind::Forked;
        }
        self.0.topic = self.0.topic.or_else(|| in_words(&*source).1);
        self.0.source = Some(source);
        self
    }

    /// The same error, with the heading of the guide that explains it. Otherwise it has that of its source.
    pub(crate) fn explained_by(mut self, topic: impl Into<Option<Topic>>) -> Self {
        self.0.topic = topic.into();
        self
    }

    pub(crate) fn topic(&self) -> Option<Topic> {
        self.0.topic
    }

    /// The message without the short name, to quote it in another error.
    pub(crate) fn text(&self) -> &str {
        &self.0.message
    }

    pub(crate) fn with_panic(mut self, panic: PanicInfo) -> Self {
        self.0.panic = Some(panic);
        self
    }

    pub(crate) fn with_exit_status(mut self, status: Option<ExitStatus>) -> Self {
        self.0.exit_status = status;
        self
    }

    /// The same error, with the host where it happened.
    #[cfg(feature = "cluster")]
    pub(crate) fn on_host(mut self, host: &str) -> Self {
        self.0.message = format!("{} (on host {host})", self.0.message);
        self
    }

    /// Makes an error of kind `Other` from any error or text.
    ///
    /// ```
    /// let error = multiprocess::Error::other("the cat is on the keyboard");
    /// assert_eq!(error.kind(), multiprocess::ErrorKind::Other);
    /// ```
    pub fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let error = error.into();
        Self::new(ErrorKind::Other, in_words(&*error).0).with_source(error)
    }

    /// Returns the kind.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the short name under which the guide's page on [troubleshooting](crate::guide::troubleshooting) explains this error.
    ///
    /// The text of the error ends with it, in brackets. `None` for errors that say all there is to say. A program should match on
    /// [`kind`](Self::kind): more errors may get a name.
    ///
    /// ```
    /// # multiprocess::init();
    /// let queue = multiprocess::JoinableQueue::<u8>::unbounded()?;
    /// let error = queue.task_done().unwrap_err(); // Nothing was taken.
    /// assert_eq!(error.help(), Some("task-done"));
    /// assert!(error.to_string().ends_with(" [task-done]"));
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn help(&self) -> Option<&'static str> {
        self.0.topic.map(Topic::name)
    }

    /// Returns the panic, if the kind is `Panicked`.
    pub fn panic(&self) -> Option<&PanicInfo> {
        self.0.panic.as_ref()
    }

    /// Returns how many values a receiver of a broadcast has missed, if the kind is `Lagged`.
    pub fn lagged(&self) -> Option<u64> {
        self.0.lagged
    }

    /// Returns the exit status of the process, if it is known.
    ///
    /// It is set for the kinds `ProcessDied` and `MemoryLimit`, for `Panicked` if the panic ended the process, and for `Spawn`
    /// if the process ended early.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.0.exit_status
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { message, topic, .. } = &*self.0;
        f.write_str(message)?;
        topic.map_or(Ok(()), |topic| write!(f, "{}{topic}", Topic::separator(message)))
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Error");
        debug.field("kind", &self.0.kind).field("message", &self.to_string());
        self.0.source.iter().for_each(|source| {
            debug.field("source", source);
        });
        self.0.panic.iter().for_each(|panic| {
            debug.field("panic", panic);
        });
        self.0.exit_status.iter().for_each(|status| {
            debug.field("exit_status", status);
        });
        debug.finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(self.0.source.as_deref()?)
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::new(ErrorKind::Io, in_words(&error).0).with_source(error)
    }
}

/// The errors of std that `?` turns into kind `Other` inside a function that returns [`Result`].
macro_rules! from_std {
    ($($error:ty)*) => {$(
        impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Self::other(error)
            }
        }
    )*};
}

from_std! {
    std::alloc::LayoutError
    std::array::TryFromSliceError
    std::char::CharTryFromError
    std::char::DecodeUtf16Error
    std::char::ParseCharError
    std::char::TryFromCharError
    std::collections::TryReserveError
    std::env::JoinPathsError
    std::env::VarError
    std::ffi::FromBytesUntilNulError
    std::ffi::FromBytesWithNulError
    std::ffi::FromVecWithNulError
    std::ffi::IntoStringError
    std::ffi::NulError
    std::fmt::Error
    std::net::AddrParseError
    std::num::ParseFloatError
    std::num::ParseIntError
    std::num::TryFromIntError
    std::path::StripPrefixError
    std::str::ParseBoolError
    std::str::Utf8Error
    std::string::FromUtf16Error
    std::string::FromUtf8Error
    std::sync::mpsc::RecvError
    std::sync::mpsc::RecvTimeoutError
    std::sync::mpsc::TryRecvError
    std::thread::AccessError
    std::time::SystemTimeError
    std::time::TryFromFloatSecsError
    Box<dyn std::error::Error + Send + Sync>
    tokio::task::JoinError
    tokio::time::error::Elapsed
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn damaged_memory_is_a_kind_of_its_own_and_names_the_object() {
        let error = Error::io("cannot take from a queue", Damage::error("queue", (1, 77), "an impossible tail"));
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let text = error.to_string();
        for part in ["cannot take from a queue", "queue 1:77", "an impossible tail", "create a new one"] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(Error::io("x", std::io::Error::other("y")).kind(), ErrorKind::Io);
    }

    #[test]
    fn an_error_that_travels_keeps_its_facts_and_its_source_chain_as_text() {
        let inner = std::io::Error::other("inner");
        let sent = Error::other(Error::io("outer", inner)).with_exit_status(Some(ExitStatus::from_raw(9)));
        let bytes = serde_json::to_vec(&sent).unwrap();
        let back: Error = serde_json::from_slice(&bytes).unwrap();
        assert_eq!((back.kind(), back.to_string()), (ErrorKind::Other, "outer: inner".to_string()));
        assert_eq!(back.exit_status().unwrap().signal(), Some(9));
        let mut deepest = back.source().unwrap();
        while let Some(deeper) = deepest.source() {
            deepest = deeper;
        }
        assert_eq!(deepest.to_string(), "inner");
    }

    #[test]
    fn question_mark_converts_the_errors_of_std_with_their_text() {
        fn number(text: &str) -> Result<i32> {
            Ok(text.parse()?)
        }
        fn text(bytes: &[u8]) -> Result<String> {
            Ok(String::from_utf8(bytes.to_vec())?)
        }
        fn variable() -> Result<String> {
            Ok(std::env::var("MULTIPROCESS_NO_SUCH_VARIABLE")?)
        }
        fn boxed() -> Result<()> {
            Err::<(), Box<dyn std::error::Error + Send + Sync>>("boxed".into())?;
            Ok(())
        }
        for error in
            [number("x").unwrap_err(), text(&[0xff]).unwrap_err(), variable().unwrap_err(), boxed().unwrap_err()]
        {
            assert_eq!(error.kind(), ErrorKind::Other, "{error}");
            assert_eq!(error.source().unwrap().to_string(), error.to_string());
        }
        assert_eq!(Error::from(std::io::Error::other("disk")).kind(), ErrorKind::Io);
    }
}
