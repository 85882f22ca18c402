//! The face: start a manager, make objects in it.

use crate::channel::Item;
use crate::connection::{self, Connect};
use crate::error::{Error, ErrorKind, Result};
use crate::manager::client::dict::DictProxy;
use crate::manager::client::handle::Handle;
use crate::manager::client::link::{Link, Running};
use crate::manager::client::list::ListProxy;
use crate::manager::client::lock::{
    ConditionObject, ConditionProxy, LockObject, LockProxy, SemaphoreObject, SemaphoreProxy,
};
use crate::manager::client::namespace::{Names, Namespace};
use crate::manager::client::primitives::{BarrierObject, BarrierProxy, EventObject, EventProxy};
use crate::manager::client::proxy::{self, Proxy, shows};
use crate::manager::client::queue::{QueueObject, QueueProxy};
use crate::manager::client::value::{ArrayObject, ArrayProxy, ValueObject, ValueProxy};
use crate::manager::server::leader;
use crate::manager::wire::greeting::{self, Bind, CertificatesAndKey, GREETING_TIME, Setup};
use crate::manager::wire::messages;
use crate::manager::wire::method::{Exposed, Maker};
use crate::os::{reactor, socket, timer};
use crate::process::Process;
use crate::process::function::{Arguments, captures_nothing};
use crate::wire::Fd;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::future::{Future, IntoFuture};
use std::hash::{BuildHasher, Hash, RandomState};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

/// How long a manager that was asked to end may take before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// A process that owns objects, which other processes use through proxies.
///
/// Use instead, because they cost no message to another process:
/// - [`Value`](crate::Value) or [`Array`](crate::Array) for numbers and structs of numbers;
/// - [`Queue`](crate::Queue) for values that are passed on.
///
/// The objects are lists, dictionaries, namespaces, queues, locks and the like, and [values of any type](Self::create). A proxy is a
/// serde value: send it to other processes as an argument, or through a queue. Programs that share no memory with the manager, also on
/// other hosts, use it by [`connect`](Self::connect), if it is [bound](ManagerBuilder::bind) to an address.
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
///
/// # Details
/// - **End.** The manager ends when [`shutdown`](Self::shutdown) is called, when the process that started it ends, or when the
///   last `Manager` and proxy is dropped.
/// - **Dropped futures.** A dropped call was made as a whole or not at all. A dropped [`create`](Self::create), or method that
///   creates an object ([`list`](Self::list), [`lock`](Self::lock) and so on), leaves no object behind.
/// - **Death.** If the manager is killed, each pending call fails with `Closed` at once. If a client is killed, the manager
///   releases all that it held.
/// - **Cost.** One process with two threads. While there are calls, one of them wakes every millisecond; an idle manager never
///   wakes. Each process that uses the manager has two pipes and an eventfd for it.
pub struct Manager {
    link: Arc<Link>,
    /// None of a manager that was connected to.
    process: Option<Arc<Running>>,
}

/// Configures and starts a [`Manager`]. Created by [`Manager::builder`].
///
/// ```
/// use multiprocess::{self as mp, Manager};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let manager = Manager::builder().name("the keeper").start().await?;
/// let numbers = manager.list::<u32>().await?;
/// assert_eq!(numbers.len().await?, 0);
/// # manager.shutdown().await }) }
/// ```
#[derive(Default)]
#[must_use = "nothing starts before `start`"]
pub struct ManagerBuilder {
    name: Option<String>,
    exposed: Option<HashSet<u64>>,
    address: Option<String>,
    key: Option<Zeroizing<Vec<u8>>>,
    keeps_traces: bool,
    tls: Option<CertificatesAndKey>,
}

impl ManagerBuilder {
    /// Sets the name of the process. The default is `Manager`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Lets clients call these functions only. The default is all functions of this program.
    ///
    /// Several calls add up. Clients can then use the functions of [`Exposed::maker`] and [`Exposed::method`], and a namespace by
    /// [`Exposed::namespace`]. Locks and other objects that only the manager makes cannot be exposed: their methods fail with `Other`. This holds for all
    /// clients, including the process that starts the manager.
    pub fn expose(mut self, functions: impl IntoIterator<Item = Exposed>) -> Self {
        let entries = functions.into_iter().flat_map(|Exposed(entries)| entries);
        self.exposed.get_or_insert_default().extend(entries);
        self
    }

    /// Lets programs of the same build [connect](Manager::connect) at `address`, also from other hosts.
    ///
    /// See [`connection`](crate::connection#addresses) for the form of an address. An [`authkey`](Self::authkey) is required.
    pub fn bind(mut self, address: impl Into<String>) -> Self {
        self.address = Some(address.into());
        self
    }

    /// Sets the key that a program must know to connect. Both sides prove to each other that they know it.
    ///
    /// **The key grants full trust.** A program that knows it can call, on any object and with any arguments, every function that this
    /// program uses with a manager. It can do nothing else, whatever bytes it sends. [`expose`](Self::expose) restricts the functions.
    /// The key itself is not sent. Messages are not encrypted, except by `tls` (with the feature `tls`).
    pub fn authkey(mut self, key: impl AsRef<[u8]>) -> Self {
        self.key = Some(Zeroizing::new(key.as_ref().into()));
        self
    }

    /// Sets whether the `tracing` spans and events of methods reach the subscriber of the process that starts the manager. Default: true.
    ///
    /// They appear under the span in which the manager is started, whichever process calls the method, with a field `process.pid`. So do those of the
    /// manager itself, such as a client that is cut off. See
    /// [`ProcessBuilder::forward_tracing`](crate::ProcessBuilder::forward_tracing) for the rules. They arrive soon after the answer to the call, and all before
    /// [`shutdown`](Manager::shutdown) returns. A thread that a method starts takes no part.
    ///
    /// ```
    /// use multiprocess::{self as mp, Manager};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// fn add(total: &mut u32, n: u32) { tracing::debug!(n, "added"); *total += n; }
    /// let manager = Manager::builder().forward_tracing(true).start().await?;
    /// let total = manager.create(|| 0_u32, ()).await?;
    /// total.call(add, (5,)).await?;
    /// # manager.shutdown().await }) }
    /// ```
    pub fn forward_tracing(mut self, forward: bool) -> Self {
        self.keeps_traces = !forward;
        self
    }

    /// Encrypts connections, which must be TCP, with these certificates and the key to the first, all in DER.
    ///
    /// ```no_run
    /// # use multiprocess::{self as mp, Manager};
    /// # async fn f() -> mp::Result<()> {
    /// let (certificate, key) = (std::fs::read("me.der")?, std::fs::read("me.key.der")?);
    /// let manager = Manager::builder().bind("0.0.0.0:7000").authkey(b"secret").tls(vec![certificate], key).start().await?;
    /// # Ok(()) }
    /// ```
    #[cfg(feature = "tls")]
    pub fn tls(mut self, certificates: Vec<Vec<u8>>, key: Vec<u8>) -> Self {
        self.tls = Some((certificates, Zeroizing::new(key)));
        self
    }

    fn bound(&mut self) -> Result<Option<Bind>> {
        match (self.address.take(), self.key.take()) {
            (None, None) => Ok(None),
            (Some(address), Some(key)) => Bind::new(address, &key, self.tls.take()).map(Some),
            (Some(_), None) => Err(Error::other("a manager that others connect to needs an authkey")),
            (None, Some(_)) => Err(Error::other("an authkey is for a manager that others connect to: bind it")),
        }
    }

    /// Starts the manager, and returns when it answers.
    ///
    /// Cancel safe: a dropped future leaves no manager behind.
    ///
    /// # Errors
    /// - `NotInitialized` if neither `run` nor `init` was called.
    /// - `Spawn` if the process cannot be started.
    /// - `Io` if the address is in use or not permitted, if there is no memory or descriptor left, or outside a tokio runtime with
    ///   I/O and timer (`enable_all`).
    /// - `Other` if the address cannot be parsed or has no key, or there is a key without an address. `Io` if a host
    ///   name cannot be resolved.
    pub async fn start(mut self) -> Result<Manager> {
        let bind = self.bound()?;
        let failed = |error| Error::io("cannot start a manager", error);
        reactor::has_io().and_then(|()| reactor::has_timer()).map_err(failed)?;
        let (intake, connector) = socket::packet_pair().map_err(failed)?;
        socket::limit_sends(connector.as_fd(), GREETING_TIME).map_err(failed)?;
        let id = (RandomState::new().hash_one(std::process::id()), RandomState::new().hash_one(&self.name));
        let theirs = Fd::new(connector.try_clone().map_err(failed)?);
        let setup = Setup { id, intake: Fd::new(intake), connector: theirs, exposed: self.exposed, bind };
        let name = self.name.unwrap_or_else(|| "Manager".into());
        let options =
            Process::builder().name(name).daemon(true).shield_signals(true).forward_tracing(!self.keeps_traces);
        let mut process = options.spawn(serve, (setup,))?;
        let (link, running) = (Link::to(id, process.pid(), connector)?, Arc::<Running>::default());
        link.know_process(&running);
        let manager = Manager { link, process: Some(running.clone()) };
        if let Err(error) = manager.object_count().await {
            // The reason of its end is better than the error that it is gone.
            let ended = match error.kind() {
                ErrorKind::Closed => timer::within(GRACE, process.join()).await.ok(),
                _ => None,
            };
            return Err(ended.and_then(|ended| ended.and_then(|ended| ended).err()).unwrap_or(error));
        }
        *running.lock().await = Some(process);
        Ok(manager)
    }
}

fn serve(setup: Setup) -> Result<()> {
    leader::serve(setup, Box::new(Names::new()))
}

/// Methods that create an object of a built-in type by a function.
macro_rules! creates {
    ($($(#[$doc:meta])* fn $name:ident $(<$($T:ident: $Bound:ident $(+ $More:ident)*),*>)? ($($arg:ident: $Arg:ty),*)
    -> $Proxy:ident $(<$($Of:ident),*>)? = $make:expr;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// As [`create`](Self::create).
        pub async fn $name $(<$($T: $Bound $(+ $More)*),*>)? (&self, $($arg: $Arg),*) -> Result<$Proxy $(<$($Of),*>)?> {
            Ok($Proxy(self.create($make, ($($arg,)*)).await?))
        }
    )*};
}

async fn counts(link: Arc<Link>) -> Result<messages::Counts> {
    link.ask(link.request(messages::COUNT)).await?.part()
}

impl Manager {
    /// Starts a manager with default settings. Waits and drops as [`ManagerBuilder::start`].
    ///
    /// # Errors
    /// As [`ManagerBuilder::start`].
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    /// Returns a builder, to start a manager with other settings.
    pub fn builder() -> ManagerBuilder {
        ManagerBuilder::default()
    }

    /// Connects to a manager that was started with [`bind`](ManagerBuilder::bind), on this host or another.
    ///
    /// Both programs must be of the same build. `key` is the [`authkey`](ManagerBuilder::authkey) of the manager. Await the result,
    /// or set options first. Objects are found in [`names`](Self::names), where others have put them.
    ///
    /// ```
    /// use multiprocess::{self as mp, ListProxy, Manager};
    ///
    /// fn main() -> mp::Result<()> {
    ///     mp::run(async {
    ///         let manager = Manager::builder().bind("127.0.0.1:0").authkey(b"secret").start().await?;
    ///         let list = manager.list::<u32>().await?;
    ///         manager.names().set("primes", list.clone()).await?;
    ///
    ///         // In another process, perhaps on another host:
    ///         let there = Manager::connect(manager.address().await?.as_deref().unwrap(), b"secret").await?;
    ///         let primes: ListProxy<u32> = there.names().get("primes").await?.unwrap();
    ///         primes.extend(vec![2, 3, 5]).await?;
    ///
    ///         assert_eq!(list.to_vec().await?, [2, 3, 5]);
    ///         manager.shutdown().await
    ///     })
    /// }
    /// ```
    ///
    /// # Details
    /// - **Handles** that come through this connection can be sent to the manager and back, and not to other processes, which connect
    ///   themselves.
    /// - **Loss.** If the connection is lost, each pending call fails with `Closed` at once, the handles are of no use any more, and
    ///   the manager releases what they held. It does not connect again by itself.
    /// - **Runtime.** The connection lives in the runtime in which it was made. Once that has ended, each call fails with `Closed`.
    /// - **Dropped futures.** If the future is dropped before it is ready, there is no connection.
    ///
    /// # Errors
    /// - `Io` if nothing listens at `address`, `Timeout` if there is no connection in time.
    /// - `Authentication` if the other end has another key, or does not answer in time.
    /// - `Decode` if the other end is another build of this program, or no manager.
    /// - `Other` if `address` cannot be parsed.
    pub fn connect(address: &str, key: &[u8]) -> ManagerConnect {
        ManagerConnect(connection::connect(address, Some(key)).allow_md5(false))
    }

    /// Returns the address for [`connect`](Self::connect), with the actual port if it was bound to port 0. `None` if the manager was
    /// started without [`bind`](ManagerBuilder::bind).
    ///
    /// # Errors
    /// `Closed` if the manager is gone; `Timeout` and `Io` as [`create`](Self::create).
    pub async fn address(&self) -> Result<Option<String>> {
        self.link.ask(self.link.request(messages::WHERE)).await?.part()
    }

    /// Returns the namespace that each manager has from the start, in which programs that connect find objects.
    ///
    /// Its values stay until they are removed, or the manager ends.
    pub fn names(&self) -> Namespace {
        // It is there as long as the manager, so it does not matter when the claim arrives.
        let handle = Handle::claimed(&self.link, messages::NAMES);
        Namespace(Proxy::new(handle))
    }

    /// Returns the id of the manager's process.
    pub fn pid(&self) -> u32 {
        self.link.pid
    }

    creates! {
        /// Creates an empty list.
        fn list<T: Item>() -> ListProxy<T> = Vec::<T>::new;

        /// Creates an empty dictionary.
        fn dict<K: Eq + Hash + Item, V: Item>() -> DictProxy<K, V> = HashMap::<K, V>::new;

        /// Creates an empty namespace.
        fn namespace() -> Namespace = Names::new;

        /// Creates a lock.
        fn lock() -> LockProxy = LockObject::default;

        /// Creates a semaphore with this number of permits.
        fn semaphore(permits: usize) -> SemaphoreProxy = SemaphoreObject::new;

        /// Creates an event, which is not set.
        fn event() -> EventProxy = EventObject::default;

        /// Creates a barrier for this number of parties.
        fn barrier(parties: usize) -> BarrierProxy = BarrierObject::new;

        /// Creates a condition variable with its lock.
        fn condition() -> ConditionProxy = ConditionObject::default;

        /// Creates a value.
        fn value<T: Item>(value: T) -> ValueProxy<T> = ValueObject::<T>;

        /// Creates an array of these values. Its length is fixed.
        fn array<T: Item>(values: Vec<T>) -> ArrayProxy<T> = |values: Vec<T>| ArrayObject(values.into());
    }

    /// Creates an empty queue of at most `capacity` items. `None` is no limit; 0 counts as 1.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub async fn queue<T: Item>(&self, capacity: impl Into<Option<usize>>) -> Result<QueueProxy<T>> {
        let capacity = capacity.into().map(|capacity| capacity.max(1));
        Ok(QueueProxy(self.create(QueueObject::<T>::new, (capacity,)).await?))
    }

    /// Calls `f` in the manager's process to create an object, and returns a handle of it. See [`Proxy`] for an example.
    ///
    /// Cancel safe: a dropped future leaves no object behind.
    ///
    /// # Errors
    /// - `Panicked` if `f` panicked.
    /// - `Closed` if the manager is gone.
    /// - `Encode` if an argument cannot be serialised, `Decode` if it cannot be deserialised.
    /// - `Other` if the manager does not [expose](ManagerBuilder::expose) `f`.
    /// - `Timeout` if the manager accepted no connection, `Io` if there is no memory or descriptor left.
    pub async fn create<F, A>(&self, f: F, args: A) -> Result<Proxy<F::Object>>
    where
        F: Maker<A>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        proxy::create(&self.link, f, args).await
    }

    /// Returns the number of objects, without [`names`](Self::names).
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let manager = multiprocess::Manager::start().await?;
    /// let _list = manager.list::<u32>().await?;
    /// assert_eq!(manager.object_count().await?, 1);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// `Closed` if the manager is gone; `Timeout` and `Io` as [`create`](Self::create).
    pub async fn object_count(&self) -> Result<usize> {
        let [objects, ..] = counts(self.link.clone()).await?;
        Ok(objects as usize)
    }

    /// The same and more, to be asked again and again; it holds the manager as a proxy does.
    #[cfg(any(feature = "dashboard", feature = "metrics"))]
    pub(crate) fn counter(
        &self,
    ) -> impl Fn() -> futures_util::future::BoxFuture<'static, Result<messages::Counts>> + use<> {
        let link = self.link.clone();
        move || Box::pin(counts(link.clone()))
    }

    /// Ends the manager and waits for its process. Pending calls fail with `Closed`.
    ///
    /// A manager that does not answer within 5 seconds, or has not ended 5 seconds later, is killed. After a completed
    /// `shutdown` it returns at once.
    ///
    /// Cancel safe: if the future is dropped the manager may still run; call `shutdown` again.
    ///
    /// # Errors
    /// - `Other` on a handle that was made by [`connect`](Self::connect): only the process that started a manager can end it.
    /// - `Io` if the exit of the process cannot be observed, or the runtime has no timer.
    pub async fn shutdown(&self) -> Result<()> {
        let of_another = || Error::other("only the process that started a manager can shut it down");
        let mut process = self.process.as_ref().ok_or_else(of_another)?.lock().await;
        let Some(running) = process.as_mut() else { return Ok(()) };
        let failed = |error| Error::io("cannot wait for the end of a manager", error);
        match timer::limited(GRACE, self.link.ask(self.link.request(messages::END))).map_err(failed)?.await {
            // A manager that cannot be asked, by damage or because it has ended, is killed if need be.
            Ok(Err(error)) if !matches!(error.kind(), ErrorKind::Closed | ErrorKind::Corrupt) => return Err(error),
            _ => {}
        }
        if timer::limited(GRACE, running.wait()).map_err(failed)?.await.is_err() {
            running.kill()?;
            running.wait().await?;
        }
        *process = None;
        Ok(())
    }
}

/// A connection that is being made, and its options. Created by [`Manager::connect`]; await it to connect.
#[must_use = "it does nothing unless awaited"]
pub struct ManagerConnect(Connect);

impl ManagerConnect {
    /// Accepts a Unix socket that belongs to this user, besides that of this process; see [`Connect::owner`].
    pub fn owner(self, uid: u32) -> Self {
        Self(self.0.owner(uid))
    }

    /// Sets the time limit for connecting, and then for the handshake. The default is 10 seconds.
    ///
    /// Time is real time: see [Timeouts](crate#timeouts).
    pub fn handshake_timeout(self, timeout: Duration) -> Self {
        Self(self.0.handshake_timeout(timeout))
    }

    /// Sets the length of the longest answer that is received, in bytes. The default is 256 MiB. A request can have 256
    /// MiB, which cannot be changed.
    pub fn max_message(self, bytes: usize) -> Self {
        Self(self.0.max_message(bytes))
    }

    /// Encrypts the connection, which must be TCP. `name` is the name that the manager's certificate must be for.
    ///
    /// ```no_run
    /// # use multiprocess::{self as mp, Manager, connection::rustls};
    /// # async fn f(config: rustls::ClientConfig) -> mp::Result<()> {
    /// let manager = Manager::connect("example.org:7000", b"secret").tls(config.into(), "example.org").await?;
    /// # Ok(()) }
    /// ```
    #[cfg(feature = "tls")]
    pub fn tls(self, config: Arc<connection::rustls::ClientConfig>, name: &str) -> Self {
        Self(self.0.tls(config, name))
    }

    async fn run(self) -> Result<Manager> {
        let connection = self.0.await?;
        let (id, pid) = greeting::greet(&connection).await?;
        Ok(Manager { link: Link::over(id, pid, connection), process: None })
    }
}

impl IntoFuture for ManagerConnect {
    type Output = Result<Manager>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}

impl fmt::Debug for ManagerConnect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

// Neither the key nor what TLS has.
shows!(ManagerBuilder(builder) { name: builder.name, address: builder.address } Manager(manager) { pid: manager.link.pid });
