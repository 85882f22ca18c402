#![doc = include_str!("../README.md")]
// A panic outside tests needs the proof that it cannot happen.
#![cfg_attr(not(test), deny(clippy::unwrap_used))]
// Where `main` begins is what the README shows.
#![allow(clippy::needless_doctest_main)]

mod channel;
#[cfg(feature = "cluster")]
pub mod cluster;
pub mod connection;
mod error;
mod manager;
mod memory;
mod os;
mod pool;
mod process;
mod shm;
#[cfg(not(multiprocess_loom))]
mod supervision;
mod sync;
mod wait;
mod wire;

#[cfg(not(multiprocess_loom))]
pub use channel::{
    BroadcastReceiver, BroadcastSender, DeadLetters, Lease, OneshotReceiver, OneshotSender, QueueOf, QueueSet,
    WatchReceiver, WatchSender, broadcast, oneshot, watch,
};
pub use channel::{Connection, JoinableQueue, Queue, QueueSink, QueueStream, Receiver, Sender, pipe, simplex};
pub use error::{Error, ErrorKind, LockError, PanicInfo, PutError, Result, SendError, TryPutError};
pub use manager::{
    ArrayProxy, BarrierProxy, Batch, ConditionProxy, DictProxy, EventProxy, Exposed, Grant, ListProxy, LockProxy,
    Maker, Manager, ManagerBuilder, ManagerConnect, Method, Namespace, Proxy, QueueProxy, Replies, SemaphoreProxy,
    Ticket, ValueProxy,
};
pub use memory::SharedMemory;
pub use pool::{
    AsyncResult, Call, Checkout, CurrentTask, Events, Histogram, Map, MapAsync, Pool, PoolBuilder, PoolStats,
    PoolStreamExt, PoolTotals, Progress, Results, Retry, RetryIf, Shutdown, StateFunction, StatePool, StatePoolBuilder,
    WithState, WorkerStats, Workers, current_task,
};
pub use process::{
    Function, Group, ParentProcess, Process, ProcessBuilder, ProcessInfo, ShutdownSignal, StartMethod, Stdio, Task,
    active_children, cpu_count, current_process, init, parent_process, preload, preloaded, run, shutdown_signal,
};
#[cfg(not(multiprocess_loom))]
pub use supervision::{Restart, Supervised, SupervisedBuilder, SupervisedState};
#[cfg(not(multiprocess_loom))]
pub use sync::{Array, ArrayGuard, CancellationGuard, CancellationToken};
pub use sync::{
    Barrier, BarrierWaitResult, BoundedSemaphore, Condition, ConditionGuard, Event, Integer, Lock, LockGuard, Permit,
    RLock, RLockGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, Semaphore, Value, ValueGuard, debug,
};
pub use wire::{Deep, Fd, with_depth_limit, with_depth_limit_async};

#[doc(hidden)]
pub use process::private;

#[cfg(test)]
test_support!();

/// Once in a test or bench crate: its tests can then spawn processes, whatever runs them.
///
/// ```
/// multiprocess::test_support!();
///
/// #[tokio::test]
/// async fn adds() {
///     let sum = multiprocess::Process::spawn(|a: u8, b: u8| a + b, (1, 2)).unwrap().await;
///     assert_eq!(sum.unwrap(), 3);
/// }
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! test_support {
    () => {
        const _: () = {
            use ::core::ffi::{c_char, c_int};
            extern "C" fn start(count: c_int, arguments: *const *const c_char, variables: *const *const c_char) {
                // SAFETY: the C library calls this initialiser, once, with the arguments of the program.
                unsafe { $crate::private::run_initializers_after(start, (count, arguments, variables)) };
                $crate::init();
            }
            // Runs before main, and so before the test harness looks at its arguments or starts a thread.
            #[used]
            #[unsafe(link_section = ".init_array")]
            static START: $crate::private::Initializer = start;
        };
    };
}
