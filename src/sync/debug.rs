//! Lists the holders and the waiters of all locks of a program, to find deadlocks.

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

/// A kind of object, as [`dump`] reads it.
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

/// A process that holds an object or waits for it.
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

    /// Returns the process id, or `None` if the process has ended.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// Returns the name of the process as the kernel shows it.
    ///
    /// It is the first 15 bytes of the name that the process was started with; for the root process, of the program.
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

/// A shared object that has a holder or a waiter.
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
    /// Returns the kind of object: `lock`, `rlock`, `condition` and so on.
    pub fn kind(&self) -> &str {
        self.kind
    }

    /// Returns the holder, for objects that have one holder at a time; of a read-write lock, the writer.
    pub fn holder(&self) -> Option<&Participant> {
        self.holder.as_ref()
    }

    /// Returns how long it has been held, to a tick of the kernel's clock (1 to 10 ms). `None` for a writer.
    ///
    /// ```
    /// # multiprocess::init();
    /// let lock = multiprocess::Lock::new()?;
    /// let _guard = lock.try_acquire()?;
    /// std::thread::sleep(std::time::Duration::from_millis(100));
    /// let dump = multiprocess::debug::dump();
    /// assert!(dump.objects()[0].held_for().unwrap().as_millis() >= 50);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn held_for(&self) -> Option<Duration> {
        self.held_for
    }

    /// Returns the holders of a semaphore or the readers of a read-write lock, with the number of permits or guards of each.
    ///
    /// ```
    /// # multiprocess::init();
    /// let semaphore = multiprocess::Semaphore::new(3)?;
    /// let _permits = (semaphore.try_acquire()?, semaphore.try_acquire()?);
    /// let dump = multiprocess::debug::dump();
    /// let (holder, permits) = &dump.objects()[0].shares()[0];
    /// assert_eq!((holder.pid(), *permits), (Some(std::process::id()), 2));
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn shares(&self) -> &[(Participant, u32)] {
        &self.shares
    }

    /// Returns the processes that wait for it.
    ///
    /// A process is listed once for all its tasks. A process that still spins before it sleeps, for microseconds, is not
    /// listed.
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

/// The result of [`dump`]. Its `Display` is one line for each object.
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
    /// Returns the objects that have a holder or a waiter.
    pub fn objects(&self) -> &[Object] {
        &self.objects
    }
}

impl fmt::Display for Dump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.objects.iter().try_for_each(|object| writeln!(f, "{object}"))
    }
}

/// Lists all shared objects of this program that a process holds or waits for, to find deadlocks.
///
/// For each object it shows the holders and the waiters. It waits for no lock and takes none, so it works while
/// everything else is blocked. It blocks the thread while it reads /proc. Do not call it in a signal handler: it
/// allocates.
///
/// It reads the descriptors of all processes of the program in /proc, so it takes about as long as `lsof`. Objects that
/// change meanwhile are shown as they were.
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
            objects.extend(inspect(family, kind, &memfd));
        }
    }
    objects.sort_by_key(|object| object.identity);
    Dump { objects }
}

/// Reads one object; `None` if it has neither holder nor waiter, or is gone by now.
fn inspect(family: &Family, kind: &Kind, memfd: &proc::Memfd) -> Option<Object> {
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
