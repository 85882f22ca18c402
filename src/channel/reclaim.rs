//! Gives the memory of drained channels back after a time without use.
//!
//! A segment that large records came in keeps its memory when it is drained, mapped by both sides, so that the next such
//! record is one copy in and one copy out. How much is kept, by whom, and for how long:
//!
//! | memory | kept | until |
//! |---|---|---|
//! | a drained segment of up to 1 MiB (`ring::KEEP`) | by the channel | its last handle goes |
//! | one of up to [`MOST_KEPT`] | by the process that drained it, of all its channels up to [`MOST_KEPT_IN_ALL`] | it has not been used for [`IDLE`]: between that and twice that after its last record; or that process drops its last handle |
//! | one that is larger, or beyond these limits; in the fork server; a record that is decoded into more memory (`wire::needs_memory`) | - | it is drained |
//! | a segment behind which there is another one | - | it is drained |
//!
//! "Used" means that at least half as many bytes as there is memory went through: small records alone do not keep it.
//! A process that keeps something has a thread for that, which ends when there is nothing left.
//!
//! # Death
//! If the keeper is killed first, what it kept stays with its channel until another process takes from the channel or tries
//! to: a taker that finds it empty becomes the keeper. Whoever waits for an item tries as soon as the death is noticed.

use crate::os::background;
use crate::os::fork;
use crate::os::sync::lock;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// Bytes that a drained channel keeps at most: two records of 256 MiB.
pub(super) const MOST_KEPT: u64 = 544 << 20;
/// Bytes that the drained channels of a process keep at most.
const MOST_KEPT_IN_ALL: u64 = 1 << 30;
const IDLE: Duration = Duration::from_secs(1);

/// The memory that a drained channel keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) bytes: u64,
    /// How far its records have come, in bytes that wrap around.
    pub(super) passed: u64,
}

/// A channel that may have memory to give back.
pub(super) trait Reclaim: Send + Sync {
    /// The memory that it keeps, if it is drained.
    fn kept(&self) -> Option<Kept>;
    /// Gives it back, if it is still drained.
    fn give_back(&self);
    /// Of how many bytes this process is the keeper.
    fn watched(&self) -> &AtomicU64;
}

struct Watched {
    channel: Weak<dyn Reclaim>,
    kept: Kept,
}

struct Keeper {
    watched: Vec<Watched>,
    has_thread: bool,
}

static KEEPER: Mutex<Keeper> = Mutex::new(Keeper { watched: Vec::new(), has_thread: false });

/// This process drained a channel, or found it drained: gives back what it keeps, later if that is within the limits.
pub(super) fn watch(channel: &Arc<impl Reclaim + 'static>) {
    if fork::is_forked() {
        return;
    }
    let Some(kept) = channel.kept() else { return };
    if channel.watched().load(Acquire) < kept.bytes && !lock(&KEEPER).admit(channel, kept) {
        channel.give_back();
    }
}

/// Gives back at once what all drained channels of this process keep, for memory is short. False if there is nothing.
pub(super) fn give_back_all() -> bool {
    let watched = std::mem::take(&mut lock(&KEEPER).watched);
    let channels: Vec<_> = watched.iter().filter_map(|watched| watched.channel.upgrade()).collect();
    for channel in &channels {
        channel.watched().store(0, Release);
        channel.give_back();
    }
    !channels.is_empty()
}

type Channels = Vec<Arc<dyn Reclaim>>;

impl Keeper {
    fn admit(&mut self, channel: &Arc<impl Reclaim + 'static>, kept: Kept) -> bool {
        let weak: Weak<dyn Reclaim> = Arc::downgrade(&(channel.clone() as Arc<dyn Reclaim>));
        self.watched.retain(|other| !Weak::ptr_eq(&other.channel, &weak));
        let others: u64 = self.watched.iter().map(|other| other.kept.bytes).sum();
        let is_admitted = kept.bytes <= MOST_KEPT && others + kept.bytes <= MOST_KEPT_IN_ALL && self.start().is_ok();
        channel.watched().store(if is_admitted { kept.bytes } else { 0 }, Release);
        if is_admitted {
            self.watched.push(Watched { channel: weak, kept });
        }
        is_admitted
    }

    fn start(&mut self) -> io::Result<()> {
        if !self.has_thread {
            background::start("mp-reclaim", run)?;
            self.has_thread = true;
        }
        Ok(())
    }

    /// Takes what has not been used since, which is to be given back, and what is in use: whoever drains that watches it again.
    fn take_due(&mut self) -> (Channels, Channels) {
        let (mut due, mut in_use) = (Vec::new(), Vec::new());
        self.watched.retain_mut(|watched| {
            let Some(channel) = watched.channel.upgrade() else { return false };
            let is_used = |now: &Kept| now.passed.wrapping_sub(watched.kept.passed) >= now.bytes / 2;
            match channel.kept() {
                Some(now) if is_used(&now) => {
                    watched.kept = now;
                    channel.watched().store(now.bytes, Release);
                    return true;
                }
                Some(_) => due.push(channel.clone()),
                None => in_use.push(channel.clone()),
            }
            channel.watched().store(0, Release);
            false
        });
        (due, in_use)
    }
}

fn run() {
    loop {
        std::thread::sleep(IDLE);
        let (due, in_use) = lock(&KEEPER).take_due();
        due.iter().for_each(|channel| channel.give_back());
        // Somebody was at work there, or it was drained just before it was no longer watched.
        due.iter().chain(&in_use).for_each(rewatch);
        drop((due, in_use));
        let mut keeper = lock(&KEEPER);
        if keeper.watched.is_empty() {
            keeper.has_thread = false;
            return;
        }
    }
}

/// Looks at a channel once more after the next [`IDLE`].
fn rewatch(channel: &Arc<dyn Reclaim>) {
    let mut keeper = lock(&KEEPER);
    let weak = Arc::downgrade(channel);
    let is_watched = keeper.watched.iter().any(|other| Weak::ptr_eq(&other.channel, &weak));
    if let Some(kept) = channel.kept().filter(|_| !is_watched) {
        channel.watched().store(kept.bytes, Release);
        keeper.watched.push(Watched { channel: weak, kept });
    }
}
