//! The last values that were sent, for any number of readers: what a watch and a broadcast are made of.
//!
//! # State
//! Words of the region's head, by name in [`word`]; then a row of three words for each slot: where its bytes lie in the region's
//! file, how many fit there, and how many there are. Value `n` is in slot `n % slots`. Senders hold one end of a socket pair,
//! readers look at the other: it hangs up when the last sender is gone.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | BEGUN n -> n + 1 | the holder of the lock | SeqCst, before a byte of slot `n % slots` changes | - |
//! | bytes and row of that slot | the holder of the lock | by system call, and Release | - |
//! | SENT n -> n + 1 | the holder of the lock | SeqCst: publishes the value | all |
//!
//! # Invariants
//! 1. Value `n` lies whole in its slot from SENT > n until BEGUN > n + slots. A reader copies it, looks at BEGUN, and throws away a
//!    copy that came too late. So a reader holds up nobody, and a sender no reader.
//! 2. One more slot than values that may be asked for: while a value is written, all those can be read.
//! 3. Rows are not trusted: a copy by them is bounded by the file, and is thrown away if they changed meanwhile.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | sending, before SENT | nothing; a value that is as old as can be may be gone | the next sender, which takes the lock over |
//! | sending, after SENT | the value; its recovery makes all sleepers try | - |
//! | the last sender | a socket that has hung up: what was sent, and then `Closed` | - |
//! | reading | nothing | - |
//!
//! # Cancel
//! A send has no await point. A dropped wait has taken nothing.

use crate::error::{Damage, Error, ErrorKind, Result, Topic};
use crate::os::sync::lock;
use crate::os::{fault, memfd, named, socket};
use crate::shm::atomic::{AtomicU64, fence};
use crate::shm::family::Family;
use crate::shm::mapped::Mapped;
use crate::shm::region::{PAGE, Region};
use crate::shm::robust_lock::RobustLock;
use crate::wait::{Hangup, WaitQueue, Waiters, sleepers};
use crate::wire::{self, Attachment, Parcel, attach};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering::*;
use std::sync::{Arc, Mutex};
use std::time::Duration;

mod word {
    use super::sleepers;
    pub(super) const MAGIC: usize = 0;
    pub(super) const SLOTS: usize = 1;
    pub(super) const LOCK: usize = 2;
    pub(super) const BEGUN: usize = 3;
    pub(super) const SENT: usize = 4;
    /// Where the next bytes can be placed.
    pub(super) const END: usize = 5;
    pub(super) const LINE: usize = 8;
    pub(super) const ROWS: usize = LINE + sleepers::LEN;
}

/// Words of a row.
const OFFSET: usize = 0;
const ROOM: usize = 1;
const LEN: usize = 2;
const ROW: usize = 3;

const MAGIC: u64 = u64::from_be_bytes(*b"mpRcnt01");
/// Values that one of these keeps at most.
pub(super) const MOST: usize = 1 << 20;
/// Bytes that a slot has room for at least.
const LEAST_ROOM: u64 = 64;
/// From this size on a length that is read is checked against the file before memory is taken for it.
const LARGE: u64 = 1 << 20;

/// The channel that it serves, and so how it is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) enum Shape {
    Watch,
    Broadcast,
}

impl Shape {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Watch => "watch",
            Self::Broadcast => "broadcast",
        }
    }
}

/// The outcome of reading.
pub(super) enum Found {
    Value(Vec<u8>),
    NotYet,
    /// So many values from there on are not kept any more.
    Lagged(u64),
}

pub(super) struct Recent {
    region: Arc<Region>,
    waiters: Waiters,
    hangup: Arc<Hangup>,
    /// Hangs up when no sender is left.
    senders: Arc<OwnedFd>,
    family: &'static Family,
    shape: Shape,
    slots: u64,
    /// The senders of this process take turns before they try for the lock.
    turn: Mutex<()>,
}

static MAPPED: Mapped<Recent> = Mapped::new();

/// The end of the socket pair that keeps readers from `Closed`.
#[derive(Clone)]
pub(super) struct Alive(Arc<OwnedFd>);

/// The facts that a handle carries beside its descriptors.
type Facts = (Shape, u64);

fn head_len(slots: u64) -> u64 {
    ((word::ROWS as u64 + ROW as u64 * slots) * 8).next_multiple_of(PAGE)
}

impl Recent {
    /// One that keeps `kept` values.
    pub(super) fn create(shape: Shape, kept: usize) -> Result<(Arc<Self>, Alive)> {
        let create = || {
            let slots = kept as u64 + 1;
            let region = Region::create("multiprocess-recent", head_len(slots) as usize, head_len(slots))?;
            let words = region.words();
            words[word::SLOTS].store(slots, Relaxed);
            words[word::END].store(head_len(slots), Relaxed);
            words[word::MAGIC].store(MAGIC, Release);
            let (ours, theirs) = socket::packet_pair()?;
            let recent = Self::of(Arc::new(region), Arc::new(theirs), shape, slots)?;
            let recent = MAPPED.or_make(recent.region.identity(), || Ok(recent.clone()))?;
            Ok((recent, Alive(Arc::new(ours))))
        };
        create().map_err(|error: io::Error| Error::io(format_args!("cannot create a {}", shape.name()), error))
    }

    fn of(region: Arc<Region>, senders: Arc<OwnedFd>, shape: Shape, slots: u64) -> io::Result<Arc<Self>> {
        let hangup = Hangup::new(senders.clone());
        let line = WaitQueue::new(region.clone(), word::LINE, Some(hangup.clone()))?;
        hangup.concerns(&[&line]);
        let (family, turn, waiters) = (Family::get()?, Mutex::default(), Waiters::new(line));
        Ok(Arc::new(Self { region, waiters, hangup, senders, family, shape, slots, turn }))
    }

    fn open(memory: OwnedFd, senders: OwnedFd, (shape, slots): Facts) -> io::Result<Arc<Self>> {
        MAPPED.or_make(memfd::identity(memory.as_fd())?, || {
            let invalid = || io::Error::new(io::ErrorKind::InvalidData, format!("it is no {}", shape.name()));
            if slots < 2 || slots > MOST as u64 + 1 {
                return Err(invalid());
            }
            let region = Region::open(memory, head_len(slots) as usize)?;
            let words = region.words();
            if words[word::MAGIC].load(Acquire) != MAGIC || words[word::SLOTS].load(Acquire) != slots {
                return Err(invalid());
            }
            Self::of(Arc::new(region), Arc::new(senders), shape, slots)
        })
    }

    fn facts(&self) -> Facts {
        (self.shape, self.slots)
    }

    pub(super) fn waiters(&self) -> &Waiters {
        &self.waiters
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &self.region.words()[index]
    }

    fn row(&self, number: u64) -> &[AtomicU64] {
        let first = word::ROWS + ROW * (number % self.slots) as usize;
        &self.region.words()[first..first + ROW]
    }

    /// Returns how many values have been sent.
    pub(super) fn sent(&self) -> u64 {
        self.word(word::SENT).load(SeqCst)
    }

    /// The number of the oldest value that may be asked for.
    pub(super) fn oldest(&self) -> u64 {
        self.sent().saturating_sub(self.slots - 1)
    }

    /// Sends a value. Nothing was sent if this fails.
    pub(super) fn send<T: Serialize + 'static>(&self, value: &T) -> Result<()> {
        let message = wire::encode(value)?;
        if !message.attachments.is_empty() {
            let why = format!(
                "a value in a {} is read by any number of processes, so it must have no handle in it (a queue, a lock, a \
                 descriptor): send such a value through a queue or a pipe",
                self.shape.name()
            );
            return Err(Error::new(ErrorKind::Encode, why).explained_by(Topic::HandleInBroadcast));
        }
        let failed = |error| Error::io(format_args!("cannot send to a {}", self.shape.name()), error);
        self.push(message.payload(value)).map_err(failed)?;
        self.waiters.notify_all();
        Ok(())
    }

    fn push(&self, bytes: &[u8]) -> io::Result<()> {
        let me = self.family.me()?;
        let _turn = lock(&self.turn);
        let lock_word = RobustLock(self.word(word::LOCK));
        let mut tries = 0;
        while lock_word.try_take(me, self.family).is_none() {
            tries += 1;
            match tries {
                ..100 => std::thread::yield_now(),
                100..10_000 => std::thread::sleep(Duration::from_micros(100)),
                _ => {
                    let why = "another process is in the middle of a send, and is stopped";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
            }
        }
        fault::point("send.taken");
        let pushed = self.push_locked(bytes);
        // A process that waits for the lock tries again by itself.
        let _ = lock_word.release();
        fault::point("send.released");
        pushed
    }

    fn push_locked(&self, bytes: &[u8]) -> io::Result<()> {
        let number = self.sent();
        let (row, len) = (self.row(number), bytes.len() as u64);
        self.word(word::BEGUN).store(number.wrapping_add(1), SeqCst);
        fault::point("send.begun");
        if row[ROOM].load(Acquire) < len {
            self.make_room(row, len)?;
        }
        named::write(self.region.fd().as_fd(), self.place(row)?, bytes)?;
        row[LEN].store(len, Release);
        fault::point("send.written");
        self.word(word::SENT).store(number.wrapping_add(1), SeqCst);
        fault::point("send.published");
        Ok(())
    }

    /// Where the slot lies, if it lies within what is made for slots.
    fn place(&self, row: &[AtomicU64]) -> io::Result<u64> {
        let (offset, room) = (row[OFFSET].load(Acquire), row[ROOM].load(Acquire));
        let (first, end) = (head_len(self.slots), self.word(word::END).load(Acquire));
        let is_inside = room == 0 || offset >= first && offset.checked_add(room).is_some_and(|past| past <= end);
        if is_inside { Ok(offset) } else { Err(self.damaged("a value beyond its memory")) }
    }

    #[cold]
    fn damaged(&self, why: &'static str) -> io::Error {
        Damage::error(self.shape.name(), self.region.identity(), why)
    }

    /// Gives a slot a larger place. A death in here leaves the old place or the new one, with room for no more than it has.
    fn make_room(&self, row: &[AtomicU64], len: u64) -> io::Result<()> {
        let room = len.max(LEAST_ROOM).next_power_of_two();
        // A buffer that fills pages begins at one, so that it can be given back.
        let grain = if room >= PAGE { PAGE } else { LEAST_ROOM };
        let end = self.word(word::END).load(Acquire);
        self.region.check_extent(0, end).map_err(|_| self.damaged("where its memory ends"))?;
        let offset = end.checked_next_multiple_of(grain);
        let past = offset.and_then(|offset| offset.checked_add(room));
        let (Some(offset), Some(past)) = (offset, past) else { return Err(self.damaged("where its memory ends")) };
        self.region.reserve(offset, room)?;
        self.word(word::END).store(past, Release);
        let (old, old_room) = (row[OFFSET].load(Acquire), row[ROOM].load(Acquire));
        row[OFFSET].store(offset, Release);
        row[ROOM].store(room, Release);
        if old_room >= PAGE && old.is_multiple_of(PAGE) {
            // Failing to give memory back costs memory, nothing else.
            let _ = memfd::give_back(self.region.fd().as_fd(), old, old_room);
        }
        Ok(())
    }

    /// Value `number`, if it is there.
    pub(super) fn find(&self, number: u64) -> io::Result<Found> {
        loop {
            let oldest = self.oldest();
            if number >= self.sent() {
                return Ok(Found::NotYet);
            }
            if number < oldest {
                return Ok(Found::Lagged(oldest - number));
            }
            let copied = self.copy(self.row(number));
            fence(SeqCst);
            if self.word(word::BEGUN).load(SeqCst) <= number.saturating_add(self.slots) {
                return copied.map(Found::Value);
            }
            // A value that was begun since did not come before all others were sent.
            if self.oldest() <= number {
                return Err(self.damaged("how many values were begun"));
            }
        }
    }

    fn copy(&self, row: &[AtomicU64]) -> io::Result<Vec<u8>> {
        let (offset, len) = (row[OFFSET].load(Acquire), row[LEN].load(Acquire));
        if len >= LARGE {
            self.region.check_extent(offset, len).map_err(|_| self.damaged("a value beyond its memory"))?;
        }
        let mut bytes = vec![0; len as usize];
        named::read(self.region.fd().as_fd(), offset, &mut bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput => self.damaged("a value beyond its memory"),
            _ => error,
        })?;
        Ok(bytes)
    }

    /// Value `number`, for an attempt that is made again when one is sent and when the last sender goes; or the error that ends
    /// the wait for it.
    pub(super) fn next(&self, number: u64) -> Option<Result<Vec<u8>>> {
        self.look(|| self.find(number), Hangup::is_known)
    }

    /// The same now.
    pub(super) fn try_next(&self, number: u64) -> Option<Result<Vec<u8>>> {
        self.look(|| self.find(number), Hangup::has_happened)
    }

    fn look(&self, find: impl Fn() -> io::Result<Found>, is_gone: fn(&Hangup) -> bool) -> Option<Result<Vec<u8>>> {
        let failed = |error| Error::io(format_args!("cannot read from a {}", self.shape.name()), error);
        let found = |found: io::Result<Found>| match found {
            Ok(Found::Value(bytes)) => Some(Ok(bytes)),
            Ok(Found::NotYet) => None,
            Ok(Found::Lagged(skipped)) => Some(Err(Error::lagged_by(skipped))),
            Err(error) => Some(Err(failed(error))),
        };
        // Values sent before the last sender went come first: try once more.
        found(find()).or_else(|| if is_gone(&self.hangup) { found(find()).or(Some(Err(self.closed()))) } else { None })
    }

    /// Returns `true` if all senders are gone, as of now.
    pub(super) fn is_closed(&self) -> bool {
        self.hangup.has_happened()
    }

    /// The same for an attempt that is made again when it happens.
    pub(super) fn is_known_closed(&self) -> bool {
        self.hangup.is_known()
    }

    pub(super) fn closed(&self) -> Error {
        Error::new(ErrorKind::Closed, format!("all senders of the {} are gone", self.shape.name()))
    }

    /// A watch without a value, which it has from the beginning.
    pub(super) fn without_value(&self) -> Error {
        self.failed(self.damaged("how many values were sent"))
    }

    pub(super) fn failed(&self, error: io::Error) -> Error {
        Error::io(format_args!("cannot wait for a {}", self.shape.name()), error)
    }

    pub(super) fn timed_out(&self) -> Error {
        Error::new(ErrorKind::Timeout, format!("nothing was sent to the {} in time", self.shape.name()))
    }

    fn attachments(&self) -> [Attachment; 2] {
        [self.region.fd(), &self.senders].map(|fd| Attachment::Of("watch or broadcast", fd.clone()))
    }
}

/// The value that `bytes` are.
pub(super) fn decode<T: DeserializeOwned + 'static>(bytes: Vec<u8>) -> Result<T> {
    wire::decode(Parcel { bytes, fds: Vec::new() })
}

/// A reader is sent as the memory and the socket that hangs up after the last sender; `place`: its other fields.
pub(super) fn serialize_reader<S: Serializer>(recent: &Recent, place: u64, serializer: S) -> Result<S::Ok, S::Error> {
    attach::serialize_handle(serializer, recent.attachments(), (recent.facts(), place))
}

pub(super) fn deserialize_reader<'de, D: Deserializer<'de>>(
    shape: Shape,
    deserializer: D,
) -> Result<(Arc<Recent>, u64), D::Error> {
    let ([memory, senders], (facts, place)): (_, (Facts, u64)) = attach::deserialize_handle(deserializer)?;
    Ok((open::<D>(shape, memory, senders, facts)?, place))
}

/// A sender is sent as the same, and the descriptor that shows that it is there.
pub(super) fn serialize_sender<S: Serializer>(
    recent: &Recent,
    alive: &Alive,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let alive = [Attachment::Shared(alive.0.clone())];
    attach::serialize_handle(serializer, recent.attachments().into_iter().chain(alive), recent.facts())
}

pub(super) fn deserialize_sender<'de, D: Deserializer<'de>>(
    shape: Shape,
    deserializer: D,
) -> Result<(Arc<Recent>, Alive), D::Error> {
    let ([memory, senders, alive], facts): (_, Facts) = attach::deserialize_handle(deserializer)?;
    Ok((open::<D>(shape, memory, senders, facts)?, Alive(Arc::new(alive))))
}

fn open<'de, D: Deserializer<'de>>(
    shape: Shape,
    memory: OwnedFd,
    senders: OwnedFd,
    facts: Facts,
) -> Result<Arc<Recent>, D::Error> {
    if facts.0 != shape {
        return Err(D::Error::custom(format_args!("not a {} but a {}", shape.name(), facts.0.name())));
    }
    let failed =
        |error: io::Error| D::Error::custom(Error::io(format_args!("a {} cannot be opened", shape.name()), error));
    Recent::open(memory, senders, facts).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(recent: &Recent, numbers: std::ops::Range<u64>) -> Vec<String> {
        let text = |number| match recent.find(number).unwrap() {
            Found::Value(bytes) => decode::<String>(bytes).unwrap(),
            Found::NotYet => "-".into(),
            Found::Lagged(by) => format!("lagged {by}"),
        };
        numbers.map(text).collect()
    }

    #[test]
    fn the_last_values_are_kept_and_older_ones_are_counted() {
        let (recent, _alive) = Recent::create(Shape::Broadcast, 2).unwrap();
        assert_eq!(texts(&recent, 0..1), ["-"]);
        for text in ["a", "b", "c"] {
            recent.send(&text.to_string()).unwrap();
        }
        assert_eq!(texts(&recent, 0..4), ["lagged 1", "b", "c", "-"]);
    }

    #[test]
    fn values_of_any_size_take_turns_in_a_slot() {
        let (recent, _alive) = Recent::create(Shape::Broadcast, 1).unwrap();
        let sizes = [0, 1, 63, 64, 65, 5000, 3, 1 << 20, 10, 3 << 20, 70_000];
        for (number, size) in sizes.into_iter().enumerate() {
            let text = "x".repeat(size);
            recent.send(&text).unwrap();
            assert!(texts(&recent, number as u64..number as u64 + 1)[0] == text, "{size}");
        }
    }

    #[test]
    fn a_value_that_is_overwritten_while_it_is_copied_is_thrown_away() {
        let (recent, _alive) = Recent::create(Shape::Broadcast, 1).unwrap();
        recent.send(&"a".to_string()).unwrap();
        recent.send(&"b".to_string()).unwrap();
        // A sender died when it had begun the third, which is where the first was; the second is still there.
        recent.word(word::BEGUN).store(3, SeqCst);
        assert_eq!(texts(&recent, 0..2), ["lagged 1", "b"]);
    }

    #[test]
    fn words_that_cannot_be_are_an_error_and_no_endless_loop() {
        for (index, bits, is_read) in [
            (word::BEGUN, u64::MAX, true),
            (word::BEGUN, 1 << 40, true),
            (word::END, u64::MAX, false),
            (word::END, u64::MAX - 63, false),
            (word::END, 1 << 45, false),
            (word::END, 0, false),
        ] {
            let (recent, _alive) = Recent::create(Shape::Broadcast, 1).unwrap();
            recent.send(&"a".to_string()).unwrap();
            recent.word(index).store(bits, SeqCst);
            let error = match is_read {
                true => recent.try_next(0).unwrap().unwrap_err(),
                false => recent.send(&"b".repeat(100_000)).unwrap_err(),
            };
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{index} {bits}: {error}");
            assert_eq!(recent.word(word::LOCK).load(SeqCst), 0, "the lock is free");
        }
    }

    #[test]
    fn a_row_that_leads_out_of_the_memory_is_not_written_to() {
        let (recent, _alive) = Recent::create(Shape::Broadcast, 1).unwrap();
        recent.send(&"a".to_string()).unwrap();
        for (offset, room) in [(1 << 50, 64), (0, 64), (8192, u64::MAX >> 2)] {
            recent.row(1)[OFFSET].store(offset, SeqCst);
            recent.row(1)[ROOM].store(room, SeqCst);
            assert_eq!(recent.send(&"b".to_string()).unwrap_err().kind(), ErrorKind::Corrupt, "{offset} {room}");
        }
    }

    #[test]
    fn a_row_that_leads_out_of_the_file_is_an_error() {
        let (recent, _alive) = Recent::create(Shape::Broadcast, 1).unwrap();
        recent.send(&"a".to_string()).unwrap();
        for (offset, len) in [(1 << 50, 5), (1 << 62, 1 << 32), (8192, u64::MAX >> 2)] {
            recent.row(0)[OFFSET].store(offset, SeqCst);
            recent.row(0)[LEN].store(len, SeqCst);
            assert_eq!(recent.try_next(0).unwrap().unwrap_err().kind(), ErrorKind::Corrupt, "{offset} {len}");
        }
    }
}
