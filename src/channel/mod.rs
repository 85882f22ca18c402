//! Values between processes: queues and pipes.
//!
//! The faces ([`queue`], [`pipe`]) know `T`; [`channel_core`] joins a ring, its lines and its side socket; [`ring`],
//! [`extents`] and [`segment`] know bytes and words, have no async and wait for nobody.
#![forbid(unsafe_code)]

mod channel_core;
mod cpu_migration;
mod descriptors;
mod extents;
pub(crate) mod lane;
#[cfg(all(test, multiprocess_loom))]
mod lane_models;
#[cfg(all(test, multiprocess_loom))]
mod models;
mod pipe;
mod queue;
mod result_notification;
#[cfg(all(test, multiprocess_loom))]
mod result_notification_models;
mod ring;
mod segment;
pub(crate) mod spsc;
mod unfinished;

pub(crate) use pipe::SharedReceiver;
pub use pipe::{Connection, Receiver, Sender, pipe, simplex};
pub use queue::{JoinableQueue, Queue, QueueSink, QueueStream};
