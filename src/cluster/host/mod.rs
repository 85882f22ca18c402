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

mod deliveries;
mod drain;
mod leases;
mod start;
mod submitters;

use super::address::{Address, Target};
use super::job::{Host, JobCommand, JobOutcome, PATIENCE};
use super::link::{self, Failure, Notice};
use super::messages::{Beat, Message};
use super::pulls::Pulls;
use super::roster::{BEAT, IDLE_BEAT};
use super::serving::{Command, Served};
use super::stream::Names;
use super::waiting::finished;
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::pool::Pool;
use async_nats::subject::ToSubject;
use async_nats::{Client, Message as Arrived, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use deliveries::Delivery;
use futures_util::{FutureExt, StreamExt};
use start::{Provision, denied, hostname, is_about_jetstream, provide, ready};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{sleep, sleep_until, timeout};

/// After this, a host reports the items that it still holds to their submitter.
const STILL_HELD: Duration = Duration::from_millis(50);
/// While the host is busy, silent submitters are looked for this often.
const LOOK: Duration = Duration::from_secs(2);
/// So many submitters, or messages, are looked for at a time.
const MOST_LOOKED_FOR: usize = 32;

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
    let (client, _in_use, made) = tokio::select! {
        ready = ready => ready?,
        // Nothing was taken.
        _ = commands.recv() => return Ok(Served::default()),
    };
    let id = link::new_id();
    let own = client.subscribe(names.of('h', id, ">")).await;
    let cancels = client.subscribe(names.all("c")).await;
    let rolls = client.subscribe(names.all("roll")).await;
    let (Ok(own), Ok(cancels), Ok(rolls)) = (own, cancels, rolls) else {
        let text = "the connection to the cluster's server has ended";
        return Err(Error::new(ErrorKind::Unavailable, text).explained_by(Topic::ClusterUnavailable));
    };
    Service::new(pool, (client, made), address, target, names, id).run(own, cancels, rolls, noticed, commands).await
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
    /// Its items have been executed. The answer still has to be confirmed.
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
    /// Messages that have come to this host's own subjects.
    received: u64,
    /// Those of them that the server does not count: what came by an earlier connection, and its own answers that nobody listens.
    uncounted: u64,
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
            received: 0,
            uncounted: 0,
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
        // Without a connection the client answers no flush.
        if self.is_connected() {
            let _ = timeout(Duration::from_secs(1), self.host.client.flush()).await;
        }
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

    fn next_due(&self) -> Instant {
        let Due { beat, renewal, report, look } = self.due;
        let busy = [renewal, report, look].into_iter().filter(|_| !self.jobs.is_empty());
        let unreported = self.unreported.front().map(|(since, _)| *since + STILL_HELD);
        let killed = self.drains_until.flatten();
        busy.chain([beat]).chain(unreported).chain(killed).chain(self.pulls.until()).min().unwrap_or(beat)
    }

    /// Does the work that is due. Returns an error if the host cannot go on.
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

    async fn arrived(&mut self, message: Arrived) {
        self.received += 1;
        self.uncounted += u64::from(message.status == Some(StatusCode::NO_RESPONDERS));
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

    fn noticed(&mut self, notice: Notice) -> Option<Error> {
        let pool = self.names().pool.clone();
        match notice {
            Notice::Connected => self.reconnected(),
            Notice::Disconnected => {}
            Notice::Refused(why) => {
                let text = format!("{} takes this user no more: {why}", link::server_of(&self.host.client, &pool));
                return Some(Error::new(ErrorKind::Unavailable, text).explained_by(Topic::ClusterRefused));
            }
            Notice::Denied(why) => {
                let needed = [format!("\"mp.{pool}."), "MSG.NEXT".into(), "$JS.ACK".into()];
                if needed.iter().any(|subject| why.contains(subject.as_str())) {
                    return Some(denied(&self.host.client, self.names(), &why));
                }
                let help = Topic::ClusterRefused.name();
                tracing::warn!(pool, why, help, "the cluster's server does not let this user do something");
            }
        }
        None
    }

    /// If the connection is a new one, nothing that was asked for comes by it.
    fn reconnected(&mut self) {
        let connects = self.host.client.statistics().connects.load(Relaxed);
        if std::mem::replace(&mut self.connects, connects) != connects {
            self.pulls.forget();
            self.uncounted = self.received;
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
            provide(&host.client, &address, &target, &host.names, true).await
        }));
    }
}
