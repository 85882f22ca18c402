//! Threads: all that the crate starts, but for those of its runtimes.

use super::call::of_new_thread;
use super::sync::lock;
use super::{fork, reactor, refuse};
use crate::error::{Explained, Topic};
use nix::sys::signal::{SigSet, SigmaskHow};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};
use tokio::sync::oneshot;

/// This process forks children, and has one thread for that.
static IS_FORBIDDEN: AtomicBool = AtomicBool::new(false);

/// From now on [`start`] fails.
pub(crate) fn forbid() {
    IS_FORBIDDEN.store(true, Relaxed);
}

/// A child of a process that has none may have threads.
pub(super) fn permit() {
    IS_FORBIDDEN.store(false, Relaxed);
}

/// Starts a thread that gets no signals. It fails in the fork server.
pub(crate) fn start(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    start_with_stack(name, 128 << 10, run)
}

/// The same with so many bytes of stack.
pub(crate) fn start_with_stack(name: &str, stack: usize, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    fork::check()?;
    if IS_FORBIDDEN.load(Relaxed) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "this process has one thread"));
    }
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let started = spawn(Builder::new().name(name.into()).stack_size(stack), run);
    before.thread_set_mask()?;
    started.map(drop)
}

/// Starts a thread.
pub(crate) fn spawn<T: Send + 'static>(
    builder: Builder,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    refuse::at("clone")?;
    builder.spawn(run).map_err(of_new_thread)
}

/// Starts a thread that ends before `scope` does.
pub(crate) fn spawn_scoped<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    builder: Builder,
    run: impl FnOnce() -> T + Send + 'scope,
) -> io::Result<ScopedJoinHandle<'scope, T>> {
    refuse::at("clone")?;
    builder.spawn_scoped(scope, run).map_err(of_new_thread)
}

/// Runs `work`, which may block, on a thread of its own inside the present runtime, and sends what it returns. Not by tokio's
/// blocking pool: where no thread can be had, that panics, or keeps the work for ever.
///
/// # Errors
/// No thread can be had, or there is no runtime here.
pub(crate) fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let runtime = tokio::runtime::Handle::try_current().map_err(|error| reactor::no_runtime(error.to_string()))?;
    let (done, result) = oneshot::channel();
    let run = move || {
        let _inside = runtime.enter();
        // Nobody may wait for it.
        let _ = done.send(work());
    };
    spawn(Builder::new().name("mp-blocking".into()), run).map(|_| result)
}

/// Runs `work` on a thread of the runtime's blocking pool, to which the program gives its limit. The handle returns `None` for work that was withdrawn.
///
/// # Errors
/// No thread can be had. tokio panics then, so with `panic = "abort"` the program ends.
pub(crate) fn pooled<T: Send + 'static>(
    runtime: &tokio::runtime::Handle,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<tokio::task::JoinHandle<Option<T>>> {
    refuse::at("clone")?;
    let (run, withdraw) = withdrawable(work);
    catch_unwind(AssertUnwindSafe(|| runtime.spawn_blocking(run))).map_err(|_| {
        // tokio keeps it in its queue, for the next thread.
        withdraw();
        Explained::error(io::ErrorKind::Other, Topic::ProcessLimit, "no thread can be had for it")
    })
}

/// `work`, and a function after which it does not begin any more.
fn withdrawable<T>(work: impl FnOnce() -> T) -> (impl FnOnce() -> Option<T>, impl FnOnce()) {
    let slot = Arc::new(Mutex::new(Some(work)));
    let theirs = slot.clone();
    // Neither is run or dropped with the lock.
    let take = |slot: &Mutex<Option<_>>| lock(slot).take();
    let run = move || take(&theirs).map(|work| work());
    (run, move || drop(take(&slot)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_is_withdrawn_does_not_run_later() {
        let (run, withdraw) = withdrawable(|| 1);
        withdraw();
        assert_eq!(run(), None);
        let (run, withdraw) = withdrawable(|| 1);
        assert_eq!(run(), Some(1));
        withdraw();
    }
}
