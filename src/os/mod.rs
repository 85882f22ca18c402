//! One thin safe function per kernel service; errno in, `io::Error` out.
//!
//! `unsafe` lives here for calls that the safe wrappers of nix and rustix lack.

pub(crate) mod attributes;
pub(crate) mod background;
pub(crate) mod call;
pub(crate) mod clock;
pub(crate) mod cpu;
pub(crate) mod credentials;
pub(crate) mod directory;
pub(crate) mod epoll;
pub(crate) mod eventfd;
pub(crate) mod exec;
pub(crate) mod fault;
pub(crate) mod fork;
pub(crate) mod identity;
pub(crate) mod image;
pub(crate) mod listen;
pub(crate) mod memfd;
pub(crate) mod memory;
pub(crate) mod mmap;
pub(crate) mod named;
pub(crate) mod owner;
pub(crate) mod pidfd;
pub(crate) mod pipe;
pub(crate) mod poll;
pub(crate) mod proc;
pub(crate) mod profile;
pub(crate) mod random;
pub(crate) mod reactor;
pub(crate) mod refuse;
pub(crate) mod rights;
mod rlimit;
mod secure;
pub(crate) mod self_pipe;
pub(crate) mod signal;
pub(crate) mod socket;
pub(crate) mod spawn;
pub(crate) mod stack;
pub(crate) mod startup;
pub(crate) mod sync;
pub(crate) mod timer;
