//! Sends and receives messages of bytes between programs, on one machine or several.
//!
//! The other end is this module, or an unmodified `multiprocessing.connection` of CPython.
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
//! The same client in Python:
//!
//! ```python
//! from multiprocessing.connection import Client
//! with Client(("127.0.0.1", 7000), authkey=b"secret") as there:
//!     there.send_bytes(b"hello")
//! ```
//!
//! In Python use `send_bytes`, and agree on the meaning of the bytes. Python's `send(object)` sends a pickle, which only
//! Python can read.
//!
//! # Addresses
//!
//! | address | transport | allowed to connect |
//! |---|---|---|
//! | `"127.0.0.1:7000"` `"[::1]:7000"` `"localhost:7000"` | TCP; port 0 picks a free one | everybody that the network lets through |
//! | `"/run/me/socket"` (any text with a slash) | a Unix socket with a path, of mode 0600 | this user; [`Connect::owner`] names the user of another listener |
//! | `"\0name"` | an abstract Unix socket: no file, no permissions | everybody on this machine |
//!
//! # Security
//!
//! - Without a key every program that can connect is trusted.
//! - With a key both ends prove that they know it, by HMAC of random bytes. The key itself is never sent.
//! - Nothing is encrypted. An attacker who can change the bytes on their way can take over an authenticated connection. Across
//!   networks of others use TLS (feature `tls`, `tls` of [`Bind`] and [`Connect`]).
//! - This end asks for HMAC-SHA-256, which CPython supports since 3.12, and answers with the digest that the other end
//!   asks for: SHA-256, SHA-384 or MD5. CPython up to 3.11 supports only HMAC-MD5, which is accepted unless
//!   `allow_md5(false)` is set. The other end chooses, so only with `allow_md5(false)` is each proof made with SHA-2.
//! - Before the handshake is done, a peer can send 256 bytes per step and has [`Bind::handshake_timeout`] for all steps.
//!   Handshakes of different peers do not wait for each other.
//! - A message's length is checked against [`Bind::max_message`] before memory is allocated, and memory grows only with
//!   the bytes that arrive.
//!
//! # Death
//! - A program that ends, by SIGKILL too, closes its connections; the other end gets `Closed` after the last message.
//! - A host that is switched off or cut off closes nothing. The kernel probes a TCP connection that was silent for 30
//!   seconds (`SO_KEEPALIVE`) and gives up after 30 more. Receiving then fails with `Io`, sending with `Closed` or
//!   `Io`, and a manager's proxies with `Closed`.
//! - While sent bytes are not acknowledged, the kernel repeats them instead, for some 15 minutes (`tcp_retries2`).
//! - A program that is slow to answer or to read counts as alive. A deadline for that is the caller's.
#![forbid(unsafe_code)]

/// The setters that [`Connect`] and [`Bind`] have in common.
macro_rules! options_of_both_ends {
    () => {
        /// Sets the longest message that is received, in bytes. Default: 256 MiB. Sending has no limit.
        pub fn max_message(mut self, bytes: usize) -> Self {
            self.max_message = bytes;
            self
        }

        /// Sets whether HMAC-MD5, the only digest of CPython up to 3.11, is accepted and given as a proof. Default: true.
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

/// The default limit for connecting, and again for the handshake.
const PATIENCE: Duration = Duration::from_secs(10);
/// The default limit for received messages.
const MAX_MESSAGE: usize = 256 << 20;

#[cfg(feature = "tls")]
fn insecure(error: std::io::Error) -> crate::error::Error {
    use crate::error::{Error, ErrorKind, Topic};
    let why = format!("authentication failed: no TLS with the other end: {error}");
    Error::new(ErrorKind::Authentication, why).explained_by(Topic::NoTls).with_source(error)
}
