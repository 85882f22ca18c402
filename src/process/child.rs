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
use super::trace;
use super::variables::Variables;
use crate::error::{Error, ErrorKind, Explained, PanicInfo, Result};
use crate::os::attributes::Attributes;
use crate::os::socket::{self, Sender, Wait};
use crate::os::spawn::{self, SingleThreaded};
use crate::os::sync::lock;
use crate::os::{background, directory, fork, memory, profile, self_pipe, signal};
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
    /// Without the exit handlers, which belong to the fork server.
    Forked,
    Regular,
}

/// Runs a forked child to its end.
///
/// - `private`: descriptors of the server, which it must not keep.
/// - `is_ordered`: its order is on its way. Otherwise it is a spare: it prepares itself meanwhile, down to the memory pages
///   that it will touch, and ends with its starter, or after [`SPARE_TIME`] without an order.
/// - `moved`: whether it could enter the directory of its starter.
/// - `group`: the group of the server, if a process that left it could return.
/// - `lifeline`: ties a spare to its starter before it has an order.
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
    // Without a free descriptor it goes on with the shared pair.
    let _ = self_pipe::renew();
    spawn::close_all(private);
    let tie = lifeline.map(|lifeline| match signal::die_with(lifeline) {
        Ok(Some(tie)) => tie,
        Ok(None) => spawn::exit_now(0), // The starter is gone.
        Err(error) => give_up(socket.as_fd(), error),
    });
    let moved = moved.map_err(|error| Explained::after("its working directory", &error));
    let moved = if is_ordered { moved } else { moved.map_err(|error| give_up(socket.as_fd(), error)) };
    if !is_ordered && !socket::is_readable_within(socket.as_fd(), Duration::ZERO) {
        spawn::set_name(c"mp-spare");
        // A signal to the group of the server is not for a process that has no function yet.
        let left = group.filter(|_| spawn::leave_group());
        // Only time is lost if this fails.
        let _ = rehearse(None);
        // Without a free descriptor a signal kills it that may be meant for the function which it has just received.
        let stops = signal::watch_stops().ok();
        let watch = stops.as_ref().map(|(watch, stops)| (watch.as_fd(), *stops));
        let mut has_come = socket::is_readable_within_open_to_signals(socket.as_fd(), SPARE_TIME, watch);
        drop(stops);
        if !has_come {
            // It is too late, or a signal has arrived that would have ended it. From here on neither an order nor the
            // permission to begin can arrive. If both came just before, the function runs, and the signal is for it.
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
    let report = Some(socket).filter(|_| !order.goes_by_server);
    let Ok(fds) = order.assign_descriptors(report, fds) else { spawn::exit_now(1) };
    let told = if order.goes_by_server { report_birth(&fds.report) } else { Ok(()) };
    set_name(&order.name);
    signal::restore_child_action();
    apply_variables(&order.own_variables, single);
    live(order, bytes, fds, tie, told.and(moved).map_err(Error::from), Exit::Forked)
}

/// Ends a spare child that could not prepare itself. Its starter finds it gone and gives the order to another child, also if
/// it has sent the order already but not the permission to begin.
fn give_up(socket: BorrowedFd<'_>, error: io::Error) -> ! {
    socket::refuse_more(socket);
    refuse(socket, error)
}

/// Ends a child that cannot take its order. A starter that sent the order itself gets the reason; the server has closed the socket.
fn refuse(socket: BorrowedFd<'_>, error: io::Error) -> ! {
    let outcome = Outcome::error(protocol::spawn_error("a process cannot take its order", error));
    let _ = Report::send_outcome(socket, &outcome);
    spawn::exit_now(1)
}

/// A spare child without an order ends after this time.
const SPARE_TIME: Duration = Duration::from_secs(5);

/// Runs an empty order, so that the memory pages that an order touches are copied before an order waits for that. In the
/// server, with a pair of sockets: so that bindings of the dynamic linker and the like are made once for all children.
pub(super) fn rehearse(sockets: Option<(OwnedFd, OwnedFd)>) -> Result<()> {
    let nobody = ProcessInfo { name: String::new(), pid: 0, daemon: false, start_method: None };
    let order = Order {
        call: Call::of(|| ()),
        name: String::new(),
        daemon: false,
        start_method: StartMethod::ForkServer,
        parent: nobody,
        goes_by_server: false,
        starter_environment: None,
        has_directory: false,
        has_own_directory: false,
        attributes: None,
        own_variables: Variables::default(),
        is_shielded: false,
        leads_group: false,
        backtraces: None,
        streams: [false; 3],
        arguments_in_memfd: None,
        trace_level: 0,
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

/// Sets the name that `ps` and listings of lock holders show.
fn set_name(name: &str) {
    match std::ffi::CString::new(name) {
        Ok(name) if !name.is_empty() => spawn::set_name(&name),
        _ => spawn::set_name(c"mp-child"),
    }
}

/// Runs an exec'd child, which gets its order from the fork server, to its end.
pub(super) fn after_exec(socket: OwnedFd, settled: Result<()>) -> ! {
    let Ok(Some((order, Parcel { bytes, fds }))) = Order::recv(socket.as_fd()) else {
        spawn::exit_now(1); // The server died while it sent the order.
    };
    drop(socket);
    let Ok(fds) = order.assign_descriptors(None, fds) else { spawn::exit_now(1) };
    set_name(&order.name);
    let told = report_birth(&fds.report).map_err(Error::from);
    live(order, bytes, fds, None, settled.and(told), Exit::Regular)
}

/// Reports the birth to the starter, in case the server cannot. The starter may have closed the socket.
fn report_birth(report: &OwnedFd) -> io::Result<()> {
    match Report::send_born(report.as_fd(), std::process::id()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        told => told,
    }
}

/// Runs the order and ends, on a thread of its own where `main` has entered a runtime.
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

/// `tie`: the descriptor that kills this process when its starter ends, unless it comes with the order.
fn live_here(
    order: Order,
    arguments: Vec<u8>,
    fds: Descriptors,
    tie: Option<OwnedFd>,
    ready: Result<()>,
    exit: Exit,
) -> ! {
    let Descriptors { report, lifeline, streams, directory, own_directory, arguments: memory, traces, attachments } =
        fds;
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
            let why = format!("process {} cannot start: {}", order.name, error.text());
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
    let is_listened_to = traces.is_some();
    if let Some(traces) = traces {
        trace::begin(order.trace_level, traces);
    }
    let outcome = match bytes {
        Ok(bytes) => order.call.run(Parcel { bytes, fds: attachments }, &mut executor),
        Err(error) => Outcome::error(Error::io("cannot read the arguments", error)),
    };
    if is_listened_to {
        trace::flush();
    }
    if let Some(report) = report_socket() {
        send(&report.socket, &outcome);
    }
    wait_for_blocking_tasks(executor);
    if children::waited_for().is_some() {
        hang_up();
    }
    children::blocking_wait_for_children();
    if is_listened_to {
        finish_traces();
    }
    drop(tie);
    leave(exit)
}

/// The report socket, until the starter has received all.
static REPORT: Mutex<Option<Arc<ReportSocket>>> = Mutex::new(None);

struct ReportSocket {
    /// Reports are about this process, not about one that its function forks. Dropped before the socket.
    _private: fork::Private,
    socket: OwnedFd,
}

fn report_socket() -> Option<Arc<ReportSocket>> {
    lock(&REPORT).clone()
}

/// Reports a panic that ends this process to the starter. Called by the panic hook, so it waits for nothing.
fn report_panic(panic: &PanicInfo) {
    if let Ok(Some(report)) = REPORT.try_lock().as_deref() {
        // The starter may have dropped its handle.
        let _ = Report::send_panicked(report.socket.as_fd(), panic);
    }
}

/// If the address space of this process is limited, has an end for want of memory reported to its starter.
pub(crate) fn note_memory_limit() {
    if let (Some(limit), Some(report)) = (memory::limit(), report_socket()) {
        signal::send_when_out_of_memory(report.socket.as_fd(), Report::out_of_memory(limit));
    }
}

/// Reports to the starter that this process goes on after its outcome, and closes the report socket.
fn hang_up() {
    let report = lock(&REPORT).take();
    if let Some(report) = report {
        signal::cancel_last_report();
        let _ = Report::send_lingers(report.socket.as_fd());
    }
}

/// Sends the last records, and reports to a starter that still reads reports how many it does not get.
fn finish_traces() {
    let dropped = trace::finish();
    if dropped > 0
        && let Some(report) = report_socket()
    {
        // The starter may have dropped its handle.
        let _ = Report::send_dropped_traces(report.socket.as_fd(), dropped);
    }
}

/// A function that has returned may have left blocking tasks behind, for which its runtime waits. After this time the
/// starter gets its result before the end of the process.
const LINGER: Duration = Duration::from_millis(10);

fn wait_for_blocking_tasks(executor: Executor) {
    if !executor.has_runtime() || SingleThreaded::check().is_some() {
        return; // There is no thread that such a task could run on.
    }
    let (done, tasks) = mpsc::channel::<()>();
    let waits = background::spawn(std::thread::Builder::new(), move || {
        if tasks.recv_timeout(LINGER) == Err(mpsc::RecvTimeoutError::Timeout) {
            hang_up();
        }
    });
    let waits = waits.map_err(|_| hang_up()); // Without a thread it cannot be reported later.
    drop(executor);
    drop(done);
    if let Ok(waits) = waits {
        let _ = waits.join();
    }
}

/// Waits for the permission to begin, and takes on the attributes that come with it. The starter has compared the rights.
fn wait_to_begin(report: &OwnedFd) -> io::Result<()> {
    let word = match frame::recv(report.as_fd(), Wait::Yes) {
        // The starter has closed its end with a message of this process unread. Its own messages are still there.
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
        Ok(None) => spawn::exit_now(0), // The starter has given up this child, or is gone.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => spawn::exit_now(0),
        Err(error) => Err(error),
    }
}

fn finish(report: &OwnedFd, outcome: &Outcome, exit: Exit) -> ! {
    send(report, outcome);
    leave(exit)
}

/// Sends the outcome, or the reason why it cannot be sent. The starter may have dropped its handle.
fn send(report: &OwnedFd, outcome: &Outcome) {
    if let Err(error) = Report::send_outcome(report.as_fd(), outcome) {
        let who = info::current_process();
        let why = format!("{} (pid {}) cannot send its result", who.name(), who.pid());
        let _ = Report::send_outcome(report.as_fd(), &Outcome::error(Error::io(why, error)));
    }
}

fn leave(exit: Exit) -> ! {
    // A closed stream is not an error at the end.
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

/// Passes an order on to a child.
pub(super) fn send_order(socket: &OwnedFd, order: &Order, arguments: &[u8], fds: &Descriptors) -> io::Result<()> {
    let Descriptors { report, lifeline, streams, directory, own_directory, arguments: memory, traces, attachments } =
        fds;
    let first = [Some(report), lifeline.as_ref()].into_iter().chain(streams.iter().map(Option::as_ref));
    let then = [directory, own_directory, memory, traces].into_iter().map(Option::as_ref);
    let all: Vec<_> = first.chain(then).flatten().chain(attachments).map(AsFd::as_fd).collect();
    order.send(socket.as_fd(), arguments, &all)
}
