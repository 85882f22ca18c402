//! This process's connection to the fork server.
//!
//! # State
//! One connection, made at the first spawn and again when the server is gone, with what was last sent over it. Before it there may
//! be a server that is starting: it runs what was preloaded, and has not been told to serve. Spare
//! children come over it if spawns follow each other closely, and wait in it.
//! One pipe, the lifeline, whose write end only this process ever holds; another one where this process has become
//! another user, who may not open the first one again.
//!
//! # Moves
//! The first preload starts a server; it, and each later one, is told what to run and not waited for. The first spawn tells it to
//! serve, and waits until it does.
//! An order is followed by the word to begin, once it is known that the caller has the rights that the server has, which is found
//! out while the child gets ready, and that the spawn succeeds.
//! An order goes straight to a spare child, which reports over the socket that it was told by. Without one it goes to
//! the server, with a report socket, and its answer comes in under the same lock, so answers need no numbers.
//!
//! # Invariants
//! 1. A function runs exactly once: an order is repeated only if the report socket says that no child was born, or if
//!    a spare could not be told all of it. Where a spawn is an error, it never runs: such a child gets no word to begin.
//! 2. A child has no more rights than the thread that spawns it: the server was started by a thread with the very same
//!    ones. When they differ, the connection is retired, and a server is started from the caller as it is.
//! 3. The write end of the lifeline is close-on-exec and never sent, so it closes exactly when this process ends.
//!
//! # Death
//! A spare dies, is signalled, or has waited too long: it cannot be told, or gets no word to begin, and the next one is told.
//! One that is killed after that word is a child that died. The server dies before it answers: the report socket tells which
//! ([`Report::Born`], or hung up). This process dies: the server sees the connection hang up, and the lifeline of the
//! children and the spares closes.
//!
//! # Cancel
//! Nothing here is a future, but for the task that restarts a server that died: without it the next spawn does.
#![forbid(unsafe_code)]

use super::entry::Call;
use super::info::{self, ProcessInfo};
use super::protocol::{self, Answer, Base, Born, Order, Preparation, Reply, Report, Request, Role, Variables};
use super::role::{self, is_gone};
use super::{StartMethod, boot, server};
use crate::error::{Error, Result};
use crate::os::sync::lock;
use crate::os::{
    attributes::{Attributes, Kept},
    credentials::{self, Credentials},
    exec, fork, pidfd,
    proc::Activity,
    reactor, refuse, rights, signal, socket,
    socket::Wait,
    spawn,
};
use crate::shm::family::Family;
use crate::wire::{self, frame};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock};
use std::time::{Duration, Instant};
use tokio::io::Interest;

/// A child of this process.
pub(super) struct Child {
    pub(super) info: ProcessInfo,
    pub(super) pidfd: Arc<OwnedFd>,
    /// Its exit comes as a report, not by the kernel.
    pub(super) reports_exit: bool,
    /// The connection it was ordered over: it hangs up when the server, which reaps the child, is gone.
    server: Arc<OwnedFd>,
    status: OnceLock<ExitStatus>,
    /// Once it has it is so for ever.
    has_ended: AtomicBool,
    /// It has been told to end, and has this long.
    leaves_by: OnceLock<Instant>,
}

impl Child {
    /// It has been told to end, and is given this time for it when this process ends.
    pub(super) fn leaves_within(&self, time: Duration) {
        // The first word counts.
        let _ = self.leaves_by.set(Instant::now() + time.min(Duration::from_secs(86400)));
    }

    /// How much of that time is left.
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

    /// A child with more rights than this process has by now is signalled by the server that it came from; so is any where
    /// this process has no such call (under valgrind).
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd::signal(self.pidfd.as_fd(), signal) {
            Err(error) if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported) => {
                let request = protocol::to_bytes(&Request::Signal(signal.as_raw()))?;
                frame::send(self.server.as_fd(), &[&request], &[self.pidfd.as_fd()], Wait::No).map_err(|_| error)
            }
            done => done,
        }
    }

    /// Makes sure that whoever hears from us that it has ended finds nothing held by it.
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

    pub(super) fn status(&self) -> Option<ExitStatus> {
        self.status.get().copied()
    }

    pub(super) fn set_status(&self, status: ExitStatus) {
        // Known once; the second teller says the same.
        let _ = self.status.set(status);
    }
}

/// What a new child shall be.
pub(super) struct Start<'a> {
    pub(super) call: Call,
    pub(super) name: &'a str,
    pub(super) daemon: bool,
    pub(super) start_method: StartMethod,
    pub(super) variables: Variables,
    pub(super) is_shielded: bool,
    pub(super) leads_group: bool,
    pub(super) backtraces: Option<bool>,
    pub(super) directory: Option<OwnedFd>,
    pub(super) attributes: Attributes,
    pub(super) streams: [Option<BorrowedFd<'a>>; 3],
    pub(super) arguments: &'a [u8],
    pub(super) attachments: Vec<BorrowedFd<'a>>,
}

/// The child, and the socket that its outcome comes over.
pub(super) type Started = (Arc<Child>, OwnedFd);

static CLIENT: Mutex<Client> =
    Mutex::new(Client { starting: None, connection: None, watcher: None, retired: Vec::new() });

struct Client {
    /// A server that preloads, until there is a connection.
    starting: Option<Starting>,
    connection: Option<Connection>,
    /// The task that restarts the server when it dies.
    watcher: Option<tokio::task::JoinHandle<()>>,
    /// Servers from before this process had other rights: each ends with the last of its children.
    retired: Vec<exec::Process>,
}

/// A server that was started and has not been told to serve.
struct Starting {
    /// As that of a [`Connection`].
    _private: fork::Private,
    socket: OwnedFd,
    process: exec::Process,
    credentials: Credentials,
    /// Where it is, if that is known.
    directory: Option<(u64, u64)>,
}

struct Connection {
    /// What holds it keeps the server running, so no process that is forked from this one may.
    _private: fork::Private,
    socket: Arc<OwnedFd>,
    /// The server, if it was this process that started it.
    server: Option<exec::Process>,
    /// Of the server.
    pid: Option<u32>,
    /// The same, if the thread that made this connection could look into it: one that cannot is confined more.
    seen: Option<u32>,
    /// The rights of who started the server, which has no more, and what its children are like unless they are told.
    base: Base,
    kept: (credentials::Kept, Kept),
    environment: Option<Variables>,
    /// Device and inode of the working directory as last sent.
    directory: Option<(u64, u64)>,
    /// Of the last order: an answer that comes after we gave up waiting for it is not the next one's.
    number: u64,
    spares: Spares,
}

/// Children that wait for an order of ours, not yet received: so they take up none of our descriptors.
#[derive(Default)]
struct Spares {
    /// Asked for and not received.
    coming: u32,
    /// Changes with the environment or the directory, which those of before do not have.
    generation: u64,
    /// How many there shall be.
    wanted: u32,
    last_spawn: Option<Instant>,
    /// The server has none to give.
    are_refused: bool,
}

/// Spawns that follow each other within this time are worth a spare.
const SPARES_PAY: Duration = Duration::from_secs(1);
/// More would only wait longer, and each costs some 300 KiB.
const MOST_SPARES: u32 = 4;

impl Spares {
    /// Learns from a spawn that begins now and may find a spare.
    fn learn(&mut self, finds_one: bool) {
        let now = Instant::now();
        let pays = self.last_spawn.is_some_and(|last| now - last < SPARES_PAY);
        self.last_spawn = Some(now);
        self.wanted = match self.wanted {
            _ if !pays => 0,
            0 => 1,
            wanted if !finds_one => (2 * wanted).min(MOST_SPARES),
            wanted => wanted,
        };
    }

    /// None of those that are coming will do any more.
    fn renew(&mut self) {
        self.coming = 0;
        self.generation += 1;
    }
}

/// What the server has to say.
enum Received {
    Answer(Answer<Born>, Option<OwnedFd>),
    Spare {
        pid: u32,
        pidfd: OwnedFd,
        socket: OwnedFd,
    },
    /// It is of no use any more.
    Nothing,
}

/// The working directory, for a server that may know it.
enum Directory {
    AsBefore,
    /// With its device and inode.
    New(OwnedFd, (u64, u64)),
    /// Only who is in it already can be in it.
    Closed,
}

/// What came of an order.
enum Ordered {
    Started(Started),
    /// No child was born, because the server is gone.
    ServerGone(io::Error),
    /// No function has begun: this server's children cannot be as they must be, for this reason. Those of one that is
    /// started now can.
    Elsewhere(String),
}

/// A fork server that this process has started, or found, serves: what is preloaded has run.
static SERVES: AtomicBool = AtomicBool::new(false);

/// Whether the next spawn would wait for what is preloaded.
pub(crate) fn must_preload() -> bool {
    !SERVES.load(Relaxed) && !boot::preloads().is_empty()
}

/// Has the fork server run `call` before it makes children; it is started for that, and not waited for.
pub(super) fn preload(call: Call) -> Result<()> {
    let failed = |error| protocol::spawn_error("nothing can be preloaded", error);
    fork::check().map_err(failed)?;
    let is_late = || Err(Error::other("preload must be called before the first spawn: the fork server already runs"));
    if SERVES.load(Relaxed) {
        return is_late();
    }
    let mut client = Client::get();
    if client.connection.is_some() {
        return is_late();
    }
    boot::add_preload(call);
    client.begin_preload(call);
    Ok(())
}

/// Resolves when what was given to [`preload`](crate::preload) has run, and a spawn waits for nothing any more. It starts the fork
/// server if it does not run yet, and waits on a thread of tokio's blocking pool, so other tasks go on meanwhile. After it
/// nothing more can be preloaded.
///
/// Without it a [`Process::spawn`](crate::Process::spawn) that comes before the preloads are done waits for them; [`preload`](crate::preload)
/// says what stands meanwhile. A [`Pool`](crate::Pool) awaits it by itself before it starts workers. Dropped, the preloads go on.
///
/// ```
/// use multiprocess as mp;
/// # fn main() -> mp::Result<()> { mp::run(async {
/// fn load() { std::thread::sleep(std::time::Duration::from_millis(50)); }
/// mp::preload(load)?;
/// mp::preloaded().await?;
/// assert_eq!(mp::Process::spawn(|| 1, ())?.await?, 1);
/// # Ok(()) }) }
/// ```
///
/// # Errors
/// Kind `Spawn` if a preload function panics or the fork server cannot be started; the next spawn tries again.
pub async fn preloaded() -> Result<()> {
    let failed = |error: io::Error| protocol::spawn_error("what is preloaded cannot be waited for", error);
    fork::check().map_err(failed)?;
    boot::origin()?;
    server::refuse_in_preload()?;
    if SERVES.load(Relaxed) {
        return Ok(());
    }
    let runtime = tokio::runtime::Handle::try_current().map_err(|error| failed(io::Error::other(error)))?;
    let connected = runtime.spawn_blocking(|| Client::get().connected(false).map(drop)).await;
    connected.map_err(|error| failed(io::Error::other(error)))?
}

/// Has the fork server start a child.
pub(super) fn start(start: &Start<'_>) -> Result<Started> {
    fork::check().map_err(|error| protocol::spawn_error(format!("process {} cannot be started", start.name), error))?;
    boot::origin()?;
    server::refuse_in_preload()?;
    if must_preload() {
        // Before the lock is taken: others wait for that.
        reactor::block_in_place(|| Client::get().connected(false).map(drop))?;
    }
    let mut client = Client::get();
    client.reap_retired();
    let (mut last, mut begins_here) = (None, false);
    for _ in 0..8 {
        if must_preload() {
            // The server was killed, or has other rights.
            reactor::block_in_place(|| client.connected(begins_here).map(drop))?;
        }
        match client.connected(begins_here)?.order(start)? {
            Ordered::Started(started) => {
                client.watch();
                drop(client);
                info::list_child(started.0.clone());
                return Ok(started);
            }
            Ordered::Elsewhere(why) => {
                client.retire(&why);
                begins_here = true;
            }
            Ordered::ServerGone(error) => {
                last = Some(error);
                client.lose();
            }
        }
    }
    let why = last.unwrap_or_else(|| io::Error::other("it did not stay"));
    Err(protocol::spawn_error("the fork server ends again and again before it can start a child", why))
}

impl Client {
    fn get() -> MutexGuard<'static, Self> {
        lock(&CLIENT)
    }

    /// `begins_here`: to a server that is started by this thread, if there is no connection yet.
    fn connected(&mut self, begins_here: bool) -> Result<&mut Connection> {
        if self.connection.is_none() {
            let credentials = own_credentials()?;
            let running = if begins_here { None } else { connect_to_running(&credentials)? };
            let made = match running {
                Some(connection) => connection,
                None => start_server(self.starting_like(&credentials), &credentials)?,
            };
            self.connection = Some(made);
            SERVES.store(true, Relaxed);
        }
        self.connection.as_mut().ok_or_else(|| Error::other("there is no connection to a fork server"))
    }

    /// Has a server that starts run `call`, which is among what is preloaded already. If that fails, the next spawn starts one that runs all.
    fn begin_preload(&mut self, call: Call) {
        // The server that this process descends from has preloaded what there was.
        if boot::origin().is_ok_and(|origin| origin.intake.is_some()) {
            return;
        }
        let Some(starting) = &self.starting else {
            match own_credentials().and_then(|credentials| Starting::begin(&credentials)) {
                Ok(starting) => self.starting = Some(starting),
                Err(error) => tracing::debug!(%error, "cannot preload yet; the first spawn tries again"),
            }
            return;
        };
        // One that is gone says why when it is asked to serve.
        let told = protocol::try_send(starting.socket.as_fd(), &Preparation::Preload(call));
        if told.is_err_and(|error| !is_gone(&error)) {
            self.discard_starting();
        }
    }

    /// The server that starts, if its children would have these rights.
    fn starting_like(&mut self, credentials: &Credentials) -> Option<Starting> {
        if self.starting.as_ref().is_some_and(|starting| starting.credentials != *credentials) {
            self.discard_starting();
        }
        self.starting.take()
    }

    /// Lets go of a server that starts. It ends at the latest when it has preloaded, as this process may not be allowed to kill it any
    /// more, and is reaped later.
    fn discard_starting(&mut self) {
        let Some(Starting { process, .. }) = self.starting.take() else { return };
        process.kill();
        self.reap_later(process);
    }

    fn lose(&mut self) {
        SERVES.store(false, Relaxed);
        if let Some(server) = self.connection.take().and_then(|connection| connection.server) {
            // It has closed its socket, so it is ending; if it only let go of this connection, it may be one that this process is
            // not permitted to kill any more.
            server.kill();
            if !pidfd::wait(server.pidfd(), false, Some(END_LIMIT)) || !server.has_ended() {
                self.reap_later(server);
            }
        }
    }

    /// Lets go of a server whose children cannot be as they must be any more, because this thread has other rights. Children of it that still run
    /// go on, and it with them, but no order is given to it, or to a spare child of it, any more.
    fn retire(&mut self, why: &str) {
        let Some(mut connection) = self.connection.take() else { return };
        SERVES.store(false, Relaxed);
        tracing::info!(%why, "the children of this process come from another fork server from now on");
        if let Some(watcher) = self.watcher.take() {
            watcher.abort(); // It holds the connection, with which the server ends.
        }
        connection.discard_spares();
        // If it cannot be told, it refuses by itself who has become another user.
        let told = protocol::to_bytes(&Request::Retire)
            .and_then(|request| frame::send(connection.socket.as_fd(), &[&request], &[], Wait::No));
        if let Err(error) = told {
            tracing::debug!(%error, "cannot tell a fork server that no order will come");
        }
        if let Some(server) = connection.server.take() {
            self.reap_later(server);
        }
    }

    /// Sees to it that no zombie is left of a server that ends by itself.
    fn reap_later(&mut self, server: exec::Process) {
        let pidfd = server.pidfd().try_clone_to_owned();
        self.retired.push(server);
        // Without a runtime the next spawn reaps it.
        if let (Ok(pidfd), Ok(runtime)) = (pidfd, tokio::runtime::Handle::try_current()) {
            runtime.spawn(async move {
                if info::until_exit(pidfd).await.is_ok() {
                    // On a thread of its own: whoever has the lock may wait for what the next server preloads.
                    tokio::task::spawn_blocking(|| Client::get().reap_retired());
                }
            });
        }
    }

    /// Leaves no zombie of a retired server. One that has been reaped by somebody else is gone too.
    fn reap_retired(&mut self) {
        self.retired.retain(|server| !server.has_ended());
    }

    fn watch(&mut self) {
        if self.watcher.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let (Some(connection), Ok(runtime)) = (&self.connection, tokio::runtime::Handle::try_current()) else { return };
        let mut socket = connection.socket.clone();
        self.watcher = Some(runtime.spawn(async move {
            while hang_up(socket).await.is_ok() {
                match tokio::task::spawn_blocking(restart).await {
                    Ok(Some(next)) => socket = next,
                    _ => return,
                }
            }
        }));
    }
}

async fn hang_up(socket: Arc<OwnedFd>) -> io::Result<()> {
    // `PRIORITY` never comes; a hang-up is always told.
    let watched = reactor::watch(socket, Interest::PRIORITY)?;
    while !socket::is_hung_up(watched.get_ref().as_fd()) {
        watched.ready(Interest::PRIORITY).await?.clear_ready();
    }
    Ok(())
}

/// Called on a runtime: sees to it that the server is restarted when it dies, rather than at the next spawn, because
/// the locks of children that die must be recovered.
pub(super) fn watch_server() {
    if fork::is_forked() {
        return;
    }
    match CLIENT.try_lock() {
        Ok(mut client) => client.watch(),
        // Whoever has the lock may wait for what is preloaded, or for a server that is stopped; no task waits for that here. Where
        // what is preloaded is the reason, which may take long, the next one to look watches it.
        Err(_) if must_preload() => {}
        Err(_) => {
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn_blocking(|| Client::get().watch());
            }
        }
    }
}

/// Starts another server if this process's is gone; the connection there is then.
fn restart() -> Option<Arc<OwnedFd>> {
    let mut client = Client::get();
    if client.connection.as_ref().is_some_and(|connection| socket::is_hung_up(connection.socket.as_fd())) {
        tracing::warn!("the fork server was killed; starting another one");
        client.lose();
        if let Err(error) = client.connected(false) {
            tracing::warn!(%error, "cannot restart the fork server; the next spawn tries again");
        }
    }
    client.connection.as_ref().map(|connection| connection.socket.clone())
}

/// A new connection to the server that this process descends from, if it still runs.
fn connect_to_running(credentials: &Credentials) -> Result<Option<Connection>> {
    let Some(intake) = &boot::origin()?.intake else { return Ok(None) };
    let base = server::base().cloned().unwrap_or_default();
    if base.credentials != *credentials {
        let changed = credentials.difference(&base.credentials);
        tracing::info!(%changed, "this process has other rights than the fork server, and starts one of its own");
        return Ok(None);
    }
    // It made the intake. It is forked from what this process is forked from.
    let server = socket::maker_of_pair(intake.as_fd()).and_then(|maker| u32::try_from(maker.pid).ok());
    if server.and_then(rights::may_look_at) == Some(false) && rights::can_be_looked_at() {
        tracing::info!("this process is confined more than the fork server, and starts one of its own");
        return Ok(None);
    }
    let (ours, theirs) = connection_pair()?;
    match frame::send(intake.as_fd(), &[], &[theirs.as_fd()], Wait::Yes) {
        Ok(()) => Ok(Some(Connection::new(ours, None, server, base))),
        Err(_) => Ok(None),
    }
}

fn socket_pair() -> Result<(OwnedFd, OwnedFd)> {
    socket::packet_pair().map_err(|error| protocol::spawn_error("cannot make a socket for a new process", error))
}

/// Our end and the server's, which is told with each packet who sent it: from the first on, so it is set here.
fn connection_pair() -> Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socket_pair()?;
    socket::learn_senders(theirs.as_fd())
        .and_then(|()| socket::limit_sends(ours.as_fd(), SEND_LIMIT))
        .map_err(|error| protocol::spawn_error("cannot make a socket to the fork server", error))?;
    Ok((ours, theirs))
}

/// So many servers may be killed before they are ready: who kills each one that comes has to stop first.
const STARTS: usize = 4;

/// A server of this process that serves: the one that is `starting`, or else a new one.
fn start_server(starting: Option<Starting>, credentials: &Credentials) -> Result<Connection> {
    let begin = |starting: Option<Starting>| starting.map_or_else(|| Starting::begin(credentials), Ok);
    let mut made = begin(starting).and_then(Starting::serve);
    for _ in 1..STARTS {
        match &made {
            Err(error) if role::was_killed_early(error) => made = begin(None).and_then(Starting::serve),
            _ => break,
        }
    }
    made
}

impl Starting {
    /// Starts a server, which preloads what there is so far.
    fn begin(credentials: &Credentials) -> Result<Self> {
        let failed = |error| protocol::spawn_error("the fork server cannot be started", error);
        if credentials.counts_children_elsewhere() {
            let why = "this thread's children would be in another pid namespace (unshare or setns with CLONE_NEWPID), where \
                       nobody here could tell who they are: spawn from a thread that has not changed it";
            return Err(failed(io::Error::other(why)));
        }
        let program = boot::program()?;
        let family = Family::get().map_err(failed)?;
        // The root's, but for who may not open that again: it ends with this process then, and so do its children.
        let lifeline = match &boot::origin()?.root_lifeline {
            Some(root) => signal::reopen(root.as_fd()).or_else(|_| reopened_lifeline()).map_err(failed)?,
            None => reopened_lifeline().map_err(failed)?,
        };
        let fds: Vec<_> = [program.as_fd(), lifeline.as_fd()].into_iter().chain(family.descriptors()).collect();
        // It gets its environment by order; its streams are closed once it has preloaded.
        let role = Role::Server { preload: boot::preloads(), credentials: credentials.clone() };
        let (ours, theirs) = connection_pair()?;
        let directory = working_directory().ok();
        let process = role::start(program.as_fd(), &Variables::of_this_process(), role, &fds, (&ours, theirs));
        let process = process.map_err(failed)?;
        // The server is where this process was, if that was the same place all the while.
        let directory = directory.filter(|before| working_directory().is_ok_and(|now| now == *before));
        let (_private, credentials) = (fork::Private::mark(ours.as_fd()), credentials.clone());
        Ok(Self { _private, socket: ours, process, credentials, directory })
    }

    /// Waits until it has preloaded and serves.
    fn serve(self) -> Result<Connection> {
        let Self { socket, process, credentials, directory, _private } = self; // Dropped the other way round.
        if let Err(error) = protocol::send(socket.as_fd(), &Preparation::Serve, &[], &[])
            && !is_gone(&error)
        {
            process.end();
            return Err(protocol::spawn_error("the fork server cannot be told to serve", error));
        }
        // One that is gone has said why, or its end tells.
        let ready = role::wait_until_ready(&socket, &process, "the fork server")?;
        if ready.must_exec {
            warn_of_exec();
        }
        let base = Base { credentials, attributes: ready.attributes };
        let pid = process.pid();
        let mut connection = Connection::new(socket, Some(process), Some(pid), base);
        connection.directory = directory;
        Ok(connection)
    }
}

/// Once, whether or not the program collects what is traced.
fn warn_of_exec() {
    static SAID: Once = Once::new();
    const WHY: &str = "the fork server has threads, from before `init` (as with `#[tokio::main]`) or from a preload, so it \
                       cannot fork safely: every child is exec'd instead, at some ten times the cost; begin with \
                       `fn main() { multiprocess::run(async { .. }) }`, or call `init` first in main";
    tracing::warn!("{WHY}");
    SAID.call_once(|| spawn::print_line(WHY));
}

fn own_credentials() -> Result<Credentials> {
    let failed = |error| protocol::spawn_error("cannot find out what a child of this thread may do", error);
    Credentials::of_this_thread().map_err(failed)
}

/// A description of its own of the read end of a pipe that closes when this process ends, and not before.
fn reopened_lifeline() -> io::Result<OwnedFd> {
    static LIFELINES: Mutex<Vec<(PipeReader, PipeWriter)>> = Mutex::new(Vec::new());
    let mut lifelines = lock(&LIFELINES);
    for (read, _) in lifelines.iter().rev() {
        match signal::reopen(read.as_fd()) {
            // This thread, or the process, was another user when it made that pipe.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            reopened => return reopened,
        }
    }
    refuse::at("pipe")?;
    let (read, write) = io::pipe()?;
    let reopened = signal::reopen(read.as_fd());
    // Held by a process that is forked from this one it would keep the children after our end. It is never closed here.
    std::mem::forget(fork::Private::mark(write.as_fd()));
    lifelines.push((read, write));
    reopened
}

/// A server that is stopped takes nothing, once there is no room for more; so long it is tried.
const SEND_LIMIT: Duration = Duration::from_secs(10);

/// A server that has been killed has so long to end before this process goes on without its end.
const END_LIMIT: Duration = Duration::from_secs(1);

/// A server that has not answered for so long is looked at.
const LOOK_AFTER: Duration = Duration::from_secs(3);

/// And one that this process cannot look at, or that runs, is given up after so long.
const SILENCE: Duration = Duration::from_secs(60);

fn is_silent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::TimedOut
}

/// From here on arguments travel as memory, which the server passes on unread.
const INLINE: usize = 8 << 10;

impl Connection {
    fn new(socket: OwnedFd, server: Option<exec::Process>, pid: Option<u32>, base: Base) -> Self {
        let (environment, directory, number, spares) = (None, None, 0, Spares::default());
        let _private = fork::Private::mark(socket.as_fd());
        Self {
            _private,
            socket: Arc::new(socket),
            server,
            pid,
            seen: pid.filter(|pid| rights::may_look_at(*pid) == Some(true)),
            base,
            kept: Default::default(),
            environment,
            directory,
            number,
            spares,
        }
    }

    fn order(&mut self, start: &Start<'_>) -> Result<Ordered> {
        let failed = |error| protocol::spawn_error(format!("process {} cannot be started", start.name), error);
        let environment = Variables::of_this_process();
        let is_new = self.environment.as_ref() != Some(&environment);
        let directory = match self.directory_now().map_err(failed)? {
            Directory::AsBefore => None,
            Directory::New(directory, identity) => Some((directory, identity)),
            Directory::Closed => {
                return Ok(Ordered::Elsewhere("it is in a directory that it may not enter again".into()));
            }
        };
        let memory = match start.arguments {
            arguments if arguments.len() > INLINE => {
                Some(frame::in_memfd(&[arguments], arguments.len()).map_err(failed)?)
            }
            _ => None,
        };
        let order = Order {
            call: start.call,
            name: start.name.to_string(),
            daemon: start.daemon,
            start_method: start.start_method,
            parent: info::current_process(),
            is_passed_on: false,
            environment: is_new.then(|| environment.clone()),
            has_directory: directory.is_some(),
            has_own_directory: start.directory.is_some(),
            attributes: start.attributes.clone().any(),
            variables: start.variables.clone(),
            is_shielded: start.is_shielded,
            leads_group: start.leads_group,
            backtraces: start.backtraces,
            streams: start.streams.map(|stream| stream.is_some()),
            arguments_in_memfd: memory.as_ref().map(|_| start.arguments.len() as u64),
        };
        let inline = if memory.is_some() { &[][..] } else { start.arguments };
        let mut fds: Vec<_> = start.streams.into_iter().flatten().collect();
        fds.extend(directory.iter().map(|(fd, _)| fd.as_fd()));
        fds.extend(start.directory.iter().map(AsFd::as_fd));
        fds.extend(memory.iter().map(AsFd::as_fd));
        fds.extend(&start.attachments);
        let socket = self.socket.as_fd();
        self.spares.learn(self.spares.coming > 0 && socket::is_readable_within(socket, Duration::ZERO));
        if is_new || directory.is_some() {
            self.spares.renew();
        } else if start.start_method == StartMethod::ForkServer {
            while let Some((pid, pidfd, report)) = self.send_to_spare(&order, inline, &fds).map_err(failed)? {
                let attributes = match self.rights_and_attributes().map_err(failed)? {
                    Err(others) => return Ok(Ordered::Elsewhere(others)),
                    Ok(attributes) => attributes,
                };
                // One that was killed, or had waited too long when the order came, has not begun.
                if let_begin(&report, &attributes).map_err(failed)? {
                    self.ask_for_spares();
                    return Ok(Ordered::Started(self.started(start, Born { pid, reports_exit: false }, pidfd, report)));
                }
            }
        }
        let (report, theirs) = socket_pair()?;
        // Opened here, where /proc is warm, rather than in the child.
        let tie = reopened_lifeline().map_err(failed)?;
        fds.splice(..0, [theirs.as_fd(), tie.as_fd()]);
        // The server takes note of these before it forks, which may fail: until it has answered, nobody knows what it has.
        if is_new {
            self.environment = None;
        }
        if directory.is_some() {
            self.directory = None;
        }
        self.number += 1;
        let request = Request::Child { number: self.number };
        let tail = [&order.to_bytes().map_err(failed)?, inline].concat();
        if let Err(error) = protocol::send(self.socket.as_fd(), &request, &tail, &fds) {
            return if is_gone(&error) { Ok(Ordered::ServerGone(error)) } else { Err(failed(error)) };
        }
        drop(fds);
        drop(theirs); // From here on this end hangs up if no child has the other.
        drop(memory);
        let attributes = match self.rights_and_attributes().map_err(failed)? {
            Err(others) => return Ok(Ordered::Elsewhere(others)),
            Ok(attributes) => attributes,
        };
        let answer = loop {
            match self.receive_in_time() {
                Ok(Received::Answer(answer, pidfd)) => break Ok((answer?, pidfd)),
                // A spare that comes now was meant for this order.
                Ok(Received::Spare { .. } | Received::Nothing) => {}
                Err(error) => break Err(error),
            }
        };
        let (born, pidfd) = match answer {
            Ok((born, Some(pidfd))) => (born, pidfd),
            Ok((_, None)) => return Err(failed(io::Error::other("it came without a pidfd"))),
            // A server that is stopped has the other end of the report: nothing need ever come.
            Err(error) => {
                let patience = if is_silent(&error) { Duration::ZERO } else { SILENCE };
                socket::is_readable_within(report.as_fd(), patience);
                match Report::recv(report.as_fd(), &mut None) {
                    // It lives, though nobody told us.
                    Ok(Some(Report::Born(pid))) => {
                        (Born { pid, reports_exit: false }, pidfd::open(pid).map_err(failed)?)
                    }
                    _ if is_gone(&error) => return Ok(Ordered::ServerGone(error)),
                    _ => return Err(failed(error)),
                }
            }
        };
        // If it has ended, whoever waits for it learns that.
        let_begin(&report, &attributes).map_err(failed)?;
        if is_new {
            self.environment = Some(environment);
        }
        if let Some((_, identity)) = directory {
            self.directory = Some(identity);
        }
        self.ask_for_spares();
        Ok(Ordered::Started(self.started(start, born, pidfd, report)))
    }

    fn started(&self, start: &Start<'_>, born: Born, pidfd: OwnedFd, report: OwnedFd) -> Started {
        let (name, daemon, start_method) = (start.name.to_string(), start.daemon, Some(start.start_method));
        let child = Child {
            info: ProcessInfo { name, pid: born.pid, daemon, start_method },
            pidfd: Arc::new(pidfd),
            reports_exit: born.reports_exit,
            server: self.socket.clone(),
            status: OnceLock::new(),
            has_ended: AtomicBool::new(false),
            leaves_by: OnceLock::new(),
        };
        (Arc::new(child), report)
    }

    /// Hands an order to the spare child that has waited longest, and gives back where it will report; `None` if there
    /// is none.
    fn send_to_spare(
        &mut self,
        order: &Order,
        arguments: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<Option<(u32, OwnedFd, OwnedFd)>> {
        while self.spares.coming > 0 {
            let (pid, pidfd, socket) = match self.receive_in_time() {
                Ok(Received::Spare { pid, pidfd, socket }) => (pid, pidfd, socket),
                Ok(_) => continue,
                // The server is gone, or one came that this process has no descriptors left for.
                Err(_) => {
                    self.spares.renew();
                    break;
                }
            };
            match order.send(socket.as_fd(), arguments, fds) {
                Ok(()) => return Ok(Some((pid, pidfd, socket))),
                // It was killed, or has waited too long.
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// The attributes of this process that its children would not have by themselves; or what differs, because the rights of this
    /// thread are not those of the server.
    fn rights_and_attributes(&mut self) -> io::Result<Result<Option<Attributes>, String>> {
        let (credentials, umask) = Credentials::look(&mut self.kept.0)?;
        if credentials != self.base.credentials {
            let differs = credentials.difference(&self.base.credentials);
            return Ok(Err(format!("it has other rights by now: {differs}")));
        }
        if self.seen.and_then(rights::may_look_at) == Some(false) {
            return Ok(Err("it is confined by now (by Landlock or another security module)".into()));
        }
        Ok(Ok(Attributes::of_this_process(&mut self.kept.1, umask).other_than(&self.base.attributes).any()))
    }

    /// Ends those that have come; any that still come wait in vain, for a few seconds.
    fn discard_spares(&mut self) {
        self.spares.renew();
        while socket::is_readable_within(self.socket.as_fd(), Duration::ZERO) && self.receive().is_ok() {}
    }

    /// Sees to it that the next spawn finds a spare. If that fails, the next spawn finds none.
    fn ask_for_spares(&mut self) {
        let Spares { coming, generation, wanted, are_refused, .. } = &mut self.spares;
        // Some at a time: each request wakes the server, which then is in the way of the child that was just told.
        let count = if *coming * 2 <= *wanted { wanted.saturating_sub(*coming) } else { 0 };
        if count > 0 && !*are_refused {
            let request = Request::Spares { count, generation: *generation };
            if protocol::send(self.socket.as_fd(), &request, &[], &[]).is_ok() {
                *coming += count;
            }
        }
    }

    /// [`receive`](Self::receive), unless the server is stopped or frozen, or silent for longer than anything that it does takes. What it was
    /// told it does when it goes on; a child that is born then finds nobody to report to, and does nothing.
    fn receive_in_time(&mut self) -> io::Result<Received> {
        let (start, mut before) = (Instant::now(), None::<Activity>);
        while !socket::is_readable_within(self.socket.as_fd(), LOOK_AFTER) {
            let now = self.pid.and_then(Activity::of);
            let is_idle = now.zip(before).is_some_and(|(now, before)| now.is_idle_since(before));
            before = now;
            let is_stopped = self.server.as_ref().is_some_and(exec::Process::is_stopped);
            let why = if is_stopped || now.is_some_and(Activity::is_stopped) {
                "the fork server is stopped (SIGSTOP, or a debugger)".to_string()
            } else if is_idle {
                format!("the fork server has not run for {LOOK_AFTER:?} (is its control group frozen?)")
            } else if start.elapsed() > SILENCE {
                format!("the fork server has not answered for {SILENCE:?}")
            } else {
                continue;
            };
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        self.receive()
    }

    fn receive(&mut self) -> io::Result<Received> {
        let Some((reply, parcel)) = protocol::recv::<Reply>(self.socket.as_fd())? else {
            return Err(io::ErrorKind::ConnectionReset.into());
        };
        let mut fds = parcel.fds.into_iter();
        match reply {
            Reply::Child { number, answer } if number == 0 || number == self.number => {
                Ok(Received::Answer(answer, fds.next()))
            }
            Reply::Spare { pid, generation, never } if generation == self.spares.generation => {
                self.spares.coming = self.spares.coming.saturating_sub(1);
                self.spares.are_refused |= never;
                match (pid, fds.next(), fds.next()) {
                    (Some(pid), Some(pidfd), Some(socket)) => Ok(Received::Spare { pid, pidfd, socket }),
                    _ => Ok(Received::Nothing),
                }
            }
            _ => Ok(Received::Nothing),
        }
    }

    /// The working directory, beside the one last sent. One that was removed is still a directory.
    fn directory_now(&self) -> io::Result<Directory> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let identity = working_directory()?;
        if self.directory == Some(identity) {
            return Ok(Directory::AsBefore);
        }
        refuse::at("open")?;
        match rustix::fs::open(".", flags, Mode::empty()) {
            Ok(directory) => Ok(Directory::New(spawn::above_standard(directory)?, identity)),
            Err(rustix::io::Errno::ACCESS) => Ok(Directory::Closed),
            Err(error) => Err(error.into()),
        }
    }
}

/// Gives a child that has its order the word to begin. One that gets none, because this process lets go of `report`, ends without
/// having begun; false if it has ended already.
fn let_begin(report: &OwnedFd, attributes: &Option<Attributes>) -> io::Result<bool> {
    let word = attributes.as_ref().map(wire::to_bytes).transpose()?;
    match frame::send(report.as_fd(), &[&word.unwrap_or_default()], &[], Wait::Yes) {
        Err(error) if is_gone(&error) => Ok(false),
        sent => sent.map(|()| true),
    }
}

/// Device and inode of the working directory, also of one that this process may not search.
fn working_directory() -> io::Result<(u64, u64)> {
    let stat = match rustix::fs::stat(".") {
        Err(rustix::io::Errno::ACCESS) => rustix::fs::stat("/proc/self/cwd")?,
        stat => stat?,
    };
    Ok((stat.st_dev, stat.st_ino))
}

/// A wait status as it came in a report.
pub(super) fn status_of(raw: i32) -> ExitStatus {
    ExitStatus::from_raw(raw)
}
