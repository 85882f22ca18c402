//! Objects that live in one process and are used from many.
//!
//! ```text
//! manager.rs   Manager, ManagerBuilder: the public face     server.rs   who runs the calls, and how a slow one is left behind
//! proxy.rs     the typed handle a client holds              objects.rs  the objects and who holds them
//! list.rs dict.rs namespace.rs   its forms for collections  method.rs   function <-> address, with an object in its hand
//! link.rs      this process's connection to a server        protocol.rs what they say to each other
//! queue.rs primitives.rs value.rs  its forms for what else    waits.rs    operations that may have to wait
//!                                  shares memory
//! abroad.rs    handles that go to another host            inboxes.rs  whose pipe is looked into, and whose rings
//!              and come from there
//! ```
#![forbid(unsafe_code)]

mod abroad;
mod dict;
mod inboxes;
mod link;
mod list;
#[allow(clippy::module_inception)] // STYLE: the room's face carries the room's name.
mod manager;
mod method;
mod namespace;
mod objects;
mod primitives;
mod protocol;
mod proxy;
mod queue;
mod server;
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
