//! Process-based parallelism for async Rust on Linux: what Python's `multiprocessing` does, as futures and streams on tokio.
//!
//! A function runs in another process with its own memory. A panic, a crash or a leak there stays there.
//!
//! ```
//! use multiprocess::{self as mp, Pool, Process};
//!
//! fn square(n: i64) -> i64 {
//!     n * n
//! }
//!
//! fn main() -> mp::Result<()> {
//!     mp::run(async {
//!         let child = Process::spawn(square, (7,))?; // one function in one process
//!         assert_eq!(child.await?, 49);
//!
//!         let pool = Pool::new(4)?; // many tasks on a few processes
//!         assert_eq!(pool.map(square, 1..=5).await?, [1, 4, 9, 16, 25]);
//!         Ok(())
//!     })
//! }
//! ```
//!
//! Any `fn`, `async fn` or closure that captures nothing can run in another process, without an attribute or a registration. Arguments and
//! results are serde values. Queues, pipe ends, locks and the other handles are values too.
//!
//! [`run`] is the first call of `main`; a program with a runtime of its own calls [`init`] there, and a test crate has
//! [`test_support!`] once.
//!
//! # Where to read on
//!
//! The **[guide]** begins with [a first program](guide::first_program) and [which type to use](guide::which_one); it has a page
//! for programmers who come [from Python](guide::from_python), and one that goes [from a symptom to its cause](guide::troubleshooting).
//! The reference is in the modules below. All their names are re-exported at the root: `multiprocess::Pool` is
//! [`multiprocess::pool::Pool`](pool::Pool).
//!
//! # Timeouts
//!
//! Each timeout of this crate counts real time, because other processes do not run on tokio's clock, also in a test that pauses that clock:
//! see [testing](guide::testing#paused-time).
#![cfg_attr(docsrs, feature(doc_cfg))]
// A panic outside tests needs the proof that it cannot happen.
#![cfg_attr(not(test), deny(clippy::unwrap_used))]
// Where `main` begins is what the examples show.
#![allow(clippy::needless_doctest_main)]

pub mod channel;
#[cfg(feature = "cluster")]
pub mod cluster;
pub mod connection;
#[cfg(feature = "dashboard")]
pub mod dashboard;
pub mod error;
// The pages of docs/guide, so that their examples are compiled and run. No other build reads them.
#[cfg(any(doc, doctest))]
pub mod guide;
pub mod manager;
pub mod memory;
#[cfg(feature = "metrics")]
pub mod observe;
#[cfg(all(feature = "dashboard", not(feature = "metrics")))]
mod observe;
mod os;
pub mod pool;
pub mod process;
mod shm;
#[cfg(not(multiprocess_loom))]
pub mod supervision;
pub mod sync;
mod wait;
pub mod wire;

// Each public name of these modules is re-exported at the root.
#[cfg(feature = "dashboard")]
#[doc(no_inline)]
pub use dashboard::*;
#[cfg(feature = "metrics")]
#[doc(no_inline)]
pub use observe::*;
#[cfg(not(multiprocess_loom))]
#[doc(no_inline)]
pub use supervision::*;
#[doc(no_inline)]
pub use {channel::*, error::*, manager::*, memory::*, pool::*, process::*, sync::*, wire::*};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[doc(hidden)]
pub use process::private;

#[cfg(test)]
test_support!();

/// Once in a test or bench crate: its tests can then spawn processes, whatever runs them.
///
/// ```
/// multiprocess::test_support!();
///
/// #[tokio::test]
/// async fn adds() {
///     let sum = multiprocess::Process::spawn(|a: u8, b: u8| a + b, (1, 2)).unwrap().await;
///     assert_eq!(sum.unwrap(), 3);
/// }
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! test_support {
    () => {
        const _: () = {
            use ::core::ffi::{c_char, c_int};
            extern "C" fn start(count: c_int, arguments: *const *const c_char, variables: *const *const c_char) {
                // SAFETY: the C library calls this initialiser, once, with the arguments of the program.
                unsafe { $crate::private::run_initializers_after(start, (count, arguments, variables)) };
                $crate::init();
            }
            // Runs before main, and so before the test harness looks at its arguments or starts a thread.
            #[used]
            #[unsafe(link_section = ".init_array")]
            static START: $crate::private::Initializer = start;
        };
    };
}
