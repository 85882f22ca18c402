//! Starts children through the fork server, which it starts, replaces and watches.
//!
//! # State
//! - `connection`: one connection to a fork server, made at the first spawn and again when the server is gone. Spare
//!   children arrive over it when spawns follow each other closely, and wait in it unreceived.
//! - `starting`: before the first connection, a server that runs preload functions and has not been asked to serve.
//! - The lifeline (`lifeline`): a pipe whose write end only this process holds.
//!
//! # Moves
//! - The first preload starts a server. It and each later preload are sent to the server without waiting. The first
//!   spawn asks the server to serve, and waits until it does.
//! - An order goes straight to a spare child, which reports over the same socket. Without a spare it goes to the server,
//!   with a report socket. The answer is received under the same lock, so there is one order at a time.
//! - After the order comes the permission to begin. It is sent once the rights of the caller are known to be those of the
//!   server, which is checked while the child gets ready, and once the spawn can no longer fail.
//!
//! # Invariants
//! 1. A function runs exactly once. An order is repeated only if the report socket shows that no child was born, or if
//!    it could not be sent completely to a spare. If a spawn returns an error, the function never runs: the child gets no
//!    permission to begin.
//! 2. A child has no more rights than the thread that spawns it: the server was started by a thread with exactly the same
//!    rights. When they differ, the connection is retired and a server is started from the calling thread.
//! 3. The write end of the lifeline is close-on-exec and never sent, so it closes exactly when this process ends.
//!
//! # Death
//! - A spare dies, gets a signal, or has waited too long, before it may begin: the order goes to the next spare.
//! - A spare is killed after it may begin: that is a child that died.
//! - The server dies before it answers: the report socket shows whether the child was born ([`Report::Born`], or hung up).
//! - This process dies: the server sees its connection hang up, and the lifeline of children and spares closes.
//!
//! # Cancel
//! There is no future here but the task that restarts a dead server. Without that task the next spawn restarts it.
//!
//! [`Report::Born`]: super::protocol::Report::Born
#![forbid(unsafe_code)]

use super::entry::Call;
use super::protocol::{self, Preparation, Request};
use super::role::is_gone;
use super::server_link::{Connection, Ordered, Start, Started, connection_pair};
use super::server_start::{self, Starting, start_server};
use super::{children, info, origin};
use crate::error::{Error, Explained, Result, Topic};
use crate::os::sync::{lock, try_lock};
use crate::os::{background, credentials::Credentials, exec, fork, pidfd, reactor};
use crate::os::{rights, signal, socket, socket::Wait, timer};
use crate::wire::frame;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::io::Interest;

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

/// Whether a fork server serves this process: its preload functions have run.
static SERVES: AtomicBool = AtomicBool::new(false);

/// Returns `true` if the next spawn would wait for the preload functions.
pub(crate) fn must_preload() -> bool {
    !SERVES.load(Relaxed) && !origin::preloads().is_empty()
}

/// Has the fork server run `call` before it makes children. Starts the server if need be, and waits for neither.
pub(super) fn preload(call: Call) -> Result<()> {
    let failed = |error| protocol::spawn_error("nothing can be preloaded", error);
    fork::check_pid().map_err(failed)?;
    let is_late = || {
        let why = "preload must be called before the first spawn: the fork server already runs";
        Err(Error::other(why).explained_by(Topic::PreloadTooLate))
    };
    if SERVES.load(Relaxed) {
        return is_late();
    }
    let mut client = Client::get();
    if client.connection.is_some() {
        return is_late();
    }
    origin::add_preload(call);
    client.begin_preload(call);
    Ok(())
}

/// Waits until all [`preload`](crate::preload) functions have run, without blocking a thread of the runtime.
///
/// A later [`Process::spawn`](crate::Process::spawn) then waits for nothing. A [`Pool`](crate::Pool) does this by itself before it
/// starts workers.
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
/// It starts the fork server if that does not run yet, and waits on a thread of its own. Afterwards nothing more
/// can be preloaded. Dropping the future does not stop the preloads.
///
/// # Errors
/// - `Spawn` if a preload function panicked, the fork server cannot be started, or there is no tokio runtime. The next
///   spawn tries again.
/// - `NotInitialized` without [`run`](crate::run), [`init`](crate::init) or `test_support!`.
/// - `Forked` in a process forked from one that has used the crate.
pub async fn preloaded() -> Result<()> {
    let failed = |error: io::Error| protocol::spawn_error("what is preloaded cannot be waited for", error);
    fork::check().map_err(failed)?;
    origin::origin()?;
    origin::refuse_in_preload()?;
    if SERVES.load(Relaxed) {
        return Ok(());
    }
    let ends_before = server_start::ends();
    let connect = move || match server_start::ends() == ends_before {
        true => Client::get().connected(false).map(drop),
        // This thread has begun late.
        false => {
            let why = "the runtime of `multiprocess::run` has ended";
            Err(failed(Explained::error(io::ErrorKind::Other, Topic::RuntimeEnded, why)))
        }
    };
    let connected = background::blocking(connect).map_err(failed)?.await;
    connected.map_err(|error| failed(io::Error::other(error)))?
}

/// Starts a child through the fork server.
pub(super) fn start(start: &Start<'_>) -> Result<Started> {
    fork::check_pid()
        .map_err(|error| protocol::spawn_error(format!("process {} cannot be started", start.name), error))?;
    origin::origin()?;
    origin::refuse_in_preload()?;
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
                children::list_child(started.0.clone());
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
    let error = protocol::spawn_error("the fork server ends again and again before it can start a child", why);
    Err(error.explained_by(Topic::ForkServerKilled))
}

impl Client {
    fn get() -> MutexGuard<'static, Self> {
        lock(&CLIENT)
    }

    /// The connection to a server that serves. `begins_here`: a new one goes to a server that this thread starts.
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

    /// Has a server that is starting run `call`, which is on the list of preloads already. If that fails, the next spawn starts
    /// a server that runs the whole list.
    fn begin_preload(&mut self, call: Call) {
        // The server that this process descends from has run its preloads.
        if origin::origin().is_ok_and(|origin| origin.intake.is_some()) {
            return;
        }
        let Some(starting) = &self.starting else {
            match own_credentials().and_then(|credentials| Starting::begin(&credentials)) {
                Ok(starting) => self.starting = Some(starting),
                Err(error) => tracing::debug!(%error, "cannot preload yet; the first spawn tries again"),
            }
            return;
        };
        // A server that is gone reports the reason when it is asked to serve.
        let told = protocol::try_send(starting.socket.as_fd(), &Preparation::Preload(call));
        if told.is_err_and(|error| !is_gone(&error)) {
            self.discard_starting();
        }
    }

    /// Takes the server that is starting, if its children would have these rights.
    fn starting_like(&mut self, credentials: &Credentials) -> Option<Starting> {
        if self.starting.as_ref().is_some_and(|starting| starting.credentials != *credentials) {
            self.discard_starting();
        }
        self.starting.take()
    }

    /// Gives up a server that is starting, and reaps it later. If this process may not kill it any more, it ends when its
    /// preloads are done.
    fn discard_starting(&mut self) {
        let Some(Starting { process, .. }) = self.starting.take() else { return };
        process.kill();
        self.reap_later(process);
    }

    fn lose(&mut self) {
        SERVES.store(false, Relaxed);
        if let Some(server) = self.connection.take().and_then(|connection| connection.server) {
            // It has closed its socket, so it is ending. If it has only closed this connection, this process may not be
            // permitted to kill it any more.
            server.kill();
            if !pidfd::wait(server.pidfd(), false, Some(END_LIMIT)) || !server.has_ended() {
                self.reap_later(server);
            }
        }
    }

    /// Gives up a server whose children would have other rights than this thread. Its children go on, and the server with
    /// them, but it and its spare children get no more orders.
    fn retire(&mut self, why: &str) {
        let Some(mut connection) = self.connection.take() else { return };
        SERVES.store(false, Relaxed);
        signal::renew_tie();
        tracing::info!(%why, "the children of this process come from another fork server from now on");
        if let Some(watcher) = self.watcher.take() {
            watcher.abort(); // It holds the connection, with which the server ends.
        }
        connection.discard_spares();
        // If this does not reach it, it still refuses a process that has become another user.
        let told = protocol::to_bytes(&Request::Retire)
            .and_then(|request| frame::send(connection.socket.as_fd(), &[&request], &[], Wait::No));
        if let Err(error) = told {
            tracing::debug!(%error, "cannot tell a fork server that no order will come");
        }
        if let Some(server) = connection.server.take() {
            self.reap_later(server);
        }
    }

    /// Reaps a server once it has ended by itself.
    fn reap_later(&mut self, server: exec::Process) {
        let pidfd = server.pidfd().try_clone_to_owned();
        self.retired.push(server);
        // Without a runtime the next spawn reaps it.
        if let (Ok(pidfd), Ok(runtime)) = (pidfd, tokio::runtime::Handle::try_current()) {
            runtime.spawn(async move {
                if info::until_exit(pidfd).await.is_ok() {
                    // On a thread of its own: the holder of the lock may be waiting for the preloads of the next server. Without
                    // one the next spawn reaps it.
                    let _ = background::blocking(|| Client::get().reap_retired());
                }
            });
        }
    }

    /// Reaps the retired servers that have ended.
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
                match restarted().await {
                    Some(next) => socket = next,
                    None => return,
                }
            }
        }));
    }
}

/// Has the server of this process send a signal, if it does so for this connection.
#[cfg(test)]
pub(super) fn ask_for_signal(pid: u32, signal: rustix::process::Signal) -> io::Result<()> {
    let client = Client::get();
    let connection = client.connection.as_ref().ok_or(io::ErrorKind::NotConnected)?;
    protocol::try_send(connection.socket.as_fd(), &Request::Signal { pid, signal: signal.as_raw() })
}

async fn hang_up(socket: Arc<OwnedFd>) -> io::Result<()> {
    // `PRIORITY` never comes; a hang-up is always reported.
    let watched = reactor::watch(socket, Interest::PRIORITY)?;
    while !socket::is_hung_up(watched.get_ref().as_fd()) {
        watched.ready(Interest::PRIORITY).await?.clear_ready();
    }
    Ok(())
}

/// Called on a runtime: has a dead server restarted at once rather than at the next spawn, because
/// the locks of children that die must be recovered.
pub(super) fn watch_server() {
    if fork::is_forked() {
        return;
    }
    match try_lock(&CLIENT) {
        Some(mut client) => client.watch(),
        // The holder of the lock may be waiting for preloads or for a stopped server, for which no task may wait here. In the
        // first case, which may take long, a later call starts the watch.
        None if must_preload() => {}
        None => watch_server_later(),
    }
}

/// A thread waits for the lock, to start the watch.
static IS_WATCH_COMING: AtomicBool = AtomicBool::new(false);

fn watch_server_later() {
    if IS_WATCH_COMING.swap(true, Relaxed) {
        return;
    }
    let watch = || {
        let mut client = Client::get();
        IS_WATCH_COMING.store(false, Relaxed);
        client.watch();
    };
    if background::blocking(watch).is_err() {
        // Without a thread a later call starts the watch.
        IS_WATCH_COMING.store(false, Relaxed);
    }
}

/// [`restart`] on a thread of its own, as soon as one can be had.
async fn restarted() -> Option<Arc<OwnedFd>> {
    let mut pause = FIRST_PAUSE;
    loop {
        match background::blocking(restart) {
            Ok(done) => return done.await.ok().flatten(),
            Err(error) if pause == FIRST_PAUSE => {
                let help = Topic::ProcessLimit.name();
                tracing::warn!(%error, help, "no thread can be had that restarts the fork server; trying again");
            }
            Err(_) => {}
        }
        timer::sleep(pause).await;
        pause = (2 * pause).min(LAST_PAUSE);
    }
}

/// After this time another thread may be had; each further wait is twice as long, up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Replaces the server if it is gone, and returns the socket of the present connection.
fn restart() -> Option<Arc<OwnedFd>> {
    let mut client = Client::get();
    if client.connection.as_ref().is_some_and(|connection| socket::is_hung_up(connection.socket.as_fd())) {
        let help = Topic::ForkServerKilled.name();
        tracing::warn!(help, "the fork server was killed; starting another one");
        client.lose();
        if let Err(error) = client.connected(false) {
            tracing::warn!(%error, help, "cannot restart the fork server; the next spawn tries again");
        }
    }
    client.connection.as_ref().map(|connection| connection.socket.clone())
}

/// Connects to the server that this process descends from, if it still runs.
fn connect_to_running(credentials: &Credentials) -> Result<Option<Connection>> {
    let Some(intake) = &origin::origin()?.intake else { return Ok(None) };
    let base = origin::base().cloned().unwrap_or_default();
    if base.credentials != *credentials {
        signal::renew_tie();
        let changed = credentials.difference(&base.credentials);
        tracing::info!(%changed, "this process has other rights than the fork server, and starts one of its own");
        return Ok(None);
    }
    // The server made the intake.
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

fn own_credentials() -> Result<Credentials> {
    let failed = |error| protocol::spawn_error("cannot find out what a child of this thread may do", error);
    Credentials::of_this_thread().map_err(failed)
}

/// A server that has been killed has so long to end before this process goes on without its end.
const END_LIMIT: Duration = Duration::from_secs(1);

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    /// The threads of this process that wait for something.
    fn waiting() -> usize {
        let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("comm")).ok());
        names.filter(|name| name.trim() == "mp-blocking").count()
    }

    #[tokio::test]
    async fn one_thread_waits_for_the_lock_however_many_watch() {
        let poison = || {
            let _client = Client::get();
            panic!("with the lock held");
        };
        std::panic::catch_unwind(poison).unwrap_err();
        // Other tests of this program may have threads of this name for a moment.
        let before = waiting();
        (0..100).for_each(|_| watch_server());
        assert!(waiting() < before + 50, "a poisoned lock is free");
        let client = Client::get();
        let before = waiting();
        (0..100).for_each(|_| watch_server());
        assert!(waiting() < before + 50);
        drop(client);
    }
}
