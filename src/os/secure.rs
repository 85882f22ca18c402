//! [AT_SECURE](https://man7.org/linux/man-pages/man3/getauxval.3.html): whether the starter of a program may have other rights
//! than the program.

/// Returns `true` if the kernel reports that the environment of this process may be that of a user with other rights (AT_SECURE).
pub(crate) fn is_secure() -> bool {
    // SAFETY: `getauxval` answers for any number.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}
