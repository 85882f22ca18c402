//! Pipes: two ends, each owned by one process at a time.

use super::channel_core::ChannelCore;
use super::queue::{Item, QueueSink, QueueStream};
use super::ring::Ring;
use crate::error::{Error, ErrorKind, Result, SendError};
use crate::os::socket;
use crate::wait::{Hangup, WaitQueue};
use crate::wire::{Attachment, EncodedMessage, Payload, attach};
use futures_util::{FutureExt, Sink, SinkExt, Stream, StreamExt};
use serde::de::Error as _;
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// A pipe that is not empty holds about this many bytes before a send waits.
const BYTES: u64 = 1 << 20;

/// Creates a two-way pipe: each end receives the values that the other end sends.
///
/// Use instead:
/// - [`simplex`] for one direction;
/// - [`Queue`](crate::Queue) for several producers or consumers;
/// - [`connection`](crate::connection) to talk with another program.
///
/// ```
/// # multiprocess::init();
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let (mut left, mut right) = multiprocess::pipe::<String, usize>()?;
/// left.send("hello".into()).await?;
/// let text = right.recv().await?;
/// right.send(text.len()).await?;
/// assert_eq!(left.recv().await?, 5);
/// # Ok::<_, multiprocess::Error>(()) }).unwrap();
/// ```
///
/// A pipe is eight descriptors and about 150 KiB of shared memory.
///
/// # Errors
/// `Io` if there is not enough memory, or no descriptor is left.
pub fn pipe<S: Item, R: Item>() -> Result<(Connection<S, R>, Connection<R, S>)> {
    let create = || {
        // A socket for each direction, so that the other end of each half still notices when it is gone.
        let ((sender, there), (back, receiver)) = (direction()?, direction()?);
        Ok((Connection { sender, receiver }, Connection { sender: back, receiver: there }))
    };
    create().map_err(|error: io::Error| Error::io("cannot create a pipe", error))
}

/// Creates a one-way pipe.
///
/// Use instead:
/// - [`pipe`] for both directions;
/// - [`Queue`](crate::Queue) for several producers or consumers;
/// - [`oneshot`](crate::oneshot()) for one value.
///
/// ```
/// use multiprocess::{self as mp, Process, Sender};
///
/// async fn count(mut sender: Sender<u32>) -> mp::Result<()> {
///     for n in 0..3 {
///         sender.send(n).await?;
///     }
///     Ok(())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let (sender, mut receiver) = mp::simplex()?;
///         let child = Process::spawn(count, (sender,))?;
///         let mut sum = 0;
///         while let Ok(n) = receiver.recv().await {
///             sum += n;
///         }
///         assert_eq!(sum, 3);
///         child.await?
///     })
/// }
/// ```
///
/// It costs about half of a [`pipe`].
///
/// # Errors
/// `Io` if there is not enough memory, or no descriptor is left.
pub fn simplex<T: Item>() -> Result<(Sender<T>, Receiver<T>)> {
    direction().map_err(|error| Error::io("cannot create a pipe", error))
}

fn direction<T>() -> io::Result<(Sender<T>, Receiver<T>)> {
    let (left, right) = socket::packet_pair()?;
    let ring = Ring::create(0, BYTES)?;
    let receiver = Receiver::of(Ring::open(ring.region().fd().try_clone()?)?, right)?;
    Ok((Sender::of(ring, left)?, receiver))
}

/// Memory and socket: what makes one direction of an end up elsewhere.
fn attachments(core: &ChannelCore) -> [Attachment; 2] {
    let [memory, socket, _] = core.attachments();
    [memory, socket]
}

/// The sending end of a one-way pipe, or the sending half of a [`Connection`].
///
/// It is a serde value and can be sent to another process. It is not `Clone`: one process has it at a time. For several
/// producers use a [`Queue`](crate::Queue).
///
/// ```
/// # multiprocess::init();
/// let (mut sender, mut receiver) = multiprocess::simplex()?;
/// sender.try_send(1)?;
/// drop(sender);
/// assert_eq!(receiver.try_recv()?, 1);
/// assert_eq!(receiver.try_recv().unwrap_err().kind(), multiprocess::ErrorKind::Closed);
/// # Ok::<(), multiprocess::Error>(())
/// ```
///
/// # Waiting
/// [`send`](Self::send) waits while about 1 MiB is under way, or two values if they are larger. It is cancel safe.
///
/// # Death
/// - If the receiving end is dropped, or its process ends in any way, [`send`](Self::send) fails with `Closed`, also if it waits.
/// - If this end is dropped, or its process ends, the receiver gets the remaining values, and then `Closed`.
/// - A process killed during a send has sent the value as a whole or not at all.
///
/// # Cost
/// A send that need not wait is one copy, a few atomic operations, and a system call that checks whether the receiver exists.
/// The memory of large values is kept for the next ones, and given back, as that of a [`Queue`](crate::Queue).
///
/// # As a sink
/// A `Sender` is a [`Sink`] and may then hold a value that waits for room. Dropping the sender drops that value, and sending the
/// end elsewhere is an error meanwhile. Closing the sink (`SinkExt::close`) sends the value and leaves the pipe open.
pub struct Sender<T> {
    half: Half<T>,
    sink: Option<QueueSink<T>>,
}

/// The receiving end of a one-way pipe, or the receiving half of a [`Connection`].
///
/// It is a serde value and can be sent to another process. It is not `Clone`: one process has it at a time. It is also a
/// [`Stream`] of the values. See [`simplex`] for an example.
///
/// # Waiting
/// [`recv`](Self::recv) waits while there is no value. It is cancel safe.
///
/// # Death
/// If the sender is dropped, or its process ends in any way, its values are received first, and then `Closed`. If this
/// end is dropped, values that were not received are lost, and the sender fails with `Closed`.
pub struct Receiver<T> {
    half: Half<T>,
    stream: Option<QueueStream<T>>,
}

/// One direction of one end.
struct Half<T> {
    core: Arc<ChannelCore>,
    item: PhantomData<fn(T) -> T>,
}

impl<T> Half<T> {
    fn of(ring: Ring, socket: OwnedFd) -> io::Result<Self> {
        let socket = Arc::new(socket);
        let hangup = Hangup::new(socket.clone());
        let core = ChannelCore::new(ring, (socket.clone(), socket), Some(hangup.clone()), false, "pipe")?;
        hangup.concerns(&core.wait_queues());
        Ok(Self { core, item: PhantomData })
    }
}

impl<T> Sender<T> {
    fn of(ring: Ring, socket: OwnedFd) -> io::Result<Self> {
        Ok(Self { half: Half::of(ring, socket)?, sink: None })
    }
}

impl<T> Receiver<T> {
    fn of(ring: Ring, socket: OwnedFd) -> io::Result<Self> {
        Ok(Self { half: Half::of(ring, socket)?, stream: None })
    }
}

impl Sender<EncodedMessage> {
    /// Sends a message that is encoded, from where it lies; blocks this thread. After an error it is lost.
    pub(crate) fn blocking_send_encoded(&mut self, payload: Payload<'_>, attachments: &[Attachment]) -> Result<()> {
        self.half.core.blocking_put_encoded(payload, attachments)
    }
}

impl<T: Item> Sender<T> {
    /// Sends `value`, and waits while about 1 MiB is under way.
    ///
    /// Cancel safe at any size: a dropped future has sent nothing.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let (mut sender, mut receiver) = multiprocess::simplex()?;
    /// sender.send(1).await?;
    /// assert_eq!(receiver.recv().await?, 1);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// All of them return the value.
    /// - `Closed` if the receiver is gone.
    /// - `Encode` if `value` cannot be serialised, or is too large.
    /// - `Io` if there is not enough memory, or if it must wait outside a tokio runtime, or without a resource that
    ///   waiting needs.
    pub async fn send(&mut self, value: T) -> Result<(), SendError<T>> {
        // Values given to the sink come first.
        if let Some(sink) = &mut self.sink
            && let Err(error) = sink.flush().await
        {
            return Err(SendError::new(error, value));
        }
        self.half.core.put(value).await.map_err(|(error, value)| SendError::new(error, value))
    }

    /// Sends `value` if that need not wait.
    ///
    /// ```
    /// # multiprocess::init();
    /// let (mut sender, mut receiver) = multiprocess::simplex()?;
    /// sender.try_send(1)?;
    /// assert_eq!(receiver.try_recv()?, 1);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Full` if there is no room, or an item that this end took as a [`Sink`] still waits for room. Otherwise as
    /// [`send`](Self::send). The error returns the value.
    pub fn try_send(&mut self, value: T) -> Result<(), SendError<T>> {
        if let Err(error) = self.try_flush() {
            return Err(SendError::new(error, value));
        }
        self.half.core.try_put(value).map_err(|(error, value)| SendError::new(error, value))
    }

    /// [`try_send`](Self::try_send) without a system call if no process sleeps, for a caller that learns of the other end's
    /// death by another way: it may accept `value` although the other end is gone. Returns whether the receiver had to be
    /// woken.
    pub(crate) fn try_send_blindly(&mut self, value: T) -> Result<bool, SendError<T>> {
        self.half.core.try_put_blindly(value).map_err(|(error, value)| SendError::new(error, value))
    }

    /// This end for a sender that counts what is under way itself, and may exceed the limit of the pipe with messages that must not wait.
    pub(crate) fn beyond_limit(self) -> Self {
        self.half.core.ignore_byte_limit();
        self
    }

    /// Returns how many values are under way.
    pub(crate) fn under_way(&self) -> usize {
        self.half.core.len()
    }

    /// The waiters for a message at the other end.
    pub(crate) fn items(&self) -> &Arc<WaitQueue> {
        self.half.core.wait_queues()[1]
    }

    /// The notification that there is room again.
    pub(crate) fn room(&self) -> &Arc<WaitQueue> {
        self.half.core.wait_queues()[0]
    }

    /// Waits until the other end is gone.
    #[cfg(not(multiprocess_loom))]
    pub(super) async fn closed(&mut self) -> Result<()> {
        self.half.core.hung_up().await
    }

    /// Returns `true` if the other end is gone.
    #[cfg(not(multiprocess_loom))]
    pub(super) fn is_closed(&self) -> bool {
        self.half.core.is_hung_up()
    }

    /// Sends `value`, blocking this thread while about 1 MiB is under way.
    ///
    /// ```
    /// # multiprocess::init();
    /// let (mut sender, mut receiver) = multiprocess::simplex()?;
    /// sender.blocking_send(1)?;
    /// assert_eq!(receiver.try_recv()?, 1);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// `Full` if an item that this end took as a [`Sink`] still waits for room, which only a runtime can send. Otherwise as
    /// [`send`](Self::send).
    #[track_caller]
    pub fn blocking_send(&mut self, value: T) -> Result<(), SendError<T>> {
        if let Err(error) = self.try_flush() {
            return Err(SendError::new(error, value));
        }
        self.half.core.blocking_put(value).map_err(|(error, value)| SendError::new(error, value))
    }

    /// Sends the values given to the sink first, or nothing.
    fn try_flush(&mut self) -> Result<()> {
        let Some(sink) = self.sink.as_mut().filter(|sink| sink.holds_one()) else { return Ok(()) };
        // Its future belongs to a runtime and must not be polled elsewhere.
        let is_polled = tokio::runtime::Handle::try_current().is_ok();
        let flushed = if is_polled { sink.flush().now_or_never() } else { None };
        let waits = || Error::new(ErrorKind::Full, "an item that the pipe took as a sink still waits for room");
        flushed.unwrap_or_else(|| Err(waits()))
    }
}

impl<T: Item> Receiver<T> {
    /// Receives the next value, and waits while there is none.
    ///
    /// Cancel safe at any size: a dropped future has taken nothing.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let (mut sender, mut receiver) = multiprocess::simplex()?;
    /// sender.send("hello".to_string()).await?;
    /// assert_eq!(receiver.recv().await?, "hello");
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// - `Closed` if the sender is gone and all that it sent is received.
    /// - `Decode` if the value cannot be read as `T`, or its descriptors do not fit into this process. The value is
    ///   lost; the pipe can still be used.
    /// - `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs.
    pub async fn recv(&mut self) -> Result<T> {
        self.stream = None;
        self.half.core.get().await
    }

    /// Receives a value if there is one now.
    ///
    /// ```
    /// # multiprocess::init();
    /// let (mut sender, mut receiver) = multiprocess::simplex()?;
    /// assert_eq!(receiver.try_recv().unwrap_err().kind(), multiprocess::ErrorKind::Empty);
    /// sender.try_send(1)?;
    /// assert_eq!(receiver.try_recv()?, 1);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Empty` if there is none. Otherwise as [`recv`](Self::recv).
    pub fn try_recv(&mut self) -> Result<T> {
        self.stream = None;
        self.half.core.try_get()
    }

    /// Receives the next value, blocking this thread while there is none.
    ///
    /// ```
    /// # multiprocess::init();
    /// let (mut sender, mut receiver) = multiprocess::simplex()?;
    /// sender.blocking_send(1)?;
    /// assert_eq!(receiver.blocking_recv()?, 1);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    #[track_caller]
    pub fn blocking_recv(&mut self) -> Result<T> {
        self.stream = None;
        self.half.core.blocking_get()
    }

    /// Receives the next value, and waits at most `timeout` for it.
    ///
    /// Cancel safe: after a timeout, too, it has taken nothing. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let (mut sender, mut receiver) = multiprocess::simplex()?;
    /// sender.send(1).await?;
    /// assert_eq!(receiver.recv_timeout(std::time::Duration::from_secs(5)).await?, 1);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// - `Timeout` if there was no value in time.
    /// - `Io` if the runtime has no timer.
    /// - Otherwise as [`recv`](Self::recv).
    pub async fn recv_timeout(&mut self, timeout: Duration) -> Result<T> {
        self.stream = None;
        self.half.core.get_timeout(timeout).await
    }

    /// Waits at most `timeout` until there is a value to receive, and returns `true` if there is one.
    ///
    /// It takes no value. At the end of the pipe it also returns `true`: then [`recv`](Self::recv) fails with `Closed` without
    /// waiting.
    ///
    /// Cancel safe: dropping the future changes nothing. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let (mut sender, mut receiver) = multiprocess::simplex()?;
    /// sender.send(1).await?;
    /// assert!(receiver.poll(std::time::Duration::ZERO).await?);
    /// assert_eq!(receiver.recv().await?, 1);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Io` outside a tokio runtime, or if the runtime has no timer.
    pub async fn poll(&mut self, timeout: Duration) -> Result<bool> {
        self.stream = None;
        self.half.core.poll(timeout).await
    }
}

impl<T: Item> Receiver<T> {
    /// How many messages were taken out, also those that could not be received whole, as a number that wraps around.
    pub(crate) fn taken(&self) -> Option<u32> {
        self.half.core.taken()
    }

    /// Returns this end for many readers at once.
    pub(crate) fn into_shared(self) -> SharedReceiver<T> {
        SharedReceiver(self.half)
    }
}

/// A receiving end that is read by any caller, and by the reader of its wait queue.
pub(crate) struct SharedReceiver<T>(Half<T>);

impl<T: Item> SharedReceiver<T> {
    /// The message to receive, for a caller that [`wait_queue`](Self::wait_queue) notifies when that changes.
    pub(crate) fn next(&self) -> Option<Result<T>> {
        self.0.core.next_when_notified()
    }

    /// Returns `true` if [`next`](Self::next) would yield nothing.
    pub(crate) fn has_nothing(&self) -> bool {
        self.0.core.has_nothing_known()
    }

    /// Returns `true` if the other end is gone, for a caller that [listens](Self::listen).
    pub(crate) fn has_hung_up(&self) -> bool {
        self.0.core.is_known_hung_up()
    }

    /// From now on a runtime watches for the death of the other end, so that no call need ask. Fails outside of a runtime.
    pub(crate) fn listen(&self) -> io::Result<()> {
        self.wait_queue().listen()
    }

    /// The waiters for a message.
    pub(crate) fn wait_queue(&self) -> &Arc<WaitQueue> {
        self.0.core.wait_queues()[1]
    }
}

impl<T: Item> Stream for Receiver<T> {
    type Item = Result<T>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<T>>> {
        let this = self.get_mut();
        this.stream.get_or_insert_with(|| QueueStream::new(this.half.core.clone())).poll_next_unpin(cx)
    }
}

impl<T: Item> Sender<T> {
    fn sink(&mut self) -> &mut QueueSink<T> {
        self.sink.get_or_insert_with(|| QueueSink::new(self.half.core.clone()))
    }
}

impl<T: Item> Sink<T> for Sender<T> {
    type Error = Error;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.get_mut().sink().poll_ready_unpin(cx)
    }

    fn start_send(self: Pin<&mut Self>, value: T) -> Result<()> {
        self.get_mut().sink().start_send_unpin(value)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.get_mut().sink().poll_flush_unpin(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.get_mut().sink().poll_close_unpin(cx)
    }
}

/// One end of a two-way pipe: it sends `S` and receives `R`. For connections to other programs see
/// [`connection`](crate::connection).
///
/// It is a serde value and can be sent to another process. It is not `Clone`: one process has it at a time. Waiting, death and
/// cost of its directions are those of [`Sender`] and [`Receiver`]. See [`pipe`] for an example.
pub struct Connection<S, R> {
    sender: Sender<S>,
    receiver: Receiver<R>,
}

impl<S: Item, R: Item> Connection<S, R> {
    /// Sends a value; waits and drops as [`Sender::send`].
    ///
    /// # Errors
    /// As [`Sender::send`].
    pub async fn send(&mut self, value: S) -> Result<(), SendError<S>> {
        self.sender.send(value).await
    }

    /// Sends a value if that need not wait: see [`Sender::try_send`].
    ///
    /// # Errors
    /// As [`Sender::try_send`].
    pub fn try_send(&mut self, value: S) -> Result<(), SendError<S>> {
        self.sender.try_send(value)
    }

    /// Sends a value, blocking this thread: see [`Sender::blocking_send`].
    ///
    /// # Panics
    /// Inside async code.
    ///
    /// # Errors
    /// As [`Sender::blocking_send`].
    #[track_caller]
    pub fn blocking_send(&mut self, value: S) -> Result<(), SendError<S>> {
        self.sender.blocking_send(value)
    }

    /// Receives the next value; waits and drops as [`Receiver::recv`].
    ///
    /// # Errors
    /// As [`Receiver::recv`].
    pub async fn recv(&mut self) -> Result<R> {
        self.receiver.recv().await
    }

    /// Receives a value if there is one now: see [`Receiver::try_recv`].
    ///
    /// # Errors
    /// As [`Receiver::try_recv`].
    pub fn try_recv(&mut self) -> Result<R> {
        self.receiver.try_recv()
    }

    /// Receives the next value, blocking this thread: see [`Receiver::blocking_recv`].
    ///
    /// # Panics
    /// Inside async code.
    ///
    /// # Errors
    /// As [`Receiver::blocking_recv`].
    #[track_caller]
    pub fn blocking_recv(&mut self) -> Result<R> {
        self.receiver.blocking_recv()
    }

    /// Receives the next value, and waits at most `timeout`; drops as [`Receiver::recv_timeout`].
    ///
    /// # Errors
    /// As [`Receiver::recv_timeout`].
    pub async fn recv_timeout(&mut self, timeout: Duration) -> Result<R> {
        self.receiver.recv_timeout(timeout).await
    }

    /// Waits at most `timeout` until there is a value to receive, and returns `true` if there is one; drops as
    /// [`Receiver::poll`].
    ///
    /// # Errors
    /// As [`Receiver::poll`].
    pub async fn poll(&mut self, timeout: Duration) -> Result<bool> {
        self.receiver.poll(timeout).await
    }

    /// Splits this end into its two directions, for two tasks or two processes.
    ///
    /// The drop of a half ends its direction only.
    ///
    /// ```
    /// # multiprocess::init();
    /// let (left, mut right) = multiprocess::pipe::<u8, u8>()?;
    /// let (sender, mut receiver) = left.split();
    /// right.try_send(1)?;
    /// drop(sender);
    /// assert_eq!(receiver.try_recv()?, 1);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn split(self) -> (Sender<S>, Receiver<R>) {
        (self.sender, self.receiver)
    }
}

impl<S: Item, R: Item> Stream for Connection<S, R> {
    type Item = Result<R>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<R>>> {
        self.get_mut().receiver.poll_next_unpin(cx)
    }
}

impl<S: Item, R: Item> Sink<S> for Connection<S, R> {
    type Error = Error;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.get_mut().sender.poll_ready_unpin(cx)
    }

    fn start_send(self: Pin<&mut Self>, value: S) -> Result<()> {
        self.get_mut().sender.start_send_unpin(value)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.get_mut().sender.poll_flush_unpin(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.get_mut().sender.poll_close_unpin(cx)
    }
}

impl<T> Sender<T> {
    /// Why this end cannot go elsewhere now.
    fn stays(&self) -> Option<&'static str> {
        let holds_one = self.sink.as_ref().is_some_and(QueueSink::holds_one);
        holds_one
            .then_some("an item that the pipe took as a sink still waits for room: flush it before its end travels")
    }
}

impl<T> Receiver<T> {
    fn stays(&self) -> Option<&'static str> {
        None
    }
}

macro_rules! half_serde {
    ($name:ident) => {
        impl<T> Serialize for $name<T> {
            fn serialize<Z: Serializer>(&self, serializer: Z) -> Result<Z::Ok, Z::Error> {
                if let Some(why) = self.stays() {
                    return Err(Z::Error::custom(why));
                }
                let kind = concat!("`", stringify!($name), "` of a pipe");
                let attachments = attachments(&self.half.core).map(|attachment| attachment.of(kind));
                attach::serialize_handle(serializer, attachments, stringify!($name))
            }
        }

        impl<'de, T> Deserialize<'de> for $name<T> {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let ([memory, socket], kind): (_, String) = attach::deserialize_handle(deserializer)?;
                if kind != stringify!($name) {
                    return Err(D::Error::custom("an end of another kind"));
                }
                let open = || Self::of(Ring::open(memory)?, socket);
                open().map_err(|error| D::Error::custom(Error::io("a pipe cannot be opened", error)))
            }
        }

        impl<T> fmt::Debug for $name<T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).field("under_way", &self.half.core.len()).finish()
            }
        }
    };
}

half_serde!(Sender);
half_serde!(Receiver);

impl<S, R> Serialize for Connection<S, R> {
    fn serialize<Z: Serializer>(&self, serializer: Z) -> Result<Z::Ok, Z::Error> {
        (&self.sender, &self.receiver).serialize(serializer)
    }
}

impl<'de, S, R> Deserialize<'de> for Connection<S, R> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (sender, receiver) = Deserialize::deserialize(deserializer)?;
        Ok(Self { sender, receiver })
    }
}

impl<S, R> fmt::Debug for Connection<S, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("sender", &self.sender).field("receiver", &self.receiver).finish()
    }
}
