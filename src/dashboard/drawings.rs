//! Drawings that are kept for a moment and shared by all who ask for them.

use hyper::body::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Widths are rounded down to a multiple of this.
pub(super) const STEP: u32 = 20;
/// A drawing is not older than this, and in so long at most [`KEPT`] are made.
const FRESH: Duration = Duration::from_millis(400);
const KEPT: usize = 8;
/// Drawings that are kept or still being sent have so many bytes together at most, unless a single one has more.
/// A drawing that turns out to be larger than the room left is dropped.
pub(super) const MOST_BYTES: usize = 32 << 20;

/// Drawings of the last moments, at most one for each width.
#[derive(Default)]
pub(super) struct Drawings {
    kept: Vec<Drawing>,
    /// The bytes of all drawings that somebody has.
    held: Arc<AtomicUsize>,
    /// The bytes of the last one: the next one has about as many.
    last: usize,
}

struct Drawing {
    width: u32,
    at: Instant,
    text: Bytes,
}

/// A text that is counted as long as somebody has it.
struct Counted {
    text: Box<str>,
    held: Arc<AtomicUsize>,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        self.text.as_bytes()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.held.fetch_sub(self.text.len(), Relaxed);
    }
}

impl Drawings {
    /// A fresh drawing of this width; of the nearest width if enough have been made in this moment. `None` if slow readers hold
    /// so many that there is no room for another.
    pub(super) fn get(&mut self, width: u32, draw: impl FnOnce(u32) -> String) -> Option<Bytes> {
        let width = width / STEP * STEP;
        self.kept.retain(|drawing| drawing.at.elapsed() < FRESH);
        let nearest = self.kept.iter().min_by_key(|drawing| drawing.width.abs_diff(width));
        let is_enough =
            |drawing: &Drawing| drawing.width == width || self.kept.len() >= KEPT || !self.has_room(self.last);
        if let Some(nearest) = nearest.filter(|drawing| is_enough(drawing)) {
            return Some(nearest.text.clone());
        }
        let drawn = self.has_room(self.last).then(|| draw(width))?;
        self.last = drawn.len();
        match self.has_room(self.last) {
            true => Some(self.keep(width, drawn)),
            false => self.kept.last().map(|latest| latest.text.clone()),
        }
    }

    fn has_room(&self, bytes: usize) -> bool {
        let held = self.held.load(Relaxed);
        held == 0 || held + bytes <= MOST_BYTES
    }

    fn keep(&mut self, width: u32, text: String) -> Bytes {
        self.held.fetch_add(text.len(), Relaxed);
        let text = Bytes::from_owner(Counted { text: text.into(), held: self.held.clone() });
        self.kept.push(Drawing { width, at: Instant::now(), text: text.clone() });
        text
    }

    /// The number of bytes that are kept or being sent, for as long as it is read.
    #[cfg(test)]
    pub(super) fn held(&self) -> Arc<AtomicUsize> {
        self.held.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes the kept drawings so old that none is fresh any more.
    fn age(drawings: &mut Drawings) {
        drawings.kept.iter_mut().for_each(|drawing| drawing.at -= FRESH);
    }

    #[test]
    fn requests_of_a_moment_and_of_nearly_one_width_share_a_drawing() {
        let (mut drawings, mut drawn) = (Drawings::default(), Vec::new());
        let mut get = |drawings: &mut Drawings, width| {
            drawings.get(width, |width| {
                drawn.push(width);
                width.to_string()
            })
        };
        let first = get(&mut drawings, 1_181).unwrap();
        let second = get(&mut drawings, 1_199).unwrap();
        assert_eq!((&first[..], first.as_ptr()), (&b"1180"[..], second.as_ptr()), "not even a copy");
        assert_eq!(get(&mut drawings, 1_200).unwrap(), "1200");
        age(&mut drawings);
        assert_eq!(get(&mut drawings, 1_180).unwrap(), "1180");
        assert_eq!(drawn, [1_180, 1_200, 1_180]);
        assert_eq!((drawings.kept.len(), drawings.held.load(Relaxed)), (1, 8), "of the old ones, what is still read");
        drop((first, second));
        assert_eq!(drawings.held.load(Relaxed), 4);
    }

    #[test]
    fn many_widths_at_once_make_few_drawings() {
        let (mut drawings, mut drawn) = (Drawings::default(), 0);
        for width in 300..=2_400 {
            let text = drawings.get(width, |width| {
                drawn += 1;
                width.to_string()
            });
            assert!(text.is_some_and(|text| !text.is_empty()), "the nearest one");
        }
        assert!(drawings.kept.len() <= KEPT);
        // On a machine under load one moment may have passed meanwhile.
        assert!(drawn <= 3 * KEPT, "{drawn}");
    }

    #[test]
    fn slow_readers_hold_no_more_than_the_limit() {
        let (mut drawings, mut readers) = (Drawings::default(), Vec::new());
        let large = |_| "x".repeat(MOST_BYTES / 4);
        while let Some(text) = drawings.get(400, large) {
            readers.push(text);
            age(&mut drawings);
            assert!(readers.len() <= 4, "{} drawings", readers.len());
        }
        assert_eq!(readers.len(), 4);
        readers.pop();
        assert!(drawings.get(400, large).is_some());
        // One that is too large by itself is shown nevertheless.
        let mut drawings = Drawings::default();
        assert!(drawings.get(400, |_| "x".repeat(MOST_BYTES + 1)).is_some());
        assert!(drawings.get(800, large).is_some_and(|text| text.len() > MOST_BYTES), "that one again");
        // One that has grown beyond the room since the last one.
        let mut drawings = Drawings::default();
        let small = drawings.get(400, |_| "x".to_string());
        age(&mut drawings);
        assert!(drawings.get(400, |_| "x".repeat(MOST_BYTES)).is_none());
        assert_eq!(drawings.held.load(Relaxed), 1);
        drop(small);
        assert!(drawings.get(400, |_| "x".repeat(MOST_BYTES)).is_some());
    }
}
