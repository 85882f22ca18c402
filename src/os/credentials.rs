//! [credentials(7)](https://man7.org/linux/man-pages/man7/credentials.7.html),
//! [capabilities(7)](https://man7.org/linux/man-pages/man7/capabilities.7.html),
//! [namespaces(7)](https://man7.org/linux/man-pages/man7/namespaces.7.html): the rights of the calling thread, and its namespaces.

use super::refuse;
use crate::error::{Explained, Topic};
use nix::unistd::{getresgid, getresuid};
use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use rustix::thread::{self, CapabilitySet, CapabilitySets};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::OwnedFd;

/// The rights of a thread: two threads with equal ones may do the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Credentials {
    /// Real, effective and saved.
    users: [u32; 3],
    groups: [u32; 3],
    more_groups: Vec<u32>,
    capabilities: Capabilities,
    secure_bits: u32,
    no_new_privs: bool,
    /// How many filters its system calls pass; the strict mode counts as one.
    filters: u32,
    /// Mount, device and inode of its root directory. A mount belongs to one mount namespace.
    root: [u64; 3],
    /// Those of [`NAMESPACES`]. A thread that may change only the first one has zeros for the others.
    namespaces: [u64; NAMESPACES.len()],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Capabilities {
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
    bounding: u64,
}

const NAMESPACES: [&str; 7] = ["user", "net", "ipc", "uts", "cgroup", PIDS_OF_CHILDREN, "time_for_children"];
const PIDS_OF_CHILDREN: &str = "pid_for_children";

/// The open files that show them, and the thread that opened these: makes the next reading cheaper.
#[derive(Default)]
pub(crate) struct Kept(Option<Files>);

struct Files {
    thread: Pid,
    status: OwnedFd,
    /// The directory of the namespaces.
    namespaces: Option<OwnedFd>,
}

impl Files {
    fn open() -> Option<Self> {
        let open = |path, flags| {
            refuse::at("open")?;
            rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        };
        Some(Self {
            thread: thread::gettid(),
            status: open("/proc/thread-self/status", OFlags::RDONLY).ok()?,
            namespaces: open("/proc/thread-self/ns", OFlags::PATH | OFlags::DIRECTORY).ok(),
        })
    }
}

/// The text is longer only if a thread has hundreds of groups; then the system calls are used.
const STATUS: usize = 4096;

impl Kept {
    /// Reads `/proc/thread-self/status`: one system call in place of some fifty.
    fn status<'a>(&mut self, room: &'a mut [u8; STATUS]) -> Option<&'a str> {
        // The files show the thread that opened them, and nothing once it has ended, even if another one has its number.
        self.0 = self.0.take().filter(|files| files.thread == thread::gettid());
        for _ in 0..2 {
            let files = match &mut self.0 {
                Some(files) => files,
                none => none.insert(Files::open()?),
            };
            match refuse::at("pread").and_then(|()| rustix::io::pread(&files.status, &mut room[..], 0)) {
                Ok(len) if (1..STATUS).contains(&len) => return std::str::from_utf8(&room[..len]).ok(),
                Ok(STATUS..) => return None,
                _ => self.0 = None,
            }
        }
        None
    }

    /// The number of a namespace; 0 where it cannot be read.
    fn namespace(&self, name: &str) -> u64 {
        let directory = self.0.as_ref().and_then(|files| files.namespaces.as_ref());
        let mut room = [std::mem::MaybeUninit::uninit(); 64];
        let link = refuse::at("readlink").ok().and(directory);
        let link = link.and_then(|directory| rustix::fs::readlinkat_raw(directory, name, &mut room).ok());
        match link.and_then(|(link, _)| number(link)) {
            Some(number) => number,
            None => namespace(name),
        }
    }
}

/// The rights in the status of a thread in /proc, and its umask.
#[derive(Default)]
struct Status {
    users: [u32; 3],
    groups: [u32; 3],
    more_groups: Vec<u32>,
    capabilities: Capabilities,
    no_new_privs: bool,
    filters: u32,
    umask: Option<u32>,
    /// User and group as the file system sees them: those of another one only after `setfsuid`, `setfsgid`.
    for_files: [u32; 2],
}

impl Status {
    /// `None` if a field is missing.
    fn parse(text: &str) -> Option<Self> {
        let (mut status, mut fields, mut mode) = (Self::default(), 0, 0);
        let (mut filters, mut more_groups) = (None, None);
        for (name, value) in text.lines().filter_map(|line| line.split_once(':')) {
            let value = value.trim();
            let ids = || value.split_ascii_whitespace().map(|id| id.parse().ok()).collect::<Option<Vec<u32>>>();
            let with_files = |ids: Vec<u32>| Some((<[u32; 3]>::try_from(ids.get(..3)?).ok()?, *ids.get(3)?));
            let set = || u64::from_str_radix(value, 16).ok();
            match name {
                "Umask" => status.umask = Some(u32::from_str_radix(value, 8).ok()?),
                "Groups" => more_groups = Some(ids()?),
                "Seccomp_filters" => filters = Some(value.parse().ok()?),
                "Uid" => (status.users, status.for_files[0]) = with_files(ids()?)?,
                "Gid" => (status.groups, status.for_files[1]) = with_files(ids()?)?,
                "CapInh" => status.capabilities.inheritable = set()?,
                "CapPrm" => status.capabilities.permitted = set()?,
                "CapEff" => status.capabilities.effective = set()?,
                "CapBnd" => status.capabilities.bounding = set()?,
                "CapAmb" => status.capabilities.ambient = set()?,
                "NoNewPrivs" => status.no_new_privs = value != "0",
                "Seccomp" => mode = value.parse().ok()?,
                _ => continue,
            }
            fields += u32::from(!matches!(name, "Umask" | "Groups" | "Seccomp_filters"));
        }
        status.filters = if mode == 0 { 0 } else { filters.unwrap_or(1) };
        status.more_groups = more_groups?;
        status.more_groups.sort_unstable();
        if !status.capabilities.may(CapabilitySet::SETPCAP) {
            status.capabilities.bounding = 0;
        }
        (fields == 9).then_some(status)
    }

    fn from_system_calls() -> io::Result<Self> {
        let (users, groups) = (getresuid()?, getresgid()?);
        // Not by nix, which reads a file of /proc each time.
        let mut more_groups: Vec<u32> = rustix::process::getgroups()?.into_iter().map(|group| group.as_raw()).collect();
        more_groups.sort_unstable();
        Ok(Self {
            users: [users.real, users.effective, users.saved].map(nix::unistd::Uid::as_raw),
            groups: [groups.real, groups.effective, groups.saved].map(nix::unistd::Gid::as_raw),
            more_groups,
            capabilities: Capabilities::of_this_thread()?,
            no_new_privs: thread::no_new_privs()?,
            filters: filters(),
            umask: None,
            // A number that is no user's changes nothing.
            for_files: [
                nix::unistd::setfsuid(nix::unistd::Uid::from_raw(u32::MAX)).as_raw(),
                nix::unistd::setfsgid(nix::unistd::Gid::from_raw(u32::MAX)).as_raw(),
            ],
        })
    }
}

impl Credentials {
    /// Those of the calling thread.
    pub(crate) fn of_this_thread() -> io::Result<Self> {
        Ok(Self::look(&mut Kept::default())?.0)
    }

    /// Those of the calling thread, and its umask where that can be found out. `kept` is kept between two calls of one
    /// process, which makes the next one cheaper: some 10 us, and 20 us for a thread that may change namespaces. It fails for a
    /// thread whose user for files is not its effective one.
    pub(crate) fn look(kept: &mut Kept) -> io::Result<(Self, Option<u32>)> {
        let mut room = [0; STATUS];
        let status = kept.status(&mut room).and_then(Status::parse);
        let status = match status {
            Some(status) => status,
            None => Status::from_system_calls()?,
        };
        let Status { users, groups, more_groups, capabilities, no_new_privs, filters, umask, for_files } = status;
        if for_files != [users[1], groups[1]] {
            let why = "this thread has another user or group for files than its effective one (setfsuid, setfsgid), which a child \
                       would not have: set it back for the spawn";
            return Err(io::Error::other(why));
        }
        let secure_bits = thread::capabilities_secure_bits()?.bits();
        let mut namespaces = [0; NAMESPACES.len()];
        let may_change_all = capabilities.may(CapabilitySet::SYS_ADMIN);
        let to_read = if may_change_all { NAMESPACES.len() } else { 1 };
        for (number, name) in namespaces.iter_mut().zip(NAMESPACES).take(to_read) {
            *number = kept.namespace(name);
        }
        let root = root()?;
        let rest =
            Self { users, groups, more_groups, capabilities, secure_bits, no_new_privs, filters, root, namespaces };
        Ok((rest, umask))
    }

    /// Describes the difference from `other`.
    pub(crate) fn difference(&self, other: &Self) -> String {
        let namespaces = self.namespaces.iter().zip(other.namespaces).zip(NAMESPACES);
        let parts = [
            (self.users != other.users, "user ids"),
            (self.groups != other.groups, "group ids"),
            (self.more_groups != other.more_groups, "supplementary groups"),
            (self.capabilities != other.capabilities, "capabilities"),
            (self.secure_bits != other.secure_bits, "secure bits"),
            (self.no_new_privs != other.no_new_privs, "no_new_privs"),
            (self.filters != other.filters, "seccomp filters"),
            (self.root != other.root, "root directory or mount namespace"),
            (namespaces.clone().any(|((a, b), _)| *a != b), "namespaces"),
        ];
        let names: Vec<_> = parts.into_iter().filter(|(differ, _)| *differ).map(|(_, name)| name).collect();
        names.join(", ")
    }

    /// Returns `true` if the kernel gives the children of this thread pids that differ from those that this process sees.
    pub(crate) fn counts_children_elsewhere(&self) -> bool {
        self.namespaces[0] != 0
            && self.capabilities.may(CapabilitySet::SYS_ADMIN)
            && namespace(PIDS_OF_CHILDREN) != namespace("pid")
    }

    /// Gives up all rights beyond `wanted` that an exec has given to the calling thread, the only one of its process.
    ///
    /// # Errors
    /// If it still has more afterwards.
    pub(crate) fn limit_to(wanted: &Self) -> io::Result<()> {
        Capabilities::limit_to(wanted.capabilities)?;
        let now = Self::of_this_thread()?;
        let is_more = |mine: &[u32], theirs: &[&[u32]]| mine.iter().any(|id| !theirs.concat().contains(id));
        let capabilities = wanted.capabilities;
        let all_groups: [&[u32]; 2] = [&wanted.groups, &wanted.more_groups];
        let has_more = is_more(&now.users, &[&wanted.users])
            || is_more(&now.groups, &all_groups)
            || is_more(&now.more_groups, &all_groups)
            || !now.capabilities.is_within(capabilities)
            || (wanted.no_new_privs && !now.no_new_privs)
            || now.filters < wanted.filters
            || now.root != wanted.root
            || now.namespaces[0] != wanted.namespaces[0];
        match has_more {
            false => Ok(()),
            true => {
                let why = format!(
                    "it has other rights than the process that started it ({}), which it must not keep",
                    now.difference(wanted)
                );
                Err(Explained::error(io::ErrorKind::Other, Topic::GivenRights, why))
            }
        }
    }
}

/// [capget(2)](https://man7.org/linux/man-pages/man2/capget.2.html): the effective, permitted and inheritable sets. Not by
/// rustix, which leaves the room for the answer uninitialized: valgrind knows the first half of the answer only, and would
/// report each later use of the second.
pub(super) fn capability_sets() -> io::Result<[u64; 3]> {
    /// `struct __user_cap_header_struct`.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    unsafe extern "C" {
        fn capget(header: *mut Header, halves: *mut [u32; 3]) -> libc::c_int;
    }
    const VERSION_3: u32 = 0x2008_0522;
    let (mut header, mut halves) = (Header { version: VERSION_3, pid: 0 }, [[0; 3]; 2]);
    // SAFETY: in version 3 the kernel writes two structures of three numbers each, for which there is room.
    if unsafe { capget(&mut header, halves.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let [low, high] = halves;
    Ok([0, 1, 2].map(|set| u64::from(low[set]) | u64::from(high[set]) << 32))
}

impl Capabilities {
    fn of_this_thread() -> io::Result<Self> {
        let [effective, permitted, inheritable] = capability_sets()?;
        let mut sets = Self { effective, permitted, inheritable, ambient: 0, bounding: 0 };
        // Without SETPCAP the bounding set cannot be changed; ambient capabilities are permitted and inheritable.
        if sets.may(CapabilitySet::SETPCAP) {
            sets.bounding = known(thread::capability_is_in_bounding_set);
        }
        if sets.permitted & sets.inheritable != 0 {
            sets.ambient = known(thread::capability_is_in_ambient_set);
        }
        Ok(sets)
    }

    fn may(self, what: CapabilitySet) -> bool {
        self.permitted & what.bits() != 0
    }

    fn is_within(self, other: Self) -> bool {
        let sets = [
            (self.effective, other.effective),
            (self.permitted, other.permitted),
            (self.inheritable, other.inheritable),
            (self.ambient, other.ambient),
            // Of one that may not change the bounding set it is not known.
            (if other.bounding == 0 { 0 } else { self.bounding }, other.bounding),
        ];
        sets.into_iter().all(|(mine, theirs)| mine & !theirs == 0)
    }

    fn limit_to(wanted: Self) -> io::Result<()> {
        let now = Self::of_this_thread()?;
        if now.is_within(wanted) {
            return Ok(());
        }
        if wanted.bounding != 0 && now.effective & CapabilitySet::SETPCAP.bits() != 0 {
            for bit in bits(now.bounding & !wanted.bounding) {
                thread::remove_capability_from_bounding_set(bit)?;
            }
        }
        for bit in bits(now.ambient & !wanted.ambient) {
            thread::configure_capability_in_ambient_set(bit, false)?;
        }
        let within = |mine: u64, theirs: u64| CapabilitySet::from_bits_retain(mine & theirs);
        let sets = CapabilitySets {
            effective: within(now.effective, wanted.effective),
            permitted: within(now.permitted, wanted.permitted),
            inheritable: within(now.inheritable, wanted.inheritable),
        };
        Ok(thread::set_capabilities(None, sets)?)
    }
}

/// Each bit of a set as a set.
fn bits(set: u64) -> impl Iterator<Item = CapabilitySet> {
    (0..64).map(|number| 1 << number).filter(move |bit| set & bit != 0).map(CapabilitySet::from_bits_retain)
}

/// The set of those for which `has` is true, up to the last one that this kernel knows.
fn known(has: impl Fn(CapabilitySet) -> rustix::io::Result<bool>) -> u64 {
    let answers = bits(u64::MAX).map_while(|bit| Some((bit, has(bit).ok()?)));
    answers.filter(|(_, has)| *has).fold(0, |set, (bit, _)| set | bit.bits())
}

fn filters() -> u32 {
    match thread::secure_computing_mode() {
        Ok(thread::SecureComputingMode::Disabled) => 0,
        _ => {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
            let field = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"));
            field.and_then(|field| field.trim().parse().ok()).unwrap_or(1)
        }
    }
}

fn root() -> io::Result<[u64; 3]> {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    refuse::at("stat")?;
    let found = statx(CWD, "/", AtFlags::empty(), StatxFlags::INO | StatxFlags::MNT_ID)?;
    let device = u64::from(found.stx_dev_major) << 32 | u64::from(found.stx_dev_minor);
    Ok([found.stx_mnt_id, device, found.stx_ino])
}

/// The number of a namespace; 0 where it cannot be read.
fn namespace(name: &str) -> u64 {
    let path = format!("/proc/thread-self/ns/{name}");
    let link = refuse::at("readlink").and_then(|()| rustix::fs::readlink(path, Vec::with_capacity(40)));
    link.ok().and_then(|link| number(link.as_bytes())).unwrap_or(0)
}

/// That of `net:[4026531833]`.
fn number(link: &[u8]) -> Option<u64> {
    std::str::from_utf8(link).ok()?.split_once('[')?.1.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_the_credentials_that_proc_shows() {
        let mine = Credentials::of_this_thread().unwrap();
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim_start_matches(':').split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let ids = |name| field(name).iter().map(|id| id.parse().unwrap()).collect::<Vec<u32>>();
        assert_eq!((&ids("Uid")[..3], &ids("Gid")[..3]), (&mine.users[..], &mine.groups[..]));
        let set = |name| u64::from_str_radix(&field(name)[0], 16).unwrap();
        assert_eq!(set("CapPrm"), mine.capabilities.permitted);
        assert_eq!(set("CapEff"), mine.capabilities.effective);
        assert_eq!(set("CapAmb"), mine.capabilities.ambient);
        if mine.capabilities.may(CapabilitySet::SETPCAP) {
            assert_eq!(set("CapBnd"), mine.capabilities.bounding);
        }
        assert_ne!(mine.namespaces[0], 0);
        assert_eq!(mine, Credentials::of_this_thread().unwrap());
        assert_eq!(mine.difference(&mine), "");
        assert!(!mine.counts_children_elsewhere());
    }

    #[test]
    fn system_calls_and_proc_agree() {
        let mut room = [0; STATUS];
        let from_proc = Status::parse(Kept::default().status(&mut room).unwrap()).unwrap();
        let from_calls = Status::from_system_calls().unwrap();
        assert!(from_proc.umask.is_some());
        let parts = |status: Status| {
            (
                status.users,
                status.groups,
                status.more_groups,
                status.capabilities,
                status.no_new_privs,
                (status.filters, status.for_files),
            )
        };
        assert_eq!(parts(from_proc), parts(from_calls));
        assert!(Status::parse("Umask:\t0022\nUid:\t0\t0\t0\t0\n").is_none());
    }

    #[test]
    fn cache_of_one_thread_does_not_show_another() {
        let mut kept = Kept::default();
        let mine = Credentials::look(&mut kept).unwrap();
        assert_eq!(mine, Credentials::look(&mut kept).unwrap());
        let theirs = std::thread::scope(|scope| {
            let look = || {
                let mut sets = thread::capabilities(None).unwrap();
                sets.effective.remove(CapabilitySet::KILL);
                thread::set_capabilities(None, sets).unwrap();
                (Credentials::look(&mut kept).unwrap(), Credentials::of_this_thread().unwrap())
            };
            scope.spawn(look).join().unwrap()
        });
        assert_eq!(theirs.0.0, theirs.1);
        assert_eq!(mine, Credentials::look(&mut kept).unwrap());
    }

    /// What each spawn does to compare the rights of its thread with those of the fork server, for `docs/guide/costs.md`.
    #[test]
    #[ignore = "it measures, and needs a quiet machine and `--release`"]
    fn cost_of_comparing_rights() {
        let (mut kept, other) = (Kept::default(), std::os::unix::process::parent_id());
        let server = Credentials::look(&mut kept).unwrap().0;
        let mut times: Vec<_> = (0..20_000)
            .map(|_| {
                let start = std::time::Instant::now();
                let is_equal = Credentials::look(&mut kept).unwrap().0 == server;
                let seen = std::hint::black_box(crate::os::rights::may_look_at(other));
                let took = start.elapsed();
                assert!(is_equal && seen.is_some());
                took
            })
            .collect();
        times.sort_unstable();
        println!("median {:?}, p99 {:?}", times[10_000], times[19_800]);
    }

    #[test]
    fn rights_given_up_by_another_thread_stay_here() {
        let mine = Credentials::of_this_thread().unwrap();
        let theirs = std::thread::spawn(|| {
            let mut sets = thread::capabilities(None).unwrap();
            sets.effective.remove(CapabilitySet::KILL);
            thread::set_capabilities(None, sets).unwrap();
            Credentials::of_this_thread().unwrap()
        });
        let theirs = theirs.join().unwrap();
        assert_eq!(mine, Credentials::of_this_thread().unwrap());
        match mine.capabilities.effective & CapabilitySet::KILL.bits() {
            0 => assert_eq!(mine, theirs),
            _ => assert_eq!(mine.difference(&theirs), "capabilities"),
        }
    }
}
