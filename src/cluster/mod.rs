//! A pool on many machines: a program submits items, and every host that serves the pool runs some of them.
//!
//! An item runs once as a rule. It runs again if its host was lost, cut off or ended while it held the item, and after a failure that `retries` covers.
//! Its caller gets exactly one result. Side effects are not undone. The guide's page is [a pool on many machines](crate::guide::many_machines). Needs the feature `cluster`, and Rust 1.89.
//!
//! ```
//! use multiprocess::{self as mp, Pool, cluster::Address};
//! use std::time::Duration;
//!
//! fn area((width, height): (u32, u32)) -> u32 {
//!     width * height
//! }
//!
//! # fn main() -> mp::Result<()> { mp::run(async {
//! // Without a server the call fails after `offline_timeout`. It is never run in this process.
//! let address = Address::new("nats://127.0.0.1:1/areas").offline_timeout(Duration::from_millis(50));
//! let pool = Pool::builder().cluster(address).build()?;
//! let error = pool.apply(area, ((3, 4),)).await.unwrap_err();
//! assert_eq!(error.kind(), mp::ErrorKind::Unavailable);
//! # Ok(()) }) }
//! ```
// In this module:
//
// address.rs    servers, pool, credentials              link.rs      the connection, and what can be wrong with it
// messages.rs   between submitters and hosts          stream.rs    the pool's stream and its consumers
// submitter/    takes a pool's orders, holds them       roster.rs    the hosts that it knows
// serving.rs    the type of a host                      host/        pulls messages, keeps leases
// job.rs        one message at a host                   pulls.rs     how many to ask for
// pieces.rs     large values                            waiting.rs   for what may not be there
#![forbid(unsafe_code)]

mod address;
mod host;
mod job;
mod link;
mod messages;
mod pieces;
mod pulls;
mod roster;
mod serving;
mod stream;
mod submitter;
mod waiting;

pub use address::{Address, Storage};
pub use roster::HostInfo;
pub use serving::{Served, Serving};

use crate::os::image;
use crate::pool::{ChunkLimits, External, Pool, PoolBuilder};
use std::any::Any;
use std::time::Duration;
use submitter::Submitter;
use tokio::sync::mpsc;

/// So much goes into one message.
const CHUNKS: ChunkLimits = ChunkLimits { time: Duration::from_millis(20), items: 4096, bytes: 256 << 10 };

impl PoolBuilder {
    /// Makes a pool whose workers are those of all hosts that serve at this address. [`build`](Self::build) checks the address
    /// and returns. The connection is made in the background, and calls wait for it.
    ///
    /// Calls on this pool mean the same as calls on a pool of worker processes. Arguments and results cross to other
    /// hosts: an item whose argument is or holds a queue, a pipe's end, a lock, shared memory, a proxy or a descriptor fails
    /// with kind `Encode`. Options that shape worker processes belong to the pool that serves; one of them together with this is
    /// an error of `build`.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::builder().cluster("nats://queue.example:4222/thumbs").build()?;
    /// assert_eq!(pool.workers(), 0); // no host has been seen yet
    /// # Ok(()) }) }
    /// ```
    #[must_use]
    pub fn cluster(self, address: impl Into<Address>) -> Self {
        let address = address.into();
        let start = move |orders| {
            let target = address.parse()?;
            Ok(Submitter::start(address, target, image::fingerprint(), orders) as _)
        };
        self.external(External { chunks: CHUNKS, start: Box::new(start) })
    }
}

impl Pool {
    /// Lends this pool's workers to a cluster pool: items that submitters send to this address run here, beside local calls. Starts
    /// at once, and goes on until it is [drained](Serving::drain) or dropped.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(2)?;
    /// let serving = pool.serve("nats://127.0.0.1:4222/thumbs");
    /// drop(serving); // or await it, until drained
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// When awaited:
    /// - `Other` if the address is invalid.
    /// - `Unavailable` if the server refuses this user, is too old or has no JetStream, or if the pool's stream was made with other
    ///   properties.
    /// - `Closed` if this pool is closed or terminated; what it had taken goes to other hosts.
    /// - `Other` if this pool has no working worker ([`broken`](Self::broken)); what it had taken goes to other hosts.
    /// - `Unsupported` if this pool has no worker processes: it is a cluster pool, or within this process.
    pub fn serve(&self, address: impl Into<Address>) -> Serving {
        let (commands, commanded) = mpsc::unbounded_channel();
        let service = host::serve(self.clone(), address.into(), image::fingerprint(), commanded);
        Serving::new(self.runtime().spawn(service), commands)
    }

    /// Returns the hosts that serve this cluster pool and have been seen lately; none for any other pool.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// assert!(Pool::new(1)?.hosts().is_empty());
    /// # Ok(()) }) }
    /// ```
    pub fn hosts(&self) -> Vec<HostInfo> {
        let submitter = self.taker().and_then(|taker| (&**taker as &dyn Any).downcast_ref::<Submitter>());
        submitter.map(Submitter::hosts).unwrap_or_default()
    }
}
