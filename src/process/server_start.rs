//! A fork server from its start until it serves.
#![forbid(unsafe_code)]

use super::lifeline;
use super::origin;
use super::protocol::{self, Base, Preparation, Role};
use super::role::{self, is_gone};
use super::server_link::{Connection, connection_pair};
use super::variables::Variables;
use crate::error::Result;
use crate::os::{credentials::Credentials, directory, exec, fork, signal, spawn};
use crate::shm::family::Family;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Once;

/// A server that was started and has not been told to serve.
pub(super) struct Starting {
    /// As that of a [`Connection`].
    _private: fork::Private,
    pub(super) socket: OwnedFd,
    pub(super) process: exec::Process,
    pub(super) credentials: Credentials,
    /// Where it is, if that is known.
    pub(super) directory: Option<directory::Identity>,
}

impl Starting {
    /// Starts a server, which preloads what there is so far.
    pub(super) fn begin(credentials: &Credentials) -> Result<Self> {
        let failed = |error| protocol::spawn_error("the fork server cannot be started", error);
        if credentials.counts_children_elsewhere() {
            let why = "this thread's children would be in another pid namespace (unshare or setns with CLONE_NEWPID), where \
                       nobody here could tell who they are: spawn from a thread that has not changed it";
            return Err(failed(io::Error::other(why)));
        }
        let program = origin::program()?;
        let family = Family::get().map_err(failed)?;
        // The root's, but for who may not open that again: it ends with this process then, and so do its children.
        let tie = match &origin::origin()?.root_lifeline {
            Some(root) => signal::reopen(root.as_fd()).or_else(|_| lifeline::reopened()).map_err(failed)?,
            None => lifeline::reopened().map_err(failed)?,
        };
        let fds: Vec<_> = [program.as_fd(), tie.as_fd()].into_iter().chain(family.descriptors()).collect();
        // It gets its environment by order; its streams are closed once it has preloaded.
        let role = Role::Server { preload: origin::preloads(), credentials: credentials.clone() };
        let (ours, theirs) = connection_pair()?;
        let before = directory::identity().ok();
        let process = role::start(program.as_fd(), &Variables::of_this_process(), role, &fds, (&ours, theirs));
        let process = process.map_err(failed)?;
        // The server is where this process was, if that was the same place all the while.
        let directory = before.filter(|before| directory::identity().is_ok_and(|now| now == *before));
        let (_private, credentials) = (fork::Private::mark(ours.as_fd()), credentials.clone());
        Ok(Self { _private, socket: ours, process, credentials, directory })
    }

    /// Waits until it has preloaded and serves.
    pub(super) fn serve(self) -> Result<Connection> {
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

/// So many servers may be killed before they are ready: who kills each one that comes has to stop first.
const STARTS: usize = 4;

/// A server of this process that serves: the one that is `starting`, or else a new one.
pub(super) fn start_server(starting: Option<Starting>, credentials: &Credentials) -> Result<Connection> {
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

/// Once, whether or not the program collects what is traced.
fn warn_of_exec() {
    static SAID: Once = Once::new();
    const WHY: &str = "the fork server has threads, from before `init` (as with `#[tokio::main]`) or from a preload, so it \
                       cannot fork safely: every child is exec'd instead, at some ten times the cost; begin with \
                       `fn main() { multiprocess::run(async { .. }) }`, or call `init` first in main";
    tracing::warn!("{WHY}");
    SAID.call_once(|| spawn::print_line(WHY));
}
