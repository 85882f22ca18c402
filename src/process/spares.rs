//! Decides how many spare children the fork server keeps for this process.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// Children that wait for an order. They wait in the connection, unreceived, and so take none of this process's descriptors.
#[derive(Default)]
pub(super) struct Spares {
    /// Requested and not received.
    pub(super) coming: u32,
    /// Changes with the environment or the directory, which earlier spares do not have.
    pub(super) generation: u64,
    /// The wanted number.
    pub(super) wanted: u32,
    pub(super) last_spawn: Option<Instant>,
    /// The server cannot make any.
    pub(super) are_refused: bool,
}

/// Spawns that follow each other within this time are worth a spare.
const SPARES_PAY: Duration = Duration::from_secs(1);

/// More would only wait longer, and each costs some 300 KiB.
const MOST_SPARES: u32 = 4;

impl Spares {
    /// Adapts the wanted number to a spawn that begins now. `finds_one`: a spare is there.
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

    /// Makes all requested spares useless.
    pub(super) fn renew(&mut self) {
        self.coming = 0;
        self.generation += 1;
    }
}
