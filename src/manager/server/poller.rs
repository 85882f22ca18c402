//! The request poller: takes requests from those clients that have sent some.
//!
//! # State
//! A client is `ready`: it is polled in its turn; or `idle`: it had no request, or does not read its answers,
//! and its bit (`ready.rs`) makes it ready; or taken by the thread that handles its request. `is_asleep`: the leader sleeps; a bit, and a
//! client that is put back, wakes it.
//!
//! # Moves
//! | move | by | then |
//! |---|---|---|
//! | ready -> taken, with a request | [`next`](Poller::next) | the request gets its place |
//! | taken -> ready | [`put_back`](Poller::put_back) | - |
//! | ready -> idle | [`next`](Poller::next) that finds no request | a bit that is set meanwhile makes it ready again |
//! | idle -> ready | [`next`](Poller::next) that finds its bit | it is polled |
//! | awake -> asleep | [`next`](Poller::next) before a sleep, announced in `ready.rs` | each bit is checked once more |
//!
//! # Death
//! A client that dies hangs up, which sets its bit; it then yields what it had sent, and an error.
//!
//! # Cancel
//! Nothing here waits.

use crate::error::{Error, ErrorKind, Result};
use crate::manager::wire::ready::{CLIENTS, ReadyMap};
use crate::manager::wire::transport::{Changed, Transport};
use crate::os::sync::lock;
use crate::shm::atomic::fence;
use crate::wait::{self, Watch};
use crate::wire::EncodedMessage;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use tokio::runtime::Handle;
use tokio::sync::Notify;

/// The clients, each of which is a `C`.
pub(crate) struct Poller<C> {
    map: Arc<ReadyMap>,
    state: Mutex<State<C>>,
    free: Arc<Mutex<Vec<u32>>>,
    /// Wakes a leader that sleeps.
    pub(crate) changed: Arc<Notify>,
    /// In which it listens for room of clients.
    runtime: Handle,
    _doorbell: Arc<Watch<Arc<OwnedFd>>>,
}

struct State<C> {
    ready: VecDeque<Open<C>>,
    /// Each at its bit.
    idle: Vec<Option<Open<C>>>,
    is_asleep: bool,
}

/// One client.
pub(crate) struct Open<C> {
    pub(crate) client: C,
    transport: Arc<dyn Transport>,
    bit: Bit,
}

/// A client, to be put back when its request is queued, and the request; or why there will be none any more.
pub(crate) type Polled<C> = (Open<C>, Result<EncodedMessage>);

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

impl<C> Poller<C> {
    /// The runtime that is entered listens to the clients' doorbell.
    pub(crate) fn new() -> Result<Self> {
        let map = ReadyMap::create().map_err(|error| Error::io("cannot make a manager's memory", error))?;
        let (free, changed) = (Arc::default(), Arc::<Notify>::default());
        let notified = changed.clone();
        let doorbell = wait::watch(map.doorbell.clone(), move || notified.notify_one());
        let _doorbell = doorbell.map_err(|error| Error::io("the doorbell of a manager cannot be watched", error))?;
        let state = Mutex::new(State { ready: VecDeque::new(), idle: Vec::new(), is_asleep: false });
        Ok(Self { map: Arc::new(map), state, free, changed, runtime: Handle::current(), _doorbell })
    }

    /// Takes in one more client, inside the runtime that is to listen to it: sends it the number of its bit. After an error the
    /// client is disconnected.
    pub(crate) fn add(
        &self,
        open: impl FnOnce(Changed) -> Result<Arc<dyn Transport>>,
        client: impl FnOnce(Arc<dyn Transport>) -> C,
    ) -> Result<()> {
        let bit = self.free_bit()?;
        let (map, changed, number) = (self.map.clone(), self.changed.clone(), bit.number);
        let transport = open(Box::new(move || {
            map.set(number);
            changed.notify_one();
        }))?;
        if transport.carries_descriptors() {
            match transport.send(self.map.greeting(number)) {
                // It is gone already; what it had sent is done all the same.
                Err(error) if error.kind() != ErrorKind::Closed => return Err(error),
                _ => {}
            }
        }
        // Then its requests are polled: see invariant 3 of `ready.rs`.
        fence(SeqCst);
        self.put_back(Open { client: client(transport.clone()), transport, bit });
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

    /// A request, or the end of a client. Before a sleep: if there is nothing, `changed` is notified once there is.
    pub(crate) fn next(&self, before_sleep: bool) -> Option<Polled<C>> {
        let state = &mut *lock(&self.state);
        self.set_asleep(state, before_sleep);
        let found = self.poll(state);
        self.set_asleep(state, before_sleep && found.is_none());
        found
    }

    fn set_asleep(&self, state: &mut State<C>, is_asleep: bool) {
        if state.is_asleep != is_asleep {
            state.is_asleep = is_asleep;
            self.map.set_asleep(is_asleep);
        }
    }

    fn poll(&self, state: &mut State<C>) -> Option<Polled<C>> {
        let State { ready, idle, .. } = state;
        self.map.take(idle.len(), |bit| ready.extend(idle.get_mut(bit).and_then(Option::take)));
        while let Some(open) = ready.pop_front() {
            let transport = &open.transport;
            // Of one that is gone the rest is taken, and its end. Room that comes after `arm` sets the bit; that listens in the runtime.
            let may_begin = transport.has_room() || {
                let _inside = self.runtime.enter();
                transport.arm().is_err() || transport.has_room()
            };
            if (may_begin || transport.has_hung_up())
                && let Some(request) = transport.recv()
            {
                return Some((open, request));
            }
            let bit = open.bit.number as usize;
            idle[bit] = Some(open);
        }
        None
    }

    pub(crate) fn put_back(&self, open: Open<C>) {
        let mut state = lock(&self.state);
        // A request that comes later sets the bit, which is taken when this is in its place.
        if !open.transport.has_message() {
            let bit = open.bit.number as usize;
            state.idle[bit] = Some(open);
            return;
        }
        state.ready.push_back(open);
        if state.is_asleep {
            self.changed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    /// A client that reads no answers, and has a request. Only a runtime can listen for its room.
    struct Full;

    impl Transport for Full {
        fn carries_descriptors(&self) -> bool {
            false
        }
        fn has_room(&self) -> bool {
            false
        }
        fn send(&self, _: EncodedMessage) -> Result<bool> {
            Ok(true)
        }
        fn recv(&self) -> Option<Result<EncodedMessage>> {
            Some(Ok(EncodedMessage::new(Vec::new(), Vec::new())))
        }
        fn arm(&self) -> io::Result<()> {
            Handle::try_current().map(drop).map_err(io::Error::other)
        }
    }

    #[test]
    fn request_of_a_client_without_room_is_not_begun_by_a_thread_outside_the_runtime() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let inside = runtime.enter();
        let poller = Poller::new().unwrap();
        poller.add(|_| Ok(Arc::new(Full)), |_| ()).unwrap();
        drop(inside);
        assert!(poller.next(false).is_none());
    }
}
