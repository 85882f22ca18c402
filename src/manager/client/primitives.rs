//! Events and barriers in a manager, for programs that share no memory.

use crate::error::{Error, ErrorKind, Result, Topic};
use crate::manager::client::proxy::{Proxy, calls, proxies};
use crate::manager::client::waits::in_time;
use crate::manager::wire::messages::Writer;
use crate::manager::wire::waiting::{End, Ticket, Try, Waits, too_late};
use std::collections::HashMap;
use std::task::Poll;
use std::time::Duration;

proxies!(EventProxy BarrierProxy);

/// The event in the manager.
#[derive(Default)]
pub(crate) struct EventObject(bool);

impl Waits for EventObject {}

impl EventObject {
    fn wait(&mut self, _: &mut Option<()>, _: Try, answer: &mut Writer) -> Poll<Result<()>> {
        if self.0 { Poll::Ready(answer.lend_part(&())) } else { Poll::Pending }
    }
}

/// A handle of an event that lives in a manager's process: a flag that tasks wait for.
///
/// Created by [`Manager::event`](crate::Manager::event), not set. It is for programs that share no memory, such as those on
/// several hosts; among processes of one program, [`Event`](crate::Event) is faster.
///
/// ```
/// use multiprocess::{self as mp, Manager};
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::start().await?;
///         let ready = manager.event().await?;
///         futures::try_join!(ready.wait(), ready.set())?;
///         assert!(ready.is_set().await?);
///         manager.shutdown().await
///     })
/// }
/// ```
///
/// # Details
/// - **Waiting.** [`set`](Self::set) wakes all callers that wait, also if the event is cleared right after.
/// - **Dropped futures.** A dropped [`wait`](Self::wait) changes nothing. For the other methods see [`Proxy`].
/// - **Death.** No process holds an event. If the manager ends, each call fails with `Closed`.
/// - **Cost.** One call for each method.
pub struct EventProxy(pub(crate) Proxy<EventObject>);

impl EventProxy {
    calls! { flag: EventObject;
        /// Sets the event and wakes all callers that wait for it.
        call fn set() -> () { flag.0 = true }

        /// Clears the event.
        ///
        /// ```
        /// # multiprocess::init();
        /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
        /// let manager = multiprocess::Manager::start().await?;
        /// let event = manager.event().await?;
        /// event.set().await?;
        /// event.clear().await?;
        /// assert!(!event.is_set().await?);
        /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
        /// ```
        call fn clear() -> () { flag.0 = false }

        /// Returns `true` if the event is set.
        call fn is_set() -> bool { flag.0 }

        /// Waits until the event is set.
        ///
        /// Cancel safe: dropping the future changes nothing.
        ///
        /// # Errors
        /// As [`Proxy::call`].
        wait fn wait() -> () { (None, EventObject::wait, ()) }
    }

    /// Waits as [`wait`](Self::wait), but gives up after `timeout`. The timeout is real time: see
    /// [Timeouts](crate#timeouts). Cancel safe: dropping the future changes nothing.
    ///
    /// # Errors
    /// `Timeout` if the event was not set in time; else as [`Proxy::call`].
    pub async fn wait_timeout(&self, timeout: Duration) -> Result<()> {
        in_time(timeout, self.wait(), "the event was not set").await
    }
}

/// The barrier in the manager.
pub(crate) struct BarrierObject {
    count: usize,
    waiting: Vec<Ticket>,
    /// The parties that may go on, with their indexes; or that may not.
    released: HashMap<Ticket, Option<usize>>,
    is_broken: bool,
}

impl BarrierObject {
    pub(crate) fn new(count: usize) -> Self {
        Self { count, waiting: Vec::new(), released: HashMap::new(), is_broken: false }
    }

    fn wait(&mut self, args: &mut Option<()>, now: Try, answer: &mut Writer) -> Poll<Result<()>> {
        let ticket = now.ticket;
        if args.take().is_some() {
            if self.is_broken {
                return Poll::Ready(Err(broken()));
            }
            self.waiting.push(ticket);
            if self.waiting.len() >= self.count {
                let all = self.waiting.drain(..).enumerate();
                self.released.extend(all.map(|(index, ticket)| (ticket, Some(index))));
            }
        }
        match self.released.remove(&ticket) {
            Some(Some(index)) => Poll::Ready(answer.lend_part(&index)),
            Some(None) => Poll::Ready(Err(broken())),
            None if now.is_late => {
                self.leave(ticket);
                Poll::Ready(Err(too_late("not all parties came")))
            }
            None => Poll::Pending,
        }
    }

    /// A party that waits leaves, and so breaks it.
    fn leave(&mut self, ticket: Ticket) {
        if let Some(at) = self.waiting.iter().position(|waiting| *waiting == ticket) {
            self.waiting.swap_remove(at);
            self.dismiss(true);
        }
    }

    fn dismiss(&mut self, is_broken: bool) {
        self.is_broken = is_broken;
        self.released.extend(self.waiting.drain(..).map(|ticket| (ticket, None)));
    }
}

fn broken() -> Error {
    let why = "the barrier is broken: somebody left it, or broke it; reset it";
    Error::new(ErrorKind::BrokenBarrier, why).explained_by(Topic::BarrierBroken)
}

impl Waits for BarrierObject {
    fn settle(&mut self, ticket: Ticket, _: End) {
        self.leave(ticket);
        self.released.remove(&ticket);
    }
}

/// A handle of a barrier that lives in a manager's process: a fixed number of parties wait for each other.
///
/// Created by [`Manager::barrier`](crate::Manager::barrier). It is for programs that share no memory, such as those on
/// several hosts; among processes of one program, [`Barrier`](crate::Barrier) is faster.
///
/// ```
/// use multiprocess::{self as mp, Manager};
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let manager = Manager::start().await?;
///         let barrier = manager.barrier(2).await?;
///         let (one, two) = futures::try_join!(barrier.wait(), barrier.wait())?;
///         assert_eq!(one + two, 0 + 1);
///         manager.shutdown().await
///     })
/// }
/// ```
///
/// # Details
/// - **Dropped futures.** A dropped [`wait`](Self::wait) breaks the barrier. For the other methods see [`Proxy`].
/// - **Death.** If a process that waits is killed or disconnected, the barrier breaks: all waiting calls fail with
///   [`BrokenBarrier`](ErrorKind::BrokenBarrier), and so do later ones, until it is [reset](Self::reset).
/// - **Cost.** One call for each method.
pub struct BarrierProxy(pub(crate) Proxy<BarrierObject>);

impl BarrierProxy {
    calls! { parties: BarrierObject;
        /// Waits until all parties wait. Returns a different number for each of them, from 0 on.
        ///
        /// Dropping it before all parties wait breaks the barrier.
        ///
        /// # Errors
        /// `BrokenBarrier` if the barrier is broken, or breaks or is reset meanwhile; else as [`Proxy::call`].
        wait fn wait() -> usize { (None, BarrierObject::wait, ()) }

        /// Waits as [`wait`](Self::wait), but gives up after `timeout`.
        ///
        /// Giving up breaks the barrier, unless the last party has arrived or the request was never sent. The manager decides, and this
        /// call waits for its answer. Time is real time: see [Timeouts](crate#timeouts).
        ///
        /// # Errors
        /// `Timeout` if not all parties arrived in time; else as [`wait`](Self::wait). Dropping the future breaks the
        /// barrier, as with `wait`.
        wait fn wait_timeout(timeout: Duration) -> usize { (Some(timeout), BarrierObject::wait, ()) }

        /// Breaks the barrier: all that wait fail, and all that come, until it is [reset](Self::reset).
        call fn abort() -> () { parties.dismiss(true) }

        /// Makes the barrier usable again. Callers that wait fail with `BrokenBarrier`.
        ///
        /// ```
        /// # multiprocess::init();
        /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
        /// let manager = multiprocess::Manager::start().await?;
        /// let barrier = manager.barrier(2).await?;
        /// assert_eq!(barrier.parties().await?, 2);
        /// barrier.abort().await?;
        /// assert!(barrier.is_broken().await?);
        /// barrier.reset().await?;
        /// assert!(!barrier.is_broken().await?);
        /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
        /// ```
        call fn reset() -> () { parties.dismiss(false) }

        /// Returns the number of parties.
        call fn parties() -> usize { parties.count }

        /// Returns the number of parties that wait.
        call fn waiting() -> usize { parties.waiting.len() }

        /// Returns `true` if the barrier is broken.
        call fn is_broken() -> bool { parties.is_broken }
    }
}
