//! The one loop that suspends: try, spin, take a place, try once more, sleep.

use super::doorbell::Parker;
use super::local_queue::{Turn, WaitQueue};
use super::spin::{Spin, SpinWindow};
use crate::os::fork;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;

/// An attempt that a wait repeats.
pub(crate) trait Attempt<T> {
    /// Tries once, from the local queue or ahead of it.
    fn attempt(&mut self, in_line: bool) -> Option<T>;

    /// Returns `true` if a task of this process will make the next attempt succeed, and then call [`WaitQueue::wake_front`]: the front need not
    /// spin, and no other process need know that it sleeps.
    ///
    /// After a success: whether the same holds for the attempt after it.
    #[inline]
    fn is_local(&self) -> bool {
        false
    }
}

impl<T, F: FnMut(bool) -> Option<T>> Attempt<T> for F {
    #[inline]
    fn attempt(&mut self, in_line: bool) -> Option<T> {
        self(in_line)
    }
}

/// Resolves to the result of `attempt`, which is called whenever `line` is notified.
///
/// It queues at the first poll. A dropped future has not succeeded: the effect of `attempt` has not happened, and a notification
/// that was meant for it goes to the next waiter.
pub(crate) fn until<T>(
    line: &Arc<WaitQueue>,
    mut attempt: impl FnMut() -> Option<T>,
) -> impl Future<Output = io::Result<T>> {
    until_in_turn(line, None, move |_| attempt())
}

/// [`until`] for an attempt that distinguishes whether it is made from the queue, or ahead of it. With a `turn` it is in the queue
/// already and never tries ahead. The turn is given up before `attempt` is dropped.
pub(crate) async fn until_in_turn<T>(
    line: &Arc<WaitQueue>,
    turn: Option<Turn>,
    mut attempt: impl Attempt<T>,
) -> io::Result<T> {
    let mut waiting = Waiting { turn, ..Waiting::default() };
    poll_fn(|cx| waiting.poll(line, &mut attempt, cx)).await
}

#[derive(Default)]
struct Waiting {
    turn: Option<Turn>,
    window: Option<SpinWindow>,
    has_spun: bool,
}

impl Waiting {
    fn poll<T>(
        &mut self,
        line: &Arc<WaitQueue>,
        attempt: &mut impl Attempt<T>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        fork::check()?;
        let coop = ready!(tokio::task::coop::poll_proceed(cx));
        let mut has_tried = false;
        if self.turn.is_none() {
            if !line.has_waiters()
                && let Some(value) = attempt.attempt(false)
            {
                coop.made_progress();
                return Poll::Ready(Ok(value));
            }
            self.turn = Some(line.join());
            has_tried = true;
        }
        let result = ready!(self.poll_in_line(line, attempt, has_tried, cx));
        coop.made_progress();
        if let (Ok(_), Some(turn)) = (&result, self.turn.take()) {
            turn.succeed(|| attempt.is_local());
        }
        Poll::Ready(result)
    }

    fn poll_in_line<T>(
        &mut self,
        line: &Arc<WaitQueue>,
        attempt: &mut impl Attempt<T>,
        has_tried: bool,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        let Some(turn) = &self.turn else { return Poll::Pending };
        if !turn.is_front(cx.waker()) {
            return Poll::Pending;
        }
        if !has_tried && let Some(value) = attempt.attempt(true) {
            if let Some(window) = &self.window {
                line.spin.paid(window);
            }
            return Poll::Ready(Ok(value));
        }
        if attempt.is_local() {
            self.window = None;
            let value = try_before_sleep(turn, cx.waker(), attempt, || line.listen())?;
            return value.map_or(Poll::Pending, |value| Poll::Ready(Ok(value)));
        }
        if !self.has_spun {
            self.has_spun = true;
            self.window = line.spin.begin();
            let found =
                self.window.as_ref().and_then(|window| line.spin.in_place(window, &mut || attempt.attempt(true)));
            if let Some(value) = found {
                return Poll::Ready(Ok(value));
            }
        }
        if self.window.as_ref().is_some_and(|window| !line.spin.is_over(window)) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.window = None;
        let value = try_before_sleep(turn, cx.waker(), attempt, || line.listen())?;
        value.map_or(Poll::Pending, |value| Poll::Ready(Ok(value)))
    }
}

/// The last attempt of the front before it sleeps, made when a change after it is sure to wake the front.
fn try_before_sleep<T>(
    turn: &Turn,
    waker: &Waker,
    attempt: &mut impl Attempt<T>,
    listen: impl Fn() -> io::Result<()>,
) -> io::Result<Option<T>> {
    if attempt.is_local() {
        turn.prepare_sleep(waker, true, &listen)?;
        let value = attempt.attempt(true);
        if value.is_some() || attempt.is_local() {
            return Ok(value);
        }
    }
    turn.prepare_sleep(waker, false, &listen)?;
    Ok(attempt.attempt(true))
}

/// Returns the result of `attempt` now: for callers that rarely have to wait, without the preparation that a wait needs. It costs
/// the task a part of its budget, as a wait does, so that a loop of these lets other tasks run.
#[inline]
pub(crate) async fn at_once<T>(mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    poll_fn(|cx| {
        let coop = ready!(tokio::task::coop::poll_proceed(cx));
        let value = attempt();
        if value.is_some() {
            coop.made_progress();
        }
        Poll::Ready(value)
    })
    .await
}

/// [`until`] for tasks that wait for different things through one queue, which has a reader. Each tries for itself while it spins,
/// and the reader wakes the sleeping tasks that it read for. So no task need be polled for others to continue.
///
/// `sleep` leaves a waker with the reader. `attempt` reads all that has come, also for others.
pub(crate) async fn until_read<T>(
    line: &Arc<WaitQueue>,
    mut attempt: impl FnMut() -> Option<T>,
    mut sleep: impl FnMut(&Waker),
) -> io::Result<T> {
    let (mut window, mut has_spun) = (None, false);
    poll_fn(|cx| {
        fork::check()?;
        let coop = ready!(tokio::task::coop::poll_proceed(cx));
        let mut poll = || {
            if let Some(value) = attempt() {
                if let Some(window) = &window {
                    line.spin.paid(window);
                }
                return Poll::Ready(Ok(value));
            }
            if !has_spun {
                has_spun = true;
                window = line.spin_among_all();
                let found = window.as_ref().and_then(|window| line.spin.in_place(window, &mut attempt));
                if let Some(value) = found {
                    return Poll::Ready(Ok(value));
                }
            }
            if window.as_ref().is_some_and(|window| !line.spin.is_over(window)) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            window = None;
            sleep(cx.waker());
            line.listen()?;
            line.arm()?;
            attempt().map_or(Poll::Pending, |value| Poll::Ready(Ok(value)))
        };
        let polled = poll();
        if polled.is_ready() {
            coop.made_progress();
        }
        polled
    })
    .await
}

/// Spinning before sleeping, for a caller that waits for an alarm.
#[derive(Default)]
pub(crate) struct Spinner {
    window: Option<SpinWindow>,
    has_spun: bool,
}

/// The outcome of spinning once.
pub(crate) enum Spun<T> {
    Found(T),
    /// Nothing yet: spin again after other tasks had their turn.
    Again,
    /// It is time to sleep.
    Over,
}

impl Spinner {
    pub(crate) fn spin<T>(&mut self, line: &WaitQueue, attempt: &mut impl FnMut() -> Option<T>) -> Spun<T> {
        self.spin_with(&line.spin, attempt)
    }

    /// The same for a caller that waits for several queues at once, with one learned window for all of them.
    pub(crate) fn spin_with<T>(&mut self, spin: &Spin, attempt: &mut impl FnMut() -> Option<T>) -> Spun<T> {
        if !self.has_spun {
            self.has_spun = true;
            self.window = spin.begin();
            let found = self.window.as_ref().and_then(|window| spin.in_place(window, attempt));
            if let Some(value) = found {
                return Spun::Found(value);
            }
        } else if let Some(value) = attempt() {
            self.window.iter().for_each(|window| spin.paid(window));
            return Spun::Found(value);
        }
        if self.window.as_ref().is_some_and(|window| !spin.is_over(window)) {
            return Spun::Again;
        }
        self.window = None;
        Spun::Over
    }
}

/// [`until`] for a thread without a runtime; `None` at the deadline.
pub(crate) fn until_blocking<T>(
    line: &Arc<WaitQueue>,
    deadline: Option<Instant>,
    mut attempt: impl FnMut() -> Option<T>,
) -> io::Result<Option<T>> {
    until_blocking_in_turn(line, None, deadline, |_| attempt())
}

/// [`until_in_turn`] for a thread without a runtime; `None` at the deadline.
pub(crate) fn until_blocking_in_turn<T>(
    line: &Arc<WaitQueue>,
    turn: Option<Turn>,
    deadline: Option<Instant>,
    mut attempt: impl Attempt<T>,
) -> io::Result<Option<T>> {
    fork::check()?;
    if turn.is_none() && !line.has_waiters() {
        if let Some(value) = attempt.attempt(false) {
            return Ok(Some(value));
        }
        let window = line.spin.begin();
        let mut spin = |window| line.spin.in_place(window, &mut || attempt.attempt(false));
        if let Some(value) = window.as_ref().and_then(&mut spin) {
            return Ok(Some(value));
        }
        // This thread has no other tasks, and yielding the CPU while another thread wants it would lose a time slice.
        while let Some(window) = window.as_ref().filter(|window| !line.spin.is_over(window)) {
            if let Some(value) = spin(window) {
                return Ok(Some(value));
            }
        }
    }
    let turn = turn.unwrap_or_else(|| line.join());
    let parker = Parker::of_thread(line.family(), line.hangup())?;
    loop {
        if turn.is_front(&parker.waker)
            && let Some(value) = try_before_sleep(&turn, &parker.waker, &mut attempt, || Ok(()))?
        {
            turn.succeed(|| attempt.is_local());
            return Ok(Some(value));
        }
        if !parker.until(deadline)? {
            return Ok(None);
        }
    }
}

/// Drives `future` on this thread, which is in no runtime, by a runtime of its own.
#[cfg(not(multiprocess_loom))]
pub(crate) fn block_on<F: Future>(future: F) -> io::Result<F::Output> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future))
}

/// Panics inside async code, as tokio's own blocking calls do, by one of them.
#[inline]
#[track_caller]
pub(crate) fn refuse_inside_async() {
    if tokio::runtime::Handle::try_current().is_ok() {
        drop(tokio::sync::Mutex::const_new(()).blocking_lock());
    }
}
