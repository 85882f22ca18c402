//! The loop that a worker runs: on its main thread, one item at a time.

use super::protocol::{Batch, Report, Task};
use crate::channel::{Receiver, Sender};
use crate::error::Result;
use crate::process::entry::{Executor, Outcome};
use crate::wire::Sealed;

/// Runs batches until the parent closes the pipe. The first report is the initializer's, if there is one.
pub(super) fn work(mut batches: Receiver<Batch>, mut reports: Sender<Report>, initializer: Option<Task>) -> Result<()> {
    let mut executor = Executor::default();
    if let Some(Task { call, arguments }) = initializer {
        let outcome = call.run(arguments.open()?, &mut executor);
        reports.blocking_send(report(&outcome))?;
    }
    // An error is the end of the pipe, or a batch of another build: either way there is no next one.
    while let Ok(Batch { call, items }) = batches.blocking_recv() {
        for item in items {
            let outcome = match item.open() {
                Ok(arguments) => call.run(arguments, &mut executor),
                Err(error) => Outcome::error(error),
            };
            reports.blocking_send(report(&outcome))?;
        }
    }
    Ok(())
}

fn report(outcome: &Outcome) -> Report {
    Sealed::new(outcome.parts().concat(), outcome.attachments().to_vec())
}
