//! Detects processes that other code forked from one that uses this crate (a `fork` by the
//! program itself, a daemonize), and closes the descriptors that they must not hold. See [pthread_atfork(3)](https://man7.org/linux/man-pages/man3/pthread_atfork.3.html).
//!
//! Such a process shares descriptors, a place in the family and half of a runtime with the one it was forked from, and has
//! none of its other threads. So it uses nothing of that: each call is an error ([`check`]), each drop does nothing.

use crate::error::{ForkedProcess, Topic};
use std::io;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering::*};

static IS_FORKED: AtomicBool = AtomicBool::new(false);

/// A fork by [`super::spawn::fork`] is under way, whose child is a process of this crate.
static IS_OURS: AtomicBool = AtomicBool::new(false);

/// The identity of this process in the family; 0 is none.
static IDENTITY: AtomicPtr<AtomicU64> = AtomicPtr::new(std::ptr::null_mut());

/// Descriptors that no other process may hold, or -1. There are a lifeline, a connection and a name cleaner as a rule;
/// more come with each change of rights. A forked process of many threads may neither lock nor free, so places are only added.
static PRIVATE: Places = Places::new();

struct Places {
    fds: [AtomicI32; 32],
    next: AtomicPtr<Places>,
}

impl Places {
    const fn new() -> Self {
        Self { fds: [const { AtomicI32::new(-1) }; 32], next: AtomicPtr::new(std::ptr::null_mut()) }
    }

    /// All places that there are.
    fn all(&'static self) -> impl Iterator<Item = &'static AtomicI32> {
        std::iter::successors(Some(self), |places| places.next()).flat_map(|places| &places.fds)
    }

    fn next(&self) -> Option<&'static Places> {
        // SAFETY: null, or what `add` has leaked.
        unsafe { self.next.load(Acquire).as_ref() }
    }

    fn replace(&'static self, old: RawFd, new: RawFd) -> bool {
        self.all().any(|place| place.compare_exchange(old, new, AcqRel, Relaxed).is_ok())
    }

    #[cold]
    fn add(&'static self) {
        let mut last = self;
        while let Some(next) = last.next() {
            last = next;
        }
        let more = Box::into_raw(Box::new(Self::new()));
        if last.next.compare_exchange(std::ptr::null_mut(), more, AcqRel, Relaxed).is_err() {
            // SAFETY: from the box above, and nobody else has seen it: another thread has added some.
            drop(unsafe { Box::from_raw(more) });
        }
    }
}

/// Returns `true` if this process was forked by other code from one that had used the crate.
#[inline]
pub(crate) fn is_forked() -> bool {
    IS_FORKED.load(Relaxed)
}

/// The error of everything that is asked of a process that [is forked](is_forked).
#[inline]
pub(crate) fn check() -> io::Result<()> {
    if is_forked() { Err(refusal()) } else { Ok(()) }
}

/// The process that registered its handlers; 0 after a fork of this crate, until its child asks.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// [`check`] where a system call costs nothing: also notices a process that was made by `_Fork` or `clone`, for which no handler
/// runs. What such a process does before it comes to such a place is done as its parent.
pub(crate) fn check_pid() -> io::Result<()> {
    // Before that there is nothing that two processes could share.
    if REGISTERED.is_completed() {
        let me = std::process::id();
        match OWNER.compare_exchange(0, me, AcqRel, Acquire) {
            Err(owner) if owner != me && !is_forked() => in_forked_process(),
            _ => {}
        }
    }
    check()
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
        panic!("cannot {doing}: {ForkedProcess} {}", Topic::Forked);
    }
}

/// From now on a process that is forked from this one knows it, and has 0 for `identity`.
pub(crate) fn watch(identity: &'static AtomicU64) {
    IDENTITY.store(std::ptr::from_ref(identity).cast_mut(), Release);
    register();
}

/// Whether this process has something to hide from those that are forked from it.
static REGISTERED: Once = Once::new();

fn register() {
    REGISTERED.call_once(|| {
        // SAFETY: the handler only does what is allowed after a fork of a process with threads: atomics, and system calls.
        // It fails only without memory; then a forked process cannot be distinguished from its parent.
        unsafe { libc::pthread_atfork(None, None, Some(in_forked_process)) };
        OWNER.store(std::process::id(), Release);
    });
}

/// Runs a fork of this crate: its child does not count as forked by other code.
pub(super) fn ours<T>(fork: impl FnOnce() -> T) -> T {
    IS_OURS.store(true, Release);
    let forked = fork();
    OWNER.store(0, Release);
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
    for fd in PRIVATE.all().map(|fd| fd.load(Acquire)).filter(|fd| *fd >= 0) {
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
        while !PRIVATE.replace(-1, fd) {
            PRIVATE.add();
        }
        Self(fd)
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        // In a forked process the marks are of no use any more.
        PRIVATE.replace(self.0, -1);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, OwnedFd};

    #[test]
    fn forked_process_keeps_none_of_any_number_of_private_descriptors() {
        let pipes: Vec<(OwnedFd, OwnedFd)> =
            (0..100).map(|_| std::io::pipe().map(|(read, write)| (read.into(), write.into())).unwrap()).collect();
        let mut marks: Vec<_> = pipes.iter().map(|(_, write)| Private::mark(write.as_fd())).collect();
        let forked_process_keeps = || {
            // SAFETY: the child only makes system calls.
            match unsafe { libc::fork() } {
                0 => {
                    let is_pipe = |write: &OwnedFd| {
                        let found = rustix::fs::fstat(write);
                        found.is_ok_and(|found| rustix::fs::FileType::from_raw_mode(found.st_mode).is_fifo())
                    };
                    let kept = pipes.iter().filter(|(_, write)| is_pipe(write));
                    let kept = kept.count() as i32;
                    // SAFETY: it takes no pointer.
                    unsafe { libc::_exit(kept) }
                }
                pid => {
                    let mut status = 0;
                    // SAFETY: the number is ours.
                    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
                    libc::WEXITSTATUS(status)
                }
            }
        };
        assert_eq!(forked_process_keeps(), 0);
        marks.truncate(90);
        assert_eq!(forked_process_keeps(), 10);
        let places = PRIVATE.all().count();
        marks.extend(pipes[90..].iter().map(|(_, write)| Private::mark(write.as_fd())));
        assert_eq!((forked_process_keeps(), PRIVATE.all().count()), (0, places));
    }
}
