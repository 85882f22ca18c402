//! Values <-> bytes, and what rides along with them.
#![forbid(unsafe_code)]

pub(crate) mod attach;
mod encode;
mod format;
pub(crate) mod frame;
mod limits;
mod plain;

pub(crate) use attach::Attachment;
pub use attach::Fd;
pub(crate) use encode::{
    EncodedMessage, Message, Parcel, Payload, append, as_plain, decode, decode_bytes, encode, encode_by_serde,
    from_bytes, keep, needs_memory, spare, takes_buffer, to_bytes,
};
pub use limits::{Deep, with_depth_limit, with_depth_limit_async};
