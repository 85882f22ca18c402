//! Timers that measure real time, whatever tokio's clock shows.
//!
//! Other processes do not live on tokio's clock: a test that pauses it (`tokio::time::pause`, `start_paused`) must neither
//! end a wait for one of them early nor let it stand. tokio's own timer is used where its clock shows the real time, for
//! it takes no system call. Where it does not, or where it fired early, a
//! [timerfd](https://man7.org/linux/man-pages/man2/timerfd_create.2.html) is used: five system calls for a wait that sleeps.

use super::{reactor, refuse};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::task::coop;
use tokio::time::Sleep;

/// A deadline beyond the range of the clock is never.
const NEVER: Duration = Duration::from_secs(30 * 365 * 86400);

/// The time of a wait is over.
#[derive(Debug)]
pub(crate) struct Elapsed;

/// `future`, for so long. It is polled first, so a timeout of nothing still tries.
///
/// # Errors
/// Outside a runtime, and in one that was built without a timer.
pub(crate) fn limited<F: Future>(
    timeout: Duration,
    future: F,
) -> io::Result<impl Future<Output = Result<F::Output, Elapsed>>> {
    let at = Instant::now() + timeout.min(NEVER);
    let sleep = reactor::timer(at)?;
    Ok(first_of(future, passes(at, sleep)))
}

/// [`limited`] for callers that know that there is a timer. Panics where tokio's own `timeout` does.
pub(crate) async fn within<F: Future>(timeout: Duration, future: F) -> Result<F::Output, Elapsed> {
    by(Instant::now() + timeout.min(NEVER), future).await
}

/// The same until `at`.
pub(crate) async fn by<F: Future>(at: Instant, future: F) -> Result<F::Output, Elapsed> {
    first_of(future, sleep_until(at)).await
}

/// Resolves after `time`. Panics where tokio's own `sleep` does.
pub(crate) async fn sleep(time: Duration) {
    sleep_until(Instant::now() + time.min(NEVER)).await;
}

/// Resolves at `at`. Panics where tokio's own `sleep_until` does.
pub(crate) async fn sleep_until(at: Instant) {
    passes(at, tokio::time::sleep_until(at.into())).await;
}

async fn first_of<F: Future>(future: F, alarm: impl Future<Output = ()>) -> Result<F::Output, Elapsed> {
    let (mut future, mut alarm) = (pin!(future), pin!(alarm));
    poll_fn(|cx| {
        let had_budget = coop::has_budget_remaining();
        if let Poll::Ready(value) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(value));
        }
        // A future that uses up the task's budget at each poll would keep the clock from ever being looked at.
        let elapsed = match had_budget && !coop::has_budget_remaining() {
            true => pin!(coop::unconstrained(alarm.as_mut())).poll(cx),
            false => alarm.as_mut().poll(cx),
        };
        elapsed.map(|()| Err(Elapsed))
    })
    .await
}

/// Resolves at `at`, by the real clock.
async fn passes(at: Instant, sleep: Sleep) {
    if shows_real_time() {
        sleep.await;
    }
    while Instant::now() < at {
        match real_timer(at) {
            Ok(timer) => drop(timer.readable().await),
            // Out of descriptors: this costs a CPU, and only with a clock that was paused.
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

/// Returns `true` if tokio's clock is neither paused nor was.
fn shows_real_time() -> bool {
    let before = Instant::now();
    let shown = tokio::time::Instant::now().into_std();
    before <= shown && shown <= Instant::now()
}

fn real_timer(at: Instant) -> io::Result<reactor::Watched<Arc<OwnedFd>>> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    refuse::at("timerfd")?;
    let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
    // Nothing would disarm it.
    let left = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
    let once = Itimerspec {
        it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
        it_value: Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() },
    };
    refuse::at("timerfd")?;
    rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &once)?;
    reactor::watch(Arc::new(timer), Interest::READABLE)
}
