//! A process that is waited for until it has ended, with the result of its function: a child of a group, or a supervised one.
#![forbid(unsafe_code)]

use super::info::ProcessInfo;
use super::process::Process;
use crate::error::{Error, ErrorKind, Result};
use crate::os::{reactor, timer};
use serde::de::DeserializeOwned;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// A future of the result, which is ready when the process has ended. Dropping it kills the process if that is to be killed on drop.
///
/// A process that cannot be watched for a time, as no memory or descriptor is left, is not given up: it is waited for again after a
/// pause.
pub(crate) struct Ending<R> {
    process: Process<R>,
    result: Option<Result<R>>,
    /// A failure to receive the result, and a pause until it is tried again.
    failed: Option<Error>,
    pause: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// Until a process that could not be watched is waited for again.
const PAUSE: Duration = Duration::from_millis(20);

impl<R> Unpin for Ending<R> {}

impl<R> Ending<R> {
    pub(crate) fn of(process: Process<R>) -> Self {
        Self { process, result: None, failed: None, pause: None }
    }

    pub(crate) fn process(&self) -> &Process<R> {
        &self.process
    }

    pub(super) fn into_process(self) -> Process<R> {
        self.process
    }

    /// Returns `true` if this keeps it from being waited for now, and need not later: it cannot be watched for want of memory or of a
    /// descriptor. The first such failure is tried again in any case, later ones as long as it runs.
    fn is_passing(&self, error: &Error) -> bool {
        let again = self.failed.is_none() || self.process.is_alive();
        error.kind() == ErrorKind::Io && again && reactor::has_timer().is_ok()
    }
}

impl<R: DeserializeOwned + 'static> Future for Ending<R> {
    type Output = (ProcessInfo, Result<R>);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            if self.result.is_none() {
                let result = ready!(Pin::new(&mut self.process).poll(cx));
                if result.as_ref().is_err_and(|error| self.is_passing(error)) {
                    self.failed = self.failed.take().or(result.err());
                    self.pause = Some(Box::pin(timer::sleep(PAUSE)));
                    continue;
                }
                self.result = Some(match (result, self.failed.take()) {
                    // A result that could not be received is not there the second time.
                    (Err(error), Some(failed)) if error.kind() == ErrorKind::Other => Err(failed),
                    (result, _) => result,
                });
            }
            // One that goes on after its result would be killed when it is dropped. A lost exit status is no matter here.
            let waited = ready!(pin!(self.process.wait()).poll(cx));
            match waited {
                Err(error) if self.is_passing(&error) => self.pause = Some(Box::pin(timer::sleep(PAUSE))),
                _ => break,
            }
        }
        let info = self.process.info().clone();
        match self.result.take() {
            Some(result) => Poll::Ready((info, result)),
            None => Poll::Pending,
        }
    }
}
