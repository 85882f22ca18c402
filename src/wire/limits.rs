//! How large values may be, and how deeply nested.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::cell::Cell;
use std::pin::{Pin, pin};
use std::task::Poll;

/// The levels that are permitted by default.
const DEFAULT: u32 = 1024;
/// The most levels that any limit permits: a value nested deeper is not read.
pub(super) const DEEPEST: u32 = 1 << 17;

thread_local! {
    static LIMIT: Cell<u32> = const { Cell::new(DEFAULT) };
}

/// Returns how many levels a value that is encoded on this thread may have.
#[inline]
pub(super) fn depth() -> u32 {
    LIMIT.get()
}

/// A message of more bytes is refused, on whatever way it goes: lengths are 32 bits, and some of them count what is
/// around a message as well. [`ErrorKind::Encode`](crate::ErrorKind::Encode) documents it for users.
const LARGEST: u64 = (4 << 30) - (1 << 20);

/// A limit that a value exceeds.
#[derive(Clone, Copy)]
pub(super) enum Limit {
    Size,
    Depth,
}

/// Refuses a message of `len` bytes, if that is too large.
#[inline]
pub(super) fn check_size(len: usize) -> Result<(), String> {
    if len as u64 <= LARGEST { Ok(()) } else { Err(too_large(len)) }
}

#[cold]
#[inline(never)]
fn too_large(len: usize) -> String {
    format!(
        "it has {len} bytes or more, and a message can have {LARGEST}: share it as an `Array` or as `SharedMemory`, or \
         write it to a file and send the path"
    )
}

/// Sets the limit back, also when code of users panics.
struct Restore(u32);

impl Restore {
    fn after_setting(levels: usize) -> Self {
        Self(LIMIT.replace(u32::try_from(levels).unwrap_or(u32::MAX).min(DEEPEST)))
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        LIMIT.set(self.0);
    }
}

/// Runs `f` with another limit for how deeply values may be nested.
///
/// A value that leaves this process (an argument, a result, an item of a queue or pipe, a value for a manager) may
/// be nested 1024 levels deep. Each sequence, tuple, map, struct, `Some` and variant with content is a level; a node of a
/// linked list is two, its struct and its `Some`. Deeper values are refused while they are encoded, with
/// [`ErrorKind::Encode`](crate::ErrorKind::Encode), so that what was taken can be read. The limit counts where a value is
/// encoded, on this thread; the receiver needs none. At most 131,072 levels are possible.
///
/// The receiver reads a deep value on a stack that is mapped for it, of up to 32 KiB for each level, of which only what
/// is used takes memory. If there is no such stack to be had, it fails with
/// [`ErrorKind::Decode`](crate::ErrorKind::Decode). Code that handles deep values by recursion has the usual stack of its
/// thread: a linked list of many thousand nodes overflows it when it is dropped, compared or printed, unless its type
/// does that in a loop. So does encoding a value whose type converts itself into another one before it is written
/// (`#[serde(into)]`), or is an internally tagged enum around another enum.
///
/// For asynchronous calls, see [`with_depth_limit_async`]; for results, [`Deep`].
///
/// ```
/// use multiprocess as mp;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// struct Node(Option<Box<Node>>);
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let queue = mp::Queue::unbounded()?;
///         let long = (0..2000).fold(Node(None), |next, _| Node(Some(Box::new(next))));
///         let refused = queue.try_put(long).unwrap_err();
///         assert!(refused.to_string().contains("1024 levels"));
///         mp::with_depth_limit(10_000, || queue.try_put(refused.into_inner()))?;
///         let _long: Node = queue.get().await?;
///         Ok(())
///     })
/// }
/// ```
pub fn with_depth_limit<R>(levels: usize, f: impl FnOnce() -> R) -> R {
    let _restore = Restore::after_setting(levels);
    f()
}

/// Runs a future with a depth limit, as [`with_depth_limit`] runs a function. The limit holds for values that the future itself
/// encodes, not for tasks that it spawns. Dropping the future ends it.
///
/// ```
/// use multiprocess as mp;
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let queue = mp::Queue::unbounded()?;
///         mp::with_depth_limit_async(10, queue.put(Some(Some(1)))).await?;
///         let refused = mp::with_depth_limit_async(1, queue.put(Some(Some(1)))).await;
///         assert_eq!(refused.unwrap_err().kind(), mp::ErrorKind::Encode);
///         Ok(())
///     })
/// }
/// ```
pub async fn with_depth_limit_async<F: Future>(levels: usize, future: F) -> F::Output {
    let mut future: Pin<&mut F> = pin!(future);
    std::future::poll_fn(move |cx| -> Poll<F::Output> {
        let _restore = Restore::after_setting(levels);
        future.as_mut().poll(cx)
    })
    .await
}

/// A value that may be nested as deeply as can be read at all; see [`with_depth_limit`].
///
/// Use it for a deep result. To send a deep argument or item, use [`with_depth_limit`] instead.
///
/// A result is encoded after its function has returned, so `with_depth_limit` inside the function has no effect on it.
///
/// ```
/// use multiprocess::{self as mp, Deep, Process};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// struct Node(Option<Box<Node>>);
///
/// fn long() -> Deep<Node> {
///     Deep((0..2000).fold(Node(None), |next, _| Node(Some(Box::new(next)))))
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let Deep(mut node) = Process::spawn(long, ())?.join().await?;
///         let mut length = 0;
///         while let Some(next) = node.0 {
///             (node, length) = (*next, length + 1);
///         }
///         assert_eq!(length, 2000);
///         Ok(())
///     })
/// }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Deep<T>(pub T);

impl<T: Serialize> Serialize for Deep<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        with_depth_limit(DEEPEST as usize, || self.0.serialize(serializer))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Deep<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::deserialize(deserializer).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_is_too_large_is_refused_with_its_size_and_a_way_out() {
        assert_eq!(check_size(LARGEST as usize), Ok(()));
        let why = check_size(LARGEST as usize + 1).unwrap_err();
        assert!(why.contains("4293918721 bytes") && why.contains("SharedMemory") && why.contains("file"), "{why}");
    }
}
