//! Process-based parallelism for async Rust.
#![allow(dead_code)]

mod error;
mod os;
mod shm;
mod wire;

pub use error::{Error, ErrorKind, PanicInfo, PutError, Result, SendError, TryPutError};
pub use wire::Fd;
