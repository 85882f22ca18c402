//! Threads that do something later, in processes that may have such.

use super::{fork, refuse};
use nix::sys::signal::{SigSet, SigmaskHow};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::*};

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
    fork::check()?;
    refuse::at("clone")?;
    if IS_FORBIDDEN.load(Relaxed) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "this process has one thread"));
    }
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let started = std::thread::Builder::new().name(name.into()).stack_size(128 << 10).spawn(run);
    before.thread_set_mask()?;
    started.map(drop)
}
