//! A fork server from its start until it serves.
#![forbid(unsafe_code)]

use super::lifeline;
use super::origin;
use super::protocol::{self, Base, Preparation, Role};
use super::role::{self, is_gone};
use super::server_link::{Connection, connection_pair};
use super::variables::Variables;
use crate::error::{Explained, Result, Topic};
use crate::os::sync::lock;
use crate::os::{credentials::Credentials, directory, exec, fork, pidfd, signal, spawn};
use crate::shm::family::Family;
use rustix::process::Signal;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, Once};

/// A server that was started and has not been asked to serve.
pub(super) struct Starting {
    /// As in a [`Connection`].
    _private: fork::Private,
    pub(super) socket: OwnedFd,
    pub(super) process: exec::Process,
    pub(super) credentials: Credentials,
    /// The directory of the server, if it is known.
    pub(super) directory: Option<directory::Identity>,
}

impl Starting {
    /// Starts a server, which runs the preload functions known so far.
    pub(super) fn begin(credentials: &Credentials) -> Result<Self> {
        let failed = |error| protocol::spawn_error("the fork server cannot be started", error);
        if credentials.counts_children_elsewhere() {
            let why = "this thread's children would be in another pid namespace (unshare or setns with CLONE_NEWPID), where \
                       nobody here could tell who they are: spawn from a thread that has not changed it";
            return Err(failed(io::Error::other(why)));
        }
        let program = origin::program()?;
        let family = Family::get().map_err(failed)?;
        // The root's lifeline. A process that may not open that again uses its own: the server then ends with this process.
        let tie = match &origin::origin()?.root_lifeline {
            Some(root) => signal::reopen(root.as_fd()).or_else(|_| lifeline::reopened()).map_err(failed)?,
            None => lifeline::reopened().map_err(failed)?,
        };
        let fds: Vec<_> = [program.as_fd(), tie.as_fd()].into_iter().chain(family.descriptors()).collect();
        // It gets its environment with each order; its streams are closed after the preloads.
        let role = Role::Server { preload: origin::preloads(), credentials: credentials.clone() };
        let (ours, theirs) = connection_pair()?;
        let before = directory::identity().ok();
        let process = role::start(program.as_fd(), &Variables::of_this_process(), role, &fds, (&ours, theirs));
        let process = process.map_err(failed)?;
        // The server starts in the directory of this process, if that has not changed meanwhile.
        let directory = before.filter(|before| directory::identity().is_ok_and(|now| now == *before));
        let (_private, credentials) = (fork::Private::mark(ours.as_fd()), credentials.clone());
        Ok(Self { _private, socket: ours, process, credentials, directory })
    }

    /// Asks it to serve, and waits until it has run its preloads and serves.
    pub(super) fn serve(self) -> Result<Connection> {
        let Self { socket, process, credentials, directory, _private } = self; // Dropped in reverse order.
        if let Err(error) = protocol::send(socket.as_fd(), &Preparation::Serve, &[], &[])
            && !is_gone(&error)
        {
            process.end();
            return Err(protocol::spawn_error("the fork server cannot be told to serve", error));
        }
        let _waited_for = WaitedFor::note(&process)?;
        // A server that is gone has reported the reason, or its exit status has it.
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

/// The servers for which threads of this process wait.
struct Waits {
    /// The pid and pidfd of each.
    servers: Vec<(u32, OwnedFd)>,
    /// None is waited for at present.
    are_over: bool,
    /// How often that was so.
    ends: u32,
}

static WAITED_FOR: Mutex<Waits> = Mutex::new(Waits { servers: Vec::new(), are_over: false, ends: 0 });

struct WaitedFor(u32);

impl WaitedFor {
    /// An error, after which the server ends, while no server is waited for.
    fn note(process: &exec::Process) -> Result<Self> {
        let failed = |error| protocol::spawn_error("the fork server cannot be waited for", error);
        let pidfd = process.pidfd().try_clone_to_owned().map_err(failed)?;
        let mut waited_for = lock(&WAITED_FOR);
        if waited_for.are_over {
            process.end();
            let why = "the runtime of `multiprocess::run` ends";
            return Err(failed(Explained::error(io::ErrorKind::Other, Topic::RuntimeEnded, why)));
        }
        waited_for.servers.push((process.pid(), pidfd));
        Ok(Self(process.pid()))
    }
}

impl Drop for WaitedFor {
    fn drop(&mut self) {
        lock(&WAITED_FOR).servers.retain(|(pid, _)| *pid != self.0);
    }
}

/// How often waiting for servers was over. What began to wait before the last time must not begin again.
pub(super) fn ends() -> u32 {
    lock(&WAITED_FOR).ends
}

/// Until this is dropped no thread waits for a server to start: those that are waited for are killed, which is an error of
/// whatever waits.
pub(super) struct NoStarts(());

impl NoStarts {
    pub(super) fn begin() -> Self {
        let mut waited_for = lock(&WAITED_FOR);
        waited_for.are_over = true;
        waited_for.ends = waited_for.ends.wrapping_add(1);
        for (pid, pidfd) in &waited_for.servers {
            // It may be serving by now, and then the next spawn starts another one.
            let _ = pidfd::signal_child(pidfd.as_fd(), *pid, Signal::KILL);
        }
        Self(())
    }
}

impl Drop for NoStarts {
    fn drop(&mut self) {
        lock(&WAITED_FOR).are_over = false;
    }
}

/// How many servers in a row may be killed before they are ready.
const STARTS: usize = 4;

/// A connection to a server that serves: the one that is `starting`, or else a new one.
pub(super) fn start_server(starting: Option<Starting>, credentials: &Credentials) -> Result<Connection> {
    let begin = |starting: Option<Starting>| starting.map_or_else(|| Starting::begin(credentials), Ok);
    let ends_before = ends();
    let mut made = begin(starting).and_then(Starting::serve);
    for _ in 1..STARTS {
        match &made {
            Err(error) if role::was_killed_early(error) && ends() == ends_before => {
                made = begin(None).and_then(Starting::serve)
            }
            _ => break,
        }
    }
    made
}

/// Warns on stderr once, and by `tracing` each time, that children are executed afresh.
fn warn_of_exec() {
    static SAID: Once = Once::new();
    const WHY: &str = "the fork server has threads, from before `init` (as with `#[tokio::main]`) or from a preload, so it \
                       cannot fork safely: every child is exec'd instead, at some ten times the cost; begin with \
                       `fn main() { multiprocess::run(async { .. }) }`, or call `init` first in main";
    let topic = Topic::ForkServerHasThreads;
    tracing::warn!(help = topic.name(), "{WHY}");
    SAID.call_once(|| spawn::print_line(&format!("{WHY} {topic}")));
}
