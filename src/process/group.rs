//! Children that belong together.
#![forbid(unsafe_code)]

use super::builder::ProcessBuilder;
use super::function::{Arguments, Function, captures_nothing};
use super::info::ProcessInfo;
use super::process::Process;
use crate::error::{Error, ErrorKind, Result};
use crate::os::{reactor, timer};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::fmt;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

/// Child processes that belong together, as `tokio::task::JoinSet` holds tasks that belong together.
///
/// Use instead:
/// - [`Pool`](crate::Pool) for many short tasks: it keeps its processes;
/// - [`Process`](crate::Process) for one child, or for children that outlive their handles.
///
/// Their results come in the order in which they end. When the group is dropped, all of them end.
///
/// ```
/// use multiprocess::{self as mp, Group};
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let mut group = Group::new();
///         for n in [1, 2, 3] {
///             group.spawn(|n: u32| n * n, (n,))?;
///         }
///         let mut sum = 0;
///         while let Some(square) = group.join_next().await {
///             sum += square?;
///         }
///         assert_eq!(sum, 14);
///         Ok(())
///     })
/// }
/// ```
///
/// # Details
/// - **Drop.** Dropping the group kills (SIGKILL) the children that still run, and does not wait for their end.
///   [`shutdown`](Self::shutdown) asks them first.
/// - **Death.** The result of a child that is killed is an error; the other children go on. The children of a process that is
///   killed end with it.
/// - **Limits.** While this process has no descriptor left to watch a child with, the child stays in the group, and is checked
///   every 20 ms.
/// - **Cancel.** A dropped [`join_next`](Self::join_next) or [`shutdown`](Self::shutdown) loses no result.
pub struct Group<R> {
    running: FuturesUnordered<Member<R>>,
    /// Those that ended during a `shutdown`, which may have been dropped.
    ended: VecDeque<(ProcessInfo, Result<R>)>,
}

/// A child, until it has ended.
struct Member<R> {
    process: Process<R>,
    result: Option<Result<R>>,
    /// A failure to receive the result, and a pause until it is tried again.
    failed: Option<Error>,
    pause: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// Until a child that could not be watched is waited for again.
const PAUSE: Duration = Duration::from_millis(20);

impl<R> Unpin for Member<R> {}

impl<R> Member<R> {
    /// Returns `true` if this keeps it from being waited for now, and need not later: it cannot be watched for want of memory or of a
    /// descriptor. The first such failure is tried again in any case, later ones as long as it runs.
    fn is_passing(&self, error: &Error) -> bool {
        let again = self.failed.is_none() || self.process.is_alive();
        error.kind() == ErrorKind::Io && again && reactor::has_timer().is_ok()
    }
}

impl<R: DeserializeOwned + 'static> Future for Member<R> {
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

impl<R> Default for Group<R> {
    fn default() -> Self {
        Self { running: FuturesUnordered::new(), ended: VecDeque::new() }
    }
}

impl<R: DeserializeOwned + 'static> Group<R> {
    /// Creates a group without children.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a child that runs `f(args..)`, as [`Process::spawn`] does, and returns its info.
    ///
    /// # Errors
    /// As [`Process::spawn`].
    pub fn spawn<F, A, M>(&mut self, f: F, args: A) -> Result<ProcessInfo>
    where
        F: Function<A, M, Output = R>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        self.spawn_with(ProcessBuilder::default(), f, args)
    }

    /// Starts a child with the options of a builder. `kill_on_drop` is ignored: the group always kills its children when it is
    /// dropped.
    ///
    /// ```
    /// use multiprocess::{self as mp, Group, Process};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let mut group = Group::new();
    /// let child = group.spawn_with(Process::builder().name("painter"), || 1, ())?;
    /// assert_eq!(child.name(), "painter");
    /// # assert_eq!(group.join_next().await.unwrap()?, 1);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`Process::spawn`].
    pub fn spawn_with<F, A, M>(&mut self, options: ProcessBuilder, f: F, args: A) -> Result<ProcessInfo>
    where
        F: Function<A, M, Output = R>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        let process = options.kill_on_drop(true).spawn(f, args)?;
        let info = process.info().clone();
        self.running.push(Member { process, result: None, failed: None, pause: None });
        Ok(info)
    }

    /// Waits until the next child has ended, and returns the result of its function; `None` if there is no child.
    ///
    /// A child whose function has returned, and that still waits for blocking tasks or children of its own, has not ended.
    ///
    /// Cancel safe: a dropped future has taken no result.
    ///
    /// # Errors
    /// The result of each child as [`Process::join`].
    pub async fn join_next(&mut self) -> Option<Result<R>> {
        Some(self.join_next_with_info().await?.1)
    }

    /// Waits as [`join_next`](Self::join_next), and returns the info of the child with its result.
    ///
    /// Cancel safe: a dropped future has taken no result.
    ///
    /// ```
    /// use multiprocess::{self as mp, Group};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let mut group = Group::new();
    /// let child = group.spawn(std::process::id, ())?;
    /// let (info, pid) = group.join_next_with_info().await.expect("there is one");
    /// assert_eq!((info.pid(), pid?), (child.pid(), child.pid()));
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// The result of the child as [`Process::join`].
    pub async fn join_next_with_info(&mut self) -> Option<(ProcessInfo, Result<R>)> {
        match self.ended.pop_front() {
            Some(ended) => Some(ended),
            None => self.running.next().await,
        }
    }

    /// Waits until all have ended, and returns the results of their functions, in the order in which they ended.
    ///
    /// Cancel safe: a dropped future has taken no result.
    ///
    /// # Errors
    /// The result of each child as [`Process::join`].
    ///
    /// ```
    /// use multiprocess::{self as mp, Group};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let mut group = Group::new();
    /// group.spawn(|| 1, ())?;
    /// assert_eq!(group.join_all().await.into_iter().collect::<mp::Result<Vec<_>>>()?, [1]);
    /// # Ok(()) }) }
    /// ```
    pub async fn join_all(&mut self) -> Vec<Result<R>> {
        self.all_end().await;
        self.take_results()
    }

    async fn all_end(&mut self) {
        while let Some(ended) = self.running.next().await {
            self.ended.push_back(ended);
        }
    }

    fn take_results(&mut self) -> Vec<Result<R>> {
        std::mem::take(&mut self.ended).into_iter().map(|(_, result)| result).collect()
    }

    /// Asks all children to end (SIGTERM), kills those that have not ended after `grace`, and waits for them. Returns their results in
    /// the order in which they ended.
    ///
    /// Cancel safe: if the future is dropped, the children have been asked to end, and no result is lost; call `shutdown` again.
    ///
    /// # Errors
    /// The result of each child as [`Process::join`]. That of a child that ended by one of these signals is `ProcessDied`.
    ///
    /// ```
    /// use multiprocess::{self as mp, Group};
    /// use std::time::Duration;
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let mut group = Group::new();
    /// group.spawn(std::future::pending::<()>, ())?;
    /// let results = group.shutdown(Duration::from_secs(5)).await;
    /// assert_eq!(results[0].as_ref().unwrap_err().kind(), mp::ErrorKind::ProcessDied);
    /// # Ok(()) }) }
    /// ```
    pub async fn shutdown(&mut self, grace: Duration) -> Vec<Result<R>> {
        // A signal fails for what has ended, and in a process that was forked from this one, which has no children.
        self.running.iter().for_each(|member| drop(member.process.terminate()));
        let deadline = Instant::now().checked_add(grace);
        let in_time = match deadline {
            Some(deadline) => timer::by(deadline, self.all_end()).await.is_ok(),
            None => {
                self.all_end().await;
                true
            }
        };
        if !in_time {
            self.kill_all();
            self.all_end().await;
        }
        self.take_results()
    }

    /// Returns the number of children that have not been joined.
    pub fn len(&self) -> usize {
        self.running.len() + self.ended.len()
    }

    /// Returns `true` if there is no child to join.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<R> Group<R> {
    /// Kills all children that still run (SIGKILL). Their results are joined as before.
    pub fn kill_all(&self) {
        self.running.iter().for_each(|member| drop(member.process.kill()));
    }

    /// Detaches all children: they run on, and are not joined.
    pub fn detach_all(&mut self) {
        std::mem::take(&mut self.running).into_iter().for_each(|member| member.process.detach());
        self.ended.clear();
    }
}

impl<R> fmt::Debug for Group<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let running: Vec<_> = self.running.iter().map(|member| member.process.info()).collect();
        f.debug_struct("Group").field("running", &running).field("ended", &self.ended.len()).finish()
    }
}
