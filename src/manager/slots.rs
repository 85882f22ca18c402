//! Who waits for which answer.

use super::link::{Handle, Link};
use super::objects::lock;
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
}

pub(super) enum Slot {
    Awake,
    Asleep(Waker),
    Answered(Sealed),
    /// Nobody waits any more, but the answer must be looked at.
    Abandoned(Weak<Link>, #[expect(dead_code, reason = "kept, not used")] Vec<Arc<Handle>>),
}

impl Slots {
    pub(super) fn has_sleepers(&self) -> bool {
        lock(&self.0).slots.values().any(|slot| matches!(slot, Slot::Asleep(_)))
    }

    pub(super) fn is_gone(&self) -> bool {
        lock(&self.0).is_gone
    }

    /// There will be no answer any more.
    pub(super) fn fail(&self) {
        let mut slots = lock(&self.0);
        slots.is_gone = true;
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
            _ => slots.is_gone.then(|| Err(Error::closed("manager"))),
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

/// A call that waits for its answer; dropped, nobody does.
pub(super) struct Pending<'a> {
    pub(super) link: &'a Arc<Link>,
    pub(super) slots: &'a Slots,
    pub(super) id: u64,
    pub(super) makes: bool,
    pub(super) is_sent: bool,
    pub(super) kept: Vec<Arc<Handle>>,
}

impl<'a> Pending<'a> {
    pub(super) fn new(link: &'a Arc<Link>, slots: &'a Slots, makes: bool) -> Self {
        let mut state = lock(&slots.0);
        state.last += 1;
        let id = state.last;
        state.slots.insert(id, Slot::Awake);
        Self { link, slots, id, makes, is_sent: false, kept: Vec::new() }
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let mut slots = lock(&self.slots.0);
        let Some(slot) = slots.slots.remove(&self.id) else { return };
        let is_looked_at = self.makes || self.link.is_far();
        match slot {
            _ if !is_looked_at => {}
            Slot::Answered(answer) => {
                drop(slots);
                self.link.discard(answer);
            }
            _ if self.is_sent && !slots.is_gone => {
                let kept = std::mem::take(&mut self.kept);
                slots.slots.insert(self.id, Slot::Abandoned(Arc::downgrade(self.link), kept));
            }
            _ => {}
        }
    }
}
