//! Messages of the stream: asked for, begun, ended, given back.

use super::{HeldJob, LOOK, Service, ServiceEvent, Verdict};
use crate::cluster::job::{Job, JobOutcome, PATIENCE};
use crate::cluster::messages::{HeldMessages, Message, Piece, Tasks};
use crate::cluster::pieces;
use crate::cluster::pulls::EXPIRES;
use crate::cluster::roster::BEAT;
use crate::error::{Error, Topic};
use crate::os::sync::lock;
use async_nats::{Message as Arrived, StatusCode, Subject};
use bytes::Bytes;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// A message whose submitter does not answer is handed out again after so many leases.
const LATER: u32 = 2;
/// Malformed messages are logged this often at most.
const QUIET: Duration = Duration::from_secs(1);

/// What the reply subject of a message says: `$JS.ACK.[domain.account.]stream.consumer.TIMES.SEQUENCE.number.stored...`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Delivery {
    /// How often it was delivered.
    times: u32,
    /// Its number in the stream.
    pub(super) sequence: u64,
}

impl Delivery {
    /// Returns `None` if the message does not come from a stream.
    pub(super) fn read(reply: &Subject) -> Option<Self> {
        let rest = reply.as_str().strip_prefix("$JS.ACK.")?;
        let tokens: Vec<_> = rest.split('.').collect();
        let at = if tokens.len() >= 9 { 4 } else { 2 };
        // As far as the time at which it was stored.
        tokens.get(at + 3)?;
        Some(Self { times: tokens.get(at)?.parse().ok()?, sequence: tokens.get(at + 1)?.parse().ok()? })
    }
}

impl Service {
    pub(super) async fn asked_for_piece(&self, message: &Arrived) {
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
    pub(super) fn pull_ended(&mut self, message: &Arrived) {
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
    pub(super) async fn delivered(&mut self, message: Arrived) {
        self.pulls.arrived();
        let Some(reply) = message.reply.clone() else { return };
        let Some(delivery) = Delivery::read(&reply) else { return };
        self.say_stopped().await;
        let tasks = match Tasks::decode(&message.payload) {
            Ok(tasks) => tasks,
            Err(why) => {
                self.complain(&why.to_string());
                return self.say(reply, "+TERM".into()).await;
            }
        };
        let key = (tasks.submitter, tasks.number);
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
            // It was handed out again though it is here: the lease is a new one, and nobody was lost.
            let is_again = delivery.times > job.delivery.times;
            (job.delivery, job.reply) = (delivery, reply);
            if is_again {
                // It has begun here, and goes on.
                self.say_given_back(key, true).await;
                self.report(vec![key]).await;
            }
            return;
        }
        if self.drains_until.is_some() {
            // It was on its way when there was no room for it any more.
            return self.give_back(&message.payload, &reply).await;
        }
        if self.jobs.is_empty() {
            // The server was there just now.
            self.contact = Instant::now();
            self.due.beat = self.due.beat.min(self.contact + BEAT);
            (self.due.renewal, self.due.report, self.due.look) =
                (self.contact + self.address.lease / 3, self.contact + BEAT, self.contact + LOOK);
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
            let (pool, help) = (&self.names().pool, Topic::ClusterGarbage.name());
            tracing::warn!(pool, why, help, "a message of the cluster pool that is no task was removed");
        }
    }

    pub(super) async fn ended(&mut self, key: (u64, u64), end: JobOutcome) -> Option<Error> {
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
    pub(super) async fn say_given_back(&self, (submitter, number): (u64, u64), has_begun: bool) {
        let held = HeldMessages { host: self.host.id, numbers: vec![number] };
        let subject = self.names().of('s', submitter, if has_begun { "k" } else { "b" });
        // Its answer shows that it is there.
        let reply = self.names().of('h', self.host.id, &format!("n.{submitter:016x}"));
        if self.is_connected() {
            let _ = timeout(PATIENCE, self.host.client.publish_with_reply(subject, reply, held.encode())).await;
        }
    }

    pub(super) async fn give_back(&mut self, payload: &Bytes, reply: &Subject) {
        if let Ok(tasks) = Tasks::decode(payload) {
            self.say_given_back((tasks.submitter, tasks.number), false).await;
            self.served.given_back += tasks.orders.iter().map(|order| order.count as usize).sum::<usize>();
        }
        self.say(reply.clone(), "-NAK".into()).await;
    }

    pub(super) async fn ask_for_more(&mut self, now: Instant) {
        self.reconnected();
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
}

/// Gives a message back that is to be handed out again after `delay`.
fn later(delay: Duration) -> String {
    format!("-NAK {{\"delay\": {}}}", delay.as_nanos())
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
