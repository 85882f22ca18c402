//! The transport between programs that share no memory: a byte stream.
//!
//! Messages are sent at once as far as possible; a task of the runtime that the connection was made in sends the rest, and another receives.
//! It receives one message and waits until that is taken, so a side that takes none delays the other end.

use super::transport::{Changed, Transport};
use crate::connection::{ByteConnection, ByteReceiver, ByteSender};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::sync::lock;
use crate::wire::EncodedMessage;
use futures_util::SinkExt;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::task::{Context, Poll, Waker};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

pub(crate) struct Stream {
    me: Weak<Self>,
    /// `None` once the connection has ended.
    out: Mutex<Option<Out>>,
    arrived: Mutex<Option<Result<EncodedMessage>>>,
    taken: Arc<Notify>,
    peer: String,
    runtime: Handle,
    receives: OnceLock<AbortHandle>,
    changed: Changed,
}

struct Out {
    sender: ByteSender,
    /// A task sends the rest, and must be the one that the socket wakes.
    is_flushing: bool,
}

/// Ends the connection when the receiving task ends, be it with its runtime.
struct Receives {
    stream: Weak<Stream>,
    /// Why it ends, and the topic of that.
    why: (&'static str, Topic),
}

impl Drop for Receives {
    fn drop(&mut self) {
        if let Some(stream) = self.stream.upgrade() {
            let (why, topic) = self.why;
            let why = format!("the connection to the manager at {} {why}", stream.peer);
            stream.arrive(Err(Error::new(ErrorKind::Closed, why).explained_by(topic)));
        }
    }
}

impl Stream {
    /// In the runtime that it is to live in.
    pub(crate) fn open(connection: ByteConnection, changed: Changed) -> Arc<Self> {
        let peer = connection.peer_addr().to_string();
        let (sender, receiver) = connection.split();
        let out = Mutex::new(Some(Out { sender, is_flushing: false }));
        let (arrived, taken, receives, runtime) =
            (Mutex::default(), Arc::default(), OnceLock::new(), Handle::current());
        let new = |me: &Weak<Self>| Self { me: me.clone(), out, arrived, taken, peer, runtime, receives, changed };
        let stream = Arc::new_cyclic(new);
        let task = tokio::spawn(receive(stream.me.clone(), stream.taken.clone(), receiver));
        let _ = stream.receives.set(task.abort_handle());
        stream
    }

    fn arrive(&self, message: Result<EncodedMessage>) {
        *lock(&self.arrived) = Some(message);
        (self.changed)();
    }

    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(out) = &mut *lock(&self.out) else { return Poll::Ready(()) };
        // An error is the end of the connection, which the receiving task notices.
        out.is_flushing = out.sender.poll_flush_unpin(cx).is_pending();
        if out.is_flushing { Poll::Pending } else { Poll::Ready(()) }
    }
}

async fn receive(stream: Weak<Stream>, taken: Arc<Notify>, receiver: ByteReceiver) {
    let why = ("has ended, because its runtime has ended: connect again from one that goes on", Topic::RuntimeEnded);
    let mut receives = Receives { stream, why };
    loop {
        let message = receiver.recv_bytes().await.inspect_err(|error| {
            tracing::debug!(%error, "the connection of a manager is lost");
            receives.why = ("is lost: connect again", Topic::ManagerGone);
        });
        let (Ok(message), Some(stream)) = (message, receives.stream.upgrade()) else { return };
        stream.arrive(Ok(EncodedMessage::new(message, Vec::new())));
        drop(stream);
        taken.notified().await;
    }
}

async fn flush(stream: Weak<Stream>) {
    poll_fn(|cx| stream.upgrade().map_or(Poll::Ready(()), |stream| stream.poll_flush(cx))).await;
    stream.upgrade().iter().for_each(|stream| (stream.changed)());
}

impl Transport for Stream {
    fn carries_descriptors(&self) -> bool {
        false
    }

    fn has_room(&self) -> bool {
        !lock(&self.out).as_ref().is_some_and(|out| out.is_flushing)
    }

    fn send(&self, message: EncodedMessage) -> Result<bool> {
        let mut open = lock(&self.out);
        let out = open.as_mut().ok_or_else(|| Error::closed("manager"))?;
        out.sender.start_send_unpin(message.bytes().to_vec())?;
        let is_flushing = out.is_flushing;
        drop(open);
        if !is_flushing && self.poll_flush(&mut Context::from_waker(Waker::noop())).is_pending() {
            self.runtime.spawn(flush(self.me.clone()));
        }
        Ok(true)
    }

    fn recv(&self) -> Option<Result<EncodedMessage>> {
        let message = lock(&self.arrived).take()?;
        self.taken.notify_one();
        Some(message)
    }

    fn has_message(&self) -> bool {
        lock(&self.arrived).is_some()
    }

    fn has_hung_up(&self) -> bool {
        lock(&self.arrived).as_ref().is_some_and(Result::is_err)
    }

    fn close(&self) {
        let out = lock(&self.out).take();
        drop(out);
        self.receives.get().iter().for_each(|task| task.abort());
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.close();
    }
}
