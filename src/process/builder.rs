//! The options of a new process, and its start.
#![forbid(unsafe_code)]

use super::client;
use super::entry::Call;
use super::function::{Arguments, Function, captures_nothing};
use super::info::{self, StartMethod};
use super::process::Process;
use super::protocol;
use super::server_link::Start;
use super::stdio::{Stdio, Streams};
use super::task::Work;
use super::trace::{Caller, Traces};
use super::variables::Variables;
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::attributes::{self, Attributes};
use crate::os::{directory, spawn};
use crate::wire::{self, Attachment};
use rustix::process::Resource;
use serde::de::DeserializeOwned;
use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

impl<R: DeserializeOwned + 'static> Process<R> {
    /// Starts a child process that runs `f(args..)`, and returns a handle to it.
    ///
    /// It returns as soon as the process exists. The handle is a future of the result.
    ///
    /// ```
    /// use multiprocess::{self as mp, Process};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let sum = Process::spawn(|a: u32, b: u32| a + b, (2, 3))?;
    /// assert_eq!(sum.await?, 5);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Cost
    /// - Usually well below a millisecond.
    /// - Some milliseconds where it starts the fork server: for the first child, after the server was killed, and after the
    ///   rights of the thread have changed.
    /// - The first spawn also blocks the thread until the [`preload`](crate::preload) functions have run. Await
    ///   [`preloaded`](crate::preloaded) before it to block no thread.
    ///
    /// # Errors
    /// - `NotInitialized` without [`run`](crate::run), [`init`](crate::init) or `test_support!`.
    /// - `Encode` if an argument cannot be serialised.
    /// - `Spawn` if the process cannot be started.
    /// - `Forked` in a process forked from one that has used the crate.
    pub fn spawn<F, A, M>(f: F, args: A) -> Result<Self>
    where
        F: Function<A, M, Output = R>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        ProcessBuilder::default().spawn(f, args)
    }
}

impl Process<()> {
    /// Returns a builder, for a process with options.
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

/// Configures and starts a [`Process`]; made by [`Process::builder`].
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
    keeps_traces: bool,
    caller: Option<Arc<Caller>>,
}

impl ProcessBuilder {
    /// Sets the name that errors, [`current_process`](crate::current_process) and `ps` show. Default, also for an empty
    /// name: `Process-` and a number.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into()).filter(|name: &String| !name.is_empty());
        self
    }

    /// Sets whether the process is a daemon. When the spawning process ends, it kills its daemons and waits for its other
    /// children. Default: `true` in a daemon, `false` otherwise.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{Process, Stdio};
    /// let child = Process::builder()
    ///     .daemon(true)
    ///     .descriptor_limit(256)
    ///     .cpus([0])
    ///     .stdin(Stdio::inherit())
    ///     .spawn(|| 1, ())?;
    /// assert_eq!(child.await?, 1);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn daemon(mut self, daemon: bool) -> Self {
        self.daemon = Some(daemon);
        self
    }

    /// Sets whether the process leads a process group of its own, which the kernel kills as a whole when the spawning process
    /// ends. Default: false; then only the child itself is killed.
    ///
    /// With an own group:
    ///
    /// - Processes that the child starts by `fork` or `std::process::Command` end with the spawning process, too, and so does the
    ///   child after it has executed another program. These programs inherit one more descriptor: the kernel kills the group when
    ///   the other end of it is closed.
    /// - A process goes on if it leaves the group (`setsid`, `setpgid`), becomes another user, or is the last one and has
    ///   closed that descriptor.
    /// - When only the child ends, the rest of its group goes on until the spawning process ends.
    /// - Signals of a terminal to its foreground group (Ctrl-C) do not reach the child, and it cannot read from that terminal.
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

    /// Sets how the process is made. Default: [`StartMethod::ForkServer`].
    pub fn start_method(mut self, method: StartMethod) -> Self {
        self.start_method = method;
        self
    }

    /// Sets an environment variable of the process. It has all others that this process has at the spawn.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.variables.push((key.as_ref().into(), value.as_ref().into()));
        self
    }

    /// Sets the working directory. Default: the one of this process at the spawn.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let here = || std::env::current_dir().unwrap();
    /// let child = multiprocess::Process::builder().current_dir("/").spawn(here, ())?;
    /// assert_eq!(child.await?, std::path::Path::new("/"));
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn current_dir(mut self, directory: impl AsRef<Path>) -> Self {
        self.directory = Some(directory.as_ref().into());
        self
    }

    /// Limits the address space to `bytes` (`RLIMIT_AS`). A larger allocation fails, which usually aborts the process; awaiting it
    /// then fails with `MemoryLimit`. Default: the limit of this process at the spawn, as for all other limits.
    ///
    /// `bytes` is the soft limit. The hard limit is 64 MiB plus four times the size of the program's file above it, because the
    /// report of a panic may need that much for its backtrace.
    pub fn memory_limit(mut self, bytes: u64) -> Self {
        self.attributes.limit(Resource::As, bytes);
        self
    }

    /// Limits the number of descriptors (`RLIMIT_NOFILE`). Descriptors that the process has above the limit stay open.
    pub fn descriptor_limit(mut self, descriptors: u64) -> Self {
        self.attributes.limit(Resource::Nofile, descriptors);
        self
    }

    /// Sets the nice value, from -20 to 19. A lower value than this process has needs a privilege. Default: the value of this
    /// process at the spawn.
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

    /// Binds the process to these CPUs. Default, also for an empty list: the CPUs of this process at the spawn.
    pub fn cpus(mut self, cpus: impl IntoIterator<Item = usize>) -> Self {
        self.attributes.cpus = Some(cpus.into_iter().collect()).filter(|cpus: &Vec<usize>| !cpus.is_empty());
        self
    }

    /// Sets the permissions that files made by the process do not get (`umask(2)`). Default: the mask of this process at the
    /// spawn.
    pub fn umask(mut self, mask: u32) -> Self {
        self.attributes.umask = Some(mask & 0o777);
        self
    }

    /// Sets the standard input. Default: the one of this process at the spawn.
    pub fn stdin(mut self, stdin: Stdio) -> Self {
        self.stdio[0] = stdin;
        self
    }

    /// Sets the standard output. Default: the one of this process at the spawn.
    pub fn stdout(mut self, stdout: Stdio) -> Self {
        self.stdio[1] = stdout;
        self
    }

    /// Sets the standard error. Default: the one of this process at the spawn.
    pub fn stderr(mut self, stderr: Stdio) -> Self {
        self.stdio[2] = stderr;
        self
    }

    /// Sets whether [`PanicInfo::backtrace`](crate::PanicInfo::backtrace) contains the stack of a panic. Default: if the
    /// child's environment has `RUST_LIB_BACKTRACE`, or else `RUST_BACKTRACE`, set and not 0. It costs memory, and
    /// 60 to 500 ms at the first panic of each process, for symbols.
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

    /// Sets whether dropping the [`Process`] kills the child. Default: false.
    ///
    /// With it, an error or a cancellation that drops the handle leaves no process behind, and none that
    /// [`run`](crate::run) waits for. The drop sends SIGKILL and does not wait for the end.
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

    /// Sets whether the `tracing` spans and events of the process reach the subscriber of the spawning process. Default: true.
    ///
    /// They appear there under the span of the spawn, with their levels, targets, fields and places, and a field `process.pid`. All that the process
    /// has recorded is there before its result is.
    ///
    /// ```
    /// use multiprocess::{self as mp, Process};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let work = || tracing::info!(step = 1, "begun"); // Appears in this process's log, if it has one.
    /// Process::spawn(work, ())?.await?;
    /// Process::builder().forward_tracing(false).spawn(work, ())?.await?; // Is dropped, unless the child has a subscriber.
    /// # Ok(()) }) }
    /// ```
    ///
    /// - **Which.** What the main thread of the child records, that is its function and the async tasks of that, at the levels that the subscriber wanted at
    ///   the spawn. Another thread takes part if it is given the subscriber: `tracing::dispatcher::get_default(Clone::clone)`, then `with_default`.
    /// - **Own subscriber.** If the child's program sets a subscriber, in its function or before `init`, that one gets the records, and nothing is
    ///   forwarded.
    /// - **Waiting.** The child never waits for the reader. While that is behind, up to 1 MiB of records wait in the child; further ones
    ///   are dropped, and a warning states their number. With records left the child stays up to 100 ms at its end.
    /// - **Reading.** It is done by a task of the runtime in which `spawn` was called. Outside a runtime nothing is forwarded. It goes on when the
    ///   [`Process`] is dropped, and ends with the runtime.
    /// - **Death.** A child that is killed has sent whole records. Those that waited in it are lost, without a warning.
    /// - **Cost.** Without a subscriber a spawn reads one atomic variable. With one, a descriptor in each of both processes, and some microseconds at the spawn and for each record.
    pub fn forward_tracing(mut self, forward: bool) -> Self {
        self.keeps_traces = !forward;
        self
    }

    /// Sets the caller whose subscriber gets the records of the process, now instead of at the spawn.
    pub(crate) fn traced_here(mut self) -> Self {
        self.caller = if self.keeps_traces { None } else { Caller::here() };
        self
    }

    /// Sets whether the process ignores signals that are sent to whole groups, so that the spawning process can decide about its
    /// end; see [`shutdown_signal`](crate::shutdown_signal). Default: false. The workers of a pool and the process of a
    /// manager are shielded.
    ///
    /// - SIGINT (Ctrl-C), SIGTERM (which `systemctl stop` sends to each process of a service), SIGHUP and SIGQUIT do
    ///   nothing, from the moment at which the spawn returns.
    /// - So [`terminate`](Process::terminate) and [`interrupt`](Process::interrupt) do nothing either;
    ///   [`kill`](Process::kill) works.
    /// - Programs that the process executes start with the default actions.
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

    /// Starts the process; see [`Process::spawn`].
    ///
    /// # Errors
    /// As [`Process::spawn`]. Kind `Spawn` also if a variable, a CPU or the directory cannot be used.
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
            let why = "a process that is started again cannot have a standard stream that is piped to this process: use \
                       Stdio::inherit, Stdio::null or a file";
            *again = copied.ok_or_else(|| Error::new(ErrorKind::Spawn, why))?;
        }
        let Self { daemon, start_method, is_shielded, backtraces, kill_on_drop, own_group, keeps_traces, .. } = *self;
        let caller = &self.caller;
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
            keeps_traces,
            caller: caller.clone(),
        })
    }

    /// Sets the default name now, if there is none.
    pub(crate) fn named(mut self) -> Self {
        self.name.get_or_insert_with(default_name);
        self
    }

    pub(crate) fn name_or_default(&self) -> &str {
        self.name.as_deref().unwrap_or("Process")
    }

    /// Starts a process that runs a task.
    pub(crate) fn start_work<R>(self, work: &Work) -> Result<Process<R>> {
        self.start(work.call, work.arguments.bytes(), work.arguments.attachments())
    }

    /// Starts a process that runs an encoded call.
    pub(super) fn start<R>(self, call: Call, arguments: &[u8], attachments: &[Attachment]) -> Result<Process<R>> {
        let name = self.name.unwrap_or_else(default_name);
        if let Some((key, _)) = self.variables.iter().find(|(key, value)| !spawn::is_variable(key, value)) {
            let why = format!("process {name} cannot be started: {key:?} cannot be an environment variable");
            return Err(Error::new(ErrorKind::Spawn, why));
        }
        let cpus = self.attributes.cpus.iter().flatten();
        if let Some(cpu) = cpus.copied().find(|cpu| *cpu >= attributes::MAX_CPU) {
            let why = format!("process {name} cannot be started: there is no CPU {cpu} to tie it to");
            return Err(Error::new(ErrorKind::Spawn, why));
        }
        let directory = self.directory.as_deref().map(|path| {
            directory::open(path).map_err(|error| {
                protocol::spawn_error(format!("directory {} of process {name}", path.display()), error)
            })
        });
        let mut streams = Streams::open(self.stdio)
            .map_err(|error| protocol::spawn_error(format!("the standard streams of process {name}"), error))?;
        let caller = if self.keeps_traces { None } else { self.caller.or_else(Caller::here) };
        let mut traces = caller.and_then(Traces::open);
        let mut start = Start {
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
            traces: traces.as_ref().map(Traces::theirs),
            arguments,
            attachments: attachments.iter().map(AsFd::as_fd).collect(),
        };
        let mut started = client::start(&start);
        if started.is_err() && traces.is_some() && Traces::may_have_taken_the_last_descriptors() {
            // No function has begun.
            (start.traces, traces) = (None, None);
            started = client::start(&start);
            if started.is_ok() {
                let help = Topic::TooManyDescriptors.name();
                tracing::warn!(process = %name, help, "there is no descriptor left: what it records by tracing is not forwarded");
            }
        }
        let (child, socket) = started?;
        drop(start);
        streams.close_theirs();
        let inbox = traces.map(|traces| traces.read(child.info.pid));
        Ok(Process::new(child, socket, streams, self.kill_on_drop, inbox))
    }
}

/// The name of a process that was given none.
fn default_name() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(1);
    format!("Process-{}", COUNT.fetch_add(1, Relaxed))
}
