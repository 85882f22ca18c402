//! Copies into and out of mapped memory. Never a `&[u8]` of it: another process may write there.

use super::atomic::AtomicU64;
use crate::os::mmap::Map;

/// The whole map as atomic words.
#[inline]
pub(crate) fn words(map: &Map) -> &[AtomicU64] {
    // SAFETY: a map is page-aligned and `len` bytes long, and it outlives the borrow. Every process accesses the
    // words it uses as words only as atomics; an `AtomicU64` has no invalid value. (Models never map memory.)
    unsafe { std::slice::from_raw_parts(map.start().as_ptr().cast(), map.len() / 8) }
}

/// Copies `from` to `at`.
///
/// # Panics
/// If the range is not inside the map: a mistake of ours, never of bytes that arrived.
pub(crate) fn copy_in(map: &Map, at: usize, from: &[u8]) {
    assert!(at.checked_add(from.len()).is_some_and(|end| end <= map.len()));
    // SAFETY: the range lies in the map, as just checked, and our slice cannot overlap a fresh mapping.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), map.start().as_ptr().add(at), from.len()) }
}

/// Copies what is at `at` to `to`.
///
/// # Panics
/// If the range is not inside the map: a mistake of ours, never of bytes that arrived.
pub(crate) fn read(map: &Map, at: usize, to: &mut [u8]) {
    assert!(at.checked_add(to.len()).is_some_and(|end| end <= map.len()));
    // SAFETY: the range lies in the map, as just checked, and our slice cannot overlap a mapping.
    unsafe { std::ptr::copy_nonoverlapping(map.start().as_ptr().add(at), to.as_mut_ptr(), to.len()) }
}

/// The 8 bytes at `at`, which may be changing: a caller that cares has synchronised.
///
/// # Panics
/// If the word is not inside the map, or `at` is not a multiple of 8: a mistake of ours.
#[inline]
pub(crate) fn word(map: &Map, at: usize) -> u64 {
    assert!(at.is_multiple_of(8));
    words(map)[at / 8].load(std::sync::atomic::Ordering::Relaxed)
}

/// Appends the `len` bytes at `at` to `to`.
///
/// # Panics
/// If the range is not inside the map: a mistake of ours, never of bytes that arrived.
pub(crate) fn append(map: &Map, at: usize, len: usize, to: &mut Vec<u8>) {
    assert!(at.checked_add(len).is_some_and(|end| end <= map.len()));
    to.reserve_exact(len);
    // SAFETY: the range lies in the map; the vector has room for `len` more bytes, all written before `set_len`.
    unsafe {
        std::ptr::copy_nonoverlapping(map.start().as_ptr().add(at), to.as_mut_ptr().add(to.len()), len);
        to.set_len(to.len() + len);
    }
}

/// The `len` bytes at `at`.
pub(crate) fn copy_out(map: &Map, at: usize, len: usize) -> Vec<u8> {
    let mut out = Vec::new();
    append(map, at, len, &mut out);
    out
}
