//! Runs preload functions in the fork server.
#![forbid(unsafe_code)]

use super::entry::Call;
use super::executor::{Executor, outside_runtime};
use super::outcome::Outcome;
use super::panics;
use super::protocol::{self, Answer, Preparation, Ready};
use crate::error::{Error, ErrorKind, PanicInfo, Result, Topic};
use crate::os::spawn;
use crate::os::sync::lock;
use crate::wire::{self, Parcel};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

/// The socket to the starter of this process, while preload functions run.
static STARTER: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// Reports a panic that ends this process (`panic = "abort"`) to the starter. Called by the panic hook.
fn report_panic(panic: &PanicInfo) {
    let Ok(starter) = STARTER.try_lock() else { return };
    if let Some(starter) = &*starter {
        let error = preload_failed(Error::new(ErrorKind::Panicked, panic.message()).with_panic(panic.clone()));
        // The starter may be gone.
        let _ = protocol::send(starter.as_fd(), &Answer::<Ready>::Err(error), &[], &[]);
    }
}

fn preload_failed(error: Error) -> Error {
    let why = format!("a preload function failed: {}", error.text());
    Error::new(ErrorKind::Spawn, why).explained_by(Topic::PreloadFailed).with_source(error)
}

/// Receives the next preload function after those that came with the role; `None` when the starter asks to serve.
pub(super) fn next_preload(starter: BorrowedFd<'_>) -> io::Result<Option<Call>> {
    match protocol::recv::<Preparation>(starter)? {
        Some((Preparation::Preload(call), _)) => Ok(Some(call)),
        Some((Preparation::Serve, _)) => Ok(None),
        None => spawn::exit_now(0), // The starter has given up this server before it had a child.
    }
}

/// Runs preload functions. A panic that ends this process is reported to the starter.
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
