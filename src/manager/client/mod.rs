//! The client's side: proxies, handles, pending calls, the connection to a manager. It does not use `server`.

pub(crate) mod dict;
pub(crate) mod handle;
pub(crate) mod link;
pub(crate) mod list;
pub(crate) mod lock;
pub(crate) mod namespace;
pub(crate) mod pending;
pub(crate) mod primitives;
pub(crate) mod proxy;
pub(crate) mod queue;
pub(crate) mod value;
pub(crate) mod waits;
