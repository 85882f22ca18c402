//! The connection to the servers of a cluster: made, watched, and made again.

use super::address::{Address, Credentials, Target};
use crate::error::{Error, ErrorKind, Topic};
use crate::os::random;
use async_nats::{Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, ServerError};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;

/// The oldest server that will do.
const OLDEST: (u64, u64) = (2, 10);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
const PING: Duration = Duration::from_secs(4);
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// The client goes on connecting though its last handle was dropped. Once nobody needs it, it tries so rarely, and ends when it has
/// succeeded.
const ABANDONED: Duration = Duration::from_secs(60);

/// Held by each task that needs a connection, to have the client connect again soon whenever it must.
pub(super) struct InUse;

/// The client's events about the connection.
#[derive(Debug)]
pub(super) enum Notice {
    Connected,
    Disconnected,
    /// The user of this connection may not do something, in the server's words.
    Denied(String),
    /// The server takes this user no more.
    Refused(String),
}

/// Why there is no connection.
pub(super) struct Failure {
    pub(super) error: Error,
    /// To try again is of no use before somebody has changed something.
    pub(super) is_final: bool,
}

impl Failure {
    pub(super) fn passing(text: impl Into<String>) -> Self {
        Self { error: Error::new(ErrorKind::Unavailable, text), is_final: false }
    }

    pub(super) fn lasting(text: impl Into<String>) -> Self {
        let error = Error::new(ErrorKind::Unavailable, text).explained_by(Topic::ClusterRefused);
        Self { error, is_final: true }
    }
}

/// The pause before attempt number `attempt`, which is at least 1: longer each time, and never the same for two.
pub(super) fn pause(attempt: usize) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(1 << attempt.clamp(1, 8).saturating_sub(1));
    let longest = doubled.min(LONGEST_PAUSE);
    let [chance] = random::bytes().unwrap_or([128]);
    longest.mul_f64(0.5 + f64::from(chance) / 512.0)
}

/// A number that nobody else has.
pub(super) fn new_id() -> u64 {
    let fallback = || {
        u64::from(std::process::id()) << 32
            | u64::from(std::time::UNIX_EPOCH.elapsed().map_or(0, |now| now.subsec_nanos()))
    };
    random::bytes().map_or_else(|_| fallback(), u64::from_le_bytes)
}

/// One attempt to connect. Once it has succeeded, the client connects again by itself whenever it must.
pub(super) async fn connect(
    address: &Address,
    target: &Target,
    role: &str,
    notices: UnboundedSender<Notice>,
) -> Result<(Client, Arc<InUse>), Failure> {
    let pool = target.pool.clone();
    let in_use = Arc::new(InUse);
    let users = Arc::downgrade(&in_use);
    let mut options = ConnectOptions::new()
        .name(format!("multiprocess {role} of {pool}, pid {}", std::process::id()))
        .custom_inbox_prefix(format!("mp.{pool}.i"))
        .connection_timeout(Duration::from_secs(2))
        .request_timeout(Some(Duration::from_secs(2)))
        // A connection whose machine is cut off ends by the third ping that is not answered.
        .ping_interval(PING)
        .require_tls(target.is_tls)
        .reconnect_delay_callback(move |attempt| if users.strong_count() == 0 { ABANDONED } else { pause(attempt) })
        .event_callback(move |event| {
            if let Some(notice) = notice_of(&event) {
                let _ = notices.send(notice);
            }
            // Behind it, as the user's `tracing` subscriber may panic.
            tell(&pool, &event);
            async {}
        });
    options = match &address.credentials {
        None => options,
        Some(Credentials::User(name, password)) => options.user_and_password(name.clone(), password.clone()),
        Some(Credentials::Token(token)) => options.token(token.clone()),
        Some(Credentials::File(path)) => credentials_file(options, path).await?,
    };
    if let Some(pem) = &address.ca {
        options = options.add_root_certificates(pem.clone());
    }
    if let Some((certificate, key)) = &address.client_certificate {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    let client = options.connect(target.urls()).await.map_err(|error| failure(target, &error))?;
    check_version(&client, target)?;
    Ok((client, in_use))
}

#[cfg(feature = "cluster-nkeys")]
async fn credentials_file(options: ConnectOptions, path: &std::path::Path) -> Result<ConnectOptions, Failure> {
    let read = options.credentials_file(path).await;
    read.map_err(|error| Failure::lasting(format!("cannot read the credentials file {}: {error}", path.display())))
}

#[cfg(not(feature = "cluster-nkeys"))]
async fn credentials_file(options: ConnectOptions, _: &std::path::Path) -> Result<ConnectOptions, Failure> {
    // The address was refused before.
    Ok(options)
}

fn failure(target: &Target, error: &ConnectError) -> Failure {
    let (servers, why) = (target.named(), error.to_string());
    let text = format!("cannot connect to the NATS server at {servers}: {why}");
    // Other alerts, and a server that ends in the midst of a handshake, may pass.
    let is_tls = [
        "certificate",
        "corrupt message",
        "invalidcontenttype",
        "unknownca",
        "handshakefailure",
        "protocolversion",
        "tls",
    ];
    let lower = why.to_lowercase();
    let may_pass = lower.contains("handshake eof");
    match error.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
            Failure::lasting(format!("{text}: it does not take this user, password, token or certificate"))
        }
        ConnectErrorKind::Tls | ConnectErrorKind::ServerParse => Failure::lasting(text),
        _ if !may_pass && is_tls.iter().any(|word| lower.contains(word)) => {
            let hint = match target.is_tls {
                // The server has ended it, which this side trusts.
                true if lower.contains("fatal alert")
                    && ["certificate", "unknownca"].iter().any(|word| lower.contains(word)) =>
                {
                    "the server takes no client without a certificate of an authority that it trusts \
                         (`Address::client_certificate`)"
                }
                true => {
                    "the address says tls; does the server speak TLS, and did an authority sign its certificate that \
                         is trusted here (`Address::ca`)?"
                }
                false => {
                    "the server wants TLS: say tls:// in the address, and which authority is trusted (`Address::ca`)"
                }
            };
            Failure::lasting(format!("{text}: {hint}"))
        }
        ConnectErrorKind::TimedOut => Failure::passing(format!(
            "{text}: it does not greet; a server that begins with TLS at once does not, either"
        )),
        _ => Failure::passing(text),
    }
}

fn check_version(client: &Client, target: &Target) -> Result<(), Failure> {
    let version = client.server_info().version;
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0_u64));
    let (major, minor) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if (major, minor) >= OLDEST {
        return Ok(());
    }
    let (servers, (oldest, younger)) = (target.named(), OLDEST);
    Err(Failure::lasting(format!(
        "the NATS server at {servers} is of version {version}; a cluster pool needs {oldest}.{younger} or newer"
    )))
}

/// The server that a client is connected to, or was last, for errors.
pub(super) fn server_of(client: &Client, pool: &str) -> String {
    format!("the server of the cluster pool {pool} (NATS {})", client.server_info().version)
}

fn tell(pool: &str, event: &Event) {
    match event {
        Event::Connected => tracing::info!(pool, "connected to the cluster's server"),
        Event::Disconnected => {
            let help = Topic::ClusterUnavailable.name();
            tracing::warn!(pool, help, "the connection to the cluster's server is lost")
        }
        Event::LameDuckMode => {
            let help = Topic::ClusterUnavailable.name();
            tracing::warn!(pool, help, "the cluster's server is about to stop")
        }
        Event::SlowConsumer(_) => {
            let help = Topic::ClusterSlow.name();
            tracing::warn!(pool, help, "messages of the cluster come faster than they are read; some are lost")
        }
        Event::ServerError(error) => {
            let help = Topic::ClusterRefused.name();
            tracing::warn!(pool, %error, help, "the cluster's server refused something")
        }
        Event::ClientError(error) => tracing::debug!(pool, %error, "the connection to the cluster's server"),
        Event::Draining | Event::Closed => {}
    }
}

fn notice_of(event: &Event) -> Option<Notice> {
    match event {
        Event::Connected => Some(Notice::Connected),
        Event::Disconnected => Some(Notice::Disconnected),
        Event::ServerError(ServerError::AuthorizationViolation) => {
            Some(Notice::Refused("authorization violation".into()))
        }
        Event::ServerError(ServerError::Other(text)) if text.to_lowercase().contains("permissions violation") => {
            Some(Notice::Denied(text.clone()))
        }
        Event::ServerError(ServerError::Other(text)) if text.to_lowercase().contains("authentication") => {
            Some(Notice::Refused(text.clone()))
        }
        Event::ClientError(error) => {
            let text = error.to_string();
            text.contains("authorization violation").then_some(Notice::Refused(text))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_two_seconds_and_differ() {
        let within = |attempt, least, most| {
            let all: Vec<_> = (0..50).map(|_| pause(attempt).as_millis()).collect();
            assert!(all.iter().all(|pause| (least..=most).contains(pause)), "{all:?}");
            assert!(all.iter().any(|pause| *pause != all[0]));
        };
        within(1, 10, 20);
        within(5, 160, 320);
        within(8, 1000, 2000);
        within(usize::MAX, 1000, 2000);
    }

    #[test]
    fn ids_are_not_the_same_twice() {
        assert_ne!(new_id(), new_id());
    }
}
