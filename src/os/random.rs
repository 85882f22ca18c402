//! [getrandom(2)](https://man7.org/linux/man-pages/man2/getrandom.2.html).

use rustix::rand::{GetRandomFlags, getrandom};
use std::io;

/// `N` unpredictable bytes. Up to 256 bytes the kernel gives all or none.
pub(crate) fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    const { assert!(N <= 256) };
    let mut bytes = [0; N];
    rustix::io::retry_on_intr(|| {
        super::refuse::at("getrandom")?;
        getrandom(&mut bytes, GetRandomFlags::empty())
    })?;
    Ok(bytes)
}
