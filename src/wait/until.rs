//! The one loop that suspends: try, look again for a while, take a place, try once more, sleep.

use super::bell::Nap;
use super::line::{Line, Turn};
use super::look::{Look, Looking};
use crate::os::fork;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;

/// Resolves to what `attempt` yields, trying whenever `line` is notified.
///
/// Takes its place in line at the first poll. Dropped: it has not succeeded, so whatever `attempt` does has not
/// happened, and a notice that was meant for it goes on to the next.
pub(crate) fn until<T>(
    line: &Arc<Line>,
    mut attempt: impl FnMut() -> Option<T>,
) -> impl Future<Output = io::Result<T>> {
    until_in_turn(line, None, move |_| attempt())
}

/// [`until`] for an attempt that is told whether it is made from the line, or ahead of it. With a `turn` it is in line
/// already and never tries ahead.
pub(crate) async fn until_in_turn<T>(
    line: &Arc<Line>,
    turn: Option<Turn>,
    mut attempt: impl FnMut(bool) -> Option<T>,
) -> io::Result<T> {
    let mut waiting = Waiting { turn, ..Waiting::default() };
    poll_fn(|cx| waiting.poll(line, &mut attempt, cx)).await
}

#[derive(Default)]
struct Waiting {
    turn: Option<Turn>,
    looking: Option<Looking>,
    has_looked: bool,
}

impl Waiting {
    fn poll<T>(
        &mut self,
        line: &Arc<Line>,
        attempt: &mut impl FnMut(bool) -> Option<T>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        fork::check()?;
        let coop = ready!(tokio::task::coop::poll_proceed(cx));
        let mut has_tried = false;
        if self.turn.is_none() {
            if !line.has_waiters()
                && let Some(value) = attempt(false)
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
            turn.succeed();
        }
        Poll::Ready(result)
    }

    fn poll_in_line<T>(
        &mut self,
        line: &Arc<Line>,
        attempt: &mut impl FnMut(bool) -> Option<T>,
        has_tried: bool,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        let Some(turn) = &self.turn else { return Poll::Pending };
        if !turn.is_front(cx.waker()) {
            return Poll::Pending;
        }
        if !has_tried && let Some(value) = attempt(true) {
            if let Some(looking) = &self.looking {
                line.look.paid(looking);
            }
            return Poll::Ready(Ok(value));
        }
        if !self.has_looked {
            self.has_looked = true;
            self.looking = line.look.begin();
            let found = self.looking.as_ref().and_then(|looking| line.look.in_place(looking, &mut || attempt(true)));
            if let Some(value) = found {
                return Poll::Ready(Ok(value));
            }
        }
        if self.looking.as_ref().is_some_and(|looking| !line.look.is_over(looking)) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.looking = None;
        turn.prepare_sleep(cx.waker(), || line.listen())?;
        attempt(true).map_or(Poll::Pending, |value| Poll::Ready(Ok(value)))
    }
}

/// What `attempt` yields now, if it does: for who mostly need not wait, without what a wait has to prepare. Like one it
/// costs the task a part of its budget, so that a loop of these leaves other tasks their turns.
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

/// [`until`] for those who wait for different things that come by one line, which has a reader: each tries for itself
/// while it looks, and the reader wakes by name who sleeps. So nobody need be polled for others to go on.
///
/// `sleep` leaves a waker with the reader; `attempt` reads what has come, for others too.
pub(crate) async fn until_read<T>(
    line: &Arc<Line>,
    mut attempt: impl FnMut() -> Option<T>,
    mut sleep: impl FnMut(&Waker),
) -> io::Result<T> {
    let (mut looking, mut has_looked) = (None, false);
    poll_fn(|cx| {
        fork::check()?;
        let coop = ready!(tokio::task::coop::poll_proceed(cx));
        let mut poll = || {
            if let Some(value) = attempt() {
                if let Some(looking) = &looking {
                    line.look.paid(looking);
                }
                return Poll::Ready(Ok(value));
            }
            if !has_looked {
                has_looked = true;
                looking = line.look.begin();
                let found = looking.as_ref().and_then(|looking| line.look.in_place(looking, &mut attempt));
                if let Some(value) = found {
                    return Poll::Ready(Ok(value));
                }
            }
            if looking.as_ref().is_some_and(|looking| !line.look.is_over(looking)) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            looking = None;
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

/// The look before the sleep, for who waits for an alarm.
#[derive(Default)]
pub(crate) struct Watchful {
    looking: Option<Looking>,
    has_looked: bool,
}

/// What looking came to.
pub(crate) enum Seen<T> {
    Found(T),
    /// Nothing yet: look again once other tasks had their turn.
    Again,
    /// It is time to sleep.
    Over,
}

impl Watchful {
    pub(crate) fn look<T>(&mut self, line: &Line, attempt: &mut impl FnMut() -> Option<T>) -> Seen<T> {
        self.look_as(&line.look, attempt)
    }

    /// The same for who waits for several lines at once, and has learned from all of them how long to look.
    pub(crate) fn look_as<T>(&mut self, look: &Look, attempt: &mut impl FnMut() -> Option<T>) -> Seen<T> {
        if !self.has_looked {
            self.has_looked = true;
            self.looking = look.begin();
            let found = self.looking.as_ref().and_then(|looking| look.in_place(looking, attempt));
            if let Some(value) = found {
                return Seen::Found(value);
            }
        } else if let Some(value) = attempt() {
            self.looking.iter().for_each(|looking| look.paid(looking));
            return Seen::Found(value);
        }
        if self.looking.as_ref().is_some_and(|looking| !look.is_over(looking)) {
            return Seen::Again;
        }
        self.looking = None;
        Seen::Over
    }
}

/// [`until`] for a thread without a runtime; `None` at the deadline.
pub(crate) fn until_blocking<T>(
    line: &Arc<Line>,
    deadline: Option<Instant>,
    mut attempt: impl FnMut() -> Option<T>,
) -> io::Result<Option<T>> {
    until_blocking_in_turn(line, None, deadline, |_| attempt())
}

/// [`until_in_turn`] for a thread without a runtime; `None` at the deadline.
pub(crate) fn until_blocking_in_turn<T>(
    line: &Arc<Line>,
    turn: Option<Turn>,
    deadline: Option<Instant>,
    mut attempt: impl FnMut(bool) -> Option<T>,
) -> io::Result<Option<T>> {
    fork::check()?;
    if turn.is_none() && !line.has_waiters() {
        if let Some(value) = attempt(false) {
            return Ok(Some(value));
        }
        let looking = line.look.begin();
        if let Some(value) = looking.as_ref().and_then(|looking| line.look.in_place(looking, &mut || attempt(false))) {
            return Ok(Some(value));
        }
        // This thread has no other tasks; and who yields the CPU while somebody else wants it loses a time slice.
        while let Some(looking) = looking.as_ref().filter(|looking| !line.look.is_over(looking)) {
            if let Some(value) = line.look.in_place(looking, &mut || attempt(false)) {
                return Ok(Some(value));
            }
        }
    }
    let turn = turn.unwrap_or_else(|| line.join());
    let nap = Nap::of_thread(line.family(), line.hangup())?;
    loop {
        if turn.is_front(&nap.waker) {
            turn.prepare_sleep(&nap.waker, || Ok(()))?;
            if let Some(value) = attempt(true) {
                turn.succeed();
                return Ok(Some(value));
            }
        }
        if !nap.until(deadline)? {
            return Ok(None);
        }
    }
}

/// Panics inside async code, as tokio's own blocking calls do, by one of them.
#[inline]
#[track_caller]
pub(crate) fn refuse_inside_async() {
    if tokio::runtime::Handle::try_current().is_ok() {
        drop(tokio::sync::Mutex::const_new(()).blocking_lock());
    }
}
