//! Values <-> bytes, and what rides along with them.
#![forbid(unsafe_code)]

pub(crate) mod attach;
mod encode;
mod format;
pub(crate) mod frame;
mod plain;

pub(crate) use attach::Attachment;
pub use attach::Fd;
pub(crate) use encode::{Message, Parcel, Sealed, append, decode, decode_bytes, encode, encode_by_serde, keep, spare};
pub(crate) use plain::{bytes as as_plain, takes_buffer};
