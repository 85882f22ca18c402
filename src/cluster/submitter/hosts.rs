//! What hosts say of themselves and of the messages that they hold, and the hosts that are lost.

use super::Session;
use super::sent::Sent;
use crate::cluster::messages::{Ask, Beat, HeldMessages, Message, Numbers, Wanted};
use crate::cluster::pieces;
use crate::error::{Error, ErrorKind, Topic};
use crate::os::sync::lock;
use crate::pool::Order;
use async_nats::Message as Arrived;
use std::time::{Duration, Instant};

/// After so long without a host of this build, hosts of others are worth a warning.
const NO_HOST: Duration = Duration::from_secs(2);

impl Session {
    pub(super) fn heard(&mut self, message: &Arrived) {
        self.is_heard();
        if let Ok(beat) = Beat::decode(&message.payload) {
            let now = Instant::now();
            self.departures += u64::from(beat.is_leaving && beat.build == self.names().build);
            let mut view = lock(&self.work.submitter.view);
            view.roster.heard(beat, now);
            view.roster.strike_out(now);
            let slots = view.roster.slots();
            drop(view);
            self.work.orders.set_capacity(slots);
        }
    }

    pub(super) fn warn_of_strangers(&mut self, strangers: usize, now: Instant) {
        if strangers == 0 || self.messages.is_empty() {
            (self.strangers_since, self.has_warned) = (None, false);
            return;
        }
        let since = *self.strangers_since.get_or_insert(now);
        if now - since >= NO_HOST && !std::mem::replace(&mut self.has_warned, true) {
            tracing::warn!(
                pool = self.names().pool,
                hosts = strangers,
                help = Topic::HostsOfAnotherBuild.name(),
                "all hosts of the cluster pool are of another build"
            );
        }
    }

    /// Fails what had to begin by now.
    pub(super) async fn expire(&mut self, now: Instant) {
        let is_due = |message: &Sent| message.holder.is_none() && message.start_by.is_some_and(|by| by <= now);
        let due: Vec<_> =
            self.messages.iter().filter(|(_, message)| is_due(message)).map(|(number, _)| *number).collect();
        for number in due {
            let strangers = lock(&self.work.submitter.view).roster.strangers();
            let order = self.messages[&number].orders.iter().flatten().next();
            let Some(error) = order.map(|order| order.not_begun()) else { continue };
            let with = |why: String| {
                let text = format!("{} ({why})", error.text());
                Error::new(error.kind(), text).explained_by(Topic::HostsOfAnotherBuild)
            };
            let error = match strangers {
                0 => error,
                1 => with("1 host serves this pool, of another build".into()),
                hosts => with(format!("{hosts} hosts serve this pool, all of another build")),
            };
            self.fail(number, &error).await;
        }
    }

    /// A message whose host has not been heard of for two leases was lost with it, though no other host asks for it.
    pub(super) async fn count_lost(&mut self, now: Instant) {
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
            if self.is_lost_too_often(number, losses) {
                self.fail_lost(number).await;
            } else if let Some(sent) = self.messages.get_mut(&number) {
                (sent.holder, sent.start_by) = (None, patience.and_then(|patience| now.checked_add(patience)));
            }
        }
    }

    /// Counts that a message was lost with hosts so often; returns `true` if that is too often.
    fn is_lost_too_often(&mut self, number: u64, losses: u32) -> bool {
        let Some(sent) = self.messages.get_mut(&number) else { return false };
        if losses > sent.losses {
            sent.losses = losses;
            let mut view = lock(&self.work.submitter.view);
            let lost = sent.holder.map_or_else(|| "a host that was lost at once".into(), |host| view.roster.name(host));
            sent.lost.push(lost);
            view.redelivered += u64::from(sent.items);
        }
        sent.losses > self.work.address.redeliver
    }

    /// Fails the items of a message that was lost too often; each order's error names its own.
    async fn fail_lost(&mut self, number: u64) {
        let Some(mut sent) = self.forget(number) else { return };
        let hosts = match sent.lost.len() {
            1 => "a host was".into(),
            count => format!("{count} hosts were"),
        };
        let names = sent.lost.join(", ");
        for order in sent.orders.iter_mut().filter_map(Option::take) {
            let text = format!("{}: {hosts} lost while at it: {names}", place_of(&order));
            order.fail_rest(&Error::new(ErrorKind::ProcessDied, text).explained_by(Topic::HostLost));
        }
        self.call_off(number, &sent).await;
    }

    /// A host asks whether it should begin.
    pub(super) async fn asked(&mut self, message: &Arrived) {
        let Ok(Ask { number, host, delivered }) = Ask::decode(&message.payload) else { return };
        let now = Instant::now();
        let no = Wanted { is_wanted: false, losses: 0, start_in: None };
        // Nor is one wanted that was published anew under another number.
        let Some(sent) = self.messages.get_mut(&number) else {
            return self.reply(message.reply.clone(), &no).await;
        };
        let is_reported = now.saturating_duration_since(sent.reported) < self.work.address.lease;
        if delivered == 1 && is_reported && is_elsewhere(sent, host) {
            // A second copy, published under the same id later than the stream knows duplicates.
            return self.reply(message.reply.clone(), &no).await;
        }
        let lost = delivered.saturating_sub(1).saturating_sub(sent.given_back);
        let mut losses = sent.losses_before.saturating_add(lost);
        // It was here before, was cut off, and is not lost.
        let was_cut_off = sent.holder == Some(host);
        // Nobody has told of that delivery, and a host has left since the last one. One of several servers learns that late: what it sends
        // to that host meanwhile nobody gets.
        let was_left = sent.holder.is_none() && sent.departures != self.departures;
        sent.departures = self.departures;
        let excused = match losses.saturating_sub(sent.losses) {
            more if was_cut_off => more,
            more => more.min(u32::from(was_left)),
        };
        sent.given_back = sent.given_back.saturating_add(excused);
        losses -= excused;
        tracing::trace!(
            number,
            host,
            delivered,
            given_back = sent.given_back,
            losses,
            known = sent.losses,
            "a host asks"
        );
        if lost > 0 && !(excused > 0 && was_left && losses <= sent.losses) {
            // It has begun, as far as anybody knows, and is tried again: as on this machine, it has no time to begin by any more.
            sent.start_by = None;
        }
        if self.is_lost_too_often(number, losses) {
            self.reply(message.reply.clone(), &no).await;
            return self.fail_lost(number).await;
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

    pub(super) async fn on_held_report(&mut self, message: &Arrived) {
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

    pub(super) async fn on_given_back(&mut self, message: &Arrived, has_begun: bool) {
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
}

/// The items of an order, as errors of a local pool name them.
fn place_of(order: &Order) -> String {
    let (first, label) = (order.first(), order.label());
    match u64::from(order.count()) {
        1 => format!("item {first} of {label}"),
        count => format!("items {first} to {} of {label}", first + count - 1),
    }
}

/// Whether another host than this one has a message. Its report may be of an earlier number, under which it is not in the stream any more:
/// then that is not known.
fn is_elsewhere(sent: &Sent, host: u64) -> bool {
    sent.earlier.is_empty() && sent.holder.is_some_and(|holder| holder != host)
}

/// How long a host may say nothing of a message that it has. Large answers that are on their way, or were so long ago, hold up the
/// words of all hosts, for as long as their pieces may need at most.
fn patience_with_hosts(lease: Duration, fetched: Option<Duration>) -> Duration {
    let held_up = fetched.filter(|ago| *ago < 2 * lease).map_or(Duration::ZERO, |_| pieces::PATIENCE);
    2 * lease + held_up
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_answers_give_hosts_more_time_and_not_for_ever() {
        let lease = Duration::from_secs(5);
        assert_eq!(patience_with_hosts(lease, None), 2 * lease);
        assert_eq!(patience_with_hosts(lease, Some(Duration::ZERO)), 2 * lease + pieces::PATIENCE);
        assert_eq!(patience_with_hosts(lease, Some(2 * lease)), 2 * lease);
    }
}
