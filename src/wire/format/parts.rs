//! The large parts of a message: where they lie, and how a receiver takes each out of shared memory straight to where it stays.
//!
//! ```text
//! parts    (where it begins u64, bytes u64, bytes of a number u8)*n, n u8      the very end of a message
//! ```
//!
//! The list is a hint: a message without it, or of which all bytes are at hand, is read in the same way.

use super::{HAS_PARTS, Result, fail};
use crate::wire::list::{List, Source};
use crate::wire::{keep, with_room};

/// From so many bytes on, something is a large part.
pub(super) const LARGE: usize = if cfg!(any(test, fuzzing)) { 8 } else { 64 << 10 };
/// So many are listed; a message with more has no list.
pub(super) const MOST: usize = 32;
const ENTRY: usize = 17;

/// Where a large part lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Counted from the version on.
    pub(super) at: u64,
    pub(super) len: u64,
    /// Bytes of one of its numbers.
    pub(super) size: u8,
}

/// Appends the list to a message.
#[cold]
pub(super) fn append(parts: &[Part], to: &mut Vec<u8>) {
    for part in parts {
        to.extend_from_slice(&part.at.to_le_bytes());
        to.extend_from_slice(&part.len.to_le_bytes());
        to.push(part.size);
    }
    to.push(parts.len() as u8);
}

/// Takes the list off the end of a message, of which `apart` bytes are by themselves; returns how many bytes it says that the parts have,
/// 0 if that cannot be.
pub(super) fn cut(message: &mut &[u8], apart: usize) -> Result<usize> {
    let split = message.split_last().and_then(|(count, rest)| {
        let left = rest.len().checked_sub(usize::from(*count) * ENTRY)?;
        rest.split_at_checked(left)
    });
    let Some((left, list)) = split else { return fail("the list of its large parts is longer than the message") };
    *message = left;
    let parts: Vec<Part> = list.chunks_exact(ENTRY).filter_map(part_of).collect();
    let is_possible = are_possible(&parts, (1 + left.len() + apart) as u64);
    Ok(if is_possible { parts.iter().map(|part| part.len as usize).sum() } else { 0 })
}

/// Returns `true` if parts can lie so in a message that is over at `end`.
fn are_possible(parts: &[Part], end: u64) -> bool {
    let mut from = 1;
    parts.iter().all(|part| {
        let begins = part.at >= from && part.len >= LARGE as u64 && [1, 2, 4, 8].contains(&part.size);
        from = part.at.saturating_add(part.len);
        begins && part.len.is_multiple_of(part.size.into()) && from <= end
    })
}

/// A large part by itself.
#[derive(Debug)]
pub(super) struct Apart {
    /// Where it belongs in the rest of the message, counted from the version on.
    pub(super) at: usize,
    pub(super) list: List,
}

/// A message, its large parts by themselves.
#[derive(Debug, Default)]
pub(crate) struct Parted {
    pub(super) rest: Vec<u8>,
    pub(super) apart: Vec<Apart>,
}

impl Parted {
    /// Copies a message. One whose list is damaged stays in one piece.
    pub(crate) fn receive(from: &impl Source) -> Self {
        let parts = list_of(from).unwrap_or_default();
        let large: usize = parts.iter().map(|part| part.len as usize).sum();
        let mut parted = Self { rest: with_room(from.len() - large), apart: Vec::new() };
        let mut copied = 0;
        for part in parts {
            let (at, len) = (part.at as usize, part.len as usize);
            from.append(copied, at - copied, &mut parted.rest);
            copied = at;
            if let Some(mut list) = List::with_room(part.size.into(), len) {
                list.append(from, at, len);
                parted.apart.push(Apart { at: parted.rest.len(), list });
                copied += len;
            }
        }
        from.append(copied, from.len() - copied, &mut parted.rest);
        parted
    }

    /// Gives the buffer of the rest back for another message.
    pub(crate) fn keep(self) {
        keep(self.rest);
    }
}

/// The large parts of a message, one behind the other, if it has a list of them that can be.
fn list_of(from: &impl Source) -> Option<Vec<Part>> {
    let mut bytes = Vec::new();
    let mut read = |skip: usize, len: usize| {
        bytes.clear();
        from.append(skip, len, &mut bytes);
        bytes.clone()
    };
    let last = from.len().checked_sub(1)?;
    if read(0, 1)[0] & HAS_PARTS == 0 {
        return None;
    }
    let count = usize::from(read(last, 1)[0]);
    let start = last.checked_sub(count * ENTRY).filter(|_| (1..=MOST).contains(&count))?;
    let parts: Vec<Part> = read(start, count * ENTRY).chunks_exact(ENTRY).filter_map(part_of).collect();
    (parts.len() == count && are_possible(&parts, start as u64)).then_some(parts)
}

fn part_of(entry: &[u8]) -> Option<Part> {
    let (at, rest) = entry.split_first_chunk()?;
    let (len, rest) = rest.split_first_chunk()?;
    Some(Part { at: u64::from_le_bytes(*at), len: u64::from_le_bytes(*len), size: *rest.first()? })
}
