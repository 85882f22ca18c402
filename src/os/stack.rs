//! More stack for the current thread, where a value is nested deeply.

/// Runs `deep` with at least `bytes` of stack below it, on this thread: on its own stack if there is so much left, else
/// on one that is mapped for the call. Memory of it that is not touched costs nothing.
#[inline]
pub(crate) fn with_room<R>(bytes: usize, deep: impl FnOnce() -> R) -> R {
    stacker::maybe_grow(bytes, bytes, deep)
}
