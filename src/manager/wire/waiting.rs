//! Waitable operations: those that may have to wait at their object.
//!
//! Such an operation is tried in its object's turn. If it has to wait it is parked at the object, where it holds neither
//! the turn nor a thread, and is tried again after every change. What it brings (an item, a permit) belongs to the
//! caller under a ticket, until the caller acknowledges it or gives it back. A client that disconnects gives everything back.

use crate::error::{Error, ErrorKind};
use std::any::Any;

/// The caller: its connection, and the number of the request there.
pub(crate) type Ticket = (u64, u64);

/// One try of an operation that may have to wait. Such an operation takes of its arguments what it needs no more, and appends its
/// answer, unless it is pending.
#[derive(Clone, Copy)]
pub(crate) struct Try {
    pub(crate) ticket: Ticket,
    /// The caller's time is over: nothing is done that cannot be done at once.
    pub(crate) is_late: bool,
}

/// How an operation ends for its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The caller keeps what it brought.
    Took,
    /// The caller needs it no more.
    GaveBack,
    /// The caller is gone, and has not read the answer.
    Unread,
    /// The client is gone.
    Lost,
}

/// Those that a client settles an operation by, at their numbers.
pub(crate) const ENDS: [End; 3] = [End::Took, End::GaveBack, End::Unread];

/// An object with such operations.
pub(crate) trait Waits: Send + 'static {
    /// A caller that may have been brought something ends so.
    fn settle(&mut self, _ticket: Ticket, _end: End) {}
}

/// [`Waits::settle`] of an object whose type is not known.
pub(crate) type Settle = fn(&mut (dyn Any + Send), Ticket, End);

pub(crate) fn settle<T: Waits>(object: &mut (dyn Any + Send), ticket: Ticket, end: End) {
    if let Some(object) = object.downcast_mut::<T>() {
        object.settle(ticket, end);
    }
}

pub(crate) fn too_late(what: &str) -> Error {
    Error::new(ErrorKind::Timeout, format!("{what} in time"))
}
