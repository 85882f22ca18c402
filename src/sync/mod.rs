//! Locks, signals and plain data in shared memory.
//!
//! | to | take |
//! |---|---|
//! | let one at a time do something | [`Lock`]; one that its holder may take again, [`RLock`] |
//! | let many read, or one write | [`RwLock`] |
//! | let at most n at a time do something | [`Semaphore`]; one that never gets more permits, [`BoundedSemaphore`] |
//! | announce that something has happened | [`Event`] |
//! | wait until shared data are as wanted | [`Condition`] |
//! | wait until n have arrived | [`Barrier`] |
//! | cancel work in all processes | [`CancellationToken`] |
//! | share a number or a plain struct | [`Value`] |
//! | share plain elements, used in place | [`Array`] |
//!
//! All can be awaited. Most have `try_*`, `blocking_*` and `*_timeout` forms too. [`debug::dump`] lists holders and
//! waiters. The same names stand at the root of the crate. See also the guide's page on
//! [sharing](crate::guide::sharing).
// In this module:
//
// One file per primitive, and one for the shared words of each that has more than one. `acquire` has the five ways to
// acquire a primitive, `object` the memory and the descriptor of any of them. Waiting is [`crate::wait::until`].
#![forbid(unsafe_code)]

mod acquire;
#[cfg(not(multiprocess_loom))] // A model has no bytes to refer to.
mod array;
mod barrier;
mod barrier_state;
mod condition;
mod condition_state;
pub mod debug;
mod double_buffer;
mod event;
mod fairness;
mod holders;
#[cfg(all(test, multiprocess_loom))]
mod holders_models;
#[cfg(all(test, multiprocess_loom))]
mod local_sleep_models;
mod lock;
#[cfg(all(test, multiprocess_loom))]
mod models;
mod mutex;
mod object;
mod rlock;
mod rwlock;
mod rwlock_state;
#[cfg(all(test, multiprocess_loom))]
mod rwlock_state_models;
mod semaphore;
#[cfg(all(test, not(multiprocess_loom)))]
mod stress;
#[cfg(not(multiprocess_loom))]
mod token;
mod value;

#[cfg(not(multiprocess_loom))]
pub use array::{Array, ArrayGuard};
pub use barrier::{Barrier, BarrierWaitResult};
pub use condition::{Condition, ConditionGuard};
pub use event::Event;
pub use lock::{Lock, LockGuard};
pub use rlock::{RLock, RLockGuard};
pub use rwlock::{RwLock, RwLockReadGuard, RwLockWriteGuard};
pub use semaphore::{BoundedSemaphore, Permit, Semaphore};
#[cfg(not(multiprocess_loom))]
pub use token::{CancellationGuard, CancellationToken};
pub use value::{Integer, Value, ValueGuard};
pub(crate) use value::{of_word, to_word};
