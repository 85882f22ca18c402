//! The objects of a manager and their holders.
//!
//! An object is held from *outside* by connections, leases (handles on their way) and messages, and from *inside* by handles
//! that are part of objects themselves. It is dropped when it has no holder. Objects that hold each other in a circle, and
//! that are not reachable from outside, are found by [`Objects::collect`].

use crate::manager::wire::waiting::Settle;
use crate::os::sync::lock;
use crate::process::entry::survive;
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, OnceLock};

/// What holds an object.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Holder {
    /// A message, until its handles are taken.
    Message,
    Connection(u64),
    /// A lease: the connection that opened it, and its number there.
    Lease(u64, u64),
    /// A handle that is part of this object; or of none, for 0.
    Object(u64),
}

/// One object: its value, and whose turn it is.
pub(crate) struct Object<J> {
    pub(crate) number: u64,
    /// `None` only while a call uses it.
    pub(crate) value: Mutex<Option<Box<dyn Any + Send>>>,
    /// Those that wait for the turn, while it is taken.
    turn: Mutex<Option<VecDeque<J>>>,
    /// Jobs that had their turn and wait for a change. Only the job that has the turn uses this.
    pub(crate) parked: Mutex<Vec<J>>,
    /// How its waiting operations are ended; known once there was one.
    pub(crate) settle: OnceLock<Settle>,
}

impl<J> Object<J> {
    /// Takes the turn for `job`, or lets it wait in line until [`pass_on`](Self::pass_on) hands it out.
    pub(crate) fn take_turn(&self, job: J) -> Option<J> {
        let mut turn = lock(&self.turn);
        if let Some(waiting) = &mut *turn {
            waiting.push_back(job);
            return None;
        }
        *turn = Some(VecDeque::new());
        Some(job)
    }

    /// Returns `true` if no job waits for the turn, so that its holder may keep it.
    pub(crate) fn is_nobody_waiting(&self) -> bool {
        lock(&self.turn).as_ref().is_none_or(VecDeque::is_empty)
    }

    /// Ends a turn. The job that is returned has the next one.
    #[must_use]
    pub(crate) fn pass_on(&self) -> Option<J> {
        let mut turn = lock(&self.turn);
        let next = turn.as_mut().and_then(VecDeque::pop_front);
        turn.take_if(|_| next.is_none());
        next
    }
}

pub(crate) struct Objects<J>(Mutex<State<J>>);

struct State<J> {
    entries: HashMap<u64, Row<J>>,
    /// What each open connection and lease holds.
    held: HashMap<Holder, Counts>,
    last: u64,
    /// Some object is held from inside only, since the last collection.
    has_lost_holders: bool,
    /// And some was then, but a call used it.
    is_only_in_hand: bool,
}

struct Row<J> {
    object: Arc<Object<J>>,
    outside: u64,
    /// Its holders inside, and how often each holds it.
    inside: Counts,
}

/// How often each of some things is counted, which is in it as long as that is not 0.
#[derive(Default)]
struct Counts(HashMap<u64, u64>);

impl Counts {
    fn add(&mut self, number: u64) {
        *self.0.entry(number).or_default() += 1;
    }

    /// Counts it once less; false if it is not there.
    fn take(&mut self, number: u64) -> bool {
        let Entry::Occupied(mut count) = self.0.entry(number) else { return false };
        *count.get_mut() -= 1;
        if *count.get() == 0 {
            count.remove();
        }
        true
    }
}

impl<J: Send + 'static> Objects<J> {
    pub(crate) fn new() -> Self {
        let (entries, held) = (HashMap::new(), HashMap::new());
        Self(Mutex::new(State { entries, held, last: 0, has_lost_holders: false, is_only_in_hand: false }))
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.0).entries.len()
    }

    pub(crate) fn has_leases(&self) -> bool {
        lock(&self.0).held.keys().any(|holder| matches!(holder, Holder::Lease(..)))
    }

    /// Adds an object that a message holds.
    pub(crate) fn add(&self, value: Box<dyn Any + Send>) -> u64 {
        let number = self.reserve();
        self.add_as(number, value, Holder::Message);
        number
    }

    /// The number of an object that is yet to be made. What is held for it meanwhile counts as reachable.
    pub(crate) fn reserve(&self) -> u64 {
        let mut state = lock(&self.0);
        state.last += 1;
        state.last
    }

    /// Adds an object under a number that was reserved.
    pub(crate) fn add_as(&self, number: u64, value: Box<dyn Any + Send>, holder: Holder) {
        let mut state = lock(&self.0);
        let (turn, parked, settle) = Default::default();
        let object = Object { number, value: Mutex::new(Some(value)), turn, parked, settle };
        state.entries.insert(number, Row { object: Arc::new(object), outside: 0, inside: Counts::default() });
        state.hold(number, holder);
    }

    pub(crate) fn find(&self, number: u64) -> Option<Arc<Object<J>>> {
        lock(&self.0).entries.get(&number).map(|entry| entry.object.clone())
    }

    /// Opens a connection or a lease, which holds nothing yet. False if it is there, and stays as it is.
    pub(crate) fn open(&self, holder: Holder) -> bool {
        let held = &mut lock(&self.0).held;
        let is_new = !held.contains_key(&holder);
        held.entry(holder).or_default();
        is_new
    }

    /// A connection or a lease has ended, and releases all that it holds.
    pub(crate) fn close(&self, holder: Holder) {
        let mut state = lock(&self.0);
        let held = state.held.remove(&holder).unwrap_or_default();
        let unheld = held.0.into_iter().filter_map(|(number, count)| {
            state.entries.get_mut(&number)?.outside -= count;
            state.remove_unheld(number)
        });
        let unheld = unheld.collect();
        drop(state);
        drop_in_turn(unheld);
    }

    /// Returns `true` if this connection or lease holds the object.
    pub(crate) fn is_held_by(&self, holder: Holder, number: u64) -> bool {
        lock(&self.0).held.get(&holder).is_some_and(|held| held.0.contains_key(&number))
    }

    /// It is held once more; false if there is no such object, or the holder has ended.
    pub(crate) fn hold(&self, number: u64, holder: Holder) -> bool {
        lock(&self.0).hold(number, holder)
    }

    /// It is held once less.
    pub(crate) fn release(&self, number: u64, holder: Holder) {
        let mut state = lock(&self.0);
        let unheld = state.release(number, holder).into_iter().collect();
        drop(state);
        drop_in_turn(unheld);
    }

    /// Returns `true` if [`collect`](Self::collect) might find something.
    pub(crate) fn may_have_circles(&self) -> bool {
        let state = lock(&self.0);
        state.has_lost_holders || state.is_only_in_hand
    }

    /// Returns `true` if it might, apart from objects that running calls use.
    pub(crate) fn has_lost_holders(&self) -> bool {
        lock(&self.0).has_lost_holders
    }

    /// A call has ended. True if it may have been the last holder of a circle.
    pub(crate) fn may_hold_a_circle(&self) -> bool {
        let mut state = lock(&self.0);
        state.has_lost_holders |= state.is_only_in_hand;
        state.is_only_in_hand
    }

    /// Drops objects that only hold each other. One that a call uses counts as held.
    pub(crate) fn collect(&self) {
        let mut state = lock(&self.0);
        let mut is_only_in_hand = false;
        let (mut todo, mut reached, mut leads_to) = (Vec::new(), HashSet::new(), HashMap::<u64, Vec<u64>>::new());
        for (number, entry) in &state.entries {
            let is_root = |owner| !state.entries.contains_key(owner);
            let is_held = entry.outside > 0 || entry.inside.0.keys().any(is_root);
            let is_in_hand = Arc::strong_count(&entry.object) > 1;
            if is_held || is_in_hand {
                todo.push(*number);
            }
            // The end of that call is not announced.
            is_only_in_hand |= is_in_hand && !is_held;
            entry.inside.0.keys().for_each(|owner| leads_to.entry(*owner).or_default().push(*number));
        }
        while let Some(number) = todo.pop() {
            if reached.insert(number) {
                todo.extend(leads_to.get(&number).into_iter().flatten());
            }
        }
        (state.has_lost_holders, state.is_only_in_hand) = (false, is_only_in_hand);
        let unheld =
            state.entries.extract_if(|number, _| !reached.contains(number)).map(|(_, row)| row.object).collect();
        drop(state);
        drop_in_turn(unheld);
    }
}

impl<J> State<J> {
    fn hold(&mut self, number: u64, holder: Holder) -> bool {
        let Some(entry) = self.entries.get_mut(&number) else { return false };
        match (holder, self.held.get_mut(&holder)) {
            (Holder::Object(owner), _) => entry.inside.add(owner),
            (Holder::Message, _) => entry.outside += 1,
            (_, Some(held)) => {
                entry.outside += 1;
                held.add(number);
            }
            (_, None) => return false,
        }
        true
    }

    fn release(&mut self, number: u64, holder: Holder) -> Option<Arc<Object<J>>> {
        let entry = self.entries.get_mut(&number)?;
        match (holder, self.held.get_mut(&holder)) {
            (Holder::Object(owner), _) => _ = entry.inside.take(owner),
            (Holder::Message, _) => entry.outside -= 1,
            (_, held) => match held?.take(number) {
                true => entry.outside -= 1,
                false => return None,
            },
        }
        self.remove_unheld(number)
    }

    fn remove_unheld(&mut self, number: u64) -> Option<Arc<Object<J>>> {
        let entry = self.entries.get(&number)?;
        if entry.outside > 0 || !entry.inside.0.is_empty() {
            self.has_lost_holders |= entry.outside == 0;
            return None;
        }
        Some(self.entries.remove(&number)?.object)
    }
}

thread_local! {
    static IS_DROPPING: Cell<bool> = const { Cell::new(false) };
    static TO_DROP: RefCell<VecDeque<Box<dyn Any>>> = const { RefCell::new(VecDeque::new()) };
}

/// Drops objects one after the other: each may hold the last handle of the next, a thousand deep.
fn drop_in_turn<J: Send + 'static>(unheld: Vec<Arc<Object<J>>>) {
    if unheld.is_empty() {
        return;
    }
    TO_DROP
        .with_borrow_mut(|to_drop| to_drop.extend(unheld.into_iter().map(|object| Box::new(object) as Box<dyn Any>)));
    if IS_DROPPING.replace(true) {
        return;
    }
    while let Some(object) = TO_DROP.with_borrow_mut(VecDeque::pop_front) {
        // A value whose drop panics is gone all the same.
        survive(|| drop(object));
    }
    IS_DROPPING.set(false);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A value that holds another object.
    struct Holds(Arc<Objects<()>>, u64, u64);

    impl Drop for Holds {
        fn drop(&mut self) {
            self.0.release(self.2, Holder::Object(self.1));
        }
    }

    fn put_into(objects: &Arc<Objects<()>>, owner: u64, held: u64) {
        objects.hold(held, Holder::Object(owner));
        let holds = Holds(objects.clone(), owner, held);
        *objects.find(owner).unwrap().value.lock().unwrap() = Some(Box::new(holds));
    }

    #[test]
    fn object_lives_as_long_as_it_has_a_holder() {
        let objects = Arc::new(Objects::<()>::new());
        let (one, lease) = (objects.add(Box::new(())), Holder::Lease(1, 1));
        assert!(!objects.hold(one, lease), "it is not open");
        assert!(objects.hold(one, Holder::Message) && objects.open(lease) && objects.hold(one, lease));
        [one, one].into_iter().for_each(|number| objects.release(number, Holder::Message));
        assert!(!objects.open(lease), "what the lease holds would be lost");
        assert_eq!((objects.len(), objects.is_held_by(lease, one)), (1, true));
        objects.close(lease);
        assert_eq!((objects.len(), objects.hold(one, Holder::Message), objects.has_leases()), (0, false, false));
    }

    #[test]
    fn long_chain_of_objects_is_dropped_without_a_deep_stack() {
        let objects = Arc::new(Objects::<()>::new());
        let chain: Vec<u64> = (0..100_000).map(|_| objects.add(Box::new(()))).collect();
        for pair in chain.windows(2) {
            put_into(&objects, pair[0], pair[1]);
        }
        chain[1..].iter().for_each(|number| objects.release(*number, Holder::Message));
        assert_eq!(objects.len(), chain.len());
        objects.release(chain[0], Holder::Message);
        assert_eq!(objects.len(), 0);
    }

    #[test]
    fn cont_04_circle_is_dropped_once_unreachable_from_outside() {
        let objects = Arc::new(Objects::<()>::new());
        let [a, b, c] = [(); 3].map(|()| objects.add(Box::new(())));
        put_into(&objects, a, b);
        put_into(&objects, b, a);
        put_into(&objects, c, a);
        [a, b].into_iter().for_each(|number| objects.release(number, Holder::Message));
        assert!(objects.may_have_circles());
        objects.collect();
        assert_eq!(objects.len(), 3, "c leads to them");
        objects.release(c, Holder::Message);
        objects.collect();
        assert_eq!(objects.len(), 0);
    }

    #[test]
    fn cont_04_circle_that_a_call_uses_is_dropped_after_the_call() {
        let objects = Arc::new(Objects::<()>::new());
        let [a, b] = [(); 2].map(|()| objects.add(Box::new(())));
        put_into(&objects, a, b);
        put_into(&objects, b, a);
        let in_hand = objects.find(a);
        [a, b].into_iter().for_each(|number| objects.release(number, Holder::Message));
        objects.collect();
        assert_eq!(objects.len(), 2);
        assert!(objects.may_have_circles(), "it will be collected again");
        drop(in_hand);
        objects.collect();
        assert_eq!((objects.len(), objects.may_have_circles()), (0, false));
    }
}
