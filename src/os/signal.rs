//! Signals of this crate's processes: those that are blocked, inherited or ignored; the signal by which a child is killed when
//! its starter ends; and the last report of a process that aborts for want of memory.

use super::poll::again;
use super::{refuse, spawn};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicPtr, Ordering::SeqCst};

/// Blocks every signal and returns a descriptor that is readable after a SIGCHLD.
pub(crate) fn block_all_and_watch_children() -> io::Result<OwnedFd> {
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
    let mut child = SigSet::empty();
    child.add(nix::sys::signal::Signal::SIGCHLD);
    signalfd(&child)
}

fn signalfd(signals: &SigSet) -> io::Result<OwnedFd> {
    refuse::at("signalfd")?;
    let signals = SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(super::call::named("signalfd4"))?;
    refuse::at("dup")?;
    signals.as_fd().try_clone_to_owned()
}

/// Empties the descriptor of [`block_all_and_watch_children`], so that the next signal makes it readable again.
pub(crate) fn drain(signals: BorrowedFd<'_>) {
    let mut buffer = [0; 128];
    while refuse::at("read").and_then(|()| rustix::io::read(signals, &mut buffer)).is_ok_and(|n| n > 0) {}
}

/// Ignores signals that a terminal or a shell sends to a whole group, in a process with several threads, where blocking is
/// not enough. Processes of this crate that it execs must call [`ignore_only`].
pub(crate) fn ignore_group_signals() {
    for signal in
        [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGTSTP, libc::SIGUSR1, libc::SIGUSR2]
    {
        // SAFETY: SIG_IGN is no handler that could run.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Whether the kernel reaps the children of this process as they end. One that has ended before stays to be reaped.
pub(crate) fn reap_by_kernel(yes: bool) {
    // SAFETY: SIG_IGN and SIG_DFL are no handlers that could run.
    unsafe { libc::signal(libc::SIGCHLD, if yes { libc::SIG_IGN } else { libc::SIG_DFL }) };
}

/// The action of SIGCHLD at [`keep_child_action`].
static CHILD_ACTION: OnceLock<libc::sigaction> = OnceLock::new();

fn child_action() -> Option<libc::sigaction> {
    // SAFETY: all zeros is a valid `sigaction`; it lives on this stack, and nothing is changed.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        (libc::sigaction(libc::SIGCHLD, std::ptr::null(), &mut now) == 0).then_some(now)
    }
}

/// Keeps the present action of SIGCHLD for [`restore_child_action`] in processes that are forked from this one.
pub(crate) fn keep_child_action() {
    if let Some(action) = child_action() {
        // Kept once; later the action is this crate's own.
        let _ = CHILD_ACTION.set(action);
    }
}

/// Gives SIGCHLD the action that was kept, a handler included; without one its default.
pub(crate) fn restore_child_action() {
    match CHILD_ACTION.get() {
        // SAFETY: the action was this program's own before, so a handler in it is one that may run here.
        Some(action) => _ = unsafe { libc::sigaction(libc::SIGCHLD, action, std::ptr::null_mut()) },
        None => reap_by_kernel(false),
    }
}

/// Has ended children wait until they are reaped, whatever handler this process has for SIGCHLD.
pub(crate) fn stop_reaping_by_kernel() {
    let Some(mut action) = child_action() else { return };
    if action.sa_sigaction == libc::SIG_IGN {
        reap_by_kernel(false);
    } else if action.sa_flags & libc::SA_NOCLDWAIT != 0 {
        action.sa_flags &= !libc::SA_NOCLDWAIT;
        // SAFETY: the handler, if there is one, stays the one that the program has set.
        let _ = unsafe { libc::sigaction(libc::SIGCHLD, &action, std::ptr::null_mut()) };
    }
}

pub(crate) fn unblock_all() {
    // Cannot fail: the arguments are constants.
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
}

/// The signals that a terminal, a service manager or a hang-up sends to each process of a group or control group, to end it.
pub(crate) const STOPS: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// A descriptor that is readable while one of [`STOPS`] is pending in this process, which blocks them; and the set of
/// these, without those that are ignored.
pub(crate) fn watch_stops() -> io::Result<(OwnedFd, SigSet)> {
    let mut stops = SigSet::empty();
    for signal in STOPS.into_iter().filter(|signal| !is_ignored(*signal)) {
        stops.add(nix::sys::signal::Signal::try_from(signal)?);
    }
    Ok((signalfd(&stops)?, stops))
}

extern "C" fn do_nothing(_: libc::c_int) {}

/// Returns the disposition of a signal: the address of its handler, SIG_IGN or SIG_DFL. `None` for a number that the C library
/// keeps for itself.
fn disposition(signal: libc::c_int) -> Option<libc::sighandler_t> {
    // SAFETY: the structure is ours, valid when zeroed, and the kernel fills it.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        (libc::sigaction(signal, std::ptr::null(), &mut now) == 0).then_some(now.sa_sigaction)
    }
}

/// Sets a disposition: SIG_IGN, SIG_DFL or [`do_nothing`]. Numbers that cannot be set are left alone.
fn set_disposition(signal: libc::c_int, disposition: libc::sighandler_t) {
    // SAFETY: the structure is ours; its handler is none, or one that touches nothing.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = disposition;
        new.sa_flags = libc::SA_RESTART;
        libc::sigaction(signal, &new, std::ptr::null_mut());
    }
}

/// Returns `true` if this process ignores `signal`.
pub(crate) fn is_ignored(signal: libc::c_int) -> bool {
    disposition(signal) == Some(libc::SIG_IGN)
}

/// Returns `true` if this process has a handler for `signal`.
pub(crate) fn has_handler(signal: libc::c_int) -> bool {
    disposition(signal).is_some_and(|now| now != libc::SIG_IGN && now != libc::SIG_DFL)
}

/// From now on the signals that are sent to end a whole group do nothing here; those that are ignored stay so. A handler,
/// because a program that is exec'd from here starts with the default action again, and would go on ignoring.
pub(crate) fn shield() {
    for signal in STOPS.into_iter().filter(|signal| !is_ignored(*signal)) {
        set_disposition(signal, do_nothing as *const () as libc::sighandler_t);
    }
}

/// Ends a [`shield`]: sets the default action, unless another handler was set since.
pub(crate) fn unshield() {
    let ours = do_nothing as *const () as libc::sighandler_t;
    for signal in STOPS.into_iter().filter(|signal| disposition(*signal) == Some(ours)) {
        set_disposition(signal, libc::SIG_DFL);
    }
}

/// The signals that the program ignored when it began, as in `SigIgn` of /proc/PID/status: bit 0 is signal 1.
static IGNORED: OnceLock<u64> = OnceLock::new();

fn bit(signal: libc::c_int) -> u64 {
    1 << (signal - 1)
}

/// In the program itself: notes which signals it ignores from its start. SIGPIPE is not noted: every Rust program ignores
/// it, and so does every process of this crate.
pub(crate) fn note_ignored() {
    IGNORED.get_or_init(|| (1..=64).filter(|signal| is_ignored(*signal)).map(bit).sum::<u64>() & !bit(libc::SIGPIPE));
}

/// The signals that [`note_ignored`] found, here or in the program that this process descends from.
pub(crate) fn ignored_at_start() -> u64 {
    IGNORED.get().copied().unwrap_or_default()
}

/// Replaces the actions inherited by an exec: `ignored` and SIGPIPE are ignored, and no others. Handlers that this process has set
/// since stay. SIGCHLD waits for [`ignore_children_as_at_start`].
pub(crate) fn ignore_only(ignored: u64) {
    let ignored = *IGNORED.get_or_init(|| ignored);
    for signal in (1..=64).filter(|signal| *signal != libc::SIGCHLD) {
        let shall_be = signal == libc::SIGPIPE || ignored & bit(signal) != 0;
        match disposition(signal) {
            Some(libc::SIG_DFL) if shall_be => set_disposition(signal, libc::SIG_IGN),
            Some(libc::SIG_IGN) if !shall_be => set_disposition(signal, libc::SIG_DFL),
            _ => {}
        }
    }
    if is_ignored(libc::SIGCHLD) {
        reap_by_kernel(false);
    }
}

/// In a process that runs a function: SIGCHLD as the program had it when it began.
pub(crate) fn ignore_children_as_at_start() {
    if ignored_at_start() & bit(libc::SIGCHLD) != 0 && disposition(libc::SIGCHLD) == Some(libc::SIG_DFL) {
        reap_by_kernel(true);
    }
}

/// The socket of the last report, which is sent when this process aborts because an allocation failed, and its packet.
static LAST_REPORT: AtomicI32 = AtomicI32::new(-1);
static LAST_PACKET: AtomicPtr<Vec<u8>> = AtomicPtr::new(std::ptr::null_mut());

/// Sends `packet` over `socket` if this process aborts because memory could not be allocated. The socket stays open until
/// [`cancel_last_report`].
pub(crate) fn send_when_out_of_memory(socket: BorrowedFd<'_>, packet: Vec<u8>) {
    // Never freed, because a handler may read it at any time; there is one for each limit that a process is given.
    LAST_PACKET.store(Box::into_raw(Box::new(packet)), SeqCst);
    LAST_REPORT.store(socket.as_raw_fd(), SeqCst);
    if disposition(libc::SIGABRT) == Some(libc::SIG_DFL) {
        set_disposition(libc::SIGABRT, on_abort as *const () as libc::sighandler_t);
    }
}

pub(crate) fn cancel_last_report() {
    LAST_REPORT.store(-1, SeqCst);
}

/// `abort` raises SIGABRT and, once this has returned, ends the process. An allocation that failed has left ENOMEM in
/// `errno`, unless a backtrace was printed since; then Rust's function for such failures is on the stack. Nothing here
/// allocates.
extern "C" fn on_abort(_: libc::c_int) {
    let (socket, error) = (LAST_REPORT.load(SeqCst), io::Error::last_os_error().raw_os_error());
    set_disposition(libc::SIGABRT, libc::SIG_DFL); // Whatever goes wrong here ends the process.
    let is_out_of_memory = error == Some(libc::ENOMEM) || has_failed_to_allocate();
    // SAFETY: null, or a packet that was never freed.
    let packet = unsafe { LAST_PACKET.load(SeqCst).as_ref() };
    if let Some(packet) = packet.filter(|_| socket >= 0 && is_out_of_memory) {
        // SAFETY: the packet lives for ever; a number that is no socket is an error that nobody reads.
        unsafe { libc::send(socket, packet.as_ptr().cast(), packet.len(), libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    }
}

/// Returns `true` if `handle_alloc_error` is on the stack.
fn has_failed_to_allocate() -> bool {
    use libc::c_void;
    unsafe extern "C" {
        fn _Unwind_Backtrace(
            visit: extern "C" fn(*mut c_void, *mut c_void) -> libc::c_int,
            found: *mut c_void,
        ) -> libc::c_int;
        fn _Unwind_GetIP(frame: *mut c_void) -> usize;
        fn _Unwind_FindEnclosingFunction(instruction: *mut c_void) -> *mut c_void;
    }
    extern "C" fn visit(frame: *mut c_void, found: *mut c_void) -> libc::c_int {
        let wanted: fn(std::alloc::Layout) -> ! = std::alloc::handle_alloc_error;
        // SAFETY: the unwinder hands its own frame, and the flag that it was given.
        unsafe {
            // A return address is behind the call.
            let function = _Unwind_FindEnclosingFunction(_Unwind_GetIP(frame).wrapping_sub(1) as *mut c_void);
            *found.cast::<bool>() |= function as usize == wanted as usize;
        }
        0
    }
    let mut found = false;
    // SAFETY: `visit` is of the type that the unwinder calls, and the flag outlives the call. std links the unwinder.
    unsafe { _Unwind_Backtrace(visit, (&raw mut found).cast()) };
    found
}

/// Opens a second description of the read end of `pipe`, for one process to [`die_with`].
pub(crate) fn reopen(pipe: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    refuse::at("open")?;
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
}

/// The descriptor whose hang-up kills this process (its tie), and the target of that signal: its pid, or the negative number of
/// its group.
static TIE: AtomicI32 = AtomicI32::new(-1);
static TIE_TARGET: AtomicI32 = AtomicI32::new(0);

/// Renews the tie of [`die_with`] after this process has become another user. The kernel lets a description send the signal
/// only to a process of the user that armed it, unless that was its own root. Until this is called, a tied process that has
/// given up the root of a user namespace outlives its parent.
pub(crate) fn renew_tie() {
    let (tie, tied) = (TIE.load(SeqCst), TIE_TARGET.load(SeqCst));
    if tie >= 0 && tied.unsigned_abs() == std::process::id() {
        let _ = again(|| {
            refuse::at("fcntl")?;
            // SAFETY: the command takes no pointer; for a number that is not open any more the kernel returns an error.
            unsafe { libc::fcntl(tie, libc::F_SETOWN, tied) };
            Ok(())
        });
    }
}

/// Ties this process to the holder of the write end of a pipe: when that end closes, the kernel kills this process, whatever it
/// is doing. `own` is a description that only this process uses, because the tie belongs to the description.
/// Returns it, to be kept open, or `None` if the holder is gone already.
/// See [fcntl(2)](https://man7.org/linux/man-pages/man2/fcntl.2.html), F_SETSIG.
pub(crate) fn die_with(own: OwnedFd) -> io::Result<Option<OwnedFd>> {
    const F_SETSIG: libc::c_int = 10;
    let fcntl = |command, argument: libc::c_int| {
        // SAFETY: the descriptor is open, and none of the three commands takes a pointer.
        match unsafe { libc::fcntl(own.as_raw_fd(), command, argument) } {
            -1 => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
            _ => Ok(()),
        }
    };
    // Without the tie a process cannot do its work, so it is tried again while memory is short.
    again(|| {
        refuse::at("fcntl")?;
        fcntl(F_SETSIG, libc::SIGKILL)?;
        fcntl(libc::F_SETOWN, std::process::id() as libc::c_int)?;
        fcntl(libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK)
    })?;
    TIE.store(own.as_raw_fd(), SeqCst);
    TIE_TARGET.store(std::process::id() as i32, SeqCst);
    Ok((!super::socket::is_hung_up(own.as_fd())).then_some(own))
}

/// Makes this process the leader of a group of its own, which as a whole has the tie that [`die_with`] made. Programs that
/// are executed keep it: it is not closed for them. `false` if the holder is gone already.
pub(crate) fn die_as_group(tie: BorrowedFd<'_>) -> io::Result<bool> {
    // Refused to the leader of a session, which leads its group anyway.
    match spawn::set_group(None) {
        Err(Errno::PERM) | Ok(()) => {}
        Err(error) => return Err(error.into()),
    }
    refuse::at("fcntl")?;
    // SAFETY: the descriptor is open, and the command takes no pointer; a negative number is a group.
    if unsafe { libc::fcntl(tie.as_raw_fd(), libc::F_SETOWN, -(std::process::id() as libc::c_int)) } == -1 {
        return Err(io::Error::last_os_error());
    }
    TIE_TARGET.store(-(std::process::id() as i32), SeqCst);
    refuse::at("fcntl")?;
    rustix::io::fcntl_setfd(tie, rustix::io::FdFlags::empty())?;
    Ok(!super::socket::is_hung_up(tie))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reopened_pipe_hangs_up_when_its_holder_is_gone() {
        let (read, write) = std::io::pipe().unwrap();
        let tied = die_with(reopen(read.as_fd()).unwrap()).unwrap();
        assert!(tied.is_some());
        drop(tied);
        drop(write);
        // SIGKILL would come only to a description that was armed before; this one is armed after.
        assert!(crate::os::socket::is_hung_up(read.as_fd()));
    }
}
