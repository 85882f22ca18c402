//! tokio's reactor: a descriptor that wakes a task.
//!
//! tokio panics where a runtime was built without the driver that is asked for, and has no way to ask first. So that one
//! call is caught, and the panic hook does not see it. In a program built with `panic = "abort"` nothing can be caught:
//! there the hook prints tokio's message, and the program ends.

use super::fork;
use super::sync::lock;
use crate::error::{Explained, Topic};
use std::any::Any;
use std::cell::Cell;
use std::collections::HashSet;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio::io::{Interest, unix::AsyncFd};
use tokio::runtime::{Handle, Id};
use tokio::time::Sleep;

/// Registers `fd` with the reactor of the current runtime.
///
/// # Errors
/// Outside a runtime, and in one that was built without I/O.
pub(crate) fn watch(fd: Arc<OwnedFd>, interest: Interest) -> io::Result<Watched<Arc<OwnedFd>>> {
    or_error(|| {
        super::refuse::at("epoll_ctl")?;
        // SAFETY: the `Arc` is moved into the result, so the descriptor stays open, and the same, until it is
        // deregistered.
        Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
    })
    .map(Watched::new)
}

/// A descriptor that is registered with a runtime until it is dropped. A process that was forked from this one drops
/// nothing: it has the same epoll, and would take it from the runtime of this one.
pub(crate) struct Watched<F: AsRawFd>(ManuallyDrop<AsyncFd<F>>);

impl<F: AsRawFd> Watched<F> {
    pub(super) fn new(registered: AsyncFd<F>) -> Self {
        Self(ManuallyDrop::new(registered))
    }
}

impl<F: AsRawFd> Deref for Watched<F> {
    type Target = AsyncFd<F>;

    fn deref(&self) -> &AsyncFd<F> {
        &self.0
    }
}

impl<F: AsRawFd> Drop for Watched<F> {
    fn drop(&mut self) {
        if !fork::is_forked() {
            // SAFETY: here is the only place that drops it, once, and nobody can use it afterwards.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

/// tokio's own timer for `at`, which fires by tokio's clock.
///
/// # Errors
/// Outside a runtime, and in one that was built without a timer.
pub(super) fn timer(at: Instant) -> io::Result<Sleep> {
    let missing = || no_runtime("a timeout needs a tokio runtime with its timer (`enable_all` or `enable_time`)");
    driven(Driver::Time, || Ok(tokio::time::sleep_until(at.into())), missing)
}

/// Whether timeouts can be had here.
pub(crate) fn has_timer() -> io::Result<()> {
    timer(Instant::now()).map(drop)
}

/// Whether sockets, pipes and processes can be waited for here.
pub(crate) fn has_io() -> io::Result<()> {
    match has_been_found(Driver::Io) {
        true => Ok(()),
        false => or_error(|| tokio::net::UnixDatagram::unbound().map(drop)),
    }
}

/// A listener for each later signal of this `kind`. The process gets a handler for it, which calls the previous
/// handler.
///
/// # Errors
/// As [`watch`].
pub(crate) fn signals(kind: tokio::signal::unix::SignalKind) -> io::Result<tokio::signal::unix::Signal> {
    or_error(|| tokio::signal::unix::signal(kind))
}

/// Runs `work`, which blocks this thread for long. On a worker thread of a multi-thread runtime the other tasks of that thread
/// move to another one meanwhile.
pub(crate) fn block_in_place<T>(work: impl FnOnce() -> T) -> T {
    if can_block_in_place() { tokio::task::block_in_place(work) } else { work() }
}

/// Returns `true` if [`block_in_place`] moves the other tasks of this thread.
pub(crate) fn can_block_in_place() -> bool {
    use tokio::runtime::RuntimeFlavor::MultiThread;
    // Code outside a task runs on a thread of the program, which delays no task.
    let is_task = tokio::task::try_id().is_some();
    let is_worker = is_task && Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == MultiThread);
    // Tasks of a `LocalSet` may run on such a thread, too, where tokio panics; that is not known beforehand.
    is_worker && may_block()
}

/// Returns `true` if this thread, which is in a runtime, may be blocked without keeping a task from running. Always false where a panic cannot be caught.
pub(crate) fn may_block() -> bool {
    !cfg!(panic = "abort") && silently(|| tokio::task::block_in_place(|| ())).is_ok()
}

pub(super) fn or_error<T>(register: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let missing = || no_runtime("this needs a tokio runtime with its I/O driver (`enable_all` or `enable_io`)");
    driven(Driver::Io, register, missing)
}

/// The error of what needs a tokio runtime around it.
pub(crate) fn no_runtime(why: impl Into<String>) -> io::Error {
    Explained::error(io::ErrorKind::Other, Topic::NoRuntime, why)
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Driver {
    Io,
    Time,
}

thread_local! {
    /// The runtime that was last found to have each driver: most threads only ever see one.
    static LAST: [Cell<Option<Id>>; 2] = const { [Cell::new(None), Cell::new(None)] };
}

fn driven<T>(
    driver: Driver,
    call: impl FnOnce() -> io::Result<T>,
    missing: impl FnOnce() -> io::Error,
) -> io::Result<T> {
    let Ok(runtime) = Handle::try_current() else { return Err(missing()) };
    let id = runtime.id();
    let has_it = has_been_found(driver);
    // tokio may give the number of a runtime that has ended to another one, so it is caught in any case.
    let called = if has_it { catch_unwind(AssertUnwindSafe(call)) } else { silently(call) };
    match called {
        Ok(result) => {
            if !has_it {
                known(|known| known.insert((id, driver)));
            }
            LAST.with(|last| last[driver as usize].set(Some(id)));
            result
        }
        Err(_) => Err(missing()),
    }
}

/// Returns `true` if the current runtime is known to have it.
fn has_been_found(driver: Driver) -> bool {
    let Ok(id) = Handle::try_current().map(|runtime| runtime.id()) else { return false };
    LAST.with(|last| last[driver as usize].get()) == Some(id) || known(|known| known.contains(&(id, driver)))
}

/// Runtimes that have a driver.
fn known<T>(with: impl FnOnce(&mut HashSet<(Id, Driver)>) -> T) -> T {
    static KNOWN: Mutex<Option<HashSet<(Id, Driver)>>> = Mutex::new(None);
    let mut known = lock(&KNOWN);
    let known = known.get_or_insert_default();
    // A program that makes a runtime for each call must not grow.
    if known.len() >= 1024 {
        known.clear();
    }
    with(known)
}

type Hook = Box<dyn Fn(&PanicHookInfo<'_>) + Sync + Send>;

/// [`catch_unwind`], with a hook for that time that prints nothing for a panic of this thread.
fn silently<T>(call: impl FnOnce() -> T) -> Result<T, Box<dyn Any + Send>> {
    // A hook can be neither taken nor set while a thread panics. And with `panic = "abort"` the message must be printed.
    if cfg!(panic = "abort") || std::thread::panicking() {
        return catch_unwind(AssertUnwindSafe(call));
    }
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = lock(&ONE_AT_A_TIME);
    let (me, before) = (std::thread::current().id(), Arc::new(take_hook()));
    let theirs = before.clone();
    let ours: Hook = Box::new(move |info| {
        if std::thread::current().id() != me {
            theirs(info);
        }
    });
    let place = address(&ours);
    set_hook(ours);
    let called = catch_unwind(AssertUnwindSafe(call));
    let found = take_hook();
    // A hook that was set by other code meanwhile stays.
    if address(&found) != place {
        set_hook(found);
        return called;
    }
    drop(found);
    // Another thread may be in it at this moment, and keeps it until it comes out.
    set_hook(Arc::try_unwrap(before).unwrap_or_else(|before| Box::new(move |info| before(info))));
    called
}

fn address(hook: &Hook) -> *const () {
    (&raw const **hook).cast()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::runtime::Builder;

    #[test]
    fn a_missing_driver_is_an_error_and_the_one_that_is_there_is_found() {
        let bare = Builder::new_current_thread().build().unwrap();
        let timed = Builder::new_current_thread().enable_time().build().unwrap();
        let whole = Builder::new_current_thread().enable_all().build().unwrap();
        for _ in 0..2 {
            let found = [&bare, &timed, &whole].map(|runtime| {
                let _inside = runtime.enter();
                (has_timer().is_ok(), has_io().is_ok())
            });
            assert_eq!(found, [(false, false), (true, false), (true, true)]);
        }
        assert!(has_timer().is_err() && has_io().is_err(), "outside of any");
    }
}
