//! Copies into and out of mapped memory. Never a `&[u8]` of it: another process may write there.

use super::atomic::AtomicU64;
use crate::os::mmap::Map;
use std::sync::atomic::{self, Ordering::*};

/// The whole map as atomic words.
#[inline]
pub(crate) fn words(map: &Map) -> &[AtomicU64] {
    // SAFETY: a map is page-aligned and `len` bytes long, and it outlives the borrow. Every process accesses the
    // words it uses as words only as atomics; an `AtomicU64` has no invalid value. (Models never map memory.)
    unsafe { std::slice::from_raw_parts(map.start().as_ptr().cast(), map.len() / 8) }
}

/// The type of these words in memory.
pub(crate) fn bytes_of(words: &[AtomicU64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.load(Relaxed).to_ne_bytes()).collect()
}

/// Copies `from` to `at`.
///
/// # Panics
/// If the range is not inside the map: a bug of this crate, never caused by received bytes.
pub(crate) fn copy_in(map: &Map, at: usize, from: &[u8]) {
    assert!(at.checked_add(from.len()).is_some_and(|end| end <= map.len()));
    // SAFETY: the range lies in the map, as just checked, and our slice cannot overlap a fresh mapping.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), map.start().as_ptr().add(at), from.len()) }
}

/// The 8 bytes at `at`, which may be changing: a caller that cares has synchronised.
///
/// # Panics
/// If the word is not inside the map, or `at` is not a multiple of 8: a bug of this crate.
#[inline]
pub(crate) fn word(map: &Map, at: usize) -> u64 {
    assert!(at.is_multiple_of(8));
    words(map)[at / 8].load(std::sync::atomic::Ordering::Relaxed)
}

/// Appends the `len` bytes at `at` to `to`: whole numbers.
///
/// # Panics
/// If the range is not inside the map, or no whole numbers: a bug of this crate, never caused by received bytes.
pub(crate) fn append<N: bytemuck::Pod>(map: &Map, at: usize, len: usize, to: &mut Vec<N>) {
    assert!(at.checked_add(len).is_some_and(|end| end <= map.len()));
    let count = len / size_of::<N>();
    assert!(count * size_of::<N>() == len);
    to.reserve_exact(count);
    // SAFETY: the range lies in the map; the vector has room for `count` more elements, which are `len` bytes, all written before
    // `set_len`. Any bytes are an `N`.
    unsafe {
        let end = to.as_mut_ptr().add(to.len()).cast::<u8>();
        std::ptr::copy_nonoverlapping(map.start().as_ptr().add(at), end, len);
        to.set_len(to.len() + count);
    }
}

/// The unit in which elements of `size` bytes are read and written: each is whole, and so is an element that is one.
pub(crate) const fn grain(size: usize) -> usize {
    match size {
        0 => 1,
        size if size.trailing_zeros() < 3 => 1 << size.trailing_zeros(),
        _ => 8,
    }
}

/// Copies the bytes at `at` to `to`, in atomic units of `grain` bytes.
///
/// # Panics
/// If the range is not inside the map, or not made of such units: a bug of this crate.
#[inline]
pub(crate) fn load(map: &Map, at: usize, to: &mut [u8], grain: usize) {
    let start = checked(map, at, to.len(), grain);
    match grain {
        1 => load_units(start, to, |unit: &atomic::AtomicU8| unit.load(Acquire).to_ne_bytes()),
        2 => load_units(start, to, |unit: &atomic::AtomicU16| unit.load(Acquire).to_ne_bytes()),
        4 => load_units(start, to, |unit: &atomic::AtomicU32| unit.load(Acquire).to_ne_bytes()),
        _ => load_units(start, to, |unit: &atomic::AtomicU64| unit.load(Acquire).to_ne_bytes()),
    }
}

/// Copies `from` to `at`, in atomic units of `grain` bytes.
///
/// # Panics
/// As [`load`].
#[inline]
pub(crate) fn store(map: &Map, at: usize, from: &[u8], grain: usize) {
    let start = checked(map, at, from.len(), grain);
    match grain {
        1 => store_units(start, from, |unit: &atomic::AtomicU8, bytes| unit.store(u8::from_ne_bytes(bytes), Release)),
        2 => store_units(start, from, |unit: &atomic::AtomicU16, bytes| unit.store(u16::from_ne_bytes(bytes), Release)),
        4 => store_units(start, from, |unit: &atomic::AtomicU32, bytes| unit.store(u32::from_ne_bytes(bytes), Release)),
        _ => store_units(start, from, |unit: &atomic::AtomicU64, bytes| unit.store(u64::from_ne_bytes(bytes), Release)),
    }
}

#[inline]
fn checked(map: &Map, at: usize, len: usize, grain: usize) -> *const u8 {
    assert!(at.checked_add(len).is_some_and(|end| end <= map.len()));
    assert!(matches!(grain, 1 | 2 | 4 | 8) && at.is_multiple_of(grain) && len.is_multiple_of(grain));
    map.start().as_ptr().cast_const().wrapping_add(at)
}

/// `start` is where [`checked`] says.
#[inline]
fn load_units<A, const N: usize>(start: *const u8, to: &mut [u8], load: impl Fn(&A) -> [u8; N]) {
    const { assert!(size_of::<A>() == N && align_of::<A>() == N) };
    for (n, bytes) in to.as_chunks_mut::<N>().0.iter_mut().enumerate() {
        // SAFETY: the range was checked to be in the map, and to begin at a multiple of N; any bytes are an atomic.
        *bytes = load(unsafe { &*start.add(n * N).cast::<A>() });
    }
}

/// `start` is where [`checked`] says.
#[inline]
fn store_units<A, const N: usize>(start: *const u8, from: &[u8], store: impl Fn(&A, [u8; N])) {
    const { assert!(size_of::<A>() == N && align_of::<A>() == N) };
    for (n, bytes) in from.as_chunks::<N>().0.iter().enumerate() {
        // SAFETY: as in `load_units`; the map is writable.
        store(unsafe { &*start.add(n * N).cast::<A>() }, *bytes);
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    #[test]
    fn elements_are_copied_in_units_that_are_aligned() {
        let sizes = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 40];
        assert_eq!(sizes.map(grain), [1, 1, 2, 1, 4, 2, 8, 4, 8, 8, 8]);
        let fd = crate::os::memfd::create("multiprocess-test", 4096, false).unwrap();
        let map = Map::shared(std::os::fd::AsFd::as_fd(&fd), 0, 4096).unwrap();
        for size in &sizes[1..] {
            let element: Vec<u8> = (1..=*size as u8).collect();
            store(&map, 5 * size, &element, grain(*size));
            let mut back = vec![0; 7 * size];
            load(&map, 0, &mut back, grain(*size));
            assert_eq!(back[5 * size..6 * size], element);
            copy_in(&map, 0, &[0; 4096]);
        }
    }
}
