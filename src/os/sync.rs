//! Locks of std that ignore poison.
//!
//! A panic never leaves the data of a lock of this crate half changed: nothing panics between two changes that belong
//! together. So the data of a poisoned lock is whole.

use std::sync::{LockResult, Mutex, MutexGuard, PoisonError, TryLockError};

/// Locks `mutex`, poisoned or not.
#[inline]
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    unpoisoned(mutex.lock())
}

/// Locks `mutex`, poisoned or not, unless a thread has it locked.
pub(crate) fn try_lock<T: ?Sized>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Err(TryLockError::WouldBlock) => None,
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Ok(guard) => Some(guard),
    }
}

/// The guard or the value of any lock operation, poisoned or not: `get_mut`, a wait on a condition variable, a read-write
/// lock, a mutex of the model checker.
#[inline]
pub(crate) fn unpoisoned<G>(locked: LockResult<G>) -> G {
    locked.unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_poisoned_mutex_locks_and_shows_its_value() {
        let mutex = Mutex::new(1);
        let poison = || {
            let _guard = lock(&mutex);
            panic!("with the lock held");
        };
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(poison)).is_err());
        assert!(mutex.is_poisoned());
        assert_eq!(*lock(&mutex), 1);
        assert_eq!(try_lock(&mutex).as_deref(), Some(&1));
        let _guard = lock(&mutex);
        assert!(try_lock(&mutex).is_none());
    }
}
