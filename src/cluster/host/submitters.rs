//! What a host and the submitters say to each other about messages, and the submitters that are dead.

use super::{LOOK, MOST_LOOKED_FOR, Service, ServiceEvent, Verdict};
use crate::cluster::job::{Host, JobCommand, PATIENCE};
use crate::cluster::link;
use crate::cluster::messages::{Ask, Cancel, HeldMessages, Message, Numbers};
use crate::cluster::stream;
use async_nats::{Message as Arrived, Request, RequestErrorKind, StatusCode};
use futures_util::StreamExt;
use std::collections::HashMap;
use std::time::Instant;
use tokio::time::{sleep, timeout};

/// So many messages are named in one report, whatever size of message the server lets through.
const MOST_REPORTED: usize = 4096;

impl Service {
    /// Reports to submitters which of their messages are held, and receives from them which they want no more.
    pub(super) async fn report(&self, held: Vec<(u64, u64)>) {
        let mut by_submitter = HashMap::<u64, Vec<u64>>::new();
        held.into_iter().for_each(|(submitter, number)| by_submitter.entry(submitter).or_default().push(number));
        let mut parts = Vec::new();
        for (submitter, numbers) in by_submitter {
            parts.extend(numbers.chunks(MOST_REPORTED).map(|numbers| (submitter, numbers.to_vec())));
        }
        for (submitter, numbers) in parts {
            let held = HeldMessages { host: self.host.id, numbers };
            let reply = self.names().of('h', self.host.id, &format!("n.{submitter:016x}"));
            let subject = self.names().of('s', submitter, "h");
            if self.is_connected() {
                let _ = timeout(PATIENCE, self.host.client.publish_with_reply(subject, reply, held.encode())).await;
            }
        }
    }

    /// A submitter has answered a report, or the server has answered that it is gone.
    pub(super) async fn heard_of(&mut self, submitter: u64, message: &Arrived) {
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            let now = Instant::now();
            let (since, last) = self.missing.entry(submitter).or_insert((now, now));
            // One that was missing for a moment, some time ago, is not missing since then.
            if now.saturating_duration_since(*last) > 2 * PATIENCE {
                *since = now;
            }
            *last = now;
            let since = *since;
            if since.elapsed() >= PATIENCE {
                self.forget_submitter(submitter).await;
            } else {
                self.due.report = self.due.report.min(Instant::now() + PATIENCE / 4);
            }
            return;
        }
        self.missing.remove(&submitter);
        self.host.has_heard(submitter);
        for number in Numbers::decode(&message.payload).map(|Numbers(numbers)| numbers).unwrap_or_default() {
            if let Some(job) = self.jobs.get(&(submitter, number)) {
                let _ = job.commands.send(JobCommand::Stop);
            }
        }
    }

    /// Stops the jobs of a dead submitter, and removes its messages.
    pub(super) async fn forget_submitter(&mut self, submitter: u64) {
        self.missing.remove(&submitter);
        for ((_, _), job) in self.jobs.iter_mut().filter(|((of, _), _)| *of == submitter) {
            job.verdict = Some(Verdict::Orphaned);
            let _ = job.commands.send(JobCommand::Stop);
        }
        let (client, names) = (self.host.client.clone(), self.names().clone());
        tracing::info!(pool = names.pool, "a submitter of the cluster pool has died; what it asked for is removed");
        tokio::spawn(async move {
            for attempt in 1..5 {
                match stream::purge(&client, &names, submitter).await {
                    Ok(()) => break,
                    Err(_) => sleep(link::pause(attempt)).await,
                }
            }
        });
    }

    /// Looks whether submitters that have something in the stream are there, while nothing of theirs is at this host.
    pub(super) fn look_for_the_dead(&mut self) {
        if std::mem::replace(&mut self.is_looking, true) {
            return;
        }
        let (host, events) = (self.host.clone(), self.events.clone());
        tokio::spawn(async move {
            let mut waiting = stream::submitters(&host.client, &host.names).await.unwrap_or_default();
            waiting.retain(|submitter| !host.heard_within(*submitter, LOOK / 4));
            let check = async |submitter| {
                if is_dead(&host, submitter).await {
                    let _ = events.send(ServiceEvent::Dead(submitter));
                }
            };
            futures_util::stream::iter(waiting).for_each_concurrent(MOST_LOOKED_FOR, check).await;
            let _ = events.send(ServiceEvent::Looked);
        });
    }

    pub(super) fn cancelled(&mut self, message: &Arrived) {
        let Ok(Cancel { submitter, orders }) = Cancel::decode(&message.payload) else { return };
        for (number, place) in orders {
            if let Some(job) = self.jobs.get(&(submitter, number)) {
                let _ = job.commands.send(JobCommand::Cancel(place));
            }
        }
    }
}

/// Returns `true` if nobody answers for a submitter, now and after a while.
async fn is_dead(host: &Host, submitter: u64) -> bool {
    let subject = host.names.of('s', submitter, "q");
    let (mut was_missing, mut was_silent) = (false, false);
    loop {
        // Of no message: the answer that it is not wanted is a sign of life.
        let ask = Ask { number: u64::MAX, host: host.id, delivered: 1 };
        let request = Request::new().payload(ask.encode()).timeout(Some(PATIENCE));
        match host.client.send_request(subject.clone(), request).await {
            Err(error) if error.kind() == RequestErrorKind::NoResponders => {
                if std::mem::replace(&mut was_missing, true) {
                    return true;
                }
                sleep(PATIENCE).await;
            }
            Ok(_) => {
                host.has_heard(submitter);
                return false;
            }
            // It may have died before it answered.
            Err(_) if std::mem::replace(&mut was_silent, true) => return false,
            // The server may have been away, and the submitter be later in coming back than this host.
            Err(_) => was_missing = false,
        }
    }
}
