//! The transport within a manager's own process: requests are calls, answers lie in a list.

use super::greeting::Id;
use super::transport::{Changed, Transport};
use crate::error::Result;
use crate::os::sync::lock;
use crate::wire::EncodedMessage;
use std::cell::Cell;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock};

/// The manager of this process, as handles inside of it reach it.
pub(crate) struct Host {
    pub(crate) id: Id,
    /// Where clients of this machine connect.
    pub(crate) connector: Arc<OwnedFd>,
    /// Takes a request; a call runs on another thread.
    pub(crate) take: Box<dyn Fn(EncodedMessage) -> Result<()> + Send + Sync>,
}

pub(crate) static HOST: OnceLock<Host> = OnceLock::new();
static CLIENT: OnceLock<Arc<ClientEnd>> = OnceLock::new();

thread_local! {
    /// The object that a call on this thread works on; 0 is none. Handles decoded here become part of it.
    pub(crate) static AT_WORK_ON: Cell<u64> = const { Cell::new(0) };
}

/// The end of handles.
pub(crate) struct ClientEnd {
    host: &'static Host,
    answers: Mutex<VecDeque<EncodedMessage>>,
    changed: Changed,
}

impl ClientEnd {
    /// The one of this process, for the life of it.
    pub(crate) fn open(host: &'static Host, changed: Changed) -> Arc<Self> {
        CLIENT.get_or_init(|| Arc::new(Self { host, answers: Mutex::default(), changed })).clone()
    }
}

impl Transport for ClientEnd {
    fn is_inside(&self) -> bool {
        true
    }

    fn send(&self, request: EncodedMessage) -> Result<bool> {
        (self.host.take)(request).map(|()| true)
    }

    fn recv(&self) -> Option<Result<EncodedMessage>> {
        lock(&self.answers).pop_front().map(Ok)
    }
}

/// The manager's end. Requests do not come by it: see [`Host::take`].
pub(crate) struct ServerEnd;

impl Transport for ServerEnd {
    fn is_inside(&self) -> bool {
        true
    }

    fn send(&self, answer: EncodedMessage) -> Result<bool> {
        if let Some(client) = CLIENT.get() {
            lock(&client.answers).push_back(answer);
            (client.changed)();
        }
        Ok(true)
    }
}
