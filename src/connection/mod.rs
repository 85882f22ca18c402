//! Messages of bytes between programs, on one machine or many: the other end may be CPython's
//! `multiprocessing.connection`, unmodified, or this module.
//!
//! ```
//! use multiprocess::{self as mp, connection::{Listener, connect}};
//!
//! # mp::init();
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! let listener = Listener::bind("127.0.0.1:0").authkey(b"secret").await?;
//! let address = listener.local_addr();
//! let client = tokio::spawn(async move {
//!     let there = connect(&address, Some(b"secret")).await?;
//!     there.send_bytes(b"hello").await
//! });
//! let here = listener.accept().await?;
//! assert_eq!(here.recv_bytes().await?, b"hello");
//! client.await.unwrap()?;
//! # Ok::<_, mp::Error>(()) }).unwrap();
//! ```
//!
//! In Python the client is
//!
//! ```python
//! from multiprocessing.connection import Client
//! with Client(("127.0.0.1", 7000), authkey=b"secret") as there:
//!     there.send_bytes(b"hello")
//! ```
//!
//! Python's `send(object)` sends a pickle, which is a program; use `send_bytes` and agree on what the bytes mean.
//!
//! # Addresses
//!
//! | address | what it is | who can connect |
//! |---|---|---|
//! | `"127.0.0.1:7000"` `"[::1]:7000"` `"localhost:7000"` | TCP; port 0 picks a free one | whom the network lets |
//! | `"/run/me/socket"` (any text with a slash) | a Unix socket with a path, of mode 0600 | this user ([`Connect::owner`]: another's listener) |
//! | `"\0name"` | an abstract Unix socket: no file, no permissions | everybody on this machine |
//!
//! # What a key protects from
//!
//! With a key both ends prove that they know it, by HMAC of random bytes, and the key does not travel. Nothing is
//! encrypted, and who can change the bytes under way can take over a connection once it is authenticated: across
//! networks that are not yours, put TLS below (feature `tls`, `tls` of [`Bind`] and [`Connect`]). Without a key, whoever
//! can connect is trusted.
//!
//! This end asks for HMAC-SHA-256, which CPython knows since 3.12, and answers with the digest that the other end asks
//! for: SHA-256, SHA-384 or MD5. CPython up to 3.11 knows only HMAC-MD5; that is taken too, unless
//! `allow_md5(false)` says otherwise. It is the other end that chooses, so only with `allow_md5(false)` is
//! a proof always made with SHA-2.
//!
//! # Strangers
//!
//! Before the handshake is done a peer can send 256 bytes per step, and has [`Bind::handshake_timeout`] for all of
//! them; handshakes of different peers do not wait for each other. A message's length is checked against
//! [`Bind::max_message`] before anything is allocated, and memory grows only with what arrives.
//!
//! # Hosts that vanish
//! A program that ends, however it does, closes its connections, and the other end is told. A host that is switched off or
//! cut off tells nobody. So the kernel asks the other end of a TCP connection whether it is there once that was silent for
//! 30 seconds (`SO_KEEPALIVE`), and gives up after half a minute more without an answer: receiving
//! is then an error of kind `Io`, sending `Closed` or `Io`, and a manager's proxies fail with `Closed`. While something that
//! was sent is not acknowledged the kernel sends it again instead, for some 15 minutes (`tcp_retries2`). What takes its time
//! to answer a message, or to read it, is not gone, and has no deadline but yours.
#![forbid(unsafe_code)]

/// Setters that [`Connect`] and [`Bind`] have in common.
macro_rules! options_of_both_ends {
    () => {
        /// The longest message that is received, in bytes; 256 MiB unless set. Sending has no limit.
        pub fn max_message(mut self, bytes: usize) -> Self {
            self.max_message = bytes;
            self
        }

        /// Whether HMAC-MD5, all that CPython up to 3.11 knows, is proof enough, and given as proof; true unless set.
        pub fn allow_md5(mut self, allow: bool) -> Self {
            self.allow_md5 = allow;
            self
        }
    };
}
use options_of_both_ends;

mod address;
mod auth;
mod client;
mod frame;
mod listener;
mod stream;

pub use client::{Connect, connect};
pub use listener::{Bind, Listener};
pub use stream::{ByteConnection, ByteReceiver, ByteSender};
#[cfg(feature = "tls")]
pub use tokio_rustls::rustls;

use std::time::Duration;

/// What a handshake, and what connecting before it, may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest message that is received.
const MAX_MESSAGE: usize = 256 << 20;

#[cfg(feature = "tls")]
fn insecure(error: std::io::Error) -> crate::error::Error {
    use crate::error::{Error, ErrorKind};
    Error::new(ErrorKind::Authentication, format!("authentication failed: no TLS with the other end: {error}"))
        .with_source(error)
}
