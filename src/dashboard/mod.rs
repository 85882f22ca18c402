//! A page in the browser that shows what pools, queues, managers and locks do.
//!
//! [`Pool::dashboard`] serves it for one pool, a [`Dashboard`] for several pools, queues and managers. The page updates by itself, and
//! needs nothing from the network. Needs the feature `dashboard`. See also the guide's page on [observing](crate::guide::observing).
//!
//! ```
//! use multiprocess::{self as mp, Pool};
//! # fn main() -> mp::Result<()> { mp::run(async {
//! let pool = Pool::new(2)?;
//! let dashboard = pool.dashboard("127.0.0.1:0").await?;
//! println!("open {}", dashboard.url()); // http://127.0.0.1:40123/
//! pool.map(|n: u64| n * n, 0..100).await?;
//! # Ok(()) }) }
//! ```
// In this module:
//
// server.rs    the public types; the tasks that serve              guard.rs     which requests are answered
// recorder.rs  the thread that samples and draws                   history.rs   what was sampled, for as long as it is shown
// lanes.rs     what each worker did and when                       pictures.rs  histories as SVG
// page.rs      the page around them                                drawings.rs  drawings that are shared for a moment
// body.rs      the body of an answer                               limits.rs    how much memory all of it takes at most
#![forbid(unsafe_code)]

mod body;
mod drawings;
mod guard;
mod history;
mod lanes;
#[cfg(test)]
mod limits;
mod page;
mod pictures;
mod recorder;
mod server;

pub use server::{Dashboard, DashboardHandle};

use crate::error::Result;
use crate::pool::Pool;

impl Pool {
    /// Serves a page that shows what this pool does, at an address such as `127.0.0.1:0`, until the handle is dropped.
    ///
    /// The page shows the workers and what they run, the items that wait, throughput, times, memory, dead workers, and all locks that
    /// are held in this program. For more than one pool, or queues and managers beside it, take a [`Dashboard`]; cost and safety stand
    /// there. The page does not keep the pool alive.
    ///
    /// ```
    /// use multiprocess::{self as mp, Pool};
    /// # fn main() -> mp::Result<()> { mp::run(async {
    /// let pool = Pool::new(2)?;
    /// let dashboard = pool.dashboard("127.0.0.1:0").await?;
    /// assert!(dashboard.address().ip().is_loopback());
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`Dashboard::serve`].
    pub async fn dashboard(&self, address: &str) -> Result<DashboardHandle> {
        Dashboard::new().pool("pool", self).serve(address).await
    }
}
