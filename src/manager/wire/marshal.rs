//! Handle marshalling between hosts: a handle becomes a reference, counted by the connection it goes through.
//!
//! A client's handle in a request is the object's number; the handle itself stays with the request until it is answered.
//! A handle in an answer is held for the client as it leaves, and listed in the answer, so that what the client does
//! not read it lets go. All references of a connection end with it.

use super::greeting::Id;
use crate::error::Result;
use std::any::Any;
use std::cell::RefCell;
use std::sync::Arc;

/// A handle that stays with a request until that is answered.
pub(crate) type Kept = Arc<dyn Any + Send + Sync>;

/// A client's end of a connection.
pub(crate) trait ClientEnd: Any + Send + Sync {
    /// Lets go of a reference that came by an answer.
    fn release(&self, object: u64);
}

/// A manager's end of a connection.
pub(crate) trait ServerEnd: Send + Sync {
    /// Holds an object for the client; false if it is none of this manager.
    fn give(&self, manager: Id, object: u64) -> bool;
    /// Whether the client holds it.
    fn has(&self, object: u64) -> bool;
}

/// Which end of which connection this is.
#[derive(Clone)]
pub(crate) enum Abroad {
    Client(Arc<dyn ClientEnd>),
    Server(Arc<dyn ServerEnd>),
}

/// What is encoded or decoded on this thread for another host.
struct Crossing {
    abroad: Abroad,
    references: Vec<u64>,
    kept: Vec<Kept>,
}

thread_local! {
    static CROSSING: RefCell<Option<Crossing>> = const { RefCell::new(None) };
}

/// Restores the outer crossing, also when user code panics.
struct Inside(Option<Option<Crossing>>);

impl Inside {
    fn enter(abroad: &Abroad, references: &mut Vec<u64>) -> Self {
        let references = std::mem::take(references);
        let crossing = Crossing { abroad: abroad.clone(), references, kept: Vec::new() };
        Self(Some(CROSSING.replace(Some(crossing))))
    }

    fn leave(&mut self) -> Option<Crossing> {
        CROSSING.replace(self.0.take()?)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        drop(self.leave());
    }
}

/// Encodes for another host. References that are given are added to `references`, handles that must stay to `kept`.
pub(crate) fn leaving<T>(
    abroad: &Abroad,
    references: &mut Vec<u64>,
    kept: &mut Vec<Kept>,
    encode: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let mut inside = Inside::enter(abroad, references);
    let result = encode();
    if let Some(crossing) = inside.leave() {
        *references = crossing.references;
        kept.extend(crossing.kept);
    }
    result
}

/// Decodes what another host has sent; what is taken of the `references` is not in them any more.
pub(crate) fn arriving<T>(abroad: &Abroad, references: &mut Vec<u64>, decode: impl FnOnce() -> Result<T>) -> Result<T> {
    leaving(abroad, references, &mut Vec::new(), decode)
}

/// Lets a handle leave, which is one of `object` of a manager and came to this process by `end`; `None` if it does not
/// leave for another host.
pub(crate) fn leave(manager: Id, object: u64, end: *const (), handle: &Kept) -> Option<Result<u64, &'static str>> {
    CROSSING.with_borrow_mut(|crossing| {
        let Crossing { abroad, references, kept } = crossing.as_mut()?;
        let is_its = match abroad {
            Abroad::Client(client) => std::ptr::addr_eq(Arc::as_ptr(client), end),
            Abroad::Server(server) => server.give(manager, object),
        };
        Some(match (abroad, is_its) {
            (_, false) => Err("a handle can leave for another host only to the manager that it is a handle of"),
            (Abroad::Client(_), true) => {
                kept.push(handle.clone());
                Ok(object)
            }
            (Abroad::Server(_), true) => {
                references.push(object);
                Ok(object)
            }
        })
    })
}

/// Whether what is decoded on this thread comes from another host.
pub(crate) fn is_arriving() -> bool {
    CROSSING.with_borrow(Option::is_some)
}

/// Takes a reference in that came from another host; by which end.
pub(crate) fn take(object: u64) -> Option<Abroad> {
    CROSSING.with_borrow_mut(|crossing| {
        let crossing = crossing.as_mut()?;
        match &crossing.abroad {
            Abroad::Client(_) => {
                let at = crossing.references.iter().position(|reference| *reference == object)?;
                crossing.references.swap_remove(at);
            }
            Abroad::Server(server) if server.has(object) => {}
            Abroad::Server(_) => return None,
        }
        Some(crossing.abroad.clone())
    })
}
