//! Accepts connections, with many handshakes at a time.
//!
//! The accept task of the listener accepts peers from the kernel and starts a task for each handshake. The outcomes
//! wait in a queue for `accept`. While [`BACKLOG`] connections wait there, further peers wait in the kernel.
//!
//! # Floods
//! A peer costs a descriptor and some KiB until its deadline. At [`MOST`] handshakes, or when the process has no
//! descriptor left, the oldest handshake is dropped once it has had [`GRACE`]. At most [`FAILURES`] failures wait for an
//! `accept`; further ones are dropped.

use super::address::Address;
use super::auth::{Key, Role};
#[cfg(feature = "tls")]
use super::stream;
use super::stream::{ByteConnection, Raw};
use super::{MAX_MESSAGE, PATIENCE};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::listen::{self, Made};
use crate::os::sync::lock;
use crate::os::{fork, fork::Own, reactor, timer};
use std::collections::VecDeque;
use std::fmt;
use std::future::{Future, IntoFuture, poll_fn};
use std::io;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};

/// The most handshakes at a time.
const MOST: usize = 4096;
/// The most connections that wait for an `accept`.
const BACKLOG: usize = 128;
/// The most failures that wait for an `accept`.
const FAILURES: usize = 256;
/// The least time of a handshake, however many others come: it takes three round trips.
const GRACE: Duration = Duration::from_millis(500);
/// The pause after the kernel could not accept a connection.
const PAUSE: Duration = Duration::from_millis(10);

/// Accepts connections from other programs, CPython's `multiprocessing.connection.Client` among them.
///
/// [`bind`](Self::bind) makes one, and [`accept`](Self::accept) returns one connection after the other. Between processes of one
/// program use a [`pipe`](crate::pipe()) or a [`Queue`](crate::Queue) instead, which need no address and carry values.
///
/// ```
/// use multiprocess::{self as mp, connection::{Listener, connect}};
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let path = std::env::temp_dir().join(format!("listener-{}", std::process::id()));
/// let listener = Listener::bind(path.to_str().unwrap()).authkey(b"key").await?;
///
/// let stranger = connect(&listener.local_addr(), Some(b"guess")).await;
/// assert_eq!(stranger.unwrap_err().kind(), mp::ErrorKind::Authentication);
/// assert_eq!(listener.accept().await.unwrap_err().kind(), mp::ErrorKind::Authentication);
///
/// let friend = connect(&listener.local_addr(), Some(b"key")).await?;
/// let here = listener.accept().await?;
/// here.send_bytes(b"welcome").await?;
/// assert_eq!(friend.recv_bytes().await?, b"welcome");
///
/// drop(listener);
/// assert!(!path.exists());
/// # Ok::<_, mp::Error>(()) }).unwrap();
/// ```
///
/// - Background: handshakes run in the runtime in which it was bound. When that ends, so does the listener.
/// - Drop: the same as [`close`](Self::close). Accepted connections stay.
pub struct Listener {
    shared: Arc<Shared>,
    local: String,
    accept_task: AbortHandle,
}

impl Listener {
    /// Listens at `address`, in one of the forms of the [module](super#addresses). Await it, or set options first.
    ///
    /// A socket file has mode 0600 from the start. A stale file of this user is replaced. A file of another user is
    /// an error that names the user.
    ///
    /// # Errors
    /// - `Io` if the address is in use or not permitted, or without a tokio runtime with I/O and timer (`enable_all`).
    /// - `Io` if a host name cannot be resolved.
    /// - `Other` if the address cannot be parsed, or `tls` is set and the address is not TCP.
    pub fn bind(address: &str) -> Bind {
        Bind {
            address: address.to_string(),
            key: None,
            allow_md5: true,
            patience: PATIENCE,
            max_message: MAX_MESSAGE,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    /// Waits for the next peer whose handshake is done, and returns the connection to it.
    ///
    /// Cancel safe: a dropped future has taken no peer.
    ///
    /// # Errors
    /// - `Authentication` if a peer did not prove in time that it knows the key, or TLS with it failed. The listener
    ///   goes on.
    /// - `Io` if a peer went away before its handshake was done. The listener goes on.
    /// - `Closed` after [`close`](Self::close), and after the end of the runtime in which it was bound.
    pub async fn accept(&self) -> Result<ByteConnection> {
        fork::check()?;
        loop {
            let mut arrived = pin!(self.shared.arrived.notified());
            arrived.as_mut().enable();
            {
                let mut state = self.shared.state();
                if state.socket.is_none() {
                    return Err(match state.is_closed {
                        true => Error::closed("listener"),
                        false => {
                            let why = "the listener has ended, because its runtime has ended";
                            Error::new(ErrorKind::Closed, why).explained_by(Topic::RuntimeEnded)
                        }
                    });
                }
                if let Some(outcome) = state.outcomes.pop_front() {
                    *state.count_of(&outcome) -= 1;
                    drop(state);
                    self.shared.taken.notify_one();
                    return outcome;
                }
            }
            arrived.await;
        }
    }

    /// Returns the address to connect to, with the actual port if it was bound to port 0.
    pub fn local_addr(&self) -> String {
        self.local.clone()
    }

    /// Stops listening, removes the socket file, and disconnects peers that no `accept` has returned.
    ///
    /// ```
    /// # use multiprocess::{self as mp, connection::Listener};
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// let listener = Listener::bind("127.0.0.1:0").await?;
    /// listener.close();
    /// assert_eq!(listener.accept().await.unwrap_err().kind(), mp::ErrorKind::Closed);
    /// # Ok::<_, mp::Error>(()) }).unwrap();
    /// ```
    pub fn close(&self) {
        // After a fork it belongs to the other process.
        if fork::is_forked() {
            return;
        }
        self.shared.state().is_closed = true;
        self.accept_task.abort();
        self.shared.close();
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("local_addr", &self.local).finish_non_exhaustive()
    }
}

/// The options of a [`Listener`], made by [`Listener::bind`]; awaiting it binds.
///
/// ```
/// use multiprocess::{self as mp, connection::Listener};
/// use std::time::Duration;
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let listener = Listener::bind("127.0.0.1:0")
///     .authkey(b"key")
///     .allow_md5(false)
///     .handshake_timeout(Duration::from_secs(2))
///     .max_message(1 << 20)
///     .await?;
/// # Ok::<_, mp::Error>(()) }).unwrap();
/// ```
#[must_use = "it does nothing unless awaited"]
pub struct Bind {
    address: String,
    key: Option<Key>,
    allow_md5: bool,
    patience: Duration,
    max_message: usize,
    #[cfg(feature = "tls")]
    tls: Option<tokio_rustls::TlsAcceptor>,
}

impl Bind {
    /// Sets the key. Peers must prove that they know it, and this end proves it to them. An empty key is a key.
    pub fn authkey(mut self, key: impl AsRef<[u8]>) -> Self {
        self.key = Some(Key::new(key.as_ref(), self.allow_md5));
        self
    }

    /// Limits the time of a peer's handshake. Default: 10 seconds, in real time: see [Timeouts](crate#timeouts).
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.patience = timeout;
        self
    }

    super::options_of_both_ends!();

    /// Encrypts the connections, which must be TCP, with the certificate in `config`.
    ///
    /// ```
    /// use multiprocess::connection::{Bind, Listener, rustls};
    /// use std::sync::Arc;
    ///
    /// fn secure(config: rustls::ServerConfig) -> Bind {
    ///     Listener::bind("0.0.0.0:7000").authkey(b"secret").tls(Arc::new(config))
    /// }
    /// ```
    #[cfg(feature = "tls")]
    pub fn tls(mut self, config: Arc<tokio_rustls::rustls::ServerConfig>) -> Self {
        self.tls = Some(config.into());
        self
    }

    async fn run(self) -> Result<Listener> {
        fork::check()?;
        let address = Address::parse(&self.address)?;
        let failed = |error| Error::io(format_args!("cannot listen at {address}"), error);
        reactor::has_io().and_then(|()| reactor::has_timer()).map_err(failed)?;
        let (socket, local) = Socket::bind(&address).await.map_err(failed)?;
        #[cfg(feature = "tls")]
        if self.tls.is_some() && !matches!(socket, Socket::Tcp(_)) {
            return Err(Error::new(ErrorKind::Other, "TLS is for TCP, and this is a Unix socket"));
        }
        let state = State {
            socket: Some(Own::new(socket)),
            outcomes: VecDeque::new(),
            connections: 0,
            failures: 0,
            is_closed: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), arrived: Notify::new(), taken: Notify::new() });
        let terms = Terms {
            key: self.key.map(|key| Key { allow_md5: self.allow_md5, ..key }),
            patience: self.patience,
            max_message: self.max_message,
            #[cfg(feature = "tls")]
            tls: self.tls,
        };
        let accept_task = tokio::spawn(accept_peers(Accepting(shared.clone()), Arc::new(terms))).abort_handle();
        Ok(Listener { shared, local, accept_task })
    }
}

impl IntoFuture for Bind {
    type Output = Result<Listener>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}

impl fmt::Debug for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bind").field("address", &self.address).finish_non_exhaustive()
    }
}

/// The requirements for each peer.
struct Terms {
    key: Option<Key>,
    patience: Duration,
    max_message: usize,
    #[cfg(feature = "tls")]
    tls: Option<tokio_rustls::TlsAcceptor>,
}

/// Shared by the listener and its accept task.
struct Shared {
    state: Mutex<State>,
    /// Notifies each `accept` of an outcome.
    arrived: Notify,
    /// Notifies the accept task of room.
    taken: Notify,
}

struct State {
    /// Here and not in the accept task, so that closing the listener closes it at once. `None` once closed.
    socket: Option<Own<Socket>>,
    /// Closed by its owner, not by the end of its runtime.
    is_closed: bool,
    outcomes: VecDeque<Result<ByteConnection>>,
    /// How many outcomes of each kind there are.
    connections: usize,
    failures: usize,
}

impl State {
    fn count_of(&mut self, outcome: &Result<ByteConnection>) -> &mut usize {
        if outcome.is_ok() { &mut self.connections } else { &mut self.failures }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn close(&self) {
        let mut state = self.state();
        let (socket, outcomes) = (state.socket.take(), std::mem::take(&mut state.outcomes));
        drop(state);
        drop((socket, outcomes));
        self.arrived.notify_waiters();
    }

    fn settle(&self, outcome: Result<ByteConnection>) {
        let mut state = self.state();
        if state.socket.is_none() || (outcome.is_err() && state.failures >= FAILURES) {
            return;
        }
        *state.count_of(&outcome) += 1;
        state.outcomes.push_back(outcome);
        drop(state);
        // Each that waits looks, so none depends on another that is not polled.
        self.arrived.notify_waiters();
    }

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Peer>> {
        match &self.state().socket {
            Some(socket) => socket.poll_accept(cx),
            None => Poll::Pending,
        }
    }

    async fn has_room(&self) {
        while self.state().connections >= BACKLOG {
            self.taken.notified().await;
        }
    }
}

/// Closes the listener when its accept task ends, for example with the runtime.
struct Accepting(Arc<Shared>);

impl Drop for Accepting {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Runs until it is aborted, or its runtime ends.
async fn accept_peers(driving: Accepting, terms: Arc<Terms>) {
    let shared = &driving.0;
    let mut handshakes = Handshakes { tasks: JoinSet::new(), by_age: VecDeque::new(), shared: shared.clone() };
    loop {
        shared.has_room().await;
        while handshakes.count() >= MOST {
            handshakes.make_room().await;
        }
        match poll_fn(|cx| shared.poll_accept(cx)).await {
            Ok(peer) => handshakes.begin(peer, terms.clone()),
            Err(error) if is_of_one_peer(&error) => {}
            Err(error) => {
                tracing::debug!(%error, "a listener cannot accept");
                if !(is_out_of_descriptors(&error) && handshakes.make_room().await) {
                    timer::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// Returns `true` if the next accept may succeed.
fn is_of_one_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

fn is_out_of_descriptors(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::MFILE, Errno::NFILE].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

struct Handshakes {
    tasks: JoinSet<()>,
    /// The start of each handshake, the oldest first; some of them are done.
    by_age: VecDeque<(Instant, AbortHandle)>,
    shared: Arc<Shared>,
}

impl Handshakes {
    fn begin(&mut self, peer: Peer, terms: Arc<Terms>) {
        let shared = self.shared.clone();
        let task = self.tasks.spawn(async move {
            let outcome = peer.open(&terms).await;
            shared.settle(outcome);
        });
        self.by_age.push_back((Instant::now(), task));
    }

    /// Returns how many are under way.
    fn count(&mut self) -> usize {
        while self.tasks.try_join_next().is_some() {}
        while self.by_age.front().is_some_and(|(_, task)| task.is_finished()) {
            self.by_age.pop_front();
        }
        if self.by_age.len() >= 2 * MOST {
            self.by_age.retain(|(_, task)| !task.is_finished());
        }
        self.tasks.len()
    }

    /// Waits until one has ended; ends the oldest if need be. False if there is none.
    async fn make_room(&mut self) -> bool {
        self.count();
        let Some((began, _)) = self.by_age.front() else { return false };
        tokio::select! {
            _ = self.tasks.join_next() => return true,
            () = timer::sleep_until(*began + GRACE) => {}
        }
        if let Some((_, oldest)) = self.by_age.pop_front()
            && !oldest.is_finished()
        {
            oldest.abort();
            let why = "authentication failed: the other end was slow while too many others came";
            let error = Error::new(ErrorKind::Authentication, why).explained_by(Topic::HandshakeCut);
            self.shared.settle(Err(error));
            // Its descriptor is closed once its task is gone.
            self.tasks.join_next().await;
        }
        true
    }
}

/// A listening socket.
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
    Path(UnixListener, PathBuf, Made),
}

/// An accepted socket.
enum Peer {
    Tcp(tokio::net::TcpStream, String),
    Unix(tokio::net::UnixStream),
}

impl Socket {
    async fn bind(address: &Address) -> io::Result<(Self, String)> {
        match address {
            Address::Tcp(text) => {
                let addresses = Address::resolve(text).await.map_err(io::Error::other)?;
                let socket = TcpListener::bind(&addresses[..]).await?;
                let local = socket.local_addr()?.to_string();
                Ok((Self::Tcp(socket), local))
            }
            Address::Path(path) => {
                let (socket, made) = listen::at_path(path)?;
                // The first descriptor stays open until it is certain that the file stays, too: see `Made`.
                let socket = match socket.try_clone().and_then(UnixListener::from_std) {
                    Ok(socket) => socket,
                    Err(error) => {
                        listen::remove(path, made);
                        return Err(error);
                    }
                };
                // The program may be in another directory when it is removed.
                let file = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                Ok((Self::Path(socket, file, made), address.to_string()))
            }
            Address::Abstract(name) => {
                let socket = std::os::unix::net::UnixListener::bind_addr(&Address::abstract_name(name)?)?;
                socket.set_nonblocking(true)?;
                Ok((Self::Unix(UnixListener::from_std(socket)?), address.to_string()))
            }
        }
    }

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Peer>> {
        match self {
            Self::Tcp(socket) => {
                let (stream, from) = ready!(socket.poll_accept(cx))?;
                Poll::Ready(Ok(Peer::Tcp(stream, from.to_string())))
            }
            Self::Unix(socket) | Self::Path(socket, ..) => {
                Poll::Ready(Ok(Peer::Unix(ready!(socket.poll_accept(cx))?.0)))
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Self::Path(_, path, made) = self {
            listen::remove(path, *made);
        }
    }
}

impl Peer {
    async fn open(self, terms: &Terms) -> Result<ByteConnection> {
        let raw = self.into_raw(terms).await?;
        raw.open(Role::Listener, terms.key.as_ref(), terms.patience, terms.max_message).await
    }

    async fn into_raw(self, terms: &Terms) -> Result<Raw> {
        #[cfg(not(feature = "tls"))]
        let _ = terms;
        match self {
            Self::Unix(stream) => Ok(ByteConnection::of_unix(stream, String::new())),
            Self::Tcp(stream, from) => {
                #[cfg(feature = "tls")]
                if let Some(tls) = &terms.tls {
                    stream::prepare_tcp(&stream).map_err(|error| Error::io("a peer is gone already", error))?;
                    let accepted = timer::within(terms.patience, tls.accept(stream)).await;
                    let accepted = accepted.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
                    return Ok(Raw::of(accepted.map_err(super::insecure)?, from));
                }
                ByteConnection::of_tcp(stream, from).map_err(|error| Error::io("a peer is gone already", error))
            }
        }
    }
}
