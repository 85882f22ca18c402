//! The connection to a manager on another host.

use super::pending::PendingCalls;
use crate::connection::{ByteConnection, ByteSender};
use crate::os::sync::lock;
use crate::wire::EncodedMessage;
use futures_util::SinkExt;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// The connection to a manager on another host. What can go out at once does; the rest, and all that comes in, is
/// moved by two tasks, in the runtime that the connection was made in.
pub(crate) struct Far {
    sender: Mutex<FarSender>,
    /// There is a rest.
    is_pressed: Arc<Notify>,
    pub(crate) slots: PendingCalls,
    pub(crate) peer: String,
    /// Its tasks ended with the runtime that it was made in.
    is_without_runtime: AtomicBool,
    tasks: Mutex<Vec<AbortHandle>>,
}

/// Fails what waits for an answer when the reading task ends, be it with its runtime.
struct Reads {
    far: Weak<Far>,
    is_over: bool,
}

impl Drop for Reads {
    fn drop(&mut self) {
        if let Some(far) = self.far.upgrade() {
            far.is_without_runtime.store(!self.is_over, Relaxed);
            far.slots.fail();
        }
    }
}

struct FarSender {
    sender: ByteSender,
    /// The writing task is at it, and must be the one that the socket wakes.
    is_flushing: bool,
}

impl Far {
    pub(crate) fn open(connection: ByteConnection) -> Arc<Self> {
        let peer = connection.peer_addr().to_string();
        let (sender, receiver) = connection.split();
        let far = Arc::new(Self {
            sender: Mutex::new(FarSender { sender, is_flushing: false }),
            is_pressed: Arc::default(),
            slots: PendingCalls::default(),
            peer,
            is_without_runtime: AtomicBool::new(false),
            tasks: Mutex::default(),
        });
        let (reads, writes) = (Reads { far: Arc::downgrade(&far), is_over: false }, Arc::downgrade(&far));
        let reader = tokio::spawn(async move {
            let mut reads = reads;
            loop {
                let answer = receiver.recv_bytes().await;
                let Some(far) = reads.far.upgrade() else { return };
                match answer.map(|answer| far.slots.deliver(EncodedMessage::new(answer, Vec::new()))) {
                    Ok(true) => {}
                    Ok(false) => {
                        tracing::warn!(peer = far.peer, "a manager answers what it was not asked");
                        reads.is_over = true;
                        return far.lose();
                    }
                    Err(error) => {
                        tracing::debug!(%error, "the connection to a manager is lost");
                        reads.is_over = true;
                        return;
                    }
                }
            }
        });
        let is_pressed = far.is_pressed.clone();
        let writer = tokio::spawn(async move {
            loop {
                is_pressed.notified().await;
                let flush = |cx: &mut Context<'_>| writes.upgrade().map_or(Poll::Ready(()), |far| far.poll_flush(cx));
                poll_fn(flush).await;
            }
        });
        lock(&far.tasks).extend([reader.abort_handle(), writer.abort_handle()]);
        far
    }

    pub(crate) fn tell(&self, request: EncodedMessage) {
        let out = &mut *lock(&self.sender);
        let told = out.sender.start_send_unpin(request.bytes().to_vec());
        if !out.is_flushing && told.is_ok() {
            let mut now = Context::from_waker(Waker::noop());
            out.is_flushing = out.sender.poll_flush_unpin(&mut now).is_pending();
            if out.is_flushing {
                self.is_pressed.notify_one();
            }
        }
    }

    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut out = lock(&self.sender);
        let flushed = out.sender.poll_flush_unpin(cx);
        out.is_flushing = flushed.is_pending();
        // What fails now may drop handles, which tell of it here.
        drop(out);
        flushed.map(|flushed| {
            if let Err(error) = flushed {
                // The reading task learns of it, too.
                tracing::debug!(%error, "the connection to a manager is lost");
                self.slots.fail();
            }
        })
    }
}

impl Far {
    /// Why there will be no answer any more.
    pub(crate) fn why_lost(&self) -> &'static str {
        match self.is_without_runtime.load(Relaxed) {
            true => "has ended, because its runtime has ended: connect again from one that goes on",
            false => "is lost: connect again",
        }
    }

    /// Hangs up.
    fn lose(&self) {
        self.slots.fail();
        let out = &mut *lock(&self.sender);
        // What cannot be sent at once need not be sent any more.
        let _ = out.sender.poll_close_unpin(&mut Context::from_waker(Waker::noop()));
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        lock(&self.tasks).drain(..).for_each(|task| task.abort());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::{Listener, connect};
    use crate::manager::client::link::{Handle, Link};
    use crate::manager::client::pending::Slot;
    use crate::manager::wire::marshal::Kept;
    use crate::manager::wire::messages::{self, Writer};
    use std::sync::mpsc;
    use std::time::Duration;

    /// The handles that an abandoned call kept go with the connection, by the writer that finds it lost.
    #[test]
    fn a_writer_that_finds_the_connection_lost_can_drop_handles() {
        let (done, is_done) = mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = Listener::bind("127.0.0.1:0").authkey(b"key").await.unwrap();
                let address = listener.local_addr();
                let client = async { connect(&address, Some(b"key")).await.unwrap() };
                let (client, server) = tokio::join!(client, listener.accept());
                let far = Far::open(client);
                // The writer's part is done here, and nobody else's.
                lock(&far.tasks).drain(..).for_each(|task| task.abort());
                let link = Link::of((1, 1), 1, far.clone());
                let kept: Vec<Kept> = vec![Arc::new(Handle::held(&link, 7))];
                lock(&far.slots.0).slots.insert(1, Slot::Abandoned(Arc::<Link>::downgrade(&link), kept));
                drop(server.unwrap());
                while !far.slots.is_gone() {
                    far.tell(Writer::request(messages::RELEASE).into_encoded());
                    poll_fn(|cx| far.poll_flush(cx)).await;
                    tokio::task::yield_now().await;
                }
                assert!(lock(&far.slots.0).slots.is_empty());
            });
            done.send(()).unwrap();
        });
        is_done.recv_timeout(Duration::from_secs(20)).expect("the writer does not wait for itself");
    }
}
