//! Many workers, one task queue.
//!
//! ```text
//! pool.rs        Pool, PoolBuilder: apply, map, imap (public face)
//! handle.rs      Call, AsyncResult, Map, Results: what a caller awaits
//! group.rs       the items of one call: what is to do, what is done
//! dispatcher.rs  one task per worker: hands it batches, settles their items, replaces it
//! worker.rs      the loop a child runs          protocol.rs  what they say to each other
//! ```
#![forbid(unsafe_code)]

mod dispatcher;
mod group;
mod handle;
#[allow(clippy::module_inception)] // The room's face carries the room's name.
mod pool;
mod protocol;
mod worker;

pub use handle::{AsyncResult, Call, Map, MapAsync, Results};
pub use pool::{Pool, PoolBuilder};
