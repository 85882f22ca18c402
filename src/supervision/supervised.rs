//! The public type of a supervised child, and the task that keeps it up.
//!
//! # State
//! The task owns the processes, one after the other, each until it has ended. [`Shared`] has what its handle asks: the process that runs, and how many
//! there were before. The states go through a watch, which other processes can have.
//!
//! # Moves
//! | move | then |
//! |---|---|
//! | the process has ended, and is to be started again | a wait, then the next start |
//! | it has ended for good, or too often | the task ends with the result or the last causes |
//! | it is to be stopped | no further start: it is asked to end, and killed after the grace |
//! | the handle is dropped | the process is killed, and the task ends |
//!
//! # Invariants
//! 1. At most one process runs: the next one is started when the one before has ended.
//! 2. Whoever has asked to stop sees no further start: that is asked first, before each.
//!
//! # Death
//! | killed | what follows | test (`tests/pieces.rs`, `supervision`) |
//! |---|---|---|
//! | the child, at any moment | it is started again, as after any failure | `a_killed_child_is_started_again_and_others_can_watch`, `killed_at_any_step_of_its_start_the_child_is_started_again` |
//! | the supervising process | the child ends with it, is not started again, and its states are closed | `the_end_of_the_supervising_process_ends_the_child_and_closes_its_states` |
//!
//! # Cancel
//! | dropped | what follows | test |
//! |---|---|---|
//! | a `wait` | nothing has changed | `ten_thousand_dropped_waits_and_stops_lose_no_result` |
//! | a `stop` | the child is still being stopped | the same |
//! | the handle | the child is killed at once, and not started again, also if its runtime is not driven | `dropped_the_child_ends_and_is_not_started_again`, `dropped_while_its_runtime_stands_still_the_child_ends` |
//! | the runtime | the child is killed; a `wait` is `Cancelled` | `the_end_of_its_runtime_ends_the_child` |

use super::restart::{History, Restart};
use crate::channel::{WatchReceiver, WatchSender, watch};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::sync::lock;
use crate::os::{fork, reactor, timer};
use crate::process::function::{Arguments, Function, captures_nothing};
use crate::process::{Ending, Killer, Process, ProcessBuilder, Task, Work};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::future::poll_fn;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

impl ProcessBuilder {
    /// Returns a builder of a supervised child: it is started again whenever it fails, within limits, as by systemd or OTP.
    ///
    /// ```
    /// use multiprocess::{self as mp, Process, Restart, Value};
    /// use std::time::Duration;
    ///
    /// fn serve(starts: Value<u32>) -> u32 {
    ///     let start = starts.fetch_add(1) + 1;
    ///     assert!(start == 3, "not this time");
    ///     start
    /// }
    ///
    /// fn main() -> mp::Result<()> {
    ///     mp::run(async {
    ///         let again = Restart::on_failure().max(5, Duration::from_secs(60)).back_off(Duration::ZERO, Duration::ZERO);
    ///         let starts = Value::new(0)?;
    ///         let mut server = Process::builder().name("server").restart(again).spawn(serve, (starts,))?;
    ///         assert_eq!(server.wait().await?, 3);
    ///         assert_eq!(server.restarts(), 2);
    ///         Ok(())
    ///     })
    /// }
    /// ```
    pub fn restart(self, restart: Restart) -> SupervisedBuilder {
        SupervisedBuilder { process: self, restart }
    }
}

/// The options of a supervised child; made by [`ProcessBuilder::restart`].
#[derive(Debug)]
#[must_use = "nothing starts before `spawn`"]
pub struct SupervisedBuilder {
    process: ProcessBuilder,
    restart: Restart,
}

impl SupervisedBuilder {
    /// Starts the child, and a task of the current runtime that keeps it up.
    ///
    /// The arguments are encoded once, and each start gets a copy. Objects that they refer to exist as long as the supervision: the
    /// other end of a pipe, for example, is not closed when only the child ends. Standard streams can be inherited, `/dev/null` or a file,
    /// and not a pipe to this process, which would belong to one of the starts.
    ///
    /// # Errors
    /// - As [`Process::spawn`], if the first start fails.
    /// - `Other` outside a tokio runtime.
    /// - `Spawn` for a stream that is [`piped`](crate::Stdio::piped).
    /// - `Io` if the runtime has no timer or no I/O driver, or if no memory or descriptor is left.
    pub fn spawn<F, A, M>(self, f: F, args: A) -> Result<Supervised<F::Output>>
    where
        F: Function<A, M>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        let work = Task::of(f, args).into_work()?;
        let outside = |_| {
            let why = "a supervised process needs a tokio runtime around it (multiprocess::run makes one)";
            Error::other(why).explained_by(Topic::NoRuntime)
        };
        let runtime = Handle::try_current().map_err(outside)?;
        let undriven = |error| Error::io("a process cannot be supervised", error);
        reactor::has_timer().and_then(|()| reactor::has_io()).map_err(undriven)?;
        // Later starts are under the span of the first one.
        let options = self.process.kill_on_drop(true).named().traced_here();
        let first = options.again()?.start_work(&work)?;
        let name = first.name().to_string();
        let running = SupervisedState::Running { pid: first.pid(), restarts: 0 };
        let (sender, states) = watch(running)?;
        let shared = Arc::new(Shared { restarts: AtomicU64::new(0), running: Mutex::new(Some(Running::of(&first))) });
        let (stop, stopped) = tokio::sync::watch::channel(None);
        let supervision = Supervision { options, work, restart: self.restart, states: sender, shared: shared.clone() };
        let task = runtime.spawn(supervision.run(first, stopped));
        Ok(Supervised { task: Some(task), stop, states, shared, name, result: PhantomData })
    }
}

/// The state of a supervised child.
///
/// ```
/// use multiprocess::{self as mp, Process, Restart, SupervisedState};
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let mut child = Process::builder().restart(Restart::on_failure()).spawn(|| 1, ())?;
/// let mut states = child.states();
/// let ended = states.wait_for(|state| matches!(state, SupervisedState::Ended { .. })).await?;
/// assert_eq!(ended, SupervisedState::Ended { restarts: 0 });
/// assert_eq!(child.wait().await?, 1);
/// # Ok(()) }) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum SupervisedState {
    /// It runs.
    Running {
        /// The process id of this start.
        pid: u32,
        /// How often it was restarted before.
        restarts: u64,
    },
    /// It has ended, and is started again after a time.
    BackingOff {
        /// How often it was restarted before.
        restarts: u64,
        /// The time between its end and the next start.
        wait: Duration,
        /// Why it ended.
        cause: String,
    },
    /// It is not started again: its function has returned, or it was stopped.
    Ended {
        /// How often it was restarted.
        restarts: u64,
    },
    /// It failed too often, and is not started again.
    GaveUp {
        /// How often it was restarted.
        restarts: u64,
        /// Why it ended the last time.
        cause: String,
    },
}

struct Shared {
    restarts: AtomicU64,
    /// The process that runs.
    running: Mutex<Option<Running>>,
}

struct Running {
    pid: u32,
    killer: Killer,
}

impl Running {
    fn of<R>(process: &Process<R>) -> Self {
        Self { pid: process.pid(), killer: process.killer() }
    }
}

/// A child that is started again when it fails; made by [`ProcessBuilder::restart`].
///
/// Use [`Process`](crate::Process) instead for a child that runs once. A [`Pool`](crate::Pool) replaces its workers by itself.
///
/// # Details
/// - **Drop.** Dropping it kills the child (SIGKILL), which is not started again. [`stop`](Self::stop) asks it first.
/// - **Death.** When the supervising process ends in any way, the child is killed, as any child.
/// - **Cancel.** A dropped [`wait`](Self::wait) has changed nothing. A dropped [`stop`](Self::stop) has begun to stop the child.
/// - **Limits.** While this process has no descriptor left to watch the child with, the child runs on, and is checked every 20 ms. A start that
///   fails for want of a resource counts as a failure of the child.
pub struct Supervised<R> {
    task: Option<JoinHandle<Result<Option<R>>>>,
    stop: tokio::sync::watch::Sender<Option<Duration>>,
    states: WatchReceiver<SupervisedState>,
    shared: Arc<Shared>,
    name: String,
    result: PhantomData<fn() -> R>,
}

impl<R> Supervised<R> {
    /// Returns the name of the child: that of the builder, or `Process-` and a number.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the process id of the child; `None` while none runs.
    pub fn pid(&self) -> Option<u32> {
        lock(&self.shared.running).as_ref().map(|running| running.pid)
    }

    /// Returns how often the child was started again.
    pub fn restarts(&self) -> u64 {
        self.shared.restarts.load(Relaxed)
    }

    /// Returns the state of the child as the receiver of a [`watch`](crate::watch()), which can be sent to other processes.
    pub fn states(&self) -> WatchReceiver<SupervisedState> {
        self.states.clone()
    }

    /// Waits until the child has ended and is not started again, and returns the result of its function. The result is returned once.
    ///
    /// Cancel safe: dropping the future changes nothing.
    ///
    /// # Errors
    /// - `RestartLimit` if it failed too often. The message has the last causes, and `source()` is the last one.
    /// - `Cancelled` if it was stopped, or the runtime that it was started in has ended.
    /// - `Other` if the result was returned before, by `wait` or by [`stop`](Self::stop).
    ///
    /// With [`Restart::always`] it returns no result: it ends with one of these errors.
    pub async fn wait(&mut self) -> Result<R> {
        let result = self.join().await?;
        result.ok_or_else(|| Error::new(ErrorKind::Cancelled, format!("process {} was stopped", self.name)))
    }

    async fn join(&mut self) -> Result<Option<R>> {
        let Some(task) = &mut self.task else {
            let why = format!("the result of process {} was already taken", self.name);
            return Err(Error::other(why).explained_by(Topic::ResultTaken));
        };
        let joined = poll_fn(|cx| {
            // The task runs in the parent of a forked process.
            fork::check()?;
            Pin::new(&mut *task).poll(cx).map(Ok::<_, Error>)
        })
        .await?;
        self.task = None;
        joined.unwrap_or_else(|_| {
            let why = format!("the runtime that kept process {} up has ended", self.name);
            Err(Error::new(ErrorKind::Cancelled, why).explained_by(Topic::RuntimeEnded))
        })
    }

    /// Stops the child: it is asked to end (SIGTERM), killed after `grace`, and not started again. Returns the result of its
    /// function if that returned, then or before; `None` if the child ended otherwise.
    ///
    /// Cancel safe: if the future is dropped, the child is still being stopped; call `stop` again to wait for it.
    ///
    /// ```
    /// use multiprocess::{self as mp, Process, Restart};
    /// use std::time::Duration;
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let mut child = Process::builder().restart(Restart::always()).spawn(std::future::pending::<()>, ())?;
    /// assert_eq!(child.stop(Duration::from_secs(5)).await?, None);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// - `RestartLimit` if it had failed too often before.
    /// - `Cancelled` if the runtime that it was started in has ended, and the child with it.
    /// - `Other` if the result was returned before.
    pub async fn stop(&mut self, grace: Duration) -> Result<Option<R>> {
        fork::check()?;
        self.stop.send_replace(Some(grace));
        self.join().await
    }
}

impl<R> Drop for Supervised<R> {
    fn drop(&mut self) {
        // A process that was forked from this one has neither the child nor the runtime.
        if fork::is_forked() {
            return;
        }
        // A task that is just at work sees the first and makes no further start.
        self.stop.send_replace(Some(Duration::ZERO));
        self.task.iter().for_each(JoinHandle::abort);
        // Its runtime may drop the task late, or never. It is the task's last process: a start that is just being made is dropped with the task.
        if let Some(running) = lock(&self.shared.running).take() {
            // It fails only for one that has ended.
            let _ = running.killer.kill();
        }
    }
}

impl<R> fmt::Debug for Supervised<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Supervised");
        debug.field("name", &self.name).field("pid", &self.pid()).field("restarts", &self.restarts()).finish()
    }
}

type Stopped = tokio::sync::watch::Receiver<Option<Duration>>;

/// The state of the task.
struct Supervision {
    options: ProcessBuilder,
    work: Work,
    restart: Restart,
    states: WatchSender<SupervisedState>,
    shared: Arc<Shared>,
}

impl Drop for Supervision {
    fn drop(&mut self) {
        // Its process ends with the task, whatever ends that.
        self.has_none();
    }
}

impl Supervision {
    async fn run<R: DeserializeOwned + Send + 'static>(
        self,
        first: Process<R>,
        mut stopped: Stopped,
    ) -> Result<Option<R>> {
        let result = self.keep_up(first, &mut stopped).await;
        let restarts = self.restarts();
        match &result {
            Err(error) => self.tell(SupervisedState::GaveUp { restarts, cause: error.to_string() }),
            Ok(_) => self.tell(SupervisedState::Ended { restarts }),
        }
        result
    }

    async fn keep_up<R: DeserializeOwned + Send + 'static>(
        &self,
        first: Process<R>,
        stopped: &mut Stopped,
    ) -> Result<Option<R>> {
        let (mut history, mut started, mut next) = (History::default(), Instant::now(), Ok(first));
        loop {
            let ended = match next {
                Ok(process) => {
                    let mut ending = Ending::of(process);
                    tokio::select! {
                        biased;
                        grace = asked(stopped) => return Ok(self.stop(ending, grace).await),
                        (_, result) = &mut ending => result,
                    }
                }
                Err(error) => Err(error),
            };
            self.has_none();
            let (cause, error) = match ended {
                Ok(value) if !self.restart.also_success => return Ok(Some(value)),
                Ok(_) => ("its function has returned".to_string(), None),
                Err(error) => (error.to_string(), Some(error)),
            };
            let now = Instant::now();
            let text = error.as_ref().map_or_else(|| cause.clone(), |error| error.text().to_string());
            let Some(wait) = history.next(&self.restart, now, now - started, text) else {
                return Err(self.gave_up(&history, error));
            };
            self.tell(SupervisedState::BackingOff { restarts: self.restarts(), wait, cause });
            tokio::select! {
                biased;
                _ = asked(stopped) => return Ok(None),
                () = timer::sleep(wait) => {}
            }
            started = Instant::now();
            self.shared.restarts.fetch_add(1, Relaxed);
            next = self.options.again().and_then(|options| options.start_work(&self.work));
            if let Ok(process) = &next {
                *lock(&self.shared.running) = Some(Running::of(process));
                self.tell(SupervisedState::Running { pid: process.pid(), restarts: self.restarts() });
            }
        }
    }

    /// Asks the process to end and kills it after `grace`. Returns the result of its function, if that returned.
    async fn stop<R: DeserializeOwned + 'static>(&self, mut ending: Ending<R>, grace: Duration) -> Option<R> {
        // Signals fail for what has ended.
        let _ = ending.process().terminate();
        let result = match timer::within(grace, &mut ending).await {
            Ok((_, result)) => result,
            Err(_) => {
                let _ = ending.process().kill();
                ending.await.1
            }
        };
        self.has_none();
        result.ok()
    }

    /// No process runs any more.
    fn has_none(&self) {
        *lock(&self.shared.running) = None;
    }

    fn restarts(&self) -> u64 {
        self.shared.restarts.load(Relaxed)
    }

    fn tell(&self, state: SupervisedState) {
        // It fails if memory runs out: receivers see the next state.
        let _ = self.states.send(state);
    }

    fn gave_up(&self, history: &History, last: Option<Error>) -> Error {
        let causes: Vec<_> = history.causes().map(|cause| format!("\n- {cause}")).collect();
        let why = format!(
            "process {} is not started again: it has ended {} times in too short a time (see Restart::max):{}",
            self.options.name_or_default(),
            history.len(),
            causes.concat()
        );
        let error = Error::new(ErrorKind::RestartLimit, why).explained_by(Topic::RestartLimit);
        match last {
            Some(last) => error.with_exit_status(last.exit_status()).with_source(last),
            None => error,
        }
    }
}

/// Waits until the child is to be stopped: with which grace.
async fn asked(stopped: &mut Stopped) -> Duration {
    let grace = stopped.wait_for(Option::is_some).await.ok().and_then(|grace| *grace);
    match grace {
        Some(grace) => grace,
        // The handle was dropped, and this task is about to be aborted.
        None => std::future::pending().await,
    }
}
