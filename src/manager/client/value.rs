//! One value, and a row of values, in a manager.

use crate::channel::Item;
use crate::error::{Error, Result};
use crate::manager::client::proxy::{Proxy, calls, proxies};
use crate::sync::{Integer, of_word, to_word};

/// A handle of a value that lives in a manager's process.
///
/// Created by [`Manager::value`](crate::Manager::value). It is for programs that share no memory, such as those on several
/// hosts; among processes of one program, [`Value`](crate::Value) is faster.
///
/// ```
/// use multiprocess::{self as mp, Manager};
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::start().await?;
///         let total = manager.value(40u32).await?;
///         assert_eq!(total.update(|total| { *total += 2; *total }).await?, 42);
///         assert_eq!(total.swap(0).await?, 42);
///         manager.shutdown().await
///     })
/// }
/// ```
///
/// # Details
/// Each method is one call: see [`Proxy`] for waiting, dropped futures, deaths and cost.
pub struct ValueProxy<T>(pub(crate) Proxy<ValueObject<T>>);

/// The value in the manager.
pub(crate) struct ValueObject<T>(pub(crate) T);

impl<T> ValueObject<T> {
    fn swap(&mut self, value: T) -> T {
        std::mem::replace(&mut self.0, value)
    }
}

impl<T: Item> ValueProxy<T> {
    calls! { one: ValueObject<T>;
        /// Returns a copy of the value.
        lend fn get() -> T { &one.0 }

        /// Replaces the value.
        call fn set(value: T) -> () { one.0 = value }

        /// Replaces the value and returns the previous one.
        call fn swap(value: T) -> T { one.swap(value) }
    }

    /// Runs `f` on the value in the manager's process, as one step: no other call sees the value in between.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn update<F: Fn(&mut T) -> R + Copy + Send + 'static, R: Item>(&self, f: F) -> Result<R> {
        self.0.call(move |one: &mut ValueObject<T>| f(&mut one.0), ()).await
    }
}

/// Integers can be changed in one step, which is one call. As with std's atomics, arithmetic wraps around, and each method
/// returns the previous value.
///
/// ```
/// use multiprocess::{self as mp, Manager};
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::start().await?;
///         let count = manager.value(250u8).await?;
///         assert_eq!(count.fetch_add(10).await?, 250);
///         assert_eq!(count.fetch_sub(5).await?, 4);
///         assert_eq!(count.fetch_max(7).await?, 255);
///         assert_eq!(count.fetch_min(7).await?, 255);
///         assert_eq!(count.compare_exchange(8, 9).await?, Err(7));
///         assert_eq!(count.compare_exchange(7, 9).await?, Ok(7));
///         assert_eq!(count.get().await?, 9);
///         manager.shutdown().await
///     })
/// }
/// ```
impl<T: Integer + Item> ValueProxy<T> {
    calls! { one: ValueObject<T>;
        /// Adds to the value and returns the previous one. It wraps around on overflow.
        call fn fetch_add(more: T) -> T { one.swap(of_word(to_word(&one.0).wrapping_add(to_word(&more)))) }

        /// Subtracts from the value and returns the previous one. It wraps around on overflow.
        call fn fetch_sub(less: T) -> T { one.swap(of_word(to_word(&one.0).wrapping_sub(to_word(&less)))) }

        /// Sets the value to the maximum of itself and `other`, and returns the previous one.
        call fn fetch_max(other: T) -> T { one.swap(one.0.max(other)) }

        /// Sets the value to the minimum of itself and `other`, and returns the previous one.
        call fn fetch_min(other: T) -> T { one.swap(one.0.min(other)) }

        /// Replaces the value by `new` if it equals `current`. Returns `Ok` with the previous value if it was replaced, and `Err` with
        /// the value if not. Errors of the call are in the outer result.
        call fn compare_exchange(current: T, new: T) -> Result<T, T> {
            if one.0 == current { Ok(one.swap(new)) } else { Err(one.0) }
        }
    }
}

/// A handle of an array of fixed length that lives in a manager's process.
///
/// Created by [`Manager::array`](crate::Manager::array). It is for programs that share no memory, such as those on several
/// hosts; among processes of one program, [`Array`](crate::Array) is faster.
///
/// ```
/// use multiprocess::{self as mp, Manager};
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::start().await?;
///         let row = manager.array(vec![0u32; 3]).await?;
///         row.set(1, 7).await?;
///         row.update(|row| row.iter_mut().for_each(|n| *n += 1)).await?;
///         assert_eq!(row.to_vec().await?, [1, 8, 1]);
///         assert!(row.set(3, 0).await.is_err());
///         manager.shutdown().await
///     })
/// }
/// ```
///
/// # Details
/// Each method is one call: see [`Proxy`] for waiting, dropped futures, deaths and cost.
pub struct ArrayProxy<T>(pub(crate) Proxy<ArrayObject<T>>);

/// The array in the manager.
pub(crate) struct ArrayObject<T>(pub(crate) Box<[T]>);

impl<T: Item> ArrayProxy<T> {
    calls! { row: ArrayObject<T>;
        /// Returns a copy of the element at `index`, or `None` if `index` is out of bounds.
        lend fn get(index: usize) -> Option<T> { row.0.get(index) }

        /// Replaces the element at `index`.
        ///
        /// # Errors
        /// `Other` if `index` is out of bounds; else as [`Proxy::call`].
        try fn set(index: usize, value: T) -> () {
            let len = row.0.len();
            let beyond = || Error::other(format!("no element {index}: there are {len} elements"));
            row.0.get_mut(index).map(|element| *element = value).ok_or_else(beyond)
        }

        /// Returns the number of elements.
        call fn len() -> usize { row.0.len() }

        /// Returns `true` if the array has no elements.
        call fn is_empty() -> bool { row.0.is_empty() }

        /// Returns a copy of all elements, as they are at one moment.
        lend fn to_vec() -> Vec<T> { &row.0 }
    }

    /// Runs `f` on all elements in the manager's process, as one step: no other call sees the array in between.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn update<F: Fn(&mut [T]) -> R + Copy + Send + 'static, R: Item>(&self, f: F) -> Result<R> {
        self.0.call(move |row: &mut ArrayObject<T>| f(&mut row.0), ()).await
    }
}

proxies!(ValueProxy<T> ArrayProxy<T>);
