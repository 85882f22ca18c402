//! A way between a client and a manager: pipes of this machine, a stream from elsewhere, or calls within the manager's process.
//!
//! Each end has one, and asks what it can carry; which of the three it is matters to nobody else. It is made with a function
//! that it calls when something may have come or there may be room, from whatever thread notices it. The function must not wait.

use crate::error::Result;
use crate::wait::WaitQueue;
use crate::wire::EncodedMessage;
use std::io;
use std::sync::Arc;

/// Called when there may be a message or room.
pub(crate) type Changed = Box<dyn Fn() + Send + Sync>;

pub(crate) trait Transport: Send + Sync {
    /// Returns `true` if a message can have descriptors. If so, both ends are of one family.
    fn carries_descriptors(&self) -> bool {
        true
    }

    /// Returns `true` if the client is part of the manager's process, where the object that a handle is part of counts it.
    fn is_inside(&self) -> bool {
        false
    }

    /// Returns `true` if something may be begun. If not, and [`arm`](Self::arm) was called, the change is signalled.
    fn has_room(&self) -> bool {
        true
    }

    /// Sends a message after all that was sent before, also beyond what there is room for. True if the other end had to be
    /// woken, or nobody knows. A message that failed was not sent; what comes after it is.
    fn send(&self, message: EncodedMessage) -> Result<bool>;

    /// Sends what must arrive as long as the connection stands, without waiting: perhaps later, and in order.
    fn post(&self, message: EncodedMessage) {
        // It fails if the connection has ended, and then it need not arrive.
        let _ = self.send(message);
    }

    /// Waits for a moment until the posted messages are on their way.
    fn press(&self) {}

    /// The next message, if one is there. An error is the last, and the end.
    fn recv(&self) -> Option<Result<EncodedMessage>> {
        None
    }

    /// Returns `true` if [`recv`](Self::recv) would yield something.
    fn has_message(&self) -> bool {
        true
    }

    /// Returns `true` if [`recv`](Self::recv) will come to the end by itself.
    fn has_hung_up(&self) -> bool {
        false
    }

    /// Where tasks of this process spin and sleep for messages, if those come by shared memory.
    fn queue(&self) -> Option<&Arc<WaitQueue>> {
        None
    }

    /// Sees to it that room is signalled. The caller asks once more afterwards.
    fn arm(&self) -> io::Result<()> {
        Ok(())
    }

    /// Ends the connection: the other end sees this one go.
    fn close(&self) {}
}
