//! The fork server: one small process per program that forks and reaps children, and recovers what dead processes held.
//!
//! # State
//! One connection per process of the family that spawns, with the environment and directory that its next child
//! shall have, and the lifeline that its spares are tied to. All of it belongs to this one thread.
//!
//! # Moves
//! It is started when the first preload is asked for, or for the first child: it runs what was preloaded, as it is told of it, until
//! it is told to serve. An order comes: fork (or exec) a child, hand it on, answer with pid and pidfd. Spares are asked for: fork them and
//! send them home, tied to their starter, each with the socket that takes its order and its report. A child ends: the
//! kernel reaps it, or we do. Somebody claims a slot of the family table: watch it, and recover what it held when it ends. A
//! connection hangs up: forget it, and end if it was the last. The root ends: the kernel kills us by the root's lifeline.
//!
//! # Invariants
//! 1. There is one thread, or (`single` is `None`) no fork without exec.
//! 2. It has no more rights than its starter had, gives children to processes of its own user and group only, and after
//!    [`Request::Retire`] to nobody over that connection. It signals its own children only.
//! 3. A child never runs on with a descriptor of ours: `private` names them all.
//!
//! # Death
//! Killed while it preloads, or before it is told to serve: its starter finds out when it wants a child, and starts another
//! one, which preloads all of it. Killed before the fork: the order's report socket hangs up, so the starter knows that no child was born, starts
//! another server and orders again. Killed after it: the child says so over that socket, and its starter adopts
//! it. Spares that have gone home stay good. Its children go on; the next server watches those with a slot and recovers
//! what they held, and init reaps them. A starter ends: the kernel kills its spares by its lifeline, and its connection hangs up.
//!
//! # Cancel
//! Nothing here is a future.
#![forbid(unsafe_code)]

use super::entry::Call;
use super::info::StartMethod;
use super::order::{Descriptors, Order};
use super::origin::{self, Origin};
use super::protocol::{self, Answer, Base, Born, Ready, Reply, Report, Request, Role};
use super::variables::Variables;
use super::{child, preload, role};
use crate::error::{Error, ErrorKind, Result};
use crate::os::spawn::{self, Fork, SingleThreaded};
use crate::os::sync::lock;
use crate::os::{
    attributes::{Attributes, Kept},
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
    /// Rung when somebody has claimed a slot in the family table.
    claims: BorrowedFd<'static>,
    connections: Vec<Connection>,
    /// By pid and pidfd: who has a slot in the family table, and our children where threads could take SIGCHLD from us.
    watched: Vec<(u32, OwnedFd)>,
    /// Somebody in the family table could not be watched, for want of a descriptor say: the table is looked at again and again.
    has_unwatched: bool,
    /// Where to report exits, if the kernel does not tell them to our children's starters. If it does, it reaps too.
    exits: Option<BTreeMap<u32, OwnedFd>>,
    /// Whose environment this process has at the moment. Its directory is always the one that it was started in, which it
    /// might not come back to.
    environment: Option<Variables>,
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

/// How often the server looks at everything when it cannot sleep until something comes.
const UNPOLLED: Duration = Duration::from_millis(5);

/// How often it looks after those whom it cannot watch.
const UNWATCHED: Duration = Duration::from_millis(100);

/// So long the server waits for a starter that was stopped in the middle of a request, or that reads no answer.
const STARTER_LIMIT: Duration = Duration::from_secs(2);

struct Connection {
    socket: OwnedFd,
    environment: Variables,
    /// Where its children begin, if not where this process is.
    directory: Option<OwnedFd>,
    /// Of the process at the other end, known from its first order: its spare children are tied to it.
    lifeline: Option<OwnedFd>,
    /// The process at the other end has other rights by now than this one, and gets its children elsewhere.
    is_retired: bool,
}

/// The receiving end of the intake, until the server has started.
static PREPARED: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// The origin that the server's children inherit.
pub(super) fn prepare_origin(program: OwnedFd, root_lifeline: OwnedFd) -> io::Result<()> {
    let (theirs, ours) = socket::packet_pair()?;
    // Who finds no room, because this process is stopped, starts a server of its own.
    socket::limit_sends(theirs.as_fd(), STARTER_LIMIT)?;
    origin::set_origin(Origin { program, root_lifeline: Some(root_lifeline), intake: Some(theirs) });
    *lock(&PREPARED) = Some(ours);
    Ok(())
}

/// The whole life of the fork server.
pub(super) fn serve(starter: OwnedFd, preloads: &[Call], single: Option<SingleThreaded>) -> ! {
    let started = Server::start(starter.as_fd(), preloads, single);
    match started {
        Ok(mut server) => {
            server.connect(starter);
            server.run()
        }
        Err(error) => {
            // Nobody needs to know if the starter is gone.
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
            // Where it fails children share what tokio hears signals by; all else is as it should be.
            let _ = self_pipe::find();
        }
        let _ = std::io::stdout(); // Made here once rather than in every child.
        child::rehearse(Some(socket::packet_pair().map_err(failed)?))?;
        exec::write_to_nobody().map_err(failed)?;
        if single.is_none() {
            signal::ignore_group_signals();
        }
        spawn::set_name(c"mp-server");
        let signals = signal::block_all_but_children().map_err(failed)?;
        signal::unshield();
        let intake = lock(&PREPARED).take().ok_or_else(gone)?;
        // What a preload has set is for the children; here it is the kernel, or we, that reap.
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
            while spawn::reap().is_some() {} // What a preload started, and has not waited for.
        }
        let mut server = Self {
            single,
            own: vec![signals, intake, tie],
            claims: Family::get().map_err(failed)?.claims(),
            connections: Vec::new(),
            watched: Vec::new(),
            has_unwatched: false,
            exits: reports_exit.then(BTreeMap::new),
            environment: None,
        };
        let (credentials, umask) = Credentials::look(&mut credentials::Kept::default()).map_err(failed)?;
        let attributes = Attributes::of_this_process(&mut Kept::default(), umask);
        // A server starts once.
        origin::set_base(Base { credentials, attributes: attributes.clone() });
        let ready = Answer::<Ready>::Ok(Ready { must_exec: single.is_none(), attributes });
        protocol::send(starter, &ready, &[], &[]).map_err(failed)?;
        server.watch_family();
        // An earlier server may have died between a recovery and its doorbells.
        Family::get().map_err(failed)?.ring_all();
        Ok(server)
    }

    /// Watches those in the family table that it does not watch yet.
    fn watch_family(&mut self) {
        let Ok(family) = Family::get() else { return };
        eventfd::drain(family.claims());
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
        // Without the limit it could stand still as long as one starter does.
        let _ = socket::limit_waits(socket.as_fd(), STARTER_LIMIT);
        self.connections.push(Connection {
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
            // Requests first: somebody waits for each.
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
                // Started by a child that has ended, with all that it started here. What we were told of claims
                // another server may not know.
                eventfd::ring(self.claims);
                profile::exit(0);
            }
        }
    }

    /// Sleeps until something is ready: signals, intake, claims, connections, the watched, in this order.
    fn wait(&self) -> Vec<bool> {
        let connections = self.connections.iter().map(|connection| connection.socket.as_fd());
        let watched = self.watched.iter().map(|(_, pidfd)| pidfd.as_fd());
        let own = self.own[..=INTAKE].iter().map(AsFd::as_fd).chain([self.claims]);
        let all: Vec<_> = own.chain(connections).chain(watched).collect();
        poll::readable(&all, self.has_unwatched.then_some(UNWATCHED)).unwrap_or_else(|_| {
            // Out of kernel memory, or of descriptors that may be polled: check everything soon, which is slow and right,
            // as no check waits for what has not come.
            std::thread::sleep(UNPOLLED);
            vec![true; all.len()]
        })
    }

    /// A child of the connection at `at` that waits for its order, like this process in its environment. `order` is what this process
    /// holds of an order that it will pass on at once.
    /// A spare one is told by its starter itself, and has its `lifeline` before.
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
            // It has no order, so it ends only if somebody kills it; the pid is hardly ever another's by now.
            Fork::Parent(pid) => Ok(Unordered { pid, pidfd: pidfd::open(pid)?, socket: ours }),
            Fork::Child => {
                let directory = self.connections[at].directory.as_ref();
                let moved = directory.map_or(Ok(()), |directory| directory::enter(directory));
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

    /// Does one request of the connection at `at`; `false` if the connection is over.
    fn take_request(&mut self, at: usize) -> bool {
        match socket::sender(self.connections[at].socket.as_fd()) {
            // What comes from now on is looked at the next time.
            Sender::Nobody => return true,
            Sender::SameUser => {}
            // It says so itself before it asks another server; whoever does not is not to get children of ours.
            Sender::Other => self.connections[at].is_retired = true,
        }
        let (number, answer) = match protocol::try_recv::<Request>(self.connections[at].socket.as_fd()) {
            Ok(Some((Request::Signal(signal), parcel))) => {
                parcel.fds.iter().for_each(|child| pass_on(signal, child));
                return true;
            }
            Ok(Some((Request::Retire, _))) => {
                self.connections[at].is_retired = true;
                return true;
            }
            Ok(Some((Request::Child { number, .. }, _))) if self.connections[at].is_retired => {
                let why = "the process that asks for a child has other rights than the fork server";
                (number, Err(Error::new(ErrorKind::Spawn, why)))
            }
            Ok(Some((Request::Spares { .. }, _))) if self.connections[at].is_retired => return true,
            Ok(Some((Request::Child { number }, parcel))) => (number, self.start_child(at, parcel)),
            Ok(Some((Request::Spares { count, generation }, _))) => {
                return (0..count).all(|_| self.send_spare(at, generation));
            }
            Ok(None) => return false,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            // Nobody knows whether the order was taken, or what comes next: over a new connection it is given again.
            Err(error) if error.raw_os_error().is_some() || error.kind() == io::ErrorKind::InvalidData => return false,
            Err(error) => (0, Err(protocol::spawn_error("the fork server cannot take the order", error))),
        };
        let (answer, pidfd) = match answer {
            Ok((born, pidfd)) => (Ok(born), Some(pidfd)),
            Err(error) => (Err(error), None),
        };
        self.reply(at, &Reply::Child { number, answer }, &pidfd.iter().map(AsFd::as_fd).collect::<Vec<_>>())
    }

    /// `false` if nobody is there to hear it.
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
        let mut fds = order.split(None, fds).map_err(failed)?;
        let connection = &mut self.connections[at];
        if connection.lifeline.is_none() {
            // Its own description: that of the child is tied to the child. Without it there are no spares for now.
            connection.lifeline = fds.lifeline.as_ref().and_then(|lifeline| signal::reopen(lifeline.as_fd()).ok());
        }
        if let Some(environment) = order.environment.take() {
            connection.environment = environment;
        }
        if let Some(directory) = fds.directory.take() {
            connection.directory = Some(directory);
            order.has_directory = false; // A child finds it here.
        }
        order.is_passed_on = true;
        let (pid, pidfd, report) = match (order.start_method, self.single) {
            (StartMethod::ForkServer, Some(single)) => {
                self.become_like(at, single);
                let mut held = Some(fds);
                let child = self.fork(at, single, Some(&mut held), None).map_err(failed)?;
                let Some(held) = held else { return Err(failed(io::ErrorKind::InvalidData.into())) };
                child::send_order(&child.socket, &order, &arguments, &held).map_err(failed)?;
                (child.pid, child.pidfd, held.report)
            }
            _ => self.exec(at, order, &arguments, fds).map_err(failed)?,
        };
        if self.single.is_none() {
            match pidfd.try_clone() {
                Ok(watched) => self.watched.push((pid, watched)),
                Err(error) => {
                    let _ = pidfd::signal(pidfd.as_fd(), Signal::KILL);
                    pidfd::wait(pidfd.as_fd(), false, None);
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

    /// Takes on the environment of a starter, for its children to inherit.
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

    /// No fewer than [`private`](Self::private) finds, and one more.
    fn most_private(&self) -> usize {
        let exits = self.exits.as_ref().map_or(0, BTreeMap::len);
        3 * self.connections.len() + self.watched.len() + exits + self.own.len() + 1
    }

    /// Everything of the server that a forked child must not keep.
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

    /// Starts the program afresh and tells it the order.
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
        let variables = connection.environment.with(&order.variables);
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
            // Its starter is told that there is none, so it must not run.
            Err(error) if !role::is_gone(&error) => {
                process.end();
                Err(error)
            }
            // One that has ended before it could be told is one that died.
            _ => Ok((process.pid(), process.into_pidfd(), fds.report)),
        });
        if self.exits.is_none() {
            signal::reap_by_kernel(true);
            // The kernel leaves to us whatever ended meanwhile, and takes back the signal that tells of it.
            self.reap();
        }
        sent
    }

    /// Reaps children that have ended, and tells how, if that is our part.
    fn reap(&mut self) {
        if self.single.is_none() {
            // Other children are those of the threads that a preload left; these wait for them.
            return;
        }
        while let Some((pid, status)) = spawn::reap() {
            self.report_exit(pid, Some(status));
        }
    }

    fn report_exit(&mut self, pid: u32, status: Option<i32>) {
        if let (Some(report), Some(status)) = (self.exits.as_mut().and_then(|exits| exits.remove(&pid)), status) {
            // If the starter has let go, nobody wants to know.
            let _ = Report::send_exited(report.as_fd(), status);
        }
    }

    /// Does what there is to do for one that was watched and has ended.
    fn finish(&mut self, pid: u32, pidfd: &OwnedFd) {
        if self.single.is_none() && self.exits.as_ref().is_some_and(|exits| exits.contains_key(&pid)) {
            // Where a thread of a preload has reaped it the kernel may know; else its starter hears that nobody does.
            let status = pidfd::reap(pidfd.as_fd()).or_else(|| match pidfd::exit(pidfd.as_fd()) {
                pidfd::Exit::Known(status) => Some(status),
                _ => None,
            });
            self.report_exit(pid, status.map(ExitStatusExt::into_raw));
        }
        recover(pid, pidfd);
    }
}

/// Sends `signal` to a child of this process, and to nobody else.
fn pass_on(signal: i32, child: &OwnedFd) {
    if let Some(signal) = Signal::from_named_raw(signal)
        && pidfd::is_child(child.as_fd())
    {
        // It may have ended meanwhile; and what this process may not, its starter might not either.
        let _ = pidfd::signal(child.as_fd(), signal);
    }
}

fn recover(pid: u32, pidfd: &OwnedFd) {
    if let Ok(family) = Family::get() {
        family.recover(pid, pidfd.as_fd());
    }
}

/// Whether the exit status of a reaped process can be had through its pidfd: tried once, with a child that ends.
fn kernel_reports_exits(single: Option<SingleThreaded>) -> bool {
    let Some(Ok(fork)) = single.map(spawn::fork) else { return false };
    let Fork::Parent(pid) = fork else { spawn::exit_now(0) };
    let Ok(pidfd) = pidfd::open(pid) else { return false };
    pidfd::wait(pidfd.as_fd(), false, None);
    while spawn::reap().is_some() {}
    matches!(pidfd::exit(pidfd.as_fd()), pidfd::Exit::Known(_))
}
