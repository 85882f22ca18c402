//! What hosts hand in, and what they fetch: results, and pieces of large values.

use super::{Session, SessionEvent};
use crate::cluster::messages::{Answer, Body, Message, Part, Piece, Wanted};
use crate::cluster::pieces;
use crate::error::Topic;
use crate::os::sync::lock;
use crate::pool::{EncodedResults, Order};
use async_nats::Message as Arrived;
use bytes::Bytes;
use std::time::{Duration, Instant};

impl Session {
    pub(super) async fn answered(&mut self, message: Arrived) {
        let answer = match Answer::decode(&message.payload) {
            Ok(answer) => answer,
            Err(why) => return tracing::debug!(%why, "an answer that is none"),
        };
        let number = self.current(answer.number);
        if !self.messages.contains_key(&number) {
            lock(&self.work.submitter.view).duplicates += 1;
            return self.reply(message.reply, &confirmed(false)).await;
        }
        match &answer.body {
            Body::Here(bytes) => {
                let bytes = bytes.clone();
                self.settle(&answer, bytes).await;
                self.reply(message.reply, &confirmed(true)).await;
            }
            Body::There { key, len } => {
                let (key, len) = (*key, *len);
                // One that is on its way is confirmed where it was last asked for.
                if self.fetching.insert((answer.host, key), message.reply).is_none() {
                    let (client, subject) = (self.client.clone(), self.names().of('h', answer.host, "p"));
                    let events = self.events.clone();
                    tokio::spawn(async move {
                        let outcome = pieces::fetch(&client, &subject, key, len).await;
                        let _ = events.send(SessionEvent::Fetched { answer, outcome });
                    });
                }
            }
        }
    }

    pub(super) async fn settle(&mut self, answer: &Answer, bytes: Bytes) {
        let (number, now) = (self.current(answer.number), Instant::now());
        let Some(message) = self.messages.get_mut(&number) else { return };
        (message.holder, message.heard, message.reported) = (Some(answer.host), now, now);
        let mut rest = bytes;
        for Part { order, first, count, len } in &answer.parts {
            if *len > rest.len() as u64 {
                let help = Topic::ClusterGarbage.name();
                return tracing::warn!(help, "an answer whose parts are longer than itself");
            }
            // The last part takes the memory as it is, if nobody else has it.
            let records = match *len as usize {
                len if len == rest.len() => std::mem::take(&mut rest),
                len => rest.split_to(len),
            };
            if let Some(order) = message.orders.get_mut(*order as usize).and_then(Option::as_mut) {
                let results = EncodedResults { first: *first, count: *count, records: records.into() };
                if let Err(error) = order.settle(results) {
                    let help = Topic::ClusterGarbage.name();
                    tracing::warn!(%error, help, "an answer that fits no order");
                }
            }
        }
        for (order, time, items) in &answer.ran {
            let order = message.orders.get(*order as usize).and_then(Option::as_ref);
            order.into_iter().for_each(|order| order.ran(*time, *items));
        }
        if answer.is_last {
            let ran: Duration = answer.ran.iter().map(|(_, time, _)| *time).sum();
            let beyond = (now - message.since).saturating_sub(ran);
            let items = u64::from(message.items);
            // With it go its orders: each of their items is settled.
            self.forget(number);
            lock(&self.work.submitter.view).round_trip.add(beyond, items);
        }
    }

    pub(super) async fn asked_for_piece(&mut self, message: &Arrived) {
        let Ok(piece) = Piece::decode(&message.payload) else { return };
        let number = self.current(piece.key);
        let sent = self.messages.get_mut(&number);
        // A large value travels alone, or those that it travelled with are cancelled.
        let order = sent.and_then(|sent| sent.orders.iter_mut().flatten().next());
        let whole = order.map(Order::shared_records).unwrap_or_default();
        let bytes = whole.slice(pieces::place(&self.client, whole.len(), &piece));
        if let Some(reply) = &message.reply {
            self.say(reply.to_string(), bytes).await;
        }
    }
}

pub(super) fn confirmed(is_wanted: bool) -> Wanted {
    Wanted { is_wanted, losses: 0, start_in: None }
}
