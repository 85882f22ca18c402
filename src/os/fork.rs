//! Detects processes that other code forked from one that uses this crate (a `fork` by the
//! program itself, a daemonize), and closes the descriptors that they must not hold. See [pthread_atfork(3)](https://man7.org/linux/man-pages/man3/pthread_atfork.3.html).
//!
//! Such a process shares descriptors, a place in the family and half of a runtime with the one it was forked from, and has
//! none of its other threads. So it uses nothing of that: each call is an error ([`check`]), each drop does nothing.

use crate::error::ForkedProcess;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU64, Ordering::*};

static IS_FORKED: AtomicBool = AtomicBool::new(false);

/// A fork by [`super::spawn::fork`] is under way, whose child is a process of this crate.
static IS_OURS: AtomicBool = AtomicBool::new(false);

/// The identity of this process in the family; 0 is none.
static IDENTITY: AtomicPtr<AtomicU64> = AtomicPtr::new(std::ptr::null_mut());

/// Descriptors that no other process may hold, or -1. There are a lifeline, a connection and a name cleaner;
/// more come only with a change of rights.
static PRIVATE: [AtomicI32; 32] = [const { AtomicI32::new(-1) }; 32];

/// Whether this process was forked by other code from one that had used the crate.
#[inline]
pub(crate) fn is_forked() -> bool {
    IS_FORKED.load(Relaxed)
}

/// The error of everything that is asked of a process that [is forked](is_forked).
#[inline]
pub(crate) fn check() -> io::Result<()> {
    if is_forked() { Err(refusal()) } else { Ok(()) }
}

#[cold]
fn refusal() -> io::Error {
    io::Error::other(ForkedProcess)
}

/// Panics in a process that [is forked](is_forked), for a call that returns no error.
#[track_caller]
#[inline]
pub(crate) fn refuse(doing: &str) {
    if is_forked() {
        panic!("cannot {doing}: {ForkedProcess}");
    }
}

/// From now on a process that is forked from this one knows it, and has 0 for `identity`.
pub(crate) fn watch(identity: &'static AtomicU64) {
    IDENTITY.store(std::ptr::from_ref(identity).cast_mut(), Release);
    register();
}

fn register() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler only does what is allowed after a fork of a process with threads: atomics, and system calls.
        // It fails only without memory; then a forked process cannot be distinguished from its parent.
        unsafe { libc::pthread_atfork(None, None, Some(in_forked_process)) };
    });
}

/// Runs a fork of this crate: its child does not count as forked by other code.
pub(super) fn ours<T>(fork: impl FnOnce() -> T) -> T {
    IS_OURS.store(true, Release);
    let forked = fork();
    IS_OURS.store(false, Release);
    forked
}

extern "C" fn in_forked_process() {
    if IS_OURS.load(Acquire) {
        return;
    }
    IS_FORKED.store(true, Release);
    // SAFETY: null, or a static.
    if let Some(identity) = unsafe { IDENTITY.load(Acquire).as_ref() } {
        identity.store(0, Release);
    }
    // SAFETY: the path is a C string that lives for ever.
    let null = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    for fd in PRIVATE.iter().map(|fd| fd.load(Acquire)).filter(|fd| *fd >= 0) {
        // The number stays taken: its owner in this process does not know that it is another file now.
        // SAFETY: the descriptor is open, as it is marked, and in this process nobody uses it from here on.
        if unsafe { libc::dup3(null, fd, libc::O_CLOEXEC) } == -1 {
            // SAFETY: as above.
            unsafe { libc::close(fd) };
        }
    }
    if null >= 0 {
        // SAFETY: opened above.
        unsafe { libc::close(null) };
    }
}

/// A descriptor that a process forked from this one does not keep, as long as this lives: dropped before that is closed.
pub(crate) struct Private(RawFd);

impl Private {
    pub(crate) fn mark(fd: BorrowedFd<'_>) -> Self {
        register();
        let fd = fd.as_raw_fd();
        let taken = PRIVATE.iter().any(|place| place.compare_exchange(-1, fd, AcqRel, Relaxed).is_ok());
        debug_assert!(taken, "a place for each private descriptor");
        Self(fd)
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        let mut places = PRIVATE.iter();
        // In a forked process the marks are of no use any more.
        let _ = places.any(|place| place.compare_exchange(self.0, -1, AcqRel, Relaxed).is_ok());
    }
}

/// A value that only the process that made it drops. A drop in a forked process would affect that one: both have the same
/// descriptors behind the same epoll, and the tasks belong to it.
pub(crate) struct Own<T>(ManuallyDrop<T>);

impl<T> Own<T> {
    pub(crate) fn new(inner: T) -> Self {
        Self(ManuallyDrop::new(inner))
    }
}

impl<T> Deref for Own<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Own<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T> Drop for Own<T> {
    fn drop(&mut self) {
        if !is_forked() {
            // SAFETY: here is the only place that drops it, once, and nobody can use it afterwards.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}
