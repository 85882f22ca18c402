//! One connection to a fork server: sends orders to the server and to its spare children.
#![forbid(unsafe_code)]

use super::children::Child;
use super::entry::Call;
use super::info::{self, ProcessInfo, StartMethod};
use super::lifeline;
use super::order::Order;
use super::protocol::{self, Answer, Base, Born, Reply, Report, Request};
use super::role::is_gone;
use super::spares::Spares;
use super::variables::Variables;
use crate::error::{Explained, Result, Topic};
use crate::os::{
    attributes::{Attributes, Kept},
    credentials::{self, Credentials},
    directory, exec, fork, pidfd,
    proc::Activity,
    rights, socket,
    socket::Wait,
};
use crate::wire::{self, frame};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(super) struct Connection {
    /// Each holder of the socket keeps the server running, so a process forked from this one must not hold it.
    _private: fork::Private,
    pub(super) socket: Arc<OwnedFd>,
    /// The server, if this process started it.
    pub(super) server: Option<exec::Process>,
    /// The pid of the server.
    pub(super) pid: Option<u32>,
    /// The same, if the thread that made this connection could inspect the server: a thread that cannot is confined more.
    pub(super) seen: Option<u32>,
    /// The rights of the server, and the attributes that its children have by themselves.
    pub(super) base: Base,
    pub(super) kept: (credentials::Kept, Kept),
    pub(super) environment: Option<Variables>,
    /// Device and inode of the working directory as last sent.
    pub(super) directory: Option<directory::Identity>,
    /// The number of the last order: a late answer to an earlier one is not taken for the next one's.
    pub(super) number: u64,
    pub(super) spares: Spares,
}

/// The options of a new child.
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
    /// The level of the spans and events that are wanted, and where they go.
    pub(super) traces: Option<(u8, Arc<OwnedFd>)>,
    pub(super) arguments: &'a [u8],
    pub(super) attachments: Vec<BorrowedFd<'a>>,
}

/// The child, and the socket over which it reports.
pub(super) type Started = (Arc<Child>, OwnedFd);

/// A message from the server.
enum Received {
    Answer(Answer<Born>, Option<OwnedFd>),
    /// The server takes no order from this user, or none over this connection.
    Refused,
    Spare {
        pid: u32,
        pidfd: OwnedFd,
        socket: OwnedFd,
    },
    /// A message that is out of date.
    Nothing,
}

/// The working directory, compared with the one last sent.
enum Directory {
    AsBefore,
    /// With its device and inode.
    New(OwnedFd, directory::Identity),
    /// It cannot be entered again.
    Closed,
}

/// The result of an order.
pub(super) enum Ordered {
    Started(Started),
    /// No child was born, because the server is gone.
    ServerGone(io::Error),
    /// No function has begun: this server's children would be wrong, for this reason. Those of a server that is
    /// started now are right.
    Elsewhere(String),
}

/// A server that has not answered for so long is inspected.
const LOOK_AFTER: Duration = Duration::from_secs(3);

/// A server that cannot be inspected, or that runs, is given up after so long.
const SILENCE: Duration = Duration::from_secs(60);

fn is_silent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::TimedOut
}

/// Arguments of this size and above travel as a memfd, which the server passes on unread.
const INLINE: usize = 8 << 10;

impl Connection {
    pub(super) fn new(socket: OwnedFd, server: Option<exec::Process>, pid: Option<u32>, base: Base) -> Self {
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

    pub(super) fn order(&mut self, start: &Start<'_>) -> Result<Ordered> {
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
            goes_by_server: false,
            starter_environment: is_new.then(|| environment.clone()),
            has_directory: directory.is_some(),
            has_own_directory: start.directory.is_some(),
            attributes: start.attributes.clone().any(),
            own_variables: start.variables.clone(),
            is_shielded: start.is_shielded,
            leads_group: start.leads_group,
            backtraces: start.backtraces,
            streams: start.streams.map(|stream| stream.is_some()),
            arguments_in_memfd: memory.as_ref().map(|_| start.arguments.len() as u64),
            trace_level: start.traces.as_ref().map_or(0, |(level, _)| *level),
        };
        let inline = if memory.is_some() { &[][..] } else { start.arguments };
        let mut fds: Vec<_> = start.streams.into_iter().flatten().collect();
        fds.extend(directory.iter().map(|(fd, _)| fd.as_fd()));
        fds.extend(start.directory.iter().map(AsFd::as_fd));
        fds.extend(memory.iter().map(AsFd::as_fd));
        fds.extend(start.traces.iter().filter(|(level, _)| *level > 0).map(|(_, socket)| socket.as_fd()));
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
                // A spare that was killed, or had waited too long when the order came, has not begun.
                if let_begin(&report, &attributes).map_err(failed)? {
                    self.ask_for_spares();
                    let born = Born { pid, reports_exit: false };
                    return Ok(Ordered::Started(self.started(start, born, pidfd, report, true)));
                }
            }
        }
        let (report, theirs) = socket_pair()?;
        // Opened here, where /proc is warm, rather than in the child.
        let tie = lifeline::reopened().map_err(failed)?;
        fds.splice(..0, [theirs.as_fd(), tie.as_fd()]);
        // The server stores these before it forks, which may fail: until it has answered, it is unknown which it has.
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
        drop(theirs); // From here on `report` hangs up if no child has the other end.
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
                Ok(Received::Refused) => return Ok(Ordered::Elsewhere("the fork server refuses its orders".into())),
                Err(error) => break Err(error),
            }
        };
        let (born, pidfd, is_born) = match answer {
            Ok((born, Some(pidfd))) => (born, pidfd, false),
            Ok((_, None)) => return Err(failed(io::Error::other("it came without a pidfd"))),
            // A stopped server holds the other end of the report socket: nothing need ever come.
            Err(error) => {
                let patience = if is_silent(&error) { Duration::ZERO } else { SILENCE };
                socket::is_readable_within(report.as_fd(), patience);
                match Report::recv(report.as_fd(), &mut None) {
                    // The child lives, though the server has not answered.
                    Ok(Some(Report::Born(pid))) => {
                        (Born { pid, reports_exit: false }, pidfd::open(pid).map_err(failed)?, true)
                    }
                    _ if is_gone(&error) => return Ok(Ordered::ServerGone(error)),
                    _ => return Err(failed(error)),
                }
            }
        };
        // If it has ended, its handle learns that.
        let_begin(&report, &attributes).map_err(failed)?;
        if is_new {
            self.environment = Some(environment);
        }
        if let Some((_, identity)) = directory {
            self.directory = Some(identity);
        }
        self.ask_for_spares();
        Ok(Ordered::Started(self.started(start, born, pidfd, report, is_born)))
    }

    fn started(&self, start: &Start<'_>, born: Born, pidfd: OwnedFd, report: OwnedFd, is_born: bool) -> Started {
        let (name, daemon, start_method) = (start.name.to_string(), start.daemon, Some(start.start_method));
        let info = ProcessInfo { name, pid: born.pid, daemon, start_method };
        (Arc::new(Child::new(info, pidfd, born.reports_exit, self.socket.clone(), is_born)), report)
    }

    /// Sends an order to the spare child that has waited longest, and returns the socket over which it reports; `None` if
    /// there is none.
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
                // The server is gone, or this process has no descriptor left for a spare.
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

    /// The attributes of this process that its children would not have by themselves; or, as an error, in which way the rights
    /// of this thread differ from the server's.
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

    /// Ends the spares that have arrived. Later ones end by themselves after some seconds.
    pub(super) fn discard_spares(&mut self) {
        self.spares.renew();
        while socket::is_readable_within(self.socket.as_fd(), Duration::ZERO) && self.receive().is_ok() {}
    }

    /// Asks for spares, so that the next spawn finds one. If that fails, it finds none.
    fn ask_for_spares(&mut self) {
        let Spares { coming, generation, wanted, are_refused, .. } = &mut self.spares;
        // Several at a time: each request wakes the server, which then competes with the child that has just got its order.
        let count = if *coming * 2 <= *wanted { wanted.saturating_sub(*coming) } else { 0 };
        if count > 0 && !*are_refused {
            let request = Request::Spares { count, generation: *generation };
            if protocol::send(self.socket.as_fd(), &request, &[], &[]).is_ok() {
                *coming += count;
            }
        }
    }

    /// [`receive`](Self::receive), unless the server is stopped, frozen, or silent for too long. It handles the order when it
    /// goes on; a child that is born then finds its report socket closed, and does nothing.
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
            return Err(Explained::error(io::ErrorKind::TimedOut, Topic::Stopped, why));
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
            Reply::Refused { number } if number == self.number => Ok(Received::Refused),
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

    /// Compares the working directory with the one last sent. A removed directory counts as one.
    fn directory_now(&self) -> io::Result<Directory> {
        let identity = directory::identity()?;
        if self.directory == Some(identity) {
            return Ok(Directory::AsBefore);
        }
        Ok(directory::open_current()?.map_or(Directory::Closed, |directory| Directory::New(directory, identity)))
    }
}

/// Permits a child that has its order to begin; false if it has ended already. A child without the permission, because this
/// process has closed `report`, ends without having begun.
fn let_begin(report: &OwnedFd, attributes: &Option<Attributes>) -> io::Result<bool> {
    let word = attributes.as_ref().map(wire::to_bytes).transpose()?;
    match frame::send(report.as_fd(), &[&word.unwrap_or_default()], &[], Wait::Yes) {
        Err(error) if is_gone(&error) => Ok(false),
        sent => sent.map(|()| true),
    }
}

fn socket_pair() -> Result<(OwnedFd, OwnedFd)> {
    socket::packet_pair().map_err(|error| protocol::spawn_error("cannot make a socket for a new process", error))
}

/// This process's end and the server's. The server's end reports the sender of each packet, from the first one on.
pub(super) fn connection_pair() -> Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socket_pair()?;
    socket::learn_senders(theirs.as_fd())
        .and_then(|()| socket::limit_sends(ours.as_fd(), SEND_LIMIT))
        .map_err(|error| protocol::spawn_error("cannot make a socket to the fork server", error))?;
    Ok((ours, theirs))
}

/// How long a send waits for room. A stopped server makes none.
const SEND_LIMIT: Duration = Duration::from_secs(10);
