//! The board that all workers of a pool share: where the pool sleeps, and which lanes have something for it. Its state
//! stands at the top of [`lane`](super).

use crate::channel::result_notification::{self, NotifyTarget};
use crate::shm::atomic::AtomicU64;
use crate::shm::family::SLOTS;
use crate::shm::region::Region;
use crate::wait::{WaitQueue, sleepers};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

pub(super) const BOARD_LEN: usize = 4096;

/// Marks of the board, behind its event: lane `n` has bit `n % 64` of word `n / 64`.
const MARKS: usize = sleepers::LEN;
const MARK_WORDS: usize = SLOTS.div_ceil(64);

/// Where the pool sleeps, and sees which lanes have something for it; shared by all its workers.
pub(crate) struct Board(pub(super) Arc<Region>);

fn mark_of(board: &Region, lane: usize) -> (&AtomicU64, u64) {
    (&board.words()[MARKS + lane / 64 % MARK_WORDS], 1 << (lane % 64))
}

impl Board {
    pub(crate) fn create() -> io::Result<Self> {
        Ok(Self(Arc::new(Region::create("multiprocess-board", BOARD_LEN, BOARD_LEN as u64)?)))
    }

    fn marks(&self, lanes: usize) -> &[AtomicU64] {
        &self.0.words()[MARKS..MARKS + lanes.div_ceil(64).min(MARK_WORDS)]
    }

    /// Returns `true` if any of the first `lanes` lanes is marked. One load for every 64 of them.
    #[inline]
    pub(crate) fn has_marks(&self, lanes: usize) -> bool {
        self.marks(lanes).iter().any(|word| word.load(SeqCst) != 0)
    }

    /// Which of them are marked, as bits of their words.
    pub(crate) fn marked(&self, lanes: usize) -> impl Iterator<Item = usize> {
        self.marks(lanes).iter().enumerate().flat_map(|(at, word)| bits(at, word.load(SeqCst)))
    }

    /// The same, and takes the marks away. The caller then looks into each of these lanes.
    pub(crate) fn take_marked(&self, lanes: usize) -> impl Iterator<Item = usize> {
        self.marks(lanes).iter().enumerate().flat_map(|(at, word)| bits(at, result_notification::take_marks(word)))
    }

    /// Marks a lane for somebody in this process.
    pub(crate) fn marker(&self, lane: usize) -> Marker {
        Marker { board: self.0.clone(), lane }
    }

    /// Calls `react` when a result has come while it is armed.
    pub(crate) fn alarm(&self, react: impl Fn() + Send + Sync + 'static) -> io::Result<Arc<WaitQueue>> {
        WaitQueue::alarm(self.0.clone(), 0, react)
    }
}

/// The bits of word `at` that are set, lowest first.
fn bits(at: usize, mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (word != 0).then(|| word.trailing_zeros() as usize)?;
        word &= word - 1;
        Some(64 * at + bit)
    })
}

/// Has the pool look into one lane.
pub(crate) struct Marker {
    board: Arc<Region>,
    lane: usize,
}

impl Marker {
    pub(crate) fn mark(&self) {
        let (word, bit) = mark_of(&self.board, self.lane);
        result_notification::mark(word, bit);
    }
}

/// How a worker reaches its pool.
#[derive(Clone)]
pub(super) struct PoolDoorbell {
    pub(super) board: Arc<Region>,
    pub(super) lane: usize,
    pub(super) queue: Arc<WaitQueue>,
}

impl PoolDoorbell {
    fn mark(&self) -> (&AtomicU64, u64) {
        mark_of(&self.board, self.lane)
    }

    /// Has the pool look into the lane, asleep or not.
    pub(super) fn notify(&self) {
        let (word, bit) = self.mark();
        result_notification::mark(word, bit);
        self.queue.notify_one();
    }
}

impl NotifyTarget for PoolDoorbell {
    #[inline]
    fn mark(&self) -> (&AtomicU64, u64) {
        Self::mark(self)
    }

    #[inline]
    fn may_sleep(&self) -> bool {
        self.queue.has_sleepers_after_rmw()
    }

    fn wake(&self) {
        self.queue.notify_one();
    }
}
