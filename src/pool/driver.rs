//! The driver: the one task of a pool. It starts workers, waits for their exits and keeps deadlines.
//!
//! It sleeps as long as there is nothing of this to do. Results do not pass through it.

use super::call_items::submitter;
use super::engine::Shared;
use super::protocol::{Conditions, Contract};
use super::scheduler::{Circumstances, Spawn, worker_name};
use super::worker;
use crate::channel::{self, lane};
use crate::error::{Error, Result, Topic};
use crate::os::{background, fork, memory, socket, timer};
use crate::process::{self, Cause, Process, Stdio, entry};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rustix::process::Signal;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use tokio::net::unix::pipe;

/// However the driver ends, no caller waits for ever.
struct Driving {
    shared: Arc<Shared>,
    is_over: bool,
}

impl Drop for Driving {
    fn drop(&mut self) {
        if !fork::is_forked() {
            self.shared.abandon(self.is_over);
        }
    }
}

impl Driving {
    async fn run(mut self) {
        run(&self.shared).await;
        self.is_over = true;
    }
}

/// The task itself. It may be dropped before it was ever polled: that ends it as well.
pub(super) fn drive(shared: Arc<Shared>) -> impl Future<Output = ()> + Send {
    Driving { shared, is_over: false }.run()
}

async fn run(shared: &Arc<Shared>) {
    let mut exits = FuturesUnordered::new();
    let mut starved = memory::oom_kills();
    // Until then nobody is spawned, as each start would keep this thread; deadlines and ends are looked after meanwhile.
    let (mut spawns, mut may_spawn) = (Vec::new(), !process::must_preload());
    let mut preloaded = std::pin::pin!(process::preloaded());
    loop {
        let step = shared.step();
        for (seat, generation, report) in step.begun {
            let read = shared.config.read_initialized;
            // The value is of the user's type.
            let outcome = entry::catch_panic(|| report.and_then(|report| read(report.open()?)));
            shared.initialized(seat, generation, outcome);
        }
        if !step.unfetched.is_empty() {
            // Not here, if there is a thread for it: a large one would hold up the deadlines.
            let theirs = step.unfetched.clone();
            if background::blocking(move || theirs.iter().for_each(|results| results.fetch())).is_err() {
                step.unfetched.iter().for_each(|results| results.fetch());
            }
        }
        spawns.extend(step.spawns);
        if step.is_unneeded {
            // A preload may take its time.
            spawns.drain(..).for_each(|spawn: Spawn| shared.spawn_failed(&spawn, &Error::closed("pool")));
        }
        for spawn in if may_spawn { std::mem::take(&mut spawns) } else { Vec::new() } {
            match start(shared, &spawn) {
                Ok(process) => exits.push(end_of(spawn, process, shared.config.stderr_lines)),
                Err(error) => shared.spawn_failed(&spawn, &with_need(error)),
            }
        }
        if step.is_over && exits.is_empty() && spawns.is_empty() {
            return;
        }
        let alarm = async {
            match step.until {
                Some(until) => timer::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            Some((seat, generation, status, last_words, cause)) = exits.next() => {
                let is_kill = status.as_ref().is_ok_and(|status| status.signal() == Some(Signal::KILL.as_raw()));
                let was_starved = is_kill && std::mem::replace(&mut starved, memory::oom_kills()) < starved;
                shared.exited(seat, generation, &status, Circumstances { was_starved, last_words, cause });
                // The caller that waited for it goes first, then the work of a replacement.
                tokio::task::yield_now().await;
            }
            done = &mut preloaded, if !may_spawn => {
                may_spawn = true;
                if let Err(error) = done {
                    spawns.drain(..).for_each(|spawn| shared.spawn_failed(&spawn, &error));
                }
            }
            () = shared.nudge.notified() => {}
            () = alarm => {}
        }
    }
}

/// Waits for a worker's end; meanwhile copies its piped stderr to ours, and keeps the last `lines` of it.
async fn end_of(
    spawn: Spawn,
    mut process: Process<Result<()>>,
    lines: usize,
) -> (usize, u64, Result<ExitStatus>, Option<String>, Option<Cause>) {
    let pipe = process.take_stderr().and_then(|pipe| pipe::Receiver::from_owned_fd(pipe.into()).ok());
    let Some(pipe) = pipe else {
        let status = process.wait().await;
        return (spawn.seat, spawn.generation, status, None, process.cause());
    };
    let mut tail = Tail::default();
    let status = {
        let mut exit = std::pin::pin!(process.wait());
        loop {
            tokio::select! {
                status = &mut exit => break status,
                ready = pipe.readable() => {
                    if ready.is_err() || !tail.take_in(&pipe, TURN, &mut std::io::stderr()) {
                        break exit.await;
                    }
                    // A worker that writes without a break delays neither deadlines nor other workers.
                    tokio::task::yield_now().await;
                }
            }
        }
    };
    // Everything that it wrote before its end is there. Processes that inherited its stderr may write on, unread.
    tail.take_in(&pipe, LARGEST_PIPE, &mut std::io::stderr());
    (spawn.seat, spawn.generation, status, tail.last(lines), process.cause())
}

/// The end of a worker's stderr.
#[derive(Default)]
struct Tail(Vec<u8>);

/// How much of a worker's stderr an error may quote.
const TAIL: usize = 4096;
/// So much of a stderr is copied in one go: the default capacity of a pipe.
const TURN: usize = 64 << 10;
const LARGEST_PIPE: usize = 1 << 20;

impl Tail {
    /// Copies to `ours` about `most` of the bytes that are there; false at the end of the pipe.
    fn take_in(&mut self, pipe: &pipe::Receiver, most: usize, ours: &mut impl Write) -> bool {
        let (mut bytes, mut taken) = ([0; TAIL], 0);
        while taken < most {
            match pipe.try_read(&mut bytes) {
                Ok(0) => return false,
                Ok(count) => {
                    taken += count;
                    let said = bytes.get(..count).unwrap_or_default();
                    // Without a stderr of our own there is no place for it.
                    let _ = ours.write_all(said);
                    self.0.extend_from_slice(said);
                    self.0.drain(..self.0.len().saturating_sub(TAIL));
                }
                Err(error) => return error.kind() == std::io::ErrorKind::WouldBlock,
            }
        }
        true
    }

    fn last(&self, lines: usize) -> Option<String> {
        let text = String::from_utf8_lossy(&self.0);
        let all: Vec<_> = text.trim_end().lines().collect();
        let last = all.get(all.len().saturating_sub(lines)..)?.join("\n");
        Some(last).filter(|last| !last.is_empty())
    }
}

/// How many descriptors a worker takes in this process.
const DESCRIPTORS_OF_A_WORKER: usize = 7;

/// Adds to the error of a start how many descriptors there may be and how many are needed, if there are too few.
fn with_need(error: Error) -> Error {
    if error.topic() != Some(Topic::TooManyDescriptors) {
        return error;
    }
    let (why, limit) = (error.text(), socket::descriptor_limit());
    let text = format!(
        "{why}; each worker of a pool takes {DESCRIPTORS_OF_A_WORKER} descriptors of its process, which may have {limit} \
         (RLIMIT_NOFILE)"
    );
    Error::new(error.kind(), text).explained_by(Topic::TooManyDescriptors).with_source(error)
}

fn start(shared: &Shared, spawn: &Spawn) -> Result<Process<Result<()>>> {
    let (lane, theirs) = lane::create(&shared.board, spawn.seat)
        .map_err(|error| Error::io("cannot create the lane of a worker", error))?;
    let (orders, worker_orders) = channel::simplex()?;
    let (worker_results, results) = channel::simplex()?;
    let name = worker_name(spawn.seat);
    let config = &shared.config;
    let contract = Contract {
        lane: theirs,
        orders: worker_orders,
        results: worker_results,
        initializer: config.initializer.clone(),
        finalizer: config.finalizer.clone(),
        submitter: submitter(),
        conditions: Conditions {
            cpu: config.cpus.get(spawn.seat % config.cpus.len().max(1)).copied(),
            ..config.conditions.clone()
        },
    };
    let mut builder =
        Process::<()>::builder().name(&name).daemon(true).shield_signals(true).start_method(config.start_method);
    // Tasks have a way of their own, and callers of their own.
    builder = builder.forward_tracing(false);
    if let Some(keep) = config.backtraces {
        builder = builder.backtraces(keep);
    }
    if config.stderr_lines > 0 {
        builder = builder.stderr(Stdio::piped());
    }
    for (key, value) in &config.variables {
        builder = builder.env(key, value);
    }
    let process = builder.spawn(worker::work, (contract,))?;
    let name = format!("{name} (pid {})", process.pid());
    shared.spawned(spawn, (name, process.pid()), Box::new(process.killer()), lane, (orders, results));
    Ok(process)
}

#[cfg(all(test, not(multiprocess_loom)))]
mod tests {
    use super::*;
    use std::io::PipeWriter;

    /// Goes on writing while it is read, as a worker on another CPU would.
    struct Endless(PipeWriter, usize);

    impl Write for Endless {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.1 += bytes.len();
            assert!(self.1 <= 2 * TURN, "it is read without an end");
            self.0.write_all(bytes)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_stderr_that_never_ends_lets_others_have_their_turns() {
        let (reader, writer) = std::io::pipe().unwrap();
        let reader = pipe::Receiver::from_owned_fd(reader.into()).unwrap();
        let (mut tail, mut writer) = (Tail::default(), Endless(writer, 0));
        writer.write_all(b"on and on\n").unwrap();
        reader.readable().await.unwrap();
        assert!(tail.take_in(&reader, TURN, &mut writer));
        assert_eq!(tail.last(1).as_deref(), Some("on and on"));
    }
}
