//! Connections through TLS. The certificates in `tests/tls` are for these tests alone: `certificate.der` is signed by itself,
//! the others by `ca.der` (with `ca.cnf`), all with the key in `key.der`.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::within;
use multiprocess::connection::rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use multiprocess::connection::rustls::server::WebPkiClientVerifier;
use multiprocess::connection::rustls::{ClientConfig, RootCertStore, ServerConfig};
use multiprocess::connection::{ByteConnection, Listener, connect};
use multiprocess::{self as mp, ErrorKind, Manager};
use std::future::IntoFuture;
use std::sync::Arc;
use std::time::Duration;

mp::test_support!();

const KEY: &[u8] = b"a key of both ends";

fn certificate() -> CertificateDer<'static> {
    CertificateDer::from(&include_bytes!("tls/certificate.der")[..])
}

fn server() -> Arc<ServerConfig> {
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(&include_bytes!("tls/key.der")[..]));
    Arc::new(ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate()], key).unwrap())
}

fn client(trusts: bool) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    if trusts {
        roots.add(certificate()).unwrap();
    }
    Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth())
}

#[tokio::test]
async fn messages_go_through_tls_and_a_dropped_send_goes_whole() {
    let listener = Listener::bind("127.0.0.1:0").authkey(KEY).tls(server()).await.unwrap();
    let address = listener.local_addr();
    let connecting = connect(&address, Some(KEY)).tls(client(true), "localhost").into_future();
    let (here, there) = within(async { tokio::join!(listener.accept(), connecting) }).await;
    let (here, there) = (here.unwrap(), there.unwrap());
    let message = vec![7; 16 << 20];
    assert!(tokio::time::timeout(Duration::from_millis(100), there.send_bytes(&message)).await.is_err());
    let (sent, first) = within(async { tokio::join!(there.send_bytes(b"after it"), here.recv_bytes()) }).await;
    sent.unwrap();
    assert!(first.unwrap() == message);
    assert_eq!(within(here.recv_bytes()).await.unwrap(), b"after it");
    here.send_bytes(b"back").await.unwrap();
    assert_eq!(within(there.recv_bytes()).await.unwrap(), b"back");
    drop(there);
    assert_eq!(within(here.recv_bytes()).await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn peer_without_trust_tls_or_key_is_refused() {
    let listener = Listener::bind("127.0.0.1:0").authkey(KEY).tls(server()).await.unwrap();
    let address = listener.local_addr();
    let wrong = [
        connect(&address, Some(KEY)).tls(client(false), "localhost"),
        connect(&address, Some(KEY)).tls(client(true), "example.org"),
        connect(&address, Some(b"another")).tls(client(true), "localhost"),
        connect(&address, Some(KEY)).handshake_timeout(Duration::from_millis(200)),
    ];
    for connecting in wrong {
        let error = within(connecting.into_future()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Authentication, "{error}");
        let error = within(listener.accept()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Authentication, "{error}");
    }
    let on_a_path = Listener::bind("\0multiprocess-tls-test").tls(server()).await;
    assert_eq!(on_a_path.unwrap_err().kind(), ErrorKind::Other);
}

#[tokio::test]
async fn a_manager_is_reached_through_tls() {
    let key = include_bytes!("tls/key.der").to_vec();
    let builder = Manager::builder().bind("127.0.0.1:0").authkey(KEY);
    let manager = within(builder.tls(vec![certificate().to_vec()], key.clone()).start()).await.unwrap();
    let address = within(manager.address()).await.unwrap().unwrap();
    let there = within(Manager::connect(&address, KEY).tls(client(true), "localhost").into_future()).await.unwrap();
    let list = within(there.list::<Vec<u8>>()).await.unwrap();
    within(list.push(vec![7; 1 << 20])).await.unwrap();
    assert!(within(list.pop()).await.unwrap().unwrap() == vec![7; 1 << 20]);
    for refused in [
        Manager::connect(&address, KEY).tls(client(false), "localhost"),
        Manager::connect(&address, KEY).handshake_timeout(Duration::from_millis(200)),
    ] {
        let error = within(refused.into_future()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Authentication, "{error}");
    }
    within(manager.shutdown()).await.unwrap();
    let unfit = Manager::builder().bind("127.0.0.1:0").authkey(KEY).tls(vec![vec![1, 2, 3]], key);
    let error = within(unfit.start()).await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    let on_a_path = Manager::builder().bind("\0multiprocess-tls-manager").authkey(KEY);
    let on_a_path = on_a_path.tls(vec![certificate().to_vec()], include_bytes!("tls/key.der").to_vec());
    assert_eq!(within(on_a_path.start()).await.unwrap_err().kind(), ErrorKind::Other);
}

fn key() -> PrivateKeyDer<'static> {
    PrivateKeyDer::from(PrivatePkcs8KeyDer::from(&include_bytes!("tls/key.der")[..]))
}

fn authority() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(&include_bytes!("tls/ca.der")[..])).unwrap();
    roots
}

fn serves(certificate: &'static [u8]) -> Arc<ServerConfig> {
    let config = ServerConfig::builder().with_no_client_auth();
    Arc::new(config.with_single_cert(vec![CertificateDer::from(certificate)], key()).unwrap())
}

fn trusts_authority() -> Arc<ClientConfig> {
    Arc::new(ClientConfig::builder().with_root_certificates(authority()).with_no_client_auth())
}

/// What comes of connecting to a listener with this certificate, under this name, at both ends.
async fn outcomes(server: Arc<ServerConfig>, name: &str) -> [mp::Result<ByteConnection>; 2] {
    let listener = Listener::bind("127.0.0.1:0").authkey(KEY).tls(server).await.unwrap();
    let connecting = connect(&listener.local_addr(), Some(KEY)).tls(trusts_authority(), name).into_future();
    let (there, here) = within(async { tokio::join!(connecting, listener.accept()) }).await;
    [there, here]
}

async fn is_refused(server: Arc<ServerConfig>, name: &str, why: &str) {
    let [there, here] = outcomes(server, name).await.map(Result::unwrap_err);
    assert_eq!((there.kind(), here.kind()), (ErrorKind::Authentication, ErrorKind::Authentication));
    assert!(there.to_string().to_lowercase().contains(why), "{there}");
}

#[tokio::test]
async fn a_certificate_of_a_trusted_authority_for_this_name_is_taken() {
    let [there, here] = outcomes(serves(include_bytes!("tls/server.der")), "localhost").await.map(Result::unwrap);
    there.send_bytes(b"hello").await.unwrap();
    assert_eq!(within(here.recv_bytes()).await.unwrap(), b"hello");
}

#[tokio::test]
async fn a_certificate_for_another_host_is_refused() {
    is_refused(serves(include_bytes!("tls/server.der")), "example.org", "not valid for name").await;
}

#[tokio::test]
async fn an_expired_certificate_is_refused() {
    is_refused(serves(include_bytes!("tls/expired.der")), "localhost", "expired").await;
}

#[tokio::test]
async fn a_certificate_that_signed_itself_is_refused() {
    is_refused(server(), "localhost", "unknownissuer").await;
}

#[tokio::test]
async fn a_client_without_the_certificate_that_is_asked_for_is_refused_and_one_with_it_is_taken() {
    let verifier = WebPkiClientVerifier::builder(Arc::new(authority())).build().unwrap();
    let config = ServerConfig::builder().with_client_cert_verifier(verifier);
    let certificate = CertificateDer::from(&include_bytes!("tls/server.der")[..]);
    let config = Arc::new(config.with_single_cert(vec![certificate], key()).unwrap());
    let [there, here] = outcomes(config.clone(), "localhost").await.map(Result::unwrap_err);
    assert_eq!((there.kind(), here.kind()), (ErrorKind::Authentication, ErrorKind::Authentication));
    assert!(here.to_string().contains("certificate"), "{here}");

    // Without a key the client hears of it when it reads: by TLS 1.3 it is done before its certificate is looked at.
    let listener = Listener::bind("127.0.0.1:0").tls(config.clone()).await.unwrap();
    let connecting = connect(&listener.local_addr(), None).tls(trusts_authority(), "localhost").into_future();
    let (there, here) = within(async { tokio::join!(connecting, listener.accept()) }).await;
    assert_eq!(here.unwrap_err().kind(), ErrorKind::Authentication);
    if let Ok(there) = there {
        within(there.recv_bytes()).await.unwrap_err();
    }

    let own = vec![CertificateDer::from(&include_bytes!("tls/client.der")[..])];
    let known = ClientConfig::builder().with_root_certificates(authority()).with_client_auth_cert(own, key()).unwrap();
    let listener = Listener::bind("127.0.0.1:0").authkey(KEY).tls(config).await.unwrap();
    let connecting = connect(&listener.local_addr(), Some(KEY)).tls(Arc::new(known), "localhost").into_future();
    let (there, here) = within(async { tokio::join!(connecting, listener.accept()) }).await;
    there.unwrap();
    here.unwrap();
}
