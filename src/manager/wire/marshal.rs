//! Handle marshalling: between a client and a manager a handle travels as a reference, which their connection counts.
//!
//! A message lists the references in it, whatever carries it. One that leaves the manager is held by the connection from then on;
//! a client lets go of those that it does not take. One that leaves a client is a handle that stays until the request is
//! sent; the manager holds it for the request, as the handle may go before its turn comes. All references of a connection
//! end with it.

use super::greeting::Id;
use crate::error::Result;
use crate::wire::attach;
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;

/// The form in which a handle travels.
#[derive(Serialize, Deserialize)]
pub(crate) enum Travelling {
    /// To or from its manager: an object that is listed in the message.
    Reference(u64),
    /// Past its manager, under a lease.
    Leased(Leased),
}

/// A handle under a lease. The descriptors of its manager's connector and of the lease ride along.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Leased {
    pub(crate) manager: Id,
    pub(crate) pid: u32,
    pub(crate) object: u64,
    pub(crate) connector: u32,
    pub(crate) end: u32,
}

/// A handle that stays with a request until that is sent.
pub(crate) type Kept = Arc<dyn Any + Send + Sync>;

/// One end of a connection.
pub(crate) trait End: Any + Send + Sync {
    fn carries_descriptors(&self) -> bool;
    /// Lets a handle of `object` leave as a reference, which came to this process by `link`. False if the other end could not take it.
    fn give(&self, manager: Id, object: u64, link: *const ()) -> bool;
    /// Returns `true` if a reference that has arrived counts; it is held for its message from then on.
    fn accept(&self, object: u64) -> bool;
    /// Holds an accepted reference once more.
    fn hold(&self, object: u64);
    /// Lets go of an accepted reference.
    fn release(&self, object: u64);
}

/// The context in which the handles of one message are marshalled.
#[derive(Default)]
pub(crate) struct Marshal {
    pub(crate) end: Option<Arc<dyn End>>,
    /// Given, or not taken yet.
    pub(crate) references: VecDeque<u64>,
    pub(crate) kept: Vec<Kept>,
    /// How deep the parts of the message lie: what their code encodes for elsewhere is no part of it.
    depth: u32,
}

thread_local! {
    /// Of the value that is encoded or decoded on this thread.
    static CURRENT: RefCell<Marshal> = const { RefCell::new(Marshal { end: None, references: VecDeque::new(), kept: Vec::new(), depth: 0 }) };
}

/// Puts the outer one back, also when user code panics.
struct Inside<'a> {
    ours: &'a mut Marshal,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        CURRENT.with_borrow_mut(|current| std::mem::swap(current, self.ours));
    }
}

impl Marshal {
    /// For a message that leaves or arrives by this end, if it has one.
    pub(crate) fn at(end: Option<Arc<dyn End>>) -> Self {
        Self { end, ..Self::default() }
    }

    /// Encodes or decodes a part of its message.
    #[inline]
    pub(crate) fn run<T>(&mut self, code: impl FnOnce() -> T) -> T {
        self.depth = attach::depth() + 1;
        CURRENT.with_borrow_mut(|current| std::mem::swap(current, self));
        let _inside = Inside { ours: self };
        code()
    }
}

/// Lets a handle leave as a reference. If it does not, it may leave under a lease, or there is an error with the reason.
pub(crate) fn leave(
    manager: Id,
    object: u64,
    link: *const (),
    handle: impl FnOnce() -> Kept,
) -> Result<bool, &'static str> {
    CURRENT.with_borrow_mut(|current| {
        let Some(end) = current.end.as_ref().filter(|_| current.depth == attach::depth()) else { return Ok(false) };
        if end.give(manager, object, link) {
            current.references.push_back(object);
            current.kept.push(handle());
            return Ok(true);
        }
        match end.carries_descriptors() {
            true => Ok(false),
            false => Err("a handle can leave for another host only to the manager that it is a handle of"),
        }
    })
}

/// Takes a reference that arrived in this message, or a copy of it if the value may be read again; by which end.
pub(crate) fn take(object: u64, is_read_once: bool) -> Option<Arc<dyn End>> {
    let end = CURRENT.with_borrow_mut(|current| {
        if current.depth != attach::depth() {
            return None;
        }
        // Mostly the first: they are listed in the order in which they are read.
        let at = current.references.iter().position(|reference| *reference == object)?;
        if is_read_once {
            current.references.remove(at);
        }
        current.end.clone()
    })?;
    if !is_read_once {
        end.hold(object);
    }
    Some(end)
}
