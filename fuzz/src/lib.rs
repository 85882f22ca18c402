//! The crate's format of values, from its own files.
#![allow(dead_code)]
#![cfg(fuzzing)]

#[path = "../../src/os"]
mod os {
    pub(crate) mod identity;
    pub(crate) mod stack;

    /// No call is refused here.
    pub(crate) mod refuse {
        pub(crate) fn at(_: &'static str) -> rustix::io::Result<()> {
            Ok(())
        }
    }

    pub(crate) mod memory {
        pub(crate) fn with_room<P>(mut buffer: Vec<P>, len: usize) -> Vec<P> {
            buffer.reserve_exact(len);
            buffer
        }
    }
}

#[path = "../../src/wire"]
mod wire {
    pub(crate) mod limits;
    pub(crate) mod format;
    pub(crate) mod list;

    /// No buffer is used again here: a message in one that is too small is to be found.
    pub(crate) mod buffers {
        pub(crate) fn make_room(buffer: &mut Vec<u8>, len: usize) {
            buffer.reserve(len);
        }

        pub(crate) fn with_room(len: usize) -> Vec<u8> {
            Vec::with_capacity(len)
        }

        pub(crate) fn keep(_: Vec<u8>) {}
    }
    pub(crate) use buffers::{keep, with_room};
}

use wire::format::fuzz;

/// Reads bytes as all kinds of types.
pub fn check(bytes: &[u8]) {
    fuzz::check(bytes);
}

/// Writes the messages to begin with, each to a file in `directory`.
pub fn write_seeds(directory: &str) {
    std::fs::create_dir_all(directory).expect("the directory can be made");
    for (number, seed) in fuzz::seeds().iter().enumerate() {
        std::fs::write(format!("{directory}/seed-{number}"), seed).expect("a seed can be written");
    }
}

/// Reads `count` damaged messages, each as one type.
pub fn check_many(count: usize, seed: u64) {
    let (seeds, mut random) = (fuzz::seeds(), fuzz::Random(seed));
    for round in 0..count {
        fuzz::check_one(&fuzz::damaged(&seeds, &mut random), round);
    }
}
