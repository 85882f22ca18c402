//! How many messages a host has asked the server for, and how many it should ask for.
//!
//! A message comes under its own subject, so the request that it answers is not known: the oldest request is taken to be the
//! one, which leaves the sum right. A request that the server has ended no longer counts, nor does one whose time has long
//! passed, nor any from before a reconnect.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A request is forgotten by the server after this.
pub(super) const EXPIRES: Duration = Duration::from_secs(10);
/// After as much more it is over, without an answer, too.
const SLACK: Duration = Duration::from_millis(500);
/// Work for so long is asked for ahead.
const AHEAD: Duration = Duration::from_millis(5);
const MOST_AHEAD: usize = 256;

#[derive(Default)]
pub(super) struct Pulls {
    /// How many messages are to come by each request, and until when.
    requests: VecDeque<(usize, Instant)>,
    outstanding: usize,
    /// How long the items of a message keep one slot, smoothed.
    usual: Option<Duration>,
}

impl Pulls {
    /// Forgets the requests whose time is over.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((left, _)) = self.requests.front().filter(|(left, until)| *left == 0 || *until <= now).copied() {
            self.outstanding -= left;
            self.requests.pop_front();
        }
    }

    /// Returns how many messages to ask for now, by a host with so many slots that is at so many messages.
    pub(super) fn wanted(&mut self, slots: usize, busy: usize, now: Instant) -> usize {
        self.expire(now);
        let want = (slots + self.ahead(slots)).saturating_sub(busy + self.outstanding);
        // Few at a time would be as many requests.
        if want * 4 >= slots || self.outstanding == 0 { want } else { 0 }
    }

    /// Returns the number of messages that the slots will run within a few milliseconds.
    fn ahead(&self, slots: usize) -> usize {
        let Some(usual) = self.usual else { return 0 };
        let ahead = slots as f64 * AHEAD.as_secs_f64() / usual.as_secs_f64().max(1e-9);
        (ahead.round() as usize).min(MOST_AHEAD)
    }

    pub(super) fn asked(&mut self, messages: usize, now: Instant) {
        self.outstanding += messages;
        self.requests.push_back((messages, now + EXPIRES + SLACK));
    }

    /// A message has come.
    pub(super) fn arrived(&mut self) {
        self.over(1);
    }

    /// The server has ended a request, of which so many were still to come; all of the oldest if it does not report that.
    pub(super) fn ended(&mut self, left: Option<usize>) {
        let oldest = self.requests.iter().map(|(left, _)| *left).find(|left| *left > 0);
        self.over(left.or(oldest).unwrap_or(0));
    }

    fn over(&mut self, mut messages: usize) {
        for (left, _) in &mut self.requests {
            let taken = messages.min(*left);
            *left -= taken;
            messages -= taken;
            self.outstanding -= taken;
        }
    }

    /// Whatever was asked for is forgotten: the connection is new, or the consumer.
    pub(super) fn forget(&mut self) {
        self.requests.clear();
        self.outstanding = 0;
    }

    /// Returns how many messages may still come.
    pub(super) fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// The items of a message have taken so long.
    pub(super) fn learn(&mut self, time: Duration) {
        // Items that were long may be long again: asking for too many keeps others waiting.
        self.usual = Some(match self.usual {
            Some(usual) if time < usual => (usual * 7 + time) / 8,
            _ => time,
        });
    }

    /// When to look again at the latest.
    pub(super) fn until(&self) -> Option<Instant> {
        self.requests.iter().find(|(left, _)| *left > 0).map(|(_, until)| *until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_slots_are_asked_for_once() {
        let (mut pulls, now) = (Pulls::default(), Instant::now());
        assert_eq!(pulls.wanted(4, 1, now), 3);
        pulls.asked(3, now);
        assert_eq!(pulls.wanted(4, 1, now), 0);
        pulls.arrived();
        assert_eq!(pulls.wanted(4, 2, now), 0, "its slot is taken now");
        pulls.arrived();
        assert_eq!(pulls.wanted(4, 1, now), 2);
    }

    #[test]
    fn quick_messages_are_asked_for_ahead_and_long_ones_are_not() {
        let (mut pulls, now) = (Pulls::default(), Instant::now());
        pulls.learn(Duration::from_secs(1));
        assert_eq!(pulls.wanted(2, 0, now), 2);
        (0..100).for_each(|_| pulls.learn(Duration::from_micros(100)));
        assert!((80..=102).contains(&pulls.wanted(2, 0, now)));
        pulls.learn(Duration::ZERO);
        (0..1000).for_each(|_| pulls.learn(Duration::ZERO));
        assert_eq!(pulls.wanted(2, 0, now), 258);
        pulls.learn(Duration::from_secs(1));
        assert_eq!(pulls.wanted(2, 0, now), 2);
    }

    #[test]
    fn requests_end_by_word_of_the_server_by_time_and_by_reconnect() {
        let (mut pulls, now) = (Pulls::default(), Instant::now());
        pulls.asked(5, now);
        pulls.asked(2, now);
        pulls.arrived();
        pulls.ended(Some(4));
        assert_eq!(pulls.wanted(7, 0, now), 5);
        pulls.ended(None);
        assert_eq!(pulls.wanted(7, 0, now), 7);
        pulls.asked(7, now);
        assert_eq!(pulls.wanted(7, 0, now + EXPIRES), 0);
        assert!(pulls.until().is_some());
        pulls.expire(now + EXPIRES + SLACK);
        assert_eq!(pulls.until(), None, "a host that cannot ask waits for nothing");
        assert_eq!(pulls.wanted(7, 0, now + EXPIRES + SLACK), 7);
        pulls.asked(7, now);
        pulls.forget();
        // A message that comes all the same is not counted.
        pulls.arrived();
        pulls.ended(None);
        assert_eq!(pulls.wanted(7, 0, now), 7);
    }
}
