//! `current_task`: the task that runs in this worker, for the task itself.

use super::protocol::{Header, Origin};
use crate::channel::lane::StopSign;
use crate::os::sync::lock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

/// The task that runs in this worker; see [`current_task`].
#[derive(Clone)]
pub struct CurrentTask {
    label: &'static str,
    attempt: u32,
    origin: Origin,
    /// The index in its call.
    index: u64,
    stop: StopSign,
}

struct Running {
    task: CurrentTask,
    /// Of the item at work, if it has asked for it.
    token: Option<CancellationToken>,
}

static RUNNING: Mutex<Option<Running>> = Mutex::new(None);
static INDEX: AtomicU32 = AtomicU32::new(0);
/// The item at work, or the one before it, has a token.
static HAS_TOKEN: AtomicBool = AtomicBool::new(false);

fn running() -> MutexGuard<'static, Option<Running>> {
    lock(&RUNNING)
}

/// Returns the pool's task that this worker process runs now, and `None` in any other process and between tasks.
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// use std::time::Duration;
///
/// fn patient() -> u32 {
///     let task = mp::current_task().expect("inside a worker");
///     while !task.is_cancelled() {
///         std::thread::sleep(Duration::from_millis(1));
///     }
///     task.attempt()
/// }
///
/// # fn main() -> mp::Result<()> { mp::run(async {
/// assert!(mp::current_task().is_none());
/// let pool = Pool::new(1)?;
/// let call = pool.apply(patient, ()).timeout(Duration::from_millis(50)).grace(Duration::from_secs(5));
/// // It was asked to stop, and did so in time: its worker lives on.
/// assert_eq!(call.await?, 0);
/// # Ok(()) }) }
/// ```
pub fn current_task() -> Option<CurrentTask> {
    let running = running();
    let task = &running.as_ref()?.task;
    let item = INDEX.load(Relaxed);
    Some(CurrentTask { stop: task.stop.of_item(item), index: task.index + u64::from(item), ..task.clone() })
}

impl CurrentTask {
    /// Returns the function's name, as the compiler spells it.
    pub fn label(&self) -> &str {
        self.label
    }

    /// Returns 0 in the first attempt, and then the number of the retry.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// A text that is the same in each attempt of this item, and that no other item has, of whichever call, process or host:
    /// for a function that must not do something twice.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    ///
    /// fn id(_: u32) -> String {
    ///     mp::current_task().expect("inside a worker").task_id()
    /// }
    ///
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(1)?;
    /// let ids = pool.map(id, 0..2).await?;
    /// assert_ne!(ids[0], ids[1]);
    /// # Ok(()) }) }
    /// ```
    pub fn task_id(&self) -> String {
        let Origin { submitter, call } = self.origin;
        format!("{submitter:016x}-{call}-{}", self.index)
    }

    /// Returns whether this task should stop: its call was cancelled, or its time is over. If it does not, its worker is killed after
    /// the grace.
    ///
    /// Costs one load, and no system call.
    pub fn is_cancelled(&self) -> bool {
        self.stop.is_shown()
    }

    /// Returns a token that is cancelled when this task should stop.
    ///
    /// The first call in a task starts a thread, which sleeps until then and ends with the task. If no thread can be started, the token is never
    /// cancelled; [`is_cancelled`](Self::is_cancelled) still works.
    pub fn cancellation(&self) -> CancellationToken {
        let mut running = running();
        let at_work = |running: &&mut Running| running.task.stop.of_item(INDEX.load(Relaxed)).is(&self.stop);
        let Some(running) = running.as_mut().filter(at_work) else {
            // Of one that is over nothing is received any more.
            let token = CancellationToken::new();
            if self.is_cancelled() {
                token.cancel();
            }
            return token;
        };
        let watch = || {
            let token = CancellationToken::new();
            let (stop, shown) = (self.stop.clone(), token.clone());
            stop.watch();
            HAS_TOKEN.store(true, Relaxed);
            let watch = move || {
                if stop.blocking_wait().is_ok_and(|shown| shown) {
                    shown.cancel();
                }
            };
            // Without a thread it still can ask.
            let _ = std::thread::Builder::new().name("mp-stop".into()).spawn(watch);
            token
        };
        running.token.get_or_insert_with(watch).clone()
    }
}

impl std::fmt::Debug for CurrentTask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CurrentTask")
            .field("label", &self.label)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}

/// The function at work.
#[cold]
pub(super) fn label() -> Option<&'static str> {
    Some(running().as_ref()?.task.label)
}

/// An order begins.
pub(super) fn begin(label: &'static str, header: &Header, stop: StopSign) {
    let Header { attempt, origin, first, .. } = *header;
    *running() = Some(Running { task: CurrentTask { label, attempt, origin, index: first, stop }, token: None });
}

/// An item of it starts.
#[inline]
pub(super) fn starts(index: u32) {
    if HAS_TOKEN.load(Relaxed) {
        dismiss(&mut running());
    }
    INDEX.store(index, Relaxed);
}

/// The order is done.
pub(super) fn end() {
    let mut running = running();
    dismiss(&mut running);
    *running = None;
}

/// The thread that waits for a stop sign goes: its item is done.
#[cold]
fn dismiss(running: &mut Option<Running>) {
    HAS_TOKEN.store(false, Relaxed);
    if let Some(Running { task, token }) = running
        && token.take().is_some()
    {
        task.stop.dismiss();
    }
}
