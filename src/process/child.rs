//! A child from its fork (or exec) to its exit.
#![forbid(unsafe_code)]

use super::children;
use super::entry::Call;
use super::executor::{self, Executor};
use super::info::{self, ProcessInfo, StartMethod};
use super::order::{Descriptors, Order};
use super::outcome::Outcome;
use super::panics;
use super::protocol::{self, Report};
use super::variables::Variables;
use crate::error::{Error, ErrorKind, PanicInfo, Result};
use crate::os::attributes::Attributes;
use crate::os::socket::{self, Sender, Wait};
use crate::os::spawn::{self, SingleThreaded};
use crate::os::sync::lock;
use crate::os::{directory, fork, memory, profile, self_pipe, signal};
use crate::shm::family::Family;
use crate::wire::{self, Parcel, frame};
use rustix::process::Pid;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

/// How a child leaves.
#[derive(Clone, Copy)]
enum Exit {
    /// Nothing that belongs to the fork server is run.
    Forked,
    Regular,
}

/// The life of a forked child. `private` is what it inherited and must not keep. If its order is not on its way yet, it
/// gets everything ready meanwhile, down to the pages that it will touch. Without one it ends with who would send it,
/// or when it has not come for so long that none may come. `moved` is whether it is in the directory of its starter. `group` is the server's, if a process that left it could
/// come back, and `lifeline` ties a child to its starter before it has an order.
pub(super) fn after_fork(
    socket: OwnedFd,
    private: Vec<OwnedFd>,
    is_ordered: bool,
    moved: io::Result<()>,
    group: Option<Pid>,
    lifeline: Option<OwnedFd>,
    single: SingleThreaded,
) -> ! {
    Family::forget_me();
    // Out of descriptors it goes on with the shared one.
    let _ = self_pipe::renew();
    spawn::close_all(private);
    let tie = lifeline.map(|lifeline| match signal::die_with(lifeline) {
        Ok(Some(tie)) => tie,
        Ok(None) => spawn::exit_now(0), // Whoever wanted it is gone.
        Err(error) => give_up(socket.as_fd(), error),
    });
    let moved = moved.map_err(|error| io::Error::new(error.kind(), format!("its working directory: {error}")));
    let moved = if is_ordered { moved } else { moved.map_err(|error| give_up(socket.as_fd(), error)) };
    if !is_ordered && !socket::is_readable_within(socket.as_fd(), Duration::ZERO) {
        spawn::set_name(c"mp-spare");
        // What is sent to the group of the server is not for a process that nobody has started yet.
        let left = group.filter(|_| spawn::leave_group());
        // Only time is lost if this fails.
        let _ = rehearse(None);
        // Out of descriptors it can only let itself be killed by what may be for the function that it was just told of.
        let stops = signal::watch_stops().ok();
        let watch = stops.as_ref().map(|(watch, stops)| (watch.as_fd(), *stops));
        let mut has_come = socket::is_readable_within_open_to_signals(socket.as_fd(), SPARE_TIME, watch);
        drop(stops);
        if !has_come {
            // It is too late, or a signal has come that would have ended it. From here on neither an order can come nor the
            // word to begin. If both came just before, the order is done, and the signal is for what it orders.
            socket::refuse_more(socket.as_fd());
            has_come = socket::is_readable_within(socket.as_fd(), Duration::ZERO);
        }
        if let Some(left) = left.filter(|_| has_come) {
            // The group exists as long as the server does; after that there is nothing to rejoin.
            spawn::join_group(left);
        }
    }
    if !is_ordered && socket::sender(socket.as_fd()) != Sender::SameUser {
        refuse(socket.as_fd(), io::Error::other("who orders it has another user or group than it has"));
    }
    let (order, Parcel { bytes, fds }) = match Order::recv(socket.as_fd()) {
        Ok(Some(ordered)) => ordered,
        Ok(None) => spawn::exit_now(0),
        Err(error) => refuse(socket.as_fd(), error),
    };
    let report = Some(socket).filter(|_| !order.is_passed_on);
    let Ok(fds) = order.split(report, fds) else { spawn::exit_now(1) };
    let told = if order.is_passed_on { report_birth(&fds.report) } else { Ok(()) };
    set_name(&order.name);
    signal::restore_child_action();
    apply_variables(&order.variables, single);
    live(order, bytes, fds, tie, told.and(moved).map_err(Error::from), Exit::Forked)
}

/// Ends a spare child that could not get ready. From here on its starter finds it gone, and has the order done in another way,
/// also if it has sent the order already but not the word to begin.
fn give_up(socket: BorrowedFd<'_>, error: io::Error) -> ! {
    socket::refuse_more(socket);
    refuse(socket, error)
}

/// Ends a child that cannot take its order. Who told it so itself hears why; the server has let go of the socket.
fn refuse(socket: BorrowedFd<'_>, error: io::Error) -> ! {
    let outcome = Outcome::error(protocol::spawn_error("a process cannot take its order", error));
    let _ = Report::send_outcome(socket, &outcome);
    spawn::exit_now(1)
}

/// A spare child that is not asked for this long is not kept.
const SPARE_TIME: Duration = Duration::from_secs(5);

/// Goes once through what an order will make it do, so that memory shared with the server is copied before it
/// counts. In the server, with a pair of sockets: so that what is made at the first use, such as the linker's lazy
/// bindings, is made once.
pub(super) fn rehearse(sockets: Option<(OwnedFd, OwnedFd)>) -> Result<()> {
    let nobody = ProcessInfo { name: String::new(), pid: 0, daemon: false, start_method: None };
    let order = Order {
        call: Call::of(|| ()),
        name: String::new(),
        daemon: false,
        start_method: StartMethod::ForkServer,
        parent: nobody,
        is_passed_on: false,
        environment: None,
        has_directory: false,
        has_own_directory: false,
        attributes: None,
        variables: Variables::default(),
        is_shielded: false,
        leads_group: false,
        backtraces: None,
        streams: [false; 3],
        arguments_in_memfd: None,
    };
    let nothing = wire::encode(&())?;
    match sockets {
        Some((ours, theirs)) => {
            order.send(ours.as_fd(), nothing.payload(&()), &[theirs.as_fd()])?;
            if let Some((order, arguments)) = Order::recv(theirs.as_fd())? {
                let outcome = order.call.run(arguments, &mut Executor::default());
                Report::send_outcome(ours.as_fd(), &outcome)?;
            }
        }
        None => {
            let Some((order, _)) = Order::from_bytes(&order.to_bytes()?) else { return Ok(()) };
            let arguments = Parcel { bytes: nothing.payload(&()).to_vec(), fds: Vec::new() };
            drop(order.call.run(arguments, &mut Executor::default()));
        }
    }
    io::stdout().flush()?;
    spawn::flush_c_stdio();
    Ok(())
}

/// For `ps`, and for listings of who holds a lock.
fn set_name(name: &str) {
    match std::ffi::CString::new(name) {
        Ok(name) if !name.is_empty() => spawn::set_name(&name),
        _ => spawn::set_name(c"mp-child"),
    }
}

/// The life of an exec'd child, told by the fork server what to do.
pub(super) fn after_exec(socket: OwnedFd, settled: Result<()>) -> ! {
    let Ok(Some((order, Parcel { bytes, fds }))) = Order::recv(socket.as_fd()) else {
        spawn::exit_now(1); // The server died while it asked.
    };
    drop(socket);
    let Ok(fds) = order.split(None, fds) else { spawn::exit_now(1) };
    set_name(&order.name);
    let told = report_birth(&fds.report).map_err(Error::from);
    live(order, bytes, fds, None, settled.and(told), Exit::Regular)
}

/// From here on the starter knows that this child is born, whether or not the server can tell. It may have let go.
fn report_birth(report: &OwnedFd) -> io::Result<()> {
    match Report::send_born(report.as_fd(), std::process::id()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        told => told,
    }
}

/// The life of a child that has its order, on a thread of its own where `main` has entered a runtime.
fn live(order: Order, arguments: Vec<u8>, fds: Descriptors, tie: Option<OwnedFd>, ready: Result<()>, exit: Exit) -> ! {
    if !executor::is_inside_runtime() {
        live_here(order, arguments, fds, tie, ready, exit);
    }
    let report = fds.report.try_clone();
    let life = move || -> std::convert::Infallible { live_here(order, arguments, fds, tie, ready, exit) };
    let Err(error) = executor::outside_runtime(life);
    if let Ok(report) = report {
        let why = "cannot start the thread that a function needs where `init` is called inside a runtime";
        finish(&report, &Outcome::error(protocol::spawn_error(why, error)), exit);
    }
    spawn::exit_now(1)
}

/// `tie` is what kills this process when its starter ends, if the order does not bring it.
fn live_here(
    order: Order,
    arguments: Vec<u8>,
    fds: Descriptors,
    tie: Option<OwnedFd>,
    ready: Result<()>,
    exit: Exit,
) -> ! {
    let Descriptors { report, lifeline, streams, directory, own_directory, arguments: memory, attachments } = fds;
    let ready = ready.and_then(|()| {
        // A stream that is missing stays what it is: `/dev/null`.
        spawn::replace_streams(streams)?;
        for directory in [directory, own_directory].into_iter().flatten() {
            directory::enter(directory)?;
        }
        let tie = lifeline.map_or(Ok(tie), signal::die_with)?;
        wait_to_begin(&report)?;
        order.attributes.as_ref().map_or(Ok(()), Attributes::take_on)?;
        if order.leads_group
            && let Some(tie) = &tie
            && !signal::die_as_group(tie.as_fd())?
        {
            return Ok(None);
        }
        Ok(tie)
    });
    let tie = match ready {
        Ok(Some(tie)) => tie,
        Ok(None) => spawn::exit_now(1), // The starter is gone.
        Err(error) => {
            let why = format!("process {} cannot start: {error}", order.name);
            finish(&report, &Outcome::error(Error::new(ErrorKind::Spawn, why).with_source(error)), exit)
        }
    };
    signal::ignore_children_as_at_start();
    if order.is_shielded {
        signal::shield();
    }
    signal::unblock_all();
    if matches!(exit, Exit::Forked) {
        profile::begin();
    }
    let (name, daemon, start_method) = (order.name, order.daemon, Some(order.start_method));
    info::born(ProcessInfo { name, pid: std::process::id(), daemon, start_method }, order.parent);
    let bytes = match (memory, order.arguments_in_memfd) {
        (Some(memory), Some(len)) => frame::out_of_memfd(memory, len),
        _ => Ok(arguments),
    };
    let mut executor = Executor::default();
    panics::keep_backtraces(order.backtraces);
    panics::on_fatal_panic(report_panic);
    let _private = fork::Private::mark(report.as_fd());
    *lock(&REPORT) = Some(Arc::new(ReportSocket { _private, socket: report }));
    note_memory_limit();
    let outcome = match bytes {
        Ok(bytes) => order.call.run(Parcel { bytes, fds: attachments }, &mut executor),
        Err(error) => Outcome::error(Error::io("cannot read the arguments", error)),
    };
    if let Some(report) = report_socket() {
        send(&report.socket, &outcome);
    }
    wait_for_blocking_tasks(executor);
    if children::waited_for().is_some() {
        hang_up();
    }
    children::blocking_wait_for_children();
    drop(tie);
    leave(exit)
}

/// Where to report, while this process runs its function and until the starter need not listen any more.
static REPORT: Mutex<Option<Arc<ReportSocket>>> = Mutex::new(None);

struct ReportSocket {
    /// What is told over it is about this process, and not about one that its function forks. Dropped before the socket.
    _private: fork::Private,
    socket: OwnedFd,
}

fn report_socket() -> Option<Arc<ReportSocket>> {
    lock(&REPORT).clone()
}

/// Tells the starter of a panic that ends this process. Called by the panic hook, so it waits for nothing.
fn report_panic(panic: &PanicInfo) {
    if let Ok(Some(report)) = REPORT.try_lock().as_deref() {
        // If the starter has let go, nobody wants to know.
        let _ = Report::send_panicked(report.socket.as_fd(), panic);
    }
}

/// If this process has a limit of its address space, its starter is told when it dies of that.
pub(crate) fn note_memory_limit() {
    if let (Some(limit), Some(report)) = (memory::limit(), report_socket()) {
        signal::send_when_out_of_memory(report.socket.as_fd(), Report::out_of_memory(limit));
    }
}

/// Tells the starter that it has all that it will get, though this process goes on for a while, and hangs up.
fn hang_up() {
    let report = lock(&REPORT).take();
    if let Some(report) = report {
        signal::no_farewell();
        let _ = Report::send_lingers(report.socket.as_fd());
    }
}

/// A function that has returned may have left blocking tasks behind, which its runtime waits for. So long the starter waits
/// with it for the end of this process.
const LINGER: Duration = Duration::from_millis(10);

fn wait_for_blocking_tasks(executor: Executor) {
    if !executor.has_runtime() || SingleThreaded::check().is_some() {
        return; // There is no thread that such a task could run on.
    }
    let (done, tasks) = mpsc::channel::<()>();
    let waits = std::thread::Builder::new().spawn(move || {
        if tasks.recv_timeout(LINGER) == Err(mpsc::RecvTimeoutError::Timeout) {
            hang_up();
        }
    });
    let waits = waits.map_err(|_| hang_up()); // Without a thread it cannot be told later.
    drop(executor);
    drop(done);
    if let Ok(waits) = waits {
        let _ = waits.join();
    }
}

/// The starter has made sure meanwhile that this child may do no more than itself, and says what it is like by now.
fn wait_to_begin(report: &OwnedFd) -> io::Result<()> {
    let word = match frame::recv(report.as_fd(), Wait::Yes) {
        // It has let go with something of ours unread. What it has sent before that is still there.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => frame::recv(report.as_fd(), Wait::Yes),
        word => word,
    };
    match word {
        Ok(Some(word)) if word.bytes.is_empty() => Ok(()),
        Ok(Some(word)) => {
            let attributes: Attributes = wire::from_bytes(&word.bytes)?;
            attributes.take_on_what_is_permitted();
            Ok(())
        }
        Ok(None) => spawn::exit_now(0), // It has let go of this child, or is gone.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => spawn::exit_now(0),
        Err(error) => Err(error),
    }
}

fn finish(report: &OwnedFd, outcome: &Outcome, exit: Exit) -> ! {
    send(report, outcome);
    leave(exit)
}

/// Sends the outcome, or why it could not be sent. If the starter has let go, nobody reads it.
fn send(report: &OwnedFd, outcome: &Outcome) {
    if let Err(error) = Report::send_outcome(report.as_fd(), outcome) {
        let who = info::current_process();
        let why = format!("{} (pid {}) cannot send its result", who.name(), who.pid());
        let _ = Report::send_outcome(report.as_fd(), &Outcome::error(Error::io(why, error)));
    }
}

fn leave(exit: Exit) -> ! {
    // A closed stream is no reason to fail at the end.
    let _ = io::stdout().flush();
    match exit {
        Exit::Forked => {
            spawn::flush_c_stdio();
            profile::exit(0)
        }
        Exit::Regular => std::process::exit(0),
    }
}

fn apply_variables(variables: &Variables, single: SingleThreaded) {
    variables.iter().for_each(|(key, value)| spawn::set_variable(single, key, value));
}

/// Passes an order on.
pub(super) fn send_order(socket: &OwnedFd, order: &Order, arguments: &[u8], fds: &Descriptors) -> io::Result<()> {
    let Descriptors { report, lifeline, streams, directory, own_directory, arguments: memory, attachments } = fds;
    let first = [Some(report), lifeline.as_ref()].into_iter().chain(streams.iter().map(Option::as_ref));
    let then = [directory, own_directory, memory].into_iter().map(Option::as_ref);
    let all: Vec<_> = first.chain(then).flatten().chain(attachments).map(AsFd::as_fd).collect();
    order.send(socket.as_fd(), arguments, &all)
}
