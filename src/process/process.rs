//! The face: start a process, await what its function returns.
#![forbid(unsafe_code)]

use super::client::{self, Child, Start};
use super::entry::{Call, Outcome};
use super::function::{Arguments, Function, captures_nothing};
use super::info::{self, ProcessInfo};
use super::protocol::{self, Report, Variables};
use super::role;
use super::stdio::{Stdio, Streams};
use super::task::Work;
use crate::error::{Error, ErrorKind, PanicInfo, Result};
use crate::os::sync::{lock, unpoisoned};
use crate::os::{
    attributes::Attributes,
    fork, pidfd,
    reactor::{self, Watched},
    spawn,
};
use crate::wire::{self, Attachment, Parcel, frame::Begun};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Signal};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::io::{self, PipeReader, PipeWriter};
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::runtime::{Handle, Id};

/// How a child comes to be.
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
    /// Forked from a small process that has loaded the program and what [`preload`](crate::preload) loaded: fast.
    #[default]
    ForkServer,
    /// The program is loaded afresh: its own memory layout, nothing preloaded, some ten times the cost.
    Spawn,
}

/// A child process that runs a function: a handle, and a future of what the function returns.
///
/// Awaiting it is the same as [`join`](Self::join). Dropping it lets the child go on, like tokio's `JoinHandle`, unless
/// [`kill_on_drop`](ProcessBuilder::kill_on_drop) is set; no zombie is left, and the child still ends with the process that spawned it, however that ends.
///
/// ```
/// use multiprocess::{self as mp, Process};
///
/// fn fibonacci(n: u32) -> u64 {
///     if n < 2 { n.into() } else { fibonacci(n - 1) + fibonacci(n - 2) }
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let one = Process::spawn(fibonacci, (20,))?;
///         let other = Process::spawn(fibonacci, (21,))?;
///         assert_eq!(one.await? + other.await?, fibonacci(22));
///         Ok(())
///     })
/// }
/// ```
///
/// # What a child has from its parent
/// | what | of which moment | to change it |
/// |---|---|---|
/// | environment, working directory, standard streams | the spawn | [`ProcessBuilder`] |
/// | umask, all resource limits | the spawn | [`umask`](ProcessBuilder::umask), [`memory_limit`](ProcessBuilder::memory_limit), [`descriptor_limit`](ProcessBuilder::descriptor_limit) |
/// | nice value, CPUs | the spawn, those of the parent's main thread | [`nice`](ProcessBuilder::nice), [`cpus`](ProcessBuilder::cpus) |
/// | user, groups, capabilities and the other rights | the spawn, those of the thread that spawns | give them up before the spawn |
/// | `oom_score_adj`, control group, scheduling policy, process group and session | the start of the fork server, at the first `preload` or spawn | the function itself |
/// | open descriptors, memory, threads, timers, locks | never | arguments |
///
/// What the child may not have stays as it was when the fork server started: without a privilege no nice value can be
/// lowered again. `oom_score_adj` does not follow because a program that protects itself means itself. Main thread and not
/// the calling one: a runtime that ties each of its threads to a CPU would tie all children to the one that spawned them.
///
/// # Rights
/// A child has the rights of the thread that spawns it, as they are at the spawn, or fewer: user and group ids,
/// supplementary groups, capabilities, `no_new_privs`, seccomp filters, the root directory and the namespaces. When they
/// have changed since the last spawn, a new fork server is started, which takes as long as the first one did. Children from before keep
/// what they had; `kill` and the others still reach them. `/proc` must be there, and the pid namespace must be the one
/// of this process, or the spawn is an error. Landlock rules and the profile of another security module are followed where such a thread is
/// refused a look into `/proc` at its fork server; seccomp filters are told apart by their number. A thread may differ from others of its process (`capset`, `unshare`, a bare
/// `setresuid`); a pool spawns from whichever thread of its runtime is free.
///
/// # Errors of the awaited result
/// `Panicked` if the function panicked; `MemoryLimit` if it ended at its limit of memory; `ProcessDied`, with the exit status, if the process ended before the function
/// returned; `Decode` if the arguments or the result could not be read; `Spawn` if the program would not start.
pub struct Process<R> {
    child: Arc<Child>,
    reports: Mutex<Reports>,
    watch: Watch,
    report_watch: Watch,
    /// A copy of the connection to the server that reaps it, once that is worth watching.
    server_watch: (Option<Arc<OwnedFd>>, Watch),
    streams: Streams,
    leash: Option<Leash>,
    result: PhantomData<fn() -> R>,
}

/// Kills its process when it is dropped, unless that has ended.
struct Leash(Option<Arc<Child>>);

impl Drop for Leash {
    fn drop(&mut self) {
        // It is not the child of a process that was forked from its parent.
        if let Some(child) = self.0.as_ref().filter(|_| !fork::is_forked()) {
            // It fails only for one that has ended.
            let _ = child.signal(Signal::KILL);
        }
    }
}

/// What has come over the report socket.
struct Reports {
    socket: Option<Arc<OwnedFd>>,
    /// What has come of a report that is still on its way.
    begun: Option<Begun>,
    outcome: Inbox,
    /// It goes on after its outcome.
    lingers: bool,
    /// Why it ended, as far as it could tell.
    cause: Option<Cause>,
}

/// Why a process ended before its function returned, in its own words.
#[derive(Clone, Debug)]
pub(crate) enum Cause {
    Panicked(PanicInfo),
    /// An allocation failed at this limit of its address space.
    OutOfMemory(u64),
}

impl Cause {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Panicked(_) => ErrorKind::Panicked,
            Self::OutOfMemory(_) => ErrorKind::MemoryLimit,
        }
    }

    pub(crate) fn panic(&self) -> Option<&PanicInfo> {
        match self {
            Self::Panicked(panic) => Some(panic),
            Self::OutOfMemory(_) => None,
        }
    }
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Panicked(panic) => {
                let place = panic.location().map(|place| format!(" at {place}")).unwrap_or_default();
                write!(f, "it panicked{place}, where nothing can catch that: {}", panic.message())
            }
            Self::OutOfMemory(limit) => {
                write!(f, "an allocation failed at its memory_limit (RLIMIT_AS) of {}", in_units(*limit))
            }
        }
    }
}

fn in_units(bytes: u64) -> String {
    match bytes % (1 << 20) {
        0 => format!("{} MiB", bytes >> 20),
        _ => format!("{bytes} bytes"),
    }
}

enum Inbox {
    Empty,
    Arrived(Parcel),
    Failed(io::Error),
    Taken,
}

impl<R: DeserializeOwned + 'static> Process<R> {
    /// Starts a process that runs `f(args..)`. Returns as soon as it exists; it does not wait for the function.
    ///
    /// It takes well below a millisecond, but for the first one, which starts the fork server, as one does after that was killed or
    /// the rights of the thread have changed: that takes some milliseconds, and as long as what is given to
    /// [`preload`](crate::preload) has not run yet. [`preloaded`](crate::preloaded) awaits that without a thread that stands.
    ///
    /// # Errors
    /// `NotInitialized` without [`run`](crate::run), [`init`](crate::init) or `test_support!`; `Encode` if an
    /// argument cannot be serialised; `Spawn` if the process cannot be started.
    pub fn spawn<F, A, M>(f: F, args: A) -> Result<Self>
    where
        F: Function<A, M, Output = R>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        ProcessBuilder::default().spawn(f, args)
    }

    /// What the function returns, once the process has ended. A process whose function has left blocking tasks
    /// (`spawn_blocking`) or children of its own behind goes on until these are done; its result is there before.
    ///
    /// Cancel safe: dropped, or overrun by a timeout, it has changed nothing and may be called again. A result can be
    /// had once.
    pub async fn join(&mut self) -> Result<R> {
        std::future::poll_fn(|context| self.poll_join(context)).await
    }

    fn poll_join(&mut self, context: &mut Context<'_>) -> Poll<Result<R>> {
        self.check_forked("join")?;
        let has_ended = match self.poll_exit(context) {
            Poll::Ready(ended) => {
                ended?;
                self.reports().read_exit(&self.child);
                true
            }
            Poll::Pending => {
                ready!(self.poll_lingers(context))?;
                false
            }
        };
        let inbox = {
            let mut reports = self.reports();
            match reports.outcome {
                Inbox::Empty => Inbox::Empty,
                _ => std::mem::replace(&mut reports.outcome, Inbox::Taken),
            }
        };
        Poll::Ready(match inbox {
            Inbox::Arrived(parcel) => {
                if has_ended {
                    info::unlist_child(&self.child);
                }
                Outcome::read(parcel)
            }
            Inbox::Failed(error) => Err(Error::io(format!("cannot receive the result of {}", self.who()), error)),
            Inbox::Taken => Err(Error::other(format!("the result of {} was already taken", self.who()))),
            Inbox::Empty => {
                let status = ready!(self.poll_status(context))?;
                info::unlist_child(&self.child);
                Err(self.died(status))
            }
        })
    }
}

impl Process<()> {
    /// The options of a new process.
    ///
    /// ```
    /// use multiprocess::{self as mp, Process};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let variable = || std::env::var("COLOR").unwrap_or_default();
    /// let mut child = Process::builder().name("painter").env("COLOR", "blue").spawn(variable, ())?;
    /// assert_eq!(child.name(), "painter");
    /// assert_eq!(child.join().await?, "blue");
    /// # Ok(()) }) }
    /// ```
    pub fn builder() -> ProcessBuilder {
        ProcessBuilder::default()
    }
}

/// Kills a process, for those who do not hold its handle.
#[derive(Clone)]
pub(crate) struct Killer(Arc<Child>);

impl Killer {
    pub(crate) fn kill(&self) -> io::Result<()> {
        self.0.signal(Signal::KILL)
    }

    /// It has been told to end: this process, at its own end, waits for it for so long before it kills it.
    pub(crate) fn leaves_within(&self, time: Duration) {
        self.0.leaves_within(time);
    }
}

impl<R> Process<R> {
    pub(crate) fn killer(&self) -> Killer {
        Killer(self.child.clone())
    }

    pub(crate) fn info(&self) -> &ProcessInfo {
        &self.child.info
    }

    /// Lets go of it, also if it was to be killed when it is dropped.
    pub(super) fn detach(mut self) {
        if let Some(Leash(child)) = &mut self.leash {
            *child = None;
        }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.info.pid
    }

    /// The name it was given, or `Process-` and a number.
    pub fn name(&self) -> &str {
        &self.child.info.name
    }

    /// Whether it is ended, rather than waited for, when the process that spawned it ends.
    pub fn is_daemon(&self) -> bool {
        self.child.info.daemon
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        self.child.is_alive()
    }

    /// How it ended; `None` while it runs, and if nobody can tell because the fork server was killed first.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        if self.child.status().is_some() || fork::is_forked() || self.is_alive() {
            return self.child.status();
        }
        self.child.recover();
        if self.child.reports_exit {
            let is_over = self.reports().read_exit(&self.child);
            if is_over {
                reap_inherited(&self.child);
            }
        } else {
            self.ask_kernel(REAPED_SOON);
        }
        self.child.status()
    }

    /// Sends SIGINT. To one that has ended: nothing.
    pub fn interrupt(&self) -> Result<()> {
        self.signal(Signal::INT)
    }

    /// Sends SIGTERM. To one that has ended: nothing.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Sends SIGKILL. To one that has ended: nothing.
    pub fn kill(&self) -> Result<()> {
        self.signal(Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        self.check_forked("signal")?;
        self.child.signal(signal).map_err(|error| Error::io(format!("cannot signal {}", self.who()), error))
    }

    /// Waits for the bare exit: any number of times, before or after [`join`](Self::join). Cancel safe.
    pub async fn wait(&mut self) -> Result<ExitStatus> {
        std::future::poll_fn(|context| {
            self.check_forked("wait for")?;
            ready!(self.poll_exit(context))?;
            let status = ready!(self.poll_status(context))?;
            info::unlist_child(&self.child);
            Poll::Ready(status.ok_or_else(|| self.died(None)))
        })
        .await
    }

    /// Our end of the child's standard input, if it is piped. `tokio::net::unix::pipe::Sender::from_owned_fd`
    /// makes it a tokio writer.
    pub fn take_stdin(&mut self) -> Option<PipeWriter> {
        self.streams.stdin.take()
    }

    /// Our end of the child's standard output, if it is piped. `tokio::net::unix::pipe::Receiver::from_owned_fd`
    /// makes it a tokio reader:
    ///
    /// ```
    /// use multiprocess::{self as mp, Process, Stdio};
    /// use tokio::{io::AsyncReadExt, net::unix::pipe};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let mut child = Process::builder().stdout(Stdio::piped()).spawn(|| println!("hi"), ())?;
    /// let mut stdout = pipe::Receiver::from_owned_fd(child.take_stdout().expect("piped").into())?;
    /// let mut text = String::new();
    /// stdout.read_to_string(&mut text).await?;
    /// assert_eq!(text, "hi\n");
    /// # Ok(()) }) }
    /// ```
    pub fn take_stdout(&mut self) -> Option<PipeReader> {
        self.streams.stdout.take()
    }

    /// The same of its standard error.
    pub fn take_stderr(&mut self) -> Option<PipeReader> {
        self.streams.stderr.take()
    }

    /// What it has sent is for the process that started it.
    fn check_forked(&self, doing: &str) -> Result<()> {
        fork::check().map_err(|error| Error::io(format!("cannot {doing} {}", self.who()), error))
    }

    fn who(&self) -> String {
        format!("process {} (pid {})", self.name(), self.pid())
    }

    fn died(&self, status: Option<ExitStatus>) -> Error {
        let how = match status {
            Some(status) => role::how_it_ended(status),
            None => "its exit status is not known, because the fork server was killed before it could tell".into(),
        };
        match self.cause() {
            Some(cause) => {
                let message = format!("{} ended before its function returned: {cause} ({how})", self.who());
                let error = Error::new(cause.kind(), message).with_exit_status(status);
                cause.panic().cloned().into_iter().fold(error, Error::with_panic)
            }
            None => {
                let message = format!("{} ended before its function returned: {how}", self.who());
                Error::new(ErrorKind::ProcessDied, message).with_exit_status(status)
            }
        }
    }

    fn reports(&self) -> MutexGuard<'_, Reports> {
        lock(&self.reports)
    }

    /// Ready when the process has ended.
    fn poll_exit(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        while self.child.is_alive() {
            ready!(self.watch.poll(context, &self.child.pidfd, Interest::READABLE))?;
        }
        self.child.recover();
        Poll::Ready(Ok(()))
    }

    /// Ready when a process that has not ended has sent its outcome, and goes on.
    fn poll_lingers(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let interest = self.report_interest();
        loop {
            let reports = unpoisoned(self.reports.get_mut());
            if let Some(status) = reports.read() {
                self.child.set_status(client::status_of(status));
            }
            if reports.lingers {
                return Poll::Ready(Ok(()));
            }
            // One that has hung up ends, and its end wakes us.
            let Some(socket) = &reports.socket else { return Poll::Pending };
            ready!(self.report_watch.poll(context, socket, interest))?;
        }
    }

    /// A child that goes on after its outcome hangs up, which needs no wake-up for the outcome itself. But where the server
    /// has the other end as well it says so.
    fn report_interest(&self) -> Interest {
        if self.child.reports_exit { Interest::READABLE } else { Interest::PRIORITY }
    }

    /// Why it ended, as far as it could tell. For one that has ended.
    pub(crate) fn cause(&self) -> Option<Cause> {
        let mut reports = self.reports();
        reports.read_exit(&self.child);
        reports.cause.clone()
    }

    /// Ready when the status of a process that has ended is known, or known to be lost.
    fn poll_status(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<ExitStatus>>> {
        loop {
            if self.child.status().is_some() {
                return Poll::Ready(Ok(self.child.status()));
            }
            if self.child.reports_exit {
                let is_over = self.reports().read_exit(&self.child);
                if is_over {
                    reap_inherited(&self.child);
                    return Poll::Ready(Ok(self.child.status()));
                }
                let reports = unpoisoned(self.reports.get_mut());
                let Some(socket) = &reports.socket else { return Poll::Ready(Ok(None)) };
                ready!(self.report_watch.poll(context, socket, Interest::READABLE))?;
            } else {
                // Only the process that reaps it makes the kernel tell; if that was the server and it is gone, init does it now.
                if self.ask_kernel(Duration::ZERO) || !self.child.has_server() && self.ask_kernel(REAPED_SOON) {
                    return Poll::Ready(Ok(self.child.status()));
                }
                // The pidfd tells when it is reaped. A server that is killed first reaps nothing, and init need not.
                let reaped = self.watch.poll(context, &self.child.pidfd, Interest::READABLE)?;
                let gone = self.poll_server_gone(context)?;
                if reaped.is_pending() && gone.is_pending() {
                    return Poll::Pending;
                }
            }
        }
    }

    /// Ready after each event at the connection to the server that reaps the process: its end is one.
    fn poll_server_gone(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let (line, watch) = &mut self.server_watch;
        let line = match line {
            Some(line) => line,
            // A copy of its own, as the connection may be watched already, and no descriptor can be twice.
            none => match self.child.copy_of_connection() {
                Ok(copy) => none.insert(Arc::new(copy)),
                Err(_) => {
                    // Without a descriptor for that it looks again soon, after the other tasks.
                    pidfd::wait(self.child.pidfd.as_fd(), true, Some(LOOK_AGAIN));
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
            },
        };
        watch.poll(context, line, Interest::PRIORITY)
    }

    /// Asks for the status of an ended process, and gives whoever reaps it `patience`. `true`: there is no more to ask.
    fn ask_kernel(&self, patience: Duration) -> bool {
        let pidfd = self.child.pidfd.as_fd();
        let inherits = spawn::inherits_orphans();
        let patience = if inherits && !patience.is_zero() { INHERITED_SOON } else { patience };
        let deadline = Instant::now() + patience;
        loop {
            // As init of a container this process gets the children of a server that was killed.
            if !patience.is_zero()
                && let Some(status) = pidfd::reap(pidfd)
            {
                self.child.set_status(status);
                return true;
            }
            match pidfd::exit(pidfd) {
                pidfd::Exit::Known(status) => {
                    self.child.set_status(status);
                    return true;
                }
                pidfd::Exit::Unknown => {
                    // Such a kernel tells nobody but the parent, which may be this process by now.
                    pidfd::reap(pidfd).into_iter().for_each(|status| self.child.set_status(status));
                    return true;
                }
                pidfd::Exit::NotReaped if patience.is_zero() => return false,
                pidfd::Exit::NotReaped => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            // A server closes its connections first and leaves its children to this process after that; nothing tells when.
            pidfd::wait(pidfd, true, Some(if inherits { left.min(LOOK_AGAIN) } else { left }));
        }
    }
}

/// Far longer than a reaper needs, and short enough for who has none.
const REAPED_SOON: Duration = Duration::from_millis(50);

/// The same for a process that surely gets the children of a server that is ending, which may have no CPU at the moment.
const INHERITED_SOON: Duration = Duration::from_millis(500);
const LOOK_AGAIN: Duration = Duration::from_millis(1);

impl Reports {
    /// Reads what is there of a process that has ended.
    fn read(&mut self) -> Option<i32> {
        let mut was_reset = false;
        while let Some(socket) = &self.socket {
            match Report::recv(socket.as_fd(), &mut self.begun) {
                Ok(Some(Report::Born(_))) => {}
                Ok(Some(Report::Outcome(parcel))) => {
                    self.outcome = Inbox::Arrived(parcel);
                }
                Ok(Some(Report::Lingers)) => self.lingers = true,
                Ok(Some(Report::Panicked(panic))) => self.cause = Some(Cause::Panicked(panic)),
                Ok(Some(Report::OutOfMemory(limit))) => self.cause = Some(Cause::OutOfMemory(limit)),
                Ok(Some(Report::Exited(status))) => {
                    self.socket = None;
                    return Some(status);
                }
                Ok(None) => self.socket = None,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                // Something of ours it has not read; what it has sent is still there.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset && !was_reset => was_reset = true,
                Err(error) => {
                    // A child killed halfway has sent nothing; what else it may be is told.
                    self.socket = None;
                    if !was_reset && error.kind() != io::ErrorKind::InvalidData {
                        self.outcome = Inbox::Failed(error);
                    }
                }
            }
        }
        None
    }

    /// Reads on for the exit status; `true` if there is nothing more to come.
    fn read_exit(&mut self, child: &Child) -> bool {
        if let Some(status) = self.read() {
            child.set_status(client::status_of(status));
        }
        if !child.reports_exit && !matches!(self.outcome, Inbox::Empty) {
            self.socket = None;
        }
        self.socket.is_none()
    }
}

/// The server is gone before it has told how `child` ended, if the status is not known. As init of a container, or of its
/// part of one, this process gets the child to reap: once the server, which has let go of its sockets, is gone altogether.
fn reap_inherited(child: &Child) {
    let deadline = Instant::now() + INHERITED_SOON;
    while child.status().is_none() {
        if let Some(status) = pidfd::reap(child.pidfd.as_fd()) {
            return child.set_status(status);
        }
        if !spawn::inherits_orphans() || Instant::now() >= deadline {
            return;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// A descriptor watched by the reactor of the runtime that polls, whichever that is at the moment.
struct Watch(Option<(Id, Watched<Arc<OwnedFd>>)>);

impl Watch {
    /// Ready after each event; the caller then looks for itself.
    fn poll(&mut self, context: &mut Context<'_>, fd: &Arc<OwnedFd>, interest: Interest) -> Poll<Result<()>> {
        let here = Handle::try_current().map_err(|_| info::needs_runtime("awaiting a process"))?.id();
        if self.0.as_ref().is_some_and(|(id, _)| *id != here) {
            self.0 = None;
        }
        loop {
            let (_, watched) = match &mut self.0 {
                Some(watched) => watched,
                none => {
                    client::watch_server();
                    none.insert((here, reactor::watch(fd.clone(), interest)?))
                }
            };
            match ready!(watched.poll_read_ready(context)) {
                Ok(mut event) => {
                    event.clear_ready();
                    return Poll::Ready(Ok(()));
                }
                // The runtime it was registered with is gone, and this one has got its id.
                Err(_) => self.0 = None,
            }
        }
    }
}

impl<R: DeserializeOwned + 'static> Future for Process<R> {
    type Output = Result<R>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_join(context)
    }
}

impl<R> std::fmt::Debug for Process<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Process").field("name", &self.name()).field("pid", &self.pid()).finish_non_exhaustive()
    }
}

/// The options of a new process; see [`Process::builder`].
#[derive(Debug, Default)]
#[must_use = "nothing starts before `spawn`"]
pub struct ProcessBuilder {
    name: Option<String>,
    daemon: Option<bool>,
    start_method: StartMethod,
    variables: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
    attributes: Attributes,
    stdio: [Stdio; 3],
    is_shielded: bool,
    backtraces: Option<bool>,
    kill_on_drop: bool,
    own_group: bool,
}

impl ProcessBuilder {
    /// What it is called in errors and by `current_process`. Default, also for an empty name: `Process-` and a number.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into()).filter(|name: &String| !name.is_empty());
        self
    }

    /// Whether it is ended (true) or waited for (false) when the process that spawns it ends. Default: what that
    /// process is itself; the root is none.
    pub fn daemon(mut self, daemon: bool) -> Self {
        self.daemon = Some(daemon);
        self
    }

    /// Whether it leads a process group of its own, all of which the kernel kills when the process that spawned it ends,
    /// however that ends. Default: false, and then only the child itself is killed.
    ///
    /// With it what the child starts by `fork` or `std::process::Command` ends too, and the child also ends after it has
    /// executed another program: such programs inherit one more descriptor, by which the kernel knows. Who leaves
    /// the group (`setsid`, `setpgid`), is another user by then, or was left as the last with that descriptor
    /// closed, goes on. When only the child ends, its group goes on until its parent ends. What a terminal sends to its
    /// foreground group (Ctrl-C) does not reach the child, and it cannot read from that terminal.
    ///
    /// ```
    /// use multiprocess::{self as mp, Process};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let convert = || std::process::Command::new("true").status().is_ok_and(|status| status.success());
    /// assert!(Process::builder().own_group(true).spawn(convert, ())?.await?);
    /// # Ok(()) }) }
    /// ```
    pub fn own_group(mut self, own_group: bool) -> Self {
        self.own_group = own_group;
        self
    }

    /// How it comes to be. Default: [`StartMethod::ForkServer`].
    pub fn start_method(mut self, method: StartMethod) -> Self {
        self.start_method = method;
        self
    }

    /// Sets an environment variable, beyond those that this process has at the spawn.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.variables.push((key.as_ref().into(), value.as_ref().into()));
        self
    }

    /// Its working directory. Default: that of this process at the spawn.
    pub fn current_dir(mut self, directory: impl AsRef<Path>) -> Self {
        self.directory = Some(directory.as_ref().into());
        self
    }

    /// Limits its address space to `bytes`: an allocation beyond fails there, and usually aborts it. Default: the limit
    /// of this process at the spawn, as for the other limits.
    pub fn memory_limit(mut self, bytes: u64) -> Self {
        self.attributes.limit(Resource::As, bytes);
        self
    }

    /// Limits how many descriptors it may have. One that already has more keeps them.
    pub fn descriptor_limit(mut self, descriptors: u64) -> Self {
        self.attributes.limit(Resource::Nofile, descriptors);
        self
    }

    /// Its nice value, from -20 to 19; less than that of this process needs a privilege. Default: that of this process
    /// at the spawn.
    ///
    /// ```
    /// use multiprocess::{self as mp, Process};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let stat = || std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    /// let stat = Process::builder().nice(15).umask(0o077).memory_limit(8 << 30).spawn(stat, ())?.await?;
    /// assert_eq!(stat.split(' ').nth(18), Some("15"));
    /// # Ok(()) }) }
    /// ```
    pub fn nice(mut self, nice: i32) -> Self {
        self.attributes.nice = Some(nice);
        self
    }

    /// Ties it to these CPUs; none means the default: those of this process at the spawn.
    pub fn cpus(mut self, cpus: impl IntoIterator<Item = usize>) -> Self {
        self.attributes.cpus = Some(cpus.into_iter().collect()).filter(|cpus: &Vec<usize>| !cpus.is_empty());
        self
    }

    /// Which permissions the files that it makes do not have (see `umask(2)`). Default: as for this process at the spawn.
    pub fn umask(mut self, mask: u32) -> Self {
        self.attributes.umask = Some(mask & 0o777);
        self
    }

    /// Its standard input. Default: that of this process at the spawn.
    pub fn stdin(mut self, stdin: Stdio) -> Self {
        self.stdio[0] = stdin;
        self
    }

    /// Its standard output. Default: that of this process at the spawn.
    pub fn stdout(mut self, stdout: Stdio) -> Self {
        self.stdio[1] = stdout;
        self
    }

    /// Its standard error. Default: that of this process at the spawn.
    pub fn stderr(mut self, stderr: Stdio) -> Self {
        self.stdio[2] = stderr;
        self
    }

    /// Whether [`PanicInfo::backtrace`](crate::PanicInfo::backtrace) has the stack of a panic. Default: as the child's
    /// environment says (`RUST_LIB_BACKTRACE`, or else `RUST_BACKTRACE`, set and not 0). It costs 60 to 500 ms at the first
    /// panic of each process, for symbols, and memory.
    ///
    /// ```
    /// use multiprocess::{self as mp, Process};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// fn fails() { panic!("no") }
    /// let error = Process::builder().backtraces(true).spawn(fails, ())?.await.unwrap_err();
    /// assert!(error.panic().expect("it panicked").backtrace().contains("fails"));
    /// # Ok(()) }) }
    /// ```
    pub fn backtraces(mut self, keep: bool) -> Self {
        self.backtraces = Some(keep);
        self
    }

    /// Whether it is killed when its [`Process`] is dropped before it has ended; default: false. An error or a
    /// cancellation that drops the handle then leaves nothing that runs on, and nothing that [`run`](crate::run) waits for.
    /// The drop sends SIGKILL and does not wait for the end.
    ///
    /// ```
    /// use multiprocess::{self as mp, Process};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let forever = std::future::pending::<()>;
    /// let child = Process::builder().kill_on_drop(true).spawn(forever, ())?;
    /// drop(child); // Without `kill_on_drop`, `run` would wait for it.
    /// # Ok(()) }) }
    /// ```
    pub fn kill_on_drop(mut self, kill: bool) -> Self {
        self.kill_on_drop = kill;
        self
    }

    /// Whether it is left alone by the signals that are sent to a whole group: SIGINT (Ctrl-C), SIGTERM (`systemctl stop`
    /// sends it to each process of a service), SIGHUP and SIGQUIT do nothing in it, so that the process that spawns it
    /// can decide; see [`shutdown_signal`](crate::shutdown_signal). [`terminate`](Process::terminate) and
    /// [`interrupt`](Process::interrupt) then do nothing either, [`kill`](Process::kill) does. Programs that it executes
    /// start with the default actions. So it is from the moment at which the spawn returns. Default: false; the workers of a pool and the process of a manager are shielded.
    ///
    /// ```
    /// use multiprocess::{self as mp, Process};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let (mut tx, rx) = mp::simplex::<u32>()?;
    /// let next = async |mut rx: mp::Receiver<u32>| rx.recv().await;
    /// let mut child = Process::builder().shield_signals(true).spawn(next, (rx,))?;
    /// child.interrupt()?; // As a Ctrl-C in its terminal would.
    /// tx.send(5).await?;
    /// assert_eq!(child.join().await??, 5);
    /// # Ok(()) }) }
    /// ```
    pub fn shield_signals(mut self, shield: bool) -> Self {
        self.is_shielded = shield;
        self
    }

    /// Starts it; see [`Process::spawn`].
    pub fn spawn<F, A, M>(self, f: F, args: A) -> Result<Process<F::Output>>
    where
        F: Function<A, M>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        let call = Call::of(f);
        let message = wire::encode(&args)?;
        let args = message.needed(args);
        self.start(call, message.payload_of(args.as_ref()), &message.attachments)
    }

    /// The same options for another process.
    pub(crate) fn again(&self) -> Result<Self> {
        let mut stdio = <[Stdio; 3]>::default();
        for (again, once) in stdio.iter_mut().zip(&self.stdio) {
            let copied = once.again().map_err(|error| Error::io("a standard stream cannot be used again", error))?;
            let why = "a process that is started again cannot have a standard stream that is piped to this process: use                        Stdio::inherit, Stdio::null or a file";
            *again = copied.ok_or_else(|| Error::new(ErrorKind::Spawn, why))?;
        }
        let Self { daemon, start_method, is_shielded, backtraces, kill_on_drop, own_group, .. } = *self;
        let (name, variables, directory) = (self.name.clone(), self.variables.clone(), self.directory.clone());
        let attributes = self.attributes.clone();
        Ok(Self {
            name,
            daemon,
            start_method,
            variables,
            directory,
            attributes,
            stdio,
            is_shielded,
            backtraces,
            kill_on_drop,
            own_group,
        })
    }

    /// With the name that it gets if it was given none.
    pub(crate) fn named(mut self) -> Self {
        self.name.get_or_insert_with(default_name);
        self
    }

    pub(crate) fn name_or_default(&self) -> &str {
        self.name.as_deref().unwrap_or("Process")
    }

    /// Starts one that runs a task.
    pub(crate) fn start_work<R>(self, work: &Work) -> Result<Process<R>> {
        self.start(work.call, work.arguments.bytes(), work.arguments.attachments())
    }

    /// Starts one that runs what is encoded.
    pub(super) fn start<R>(self, call: Call, arguments: &[u8], attachments: &[Attachment]) -> Result<Process<R>> {
        let name = self.name.unwrap_or_else(default_name);
        if let Some((key, _)) = self.variables.iter().find(|(key, value)| !spawn::is_variable(key, value)) {
            let why = format!("process {name} cannot be started: {key:?} cannot be an environment variable");
            return Err(Error::new(ErrorKind::Spawn, why));
        }
        let cpus = self.attributes.cpus.iter().flatten();
        if let Some(cpu) = cpus.copied().find(|cpu| *cpu >= rustix::thread::CpuSet::MAX_CPU) {
            let why = format!("process {name} cannot be started: there is no CPU {cpu} to tie it to");
            return Err(Error::new(ErrorKind::Spawn, why));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = self.directory.as_deref().map(|path| {
            rustix::fs::open(path, flags, Mode::empty()).map_err(|error| {
                protocol::spawn_error(format!("directory {} of process {name}", path.display()), error.into())
            })
        });
        let mut streams = Streams::open(self.stdio)
            .map_err(|error| protocol::spawn_error(format!("the standard streams of process {name}"), error))?;
        let (child, socket) = client::start(&Start {
            call,
            name: &name,
            daemon: self.daemon.unwrap_or_else(|| info::current_process().daemon),
            start_method: self.start_method,
            variables: self.variables.into_iter().collect::<Variables>(),
            is_shielded: self.is_shielded,
            leads_group: self.own_group,
            backtraces: self.backtraces,
            directory: directory.transpose()?,
            attributes: self.attributes,
            streams: streams.theirs(),
            arguments,
            attachments: attachments.iter().map(AsFd::as_fd).collect(),
        })?;
        streams.let_go();
        Ok(Process {
            leash: self.kill_on_drop.then(|| Leash(Some(child.clone()))),
            child,
            reports: Mutex::new(Reports {
                socket: Some(Arc::new(socket)),
                begun: None,
                outcome: Inbox::Empty,
                lingers: false,
                cause: None,
            }),
            watch: Watch(None),
            report_watch: Watch(None),
            server_watch: (None, Watch(None)),
            streams,
            result: PhantomData,
        })
    }
}

/// The name of a process that was given none.
fn default_name() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(1);
    format!("Process-{}", COUNT.fetch_add(1, Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::socket::{self, Wait};

    #[test]
    fn what_a_child_has_sent_is_read_though_it_ended_with_something_unread() {
        let (ours, theirs) = socket::packet_pair().unwrap();
        crate::wire::frame::send(ours.as_fd(), &[b"never read"], &[], Wait::Yes).unwrap();
        Report::send_outcome(theirs.as_fd(), &Outcome::error(Error::other("no"))).unwrap();
        drop(theirs);
        let mut reports =
            Reports { socket: Some(Arc::new(ours)), begun: None, outcome: Inbox::Empty, lingers: false, cause: None };
        assert_eq!(reports.read(), None);
        assert!(matches!(reports.outcome, Inbox::Arrived(_)) && reports.socket.is_none());
    }

    #[test]
    fn a_child_that_was_killed_with_something_unread_has_sent_nothing() {
        let (ours, theirs) = socket::packet_pair().unwrap();
        crate::wire::frame::send(ours.as_fd(), &[b"never read"], &[], Wait::Yes).unwrap();
        drop(theirs);
        let mut reports =
            Reports { socket: Some(Arc::new(ours)), begun: None, outcome: Inbox::Empty, lingers: false, cause: None };
        assert_eq!(reports.read(), None);
        assert!(matches!(reports.outcome, Inbox::Empty) && reports.socket.is_none());
    }
}
