//! Admission to a pipe: a message is begun only when those under way leave room for it, so that none waits once begun.
//!
//! Messages that must not wait (a release, the answer to a request that was begun) are sent in any case, beyond the limit; so the bytes
//! under way are bounded by the limit and by the requests that were begun.

use crate::channel::Sender;
use crate::error::SendError;
use crate::wait::WaitQueue;
use crate::wire::EncodedMessage;
use std::collections::VecDeque;
use std::sync::Arc;

/// Bytes under way, beyond which nothing is begun.
const MOST: usize = 1 << 20;
/// Sizes that are kept, beyond which it is asked which messages were taken.
const KEPT: usize = 256;
/// The weight of a message beyond its bytes, and of one with descriptors, of which a socket holds few.
const HEAD: usize = 32;
const WITH_DESCRIPTORS: usize = MOST / 64;

/// The sending end of a pipe between a client and a manager.
pub(crate) struct Outlet {
    sender: Sender<EncodedMessage>,
    /// How much each message counts that may be under way, the oldest first, and all of them.
    sizes: VecDeque<usize>,
    sum: usize,
}

impl Outlet {
    pub(crate) fn new(sender: Sender<EncodedMessage>) -> Self {
        Self { sender: sender.beyond_limit(), sizes: VecDeque::new(), sum: 0 }
    }

    /// Returns `true` if something may be begun. If not, [`room`](Self::room) signals when to ask again.
    pub(crate) fn has_room(&mut self) -> bool {
        if self.sum >= MOST {
            self.forget_taken();
        }
        self.sum < MOST
    }

    fn forget_taken(&mut self) {
        let taken = self.sizes.len().saturating_sub(self.sender.under_way());
        self.sum -= self.sizes.drain(..taken).sum::<usize>();
    }

    /// Sends at once; true if the other end had to be woken. Otherwise the message comes back: with kind `Full` if its descriptors do not fit into the socket now, or the
    /// other end is at the memory of the pipe, and then [`room`](Self::room) signals when to try again; with kind `Io` if the
    /// kernel has no memory.
    pub(crate) fn send(&mut self, message: EncodedMessage) -> Result<bool, SendError<EncodedMessage>> {
        let size = message.bytes().len() + if message.has_attachments() { WITH_DESCRIPTORS } else { HEAD };
        let has_woken = self.sender.try_send_blindly(message)?;
        if self.sizes.len() >= KEPT {
            self.forget_taken();
        }
        self.sizes.push_back(size);
        self.sum += size;
        Ok(has_woken)
    }

    /// Where it is signalled that there is room again.
    pub(crate) fn room(&self) -> &Arc<WaitQueue> {
        self.sender.room()
    }
}
