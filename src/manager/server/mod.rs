//! The process that owns the objects. Knows nothing of `client`.

mod acceptor;
mod connection;
mod executor;
pub(crate) mod leader;
mod objects;
mod overflow;
mod poller;
pub(crate) mod state;
