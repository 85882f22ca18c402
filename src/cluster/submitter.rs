//! The submitter: takes the orders of a pool, has hosts execute them, and holds each until it is answered.
//!
//! # Who holds what
//! An order is here from when it was taken until its last result has come, it was cancelled, or it failed. Its message is in
//! the stream, or at a host, or both. Nothing that the stream or a host does is believed: what has been out for two leases
//! without a word from a host is looked for in the stream, and published again under a new number if it is not there. The
//! first answer to an item counts, by the pool's table.
//!
//! # Death
//! | killed | what follows |
//! |---|---|
//! | the submitter | hosts find nobody at its subjects, stop its items and remove its messages |
//! | a host | its messages are handed out again one lease later; the next host asks, and the answer has how often that was; if none asks, it is counted two leases later |
//! | the server | all of it waits; after a reconnect what was not acknowledged is published again, under the same id |
//! | the server, stopped and still connected | calls fail once it has answered nothing for the address's `offline_timeout` |

use super::address::{Address, Target, unsupported};
use super::link::{self, Failure, Notice};
use super::messages::{
    Answer, Ask, Beat, Body, Cancel, HeldMessages, Message, MessageOrder, Numbers, Part, Piece, Tasks, Wanted,
};
use super::pieces::{self, Missing};
use super::roster::{HostInfo, Roster};
use super::stream::{self, Names, Stored};
use super::waiting::{at, finished};
use crate::error::{Error, ErrorKind};
use crate::os::sync::lock;
use crate::pool::{EncodedResults, Histogram, Order, Orders, PoolStats, Taker};
use async_nats::client::PublishErrorKind;
use async_nats::{Client, HeaderMap, Message as Arrived, StatusCode, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// Messages that are out at the same time, if there are few slots.
const FEW_OUT: usize = 64;
/// Calls that are over within this may travel together.
const QUICK: Duration = Duration::from_millis(1);
/// So much work of them at most.
const TOGETHER: Duration = Duration::from_millis(2);
const MOST_TOGETHER: usize = 256;
/// Bytes of a message beside the arguments of an order.
const ORDER_HEAD: usize = 160;
/// So many orders are named in one message to all hosts, whatever size of message the server lets through.
const MOST_CANCELLED: usize = 2048;
/// A publish that was not acknowledged is repeated after this.
const UNACKNOWLEDGED: Duration = Duration::from_secs(2);
/// While something is out it is looked after this often.
const TICK: Duration = Duration::from_millis(100);
/// Quick calls wait for each other no longer than this, however many longer ones are out.
const TOGETHER_FOR: Duration = Duration::from_millis(5);
/// A publish that was cancelled and is not acknowledged within this is looked for in the stream.
const SWEPT_AFTER: Duration = Duration::from_secs(5);
/// After so long without a host of this build, hosts of others are worth a warning.
const NO_HOST: Duration = Duration::from_secs(2);

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

/// Why nothing can be had of the servers now.
struct Outage {
    /// Since when there has been no connection, or no stream.
    since: Option<Instant>,
    why: Option<Error>,
    /// One that does not pass by itself.
    lasting: Option<Error>,
    /// The server is connected and answers nothing. Its next word ends that.
    is_silence: bool,
}

impl Outage {
    fn note(&mut self, failure: Failure) {
        self.is_silence = false;
        self.since.get_or_insert_with(Instant::now);
        if failure.is_final {
            tracing::error!(error = %failure.error, "a cluster pool cannot work");
            self.lasting = Some(failure.error);
        } else {
            tracing::debug!(error = %failure.error, "a cluster pool waits");
            self.why = Some(failure.error);
        }
    }

    /// The server has been silent since then, which is no less than being away.
    fn is_silent(&mut self, since: Instant) {
        if self.since.is_none() {
            self.since = Some(since);
            self.is_silence = true;
            self.why = Some(Error::new(ErrorKind::Unavailable, "it is connected and has not answered"));
        }
    }

    fn is_over(&mut self) {
        *self = Self { since: None, why: None, lasting: None, is_silence: false };
    }

    /// Returns the error for all calls, if the outage has lasted for too long, or will.
    fn error(&self, pool: &str, limit: Duration) -> Option<Error> {
        if let Some(error) = &self.lasting {
            return Some(Error::copy(error));
        }
        let lasted = self.since.map(|since| since.elapsed()).filter(|lasted| *lasted >= limit)?;
        let why = self.why.as_ref().map_or_else(String::new, |why| format!(": {why}"));
        let text = format!("the servers of the cluster pool {pool} have not been there for {lasted:.1?}{why}");
        Some(Error::new(ErrorKind::Unavailable, text))
    }

    fn until(&self, limit: Duration) -> Option<Instant> {
        self.since?.checked_add(limit)
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
        let Some(client) = self.connected(notices).await else { return };
        let id = link::new_id();
        let inbox = client.subscribe(self.names.of('s', id, ">")).await;
        let beats = client.subscribe(self.names.all("beat")).await;
        let (Ok(inbox), Ok(beats)) = (inbox, beats) else { return };
        Session::new(self, client, id).run(inbox, beats, noticed).await;
    }

    /// Connects, however long that takes; `None` if the pool has ended before.
    async fn connected(&mut self, notices: UnboundedSender<Notice>) -> Option<Client> {
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
                Ok(client) => return Some(client),
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

    /// Fails what is asked, if that has no prospect; whether the pool has ended.
    fn is_over_without_connection(&mut self) -> bool {
        if let Some(error) = self.outage.error(&self.names.pool, self.address.offline_timeout) {
            while let Some(order) = self.orders.take() {
                order.fail_rest(&error);
            }
        }
        self.orders.is_over()
    }
}

/// A message that is out.
struct Sent {
    /// `None` once it was answered, or is wanted no more.
    orders: Vec<Option<Order>>,
    items: u32,
    state: State,
    /// When it was published first, and last.
    since: Instant,
    tried: Instant,
    /// Until when its items are to begin, and how long that was when it was published first.
    start_by: Option<Instant>,
    patience: Option<Duration>,
    /// The host that last reported to have it, and when that report arrived.
    holder: Option<u64>,
    reported: Instant,
    /// When it was last reported or found anywhere.
    heard: Instant,
    /// It was published before, so the stream may have it twice.
    is_repeated: bool,
    /// A host has given it back so often, for which nobody was lost.
    given_back: u32,
    /// Hosts that were lost with it, and how often that was.
    lost: Vec<String>,
    losses: u32,
    losses_before: u32,
    /// It was published under these numbers before.
    earlier: Vec<u64>,
    /// Somebody looks whether the stream has it.
    is_sought: bool,
    /// How often it was found in the stream, and nobody took it though hosts have slots free.
    ignored: u32,
}

/// A message that the stream may have, though nobody wants it.
struct Unwanted {
    /// Since it is unwanted, or was searched for last.
    since: Instant,
    /// It was searched for and not found. It may have been on its way, so it is searched for once more.
    was_missed: bool,
}

impl Unwanted {
    fn new() -> Self {
        Self { since: Instant::now(), was_missed: false }
    }

    /// Notes a search, and whether it has found the message, if it came to its end. Returns `true` if there is no need for another.
    fn is_over_after(&mut self, found: Option<bool>) -> bool {
        let is_over = found.is_some_and(|found| found || self.was_missed);
        (self.since, self.was_missed) = (Instant::now(), self.was_missed || found == Some(false));
        is_over
    }
}

enum State {
    /// Not published, or not acknowledged; published again at this time. The stream was asked then, and has not answered since.
    Unacknowledged {
        again: Instant,
        silent_since: Option<Instant>,
        refused: Option<(Instant, String)>,
        attempts: usize,
    },
    /// The stream has it, or had it.
    Stored(u64),
}

impl State {
    fn unacknowledged(now: Instant) -> Self {
        Self::Unacknowledged { again: now, silent_since: None, refused: None, attempts: 0 }
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
    id: u64,
    /// Connections that were made so far.
    connects: u64,
    is_ready: bool,
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
    fn new(work: Work, client: Client, id: u64) -> Self {
        let (events, event) = mpsc::unbounded_channel();
        Self {
            connects: client.statistics().connects.load(Relaxed),
            work,
            client,
            id,
            is_ready: false,
            provision: None,
            provisions: 0,
            messages: HashMap::new(),
            aliases: HashMap::new(),
            places: HashMap::new(),
            hand: Vec::new(),
            hand_since: None,
            unwanted: HashMap::new(),
            may_delete: Arc::new(AtomicBool::new(true)),
            is_sweeping: false,
            fetching: HashMap::new(),
            fetched: None,
            next_number: 0,
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
            self.drop_cancelled().await;
            self.take_orders().await;
            if self.work.orders.is_over() && self.messages.is_empty() {
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
        // The last messages must have left before the process ends.
        let _ = timeout(Duration::from_millis(500), self.client.flush()).await;
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

    /// Sees to it that the stream is there.
    fn provide(&mut self) {
        self.is_ready = false;
        let (client, address, target, names) =
            (self.client.clone(), self.work.address.clone(), self.work.target.clone(), self.work.names.clone());
        self.provisions += 1;
        let wait = if self.provisions > 1 { link::pause(self.provisions) } else { Duration::ZERO };
        self.provision = Some(tokio::spawn(async move {
            sleep(wait).await;
            stream::ensure_stream(&client, &address, &target, &names).await.map(drop)
        }));
    }

    async fn provided(&mut self, provided: Provided) {
        match provided {
            Ok(()) => {
                self.is_ready = true;
                self.provisions = 0;
                if self.is_connected() {
                    self.work.outage.is_over();
                }
                self.publish_due(true).await;
            }
            Err(failure) => {
                self.work.outage.note(failure);
                self.provide();
            }
        }
    }

    fn noticed(&mut self, notice: Notice) {
        match notice {
            Notice::Connected => self.reconnected(),
            // It may be late, and belong to a connection before this one.
            Notice::Disconnected if self.is_connected() => {}
            // One that was silent before has been away since then.
            Notice::Disconnected => {
                let since = self.silent_since.unwrap_or_else(Instant::now);
                self.work.outage.since.get_or_insert(since);
                self.work.outage.is_silence = false;
            }
            Notice::Refused(_) if self.is_connected() => {}
            Notice::Refused(why) => {
                let text =
                    format!("the server of the cluster pool {} takes this user no more: {why}", self.names().pool);
                self.work.outage.note(Failure::passing(text));
            }
            Notice::Denied(why) => self.denied(&why),
        }
    }

    /// If there has been another connection since, whatever was on its way may be gone, and the stream with it.
    fn reconnected(&mut self) {
        let connects = self.client.statistics().connects.load(Relaxed);
        if std::mem::replace(&mut self.connects, connects) == connects {
            return;
        }
        let now = Instant::now();
        (self.arrived, self.silent_since, self.acknowledged, self.listens) = (now, None, now, now);
        self.work.outage.is_silence = false;
        // The user may have got the right meanwhile.
        self.may_delete.store(true, Relaxed);
        lock(&self.work.submitter.view).roster.excuse(now);
        let early = now.checked_sub(2 * self.work.address.lease).unwrap_or(now) + Duration::from_millis(300);
        for message in self.messages.values_mut() {
            message.heard = message.heard.min(early);
        }
        self.provisions = 0;
        self.provide();
    }

    /// The user of this connection may not do what a pool has to.
    fn denied(&mut self, why: &str) {
        if why.contains("MSG.DELETE") {
            return self.may_not_delete(why);
        }
        let needed = [format!("mp.{}.", self.names().pool), "$JS.API.STREAM".into()];
        if needed.iter().any(|subject| why.contains(subject.as_str())) {
            let text =
                format!("the server of the cluster pool {} does not let this user submit: {why}", self.names().pool);
            self.work.outage.note(Failure::lasting(text));
            if self.is_ready {
                // Perhaps somebody changes that.
                self.provisions += 1;
                self.provide();
            }
        }
    }

    fn heard(&mut self, message: &Arrived) {
        self.is_heard();
        if let Ok(beat) = Beat::decode(&message.payload) {
            let now = Instant::now();
            let mut view = lock(&self.work.submitter.view);
            view.roster.heard(beat, now);
            view.roster.strike_out(now);
            let slots = view.roster.slots();
            drop(view);
            self.work.orders.set_capacity(slots);
        }
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

    fn warn_of_strangers(&mut self, strangers: usize, now: Instant) {
        if strangers == 0 || self.messages.is_empty() {
            (self.strangers_since, self.has_warned) = (None, false);
            return;
        }
        let since = *self.strangers_since.get_or_insert(now);
        if now - since >= NO_HOST && !std::mem::replace(&mut self.has_warned, true) {
            tracing::warn!(
                pool = self.names().pool,
                hosts = strangers,
                "all hosts of the cluster pool are of another build"
            );
        }
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

    /// Takes a message off the table.
    fn forget(&mut self, number: u64) -> Option<Sent> {
        let message = self.messages.remove(&number)?;
        message.orders.iter().flatten().for_each(|order| _ = self.places.remove(&order.id()));
        message.earlier.iter().for_each(|earlier| _ = self.aliases.remove(earlier));
        Some(message)
    }

    /// Nobody is to run a message that is off the table.
    async fn call_off(&mut self, number: u64, message: &Sent) {
        let all = (0..message.orders.len() as u32).map(|order| (number, order));
        let earlier =
            message.earlier.iter().flat_map(|number| (0..message.orders.len() as u32).map(|order| (*number, order)));
        self.cancel(&all.chain(earlier).collect::<Vec<_>>()).await;
        match message.state {
            State::Stored(sequence) => self.delete(number, sequence),
            State::Unacknowledged { .. } => self.is_unwanted(number),
        }
    }

    fn is_unwanted(&mut self, number: u64) {
        if self.may_delete.load(Relaxed) {
            self.unwanted.insert(number, Unwanted::new());
        }
    }

    fn delete(&self, number: u64, sequence: u64) {
        let (client, names, id, events) = (self.client.clone(), self.names().clone(), self.id, self.events.clone());
        let may_delete = self.may_delete.clone();
        tokio::spawn(async move {
            for attempt in 1..10 {
                if !may_delete.load(Relaxed) {
                    return;
                }
                match stream::delete(&client, &names, sequence, (id, number)).await {
                    Ok(()) => return,
                    Err(_) => sleep(link::pause(attempt)).await,
                }
            }
            let _ = events.send(SessionEvent::NotDeleted(number));
        });
    }

    /// This user may not delete messages. Those that are cancelled stay in the stream until a host takes them and learns that.
    fn may_not_delete(&mut self, why: &str) {
        if self.may_delete.swap(false, Relaxed) {
            let right = format!("$JS.API.STREAM.MSG.DELETE.{}", self.names().stream);
            tracing::warn!(
                pool = self.names().pool,
                right,
                why,
                "this user has no right to publish to that subject: cancelled items stay in the stream until a host takes them"
            );
        }
        self.unwanted.clear();
    }

    /// Deletes what nobody wants and the stream may have, though it never said so.
    fn sweep(&mut self, now: Instant) {
        if self.is_sweeping || !self.is_ready || !self.is_connected() {
            return;
        }
        let is_due = |unwanted: &Unwanted| now.saturating_duration_since(unwanted.since) >= SWEPT_AFTER;
        let due = self.unwanted.iter().filter(|(_, unwanted)| is_due(unwanted));
        let numbers: Vec<_> = due.map(|(number, _)| *number).collect();
        if numbers.is_empty() {
            return;
        }
        self.is_sweeping = true;
        let (client, names, id, events) = (self.client.clone(), self.names().clone(), self.id, self.events.clone());
        tokio::spawn(async move {
            let deleted = stream::sweep(&client, &names, id, &numbers).await.ok();
            let _ = events.send(SessionEvent::Swept { numbers, deleted });
        });
    }

    /// Fails what had to begin by now.
    async fn expire(&mut self, now: Instant) {
        let is_due = |message: &Sent| message.holder.is_none() && message.start_by.is_some_and(|by| by <= now);
        let due: Vec<_> =
            self.messages.iter().filter(|(_, message)| is_due(message)).map(|(number, _)| *number).collect();
        for number in due {
            let strangers = lock(&self.work.submitter.view).roster.strangers();
            let order = self.messages[&number].orders.iter().flatten().next();
            let Some(error) = order.map(|order| order.not_begun()) else { continue };
            let with = |why: String| Error::new(error.kind(), format!("{error} ({why})"));
            let error = match strangers {
                0 => error,
                1 => with("1 host serves this pool, of another build".into()),
                hosts => with(format!("{hosts} hosts serve this pool, all of another build")),
            };
            self.fail(number, &error).await;
        }
    }

    /// A message whose host has not been heard of for two leases was lost with it, though no other host asks for it.
    async fn count_lost(&mut self, now: Instant) {
        if !self.fetching.is_empty() {
            self.fetched = Some(now);
        }
        if !self.is_ready || !self.is_connected() {
            return;
        }
        let patience = patience_with_hosts(self.work.address.lease, self.fetched.map(|fetched| now - fetched));
        let view = self.work.submitter.clone();
        let listens = self.listens;
        let is_lost = |message: &Sent| {
            let heard = message.reported.max(listens);
            let holder = message.holder.filter(|_| now.saturating_duration_since(heard) >= patience);
            holder.is_some_and(|holder| !lock(&view.view).roster.has(holder))
        };
        let numbers: Vec<_> =
            self.messages.iter().filter(|(_, message)| is_lost(message)).map(|(number, _)| *number).collect();
        for number in numbers {
            let Some(sent) = self.messages.get_mut(&number) else { continue };
            let losses = sent.losses.saturating_add(1);
            tracing::debug!(number, holder = sent.holder, "the host of a message is not heard of any more");
            // The time to begin counts anew if no host is there; else it has none, as after any other retry.
            let has_hosts = lock(&self.work.submitter.view).roster.slots() > 0;
            let patience = sent.patience.filter(|_| !has_hosts);
            if let Some(error) = self.has_lost(number, losses) {
                self.fail(number, &error).await;
            } else if let Some(sent) = self.messages.get_mut(&number) {
                (sent.holder, sent.start_by) = (None, patience.and_then(|patience| now.checked_add(patience)));
            }
        }
    }

    /// Counts that a message was lost with hosts so often; returns the error if that is too often.
    fn has_lost(&mut self, number: u64, losses: u32) -> Option<Error> {
        let sent = self.messages.get_mut(&number)?;
        if losses > sent.losses {
            sent.losses = losses;
            let mut view = lock(&self.work.submitter.view);
            let lost = sent.holder.map_or_else(|| "a host that was lost at once".into(), |host| view.roster.name(host));
            sent.lost.push(lost);
            view.redelivered += u64::from(sent.items);
        }
        if sent.losses <= self.work.address.redeliver {
            return None;
        }
        let label = sent.orders.iter().flatten().next().map_or("an item", Order::label);
        let (count, names) = (sent.lost.len(), sent.lost.join(", "));
        let text = format!("{label} was at {count} hosts that were lost while they had it: {names}");
        Some(Error::new(ErrorKind::ProcessDied, text))
    }

    /// Fails messages that the stream has not acknowledged for too long, nor any other meanwhile, though its server is there.
    async fn fail_unanswered(&mut self, now: Instant) {
        let limit = silence(self.work.address.offline_timeout);
        let is_over = |since: Instant| now.saturating_duration_since(since.max(self.acknowledged)) >= limit;
        let is_unanswered = |message: &Sent| match message.state {
            State::Unacknowledged { silent_since, .. } => silent_since.is_some_and(is_over),
            State::Stored(_) => false,
        };
        if !self.is_ready || !self.is_connected() {
            return;
        }
        let numbers: Vec<_> =
            self.messages.iter().filter(|(_, message)| is_unanswered(message)).map(|(number, _)| *number).collect();
        for number in numbers {
            let pool = &self.names().pool;
            let text = format!("the stream of the cluster pool {pool} has not answered for {limit:?}");
            self.fail(number, &Error::new(ErrorKind::Unavailable, text)).await;
        }
    }

    /// Something has arrived, so the server is there.
    fn is_heard(&mut self) {
        (self.arrived, self.silent_since) = (Instant::now(), None);
        if self.work.outage.is_silence && self.is_connected() {
            self.work.outage.is_over();
        }
    }

    /// Has the server send an echo if it has said nothing for a while and something waits for it. One that sends none is away.
    async fn ask_for_echo(&mut self, now: Instant) {
        let read = self.client.statistics().in_bytes.load(Relaxed);
        if std::mem::replace(&mut self.read, read) != read {
            self.is_heard();
        }
        let is_quiet = now.saturating_duration_since(self.arrived) >= UNACKNOWLEDGED;
        if !is_quiet || !self.is_connected() || self.messages.is_empty() && !self.work.outage.is_silence {
            return;
        }
        if let Some(since) = self.silent_since
            && now.saturating_duration_since(since) >= silence(self.work.address.offline_timeout)
        {
            self.work.outage.is_silent(since);
        }
        if self.silent_since.is_none() || now.saturating_duration_since(self.echo_asked) >= UNACKNOWLEDGED {
            self.silent_since.get_or_insert(now);
            self.echo_asked = now;
            self.say(self.names().of('s', self.id, "e"), Bytes::new()).await;
        }
    }

    /// The stream is asked again before its silence counts.
    fn forgive_silence(&mut self) {
        (self.arrived, self.silent_since) = (Instant::now(), None);
        for message in self.messages.values_mut() {
            if let State::Unacknowledged { silent_since, .. } = &mut message.state {
                *silent_since = None;
            }
        }
    }

    /// Has all hosts stop orders, by their messages and their places in these.
    async fn cancel(&self, orders: &[(u64, u32)]) {
        for orders in orders.chunks(MOST_CANCELLED) {
            let cancel = Cancel { submitter: self.id, orders: orders.to_vec() };
            self.say(self.names().all("c"), cancel.encode()).await;
        }
    }

    // Orders on their way out.

    async fn drop_cancelled(&mut self) {
        let cancelled = self.work.orders.cancelled();
        if cancelled.is_empty() {
            return;
        }
        let cancelled: HashSet<u64> = cancelled.into_iter().collect();
        self.hand.retain(|order| !cancelled.contains(&order.id()));
        let mut told = Vec::new();
        for id in cancelled {
            let Some((number, place)) = self.places.remove(&id) else { continue };
            let Some(message) = self.messages.get_mut(&number) else { continue };
            message.orders[place] = None;
            if message.orders.iter().any(Option::is_some) {
                told.extend([number].iter().chain(&message.earlier).map(|number| (*number, place as u32)));
            } else if let Some(message) = self.forget(number) {
                self.call_off(number, &message).await;
            }
        }
        self.cancel(&told).await;
    }

    fn may_send(&self) -> bool {
        self.is_ready && !self.is_full && !self.is_jammed() && self.is_connected()
    }

    async fn take_orders(&mut self) {
        if let Some(error) = self.work.outage.error(&self.names().pool, self.work.address.offline_timeout) {
            if !self.messages.is_empty() || !self.hand.is_empty() {
                self.fail_all(&error).await;
            }
            while let Some(order) = self.work.orders.take() {
                order.fail_rest(&error);
            }
            return;
        }
        if !self.may_send() {
            return;
        }
        let slots = lock(&self.work.submitter.view).roster.slots();
        let (most, most_quick) = (FEW_OUT.max(4 * slots), 2 * slots.max(1) + 2);
        while self.messages.len() < most && !self.is_jammed() {
            let Some(order) = self.work.orders.take() else { break };
            if let Some(error) = refusal(&order) {
                order.fail_rest(&error);
            } else if !is_quick(&order, self.most_inline() / 4) {
                self.send(vec![order]).await;
            } else {
                if self.hand.is_empty() {
                    self.hand_since = Some(Instant::now());
                }
                self.hand.push(order);
                if self.hand_is_full() {
                    self.send_hand().await;
                }
            }
        }
        // While hosts have enough to do, more calls may come that travel with these.
        let has_waited = self.hand_since.is_some_and(|since| since.elapsed() >= TOGETHER_FOR);
        if !self.hand.is_empty() && (has_waited || self.messages.len() < most_quick) {
            self.send_hand().await;
        }
    }

    /// How large arguments may be that travel inside their message: of larger ones the stream could hold none, or few.
    fn most_inline(&self) -> usize {
        let most_stored = usize::try_from(self.work.address.most_bytes / 4).unwrap_or(usize::MAX);
        pieces::most_inline(&self.client).min(most_stored)
    }

    fn hand_is_full(&self) -> bool {
        let work: Duration = self.hand.iter().map(work_of).sum();
        let bytes: usize = self.hand.iter().map(|order| order.records().len() + ORDER_HEAD).sum();
        self.hand.len() >= MOST_TOGETHER || work >= TOGETHER || bytes >= self.most_inline() / 2
    }

    async fn send_hand(&mut self) {
        let together = std::mem::take(&mut self.hand);
        self.send(together).await;
    }

    async fn send(&mut self, orders: Vec<Order>) {
        let (number, now) = (self.next_number, Instant::now());
        self.next_number += 1;
        for (place, order) in orders.iter().enumerate() {
            self.places.insert(order.id(), (number, place));
        }
        let start_by = orders.iter().filter_map(Order::start_by).min();
        let message = Sent {
            items: orders.iter().map(Order::count).sum(),
            start_by,
            patience: start_by.map(|start_by| start_by.saturating_duration_since(now)),
            orders: orders.into_iter().map(Some).collect(),
            state: State::unacknowledged(now),
            since: now,
            tried: now,
            holder: None,
            reported: now,
            heard: now,
            is_repeated: false,
            given_back: 0,
            lost: Vec::new(),
            losses: 0,
            losses_before: 0,
            earlier: Vec::new(),
            is_sought: false,
            ignored: 0,
        };
        self.messages.insert(number, message);
        self.publish(number).await;
    }

    /// Encodes a message for the stream.
    fn encode(&self, number: u64) -> Option<Bytes> {
        let message = self.messages.get(&number)?;
        let task = |(place, order): (usize, &Order)| MessageOrder {
            place: place as u32,
            call: order.call().to_words(),
            origin: order.origin(),
            first: order.first(),
            count: order.count(),
            attempt: order.attempt() + message.losses,
            limits: order.limits(),
            item_time: order.item_time(),
            len: order.records().len() as u64,
        };
        let orders = message.orders.iter().enumerate().filter_map(|(place, order)| Some((place, order.as_ref()?)));
        let len: usize = orders.clone().map(|(_, order)| order.records().len()).sum();
        let body = match len <= self.most_inline() {
            true => {
                let mut bytes = Vec::with_capacity(len);
                orders.clone().for_each(|(_, order)| bytes.extend_from_slice(order.records()));
                Body::Here(bytes.into())
            }
            false => Body::There { key: number, len: len as u64 },
        };
        // The copy that nobody removes is not to run once its items are answered.
        let is_to_ask = message.start_by.is_some() || message.is_repeated || !message.earlier.is_empty();
        let tasks = orders.map(task).collect();
        Some(Tasks { submitter: self.id, number, is_to_ask, orders: tasks, body }.encode())
    }

    /// Publishes a message, under the same id each time.
    async fn publish(&mut self, number: u64) {
        let now = Instant::now();
        let Some(payload) = self.encode(number) else { return };
        let (subject, reply) = (self.names().tasks(self.id), self.names().of('s', self.id, &format!("a.{number:x}")));
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", format!("{:016x}.{number:x}", self.id));
        let Some(message) = self.messages.get_mut(&number) else { return };
        (message.tried, message.is_repeated) = (now, true);
        if let State::Unacknowledged { again, silent_since, .. } = &mut message.state {
            *again = now + UNACKNOWLEDGED;
            silent_since.get_or_insert(now);
        }
        let publish = self.client.publish_with_reply_and_headers(subject, reply, headers, payload);
        // Without a connection it stays as it is, to be published later.
        let published = self.unless_jammed(publish).await;
        if let Some(Err(error)) = published
            && error.kind() == PublishErrorKind::MaxPayloadExceeded
        {
            let text =
                format!("the server of the cluster pool {} lets less through than before: {error}", self.names().pool);
            self.fail(number, &Error::new(ErrorKind::Unavailable, text)).await;
        }
    }

    /// Publishes again what was not acknowledged in time; or at once, as the connection or the stream is a new one.
    async fn publish_due(&mut self, is_new: bool) {
        if !self.is_ready || !self.is_connected() {
            return;
        }
        if is_new {
            self.forgive_silence();
        }
        let now = Instant::now();
        // The stream acknowledges in order: on a slow link the first copy may not have left yet.
        let is_slow = now.saturating_duration_since(self.acknowledged) < UNACKNOWLEDGED;
        let is_due = |message: &Sent| {
            let State::Unacknowledged { again, silent_since, .. } = &message.state else { return false };
            let is_behind =
                is_slow && silent_since.is_some() && self.acknowledged_of.is_none_or(|of| of <= message.tried);
            is_new || *again <= now && !is_behind
        };
        let mut due: Vec<_> =
            self.messages.iter().filter(|(_, message)| is_due(message)).map(|(number, _)| *number).collect();
        due.sort_unstable();
        for number in due {
            self.publish(number).await;
            // Answers that have come are read before the rest.
            if self.is_jammed() {
                break;
            }
        }
        self.is_full = false;
    }

    /// Whatever the stream was asked to keep is there, or not.
    async fn acknowledged(&mut self, number: u64, message: &Arrived) {
        let now = Instant::now();
        let stored = match message.status {
            Some(StatusCode::NO_RESPONDERS) => Stored::NoStream,
            _ => Stored::read(&message.payload),
        };
        let limit = self.work.address.offline_timeout;
        let pool = self.names().pool.clone();
        if let Stored::At(_) = stored {
            self.acknowledged = now;
        }
        let Some(sent) = self.messages.get_mut(&number) else {
            if let Stored::At(sequence) = stored
                && self.unwanted.remove(&number).is_some()
            {
                // It was cancelled before this was known.
                self.delete(number, sequence);
            }
            return;
        };
        let State::Unacknowledged { again, silent_since, refused, attempts } = &mut sent.state else { return };
        *attempts += 1;
        *silent_since = None;
        self.acknowledged_of = self.acknowledged_of.max(Some(sent.tried));
        match stored {
            Stored::At(sequence) => {
                (sent.state, sent.heard) = (State::Stored(sequence), now);
            }
            Stored::Full => {
                *again = now + link::pause(*attempts);
                self.is_full = true;
            }
            Stored::NoStream => {
                *again = now + link::pause(*attempts);
                if self.provision.is_none() {
                    self.provide();
                }
            }
            Stored::Refused(why) => {
                *again = now + link::pause(*attempts);
                let (since, why) = refused.get_or_insert_with(|| (now, why));
                if now - *since >= limit {
                    let text = format!("the stream of the cluster pool {pool} has taken nothing for {limit:?}: {why}");
                    self.fail(number, &Error::new(ErrorKind::Unavailable, text)).await;
                }
            }
        }
    }

    // Messages from others.

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

    async fn answered(&mut self, message: Arrived) {
        let answer = match Answer::decode(&message.payload) {
            Ok(answer) => answer,
            Err(why) => return tracing::debug!(%why, "an answer that is none"),
        };
        let number = self.current(answer.number);
        if !self.messages.contains_key(&number) {
            lock(&self.work.submitter.view).duplicates += 1;
            return self.reply(message.reply, &confirmed(false)).await;
        }
        match &answer.body {
            Body::Here(bytes) => {
                let bytes = bytes.clone();
                self.settle(&answer, bytes).await;
                self.reply(message.reply, &confirmed(true)).await;
            }
            Body::There { key, len } => {
                let (key, len) = (*key, *len);
                // One that is on its way is confirmed where it was last asked for.
                if self.fetching.insert((answer.host, key), message.reply).is_none() {
                    let (client, subject) = (self.client.clone(), self.names().of('h', answer.host, "p"));
                    let events = self.events.clone();
                    tokio::spawn(async move {
                        let outcome = pieces::fetch(&client, &subject, key, len).await;
                        let _ = events.send(SessionEvent::Fetched { answer, outcome });
                    });
                }
            }
        }
    }

    async fn settle(&mut self, answer: &Answer, bytes: Bytes) {
        let (number, now) = (self.current(answer.number), Instant::now());
        let Some(message) = self.messages.get_mut(&number) else { return };
        (message.holder, message.heard, message.reported) = (Some(answer.host), now, now);
        let mut rest = bytes;
        for Part { order, first, count, len } in &answer.parts {
            if *len > rest.len() as u64 {
                return tracing::warn!("an answer whose parts are longer than itself");
            }
            // The last part takes the memory as it is, if nobody else has it.
            let records = match *len as usize {
                len if len == rest.len() => std::mem::take(&mut rest),
                len => rest.split_to(len),
            };
            if let Some(order) = message.orders.get_mut(*order as usize).and_then(Option::as_mut) {
                let results = EncodedResults { first: *first, count: *count, records: records.into() };
                if let Err(error) = order.settle(results) {
                    tracing::warn!(%error, "an answer that fits no order");
                }
            }
        }
        for (order, time, items) in &answer.ran {
            let order = message.orders.get(*order as usize).and_then(Option::as_ref);
            order.into_iter().for_each(|order| order.ran(*time, *items));
        }
        if answer.is_last {
            let ran: Duration = answer.ran.iter().map(|(_, time, _)| *time).sum();
            let beyond = (now - message.since).saturating_sub(ran);
            let items = u64::from(message.items);
            // With it go its orders: each of their items is settled.
            self.forget(number);
            lock(&self.work.submitter.view).round_trip.add(beyond, items);
        }
    }

    /// A host asks whether it should begin.
    async fn asked(&mut self, message: &Arrived) {
        let Ok(Ask { number, host, delivered }) = Ask::decode(&message.payload) else { return };
        let now = Instant::now();
        let no = Wanted { is_wanted: false, losses: 0, start_in: None };
        // Nor is one wanted that was published anew under another number.
        let Some(sent) = self.messages.get_mut(&number) else {
            return self.reply(message.reply.clone(), &no).await;
        };
        let lost = delivered.saturating_sub(1).saturating_sub(sent.given_back);
        let mut losses = sent.losses_before.saturating_add(lost);
        if losses > sent.losses && sent.holder == Some(host) {
            // It was here before, was cut off, and is not lost.
            sent.given_back = sent.given_back.saturating_add(losses - sent.losses);
            (sent.start_by, losses) = (None, sent.losses);
        }
        tracing::trace!(
            number,
            host,
            delivered,
            given_back = sent.given_back,
            losses,
            known = sent.losses,
            "a host asks"
        );
        if lost > 0 {
            // It has begun, as far as anybody knows, and is tried again: as on this machine, it has no time to begin by any more.
            sent.start_by = None;
        }
        if let Some(error) = self.has_lost(number, losses) {
            self.reply(message.reply.clone(), &no).await;
            return self.fail(number, &error).await;
        }
        let Some(sent) = self.messages.get_mut(&number) else { return };
        (sent.holder, sent.heard, sent.reported) = (Some(host), now, now);
        if sent.start_by.is_some_and(|by| by <= now) {
            self.reply(message.reply.clone(), &no).await;
            self.messages.entry(number).and_modify(|sent| sent.holder = None);
            return self.expire(now).await;
        }
        let start_in = sent.start_by.map(|by| by.saturating_duration_since(now));
        // Those before it was published under this number are in the message.
        let yes = Wanted { is_wanted: true, losses: sent.losses - sent.losses_before, start_in };
        self.reply(message.reply.clone(), &yes).await;
    }

    async fn on_held_report(&mut self, message: &Arrived) {
        let Ok(HeldMessages { host, numbers }) = HeldMessages::decode(&message.payload) else { return };
        let (now, mut unwanted, mut cancelled) = (Instant::now(), Vec::new(), Vec::new());
        for number in numbers {
            let Some(sent) = self.messages.get_mut(&self.current(number)) else {
                unwanted.push(number);
                continue;
            };
            (sent.holder, sent.heard, sent.reported, sent.ignored) = (Some(host), now, now, 0);
            let places = (0..).zip(&sent.orders).filter(|(_, order)| order.is_none()).map(|(place, _)| (number, place));
            cancelled.extend(places);
        }
        self.reply(message.reply.clone(), &Numbers(unwanted)).await;
        // The first such message may have been lost.
        self.cancel(&cancelled).await;
    }

    async fn on_given_back(&mut self, message: &Arrived, has_begun: bool) {
        let Ok(HeldMessages { host, numbers }) = HeldMessages::decode(&message.payload) else { return };
        for number in numbers {
            let current = self.current(number);
            if let Some(sent) = self.messages.get_mut(&current) {
                // Deliveries under an earlier number are not counted any more.
                sent.given_back += u32::from(current == number);
                sent.heard = Instant::now();
                if has_begun {
                    // The limit was for its first beginning.
                    sent.start_by = None;
                }
                if sent.holder == Some(host) {
                    sent.holder = None;
                }
            }
        }
        // A sign of life.
        self.reply(message.reply.clone(), &Numbers(Vec::new())).await;
    }

    async fn asked_for_piece(&mut self, message: &Arrived) {
        let Ok(piece) = Piece::decode(&message.payload) else { return };
        let number = self.current(piece.key);
        let sent = self.messages.get_mut(&number);
        // A large value travels alone.
        let order = sent.and_then(|sent| sent.orders.first_mut()).and_then(Option::as_mut);
        let whole = order.map(Order::shared_records).unwrap_or_default();
        let bytes = whole.slice(pieces::place(&self.client, whole.len(), &piece));
        if let Some(reply) = &message.reply {
            self.say(reply.to_string(), bytes).await;
        }
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

    // Claims that are not believed.

    /// Looks for messages that have not been reported for two leases.
    fn seek(&mut self, now: Instant) {
        if !self.is_ready || !self.is_connected() {
            return;
        }
        let patience = 2 * self.work.address.lease;
        let (client, names, id) = (self.client.clone(), self.names().clone(), self.id);
        for (number, message) in &mut self.messages {
            let State::Stored(sequence) = message.state else { continue };
            if message.is_sought || now.saturating_duration_since(message.heard) < patience {
                continue;
            }
            message.is_sought = true;
            let (client, names, events, number) = (client.clone(), names.clone(), self.events.clone(), *number);
            tokio::spawn(async move {
                let is_there = stream::has(&client, &names, sequence, (id, number)).await;
                let _ = events.send(SessionEvent::Sought { number, is_there });
            });
        }
    }

    async fn sought(&mut self, number: u64, is_there: Option<bool>) {
        let (now, has_free) = (Instant::now(), lock(&self.work.submitter.view).roster.has_free());
        let Some(sent) = self.messages.get_mut(&number) else { return };
        sent.is_sought = false;
        let was_silent = now.saturating_duration_since(sent.heard) >= 2 * self.work.address.lease;
        match is_there {
            // A host has spoken meanwhile, or nobody has answered.
            _ if !was_silent => {}
            None => {
                sent.heard = now.checked_sub(self.work.address.lease).unwrap_or(now);
                // The server is there, and its stream is not: that is an outage, too.
                if self.provision.is_none() && self.is_connected() {
                    self.provide();
                }
            }
            Some(true) => {
                sent.heard = now.checked_sub(self.work.address.lease).unwrap_or(now);
                sent.ignored = if has_free { sent.ignored + 1 } else { 0 };
                // It is there, hosts have slots free, and the consumer does not hand it out.
                if sent.ignored >= 4 {
                    tracing::warn!(
                        pool = self.names().pool,
                        "a message that waits is not handed out; it is published anew"
                    );
                    self.publish_anew(number).await;
                }
            }
            Some(false) => {
                tracing::warn!(pool = self.names().pool, "the stream has lost a message; it is published again");
                self.publish_anew(number).await;
            }
        }
    }

    /// Publishes a message under a new number. Answers to the old one count as well.
    async fn publish_anew(&mut self, number: u64) {
        let Some(mut sent) = self.messages.remove(&number) else { return };
        if let State::Stored(sequence) = sent.state {
            self.delete(number, sequence);
        }
        let (new, now) = (self.next_number, Instant::now());
        self.next_number += 1;
        for (place, order) in sent.orders.iter().enumerate() {
            order.iter().for_each(|order| _ = self.places.insert(order.id(), (new, place)));
        }
        sent.earlier.push(number);
        sent.earlier.iter().for_each(|earlier| _ = self.aliases.insert(*earlier, new));
        (sent.state, sent.heard) = (State::unacknowledged(now), now);
        (sent.holder, sent.given_back, sent.ignored, sent.losses_before) = (None, 0, 0, sent.losses);
        self.messages.insert(new, sent);
        self.publish(new).await;
    }
}

/// Whether this process was stopped, of which a look that comes so late tells. What the task has waited for the connection is no
/// stop.
fn was_stopped(late: Duration, waited: Duration) -> bool {
    late.saturating_sub(waited) > UNACKNOWLEDGED
}

/// How long a server that is connected may answer nothing: twice as long as this process may be stopped unnoticed, or longer.
fn silence(offline_timeout: Duration) -> Duration {
    offline_timeout.max(2 * UNACKNOWLEDGED)
}

/// How long a host may say nothing of a message that it has. Large answers that are on their way, or were so long ago, hold up the
/// words of all hosts, for as long as their pieces may need at most.
fn patience_with_hosts(lease: Duration, fetched: Option<Duration>) -> Duration {
    let held_up = fetched.filter(|ago| *ago < 2 * lease).map_or(Duration::ZERO, |_| pieces::PATIENCE);
    2 * lease + held_up
}

fn confirmed(is_wanted: bool) -> Wanted {
    Wanted { is_wanted, losses: 0, start_in: None }
}

/// How long the items of an order will take, as far as that is known.
fn work_of(order: &Order) -> Duration {
    order.item_time().unwrap_or(TOGETHER) * order.count()
}

/// Returns `true` if an order may travel with others: it is known to be over soon.
fn is_quick(order: &Order, most: usize) -> bool {
    work_of(order) < QUICK
        && order.start_by().is_none()
        && order.attachments().is_empty()
        && order.records().len() + ORDER_HEAD < most.min(8 << 10)
}

/// Why an order cannot leave this host.
fn refusal(order: &Order) -> Option<Error> {
    let what = order.attachments().first()?.kind();
    let text = format!("an argument of {} is or holds {what}, which cannot cross to another host", order.label());
    Some(Error::new(ErrorKind::Encode, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_that_is_late_by_its_own_waits_is_no_stop_of_the_process() {
        let second = Duration::from_secs(1);
        assert!(was_stopped(3 * second, Duration::ZERO));
        assert!(!was_stopped(3 * second, 2 * second));
        assert!(was_stopped(6 * second, 2 * second));
        assert!(!was_stopped(second, Duration::ZERO));
    }

    /// Whatever the `offline_timeout`, zero and one of a second included.
    #[test]
    fn a_stop_of_the_process_that_goes_unnoticed_is_no_silence_of_the_server() {
        for tenths in 0..100 {
            let (stop, limit) = (UNACKNOWLEDGED, silence(Duration::from_millis(100 * tenths)));
            assert!(!was_stopped(stop, Duration::ZERO) && stop + TICK < limit, "{limit:?}");
        }
    }

    #[test]
    fn large_answers_give_hosts_more_time_and_not_for_ever() {
        let lease = Duration::from_secs(5);
        assert_eq!(patience_with_hosts(lease, None), 2 * lease);
        assert_eq!(patience_with_hosts(lease, Some(Duration::ZERO)), 2 * lease + pieces::PATIENCE);
        assert_eq!(patience_with_hosts(lease, Some(2 * lease)), 2 * lease);
    }

    #[test]
    fn a_message_that_is_not_found_is_searched_for_once_more_as_it_may_have_been_on_its_way() {
        assert!(Unwanted::new().is_over_after(Some(true)));
        let mut late = Unwanted::new();
        let searches = [Some(false), None, Some(false)].map(|found| late.is_over_after(found));
        assert_eq!(searches, [false, false, true]);
    }
}
