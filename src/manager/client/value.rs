//! One value, and a row of values, in a manager.

use crate::channel::Item;
use crate::error::{Error, Result};
use crate::manager::client::proxy::{Proxy, calls, proxies};
use crate::sync::{Integer, of_word, to_word};
use serde::{Deserialize, Serialize};

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
#[derive(Serialize, Deserialize)]
#[serde(bound = "")]
pub struct ValueProxy<T>(pub(crate) Proxy<ValueObject<T>>);

/// The value in the manager.
pub(crate) struct ValueObject<T>(pub(crate) T);

impl<T: Item> ValueProxy<T> {
    /// Returns a copy of the value.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn get(&self) -> Result<T> {
        self.0.lend(|one, (), answer| answer.lend_part(&one.0), &()).await
    }

    calls! { one: ValueObject<T>;
        /// Replaces the value.
        fn set(value: T) -> () { one.0 = value }

        /// Replaces the value and returns the previous one.
        fn swap(value: T) -> T { std::mem::replace(&mut one.0, value) }
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
    /// Adds to the value and returns the previous one. It wraps around on overflow.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn fetch_add(&self, more: T) -> Result<T> {
        self.fetch(|value, more| of_word(to_word(&value).wrapping_add(to_word(&more))), more).await
    }

    /// Subtracts from the value and returns the previous one. It wraps around on overflow.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn fetch_sub(&self, less: T) -> Result<T> {
        self.fetch(|value, less| of_word(to_word(&value).wrapping_sub(to_word(&less))), less).await
    }

    /// Sets the value to the maximum of itself and `other`, and returns the previous one.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn fetch_max(&self, other: T) -> Result<T> {
        self.fetch(T::max, other).await
    }

    /// Sets the value to the minimum of itself and `other`, and returns the previous one.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn fetch_min(&self, other: T) -> Result<T> {
        self.fetch(T::min, other).await
    }

    /// Replaces the value by what `f` makes of it and `other`, and returns the previous one.
    async fn fetch(&self, f: impl Fn(T, T) -> T + Copy + Send + 'static, other: T) -> Result<T> {
        let fetch = move |one: &mut ValueObject<T>, other: T| {
            let new = f(one.0, other);
            std::mem::replace(&mut one.0, new)
        };
        self.0.call(fetch, (other,)).await
    }

    /// Replaces the value by `new` if it equals `current`. Returns `Ok` with the previous value if it was replaced, and `Err` with
    /// the value if not.
    ///
    /// # Errors
    /// The outer result: as [`Proxy::call`].
    pub async fn compare_exchange(&self, current: T, new: T) -> Result<Result<T, T>> {
        let exchange = |one: &mut ValueObject<T>, current: T, new: T| match one.0 == current {
            true => Ok(std::mem::replace(&mut one.0, new)),
            false => Err(one.0),
        };
        self.0.call(exchange, (current, new)).await
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
#[derive(Serialize, Deserialize)]
#[serde(bound = "")]
pub struct ArrayProxy<T>(pub(crate) Proxy<ArrayObject<T>>);

/// The array in the manager.
pub(crate) struct ArrayObject<T>(pub(crate) Box<[T]>);

impl<T: Item> ArrayProxy<T> {
    /// Returns a copy of the element at `index`, or `None` if `index` is out of bounds.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn get(&self, index: usize) -> Result<Option<T>> {
        self.0.lend(|row, index: usize, answer| answer.lend_part(&row.0.get(index)), &index).await
    }

    /// Replaces the element at `index`.
    ///
    /// # Errors
    /// `Other` if `index` is out of bounds; else as [`Proxy::call`].
    pub async fn set(&self, index: usize, value: T) -> Result<()> {
        let set = |row: &mut ArrayObject<T>, index: usize, value: T| {
            let len = row.0.len();
            let element = row.0.get_mut(index);
            *element.ok_or_else(|| Error::other(format!("no element {index}: there are {len} elements")))? = value;
            Ok(())
        };
        self.0.call(set, (index, value)).await?
    }

    calls! { row: ArrayObject<T>;
        /// Returns the number of elements.
        fn len() -> usize { row.0.len() }

        /// Returns `true` if the array has no elements.
        fn is_empty() -> bool { row.0.is_empty() }
    }

    /// Returns a copy of all elements, as they are at one moment.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn to_vec(&self) -> Result<Vec<T>> {
        self.0.lend(|row, (), answer| answer.lend_part(&row.0), &()).await
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
