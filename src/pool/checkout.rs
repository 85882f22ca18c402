//! A worker that is checked out of its pool for a run of calls.

use super::engine::PoolLifetime;
use super::flight::OpenCall;
use super::handle::Call;
use crate::error::Result;
use crate::os::fork;
use crate::process::Function;
use crate::process::function::{Arguments, captures_nothing};
use std::sync::Arc;

/// A worker that only this value uses; made by [`Pool::checkout`](crate::Pool::checkout).
///
/// Use [`PoolBuilder::state`](crate::PoolBuilder::state) instead for a connection or a cache that every worker has: it keeps no worker to itself.
///
/// Dropping it gives the worker back to the pool, with the state that its calls have left in it. A call that has not reached the worker by then fails with kind `ProcessDied`.
pub struct Checkout {
    pool: Arc<PoolLifetime>,
    number: u64,
    /// Its calls go on after a `close`.
    _ticket: OpenCall,
}

impl Checkout {
    pub(super) async fn take(pool: Arc<PoolLifetime>) -> Result<Self> {
        let ticket = OpenCall::of(&pool, 0)?;
        let number = pool.shared().new_checkout();
        // Made first: a drop of this future then gives the worker back.
        let checkout = Self { pool, number, _ticket: ticket };
        Call::of(checkout.pool.clone(), || (), ()).checked_out(number, true).await?;
        Ok(checkout)
    }

    /// Runs `f(args..)` on this worker when awaited. Dropping the call cancels it.
    ///
    /// # Errors
    /// As [`Pool::apply`](crate::Pool::apply), and `ProcessDied` for each call after the worker has ended.
    pub fn apply<F, A, M>(&self, f: F, args: A) -> Call<F::Output>
    where
        F: Function<A, M>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        Call::of(self.pool.clone(), f, args).checked_out(self.number, false)
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        if !fork::is_forked() {
            self.pool.shared().release(self.number);
        }
    }
}

impl std::fmt::Debug for Checkout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkout").finish_non_exhaustive()
    }
}
