//! A ring of byte records for one writer and one reader, each of which lives in one place: no lock.
//!
//! # State
//! `tail` and `head`: `count:32 | position:32`, positions in bytes, free-running. A record is `kind:4 | len:28` and its
//! payload, padded to 4 bytes.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | bytes beyond tail | the writer | plain, nobody reads them yet | - |
//! | tail -> tail + record | the writer | Release: publishes the bytes | decided by the owner of the ring |
//! | head -> head + records | the reader, after copying out | Release: gives the room back | decided by the owner of the ring |
//!
//! # Invariants
//! 1. Bytes from head to tail are whole records and change for nobody.
//! 2. Only the writer stores `tail`, only the reader stores `head`; each remembers its own.
//! 3. What the other side stored is checked before it is used as a length: it lies between what this side remembers and the
//!    size of the ring, with no more records than there are bytes for. An impossible value is [`Corrupt`].
//!
//! # Death
//! | killed | survivors see |
//! |---|---|
//! | writing, before `tail` | nothing: the bytes beyond tail are garbage |
//! | writing, after `tail` | the record |
//! | reading, before `head` | the records, still there |
//!
//! # Cancel
//! No await point.

use super::segment::{Bytes, Mark};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::fault;
use crate::shm::atomic::AtomicU64;
use std::sync::atomic::Ordering::*;

const ALIGN: u32 = 4;
/// Bytes before each record's payload.
pub(crate) const HEADER: usize = 4;
const LEN_BITS: u32 = 28;
/// Kind of a record of 2^28 bytes or more; its real kind is 0. Its length field counts units of 16 bytes; the last byte of the
/// last unit is the number of padding bytes. Only buffers contain it, never a ring.
const LONG: u8 = 15;
const LONG_UNIT: usize = 16;

/// Returns the header of a record.
fn header_of(kind: u8, len: usize) -> [u8; HEADER] {
    (u32::from(kind) << LEN_BITS | len as u32).to_ne_bytes()
}

/// Bytes a record takes.
fn room_for(len: usize) -> u32 {
    (HEADER + len).next_multiple_of(ALIGN as usize) as u32
}

/// Takes the first record off `bytes`: its kind, where its payload lies, and how many bytes it takes; `None` if these
/// bytes make no record.
#[inline]
pub(crate) fn first(bytes: &[u8]) -> Option<(u8, &[u8], usize)> {
    let (header, rest) = bytes.split_first_chunk::<HEADER>()?;
    let header = u32::from_ne_bytes(*header);
    let (kind, len) = ((header >> LEN_BITS) as u8, (header & ((1 << LEN_BITS) - 1)) as usize);
    if kind == LONG {
        return first_long(rest, len);
    }
    let payload = rest.get(..len)?;
    Some((kind, payload, (room_for(len) as usize).min(bytes.len())))
}

#[cold]
fn first_long(rest: &[u8], units: usize) -> Option<(u8, &[u8], usize)> {
    let (padding, padded) = rest.get(..units.checked_mul(LONG_UNIT)?)?.split_last()?;
    let payload = padded.get(..(padded.len() + 1).checked_sub(usize::from(*padding))?)?;
    Some((0, payload, HEADER + padded.len() + 1))
}

/// Completes the record that begins at `start` of `bytes`, [`HEADER`] bytes before its payload, which goes to their end.
///
/// # Errors
/// `Encode` if it is too large for a record: larger than any message.
pub(crate) fn close_record(bytes: &mut Vec<u8>, start: usize) -> Result<()> {
    let len = bytes.len() - start - HEADER;
    let mut header = header_of(0, len);
    if len >= 1 << LEN_BITS {
        let units = len / LONG_UNIT + 1;
        if units >= 1 << LEN_BITS {
            bytes.truncate(start);
            let text = format!("{len} bytes are more than a message can have");
            return Err(Error::new(ErrorKind::Encode, text).explained_by(Topic::TooLarge));
        }
        header = header_of(LONG, units);
        bytes.reserve_exact(LONG_UNIT);
        bytes.resize(start + HEADER + units * LONG_UNIT, (units * LONG_UNIT - len) as u8);
    }
    if let Some(to) = bytes.get_mut(start..start + HEADER) {
        to.copy_from_slice(&header);
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGN as usize), 0);
    Ok(())
}

/// Appends the record of `payload` to `bytes`.
///
/// # Errors
/// As [`close_record`].
#[inline]
pub(crate) fn append_record(bytes: &mut Vec<u8>, payload: &[u8]) -> Result<()> {
    let start = bytes.len();
    if payload.len() >= 1 << LEN_BITS {
        bytes.reserve_exact(HEADER + payload.len() + LONG_UNIT);
        bytes.extend_from_slice(&[0; HEADER]);
        bytes.extend_from_slice(payload);
        return close_record(bytes, start);
    }
    let room = room_for(payload.len()) as usize;
    bytes.reserve(room);
    bytes.extend_from_slice(&header_of(0, payload.len()));
    bytes.extend_from_slice(payload);
    bytes.resize(start + room, 0);
    Ok(())
}

/// The same for a record of any kind.
///
/// # Errors
/// As [`close_record`]; also if a record that is that long is not of kind 0, for which there is no room in its header.
pub(crate) fn append_record_of(bytes: &mut Vec<u8>, kind: u8, payload: &[u8]) -> Result<()> {
    let start = bytes.len();
    if kind != 0 && payload.len() >= 1 << LEN_BITS {
        let text = format!("{} bytes are more than a record that is no value can have", payload.len());
        return Err(Error::new(ErrorKind::Encode, text).explained_by(Topic::TooLarge));
    }
    append_record(bytes, payload)?;
    if kind != 0
        && let Some(to) = bytes.get_mut(start..start + HEADER)
    {
        to.copy_from_slice(&header_of(kind, payload.len()));
    }
    Ok(())
}

/// The words that the two sides share.
#[derive(Clone, Copy)]
pub(super) struct Words<'a> {
    pub(super) tail: &'a AtomicU64,
    pub(super) head: &'a AtomicU64,
}

fn write_at<B: Bytes>(bytes: &B, size: u32, position: u32, from: &[u8]) {
    let at = (position & (size - 1)) as usize;
    let (first, rest) = from.split_at(from.len().min(size as usize - at));
    bytes.write(at, first);
    if !rest.is_empty() {
        bytes.write(0, rest);
    }
}

fn read_at<B: Bytes>(bytes: &B, size: u32, position: u32, len: usize, to: &mut Vec<u8>) {
    let at = (position & (size - 1)) as usize;
    let first = len.min(size as usize - at);
    bytes.read(at, first, to);
    if first < len {
        bytes.read(0, len - first, to);
    }
}

/// Returns `true` if a reader at `head` may find a writer at `tail`.
fn is_possible(head: Mark, tail: Mark, size: u32) -> bool {
    let (count, len) = (tail.count.wrapping_sub(head.count), tail.position.wrapping_sub(head.position));
    len <= size && len.is_multiple_of(ALIGN) && count <= len / HEADER as u32 && (count == 0) == (len == 0)
}

pub(super) struct Writer<B> {
    bytes: B,
    /// Bytes of room; a power of two.
    size: u32,
    tail: Mark,
    known_head: Mark,
}

impl<B: Bytes> Writer<B> {
    /// The writer of a ring in which nothing has happened yet.
    pub(super) fn new(bytes: B, size: u32) -> Self {
        Self { bytes, size, tail: Mark::default(), known_head: Mark::default() }
    }

    /// Goes on where another writer, of the same thread, has left off.
    pub(super) fn catch_up(&mut self, words: Words<'_>) {
        self.tail = Mark::from_bits(words.tail.load(Relaxed));
        self.known_head = Mark::from_bits(words.head.load(Acquire));
    }

    /// Returns `true` if a record of `len` bytes fits into the ring when that is empty.
    #[inline]
    pub(super) fn can_hold(&self, len: usize) -> bool {
        len <= self.size as usize - HEADER - ALIGN as usize
    }

    #[inline]
    fn has_room(&mut self, words: Words<'_>, need: u32) -> bool {
        let room = |head: Mark| self.size.saturating_sub(self.tail.position.wrapping_sub(head.position));
        if need <= room(self.known_head) {
            return true;
        }
        let head = Mark::from_bits(words.head.load(Acquire));
        let fits = need <= room(head);
        self.known_head = head;
        fits
    }

    /// Returns `true` if a record of `len` bytes fits now.
    pub(super) fn has_room_for(&mut self, words: Words<'_>, len: usize) -> bool {
        self.has_room(words, room_for(len))
    }

    /// Writes one record whose payload is `parts` one after the other; false if there is no room now.
    #[inline]
    pub(super) fn push(&mut self, words: Words<'_>, kind: u8, parts: [&[u8]; 2]) -> bool {
        let len = parts[0].len() + parts[1].len();
        let need = room_for(len);
        if !self.has_room(words, need) {
            return false;
        }
        let start = self.tail.position;
        write_at(&self.bytes, self.size, start, &header_of(kind, len));
        write_at(&self.bytes, self.size, start.wrapping_add(HEADER as u32), parts[0]);
        if !parts[1].is_empty() {
            write_at(&self.bytes, self.size, start.wrapping_add((HEADER + parts[0].len()) as u32), parts[1]);
        }
        fault::point("lane.written");
        self.tail = Mark { count: self.tail.count.wrapping_add(1), position: start.wrapping_add(need) };
        words.tail.store(self.tail.to_bits(), Release);
        fault::point("lane.published");
        true
    }

    /// Returns `true` if the position that the reader has stored is possible.
    pub(super) fn is_sound(&self, words: Words<'_>) -> bool {
        is_possible(Mark::from_bits(words.head.load(Acquire)), self.tail, self.size)
    }

    /// Records written and not yet taken by the reader.
    pub(super) fn under_way(&self, words: Words<'_>) -> u32 {
        self.tail.count.wrapping_sub(Mark::from_bits(words.head.load(Acquire)).count)
    }
}

pub(super) struct Reader<B> {
    bytes: B,
    size: u32,
    head: Mark,
}

/// The other side has written what no writer writes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Corrupt;

impl<B: Bytes> Reader<B> {
    /// The reader of a ring of which nothing has been read yet.
    pub(super) fn new(bytes: B, size: u32) -> Self {
        Self { bytes, size, head: Mark::default() }
    }

    /// Returns `true` if there is anything to read.
    #[inline]
    pub(super) fn has_any(&self, words: Words<'_>) -> bool {
        words.tail.load(Acquire) != self.head.to_bits()
    }

    /// Returns `true` if there is more than one record to read.
    pub(super) fn has_more(&self, words: Words<'_>) -> bool {
        Mark::from_bits(words.tail.load(Acquire)).count.wrapping_sub(self.head.count) > 1
    }

    /// Appends everything that is there to `to`; how many records that is.
    pub(super) fn take_all(&mut self, words: Words<'_>, to: &mut Vec<u8>) -> Result<u32, Corrupt> {
        let tail = Mark::from_bits(words.tail.load(Acquire));
        let (count, len) = (tail.count.wrapping_sub(self.head.count), tail.position.wrapping_sub(self.head.position));
        if !is_possible(self.head, tail, self.size) {
            return Err(Corrupt);
        }
        read_at(&self.bytes, self.size, self.head.position, len as usize, to);
        fault::point("lane.read");
        self.head = tail;
        words.head.store(tail.to_bits(), Release);
        Ok(count)
    }

    /// Copies the first record to `to`, which it empties, and leaves it in the ring; its kind.
    pub(super) fn peek(&self, words: Words<'_>, to: &mut Vec<u8>) -> Result<Option<u8>, Corrupt> {
        let tail = Mark::from_bits(words.tail.load(Acquire));
        let available = tail.position.wrapping_sub(self.head.position);
        if tail == self.head {
            return Ok(None);
        }
        if !is_possible(self.head, tail, self.size) {
            return Err(Corrupt);
        }
        to.clear();
        read_at(&self.bytes, self.size, self.head.position, HEADER, to);
        let Some(header) = to.first_chunk::<HEADER>().map(|header| u32::from_ne_bytes(*header)) else {
            return Err(Corrupt);
        };
        let len = (header & ((1 << LEN_BITS) - 1)) as usize;
        if HEADER + len > available as usize {
            return Err(Corrupt);
        }
        to.clear();
        read_at(&self.bytes, self.size, self.head.position.wrapping_add(HEADER as u32), len, to);
        Ok(Some((header >> LEN_BITS) as u8))
    }

    /// Gives up the record that was peeked at, whose payload is `len` bytes long.
    pub(super) fn consume(&mut self, words: Words<'_>, len: usize) {
        let Mark { count, position } = self.head;
        self.head = Mark { count: count.wrapping_add(1), position: position.wrapping_add(room_for(len)) };
        words.head.store(self.head.to_bits(), Release);
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    #[derive(Clone)]
    struct Heap(Rc<RefCell<Vec<u8>>>);

    impl Bytes for Heap {
        fn write(&self, at: usize, from: &[u8]) {
            self.0.borrow_mut()[at..at + from.len()].copy_from_slice(from);
        }
        fn word(&self, _: usize) -> u64 {
            0
        }
        fn read(&self, at: usize, len: usize, to: &mut Vec<u8>) {
            to.extend_from_slice(&self.0.borrow()[at..at + len]);
        }
    }

    struct Both {
        words: [AtomicU64; 2],
        writer: Writer<Heap>,
        reader: Reader<Heap>,
    }

    impl Both {
        fn new(size: u32) -> Self {
            let heap = Heap(Rc::new(RefCell::new(vec![0; size as usize])));
            let (writer, reader) = (Writer::new(heap.clone(), size), Reader::new(heap, size));
            Self { words: [AtomicU64::new(0), AtomicU64::new(0)], writer, reader }
        }

        fn words(words: &[AtomicU64; 2]) -> Words<'_> {
            Words { tail: &words[0], head: &words[1] }
        }

        fn push(&mut self, kind: u8, payload: &[u8]) -> bool {
            let (first, second) = payload.split_at(payload.len() / 2);
            self.writer.push(Self::words(&self.words), kind, [first, second])
        }

        fn take(&mut self) -> Vec<(u8, Vec<u8>)> {
            let (mut bytes, mut records) = (Vec::new(), Vec::new());
            let count = self.reader.take_all(Self::words(&self.words), &mut bytes).unwrap();
            let mut rest = &bytes[..];
            while let Some((kind, payload, len)) = first(rest) {
                records.push((kind, payload.to_vec()));
                rest = &rest[len..];
            }
            assert_eq!((records.len(), rest.len()), (count as usize, 0));
            records
        }
    }

    #[test]
    fn records_come_out_whole_and_in_order_across_the_end_of_the_ring() {
        let mut both = Both::new(64);
        for round in 0..1000u32 {
            let records: Vec<_> = [3usize, 0, 9].map(|len| (round as u8 % LONG, vec![round as u8; len])).into();
            records.iter().for_each(|(kind, payload)| assert!(both.push(*kind, payload)));
            assert_eq!(both.take(), records);
        }
    }

    #[test]
    fn a_record_of_any_length_that_a_message_can_have_is_read_back() {
        for more in [0, 5, 16] {
            let len = (1 << LEN_BITS) + more;
            // Neither touched nor copied, but for its ends.
            let mut bytes = vec![0; HEADER + len];
            bytes[HEADER + len - 1] = 7;
            close_record(&mut bytes, 0).unwrap();
            append_record(&mut bytes, b"next").unwrap();
            let (kind, payload, room) = first(&bytes).unwrap();
            assert_eq!((kind, payload.len(), payload[len - 1]), (0, len, 7));
            assert_eq!(first(&bytes[room..]).unwrap().1, b"next");
            assert!(first(&bytes[..len]).is_none());
        }
        let torn = header_of(LONG, 1);
        assert!(first(&torn).is_none() && first(&header_of(LONG, 0)).is_none());
        assert!(first(&[&torn[..], &[0; 15], &[17]].concat()).is_none());
    }

    #[test]
    fn a_full_ring_takes_nothing_until_there_is_room() {
        let mut both = Both::new(64);
        let fitting = (0..).take_while(|n| both.push(0, &[*n as u8; 8])).count();
        assert_eq!(fitting, 64 / 12);
        assert_eq!(both.take().len(), fitting);
        assert!(both.push(0, &[7; 8]));
        assert!(both.writer.can_hold(56) && !both.writer.can_hold(57));
    }

    #[test]
    fn a_record_that_was_peeked_at_stays_until_it_is_consumed() {
        let mut both = Both::new(64);
        for n in 0..40u8 {
            both.push(1, &[n; 5]);
            let mut payload = Vec::new();
            for _ in 0..2 {
                assert_eq!(both.reader.peek(Both::words(&both.words), &mut payload), Ok(Some(1)));
                assert_eq!(payload, [n; 5]);
            }
            both.reader.consume(Both::words(&both.words), payload.len());
            assert_eq!(both.reader.peek(Both::words(&both.words), &mut payload), Ok(None));
            assert_eq!(both.writer.under_way(Both::words(&both.words)), 0);
        }
    }

    #[test]
    fn corrupt_marks_and_lengths_are_an_error() {
        let mut both = Both::new(64);
        both.push(0, &[1; 8]);
        both.words[0].store(u64::MAX, Relaxed);
        assert_eq!(both.reader.take_all(Both::words(&both.words), &mut Vec::new()), Err(Corrupt));
        let mut both = Both::new(64);
        both.push(0, &[1; 8]);
        both.reader.bytes.write(0, &u32::MAX.to_ne_bytes());
        assert_eq!(both.reader.peek(Both::words(&both.words), &mut Vec::new()), Err(Corrupt));
    }
}
