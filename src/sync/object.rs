//! The memory of any shared object: one memfd, whose first word is its kind, mapped once per process. Handles travel as its
//! descriptor.

use crate::error::{Error, Result};
use crate::os::memfd;
use crate::shm::atomic::AtomicU64;
use crate::shm::family::Member;
use crate::shm::mapped::Mapped;
use crate::shm::region::{PAGE, Region};
use crate::wait::sleepers::Sleeper;
use crate::wire::attach::{self, Attachment};
use serde::de::Error as _;
use serde::{Deserializer, Serializer};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::*;

/// The word with the kind of the object. The words of the object begin after it.
pub(super) const KIND: usize = 0;
pub(super) const FIRST: usize = 1;

/// The prefix of the names of all objects' memfds.
pub(super) const MEMFD: &str = "multiprocess-";

/// The holders and the waiters of an object, read from its words.
#[derive(Default)]
pub(super) struct Report {
    /// The holder and since when, in nanoseconds of [`clock`](crate::os::clock).
    pub(super) holder: Option<(Member, u64)>,
    /// The holder of all of it, for objects that do not note since when.
    pub(super) writer: Option<Member>,
    /// The holders and how much each has, for objects that many can hold.
    pub(super) shares: Vec<(Member, u32)>,
    pub(super) waiting: Vec<Sleeper>,
}

/// One kind of object, as this process sees one of them.
pub(super) trait Core: Send + Sync + Sized + 'static {
    /// The first word: this kind, and this layout.
    const KIND: u64;
    /// Its name in errors and listings. The name of its memfd is `multiprocess-` and this.
    const NAME: &'static str;
    /// The least number of words, including the first.
    const WORDS: usize;
    /// Whether objects may have more words, each its own number.
    const IS_ALL_WORDS: bool = false;

    fn mapped() -> &'static Mapped<Self>;
    fn region(&self) -> &Arc<Region>;
    /// The holders and waiters of an object with these words, for listings.
    fn report(_words: &[AtomicU64]) -> Report {
        Report::default()
    }

    /// This process's view of an object that is there.
    fn view(region: Arc<Region>) -> io::Result<Self>;
}

fn head_len<C: Core>() -> usize {
    C::WORDS * size_of::<u64>()
}

/// The bytes that stay mapped of an object of `len` bytes.
fn head_of<C: Core>(len: u64) -> usize {
    if C::IS_ALL_WORDS { head_len::<C>().max(len as usize) } else { head_len::<C>() }
}

/// Creates an object. `fill` sets its words before any other process can see it.
pub(super) fn create<C: Core>(fill: impl FnOnce(&[AtomicU64])) -> Result<Arc<C>> {
    create_of_len(head_len::<C>() as u64, fill)
}

/// Creates an object of `len` bytes, of which its words are the first, or all.
pub(super) fn create_of_len<C: Core>(len: u64, fill: impl FnOnce(&[AtomicU64])) -> Result<Arc<C>> {
    let create = || {
        let head_len = head_of::<C>(len);
        let words: Vec<_> = (0..head_len / size_of::<u64>()).map(|_| AtomicU64::new(0)).collect();
        words[KIND].store(C::KIND, Release);
        fill(&words);
        // Written by a system call, they need not be touched: a process that creates an object for others has no page fault.
        let is_set = words.iter().rposition(|word| word.load(Relaxed) != 0).map_or(0, |last| last + 1);
        let first = if head_len as u64 == len && len <= PAGE { words.len() } else { is_set };
        let region = Region::create_with(&format!("{MEMFD}{}", C::NAME), &words[..first], head_len, len)?;
        let core = Arc::new(C::view(Arc::new(region))?);
        C::mapped().or_make(core.region().identity(), || Ok(core.clone()))
    };
    create().map_err(|error| Error::io(format_args!("cannot create a {}", C::NAME), error))
}

fn open<C: Core>(fd: OwnedFd) -> io::Result<Arc<C>> {
    C::mapped().or_make(memfd::identity(fd.as_fd())?, || {
        let len = memfd::sealed_len(fd.as_fd()).unwrap_or_default();
        let region = Region::open(fd, head_of::<C>(len))?;
        if region.words()[KIND].load(Acquire) != C::KIND {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("not a {}", C::NAME)));
        }
        Ok(Arc::new(C::view(Arc::new(region))?))
    })
}

/// A handle travels as its descriptor.
pub(super) fn serialize<C: Core, S: Serializer>(core: &C, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    attach::serialize_handle(serializer, [Attachment::Of(C::NAME, core.region().fd().clone())], ())
}

/// One that this process already has is found again: its second descriptor is closed.
pub(super) fn deserialize<'de, C: Core, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Arc<C>, D::Error> {
    let ([fd], ()) = attach::deserialize_handle(deserializer)?;
    open(fd).map_err(|error| D::Error::custom(Error::io(format_args!("a {} cannot be opened", C::NAME), error)))
}

/// A handle that is its core and nothing else, in the field of this name, travels as its core.
macro_rules! travels {
    ($handle:ty, $core:tt) => {
        impl serde::Serialize for $handle {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                object::serialize(&*self.$core, serializer)
            }
        }

        impl<'de> serde::Deserialize<'de> for $handle {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                Ok(Self { $core: object::deserialize(deserializer)? })
            }
        }
    };
}
pub(super) use travels;

/// The owner of a guard within this process: a tokio task, or a thread outside of tasks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Task(tokio::task::Id),
    Thread(std::thread::ThreadId),
}

impl Owner {
    pub(super) fn here() -> Self {
        tokio::task::try_id().map_or_else(|| Self::Thread(std::thread::current().id()), Self::Task)
    }
}
