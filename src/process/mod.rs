//! One child process: how it is started, what it runs, how it ends.
//!
//! [`run`] or [`init`] is the first line of `main`. [`Process`] runs a function in a child, with options by [`ProcessBuilder`]; [`Group`] holds
//! children that belong together; [`Task`] is a function with its arguments as a value. [`preload`] runs functions once for all children, and
//! [`shutdown_signal`] is SIGTERM or Ctrl-C as a future.
//!
//! Use [`Pool`](crate::Pool) instead for many short tasks, [`ProcessBuilder::restart`] for a child that is started again when it fails. All names
//! are re-exported at the root of the crate. See also the guide's page on [processes](crate::guide::processes).
// In this module:
//
// the public types
//   process.rs         Process: a child, and the future of its result      info.rs       name and pid of this process and its parent
//   builder.rs         ProcessBuilder: options, and the start              shutdown.rs   SIGTERM and Ctrl-C as a future
//   boot.rs            init, run, preload; takes the role of the process   stdio.rs      where standard streams go
//   function.rs        the functions that can run in another process       group.rs      children that belong together
//   task.rs            a function and its arguments as a value            ending.rs     a process until it has ended
// in the process that starts children
//   client.rs          this process and its fork server                    children.rs   the list of children that run
//   server_start.rs    a fork server until it serves                       reports.rs    what a child sends back
//   server_link.rs     orders to a fork server and to its spare children   watch.rs      a descriptor of a child, watched
//   spares.rs          how many spare children there shall be              lifeline.rs   kills the children with this process
// in the processes that are started
//   server.rs          the loop of the fork server                         child.rs      a child from its fork to its exit
//   preload.rs         runs preload functions                              name_cleaner.rs  removes names from /dev/shm
// in all of them
//   origin.rs          what a process starts others from                   role.rs       hands a role to a new process
//   protocol.rs, order.rs, variables.rs  the messages                      entry.rs      function <-> address
//   executor.rs        the runtime of async functions                      outcome.rs    an encoded result
//   panics.rs          panics as errors                                    trace.rs      spans and events, to the starter
#![forbid(unsafe_code)]

mod boot;
mod builder;
mod child;
mod children;
mod client;
mod ending;
pub(crate) mod entry;
mod executor;
pub(crate) mod function;
mod group;
mod info;
mod lifeline;
pub(crate) mod name_cleaner;
mod order;
mod origin;
mod outcome;
mod panics;
mod preload;
#[allow(clippy::module_inception)] // The file of the public type has the module's name.
mod process;
mod protocol;
mod reports;
mod role;
mod server;
mod server_link;
mod server_start;
mod shutdown;
mod spares;
mod stdio;
mod task;
pub(crate) mod trace;
mod variables;
mod watch;

pub use boot::{init, preload, run};
pub use builder::ProcessBuilder;
pub(crate) use child::note_memory_limit;
pub use children::active_children;
pub(crate) use client::must_preload;
pub use client::preloaded;
pub(crate) use ending::Ending;
pub use function::Function;
pub use group::Group;
pub use info::{ParentProcess, ProcessInfo, StartMethod, cpu_count, current_process, parent_process};
pub(crate) use origin::check_initialized;
pub(crate) use process::Killer;
pub use process::Process;
pub(crate) use reports::Cause;
pub use shutdown::{ShutdownSignal, shutdown_signal};
pub use stdio::Stdio;
pub use task::Task;
pub(crate) use task::Work;

#[doc(hidden)]
pub mod private {
    pub use super::boot::let_an_exec_give_rights;
    pub use super::executor::Executor;
    pub use super::function::{
        AFunctionPointerDoesNotSayWhichFunctionItIs, Arguments, Async,
        BorrowedDataCannotTravelUseStringForStrAndVecForSlices, Callable, CapturesNothing, NotAFunctionPointer, Owned,
        Plain, Returned,
    };
    pub use super::origin::use_program;
    pub use crate::os::startup::{Initializer, run_initializers_after};
}
