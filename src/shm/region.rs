//! A sealed memfd that several processes map: a head of atomic words, and extents that are mapped when needed.
//!
//! # State
//! The head is mapped as long as the region; an extent is mapped once per process and kept until it is released.
//!
//! # Moves, Invariants
//! 1. The file never shrinks (sealed), and every byte is reserved before it is touched: no SIGBUS.
//! 2. Words are only ever accessed as atomics; other bytes only by copies in and out.
//!
//! # Death
//! A descriptor and a mapping die with their process; the memory lives as long as anyone holds it.
//!
//! # Cancel
//! No await point.

use super::atomic::AtomicU64;
use super::view;
use crate::os::memfd;
pub(crate) use crate::os::mmap::Map;
use crate::os::sync::lock;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};

/// The granularity of maps and reservations.
pub(crate) const PAGE: u64 = 4096;

/// With so many extents mapped, those not in use in this process are unmapped.
const MANY: usize = 64;

pub(crate) struct Region {
    fd: Arc<OwnedFd>,
    identity: (u64, u64),
    head: Map,
    extents: Mutex<BTreeMap<u64, Arc<Map>>>,
}

/// The head of a region in a process that only reads it, and can do it no harm.
pub(crate) struct ReadOnly(Map);

impl ReadOnly {
    pub(crate) fn open(fd: OwnedFd, len: usize) -> io::Result<Self> {
        check_len(&fd, len)?;
        Map::read_only(fd.as_fd(), len).map(Self)
    }

    /// The word at `at`, by a SeqCst load.
    #[inline]
    pub(crate) fn load(&self, at: usize) -> u64 {
        view::words(&self.0)[at].load(SeqCst)
    }
}

fn check_len(fd: &OwnedFd, len: usize) -> io::Result<()> {
    match memfd::sealed_len(fd.as_fd()).is_none_or(|actual| actual < len as u64) {
        true => Err(io::Error::new(io::ErrorKind::InvalidData, "not a shared object of this crate")),
        false => Ok(()),
    }
}

impl Region {
    /// `len` bytes of zeros, of which the first `head_len` are the head.
    pub(crate) fn create(name: &str, head_len: usize, len: u64) -> io::Result<Self> {
        Self::of(memfd::create(name, len, true)?, head_len)
    }

    /// Like [`Region::create`], with these first words, which are written before any process touches the memory.
    pub(crate) fn create_with(name: &str, first: &[AtomicU64], head_len: usize, len: u64) -> io::Result<Self> {
        Self::of(memfd::create_with(name, &view::bytes_of(first), len, true)?, head_len)
    }

    /// Maps a region that was created elsewhere. A descriptor of anything else is an error.
    pub(crate) fn open(fd: OwnedFd, head_len: usize) -> io::Result<Self> {
        check_len(&fd, head_len)?;
        Self::of(fd, head_len)
    }

    fn of(fd: OwnedFd, head_len: usize) -> io::Result<Self> {
        let head = Map::shared(fd.as_fd(), 0, head_len)?;
        let identity = memfd::identity(fd.as_fd())?;
        Ok(Self { fd: Arc::new(fd), identity, head, extents: Mutex::default() })
    }

    pub(crate) fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Which memory this is: equal for all descriptors of it, in all processes.
    pub(crate) fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// The head.
    #[inline]
    pub(crate) fn words(&self) -> &[AtomicU64] {
        view::words(&self.head)
    }

    /// The map of what begins at `offset`, if this process has one.
    pub(crate) fn mapped(&self, offset: u64) -> Option<Arc<Map>> {
        lock(&self.extents).get(&offset).cloned()
    }

    /// Forgets that map, which goes when nobody uses it any more.
    pub(crate) fn unmap(&self, offset: u64) {
        drop(lock(&self.extents).remove(&offset));
    }

    /// The map of an extent, made at the first call; that of a longer one that begins there will do.
    pub(crate) fn extent(&self, offset: u64, len: u64) -> io::Result<Arc<Map>> {
        let mut extents = lock(&self.extents);
        if let Some(map) = extents.get(&offset).filter(|map| map.len() as u64 >= len) {
            return Ok(map.clone());
        }
        self.check_extent(offset, len)?;
        let map = Arc::new(Map::shared(self.fd.as_fd(), offset, len as usize)?);
        if extents.len() >= MANY {
            extents.retain(|_, map| Arc::strong_count(map) > 1);
        }
        extents.insert(offset, map.clone());
        Ok(map)
    }

    /// Whether the file has such an extent.
    pub(crate) fn check_extent(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len);
        if memfd::sealed_len(self.fd.as_fd()).is_none_or(|actual| end.is_none_or(|end| end > actual)) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a shared object of another shape"));
        }
        Ok(())
    }

    /// Backs `offset..offset + len` with memory, growing the file where needed.
    pub(crate) fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        memfd::check_room(len)?;
        memfd::reserve(self.fd.as_fd(), offset, len)
    }

    /// [`reserve`](Self::reserve), but for `later` bytes from `skip` on. The last page is reserved in any case.
    pub(crate) fn reserve_around(&self, offset: u64, len: u64, skip: u64, later: u64) -> io::Result<()> {
        let rest = len.saturating_sub(skip.saturating_add(later)).max(PAGE).min(len);
        memfd::reserve(self.fd.as_fd(), offset, skip)?;
        memfd::reserve(self.fd.as_fd(), offset + len - rest, rest)
    }

    /// Unmaps the extent at `offset` here and gives `len` bytes of it, from `skip` on, back, for all processes.
    pub(crate) fn give_back(&self, offset: u64, skip: u64, len: u64) -> io::Result<()> {
        lock(&self.extents).remove(&offset);
        memfd::give_back(self.fd.as_fd(), offset + skip, len)
    }
}
