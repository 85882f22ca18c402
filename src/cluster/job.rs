//! One message at a host: asked about, fetched, executed by the local pool, answered.

use super::messages::{Answer, Ask, Body, Message, MessageOrder, Part, Tasks, Wanted};
use super::pieces::{self, Missing};
use super::stream::Names;
use super::waiting::at;
use crate::error::{Error, ErrorKind};
use crate::os::sync::lock;
use crate::pool::{EncodedItems, EncodedResults, EncodedRun, Pool};
use async_nats::{Client, Request, RequestErrorKind};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::sleep;

/// Results are sent after this, though others of their message are still to come.
const PARTIAL: Duration = Duration::from_millis(20);
/// A submitter that has been silent for so long has died; before, it may be about to connect again.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// A submitter that does not confirm an answer for so many leases is as good as dead; another host may try.
const MOST_SILENT_LEASES: u32 = 10;
/// An answer has no more parts than this: each has a head of so many bytes at most.
const MOST_PARTS: usize = 256;
const PART_HEAD: usize = 24;
/// Submitters that have been silent for so long are forgotten, once there are many.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);
const MANY_SUBMITTERS: usize = 1024;

/// The state that all jobs of a host share.
pub(super) struct Host {
    pub(super) client: Client,
    pub(super) pool: Pool,
    pub(super) names: Names,
    pub(super) id: u64,
    /// The name of the host in errors.
    pub(super) name: String,
    pub(super) lease: Duration,
    /// Results that are fetched in pieces, by their keys, and when a piece was last asked for.
    pub(super) large: Mutex<HashMap<u64, (Bytes, Instant)>>,
    pub(super) next_key: AtomicU64,
    /// When the last message of each submitter arrived.
    pub(super) heard: Mutex<HashMap<u64, Instant>>,
    /// Submitters that are connected and did not answer for a lease, and when one was last asked.
    pub(super) silent: Mutex<HashMap<u64, Instant>>,
}

impl Host {
    /// Returns `true` if a message of this submitter may be begun. Of one that does not answer, one message is each time after `pause`.
    pub(super) fn may_ask(&self, submitter: u64, pause: Duration) -> bool {
        let mut silent = lock(&self.silent);
        match silent.get_mut(&submitter) {
            Some(asked) if asked.elapsed() < pause => false,
            Some(asked) => {
                *asked = Instant::now();
                true
            }
            None => true,
        }
    }

    fn is_silent(&self, submitter: u64) {
        let mut silent = lock(&self.silent);
        if silent.len() >= MANY_SUBMITTERS {
            silent.retain(|_, asked| asked.elapsed() < FORGOTTEN_AFTER);
        }
        silent.insert(submitter, Instant::now());
    }

    pub(super) fn has_heard(&self, submitter: u64) {
        lock(&self.silent).remove(&submitter);
        let mut heard = lock(&self.heard);
        if heard.len() >= MANY_SUBMITTERS {
            heard.retain(|_, last| last.elapsed() < FORGOTTEN_AFTER);
        }
        heard.insert(submitter, Instant::now());
    }

    pub(super) fn heard_within(&self, submitter: u64, time: Duration) -> bool {
        lock(&self.heard).get(&submitter).is_some_and(|heard| heard.elapsed() < time)
    }
}

/// The next step of a job.
#[derive(Debug)]
pub(super) enum JobCommand {
    /// Nobody wants the order at this place of its message.
    Cancel(u32),
    /// Nobody wants the rest.
    Stop,
    /// It goes back to the stream, unless it has begun.
    GiveBack,
    /// It goes back to the stream, begun or not.
    Kill,
}

/// The outcome of a job.
#[derive(Debug, PartialEq)]
pub(super) enum JobOutcome {
    /// Answered, and the answer was confirmed: so many items.
    Answered(u64),
    /// Nobody wants it any more.
    Unwanted,
    /// It is not what it should be.
    Malformed(String),
    /// Its submitter is dead.
    Orphaned,
    /// It was not executed, or not all of it.
    GivenBack { has_begun: bool },
    /// To be handed out again, and not at once: its submitter is connected and has not answered for a lease, or its argument has not
    /// come in time.
    Later,
    /// The local pool takes nothing any more, or has ended what it had taken.
    Closed { why: String, has_begun: bool },
}

pub(super) struct Job {
    pub(super) host: Arc<Host>,
    pub(super) tasks: Tasks,
    pub(super) delivered: u32,
    pub(super) commands: UnboundedReceiver<JobCommand>,
    /// Places of orders that nobody wants.
    pub(super) cancelled: Vec<u32>,
}

/// An order at work.
struct ActiveOrder {
    place: u32,
    run: EncodedRun,
    items: u32,
}

impl Job {
    /// Does all of it; `executed` is called when the slots are free again.
    pub(super) async fn run(mut self, executed: impl Fn(Duration)) -> JobOutcome {
        let mut start_in = None;
        let is_known = self.host.heard_within(self.tasks.submitter, PATIENCE);
        if self.tasks.is_to_ask || self.delivered > 1 || !is_known {
            match self.ask().await {
                Ok(Wanted { is_wanted: true, losses, start_in: within }) => {
                    start_in = within;
                    self.tasks.orders.iter_mut().for_each(|order| order.attempt = order.attempt.saturating_add(losses));
                }
                Ok(_) => return JobOutcome::Unwanted,
                Err(end) => return end,
            }
        }
        let body = match self.body().await {
            Ok(body) => body,
            Err(end) => return end,
        };
        let mut runs = match self.start(&body, start_in) {
            Ok(runs) => runs,
            Err(end) => return end,
        };
        drop(body);
        self.execute(&mut runs, executed).await
    }

    fn subject(&self, what: &str) -> String {
        self.host.names.of('s', self.tasks.submitter, what)
    }

    /// Does something before the items begin, unless this job is called off meanwhile.
    async fn unless_called_off<T>(
        &mut self,
        this: impl Future<Output = Result<T, JobOutcome>>,
    ) -> Result<T, JobOutcome> {
        let mut this = std::pin::pin!(this);
        loop {
            tokio::select! {
                done = &mut this => return done,
                command = self.commands.recv() => match command {
                    Some(JobCommand::Cancel(place)) => {
                        self.cancelled.push(place);
                        if self.tasks.orders.iter().all(|order| self.cancelled.contains(&order.place)) {
                            return Err(JobOutcome::Unwanted);
                        }
                    }
                    Some(JobCommand::GiveBack | JobCommand::Kill) => return Err(JobOutcome::GivenBack { has_begun: false }),
                    Some(JobCommand::Stop) | None => return Err(JobOutcome::Unwanted),
                }
            }
        }
    }

    /// Asks the submitter whether the message is wanted, until it answers or is found to be dead.
    async fn ask(&mut self) -> Result<Wanted, JobOutcome> {
        let ask = Ask { number: self.tasks.number, host: self.host.id, delivered: self.delivered }.encode();
        let (subject, host, submitter) = (self.subject("q"), self.host.clone(), self.tasks.submitter);
        let asking = async {
            let patience = host.lease;
            let answered = ask_until_answered(host.clone(), submitter, subject, ask, PATIENCE, None, patience).await;
            answered.map_err(|end| match end {
                JobOutcome::GivenBack { .. } => {
                    host.is_silent(submitter);
                    JobOutcome::Later
                }
                end => end,
            })
        };
        let reply = self.unless_called_off(asking).await?;
        Wanted::decode(&reply).map_err(|why| JobOutcome::Malformed(why.to_string()))
    }

    async fn body(&mut self) -> Result<Bytes, JobOutcome> {
        let (key, len) = match &self.tasks.body {
            Body::Here(bytes) => return Ok(bytes.clone()),
            Body::There { key, len } => (*key, *len),
        };
        let (subject, client) = (self.subject("p"), self.host.client.clone());
        let fetching = async move { pieces::fetch(&client, &subject, key, len).await.map_err(without_argument) };
        self.unless_called_off(fetching).await
    }

    fn start(&self, body: &Bytes, start_in: Option<Duration>) -> Result<Vec<ActiveOrder>, JobOutcome> {
        let mut at = 0;
        let mut runs = Vec::new();
        for task in &self.tasks.orders {
            let MessageOrder { place, origin, first, count, attempt, limits, item_time, len, .. } = task.clone();
            // Their sum was compared with the length of the body.
            let records = body.slice(at.min(body.len())..(at + len as usize).min(body.len()));
            at += len as usize;
            if self.cancelled.contains(&place) {
                continue;
            }
            let items = EncodedItems {
                call: task.entry(),
                first,
                count,
                attempt,
                records,
                limits,
                item_time,
                start_in,
                origin,
            };
            match self.host.pool.run_encoded(items) {
                Ok(run) => runs.push(ActiveOrder { place, run, items: count }),
                Err(error) if error.kind() == ErrorKind::Decode => {
                    return Err(JobOutcome::Malformed(error.to_string()));
                }
                Err(error) => return Err(JobOutcome::Closed { why: error.to_string(), has_begun: false }),
            }
        }
        Ok(runs)
    }

    /// Executes the orders and answers them: all at once if they are over soon, else as they come.
    async fn execute(&mut self, runs: &mut Vec<ActiveOrder>, executed: impl Fn(Duration)) -> JobOutcome {
        let mut results = Results::default();
        let mut answering: Option<BoxFuture<'static, Result<u64, JobOutcome>>> = None;
        let (mut answered, mut has_last, mut was_told) = (0, false, false);
        let mut is_wanted = !runs.is_empty();
        loop {
            if runs.is_empty() && !std::mem::replace(&mut was_told, true) {
                executed(results.time);
            }
            if answering.is_none() {
                if has_last {
                    return JobOutcome::Answered(answered);
                }
                // A submitter that was answered in part waits for the last answer, though it is empty.
                if runs.is_empty() && !is_wanted && results.parts.is_empty() && answered == 0 {
                    return JobOutcome::Unwanted;
                }
                let is_due =
                    results.since.is_some_and(|since| since.elapsed() >= PARTIAL) || results.parts.len() >= MOST_PARTS;
                if runs.is_empty() || is_due {
                    let next = results.take();
                    has_last = runs.is_empty() && results.parts.is_empty();
                    answering = Some(self.answer(next, has_last));
                }
            }
            let due = results.since.map(|since| since + PARTIAL).filter(|_| answering.is_none());
            tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    Some(JobCommand::Cancel(place)) => {
                        runs.retain(|run| run.place != place);
                        is_wanted = !runs.is_empty() || !results.parts.is_empty() || answering.is_some();
                    }
                    // The submitter's reply to the last answer decides.
                    Some(JobCommand::GiveBack | JobCommand::Stop) if has_last => {}
                    Some(command @ (JobCommand::GiveBack | JobCommand::Kill)) => {
                        let has_results = !results.parts.is_empty() || answering.is_some() || answered > 0;
                        let has_begun = has_results || runs.iter().any(|run| run.run.has_begun());
                        if !has_begun || matches!(command, JobCommand::Kill) {
                            return JobOutcome::GivenBack { has_begun };
                        }
                    }
                    Some(JobCommand::Stop) | None => return JobOutcome::Unwanted,
                },
                done = async { answering.as_mut().expect("it is there").await }, if answering.is_some() => {
                    answering = None;
                    match done {
                        Ok(items) => answered += items,
                        Err(end) => return end,
                    }
                }
                (at, next) = next_of(runs), if !runs.is_empty() => match next {
                    Some(block) => match named(&self.host, block) {
                        Ok(block) => results.add(runs[at].place, block),
                        // Another host may execute them.
                        Err(why) => return JobOutcome::Closed { why, has_begun: true },
                    },
                    None => {
                        let ActiveOrder { place, run, items } = runs.swap_remove(at);
                        let time = run.item_time().unwrap_or_default() * items;
                        results.time += time;
                        results.ran.push((place, time, items));
                    }
                },
                () = at(due) => {}
            }
        }
    }

    /// Hands results to the submitter, until it confirms them; how many items those were.
    fn answer(&self, results: CollectedResults, is_last: bool) -> BoxFuture<'static, Result<u64, JobOutcome>> {
        let (host, submitter, subject) = (self.host.clone(), self.tasks.submitter, self.subject("r"));
        let number = self.tasks.number;
        Box::pin(async move {
            let CollectedResults { parts, ran, bytes } = results;
            let (items, len) = (parts.iter().map(|part| u64::from(part.count)).sum(), bytes.len() as u64);
            let heads = parts.len() * PART_HEAD + ran.len() * PART_HEAD;
            let is_large = bytes.len() + heads > pieces::most_inline(&host.client);
            let (large, body) = match is_large {
                true => {
                    let large = Large::keep(&host, bytes.into());
                    let key = large.key;
                    (Some(large), Body::There { key, len })
                }
                false => (None, Body::Here(bytes.into())),
            };
            let answer = Answer { number, host: host.id, is_last, parts, ran, body }.encode();
            // An answer that is fetched in pieces is confirmed later.
            let wait = PATIENCE + Duration::from_millis(len / 5_000);
            let key = large.as_ref().map(|large| large.key);
            let patience = host.lease * MOST_SILENT_LEASES;
            let reply = ask_until_answered(host.clone(), submitter, subject, answer, wait, key, patience).await?;
            match Wanted::decode(&reply) {
                Ok(Wanted { is_wanted: true, .. }) => Ok(items),
                Ok(_) => Err(JobOutcome::Unwanted),
                Err(why) => Err(JobOutcome::Malformed(why.to_string())),
            }
        })
    }
}

/// Asks a submitter something until it answers, is found to be dead, or was silent for `patience`. One that fetches the value `large`
/// is not silent.
async fn ask_until_answered(
    host: Arc<Host>,
    submitter: u64,
    subject: String,
    payload: Bytes,
    wait: Duration,
    large: Option<u64>,
    patience: Duration,
) -> Result<Bytes, JobOutcome> {
    let (began, mut nobody_since) = (Instant::now(), None::<Instant>);
    let last_piece = |host: &Host| large.and_then(|key| Some(lock(&host.large).get(&key)?.1));
    loop {
        let request = Request::new().payload(payload.clone()).timeout(Some(wait));
        match host.client.send_request(subject.clone(), request).await {
            Ok(reply) => {
                host.has_heard(submitter);
                return Ok(reply.payload);
            }
            Err(error) if error.kind() == RequestErrorKind::NoResponders => {
                if nobody_since.get_or_insert_with(Instant::now).elapsed() >= PATIENCE {
                    return Err(JobOutcome::Orphaned);
                }
                sleep(Duration::from_millis(250)).await;
            }
            Err(error) if error.kind() == RequestErrorKind::MaxPayloadExceeded => {
                return Err(JobOutcome::Malformed(error.to_string()));
            }
            Err(_) => {
                nobody_since = None;
                let heard = last_piece(&host).map_or(began, |piece| piece.max(began));
                if heard.elapsed() >= patience {
                    return Err(JobOutcome::GivenBack { has_begun: true });
                }
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// What becomes of a message whose argument has not come.
fn without_argument(missing: Missing) -> JobOutcome {
    match missing {
        Missing::Gone => JobOutcome::Unwanted,
        Missing::NoOwner => JobOutcome::Orphaned,
        // This host would be the next to try, by the same link.
        Missing::Late => JobOutcome::Later,
        Missing::NoMemory => JobOutcome::GivenBack { has_begun: false },
    }
}

/// The next results of any order, and of which.
async fn next_of(runs: &mut [ActiveOrder]) -> (usize, Option<EncodedResults>) {
    poll_fn(|cx: &mut Context<'_>| {
        for (at, run) in runs.iter_mut().enumerate() {
            if let Poll::Ready(next) = run.run.poll_next(cx) {
                return Poll::Ready((at, next));
            }
        }
        Poll::Pending
    })
    .await
}

/// Errors of what happened to an item, rather than of its own code, name the host. Fails if they are of the end of the local pool,
/// which is no concern of the submitter's.
fn named(host: &Host, results: EncodedResults) -> Result<EncodedResults, String> {
    let mut ended = None;
    let place = |error: Error| match error.kind() {
        // Its items are cancelled by dropping them, and then have no results.
        ErrorKind::Cancelled => {
            ended.get_or_insert_with(|| error.to_string());
            error
        }
        // So fail those that wait for a worker when none can be started.
        ErrorKind::Other if host.pool.broken().is_some() => {
            ended.get_or_insert_with(|| error.to_string());
            error
        }
        ErrorKind::ProcessDied
        | ErrorKind::MemoryLimit
        | ErrorKind::Timeout
        | ErrorKind::Panicked
        | ErrorKind::Decode
        | ErrorKind::Encode => error.on_host(&host.name),
        _ => error,
    };
    let results = results.map_errors(place);
    ended.map_or(Ok(results), Err)
}

/// A large answer that is kept until it is confirmed.
struct Large {
    host: Arc<Host>,
    key: u64,
}

impl Large {
    fn keep(host: &Arc<Host>, bytes: Bytes) -> Self {
        let key = host.next_key.fetch_add(1, Relaxed);
        lock(&host.large).insert(key, (bytes, Instant::now()));
        Self { host: host.clone(), key }
    }
}

impl Drop for Large {
    fn drop(&mut self) {
        lock(&self.host.large).remove(&self.key);
    }
}

/// Results that were not sent yet.
#[derive(Default)]
struct Results {
    parts: Vec<Part>,
    ran: Vec<(u32, Duration, u32)>,
    bytes: Vec<u8>,
    since: Option<Instant>,
    /// How long items have kept slots in all.
    time: Duration,
}

struct CollectedResults {
    parts: Vec<Part>,
    ran: Vec<(u32, Duration, u32)>,
    bytes: Vec<u8>,
}

impl Results {
    fn add(&mut self, order: u32, results: EncodedResults) {
        let EncodedResults { first, count, records } = results;
        self.since.get_or_insert_with(Instant::now);
        self.parts.push(Part { order, first, count, len: records.len() as u64 });
        match self.bytes.is_empty() {
            true => self.bytes = records,
            false => self.bytes.extend_from_slice(&records),
        }
    }

    /// The next of them: as many as one answer has.
    fn take(&mut self) -> CollectedResults {
        let rest = self.parts.split_off(self.parts.len().min(MOST_PARTS));
        let parts = std::mem::replace(&mut self.parts, rest);
        let len = parts.iter().map(|part| part.len as usize).sum();
        let rest = self.bytes.split_off(len);
        self.since = self.since.filter(|_| !self.parts.is_empty());
        CollectedResults { parts, ran: std::mem::take(&mut self.ran), bytes: std::mem::replace(&mut self.bytes, rest) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_whose_argument_is_late_is_not_handed_out_again_at_once() {
        assert_eq!(without_argument(Missing::Late), JobOutcome::Later);
        assert_eq!(without_argument(Missing::NoMemory), JobOutcome::GivenBack { has_begun: false });
        assert_eq!(without_argument(Missing::NoOwner), JobOutcome::Orphaned);
        assert_eq!(without_argument(Missing::Gone), JobOutcome::Unwanted);
    }
}
