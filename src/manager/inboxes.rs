//! The pipes by which requests of this machine's clients come: who leads looks into some, the others ring.
//!
//! # State
//! `hot`: looked into in turn. `left` and `cold`: each rings when something comes. One that is nowhere is in the hand
//! of the thread that takes a request out of it. `is_left`: nobody looks; who puts one back rings `changed`.
//!
//! # Moves
//! | move | who | then |
//! |---|---|---|
//! | hot -> in hand, with a request | [`next`](Inboxes::next) | the request gets its place |
//! | in hand -> hot | [`put_back`](Inboxes::put_back) | - |
//! | hot -> cold | [`next`](Inboxes::next) that finds it empty once again | it is looked into once more |
//! | all hot -> left | [`leave`](Inboxes::leave), before a sleep | each is looked into once more |
//! | all left -> hot, cold -> hot if it has rung | [`look_again`](Inboxes::look_again), after any bell | they are looked into |
//!
//! # Death
//! A client that dies rings by its hang-up; its inbox then yields what it had sent, and an error.
//!
//! # Cancel
//! Nothing here waits but [`changed`](Inboxes::changed), which holds nothing.

use super::objects::lock;
use crate::channel::{Inbox, Receiver};
use crate::error::Result;
use crate::wire::Sealed;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use tokio::sync::Notify;

/// Found empty so often in a row, while others were not, an inbox had better ring.
const LOOKS: u32 = 256;

/// The inboxes of clients, each of which is a `C`.
pub(super) struct Inboxes<C> {
    state: Mutex<State<C>>,
    bells: Arc<Bells>,
}

struct State<C> {
    hot: VecDeque<Open<C>>,
    left: Vec<Open<C>>,
    cold: HashMap<u64, Open<C>>,
    last: u64,
    is_left: bool,
}

/// Which inboxes have rung.
#[derive(Default)]
struct Bells {
    rung: Mutex<Vec<u64>>,
    changed: Notify,
}

/// One client's inbox.
pub(super) struct Open<C> {
    pub(super) client: C,
    number: u64,
    inbox: Inbox<Sealed>,
    looks: u32,
}

impl<C> Open<C> {
    fn next(&mut self) -> Option<Result<Sealed>> {
        let next = self.inbox.next();
        self.looks = if next.is_some() { 0 } else { self.looks + 1 };
        next
    }

    /// Has it ring from now on, unless there is something.
    fn ring_or_next(&mut self) -> Option<Result<Sealed>> {
        // It fails only where this process has no place in its family, and then nothing works.
        if let Err(error) = self.inbox.line().arm() {
            tracing::warn!(%error, "a client cannot ring");
        }
        self.next().inspect(|_| self.be_quiet())
    }

    fn be_quiet(&self) {
        self.inbox.line().disarm();
    }
}

impl<C> Inboxes<C> {
    pub(super) fn new() -> Self {
        let (hot, left, cold) = (VecDeque::new(), Vec::new(), HashMap::new());
        let state = State { hot, left, cold, last: 0, is_left: false };
        Self { state: Mutex::new(state), bells: Arc::default() }
    }

    /// One more inbox. Inside the runtime that is to hear it.
    pub(super) fn add(&self, client: C, receiver: Receiver<Sealed>) {
        let inbox = receiver.into_inbox();
        let number = {
            let mut state = lock(&self.state);
            state.last += 1;
            state.last
        };
        let bells = self.bells.clone();
        inbox.line().set_reader(move || {
            let mut rung = lock(&bells.rung);
            if !rung.contains(&number) {
                rung.push(number);
            }
            drop(rung);
            bells.changed.notify_one();
        });
        if let Err(error) = inbox.listen() {
            tracing::warn!(%error, "a client's end cannot be heard");
        }
        self.put_back(Open { client, number, inbox, looks: 0 });
    }

    /// A request, or why there will be none any more, and the inbox it came by: to be put back when the request has
    /// its place.
    pub(super) fn next(&self) -> Option<(Open<C>, Result<Sealed>)> {
        let mut state = lock(&self.state);
        state.is_left = false;
        for _ in 0..state.hot.len() {
            let mut open = state.hot.pop_front()?;
            if let Some(request) = open.next() {
                return Some((open, request));
            }
            if open.looks < LOOKS {
                state.hot.push_back(open);
                continue;
            }
            if let Some(request) = open.ring_or_next() {
                return Some((open, request));
            }
            state.cold.insert(open.number, open);
        }
        None
    }

    /// The same before a sleep: if there is nothing, all of them ring from now on.
    pub(super) fn leave(&self) -> Option<(Open<C>, Result<Sealed>)> {
        let mut state = lock(&self.state);
        while let Some(mut open) = state.hot.pop_front() {
            if let Some(request) = open.ring_or_next() {
                return Some((open, request));
            }
            state.left.push(open);
        }
        state.is_left = true;
        None
    }

    /// Whether there is any to look into.
    pub(super) fn has_hot(&self) -> bool {
        !lock(&self.state).hot.is_empty()
    }

    pub(super) fn put_back(&self, open: Open<C>) {
        let mut state = lock(&self.state);
        state.hot.push_back(open);
        if state.is_left {
            self.bells.changed.notify_one();
        }
    }

    /// Waits until it is worth to look again.
    pub(super) async fn changed(&self) {
        self.bells.changed.notified().await;
    }

    /// Those that have rung are looked into from now on, and those that were left: their clients may follow.
    pub(super) fn look_again(&self) {
        let rung = std::mem::take(&mut *lock(&self.bells.rung));
        let state = &mut *lock(&self.state);
        for mut open in rung.iter().filter_map(|number| state.cold.remove(number)) {
            open.looks = 0;
            state.left.push(open);
        }
        state.left.iter().for_each(Open::be_quiet);
        state.hot.extend(state.left.drain(..));
    }
}
