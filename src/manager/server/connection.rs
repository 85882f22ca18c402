//! One client of a server: what it says, holds and waits for, and the way back to it.

use super::poller::Admits;
use super::state::{Connection, Event, Incoming, Job, Next, Out, ReplyTo, Server};
use crate::connection::ByteReceiver;
use crate::error::{Error, ErrorKind, Result};
use crate::manager::wire::greeting::Id;
use crate::manager::wire::local::Lease;
use crate::manager::wire::marshal::{Abroad, ServerEnd};
use crate::manager::wire::messages::{self, Reader, Writer};
use crate::manager::wire::method::Attempt;
use crate::manager::wire::waiting::End;
use crate::os::fault;
use crate::os::reactor;
use crate::os::sync::lock;
use crate::wire::EncodedMessage;
use futures_util::SinkExt;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use tokio::io::Interest;

impl Connection {
    pub(crate) fn abroad(self: &Arc<Self>) -> Option<Abroad> {
        self.is_far.then(|| Abroad::Server(self.clone()))
    }
}

impl ServerEnd for Connection {
    fn give(&self, manager: Id, object: u64) -> bool {
        let is_ours = manager == self.server.id && self.server.objects.hold(object);
        if is_ours {
            *lock(&self.held).entry(object).or_default() += 1;
        }
        is_ours
    }

    fn has(&self, object: u64) -> bool {
        object == messages::NAMES || lock(&self.held).contains_key(&object)
    }
}

impl Connection {
    /// Sends an answer, at once.
    pub(crate) fn reply(self: &Arc<Self>, answer: EncodedMessage) {
        let (id, made) = (messages::id_of(answer.bytes()).unwrap_or_default(), messages::made_in(answer.bytes()));
        let Err(error) = self.send(answer) else { return };
        if error.kind() == ErrorKind::Closed {
            return;
        }
        // Memory or descriptors run out: who asked hears of it, and has not got what was made.
        let mut refusal = Writer::answer(id);
        refusal.error(&error);
        if self.send(refusal.into_encoded()).is_err() {
            // It cannot be told anything, and so hears that this end is gone.
            let gone = std::mem::replace(&mut *lock(&self.out), Out::Gone);
            drop(gone);
        }
        made.into_iter().for_each(|object| self.release(object));
    }

    fn send(self: &Arc<Self>, answer: EncodedMessage) -> Result<()> {
        #[cfg(test)]
        if let Some(kind) = self.server.meddle(&answer) {
            return Err(Error::new(kind, "a test refuses it"));
        }
        match &mut *lock(&self.out) {
            Out::Near(outlet) => {
                let sent = outlet.send(answer).map_err(|refused| match refused.kind() {
                    ErrorKind::Full => {
                        Error::new(ErrorKind::Io, "more descriptors are on their way to the client than it takes")
                    }
                    _ => refused.into_error(),
                });
                if !sent? {
                    // It may ask again at once.
                    self.server.look.encourage();
                }
            }
            Out::Far(sender, is_flushing) => {
                // An error is the end of the connection, which its other half tells of.
                let sent = sender.start_send_unpin(answer.bytes().to_vec()).is_ok();
                let mut now = Context::from_waker(Waker::noop());
                if sent && !*is_flushing && sender.poll_flush_unpin(&mut now).is_pending() {
                    *is_flushing = true;
                    self.server.read(flush(self.clone()));
                }
            }
            Out::Gone => {}
        }
        Ok(())
    }

    /// It holds an object once less.
    pub(crate) fn release(&self, object: u64) {
        let mut held = lock(&self.held);
        if let Some(count) = held.get_mut(&object) {
            *count -= 1;
            if *count == 0 {
                held.remove(&object);
            }
            drop(held);
            self.server.objects.release([(object, 1)]);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.server.objects.release(std::mem::take(&mut *lock(&self.held)));
    }
}

impl Admits for Arc<Connection> {
    fn admits(&self) -> bool {
        // While another thread copies an answer, however large, nobody waits for that: what is begun meanwhile is one request.
        let Ok(mut out) = self.out.try_lock() else { return true };
        let Out::Near(outlet) = &mut *out else { return true };
        // Room that comes after this is told.
        outlet.has_room() || outlet.room().arm().is_err() || outlet.has_room()
    }
}

/// The next request, which is begun when the client has read its answers.
pub(crate) async fn next_request(connection: Arc<Connection>, receiver: ByteReceiver) -> Event {
    while matches!(&*lock(&connection.out), Out::Far(_, true)) {
        connection.flushed.notified().await;
    }
    let request = receiver.recv_bytes().await.map(|bytes| EncodedMessage::new(bytes, Vec::new()));
    Event::Request(connection, Incoming::Far(receiver), request)
}

async fn flush(connection: Arc<Connection>) -> Event {
    poll_fn(|cx| {
        let out = &mut *lock(&connection.out);
        let Out::Far(sender, is_flushing) = out else { return Poll::Ready(()) };
        *is_flushing = sender.poll_flush_unpin(cx).is_pending();
        if *is_flushing { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    connection.flushed.notify_one();
    Event::Flushed
}

pub(crate) async fn until_ended(lease: Lease, reader: Arc<OwnedFd>) -> Event {
    match reactor::watch(reader, Interest::READABLE) {
        Ok(watch) => drop(watch.readable().await.map(|mut ready| ready.clear_ready())),
        // Without a way to learn of its end it must not end.
        Err(error) => {
            tracing::warn!(%error, "a handle on its way cannot be watched; its object stays");
            std::future::pending::<()>().await;
        }
    }
    Event::LeaseEnded(lease)
}

#[cfg(test)]
impl Server {
    fn meddle(&self, answer: &EncodedMessage) -> Option<ErrorKind> {
        lock(&self.meddler).as_mut().and_then(|meddler| meddler(answer))
    }
}

/// What clients say.
impl Server {
    /// Does what a request says. A call is returned if it can go on, and waits in line at its object if not.
    pub(crate) fn take_request(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        request: EncodedMessage,
    ) -> Result<Option<Box<Job>>> {
        let mut reader = Reader::new(request)?;
        fault::point("manager.request");
        match reader.byte()? {
            messages::CALL => {
                let (id, left) = (reader.number()?, reader.number()?);
                let reply_to = ReplyTo::Client(connection.clone());
                let answer = Writer::answer(id).to(connection.abroad());
                return Ok(self.prepare(Job::new(reader, left, answer, reply_to), None));
            }
            messages::WAIT => {
                let id = reader.number()?;
                if lock(&connection.asked).contains_key(&id) {
                    return Err(messages::torn());
                }
                let reply_to = ReplyTo::Client(connection.clone());
                let mut job = Job::new(reader, 1, Writer::answer(id).to(connection.abroad()), reply_to);
                job.frame.wait = Some(Attempt::new((connection.number, id)));
                return Ok(self.prepare(job, None));
            }
            kind @ (messages::TOOK | messages::GIVE_BACK | messages::UNREAD) => {
                let id = reader.number()?;
                let object = lock(&connection.asked).remove(&id);
                if let Some(object) = object {
                    let end = match kind {
                        messages::TOOK => End::Took,
                        messages::GIVE_BACK => End::GaveBack,
                        _ => End::Unread,
                    };
                    self.tell(object, Next::Settle((connection.number, id), end));
                }
            }
            messages::EXPIRE => {
                let id = reader.number()?;
                let object = lock(&connection.asked).get(&id).cloned();
                if let Some(object) = object {
                    self.tell(object, Next::Expire((connection.number, id)));
                }
            }
            // Leases are for families, and ending the manager is for who started it.
            messages::LEASE_OPEN | messages::LEASE | messages::CLAIMED | messages::END if connection.is_far => {
                return Err(messages::torn());
            }
            messages::LEASE_OPEN => {
                let lease = (connection.number, reader.number()?);
                let reader = reader.fd()?;
                if !self.objects.open_lease(lease) {
                    return Err(messages::torn());
                }
                self.read(until_ended(lease, Arc::new(reader)));
            }
            messages::LEASE => self.objects.lease((connection.number, reader.number()?), reader.number()?),
            messages::CLAIM => {
                let object = reader.number()?;
                if self.objects.hold(object) {
                    *lock(&connection.held).entry(object).or_default() += 1;
                }
            }
            // The descriptor closes as the reader drops.
            messages::CLAIMED => {}
            messages::RELEASE => connection.release(reader.number()?),
            messages::COUNT => {
                // Without the namespace that is always there.
                let count = self.objects.len().saturating_sub(1) as u64;
                let mut answer = Writer::answer(reader.number()?).to(connection.abroad());
                answer.append_part(&count)?;
                connection.reply(answer.into_encoded());
            }
            messages::WHERE => {
                let mut answer = Writer::answer(reader.number()?).to(connection.abroad());
                answer.append_part(&self.address)?;
                connection.reply(answer.into_encoded());
            }
            messages::END => {
                let mut answer = Writer::answer(reader.number()?);
                answer.append_part(&())?;
                connection.reply(answer.into_encoded());
                self.finish();
            }
            _ => return Err(messages::torn()),
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::client::link::Handle;
    use crate::manager::client::namespace::{Names, Namespace};
    use crate::manager::client::pending::Brings;
    use crate::manager::client::proxy::{self, Proxy};
    use crate::manager::client::queue::Items;
    use crate::manager::mock::{Beside, beside};
    use crate::manager::wire::messages::Op;
    use crate::manager::wire::method::{Owned, Waiting, call_op, make_op};
    use crate::manager::wire::waiting::Try;
    use crate::os::socket::packet_pair;
    use crate::wire::{Attachment, Message};
    use std::sync::atomic::AtomicBool;
    use std::sync::atomic::Ordering::SeqCst;
    use std::task::Poll;
    use std::time::Duration;
    use tokio::time::timeout;

    /// Has answers refused that say what was made, one after the other like this.
    fn refuse_made(beside: &Beside, why: impl IntoIterator<Item = ErrorKind, IntoIter: Send + 'static>) {
        let mut why = why.into_iter();
        let is_begun = AtomicBool::new(false);
        *lock(&beside.server.meddler) = Some(Box::new(move |answer| {
            let is_its = is_begun.load(SeqCst) || messages::made_in(answer.bytes()).is_some();
            is_begun.store(is_its, SeqCst);
            if is_its { why.next() } else { None }
        }));
    }

    async fn is_let_go(why: impl IntoIterator<Item = ErrorKind, IntoIter: Send + 'static>) {
        let beside = beside().await;
        let before = beside.server.objects.len();
        refuse_made(&beside, why);
        let error = proxy::create(&beside.client, String::new, ()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        // It is told after the error.
        beside.until(|| beside.server.objects.len() == before).await;
        proxy::create(&beside.client, String::new, ()).await.unwrap();
    }

    #[tokio::test]
    async fn what_was_made_for_an_answer_that_cannot_be_sent_goes() {
        is_let_go([ErrorKind::Io]).await;
    }

    fn waits(_: &mut Items<u32>, _: &mut Option<(u32,)>, _: Try) -> Poll<Result<Message>> {
        Poll::Pending
    }

    /// Every kind of request, with every kind of number for an object.
    #[tokio::test]
    async fn no_request_on_any_object_harms_the_objects_of_others() {
        let beside = beside().await;
        let names = Namespace(Proxy::new(Handle::held(&beside.client, messages::NAMES)));
        names.set("key", 7u32).await.unwrap();
        let others = proxy::create(&beside.here(), || vec![1u32], ()).await.unwrap();
        let before = beside.server.objects.len();
        let make = |n: u32| vec![n];
        let doors = |object| {
            [
                Op { object, ..make_op(make) },
                Op { object, ..make_op(Names::new) },
                call_op::<_, _, _, Owned>(object, |list: &mut Vec<u32>| list.len()),
                call_op::<_, _, _, Waiting>(object, waits),
                Op { object, entry: 1, fingerprint: 1 },
            ]
        };
        // END names no object, and ends the manager: that is for who started it.
        let kinds = (0..=messages::EXPIRE).filter(|kind| *kind != messages::END);
        for (kind, which) in kinds.flat_map(|kind| (0..5).map(move |which| (kind, which))) {
            let client = beside.another();
            let own = proxy::create(&client, make, (1,)).await.unwrap();
            let number = [messages::MAKER, messages::NAMES, others.handle.object, own.handle.object, u64::MAX][which];
            for door in doors(number) {
                let mut request = client.request(kind);
                let has_answer = matches!(kind, messages::CALL | messages::WAIT | messages::COUNT | messages::WHERE);
                request.number(number);
                match kind {
                    messages::CALL => request.number(1).op(&door).append(&(5u32,)).unwrap(),
                    messages::WAIT => request.op(&door).append(&(5u32,)).unwrap(),
                    messages::LEASE => drop(request.number(number)),
                    messages::LEASE_OPEN => drop(request.attach(Attachment::owned(packet_pair().unwrap().0))),
                    _ => {}
                }
                match has_answer {
                    true => {
                        // Refused, or done; cut off, the next one is, too.
                        let asked = client.ask(request, 1, Brings::AnObject);
                        let _ = timeout(Duration::from_secs(20), asked).await.expect("an answer");
                    }
                    false => client.tell(request),
                }
            }
            drop((own, client));
            let case = format!("kind {kind}, object {number}");
            assert_eq!(names.get::<u32>("key").await.expect(&case), Some(7), "{case}");
            assert_eq!(others.call(|list: &mut Vec<u32>| list.clone(), ()).await.expect(&case), [1], "{case}");
            beside.until(|| beside.server.objects.len() == before).await;
        }
        names.remove("key").await.unwrap();
    }

    #[tokio::test]
    async fn who_cannot_even_be_told_that_there_is_no_memory_hears_that_the_manager_is_gone() {
        let beside = beside().await;
        refuse_made(&beside, [ErrorKind::Io, ErrorKind::Io]);
        let error = proxy::create(&beside.client, String::new, ()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
        let mut request = beside.client.request(messages::COUNT);
        request.number(0);
        let error = beside.client.ask(request, 1, Brings::Values).await.map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
    }
}
