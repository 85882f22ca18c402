//! Many workers, one task queue.
//!
//! ```text
//! pool.rs      Pool: apply, map, imap (public face)              config.rs    its options
//! handle.rs    what callers await                                checkout.rs  one worker for a run of calls
//! flight.rs    the items of one call: pulled, and watched for    input.rs     where they come from, packed into chunks
//! driver.rs    the task that starts workers and keeps time       local.rs     the worker of a pool within this process
//! engine.rs    the scheduler's lock, and what is done outside it
//! scheduler/   the state machine: dispatch, results, deadlines, teardown, scaling
//! group.rs     the items of one call, as the scheduler has them  side_channel.rs    what is large, beside the lanes
//! worker.rs    the loop a child runs    task.rs  what a task can ask    protocol.rs  what they say to each other
//! stats.rs     what a pool tells about itself    trace.rs  what tasks tell `tracing`
//! ```
#![forbid(unsafe_code)]

mod batch;
mod checkout;
mod chunk;
mod config;
mod driver;
mod encoded;
mod engine;
mod flight;
mod group;
mod handle;
mod input;
mod local;
mod options;
#[allow(clippy::module_inception)] // The room's face carries the room's name.
mod pool;
mod protocol;
mod retry;
mod scheduler;
mod side_channel;
mod stats;
mod taker;
#[cfg(all(test, not(multiprocess_loom)))]
mod taker_tests;
mod task;
mod trace;
mod worker;

pub use checkout::Checkout;
pub use config::{PoolBuilder, Workers};
#[allow(unused_imports)] // For rooms above.
pub(crate) use encoded::{EncodedItems, EncodedRun};
pub use handle::{AsyncResult, Call, Map, MapAsync, Results};
#[allow(unused_imports)]
pub(crate) use options::ChunkLimits;
pub use options::Progress;
pub use pool::{Pool, PoolStreamExt, Shutdown};
#[cfg_attr(not(feature = "cluster"), allow(unused_imports))] // For the room above.
pub(crate) use protocol::Origin;
pub use retry::{Retry, RetryIf};
pub use stats::{Histogram, PoolStats, PoolTotals, WorkerStats};
#[allow(unused_imports)]
pub(crate) use taker::{EncodedResults, External, Limits, Order, Orders, Start, Taker};
pub use task::{CurrentTask, current_task};
