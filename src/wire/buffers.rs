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

impl Large {
    const fn new() -> Self {
        Self { buffer: Vec::new(), is_used: false, has_thread: false }
    }

    /// Keeps a buffer, and returns the one that was kept: the last one serves, not the largest, which would serve no smaller message
    /// and stay as long as those come.
    fn put(&mut self, buffer: Vec<u8>) -> Vec<u8> {
        self.is_used = true;
        std::mem::replace(&mut self.buffer, buffer)
    }

    /// The kept buffer, if it is not too small for `len` bytes, nor much too large.
    fn take(&mut self, len: usize) -> Vec<u8> {
        let serves = (len..=len.saturating_mul(2)).contains(&self.buffer.capacity());
        if serves { std::mem::take(&mut self.buffer) } else { Vec::new() }
    }
}

static LARGE: Mutex<Large> = Mutex::new(Large::new());

/// An empty buffer, perhaps with room.
pub(crate) fn spare() -> Vec<u8> {
    // At the end of a thread, where a value that goes may still send, there is none.
    SPARE.try_with(Cell::take).unwrap_or_default()
}

/// Gives a buffer back for the next message.
#[inline]
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
    large.has_thread = true;
    let old = large.put(buffer);
    drop(large);
    drop(old);
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
    let may_take = len <= MOST_KEPT && !fork::is_forked();
    let kept = if may_take { lock(&LARGE).take(len) } else { Vec::new() };
    memory::with_room(kept, len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_buffer_serves_messages_of_about_its_size_and_the_last_one_is_kept() {
        let mut large = Large::new();
        assert!(large.put(Vec::with_capacity(20 << 20)).capacity() == 0 && large.is_used);
        // Neither a small message takes it along, nor does one that is too large take it away.
        assert_eq!((large.take(70_000).capacity(), large.take(30 << 20).capacity()), (0, 0));
        assert_eq!(large.buffer.capacity(), 20 << 20);
        assert_eq!(large.put(Vec::with_capacity(1 << 20)).capacity(), 20 << 20);
        assert_eq!((large.take(1 << 19).capacity(), large.take(1 << 19).capacity()), (1 << 20, 0));
    }

    /// Other tests keep buffers, too.
    #[test]
    fn large_buffer_goes_when_it_is_not_used_and_a_too_large_one_is_not_kept() {
        keep(Vec::with_capacity(1 << 20));
        let mut buffer = vec![1, 2, 3];
        make_room(&mut buffer, 1 << 19);
        assert_eq!((&buffer[..], buffer.capacity() >= (1 << 19) + 3), (&[1, 2, 3][..], true));
        keep(buffer);
        keep(Vec::with_capacity(MOST_KEPT + 1));
        assert!(lock(&LARGE).buffer.capacity() <= MOST_KEPT);
        let start = std::time::Instant::now();
        let is_kept = || lock(&LARGE).buffer.capacity() > 0 || lock(&LARGE).has_thread;
        while is_kept() {
            assert!(start.elapsed() < Duration::from_secs(60), "it is kept though nothing uses it");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
