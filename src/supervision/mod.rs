//! Children that are kept up: started again when they fail, within limits.
//!
//! `restart` says when and how often, and decides; `supervised` is the face, and the task that starts, waits and stops.
#![forbid(unsafe_code)]

mod restart;
mod supervised;

pub use restart::Restart;
pub use supervised::{Supervised, SupervisedBuilder, SupervisedState};
