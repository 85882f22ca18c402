//! Waiting, from "a shared word changed" to "a task runs".
//!
//! [`sleepers`] is the list of waiting processes in shared memory, `local_queue` the queue of waiting tasks of this process,
//! `waiters` those of this process that a notification wakes all at once, `spin` adaptive spinning before sleeping, [`doorbell`] the wake of a sleeping process, and [`until`] the one loop that
//! suspends.
#![forbid(unsafe_code)]

pub(crate) mod doorbell;
mod local_queue;
#[cfg(all(test, multiprocess_loom))]
mod models;
pub(crate) mod sleepers;
mod spin;
mod until;
mod waiters;

pub(crate) use doorbell::{Watch, watch};
pub(crate) use local_queue::{Hangup, Turn, WaitQueue};
pub(crate) use spin::Spin;
#[cfg(not(multiprocess_loom))]
pub(crate) use until::block_on;
pub(crate) use until::{
    Attempt, Spinner, Spun, at_once, refuse_inside_async, until, until_blocking, until_blocking_in_turn, until_in_turn,
    until_read,
};
pub(crate) use waiters::Waiters;
