//! Values as messages: bytes and numbers as they lie in memory (`plain`), copied once, straight from the value; all
//! others in a format of our own (`format`).

use super::attach::{self, Attachment};
use super::buffers::{self, SPARE_LIMIT, keep, spare};
use super::format::{self, Parted};
use super::limits::{self, Limit};
use super::list::{List, Source};
use super::plain::{self, Read, Seen};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::memory;
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::any::{Any, TypeId};
use std::os::fd::OwnedFd;

/// A value made ready to leave, which goes on borrowing its payload where that is plain bytes.
pub(crate) struct Message {
    encoded: Option<Vec<u8>>,
    pub(crate) attachments: Vec<Attachment>,
}

/// A value as it arrived.
pub(crate) struct Parcel {
    pub(crate) bytes: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// Receives the bytes of a message. Small, for each small message moves one through several results.
pub(crate) enum Buffer {
    Bytes(Vec<u8>),
    Large(Box<Large>),
}

/// Receives a large message without a buffer beside the value.
pub(crate) enum Large {
    /// The value itself, which is numbers.
    Numbers(List),
    /// Of our own format: large lists, texts and bytes by themselves.
    Parted(Parted),
}

/// From so many bytes on, numbers have no buffer beside them, and large parts of other values have none.
pub(crate) const NUMBERS_FROM: usize = 64 << 10;

impl Buffer {
    /// For a `T` of `len` bytes.
    pub(crate) fn of<T: 'static>(len: usize) -> Self {
        let numbers = if len >= NUMBERS_FROM { plain::numbers::<T>(len) } else { None };
        match numbers {
            Some(numbers) => Self::Large(Box::new(Large::Numbers(numbers))),
            None if len >= NUMBERS_FROM && is_formatted::<T>() => {
                Self::Large(Box::new(Large::Parted(Parted::default())))
            }
            None if takes_buffer::<T>() => Self::Bytes(memory::with_room(Vec::new(), len)),
            None => Self::Bytes(buffers::with_room(len)),
        }
    }

    /// Takes in a message.
    pub(crate) fn receive(&mut self, from: &impl Source) {
        match self {
            Self::Bytes(bytes) => from.append(0, from.len(), bytes),
            Self::Large(large) => match &mut **large {
                Large::Numbers(numbers) => numbers.append(from, 0, from.len()),
                Large::Parted(parted) => *parted = Parted::receive(from),
            },
        }
    }

    /// Decodes, as [`decode`].
    #[inline]
    pub(crate) fn decode<T: DeserializeOwned + 'static>(self, fds: Vec<OwnedFd>) -> Result<T> {
        match self {
            Self::Bytes(bytes) => decode(Parcel { bytes, fds }),
            Self::Large(large) => large.decode(fds),
        }
    }
}

impl Large {
    #[inline(never)]
    fn decode<T: DeserializeOwned + 'static>(self, fds: Vec<OwnedFd>) -> Result<T> {
        match self {
            // They were made for this `T`.
            Self::Numbers(mut numbers) => {
                plain::of_numbers(&mut numbers).ok_or_else(|| unreadable::<T>("it was received as another type"))
            }
            Self::Parted(mut parted) => {
                let value = attach::supply(fds, || format::from_parted(&mut parted));
                parted.keep();
                value.map_err(|error| unreadable::<T>(&error.to_string()).with_source(error))
            }
        }
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}

/// Encodes `value`. An error attaches nothing and leaks nothing.
pub(crate) fn encode<T: Serialize + 'static>(value: &T) -> Result<Message> {
    if let Some(encoded) = as_encoded(value) {
        limits::check_size(encoded.bytes.len()).map_err(too_large::<T>)?;
        return Ok(Message { encoded: None, attachments: encoded.attachments.clone() });
    }
    if as_plain(value)?.is_some() {
        return Ok(Message { encoded: None, attachments: Vec::new() });
    }
    encode_by_serde(value)
}

/// `value`, if it is a message itself: that travels as it is.
#[inline]
fn as_encoded<T: 'static>(value: &T) -> Option<&EncodedMessage> {
    (value as &dyn Any).downcast_ref()
}

/// So many bytes of a `T` are received through a buffer at most.
#[inline]
pub(crate) fn most_through_buffer<T: 'static>() -> usize {
    if plain::are_numbers::<T>() || is_formatted::<T>() { NUMBERS_FROM - 1 } else { usize::MAX }
}

/// Whether a `T` travels in the format of our own.
#[inline]
fn is_formatted<T: 'static>() -> bool {
    TypeId::of::<T>() != TypeId::of::<EncodedMessage>() && !plain::is_plain::<T>()
}

/// Returns `true` if values of `T` take over the buffer they arrive in.
#[inline]
pub(crate) fn takes_buffer<T: 'static>() -> bool {
    TypeId::of::<T>() == TypeId::of::<EncodedMessage>() || plain::takes_buffer::<T>()
}

/// Returns `true` if a large value of `T` is decoded into memory beside that of its `len` bytes, so that what the sender's memory took
/// is to be given back first.
pub(crate) fn needs_memory<T: 'static>(len: usize) -> bool {
    needs_memory_beside_buffer::<T>(len) && !plain::are_numbers::<T>()
}

/// The same for a value that is received into a buffer as a whole, as numbers that are borrowed are.
pub(crate) fn needs_memory_beside_buffer<T: 'static>(len: usize) -> bool {
    len >= DISCARD_FROM && !plain::takes_buffer::<T>()
}

/// The bytes of a value that needs no encoding.
fn as_it_is<T: 'static>(value: &T) -> Option<&[u8]> {
    as_encoded(value).map(EncodedMessage::bytes).or_else(|| plain::bytes(value))
}

/// Encodes a value that borrows, to be decoded as the owned twin of its type, which must not be bytes or numbers.
fn encode_by_serde<T: Serialize>(value: &T) -> Result<Message> {
    let mut encoded = spare();
    let attachments = append_by_serde(value, &mut encoded)?;
    Ok(Message { encoded: Some(encoded), attachments })
}

/// Appends the encoded `value` to `to`, which an error leaves as it was; what rides along is returned.
#[inline]
pub(crate) fn append<T: Serialize + 'static>(value: &T, to: &mut Vec<u8>) -> Result<Vec<Attachment>> {
    if let Some(bytes) = as_plain(value)? {
        to.extend_from_slice(bytes);
        return Ok(Vec::new());
    }
    append_by_serde(value, to)
}

/// [`append`] in serde's form, also for a type that has another.
pub(crate) fn append_by_serde<T: Serialize>(value: &T, to: &mut Vec<u8>) -> Result<Vec<Attachment>> {
    let start = to.len();
    let (result, attachments) = attach::collect(|| format::append(value, to));
    result.map(|()| attachments).map_err(|error| {
        to.truncate(start);
        unwritable::<T>(&error.to_string(), error.limit())
    })
}

/// The bytes of `value`, if its type is plain. An error if they are too many.
#[inline]
pub(crate) fn as_plain<T: 'static>(value: &T) -> Result<Option<&[u8]>> {
    let bytes = plain::bytes(value);
    limits::check_size(bytes.map_or(0, <[u8]>::len)).map_err(too_large::<T>)?;
    Ok(bytes)
}

#[cold]
fn too_large<T>(why: String) -> Error {
    unwritable::<T>(&why, Some(Limit::Size))
}

#[cold]
fn unwritable<T>(why: &str, beyond: Option<Limit>) -> Error {
    let (what, (why, topic)) = (std::any::type_name::<T>(), Topic::cut(why));
    let topic = match beyond {
        Some(Limit::Size) => Some(Topic::TooLarge),
        Some(Limit::Depth) => Some(Topic::TooDeep),
        None => topic,
    };
    Error::new(ErrorKind::Encode, format!("cannot serialise {what}: {why}")).explained_by(topic)
}

/// Values that take as many bytes in a message are dropped as soon as they can be.
const LARGE: usize = 1 << 20;

/// The memory of as many encoded bytes is given back while they are copied to where they are shared. What is less comes
/// from memory that is made use of again, which would have to be mapped anew each time.
const DISCARD_FROM: usize = 32 << 20;

/// The bytes of a message that are to be copied to where they are shared.
pub(crate) enum Payload<'a> {
    /// They stay where they are.
    Borrowed(&'a [u8]),
    /// Their memory can be given back as soon as they are copied.
    Discardable(&'a mut [u8]),
}

impl Payload<'_> {
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::Discardable(bytes) => bytes,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes().len()
    }

    /// The same for one attempt of several.
    pub(crate) fn again(&mut self) -> Payload<'_> {
        match self {
            Self::Borrowed(bytes) => Payload::Borrowed(bytes),
            Self::Discardable(bytes) => Payload::Discardable(bytes),
        }
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        self.encoded.take().into_iter().for_each(keep);
    }
}

impl Message {
    /// The bytes to send: those encoded, or those of `value`, which must be the value that was encoded.
    pub(crate) fn payload<'a, T: 'static>(&'a self, value: &'a T) -> &'a [u8] {
        self.payload_of(Some(value))
    }

    /// [`payload`](Self::payload) of what [`needed`](Self::needed) left of the value.
    pub(crate) fn payload_of<'a, T: 'static>(&'a self, value: Option<&'a T>) -> &'a [u8] {
        match &self.encoded {
            Some(encoded) => encoded,
            None => value.and_then(as_it_is).unwrap_or_default(),
        }
    }

    /// Returns the parts to send: [`payload`](Self::payload), to be copied once, and its attachments.
    pub(crate) fn parts<'a, T: 'static>(&'a mut self, value: &'a T) -> (Payload<'a>, &'a [Attachment]) {
        self.parts_of(Some(value))
    }

    /// [`parts`](Self::parts) of what [`needed`](Self::needed) left of the value.
    #[inline]
    pub(crate) fn parts_of<'a, T: 'static>(&'a mut self, value: Option<&'a T>) -> (Payload<'a>, &'a [Attachment]) {
        let is_discardable = self.attachments.is_empty();
        let payload = match &mut self.encoded {
            Some(encoded) => match (is_discardable, encoded.len()) {
                (true, DISCARD_FROM..) => Payload::Discardable(encoded),
                _ => Payload::Borrowed(encoded),
            },
            None => Payload::Borrowed(value.and_then(as_it_is).unwrap_or_default()),
        };
        (payload, &self.attachments)
    }

    /// Drops `value`, the one that was encoded, if it is large and not needed any more: it would take memory in a third
    /// place while the message is copied to where it is shared. One that brings descriptors may be needed.
    pub(crate) fn needed<T>(&self, value: T) -> Option<T> {
        let is_large = self.encoded.as_ref().is_some_and(|encoded| encoded.len() >= LARGE);
        (!is_large || !self.attachments.is_empty()).then_some(value)
    }

    /// The bytes and what is attached to them.
    pub(crate) fn into_encoded<T: 'static>(mut self, value: &T) -> EncodedMessage {
        let attachments = std::mem::take(&mut self.attachments);
        // A buffer that would not be kept for the next message is not copied either.
        let whole = self.encoded.take_if(|encoded| encoded.capacity() > SPARE_LIMIT);
        let bytes = whole.map_or_else(|| Bytes::copy_from_slice(self.payload(value)), Bytes::from);
        EncodedMessage { bytes, attachments }
    }
}

/// An encoded value that is itself a value: what somebody else's message carries along unread.
#[derive(Clone, Debug)]
pub(crate) struct EncodedMessage {
    bytes: Bytes,
    attachments: Vec<Attachment>,
}

impl EncodedMessage {
    pub(crate) fn has_attachments(&self) -> bool {
        !self.attachments.is_empty()
    }

    pub(crate) fn new(bytes: impl Into<Bytes>, attachments: Vec<Attachment>) -> Self {
        Self { bytes: bytes.into(), attachments }
    }

    /// Encodes `value`; see [`encode`].
    pub(crate) fn of<T: Serialize + 'static>(value: &T) -> Result<Self> {
        Ok(encode(value)?.into_encoded(value))
    }

    fn from(Parcel { bytes, fds }: Parcel) -> Self {
        Self::new(bytes, fds.into_iter().map(Attachment::owned).collect())
    }

    /// Itself under the name `T`, which is its type.
    fn into_same<T: 'static>(self) -> Result<T> {
        let mut same = Some(self);
        let same = (&mut same as &mut dyn Any).downcast_mut::<Option<T>>().and_then(Option::take);
        same.ok_or_else(|| unreadable::<T>("it is a message"))
    }

    pub(crate) fn attachments(&self) -> &[Attachment] {
        &self.attachments
    }

    /// The bytes that it carries.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Ready to be decoded.
    pub(crate) fn open(self) -> Result<Parcel> {
        let fds = self.attachments.into_iter().map(Attachment::into_owned).collect::<std::io::Result<_>>();
        let fds = fds.map_err(|error| Error::io("cannot take over a descriptor that came with a message", error))?;
        Ok(Parcel { bytes: self.bytes.into(), fds })
    }
}

impl Serialize for EncodedMessage {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let indices = self.attachments.iter().cloned().map(attach::leave::<S::Error>);
        (&self.bytes, indices.collect::<Result<Vec<u32>, _>>()?).serialize(serializer)
    }
}

impl<'de> serde::Deserialize<'de> for EncodedMessage {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (bytes, indices) = <(Bytes, Vec<u32>)>::deserialize(deserializer)?;
        let attachments = indices.into_iter().map(|index| attach::take::<D>(index).map(Attachment::owned));
        Ok(Self { bytes, attachments: attachments.collect::<Result<_, _>>()? })
    }
}

/// A value without descriptors as bytes, for messages of the crate's own.
pub(crate) fn to_bytes<T: Serialize>(value: &T) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    format::append(value, &mut bytes).map_err(std::io::Error::other)?;
    Ok(bytes)
}

/// The reverse of [`to_bytes`].
pub(crate) fn from_bytes<T: DeserializeOwned>(bytes: &[u8]) -> std::io::Result<T> {
    format::from_slice(bytes).map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidData, error))
}

/// The reverse of [`encode`]. Descriptors that `T` does not take are closed.
#[inline]
pub(crate) fn decode<T: DeserializeOwned + 'static>(parcel: Parcel) -> Result<T> {
    if const { size_of::<T>() == size_of::<EncodedMessage>() } && TypeId::of::<T>() == TypeId::of::<EncodedMessage>() {
        return EncodedMessage::from(parcel).into_same();
    }
    let Parcel { bytes, fds } = parcel;
    let bytes = match plain::read(bytes) {
        Read::Value(value, buffer) => {
            buffer.into_iter().for_each(keep);
            return Ok(value);
        }
        Read::Invalid => return Err(unreadable::<T>("it is of another length")),
        Read::NotPlain(bytes) => bytes,
    };
    decode_formatted(bytes, fds)
}

#[inline(never)]
fn decode_formatted<T: DeserializeOwned>(bytes: Vec<u8>, fds: Vec<OwnedFd>) -> Result<T> {
    let value = attach::supply(fds, || decode_slice(&bytes));
    keep(bytes);
    value
}

/// [`decode`] of bytes that belong to somebody else.
#[inline]
pub(crate) fn decode_bytes<T: DeserializeOwned + 'static>(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<T> {
    match plain::see(bytes) {
        Seen::Value(value) => Ok(value),
        Seen::Invalid => Err(unreadable::<T>("it is of another length")),
        Seen::NotPlain => attach::supply(fds, || decode_slice(bytes)),
    }
}

fn decode_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    format::from_slice(bytes).map_err(|error| unreadable::<T>(&error.to_string()).with_source(error))
}

fn unreadable<T>(why: &str) -> Error {
    let (what, (why, topic)) = (std::any::type_name::<T>(), Topic::cut(why));
    let error = Error::new(ErrorKind::Decode, format!("cannot read the message as {what}: {why}"));
    error.explained_by(topic.unwrap_or(Topic::CannotRead))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip<T: Serialize + DeserializeOwned + 'static>(value: T) -> T {
        let message = encode(&value).unwrap();
        decode(Parcel { bytes: message.payload(&value).to_vec(), fds: Vec::new() }).unwrap()
    }

    #[test]
    fn byte_payloads_skip_serde_and_come_back() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert!(encode(&bytes).unwrap().encoded.is_none());
        assert_eq!(round_trip(bytes.clone()), bytes);
        assert_eq!(round_trip(Bytes::from(bytes.clone())), bytes);
        assert_eq!(round_trip(bytes.clone().into_boxed_slice())[..], bytes);
        assert_eq!(round_trip((bytes.clone(),)).0, bytes);
        assert_eq!(round_trip((7u8, bytes.clone())), (7, bytes));
    }

    #[test]
    fn numbers_skip_serde_and_come_back() {
        assert!(encode(&[1u64; 8]).unwrap().encoded.is_none());
        assert_eq!(round_trip([1u64, 2, 3, 4, 5, 6, 7, u64::MAX]), [1, 2, 3, 4, 5, 6, 7, u64::MAX]);
        assert_eq!(round_trip([1i16; 5]), [1; 5]);
        assert_eq!(round_trip((-7i64,)), (-7,));
        assert_eq!(round_trip(vec![0.5f64, f64::INFINITY]), [0.5, f64::INFINITY]);
        let torn = decode::<Vec<u32>>(Parcel { bytes: vec![0; 7], fds: Vec::new() });
        assert_eq!(torn.unwrap_err().kind(), ErrorKind::Decode);
    }

    #[test]
    fn a_handle_outside_a_message_refuses() {
        let (fd, _) = crate::os::socket::packet_pair().unwrap();
        let error = to_bytes(&super::super::Fd::new(fd)).unwrap_err();
        assert!(error.to_string().contains("on its way to another process"));
    }
}
