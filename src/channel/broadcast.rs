//! A broadcast: each receiver gets every value that is sent.

use super::queue::Item;
use super::recent::{self, Alive, Recent, Shape};
use crate::error::{Error, ErrorKind, Result, SendError};
use crate::os::timer;
use crate::wait::refuse_inside_async;
use futures_util::{Stream, StreamExt};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

/// Creates a broadcast: each receiver gets every value that is sent after it was made. The last `capacity` values are kept.
///
/// Use instead:
/// - [`Queue`](crate::Queue) if each value is for one receiver;
/// - [`watch`](crate::watch()) if only the newest value counts.
///
/// It corresponds to `tokio::sync::broadcast` within one process. A sender waits for no receiver. A receiver that falls more than
/// `capacity` values behind gets one error of kind `Lagged`, with the number of values that it missed, and continues with the
/// oldest value that is kept.
///
/// ```
/// use multiprocess::{self as mp, BroadcastReceiver, ErrorKind, Process};
///
/// async fn sum(mut numbers: BroadcastReceiver<u32>) -> mp::Result<u32> {
///     let mut sum = 0;
///     loop {
///         match numbers.recv().await {
///             Ok(number) => sum += number,
///             Err(error) if error.kind() == ErrorKind::Closed => return Ok(sum),
///             Err(error) => return Err(error),
///         }
///     }
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let (sender, receiver) = mp::broadcast(16)?;
///         let one = Process::spawn(sum, (sender.subscribe(),))?;
///         let other = Process::spawn(sum, (receiver,))?;
///         for number in [1, 2, 3] {
///             sender.send(number)?;
///         }
///         drop(sender); // The receivers get the remaining values, and then `Closed`.
///         assert_eq!((one.await??, other.await??), (6, 6));
///         Ok(())
///     })
/// }
/// ```
///
/// # Errors
/// - `Other` if `capacity` is 0 or greater than 2^20.
/// - `Io` if no memory or descriptor is left.
pub fn broadcast<T: Item>(capacity: usize) -> Result<(BroadcastSender<T>, BroadcastReceiver<T>)> {
    if !(1..=recent::MOST).contains(&capacity) {
        return Err(Error::other(format!("a broadcast of {capacity} values: it can keep 1 to {}", recent::MOST)));
    }
    let (core, alive) = Recent::create(Shape::Broadcast, capacity)?;
    let sender = BroadcastSender { core, alive, item: PhantomData };
    let receiver = sender.subscribe();
    Ok((sender, receiver))
}

/// The sending handle of a [`broadcast`].
///
/// A handle is cheap to clone and is a serde value: send it to other processes to have many senders.
///
/// # Details
/// - **Waiting.** [`send`](Self::send) never waits for receivers.
/// - **Death.** A process killed in the middle of a send has sent the value whole or not at all. When the last sender is gone,
///   however its process ended, receivers get the remaining values and then `Closed`.
/// - **Cost.** Two system calls for the copy, and one for each process that sleeps. Each receiver copies and decodes the value
///   itself. A broadcast is three descriptors and, for each value that is kept, 24 bytes and the largest message that was in its
///   place, rounded up to a power of two.
/// - **Limits.** A value must have no handle in it: its receivers are not known.
pub struct BroadcastSender<T> {
    core: Arc<Recent>,
    alive: Alive,
    item: PhantomData<fn(T)>,
}

impl<T: Item> BroadcastSender<T> {
    /// Sends `value` to all receivers.
    ///
    /// It waits for no receiver, and for another sender only as long as a copy takes. It succeeds also if there is no receiver, as
    /// one may be inside a message.
    ///
    /// ```
    /// # multiprocess::init();
    /// let (sender, mut receiver) = multiprocess::broadcast(2)?;
    /// sender.send("hello".to_string())?;
    /// assert_eq!(receiver.try_recv()?, "hello");
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// All of them return the value.
    /// - `Encode` if `value` cannot be serialised, or has a handle in it.
    /// - `Io` if memory runs out, or another process has been stopped (SIGSTOP) in the middle of a send.
    pub fn send(&self, value: T) -> Result<(), SendError<T>> {
        self.core.send(&value).map_err(|error| SendError::new(error, value))
    }

    /// Creates a receiver of all values sent from now on.
    ///
    /// ```
    /// # multiprocess::init();
    /// let (sender, _) = multiprocess::broadcast(2)?;
    /// sender.send(1)?;
    /// let mut receiver = sender.subscribe();
    /// sender.send(2)?;
    /// assert_eq!(receiver.try_recv()?, 2);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn subscribe(&self) -> BroadcastReceiver<T> {
        BroadcastReceiver { core: self.core.clone(), next: self.core.sent(), item: PhantomData }
    }
}

impl<T> Clone for BroadcastSender<T> {
    fn clone(&self) -> Self {
        Self { core: self.core.clone(), alive: self.alive.clone(), item: PhantomData }
    }
}

/// A receiver of a [`broadcast`], with its place among the values.
///
/// It is a serde value: sent to another process, it continues there. It is not `Clone`; [`resubscribe`](Self::resubscribe) creates another one.
///
/// # Details
/// - **Waiting.** [`recv`](Self::recv) waits for the next value. Cancel safe: a dropped future has taken nothing.
/// - **Death.** A killed receiver harms no other process. When all senders are gone, receivers get the remaining values and then
///   `Closed`.
pub struct BroadcastReceiver<T> {
    core: Arc<Recent>,
    next: u64,
    item: PhantomData<fn() -> T>,
}

impl<T: Item> BroadcastReceiver<T> {
    /// Receives the next value, and waits while there is none.
    ///
    /// Cancel safe: a dropped future has taken nothing.
    ///
    /// # Errors
    /// - `Lagged` if the next value is not kept any more, because values were sent faster than received. [`Error::lagged`] returns
    ///   how many were missed. The next call returns the oldest that is kept.
    /// - `Closed` once all senders are gone and everything is received.
    /// - `Decode` if a value cannot be read as `T`. The next call returns the value after it.
    /// - `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs.
    pub async fn recv(&mut self) -> Result<T> {
        let (core, next) = (&self.core, self.next);
        let received = core.waiters().until(|| core.next(next)).await.map_err(|error| core.failed(error))?;
        self.take(received)
    }

    fn take(&mut self, received: Result<Vec<u8>>) -> Result<T> {
        match received {
            Ok(bytes) => {
                self.next += 1;
                recent::decode(bytes)
            }
            Err(error) => {
                self.next += error.lagged().unwrap_or(0);
                Err(error)
            }
        }
    }

    /// Receives the next value if there is one now.
    ///
    /// # Errors
    /// `Empty` if there is none. Otherwise as [`recv`](Self::recv).
    pub fn try_recv(&mut self) -> Result<T> {
        let empty = || Err(Error::new(ErrorKind::Empty, "nothing new was sent to the broadcast"));
        let received = self.core.try_next(self.next).unwrap_or_else(empty);
        self.take(received)
    }

    /// Receives the next value, waiting at most `timeout`.
    ///
    /// Cancel safe: a dropped future has taken nothing, and so has a call that timed out. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// # Errors
    /// - `Timeout` if there was no value in time.
    /// - `Io` if the runtime has no timer.
    /// - Otherwise as [`recv`](Self::recv).
    pub async fn recv_timeout(&mut self, timeout: Duration) -> Result<T> {
        let core = self.core.clone();
        let limited = timer::limited(timeout, self.recv()).map_err(|error| core.failed(error))?;
        limited.await.unwrap_or_else(|_| Err(core.timed_out()))
    }

    /// Receives the next value, blocking this thread while there is none.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    #[track_caller]
    pub fn blocking_recv(&mut self) -> Result<T> {
        refuse_inside_async();
        let (core, next) = (&self.core, self.next);
        let waited = core.waiters().until_blocking(None, || core.try_next(next)).map_err(|error| core.failed(error))?;
        let received = waited.unwrap_or_else(|| Err(core.timed_out()));
        self.take(received)
    }

    /// Creates another receiver, of all values sent from now on.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let (sender, receiver) = multiprocess::broadcast(8)?;
    /// sender.send(1)?;
    /// let mut later = receiver.resubscribe();
    /// sender.send(2)?;
    /// assert_eq!(later.recv().await?, 2);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn resubscribe(&self) -> Self {
        Self { core: self.core.clone(), next: self.core.sent(), item: PhantomData }
    }

    /// Returns the number of values not yet received, including those already overwritten.
    pub fn len(&self) -> u64 {
        self.core.sent().saturating_sub(self.next)
    }

    /// Returns `true` if there is no value to receive now.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns a stream of the values, which ends when all senders are gone.
    ///
    /// # Errors
    /// Each item of the stream as [`recv`](Self::recv). After an error of kind `Lagged` or `Decode` the stream goes on; after `Io` or
    /// `Corrupt` it ends.
    ///
    /// ```
    /// use futures::StreamExt;
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let (sender, receiver) = multiprocess::broadcast(4)?;
    /// (0..6).try_for_each(|n| sender.send(n))?;
    /// drop(sender);
    /// let mut values = receiver.into_stream();
    /// assert_eq!(values.next().await.unwrap().unwrap_err().lagged(), Some(2));
    /// assert_eq!(values.next().await.unwrap()?, 2);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn into_stream(self) -> impl Stream<Item = Result<T>> + Send + Unpin {
        let values = futures_util::stream::unfold(Some(self), |receiver| async {
            let mut receiver = receiver?;
            match receiver.recv().await {
                Err(error) if error.kind() == ErrorKind::Closed => None,
                // A resource is missing, and will not be there at once.
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Forked | ErrorKind::Io) => {
                    Some((Err(error), None))
                }
                value => Some((value, Some(receiver))),
            }
        });
        Box::pin(values.fuse())
    }
}

impl<T> fmt::Debug for BroadcastSender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BroadcastSender").field("sent", &self.core.sent()).finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for BroadcastReceiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sent, is_closed) = (self.core.sent(), self.core.is_closed());
        let mut debug = f.debug_struct("BroadcastReceiver");
        debug.field("sent", &sent).field("received", &self.next).field("is_closed", &is_closed).finish()
    }
}

impl<T> Serialize for BroadcastSender<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        recent::serialize_sender(&self.core, &self.alive, serializer)
    }
}

impl<'de, T> Deserialize<'de> for BroadcastSender<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (core, alive) = recent::deserialize_sender(Shape::Broadcast, deserializer)?;
        Ok(Self { core, alive, item: PhantomData })
    }
}

impl<T> Serialize for BroadcastReceiver<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        recent::serialize_reader(&self.core, self.next, serializer)
    }
}

impl<'de, T> Deserialize<'de> for BroadcastReceiver<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (core, next) = recent::deserialize_reader(Shape::Broadcast, deserializer)?;
        Ok(Self { core, next, item: PhantomData })
    }
}
