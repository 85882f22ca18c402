//! One client of a server: its requests, and what it holds and waits for.

use super::objects::Holder;
use super::state::{Connection, Job, Next, Server};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::manager::wire::greeting::Id;
use crate::manager::wire::marshal::End;
use crate::manager::wire::messages::{self, CONNECTION, Reader, Writer};
use crate::manager::wire::method::Attempt;
use crate::manager::wire::waiting::ENDS;
use crate::os::fault;
use crate::os::reactor;
use crate::os::sync::lock;
use crate::wire::EncodedMessage;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use tokio::io::Interest;

impl End for Connection {
    fn carries_descriptors(&self) -> bool {
        self.transport.carries_descriptors()
    }

    fn give(&self, manager: Id, object: u64, _: *const ()) -> bool {
        manager == self.server.id && self.server.objects.hold(object, self.holder())
    }

    fn accept(&self, object: u64) -> bool {
        let objects = &self.server.objects;
        let is_known = self.transport.is_inside() || object == messages::NAMES;
        (is_known || objects.is_held_by(self.holder(), object)) && objects.hold(object, Holder::Message)
    }

    fn hold(&self, object: u64) {
        self.server.objects.hold(object, Holder::Message);
    }

    fn release(&self, object: u64) {
        self.server.objects.release(object, Holder::Message);
    }
}

impl Connection {
    /// Sends an answer, at once.
    pub(crate) fn reply(self: &Arc<Self>, answer: Writer) {
        let (id, given) = (answer.id(), answer.references());
        let Err(error) = self.send(answer.into_encoded()) else { return };
        if error.kind() == ErrorKind::Closed {
            return;
        }
        // Memory or descriptors run out: its caller gets an error in place of the result.
        let mut refusal = Writer::answer(id, self.clone());
        refusal.error(&error);
        if self.send(refusal.into_encoded()).is_err() {
            // It cannot get even that, but the end of the connection.
            self.transport.close();
        }
        given.into_iter().for_each(|object| self.server.objects.release(object, self.holder()));
    }

    fn send(&self, answer: EncodedMessage) -> Result<()> {
        self.server.faults.of_answer()?;
        if !self.transport.send(answer)? {
            // It may ask again at once.
            self.server.spin.encourage();
        }
        Ok(())
    }

    pub(crate) fn holder(&self) -> Holder {
        Holder::Connection(self.number)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.server.objects.close(self.holder());
    }
}

impl Server {
    /// Sees to it that a lease ends when the other end of `reader` is closed everywhere.
    fn watch_lease(self: &Arc<Self>, lease: Holder, reader: OwnedFd) {
        let server = self.clone();
        self.runtime.spawn(async move {
            match reactor::watch(Arc::new(reader), Interest::READABLE) {
                Ok(watch) => {
                    drop(watch.readable().await.map(|mut ready| ready.clear_ready()));
                    lock(&server.ended).push_back(lease);
                    server.poller.changed.notify_one();
                }
                // Without a way to notice its end it must not end.
                Err(error) => {
                    let error = Error::from(error);
                    let help = Topic::ManagerClient.name();
                    tracing::warn!(%error, help, "a handle on its way cannot be watched; its object stays")
                }
            }
        });
        // The task starts when a thread waits on the runtime.
        self.poller.changed.notify_one();
    }

    fn counts(&self) -> messages::Counts {
        // Without the namespace that is always there.
        let objects = self.objects.len().saturating_sub(1) as u64;
        [objects, self.begun(), self.failed.load(Relaxed)]
    }

    /// Does what a request asks for. A call is returned if it can go on, and waits in line at its object if not.
    pub(crate) fn take_request(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        request: EncodedMessage,
    ) -> Result<Option<Box<Job>>> {
        let mut reader = Reader::new(request, Some(connection.clone()))?;
        fault::point("manager.request");
        match reader.byte()? {
            messages::CALL => {
                let (id, left) = (reader.number()?, reader.number()?);
                let answer = Writer::answer(id, connection.clone());
                return Ok(self.prepare(Job::new(reader, left, answer, Some(connection.clone())), None));
            }
            messages::WAIT => {
                let id = reader.number()?;
                if lock(&connection.asked).contains_key(&id) {
                    return Err(messages::malformed());
                }
                let mut answer = Writer::answer(id, connection.clone());
                if connection.transport.is_inside() {
                    let error = Error::other("an object of a manager cannot wait in there for another one");
                    answer.error(&error.explained_by(Topic::WaitInManager));
                    connection.reply(answer);
                    return Ok(None);
                }
                let mut job = Job::new(reader, 1, answer, Some(connection.clone()));
                job.frame.wait = Some(Attempt::new((connection.number, id)));
                return Ok(self.prepare(job, None));
            }
            messages::SETTLE => {
                let (id, end) = (reader.number()?, reader.number()?);
                let end = *ENDS.get(end as usize).ok_or_else(messages::malformed)?;
                let object = lock(&connection.asked).remove(&id);
                object.into_iter().for_each(|object| self.enqueue(object, Next::Settle((connection.number, id), end)));
            }
            messages::EXPIRE => {
                let id = reader.number()?;
                let object = lock(&connection.asked).get(&id).cloned();
                object.into_iter().for_each(|object| self.enqueue(object, Next::Expire((connection.number, id))));
            }
            // Leases are for families, and only the process that started the manager may end it.
            messages::LEASE_OPEN | messages::LEASE | messages::CLAIMED | messages::END
                if !connection.carries_descriptors() =>
            {
                return Err(messages::malformed());
            }
            messages::LEASE_OPEN => {
                let (lease, end) = (Holder::Lease(connection.number, reader.number()?), reader.fd()?);
                if !self.objects.open(lease) {
                    return Err(messages::malformed());
                }
                self.watch_lease(lease, end);
            }
            messages::LEASE => {
                let lease = Holder::Lease(connection.number, reader.number()?);
                self.objects.hold(reader.number()?, lease);
            }
            kind @ (messages::CLAIM | messages::RELEASE) => {
                let (object, owner) = (reader.number()?, reader.number()?);
                // The object that the handle is part of counts it, or else the connection itself.
                let is_part = connection.transport.is_inside() && owner != CONNECTION;
                let holder = if is_part { Holder::Object(owner) } else { connection.holder() };
                match kind == messages::CLAIM {
                    true => _ = self.objects.hold(object, holder),
                    false => self.objects.release(object, holder),
                }
            }
            // The descriptor closes as the reader drops.
            messages::CLAIMED => {}
            kind @ (messages::COUNT | messages::WHERE | messages::END) => {
                let mut answer = Writer::answer(reader.number()?, connection.clone());
                match kind {
                    messages::COUNT => answer.append_part(&self.counts())?,
                    messages::WHERE => {
                        answer.append_part(&self.listener.as_ref().map(|listener| listener.local_addr()))?
                    }
                    _ => answer.append_part(&())?,
                }
                connection.reply(answer);
                if kind == messages::END {
                    self.finish();
                }
            }
            _ => return Err(messages::malformed()),
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::client::handle::Handle;
    use crate::manager::client::lock::{LockObject, LockProxy};
    use crate::manager::client::namespace::{Names, Namespace};
    use crate::manager::client::proxy::{self, Proxy};
    use crate::manager::client::queue::QueueObject;
    use crate::manager::mock::{in_time, test_manager, until};
    use crate::manager::wire::messages::Op;
    use crate::manager::wire::method::{Exposed, Owned, Waiting, call_op, make_op};
    use crate::manager::wire::waiting::Try;
    use crate::os::socket::packet_pair;
    use crate::wire::Attachment;
    use std::task::Poll;

    #[tokio::test]
    async fn object_of_answer_that_cannot_be_sent_is_released() {
        let test_manager = test_manager().await;
        let before = test_manager.server.objects.len();
        lock(&test_manager.server.faults.answers).push_back(ErrorKind::Io);
        let error = proxy::create(&test_manager.client, String::new, ()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        // It is released after the error is sent.
        until(|| test_manager.server.objects.len() == before).await;
        proxy::create(&test_manager.client, String::new, ()).await.unwrap();
    }

    fn waits(_: &mut QueueObject<u32>, _: &mut Option<(u32,)>, _: Try, _: &mut Writer) -> Poll<Result<()>> {
        Poll::Pending
    }

    /// A function that makes objects was called with the number of one.
    fn assert_is_refused(error: &Error) {
        let is_one = error.to_string().contains("a function that makes objects is called on one");
        assert!(is_one || error.kind() == ErrorKind::Closed, "{error}");
    }

    /// Every kind of request, with every kind of number for an object.
    #[tokio::test]
    async fn any_request_on_any_object_leaves_objects_of_others_intact() {
        let test_manager = test_manager().await;
        let names = Namespace(Proxy::new(Handle::claimed(&test_manager.client, messages::NAMES)));
        names.set("key", 7u32).await.unwrap();
        let others = proxy::create(&test_manager.here(), || vec![1u32], ()).await.unwrap();
        let before = test_manager.server.objects.len();
        let make = |n: u32| vec![n];
        let ops = |object| {
            [
                Op { object, ..make_op(make) },
                Op { object, ..make_op(Names::new) },
                call_op::<_, _, _, Owned>(object, |list: &mut Vec<u32>| list.len()),
                call_op::<_, _, _, Waiting>(object, waits),
                Op { object, entry: 1, fingerprint: 1 },
            ]
        };
        // END names no object, and ends the manager.
        let kinds = (0..=messages::EXPIRE).filter(|kind| *kind != messages::END);
        for (kind, which) in kinds.flat_map(|kind| (0..6).map(move |which| (kind, which))) {
            let client = test_manager.another();
            let own = proxy::create(&client, make, (1,)).await.unwrap();
            let lock = LockProxy(proxy::create(&test_manager.client, LockObject::default, ()).await.unwrap());
            let [list, locked] = [others.handle.object, lock.0.handle.object];
            let number = [messages::MAKER, messages::NAMES, list, locked, own.handle.object, u64::MAX][which];
            for op in ops(number) {
                let mut request = Writer::request(kind, client.clone());
                let has_answer = matches!(kind, messages::CALL | messages::WAIT | messages::COUNT | messages::WHERE);
                request.amend(messages::ID_AT, number);
                match kind {
                    messages::CALL => request.number(1).op(&op).append(&(5u32,)).unwrap(),
                    messages::WAIT => request.op(&op).append(&(5u32,)).unwrap(),
                    messages::LEASE | messages::CLAIM | messages::RELEASE | messages::SETTLE => {
                        request.number(number);
                    }
                    messages::LEASE_OPEN => drop(request.attach(Attachment::owned(packet_pair().unwrap().0))),
                    _ => {}
                }
                match has_answer {
                    true => {
                        // Refused, or done; cut off, the next one is, too.
                        let answer = in_time(client.ask(request)).await.and_then(|mut answer| answer.part::<()>());
                        let makes = [make_op(make).entry, make_op(Names::new).entry].contains(&op.entry);
                        if kind == messages::CALL && makes && number != messages::MAKER {
                            assert_is_refused(&answer.unwrap_err());
                        }
                    }
                    false => client.post(request),
                }
            }
            drop((own, client));
            let case = format!("kind {kind}, object {number}");
            // One holder after the other: what holders leave is settled.
            for _ in 0..2 {
                drop(in_time(lock.acquire()).await.expect(&case));
            }
            drop(lock);
            assert_eq!(names.get::<u32>("key").await.expect(&case), Some(7), "{case}");
            assert_eq!(others.call(|list: &mut Vec<u32>| list.clone(), ()).await.expect(&case), [1], "{case}");
            until(|| test_manager.server.objects.len() == before).await;
        }
        names.remove("key").await.unwrap();
    }

    /// If its new object took the place of that one, everybody would have it, in place of the table of names, too.
    #[tokio::test]
    async fn exposed_maker_that_is_called_on_an_object_is_refused_and_the_object_stays() {
        let test_manager = test_manager().await;
        let make = |n: u32| vec![n];
        let len = |list: &mut Vec<u32>| list.len();
        let exposed = [Exposed::maker(make), Exposed::method(len), Exposed::namespace::<u32>()];
        let [one, other] = test_manager.narrow(exposed).await;
        let names_of = |link| Namespace(Proxy::new(Handle::claimed(link, messages::NAMES)));
        names_of(&one).set("key", 7u32).await.unwrap();
        let list = proxy::create(&one, make, (1,)).await.unwrap();
        for object in [messages::NAMES, list.handle.object] {
            for op in [make_op(make), make_op(Names::new)] {
                let mut request = other.request(messages::CALL);
                request.number(1).op(&Op { object, ..op }).append(&(5u32,)).unwrap();
                let answer = in_time(other.ask(request)).await.and_then(|mut answer| answer.part::<()>());
                assert_is_refused(&answer.unwrap_err());
            }
        }
        assert_eq!(names_of(&other).get::<u32>("key").await.unwrap(), Some(7));
        assert_eq!(list.call(len, ()).await.unwrap(), 1);
        for link in [&one, &other] {
            let error = proxy::create(link, String::new, ()).await.map(drop).unwrap_err();
            assert!(error.to_string().contains("not exposed"), "{error}");
        }
    }

    #[tokio::test]
    async fn client_that_cannot_even_get_the_error_is_disconnected() {
        let test_manager = test_manager().await;
        lock(&test_manager.server.faults.answers).extend([ErrorKind::Io, ErrorKind::Io]);
        let error = proxy::create(&test_manager.client, String::new, ()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
        let error = test_manager.client.ask(test_manager.client.request(messages::COUNT)).await.map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
    }
}
