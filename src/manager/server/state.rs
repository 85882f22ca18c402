//! The state of a manager: clients, jobs, events.

use super::faults::Faults;
use super::objects::{Holder, Object, Objects};
use super::poller::{Polled, Poller};
use crate::connection::Listener;
use crate::manager::wire::greeting::Id;
use crate::manager::wire::messages::{Op, Reader, Writer};
use crate::manager::wire::method::Frame;
use crate::manager::wire::transport::Transport;
use crate::manager::wire::waiting::{End, Ticket};
use crate::wait::Spin;
use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::Thread;
use std::time::Duration;
use tokio::runtime::Runtime;

/// Between two checks of the leader. A call is left behind after one to two of them.
pub(crate) const CHECK_EVERY: Duration = Duration::from_millis(1);

pub(crate) struct Server {
    pub(crate) id: Id,
    pub(crate) intake: Arc<OwnedFd>,
    pub(crate) exposed: Option<HashSet<u64>>,
    /// Where clients from elsewhere connect.
    pub(crate) listener: Option<Arc<Listener>>,
    pub(crate) objects: Objects<Box<Job>>,
    pub(crate) runtime: Runtime,
    /// Takes in requests; and how long it pays to spin for them.
    pub(crate) poller: Poller<Arc<Connection>>,
    pub(crate) spin: Spin,
    /// Leases that have ended.
    pub(crate) ended: Mutex<VecDeque<Holder>>,
    pub(crate) pulse: Mutex<Arc<AtomicU64>>,
    /// How much the leaders before the present one have begun.
    pub(crate) begun_before: AtomicU64,
    /// Calls that failed here.
    pub(crate) failed: AtomicU64,
    pub(crate) is_watcher_asleep: AtomicBool,
    pub(crate) watcher: Thread,
    pub(crate) overflow: Overflow,
    /// Functions that have kept a leader too long.
    pub(crate) slow: Mutex<HashSet<u64>>,
    pub(crate) has_slow: AtomicBool,
    pub(crate) connections: AtomicUsize,
    pub(crate) faults: Faults,
    pub(crate) last_connection: AtomicU64,
    pub(crate) has_ended: AtomicBool,
}

/// The work outside of the runtime.
pub(crate) enum Event {
    /// A request, or why there will be none any more.
    Request(Polled<Arc<Connection>>),
    LeaseEnded(Holder),
}

/// A call that is being worked off, operation by operation.
pub(crate) struct Job {
    pub(crate) frame: Frame,
    pub(crate) left: u64,
    /// Where its answer goes, if it has one.
    pub(crate) reply_to: Option<Arc<Connection>>,
    /// The operation that is next, if it has been read.
    pub(crate) next: Option<Next>,
    /// It has the turn of its next object.
    pub(crate) object: Option<Arc<Object<Box<Job>>>>,
}

pub(crate) enum Next {
    Run(Op),
    /// The result of a waiting operation is taken or given back, or the operation is cancelled.
    Settle(Ticket, End),
    /// The time of a waiting operation is over.
    Expire(Ticket),
}

impl Job {
    /// Boxed, for it goes from hand to hand.
    pub(crate) fn new(reader: Reader, left: u64, answer: Writer, reply_to: Option<Arc<Connection>>) -> Box<Self> {
        let frame = Frame::new(reader, answer);
        Box::new(Self { frame, left, reply_to, next: None, object: None })
    }

    pub(crate) fn entry(&self) -> Option<u64> {
        match &self.next {
            Some(Next::Run(op)) => Some(op.entry),
            _ => None,
        }
    }
}

/// One client.
pub(crate) struct Connection {
    /// 0 is this process itself.
    pub(crate) number: u64,
    pub(crate) server: Arc<Server>,
    /// An answer is sent at once, also beyond what there is room for; as long as there is no room the client's next request
    /// is not begun.
    pub(crate) transport: Arc<dyn Transport>,
    /// Where requests that may wait were made, and what they brought may be held.
    pub(crate) asked: Mutex<HashMap<u64, Arc<Object<Box<Job>>>>>,
}

pub(crate) enum Task {
    Lead(Arc<AtomicU64>),
    Work(Box<Job>),
}

#[derive(Default)]
pub(crate) struct Overflow {
    pub(crate) state: Mutex<OverflowState>,
    pub(crate) called: Condvar,
    /// A leader waits for a thread that could not be started.
    pub(crate) is_short: AtomicBool,
}

#[derive(Default)]
pub(crate) struct OverflowState {
    pub(crate) tasks: VecDeque<Task>,
    pub(crate) threads: usize,
    pub(crate) idle: usize,
}
