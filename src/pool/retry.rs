//! Which failures of items are tried again.
//!
//! The scheduler tries again by the kind of a failure; a predicate is asked by the caller (`attempts`), for whom each attempt is
//! a call of its own.
//!
//! # Death
//! | killed | what follows | test (`tests/pool_pieces.rs`) |
//! |---|---|---|
//! | a worker, before it has begun the item | the item is given to another, which is no attempt | `worker_killed_at_any_step_costs_an_attempt_only_if_the_item_had_begun` |
//! | a worker that is at the item | a failed attempt; the next one by [`Retry::DIED`] or a predicate for it | the same |
//! | a worker, after its result is published | the result | the same |
//!
//! # Cancel
//! | dropped | what follows | test |
//! |---|---|---|
//! | the call, in an attempt or in a rest between two | no further attempt | `ten_thousand_dropped_calls_make_no_further_attempt_and_leave_all_room` |

use crate::error::{ErrorKind, Result};
use std::ops::BitOr;
use std::sync::Arc;

/// Which failures the [`retries`](crate::Call::retries) of a call are for.
///
/// ```
/// use multiprocess::{self as mp, Pool, Retry, Value};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// fn dies_once(calls: Value<u32>) -> u32 {
///     if calls.fetch_add(1) == 0 {
///         std::process::abort();
///     }
///     7
/// }
/// let pool = Pool::new(1)?;
/// // A death is tried again; an overrun is not.
/// assert_eq!(pool.apply(dies_once, (Value::new(0)?,)).retries(3).retry_if(Retry::DIED).await?, 7);
/// # Ok(()) }) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Retry(u8);

impl Retry {
    /// The worker died.
    pub const DIED: Self = Self(1);
    /// The item overran its time.
    pub const TIMED_OUT: Self = Self(2);
    /// The worker reached its [`memory_limit`](crate::PoolBuilder::memory_limit). A retry helps if memory that earlier
    /// items left behind was the cause. It fails again if the item alone needs too much.
    pub const MEMORY_LIMIT: Self = Self(4);

    pub(crate) const ALL: Self = Self(7);

    /// None by the scheduler: a predicate decides.
    pub(super) const NONE: Self = Self(0);

    /// Its bits, for messages to other hosts.
    #[cfg(feature = "cluster")]
    pub(crate) fn to_bits(self) -> u8 {
        self.0
    }

    /// The kinds of [`to_bits`](Self::to_bits); `None` for any other bits.
    #[cfg(feature = "cluster")]
    pub(crate) fn from_bits(bits: u8) -> Option<Self> {
        (bits <= Self::ALL.0).then_some(Self(bits))
    }

    pub(super) fn is_for(self, kind: ErrorKind) -> bool {
        let which = match kind {
            ErrorKind::ProcessDied => Self::DIED,
            ErrorKind::MemoryLimit => Self::MEMORY_LIMIT,
            ErrorKind::Timeout => Self::TIMED_OUT,
            _ => return false,
        };
        self.0 & which.0 != 0
    }
}

/// Either.
impl BitOr for Retry {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// When a [`Call`](crate::Call) is tried again: after failures of a kind ([`Retry`]), or after a result for which a predicate
/// (`fn(&Result<R>) -> bool`) holds.
pub trait RetryIf<R> {
    #[doc(hidden)]
    fn condition(self) -> Condition<R>;
}

/// A condition, whichever it is.
#[doc(hidden)]
pub enum Condition<R> {
    Kinds(Retry),
    Result(Predicate<R>),
}

impl<R> Condition<R> {
    /// The kinds that the scheduler tries again, and the predicate for each result.
    pub(super) fn parts(self) -> (Retry, Option<Predicate<R>>) {
        match self {
            Self::Kinds(which) => (which, None),
            Self::Result(predicate) => (Retry::NONE, Some(predicate)),
        }
    }
}

pub(super) type Predicate<R> = Arc<dyn Fn(&Result<R>) -> bool + Send + Sync>;

impl<R> RetryIf<R> for Retry {
    fn condition(self) -> Condition<R> {
        Condition::Kinds(self)
    }
}

impl<R, F: Fn(&Result<R>) -> bool + Send + Sync + 'static> RetryIf<R> for F {
    fn condition(self) -> Condition<R> {
        Condition::Result(Arc::new(self))
    }
}
