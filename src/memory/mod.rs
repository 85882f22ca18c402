//! Blocks of bytes that several processes see, with a name or without.
#![forbid(unsafe_code)]

mod shared_memory;

pub use shared_memory::SharedMemory;
