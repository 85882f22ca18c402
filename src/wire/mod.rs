//! How values travel: file descriptors, and the depth of nested values.
//!
//! Any serde value can be sent; the guide's page on [values](crate::guide::values) says what arrives. [`Fd`] carries an open file or socket.
//! Values nested deeper than 1024 levels are sent within [`with_depth_limit`], and returned as [`Deep`].
#![forbid(unsafe_code)]

pub(crate) mod attach;
mod buffers;
mod encode;
mod format;
pub(crate) mod frame;
mod limits;
mod list;
mod plain;

pub(crate) use attach::Attachment;
pub use attach::Fd;
pub(crate) use buffers::{keep, spare, with_room};
pub(crate) use encode::{
    Buffer, EncodedMessage, Message, Parcel, Payload, append, append_by_serde, as_plain, decode, decode_bytes, encode,
    from_bytes, most_through_buffer, needs_memory, needs_memory_beside_buffer, takes_buffer, to_bytes,
};
pub use limits::{Deep, with_depth_limit, with_depth_limit_async};
pub(crate) use list::Source;
