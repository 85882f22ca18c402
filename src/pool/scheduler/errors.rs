//! The errors of items and calls that the pool gives up or refuses.

use crate::error::{Error, ErrorKind};

pub(super) fn terminated() -> Error {
    Error::new(ErrorKind::Cancelled, "the pool was terminated before this item was done")
}

/// Returns the error of an item that was not done when the pool's runtime ended.
pub(in crate::pool) fn stranded() -> Error {
    Error::new(ErrorKind::Cancelled, format!("{RUNTIME_ENDED} before this item was done"))
}

/// The error of calls on such a pool.
pub(super) fn orphaned() -> Error {
    let text = format!("{RUNTIME_ENDED}: make a pool in a runtime that lives as long as it is used");
    Error::new(ErrorKind::Closed, text)
}

const RUNTIME_ENDED: &str = "the pool has ended, because its runtime has ended";

pub(super) fn shut() -> Error {
    Error::new(ErrorKind::Cancelled, "the pool was shut down before this item was begun")
}

pub(super) fn broken(why: &str) -> Error {
    Error::other(format!("the pool has no working worker: {why}"))
}
