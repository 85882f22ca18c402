//! Pipes: two ends, each owned by one process at a time.

use super::channel_core::ChannelCore;
use super::queue::{Item, QueueSink, QueueStream};
use super::ring::Ring;
use crate::error::{Error, ErrorKind, Result, SendError};
use crate::os::socket;
use crate::wait::{Hangup, WaitQueue};
use crate::wire::{Attachment, attach};
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

/// A duplex pipe: what one end sends, the other receives.
///
/// Costs eight descriptors and about 150 KiB of shared memory.
///
/// # Errors
/// `Io` if there is no memory or descriptor left.
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
pub fn pipe<S: Item, R: Item>() -> Result<(Connection<S, R>, Connection<R, S>)> {
    let create = || {
        // A socket for each direction, so that halves may part and each still tells when it is gone.
        let ((sender, there), (back, receiver)) = (direction()?, direction()?);
        Ok((Connection { sender, receiver }, Connection { sender: back, receiver: there }))
    };
    create().map_err(|error: io::Error| Error::io("cannot create a pipe", error))
}

/// A one-way pipe. Costs about half of a [`pipe`].
///
/// # Errors
/// `Io` if there is no memory or descriptor left.
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
/// It is a serde value and travels to other processes; it is not `Clone`: one process has it at a time. The pipe
/// tells at once when the other end is gone, however its process ended. As a [`Sink`] it may hold an item that waits for
/// room: dropping it drops that item, travelling with it is an error, and closing it (`SinkExt::close`) sends that item, no
/// more; the pipe ends when the sender is dropped. See [`simplex`] for an example.
pub struct Sender<T> {
    half: Half<T>,
    sink: Option<QueueSink<T>>,
}

/// The receiving end of a one-way pipe, or the receiving half of a [`Connection`].
///
/// It is a serde value and travels to other processes; it is not `Clone`: one process has it at a time. What was
/// sent before the other end went away is received before `Closed` is. See [`simplex`] for an example.
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

impl<T: Item> Sender<T> {
    /// Sends `value`; waits while about 1 MiB is under way. Cancel-safe at any size: dropped, it has sent nothing.
    ///
    /// # Errors
    /// `Closed` if the other end is gone, `Encode` if `value` cannot be serialised; the value comes back.
    pub async fn send(&mut self, value: T) -> Result<(), SendError<T>> {
        // What the sink was given comes first.
        if let Some(sink) = &mut self.sink
            && let Err(error) = sink.flush().await
        {
            return Err(SendError::new(error, value));
        }
        self.half.core.put(value).await.map_err(|(error, value)| SendError::new(error, value))
    }

    /// Sends `value` if it need not wait.
    ///
    /// # Errors
    /// `Full`, also while an item that this end took as a [`Sink`] still waits for room; else as
    /// [`send`](Self::send); the value comes back.
    pub fn try_send(&mut self, value: T) -> Result<(), SendError<T>> {
        if let Err(error) = self.try_flush() {
            return Err(SendError::new(error, value));
        }
        self.half.core.try_put(value).map_err(|(error, value)| SendError::new(error, value))
    }

    /// [`try_send`](Self::try_send) without a system call where nobody sleeps, for somebody who hears of the other end's
    /// going by another way: it may take `value` though there is nobody any more. Tells whether the receiver had to be
    /// woken.
    pub(crate) fn try_send_blindly(&mut self, value: T) -> Result<bool, SendError<T>> {
        self.half.core.try_put_blindly(value).map_err(|(error, value)| SendError::new(error, value))
    }

    /// This end for a sender that counts what is under way itself, and may exceed the limit of the pipe with messages that must not wait.
    pub(crate) fn beyond_limit(self) -> Self {
        self.half.core.ignore_byte_limit();
        self
    }

    /// How many values are under way.
    pub(crate) fn under_way(&self) -> usize {
        self.half.core.len()
    }

    /// The waiters for a message at the other end.
    pub(crate) fn items(&self) -> &Arc<WaitQueue> {
        self.half.core.wait_queues()[1]
    }

    /// Where it is told that there is room again.
    pub(crate) fn room(&self) -> &Arc<WaitQueue> {
        self.half.core.wait_queues()[0]
    }

    /// Waits until the other end is gone.
    #[cfg(not(multiprocess_loom))]
    pub(super) async fn closed(&mut self) -> Result<()> {
        self.half.core.hung_up().await
    }

    /// Whether the other end is gone.
    #[cfg(not(multiprocess_loom))]
    pub(super) fn is_closed(&self) -> bool {
        self.half.core.is_hung_up()
    }

    /// [`send`](Self::send) for plain functions: blocks this thread.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`send`](Self::send), and `Full` while an item that this end took as a [`Sink`] still waits for room: only
    /// a runtime can send that.
    #[track_caller]
    pub fn blocking_send(&mut self, value: T) -> Result<(), SendError<T>> {
        if let Err(error) = self.try_flush() {
            return Err(SendError::new(error, value));
        }
        self.half.core.blocking_put(value).map_err(|(error, value)| SendError::new(error, value))
    }

    /// What the sink was given goes first, or nothing does.
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
    /// Receives the next value; waits while there is none. Cancel-safe at any size: dropped, it has taken nothing.
    ///
    /// # Errors
    /// `Closed` once the other end is gone and everything it sent is received; `Decode` if a value cannot be read
    /// as `T` or its descriptors do not fit into this process: that value is gone, the pipe goes on.
    pub async fn recv(&mut self) -> Result<T> {
        self.stream = None;
        self.half.core.get().await
    }

    /// Receives a value if there is one.
    ///
    /// # Errors
    /// `Empty`, else as [`recv`](Self::recv).
    pub fn try_recv(&mut self) -> Result<T> {
        self.stream = None;
        self.half.core.try_get()
    }

    /// [`recv`](Self::recv) for plain functions: blocks this thread.
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

    /// [`recv`](Self::recv) that gives up after `timeout`, and then has taken nothing.
    /// Counted in real time: see [Timeouts](crate#timeouts).
    ///
    /// # Errors
    /// `Timeout`, `Io` where there is no tokio timer, else as [`recv`](Self::recv).
    pub async fn recv_timeout(&mut self, timeout: Duration) -> Result<T> {
        self.stream = None;
        self.half.core.get_timeout(timeout).await
    }

    /// Waits up to `timeout` until there is something to receive, which it leaves where it is. True also at the
    /// end of the pipe, where `recv` says `Closed` at once. Counted in real time: see [Timeouts](crate#timeouts).
    ///
    /// # Errors
    /// `Io` outside a tokio runtime, or in one without a timer.
    pub async fn poll(&mut self, timeout: Duration) -> Result<bool> {
        self.stream = None;
        self.half.core.poll(timeout).await
    }
}

impl<T: Item> Receiver<T> {
    /// This end for many who read it at once.
    pub(crate) fn into_shared(self) -> SharedReceiver<T> {
        SharedReceiver(self.half)
    }
}

/// A receiving end that is read by whoever looks, and by its line's reader.
pub(crate) struct SharedReceiver<T>(Half<T>);

impl<T: Item> SharedReceiver<T> {
    /// What there is to receive, for somebody who is told by [`wait_queue`](Self::wait_queue) when that changes.
    pub(crate) fn next(&self) -> Option<Result<T>> {
        self.0.core.next_when_notified()
    }

    /// Whether [`next`](Self::next) would yield nothing.
    pub(crate) fn has_nothing(&self) -> bool {
        self.0.core.has_nothing_known()
    }

    /// Whether the other end is gone, for somebody who [listens](Self::listen).
    pub(crate) fn has_hung_up(&self) -> bool {
        self.0.core.is_known_hung_up()
    }

    /// From now on a runtime tells when the other end goes, so that nobody need ask. It fails outside of one.
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

/// One end of a duplex pipe: sends `S`, receives `R`.
///
/// It is a serde value and travels to other processes; it is not `Clone`: one process has it at a time. See
/// [`pipe`] for an example.
pub struct Connection<S, R> {
    sender: Sender<S>,
    receiver: Receiver<R>,
}

impl<S: Item, R: Item> Connection<S, R> {
    /// As [`Sender::send`].
    ///
    /// # Errors
    /// As [`Sender::send`]; the value comes back.
    pub async fn send(&mut self, value: S) -> Result<(), SendError<S>> {
        self.sender.send(value).await
    }

    /// As [`Sender::try_send`].
    ///
    /// # Errors
    /// As [`Sender::try_send`]; the value comes back.
    pub fn try_send(&mut self, value: S) -> Result<(), SendError<S>> {
        self.sender.try_send(value)
    }

    /// As [`Sender::blocking_send`].
    ///
    /// # Panics
    /// Inside async code.
    ///
    /// # Errors
    /// As [`Sender::send`]; the value comes back.
    #[track_caller]
    pub fn blocking_send(&mut self, value: S) -> Result<(), SendError<S>> {
        self.sender.blocking_send(value)
    }

    /// As [`Receiver::recv`].
    ///
    /// # Errors
    /// As [`Receiver::recv`].
    pub async fn recv(&mut self) -> Result<R> {
        self.receiver.recv().await
    }

    /// As [`Receiver::try_recv`].
    ///
    /// # Errors
    /// As [`Receiver::try_recv`].
    pub fn try_recv(&mut self) -> Result<R> {
        self.receiver.try_recv()
    }

    /// As [`Receiver::blocking_recv`].
    ///
    /// # Panics
    /// Inside async code.
    ///
    /// # Errors
    /// As [`Receiver::recv`].
    #[track_caller]
    pub fn blocking_recv(&mut self) -> Result<R> {
        self.receiver.blocking_recv()
    }

    /// As [`Receiver::recv_timeout`]. Counted in real time: see [Timeouts](crate#timeouts).
    ///
    /// # Errors
    /// As [`Receiver::recv_timeout`].
    pub async fn recv_timeout(&mut self, timeout: Duration) -> Result<R> {
        self.receiver.recv_timeout(timeout).await
    }

    /// As [`Receiver::poll`]. Counted in real time: see [Timeouts](crate#timeouts).
    ///
    /// # Errors
    /// As [`Receiver::poll`].
    pub async fn poll(&mut self, timeout: Duration) -> Result<bool> {
        self.receiver.poll(timeout).await
    }

    /// The two directions of this end, for two tasks or two processes. A half that goes ends its direction.
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
                open().map_err(|error| D::Error::custom(format_args!("a pipe cannot be opened: {error}")))
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
