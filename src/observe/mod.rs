//! Figures of pools, queues and managers for those who watch a program from outside.
//!
//! With the feature `metrics`, a [`MetricsReporter`] hands them to the recorder of the `metrics` crate, and so to Prometheus and
//! others. [`Pool::stats`](crate::Pool::stats) has them without any feature. See also the guide's page on
//! [observing](crate::guide::observing).
#![forbid(unsafe_code)]

#[cfg(feature = "metrics")]
mod metrics;
mod sources;

#[cfg(feature = "metrics")]
pub use metrics::MetricsReporter;
#[cfg(feature = "dashboard")]
pub(crate) use sources::{ManagerSource, QueueSource};
#[allow(unused_imports)] // For the room above.
pub(crate) use sources::{PoolSource, Sources};
