//! The children of this process: a handle for each, the list of those that run, and the wait for them at the end.
#![forbid(unsafe_code)]

use super::info::{ProcessInfo, current_process, until_exit};
use super::protocol::{self, Request};
use super::{shutdown, trace};
use crate::error::{Error, Result, Topic};
use crate::os::sync::lock;
use crate::os::{fork, pidfd, refuse, socket, spawn, timer};
use crate::shm::family::Family;
use rustix::process::Signal;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// A child of this process.
pub(super) struct Child {
    pub(super) info: ProcessInfo,
    pub(super) pidfd: Arc<OwnedFd>,
    /// Its exit is reported by the server, not by the kernel.
    pub(super) reports_exit: bool,
    /// The connection over which it was ordered: hangs up when the server, which reaps the child, is gone.
    server: Arc<OwnedFd>,
    /// It has had its role: how it ended is its own affair. Otherwise its report may still show that.
    is_born: bool,
    status: OnceLock<ExitStatus>,
    /// Never becomes false again.
    has_ended: AtomicBool,
    /// It was asked to end, and has until then.
    leaves_by: OnceLock<Instant>,
}

impl Child {
    pub(super) fn new(
        info: ProcessInfo,
        pidfd: OwnedFd,
        reports_exit: bool,
        server: Arc<OwnedFd>,
        is_born: bool,
    ) -> Self {
        let (status, has_ended, leaves_by) = (OnceLock::new(), AtomicBool::new(false), OnceLock::new());
        Self { info, pidfd: Arc::new(pidfd), reports_exit, server, is_born, status, has_ended, leaves_by }
    }

    /// Notes that it was asked to end, and how long this process waits for that at its own end.
    pub(super) fn leaves_within(&self, time: Duration) {
        // The first call counts.
        let _ = self.leaves_by.set(Instant::now() + time.min(Duration::from_secs(86400)));
    }

    /// The rest of that time.
    pub(super) fn leaves_in(&self) -> Option<Duration> {
        self.leaves_by.get().and_then(|at| at.checked_duration_since(Instant::now()))
    }

    pub(super) fn is_alive(&self) -> bool {
        let has_ended = self.has_ended.load(Relaxed) || pidfd::has_exited(self.pidfd.as_fd());
        if has_ended {
            self.has_ended.store(true, Relaxed);
        }
        !has_ended
    }

    /// Sends a signal. If this process may not, because it has given up rights, or has no such system call (under valgrind),
    /// the server that made the child does it.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd::signal(self.pidfd.as_fd(), signal) {
            Err(error) if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported) => {
                let request = Request::Signal { pid: self.info.pid, signal: signal.as_raw() };
                protocol::try_send(self.server.as_fd(), &request).map_err(|_| error)
            }
            done => done,
        }
    }

    /// Recovers what the dead child held, before this process reports its end.
    pub(super) fn recover(&self) {
        if let Ok(family) = Family::get() {
            family.recover(self.info.pid, self.pidfd.as_fd());
        }
    }

    pub(super) fn has_server(&self) -> bool {
        !socket::is_hung_up(self.server.as_fd())
    }

    pub(super) fn copy_of_connection(&self) -> io::Result<OwnedFd> {
        refuse::at("dup")?;
        self.server.try_clone()
    }

    pub(super) fn is_born(&self) -> bool {
        self.is_born
    }

    pub(super) fn status(&self) -> Option<ExitStatus> {
        self.status.get().copied()
    }

    pub(super) fn set_status(&self, status: ExitStatus) {
        // A second source gives the same status.
        let _ = self.status.set(status);
    }
}

static CHILDREN: Mutex<Children> = Mutex::new(Children { listed: Vec::new(), sweep_at: 0 });

struct Children {
    listed: Vec<Arc<Child>>,
    /// The length at which ended children are removed: twice the number that was left the last time.
    sweep_at: usize,
}

impl Children {
    fn get() -> MutexGuard<'static, Self> {
        lock(&CHILDREN)
    }

    fn sweep(&mut self) {
        self.listed.retain(|child| child.is_alive());
        self.sweep_at = 2 * self.listed.len() + 16;
    }
}

pub(super) fn list_child(child: Arc<Child>) {
    let mut children = Children::get();
    if children.listed.len() >= children.sweep_at {
        children.sweep();
    }
    children.listed.push(child);
}

pub(super) fn unlist_child(child: &Arc<Child>) {
    let mut children = Children::get();
    if let Some(at) = children.listed.iter().position(|listed| Arc::ptr_eq(listed, child)) {
        children.listed.swap_remove(at);
    }
}

pub(super) fn live_children() -> Vec<Arc<Child>> {
    // They belong to another process, one of whose threads may have held the lock at the fork.
    if fork::is_forked() {
        return Vec::new();
    }
    let mut children = Children::get();
    children.sweep();
    children.listed.clone()
}

/// Returns the children of this process that still run.
///
/// ```
/// assert!(multiprocess::active_children().is_empty());
/// ```
pub fn active_children() -> Vec<ProcessInfo> {
    live_children().iter().map(|child| child.info.clone()).collect()
}

/// A process that waits for its children for longer than this writes which ones.
const WARN_AFTER: Duration = Duration::from_secs(2);

/// A child for which this process waits at its end.
pub(super) fn waited_for() -> Option<Arc<Child>> {
    live_children().into_iter().find(is_waited_for)
}

/// True of a daemon only while it was asked to end and has time left.
fn is_waited_for(child: &Arc<Child>) -> bool {
    !child.info.daemon || child.leaves_in().is_some()
}

fn warn_of_children() {
    let children = live_children().into_iter().filter(is_waited_for);
    let names: Vec<_> = children.map(|child| format!("{} (pid {})", child.info.name, child.info.pid)).collect();
    if names.is_empty() {
        return;
    }
    let (me, names) = (current_process(), names.join(", "));
    let text = format!(
        "multiprocess: {} (pid {}) is done and waits for its children to end: {names}. Ctrl-C ends them; what is started \
         with `daemon(true)` is not waited for {}\n",
        me.name,
        me.pid,
        Topic::WaitsForChildren
    );
    // There may be no stderr.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Waits for the children that are not daemons, then kills the daemons. A process does this before it ends.
///
/// A program must not seem to hang: after a while it writes for which children it waits. Ctrl-C ends them all, also if the
/// program has a handler for it.
pub(super) async fn wait_for_children() -> Result<()> {
    let awaited = async {
        while let Some(child) = waited_for() {
            let exit = until_exit(child.pidfd.as_fd().try_clone_to_owned()?);
            match child.leaves_in().filter(|_| child.info.daemon) {
                Some(time) => timer::within(time, exit).await.unwrap_or(Ok(()))?,
                None => exit.await?,
            }
        }
        Ok::<_, Error>(())
    };
    let explain = async {
        timer::sleep(WARN_AFTER).await;
        warn_of_children();
        std::future::pending::<()>().await;
    };
    if waited_for().is_some() {
        tokio::select! {
            biased;
            done = awaited => done?,
            () = shutdown::termination() => {}
            () = explain => {}
        }
    }
    for child in live_children() {
        child.signal(Signal::KILL)?;
        match timer::within(KILL_LIMIT, until_exit(child.pidfd.as_fd().try_clone_to_owned()?)).await {
            Ok(ended) => ended?,
            Err(_) => warn_of_survivor(&child),
        }
    }
    trace::read_rest().await;
    Ok(())
}

/// How long this process waits at its end for one that it has killed.
const KILL_LIMIT: Duration = Duration::from_secs(10);

fn warn_of_survivor(child: &Child) {
    let (name, pid, seconds) = (&child.info.name, child.info.pid, KILL_LIMIT.as_secs());
    spawn::print_line(&format!(
        "{name} (pid {pid}) was to be killed and still runs after {seconds} s; nobody waits for it any longer (may this process, or \
         its fork server, send signals?) {}",
        Topic::CannotKill
    ));
}

/// [`wait_for_children`] for a process without a runtime.
pub(super) fn blocking_wait_for_children() {
    if fork::is_forked() {
        return;
    }
    if Children::get().listed.is_empty() {
        return trace::blocking_read_rest();
    }
    let mut silence = Some(WARN_AFTER);
    while let Some(child) = waited_for() {
        let time = child.leaves_in().filter(|_| child.info.daemon);
        let limit = time.into_iter().chain(silence).min();
        if !pidfd::wait(child.pidfd.as_fd(), false, limit) && limit == silence && silence.take().is_some() {
            warn_of_children();
        }
    }
    for child in live_children() {
        // It fails only for one that has ended.
        let _ = child.signal(Signal::KILL);
        if !pidfd::wait(child.pidfd.as_fd(), false, Some(KILL_LIMIT)) {
            warn_of_survivor(&child);
        }
    }
    trace::blocking_read_rest();
}
