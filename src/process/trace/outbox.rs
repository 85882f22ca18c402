//! The child's end: sends records, and never waits for the process that reads them.
#![forbid(unsafe_code)]

use super::record::Message;
use super::recorder::{Recorder, Sink};
use crate::os::socket::{self, Wait};
use crate::os::sync::lock;
use crate::os::{fault, fork};
use crate::wire;
use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use tracing::Dispatch;
use tracing::dispatcher::{self, DefaultGuard};
use tracing::subscriber::NoSubscriber;

/// So many bytes of records wait in a child, at most.
pub(super) const MOST_WAITING: usize = 1 << 20;

/// So many bytes go into one packet, or one record. Never longer than [`LONGEST`].
const PACKET: usize = 32 << 10;

/// The longest packet. A longer record is dropped.
pub(super) const LONGEST: usize = 128 << 10;

/// How long a child with records that wait for room stays at its end, for the process that reads them to catch up.
const LAST_WAIT: Duration = Duration::from_millis(100);

/// The recorder of this process, whose starter listens to it.
static RECORDER: OnceLock<(Arc<Recorder<Outbox>>, Dispatch)> = OnceLock::new();

/// Has this process's spans and events sent over `socket`, beginning with those of this thread.
pub(in crate::process) fn begin(level: u8, socket: OwnedFd) {
    if has_subscriber() {
        return;
    }
    let (recorder, _) = RECORDER.get_or_init(|| {
        let recorder = Arc::new(Recorder::new(level, Outbox::over(socket)).giving_way());
        let dispatch = Dispatch::new(recorder.clone());
        (recorder, dispatch)
    });
    recorder.begin();
    // This thread ends with the process.
    std::mem::forget(on_this_thread());
}

/// Has the spans and events of this thread sent, too, until the guard is dropped. `None` if nobody listens to this process, or the thread has a
/// subscriber.
pub(crate) fn on_this_thread() -> Option<DefaultGuard> {
    let (_, dispatch) = RECORDER.get()?;
    (!has_subscriber()).then(|| dispatcher::set_default(dispatch))
}

fn has_subscriber() -> bool {
    !dispatcher::get_default(Dispatch::is::<NoSubscriber>)
}

/// Sends what waits, as far as there is room.
pub(in crate::process) fn flush() {
    if let Some((recorder, _)) = RECORDER.get() {
        recorder.sink.flush();
    }
}

/// Sends what waits, for a short time, and nothing from then on. Returns the number of records that the starter does not get to know of.
pub(in crate::process) fn finish() -> u64 {
    RECORDER.get().map_or(0, |(recorder, _)| recorder.sink.finish())
}

/// Records on their way to the starter.
pub(super) struct Outbox {
    /// Records are of this process, not of one that its function forks. Dropped before the socket.
    _private: fork::Private,
    socket: OwnedFd,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    /// Records, each behind its length.
    records: VecDeque<Vec<u8>>,
    bytes: usize,
    /// How many were dropped since the last packet.
    dropped: u64,
    /// Nobody reads any more.
    is_over: bool,
}

impl Outbox {
    pub(super) fn over(socket: OwnedFd) -> Self {
        Self { _private: fork::Private::mark(socket.as_fd()), socket, waiting: Mutex::default() }
    }

    fn flush(&self) {
        if !fork::is_forked() {
            lock(&self.waiting).send(&self.socket);
        }
    }

    fn finish(&self) -> u64 {
        if fork::is_forked() {
            return 0;
        }
        let deadline = Instant::now() + LAST_WAIT;
        loop {
            let mut waiting = lock(&self.waiting);
            waiting.send(&self.socket);
            let left = deadline.saturating_duration_since(Instant::now());
            if waiting.is_empty() || left.is_zero() {
                let lost = waiting.dropped + waiting.records.len() as u64;
                *waiting = Waiting { is_over: true, ..Waiting::default() };
                return lost;
            }
            drop(waiting);
            socket::is_writable_within(self.socket.as_fd(), left);
        }
    }
}

impl Sink for Outbox {
    fn take(&self, message: Message) -> bool {
        if fork::is_forked() {
            return false;
        }
        let record = encode(&message);
        let must_stay = matches!(message, Message::Close { .. });
        let mut waiting = lock(&self.waiting);
        let is_taken = record.is_some_and(|record| waiting.push(record, must_stay, &self.socket));
        fault::point("trace.taken");
        waiting.send(&self.socket);
        fault::point("trace.sent");
        is_taken
    }
}

/// A message behind its length.
fn encode(message: &Message) -> Option<Vec<u8>> {
    let mut record = vec![0; 4];
    wire::append(message, &mut record).ok()?;
    let len = u32::try_from(record.len() - 4).ok()?;
    record[..4].copy_from_slice(&len.to_le_bytes());
    Some(record)
}

/// The records of a packet, without their lengths. A record that is cut off is left out.
pub(super) fn records(mut packet: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (len, rest) = packet.split_first_chunk()?;
        let (record, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        packet = rest;
        Some(record)
    })
}

/// The number of records that were dropped before a packet, and the rest of it.
pub(super) fn dropped_before(packet: &[u8]) -> (u64, &[u8]) {
    packet.split_first_chunk().map_or((0, &[]), |(dropped, rest)| (u64::from_le_bytes(*dropped), rest))
}

/// The length of the number of dropped records.
const HEAD: usize = 8;

impl Waiting {
    fn is_empty(&self) -> bool {
        self.records.is_empty() && self.dropped == 0
    }

    /// Takes a record, if there is room for it or it `must_stay`: the end of a span that the starter has open.
    fn push(&mut self, record: Vec<u8>, must_stay: bool, socket: &OwnedFd) -> bool {
        if self.is_over {
            return false;
        }
        if self.bytes + record.len() > MOST_WAITING {
            self.send(socket);
        }
        if record.len() > LONGEST - HEAD || !must_stay && self.bytes + record.len() > MOST_WAITING {
            self.dropped += 1;
            return false;
        }
        self.bytes += record.len();
        self.records.push_back(record);
        true
    }

    /// Sends what there is room for.
    fn send(&mut self, socket: &OwnedFd) {
        while !self.is_empty() && !self.is_over {
            let head = self.dropped.to_le_bytes();
            let (mut slices, mut len) = (vec![IoSlice::new(&head)], 0);
            for record in &self.records {
                let is_full = len > 0 && len + record.len() > PACKET || slices.len() == MOST_SLICES;
                if is_full {
                    break;
                }
                slices.push(IoSlice::new(record));
                len += record.len();
            }
            let sent = slices.len() - 1;
            match socket::send(socket.as_fd(), &slices, &[], Wait::No) {
                Ok(()) => {
                    self.records.drain(..sent);
                    self.bytes -= len;
                    self.dropped = 0;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // Without memory it is tried again with a later record.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM)) => return,
                // Too long for the buffer of the socket, by the settings of this machine.
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) && sent > 0 => {
                    self.records.drain(..sent);
                    self.bytes -= len;
                    self.dropped += sent as u64;
                }
                Err(_) => *self = Self { is_over: true, ..Self::default() },
            }
        }
    }
}

/// So many records go into one packet.
const MOST_SLICES: usize = 256;

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    fn close(id: u64) -> Message {
        Message::Close { id }
    }

    fn read(socket: &OwnedFd) -> Option<(u64, usize)> {
        let mut buffer = vec![0; LONGEST];
        let packet = socket::recv(socket.as_fd(), &mut buffer, Wait::No).ok()?;
        let (dropped, rest) = dropped_before(&buffer[..packet.len]);
        Some((dropped, records(rest).count()))
    }

    #[test]
    fn records_without_room_wait_and_then_arrive_or_are_counted() {
        let (ours, theirs) = socket::packet_pair().unwrap();
        let outbox = Outbox::over(theirs);
        let (mut taken, mut dropped) = (0, 0);
        let long = || Message::Record { id: 1, values: Default::default() };
        while dropped < 10 {
            if outbox.take(long()) { taken += 1 } else { dropped += 1 }
        }
        assert!(outbox.take(close(1)), "the end of a span always has room");
        let (mut seen, mut lost) = (0, 0);
        while let Some((dropped, records)) = read(&ours) {
            (seen, lost) = (seen + records, lost + dropped);
            outbox.flush();
        }
        assert_eq!((seen, lost), (taken + 1, 10));
        assert_eq!(outbox.finish(), 0);
        assert!(!outbox.take(close(2)), "nothing is sent after the end");
    }

    #[test]
    fn records_that_nobody_reads_are_counted_at_the_end() {
        let (_ours, theirs) = socket::packet_pair().unwrap();
        let outbox = Outbox::over(theirs);
        while lock(&outbox.waiting).records.len() < 5 {
            assert!(outbox.take(close(1)));
        }
        assert_eq!(outbox.finish(), 5);
    }

    #[test]
    fn records_for_a_reader_that_is_gone_are_not_kept() {
        let (ours, theirs) = socket::packet_pair().unwrap();
        let outbox = Outbox::over(theirs);
        drop(ours);
        outbox.take(close(1));
        assert!(!outbox.take(close(2)) && lock(&outbox.waiting).records.is_empty());
        assert_eq!(outbox.finish(), 0);
    }
}
