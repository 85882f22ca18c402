//! Items on lease: taken, given back, done with.

use super::{ChannelCore, Later, Tried, flatten, when_not_busy};
use crate::channel::descriptors::{self, Kept};
use crate::channel::extents::corrupt;
use crate::channel::leases::{Back, Held, KEPT, word};
use crate::channel::ring::Pop;
use crate::channel::ring::lease::{Descriptors, Leasing};
use crate::error::{Damage, Error, ErrorKind, Result};
use crate::os::{fault, memory};
use crate::shm::atomic::fence;
use crate::wait::{WaitQueue, refuse_inside_async, until};
use crate::wire::{self, Parcel};
use serde::de::DeserializeOwned;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::*;
use std::time::Duration;

/// The sockets of a queue: descriptors of items in it go one way, those of leased items wait in the other direction.
struct Sockets<'a>(&'a ChannelCore);

impl Descriptors for Sockets<'_> {
    fn copy(&self, number: u64, count: usize) -> io::Result<Option<Vec<OwnedFd>>> {
        if number & KEPT == 0 {
            return descriptors::copy_fds(self.0.rx.as_fd(), number, count);
        }
        let number = number & !KEPT;
        if let Some(fds) = self.0.kept().copy(number, count, self.0.is_kept()?)? {
            return Ok(Some(fds));
        }
        // Its holder died before it had moved them.
        let fds = descriptors::copy_fds(self.0.rx.as_fd(), number, count)?;
        if let Some(fds) = &fds {
            self.keep(number, fds)?;
            self.drop(number);
        }
        Ok(fds)
    }

    fn drop(&self, number: u64) {
        match number & KEPT {
            0 => descriptors::drop_fds(self.0.rx.as_fd(), number),
            // The next process that looks for descriptors drops those that stay.
            _ => _ = self.0.is_kept().and_then(|wanted| self.0.kept().drop(number & !KEPT, wanted)),
        }
    }

    fn keep(&self, number: u64, fds: &[OwnedFd]) -> io::Result<()> {
        // Without room the item has none when it comes back: an error for its consumer, as if they were lost.
        descriptors::keep_fds(self.0.rx.as_fd(), number & !KEPT, fds).map(drop)
    }
}

/// An item on lease that is being decoded: dropped, it is given back.
struct Unread<'a>(&'a ChannelCore, Option<Held>);

impl Drop for Unread<'_> {
    fn drop(&mut self) {
        self.1.iter().for_each(|held| self.0.give_back(held));
    }
}

impl ChannelCore {
    /// The descriptors of an item, wherever they wait.
    pub(super) fn take_descriptors(&self, number: u64, count: usize) -> io::Result<Vec<OwnedFd>> {
        if number & KEPT == 0 {
            return descriptors::take_fds(self.rx.as_fd(), number, count);
        }
        let number = number & !KEPT;
        match self.kept().take(number, count, self.is_kept()?)? {
            Some(fds) => Ok(fds),
            // Its holder died before it had moved them.
            None => descriptors::take_fds(self.rx.as_fd(), number, count),
        }
    }

    fn kept(&self) -> Kept<'_> {
        Kept { outlet: self.tx.as_fd(), inlet: self.rx.as_fd() }
    }

    /// Returns `true` if descriptors that are kept under a number are still those of an item.
    fn is_kept(&self) -> io::Result<impl Fn(u64) -> bool> {
        let leases = self.ring.leases()?;
        Ok(move |number| leases.as_ref().is_some_and(|leases| leases.has_number(number)))
    }

    /// One try to take an item on lease, with its notices.
    fn pop_lease<T: 'static>(&self) -> Result<Tried<(Held, Parcel)>> {
        let buffer = || if wire::takes_buffer::<T>() { Vec::new() } else { wire::spare() };
        let payload = |len: usize| (memory::with_room(buffer(), len), wire::needs_memory_beside_buffer::<T>(len));
        loop {
            let (result, requests) = self.ring.lease(payload, &Sockets(self));
            self.notify(requests);
            self.watch_idle();
            let made_room = match &result {
                Ok(Leasing::Empty | Leasing::Closed | Leasing::Busy) => false,
                Ok(Leasing::Leased(_, _, fds)) => self.ring.is_limited() || !fds.is_empty(),
                Err(error) => !Damage::is_in(error),
            };
            if made_room {
                self.room.notify_one();
            }
            if result.as_ref().is_err_and(|error| !Damage::is_in(error)) {
                self.items.notify_one();
            }
            match result.map_err(|error| self.failed("lease from", error))? {
                Leasing::Leased(held, bytes, fds) => return Ok(Tried::Done((held, Parcel { bytes, fds }))),
                Leasing::Closed => return Err(self.closed()),
                Leasing::Empty => return Ok(Tried::NotNow),
                Leasing::Busy if self.ring.contend_get() => return Ok(Tried::Busy),
                Leasing::Busy => {}
            }
        }
    }

    fn decode_lease<T: DeserializeOwned + 'static>(&self, (held, parcel): (Held, Parcel)) -> Result<(Held, T)> {
        // A panic while it is decoded gives it back.
        let mut unread = Unread(self, Some(held));
        let decoded = wire::decode(parcel);
        let Some(held) = unread.1.take() else { unreachable!("it was put there just now") };
        match &decoded {
            Ok(_) => {}
            // It ends among the dead letters.
            Err(_) if self.has_max_deliveries() => self.give_back(&held),
            // It cannot be read by the next one either.
            Err(_) => drop(self.commit(&held)),
        }
        decoded.map(|value| (held, value))
    }

    pub(in crate::channel) async fn lease<T: DeserializeOwned + 'static>(&self) -> Result<(Held, T)> {
        let waited = until(&self.items, || self.pop_lease::<T>().later()).await;
        self.decode_lease(flatten(waited.map_err(|error| self.failed("wait for", error)))?)
    }

    pub(in crate::channel) async fn lease_timeout<T: DeserializeOwned + 'static>(
        &self,
        timeout: Duration,
    ) -> Result<(Held, T)> {
        self.in_time(timeout, self.lease()).await
    }

    pub(in crate::channel) fn try_lease<T: DeserializeOwned + 'static>(&self) -> Result<(Held, T)> {
        match when_not_busy(|| self.pop_lease::<T>())? {
            Some(leased) => self.decode_lease(leased),
            None => Err(Error::new(ErrorKind::Empty, format!("the {} is empty", self.what))),
        }
    }

    #[track_caller]
    pub(in crate::channel) fn blocking_lease<T: DeserializeOwned + 'static>(&self) -> Result<(Held, T)> {
        refuse_inside_async();
        self.decode_lease(self.block(&self.items, None, || self.pop_lease::<T>().later())?)
    }

    /// The item of a lease is done with.
    ///
    /// # Errors
    /// `Corrupt`: no other process takes it from its holder.
    pub(in crate::channel) fn commit(&self, held: &Held) -> Result<()> {
        let failed = |error| self.failed("commit a lease of", error);
        let leases = self.ring.leases().map_err(failed)?;
        fault::point("commit.begun");
        if !leases.is_some_and(|leases| leases.commit(held)) {
            return Err(failed(corrupt("a lease that its holder has not")));
        }
        fault::point("commit.done");
        if held.fds().1 > 0 {
            self.drop_kept(held);
        }
        self.notify(self.ring.tidy(held));
        self.one_less();
        Ok(())
    }

    /// The descriptors that were kept for a lease are needed no more.
    fn drop_kept(&self, held: &Held) {
        let drop_kept = || {
            let (dropped, requests) = self.ring.drop_kept(held, &Sockets(self));
            self.notify(requests);
            match dropped {
                Ok(true) => Ok(Tried::Done(())),
                Ok(false) => Ok(Tried::Busy),
                // They were lost before.
                Err(_) => Ok(Tried::Done(())),
            }
        };
        // If somebody is stopped while it takes, the next item with descriptors drops them.
        let _ = when_not_busy(drop_kept);
    }

    /// A lease ends without a commit.
    pub(in crate::channel) fn give_back(&self, held: &Held) {
        let Ok(Some(leases)) = self.ring.leases() else { return };
        fault::point("return.begun");
        match leases.give_back(held) {
            Back::Again => {
                fault::point("return.done");
                self.items.notify_one();
            }
            Back::DeadLetter => {
                fault::point("return.dead");
                self.joined.notify_all();
                self.one_less();
            }
        }
    }

    /// One item less is leased: a consumer of a closed queue, or a join, may be at the end.
    pub(super) fn one_less(&self) {
        // Of two that finish the last two items at once, one sees both done.
        fence(SeqCst);
        if self.ring.is_closed() {
            self.items.notify_all();
        }
        // The waiters find the damage as well.
        if self.is_joinable && self.is_finished().unwrap_or(true) {
            self.joined.notify_all();
        }
    }

    fn has_max_deliveries(&self) -> bool {
        self.ring.region().words()[word::MOST_DELIVERIES].load(Acquire) != 0
    }

    pub(in crate::channel) fn set_max_deliveries(&self, most: u32) {
        self.ring.region().words()[word::MOST_DELIVERIES].store(most.into(), Release);
        // Some may be dead letters by now.
        self.items.notify_all();
        self.joined.notify_all();
    }

    fn pop_dead_letter(&self) -> Result<Tried<Parcel>> {
        loop {
            let (result, requests) = self.ring.pop_dead_letter(&Sockets(self));
            self.notify(requests);
            match result.map_err(|error| self.failed("take from", error))? {
                Pop::Got(bytes, fds) => return Ok(Tried::Done(Parcel { bytes, fds })),
                Pop::Empty | Pop::Closed => return Ok(Tried::NotNow),
                Pop::Busy if self.ring.contend_get() => return Ok(Tried::Busy),
                Pop::Busy => {}
            }
        }
    }

    /// Waiters for dead letters: at the same event as those that join, as waiters of their own.
    fn dead_letters_queue(&self) -> Result<&Arc<WaitQueue>> {
        if let Some(queue) = self.dead_letters.get() {
            return Ok(queue);
        }
        let queue = WaitQueue::new(self.ring.region().clone(), crate::channel::ring::word::JOINED, None);
        let queue = queue.map_err(|error| self.failed("wait for a dead letter of", error))?;
        Ok(self.dead_letters.get_or_init(|| queue))
    }

    pub(in crate::channel) async fn dead_letter<T: DeserializeOwned + 'static>(&self) -> Result<T> {
        let queue = self.dead_letters_queue()?;
        // The process that takes wakes those that found it at work.
        let attempt = || self.pop_dead_letter().later();
        let waited = until(queue, attempt).await.map_err(|error| self.failed("wait for a dead letter of", error));
        wire::decode(flatten(waited)?)
    }

    pub(in crate::channel) fn try_dead_letter<T: DeserializeOwned + 'static>(&self) -> Result<T> {
        match when_not_busy(|| self.pop_dead_letter())? {
            Some(parcel) => wire::decode(parcel),
            None => Err(Error::new(ErrorKind::Empty, format!("the {} has no dead letter", self.what))),
        }
    }

    pub(in crate::channel) fn dead_letters_len(&self) -> usize {
        self.ring.leases().ok().flatten().map_or(0, |leases| leases.dead_letters_len())
    }
}
