//! Names in errors of system calls that a sandbox or a kernel does not permit: the errno alone does not identify the call.

use crate::error::{Explained, Topic};
use std::io;

/// For `map_err`: the error of a call that makes a process. At the limit of their number the kernel asks to try again.
pub(super) fn of_new_process(error: io::Error) -> io::Error {
    at_limit(error, "")
}

/// The same of a call that makes a thread. libc says the same if there are no addresses for its stack.
pub(super) fn of_new_thread(error: io::Error) -> io::Error {
    at_limit(error, ", or no memory for a stack is left (RLIMIT_AS, which `memory_limit` sets)")
}

fn at_limit(error: io::Error, or: &str) -> io::Error {
    if error.kind() != io::ErrorKind::WouldBlock {
        return error;
    }
    let why =
        "there are as many processes and threads as there may be (RLIMIT_NPROC, or pids.max of the control group)";
    Explained::error(error.kind(), Topic::ProcessLimit, format!("{why}{or}: {error}"))
}

/// For `map_err`: an error that names `call`, if that is forbidden or missing here. Other errors stay as they are.
pub(crate) fn named<E: Into<io::Error>>(call: &'static str) -> impl Fn(E) -> io::Error {
    move |error| {
        let error = error.into();
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES | libc::ENOSYS) => Explained::error(
                error.kind(),
                Topic::CallRefused,
                format!(
                    "the system call `{call}` is refused (by a seccomp filter, another sandbox, or an old kernel): {error}"
                ),
            ),
            _ => error,
        }
    }
}
