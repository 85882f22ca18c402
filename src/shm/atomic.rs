//! The atomics of everything shared, and a mutex beside them: std's, or the model checker's under
//! `cfg(multiprocess_loom)`.

#[cfg(multiprocess_loom)]
pub(crate) use super::region::AtomicU64;
#[cfg(multiprocess_loom)]
pub(crate) use loom::sync::{Mutex, atomic::fence};
#[cfg(not(multiprocess_loom))]
pub(crate) use std::sync::Mutex;
#[cfg(not(multiprocess_loom))]
pub(crate) use std::sync::atomic::{AtomicU64, fence};
