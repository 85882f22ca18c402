//! A manager that a test plays, at the other end of a link.

use super::link::{Handle, Link};
use super::protocol::Writer;
use super::proxy::Proxy;
use crate::channel::{Receiver, Sender};
use crate::os::socket::{Wait, packet_pair};
use crate::wire::{self, Sealed, frame};
use futures::FutureExt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Of what fills a pipe.
const LONG: usize = 1 << 18;

/// The manager's ends of a link.
pub(super) struct Played {
    requests: Receiver<Sealed>,
    answers: Sender<Sealed>,
}

pub(super) fn linked() -> (Arc<Link>, Played) {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let (door, intake) = packet_pair().unwrap();
    let link = Link::new((77, LAST.fetch_add(1, Relaxed)), 1, door).unwrap();
    link.wire().unwrap();
    let hello = frame::recv(intake.as_fd(), Wait::No).unwrap().unwrap();
    let (requests, answers) = wire::decode(hello).unwrap();
    (link, Played { requests, answers })
}

/// Puts into the pipe until something has to wait for room.
pub(super) fn fill(link: &Link) {
    let wire = link.wire().unwrap();
    while !wire.has_what_waits() {
        wire.tell(Sealed::new(vec![u8::MAX; LONG], Vec::new()));
    }
}

pub(super) fn proxy<T>(link: &Arc<Link>) -> Proxy<T> {
    Proxy::new(Handle::held(link, 7))
}

impl Played {
    /// The kind of the next request that is not there to fill the pipe, and its number.
    pub(super) async fn next(&mut self) -> (u8, u64) {
        loop {
            let request = self.requests.recv_timeout(Duration::from_secs(20)).await.unwrap();
            if request.bytes().len() != LONG {
                return (request.bytes()[0], u64::from_le_bytes(*request.bytes()[1..].first_chunk().unwrap()));
            }
        }
    }

    pub(super) async fn answer(&mut self, id: u64, part: impl FnOnce(&mut Writer)) {
        let mut answer = Writer::answer(id);
        part(&mut answer);
        self.answers.send(answer.seal()).await.unwrap();
    }

    /// Has `asking` wait for room, reads until it is sent, which is the runtime's doing, and drops it without another poll.
    pub(super) async fn drop_once_sent(&mut self, asking: impl Future) -> (u8, u64) {
        let mut asking = Box::pin(asking);
        assert!((&mut asking).now_or_never().is_none());
        let sent = self.next().await;
        drop(asking);
        sent
    }
}
