//! Memory that several processes see.
//!
//! `unsafe` lives here: a shared byte is reached only through atomics and copies, and by reference only as [`lent`].

pub(crate) mod atomic;
pub(crate) mod family;
#[cfg(all(test, not(multiprocess_loom)))]
pub(crate) mod heap;
#[cfg(not(multiprocess_loom))] // A model has no bytes to refer to.
pub(crate) mod lent;
pub(crate) mod mapped;
pub(crate) mod robust_lock;
// Models run the same algorithms on memory of the model checker.
#[cfg_attr(multiprocess_loom, path = "model.rs")]
pub(crate) mod region;
pub(crate) mod view;
