//! A list in a manager.

use crate::channel::Item;
use crate::error::{Error, Result};
use crate::manager::client::proxy::{Proxy, proxies};
use crate::manager::wire::messages::Lend;
use crate::wire::{self, Message};
use futures_util::{Stream, StreamExt, stream};
use serde::{Deserialize, Serialize};

/// How many elements a stream fetches at a time.
const CHUNK: usize = 256;

/// A list that lives in a manager's process; made by [`Manager::list`](crate::Manager::list).
///
/// Its elements are values: what comes out is a copy, and changing it changes nothing here. To change an element in
/// place, say how with [`update`](Self::update), or let the element be a proxy itself. See [`Proxy`] for what a handle
/// promises: a call waits for its answer, is made whole or not at all, and fails with `Closed` once the manager is
/// gone.
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
#[derive(Serialize, Deserialize)]
#[serde(bound = "")]
pub struct ListProxy<T>(pub(crate) Proxy<Vec<T>>);

proxies!(ListProxy<T>);

fn beyond(doing: &str, at: usize, len: usize) -> Error {
    Error::other(format!("cannot {doing} at {at}: the list has {len} elements"))
}

impl<T: Item> ListProxy<T> {
    /// The list as an object, for [`Proxy::call`] and [`Batch`](crate::Batch).
    pub fn proxy(&self) -> &Proxy<Vec<T>> {
        &self.0
    }

    /// Appends an element.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn push(&self, value: T) -> Result<()> {
        self.0.call(|list: &mut Vec<T>, value: T| list.push(value), (value,)).await
    }

    /// Appends many, in one step.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn extend(&self, values: Vec<T>) -> Result<()> {
        self.0.call(|list: &mut Vec<T>, values: Vec<T>| list.extend(values), (values,)).await
    }

    /// Inserts an element before the one at `at`.
    ///
    /// # Errors
    /// `Other` if `at` is greater than the length; else as [`Proxy::call`].
    pub async fn insert(&self, at: usize, value: T) -> Result<()> {
        let insert = |list: &mut Vec<T>, at: usize, value: T| {
            if at > list.len() {
                return Err(beyond("insert", at, list.len()));
            }
            list.insert(at, value);
            Ok(())
        };
        self.0.call(insert, (at, value)).await?
    }

    /// The element at `at`, or `None` beyond the end.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn get(&self, at: usize) -> Result<Option<T>> {
        self.0.lend(|list, Lend(at): Lend<usize>| wire::encode_by_serde(&list.get(at)), &at).await
    }

    /// Replaces the element at `at`.
    ///
    /// # Errors
    /// `Other` beyond the end; else as [`Proxy::call`].
    pub async fn set(&self, at: usize, value: T) -> Result<()> {
        let set = |list: &mut Vec<T>, at: usize, value: T| {
            let len = list.len();
            list.get_mut(at).map(|place| *place = value).ok_or_else(|| beyond("set", at, len))
        };
        self.0.call(set, (at, value)).await?
    }

    /// Takes the last element.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn pop(&self) -> Result<Option<T>> {
        self.0.call(Vec::pop, ()).await
    }

    /// Takes the element at `at` out; those behind it move up.
    ///
    /// # Errors
    /// `Other` beyond the end; else as [`Proxy::call`].
    pub async fn remove(&self, at: usize) -> Result<T> {
        let remove = |list: &mut Vec<T>, at: usize| match at < list.len() {
            true => Ok(list.remove(at)),
            false => Err(beyond("remove", at, list.len())),
        };
        self.0.call(remove, (at,)).await?
    }

    /// Drops all elements.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn clear(&self) -> Result<()> {
        self.0.call(Vec::clear, ()).await
    }

    /// How many elements there are.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn len(&self) -> Result<usize> {
        self.0.call(|list: &mut Vec<T>| list.len(), ()).await
    }

    /// Whether there is no element.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn is_empty(&self) -> Result<bool> {
        Ok(self.len().await? == 0)
    }

    /// Sorts, keeping equal elements in their order.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn sort(&self) -> Result<()>
    where
        T: Ord,
    {
        self.0.call(|list: &mut Vec<T>| list.sort(), ()).await
    }

    /// A copy of all elements, as they are at one moment.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn to_vec(&self) -> Result<Vec<T>> {
        self.slice(0, usize::MAX).await
    }

    /// A copy of at most `len` elements from `at` on; beyond the end there are none.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn slice(&self, at: usize, len: usize) -> Result<Vec<T>> {
        let slice = |list: &mut Vec<T>, Lend((at, len)): Lend<(usize, usize)>| -> Result<Message> {
            let end = at.saturating_add(len).min(list.len());
            wire::encode_by_serde(&Lend(list.get(at..end).unwrap_or_default()))
        };
        let Lend(slice): Lend<Vec<T>> = self.0.lend(slice, &(at, len)).await?;
        Ok(slice)
    }

    /// Runs `f` on the list, in the manager's process, as one step that no other call comes into.
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

    /// The elements one after the other, fetched some at a time: what is pushed meanwhile is seen, and a change before
    /// the place where the stream stands moves what it sees. Ends at the end of the list, or after an error.
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
        chunks.flat_map(|chunk| match chunk {
            Ok(chunk) => stream::iter(chunk.into_iter().map(Ok).collect::<Vec<_>>()),
            Err(error) => stream::iter(vec![Err(error)]),
        })
    }
}
