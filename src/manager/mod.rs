//! Objects that live in one process and are used from many.
//!
//! ```text
//! manager.rs   Manager, ManagerBuilder: the public face
//! client/      link.rs       one manager, and who holds what of it
//!              pipe.rs stream.rs   the ways there          pending.rs   calls that wait for an answer
//!              proxy.rs      the typed handle a client holds, and its forms: list.rs dict.rs namespace.rs queue.rs
//!                            primitives.rs value.rs         waits.rs     operations that may have to wait
//! server/      leader.rs     the thread that takes requests  executor.rs  calls, from object to object
//!              overflow.rs   threads that take over          connection.rs  what a client holds, the way back to it
//!              poller.rs     whose pipe is looked into       acceptor.rs  clients from elsewhere
//!              objects.rs    the objects and who holds them  state.rs     all this as one
//! wire/        messages.rs   what both say to each other     method.rs    function <-> address, with an object
//!              waiting.rs    waitable operations             marshal.rs   handles as references
//!              ready.rs      which clients have sent something   outlet.rs   admission to a pipe
//!              local.rs      the manager of this process     greeting.rs  first words
//! ```
//!
//! No file of one side imports one of the other; both use `wire`. `tests/layers.rs` checks it.
#![forbid(unsafe_code)]

mod client;
#[allow(clippy::module_inception)] // STYLE: the room's face carries the room's name.
mod manager;
#[cfg(test)]
mod mock;
mod server;
mod wire;

pub use client::dict::DictProxy;
pub use client::list::ListProxy;
pub use client::namespace::Namespace;
pub use client::primitives::{BarrierProxy, ConditionProxy, EventProxy, Grant, LockProxy, SemaphoreProxy};
pub use client::proxy::{Batch, Proxy, Replies, Ticket};
pub use client::queue::QueueProxy;
pub use client::value::{ArrayProxy, ValueProxy};
pub use manager::{Manager, ManagerBuilder, ManagerConnect};
pub use wire::method::{Exposed, Maker, Method};
