//! What the tests of cluster pools share: servers that they start and end, hosts that are processes, and a look at the stream.
#![allow(dead_code, clippy::unwrap_used, reason = "each test program uses a part of it, and a test fails by it")]

use multiprocess::cluster::{Address, Served, Storage};
use multiprocess::{self as mp, Pool, Process};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub mod build;
pub mod proxy;
mod server;
pub use server::{Server, binary};

const PATIENCE: Duration = Duration::from_secs(20);

/// Ends the test here if there is no server to test with.
#[macro_export]
macro_rules! server {
    () => {
        server!("")
    };
    ($config:expr) => {
        match cluster::binary() {
            Some(binary) => cluster::Server::start(binary, $config),
            None => return Default::default(),
        }
    };
}

impl Server {
    pub fn url(&self) -> String {
        self.url_of("pool")
    }

    pub fn signal(&self, signal: &str) {
        kill(self.pid(), signal);
    }

    /// The address of its pool, with a lease that tests can wait for.
    pub fn address(&self) -> Address {
        Address::new(self.url()).lease(LEASE)
    }

    pub async fn client(&self) -> async_nats::Client {
        async_nats::connect(format!("nats://127.0.0.1:{}", self.port)).await.unwrap()
    }

    /// Subscribes; what is published from now on arrives.
    pub async fn subscribe(&self, client: &async_nats::Client, subject: &'static str) -> async_nats::Subscriber {
        let subscriber = client.subscribe(subject).await.unwrap();
        // A flush does not wait for the server.
        client.request("$JS.API.INFO", "".into()).await.unwrap();
        subscriber
    }

    async fn api(&self, what: &str, body: &str) -> serde_json::Value {
        let client = self.client().await;
        let reply = client.request(format!("$JS.API.{what}"), body.to_string().into()).await.unwrap();
        serde_json::from_slice(&reply.payload).unwrap()
    }

    /// Messages that are in the stream of the pool.
    pub async fn messages(&self) -> u64 {
        self.api("STREAM.INFO.MP_pool", "").await["state"]["messages"].as_u64().unwrap_or(0)
    }

    /// Messages that the stream of the pool has had, with those that were removed.
    pub async fn stored(&self) -> u64 {
        self.api("STREAM.INFO.MP_pool", "").await["state"]["last_seq"].as_u64().unwrap_or(0)
    }

    pub async fn consumers(&self) -> u64 {
        self.api("STREAM.INFO.MP_pool", "").await["state"]["consumer_count"].as_u64().unwrap_or(0)
    }

    /// The only consumer of the stream of the pool, as the server tells of it.
    pub async fn consumer(&self) -> serde_json::Value {
        let names = self.api("CONSUMER.NAMES.MP_pool", "").await;
        let name = names["consumers"][0].as_str().unwrap_or("none");
        self.api(&format!("CONSUMER.INFO.MP_pool.{name}"), "").await
    }

    /// Takes messages of the pool as a host does; the rest is up to the test.
    pub async fn take(&self, client: &async_nats::Client, count: usize) -> Vec<async_nats::Message> {
        use futures::StreamExt;
        let inbox = client.new_inbox();
        let taken = client.subscribe(inbox.clone()).await.unwrap();
        let name = self.consumer().await["name"].as_str().expect("a consumer").to_string();
        let next = format!("$JS.API.CONSUMER.MSG.NEXT.MP_pool.{name}");
        client.publish_with_reply(next, inbox, format!("{{\"batch\":{count}}}").into()).await.unwrap();
        tokio::time::timeout(PATIENCE, taken.take(count).collect()).await.expect("messages in time")
    }

    pub async fn delete_consumer(&self) {
        let name = self.consumer().await["name"].as_str().expect("a consumer").to_string();
        self.api(&format!("CONSUMER.DELETE.MP_pool.{name}"), "").await;
    }

    /// Changes a property of the stream of the pool.
    pub async fn set_stream(&self, property: &str, value: i64) {
        let mut config = self.api("STREAM.INFO.MP_pool", "").await["config"].take();
        config[property] = value.into();
        let updated = self.api("STREAM.UPDATE.MP_pool", &config.to_string()).await;
        assert!(updated["error"].is_null(), "{updated}");
    }

    pub async fn purge(&self) {
        self.api("STREAM.PURGE.MP_pool", "").await;
    }

    pub async fn delete_stream(&self) {
        self.api("STREAM.DELETE.MP_pool", "").await;
    }

    /// Nothing is left in the stream.
    pub async fn is_empty(&self) {
        let start = Instant::now();
        loop {
            let messages = self.messages().await;
            if messages == 0 {
                break;
            }
            assert!(start.elapsed() < PATIENCE, "{messages} messages are left in the stream");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(self.consumers().await <= 1, "there are consumers beyond the durable one");
    }
}

/// Long enough for a busy machine, on which a process may not run for a second.
pub const LEASE: Duration = Duration::from_millis(2000);

/// What a host process is to be.
#[derive(Clone, Serialize, Deserialize)]
pub struct Setup {
    pub url: String,
    pub workers: usize,
    pub lease: Duration,
    pub is_in_memory: bool,
    pub grace: Duration,
    /// Where it and its workers are.
    pub dir: PathBuf,
}

impl Setup {
    pub fn of(server: &Server, workers: usize) -> Self {
        Self {
            url: server.url(),
            workers,
            lease: LEASE,
            is_in_memory: false,
            grace: PATIENCE,
            dir: server.dir().into(),
        }
    }
}

/// Serves until SIGTERM, and then drains.
pub async fn serve(setup: Setup) -> mp::Result<(usize, usize, usize)> {
    log();
    std::env::set_current_dir(&setup.dir)?;
    let pool = Pool::new(setup.workers)?;
    let storage = if setup.is_in_memory { Storage::Memory } else { Storage::File };
    let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut serving = pool.serve(Address::new(&setup.url).lease(setup.lease).storage(storage));
    let served: Served = tokio::select! {
        served = &mut serving => served?,
        _ = term.recv() => {
            serving.drain(setup.grace);
            serving.await?
        }
    };
    pool.close();
    pool.join().await?;
    Ok((served.items, served.given_back, served.killed))
}

/// A process that serves. Dropped, it is killed.
pub struct Host {
    pub process: Process<mp::Result<(usize, usize, usize)>>,
}

impl Host {
    pub fn start(server: &Server, workers: usize) -> Self {
        Self::of(Setup::of(server, workers))
    }

    pub fn of(setup: Setup) -> Self {
        Self { process: Process::builder().kill_on_drop(true).spawn(serve, (setup,)).unwrap() }
    }

    pub fn signal(&self, signal: &str) {
        kill(self.process.pid(), signal);
    }

    /// Drains it: what it has answered, given back and killed.
    pub async fn drain(self) -> (usize, usize, usize) {
        self.signal("TERM");
        tokio::time::timeout(PATIENCE, self.process).await.expect("a host that drains in time").unwrap().unwrap()
    }
}

/// Sends a signal; returns from STOP when each thread has stopped, which on a busy machine is later.
pub fn kill(pid: u32, signal: &str) {
    if signal == "STOP" {
        return crate::common::stop(pid);
    }
    let sent = Command::new("kill").args([format!("-{signal}"), pid.to_string()]).status().unwrap();
    assert!(sent.success());
}

/// A cluster pool at this server.
pub fn pool(server: &Server) -> Pool {
    log();
    Pool::builder().cluster(server.address()).build().unwrap()
}

/// Waits until a condition holds that has to be asked for.
pub async fn until(what: &str, condition: impl AsyncFnMut() -> bool) {
    until_within(PATIENCE, what, condition).await;
}

/// The same, for one that may take as long as `limit`.
pub async fn until_within(limit: Duration, what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let all = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(limit, all).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Collects the warnings of the crate, each with its fields.
#[derive(Clone, Default)]
pub struct Warnings(Arc<Mutex<Vec<String>>>);

impl Warnings {
    pub fn list(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Warnings {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        if *event.metadata().level() == tracing::Level::WARN && event.metadata().target().starts_with("multiprocess") {
            self.0.lock().unwrap().push(text_of(event));
        }
    }
}

/// The fields of an event, its message among them.
pub fn text_of(event: &tracing::Event<'_>) -> String {
    let mut text = Text(String::new());
    event.record(&mut text);
    text.0
}

struct Text(String);

impl tracing::field::Visit for Text {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        self.0 += &format!(" {field}={value:?}");
    }
}

/// Prints what the crate tells `tracing`, if `MULTIPROCESS_LOG` is set.
pub fn log() {
    use tracing_subscriber::prelude::*;
    struct Print;
    impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Print {
        fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
            let target = event.metadata().target();
            if !target.starts_with("multiprocess") {
                return;
            }
            let now =
                std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() % 1_000_000;
            eprintln!("{now} {} {target}{}", std::process::id(), text_of(event));
        }
    }
    if std::env::var_os("MULTIPROCESS_LOG").is_some() {
        let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Print));
    }
}
