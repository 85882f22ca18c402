//! What the parent and a worker say to each other.

use crate::process::entry;
use crate::wire::Sealed;
use serde::{Deserialize, Serialize};

/// One function and its arguments.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Task {
    pub(super) call: entry::Call,
    pub(super) arguments: Sealed,
}

/// Parent to worker: one function and the arguments of each item, to be run in order.
#[derive(Serialize, Deserialize)]
pub(super) struct Batch {
    pub(super) call: entry::Call,
    pub(super) items: Vec<Sealed>,
}

/// Worker to parent: the outcome of the next item in order.
pub(super) type Report = Sealed;
