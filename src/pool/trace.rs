//! Carries the `tracing` spans and events of a task to the subscriber of its caller.
//!
//! A call that is made under a subscriber takes the caller's span with it, and its orders state the level that is of interest. While the worker
//! runs them, its main thread has a subscriber that writes each span and event among the results. In this process they are replayed under
//! the caller's span, each with a field `worker.pid`. Without a subscriber all of this costs one load per call.
//!
//! Recorder and replay are those of any child, see `process/trace`; here is the way between them.
#![forbid(unsafe_code)]

use crate::channel::lane::EventWriter;
use crate::os::sync::lock;
use crate::process::trace::{Caller, Message, Recorder, Replay, Sink};
use crate::wire;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use tracing::Dispatch;
use tracing::dispatcher::{self, DefaultGuard};
use tracing::subscriber::NoSubscriber;

// In the worker.

thread_local! {
    /// Where the thread that runs items sends its records; none while it is at something of the pool's own.
    static EVENT_WRITER: RefCell<Option<EventWriter>> = const { RefCell::new(None) };
    static IS_OPEN: Cell<bool> = const { Cell::new(false) };
}

/// Writes messages among the results of the item that runs.
#[derive(Default)]
struct Forward {
    /// Messages of other threads, which are sent with the next message of the item that runs, and of the time between two items.
    late: Mutex<Vec<Message>>,
}

/// More than this is not kept for the next item.
const LATE: usize = 1024;

static FORWARD: OnceLock<(Arc<Recorder<Forward>>, Dispatch)> = OnceLock::new();

/// Sends the spans and events of the items of an order by `writer`, until the guard is dropped. A program that has given its
/// workers a subscriber of their own keeps it.
pub(super) fn listen(level: u8, writer: EventWriter) -> Option<DefaultGuard> {
    if !dispatcher::get_default(|default| default.is::<NoSubscriber>()) {
        return None;
    }
    let (recorder, dispatch) = FORWARD.get_or_init(|| {
        let recorder = Arc::new(Recorder::new(level, Forward::default()));
        let dispatch = Dispatch::new(recorder.clone());
        (recorder, dispatch)
    });
    recorder.raise(level);
    EVENT_WRITER.set(Some(writer));
    Some(dispatcher::set_default(dispatch))
}

/// From here on the function's own code runs.
pub(super) fn open() {
    if let Some((recorder, _)) = FORWARD.get() {
        // Records between two items, outside any span, belong to neither.
        lock(&recorder.sink.late).retain(|message| !message.is_event_without_span());
    }
    IS_OPEN.set(true);
}

/// Stops that. The remaining records are sent.
pub(super) fn close() {
    if let Some((recorder, _)) = FORWARD.get() {
        recorder.sink.tell_late();
    }
    IS_OPEN.set(false);
}

impl Sink for Forward {
    fn take(&self, message: Message) -> bool {
        if !IS_OPEN.get() {
            let mut late = lock(&self.late);
            // A span that is over must be received of.
            let is_taken = late.len() < LATE || matches!(message, Message::Close { .. });
            if is_taken {
                late.push(message);
            }
            return is_taken;
        }
        self.tell_late();
        send(&message);
        true
    }
}

impl Forward {
    fn tell_late(&self) {
        if IS_OPEN.get() {
            std::mem::take(&mut *lock(&self.late)).iter().for_each(send);
        }
    }
}

fn send(message: &Message) {
    let mut bytes = Vec::new();
    if wire::append(message, &mut bytes).is_ok() {
        // Spans and events of the writer itself are not sent.
        IS_OPEN.set(false);
        EVENT_WRITER.with_borrow_mut(|writer| writer.iter_mut().for_each(|writer| writer.write(&bytes)));
        IS_OPEN.set(true);
    }
}

// In the process of the pool.

/// Replays the messages of one worker, in order.
pub(super) struct TraceSink {
    received: Mutex<VecDeque<(Arc<Caller>, Vec<u8>)>>,
    /// Dropped with the worker, which closes the spans that it has left open.
    replay: Mutex<Replay>,
}

impl TraceSink {
    pub(super) fn new(pid: u32) -> Arc<Self> {
        Arc::new(Self { received: Mutex::default(), replay: Mutex::new(Replay::of(pid, "worker.pid")) })
    }

    /// Takes a message; under the pool's lock, so that messages stay in order.
    pub(super) fn receive(&self, caller: &Arc<Caller>, bytes: &[u8]) {
        lock(&self.received).push_back((caller.clone(), bytes.to_vec()));
    }

    /// Replays the messages, without that lock: subscribers are the user's code. One thread at a time replays for all.
    pub(super) fn pass_on(&self) {
        // Messages that other threads leave to us come before we let go, or are seen here.
        while !lock(&self.received).is_empty() {
            let mut replay = match self.replay.try_lock() {
                Ok(replay) => replay,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            loop {
                let next = lock(&self.received).pop_front();
                let Some((caller, bytes)) = next else { break };
                replay.tell(&caller, &bytes);
            }
        }
    }
}
