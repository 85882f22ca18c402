//! What a loop waits for that may not be there.

use std::time::Instant;
use tokio::task::JoinHandle;
use tokio::time::sleep_until;

/// What a task has come to, of which there may be one.
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
