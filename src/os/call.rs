//! Names in errors of system calls that a sandbox or a kernel does not permit: the errno alone does not identify the call.

use std::io;

/// For `map_err`: an error that names `call`, if that is forbidden or missing here. Other errors stay as they are.
pub(crate) fn named<E: Into<io::Error>>(call: &'static str) -> impl Fn(E) -> io::Error {
    move |error| {
        let error = error.into();
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES | libc::ENOSYS) => io::Error::new(
                error.kind(),
                format!(
                    "the system call `{call}` is refused (by a seccomp filter, another sandbox, or an old kernel): {error}"
                ),
            ),
            _ => error,
        }
    }
}
