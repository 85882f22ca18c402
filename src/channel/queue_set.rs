//! A set of queues: the next item of any of them.
//!
//! # State
//! Per queue an alarm on its waiters for items. `State`, of this process: the queues that may have an item, and the waker of the
//! `get` that waits.
//!
//! # Moves
//! | move | then |
//! |---|---|
//! | a ready queue is found empty | its alarm is armed, it is tried once more, and is ready no longer |
//! | an alarm is notified | its queue is ready; the `get` that waits is woken, or else the next sleeper of the queue |
//! | an item is taken | its queue is the last of those that are ready |
//! | a queue is found closed and drained | it leaves the set |
//!
//! # Invariants
//! 1. A queue that is not ready has its alarm armed, and was found empty after that.
//! 2. A notification that a `get` has not used is passed on to the next sleeper of its queue when the `get` ends.
//!
//! # Death
//! An alarm is a sleeper like any other: see `wait::sleepers`. Tests (`tests/pieces.rs`, `queue_sets`):
//! `killed_at_any_step_of_a_get_no_other_item_is_lost_and_others_get_on`, `the_death_of_a_process_with_a_set_keeps_no_item_from_others`.
//!
//! # Cancel
//! A dropped `get` has taken nothing, and passes its notifications on. Tests: `ten_thousand_dropped_gets_lose_nothing_and_keep_the_order`,
//! `a_set_that_nobody_polls_keeps_no_item_from_others`.

use super::channel_core::ChannelCore;
use super::queue::{Item, JoinableQueue, Queue};
use super::ring::word;
use crate::error::{Error, ErrorKind, Result};
use crate::os::sync::lock;
use crate::os::{fork, timer};
use crate::wait::{self, WaitQueue};
use futures_util::{Stream, StreamExt};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::hash::Hash;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

/// Many queues as one: the next item of any of them, with the key of its queue.
///
/// For two or three queues, `tokio::select!` over their `get`s is enough. A set waits for thousands of queues as cheaply as for
/// one: the cost of a `get` depends on the number of queues that have items. Queues take turns, so a busy one does not keep the
/// others waiting. Other processes and tasks may get from the same queues meanwhile.
///
/// ```
/// use multiprocess::{self as mp, Process, Queue, QueueSet};
///
/// async fn log(queue: Queue<String>, line: String) -> mp::Result<()> {
///     queue.put(line).await?;
///     queue.close();
///     Ok(())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let mut logs = QueueSet::new();
///         for host in ["a", "b", "c"] {
///             let queue = Queue::unbounded()?;
///             logs.insert(host, &queue)?;
///             Process::spawn(log, (queue, format!("hello from {host}")))?;
///         }
///         for _ in 0..3 {
///             let (host, line) = logs.get().await?;
///             assert_eq!(line, format!("hello from {host}"));
///         }
///         Ok(())
///     })
/// }
/// ```
///
/// # Details
/// - **Order.** The items of one queue come in order. Among queues that have items, the one that was served last is the last.
/// - **Closing.** A queue that is closed and drained leaves the set. `get` of a set without queues fails with `Closed`.
/// - **Death.** A process that is killed with a set harms nobody, as with the queues themselves.
/// - **Cost.** A queue keeps up to 61 sleeping processes and sets in order; further ones are woken all at once. A set is one of
///   them in each of its queues while these are empty. A set stays in its process; the queues can be sent.
pub struct QueueSet<K, T> {
    entries: Vec<Option<Entry<K>>>,
    keys: HashMap<K, usize>,
    shared: Arc<Shared>,
    item: PhantomData<fn() -> T>,
}

struct Entry<K> {
    key: K,
    core: Arc<ChannelCore>,
    alarm: Arc<WaitQueue>,
}

impl<K> Drop for Entry<K> {
    fn drop(&mut self) {
        if !fork::is_forked() {
            self.alarm.disarm();
            // A notification that had come is for the next.
            self.alarm.notify_one();
        }
    }
}

#[derive(Default)]
struct Shared(Mutex<State>);

#[derive(Default)]
struct State {
    ready: VecDeque<usize>,
    flags: Vec<Flags>,
    waker: Option<Waker>,
}

#[derive(Clone, Copy, Default)]
struct Flags {
    is_ready: bool,
    /// Its alarm was armed, and no notification was seen since.
    is_armed: bool,
    /// A notification came that no `get` has used.
    has_unused_notification: bool,
}

impl Shared {
    /// The next `get` tries the queue at `index`.
    fn make_ready(&self, index: usize) {
        lock(&self.0).make_ready(index);
    }

    /// The queue at `index` has a new alarm: forgets the state of the old one.
    fn reset(&self, index: usize) {
        let mut state = lock(&self.0);
        if state.flags.len() <= index {
            state.flags.resize(index + 1, Flags::default());
        }
        state.flags[index].is_armed = false;
        state.make_ready(index);
    }

    /// The alarm was just armed, in a `get`.
    fn on_armed(&self, index: usize, alarm: &WaitQueue) {
        let mut state = lock(&self.0);
        state.flags[index].is_armed = alarm.is_armed();
        if !state.flags[index].is_armed {
            state.flags[index].has_unused_notification = true;
            state.make_ready(index);
        }
    }

    fn next_ready(&self) -> Option<usize> {
        let mut state = lock(&self.0);
        let index = state.ready.pop_front()?;
        (state.flags[index].is_ready, state.flags[index].has_unused_notification) = (false, false);
        Some(index)
    }

    /// The doorbell was rung for this queue. If that was no notification of the alarm and the queue is empty, other processes have
    /// drained it: its memory is given back after a time.
    fn on_notification(&self, index: usize, alarm: &WaitQueue, core: &ChannelCore) {
        let mut state = lock(&self.0);
        let flags = state.flags[index];
        let has_unused_notification = flags.is_armed && !alarm.is_armed();
        if !has_unused_notification && (flags.is_ready || core.ring().is_empty_here()) {
            drop(state);
            core.watch_idle();
            return;
        }
        state.flags[index].is_armed = flags.is_armed && !has_unused_notification;
        state.make_ready(index);
        let waker = state.waker.take();
        if waker.is_some() {
            state.flags[index].has_unused_notification |= has_unused_notification;
        }
        drop(state);
        match waker {
            Some(waker) => waker.wake(),
            // No `get` of this set waits.
            None if has_unused_notification => alarm.notify_one(),
            None => {}
        }
    }

    /// Leaves a waker, unless there is something to look into.
    fn sleep(&self, waker: &Waker) -> bool {
        let mut state = lock(&self.0);
        let sleeps = state.ready.is_empty();
        let old = if sleeps { state.waker.replace(waker.clone()) } else { None };
        drop(state);
        drop(old);
        sleeps
    }

    /// A `get` has ended: returns the queues whose notifications it has not used.
    fn stop_waiting(&self) -> Vec<usize> {
        let mut state = lock(&self.0);
        let waker = state.waker.take();
        let State { ready, flags, .. } = &mut *state;
        let unused = |index: &usize| std::mem::take(&mut flags[*index].has_unused_notification);
        let unused = ready.iter().copied().filter(unused).collect();
        drop(state);
        drop(waker);
        unused
    }
}

impl State {
    fn make_ready(&mut self, index: usize) {
        if !std::mem::replace(&mut self.flags[index].is_ready, true) {
            self.ready.push_back(index);
        }
    }
}

mod sealed {
    pub trait Sealed {
        fn source(&self) -> Source;
    }

    /// A queue as the rest of this crate sees it.
    pub struct Source(pub(in crate::channel) std::sync::Arc<super::ChannelCore>);
}

/// A [`Queue`] or a [`JoinableQueue`] of `T`, as [`QueueSet::insert`] accepts it.
pub trait QueueOf<T>: sealed::Sealed {}

impl<T> sealed::Sealed for Queue<T> {
    fn source(&self) -> sealed::Source {
        sealed::Source(self.core().clone())
    }
}
impl<T> sealed::Sealed for JoinableQueue<T> {
    fn source(&self) -> sealed::Source {
        sealed::Source(self.core().clone())
    }
}
impl<T> QueueOf<T> for Queue<T> {}
impl<T> QueueOf<T> for JoinableQueue<T> {}

impl<K, T> Default for QueueSet<K, T> {
    fn default() -> Self {
        Self { entries: Vec::new(), keys: HashMap::new(), shared: Arc::default(), item: PhantomData }
    }
}

impl<K: Clone + Eq + Hash, T: Item> QueueSet<K, T> {
    /// Creates a set without queues.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a queue, or puts it in the place of the one that has this key.
    ///
    /// # Errors
    /// `Io` if the system refuses a resource.
    pub fn insert(&mut self, key: K, queue: &impl QueueOf<T>) -> Result<()> {
        let core = queue.source().0;
        let alarm = WaitQueue::new(core.ring().region().clone(), word::ITEMS, None)
            .map_err(|error| Error::io("cannot add a queue to a set", error))?;
        // Nothing can fail any more.
        self.remove(&key);
        let free = self.entries.iter().position(Option::is_none).filter(|_| self.keys.len() < self.entries.len());
        let index = free.unwrap_or(self.entries.len());
        let (shared, weak, looked_into) = (Arc::downgrade(&self.shared), Arc::downgrade(&alarm), core.clone());
        alarm.set_reader(move || {
            if let (Some(shared), Some(alarm)) = (shared.upgrade(), weak.upgrade()) {
                shared.on_notification(index, &alarm, &looked_into);
            }
        });
        let entry = Some(Entry { key: key.clone(), core, alarm });
        match self.entries.get_mut(index) {
            Some(place) => *place = entry,
            None => self.entries.push(entry),
        }
        self.keys.insert(key, index);
        self.shared.reset(index);
        Ok(())
    }

    /// Removes a queue from the set, and returns `true` if there was one with this key. Its items stay in the queue.
    ///
    /// ```
    /// # multiprocess::init();
    /// use multiprocess::{Queue, QueueSet};
    /// let mut set = QueueSet::new();
    /// set.insert("north", &Queue::<u8>::unbounded()?)?;
    /// assert_eq!(set.keys().collect::<Vec<_>>(), [&"north"]);
    /// assert!(set.remove(&"north"));
    /// assert!(set.is_empty());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn remove(&mut self, key: &K) -> bool {
        let index = self.keys.remove(key);
        index.is_some_and(|index| self.entries[index].take().is_some())
    }

    /// Takes the next item of any queue, with the key of the queue, and waits while there is none.
    ///
    /// Cancel safe: a dropped future has taken nothing.
    ///
    /// # Errors
    /// - `Closed` if no queue is in the set, or all are closed and drained.
    /// - `Decode` if an item cannot be read as `T`. The item is lost; the set can still be used.
    /// - `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs.
    pub async fn get(&mut self) -> Result<(K, T)> {
        let waiting = Waiting(self);
        std::future::poll_fn(|cx| {
            fork::check()?;
            waiting.0.poll(cx)
        })
        .await
    }

    /// Takes the next item if there is one now.
    ///
    /// ```
    /// # multiprocess::init();
    /// use multiprocess::{ErrorKind, Queue, QueueSet};
    /// let (one, other) = (Queue::unbounded()?, Queue::unbounded()?);
    /// let mut set = QueueSet::new();
    /// set.insert(1, &one)?;
    /// set.insert(2, &other)?;
    /// other.try_put("item".to_string())?;
    /// assert_eq!(set.try_get()?, (2, "item".to_string()));
    /// assert_eq!(set.try_get().unwrap_err().kind(), ErrorKind::Empty);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Empty` if there is none. Otherwise as [`get`](Self::get).
    pub fn try_get(&mut self) -> Result<(K, T)> {
        fork::check()?;
        // An alarm is received in a runtime only, and perhaps there is none.
        (0..self.entries.len())
            .filter(|index| self.entries[*index].is_some())
            .for_each(|index| self.shared.make_ready(index));
        for _ in 0..self.entries.len() {
            let Some(index) = self.shared.next_ready() else { break };
            let tried = self.take_by(index, ChannelCore::next_now);
            self.shared.make_ready(index);
            if let Some(taken) = tried {
                return taken;
            }
        }
        match self.is_empty() {
            true => Err(self.closed()),
            false => Err(Error::new(ErrorKind::Empty, "all queues of the set are empty")),
        }
    }

    /// Takes the next item of any queue, and waits at most `timeout` for one.
    ///
    /// Cancel safe: a dropped future has taken nothing, and so has a call that timed out. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// # Errors
    /// - `Timeout` if there was no item in time.
    /// - `Io` if the runtime has no timer.
    /// - Otherwise as [`get`](Self::get).
    pub async fn get_timeout(&mut self, timeout: Duration) -> Result<(K, T)> {
        let failed = |error| Error::io("cannot wait for a set of queues", error);
        let late = || Err(Error::new(ErrorKind::Timeout, "no queue of the set had an item in time"));
        timer::limited(timeout, self.get()).map_err(failed)?.await.unwrap_or_else(|_| late())
    }

    /// Takes the next item of any queue, blocking this thread while there is none.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    #[track_caller]
    pub fn blocking_get(&mut self) -> Result<(K, T)> {
        wait::refuse_inside_async();
        wait::block_on(self.get()).map_err(|error| Error::io("cannot wait for a set of queues", error))?
    }

    /// Returns a stream of the items with their keys, which ends when all queues are closed and drained. Dropping it loses no item.
    ///
    /// # Errors
    /// Each item of the stream as [`get`](Self::get). The stream ends after an error of kind `Io`.
    ///
    /// ```
    /// use futures::TryStreamExt;
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let queue = multiprocess::Queue::unbounded()?;
    /// queue.put(1).await?;
    /// queue.close();
    /// let mut set = multiprocess::QueueSet::new();
    /// set.insert("only", &queue)?;
    /// let items: Vec<_> = set.stream().try_collect().await?;
    /// assert_eq!(items, [("only", 1)]);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn stream(&mut self) -> impl Stream<Item = Result<(K, T)>> + Unpin {
        let items = futures_util::stream::unfold(Some(self), |set| async {
            let set = set?;
            match set.get().await {
                Err(error) if error.kind() == ErrorKind::Closed => None,
                // Waiting needs a resource that is missing, and will not be there at once.
                Err(error) if matches!(error.kind(), ErrorKind::Forked | ErrorKind::Io) => Some((Err(error), None)),
                item => Some((item, Some(set))),
            }
        });
        Box::pin(items.fuse())
    }

    /// Returns the number of queues.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Returns `true` if there is no queue.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Returns the keys of the queues, in no order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.keys.keys()
    }

    fn closed(&self) -> Error {
        Error::new(ErrorKind::Closed, "no queue is in the set, or all are closed and drained")
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(K, T)>> {
        let coop = ready!(tokio::task::coop::poll_proceed(cx));
        loop {
            while let Some(index) = self.shared.next_ready() {
                if let Some(taken) = self.take(index) {
                    self.shared.make_ready(index);
                    coop.made_progress();
                    return Poll::Ready(taken);
                }
                if let Some(taken) = self.arm(index) {
                    self.shared.make_ready(index);
                    coop.made_progress();
                    return Poll::Ready(taken);
                }
            }
            let Some(entry) = self.entries.iter().flatten().next() else {
                coop.made_progress();
                return Poll::Ready(Err(self.closed()));
            };
            // Where an alarm was armed in another runtime, this one must answer.
            entry.alarm.listen().map_err(failed)?;
            if self.shared.sleep(cx.waker()) {
                return Poll::Pending;
            }
        }
    }

    /// Takes the next item of one queue, if it has one. A queue that is closed and drained leaves the set.
    fn take(&mut self, index: usize) -> Option<Result<(K, T)>> {
        self.take_by(index, ChannelCore::next_when_notified)
    }

    fn take_by(&mut self, index: usize, next: fn(&ChannelCore) -> Option<Result<T>>) -> Option<Result<(K, T)>> {
        let entry = self.entries.get(index)?.as_ref()?;
        match next(&entry.core)? {
            Ok(item) => Some(Ok((entry.key.clone(), item))),
            Err(error) => {
                let key = entry.key.clone();
                let is_over = matches!(error.kind(), ErrorKind::Closed | ErrorKind::Corrupt);
                if is_over {
                    self.remove(&key);
                }
                (error.kind() != ErrorKind::Closed).then_some(Err(error))
            }
        }
    }

    /// Arms the alarm of a queue that is empty, and tries once more.
    fn arm(&mut self, index: usize) -> Option<Result<(K, T)>> {
        let entry = self.entries.get(index)?.as_ref()?;
        match entry.alarm.arm() {
            Ok(()) => {
                self.shared.on_armed(index, &entry.alarm);
                self.take(index)
            }
            Err(error) => Some(Err(failed(error))),
        }
    }
}

fn failed(error: std::io::Error) -> Error {
    Error::io("cannot wait for a set of queues", error)
}

/// A `get`, which ends when this is dropped.
struct Waiting<'a, K, T>(&'a mut QueueSet<K, T>);

impl<K, T> Drop for Waiting<'_, K, T> {
    fn drop(&mut self) {
        if fork::is_forked() {
            return;
        }
        for index in self.0.shared.stop_waiting() {
            self.0.entries[index].iter().for_each(|entry| entry.alarm.notify_one());
        }
    }
}

impl<K: fmt::Debug, T> fmt::Debug for QueueSet<K, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueSet").field("keys", &self.keys.keys()).finish_non_exhaustive()
    }
}
