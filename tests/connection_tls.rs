//! Connections through TLS. The certificate in `tests/tls` is for these tests alone.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::within;
use multiprocess::connection::rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use multiprocess::connection::rustls::{ClientConfig, RootCertStore, ServerConfig};
use multiprocess::connection::{Listener, connect};
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
async fn who_is_not_trusted_or_speaks_no_tls_or_has_another_key_is_refused() {
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
