//! The means by which a process starts others: the program, the lifeline of the root, and the fork server that it descends from.
#![forbid(unsafe_code)]

use super::entry::Call;
use super::protocol::{self, Base};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::sync::lock;
use crate::os::{credentials::Credentials, exec, image};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock};

/// The descriptors that a process starts others with.
pub(super) struct Origin {
    /// The file of the running program, also after another file has taken its name.
    pub(super) program: OwnedFd,
    /// Closed when the root ends. `None` in the root itself.
    pub(super) root_lifeline: Option<OwnedFd>,
    /// The socket over which the fork server accepts connections. `None` in the root.
    pub(super) intake: Option<OwnedFd>,
}

static ORIGIN: OnceLock<io::Result<Origin>> = OnceLock::new();

pub(super) fn set_origin(origin: Origin) {
    // A process boots once.
    let _ = ORIGIN.set(Ok(origin));
}

/// Returns `true` if this process is booted: `init` has nothing left to do.
pub(super) fn is_known() -> bool {
    ORIGIN.get().is_some()
}

/// Makes this process the root of its program, after `prepare`.
pub(super) fn become_root(prepare: impl FnOnce()) {
    ORIGIN.get_or_init(|| {
        prepare();
        let program = exec::open("/proc/self/exe".as_ref())?;
        Ok(Origin { program, root_lifeline: None, intake: None })
    });
}

/// The origin of this process, or the reason why it cannot spawn.
pub(super) fn origin() -> Result<&'static Origin> {
    match ORIGIN.get() {
        Some(Ok(origin)) => Ok(origin),
        Some(Err(error)) => {
            let why = format!("cannot open this program by /proc/self/exe, which children start from: {error}");
            Err(Error::new(ErrorKind::Spawn, why).explained_by(Topic::NoProc))
        }
        None => {
            let why = format!(
                "this program cannot start processes yet: wrap its main in `multiprocess::run(async {{ .. }})`, or call \
                 `multiprocess::init()` as the first line of main, or, in a test or bench crate, put \
                 `multiprocess::test_support!();` at the top of the file{}",
                image::copies_as_cause()
            );
            Err(Error::new(ErrorKind::NotInitialized, why).explained_by(image::copies_or(Topic::NotInitialized)))
        }
    }
}

/// Fails if this process cannot start others.
pub(crate) fn check_initialized() -> Result<()> {
    origin().map(drop)
}

/// A hint for errors of processes that ended before they took their role: a program started as `ld.so ./program` is found
/// only from the working directory that it was started in. Empty where that is not the cause.
pub(super) fn loader_as_cause() -> String {
    let said = || {
        let loader = std::fs::read_link("/proc/self/exe").ok()?;
        let name = loader.file_name()?.to_str()?;
        let line = std::fs::read("/proc/self/cmdline").ok()?;
        let mut words = line.split(|byte| *byte == 0).skip(1).map(String::from_utf8_lossy);
        let program = words.find(|word| !word.starts_with('-'))?;
        let is_lost = name.starts_with("ld") && name.contains(".so") && !std::fs::exists(&*program).unwrap_or(true);
        let loader = loader.display();
        is_lost.then(|| {
            format!(
                " It was started as `{loader} {program}`, and from the working directory of now there is no {program}: start it \
                 by an absolute path, or without naming the loader."
            )
        })
    };
    said().unwrap_or_default()
}

/// Starts children from another file, which must be a copy of this program. For tests.
#[doc(hidden)]
pub fn use_program(path: impl Into<PathBuf>) {
    *lock(&PROGRAM) = Some(path.into());
}

static PROGRAM: Mutex<Option<PathBuf>> = Mutex::new(None);

/// The file that the fork server and exec'd children are started from.
pub(super) fn program() -> Result<OwnedFd> {
    let origin = origin()?;
    let other = lock(&PROGRAM);
    Ok(match &*other {
        Some(path) => exec::open(path).map_err(|error| protocol::spawn_error(path.display(), error))?,
        None => origin.program.try_clone()?,
    })
}

static PRELOAD: Mutex<Vec<Call>> = Mutex::new(Vec::new());

pub(super) fn add_preload(call: Call) {
    lock(&PRELOAD).push(call);
}

pub(super) fn preloads() -> Vec<Call> {
    lock(&PRELOAD).clone()
}

/// This process is the fork server and runs preload functions.
static IS_PRELOADING: AtomicBool = AtomicBool::new(false);

/// Rights and attributes of the fork server that this process is, or descends from.
static BASE: OnceLock<Base> = OnceLock::new();

/// Rights and attributes of the fork server that this process is, or descends from; `None` in the root.
pub(super) fn base() -> Option<&'static Base> {
    BASE.get()
}

/// Once in an exec'd process: gives up all rights that its starter does not have.
pub(super) fn limit(to: &Credentials) -> io::Result<()> {
    Credentials::limit_to(to)
}

/// The same for a child of the server with this base.
pub(super) fn descend_from(base: Base) -> io::Result<()> {
    limit(&base.credentials)?;
    set_base(base);
    Ok(())
}

/// Notes whether this process, which is a fork server, runs preload functions now.
pub(super) fn set_preloading(yes: bool) {
    IS_PRELOADING.store(yes, Relaxed);
}

/// Once in a fork server: what its children start from, and the origin of this process.
pub(super) fn set_base(base: Base) {
    // A process descends from one server.
    let _ = BASE.set(base);
}

/// Refuses a spawn inside a preload function: it would wait for the server, which waits for the function.
pub(super) fn refuse_in_preload() -> Result<()> {
    match IS_PRELOADING.load(Relaxed) {
        true => {
            let why = "a preload function runs in the fork server, before it can start anything: spawn from the program itself";
            Err(Error::new(ErrorKind::Spawn, why).explained_by(Topic::SpawnInPreload))
        }
        false => Ok(()),
    }
}
