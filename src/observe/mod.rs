//! Figures of pools, queues and managers for those who watch a program from outside.
//!
//! With the feature `metrics`, a [`MetricsReporter`] hands them to the recorder of the `metrics` crate, and so to Prometheus and
//! others. [`Pool::stats`](crate::Pool::stats) has them without any feature. See also the guide's page on
//! [observing](crate::guide::observing).
#![forbid(unsafe_code)]

#[cfg(feature = "metrics")]
mod metrics;

#[cfg(feature = "metrics")]
pub use metrics::MetricsReporter;
