//! A descriptor of a child, watched by the runtime that polls.
#![forbid(unsafe_code)]

use super::{client, info};
use crate::error::Result;
use crate::os::reactor::{self, Watched};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::runtime::{Handle, Id};

/// A descriptor watched by the reactor of the runtime that polls, which may change between polls.
pub(super) struct Watch(Option<(Id, Watched<Arc<OwnedFd>>)>);

impl Watch {
    pub(super) const UNWATCHED: Self = Self(None);

    /// Ready after each event; the caller then checks what has happened.
    pub(super) fn poll(
        &mut self,
        context: &mut Context<'_>,
        fd: &Arc<OwnedFd>,
        interest: Interest,
    ) -> Poll<Result<()>> {
        let here = Handle::try_current().map_err(|_| info::needs_runtime("awaiting a process"))?.id();
        if self.0.as_ref().is_some_and(|(id, _)| *id != here) {
            self.0 = None;
        }
        loop {
            let (_, watched) = match &mut self.0 {
                Some(watched) => watched,
                none => {
                    client::watch_server();
                    none.insert((here, reactor::watch(fd.clone(), interest)?))
                }
            };
            match ready!(watched.poll_read_ready(context)) {
                Ok(mut event) => {
                    event.clear_ready();
                    return Poll::Ready(Ok(()));
                }
                // The runtime that it was registered with is gone, and this one has the same id.
                Err(_) => self.0 = None,
            }
        }
    }
}
