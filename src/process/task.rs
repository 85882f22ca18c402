//! A function and its arguments as a value. It shares no state: what it carries is encoded in it.
//!
//! # Death
//! | killed | what follows | test (`tests/pieces.rs`, `tasks`) |
//! |---|---|---|
//! | the process that has the task, or runs it | the task is gone with it, as any value | - |
//! | one that runs a task on lease | the task is in the queue again until its commit | `killed_at_any_step_of_a_leased_task_it_is_run_again_until_its_commit` |
//!
//! # Cancel
//! | dropped | what follows | test |
//! |---|---|---|
//! | a `run` that has not begun the function | it does not begin | `a_dropped_run_that_has_not_begun_runs_nothing` |
//! | a `run` of an async function | the function is dropped at its next await | `a_dropped_run_cancels_an_async_function`, `ten_thousand_dropped_runs_leave_nothing_behind` |
//! | a `run` of a synchronous function | that runs to its end, and its result is dropped | `ten_thousand_dropped_runs_leave_nothing_behind` |
#![forbid(unsafe_code)]

use super::entry::Call;
use super::executor::Executor;
use super::function::{Arguments, Function, captures_nothing};
use super::info;
use super::outcome::Outcome;
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::background;
use crate::wire::{EncodedMessage, Parcel};
use serde::de::DeserializeOwned;
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::marker::PhantomData;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

/// A function together with its arguments, as a value: to be sent through a queue, kept in a list, and run where it arrives.
///
/// Use [`Process::spawn`](crate::Process::spawn) or [`Pool::apply`](crate::Pool::apply) instead to run one function elsewhere: they take the function itself.
///
/// Any function that [`Process::spawn`](crate::Process::spawn) accepts can be in it, with the same checks when it is made, and
/// when it is run: a task names a function of this program's image, and runs nothing else. Tasks of different functions and
/// arguments have the same type if their results have.
///
/// ```
/// use multiprocess::{self as mp, Process, Queue, Task};
///
/// fn area(width: u32, height: u32) -> u32 {
///     width * height
/// }
///
/// async fn work(tasks: Queue<Task<u32>>, results: Queue<u32>) -> mp::Result<()> {
///     while let Ok(task) = tasks.get().await {
///         results.put(task.run().await?).await?;
///     }
///     results.close();
///     Ok(())
/// }
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let (tasks, results) = (Queue::unbounded()?, Queue::unbounded()?);
///         let worker = Process::spawn(work, (tasks.clone(), results.clone()))?;
///         tasks.put(Task::of(area, (2, 3))).await?;
///         tasks.put(Task::of(|side: u32| side * side, (4,))).await?;
///         tasks.close();
///         assert_eq!((results.get().await?, results.get().await?), (6, 16));
///         worker.await?
///     })
/// }
/// ```
///
/// # Details
/// - **Arguments** are encoded when the task is made. If they cannot be, running or sending the task fails with `Encode`.
/// - **Panics.** If the function panics, the result is an error of kind `Panicked`, as in a child.
/// - **Death.** A task is a value: it is gone with the process that has it, as any other value.
/// - **Cost.** A task in a message takes its encoded arguments and some 20 bytes. Its result is encoded and decoded once more than
///   that of a direct call.
#[must_use = "a task does nothing until it is run"]
pub struct Task<R> {
    work: Result<Work>,
    result: PhantomData<fn() -> R>,
}

/// A task as it travels.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Work {
    pub(crate) call: Call,
    pub(crate) arguments: EncodedMessage,
}

impl<R> Task<R> {
    /// Creates a task of `f(args..)`, without running it.
    ///
    /// ```
    /// # multiprocess::init();
    /// use multiprocess::Task;
    /// let tasks: Vec<Task<usize>> = vec![Task::of(|text: String| text.len(), ("four".to_string(),)), Task::of(|| 0, ())];
    /// let lengths = tasks.into_iter().map(Task::blocking_run).collect::<multiprocess::Result<Vec<_>>>()?;
    /// assert_eq!(lengths, [4, 0]);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    pub fn of<F, A, M>(f: F, args: A) -> Self
    where
        F: Function<A, M, Output = R>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        let call = Call::of(f);
        Self { work: EncodedMessage::of(&args).map(|arguments| Work { call, arguments }), result: PhantomData }
    }

    pub(crate) fn into_work(self) -> Result<Work> {
        self.work
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<R: DeserializeOwned + 'static> Task<R> {
    /// Runs the function in this process and returns its result.
    ///
    /// It runs on a blocking thread of the current runtime, so that a synchronous function that takes long delays no other task; an
    /// async function is driven there, and uses the timers and sockets of this runtime.
    ///
    /// Dropping the future cancels an async function at its next await. A synchronous function that has begun cannot be stopped: it runs to its end, and
    /// its result is dropped. To be able to stop it, run the task in a process or a pool.
    ///
    /// # Errors
    /// - `Panicked` if the function panicked.
    /// - `Encode` if the arguments or the result cannot be encoded.
    /// - `Decode` if the arguments cannot be read, or name a function that this program does not have.
    /// - `Other` outside a tokio runtime.
    /// - `Cancelled` if the runtime ends first.
    /// - `Io` if no thread can be had.
    pub async fn run(self) -> Result<R> {
        let Work { call, arguments } = self.work?;
        let runtime = Handle::try_current().map_err(|_| info::needs_runtime("running a task"))?;
        let parcel = arguments.open()?;
        let cancelled = CancellationToken::new();
        let _cancels = cancelled.clone().drop_guard();
        let mut executor = Executor::inside(runtime.clone(), cancelled);
        let run = move || call.run(parcel, &mut executor).into_parcel();
        let running = background::pooled(&runtime, run).map_err(|error| Error::io("cannot run a task", error))?;
        // A function that has not begun when this future is dropped does not begin.
        let _aborts = AbortOnDrop(running.abort_handle());
        match running.await {
            Ok(Some(outcome)) => Outcome::read(outcome?),
            Ok(None) | Err(_) => {
                let why = "the runtime ended before the task was run";
                Err(Error::new(ErrorKind::Cancelled, why).explained_by(Topic::RuntimeEnded))
            }
        }
    }

    /// Runs the function on this thread and returns its result. An async function gets a runtime of its own.
    ///
    /// ```
    /// # multiprocess::init();
    /// use multiprocess::Task;
    /// assert_eq!(Task::of(|n: u8| n + 1, (1,)).blocking_run()?, 2);
    /// # Ok::<(), multiprocess::Error>(())
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    #[track_caller]
    pub fn blocking_run(self) -> Result<R> {
        crate::wait::refuse_inside_async();
        let Work { call, arguments } = self.work?;
        Outcome::read(call.run(arguments.open()?, &mut Executor::default()).into_parcel()?)
    }
}

impl Outcome {
    /// Returns the task as another process would receive it.
    fn into_parcel(self) -> Result<Parcel> {
        let fds = self.attachments().iter().cloned().map(|attachment| attachment.into_owned());
        let fds = fds.collect::<std::io::Result<_>>();
        let fds = fds.map_err(|error| Error::io("cannot take over a descriptor of a task's result", error))?;
        Ok(Parcel { bytes: self.parts().concat(), fds })
    }
}

/// The same call once more, with the same arguments; a descriptor or handle among them is shared, as when it is sent.
impl<R> Clone for Task<R> {
    fn clone(&self) -> Self {
        let work = match &self.work {
            Ok(work) => Ok(work.clone()),
            Err(error) => Err(Error::copy(error)),
        };
        Self { work, result: PhantomData }
    }
}

impl<R> Serialize for Task<R> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.work.as_ref().map_err(S::Error::custom)?.serialize(serializer)
    }
}

impl<'de, R> Deserialize<'de> for Task<R> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self { work: Ok(Work::deserialize(deserializer)?), result: PhantomData })
    }
}

impl<R> fmt::Debug for Task<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.work {
            Ok(work) => {
                f.debug_struct("Task").field("arguments", &work.arguments.bytes().len()).finish_non_exhaustive()
            }
            Err(error) => f.debug_struct("Task").field("error", error).finish_non_exhaustive(),
        }
    }
}
