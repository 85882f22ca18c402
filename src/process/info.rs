//! Names, pids and kinds of processes: this one and its parent.
#![forbid(unsafe_code)]

use crate::error::{Error, Explained, Result, Topic};
use crate::os::{fork, pidfd, reactor};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};

/// How a child process is made.
///
/// ```
/// use multiprocess::{Process, StartMethod, current_process};
/// # fn main() -> multiprocess::Result<()> { multiprocess::run(async {
/// let method = || current_process().start_method();
/// let mut child = Process::builder().start_method(StartMethod::Spawn).spawn(method, ())?;
/// assert_eq!(child.join().await?, Some(StartMethod::Spawn));
/// # Ok(()) }) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum StartMethod {
    /// Forks a small process that has loaded the program and run the [`preload`](crate::preload) functions. Fast: well below
    /// a millisecond.
    #[default]
    ForkServer,
    /// Executes the program again. The child has a memory layout of its own and nothing is preloaded. Some ten times slower.
    Spawn,
}

/// Name, pid and kind of a process of this program.
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
    /// Returns the name that its starter gave it; `MainProcess` for the root.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns `true` if it is a daemon: its starter kills a daemon at its own end, and waits for any other child.
    pub fn is_daemon(&self) -> bool {
        self.daemon
    }

    /// Returns how it was started; `None` for the root.
    pub fn start_method(&self) -> Option<StartMethod> {
        self.start_method
    }
}

/// The process that started this one; see [`parent_process`].
///
/// When the parent ends, the kernel kills this process. So a child normally sees its parent alive.
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
    watch: Watch,
}

impl ParentProcess {
    /// Returns its name; see [`ProcessInfo::name`].
    pub fn name(&self) -> &str {
        self.info.name()
    }

    /// Returns its process id; see [`ProcessInfo::pid`].
    pub fn pid(&self) -> u32 {
        self.info.pid()
    }

    /// Returns `true` if it is a daemon; see [`ProcessInfo::is_daemon`].
    pub fn is_daemon(&self) -> bool {
        self.info.is_daemon()
    }

    /// Returns `true` if it still runs.
    pub fn is_alive(&self) -> bool {
        match &self.watch {
            Watch::Open(pidfd) => !pidfd::has_exited(pidfd.as_fd()),
            Watch::Ended => false,
            // The kernel ends this process with its parent.
            Watch::Refused(_) => true,
        }
    }

    /// Waits until it has ended.
    ///
    /// Cancel safe: dropping the future changes nothing.
    ///
    /// # Errors
    /// - `Other` outside a tokio runtime.
    /// - `Io` if the runtime has no I/O driver, or if this process has no descriptor left.
    pub async fn wait(&self) -> Result<()> {
        match &self.watch {
            Watch::Open(pidfd) => until_exit(pidfd.as_fd().try_clone_to_owned()?).await,
            Watch::Ended => Ok(()),
            Watch::Refused(error) => {
                Err(Error::io(format!("cannot watch the parent process {}", self.pid()), Explained::again(error)))
            }
        }
    }
}

/// How a process watches its parent.
#[derive(Clone, Debug)]
enum Watch {
    Open(Arc<OwnedFd>),
    Ended,
    /// The kernel refused a descriptor for it.
    Refused(Arc<std::io::Error>),
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

/// Set once in a new child: its own name and pid, and its parent's.
struct Birth {
    info: ProcessInfo,
    parent: ProcessInfo,
}

static BIRTH: OnceLock<Birth> = OnceLock::new();

/// Stores the info of this process and its parent. Called once, in a new child.
pub(super) fn born(info: ProcessInfo, parent: ProcessInfo) {
    // A process is born once; a second call would be ignored.
    let _ = BIRTH.set(Birth { info, parent });
}

/// Returns the name, pid and kind of this process.
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

/// Returns the process that started this one, or `None` in the root.
///
/// ```
/// assert!(multiprocess::parent_process().is_none());
/// ```
pub fn parent_process() -> Option<ParentProcess> {
    let info = BIRTH.get()?.parent.clone();
    // The kernel ends this process with its parent, so the pid has not been used again.
    let watch = match pidfd::open(info.pid) {
        Ok(pidfd) => Watch::Open(Arc::new(pidfd)),
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ESRCH as i32) => Watch::Ended,
        Err(error) => Watch::Refused(Arc::new(error)),
    };
    Some(ParentProcess { info, watch })
}

/// Returns how many CPUs this process may use, with its affinity and the quota of its control group counted in.
///
/// ```
/// assert!(multiprocess::cpu_count() >= 1);
/// ```
pub fn cpu_count() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The error of a call that needs a tokio runtime.
pub(super) fn needs_runtime(what: &str) -> Error {
    let why = format!("{what} needs a tokio runtime with I/O enabled around it (multiprocess::run makes one)");
    Error::other(why).explained_by(Topic::NoRuntime)
}
