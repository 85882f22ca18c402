//! Locks of this room, which are never held while user code runs.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // User code runs under none of our locks but an object's own, and its value is put back whatever happens.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
