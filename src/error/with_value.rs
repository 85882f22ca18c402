//! Errors that give back the value that was not taken, or the guard of a lock that was taken all the same.
#![forbid(unsafe_code)]

use super::{Error, ErrorKind};
use std::fmt;

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

            /// Returns the kind.
            pub fn kind(&self) -> ErrorKind {
                self.error.kind()
            }

            /// Returns the value that was not taken.
            pub fn into_inner(self) -> T {
                self.value
            }

            /// Returns the error without the value.
            ///
            /// ```
            /// # multiprocess::init();
            /// let queue = multiprocess::Queue::bounded(1)?;
            /// queue.try_put(1)?;
            /// let error = queue.try_put(2).unwrap_err().into_error();
            /// assert_eq!(error.kind(), multiprocess::ErrorKind::Full);
            /// # Ok::<(), multiprocess::Error>(())
            /// ```
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
    /// The error of a failed `put`, with the value that was not taken.
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
    /// The error of a failed `try_put`, with the value that was not taken.
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
    /// The error of a failed `send`, with the value that was not taken.
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

/// The error of acquiring a lock or a permit, and of waiting for a condition. If it was acquired all the same, the
/// guard is inside.
///
/// - `OwnerDied`: the last holder ended without releasing the lock (it was killed, or forgot the guard). The caller has the
///   lock; [`into_guard`](LockError::into_guard) returns the guard. The protected data may be half changed.
/// - `WouldBlock` and `Timeout`: another holder has the lock. From the `wait` methods of a
///   [`Condition`](crate::Condition) `Timeout` means that no notification came; the guard is inside.
/// - `Other`: the guard given to a condition is that of another one; it is inside.
/// - `Io`: the process cannot wait: there is no tokio runtime, or it lacks its I/O driver or timer, or no descriptor is
///   left.
/// - `Corrupt`: the memory of the lock is damaged, and the lock is closed.
///
/// `?` turns it into an [`Error`] and releases a guard inside.
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

    /// Returns the kind.
    pub fn kind(&self) -> ErrorKind {
        self.error.kind()
    }

    /// Returns `true` if the lock was acquired: always for `OwnerDied`, never for `WouldBlock`.
    pub fn has_guard(&self) -> bool {
        self.guard.is_some()
    }

    /// Returns the guard of the lock, which was acquired all the same.
    ///
    /// ```no_run
    /// # async fn f() -> multiprocess::Result<()> {
    /// use multiprocess::{ErrorKind, Lock};
    /// let lock = Lock::new()?;
    /// let guard = match lock.acquire().await {
    ///     Ok(guard) => guard,
    ///     Err(error) if error.kind() == ErrorKind::OwnerDied => error.into_guard(), // and repair the data
    ///     Err(error) => return Err(error.into()),
    /// };
    /// # drop(guard); Ok(()) }
    /// ```
    ///
    /// # Panics
    /// If there is no guard ([`has_guard`](LockError::has_guard)), with this error as the message.
    #[track_caller]
    pub fn into_guard(self) -> G {
        match self.guard {
            Some(guard) => guard,
            None => panic!("there is no guard in this error: {}", self.error),
        }
    }

    /// Returns the error, and releases the guard.
    ///
    /// ```
    /// # multiprocess::init();
    /// let lock = multiprocess::Lock::new()?;
    /// let _guard = lock.try_acquire()?;
    /// let error = lock.try_acquire().unwrap_err().into_error();
    /// assert_eq!(error.kind(), multiprocess::ErrorKind::WouldBlock);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
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
