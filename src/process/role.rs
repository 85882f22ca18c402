//! Hands a role to a process of the same program that was started for it.
//!
//! # State
//! The start tag (`os::exec`): a process that was started to take a role has it for the whole of its life. It names the
//! descriptor over which the role comes: one end of a socket pair. The first two messages there are [`Hello`], which is sent
//! before the process starts, and [`Addressed`], which names the process and follows at once.
//!
//! The starter variable (`os::exec`): the image, the pid and the start time of the starter. Every program that the process
//! executes before it has taken its role has it in its environment; programs that it executes later do not.
//!
//! The death signal (`os::exec`) is a setting of the process itself, which every program that it executes keeps. It is removed when
//! the role is taken.
//!
//! # Moves
//! | move | by | then |
//! |---|---|---|
//! | [`start`], then the messages of the role | the starter | the messages wait in the socket |
//! | [`inherited_socket`], then [`receive`], in `init` | the started process, after the part of `main` before `init` | it has its role, or ends |
//! | [`wait_until_ready`], or the report of a child | the starter | it knows whether the role was taken |
//!
//! # Invariants
//! 1. A process with a start tag takes its role, or ends with a line on stderr and an exit code that give the reason: it never goes
//!    on in `main`. Before it has its role, it may start the same program again. That process ends, too: it recognises the
//!    inherited socket, or the starter variable while the starter runs, or has the death signal. Otherwise each such process would start another.
//! 2. A role is taken by the very process that was started, from its living parent, which made the socket with the same
//!    effective user and group. Its other ids are those of the thread that started it, as no exec gave it any: a program that
//!    got rights from its exec takes none.
//!
//! # Death
//! The started process ends: its starter learns that from the pidfd, whatever else holds the socket, and reads the cause
//! from the exit code. The starter ends: the socket hangs up or belongs to a stranger, and the started process ends.
//!
//! # Cancel
//! No await point.
#![forbid(unsafe_code)]

use super::origin;
use super::protocol::{self, Addressed, Answer, Hello, Ready, Role};
use super::variables::Variables;
use crate::error::{Error, ErrorKind, Explained, Result, Topic};
use crate::os::{exec, exec::Watch, image, pidfd, poll, proc, rights, signal, socket, spawn};
use crate::wire::Parcel;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::OnceLock;
use std::time::Duration;

/// Why a process that was started to take a role takes none. The number is its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Closed = 86,
    Replaced = 87,
    Forked = 88,
    Stranger = 89,
    GivenRights = 90,
    StartedAgain = 91,
}

const FORKS: &str = "it is a fork of the process that was started: `main` forks or daemonizes before it calls \
                     `multiprocess::run` or `init`; call `init` first, and daemonize after it, before the first process is \
                     started";

impl Refusal {
    const ALL: [Self; 6] =
        [Self::Closed, Self::Replaced, Self::Forked, Self::Stranger, Self::GivenRights, Self::StartedAgain];

    fn why(self) -> &'static str {
        match self {
            Self::Closed => {
                "the socket that its role comes over is closed: `main` closes descriptors that it has not opened before it \
                 calls `multiprocess::run` or `init`; call that first"
            }
            Self::Replaced => {
                "the descriptor that its role comes over is something else by now: `main` closes or replaces descriptors \
                 that it has not opened before it calls `multiprocess::run` or `init`; call that first"
            }
            Self::Forked => FORKS,
            Self::Stranger => "its role does not come from its parent, or comes from another user",
            Self::GivenRights => {
                "its program's file gave it rights (set-user-ID, set-group-ID or file capabilities), and whoever started \
                 it may not have them"
            }
            Self::StartedAgain => {
                "it is this program started or executed once more, and its role was for the process that did so: `main` starts \
                 its own program, or closes descriptors and executes it, before it calls `multiprocess::run` or `init`; call that \
                 first"
            }
        }
    }

    fn topic(self) -> Topic {
        match self {
            Self::Closed | Self::Replaced => Topic::MainClosesDescriptors,
            Self::Forked => Topic::MainForks,
            Self::Stranger | Self::GivenRights => Topic::GivenRights,
            Self::StartedAgain => Topic::MainStartsItself,
        }
    }

    /// Reports the refusal to the starter, if it still waits for an answer.
    pub(super) fn report(self, starter: BorrowedFd<'_>) -> Self {
        let error =
            Error::new(ErrorKind::Spawn, format!("a process that was started cannot take its role: {}", self.why()));
        let answer = Answer::<Ready>::Err(error.explained_by(self.topic()));
        let _ = protocol::send(starter, &answer, &[], &[]);
        self
    }

    /// Ends this process, saying why.
    pub(super) fn end(self) -> ! {
        let (pid, why, topic) = (std::process::id(), self.why(), self.topic());
        spawn::print_line(&format!("process {pid} was started to work for another one, but {why} {topic}"));
        spawn::exit_now(self as i32)
    }
}

/// Returns how a process ended; if its exit code says why it took no role, with the reason and its topic.
pub(super) fn how_it_ended(status: ExitStatus) -> (String, Option<Topic>) {
    let refusal = Refusal::ALL.into_iter().find(|refusal| status.code() == Some(*refusal as i32));
    let how = refusal.map_or_else(|| status.to_string(), |refusal| format!("{status}; {}", refusal.why()));
    (how, refusal.map(Refusal::topic))
}

/// The socket over which this process receives its role, if it was started to take one.
pub(super) fn inherited_socket() -> Result<Option<OwnedFd>, Refusal> {
    match exec::start_tag() {
        Some(_) if rights::came_by_exec() => Err(Refusal::GivenRights),
        Some(number) => match spawn::look_at(number, |fd| socket::maker_of_pair(fd).is_some()) {
            None => Err(Refusal::Closed),
            Some(false) => Err(Refusal::Replaced),
            Some(true) => spawn::take_inherited(number).map(Some).map_err(|_| Refusal::Closed),
        },
        None if rights::came_by_exec() => Ok(None),
        None => find_without_tag(),
    }
}

/// Finds the socket of a process without a start tag: it has executed itself again, or a tool executed it by another path.
fn find_without_tag() -> Result<Option<OwnedFd>, Refusal> {
    let found = spawn::inherited().into_iter().find_map(|fd| Some((fd, spawn::look_at(fd, look_for_role)??)));
    match found {
        Some((fd, RoleSocket::FromParent)) => Ok(spawn::take_inherited(fd).ok()),
        Some((_, RoleSocket::FromStranger)) => Err(Refusal::StartedAgain),
        None if exec::starter_variable().is_some_and(|value| is_of_running_starter(&value)) => {
            Err(Refusal::StartedAgain)
        }
        None if exec::has_death_signal() => Err(Refusal::StartedAgain),
        None => Ok(None),
    }
}

/// An inherited socket over which a role of this program comes, by the process that made it.
enum RoleSocket {
    FromParent,
    FromStranger,
}

/// Returns how a role comes over this socket; `None` if it is another socket.
fn look_for_role(socket: BorrowedFd<'_>) -> Option<RoleSocket> {
    let maker = socket::maker_of_pair(socket)?;
    let mut buffer = [0; 96];
    let len = socket::peek(socket, &mut buffer).ok()?;
    let image = Hello::image_in(&buffer[..len.min(buffer.len())])?;
    // A role of another build is accepted here if the parent made the socket; `receive` refuses it and names the build.
    if maker.pid == spawn::parent() {
        Some(RoleSocket::FromParent)
    } else {
        (image == image::fingerprint()).then_some(RoleSocket::FromStranger)
    }
}

/// Returns the value of the starter variable that names this process, for [`is_of_running_starter`].
fn starter_variable() -> String {
    let pid = std::process::id();
    format!("{:016x}:{pid}:{}", image::fingerprint(), proc::start_time(pid).unwrap_or(0))
}

/// Returns `true` if the starter variable is of this program, and the process that it names still runs.
fn is_of_running_starter(value: &str) -> bool {
    let mut parts = value.split(':');
    let image = parts.next().and_then(|part| u64::from_str_radix(part, 16).ok());
    let (pid, began) = (
        parts.next().and_then(|part| part.parse::<u32>().ok()),
        parts.next().and_then(|part| part.parse::<u64>().ok()),
    );
    let (Some(pid), Some(began)) = (pid, began) else { return false };
    // If /proc does not show when it began, it counts as that process.
    image == Some(image::fingerprint())
        && proc::start_time(pid).map_or_else(|| pidfd::open(pid).is_ok(), |time| time == began || began == 0)
}

/// Receives the role, if it is for this process and from a process that may give it one. `None`: the starter is gone.
pub(super) fn receive(socket: &OwnedFd) -> Result<Option<(Role, Parcel, u64)>, Refusal> {
    let Ok(Some((hello, parcel))) = protocol::recv::<Hello>(socket.as_fd()) else { return Ok(None) };
    let Ok(Some((Addressed { pid }, _))) = protocol::recv::<Addressed>(socket.as_fd()) else { return Ok(None) };
    let Some(maker) = socket::maker_of_pair(socket.as_fd()) else { return Err(Refusal::Replaced) };
    // A starter in another pid namespace knows this process by another number.
    if maker.pid != 0 && pid != std::process::id() {
        return Err(Refusal::Forked);
    }
    if maker.pid != spawn::parent() {
        return if socket::is_hung_up(socket.as_fd()) { Ok(None) } else { Err(Refusal::Stranger) };
    }
    if !rights::are_final() && (maker.uid, maker.gid) != rights::effective_user() {
        return Err(Refusal::Stranger);
    }
    signal::ignore_only(hello.ignored);
    Ok(Some((hello.role, parcel, hello.image)))
}

/// Starts this program again for `role`, to which `fds` belong. The second end of the pair is the new process's.
pub(super) fn start(
    program: BorrowedFd<'_>,
    variables: &Variables,
    role: Role,
    fds: &[BorrowedFd<'_>],
    (ours, theirs): (&OwnedFd, OwnedFd),
) -> io::Result<exec::Process> {
    let is_silent = matches!(role, Role::NameCleaner);
    // A child's pidfd is its starter's, and the fork server, which gets it, has one thread only.
    let watch = if matches!(role, Role::Child { .. }) { Watch::ByPidfd } else { Watch::Anyhow };
    protocol::send(ours.as_fd(), &Hello::new(image::fingerprint(), role), &[], fds)?;
    let variables = (variables.for_exec(), &*starter_variable());
    let process = exec::start(program, arguments(), variables, theirs.as_fd(), is_silent, watch)?;
    drop(theirs);
    match protocol::send(ours.as_fd(), &Addressed { pid: process.pid() }, &[], &[]) {
        Err(error) if !is_gone(&error) => {
            process.end();
            Err(error)
        }
        // A process that has closed its end has ended, or will, and its exit code has the reason.
        _ => Ok(process),
    }
}

/// The arguments that this process was started with, as the kernel had them: a loader that was executed by name
/// (`ld.so ./program`) is the first of them.
fn arguments() -> &'static [CString] {
    static ARGUMENTS: OnceLock<Vec<CString>> = OnceLock::new();
    ARGUMENTS.get_or_init(|| {
        use std::os::unix::ffi::OsStringExt;
        let split = |line: Vec<u8>| {
            let line = line.strip_suffix(&[0]).unwrap_or(&line);
            line.split(|byte| *byte == 0).map(|argument| argument.to_vec()).collect::<Vec<_>>()
        };
        let line = std::fs::read("/proc/self/cmdline").ok().filter(|line| !line.is_empty()).map(split);
        let line = line.unwrap_or_else(|| std::env::args_os().map(OsStringExt::into_vec).collect());
        line.into_iter().filter_map(|argument| CString::new(argument).ok()).collect()
    })
}

/// Notes the arguments before the program changes what `ps` shows.
pub(super) fn note_arguments() {
    arguments();
}

/// A process that has let go of its socket has this long to end.
const END_LIMIT: Duration = Duration::from_secs(1);

/// After this long a warning reports that a process has not reached `init`. It may still do so.
const SLOW_START: Duration = Duration::from_secs(10);

/// Waits, however long `main` takes, until the process has taken its role. A process that fails to is
/// ended, and the error says how it ended. `what` names the role in errors.
pub(super) fn wait_until_ready(socket: &OwnedFd, process: &exec::Process, what: &str) -> Result<Ready> {
    let ready = wait_for_answer(socket, process, what);
    if ready.is_err() {
        process.end();
    }
    ready
}

fn wait_for_answer(socket: &OwnedFd, process: &exec::Process, what: &str) -> Result<Ready> {
    let failed = |error| protocol::spawn_error(format!("{what} does not answer"), error);
    loop {
        wait_for_either(socket, process, what).map_err(failed)?;
        if !socket::is_readable_within(socket.as_fd(), Duration::ZERO) {
            if !pidfd::has_exited(process.pidfd()) {
                continue;
            }
            // It may have answered last.
            if !socket::is_readable_within(socket.as_fd(), Duration::ZERO) {
                let why = format!("{what} ended before it was ready, and its role went to another process: {FORKS}");
                let error = Error::new(ErrorKind::Spawn, why).explained_by(Topic::MainForks);
                return Err(error.with_exit_status(process.wait(None)));
            }
        }
        let answer = match protocol::recv::<Answer<Ready>>(socket.as_fd()) {
            // It has ended with something of ours unread. Its own earlier messages are still there.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                protocol::recv::<Answer<Ready>>(socket.as_fd())
            }
            answer => answer,
        };
        return match answer {
            Ok(Some((answer, _))) => answer,
            Ok(None) => Err(ended(process, what)),
            Err(error) if is_gone(&error) => Err(ended(process, what)),
            Err(error) => Err(failed(error)),
        };
    }
}

/// Waits until the process has answered or ended. A stopped process would keep its starter waiting for ever, so it is an error.
fn wait_for_either(socket: &OwnedFd, process: &exec::Process, what: &str) -> io::Result<()> {
    let mut has_warned = false;
    while !poll::readable(&[socket.as_fd(), process.pidfd()], Some(SLOW_START))?.contains(&true) {
        if process.is_stopped() {
            let why = "it is stopped (SIGSTOP, or a debugger)";
            return Err(Explained::error(io::ErrorKind::TimedOut, Topic::Stopped, why));
        }
        if !std::mem::replace(&mut has_warned, true) {
            warn_of_slow_start(process.pid(), what);
        }
    }
    Ok(())
}

fn warn_of_slow_start(pid: u32, what: &str) {
    let seconds = SLOW_START.as_secs();
    let cause = if origin::preloads().is_empty() { "" } else { ", and has not run what is preloaded" };
    let why = format!(
        "{what} (pid {pid}) has not reached `multiprocess::run` or `init`{cause} after {seconds} s: whatever `main` does before \
         is done in each process that the program starts; still waiting"
    );
    let topic = Topic::SlowMain;
    tracing::warn!(help = topic.name(), "{why}");
    spawn::print_line(&format!("{why} {topic}"));
}

/// Why it will not answer.
fn ended(process: &exec::Process, what: &str) -> Error {
    let has_ended = pidfd::wait(process.pidfd(), false, Some(END_LIMIT));
    let status = if has_ended { process.wait(None) } else { None };
    let (how, topic) = match status {
        Some(status) => how_it_ended(status),
        None if has_ended => ("nobody knows how".into(), None),
        None => ("it closed the socket that its role comes over and went on".into(), None),
    };
    let cause = origin::loader_as_cause();
    let why = format!("{what} ended before it was ready ({how}): does the program reach `run` or `init`?{cause}");
    Error::new(ErrorKind::Spawn, why).explained_by(topic.unwrap_or(Topic::MainForks)).with_exit_status(status)
}

/// Returns `true` if a process was killed before it could take its role: by SIGKILL, or by a signal that a terminal sends to its whole
/// group, before it could block that. This process survived, so it starts another one.
pub(super) fn was_killed_early(error: &Error) -> bool {
    error
        .exit_status()
        .and_then(|status| status.signal())
        .is_some_and(|by| by == libc::SIGKILL || signal::STOPS.contains(&by))
}

/// Returns `true` if `error` means that the other end is closed.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::NotConnected
            | io::ErrorKind::ConnectionRefused
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starter_variable_counts_for_this_image_while_its_starter_runs() {
        let value = starter_variable();
        assert!(is_of_running_starter(&value));
        let pid = std::process::id().to_string();
        assert!(!is_of_running_starter(&value.replacen(&format!(":{pid}:"), ":1073741824:", 1)));
        assert!(!is_of_running_starter(&format!("{value}1")), "a later process with this pid");
        assert!(!is_of_running_starter(&format!("0000{}", &value[4..])) || value.starts_with("0000"));
        assert!(!is_of_running_starter("") && !is_of_running_starter("1:2"));
    }
}
