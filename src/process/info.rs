//! Who this process is, who started it, and whom it has started.
#![forbid(unsafe_code)]

use super::StartMethod;
use super::client::Child;
use crate::error::{Error, Result};
use crate::os::sync::lock;
use crate::os::{fork, pidfd, reactor, timer};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

/// Name, pid and kind of a process.
///
/// ```
/// let me = multiprocess::current_process();
/// assert_eq!(me.pid(), std::process::id());
/// assert!(!me.is_daemon());
/// println!("{} runs", me.name());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    pub(super) name: String,
    pub(super) pid: u32,
    pub(super) daemon: bool,
    pub(super) start_method: Option<StartMethod>,
}

impl ProcessInfo {
    /// What its starter called it; `MainProcess` at the root.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether its starter ends it, rather than waits for it, at its own end.
    pub fn is_daemon(&self) -> bool {
        self.daemon
    }

    /// How it was started; `None` at the root.
    pub fn start_method(&self) -> Option<StartMethod> {
        self.start_method
    }
}

/// The process that started this one.
///
/// When it ends, this process ends too, so code of a child sees it alive for all practical purposes.
///
/// ```
/// use multiprocess as mp;
///
/// fn orphaned() -> bool {
///     mp::parent_process().is_none_or(|parent| !parent.is_alive())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         assert!(mp::parent_process().is_none());
///         assert!(!mp::Process::spawn(orphaned, ())?.await?);
///         Ok(())
///     })
/// }
/// ```
#[derive(Clone, Debug)]
pub struct ParentProcess {
    info: ProcessInfo,
    pidfd: Option<Arc<OwnedFd>>,
}

impl ParentProcess {
    /// See [`ProcessInfo::name`].
    pub fn name(&self) -> &str {
        self.info.name()
    }

    /// See [`ProcessInfo::pid`].
    pub fn pid(&self) -> u32 {
        self.info.pid()
    }

    /// See [`ProcessInfo::is_daemon`].
    pub fn is_daemon(&self) -> bool {
        self.info.is_daemon()
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        self.pidfd.as_ref().is_some_and(|pidfd| !pidfd::has_exited(pidfd.as_fd()))
    }

    /// Resolves when it has ended.
    pub async fn wait(&self) -> Result<()> {
        match &self.pidfd {
            Some(pidfd) => until_exit(pidfd.as_fd().try_clone_to_owned()?).await,
            None => Ok(()),
        }
    }
}

/// Resolves when the process behind `pidfd` has ended.
pub(super) async fn until_exit(pidfd: OwnedFd) -> Result<()> {
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(needs_runtime("waiting for a process"));
    }
    let watch = reactor::watch(Arc::new(pidfd), tokio::io::Interest::READABLE)?;
    while !pidfd::has_exited(watch.get_ref().as_fd()) {
        watch.readable().await?.clear_ready();
    }
    Ok(())
}

/// What a child knows from birth.
struct Birth {
    info: ProcessInfo,
    parent: ProcessInfo,
}

static BIRTH: OnceLock<Birth> = OnceLock::new();

/// Once, in a new child whose parent was alive a moment ago.
pub(super) fn born(info: ProcessInfo, parent: ProcessInfo) {
    // A process is born once; a second call would be ignored.
    let _ = BIRTH.set(Birth { info, parent });
}

/// This process.
///
/// ```
/// assert_eq!(multiprocess::current_process().pid(), std::process::id());
/// ```
pub fn current_process() -> ProcessInfo {
    match BIRTH.get() {
        Some(birth) if fork::is_forked() => ProcessInfo { pid: std::process::id(), ..birth.info.clone() },
        Some(birth) => birth.info.clone(),
        None => {
            let name = "MainProcess".to_string();
            ProcessInfo { name, pid: std::process::id(), daemon: false, start_method: None }
        }
    }
}

/// The process that started this one, or `None` at the root.
///
/// ```
/// assert!(multiprocess::parent_process().is_none());
/// ```
pub fn parent_process() -> Option<ParentProcess> {
    let info = BIRTH.get()?.parent.clone();
    // As long as we live the parent does, so its pid is its own.
    let pidfd = pidfd::open(info.pid).ok().map(Arc::new);
    Some(ParentProcess { info, pidfd })
}

static CHILDREN: Mutex<Children> = Mutex::new(Children { listed: Vec::new(), sweep_at: 0 });

struct Children {
    listed: Vec<Arc<Child>>,
    /// The length at which the ended ones are thrown out: twice what was left the last time.
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
    // They are not this one's, and another thread may have had the lock when it was forked.
    if fork::is_forked() {
        return Vec::new();
    }
    let mut children = Children::get();
    children.sweep();
    children.listed.clone()
}

/// The children of this process that still run.
///
/// ```
/// assert!(multiprocess::active_children().is_empty());
/// ```
pub fn active_children() -> Vec<ProcessInfo> {
    live_children().iter().map(|child| child.info.clone()).collect()
}

/// A process that waits at its end for longer says for whom.
const WARN_AFTER: Duration = Duration::from_secs(2);

/// A child that keeps this process from ending.
pub(super) fn waited_for() -> Option<Arc<Child>> {
    live_children().into_iter().find(is_waited_for)
}

/// Daemons are, if they have been told to end and have time left.
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
         with `daemon(true)` is not waited for\n",
        me.name, me.pid
    );
    // Without a stderr there is nobody to tell.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Waits for the children that are not daemons, then ends the daemons: what a process does before it goes.
///
/// A program must not seem to hang: after a while it says whom it waits for, and a Ctrl-C ends them all, also if the
/// program has a handler for that.
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
            () = super::shutdown::termination() => {}
            () = explain => {}
        }
    }
    for child in live_children() {
        child.signal(rustix::process::Signal::KILL)?;
        until_exit(child.pidfd.as_fd().try_clone_to_owned()?).await?;
    }
    Ok(())
}

/// [`wait_for_children`] for a process without a runtime.
pub(super) fn blocking_wait_for_children() {
    if fork::is_forked() {
        return;
    }
    if Children::get().listed.is_empty() {
        return;
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
        let _ = child.signal(rustix::process::Signal::KILL);
        pidfd::wait(child.pidfd.as_fd(), false, None);
    }
}

/// The CPUs that this process may use: what affinity and the cgroup's quota leave of the machine.
///
/// ```
/// assert!(multiprocess::cpu_count() >= 1);
/// ```
pub fn cpu_count() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The error of a call that needs a tokio runtime around it.
pub(super) fn needs_runtime(what: &str) -> Error {
    Error::other(format!("{what} needs a tokio runtime with I/O enabled around it (multiprocess::run makes one)"))
}
