//! The errors of items and calls that the pool gives up or refuses.

use crate::error::{Error, ErrorKind, Topic};

pub(super) fn terminated() -> Error {
    Error::new(ErrorKind::Cancelled, "the pool was terminated before this item was done")
        .explained_by(Topic::PoolClosed)
}

/// Returns the error of an item that was not done when the pool's runtime ended.
pub(in crate::pool) fn stranded() -> Error {
    let text = format!("{RUNTIME_ENDED} before this item was done");
    Error::new(ErrorKind::Cancelled, text).explained_by(Topic::RuntimeEnded)
}

/// The error of calls on such a pool.
pub(super) fn orphaned() -> Error {
    let text = format!("{RUNTIME_ENDED}: make a pool in a runtime that lives as long as it is used");
    Error::new(ErrorKind::Closed, text).explained_by(Topic::RuntimeEnded)
}

const RUNTIME_ENDED: &str = "the pool has ended, because its runtime has ended";

pub(super) fn shut() -> Error {
    Error::new(ErrorKind::Cancelled, "the pool was shut down before this item was begun")
        .explained_by(Topic::PoolClosed)
}

pub(super) fn broken(why: &Error) -> Error {
    Error::other(format!("the pool has no working worker: {}", why.text())).explained_by(Topic::PoolBroken)
}
