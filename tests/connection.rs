//! Connections between programs: CPython at the other end in both roles, and whatever a stranger may send.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::{Random, eventually, holdings, in_child, payload, read_payload, resident_bytes, within};
use futures::{SinkExt, StreamExt};
use hmac::{Hmac, KeyInit, Mac};
use multiprocess::connection::{ByteConnection, Listener, connect};
use multiprocess::{self as mp, ErrorKind, Fd, Process};
use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::process::{Child, ChildStdout, Command};

mp::test_support!();

const KEY: &[u8] = b"a key of both ends";
const SHORT: Duration = Duration::from_millis(50);

// Addresses and peers.

fn number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Relaxed)
}

fn path() -> String {
    let name = format!("multiprocess-test-{}-{}", common::alone::unique(), number());
    std::env::temp_dir().join(name).to_str().unwrap().to_string()
}

fn abstract_name() -> String {
    format!("\0multiprocess-test-{}-{}", common::alone::unique(), number())
}

/// One address of each family that CPython's client can connect to.
fn families() -> [String; 3] {
    ["127.0.0.1:0".to_string(), path(), abstract_name()]
}

async fn pair_at(address: &str, key: Option<&[u8]>) -> (ByteConnection, ByteConnection) {
    let bind = Listener::bind(address);
    let listener = match key {
        Some(key) => bind.authkey(key).await.unwrap(),
        None => bind.await.unwrap(),
    };
    let address = listener.local_addr();
    let (here, there) = within(async { tokio::join!(listener.accept(), connect(&address, key)) }).await;
    (here.unwrap(), there.unwrap())
}

async fn pair() -> (ByteConnection, ByteConnection) {
    pair_at(&abstract_name(), None).await
}

/// What is at the other end of a connection of ours when we play the other program ourselves.
async fn raw_pair() -> (ByteConnection, UnixStream) {
    let listener = Listener::bind(&abstract_name()).await.unwrap();
    let there = raw(&listener.local_addr()).await;
    (within(listener.accept()).await.unwrap(), there)
}

async fn raw(address: &str) -> UnixStream {
    within(UnixStream::connect(address)).await.unwrap()
}

fn frame(message: &[u8]) -> Vec<u8> {
    [&(message.len() as i32).to_be_bytes(), message].concat()
}

async fn read_frame(stream: &mut UnixStream) -> Option<Vec<u8>> {
    let len = within(stream.read_u32()).await.ok()?;
    let mut message = vec![0; len as usize];
    within(stream.read_exact(&mut message)).await.ok()?;
    Some(message)
}

fn mac<D: Mac + KeyInit>(key: &[u8], message: &[u8]) -> Vec<u8> {
    let mut mac = <D as KeyInit>::new_from_slice(key).unwrap();
    mac.update(message);
    mac.finalize().into_bytes().to_vec()
}

fn sha256(key: &[u8], message: &[u8]) -> Vec<u8> {
    [b"{sha256}", &mac::<Hmac<sha2::Sha256>>(key, message)[..]].concat()
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

async fn echo(connection: &ByteConnection) {
    while let Ok(message) = connection.recv_bytes().await {
        connection.send_bytes(&message).await.unwrap();
    }
}

async fn is_echoed(connection: &ByteConnection) {
    for size in [0, 1, 16_384, 16_385, 100_000, 1 << 20, 5] {
        connection.send_bytes(&bytes(size)).await.unwrap();
        assert_eq!(within(connection.recv_bytes()).await.unwrap(), bytes(size));
    }
}

// CPython.

/// The interpreters of this machine, by version, each once.
fn pythons() -> BTreeMap<Vec<u32>, PathBuf> {
    let mut found = vec![PathBuf::from("python3")];
    let root = std::env::var_os("PYENV_ROOT").map(PathBuf::from);
    let root = root.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".pyenv")));
    let versions = root.and_then(|root| std::fs::read_dir(root.join("versions")).ok());
    found.extend(versions.into_iter().flatten().map(|version| version.unwrap().path().join("bin/python")));
    found.push(PathBuf::from("/usr/bin/python3"));
    let versions = found.into_iter().filter_map(|python| {
        let ask = "import sys; print('%d.%d.%d' % sys.version_info[:3])";
        let answer = std::process::Command::new(&python).args(["-c", ask]).output().ok()?;
        let version = String::from_utf8(answer.stdout).unwrap();
        Some((version.trim().split('.').map(|part| part.parse().unwrap()).collect(), python))
    });
    let pythons: BTreeMap<Vec<u32>, _> = versions.collect();
    assert!(!pythons.is_empty(), "there is no CPython here; these tests are about it");
    pythons
}

/// The newest one, and whether it knows more than MD5.
fn python() -> (PathBuf, bool) {
    let (version, python) = pythons().pop_last().unwrap();
    (python, version >= vec![3, 12])
}

fn peer(python: &Path, role: &str, address: &str, key: Option<&[u8]>) -> Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/peer.py");
    let key = key.map_or("-".to_string(), |key| key.iter().map(|byte| format!("{byte:02x}")).collect());
    let mut command = Command::new(python);
    command.arg(script).args([role, &address.replace('\0', "@"), &key]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn run(mut command: Command) -> Output {
    within(command.output()).await.unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim().to_string()
}

/// CPython's listener: the process, what it says, and where it is.
async fn python_listener(
    python: &Path,
    address: &str,
    key: Option<&[u8]>,
) -> (Child, Lines<BufReader<ChildStdout>>, String) {
    let mut child = peer(python, "listen", address, key).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = within(lines.next_line()).await.unwrap().expect("it says where it is");
    let address = match first.as_str() {
        "bound" => address.to_string(),
        // "::1:7000" of an IPv6 address.
        tcp if tcp.matches(':').count() > 1 => {
            let (host, port) = tcp.rsplit_once(':').unwrap();
            format!("[{host}]:{port}")
        }
        tcp => tcp.to_string(),
    };
    (child, lines, address)
}

#[tokio::test]
async fn auth_09_every_cpython_here_connects_to_our_listener() {
    for (version, python) in pythons() {
        for (address, key) in families().into_iter().zip([Some(KEY), Some(KEY), None]) {
            let bind = Listener::bind(&address);
            let bind = if let Some(key) = key { bind.authkey(key) } else { bind };
            let listener = bind.await.unwrap();
            let address = listener.local_addr();
            let (connection, output) = tokio::join!(
                async {
                    let connection = within(listener.accept()).await.unwrap();
                    within(echo(&connection)).await;
                },
                run(peer(&python, "connect", &address, key))
            );
            let () = connection;
            assert_eq!(said(&output), "echoed", "{version:?} {address:?} {output:?}");
        }
    }
}

#[tokio::test]
async fn auth_09_our_client_connects_to_every_cpython_here() {
    for (version, python) in pythons() {
        for (address, key) in families().into_iter().zip([Some(KEY), None, Some(KEY)]) {
            let (child, mut lines, address) = python_listener(&python, &address, key).await;
            let connection = within(connect(&address, key).into_future()).await;
            let connection = connection.unwrap_or_else(|error| panic!("{version:?} {error}"));
            is_echoed(&connection).await;
            drop(connection);
            for expected in ["accepted", "closed"] {
                assert_eq!(within(lines.next_line()).await.unwrap().unwrap(), expected, "{version:?}");
            }
            let output = within(child.wait_with_output()).await.unwrap();
            assert!(output.status.success(), "{version:?} {output:?}");
        }
    }
}

#[tokio::test]
async fn auth_04_a_wrong_key_is_an_error_at_both_ends_and_the_listener_goes_on() {
    for (_, python) in pythons() {
        let listener = Listener::bind("127.0.0.1:0").authkey(KEY).await.unwrap();
        let address = listener.local_addr();
        let output = run(peer(&python, "connect", &address, Some(b"another"))).await;
        assert_eq!(said(&output), "AuthenticationError: digest sent was rejected", "{output:?}");
        let error = within(listener.accept()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Authentication, "{error}");
        assert!(error.to_string().contains("another key"), "{error}");
        // list_09: the same listener, the right key.
        let (accepted, output) = tokio::join!(listener.accept(), run(peer(&python, "send", &address, Some(KEY))));
        assert!(output.status.success());
        assert_eq!(within(accepted.unwrap().recv_bytes()).await.unwrap(), b"hello");

        let (_child, mut lines, address) = python_listener(&python, &path(), Some(KEY)).await;
        let error = within(connect(&address, Some(b"another")).into_future()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Authentication, "{error}");
        let line = within(lines.next_line()).await.unwrap().unwrap();
        assert_eq!(line, "AuthenticationError: digest received was wrong");
        is_echoed(&within(connect(&address, Some(KEY)).into_future()).await.unwrap()).await;
    }
}

#[tokio::test]
async fn auth_07_without_md5_old_cpythons_are_refused_and_new_ones_are_not() {
    for (version, python) in pythons() {
        let knows_sha = version >= vec![3, 12];
        let listener = Listener::bind(&path()).authkey(KEY).allow_md5(false).await.unwrap();
        let output = run(peer(&python, "send", &listener.local_addr(), Some(KEY))).await;
        let accepted = within(listener.accept()).await;
        assert_eq!((accepted.is_ok(), output.status.success()), (knows_sha, knows_sha), "{version:?}");
        if let Err(error) = accepted {
            assert!(error.kind() == ErrorKind::Authentication && error.to_string().contains("allow_md5"), "{error}");
        }
        let (_child, _lines, address) = python_listener(&python, &path(), Some(KEY)).await;
        let connected = within(connect(&address, Some(KEY)).allow_md5(false).into_future()).await;
        assert_eq!(connected.is_ok(), knows_sha, "{version:?}");
    }
}

#[tokio::test]
async fn list_03_an_empty_key_is_a_key() {
    let listener = Listener::bind("127.0.0.1:0").authkey(b"").await.unwrap();
    let address = listener.local_addr();
    let error = within(connect(&address, Some(b"x")).into_future()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Authentication);
    assert_eq!(within(listener.accept()).await.unwrap_err().kind(), ErrorKind::Authentication);
    // CPython uses an empty key since 3.10 or so; before, it took it for none.
    let (python, uses_it) = python();
    if uses_it {
        let (accepted, output) = tokio::join!(listener.accept(), run(peer(&python, "send", &address, Some(b""))));
        assert!(output.status.success());
        assert_eq!(within(accepted.unwrap().recv_bytes()).await.unwrap(), b"hello");
    }
}

#[tokio::test]
async fn list_11_ipv6() {
    let (here, there) = pair_at("[::1]:0", Some(KEY)).await;
    let (_, ()) = tokio::join!(async move { is_echoed(&here).await }, async move { echo(&there).await });
    let (python, _) = python();
    let (_child, _lines, address) = python_listener(&python, "[::1]:0", Some(KEY)).await;
    is_echoed(&within(connect(&address, Some(KEY)).into_future()).await.unwrap()).await;
}

#[tokio::test]
async fn list_06_messages_of_a_client_that_left_before_the_accept_are_received() {
    let (python, _) = python();
    for address in families() {
        let listener = Listener::bind(&address).authkey(KEY).await.unwrap();
        assert!(run(peer(&python, "send", &listener.local_addr(), Some(KEY))).await.status.success());
        let connection = within(listener.accept()).await.unwrap();
        assert_eq!(within(connection.recv_bytes()).await.unwrap(), b"hello");
        assert_eq!(within(connection.recv_bytes()).await.unwrap_err().kind(), ErrorKind::Closed);
    }
}

// The handshake, with what CPython would never send.

#[tokio::test]
async fn auth_01_a_bogus_response_fails_the_challenger() {
    let listener = Listener::bind(&abstract_name()).authkey(KEY).await.unwrap();
    for response in [&b""[..], b"x", &[7; 16], &[7; 20], &[7; 40], &[b'{'; 256], b"{sha256}", b"{md5}", b"{sha1}abc"] {
        let mut stranger = raw(&listener.local_addr()).await;
        let challenge = read_frame(&mut stranger).await.unwrap();
        assert!(challenge.len() == 59 && challenge.starts_with(b"#CHALLENGE#{sha256}"));
        stranger.write_all(&frame(response)).await.unwrap();
        assert_eq!(read_frame(&mut stranger).await.unwrap(), b"#FAILURE#", "{response:?}");
        assert_eq!(within(listener.accept()).await.unwrap_err().kind(), ErrorKind::Authentication);
        assert_eq!(read_frame(&mut stranger).await, None);
    }
}

/// What our client makes of a listener that sends these frames, whatever it hears.
async fn connect_to_a_listener_that_sends(frames: &[&[u8]]) -> mp::Result<ByteConnection> {
    let name = path();
    let listener = UnixListener::bind(&name).unwrap();
    let connecting = tokio::spawn(connect(&name, Some(KEY)).handshake_timeout(20 * SHORT).into_future());
    let (mut stream, _) = within(listener.accept()).await.unwrap();
    for message in frames {
        let _ = stream.write_all(&frame(message)).await;
    }
    std::fs::remove_file(name).unwrap();
    let connected = within(connecting).await.unwrap();
    drop(stream);
    connected
}

#[tokio::test]
async fn auth_02_a_short_challenge_or_a_wrong_last_word_fails_the_answerer() {
    let challenge = [&b"#CHALLENGE#{sha256}"[..], &[1; 40]].concat();
    let cases: [&[&[u8]]; 8] = [
        &[b"#CHALLENGE#"],
        &[b"#CHALLENGE#{sha256}12345678901"],
        &[b"#CHALLENG"],
        &[b"an application's message"],
        &[&[&b"#CHALLENGE#{sha512}"[..], &[1; 40]].concat()],
        &[&[&b"#CHALLENGE#"[..], &[1; 40]].concat()],
        &[&challenge, b"#FAILURE#"],
        &[&challenge, b"#WELCOME"],
    ];
    for frames in cases {
        let error = connect_to_a_listener_that_sends(frames).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Authentication, "{error}");
        assert!(!error.to_string().contains("did not do its part"), "refused at once, not by the deadline: {error}");
    }
}

#[tokio::test]
async fn auth_03_a_response_verifies_for_each_kind_of_challenge_with_its_prefix() {
    let random = [9; 40];
    let named = |name: &str| [name.as_bytes(), &random].concat();
    let md5 = |message: &[u8]| mac::<Hmac<md5::Md5>>(KEY, message);
    let cases = [
        (random[..20].to_vec(), md5(&random[..20])),
        (named("{md5}"), [b"{md5}", &md5(&named("{md5}"))[..]].concat()),
        (named("{sha256}"), sha256(KEY, &named("{sha256}"))),
        (named("{sha384}"), [b"{sha384}", &mac::<Hmac<sha2::Sha384>>(KEY, &named("{sha384}"))[..]].concat()),
    ];
    for (challenge, expected) in cases {
        // Our client answers it ..
        let name = abstract_name();
        let fake = UnixListener::bind(&name).unwrap();
        let _connecting = tokio::spawn(connect(&name, Some(KEY)).into_future());
        let (mut stream, _) = within(fake.accept()).await.unwrap();
        stream.write_all(&frame(&[b"#CHALLENGE#", &challenge[..]].concat())).await.unwrap();
        assert_eq!(read_frame(&mut stream).await.unwrap(), expected);
        // .. and our listener takes an answer made with the same digest.
        let listener = Listener::bind(&abstract_name()).authkey(KEY).await.unwrap();
        let mut client = raw(&listener.local_addr()).await;
        let asked = read_frame(&mut client).await.unwrap().split_off(11);
        let answer = match expected.len() {
            16 => md5(&asked),
            21 => [b"{md5}", &md5(&asked)[..]].concat(),
            40 => sha256(KEY, &asked),
            _ => [b"{sha384}", &mac::<Hmac<sha2::Sha384>>(KEY, &asked)[..]].concat(),
        };
        client.write_all(&frame(&answer)).await.unwrap();
        assert_eq!(read_frame(&mut client).await.unwrap(), b"#WELCOME#");
    }
}

#[tokio::test]
async fn auth_06_key_on_one_end_only_is_an_error_on_both() {
    // A client with a key at a listener without: an error by the deadline, or at the first message.
    let listener = Listener::bind(&abstract_name()).await.unwrap();
    let connecting = connect(&listener.local_addr(), Some(KEY)).handshake_timeout(SHORT);
    let error = within(connecting.into_future()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Authentication, "{error}");
    let here = within(listener.accept()).await.unwrap();
    assert_eq!(within(here.recv_bytes()).await.unwrap_err().kind(), ErrorKind::Closed);

    // A client without a key at a listener with one: it learns at its first receive, the listener at its first message.
    let listener = Listener::bind(&abstract_name()).authkey(KEY).await.unwrap();
    let there = within(connect(&listener.local_addr(), None).into_future()).await.unwrap();
    let error = within(there.recv_bytes()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Authentication, "{error}");
    there.send_bytes(b"hello").await.unwrap();
    let error = within(listener.accept()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Authentication, "{error}");
}

#[tokio::test]
async fn auth_08_a_response_beyond_256_bytes_ends_the_connection_without_an_answer() {
    let listener = Listener::bind(&abstract_name()).authkey(KEY).await.unwrap();
    let mut stranger = raw(&listener.local_addr()).await;
    read_frame(&mut stranger).await.unwrap();
    stranger.write_all(&257u32.to_be_bytes()).await.unwrap();
    // Told by the length alone.
    let error = within(listener.accept()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Authentication);
    assert!(error.to_string().contains("257 bytes"), "{error}");
    assert_eq!(read_frame(&mut stranger).await, None);
}

#[tokio::test]
async fn a_challenge_of_ours_sent_back_on_another_connection_is_not_answered() {
    // A listener without the key gets each client to welcome it, if one client answers for another.
    let name = abstract_name();
    let rogue = UnixListener::bind(&name).unwrap();
    let victims = [0, 1].map(|_| tokio::spawn(connect(&name, Some(KEY)).into_future()));
    let (mut first, _) = within(rogue.accept()).await.unwrap();
    let (mut second, _) = within(rogue.accept()).await.unwrap();
    first.write_all(&frame(&[&b"#CHALLENGE#{sha256}"[..], &[1; 40]].concat())).await.unwrap();
    read_frame(&mut first).await.unwrap();
    first.write_all(&frame(b"#WELCOME#")).await.unwrap();
    let challenge = read_frame(&mut first).await.unwrap();
    second.write_all(&frame(&challenge)).await.unwrap();
    assert_eq!(read_frame(&mut second).await, None, "no answer");
    drop(first);
    for victim in victims {
        assert_eq!(within(victim).await.unwrap().unwrap_err().kind(), ErrorKind::Authentication);
    }
}

// Listeners.

#[tokio::test]
async fn list_01_an_address_can_be_bound_once() {
    for address in families() {
        // Another program may have been given the port that was free for a moment.
        for tries in 1.. {
            let Err(error) = bind_again(&address).await else { break };
            assert!(address.ends_with(":0") && error.to_string().contains("in use") && tries < 20, "{error}");
        }
    }
}

async fn bind_again(address: &str) -> mp::Result<()> {
    let listener = Listener::bind(address).await?;
    let error = Listener::bind(&listener.local_addr()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("in use"), "{error}");
    // And the one that is there never hears of it.
    let client = within(connect(&listener.local_addr(), None).into_future()).await?;
    within(listener.accept()).await?.send_bytes(b"hello").await?;
    assert_eq!(within(client.recv_bytes()).await?, b"hello");
    // At once after the drop.
    let address = listener.local_addr();
    drop(listener);
    Listener::bind(&address).await.map(drop)
}

#[test]
fn a_listener_whose_runtime_has_ended_is_closed_also_for_a_waiter_in_another() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    for has_begun in [false, true] {
        let (first, second) = (tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(), runtime());
        let listener = std::sync::Arc::new(first.block_on(Listener::bind("127.0.0.1:0").into_future()).unwrap());
        if has_begun {
            let address = listener.local_addr();
            first.block_on(async { drop((connect(&address, None).await.unwrap(), listener.accept().await.unwrap())) });
        }
        let waiting = second.spawn({
            let listener = listener.clone();
            async move { listener.accept().await.map(drop) }
        });
        drop(first);
        let error = second.block_on(within(waiting)).unwrap().unwrap_err();
        assert!(error.kind() == ErrorKind::Closed && error.to_string().contains("its runtime has ended"), "{error}");
    }
}

#[tokio::test]
async fn list_02_accept_of_a_closed_listener_fails_also_for_a_waiter() {
    for address in families() {
        let listener = Arc::new(Listener::bind(&address).await.unwrap());
        let waiting = tokio::spawn({
            let listener = listener.clone();
            async move { listener.accept().await }
        });
        tokio::task::yield_now().await;
        let local = listener.local_addr();
        listener.close();
        assert_eq!(within(waiting).await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
        let error = listener.accept().await.unwrap_err();
        assert_eq!((error.kind(), error.to_string().contains("closed")), (ErrorKind::Closed, true), "{error}");
        assert_eq!(within(connect(&local, None).into_future()).await.unwrap_err().kind(), ErrorKind::Io);
    }
}

async fn send_from_a_child(address: String) -> mp::Result<()> {
    connect(&address, Some(KEY)).await?.send_bytes(b"hello").await
}

#[tokio::test]
async fn list_05_a_child_connects_and_sends_in_every_family() {
    for address in families() {
        let listener = Listener::bind(&address).authkey(KEY).await.unwrap();
        let child = Process::spawn(send_from_a_child, (listener.local_addr(),)).unwrap();
        let connection = within(listener.accept()).await.unwrap();
        assert_eq!(within(connection.recv_bytes()).await.unwrap(), b"hello");
        assert_eq!(connection.peer_addr().is_empty(), !address.contains("127"));
        within(child).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn list_07_poll_sees_a_message_sent_right_after_the_accept() {
    let (here, there) = pair_at(&path(), Some(KEY)).await;
    here.send_bytes(b"hello").await.unwrap();
    assert!(there.poll(Duration::from_secs(20)).await.unwrap());
    assert_eq!(there.recv_bytes().await.unwrap(), b"hello");
}

#[tokio::test]
async fn list_10_each_wrong_address_has_its_own_error() {
    let wrong = ["nonsense", "/no/such/directory/x", &format!("/{}", "x".repeat(200)), "host:99999999"];
    let mut messages = Vec::new();
    for address in wrong {
        messages.push(Listener::bind(address).await.unwrap_err().to_string());
        within(connect(address, None).into_future()).await.unwrap_err();
    }
    for (message, part) in messages.iter().zip(["neither host:port", "No such file", "201 bytes", "neither host:port"])
    {
        assert!(message.contains(part), "{message}");
    }
}

#[tokio::test]
async fn list_12_a_socket_file_is_this_users_goes_with_its_listener_and_a_stale_one_is_replaced() {
    let path = path();
    let listener = Listener::bind(&path).await.unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    drop(listener);
    assert!(!Path::new(&path).exists());

    // std leaves its file behind, as a killed process does.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(std::fs::metadata(&path).unwrap().file_type().is_socket());
    let listener = Listener::bind(&path).await.unwrap();
    let _client = within(connect(&path, None).into_future()).await.unwrap();

    // A file that another put there since is not ours to remove.
    std::fs::remove_file(&path).unwrap();
    let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
    drop(listener);
    assert!(Path::new(&path).exists());

    // One that somebody has bound, though it does not listen yet, is alive; and what is no socket stays.
    assert_eq!(Listener::bind(&path).await.unwrap_err().kind(), ErrorKind::Io);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "a letter").unwrap();
    assert_eq!(Listener::bind(&path).await.unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "a letter");
    std::fs::remove_file(&path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn list_12_of_many_that_replace_a_stale_file_one_serves_it() {
    for _ in 0..50 {
        let path = path();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let binding = [0; 4].map(|_| {
            let path = path.clone();
            tokio::spawn(async move { Listener::bind(&path).await })
        });
        let mut bound = Vec::new();
        for listener in binding {
            bound.extend(within(listener).await.unwrap());
        }
        assert_eq!(bound.len(), 1);
        within(connect(&path, None).into_future()).await.unwrap();
        within(bound[0].accept()).await.unwrap();
    }
}

#[tokio::test]
async fn eintr_03_accept_survives_signals() {
    let mut signals = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::user_defined1()).unwrap();
    let listener = Listener::bind(&path()).authkey(KEY).await.unwrap();
    let address = listener.local_addr();
    let client = async {
        for _ in 0..20 {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::USR1).unwrap();
            within(signals.recv()).await.unwrap();
        }
        connect(&address, Some(KEY)).await.unwrap()
    };
    let (accepted, _client) = within(async { tokio::join!(listener.accept(), client) }).await;
    accepted.unwrap();
}

// Strangers in numbers.

fn allow_descriptors(soft: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let old = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(soft), maximum: old.maximum }).unwrap();
}

/// Connections that never say a word.
async fn silent(address: &str, count: usize) -> Vec<UnixStream> {
    let mut peers = Vec::new();
    while peers.len() < count {
        match UnixStream::connect(address).await {
            Ok(peer) => peers.push(peer),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => tokio::time::sleep(SHORT / 50).await,
            Err(error) => panic!("{error}"),
        }
    }
    peers
}

async fn thousand_silent_peers() {
    allow_descriptors(4096);
    let listener = Listener::bind(&path()).authkey(KEY).await.unwrap();
    let address = listener.local_addr();
    let before = resident_bytes(std::process::id());
    let _silent = silent(&address, 1000).await;
    within(eventually("all are taken from the kernel", || holdings().descriptors > 2000)).await;
    let grown = resident_bytes(std::process::id()).saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes for 1000 peers and their sockets");
    let another = async || {
        let start = Instant::now();
        let (here, there) = within(async { tokio::join!(listener.accept(), connect(&address, Some(KEY))) }).await;
        let took = start.elapsed();
        let (here, there) = (here?, there?);
        there.send_bytes(b"hello").await?;
        assert_eq!(within(here.recv_bytes()).await?, b"hello");
        Ok(took)
    };
    // The machine may be busy with other things, the silent are there all the time.
    common::rounds(another, |took| *took < Duration::from_millis(50)).await.unwrap();
}

#[tokio::test]
async fn p25_a_thousand_silent_peers_delay_no_other() {
    in_child(thousand_silent_peers, ()).await;
}

async fn more_than_there_are_descriptors() {
    let listener = Listener::bind(&path()).authkey(KEY).await.unwrap();
    let address = listener.local_addr();
    let (mut go, told) = mp::simplex().unwrap();
    let client = Process::spawn(hear_hello, (address.clone(), told)).unwrap();
    let flood = Process::spawn(flood_and_stay, (address,)).unwrap();
    allow_descriptors(200);
    // Failures come as the oldest make room; a good client gets in among them.
    within(listener.accept()).await.unwrap_err();
    go.send(()).await.unwrap();
    let here = within(async {
        loop {
            match listener.accept().await {
                Ok(connection) => break connection,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Authentication),
            }
        }
    });
    here.await.send_bytes(b"hello").await.unwrap();
    assert_eq!(within(client).await.unwrap().unwrap(), b"hello");
    flood.kill().unwrap();
}

async fn hear_hello(address: String, mut told: mp::Receiver<()>) -> mp::Result<Vec<u8>> {
    told.recv().await?;
    connect(&address, Some(KEY)).await?.recv_bytes().await
}

async fn flood_and_stay(address: String) {
    allow_descriptors(4096);
    let _peers = silent(&address, 400).await;
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn p25_more_silent_peers_than_descriptors_do_not_stop_the_listener() {
    in_child(more_than_there_are_descriptors, ()).await;
}

#[tokio::test]
async fn p25_a_silent_peer_is_dropped_after_the_deadline() {
    let listener = Listener::bind("127.0.0.1:0").authkey(KEY).handshake_timeout(SHORT).await.unwrap();
    let mut silent = TcpStream::connect(listener.local_addr()).await.unwrap();
    let error = within(listener.accept()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Authentication);
    let mut all = Vec::new();
    within(silent.read_to_end(&mut all)).await.unwrap();
    assert!(all[4..].starts_with(b"#CHALLENGE#"));
    // One that sends a byte now and then has no more time.
    let mut slow = TcpStream::connect(listener.local_addr()).await.unwrap();
    let dripping = tokio::spawn(async move {
        while slow.write_all(&[0]).await.is_ok() {
            tokio::time::sleep(SHORT / 10).await;
        }
    });
    assert_eq!(within(listener.accept()).await.unwrap_err().kind(), ErrorKind::Authentication);
    dripping.abort();
}

#[tokio::test]
async fn a_flood_of_failures_is_forgotten_but_for_the_first_and_a_good_client_is_accepted_after_them() {
    let listener = Listener::bind(&abstract_name()).authkey(KEY).await.unwrap();
    let address = listener.local_addr();
    for _ in 0..1_000 {
        drop(raw(&address).await);
    }
    let (failures, _there) = within(async {
        let count = async {
            let mut failures = 0;
            while let Err(error) = listener.accept().await {
                assert_eq!(error.kind(), ErrorKind::Authentication);
                failures += 1;
            }
            failures
        };
        tokio::join!(count, connect(&address, Some(KEY)))
    })
    .await;
    assert!(0 < failures && failures <= 1_000, "{failures}");
}

#[tokio::test]
async fn connections_that_are_not_accepted_wait_and_none_is_lost() {
    let listener = Listener::bind(&abstract_name()).await.unwrap();
    let mut clients = Vec::new();
    for n in 0..300u32 {
        let client = within(connect(&listener.local_addr(), None).into_future()).await.unwrap();
        client.send_bytes(&n.to_le_bytes()).await.unwrap();
        clients.push(client);
    }
    let mut heard = Vec::new();
    for _ in 0..300 {
        let here = within(listener.accept()).await.unwrap();
        heard.push(u32::from_le_bytes(within(here.recv_bytes()).await.unwrap().try_into().unwrap()));
    }
    heard.sort_unstable();
    assert_eq!(heard, (0..300).collect::<Vec<_>>());
}

/// What an honest client sends until it is accepted, if it answers `challenge`.
fn transcript(challenge: &[u8]) -> Vec<u8> {
    let mut bytes = frame(&sha256(KEY, challenge));
    bytes.extend(frame(&[&b"#CHALLENGE#{sha256}"[..], &[5; 40]].concat()));
    bytes.extend(frame(b"#WELCOME#"));
    bytes.extend(frame(b"hello"));
    bytes
}

#[tokio::test]
async fn a_listener_lives_whatever_strangers_send() {
    // There nobody else takes memory.
    in_child(listen_to_strangers, ()).await;
}

async fn listen_to_strangers() {
    let listener = Listener::bind(&abstract_name()).authkey(KEY).max_message(1 << 20).await.unwrap();
    let address = listener.local_addr();
    let before = resident_bytes(std::process::id());
    let (start, mut random) = (Instant::now(), Random::new(7));
    let (mut refused, mut accepted) = (0, 0);
    while start.elapsed() < Duration::from_secs(3) {
        let mut stranger = raw(&address).await;
        let challenge = read_frame(&mut stranger).await.unwrap().split_off(11);
        let mut bytes = transcript(&challenge);
        let honest = bytes.clone();
        for _ in 0..random.below(4) {
            let at = random.below(bytes.len() as u64) as usize;
            match random.below(4) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes.truncate(at + 1),
                2 => drop(bytes.splice(at..at, frame(&vec![random.next() as u8; random.size(300)]))),
                _ => drop(bytes.splice(at..(at + 4).min(bytes.len()), (random.next() as u32).to_le_bytes())),
            }
        }
        // A peer that was let go may not take it all.
        let _ = stranger.write_all(&bytes).await;
        let _ = stranger.shutdown().await;
        match within(listener.accept()).await {
            Ok(connection) => {
                accepted += 1;
                // The proof was not touched; what follows is messages, or an error, never a wait.
                assert!(bytes.starts_with(&honest[..44]));
                within(async { while connection.recv_bytes().await.is_ok() {} }).await;
            }
            Err(error) => {
                refused += 1;
                assert_eq!(error.kind(), ErrorKind::Authentication);
            }
        }
    }
    assert!(accepted > 0 && refused > 0, "{accepted} {refused}");
    let grown = resident_bytes(std::process::id()).saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes");
    let (here, _there) = within(async { tokio::join!(listener.accept(), connect(&address, Some(KEY))) }).await;
    here.unwrap();
}

// Messages.

#[tokio::test]
async fn conn_06_large_messages_both_ways_at_once() {
    let (here, there) = pair_at("127.0.0.1:0", None).await;
    let message = bytes(16 << 20);
    let one = async { tokio::join!(here.send_bytes(&message), here.recv_bytes()) };
    let other = async { tokio::join!(there.send_bytes(&message), there.recv_bytes()) };
    let (one, other) = within(async { tokio::join!(one, other) }).await;
    assert!(one.1.unwrap() == message && other.1.unwrap() == message);
}

#[tokio::test]
async fn conn_07_conn_16_messages_of_a_closed_end_are_received_and_then_the_end() {
    let (here, there) = pair().await;
    there.send_bytes(b"last").await.unwrap();
    // Data that it never read: the kernel then says reset instead of end.
    here.send_bytes(b"unread").await.unwrap();
    drop(there);
    assert_eq!(within(here.recv_bytes()).await.unwrap(), b"last");
    for _ in 0..2 {
        assert_eq!(within(here.recv_bytes()).await.unwrap_err().kind(), ErrorKind::Closed);
    }
    assert!(here.poll(Duration::ZERO).await.unwrap());
}

#[tokio::test]
async fn conn_18_a_send_waits_for_a_reader_and_fails_when_there_is_none_any_more() {
    let (here, there) = pair().await;
    let message = bytes(4 << 20);
    assert!(tokio::time::timeout(SHORT, here.send_bytes(&message)).await.is_err());
    drop(there);
    let error = within(async {
        loop {
            if let Err(error) = here.send_bytes(b"x").await {
                break error;
            }
        }
    });
    assert_eq!(error.await.kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn conn_20_a_message_beyond_the_limit_ends_receiving_and_not_sending() {
    let listener = Listener::bind(&abstract_name()).max_message(1000).await.unwrap();
    let there = within(connect(&listener.local_addr(), None).into_future()).await.unwrap();
    let here = within(listener.accept()).await.unwrap();
    there.send_bytes(&bytes(1000)).await.unwrap();
    there.send_bytes(&bytes(1001)).await.unwrap();
    assert_eq!(within(here.recv_bytes()).await.unwrap(), bytes(1000));
    let error = within(here.recv_bytes()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Decode);
    assert!(error.to_string().contains("1001 bytes"), "{error}");
    assert_eq!(within(here.recv_bytes()).await.unwrap_err().kind(), ErrorKind::Closed);
    here.send_bytes(b"still").await.unwrap();
    assert_eq!(within(there.recv_bytes()).await.unwrap(), b"still");
}

#[tokio::test]
async fn conn_21_conn_22_hostile_lengths_and_ends_in_the_middle() {
    let cases: [(&[u8], ErrorKind); 9] = [
        (b"", ErrorKind::Closed),
        (&[0, 0], ErrorKind::Io),
        (&[0, 0, 0, 5], ErrorKind::Io),
        (&[0, 0, 0, 5, 1, 2], ErrorKind::Io),
        (&[0xff, 0xff, 0xff, 0xff, 0, 0], ErrorKind::Io),
        (&(-2i32).to_be_bytes(), ErrorKind::Decode),
        (&i32::MIN.to_be_bytes(), ErrorKind::Decode),
        (&[0x7f, 0xff, 0xff, 0xff, 1], ErrorKind::Decode),
        (&[0xff; 12], ErrorKind::Decode),
    ];
    for (sent, kind) in cases {
        let (here, mut there) = raw_pair().await;
        there.write_all(sent).await.unwrap();
        there.shutdown().await.unwrap();
        let error = within(here.recv_bytes()).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{sent:?}: {error}");
        assert_eq!(within(here.recv_bytes()).await.unwrap_err().kind(), ErrorKind::Closed);
    }
}

#[tokio::test]
async fn the_long_form_of_a_length_is_read_for_any_length() {
    let (here, mut there) = raw_pair().await;
    let mut sent = [&[0xff; 4][..], &5u64.to_be_bytes(), b"hello"].concat();
    sent.extend(frame(b"again"));
    there.write_all(&sent).await.unwrap();
    assert_eq!(within(here.recv_bytes()).await.unwrap(), b"hello");
    assert_eq!(within(here.recv_bytes()).await.unwrap(), b"again");
}

async fn a_length_alone() {
    let (here, mut there) = raw_pair().await;
    let before = resident_bytes(std::process::id());
    there.write_all(&(200i32 << 20).to_be_bytes()).await.unwrap();
    there.write_all(&[7; 10_000]).await.unwrap();
    assert!(!here.poll(2 * SHORT).await.unwrap());
    let grown = resident_bytes(std::process::id()).saturating_sub(before);
    assert!(grown < 8 << 20, "{grown} bytes of memory for 10,000 that came");
}

/// The kernel's timer of the established TCP connection between these ports, as /proc/net/tcp has it.
fn timer_of(local: &str, remote: &str) -> String {
    let port = |address: &str| format!(":{:04X}", address.rsplit(':').next().unwrap().parse::<u16>().unwrap());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let mut rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let row = rows.find(|row| row[1].ends_with(&port(local)) && row[2].ends_with(&port(remote)));
    row.unwrap()[5].split(':').next().unwrap().to_string()
}

#[tokio::test]
async fn a_host_that_vanishes_is_asked_for_by_both_ends() {
    let (here, there) = pair_at("127.0.0.1:0", Some(KEY)).await;
    let (listener, client) = (there.peer_addr().to_string(), here.peer_addr().to_string());
    let keep_alive = "02";
    let both = || [timer_of(&listener, &client), timer_of(&client, &listener)] == [keep_alive; 2];
    // Until the last word of the handshake is acknowledged there is another timer.
    within(eventually("both ends keep the connection alive", both)).await;
}

#[tokio::test]
async fn a_client_refuses_or_connects_whatever_a_listener_sends() {
    let name = path();
    let listener = UnixListener::bind(&name).unwrap();
    let (start, mut random) = (Instant::now(), Random::new(11));
    let (mut refused, mut connected) = (0, 0);
    while start.elapsed() < Duration::from_secs(3) {
        let connecting =
            tokio::spawn(connect(&name, Some(KEY)).handshake_timeout(SHORT).max_message(1 << 20).into_future());
        let (mut stream, _) = within(listener.accept()).await.unwrap();
        let mut garble = |bytes: Vec<u8>| {
            let mut bytes = frame(&bytes);
            if random.below(3) == 0 {
                let at = random.below(bytes.len() as u64) as usize;
                match random.below(4) {
                    0 => bytes[at] ^= 1 << random.below(8),
                    1 => bytes.truncate(at),
                    2 => drop(bytes.splice(at..at, frame(&vec![random.next() as u8; random.size(300)]))),
                    _ => drop(bytes.splice(at..(at + 4).min(bytes.len()), (random.next() as u32).to_le_bytes())),
                }
            }
            bytes
        };
        let listen = async {
            stream.write_all(&garble([&b"#CHALLENGE#{sha256}"[..], &[7; 40]].concat())).await.ok()?;
            read_frame(&mut stream).await?;
            stream.write_all(&garble(b"#WELCOME#".to_vec())).await.ok()?;
            let challenge = read_frame(&mut stream).await?.split_off(11);
            stream.write_all(&garble(sha256(KEY, &challenge))).await.ok()?;
            read_frame(&mut stream).await?;
            stream.write_all(&garble(b"hello".to_vec())).await.ok()?;
            stream.shutdown().await.ok()
        };
        // Of a message cut short it waits for the rest, up to its deadline.
        let _ = tokio::time::timeout(2 * SHORT, listen).await;
        drop(stream);
        match within(connecting).await.unwrap() {
            Ok(connection) => {
                connected += 1;
                within(async { while connection.recv_bytes().await.is_ok() {} }).await;
            }
            Err(error) => {
                refused += 1;
                assert_eq!(error.kind(), ErrorKind::Authentication, "{error}");
            }
        }
    }
    std::fs::remove_file(name).unwrap();
    assert!(connected > 0 && refused > 0, "{connected} {refused}");
}

#[tokio::test]
async fn a_length_alone_takes_no_memory() {
    in_child(a_length_alone, ()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conn_23_several_senders_of_one_connection_tear_nothing() {
    let (here, there) = pair().await;
    let here = Arc::new(here);
    let senders = (0..4).map(|producer| {
        let here = here.clone();
        tokio::spawn(async move {
            for n in 0..50 {
                here.send_bytes(&payload(producer, n, n as usize * 3_000)).await.unwrap();
            }
        })
    });
    let senders: Vec<_> = senders.collect();
    let mut next = [0; 4];
    for _ in 0..200 {
        let (producer, n) = read_payload(&within(there.recv_bytes()).await.unwrap());
        assert_eq!(n, next[producer as usize]);
        next[producer as usize] += 1;
    }
    for sender in senders {
        within(sender).await.unwrap();
    }
}

#[tokio::test]
async fn poll_01_poll_02_poll_04_poll_05_messages_keep_their_borders_and_poll_takes_none() {
    let (here, there) = pair().await;
    assert!(!here.poll(Duration::ZERO).await.unwrap());
    let start = Instant::now();
    assert!(!here.poll(SHORT).await.unwrap());
    assert!(start.elapsed() >= SHORT);
    for message in [&b""[..], b"hello", b"", b"", b"world"] {
        there.send_bytes(message).await.unwrap();
    }
    for message in [&b""[..], b"hello", b"", b"", b"world"] {
        for _ in 0..3 {
            assert!(within(here.poll(Duration::MAX)).await.unwrap());
        }
        assert_eq!(here.recv_bytes().await.unwrap(), message);
    }
    assert!(!here.poll(Duration::ZERO).await.unwrap());
    drop(there);
    assert!(within(here.poll(Duration::MAX)).await.unwrap());
    assert_eq!(here.recv_bytes().await.unwrap_err().kind(), ErrorKind::Closed);
}

// Dropped futures.

#[tokio::test]
async fn p10_a_dropped_recv_or_poll_loses_nothing() {
    let (here, mut there) = raw_pair().await;
    let writer = tokio::spawn(async move {
        let mut random = Random::new(3);
        let mut bytes = Vec::new();
        for n in 0..400 {
            bytes.extend(frame(&payload(0, n, random.size(200_000))));
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(random.size(rest.len().min(1 << 17)).min(rest.len()));
            there.write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
            rest = after;
        }
    });
    let (mut random, mut next, mut dropped) = (Random::new(4), 0, 0);
    while next < 400 {
        // One poll, then the future is gone.
        let received = match random.below(3) {
            0 => futures::FutureExt::now_or_never(here.poll(Duration::ZERO)).map(|_| None),
            _ => futures::FutureExt::now_or_never(here.recv_bytes()).map(Some),
        };
        match received {
            Some(Some(message)) => {
                assert_eq!(read_payload(&message.unwrap()), (0, next));
                next += 1;
            }
            _ => {
                dropped += 1;
                tokio::task::yield_now().await;
            }
        }
    }
    assert!(dropped > 0);
    within(writer).await.unwrap();
}

#[tokio::test]
async fn p10_a_dropped_send_is_delivered_whole_or_not_at_all() {
    let (here, there) = pair().await;
    let reader = tokio::spawn(async move {
        let mut seen = Vec::new();
        loop {
            match there.recv_bytes().await {
                Ok(message) => seen.push(read_payload(&message).1),
                Err(error) => break (seen, error.kind()),
            }
        }
    });
    let (mut random, mut completed, mut cut) = (Random::new(5), Vec::new(), 0);
    for n in 0..600 {
        let message = payload(0, n, random.size(2 << 20));
        let mut send = std::pin::pin!(here.send_bytes(&message));
        let mut done = false;
        for _ in 0..=random.below(3) {
            if let Some(sent) = futures::FutureExt::now_or_never(send.as_mut()) {
                sent.unwrap();
                done = true;
                break;
            }
            tokio::task::yield_now().await;
        }
        match done {
            true => completed.push(n),
            false => cut += 1,
        }
    }
    here.send_bytes(&payload(0, 9_999, 0)).await.unwrap();
    drop(here);
    let (seen, end) = within(reader).await.unwrap();
    assert_eq!((seen.last(), end), (Some(&9_999), ErrorKind::Closed));
    assert!(seen.is_sorted(), "in order");
    assert!(completed.iter().all(|n| seen.binary_search(n).is_ok()), "what was sent has arrived");
    assert!(cut > 0, "some were dropped");
}

#[tokio::test]
async fn p10_a_send_dropped_half_way_arrives_though_its_connection_is_dropped_too() {
    let (here, there) = pair().await;
    let message = payload(0, 1, 8 << 20);
    assert!(futures::FutureExt::now_or_never(here.send_bytes(&message)).is_none());
    drop(here);
    assert!(within(there.recv_bytes()).await.unwrap() == message);
    assert_eq!(within(there.recv_bytes()).await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn a_dropped_accept_takes_no_peer() {
    let listener = Listener::bind(&abstract_name()).authkey(KEY).await.unwrap();
    for _ in 0..100 {
        assert!(futures::FutureExt::now_or_never(listener.accept()).is_none());
        let _ = tokio::time::timeout(Duration::ZERO, listener.accept()).await;
    }
    let address = listener.local_addr();
    let connecting = tokio::spawn(async move { connect(&address, Some(KEY)).await });
    let waiting = tokio::time::timeout(SHORT / 10, listener.accept()).await;
    if waiting.is_err() {
        within(listener.accept()).await.unwrap();
    }
    within(connecting).await.unwrap().unwrap();
}

// Streams, sinks, halves.

#[tokio::test]
async fn a_sink_that_is_dropped_unflushed_sends_its_items() {
    let (here, mut there) = pair().await;
    let feed = async move {
        for n in 0..1_000 {
            there.feed(payload(0, n, 500)).await.unwrap();
        }
        there.send_bytes(&payload(0, 1_000, 0)).await.unwrap();
        there.feed(payload(0, 1_001, 0)).await.unwrap();
    };
    let (messages, ()) = within(async { tokio::join!(here.collect::<Vec<_>>(), feed) }).await;
    let numbers: Vec<_> = messages.into_iter().map(|message| read_payload(&message.unwrap()).1).collect();
    assert_eq!(numbers, (0..1_002).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_half_that_is_closed_or_dropped_ends_its_direction_only() {
    let (here, there) = pair_at("127.0.0.1:0", Some(KEY)).await;
    let (mut sender, receiver) = there.split();
    sender.close().await.unwrap();
    assert_eq!(within(here.recv_bytes()).await.unwrap_err().kind(), ErrorKind::Closed);
    here.send_bytes(b"hello").await.unwrap();
    assert_eq!(within(receiver.recv_bytes()).await.unwrap(), b"hello");
    assert_eq!(sender.send_bytes(b"x").await.unwrap_err().kind(), ErrorKind::Closed);
    assert!(receiver.peer_addr().starts_with("127.0.0.1:"));
}

#[tokio::test]
async fn a_stream_ends_after_its_first_error() {
    let (here, mut there) = raw_pair().await;
    there.write_all(&[frame(b"one"), (-7i32).to_be_bytes().to_vec(), frame(b"two")].concat()).await.unwrap();
    let items: Vec<_> = within(here.collect()).await;
    assert_eq!(items.len(), 2);
    assert_eq!(items[1].as_ref().unwrap_err().kind(), ErrorKind::Decode);
}

#[test]
fn connections_can_go_to_other_threads() {
    fn check<T: Send + Sync + Unpin>() {}
    check::<ByteConnection>();
    check::<Listener>();
    fn future<F: Future + Send>(_: F) {}
    future(async {
        let listener = Listener::bind("\0x").authkey(KEY).await.unwrap();
        let connection = listener.accept().await.unwrap();
        connection.send_bytes(b"").await.unwrap();
        connection.recv_bytes().await.unwrap();
        connect("\0x", None).await.unwrap();
    });
}

#[tokio::test]
async fn nothing_is_left_of_connections_that_are_gone() {
    in_child(
        async || {
            let (one, other) = pair_at(&path(), Some(KEY)).await;
            drop((one, other));
            let before = holdings();
            for _ in 0..100 {
                let (here, there) = pair_at(&path(), Some(KEY)).await;
                let _ = futures::FutureExt::now_or_never(here.send_bytes(&bytes(1 << 20)));
                drop((here, there));
            }
            eventually("all descriptors are closed", || holdings().descriptors <= before.descriptors).await;
        },
        (),
    )
    .await;
}

#[tokio::test]
async fn a_socket_path_that_another_user_took_first_is_refused_and_connected_to_where_its_owner_is_named() {
    let path = path();
    let stranger = UnixListener::bind(&path).unwrap();
    if common::give_to_stranger(&path) {
        let says_whose = |error: mp::Error| {
            assert!(error.kind() == ErrorKind::Io && error.to_string().contains("uid 65534"), "{error}");
        };
        says_whose(connect(&path, None).await.unwrap_err());
        says_whose(connect(&path, None).owner(common::STRANGER - 1).await.unwrap_err());
        says_whose(Listener::bind(&path).await.unwrap_err());
        says_whose(mp::Manager::connect(&path, KEY).await.map(drop).unwrap_err());
        let there = within(connect(&path, None).owner(common::STRANGER).into_future()).await.unwrap();
        assert_eq!(there.peer_addr(), path);
        // Nobody serves it any more: still another's.
        drop(stranger);
        says_whose(Listener::bind(&path).await.unwrap_err());
        assert!(std::fs::symlink_metadata(&path).is_ok());
    }
    std::fs::remove_file(&path).unwrap();
}

#[tokio::test]
async fn a_symbolic_link_at_a_socket_path_is_not_followed() {
    let (target, link) = (path(), path());
    let _listener = Listener::bind(&target).await.unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    let error = connect(&link, None).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Io && error.to_string().contains("symbolic link"), "{error}");
    let error = Listener::bind(&link).await.unwrap_err();
    assert!(error.to_string().contains("symbolic link"), "{error}");
    drop(within(connect(&target, None).into_future()).await.unwrap());
    std::fs::remove_file(&link).unwrap();
}

#[tokio::test]
async fn a_listener_of_an_abstract_name_is_asked_for_its_owner_where_one_is_named() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::SocketAddr;
    let name = abstract_name();
    let _listener = Listener::bind(&name).await.unwrap();
    drop(within(connect(&name, None).owner(common::STRANGER).into_future()).await.unwrap());
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIPPED, as it needs root: a listener of another user");
    }
    let theirs = in_child(
        async |name: String| {
            let user = rustix::process::Uid::from_raw(1234);
            rustix::thread::set_thread_res_uid(user, user, user).unwrap();
            let address = SocketAddr::from_abstract_name(&name[1..]).unwrap();
            let listener = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
            Fd::new(std::os::fd::OwnedFd::from(listener))
        },
        (abstract_name(),),
    );
    let theirs = std::os::unix::net::UnixListener::from(theirs.await.into_inner());
    let name = theirs.local_addr().unwrap();
    let name = format!("\0{}", std::str::from_utf8(name.as_abstract_name().unwrap()).unwrap());
    let error = within(connect(&name, None).owner(common::STRANGER).into_future()).await.unwrap_err();
    assert!(error.to_string().contains("uid 1234"), "{error}");
    drop(within(connect(&name, None).owner(1234).into_future()).await.unwrap());
}
