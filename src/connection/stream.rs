//! A connection and its two halves, over any byte stream.

use super::auth::{self, Key, Role};
use super::frame::{FrameReader, FrameWriter};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::{fork, fork::Own, socket, timer};
use futures_util::{Sink, Stream};
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Mutex;

type Reader = Box<dyn AsyncRead + Send + Sync + Unpin>;
type Writer = Box<dyn AsyncWrite + Send + Sync + Unpin>;

/// A connection to another program that sends and receives whole messages of bytes.
///
/// Made by [`connect`](super::connect) and [`Listener::accept`](super::Listener::accept). It is also a `Stream` of the
/// received messages, which ends when the other end closes, and a `Sink` of messages to send. Between processes of one program use a
/// [`pipe`](crate::pipe()) instead, which carries values and handles.
///
/// ```
/// use futures::{SinkExt, StreamExt};
/// use multiprocess::{self as mp, connection::{Listener, connect}};
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let listener = Listener::bind("\0multiprocess-doc-stream").await?;
/// let mut there = connect(&listener.local_addr(), None).await?;
/// let here = listener.accept().await?;
/// there.feed(b"one".to_vec()).await?;
/// there.send(b"two".to_vec()).await?;
/// drop(there);
/// let messages: Vec<_> = here.map(|message| message.unwrap()).collect().await;
/// assert_eq!(messages, [b"one", b"two"]);
/// # Ok::<_, mp::Error>(()) }).unwrap();
/// ```
///
/// - Sharing: all methods take `&self`, so several tasks can use one connection. Concurrent messages are sent one after the
///   other; each message is received by one task. A call that has begun and is not polled holds up the others of its direction: poll it on, or drop
///   it.
/// - Drop: closes the connection. The other end receives the messages that were sent, and then `Closed`.
pub struct ByteConnection {
    sender: ByteSender,
    receiver: ByteReceiver,
}

/// The sending half of a [`ByteConnection`], from [`split`](ByteConnection::split).
///
/// Dropping it ends the messages that the other end receives.
///
/// ```
/// # use multiprocess::{self as mp, connection::{Listener, connect}};
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let listener = Listener::bind("\0multiprocess-doc-sender").await?;
/// let (sender, receiver) = connect(&listener.local_addr(), None).await?.split();
/// let here = listener.accept().await?;
/// sender.send_bytes(b"the last one").await?;
/// drop(sender);
/// assert_eq!(here.recv_bytes().await?, b"the last one");
/// assert_eq!(here.recv_bytes().await.unwrap_err().kind(), mp::ErrorKind::Closed);
/// here.send_bytes(b"still open").await?;
/// assert_eq!(receiver.recv_bytes().await?, b"still open");
/// # Ok::<_, mp::Error>(()) }).unwrap();
/// ```
pub struct ByteSender {
    writer: Mutex<Own<FrameWriter<Writer>>>,
    peer: Arc<str>,
}

/// The receiving half of a [`ByteConnection`], from [`split`](ByteConnection::split). See [`ByteSender`] for an example.
pub struct ByteReceiver {
    reader: Mutex<Own<FrameReader<Reader>>>,
    /// The other end may be a listener that wants a key, which this end does not have; its first message shows that.
    expects_challenge: std::sync::atomic::AtomicBool,
    peer: Arc<str>,
    /// The stream has ended with an error.
    is_over: bool,
}

impl ByteConnection {
    /// Sends one message, of any length. Waits while the other end has no room for it.
    ///
    /// Cancel safe: if the future is dropped, either nothing is sent, or a background task sends the rest of the
    /// message before any other. If the connection is dropped as well, that task has 30 seconds.
    ///
    /// # Errors
    /// - `Closed` if the other end is gone, or the runtime of the connection has ended.
    /// - `Io` if the system reports another error, for example that a vanished host was given up.
    pub async fn send_bytes(&self, message: &[u8]) -> Result<()> {
        self.sender.send_bytes(message).await
    }

    /// Receives one message. Waits while there is none.
    ///
    /// It costs one allocation; small messages that arrive together share a system call. Cancel safe: a dropped future has
    /// received nothing, not even part of a message.
    ///
    /// # Errors
    /// - `Closed` after the last message of the other end.
    /// - `Decode` if a message is longer than `max_message`, or the bytes are not a message.
    /// - `Io` if the other end goes away in the middle of a message, or its host has vanished.
    /// - `Authentication` from the first call, if the other end has a key and this end was connected without one.
    ///
    /// After any of these, receiving is `Closed`; sending still works.
    pub async fn recv_bytes(&self) -> Result<Vec<u8>> {
        self.receiver.recv_bytes().await
    }

    /// Waits for up to `timeout` until a whole message can be received, and returns whether one can.
    ///
    /// It takes nothing. It is true also where `recv_bytes` would fail at once. The time is real time: see
    /// [Timeouts](crate#timeouts). Dropping the future changes nothing.
    ///
    /// # Errors
    /// `Io` outside a tokio runtime, and in one without its timer.
    pub async fn poll(&self, timeout: Duration) -> Result<bool> {
        self.receiver.poll(timeout).await
    }

    /// Returns the address of the other end: host and port for TCP; for a Unix socket the address that was connected to, or
    /// an empty text on the listener's side.
    ///
    /// ```
    /// # multiprocess::init();
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use multiprocess::connection::{Listener, connect};
    /// let listener = Listener::bind("127.0.0.1:0").await?;
    /// let client = connect(&listener.local_addr(), None).await?;
    /// assert_eq!(client.peer_addr(), listener.local_addr());
    /// let (sender, receiver) = client.split();
    /// assert_eq!(sender.peer_addr(), receiver.peer_addr());
    /// # Ok::<_, multiprocess::Error>(()) }).unwrap();
    /// ```
    pub fn peer_addr(&self) -> &str {
        &self.sender.peer
    }

    /// Splits the connection into its two directions, for two tasks.
    pub fn split(self) -> (ByteSender, ByteReceiver) {
        (self.sender, self.receiver)
    }

    pub(crate) fn of_tcp(stream: TcpStream, peer: String) -> io::Result<Raw> {
        prepare_tcp(&stream)?;
        let (read, write) = stream.into_split();
        Ok(Raw { reader: Box::new(read), writer: Box::new(write), peer })
    }

    pub(crate) fn of_unix(stream: UnixStream, peer: String) -> Raw {
        let (read, write) = stream.into_split();
        Raw { reader: Box::new(read), writer: Box::new(write), peer }
    }
}

/// Has every message sent at once, and a vanished host noticed.
pub(crate) fn prepare_tcp(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    socket::watch_host(stream.as_fd())
}

/// A stream before the handshake.
pub(crate) struct Raw {
    reader: Reader,
    writer: Writer,
    peer: String,
}

impl Raw {
    /// Any other stream.
    #[cfg_attr(not(feature = "tls"), allow(dead_code, reason = "TLS is the only other kind so far"))]
    pub(crate) fn of<S: AsyncRead + AsyncWrite + Send + 'static>(stream: S, peer: String) -> Self
    where
        tokio::io::ReadHalf<S>: Sync + Unpin,
        tokio::io::WriteHalf<S>: Sync + Unpin,
    {
        let (read, write) = tokio::io::split(stream);
        Self { reader: Box::new(read), writer: Box::new(write), peer }
    }

    /// Does the handshake, if there is a key, within `patience`.
    pub(crate) async fn open(
        self,
        role: Role,
        key: Option<&Key>,
        patience: Duration,
        max_message: usize,
    ) -> Result<ByteConnection> {
        let mut writer = FrameWriter::new(self.writer);
        let mut reader = FrameReader::new(self.reader, auth::LONGEST);
        if let Some(key) = key {
            let handshake = auth::authenticate(&mut reader, &mut writer, key, role);
            timer::within(patience, handshake).await.unwrap_or_else(|_| {
                let why = format!("authentication failed: the other end did not do its part within {patience:?}");
                Err(Error::new(ErrorKind::Authentication, why).explained_by(Topic::HandshakeCut))
            })?;
        }
        reader.set_limit(max_message as u64);
        let peer: Arc<str> = self.peer.into();
        Ok(ByteConnection {
            sender: ByteSender { writer: Mutex::new(Own::new(writer)), peer: peer.clone() },
            receiver: ByteReceiver {
                reader: Mutex::new(Own::new(reader)),
                expects_challenge: (role == Role::Client && key.is_none()).into(),
                peer,
                is_over: false,
            },
        })
    }
}

impl ByteSender {
    /// Sends one message; waits and drops as [`ByteConnection::send_bytes`].
    ///
    /// # Errors
    /// As [`ByteConnection::send_bytes`].
    pub async fn send_bytes(&self, message: &[u8]) -> Result<()> {
        fork::check()?;
        self.writer.lock().await.send(message).await
    }

    /// Returns the address of the other end; see [`ByteConnection::peer_addr`].
    pub fn peer_addr(&self) -> &str {
        &self.peer
    }
}

impl ByteReceiver {
    /// Receives one message; waits and drops as [`ByteConnection::recv_bytes`].
    ///
    /// # Errors
    /// As [`ByteConnection::recv_bytes`].
    pub async fn recv_bytes(&self) -> Result<Vec<u8>> {
        fork::check()?;
        let received = self.reader.lock().await.recv().await;
        self.refuse_challenge(received)
    }

    /// Waits at most `timeout` until a message can be received, and returns `true` if one can; drops as
    /// [`ByteConnection::poll`].
    ///
    /// # Errors
    /// `Io` outside a tokio runtime, and in one without its timer.
    pub async fn poll(&self, timeout: Duration) -> Result<bool> {
        fork::check()?;
        let ready = async {
            let mut reader = self.reader.lock().await;
            poll_fn(|cx| reader.poll_ready(cx)).await;
        };
        // The future is polled before the clock, so that a timeout of zero still checks.
        let limited = timer::limited(timeout, ready).map_err(|error| Error::io("cannot wait for a message", error))?;
        Ok(limited.await.is_ok())
    }

    /// Returns the address of the other end; see [`ByteConnection::peer_addr`].
    pub fn peer_addr(&self) -> &str {
        &self.peer
    }

    /// A challenge as the first message means that the listener has a key and this client has none.
    fn refuse_challenge(&self, received: Result<Vec<u8>>) -> Result<Vec<u8>> {
        use std::sync::atomic::Ordering::Relaxed;
        if self.expects_challenge.load(Relaxed)
            && self.expects_challenge.swap(false, Relaxed)
            && received.as_ref().is_ok_and(|message| auth::is_challenge(message))
        {
            let why = "the other end wants authentication, and this one was connected without a key";
            return Err(Error::new(ErrorKind::Authentication, why).explained_by(Topic::WrongKey));
        }
        received
    }
}

impl Stream for ByteReceiver {
    type Item = Result<Vec<u8>>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.is_over {
            return Poll::Ready(None);
        }
        fork::check().inspect_err(|_| this.is_over = true)?;
        let received = ready!(this.reader.get_mut().poll_recv(cx));
        Poll::Ready(match this.refuse_challenge(received) {
            Err(error) if error.kind() == ErrorKind::Closed => None,
            received => Some(received),
        })
    }
}

impl Sink<Vec<u8>> for ByteSender {
    type Error = Error;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        fork::check()?;
        self.get_mut().writer.get_mut().poll_ready(cx)
    }

    fn start_send(self: Pin<&mut Self>, message: Vec<u8>) -> Result<()> {
        self.get_mut().writer.get_mut().buffer(&message);
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        fork::check()?;
        self.get_mut().writer.get_mut().poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        fork::check()?;
        self.get_mut().writer.get_mut().poll_close(cx)
    }
}

impl Stream for ByteConnection {
    type Item = Result<Vec<u8>>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.get_mut().receiver).poll_next(cx)
    }
}

impl Sink<Vec<u8>> for ByteConnection {
    type Error = Error;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.get_mut().sender).poll_ready(cx)
    }

    fn start_send(self: Pin<&mut Self>, message: Vec<u8>) -> Result<()> {
        Pin::new(&mut self.get_mut().sender).start_send(message)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.get_mut().sender).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.get_mut().sender).poll_close(cx)
    }
}

macro_rules! names_its_peer {
    ($($name:ident)*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).field("peer", &self.peer_addr()).finish_non_exhaustive()
            }
        }
    )*};
}

names_its_peer!(ByteConnection ByteSender ByteReceiver);
