//! From "a shared word changed" to "a task runs".
//!
//! [`event`] is the list in shared memory, [`line`] the queue of this process behind it, [`bell`] how a sleeping
//! process is reached, and [`until`] the one loop that suspends.
#![forbid(unsafe_code)]

pub(crate) mod bell;
pub(crate) mod event;
mod line;
mod look;
#[cfg(all(test, multiprocess_loom))]
mod models;
mod until;

pub(crate) use line::{Hangup, Line, Turn};
pub(crate) use look::Look;
pub(crate) use until::{
    Seen, Watchful, at_once, refuse_inside_async, until, until_blocking, until_blocking_in_turn, until_in_turn,
    until_read,
};
