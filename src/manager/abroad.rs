//! What crosses to another host and back: a handle becomes a reference, counted by the connection it goes through.
//!
//! A client's handle in a request is the object's number; the handle itself stays with the request until it is answered.
//! A handle in an answer is held for the client as it leaves, and listed in the answer, so that what the client does
//! not read it lets go. All references of a connection end with it.

use super::clients::Connection;
use super::link::{Handle, Link};
use crate::error::Result;
use std::cell::RefCell;
use std::sync::Arc;

/// Which end of which connection this is.
#[derive(Clone)]
pub(super) enum Abroad {
    Client(Arc<Link>),
    Server(Arc<Connection>),
}

/// What is encoded or decoded on this thread for another host.
struct Crossing {
    abroad: Abroad,
    references: Vec<u64>,
    kept: Vec<Arc<Handle>>,
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
pub(super) fn leaving<T>(
    abroad: &Abroad,
    references: &mut Vec<u64>,
    kept: &mut Vec<Arc<Handle>>,
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
pub(super) fn arriving<T>(abroad: &Abroad, references: &mut Vec<u64>, decode: impl FnOnce() -> Result<T>) -> Result<T> {
    leaving(abroad, references, &mut Vec::new(), decode)
}

/// Lets a handle leave; `None` if it does not leave for another host.
pub(super) fn leave(handle: &Arc<Handle>) -> Option<Result<u64, &'static str>> {
    CROSSING.with_borrow_mut(|crossing| {
        let crossing = crossing.as_mut()?;
        let is_its = match &crossing.abroad {
            Abroad::Client(link) => Arc::ptr_eq(link, &handle.link),
            Abroad::Server(connection) => connection.give(handle),
        };
        Some(match (&crossing.abroad, is_its) {
            (_, false) => Err("a handle can leave for another host only to the manager that it is a handle of"),
            (Abroad::Client(_), true) => {
                crossing.kept.push(handle.clone());
                Ok(handle.object)
            }
            (Abroad::Server(_), true) => {
                crossing.references.push(handle.object);
                Ok(handle.object)
            }
        })
    })
}

/// Whether what is decoded on this thread comes from another host.
pub(super) fn is_arriving() -> bool {
    CROSSING.with_borrow(Option::is_some)
}

/// Takes a handle in that came from another host.
pub(super) fn take(object: u64) -> Option<Handle> {
    let abroad = CROSSING.with_borrow_mut(|crossing| {
        let crossing = crossing.as_mut()?;
        if let Abroad::Client(_) = crossing.abroad {
            let at = crossing.references.iter().position(|reference| *reference == object)?;
            crossing.references.swap_remove(at);
        }
        Some(crossing.abroad.clone())
    })?;
    match abroad {
        Abroad::Client(link) => Some(Handle::held(&link, object)),
        Abroad::Server(connection) => connection.receive(object),
    }
}
