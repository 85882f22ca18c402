//! Processes and file descriptors, directly over libc.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

pub fn check(result: i64) -> i64 {
    assert!(result >= 0, "{}", io::Error::last_os_error());
    result
}

/// A forked child; `wait` reaps it.
pub struct Forked(pub libc::pid_t);

/// Forks a child that runs `body` and leaves with `_exit(0)`, or dies with its parent.
pub fn fork(body: impl FnOnce()) -> Forked {
    match unsafe { libc::fork() } {
        0 => {
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            body();
            unsafe { libc::_exit(0) }
        }
        pid => Forked(check(pid.into()) as libc::pid_t),
    }
}

impl Forked {
    pub fn wait(self) {
        wait_for(self.0);
    }
}

pub fn wait_for(pid: libc::pid_t) {
    let mut status = 0;
    check(unsafe { libc::waitpid(pid, &mut status, libc::__WALL) }.into());
    assert_eq!(status, 0, "child failed");
}

pub fn kill(pid: libc::pid_t) {
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

pub fn pidfd_open(pid: libc::pid_t) -> OwnedFd {
    own(check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) }) as RawFd)
}

/// Reaps the child of a pidfd that is known to have exited.
pub fn reap(pidfd: &OwnedFd) {
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::__WALL;
        check(libc::waitid(libc::P_PIDFD, pidfd.as_raw_fd() as u32, &mut info, flags).into());
    }
}

pub fn own(fd: RawFd) -> OwnedFd {
    unsafe { OwnedFd::from_raw_fd(check(fd.into()) as RawFd) }
}

pub fn socketpair(kind: i32) -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) }.into());
    (own(fds[0]), own(fds[1]))
}

/// `(read end, write end)`.
pub fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }.into());
    (own(fds[0]), own(fds[1]))
}

pub fn eventfd() -> OwnedFd {
    own(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) })
}

pub fn set_nonblocking(fd: &OwnedFd) {
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }.into());
}

/// One `read`, which must not be at end of file.
pub fn read(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    let n = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    if n > 0 { Ok(n as usize) } else if n == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Err(io::Error::last_os_error()) }
}

pub fn read_exact(fd: &OwnedFd, mut buffer: &mut [u8]) {
    while !buffer.is_empty() {
        let n = read(fd, buffer).expect("read");
        buffer = &mut buffer[n..];
    }
}

pub fn write(fd: &OwnedFd, buffer: &[u8]) -> io::Result<usize> {
    let n = unsafe { libc::write(fd.as_raw_fd(), buffer.as_ptr().cast(), buffer.len()) };
    if n >= 0 { Ok(n as usize) } else { Err(io::Error::last_os_error()) }
}

pub fn write_all(fd: &OwnedFd, mut buffer: &[u8]) {
    while !buffer.is_empty() {
        let n = write(fd, buffer).expect("write");
        buffer = &buffer[n..];
    }
}

pub fn pin_to_cpu(cpu: usize) {
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        check(libc::sched_setaffinity(0, size_of_val(&set), &set).into());
    }
}

/// CPU time of this process and its reaped children.
pub fn cpu_time() -> Duration {
    own_cpu_time() + cpu_time_of(libc::RUSAGE_CHILDREN)
}

pub fn own_cpu_time() -> Duration {
    cpu_time_of(libc::RUSAGE_SELF)
}

fn cpu_time_of(who: i32) -> Duration {
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(who, &mut usage);
        let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1_000);
        time(usage.ru_utime) + time(usage.ru_stime)
    }
}

/// Kilobytes of one line of `/proc/<pid>/smaps_rollup`, e.g. `Pss`.
pub fn smaps_kib(pid: libc::pid_t, field: &str) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps_rollup");
    let prefix = format!("{field}:");
    let line = text.lines().find(|l| l.starts_with(&prefix)).expect("field");
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The W12 metrics: medians over idle workers.
pub fn idle_memory(pids: &[libc::pid_t]) -> crate::cli::Metrics {
    let median = |field: &str| {
        let kib: Vec<f64> = pids.iter().map(|&p| smaps_kib(p, field)).collect();
        crate::stats::quantile(&kib, 0.5)
    };
    let private = median("Private_Dirty") + median("Private_Clean");
    vec![("pss_kib", median("Pss")), ("private_kib", private)]
}

/// Children of this process, whichever thread started them.
pub fn children() -> Vec<libc::pid_t> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let list = |t: std::fs::DirEntry| std::fs::read_to_string(t.path().join("children")).unwrap();
    tasks.flat_map(|t| list(t.unwrap()).split_whitespace().map(|p| p.parse().unwrap()).collect::<Vec<_>>()).collect()
}
