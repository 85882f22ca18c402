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
pub(crate) trait Host: Send + Sync {
    fn id(&self) -> Id;
    /// Where clients of this machine connect.
    fn connector(&self) -> &Arc<OwnedFd>;
    /// Takes a request; a call runs on another thread.
    fn take(&self, request: EncodedMessage) -> Result<()>;
}

static HOST: OnceLock<Box<dyn Host>> = OnceLock::new();
static CLIENT: OnceLock<Arc<ClientEnd>> = OnceLock::new();

pub(crate) fn set_host(host: impl Host + 'static) {
    let _ = HOST.set(Box::new(host));
}

/// The manager of this process, if it is one.
pub(crate) fn host() -> Option<&'static dyn Host> {
    HOST.get().map(|host| &**host)
}

thread_local! {
    /// The object that a call on this thread works on; 0 is none. Handles decoded here become part of it.
    pub(crate) static AT_WORK_ON: Cell<u64> = const { Cell::new(0) };
}

/// The end of handles.
pub(crate) struct ClientEnd {
    host: &'static dyn Host,
    answers: Mutex<VecDeque<EncodedMessage>>,
    changed: Changed,
}

impl ClientEnd {
    /// The one of this process, for the life of it.
    pub(crate) fn open(host: &'static dyn Host, changed: Changed) -> Arc<Self> {
        CLIENT.get_or_init(|| Arc::new(Self { host, answers: Mutex::default(), changed })).clone()
    }
}

impl Transport for ClientEnd {
    fn is_inside(&self) -> bool {
        true
    }

    fn send(&self, request: EncodedMessage) -> Result<bool> {
        self.host.take(request).map(|()| true)
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
