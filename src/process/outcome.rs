//! The encoded result of a function, or its error, on its way back.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use crate::wire::{self, Attachment, Message, Parcel};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The result, error or panic of a call, encoded.
pub(crate) struct Outcome(Box<dyn Encoded>);

/// The last byte of an outcome's payload: at the end, so that it can be removed without moving the rest.
pub(super) const VALUE: &[u8] = &[0];
const ERROR: &[u8] = &[1];
const TEXT: u8 = 2;
const PANIC: u8 = 3;

/// The tag of an outcome that is a value.
pub(crate) const IS_VALUE: u8 = VALUE[0];
/// The tag of an outcome that is an error, as a value of [`Error`].
pub(crate) const IS_ERROR: u8 = ERROR[0];
/// The largest tag that an outcome has.
pub(crate) const LAST_TAG: u8 = PANIC;
/// The tag of an outcome that is a panic, as a value of [`Error`].
pub(crate) const IS_PANIC: u8 = PANIC;

/// An error as the tag and the payload of an outcome.
pub(crate) fn encode_error(error: &Error) -> (u8, Vec<u8>) {
    match wire::encode(error) {
        Ok(message) => {
            let tag = if error.kind() == ErrorKind::Panicked { PANIC } else { ERROR[0] };
            (tag, message.payload(error).to_vec())
        }
        // An error is made of texts and numbers; if even that fails, its text still travels.
        Err(_) => (TEXT, error.to_string().into_bytes()),
    }
}

impl Outcome {
    pub(super) fn value<R: Serialize + 'static>(value: R) -> Result<Self> {
        let message = wire::encode(&value)?;
        Ok(Self(Box::new(EncodedResult { tag: VALUE, value: message.needed(value), message })))
    }

    pub(crate) fn error(error: Error) -> Self {
        match wire::encode(&error) {
            Ok(message) => Self(Box::new(EncodedResult { tag: ERROR, value: Some(error), message })),
            // An error is made of texts and numbers; if even that fails, its text still travels.
            Err(_) => Self(Box::new(error.to_string().into_bytes())),
        }
    }

    /// The payload, in two parts to be sent one after the other.
    pub(crate) fn parts(&self) -> [&[u8]; 2] {
        self.0.parts()
    }

    pub(crate) fn attachments(&self) -> &[Attachment] {
        self.0.attachments()
    }

    /// Decodes the result from `parts` and `attachments`.
    pub(crate) fn read<R: DeserializeOwned + 'static>(mut parcel: Parcel) -> Result<R> {
        let tag = parcel.bytes.pop();
        let tag = tag.ok_or_else(|| Error::new(ErrorKind::Decode, "an outcome without content"))?;
        Self::read_parcel(tag, parcel)
    }

    /// Decodes a result whose tag has come by itself. Its bytes become the value, where that is bytes.
    pub(crate) fn read_parcel<R: DeserializeOwned + 'static>(tag: u8, parcel: Parcel) -> Result<R> {
        match tag {
            IS_VALUE => wire::decode(parcel),
            IS_ERROR | IS_PANIC => Err(wire::decode(parcel)?),
            _ => Err(Error::other(String::from_utf8_lossy(&parcel.bytes).into_owned())),
        }
    }
}

impl Outcome {
    /// Decodes a result as it was given to [`Batch::report`](super::entry::Batch::report).
    #[inline]
    pub(crate) fn read_reported<R>(tag: u8, bytes: &[u8], fds: Vec<std::os::fd::OwnedFd>) -> Result<R>
    where
        R: DeserializeOwned + 'static,
    {
        match tag {
            IS_VALUE => wire::decode_bytes(bytes, fds),
            IS_ERROR | PANIC => Err(wire::decode_bytes(bytes, fds)?),
            _ => Err(Error::other(String::from_utf8_lossy(bytes).into_owned())),
        }
    }
}

trait Encoded {
    fn parts(&self) -> [&[u8]; 2];
    fn attachments(&self) -> &[Attachment];
}

struct EncodedResult<R> {
    tag: &'static [u8],
    value: Option<R>,
    message: Message,
}

impl<R: 'static> Encoded for EncodedResult<R> {
    fn parts(&self) -> [&[u8]; 2] {
        [self.message.payload_of(self.value.as_ref()), self.tag]
    }

    fn attachments(&self) -> &[Attachment] {
        &self.message.attachments
    }
}

impl Encoded for Vec<u8> {
    fn parts(&self) -> [&[u8]; 2] {
        [self, &[TEXT]]
    }

    fn attachments(&self) -> &[Attachment] {
        &[]
    }
}
