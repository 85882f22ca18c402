//! Rights that an exec may give a process beyond those of its starter: set-user-ID, set-group-ID and file capabilities. See
//! [execve(2)](https://man7.org/linux/man-pages/man2/execve.2.html) and
//! [PR_SET_NO_NEW_PRIVS](https://man7.org/linux/man-pages/man2/PR_SET_NO_NEW_PRIVS.2const.html).
//!
//! The process that executes such a program chooses its arguments, environment and descriptors, and must not be trusted.
//! If `no_new_privs` was set before the exec, that process has at least the rights of the new one, and gains nothing
//! by it.

use super::credentials::capability_sets;
use super::refuse;
use super::secure::is_secure;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};

const NOT_ASKED: u8 = 0;
const NO: u8 = 1;
const YES: u8 = 2;

/// Whether `no_new_privs` was set when this program began, before anything in it could set it.
static WERE_FINAL: AtomicU8 = AtomicU8::new(NOT_ASKED);

extern "C" fn note() {
    if WERE_FINAL.load(Relaxed) == NOT_ASKED {
        WERE_FINAL.store(if are_final() { YES } else { NO }, Relaxed);
    }
}

/// Runs before `main`.
#[used]
#[unsafe(link_section = ".init_array")]
static NOTE: extern "C" fn() = note;

/// Returns `true` if the exec that began this program gave it rights that its starter may not have had.
pub(crate) fn came_by_exec() -> bool {
    // The reference is what makes the linker keep the entry; called here, before `main`, it does what it did or will do.
    std::hint::black_box(&NOTE)();
    // Effective ids that are not the real ones have the same effect; without a file that gives some, they are the starter's.
    // Where neither explains it, a security module has given something.
    let is_explained = || {
        use rustix::process::{getegid, geteuid, getgid, getuid};
        (geteuid() != getuid() || getegid() != getgid()) && !may_come_from_file("/proc/self/exe")
    };
    is_secure() && WERE_FINAL.load(Relaxed) != YES && !is_explained()
}

/// Returns `true` if an exec of `program` by this thread could give rights. If that cannot be found out, it counts as yes.
pub(crate) fn may_come_from(program: BorrowedFd<'_>) -> bool {
    !MAY_BE_GIVEN.load(Relaxed)
        && (come_back_to_root() || may_come_from_file(&format!("/proc/self/fd/{}", program.as_raw_fd())))
}

/// Returns `true` if an exec gives this thread capabilities that it has dropped: those of the user 0 are permitted again, as far as
/// the bounding set goes, and so are inheritable ones.
fn come_back_to_root() -> bool {
    use rustix::process::{geteuid, getuid};
    use rustix::thread::{self, CapabilitiesSecureBits, CapabilitySet};
    let is_root = getuid().is_root() || geteuid().is_root();
    let are_kept_from_root =
        || thread::capabilities_secure_bits().is_ok_and(|bits| bits.contains(CapabilitiesSecureBits::NO_ROOT));
    if !is_root || are_kept_from_root() {
        return false;
    }
    let Ok([_, permitted, inheritable]) = capability_sets() else { return true };
    let all = (0..64).map(|number| CapabilitySet::from_bits_retain(1 << number));
    // The kernel fails for one that it does not know.
    let mut is_bounding =
        all.filter(|bit| permitted & bit.bits() == 0).map_while(|bit| thread::capability_is_in_bounding_set(bit).ok());
    inheritable & !permitted != 0 || is_bounding.any(|is_in| is_in)
}

fn may_come_from_file(path: &str) -> bool {
    use rustix::io::Errno;
    const SET_ID: u32 = libc::S_ISUID | libc::S_ISGID;
    let stat = refuse::at("stat").and_then(|()| rustix::fs::stat(path));
    let is_set_id = stat.map_or(true, |stat| stat.st_mode & SET_ID != 0);
    is_set_id
        || !matches!(
            rustix::fs::getxattr_query(path, "security.capability"),
            Ok(0) | Err(Errno::NODATA | Errno::NOTSUP | Errno::NOSYS)
        )
}

/// Whether this thread may inspect another process. It may not if it is confined more than that one, for example by Landlock,
/// which cannot be queried otherwise. `None` if that cannot be found out. See
/// [ptrace(2)](https://man7.org/linux/man-pages/man2/ptrace.2.html), "Ptrace access mode checking".
pub(crate) fn may_look_at(pid: u32) -> Option<bool> {
    use rustix::io::Errno;
    let mut room = [std::mem::MaybeUninit::uninit(); 1];
    let look = |()| rustix::fs::readlinkat_raw(rustix::fs::CWD, format!("/proc/{pid}/exe"), &mut room).map(drop);
    match refuse::at("readlink").and_then(look) {
        Ok(_) => Some(true),
        Err(Errno::ACCESS | Errno::PERM) => Some(false),
        Err(_) => None,
    }
}

/// Returns `true` if this process permits processes of its user to inspect it. Processes forked from it are like it.
pub(crate) fn can_be_looked_at() -> bool {
    use rustix::process::{DumpableBehavior, dumpable_behavior};
    dumpable_behavior().is_ok_and(|behavior| behavior == DumpableBehavior::Dumpable)
}

/// Real user and group of this process, which the kernel reports of a sender.
pub(crate) fn real_user() -> (u32, u32) {
    (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw())
}

/// Effective user and group of this process.
pub(crate) fn effective_user() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

/// Returns `true` if no exec gives this thread rights any more.
pub(crate) fn are_final() -> bool {
    rustix::thread::no_new_privs().unwrap_or(false)
}

static MAY_BE_GIVEN: AtomicBool = AtomicBool::new(false);

/// For tests: has this process start others without `no_new_privs`, as an attacker would.
pub(crate) fn let_an_exec_give_some() {
    MAY_BE_GIVEN.store(true, Relaxed);
}

/// Sets `no_new_privs`: from now on no exec gives rights to this thread, or to processes that it starts.
pub(crate) fn make_final() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}
