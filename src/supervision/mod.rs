//! Children that are kept up: started again when they fail, within limits.
//!
//! [`ProcessBuilder::restart`](crate::ProcessBuilder::restart) takes a [`Restart`], which sets when, how often and after which time, and returns a
//! [`SupervisedBuilder`]; [`Supervised`] is the child that it keeps up. A pool replaces its workers by itself and needs none of this.
// In this module:
//
// `restart` decides when and how often; `supervised` is the public type, and the task that starts, waits and stops.
#![forbid(unsafe_code)]

mod restart;
mod supervised;

pub use restart::Restart;
pub use supervised::{Supervised, SupervisedBuilder, SupervisedState};
