//! A watch: the last value that was sent, for any number of receivers.

use super::queue::Item;
use super::recent::{self, Alive, Recent, Shape};
use crate::error::{ErrorKind, Result, SendError};
use crate::os::timer;
use crate::wait::refuse_inside_async;
use futures_util::{Stream, StreamExt};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

/// Creates a value that senders replace and receivers read, beginning with `value`.
///
/// Use instead:
/// - [`broadcast`](crate::broadcast()) if no value may be missed;
/// - [`Queue`](crate::Queue) if each value is for one receiver;
/// - [`Value`](crate::Value) for a number that nobody waits for.
///
/// It corresponds to `tokio::sync::watch` within one process: a receiver can read the value at any time, and wait until it has
/// changed. Of several changes it may see only the last. Use it for a configuration, a state, or progress.
///
/// ```
/// use multiprocess::{self as mp, Process, WatchReceiver};
///
/// async fn wait_until_ready(mut state: WatchReceiver<String>) -> mp::Result<String> {
///     state.wait_for(|state| state != "starting").await
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let (sender, receiver) = mp::watch("starting".to_string())?;
///         let child = Process::spawn(wait_until_ready, (receiver,))?;
///         sender.send("ready".to_string())?;
///         assert_eq!(child.await??, "ready");
///         Ok(())
///     })
/// }
/// ```
///
/// # Errors
/// - `Encode` if `value` cannot be serialised or has a handle in it.
/// - `Io` if no memory or descriptor is left.
pub fn watch<T: Item>(value: T) -> Result<(WatchSender<T>, WatchReceiver<T>)> {
    let (core, alive) = Recent::create(Shape::Watch, 1)?;
    core.send(&value)?;
    let sender = WatchSender { core, alive, item: PhantomData };
    let receiver = sender.subscribe();
    Ok((sender, receiver))
}

/// The sending handle of a [`watch`].
///
/// A handle is cheap to clone and is a serde value: send it to other processes to have many senders.
///
/// # Details
/// - **Waiting.** [`send`](Self::send) never waits for receivers.
/// - **Death.** A process killed in the middle of a send has replaced the value or left the old one. When the last sender is gone,
///   however its process ended, receivers can still read the value, and waiting for a change fails with `Closed`.
/// - **Cost.** A send is two system calls, and one for each process that sleeps; reading the value is one, a copy and a decoding. A watch is
///   three descriptors, a page, and twice the largest value, rounded up to a power of two.
/// - **Limits.** A value must have no handle in it: its receivers are not known.
pub struct WatchSender<T> {
    core: Arc<Recent>,
    alive: Alive,
    item: PhantomData<fn(T) -> T>,
}

impl<T: Item> WatchSender<T> {
    /// Replaces the value and wakes all receivers that wait for a change.
    ///
    /// It waits for no receiver, and for another sender only as long as a copy takes. It succeeds also if there is no receiver, as
    /// one may be inside a message.
    ///
    /// ```
    /// # multiprocess::init();
    /// let (sender, receiver) = multiprocess::watch(1)?;
    /// sender.send(2)?;
    /// assert_eq!(receiver.get()?, 2);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// All of them return the value, and the old one stays.
    /// - `Encode` if `value` cannot be serialised, or has a handle in it.
    /// - `Io` if memory runs out, or another process has been stopped (SIGSTOP) in the middle of a send.
    pub fn send(&self, value: T) -> Result<(), SendError<T>> {
        self.core.send(&value).map_err(|error| SendError::new(error, value))
    }

    /// Returns a copy of the present value.
    ///
    /// # Errors
    /// `Decode` if it cannot be read as `T`.
    pub fn get(&self) -> Result<T> {
        last(&self.core).and_then(|(_, bytes)| recent::decode(bytes))
    }

    /// Creates a receiver that has seen the present value.
    pub fn subscribe(&self) -> WatchReceiver<T> {
        WatchReceiver { core: self.core.clone(), seen: self.core.sent(), item: PhantomData }
    }
}

impl<T> Clone for WatchSender<T> {
    fn clone(&self) -> Self {
        Self { core: self.core.clone(), alive: self.alive.clone(), item: PhantomData }
    }
}

/// Returns the last value, and the number of values that had been sent with it.
fn last(core: &Recent) -> Result<(u64, Vec<u8>)> {
    loop {
        let count = core.sent();
        match core.try_next(count.saturating_sub(1)) {
            Some(Ok(bytes)) => return Ok((count, bytes)),
            // Another one has come.
            Some(Err(error)) if error.kind() == ErrorKind::Lagged => {}
            Some(Err(error)) => return Err(error),
            None => return Err(core.without_value()),
        }
    }
}

/// A receiver of a [`watch`].
///
/// A handle is cheap to clone and is a serde value: send it to other processes. Each handle keeps which value it has seen last.
///
/// # Details
/// - **Waiting.** [`changed`](Self::changed) and [`wait_for`](Self::wait_for) wait. Cancel safe: see there.
/// - **Death.** A killed receiver harms no other process. When all senders are gone, the last value can still be read. If it was
///   not seen yet, `changed` returns once more; then waiting fails with `Closed`.
pub struct WatchReceiver<T> {
    core: Arc<Recent>,
    /// The number of values that had been sent when it last read one.
    seen: u64,
    item: PhantomData<fn() -> T>,
}

impl<T: Item> WatchReceiver<T> {
    /// Returns a copy of the value, which does not count as seen.
    ///
    /// ```
    /// # multiprocess::init();
    /// let (_sender, receiver) = multiprocess::watch("start".to_string())?;
    /// assert_eq!(receiver.get()?, "start");
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Decode` if it cannot be read as `T`.
    pub fn get(&self) -> Result<T> {
        last(&self.core).and_then(|(_, bytes)| recent::decode(bytes))
    }

    /// Returns a copy of the value, which counts as seen from now on.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn get_and_update(&mut self) -> Result<T> {
        let (count, bytes) = last(&self.core)?;
        self.seen = count;
        recent::decode(bytes)
    }

    /// Returns `true` if the value was replaced since it was last seen.
    ///
    /// ```
    /// # multiprocess::init();
    /// let (sender, mut receiver) = multiprocess::watch(1)?;
    /// assert!(!receiver.has_changed()?);
    /// sender.send(1)?;
    /// assert!(receiver.has_changed()?);
    /// assert_eq!(receiver.get_and_update()?, 1);
    /// assert!(!receiver.has_changed()?);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Closed` if it was not replaced, and all senders are gone.
    pub fn has_changed(&self) -> Result<bool> {
        let has_changed = || self.core.sent() != self.seen;
        if !has_changed() && self.core.is_closed() && !has_changed() {
            return Err(self.core.closed());
        }
        Ok(has_changed())
    }

    /// Marks the present value as not seen, so that [`changed`](Self::changed) returns at once.
    ///
    /// ```
    /// # multiprocess::init();
    /// let (_sender, mut receiver) = multiprocess::watch(1)?;
    /// receiver.mark_changed();
    /// assert!(receiver.has_changed()?);
    /// receiver.mark_unchanged();
    /// assert!(!receiver.has_changed()?);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn mark_changed(&mut self) {
        self.seen = self.core.sent().wrapping_sub(1);
    }

    /// Marks the present value as seen.
    pub fn mark_unchanged(&mut self) {
        self.seen = self.core.sent();
    }

    /// Returns the attempt of a wait for a change, which yields the number of values that were sent.
    fn attempt(&self, is_closed: fn(&Recent) -> bool) -> impl FnMut() -> Option<Result<u64>> + '_ {
        let changed = || Some(self.core.sent()).filter(|sent| *sent != self.seen).map(Ok);
        move || {
            changed().or_else(|| if is_closed(&self.core) { changed().or(Some(Err(self.core.closed()))) } else { None })
        }
    }

    /// Waits until the value has been replaced since it was last seen, and marks the present one as seen.
    ///
    /// Cancel safe: a dropped future has marked nothing.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let (sender, mut receiver) = multiprocess::watch(1)?;
    /// sender.send(2)?;
    /// receiver.changed().await?;
    /// assert_eq!(receiver.get()?, 2);
    /// drop(sender);
    /// assert_eq!(receiver.changed().await.unwrap_err().kind(), multiprocess::ErrorKind::Closed);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// - `Closed` if it was not replaced, and all senders are gone.
    /// - `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs.
    pub async fn changed(&mut self) -> Result<()> {
        let waited = self.core.waiters().until(self.attempt(Recent::is_known_closed)).await;
        self.seen = waited.map_err(|error| self.core.failed(error))??;
        Ok(())
    }

    /// Waits until the value has been replaced since it was last seen, at most `timeout`.
    ///
    /// Cancel safe: a dropped future has marked nothing, and so has a call that timed out. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{self as mp, ErrorKind};
    /// use std::time::Duration;
    /// let (_sender, mut receiver) = mp::watch(1)?;
    /// let error = receiver.changed_timeout(Duration::from_millis(1)).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Timeout);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// - `Timeout` if it was not replaced in time.
    /// - `Io` if the runtime has no timer.
    /// - Otherwise as [`changed`](Self::changed).
    pub async fn changed_timeout(&mut self, timeout: Duration) -> Result<()> {
        let core = self.core.clone();
        let limited = timer::limited(timeout, self.changed()).map_err(|error| core.failed(error))?;
        limited.await.unwrap_or_else(|_| Err(core.timed_out()))
    }

    /// Blocks this thread until the value has been replaced since it was last seen, and marks the present one as seen.
    ///
    /// ```
    /// # multiprocess::init();
    /// let (sender, mut receiver) = multiprocess::watch(1)?;
    /// sender.send(2)?;
    /// receiver.blocking_changed()?;
    /// assert_eq!(receiver.get()?, 2);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`changed`](Self::changed).
    #[track_caller]
    pub fn blocking_changed(&mut self) -> Result<()> {
        refuse_inside_async();
        let waited = self.core.waiters().until_blocking(None, self.attempt(Recent::is_closed));
        let waited = waited.map_err(|error| self.core.failed(error))?;
        self.seen = waited.unwrap_or_else(|| Err(self.core.timed_out()))?;
        Ok(())
    }

    /// Waits until `condition` returns `true` for a value, beginning with the present one, and returns that value.
    ///
    /// Cancel safe: a dropped future has only marked the values that `condition` was called with as seen.
    ///
    /// # Errors
    /// - `Closed` if all senders are gone and `condition` returns `false` for the last value.
    /// - `Decode` if a value cannot be read as `T`.
    /// - `Io` as [`changed`](Self::changed).
    pub async fn wait_for(&mut self, mut condition: impl FnMut(&T) -> bool) -> Result<T> {
        loop {
            let value = self.get_and_update()?;
            if condition(&value) {
                return Ok(value);
            }
            self.changed().await?;
        }
    }

    /// Returns a stream of the present value and those that replace it, which ends when all senders are gone.
    ///
    /// Of several values that are sent quickly it may yield only the last.
    ///
    /// # Errors
    /// Each item of the stream as [`changed`](Self::changed) and [`get`](Self::get). After `Io` or `Corrupt` the stream ends.
    ///
    /// ```
    /// use futures::StreamExt;
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let (sender, receiver) = multiprocess::watch(1)?;
    /// let mut values = receiver.into_stream();
    /// assert_eq!(values.next().await.unwrap()?, 1);
    /// sender.send(2)?;
    /// drop(sender);
    /// assert_eq!(values.next().await.unwrap()?, 2);
    /// assert!(values.next().await.is_none());
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn into_stream(mut self) -> impl Stream<Item = Result<T>> + Send + Unpin {
        self.mark_changed();
        let values = futures_util::stream::unfold(Some(self), |receiver| async {
            let mut receiver = receiver?;
            let changed = receiver.changed().await;
            match changed.and_then(|()| receiver.get_and_update()) {
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

impl<T> Clone for WatchReceiver<T> {
    fn clone(&self) -> Self {
        Self { core: self.core.clone(), seen: self.seen, item: PhantomData }
    }
}

impl<T> fmt::Debug for WatchSender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WatchSender").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for WatchReceiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (has_changed, is_closed) = (self.core.sent() != self.seen, self.core.is_closed());
        f.debug_struct("WatchReceiver").field("has_changed", &has_changed).field("is_closed", &is_closed).finish()
    }
}

impl<T> Serialize for WatchSender<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        recent::serialize_sender(&self.core, &self.alive, serializer)
    }
}

impl<'de, T> Deserialize<'de> for WatchSender<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (core, alive) = recent::deserialize_sender(Shape::Watch, deserializer)?;
        Ok(Self { core, alive, item: PhantomData })
    }
}

impl<T> Serialize for WatchReceiver<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        recent::serialize_reader(&self.core, self.seen, serializer)
    }
}

impl<'de, T> Deserialize<'de> for WatchReceiver<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (core, seen) = recent::deserialize_reader(Shape::Watch, deserializer)?;
        Ok(Self { core, seen, item: PhantomData })
    }
}
