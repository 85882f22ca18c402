//! The connection and the stream: whether they are there, whether the server answers, what this user may do.

use super::sent::{Sent, State};
use super::{Provided, Session, UNACKNOWLEDGED};
use crate::cluster::link::{self, Failure, Notice};
use crate::cluster::stream;
use crate::error::{Error, ErrorKind, Topic};
use crate::os::sync::lock;
use bytes::Bytes;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use tokio::time::sleep;

impl Session {
    /// The server, for errors.
    pub(super) fn server(&self) -> String {
        link::server_of(&self.client, &self.names().pool)
    }

    /// Sees to it that the stream is there.
    pub(super) fn provide(&mut self) {
        self.is_ready = false;
        let (client, address, target, names) =
            (self.client.clone(), self.work.address.clone(), self.work.target.clone(), self.work.names.clone());
        self.provisions += 1;
        let wait = if self.provisions > 1 { link::pause(self.provisions) } else { Duration::ZERO };
        let again = self.has_been_ready;
        self.provision = Some(tokio::spawn(async move {
            sleep(wait).await;
            stream::ensure_stream(&client, &address, &target, &names, again).await.map(drop)
        }));
    }

    pub(super) async fn provided(&mut self, provided: Provided) {
        match provided {
            Ok(()) => {
                (self.is_ready, self.has_been_ready) = (true, true);
                self.provisions = 0;
                if self.is_connected() {
                    self.work.outage.is_over();
                }
                self.publish_due(true).await;
            }
            Err(failure) => {
                self.work.outage.note(failure);
                self.provide();
            }
        }
    }

    /// Notes an outage, or its end. The client's event of that may be lost, or come before the connection's state has changed.
    pub(super) fn check_connection(&mut self) {
        self.reconnected();
        if !self.is_connected() {
            // A server that was silent before has been away since then.
            let since = self.silent_since.unwrap_or_else(Instant::now);
            self.work.outage.since.get_or_insert(since);
            self.work.outage.is_silence = false;
        }
    }

    pub(super) fn noticed(&mut self, notice: Notice) {
        match notice {
            Notice::Connected => self.reconnected(),
            // The task is awake, and looks for itself: this may be late, and belong to a connection before this one.
            Notice::Disconnected => {}
            Notice::Refused(_) if self.is_connected() => {}
            Notice::Refused(why) => {
                let text = format!("{} takes this user no more: {why}", self.server());
                self.work.outage.note(Failure::passing(text));
            }
            Notice::Denied(why) => self.denied(&why),
        }
    }

    /// If there has been another connection since, whatever was on its way may be gone, and the stream with it.
    pub(super) fn reconnected(&mut self) {
        let connects = self.client.statistics().connects.load(Relaxed);
        if std::mem::replace(&mut self.connects, connects) == connects {
            return;
        }
        let now = Instant::now();
        (self.arrived, self.silent_since, self.acknowledged, self.listens) = (now, None, now, now);
        self.work.outage.is_silence = false;
        // The user may have got the right meanwhile.
        self.may_delete.store(true, Relaxed);
        lock(&self.work.submitter.view).roster.excuse(now);
        let early = now.checked_sub(2 * self.work.address.lease).unwrap_or(now) + Duration::from_millis(300);
        for message in self.messages.values_mut() {
            message.heard = message.heard.min(early);
        }
        self.provisions = 0;
        self.provide();
    }

    /// The user of this connection may not do what a pool has to.
    fn denied(&mut self, why: &str) {
        if why.contains("MSG.DELETE") {
            return self.may_not_delete(why);
        }
        let needed = [format!("mp.{}.", self.names().pool), "$JS.API.STREAM".into()];
        if needed.iter().any(|subject| why.contains(subject.as_str())) {
            let text = format!("{} does not let this user submit: {why}", self.server());
            self.work.outage.note(Failure::lasting(text));
            if self.is_ready {
                // Perhaps somebody changes that.
                self.provisions += 1;
                self.provide();
            }
        }
    }

    /// Fails messages that the stream has not acknowledged for too long, nor any other meanwhile, though its server is there.
    pub(super) async fn fail_unanswered(&mut self, now: Instant) {
        let limit = silence(self.work.address.offline_timeout);
        let is_over = |since: Instant| now.saturating_duration_since(since.max(self.acknowledged)) >= limit;
        let is_unanswered = |message: &Sent| match message.state {
            State::Unacknowledged { silent_since, .. } => silent_since.is_some_and(is_over),
            State::Stored(_) => false,
        };
        if !self.is_ready || !self.is_connected() {
            return;
        }
        let numbers: Vec<_> =
            self.messages.iter().filter(|(_, message)| is_unanswered(message)).map(|(number, _)| *number).collect();
        for number in numbers {
            let pool = &self.names().pool;
            let text = format!("the stream of the cluster pool {pool} has not answered for {limit:?}");
            let error = Error::new(ErrorKind::Unavailable, text).explained_by(Topic::ClusterUnavailable);
            self.fail(number, &error).await;
        }
    }

    /// Something has arrived, so the server is there.
    pub(super) fn is_heard(&mut self) {
        (self.arrived, self.silent_since) = (Instant::now(), None);
        if self.work.outage.is_silence && self.is_connected() {
            self.work.outage.is_over();
        }
    }

    /// Has the server send an echo if it has said nothing for a while and something waits for it. One that sends none is away.
    pub(super) async fn ask_for_echo(&mut self, now: Instant) {
        let read = self.client.statistics().in_bytes.load(Relaxed);
        if std::mem::replace(&mut self.read, read) != read {
            self.is_heard();
        }
        let is_quiet = now.saturating_duration_since(self.arrived) >= UNACKNOWLEDGED;
        if !is_quiet || !self.is_connected() || self.messages.is_empty() && !self.work.outage.is_silence {
            return;
        }
        if let Some(since) = self.silent_since
            && now.saturating_duration_since(since) >= silence(self.work.address.offline_timeout)
        {
            self.work.outage.is_silent(since);
        }
        if self.silent_since.is_none() || now.saturating_duration_since(self.echo_asked) >= UNACKNOWLEDGED {
            self.silent_since.get_or_insert(now);
            self.echo_asked = now;
            self.say(self.names().of('s', self.id, "e"), Bytes::new()).await;
        }
    }

    /// The stream is asked again before its silence counts.
    pub(super) fn forgive_silence(&mut self) {
        (self.arrived, self.silent_since) = (Instant::now(), None);
        for message in self.messages.values_mut() {
            if let State::Unacknowledged { silent_since, .. } = &mut message.state {
                *silent_since = None;
            }
        }
    }
}

/// Whether this process was stopped, of which a look that comes so late tells. What the task has waited for the connection is no
/// stop.
pub(super) fn was_stopped(late: Duration, waited: Duration) -> bool {
    late.saturating_sub(waited) > UNACKNOWLEDGED
}

/// How long a server that is connected may answer nothing: twice as long as this process may be stopped unnoticed, or longer.
fn silence(offline_timeout: Duration) -> Duration {
    offline_timeout.max(2 * UNACKNOWLEDGED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::submitter::TICK;

    #[test]
    fn a_look_that_is_late_by_its_own_waits_is_no_stop_of_the_process() {
        let second = Duration::from_secs(1);
        assert!(was_stopped(3 * second, Duration::ZERO));
        assert!(!was_stopped(3 * second, 2 * second));
        assert!(was_stopped(6 * second, 2 * second));
        assert!(!was_stopped(second, Duration::ZERO));
    }

    /// Whatever the `offline_timeout`, zero and one of a second included.
    #[test]
    fn a_stop_of_the_process_that_goes_unnoticed_is_no_silence_of_the_server() {
        for tenths in 0..100 {
            let (stop, limit) = (UNACKNOWLEDGED, silence(Duration::from_millis(100 * tenths)));
            assert!(!was_stopped(stop, Duration::ZERO) && stop + TICK < limit, "{limit:?}");
        }
    }
}
