//! A client's part of waitable operations (see `wire/waiting.rs`).
//!
//! # Cancel
//! A wait that is dropped gives back its place in the queue, or what it got meanwhile. It reports whether the answer was read: what was
//! not read goes back as if it had never been taken. A wait that still waits for room in the pipe was never made.
//!
//! # Death
//! Of a client that is killed it is not known whether it had read the answer. What it got goes back, and the next holder of a lock that
//! it got learns that its holder died.

use crate::channel::Item;
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::manager::client::handle::Handle;
use crate::manager::client::link::Pending;
use crate::manager::client::proxy::Proxy;
use crate::manager::wire::messages::{self, Lend};
use crate::manager::wire::method::{self, Invoke, Waiting};
use crate::manager::wire::waiting::End;
use crate::os::{fault, reactor, timer};
use serde::de::DeserializeOwned;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn no_timer(error: std::io::Error) -> Error {
    Error::io("cannot wait for a manager", error)
}

/// Drops a wait after `timeout`, which must leave nothing behind; `what` was not in time then.
pub(crate) async fn in_time<R>(timeout: Duration, wait: impl Future<Output = Result<R>>, what: &str) -> Result<R> {
    let waited = timer::limited(timeout, wait).map_err(no_timer)?.await;
    waited.unwrap_or_else(|_| Err(Error::new(ErrorKind::Timeout, format!("{what} within {timeout:?}"))))
}

impl<T: Send + 'static> Proxy<T> {
    /// Runs `f` until it is ready. The [`Asked`] holds what it brought. After `timeout`, `f` runs once more as late and decides the
    /// outcome, which is waited for; only a request that was not sent ends without it.
    pub(crate) async fn wait<R, F, A>(&self, timeout: Option<Duration>, f: F, args: A) -> Result<(R, Asked)>
    where
        R: DeserializeOwned + 'static,
        F: Invoke<T, A, Waiting>,
        A: Item,
    {
        let (handle, link) = (self.handle.clone(), &self.handle.link);
        let mut request = link.request(messages::WAIT);
        request.op(&method::call_op::<F, T, A, Waiting>(handle.object, f)).append(&args)?;
        drop(args);
        timeout.map_or(Ok(()), |_| reactor::has_timer()).map_err(no_timer)?;
        let start = Instant::now();
        let why = "the manager could not be asked in time";
        let late = || Err(Error::new(ErrorKind::Timeout, why).explained_by(Topic::ManagerSilent));
        let mut pending = at_most(timeout, link.send(request, Some(End::Unread))).await.unwrap_or_else(late)?;
        let left = timeout.map(|timeout| timeout.saturating_sub(start.elapsed()));
        let answer = {
            let mut answer = pin!(pending.answer());
            match at_most(left, &mut answer).await {
                Some(answer) => answer?,
                // The manager decides the outcome.
                None => {
                    link.tell(messages::EXPIRE, &[pending.id]);
                    answer.await?
                }
            }
        };
        fault::point("manager.got");
        let Lend(value) = link.open(answer)?.part()?;
        pending.settles = Some(End::GaveBack);
        Ok((value, Asked { pending, handle }))
    }
}

/// The result of `wait`, unless the time is over first.
async fn at_most<R>(timeout: Option<Duration>, wait: impl Future<Output = R>) -> Option<R> {
    match timeout {
        None => Some(wait.await),
        Some(timeout) => timer::within(timeout, wait).await.ok(),
    }
}

/// A result that must be taken or given back. Dropping it gives it back.
pub(crate) struct Asked {
    pending: Pending,
    handle: Arc<Handle>,
}

impl Asked {
    /// The number of the request that asked.
    pub(crate) fn id(&self) -> u64 {
        self.pending.id
    }

    /// Whether it was asked of this object, by this connection.
    pub(crate) fn is_of<T>(&self, proxy: &Proxy<T>) -> bool {
        let (one, other) = (&self.handle, &proxy.handle);
        one.object == other.object && Arc::ptr_eq(&one.link, &other.link)
    }

    /// Its result is taken for good.
    pub(crate) fn take(mut self) {
        self.pending.settles = Some(End::Took);
    }
}
