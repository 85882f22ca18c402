//! State of a worker: made in each worker by a function, lent to the tasks that ask for it.
//!
//! The state stays in its worker's process ([`worker_state`]), so a death takes it along and nothing of it is left to repair. A task gets it
//! by `&mut` while it runs, one at a time.
//!
//! # Death
//! | killed | what follows | test (`tests/pool_pieces.rs`, `state`) |
//! |---|---|---|
//! | making the state, or before that is reported | as by an initializer: the pool is broken, with that reason | `killed_while_the_state_is_made_the_pool_is_broken` |
//! | a task has the state, or has just given it back | the item is `ProcessDied`, or is tried again with the state of another worker; nothing is dropped | `killed_at_any_step_of_a_task_with_state_the_next_has_a_new_one` |
//! | dropping the state | the pool ends all the same | `killed_while_it_drops_the_state_the_worker_has_ended` |
//!
//! # Cancel
//! | dropped | what follows | test |
//! |---|---|---|
//! | a call | its task runs to its end, or has not begun; after its grace the worker is killed, with its state | `ten_thousand_dropped_calls_leave_the_state_whole` |

use super::config::PoolBuilder;
use super::handle::{AsyncResult, Call, Map, MapAsync, Results};
use super::pool::Pool;
use super::worker_state;
use crate::error::{Error, Result};
use crate::process::Function;
use crate::process::entry::Executor;
use crate::process::function::{Arguments, Callable, captures_nothing, up_to_eleven};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::marker::PhantomData;
use std::ops::Deref;

/// A function that makes the state of a worker, as one that a worker can run.
#[doc(hidden)]
pub struct Making<F, S>(F, PhantomData<fn() -> S>);

/// A function that makes the state of a worker or fails, as one that a worker can run.
#[doc(hidden)]
pub struct TryMaking<F, S>(F, PhantomData<fn() -> S>);

/// A function that takes the state of its worker first, as one that a worker can run.
#[doc(hidden)]
pub struct WithWorkerState<F, S>(F, PhantomData<fn(&mut S)>);

impl<F: Copy, S> Clone for Making<F, S> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<F: Copy, S> Copy for Making<F, S> {}
impl<F: Copy, S> Clone for TryMaking<F, S> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<F: Copy, S> Copy for TryMaking<F, S> {}
impl<F: Copy, S> Clone for WithWorkerState<F, S> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<F: Copy, S> Copy for WithWorkerState<F, S> {}

/// Marks a function that makes state.
#[doc(hidden)]
pub struct MakesState<B>(B);

/// Marks a function that takes state.
#[doc(hidden)]
pub struct TakesState;

// A mistake in a user's function is not to list this.
#[diagnostic::do_not_recommend]
impl<F, S, A, B> Function<A, MakesState<B>> for Making<F, S>
where
    F: Callable<A, B, Returned = S> + Copy + Send + 'static,
    S: 'static,
{
    type Output = ();

    fn call(self, args: A, _: &mut Executor) -> Result<()> {
        let state = self.0.call_with(args);
        worker_state::set(Box::new(state));
        Ok(())
    }
}

#[diagnostic::do_not_recommend]
impl<F, S, A, B> Function<A, MakesState<B>> for TryMaking<F, S>
where
    F: Callable<A, B, Returned = Result<S>> + Copy + Send + 'static,
    S: 'static,
{
    type Output = ();

    fn call(self, args: A, _: &mut Executor) -> Result<()> {
        let state = self.0.call_with(args)?;
        worker_state::set(Box::new(state));
        Ok(())
    }
}

/// A function that can be called with the state of a worker and these arguments: a `fn(&mut S, A, ..) -> R`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be called with the state `{S}` of a worker and `{Args}`",
    label = "does not take `&mut {S}` and then `{Args}`",
    note = "it must be a plain `fn`, or a closure that captures nothing, that takes the state by `&mut` first and then at most 11 arguments, passed as one tuple: `(a, b)`, `(a,)` or `()`"
)]
pub trait StateFunction<S, Args>: Copy + Send + 'static {
    /// Its result.
    type Output: Serialize + DeserializeOwned + Send + 'static;

    #[doc(hidden)]
    fn call_with_state(self, state: &mut S, args: Args) -> Self::Output;
}

macro_rules! state_function {
    ($($arg:ident)*) => {
        #[diagnostic::do_not_recommend]
        impl<F, S, R, $($arg),*> StateFunction<S, ($($arg,)*)> for F
        where
            F: Fn(&mut S, $($arg),*) -> R + Copy + Send + 'static,
            R: Serialize + DeserializeOwned + Send + 'static,
        {
            type Output = R;

            #[inline]
            #[allow(non_snake_case)]
            fn call_with_state(self, state: &mut S, ($($arg,)*): ($($arg,)*)) -> R {
                self(state, $($arg),*)
            }
        }
    };
}

up_to_eleven!(state_function);

// A mistake in a user's function is not to list this.
#[diagnostic::do_not_recommend]
impl<F, S, A> Function<A, TakesState> for WithWorkerState<F, S>
where
    F: StateFunction<S, A>,
    S: 'static,
{
    type Output = F::Output;

    #[inline]
    fn call(self, args: A, _: &mut Executor) -> Result<F::Output> {
        worker_state::lend(|state| match state.and_then(|state| state.downcast_mut::<S>()) {
            Some(state) => Ok(self.0.call_with_state(state, args)),
            None => Err(Error::other(format!("this worker has no state of type {}", std::any::type_name::<S>()))),
        })
    }
}

impl PoolBuilder {
    /// Gives each worker a state, made by `f(args..)` first. Functions called through [`with_state`](StatePool::with_state) get it
    /// by `&mut`.
    ///
    /// The state can be a connection, a model or a cache. It need not be a serde value, as it stays in its worker. This is the last
    /// option of a builder: set the others before it.
    ///
    /// - The state is the result of `f`, also if that is a `Result`. For a function that may fail use [`try_state`](Self::try_state).
    /// - If `f` panics, the pool is [`broken`](Pool::broken), as with an [`initializer`](Self::initializer). A pool cannot have both.
    ///   The [`initializer_timeout`](Self::initializer_timeout) applies to `f`.
    /// - The state is dropped when its worker exits normally, after the [`finalizer`](Self::finalizer), and not in a worker that is killed.
    /// - A task that panics leaves the state as it was at the panic to the next task.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// use std::collections::HashMap;
    ///
    /// struct Cache {
    ///     squares: HashMap<u64, u64>,
    /// }
    ///
    /// fn open(room: usize) -> Cache {
    ///     Cache { squares: HashMap::with_capacity(room) }
    /// }
    ///
    /// fn square(cache: &mut Cache, n: u64) -> u64 {
    ///     *cache.squares.entry(n).or_insert_with(|| n * n)
    /// }
    ///
    /// fn main() -> mp::Result<()> {
    ///     mp::run(async {
    ///         let pool = Pool::builder().workers(2).state(open, (100,)).build()?;
    ///         assert_eq!(pool.with_state().apply(square, (7,)).await?, 49);
    ///         assert_eq!(pool.with_state().map(square, [1, 2, 3]).await?, [1, 4, 9]);
    ///         assert_eq!(pool.apply(|n: u64| n + 1, (1,)).await?, 2); // Others run there too.
    ///         Ok(())
    ///     })
    /// }
    /// ```
    ///
    /// A task for another state does not compile:
    ///
    /// ```compile_fail
    /// # use multiprocess::{self as mp, Pool};
    /// # async fn wrong() -> mp::Result<()> {
    /// let pool = Pool::builder().state(|| String::new(), ()).build()?;
    /// pool.with_state().apply(|numbers: &mut Vec<u64>| numbers.len(), ()).await?;
    /// # Ok(()) }
    /// ```
    pub fn state<F, A, B>(self, f: F, args: A) -> StatePoolBuilder<F::Returned>
    where
        F: Callable<A, B> + Copy + Send + 'static,
        F::Returned: 'static,
        A: Arguments,
        B: 'static,
    {
        const { captures_nothing::<F>() };
        let is_taken = self.has_initializer();
        let builder = self.initializer::<_, A, MakesState<B>>(Making::<F, F::Returned>(f, PhantomData), args);
        StatePoolBuilder { builder, is_taken, state: PhantomData }
    }

    /// Gives each worker a state, made by a function that may fail: tasks get the value of its `Ok`. If it returns `Err`, the pool is
    /// [`broken`](Pool::broken), and all calls fail with that reason. Apart from that it behaves as [`state`](Self::state).
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// fn connect(port: u16) -> mp::Result<Vec<u16>> {
    ///     if port == 0 { Err(mp::Error::other("no such port")) } else { Ok(vec![port]) }
    /// }
    /// fn first(connection: &mut Vec<u16>) -> u16 {
    ///     connection[0]
    /// }
    /// let pool = Pool::builder().workers(1).try_state(connect, (80,)).build()?;
    /// assert_eq!(pool.with_state().apply(first, ()).await?, 80);
    /// let pool = Pool::builder().workers(1).try_state(connect, (0,)).build()?;
    /// let error = pool.with_state().apply(first, ()).await.unwrap_err();
    /// assert!(error.to_string().contains("no such port"), "{error}");
    /// # Ok(()) }) }
    /// ```
    pub fn try_state<F, S, A, B>(self, f: F, args: A) -> StatePoolBuilder<S>
    where
        F: Callable<A, B, Returned = Result<S>> + Copy + Send + 'static,
        S: 'static,
        A: Arguments,
        B: 'static,
    {
        const { captures_nothing::<F>() };
        let is_taken = self.has_initializer();
        let builder = self.initializer::<_, A, MakesState<B>>(TryMaking::<F, S>(f, PhantomData), args);
        StatePoolBuilder { builder, is_taken, state: PhantomData }
    }
}

/// The options of a pool whose workers have a state; made by [`PoolBuilder::state`].
#[must_use = "a pool starts when it is built"]
pub struct StatePoolBuilder<S> {
    builder: PoolBuilder,
    /// There was an initializer.
    is_taken: bool,
    state: PhantomData<fn() -> S>,
}

impl<S: 'static> StatePoolBuilder<S> {
    /// Starts the pool; see [`PoolBuilder::build`].
    ///
    /// # Errors
    /// As [`PoolBuilder::build`], and `Other` if there is an initializer too.
    pub fn build(self) -> Result<StatePool<S>> {
        if self.is_taken {
            let why = "a pool has an initializer or a state: have the function that makes the state do what the initializer does";
            return Err(Error::other(why));
        }
        Ok(StatePool { pool: self.builder.build()?, state: PhantomData })
    }
}

/// A [`Pool`] whose workers each have a state of type `S`; made by [`PoolBuilder::state`]. It derefs to the pool.
///
/// Use instead:
/// - [`Pool::checkout`](crate::Pool::checkout) for several calls that must run on the same worker;
/// - [`preload`](crate::preload) or an [`Array`](crate::Array) for data that all workers read.
pub struct StatePool<S> {
    pool: Pool,
    state: PhantomData<fn() -> S>,
}

impl<S> Clone for StatePool<S> {
    fn clone(&self) -> Self {
        Self { pool: self.pool.clone(), state: PhantomData }
    }
}

impl<S> std::fmt::Debug for StatePool<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.pool.fmt(f)
    }
}

impl<S> Deref for StatePool<S> {
    type Target = Pool;

    fn deref(&self) -> &Pool {
        &self.pool
    }
}

impl<S: 'static> StatePool<S> {
    /// Returns the calls of the pool for functions that take the state of their worker first, by `&mut`.
    pub fn with_state(&self) -> WithState<'_, S> {
        WithState { pool: &self.pool, state: PhantomData }
    }
}

/// The calls of a [`StatePool`] for functions that take the state of their worker first; made by [`StatePool::with_state`].
///
/// The functions are synchronous: an async function cannot hold the state while it waits. The calls and streams have all options of
/// the pool's own.
pub struct WithState<'a, S> {
    pool: &'a Pool,
    state: PhantomData<fn() -> S>,
}

impl<S: 'static> WithState<'_, S> {
    /// Runs `g(&mut state, args..)` on a worker when awaited, as [`Pool::apply`].
    ///
    /// # Errors
    /// When awaited, as [`Pool::apply`].
    pub fn apply<G, A>(&self, g: G, args: A) -> Call<G::Output>
    where
        G: StateFunction<S, A>,
        A: Arguments,
    {
        const { captures_nothing::<G>() };
        self.pool.apply::<_, A, TakesState>(WithWorkerState::<G, S>(g, PhantomData), args)
    }

    /// Starts `g(&mut state, args..)` on a worker now, as [`Pool::apply_async`].
    ///
    /// # Errors
    /// When awaited, as [`Pool::apply`].
    pub fn apply_async<G, A>(&self, g: G, args: A) -> AsyncResult<G::Output>
    where
        G: StateFunction<S, A>,
        A: Arguments,
    {
        const { captures_nothing::<G>() };
        self.pool.apply_async::<_, A, TakesState>(WithWorkerState::<G, S>(g, PhantomData), args)
    }

    /// Starts `g(&mut state, args..)` on a worker now if the pool has room, as [`Pool::try_apply`].
    ///
    /// # Errors
    /// As [`Pool::try_apply`].
    pub fn try_apply<G, A>(&self, g: G, args: A) -> Result<AsyncResult<G::Output>>
    where
        G: StateFunction<S, A>,
        A: Arguments,
    {
        const { captures_nothing::<G>() };
        self.pool.try_apply::<_, A, TakesState>(WithWorkerState::<G, S>(g, PhantomData), args)
    }

    /// Runs `g(&mut state, item)` for each item when awaited, as [`Pool::map`].
    ///
    /// # Errors
    /// When awaited, as [`Pool::map`].
    pub fn map<G, T, I>(&self, g: G, items: I) -> Map<G::Output>
    where
        G: StateFunction<S, (T,)>,
        T: Arguments,
        I: IntoIterator<Item = T>,
        I::IntoIter: Send + 'static,
    {
        const { captures_nothing::<G>() };
        self.pool.map::<_, T, TakesState, I>(WithWorkerState::<G, S>(g, PhantomData), items)
    }

    /// Runs `g(&mut state, item..)` for each tuple when awaited, as [`Pool::starmap`].
    ///
    /// # Errors
    /// When awaited, as [`Pool::starmap`].
    pub fn starmap<G, A, I>(&self, g: G, items: I) -> Map<G::Output>
    where
        G: StateFunction<S, A>,
        A: Arguments,
        I: IntoIterator<Item = A>,
        I::IntoIter: Send + 'static,
    {
        const { captures_nothing::<G>() };
        self.pool.starmap::<_, A, TakesState, I>(WithWorkerState::<G, S>(g, PhantomData), items)
    }

    /// Starts `g(&mut state, item)` for each item now, as [`Pool::map_async`].
    ///
    /// # Errors
    /// When awaited, as [`Pool::map_async`].
    pub fn map_async<G, T, I>(&self, g: G, items: I) -> MapAsync<G::Output>
    where
        G: StateFunction<S, (T,)>,
        G::Output: Unpin,
        T: Arguments,
        I: IntoIterator<Item = T>,
        I::IntoIter: Send + 'static,
    {
        const { captures_nothing::<G>() };
        self.pool.map_async::<_, T, TakesState, I>(WithWorkerState::<G, S>(g, PhantomData), items)
    }

    /// Runs `g(&mut state, item)` for each item and returns the results as a stream, in order, as [`Pool::imap`].
    ///
    /// # Errors
    /// As [`Pool::imap`].
    pub fn imap<G, T, I>(&self, g: G, items: I) -> Results<G::Output>
    where
        G: StateFunction<S, (T,)>,
        T: Arguments,
        I: IntoIterator<Item = T>,
        I::IntoIter: Send + 'static,
    {
        const { captures_nothing::<G>() };
        self.pool.imap::<_, T, TakesState, I>(WithWorkerState::<G, S>(g, PhantomData), items)
    }

    /// Runs `g(&mut state, item)` for each item and returns the results as a stream, in any order, as
    /// [`Pool::imap_unordered`].
    ///
    /// # Errors
    /// As [`Pool::imap_unordered`].
    pub fn imap_unordered<G, T, I>(&self, g: G, items: I) -> Results<G::Output>
    where
        G: StateFunction<S, (T,)>,
        T: Arguments,
        I: IntoIterator<Item = T>,
        I::IntoIter: Send + 'static,
    {
        const { captures_nothing::<G>() };
        self.pool.imap_unordered::<_, T, TakesState, I>(WithWorkerState::<G, S>(g, PhantomData), items)
    }
}
