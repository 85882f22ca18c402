//! The pool's stream and the consumer of a build: made where they are missing, compared where they are there, and asked about
//! single messages. All of it by requests to the server's API, whose answers are JSON.

use super::address::{Address, Storage, Target};
use super::link::Failure;
use super::messages::Tasks;
use async_nats::{Client, RequestErrorKind};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::time::Duration;
use tokio::time::sleep;

/// The server's answer that a name is not there.
const NO_SUCH_STREAM: u64 = 10059;
const NO_SUCH_CONSUMER: u64 = 10014;
const NO_SUCH_MESSAGE: u64 = 10037;
/// A consumer that nobody has used for so long is removed: those of builds that run nowhere any more.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(7 * 86400);
/// The digits of the first bytes of a message, by which it is known.
const HEAD: usize = 24;
/// Messages that hosts may hold at the same time.
const MOST_HELD: u64 = 20_000;

/// Names of one pool.
#[derive(Clone)]
pub(super) struct Names {
    pub(super) pool: String,
    pub(super) stream: String,
    pub(super) consumer: String,
    pub(super) build: u64,
}

impl Names {
    pub(super) fn new(pool: &str, build: u64) -> Self {
        Self { pool: pool.into(), stream: format!("MP_{pool}"), consumer: format!("build-{build:016x}"), build }
    }

    /// Where tasks of a submitter go.
    pub(super) fn tasks(&self, submitter: u64) -> String {
        format!("mp.{}.t.{:016x}.{submitter:016x}", self.pool, self.build)
    }

    /// Returns a subject of a submitter, or of a host.
    pub(super) fn of(&self, role: char, id: u64, what: &str) -> String {
        format!("mp.{}.{role}.{id:016x}.{what}", self.pool)
    }

    /// The limits for all.
    pub(super) fn all(&self, what: &str) -> String {
        format!("mp.{}.{what}", self.pool)
    }

    /// Where a host asks for tasks.
    pub(super) fn next(&self) -> String {
        format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", self.stream, self.consumer)
    }
}

/// The error answers of the server's API.
#[derive(Debug)]
pub(super) enum Refusal {
    /// Nobody has answered, which may pass.
    Silence(&'static str),
    /// There is no JetStream, or not for this user.
    NoJetStream,
    Error {
        number: u64,
        text: String,
    },
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Silence(why) => f.write_str(why),
            Self::NoJetStream => f.write_str("it has no JetStream"),
            Self::Error { text, .. } => f.write_str(text),
        }
    }
}

async fn api(client: &Client, subject: String, body: &Value) -> Result<Value, Refusal> {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let reply = client.request(subject, body.into()).await.map_err(|error| match error.kind() {
        RequestErrorKind::NoResponders => Refusal::NoJetStream,
        RequestErrorKind::TimedOut => Refusal::Silence("it does not answer"),
        _ => Refusal::Silence("the request could not be sent"),
    })?;
    let value: Value = serde_json::from_slice(&reply.payload).map_err(|_| Refusal::Silence("its answer is no JSON"))?;
    match value.get("error") {
        None => Ok(value),
        Some(error) => {
            let number = error["err_code"].as_u64().unwrap_or(0);
            let text = error["description"].as_str().unwrap_or("an error without a text").to_string();
            Err(match number {
                10039 | 10076 => Refusal::NoJetStream,
                _ => Refusal::Error { number, text },
            })
        }
    }
}

/// Returns the wanted configuration of the stream.
fn wanted_stream(address: &Address, names: &Names) -> Value {
    json!({
        "name": names.stream,
        "subjects": [format!("mp.{}.t.>", names.pool)],
        "retention": "workqueue",
        "discard": "new",
        "storage": match address.storage { Storage::File => "file", Storage::Memory => "memory" },
        "num_replicas": address.replicas,
        "max_msgs": address.most_messages,
        "max_bytes": address.most_bytes,
        "max_consumers": -1,
        "max_msgs_per_subject": -1,
        "max_msg_size": -1,
        "max_age": 0,
        "duplicate_window": Duration::from_secs(120).as_nanos() as u64,
        "metadata": { "multiprocess.lease": format!("{:?}", address.lease) },
    })
}

fn wanted_consumer(address: &Address, names: &Names) -> Value {
    json!({
        "durable_name": names.consumer,
        "filter_subject": format!("mp.{}.t.{:016x}.>", names.pool, names.build),
        "ack_policy": "explicit",
        "deliver_policy": "all",
        "replay_policy": "instant",
        "ack_wait": address.lease.as_nanos() as u64,
        "max_deliver": -1,
        "max_ack_pending": MOST_HELD,
        "max_waiting": 10_000,
        "inactive_threshold": FORGOTTEN_AFTER.as_nanos() as u64,
    })
}

/// The first property of a configuration that differs from the wanted one, with both values.
fn difference(wanted: &Value, there: &Value, properties: &[(&str, &str)]) -> Option<String> {
    let found = properties.iter().find(|(pointer, _)| wanted.pointer(pointer) != there.pointer(pointer));
    let value = |of: &Value, pointer| of.pointer(pointer).map_or_else(|| "nothing".into(), Value::to_string);
    found.map(|(pointer, name)| {
        let (there, wanted) = (value(there, pointer), value(wanted, pointer));
        format!("has {name} {there}, and {wanted} is wanted here")
    })
}

const STREAM: [(&str, &str); 8] = [
    ("/storage", "the storage"),
    ("/num_replicas", "the number of replicas"),
    ("/max_msgs", "the limit of messages"),
    ("/max_bytes", "the limit of bytes"),
    ("/metadata/multiprocess.lease", "the lease"),
    ("/retention", "the retention"),
    ("/discard", "the discard policy"),
    ("/subjects", "the subjects"),
];

const CONSUMER: [(&str, &str); 3] = [
    ("/ack_wait", "the lease (in ns)"),
    ("/filter_subject", "the subject"),
    ("/ack_policy", "the acknowledgement policy"),
];

/// The servers of an address, and the version of the one that is connected.
fn servers(client: &Client, target: &Target) -> String {
    format!("{} (NATS {})", target.named(), client.server_info().version)
}

fn failed(client: &Client, target: &Target, doing: &str, refusal: &Refusal) -> Failure {
    let (servers, pool) = (servers(client, target), &target.pool);
    let text = format!("cannot {doing} of the cluster pool {pool} at {servers}: {refusal}");
    match refusal {
        Refusal::Silence(_) => Failure::passing(text),
        Refusal::NoJetStream => Failure::lasting(format!(
            "{text}: start the server with JetStream (`nats-server -js`), and let this user's account have it"
        )),
        // Room and servers for replicas do not come by themselves. A server that starts needs a moment.
        Refusal::Error { number: 10023 | 10028 | 10047, .. } => Failure::lasting(format!(
            "{text}: the stream reserves all that may wait in it, so give JetStream more room (`max_file_store`, `max_memory_store`), \
             or let fewer bytes wait (`Address::most_waiting`)"
        )),
        Refusal::Error { number: 10005 | 10074, .. } => Failure::lasting(text),
        Refusal::Error { .. } => Failure::passing(text),
    }
}

/// A stream that is gone is made again only after this time: a server of 2.10 may remove the folder of the old one so late that it removes the files of
/// the new one, which then stores nothing.
const REST: Duration = Duration::from_millis(250);

/// Sees to it that the stream is there, as it is wanted; when it was made, as [`made`] has it. `again`: it was there before.
pub(super) async fn ensure_stream(
    client: &Client,
    address: &Address,
    target: &Target,
    names: &Names,
    again: bool,
) -> Result<String, Failure> {
    let (wanted, stream) = (wanted_stream(address, names), &names.stream);
    let there = match api(client, format!("$JS.API.STREAM.INFO.{stream}"), &Value::Null).await {
        Err(Refusal::Error { number: NO_SUCH_STREAM, .. }) => {
            sleep(if again { REST } else { Duration::ZERO }).await;
            match api(client, format!("$JS.API.STREAM.CREATE.{stream}"), &wanted).await {
                // Somebody else was quicker, and wants another, or the same and has taken the room for it.
                Err(refusal @ Refusal::Error { .. }) => {
                    api(client, format!("$JS.API.STREAM.INFO.{stream}"), &Value::Null).await.map_err(|_| refusal)
                }
                created => created,
            }
            .map_err(|refusal| failed(client, target, "make the stream", &refusal))?
        }
        found => found.map_err(|refusal| failed(client, target, "find the stream", &refusal))?,
    };
    match difference(&wanted, &there["config"], &STREAM) {
        None => Ok(made_of(&there)),
        Some(difference) => Err(Failure::lasting(format!(
            "the stream {stream} of the cluster pool {} at {} {difference}: give all hosts and submitters the same address, \
             or delete the stream while nobody uses it",
            names.pool,
            servers(client, target)
        ))),
    }
}

/// When the stream was made that is there now, in the server's words; another one has another time.
pub(super) async fn made(client: &Client, names: &Names) -> Option<String> {
    api(client, format!("$JS.API.STREAM.INFO.{}", names.stream), &Value::Null).await.ok().map(|info| made_of(&info))
}

/// Empty if that is not known.
fn made_of(info: &Value) -> String {
    info["created"].as_str().unwrap_or_default().into()
}

/// Sees to it that the consumer of this build is there, as it is wanted.
pub(super) async fn ensure_consumer(
    client: &Client,
    address: &Address,
    target: &Target,
    names: &Names,
) -> Result<(), Failure> {
    let (wanted, Names { stream, consumer, .. }) = (wanted_consumer(address, names), names);
    let there = match api(client, format!("$JS.API.CONSUMER.INFO.{stream}.{consumer}"), &Value::Null).await {
        Err(Refusal::Error { number: NO_SUCH_CONSUMER, .. }) => {
            let body = json!({ "stream_name": stream, "config": wanted });
            let created = api(client, format!("$JS.API.CONSUMER.DURABLE.CREATE.{stream}.{consumer}"), &body).await;
            created.map_err(|refusal| failed(client, target, "make the consumer", &refusal))?
        }
        found => found.map_err(|refusal| failed(client, target, "find the consumer", &refusal))?,
    };
    match difference(&wanted, &there["config"], &CONSUMER) {
        None => Ok(()),
        Some(difference) => {
            let (pool, servers) = (&names.pool, servers(client, target));
            Err(Failure::lasting(format!(
                "the consumer {consumer} of the cluster pool {pool} at {servers} {difference}"
            )))
        }
    }
}

/// Deletes message `number` of a submitter, wherever it is; one that is gone is deleted.
pub(super) async fn delete(client: &Client, names: &Names, sequence: u64, message: (u64, u64)) -> Result<(), Refusal> {
    match has(client, names, sequence, message).await {
        Some(true) => {}
        Some(false) => return Ok(()),
        // Another message may be there.
        None => return Err(Refusal::Silence("it does not say whether the message is there")),
    }
    delete_at(client, names, sequence).await
}

async fn delete_at(client: &Client, names: &Names, sequence: u64) -> Result<(), Refusal> {
    let body = json!({ "seq": sequence, "no_erase": true });
    match api(client, format!("$JS.API.STREAM.MSG.DELETE.{}", names.stream), &body).await {
        Ok(_) | Err(Refusal::Error { number: NO_SUCH_MESSAGE | NO_SUCH_STREAM | 10043 | 10057, .. }) => Ok(()),
        Err(refusal) => Err(refusal),
    }
}

/// Deletes messages of a submitter by their numbers, wherever they are: its messages in the stream are looked through. Returns those
/// that were there.
pub(super) async fn sweep(
    client: &Client,
    names: &Names,
    submitter: u64,
    numbers: &[u64],
) -> Result<Vec<u64>, Refusal> {
    let mut heads: HashMap<String, u64> =
        numbers.iter().map(|number| (base64(&Tasks::head(submitter, *number)), *number)).collect();
    let (mut next, mut deleted) = (1, Vec::new());
    while !heads.is_empty() {
        let body = json!({ "seq": next, "next_by_subj": names.tasks(submitter) });
        let there = match api(client, format!("$JS.API.STREAM.MSG.GET.{}", names.stream), &body).await {
            Err(Refusal::Error { number: NO_SUCH_MESSAGE | NO_SUCH_STREAM, .. }) => break,
            there => there?,
        };
        let message = &there["message"];
        let sequence = message["seq"].as_u64().filter(|sequence| *sequence >= next);
        let sequence = sequence.ok_or(Refusal::Silence("its answer names no message"))?;
        let head = message["data"].as_str().and_then(|data| data.get(..HEAD));
        if let Some(number) = head.and_then(|head| heads.remove(head)) {
            delete_at(client, names, sequence).await?;
            deleted.push(number);
        }
        next = sequence + 1;
    }
    Ok(deleted)
}

/// Whether the stream has message `number` of a submitter, which somebody may hold; not known if the server does not answer. In
/// a stream that was made anew another message may have its sequence number.
pub(super) async fn has(
    client: &Client,
    names: &Names,
    sequence: u64,
    (submitter, number): (u64, u64),
) -> Option<bool> {
    let body = json!({ "seq": sequence });
    match api(client, format!("$JS.API.STREAM.MSG.GET.{}", names.stream), &body).await {
        Ok(there) => {
            let head = base64(&Tasks::head(submitter, number));
            Some(there["message"]["data"].as_str().is_some_and(|data| data.starts_with(&head)))
        }
        Err(Refusal::Error { number: NO_SUCH_MESSAGE | NO_SUCH_STREAM, .. }) => Some(false),
        Err(_) => None,
    }
}

/// Encodes bytes as the server's API expects them. Their number is a multiple of three.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let four = |three: &[u8]| {
        let word = three.iter().fold(0_usize, |word, byte| word << 8 | usize::from(*byte));
        [18, 12, 6, 0].map(|shift| char::from(DIGITS[word >> shift & 63]))
    };
    bytes.chunks_exact(3).flat_map(four).collect()
}

/// Removes all that a submitter has in the stream.
pub(super) async fn purge(client: &Client, names: &Names, submitter: u64) -> Result<(), Refusal> {
    let body = json!({ "filter": names.tasks(submitter) });
    api(client, format!("$JS.API.STREAM.PURGE.{}", names.stream), &body).await.map(drop)
}

/// Submitters that have something in the stream for this build.
pub(super) async fn submitters(client: &Client, names: &Names) -> Result<Vec<u64>, Refusal> {
    let prefix = format!("mp.{}.t.{:016x}.", names.pool, names.build);
    let body = json!({ "subjects_filter": format!("{prefix}>") });
    let info = api(client, format!("$JS.API.STREAM.INFO.{}", names.stream), &body).await?;
    let subjects = info["state"]["subjects"].as_object();
    let ids = subjects
        .into_iter()
        .flatten()
        .filter_map(|(subject, _)| u64::from_str_radix(subject.strip_prefix(&prefix)?, 16).ok());
    Ok(ids.collect())
}

/// The server's answer to a message that was published to a stream.
#[derive(Debug, PartialEq)]
pub(super) enum Stored {
    At(u64),
    /// It takes no more before something leaves it.
    Full,
    /// There is no such stream.
    NoStream,
    Refused(String),
}

impl Stored {
    pub(super) fn read(bytes: &[u8]) -> Self {
        let Ok(value) = serde_json::from_slice::<Value>(bytes) else {
            return Self::Refused("its answer is no JSON".into());
        };
        let error = &value["error"];
        if let Some(sequence) = value["seq"].as_u64().filter(|_| error.is_null()) {
            return Self::At(sequence);
        }
        let text = error["description"].as_str().unwrap_or("an error without a text");
        match text {
            "maximum messages exceeded" | "maximum bytes exceeded" => Self::Full,
            _ if error["err_code"] == NO_SUCH_STREAM => Self::NoStream,
            _ => Self::Refused(text.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_to_a_publish_are_distinguished() {
        let read = |text: &str| Stored::read(text.as_bytes());
        assert_eq!(read(r#"{"stream":"MP_x","seq":7}"#), Stored::At(7));
        assert_eq!(read(r#"{"stream":"MP_x","seq":7,"duplicate":true}"#), Stored::At(7));
        let full = r#"{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"},"stream":"MP_x","seq":0}"#;
        assert_eq!(read(full), Stored::Full);
        let gone = r#"{"error":{"code":404,"err_code":10059,"description":"stream not found"}}"#;
        assert_eq!(read(gone), Stored::NoStream);
        let failed = r#"{"error":{"code":503,"err_code":10077,"description":"no space left on device"}}"#;
        assert_eq!(read(failed), Stored::Refused("no space left on device".into()));
        assert!(matches!(read("{"), Stored::Refused(_)));
    }

    #[test]
    fn byte_counts_are_formatted_as_by_the_server() {
        assert_eq!(base64(&b"Many hands make light work"[..24]), "TWFueSBoYW5kcyBtYWtlIGxpZ2h0IHdv");
        assert_eq!(base64(&[0, 255, 62, 63, 251, 240]), "AP8+P/vw");
    }

    #[test]
    fn error_of_a_different_stream_has_both_values() {
        let names = Names::new("p", 1);
        let address = Address::new("nats://h/p");
        let wanted = wanted_stream(&address, &names);
        assert_eq!(difference(&wanted, &wanted, &STREAM), None);
        let others = [
            (address.clone().storage(Storage::Memory), "memory", "file"),
            (address.clone().replicas(3), "3", "1"),
            (address.clone().most_waiting(5, 1 << 30), "5", "100000"),
            (address.clone().most_waiting(100_000, 7), "7", "1073741824"),
            (address.clone().lease(Duration::from_secs(2)), "2s", "5s"),
        ];
        for (other, there, here) in others {
            let text = difference(&wanted, &wanted_stream(&other, &names), &STREAM).unwrap();
            assert!(text.contains(there) && text.contains(here), "{text}");
        }
    }
}
