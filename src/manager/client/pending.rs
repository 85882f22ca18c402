//! Pending calls: those that wait for an answer.

use crate::error::{Error, Result};
use crate::manager::wire::marshal::Kept;
use crate::manager::wire::messages;
use crate::os::sync::lock;
use crate::wire::EncodedMessage;
use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Poll, Waker};

/// Lets go of what an answer brings that nobody reads.
pub(crate) trait Discards: Send + Sync {
    fn discard(self: Arc<Self>, answer: EncodedMessage);
}

#[derive(Default)]
pub(crate) struct PendingCalls(pub(crate) Mutex<State>);

#[derive(Default)]
pub(crate) struct State {
    pub(crate) last: u64,
    pub(crate) slots: HashMap<u64, Slot>,
    pub(crate) is_gone: bool,
    /// Why, if it is not just gone.
    why: Option<Error>,
}

pub(crate) enum Slot {
    Awake,
    Asleep(Waker),
    Answered(EncodedMessage),
    /// Nobody waits any more, but the answer must be looked at.
    Abandoned(Weak<dyn Discards>, #[expect(dead_code, reason = "kept, not used")] Vec<Kept>),
}

impl State {
    fn gone(&self) -> Error {
        self.why.as_ref().map_or_else(|| Error::closed("manager"), Error::copy)
    }
}

impl PendingCalls {
    /// What to tell who asks now.
    pub(crate) fn gone(&self) -> Option<Error> {
        let slots = lock(&self.0);
        slots.is_gone.then(|| slots.gone())
    }

    /// Whether there is an answer that is to be read by nobody's poll.
    pub(crate) fn has_sleepers(&self) -> bool {
        lock(&self.0).slots.values().any(|slot| matches!(slot, Slot::Asleep(_) | Slot::Abandoned(..)))
    }

    pub(crate) fn is_gone(&self) -> bool {
        lock(&self.0).is_gone
    }

    /// There will be no answer any more.
    pub(crate) fn fail(&self) {
        self.fail_because(None);
    }

    /// The same, with what to tell those who wait.
    pub(crate) fn fail_because(&self, why: Option<&Error>) {
        let mut slots = lock(&self.0);
        slots.is_gone = true;
        slots.why = slots.why.take().or_else(|| why.map(Error::copy));
        let wakers: Vec<_> = slots.slots.values_mut().filter_map(Slot::wake).collect();
        let abandoned: Vec<_> = slots.slots.extract_if(|_, slot| matches!(slot, Slot::Abandoned(..))).collect();
        drop(slots);
        drop(abandoned);
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(crate) fn take(&self, id: u64) -> Option<Result<EncodedMessage>> {
        let mut slots = lock(&self.0);
        match slots.slots.get_mut(&id) {
            Some(Slot::Answered(_)) => match slots.slots.remove(&id) {
                Some(Slot::Answered(answer)) => Some(Ok(answer)),
                _ => None,
            },
            _ => slots.is_gone.then(|| Err(slots.gone())),
        }
    }

    pub(crate) fn sleep(&self, id: u64, waker: &Waker) {
        let mut slots = lock(&self.0);
        if let Some(slot) = slots.slots.get_mut(&id)
            && !matches!(slot, Slot::Answered(_))
        {
            let old = std::mem::replace(slot, Slot::Asleep(waker.clone()));
            // Its drop may be the end of another task.
            drop(slots);
            drop(old);
        }
    }

    /// Waits for an answer that another task brings.
    pub(crate) async fn answered(&self, id: u64) -> Result<EncodedMessage> {
        poll_fn(|cx| {
            if let Some(answer) = self.take(id) {
                return Poll::Ready(answer);
            }
            self.sleep(id, cx.waker());
            // It may have come in between.
            self.take(id).map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// False if nobody has a slot for it: of an answer that is always looked at, nobody has asked.
    pub(crate) fn deliver(&self, answer: EncodedMessage) -> bool {
        let Some(id) = messages::id_of(answer.bytes()) else { return false };
        let mut slots = lock(&self.0);
        match slots.slots.get_mut(&id) {
            // Its caller was dropped.
            None => return false,
            Some(Slot::Abandoned(link, _)) => {
                let link = link.upgrade();
                let kept = slots.slots.remove(&id);
                drop(slots);
                drop(kept);
                link.into_iter().for_each(|link| link.discard(answer.clone()));
            }
            Some(slot) => {
                let waker = slot.wake();
                *slot = Slot::Answered(answer);
                drop(slots);
                waker.into_iter().for_each(Waker::wake);
            }
        }
        true
    }
}

impl Slot {
    /// The waker to call, if its caller sleeps.
    fn wake(&mut self) -> Option<Waker> {
        match std::mem::replace(self, Self::Awake) {
            Self::Asleep(waker) => Some(waker),
            other => {
                *self = other;
                None
            }
        }
    }
}

/// What an answer may bring that must be let go if nobody reads it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Brings {
    Values,
    /// An object, which its asker holds.
    AnObject,
    /// What a waiting operation got (see `waits.rs`).
    AGrant,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::client::link::Link;
    use crate::manager::mock::linked;
    use futures_util::FutureExt;
    use std::sync::mpsc;
    use std::task::Wake;
    use std::time::Duration;

    /// A task whose end looks at who waits.
    struct Looks(Arc<Link>);

    impl Wake for Looks {
        fn wake(self: Arc<Self>) {}
    }

    impl Drop for Looks {
        fn drop(&mut self) {
            assert!(!self.0.wire().unwrap().slots.is_gone());
        }
    }

    #[test]
    fn a_dropped_call_may_be_the_end_of_another_task() {
        let (done, is_done) = mpsc::channel();
        std::thread::spawn(move || {
            let (link, _manager) = linked();
            let mut request = link.request(messages::COUNT);
            request.number(0);
            let pending = link.send(request, 1, Brings::Values).now_or_never().unwrap().unwrap();
            link.wire().unwrap().slots.sleep(pending.id, &Arc::new(Looks(link.clone())).into());
            drop(pending);
            done.send(()).unwrap();
        });
        is_done.recv_timeout(Duration::from_secs(20)).expect("it does not wait for itself");
    }
}
