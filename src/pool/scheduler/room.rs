//! Room for waiting items, in a pool that bounds their number.
//!
//! Room is reserved before an item is taken from its source, first come, first served.

use std::collections::{BTreeMap, BTreeSet};
use std::task::Waker;

#[derive(Default)]
pub(super) struct Room {
    /// Items that may wait; without a bound there is always room.
    most: Option<usize>,
    /// Items that have room and have not been submitted.
    reserved: usize,
    /// Callers that wait for room, by their tickets.
    waiters: BTreeMap<u64, Waker>,
    /// Callers that were woken, each with room for one item.
    woken: BTreeSet<u64>,
    tickets: u64,
    /// Nothing waits for a worker here any more: all have room, for an error or for their last items.
    is_lifted: bool,
}

impl Room {
    pub(super) fn new(most: Option<usize>) -> Self {
        Self { most, ..Self::default() }
    }

    /// Reserves room for up to `wanted` items while `waiting` wait; for how many there was. If for none, `waker` is woken
    /// when there is, and `ticket` keeps the place in line.
    pub(super) fn reserve(
        &mut self,
        waiting: usize,
        wanted: usize,
        ticket: &mut Option<u64>,
        waker: &mut Option<Waker>,
    ) -> usize {
        let Some(most) = self.most.filter(|_| wanted > 0) else { return wanted };
        if self.is_lifted {
            // Its waker is dropped by the caller.
            *waker = ticket.take().and_then(|ticket| self.leave(ticket)).or(waker.take());
            return wanted;
        }
        let held = ticket.is_some_and(|ticket| self.woken.remove(&ticket));
        if !held && let Some(place) = ticket.and_then(|ticket| self.waiters.get_mut(&ticket)) {
            // The old waker goes to the caller, which drops it without a lock.
            waker.iter_mut().for_each(|waker| std::mem::swap(place, waker));
            return 0;
        }
        let free = if self.waiters.is_empty() { most.saturating_sub(waiting + self.reserved) } else { 0 };
        let more = free.min(wanted - usize::from(held));
        self.reserved += more;
        *ticket = None;
        let granted = more + usize::from(held);
        if granted == 0
            && let Some(waker) = waker.take()
        {
            self.tickets += 1;
            self.waiters.insert(self.tickets, waker);
            *ticket = Some(self.tickets);
        }
        granted
    }

    /// How many callers wait for room, or have been woken for it.
    pub(super) fn in_line(&self) -> usize {
        self.waiters.len() + self.woken.len()
    }

    /// Room for so many items is needed no longer: they were submitted, or there are none.
    pub(super) fn give_back(&mut self, items: usize) {
        self.reserved = self.reserved.saturating_sub(items);
    }

    /// A caller waits no longer. Its waker is to be dropped without a lock.
    pub(super) fn leave(&mut self, ticket: u64) -> Option<Waker> {
        let waker = self.waiters.remove(&ticket);
        if waker.is_none() && self.woken.remove(&ticket) {
            self.give_back(1);
        }
        waker
    }

    /// From now on there is room for all, whoever keeps some, or no longer.
    pub(super) fn lift(&mut self, is_lifted: bool, wakers: &mut Vec<Waker>) {
        self.is_lifted = is_lifted;
        if is_lifted {
            wakers.extend(std::mem::take(&mut self.waiters).into_values());
        }
    }

    /// The callers to wake now that `waiting` items wait.
    pub(super) fn pass_on(&mut self, waiting: usize, wakers: &mut Vec<Waker>) {
        let Some(most) = self.most else { return };
        while waiting + self.reserved < most
            && let Some((ticket, waker)) = self.waiters.pop_first()
        {
            self.reserved += 1;
            self.woken.insert(ticket);
            wakers.push(waker);
        }
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    #[test]
    fn all_callers_have_room_once_the_bound_is_lifted() {
        let (mut room, mut wakers, waker) = (Room::new(Some(1)), Vec::new(), || Some(Waker::noop().clone()));
        let [mut a, mut b, mut c] = [None; 3];
        assert_eq!(room.reserve(0, 1, &mut a, &mut waker()), 1);
        assert_eq!((room.reserve(0, 1, &mut b, &mut waker()), room.reserve(0, 1, &mut c, &mut waker())), (0, 0));
        // One of those in line has got the room of the first, and does not come for it.
        room.give_back(1);
        room.pass_on(0, &mut wakers);
        assert_eq!(wakers.len(), 1);
        room.lift(true, &mut wakers);
        assert_eq!(wakers.len(), 2);
        assert_eq!((room.reserve(0, 1, &mut c, &mut waker()), room.reserve(0, 3, &mut b, &mut waker())), (1, 3));
        assert_eq!((b, c, room.reserved), (None, None, 0));
        room.lift(false, &mut wakers);
        assert_eq!((room.reserve(0, 2, &mut a, &mut waker()), room.reserve(0, 1, &mut b, &mut waker())), (1, 0));
    }

    #[test]
    fn room_goes_to_waiting_callers_in_order_and_past_those_that_leave() {
        let (mut room, mut wakers, waker) = (Room::new(Some(2)), Vec::new(), || Some(Waker::noop().clone()));
        let [mut a, mut b, mut c] = [None; 3];
        assert_eq!(room.reserve(0, 5, &mut a, &mut waker()), 2);
        assert_eq!((room.reserve(0, 1, &mut b, &mut waker()), room.reserve(0, 1, &mut c, &mut waker())), (0, 0));
        // The two items wait now; then one of them begins.
        room.give_back(2);
        room.pass_on(2, &mut wakers);
        assert!(wakers.is_empty());
        room.pass_on(1, &mut wakers);
        assert_eq!(wakers.len(), 1);
        assert_eq!(
            (room.reserve(1, 1, &mut a, &mut None), room.reserve(1, 1, &mut c, &mut waker())),
            (0, 0),
            "b is first"
        );
        drop(room.leave(b.unwrap()));
        room.pass_on(1, &mut wakers);
        assert_eq!((wakers.len(), room.reserve(1, 1, &mut c, &mut waker()), c), (2, 1, None));
        assert_eq!(Room::new(None).reserve(usize::MAX, 7, &mut None, &mut None), 7);
    }
}
