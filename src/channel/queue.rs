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

/// What a queue of `T` needs of `T`.
pub trait Item: Serialize + DeserializeOwned + Send + 'static {}
impl<T: Serialize + DeserializeOwned + Send + 'static> Item for T {}

/// A queue across processes: many producers, many consumers, first in, first out.
///
/// A handle is cheap to clone and is itself a serde value: it travels as an argument, in a result, inside other
/// values, through other queues. The queue lives as long as any process has a handle, or one is on its way.
///
/// **Waiting.** [`put`](Queue::put) waits only if the queue is bounded and full, [`get`](Queue::get) while it is
/// empty. Both are cancel-safe: a dropped future has put or taken nothing. A future takes its place in line at its
/// first poll. **Death.** A process killed in the middle of an operation harms nobody else: its put has happened
/// whole or not at all. A process that is only stopped (SIGSTOP) keeps the wake that it was given, so that an item may wait for
/// it while others sleep, until the next put or get; stopped in the middle of a copy, it holds up all others that put,
/// or get, until it goes on or is killed: they wait, [`try_put`](Queue::try_put) says `Full` after a tenth of a second,
/// [`try_get`](Queue::try_get) `Empty`, and [`close`](Queue::close) blocks until puts are possible. **Cost.** An operation that need not wait is a copy and a few atomics, with no system call
/// unless it wakes somebody; a queue is three descriptors and 72 KiB, and a backlog is given back when it is drained.
/// **Limits.** A message is smaller than 4 GiB. Some 270 undelivered messages that carry descriptors fill the
/// kernel's socket; then a put of one more such message waits, in an unbounded queue too.
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
pub struct Queue<T> {
    core: Arc<ChannelCore>,
    item: PhantomData<fn(T) -> T>,
}

/// The queues that this process has mapped, so that one received twice is mapped once.
static MAPPED: Mapped<ChannelCore> = Mapped::new();

fn create(item_limit: u64, is_joinable: bool) -> Result<Arc<ChannelCore>> {
    let create = || {
        let ring = Ring::create(item_limit, 0)?;
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
    open().map_err(|error| D::Error::custom(format_args!("a queue cannot be opened: {error}")))
}

fn put_error<T>((error, value): Refused<T>) -> PutError<T> {
    PutError::new(error, value)
}

impl<T: Item> Queue<T> {
    /// A queue without a limit: `put` never waits for room.
    ///
    /// # Errors
    /// `Io` if there is no memory or descriptor left.
    pub fn unbounded() -> Result<Self> {
        Ok(Self { core: create(0, false)?, item: PhantomData })
    }

    /// A queue of at most `capacity` items, of any size each.
    ///
    /// # Errors
    /// `Other` for a capacity of 0 or beyond 2^31, `Io` if there is no memory or descriptor left.
    pub fn bounded(capacity: usize) -> Result<Self> {
        Ok(Self { core: create(check_capacity(capacity)?, false)?, item: PhantomData })
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
            /// Puts `value` at the end; waits while the queue is full. Cancel-safe: dropped, it has put nothing.
            ///
            /// # Errors
            /// `Closed`, `Encode` if `value` cannot be serialised, `Io` if memory runs out; the value comes back.
            pub async fn put(&self, value: T) -> Result<(), PutError<T>> {
                self.core.put(value).await.map_err(put_error)
            }

            /// Takes the first item; waits while there is none. Cancel-safe: dropped, it has taken nothing.
            ///
            /// # Errors
            /// `Closed` once the queue is closed and drained; `Decode` if the item cannot be read as `T`, or its
            /// descriptors do not fit into this process: that item is then gone, the queue goes on.
            pub async fn get(&self) -> Result<T> {
                self.core.get().await
            }

            /// Puts `value` if there is room now.
            ///
            /// # Errors
            /// `Full`, else as [`put`](Self::put); the value comes back.
            pub fn try_put(&self, value: T) -> Result<(), TryPutError<T>> {
                self.core.try_put(value).map_err(|(error, value)| TryPutError::new(error, value))
            }

            /// Takes the first item if there is one now.
            ///
            /// # Errors
            /// `Empty`, else as [`get`](Self::get).
            pub fn try_get(&self) -> Result<T> {
                self.core.try_get()
            }

            /// [`put`](Self::put) for plain functions: blocks this thread.
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

            /// [`get`](Self::get) for plain functions: blocks this thread.
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

            /// [`put`](Self::put) that gives up after `timeout`. Counted in real time: see [Timeouts](crate#timeouts).
            ///
            /// # Errors
            /// `Timeout`, `Io` where there is no tokio timer, else as [`put`](Self::put); the value comes back.
            pub async fn put_timeout(&self, value: T, timeout: Duration) -> Result<(), PutError<T>> {
                self.core.put_timeout(value, timeout).await.map_err(put_error)
            }

            /// [`get`](Self::get) that gives up after `timeout`, and then has taken nothing.
            /// Counted in real time: see [Timeouts](crate#timeouts).
            ///
            /// # Errors
            /// `Timeout`, `Io` where there is no tokio timer, else as [`get`](Self::get).
            pub async fn get_timeout(&self, timeout: Duration) -> Result<T> {
                self.core.get_timeout(timeout).await
            }

            /// Takes the first item on lease: it leaves the queue when the [`Lease`] is committed, and is there again, at the front,
            /// if the lease is dropped or its process ends. Waits while there is no item. Cancel-safe: dropped, it has taken
            /// nothing.
            ///
            /// # Errors
            /// As [`get`](Self::get); `Full` if 1024 items are leased or dead letters.
            #[cfg(not(multiprocess_loom))]
            pub async fn lease(&self) -> Result<Lease<T>> {
                Ok(Lease::of(&self.core, self.core.lease().await?))
            }

            /// Takes the first item on lease if there is one now.
            ///
            /// # Errors
            /// `Empty`, else as [`lease`](Self::lease).
            #[cfg(not(multiprocess_loom))]
            pub fn try_lease(&self) -> Result<Lease<T>> {
                Ok(Lease::of(&self.core, self.core.try_lease()?))
            }

            /// [`lease`](Self::lease) for plain functions: blocks this thread.
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

            /// [`lease`](Self::lease) that gives up after `timeout`, and then has taken nothing.
            /// Counted in real time: see [Timeouts](crate#timeouts).
            ///
            /// # Errors
            /// `Timeout`, `Io` where there is no tokio timer, else as [`lease`](Self::lease).
            #[cfg(not(multiprocess_loom))]
            pub async fn lease_timeout(&self, timeout: Duration) -> Result<Lease<T>> {
                Ok(Lease::of(&self.core, self.core.lease_timeout(timeout).await?))
            }

            /// Leases as a stream, which ends when the queue is closed and nothing in it is left or leased. Dropping it loses
            /// nothing.
            #[cfg(not(multiprocess_loom))]
            pub fn leases(&self) -> impl Stream<Item = Result<Lease<T>>> + Send + Unpin + use<T> {
                lease::leases(self.core.clone())
            }

            /// From now on an item that was leased `most` times without a commit goes to the
            /// [`dead_letters`](Self::dead_letters), for all who lease; 0 is no limit, as at the beginning. Returns this queue.
            #[cfg(not(multiprocess_loom))]
            pub fn max_deliveries(&self, most: u32) -> Self {
                self.core.set_max_deliveries(most);
                self.clone()
            }

            /// The items that were leased too often; see [`max_deliveries`](Self::max_deliveries). They count for nothing else.
            #[cfg(not(multiprocess_loom))]
            pub fn dead_letters(&self) -> DeadLetters<T> {
                DeadLetters::of(&self.core)
            }

            /// How many items there are, those on lease included: exact while nobody puts or takes.
            pub fn len(&self) -> usize {
                self.core.len()
            }

            /// Whether there is no item.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            /// Whether a bounded queue has no room.
            pub fn is_full(&self) -> bool {
                self.capacity().is_some_and(|capacity| self.core.waiting() >= capacity)
            }

            /// How many items fit, or `None` if the queue is unbounded.
            pub fn capacity(&self) -> Option<usize> {
                self.core.ring().item_limit()
            }

            /// Closes the queue for everybody: puts fail from now on, gets drain it and then say `Closed`. Wakes
            /// all who wait, in every process. Closing twice is fine.
            pub fn close(&self) {
                self.core.close();
            }

            /// Whether the queue is closed.
            pub fn is_closed(&self) -> bool {
                self.core.ring().is_closed()
            }

            /// The items as a stream that ends when the queue is closed and drained. Dropping it loses nothing.
            pub fn stream(&self) -> QueueStream<T> {
                QueueStream::new(self.core.clone())
            }

            /// A sink that puts what it is sent.
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

/// A [`Queue`] that knows when everything taken from it has been dealt with.
///
/// Each `get` that yields an item is to be followed by one [`task_done`](JoinableQueue::task_done); [`join`](JoinableQueue::join) waits
/// until nothing is left to take or to finish. What a process took and did not finish before it died or exited
/// counts as finished, so a killed consumer makes nobody wait for ever.
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
pub struct JoinableQueue<T> {
    core: Arc<ChannelCore>,
    item: PhantomData<fn(T) -> T>,
}

impl<T: Item> JoinableQueue<T> {
    /// As [`Queue::unbounded`].
    ///
    /// # Errors
    /// `Io` if there is no memory or descriptor left.
    pub fn unbounded() -> Result<Self> {
        Ok(Self { core: create(0, true)?, item: PhantomData })
    }

    /// As [`Queue::bounded`].
    ///
    /// # Errors
    /// `Other` for a capacity of 0 or beyond 2^31, `Io` if there is no memory or descriptor left.
    pub fn bounded(capacity: usize) -> Result<Self> {
        Ok(Self { core: create(check_capacity(capacity)?, true)?, item: PhantomData })
    }

    /// Says that one item taken from this queue has been dealt with: by this process, or else by another.
    ///
    /// # Errors
    /// `Other` if no taken item is unfinished.
    pub fn task_done(&self) -> Result<()> {
        self.core.task_done()
    }

    /// Waits until the queue is empty and every item taken is done. Cancel-safe.
    ///
    /// # Errors
    /// `Io` outside a tokio runtime.
    pub async fn join(&self) -> Result<()> {
        self.core.join().await
    }

    /// [`join`](Self::join) for plain functions: blocks this thread.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// `Io` if this process cannot wait.
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

/// The items of a queue as they come; made by [`Queue::stream`].
///
/// Once it has been polled in vain it has its place in line, as a `get` has: others of this process that wait for the
/// queue come after it, so poll it again or drop it.
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
                // Nothing follows this either.
                Err(error) if error.kind() == ErrorKind::Corrupt => Some((Err(error), None)),
                item => Some((item, Some(core))),
            }
        });
        // Whoever asks again after the end hears again that it is the end.
        Self(Box::pin(items.fuse()))
    }
}

impl<T> Stream for QueueStream<T> {
    type Item = Result<T>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<T>>> {
        self.0.poll_next_unpin(cx)
    }
}

/// Puts what it is sent into a queue; made by [`Queue::sink`]. Dropping it drops an item that was not yet put; closing it
/// (`SinkExt::close`, or the end of `forward`) flushes it and leaves the queue open.
///
/// While it holds an item for which there is no room it has its place in line, as a `put` has: others of this process
/// that wait for room come after it, so flush it or drop it.
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
    /// Whether it holds an item that is not yet put.
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
