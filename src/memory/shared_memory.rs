//! Shared memory as plain bytes: anonymous, or under a name that any program can open.

use crate::error::{Error, ErrorKind, Result};
use crate::os::mmap::Map;
use crate::os::{fault, memfd, named};
use crate::process::names;
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

/// A block of bytes that several processes see.
///
/// **Handles.** A handle is cheap to clone and a serde value: it travels as the descriptor of its memory, so it works
/// wherever it arrives, also when the name is gone or was never there. The memory lives as long as any handle, in
/// any process.
///
/// **Names.** A block from [`create`](Self::create) has a name, and is exactly what Python's
/// `multiprocessing.shared_memory` and C's `shm_open` open by it, as [`open`](Self::open) opens theirs. It appears
/// under its name whole: nobody finds it half made. Its name goes with the last handle in the process that created it, and with that
/// process however it ends, unless [`persist`](Self::persist) was called. Whoever only opened it never removes it.
///
/// **Python as a reader.** Before 3.13, and in 3.13 without `track=False`, a Python process that attaches to a block
/// removes the name when it ends. Nobody can stop it from outside, but it can be told not to, right after attaching:
/// `resource_tracker.unregister(block._name, "shared_memory")`. Handles and mappings that exist go on working all
/// the same.
///
/// **Copies.** [`read`](Self::read) and [`write`](Self::write) copy, and order nothing between processes: what one
/// writes while another reads may arrive in part. A [`Lock`](crate::Lock) that travels along, or a queue, says when.
/// For typed data prefer [`Array`](crate::Array) and [`Value`](crate::Value).
///
/// **Death.** A process killed in the middle of a `write` has written a part of it. Names of a killed process are removed
/// by a small process of their own; only if that one was killed first, and no name was given since, do they stay.
///
/// **Cost.** A block is one descriptor. A copy is a system call and a memcpy: the bytes are not mapped, so two threads
/// that copy at once are no data race, and a named block that a stranger cuts short is an error rather than a crash. For
/// many small accesses there is [`as_ptr`](Self::as_ptr). The first name that a process gives starts a small process
/// that removes its names if it is killed.
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
#[derive(Clone)]
pub struct SharedMemory(Arc<Block>);

struct Block {
    fd: Arc<OwnedFd>,
    len: usize,
    identity: named::Identity,
    /// Empty: anonymous.
    name: String,
    /// The process that takes the name away; 0 is nobody.
    owner: u32,
    is_left: AtomicBool,
    map: OnceLock<Map>,
}

static MAPPED: Mapped<Block> = Mapped::new();

impl SharedMemory {
    /// `len` bytes of zeros without a name, reserved now: too little memory is an error here and never later.
    /// It cannot be shrunk by anybody.
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

    /// `len` bytes of zeros under `name`, reserved now. That the name is taken is an error that says by which user, whose
    /// source is an `io::Error` of kind `AlreadyExists`.
    ///
    /// The name is that of `shm_open`, at most 255 bytes; a slash at its beginning does not count, others and NULs are
    /// refused. Needs [`run`](crate::run) or [`init`](crate::init), because of what happens when this process is killed.
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

    /// `len` bytes of zeros under a name that nothing had before: ask for it by [`name`](Self::name).
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

    /// What is there under `name`, or else what [`create`](Self::create) makes. What is there keeps its length, and must
    /// be this user's, as for [`open`](Self::open).
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

    /// The block of this name, whoever made it. That there is none is an error, whose source is an `io::Error` of
    /// kind `NotFound`.
    ///
    /// ```
    /// use multiprocess::SharedMemory;
    /// use std::error::Error;
    ///
    /// let error = SharedMemory::open("example-missing").unwrap_err();
    /// let source = error.source().and_then(|source| source.downcast_ref::<std::io::Error>());
    /// assert_eq!(source.map(|source| source.kind()), Some(std::io::ErrorKind::NotFound));
    /// ```
    ///
    /// It must belong to this process's user (its effective uid), for everybody can put something under a name first;
    /// what another has put there is an error that says whose it is. [`open_of_user`](Self::open_of_user) takes that of
    /// the user it is told. A symbolic link is not followed.
    pub fn open(name: &str) -> Result<Self> {
        Self::open_permitted(name, None)
    }

    /// [`open`](Self::open), also if the block belongs to the user with this uid.
    ///
    /// Whoever made it can read, change and cut it short at any time, and may be at it with a program of their own.
    ///
    /// # Errors
    /// `Io` if there is none of this name, or it is of neither user, or this process may not open it.
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

    /// The outer error: there is nobody to see to the name.
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
        names::remove_at_end(name, block.identity)?;
        fault::point("name.promised");
        let linked = named::link(block.fd.as_fd(), name);
        fault::point("name.given");
        Ok(linked.and_then(|()| block.listed()).map(Self))
    }

    /// How many bytes there are.
    #[allow(clippy::len_without_is_empty)] // It never is.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// The name, without a slash; empty for an anonymous block.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Copies the bytes from `offset` on to `to`. An error, with nothing promised about `to`, if they are not all
    /// there.
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

    /// Copies `from` to `offset`. An error, with nothing written, if it does not fit in.
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

    /// Where the bytes are in this process, for access without a copy; mapped at the first call, as long as any handle
    /// in this process lives.
    ///
    /// To have the pointer is safe, to use it is not: other processes write there at any time, so plain references and
    /// plain reads are data races unless a lock says otherwise; atomics, and volatile reads of bytes, are not. A named
    /// block may be cut short by another program, and then a touch ends this process with SIGBUS.
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

    /// Takes the name away now; handles go on working. A second time it is an error, whose source is an `io::Error` of
    /// kind `NotFound`, and so it is if the name has come to be that of another block.
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

    /// Leaves the name to those who open it: it goes only by [`unlink`](Self::unlink), of anybody. An error unless
    /// this process created the block.
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
        names::keep(name, block.identity)?;
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
            names::leave(&self.name, self.identity);
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
        attach::serialize_handle(serializer, [Attachment::Shared(self.0.fd.clone())], self.name())
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
        open().map(Self).map_err(|error| D::Error::custom(format_args!("shared memory cannot be opened: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shm_04_a_generated_name_that_is_taken_is_passed_over() {
        let name = |n| format!("multiprocess-unit-{}-{n}", std::process::id());
        let taken = SharedMemory::create(&name(0), 10).unwrap();
        let made = SharedMemory::create_first((0..3).map(name), 20).unwrap();
        assert_eq!((made.name(), made.len(), taken.len()), (name(1).as_str(), 20, 10));
        let error = SharedMemory::create_first((0..2).map(name), 30).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
    }
}
