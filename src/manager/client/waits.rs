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
use crate::error::{Error, ErrorKind, Result};
use crate::manager::client::handle::Handle;
use crate::manager::client::link::Pending;
use crate::manager::client::proxy::Proxy;
use crate::manager::wire::messages::{self, Lend};
use crate::manager::wire::method::{self, Invoke, Waiting};
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
        let late = || Err(Error::new(ErrorKind::Timeout, "the manager could not be asked in time"));
        let mut pending = at_most(timeout, link.send(request, Some(messages::UNREAD))).await.unwrap_or_else(late)?;
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
        pending.settles = Some(messages::GIVE_BACK);
        Ok((value, Asked { pending, _handle: handle }))
    }

    /// As [`wait`](Self::wait), and takes what it brought.
    pub(crate) async fn wait_and_take<R, F, A>(&self, timeout: Option<Duration>, f: F, args: A) -> Result<R>
    where
        R: DeserializeOwned + 'static,
        F: Invoke<T, A, Waiting>,
        A: Item,
    {
        let (value, asked) = self.wait(timeout, f, args).await?;
        asked.take();
        Ok(value)
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
    _handle: Arc<Handle>,
}

impl Asked {
    /// The number of the request that asked.
    pub(crate) fn id(&self) -> u64 {
        self.pending.id
    }

    /// Its result is taken for good.
    pub(crate) fn take(mut self) {
        self.pending.settles = Some(messages::TOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::client::primitives::{ConditionObject, ConditionProxy, LockObject, LockProxy};
    use crate::manager::client::proxy;
    use crate::manager::client::queue::{QueueObject, QueueProxy};
    use crate::manager::mock::{fill, linked, proxy};
    use crate::manager::wire::messages::RELEASE;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn dropped_wait_is_never_made_if_unsent_and_given_back_if_sent() {
        let (link, mut manager) = linked();
        let lock = LockProxy(proxy::<LockObject>(&link));
        fill(&link);
        assert!(lock.acquire().now_or_never().is_none());
        let queue = QueueProxy(proxy::<QueueObject<u32>>(&link));
        let mut getting = Box::pin(queue.get());
        assert!((&mut getting).now_or_never().is_none());
        // There is room once some was read.
        let (kind, id) = manager.next_while(&mut getting).await;
        assert_eq!(kind, messages::WAIT);
        drop(getting);
        assert_eq!(manager.next().await, (messages::UNREAD, id));
    }

    #[tokio::test]
    async fn object_created_by_dropped_call_is_released() {
        let (link, mut manager) = linked();
        fill(&link);
        let mut making = Box::pin(proxy::create(&link, LockObject::default, ()));
        let (kind, id) = manager.next_while(&mut making).await;
        assert_eq!(kind, messages::CALL);
        drop(making);
        manager.answer(id, |answer| answer.reference(42).unwrap()).await;
        assert_eq!(manager.next().await, (RELEASE, 42));
    }

    #[tokio::test]
    async fn condition_wait_that_is_never_sent_keeps_the_lock() {
        let (link, mut manager) = linked();
        let condition = ConditionProxy(proxy::<ConditionObject>(&link));
        let answer = async {
            let (kind, id) = manager.next().await;
            assert_eq!(kind, messages::WAIT);
            manager.answer(id, |answer| answer.append_part(&Lend(false)).unwrap()).await;
            id
        };
        let (held, id) = futures::join!(condition.lock(), answer);
        fill(&link);
        let error = condition.wait_timeout(held.unwrap(), Duration::from_millis(1)).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Timeout && error.has_guard(), "{error}");
        drop(error);
        assert_eq!(manager.next().await, (messages::GIVE_BACK, id));
    }

    #[tokio::test]
    async fn put_timeout_sends_nothing_late_and_leaves_a_sent_put_to_the_manager() {
        let (link, mut manager) = linked();
        fill(&link);
        let queue = QueueProxy(proxy::<QueueObject<u32>>(&link));
        let error = queue.put_timeout(1, Duration::from_millis(1)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        let mut putting = Box::pin(queue.put_timeout(2, Duration::from_secs(5)));
        let (kind, id) = manager.next_while(&mut putting).await;
        assert_eq!(kind, messages::WAIT);
        let answer = async {
            assert_eq!(manager.next().await, (messages::EXPIRE, id));
            manager.answer(id, |answer| answer.append_part(&Lend(())).unwrap()).await;
        };
        let (put, ()) = futures::join!(putting, answer);
        put.unwrap();
        assert_eq!(manager.next().await, (messages::TOOK, id));
    }
}
