//! `current_task`: the task that runs in this worker, for the task itself.

use super::events::{self, Emitter};
use super::protocol::{Header, Origin};
use crate::channel::lane::StopSign;
use crate::error::Result;
use crate::os::background;
use crate::os::sync::lock;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::*};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

/// The item of a pool that this worker runs now: one call of a function; see [`current_task`].
#[derive(Clone)]
pub struct CurrentTask {
    label: &'static str,
    attempt: u32,
    origin: Origin,
    /// The index in its call.
    index: u64,
    stop: Stop,
    /// If its caller listens.
    emitter: Option<Arc<Emitter>>,
}

/// Where a task learns that it should stop, and that it is over.
#[derive(Clone)]
enum Stop {
    /// In a worker process.
    Sign(StopSign),
    /// In a pool within this process.
    Here(Arc<StopHere>),
}

/// The stop request of an item that a thread of this process runs.
pub(super) struct StopHere {
    is_asked: Arc<AtomicBool>,
    is_over: AtomicBool,
    token: CancellationToken,
}

struct Running {
    task: CurrentTask,
    /// The token of the item at work, if it has asked for one.
    token: Option<CancellationToken>,
}

thread_local! {
    /// The item that this thread runs for a pool within this process.
    static HERE: RefCell<Option<CurrentTask>> = const { RefCell::new(None) };
}
static RUNNING: Mutex<Option<Running>> = Mutex::new(None);
static INDEX: AtomicU32 = AtomicU32::new(0);
/// The item at work, or the one before it, has a token or a listener.
static HAS_MORE: AtomicBool = AtomicBool::new(false);

fn running() -> MutexGuard<'static, Option<Running>> {
    lock(&RUNNING)
}

/// Returns the pool's task that this worker process runs now, and `None` in any other process and between tasks. In a pool
/// [within this process](crate::Pool::in_process) only the thread that runs the task sees it.
///
/// In a thread that a task has left behind, this returns the task that runs at the time of the call, not the one that
/// started the thread. Pass the [`CurrentTask`] to the thread instead: after the end of its task it reports that the
/// task is over.
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
    if let Ok(Some(task)) = HERE.try_with(|task| task.borrow().clone()) {
        return Some(task);
    }
    let running = running();
    let task = &running.as_ref()?.task;
    let item = INDEX.load(Relaxed);
    Some(CurrentTask { stop: task.stop.of_item(item), index: task.index + u64::from(item), ..task.clone() })
}

impl Stop {
    fn of_item(&self, index: u32) -> Self {
        match self {
            Self::Sign(sign) => Self::Sign(sign.of_item(index)),
            Self::Here(_) => self.clone(),
        }
    }

    fn is_shown(&self) -> bool {
        match self {
            Self::Sign(sign) => sign.is_shown(),
            Self::Here(here) => here.is_asked.load(Acquire),
        }
    }
}

impl Running {
    /// Returns `true` if `stop` is of the item at work.
    fn is_at(&self, stop: &StopSign) -> bool {
        matches!(&self.task.stop, Stop::Sign(order) if order.of_item(INDEX.load(Relaxed)).is(stop))
    }
}

impl CurrentTask {
    /// Returns the function's name, as the compiler spells it.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// fn label() -> String {
    ///     multiprocess::current_task().expect("in a worker").label().to_string()
    /// }
    ///
    /// let pool = multiprocess::Pool::new(1)?;
    /// assert!(pool.apply(label, ()).await?.ends_with("label"));
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn label(&self) -> &str {
        self.label
    }

    /// Returns 0 in the first attempt, and then the number of the retry.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Returns an id that is unique to this task, and the same in each of its attempts.
    ///
    /// No task of another call, process or host has it. Use it to make side effects idempotent.
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

    /// Returns the number of this item in its call, from 0: 7 for the eighth item of a [`map`](crate::Pool::map).
    pub fn index(&self) -> u64 {
        self.index
    }

    /// Sends an event to the caller of this task, and waits while 1024 events, or 1 to 2 MiB, are unread. The caller receives it from
    /// [`Call::events`](crate::Call::events) while the task runs.
    ///
    /// - If the caller did not ask for events, or has dropped the stream, the event is discarded before it is encoded.
    /// - An event that was sent is in the caller's stream before the result of the task is there, also if its worker dies at once.
    /// - Cancel safe: a dropped future has sent nothing.
    ///
    /// ```
    /// use futures::StreamExt;
    /// use multiprocess::{self as mp, Pool};
    ///
    /// async fn work(steps: u32) -> mp::Result<()> {
    ///     let task = mp::current_task().expect("in a pool");
    ///     for step in 0..steps {
    ///         task.emit((step, format!("step {step}"))).await?;
    ///     }
    ///     Ok(())
    /// }
    ///
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(1)?;
    /// let mut call = pool.apply(work, (3,));
    /// let events = call.events::<(u32, String)>();
    /// let (done, events) = tokio::join!(call, events.collect::<Vec<_>>());
    /// done??;
    /// assert_eq!(events.len(), 3);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// - `Encode` if the caller listens for events of another type: the error names both. Also if the event cannot be serialised.
    /// - `Cancelled` if the task was asked to stop, and the event waits for room, or its caller has dropped the call.
    /// - `Closed` if this task is over, for example in a thread that it has left behind.
    /// - `Io` if memory or a descriptor runs out.
    pub async fn emit<E>(&self, event: E) -> Result<()>
    where
        E: Serialize + DeserializeOwned + Send + 'static,
    {
        match self.emitter()? {
            Some(emitter) => emitter.emit(self.label, event, || self.is_cancelled()).await,
            None => Ok(()),
        }
    }

    /// Sends an event, blocking this thread while 1024 events, or 1 to 2 MiB, are unread. It returns when the task is asked to stop,
    /// or its caller is gone.
    ///
    /// ```
    /// use futures::StreamExt;
    /// use multiprocess::{self as mp, Pool};
    ///
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(1)?;
    /// let mut call = pool.apply(|| mp::current_task().expect("in a pool").blocking_emit(7_u8), ());
    /// let mut events = call.events::<u8>();
    /// let (sent, event) = tokio::join!(call, events.next());
    /// sent??;
    /// assert_eq!(event.expect("an event")?, 7);
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Panics
    /// Inside async code, as tokio's blocking calls do, if anybody listens.
    ///
    /// # Errors
    /// As [`emit`](Self::emit).
    #[track_caller]
    pub fn blocking_emit<E>(&self, event: E) -> Result<()>
    where
        E: Serialize + DeserializeOwned + Send + 'static,
    {
        match self.emitter()? {
            Some(emitter) => emitter.blocking_emit(self.label, event, || self.is_cancelled()),
            None => Ok(()),
        }
    }

    /// Sends an event if there is room now, for events that may be left out, such as progress.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    ///
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(1)?;
    /// // Nobody listens: that costs next to nothing, and is no error.
    /// pool.apply(|| mp::current_task().expect("in a pool").try_emit("progress".to_string()), ()).await??;
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `Full` if it would have to wait. Otherwise as [`emit`](Self::emit).
    pub fn try_emit<E>(&self, event: E) -> Result<()>
    where
        E: Serialize + DeserializeOwned + Send + 'static,
    {
        self.emitter()?.map_or(Ok(()), |emitter| emitter.try_emit(self.label, event, || self.is_cancelled()))
    }

    /// Returns `true` if the caller of this task listens for events. If not, an event that is expensive to make need not be made. A
    /// stream that was dropped before this task has sent an event may still count.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// fn listens() -> bool {
    ///     multiprocess::current_task().expect("in a worker").has_listener()
    /// }
    ///
    /// let pool = multiprocess::Pool::new(1)?;
    /// assert!(!pool.apply(listens, ()).await?);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn has_listener(&self) -> bool {
        self.emitter.as_ref().is_some_and(|emitter| emitter.has_listener())
    }

    /// Where events go; `None` if nobody has asked for them.
    fn emitter(&self) -> Result<Option<&Emitter>> {
        // A task with a listener is notified when it is over.
        let is_over = self.emitter.is_none()
            && match &self.stop {
                Stop::Sign(sign) => running().as_ref().is_none_or(|running| !running.is_at(sign)),
                Stop::Here(here) => here.is_over.load(Acquire),
            };
        if is_over { Err(events::is_over(self.label)) } else { Ok(self.emitter.as_deref()) }
    }

    /// Returns `true` if this task should stop: its call was cancelled, or its time is over. If it does not stop, its worker is killed
    /// after the grace.
    ///
    /// Costs one load, and no system call.
    pub fn is_cancelled(&self) -> bool {
        self.stop.is_shown()
    }

    /// Returns a token that is cancelled when this task should stop.
    ///
    /// The first call in a task starts a thread, which sleeps until then and ends with the task. If no thread can be started, the token is never
    /// cancelled; [`is_cancelled`](Self::is_cancelled) still works.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::{self as mp, ErrorKind};
    /// use std::time::Duration;
    /// async fn patient() -> bool {
    ///     let stop = mp::current_task().expect("in a worker").cancellation();
    ///     stop.cancelled().await;
    ///     true
    /// }
    ///
    /// let pool = mp::Pool::new(1)?;
    /// let call = pool.apply(patient, ()).timeout(Duration::from_millis(50)).grace(Duration::from_secs(5));
    /// assert!(call.await?);
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn cancellation(&self) -> CancellationToken {
        let sign = match &self.stop {
            Stop::Sign(sign) => sign,
            Stop::Here(here) => {
                if self.is_cancelled() {
                    here.token.cancel();
                }
                return here.token.clone();
            }
        };
        let mut running = running();
        let Some(running) = running.as_mut().filter(|running| running.is_at(sign)) else {
            // Nothing more is received from a task that is over.
            let token = CancellationToken::new();
            if self.is_cancelled() {
                token.cancel();
            }
            return token;
        };
        let watch = || {
            let token = CancellationToken::new();
            let (stop, shown) = (sign.clone(), token.clone());
            stop.watch();
            HAS_MORE.store(true, Relaxed);
            let watch = move || {
                if stop.blocking_wait().is_ok_and(|shown| shown) {
                    shown.cancel();
                }
            };
            // Without a thread it still can ask.
            let _ = background::spawn(std::thread::Builder::new().name("mp-stop".into()), watch);
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
    let (stop, emitter) = (Stop::Sign(stop), None);
    *running() =
        Some(Running { task: CurrentTask { label, attempt, origin, index: first, stop, emitter }, token: None });
}

/// The caller of the item that has just started listens for its events.
pub(super) fn has_listener(emitter: Emitter) {
    HAS_MORE.store(true, Relaxed);
    if let Some(running) = running().as_mut() {
        running.task.emitter = Some(Arc::new(emitter));
    }
}

/// The function has returned: an event that comes now would come after the result.
pub(super) fn sends_no_more() {
    let running = running();
    let emitter = running.as_ref().and_then(|running| running.task.emitter.as_ref());
    emitter.into_iter().for_each(|emitter| emitter.end());
}

/// An item of it starts.
#[inline]
pub(super) fn starts(index: u32) {
    if HAS_MORE.load(Relaxed) {
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

/// An item is done: the thread that waits for its stop sign goes, and it sends no more events.
#[cold]
fn dismiss(running: &mut Option<Running>) {
    HAS_MORE.store(false, Relaxed);
    let Some(Running { task, token }) = running else { return };
    task.emitter.take().into_iter().for_each(|emitter| emitter.end());
    if let (Some(_), Stop::Sign(sign)) = (token.take(), &task.stop) {
        sign.dismiss();
    }
}

/// An item that this thread runs for a pool within this process, until this is dropped.
pub(super) struct RunsHere(Arc<StopHere>);

impl RunsHere {
    pub(super) fn start(
        (label, attempt, origin, index): (&'static str, u32, Origin, u64),
        is_asked: Arc<AtomicBool>,
        emitter: Option<Emitter>,
    ) -> Self {
        let here = Arc::new(StopHere { is_asked, is_over: AtomicBool::new(false), token: CancellationToken::new() });
        let (stop, emitter) = (Stop::Here(here.clone()), emitter.map(Arc::new));
        HERE.set(Some(CurrentTask { label, attempt, origin, index, stop, emitter }));
        Self(here)
    }

    /// Returns its stop request, for those that may ask it to stop.
    pub(super) fn stop(&self) -> &Arc<StopHere> {
        &self.0
    }
}

impl Drop for RunsHere {
    fn drop(&mut self) {
        self.0.is_over.store(true, Release);
        if let Ok(Some(task)) = HERE.try_with(|task| task.borrow_mut().take()) {
            task.emitter.iter().for_each(|emitter| emitter.end());
        }
    }
}

impl StopHere {
    /// Cancels the token of the item, if it is to stop.
    pub(super) fn pass_on(&self) {
        if self.is_asked.load(Acquire) {
            self.token.cancel();
        }
    }
}
