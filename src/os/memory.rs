//! [proc(5)](https://man7.org/linux/man-pages/man5/proc_pid_status.5.html) and
//! [cgroup v2](https://docs.kernel.org/admin-guide/cgroup-v2.html): how much memory a process has, and whether it ran out of it.

use super::sync::lock;
use super::{refuse, rlimit};
use rustix::process::{Resource, Rlimit, getrlimit};
use std::fs::read_to_string;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Bytes of this process that are in memory, now and at most; 0 if they are not known.
pub(crate) fn resident() -> (u64, u64) {
    resident_by("/proc/self/status")
}

/// Bytes of this process that are in memory now, at a tenth of the cost of [`resident`]; 0 if they are not known.
pub(crate) fn resident_now() -> u64 {
    let statm = read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}

/// The same of another process; 0 if it is gone.
pub(crate) fn resident_of(pid: u32) -> (u64, u64) {
    resident_by(&format!("/proc/{pid}/status"))
}

fn resident_by(path: &str) -> (u64, u64) {
    let status = read_to_string(path).unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().ok()
    };
    (field("VmRSS").unwrap_or(0) << 10, field("VmHWM").unwrap_or(0) << 10)
}

/// Gives the whole pages of `bytes` back to the kernel: they are there again, as zeros as a rule, when they are touched.
pub(crate) fn discard(bytes: &mut [u8]) {
    let page = rustix::param::page_size();
    let start = bytes.as_mut_ptr();
    let skip = start.align_offset(page).min(bytes.len());
    let len = (bytes.len() - skip) / page * page;
    if len > 0 && refuse::at("madvise").is_ok() {
        // SAFETY: the range lies in `bytes`, which nobody else sees meanwhile. Whatever is there afterwards is bytes.
        // Where it is refused, which it is for locked memory, nothing has changed.
        let _ = unsafe { rustix::mm::madvise(start.add(skip).cast(), len, rustix::mm::Advice::LinuxDontNeed) };
    }
}

/// From this size on a buffer is asked for in large pages.
const LARGE: usize = 4 << 20;

/// `buffer` with room for `len` elements more, in large pages if that is much and the kernel has such: a page fault for each
/// small one takes as long as the copy that fills it.
pub(crate) fn with_room<P>(mut buffer: Vec<P>, len: usize) -> Vec<P> {
    buffer.reserve_exact(len);
    let room = buffer.spare_capacity_mut();
    let bytes = size_of_val(room);
    if bytes >= LARGE {
        let (page, start) = (rustix::param::page_size(), room.as_mut_ptr().cast::<u8>());
        let skip = start.align_offset(page).min(bytes);
        let len = (bytes - skip) / page * page;
        // SAFETY: the range lies in the buffer's own memory, of which no byte changes.
        let ask = |()| unsafe { rustix::mm::madvise(start.add(skip).cast(), len, rustix::mm::Advice::LinuxHugepage) };
        let _ = refuse::at("madvise").and_then(ask);
    }
    buffer
}

/// The limit of this process's address space, if there is one.
pub(crate) fn limit() -> Option<u64> {
    getrlimit(Resource::As).current
}

/// Address space that a process may need at its memory limit to report why it ends. For the stack of a panic the
/// program's file is mapped and its line tables are unpacked; without room for that the standard library hangs.
pub(crate) fn spare() -> u64 {
    let program = std::fs::metadata("/proc/self/exe").map_or(0, |program| program.len());
    program.saturating_mul(4).saturating_add(64 << 20)
}

/// Whether reports of panics use the spare address space now, and the soft limit to which this process goes back.
static SPARE: Mutex<SpareUse> = Mutex::new(SpareUse { reports: 0, soft: None });

/// The soft limit is raised.
static IS_RAISED: AtomicBool = AtomicBool::new(false);

struct SpareUse {
    reports: usize,
    soft: Option<u64>,
}

/// While it lives, the spare address space is not taken away.
pub(crate) struct UsesSpare(());

impl Drop for UsesSpare {
    fn drop(&mut self) {
        lock(&SPARE).reports -= 1;
    }
}

/// Lets this process use its [`spare`] address space, up to the hard limit: a panic is about to be reported.
pub(crate) fn use_spare() -> UsesSpare {
    let mut spare = lock(&SPARE);
    spare.reports += 1;
    let Rlimit { current, maximum } = getrlimit(Resource::As);
    // Where it is refused there is no more than there was.
    let whole = Rlimit { current: maximum, maximum };
    if current.is_some() && current != maximum && rlimit::set(Resource::As, whole).is_ok() {
        spare.soft = current;
        IS_RAISED.store(true, Relaxed);
    }
    UsesSpare(())
}

/// Sets the limit back after [`use_spare`], unless a panic of another thread is being reported.
#[inline]
pub(crate) fn return_spare() {
    if IS_RAISED.load(Relaxed) {
        take_spare_away();
    }
}

#[cold]
fn take_spare_away() {
    let mut spare = lock(&SPARE);
    if spare.reports > 0 {
        return;
    }
    IS_RAISED.store(false, Relaxed);
    let Rlimit { current, maximum } = getrlimit(Resource::As);
    // Another limit is one that the program has set meanwhile.
    if let Some(soft) = spare.soft.take().filter(|_| current == maximum) {
        let _ = rlimit::set(Resource::As, Rlimit { current: Some(soft), maximum });
    }
}

/// Returns `true` if there is room for the stack of a panic. Always true without a limit.
pub(crate) fn has_spare() -> bool {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
    let (None, None) = (limit(), getrlimit(Resource::Data).current) else {
        let (len, flags) = (spare() as usize, ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing; nobody else knows it when it goes.
        return refuse::at("mmap").is_ok_and(|()| unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, flags, MapFlags::PRIVATE)
                .is_ok_and(|map| munmap(map, len).is_ok())
        });
    };
    true
}

/// Returns how many processes of this control group the kernel has killed for want of memory; `None` if that is not known.
pub(crate) fn oom_kills() -> Option<u64> {
    let groups = read_to_string("/proc/self/cgroup").ok()?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let events = read_to_string(format!("/sys/fs/cgroup{}/memory.events", group.trim_end_matches('/'))).ok()?;
    events.lines().find_map(|line| line.strip_prefix("oom_kill "))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_pages_are_discarded_and_their_neighbours_stay() {
        let mut block = vec![1u8; 1 << 20];
        discard(&mut block[1..(1 << 20) - 1]);
        assert_eq!((block[0], block[(1 << 20) - 1], block[1 << 19]), (1, 1, 0));
        block[1 << 19] = 2;
        discard(&mut block[1 << 19..(1 << 19) + 10]);
        discard(&mut []);
        assert_eq!(block[1 << 19], 2);
    }

    #[test]
    fn a_process_knows_how_large_it_is() {
        let block = std::hint::black_box(vec![1u8; 32 << 20]);
        let (now, peak) = resident();
        assert!(now >= block.len() as u64 && peak >= now, "{now} {peak}");
    }
}
