//! The host: pulls messages of its build, has the local pool execute them, and keeps their leases.
//!
//! # Who holds what
//! A message is here from when it was delivered until its answer was confirmed by its submitter; only then is it acknowledged,
//! and leaves the stream. Its lease is renewed every third of it, whatever the workers do. If the server was not reached for a
//! lease, somebody else has the message by now: its items are stopped, and it is forgotten. If the stream was deleted and made anew,
//! nothing is said to the new one of messages of the old: another message may have the same number there. A host that is at work finds
//! that out with each renewal, and looks for each of its messages in the new stream before it says anything of that. (Times would not do:
//! in a cluster the clock that stamps messages is not the one that dates the stream.)
//!
//! # Death
//! | killed | what follows |
//! |---|---|
//! | this process | its leases end; the messages are handed out again |
//! | a submitter | nobody answers at its subjects: after two seconds its items are stopped, and its messages removed |
//! | a submitter, stopped and still connected | a message that is to be asked for waits a lease for its word, and is handed out again later; of such a submitter one message at a time is asked for |
//! | the server | items go on for up to a lease, and are then stopped; after a reconnect everything that was asked for is asked for again, and submitters learn that no host was lost with those that were stopped |

use super::address::{Address, Target};
use super::job::{Host, Job, JobCommand, JobOutcome, PATIENCE};
use super::link::{self, Failure, Notice};
use super::messages::{Ask, Beat, Cancel, HeldMessages, Message, Numbers, Piece, Tasks};
use super::pieces;
use super::pulls::{EXPIRES, Pulls};
use super::roster::{BEAT, IDLE_BEAT};
use super::serving::{Command, Served};
use super::stream::{self, Names};
use super::waiting::finished;
use crate::error::{Error, ErrorKind, Result};
use crate::os::sync::lock;
use crate::pool::Pool;
use async_nats::subject::ToSubject;
use async_nats::{Client, Message as Arrived, Request, RequestErrorKind, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{sleep, sleep_until, timeout, timeout_at};

/// After this, a host reports the items that it still holds to their submitter.
const STILL_HELD: Duration = Duration::from_millis(50);
/// While the host is busy, silent submitters are looked for this often.
const LOOK: Duration = Duration::from_secs(2);
/// So many submitters, or messages, are looked for at a time.
const MOST_LOOKED_FOR: usize = 32;
/// So many messages are named in one report, whatever size of message the server lets through.
const MOST_REPORTED: usize = 4096;
/// Within this all jobs report their progress.
const GIVES_BACK: Duration = Duration::from_millis(500);
/// A message whose submitter does not answer is handed out again after so many leases.
const LATER: u32 = 2;
/// Malformed messages are logged this often at most.
const QUIET: Duration = Duration::from_secs(1);

/// Serves with `pool` at `address` until it is commanded to drain, or cannot go on.
pub(super) async fn serve(
    pool: Pool,
    address: Address,
    build: u64,
    mut commands: UnboundedReceiver<Command>,
) -> Result<Served> {
    let target = address.parse()?;
    if pool.taker().is_some() {
        let text =
            "a pool within this process, and a cluster pool, cannot serve: serve with a pool of worker processes";
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    let names = Names::new(&target.pool, build);
    let (notices, mut noticed) = mpsc::unbounded_channel();
    let ready = ready(&address, &target, &names, (notices, &mut noticed));
    let (client, made) = tokio::select! {
        ready = ready => ready?,
        // Nothing was taken.
        _ = commands.recv() => return Ok(Served::default()),
    };
    let id = link::new_id();
    let own = client.subscribe(names.of('h', id, ">")).await;
    let cancels = client.subscribe(names.all("c")).await;
    let rolls = client.subscribe(names.all("roll")).await;
    let (Ok(own), Ok(cancels), Ok(rolls)) = (own, cancels, rolls) else {
        return Err(Error::new(ErrorKind::Unavailable, "the connection to the cluster's server has ended"));
    };
    Service::new(pool, (client, made), address, target, names, id).run(own, cancels, rolls, noticed, commands).await
}

/// Connects, and sees to it that the stream and the consumer are there, however long that takes.
async fn ready(
    address: &Address,
    target: &Target,
    names: &Names,
    (notices, noticed): (UnboundedSender<Notice>, &mut UnboundedReceiver<Notice>),
) -> Result<(Client, String)> {
    let mut attempt = 0;
    let client = loop {
        attempt += 1;
        match link::connect(address, target, "host", notices.clone()).await {
            Ok(client) => break client,
            Err(Failure { error, is_final: true }) => return Err(error),
            Err(failure) => tracing::debug!(error = %failure.error, "a host waits for its server"),
        }
        sleep(link::pause(attempt)).await;
    };
    let mut attempt = 0;
    let began = Instant::now();
    loop {
        attempt += 1;
        match provide(&client, address, target, names).await {
            Ok(made) => return Ok((client, made)),
            // A server that has just started may answer so for a moment.
            Err(Failure { error, is_final: true }) if began.elapsed() >= PATIENCE || !is_about_jetstream(&error) => {
                return Err(error);
            }
            Err(failure) => tracing::debug!(error = %failure.error, "a host waits for its stream"),
        }
        // A request that the user has no right to is not answered.
        while let Ok(notice) = noticed.try_recv() {
            if let Notice::Denied(why) = notice {
                return Err(denied(names, &why));
            }
        }
        sleep(link::pause(attempt)).await;
    }
}

fn denied(names: &Names, why: &str) -> Error {
    let text = format!("the server of the cluster pool {} does not let this user serve: {why}", names.pool);
    Error::new(ErrorKind::Unavailable, text)
}

fn is_about_jetstream(error: &Error) -> bool {
    error.to_string().contains("has no JetStream")
}

/// When the stream was made that is there now, as `stream::made` has it.
type Provision = std::result::Result<String, Failure>;

async fn provide(client: &Client, address: &Address, target: &Target, names: &Names) -> Provision {
    let made = stream::ensure_stream(client, address, target, names).await?;
    stream::ensure_consumer(client, address, target, names).await?;
    Ok(made)
}

fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "a host without a name".into(),
        name => name.chars().take(64).collect(),
    }
}

/// A message at this host.
struct HeldJob {
    reply: Subject,
    delivery: Delivery,
    /// The stream was made anew since it was delivered, and it was not found in the new one, where another message may have its number:
    /// nothing is said of it there.
    is_of_old_stream: bool,
    commands: UnboundedSender<JobCommand>,
    task: AbortHandle,
    /// Its items have been executed; what is left is to have the answer confirmed.
    is_executed: bool,
    items: u64,
    /// The text that replaces its own.
    verdict: Option<Verdict>,
}

#[derive(Clone, Copy, PartialEq)]
enum Verdict {
    /// Its submitter is dead.
    Orphaned,
}

/// The events from the tasks of the service.
enum ServiceEvent {
    Executed((u64, u64), Duration),
    Ended((u64, u64), JobOutcome),
    /// The consumer is there again, or why it is not.
    Provided(Provision),
    /// When the stream was made that is there now.
    Made(String),
    /// The stream that was made then has this message, under this number.
    Found {
        made: String,
        key: (u64, u64),
        sequence: u64,
    },
    /// A submitter is dead, and its messages are removed.
    Dead(u64),
    Looked,
}

/// When something is due.
struct Due {
    beat: Instant,
    renewal: Instant,
    report: Instant,
    look: Instant,
}

struct Service {
    host: Arc<Host>,
    address: Address,
    target: Target,
    hostname: String,
    born: Instant,
    jobs: HashMap<(u64, u64), HeldJob>,
    /// Messages that were stopped because the server was away for a lease. Their submitters are to learn that this host was not lost.
    stopped: Vec<(u64, u64)>,
    /// Messages that are executed, or are to be.
    busy: usize,
    /// Messages in the order in which they came, until they are reported to their submitters.
    unreported: VecDeque<(Instant, (u64, u64))>,
    pulls: Pulls,
    connects: u64,
    providing: Option<JoinHandle<Provision>>,
    provisions: usize,
    /// When the stream was made, as `stream::made` has it.
    made: String,
    /// When the last echo came back from the server, and when the echoes were sent that are still under way.
    contact: Instant,
    echoes: VecDeque<(u64, Instant)>,
    next_echo: u64,
    /// Since when nobody answers for a submitter, and when that was found last.
    missing: HashMap<u64, (Instant, Instant)>,
    is_looking: bool,
    due: Due,
    events: UnboundedSender<ServiceEvent>,
    event: UnboundedReceiver<ServiceEvent>,
    complained: Option<Instant>,
    /// When what still runs is killed, once it drains.
    drains_until: Option<Option<Instant>>,
    served: Served,
}

impl Service {
    fn new(
        pool: Pool,
        (client, made): (Client, String),
        address: Address,
        target: Target,
        names: Names,
        id: u64,
    ) -> Self {
        let (events, event) = mpsc::unbounded_channel();
        let (now, hostname) = (Instant::now(), hostname());
        let host = Host {
            name: format!("{hostname} (pid {})", std::process::id()),
            client,
            pool,
            names,
            id,
            lease: address.lease,
            large: Default::default(),
            next_key: Default::default(),
            heard: Default::default(),
            silent: Default::default(),
        };
        let connects = host.client.statistics().connects.load(Relaxed);
        Self {
            host: Arc::new(host),
            address,
            target,
            hostname,
            born: now,
            jobs: HashMap::new(),
            stopped: Vec::new(),
            busy: 0,
            unreported: VecDeque::new(),
            pulls: Pulls::default(),
            connects,
            providing: None,
            provisions: 0,
            made,
            contact: now,
            echoes: VecDeque::new(),
            next_echo: 0,
            missing: HashMap::new(),
            is_looking: false,
            due: Due { beat: now, renewal: now, report: now, look: now },
            events,
            event,
            complained: None,
            drains_until: None,
            served: Served::default(),
        }
    }

    fn names(&self) -> &Names {
        &self.host.names
    }

    async fn run(
        mut self,
        mut own: Subscriber,
        mut cancels: Subscriber,
        mut rolls: Subscriber,
        mut noticed: UnboundedReceiver<Notice>,
        mut commands: UnboundedReceiver<Command>,
    ) -> Result<Served> {
        // The last command of a dropped `Serving` is sent once.
        let mut has_commander = true;
        let failed = loop {
            let now = Instant::now();
            self.check_lease(now);
            if let Some(failed) = self.tend(now).await {
                break Some(failed);
            }
            if self.has_drained(now).await {
                break None;
            }
            self.ask_for_more(now).await;
            let next = self.next_due();
            tokio::select! {
                Some(message) = own.next() => {
                    self.arrived(message).await;
                    for _ in 0..64 {
                        let Some(Some(message)) = own.next().now_or_never() else { break };
                        self.arrived(message).await;
                    }
                }
                Some(event) = self.event.recv() => {
                    if let Some(failed) = self.happened(event).await {
                        break Some(failed);
                    }
                }
                Some(message) = cancels.next() => self.cancelled(&message),
                Some(_) = rolls.next() => self.due.beat = now,
                Some(notice) = noticed.recv() => if let Some(failed) = self.noticed(notice) {
                    break Some(failed);
                },
                command = commands.recv(), if has_commander => {
                    has_commander = command.is_some();
                    self.commanded(command.unwrap_or(Command::GiveUp));
                }
                Some(provided) = finished(&mut self.providing) => drop(self.events.send(ServiceEvent::Provided(provided))),
                () = sleep_until(next.into()) => {}
            }
        };
        self.give_all_back().await;
        self.give_back_what_was_on_its_way(own).await;
        self.beat(true).await;
        let _ = timeout(Duration::from_secs(1), self.host.client.flush()).await;
        failed.map_or(Ok(self.served), Err)
    }

    fn is_connected(&self) -> bool {
        self.host.client.connection_state() == async_nats::connection::State::Connected
    }

    async fn say(&self, subject: impl ToSubject, payload: Bytes) {
        if self.is_connected() {
            let _ = timeout(PATIENCE, self.host.client.publish(subject, payload)).await;
        }
    }

    // The work that time brings.

    fn next_due(&self) -> Instant {
        let Due { beat, renewal, report, look } = self.due;
        let busy = [renewal, report, look].into_iter().filter(|_| !self.jobs.is_empty());
        let unreported = self.unreported.front().map(|(since, _)| *since + STILL_HELD);
        let killed = self.drains_until.flatten();
        busy.chain([beat]).chain(unreported).chain(killed).chain(self.pulls.until()).min().unwrap_or(beat)
    }

    /// Does what is due; why it cannot go on, if that is so.
    async fn tend(&mut self, now: Instant) -> Option<Error> {
        if now >= self.due.beat {
            self.due.beat = now + if self.jobs.is_empty() { IDLE_BEAT } else { BEAT };
            let is_leaving = self.drains_until.is_some();
            self.beat(is_leaving).await;
            if self.jobs.is_empty() {
                // What arrives puts the client's ping off. A timer of its own would wake an idle host as often again.
                self.say(self.names().of('h', self.host.id, "e"), Bytes::new()).await;
            }
            self.reconnected();
            self.say_stopped().await;
            if let Some(broken) = self.broken() {
                return Some(broken);
            }
        }
        if self.jobs.is_empty() {
            (self.due.renewal, self.due.report, self.due.look) = (now, now + BEAT, now + LOOK);
            self.unreported.clear();
            self.missing.clear();
            return None;
        }
        if now >= self.due.renewal {
            self.due.renewal = now + self.address.lease / 3;
            self.renew(now).await;
        }
        if now >= self.due.report {
            self.due.report = now + BEAT.min(self.address.lease / 3);
            let held = self.jobs.keys().copied().collect();
            self.report(held).await;
        }
        let mut reported = Vec::new();
        while self.unreported.front().is_some_and(|(since, _)| *since + STILL_HELD <= now)
            && let Some((_, key)) = self.unreported.pop_front()
        {
            reported.extend(Some(key).filter(|key| self.jobs.contains_key(key)));
        }
        if !reported.is_empty() {
            self.report(reported).await;
        }
        if now >= self.due.look {
            self.due.look = now + LOOK;
            self.look_for_the_dead();
        }
        None
    }

    fn broken(&self) -> Option<Error> {
        let why = self.host.pool.broken()?;
        Some(Error::other(format!("the pool that serves has no working worker: {why}")))
    }

    async fn beat(&self, is_leaving: bool) {
        let beat = Beat {
            host: self.host.id,
            build: self.names().build,
            pid: std::process::id(),
            hostname: self.hostname.clone(),
            name: self.host.name.clone(),
            slots: if is_leaving { 0 } else { self.host.pool.slots() as u32 },
            busy: self.busy as u32,
            tasks: self.served.items as u64,
            age: self.born.elapsed(),
            is_leaving,
        };
        self.say(self.names().all("beat"), beat.encode()).await;
    }

    /// Renews the leases, and finds out whether the server receives that.
    async fn renew(&mut self, now: Instant) {
        for job in self.jobs.values() {
            self.say_of(job, "+WPI").await;
        }
        let (client, names, events) = (self.host.client.clone(), self.names().clone(), self.events.clone());
        tokio::spawn(async move {
            if let Some(made) = stream::made(&client, &names).await {
                let _ = events.send(ServiceEvent::Made(made));
            }
        });
        self.next_echo += 1;
        self.echoes.push_back((self.next_echo, now));
        let echo = self.next_echo.to_le_bytes().to_vec();
        self.say(self.names().of('h', self.host.id, "e"), echo.into()).await;
    }

    /// Answers the stream for a message of it.
    async fn say_of(&self, job: &HeldJob, what: impl Into<Bytes>) {
        if !job.is_of_old_stream {
            self.say(job.reply.clone(), what.into()).await;
        }
    }

    /// The stream that is there now was made then. If it is another one, the messages that are here are looked for in it.
    fn found_stream(&mut self, made: String) {
        if self.made == made {
            return;
        }
        self.made.clone_from(&made);
        self.jobs.values_mut().for_each(|job| job.is_of_old_stream = true);
        let held: Vec<_> = self.jobs.iter().map(|(key, job)| (*key, job.delivery.sequence)).collect();
        let (host, events) = (self.host.clone(), self.events.clone());
        tokio::spawn(async move {
            let look = async |(key, sequence)| {
                if stream::has(&host.client, &host.names, sequence, key).await == Some(true) {
                    let _ = events.send(ServiceEvent::Found { made: made.clone(), key, sequence });
                }
            };
            futures_util::stream::iter(held).for_each_concurrent(MOST_LOOKED_FOR, look).await;
        });
    }

    fn found_message(&mut self, made: &str, key: (u64, u64), sequence: u64) {
        if let Some(job) = self.jobs.get_mut(&key).filter(|job| job.delivery.sequence == sequence)
            && self.made == made
        {
            job.is_of_old_stream = false;
        }
    }

    fn echoed(&mut self, message: &Arrived) {
        let number = message.payload.as_ref().try_into().map_or(0, u64::from_le_bytes);
        while self.echoes.front().is_some_and(|(echo, _)| *echo <= number)
            && let Some((_, sent)) = self.echoes.pop_front()
        {
            self.contact = self.contact.max(sent);
        }
    }

    /// A job held for longer than its lease without a word from the server belongs to another host.
    fn check_lease(&mut self, now: Instant) {
        if self.jobs.is_empty() || now.saturating_duration_since(self.contact) <= self.address.lease {
            return;
        }
        let lost = self.jobs.len();
        tracing::warn!(
            pool = self.names().pool,
            lost,
            "the cluster's server was not reached for a lease: what is held is stopped"
        );
        for (key, job) in self.jobs.drain() {
            job.task.abort();
            self.served.killed += job.items as usize;
            self.stopped.push(key);
        }
        self.busy = 0;
        self.echoes.clear();
    }

    /// Tells the submitters of stopped messages, before any of these is handed out again.
    async fn say_stopped(&mut self) {
        if self.is_connected() {
            for key in std::mem::take(&mut self.stopped) {
                self.say_given_back(key, true).await;
            }
        }
    }

    /// Reports to submitters which of their messages are held, and receives from them which they want no more.
    async fn report(&self, held: Vec<(u64, u64)>) {
        let mut by_submitter = HashMap::<u64, Vec<u64>>::new();
        held.into_iter().for_each(|(submitter, number)| by_submitter.entry(submitter).or_default().push(number));
        let mut parts = Vec::new();
        for (submitter, numbers) in by_submitter {
            parts.extend(numbers.chunks(MOST_REPORTED).map(|numbers| (submitter, numbers.to_vec())));
        }
        for (submitter, numbers) in parts {
            let held = HeldMessages { host: self.host.id, numbers };
            let reply = self.names().of('h', self.host.id, &format!("n.{submitter:016x}"));
            let subject = self.names().of('s', submitter, "h");
            if self.is_connected() {
                let _ = timeout(PATIENCE, self.host.client.publish_with_reply(subject, reply, held.encode())).await;
            }
        }
    }

    /// A submitter has answered a report, or the server has answered that it is gone.
    async fn heard_of(&mut self, submitter: u64, message: &Arrived) {
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            let now = Instant::now();
            let (since, last) = self.missing.entry(submitter).or_insert((now, now));
            // One that was missing for a moment, some time ago, is not missing since then.
            if now.saturating_duration_since(*last) > 2 * PATIENCE {
                *since = now;
            }
            *last = now;
            let since = *since;
            if since.elapsed() >= PATIENCE {
                self.forget_submitter(submitter).await;
            } else {
                self.due.report = self.due.report.min(Instant::now() + PATIENCE / 4);
            }
            return;
        }
        self.missing.remove(&submitter);
        self.host.has_heard(submitter);
        for number in Numbers::decode(&message.payload).map(|Numbers(numbers)| numbers).unwrap_or_default() {
            if let Some(job) = self.jobs.get(&(submitter, number)) {
                let _ = job.commands.send(JobCommand::Stop);
            }
        }
    }

    /// Stops the jobs of a dead submitter, and removes its messages.
    async fn forget_submitter(&mut self, submitter: u64) {
        self.missing.remove(&submitter);
        for ((_, _), job) in self.jobs.iter_mut().filter(|((of, _), _)| *of == submitter) {
            job.verdict = Some(Verdict::Orphaned);
            let _ = job.commands.send(JobCommand::Stop);
        }
        let (client, names) = (self.host.client.clone(), self.names().clone());
        tracing::info!(pool = names.pool, "a submitter of the cluster pool has died; what it asked for is removed");
        tokio::spawn(async move {
            for attempt in 1..5 {
                match stream::purge(&client, &names, submitter).await {
                    Ok(()) => break,
                    Err(_) => sleep(link::pause(attempt)).await,
                }
            }
        });
    }

    /// Looks whether submitters that have something in the stream are there, while nothing of theirs is at this host.
    fn look_for_the_dead(&mut self) {
        if std::mem::replace(&mut self.is_looking, true) {
            return;
        }
        let (host, events) = (self.host.clone(), self.events.clone());
        tokio::spawn(async move {
            let mut waiting = stream::submitters(&host.client, &host.names).await.unwrap_or_default();
            waiting.retain(|submitter| !host.heard_within(*submitter, LOOK));
            let check = async |submitter| {
                if is_dead(&host, submitter).await {
                    let _ = events.send(ServiceEvent::Dead(submitter));
                }
            };
            futures_util::stream::iter(waiting).for_each_concurrent(MOST_LOOKED_FOR, check).await;
            let _ = events.send(ServiceEvent::Looked);
        });
    }

    // The messages of others.

    async fn arrived(&mut self, message: Arrived) {
        let prefix = self.names().of('h', self.host.id, "");
        let Some(what) = message.subject.strip_prefix(prefix.as_str()).map(str::to_string) else {
            return self.delivered(message).await;
        };
        match what.as_str() {
            "in" => self.pull_ended(&message),
            "e" => self.echoed(&message),
            "p" => self.asked_for_piece(&message).await,
            _ => {
                let submitter = what.strip_prefix("n.").and_then(|id| u64::from_str_radix(id, 16).ok());
                if let Some(submitter) = submitter {
                    self.heard_of(submitter, &message).await;
                }
            }
        }
    }

    async fn asked_for_piece(&self, message: &Arrived) {
        let (Ok(piece), Some(reply)) = (Piece::decode(&message.payload), &message.reply) else { return };
        let whole = lock(&self.host.large).get_mut(&piece.key).map(|(whole, asked)| {
            *asked = Instant::now();
            whole.clone()
        });
        let whole = whole.unwrap_or_default();
        let place = pieces::place(&self.host.client, whole.len(), &piece);
        self.say(reply.clone(), whole.slice(place)).await;
    }

    /// The server has ended a request for messages.
    fn pull_ended(&mut self, message: &Arrived) {
        let headers = message.headers.as_ref();
        let left = headers
            .and_then(|headers| headers.get("Nats-Pending-Messages"))
            .and_then(|left| left.as_str().parse().ok());
        self.pulls.ended(left);
        let is_gone = match message.status {
            Some(StatusCode::NO_RESPONDERS) => true,
            Some(status) if status == StatusCode::REQUEST_TERMINATED => {
                let why = message.description.as_deref().unwrap_or_default();
                why.contains("Deleted") || why.contains("deleted")
            }
            _ => false,
        };
        if is_gone {
            self.pulls.forget();
            self.provide();
        }
    }

    /// A message of the stream, or what somebody else has sent here under any subject.
    async fn delivered(&mut self, message: Arrived) {
        self.pulls.arrived();
        let Some(reply) = message.reply.clone() else { return };
        let Some(delivery) = Delivery::read(&reply) else { return };
        self.say_stopped().await;
        if self.drains_until.is_some() {
            // It was on its way when there was no room for it any more.
            return self.give_back(&message.payload, &reply).await;
        }
        let tasks = match Tasks::decode(&message.payload) {
            Ok(tasks) => tasks,
            Err(why) => {
                self.complain(&why.to_string());
                return self.say(reply, "+TERM".into()).await;
            }
        };
        let key = (tasks.submitter, tasks.number);
        if self.jobs.is_empty() {
            // The server was there just now.
            self.contact = Instant::now();
            self.due.beat = self.due.beat.min(self.contact + BEAT);
            (self.due.renewal, self.due.report, self.due.look) =
                (self.contact + self.address.lease / 3, self.contact + BEAT, self.contact + LOOK);
        }
        if let Some(job) = self.jobs.get_mut(&key) {
            if delivery.sequence < job.delivery.sequence || job.is_of_old_stream {
                // The stream was made anew, and the old copy went with the old one.
                (job.delivery, job.reply, job.is_of_old_stream) = (delivery, reply, false);
                return;
            }
            if delivery.sequence > job.delivery.sequence {
                // The stream has it twice; one copy is enough.
                return self.say(reply, "+ACK".into()).await;
            }
            // It was handed out again though it is here: the lease is a new one.
            (job.delivery, job.reply) = (delivery, reply);
            return;
        }
        if !self.host.may_ask(key.0, self.address.lease * LATER) {
            // It may be there again: the answer to this tells.
            self.say_given_back(key, false).await;
            return self.say(reply, later(self.address.lease.min(PATIENCE)).into()).await;
        }
        self.begin(key, tasks, delivery, reply);
    }

    fn begin(&mut self, key: (u64, u64), tasks: Tasks, delivery: Delivery, reply: Subject) {
        let items = tasks.orders.iter().map(|order| u64::from(order.count)).sum();
        let (commands, received) = mpsc::unbounded_channel();
        let delivered = delivery.times;
        let job = Job { host: self.host.clone(), tasks, delivered, commands: received, cancelled: Vec::new() };
        let events = self.events.clone();
        let task = tokio::spawn(async move {
            let executed = |time| _ = events.send(ServiceEvent::Executed(key, time));
            let end = job.run(executed).await;
            let _ = events.send(ServiceEvent::Ended(key, end));
        });
        let (task, is_executed) = (task.abort_handle(), false);
        let (is_of_old_stream, verdict) = (false, None);
        let held = HeldJob { reply, delivery, is_of_old_stream, commands, task, is_executed, items, verdict };
        self.jobs.insert(key, held);
        self.busy += 1;
        self.unreported.push_back((Instant::now(), key));
    }

    /// Warns of bytes that are no message, once in a while.
    fn complain(&mut self, why: &str) {
        let now = Instant::now();
        if self.complained.is_none_or(|last| now - last >= QUIET) {
            self.complained = Some(now);
            tracing::warn!(pool = self.names().pool, why, "a message of the cluster pool that is no task was removed");
        }
    }

    fn cancelled(&mut self, message: &Arrived) {
        let Ok(Cancel { submitter, orders }) = Cancel::decode(&message.payload) else { return };
        for (number, place) in orders {
            if let Some(job) = self.jobs.get(&(submitter, number)) {
                let _ = job.commands.send(JobCommand::Cancel(place));
            }
        }
    }

    async fn happened(&mut self, event: ServiceEvent) -> Option<Error> {
        match event {
            ServiceEvent::Executed(key, time) => {
                self.pulls.learn(time);
                if let Some(job) = self.jobs.get_mut(&key).filter(|job| !job.is_executed) {
                    job.is_executed = true;
                    self.busy -= 1;
                }
                None
            }
            ServiceEvent::Ended(key, end) => self.ended(key, end).await,
            ServiceEvent::Provided(Ok(made)) => {
                self.found_stream(made);
                self.provisions = 0;
                self.pulls.forget();
                None
            }
            ServiceEvent::Provided(Err(Failure { error, is_final: true })) if !is_about_jetstream(&error) => {
                Some(error)
            }
            ServiceEvent::Provided(Err(_)) => {
                self.provide();
                None
            }
            ServiceEvent::Made(made) => {
                self.found_stream(made);
                None
            }
            ServiceEvent::Found { made, key, sequence } => {
                self.found_message(&made, key, sequence);
                None
            }
            ServiceEvent::Dead(submitter) => {
                self.forget_submitter(submitter).await;
                None
            }
            ServiceEvent::Looked => {
                self.is_looking = false;
                None
            }
        }
    }

    async fn ended(&mut self, key: (u64, u64), end: JobOutcome) -> Option<Error> {
        let job = self.jobs.remove(&key)?;
        tracing::trace!(number = key.1, items = job.items, ?end, "a message has come to its end here");
        self.busy -= usize::from(!job.is_executed);
        if job.verdict == Some(Verdict::Orphaned) {
            self.say_of(&job, "+TERM").await;
            return None;
        }
        match end {
            JobOutcome::Answered(items) => {
                self.served.items += items as usize;
                self.say_of(&job, "+ACK").await;
            }
            JobOutcome::Unwanted => self.say_of(&job, "+ACK").await,
            JobOutcome::Malformed(why) => {
                self.complain(&why);
                self.say_of(&job, "+TERM").await;
            }
            JobOutcome::Orphaned => {
                self.say_of(&job, "+TERM").await;
                self.forget_submitter(key.0).await;
            }
            JobOutcome::GivenBack { has_begun } => {
                self.say_given_back(key, has_begun).await;
                self.served.given_back += job.items as usize;
                self.say_of(&job, "-NAK").await;
            }
            JobOutcome::Later => {
                self.say_given_back(key, false).await;
                self.served.given_back += job.items as usize;
                self.say_of(&job, later(self.address.lease * LATER)).await;
            }
            JobOutcome::Closed { why, has_begun } => {
                self.say_given_back(key, has_begun).await;
                self.served.given_back += job.items as usize;
                self.say_of(&job, "-NAK").await;
                return Some(self.broken().unwrap_or_else(|| Error::closed("pool that serves").with_source(why)));
            }
        }
        None
    }

    /// Nobody was lost with it.
    async fn say_given_back(&self, (submitter, number): (u64, u64), has_begun: bool) {
        let held = HeldMessages { host: self.host.id, numbers: vec![number] };
        let subject = self.names().of('s', submitter, if has_begun { "k" } else { "b" });
        // Its answer shows that it is there.
        let reply = self.names().of('h', self.host.id, &format!("n.{submitter:016x}"));
        if self.is_connected() {
            let _ = timeout(PATIENCE, self.host.client.publish_with_reply(subject, reply, held.encode())).await;
        }
    }

    async fn give_back(&mut self, payload: &Bytes, reply: &Subject) {
        if let Ok(tasks) = Tasks::decode(payload) {
            self.say_given_back((tasks.submitter, tasks.number), false).await;
            self.served.given_back += tasks.orders.iter().map(|order| order.count as usize).sum::<usize>();
        }
        self.say(reply.clone(), "-NAK".into()).await;
    }

    fn noticed(&mut self, notice: Notice) -> Option<Error> {
        let pool = self.names().pool.clone();
        match notice {
            Notice::Connected => self.reconnected(),
            Notice::Disconnected => {}
            Notice::Refused(why) => {
                let text = format!("the server of the cluster pool {pool} takes this user no more: {why}");
                return Some(Error::new(ErrorKind::Unavailable, text));
            }
            Notice::Denied(why) => {
                let needed = [format!("\"mp.{pool}."), "MSG.NEXT".into(), "$JS.ACK".into()];
                if needed.iter().any(|subject| why.contains(subject.as_str())) {
                    return Some(denied(self.names(), &why));
                }
                tracing::warn!(pool, why, "the cluster's server does not let this user do something");
            }
        }
        None
    }

    /// If the connection is a new one, nothing that was asked for comes by it.
    fn reconnected(&mut self) {
        let connects = self.host.client.statistics().connects.load(Relaxed);
        if std::mem::replace(&mut self.connects, connects) != connects {
            self.pulls.forget();
            // A submitter may need longer than this host to connect again.
            self.missing.clear();
            self.provisions = 0;
            self.provide();
            (self.due.beat, self.due.renewal) = (Instant::now(), Instant::now());
        }
    }

    /// Sees to it that stream and consumer are there.
    fn provide(&mut self) {
        if self.providing.is_some() {
            return;
        }
        self.provisions += 1;
        let wait = if self.provisions > 1 { link::pause(self.provisions) } else { Duration::ZERO };
        let (host, address, target) = (self.host.clone(), self.address.clone(), self.target.clone());
        self.providing = Some(tokio::spawn(async move {
            sleep(wait).await;
            provide(&host.client, &address, &target, &host.names).await
        }));
    }

    async fn ask_for_more(&mut self, now: Instant) {
        // Also while it cannot ask: a request whose time is over would wake the service again at once.
        self.pulls.expire(now);
        if self.drains_until.is_some() || self.providing.is_some() || !self.is_connected() {
            return;
        }
        let wanted = self.pulls.wanted(self.host.pool.slots(), self.busy, now);
        if wanted == 0 {
            return;
        }
        let request = format!("{{\"batch\":{wanted},\"expires\":{}}}", EXPIRES.as_nanos());
        let reply = self.names().of('h', self.host.id, "in");
        let asked =
            timeout(PATIENCE, self.host.client.publish_with_reply(self.names().next(), reply, request.into())).await;
        if matches!(asked, Ok(Ok(()))) {
            self.pulls.asked(wanted, now);
        }
    }

    // How it ends.

    fn commanded(&mut self, command: Command) {
        let now = Instant::now();
        match command {
            Command::Drain(grace) => {
                self.drains_until = Some(now.checked_add(grace));
                self.jobs.values().for_each(|job| _ = job.commands.send(JobCommand::GiveBack));
            }
            Command::GiveUp => self.drains_until = Some(Some(now)),
        }
        self.due.beat = now;
    }

    /// Returns `true` if nothing is held any more, after a drain. What still runs when its grace is over is stopped.
    async fn has_drained(&mut self, now: Instant) -> bool {
        let Some(until) = self.drains_until else { return false };
        if until.is_some_and(|until| until <= now) && !self.jobs.is_empty() {
            self.drains_until = Some(None);
            let running =
                self.jobs.values().filter(|job| !job.is_executed).map(|job| job.items as usize).sum::<usize>();
            self.served.killed += running;
            self.jobs.values().for_each(|job| _ = job.commands.send(JobCommand::Kill));
        }
        self.jobs.is_empty()
    }

    /// It cannot go on: others may.
    async fn give_all_back(&mut self) {
        // Each knows whether it has begun.
        self.jobs.values().for_each(|job| _ = job.commands.send(JobCommand::Kill));
        let deadline = tokio::time::Instant::now() + GIVES_BACK;
        while !self.jobs.is_empty()
            && let Ok(Some(event)) = timeout_at(deadline, self.event.recv()).await
        {
            if let ServiceEvent::Ended(key, end) = event {
                let _ = self.ended(key, end).await;
            }
        }
        for (key, job) in std::mem::take(&mut self.jobs) {
            job.task.abort();
            self.say_given_back(key, true).await;
            self.say_of(&job, "-NAK").await;
        }
    }

    /// Messages that the server sent before it learnt that nothing is wanted any more. Nobody was lost with them.
    async fn give_back_what_was_on_its_way(&mut self, mut own: Subscriber) {
        if !self.is_connected() || own.drain().await.is_err() {
            return;
        }
        let deadline = tokio::time::Instant::now() + GIVES_BACK;
        while let Ok(Some(message)) = timeout_at(deadline, own.next()).await {
            if let Some(reply) = message.reply.as_ref().filter(|reply| Delivery::read(reply).is_some()) {
                self.give_back(&message.payload, reply).await;
            }
        }
    }
}

/// Gives a message back that is to be handed out again after `delay`.
fn later(delay: Duration) -> String {
    format!("-NAK {{\"delay\": {}}}", delay.as_nanos())
}

/// What the reply subject of a message says: `$JS.ACK.[domain.account.]stream.consumer.TIMES.SEQUENCE.number.stored...`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Delivery {
    /// How often it was delivered.
    times: u32,
    /// Its number in the stream.
    sequence: u64,
}

impl Delivery {
    /// Returns `None` if the message does not come from a stream.
    fn read(reply: &Subject) -> Option<Self> {
        let rest = reply.as_str().strip_prefix("$JS.ACK.")?;
        let tokens: Vec<_> = rest.split('.').collect();
        let at = if tokens.len() >= 9 { 4 } else { 2 };
        // As far as the time at which it was stored.
        tokens.get(at + 3)?;
        Some(Self { times: tokens.get(at)?.parse().ok()?, sequence: tokens.get(at + 1)?.parse().ok()? })
    }
}

/// Returns `true` if nobody answers for a submitter, now and after a while.
async fn is_dead(host: &Host, submitter: u64) -> bool {
    let subject = host.names.of('s', submitter, "q");
    for attempt in 0..2 {
        if attempt > 0 {
            sleep(PATIENCE).await;
        }
        // Of no message: the answer that it is not wanted is a sign of life.
        let ask = Ask { number: u64::MAX, host: host.id, delivered: 1 };
        let request = Request::new().payload(ask.encode()).timeout(Some(PATIENCE));
        match host.client.send_request(subject.clone(), request).await {
            Err(error) if error.kind() == RequestErrorKind::NoResponders => {}
            Ok(_) => {
                host.has_heard(submitter);
                return false;
            }
            Err(_) => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deliveries_are_read_from_either_form_of_a_reply_subject() {
        let read = |text: &str| Delivery::read(&text.into());
        let delivery = |times, sequence| Some(Delivery { times, sequence });
        assert_eq!(read("$JS.ACK.MP_p.build-1.3.17.18.1700000000000000000.0"), delivery(3, 17));
        assert_eq!(read("$JS.ACK.domain.hash.MP_p.build-1.2.17.18.17.0"), delivery(2, 17));
        assert_eq!(read("$JS.ACK.domain.hash.MP_p.build-1.2.17.18.17.0.token"), delivery(2, 17));
        assert_eq!(read("mp.p.s.1"), None);
        assert_eq!(read("$JS.ACK.x"), None);
        assert_eq!(read("$JS.ACK.MP_p.build-1.3.17"), None);
    }
}
