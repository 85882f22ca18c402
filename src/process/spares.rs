//! How many spare children the fork server shall keep for this process.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// Children that wait for an order of ours, not yet received: so they take up none of our descriptors.
#[derive(Default)]
pub(super) struct Spares {
    /// Asked for and not received.
    pub(super) coming: u32,
    /// Changes with the environment or the directory, which those of before do not have.
    pub(super) generation: u64,
    /// How many there shall be.
    pub(super) wanted: u32,
    pub(super) last_spawn: Option<Instant>,
    /// The server has none to give.
    pub(super) are_refused: bool,
}

/// Spawns that follow each other within this time are worth a spare.
const SPARES_PAY: Duration = Duration::from_secs(1);

/// More would only wait longer, and each costs some 300 KiB.
const MOST_SPARES: u32 = 4;

impl Spares {
    /// Learns from a spawn that begins now and may find a spare.
    pub(super) fn learn(&mut self, finds_one: bool) {
        let now = Instant::now();
        let pays = self.last_spawn.is_some_and(|last| now - last < SPARES_PAY);
        self.last_spawn = Some(now);
        self.wanted = match self.wanted {
            _ if !pays => 0,
            0 => 1,
            wanted if !finds_one => (2 * wanted).min(MOST_SPARES),
            wanted => wanted,
        };
    }

    /// None of those that are coming will do any more.
    pub(super) fn renew(&mut self) {
        self.coming = 0;
        self.generation += 1;
    }
}
