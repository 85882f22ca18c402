//! The five ways to acquire a primitive, written once: in a task, at once, with a timeout, and on a thread.
//!
//! A primitive defines how it is acquired ([`Acquire`]). Here a refusal, a timeout and the death of the last holder become the
//! result that its public methods return.

use crate::error::{Error, ErrorKind, LockError, Result, Topic};
use crate::os::timer;
use crate::wait::refuse_inside_async;
use std::io;
use std::time::{Duration, Instant};

/// A guard, and whether the last holder died without releasing.
pub(super) struct Held<G> {
    pub(super) guard: G,
    pub(super) owner_died: bool,
}

/// An object that can be acquired.
pub(super) trait Acquire {
    /// Proof that it was taken, from which the guard is made.
    type Taken;
    type Guard;

    /// Takes it if that needs no waiting.
    fn try_take(&self) -> io::Result<Option<Self::Taken>>;
    /// Acquires it when it is free. A dropped future has not acquired it.
    fn take(&self) -> impl Future<Output = io::Result<Self::Taken>>;
    /// Takes it when it is free, on a thread without a runtime; `None` at the deadline.
    fn take_blocking(&self, deadline: Option<Instant>) -> io::Result<Option<Self::Taken>>;
    /// The guard of what was taken.
    fn guard(&self, taken: Self::Taken) -> io::Result<Held<Self::Guard>>;
    /// The text of an error of this kind.
    fn message(kind: ErrorKind) -> String;

    /// A further guard for a caller that holds it already.
    fn guard_again(&self) -> Option<Self::Guard> {
        None
    }

    /// A last try after a timeout: on a busy machine the time may be over before the first one, as newcomers let sleepers go
    /// first.
    fn try_at_deadline(&self) -> io::Result<Option<Self::Taken>> {
        self.try_take()
    }
}

type Outcome<A> = Result<<A as Acquire>::Guard, LockError<<A as Acquire>::Guard>>;

/// Acquires `what` in a task.
#[inline]
pub(super) async fn wait<A: Acquire>(what: &A) -> Outcome<A> {
    match what.guard_again() {
        Some(guard) => Ok(guard),
        None => finish(what, what.take().await.map(Some), ErrorKind::Timeout),
    }
}

/// Acquires `what` now or not at all.
#[inline]
pub(super) fn attempt<A: Acquire>(what: &A) -> Outcome<A> {
    match what.guard_again() {
        Some(guard) => Ok(guard),
        None => finish(what, what.try_take(), ErrorKind::WouldBlock),
    }
}

/// Acquires `what` in a task within `timeout`.
pub(super) async fn wait_timeout<A: Acquire>(what: &A, timeout: Duration) -> Outcome<A> {
    if let Some(guard) = what.guard_again() {
        return Ok(guard);
    }
    let taken = match timer::limited(timeout, what.take()) {
        Ok(taking) => taking.await.map_or_else(|_| what.try_at_deadline(), |taken| taken.map(Some)),
        Err(error) => Err(error),
    };
    finish(what, taken, ErrorKind::Timeout)
}

/// Acquires `what` on a thread without a runtime.
#[inline]
#[track_caller]
pub(super) fn block<A: Acquire>(what: &A) -> Outcome<A> {
    block_until(what, None)
}

/// Acquires `what` on a thread without a runtime within `timeout`.
#[track_caller]
pub(super) fn block_timeout<A: Acquire>(what: &A, timeout: Duration) -> Outcome<A> {
    block_until(what, Instant::now().checked_add(timeout))
}

#[inline]
#[track_caller]
fn block_until<A: Acquire>(what: &A, deadline: Option<Instant>) -> Outcome<A> {
    refuse_inside_async();
    if let Some(guard) = what.guard_again() {
        return Ok(guard);
    }
    let taken = match what.take_blocking(deadline) {
        Ok(None) => what.try_at_deadline(),
        taken => taken,
    };
    finish(what, taken, ErrorKind::Timeout)
}

/// The result for the user of an attempt to take `what`. `missed`: the kind of error if it was not taken.
#[inline]
pub(super) fn finish<A: Acquire>(what: &A, taken: io::Result<Option<A::Taken>>, missed: ErrorKind) -> Outcome<A> {
    // The usual case first, as one straight line of code.
    match taken {
        Ok(Some(taken)) => match what.guard(taken) {
            Ok(Held { guard, owner_died: false }) => Ok(guard),
            held => Err(failure::<A>(held.map(Some), missed)),
        },
        Ok(None) => Err(failure::<A>(Ok(None), missed)),
        Err(error) => Err(failure::<A>(Err(error), missed)),
    }
}

#[cold]
fn failure<A: Acquire>(held: io::Result<Option<Held<A::Guard>>>, missed: ErrorKind) -> LockError<A::Guard> {
    match held {
        Ok(Some(held)) => {
            let died = ErrorKind::OwnerDied;
            LockError::new(Error::new(died, A::message(died)).explained_by(Topic::OwnerDied), Some(held.guard))
        }
        Ok(None) => LockError::new(Error::new(missed, A::message(missed)), None),
        Err(error) => LockError::new(Error::io(A::message(ErrorKind::Io), error), None),
    }
}
