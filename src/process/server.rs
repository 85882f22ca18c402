//! The fork server: one small process per program that forks and reaps children, and recovers what dead processes held.
//!
//! # State
//! One connection for each process of the family that spawns. It holds the environment and directory for the next child
//! of that process, and the lifeline that ties its spare children. One thread owns all of it.
//!
//! # Moves
//! - Start: by the first preload, or for the first child. It runs the preload functions that it receives until it is asked to
//!   serve.
//! - An order arrives: it forks (or execs) a child, passes the order on, and answers with pid and pidfd.
//! - Spares are requested: it forks them and sends them to their starter, tied to it, each with the socket for its order and
//!   its report.
//! - A child ends: the kernel reaps it, or the server does.
//! - A process takes a slot in the family table: the server watches it, and recovers what it held when it ends.
//! - A connection hangs up: the server drops it, and ends with the last one.
//! - The root ends: the kernel kills the server through the root's lifeline.
//!
//! # Invariants
//! 1. There is one thread, or (`single` is `None`) no fork without exec.
//! 2. It has no more rights than its starter had. It gives children to processes of its own user and group only; after
//!    [`Request::Retire`], or a request for a child by another user, to none over that connection. It signals a child only for
//!    the connection over which that child was ordered, even if its user has changed.
//! 3. A child never runs on with a descriptor of the server: `private` lists them all.
//! 4. Its thread draws no keys for hashing, as those of all children would follow from them: it, and the encoding that it rehearses,
//!    use no `HashMap`. What a preload, or `main` before it took this role, has drawn cannot be undone.
//!
//! # Death
//! - Killed while it preloads, or before it is asked to serve: its starter notices that when it wants a child, and starts
//!   another server, which runs all preloads.
//! - Killed before the fork: the report socket of the order hangs up, so the starter knows that no child was born, starts
//!   another server and orders again.
//! - Killed after the fork: the child reports its birth over that socket, and its starter adopts it.
//! - Its children, spares included, go on. The next server watches those with a slot and recovers what they held; init reaps
//!   them.
//! - A starter ends: the kernel kills its spares through its lifeline, and its connection hangs up.
//!
//! # Cancel
//! No await point.
#![forbid(unsafe_code)]

use super::entry::Call;
use super::info::StartMethod;
use super::order::{Descriptors, Order};
use super::origin::{self, Origin};
use super::protocol::{self, Answer, Base, Born, Ready, Reply, Report, Request, Role};
use super::variables::Variables;
use super::{child, executor, preload, role};
use crate::error::{Error, ErrorKind, Result};
use crate::os::spawn::{self, Fork, SingleThreaded};
use crate::os::sync::lock;
use crate::os::{
    attributes::{Attributes, Kept},
    background,
    credentials::{self, Credentials},
    directory, eventfd, exec, pidfd, poll, profile, self_pipe, signal, socket,
    socket::{Sender, Wait},
};
use crate::shm::family::Family;
use crate::wire::{Parcel, frame};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::sync::Mutex;
use std::time::Duration;

struct Server {
    single: Option<SingleThreaded>,
    /// Signals, intake, and what kills this process when the root ends.
    own: Vec<OwnedFd>,
    /// Rung when a process has taken a slot in the family table.
    new_slots: BorrowedFd<'static>,
    connections: Vec<Connection>,
    /// How many there have been.
    connected: u64,
    /// Pid and pidfd of each process with a slot in the family table, and of each child where other threads could take SIGCHLD.
    watched: Vec<(u32, OwnedFd)>,
    /// A process in the family table cannot be watched, for want of a descriptor for example: the table is checked repeatedly.
    has_unwatched: bool,
    /// The report sockets of children, if the kernel does not report exits to their starters. If it does, it also reaps.
    exits: Option<BTreeMap<u32, OwnedFd>>,
    /// The environment that this process has at the moment. It never changes its directory, as it might not be able to
    /// return.
    environment: Option<Variables>,
    orderers: Orderers,
}

/// The connection over which each child was ordered, by the child's pid.
#[derive(Default)]
struct Orderers {
    of: BTreeMap<u32, u64>,
    /// The length at which ended children are removed: twice the number that was left the last time.
    sweep_at: usize,
}

impl Orderers {
    /// Notes a child that was just made. An earlier one with its pid has ended and been reaped.
    fn note(&mut self, pid: u32, connection: u64) {
        if self.of.len() >= self.sweep_at {
            self.of.retain(|pid, _| pidfd::is_child_of_pid(*pid));
            self.sweep_at = 2 * self.of.len() + 64;
        }
        self.of.insert(pid, connection);
    }

    fn ordered(&self, pid: u32, connection: u64) -> bool {
        self.of.get(&pid) == Some(&connection)
    }
}

/// A child that waits for its order at the other end of `socket`.
struct Unordered {
    pid: u32,
    pidfd: OwnedFd,
    socket: OwnedFd,
}

const SIGNALS: usize = 0;
const INTAKE: usize = 1;
const CLAIMS: usize = 2;

/// How often the server checks everything while it cannot poll.
const UNPOLLED: Duration = Duration::from_millis(5);

/// How often it checks processes that it cannot watch.
const UNWATCHED: Duration = Duration::from_millis(100);

/// How long the server waits for a starter that was stopped in the middle of a request, or that reads no answer.
const STARTER_LIMIT: Duration = Duration::from_secs(2);

struct Connection {
    /// No other connection of this server has or had it.
    number: u64,
    socket: OwnedFd,
    environment: Variables,
    /// The directory in which its children start, if not the one of this process.
    directory: Option<OwnedFd>,
    /// The lifeline of the process at the other end, known from its first order: ties its spare children to it.
    lifeline: Option<OwnedFd>,
    /// The process at the other end now has other rights than this one, and gets its children from another server.
    is_retired: bool,
}

/// The receiving end of the intake, until the server has started.
static PREPARED: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// The origin that the server's children inherit.
pub(super) fn prepare_origin(program: OwnedFd, root_lifeline: OwnedFd) -> io::Result<()> {
    let (theirs, ours) = socket::packet_pair()?;
    // A process that finds no room, because this server is stopped, starts a server of its own.
    socket::limit_sends(theirs.as_fd(), STARTER_LIMIT)?;
    origin::set_origin(Origin { program, root_lifeline: Some(root_lifeline), intake: Some(theirs) });
    *lock(&PREPARED) = Some(ours);
    Ok(())
}

/// Runs the fork server until its last connection hangs up.
pub(super) fn serve(starter: OwnedFd, preloads: &[Call], single: Option<SingleThreaded>) -> ! {
    let started = Server::start(starter.as_fd(), preloads, single);
    match started {
        Ok(mut server) => {
            server.connect(starter);
            server.run()
        }
        Err(error) => {
            // The starter may be gone.
            let _ = protocol::send(starter.as_fd(), &Answer::<Ready>::Err(error), &[], &[]);
            spawn::exit_now(1)
        }
    }
}

impl Server {
    fn start(starter: BorrowedFd<'_>, preloads: &[Call], single: Option<SingleThreaded>) -> Result<Self> {
        let failed = |error| protocol::spawn_error("the fork server cannot start", error);
        let gone = || Error::new(ErrorKind::Spawn, "the root process is gone");
        let lifeline = origin::origin()?.root_lifeline.as_ref().ok_or_else(gone)?;
        let tie = signal::reopen(lifeline.as_fd()).and_then(signal::die_with).map_err(failed)?.ok_or_else(gone)?;
        background::forbid();
        origin::set_preloading(true);
        let mut has_preloaded = !preloads.is_empty();
        preload::run_for(starter, preloads)?;
        while let Some(call) = preload::next_preload(starter).map_err(failed)? {
            has_preloaded = true;
            preload::run_for(starter, &[call])?;
        }
        origin::set_preloading(false);
        if has_preloaded {
            profile::write(); // Its children count for themselves.
        }
        // Only a preload could have started a thread since.
        let single = if has_preloaded { single.and_then(|_| SingleThreaded::check_soon()) } else { single };
        if single.is_some() {
            // If this fails, children share the sockets by which tokio learns of signals; all else works.
            let _ = self_pipe::find();
        }
        // Made here once rather than in every child: the stream, and what tokio has registered for the end of this thread.
        let _ = std::io::stdout();
        let _ = executor::is_inside_runtime();
        child::rehearse(Some(socket::packet_pair().map_err(failed)?))?;
        exec::write_to_nobody().map_err(failed)?;
        if single.is_none() {
            signal::ignore_group_signals();
        }
        spawn::set_name(c"mp-server");
        let signals = signal::block_all_and_watch_children().map_err(failed)?;
        signal::unshield();
        let intake = lock(&PREPARED).take().ok_or_else(gone)?;
        // An action for SIGCHLD that a preload has set is for the children; here the kernel or the server reaps.
        signal::keep_child_action();
        if single.is_some() {
            signal::reap_by_kernel(false);
        } else {
            // A thread that a preload left may have its own handler.
            signal::stop_reaping_by_kernel();
        }
        let reports_exit = !kernel_reports_exits(single);
        if !reports_exit {
            signal::reap_by_kernel(true);
            while spawn::reap().is_some() {} // Processes that a preload started and has not waited for.
        }
        let mut server = Self {
            single,
            own: vec![signals, intake, tie],
            new_slots: Family::get().map_err(failed)?.new_slots(),
            connections: Vec::new(),
            connected: 0,
            watched: Vec::new(),
            has_unwatched: false,
            exits: reports_exit.then(BTreeMap::new),
            environment: None,
            orderers: Orderers::default(),
        };
        let (credentials, umask) = Credentials::look(&mut credentials::Kept::default()).map_err(failed)?;
        let attributes = Attributes::of_this_process(&mut Kept::default(), umask);
        // A server starts once.
        origin::set_base(Base { credentials, attributes: attributes.clone() });
        let ready = Answer::<Ready>::Ok(Ready { must_exec: single.is_none(), attributes });
        protocol::send(starter, &ready, &[], &[]).map_err(failed)?;
        server.watch_family();
        // An earlier server may have died between a recovery and its doorbells.
        Family::get().map_err(failed)?.wake_all();
        Ok(server)
    }

    /// Watches each process in the family table that it does not watch yet.
    fn watch_family(&mut self) {
        let Ok(family) = Family::get() else { return };
        eventfd::drain(family.new_slots());
        self.has_unwatched = false;
        for pid in family.pids() {
            if self.watched.iter().any(|(watched, _)| *watched == pid) {
                continue;
            }
            match pidfd::open(pid) {
                Ok(pidfd) => {
                    family.recover_predecessors(pid, pidfd.as_fd());
                    self.watched.push((pid, pidfd));
                }
                Err(error) => {
                    family.recover_if_gone(pid);
                    self.has_unwatched |= error.raw_os_error() != Some(libc::ESRCH);
                }
            }
        }
    }

    fn connect(&mut self, socket: OwnedFd) {
        // Without the limit a stopped starter could stop the server.
        let _ = socket::limit_waits(socket.as_fd(), STARTER_LIMIT);
        self.connected += 1;
        self.connections.push(Connection {
            number: self.connected,
            socket,
            environment: Variables::default(),
            directory: None,
            lifeline: None,
            is_retired: false,
        });
    }

    fn run(&mut self) -> ! {
        loop {
            let ready = self.wait();
            let (own, rest) = ready.split_at(3);
            let (connections, watched) = rest.split_at(self.connections.len());
            // Requests first: a process waits for each.
            let mut at = 0;
            for is_ready in connections {
                if !is_ready || self.take_request(at) {
                    at += 1;
                } else {
                    self.connections.remove(at);
                }
            }
            let mut ended = watched.iter();
            let has_ended = |pidfd: &OwnedFd| pidfd::has_exited(pidfd.as_fd());
            let (gone, left): (Vec<_>, _) = std::mem::take(&mut self.watched)
                .into_iter()
                .partition(|(_, pidfd)| ended.next() == Some(&true) && has_ended(pidfd));
            self.watched = left;
            if own[INTAKE] {
                self.take_connection();
            }
            if own[SIGNALS] {
                signal::drain(self.own[SIGNALS].as_fd());
            }
            if own[SIGNALS] {
                self.reap();
            }
            for (pid, pidfd) in gone {
                self.finish(pid, &pidfd);
            }
            if own[CLAIMS] || self.has_unwatched {
                self.watch_family();
            }
            if self.connections.is_empty() {
                // The child that started this server has ended, and so have all its children here. Another server may not
                // have seen the latest new slots.
                eventfd::notify(self.new_slots);
                profile::exit(0);
            }
        }
    }

    /// Sleeps until something is ready: signals, intake, new slots, connections, the watched, in this order.
    fn wait(&self) -> Vec<bool> {
        let connections = self.connections.iter().map(|connection| connection.socket.as_fd());
        let watched = self.watched.iter().map(|(_, pidfd)| pidfd.as_fd());
        let own = self.own[..=INTAKE].iter().map(AsFd::as_fd).chain([self.new_slots]);
        let all: Vec<_> = own.chain(connections).chain(watched).collect();
        poll::readable(&all, self.has_unwatched.then_some(UNWATCHED)).unwrap_or_else(|_| {
            // Out of kernel memory, or of descriptors that may be polled: check everything soon, which is slow and right,
            // as no check waits for what has not come.
            std::thread::sleep(UNPOLLED);
            vec![true; all.len()]
        })
    }

    /// Forks a child for the connection at `at`, with the environment of this process, that waits for its order. `order`: the
    /// descriptors of an order that this process will pass on at once. A spare child gets its order from its
    /// starter, and its `lifeline` now.
    fn fork(
        &mut self,
        at: usize,
        single: SingleThreaded,
        order: Option<&mut Option<Descriptors>>,
        lifeline: Option<OwnedFd>,
    ) -> io::Result<Unordered> {
        let (ours, theirs) = socket::packet_pair()?;
        socket::learn_senders(theirs.as_fd())?;
        let group = spawn::process_group();
        // Made here: each page of code that a child enters, and each that it writes to, costs it a page fault.
        let mut private = Vec::with_capacity(
            self.most_private() + order.as_deref().and_then(Option::as_ref).map_or(0, Descriptors::count),
        );
        match spawn::fork(single)? {
            // It has no order, so it ends only if it is killed; its pid can hardly be another process's yet.
            Fork::Parent(pid) => {
                let pidfd = pidfd::open(pid)?;
                self.orderers.note(pid, self.connections[at].number);
                Ok(Unordered { pid, pidfd, socket: ours })
            }
            Fork::Child => {
                let directory = self.connections[at].directory.as_ref();
                let moved = directory.map_or(Ok(()), directory::enter);
                self.private(&mut private);
                private.push(ours);
                let is_ordered = order.is_some();
                if let Some(order) = order.and_then(Option::take) {
                    order.into_all(&mut private);
                }
                child::after_fork(theirs, private, is_ordered, moved, group, lifeline, single)
            }
        }
    }

    fn take_connection(&mut self) {
        // A sender that died halfway has sent nothing.
        if let Ok(Some(mut parcel)) = frame::recv(self.own[INTAKE].as_fd(), Wait::No) {
            parcel.fds.drain(..).for_each(|socket| self.connect(socket));
        }
    }

    /// Handles one request of the connection at `at`; `false` if the connection is over.
    fn take_request(&mut self, at: usize) -> bool {
        let is_other = match socket::sender(self.connections[at].socket.as_fd()) {
            // A message that comes from now on is handled the next time.
            Sender::Nobody => return true,
            Sender::SameUser => false,
            Sender::Other => true,
        };
        let request = protocol::try_recv::<Request>(self.connections[at].socket.as_fd());
        // A starter that changes its user retires the connection itself; one that has not done so gets no children. A signal is
        // no reason: a process, or one thread of it, may be another user only for a while.
        let connection = &mut self.connections[at];
        connection.is_retired |=
            is_other && matches!(request, Ok(Some((Request::Child { .. } | Request::Spares { .. }, _))));
        let is_retired = connection.is_retired;
        let (number, answer) = match request {
            Ok(Some((Request::Signal { pid, signal }, _))) => {
                self.pass_on(signal, pid, at);
                return true;
            }
            Ok(Some((Request::Retire, _))) => {
                self.connections[at].is_retired = true;
                return true;
            }
            Ok(Some((Request::Child { number, .. }, _))) if is_retired => {
                return self.reply(at, &Reply::Refused { number }, &[]);
            }
            Ok(Some((Request::Spares { count, generation }, _))) if is_retired => {
                let none = Reply::Spare { pid: None, generation, never: true };
                return (0..count).all(|_| self.reply(at, &none, &[]));
            }
            Ok(Some((Request::Child { number }, parcel))) => (number, self.start_child(at, parcel)),
            Ok(Some((Request::Spares { count, generation }, _))) => {
                return (0..count).all(|_| self.send_spare(at, generation));
            }
            Ok(None) => return false,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            // It is unknown whether the order was taken, and what comes next: the starter repeats it over a new connection.
            Err(error) if error.raw_os_error().is_some() || error.kind() == io::ErrorKind::InvalidData => return false,
            Err(error) => (0, Err(protocol::spawn_error("the fork server cannot take the order", error))),
        };
        let (answer, pidfd) = match answer {
            Ok((born, pidfd)) => (Ok(born), Some(pidfd)),
            Err(error) => (Err(error), None),
        };
        self.reply(at, &Reply::Child { number, answer }, &pidfd.iter().map(AsFd::as_fd).collect::<Vec<_>>())
    }

    /// Sends `signal` to a child that was ordered over the connection at `at`, and to no other process.
    fn pass_on(&self, signal: i32, pid: u32, at: usize) {
        if let Some(signal) = Signal::from_named_raw(signal)
            && self.orderers.ordered(pid, self.connections[at].number)
            && let Ok(child) = pidfd::open(pid)
            && pidfd::is_child(child.as_fd())
        {
            // The child may have ended meanwhile. A signal that this process may not send, its starter may not either.
            let _ = pidfd::signal_child(child.as_fd(), pid, signal);
        }
    }

    /// Sends a reply; `false` if the other end is gone.
    fn reply(&self, at: usize, reply: &Reply, fds: &[BorrowedFd<'_>]) -> bool {
        protocol::send(self.connections[at].socket.as_fd(), reply, &[], fds).is_ok()
    }

    fn send_spare(&mut self, at: usize, generation: u64) -> bool {
        let spare = match self.single {
            Some(single) if self.exits.is_none() => {
                self.become_like(at, single);
                self.fork_spare(at, single).ok()
            }
            _ => None,
        };
        let fds: Vec<_> = spare.iter().flat_map(|spare| [spare.pidfd.as_fd(), spare.socket.as_fd()]).collect();
        let never = self.single.is_none() || self.exits.is_some();
        self.reply(at, &Reply::Spare { pid: spare.as_ref().map(|spare| spare.pid), generation, never }, &fds)
    }

    fn fork_spare(&mut self, at: usize, single: SingleThreaded) -> io::Result<Unordered> {
        let lifeline = self.connections[at].lifeline.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let lifeline = signal::reopen(lifeline.as_fd())?;
        self.fork(at, single, None, Some(lifeline))
    }

    fn start_child(&mut self, at: usize, mut parcel: Parcel) -> Result<(Born, OwnedFd)> {
        let failed = |error| protocol::spawn_error("a child cannot be started", error);
        let mut order = Order::take(&mut parcel).map_err(failed)?;
        let Parcel { bytes: arguments, fds } = parcel;
        let mut fds = order.assign_descriptors(None, fds).map_err(failed)?;
        let connection = &mut self.connections[at];
        if connection.lifeline.is_none() {
            // A description of its own: the other one is tied to the child. Without it there are no spares for now.
            connection.lifeline = fds.lifeline.as_ref().and_then(|lifeline| signal::reopen(lifeline.as_fd()).ok());
        }
        if let Some(environment) = order.starter_environment.take() {
            connection.environment = environment;
        }
        if let Some(directory) = fds.directory.take() {
            connection.directory = Some(directory);
            order.has_directory = false; // A child inherits it.
        }
        order.goes_by_server = true;
        let (pid, pidfd, report) = match (order.start_method, self.single) {
            (StartMethod::ForkServer, Some(single)) => {
                self.become_like(at, single);
                let mut held = Some(fds);
                let child = self.fork(at, single, Some(&mut held), None).map_err(failed)?;
                let Some(held) = held else { return Err(failed(io::ErrorKind::InvalidData.into())) };
                child::send_order(&child.socket, &order, &arguments, &held).map_err(failed)?;
                (child.pid, child.pidfd, held.report)
            }
            _ => {
                let child = self.exec(at, order, &arguments, fds).map_err(failed)?;
                self.orderers.note(child.0, self.connections[at].number);
                child
            }
        };
        if self.single.is_none() {
            match pidfd.try_clone() {
                Ok(watched) => self.watched.push((pid, watched)),
                Err(error) => {
                    let _ = pidfd::signal_child(pidfd.as_fd(), pid, Signal::KILL);
                    pidfd::wait(pidfd.as_fd(), false, Some(STARTER_LIMIT));
                    pidfd::reap(pidfd.as_fd());
                    return Err(failed(error));
                }
            }
        }
        let reports_exit = self.exits.is_some();
        if let Some(exits) = &mut self.exits {
            exits.insert(pid, report);
        }
        Ok((Born { pid, reports_exit }, pidfd))
    }

    /// Takes on the environment of a starter, which its children then inherit.
    fn become_like(&mut self, at: usize, single: SingleThreaded) {
        let connection = &self.connections[at];
        if self.environment.as_ref() != Some(&connection.environment) {
            let wanted = &connection.environment;
            for (key, _) in std::env::vars_os() {
                if !wanted.iter().any(|(other, _)| other == key) {
                    spawn::remove_variable(single, &key);
                }
            }
            wanted.iter().for_each(|(key, value)| spawn::set_variable(single, key, value));
            self.environment = Some(wanted.clone());
        }
    }

    /// At least as many as [`private`](Self::private) finds, and one more.
    fn most_private(&self) -> usize {
        let exits = self.exits.as_ref().map_or(0, BTreeMap::len);
        3 * self.connections.len() + self.watched.len() + exits + self.own.len() + 1
    }

    /// All descriptors of the server, which a forked child must not keep.
    fn private(&mut self, all: &mut Vec<OwnedFd>) {
        for Connection { socket, directory, lifeline, environment, .. } in std::mem::take(&mut self.connections) {
            all.push(socket);
            if let Some(directory) = directory {
                all.push(directory);
            }
            if let Some(lifeline) = lifeline {
                all.push(lifeline);
            }
            std::mem::forget(environment); // The process ends with it; to free it would cost a page.
        }
        for (_, pidfd) in std::mem::take(&mut self.watched) {
            all.push(pidfd);
        }
        for report in self.exits.take().into_iter().flat_map(BTreeMap::into_values) {
            all.push(report);
        }
        all.append(&mut self.own);
    }

    /// Executes the program again and sends it the order.
    fn exec(
        &mut self,
        at: usize,
        mut order: Order,
        arguments: &[u8],
        mut fds: Descriptors,
    ) -> io::Result<(u32, OwnedFd, OwnedFd)> {
        let connection = &self.connections[at];
        let origin = origin::origin().map_err(io::Error::other)?;
        order.has_directory = connection.directory.is_some();
        fds.directory = connection.directory.as_ref().map(|directory| directory.try_clone()).transpose()?;
        let variables = connection.environment.with(&order.own_variables);
        let family = Family::get()?;
        let settle = [Some(&origin.program), origin.root_lifeline.as_ref(), origin.intake.as_ref()];
        let settle: Vec<_> = settle.into_iter().flatten().map(AsFd::as_fd).chain(family.descriptors()).collect();
        let role = Role::Child { base: origin::base().cloned().unwrap_or_default() };
        let (socket, theirs) = socket::packet_pair()?;
        // An ignored SIGCHLD would be inherited, and a failed exec could not be waited for; and the pid is its own until
        // it is reaped.
        if self.exits.is_none() {
            signal::reap_by_kernel(false);
        }
        let started = role::start(origin.program.as_fd(), &variables, role, &settle, (&socket, theirs));
        let sent = started.and_then(|process| match child::send_order(&socket, &order, arguments, &fds) {
            // Its starter gets an error, so it must not run.
            Err(error) if !role::is_gone(&error) => {
                process.end();
                Err(error)
            }
            // One that has ended before it had its order is a child that died.
            _ => Ok((process.pid(), process.into_pidfd(), fds.report)),
        });
        if self.exits.is_none() {
            signal::reap_by_kernel(true);
            // The kernel leaves children that ended meanwhile to this process, and withdraws the signal for them.
            self.reap();
        }
        sent
    }

    /// Reaps children that have ended and reports their status, if the kernel does not.
    fn reap(&mut self) {
        if self.single.is_none() {
            // Other children belong to threads that a preload left; these wait for them.
            return;
        }
        while let Some((pid, status)) = spawn::reap() {
            self.report_exit(pid, Some(status));
        }
    }

    fn report_exit(&mut self, pid: u32, status: Option<i32>) {
        if let (Some(report), Some(status)) = (self.exits.as_mut().and_then(|exits| exits.remove(&pid)), status) {
            // The starter may have dropped its handle.
            let _ = Report::send_exited(report.as_fd(), status);
        }
    }

    /// Handles the end of a watched process.
    fn finish(&mut self, pid: u32, pidfd: &OwnedFd) {
        if self.single.is_none() && self.exits.as_ref().is_some_and(|exits| exits.contains_key(&pid)) {
            // If a thread of a preload has reaped it, the kernel may still know the status; otherwise it is lost.
            let status = pidfd::reap(pidfd.as_fd()).or_else(|| match pidfd::exit(pidfd.as_fd()) {
                pidfd::Exit::Known(status) => Some(status),
                _ => None,
            });
            self.report_exit(pid, status.map(ExitStatusExt::into_raw));
        }
        recover(pid, pidfd);
    }
}

fn recover(pid: u32, pidfd: &OwnedFd) {
    if let Ok(family) = Family::get() {
        family.recover(pid, pidfd.as_fd());
    }
}

/// Returns `true` if a pidfd gives the exit status of a reaped process here: tried once, with a child that ends at once.
fn kernel_reports_exits(single: Option<SingleThreaded>) -> bool {
    let Some(Ok(fork)) = single.map(spawn::fork) else { return false };
    let Fork::Parent(pid) = fork else { spawn::exit_now(0) };
    let Ok(pidfd) = pidfd::open(pid) else { return false };
    pidfd::wait(pidfd.as_fd(), false, None);
    while spawn::reap().is_some() {}
    matches!(pidfd::exit(pidfd.as_fd()), pidfd::Exit::Known(_))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{Process, client};

    #[test]
    fn child_belongs_to_the_connection_that_ordered_it_last() {
        let mut orderers = Orderers::default();
        orderers.note(7, 1);
        assert!(orderers.ordered(7, 1) && !orderers.ordered(7, 2) && !orderers.ordered(8, 1));
        orderers.note(7, 2); // It had ended, and its pid was given again.
        assert!(orderers.ordered(7, 2) && !orderers.ordered(7, 1));
    }

    async fn is_endless() {
        std::future::pending::<()>().await;
    }

    /// A process with a connection of its own: it tries to have a child of another one killed, then its own.
    async fn kills_by_its_connection(other: u32) -> Option<i32> {
        let mut own = Process::builder().daemon(true).spawn(is_endless, ()).unwrap();
        for pid in [other, own.pid()] {
            client::ask_for_signal(pid, Signal::KILL).unwrap();
        }
        // Requests are taken in order.
        own.wait().await.unwrap().signal()
    }

    #[tokio::test]
    async fn of_two_live_connections_neither_has_a_child_of_the_other_signalled() {
        let mut victim = Process::spawn(is_endless, ()).unwrap();
        let attackers = [(); 3].map(|()| Process::spawn(kills_by_its_connection, (victim.pid(),)).unwrap());
        for attacker in attackers {
            assert_eq!(attacker.await.unwrap(), Some(Signal::KILL.as_raw()));
        }
        assert!(victim.is_alive());
        client::ask_for_signal(victim.pid(), Signal::KILL).unwrap();
        assert_eq!(victim.wait().await.unwrap().signal(), Some(Signal::KILL.as_raw()));
    }

    #[test]
    fn children_that_have_ended_are_forgotten() {
        let mut orderers = Orderers::default();
        // No children of this process.
        (1 << 22..(1 << 22) + 100_000).for_each(|pid| orderers.note(pid, 1));
        assert!(orderers.of.len() <= 65, "{}", orderers.of.len());
    }
}
