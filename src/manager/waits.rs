//! Operations that may have to wait, and what they bring.
//!
//! Such an operation is tried in its object's turn. If it has to wait it is parked at the object, where it holds neither
//! the turn nor a thread, and is tried again after every change. What it brings (an item, a permit) is the asker's under
//! a ticket, until the asker says that it took it, or gives it back. Who disconnects gives everything back.
//!
//! # Cancel
//! A wait that is dropped gives back: its place, or what it got meanwhile.

use super::link::{Asked, Handle};
use super::method::{self, Waiting};
use super::protocol;
use super::proxy::{Lend, Proxy};
use crate::error::{Error, ErrorKind, Result};
use crate::wire::{self, Message};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::any::Any;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

/// Who asks: the connection, and the number of the request there.
pub(super) type Ticket = (u64, u64);

/// How an operation ends for its asker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// What it brought is the asker's for good.
    Took,
    /// The asker wants it no more, or needs it no more.
    GaveBack,
    /// The asker is gone.
    Lost,
}

/// An object with such operations.
pub(super) trait Waits: Send + 'static {
    fn settle(&mut self, ticket: Ticket, end: End);
}

/// [`Waits::settle`] of an object whose type is not known.
pub(super) type Settle = fn(&mut (dyn Any + Send), Ticket, End);

pub(super) fn settle<T: Waits>(object: &mut (dyn Any + Send), ticket: Ticket, end: End) {
    if let Some(object) = object.downcast_mut::<T>() {
        object.settle(ticket, end);
    }
}

/// What a waiting operation answers.
pub(super) fn ready<R: Serialize>(value: &R) -> Poll<Result<Message>> {
    Poll::Ready(wire::encode_by_serde(&Lend(value)))
}

/// Lets a wait end after `timeout`; `what` was not in time then.
pub(super) async fn in_time<R>(timeout: Duration, wait: impl Future<Output = Result<R>>, what: &str) -> Result<R> {
    let waited = tokio::time::timeout(timeout, wait).await;
    waited.unwrap_or_else(|_| Err(Error::new(ErrorKind::Timeout, format!("{what} within {timeout:?}"))))
}

impl<T> Proxy<T> {
    /// Runs `f` until it is ready. What it brought is held by what is returned with it.
    pub(super) async fn wait<R, F, A>(&self, f: F, args: A) -> Result<(R, Asked)>
    where
        T: Waits,
        R: DeserializeOwned + 'static,
        F: Fn(&mut T, &mut Option<A>, Ticket) -> Poll<Result<Message>> + Copy + 'static,
        A: Serialize + DeserializeOwned + Send + 'static,
    {
        let handle: Arc<Handle> = self.handle.clone();
        let mut request = handle.link.request(protocol::WAIT);
        let message = request.encode(|| wire::encode(&args))?;
        request.number(0);
        request.op(&method::call_op::<F, T, A, Waiting>(handle.object, f)).value(&message, &args);
        drop((message, args));
        let (mut reader, asked) = Asked::ask(handle, request).await?;
        let Lend(value) = reader.part()?;
        Ok((value, asked))
    }

    /// As [`wait`](Self::wait), and takes what it brought.
    pub(super) async fn wait_and_take<R, F, A>(&self, f: F, args: A) -> Result<R>
    where
        T: Waits,
        R: DeserializeOwned + 'static,
        F: Fn(&mut T, &mut Option<A>, Ticket) -> Poll<Result<Message>> + Copy + 'static,
        A: Serialize + DeserializeOwned + Send + 'static,
    {
        let (value, asked) = self.wait(f, args).await?;
        asked.take();
        Ok(value)
    }
}
