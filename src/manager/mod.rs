//! Objects that live in one process and are used from many, on this machine or another.
//!
//! [`Manager::start`] starts the process. [`ListProxy`], [`DictProxy`] and [`Namespace`] are ready-made; [`Manager::create`] makes an object of
//! any type, and [`Proxy::call`] calls a function on it. [`Batch`] puts several calls into one message. With an address
//! ([`ManagerBuilder`]) programs of the same build connect from elsewhere ([`ManagerConnect`]), and use the manager's queues, locks and values by proxies too.
//!
//! For plain numbers that processes of one machine share, [`Value`](crate::Value) and [`Array`](crate::Array) cost no message. The same names stand at the
//! root of the crate. See also the guide's page on [sharing](crate::guide::sharing).
// In this module:
//
// manager.rs   Manager, ManagerBuilder: the public types
// client/      link.rs       the connection to one manager   pending.rs   calls that wait for an answer
//              handle.rs     a hold on an object             proxy.rs     the typed handle, and its forms: list.rs dict.rs
//                            namespace.rs queue.rs lock.rs primitives.rs value.rs   waits.rs   operations that may have to wait
// server/      leader.rs     the thread that takes requests  executor.rs  calls, from object to object
//              overflow.rs   threads that take over          connection.rs what a client asks for and holds
//              poller.rs     requests of busy clients        objects.rs   the objects and their holders
//              state.rs      all this as one                 faults.rs    where tests have it fail
// wire/        transport.rs  what a way between both can do, and the three ways: pipe.rs stream.rs local.rs
//              messages.rs   their format                    method.rs    function <-> address, with an object
//              waiting.rs    waitable operations             marshal.rs   handles as references
//              ready.rs      which clients have sent something   outlet.rs   admission to a pipe
//              greeting.rs   first messages
//
// No file of one side imports one of the other; both use `wire`. `tests/layers.rs` checks it.
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
pub use client::lock::{ConditionProxy, Grant, LockProxy, SemaphoreProxy};
pub use client::namespace::Namespace;
pub use client::primitives::{BarrierProxy, EventProxy};
pub use client::proxy::{Batch, Proxy, Replies, Ticket};
pub use client::queue::QueueProxy;
pub use client::value::{ArrayProxy, ValueProxy};
pub use manager::{Manager, ManagerBuilder, ManagerConnect};
#[cfg(any(feature = "dashboard", feature = "metrics"))]
pub(crate) use wire::messages::Counts;
pub use wire::method::{Exposed, Maker, Method};
