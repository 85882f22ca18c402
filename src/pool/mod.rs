//! Worker processes with one task queue.
//!
//! [`Pool`] runs functions: [`apply`](Pool::apply) for one, [`map`](Pool::map) for all items of a collection, [`imap`](Pool::imap) for a stream of
//! results. What these return ([`Call`], [`Map`], [`Results`], [`AsyncResult`]) has the options of a call: timeouts, retries, chunks, progress.
//! [`PoolBuilder`] has those of the pool. [`StatePool`] lends each task a state that its worker has made, [`Checkout`] keeps one worker for a run of calls,
//! and [`current_task`] is a task's view of itself. [`PoolStats`] shows what a pool does.
//!
//! Use [`Process`](crate::Process) instead for one function, [`Group`](crate::Group) for several that end together. All names are
//! re-exported at the root of the crate.
//! See also the guide's page on [pools](crate::guide::pools).
// In this module:
//
// pool.rs          Pool: apply, map, imap; the public type       config.rs    options of a pool
// handle.rs        futures and streams that callers await        options.rs   options of a call, its progress
// flight.rs        the items of one call, pulled and waited for  input.rs     sources of items
// chunk.rs         encoded items on their way out                batch.rs     encoded results on their way back
// call_items.rs    the items of one call, for the scheduler      side_channel.rs  large payloads, beside the lanes
// engine.rs        the scheduler's lock, and the work outside it scheduler/   the state machine
// driver.rs        starts workers, keeps time                    checkout.rs  one worker for a run of calls
// taker.rs         the seam for executors that are no workers    local.rs     a thread of this process as one
// encoded.rs       items and results that stay encoded
// worker.rs        the loop of a worker process                  task.rs      `current_task`
// protocol.rs      orders and contracts, as workers get them     trace.rs     spans and events of tasks
// stats.rs         figures of a pool                             retry.rs     failures that are tried again
// service.rs       a pool as a `tower::Service`
// events.rs        values that a task sends before its result    attempts.rs  items that are made again by a predicate
#![forbid(unsafe_code)]

mod attempts;
mod batch;
mod call_items;
mod checkout;
mod chunk;
mod config;
mod driver;
mod encoded;
mod engine;
mod events;
mod flight;
mod handle;
mod input;
mod local;
mod options;
#[allow(clippy::module_inception)] // The file of the public type has the module's name.
mod pool;
mod protocol;
mod retry;
mod scheduler;
#[cfg(feature = "tower")]
mod service;
mod side_channel;
mod state;
mod stats;
mod taker;
#[cfg(all(test, not(multiprocess_loom)))]
mod taker_tests;
mod task;
mod trace;
mod worker;
mod worker_state;

pub use checkout::Checkout;
pub use config::{PoolBuilder, Workers};
#[allow(unused_imports)] // For modules above.
pub(crate) use encoded::{EncodedItems, EncodedRun};
pub use events::Events;
pub use handle::{AsyncResult, Call, Map, MapAsync, Results};
#[allow(unused_imports)]
pub(crate) use options::ChunkLimits;
pub use options::Progress;
#[cfg(any(feature = "dashboard", feature = "metrics"))]
pub(crate) use pool::StatsSource;
pub use pool::{Pool, PoolStreamExt, Shutdown};
#[cfg_attr(not(feature = "cluster"), allow(unused_imports))] // For the room above.
pub(crate) use protocol::Origin;
pub use retry::{Retry, RetryIf};
#[cfg(feature = "tower")]
pub use service::{PoolResponse, PoolService};
pub use state::{StateFunction, StatePool, StatePoolBuilder, WithState};
#[cfg(feature = "dashboard")]
pub(crate) use stats::Deaths;
pub use stats::{Histogram, PoolStats, PoolTotals, WorkerDeath, WorkerStats};
#[allow(unused_imports)]
pub(crate) use taker::{EncodedResults, External, Limits, Order, Orders, Start, Taker};
pub use task::{CurrentTask, current_task};
