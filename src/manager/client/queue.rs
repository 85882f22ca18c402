//! A queue in a manager.

use crate::channel::Item;
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::manager::client::proxy::{Proxy, calls, proxies};
use crate::manager::client::waits::in_time;
use crate::manager::wire::messages::Writer;
use crate::manager::wire::waiting::{End, Ticket, Try, Waits, too_late};
use serde::Serialize;
use std::collections::{HashMap, VecDeque};
use std::task::Poll;
use std::time::Duration;

/// A handle of a queue that lives in a manager's process: several producers, several consumers, first in, first out.
///
/// Created by [`Manager::queue`](crate::Manager::queue). It is for programs that share no memory, such as those on several
/// hosts; among processes of one program, [`Queue`](crate::Queue) is faster.
///
/// ```
/// use multiprocess::{self as mp, Manager, QueueProxy};
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::builder().bind("127.0.0.1:0").authkey(b"secret").start().await?;
///         let jobs = manager.queue::<String>(None).await?;
///         manager.names().set("jobs", jobs.clone()).await?;
///
///         // In another process, perhaps on another host:
///         let there = Manager::connect(&manager.address().await?.unwrap(), b"secret").await?;
///         let theirs: QueueProxy<String> = there.names().get("jobs").await?.unwrap();
///         let (job, ()) = futures::try_join!(theirs.get(), jobs.put("sweep".into()))?;
///         assert_eq!(job, "sweep");
///         manager.shutdown().await
///     })
/// }
/// ```
///
/// # Details
/// - **Order.** First in, first out. Calls that wait are served in the order in which they arrived at the manager.
/// - **Waiting.** A call that waits holds no thread of the manager. It may also wait for room and for its answer, as a call of
///   [`Proxy`].
/// - **Dropped futures.** A dropped [`get`](Self::get) has removed nothing. A dropped [`put`](Self::put) has put nothing while the queue is full; after that
///   the item may have been put. For the other methods see [`Proxy`].
/// - **Death.** An item is received once [`get`](Self::get) has returned it. An item on its way to a process that is killed or
///   disconnected goes back to its place in the queue. If the manager ends, each call fails with `Closed`.
/// - **Cost.** One call for each method; `put` and `get` send one message more, which is not answered.
pub struct QueueProxy<T>(pub(crate) Proxy<QueueObject<T>>);

/// The queue in the manager.
pub(crate) struct QueueObject<T> {
    /// Each with its place in the order.
    items: VecDeque<(u64, T)>,
    /// On their way to their receivers.
    taken: HashMap<Ticket, (u64, T)>,
    last: u64,
    capacity: Option<usize>,
    unfinished: u64,
    is_closed: bool,
}

impl<T: Serialize> QueueObject<T> {
    pub(crate) fn new(capacity: Option<usize>) -> Self {
        let (items, taken) = (VecDeque::new(), HashMap::new());
        Self { items, taken, last: 0, capacity, unfinished: 0, is_closed: false }
    }

    fn is_full(&self) -> bool {
        self.capacity.is_some_and(|capacity| self.items.len() + self.taken.len() >= capacity)
    }

    /// Appends the item if there is room for it; true if so.
    fn try_put(&mut self, item: &mut Option<(T,)>) -> Result<bool> {
        if self.is_closed {
            return Err(Error::closed("queue"));
        }
        let has_room = !self.is_full();
        if let Some((item,)) = item.take_if(|_| has_room) {
            self.last += 1;
            self.unfinished += 1;
            self.items.push_back((self.last, item));
        }
        Ok(has_room)
    }

    fn put(&mut self, item: &mut Option<(T,)>, now: Try, answer: &mut Writer) -> Poll<Result<()>> {
        match self.try_put(item)? {
            true => Poll::Ready(answer.lend_part(&())),
            false if now.is_late => Poll::Ready(Err(too_late("the queue had no room"))),
            false => Poll::Pending,
        }
    }

    fn get(&mut self, may_wait: &mut Option<(bool,)>, now: Try, answer: &mut Writer) -> Poll<Result<()>> {
        let Some(item) = self.items.pop_front() else {
            // An item that is on its way may come back.
            return match (self.is_closed && self.taken.is_empty(), *may_wait) {
                (true, _) => Poll::Ready(Err(Error::closed("queue"))),
                (false, Some((false,))) => Poll::Ready(Err(Error::new(ErrorKind::Empty, "the queue is empty"))),
                (false, _) => Poll::Pending,
            };
        };
        *may_wait = None;
        let answered = answer.lend_part(&item.1);
        // Also if it could not be written: then it is given back.
        self.taken.insert(now.ticket, item);
        Poll::Ready(answered)
    }

    fn join(&mut self, _: &mut Option<()>, _: Try, answer: &mut Writer) -> Poll<Result<()>> {
        if self.unfinished == 0 { Poll::Ready(answer.lend_part(&())) } else { Poll::Pending }
    }
}

impl<T: Send + 'static> Waits for QueueObject<T> {
    fn settle(&mut self, ticket: Ticket, end: End) {
        if let Some(item) = self.taken.remove(&ticket)
            && end != End::Took
        {
            let at = self.items.partition_point(|(place, _)| *place < item.0);
            self.items.insert(at, item);
        }
    }
}

impl<T: Item> QueueProxy<T> {
    calls! { queue: QueueObject<T>;
        /// Appends an item. Waits while the queue is full.
        ///
        /// If the future is dropped while the queue is full, it puts nothing. If it is dropped later, the item has been put.
        ///
        /// # Errors
        /// `Closed` if the queue was closed; else as [`Proxy::call`]. The item is lost.
        wait fn put(item: T) -> () { (None, QueueObject::<T>::put, (item,)) }

        /// Appends an item if the queue is not full.
        ///
        /// # Errors
        /// `Full` if the queue is full; `Closed` if the queue was closed; else as [`Proxy::call`]. The item is lost.
        try fn try_put(item: T) -> () {
            let full = || Error::new(ErrorKind::Full, "the queue is full");
            queue.try_put(&mut Some((item,)))?.then_some(()).ok_or_else(full)
        }

        /// Removes the first item and returns it. Waits while the queue is empty.
        ///
        /// Cancel safe: a dropped future has removed nothing. An item that was on its way is the first again.
        ///
        /// # Errors
        /// `Closed` if the queue was closed and is empty; `Decode` if the item cannot be read, which stays the first; else as
        /// [`Proxy::call`].
        wait fn get() -> T { (None, QueueObject::<T>::get, (true,)) }

        /// Removes the first item and returns it, if there is one. Cancel safe: a dropped future has removed nothing.
        ///
        /// # Errors
        /// `Empty` if the queue is empty; else as [`get`](Self::get).
        wait fn try_get() -> T { (None, QueueObject::<T>::get, (false,)) }

        /// Puts an item as [`put`](Self::put), but gives up if the queue is full for `timeout`. A dropped future behaves as
        /// that of `put`.
        ///
        /// The manager decides whether the item was in time, and this call waits for its answer. So it can take longer if the manager
        /// is stopped. Time is real time: see [Timeouts](crate#timeouts).
        ///
        /// # Errors
        /// `Timeout` if the queue had no room in time: the item was not put. Else as [`put`](Self::put).
        wait fn put_timeout(item: T, timeout: Duration) -> () { (Some(timeout), QueueObject::<T>::put, (item,)) }

        /// Returns the number of items.
        call fn len() -> usize { queue.items.len() }

        /// Returns `true` if the queue has no items.
        call fn is_empty() -> bool { queue.items.is_empty() }

        /// Returns `true` if [`put`](Self::put) would wait.
        call fn is_full() -> bool { queue.is_full() }

        /// Closes the queue: from now on each `put` fails, and each `get` fails once the queue is empty.
        call fn close() -> () { queue.is_closed = true }

        /// Marks an item as done, for [`join`](Self::join).
        ///
        /// # Errors
        /// `Other` if all items that were put are done already; else as [`Proxy::call`].
        try fn task_done() -> () {
            let why = "task_done was called more often than there were items";
            let too_often = || Error::other(why).explained_by(Topic::TaskDone);
            queue.unfinished.checked_sub(1).map(|left| queue.unfinished = left).ok_or_else(too_often)
        }

        /// Waits until [`task_done`](Self::task_done) was called for each item that was ever put.
        ///
        /// An item whose consumer was killed after [`get`](Self::get) is never done; a [`JoinableQueue`](crate::JoinableQueue) counts it as done.
        ///
        /// Cancel safe: dropping the future changes nothing.
        ///
        /// # Errors
        /// As [`Proxy::call`].
        wait fn join() -> () { (None, QueueObject::<T>::join, ()) }
    }

    /// Removes the first item as [`get`](Self::get), but gives up after `timeout`, and has removed nothing then. Cancel
    /// safe: a dropped future has removed nothing.
    ///
    /// Time is real time: see [Timeouts](crate#timeouts).
    ///
    /// # Errors
    /// `Timeout` if there was no item in time; else as [`get`](Self::get).
    pub async fn get_timeout(&self, timeout: Duration) -> Result<T> {
        in_time(timeout, self.get(), "the queue had no item").await
    }
}

proxies!(QueueProxy<T>);
