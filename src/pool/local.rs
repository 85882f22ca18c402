//! The worker of a pool within this process: a thread that runs what is queued, one item at a time.

use super::engine::Shared;
use super::group::{Block, Chunk, Group};
use crate::channel::spsc;
use crate::error::{Error, ErrorKind, Result};
use crate::process::entry::{Arguments, Batch, Executor, report_error};
use crate::wire::{Attachment, EncodedMessage};
use std::any::Any;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Weak};

/// Starts the thread, which ends with the pool; each message tells it to look for work.
pub(super) fn start(shared: Weak<Shared>) -> Result<Sender<()>> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new().name("mp-in-process".into());
    let started = thread.spawn(move || work(&shared, &receiver));
    started.map_err(|error| Error::io("cannot start the thread of a pool", error))?;
    Ok(sender)
}

fn work(shared: &Weak<Shared>, news: &Receiver<()>) {
    let mut executor = Executor::default();
    while news.recv().is_ok() {
        while let Some((group, chunk)) = shared.upgrade().and_then(|shared| shared.take_order()) {
            let call = group.call;
            let desk = Desk { shared: shared.clone(), group, chunk, next: 0, at: 0 };
            let (batch, entered) = call.run_batch(Box::new(desk), &mut executor);
            let Ok(mut desk) = (batch as Box<dyn Any>).downcast::<Desk>() else { return };
            if let Err(error) = entered {
                while desk.next().is_some() {
                    report_error(&mut *desk, Error::new(error.kind(), error.to_string()));
                }
            }
            desk.group.forget(&desk.chunk);
        }
    }
}

struct Desk {
    shared: Weak<Shared>,
    group: Arc<Group>,
    chunk: Chunk,
    /// The item after the one at work, and where it lies.
    next: u32,
    at: usize,
}

impl Batch for Desk {
    fn begin(&mut self, _: &'static str) {}

    fn next(&mut self) -> Option<Result<Arguments<'_>>> {
        let shared = self.shared.upgrade()?;
        while self.next < self.chunk.count {
            self.next += 1;
            if let Some(error) = shared.gives_up(&self.group) {
                shared.settle(&self.group, Block::failed(self.chunk.first + u64::from(self.next) - 1, error));
                continue;
            }
            let rest = self.chunk.bytes().get(self.at..).unwrap_or_default();
            let Some((_, bytes, len)) = spsc::first(rest) else {
                return Some(Err(Error::new(ErrorKind::Decode, "an order with fewer items than it says")));
            };
            self.at += len;
            // Descriptors travel as they would to a process.
            let parcel = EncodedMessage::new(Vec::new(), self.chunk.attachments.clone()).open();
            return Some(parcel.map(|parcel| Arguments { bytes, fds: parcel.fds }));
        }
        None
    }

    fn report(&mut self, tag: u8, payload: &[u8], attachments: &[Attachment]) -> bool {
        let Some(shared) = self.shared.upgrade() else { return false };
        let encoded = EncodedMessage::new(payload.to_vec(), attachments.to_vec());
        let index = self.chunk.first + u64::from(self.next) - 1;
        shared.settle(&self.group, Block::Single(index, Some(Ok((tag, encoded)))));
        true
    }
}
