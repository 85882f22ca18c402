//! The reports of a child to its starter: its outcome, why it ended, that it goes on.
#![forbid(unsafe_code)]

use super::children::Child;
use super::protocol::Report;
use crate::error::{ErrorKind, PanicInfo, Topic};
use crate::wire::{Parcel, frame::Begun};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;

/// The reports received so far.
pub(super) struct Reports {
    pub(super) socket: Option<Arc<OwnedFd>>,
    /// The received part of a report that is still on its way.
    pub(super) begun: Option<Begun>,
    /// The child has had its role.
    pub(super) is_born: bool,
    pub(super) outcome: Inbox,
    /// The child goes on after its outcome.
    pub(super) lingers: bool,
    /// Why it ended, if it could report that.
    pub(super) cause: Option<Cause>,
    /// Spans and events that it could not send.
    pub(super) dropped_traces: u64,
}

pub(super) enum Inbox {
    Empty,
    Arrived(Parcel),
    Failed(io::Error),
    Taken,
}

/// Why a process ended before its function returned, as it reported itself.
#[derive(Clone, Debug)]
pub(crate) enum Cause {
    Panicked(PanicInfo),
    /// An allocation failed at this limit of its address space.
    OutOfMemory(u64),
}

impl Cause {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Panicked(_) => ErrorKind::Panicked,
            Self::OutOfMemory(_) => ErrorKind::MemoryLimit,
        }
    }

    pub(crate) fn topic(&self) -> Topic {
        match self {
            Self::Panicked(panic) => Topic::cut(panic.message()).1.unwrap_or(Topic::Panicked),
            Self::OutOfMemory(_) => Topic::MemoryLimit,
        }
    }

    pub(crate) fn panic(&self) -> Option<&PanicInfo> {
        match self {
            Self::Panicked(panic) => Some(panic),
            Self::OutOfMemory(_) => None,
        }
    }
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Panicked(panic) => {
                let place = panic.location().map(|place| format!(" at {place}")).unwrap_or_default();
                write!(f, "it panicked{place}, where nothing can catch that: {}", Topic::cut(panic.message()).0)
            }
            Self::OutOfMemory(limit) => {
                write!(f, "an allocation failed at its memory_limit (RLIMIT_AS) of {}", in_units(*limit))
            }
        }
    }
}

fn in_units(bytes: u64) -> String {
    match bytes % (1 << 20) {
        0 => format!("{} MiB", bytes >> 20),
        _ => format!("{bytes} bytes"),
    }
}

impl Reports {
    pub(super) fn over(socket: OwnedFd) -> Self {
        Self {
            socket: Some(Arc::new(socket)),
            begun: None,
            is_born: false,
            outcome: Inbox::Empty,
            lingers: false,
            cause: None,
            dropped_traces: 0,
        }
    }

    /// Reads all reports that are there; returns the exit status if it is among them.
    pub(super) fn read(&mut self) -> Option<ExitStatus> {
        let mut was_reset = false;
        while let Some(socket) = &self.socket {
            match Report::recv(socket.as_fd(), &mut self.begun) {
                Ok(Some(Report::Born(_))) => self.is_born = true,
                Ok(Some(Report::Outcome(parcel))) => {
                    self.outcome = Inbox::Arrived(parcel);
                }
                Ok(Some(Report::Lingers)) => self.lingers = true,
                Ok(Some(Report::Panicked(panic))) => self.cause = Some(Cause::Panicked(panic)),
                Ok(Some(Report::DroppedTraces(dropped))) => self.dropped_traces += dropped,
                Ok(Some(Report::OutOfMemory(limit))) => self.cause = Some(Cause::OutOfMemory(limit)),
                Ok(Some(Report::Exited(status))) => {
                    self.socket = None;
                    return Some(ExitStatus::from_raw(status));
                }
                Ok(None) => self.socket = None,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                // The child has not read something of this process; its own messages are still there.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset && !was_reset => was_reset = true,
                Err(error) => {
                    // A child killed in the middle of a message has sent nothing; any other error is passed on.
                    self.socket = None;
                    if !was_reset && error.kind() != io::ErrorKind::InvalidData {
                        self.outcome = Inbox::Failed(error);
                    }
                }
            }
        }
        None
    }

    /// Reads on for the exit status; `true` if nothing more can come.
    pub(super) fn read_exit(&mut self, child: &Child) -> bool {
        if let Some(status) = self.read() {
            child.set_status(status);
        }
        if !child.reports_exit && !matches!(self.outcome, Inbox::Empty) {
            self.socket = None;
        }
        self.socket.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::os::socket::{self, Wait};
    use crate::process::outcome::Outcome;

    #[test]
    fn messages_of_a_child_that_ended_with_something_unread_are_read() {
        let (ours, theirs) = socket::packet_pair().unwrap();
        crate::wire::frame::send(ours.as_fd(), &[b"never read"], &[], Wait::Yes).unwrap();
        Report::send_outcome(theirs.as_fd(), &Outcome::error(Error::other("no"))).unwrap();
        drop(theirs);
        let mut reports = Reports::over(ours);
        assert_eq!(reports.read(), None);
        assert!(matches!(reports.outcome, Inbox::Arrived(_)) && reports.socket.is_none());
    }

    #[test]
    fn a_child_that_was_killed_with_something_unread_has_sent_nothing() {
        let (ours, theirs) = socket::packet_pair().unwrap();
        crate::wire::frame::send(ours.as_fd(), &[b"never read"], &[], Wait::Yes).unwrap();
        drop(theirs);
        let mut reports = Reports::over(ours);
        assert_eq!(reports.read(), None);
        assert!(matches!(reports.outcome, Inbox::Empty) && reports.socket.is_none());
    }
}
