//! Waiting for a future that may be absent.

use std::time::Instant;
use tokio::task::JoinHandle;
use tokio::time::sleep_until;

/// Resolves to the outcome of a task, if there is one.
pub(super) async fn finished<T>(task: &mut Option<JoinHandle<T>>) -> Option<T> {
    let outcome = match task {
        Some(task) => task.await.ok(),
        None => std::future::pending().await,
    };
    *task = None;
    outcome
}

/// An instant, if there is one to wait for.
pub(super) async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}
