//! [proc(5)](https://man7.org/linux/man-pages/man5/proc.5.html): the open files of other processes, and their names.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::fs::MetadataExt;
use std::path::PathBuf;

/// A memfd that some process has open.
pub(crate) struct Memfd {
    path: PathBuf,
    pub(crate) name: String,
    /// Equal for all descriptors of one memfd.
    pub(crate) identity: (u64, u64),
}

impl Memfd {
    /// Opens it here too.
    pub(crate) fn open(&self) -> io::Result<OwnedFd> {
        Ok(File::options().read(true).write(true).open(&self.path)?.into())
    }
}

/// The memfds of a process whose names begin with `prefix`; none if it is gone or may not be inspected.
pub(crate) fn memfds(pid: u32, prefix: &str) -> Vec<Memfd> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let of_entry = |path: PathBuf| {
        let target = fs::read_link(&path).ok()?;
        let name = target.to_str()?.strip_prefix("/memfd:")?.trim_end_matches(" (deleted)").to_string();
        let metadata = name.starts_with(prefix).then(|| fs::metadata(&path).ok())??;
        Some(Memfd { path, name, identity: (metadata.st_dev(), metadata.st_ino()) })
    };
    entries.filter_map(|entry| of_entry(entry.path())).collect()
}

/// When a process started, in a unit of the kernel: distinguishes it from a later one with its pid. `None` if there is none,
/// or this one may not know.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, which may contain anything, is the second field and ends with the last parenthesis; this is the 22nd.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Returns `true` if a process has a CPU or waits for one: it is neither asleep nor stopped.
pub(crate) fn is_runnable(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('R'))
}

/// The activity of a process: the letter of its state, and how often it has had a CPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Activity {
    state: u8,
    turns: u64,
}

impl Activity {
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim_start);
        let number = |name| field(name)?.parse::<u64>().ok();
        let state = *field("State:")?.as_bytes().first()?;
        Some(Self { state, turns: number("voluntary_ctxt_switches:")? + number("nonvoluntary_ctxt_switches:")? })
    }

    /// A signal, or a debugger, has stopped it.
    pub(crate) fn is_stopped(self) -> bool {
        matches!(self.state, b'T' | b't')
    }

    /// It has not had a CPU since, and wants none.
    pub(crate) fn is_idle_since(self, earlier: Self) -> bool {
        self == earlier && self.state != b'R'
    }
}

/// The name of a process in `ps`: at most 15 bytes.
pub(crate) fn name(pid: u32) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim_end().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_a_start_time_and_none_once_it_is_gone() {
        let me = std::process::id();
        assert!(start_time(me).unwrap() > 0);
        assert_eq!(start_time(me), start_time(me));
        assert_eq!(start_time(1 << 30), None);
    }
}
