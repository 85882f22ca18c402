//! Who holds what, and who waits for it: for finding deadlocks.

use super::barrier::BarrierCore;
use super::condition::ConditionCore;
use super::event::EventCore;
use super::lock::LockCore;
use super::object::{Core, KIND, MEMFD, Report};
use super::rlock::RLockCore;
use super::rwlock::RwLockCore;
use super::semaphore::SemaphoreCore;
use super::value::ValueCore;
use crate::os::{clock, proc};
use crate::shm::atomic::AtomicU64;
use crate::shm::family::{Family, Member};
use crate::shm::region::Region;
use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::Ordering::*;
use std::time::Duration;

/// What [`dump`] knows of an object.
struct Kind {
    name: &'static str,
    number: u64,
    words: usize,
    report: fn(&[AtomicU64]) -> Report,
}

const fn kind<C: Core>() -> Kind {
    Kind { name: C::NAME, number: C::KIND, words: C::WORDS, report: C::report }
}

const KINDS: &[Kind] = &[
    kind::<LockCore>(),
    kind::<RLockCore>(),
    kind::<ConditionCore>(),
    kind::<ValueCore>(),
    #[cfg(not(multiprocess_loom))]
    kind::<super::array::ArrayCore>(),
    kind::<SemaphoreCore>(),
    kind::<RwLockCore>(),
    kind::<EventCore>(),
    kind::<BarrierCore>(),
];

/// A process, as far as it can be told.
///
/// ```
/// # multiprocess::init();
/// let lock = multiprocess::Lock::new()?;
/// let _guard = lock.try_acquire()?;
/// let dump = multiprocess::debug::dump();
/// let holder = dump.objects()[0].holder().expect("us");
/// assert_eq!(holder.pid(), Some(std::process::id()));
/// # Ok::<(), multiprocess::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Participant {
    pid: Option<u32>,
    name: String,
}

impl Participant {
    fn of(pid: Option<u32>) -> Self {
        let name = pid.and_then(proc::name).unwrap_or_else(|| "a process that has ended".to_string());
        Self { pid, name }
    }

    /// Its process id; `None` if it has ended.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// What the kernel calls it: the first 15 bytes of the name that it was started with, at the root the program's.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for Participant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "{} (pid {pid})", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// A shared object that somebody holds or waits for.
///
/// ```
/// # multiprocess::init();
/// let lock = multiprocess::Lock::new()?;
/// let _guard = lock.try_acquire()?;
/// for object in multiprocess::debug::dump().objects() {
///     println!("{object}"); // lock 0:1234: held by five (pid 77) for 2ms; nobody waits
///     assert_eq!(object.kind(), "lock");
///     assert!(object.waiting().is_empty());
/// }
/// # Ok::<(), multiprocess::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Object {
    kind: &'static str,
    identity: (u64, u64),
    holder: Option<Participant>,
    held_for: Option<Duration>,
    shares: Vec<(Participant, u32)>,
    waiting: Vec<Participant>,
}

impl Object {
    /// What it is: `lock`, `rlock`, `condition`, ..
    pub fn kind(&self) -> &str {
        self.kind
    }

    /// Who holds it, where an object has one holder: of a read-write lock, the writer.
    pub fn holder(&self) -> Option<&Participant> {
        self.holder.as_ref()
    }

    /// For how long, to a tick of the kernel's clock (1 to 10 ms); not known of a writer.
    pub fn held_for(&self) -> Option<Duration> {
        self.held_for
    }

    /// Who holds how much of it, where many can: permits of a semaphore, read guards of a read-write lock.
    ///
    /// ```
    /// # multiprocess::init();
    /// let semaphore = multiprocess::Semaphore::new(3)?;
    /// let _permits = (semaphore.try_acquire()?, semaphore.try_acquire()?);
    /// let dump = multiprocess::debug::dump();
    /// let (who, permits) = &dump.objects()[0].shares()[0];
    /// assert_eq!((who.pid(), *permits), (Some(std::process::id()), 2));
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn shares(&self) -> &[(Participant, u32)] {
        &self.shares
    }

    /// The processes that wait for it, one for all its tasks. Those that look again before they sleep, for
    /// microseconds, are not listed.
    pub fn waiting(&self) -> &[Participant] {
        &self.waiting
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}:{}: ", self.kind, self.identity.0, self.identity.1)?;
        match (&self.holder, self.held_for) {
            (Some(holder), Some(time)) => write!(f, "held by {holder} for {time:?}")?,
            (Some(holder), None) => write!(f, "held by {holder}, writing")?,
            _ if !self.shares.is_empty() => {
                let shares: Vec<_> = self.shares.iter().map(|(who, held)| format!("{held} by {who}")).collect();
                write!(f, "held: {}", shares.join(", "))?;
            }
            _ => f.write_str("held by nobody")?,
        }
        match &self.waiting[..] {
            [] => f.write_str("; nobody waits"),
            waiting => {
                let names: Vec<_> = waiting.iter().map(Participant::to_string).collect();
                write!(f, "; waiting: {}", names.join(", "))
            }
        }
    }
}

/// What [`dump`] found; its `Display` is a line for each object.
///
/// ```
/// # multiprocess::init();
/// let lock = multiprocess::Lock::new()?;
/// let guard = lock.try_acquire()?;
/// assert_eq!(multiprocess::debug::dump().objects().len(), 1);
/// drop(guard);
/// assert_eq!(multiprocess::debug::dump().to_string(), "");
/// # Ok::<(), multiprocess::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Dump {
    objects: Vec<Object>,
}

impl Dump {
    /// The objects that have a holder or somebody who waits.
    pub fn objects(&self) -> &[Object] {
        &self.objects
    }
}

impl fmt::Display for Dump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.objects.iter().try_for_each(|object| writeln!(f, "{object}"))
    }
}

/// Each lock of this program's processes that somebody holds or waits for: what it is, who holds it and for how long
/// or how much of it, and who waits. For finding deadlocks: it may be called anywhere, stops nobody, takes nothing, and waits for nothing.
///
/// It looks through the descriptors of all processes of the family in /proc, so it takes about as long as `lsof`; what
/// it says of objects that are in use meanwhile is out of date when it is read.
///
/// ```
/// use multiprocess::{self as mp, Lock};
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let lock = Lock::new()?;
///         let _guard = lock.acquire().await?;
///         print!("{}", mp::debug::dump());
///         Ok(())
///     })
/// }
/// ```
pub fn dump() -> Dump {
    let Ok(family) = Family::get() else { return Dump::default() };
    let (mut seen, mut objects) = (HashSet::new(), Vec::new());
    for memfd in family.pids().into_iter().flat_map(|pid| proc::memfds(pid, MEMFD)) {
        let kind = KINDS.iter().find(|kind| memfd.name.strip_prefix(MEMFD) == Some(kind.name));
        if let Some(kind) = kind.filter(|_| seen.insert(memfd.identity)) {
            objects.extend(look(family, kind, &memfd));
        }
    }
    objects.sort_by_key(|object| object.identity);
    Dump { objects }
}

/// `None` if nobody is at it, or it is gone by now.
fn look(family: &Family, kind: &Kind, memfd: &proc::Memfd) -> Option<Object> {
    let region = Region::open(memfd.open().ok()?, kind.words * size_of::<u64>()).ok()?;
    let words = region.words();
    if words[KIND].load(Acquire) != kind.number {
        return None;
    }
    let report = (kind.report)(words);
    let pid = |slot| family.pid_of(slot);
    let who = |member: Member| {
        Participant::of(pid(member.slot).filter(|(_, epoch)| *epoch == member.epoch).map(|(pid, _)| pid))
    };
    let holder = report.holder.map(|(member, _)| member).or(report.writer).map(who);
    let shares: Vec<_> = report.shares.iter().map(|(member, held)| (who(*member), *held)).collect();
    let held_for = report.holder.map(|(_, since)| Duration::from_nanos(clock::coarse_ns().saturating_sub(since)));
    let alive = report.waiting.iter().filter_map(|sleeper| {
        pid(sleeper.slot).filter(|(_, epoch)| sleeper.has_epoch(*epoch)).map(|(pid, _)| Participant::of(Some(pid)))
    });
    let (identity, waiting) = (memfd.identity, alive.collect());
    let object = Object { kind: kind.name, identity, holder, held_for, shares, waiting };
    let is_used = object.holder.is_some() || !object.shares.is_empty() || !object.waiting.is_empty();
    is_used.then_some(object)
}
