//! When a child is started again, how often, and after which time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// When a supervised child is started again, how often, and after which time; see
/// [`ProcessBuilder::restart`](crate::ProcessBuilder::restart).
///
/// ```
/// use multiprocess::Restart;
/// use std::time::Duration;
///
/// let restart = Restart::on_failure()
///     .max(3, Duration::from_secs(60))
///     .back_off(Duration::from_millis(50), Duration::from_secs(5));
/// # let _ = restart;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restart {
    pub(super) also_success: bool,
    most: usize,
    within: Duration,
    first: Duration,
    longest: Duration,
}

impl Restart {
    /// Restarts the child when it fails: when it panics, is killed, or ends before its function returns. A function that returns has
    /// succeeded, whatever it returns: to be restarted after an error, let it panic or exit.
    pub fn on_failure() -> Self {
        let (first, longest) = (Duration::from_millis(100), Duration::from_secs(5));
        Self { also_success: false, most: 5, within: Duration::from_secs(10), first, longest }
    }

    /// Restarts the child whenever it has ended, also when its function has returned.
    pub fn always() -> Self {
        Self { also_success: true, ..Self::on_failure() }
    }

    /// Sets the most restarts within any period of `within`. Instead of one more, the child is given up with an error of kind
    /// `RestartLimit`. Default: 5 within 10 seconds.
    pub fn max(mut self, restarts: usize, within: Duration) -> Self {
        (self.most, self.within) = (restarts, within);
        self
    }

    /// Sets the wait before a restart: `first`, and twice as long each time, up to `longest`. After a child has run for as long as
    /// the period given to [`max`](Self::max), it is `first` again. Default: 100 ms to 5 s. With [`Duration::ZERO`] there is no wait.
    pub fn back_off(mut self, first: Duration, longest: Duration) -> Self {
        (self.first, self.longest) = (first, longest.max(first));
        self
    }
}

/// The ends of the children so far.
#[derive(Default)]
pub(super) struct History {
    /// When it was restarted, within the last span, and why.
    restarts: VecDeque<Instant>,
    /// Those of the last restarts.
    causes: VecDeque<String>,
    /// Since the last time that it ran long.
    in_a_row: u32,
}

/// So many causes are kept at most.
const MOST_CAUSES: usize = 16;

impl History {
    /// It has ended, after it ran for `ran`: how long to wait before the next start, or `None` if it is to be given up.
    pub(super) fn next(&mut self, restart: &Restart, now: Instant, ran: Duration, cause: String) -> Option<Duration> {
        let is_old = |at: &Instant| now.duration_since(*at) > restart.within;
        while self.restarts.front().is_some_and(is_old) {
            self.restarts.pop_front();
        }
        if ran >= restart.within {
            self.in_a_row = 0;
        }
        let is_over = self.restarts.len() >= restart.most;
        self.restarts.push_back(now);
        self.causes.push_back(cause);
        while self.causes.len() > self.restarts.len().min(MOST_CAUSES) {
            self.causes.pop_front();
        }
        if is_over {
            return None;
        }
        let doubled = restart.first.saturating_mul(1_u32.checked_shl(self.in_a_row).unwrap_or(u32::MAX));
        self.in_a_row = self.in_a_row.saturating_add(1);
        Some(doubled.min(restart.longest))
    }

    /// How many ends there were, this one included, that counted last.
    pub(super) fn len(&self) -> usize {
        self.restarts.len()
    }

    /// Why it ended the last times, the last one last.
    pub(super) fn causes(&self) -> impl Iterator<Item = &str> {
        self.causes.iter().map(|cause| &**cause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn waits_double_up_to_the_longest_and_begin_anew_after_a_long_run() {
        let restart = Restart::on_failure().max(100, 10 * SECOND).back_off(SECOND, 5 * SECOND);
        let (mut history, now) = (History::default(), Instant::now());
        let mut next = |ran| history.next(&restart, now, ran, String::new()).map(|wait| wait.as_secs());
        assert_eq!([next(SECOND), next(SECOND), next(SECOND), next(SECOND)], [Some(1), Some(2), Some(4), Some(5)]);
        assert_eq!([next(10 * SECOND), next(SECOND)], [Some(1), Some(2)]);
    }

    #[test]
    fn more_restarts_than_permitted_within_the_span_are_given_up_with_their_causes() {
        let restart = Restart::on_failure().max(2, 10 * SECOND).back_off(Duration::ZERO, Duration::ZERO);
        let (mut history, start) = (History::default(), Instant::now());
        let mut next = |at: u32, cause: &str| history.next(&restart, start + at * SECOND, SECOND, cause.into());
        assert_eq!([next(0, "a"), next(8, "b"), next(11, "c")], [Some(Duration::ZERO); 3]);
        assert_eq!(next(12, "d"), None);
        assert_eq!(history.causes().collect::<Vec<_>>(), ["b", "c", "d"]);
    }

    #[test]
    fn the_last_causes_are_kept_and_all_ends_are_counted() {
        let restart = Restart::on_failure().max(100, 10 * SECOND);
        let (mut history, now) = (History::default(), Instant::now());
        for n in 0..50 {
            assert!(history.next(&restart, now, SECOND, n.to_string()).is_some());
        }
        assert_eq!((history.len(), history.causes().count(), history.causes().last()), (50, MOST_CAUSES, Some("49")));
    }

    #[test]
    fn no_restart_at_all_and_very_many_are_possible() {
        let (mut history, now) = (History::default(), Instant::now());
        assert_eq!(history.next(&Restart::always().max(0, SECOND), now, SECOND, String::new()), None);
        let restart = Restart::always().max(usize::MAX, Duration::MAX).back_off(SECOND, Duration::MAX);
        for _ in 0..100 {
            assert!(history.next(&restart, now, Duration::ZERO, String::new()).is_some());
        }
    }
}
