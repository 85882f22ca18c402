//! Process-based parallelism for async Rust.
#![allow(dead_code)]

mod channel;
mod error;
mod os;
mod shm;
mod wait;
mod wire;

pub use channel::{Connection, JoinableQueue, Queue, QueueSink, QueueStream, Receiver, Sender, pipe, simplex};
pub use error::{Error, ErrorKind, PanicInfo, PutError, Result, SendError, TryPutError};
pub use wire::Fd;
