//! The public types of leases: an item that outlives its consumer. The shared state is that of [`leases`](super::leases).
//!
//! # Death
//! | killed | what follows | test (`tests/pieces.rs`, `leases`) |
//! |---|---|---|
//! | taking, holding, committing or giving back | the item is there once, or its commit was complete | `killed_at_any_move_no_item_is_lost_or_doubled`, `killed_at_any_move_no_descriptor_is_lost_or_kept_open` |
//! | giving an item back for the last time | it is a dead letter, and those that wait for one or for a join are woken | `killed_while_an_item_becomes_a_dead_letter_its_waiters_are_woken` |
//! | taking a dead letter | it is there, or was taken; its descriptors as well | `killed_while_it_takes_a_dead_letter_it_is_there_or_taken` |
//!
//! # Cancel
//! | dropped | what follows | test |
//! |---|---|---|
//! | a `lease` that waits, a [`Lease`], a stream of them | the item is at the front again | `ten_thousand_dropped_leases_lose_nothing` |
//! | a wait for a dead letter | nothing was taken | `ten_thousand_dropped_waits_for_dead_letters_lose_none` |

use super::channel_core::ChannelCore;
use super::leases::Held;
use crate::error::{Error, ErrorKind, Result};
use crate::os::fork;
use crate::os::timer;
use futures_util::{Stream, StreamExt};
use serde::de::DeserializeOwned;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

/// An item of a queue on lease: it leaves the queue when the lease is [committed](Self::commit).
///
/// If the lease is dropped without a commit, or its process ends in any way, the item is the first of the queue again. So no item
/// is lost with its consumer, but an item may be processed more than once: [`deliveries`](Self::deliveries) returns how often it
/// was delivered. [`Queue::max_deliveries`](crate::Queue::max_deliveries) sets a limit. An item that reaches it goes to
/// [`Queue::dead_letters`](crate::Queue::dead_letters).
///
/// Use [`Queue::get`](crate::Queue::get) instead if an item may be lost with its consumer: it costs less.
///
/// ```
/// use multiprocess::{self as mp, Process, Queue};
///
/// async fn work(jobs: Queue<u32>, done: Queue<u32>) -> mp::Result<()> {
///     while let Ok(job) = jobs.lease().await {
///         if job.deliveries() == 1 && *job == 2 {
///             std::process::abort(); // A bug, or the kernel was short of memory.
///         }
///         done.put(10 * *job).await?;
///         job.commit()?;
///     }
///     Ok(())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let (jobs, done) = (Queue::unbounded()?, Queue::unbounded()?);
///         for job in [1, 2, 3] {
///             jobs.put(job).await?;
///         }
///         jobs.close();
///         let first = Process::spawn(work, (jobs.clone(), done.clone()))?;
///         assert_eq!(first.await.unwrap_err().kind(), mp::ErrorKind::ProcessDied);
///         Process::spawn(work, (jobs.clone(), done.clone()))?.await??;
///         done.close();
///         let mut results = Vec::new();
///         while let Ok(result) = done.get().await {
///             results.push(result);
///         }
///         assert_eq!(results, [10, 20, 30]);
///         Ok(())
///     })
/// }
/// ```
///
/// # Details
/// - **Counting.** Until the commit the item counts as not done: for `len`; for a closed queue, which is at its end only when
///   no item is on lease; and for [`JoinableQueue::join`](crate::JoinableQueue::join). A commit counts as `task_done`.
///   The item takes no room in a bounded queue.
/// - **Order.** Items that came back come before all others, the oldest first, also for `get`.
/// - **Limits.** At most 1024 items of a queue can be on lease or dead letters at one time; beyond that a lease fails with
///   `Full`. Descriptors of some 250 leased items are kept; an item beyond those that comes back fails with `Decode`.
/// - **Cost.** One more copy of the item into shared memory, by a system call. While a process has leases, each `get` of the queue
///   also reads the table of leases. The first lease of a queue takes 96 KiB.
/// - **Exec.** A process that replaces its program (exec) is the same process and keeps its leases until it ends.
#[must_use = "dropped at once, the item goes back to the queue at once"]
pub struct Lease<T> {
    core: Arc<ChannelCore>,
    held: Option<Held>,
    value: Option<T>,
}

impl<T> Lease<T> {
    pub(super) fn of(core: &Arc<ChannelCore>, (held, value): (Held, T)) -> Self {
        Self { core: core.clone(), held: Some(held), value: Some(value) }
    }

    /// Takes the item out of the queue for good, and returns it.
    ///
    /// Blocks for up to 100 ms if the item is large or has descriptors and another process is taking from the queue. If this
    /// process is killed meanwhile, the item is either committed or back in the queue.
    ///
    /// # Errors
    /// - `Forked` in a process that was forked from the one that has the lease.
    /// - `Corrupt` if other code has damaged the queue's memory. The item may be in the queue still.
    pub fn commit(mut self) -> Result<T> {
        fork::check().map_err(|error| Error::io("cannot commit a lease", error))?;
        if let Some(held) = self.held.take() {
            self.core.commit(&held)?;
        }
        match self.value.take() {
            Some(value) => Ok(value),
            None => unreachable!("a lease has its item until it is committed"),
        }
    }

    /// Returns how often the item was delivered, this time included: 1 for the first time.
    pub fn deliveries(&self) -> u32 {
        self.held.as_ref().map_or(0, |held| held.deliveries)
    }
}

impl<T> Deref for Lease<T> {
    type Target = T;

    fn deref(&self) -> &T {
        match &self.value {
            Some(value) => value,
            None => unreachable!("a lease has its item until it is committed"),
        }
    }
}

impl<T> Drop for Lease<T> {
    fn drop(&mut self) {
        if let Some(held) = self.held.take()
            && !fork::is_forked()
        {
            self.core.give_back(&held);
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for Lease<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("item", &self.value).field("deliveries", &self.deliveries()).finish()
    }
}

/// Returns the leases of a queue as a stream; see [`Queue::leases`](crate::Queue::leases).
pub(super) fn leases<T: DeserializeOwned + Send + 'static>(
    core: Arc<ChannelCore>,
) -> impl Stream<Item = Result<Lease<T>>> + Send + Unpin {
    let leases = futures_util::stream::unfold(Some(core), |core| async {
        let core = core?;
        match core.lease().await {
            Err(error) if error.kind() == ErrorKind::Closed => None,
            // Nothing follows these either, or not at once.
            Err(error)
                if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Forked | ErrorKind::Full | ErrorKind::Io) =>
            {
                Some((Err(error), None))
            }
            Err(error) => Some((Err(error), Some(core))),
            Ok(leased) => Some((Ok(Lease::of(&core, leased)), Some(core))),
        }
    });
    Box::pin(leases.fuse())
}

/// The items of a queue that were leased too often without a commit; made by [`Queue::dead_letters`](crate::Queue::dead_letters).
///
/// ```
/// use multiprocess::{self as mp, Queue};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let queue = Queue::unbounded()?;
/// queue.max_deliveries(2);
/// queue.put("poison".to_string()).await?;
/// for _ in 0..2 {
///     drop(queue.lease().await?);
/// }
/// assert!(queue.try_lease().is_err());
/// assert_eq!(queue.dead_letters().get().await?, "poison");
/// # Ok(()) }) }
/// ```
pub struct DeadLetters<T> {
    core: Arc<ChannelCore>,
    item: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned + Send + 'static> DeadLetters<T> {
    pub(super) fn of(core: &Arc<ChannelCore>) -> Self {
        Self { core: core.clone(), item: PhantomData }
    }

    /// Takes the oldest dead letter, and waits while there is none. It waits in a closed queue, too.
    ///
    /// Cancel safe: a dropped future has taken nothing.
    ///
    /// # Errors
    /// - `Decode` if the item cannot be read as `T`, or its descriptors were not kept. The item is lost.
    /// - `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs.
    pub async fn get(&self) -> Result<T> {
        self.core.dead_letter().await
    }

    /// Takes the oldest dead letter if there is one now.
    ///
    /// # Errors
    /// `Empty` if there is none. Otherwise as [`get`](Self::get).
    pub fn try_get(&self) -> Result<T> {
        self.core.try_dead_letter()
    }

    /// Takes the oldest dead letter, and waits at most `timeout` for one.
    ///
    /// Cancel safe: a dropped future has taken nothing, and so has a call that timed out. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// # Errors
    /// - `Timeout` if there was none in time.
    /// - `Io` if the runtime has no timer.
    /// - Otherwise as [`get`](Self::get).
    pub async fn get_timeout(&self, timeout: Duration) -> Result<T> {
        let failed = |error| Error::io("cannot wait for a dead letter", error);
        let limited = timer::limited(timeout, self.get()).map_err(failed)?;
        let late = || Err(Error::new(ErrorKind::Timeout, "there was no dead letter in time"));
        limited.await.unwrap_or_else(|_| late())
    }

    /// Returns the number of dead letters.
    pub fn len(&self) -> usize {
        self.core.dead_letters_len()
    }

    /// Returns `true` if there is no dead letter.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> fmt::Debug for DeadLetters<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetters").field("len", &self.core.dead_letters_len()).finish()
    }
}
