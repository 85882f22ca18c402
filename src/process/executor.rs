//! The runtime that async functions run on in a child.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use crate::os::{background, spawn};
use tokio_util::sync::CancellationToken;

/// The runtime that async functions run on. It is made for the first one, so that plain functions cost nothing, and
/// kept for the next.
#[doc(hidden)]
#[derive(Default)]
pub struct Executor {
    own: Option<tokio::runtime::Runtime>,
    /// A runtime that is there already, and the token that ends a wait in it.
    outer: Option<(tokio::runtime::Handle, CancellationToken)>,
}

impl Executor {
    /// An executor that drives async functions from a blocking thread of `runtime`, until they are cancelled.
    pub(super) fn inside(runtime: tokio::runtime::Handle, cancelled: CancellationToken) -> Self {
        Self { own: None, outer: Some((runtime, cancelled)) }
    }

    pub(super) fn run<R>(&mut self, future: impl Future<Output = R>) -> Result<R> {
        if let Some((runtime, cancelled)) = &self.outer {
            let value = runtime.block_on(cancelled.run_until_cancelled(future));
            return value.ok_or_else(|| Error::new(ErrorKind::Cancelled, "nobody waits for the task any more"));
        }
        Ok(self.runtime()?.block_on(future))
    }

    pub(super) fn has_runtime(&self) -> bool {
        self.own.is_some()
    }

    /// The current-thread runtime itself.
    pub(crate) fn runtime(&mut self) -> Result<&tokio::runtime::Runtime> {
        match &mut self.own {
            Some(runtime) => Ok(runtime),
            none => {
                let built = tokio::runtime::Builder::new_current_thread().enable_all().build();
                Ok(none.insert(built.map_err(|error| Error::io("cannot build a tokio runtime in the child", error))?))
            }
        }
    }
}

/// Runs `work` outside any runtime, as functions expect it. If this thread is inside one, because `init` was called in
/// `#[tokio::main]`, it starts a thread for `work`; the error is that of the thread.
pub(super) fn outside_runtime<R: Send>(work: impl FnOnce() -> R + Send) -> std::io::Result<R> {
    if !is_inside_runtime() {
        return Ok(work());
    }
    std::thread::scope(|scope| {
        // With the name and the stack size of the main thread, which it replaces.
        let builder = std::thread::Builder::new().name("main".into()).stack_size(spawn::main_stack());
        let thread = background::spawn_scoped(scope, builder, work)?;
        Ok(thread.join().unwrap_or_else(|payload| std::panic::resume_unwind(payload)))
    })
}

pub(super) fn is_inside_runtime() -> bool {
    tokio::runtime::Handle::try_current().is_ok()
}
