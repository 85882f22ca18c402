//! Starts this program again by [posix_spawn(3)](https://man7.org/linux/man-pages/man3/posix_spawn.3.html), in a process
//! that is tagged for life as one that was started to take a role.
//!
//! The start tag is the path of the exec, which the kernel writes into the memory of the process (AT_EXECFN): an unusual spelling of
//! `/proc/self/fd/N`. No argument parser sees it, no change of the environment, the descriptors or the mounts removes it,
//! and programs that the process executes do not have it. The role is received over the descriptor after N.
//!
//! The starter variable is a variable of its environment, for the programs that it executes before it has its role. The death
//! signal is for a program that it executes in its own place with an empty environment: the signal at the death of its parent
//! ([prctl(2)](https://man7.org/linux/man-pages/man2/pr_set_pdeathsig.2const.html)). An exec keeps it, and a process that it forks
//! has none. It is a signal that by default does nothing. Both are removed when the role is taken.

use super::call::of_new_process;
use super::{background, pidfd, pipe, refuse, rights, spawn};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use rustix::process::{parent_process_death_signal, set_parent_process_death_signal};
use std::ffi::{CStr, CString, c_char};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicPtr, AtomicU8, Ordering::Relaxed};
use std::time::Duration;

const TAG: &str = "/proc/self/./fd/./";

extern "C" fn note() {
    if start_tag().is_some() {
        spawn::note_inherited();
        // Where it is not permitted, the other two marks must do.
        let _ = set_parent_process_death_signal(Some(DEATH_SIGNAL));
    }
    // SAFETY: the name ends with a null byte; no thread has begun that could change the environment.
    STARTED_VALUE.store(unsafe { libc::getenv(STARTED.as_ptr()) }, Relaxed);
}

/// The name of the starter variable.
const STARTED: &CStr = c"MULTIPROCESS_STARTED";

/// Its value as it was before `main`.
static STARTED_VALUE: AtomicPtr<c_char> = AtomicPtr::new(std::ptr::null_mut());

/// The starter variable of this process, as [`start`] was given it.
pub(crate) fn starter_variable() -> Option<String> {
    std::env::var(STARTED.to_str().ok()?).ok().filter(|value| !value.is_empty())
}

/// The death signal.
const DEATH_SIGNAL: Signal = Signal::WINCH;

/// Returns `true` if this process has the death signal. The kernel removes it from one that becomes another user.
pub(crate) fn has_death_signal() -> bool {
    parent_process_death_signal() == Ok(Some(DEATH_SIGNAL))
}

/// Removes the death signal.
pub(crate) fn forget_death_signal() {
    if has_death_signal() {
        // It was permitted before.
        let _ = set_parent_process_death_signal(None);
    }
}

/// Returns `true` if a variable is the starter variable.
pub(crate) fn is_starter_variable(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes() == STARTED.to_bytes()
}

/// Takes the starter variable away, so that programs that this process executes from now on do not have it.
pub(crate) fn forget_starter_variable(single: Option<spawn::SingleThreaded>) {
    if let (Some(single), Ok(name)) = (single, STARTED.to_str()) {
        return spawn::remove_variable(single, name.as_ref());
    }
    // Other threads may be reading the environment, so its list stays as it is, and the value becomes empty.
    let value = STARTED_VALUE.load(Relaxed);
    let name = STARTED.to_bytes();
    if value.is_null() {
        return;
    }
    // SAFETY: the kernel laid this string down where the process began, and nothing frees it; the name and `=` stand before it.
    // It is looked at again, as a program may have written over all of it, and what is changed is one byte, to an end.
    unsafe {
        let before = std::slice::from_raw_parts(value.sub(name.len() + 1).cast::<u8>(), name.len() + 1);
        if before.strip_suffix(b"=") == Some(name) {
            AtomicU8::from_ptr(value.cast()).store(0, Relaxed);
        }
    }
}

/// Runs before `main`.
#[used]
#[unsafe(link_section = ".init_array")]
static NOTE: extern "C" fn() = note;

/// The number of the socket that this process's role comes over; `None` if it was not started to take one.
pub(crate) fn start_tag() -> Option<RawFd> {
    // The reference is what makes the linker keep the entry.
    std::hint::black_box(&NOTE);
    tag_in(path_of_exec()).or_else(|| tag_in(kernels_path_of_exec()?))
}

fn tag_in(path: &CStr) -> Option<RawFd> {
    let number: RawFd = path.to_str().ok()?.strip_prefix(TAG)?.parse().ok()?;
    number.checked_add(1)
}

fn path_of_exec() -> &'static CStr {
    // SAFETY: `getauxval` answers for any number; what AT_EXECFN names is a string that the loader or the kernel laid
    // down for the life of the process.
    unsafe {
        match libc::getauxval(libc::AT_EXECFN) as *const c_char {
            path if path.is_null() => c"",
            path => CStr::from_ptr(path),
        }
    }
}

/// The same from the kernel's own table, which a loader that was executed by name (`ld.so ./program`) does not change.
fn kernels_path_of_exec() -> Option<&'static CStr> {
    // SAFETY: `getauxval` answers for any number.
    let (loader, random) = unsafe { (libc::getauxval(libc::AT_BASE), libc::getauxval(libc::AT_RANDOM)) };
    if loader != 0 {
        return None; // The kernel has found a loader by itself, so no other program stands between it and this one.
    }
    let table = kernels_table()?;
    let entry = |wanted| table.chunks_exact(2).find(|pair| pair[0] == wanted).map(|pair| pair[1]);
    // Under an emulator the table may be that of the emulator's process, whose addresses mean nothing here.
    if entry(libc::AT_RANDOM)? != random {
        return None;
    }
    let path = entry(libc::AT_EXECFN).filter(|path| *path != 0)? as *const c_char;
    // SAFETY: this table is of this very process, as its random bytes lie where ours do; the kernel laid the string
    // into the same memory.
    Some(unsafe { CStr::from_ptr(path) })
}

fn kernels_table() -> Option<Vec<libc::c_ulong>> {
    const PR_GET_AUXV: libc::c_int = 0x4155_5856;
    let mut table = vec![0 as libc::c_ulong; 128];
    let room = size_of_val(&table[..]);
    // SAFETY: the kernel writes at most `room` bytes to the table.
    let len = unsafe { libc::prctl(PR_GET_AUXV, table.as_mut_ptr(), room, 0, 0) };
    if len > 0 {
        table.truncate(len as usize / size_of::<libc::c_ulong>());
        return Some(table);
    }
    // Before Linux 6.4.
    let bytes = std::fs::read("/proc/self/auxv").ok()?;
    let words = bytes.chunks_exact(size_of::<libc::c_ulong>());
    Some(words.filter_map(|word| word.try_into().ok().map(libc::c_ulong::from_ne_bytes)).collect())
}

/// How long [`Process::end`] waits.
const END_LIMIT: Duration = Duration::from_secs(10);

/// A process that this one has started.
pub(crate) struct Process {
    pid: u32,
    pidfd: OwnedFd,
    /// It is a pidfd, and not a pipe that a thread closes at the end of the process.
    is_pidfd: bool,
}

impl Process {
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// A descriptor that is readable from the end of the process on.
    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    pub(crate) fn into_pidfd(self) -> OwnedFd {
        self.pidfd
    }

    /// Returns `true` if a signal has stopped it.
    pub(crate) fn is_stopped(&self) -> bool {
        let options = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(self.id(), options).is_ok_and(|status| status.is_some())
    }

    fn id(&self) -> WaitId<'_> {
        match Pid::from_raw(self.pid as i32) {
            Some(pid) if !self.is_pidfd => WaitId::Pid(pid),
            _ => WaitId::PidFd(self.pidfd()),
        }
    }

    /// Returns `true` if it has ended. If it has, it is no zombie any more.
    pub(crate) fn has_ended(&self) -> bool {
        let has_ended = pidfd::has_exited(self.pidfd());
        if has_ended {
            pidfd::reap_by(self.id());
        }
        has_ended
    }

    /// Ends it, waits for that, and leaves no zombie; unless this process may not, or the kernel cannot end it soon.
    pub(crate) fn end(&self) {
        self.kill();
        let _ = self.wait(Some(END_LIMIT));
    }

    /// Sends it SIGKILL, if this process may.
    pub(crate) fn kill(&self) {
        // A process that has ended is not an error. No other process can be hit: without a pidfd it is checked first that
        // the pid is still that of a child.
        let _ = match self.id() {
            WaitId::Pid(pid) if pidfd::is_child_by(self.id()) => {
                kill_process(pid, Signal::KILL).map_err(io::Error::from)
            }
            WaitId::Pid(_) => Ok(()),
            _ => pidfd::signal_child(self.pidfd(), self.pid, Signal::KILL),
        };
    }

    /// Waits until it has ended, at most for `limit`. `None`: it goes on, or another thread has reaped it and the kernel
    /// does not give its status.
    pub(crate) fn wait(&self, limit: Option<Duration>) -> Option<ExitStatus> {
        if !pidfd::wait(self.pidfd(), false, limit) {
            return None;
        }
        pidfd::reap_by(self.id()).or_else(|| match pidfd::exit(self.pidfd()) {
            pidfd::Exit::Known(status) => Some(status),
            _ => None,
        })
    }
}

/// How the end of a process that is started is seen.
#[derive(Clone, Copy)]
pub(crate) enum Watch {
    /// By a pidfd alone, which can be sent to others. Without one the start fails.
    ByPidfd,
    /// By a thread where the kernel, or what this program runs under (valgrind up to 3.20), has no `pidfd_open`. A start
    /// whose `pidfd_open` fails in any other way, or is forbidden, fails.
    Anyhow,
}

/// Starts `program` with these arguments and variables (`NAME=value`) in a process that has the start tag. Its starter variable is
/// `second`. It has `role` as the socket that the tag names, nothing to read as its standard input, and this process's other streams (but for its
/// output, if it `is_silent`), directory and signal mask.
///
/// An exec gives it no rights that this process has not: where the program's file could, it is started under
/// `no_new_privs`.
pub(crate) fn start(
    program: BorrowedFd<'_>,
    arguments: &[CString],
    (variables, second): (Vec<CString>, &str),
    role: BorrowedFd<'_>,
    is_silent: bool,
    watch: Watch,
) -> io::Result<Process> {
    let mut variables = variables;
    variables.push(CString::new([STARTED.to_bytes(), b"=", second.as_bytes()].concat())?);
    let start = || start_with_the_rights_of_this_thread(program, arguments, &variables, role, is_silent, watch);
    if !rights::may_come_from(program) || rights::are_final() {
        return start();
    }
    // `no_new_privs` holds for good, for a thread and the processes that it starts; this thread must stay without it.
    std::thread::scope(|scope| {
        let promise = || rights::make_final().and_then(|()| start());
        let thread = background::spawn_scoped(scope, std::thread::Builder::new(), promise)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that starts a process panicked")))
    })
}

fn start_with_the_rights_of_this_thread(
    program: BorrowedFd<'_>,
    arguments: &[CString],
    variables: &[CString],
    role: BorrowedFd<'_>,
    is_silent: bool,
    watch: Watch,
) -> io::Result<Process> {
    let nothing = nothing_to_read()?;
    let nowhere = if is_silent { Some(nowhere_to_write()?) } else { None };
    // The copy keeps its number free here; in the new process the role's socket takes it.
    let (program, copy) = side_by_side(program, role)?;
    let path = CString::new(format!("{TAG}{}", program.as_raw_fd()))?;
    let mut actions = Actions::new()?;
    actions.duplicate(role.as_raw_fd(), copy.as_raw_fd())?;
    actions.duplicate(nothing.as_raw_fd(), 0)?;
    nowhere.iter().try_for_each(|nowhere| actions.duplicate(nowhere.as_raw_fd(), 1))?;
    let pid = spawn_by_path(&path, &actions, arguments, variables)?;
    match see_end_of(pid, watch) {
        Ok((pidfd, is_pidfd)) => Ok(Process { pid, pidfd, is_pidfd }),
        Err(error) => {
            kill_and_reap(pid);
            Err(error)
        }
    }
}

/// Ends a child of which nothing but its pid is known, if that is still its own.
fn kill_and_reap(pid: u32) {
    let Some(pid) = Pid::from_raw(pid as i32) else { return };
    if pidfd::is_child_by(WaitId::Pid(pid)) {
        // It may have ended just now.
        let _ = kill_process(pid, Signal::KILL);
        let _ = rustix::io::retry_on_intr(|| waitid(WaitId::Pid(pid), WaitIdOptions::EXITED));
    }
}

/// A descriptor that is readable from the end of this child on, and whether it is a pidfd.
fn see_end_of(pid: u32, watch: Watch) -> io::Result<(OwnedFd, bool)> {
    match (pidfd::open(pid), watch) {
        (Err(error), Watch::Anyhow) if error.kind() == io::ErrorKind::Unsupported => Ok((end_by_thread(pid)?, false)),
        (pidfd, _) => Ok((pidfd?, true)),
    }
}

/// The read end of a pipe that a thread closes when this child has ended. It leaves the child to be reaped by others.
fn end_by_thread(pid: u32) -> io::Result<OwnedFd> {
    let id = Pid::from_raw(pid as i32).map(WaitId::Pid).ok_or(io::ErrorKind::InvalidInput)?;
    let (reader, writer) = pipe::pair()?;
    let watch = move || {
        let ended = || waitid(id.clone(), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        while ended().is_err_and(|error| error == rustix::io::Errno::INTR) {}
        drop(writer);
    };
    background::spawn(std::thread::Builder::new().name("mp-watch".into()), watch)?;
    spawn::above_standard(reader.into())
}

fn spawn_by_path(path: &CStr, actions: &Actions, arguments: &[CString], variables: &[CString]) -> io::Result<u32> {
    let arguments = with_null(arguments);
    let variables = with_null(variables);
    let attributes = Attributes::new()?;
    let mut pid = 0;
    refuse::at("posix_spawn")?;
    // SAFETY: path and strings end with a null byte and both lists with a null pointer, all of them outlive the call,
    // which changes none; actions and attributes are initialized.
    let failed = unsafe {
        libc::posix_spawn(
            &mut pid,
            path.as_ptr(),
            &*actions.0,
            &*attributes.0,
            arguments.as_ptr().cast(),
            variables.as_ptr().cast(),
        )
    };
    check(failed).map(|()| pid as u32).map_err(of_new_process)
}

fn with_null(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

fn check(failed: libc::c_int) -> io::Result<()> {
    if failed == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(failed)) }
}

/// The changes to the descriptors of the new process.
struct Actions(Box<libc::posix_spawn_file_actions_t>);

impl Actions {
    fn new() -> io::Result<Self> {
        // SAFETY: all zeroes is a value of this C structure, and `init` gives it a meaning.
        let mut actions = Box::new(unsafe { std::mem::zeroed() });
        // SAFETY: the structure is ours and is initialized once.
        check(unsafe { libc::posix_spawn_file_actions_init(&mut *actions) })?;
        Ok(Self(actions))
    }

    fn duplicate(&mut self, from: RawFd, to: RawFd) -> io::Result<()> {
        // SAFETY: the structure is initialized; any two numbers will do.
        check(unsafe { libc::posix_spawn_file_actions_adddup2(&mut *self.0, from, to) })
    }
}

impl Drop for Actions {
    fn drop(&mut self) {
        // SAFETY: it was initialized and is not used any more.
        unsafe { libc::posix_spawn_file_actions_destroy(&mut *self.0) };
    }
}

/// As std starts programs: SIGPIPE, which Rust programs ignore, has its default action there.
struct Attributes(Box<libc::posix_spawnattr_t>);

impl Attributes {
    fn new() -> io::Result<Self> {
        // SAFETY: all zeroes is a value of this C structure, and `init` gives it a meaning.
        let mut attributes = Box::new(unsafe { std::mem::zeroed() });
        // SAFETY: the structure is ours and is initialized once.
        check(unsafe { libc::posix_spawnattr_init(&mut *attributes) })?;
        let mut attributes = Self(attributes);
        // SAFETY: all zeroes is a value of this C structure; it is emptied first, then filled.
        unsafe {
            let mut defaults: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut defaults);
            libc::sigaddset(&mut defaults, libc::SIGPIPE);
            check(libc::posix_spawnattr_setsigdefault(&mut *attributes.0, &defaults))?;
            check(libc::posix_spawnattr_setflags(&mut *attributes.0, libc::POSIX_SPAWN_SETSIGDEF as libc::c_short))?;
        }
        Ok(attributes)
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: it was initialized and is not used any more.
        unsafe { libc::posix_spawnattr_destroy(&mut *self.0) };
    }
}

/// A copy with this number or a higher one. At the limit the kernel reports the number as invalid.
fn duplicate_from(fd: BorrowedFd<'_>, from: RawFd) -> io::Result<OwnedFd> {
    use rustix::io::Errno;
    let at_limit = |error| if error == Errno::INVAL { Errno::MFILE } else { error };
    refuse::at("dup")?;
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, from).map_err(at_limit)?)
}

/// Copies of both whose numbers follow each other.
fn side_by_side(program: BorrowedFd<'_>, role: BorrowedFd<'_>) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut from = 3;
    loop {
        let program = duplicate_from(program, from)?;
        let role = duplicate_from(role, program.as_raw_fd() + 1)?;
        if role.as_raw_fd() == program.as_raw_fd() + 1 {
            return Ok((program, role));
        }
        from = role.as_raw_fd();
    }
}

/// An empty standard input: `/dev/null`, or a pipe without a writer if that cannot be opened.
pub(crate) fn nothing_to_read() -> io::Result<OwnedFd> {
    null_device().or_else(|_| spawn::above_standard(pipe::pair()?.0.into()))
}

/// An output without a reader: `/dev/null`, or a pipe.
fn nowhere_to_write() -> io::Result<OwnedFd> {
    null_device().or_else(|_| spawn::above_standard(pipe::pair()?.1.into()))
}

/// Replaces standard output and error of this process by `/dev/null`.
pub(crate) fn write_to_nobody() -> io::Result<()> {
    let nobody = nowhere_to_write()?;
    spawn::replace_stream(&nobody, rustix::stdio::dup2_stdout)?;
    spawn::replace_stream(&nobody, rustix::stdio::dup2_stderr)
}

/// The file at `path`, to be executed or executed from.
pub(crate) fn open(path: &std::path::Path) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    refuse::at("open")?;
    spawn::above_standard(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// `/dev/null`, in place of a standard stream.
pub(crate) fn null_device() -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    refuse::at("open")?;
    spawn::above_standard(rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_spelling_of_a_path_is_a_mark() {
        assert_eq!(tag_in(c"/proc/self/./fd/./3"), Some(4));
        for other in [c"", c"/proc/self/fd/3", c"/dev/fd/3", c"/proc/self/./fd/./", c"/proc/self/./fd/./x", c"./a"] {
            assert_eq!(tag_in(other), None, "{other:?}");
        }
        assert_eq!(start_tag(), None);
    }

    #[test]
    fn the_kernels_table_and_the_loader_give_the_same_path() {
        let table = kernels_table().unwrap();
        let path = table.chunks_exact(2).find(|pair| pair[0] == libc::AT_EXECFN).unwrap()[1];
        assert_eq!(path as *const c_char, path_of_exec().as_ptr());
    }

    #[test]
    fn without_a_pidfd_a_thread_notices_the_end_and_leaves_the_child_to_be_reaped() {
        let start = |program: &str, argument: &str| {
            #[expect(clippy::zombie_processes, reason = "`Process` reaps it")]
            let child = std::process::Command::new(program).arg(argument).spawn().unwrap();
            Process { pid: child.id(), pidfd: end_by_thread(child.id()).unwrap(), is_pidfd: false }
        };
        let short = start("sh", "-c").wait(Some(Duration::from_secs(20)));
        assert_eq!(short.and_then(|status| status.code()), Some(2));
        let long = start("sleep", "1000");
        assert!(!long.has_ended() && !long.is_stopped() && long.wait(Some(Duration::ZERO)).is_none());
        long.end();
        assert!(pidfd::has_exited(long.pidfd()) && !pidfd::is_child_by(long.id()));
        // Its pid may be another's by now.
        long.end();
    }

    #[test]
    fn copies_lie_side_by_side_whatever_is_open_between() {
        let (a, b) = io::pipe().unwrap();
        let between: Vec<OwnedFd> =
            (0..9).map(|n| rustix::io::fcntl_dupfd_cloexec(a.as_fd(), 300 + 2 * n).unwrap()).collect();
        let (first, second) = side_by_side(a.as_fd(), b.as_fd()).unwrap();
        assert_eq!(first.as_raw_fd() + 1, second.as_raw_fd());
        drop(between);
    }
}
