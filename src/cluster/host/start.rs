//! How a service begins: connected, with the stream and the consumer of its build.

use crate::cluster::address::{Address, Target};
use crate::cluster::job::PATIENCE;
use crate::cluster::link::{self, Failure, InUse, Notice};
use crate::cluster::stream::{self, Names};
use crate::error::{Error, ErrorKind, Result, Topic};
use async_nats::Client;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::time::sleep;

/// Connects, and sees to it that the stream and the consumer are there, however long that takes.
pub(super) async fn ready(
    address: &Address,
    target: &Target,
    names: &Names,
    (notices, noticed): (UnboundedSender<Notice>, &mut UnboundedReceiver<Notice>),
) -> Result<(Client, Arc<InUse>, String)> {
    let mut attempt = 0;
    let (client, in_use) = loop {
        attempt += 1;
        match link::connect(address, target, "host", notices.clone()).await {
            Ok(connected) => break connected,
            Err(Failure { error, is_final: true }) => return Err(error),
            Err(failure) => tracing::debug!(error = %failure.error, "a host waits for its server"),
        }
        sleep(link::pause(attempt)).await;
    };
    let mut attempt = 0;
    let began = Instant::now();
    loop {
        attempt += 1;
        match provide(&client, address, target, names, false).await {
            Ok(made) => return Ok((client, in_use, made)),
            // A server that has just started may answer so for a moment.
            Err(Failure { error, is_final: true }) if began.elapsed() >= PATIENCE || !is_about_jetstream(&error) => {
                return Err(error);
            }
            Err(failure) => tracing::debug!(error = %failure.error, "a host waits for its stream"),
        }
        // A request that the user has no right to is not answered.
        while let Ok(notice) = noticed.try_recv() {
            if let Notice::Denied(why) = notice {
                return Err(denied(&client, names, &why));
            }
        }
        sleep(link::pause(attempt)).await;
    }
}

pub(super) fn denied(client: &Client, names: &Names, why: &str) -> Error {
    let text = format!("{} does not let this user serve: {why}", link::server_of(client, &names.pool));
    Error::new(ErrorKind::Unavailable, text).explained_by(Topic::ClusterRefused)
}

pub(super) fn is_about_jetstream(error: &Error) -> bool {
    error.to_string().contains("has no JetStream")
}

/// When the stream was made that is there now, as `stream::made` has it.
pub(super) type Provision = std::result::Result<String, Failure>;

pub(super) async fn provide(
    client: &Client,
    address: &Address,
    target: &Target,
    names: &Names,
    again: bool,
) -> Provision {
    let made = stream::ensure_stream(client, address, target, names, again).await?;
    stream::ensure_consumer(client, address, target, names).await?;
    Ok(made)
}

pub(super) fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "a host without a name".into(),
        name => name.chars().take(64).collect(),
    }
}
