//! Environment variables in the form in which they are sent.
#![forbid(unsafe_code)]

use crate::os::exec;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Environment variables as `NAME=value` texts, each ended by a zero byte: cheap to compare, to send and to keep.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Variables(Bytes);

impl Variables {
    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        Self(Bytes::copy_from_slice(bytes))
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn of_this_process() -> Self {
        // A program that is executed gets a starter variable of its own.
        std::env::vars_os().filter(|(name, _)| !exec::is_starter_variable(name)).collect()
    }

    /// Returns the variables as `NAME=value` C strings for exec.
    pub(super) fn for_exec(&self) -> Vec<CString> {
        self.0
            .split(|byte| *byte == 0)
            .filter_map(|pair| (!pair.is_empty()).then(|| CString::new(pair).ok())?)
            .collect()
    }

    /// Merges these with `own`; `own` wins.
    pub(super) fn with(&self, own: &Self) -> Self {
        let kept = self.iter().filter(|(key, _)| !own.iter().any(|(other, _)| other == *key));
        kept.chain(own.iter()).map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&OsStr, &OsStr)> {
        self.0.split(|byte| *byte == 0).filter_map(|pair| {
            // A name may begin with `=`; the first one after that ends it.
            let at = 1 + pair.get(1..)?.iter().position(|byte| *byte == b'=')?;
            Some((OsStr::from_bytes(&pair[..at]), OsStr::from_bytes(&pair[at + 1..])))
        })
    }
}

impl FromIterator<(OsString, OsString)> for Variables {
    fn from_iter<I: IntoIterator<Item = (OsString, OsString)>>(variables: I) -> Self {
        let mut bytes = Vec::new();
        for (key, value) in variables {
            bytes.extend(key.into_vec());
            bytes.push(b'=');
            bytes.extend(value.into_vec());
            bytes.push(0);
        }
        Self(bytes.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_keep_odd_names_and_values() {
        let pairs = [("A", "1=2"), ("EMPTY", ""), ("=C:", "x")].map(|(k, v)| (OsString::from(k), OsString::from(v)));
        let variables: Variables = pairs.clone().into_iter().collect();
        let back: Vec<_> = variables.iter().map(|(k, v)| (k.to_os_string(), v.to_os_string())).collect();
        assert_eq!(back, pairs);
    }
}
