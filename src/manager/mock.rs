//! A manager that runs in the process of the tests, beside them.

use crate::manager::client::link::Link;
use crate::manager::client::namespace::Names;
use crate::manager::server::leader::start;
use crate::manager::server::state::Server;
use crate::manager::wire::greeting::{Id, Setup};
use crate::manager::wire::messages::{COUNT, Counts};
use crate::manager::wire::method::Exposed;
use crate::os::socket::packet_pair;
use crate::os::sync::lock;
use crate::wire::Fd;
use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::{Mutex, MutexGuard, OnceCell};

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
        let (connector, server) = started((99, 0), None);
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

/// A manager on a thread of its own.
fn started(id: Id, exposed: Option<HashSet<u64>>) -> (OwnedFd, Arc<Server>) {
    let (intake, connector) = packet_pair().unwrap();
    let theirs = Fd::new(connector.try_clone().unwrap());
    let setup = Setup { id, intake: Fd::new(intake), connector: theirs, exposed, bind: None };
    let (has_started, server) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let server = start(setup, Box::new(Names::new())).unwrap();
        has_started.send(server.clone()).unwrap();
        server.watch();
    });
    (connector, server.recv().unwrap())
}

fn link(connector: &OwnedFd) -> Arc<Link> {
    static LAST: AtomicU64 = AtomicU64::new(0);
    Link::to((88, LAST.fetch_add(1, Relaxed)), 1, connector.try_clone().unwrap()).unwrap()
}

async fn count(link: &Arc<Link>) -> u64 {
    let [objects, ..]: Counts = link.ask(link.request(COUNT)).await.unwrap().part().unwrap();
    objects
}

impl TestManager {
    /// The link of a handle in the manager.
    pub(crate) fn here(&self) -> Arc<Link> {
        Link::here().unwrap()
    }

    /// The links of so many processes to another manager, of which only these functions can be called. It ends with the last of them.
    pub(crate) async fn narrow<const N: usize>(&self, exposed: impl IntoIterator<Item = Exposed>) -> [Arc<Link>; N] {
        let (connector, _) = started((98, 0), Some(exposed.into_iter().flat_map(|Exposed(entries)| entries).collect()));
        let links = [(); N].map(|()| link(&connector));
        for link in &links {
            count(link).await;
        }
        links
    }

    /// The link of one more process to it.
    pub(crate) fn another(&self) -> Arc<Link> {
        link(self.connector)
    }
}

/// What a test waits for, which must not take long.
pub(crate) async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it ends")
}

pub(crate) async fn until(mut is_so: impl FnMut() -> bool) {
    in_time(async {
        while !is_so() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

impl Drop for TestManager {
    fn drop(&mut self) {
        lock(&self.server.faults.answers).clear();
        self.server.faults.has_no_threads.store(false, Relaxed);
    }
}
