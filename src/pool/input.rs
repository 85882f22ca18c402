//! The inputs of a call: sources whose items are encoded into chunks, in the caller's task.

use super::chunk::Chunk;
use crate::channel::spsc;
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::process::entry;
use crate::wire::{self, Attachment, EncodedMessage};
use futures_util::Stream;
use serde::Serialize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

/// Why an input stopped packing.
pub(super) enum Stop {
    /// The chunk is full.
    Full,
    /// The next item is not there yet; the task that polls is woken when it is.
    NotYet,
    End,
    /// The item after those packed could not be encoded.
    Failed(Error),
    /// The source itself gave up.
    Panicked(Error),
}

/// How much a chunk may have.
#[derive(Clone, Copy)]
pub(super) struct Most {
    pub(super) items: usize,
    /// With so many bytes it is full.
    pub(super) bytes: usize,
}

impl Most {
    /// Returns `true` if one more item may go into `chunk`. The first always may.
    pub(super) fn has_room(self, chunk: &Chunk) -> bool {
        (chunk.count as usize) < self.items && (chunk.count == 0 || chunk.body.len() < self.bytes)
    }
}

/// A source of items, whatever their type.
pub(super) trait Input: Send {
    /// Packs items into `chunk` until that has as much as it may.
    fn fill(&mut self, chunk: &mut Chunk, most: Most, cx: &mut Context<'_>) -> Stop;

    /// The lower bound of the items to come, by the source's size hint.
    fn remaining(&self) -> usize;

    /// Returns a copy of this input, if there can be one.
    fn again(&self) -> Option<Box<dyn Input>> {
        None
    }
}

/// Packs one item. An item that brings descriptors travels alone.
#[inline]
fn pack<A: Serialize + 'static>(chunk: &mut Chunk, arguments: &A) -> Result<Vec<Attachment>> {
    if let Some(bytes) = wire::as_plain(arguments)? {
        spsc::append_record(&mut chunk.body, bytes)?;
        return Ok(Vec::new());
    }
    let start = chunk.body.len();
    chunk.body.extend_from_slice(&[0; spsc::HEADER]);
    let encoded = wire::append(arguments, &mut chunk.body);
    if encoded.is_ok() {
        spsc::close_record(&mut chunk.body, start)?;
    }
    if encoded.is_err() {
        chunk.body.truncate(start);
    }
    encoded
}

/// An item that found no place in the chunk it was made for: it travels in the next, alone.
struct Alone {
    record: Vec<u8>,
    attachments: Vec<Attachment>,
}

/// Items made by `next`.
pub(super) struct Packer<N> {
    next: N,
    alone: Option<Alone>,
}

impl<N> Packer<N> {
    pub(super) fn new(next: N) -> Self {
        Self { next, alone: None }
    }

    fn fill<A: Serialize + 'static>(
        &mut self,
        chunk: &mut Chunk,
        most: Most,
        mut next: impl FnMut(&mut N) -> Poll<Option<A>>,
    ) -> Stop {
        if let Some(Alone { record, attachments }) = self.alone.take() {
            chunk.body.extend_from_slice(&record);
            chunk.attachments = attachments;
            chunk.count = 1;
            return Stop::Full;
        }
        while most.has_room(chunk) {
            let item = match next(&mut self.next) {
                Poll::Ready(Some(item)) => item,
                Poll::Ready(None) => return Stop::End,
                Poll::Pending => return Stop::NotYet,
            };
            let start = chunk.body.len();
            match pack(chunk, &item) {
                Ok(attachments) if attachments.is_empty() => chunk.count += 1,
                Ok(attachments) if chunk.count == 0 => {
                    chunk.attachments = attachments;
                    chunk.count = 1;
                    return Stop::Full;
                }
                Ok(attachments) => {
                    self.alone = Some(Alone { record: chunk.body.split_off(start), attachments });
                    return Stop::Full;
                }
                Err(error) => return Stop::Failed(error),
            }
        }
        Stop::Full
    }
}

/// Runs a source's own code. If it panics, the items packed before are kept.
fn guarded(chunk: &mut Chunk, fill: impl FnOnce(&mut Chunk) -> Stop) -> Stop {
    // A source that panicked is not asked again.
    catch_unwind(AssertUnwindSafe(|| fill(chunk))).unwrap_or_else(|payload| {
        let whole =
            (0..chunk.count).try_fold(0, |at, _| spsc::first(chunk.body.get(at..)?).map(|(_, _, len)| at + len));
        chunk.body.truncate(whole.unwrap_or_default());
        let text = entry::text_of(&*payload);
        let text = format!("the source of items panicked: {}", Topic::cut(&text).0);
        Stop::Panicked(Error::new(ErrorKind::Panicked, text).explained_by(Topic::SourcePanicked))
    })
}

pub(super) struct OfIterator<I>(pub(super) Packer<I>);

impl<I> Input for OfIterator<I>
where
    I: Iterator<Item: Serialize + 'static> + Send,
{
    fn fill(&mut self, chunk: &mut Chunk, most: Most, _: &mut Context<'_>) -> Stop {
        guarded(chunk, |chunk| self.0.fill(chunk, most, |items| Poll::Ready(items.next())))
    }

    fn remaining(&self) -> usize {
        catch_unwind(AssertUnwindSafe(|| self.0.next.size_hint().0)).unwrap_or(0)
    }
}

pub(super) struct OfStream<S>(pub(super) Packer<Pin<Box<S>>>);

impl<S> Input for OfStream<S>
where
    S: Stream<Item: Serialize + 'static> + Send,
{
    fn fill(&mut self, chunk: &mut Chunk, most: Most, cx: &mut Context<'_>) -> Stop {
        guarded(chunk, |chunk| self.0.fill(chunk, most, |items| items.as_mut().poll_next(cx)))
    }

    fn remaining(&self) -> usize {
        0
    }
}

/// The one item of a call, encoded already.
pub(super) struct One(Option<Alone>);

impl One {
    /// Arguments that are encoded.
    pub(super) fn of_encoded(arguments: &EncodedMessage) -> Result<Self> {
        let mut record = Vec::new();
        spsc::append_record(&mut record, arguments.bytes())?;
        Ok(Self(Some(Alone { record, attachments: arguments.attachments().to_vec() })))
    }

    /// The one item of a chunk.
    pub(super) fn of_chunk(chunk: Chunk) -> Self {
        let Chunk { body: record, attachments, .. } = chunk;
        Self(Some(Alone { record, attachments }))
    }

    pub(super) fn input<A: Serialize + 'static>(arguments: &A) -> Result<Box<dyn Input>> {
        let mut chunk = Chunk::new(0);
        let attachments = pack(&mut chunk, arguments)?;
        let record = std::mem::take(&mut chunk.body);
        Ok(Box::new(Self(Some(Alone { record, attachments }))))
    }
}

impl Input for One {
    fn fill(&mut self, chunk: &mut Chunk, _: Most, _: &mut Context<'_>) -> Stop {
        if let Some(Alone { record, attachments }) = self.0.take() {
            (chunk.body, chunk.attachments, chunk.count) = (record, attachments, 1);
        }
        Stop::End
    }

    fn remaining(&self) -> usize {
        usize::from(self.0.is_some())
    }

    fn again(&self) -> Option<Box<dyn Input>> {
        let one = self.0.as_ref()?;
        let one = Alone { record: one.record.clone(), attachments: one.attachments.clone() };
        Some(Box::new(Self(Some(one))))
    }
}
