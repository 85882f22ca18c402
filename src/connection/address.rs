//! Parses addresses.

use crate::error::{Error, ErrorKind, Result};
use std::fmt;
use std::net::SocketAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::SocketAddr as UnixAddr;
use std::path::PathBuf;

/// The longest name of a socket: 108 bytes with the zero at its end.
const LONGEST: usize = 107;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// `host:port`, not resolved yet.
    Tcp(String),
    Path(PathBuf),
    /// Without the leading zero.
    Abstract(Vec<u8>),
}

impl Address {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let wrong = |why: String| Error::new(ErrorKind::Other, format!("the address {text:?} {why}"));
        let fits = |what: &str| match text.len() {
            0..=LONGEST => Ok(()),
            len => Err(wrong(format!("is a {what} of {len} bytes, {LONGEST} are possible"))),
        };
        if let Some(name) = text.strip_prefix('\0') {
            fits("name")?;
            return Ok(Self::Abstract(name.into()));
        }
        if text.contains('/') {
            fits("path")?;
            return match text.contains('\0') {
                true => Err(wrong("is a path with a zero byte in it".into())),
                false => Ok(Self::Path(text.into())),
            };
        }
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(Self::Tcp(text.into())),
            _ => Err(wrong("is neither host:port, nor a path with a slash, nor a name that begins with \\0".into())),
        }
    }

    /// Resolves a TCP address.
    pub(crate) async fn resolve(text: &str) -> Result<Vec<SocketAddr>> {
        let found = tokio::net::lookup_host(text).await;
        let found: Vec<_> = found.map_err(|error| Error::io(format_args!("cannot resolve {text}"), error))?.collect();
        match found.is_empty() {
            true => Err(Error::new(ErrorKind::Io, format!("{text} stands for no address"))),
            false => Ok(found),
        }
    }

    pub(crate) fn abstract_name(name: &[u8]) -> std::io::Result<UnixAddr> {
        UnixAddr::from_abstract_name(name)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(text) => f.write_str(text),
            Self::Path(path) => path.display().fmt(f),
            Self::Abstract(name) => write!(f, "\0{}", String::from_utf8_lossy(name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_of_address_is_parsed_and_others_are_errors_with_the_reason() {
        let forms = [
            ("127.0.0.1:0", Address::Tcp("127.0.0.1:0".into())),
            ("[::1]:7000", Address::Tcp("[::1]:7000".into())),
            ("localhost:1", Address::Tcp("localhost:1".into())),
            ("/a/b", Address::Path("/a/b".into())),
            ("./a:1", Address::Path("./a:1".into())),
            ("\0name", Address::Abstract(b"name".to_vec())),
        ];
        for (text, address) in forms {
            assert_eq!(Address::parse(text).unwrap(), address);
            assert_eq!(address.to_string(), text);
        }
        let long = format!("/{}", "x".repeat(107));
        let wrong = ["", "host", ":1", "host:70000", "/a\0b", &long, &long.replace('/', "\0")];
        let messages: Vec<_> = wrong.map(|text| Address::parse(text).unwrap_err().to_string()).into();
        assert!(messages[5].contains("path of 108 bytes") && messages[6].contains("name of 108 bytes"));
    }
}
