//! Who waits for which answer.

use super::link::{Handle, Link};
use super::objects::lock;
use super::pipes::Wire;
use super::protocol;
use crate::error::{Error, Result};
use crate::wire::Sealed;
use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Poll, Waker};

#[derive(Default)]
pub(super) struct Slots(pub(super) Mutex<SlotsState>);

#[derive(Default)]
pub(super) struct SlotsState {
    pub(super) last: u64,
    pub(super) slots: HashMap<u64, Slot>,
    pub(super) is_gone: bool,
    /// Why, if it is not just gone.
    why: Option<Error>,
}

pub(super) enum Slot {
    Awake,
    Asleep(Waker),
    Answered(Sealed),
    /// Nobody waits any more, but the answer must be looked at.
    Abandoned(Weak<Link>, #[expect(dead_code, reason = "kept, not used")] Vec<Arc<Handle>>),
}

impl SlotsState {
    fn gone(&self) -> Error {
        self.why.as_ref().map_or_else(|| Error::closed("manager"), Error::copy)
    }
}

impl Slots {
    /// What to tell who asks now.
    pub(super) fn gone(&self) -> Option<Error> {
        let slots = lock(&self.0);
        slots.is_gone.then(|| slots.gone())
    }

    /// Whether there is an answer that is to be read by nobody's poll.
    pub(super) fn has_sleepers(&self) -> bool {
        lock(&self.0).slots.values().any(|slot| matches!(slot, Slot::Asleep(_) | Slot::Abandoned(..)))
    }

    pub(super) fn is_gone(&self) -> bool {
        lock(&self.0).is_gone
    }

    /// There will be no answer any more.
    pub(super) fn fail(&self) {
        self.fail_because(None);
    }

    /// The same, with what to tell those who wait.
    pub(super) fn fail_because(&self, why: Option<&Error>) {
        let mut slots = lock(&self.0);
        slots.is_gone = true;
        slots.why = slots.why.take().or_else(|| why.map(Error::copy));
        let wakers: Vec<_> = slots.slots.values_mut().filter_map(Slot::wake).collect();
        let abandoned: Vec<_> = slots.slots.extract_if(|_, slot| matches!(slot, Slot::Abandoned(..))).collect();
        drop(slots);
        drop(abandoned);
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(super) fn take(&self, id: u64) -> Option<Result<Sealed>> {
        let mut slots = lock(&self.0);
        match slots.slots.get_mut(&id) {
            Some(Slot::Answered(_)) => match slots.slots.remove(&id) {
                Some(Slot::Answered(answer)) => Some(Ok(answer)),
                _ => None,
            },
            _ => slots.is_gone.then(|| Err(slots.gone())),
        }
    }

    pub(super) fn sleep(&self, id: u64, waker: &Waker) {
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
    pub(super) async fn answered(&self, id: u64) -> Result<Sealed> {
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
    pub(super) fn deliver(&self, answer: Sealed) -> bool {
        let Some(id) = protocol::id_of(answer.bytes()) else { return false };
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
pub(super) enum Brings {
    Values,
    /// An object, which its asker holds.
    AnObject,
    /// What a waiting operation got (see `waits.rs`).
    AGrant,
}

/// A call that waits for its answer; dropped, nobody does.
pub(super) struct Pending<'a> {
    link: &'a Arc<Link>,
    slots: &'a Slots,
    pub(super) id: u64,
    brings: Brings,
    pub(super) is_sent: bool,
    /// By which pipe, if it is one, and where it waited for room in that.
    pub(super) wire: Option<&'a Wire>,
    pub(super) place: Option<u64>,
    pub(super) kept: Vec<Arc<Handle>>,
}

impl<'a> Pending<'a> {
    pub(super) fn new(link: &'a Arc<Link>, slots: &'a Slots, brings: Brings) -> Self {
        let mut state = lock(&slots.0);
        state.last += 1;
        let id = state.last;
        state.slots.insert(id, Slot::Awake);
        Self { link, slots, id, brings, is_sent: false, wire: None, place: None, kept: Vec::new() }
    }

    /// The answer, or why there is none.
    pub(super) async fn answer(&self) -> Result<Sealed> {
        let answered = match self.wire {
            Some(wire) => wire.answer(self.id).await,
            None => self.slots.answered(self.id).await,
        };
        answered.map_err(|error| self.link.told_gone(error))
    }

    /// Has it not be sent, if it still waits for room: then it was never made.
    pub(super) fn withdraw(&self) -> bool {
        let waits = self.wire.zip(self.place);
        let is_withdrawn = waits.is_some_and(|(wire, place)| wire.withdraw(place));
        if is_withdrawn {
            let slot = lock(&self.slots.0).slots.remove(&self.id);
            drop(slot);
        }
        is_withdrawn
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if self.withdraw() {
            return;
        }
        let mut slots = lock(&self.slots.0);
        // It was taken, or withdrawn.
        let Some(slot) = slots.slots.remove(&self.id) else { return };
        let is_looked_at = self.brings == Brings::AnObject || self.link.is_far();
        let is_answered = matches!(slot, Slot::Answered(_));
        let is_abandoned = is_looked_at && self.is_sent && !is_answered && !slots.is_gone;
        if is_abandoned {
            let kept = std::mem::take(&mut self.kept);
            slots.slots.insert(self.id, Slot::Abandoned(Arc::downgrade(self.link), kept));
        }
        drop(slots);
        match slot {
            Slot::Answered(answer) if is_looked_at => self.link.discard(answer),
            // Its waker's drop may be the end of another task.
            slot => drop(slot),
        }
        if is_abandoned {
            // It may have been the last that looked.
            self.wire.into_iter().for_each(Wire::read_for_sleepers);
        }
        if self.is_sent && self.brings == Brings::AGrant {
            self.link.tell_of(protocol::UNREAD, self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::played::linked;
    use super::*;
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
            let mut request = link.request(protocol::COUNT);
            request.number(0);
            let pending = link.send(request, 1, Brings::Values).unwrap();
            link.wire().unwrap().slots.sleep(pending.id, &Arc::new(Looks(link.clone())).into());
            drop(pending);
            done.send(()).unwrap();
        });
        is_done.recv_timeout(Duration::from_secs(20)).expect("it does not wait for itself");
    }
}
