//! Buffers that are used again.
//!
//! | buffer | kept | until |
//! |---|---|---|
//! | of up to 64 KiB | one by each thread | the thread ends |
//! | of up to [`MOST_KEPT`] | one by the process, if it has several threads | it has not been used for [`IDLE`]: between that and twice that after its last use |
//! | a larger one | - | its message is gone |
//!
//! A kept buffer serves messages of at least half its size: those that are held for long, such as arguments of a pool, must not pin
//! much more than they have.
//!
//! A fresh large buffer costs a page fault for each of its pages, which is more than it costs to fill it.

use crate::os::spawn::SingleThreaded;
use crate::os::sync::lock;
use crate::os::{background, fork, memory};
use std::cell::Cell;
use std::sync::Mutex;
use std::time::Duration;

thread_local! {
    /// A buffer to write the next message into.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Buffers that have grown beyond this are not kept by their thread.
pub(super) const SPARE_LIMIT: usize = 64 << 10;
/// Bytes of a buffer that the process keeps at most. Messages that are as large give back their memory while they are copied.
pub(super) const MOST_KEPT: usize = 32 << 20;
const IDLE: Duration = Duration::from_secs(1);

struct Large {
    buffer: Vec<u8>,
    /// It was used since the thread looked last.
    is_used: bool,
    has_thread: bool,
}

static LARGE: Mutex<Large> = Mutex::new(Large { buffer: Vec::new(), is_used: false, has_thread: false });

/// An empty buffer, perhaps with room.
pub(crate) fn spare() -> Vec<u8> {
    // At the end of a thread, where a value that goes may still send, there is none.
    SPARE.try_with(Cell::take).unwrap_or_default()
}

/// Gives a buffer back for the next message.
pub(crate) fn keep(mut buffer: Vec<u8>) {
    buffer.clear();
    let room = buffer.capacity();
    if room > SPARE_LIMIT {
        if room <= MOST_KEPT {
            keep_large(buffer);
        }
    } else if room > 0 {
        // One without room must not replace one that has some.
        let _ = SPARE.try_with(|spare| spare.set(buffer));
    }
}

#[cold]
fn keep_large(buffer: Vec<u8>) {
    // A forked process has neither the thread, nor perhaps the lock.
    if fork::is_forked() {
        return;
    }
    let mut large = lock(&LARGE);
    // A plain function has the only thread of its process.
    if !large.has_thread && (SingleThreaded::check().is_some() || background::start("mp-buffers", run).is_err()) {
        return;
    }
    (large.has_thread, large.is_used) = (true, true);
    if buffer.capacity() > large.buffer.capacity() {
        large.buffer = buffer;
    }
}

/// The thread that drops the large buffer when it is not used.
fn run() {
    loop {
        std::thread::sleep(IDLE);
        let mut large = lock(&LARGE);
        if !std::mem::take(&mut large.is_used) {
            large.has_thread = false;
            let unused = std::mem::take(&mut large.buffer);
            drop(large);
            return drop(unused);
        }
    }
}

/// Makes room for `len` bytes more, which are many.
#[cold]
pub(super) fn make_room(buffer: &mut Vec<u8>, len: usize) {
    if buffer.capacity() - buffer.len() >= len {
        return;
    }
    if buffer.len() > SPARE_LIMIT {
        return buffer.reserve(len);
    }
    let mut large = take_large(buffer.len() + len);
    large.extend_from_slice(buffer);
    keep(std::mem::replace(buffer, large));
}

/// An empty buffer with room for `len` bytes.
pub(crate) fn with_room(len: usize) -> Vec<u8> {
    if len > SPARE_LIMIT { take_large(len) } else { memory::with_room(spare(), len) }
}

fn take_large(len: usize) -> Vec<u8> {
    let serves = |kept: &Vec<u8>| (len..=len.saturating_mul(2)).contains(&kept.capacity());
    let is_kept = len <= MOST_KEPT && !fork::is_forked();
    let kept = if is_kept { Some(lock(&LARGE)).filter(|large| serves(&large.buffer)) } else { None };
    let buffer = kept.map(|mut large| std::mem::take(&mut large.buffer)).unwrap_or_default();
    memory::with_room(buffer, len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_buffer_is_used_again_and_goes_when_it_is_not() {
        let has_one = || lock(&LARGE).buffer.capacity() >= 1 << 20;
        keep(Vec::with_capacity(1 << 20));
        assert!(has_one());
        let mut buffer = vec![1, 2, 3];
        make_room(&mut buffer, 1 << 19);
        assert_eq!((buffer[..].to_vec(), buffer.capacity() >= 1 << 20, has_one()), (vec![1, 2, 3], true, false));
        keep(buffer);
        // A small message does not take it along.
        let mut small = vec![1];
        make_room(&mut small, 70_000);
        assert!(small.capacity() < 1 << 20 && has_one());
        keep(Vec::with_capacity(MOST_KEPT + 1));
        let start = std::time::Instant::now();
        while has_one() && start.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(!has_one() && lock(&LARGE).buffer.capacity() == 0);
    }
}
