//! [setrlimit(2)](https://man7.org/linux/man-pages/man2/setrlimit.2.html).

use super::refuse;
use rustix::process::{Resource, Rlimit, setrlimit};

/// Limits a resource of this process.
pub(super) fn set(resource: Resource, limits: Rlimit) -> rustix::io::Result<()> {
    refuse::at("setrlimit")?;
    setrlimit(resource, limits)
}
