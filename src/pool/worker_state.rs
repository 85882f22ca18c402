//! Where the state of a worker is, in its process.

use crate::process::entry;
use std::any::Any;
use std::cell::RefCell;

thread_local! {
    /// On the thread that runs the items.
    static STATE: RefCell<Option<Box<dyn Any>>> = const { RefCell::new(None) };
}

/// It was made.
pub(super) fn set(state: Box<dyn Any>) {
    STATE.set(Some(state));
}

/// Lends it to an item.
pub(super) fn lend<R>(item: impl FnOnce(Option<&mut dyn Any>) -> R) -> R {
    STATE.with_borrow_mut(|state| item(state.as_mut().map(|state| &mut **state)))
}

/// The worker exits normally.
pub(super) fn drop_state() {
    let state = STATE.take();
    entry::survive(|| drop(state));
}
