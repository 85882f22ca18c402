//! A dictionary in a manager.

use crate::channel::Item;
use crate::error::Result;
use crate::manager::client::proxy::{Proxy, calls, proxies};
use serde::Serialize;
use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;

/// A handle of a dictionary that lives in a manager's process.
///
/// Created by [`Manager::dict`](crate::Manager::dict). Any process that has a handle can read and change the dictionary.
/// Use a [`Proxy`](crate::Proxy) instead for operations of your own, each of which is one call.
///
/// ```
/// use multiprocess::{self as mp, DictProxy, Manager, Process};
///
/// async fn count(words: DictProxy<String, u32>, word: String) -> mp::Result<()> {
///     words.insert(word, 1).await?;
///     Ok(())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::start().await?;
///         let words = manager.dict().await?;
///         Process::spawn(count, (words.clone(), "hello".into()))?.await??;
///         assert_eq!(words.get("hello").await?, Some(1));
///         manager.shutdown().await
///     })
/// }
/// ```
///
/// # Values are copies
/// A method returns a copy of a value. Changing the copy does not change the dictionary. To change a value in place, pass a
/// function to [`update`](Self::update), or let the value be a proxy itself.
///
/// # Details
/// The order of keys, values and items is arbitrary. Each method is one call: see [`Proxy`] for waiting, dropped futures,
/// deaths and cost.
pub struct DictProxy<K, V>(pub(crate) Proxy<HashMap<K, V>>);

proxies!(DictProxy<K, V>);

impl<K: Eq + Hash + Item, V: Item> DictProxy<K, V> {
    /// Returns the dictionary as an object, for [`Proxy::call`] and [`Batch`](crate::Batch).
    pub fn proxy(&self) -> &Proxy<HashMap<K, V>> {
        &self.0
    }

    /// Inserts a key and its value. Returns the value that the key had before, if it had one.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn insert(&self, key: K, value: V) -> Result<Option<V>> {
        self.0.call(HashMap::insert, (key, value)).await
    }

    /// Returns a copy of the value of a key, or `None` if there is no such key.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn get<Q>(&self, key: &Q) -> Result<Option<V>>
    where
        K: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        self.0.lend(|dict, key: K, answer| answer.lend_part(&dict.get::<K>(&key)), key).await
    }

    /// Removes a key and returns its value, or `None` if there is no such key.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let manager = multiprocess::Manager::start().await?;
    /// let ages = manager.dict::<String, u32>().await?;
    /// ages.extend(vec![("a".to_string(), 1), ("b".to_string(), 2)]).await?;
    /// assert_eq!(ages.remove("a").await?, Some(1));
    /// assert!(!ages.contains_key("a").await?);
    /// assert_eq!(ages.items().await?, [("b".to_string(), 2)]);
    /// ages.clear().await?;
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn remove<Q>(&self, key: &Q) -> Result<Option<V>>
    where
        K: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        self.0.lend(|dict, key: K, answer| answer.lend_part(&dict.remove::<K>(&key)), key).await
    }

    /// Returns `true` if there is such a key.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn contains_key<Q>(&self, key: &Q) -> Result<bool>
    where
        K: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        self.0.lend(|dict, key: K, answer| answer.lend_part(&dict.contains_key::<K>(&key)), key).await
    }

    calls! { dict: HashMap<K, V>;
        /// Inserts several keys and their values in one step.
        call fn extend(items: Vec<(K, V)>) -> () { dict.extend(items) }

        /// Returns the number of keys.
        call fn len() -> usize { dict.len() }

        /// Returns `true` if the dictionary is empty.
        call fn is_empty() -> bool { dict.is_empty() }

        /// Returns a copy of all keys, as they are at one moment.
        ///
        /// ```
        /// # multiprocess::init();
        /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
        /// let manager = multiprocess::Manager::start().await?;
        /// let ages = manager.dict::<String, u32>().await?;
        /// ages.insert("a".to_string(), 1).await?;
        /// assert_eq!(ages.keys().await?, ["a"]);
        /// assert_eq!(ages.values().await?, [1]);
        /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
        /// ```
        lend fn keys() -> Vec<K> { dict.keys().collect::<Vec<_>>() }

        /// Returns a copy of all values, as they are at one moment.
        lend fn values() -> Vec<V> { dict.values().collect::<Vec<_>>() }

        /// Returns a copy of all keys and values, as they are at one moment.
        lend fn items() -> Vec<(K, V)> { dict.iter().collect::<Vec<_>>() }
    }

    /// Removes all keys and values.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn clear(&self) -> Result<()> {
        self.0.call(HashMap::clear, ()).await
    }

    /// Runs `f` on the dictionary in the manager's process, as one step: no other call sees the dictionary in between.
    ///
    /// `f` captures nothing. To pass arguments, use [`proxy`](Self::proxy) and [`Proxy::call`].
    ///
    /// # Errors
    /// As [`Proxy::call`].
    ///
    /// ```
    /// use multiprocess::{self as mp, Manager};
    /// use std::collections::HashMap;
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let manager = Manager::start().await?;
    /// let stock = manager.dict::<String, u32>().await?;
    /// stock.insert("apples".into(), 3).await?;
    /// let left = stock.update(|stock| stock.get_mut("apples").map(|n| { *n -= 1; *n })).await?;
    /// assert_eq!(left, Some(2));
    /// let add = |stock: &mut HashMap<String, u32>, n: u32| stock.values_mut().for_each(|count| *count += n);
    /// stock.proxy().call(add, (5,)).await?;
    /// assert_eq!(stock.get("apples").await?, Some(7));
    /// # manager.shutdown().await }) }
    /// ```
    pub async fn update<F: Fn(&mut HashMap<K, V>) -> R + Copy + Send + 'static, R: Item>(&self, f: F) -> Result<R> {
        self.0.call(f, ()).await
    }
}
