//! An array in shared memory, used in place.
//!
//! # State
//! `LEN` and `SIZE`: the number of elements and the bytes of each. `MUTEX`, which guards the elements. `DIED`: a holder died,
//! and no guard has reported it yet. Behind the first page, the elements. In this process: two mappings of them, one for
//! references and one for single elements, and the owner of the guard.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | any element, any number of times | the holder of the mutex, by a guard | between those of the mutex | - |
//! | an element -> another value | `set`, which holds the mutex for that; or whose task holds the guard | Release | - |
//! | DIED 0 -> 1 | `set` that took the mutex from a dead holder | between those of the mutex | - |
//! | DIED 1 -> 0 | a guard, which then reports it | likewise | - |
//!
//! # Invariants
//! 1. Only the holder of the mutex changes elements, so no other process changes the memory of a guard's slice.
//! 2. In this process only the guard uses the mapping for references ([`crate::shm::lent`]). `get`, `set` and `to_vec` use the
//!    other one, by atomics.
//! 3. `set` beside a guard of the same task writes only if no reference was taken from that guard yet, and none can be taken
//!    while it writes: both happen under `local`.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | with a guard | elements changed so far | the next locker gets `OwnerDied` with the guard |
//! | in `set` | the old element or the new one, or parts of both if it has more than 8 bytes | likewise |
//! | after `set` took the mutex from a dead holder | likewise | likewise: it died holding it |
//! | as DIED was taken | likewise | likewise |
//!
//! # Cancel
//! A dropped `lock` has not locked; see [`mutex`].

use super::acquire::{self, Held};
use super::mutex::{self, ByMutex, Mutex, Taken, Words};
use super::object::{self, Core, Owner, Report};
use crate::error::{Damage, Error, LockError, Result, Topic};
use crate::os::fault;
use crate::os::fork;
use crate::os::mmap::Map;
use crate::os::reactor;
use crate::os::sync::lock;
use crate::shm::atomic::AtomicU64;
use crate::shm::family::Family;
use crate::shm::lent::{Lendable, Lent};
use crate::shm::mapped::Mapped;
use crate::shm::region::{PAGE, Region};
use crate::shm::view;
use bytemuck::Pod;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::{Arc, MutexGuard, OnceLock};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};
use tokio::runtime::{Handle, RuntimeFlavor};

/// An array of plain values (`T: bytemuck::Pod`) in shared memory, which processes use in place.
///
/// Use instead:
/// - [`Value`](crate::Value) for one number or struct;
/// - [`SharedMemory`](crate::SharedMemory) for bytes of another layout or with a name;
/// - [`Manager`](crate::Manager) for a list that grows.
///
/// [`lock`](Array::lock) waits for its turn and derefs to the elements themselves, a `[T]`. For single elements there are
/// [`get`](Array::get), which never waits, and [`set`](Array::set), which holds the lock while it writes.
///
/// ```
/// use multiprocess::{self as mp, Array, Process};
///
/// async fn double(numbers: Array<u64>) -> mp::Result<()> {
///     let mut numbers = numbers.lock().await?;
///     numbers.iter_mut().for_each(|number| *number *= 2);
///     Ok(())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let numbers = Array::from_slice(&[1, 2, 3])?;
///         Process::spawn(double, (numbers.clone(),))?.await??;
///         assert_eq!(numbers.to_vec(), [2, 4, 6]);
///         assert_eq!(numbers.lock().await?.iter().sum::<u64>(), 12);
///         Ok(())
///     })
/// }
/// ```
///
/// # Handles
/// A handle is cheap to clone and is a serde value. It can be an argument, a result, or part of a value in a queue or a
/// pipe. The elements stay where they are; the array exists as long as any process or message has a handle.
///
/// # Details
/// - **Soundness.** The slice of a guard is an ordinary Rust slice: no other process or thread writes to it, because every
///   write needs the lock. [`get`](Array::get) and [`to_vec`](Array::to_vec) read by atomics, also while another process
///   writes.
/// - **Consistency.** `get` and `to_vec` read an element of 1, 2, 4 or 8 bytes as a whole. An element of another size may be
///   part of one write and part of another, and changes through a guard are seen while they are made.
/// - **Death.** A process killed with a guard leaves its changes so far. The next `lock` gets
///   [`OwnerDied`](crate::ErrorKind::OwnerDied) with the guard inside the error.
/// - **Cost.** A free lock costs a few atomic operations. All memory is reserved on creation, so too little of it is an
///   error there and never later. An array is one descriptor.
pub struct Array<T>(Arc<ArrayCore>, PhantomData<T>);

const LEN: usize = 1;
const SIZE: usize = 2;
const DIED: usize = 3;
const MUTEX: usize = 8;

/// How long [`Array::set`] waits behind the waiters of its process, at first, before it tries ahead of them: longer than a mutex is kept for the one
/// of them that it is handed over to.
const A_TURN: Duration = Duration::from_millis(10);
const LONGEST_TURN: Duration = Duration::from_millis(100);

pub(super) struct ArrayCore {
    region: Arc<Region>,
    len: usize,
    size: usize,
    mutex: Mutex,
    /// The elements, for the guard.
    whole: Arc<Lendable>,
    /// The elements, one by one; mapped when first needed.
    single: OnceLock<Map>,
    /// The owner of the guard that this process has, and the thread on which it got that.
    local: std::sync::Mutex<Option<(Owner, ThreadId)>>,
    /// References have been taken from the guard that this process has. Set under `local`.
    is_open: AtomicBool,
}

static MAPPED: Mapped<ArrayCore> = Mapped::new();

impl Core for ArrayCore {
    const KIND: u64 = 0x6d70_6172_7261_0001;
    const NAME: &'static str = "shared array";
    const WORDS: usize = MUTEX + mutex::LEN;

    fn mapped() -> &'static Mapped<Self> {
        &MAPPED
    }

    fn region(&self) -> &Arc<Region> {
        &self.region
    }

    fn report(words: &[AtomicU64]) -> Report {
        Words(&words[MUTEX..MUTEX + mutex::LEN]).report()
    }

    fn view(region: Arc<Region>) -> io::Result<Self> {
        let [len, size] = [LEN, SIZE].map(|word| region.words()[word].load(Acquire) as usize);
        let bytes = bytes(len, size).ok_or(io::ErrorKind::InvalidData)?;
        region.check_extent(PAGE, bytes)?;
        Family::get()?.me()?; // So that `set` does not fail for want of a place in the family.
        let mutex = Mutex::view(&region, MUTEX, Self::NAME)?;
        let whole = Lendable::new(Map::shared(region.fd().as_fd(), PAGE, bytes as usize)?);
        let (single, local, is_open) = Default::default();
        Ok(Self { region, len, size, mutex, whole, single, local, is_open })
    }
}

/// The bytes that the elements take up: whole pages, at least one.
fn bytes(len: usize, size: usize) -> Option<u64> {
    let bytes = (len as u64).checked_mul(size as u64)?.max(1).checked_next_multiple_of(PAGE)?;
    bytes.checked_add(PAGE).filter(|all| *all <= isize::MAX as u64)?;
    Some(bytes)
}

impl ArrayCore {
    fn died(&self) -> &AtomicU64 {
        &self.region.words()[DIED]
    }

    fn local(&self) -> MutexGuard<'_, Option<(Owner, ThreadId)>> {
        // `set` may panic while it is locked: it has changed nothing then.
        lock(&self.local)
    }

    fn single(&self) -> io::Result<&Map> {
        if let Some(map) = self.single.get() {
            return Ok(map);
        }
        // `view` has found these to be right.
        let bytes = bytes(self.len, self.size).ok_or(io::ErrorKind::InvalidData)?;
        let map = Map::shared(self.region.fd().as_fd(), PAGE, bytes as usize)?;
        Ok(self.single.get_or_init(|| map))
    }

    /// The mutex for a moment; it must be released. `None`: not needed, the guard of this task will do, and `write` has run; or
    /// its memory is damaged, and nothing is written.
    #[cold]
    fn take_to_write(&self, write: &impl Fn()) -> Option<Taken> {
        fork::refuse("set an element of an array");
        let local = self.local();
        let this_thread = thread::current().id();
        match *local {
            Some((who, _)) if who == Owner::here() => {
                assert!(
                    !self.is_open.load(Relaxed),
                    "this task has the array's guard and has used it: write by the guard {}",
                    Topic::ArrayGuard
                );
                write();
                return None;
            }
            Some((_, thread)) if thread == this_thread && !hands_over() => {
                panic!(
                    "another task of this thread has the array's guard: lock the array, or wait for that task {}",
                    Topic::ArrayGuard
                )
            }
            _ => {}
        }
        let is_here = local.is_some_and(|(_, thread)| thread == this_thread);
        drop(local);
        let mut turn = A_TURN;
        let wait = || loop {
            // A waiter of this very task, which is not polled meanwhile, may be ahead in the queue of this process, and then only there.
            let limit = self.mutex.has_waiters().then(|| Instant::now() + turn);
            // Others ahead may take longer, and a new turn begins at the end of the queue.
            turn = (2 * turn).min(LONGEST_TURN);
            let taken = match self.mutex.take_blocking(limit) {
                Ok(None) => self.mutex.try_take(),
                Err(error) if !Damage::is_in(&error) => {
                    // No descriptor is left to sleep with.
                    std::thread::sleep(Duration::from_millis(1));
                    self.mutex.try_take()
                }
                taken => taken,
            };
            match taken {
                Ok(Some(taken)) => return Some(taken),
                Err(error) if Damage::is_in(&error) => {
                    tracing::error!(%error, help = Topic::Damaged.name(), "an element is not set");
                    return None;
                }
                _ => {}
            }
        };
        // What cannot be asked there is needed if the guard is on this thread: otherwise the wait would never end.
        if cfg!(panic = "abort") && is_here { tokio::task::block_in_place(wait) } else { reactor::block_in_place(wait) }
    }
}

/// Returns `true` if other tasks of this thread go on elsewhere while it blocks, or if it has none. Outside of tasks a runtime may need this thread.
fn hands_over() -> bool {
    if tokio::task::try_id().is_none() {
        return false;
    }
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(flavor) if cfg!(panic = "abort") => flavor == RuntimeFlavor::MultiThread,
        Ok(_) => reactor::may_block(),
        Err(_) => false,
    }
}

impl<T: Pod> ByMutex for Array<T> {
    const NAME: &'static str = ArrayCore::NAME;
    type Guard = ArrayGuard<T>;

    #[inline]
    fn mutex(&self) -> &Mutex {
        &self.0.mutex
    }

    #[inline]
    fn guard(&self, taken: Taken) -> io::Result<Held<ArrayGuard<T>>> {
        let core = &self.0;
        let died_before = core.died().load(Relaxed) != 0;
        if died_before {
            core.died().store(0, Relaxed);
        }
        fault::point("array.taken");
        // The last holder in this process returned it before it released the mutex.
        let Some(lent) = core.whole.lend() else {
            core.mutex.release();
            return Err(io::Error::other("it is lent and not locked"));
        };
        core.is_open.store(false, Relaxed);
        *core.local() = Some((Owner::here(), thread::current().id()));
        let guard = ArrayGuard { core: core.clone(), lent: Some(lent), marker: PhantomData };
        Ok(Held { guard, owner_died: died_before || taken == Taken::OwnerDied })
    }
}

impl<T: Pod> Array<T> {
    const GRAIN: usize = view::grain(size_of::<T>());

    /// Creates an array of a copy of `elements`, which may be empty.
    ///
    /// ```
    /// # multiprocess::init();
    /// let array = multiprocess::Array::from_slice(&[1.5, 2.5])?;
    /// assert_eq!(array.to_vec(), [1.5, 2.5]);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Io` if there is not enough memory, or no descriptor is left.
    pub fn from_slice(elements: &[T]) -> Result<Self> {
        let array = Self::zeroed(elements.len())?;
        // No other handle exists yet, so it is not lent.
        if let Some(mut lent) = array.0.whole.lend().filter(|_| !elements.is_empty()) {
            lent.populate();
            lent.slice_mut(elements.len()).copy_from_slice(elements);
        }
        Ok(array)
    }

    /// Creates an array of `len` elements whose bytes are all zero.
    ///
    /// ```
    /// # multiprocess::init();
    /// use multiprocess::Array;
    /// assert_eq!(Array::<f32>::zeroed(2)?.to_vec(), [0.0, 0.0]);
    /// assert!(Array::<f32>::zeroed(usize::MAX).is_err());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`from_slice`](Self::from_slice).
    pub fn zeroed(len: usize) -> Result<Self> {
        let size = size_of::<T>();
        let refuse = || {
            Error::io(
                format_args!("cannot create a shared array of {len} elements"),
                io::Error::from(io::ErrorKind::OutOfMemory),
            )
        };
        let bytes = bytes(len, size).filter(|_| align_of::<T>() as u64 <= PAGE).ok_or_else(refuse)?;
        let core = object::create_of_len(PAGE + bytes, |words| {
            words[LEN].store(len as u64, Release);
            words[SIZE].store(size as u64, Release);
        })?;
        Ok(Self(core, PhantomData))
    }

    /// Returns the number of elements.
    ///
    /// ```
    /// # multiprocess::init();
    /// assert_eq!(multiprocess::Array::from_slice(b"four")?.len(), 4);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    #[inline]
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Returns `true` if the array has no elements.
    ///
    /// ```
    /// # multiprocess::init();
    /// assert!(multiprocess::Array::<u8>::zeroed(0)?.is_empty());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    #[inline]
    fn single(&self) -> &Map {
        self.0.single().unwrap_or_else(|error| {
            panic!("{}", Error::io("an array cannot be mapped for access to its elements", error))
        })
    }

    /// Returns a copy of the element at `index`, or `None` if it is out of bounds. Never waits, not even for a guard.
    ///
    /// ```
    /// # multiprocess::init();
    /// let array = multiprocess::Array::from_slice(&[1, 2])?;
    /// assert_eq!((array.get(1), array.get(2)), (Some(2), None));
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// If the first access of this process finds no address space left.
    #[inline]
    pub fn get(&self, index: usize) -> Option<T> {
        if index >= self.0.len {
            return None;
        }
        let mut element = T::zeroed();
        view::load(self.single(), index * size_of::<T>(), bytemuck::bytes_of_mut(&mut element), Self::GRAIN);
        Some(element)
    }

    /// Replaces the element at `index`.
    ///
    /// It blocks this thread while the array is locked elsewhere. In async code prefer [`lock`](Self::lock) if others hold
    /// the lock for long. The task that holds the guard may call `set` too, as long as it has not used the guard. A guard that was
    /// acquired on another thread and then moved into a task of this one is not noticed: on a current-thread runtime `set` then waits for ever.
    ///
    /// If the memory of the lock is damaged ([`lock`](Self::lock) fails with [`Corrupt`](crate::ErrorKind::Corrupt)), it
    /// writes nothing and logs an error.
    ///
    /// ```
    /// # multiprocess::init();
    /// let array = multiprocess::Array::from_slice(&[1, 2])?;
    /// array.set(1, 20);
    /// assert_eq!(array.to_vec(), [1, 20]);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// - If `index` is out of bounds.
    /// - If it could never return: this task has acquired the guard and used it, or the guard was acquired on this thread by another task, or outside
    ///   of tasks, and the tasks of this thread can go on nowhere else (a current-thread runtime, a `LocalSet`).
    #[inline]
    #[track_caller]
    pub fn set(&self, index: usize, value: T) {
        let core = &*self.0;
        assert!(index < core.len, "index out of bounds: the len is {} but the index is {index}", core.len);
        let map = self.single();
        let write = || view::store(map, index * size_of::<T>(), bytemuck::bytes_of(&value), Self::GRAIN);
        let taken = match core.mutex.try_take() {
            Ok(Some(taken)) => Some(taken),
            _ => core.take_to_write(&write),
        };
        let Some(taken) = taken else { return };
        if taken == Taken::OwnerDied {
            core.died().store(1, Relaxed);
        }
        write();
        fault::point("element.written");
        core.mutex.release();
    }

    /// Returns a copy of all elements, each as [`get`](Self::get) returns it. Never waits.
    ///
    /// ```
    /// # multiprocess::init();
    /// let array = multiprocess::Array::from_slice(&[1, 2, 3])?;
    /// let _guard = array.try_lock()?;
    /// assert_eq!(array.to_vec(), [1, 2, 3]); // though it is locked
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// As [`get`](Self::get).
    pub fn to_vec(&self) -> Vec<T> {
        let mut all = bytemuck::zeroed_vec(self.0.len);
        view::load(self.single(), 0, bytemuck::cast_slice_mut(&mut all), Self::GRAIN);
        all
    }

    /// Acquires the lock of the array, waiting until it is free.
    ///
    /// The guard derefs to the elements. Cancel safe: a dropped future has not acquired the lock.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let array = multiprocess::Array::from_slice(&[3, 1, 2])?;
    /// array.lock().await?.sort();
    /// assert_eq!(array.to_vec(), [1, 2, 3]);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// - `OwnerDied` if the last holder died. The array is locked: the guard is inside the error.
    /// - `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs, such as
    ///   a descriptor. With a timeout also if the runtime has no timer.
    pub async fn lock(&self) -> Result<ArrayGuard<T>, LockError<ArrayGuard<T>>> {
        acquire::wait(self).await
    }

    /// Attempts to acquire the lock of the array without waiting.
    ///
    /// ```
    /// # multiprocess::init();
    /// let array = multiprocess::Array::from_slice(&[1, 2, 3])?;
    /// let guard = array.try_lock()?;
    /// assert_eq!(array.try_lock().unwrap_err().kind(), multiprocess::ErrorKind::WouldBlock);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `WouldBlock` if the array is locked. Otherwise as [`lock`](Self::lock).
    pub fn try_lock(&self) -> Result<ArrayGuard<T>, LockError<ArrayGuard<T>>> {
        acquire::attempt(self)
    }

    /// Acquires the lock of the array, waiting at most `timeout`.
    ///
    /// Cancel safe: a dropped future has not acquired the lock. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let array = multiprocess::Array::from_slice(&[1, 2, 3])?;
    /// let guard = array.lock().await?;
    /// let late = array.lock_timeout(std::time::Duration::from_millis(1)).await;
    /// assert_eq!(late.unwrap_err().kind(), multiprocess::ErrorKind::Timeout);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Timeout` if the array was not unlocked in time. Otherwise as [`lock`](Self::lock).
    pub async fn lock_timeout(&self, timeout: Duration) -> Result<ArrayGuard<T>, LockError<ArrayGuard<T>>> {
        acquire::wait_timeout(self, timeout).await
    }

    /// Acquires the lock of the array, blocking this thread until it is free.
    ///
    /// ```
    /// # multiprocess::init();
    /// let array = multiprocess::Array::from_slice(&[1, 2, 3])?;
    /// array.blocking_lock()?.reverse();
    /// assert_eq!(array.to_vec(), [3, 2, 1]);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`lock`](Self::lock).
    #[track_caller]
    pub fn blocking_lock(&self) -> Result<ArrayGuard<T>, LockError<ArrayGuard<T>>> {
        acquire::block(self)
    }

    /// Acquires the lock of the array, blocking this thread for at most `timeout`.
    ///
    /// ```
    /// # multiprocess::init();
    /// let array = multiprocess::Array::from_slice(&[1, 2, 3])?;
    /// let guard = array.blocking_lock()?;
    /// assert!(array.blocking_lock_timeout(std::time::Duration::from_millis(1)).is_err());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`lock_timeout`](Self::lock_timeout).
    #[track_caller]
    pub fn blocking_lock_timeout(&self, timeout: Duration) -> Result<ArrayGuard<T>, LockError<ArrayGuard<T>>> {
        acquire::block_timeout(self, timeout)
    }

    /// Returns a pointer to the elements, for access without the lock.
    ///
    /// It is valid as long as any handle in this process lives. Using it is unsafe: a guard, in any process, assumes that no
    /// one else writes, and [`get`](Self::get) reads by atomics. A sound use is that processes which never lock write to
    /// disjoint parts.
    ///
    /// ```
    /// use multiprocess::{self as mp, Array, Process};
    ///
    /// fn fill(array: Array<u32>, from: usize, to: usize) -> mp::Result<()> {
    ///     // SAFETY: each process has a part of its own, and nobody reads or locks before all are done.
    ///     let part = unsafe { std::slice::from_raw_parts_mut(array.as_ptr()?.as_ptr().add(from), to - from) };
    ///     (from..to).zip(part).for_each(|(n, element)| *element = n as u32);
    ///     Ok(())
    /// }
    ///
    /// fn main() -> mp::Result<()> {
    ///     mp::run(async {
    ///         let array = Array::zeroed(100)?;
    ///         let parts = [(0, 50), (50, 100)].map(|(from, to)| Process::spawn(fill, (array.clone(), from, to)));
    ///         for part in parts {
    ///             part?.await??;
    ///         }
    ///         assert_eq!(array.to_vec(), (0..100).collect::<Vec<u32>>());
    ///         Ok(())
    ///     })
    /// }
    /// ```
    ///
    /// # Errors
    /// `Io` if the first access of this process finds no address space left.
    pub fn as_ptr(&self) -> Result<std::ptr::NonNull<T>> {
        let map = self.0.single().map_err(|error| Error::io("cannot map a shared array", error))?;
        Ok(map.start().cast())
    }
}

impl<T> Clone for Array<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone(), PhantomData)
    }
}

impl<T> fmt::Debug for Array<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Array").field("len", &self.0.len).finish_non_exhaustive()
    }
}

impl<T: Pod> Serialize for Array<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        object::serialize(&*self.0, serializer)
    }
}

impl<'de, T: Pod> Deserialize<'de> for Array<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let core: Arc<ArrayCore> = object::deserialize(deserializer)?;
        if core.size != size_of::<T>() {
            let (is, wanted) = (core.size, size_of::<T>());
            let why = format!("an array of elements of {is} bytes where ones of {wanted} are wanted");
            return Err(D::Error::custom(why));
        }
        Ok(Self(core, PhantomData))
    }
}

/// A guard of an [`Array`], which derefs to its elements in place. Dropping it unlocks the array.
///
/// It may be held across `.await` and moved to other threads. A leaked guard keeps the array locked until its process ends.
///
/// ```
/// # multiprocess::init();
/// let array = multiprocess::Array::from_slice(&[1, 2, 3])?;
/// let mut guard = array.try_lock()?;
/// guard.reverse();
/// assert_eq!(guard[0], 3);
/// # Ok::<(), multiprocess::Error>(())
/// ```
#[must_use = "a guard that is dropped at once protects nothing"]
pub struct ArrayGuard<T> {
    core: Arc<ArrayCore>,
    /// Until it is dropped.
    lent: Option<Lent>,
    marker: PhantomData<T>,
}

impl<T> ArrayGuard<T> {
    #[inline]
    fn open(&self) {
        if !self.core.is_open.load(Relaxed) {
            let _local = self.core.local();
            self.core.is_open.store(true, Relaxed);
        }
    }
}

#[cfg(feature = "ndarray")]
impl<T: Pod> ArrayGuard<T> {
    /// Returns the elements as a view of this shape, row by row, without a copy.
    ///
    /// ```
    /// use multiprocess::{self as mp, Array};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let matrix = Array::from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])?;
    /// let guard = matrix.lock().await?;
    /// let view = guard.view((2, 3))?;
    /// assert_eq!(view.sum_axis(ndarray::Axis(1)), ndarray::arr1(&[6.0, 15.0]));
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `Other` if the shape is not one of as many elements.
    pub fn view<D, S>(&self, shape: S) -> Result<ndarray::ArrayView<'_, T, D>>
    where
        D: ndarray::Dimension,
        S: ndarray::ShapeArg<Dim = D>,
    {
        let all = ndarray::ArrayView::from(&**self);
        all.into_shape_with_order(shape).map_err(|error| wrong_shape(self.core.len, error))
    }

    /// Returns the elements as a view of this shape that can be written to, row by row, without a copy.
    ///
    /// ```
    /// use multiprocess::{self as mp, Array, Process};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let matrix = Array::zeroed(6)?;
    /// Process::spawn(
    ///     |matrix: Array<f64>| -> mp::Result<()> {
    ///         let mut guard = matrix.blocking_lock()?;
    ///         guard.view_mut((2, 3))?.row_mut(1).fill(7.0);
    ///         Ok(())
    ///     },
    ///     (matrix.clone(),),
    /// )?
    /// .await??;
    /// assert_eq!(matrix.to_vec(), [0.0, 0.0, 0.0, 7.0, 7.0, 7.0]);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `Other` if the shape is not one of as many elements.
    pub fn view_mut<D, S>(&mut self, shape: S) -> Result<ndarray::ArrayViewMut<'_, T, D>>
    where
        D: ndarray::Dimension,
        S: ndarray::ShapeArg<Dim = D>,
    {
        let len = self.core.len;
        let all = ndarray::ArrayViewMut::from(&mut **self);
        all.into_shape_with_order(shape).map_err(|error| wrong_shape(len, error))
    }
}

#[cfg(feature = "ndarray")]
fn wrong_shape(len: usize, error: ndarray::ShapeError) -> Error {
    Error::other(format!("an array of {len} elements cannot be seen in this shape: {error}"))
}

impl<T: Pod> Deref for ArrayGuard<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        self.open();
        self.lent.as_ref().map_or(&[], |lent| lent.slice(self.core.len))
    }
}

impl<T: Pod> DerefMut for ArrayGuard<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        self.open();
        self.lent.as_mut().map_or(&mut [], |lent| lent.slice_mut(self.core.len))
    }
}

impl<T> Drop for ArrayGuard<T> {
    fn drop(&mut self) {
        if fork::is_forked() {
            return;
        }
        fault::point("array.releasing");
        *self.core.local() = None;
        self.lent = None;
        self.core.mutex.release();
    }
}

impl<T: Pod + fmt::Debug> fmt::Debug for ArrayGuard<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
