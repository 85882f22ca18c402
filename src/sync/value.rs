//! One value in shared memory.
//!
//! # State
//! `SIZE`: the number of bytes of the value. Up to 8 of them are the lower end of `WORD`, whose other bytes mean nothing. More
//! are a [`double_buffer`]. Then a [`mutex`], which only orders the guards.
//!
//! # Moves
//! | from -> to | by | ordering | wakes |
//! |---|---|---|---|
//! | WORD, or the buffer, replaced | `set`, at any time; a guard that was written to, as it is dropped | SeqCst | - |
//! | WORD changed | `fetch_*`, `swap`, `compare_exchange`, at any time | SeqCst | - |
//!
//! # Invariants
//! 1. A value is replaced as a whole, by one store, so a reader finds a value that was written.
//! 2. A guard has a copy, made when it had the mutex, and stores it before it releases the mutex.
//!
//! # Death
//! | killed | survivors see | repaired by |
//! |---|---|---|
//! | with a guard, before it is dropped | the old value | the next locker takes the mutex over |
//! | dropping a guard, before the value is replaced | the old value | likewise |
//! | dropping a guard, after that | the new value | likewise |
//! | in `set` | the old value or the new one | see [`double_buffer`] |
//!
//! # Cancel
//! A dropped `lock` has not locked, and changed nothing; see [`mutex`].

use super::acquire::{self, Held};
use super::double_buffer::{self, DoubleBuffer};
use super::mutex::{self, ByMutex, Mutex, Taken, Words};
use super::object::{self, Core, Report};
use crate::error::{Error, LockError, Result};
use crate::os::fault;
use crate::os::fork;
use crate::shm::atomic::AtomicU64;
#[cfg(not(multiprocess_loom))]
use crate::shm::family::Family;
use crate::shm::mapped::Mapped;
#[cfg(multiprocess_loom)]
use crate::shm::region::{self as view, Members as Family};
use crate::shm::region::{Map, PAGE, Region};
#[cfg(not(multiprocess_loom))]
use crate::shm::view;
use bytemuck::Pod;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::Ordering::*;
use std::time::{Duration, Instant};

/// A value in shared memory: an integer, a float, or any plain struct (`T: bytemuck::Pod`) of any size.
///
/// Use instead:
/// - [`Array`](crate::Array) for many elements;
/// - [`Manager`](crate::Manager) for values with a heap (`String`, `Vec`) or methods;
/// - [`watch`](crate::watch()) to wait for a change.
///
/// - [`get`](Value::get) and [`set`](Value::set) copy the whole value.
/// - Integers have [`fetch_add`](Value::fetch_add) and similar operations, which are atomic.
/// - Any other change that depends on the old value needs a guard: [`lock`](Value::lock) waits for its turn and derefs to a
///   copy of the value. Dropping the guard stores the copy if it was written to.
///
/// A value is copied on the stack. For megabytes use an [`Array`](crate::Array).
///
/// ```
/// use multiprocess::{self as mp, Process, Value};
///
/// #[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
/// #[repr(C)]
/// struct Account { euros: i64, bookings: u64 }
///
/// async fn deposit(account: Value<Account>, calls: Value<u32>) -> mp::Result<()> {
///     calls.fetch_add(1);
///     let mut account = account.lock().await?;
///     account.euros += 10;
///     account.bookings += 1;
///     Ok(())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let account = Value::new(Account { euros: 0, bookings: 0 })?;
///         let calls = Value::new(0)?;
///         let children: Vec<_> =
///             (0..4).map(|_| Process::spawn(deposit, (account.clone(), calls.clone()))).collect::<mp::Result<_>>()?;
///         for child in children {
///             child.await??;
///         }
///         assert_eq!((account.get().euros, account.get().bookings, calls.get()), (40, 4, 4));
///         Ok(())
///     })
/// }
/// ```
///
/// # Handles
/// A handle is cheap to clone and is a serde value. It can be an argument, a result, or part of a value in a queue or a
/// pipe. The value exists as long as any process or message has a handle.
///
/// # Details
/// - **Consistency.** A value that was read is one that was written, never parts of two. `get`, `set` and the atomic
///   operations do not wait for guards: a change made while a guard exists is lost if that guard is written back.
/// - **Order.** All operations on values of up to 8 bytes have one order, the same for all processes (`SeqCst`).
/// - **Death.** A process killed with a guard leaves the old value, and the next `lock` succeeds.
/// - **Cost.** Up to 8 bytes: one atomic operation and no system call. Larger: a copy and a few atomic operations. `get`
///   never waits; `set` waits for another `set` that is copying. A value is one descriptor and a page of memory.
pub struct Value<T>(Arc<ValueCore>, PhantomData<T>);

const SIZE: usize = 1;
const BUFFER_CONTROL: usize = 2;
/// On cache lines of their own: counting does not disturb waiters.
const WORD: usize = 8;
const MUTEX: usize = 16;
const BUFFERS: usize = MUTEX + mutex::LEN;
/// No write takes so long: the writer is stopped, or its entry is damage.
const LONG: Duration = Duration::from_secs(5);
/// Bytes of a value: no stack has room for more.
const MOST: usize = 1 << 40;
/// A page, which a memfd takes up anyway.
const WORDS: usize = 4096 / size_of::<u64>();

pub(super) struct ValueCore {
    region: Arc<Region>,
    family: &'static Family,
    size: usize,
    /// The buffers that do not fit into the first page.
    map: Option<Arc<Map>>,
    mutex: Mutex,
}

static MAPPED: Mapped<ValueCore> = Mapped::new();

impl Core for ValueCore {
    const KIND: u64 = 0x6d70_7661_6c75_0001;
    const NAME: &'static str = "shared value";
    const WORDS: usize = WORDS;

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
        let size = region.words()[SIZE].load(Acquire) as usize;
        // A length beyond its memory is impossible. That is checked below, where nothing overflows.
        if size > MOST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let family = Family::get()?;
        if !is_word(size) {
            family.me()?; // So that `set` does not fail for want of a place in the family.
        }
        let map = match outside(size) {
            0 => None,
            len => Some(region.extent(PAGE, len)?),
        };
        Ok(Self { mutex: Mutex::view(&region, MUTEX, Self::NAME)?, region, family, size, map })
    }
}

fn is_word(size: usize) -> bool {
    size <= size_of::<u64>()
}

/// The bytes of the buffers, if they need pages of their own.
fn outside(size: usize) -> u64 {
    let words = if is_word(size) { 0 } else { double_buffer::buffer_words(size) };
    if words <= WORDS - BUFFERS { 0 } else { (words as u64 * 8).next_multiple_of(PAGE) }
}

impl ValueCore {
    #[inline]
    fn word(&self) -> &AtomicU64 {
        &self.region.words()[WORD]
    }

    fn buffer_pair(&self) -> DoubleBuffer<'_> {
        let (words, len) = (self.region.words(), double_buffer::buffer_words(self.size));
        let buffers = match &self.map {
            Some(map) => &view::words(map)[..len],
            None => &words[BUFFERS..BUFFERS + len],
        };
        DoubleBuffer { control: &words[BUFFER_CONTROL..BUFFER_CONTROL + double_buffer::CONTROL], buffers }
    }

    #[inline]
    fn load<T: Pod>(&self) -> T {
        if is_word(size_of::<T>()) {
            return of_word(self.word().load(SeqCst));
        }
        let mut value = T::zeroed();
        self.buffer_pair().read(bytemuck::bytes_of_mut(&mut value));
        value
    }

    #[inline]
    fn store<T: Pod>(&self, value: &T) {
        if is_word(size_of::<T>()) {
            return self.word().store(to_word(value), SeqCst);
        }
        self.write(bytemuck::bytes_of(value));
    }

    fn write(&self, bytes: &[u8]) {
        // Only a process that was forked with this value in it has no place yet.
        let me = self.family.me().unwrap_or_else(|error| panic!("{}", Error::io("a value cannot be set", error)));
        let register = self.buffer_pair();
        let (mut tries, mut stuck) = (0_u32, None);
        while !register.try_write(bytes, me, self.family) {
            tries += 1;
            if tries < 100 {
                std::thread::yield_now();
                continue;
            }
            // The writer does not run; spinning would waste a CPU.
            std::thread::sleep(Duration::from_micros(100));
            let holder = register.holder();
            match stuck {
                Some((other, since)) if other == holder => {
                    let since: Instant = since;
                    if since.elapsed() >= LONG {
                        register.take_from(holder);
                        stuck = None;
                    }
                }
                _ => stuck = Some((holder, Instant::now())),
            }
        }
    }
}

/// A value of up to 8 bytes, where an integer has its lower end.
#[inline]
pub(crate) fn to_word<T: Pod>(value: &T) -> u64 {
    let mut bytes = [0; 8];
    bytes[place::<T>()].copy_from_slice(bytemuck::bytes_of(value));
    u64::from_ne_bytes(bytes)
}

/// The other way; whatever the other bytes are.
#[inline]
pub(crate) fn of_word<T: Pod>(word: u64) -> T {
    bytemuck::pod_read_unaligned(&word.to_ne_bytes()[place::<T>()])
}

#[inline]
fn place<T>() -> std::ops::Range<usize> {
    if cfg!(target_endian = "big") { 8 - size_of::<T>()..8 } else { 0..size_of::<T>() }
}

impl<T: Pod> ByMutex for Value<T> {
    const NAME: &'static str = ValueCore::NAME;
    type Guard = ValueGuard<T>;

    #[inline]
    fn mutex(&self) -> &Mutex {
        &self.0.mutex
    }

    /// That the last holder died does not matter: what it had not stored is gone with it.
    #[inline]
    fn guard(&self, _taken: Taken) -> io::Result<Held<ValueGuard<T>>> {
        let guard = ValueGuard { core: self.0.clone(), value: self.0.load(), is_changed: false };
        Ok(Held { guard, owner_died: false })
    }
}

impl<T: Pod> Value<T> {
    /// Creates a shared value that is initially `value`.
    ///
    /// ```
    /// # multiprocess::init();
    /// let level = multiprocess::Value::new(0.5_f32)?;
    /// assert_eq!(level.get(), 0.5);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Io` if no memory or descriptor is left.
    pub fn new(value: T) -> Result<Self> {
        let core = object::create_of_len::<ValueCore>(PAGE + outside(size_of::<T>()), |words| {
            words[SIZE].store(size_of::<T>() as u64, Release);
        })?;
        core.store(&value);
        Ok(Self(core, PhantomData))
    }

    /// Returns a copy of the value. Never waits.
    ///
    /// ```
    /// # multiprocess::init();
    /// let value = multiprocess::Value::new(1)?;
    /// let _guard = value.try_lock()?;
    /// assert_eq!(value.get(), 1); // though it is locked
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    #[inline]
    pub fn get(&self) -> T {
        self.0.load()
    }

    /// Replaces the value, also while it is locked. For more than 8 bytes it blocks this thread while another `set`
    /// copies.
    ///
    /// ```
    /// # multiprocess::init();
    /// let point = multiprocess::Value::new([0.0, 0.0, 0.0])?;
    /// point.set([1.0, 2.0, 3.0]);
    /// assert_eq!(point.get(), [1.0, 2.0, 3.0]);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// For more than 8 bytes, in a process that was forked from one that had used the crate.
    #[inline]
    pub fn set(&self, value: T) {
        self.0.store(&value);
    }

    /// Acquires the lock of the value, waiting until it is free.
    ///
    /// The guard derefs to a copy of the value. Dropping the guard stores the copy, if it was written to. Cancel safe: a
    /// dropped future has not acquired the lock.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let value = multiprocess::Value::new(20)?;
    /// *value.lock().await? *= 2;
    /// let guard = value.lock().await?;
    /// assert_eq!(*guard, 40);
    /// assert_eq!(value.try_lock().unwrap_err().kind(), multiprocess::ErrorKind::WouldBlock);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Io` if it must wait outside a tokio runtime, or if the system refuses a resource that waiting needs, such as a
    /// descriptor. With a timeout also if the runtime has no timer. Never `OwnerDied`.
    pub async fn lock(&self) -> Result<ValueGuard<T>, LockError<ValueGuard<T>>> {
        acquire::wait(self).await
    }

    /// Attempts to acquire the lock of the value without waiting.
    ///
    /// ```
    /// # multiprocess::init();
    /// let value = multiprocess::Value::new(1)?;
    /// *value.try_lock()? += 1;
    /// assert_eq!(value.get(), 2);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Errors
    /// `WouldBlock` if the value is locked. Otherwise as [`lock`](Self::lock).
    #[inline]
    pub fn try_lock(&self) -> Result<ValueGuard<T>, LockError<ValueGuard<T>>> {
        acquire::attempt(self)
    }

    /// Acquires the lock of the value, waiting at most `timeout`.
    ///
    /// Cancel safe: a dropped future has not acquired the lock. The timeout is real time: see [Timeouts](crate#timeouts).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let value = multiprocess::Value::new(1)?;
    /// let guard = value.lock().await?;
    /// let late = value.lock_timeout(std::time::Duration::from_millis(1)).await;
    /// assert_eq!(late.unwrap_err().kind(), multiprocess::ErrorKind::Timeout);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Timeout` if the value was not unlocked in time. Otherwise as [`lock`](Self::lock).
    pub async fn lock_timeout(&self, timeout: Duration) -> Result<ValueGuard<T>, LockError<ValueGuard<T>>> {
        acquire::wait_timeout(self, timeout).await
    }

    /// Acquires the lock of the value, blocking this thread until it is free.
    ///
    /// ```
    /// # multiprocess::init();
    /// let value = multiprocess::Value::new(1)?;
    /// *value.blocking_lock()? += 1;
    /// assert_eq!(value.get(), 2);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`lock`](Self::lock).
    #[track_caller]
    pub fn blocking_lock(&self) -> Result<ValueGuard<T>, LockError<ValueGuard<T>>> {
        acquire::block(self)
    }

    /// Acquires the lock of the value, blocking this thread for at most `timeout`.
    ///
    /// ```
    /// # multiprocess::init();
    /// let value = multiprocess::Value::new(1)?;
    /// let guard = value.blocking_lock()?;
    /// assert!(value.blocking_lock_timeout(std::time::Duration::from_millis(1)).is_err());
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`lock_timeout`](Self::lock_timeout).
    #[track_caller]
    pub fn blocking_lock_timeout(&self, timeout: Duration) -> Result<ValueGuard<T>, LockError<ValueGuard<T>>> {
        acquire::block_timeout(self, timeout)
    }
}

/// An integer of up to 64 bits, which a [`Value`] can change atomically.
///
/// ```
/// fn count<T: multiprocess::Integer>(value: &multiprocess::Value<T>, one: T) -> T {
///     value.fetch_add(one)
/// }
/// # multiprocess::init();
/// assert_eq!(count(&multiprocess::Value::new(7_u8)?, 1), 7);
/// # Ok::<(), multiprocess::Error>(())
/// ```
pub trait Integer: Pod + Ord + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

macro_rules! integers {
    ($($integer:ty)*) => {
        $(impl Integer for $integer {}
        impl sealed::Sealed for $integer {})*
    };
}
integers!(u8 u16 u32 u64 usize i8 i16 i32 i64 isize);

/// Atomic operations on integers. They wrap around on overflow, as std's atomics do, and return the previous value.
impl<T: Integer> Value<T> {
    /// Adds to the value and returns the previous one.
    ///
    /// ```
    /// # multiprocess::init();
    /// let counter = multiprocess::Value::new(250_u8)?;
    /// assert_eq!(counter.fetch_add(10), 250);
    /// assert_eq!(counter.get(), 4);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    #[inline]
    pub fn fetch_add(&self, more: T) -> T {
        // A carry beyond the integer's own bytes means nothing there.
        of_word(self.0.word().fetch_add(to_word(&more), SeqCst))
    }

    /// Subtracts from the value and returns the previous one.
    ///
    /// ```
    /// # multiprocess::init();
    /// let counter = multiprocess::Value::new(-3_i16)?;
    /// assert_eq!(counter.fetch_sub(4), -3);
    /// assert_eq!(counter.get(), -7);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    #[inline]
    pub fn fetch_sub(&self, less: T) -> T {
        of_word(self.0.word().fetch_add(to_word(&less).wrapping_neg(), SeqCst))
    }

    /// Sets the value to the maximum of itself and `other`, and returns the previous one.
    ///
    /// ```
    /// # multiprocess::init();
    /// let largest = multiprocess::Value::new(-3)?;
    /// assert_eq!((largest.fetch_max(5), largest.fetch_max(4), largest.get()), (-3, 5, 5));
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    #[inline]
    pub fn fetch_max(&self, other: T) -> T {
        self.update(|value| (other > value).then_some(other)).unwrap_or_else(|value| value)
    }

    /// Sets the value to the minimum of itself and `other`, and returns the previous one.
    ///
    /// ```
    /// # multiprocess::init();
    /// let smallest = multiprocess::Value::new(3)?;
    /// assert_eq!((smallest.fetch_min(-5), smallest.fetch_min(4), smallest.get()), (3, -5, -5));
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    #[inline]
    pub fn fetch_min(&self, other: T) -> T {
        self.update(|value| (other < value).then_some(other)).unwrap_or_else(|value| value)
    }

    /// Replaces the value and returns the previous one.
    ///
    /// ```
    /// # multiprocess::init();
    /// let value = multiprocess::Value::new(1)?;
    /// assert_eq!((value.swap(2), value.get()), (1, 2));
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    #[inline]
    pub fn swap(&self, new: T) -> T {
        of_word(self.0.word().swap(to_word(&new), SeqCst))
    }

    /// Replaces the value by `new` if it is `current`.
    ///
    /// # Errors
    /// The value as it is, if it is not `current`. Nothing has changed then.
    ///
    /// ```
    /// # multiprocess::init();
    /// let value = multiprocess::Value::new(1)?;
    /// assert_eq!((value.compare_exchange(1, 2), value.compare_exchange(1, 3)), (Ok(1), Err(2)));
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    #[inline]
    pub fn compare_exchange(&self, current: T, new: T) -> std::result::Result<T, T> {
        self.update(|value| (value == current).then_some(new))
    }

    /// Looks at the integer only, whatever the word's other bytes are.
    #[inline]
    fn update(&self, change: impl Fn(T) -> Option<T>) -> std::result::Result<T, T> {
        let change = |word| change(of_word(word)).map(|new| to_word(&new));
        self.0.word().fetch_update(SeqCst, SeqCst, change).map(of_word).map_err(of_word)
    }
}

impl<T> Clone for Value<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone(), PhantomData)
    }
}

impl<T: Pod + fmt::Debug> fmt::Debug for Value<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Value").field(&self.get()).finish()
    }
}

impl<T: Pod> Serialize for Value<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        object::serialize(&*self.0, serializer)
    }
}

impl<'de, T: Pod> Deserialize<'de> for Value<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let core: Arc<ValueCore> = object::deserialize(deserializer)?;
        if core.size != size_of::<T>() {
            let (is, wanted) = (core.size, size_of::<T>());
            return Err(D::Error::custom(format_args!("a shared value of {is} bytes where one of {wanted} is wanted")));
        }
        Ok(Self(core, PhantomData))
    }
}

/// A guard of a [`Value`]: a copy of it, which dropping the guard stores if it was written to.
///
/// It may be held across `.await` and moved to other threads. A leaked guard keeps the value locked until its process ends.
///
/// ```
/// # multiprocess::init();
/// let value = multiprocess::Value::new([1, 2, 3])?;
/// let mut guard = value.try_lock()?;
/// guard[0] = 10;
/// assert_eq!(value.get(), [1, 2, 3]);
/// drop(guard);
/// assert_eq!(value.get(), [10, 2, 3]);
/// # Ok::<(), multiprocess::Error>(())
/// ```
#[must_use = "a guard that is dropped at once protects nothing"]
pub struct ValueGuard<T: Pod> {
    core: Arc<ValueCore>,
    value: T,
    is_changed: bool,
}

impl<T: Pod> Deref for ValueGuard<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: Pod> DerefMut for ValueGuard<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.is_changed = true;
        &mut self.value
    }
}

impl<T: Pod> Drop for ValueGuard<T> {
    #[inline]
    fn drop(&mut self) {
        if self.is_changed && !fork::is_forked() {
            fault::point("value.changed");
            self.core.store(&self.value);
            fault::point("value.stored");
        }
        self.core.mutex.release();
    }
}

impl<T: Pod + fmt::Debug> fmt::Debug for ValueGuard<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ValueGuard").field(&self.value).finish()
    }
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;

    #[test]
    fn carry_out_of_a_small_integer_is_ignored() {
        let value = Value::new(u8::MAX).unwrap();
        for n in 0..=255 {
            assert_eq!(value.fetch_add(1), n_after(n));
        }
        assert_eq!(value.compare_exchange(255, 7), Ok(255));
        assert_eq!((value.fetch_sub(8), value.get()), (7, 255));
        assert_eq!((value.fetch_max(200), value.fetch_min(200), value.get()), (255, 255, 200));
        fn n_after(n: u16) -> u8 {
            (n as u8).wrapping_sub(1)
        }
    }
}
