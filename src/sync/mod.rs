//! Locks and signals that live in shared memory.
//!
//! One file per primitive: its state word, its table of moves, its `try_*`. Waiting is [`crate::wait::until`].
#![forbid(unsafe_code)]

mod acquire;
#[cfg(not(multiprocess_loom))] // A model has no bytes to refer to.
mod array;
mod barrier;
mod condition;
pub mod debug;
mod event;
mod ledger;
#[cfg(all(test, multiprocess_loom))]
mod ledger_models;
mod lock;
#[cfg(all(test, multiprocess_loom))]
mod models;
mod mutex;
mod notices;
mod object;
mod patience;
mod register;
mod rlock;
mod rounds;
mod rwlock;
mod semaphore;
#[cfg(all(test, not(multiprocess_loom)))]
mod stress;
mod turns;
#[cfg(all(test, multiprocess_loom))]
mod turns_models;
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
pub use value::{Integer, Value, ValueGuard};
pub(crate) use value::{of_word, to_word};
