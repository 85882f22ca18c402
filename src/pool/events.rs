//! Events of tasks: values that a task sends to its caller before its result.
//!
//! A call that is listened to has a queue of its own. The queue travels with each of its items, behind the arguments; the worker opens it
//! at the first event. So events need nothing of the scheduler, and a call without a listener nothing of this file.
//!
//! ```text
//! call.events::<E>() -> a queue of E ----------------> Events<E>, a stream
//!                         ^ travels with each item
//! task: current_task().emit(e)
//! ```
//!
//! # Death
//! | killed | what follows |
//! |---|---|
//! | a worker, before its event is in the queue | the event is lost, as a whole; those before it arrive, and those of other items |
//! | a worker, after that | the event arrives, before the error of its item |
//! | the caller's process | its workers end with it |
//!
//! # Cancel
//! | dropped | what follows |
//! |---|---|
//! | the stream | the queue is closed, and the events in it are freed; later ones are discarded, before they are encoded |
//! | the call, or it is over | the task is asked to stop, then the queue is closed: events in it can still be received, then the stream ends; an event of the task is an error once it sees that it is to stop |
//! | an `emit` that waits | its event is not sent |

use super::chunk::Chunk;
use super::input::{Input, Most, Stop};
use crate::channel::{Item, Queue, QueueStream, spsc};
use crate::error::{Error, ErrorKind, Result};
use crate::os::sync::lock;
use crate::os::{fork, reactor, timer};
use crate::wire::{self, Attachment, EncodedMessage};
use futures_util::{Stream, StreamExt};
use serde::{Deserialize, Serialize};
use std::any::{Any, TypeId, type_name};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::{Mutex, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

/// Events that wait for their listener, at most.
const MOST: usize = 1024;
/// With so many bytes under way an event waits for room, unless it is one of two.
const BYTES: u64 = 1 << 20;
/// A task that waits for room looks this often whether it should stop.
/// Shorter than the usual grace.
const STOP_EVERY: Duration = Duration::from_millis(2);

/// The events of the tasks of one call, as a stream; made by [`Call::events`](crate::Call::events) and its like.
///
/// ```
/// use futures::StreamExt;
/// use multiprocess::{self as mp, Pool};
///
/// fn sum(numbers: Vec<u64>) -> mp::Result<u64> {
///     let task = mp::current_task().expect("in a pool");
///     let mut sum = 0;
///     for (done, n) in numbers.iter().enumerate() {
///         sum += n;
///         task.blocking_emit(done + 1)?;
///     }
///     Ok(sum)
/// }
///
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(1)?;
/// let mut call = pool.apply(sum, (vec![1, 2, 3],));
/// let mut events = call.events::<usize>();
/// let show = async {
///     let mut last = 0;
///     while let Some(done) = events.next().await {
///         last = done?;
///     }
///     Ok::<_, mp::Error>(last)
/// };
/// let (sum, last) = tokio::join!(call, show);
/// assert_eq!((sum??, last?), (6, 3));
/// # Ok(()) }) }
/// ```
///
/// The stream ends when the call is over, however it ended, and all events were received; the call of a stream of results is over when that has
/// ended or is dropped. The events of one task come in the order in which it sent them, and are here before its result is.
///
/// # Waiting
/// Up to 1024 events or 1 to 2 MiB wait here, or two events if they are larger. A task with one more waits. So a slow listener slows
/// the tasks of its own call, and no others. Poll the stream together with the call, or drop it: a call is not over while a task waits for room.
///
/// # Errors
/// - `Decode` for an event that cannot be read. The stream goes on.
/// - If the events were asked for a second time, or after the call had begun: one error of kind `Other`, and no more.
/// - If the call cannot have events: one error, with which the call fails as well. `Unsupported` in a cluster pool, `Io` if no memory or descriptor
///   is left.
///
/// # Death
/// The events that a task had sent before its worker died are received. A task that is retried may send an event again;
/// [`CurrentTask::attempt`](crate::CurrentTask::attempt) returns the number of the attempt.
///
/// # Drop
/// Events that were not received are freed at once. From then on events are discarded before they are encoded, and the call goes on. The drop waits for
/// an event that is just being copied, as [`Queue::close`] does.
///
/// # Threads that a task leaves behind
/// A thread that keeps the [`CurrentTask`](crate::CurrentTask) of its task sends nothing more once the task has returned: a further event is an error of
/// kind `Closed`, also if it waits for room at that moment. It is never an event of a later task. A thread that asks for
/// [`current_task`](crate::current_task) anew gets the task that its worker runs then, and sends events of that one.
///
/// # Cost
/// A call with events has a [`Queue`] of its own. Each of its items is sent alone, with three descriptors, which takes some tens of
/// microseconds: events are for tasks that take longer. A call without events pays nothing.
#[must_use = "a task waits once some events were not received: poll this, or drop it"]
pub struct Events<E> {
    stream: Option<QueueStream<E>>,
    queue: Option<Queue<E>>,
    failed: Option<Error>,
}

impl<E: Item> Events<E> {
    fn of(queue: Queue<E>) -> Self {
        Self { stream: Some(queue.stream()), queue: Some(queue), failed: None }
    }

    /// No events, but an error.
    pub(super) fn failed(error: Error) -> Self {
        Self { stream: None, queue: None, failed: Some(error) }
    }

    /// Returns the failed events of a call that has begun, or has a listener.
    pub(super) fn late() -> Self {
        Self::failed(Error::other("the events of a call are asked for once, and before its first poll"))
    }
}

impl<E: Item> Stream for Events<E> {
    type Item = Result<E>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<E>>> {
        let this = self.get_mut();
        if let Some(error) = this.failed.take() {
            return Poll::Ready(Some(Err(error)));
        }
        this.stream.as_mut().map_or(Poll::Ready(None), |stream| stream.poll_next_unpin(cx))
    }
}

impl<E> Drop for Events<E> {
    fn drop(&mut self) {
        // A wait of the stream goes first: nobody is to be woken for it.
        self.stream = None;
        if let Some(queue) = self.queue.take().filter(|_| !fork::is_forked()) {
            queue.shut();
        }
    }
}

impl<E> std::fmt::Debug for Events<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("event", &type_name::<E>()).finish_non_exhaustive()
    }
}

/// The call's end of its events: when it is dropped, the stream ends after the events that are in the queue.
pub(super) struct EndOfEvents(Box<dyn Ends>);

trait Ends: Send + Sync {
    fn end(&self);
}

impl<E> Ends for Queue<E> {
    fn end(&self) {
        // Nobody waits for an event that is just being copied.
        self.abandon();
    }
}

impl Drop for EndOfEvents {
    fn drop(&mut self) {
        if !fork::is_forked() {
            self.0.end();
        }
    }
}

/// The queue of a call as it travels with its items.
#[derive(Serialize, Deserialize)]
struct Listener {
    /// The type of the events: equal for no two types, and its name for errors.
    key: u64,
    name: String,
    queue: EncodedMessage,
}

/// Returns the key of a type, the same in all processes of this program.
fn key_of<E: 'static>() -> u64 {
    let mut hasher = DefaultHasher::new();
    TypeId::of::<E>().hash(&mut hasher);
    hasher.finish()
}

/// Makes the events of a call: the stream, its end, and the input whose items bring the queue.
pub(super) fn listen<E: Item>(input: &mut Box<dyn Input>) -> Result<(Events<E>, EndOfEvents)> {
    let queue = Queue::<E>::limited(MOST, BYTES)?;
    let listener = Listener { key: key_of::<E>(), name: type_name::<E>().into(), queue: EncodedMessage::of(&queue)? };
    let listener = EncodedMessage::of(&listener)?;
    let inner = std::mem::replace(input, Box::new(Nothing));
    *input = Box::new(Heard { inner, listener });
    Ok((Events::of(queue.clone()), EndOfEvents(Box::new(queue))))
}

struct Nothing;

impl Input for Nothing {
    fn fill(&mut self, _: &mut Chunk, _: Most, _: &mut Context<'_>) -> Stop {
        Stop::End
    }

    fn remaining(&self) -> usize {
        0
    }
}

/// An input whose items each bring the queue for their events.
struct Heard {
    inner: Box<dyn Input>,
    listener: EncodedMessage,
}

/// Behind the arguments in an item's record: the listener, and then how many bytes and descriptors it has.
const TAIL: usize = 8;

impl Input for Heard {
    fn fill(&mut self, chunk: &mut Chunk, most: Most, cx: &mut Context<'_>) -> Stop {
        let stop = self.inner.fill(chunk, Most { items: 1, ..most }, cx);
        if chunk.count == 0 {
            return stop;
        }
        match append(chunk, &self.listener) {
            Ok(()) => stop,
            Err(error) => {
                chunk.count = 0;
                chunk.body.clear();
                chunk.attachments.clear();
                Stop::Failed(error)
            }
        }
    }

    fn remaining(&self) -> usize {
        self.inner.remaining()
    }

    fn again(&self) -> Option<Box<dyn Input>> {
        Some(Box::new(Self { inner: self.inner.again()?, listener: self.listener.clone() }))
    }
}

/// Adds the listener to the only item of `chunk`.
fn append(chunk: &mut Chunk, listener: &EncodedMessage) -> Result<()> {
    let (bytes, attachments) = (listener.bytes(), listener.attachments());
    let len = spsc::first(&chunk.body).map_or(0, |(_, arguments, _)| arguments.len());
    chunk.body.truncate(spsc::HEADER + len);
    chunk.body.reserve(bytes.len() + TAIL + 32);
    chunk.body.extend_from_slice(bytes);
    for count in [bytes.len(), attachments.len()] {
        chunk.body.extend_from_slice(&(count as u32).to_ne_bytes());
    }
    spsc::close_record(&mut chunk.body, 0)?;
    chunk.attachments.extend(attachments.iter().map(Attachment::clone));
    Ok(())
}

/// Takes the listener off the arguments of an item and off its descriptors.
pub(super) fn split<'a>(item: &'a [u8], fds: &mut Vec<OwnedFd>) -> Result<(&'a [u8], Emitter)> {
    let parts = || {
        let (rest, tail) = item.split_last_chunk::<TAIL>()?;
        let count = |at: usize| Some(u32::from_ne_bytes(tail.get(at..at + 4)?.try_into().ok()?) as usize);
        let (arguments, listener) = rest.split_at_checked(rest.len().checked_sub(count(0)?)?)?;
        let first = fds.len().checked_sub(count(4)?)?;
        Some((arguments, listener, first))
    };
    let corrupt = || Error::new(ErrorKind::Decode, "an item without the listener that it says it brings");
    let (arguments, listener, first) = parts().ok_or_else(corrupt)?;
    let listener: Listener = wire::decode_bytes(listener, fds.split_off(first))?;
    Ok((arguments, Emitter::of(listener)))
}

/// Where the events of one item go, in its worker.
pub(super) struct Emitter {
    key: u64,
    name: String,
    /// Until it is opened.
    encoded: Mutex<Option<EncodedMessage>>,
    opened: OnceLock<Result<Opened>>,
    is_over: AtomicBool,
}

/// A `Queue` of the type of the events.
struct Opened {
    queue: Box<dyn Any + Send + Sync>,
    is_closed: fn(&dyn Any) -> bool,
}

impl Opened {
    fn of<E: Item>(queue: Queue<E>) -> Self {
        let is_closed = |queue: &dyn Any| queue.downcast_ref::<Queue<E>>().is_none_or(|queue| queue.is_closed());
        Self { queue: Box::new(queue), is_closed }
    }
}

impl Emitter {
    fn of(listener: Listener) -> Self {
        let Listener { key, name, queue } = listener;
        let (encoded, opened, is_over) = (Mutex::new(Some(queue)), OnceLock::new(), AtomicBool::new(false));
        Self { key, name, encoded, opened, is_over }
    }

    /// The item is done: threads that it has left behind send nothing more.
    pub(super) fn end(&self) {
        self.is_over.store(true, Release);
    }

    fn open<E: Item>(&self) -> Result<Queue<E>> {
        let encoded = lock(&self.encoded).take();
        let encoded = encoded.ok_or_else(|| Error::other("the events of a task were opened twice"))?;
        wire::decode(encoded.open()?)
    }

    /// The queue for events of type `E`; `None` if nobody listens any more.
    fn queue<E: Item>(&self, label: &str) -> Result<Option<&Queue<E>>> {
        if self.is_over.load(Acquire) {
            return Err(is_over(label));
        }
        if self.key != key_of::<E>() {
            let (sent, wanted) = (type_name::<E>(), &self.name);
            let text =
                format!("{label} sent an event of type {sent}, and its caller listens for events of type {wanted}");
            return Err(Error::new(ErrorKind::Encode, text));
        }
        let opened = self.opened.get_or_init(|| self.open::<E>().map(Opened::of));
        let queue = opened.as_ref().map_err(Error::copy)?.queue.downcast_ref::<Queue<E>>();
        Ok(queue.filter(|queue| !queue.is_closed()))
    }

    /// Returns `true` if an event would be received, as far as is known without opening the queue.
    pub(super) fn has_listener(&self) -> bool {
        let is_closed = |queue: &Opened| (queue.is_closed)(queue.queue.as_ref());
        let is_closed = self.opened.get().and_then(|opened| opened.as_ref().ok()).is_some_and(is_closed);
        !is_closed && !self.is_over.load(Acquire)
    }

    pub(super) async fn emit<E: Item>(&self, label: &str, event: E, should_stop: impl Fn() -> bool) -> Result<()> {
        let Some(queue) = self.queue::<E>(label)? else { return discarded(label, should_stop()) };
        let should_stop = || should_stop() || self.is_over.load(Acquire);
        let stopped = async {
            if reactor::has_timer().is_err() {
                std::future::pending::<()>().await;
            }
            while !should_stop() {
                timer::sleep(STOP_EVERY).await;
            }
        };
        let put = tokio::select! {
            biased;
            put = queue.put(event) => put.map_err(|error| error.into_error()),
            () = stopped => return Err(was_stopped(label)),
        };
        put.or_else(|error| unless_closed(error, label, should_stop()))
    }

    #[track_caller]
    pub(super) fn blocking_emit<E: Item>(&self, label: &str, event: E, should_stop: impl Fn() -> bool) -> Result<()> {
        let Some(queue) = self.queue::<E>(label)? else { return discarded(label, should_stop()) };
        let should_stop = || should_stop() || self.is_over.load(Acquire);
        match queue.blocking_put_unless(event, STOP_EVERY, should_stop) {
            Ok(true) => Ok(()),
            Ok(false) => Err(was_stopped(label)),
            Err(error) => unless_closed(error, label, should_stop()),
        }
    }

    pub(super) fn try_emit<E: Item>(&self, label: &str, event: E, should_stop: impl Fn() -> bool) -> Result<()> {
        let Some(queue) = self.queue::<E>(label)? else { return discarded(label, should_stop()) };
        queue.try_put(event).or_else(|error| unless_closed(error.into_error(), label, should_stop()))
    }
}

/// An event that nobody will receive counts as sent, unless nobody waits for the task either.
fn discarded(label: &str, should_stop: bool) -> Result<()> {
    if should_stop { Err(was_stopped(label)) } else { Ok(()) }
}

fn unless_closed(error: Error, label: &str, should_stop: bool) -> Result<()> {
    if error.kind() == ErrorKind::Closed { discarded(label, should_stop) } else { Err(error) }
}

fn was_stopped(label: &str) -> Error {
    let text = format!("{label} was asked to stop or is over, and its event has no room or no receiver");
    Error::new(ErrorKind::Cancelled, text)
}

/// Returns the error of an event of a task that is done.
pub(super) fn is_over(label: &str) -> Error {
    Error::new(ErrorKind::Closed, format!("{label} is over, and sends no more events"))
}

/// Returns the error of a call whose tasks run on other hosts.
pub(super) fn elsewhere() -> Error {
    let why =
        "a call of a cluster pool has no events: its tasks run on other hosts, and a queue does not cross to them";
    Error::new(ErrorKind::Unsupported, why)
}
