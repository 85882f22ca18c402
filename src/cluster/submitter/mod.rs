//! The submitter: takes the orders of a pool, has hosts execute them, and holds each until it is answered.
//!
//! # Where an order is
//! An order is here from when it was taken until its last result has come, it was cancelled, or it failed. Its message is in
//! the stream, or at a host, or both. Nothing that the stream or a host does is believed: a message that has been out for
//! two leases without a word from a host is looked for in the stream, and published again under a new number if it is not there. The
//! first answer to an item counts, by the pool's table.
//!
//! # Death
//! | killed | what follows |
//! |---|---|
//! | the submitter | hosts find nobody at its subjects, stop its items and remove its messages |
//! | a host | its messages are handed out again one lease later; the next host asks, and the answer has how often that was; if none asks, it is counted two leases later |
//! | a host that leaves, while a server still sends to it | nobody gets that message: it is handed out again one lease later, and no host counts as lost with it |
//! | the server | all of it waits; after a reconnect each message without an acknowledgement is published again, under the same id; a copy that the stream does not know as one is not wanted while another host has the first, and if that host gives it back, it is published again two leases later |
//! | the server, as the pool ends | messages of the pool are deleted from the stream if the server is back within 20 s and the runtime goes on; one that was not acknowledged stays there until a host takes it |
//! | the server, stopped and still connected | calls fail once it has answered nothing for the address's `offline_timeout` |

mod answers;
mod connection;
mod hosts;
mod outage;
mod publishing;
mod removal;
mod seeking;
mod sent;

use super::address::{Address, Target, unsupported};
use super::link::{self, Failure, InUse, Notice};
use super::messages::{Answer, Body, Message};
use super::pieces::Missing;
use super::roster::{HostInfo, Roster};
use super::stream::Names;
use super::waiting::{at, finished};
use crate::error::{Error, ErrorKind};
use crate::os::sync::lock;
use crate::pool::{Histogram, Order, Orders, PoolStats, Taker};
use answers::confirmed;
use async_nats::{Client, Message as Arrived, Subscriber};
use bytes::Bytes;
use connection::was_stopped;
use futures_util::{FutureExt, StreamExt};
use outage::Outage;
use removal::Unwanted;
use sent::Sent;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// A publish that was not acknowledged is repeated after this.
const UNACKNOWLEDGED: Duration = Duration::from_secs(2);
/// While something is out it is looked after this often.
const TICK: Duration = Duration::from_millis(100);
/// Quick calls wait for each other no longer than this, however many longer ones are out.
const TOGETHER_FOR: Duration = Duration::from_millis(5);

/// The pool's side of its submitter.
pub(super) struct Submitter {
    changed: Notify,
    view: Mutex<View>,
}

/// The state that can be asked for.
struct View {
    roster: Roster,
    redelivered: u64,
    duplicates: u64,
    round_trip: Histogram,
}

impl Taker for Submitter {
    fn notify(&self) {
        self.changed.notify_one();
    }

    fn refuse(&self, what: &str) -> Error {
        unsupported(&format!("cannot be {what}"))
    }

    fn is_here(&self) -> bool {
        false
    }

    fn add_stats(&self, stats: &mut PoolStats) {
        let view = lock(&self.view);
        (stats.redelivered, stats.duplicates) = (view.redelivered, view.duplicates);
        stats.round_trip = view.round_trip.clone();
    }
}

impl Submitter {
    /// Starts the submitter of a pool that is being built.
    pub(super) fn start(address: Address, target: Target, build: u64, orders: Orders) -> Arc<Self> {
        let view = View { roster: Roster::new(build), redelivered: 0, duplicates: 0, round_trip: Histogram::default() };
        let submitter = Arc::new(Self { changed: Notify::new(), view: Mutex::new(view) });
        let names = Names::new(&target.pool, build);
        let outage = Outage { since: Some(Instant::now()), why: None, lasting: None, is_silence: false };
        let pool = target.pool.clone();
        let task = Work { orders: orders.clone(), submitter: submitter.clone(), address, target, names, outage };
        let view = submitter.clone();
        tokio::spawn(async move {
            // It ends with the pool; before that by a panic, such as one of the user's `tracing` subscriber.
            let how = match AssertUnwindSafe(task.run()).catch_unwind().await {
                Ok(()) => "has ended",
                Err(_) => "has panicked",
            };
            let text = format!("the task of the cluster pool {pool} {how}; make the pool anew");
            refuse_all(&orders, &view.changed, &Error::new(ErrorKind::Closed, text)).await;
        });
        submitter
    }

    pub(super) fn hosts(&self) -> Vec<HostInfo> {
        lock(&self.view).roster.list()
    }
}

/// Fails new calls until the pool ends.
async fn refuse_all(orders: &Orders, changed: &Notify, error: &Error) {
    while !orders.is_over() {
        while let Some(order) = orders.take() {
            order.fail_rest(error);
        }
        changed.notified().await;
    }
}

/// The task of a submitter, while it has no connection.
struct Work {
    orders: Orders,
    submitter: Arc<Submitter>,
    address: Address,
    target: Target,
    names: Names,
    outage: Outage,
}

impl Work {
    async fn run(mut self) {
        let (notices, noticed) = mpsc::unbounded_channel();
        let Some((client, in_use)) = self.connected(notices).await else { return };
        let id = link::new_id();
        let inbox = client.subscribe(self.names.of('s', id, ">")).await;
        let beats = client.subscribe(self.names.all("beat")).await;
        let (Ok(inbox), Ok(beats)) = (inbox, beats) else { return };
        Session::new(self, (client, in_use), id).run(inbox, beats, noticed).await;
    }

    /// Connects, however long that takes; `None` if the pool has ended before.
    async fn connected(&mut self, notices: UnboundedSender<Notice>) -> Option<(Client, Arc<InUse>)> {
        for attempt in 1.. {
            let (address, target) = (self.address.clone(), self.target.clone());
            let notices = notices.clone();
            let mut connecting = Box::pin(async move {
                let connected = link::connect(&address, &target, "submitter", notices).await;
                if let Err(failure) = &connected {
                    sleep(if failure.is_final { link::pause(usize::MAX) } else { Duration::ZERO }).await;
                }
                connected
            });
            let outcome = loop {
                if self.is_over_without_connection() {
                    return None;
                }
                let limit = self.outage.until(self.address.offline_timeout);
                tokio::select! {
                    outcome = &mut connecting => break outcome,
                    () = self.submitter.changed.notified() => {}
                    () = at(limit), if self.outage.error("", self.address.offline_timeout).is_none() => {}
                }
            };
            match outcome {
                Ok(connected) => return Some(connected),
                Err(failure) => self.outage.note(failure),
            }
            let mut pause = Box::pin(sleep(link::pause(attempt)));
            loop {
                if self.is_over_without_connection() {
                    return None;
                }
                tokio::select! {
                    () = &mut pause => break,
                    () = self.submitter.changed.notified() => {}
                }
            }
        }
        None
    }

    /// Fails new calls if they have no prospect. Returns `true` if the pool has ended.
    fn is_over_without_connection(&mut self) -> bool {
        if let Some(error) = self.outage.error(&self.names.pool, self.address.offline_timeout) {
            while let Some(order) = self.orders.take() {
                order.fail_rest(&error);
            }
        }
        self.orders.is_over()
    }
}

/// The events from the tasks of the session.
enum SessionEvent {
    /// A large answer has come.
    Fetched { answer: Answer, outcome: std::result::Result<Bytes, Missing> },
    /// Whether the stream has message `number` at `sequence`.
    Sought { number: u64, is_there: Option<bool> },
    /// The stream may still have message `number`, which nobody wants.
    NotDeleted(u64),
    /// The stream was searched for these; which of them it had, if it was searched to its end.
    Swept { numbers: Vec<u64>, deleted: Option<Vec<u64>> },
}

type Provided = std::result::Result<(), Failure>;

/// The task of a submitter that has a connection.
struct Session {
    work: Work,
    client: Client,
    in_use: Arc<InUse>,
    id: u64,
    /// Connections that were made so far.
    connects: u64,
    is_ready: bool,
    /// It was there at some time.
    has_been_ready: bool,
    /// Sees to it that the stream is there.
    provision: Option<JoinHandle<Provided>>,
    provisions: usize,
    messages: HashMap<u64, Sent>,
    /// Earlier numbers of messages, and what these are now.
    aliases: HashMap<u64, u64>,
    /// Where each order is.
    places: HashMap<u64, (u64, usize)>,
    /// Orders that were taken and not sent, which may travel together.
    hand: Vec<Order>,
    hand_since: Option<Instant>,
    /// Since when the pool has ended, and no message is out.
    over_since: Option<Instant>,
    /// Numbers that are wanted no more, and were not acknowledged when that was so. The stream may have them.
    unwanted: HashMap<u64, Unwanted>,
    /// The server lets this user delete messages, as far as is known.
    may_delete: Arc<AtomicBool>,
    is_sweeping: bool,
    /// Large answers that are on their way, and where to confirm them.
    fetching: HashMap<(u64, u64), Option<async_nats::Subject>>,
    /// When the last of them was on its way.
    fetched: Option<Instant>,
    next_number: u64,
    /// How often a host has told that it leaves.
    departures: u64,
    is_full: bool,
    /// The connection has taken nothing for a while: what it had to send before has not left. Until the next look nothing is tried.
    jammed: AtomicBool,
    /// How long this task has waited for the connection to take something since it looked last, in nanoseconds.
    waited: AtomicU64,
    events: UnboundedSender<SessionEvent>,
    event: UnboundedReceiver<SessionEvent>,
    /// Since when hosts of other builds only have been there, while something waits.
    strangers_since: Option<Instant>,
    /// Since when nothing has kept the words of hosts from arriving, so that their silence counts.
    listens: Instant,
    /// Bytes that have come by the connection.
    read: u64,
    /// When anything arrived last, from whomever. A server that is stopped keeps its connections, and says nothing.
    arrived: Instant,
    /// Since when the server has been asked for an echo, without one, and when it was asked last.
    silent_since: Option<Instant>,
    echo_asked: Instant,
    /// When the stream acknowledged anything last, and when that was published.
    acknowledged: Instant,
    acknowledged_of: Option<Instant>,
    /// When to look after the messages next, however many events come before.
    tick: Instant,
    has_warned: bool,
}

impl Session {
    fn new(work: Work, (client, in_use): (Client, Arc<InUse>), id: u64) -> Self {
        let (events, event) = mpsc::unbounded_channel();
        Self {
            connects: client.statistics().connects.load(Relaxed),
            work,
            client,
            in_use,
            id,
            is_ready: false,
            has_been_ready: false,
            provision: None,
            provisions: 0,
            messages: HashMap::new(),
            aliases: HashMap::new(),
            places: HashMap::new(),
            hand: Vec::new(),
            hand_since: None,
            over_since: None,
            unwanted: HashMap::new(),
            may_delete: Arc::new(AtomicBool::new(true)),
            is_sweeping: false,
            fetching: HashMap::new(),
            fetched: None,
            next_number: 0,
            departures: 0,
            is_full: false,
            jammed: AtomicBool::new(false),
            waited: AtomicU64::new(0),
            events,
            event,
            strangers_since: None,
            listens: Instant::now(),
            read: 0,
            arrived: Instant::now(),
            silent_since: None,
            echo_asked: Instant::now(),
            acknowledged: Instant::now(),
            acknowledged_of: None,
            tick: Instant::now(),
            has_warned: false,
        }
    }

    fn names(&self) -> &Names {
        &self.work.names
    }

    async fn run(mut self, mut inbox: Subscriber, mut beats: Subscriber, mut noticed: UnboundedReceiver<Notice>) {
        self.say(self.names().all("roll"), Bytes::new()).await;
        self.provide();
        let submitter = self.work.submitter.clone();
        loop {
            self.check_connection();
            self.drop_cancelled().await;
            self.take_orders().await;
            if self.is_done() {
                break;
            }
            let next = self.next_look();
            tokio::select! {
                Some(message) = inbox.next() => {
                    self.arrived(message).await;
                    // Take the messages that have come meanwhile, before anything else.
                    for _ in 0..64 {
                        let Some(Some(message)) = inbox.next().now_or_never() else { break };
                        self.arrived(message).await;
                    }
                }
                () = submitter.changed.notified() => {}
                Some(beat) = beats.next() => self.heard(&beat),
                Some(notice) = noticed.recv() => self.noticed(notice),
                Some(event) = self.event.recv() => self.happened(event).await,
                Some(provided) = finished(&mut self.provision) => self.provided(provided).await,
                () = at(next) => self.look().await,
            }
        }
        // The last messages must have left before the process ends. Without a connection the client answers no flush.
        if self.is_connected() {
            let _ = timeout(Duration::from_millis(500), self.client.flush()).await;
        }
    }

    /// The pool has ended, and nothing is to come. A message that was called off before the stream had acknowledged it is deleted when
    /// that acknowledgement comes, which is waited for as long as one may take.
    fn is_done(&mut self) -> bool {
        if !self.work.orders.is_over() || !self.messages.is_empty() {
            return false;
        }
        let since = *self.over_since.get_or_insert_with(Instant::now);
        self.unwanted.is_empty() || !self.is_connected() || since.elapsed() >= UNACKNOWLEDGED
    }

    async fn say(&self, subject: String, payload: Bytes) {
        if self.is_connected() {
            let _ = self.unless_jammed(self.client.publish(subject, payload)).await;
        }
    }

    fn is_jammed(&self) -> bool {
        self.jammed.load(Relaxed)
    }

    /// Hands something to the connection; `None` if it has not taken it in time.
    async fn unless_jammed<T>(&self, sending: impl Future<Output = T>) -> Option<T> {
        if self.is_jammed() {
            return None;
        }
        let began = Instant::now();
        let sent = timeout(UNACKNOWLEDGED, sending).await;
        // A longer time than the limit is a stop of this process.
        let waited = began.elapsed().min(UNACKNOWLEDGED);
        self.waited.fetch_add(waited.as_nanos() as u64, Relaxed);
        self.jammed.store(sent.is_err(), Relaxed);
        sent.ok()
    }

    fn is_connected(&self) -> bool {
        self.client.connection_state() == async_nats::connection::State::Connected
    }

    /// When to look after things next.
    fn next_look(&self) -> Option<Instant> {
        let now = Instant::now();
        let is_busy =
            !self.messages.is_empty() || !self.hand.is_empty() || !self.unwanted.is_empty() || self.is_jammed();
        let tick = is_busy.then_some(self.tick);
        // A message that a host has does not expire.
        let waiting = self.messages.values().filter(|message| message.holder.is_none());
        let start_by = waiting.filter_map(|message| message.start_by).min();
        let silence = lock(&self.work.submitter.view).roster.until();
        let offline = self.work.outage.until(self.work.address.offline_timeout).filter(|until| *until > now);
        // As `ask_for_echo` has it: an earlier look would find nothing to do, and be due again at once.
        let is_silence = self.work.outage.is_silence && self.is_connected();
        let echo = is_silence.then(|| self.echo_asked.max(self.arrived) + UNACKNOWLEDGED);
        let hand =
            self.hand_since.filter(|_| !self.hand.is_empty() && self.may_send()).map(|since| since + TOGETHER_FOR);
        [tick, start_by, silence, offline, hand, echo].into_iter().flatten().min()
    }

    async fn look(&mut self) {
        let now = Instant::now();
        let (late, waited) =
            (now.saturating_duration_since(self.tick), Duration::from_nanos(self.waited.swap(0, Relaxed)));
        if was_stopped(late, waited) {
            // It may not have read the answers that have come.
            self.forgive_silence();
            self.listens = now;
        }
        self.tick = now + TICK;
        self.jammed.store(false, Relaxed);
        self.reconnected();
        let is_silent = |since| now.saturating_duration_since(since) >= UNACKNOWLEDGED;
        let is_cut_off = !self.is_connected() || self.silent_since.is_some_and(is_silent);
        if is_cut_off {
            self.listens = now;
        }
        let (slots, strangers) = {
            let mut view = lock(&self.work.submitter.view);
            if is_cut_off {
                view.roster.excuse(now);
            } else {
                view.roster.strike_out(now);
            }
            (view.roster.slots(), view.roster.strangers())
        };
        self.work.orders.set_capacity(slots);
        self.warn_of_strangers(strangers, now);
        self.ask_for_echo(now).await;
        if let Some(error) = self.work.outage.error(&self.names().pool, self.work.address.offline_timeout) {
            return self.fail_all(&error).await;
        }
        self.count_lost(now).await;
        self.expire(now).await;
        self.fail_unanswered(now).await;
        self.publish_due(false).await;
        self.seek(now);
        self.sweep(now);
    }

    /// The pending items cannot be answered.
    async fn fail_all(&mut self, error: &Error) {
        let numbers: Vec<_> = self.messages.keys().copied().collect();
        for number in numbers {
            self.fail(number, error).await;
        }
        self.hand.drain(..).for_each(|order| order.fail_rest(error));
        while let Some(order) = self.work.orders.take() {
            order.fail_rest(error);
        }
    }

    /// Fails the items of a message that are not answered, and has nobody run them.
    async fn fail(&mut self, number: u64, error: &Error) {
        let Some(mut message) = self.forget(number) else { return };
        message.orders.iter_mut().filter_map(Option::take).for_each(|order| order.fail_rest(error));
        self.call_off(number, &message).await;
    }

    async fn arrived(&mut self, message: Arrived) {
        self.is_heard();
        let subject = message.subject.as_str();
        let Some(what) = subject.strip_prefix(self.names().of('s', self.id, "").as_str()) else { return };
        if let Some(number) = what.strip_prefix("a.") {
            if let Ok(number) = u64::from_str_radix(number, 16) {
                self.acknowledged(number, &message).await;
            }
            return;
        }
        match what {
            "r" => self.answered(message).await,
            "q" => self.asked(&message).await,
            "h" => self.on_held_report(&message).await,
            "b" => self.on_given_back(&message, false).await,
            "k" => self.on_given_back(&message, true).await,
            "p" => self.asked_for_piece(&message).await,
            _ => {}
        }
    }

    async fn reply(&self, to: Option<async_nats::Subject>, message: &impl Message) {
        if let Some(to) = to {
            self.say(to.to_string(), message.encode()).await;
        }
    }

    /// The item or chunk behind a number.
    fn current(&self, number: u64) -> u64 {
        self.aliases.get(&number).copied().unwrap_or(number)
    }

    async fn happened(&mut self, event: SessionEvent) {
        match event {
            SessionEvent::Fetched { answer, outcome } => {
                let Body::There { key, .. } = answer.body else { return };
                let reply = self.fetching.remove(&(answer.host, key)).flatten();
                self.fetched = Some(Instant::now());
                match outcome {
                    Ok(bytes) => {
                        self.settle(&answer, bytes).await;
                        self.reply(reply, &confirmed(true)).await;
                    }
                    Err(Missing::NoMemory) => {
                        let (number, pool) = (self.current(answer.number), &self.names().pool);
                        let text = format!("there is no memory here for a result of the cluster pool {pool}");
                        self.fail(number, &Error::new(ErrorKind::Io, text)).await;
                    }
                    // Its host tries again, or is lost, and with it its lease.
                    Err(missing) => tracing::debug!(?missing, "a large answer did not come"),
                }
            }
            SessionEvent::Sought { number, is_there } => self.sought(number, is_there).await,
            SessionEvent::NotDeleted(number) => self.is_unwanted(number),
            SessionEvent::Swept { numbers, deleted } => {
                self.is_sweeping = false;
                for number in numbers {
                    let found = deleted.as_ref().map(|deleted| deleted.contains(&number));
                    if self.unwanted.get_mut(&number).is_some_and(|unwanted| unwanted.is_over_after(found)) {
                        self.unwanted.remove(&number);
                    }
                }
            }
        }
    }
}
