//! Objects that live in one process and are used from many.
//!
//! ```text
//! In a client:                                            In the manager:
//! manager.rs   Manager, ManagerBuilder: the public face   server.rs    who leads, and how a slow call is left behind
//! proxy.rs     the typed handle a client holds            jobs.rs      calls, from object to object
//! list.rs dict.rs namespace.rs queue.rs primitives.rs     helpers.rs   threads that take over
//! value.rs     its forms                                  clients.rs   one client: what it holds, the way back
//! link.rs      one manager, and who holds what of it      poller.rs    whose pipe is looked into
//! pipes.rs far.rs  the ways there                         gate.rs      clients from elsewhere
//! slots.rs     who waits for which answer                 objects.rs   the objects and who holds them
//!
//! Of both:  protocol.rs  what they say to each other      method.rs    function <-> address, with an object in its hand
//!           waits.rs     operations that may have to wait abroad.rs    handles that cross to another host and back
//! ```
#![forbid(unsafe_code)]

mod abroad;
mod clients;
mod dict;
mod far;
mod gate;
mod helpers;
mod jobs;
mod link;
mod list;
#[allow(clippy::module_inception)] // STYLE: the room's face carries the room's name.
mod manager;
mod method;
mod namespace;
mod objects;
mod pipes;
#[cfg(test)]
mod played;
mod poller;
mod primitives;
mod protocol;
mod proxy;
mod queue;
mod ready;
mod server;
mod slots;
mod value;
mod waits;

pub use dict::DictProxy;
pub use list::ListProxy;
pub use manager::{Manager, ManagerBuilder, ManagerConnect};
pub use method::{Exposed, Maker, Method};
pub use namespace::Namespace;
pub use primitives::{BarrierProxy, ConditionProxy, EventProxy, Grant, LockProxy, SemaphoreProxy};
pub use proxy::{Batch, Proxy, Replies, Ticket};
pub use queue::QueueProxy;
pub use value::{ArrayProxy, ValueProxy};
