//! One child process: how it is started, what it runs, how it ends.
//!
//! ```text
//! process.rs   Process, ProcessBuilder: the public face        boot.rs    what `init` finds: root, server or child
//! client.rs    this process's connection to the fork server    server.rs  the fork server's loop
//! function.rs  what can run elsewhere                          child.rs   from fork to exit
//! entry.rs     function <-> address
//! info.rs      who is who                                      protocol.rs  what they say to each other
//! name_cleaner.rs  removes the names in /dev/shm that this process gave
//! shutdown.rs  SIGTERM and Ctrl-C as a future
//! task.rs    a function and its arguments as a value           group.rs   children that belong together
//! ```
#![forbid(unsafe_code)]

mod boot;
mod child;
mod client;
pub(crate) mod entry;
pub(crate) mod function;
mod group;
mod info;
pub(crate) mod name_cleaner;
#[allow(clippy::module_inception)] // STYLE: the room's face carries the room's name.
mod process;
mod protocol;
mod role;
mod server;
mod shutdown;
mod stdio;
mod task;

pub(crate) use boot::check_initialized;
pub use boot::{init, preload, run};
pub(crate) use child::note_memory_limit;
pub(crate) use client::must_preload;
pub use client::preloaded;
pub use function::Function;
pub use group::Group;
pub use info::{ParentProcess, ProcessInfo, active_children, cpu_count, current_process, parent_process};
pub(crate) use process::{Cause, Killer};
pub use process::{Process, ProcessBuilder, StartMethod};
pub use shutdown::{ShutdownSignal, shutdown_signal};
pub use stdio::Stdio;
pub use task::Task;
pub(crate) use task::Work;

#[doc(hidden)]
pub mod private {
    pub use super::boot::{let_an_exec_give_rights, use_program};
    pub use super::entry::Executor;
    pub use super::function::{
        AFunctionPointerDoesNotSayWhichFunctionItIs, Arguments, Async,
        BorrowedDataCannotTravelUseStringForStrAndVecForSlices, Callable, CapturesNothing, NotAFunctionPointer, Owned,
        Plain, Returned,
    };
    pub use crate::os::startup::{Initializer, run_initializers_after};
}
