//! The manager of this very process, as handles inside of it reach it.

use super::greeting::Id;
use super::messages::made_in;
use crate::error::Result;
use crate::wire::EncodedMessage;
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use tokio::sync::oneshot;

/// Who gave a lease and its number there.
pub(crate) type Lease = (u64, u64);

/// What a manager does for its own process.
pub(crate) trait Local: Send + Sync {
    fn id(&self) -> Id;
    /// The clients' end of its intake.
    fn door(&self) -> &Arc<OwnedFd>;
    /// Runs a call, on another thread.
    fn submit(&self, call: EncodedMessage) -> Result<oneshot::Receiver<Unread>>;
    /// One more handle inside `owner`.
    fn hold_inside(&self, owner: u64, object: u64);
    /// One handle inside `owner` less.
    fn release_inside(&self, owner: u64, object: u64);
    /// One holder outside less.
    fn release(&self, object: u64);
    /// A lease that ends when the other end of `reader` is closed everywhere.
    fn open_lease(&self, reader: OwnedFd) -> Lease;
    fn lease(&self, lease: Lease, object: u64);
}

static LOCAL: OnceLock<Box<dyn Local>> = OnceLock::new();

pub(crate) fn set(local: impl Local + 'static) {
    let _ = LOCAL.set(Box::new(local));
}

/// The manager of this process, if it is one.
pub(crate) fn get() -> Option<&'static dyn Local> {
    LOCAL.get().map(|local| &**local)
}

thread_local! {
    /// The object that a call on this thread works on; 0 is none.
    pub(crate) static AT_WORK_ON: Cell<u64> = const { Cell::new(0) };
}

/// The object that handles decoded on this thread become part of.
pub(crate) fn owner_of_new_handles() -> u64 {
    AT_WORK_ON.get()
}

/// An answer for a task of this process. Dropped unread, the object that it made goes.
pub(crate) struct Unread(Option<EncodedMessage>);

impl Unread {
    pub(crate) fn new(answer: EncodedMessage) -> Self {
        Self(Some(answer))
    }

    pub(crate) fn read(mut self) -> Option<EncodedMessage> {
        self.0.take()
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let made = self.0.take().and_then(|answer| made_in(answer.bytes()));
        if let (Some(local), Some(object)) = (get(), made) {
            local.release(object);
        }
    }
}
