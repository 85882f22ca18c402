//! A list in a manager.

use crate::channel::Item;
use crate::error::{Error, Result};
use crate::manager::client::proxy::{Proxy, calls, proxies};
use futures_util::{Stream, TryStreamExt, stream};

/// How many elements a stream fetches at a time.
const CHUNK: usize = 256;

/// A handle of a list that lives in a manager's process.
///
/// Created by [`Manager::list`](crate::Manager::list). Any process that has a handle can read and change the list.
/// Use a [`Queue`](crate::Queue) instead for items that are taken, and an [`Array`](crate::Array) for numbers that are shared by the
/// processes of one program.
///
/// ```
/// use multiprocess::{self as mp, ListProxy, Manager, Process};
///
/// async fn add(list: ListProxy<String>) -> mp::Result<()> {
///     list.push("from a child".into()).await
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::start().await?;
///         let list = manager.list().await?;
///         Process::spawn(add, (list.clone(),))?.await??;
///         assert_eq!(list.to_vec().await?, ["from a child"]);
///         manager.shutdown().await
///     })
/// }
/// ```
///
/// # Elements are copies
/// A method returns a copy of an element. Changing the copy does not change the list. To change an element in place, pass a
/// function to [`update`](Self::update), or let the element be a proxy itself.
///
/// # Details
/// Each method is one call: see [`Proxy`] for waiting, dropped futures, deaths and cost.
pub struct ListProxy<T>(pub(crate) Proxy<Vec<T>>);

proxies!(ListProxy<T>);

fn check(is_there: bool, doing: &str, at: usize, len: usize) -> Result<()> {
    let beyond = || Error::other(format!("cannot {doing} at {at}: the list has {len} elements"));
    is_there.then_some(()).ok_or_else(beyond)
}

impl<T: Item> ListProxy<T> {
    /// Returns the list as an object, for [`Proxy::call`] and [`Batch`](crate::Batch).
    pub fn proxy(&self) -> &Proxy<Vec<T>> {
        &self.0
    }

    calls! { list: Vec<T>;
        /// Appends an element.
        call fn push(value: T) -> () { list.push(value) }

        /// Appends several elements in one step.
        call fn extend(values: Vec<T>) -> () { list.extend(values) }

        /// Returns the number of elements.
        call fn len() -> usize { list.len() }

        /// Returns `true` if the list has no elements.
        call fn is_empty() -> bool { list.is_empty() }

        /// Inserts an element at index `at`, and shifts all elements after it to the right.
        ///
        /// # Errors
        /// `Other` if `at` is greater than the length; else as [`Proxy::call`].
        try fn insert(at: usize, value: T) -> () {
            check(at <= list.len(), "insert", at, list.len()).map(|()| list.insert(at, value))
        }

        /// Returns a copy of the element at index `at`, or `None` if `at` is out of bounds.
        lend fn get(at: usize) -> Option<T> { list.get(at) }

        /// Replaces the element at index `at`.
        ///
        /// # Errors
        /// `Other` if `at` is out of bounds; else as [`Proxy::call`].
        try fn set(at: usize, value: T) -> () {
            check(at < list.len(), "set", at, list.len()).map(|()| list[at] = value)
        }

        /// Removes the element at index `at` and returns it; all elements after it shift to the left.
        ///
        /// # Errors
        /// `Other` if `at` is out of bounds; else as [`Proxy::call`].
        try fn remove(at: usize) -> T { check(at < list.len(), "remove", at, list.len()).map(|()| list.remove(at)) }

        /// Returns a copy of all elements, as they are at one moment.
        lend fn to_vec() -> Vec<T> { list.as_slice() }

        /// Returns a copy of up to `len` elements from index `at` on; there are fewer, or none, at the end of the list.
        lend fn slice(at: usize, len: usize) -> Vec<T> {
            list.get(at..at.saturating_add(len).min(list.len())).unwrap_or_default()
        }
    }

    /// Removes the last element and returns it, or `None` if the list is empty.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let manager = multiprocess::Manager::start().await?;
    /// let list = manager.list::<u32>().await?;
    /// list.extend(vec![1, 2, 3]).await?;
    /// assert_eq!(list.pop().await?, Some(3));
    /// assert_eq!(list.remove(0).await?, 1);
    /// assert_eq!(list.slice(0, 10).await?, [2]);
    /// list.clear().await?;
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn pop(&self) -> Result<Option<T>> {
        self.0.call(Vec::pop, ()).await
    }

    /// Removes all elements.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn clear(&self) -> Result<()> {
        self.0.call(Vec::clear, ()).await
    }

    /// Sorts the list. Equal elements keep their order.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn sort(&self) -> Result<()>
    where
        T: Ord,
    {
        self.0.call(|list: &mut Vec<T>| list.sort(), ()).await
    }

    /// Runs `f` on the list in the manager's process, as one step: no other call sees the list in between.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    ///
    /// ```
    /// use multiprocess::{self as mp, Manager};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let manager = Manager::start().await?;
    /// let list = manager.list().await?;
    /// list.extend(vec![1, 2, 3]).await?;
    /// list.update(|list| list.retain(|n| n % 2 == 1)).await?;
    /// assert_eq!(list.to_vec().await?, [1, 3]);
    /// # manager.shutdown().await }) }
    /// ```
    pub async fn update<F: Fn(&mut Vec<T>) -> R + Copy + Send + 'static, R: Item>(&self, f: F) -> Result<R> {
        self.0.call(f, ()).await
    }

    /// Returns a stream of copies of the elements, which it fetches 256 at a time.
    ///
    /// The stream is no snapshot. It yields elements that are pushed while it runs; if elements before its position are
    /// inserted or removed meanwhile, it repeats or skips some. It ends at the end of the list, or after an error.
    ///
    /// # Errors
    /// An item is an error as of [`Proxy::call`].
    ///
    /// ```
    /// use futures::TryStreamExt;
    /// use multiprocess::{self as mp, Manager};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let manager = Manager::start().await?;
    /// let list = manager.list::<u32>().await?;
    /// list.extend((0..1000).collect()).await?;
    /// let sum = list.stream().try_fold(0, async |sum, n| Ok(sum + n)).await?;
    /// assert_eq!(sum, 499_500);
    /// # manager.shutdown().await }) }
    /// ```
    pub fn stream(&self) -> impl Stream<Item = Result<T>> + Send + use<T> {
        let chunks = stream::try_unfold((self.clone(), 0), async |(list, at): (Self, usize)| {
            let chunk = list.slice(at, CHUNK).await?;
            let next = at + chunk.len();
            Ok::<_, Error>((!chunk.is_empty()).then_some((chunk, (list, next))))
        });
        chunks.map_ok(|chunk| stream::iter(chunk.into_iter().map(Ok))).try_flatten()
    }
}
