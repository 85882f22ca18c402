//! The messages between a client and a manager: flat bytes, and descriptors that ride along.
//!
//! ```text
//! request   CALL id count (object entry fingerprint len fds bytes)*     object 0: make one
//!           WAIT id object entry fingerprint len fds bytes | EXPIRE id | SETTLE id end
//!           LEASE_OPEN lease +fd | LEASE lease object | CLAIM object owner | CLAIMED +fd | RELEASE object owner
//!           COUNT id | END id | WHERE id
//! answer    id (status len fds bytes)*
//! ```
//!
//! Each message ends with the references in it (see `marshal.rs`): `object* count`.

use super::marshal::{End, Kept, Marshal, Travelling};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::wire::{self, Attachment, EncodedMessage, Parcel};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Request: run these operations.
pub(crate) const CALL: u8 = 0;
/// Request: a lease begins; it ends when the other end of this descriptor is closed everywhere.
pub(crate) const LEASE_OPEN: u8 = 1;
/// Request: the lease holds this object.
pub(crate) const LEASE: u8 = 2;
/// Request: a handle of this object has arrived here.
pub(crate) const CLAIM: u8 = 3;
/// Request: everything under the lease of this descriptor has been claimed.
pub(crate) const CLAIMED: u8 = 4;
/// Request: a handle was dropped.
pub(crate) const RELEASE: u8 = 5;
/// Request: answer the [`Counts`].
pub(crate) const COUNT: u8 = 6;
/// Request: end the manager.
pub(crate) const END: u8 = 7;
/// Request: run this operation, which may have to wait.
pub(crate) const WAIT: u8 = 8;
/// Request: what this request brought is taken, or given back, or its caller is gone: see [`ENDS`](super::waiting::ENDS).
pub(crate) const SETTLE: u8 = 9;
/// Request: answer the address for clients from elsewhere.
pub(crate) const WHERE: u8 = 10;
/// Request: the time of this request is over.
pub(crate) const EXPIRE: u8 = 11;

/// What a manager knows of itself: its objects, the requests that it has taken, the calls that failed in it.
pub(crate) type Counts = [u64; 3];

/// An answer's part: a value.
pub(crate) const VALUE: u8 = 0;
/// An answer's part: an error.
pub(crate) const ERROR: u8 = 1;

/// Where the number of a request stands that has one.
pub(crate) const ID_AT: usize = 1;

/// The object that makes objects.
pub(crate) const MAKER: u64 = 0;
/// The namespace that is always there.
pub(crate) const NAMES: u64 = 1;
/// The owner of handles that are counted by their connection, and not by the object of the manager that they are part of.
pub(crate) const CONNECTION: u64 = u64::MAX;

/// A value that is sent in serde's form for all types, so that a borrowed value can be read as an owned one.
#[derive(Serialize, Deserialize)]
pub(crate) struct Lend<A: ?Sized>(pub(crate) A);

/// One operation of a call.
pub(crate) struct Op {
    pub(crate) object: u64,
    pub(crate) entry: u64,
    pub(crate) fingerprint: u64,
}

/// A message that is being written.
#[derive(Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
    attachments: Vec<Attachment>,
    marshal: Marshal,
}

impl Writer {
    /// A request, whose number is yet to be written at [`ID_AT`].
    pub(crate) fn request(kind: u8, end: Arc<dyn End>) -> Self {
        let mut bytes = Vec::with_capacity(96);
        bytes.extend([kind, 0, 0, 0, 0, 0, 0, 0, 0]);
        Self { bytes, marshal: Marshal::at(Some(end)), ..Self::default() }
    }

    /// A request of these numbers, without values.
    pub(crate) fn plain(kind: u8, numbers: &[u64]) -> Self {
        let mut writer = Self { bytes: vec![kind], ..Self::default() };
        numbers.iter().for_each(|number| _ = writer.number(*number));
        writer
    }

    pub(crate) fn answer(id: u64, end: Arc<dyn End>) -> Self {
        let mut writer = Self { bytes: Vec::with_capacity(64), marshal: Marshal::at(Some(end)), ..Self::default() };
        writer.number(id);
        writer
    }

    /// Appends a value, encoded in its place. After an error it is as before.
    #[inline]
    pub(crate) fn append<T: Serialize + 'static>(&mut self, value: &T) -> Result<()> {
        self.append_by(|bytes| wire::append(value, bytes))
    }

    /// Appends a borrowed value, as a [`Lend`]. After an error it is as before.
    pub(crate) fn lend<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
        self.append_by(|bytes| wire::append_by_serde(&Lend(value), bytes))
    }

    #[inline]
    fn append_by(&mut self, append: impl FnOnce(&mut Vec<u8>) -> Result<Vec<Attachment>>) -> Result<()> {
        let start = self.bytes.len();
        self.number(0).number(0);
        let bytes = &mut self.bytes;
        let attachments = self.marshal.run(|| append(bytes)).and_then(|attachments| {
            let is_carried = || self.marshal.end.as_ref().is_some_and(|end| end.carries_descriptors());
            if attachments.is_empty() || is_carried() {
                return Ok(attachments);
            }
            let why = "what shares memory or a descriptor cannot leave for another host";
            Err(Error::new(ErrorKind::Encode, why).explained_by(Topic::CannotCrossHosts))
        });
        let attachments = attachments.inspect_err(|_| self.bytes.truncate(start))?;
        self.amend(start, (self.bytes.len() - start - 16) as u64);
        self.amend(start + 8, attachments.len() as u64);
        self.attachments.extend(attachments);
        Ok(())
    }

    /// Appends an answer's part. After an error it is as before.
    #[inline]
    pub(crate) fn append_part<T: Serialize + 'static>(&mut self, value: &T) -> Result<()> {
        self.part(VALUE, |answer| answer.append(value))
    }

    /// Appends an answer's part that is borrowed. After an error it is as before.
    pub(crate) fn lend_part<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
        self.part(VALUE, |answer| answer.lend(value))
    }

    #[inline]
    fn part(&mut self, status: u8, append: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.bytes.push(status);
        append(self).inspect_err(|_| _ = self.bytes.pop())
    }

    /// Handles that must live until the request is sent.
    pub(crate) fn take_kept(&mut self) -> Vec<Kept> {
        std::mem::take(&mut self.marshal.kept)
    }

    /// The references given in it.
    pub(crate) fn references(&self) -> Vec<u64> {
        self.marshal.references.iter().copied().collect()
    }

    pub(crate) fn number(&mut self, number: u64) -> &mut Self {
        self.bytes.extend_from_slice(&number.to_le_bytes());
        self
    }

    pub(crate) fn attach(&mut self, fd: Attachment) -> &mut Self {
        self.attachments.push(fd);
        self
    }

    /// Overwrites the number at `at`.
    pub(crate) fn amend(&mut self, at: usize, number: u64) {
        self.bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }

    pub(crate) fn op(&mut self, op: &Op) -> &mut Self {
        self.number(op.object).number(op.entry).number(op.fingerprint)
    }

    /// Appends an answer's part: a handle of an object that the connection holds for it.
    pub(crate) fn reference(&mut self, object: u64) -> Result<()> {
        self.marshal.references.push_back(object);
        self.append_part(&Travelling::Reference(object))
    }

    pub(crate) fn error(&mut self, error: &Error) {
        // An error is made of texts and numbers, so this does not fail.
        let _ = self.part(ERROR, |answer| answer.append(error));
    }

    /// The number of an answer.
    pub(crate) fn id(&self) -> u64 {
        id_of(&self.bytes).unwrap_or_default()
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn truncate(&mut self, len: usize) {
        self.bytes.truncate(len);
    }

    pub(crate) fn into_encoded(mut self) -> EncodedMessage {
        let references = std::mem::take(&mut self.marshal.references);
        references.iter().for_each(|object| _ = self.number(*object));
        self.number(references.len() as u64);
        EncodedMessage::new(self.bytes, self.attachments)
    }
}

/// A message that is being read. Everything is checked: it may come from another machine.
#[derive(Default)]
pub(crate) struct Reader {
    bytes: Vec<u8>,
    fds: Vec<Option<OwnedFd>>,
    /// The bytes that are read next.
    next: Place,
    marshal: Marshal,
}

impl Drop for Reader {
    fn drop(&mut self) {
        if let Some(end) = &self.marshal.end {
            self.marshal.references.drain(..).for_each(|object| end.release(object));
        }
    }
}

/// Where something begins.
#[derive(Clone, Copy, Default)]
pub(crate) struct Place {
    at: usize,
    fds_at: usize,
}

/// Where a value stands.
pub(crate) struct Span(Range<usize>, Range<usize>);

impl Reader {
    /// A message that came to this `end`; without one it has no references.
    pub(crate) fn new(encoded: EncodedMessage, end: Option<Arc<dyn End>>) -> Result<Self> {
        let Parcel { bytes, fds } = encoded.open()?;
        let (fds, marshal) = (fds.into_iter().map(Some).collect(), Marshal::at(end.clone()));
        let mut reader = Self { bytes, fds, next: Place::default(), marshal };
        let count = reader.bytes.last_chunk().and_then(|count| usize::try_from(u64::from_le_bytes(*count)).ok());
        reader.bytes.truncate(reader.bytes.len().saturating_sub(8));
        let len = count.and_then(|count| count.checked_mul(8));
        let start = len.and_then(|len| reader.bytes.len().checked_sub(len)).ok_or_else(malformed)?;
        for object in reader.bytes.split_off(start).chunks_exact(8) {
            let object = id_of(object).ok_or_else(malformed)?;
            if !end.as_ref().is_some_and(|end| end.accept(object)) {
                return Err(malformed());
            }
            reader.marshal.references.push_back(object);
        }
        Ok(reader)
    }

    /// Decodes a value that is part of it.
    #[inline]
    pub(crate) fn decode<T: DeserializeOwned + 'static>(&mut self, Span(bytes, fds): Span) -> Result<T> {
        let fds = self.fds[fds].iter_mut().map(|fd| fd.take().ok_or_else(malformed)).collect::<Result<_>>()?;
        self.marshal.run(|| wire::decode_bytes(&self.bytes[bytes], fds))
    }

    fn take(&mut self, len: usize) -> Result<&[u8]> {
        let start = self.next.at;
        let end = start.checked_add(len).filter(|end| *end <= self.bytes.len()).ok_or_else(malformed)?;
        self.next.at = end;
        Ok(&self.bytes[start..end])
    }

    pub(crate) fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    pub(crate) fn number(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().map_err(|_| malformed())?))
    }

    pub(crate) fn fd(&mut self) -> Result<OwnedFd> {
        self.next.fds_at += 1;
        self.fds.get_mut(self.next.fds_at - 1).and_then(Option::take).ok_or_else(malformed)
    }

    pub(crate) fn op(&mut self) -> Result<Op> {
        Ok(Op { object: self.number()?, entry: self.number()?, fingerprint: self.number()? })
    }

    /// A value, still encoded, which is passed.
    pub(crate) fn value(&mut self) -> Result<Span> {
        let (len, count) = (self.number()?, self.number()?);
        let (Ok(len), Ok(fds)) = (usize::try_from(len), usize::try_from(count)) else { return Err(malformed()) };
        self.take(len)?;
        let start = self.next.fds_at;
        self.next.fds_at = start.checked_add(fds).filter(|end| *end <= self.fds.len()).ok_or_else(malformed)?;
        Ok(Span(self.next.at - len..self.next.at, start..self.next.fds_at))
    }

    /// The part of an answer with the number `n`; `places` keeps where the parts begin that were passed.
    pub(crate) fn part_at<R: DeserializeOwned + 'static>(&mut self, n: usize, places: &mut Vec<Place>) -> Result<R> {
        while places.len() <= n {
            places.push(self.next);
            self.byte()?;
            self.value()?;
        }
        let next = std::mem::replace(&mut self.next, places[n]);
        let part = self.part();
        self.next = next;
        part
    }

    /// One part of an answer, which is a value or an error.
    pub(crate) fn part<R: DeserializeOwned + 'static>(&mut self) -> Result<R> {
        match self.byte()? {
            VALUE => self.read(),
            ERROR => Err(self.read().unwrap_or_else(|error| error)),
            _ => Err(malformed()),
        }
    }

    /// The next value.
    fn read<T: DeserializeOwned + 'static>(&mut self) -> Result<T> {
        let value = self.value()?;
        self.decode(value)
    }
}

/// The request or answer that an answer's first number names.
pub(crate) fn id_of(answer: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(answer.get(..8)?.try_into().ok()?))
}

/// Both sides are the same program, so this is a defect, or somebody else's bytes.
pub(crate) fn malformed() -> Error {
    Error::new(ErrorKind::Decode, "a message between a manager and its client cannot be read")
}
