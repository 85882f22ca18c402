//! Children that belong together. Their handles are in the group; it shares no state with them.
//!
//! # Death
//! | killed | what follows | test (`tests/pieces.rs`, `groups`) |
//! |---|---|---|
//! | a child, at any moment | its result is an error, those of the others come | `a_child_that_fails_is_an_error_of_its_own`, `children_killed_at_any_step_cost_their_own_results_only` |
//! | the process that has the group | all children end with it | `the_end_of_its_process_ends_all_children_of_a_group` |
//!
//! # Cancel
//! | dropped | what follows | test |
//! |---|---|---|
//! | a `join_next`, `join_all` or `shutdown` | no result is lost | `ten_thousand_dropped_joins_and_shutdowns_lose_no_result` |
//! | the group | all children are killed | `dropped_all_children_end` |
#![forbid(unsafe_code)]

use super::builder::ProcessBuilder;
use super::ending::Ending;
use super::function::{Arguments, Function, captures_nothing};
use super::info::ProcessInfo;
use crate::error::Result;
use crate::os::{fork, timer};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::time::Duration;

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
    running: FuturesUnordered<Ending<R>>,
    /// Those that ended during a `shutdown`, which may have been dropped.
    ended: VecDeque<(ProcessInfo, Result<R>)>,
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

    /// Starts a child that runs `f(args..)`, as [`Process::spawn`](crate::Process::spawn) does, and returns its info.
    ///
    /// # Errors
    /// As [`Process::spawn`](crate::Process::spawn).
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
    /// As [`Process::spawn`](crate::Process::spawn).
    pub fn spawn_with<F, A, M>(&mut self, options: ProcessBuilder, f: F, args: A) -> Result<ProcessInfo>
    where
        F: Function<A, M, Output = R>,
        A: Arguments,
    {
        const { captures_nothing::<F>() };
        let process = options.kill_on_drop(true).spawn(f, args)?;
        let info = process.info().clone();
        self.running.push(Ending::of(process));
        Ok(info)
    }

    /// Waits until the next child has ended, and returns the result of its function; `None` if there is no child.
    ///
    /// A child whose function has returned, and that still waits for blocking tasks or children of its own, has not ended.
    ///
    /// Cancel safe: a dropped future has taken no result.
    ///
    /// # Errors
    /// The result of each child as [`Process::join`](crate::Process::join).
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
    /// The result of the child as [`Process::join`](crate::Process::join).
    pub async fn join_next_with_info(&mut self) -> Option<(ProcessInfo, Result<R>)> {
        match self.ended.pop_front() {
            Some(ended) => Some(ended),
            None => self.next_end().await,
        }
    }

    /// Waits until all have ended, and returns the results of their functions, in the order in which they ended.
    ///
    /// Cancel safe: a dropped future has taken no result.
    ///
    /// # Errors
    /// The result of each child as [`Process::join`](crate::Process::join).
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

    async fn next_end(&mut self) -> Option<(ProcessInfo, Result<R>)> {
        poll_fn(|cx| {
            if fork::is_forked() {
                // No child of the parent ends here, so each is polled for its error, whether it was polled before or not.
                self.running = std::mem::take(&mut self.running).into_iter().collect();
            }
            self.running.poll_next_unpin(cx)
        })
        .await
    }

    async fn all_end(&mut self) {
        while let Some(ended) = self.next_end().await {
            self.ended.push_back(ended);
        }
    }

    fn take_results(&mut self) -> Vec<Result<R>> {
        std::mem::take(&mut self.ended).into_iter().map(|(_, result)| result).collect()
    }

    /// Asks all children to end (SIGTERM), kills those that have not ended after `grace`, and waits for them. Returns their results in
    /// the order in which they ended.
    ///
    /// Cancel safe: if the future is dropped, the children have been asked to end, and no result is lost; call `shutdown` again. Where
    /// there is no tokio timer, they are killed at once.
    ///
    /// # Errors
    /// The result of each child as [`Process::join`](crate::Process::join). That of a child that ended by one of these signals is `ProcessDied`.
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
        self.running.iter().for_each(|member| drop(member.process().terminate()));
        let in_time = match timer::limited(grace, self.all_end()) {
            Ok(ended) => ended.await.is_ok(),
            Err(_) => false,
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
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::Group;
    /// use std::time::Duration;
    /// let mut group = Group::new();
    /// group.spawn(std::thread::sleep, (Duration::from_secs(60),))?;
    /// group.kill_all();
    /// assert!(group.join_next().await.unwrap().is_err());
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn kill_all(&self) {
        self.running.iter().for_each(|member| drop(member.process().kill()));
    }

    /// Detaches all children: they run on, and are not joined.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let mut group = multiprocess::Group::new();
    /// group.spawn(|| 1, ())?;
    /// group.detach_all();
    /// assert!(group.join_next().await.is_none());
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn detach_all(&mut self) {
        std::mem::take(&mut self.running).into_iter().for_each(|member| member.into_process().detach());
        self.ended.clear();
    }
}

impl<R> fmt::Debug for Group<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let running: Vec<_> = self.running.iter().map(|member| member.process().info()).collect();
        f.debug_struct("Group").field("running", &running).field("ended", &self.ended.len()).finish()
    }
}
