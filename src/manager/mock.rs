//! A manager that a test plays, at the other end of a link, and one that runs in the process of the tests, beside them.

use crate::channel::{Receiver, Sender};
use crate::manager::client::handle::Handle;
use crate::manager::client::link::Link;
use crate::manager::client::namespace::Names;
use crate::manager::client::proxy::Proxy;
use crate::manager::server::leader::start;
use crate::manager::server::state::Server;
use crate::manager::wire::greeting::Setup;
use crate::manager::wire::messages::{COUNT, Writer};
use crate::manager::wire::ready::ReadyMap;
use crate::os::socket::{Wait, packet_pair};
use crate::os::sync::lock;
use crate::wire::{self, EncodedMessage, Fd, frame};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, MutexGuard, OnceCell};

/// Of what fills a pipe.
const LONG: usize = 1 << 18;

/// The manager's ends of a link.
pub(crate) struct MockServer {
    requests: Receiver<EncodedMessage>,
    answers: Sender<EncodedMessage>,
}

pub(crate) fn linked() -> (Arc<Link>, MockServer) {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let (connector, intake) = packet_pair().unwrap();
    let link = Link::to((77, LAST.fetch_add(1, Relaxed)), 1, connector).unwrap();
    link.transport().unwrap();
    let ends = frame::recv(intake.as_fd(), Wait::No).unwrap().unwrap();
    let (requests, answers, doorbell): (_, Sender<EncodedMessage>, Fd<OwnedFd>) = wire::decode(ends).unwrap();
    answers.items().set_own_doorbell(Arc::new(doorbell.into_inner()));
    (link, MockServer { requests, answers })
}

/// Puts into the pipe until something has to wait for room.
pub(crate) fn fill(link: &Arc<Link>) {
    let transport = link.transport().unwrap();
    while transport.has_room() {
        transport.post(EncodedMessage::new(vec![u8::MAX; LONG], Vec::new()));
    }
}

pub(crate) fn proxy<T>(link: &Arc<Link>) -> Proxy<T> {
    Proxy::new(Handle::counted(link, 7))
}

impl MockServer {
    /// The kind of the next request that is not there to fill the pipe, and its number.
    pub(crate) async fn next(&mut self) -> (u8, u64) {
        loop {
            let request = self.requests.recv_timeout(Duration::from_secs(20)).await.unwrap();
            if request.bytes().len() != LONG {
                return (request.bytes()[0], u64::from_le_bytes(*request.bytes()[1..].first_chunk().unwrap()));
            }
        }
    }

    pub(crate) async fn answer(&mut self, id: u64, part: impl FnOnce(&mut Writer)) {
        let mut answer = Writer::default();
        answer.number(id);
        part(&mut answer);
        self.answers.send(answer.into_encoded()).await.unwrap();
    }

    /// Sends the first message, which gives the client this bit of the map.
    pub(crate) async fn greet(&mut self, bit: u32) -> ReadyMap {
        let map = ReadyMap::create().unwrap();
        self.answers.send(map.greeting(bit)).await.unwrap();
        map
    }

    /// How many answers the client has not read.
    pub(crate) fn unread_answers(&self) -> usize {
        self.answers.under_way()
    }

    /// The kind and number of the next request, while `asking` is polled, which is not answered yet.
    pub(crate) async fn next_while(&mut self, asking: &mut (impl Future + Unpin)) -> (u8, u64) {
        tokio::select! {
            next = self.next() => next,
            _ = asking => panic!("nobody has answered"),
        }
    }
}

/// A manager in this process.
pub(crate) struct TestManager {
    connector: &'static OwnedFd,
    pub(crate) server: &'static Arc<Server>,
    /// The link of another process to it.
    pub(crate) client: Arc<Link>,
    _alone: MutexGuard<'static, ()>,
}

/// One test has it at a time.
pub(crate) async fn test_manager() -> TestManager {
    static ALONE: Mutex<()> = Mutex::const_new(());
    static FIRST: OnceCell<(OwnedFd, Arc<Server>, Arc<Link>)> = OnceCell::const_new();
    let first = || async {
        let (intake, connector) = packet_pair().unwrap();
        let theirs = Fd::new(connector.try_clone().unwrap());
        let setup = Setup { id: (99, 0), intake: Fd::new(intake), connector: theirs, exposed: None, bind: None };
        let (started, server) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let (server, _) = start(setup, Box::new(Names::new())).unwrap();
            started.send(server.clone()).unwrap();
            server.watch();
        });
        let server = server.recv().unwrap();
        // It ends with its last client.
        let first = link(&connector);
        count(&first).await;
        (connector, server, first)
    };
    let alone = ALONE.lock().await;
    let (connector, server, _) = FIRST.get_or_init(first).await;
    let client = link(connector);
    count(&client).await;
    TestManager { connector, server, client, _alone: alone }
}

fn link(connector: &OwnedFd) -> Arc<Link> {
    static LAST: AtomicU64 = AtomicU64::new(0);
    Link::to((88, LAST.fetch_add(1, Relaxed)), 1, connector.try_clone().unwrap()).unwrap()
}

async fn count(link: &Arc<Link>) -> u64 {
    link.ask(link.request(COUNT)).await.unwrap().part().unwrap()
}

impl TestManager {
    /// The link of a handle in the manager.
    pub(crate) fn here(&self) -> Arc<Link> {
        Link::here().unwrap()
    }

    /// The link of one more process to it.
    pub(crate) fn another(&self) -> Arc<Link> {
        link(self.connector)
    }

    pub(crate) async fn until(&self, is_so: impl Fn() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < Duration::from_secs(20), "it does not happen");
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for TestManager {
    fn drop(&mut self) {
        *lock(&self.server.faults.injector) = None;
        self.server.faults.has_no_threads.store(false, Relaxed);
    }
}
