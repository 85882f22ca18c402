//! The crate's one error type: a kind, what happened to whom, and the facts of the kind.
#![forbid(unsafe_code)]

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::os::unix::process::ExitStatusExt;
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

/// What kind of thing went wrong; match on it to decide what to do.
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
    /// A `try_put` found no room.
    Full,
    /// A `try_get` found nothing.
    Empty,
    /// A receiver of a broadcast was too slow, and values are not kept any more; [`Error::lagged`] tells how many.
    Lagged,
    /// The deadline passed first.
    Timeout,
    /// A `try_*` call would have had to wait.
    WouldBlock,
    /// The operation was cancelled.
    Cancelled,
    /// The function panicked; [`Error::panic`] tells where.
    Panicked,
    /// The process ended before its function returned; [`Error::exit_status`] tells how.
    ProcessDied,
    /// The process ended because an allocation failed at the limit of its address space (`memory_limit`).
    MemoryLimit,
    /// A supervised process failed too often and is not started again; `source()` is the last cause.
    RestartLimit,
    /// The last holder of a lock was killed.
    OwnerDied,
    /// A barrier was broken.
    BrokenBarrier,
    /// The other side did not prove that it knows the key.
    Authentication,
    /// A value could not be serialised: its own code refused, it is nested deeper than 1024 levels
    /// ([`with_depth_limit`](crate::with_depth_limit)), or it is larger than 4 GiB less 1 MiB, which is the limit on all
    /// ways between processes. Larger data belongs in an [`Array`](crate::Array), in
    /// [`SharedMemory`](crate::SharedMemory) or in a file. On its way, a value takes its size in memory once more at
    /// the receiver, and at the sender too; twice more at the sender where it is put into a queue or pipe, unless it is
    /// nothing but bytes or numbers, and where it is an argument of a pool.
    Encode,
    /// Bytes could not be turned back into a value.
    Decode,
    /// A process could not be started.
    Spawn,
    /// The operating system refused.
    Io,
    /// The memory of a shared object was found damaged: some process of the program wrote where it must not, as a crash in
    /// foreign code does. The object is closed, for all processes; create a new one.
    Corrupt,
    /// Neither `run`, `init` nor `test_support!` was called.
    NotInitialized,
    /// This process was forked (`fork`, a daemonize) from one that had used the crate: daemonize before the first use.
    Forked,
    /// Anything else, and what user code makes with [`Error::other`].
    Other,
}

/// Where and why a function panicked in another process.
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

    /// The panic's message, for `&str` and `String` payloads alike.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// `file:line:column`, where it is known.
    pub fn location(&self) -> Option<&str> {
        self.location.as_deref()
    }

    /// The stack at the panic, if it was asked for: by `RUST_BACKTRACE` or `RUST_LIB_BACKTRACE` in the environment of the
    /// process that panicked, as in any Rust program, or by its builder ([`ProcessBuilder::backtraces`], which explains).
    /// Otherwise empty. Symbols need debug information in the binary.
    ///
    /// [`ProcessBuilder::backtraces`]: crate::ProcessBuilder::backtraces
    pub fn backtrace(&self) -> &str {
        &self.backtrace
    }
}

/// What went wrong, to whom, and what to do about it.
///
/// It is a serde value, so a function that runs in another process may return
/// `mp::Result<T>`; its source chain then travels as text.
///
/// Inside such a function `?` converts the errors of std (and a boxed error) by itself. For the error of another
/// library, `.map_err(mp::Error::other)?` does; a generic `From` cannot exist beside this type's own.
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
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    panic: Option<PanicInfo>,
    exit_status: Option<ExitStatus>,
    lagged: Option<u64>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let (source, panic, exit_status, lagged) = (None, None, None, None);
        Self(Box::new(Inner { kind, message: message.into(), source, panic, exit_status, lagged }))
    }

    /// The same to tell to one more: everything but the source, whose text is kept.
    pub(crate) fn copy(other: &Self) -> Self {
        let Inner { kind, message, panic, exit_status, lagged, .. } = &*other.0;
        let (message, panic, exit_status) = (message.clone(), panic.clone(), *exit_status);
        Self(Box::new(Inner { kind: *kind, message, source: None, panic, exit_status, lagged: *lagged }))
    }

    /// What a system call said; or that memory was found damaged, which is how rooms below this one say so ([`Damage`]).
    pub(crate) fn io(doing: impl fmt::Display, source: impl Into<std::io::Error>) -> Self {
        let source = source.into();
        if Damage::is_in(&source) {
            return Self::new(ErrorKind::Corrupt, format!("{doing}: {source}")).with_source(source);
        }
        Self::new(ErrorKind::Io, format!("{doing}: {source}")).with_source(source)
    }

    pub(crate) fn closed(what: &str) -> Self {
        Self::new(ErrorKind::Closed, format!("the {what} is closed"))
    }

    /// A receiver of a broadcast has missed so many values.
    pub(crate) fn lagged_by(values: u64) -> Self {
        let message = format!("the receiver of a broadcast was too slow: {values} values are not kept any more");
        let mut error = Self::new(ErrorKind::Lagged, message);
        error.0.lagged = Some(values);
        error
    }

    pub(crate) fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let source = source.into();
        if is_of_forked_process(&*source) {
            self.0.kind = ErrorKind::Forked;
        }
        self.0.source = Some(source);
        self
    }

    pub(crate) fn with_panic(mut self, panic: PanicInfo) -> Self {
        self.0.panic = Some(panic);
        self
    }

    pub(crate) fn with_exit_status(mut self, status: Option<ExitStatus>) -> Self {
        self.0.exit_status = status;
        self
    }

    /// Wraps any error (or text) as kind `Other`.
    ///
    /// ```
    /// let error = multiprocess::Error::other("the cat is on the keyboard");
    /// assert_eq!(error.kind(), multiprocess::ErrorKind::Other);
    /// ```
    pub fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let error = error.into();
        Self::new(ErrorKind::Other, error.to_string()).with_source(error)
    }

    /// What kind of thing went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The panic, if the kind is `Panicked`.
    pub fn panic(&self) -> Option<&PanicInfo> {
        self.0.panic.as_ref()
    }

    /// How many values a receiver of a broadcast has missed, if the kind is `Lagged`.
    pub fn lagged(&self) -> Option<u64> {
        self.0.lagged
    }

    /// How the process ended, if the kind is `ProcessDied`, `MemoryLimit` or `Panicked` by a panic that ended it, or `Spawn` for one that ended early, and the status is known.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.0.exit_status
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Error");
        debug.field("kind", &self.0.kind).field("message", &self.0.message);
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
        Self::new(ErrorKind::Io, error.to_string()).with_source(error)
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

/// Memory of a shared object that was found damaged, inside an [`std::io::Error`].
#[derive(Debug)]
pub(crate) struct Damage {
    /// Of which kind the object is, and which memory (device and inode of its memfd).
    what: &'static str,
    identity: (u64, u64),
    why: &'static str,
}

impl Damage {
    /// `why`: which word cannot be, in the terms of the object.
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

fn is_of_forked_process(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    let inner = |error: &std::io::Error| error.get_ref().is_some_and(|inner| inner.is::<ForkedProcess>());
    error.downcast_ref::<std::io::Error>().is_some_and(inner)
        || error.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::Forked)
}

/// An error's source chain as it looks after a journey: text.
#[derive(Debug)]
struct SourceText {
    message: String,
    source: Option<Box<SourceText>>,
}

impl SourceText {
    fn chain(messages: Vec<String>) -> Option<Box<Self>> {
        messages.into_iter().rev().fold(None, |source, message| Some(Box::new(Self { message, source })))
    }
}

impl fmt::Display for SourceText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for SourceText {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

#[derive(Serialize, Deserialize)]
struct Portable {
    kind: ErrorKind,
    message: String,
    sources: Vec<String>,
    panic: Option<PanicInfo>,
    raw_status: Option<i32>,
    lagged: Option<u64>,
}

impl Serialize for Error {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let sources = std::iter::successors(std::error::Error::source(self), |error| error.source());
        Portable {
            kind: self.0.kind,
            message: self.0.message.clone(),
            sources: sources.map(|error| error.to_string()).collect(),
            panic: self.0.panic.clone(),
            raw_status: self.0.exit_status.map(ExitStatusExt::into_raw),
            lagged: self.0.lagged,
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Error {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let portable = Portable::deserialize(deserializer)?;
        Ok(Self(Box::new(Inner {
            kind: portable.kind,
            message: portable.message,
            source: SourceText::chain(portable.sources).map(|source| source as _),
            panic: portable.panic,
            exit_status: portable.raw_status.map(ExitStatusExt::from_raw),
            lagged: portable.lagged,
        })))
    }
}

macro_rules! returns_value {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        pub struct $name<T> {
            error: Error,
            value: T,
        }

        impl<T> $name<T> {
            pub(crate) fn new(error: Error, value: T) -> Self {
                Self { error, value }
            }

            /// What kind of thing went wrong.
            pub fn kind(&self) -> ErrorKind {
                self.error.kind()
            }

            /// The value that was not taken.
            pub fn into_inner(self) -> T {
                self.value
            }

            /// The error without the value.
            pub fn into_error(self) -> Error {
                self.error
            }
        }

        impl<T> fmt::Debug for $name<T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).field("error", &self.error).finish_non_exhaustive()
            }
        }

        impl<T> fmt::Display for $name<T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.error.fmt(f)
            }
        }

        impl<T> std::error::Error for $name<T> {
            fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
                std::error::Error::source(&self.error)
            }
        }

        impl<T> From<$name<T>> for Error {
            fn from(error: $name<T>) -> Self {
                error.error
            }
        }
    };
}

returns_value! {
    /// A `put` that failed, with the value it did not take.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let queue = multiprocess::Queue::unbounded()?;
    /// queue.close();
    /// let error = queue.put(5).await.unwrap_err();
    /// assert_eq!(error.into_inner(), 5);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    PutError
}
returns_value! {
    /// A `try_put` that failed, with the value it did not take.
    ///
    /// ```
    /// # multiprocess::init();
    /// let queue = multiprocess::Queue::bounded(1)?;
    /// queue.try_put("first".to_string())?;
    /// let error = queue.try_put("second".to_string()).unwrap_err();
    /// assert_eq!(error.kind(), multiprocess::ErrorKind::Full);
    /// assert_eq!(error.into_inner(), "second");
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    TryPutError
}
returns_value! {
    /// A `send` that failed, with the value it did not take.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let (mut sender, receiver) = multiprocess::simplex::<String>()?;
    /// drop(receiver);
    /// let error = sender.send("hello".into()).await.unwrap_err();
    /// assert_eq!(error.into_inner(), "hello");
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    SendError
}

/// An acquisition that did not simply succeed; if the lock was taken all the same, its guard is inside.
///
/// Kinds: `OwnerDied`, the last holder ended without letting go (killed, or its guard forgotten): the lock is yours,
/// [`into_guard`](LockError::into_guard) hands the guard over, and what the lock protects may be half changed.
/// `WouldBlock` and `Timeout`: it is held by somebody else. `Io`: the process cannot wait, having no descriptor left.
/// `Corrupt`: its memory was found damaged, and it is closed.
/// With `?` it becomes an [`Error`], and a guard inside is let go.
///
/// ```
/// # multiprocess::init();
/// let lock = multiprocess::Lock::new()?;
/// let guard = lock.try_acquire()?;
/// let error = lock.try_acquire().unwrap_err();
/// assert_eq!(error.kind(), multiprocess::ErrorKind::WouldBlock);
/// assert!(!error.has_guard());
/// # Ok::<(), multiprocess::Error>(())
/// ```
pub struct LockError<G> {
    error: Error,
    guard: Option<G>,
}

impl<G> LockError<G> {
    pub(crate) fn new(error: Error, guard: Option<G>) -> Self {
        Self { error, guard }
    }

    /// What kind of thing went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.error.kind()
    }

    /// Whether the lock was taken all the same: always for `OwnerDied`, never for `WouldBlock`.
    pub fn has_guard(&self) -> bool {
        self.guard.is_some()
    }

    /// The guard of the lock that was taken all the same.
    ///
    /// ```no_run
    /// # async fn f() -> multiprocess::Result<()> {
    /// use multiprocess::{ErrorKind, Lock};
    /// let lock = Lock::new()?;
    /// let guard = match lock.acquire().await {
    ///     Ok(guard) => guard,
    ///     Err(error) if error.kind() == ErrorKind::OwnerDied => error.into_guard(), // and mend what it protects
    ///     Err(error) => return Err(error.into()),
    /// };
    /// # drop(guard); Ok(()) }
    /// ```
    ///
    /// # Panics
    /// If there is none ([`has_guard`](LockError::has_guard)), as `unwrap` does, with this error as its message.
    #[track_caller]
    pub fn into_guard(self) -> G {
        match self.guard {
            Some(guard) => guard,
            None => panic!("there is no guard in this error: {}", self.error),
        }
    }

    /// The error without the guard, which is let go.
    pub fn into_error(self) -> Error {
        self.error
    }
}

impl<G> fmt::Debug for LockError<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockError").field("error", &self.error).field("has_guard", &self.has_guard()).finish()
    }
}

impl<G> fmt::Display for LockError<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<G> std::error::Error for LockError<G> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.error)
    }
}

impl<G> From<LockError<G>> for Error {
    fn from(error: LockError<G>) -> Self {
        error.error
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

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
