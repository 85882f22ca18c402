//! Named values of different types in a manager.

use crate::channel::Item;
use crate::error::{Error, ErrorKind, Result};
use crate::manager::client::proxy::{Proxy, proxies};
use crate::manager::wire::messages::{Lend, Writer};
use crate::manager::wire::method::{Exposed, Lent, call_op, make_op};
use serde::Serialize;
use std::any::{Any, type_name};
use std::collections::BTreeMap;

/// A handle of a namespace that lives in a manager's process: names, each with a value of any type.
///
/// Created by [`Manager::namespace`](crate::Manager::namespace). Every manager has one from the start,
/// [`Manager::names`](crate::Manager::names), in which programs that connect find what others have put there.
/// Use a [`DictProxy`](crate::DictProxy) instead for many values of one type.
///
/// ```
/// use multiprocess::{self as mp, Manager, Namespace, Process};
///
/// async fn configure(settings: Namespace) -> mp::Result<()> {
///     settings.set("name", "Rita".to_string()).await?;
///     settings.set("size", 42u32).await
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::start().await?;
///         let settings = manager.namespace().await?;
///         Process::spawn(configure, (settings.clone(),))?.await??;
///         assert_eq!(settings.get::<u32>("size").await?, Some(42));
///         assert_eq!(settings.names().await?, ["name", "size"]);
///         manager.shutdown().await
///     })
/// }
/// ```
///
/// # Details
/// A value is read as the type that it was set with. Each method is one call: see [`Proxy`] for waiting, dropped futures, deaths and
/// cost.
pub struct Namespace(pub(crate) Proxy<Names>);

/// The namespace in the manager.
pub(crate) type Names = BTreeMap<String, Named>;

pub(crate) struct Named {
    value: Box<dyn Any + Send>,
    type_name: &'static str,
}

proxies!(Namespace);

impl Namespace {
    /// Sets the value of a name. A value that it had before, of whatever type, is dropped.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn set<T: Item>(&self, name: &str, value: T) -> Result<()> {
        self.0.call(set::<T>, (name.to_string(), value)).await
    }

    /// Returns a copy of the value of a name, or `None` if there is no such name.
    ///
    /// # Errors
    /// `Decode` if the value was set as another type than `T`; else as [`Proxy::call`].
    pub async fn get<T: Item>(&self, name: &str) -> Result<Option<T>> {
        self.0.lend(get::<T>, name).await
    }

    /// Removes a name and its value. Returns `true` if there was such a name.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let manager = multiprocess::Manager::start().await?;
    /// let namespace = manager.namespace().await?;
    /// namespace.set("limit", 3).await?;
    /// assert!(namespace.remove("limit").await?);
    /// assert_eq!(namespace.get::<i32>("limit").await?, None);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn remove(&self, name: &str) -> Result<bool> {
        self.0.call(remove, (name.to_string(),)).await
    }

    /// Returns all names, sorted.
    ///
    /// # Errors
    /// As [`Proxy::call`].
    pub async fn names(&self) -> Result<Vec<String>> {
        self.0.call(list, ()).await
    }
}

fn set<T: Send + 'static>(names: &mut Names, name: String, value: T) {
    names.insert(name, Named { value: Box::new(value), type_name: type_name::<T>() });
}

fn get<T: Serialize + 'static>(names: &mut Names, name: String, answer: &mut Writer) -> Result<()> {
    let Some(named) = names.get(&name) else { return answer.lend_part(&None::<&T>) };
    let value = named.value.downcast_ref::<T>().ok_or_else(|| {
        let why = format!("{name} is a {}, not a {}", named.type_name, type_name::<T>());
        Error::new(ErrorKind::Decode, why)
    })?;
    answer.lend_part(&Some(value))
}

fn remove(names: &mut Names, name: String) -> bool {
    names.remove(&name).is_some()
}

fn list(names: &mut Names) -> Vec<String> {
    names.keys().cloned().collect()
}

impl Exposed {
    /// Exposes all that a [`Namespace`] does with values of type `T`, and creating one.
    pub fn namespace<T: Item>() -> Self {
        let lent = call_op::<_, Names, Lend<String>, Lent>(0, get::<T>).entry;
        let owned = [Self::method(set::<T>), Self::method(remove), Self::method(list)];
        Self(owned.into_iter().flat_map(|Self(entries)| entries).chain([lent, make_op(Names::new).entry]).collect())
    }
}
