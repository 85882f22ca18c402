//! The typed handle a client holds, and several calls in one message.

use crate::error::{Error, Result};
use crate::manager::client::handle::{self, Handle};
use crate::manager::client::link::Link;
use crate::manager::wire::messages::{self, Lend, Op, Place, Reader, Writer};
use crate::manager::wire::method::{self, Lent, Maker, Method, Owned};
use crate::process::function::{Arguments, captures_nothing};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Where the number of operations of a batch stands.
const COUNT_AT: usize = 9;

/// A handle of an object of any type that lives in a manager's process.
///
/// Created by [`Manager::create`](crate::Manager::create). [`call`](Self::call) runs a function on the object, where the object is. Calls
/// on one object run one at a time, in the order in which they arrive. A slow call delays no other object.
///
/// Use a [`ListProxy`](crate::ListProxy), a [`DictProxy`](crate::DictProxy) or a [`Namespace`](crate::Namespace) instead where their
/// operations are enough. For numbers in memory that the processes of one program share there are [`Value`](crate::Value) and
/// [`Array`](crate::Array).
///
/// ```
/// use multiprocess::{self as mp, Manager, Process, Proxy};
///
/// struct Tally(u64);
/// impl Tally {
///     fn new(start: u64) -> Self { Self(start) }
///     fn add(&mut self, n: u64) -> u64 { self.0 += n; self.0 }
/// }
///
/// async fn count(tally: Proxy<Tally>) -> mp::Result<u64> {
///     tally.call(Tally::add, (5,)).await
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::start().await?;
///         let tally = manager.create(Tally::new, (10,)).await?;
///         assert_eq!(Process::spawn(count, (tally.clone(),))?.await??, 15);
///         assert_eq!(tally.call(Tally::add, (1,)).await?, 16);
///         manager.shutdown().await
///     })
/// }
/// ```
///
/// # Handles
/// A handle is cheap to clone and is a serde value. It can be an argument, a result, part of a value in a queue, or part of another
/// object of the manager. The object exists as long as any handle of it does, or one is on its way. It is dropped with the last
/// handle, also if that one's process is killed. Objects that hold handles of each other in a circle are dropped once nothing
/// else holds one.
///
/// - A handle that came through [`Manager::connect`](crate::Manager::connect) can be sent to that manager and back only, and is of no
///   use once the connection is lost.
/// - A handle that is decoded on a thread of your own inside the manager is no part of any object: the manager cannot drop it with a circle of
///   objects.
///
/// # Details
/// - **Waiting.** A call waits for its answer; if 1 MiB is under way to the manager, first for room. The first call of a process
///   connects it. If the manager is stopped and too many others are connecting, that blocks the thread for up to 10 seconds, and
///   then the call fails with `Timeout`. An object must not wait for a call on itself: that call begins when the object is done.
/// - **Dropped futures.** A call that is dropped was made as a whole or not at all.
/// - **Death.** If the manager's process ends, each pending call fails with `Closed` at once. If a client is killed, the calls that
///   it has sent are made.
/// - **Cost.** One message to the manager and one back, without a system call while both sides are busy.
pub struct Proxy<T> {
    pub(crate) handle: Arc<Handle>,
    object: PhantomData<fn(T) -> T>,
}

impl<T: Send + 'static> Proxy<T> {
    /// Calls `g` with the object and `args`, and returns its result. If the future is dropped, the call was made as a whole or not at
    /// all.
    ///
    /// # Errors
    /// - `Panicked` if `g` panicked. The object stays, as `g` left it.
    /// - `Closed` if the manager is gone.
    /// - `Encode` if an argument or the result cannot be serialised, `Decode` if it cannot be deserialised, or if the manager runs
    ///   another build of the program.
    /// - `Other` if the manager does not [expose](crate::ManagerBuilder::expose) `g`.
    /// - `Timeout` if the manager accepted no connection, `Io` if there is no memory or descriptor left.
    pub async fn call<F, A>(&self, g: F, args: A) -> Result<F::Output>
    where
        F: Method<T, A>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        run(&self.handle.link, method::call_op::<F, T, A, Owned>(self.handle.object, g), args).await
    }

    /// Calls a function of ours whose result is lent by the object and read here as an `R`. `args` are an `A` as the caller has
    /// it, borrowed.
    pub(crate) async fn lend<R, F, A>(&self, g: F, args: &(impl Serialize + ?Sized)) -> Result<R>
    where
        R: DeserializeOwned + 'static,
        F: Fn(&mut T, A, &mut Writer) -> Result<()> + Copy + 'static,
        A: DeserializeOwned + Send + 'static,
    {
        let mut request = self.handle.link.request(messages::CALL);
        request.number(1).op(&method::call_op::<F, T, Lend<A>, Lent>(self.handle.object, g)).lend(args)?;
        let Lend(value) = self.handle.link.ask(request).await?.part()?;
        Ok(value)
    }
}

impl<T> Proxy<T> {
    pub(crate) fn new(handle: Handle) -> Self {
        Self { handle: Arc::new(handle), object: PhantomData }
    }

    /// Returns an empty [`Batch`] of calls for this object's manager.
    pub fn batch(&self) -> Batch {
        let link = self.handle.link.clone();
        let mut request = link.request(messages::CALL);
        request.number(0);
        let (end, number) = (request.len(), BATCHES.fetch_add(1, Relaxed));
        Batch { link, request, end, number, count: 0, handles: Vec::new() }
    }

    /// Returns `true` if both are handles of one object.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let manager = multiprocess::Manager::start().await?;
    /// let total = manager.create(|| 0_u32, ()).await?;
    /// assert!(total.is_same_object(&total.clone()));
    /// assert!(!total.is_same_object(&manager.create(|| 0_u32, ()).await?));
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn is_same_object(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.handle.link, &other.handle.link) && self.handle.object == other.handle.object
    }
}

/// Makes an object by `f` in the manager behind `link`.
pub(crate) async fn create<F, A>(link: &Arc<Link>, f: F, args: A) -> Result<Proxy<F::Object>>
where
    F: Maker<A>,
    A: Serialize + DeserializeOwned + Send + 'static,
{
    Ok(Proxy::new(run(link, method::make_op(f), args).await?))
}

/// Has the manager behind `link` run one operation.
async fn run<R: DeserializeOwned + 'static>(link: &Arc<Link>, op: Op, args: impl Serialize + 'static) -> Result<R> {
    let mut request = link.request(messages::CALL);
    request.number(1).op(&op).append(&args)?;
    drop(args);
    link.ask(request).await?.part()
}

/// Methods of a proxy, each of which runs its body on the object. A `call fn` returns the value of its body, and a `lend fn` a copy of
/// what its body borrows. The body of a `try fn` is a `Result`. A `wait fn` takes the result of an operation that may have to wait: its
/// body names the timeout, the operation and the arguments. The docs of the last two state their errors.
macro_rules! calls {
    ($object:ident: $Object:ty;
    $($(#[$doc:meta])* $how:ident fn $name:ident($($arg:ident: $Arg:ty),*) -> $Out:ty $body:block)*) => {$(
        $(#[$doc])*
        #[doc = calls!(@errors $how)]
        pub async fn $name(&self, $($arg: $Arg),*) -> $crate::error::Result<$Out> {
            calls!(@$how self, $object: $Object, [$($arg: $Arg),*], $body)
        }
    )*};
    (@call $this:ident, $object:ident: $Object:ty, [$($arg:ident: $Arg:ty),*], $body:block) => {
        $this.0.call(|$object: &mut $Object, $($arg: $Arg),*| $body, ($($arg,)*)).await
    };
    (@lend $this:ident, $object:ident: $Object:ty, [$($arg:ident: $Arg:ty),*], $body:block) => {
        $this
            .0
            .lend(|$object: &mut $Object, ($($arg,)*): ($($Arg,)*), answer| answer.lend_part(&$body), &($($arg,)*))
            .await
    };
    (@try $($call:tt)*) => { calls!(@call $($call)*)? };
    (@wait $this:ident, $object:ident: $Object:ty, [$($arg:ident: $Arg:ty),*], $body:block) => {{
        let (timeout, operation, args) = $body;
        let (value, asked) = $this.0.wait(timeout, operation, args).await?;
        asked.take();
        Ok(value)
    }};
    (@errors call) => { "\n# Errors\nAs [`Proxy::call`](crate::manager::Proxy::call)." };
    (@errors lend) => { calls!(@errors call) };
    (@errors $how:ident) => { "" };
}
pub(crate) use calls;

/// Implements what all proxies have in common.
macro_rules! proxies {
    ($($name:ident $(<$($t:ident),*>)?)*) => {$(
        impl$(<$($t),*>)? Clone for $name$(<$($t),*>)? {
            fn clone(&self) -> Self {
                Self(self.0.clone())
            }
        }

        impl$(<$($t),*>)? std::fmt::Debug for $name$(<$($t),*>)? {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_tuple(stringify!($name)).field(&self.0.handle.object).finish()
            }
        }

        impl$(<$($t),*>)? serde::Serialize for $name$(<$($t),*>)? {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> $crate::error::Result<S::Ok, S::Error> {
                serde::Serialize::serialize(&self.0, serializer)
            }
        }

        impl<'de $($(, $t)*)?> serde::Deserialize<'de> for $name$(<$($t),*>)? {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> $crate::error::Result<Self, D::Error> {
                serde::Deserialize::deserialize(deserializer).map(Self)
            }
        }
    )*};
}
pub(crate) use proxies;

/// Implements `Debug`, with these fields.
macro_rules! shows {
    ($($Type:ident($this:ident) { $($field:ident: $value:expr),* })*) => {$(
        impl std::fmt::Debug for $Type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let $this = self;
                f.debug_struct(stringify!($Type))$(.field(stringify!($field), &$value))*.finish_non_exhaustive()
            }
        }
    )*};
}
pub(crate) use shows;

impl<T> Clone for Proxy<T> {
    fn clone(&self) -> Self {
        Self { handle: self.handle.clone(), object: PhantomData }
    }
}

impl<T> fmt::Debug for Proxy<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = std::any::type_name::<T>();
        f.debug_struct("Proxy").field("of", &what).field("object", &self.handle.object).finish()
    }
}

impl<T> Serialize for Proxy<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        handle::serialize(&self.handle, serializer)
    }
}

impl<'de, T> Deserialize<'de> for Proxy<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::new(Handle::deserialize(deserializer)?))
    }
}

/// Several calls in one message, which cost one round trip together.
///
/// Created by [`Proxy::batch`]. [`call`](Self::call) adds a call and returns a [`Ticket`]; [`send`](Self::send) makes the calls and
/// returns the [`Replies`], in which a ticket finds its result. The calls are made in order, each as by [`Proxy::call`]. Calls of
/// other clients can come between them. If one fails, the next are made all the same.
///
/// Use [`Proxy::call`] instead for a single call, or for several steps that no other call may come between: they are one function.
///
/// ```
/// use multiprocess::{self as mp, Manager};
/// use std::collections::HashMap;
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::start().await?;
///         let dict = manager.dict::<String, u32>().await?;
///         let mut batch = dict.proxy().batch();
///         for n in 0..100 {
///             batch.call(dict.proxy(), HashMap::insert, (n.to_string(), n))?;
///         }
///         let len = batch.call(dict.proxy(), |map: &mut HashMap<String, u32>| map.len(), ())?;
///         let mut replies = batch.send().await?;
///         assert_eq!(replies.take(len)?, 100);
///         manager.shutdown().await
///     })
/// }
/// ```
#[must_use = "nothing is called before `send`"]
pub struct Batch {
    link: Arc<Link>,
    request: Writer,
    /// The calls after it were not finished.
    end: usize,
    number: u64,
    count: usize,
    /// The objects stay until the answer is there.
    handles: Vec<Arc<Handle>>,
}

static BATCHES: AtomicU64 = AtomicU64::new(0);

/// The place of one result among the [`Replies`] to a [`Batch`], and its type.
#[derive(Debug)]
pub struct Ticket<R> {
    batch: u64,
    at: usize,
    result: PhantomData<fn() -> R>,
}

impl Batch {
    /// Adds a call of `g` on the object of `proxy`.
    ///
    /// # Errors
    /// `Encode` if an argument cannot be serialised, `Other` if the object lives in another manager. The batch is as before.
    pub fn call<T, F, A>(&mut self, proxy: &Proxy<T>, g: F, args: A) -> Result<Ticket<F::Output>>
    where
        T: Send + 'static,
        F: Method<T, A>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        if !Arc::ptr_eq(&proxy.handle.link, &self.link) {
            return Err(Error::other("a batch goes to one manager, and this object lives in another"));
        }
        // Of a call whose argument failed, or panicked.
        self.request.truncate(self.end);
        self.request.op(&method::call_op::<F, T, A, Owned>(proxy.handle.object, g)).append(&args)?;
        self.end = self.request.len();
        if self.handles.last().is_none_or(|last| !Arc::ptr_eq(last, &proxy.handle)) {
            self.handles.push(proxy.handle.clone());
        }
        self.count += 1;
        Ok(Ticket { batch: self.number, at: self.count - 1, result: PhantomData })
    }

    /// Returns the number of calls in the batch.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Returns `true` if the batch has no calls.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Makes the calls and waits for their results. If the future is dropped, all calls were made, or none.
    ///
    /// # Errors
    /// `Closed` if the manager is gone, `Timeout` if it accepted no connection, `Io` if there is no memory or
    /// descriptor left. The error of a single call is in the [`Replies`].
    pub async fn send(mut self) -> Result<Replies> {
        self.request.truncate(self.end);
        self.request.amend(COUNT_AT, self.count as u64);
        let reader = self.link.ask(self.request).await?;
        Ok(Replies { reader, places: Vec::with_capacity(self.count), number: self.number })
    }
}

shows!(Batch(batch) { len: batch.count });

/// The results of the calls of a [`Batch`].
pub struct Replies {
    reader: Reader,
    /// Where the replies begin that have been passed.
    places: Vec<Place>,
    number: u64,
}

impl Replies {
    /// Returns the result of one call. It costs least in the order of the calls.
    ///
    /// # Errors
    /// As [`Proxy::call`]; `Other` if the ticket belongs to another batch.
    pub fn take<R: DeserializeOwned + 'static>(&mut self, ticket: Ticket<R>) -> Result<R> {
        if ticket.batch != self.number {
            return Err(Error::other("this ticket is of another batch"));
        }
        self.reader.part_at(ticket.at, &mut self.places)
    }
}

shows!(Replies(_replies) {});
