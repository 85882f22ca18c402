//! Messages that nobody wants any more: hosts are told, and the stream is rid of them.

use super::sent::{Sent, State};
use super::{Session, SessionEvent};
use crate::cluster::link;
use crate::cluster::messages::{Cancel, Message};
use crate::cluster::stream;
use crate::error::Topic;
use std::collections::HashSet;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

/// So many orders are named in one message to all hosts, whatever size of message the server lets through.
const MOST_CANCELLED: usize = 2048;
/// A publish that was cancelled and is not acknowledged within this is looked for in the stream.
const SWEPT_AFTER: Duration = Duration::from_secs(5);

/// So long a message is to be deleted, also if there is no connection.
const DELETED_WITHIN: Duration = Duration::from_secs(20);

/// A message that the stream may have, though nobody wants it.
pub(super) struct Unwanted {
    /// Since it is unwanted, or was searched for last.
    since: Instant,
    /// It was searched for and not found. It may have been on its way, so it is searched for once more.
    was_missed: bool,
}

impl Unwanted {
    pub(super) fn new() -> Self {
        Self { since: Instant::now(), was_missed: false }
    }

    /// Notes a search, and whether it has found the message, if it came to its end. Returns `true` if there is no need for another.
    pub(super) fn is_over_after(&mut self, found: Option<bool>) -> bool {
        let is_over = found.is_some_and(|found| found || self.was_missed);
        (self.since, self.was_missed) = (Instant::now(), self.was_missed || found == Some(false));
        is_over
    }
}

impl Session {
    /// Takes a message off the table.
    pub(super) fn forget(&mut self, number: u64) -> Option<Sent> {
        let message = self.messages.remove(&number)?;
        message.orders.iter().flatten().for_each(|order| _ = self.places.remove(&order.id()));
        message.earlier.iter().for_each(|earlier| _ = self.aliases.remove(earlier));
        Some(message)
    }

    /// Nobody is to run a message that is off the table.
    pub(super) async fn call_off(&mut self, number: u64, message: &Sent) {
        let all = (0..message.orders.len() as u32).map(|order| (number, order));
        let earlier =
            message.earlier.iter().flat_map(|number| (0..message.orders.len() as u32).map(|order| (*number, order)));
        self.cancel(&all.chain(earlier).collect::<Vec<_>>()).await;
        match message.state {
            State::Stored(sequence) => self.delete(number, sequence),
            State::Unacknowledged { .. } => self.is_unwanted(number),
        }
    }

    pub(super) fn is_unwanted(&mut self, number: u64) {
        if self.may_delete.load(Relaxed) {
            self.unwanted.insert(number, Unwanted::new());
        }
    }

    pub(super) fn delete(&self, number: u64, sequence: u64) {
        let (client, names, id, events) = (self.client.clone(), self.names().clone(), self.id, self.events.clone());
        let (may_delete, in_use) = (self.may_delete.clone(), self.in_use.clone());
        tokio::spawn(async move {
            // The session may end before.
            let _in_use = in_use;
            let deleted = async {
                for attempt in 1.. {
                    if !may_delete.load(Relaxed)
                        || stream::delete(&client, &names, sequence, (id, number)).await.is_ok()
                    {
                        break;
                    }
                    sleep(link::pause(attempt)).await;
                }
            };
            // Without a connection the client may not even take the request.
            if timeout(DELETED_WITHIN, deleted).await.is_err() {
                let _ = events.send(SessionEvent::NotDeleted(number));
            }
        });
    }

    /// This user may not delete messages. Those that are cancelled stay in the stream until a host takes them and learns that.
    pub(super) fn may_not_delete(&mut self, why: &str) {
        if self.may_delete.swap(false, Relaxed) {
            let right = format!("$JS.API.STREAM.MSG.DELETE.{}", self.names().stream);
            tracing::warn!(
                pool = self.names().pool,
                right,
                why,
                help = Topic::ClusterRefused.name(),
                "this user has no right to publish to that subject: cancelled items stay in the stream until a host takes them"
            );
        }
        self.unwanted.clear();
    }

    /// Deletes what nobody wants and the stream may have, though it never said so.
    pub(super) fn sweep(&mut self, now: Instant) {
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

    /// Has all hosts stop orders, by their messages and their places in these.
    pub(super) async fn cancel(&self, orders: &[(u64, u32)]) {
        for orders in orders.chunks(MOST_CANCELLED) {
            let cancel = Cancel { submitter: self.id, orders: orders.to_vec() };
            self.say(self.names().all("c"), cancel.encode()).await;
        }
    }

    pub(super) async fn drop_cancelled(&mut self) {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_is_not_found_is_searched_for_once_more_as_it_may_have_been_on_its_way() {
        assert!(Unwanted::new().is_over_after(Some(true)));
        let mut late = Unwanted::new();
        let searches = [Some(false), None, Some(false)].map(|found| late.is_over_after(found));
        assert_eq!(searches, [false, false, true]);
    }
}
