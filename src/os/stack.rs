//! More stack for the current thread, where a value is nested deeply.

use super::refuse;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::io;

/// A stack of this size is mapped where less is asked for, if it can be.
const USUAL: usize = 8 << 20;
/// So many times the stack that is asked for is mapped, up to the usual size, for calls that soon ask for as much again.
const AHEAD: usize = 8;

/// Runs `deep` with at least `bytes` of stack below it, on this thread: on its own stack if there is so much left, else
/// on one that is mapped for the call. Memory of it that is not touched costs nothing.
#[inline]
pub(crate) fn with_room<R>(bytes: usize, deep: impl FnOnce() -> R) -> io::Result<R> {
    let (mut deep, mut result) = (Some(deep), None);
    run_with_room(bytes, &mut || result = deep.take().map(|deep| deep()))?;
    // `run_with_room` has called it.
    result.ok_or_else(|| io::ErrorKind::Other.into())
}

/// The same for every type of result, so that it is compiled once.
#[inline(never)]
fn run_with_room(bytes: usize, deep: &mut dyn FnMut()) -> io::Result<()> {
    if stacker::remaining_stack().is_some_and(|left| left >= bytes) {
        deep();
        return Ok(());
    }
    let ahead = bytes.saturating_mul(AHEAD).min(USUAL).max(bytes);
    let size = match rehearse(ahead) {
        Ok(()) => ahead,
        Err(_) => rehearse(bytes).map(|()| bytes)?,
    };
    stacker::grow(size, deep);
    Ok(())
}

/// Returns `true` if this thread has so much stack left, or that much can be mapped and `beside` bytes of memory as well.
pub(crate) fn has_room(bytes: usize, beside: usize) -> bool {
    stacker::remaining_stack().is_some_and(|left| left >= bytes) || rehearse(bytes.saturating_add(beside)).is_ok()
}

/// Whether so much memory can be mapped: `stacker` would panic if not.
#[cold]
fn rehearse(bytes: usize) -> io::Result<()> {
    let flags = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    refuse::at("mmap")?;
    // SAFETY: the kernel chooses a place where nothing is, and it is given back before anybody knows of it.
    unsafe {
        let at = mmap_anonymous(std::ptr::null_mut(), bytes, flags.0, flags.1)?;
        munmap(at, bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_gets_the_stack_it_asks_for_or_an_error() {
        fn use_up(kib: usize) -> usize {
            let used = std::hint::black_box([1u8; 1024]);
            if kib == 0 { 0 } else { usize::from(used[kib % 1024]) + use_up(kib - 1) }
        }
        let thread = std::thread::Builder::new().stack_size(256 << 10).spawn(|| {
            let left = || stacker::remaining_stack().unwrap();
            assert!(with_room(16 << 10, left).unwrap() < 256 << 10);
            assert!(with_room(64 << 20, left).unwrap() > 60 << 20);
            assert_eq!(with_room(16 << 20, || use_up(4 << 10)).unwrap(), 4 << 10);
            assert!(with_room(1 << 60, || ()).is_err());
        });
        thread.unwrap().join().unwrap();
    }
}
