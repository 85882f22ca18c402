//! The process that owns the objects, and how it runs calls.
//!
//! One thread leads: it waits for requests on the runtime and runs them in place, so that a quick call meets no other
//! thread. The main thread watches it: a leader that is still in the same call after a while is left behind with it,
//! and another thread leads on. So a slow object delays only its own callers, which wait in its queue.
//!
//! # State
//! `pulse`, of the present leader: how much it has begun, `RUNNING` while it is outside of the runtime, and
//! `LEFT_BEHIND`. `is_watcher_asleep`: the watcher sleeps until it is called.
//!
//! # Moves
//! | move | by | then |
//! |---|---|---|
//! | idle -> RUNNING | the leader, with a request | it calls a sleeping watcher |
//! | RUNNING -> idle | the leader, done | it waits for the next request |
//! | RUNNING -> RUNNING, LEFT_BEHIND | the watcher, after two checks within the same call | another thread leads |
//! | the leader finds LEFT_BEHIND when it is done | itself | it becomes an overflow thread; a leader that has no thread yet is its next task |
//! | no thread for another leader | the watcher, at each check | it tries again to start one |
//!
//! # Invariants
//! 1. At most one thread waits on the runtime, and it is the leader.
//! 2. A call that holds an object's turn is in one thread's hand; others for that object wait in its queue.
//! 3. What a client sent is taken in order; what it releases is released after everything it sent before.
//!
//! # Death
//! | killed | what happens |
//! |---|---|
//! | a client | its pipes or its socket hang up; what it had sent is done, then what it held is released |
//! | a client that waits, or has got something and not acknowledged it | its place in the queue is free, the item goes back |
//! | a client that holds a lock or a permit | it is free for the next; of a lock, the next learns that the holder died |
//! | a process that carried a handle | the kernel closes the other end of its lease |
//! | the server | every client's pipe hangs up: all its calls fail |
//!
//! # Cancel
//! A call whose future is dropped is done if it was sent; its answer is thrown away by the client. Of one that waits
//! see `waits.rs`.

use super::executor::LAST_ENTRY;
use super::faults::Faults;
use super::objects::{Holder, Objects};
use super::poller::Poller;
use super::state::{CHECK_EVERY, Connection, Event, Next, Overflow, Server, Task};
use crate::connection::{ByteConnection, Listener};
use crate::error::{Error, Result, Topic};
use crate::manager::wire::greeting::{self, Setup};
use crate::manager::wire::local::{HOST, Host, ServerEnd};
use crate::manager::wire::messages;
use crate::manager::wire::pipe::Pipe;
use crate::manager::wire::stream::Stream;
use crate::manager::wire::transport::{Changed, Transport};
use crate::manager::wire::waiting::End;
use crate::os::reactor;
use crate::os::socket::Wait;
use crate::os::sync::lock;
use crate::process::entry::survive;
use crate::wait::{Spin, Spinner, Spun};
use crate::wire::frame;
use std::any::Any;
use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Instant;
use tokio::io::Interest;
use tokio::runtime::Builder;

/// So many checks without a call, and the watcher sleeps.
const SLEEP_AFTER: u32 = 50;
/// Requests taken in place before the runtime polls its tasks.
const TURN: u32 = 32;

const RUNNING: u64 = 1;
const LEFT_BEHIND: u64 = 2;
const ONE_CALL: u64 = 4;

/// Of warnings about clients.
const HELP: &str = Topic::ManagerClient.name();

/// So often in a row the manager may fail to receive the ends of a new client.
const INTAKE_FAILURES: u32 = 64;

/// Runs the server until it is asked to end or nothing of it is held any more. `names` is the namespace that is always there.
pub(crate) fn serve(setup: Setup, names: Box<dyn Any + Send>) -> Result<()> {
    let server = start(setup, names)?;
    server.watch();
    // Its socket file goes.
    server.listener.iter().for_each(|listener| listener.close());
    Ok(())
}

/// Starts a server that this thread watches.
pub(crate) fn start(setup: Setup, names: Box<dyn Any + Send>) -> Result<Arc<Server>> {
    let built = Builder::new_current_thread().enable_all().build();
    let runtime = built.map_err(|error| Error::io("cannot build a tokio runtime in the manager", error))?;
    let listener = setup.bind.map(|bind| runtime.block_on(bind.listen())).transpose()?.map(Arc::new);
    let intake = Arc::new(setup.intake.into_inner());
    let (poller, watch) = {
        let _inside = runtime.enter();
        (Poller::new()?, reactor::watch(intake.clone(), Interest::READABLE)?)
    };
    let server = Arc::new(Server {
        id: setup.id,
        intake,
        exposed: setup.exposed,
        listener,
        objects: Objects::new(),
        runtime,
        poller,
        spin: Spin::default(),
        ended: Mutex::default(),
        pulse: Mutex::default(),
        begun_before: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        is_watcher_asleep: AtomicBool::new(false),
        watcher: std::thread::current(),
        overflow: Overflow::default(),
        slow: Mutex::default(),
        has_slow: AtomicBool::new(false),
        connections: AtomicUsize::new(0),
        faults: Faults::default(),
        last_connection: AtomicU64::new(0),
        has_ended: AtomicBool::new(false),
    });
    let inside = server.connection(0, Arc::new(ServerEnd));
    let take = move |request| {
        let job = inside.server.take_request(&inside, request)?;
        job.into_iter().for_each(|job| inside.server.delegate(job));
        Ok(())
    };
    let _ = HOST.set(Host { id: server.id, connector: Arc::new(setup.connector.into_inner()), take: Box::new(take) });
    // It has the number that clients know, and is held for ever.
    let names = server.objects.add(names);
    debug_assert_eq!(names, messages::NAMES);
    if let Some(listener) = &server.listener {
        server.runtime.spawn(server.clone().take_peers(listener.clone()));
    }
    let takes = server.clone();
    server.runtime.spawn(async move {
        loop {
            drop(watch.readable().await.map(|mut ready| ready.clear_ready()));
            takes.take_clients();
        }
    });
    let pulse = lock(&server.pulse).clone();
    let leads = server.overflow.run(&server, Task::Lead(pulse));
    leads.map_err(|(_, error)| Error::io("the manager cannot start a thread", error))?;
    Ok(server)
}

/// The watcher's part: the main thread.
impl Server {
    pub(crate) fn watch(self: &Arc<Self>) {
        let (mut last, mut calm, mut next_collection) = (0, 0, Instant::now());
        while !self.has_ended.load(SeqCst) {
            std::thread::park_timeout(CHECK_EVERY);
            let pulse = lock(&self.pulse).clone();
            let seen = pulse.load(SeqCst);
            if seen & RUNNING != 0 && seen == last {
                self.leave_behind(&pulse, seen);
            }
            if self.overflow.is_short() {
                self.overflow.try_again(self);
            }
            let is_calm = seen & RUNNING == 0 && seen == last && !self.overflow.is_short();
            calm = if is_calm { calm + 1 } else { 0 };
            last = seen;
            if self.objects.may_have_circles() && Instant::now() >= next_collection {
                let start = Instant::now();
                self.objects.collect();
                // A twentieth of the time at most.
                next_collection = Instant::now() + 20 * start.elapsed() + CHECK_EVERY;
            } else if calm >= SLEEP_AFTER && !self.objects.has_lost_holders() {
                self.sleep_until_called(&pulse, seen);
                calm = 0;
            }
        }
    }

    fn leave_behind(self: &Arc<Self>, pulse: &AtomicU64, seen: u64) {
        if pulse.compare_exchange(seen, seen | LEFT_BEHIND, SeqCst, SeqCst).is_ok() {
            let new = Arc::<AtomicU64>::default();
            let mut present = lock(&self.pulse);
            *present = new.clone();
            self.begun_before.fetch_add(seen / ONE_CALL, Relaxed);
            drop(present);
            // At least one can, once it is done: that which is left behind.
            let _ = self.overflow.run(self, Task::Lead(new));
        }
    }

    /// Returns how much all leaders have begun: requests, and handles in messages that have ended.
    pub(crate) fn begun(&self) -> u64 {
        let present = lock(&self.pulse);
        self.begun_before.load(Relaxed) + present.load(Relaxed) / ONE_CALL
    }

    fn sleep_until_called(&self, pulse: &AtomicU64, seen: u64) {
        self.is_watcher_asleep.store(true, SeqCst);
        // A leader that began just before has not seen it.
        let is_calm = || pulse.load(SeqCst) == seen && !self.objects.has_lost_holders();
        while self.is_watcher_asleep.load(SeqCst) && is_calm() && !self.has_ended.load(SeqCst) {
            std::thread::park();
        }
        self.is_watcher_asleep.store(false, SeqCst);
    }

    /// A thread that does not lead has done what may have kept objects in its hand.
    pub(crate) fn let_go(&self) {
        if self.objects.may_hold_a_circle() {
            self.wake_watcher();
        }
    }

    fn wake_watcher(&self) {
        if self.is_watcher_asleep.load(SeqCst) {
            self.is_watcher_asleep.store(false, SeqCst);
            self.watcher.unpark();
        }
    }

    fn begin(&self, pulse: &AtomicU64) {
        pulse.fetch_add(ONE_CALL | RUNNING, SeqCst);
        self.wake_watcher();
    }

    /// False if this thread leads no more.
    fn end(&self, pulse: &AtomicU64) -> bool {
        pulse.fetch_and(!RUNNING, SeqCst) & LEFT_BEHIND == 0
    }
}

/// The leader's part.
impl Server {
    /// Finds work.
    fn ready_event(&self) -> Option<Event> {
        let ended = lock(&self.ended).pop_front().map(Event::LeaseEnded);
        ended.or_else(|| self.poller.next(false).map(Event::Request))
    }

    /// Waits for work: it spins for a while before it sleeps.
    fn next_event(&self, taken: u32) -> Event {
        let is_turn = taken.is_multiple_of(TURN);
        if !is_turn && let Some(event) = self.ready_event() {
            return event;
        }
        let mut spinner = Spinner::default();
        if !is_turn && let Spun::Found(event) = spinner.spin_with(&self.spin, &mut || self.ready_event()) {
            return event;
        }
        self.runtime.block_on(async {
            if is_turn {
                // A request that is always there already would keep the runtime from its other tasks.
                tokio::task::yield_now().await;
            }
            let mut changed = pin!(self.poller.changed.notified());
            poll_fn(|cx| {
                while changed.as_mut().poll(cx).is_ready() {
                    changed.set(self.poller.changed.notified());
                }
                let found = match spinner.spin_with(&self.spin, &mut || self.ready_event()) {
                    Spun::Found(event) => Some(event),
                    Spun::Over => self.poller.next(true).map(Event::Request),
                    Spun::Again => {
                        cx.waker().wake_by_ref();
                        None
                    }
                };
                found.map_or(Poll::Pending, Poll::Ready)
            })
            .await
        })
    }

    pub(crate) fn lead(self: &Arc<Self>, pulse: &AtomicU64) {
        let mut taken = 0u32;
        loop {
            taken = taken.wrapping_add(1);
            let event = self.next_event(taken);
            self.begin(pulse);
            LAST_ENTRY.set(None);
            survive(|| self.react(event));
            if !self.end(pulse) {
                if let Some(entry) = LAST_ENTRY.get() {
                    lock(&self.slow).insert(entry);
                    self.has_slow.store(true, Relaxed);
                }
                self.let_go();
                return;
            }
            if self.has_ended.load(SeqCst) {
                return;
            }
        }
    }

    fn react(self: &Arc<Self>, event: Event) {
        match event {
            Event::LeaseEnded(lease) => {
                self.objects.close(lease);
                self.end_if_forgotten();
            }
            Event::Request((open, request)) => {
                let connection = open.client.clone();
                // The next request is taken only when this one has its place, for another thread may take it.
                let cut_off = |error: &Error| tracing::warn!(%error, help = HELP, "a client of the manager is cut off");
                match request.and_then(|request| self.take_request(&connection, request).inspect_err(cut_off)) {
                    Ok(job) => {
                        self.poller.put_back(open);
                        job.into_iter().for_each(|job| self.work(job));
                    }
                    // Closed; or a request was lost, and with it the answer: the connection ends, so that its caller gets an error.
                    Err(_) => self.lose(&connection),
                }
            }
        }
    }

    fn lose(self: &Arc<Self>, connection: &Arc<Connection>) {
        connection.transport.close();
        let asked = std::mem::take(&mut *lock(&connection.asked));
        for (id, object) in asked {
            self.enqueue(object, Next::Settle((connection.number, id), End::Lost));
        }
        self.connections.fetch_sub(1, SeqCst);
        self.end_if_forgotten();
    }

    fn connection(self: &Arc<Self>, number: u64, transport: Arc<dyn Transport>) -> Arc<Connection> {
        self.objects.open(Holder::Connection(number));
        Arc::new(Connection { number, server: self.clone(), transport, asked: Mutex::default() })
    }

    /// Takes a client in that has this transport, inside the runtime.
    fn admit(self: &Arc<Self>, open: impl FnOnce(Changed) -> Result<Arc<dyn Transport>>) {
        let added = self.poller.add(open, |transport| {
            self.connections.fetch_add(1, SeqCst);
            self.connection(self.last_connection.fetch_add(1, Relaxed) + 1, transport)
        });
        if let Err(error) = added {
            tracing::warn!(%error, help = HELP, "a client of the manager could not be taken in");
        }
    }

    /// Takes in clients from elsewhere.
    async fn take_peers(self: Arc<Self>, listener: Arc<Listener>) {
        loop {
            match listener.accept().await {
                Ok(peer) => drop(tokio::spawn(self.clone().take_peer(peer))),
                Err(error) => tracing::debug!(%error, "a stranger was not let in to the manager"),
            }
        }
    }

    async fn take_peer(self: Arc<Self>, peer: ByteConnection) {
        match greeting::admit(self.id, &peer).await {
            Ok(()) => self.admit(|changed| Ok(Stream::open(peer, changed))),
            Err(error) => tracing::warn!(%error, help = HELP, "a client from elsewhere was not let in"),
        }
    }

    /// Takes in the clients of this machine that have come.
    fn take_clients(self: &Arc<Self>) {
        let mut failures = 0;
        loop {
            match frame::recv(self.intake.as_fd(), Wait::No) {
                Ok(Some(ends)) => {
                    let _inside = self.runtime.enter();
                    // After an error its pipes are closed by now, which its client notices.
                    self.admit(|changed| Ok(Pipe::accept(ends, changed)?));
                }
                // Messages that are there are not announced again, so they are tried again; ends that were lost are closed.
                Err(error) if error.kind() != io::ErrorKind::WouldBlock && failures < INTAKE_FAILURES => {
                    tracing::warn!(%error, help = HELP, "a client of the manager could not be taken in");
                    failures += 1;
                }
                _ => return,
            }
        }
    }

    /// Nobody is connected and no handle is on its way: nobody will ever ask again.
    fn end_if_forgotten(self: &Arc<Self>) {
        self.take_clients();
        if self.connections.load(SeqCst) == 0 && !self.objects.has_leases() {
            self.finish();
        }
    }

    pub(crate) fn finish(&self) {
        self.has_ended.store(true, SeqCst);
        self.watcher.unpark();
    }
}
