//! The leases of the messages that are held: renewed, given up without a server, and void in a stream that was made anew.

use super::{HeldJob, MOST_LOOKED_FOR, Service, ServiceEvent};
use crate::cluster::{link, stream};
use crate::error::Topic;
use async_nats::Message as Arrived;
use bytes::Bytes;
use futures_util::StreamExt;
use std::time::Instant;
use tokio::time::sleep;

/// A question that nobody answers is asked so often.
const ATTEMPTS: usize = 5;

impl Service {
    /// Renews the leases, and finds out whether the server receives that.
    pub(super) async fn renew(&mut self, now: Instant) {
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
    pub(super) async fn say_of(&self, job: &HeldJob, what: impl Into<Bytes>) {
        if !job.is_of_old_stream {
            self.say(job.reply.clone(), what.into()).await;
        }
    }

    /// The stream that is there now was made then. If it is another one, the messages that are here are looked for in it.
    pub(super) fn found_stream(&mut self, made: String) {
        if self.made == made {
            return;
        }
        self.made.clone_from(&made);
        self.jobs.values_mut().for_each(|job| job.is_of_old_stream = true);
        let held: Vec<_> = self.jobs.iter().map(|(key, job)| (*key, job.delivery.sequence)).collect();
        let (host, events) = (self.host.clone(), self.events.clone());
        tokio::spawn(async move {
            let look = async |(key, sequence)| {
                let has = || stream::has(&host.client, &host.names, sequence, key);
                if until_answered(has).await == Some(true) {
                    let _ = events.send(ServiceEvent::Found { made: made.clone(), key, sequence });
                }
            };
            futures_util::stream::iter(held).for_each_concurrent(MOST_LOOKED_FOR, look).await;
        });
    }

    pub(super) fn found_message(&mut self, made: &str, key: (u64, u64), sequence: u64) {
        if let Some(job) = self.jobs.get_mut(&key).filter(|job| job.delivery.sequence == sequence)
            && self.made == made
        {
            job.is_of_old_stream = false;
        }
    }

    pub(super) fn echoed(&mut self, message: &Arrived) {
        let number = message.payload.as_ref().try_into().map_or(0, u64::from_le_bytes);
        while self.echoes.front().is_some_and(|(echo, _)| *echo <= number)
            && let Some((_, sent)) = self.echoes.pop_front()
        {
            self.contact = self.contact.max(sent);
        }
    }

    /// A job held for longer than its lease without a word from the server belongs to another host.
    pub(super) fn check_lease(&mut self, now: Instant) {
        if self.jobs.is_empty() || now.saturating_duration_since(self.contact) <= self.address.lease {
            return;
        }
        let lost = self.jobs.len();
        tracing::warn!(
            pool = self.names().pool,
            lost,
            help = Topic::ClusterUnavailable.name(),
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
    pub(super) async fn say_stopped(&mut self) {
        if self.is_connected() {
            for key in std::mem::take(&mut self.stopped) {
                self.say_given_back(key, true).await;
            }
        }
    }
}

/// Asks until there is an answer, a few times.
async fn until_answered<T, F: Future<Output = Option<T>>>(ask: impl Fn() -> F) -> Option<T> {
    for attempt in 1..ATTEMPTS {
        if let Some(answer) = ask().await {
            return Some(answer);
        }
        sleep(link::pause(attempt)).await;
    }
    ask().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[tokio::test]
    async fn a_question_that_nobody_answers_at_first_is_asked_again_and_not_for_ever() {
        let times = Cell::new(0);
        let answered_after = async |silent: usize| {
            times.set(0);
            let ask = || {
                times.set(times.get() + 1);
                std::future::ready((times.get() > silent).then_some(true))
            };
            (until_answered(ask).await, times.get())
        };
        assert_eq!(answered_after(0).await, (Some(true), 1));
        assert_eq!(answered_after(ATTEMPTS - 1).await, (Some(true), ATTEMPTS));
        assert_eq!(answered_after(ATTEMPTS).await, (None, ATTEMPTS));
    }
}
