//! The guide: from a first program to a service on many machines.
//!
//! Begin with [a first program](first_program), then find out [which one you need](which_one), or how it is called if you come [from Python](from_python). By
//! task: [processes], [pools], [services], [pipelines], [sharing memory](sharing), [crashing and hostile libraries](hostile),
//! [many machines](many_machines), [testing], [observing]. To look up: [values], [costs], [limits],
//! [where it runs](where_it_runs), [troubleshooting].
//!
//! Each page stands in `docs/guide` of the repository too, as a book for mdBook. Its examples are compiled and run as tests.
#![forbid(unsafe_code)]

/// A page: its links lead to other pages here, and to other files in the book. The first definition of a link counts.
macro_rules! pages {
    ($($(#[$what:meta])* $name:ident = $file:literal;)*) => {$(
        $(#[$what])*
        #[doc = ""]
        #[doc = include_str!("links.md")]
        #[doc = ""]
        #[doc = include_str!(concat!("../../docs/guide/", $file))]
        pub mod $name {}
    )*};
}

pages! {
    /// A program with a child process and a pool, in five minutes.
    first_program = "first-program.md";
    /// Which type to use for which purpose.
    which_one = "which-one.md";
    /// Each public name of Python's `multiprocessing`, of `concurrent.futures` and of joblib, beside ours.
    from_python = "from-python.md";
    /// One function in one child: [`Process`](crate::Process), [`ProcessBuilder`](crate::ProcessBuilder), [`Group`](crate::Group), [`preload`](crate::preload).
    processes = "processes.md";
    /// Many tasks on a few processes: [`Pool`](crate::Pool), [`PoolBuilder`](crate::PoolBuilder), [`Checkout`](crate::Checkout), [`StatePool`](crate::StatePool).
    pools = "pools.md";
    /// Deadlines, shedding load, and a graceful stop under systemd, Kubernetes and Ctrl-C.
    services = "services.md";
    /// Values that flow from process to process: [`Queue`](crate::Queue), [`simplex`](crate::simplex), [`PoolStreamExt`](crate::PoolStreamExt).
    pipelines = "pipelines.md";
    /// Values that are moved and values that are copied: [`Value`](crate::Value), [`Array`](crate::Array), [`SharedMemory`](crate::SharedMemory), [`Manager`](crate::Manager).
    sharing = "sharing.md";
    /// How values travel, with every serde attribute.
    values = "values.md";
    /// Libraries that crash, hang, leak, or should not be trusted.
    hostile = "hostile.md";
    /// `test_support!`, nextest, coverage, and tokio's paused time.
    testing = "testing.md";
    /// Observing a running program: [`Pool::stats`](crate::Pool::stats), progress, `tracing`, [`debug::dump`](crate::debug::dump).
    ///
    // The files of the book, within the text: rustdoc takes no others along.
    #[doc = include_str!("pictures.md")]
    observing = "observing.md";
    /// The cost of each operation, and how to measure it.
    costs = "costs.md";
    /// Sizes, numbers, depths, and operations that are not possible.
    limits = "limits.md";
    /// The systems that the crate was tried on, and its requirements.
    where_it_runs = "where-it-runs.md";
    /// Symptoms, their causes, and what to do.
    troubleshooting = "troubleshooting.md";
}

/// A pool on many machines, by the feature `cluster`.
///
#[doc = include_str!("links.md")]
///
// Its program needs the feature.
#[cfg_attr(feature = "cluster", doc = include_str!("../../docs/guide/many-machines.md"))]
#[cfg_attr(not(feature = "cluster"), doc = "This page needs the feature: `cargo doc --features cluster`.")]
pub mod many_machines {}
