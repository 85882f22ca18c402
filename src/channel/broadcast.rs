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

/// A broadcast: each receiver gets every value that is sent after it was made. The last `capacity` values are kept.
///
/// If each value is for one receiver take a [`Queue`](crate::Queue), if only the newest counts a [`watch`](crate::watch()).
///
/// It is what `tokio::sync::broadcast` is within one process. A sender waits for no receiver; a receiver that falls further behind than
/// `capacity` values gets one error of kind `Lagged`, with the number of values that it missed, and goes on with the oldest that
/// is kept.
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
///         drop(sender); // The receivers get what was sent, and then `Closed`.
///         assert_eq!((one.await??, other.await??), (6, 6));
///         Ok(())
///     })
/// }
/// ```
///
/// # Errors
/// `Other` for a capacity of 0 or beyond 2^20, `Io` if no memory or descriptor is left.
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
/// A handle is cheap to clone and is a serde value: it travels to other processes, and so there may be many senders.
///
/// # Details
/// - **Waiting.** [`send`](Self::send) never waits for receivers.
/// - **Death.** A process killed in the middle of a send has sent the value whole or not at all. When the last sender is gone,
///   however its process ended, receivers get what was sent and then `Closed`.
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
    /// Sends `value` to all receivers. It waits for no receiver, for another sender as long as a copy takes, and succeeds also if there is no receiver: one may be on its way.
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
    /// `Encode` if `value` cannot be serialised, or has a handle in it. `Io` if memory runs out, or another process has been
    /// stopped (SIGSTOP) in the middle of a send. The value comes back.
    pub fn send(&self, value: T) -> Result<(), SendError<T>> {
        self.core.send(&value).map_err(|error| SendError::new(error, value))
    }

    /// Makes a receiver of all values sent from now on.
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
/// It is a serde value and travels with its place. It is not `Clone`; [`resubscribe`](Self::resubscribe) makes another one.
///
/// # Details
/// - **Waiting.** [`recv`](Self::recv) waits for the next value. Cancel-safe: dropped, it has taken nothing.
/// - **Death.** A killed receiver harms nobody. When all senders are gone, what they sent is received before `Closed` is.
pub struct BroadcastReceiver<T> {
    core: Arc<Recent>,
    next: u64,
    item: PhantomData<fn() -> T>,
}

impl<T: Item> BroadcastReceiver<T> {
    /// Receives the next value; waits while there is none. Cancel-safe: dropped, it has taken nothing.
    ///
    /// # Errors
    /// `Lagged` if values were sent faster than received, so that some are not kept any more: [`Error::lagged`] tells how many, and
    /// the next call returns the oldest that is kept. `Closed` once all senders are gone and everything is received. `Decode` if a
    /// value cannot be read as `T`: it is passed over.
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

    /// Receives the next value if there is one.
    ///
    /// # Errors
    /// `Empty`, else as [`recv`](Self::recv).
    pub fn try_recv(&mut self) -> Result<T> {
        let empty = || Err(Error::new(ErrorKind::Empty, "nothing new was sent to the broadcast"));
        let received = self.core.try_next(self.next).unwrap_or_else(empty);
        self.take(received)
    }

    /// [`recv`](Self::recv) that gives up after `timeout`, and then has taken nothing.
    /// Counted in real time: see [Timeouts](crate#timeouts).
    ///
    /// # Errors
    /// `Timeout`, `Io` where there is no tokio timer, else as [`recv`](Self::recv).
    pub async fn recv_timeout(&mut self, timeout: Duration) -> Result<T> {
        let core = self.core.clone();
        let limited = timer::limited(timeout, self.recv()).map_err(|error| core.failed(error))?;
        limited.await.unwrap_or_else(|_| Err(core.timed_out()))
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
        refuse_inside_async();
        let (core, next) = (&self.core, self.next);
        let waited = core.waiters().until_blocking(None, || core.try_next(next)).map_err(|error| core.failed(error))?;
        let received = waited.unwrap_or_else(|| Err(core.timed_out()));
        self.take(received)
    }

    /// Makes another receiver, of all values sent from now on.
    pub fn resubscribe(&self) -> Self {
        Self { core: self.core.clone(), next: self.core.sent(), item: PhantomData }
    }

    /// How many values there are to receive without waiting, those that are not kept any more included.
    pub fn len(&self) -> u64 {
        self.core.sent().saturating_sub(self.next)
    }

    /// Whether there is nothing to receive at the moment.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values as a stream, which ends when all senders are gone. A lag is an item of it, an error.
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
                Err(error) if matches!(error.kind(), ErrorKind::Io | ErrorKind::Corrupt) => Some((Err(error), None)),
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
