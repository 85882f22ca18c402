//! SIGTERM and Ctrl-C as a future that misses none.
//!
//! tokio reports a signal only to listeners that exist when it arrives. Calls of [`shutdown_signal`] come and go (in a
//! `select!` in a loop, for example), so one pair of listeners lives from the first call on and counts the signals. A signal
//! wakes all calls that wait, and each reads the count.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::os::sync::lock;
use crate::os::{reactor, signal};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Wake, Waker};
use tokio::signal::unix::{Signal, SignalKind};
use tokio::sync::Notify;

/// The signal that [`shutdown_signal`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ShutdownSignal {
    /// SIGINT: Ctrl-C.
    Interrupt,
    /// SIGTERM, which service managers, container runtimes and `kill` send.
    Terminate,
}

impl ShutdownSignal {
    /// Returns the exit code that shells and service managers expect of a program ended by this signal: 130 or 143.
    ///
    /// ```
    /// assert_eq!(multiprocess::ShutdownSignal::Interrupt.exit_code(), 130);
    /// ```
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }
}

impl fmt::Display for ShutdownSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
        })
    }
}

/// Waits until this process is asked to end, by SIGTERM or by SIGINT (Ctrl-C), and returns which signal it was.
///
/// ```
/// use multiprocess::{self as mp, Pool};
/// use std::time::Duration;
///
/// fn main() -> mp::Result<()> {
///     mp::run(async {
///         let pool = Pool::new(2)?;
///         # let _first = futures::FutureExt::now_or_never(mp::shutdown_signal());
///         # let me = rustix::process::getpid();
///         # tokio::spawn(async move { loop {
///         #     tokio::time::sleep(Duration::from_millis(20)).await;
///         #     rustix::process::kill_process(me, rustix::process::Signal::TERM).unwrap();
///         # } });
///         let serve = async { loop { pool.apply(|| 6 * 7, ()).await.unwrap(); } };
///         tokio::select! {
///             () = serve => {}
///             signal = mp::shutdown_signal() => println!("stopping: {}", signal?),
///         }
///         pool.shutdown(Duration::from_secs(10)).await; // One grace for all that runs.
///         Ok(())
///     })
/// }
/// ```
///
/// - From the first poll on these signals no longer end the process; the program decides what to do.
/// - All calls that wait return the same signal. A later call waits for the next one. So a second Ctrl-C, during a
///   long [`Pool::shutdown`](crate::Pool::shutdown) for example, does nothing unless another call waits for it.
/// - A signal that arrives while no call waits is returned by the next call; several count as one. So dropping the future loses
///   nothing.
/// - A signal that the program ignored at its start (`nohup`, `env --ignore-signal`, a shell's `&`) stays ignored.
/// - Pool workers and manager processes do not react to Ctrl-C. Other children do, unless
///   [`shield_signals`](crate::ProcessBuilder::shield_signals) is set.
/// - Several pools share one grace if they are shut down together: `tokio::join!(a.shutdown(grace), b.shutdown(grace))`.
///
/// # Errors
/// `Io` outside a tokio runtime, or in one without its I/O driver.
pub async fn shutdown_signal() -> Result<ShutdownSignal> {
    let from = Arrived::get()?.returned;
    loop {
        let mut notified = std::pin::pin!(NOTIFY.notified());
        notified.as_mut().enable();
        if let Some(signal) = Arrived::get()?.since(from) {
            return Ok(signal);
        }
        notified.await;
    }
}

/// Resolves when this process is asked to end by a signal for which the program has a handler. A signal with its default
/// action needs no listener. Used while the process waits for its children.
pub(super) async fn termination() {
    let kinds = KINDS.iter().filter(|(kind, _)| signal::has_handler(kind.as_raw_value()));
    match Listeners::of(kinds) {
        Ok(mut listeners) => listeners.next().await,
        Err(_) => std::future::pending().await,
    }
}

const KINDS: [(SignalKind, ShutdownSignal); 2] =
    [(SignalKind::interrupt(), ShutdownSignal::Interrupt), (SignalKind::terminate(), ShutdownSignal::Terminate)];

/// Listeners for the signals that arrive after they were made.
struct Listeners(Vec<(Signal, ShutdownSignal)>);

impl Listeners {
    fn new() -> Result<Self> {
        Self::of(KINDS.iter().filter(|(kind, _)| !signal::is_ignored(kind.as_raw_value())))
    }

    fn of<'a>(kinds: impl Iterator<Item = &'a (SignalKind, ShutdownSignal)>) -> Result<Self> {
        let failed = |error| Error::io("cannot listen to signals", error);
        kinds.map(|(kind, name)| Ok((reactor::signals(*kind).map_err(failed)?, *name))).collect::<Result<_>>().map(Self)
    }

    async fn next(&mut self) {
        std::future::poll_fn(|context| {
            let is_ready = self.0.iter_mut().any(|(signal, _)| signal.poll_recv(context).is_ready());
            if is_ready { Poll::Ready(()) } else { Poll::Pending }
        })
        .await
    }

    /// Takes the signal that has arrived. A later one notifies [`NOTIFY`].
    fn take(&mut self) -> Option<ShutdownSignal> {
        let waker = Waker::from(Arc::new(WakeAll));
        let mut context = Context::from_waker(&waker);
        let mut came = self.0.iter_mut().filter_map(|(signal, name)| {
            // Without tokio's budget, which could make it pending though a signal has arrived.
            let came = std::pin::pin!(tokio::task::unconstrained(signal.recv())).poll(&mut context).is_ready();
            came.then_some(*name)
        });
        let first = came.next();
        came.last().or(first)
    }
}

/// Notified when a signal has arrived.
static NOTIFY: Notify = Notify::const_new();

struct WakeAll;

impl Wake for WakeAll {
    fn wake(self: Arc<Self>) {
        NOTIFY.notify_waiters();
    }
}

/// The signals that have arrived since the first call.
struct Arrived {
    listeners: Option<Listeners>,
    count: u64,
    /// The number of the last signal that a call has returned.
    returned: u64,
    last: ShutdownSignal,
}

static ARRIVED: Mutex<Arrived> =
    Mutex::new(Arrived { listeners: None, count: 0, returned: 0, last: ShutdownSignal::Interrupt });

impl Arrived {
    fn get() -> Result<MutexGuard<'static, Self>> {
        let mut arrived = lock(&ARRIVED);
        if arrived.listeners.is_none() {
            arrived.listeners = Some(Listeners::new()?);
        }
        Ok(arrived)
    }

    /// The last signal, if it arrived after number `from`.
    fn since(&mut self, from: u64) -> Option<ShutdownSignal> {
        if let Some(signal) = self.listeners.as_mut().and_then(Listeners::take) {
            (self.count, self.last) = (self.count + 1, signal);
        }
        (self.count > from).then(|| {
            self.returned = self.count;
            self.last
        })
    }
}
