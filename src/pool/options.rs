//! Options of one call, limits of chunks, and a call's progress.

use super::protocol::Origin;
use super::retry::Retry;
use std::time::Duration;
use tokio::sync::watch;

/// Options of each item of a call.
#[derive(Clone)]
pub(super) struct Options {
    /// From an item's start. An item that overruns is asked to stop, and killed after the grace.
    pub(super) timeout: Option<Duration>,
    /// From the submission to the start.
    pub(super) queue_timeout: Option<Duration>,
    /// How often an item that killed its worker, or was killed for its time, is tried again.
    pub(super) retries: u32,
    /// The failures that are retried.
    pub(super) retry_on: Retry,
    /// How long the first retry waits; each further one twice as long.
    pub(super) back_off: Duration,
    /// How long an item that was asked to stop may go on before its worker is killed. `None` is the pool's own.
    pub(super) grace: Option<Duration>,
    /// Items in a chunk; 0 is by measured time.
    pub(super) chunk: usize,
    /// The checkout that this is for; 0 is none.
    pub(super) checkout: u64,
    /// This is the call that takes a worker for the checkout.
    pub(super) acquires: bool,
    pub(super) progress: Option<watch::Sender<Progress>>,
    /// Each item brings the queue for its events.
    pub(super) has_events: bool,
    /// Spans and events of its items are not forwarded.
    pub(super) keeps_traces: bool,
    /// There is room for its item: it is another attempt of a call that was admitted, or its caller has reserved it.
    pub(super) is_admitted: bool,
    /// The call has many items, and not one.
    pub(super) is_many: bool,
    /// Its caller wants all results together: it need not be woken for each.
    pub(super) gathers: bool,
    /// The chunk limits of the pool.
    pub(super) limits: ChunkLimits,
    /// The index of the first item, and how often the items were tried before: for an order from elsewhere.
    pub(super) first_index: u64,
    pub(super) first_attempt: u32,
    /// The number of the call, if it has one already: attempts of one call share it.
    pub(super) number: Option<u64>,
    /// The call of an order from another host.
    pub(super) origin: Option<Origin>,
}

/// How much goes into one chunk, which becomes one order. `chunksize` of a call overrules `time` and `items`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkLimits {
    /// So much work is aimed at, by the measured time of the call's items.
    pub(crate) time: Duration,
    pub(crate) items: usize,
    /// A chunk is full once its arguments take as many bytes.
    pub(crate) bytes: usize,
}

impl ChunkLimits {
    /// The limits for processes and threads of this machine.
    pub(crate) const LOCAL: Self = Self { time: Duration::from_millis(1), items: 1024, bytes: 12 << 10 };
}

impl Default for Options {
    fn default() -> Self {
        Self {
            timeout: None,
            queue_timeout: None,
            retries: 0,
            retry_on: Retry::ALL,
            back_off: Duration::ZERO,
            grace: None,
            chunk: 0,
            checkout: 0,
            acquires: false,
            progress: None,
            has_events: false,
            keeps_traces: false,
            is_admitted: false,
            is_many: false,
            gathers: false,
            limits: ChunkLimits::LOCAL,
            first_index: 0,
            first_attempt: 0,
            number: None,
            origin: None,
        }
    }
}

/// The progress of a [`Map`](crate::Map) or a stream of [`Results`](crate::Results).
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(2)?;
/// let mut map = pool.map(|x: u64| x + 1, 0..100);
/// let mut progress = map.progress();
/// let watcher = tokio::spawn(async move {
///     while progress.changed().await.is_ok() {}
///     *progress.borrow()
/// });
/// map.await?;
/// let last = watcher.await.expect("no panic");
/// assert_eq!((last.done, last.total, last.failed), (100, 100, 0));
/// assert!(last.rate > 0.0);
/// # Ok(()) }) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Progress {
    /// Items whose results have come, errors included.
    pub done: u64,
    /// Items known so far: those taken from the source, and those that its size hint promises.
    pub total: u64,
    /// Items that failed.
    pub failed: u64,
    /// Items done per second, since the start.
    pub rate: f64,
}
