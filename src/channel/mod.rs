//! Values between processes: queues, pipes, and channels of other shapes.
//!
//! | to send | take |
//! |---|---|
//! | values from many processes to many | [`Queue`]; to put until all is processed, [`JoinableQueue`]; an item that returns if its consumer dies, [`Queue::lease`] |
//! | values from one process to one other | [`simplex`]; both ways, [`pipe`] |
//! | one answer | [`oneshot`] |
//! | each value to every receiver | [`broadcast`] |
//! | the newest value only | [`watch`] |
//!
//! [`QueueSet`] waits for many queues at once. All handles are values: they travel as arguments, in results and through each other. The same
//! names are re-exported at the root of the crate. See also the guide's pages on [pipelines](crate::guide::pipelines) and
//! [which one to take](crate::guide::which_one).
// In this module:
//
// The public types ([`queue`], [`pipe`], `oneshot`, `watch`, `broadcast`, `queue_set`) know `T`; [`channel_core`] joins a ring, its
// wait queues and its socket; [`ring`], [`extents`], [`segment`] and `recent` know bytes and words, have no async and never
// wait.
#![forbid(unsafe_code)]

#[cfg(not(multiprocess_loom))]
mod broadcast;
mod channel_core;
mod cpu_migration;
mod descriptors;
mod extents;
pub(crate) mod lane;
#[cfg(all(test, multiprocess_loom))]
mod lane_models;
#[cfg(not(multiprocess_loom))]
mod lease;
#[cfg(not(multiprocess_loom))]
mod leases;
#[cfg(all(test, multiprocess_loom))]
mod models;
#[cfg(not(multiprocess_loom))]
mod oneshot;
mod pipe;
mod queue;
#[cfg(not(multiprocess_loom))]
mod queue_set;
#[cfg(not(multiprocess_loom))]
mod recent;
mod reclaim;
mod result_notification;
#[cfg(all(test, multiprocess_loom))]
mod result_notification_models;
mod ring;
mod segment;
pub(crate) mod spsc;
mod unfinished;
#[cfg(not(multiprocess_loom))]
mod watch;

#[cfg(not(multiprocess_loom))]
pub use broadcast::{BroadcastReceiver, BroadcastSender, broadcast};
#[cfg(not(multiprocess_loom))]
pub use lease::{DeadLetters, Lease};
#[cfg(not(multiprocess_loom))]
pub use oneshot::{OneshotReceiver, OneshotSender, oneshot};
pub(crate) use pipe::SharedReceiver;
pub use pipe::{Connection, Receiver, Sender, pipe, simplex};
pub(crate) use queue::Item;
pub use queue::{JoinableQueue, Queue, QueueSink, QueueStream};
#[cfg(not(multiprocess_loom))]
pub use queue_set::{QueueOf, QueueSet};
#[cfg(not(multiprocess_loom))]
pub use watch::{WatchReceiver, WatchSender, watch};
