//! Many workers, one task queue.
//!
//! ```text
//! pool.rs    Pool, PoolBuilder: apply, map, imap (public face)    feed.rs    items on their way in, packed into chunks
//! handle.rs  Call, AsyncResult, Map, Results: what callers await  group.rs   the items of one call
//! engine.rs  the scheduler: who does what, who is to be killed    driver.rs  the task that starts workers and keeps time
//! worker.rs  the loop a child runs    task.rs  what a task can ask    protocol.rs  what they say to each other
//! stats.rs   what a pool tells about itself    trace.rs  what tasks tell `tracing`
//! lease.rs   one worker for a run of calls        local.rs  the worker of a pool within this process
//! mail.rs    large results, until they are fetched
//! ```
#![forbid(unsafe_code)]

mod driver;
mod engine;
mod feed;
mod group;
mod handle;
mod lease;
mod local;
mod mail;
#[allow(clippy::module_inception)] // The room's face carries the room's name.
mod pool;
mod protocol;
mod stats;
mod task;
mod trace;
mod worker;

pub use handle::{AsyncResult, Call, Map, MapAsync, Progress, Results};
pub use lease::Checkout;
pub use pool::{Pool, PoolBuilder, PoolStreamExt, Shutdown, Workers};
pub use stats::{Histogram, PoolStats, WorkerStats};
pub use task::{CurrentTask, current_task};
