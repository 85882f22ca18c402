//! Why nothing can be had of the servers now, and since when.

use crate::cluster::link::Failure;
use crate::error::{Error, ErrorKind, Topic};
use std::time::{Duration, Instant};

/// Why nothing can be had of the servers now.
pub(super) struct Outage {
    /// Since when there has been no connection, or no stream.
    pub(super) since: Option<Instant>,
    pub(super) why: Option<Error>,
    /// One that does not pass by itself.
    pub(super) lasting: Option<Error>,
    /// The server is connected and answers nothing. Its next word ends that.
    pub(super) is_silence: bool,
}

impl Outage {
    pub(super) fn note(&mut self, failure: Failure) {
        self.is_silence = false;
        self.since.get_or_insert_with(Instant::now);
        if failure.is_final {
            let help = Topic::ClusterRefused.name();
            tracing::error!(error = %failure.error, help, "a cluster pool cannot work");
            self.lasting = Some(failure.error);
        } else {
            tracing::debug!(error = %failure.error, "a cluster pool waits");
            self.why = Some(failure.error);
        }
    }

    /// The server has been silent since then, which is no less than being away.
    pub(super) fn is_silent(&mut self, since: Instant) {
        if self.since.is_none() {
            self.since = Some(since);
            self.is_silence = true;
            self.why = Some(Error::new(ErrorKind::Unavailable, "it is connected and has not answered"));
        }
    }

    pub(super) fn is_over(&mut self) {
        *self = Self { since: None, why: None, lasting: None, is_silence: false };
    }

    /// Returns the error for all calls, if the outage has lasted for too long, or will.
    pub(super) fn error(&self, pool: &str, limit: Duration) -> Option<Error> {
        if let Some(error) = &self.lasting {
            return Some(Error::copy(error));
        }
        let lasted = self.since.map(|since| since.elapsed()).filter(|lasted| *lasted >= limit)?;
        let why = self.why.as_ref().map_or_else(String::new, |why| format!(": {why}"));
        let text = format!("the servers of the cluster pool {pool} have not been there for {lasted:.1?}{why}");
        Some(Error::new(ErrorKind::Unavailable, text).explained_by(Topic::ClusterUnavailable))
    }

    pub(super) fn until(&self, limit: Duration) -> Option<Instant> {
        self.since?.checked_add(limit)
    }
}
