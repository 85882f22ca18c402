//! Copies into and out of mapped memory. Never a `&[u8]` of it: another process may write there.

use crate::os::mmap::Map;

/// Copies `from` to `at`.
///
/// # Panics
/// If the range is not inside the map: a mistake of ours, never of bytes that arrived.
pub(crate) fn copy_in(map: &Map, at: usize, from: &[u8]) {
    assert!(at.checked_add(from.len()).is_some_and(|end| end <= map.len()));
    // SAFETY: the range lies in the map, as just checked, and our slice cannot overlap a fresh mapping.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), map.start().as_ptr().add(at), from.len()) }
}

/// Copies `len` bytes from `at`.
///
/// # Panics
/// If the range is not inside the map: a mistake of ours, never of bytes that arrived.
pub(crate) fn copy_out(map: &Map, at: usize, len: usize) -> Vec<u8> {
    assert!(at.checked_add(len).is_some_and(|end| end <= map.len()));
    let mut out = Vec::with_capacity(len);
    // SAFETY: the range lies in the map; the vector has room for `len` bytes, all written before `set_len`.
    unsafe {
        std::ptr::copy_nonoverlapping(map.start().as_ptr().add(at), out.as_mut_ptr(), len);
        out.set_len(len);
    }
    out
}
