//! A oneshot: one value, from one sender to one receiver. It is a one-way pipe, whose shared state is that of [`channel_core`](super::channel_core).
//!
//! # Death
//! | killed | what follows | test (`tests/pieces.rs`, `oneshots`) |
//! |---|---|---|
//! | the sender, before its value is published | `Closed` | `killed_while_it_sends_the_value_is_whole_or_the_oneshot_closed` |
//! | the sender, after that | the value, and then `Closed` | the same, `value_sent_is_received_though_its_process_has_ended` |
//! | the receiver, at any moment | the sender is `Closed` | `killed_while_it_receives_the_sender_is_closed` |
//!
//! # Cancel
//! | dropped | what follows | test |
//! |---|---|---|
//! | a poll of the receiver, a wait for `closed` | nothing was taken | `ten_thousand_dropped_polls_take_nothing`, `ten_thousand_dropped_waits_for_the_receivers_end_change_nothing` |
//! | the sender, the receiver | as if its process had ended | `a_sender_that_goes_or_is_killed_without_a_value_is_closed`, `dropped_receiver_closes_the_sender` |

use super::pipe::{Receiver, Sender, simplex};
use super::queue::Item;
use crate::error::{Error, ErrorKind, Result, SendError};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// Creates a channel for one value, such as the answer to a request that went through a queue.
///
/// Use instead:
/// - [`simplex`](crate::simplex) or a [`Queue`](crate::Queue) for more than one value;
/// - the handle of a child, which is a future of its result.
///
/// It corresponds to `tokio::sync::oneshot` within one process. Both ends can be sent: a request can contain the sender for its answer.
///
/// ```
/// use multiprocess::{self as mp, OneshotSender, Process, Queue};
///
/// async fn serve(requests: Queue<(u32, OneshotSender<u32>)>) -> mp::Result<()> {
///     while let Ok((number, answer)) = requests.get().await {
///         let _ = answer.send(2 * number); // The process that asked may be gone.
///     }
///     Ok(())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let requests = Queue::unbounded()?;
///         let server = Process::spawn(serve, (requests.clone(),))?;
///         let (sender, receiver) = mp::oneshot()?;
///         requests.put((21, sender)).await?;
///         assert_eq!(receiver.await?, 42);
///         requests.close();
///         server.await?
///     })
/// }
/// ```
///
/// # Errors
/// `Io` if no memory or descriptor is left.
pub fn oneshot<T: Item>() -> Result<(OneshotSender<T>, OneshotReceiver<T>)> {
    let (sender, receiver) = simplex()?;
    Ok((OneshotSender(sender), OneshotReceiver(receiver)))
}

/// The sending end of a [`oneshot`].
///
/// It is a serde value and can be sent to other processes. It is not `Clone`: one process has it at a time. If it is dropped
/// without a value, or its process ends, the receiver fails with `Closed`.
///
/// **Cost.** That of a one-way pipe: four descriptors and about 75 KiB of shared memory, while it is there.
#[derive(Serialize, Deserialize)]
#[serde(bound = "")]
pub struct OneshotSender<T>(Sender<T>);

impl<T: Item> OneshotSender<T> {
    /// Sends the value, without waiting.
    ///
    /// A value that was sent can be received even if this process ends at once.
    ///
    /// # Errors
    /// All of them return the value.
    /// - `Closed` if the receiver is gone.
    /// - `Encode` if `value` cannot be serialised.
    /// - `Io` if memory runs out.
    pub fn send(mut self, value: T) -> Result<(), SendError<T>> {
        self.0.try_send(value)
    }

    /// Waits until the receiver is gone, so that no value is needed any more.
    ///
    /// Cancel safe: dropping the future changes nothing.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let (mut sender, receiver) = multiprocess::oneshot::<u32>()?;
    /// assert!(!sender.is_closed());
    /// drop(receiver);
    /// sender.closed().await?;
    /// assert!(sender.is_closed());
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs, such as a
    /// descriptor.
    pub async fn closed(&mut self) -> Result<()> {
        self.0.closed().await
    }

    /// Returns `true` if the receiver is gone.
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

/// The receiving end of a [`oneshot`]: a future of the value.
///
/// It is a serde value and can be sent to other processes. It is not `Clone`: one process has it at a time. If it is dropped, the
/// sender fails with `Closed`. Cancel safe by reference: `&mut receiver` in a `select!` that takes another branch has taken nothing.
///
/// # Errors of the awaited result
/// - `Closed` if the sender is gone without a value, however its process ended.
/// - `Decode` if the value cannot be read as `T`.
/// - `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs.
#[derive(Serialize, Deserialize)]
#[serde(bound = "")]
#[must_use = "a future does nothing unless polled"]
pub struct OneshotReceiver<T>(Receiver<T>);

impl<T: Item> OneshotReceiver<T> {
    /// Receives the value if it is there now.
    ///
    /// ```
    /// # multiprocess::init();
    /// let (sender, mut receiver) = multiprocess::oneshot()?;
    /// assert_eq!(receiver.try_recv().unwrap_err().kind(), multiprocess::ErrorKind::Empty);
    /// sender.send(1)?;
    /// assert_eq!(receiver.try_recv()?, 1);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Empty` if it may still come. Otherwise as the awaited result.
    pub fn try_recv(&mut self) -> Result<T> {
        self.0.try_recv().map_err(renamed)
    }

    /// Receives the value, blocking this thread until it is there.
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As the awaited result.
    #[track_caller]
    pub fn blocking_recv(mut self) -> Result<T> {
        self.0.blocking_recv().map_err(renamed)
    }
}

impl<T: Item> Future for OneshotReceiver<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        let value = ready!(self.0.poll_next_unpin(cx));
        Poll::Ready(value.unwrap_or_else(|| Err(closed())))
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the sender of the oneshot went without a value, or its value was received before")
}

/// Turns an error of the pipe into one of the oneshot.
fn renamed(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Closed => closed(),
        ErrorKind::Empty => Error::new(ErrorKind::Empty, "the oneshot has no value yet"),
        _ => error,
    }
}

impl<T> fmt::Debug for OneshotSender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OneshotSender").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for OneshotReceiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OneshotReceiver").finish_non_exhaustive()
    }
}
