//! The public type of a host: a pool that serves.

use crate::error::{Error, Result};
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;

/// The commands to a service.
pub(super) enum Command {
    Drain(Duration),
    /// Gives everything back at once.
    GiveUp,
}

/// A pool that serves a cluster pool; made by [`Pool::serve`](crate::Pool::serve). A future that is ready when a
/// [`drain`](Self::drain) is complete, or with an error from which it cannot recover by itself.
///
/// # Drop
/// All items are given back at once. Running items are killed, and other hosts run them.
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// use std::time::Duration;
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(2)?;
/// let serving = pool.serve("nats://127.0.0.1:4222/thumbs");
/// // On SIGTERM, say:
/// serving.drain(Duration::from_secs(30));
/// let served = serving.await?;
/// println!("{} items answered, {} given back", served.items, served.given_back);
/// # Ok(()) }) }
/// ```
#[must_use = "dropped, it serves no more"]
pub struct Serving {
    task: JoinHandle<Result<Served>>,
    commands: UnboundedSender<Command>,
}

/// The work that a service did; the outcome of a [`Serving`].
///
/// ```
/// # use multiprocess::cluster::Served;
/// let served = Served::default();
/// assert_eq!((served.items, served.given_back, served.killed), (0, 0, 0));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Served {
    /// Items that were answered.
    pub items: usize,
    /// Items that were taken and given back, for other hosts to run: those not begun at a drain, and those killed.
    pub given_back: usize,
    /// Items that were killed while they ran: at the end of a drain's grace, or because the server was away for longer than a lease.
    pub killed: usize,
}

impl Serving {
    pub(super) fn new(task: JoinHandle<Result<Served>>, commands: UnboundedSender<Command>) -> Self {
        Self { task, commands }
    }

    /// Takes no more items, gives back those that have not begun, and lets running items go on for at most `grace`; then they are
    /// killed and given back. Returns at once: the `Serving` itself is ready when all of that is done.
    pub fn drain(&self, grace: Duration) {
        // If it has ended there is nothing to drain.
        let _ = self.commands.send(Command::Drain(grace));
    }
}

impl Future for Serving {
    type Output = Result<Served>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let joined = ready!(Pin::new(&mut self.task).poll(cx));
        // Nobody but the end of the runtime cancels it.
        Poll::Ready(joined.unwrap_or_else(|error| Err(Error::other(error))))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::GiveUp);
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serving").field("has_ended", &self.task.is_finished()).finish()
    }
}
