//! Encoded items that travel together, on their way to a worker.

use crate::channel::spsc;
use crate::wire::{Attachment, EncodedMessage};
use bytes::Bytes;
use std::ops::Range;
use std::time::Instant;

/// Items that travel together: their arguments back to back.
pub(super) struct Chunk {
    pub(super) first: u64,
    pub(super) count: u32,
    pub(super) attempt: u32,
    pub(super) body: Vec<u8>,
    /// The body, once it is shared: with a pipe, or with the message that it came in.
    shared: Option<Bytes>,
    /// The attachments of the only item.
    pub(super) attachments: Vec<Attachment>,
    /// Since when it waits, if that matters.
    pub(super) queued: Option<Instant>,
    /// Since when it waits, if it has not found a worker at once.
    pub(super) handed: Option<Instant>,
    /// Its wait is in the figures: a chunk that is taken back and given again has waited once.
    pub(super) has_waited: bool,
}

impl Chunk {
    pub(super) fn new(first: u64) -> Self {
        Self {
            first,
            count: 0,
            attempt: 0,
            body: Vec::new(),
            shared: None,
            attachments: Vec::new(),
            queued: None,
            handed: None,
            has_waited: false,
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.shared.as_deref().unwrap_or(&self.body)
    }

    /// Makes `record` its only item, without a copy.
    pub(super) fn set_only(&mut self, record: Bytes) {
        (self.shared, self.count) = (Some(record), 1);
    }

    /// The same bytes, which are not copied.
    pub(super) fn share(&mut self) -> Bytes {
        let body = &mut self.body;
        self.shared.get_or_insert_with(|| std::mem::take(body).into()).clone()
    }

    /// Bytes that it would take up in a ring; more than any has if it cannot go there.
    pub(super) fn len_in_ring(&self) -> usize {
        if self.attachments.is_empty() { self.bytes().len() } else { usize::MAX / 2 }
    }

    /// Takes the message for a pipe out of it, without a copy. A single item leaves the header of its record behind.
    pub(super) fn encoded(&mut self) -> EncodedMessage {
        let shared = self.share();
        let bytes = match spsc::first(&shared) {
            Some((_, payload, _)) if self.count == 1 => shared.slice_ref(payload),
            _ => shared,
        };
        EncodedMessage::new(bytes, self.attachments.clone())
    }

    /// The items from `from` on, before `to`, as a chunk of their own.
    pub(super) fn part(&self, from: u32, to: u32) -> Self {
        let start = self.skip(0, from);
        self.cut((from, to), start..self.skip(start, to - from))
    }

    /// The same in chunks of `size` items; each item is looked at once.
    pub(super) fn parts(&self, from: u32, to: u32, size: u32) -> Vec<Self> {
        let mut start = self.skip(0, from);
        let next = |first: u32| {
            let last = first.saturating_add(size).min(to);
            let end = self.skip(start, last - first);
            self.cut((first, last), std::mem::replace(&mut start, end)..end)
        };
        (from..to).step_by(size.max(1) as usize).map(next).collect()
    }

    /// Where so many items that begin at `at` of the body end.
    fn skip(&self, mut at: usize, items: u32) -> usize {
        for _ in 0..items {
            at += spsc::first(self.bytes().get(at..).unwrap_or_default()).map_or(0, |(_, _, len)| len);
        }
        at
    }

    fn cut(&self, (from, to): (u32, u32), bytes: Range<usize>) -> Self {
        let (body, shared) = match &self.shared {
            Some(shared) => (Vec::new(), Some(shared.slice(bytes))),
            None => (self.body[bytes].to_vec(), None),
        };
        let attachments = self.attachments.clone();
        let first = self.first + u64::from(from);
        let Self { attempt, queued, handed, has_waited, .. } = *self;
        Self { first, count: to - from, attempt, body, shared, attachments, queued, handed, has_waited }
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;
    use crate::channel::lane;
    use std::time::Duration;

    #[test]
    fn a_chunk_of_most_items_for_most_workers_is_split_in_one_walk() {
        let mut chunk = Chunk::new(5);
        for item in 0..lane::MOST_ITEMS as u32 {
            spsc::append_record(&mut chunk.body, &item.to_ne_bytes()).unwrap();
            chunk.count += 1;
        }
        let took = |_| {
            let began = Instant::now();
            let parts = chunk.parts(1, chunk.count, 8);
            let took = began.elapsed();
            assert_eq!(parts.iter().map(|part| part.count).sum::<u32>(), chunk.count - 1);
            assert_eq!((parts[1].first, parts[1].count, parts[1].bytes()), (14, 8, chunk.part(9, 17).bytes()));
            assert_eq!(parts.last().unwrap().count, 7);
            took
        };
        let took = (0..3).map(took).min().unwrap();
        assert!(took < Duration::from_millis(200), "{took:?}: a walk for each part takes seconds");
    }
}
