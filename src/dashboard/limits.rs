//! How much memory a dashboard takes at most, as computed from the limits of its parts.

use super::{drawings, history, recorder, server};

/// For each pool.
pub(super) const POOL: usize = history::MOST_POOL_BYTES;
/// For each queue.
pub(super) const QUEUE: usize = history::MOST_QUEUE_BYTES;
/// For all drawings.
pub(super) const DRAWINGS: usize = drawings::MOST_BYTES;
/// For all connections, with what the kernel has of them: it doubles the sizes for which it is asked.
pub(super) const CONNECTIONS: usize =
    server::CONNECTIONS * (2 * server::HEAD + 2 * (server::SEND + server::RECEIVE) as usize);
/// For the thread.
pub(super) const THREAD: usize = recorder::STACK;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documents_say_what_the_limits_add_up_to() {
        let (kib, mib) = (|bytes: usize| bytes.div_ceil(1 << 10), |bytes: usize| bytes.div_ceil(1 << 20));
        let wanted = format!(
            "at most {} MiB for each pool and {} KiB for each queue, and at most {} MiB for pictures that are kept or being sent, unless \
             a single page is larger, and {} MiB for connections and the thread",
            mib(POOL),
            kib(QUEUE).next_multiple_of(16),
            mib(DRAWINGS),
            mib(CONNECTIONS + THREAD)
        );
        let words = |text: &str| text.replace("///", "").split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words(include_str!("server.rs")).contains(&words(&wanted)), "write: {wanted}");
    }
}
