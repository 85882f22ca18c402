//! An error in a message: it keeps its facts, and its sources as text.
#![forbid(unsafe_code)]

use super::{Error, ErrorKind, Inner, PanicInfo, Topic};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt::{self, Write};
use std::os::unix::process::ExitStatusExt;

/// An error's source chain as it looks after a journey: text.
#[derive(Debug)]
struct SourceText {
    message: String,
    source: Option<Box<SourceText>>,
}

impl SourceText {
    fn chain(messages: Vec<String>) -> Option<Box<Self>> {
        messages.into_iter().rev().fold(None, |source, message| Some(Box::new(Self { message, source })))
    }
}

impl fmt::Display for SourceText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for SourceText {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

#[derive(Serialize, Deserialize)]
struct Portable {
    kind: ErrorKind,
    message: String,
    sources: Vec<String>,
    panic: Option<PanicInfo>,
    raw_status: Option<i32>,
    lagged: Option<u64>,
    /// By name: another version may have others.
    #[serde(default)]
    topic: Option<String>,
}

impl Serialize for Error {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let sources = std::iter::successors(std::error::Error::source(self), |error| error.source());
        Portable {
            kind: self.0.kind,
            message: self.0.message.clone(),
            sources: sources.map(|error| error.to_string()).collect(),
            panic: self.0.panic.clone(),
            raw_status: self.0.exit_status.map(ExitStatusExt::into_raw),
            lagged: self.0.lagged,
            topic: self.0.topic.map(|topic| topic.name().into()),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Error {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let mut portable = Portable::deserialize(deserializer)?;
        let topic = portable.topic.as_deref().and_then(Topic::named);
        if let (Some(unknown), None) = (portable.topic, topic) {
            // A part of the text, where the next receiver may find it.
            let separator = Topic::separator(&portable.message);
            let _ = write!(portable.message, "{separator}[{unknown}]");
        }
        Ok(Self(Box::new(Inner {
            kind: portable.kind,
            message: portable.message,
            topic,
            source: SourceText::chain(portable.sources).map(|source| source as _),
            panic: portable.panic,
            exit_status: portable.raw_status.map(ExitStatusExt::from_raw),
            lagged: portable.lagged,
        })))
    }
}
