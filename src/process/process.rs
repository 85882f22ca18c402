//! The public type of a child: starts a process, awaits the result of its function.
#![forbid(unsafe_code)]

use super::children::{self, Child};
use super::info::ProcessInfo;
use super::outcome::Outcome;
use super::reports::{Cause, Inbox, Reports};
use super::role;
use super::stdio::Streams;
use super::trace::{Read, TraceInbox};
use super::watch::Watch;
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::sync::{lock, unpoisoned};
use crate::os::{fork, pidfd, spawn};
use rustix::process::Signal;
use serde::de::DeserializeOwned;
use std::io::{self, PipeReader, PipeWriter};
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::Interest;

/// A handle to a child process that runs a function, and a future of the function's result.
///
/// Use instead:
/// - [`Pool`](crate::Pool) for many short tasks;
/// - [`Group`](crate::Group) for children that belong together;
/// - [`ProcessBuilder::restart`](crate::ProcessBuilder::restart) for a child that is started again when it fails.
///
/// [`spawn`](Self::spawn) starts one. Awaiting the handle is the same as [`join`](Self::join).
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
/// # Drop
/// Dropping the handle detaches the child, as with tokio's `JoinHandle`: the child goes on and leaves no zombie. With
/// [`kill_on_drop`](crate::ProcessBuilder::kill_on_drop) the drop kills it.
///
/// # Death
/// - A child is killed when the process that spawned it ends for any reason, SIGKILL included. Exceptions: a child that closes
///   all its descriptors, executes another program, or gives up the uid 0 of a user namespace.
/// - Awaiting a child that is killed or aborts fails with `ProcessDied`; the error has its exit status. Locks that it held are recovered.
/// - If the fork server is killed, children go on. The next one is started at once, or at the next spawn.
///
/// # What a child inherits
/// | attribute | as it is at | to change it |
/// |---|---|---|
/// | environment, working directory, standard streams | the spawn | [`ProcessBuilder`](crate::ProcessBuilder) |
/// | umask, all resource limits | the spawn | [`umask`](crate::ProcessBuilder::umask), [`memory_limit`](crate::ProcessBuilder::memory_limit), [`descriptor_limit`](crate::ProcessBuilder::descriptor_limit) |
/// | nice value, CPUs | the spawn, those of the parent's main thread | [`nice`](crate::ProcessBuilder::nice), [`cpus`](crate::ProcessBuilder::cpus) |
/// | user, groups, capabilities and the other rights | the spawn, those of the thread that spawns | give them up before the spawn |
/// | `oom_score_adj`, control group, scheduling policy, I/O priority, NUMA policy, personality, session keyring, process group and session | the start of the fork server, at the first `preload` or spawn | the function itself |
/// | open descriptors, memory, threads, timers, locks, signal mask (nothing is blocked), `PR_SET_DUMPABLE` | never | arguments, the function itself |
///
/// A value that the child may not set stays as it was when the fork server started: without a privilege no nice value can be
/// lowered again. Children have the `oom_score_adj` that this process had when the fork server
/// started; to protect this process alone, change it after the first spawn. Nice value and CPUs come from the main thread, because runtime threads may be pinned to single CPUs.
///
/// # Rights
/// A child has at most the rights that the spawning thread has at the spawn: user and group ids,
/// supplementary groups, capabilities, `no_new_privs`, seccomp filters, root directory and namespaces.
///
/// - If they have changed since the last spawn, a new fork server is started, which takes as long as the first one did.
///   Earlier children keep their rights; `kill` and the other signals still reach them.
/// - `/proc` must be mounted, and the pid namespace must be the one of this process. Otherwise the spawn is an error.
/// - A change of Landlock rules, or of the profile of another security module, is noticed if it forbids the thread to inspect
///   its fork server in `/proc`. A change of seccomp filters is noticed by their number.
/// - The session keyring, and `PR_SET_MDWE` that was set after the first spawn, are not compared: a child has those of the fork server.
/// - A thread whose user or group for files differs from its effective one (`setfsuid`) gets an error.
/// - Threads of one process may differ (`capset`, `unshare`, a bare `setresuid`). A pool spawns from any thread of its
///   runtime.
pub struct Process<R> {
    child: Arc<Child>,
    reports: Mutex<Reports>,
    watch: Watch,
    report_watch: Watch,
    /// A copy of the connection to the server that reaps it, once that is worth watching.
    server_watch: (Option<Arc<OwnedFd>>, Watch),
    streams: Streams,
    kill_on_drop: Option<KillOnDrop>,
    /// The spans and events of the child, if somebody listens.
    traces: Option<Arc<TraceInbox>>,
    result: PhantomData<fn() -> R>,
}

/// Kills its process when it is dropped, unless that has ended.
struct KillOnDrop(Option<Arc<Child>>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        // It is not the child of a process that was forked from its parent.
        if let Some(child) = self.0.as_ref().filter(|_| !fork::is_forked()) {
            // It fails only for one that has ended.
            let _ = child.signal(Signal::KILL);
        }
    }
}

impl<R: DeserializeOwned + 'static> Process<R> {
    /// Waits for the result of the function.
    ///
    /// Normally that is when the process ends. If the function leaves blocking tasks (`spawn_blocking`) or children behind, the
    /// process waits for these, and `join` returns before it ends. The result is returned once; later calls fail with `Other`.
    ///
    /// Cancel safe: dropping the future changes nothing, and `join` can be called again.
    ///
    /// # Errors
    /// - `Panicked` if the function panicked.
    /// - `ProcessDied`, with the exit status, if the process ended before its function returned.
    /// - `MemoryLimit` if an allocation failed at its [`memory_limit`](crate::ProcessBuilder::memory_limit).
    /// - `Encode` if the result cannot be serialized in the child; `Decode` if the arguments or the result cannot be read.
    /// - `Spawn` if the process cannot apply an option of its builder, such as a nice value.
    /// - `Io` if the result cannot be received, for example because the runtime has no I/O driver or no descriptor is left.
    /// - `Other` if the result was taken before, or outside a tokio runtime.
    /// - `Forked` in a process that the program made by `fork`.
    ///
    /// The function's own error is not among these: it is inside the returned value.
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
        ready!(self.poll_traces(context));
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
                    children::unlist_child(&self.child);
                }
                Outcome::read(parcel)
            }
            Inbox::Failed(error) => Err(Error::io(format!("cannot receive the result of {}", self.label()), error)),
            Inbox::Taken => {
                let why = format!("the result of {} was already taken", self.label());
                Err(Error::other(why).explained_by(Topic::ResultTaken))
            }
            Inbox::Empty => {
                let status = ready!(self.poll_status(context))?;
                children::unlist_child(&self.child);
                Err(self.died(status))
            }
        })
    }
}

/// Kills a process, for code that does not hold its handle.
#[derive(Clone)]
pub(crate) struct Killer(Arc<Child>);

impl Killer {
    pub(crate) fn kill(&self) -> io::Result<()> {
        self.0.signal(Signal::KILL)
    }

    /// Notes that it was asked to end: at its own end this process waits for it for so long, and then kills it.
    pub(crate) fn leaves_within(&self, time: Duration) {
        self.0.leaves_within(time);
    }
}

impl<R> Process<R> {
    pub(super) fn new(
        child: Arc<Child>,
        socket: OwnedFd,
        streams: Streams,
        kill_on_drop: bool,
        traces: Option<Arc<TraceInbox>>,
    ) -> Self {
        Self {
            kill_on_drop: kill_on_drop.then(|| KillOnDrop(Some(child.clone()))),
            child,
            reports: Mutex::new(Reports::over(socket)),
            watch: Watch::UNWATCHED,
            report_watch: Watch::UNWATCHED,
            server_watch: (None, Watch::UNWATCHED),
            streams,
            traces,
            result: PhantomData,
        }
    }

    pub(crate) fn killer(&self) -> Killer {
        Killer(self.child.clone())
    }

    pub(crate) fn info(&self) -> &ProcessInfo {
        &self.child.info
    }

    /// Drops the handle without killing the child, even with `kill_on_drop`.
    pub(super) fn detach(mut self) {
        if let Some(KillOnDrop(child)) = &mut self.kill_on_drop {
            *child = None;
        }
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.info.pid
    }

    /// Returns the name from [`ProcessBuilder::name`](crate::ProcessBuilder::name), or `Process-` and a number.
    pub fn name(&self) -> &str {
        &self.child.info.name
    }

    /// Returns `true` if it is a [daemon](crate::ProcessBuilder::daemon).
    pub fn is_daemon(&self) -> bool {
        self.child.info.daemon
    }

    /// Returns `true` if it still runs.
    pub fn is_alive(&self) -> bool {
        self.child.is_alive()
    }

    /// Returns the exit status, or `None` while the process runs, or if the status is lost because the fork server was killed first.
    ///
    /// **Blocks** right after the end of the process until it is reaped: for up to 50 ms, or 500 ms if this process inherits orphans.
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

    /// Sends SIGINT, as Ctrl-C does. Does nothing if the process has ended.
    ///
    /// # Errors
    /// `Io` if the signal is not permitted; `Forked` in a process forked from the one that spawned it.
    pub fn interrupt(&self) -> Result<()> {
        self.signal(Signal::INT)
    }

    /// Sends SIGTERM. Does nothing if the process has ended.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{self as mp, ErrorKind};
    /// use std::time::Duration;
    /// let mut child = mp::Process::spawn(std::thread::sleep, (Duration::from_secs(60),))?;
    /// child.terminate()?;
    /// assert_eq!(child.join().await.unwrap_err().kind(), ErrorKind::ProcessDied);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Io` if the signal is not permitted; `Forked` in a process forked from the one that spawned it.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Sends SIGKILL and does not wait for the end. Does nothing if the process has ended.
    ///
    /// # Errors
    /// `Io` if the signal is not permitted; `Forked` in a process forked from the one that spawned it.
    pub fn kill(&self) -> Result<()> {
        self.signal(Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        self.check_forked("signal")?;
        self.child.signal(signal).map_err(|error| Error::io(format!("cannot signal {}", self.label()), error))
    }

    /// Waits until the process has ended and returns its exit status.
    ///
    /// It may be called any number of times, before or after [`join`](Self::join). Cancel safe: dropping the future changes
    /// nothing.
    ///
    /// # Errors
    /// - `ProcessDied` if the exit status is lost because the fork server was killed first.
    /// - `Other` outside a tokio runtime.
    /// - `Io` if the runtime has no I/O driver, or if this process has no descriptor left.
    /// - `Forked` in a process forked from the one that spawned it.
    pub async fn wait(&mut self) -> Result<ExitStatus> {
        std::future::poll_fn(|context| {
            self.check_forked("wait for")?;
            ready!(self.poll_exit(context))?;
            self.reports().read_exit(&self.child);
            ready!(self.poll_traces(context));
            let status = ready!(self.poll_status(context))?;
            children::unlist_child(&self.child);
            Poll::Ready(status.ok_or_else(|| self.died(None)))
        })
        .await
    }

    /// Takes the write end of the child's standard input; `None` if it is not [piped](crate::Stdio::piped) or was taken.
    ///
    /// `tokio::net::unix::pipe::Sender::from_owned_fd` makes it a tokio writer. Drop the writer to send end-of-file.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{Process, Stdio};
    /// use std::io::Write;
    /// let length = || std::io::read_to_string(std::io::stdin()).unwrap().len();
    /// let mut child = Process::builder().stdin(Stdio::piped()).spawn(length, ())?;
    /// let mut input = child.take_stdin().expect("it was piped");
    /// input.write_all(b"hello")?;
    /// drop(input); // the end of its input
    /// assert_eq!(child.await?, 5);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn take_stdin(&mut self) -> Option<PipeWriter> {
        self.streams.stdin.take()
    }

    /// Takes the read end of the child's standard output; `None` if it is not [piped](crate::Stdio::piped) or was taken.
    ///
    /// A child that writes more than the pipe holds, 64 KiB, waits until it is read. `tokio::net::unix::pipe::Receiver::from_owned_fd`
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

    /// Takes the read end of the child's standard error; see [`take_stdout`](Self::take_stdout).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{Process, Stdio};
    /// let complain = || eprintln!("no such page");
    /// let mut child = Process::builder().stderr(Stdio::piped()).spawn(complain, ())?;
    /// let errors = child.take_stderr().expect("it was piped");
    /// assert_eq!(std::io::read_to_string(errors)?, "no such page\n");
    /// child.await?;
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn take_stderr(&mut self) -> Option<PipeReader> {
        self.streams.stderr.take()
    }

    /// Fails in a process forked from the one that started the child: only that one gets the result.
    fn check_forked(&self, doing: &str) -> Result<()> {
        fork::check().map_err(|error| Error::io(format!("cannot {doing} {}", self.label()), error))
    }

    fn label(&self) -> String {
        format!("process {} (pid {})", self.name(), self.pid())
    }

    fn died(&self, status: Option<ExitStatus>) -> Error {
        let (how, topic) = match status {
            // An exit code of the function has no meaning for this crate.
            Some(status) if self.child.is_born() || self.reports().is_born => (status.to_string(), None),
            Some(status) => role::how_it_ended(status),
            None => {
                ("its exit status is not known, because the fork server was killed before it could tell".into(), None)
            }
        };
        match self.cause() {
            Some(cause) => {
                let message = format!("{} ended before its function returned: {cause} ({how})", self.label());
                let error = Error::new(cause.kind(), message).explained_by(cause.topic()).with_exit_status(status);
                cause.panic().cloned().into_iter().fold(error, Error::with_panic)
            }
            None => {
                let message = format!("{} ended before its function returned: {how}", self.label());
                let error = Error::new(ErrorKind::ProcessDied, message).with_exit_status(status);
                error.explained_by(topic.unwrap_or(Topic::Died))
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

    /// Ready when a process that has sent its outcome has not ended.
    fn poll_lingers(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        let interest = self.report_interest();
        loop {
            let reports = unpoisoned(self.reports.get_mut());
            if let Some(status) = reports.read() {
                self.child.set_status(status);
            }
            if reports.lingers {
                return Poll::Ready(Ok(()));
            }
            // A process that has hung up ends, and its end wakes us.
            let Some(socket) = &reports.socket else { return Poll::Pending };
            ready!(self.report_watch.poll(context, socket, interest))?;
        }
    }

    /// Ready when what the child has recorded by `tracing` until now is replayed.
    fn poll_traces(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(traces) = &self.traces else { return Poll::Ready(()) };
        traces.add_dropped(std::mem::take(&mut unpoisoned(self.reports.get_mut()).dropped_traces));
        match ready!(traces.poll_read(context)) {
            Read::All | Read::Over => Poll::Ready(()),
            Read::Some | Read::Busy => {
                context.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }

    /// If the child reports its own exit, it closes the socket after the outcome, and we wait for the hang-up only. If the fork
    /// server also holds the other end, the child sends a message instead.
    fn report_interest(&self) -> Interest {
        if self.child.reports_exit { Interest::READABLE } else { Interest::PRIORITY }
    }

    /// Returns the cause of its end, if it reported one before it ended.
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
                // The kernel has the status once the process is reaped. If the server is gone, init reaps it.
                if self.ask_kernel(Duration::ZERO) || !self.child.has_server() && self.ask_kernel(REAPED_SOON) {
                    return Poll::Ready(Ok(self.child.status()));
                }
                // The pidfd is readable when it is reaped. A server that is killed first reaps nothing, and init need not.
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
            // A copy, as the connection may be watched already, and no descriptor can be registered twice.
            none => match self.child.copy_of_connection() {
                Ok(copy) => none.insert(Arc::new(copy)),
                Err(_) => {
                    // Without a descriptor for that it polls again soon, after the other tasks.
                    pidfd::wait(self.child.pidfd.as_fd(), true, Some(LOOK_AGAIN));
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
            },
        };
        watch.poll(context, line, Interest::PRIORITY)
    }

    /// Asks for the status of an ended process, and waits `patience` for it to be reaped. `true`: there is no more to ask.
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
                    // This kernel gives the status only to the parent, which may be this process by now.
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
            // A server closes its connections first and leaves its children to this process after that, without a notification.
            pidfd::wait(pidfd, true, Some(if inherits { left.min(LOOK_AGAIN) } else { left }));
        }
    }
}

/// Longer than a reaper needs; the longest wait if nobody reaps the child.
const REAPED_SOON: Duration = Duration::from_millis(50);

/// The longest wait in a process that inherits the children of a server that is ending, which may have no CPU at the moment.
const INHERITED_SOON: Duration = Duration::from_millis(500);
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Reaps `child` if the server is gone before it has reported its status. As init or subreaper, this process inherits the child
/// once the server, which has closed its sockets, has ended.
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
