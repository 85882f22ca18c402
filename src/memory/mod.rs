//! Blocks of bytes in shared memory, with a name or without.
//!
//! [`SharedMemory`] is for bytes whose layout is yours, and for blocks that Python or another program opens by name. For typed elements take
//! [`Array`](crate::Array), for one number or struct [`Value`](crate::Value), for values that are passed on [`Queue`](crate::Queue). The guide's page on
//! [sharing](crate::guide::sharing) compares them.
#![forbid(unsafe_code)]

mod shared_memory;

pub use shared_memory::SharedMemory;
