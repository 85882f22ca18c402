//! Where a cluster pool is: servers, the pool's name, credentials, and the properties of its stream.

use crate::error::{Error, ErrorKind, Result};
use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

/// The address of a cluster pool: `nats://host:port/pool`, or `tls://`.
///
/// Several servers of one NATS cluster are given with commas: `nats://a:4222,b:4222,c:4222/pool`. Without a port it is 4222.
/// The name of a pool has 1 to 64 of the characters `a-z A-Z 0-9 _ -`. A string converts into an address. An invalid address is
/// an error of [`PoolBuilder::build`](crate::PoolBuilder::build), and of an awaited [`Pool::serve`](crate::Pool::serve).
///
/// Hosts and submitters of a pool must agree in [`lease`](Self::lease), [`storage`](Self::storage),
/// [`replicas`](Self::replicas) and [`most_waiting`](Self::most_waiting): these belong to the pool's stream, which is made by
/// the first of them. One that wants others gets an error that names both values.
///
/// ```
/// use multiprocess::{self as mp, Pool, cluster::Address};
/// use std::time::Duration;
/// # fn main() -> mp::Result<()> { mp::run(async {
/// let address = Address::new("nats://queue.example:4222/thumbs").user("submit", "secret").lease(Duration::from_secs(2));
/// let pool = Pool::builder().cluster(address).build()?; // the connection comes up behind it
/// let error = Pool::builder().cluster("http://queue.example/thumbs").build().unwrap_err();
/// assert!(error.to_string().contains("http://queue.example/thumbs"));
/// # drop(pool);
/// # Ok(()) }) }
/// ```
#[derive(Clone)]
pub struct Address {
    text: String,
    pub(super) credentials: Option<Credentials>,
    pub(super) ca: Option<PathBuf>,
    pub(super) client_certificate: Option<(PathBuf, PathBuf)>,
    pub(super) lease: Duration,
    pub(super) redeliver: u32,
    pub(super) storage: Storage,
    pub(super) replicas: usize,
    pub(super) most_messages: u64,
    pub(super) most_bytes: u64,
    pub(super) offline_timeout: Duration,
}

/// How a client authenticates itself.
#[derive(Clone)]
pub(super) enum Credentials {
    User(String, String),
    Token(String),
    File(PathBuf),
}

/// Where the stream of a cluster pool stores the messages that wait.
///
/// ```
/// use multiprocess::cluster::{Address, Storage};
/// let address = Address::new("nats://queue.example/thumbs").storage(Storage::Memory);
/// # let _ = address;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Storage {
    /// In files: a server that is restarted still has them. The default.
    File,
    /// In memory. This is faster. A server that is restarted has lost them, and submitters send them again.
    Memory,
}

const LEASES: RangeInclusive<Duration> = Duration::from_millis(500)..=Duration::from_secs(600);
const LONGEST_NAME: usize = 64;
const DEFAULT_PORT: u16 = 4222;

impl Address {
    /// Creates an address from the text of its servers and pool.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            text: url.into(),
            credentials: None,
            ca: None,
            client_certificate: None,
            lease: Duration::from_secs(5),
            redeliver: 3,
            storage: Storage::File,
            replicas: 1,
            most_messages: 100_000,
            most_bytes: 1 << 30,
            offline_timeout: Duration::from_secs(30),
        }
    }

    /// Authenticates by user and password.
    #[must_use]
    pub fn user(mut self, name: impl Into<String>, password: impl Into<String>) -> Self {
        self.credentials = Some(Credentials::User(name.into(), password.into()));
        self
    }

    /// Authenticates by token.
    #[must_use]
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.credentials = Some(Credentials::Token(token.into()));
        self
    }

    /// Authenticates by a credentials file, as `nsc` writes it. Needs the feature `cluster-nkeys`.
    ///
    /// The file is not read again once a pool, or a service, has connected. When its credentials expire the server ends the connection:
    /// a service ends with kind `Unavailable`, and calls fail with that kind after the [`offline_timeout`](Self::offline_timeout), though
    /// the file was renewed. A pool and a service that are made anew read it.
    #[must_use]
    pub fn credentials_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.credentials = Some(Credentials::File(path.into()));
        self
    }

    /// Trusts servers whose certificates these authorities signed (a PEM file), instead of those that the system trusts.
    #[must_use]
    pub fn ca(mut self, pem: impl Into<PathBuf>) -> Self {
        self.ca = Some(pem.into());
        self
    }

    /// Authenticates by this certificate (a PEM file, and one with its key).
    #[must_use]
    pub fn client_certificate(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.client_certificate = Some((certificate.into(), key.into()));
        self
    }

    /// Sets the lease: how long a host may be silent before its items are handed out again.
    ///
    /// 500 ms to 10 min; by default 5 s. Hosts renew it every third of that time, however long an item takes, at the cost of one
    /// message for each message that they hold.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// Sets how often an item is handed out again because its host was lost; by default 3.
    ///
    /// After that it fails with kind `ProcessDied`, and the error names the hosts. With 0 it fails the first time.
    #[must_use]
    pub fn redeliver(mut self, times: u32) -> Self {
        self.redeliver = times;
        self
    }

    /// Sets where the stream is stored; by default in files.
    #[must_use]
    pub fn storage(mut self, storage: Storage) -> Self {
        self.storage = storage;
        self
    }

    /// Sets the number of servers that keep a copy of the stream: 1, the default, or 3.
    #[must_use]
    pub fn replicas(mut self, servers: usize) -> Self {
        self.replicas = servers;
        self
    }

    /// Sets how many messages, and how many bytes of them, may wait in the stream; by default 100 000 and 1 GiB.
    ///
    /// While it is full submitters wait; no item is dropped or fails. The server reserves the bytes: where its JetStream has less
    /// room, calls fail with kind `Unavailable`.
    #[must_use]
    pub fn most_waiting(mut self, messages: u64, bytes: u64) -> Self {
        (self.most_messages, self.most_bytes) = (messages, bytes);
        self
    }

    /// Sets how long the server may be away; by default 30 s.
    ///
    /// After that, pending and new calls fail with kind `Unavailable` until the server is back. A server that is connected and
    /// answers nothing is away, too, after 4 s at the earliest: in less time its answer may not have been read by a busy process. That is
    /// noticed 2 s later.
    #[must_use]
    pub fn offline_timeout(mut self, timeout: Duration) -> Self {
        self.offline_timeout = timeout;
        self
    }

    /// Parses the text and checks the properties.
    pub(super) fn parse(&self) -> Result<Target> {
        let wrong = |why: String| Error::other(format!("the cluster address {:?} {why}", self.shown()));
        let (scheme, rest) = self.text.split_once("://").ok_or_else(|| {
            wrong("has no scheme: nats://HOST:PORT/POOL or tls://HOST:PORT/POOL is one that has".into())
        })?;
        let is_tls = match scheme {
            "nats" => false,
            "tls" => true,
            _ => return Err(wrong(format!("has the unknown scheme {scheme:?}: it may be nats or tls"))),
        };
        if rest.contains('@') {
            return Err(wrong("holds credentials: give them by `Address::user` or `Address::token`".into()));
        }
        let (servers, pool) = rest.rsplit_once('/').unwrap_or((rest, ""));
        if pool.is_empty() {
            return Err(wrong("names no pool: it ends with /POOL".into()));
        }
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if let Some(c) = pool.chars().find(|c| !is_allowed(*c)) {
            return Err(wrong(format!("has a pool name with {c:?}: a-z, A-Z, 0-9, _ and - are possible")));
        }
        if pool.len() > LONGEST_NAME {
            return Err(wrong(format!("has a pool name of {} characters, {LONGEST_NAME} are possible", pool.len())));
        }
        let servers = servers.split(',').map(|server| Server::parse(server).map_err(&wrong)).collect::<Result<_>>()?;
        self.check_properties().map_err(&wrong)?;
        Ok(Target { is_tls, servers, pool: pool.into() })
    }

    fn check_properties(&self) -> Result<(), String> {
        let lease = self.lease;
        if !LEASES.contains(&lease) {
            return Err(format!("has a lease of {lease:?}: it may be from {:?} to {:?}", LEASES.start(), LEASES.end()));
        }
        if ![1, 3].contains(&self.replicas) {
            return Err(format!("has {} replicas: 1 or 3 are possible", self.replicas));
        }
        let range = 1..=i64::MAX as u64;
        if !range.contains(&self.most_messages) || !range.contains(&self.most_bytes) {
            return Err(format!("lets {} messages of {} bytes wait", self.most_messages, self.most_bytes));
        }
        if matches!(self.credentials, Some(Credentials::File(_))) && !cfg!(feature = "cluster-nkeys") {
            return Err("has a credentials file, for which multiprocess needs its feature `cluster-nkeys`".into());
        }
        Ok(())
    }

    /// Returns the text without credentials that do not belong there.
    fn shown(&self) -> String {
        match (self.text.split_once("://"), self.text.rsplit_once('@')) {
            (Some((scheme, _)), Some((_, rest))) => format!("{scheme}://...@{rest}"),
            (None, Some((_, rest))) => format!("...@{rest}"),
            _ => self.text.clone(),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown())
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Address").field("url", &self.shown()).field("lease", &self.lease).finish_non_exhaustive()
    }
}

impl From<&str> for Address {
    fn from(url: &str) -> Self {
        Self::new(url)
    }
}

impl From<String> for Address {
    fn from(url: String) -> Self {
        Self::new(url)
    }
}

impl From<&String> for Address {
    fn from(url: &String) -> Self {
        Self::new(url)
    }
}

impl From<&Address> for Address {
    fn from(address: &Address) -> Self {
        address.clone()
    }
}

/// A parsed address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) is_tls: bool,
    pub(super) servers: Vec<Server>,
    pub(super) pool: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Server {
    /// An IPv6 address without its brackets.
    host: String,
    port: u16,
}

impl Server {
    fn parse(text: &str) -> Result<Self, String> {
        let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, port)) => (host, port.strip_prefix(':').or_else(|| port.is_empty().then_some(""))),
            None => text.split_once(':').map_or((text, Some("")), |(host, port)| (host, Some(port))),
        };
        let is_possible = |c: char| c.is_ascii_alphanumeric() || "._-:%".contains(c);
        if host.is_empty() || !host.chars().all(is_possible) {
            return Err(match text.is_empty() {
                true => "has an empty place in its list of servers".into(),
                false => format!("has a server without a proper host name: {text:?}"),
            });
        }
        let port = match port {
            Some("") if !text.ends_with(':') => Some(DEFAULT_PORT),
            Some(port) => port.parse().ok().filter(|port| *port > 0),
            None => None,
        };
        let port = port.ok_or_else(|| format!("has a server without a proper port (1 to 65535): {text:?}"))?;
        Ok(Self { host: host.into(), port })
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl Target {
    /// Returns the URLs of the servers, for the client.
    pub(super) fn urls(&self) -> Vec<String> {
        let scheme = if self.is_tls { "tls" } else { "nats" };
        self.servers.iter().map(|server| format!("{scheme}://{server}")).collect()
    }

    /// Returns the servers as text, for errors.
    pub(super) fn named(&self) -> String {
        self.servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    }
}

/// Returns the error of an operation that a cluster pool does not have.
pub(super) fn unsupported(what: &str) -> Error {
    let text =
        format!("a cluster pool {what}: its workers are those of the hosts that serve it; do so with their pools");
    Error::new(ErrorKind::Unsupported, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_names_servers_and_a_pool() {
        let read = |text: &str| Address::new(text).parse().unwrap();
        let one = read("nats://queue.example:4223/thumbs");
        assert_eq!((one.is_tls, &*one.pool, one.urls()), (false, "thumbs", vec!["nats://queue.example:4223".into()]));
        let three = read("tls://a:1,b,[::1]:65535/A-z_09");
        assert_eq!(three.urls(), ["tls://a:1", "tls://b:4222", "tls://[::1]:65535"]);
        assert_eq!(three.named(), "a:1, b:4222, [::1]:65535");
        let longest = "x".repeat(64);
        assert_eq!(read(&format!("nats://[::1]/{longest}")).pool, longest);
    }

    #[test]
    fn invalid_address_is_refused_and_quoted() {
        let long = format!("nats://h/{}", "x".repeat(65));
        let wrong = [
            ("", "no scheme"),
            ("h:4222/pool", "no scheme"),
            ("http://h:4222/pool", "\"http\""),
            ("nats://h:4222", "no pool"),
            ("nats://h:4222/", "no pool"),
            ("nats://", "no pool"),
            ("nats://h:4222/a.b", "'.'"),
            ("nats://h:4222/a*", "'*'"),
            ("nats://h:4222/>", "'>'"),
            ("nats://h:4222/a b", "' '"),
            ("nats://h:4222/a\tb", "'\\t'"),
            ("nats://h:4222/ü", "'ü'"),
            (&long, "65 characters"),
            ("nats://h:0/pool", "port"),
            ("nats://h:70000/pool", "port"),
            ("nats://h:/pool", "port"),
            ("nats://h:x/pool", "port"),
            ("nats://[::1]x/pool", "port"),
            ("nats:///pool", "empty place"),
            ("nats://,/pool", "empty place"),
            ("nats://a,,b/pool", "empty place"),
            ("nats://a:1,/pool", "empty place"),
            ("nats://:4222/pool", "host name"),
            ("nats://a b:4222/pool", "host name"),
            ("nats://h/a/pool", "host name"),
        ];
        for (text, why) in wrong {
            let error = Address::new(text).parse().expect_err(text).to_string();
            assert!(error.contains(why) && error.contains(&format!("{text:?}")), "{text}: {error}");
        }
    }

    #[test]
    fn credentials_inside_an_address_are_refused_and_not_quoted() {
        let address = Address::new("nats://me:secret@h:4222/pool");
        let error = address.parse().unwrap_err().to_string();
        assert!(error.contains("Address::user") && error.contains("h:4222/pool") && !error.contains("secret"));
        let without_scheme = Address::new("me:secret@h:4222/pool");
        let error = without_scheme.parse().err().unwrap().to_string();
        assert!(
            !error.contains("secret") && !format!("{without_scheme:?} {without_scheme}").contains("secret"),
            "{error}"
        );
        let address = Address::new("nats://h/p").user("me", "secret").token("secret");
        assert!(!format!("{address:?} {address}").contains("secret"));
    }

    #[test]
    fn impossible_property_is_refused_with_the_allowed_values() {
        let address = || Address::new("nats://h/p");
        assert!(address().parse().is_ok());
        let wrong = [
            (address().lease(Duration::from_millis(499)), "499ms"),
            (address().lease(Duration::from_secs(601)), "601s"),
            (address().replicas(2), "1 or 3"),
            (address().replicas(0), "1 or 3"),
            (address().most_waiting(0, 1), "0 messages"),
            (address().most_waiting(1, 0), "0 bytes"),
            (address().most_waiting(u64::MAX, 1), "messages"),
        ];
        for (address, why) in wrong {
            let error = address.parse().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_credentials_file_needs_a_feature_which_the_error_names() {
        let parsed = Address::new("nats://h/p").credentials_file("/x").parse();
        match cfg!(feature = "cluster-nkeys") {
            true => assert!(parsed.is_ok()),
            false => assert!(parsed.unwrap_err().to_string().contains("cluster-nkeys")),
        }
    }
}
