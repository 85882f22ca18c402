//! A pool as a `tower::Service`.

use super::engine::{PoolLifetime, Shared, check_forked};
use super::flight::Target;
use super::handle::Call;
use super::input::One;
use crate::error::Error;
use crate::os::fork;
use crate::process::Function;
use crate::process::function::Arguments;
use serde::de::DeserializeOwned;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use tower_service::Service;

/// Room for one waiting item of a pool, for which its holder has not handed in an item yet. A drop gives it back.
struct Reserved(Arc<Shared>);

impl Drop for Reserved {
    fn drop(&mut self) {
        if !fork::is_forked() {
            self.0.give_back_one();
        }
    }
}

/// A caller's place in the line for room, and what it gets there.
struct Place {
    shared: Arc<Shared>,
    ticket: Option<u64>,
}

impl Place {
    /// Room for one item; if there is none, `waker` is woken when there is.
    fn reserve(&mut self, waker: &Waker) -> Option<Reserved> {
        (self.shared.reserve_one(&mut self.ticket, waker)).then(|| Reserved(self.shared.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take().filter(|_| !fork::is_forked()) {
            self.shared.leave_line(ticket);
        }
    }
}

type Configure<R> = Arc<dyn Fn(Call<R>) -> Call<R> + Send + Sync>;

/// A [`tower::Service`](tower_service::Service) that runs a function of one argument on the workers of a pool; made by
/// [`Pool::service`](crate::Pool::service).
///
/// Use [`Pool::apply`](crate::Pool::apply) instead where no layer goes around it.
///
/// Its requests are arguments of the function, its responses the results, its errors those of [`Pool::apply`](crate::Pool::apply).
/// Layers of `tower` and of its users go around it: timeouts, load shedding, limits, buffers, `axum`.
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// use std::time::Duration;
/// use tower::{Service, ServiceBuilder, ServiceExt};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// fn shout(text: String) -> String {
///     text.to_uppercase()
/// }
/// let pool = Pool::builder().workers(2).max_waiting(100).build()?;
/// let mut service = ServiceBuilder::new()
///     .load_shed()
///     .timeout(Duration::from_secs(5))
///     .service(pool.service(shout));
/// let answer = service.ready().await.expect("open").call("quiet".to_owned()).await;
/// assert_eq!(answer.expect("in time"), "QUIET");
/// # Ok(()) }) }
/// ```
///
/// # Waiting
/// - `poll_ready` is ready when the pool has room for one more waiting item, and keeps that room for the next `call`. Only a pool with
///   [`max_waiting`](crate::PoolBuilder::max_waiting) can be without room; services and other callers get it in the order in which they
///   asked.
/// - A service that is ready and not called holds room that others could use, and so does one that was refused and keeps its place in
///   line. Drop it, or call it: a clone for each request, as `axum` makes it, does that.
/// - A `call` that no `poll_ready` went before waits for room as [`apply`](crate::Pool::apply) does.
///
/// # Errors
/// `poll_ready` fails with kind `Closed` if the pool is closed, with kind `Other` if it is [`broken`](crate::Pool::broken).
///
/// # Drop
/// A response runs when it is polled, and its drop cancels it as that of a [`Call`] does: so the timeout of a layer ends what it gives up.
/// A dropped service gives back the room that it keeps. Its responses go on.
///
/// # Cost
/// Each `poll_ready` takes the lock of the pool once. A clone of a service has no room of its own.
pub struct PoolService<T, R> {
    pool: Arc<PoolLifetime>,
    target: Target,
    configure: Option<Configure<R>>,
    place: Option<Place>,
    reserved: Option<Reserved>,
    types: PhantomData<fn(T) -> R>,
}

impl<T, R> PoolService<T, R> {
    pub(super) fn new<F, M>(pool: Arc<PoolLifetime>, f: F) -> Self
    where
        F: Function<(T,), M, Output = R>,
        T: Arguments,
    {
        let (configure, place, reserved) = (None, None, None);
        Self { pool, target: Target::of(f), configure, place, reserved, types: PhantomData }
    }

    /// Sets the options of each call, such as its [`timeout`](Call::timeout), after which its worker is killed.
    ///
    /// ```
    /// use multiprocess::{self as mp, ErrorKind, Pool};
    /// use std::time::Duration;
    /// use tower::ServiceExt;
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// fn wait(ms: u64) {
    ///     std::thread::sleep(Duration::from_millis(ms));
    /// }
    /// let pool = Pool::new(1)?;
    /// let service = pool.service(wait).configure(|call| call.timeout(Duration::from_millis(50)));
    /// assert_eq!(service.oneshot(60_000).await.unwrap_err().kind(), ErrorKind::Timeout);
    /// # Ok(()) }) }
    /// ```
    pub fn configure(mut self, configure: impl Fn(Call<R>) -> Call<R> + Send + Sync + 'static) -> Self {
        self.configure = Some(Arc::new(configure));
        self
    }
}

impl<T, R> Clone for PoolService<T, R> {
    fn clone(&self) -> Self {
        let Self { pool, target, configure, .. } = self;
        let (pool, configure) = (pool.clone(), configure.clone());
        Self { pool, target: *target, configure, place: None, reserved: None, types: PhantomData }
    }
}

impl<T, R> std::fmt::Debug for PoolService<T, R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { target, reserved, .. } = self;
        f.debug_struct("PoolService").field("function", &target.label).field("is_ready", &reserved.is_some()).finish()
    }
}

impl<T: Arguments, R: DeserializeOwned + 'static> Service<T> for PoolService<T, R> {
    type Response = R;
    type Error = Error;
    type Future = PoolResponse<R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        check_forked()?;
        if let Err(error) = self.pool.shared().check_open() {
            (self.place, self.reserved) = (None, None);
            return Poll::Ready(Err(error));
        }
        if self.reserved.is_none() {
            let shared = self.pool.shared();
            let place = self.place.get_or_insert_with(|| Place { shared: shared.clone(), ticket: None });
            self.reserved = place.reserve(cx.waker());
        }
        match self.reserved {
            Some(_) => Poll::Ready(Ok(())),
            None => Poll::Pending,
        }
    }

    fn call(&mut self, request: T) -> PoolResponse<R> {
        let call = Call::new(self.pool.clone(), self.target, One::input(&(request,)));
        let call = self.configure.iter().fold(call, |call, configure| configure(call));
        let reserved = self.reserved.take();
        let call = if reserved.is_some() { call.admitted() } else { call };
        PoolResponse { call, reserved }
    }
}

/// The result of a request to a [`PoolService`], when awaited.
///
/// ```
/// use multiprocess::{self as mp, Pool, PoolResponse};
/// use tower::{Service, ServiceExt};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let pool = Pool::new(1)?;
/// let mut service = pool.service(|n: u32| n + 1);
/// let response: PoolResponse<u32> = service.ready().await?.call(1);
/// assert_eq!(response.await?, 2);
/// # Ok(()) }) }
/// ```
///
/// # Drop
/// Cancels the call, as that of a [`Call`].
#[must_use = "a request runs when its response is awaited"]
pub struct PoolResponse<R> {
    call: Call<R>,
    /// Until the item is handed in. After the call, which is cancelled first.
    reserved: Option<Reserved>,
}

impl<R: DeserializeOwned + 'static> Future for PoolResponse<R> {
    type Output = Result<R, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<R, Error>> {
        let result = Pin::new(&mut self.call).poll(cx);
        // A task that has used up its turn has handed nothing in.
        if result.is_ready() || self.call.has_begun() {
            self.reserved = None;
        }
        result
    }
}
