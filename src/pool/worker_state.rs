//! Where the state of a worker is, in its process. Its page stands at the top of `state`.

use crate::os::fault;
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
    fault::point("state.made");
}

/// Lends it to an item.
pub(super) fn lend<R>(item: impl FnOnce(Option<&mut dyn Any>) -> R) -> R {
    STATE.with_borrow_mut(|state| {
        fault::point("state.lent");
        let result = item(state.as_mut().map(|state| &mut **state));
        fault::point("state.returned");
        result
    })
}

/// The worker exits normally.
pub(super) fn drop_state() {
    let state = STATE.take();
    fault::point("state.dropping");
    entry::survive(|| drop(state));
}
