//! Blocks of bytes in shared memory, with a name or without.
#![forbid(unsafe_code)]

mod shared_memory;

pub use shared_memory::SharedMemory;
