//! A watch: the last value that was sent, for all who look.

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

/// A value that senders replace and receivers look at, beginning with `value`.
///
/// If no value may be missed take a [`broadcast`](crate::broadcast()), or a [`Queue`](crate::Queue) if each has one receiver; for a number without waiting, a
/// [`Value`](crate::Value).
///
/// It is what `tokio::sync::watch` is within one process: a receiver can look at any time, and wait until the value has changed; of
/// several changes it may see only the last. Use it for a configuration, a state, or how far something has come.
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
/// `Encode` if `value` cannot be serialised or has a handle in it; `Io` if no memory or descriptor is left.
pub fn watch<T: Item>(value: T) -> Result<(WatchSender<T>, WatchReceiver<T>)> {
    let (core, alive) = Recent::create(Shape::Watch, 1)?;
    core.send(&value)?;
    let sender = WatchSender { core, alive, item: PhantomData };
    let receiver = sender.subscribe();
    Ok((sender, receiver))
}

/// The sending handle of a [`watch`].
///
/// A handle is cheap to clone and is a serde value: it travels to other processes, and so there may be many senders.
///
/// # Details
/// - **Waiting.** [`send`](Self::send) never waits for receivers.
/// - **Death.** A process killed in the middle of a send has replaced the value or left the old one. When the last sender is gone,
///   however its process ended, receivers can still look, and waiting for a change is `Closed`.
/// - **Cost.** A send is two system calls, and one for each process that sleeps; a look is one, a copy and a decoding. A watch is
///   three descriptors, a page, and twice the largest value, rounded up to a power of two.
/// - **Limits.** A value must have no handle in it: its receivers are not known.
pub struct WatchSender<T> {
    core: Arc<Recent>,
    alive: Alive,
    item: PhantomData<fn(T) -> T>,
}

impl<T: Item> WatchSender<T> {
    /// Replaces the value and wakes all receivers that wait for a change. It waits for no receiver, for another sender as long as a copy takes, and succeeds also if there is no receiver.
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
    /// `Encode` if `value` cannot be serialised, or has a handle in it. `Io` if memory runs out, or another process has been
    /// stopped (SIGSTOP) in the middle of a send. The value comes back, and the old one stays.
    pub fn send(&self, value: T) -> Result<(), SendError<T>> {
        self.core.send(&value).map_err(|error| SendError::new(error, value))
    }

    /// Returns a copy of the value.
    ///
    /// # Errors
    /// `Decode` if it cannot be read as `T`.
    pub fn get(&self) -> Result<T> {
        last(&self.core).and_then(|(_, bytes)| recent::decode(bytes))
    }

    /// Makes a receiver, for which the present value is not new.
    pub fn subscribe(&self) -> WatchReceiver<T> {
        WatchReceiver { core: self.core.clone(), seen: self.core.sent(), item: PhantomData }
    }
}

impl<T> Clone for WatchSender<T> {
    fn clone(&self) -> Self {
        Self { core: self.core.clone(), alive: self.alive.clone(), item: PhantomData }
    }
}

/// The last value, and how many there had been with it.
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
/// A handle is cheap to clone and is a serde value: it travels to other processes. Each knows which value it has seen last.
///
/// # Details
/// - **Waiting.** [`changed`](Self::changed) and [`wait_for`](Self::wait_for) wait. Cancel-safe: dropped, they have changed nothing.
/// - **Death.** A killed receiver harms nobody. When all senders are gone, the last value is still there to look at; a change that
///   was not seen is seen first, then waiting is `Closed`.
pub struct WatchReceiver<T> {
    core: Arc<Recent>,
    /// How many values there had been when it last looked.
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

    /// Returns whether the value was replaced since it was last seen.
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
    /// `Closed` if it was not, and all senders are gone.
    pub fn has_changed(&self) -> Result<bool> {
        let has_changed = || self.core.sent() != self.seen;
        if !has_changed() && self.core.is_closed() && !has_changed() {
            return Err(self.core.closed());
        }
        Ok(has_changed())
    }

    /// Has the present value count as new.
    pub fn mark_changed(&mut self) {
        self.seen = self.core.sent().wrapping_sub(1);
    }

    /// Has the present value count as seen.
    pub fn mark_unchanged(&mut self) {
        self.seen = self.core.sent();
    }

    /// The attempt of a wait for a change: how many values there are then.
    fn attempt(&self, is_closed: fn(&Recent) -> bool) -> impl FnMut() -> Option<Result<u64>> + '_ {
        let changed = || Some(self.core.sent()).filter(|sent| *sent != self.seen).map(Ok);
        move || {
            changed().or_else(|| if is_closed(&self.core) { changed().or(Some(Err(self.core.closed()))) } else { None })
        }
    }

    /// Waits until the value was replaced since it was last seen; the present one counts as seen then.
    ///
    /// Cancel-safe: dropped, it has changed nothing.
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
    /// `Closed` if it was not, and all senders are gone. `Io` if the system refuses a resource that waiting needs.
    pub async fn changed(&mut self) -> Result<()> {
        let waited = self.core.waiters().until(self.attempt(Recent::is_known_closed)).await;
        self.seen = waited.map_err(|error| self.core.failed(error))??;
        Ok(())
    }

    /// [`changed`](Self::changed) that gives up after `timeout`. Counted in real time: see [Timeouts](crate#timeouts).
    ///
    /// # Errors
    /// `Timeout`, `Io` where there is no tokio timer, else as [`changed`](Self::changed).
    pub async fn changed_timeout(&mut self, timeout: Duration) -> Result<()> {
        let core = self.core.clone();
        let limited = timer::limited(timeout, self.changed()).map_err(|error| core.failed(error))?;
        limited.await.unwrap_or_else(|_| Err(core.timed_out()))
    }

    /// [`changed`](Self::changed) for plain functions: blocks this thread.
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

    /// Waits until the value is one for which `condition` holds, beginning with the present one, and returns it.
    ///
    /// Cancel-safe. What it has looked at counts as seen.
    ///
    /// # Errors
    /// `Closed` if all senders are gone and it does not hold for the last value. `Decode` if a value cannot be read as `T`.
    pub async fn wait_for(&mut self, mut condition: impl FnMut(&T) -> bool) -> Result<T> {
        loop {
            let value = self.get_and_update()?;
            if condition(&value) {
                return Ok(value);
            }
            self.changed().await?;
        }
    }

    /// The present value and those that replace it, as a stream that ends when all senders are gone. Of several that come fast it
    /// has the last.
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
                Err(error) if matches!(error.kind(), ErrorKind::Io | ErrorKind::Corrupt) => Some((Err(error), None)),
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
