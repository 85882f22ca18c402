//! The objects that this process has mapped, so that one that arrives twice is mapped once.

use crate::os::sync::lock;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, Weak};

/// Objects of one kind by the identity of their memory.
pub(crate) struct Mapped<T>(Mutex<Option<Table<T>>>);

struct Table<T> {
    objects: BTreeMap<(u64, u64), Weak<T>>,
    /// Forget those that are gone at this many; doubling it keeps that cheap.
    sweep_at: usize,
}

const FIRST_SWEEP: usize = 64;

impl<T> Mapped<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// The object of this identity, made by `make` if this process does not have it.
    pub(crate) fn or_make(
        &self,
        identity: (u64, u64),
        make: impl FnOnce() -> io::Result<Arc<T>>,
    ) -> io::Result<Arc<T>> {
        let mut table = lock(&self.0);
        let table = table.get_or_insert_with(|| Table { objects: BTreeMap::new(), sweep_at: FIRST_SWEEP });
        if let Some(object) = table.objects.get(&identity).and_then(Weak::upgrade) {
            return Ok(object);
        }
        let object = make()?;
        if table.objects.len() >= table.sweep_at {
            table.objects.retain(|_, object| object.strong_count() > 0);
            table.sweep_at = (2 * table.objects.len()).max(FIRST_SWEEP);
        }
        table.objects.insert(identity, Arc::downgrade(&object));
        Ok(object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn object_is_made_once_while_it_lives_and_forgotten_afterwards() {
        let mapped = Mapped::new();
        let first = mapped.or_make((1, 1), || Ok(Arc::new(1))).unwrap();
        assert!(Arc::ptr_eq(&first, &mapped.or_make((1, 1), || Ok(Arc::new(2))).unwrap()));
        drop(first);
        assert_eq!(*mapped.or_make((1, 1), || Ok(Arc::new(3))).unwrap(), 3);
        for inode in 0..10_000 {
            mapped.or_make((2, inode), || Ok(Arc::new(0))).unwrap();
        }
        let kept = mapped.0.lock().unwrap().as_ref().unwrap().objects.len();
        assert!(kept <= FIRST_SWEEP, "{kept} kept");
    }
}
