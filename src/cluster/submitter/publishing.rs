//! Orders on their way out: taken, put together into messages, published until the stream has them.

use super::sent::{Sent, State};
use super::{Session, TOGETHER_FOR, UNACKNOWLEDGED};
use crate::cluster::link;
use crate::cluster::messages::{Body, Message, MessageOrder, Tasks};
use crate::cluster::pieces;
use crate::cluster::stream::Stored;
use crate::error::{Error, ErrorKind, Topic};
use crate::os::sync::lock;
use crate::pool::Order;
use async_nats::client::{PublishError, PublishErrorKind};
use async_nats::{HeaderMap, Message as Arrived, StatusCode};
use bytes::Bytes;
use std::time::{Duration, Instant};

/// Messages that are out at the same time, if there are few slots.
const FEW_OUT: usize = 64;
/// Calls that are over within this may travel together.
const QUICK: Duration = Duration::from_millis(1);
/// So much work of them at most.
const TOGETHER: Duration = Duration::from_millis(2);
const MOST_TOGETHER: usize = 256;
/// Bytes of a message beside the arguments of an order.
const ORDER_HEAD: usize = 160;

impl Session {
    pub(super) fn may_send(&self) -> bool {
        self.is_ready && !self.is_full && !self.is_jammed() && self.is_connected()
    }

    pub(super) async fn take_orders(&mut self) {
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

    pub(super) async fn send(&mut self, orders: Vec<Order>) {
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
            departures: self.departures,
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
    pub(super) fn encode(&self, number: u64) -> Option<Bytes> {
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
        // Pieces are of one order.
        let body = match len <= self.most_inline() || orders.clone().nth(1).is_some() {
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
    pub(super) async fn publish(&mut self, number: u64) {
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
            self.refused_as_too_large(number, &error).await;
        }
    }

    /// The server lets less through than before. Orders that travelled together go on alone.
    async fn refused_as_too_large(&mut self, number: u64, error: &PublishError) {
        if self.messages.get(&number).is_none_or(|sent| sent.orders.iter().flatten().nth(1).is_none()) {
            let text = format!("{} lets less through than before: {error}", self.server());
            return self.fail(number, &Error::new(ErrorKind::Unavailable, text)).await;
        }
        let Some(sent) = self.forget(number) else { return };
        // It may be in the stream.
        self.call_off(number, &sent).await;
        for order in sent.orders.into_iter().flatten() {
            let number = self.next_number;
            Box::pin(self.send(vec![order])).await;
            // Hosts that were lost with all of them were lost with each.
            if let Some(alone) = self.messages.get_mut(&number) {
                (alone.lost, alone.losses, alone.losses_before) = (sent.lost.clone(), sent.losses, sent.losses);
            }
        }
    }

    /// Publishes messages again that were not acknowledged in time, or all such at once if the connection or the stream is new (`is_new`).
    pub(super) async fn publish_due(&mut self, is_new: bool) {
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
    pub(super) async fn acknowledged(&mut self, number: u64, message: &Arrived) {
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
                    let error = Error::new(ErrorKind::Unavailable, text).explained_by(Topic::ClusterUnavailable);
                    self.fail(number, &error).await;
                }
            }
        }
    }
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
    Some(Error::new(ErrorKind::Encode, text).explained_by(Topic::CannotCrossHosts))
}
