//! A cancellation token: an event that is set once and never cleared, and the events of the tokens that it is a child of.
//!
//! A child's cancellation is derived: it is cancelled if its own event or one of its ancestors' is set. So nothing has to be
//! passed on from a parent to its children, and no death can interrupt that. The shared state is that of [`event`](super::event).
//!
//! # Death
//! | killed | what follows | test (`tests/pieces.rs`, `tokens`) |
//! |---|---|---|
//! | a process with a token, a guard or a wait | nothing is cancelled | `a_process_that_is_killed_cancels_nothing` |
//! | one that cancels, after the flag is set | the token is cancelled, and waiters are woken | `killed_while_it_cancels_the_token_is_cancelled_and_waiters_are_woken` |
//!
//! # Cancel
//! | dropped | what follows | test |
//! |---|---|---|
//! | a wait | nothing has changed | `ten_thousand_dropped_waits_leave_nothing_behind` |
//! | a guard | its token is cancelled | `guards_cancel_unless_they_are_disarmed` |

use super::event::Event;
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::{fork, timer};
use crate::wait;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::pin::pin;
use std::time::Duration;
use tokio::runtime::Handle;

/// A token by which work is cancelled, in whichever processes it runs.
///
/// Use instead:
/// - [`Event`](crate::Event) for a flag that can be cleared again;
/// - [`current_task`](crate::current_task) in a task of a pool, which is cancelled by dropping its call.
///
/// All clones of a token are one token, in every process: [`cancel`](CancellationToken::cancel) on any of them cancels all, for
/// good, and wakes all that wait for it. It corresponds to [`tokio_util::sync::CancellationToken`] within one process.
///
/// ```
/// use multiprocess::{self as mp, CancellationToken, Process};
///
/// async fn serve(stop: CancellationToken) -> u32 {
///     let mut served = 0;
///     while !stop.is_cancelled() {
///         served += 1; // One request.
///         tokio::task::yield_now().await;
///     }
///     served
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let stop = CancellationToken::new()?;
///         let server = Process::spawn(serve, (stop.clone(),))?;
///         stop.cancel();
///         server.await?;
///         Ok(())
///     })
/// }
/// ```
///
/// # Handles
/// A handle is cheap to clone and is a serde value. It can be an argument, a result, or part of a value in a queue or a
/// pipe. The token exists as long as any process or message has a handle.
///
/// # Children
/// A [child token](CancellationToken::child_token) is cancelled with its parent, and can be cancelled alone. It may be made in
/// any process that has the parent, and it may be used where the parent is not.
///
/// # Details
/// - **Death.** Only `cancel` cancels. A process that is killed cancels nothing by its death, also if it holds the last
///   handle, waits, or has a [guard](CancellationToken::drop_guard): a guard of a killed process does not run.
///   To learn that a process has ended, wait for the process.
/// - **Cancel.** A dropped [`cancelled`](CancellationToken::cancelled) has changed nothing.
/// - **Cost.** [`is_cancelled`](CancellationToken::is_cancelled) is one load for the token itself and one for each ancestor.
///   `cancel` makes a system call only to wake a process. A token is one descriptor and 4 KiB; a process that has a child token has
///   its ancestors too.
#[derive(Clone, Serialize, Deserialize)]
pub struct CancellationToken {
    own: Event,
    /// The nearest first.
    ancestors: Vec<Event>,
}

/// A wait that the system refused a resource for is tried again after this time.
const TRY_AGAIN: Duration = Duration::from_millis(10);

impl CancellationToken {
    /// Creates a token that is not cancelled.
    ///
    /// ```
    /// # multiprocess::init();
    /// let token = multiprocess::CancellationToken::new()?;
    /// assert!(!token.is_cancelled());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Io` if no memory or descriptor is left.
    pub fn new() -> Result<Self> {
        Ok(Self { own: event()?, ancestors: Vec::new() })
    }

    /// Creates a token that is cancelled when this one is, and that can be cancelled alone.
    ///
    /// ```
    /// # multiprocess::init();
    /// let parent = multiprocess::CancellationToken::new()?;
    /// let (one, other) = (parent.child_token()?, parent.child_token()?);
    /// one.cancel();
    /// assert!(!parent.is_cancelled() && !other.is_cancelled());
    /// parent.cancel();
    /// assert!(other.is_cancelled());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Io` if no memory or descriptor is left.
    pub fn child_token(&self) -> Result<Self> {
        Ok(Self { own: event()?, ancestors: self.events().cloned().collect() })
    }

    fn events(&self) -> impl Iterator<Item = &Event> {
        std::iter::once(&self.own).chain(&self.ancestors)
    }

    /// Cancels the token and its children, in every process, and wakes all that wait for them. Again it has no further effect.
    ///
    /// ```
    /// # multiprocess::init();
    /// let token = multiprocess::CancellationToken::new()?;
    /// token.clone().cancel();
    /// assert!(token.is_cancelled());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn cancel(&self) {
        self.own.set();
    }

    /// Returns `true` if the token, or one that it is a child of, is cancelled. Never waits.
    #[inline]
    pub fn is_cancelled(&self) -> bool {
        self.own.is_set() || self.ancestors.iter().any(Event::is_set)
    }

    /// Waits until the token, or one that it is a child of, is cancelled.
    ///
    /// Cancel safe: dropping the future changes nothing. Where the system refuses a descriptor that waiting needs, it tries
    /// again every 10 ms.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let token = multiprocess::CancellationToken::new()?;
    /// token.cancel();
    /// tokio::select! {
    ///     () = token.cancelled() => {}
    ///     () = std::future::pending() => unreachable!(),
    /// }
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Panics
    /// If it must wait outside a tokio runtime, or if waiting fails and the runtime has no timer. It never panics for a
    /// token that is cancelled already.
    pub async fn cancelled(&self) {
        while let Err(error) = self.wait().await {
            assert!(Handle::try_current().is_ok(), "cannot wait for a cancellation: {error}");
            timer::sleep(TRY_AGAIN).await;
        }
    }

    async fn wait(&self) -> Result<()> {
        if self.ancestors.is_empty() {
            return self.own.wait().await;
        }
        let waits = self.events().map(|event| Box::pin(event.wait()));
        futures_util::future::select_all(waits).await.0
    }

    /// Waits until the token is cancelled, for at most `timeout`.
    ///
    /// Cancel safe: dropping the future changes nothing. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let token = multiprocess::CancellationToken::new()?;
    /// let late = token.cancelled_timeout(std::time::Duration::from_millis(1)).await;
    /// assert_eq!(late.unwrap_err().kind(), multiprocess::ErrorKind::Timeout);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Timeout` if it was not cancelled in time; `Io` where there is no tokio timer.
    pub async fn cancelled_timeout(&self, timeout: Duration) -> Result<()> {
        let limited = timer::limited(timeout, self.cancelled());
        let limited = limited.map_err(|error| Error::io("cannot wait for a cancellation", error))?;
        limited.await.map_err(|_| Error::new(ErrorKind::Timeout, "the token was not cancelled in time"))
    }

    /// Blocks this thread until the token is cancelled.
    ///
    /// ```
    /// # multiprocess::init();
    /// let token = multiprocess::CancellationToken::new()?;
    /// token.cancel();
    /// token.blocking_cancelled()?;
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// `Io` if the system refuses a resource that waiting needs, such as a descriptor.
    #[track_caller]
    pub fn blocking_cancelled(&self) -> Result<()> {
        if self.ancestors.is_empty() {
            return self.own.blocking_wait();
        }
        wait::refuse_inside_async();
        let failed = |error| Error::io("cannot wait for a cancellation", error);
        wait::block_on(self.wait()).map_err(failed)?
    }

    /// Runs `future` until it is ready or the token is cancelled: then `None`, and the future is dropped.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let token = multiprocess::CancellationToken::new()?;
    /// assert_eq!(token.run_until_cancelled(async { 6 * 7 }).await, Some(42));
    /// token.cancel();
    /// assert_eq!(token.run_until_cancelled(std::future::pending::<()>()).await, None);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Panics
    /// As [`cancelled`](Self::cancelled).
    pub async fn run_until_cancelled<F: Future>(&self, future: F) -> Option<F::Output> {
        let (future, cancelled) = (pin!(future), pin!(self.cancelled()));
        match futures_util::future::select(cancelled, future).await {
            futures_util::future::Either::Left(_) => None,
            futures_util::future::Either::Right((value, _)) => Some(value),
        }
    }

    /// Makes a guard that cancels the token when it is dropped.
    ///
    /// ```
    /// # multiprocess::init();
    /// let token = multiprocess::CancellationToken::new()?;
    /// {
    ///     let _guard = token.clone().drop_guard();
    /// }
    /// assert!(token.is_cancelled());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn drop_guard(self) -> CancellationGuard {
        CancellationGuard(Some(self))
    }

    /// Makes a token of tokio-util that is cancelled when this one is, as a child would be: cancelling it does not cancel this.
    ///
    /// It costs a task of the current runtime, which holds a handle of this token until either is cancelled or the runtime ends.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let token = multiprocess::CancellationToken::new()?;
    /// let local: tokio_util::sync::CancellationToken = token.to_tokio()?;
    /// token.cancel();
    /// local.cancelled().await;
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Io` outside a tokio runtime.
    pub fn to_tokio(&self) -> Result<tokio_util::sync::CancellationToken> {
        let local = tokio_util::sync::CancellationToken::new();
        if self.is_cancelled() {
            local.cancel();
            return Ok(local);
        }
        let (token, twin) = (self.clone(), local.clone());
        runtime()?.spawn(async move {
            if twin.run_until_cancelled(token.cancelled()).await.is_some() {
                twin.cancel();
            }
        });
        Ok(local)
    }

    /// Makes a token that is cancelled when a token of tokio-util is, as a child would be: cancelling it does not cancel that.
    ///
    /// It costs a task of the current runtime, which holds a handle of the new token until either is cancelled. When the runtime
    /// or the process ends first, nothing is cancelled any more.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let local = tokio_util::sync::CancellationToken::new();
    /// let token = multiprocess::CancellationToken::from_tokio(&local)?;
    /// local.cancel();
    /// token.cancelled().await;
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Io` outside a tokio runtime, or if no memory or descriptor is left.
    pub fn from_tokio(local: &tokio_util::sync::CancellationToken) -> Result<Self> {
        let token = Self::new()?;
        if local.is_cancelled() {
            token.cancel();
            return Ok(token);
        }
        let (local, twin) = (local.clone(), token.clone());
        runtime()?.spawn(async move {
            if twin.run_until_cancelled(local.cancelled()).await.is_some() {
                twin.cancel();
            }
        });
        Ok(token)
    }
}

fn event() -> Result<Event> {
    Event::new().map_err(|error| {
        Error::new(error.kind(), format!("no cancellation token: {}", error.text())).with_source(error)
    })
}

fn runtime() -> Result<Handle> {
    let outside = |error| {
        Error::io("a token of tokio-util is followed by a task", std::io::Error::other(error))
            .explained_by(Topic::NoRuntime)
    };
    Handle::try_current().map_err(outside)
}

impl fmt::Debug for CancellationToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancellationToken").field("is_cancelled", &self.is_cancelled()).finish_non_exhaustive()
    }
}

/// Cancels its token when it is dropped; made by [`CancellationToken::drop_guard`].
///
/// It does not run in a process that is killed, and does nothing in one that was forked from its own.
///
/// ```
/// # multiprocess::init();
/// let guard = multiprocess::CancellationToken::new()?.drop_guard();
/// let token = guard.disarm();
/// assert!(!token.is_cancelled());
/// # Ok::<(), multiprocess::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "dropped at once, it cancels its token at once"]
pub struct CancellationGuard(Option<CancellationToken>);

impl CancellationGuard {
    /// Gives the token back, which is not cancelled.
    pub fn disarm(mut self) -> CancellationToken {
        match self.0.take() {
            Some(token) => token,
            None => unreachable!("a guard has its token until it is dropped or disarmed"),
        }
    }
}

impl Drop for CancellationGuard {
    fn drop(&mut self) {
        // A forked process cannot cancel, and the guard of the original is still there.
        if !fork::is_forked() {
            self.0.take().iter().for_each(CancellationToken::cancel);
        }
    }
}
