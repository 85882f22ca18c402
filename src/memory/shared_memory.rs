//! Shared memory as plain bytes: anonymous, or under a name that any program can open.

use crate::error::{Error, ErrorKind, Result};
use crate::os::mmap::Map;
use crate::os::{fault, memfd, named};
use crate::process::name_cleaner;
use crate::shm::mapped::Mapped;
use crate::wire::attach::{self, Attachment};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::{Arc, OnceLock};

/// A block of bytes in shared memory, anonymous or with a name that any program can open.
///
/// Use instead:
/// - [`Array`](crate::Array) for typed elements, used in place under a lock;
/// - [`Queue`](crate::Queue) to pass bytes on.
///
/// [`read`](Self::read) and [`write`](Self::write) copy bytes out and in. A named block is exactly the shared memory of
/// Python's `multiprocessing.shared_memory` and of C's `shm_open`, so those programs can use it too. For typed data prefer
/// [`Array`](crate::Array) and [`Value`](crate::Value).
///
/// ```
/// use multiprocess::{self as mp, Process, SharedMemory};
///
/// fn shout(memory: SharedMemory) -> mp::Result<()> {
///     let mut text = [0; 5];
///     memory.read(0, &mut text)?;
///     memory.write(0, &text.map(|byte| byte.to_ascii_uppercase()))
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let memory = SharedMemory::anonymous(4096)?;
///         memory.write(0, b"hello")?;
///         Process::spawn(shout, (memory.clone(),))?.await??;
///         let mut text = [0; 5];
///         memory.read(0, &mut text)?;
///         assert_eq!(&text, b"HELLO");
///         Ok(())
///     })
/// }
/// ```
///
/// # Handles
/// A handle is cheap to clone and is a serde value. It travels as the descriptor of its memory, so it works wherever it
/// arrives, also when the name is gone or there never was one. The memory exists as long as any process has a handle.
///
/// # Details
/// - **Names.** A block from [`create`](Self::create) appears under its name complete, never half made. The name is removed
///   with the last handle in the process that created it, and when that process ends in any way, unless
///   [`persist`](Self::persist) was called. A process that only opened a block never removes its name.
/// - **Order.** Copies order nothing between processes: a concurrent read may see part of a write. Use a
///   [`Lock`](crate::Lock) or a queue to order them.
/// - **Death.** A process killed during a `write` has written part of it. A helper process removes the names of a killed
///   process. They stay only if the helper was killed first and no name was created since.
/// - **Cost.** A copy is a system call and a memcpy. The bytes are not mapped, so two threads that copy at once are no data
///   race, and a read of a named block that another program has truncated is an error and not a crash. For many small accesses use
///   [`as_ptr`](Self::as_ptr). A block is one descriptor. The first name that a process creates starts the helper process.
/// - **Python as a reader.** Before 3.13, and in 3.13 without `track=False`, a Python process that attaches to a block
///   removes the name when it ends. To prevent that, it calls `resource_tracker.unregister(block._name,
///   "shared_memory")` right after attaching. Existing handles and mappings work in any case.
#[derive(Clone)]
pub struct SharedMemory(Arc<Block>);

struct Block {
    fd: Arc<OwnedFd>,
    len: usize,
    identity: named::Identity,
    /// Empty: anonymous.
    name: String,
    /// The process that removes the name; 0 if none does.
    owner: u32,
    is_left: AtomicBool,
    map: OnceLock<Map>,
}

static MAPPED: Mapped<Block> = Mapped::new();

impl SharedMemory {
    /// Creates an anonymous block of `len` zero bytes.
    ///
    /// The memory is reserved now, so too little of it is an error here and never later. No process can shrink the block.
    ///
    /// # Errors
    /// `Io` if `len` is 0, or if there is not enough memory, or if no descriptor is left.
    ///
    /// ```
    /// use multiprocess::SharedMemory;
    /// assert_eq!(SharedMemory::anonymous(100)?.len(), 100);
    /// assert!(SharedMemory::anonymous(0).is_err());
    /// assert!(SharedMemory::anonymous(1 << 62).is_err());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn anonymous(len: usize) -> Result<Self> {
        let create = || {
            let fd = memfd::create("multiprocess-memory", check_len(len)?, false)?;
            Block::of(fd, len, String::new(), 0)?.listed()
        };
        create().map(Self).map_err(|error| failed(format_args!("cannot create {len} bytes of shared memory"), error))
    }

    /// Creates a block of `len` zero bytes under `name`.
    ///
    /// The name is that of `shm_open`: at most 255 bytes, without NULs, and without slashes but for one at its beginning,
    /// which does not count. The memory is reserved now.
    ///
    /// # Errors
    /// - `Io` if the name is taken. The message names the user that owns it; the source is an `io::Error` of kind
    ///   `AlreadyExists`.
    /// - `Io` if the name is not valid, if `len` is 0, or if there is not enough memory.
    /// - `NotInitialized` without [`run`](crate::run) or [`init`](crate::init), which the helper process needs.
    ///
    /// ```
    /// use multiprocess::{self as mp, SharedMemory};
    ///
    /// fn main() -> mp::Result<()> {
    ///     mp::run(async {
    ///         let memory = SharedMemory::create("example-create", 16)?;
    ///         assert!(SharedMemory::create("example-create", 16).is_err());
    ///         SharedMemory::open("example-create")?.write(0, b"found")?;
    ///         drop(memory);
    ///         assert!(SharedMemory::open("example-create").is_err());
    ///         Ok(())
    ///     })
    /// }
    /// ```
    pub fn create(name: &str, len: usize) -> Result<Self> {
        let name = bare(name);
        match Self::try_create(name, len)? {
            Ok(memory) => Ok(memory),
            Err(error) => Err(failed(format_args!("cannot create shared memory {name:?}"), error)),
        }
    }

    /// Creates a block of `len` zero bytes under a new name, which [`name`](Self::name) returns.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    ///
    /// ```
    /// use multiprocess::{self as mp, SharedMemory};
    ///
    /// fn main() -> mp::Result<()> {
    ///     mp::run(async {
    ///         let memory = SharedMemory::generate(16)?;
    ///         assert_eq!(SharedMemory::open(memory.name())?.len(), 16);
    ///         Ok(())
    ///     })
    /// }
    /// ```
    pub fn generate(len: usize) -> Result<Self> {
        use std::hash::{BuildHasher, RandomState};
        Self::create_first((0..1000).map(|n| format!("psm_{:08x}", RandomState::new().hash_one(n) as u32)), len)
    }

    fn create_first(names: impl Iterator<Item = String>, len: usize) -> Result<Self> {
        let mut last = io::Error::other("no name to try");
        for name in names {
            match Self::try_create(&name, len)? {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => last = error,
                Err(error) => {
                    return Err(failed(format_args!("cannot create shared memory under a new name"), error));
                }
                Ok(memory) => return Ok(memory),
            }
        }
        Err(failed(format_args!("every name tried for shared memory is taken"), last))
    }

    /// Opens the block `name`, or creates it with `len` zero bytes if there is none.
    ///
    /// An existing block keeps its length.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`create`](Self::create), but for a name that is missing or taken.
    ///
    /// ```
    /// use multiprocess::{self as mp, SharedMemory};
    ///
    /// fn main() -> mp::Result<()> {
    ///     mp::run(async {
    ///         let made = SharedMemory::open_or_create("example-either", 16)?;
    ///         let found = SharedMemory::open_or_create("example-either", 99)?;
    ///         assert_eq!((made.len(), found.len()), (16, 16));
    ///         Ok(())
    ///     })
    /// }
    /// ```
    pub fn open_or_create(name: &str, len: usize) -> Result<Self> {
        let name = bare(name);
        loop {
            match Self::try_open(name, None) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                opened => {
                    return opened.map_err(|error| failed(format_args!("cannot open shared memory {name:?}"), error));
                }
            }
            match Self::try_create(name, len)? {
                // Somebody was faster; and if that is gone again by now, once more.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                created => {
                    return created
                        .map_err(|error| failed(format_args!("cannot create shared memory {name:?}"), error));
                }
            }
        }
    }

    /// Opens the block `name`, which any program may have created.
    ///
    /// It must belong to the effective user of this process, for any user can create something under a name first. Use
    /// [`open_of_user`](Self::open_of_user) for a block of another user. A symbolic link is not followed.
    ///
    /// # Errors
    /// - `Io` if there is none. The source is an `io::Error` of kind `NotFound`.
    /// - `Io` if it belongs to another user, which the message names, or if this process may not open it.
    ///
    /// ```
    /// use multiprocess::SharedMemory;
    /// use std::error::Error;
    ///
    /// let error = SharedMemory::open("example-missing").unwrap_err();
    /// let source = error.source().and_then(|source| source.downcast_ref::<std::io::Error>());
    /// assert_eq!(source.map(|source| source.kind()), Some(std::io::ErrorKind::NotFound));
    /// ```
    pub fn open(name: &str) -> Result<Self> {
        Self::open_permitted(name, None)
    }

    /// Opens the block `name` if it belongs to this user or to the user with this uid.
    ///
    /// That user can read, change and truncate the block at any time.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    ///
    /// ```no_run
    /// use multiprocess::SharedMemory;
    /// // The service that writes the measurements runs as uid 990.
    /// let measurements = SharedMemory::open_of_user("measurements", 990)?;
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn open_of_user(name: &str, uid: u32) -> Result<Self> {
        Self::open_permitted(name, Some(uid))
    }

    fn open_permitted(name: &str, permitted: Option<u32>) -> Result<Self> {
        let name = bare(name);
        let opened = Self::try_open(name, permitted);
        opened.map_err(|error| failed(format_args!("cannot open shared memory {name:?}"), error))
    }

    fn try_open(name: &str, permitted: Option<u32>) -> io::Result<Self> {
        let (fd, len) = named::open(name, permitted)?;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        Ok(Self(Arc::new(Block::of(fd, len, name.to_string(), 0)?)))
    }

    /// The outer error: no helper process would remove the name.
    fn try_create(name: &str, len: usize) -> Result<io::Result<Self>> {
        let make = || {
            named::check(name)?;
            let fd = named::create(check_len(len)?)?;
            Block::of(fd, len, name.to_string(), std::process::id())
        };
        // From here on its drop tries to take the name away, which does nothing unless it is its own.
        let block = match make() {
            Ok(block) => block,
            Err(error) => return Ok(Err(error)),
        };
        name_cleaner::remove_at_end(name, block.identity)?;
        fault::point("name.promised");
        let linked = named::link(block.fd.as_fd(), name);
        fault::point("name.given");
        Ok(linked.and_then(|()| block.listed()).map(Self))
    }

    /// Returns the number of bytes.
    #[allow(clippy::len_without_is_empty)] // It never is.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Returns the name, without a slash. It is empty for an anonymous block.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Copies the bytes from `offset` on to `to`.
    ///
    /// # Errors
    /// `Io` if the range is not inside the block, or another program has truncated it. The content of `to` is then unspecified.
    ///
    /// ```
    /// use multiprocess::SharedMemory;
    /// let memory = SharedMemory::anonymous(10)?;
    /// let mut bytes = [1; 4];
    /// memory.read(6, &mut bytes)?;
    /// assert_eq!(bytes, [0; 4]);
    /// assert!(memory.read(7, &mut bytes).is_err());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        let block = &*self.0;
        block.check_range(offset, to.len())?;
        named::read(block.fd.as_fd(), offset as u64, to)
            .map_err(|error| failed(format_args!("cannot read shared memory {:?}", block.name), error))
    }

    /// Copies `from` to the bytes from `offset` on.
    ///
    /// # Errors
    /// - `Io` if the range is not inside the block. Nothing is written then.
    /// - `Io` if the end of the range is beyond the file size limit of this process (`RLIMIT_FSIZE`).
    ///
    /// ```
    /// use multiprocess::SharedMemory;
    /// let memory = SharedMemory::anonymous(10)?;
    /// memory.write(0, b"0123456789")?;
    /// assert!(memory.write(1, b"0123456789").is_err());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<()> {
        let block = &*self.0;
        block.check_range(offset, from.len())?;
        named::write(block.fd.as_fd(), offset as u64, from)
            .map_err(|error| failed(format_args!("cannot write to shared memory {:?}", block.name), error))
    }

    /// Returns a pointer to the bytes, for access without a copy.
    ///
    /// The first call maps them. The pointer is valid as long as any handle in this process lives. Using it is unsafe: other
    /// processes may write at any time, so plain references and plain reads are data races unless a lock prevents that.
    /// Atomics, and volatile reads of bytes, are not. If another program truncates a named block, an access ends this process
    /// with SIGBUS.
    ///
    /// # Errors
    /// `Io` if the bytes cannot be mapped.
    ///
    /// ```
    /// use multiprocess::SharedMemory;
    /// use std::sync::atomic::{AtomicU64, Ordering};
    ///
    /// let memory = SharedMemory::anonymous(4096)?;
    /// let start = memory.as_ptr()?.cast::<AtomicU64>();
    /// // SAFETY: page-aligned, of 4096 bytes, mapped while `memory` lives, and used only by atomics.
    /// let counter = unsafe { start.as_ref() };
    /// counter.fetch_add(1, Ordering::Relaxed);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn as_ptr(&self) -> Result<NonNull<u8>> {
        let map = self.0.map().map_err(|error| failed(format_args!("cannot map shared memory"), error))?;
        Ok(map.start())
    }

    /// Removes the name. Existing handles go on working.
    ///
    /// # Errors
    /// - `Io` if the name was removed before, or belongs to another block by now. The source is an `io::Error` of kind
    ///   `NotFound`.
    /// - `Other` for an anonymous block.
    ///
    /// ```
    /// use multiprocess::{self as mp, SharedMemory};
    ///
    /// fn main() -> mp::Result<()> {
    ///     mp::run(async {
    ///         let memory = SharedMemory::create("example-unlink", 16)?;
    ///         memory.unlink()?;
    ///         assert!(SharedMemory::open("example-unlink").is_err());
    ///         memory.write(0, b"still here")?;
    ///         Ok(())
    ///     })
    /// }
    /// ```
    pub fn unlink(&self) -> Result<()> {
        let block = &*self.0;
        let name = block.name_or_error()?;
        named::unlink(name, block.identity)
            .map_err(|error| failed(format_args!("cannot remove shared memory {name:?}"), error))
    }

    /// Keeps the name when this process ends: only [`unlink`](Self::unlink) removes it, in any process.
    ///
    /// # Errors
    /// `Other` unless this process created the block under a name.
    ///
    /// ```
    /// use multiprocess::{self as mp, SharedMemory};
    ///
    /// fn main() -> mp::Result<()> {
    ///     mp::run(async {
    ///         let memory = SharedMemory::create("example-persist", 16)?;
    ///         memory.persist()?;
    ///         drop(memory);
    ///         SharedMemory::open("example-persist")?.unlink()?;
    ///         Ok(())
    ///     })
    /// }
    /// ```
    pub fn persist(&self) -> Result<()> {
        let block = &*self.0;
        let name = block.name_or_error()?;
        if block.owner != std::process::id() {
            let why = format!("only the process that created shared memory {name:?} can make its name stay");
            return Err(Error::new(ErrorKind::Other, why));
        }
        named::keep(block.fd.as_fd()).map_err(|error| failed(format_args!("cannot keep the name {name:?}"), error))?;
        name_cleaner::keep(name, block.identity)?;
        block.is_left.store(true, Release);
        Ok(())
    }
}

impl Block {
    fn of(fd: OwnedFd, len: usize, name: String, owner: u32) -> io::Result<Self> {
        let identity = memfd::identity(fd.as_fd())?;
        let (is_left, map) = (AtomicBool::new(false), OnceLock::new());
        Ok(Self { fd: Arc::new(fd), len, identity, name, owner, is_left, map })
    }

    /// The one of its identity in this process.
    fn listed(self) -> io::Result<Arc<Self>> {
        MAPPED.or_make(self.identity, || Ok(Arc::new(self)))
    }

    fn map(&self) -> io::Result<&Map> {
        if let Some(map) = self.map.get() {
            return Ok(map);
        }
        let map = Map::shared(self.fd.as_fd(), 0, self.len)?;
        Ok(self.map.get_or_init(|| map))
    }

    fn check_range(&self, offset: usize, len: usize) -> Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.len) {
            return Ok(());
        }
        let why = format!("{len} bytes at {offset} are not inside the {} bytes of this shared memory", self.len);
        Err(Error::io(why, io::Error::from(io::ErrorKind::InvalidInput)))
    }

    fn name_or_error(&self) -> Result<&str> {
        let why = || Error::new(ErrorKind::Other, "anonymous shared memory has no name");
        if self.name.is_empty() { Err(why()) } else { Ok(&self.name) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.owner == std::process::id() && !*self.is_left.get_mut() {
            // Somebody may have done it already.
            let _ = named::unlink(&self.name, self.identity);
            fault::point("name.taken");
            name_cleaner::forget(&self.name, self.identity);
        }
    }
}

fn check_len(len: usize) -> io::Result<u64> {
    match len {
        0 => Err(io::Error::new(io::ErrorKind::InvalidInput, "shared memory has at least one byte")),
        len => Ok(len as u64),
    }
}

fn bare(name: &str) -> &str {
    name.trim_start_matches('/')
}

fn failed(doing: fmt::Arguments<'_>, error: io::Error) -> Error {
    Error::io(doing, error)
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedMemory").field("name", &self.name()).field("len", &self.len()).finish()
    }
}

/// The handle's descriptor travels, not its name, so a handle stays good when the name is gone.
impl Serialize for SharedMemory {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        attach::serialize_handle(serializer, [Attachment::Of("`SharedMemory`", self.0.fd.clone())], self.name())
    }
}

impl<'de> Deserialize<'de> for SharedMemory {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let ([fd], name): ([OwnedFd; 1], String) = attach::deserialize_handle(deserializer)?;
        let open = || {
            let identity = memfd::identity(fd.as_fd())?;
            MAPPED.or_make(identity, || {
                let invalid = || io::Error::new(io::ErrorKind::InvalidData, "not shared memory of this crate");
                let len = if name.is_empty() {
                    memfd::sealed_len(fd.as_fd()).ok_or_else(invalid)?
                } else {
                    named::len(fd.as_fd())?
                };
                Ok(Arc::new(Block::of(fd, usize::try_from(len).map_err(io::Error::other)?, name, 0)?))
            })
        };
        open().map(Self).map_err(|error| D::Error::custom(Error::io("shared memory cannot be opened", error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shm_04_a_generated_name_that_is_taken_is_passed_over() {
        // An earlier run in another pid namespace may have had this pid.
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos();
        let name = |n| format!("multiprocess-unit-{}-{now:x}-{n}", std::process::id());
        let taken = SharedMemory::create(&name(0), 10).unwrap();
        let made = SharedMemory::create_first((0..3).map(name), 20).unwrap();
        assert_eq!((made.name(), made.len(), taken.len()), (name(1).as_str(), 20, 10));
        let error = SharedMemory::create_first((0..2).map(name), 30).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
    }
}
