//! The request poller: takes requests out of the pipes of this machine's clients, of those that have sent something.
//!
//! # State
//! A receiver is `ready`: it is looked into in its turn; or `idle`: it was found empty, or its client does not read its answers,
//! and its bit (`ready.rs`) makes it ready; or in the hand of the thread that takes a request out of it. `is_asleep`: nobody looks; a bit, and who
//! puts a receiver back, wakes the leader.
//!
//! # Moves
//! | move | who | then |
//! |---|---|---|
//! | ready -> in hand, with a request | [`next`](Poller::next) | the request gets its place |
//! | in hand -> ready | [`put_back`](Poller::put_back) | - |
//! | ready -> idle | [`next`](Poller::next) that finds it empty | a bit that is set meanwhile makes it ready again |
//! | idle -> ready | [`next`](Poller::next) that finds its bit | it is looked into |
//! | awake -> asleep | [`sleep`](Poller::sleep), announced to all clients | each bit is looked at once more |
//!
//! # Death
//! A client that dies hangs up, which sets its bit; its receiver then yields what it had sent, and an error.
//!
//! # Cancel
//! Nothing here waits.

use crate::channel::{Receiver, Sender, SharedReceiver};
use crate::error::{Error, ErrorKind, Result};
use crate::manager::wire::messages::Writer;
use crate::manager::wire::outlet::Outlet;
use crate::manager::wire::ready::{CLIENTS, ReadyMap};
use crate::os::sync::lock;
use crate::shm::atomic::fence;
use crate::wire::EncodedMessage;
use std::collections::VecDeque;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use tokio::sync::Notify;

/// Whether a client's next request may be begun. If not, its bit is set once it may.
pub(crate) trait Admits {
    fn admits(&self) -> bool;
}

/// The inboxes of clients, each of which is a `C`.
pub(crate) struct Poller<C> {
    map: Arc<ReadyMap>,
    state: Mutex<State<C>>,
    free: Arc<Mutex<Vec<u32>>>,
    /// It is worth to look again, for who sleeps.
    pub(crate) changed: Arc<Notify>,
}

struct State<C> {
    ready: VecDeque<Open<C>>,
    /// Each at its bit.
    idle: Vec<Option<Open<C>>>,
    is_asleep: bool,
}

/// One client's receiver.
pub(crate) struct Open<C> {
    pub(crate) client: C,
    receiver: SharedReceiver<EncodedMessage>,
    bit: Bit,
}

/// A client's bit, free for another one when dropped.
struct Bit {
    number: u32,
    free: Arc<Mutex<Vec<u32>>>,
}

impl Drop for Bit {
    fn drop(&mut self) {
        lock(&self.free).push(self.number);
    }
}

impl<C: Admits> Poller<C> {
    pub(crate) fn new() -> Result<Self> {
        let map = ReadyMap::create().map_err(|error| Error::io("cannot make a manager's memory", error))?;
        let changed = Arc::<Notify>::default();
        let wake = changed.clone();
        map.line.set_reader(move || wake.notify_one());
        let state = State { ready: VecDeque::new(), idle: Vec::new(), is_asleep: false };
        Ok(Self { map: Arc::new(map), state: Mutex::new(state), free: Arc::default(), changed })
    }

    /// Has the runtime that is entered hear the clients' doorbell.
    pub(crate) fn listen(&self) -> Result<()> {
        self.map.line.listen().map_err(|error| Error::io("the clients of a manager cannot be heard", error))
    }

    /// Takes in one more receiver, inside the runtime that is to hear it: tells its client by `sender` which bit it has. After
    /// an error the client has to be let go.
    pub(crate) fn add(
        &self,
        receiver: Receiver<EncodedMessage>,
        sender: Sender<EncodedMessage>,
        client: impl FnOnce(Outlet) -> C,
    ) -> Result<()> {
        let bit = self.free_bit()?;
        let receiver = receiver.into_shared();
        let mut outlet = Outlet::new(sender);
        let number = bit.number;
        for line in [receiver.wait_queue(), outlet.room()] {
            let (map, changed) = (self.map.clone(), self.changed.clone());
            line.set_reader(move || {
                map.set(number);
                changed.notify_one();
            });
        }
        receiver.listen().map_err(|error| Error::io("a client's end cannot be heard", error))?;
        let mut hello = Writer::answer(0);
        hello.number(number.into());
        self.map.fds().into_iter().for_each(|fd| _ = hello.attach(fd));
        match outlet.send(hello.into_encoded()) {
            // It is gone already; what it had sent is taken all the same.
            Err(refused) if refused.kind() == ErrorKind::Closed => {}
            sent => drop(sent?),
        }
        // Then the receiver is looked into: see invariant 3 of `ready.rs`.
        fence(SeqCst);
        self.put_back(Open { client: client(outlet), receiver, bit });
        Ok(())
    }

    fn free_bit(&self) -> Result<Bit> {
        let mut state = lock(&self.state);
        let free = lock(&self.free).pop();
        if free.is_none() && state.idle.len() >= CLIENTS as usize {
            return Err(Error::new(ErrorKind::Full, "a manager has no more places for clients"));
        }
        let number = free.unwrap_or_else(|| {
            state.idle.push(None);
            state.idle.len() as u32 - 1
        });
        Ok(Bit { number, free: self.free.clone() })
    }

    /// A request, or why there will be none any more, and the receiver it came by: to be put back when the request has
    /// its place.
    pub(crate) fn next(&self) -> Option<(Open<C>, Result<EncodedMessage>)> {
        let state = &mut *lock(&self.state);
        if std::mem::take(&mut state.is_asleep) {
            self.map.line.disarm();
        }
        self.look(state)
    }

    /// The same before a sleep: if there is nothing, `changed` is notified once there is.
    pub(crate) fn sleep(&self) -> Option<(Open<C>, Result<EncodedMessage>)> {
        let state = &mut *lock(&self.state);
        if let Err(error) = self.map.line.arm() {
            tracing::warn!(%error, "the clients of a manager cannot wake it yet; it looks again");
            self.changed.notify_one();
        }
        state.is_asleep = true;
        let found = self.look(state);
        if found.is_some() {
            state.is_asleep = false;
            self.map.line.disarm();
        }
        found
    }

    fn look(&self, state: &mut State<C>) -> Option<(Open<C>, Result<EncodedMessage>)> {
        let State { ready, idle, .. } = state;
        self.map.take(idle.len(), |bit| ready.extend(idle.get_mut(bit).and_then(Option::take)));
        while let Some(open) = ready.pop_front() {
            // Of one that is gone the rest is taken, and its end.
            let may_begin = open.client.admits() || open.receiver.has_hung_up();
            if may_begin && let Some(request) = open.receiver.next() {
                return Some((open, request));
            }
            let bit = open.bit.number as usize;
            idle[bit] = Some(open);
        }
        None
    }

    pub(crate) fn put_back(&self, open: Open<C>) {
        let mut state = lock(&self.state);
        state.ready.push_back(open);
        if state.is_asleep {
            self.changed.notify_one();
        }
    }
}
