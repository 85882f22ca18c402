//! Queues: many producers, many consumers, in order, across processes.

use super::channel_core::{ChannelCore, Refused};
#[cfg(not(multiprocess_loom))]
use super::lease::{self, DeadLetters, Lease};
use super::ring::Ring;
use crate::error::{Error, ErrorKind, PutError, Result, TryPutError};
use crate::os::memfd;
use crate::os::socket;
use crate::shm::mapped::Mapped;
use crate::wire::attach;
use futures_util::{Sink, Stream, StreamExt};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// A value that queues and pipes carry: a serde value that owns its contents.
///
/// It is implemented for all such types.
#[diagnostic::on_unimplemented(
    message = "a `{Self}` cannot be sent to another process [not-serde]",
    label = "a `{Self}` cannot be sent",
    note = "an item is owned and must be `Serialize + DeserializeOwned + Send + 'static`: use `String` for `&str`, `Vec<T>` for `&[T]`, and derive serde's traits for your own types",
    note = "a `File`, a socket or another descriptor travels as `multiprocess::Fd`; instead of a channel of std or tokio use `multiprocess::Queue`, instead of a mutex or its guard `multiprocess::Lock` or `multiprocess::Value`",
    note = "a `Pool`, a `Process` and a guard stay in their process"
)]
pub trait Item: Serialize + DeserializeOwned + Send + 'static {}
#[diagnostic::do_not_recommend]
impl<T: Serialize + DeserializeOwned + Send + 'static> Item for T {}

/// A first-in, first-out queue between processes, for any number of producers and consumers.
///
/// Use instead:
/// - [`JoinableQueue`] to wait until all items are processed;
/// - [`pipe`](crate::pipe()) between two processes that should notice each other's end;
/// - [`broadcast`](crate::broadcast()) if every receiver should get each value;
/// - [`Pool`](crate::Pool) for calls with results.
///
/// A handle is cheap to clone and is itself a serde value: send it as an argument, in a result, inside another value, or
/// through another queue. All handles, in all processes, stand for the same queue. It exists as long as any process has a
/// handle, or one is inside a message.
///
/// ```
/// use multiprocess::{self as mp, Process, Queue};
///
/// async fn producer(queue: Queue<u32>) -> mp::Result<()> {
///     for n in 0..3 {
///         queue.put(n).await?;
///     }
///     queue.close();
///     Ok(())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let queue = Queue::bounded(2)?;
///         let child = Process::spawn(producer, (queue.clone(),))?;
///         let mut sum = 0;
///         while let Ok(n) = queue.get().await {
///             sum += n;
///         }
///         child.await??;
///         assert_eq!(sum, 3);
///         Ok(())
///     })
/// }
/// ```
///
/// # Usual calls
/// - [`put`](Queue::put) and [`get`](Queue::get) wait if they must; [`try_put`](Queue::try_put) and
///   [`try_get`](Queue::try_get) never do; [`blocking_put`](Queue::blocking_put) and
///   [`blocking_get`](Queue::blocking_get) are for synchronous code.
/// - [`close`](Queue::close) ends the queue for all processes. Items that are in it can still be taken.
/// - [`lease`](Queue::lease) takes an item that comes back unless the consumer commits it.
/// - [`stream`](Queue::stream) and [`sink`](Queue::sink) connect it to the combinators of `futures`.
///
/// # Waiting
/// - `put` waits only if the queue is bounded and full. `get` waits while the queue is empty.
/// - Both are cancel safe: a dropped future has put or taken nothing.
/// - The waiters of a process are served in the order of their first poll. A future that has been polled keeps its place, and later ones of its process
///   wait behind it: poll it on, or drop it.
///
/// # Death
/// - A process killed during an operation harms no other process. Its put has happened as a whole or not at all.
/// - A process stopped by SIGSTOP counts as alive. If it is stopped right after it was woken for an item, that item stays in
///   the queue until the next `put` or `get`. If it is stopped in the middle of a copy, it blocks other producers or consumers until it resumes or dies. Meanwhile
///   `try_put` fails with `Full` and `try_get` with `Empty` after a tenth of a second, and `close` blocks for up to 5 s.
///
/// # Cost
/// - An operation that need not wait is one copy and a few atomic operations. It makes a system call only to wake a process.
/// - A queue is three descriptors and 72 KiB of shared memory.
/// - Items in the queue take memory as they come. A drained queue keeps up to 1 MiB. The process that drained it keeps more
///   for one to two seconds, for the next large item: up to 544 MiB for each queue, and 1 GiB in all.
///
/// # Limits
/// - An encoded item has at most 4 GiB less 1 MiB.
/// - Some 270 undelivered items that carry descriptors fill the kernel's socket. Then a put of another such item waits, in an
///   unbounded queue too.
pub struct Queue<T> {
    core: Arc<ChannelCore>,
    item: PhantomData<fn(T) -> T>,
}

/// The queues that this process has mapped, so that one received twice is mapped once.
static MAPPED: Mapped<ChannelCore> = Mapped::new();

fn create(item_limit: u64, is_joinable: bool) -> Result<Arc<ChannelCore>> {
    create_limited(item_limit, 0, is_joinable)
}

fn create_limited(item_limit: u64, byte_limit: u64, is_joinable: bool) -> Result<Arc<ChannelCore>> {
    let create = || {
        let ring = Ring::create(item_limit, byte_limit)?;
        let (tx, rx) = socket::packet_pair()?;
        let core = ChannelCore::new(ring, (Arc::new(tx), Arc::new(rx)), None, is_joinable, "queue")?;
        MAPPED.or_make(core.ring().region().identity(), || Ok(core.clone()))
    };
    create().map_err(|error: io::Error| Error::io("cannot create a queue", error))
}

fn serialize_core<S: Serializer>(core: &ChannelCore, serializer: S) -> Result<S::Ok, S::Error> {
    let kind = if core.is_joinable() { "`JoinableQueue`" } else { "`Queue`" };
    let attachments = core.attachments().map(|attachment| attachment.of(kind));
    attach::serialize_handle(serializer, attachments, core.is_joinable())
}

fn deserialize_core<'de, D: Deserializer<'de>>(deserializer: D, joinable: bool) -> Result<Arc<ChannelCore>, D::Error> {
    let ([memory, tx, rx], is_joinable): ([OwnedFd; 3], bool) = attach::deserialize_handle(deserializer)?;
    if joinable != is_joinable {
        return Err(D::Error::custom("a queue of another kind"));
    }
    let open = || {
        MAPPED.or_make(memfd::identity(memory.as_fd())?, || {
            ChannelCore::new(Ring::open(memory)?, (Arc::new(tx), Arc::new(rx)), None, joinable, "queue")
        })
    };
    open().map_err(|error| D::Error::custom(Error::io("a queue cannot be opened", error)))
}

fn put_error<T>((error, value): Refused<T>) -> PutError<T> {
    PutError::new(error, value)
}

impl<T: Item> Queue<T> {
    /// Creates a queue without a limit: [`put`](Self::put) never waits for room.
    ///
    /// ```
    /// # multiprocess::init();
    /// let queue = multiprocess::Queue::unbounded()?;
    /// assert_eq!(queue.capacity(), None);
    /// # queue.try_put(1)?;
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Io` if there is not enough memory, or no descriptor is left.
    pub fn unbounded() -> Result<Self> {
        Ok(Self { core: create(0, false)?, item: PhantomData })
    }

    /// Creates a queue of at most `capacity` items, of any size each.
    ///
    /// ```
    /// # multiprocess::init();
    /// let queue = multiprocess::Queue::bounded(1)?;
    /// queue.try_put("first".to_string())?;
    /// assert!(queue.is_full());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// - `Other` if `capacity` is 0, or 2^31 or more.
    /// - `Io` if there is not enough memory, or no descriptor is left.
    pub fn bounded(capacity: usize) -> Result<Self> {
        Ok(Self { core: create(check_capacity(capacity)?, false)?, item: PhantomData })
    }
}

impl<T: Item> Queue<T> {
    /// A queue of at most `items` items, and of about so many bytes, or two items if they are larger.
    pub(crate) fn limited(items: usize, bytes: u64) -> Result<Self> {
        Ok(Self { core: create_limited(check_capacity(items)?, bytes, false)?, item: PhantomData })
    }

    /// Puts `value` as [`blocking_put`](Self::blocking_put), but gives up once `gives_up` returns `true`. It is called before the
    /// wait for room and then after each `interval`. Returns whether the value was put.
    #[track_caller]
    pub(crate) fn blocking_put_unless(
        &self,
        value: T,
        interval: Duration,
        gives_up: impl Fn() -> bool,
    ) -> Result<bool> {
        self.core.blocking_put_unless(value, interval, gives_up)
    }
}

impl<T> Queue<T> {
    /// Closes the queue as [`close`](Self::close), and drops its items unread.
    pub(crate) fn shut(&self) {
        self.core.close();
        self.core.discard();
    }

    /// Closes the queue without waiting for an item that is just being copied, which may be lost.
    pub(crate) fn abandon(&self) {
        self.core.abandon();
    }
}

fn check_capacity(capacity: usize) -> Result<u64> {
    match capacity {
        1..=0x7fff_ffff => Ok(capacity as u64),
        0 => {
            Err(Error::other("a queue of capacity 0 could hold nothing: use Queue::unbounded() or a positive capacity"))
        }
        _ => Err(Error::other(format!("a queue of capacity {capacity} is beyond 2^31 - 1: use Queue::unbounded()"))),
    }
}

macro_rules! queue_methods {
    ($name:ident) => {
        impl<T: Item> $name<T> {
            /// Puts `value` at the end, and waits while the queue is full.
            ///
            /// Cancel safe: a dropped future has put nothing.
            ///
            /// ```
            /// # multiprocess::init();
            /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
            /// let queue = multiprocess::Queue::bounded(2)?;
            /// queue.put(1).await?;
            /// assert_eq!(queue.len(), 1);
            /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
            /// ```
            ///
            /// # Errors
            /// All of them return the value.
            /// - `Closed` if the queue is closed.
            /// - `Encode` if `value` cannot be serialised, or is too large.
            /// - `Io` if there is not enough memory, or if it must wait outside a tokio runtime, or without a resource that waiting needs.
            pub async fn put(&self, value: T) -> Result<(), PutError<T>> {
                self.core.put(value).await.map_err(put_error)
            }

            /// Takes the first item, and waits while there is none.
            ///
            /// Cancel safe: a dropped future has taken nothing.
            ///
            /// ```
            /// # multiprocess::init();
            /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
            /// let queue = multiprocess::Queue::unbounded()?;
            /// queue.put(7).await?;
            /// assert_eq!(queue.get().await?, 7);
            /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
            /// ```
            ///
            /// # Errors
            /// - `Closed` if the queue is closed and drained.
            /// - `Decode` if the item cannot be read as `T`, or its descriptors do not fit into this process. The item is lost; the queue
            ///   can still be used.
            /// - `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs.
            pub async fn get(&self) -> Result<T> {
                self.core.get().await
            }

            /// Puts `value` if there is room now.
            ///
            /// ```
            /// # multiprocess::init();
            /// let queue = multiprocess::Queue::bounded(1)?;
            /// queue.try_put(1)?;
            /// assert_eq!(queue.try_put(2).unwrap_err().kind(), multiprocess::ErrorKind::Full);
            /// # Ok::<(), multiprocess::Error>(())
            /// ```
            ///
            /// # Errors
            /// `Full` if there is none. Otherwise as [`put`](Self::put). The error returns the value.
            pub fn try_put(&self, value: T) -> Result<(), TryPutError<T>> {
                self.core.try_put(value).map_err(|(error, value)| TryPutError::new(error, value))
            }

            /// Takes the first item if there is one now.
            ///
            /// ```
            /// # multiprocess::init();
            /// let queue = multiprocess::Queue::<u8>::unbounded()?;
            /// assert_eq!(queue.try_get().unwrap_err().kind(), multiprocess::ErrorKind::Empty);
            /// # Ok::<(), multiprocess::Error>(())
            /// ```
            ///
            /// # Errors
            /// `Empty` if there is none. Otherwise as [`get`](Self::get).
            pub fn try_get(&self) -> Result<T> {
                self.core.try_get()
            }

            /// Puts `value` at the end, blocking this thread while the queue is full.
            ///
            /// ```
            /// # multiprocess::init();
            /// let queue = multiprocess::Queue::unbounded()?;
            /// queue.blocking_put(1)?;
            /// assert_eq!(queue.len(), 1);
            /// # Ok::<(), multiprocess::Error>(())
            /// ```
            ///
            /// # Panics
            /// Inside async code, as tokio's blocking calls do.
            ///
            /// # Errors
            /// As [`put`](Self::put).
            #[track_caller]
            pub fn blocking_put(&self, value: T) -> Result<(), PutError<T>> {
                self.core.blocking_put(value).map_err(put_error)
            }

            /// Takes the first item, blocking this thread while there is none.
            ///
            /// ```
            /// # multiprocess::init();
            /// let queue = multiprocess::Queue::unbounded()?;
            /// queue.blocking_put(1)?;
            /// assert_eq!(queue.blocking_get()?, 1);
            /// # Ok::<(), multiprocess::Error>(())
            /// ```
            ///
            /// # Panics
            /// Inside async code, as tokio's blocking calls do.
            ///
            /// # Errors
            /// As [`get`](Self::get).
            #[track_caller]
            pub fn blocking_get(&self) -> Result<T> {
                self.core.blocking_get()
            }

            /// Puts `value` at the end, and waits at most `timeout` while the queue is full.
            ///
            /// Cancel safe: a dropped future has put nothing. The timeout is real time: see [Timeouts](crate#timeouts).
            ///
            /// ```
            /// # multiprocess::init();
            /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
            /// let queue = multiprocess::Queue::bounded(1)?;
            /// queue.put(1).await?;
            /// let late = queue.put_timeout(2, std::time::Duration::from_millis(1)).await;
            /// assert_eq!(late.unwrap_err().into_inner(), 2);
            /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
            /// ```
            ///
            /// # Errors
            /// - `Timeout` if there was no room in time.
            /// - `Io` if the runtime has no timer.
            /// - Otherwise as [`put`](Self::put). The error returns the value.
            pub async fn put_timeout(&self, value: T, timeout: Duration) -> Result<(), PutError<T>> {
                self.core.put_timeout(value, timeout).await.map_err(put_error)
            }

            /// Takes the first item, and waits at most `timeout` for one.
            ///
            /// Cancel safe: a dropped future has taken nothing, and so has a call that timed out. The timeout is real time: see [Timeouts](crate#timeouts).
            ///
            /// ```
            /// # multiprocess::init();
            /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
            /// let queue = multiprocess::Queue::<u8>::unbounded()?;
            /// let late = queue.get_timeout(std::time::Duration::from_millis(1)).await;
            /// assert_eq!(late.unwrap_err().kind(), multiprocess::ErrorKind::Timeout);
            /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
            /// ```
            ///
            /// # Errors
            /// - `Timeout` if there was no item in time.
            /// - `Io` if the runtime has no timer.
            /// - Otherwise as [`get`](Self::get).
            pub async fn get_timeout(&self, timeout: Duration) -> Result<T> {
                self.core.get_timeout(timeout).await
            }

            /// Takes the first item on lease, and waits while there is none.
            ///
            /// The item leaves the queue when the [`Lease`] is committed. If the lease is dropped, or its process ends, the item is the
            /// first of the queue again. A lease has no end of its own: a consumer that hangs keeps its item as long as it lives.
            ///
            /// Cancel safe: a dropped future has taken nothing.
            ///
            /// ```
            /// # multiprocess::init();
            /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
            /// let queue = multiprocess::Queue::unbounded()?;
            /// queue.put(1).await?;
            /// drop(queue.lease().await?); // the item is there again
            /// assert_eq!(queue.lease().await?.commit()?, 1);
            /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
            /// ```
            ///
            /// # Errors
            /// - `Closed` and `Decode` as [`get`](Self::get). With [`max_deliveries`](Self::max_deliveries) an item that cannot be read is leased again, and
            ///   becomes a dead letter in the end.
            /// - `Full` if 1024 items are on lease or dead letters.
            /// - `Io` as [`get`](Self::get), and if the descriptors of the item do not fit into this process: the item stays in the queue.
            #[cfg(not(multiprocess_loom))]
            pub async fn lease(&self) -> Result<Lease<T>> {
                Ok(Lease::of(&self.core, self.core.lease().await?))
            }

            /// Takes the first item on lease if there is one now.
            ///
            /// # Errors
            /// `Empty` if there is none. Otherwise as [`lease`](Self::lease).
            #[cfg(not(multiprocess_loom))]
            pub fn try_lease(&self) -> Result<Lease<T>> {
                Ok(Lease::of(&self.core, self.core.try_lease()?))
            }

            /// Takes the first item on lease, blocking this thread while there is none.
            ///
            /// ```
            /// # multiprocess::init();
            /// let queue = multiprocess::Queue::unbounded()?;
            /// queue.blocking_put(1)?;
            /// assert_eq!(queue.blocking_lease()?.commit()?, 1);
            /// # Ok::<(), multiprocess::Error>(())
            /// ```
            ///
            /// # Panics
            /// Inside async code, as tokio's blocking calls do.
            ///
            /// # Errors
            /// As [`lease`](Self::lease).
            #[cfg(not(multiprocess_loom))]
            #[track_caller]
            pub fn blocking_lease(&self) -> Result<Lease<T>> {
                Ok(Lease::of(&self.core, self.core.blocking_lease()?))
            }

            /// Takes the first item on lease, and waits at most `timeout` for one.
            ///
            /// Cancel safe: a dropped future has taken nothing, and so has a call that timed out. The timeout is real time: see [Timeouts](crate#timeouts).
            ///
            /// ```
            /// # multiprocess::init();
            /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
            /// use std::time::Duration;
            /// let queue = multiprocess::Queue::unbounded()?;
            /// queue.put(1).await?;
            /// assert_eq!(queue.lease_timeout(Duration::from_secs(5)).await?.commit()?, 1);
            /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
            /// ```
            ///
            /// # Errors
            /// - `Timeout` if there was no item in time.
            /// - `Io` if the runtime has no timer.
            /// - Otherwise as [`lease`](Self::lease).
            #[cfg(not(multiprocess_loom))]
            pub async fn lease_timeout(&self, timeout: Duration) -> Result<Lease<T>> {
                Ok(Lease::of(&self.core, self.core.lease_timeout(timeout).await?))
            }

            /// Returns a stream of leases.
            ///
            /// It ends when the queue is closed, and no item is in it or on lease. Dropping the stream loses no item.
            ///
            /// ```
            /// # multiprocess::init();
            /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
            /// use futures::StreamExt;
            /// let queue = multiprocess::Queue::unbounded()?;
            /// queue.put(1).await?;
            /// queue.close();
            /// let mut leases = queue.leases();
            /// while let Some(lease) = leases.next().await {
            ///     assert_eq!(lease?.commit()?, 1);
            /// }
            /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
            /// ```
            ///
            /// # Errors
            /// Each lease in the stream as [`lease`](Self::lease). The stream ends after an error of kind `Corrupt`, `Full` or `Io`.
            #[cfg(not(multiprocess_loom))]
            pub fn leases(&self) -> impl Stream<Item = Result<Lease<T>>> + Send + Unpin + use<T> {
                lease::leases(self.core.clone())
            }

            /// Sets how often an item of this queue may be delivered, for all handles in all processes.
            ///
            /// An item that was leased `most` times without a commit becomes a [dead letter](Self::dead_letters). 0,
            /// the default, is no limit. Returns another handle of this queue.
            #[cfg(not(multiprocess_loom))]
            pub fn max_deliveries(&self, most: u32) -> Self {
                self.core.set_max_deliveries(most);
                self.clone()
            }

            /// Returns a handle of the dead letters: the items that were leased as often as [`max_deliveries`](Self::max_deliveries)
            /// permits, without a commit. `len` and `join` do not count them.
            #[cfg(not(multiprocess_loom))]
            pub fn dead_letters(&self) -> DeadLetters<T> {
                DeadLetters::of(&self.core)
            }

            /// Returns the number of items, including those on lease. It is exact while no process puts or gets.
            ///
            /// ```
            /// # multiprocess::init();
            /// let queue = multiprocess::Queue::unbounded()?;
            /// queue.try_put(1)?;
            /// assert_eq!(queue.len(), 1);
            /// # Ok::<(), multiprocess::Error>(())
            /// ```
            pub fn len(&self) -> usize {
                self.core.len()
            }

            /// Returns how many items were ever put, and how many taken, each modulo 2^32; `None` if the memory is damaged.
            #[cfg(any(feature = "dashboard", feature = "metrics"))]
            pub(crate) fn passed(&self) -> Option<[u32; 2]> {
                self.core.passed()
            }

            /// Returns `true` if there is no item.
            ///
            /// ```
            /// # multiprocess::init();
            /// let queue = multiprocess::Queue::<u8>::unbounded()?;
            /// assert!(queue.is_empty());
            /// # Ok::<(), multiprocess::Error>(())
            /// ```
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            /// Returns `true` if a bounded queue has no room. An unbounded queue is never full.
            ///
            /// ```
            /// # multiprocess::init();
            /// let queue = multiprocess::Queue::bounded(1)?;
            /// queue.try_put(1)?;
            /// assert!(queue.is_full());
            /// # Ok::<(), multiprocess::Error>(())
            /// ```
            pub fn is_full(&self) -> bool {
                self.capacity().is_some_and(|capacity| self.core.waiting() >= capacity)
            }

            /// Returns the number of items that fit, or `None` if the queue is unbounded.
            ///
            /// ```
            /// # multiprocess::init();
            /// let queue = multiprocess::Queue::<u8>::bounded(3)?;
            /// assert_eq!(queue.capacity(), Some(3));
            /// # Ok::<(), multiprocess::Error>(())
            /// ```
            pub fn capacity(&self) -> Option<usize> {
                self.core.ring().item_limit()
            }

            /// Closes the queue for all processes.
            ///
            /// From then on each put fails, and a get fails once the queue is drained. All waiting processes are woken.
            /// Closing a closed queue does nothing.
            ///
            /// It blocks this thread while another process copies an item, for up to 5 s if that process is stopped
            /// (SIGSTOP).
            ///
            /// ```
            /// # multiprocess::init();
            /// let queue = multiprocess::Queue::unbounded()?;
            /// queue.try_put(1)?;
            /// queue.close();
            /// assert_eq!(queue.try_put(2).unwrap_err().kind(), multiprocess::ErrorKind::Closed);
            /// assert_eq!(queue.try_get()?, 1);
            /// assert_eq!(queue.try_get().unwrap_err().kind(), multiprocess::ErrorKind::Closed);
            /// # Ok::<(), multiprocess::Error>(())
            /// ```
            pub fn close(&self) {
                self.core.close();
            }

            /// Returns `true` if the queue is closed.
            ///
            /// ```
            /// # multiprocess::init();
            /// let queue = multiprocess::Queue::<u8>::unbounded()?;
            /// queue.close();
            /// assert!(queue.is_closed());
            /// # Ok::<(), multiprocess::Error>(())
            /// ```
            pub fn is_closed(&self) -> bool {
                self.core.ring().is_closed()
            }

            /// Returns a stream of the items, which ends when the queue is closed and drained. Dropping the stream loses no item.
            ///
            /// # Errors
            /// Each item of the stream as [`get`](Self::get).
            ///
            /// ```
            /// # multiprocess::init();
            /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
            /// use futures::StreamExt;
            /// let queue = multiprocess::Queue::unbounded()?;
            /// queue.put(1).await?;
            /// queue.close();
            /// assert_eq!(queue.stream().count().await, 1);
            /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
            /// ```
            pub fn stream(&self) -> QueueStream<T> {
                QueueStream::new(self.core.clone())
            }

            /// Returns a sink that puts each value it is given.
            ///
            /// ```
            /// # multiprocess::init();
            /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
            /// use futures::SinkExt;
            /// let queue = multiprocess::Queue::unbounded()?;
            /// queue.sink().send(1).await?;
            /// assert_eq!(queue.len(), 1);
            /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
            /// ```
            pub fn sink(&self) -> QueueSink<T> {
                QueueSink::new(self.core.clone())
            }
        }

        impl<T> $name<T> {
            #[cfg(not(multiprocess_loom))]
            pub(super) fn core(&self) -> &Arc<ChannelCore> {
                &self.core
            }
        }

        impl<T> Clone for $name<T> {
            fn clone(&self) -> Self {
                Self { core: self.core.clone(), item: PhantomData }
            }
        }

        impl<T> fmt::Debug for $name<T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut debug = f.debug_struct(stringify!($name));
                debug.field("len", &self.core.len()).field("capacity", &self.core.ring().item_limit());
                debug.field("is_closed", &self.core.ring().is_closed()).finish()
            }
        }
    };
}

queue_methods!(Queue);
queue_methods!(JoinableQueue);

/// A [`Queue`] that counts unfinished items, so that a producer can wait until all of them are processed.
///
/// Use instead:
/// - [`Queue`] if no process waits until all items are processed;
/// - [`Pool`](crate::Pool) if the producer needs the results too.
///
/// A consumer calls [`task_done`](JoinableQueue::task_done) once for each item that it has taken and processed.
/// [`join`](JoinableQueue::join) waits until the queue is empty and no item is unfinished. All other methods are those of
/// [`Queue`], and so are waiting, cost and limits.
///
/// ```
/// use multiprocess::{self as mp, JoinableQueue, Process};
///
/// fn worker(queue: JoinableQueue<u32>) -> mp::Result<()> {
///     while let Ok(_n) = queue.blocking_get() {
///         queue.task_done()?;
///     }
///     Ok(())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let queue = JoinableQueue::unbounded()?;
///         let worker = Process::spawn(worker, (queue.clone(),))?;
///         for n in 0..10 {
///             queue.put(n).await?;
///         }
///         queue.join().await?;
///         queue.close();
///         worker.await?
///     })
/// }
/// ```
///
/// # Death
/// Items that a process took and did not finish count as finished when it is killed or exits, so a killed consumer makes no
/// process wait for ever. This holds for up to 95 processes with unfinished items at a time; items that further processes took must be
/// finished by a [`task_done`](JoinableQueue::task_done) of any process.
pub struct JoinableQueue<T> {
    core: Arc<ChannelCore>,
    item: PhantomData<fn(T) -> T>,
}

impl<T: Item> JoinableQueue<T> {
    /// Creates a queue without a limit: [`put`](Self::put) never waits for room.
    ///
    /// ```
    /// # multiprocess::init();
    /// let queue = multiprocess::JoinableQueue::unbounded()?;
    /// assert_eq!(queue.capacity(), None);
    /// # queue.try_put(1)?;
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Io` if there is not enough memory, or no descriptor is left.
    pub fn unbounded() -> Result<Self> {
        Ok(Self { core: create(0, true)?, item: PhantomData })
    }

    /// Creates a queue of at most `capacity` items, of any size each.
    ///
    /// ```
    /// # multiprocess::init();
    /// let queue = multiprocess::JoinableQueue::bounded(1)?;
    /// queue.try_put("first".to_string())?;
    /// assert!(queue.is_full());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// - `Other` if `capacity` is 0, or 2^31 or more.
    /// - `Io` if there is not enough memory, or no descriptor is left.
    pub fn bounded(capacity: usize) -> Result<Self> {
        Ok(Self { core: create(check_capacity(capacity)?, true)?, item: PhantomData })
    }

    /// Counts one item as finished: one that this process took, or, if it has none unfinished, one that another process took.
    ///
    /// ```
    /// # multiprocess::init();
    /// let queue = multiprocess::JoinableQueue::unbounded()?;
    /// queue.try_put(1)?;
    /// queue.try_get()?;
    /// queue.task_done()?;
    /// assert!(queue.task_done().is_err());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Other` if no item is unfinished.
    pub fn task_done(&self) -> Result<()> {
        self.core.task_done()
    }

    /// Waits until the queue is empty and no item is unfinished.
    ///
    /// Cancel safe: a dropped future changes nothing.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let queue = multiprocess::JoinableQueue::unbounded()?;
    /// queue.put(1).await?;
    /// queue.get().await?;
    /// queue.task_done()?;
    /// queue.join().await?;
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs.
    pub async fn join(&self) -> Result<()> {
        self.core.join().await
    }

    /// Blocks this thread until the queue is empty and no item is unfinished.
    ///
    /// ```
    /// # multiprocess::init();
    /// let queue = multiprocess::JoinableQueue::<u8>::unbounded()?;
    /// queue.blocking_join()?;
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// `Io` if the system refuses a resource that waiting needs, such as a descriptor.
    #[track_caller]
    pub fn blocking_join(&self) -> Result<()> {
        self.core.blocking_join()
    }
}

impl<T> Serialize for Queue<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_core(&self.core, serializer)
    }
}

impl<'de, T> Deserialize<'de> for Queue<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self { core: deserialize_core(deserializer, false)?, item: PhantomData })
    }
}

impl<T> Serialize for JoinableQueue<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_core(&self.core, serializer)
    }
}

impl<'de, T> Deserialize<'de> for JoinableQueue<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self { core: deserialize_core(deserializer, true)?, item: PhantomData })
    }
}

/// A stream of the items of a queue, returned by [`Queue::stream`].
///
/// It ends when the queue is closed and drained. Dropping it loses no item. A stream that has returned `Pending` has a
/// place in the order of waiters. Other waiters of this process wait behind it, even if items arrive, until it is
/// polled again or dropped.
///
/// ```
/// use futures::StreamExt;
/// # multiprocess::init();
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let queue = multiprocess::Queue::unbounded()?;
/// queue.put(1).await?;
/// queue.close();
/// assert_eq!(queue.stream().next().await.unwrap()?, 1);
/// # Ok::<_, multiprocess::Error>(()) }).unwrap();
/// ```
pub struct QueueStream<T>(Pin<Box<dyn Stream<Item = Result<T>> + Send>>);

impl<T: Item> QueueStream<T> {
    pub(super) fn new(core: Arc<ChannelCore>) -> Self {
        let items = futures_util::stream::unfold(Some(core), |core| async {
            let core = core?;
            match core.get().await {
                Err(error) if error.kind() == ErrorKind::Closed => None,
                // Nothing follows these either.
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Forked) => {
                    Some((Err(error), None))
                }
                item => Some((item, Some(core))),
            }
        });
        // Polled after the end, it returns the end again.
        Self(Box::pin(items.fuse()))
    }
}

impl<T> Stream for QueueStream<T> {
    type Item = Result<T>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<T>>> {
        self.0.poll_next_unpin(cx)
    }
}

/// A sink that puts values into a queue, returned by [`Queue::sink`].
///
/// Closing it (`SinkExt::close`, or the end of `forward`) flushes it and leaves the queue open. Dropping it drops a value that
/// is not put yet. While it holds such a value it has a place in the order of waiters: other waiters of this process come
/// after it until it is flushed or dropped.
///
/// ```
/// use futures::SinkExt;
/// # multiprocess::init();
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let queue = multiprocess::Queue::unbounded()?;
/// queue.sink().send("hello".to_string()).await?;
/// assert_eq!(queue.get().await?, "hello");
/// # Ok::<_, multiprocess::Error>(()) }).unwrap();
/// ```
pub struct QueueSink<T> {
    core: Arc<ChannelCore>,
    putting: Option<Pin<Box<dyn Future<Output = Result<()>> + Send>>>,
    item: PhantomData<fn(T)>,
}

impl<T: Item> QueueSink<T> {
    pub(super) fn new(core: Arc<ChannelCore>) -> Self {
        Self { core, putting: None, item: PhantomData }
    }
}

impl<T> QueueSink<T> {
    /// Returns `true` if it holds an item that is not yet put.
    pub(super) fn holds_one(&self) -> bool {
        self.putting.is_some()
    }
}

impl<T: Item> Sink<T> for QueueSink<T> {
    type Error = Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if let Some(putting) = &mut self.putting {
            let result = ready!(putting.as_mut().poll(cx));
            self.putting = None;
            return Poll::Ready(result);
        }
        Poll::Ready(Ok(()))
    }

    fn start_send(mut self: Pin<&mut Self>, item: T) -> Result<()> {
        if self.holds_one() {
            return Err(Error::other("the sink still holds an item: wait until it is ready (`poll_ready`), or `send`"));
        }
        match self.core.try_put(item) {
            Ok(()) => Ok(()),
            Err((error, item)) if error.kind() == ErrorKind::Full => {
                let core = self.core.clone();
                self.putting = Some(Box::pin(async move { core.put(item).await.map_err(|(error, _)| error) }));
                Ok(())
            }
            Err((error, _)) => Err(error),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.poll_ready(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.poll_ready(cx)
    }
}
