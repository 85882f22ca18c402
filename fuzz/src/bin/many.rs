//! Damaged messages without a fuzzer: `many [how many [seed]]`. Ends with an abort if one of them makes the reader
//! allocate more than its bytes justify.

use std::alloc::{GlobalAlloc, Layout, System};

/// serde takes up to 1 MiB on the word of a message; no message here is longer than 64 KiB.
const MOST: usize = 64 << 20;

struct Limited;

// SAFETY: passes all calls on to the system's allocator, or refuses, which is always permitted.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        if layout.size() > MOST { std::ptr::null_mut() } else { unsafe { System.alloc(layout) } }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static LIMITED: Limited = Limited;

fn main() {
    let mut args = std::env::args().skip(1).flat_map(|arg| arg.parse::<u64>());
    let count = args.next().unwrap_or(10_000_000);
    multiprocess_fuzz::check_many(count as usize, args.next().unwrap_or(0x5eed));
    println!("{count} damaged messages: each an error or a value");
}
