//! Pending calls: those that wait for an answer.

use crate::error::{Error, Result};
use crate::manager::wire::messages;
use crate::os::sync::lock;
use crate::wire::EncodedMessage;
use std::collections::HashMap;
use std::sync::Mutex;
use std::task::Waker;

#[derive(Default)]
pub(crate) struct PendingCalls(Mutex<State>);

#[derive(Default)]
struct State {
    last: u64,
    entries: HashMap<u64, Entry>,
    is_gone: bool,
    /// Why, if it is not just gone.
    why: Option<Error>,
}

enum Entry {
    /// Its caller is awake, or sleeps until its waker is called.
    Waits(Option<Waker>),
    Answered(EncodedMessage),
    /// Nobody waits any more, but the answer may bring something.
    Abandoned,
}

impl PendingCalls {
    /// The number of a new call.
    pub(crate) fn begin(&self) -> u64 {
        let state = &mut *lock(&self.0);
        state.last += 1;
        state.entries.insert(state.last, Entry::Waits(None));
        state.last
    }

    /// A call's future is dropped: returns the answer, or `Some(None)` if none was there, or `None` if it was taken before. An
    /// abandoned call's answer is read all the same.
    pub(crate) fn leave(&self, id: u64, is_abandoned: bool) -> Option<Option<EncodedMessage>> {
        let mut state = lock(&self.0);
        let entry = state.entries.remove(&id)?;
        if let Entry::Answered(answer) = entry {
            return Some(Some(answer));
        }
        if is_abandoned && !state.is_gone {
            state.entries.insert(id, Entry::Abandoned);
        }
        drop(state);
        // Its waker's drop may be the end of another task.
        drop(entry);
        Some(None)
    }

    /// Why there will be no answers any more, if there is more to say than that the manager is gone.
    pub(crate) fn why(&self) -> Option<Error> {
        lock(&self.0).why.as_ref().map(Error::copy)
    }

    /// Whether there is an answer that is to be read by nobody's poll.
    pub(crate) fn has_sleepers(&self) -> bool {
        lock(&self.0).entries.values().any(|entry| matches!(entry, Entry::Waits(Some(_)) | Entry::Abandoned))
    }

    /// There will be no answer any more, for this reason.
    pub(crate) fn fail(&self, why: Option<Error>) {
        let mut state = lock(&self.0);
        state.is_gone = true;
        state.why = state.why.take().or(why);
        state.entries.retain(|_, entry| !matches!(entry, Entry::Abandoned));
        let wakers: Vec<_> = state.entries.values_mut().filter_map(Entry::wake).collect();
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(crate) fn take(&self, id: u64) -> Option<Result<EncodedMessage>> {
        let mut state = lock(&self.0);
        if let Some(Entry::Answered(_)) = state.entries.get(&id)
            && let Some(Entry::Answered(answer)) = state.entries.remove(&id)
        {
            return Some(Ok(answer));
        }
        let gone = || state.why.as_ref().map_or_else(|| Error::closed("manager"), Error::copy);
        state.is_gone.then(|| Err(gone()))
    }

    pub(crate) fn sleep(&self, id: u64, waker: &Waker) {
        let mut state = lock(&self.0);
        if let Some(Entry::Waits(waits)) = state.entries.get_mut(&id) {
            let old = waits.replace(waker.clone());
            // Its drop may be the end of another task.
            drop(state);
            drop(old);
        }
    }

    /// Gives an answer to the call that waits for it. It comes back if there is none any more; an answer without a request is an
    /// error.
    pub(crate) fn deliver(&self, answer: EncodedMessage) -> Result<Option<EncodedMessage>> {
        let id = messages::id_of(answer.bytes()).unwrap_or_default();
        let mut state = lock(&self.0);
        if !(1..=state.last).contains(&id) {
            return Err(messages::malformed());
        }
        match state.entries.get_mut(&id) {
            Some(entry @ Entry::Waits(_)) => {
                let waker = std::mem::replace(entry, Entry::Answered(answer)).wake();
                drop(state);
                waker.into_iter().for_each(Waker::wake);
                Ok(None)
            }
            Some(Entry::Answered(_)) | None => Ok(Some(answer)),
            Some(Entry::Abandoned) => {
                state.entries.remove(&id);
                Ok(Some(answer))
            }
        }
    }
}

impl Entry {
    /// The waker to call, if its caller sleeps.
    fn wake(&mut self) -> Option<Waker> {
        if let Self::Waits(waker) = self { waker.take() } else { None }
    }
}
