//! The four large examples, run as they are while parts of them are killed: the service `thumbnails`, `log_aggregator`, `crawler` and
//! `sweep`.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

#[path = "../../../../tests/programs/mod.rs"]
mod programs;

mod crawler;
mod log_aggregator;
mod sweep;
mod thumbnails;

use programs::processes;
use rustix::process::{Pid, Signal, kill_process};
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// A path that no other test uses.
fn temporary(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", std::process::id()));
    _ = std::fs::remove_file(&path);
    path
}

/// A program that is killed when its test fails.
struct Program(Option<Child>);

impl Program {
    fn start<'a>(name: &str, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        Self(Some(programs::start(&programs::example(name), arguments)))
    }

    fn child(&mut self) -> &mut Child {
        self.0.as_mut().unwrap()
    }

    fn workers(&self) -> Vec<Pid> {
        processes(self.0.as_ref().unwrap(), "PoolWorker")
    }

    /// Kills one of its workers, a different one each time. False if there is none, or it has just ended by itself.
    fn kill_a_worker(&self, nth: usize) -> bool {
        let workers = self.workers();
        workers.get(nth % workers.len().max(1)).is_some_and(|worker| kill_process(*worker, Signal::KILL).is_ok())
    }

    /// Waits for its end, which is a good one, and returns its output.
    fn finish(mut self) -> String {
        let output = programs::finish(self.0.take().unwrap(), DEADLINE);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {stderr}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // Its children end with it.
            _ = child.kill();
            _ = child.wait();
        }
    }
}

/// A value of a process's status, in KiB.
fn status(pid: Pid, key: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_pid())).ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(key))?;
    value.trim_matches([':', ' ', '\t']).trim_end_matches(" kB").parse().ok()
}
