//! Runs preload functions in the fork server.
#![forbid(unsafe_code)]

use super::entry::Call;
use super::executor::{Executor, outside_runtime};
use super::outcome::Outcome;
use super::panics;
use super::protocol::{self, Answer, Preparation, Ready};
use crate::error::{Error, ErrorKind, PanicInfo, Result};
use crate::os::spawn;
use crate::os::sync::lock;
use crate::wire::{self, Parcel};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

/// Who started this process, while it runs what was preloaded.
static STARTER: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// Tells the starter of a panic in a preload that ends this process (`panic = "abort"`), as the panic hook sees it.
fn report_panic(panic: &PanicInfo) {
    let Ok(starter) = STARTER.try_lock() else { return };
    if let Some(starter) = &*starter {
        let error = preload_failed(Error::new(ErrorKind::Panicked, panic.message()).with_panic(panic.clone()));
        // Nobody needs to know if the starter is gone.
        let _ = protocol::send(starter.as_fd(), &Answer::<Ready>::Err(error), &[], &[]);
    }
}

fn preload_failed(error: Error) -> Error {
    Error::new(ErrorKind::Spawn, format!("a preload function failed: {error}")).with_source(error)
}

/// What the starter has to preload beyond that which came with the role, as it comes; `None` when it wants children.
pub(super) fn next_preload(starter: BorrowedFd<'_>) -> io::Result<Option<Call>> {
    match protocol::recv::<Preparation>(starter)? {
        Some((Preparation::Preload(call), _)) => Ok(Some(call)),
        Some((Preparation::Serve, _)) => Ok(None),
        None => spawn::exit_now(0), // It has let go of this server before it had a child.
    }
}

/// Runs what is preloaded; a panic that ends this process is told to the starter.
pub(super) fn run_for(starter: BorrowedFd<'_>, preload: &[Call]) -> Result<()> {
    if preload.is_empty() {
        return Ok(());
    }
    *lock(&STARTER) = starter.try_clone_to_owned().ok();
    panics::on_fatal_panic(report_panic);
    let done = outside_runtime(|| run_preloads(preload));
    *lock(&STARTER) = None;
    done.map_err(|error| protocol::spawn_error("the fork server cannot start", error))?
}

fn run_preloads(preload: &[Call]) -> Result<()> {
    for call in preload {
        let mut executor = Executor::default();
        let nothing = wire::encode(&())?.payload(&()).to_vec();
        let outcome = call.run(Parcel { bytes: nothing, fds: Vec::new() }, &mut executor);
        Outcome::read::<()>(Parcel { bytes: outcome.parts().concat(), fds: Vec::new() }).map_err(preload_failed)?;
    }
    Ok(())
}
