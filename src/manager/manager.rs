//! The face: start a manager, make objects in it.

use super::dict::DictProxy;
use super::link::Link;
use super::list::ListProxy;
use super::method::{Exposed, Maker};
use super::namespace::{Names, Namespace};
use super::protocol::{self, Writer};
use super::proxy::{self, Proxy};
use super::server::{self, Setup};
use crate::error::{Error, ErrorKind, Result};
use crate::os::socket;
use crate::process::Process;
use crate::wire::Fd;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// How long a manager that was told to end may take before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// A process that owns objects, which other processes use through proxies: lists, dictionaries, and anything else.
///
/// It ends with [`shutdown`](Self::shutdown), with the process that started it, or when nobody has this handle or a
/// proxy any more. Dropping this handle while there are proxies leaves the manager to them.
///
/// Costs one process with two threads, of which one wakes every millisecond while there are calls, and none when there
/// are not; and two pipes for each process that uses it.
///
/// ```
/// use multiprocess::{self as mp, Manager, Process, ListProxy};
///
/// async fn add(list: ListProxy<u32>, n: u32) -> mp::Result<()> {
///     list.push(n).await
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::start().await?;
///         let list = manager.list().await?;
///         for n in 0..3 {
///             Process::spawn(add, (list.clone(), n))?.await??;
///         }
///         assert_eq!(list.to_vec().await?, [0, 1, 2]);
///         manager.shutdown().await
///     })
/// }
/// ```
pub struct Manager {
    link: Arc<Link>,
    pid: u32,
    process: Mutex<Option<Process<Result<()>>>>,
}

/// How a [`Manager`] is to be.
///
/// ```
/// use multiprocess::{self as mp, Manager};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let manager = Manager::builder().name("the keeper").start().await?;
/// let numbers = manager.list::<u32>().await?;
/// assert_eq!(numbers.len().await?, 0);
/// # manager.shutdown().await }) }
/// ```
#[derive(Debug, Default)]
#[must_use = "nothing starts before `start`"]
pub struct ManagerBuilder {
    name: Option<String>,
    exposed: Option<HashSet<u64>>,
}

impl ManagerBuilder {
    /// What its process is called; by default `Manager`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Lets clients call these functions only; by default all of this program. The lists, dictionaries and
    /// namespaces of this crate are functions too, and not among them. May be called again: the sum counts.
    pub fn expose(mut self, functions: impl IntoIterator<Item = Exposed>) -> Self {
        let entries = functions.into_iter().flat_map(|Exposed(entries)| entries);
        self.exposed.get_or_insert_default().extend(entries);
        self
    }

    /// Starts the process, and returns when it answers.
    ///
    /// # Errors
    /// `NotInitialized` if neither `run` nor `init` was called, `Spawn` if the process cannot be started, `Io` if
    /// there is no memory or descriptor left.
    pub async fn start(self) -> Result<Manager> {
        let failed = |error| Error::io("cannot start a manager", error);
        let (intake, door) = socket::packet_pair().map_err(failed)?;
        let id = (RandomState::new().hash_one(std::process::id()), RandomState::new().hash_one(&self.name));
        let theirs = Fd::new(door.try_clone().map_err(failed)?);
        let setup = Setup { id, intake: Fd::new(intake), door: theirs, exposed: self.exposed };
        let name = self.name.unwrap_or_else(|| "Manager".into());
        let mut process = Process::builder().name(name).daemon(true).spawn(server::serve, (setup,))?;
        let link = Link::new(id, process.pid(), door)?;
        let manager = Manager { link, pid: process.pid(), process: Mutex::new(None) };
        if let Err(error) = manager.object_count().await {
            // Why it ended says more than that it is gone.
            return Err(if process.is_alive() {
                error
            } else {
                process.join().await.and_then(|ended| ended).err().unwrap_or(error)
            });
        }
        *manager.process.lock().await = Some(process);
        Ok(manager)
    }
}

impl Manager {
    /// Starts a manager. See [`ManagerBuilder::start`].
    ///
    /// # Errors
    /// As [`ManagerBuilder::start`].
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    /// The options.
    pub fn builder() -> ManagerBuilder {
        ManagerBuilder::default()
    }

    /// The id of the manager's process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A new, empty list.
    ///
    /// # Errors
    /// `Closed` if the manager is gone.
    pub async fn list<T>(&self) -> Result<ListProxy<T>>
    where
        T: Serialize + DeserializeOwned + Send + 'static,
    {
        Ok(ListProxy(self.create(Vec::<T>::new, ()).await?))
    }

    /// A new, empty dictionary.
    ///
    /// # Errors
    /// `Closed` if the manager is gone.
    pub async fn dict<K, V>(&self) -> Result<DictProxy<K, V>>
    where
        K: Eq + Hash + Serialize + DeserializeOwned + Send + 'static,
        V: Serialize + DeserializeOwned + Send + 'static,
    {
        Ok(DictProxy(self.create(HashMap::<K, V>::new, ()).await?))
    }

    /// A new, empty namespace.
    ///
    /// # Errors
    /// `Closed` if the manager is gone.
    pub async fn namespace(&self) -> Result<Namespace> {
        Ok(Namespace(self.create(Names::new, ()).await?))
    }

    /// Makes an object by `f` in the manager's process. Cancel-safe: dropped, no object is left behind. See [`Proxy`]
    /// for an example.
    ///
    /// # Errors
    /// `Panicked` if `f` panicked, `Closed` if the manager is gone, `Encode` or `Decode` if an argument cannot travel,
    /// `Other` if the manager does not expose `f`.
    pub async fn create<F, A>(&self, f: F, args: A) -> Result<Proxy<F::Object>>
    where
        F: Maker<A>,
        A: Serialize + DeserializeOwned + Send + 'static,
    {
        proxy::create(&self.link, f, args).await
    }

    /// How many objects there are.
    ///
    /// # Errors
    /// `Closed` if the manager is gone.
    pub async fn object_count(&self) -> Result<usize> {
        let mut request = Writer::request(protocol::COUNT);
        request.number(0);
        let count: u64 = self.link.ask(request, 1, false).await?.part()?;
        Ok(count as usize)
    }

    /// Ends the manager and waits for its process. What its objects hold is dropped with the process; calls under way
    /// fail with kind `Closed`. A second time is fine. Cancel-safe: called again, it goes on.
    ///
    /// # Errors
    /// `Io` if its exit cannot be seen.
    pub async fn shutdown(&self) -> Result<()> {
        let mut process = self.process.lock().await;
        let Some(running) = process.as_mut() else { return Ok(()) };
        let mut request = Writer::request(protocol::END);
        request.number(0);
        match tokio::time::timeout(GRACE, self.link.ask(request, 1, false)).await {
            Ok(Err(error)) if error.kind() != ErrorKind::Closed => return Err(error),
            _ => {}
        }
        if tokio::time::timeout(GRACE, running.wait()).await.is_err() {
            running.kill()?;
            running.wait().await?;
        }
        *process = None;
        Ok(())
    }
}

impl fmt::Debug for Manager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manager").field("pid", &self.pid).finish_non_exhaustive()
    }
}
