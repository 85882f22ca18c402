//! The attributes that a process passes on to its children, besides its rights: the file mode creation mask
//! ([umask(2)](https://man7.org/linux/man-pages/man2/umask.2.html)), the nice value, the CPUs and the limits
//! ([setrlimit(2)](https://man7.org/linux/man-pages/man2/setrlimit.2.html)).

use super::{refuse, rlimit};
use crate::error::Explained;
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getpid, getpriority_process, getrlimit, setpriority_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};
use std::io;

/// Those of a process, or only some of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attributes {
    pub(crate) umask: Option<u32>,
    pub(crate) nice: Option<i32>,
    pub(crate) cpus: Option<Vec<usize>>,
    limits: Vec<Limit>,
}

/// A cache that makes the next reading cheaper.
#[derive(Default)]
pub(crate) struct Kept {
    cpus: Option<(CpuSet, Vec<usize>)>,
}

impl Kept {
    fn list(&mut self, cpus: CpuSet) -> Vec<usize> {
        if self.cpus.as_ref().is_none_or(|(last, _)| *last != cpus) {
            self.cpus = Some((cpus, (0..CpuSet::MAX_CPU).filter(|cpu| cpus.is_set(*cpu)).collect()));
        }
        self.cpus.as_ref().map(|(_, list)| list.clone()).unwrap_or_default()
    }
}

/// No process can be tied to a CPU of this number or a higher one.
pub(crate) const MAX_CPU: usize = CpuSet::MAX_CPU;

/// Raises the soft limit of descriptors of this process to the hard one, where that is permitted.
pub(crate) fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = rlimit::set(Resource::Nofile, limit);
}

/// Gives this process this nice value.
pub(crate) fn set_nice(nice: i32) -> io::Result<()> {
    Ok(set_priority(nice)?)
}

fn set_priority(nice: i32) -> rustix::io::Result<()> {
    refuse::at("setpriority")?;
    setpriority_process(None, nice)
}

/// Ties this thread to one CPU, of a number less than [`MAX_CPU`].
pub(crate) fn tie_to(cpu: usize) -> io::Result<()> {
    Ok(set_affinity(&set(&[cpu]))?)
}

/// Has this thread run on these CPUs only.
pub(super) fn set_affinity(cpus: &CpuSet) -> rustix::io::Result<()> {
    refuse::at("sched_setaffinity")?;
    sched_setaffinity(None, cpus)
}

/// Limits a resource of this process, as far as its hard limit permits. That of the address space gets a higher hard limit, for
/// the text of a panic, which needs memory.
pub(crate) fn limit(resource: Resource, limit: u64) -> io::Result<()> {
    let least = |limit| getrlimit(resource).maximum.map_or(limit, |maximum| maximum.min(limit));
    let spare = if resource == Resource::As { super::memory::spare() } else { 0 };
    let limits = Rlimit { current: Some(least(limit)), maximum: Some(least(limit.saturating_add(spare))) };
    Ok(rlimit::set(resource, limits)?)
}

/// The place of a resource in [`RESOURCES`], then the soft and the hard limit.
type Limit = (usize, Option<u64>, Option<u64>);

const RESOURCES: [Resource; 16] = [
    Resource::Cpu,
    Resource::Fsize,
    Resource::Data,
    Resource::Stack,
    Resource::Core,
    Resource::Rss,
    Resource::Nproc,
    Resource::Nofile,
    Resource::Memlock,
    Resource::As,
    Resource::Locks,
    Resource::Sigpending,
    Resource::Msgqueue,
    Resource::Nice,
    Resource::Rtprio,
    Resource::Rttime,
];

impl Attributes {
    /// All of this process. Nice value and CPUs, which the kernel keeps for each thread, are those of the main thread.
    /// `kept` is kept between two calls of one process, which makes the next one cheaper. No system call reads the `umask`
    /// without changing it for a moment, for every thread: it comes with the [credentials](super::credentials).
    pub(crate) fn of_this_process(kept: &mut Kept, umask: Option<u32>) -> Self {
        let limit = |(at, resource)| {
            let Rlimit { current, maximum } = getrlimit(resource);
            (at, current, maximum)
        };
        Self {
            umask,
            nice: getpriority_process(Some(getpid())).ok(),
            cpus: sched_getaffinity(Some(getpid())).ok().map(|cpus| kept.list(cpus)),
            limits: RESOURCES.into_iter().enumerate().map(limit).collect(),
        }
    }

    /// Those that differ from `other`.
    pub(crate) fn other_than(mut self, other: &Self) -> Self {
        // Both are in the order of `RESOURCES`, as far as they are all of a process.
        match self.limits == other.limits {
            true => self.limits.clear(),
            false => self.limits.retain(|limit| !other.limits.contains(limit)),
        }
        Self {
            umask: self.umask.filter(|_| self.umask != other.umask),
            nice: self.nice.filter(|_| self.nice != other.nice),
            cpus: self.cpus.filter(|cpus| Some(cpus) != other.cpus.as_ref()),
            limits: self.limits,
        }
    }

    /// These, if there are any: nothing at all costs a child the fewest pages.
    pub(crate) fn any(self) -> Option<Self> {
        Some(self).filter(|these| *these != Self::default())
    }

    /// Limits both the soft and the hard value of a resource. That of the address space has a higher hard value, for the text
    /// of a panic.
    pub(crate) fn limit(&mut self, resource: Resource, value: u64) {
        if let Some(at) = RESOURCES.iter().position(|other| *other == resource) {
            let spare = if resource == Resource::As { super::memory::spare() } else { 0 };
            self.limits.push((at, Some(value), Some(value.saturating_add(spare))));
        }
    }

    /// Gives this process these attributes: as far as it may, where it is only to be like another one.
    pub(crate) fn take_on_what_is_permitted(&self) {
        // An attribute that may not be set stays as it is: this process may not lower a nice value that its parent could lower.
        self.steps().for_each(drop);
    }

    /// The same; an attribute that cannot be set is an error that names it.
    pub(crate) fn take_on(&self) -> io::Result<()> {
        self.steps().collect()
    }

    fn steps(&self) -> impl Iterator<Item = io::Result<()>> {
        let failed = |what: &'static str| {
            move |error: rustix::io::Errno| {
                let error = io::Error::from(error);
                Explained::after(format_args!("it cannot have its {what}"), &error)
            }
        };
        if let Some(umask) = self.umask {
            rustix::process::umask(Mode::from_raw_mode(umask));
        }
        let nice = self.nice.map(|nice| set_priority(nice).map_err(failed("nice value")));
        let cpus = self.cpus.as_deref().map(|cpus| set_affinity(&set(cpus)).map_err(failed("CPUs")));
        let limits = self.limits.iter().filter_map(move |(at, soft, hard)| {
            let resource = *RESOURCES.get(*at)?;
            Some(set_limit(resource, *soft, *hard).map_err(failed(NAMES.get(*at)?)))
        });
        nice.into_iter().chain(cpus).chain(limits)
    }
}

const NAMES: [&str; RESOURCES.len()] = [
    "limit of CPU time",
    "limit of file sizes (RLIMIT_FSIZE)",
    "limit of data (RLIMIT_DATA)",
    "limit of the stack (RLIMIT_STACK)",
    "limit of core dumps (RLIMIT_CORE)",
    "limit of resident memory (RLIMIT_RSS)",
    "limit of processes (RLIMIT_NPROC)",
    "limit of descriptors (RLIMIT_NOFILE)",
    "limit of locked memory (RLIMIT_MEMLOCK)",
    "limit of address space (RLIMIT_AS)",
    "limit of locks (RLIMIT_LOCKS)",
    "limit of pending signals (RLIMIT_SIGPENDING)",
    "limit of message queues (RLIMIT_MSGQUEUE)",
    "limit of nice values (RLIMIT_NICE)",
    "limit of real-time priority (RLIMIT_RTPRIO)",
    "limit of real-time CPU time (RLIMIT_RTTIME)",
];

/// A process that may not have the wanted hard limit gets the nearest one.
fn set_limit(resource: Resource, soft: Option<u64>, hard: Option<u64>) -> rustix::io::Result<()> {
    let least = |a: Option<u64>, b: Option<u64>| match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    rlimit::set(resource, Rlimit { current: soft, maximum: hard }).or_else(|_| {
        let now = getrlimit(resource).maximum;
        rlimit::set(resource, Rlimit { current: least(soft, now), maximum: least(hard, now) })
    })
}

fn set(cpus: &[usize]) -> CpuSet {
    let mut set = CpuSet::new();
    cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU).for_each(|cpu| set.set(*cpu));
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unchanged_attributes_are_not_passed_on() {
        let mut kept = Kept::default();
        let mine = Attributes::of_this_process(&mut kept, Some(0o22));
        assert!(mine.nice.is_some() && mine.cpus.as_ref().is_some_and(|cpus| !cpus.is_empty()));
        assert_eq!(mine.limits.len(), RESOURCES.len());
        let again = Attributes::of_this_process(&mut kept, Some(0o22));
        assert_eq!(again.other_than(&mine).any(), None);
        let mut other = mine.clone();
        other.nice = Some(19);
        other.limits[7].1 = Some(77);
        let changes = other.other_than(&mine);
        assert_eq!((changes.umask, changes.nice, &changes.cpus, changes.limits.len()), (None, Some(19), &None, 1));
    }
}
