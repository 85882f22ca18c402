//! A message that is out.

use crate::pool::Order;
use std::time::{Duration, Instant};

/// A message that is out.
pub(super) struct Sent {
    /// `None` once it was answered, or is wanted no more.
    pub(super) orders: Vec<Option<Order>>,
    pub(super) items: u32,
    pub(super) state: State,
    /// When it was published first, and last.
    pub(super) since: Instant,
    pub(super) tried: Instant,
    /// Until when its items are to begin, and how long that was when it was published first.
    pub(super) start_by: Option<Instant>,
    pub(super) patience: Option<Duration>,
    /// The host that last reported to have it, and when that report arrived.
    pub(super) holder: Option<u64>,
    pub(super) reported: Instant,
    /// When it was last reported or found anywhere.
    pub(super) heard: Instant,
    /// It was published before, so the stream may have it twice.
    pub(super) is_repeated: bool,
    /// A host has given it back so often, for which nobody was lost.
    pub(super) given_back: u32,
    /// Hosts had left so often when it was published, or when a host asked for it last.
    pub(super) departures: u64,
    /// Hosts that were lost with it, and how often that was.
    pub(super) lost: Vec<String>,
    pub(super) losses: u32,
    pub(super) losses_before: u32,
    /// It was published under these numbers before.
    pub(super) earlier: Vec<u64>,
    /// Somebody looks whether the stream has it.
    pub(super) is_sought: bool,
    /// How often it was found in the stream, and nobody took it though hosts have slots free.
    pub(super) ignored: u32,
}

pub(super) enum State {
    /// Not published, or not acknowledged; published again at this time. The stream was asked then, and has not answered since.
    Unacknowledged {
        again: Instant,
        silent_since: Option<Instant>,
        refused: Option<(Instant, String)>,
        attempts: usize,
    },
    /// The stream has it, or had it.
    Stored(u64),
}

impl State {
    pub(super) fn unacknowledged(now: Instant) -> Self {
        Self::Unacknowledged { again: now, silent_since: None, refused: None, attempts: 0 }
    }
}
