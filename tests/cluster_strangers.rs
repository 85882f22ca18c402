//! Messages of strangers to a pool's subjects, servers that refuse, and users without permission.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use multiprocess::cluster::{Address, Storage};
use multiprocess::{self as mp, ErrorKind, Pool};
use std::collections::BTreeSet;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

mod cluster;
mod common;
use cluster::proxy::Proxy;
use cluster::{Host, Server, until, until_within};
use common::within;

mp::test_support!();

const MS: Duration = Duration::from_millis(1);

fn square(n: u64) -> u64 {
    n * n
}

fn forever() {
    loop {
        std::thread::sleep(MS);
    }
}

/// What is wrong: short, long, of another version, a count that lies, zeros.
fn garbage() -> Vec<Vec<u8>> {
    let mut all = vec![vec![], vec![1], vec![2; 100], vec![0; 1 << 20], vec![0xff; 10_000]];
    for kind in 0..12 {
        all.push(vec![1, kind]);
        all.push([&[1, kind][..], &[0; 200]].concat());
        all.push([&[1, kind][..], &[0xff; 200]].concat());
        all.push([&[9, kind][..], &[0; 50]].concat());
    }
    all
}

/// Subjects of the pool that somebody listens to.
async fn subjects(server: &Server, pool: &Pool) -> Vec<String> {
    let client = server.client().await;
    let mut all = server.subscribe(&client, "mp.pool.>").await;
    let call = pool.apply_async(square, (1,));
    let mut found = BTreeSet::new();
    let end = Instant::now() + 1500 * MS;
    while let Ok(message) = tokio::time::timeout_at(end.into(), futures::StreamExt::next(&mut all)).await {
        found.insert(message.unwrap().subject.to_string());
    }
    within(call).await.unwrap();
    found.into_iter().filter(|subject| !subject.contains(".i.")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_any_subject_of_a_pool_harms_nobody_and_is_removed() {
    let server = server!();
    let pool = cluster::pool(&server);
    let host = Host::start(&server, 2);
    let running = pool.apply_async(forever, ());
    cluster::until("a host that is known", async || pool.workers() == 2).await;
    let found = subjects(&server, &pool).await;
    assert!(found.iter().any(|subject| subject.contains(".h.")), "{found:?}");
    let (task, own) = found.iter().partition::<Vec<_>, _>(|subject| subject.contains(".t."));
    let mut targets: Vec<String> = found.clone();
    for subject in own {
        // All that belongs to this submitter or host.
        if let Some((base, _)) = subject.match_indices('.').nth(3).map(|(at, _)| subject.split_at(at)) {
            targets.extend(["r", "q", "h", "b", "p", "a.0", "in", "e", "n.0"].map(|what| format!("{base}.{what}")));
        }
    }
    targets.extend(["c", "beat", "roll"].map(|what| format!("mp.pool.{what}")));
    assert!(!task.is_empty() && targets.len() > 10, "{found:?}");
    let client = server.client().await;
    for subject in targets {
        for bytes in garbage() {
            let _ = client.publish_with_reply(subject.clone(), "nobody.there", bytes.into()).await;
        }
    }
    client.flush().await.unwrap();
    until("all of it is removed", async || server.messages().await == 1).await;
    assert!(!running.ready(), "nobody else's cancel counts");
    running.cancel();
    assert_eq!(within(pool.apply(square, (5,))).await.unwrap(), 25);
    server.is_empty().await;
    host.drain().await;
}

fn config(users: &str) -> String {
    format!("authorization {{ users: [ {users} ] }}\n")
}

/// What a pool at this address fails with, and what serving there ends with.
async fn both(address: Address) -> (mp::Error, mp::Error) {
    let began = Instant::now();
    let pool = Pool::builder().cluster(&address).build().unwrap();
    let submitted = within(pool.apply(square, (1,))).await.unwrap_err();
    let local = Pool::new(1).unwrap();
    let served = within(local.serve(&address)).await.unwrap_err();
    // Five seconds each, and what a busy machine takes.
    assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
    (submitted, served)
}

async fn is_refused(address: Address, words: &[&str]) {
    let (submitted, served) = both(address).await;
    for error in [submitted, served] {
        let text = error.to_string();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{text}");
        assert!(words.iter().all(|word| text.to_lowercase().contains(word)), "{words:?}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_password_or_token_is_named_by_the_error() {
    let server = server!(&config("{user: me, password: right}"));
    is_refused(server.address().user("me", "wrong"), &["authorization violation", "password"]).await;
    is_refused(server.address(), &["authorization violation"]).await;
    let pool = Pool::builder().cluster(server.address().user("me", "right")).build().unwrap();
    let local = Pool::new(1).unwrap();
    let _serving = local.serve(server.address().user("me", "right"));
    assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
}

/// A pool and a host that meet at this address.
async fn is_taken(address: Address) {
    let pool = Pool::builder().cluster(&address).build().unwrap();
    let local = Pool::new(1).unwrap();
    let _serving = local.serve(&address);
    assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_taken_and_a_wrong_one_is_named_by_the_error() {
    let server = server!("authorization { token: right }\n");
    is_refused(server.address().token("wrong"), &["authorization violation", "token"]).await;
    is_taken(server.address().token("right")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_of_an_address_that_are_dead_or_say_nothing_are_passed_over() {
    let server = server!();
    // It takes connections, and nobody reads them.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().unwrap();
    let url = format!("nats://127.0.0.1:1,{silent},127.0.0.1:{}/pool", server.port);
    for _ in 0..3 {
        is_taken(Address::new(&url).lease(cluster::LEASE)).await;
    }
    let none = Address::new("nats://127.0.0.1:1,127.0.0.1:2/pool").offline_timeout(300 * MS);
    let error = within(Pool::builder().cluster(none).build().unwrap().apply(square, (3,))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("127.0.0.1:1, 127.0.0.1:2"), "{error}");
}

#[cfg(feature = "cluster-nkeys")]
#[tokio::test(flavor = "multi_thread")]
async fn a_credentials_file_that_cannot_be_read_is_named_by_the_error() {
    let server = server!();
    is_refused(server.address().credentials_file("/missing/user.creds"), &["/missing/user.creds"]).await;
}

/// The server has an operator, and accounts that this signed.
#[cfg(feature = "cluster-nkeys")]
#[tokio::test(flavor = "multi_thread")]
async fn a_credentials_file_is_taken_and_one_of_an_unknown_account_is_named_by_the_error() {
    let server = server!(include_str!("nkeys/server.conf"));
    let file = |name| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nkeys").join(name);
    is_refused(server.address().credentials_file(file("stranger.creds")), &["authorization violation"]).await;
    is_refused(server.address(), &["authorization violation"]).await;
    is_taken(server.address().credentials_file(file("user.creds"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn user_without_permission_to_make_the_stream_gets_an_error_that_names_it() {
    let server = server!(&config("{user: me, password: x, permissions: {publish: \"other.>\", subscribe: \">\"}}"));
    is_refused(server.address().user("me", "x"), &["permissions violation", "nats 2."]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn server_without_jetstream_is_an_error_with_the_option_to_start_it() {
    let server = server!("# jetstream is not enabled\n");
    is_refused(server.address(), &["jetstream", "-js", "nats 2."]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_with_other_properties_is_an_error_that_names_both_values() {
    let server = server!();
    let pool = cluster::pool(&server);
    let _host = Host::start(&server, 1);
    assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
    is_refused(server.address().lease(Duration::from_secs(7)), &["lease", "7s", "2s", "nats 2."]).await;
    is_refused(server.address().storage(Storage::Memory), &["storage", "memory", "file"]).await;
    is_refused(server.address().most_waiting(17, 1 << 30), &["17", "100000"]).await;
    assert_eq!(within(pool.apply(square, (4,))).await.unwrap(), 16);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_reserves_more_than_the_server_has_is_an_error_with_both_ways_out() {
    let server = server!();
    is_refused(server.address().most_waiting(17, 9 << 30), &["insufficient", "max_file_store", "most_waiting"]).await;
}

/// Of two that make it at once, the second finds no room for another.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_takes_all_room_of_the_server_is_made_by_many_at_once() {
    let server = server!();
    let address = server.address().most_waiting(17, 7 << 30);
    let pools: Vec<_> = (0..8).map(|_| Pool::builder().cluster(&address).build().unwrap()).collect();
    let local = Pool::new(1).unwrap();
    let _serving = local.serve(&address);
    for pool in pools {
        assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_publish_is_an_error_of_the_call_and_not_its_timeout() {
    let rights = "{publish: {allow: [\"$JS.API.>\", \"mp.pool.roll\", \"mp.pool.i.>\"]}, subscribe: \">\"}";
    let server =
        server!(&config(&format!("{{user: admin, password: x}}, {{user: me, password: x, permissions: {rights}}}")));
    let pool = Pool::builder().cluster(server.address().user("me", "x")).build().unwrap();
    let began = Instant::now();
    let error = within(pool.apply(square, (1,))).await.unwrap_err();
    assert!(
        error.kind() == ErrorKind::Unavailable && error.to_string().to_lowercase().contains("permissions violation"),
        "{error}"
    );
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_too_old_is_an_error_that_names_both_versions() {
    let old = std::env::var_os("NATS_SERVER_OLD").map(PathBuf::from).filter(|file| file.is_file());
    let Some(binary) = old else {
        assert!(std::env::var_os("CI").is_none(), "no server of 2.9: `.ci/nats --old DIR`, and NATS_SERVER_OLD");
        eprintln!("SKIPPED: no server of 2.9 here (`.ci/nats --old DIR`; then NATS_SERVER_OLD=DIR/2.9/nats-server)");
        return;
    };
    let server = Server::start(binary, "");
    is_refused(server.address(), &["2.9.", "2.10"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_none_is_an_error_of_serve_as_well() {
    let local = Pool::new(1).unwrap();
    let error = within(local.serve("nats://h:0/pool")).await.unwrap_err();
    assert!(error.to_string().contains("nats://h:0/pool"), "{error}");
}

/// A certificate authority, and a certificate that it signed.
fn certificates(dir: &Path) -> bool {
    let openssl = |arguments: &[&str]| {
        let done = std::process::Command::new("openssl").args(arguments).current_dir(dir).output();
        done.is_ok_and(|done| done.status.success())
    };
    std::fs::write(dir.join("names"), "subjectAltName=IP:127.0.0.1\n").unwrap();
    let key = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "3650"];
    let ca = [&key[..], &["-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=tests"]].concat();
    let request = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    let request = [&request[..], &["-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=server"]].concat();
    let sign = [
        "x509",
        "-req",
        "-in",
        "server.csr",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-extfile",
        "names",
    ];
    let good = [&sign[..], &["-days", "3650", "-out", "server.pem"]].concat();
    openssl(&ca) && openssl(&request) && openssl(&good)
}

#[tokio::test(flavor = "multi_thread")]
async fn untrusted_certificates_and_plain_servers_are_named_by_the_error() {
    let dir = std::env::temp_dir().join(format!("mp-nats-tls-{}", common::alone::unique()));
    std::fs::create_dir_all(&dir).unwrap();
    if !certificates(&dir) {
        assert!(std::env::var_os("CI").is_none(), "there is no openssl that makes certificates");
        let _ = std::fs::remove_dir_all(dir);
        return eprintln!("SKIPPED: no openssl that makes certificates");
    }
    let tls = format!("tls {{ cert_file: {:?}, key_file: {:?} }}\n", dir.join("server.pem"), dir.join("server.key"));
    let server = server!(&tls);
    let secure = Address::new(server.url().replace("nats://", "tls://")).lease(cluster::LEASE);
    let trusted = secure.clone().ca(dir.join("ca.pem"));
    is_refused(secure, &["certificate"]).await;
    is_refused(server.address(), &["certificate"]).await;
    is_refused(trusted.clone().ca(dir.join("missing.pem")), &["no such file"]).await;
    let pool = Pool::builder().cluster(&trusted).build().unwrap();
    let local = Pool::new(1).unwrap();
    let _serving = local.serve(&trusted);
    assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
    let plain = server!();
    let secure = Address::new(plain.url().replace("nats://", "tls://")).ca(dir.join("ca.pem")).lease(cluster::LEASE);
    is_refused(secure, &["tls"]).await;
    let _ = std::fs::remove_dir_all(dir);
}

/// A folder that goes with its test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let name = format!("mp-nats-files-{}-{}", common::alone::unique(), COUNT.fetch_add(1, SeqCst));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    /// Writes a file of `tests/tls` as PEM.
    fn pem(&self, name: &str, kind: &str, der: &[u8]) -> PathBuf {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let four = |three: &[u8]| {
            let word = (0..3).fold(0, |word, at| word << 8 | usize::from(three.get(at).copied().unwrap_or(0)));
            let digit = |at: usize| if at > three.len() { '=' } else { char::from(DIGITS[word >> (18 - 6 * at) & 63]) };
            [0, 1, 2, 3].map(digit)
        };
        let digits: String = der.chunks(3).flat_map(four).collect();
        let lines = digits.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap());
        let text = format!("-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n", lines.collect::<Vec<_>>().join("\n"));
        let file = self.0.join(name);
        std::fs::write(&file, text).unwrap();
        file
    }

    fn certificate(&self, name: &str, der: &[u8]) -> PathBuf {
        self.pem(name, "CERTIFICATE", der)
    }

    /// The key of all of them.
    fn key(&self) -> PathBuf {
        self.pem("key.pem", "PRIVATE KEY", include_bytes!("tls/key.der"))
    }

    fn ca(&self) -> PathBuf {
        self.certificate("ca.pem", include_bytes!("tls/ca.der"))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn secure(server: &Server) -> Address {
    Address::new(server.url().replace("nats://", "tls://")).lease(cluster::LEASE)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_of_the_server_is_named_by_the_error() {
    let folder = Folder::new();
    let (certificate, key) = (folder.certificate("expired.pem", include_bytes!("tls/expired.der")), folder.key());
    let server = server!(&format!("tls {{ cert_file: {certificate:?}, key_file: {key:?} }}\n"));
    is_refused(secure(&server).ca(folder.ca()), &["certificate", "expired"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_verifies_takes_clients_with_a_certificate_of_its_authority_and_no_others() {
    let folder = Folder::new();
    let (key, ca) = (folder.key(), folder.ca());
    let certificate = folder.certificate("server.pem", include_bytes!("tls/server.der"));
    let own = folder.certificate("own.pem", include_bytes!("tls/certificate.der"));
    let client = folder.certificate("client.pem", include_bytes!("tls/client.der"));
    let server =
        server!(&format!("tls {{ cert_file: {certificate:?}, key_file: {key:?}, ca_file: {ca:?}, verify: true }}\n"));
    let secure = secure(&server).ca(&ca);
    is_refused(secure.clone(), &["certificate", "address::client_certificate"]).await;
    is_refused(secure.clone().client_certificate(own, &key), &["address::client_certificate"]).await;
    let missing = folder.0.join("missing.pem");
    is_refused(secure.clone().client_certificate(missing, &key), &["no such file"]).await;
    is_taken(secure.client_certificate(client, key)).await;
}

/// The code blocks of this language in the part of the guide that has this heading.
fn blocks(heading: &str, language: &str) -> Vec<String> {
    let guide = include_str!("../docs/guide/many-machines.md");
    let part = guide.split("\n## ").find(|part| part.starts_with(heading)).expect(heading);
    let fence = format!("```{language}\n");
    part.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap().to_string()).collect()
}

/// The commands and the configuration of the guide, as they are; only names of files become paths.
#[tokio::test(flavor = "multi_thread")]
async fn the_walk_through_of_tls_in_the_guide_leads_to_a_pool() {
    let folder = Folder::new();
    let (commands, config) = (blocks("TLS and users", "sh").concat(), blocks("TLS and users", "text").concat());
    let done = std::process::Command::new("bash").args(["-ec", &commands]).current_dir(&folder.0).output();
    if !done.as_ref().is_ok_and(|done| done.status.success()) {
        let openssl = std::process::Command::new("openssl").arg("version").output();
        assert!(openssl.is_err(), "the commands of the guide fail: {done:?}");
        assert!(std::env::var_os("CI").is_none(), "there is no openssl");
        return eprintln!("SKIPPED: there is no openssl here");
    }
    let lines = config.lines().filter(|line| !line.starts_with("listen") && !line.starts_with("jetstream"));
    let mut config = lines.collect::<Vec<_>>().join("\n") + "\n";
    for file in ["ca.pem", "server.pem", "server.key"] {
        let path = folder.0.join(file);
        assert!(config.contains(file) && path.is_file(), "{file}: {config}");
        config = config.replace(&format!("{file:?}"), &format!("{path:?}"));
    }
    let server = server!(&config);
    let file = |name| folder.0.join(name);
    is_refused(secure(&server).ca(file("ca.pem")), &["address::client_certificate"]).await;
    let address = secure(&server).ca(file("ca.pem")).client_certificate(file("client.pem"), file("client.key"));
    let quoted = blocks("TLS and users", "rust,no_run").concat();
    assert!(
        quoted.contains(".ca(\"ca.pem\")") && quoted.contains(".client_certificate(\"client.pem\", \"client.key\")")
    );
    is_taken(address).await;
}

async fn next(subscriber: &mut async_nats::Subscriber) -> async_nats::Message {
    within(futures::StreamExt::next(subscriber)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_cancelled_while_its_acknowledgement_is_lost_leaves_nothing_in_the_stream() {
    let server = server!();
    let proxy = Proxy::before(&server).await;
    let (pool, waits) = proxy.pool(&server).await;
    let client = server.client().await;
    let mut cancels = server.subscribe(&client, "mp.pool.c").await;
    proxy.keeps_back.store(true, SeqCst);
    let call = pool.apply_async(square, (2,));
    until("both are in the stream", async || server.messages().await == 2).await;
    call.cancel();
    next(&mut cancels).await;
    proxy.cut();
    until("it is removed", async || server.messages().await == 1).await;
    waits.cancel();
    server.is_empty().await;
}

fn len(bytes: Vec<u8>) -> usize {
    bytes.len()
}

/// It was called off before the stream had acknowledged it.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_cancelled_by_the_end_of_its_pool_leaves_nothing_in_the_stream() {
    let server = server!();
    let proxy = Proxy::before(&server).await;
    let (pool, _waits) = proxy.pool(&server).await;
    server.signal("STOP");
    let before = proxy.passed();
    let _call = pool.apply_async(len, (vec![0; 10_000],));
    // With its head. What else would pass is an echo that is asked for 2 s later.
    until("it is on its way", async || proxy.passed() >= before + 10_100).await;
    let before = proxy.passed();
    pool.terminate();
    until("it is called off", async || proxy.passed() > before).await;
    server.signal("CONT");
    until("both are removed", async || server.stored().await == 2 && server.messages().await == 0).await;
}

/// More than the client and the sockets take is to be sent: each further message would wait for two seconds.
#[tokio::test(flavor = "multi_thread")]
async fn calls_by_a_connection_that_takes_nothing_fail_together_and_later_ones_do_not() {
    let server = server!();
    let proxy = Proxy::before(&server).await;
    let address = proxy.address().offline_timeout(Duration::from_secs(2));
    let pool = Pool::builder().cluster(&address).build().unwrap();
    let client = server.client().await;
    let mut beats = server.subscribe(&client, "mp.pool.beat").await;
    // Of one host that was there, with many slots: as many messages may be out.
    let host = Host::start(&server, 1);
    until("a host is known", async || pool.workers() == 1).await;
    let mut beat = next(&mut beats).await.payload.to_vec();
    host.drain().await;
    let mut at = 2 + 8 + 8 + 4;
    for _ in ["its hostname", "its name"] {
        at += 8 + u64::from_le_bytes(beat[at..at + 8].try_into().unwrap()) as usize;
    }
    beat[at..at + 4].copy_from_slice(&10_000_u32.to_le_bytes());
    client.publish("mp.pool.beat", beat.into()).await.unwrap();
    until("its slots are known", async || pool.workers() == 10_000).await;
    proxy.takes_nothing.store(true, SeqCst);
    let calls: Vec<_> = (0..4000).map(|_| pool.apply_async(len, (vec![0; 8 << 10],))).collect();
    let all = tokio::time::timeout(Duration::from_secs(60), futures::future::join_all(calls));
    for outcome in all.await.expect("an end of each call in time") {
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Unavailable);
    }
    proxy.takes_nothing.store(false, SeqCst);
    let _host = Host::start(&server, 1);
    // What the client still has goes to the server first: tens of MiB through a proxy.
    let works = async || pool.apply(square, (5,)).await.is_ok_and(|n| n == 25);
    until_within(Duration::from_secs(60), "it works again", works).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_published_again_is_to_be_asked_about_before_it_begins() {
    let server = server!();
    let proxy = Proxy::before(&server).await;
    let (pool, _waits) = proxy.pool(&server).await;
    let client = server.client().await;
    let mut tasks = server.subscribe(&client, "mp.pool.t.>").await;
    proxy.keeps_back.store(true, SeqCst);
    let _call = pool.apply_async(square, (2,));
    let (first, again) = (next(&mut tasks).await, next(&mut tasks).await);
    let id = |message: &async_nats::Message| message.headers.as_ref().unwrap().get("Nats-Msg-Id").cloned();
    assert_eq!(id(&first), id(&again));
    // Behind the version, the kind, the submitter and the number.
    assert_eq!((first.payload[18], again.payload[18]), (0, 1));
    proxy.cut();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_was_published_anew_is_not_wanted_under_its_earlier_number() {
    let server = server!();
    let client = server.client().await;
    let mut tasks = server.subscribe(&client, "mp.pool.t.>").await;
    let pool = Pool::builder().cluster(server.address().lease(500 * MS)).build().unwrap();
    let _call = pool.apply_async(square, (1,));
    let first = next(&mut tasks).await;
    until("it is in the stream", async || server.messages().await == 1).await;
    server.purge().await;
    let anew = next(&mut tasks).await;
    let number = |message: &async_nats::Message| message.payload[10..18].to_vec();
    assert_ne!(number(&first), number(&anew));
    let submitter = first.subject.rsplit('.').next().unwrap().to_string();
    let is_wanted = async |message: &async_nats::Message| {
        let ask = [&[1, 3][..], &number(message), &7_u64.to_le_bytes(), &1_u32.to_le_bytes()].concat();
        let reply = within(client.request(format!("mp.pool.s.{submitter}.q"), ask.into())).await.unwrap();
        reply.payload[2] == 1
    };
    assert!(!is_wanted(&first).await && is_wanted(&anew).await);
    // Another host still has the earlier one, and reports it.
    let held = [&[1, 5][..], &8_u64.to_le_bytes(), &1_u32.to_le_bytes(), &number(&first)].concat();
    within(client.request(format!("mp.pool.s.{submitter}.h"), held.into())).await.unwrap();
    assert!(is_wanted(&anew).await);
}

/// The configuration of `examples/cluster`, for the pool of these tests.
fn roles() -> String {
    let config = include_str!("../examples/cluster/nats.conf").replace("POOL", "pool");
    let lines = config.lines().filter(|line| !line.starts_with("listen") && !line.starts_with("jetstream"));
    let config = lines.filter(|line| !line.trim_start().starts_with('#')).collect::<Vec<_>>().join("\n");
    let passwords = [("$ADMIN_PASSWORD", "a"), ("$SUBMIT_PASSWORD", "b"), ("$SERVE_PASSWORD", "c")];
    passwords.iter().fold(config, |config, (name, password)| config.replace(name, password))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_of_the_example_has_its_own_permissions_and_no_others() {
    let server = server!(&roles());
    let (admin, submit, serve) = (
        server.address().user("admin", "a"),
        server.address().user("submit", "b"),
        server.address().user("serve", "c"),
    );
    // Makes the stream.
    let pool = Pool::builder().cluster(&admin).build().unwrap();
    let error = within(pool.apply(square, (1,)).queue_timeout(5000 * MS)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    let local = Pool::new(2).unwrap();
    let _serving = local.serve(&serve);
    let pool = Pool::builder().cluster(&submit).build().unwrap();
    assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
    assert_eq!(within(pool.apply(|bytes: Vec<u8>| bytes.len(), (vec![7; 3 << 20],))).await.unwrap(), 3 << 20);
    assert!(tokio::time::timeout(300 * MS, pool.apply(forever, ())).await.is_err());
    assert_eq!(within(pool.apply(square, (4,))).await.unwrap(), 16);
    // The other way round.
    let error = within(local.serve(&submit)).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Unavailable && error.to_string().contains("serve"), "{error}");
    let pool = Pool::builder().cluster(&serve).build().unwrap();
    let error = within(pool.apply(square, (1,))).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Unavailable && error.to_string().contains("submit"), "{error}");
}

/// Nobody serves, so what is cancelled waits in the stream.
#[tokio::test]
async fn a_user_who_may_not_delete_messages_is_warned_once_and_deletes_are_tried_no_more() {
    use tracing_subscriber::layer::SubscriberExt;
    let deny = "permissions: {publish: {allow: \">\", deny: \"$JS.API.STREAM.MSG.DELETE.>\"}, subscribe: \">\"}";
    let server = server!(&config(&format!("{{user: me, password: x, {deny}}}")));
    let address = server.address().user("me", "x");
    let warnings = cluster::Warnings::default();
    let _subscriber = tracing::subscriber::set_default(tracing_subscriber::registry().with(warnings.clone()));
    let pool = Pool::builder().cluster(&address).build().unwrap();
    let options = async_nats::ConnectOptions::with_user_and_password("me".into(), "x".into());
    let client = options.connect(format!("nats://127.0.0.1:{}", server.port)).await.unwrap();
    let messages = async || {
        let reply = client.request("$JS.API.STREAM.INFO.MP_pool", "".into()).await.unwrap();
        let info: serde_json::Value = serde_json::from_slice(&reply.payload).unwrap();
        info["state"]["messages"].as_u64().unwrap_or(0)
    };
    let denied = || std::fs::read_to_string(server.dir().join("log")).unwrap().matches("MSG.DELETE").count();
    let cancel = async |place: u64| {
        let call = pool.apply_async(forever, ());
        until("it is in the stream", async || messages().await == place).await;
        call.cancel();
        assert_eq!(within(call).await.unwrap_err().kind(), ErrorKind::Cancelled);
    };
    cancel(1).await;
    let names_it = |text: &&String| text.contains("no right") && text.contains("$JS.API.STREAM.MSG.DELETE.MP_pool");
    let of_it = || warnings.list().iter().filter(names_it).count();
    until("a warning", async || of_it() > 0).await;
    let before = denied();
    cancel(2).await;
    // A host takes both, and learns that nobody wants them.
    let local = Pool::new(1).unwrap();
    let _serving = local.serve(&address);
    assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
    until("both are removed", async || messages().await == 0).await;
    assert_eq!((of_it(), denied()), (1, before));
}

/// A subscriber of the user's that panics at an event with this text.
struct Panics(&'static str);

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Panics {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        assert!(!cluster::text_of(event).contains(self.0), "a subscriber that panics");
    }
}

/// The client of NATS tells of the event before it hands it on.
#[tokio::test]
async fn calls_without_a_server_are_unavailable_though_the_event_of_the_lost_connection_is_lost_too() {
    use tracing_subscriber::layer::SubscriberExt;
    let mut server = server!();
    let panics = Panics("event: disconnected");
    let _subscriber = tracing::subscriber::set_default(tracing_subscriber::registry().with(panics));
    let pool = Pool::builder().cluster(server.address().offline_timeout(3000 * MS)).build().unwrap();
    let call = pool.apply_async(square, (1,));
    until("it is in the stream", async || server.messages().await == 1).await;
    server.kill();
    let error = within(call).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    // Nor does an event tell that the server is back.
    server.run();
    let _host = Host::start(&server, 1);
    until("it works again", async || pool.apply(square, (2,)).await.is_ok_and(|n| n == 4)).await;
}

#[tokio::test]
async fn calls_of_a_pool_whose_task_has_panicked_fail() {
    use tracing_subscriber::layer::SubscriberExt;
    let server = server!(&config("{user: me, password: x}"));
    let _subscriber =
        tracing::subscriber::set_default(tracing_subscriber::registry().with(Panics("a cluster pool cannot work")));
    let pool = Pool::builder().cluster(server.address().user("me", "wrong")).build().unwrap();
    for _ in 0..2 {
        let error = within(pool.apply(square, (1,))).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Closed && error.to_string().contains("has panicked"), "{error}");
    }
}

/// Messages as the pool's own, with one byte changed or the end cut off, and an answer that comes twice.
#[tokio::test(flavor = "multi_thread")]
async fn messages_like_real_ones_harm_nobody_and_an_answer_that_is_repeated_is_dropped() {
    let server = server!();
    let pool = cluster::pool(&server);
    let host = Host::start(&server, 2);
    until("a host that is known", async || pool.workers() == 2).await;
    let client = server.client().await;
    let mut all = server.subscribe(&client, "mp.pool.>").await;
    assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
    let (mut task, mut answer) = (None, None);
    while task.is_none() || answer.is_none() {
        let message = within(futures::StreamExt::next(&mut all)).await.unwrap();
        match message.subject.as_str() {
            subject if subject.contains(".t.") => task = Some(message),
            subject if subject.ends_with(".r") => answer = Some(message),
            _ => {}
        }
    }
    // Else it stands for each submitter that is named.
    all.unsubscribe().await.unwrap();
    let (task, answer) = (task.unwrap(), answer.unwrap());
    let before = pool.stats().duplicates;
    within(client.request(answer.subject.clone(), answer.payload.clone())).await.unwrap();
    assert_eq!(pool.stats().duplicates, before + 1);
    let changed = (0..task.payload.len()).flat_map(|at| {
        let mut bytes = task.payload.to_vec();
        bytes[at] ^= 1;
        [bytes, task.payload[..at].to_vec()]
    });
    for (number, bytes) in changed.enumerate() {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Nats-Msg-Id", format!("changed-{number}"));
        client.publish_with_headers(task.subject.clone(), headers, bytes.into()).await.unwrap();
    }
    // And the same for what submitters and hosts say to each other.
    for subject in ["r", "q", "h", "b", "k", "p"].map(|what| answer.subject.replace(".r", &format!(".{what}"))) {
        for at in 0..answer.payload.len().min(100) {
            let mut bytes = answer.payload.to_vec();
            bytes[at] ^= 0x81;
            client.publish_with_reply(subject.clone(), "nobody.there", bytes.into()).await.unwrap();
        }
    }
    client.flush().await.unwrap();
    // Whoever may publish may forge the answers of a submitter; others have their own.
    for pool in [cluster::pool(&server), pool] {
        let squares = within(pool.map(square, 0..50)).await;
        assert!(squares.is_err() || squares.unwrap().len() == 50);
    }
    let pool = cluster::pool(&server);
    for n in 0..50 {
        assert_eq!(within(pool.apply(square, (n,))).await.unwrap(), n * n);
    }
    server.is_empty().await;
    host.drain().await;
}

/// One that lets nobody publish more than a few bytes to the pool's stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_publish_that_the_stream_refuses_for_long_is_an_error_with_the_words_of_the_server() {
    let server = server!();
    let pool = Pool::builder().cluster(server.address().offline_timeout(1000 * MS)).build().unwrap();
    let _host = Host::start(&server, 1);
    assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
    server.set_stream("max_msg_size", 10).await;
    let error = within(pool.apply(square, (4,))).await.unwrap_err();
    let text = error.to_string();
    assert!(error.kind() == ErrorKind::Unavailable && text.contains("message size exceeds"), "{text}");
    server.set_stream("max_msg_size", -1).await;
    assert_eq!(within(pool.apply(square, (5,))).await.unwrap(), 25);
    server.is_empty().await;
}

/// As by `nats consumer rm`.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_is_deleted_is_made_again_and_what_runs_runs_once() {
    let server = server!();
    let pool = cluster::pool(&server);
    let _host = Host::start(&server, 2);
    let (file, client) = (server.dir().join("runs"), server.client().await);
    let mut reports = server.subscribe(&client, "mp.pool.s.*.h").await;
    let running = pool.apply_async(runs_until_told, (file.clone(),));
    next(&mut reports).await;
    server.delete_consumer().await;
    for n in 0..3 {
        assert_eq!(within(pool.apply(square, (n,))).await.unwrap(), n * n);
    }
    std::fs::write(file.with_extension("end"), "").unwrap();
    within(running).await.unwrap();
    assert_eq!(std::fs::read(&file).unwrap(), b"x");
    server.is_empty().await;
    assert_eq!((server.consumers().await, pool.stats().redelivered), (1, 0));
}

fn runs_until_told(file: PathBuf) {
    std::fs::OpenOptions::new().create(true).append(true).open(&file).unwrap().write_all(b"x").unwrap();
    while !file.with_extension("end").exists() {
        std::thread::sleep(MS);
    }
}

/// The server says that it has handed the message out, and goes on saying so.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_the_consumer_does_not_hand_out_though_hosts_are_free_is_published_anew() {
    let server = server!();
    let address = server.address().lease(500 * MS);
    let setup = cluster::Setup { lease: 500 * MS, ..cluster::Setup::of(&server, 1) };
    let pool = Pool::builder().cluster(address).build().unwrap();
    // Makes the consumer.
    let host = Host::of(setup.clone());
    until("a host that is known", async || pool.workers() == 1).await;
    host.drain().await;
    let call = pool.apply_async(square, (3,));
    until("it is in the stream", async || server.messages().await == 1).await;
    let client = server.client().await;
    let taken = server.take(&client, 1).await;
    let reply = taken[0].reply.clone().unwrap();
    let _host = Host::of(setup);
    let keeps = async {
        loop {
            client.publish(reply.clone(), "+WPI".into()).await.unwrap();
            tokio::time::sleep(100 * MS).await;
        }
    };
    tokio::select! {
        nine = within(call) => assert_eq!(nine.unwrap(), 9),
        () = keeps => {}
    }
    server.is_empty().await;
    assert_eq!((server.stored().await, pool.stats().redelivered), (2, 0));
}

#[tokio::test]
async fn garbage_in_the_stream_is_warned_of_at_most_once_a_second() {
    use tracing_subscriber::layer::SubscriberExt;
    let server = server!();
    let warnings = cluster::Warnings::default();
    let _subscriber = tracing::subscriber::set_default(tracing_subscriber::registry().with(warnings.clone()));
    let local = Pool::new(1).unwrap();
    let _serving = local.serve(server.address());
    let pool = Pool::builder().cluster(server.address()).build().unwrap();
    let client = server.client().await;
    let mut tasks = server.subscribe(&client, "mp.pool.t.>").await;
    assert_eq!(within(pool.apply(square, (3,))).await.unwrap(), 9);
    let subject = next(&mut tasks).await.subject;
    let counted = || warnings.list().iter().filter(|text| text.contains("is no task")).count();
    let (began, mut seen) = (Instant::now(), 0);
    while seen < 2 {
        for _ in 0..20 {
            client.publish(subject.clone(), "garbage".into()).await.unwrap();
        }
        until("it is removed", async || server.messages().await == 0).await;
        seen = counted();
        assert!((1..=1 + began.elapsed().as_secs() as usize).contains(&seen), "{seen} in {:?}", began.elapsed());
    }
}

/// What the server says of itself: in lame duck mode it goes on for a while and takes no new connections.
#[tokio::test]
async fn a_server_that_is_about_to_stop_is_warned_of() {
    use tracing_subscriber::layer::SubscriberExt;
    let server = server!();
    let warnings = cluster::Warnings::default();
    let _subscriber = tracing::subscriber::set_default(tracing_subscriber::registry().with(warnings.clone()));
    let pool = Pool::builder().cluster(server.address()).build().unwrap();
    let call = pool.apply_async(square, (1,));
    until("it is in the stream", async || server.messages().await == 1).await;
    server.signal("USR2");
    let is_warned = || warnings.list().iter().any(|text| text.contains("about to stop"));
    until("a warning", async || is_warned()).await;
    drop(call);
}

/// Whoever may publish may send more beats than a submitter can read.
#[tokio::test]
async fn messages_that_come_faster_than_they_are_read_are_warned_of() {
    use tracing_subscriber::layer::SubscriberExt;
    let server = server!();
    let warnings = cluster::Warnings::default();
    let _subscriber = tracing::subscriber::set_default(tracing_subscriber::registry().with(warnings.clone()));
    let pool = Pool::builder().cluster(server.address()).build().unwrap();
    let call = pool.apply_async(square, (1,));
    until("it is in the stream", async || server.messages().await == 1).await;
    // They arrive at the server while nothing of this runtime goes on.
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    let beats = "PUB mp.pool.beat 0\r\n\r\n".repeat(200_000);
    stream.write_all(format!("CONNECT {{\"verbose\":false}}\r\n{beats}PING\r\n").as_bytes()).unwrap();
    let answers = std::io::BufReader::new(stream).lines().map(Result::unwrap);
    assert!(answers.into_iter().any(|answer| answer == "PONG"));
    let is_warned = || warnings.list().iter().any(|text| text.contains("faster than they are read"));
    until("a warning", async || is_warned()).await;
    call.cancel();
}
