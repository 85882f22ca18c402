//! The parts that both sides use: transports, messages, the dispatch table, handle marshalling. It uses neither side.

pub(crate) mod greeting;
pub(crate) mod local;
pub(crate) mod marshal;
pub(crate) mod messages;
pub(crate) mod method;
pub(crate) mod outlet;
pub(crate) mod pipe;
pub(crate) mod ready;
pub(crate) mod stream;
pub(crate) mod transport;
pub(crate) mod waiting;
