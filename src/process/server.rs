//! The fork server: one small process per program that does the forking, the reaping and the burying.
//!
//! # State
//! One connection per process of the family that spawns, with the environment and directory that its next child
//! shall have. All of it belongs to this one thread.
//!
//! # Moves
//! An order comes: hand it to a spare child, or fork (or exec) one; answer with pid and pidfd. Nothing to do: fork
//! spares, which wait for an order with their pages already touched, so that the next order need not wait for that. A child ends: reap it, bury it in the family table. A
//! connection hangs up: forget it. The root ends: the kernel kills us by the root's lifeline.
//!
//! # Invariants
//! 1. There is one thread, or (`single` is `None`) no fork without exec.
//! 2. A child never runs on with a descriptor of ours: `private` names them all.
//!
//! # Death
//! Killed before the fork: the order's report socket hangs up, so the starter knows that no child was born, starts
//! another server and orders again. Killed after it: the child has said so over that socket, and its starter adopts
//! it. A spare without an order ends; one with an order queued does it. Its children go on; the next server watches them by pidfd and buries them, and init reaps them.
//!
//! # Cancel
//! Nothing here is a future.
#![forbid(unsafe_code)]

use super::boot::{self, Origin};
use super::entry::{Call, Executor, Outcome};
use super::protocol::{self, Answer, Born, Descriptors, Hello, Order, Ready, Report, Role, Variables};
use super::{StartMethod, child};
use crate::error::{Error, ErrorKind, Result};
use crate::os::spawn::{self, Fork, SingleThreaded};
use crate::os::{image, pidfd, signal, socket, socket::Wait};
use crate::shm::family::Family;
use crate::wire::{self, Parcel, frame};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::rc::Rc;
use std::sync::Mutex;

struct Server {
    single: Option<SingleThreaded>,
    /// Signals, intake, and what kills this process when the root ends.
    own: Vec<OwnedFd>,
    connections: Vec<Connection>,
    /// Forked ahead, like this process in environment and directory.
    spares: Vec<Spare>,
    /// Watched by pidfd: children of a server that is gone, and our own where threads could take SIGCHLD from us.
    orphans: Vec<(u32, OwnedFd)>,
    /// Where to report exits, if the kernel does not tell them to our children's starters.
    exits: Option<BTreeMap<u32, OwnedFd>>,
    /// Whose environment and directory this process has at the moment.
    environment: Option<Variables>,
    directory: Option<Rc<OwnedFd>>,
}

/// A child that waits for its order at the other end of `socket`.
struct Spare {
    pid: u32,
    pidfd: OwnedFd,
    socket: OwnedFd,
}

/// How many spares there are when nothing else is to be done; each costs some 300 KiB.
const SPARES: usize = 2;

const SIGNALS: usize = 0;
const INTAKE: usize = 1;

struct Connection {
    socket: OwnedFd,
    environment: Variables,
    directory: Option<Rc<OwnedFd>>,
}

/// The receiving end of the intake, until the server has started.
static PREPARED: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// The origin that the server's children inherit.
pub(super) fn prepare_origin(program: OwnedFd, root_lifeline: OwnedFd) -> io::Result<()> {
    let (theirs, ours) = socket::packet_pair()?;
    boot::set_origin(Origin { program, root_lifeline: Some(root_lifeline), intake: Some(theirs) });
    *PREPARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(ours);
    Ok(())
}

/// The whole life of the fork server.
pub(super) fn serve(starter: OwnedFd, preload: &[Call], adopt: &[u32], single: Option<SingleThreaded>) -> ! {
    let started = Server::start(starter.as_fd(), preload, adopt, single);
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
    fn start(
        starter: std::os::fd::BorrowedFd<'_>,
        preload: &[Call],
        adopt: &[u32],
        single: Option<SingleThreaded>,
    ) -> Result<Self> {
        let failed = |error| protocol::spawn_error("the fork server cannot start", error);
        let gone = || Error::new(ErrorKind::Spawn, "the root process is gone");
        let lifeline = boot::origin()?.root_lifeline.as_ref().ok_or_else(gone)?;
        let tie = signal::reopen(lifeline.as_fd()).and_then(signal::die_with).map_err(failed)?.ok_or_else(gone)?;
        run_preloads(preload)?;
        // Only a preload could have started a thread since.
        let single = if preload.is_empty() { single } else { single.and(SingleThreaded::check()) };
        let _ = std::io::stdout(); // Made here once rather than in every child.
        child::rehearse()?;
        let null = boot::null_device().map_err(failed)?;
        rustix::stdio::dup2_stdout(&null)
            .and_then(|()| rustix::stdio::dup2_stderr(&null))
            .map_err(|e| failed(e.into()))?;
        if single.is_none() {
            signal::ignore_group_signals();
        }
        spawn::set_name(c"mp-server");
        let signals = signal::block_all_but_children().map_err(failed)?;
        let intake = PREPARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take().ok_or_else(gone)?;
        let tells_exit = !kernel_tells_exits(single);
        let server = Self {
            single,
            own: vec![signals, intake, tie],
            connections: Vec::new(),
            spares: Vec::new(),
            orphans: Vec::new(),
            exits: tells_exit.then(BTreeMap::new),
            environment: None,
            directory: None,
        };
        let ready = Answer::<Ready>::Ok(Ready { must_exec: single.is_none() });
        protocol::send(starter, &ready, &[], &[]).map_err(failed)?;
        Ok(server.adopting(adopt))
    }

    /// Watches those that an earlier server has left.
    fn adopting(mut self, children: &[u32]) -> Self {
        let Ok(family) = Family::get() else { return self };
        let mut pids = family.pids();
        pids.extend(children);
        pids.sort_unstable();
        pids.dedup();
        for pid in pids {
            match pidfd::open(pid) {
                Ok(pidfd) => self.orphans.push((pid, pidfd)),
                Err(_) => family.bury(pid),
            }
        }
        // The earlier server may have died between a burial and its bells.
        family.ring_all();
        self
    }

    fn connect(&mut self, socket: OwnedFd) {
        self.connections.push(Connection { socket, environment: Variables::default(), directory: None });
    }

    fn run(&mut self) -> ! {
        loop {
            let ready = match self.wait(self.lacks_spare()) {
                Some(ready) => ready,
                None => {
                    self.make_spare();
                    continue;
                }
            };
            let (first, rest) = ready.split_at(2);
            let (connections, orphans) = rest.split_at(self.connections.len());
            // Orders first: somebody waits for each.
            let mut at = 0;
            for is_ready in connections {
                if !is_ready || self.take_order(at) {
                    at += 1;
                } else {
                    self.connections.remove(at);
                }
            }
            if first[INTAKE] {
                self.take_connection();
            }
            if first[SIGNALS] {
                signal::drain(self.own[SIGNALS].as_fd());
                self.reap();
            }
            let mut ended = orphans.iter();
            let (gone, left) = std::mem::take(&mut self.orphans).into_iter().partition(|_| ended.next() == Some(&true));
            self.orphans = left;
            if !gone.is_empty() {
                self.reap();
            }
            gone.iter().for_each(|(pid, _): &(u32, OwnedFd)| bury(*pid));
        }
    }

    /// Sleeps until something is ready: signals, intake, connections, orphans, in this order. In a `hurry` it does not
    /// sleep: `None` if nothing is ready.
    fn wait(&self, hurry: bool) -> Option<Vec<bool>> {
        let connections = self.connections.iter().map(|connection| &connection.socket);
        let orphans = self.orphans.iter().map(|(_, pidfd)| pidfd);
        let all = self.own[..=INTAKE].iter().chain(connections).chain(orphans);
        let mut fds: Vec<PollFd<'_>> = all.map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        // Out of kernel memory: look at everything, which is slow and right.
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let polled = rustix::io::retry_on_intr(|| poll(&mut fds, hurry.then_some(&now)));
        (polled != Ok(0)).then(|| fds.iter().map(|fd| polled.is_err() || !fd.revents().is_empty()).collect())
    }

    /// Once somebody has shown that there will be orders, and how its children shall be.
    fn lacks_spare(&self) -> bool {
        self.single.is_some() && self.environment.is_some() && self.spares.len() < SPARES
    }

    /// If it cannot be had, the next order is done without it, and says why that fails too.
    fn make_spare(&mut self) {
        let Some(single) = self.single else { return };
        let Ok((ours, theirs)) = socket::packet_pair() else { return self.give_up_spares() };
        let group = rustix::process::getpgrp();
        match spawn::fork(single) {
            Ok(Fork::Parent(pid)) => match pidfd::open(pid) {
                Ok(pidfd) => self.spares.push(Spare { pid, pidfd, socket: ours }),
                Err(_) => self.give_up_spares(),
            },
            Ok(Fork::Child) => {
                let private = self.private(Some(ours));
                child::spare(theirs, private, group, single)
            }
            Err(_) => self.give_up_spares(),
        }
    }

    /// Until the next order changes `environment`.
    fn give_up_spares(&mut self) {
        self.environment = None;
    }

    /// Hands an order to a spare; gives it back if there is none.
    fn use_spare(&mut self, order: &Order, arguments: &[u8], fds: &Descriptors) -> Option<(u32, OwnedFd)> {
        while let Some(spare) = self.spares.pop() {
            // One that was killed is no loss: its socket refuses the order.
            if child::tell(&spare.socket, order, arguments, fds).is_ok() {
                return Some((spare.pid, spare.pidfd));
            }
        }
        None
    }

    fn take_connection(&mut self) {
        // A sender that died halfway has sent nothing.
        if let Ok(Some(mut parcel)) = frame::recv(self.own[INTAKE].as_fd(), Wait::No) {
            parcel.fds.drain(..).for_each(|socket| self.connect(socket));
        }
    }

    /// Does one order of the connection at `at`; `false` if the connection is over.
    fn take_order(&mut self, at: usize) -> bool {
        if socket::is_hung_up(self.connections[at].socket.as_fd()) {
            return false;
        }
        let answer = match protocol::recv::<Order>(self.connections[at].socket.as_fd()) {
            Ok(Some((order, parcel))) => self.start_child(at, order, parcel),
            Ok(None) => return false,
            Err(error) => Err(protocol::spawn_error("the fork server cannot take the order", error)),
        };
        let (answer, pidfd) = match answer {
            Ok((born, pidfd)) => (Ok(born), Some(pidfd)),
            Err(error) => (Err(error), None),
        };
        let fds: Vec<_> = pidfd.iter().map(AsFd::as_fd).collect();
        protocol::send(self.connections[at].socket.as_fd(), &answer, &[], &fds).is_ok()
    }

    fn start_child(&mut self, at: usize, mut order: Order, parcel: Parcel) -> Result<(Born, OwnedFd)> {
        let failed = |error| protocol::spawn_error("a child cannot be started", error);
        let Parcel { bytes: arguments, fds } = parcel;
        let mut fds = order.split(fds).map_err(failed)?;
        let connection = &mut self.connections[at];
        if let Some(environment) = order.environment.take() {
            connection.environment = environment;
        }
        if let Some(directory) = fds.directory.take() {
            connection.directory = Some(Rc::new(directory));
            order.has_directory = false; // Ours now; a child inherits it.
        }
        let report = match &self.exits {
            Some(_) => Some(fds.report.try_clone().map_err(failed)?),
            None => None,
        };
        let (pid, pidfd) = match (order.start_method, self.single) {
            (StartMethod::ForkServer, Some(single)) => {
                self.become_like(at, single).map_err(failed)?;
                if let Some(spare) = self.use_spare(&order, &arguments, &fds) {
                    return Ok(self.born(spare.0, spare.1, report));
                }
                match spawn::fork(single).map_err(failed)? {
                    // It is our child and not reaped yet, so the pid is its own.
                    Fork::Parent(pid) => (pid, pidfd::open(pid).map_err(failed)?),
                    Fork::Child => {
                        let private = self.private(report);
                        child::after_fork(order, arguments, fds, private, single)
                    }
                }
            }
            _ => {
                let pid = self.exec(at, order, &arguments, fds).map_err(failed)?;
                (pid, pidfd::open(pid).map_err(failed)?)
            }
        };
        if self.single.is_none() {
            self.orphans.push((pid, pidfd.try_clone().map_err(failed)?));
        }
        Ok(self.born(pid, pidfd, report))
    }

    fn born(&mut self, pid: u32, pidfd: OwnedFd, report: Option<OwnedFd>) -> (Born, OwnedFd) {
        if let (Some(exits), Some(report)) = (&mut self.exits, report) {
            exits.insert(pid, report);
        }
        (Born { pid, tells_exit: self.exits.is_some() }, pidfd)
    }

    /// Takes on the environment and directory of a starter, for its children to inherit.
    fn become_like(&mut self, at: usize, single: SingleThreaded) -> io::Result<()> {
        let connection = &self.connections[at];
        if self.environment.as_ref() != Some(&connection.environment) {
            self.spares.clear(); // They were like someone else; without their socket they end.
            let wanted = &connection.environment;
            for (key, _) in std::env::vars_os() {
                if !wanted.iter().any(|(other, _)| other == key) {
                    spawn::remove_variable(single, &key);
                }
            }
            wanted.iter().for_each(|(key, value)| spawn::set_variable(single, key, value));
            self.environment = Some(wanted.clone());
        }
        match (&connection.directory, &self.directory) {
            (Some(wanted), Some(now)) if Rc::ptr_eq(wanted, now) => Ok(()),
            (Some(wanted), _) => {
                self.spares.clear();
                rustix::process::fchdir(wanted)?;
                self.directory = Some(wanted.clone());
                Ok(())
            }
            (None, _) => Ok(()),
        }
    }

    /// Everything of the server that a forked child must not keep.
    fn private(&mut self, report: Option<OwnedFd>) -> Vec<OwnedFd> {
        let mut all: Vec<OwnedFd> = report.into_iter().collect();
        self.directory = None;
        all.extend(std::mem::take(&mut self.spares).into_iter().flat_map(|spare| [spare.pidfd, spare.socket]));
        for connection in std::mem::take(&mut self.connections) {
            all.push(connection.socket);
            all.extend(connection.directory.and_then(Rc::into_inner));
        }
        all.extend(std::mem::take(&mut self.orphans).into_iter().map(|(_, pidfd)| pidfd));
        all.extend(self.exits.take().into_iter().flat_map(BTreeMap::into_values));
        all.append(&mut self.own);
        all
    }

    /// Starts the program afresh and tells it the order.
    fn exec(&self, at: usize, mut order: Order, arguments: &[u8], mut fds: Descriptors) -> io::Result<u32> {
        let connection = &self.connections[at];
        let origin = boot::origin().map_err(io::Error::other)?;
        let (ours, theirs) = socket::packet_pair()?;
        order.has_directory = connection.directory.is_some();
        fds.directory = connection.directory.as_ref().map(|directory| directory.try_clone()).transpose()?;
        let hello = Hello { image: image::fingerprint(), role: Role::Child };
        child::tell_exec(&ours, &hello, &order, arguments, &fds)?;
        let variables = connection.environment.iter().chain(order.variables.iter());
        let mut command = program_again(&origin.program)?;
        command.env_clear().envs(variables).env(boot::BOOT, "0").stdin(theirs);
        // Reaped with all others.
        Ok(command.spawn()?.id())
    }

    fn reap(&mut self) {
        while let Some((pid, status)) = spawn::reap() {
            bury(pid);
            self.spares.retain(|spare| spare.pid != pid);
            if let Some(report) = self.exits.as_mut().and_then(|exits| exits.remove(&pid)) {
                // If the starter has let go, nobody wants to know.
                let _ = Report::send_exited(report.as_fd(), status);
            }
        }
    }
}

fn bury(pid: u32) {
    if let Ok(family) = Family::get() {
        family.bury(pid);
    }
}

/// The program with the arguments that this process was started with.
pub(super) fn program_again(program: &OwnedFd) -> io::Result<Command> {
    use std::os::fd::AsRawFd;
    use std::os::unix::ffi::OsStrExt;
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    let line = std::fs::read("/proc/self/cmdline")?;
    let mut arguments =
        line.strip_suffix(&[0]).unwrap_or(&line).split(|byte| *byte == 0).map(std::ffi::OsStr::from_bytes);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    command.args(arguments);
    Ok(command)
}

fn run_preloads(preload: &[Call]) -> Result<()> {
    for call in preload {
        let mut executor = Executor::default();
        let nothing = wire::encode(&())?.payload(&()).to_vec();
        let outcome = call.run(Parcel { bytes: nothing, fds: Vec::new() }, &mut executor);
        Outcome::read::<()>(Parcel { bytes: outcome.parts().concat(), fds: Vec::new() }).map_err(|error| {
            Error::new(ErrorKind::Spawn, format!("a preload function failed: {error}")).with_source(error)
        })?;
    }
    Ok(())
}

/// Whether the exit status of a reaped process can be had through its pidfd: tried once, with a child that ends.
fn kernel_tells_exits(single: Option<SingleThreaded>) -> bool {
    if std::env::var_os("MULTIPROCESS_OLD_KERNEL").is_some() {
        return false; // Tests of the other way.
    }
    let Some(Ok(fork)) = single.map(spawn::fork) else { return false };
    let Fork::Parent(pid) = fork else { spawn::exit_now(0) };
    let Ok(pidfd) = pidfd::open(pid) else { return false };
    pidfd::wait(pidfd.as_fd(), false, None);
    while spawn::reap().is_some() {}
    matches!(pidfd::exit(pidfd.as_fd()), pidfd::Exit::Known(_))
}
