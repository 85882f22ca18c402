//! Memory that several processes see.
//!
//! `unsafe` lives here: a shared byte is reached only through atomics and copies, never by reference.

pub(crate) mod atomic;
pub(crate) mod family;
pub(crate) mod latch;
pub(crate) mod mapped;
// Models run the same algorithms on memory of the model checker.
#[cfg_attr(multiprocess_loom, path = "model.rs")]
pub(crate) mod region;
pub(crate) mod view;
