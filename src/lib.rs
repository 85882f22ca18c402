#![doc = include_str!("../README.md")]
// A panic outside tests needs the proof that it cannot happen.
#![cfg_attr(not(test), deny(clippy::unwrap_used))]
// Where `main` begins is what the README shows.
#![allow(clippy::needless_doctest_main)]

mod channel;
pub mod connection;
mod error;
mod manager;
mod memory;
mod os;
mod pool;
mod process;
mod shm;
mod sync;
mod wait;
mod wire;

pub use channel::{Connection, JoinableQueue, Queue, QueueSink, QueueStream, Receiver, Sender, pipe, simplex};
pub use error::{Error, ErrorKind, LockError, PanicInfo, PutError, Result, SendError, TryPutError};
pub use manager::{
    ArrayProxy, BarrierProxy, Batch, ConditionProxy, DictProxy, EventProxy, Exposed, Grant, ListProxy, LockProxy,
    Maker, Manager, ManagerBuilder, ManagerConnect, Method, Namespace, Proxy, QueueProxy, Replies, SemaphoreProxy,
    Ticket, ValueProxy,
};
pub use memory::SharedMemory;
pub use pool::{
    AsyncResult, Call, Checkout, CurrentTask, Histogram, Map, MapAsync, Pool, PoolBuilder, PoolStats, PoolStreamExt,
    Progress, Results, Shutdown, WorkerStats, Workers, current_task,
};
pub use process::{
    Function, ParentProcess, Process, ProcessBuilder, ProcessInfo, ShutdownSignal, StartMethod, Stdio, active_children,
    cpu_count, current_process, init, parent_process, preload, preloaded, run, shutdown_signal,
};
#[cfg(not(multiprocess_loom))]
pub use sync::{Array, ArrayGuard};
pub use sync::{
    Barrier, BarrierWaitResult, BoundedSemaphore, Condition, ConditionGuard, Event, Integer, Lock, LockGuard, Permit,
    RLock, RLockGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, Semaphore, Value, ValueGuard, debug,
};
pub use wire::{Deep, Fd, with_depth_limit, with_depth_limit_async};

#[doc(hidden)]
pub use process::private;

#[cfg(test)]
test_support!();
