//! Connecting to a listener.

use super::address::Address;
use super::auth::{Key, Role};
#[cfg(feature = "tls")]
use super::stream;
use super::stream::{ByteConnection, Raw};
use super::{MAX_MESSAGE, PATIENCE};
use crate::error::{Error, ErrorKind, Explained, Result, Topic};
use crate::os::{fork, listen, reactor, rights, timer};
use std::fmt;
use std::future::{Future, IntoFuture};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;
use tokio::net::{TcpStream, UnixStream};

/// Connects to a [`Listener`](super::Listener), or a CPython listener, at `address`.
///
/// Await it, or set options first. With a key, both ends prove that they know it; an empty key is a key.
///
/// ```
/// use multiprocess::{self as mp, connection::connect};
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let error = connect("/nobody/is/here", None).await.unwrap_err();
/// assert_eq!(error.kind(), mp::ErrorKind::Io);
/// # });
/// ```
///
/// A dropped future has not connected. The listener may then see a failed handshake.
///
/// # Errors
/// - `Io` if there is no listener (no such path, refused, not permitted), if the socket file belongs to another user
///   ([`Connect::owner`]), or without a tokio runtime with I/O and timer (`enable_all`).
/// - `Authentication` if the other end has another key, no key, or does not answer in time.
/// - `Timeout` if there is no connection in time.
/// - `Io` if a host name cannot be resolved.
/// - `Other` if the address cannot be parsed, or `tls` is set and the address is not TCP.
pub fn connect(address: &str, key: Option<&[u8]>) -> Connect {
    let key = key.map(|bytes| Key::new(bytes, true));
    Connect {
        address: address.to_string(),
        key,
        allow_md5: true,
        patience: PATIENCE,
        max_message: MAX_MESSAGE,
        owner: None,
        #[cfg(feature = "tls")]
        tls: None,
    }
}

/// The options of a connection, made by [`connect`]; awaiting it connects.
///
/// ```
/// use multiprocess::{self as mp, connection::{Listener, connect}};
/// use std::time::Duration;
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let listener = Listener::bind("[::1]:0").authkey(b"key").await?;
/// let there = connect(&listener.local_addr(), Some(b"key"))
///     .allow_md5(false)
///     .handshake_timeout(Duration::from_secs(2))
///     .max_message(1 << 20)
///     .await?;
/// # drop(there);
/// # Ok::<_, mp::Error>(()) }).unwrap();
/// ```
#[must_use = "it does nothing unless awaited"]
pub struct Connect {
    address: String,
    key: Option<Key>,
    allow_md5: bool,
    patience: Duration,
    max_message: usize,
    owner: Option<u32>,
    #[cfg(feature = "tls")]
    tls: Option<(tokio_rustls::TlsConnector, String)>,
}

impl Connect {
    /// Limits the time to connect, and again the time of the handshake. Default: 10 seconds, in real time: see
    /// [Timeouts](crate#timeouts).
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.patience = timeout;
        self
    }

    super::options_of_both_ends!();

    /// Permits a Unix socket of the user with this uid, besides those of this process's own user.
    ///
    /// Any user can create a socket first at a path in a directory like /tmp. So a socket file of another user is an
    /// error unless that user is named here. A symbolic link at the end of the path is always an error. An abstract name
    /// has no owner; if a user is named, its listener must run as this process's user or as that one. No effect on TCP.
    ///
    /// ```no_run
    /// # async fn f() -> multiprocess::Result<()> {
    /// // A service that runs as uid 990.
    /// let service = multiprocess::connection::connect("/run/service/socket", Some(b"secret")).owner(990).await?;
    /// # Ok(()) }
    /// ```
    pub fn owner(mut self, uid: u32) -> Self {
        self.owner = Some(uid);
        self
    }

    /// Encrypts the connection, which must be TCP. The listener's certificate must be for `name`.
    ///
    /// ```
    /// use multiprocess::connection::{Connect, connect, rustls};
    /// use std::sync::Arc;
    ///
    /// fn secure(trusted: rustls::RootCertStore) -> Connect {
    ///     let config = rustls::ClientConfig::builder().with_root_certificates(trusted).with_no_client_auth();
    ///     connect("example.org:7000", Some(b"secret")).tls(Arc::new(config), "example.org")
    /// }
    /// ```
    #[cfg(feature = "tls")]
    pub fn tls(mut self, config: std::sync::Arc<tokio_rustls::rustls::ClientConfig>, name: &str) -> Self {
        self.tls = Some((config.into(), name.to_string()));
        self
    }

    async fn run(self) -> Result<ByteConnection> {
        fork::check()?;
        let address = Address::parse(&self.address)?;
        let failed = |error| Error::io(format_args!("cannot connect to {address}"), error);
        reactor::has_io().and_then(|()| reactor::has_timer()).map_err(failed)?;
        let raw = timer::within(self.patience, self.reach(&address)).await.unwrap_or_else(|_| {
            let why = format!("no connection to {address} within {:?}", self.patience);
            Err(Error::new(ErrorKind::Timeout, why))
        })?;
        let key = self.key.map(|key| Key { allow_md5: self.allow_md5, ..key });
        raw.open(Role::Client, key.as_ref(), self.patience, self.max_message).await
    }

    async fn reach(&self, address: &Address) -> Result<Raw> {
        let failed = |error| Error::io(format_args!("cannot connect to {address}"), error);
        match address {
            Address::Tcp(text) => {
                let stream = TcpStream::connect(&Address::resolve(text).await?[..]).await.map_err(failed)?;
                self.over(stream, text).await
            }
            #[cfg(feature = "tls")]
            _ if self.tls.is_some() => Err(Error::new(ErrorKind::Other, "TLS is for TCP, and this is a Unix socket")),
            Address::Path(path) => {
                let stream = self.to_file(path).await.map_err(failed)?;
                Ok(ByteConnection::of_unix(stream, address.to_string()))
            }
            Address::Abstract(name) => {
                use std::os::unix::ffi::OsStrExt;
                let path = [b"\0", &name[..]].concat();
                let stream = unix(Path::new(std::ffi::OsStr::from_bytes(&path))).await.map_err(failed)?;
                self.check_peer(&stream).map_err(failed)?;
                Ok(ByteConnection::of_unix(stream, address.to_string()))
            }
        }
    }

    /// Connects to the very file that was checked: another file may have its name by now.
    async fn to_file(&self, path: &Path) -> io::Result<UnixStream> {
        let file = listen::file_at(path, self.owner)?;
        match unix(format!("/proc/self/fd/{}", file.as_raw_fd()).as_ref()).await {
            // Without /proc the name may lead to another user's socket by now; the kernel reports whose it is.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let stream = unix(path).await?;
                self.check_user(&stream)?;
                Ok(stream)
            }
            connected => connected,
        }
    }

    /// The user of a listener at an abstract name is known from the kernel only.
    fn check_peer(&self, stream: &UnixStream) -> io::Result<()> {
        if self.owner.is_some() { self.check_user(stream) } else { Ok(()) }
    }

    fn check_user(&self, stream: &UnixStream) -> io::Result<()> {
        match stream.peer_cred()?.uid() {
            uid if Some(uid) == self.owner || uid == rights::effective_user().0 => Ok(()),
            uid => {
                let why = format!("who listens there is the user with uid {uid}");
                Err(Explained::error(io::ErrorKind::PermissionDenied, Topic::NameTaken, why))
            }
        }
    }

    async fn over(&self, stream: TcpStream, text: &str) -> Result<Raw> {
        let failed = |error| Error::io(format_args!("cannot connect to {text}"), error);
        let peer = stream.peer_addr().map_err(failed)?.to_string();
        #[cfg(feature = "tls")]
        if let Some((connector, name)) = &self.tls {
            let name = tokio_rustls::rustls::pki_types::ServerName::try_from(name.clone()).map_err(Error::other)?;
            stream::prepare_tcp(&stream).map_err(failed)?;
            return Ok(Raw::of(connector.connect(name, stream).await.map_err(super::insecure)?, peer));
        }
        ByteConnection::of_tcp(stream, peer).map_err(failed)
    }
}

/// A path that begins with a zero byte is an abstract name, as tokio has it.
async fn unix(path: &Path) -> io::Result<UnixStream> {
    let mut pause = Duration::from_millis(1);
    loop {
        match UnixStream::connect(path).await {
            // The listener's queue is full. TCP would wait in the kernel; a Unix socket that must not block fails with this.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                timer::sleep(pause).await;
                pause = (2 * pause).min(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

impl IntoFuture for Connect {
    type Output = Result<ByteConnection>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}

impl fmt::Debug for Connect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connect").field("address", &self.address).finish_non_exhaustive()
    }
}
