//! The entry points of a program: `init` and `run`, which find out whether this process is the program itself, and `preload`.
//!
//! A process that was started for a role (fork server, child, name cleaner) has the start tag, and receives the role over a socket
//! (`role`). In `init` it takes the role or ends; it never returns to `main`.
#![forbid(unsafe_code)]

use super::entry::Call;
use super::function::{Function, captures_nothing};
use super::origin::{self, Origin};
use super::protocol::{self, Answer, Ready, Role};
use super::server_start::NoStarts;
use super::{child, children, client, name_cleaner, panics, role, server};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::spawn::{self, SingleThreaded};
use crate::os::sync::lock;
use crate::os::{attributes, exec, image, rights, signal};
use crate::shm::family::Family;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

/// Prepares a program that builds its own runtime. Call it as the first line of `main`; [`run`] calls it by itself.
///
/// It returns only in the program itself. A process that was started to run a function, or to be the fork server,
/// does its work inside this call and ends there, so the rest of `main` never runs twice. Later calls do nothing.
///
/// Children that still run when such a `main` returns are killed; [`run`] waits for them. Use [`run`] instead where nothing else makes the runtime.
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
///
/// # Inside `#[tokio::main]`
/// `init` works as the first line there, too, but costs more. Each started process builds that runtime before it can
/// take its role, and runs its function on a thread beside it. The multi-thread flavour starts threads, after which the
/// fork server cannot fork safely. Every child is then executed afresh, at some ten times the cost, and a line on stderr
/// says so once. The better form is `fn main() { multiprocess::run(async { .. }) }`.
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
/// # Code before `init`
/// Each process that the program starts runs this part of `main`, too, and its start waits for that, however long it takes.
/// After ten seconds a line on stderr says so.
///
/// - Harmless: reading arguments and environment; changing the environment, the directory, and descriptors that
///   `main` itself has opened. Standard input is empty. Each started process has its own copy of a descriptor opened here.
///   A copy of the environment that is kept has `MULTIPROCESS_STARTED`: leave that out where the copy is given to this program again.
/// - An error: closing or replacing descriptors that `main` has not opened, forking, and starting this very program,
///   for example with other arguments. `main` may replace itself by this program (exec), as long as it leaves the
///   descriptors open. A started process that cannot take its role writes one line to stderr and ends with an exit code
///   from 86 to 91; the spawn is an error that names the cause.
/// - Such processes are started by the first spawn, by the first name in `/dev/shm`, and for each child with
///   [`StartMethod::Spawn`](crate::StartMethod).
///
/// # Forking and daemonizing
/// A program that becomes a daemon calls `init` first, forks after it, and starts its first process after that.
///
/// - Forked after `init` and before the first use of anything else here: both processes can use the crate, each with
///   children of its own.
/// - Forked after the first use: the new process cannot use the crate. Each call is an
///   error of kind [`Forked`](crate::ErrorKind::Forked), or a panic where a call returns no error (`Event::set`). Its drops do
///   nothing to shared objects. It may exec, this program too, which is then a program of its own. Its copies of pipe and queue handles stay open until it ends, so the other ends
///   see a hang-up only then.
/// - Made by `_Fork` or a bare `clone`, for which no fork handler runs: noticed at the next spawn, at the first use of
///   a shared object and at the connection to a manager. Before that the crate takes it for the process it was made
///   from. Do not use the crate in such a process.
/// - Forked by a child's function: the new process ends where that function returns or panics.
///
/// # Rights that the program's file gives
/// A program that is set-user-ID or set-group-ID, or whose file has capabilities, takes no role after an exec that gave
/// it rights, because its arguments, environment and descriptors were chosen by another user. It starts its own processes
/// under `no_new_privs`, so they have at most its own rights at that moment. Programs that they execute gain nothing
/// either (`sudo` fails there), and some kernels take away effective ids that differ from the real ones.
#[allow(clippy::needless_doctest_main)] // Where in `main` it stands is what the example shows.
pub fn init() {
    // The start tag stays for life. A process that has taken its role, or is the program itself, may call this again.
    if origin::is_known() {
        return;
    }
    // There is one role to take: a second thread that calls this waits for the end of the process.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = lock(&ONE_AT_A_TIME);
    if origin::is_known() {
        return;
    }
    match role::inherited_socket() {
        Ok(None) => {}
        Ok(Some(socket)) => take_role(socket),
        Err(refusal) => refusal.end(),
    }
    role::note_arguments();
    origin::become_root(|| {
        signal::note_ignored();
        // A handle that waits or travels is a descriptor, so there should be many.
        attributes::raise_descriptor_limit();
    });
}

/// Runs `future` on a new multi-thread tokio runtime and returns its output. Call it first in `main`.
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
/// # At the end
/// Before it returns, `run` waits for all children that are not daemons, and then kills the daemons.
///
/// - After two seconds it writes to stderr which children it waits for. A child may wait for something that never comes, for
///   example because `future` has failed.
/// - Ctrl-C or SIGTERM kills the children and lets `run` return, also if the program has a handler for these signals.
/// - A fork server that still runs preloads then is killed; calls that wait for it fail.
/// - To start a child that `run` does not wait for, use [`daemon`](crate::ProcessBuilder::daemon), or
///   [`kill_on_drop`](crate::ProcessBuilder::kill_on_drop), which ends it with its handle.
///
/// Use [`shutdown_signal`](crate::shutdown_signal) in `future` to learn that the program is asked to end.
///
/// # In started processes
/// In a process that the program starts `run` never returns. See [`init`] for code that may come before it.
///
/// # Panics
/// If the runtime cannot be built, or inside another runtime (`#[tokio::main]`).
#[track_caller]
pub fn run<F: Future>(future: F) -> F::Output {
    init();
    if tokio::runtime::Handle::try_current().is_ok() {
        panic!(
            "multiprocess::run was called inside a tokio runtime, but it starts one: call it first in a `main` that is \
             not async, or call `multiprocess::init()` there and await the future yourself {}",
            Topic::RunInsideARuntime
        );
    }
    let built = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime =
        built.unwrap_or_else(|error| panic!("{}", Error::io("multiprocess::run cannot build a tokio runtime", error)));
    // Also if the future panics.
    let runtime = EndsWithoutStarts(Some(runtime));
    runtime.0.as_ref().expect("it is there until the drop").block_on(async {
        let output = future.await;
        if let Err(error) = children::wait_for_children().await {
            let help = Topic::WaitsForChildren.name();
            tracing::warn!(%error, help, "cannot wait for the children that still run; they end with this process");
        }
        output
    })
}

/// A runtime whose drop waits for its threads, one of which may wait for a preload that never ends.
struct EndsWithoutStarts(Option<tokio::runtime::Runtime>);

impl Drop for EndsWithoutStarts {
    fn drop(&mut self) {
        let no_starts = NoStarts::begin();
        drop(self.0.take());
        drop(no_starts);
    }
}

/// Lets an exec give this process rights, as an attacker would. For tests.
#[doc(hidden)]
pub fn let_an_exec_give_rights() {
    rights::let_an_exec_give_some();
}

/// Runs `f` in the fork server before it makes children, so that all children share the result copy-on-write.
///
/// Call it before the first spawn. `f` typically fills a `static`. The fork server is started at once and runs `f` while the
/// program goes on; further calls run in order after it.
///
/// Use instead:
/// - [`PoolBuilder::state`](crate::PoolBuilder::state) for a connection or a cache, of which each worker needs one of its own;
/// - [`Array`](crate::Array) for data that changes, or that is known only later.
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
///
/// # Waiting
/// - [`preloaded`](crate::preloaded) waits until all preloads have run, without blocking a thread. A pool does that by itself
///   before it starts workers.
/// - A [`Process::spawn`](crate::Process::spawn) that comes earlier blocks its thread until then, because its child is
///   a copy of the process that runs the preloads. On a worker thread of a multi-thread runtime the other tasks of that
///   thread move to another one ([`tokio::task::block_in_place`]). In a current-thread runtime, and in a program built with
///   `panic = "abort"`, the tasks of that thread wait.
/// - Preloads run again, and are waited for again, if another fork server is needed: the first one was killed, or the
///   spawning thread has other rights than the one that called `preload`.
///
/// # Random numbers
/// Every child is a copy of the process that ran `f`, its generators of random numbers included. One of the thread that `f` has used,
/// or the keys of a `HashMap` that it has made, go on alike in all children. Seed a generator anew in each, or draw from the kernel.
/// The same holds for a `HashMap` that `main` makes before it calls [`run`](crate::run) or [`init`](crate::init). Otherwise the keys
/// differ in each child.
///
/// # Cost
/// `f` runs with the environment, directory and rights of the first `preload`. It must leave no thread behind: forking
/// would then be unsafe, and every child would be executed afresh, at some ten times the cost, and without what `f` left.
///
/// # Errors
/// - `NotInitialized` without [`run`](crate::run), [`init`](crate::init) or `test_support!`.
/// - `Forked` in a process forked from one that has used the crate.
/// - `Other` if the fork server makes children already.
///
/// If `f` panics or the fork server cannot be started, later spawns fail with kind `Spawn`; each tries again.
pub fn preload<F, M>(f: F) -> Result<()>
where
    F: Function<(), M, Output = ()>,
{
    const { captures_nothing::<F>() };
    origin::origin()?;
    client::preload(Call::of(f))
}

fn take_role(socket: OwnedFd) -> ! {
    let single = SingleThreaded::check();
    spawn::close_leaked();
    let (role, parcel, image) = match role::receive(&socket) {
        Ok(Some(received)) => received,
        Ok(None) => spawn::exit_now(1), // The starter is gone.
        Err(refusal) => refusal.report(socket.as_fd()).end(),
    };
    exec::forget_starter_variable(single);
    exec::forget_death_signal();
    role::note_arguments();
    panics::note_panics();
    let refusal = (image != image::fingerprint()).then(other_image);
    if matches!(role, Role::Server { .. }) {
        signal::shield(); // Until it blocks them: preloads, and processes that they start, shall have nothing blocked.
    }
    match role {
        Role::Server { preload, credentials } => match refusal {
            Some(error) => refuse(socket.as_fd(), error),
            None => match settle(parcel.fds, false).and_then(|()| origin::limit(&credentials)) {
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
                None => (settle(parcel.fds, true).and_then(|()| origin::descend_from(base)))
                    .map_err(|error| protocol::spawn_error("cannot start", error)),
            };
            child::after_exec(socket, settled)
        }
    }
}

fn other_image() -> Error {
    let why = match image::has_copies() {
        true => format!(
            "another version of the crate `multiprocess` took the role of the process that was started, so no function can run \
             there{}",
            image::copies_as_cause()
        ),
        false => "the program that was started is not the same build as the one that started it, so no function can run there: \
                  was the executable replaced while it ran?"
            .into(),
    };
    Error::new(ErrorKind::Spawn, why).explained_by(image::copies_or(Topic::NotTheSameBuild))
}

fn refuse(socket: BorrowedFd<'_>, error: Error) -> ! {
    // The starter may be gone.
    let _ = protocol::send(socket, &Answer::<Ready>::Err(error), &[], &[]);
    spawn::exit_now(1)
}

/// Takes over the descriptors of every member of the family: the program, the root's lifeline, the intake (children only; the
/// server makes its own) and the family itself.
fn settle(fds: Vec<OwnedFd>, has_intake: bool) -> io::Result<()> {
    let mut fds = fds.into_iter();
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "the descriptors of the first message are missing");
    let program = fds.next().ok_or_else(missing)?;
    let root_lifeline = fds.next().ok_or_else(missing)?;
    let intake = if has_intake { Some(fds.next().ok_or_else(missing)?) } else { None };
    Family::join(fds.collect())?;
    if has_intake {
        origin::set_origin(Origin { program, root_lifeline: Some(root_lifeline), intake });
    } else {
        server::prepare_origin(program, root_lifeline)?;
    }
    Ok(())
}
