//! Gives the memory of drained channels back after a time without use.
//!
//! A segment that large records came in keeps its memory when it is drained, mapped by both sides, so that the next such
//! record is one copy in and one copy out. How much is kept, by which process, and for how long:
//!
//! | memory | kept | until |
//! |---|---|---|
//! | a drained segment of up to 1 MiB (`ring::KEEP`) | by the channel | its last handle goes |
//! | one of up to [`MOST_KEPT`] | by the process that drained it, of all its channels up to [`MOST_KEPT_IN_ALL`] | it has not been used for [`IDLE`]: between that and twice that after its last record; or that process drops its last handle |
//! | one that is larger, or beyond these limits; in the fork server; one in which a record came that is decoded into more memory (`wire::needs_memory`) | - | it is drained |
//! | one of these that somebody else is putting to or taking from just then | by the process that drained it | [`IDLE`] later it is tried once more |
//! | a segment behind which there is another one | - | it is drained |
//!
//! "Used" means that at least half as many bytes as there is memory went through: small records alone do not keep it.
//! A process that keeps something has a thread for that, which ends when there is nothing left. It holds on to the memory of a
//! channel alone: the other end of a pipe learns at once that this end was dropped.
//!
//! # Death
//! If the keeper is killed first, what it kept stays with its channel until another process takes from the channel or tries
//! to: a consumer that finds it empty becomes the keeper. A process that waits for an item tries as soon as the death is noticed.

use super::ring::{Kept, Ring, WakeRequests, word};
use crate::os::background;
use crate::os::fork;
use crate::os::sync::lock;
use crate::wait::WaitQueue;
use std::io;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// Bytes that a drained channel keeps at most: two records of 256 MiB.
pub(super) const MOST_KEPT: u64 = 544 << 20;
/// Bytes that the drained channels of a process keep at most.
const MOST_KEPT_IN_ALL: u64 = 1 << 30;
const IDLE: Duration = Duration::from_secs(1);

/// A channel of this process, whose waiters it wakes.
pub(super) trait Notifies: Send + Sync {
    fn notify(&self, requests: WakeRequests);
}

/// A channel that may have memory to give back.
#[derive(Clone)]
struct Channel {
    ring: Arc<Ring>,
    core: Weak<dyn Notifies>,
}

impl Channel {
    /// Gives back what it keeps, unless somebody is at work there. Returns whether it keeps nothing now.
    fn give_back(&self) -> bool {
        let requests = self.ring.give_back_kept();
        if requests != WakeRequests::default() {
            self.notify(requests);
        }
        self.ring.kept().is_none()
    }

    /// Wakes the processes that asked for it meanwhile. This process may have let go of the channel since.
    fn notify(&self, requests: WakeRequests) {
        match self.core.upgrade() {
            Some(core) => core.notify(requests),
            // Only other processes are left. One that waits for an end that is gone learns that as a hang-up.
            None => [word::ROOM, word::ITEMS, word::JOINED].iter().for_each(|first| {
                let queue = WaitQueue::new(self.ring.region().clone(), *first, None);
                queue.iter().for_each(|queue| queue.notify_all());
            }),
        }
    }

    fn is(&self, watched: &Watched) -> bool {
        std::ptr::eq(Arc::as_ptr(&self.ring), watched.ring.as_ptr())
    }
}

struct Watched {
    ring: Weak<Ring>,
    core: Weak<dyn Notifies>,
    kept: Kept,
}

impl Watched {
    fn upgrade(&self) -> Option<Channel> {
        Some(Channel { ring: self.ring.upgrade()?, core: self.core.clone() })
    }
}

struct Keeper {
    watched: Vec<Watched>,
    has_thread: bool,
}

static KEEPER: Mutex<Keeper> = Mutex::new(Keeper { watched: Vec::new(), has_thread: false });

/// This process drained a channel, or found it drained: gives back what it keeps, later if that is within the limits.
pub(super) fn watch(ring: &Arc<Ring>, core: Weak<dyn Notifies>) {
    if fork::is_forked() {
        return;
    }
    let Some(kept) = ring.kept() else { return };
    if ring.watched() >= kept.bytes {
        return;
    }
    let channel = Channel { ring: ring.clone(), core };
    let is_admitted = lock(&KEEPER).admit(&channel, kept);
    if !is_admitted && !channel.give_back() {
        watch_again(&channel);
    }
}

/// Gives back at once what all drained channels of this process keep, for memory is short. False if nothing could be.
pub(super) fn give_back_all() -> bool {
    let watched = std::mem::take(&mut lock(&KEEPER).watched);
    let channels: Vec<_> = watched.iter().filter_map(Watched::upgrade).collect();
    let mut is_any_free = false;
    for channel in &channels {
        channel.ring.set_watched(0);
        match channel.give_back() {
            true => is_any_free = true,
            false => watch_again(channel),
        }
    }
    is_any_free
}

/// Channels that the thread has to look at.
#[derive(Default)]
struct Due {
    /// It was not used since.
    unused: Vec<Channel>,
    /// There is something in it: the process that drains it watches it again.
    not_drained: Vec<Channel>,
    /// It was used, and goes on being watched.
    used: Vec<Channel>,
}

impl Keeper {
    fn admit(&mut self, channel: &Channel, kept: Kept) -> bool {
        self.watched.retain(|other| !channel.is(other));
        let others: u64 = self.watched.iter().map(|other| other.kept.bytes).sum();
        let is_within = kept.bytes <= MOST_KEPT && others + kept.bytes <= MOST_KEPT_IN_ALL;
        let is_admitted = is_within && self.start().is_ok();
        channel.ring.set_watched(0);
        if is_admitted {
            self.add(channel, kept);
        }
        is_admitted
    }

    fn add(&mut self, channel: &Channel, kept: Kept) {
        channel.ring.set_watched(kept.bytes);
        self.watched.push(Watched { ring: Arc::downgrade(&channel.ring), core: channel.core.clone(), kept });
    }

    fn start(&mut self) -> io::Result<()> {
        if !self.has_thread {
            background::start("mp-reclaim", run)?;
            self.has_thread = true;
        }
        Ok(())
    }

    fn take_due(&mut self) -> Due {
        let mut due = Due::default();
        let mut all: u64 = self.watched.iter().map(|watched| watched.kept.bytes).sum();
        self.watched.retain_mut(|watched| {
            let Some(channel) = watched.upgrade() else { return false };
            let is_used = |now: &Kept| now.passed.wrapping_sub(watched.kept.passed) >= now.bytes / 2;
            let now = channel.ring.kept();
            // One that could only not be given back before is beyond the limits.
            let is_within = |now: &Kept| now.bytes <= MOST_KEPT && all <= MOST_KEPT_IN_ALL;
            let goes_on = now.is_some_and(|now| is_used(&now) && is_within(&now));
            all -= if goes_on { 0 } else { watched.kept.bytes };
            if let Some(now) = now.filter(|_| goes_on) {
                watched.kept = now;
            }
            channel.ring.set_watched(if goes_on { watched.kept.bytes } else { 0 });
            match now {
                Some(_) if goes_on => due.used.push(channel),
                Some(_) => due.unused.push(channel),
                None => due.not_drained.push(channel),
            }
            goes_on
        });
        due
    }
}

fn run() {
    loop {
        std::thread::sleep(IDLE);
        // Apart from the look, so that the last handle of a channel does not go under the lock.
        let due = lock(&KEEPER).take_due();
        due.unused.iter().for_each(|channel| _ = channel.give_back());
        // Somebody was at work there, or it was drained just before it was no longer watched.
        due.unused.iter().chain(&due.not_drained).for_each(watch_again);
        drop(due);
        let mut keeper = lock(&KEEPER);
        if keeper.watched.is_empty() {
            keeper.has_thread = false;
            return;
        }
    }
}

/// Has a channel that keeps something looked at after the next [`IDLE`], whatever the limits.
fn watch_again(channel: &Channel) {
    let mut keeper = lock(&KEEPER);
    let is_watched = keeper.watched.iter().any(|other| channel.is(other));
    // Without a thread the next consumer tries.
    if let Some(kept) = channel.ring.kept().filter(|_| !is_watched)
        && keeper.start().is_ok()
    {
        keeper.add(channel, kept);
    }
}
