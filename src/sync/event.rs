//! An event: a flag that processes set and wait for.
//!
//! # State
//! [`FLAG`]: `times set:63 | is set:1`. The list of sleeping processes.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | (n, unset) -> (n + 1, set) | `set` | AcqRel CAS | all |
//! | (n, set) -> (n, unset) | `clear` | AcqRel CAS | - |
//!
//! # Invariants
//! 1. A waiter is done when the flag is set, or was set since it began to wait: a `clear` right after a `set` keeps no waiter
//!    from continuing.
//! 2. Waiters are in no queue: one that is not polled delays no other.
//!
//! # Death
//! | killed | survivors see |
//! |---|---|
//! | after `set`, before the wake | the flag set; its recovery makes all sleepers try |
//! | waiting, or with its notification | see `wait::sleepers`: `set` is a store and passes over the dead |
//!
//! # Cancel
//! A dropped wait has changed nothing.

use super::object::{self, Core, FIRST, Report};
use crate::error::{Error, ErrorKind, Result};
use crate::os::{fault, fork, timer};
use crate::shm::atomic::AtomicU64;
use crate::shm::family::Family;
use crate::shm::mapped::Mapped;
use crate::shm::region::Region;
use crate::wait::{self, WaitQueue, Waiters, sleepers};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;
use std::time::{Duration, Instant};

const FLAG: usize = FIRST;
const LINE: usize = FLAG + 1;

const SET: u64 = 1;

/// The word, wherever it is.
#[derive(Clone, Copy)]
struct Word<'a>(&'a AtomicU64);

impl Word<'_> {
    /// The caller notifies all waiters afterwards, also if it was set: the process that set it may have died before it did.
    fn set(self) {
        let set = |seen: u64| (seen & SET == 0).then(|| seen.wrapping_add(2) | SET);
        let _ = self.0.fetch_update(AcqRel, Acquire, set);
        fault::point("event.set");
    }

    fn clear(self) {
        self.0.fetch_and(!SET, AcqRel);
    }

    fn is_set(self) -> bool {
        self.0.load(Acquire) & SET != 0
    }

    /// The count that a waiter that begins now passes to [`Word::is_over`].
    fn since(self) -> u64 {
        self.0.load(Acquire) >> 1
    }

    /// Returns `true` if a waiter that began then is done.
    fn is_over(self, since: u64) -> bool {
        let now = self.0.load(Acquire);
        now & SET != 0 || now >> 1 != since
    }
}

/// An event as this process sees it.
pub(super) struct EventCore {
    region: Arc<Region>,
    waiters: Waiters,
    family: &'static Family,
}

static MAPPED: Mapped<EventCore> = Mapped::new();

impl Core for EventCore {
    const KIND: u64 = u64::from_le_bytes(*b"mpevnt01");
    const NAME: &'static str = "event";
    const WORDS: usize = LINE + sleepers::LEN;

    fn mapped() -> &'static Mapped<Self> {
        &MAPPED
    }

    fn region(&self) -> &Arc<Region> {
        &self.region
    }

    fn report(words: &[AtomicU64]) -> Report {
        Report { waiting: sleepers::Sleepers::new(&words[LINE..LINE + sleepers::LEN]).list(), ..Report::default() }
    }

    fn view(region: Arc<Region>) -> io::Result<Self> {
        let line = WaitQueue::new(region.clone(), LINE, None)?;
        Ok(Self { region, waiters: Waiters::new(line), family: Family::get()? })
    }
}

impl EventCore {
    fn word(&self) -> Word<'_> {
        Word(&self.region.words()[FLAG])
    }

    #[track_caller]
    fn set(&self) {
        fork::refuse("set an event");
        // A process that sets needs a slot, so that its death is noticed. If no slot is left it continues all the same.
        let _ = self.family.me();
        self.word().set();
        self.waiters.notify_all();
    }

    /// The attempt of a waiter that begins now.
    fn attempt(&self) -> impl FnMut() -> Option<()> + '_ {
        let since = self.word().since();
        move || self.word().is_over(since).then_some(())
    }

    #[track_caller]
    fn block(&self, timeout: Option<Duration>) -> Result<()> {
        wait::refuse_inside_async();
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.waiters.until_blocking(deadline, self.attempt()).map_err(failed)?.ok_or_else(timed_out)
    }
}

fn failed(error: io::Error) -> Error {
    Error::io("cannot wait for an event", error)
}

fn timed_out() -> Error {
    Error::new(ErrorKind::Timeout, "the event was not set in time")
}

/// A flag that processes set, clear and wait for.
///
/// Use instead:
/// - [`Condition`](crate::Condition) to wait for more than a flag;
/// - [`watch`](crate::watch()) for a value that changes;
/// - [`CancellationToken`](crate::CancellationToken) to stop work.
///
/// Use it to announce something once to any number of waiters: that a service is ready, or that all should stop.
///
/// ```
/// use multiprocess::{self as mp, Event, Process};
///
/// async fn starter(ready: Event) {
///     ready.set();
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let ready = Event::new()?;
///         let child = Process::spawn(starter, (ready.clone(),))?;
///         ready.wait().await?;
///         child.await
///     })
/// }
/// ```
///
/// # Handles
/// A handle is cheap to clone and is a serde value. It can be an argument, a result, or part of a value in a queue or a
/// pipe. The event exists as long as any process or message has a handle.
///
/// # Details
/// - **Waiting.** [`wait`](Event::wait) returns once the flag is set. All tasks that wait when it is set continue, even if it
///   is cleared at once. Dropping a future that waits changes nothing. [`set`](Event::set), [`clear`](Event::clear) and
///   [`is_set`](Event::is_set) never wait.
/// - **Death.** A process killed while it waits or sets harms no other.
/// - **Cost.** Without waiting a few atomic operations. `set` makes a system call only to wake a process. An event is one
///   descriptor and 4 KiB.
#[derive(Clone)]
pub struct Event {
    core: Arc<EventCore>,
}

impl Event {
    /// Creates an event that is not set.
    ///
    /// # Errors
    /// `Io` if no memory or descriptor is left.
    pub fn new() -> Result<Self> {
        Ok(Self { core: object::create(|_| ())? })
    }

    /// Sets the flag and wakes all waiters. Setting it again has no further effect.
    ///
    /// # Panics
    /// In a process that was forked from one that had used the crate.
    pub fn set(&self) {
        self.core.set();
    }

    /// Clears the flag. Tasks that waited when it was set continue all the same.
    ///
    /// ```
    /// # multiprocess::init();
    /// let event = multiprocess::Event::new()?;
    /// event.set();
    /// assert!(event.is_set());
    /// event.clear();
    /// assert!(!event.is_set());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// As [`set`](Self::set).
    pub fn clear(&self) {
        fork::refuse("clear an event");
        self.core.word().clear();
    }

    /// Returns `true` if the flag is set.
    pub fn is_set(&self) -> bool {
        self.core.word().is_set()
    }

    /// Waits until the flag is set.
    ///
    /// Cancel safe: dropping the future changes nothing.
    ///
    /// # Errors
    /// `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs, such as a
    /// descriptor. With a timeout also if the runtime has no timer.
    pub async fn wait(&self) -> Result<()> {
        self.core.waiters.until(self.core.attempt()).await.map_err(failed)
    }

    /// Waits until the flag is set, for at most `timeout`.
    ///
    /// Cancel safe: dropping the future changes nothing. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// # Errors
    /// `Timeout` if the flag was not set in time. Otherwise as [`wait`](Self::wait).
    pub async fn wait_timeout(&self, timeout: Duration) -> Result<()> {
        timer::limited(timeout, self.wait()).map_err(failed)?.await.unwrap_or_else(|_| Err(timed_out()))
    }

    /// Returns at once if the flag is set, and fails if it is not.
    ///
    /// ```
    /// # multiprocess::init();
    /// use multiprocess::{ErrorKind, Event};
    /// let event = Event::new()?;
    /// assert_eq!(event.try_wait().unwrap_err().kind(), ErrorKind::WouldBlock);
    /// event.set();
    /// event.try_wait()?;
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `WouldBlock` if the flag is not set.
    pub fn try_wait(&self) -> Result<()> {
        let unset = || Error::new(ErrorKind::WouldBlock, "the event is not set");
        if self.is_set() { Ok(()) } else { Err(unset()) }
    }

    /// Blocks this thread until the flag is set.
    ///
    /// ```
    /// # multiprocess::init();
    /// let event = multiprocess::Event::new()?;
    /// event.set();
    /// event.blocking_wait()?;
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    #[track_caller]
    pub fn blocking_wait(&self) -> Result<()> {
        self.core.block(None)
    }

    /// Blocks this thread until the flag is set, for at most `timeout`.
    ///
    /// ```
    /// # multiprocess::init();
    /// use multiprocess::{self as mp, ErrorKind};
    /// use std::time::Duration;
    /// let event = mp::Event::new()?;
    /// let error = event.blocking_wait_timeout(Duration::from_millis(1)).unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Timeout);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`wait_timeout`](Self::wait_timeout).
    #[track_caller]
    pub fn blocking_wait_timeout(&self, timeout: Duration) -> Result<()> {
        self.core.block(Some(timeout))
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event").field("is_set", &self.is_set()).finish_non_exhaustive()
    }
}

object::travels!(Event, core);

#[cfg(all(test, multiprocess_loom))]
mod models {
    use super::*;
    use crate::shm::region::{explore, play};
    use crate::sync::holders_models::{Doorbells, Part, look, wait, zeros};
    use loom::thread;

    struct World {
        flag: AtomicU64,
        line: Vec<AtomicU64>,
        doorbells: Doorbells,
    }

    /// Two have begun to wait; then it is set, and cleared at once. The living continue, whichever process dies.
    fn flag(what: &str, preemptions: usize, setter: Option<&'static str>, waiter: Option<&'static str>) {
        explore(what, preemptions, move || {
            let world =
                Arc::new(World { flag: AtomicU64::new(0), line: zeros(sleepers::LEN), doorbells: Doorbells::new() });
            let since = Word(&world.flag).since();
            let attempt = move |world: &World| Word(&world.flag).is_over(since).then_some(());
            let waits = move |world: &World, me| {
                let line = sleepers::Sleepers::new(&world.line);
                let part = wait(&world.doorbells, me, line, &|| attempt(world));
                look(&world.doorbells, me, line, &|| attempt(world), part)
            };
            let asleep = play(1, None, || waits(&world, 1)).expect("it lives");
            let waiting = {
                let world = world.clone();
                thread::spawn(move || {
                    let part = play(0, waiter, || waits(&world, 0));
                    if part.is_none() {
                        world.doorbells.recover();
                    }
                    part
                })
            };
            let set = play(2, setter, || {
                Word(&world.flag).set();
                world.doorbells.notify(2, sleepers::Sleepers::new(&world.line), true);
                Word(&world.flag).clear();
            });
            if set.is_none() {
                world.doorbells.recover();
            }
            let parts = waiting.join().unwrap().map(|part| (0, part)).into_iter().chain([(1, asleep)]);
            for (me, part) in parts {
                let line = sleepers::Sleepers::new(&world.line);
                let part = play(me, None, || look(&world.doorbells, me, line, &|| attempt(&world), part));
                assert!(matches!(part, Some(Part::Got(()))), "{me} sleeps on");
            }
            assert_eq!(Word(&world.flag).is_set(), set.is_none());
        });
    }

    #[test]
    fn models_waiters_of_an_event_proceed_when_it_is_set() {
        flag("an event", 2, None, None);
        for at in ["event.set", "notify.marked"] {
            flag(&format!("an event, {at}"), 2, Some(at), None);
        }
        for at in ["sleep.entered", "sleep.noticed", "sleep.unmarked"] {
            flag(&format!("an event, {at}"), 2, None, Some(at));
        }
    }
}
