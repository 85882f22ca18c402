//! [fork(2)](https://man7.org/linux/man-pages/man2/fork.2.html) and the preparation of a new process: inherited descriptors, streams, groups, variables.

use super::refuse;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

/// Proof that this process had one thread at the check. The holder starts none.
#[derive(Clone, Copy)]
pub(crate) struct SingleThreaded(());

impl SingleThreaded {
    pub(crate) fn check() -> Option<Self> {
        // The link count of the directory is two more than the threads in it.
        let task = std::fs::metadata("/proc/self/task").ok()?;
        (std::os::unix::fs::MetadataExt::nlink(&task) == 3).then_some(Self(()))
    }

    /// The same where a thread has been joined, which the kernel may still be taking down.
    pub(crate) fn check_soon() -> Option<Self> {
        const SOON: std::time::Duration = std::time::Duration::from_millis(20);
        let begun = std::time::Instant::now();
        loop {
            match Self::check() {
                None if begun.elapsed() < SOON => std::thread::yield_now(),
                checked => return checked,
            }
        }
    }
}

/// How much stack the first thread of a process may use here.
pub(crate) fn main_stack() -> usize {
    const USUAL: u64 = 8 << 20;
    const MOST: u64 = 1 << 30;
    // Unlimited for the first thread; another one needs a number.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Stack).current;
    limit.map_or(USUAL, |limit| limit.clamp(USUAL / 4, MOST)) as usize
}

/// Which side of a fork this is.
pub(crate) enum Fork {
    Child,
    Parent(u32),
}

/// Forks by the C library, so that its own state (thread id, robust list, malloc, atfork handlers) is right.
pub(crate) fn fork(_: SingleThreaded) -> io::Result<Fork> {
    refuse::at("fork")?;
    // SAFETY: this process has one thread, so no other can hold a lock that would stay locked in the child.
    match super::fork::ours(|| unsafe { libc::fork() }) {
        -1 => Err(super::call::of_new_process(io::Error::last_os_error())),
        0 => {
            super::background::permit();
            Ok(Fork::Child)
        }
        pid => Ok(Fork::Parent(pid as u32)),
    }
}

/// Ends the process without running exit handlers that it inherited from the process it was forked from.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` takes no pointer and does not return.
    unsafe { libc::_exit(code) }
}

/// Writes a line to the standard error in one piece, without a lock that another thread may hold.
pub(crate) fn print_line(line: &str) {
    // There may be no standard error.
    let write = |()| rustix::io::write(rustix::stdio::stderr(), format!("multiprocess: {line}\n").as_bytes());
    let _ = refuse::at("write").and_then(write);
}

/// Sets the name of this thread in `ps` and `top`, and so that of a process of one thread; cut at 15 bytes.
pub(crate) fn set_name(name: &std::ffi::CStr) {
    // A name is only for people.
    let _ = rustix::thread::set_name(name);
}

/// The pid of the parent; 0 if the parent is in another pid namespace.
pub(crate) fn parent() -> i32 {
    // Not by rustix, for which a parent in another pid namespace is none.
    nix::unistd::getppid().as_raw()
}

/// Leaves the process group that this process is in for one of its own; false if it may not.
pub(crate) fn leave_group() -> bool {
    set_group(None).is_ok()
}

/// Joins `group`, if it still exists.
pub(crate) fn join_group(group: rustix::process::Pid) {
    let _ = set_group(Some(group));
}

/// Moves this process to `group`, or to a group of its own.
pub(super) fn set_group(group: Option<rustix::process::Pid>) -> rustix::io::Result<()> {
    refuse::at("setpgid")?;
    rustix::process::setpgid(None, group)
}

/// Leaves session, terminal and process group, if this process does not lead a group.
pub(crate) fn leave_session() {
    let _ = refuse::at("setsid").and_then(|()| rustix::process::setsid());
}

/// Puts `streams` in the place of the standard streams; where there is none, the present one stays.
pub(crate) fn replace_streams([stdin, stdout, stderr]: [Option<OwnedFd>; 3]) -> io::Result<()> {
    stdin.map(|own| replace_stream(own, rustix::stdio::dup2_stdin)).transpose()?;
    stdout.map(|own| replace_stream(own, rustix::stdio::dup2_stdout)).transpose()?;
    stderr.map(|own| replace_stream(own, rustix::stdio::dup2_stderr)).transpose()?;
    Ok(())
}

/// Puts `own` in the place of a standard stream, by `dup2`.
pub(super) fn replace_stream<F: AsFd>(own: F, dup2: impl FnOnce(F) -> rustix::io::Result<()>) -> io::Result<()> {
    refuse::at("dup")?;
    Ok(dup2(own)?)
}

/// The process group of this process; `None` if it is one from outside the pid namespace, which has no number here.
pub(crate) fn process_group() -> Option<rustix::process::Pid> {
    // Not by rustix, which takes for granted that there is a number.
    rustix::process::Pid::from_raw(nix::unistd::getpgrp().as_raw())
}

/// Returns `true` if processes whose parent has ended become children of this one.
pub(crate) fn inherits_orphans() -> bool {
    std::process::id() == 1 || rustix::process::child_subreaper().is_ok_and(|pid| pid.is_some())
}

/// Flushes the streams of C code in this process.
pub(crate) fn flush_c_stdio() {
    // SAFETY: null means every open stream.
    unsafe { libc::fflush(std::ptr::null_mut()) };
}

/// Closes many descriptors in as few calls as their numbers have gaps; one by one where a filter refuses that call.
pub(crate) fn close_all(fds: Vec<OwnedFd>) {
    let mut fds: Vec<RawFd> = fds.into_iter().map(IntoRawFd::into_raw_fd).collect();
    fds.sort_unstable();
    for run in fds.chunk_by(|a, b| a + 1 == *b) {
        if let (Some(first), Some(last)) = (run.first(), run.last()) {
            // SAFETY: we own every descriptor of the run, and nothing else lies in it.
            let close = |()| unsafe { libc::syscall(libc::SYS_close_range, *first, *last, 0) } == 0;
            let refused = !refuse::at("close_range").is_ok_and(close);
            if refused {
                for fd in run {
                    // SAFETY: we own it, and it is open: a refused call has closed none.
                    unsafe { libc::close(*fd) };
                }
            }
        }
    }
}

/// Returns `true` if `fd` is open here and in programs that this process executes.
fn is_inheritable(fd: RawFd) -> bool {
    // SAFETY: `fcntl` answers for any number.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    flags != -1 && flags & libc::FD_CLOEXEC == 0
}

/// The standard stream `fd`, unless it is closed or not meant for children.
pub(crate) fn standard(fd: RawFd) -> Option<BorrowedFd<'static>> {
    if !is_inheritable(fd) {
        return None;
    }
    // SAFETY: 0, 1 and 2 stay open for the life of a program; one that closes them all the same gives us
    // whatever opens there next, which is what any use of a standard stream would get.
    Some(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Descriptors beyond the standard streams that this process has inherited by its exec: those that are not close-on-exec,
/// and so were not opened here by Rust code.
pub(crate) fn inherited() -> Vec<RawFd> {
    open_descriptors().into_iter().filter(|fd| *fd > 2 && is_inheritable(*fd)).collect()
}

/// The numbers of the open descriptors; some may be closed by now.
pub(crate) fn open_descriptors() -> Vec<RawFd> {
    let listed = std::fs::read_dir("/proc/self/fd").map(|entries| {
        let number = |entry: io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
        entries.filter_map(number).collect::<Vec<RawFd>>()
    });
    // Without /proc every number is asked that a program is likely to have.
    listed.unwrap_or_else(|_| (0..1 << 16).collect())
}

/// A look at one of [`inherited`], which may turn out to be another's.
pub(crate) fn look_at<R>(fd: RawFd, look: impl FnOnce(BorrowedFd<'_>) -> R) -> Option<R> {
    // SAFETY: `fcntl` answers for any number.
    let is_open = unsafe { libc::fcntl(fd, libc::F_GETFD) } != -1;
    // SAFETY: it is open, and the borrow ends with this call, in which nobody closes it: this is the first thing that
    // `main` does.
    is_open.then(|| look(unsafe { BorrowedFd::borrow_raw(fd) }))
}

/// Takes a descriptor that was inherited for the caller alone.
pub(crate) fn take_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    refuse::at("fcntl")?;
    look_at(fd, |fd| rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)).ok_or(io::ErrorKind::NotFound)??;
    // SAFETY: it is open, and no other code here knows of it: the starter of this process made it for this call.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })
}

/// The descriptors that this process inherited, before any code of it ran: their numbers and files.
static INHERITED: OnceLock<Vec<(RawFd, Option<Identity>)>> = OnceLock::new();

/// Device, inode and type.
type Identity = (u64, u64, u32);

fn identity(fd: RawFd) -> Option<Identity> {
    refuse::at("fstat").ok()?;
    let stat = look_at(fd, |fd| rustix::fs::fstat(fd))?.ok()?;
    Some((stat.st_dev, stat.st_ino, stat.st_mode & libc::S_IFMT))
}

/// Called before `main`: descriptors that are open now were not opened by this program.
pub(crate) fn note_inherited() {
    INHERITED.get_or_init(|| inherited().into_iter().map(|fd| (fd, identity(fd))).collect());
}

/// Closes descriptors that another program left open by mistake, and none that this one has opened since, in `main` or by a C
/// library without close-on-exec.
pub(crate) fn close_leaked() {
    let is_still = |(fd, of): &&(RawFd, Option<Identity>)| is_inheritable(*fd) && identity(*fd) == *of;
    let leaked: Vec<RawFd> = match INHERITED.get() {
        Some(noted) => noted.iter().filter(is_still).map(|(fd, _)| *fd).collect(),
        None => inherited(),
    };
    for fd in leaked {
        // SAFETY: it was open before anything of this process ran; or, if that was not noted, everything that Rust code here has
        // opened is close-on-exec. Nobody here knows this one.
        unsafe { libc::close(fd) };
    }
}

/// Puts `fd` out of the way of the standard streams' numbers.
pub(crate) fn above_standard(fd: OwnedFd) -> io::Result<OwnedFd> {
    refuse::at("dup")?;
    if fd.as_raw_fd() > 2 { Ok(fd) } else { Ok(rustix::io::fcntl_dupfd_cloexec(fd.as_fd(), 3)?) }
}

/// Returns `true` if the C library takes this as a variable.
pub(crate) fn is_variable(key: &OsStr, value: &OsStr) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let (key, value) = (key.as_bytes(), value.as_bytes());
    !key.is_empty() && !key.iter().any(|byte| matches!(byte, 0 | b'=')) && !value.contains(&0)
}

/// Sets an environment variable of this process, if it can be one.
pub(crate) fn set_variable(_: SingleThreaded, key: &OsStr, value: &OsStr) {
    if !is_variable(key, value) {
        return;
    }
    // SAFETY: no other thread exists that could read the environment meanwhile.
    unsafe { std::env::set_var(key, value) }
}

/// Removes an environment variable of this process.
pub(crate) fn remove_variable(_: SingleThreaded, key: &OsStr) {
    if !is_variable(key, OsStr::new("")) {
        return;
    }
    // SAFETY: no other thread exists that could read the environment meanwhile.
    unsafe { std::env::remove_var(key) }
}

/// A child of this process that ended, now reaped; `None` if there is none.
pub(crate) fn reap() -> Option<(u32, i32)> {
    let mut status = 0;
    // SAFETY: `status` is ours to write.
    match unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) } {
        pid @ 1.. => Some((pid as u32, status)),
        _ => None,
    }
}
