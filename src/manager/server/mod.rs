//! The manager's side: the process that owns the objects. It does not use `client`.

mod connection;
mod executor;
mod faults;
pub(crate) mod leader;
mod objects;
mod overflow;
mod poller;
pub(crate) mod state;
