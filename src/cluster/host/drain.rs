//! How a service ends: it takes no more, and gives back what it has.

use super::deliveries::Delivery;
use super::{Service, ServiceEvent};
use crate::cluster::job::{JobCommand, PATIENCE};
use crate::cluster::serving::Command;
use async_nats::Subscriber;
use bytes::Bytes;
use futures_util::StreamExt;
use std::time::{Duration, Instant};
use tokio::time::timeout_at;

/// Within this all jobs report their progress.
const GIVES_BACK: Duration = Duration::from_millis(500);
/// So many messages may come at the end beside those that were asked for, and those that have come and were not read.
const SPARE: usize = 256;
/// So many more may be sent so that the server counts as many as this host.
const MOST_UNCOUNTED: u64 = 4096;

impl Service {
    pub(super) fn commanded(&mut self, command: Command) {
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
    pub(super) async fn has_drained(&mut self, now: Instant) -> bool {
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
    pub(super) async fn give_all_back(&mut self) {
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
    ///
    /// After its own `drain` the client forgets the subscription at its next step, and loses the messages that arrive later. So the subscription is to
    /// end after a number of messages, at the server as here, and empty ones to this host make up that number. If the server is far behind in it, as it
    /// counts anew after a reconnect, the last messages may be lost: submitters do not count that as the loss of a host.
    pub(super) async fn give_back_what_was_on_its_way(&mut self, mut own: Subscriber) {
        if !self.is_connected() {
            return;
        }
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let rest = self.pulls.outstanding() + SPARE;
        let ends = async {
            if self.uncounted > MOST_UNCOUNTED {
                return own.drain().await.is_ok();
            }
            let ends = own.unsubscribe_after(self.received + rest as u64).await.is_ok();
            for _ in 0..rest as u64 + self.uncounted {
                self.say(self.names().of('h', self.host.id, "z"), Bytes::new()).await;
            }
            ends
        };
        if !matches!(timeout_at(deadline, ends).await, Ok(true)) {
            return;
        }
        while let Ok(Some(message)) = timeout_at(deadline, own.next()).await {
            if let Some(reply) = message.reply.as_ref().filter(|reply| Delivery::read(reply).is_some()) {
                self.give_back(&message.payload, reply).await;
            }
        }
    }
}
