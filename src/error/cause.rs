//! Causes that modules without this crate's error type put inside an [`std::io::Error`].
#![forbid(unsafe_code)]

use super::{Error, ErrorKind, Topic};
use std::error::Error as StdError;
use std::{fmt, io};

/// Memory of a shared object that was found damaged, inside an [`std::io::Error`].
#[derive(Debug)]
pub(crate) struct Damage {
    /// Of which kind the object is, and which memory (device and inode of its memfd).
    what: &'static str,
    identity: (u64, u64),
    why: &'static str,
}

impl Damage {
    /// `why`: which word is impossible, in the terms of the object.
    #[cold]
    pub(crate) fn error(what: &'static str, identity: (u64, u64), why: &'static str) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, Self { what, identity, why })
    }

    pub(crate) fn is_in(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Self>())
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, identity: (device, inode), why } = self;
        write!(
            f,
            "the shared memory of {what} {device}:{inode} is damaged ({why}): some process wrote where it must not; \
             the {what} is closed, create a new one"
        )
    }
}

impl StdError for Damage {}

/// Why a process that was forked from one that uses the crate cannot use it.
#[derive(Debug)]
pub(crate) struct ForkedProcess;

impl fmt::Display for ForkedProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "this process was forked from one that had used multiprocess before, and cannot use it: daemonize before the \
             first use (after `multiprocess::init`), or exec",
        )
    }
}

impl StdError for ForkedProcess {}

/// A cause that the guide explains, inside an [`std::io::Error`]. The short name is not part of its text: the [`Error`] that is made of this
/// adds it.
#[derive(Debug)]
pub(crate) struct Explained {
    topic: Topic,
    text: String,
}

impl Explained {
    pub(crate) fn error(kind: io::ErrorKind, topic: Topic, text: impl Into<String>) -> io::Error {
        io::Error::new(kind, Self { topic, text: text.into() })
    }

    /// The same error after more words.
    pub(crate) fn after(doing: impl fmt::Display, error: &io::Error) -> io::Error {
        Self::with_text(error, format!("{doing}: {error}"))
    }

    /// The same error once more.
    pub(crate) fn again(error: &io::Error) -> io::Error {
        Self::with_text(error, error.to_string())
    }

    fn with_text(error: &io::Error, text: String) -> io::Error {
        match in_words(error).1 {
            Some(topic) => Self::error(error.kind(), topic, text),
            None => io::Error::new(error.kind(), text),
        }
    }
}

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl StdError for Explained {}

/// The text of `error` without a short name, and the topic that it has.
pub(super) fn in_words(error: &(dyn StdError + 'static)) -> (String, Option<Topic>) {
    if let Some(error) = error.downcast_ref::<Error>() {
        return (error.text().to_string(), error.topic());
    }
    let Some(error) = error.downcast_ref::<io::Error>() else {
        // An error of another type may quote one of ours.
        let text = error.to_string();
        let (text, topic) = Topic::cut(&text);
        return (text.to_string(), topic);
    };
    let Some(cause) = error.get_ref() else {
        let is_out_of_descriptors = error.raw_os_error() == Some(libc::EMFILE);
        return (error.to_string(), is_out_of_descriptors.then_some(Topic::TooManyDescriptors));
    };
    if let Some(explained) = cause.downcast_ref::<Explained>() {
        (explained.text.clone(), Some(explained.topic))
    } else if cause.is::<Damage>() {
        (cause.to_string(), Some(Topic::Damaged))
    } else if cause.is::<ForkedProcess>() {
        (cause.to_string(), Some(Topic::Forked))
    } else {
        in_words(cause)
    }
}

pub(super) fn is_of_forked_process(error: &(dyn StdError + 'static)) -> bool {
    let inner = |error: &io::Error| error.get_ref().is_some_and(|inner| inner.is::<ForkedProcess>());
    error.downcast_ref::<io::Error>().is_some_and(inner)
        || error.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::Forked)
}
