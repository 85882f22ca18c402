//! What a fresh process finds out about itself before `main` goes on: root, fork server or child.
//!
//! A process that is started to take a role knows it by its mark, and is told it over a socket (`role`). It takes the role
//! or ends; it never returns to `main`.
#![forbid(unsafe_code)]

use super::entry::{self, Call};
use super::function::{Function, captures_nothing};
use super::protocol::{self, Answer, Ready, Role};
use super::{child, info, name_cleaner, role, server};
use crate::error::{Error, ErrorKind, Result};
use crate::os::spawn::{self, SingleThreaded};
use crate::os::sync::lock;
use crate::os::{image, rights, signal};
use crate::shm::family::Family;
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

/// What a process that can spawn has from its start.
pub(super) struct Origin {
    /// The program's file, which stays the running one when another takes its name.
    pub(super) program: OwnedFd,
    /// Closed when the root ends. `None` in the root itself.
    pub(super) root_lifeline: Option<OwnedFd>,
    /// Where the fork server takes new connections. `None` in the root.
    pub(super) intake: Option<OwnedFd>,
}

static ORIGIN: OnceLock<io::Result<Origin>> = OnceLock::new();

pub(super) fn set_origin(origin: Origin) {
    // A process boots once.
    let _ = ORIGIN.set(Ok(origin));
}

/// This process's origin, or why it cannot spawn.
pub(super) fn origin() -> Result<&'static Origin> {
    match ORIGIN.get() {
        Some(Ok(origin)) => Ok(origin),
        Some(Err(error)) => {
            let why = format!("cannot open this program by /proc/self/exe, which children start from: {error}");
            Err(Error::new(ErrorKind::Spawn, why))
        }
        None => {
            let why = format!(
                "this program cannot start processes yet: wrap its main in `multiprocess::run(async {{ .. }})`, or call \
                 `multiprocess::init()` as the first line of main, or, in a test or bench crate, put \
                 `multiprocess::test_support!();` at the top of the file{}",
                image::copies_as_cause()
            );
            Err(Error::new(ErrorKind::NotInitialized, why))
        }
    }
}

/// What to say of a process of this program that ended before it took its role, where the dynamic loader may be the cause:
/// started as `ld.so ./program`, it finds the program from the working directory of the moment only.
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

/// Prepares a program that builds its own runtime: the first line of `main`.
///
/// It returns only in the program itself. A process that was started to run a function, or to be the fork server,
/// recognises that here, does its work and ends: the rest of `main` never runs twice. Later calls do nothing.
///
/// Children that still run when such a `main` returns are ended with it; [`run`] waits for them.
///
/// # Forking and daemonizing
/// After `init` and before the first use of anything else here a program may fork, or daemonize: both processes can then
/// use the crate, each with children of its own. After the first use the forked process cannot: each call in it is an
/// error of kind [`Forked`](crate::ErrorKind::Forked), or a panic where a call returns no error (`Event::set`), and what it drops
/// is still its parent's. It may exec. One that a child's function forks ends where that function returns or panics. Other handles of pipes and queues stay open in it until it ends, so that their other
/// ends hear of a hang-up only then.
///
/// # What `main` does before
/// It does that in each process that the program starts, too, and the start waits for it, however long it takes; after
/// ten seconds a line on stderr says so. Reading arguments and environment is harmless, and so is changing the
/// environment, the directory, and descriptors that it has opened itself. Standard input is empty there. The first spawn
/// starts one such process; [`StartMethod::Spawn`](crate::StartMethod) starts one for each child, and the first name in
/// `/dev/shm` another one.
///
/// A started process that cannot take its role writes one line to stderr and ends with an exit code from 86 to 90; the
/// spawn is then an error that names the cause. That is so if `main` closes or replaces descriptors that it has not
/// opened, or forks: a program that becomes a daemon calls `init` first, forks after it, and starts its first process
/// after that. If it forks before, its started processes fork there, too, and each spawn fails.
///
/// A descriptor that `main` has opened before stays open in the process that opened it: each started process has its own.
///
/// # Inside `#[tokio::main]`
/// `init` works as the first line there, too. It costs more: each started process builds that runtime before it can
/// take its role, and runs its function on a thread beside it. The multi-thread flavour starts threads, after which the
/// fork server cannot fork safely: every child is then executed afresh, at some ten times the cost, and a line on stderr
/// says so once. The better form is one line: `fn main() { multiprocess::run(async { .. }) }`.
///
/// ```
/// #[tokio::main(flavor = "current_thread")]
/// async fn main() -> multiprocess::Result<()> {
///     multiprocess::init();
///     assert_eq!(multiprocess::Process::spawn(|a: u32, b: u32| a + b, (2, 3))?.await?, 5);
///     Ok(())
/// }
/// ```
///
/// # Rights that the program's file gives
/// A program that is set-user-ID or set-group-ID, or whose file has capabilities, takes no role after an exec that gave
/// it rights, since whoever executed it chose all that it sees. It starts its own processes under `no_new_privs`, so that
/// they have no more rights than it has at that moment. What they execute gains nothing either (`sudo` fails there), and
/// some kernels take effective ids that are not the real ones from them.
///
/// # A runtime of your own
/// ```
/// # #[allow(clippy::needless_doctest_main)]
/// fn main() {
///     multiprocess::init();
///     let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
///     let sum = runtime.block_on(async {
///         multiprocess::Process::spawn(|a: u32, b: u32| a + b, (2, 3)).unwrap().await.unwrap()
///     });
///     assert_eq!(sum, 5);
/// }
/// ```
#[allow(clippy::needless_doctest_main)] // Where in `main` it stands is what the example shows.
pub fn init() {
    // The mark is for life; what has taken its role, or is the program itself, comes by here as often as it likes.
    if ORIGIN.get().is_some() {
        return;
    }
    // There is one role to take: a second thread that comes by here waits for the end of the process.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = lock(&ONE_AT_A_TIME);
    if ORIGIN.get().is_some() {
        return;
    }
    match role::inherited_socket() {
        Ok(None) => {}
        Ok(Some(socket)) => take_role(socket),
        Err(refusal) => refusal.end(),
    }
    role::note_arguments();
    ORIGIN.get_or_init(|| {
        signal::note_ignored();
        raise_descriptor_limit();
        let program = open_program("/proc/self/exe".as_ref())?;
        Ok(Origin { program, root_lifeline: None, intake: None })
    });
}

/// The first call of `main`: drives `future` on a multi-thread tokio runtime and returns its output.
///
/// In a process that the program starts it never returns; [`init`] says what `main` may do before it. Before it returns it waits for the children that are not daemons, then
/// ends the daemons. A child that waits for something which cannot come any more, because `future` has failed say, keeps
/// it waiting; after two seconds it then writes to stderr which children those are. Ctrl-C or SIGTERM ends them all and lets
/// `run` return, also if the program has a handler for these signals. Children that are not worth waiting for are started
/// with [`daemon`](crate::ProcessBuilder::daemon), or with [`kill_on_drop`](crate::ProcessBuilder::kill_on_drop), which
/// ends them with their handle.
///
/// [`shutdown_signal`](crate::shutdown_signal) is how `future` learns that the program is to end.
///
/// ```
/// use multiprocess::{self as mp, Process};
///
/// async fn shout(text: String) -> String {
///     text.to_uppercase()
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         assert_eq!(Process::spawn(shout, ("hello".into(),))?.await?, "HELLO");
///         Ok(())
///     })
/// }
/// ```
///
/// # Panics
/// If the runtime cannot be built, or inside another runtime, as `#[tokio::main]` does.
#[track_caller]
pub fn run<F: Future>(future: F) -> F::Output {
    init();
    if tokio::runtime::Handle::try_current().is_ok() {
        panic!(
            "multiprocess::run was called inside a tokio runtime, but it starts one: call it first in a `main` that is \
             not async, or call `multiprocess::init()` there and await the future yourself"
        );
    }
    let built = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = built.unwrap_or_else(|error| panic!("multiprocess::run cannot build a tokio runtime: {error}"));
    runtime.block_on(async {
        let output = future.await;
        if let Err(error) = info::wait_for_children().await {
            tracing::warn!(%error, "cannot wait for the children that still run; they end with this process");
        }
        output
    })
}

/// Starts children from another file: a copy of this program. Anything else is refused when it answers.
#[doc(hidden)]
pub fn use_program(path: impl Into<PathBuf>) {
    *lock(&PROGRAM) = Some(path.into());
}

/// What a program does that is after the rights of another one.
#[doc(hidden)]
pub fn let_an_exec_give_rights() {
    rights::let_an_exec_give_some();
}

static PROGRAM: Mutex<Option<PathBuf>> = Mutex::new(None);

/// What fork server and exec'd children are started from.
pub(super) fn program() -> Result<OwnedFd> {
    let origin = origin()?;
    let other = lock(&PROGRAM);
    Ok(match &*other {
        Some(path) => open_program(path).map_err(|error| protocol::spawn_error(path.display(), error))?,
        None => origin.program.try_clone()?,
    })
}

fn open_program(path: &std::path::Path) -> io::Result<OwnedFd> {
    spawn::above_standard(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// A handle that waits or travels is a descriptor, so there should be many.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Refused in some sandboxes; then there are fewer.
    let _ = setrlimit(Resource::Nofile, limit);
}

static PRELOAD: Mutex<Vec<Call>> = Mutex::new(Vec::new());

/// Before the first spawn: has the fork server run `f` once before it makes children, so that what `f` loads (into a
/// `static`, say) is shared copy-on-write by all of them.
///
/// It starts the fork server, with the environment, directory and rights of this moment, which begins with `f` at once, and
/// returns. What is preloaded later runs after it, in the order of the calls. So loading goes on beside whatever the program
/// does until it needs a child.
///
/// # What waits
/// A [`Process::spawn`](crate::Process::spawn) while preloads still run waits for them, because its child is a copy of the process that
/// they run in. On a worker thread of a multi-thread runtime the other tasks of that thread move to another one meanwhile
/// ([`tokio::task::block_in_place`]); those of the same task wait, and in a current-thread runtime all do. [`preloaded`](crate::preloaded)
/// awaits the preloads without any of that, and a pool does so by itself before it starts workers.
///
/// They run, and are waited for, once more where another fork server is needed: it was killed, or the thread that spawns has
/// other rights than the one that called `preload`.
///
/// `f` must leave no thread behind: forking would then be unsafe, and every child would be exec'd instead, at some ten times
/// the cost.
///
/// # Errors
/// `NotInitialized` without [`run`](crate::run), [`init`](crate::init) or `test_support!`; `Forked` in a process that was forked from one that
/// uses the crate; one that says so if the fork server makes children already. If `f` panics, each spawn is an error of kind `Spawn`,
/// and so it is if the fork server cannot be started; the next spawn tries again.
///
/// ```
/// use multiprocess::{self as mp, Process};
/// use std::sync::OnceLock;
///
/// static TABLE: OnceLock<Vec<u64>> = OnceLock::new();
/// fn load() { TABLE.get_or_init(|| (0..1000).map(|n| n * n).collect()); }
/// fn look_up(n: usize) -> Option<u64> { Some(TABLE.get()?[n]) }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         mp::preload(load)?;
///         assert_eq!(Process::spawn(look_up, (12,))?.await?, Some(144));
///         assert_eq!(look_up(12), None); // It was loaded in the fork server, not here.
///         Ok(())
///     })
/// }
/// ```
pub fn preload<F, M>(f: F) -> Result<()>
where
    F: Function<(), M, Output = ()>,
{
    const { captures_nothing::<F>() };
    origin()?;
    super::client::preload(Call::of(f))
}

pub(super) fn add_preload(call: Call) {
    lock(&PRELOAD).push(call);
}

pub(super) fn preloads() -> Vec<Call> {
    lock(&PRELOAD).clone()
}

fn take_role(socket: OwnedFd) -> ! {
    let single = SingleThreaded::check();
    spawn::close_leaked();
    let (role, parcel, image) = match role::receive(&socket) {
        Ok(Some(received)) => received,
        Ok(None) => spawn::exit_now(1), // Who started us is gone.
        Err(refusal) => refusal.report(socket.as_fd()).end(),
    };
    role::note_arguments();
    entry::note_panics();
    let refusal = (image != image::fingerprint()).then(other_image);
    if matches!(role, Role::Server { .. }) {
        signal::shield(); // Until it blocks them: what it preloads, and starts for that, is to have nothing blocked.
    }
    match role {
        Role::Server { preload, credentials } => match refusal {
            Some(error) => refuse(socket.as_fd(), error),
            None => match settle(parcel.fds, false).and_then(|()| server::limit(&credentials)) {
                Ok(()) => server::serve(socket, &preload, single),
                Err(error) => refuse(socket.as_fd(), protocol::spawn_error("the fork server cannot start", error)),
            },
        },
        Role::NameCleaner => match refusal {
            Some(error) => refuse(socket.as_fd(), error),
            None => name_cleaner::serve(socket),
        },
        Role::Child { base } => {
            let settled = match refusal {
                Some(error) => Err(error),
                None => (settle(parcel.fds, true).and_then(|()| server::descend_from(base)))
                    .map_err(|error| protocol::spawn_error("cannot start", error)),
            };
            child::after_exec(socket, settled)
        }
    }
}

fn other_image() -> Error {
    let why = format!(
        "the program that was started is not the same build as the one that started it, so no function can run there: was \
         the executable replaced while it ran?{}",
        image::copies_as_cause()
    );
    Error::new(ErrorKind::Spawn, why)
}

fn refuse(socket: BorrowedFd<'_>, error: Error) -> ! {
    // If the starter is gone, nobody needs to know.
    let _ = protocol::send(socket, &Answer::<Ready>::Err(error), &[], &[]);
    spawn::exit_now(1)
}

/// Takes over what every member of the family has: the program, the root's lifeline, the intake (children only; the
/// server makes its own) and the family.
fn settle(fds: Vec<OwnedFd>, has_intake: bool) -> io::Result<()> {
    let mut fds = fds.into_iter();
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "the descriptors of the first message are missing");
    let program = fds.next().ok_or_else(missing)?;
    let root_lifeline = fds.next().ok_or_else(missing)?;
    let intake = if has_intake { Some(fds.next().ok_or_else(missing)?) } else { None };
    Family::join(fds.collect())?;
    if has_intake {
        set_origin(Origin { program, root_lifeline: Some(root_lifeline), intake });
    } else {
        server::prepare_origin(program, root_lifeline)?;
    }
    Ok(())
}

/// Whether this process can start others.
pub(crate) fn check_initialized() -> Result<()> {
    origin().map(drop)
}
