//! Messages of which nothing was heard for long: looked for in the stream, and published anew if it has lost them.

use super::sent::State;
use super::{Session, SessionEvent};
use crate::cluster::stream;
use crate::error::Topic;
use crate::os::sync::lock;
use std::time::Instant;

impl Session {
    /// Looks for messages that have not been reported for two leases.
    pub(super) fn seek(&mut self, now: Instant) {
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

    pub(super) async fn sought(&mut self, number: u64, is_there: Option<bool>) {
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
                    let (pool, help) = (&self.names().pool, Topic::ClusterMessageLost.name());
                    tracing::warn!(pool, help, "a message that waits is not handed out; it is published again");
                    self.publish_anew(number).await;
                }
            }
            Some(false) => {
                let (pool, help) = (&self.names().pool, Topic::ClusterMessageLost.name());
                tracing::warn!(pool, help, "the stream has lost a message; it is published again");
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
        (sent.state, sent.heard, sent.departures) = (State::unacknowledged(now), now, self.departures);
        (sent.holder, sent.given_back, sent.ignored, sent.losses_before) = (None, 0, 0, sent.losses);
        self.messages.insert(new, sent);
        self.publish(new).await;
    }
}
