//! The two ends of an encrypted connection: a listener that has a certificate, and a process that trusts it.
//!
//! The certificate and its key are files of DER, as `openssl x509 -outform der` and `openssl pkcs8 -topk8 -nocrypt -outform der` write them. These
//! are of the tests, and everybody has their key: make your own.

use multiprocess::connection::rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use multiprocess::connection::rustls::{ClientConfig, RootCertStore, ServerConfig};
use multiprocess::connection::{Listener, connect};
use multiprocess::{self as mp, Process};
use std::sync::Arc;

const CERTIFICATE: &[u8] = include_bytes!("../../tests/tls/certificate.der");
const PRIVATE_KEY: &[u8] = include_bytes!("../../tests/tls/key.der");
/// Each end proves to the other that it has it, inside the encryption.
const KEY: &[u8] = b"secret";

async fn ask(address: String) -> mp::Result<String> {
    let mut trusted = RootCertStore::empty();
    trusted.add(CertificateDer::from(CERTIFICATE)).map_err(mp::Error::other)?;
    let config = ClientConfig::builder().with_root_certificates(trusted).with_no_client_auth();
    let connection = connect(&address, Some(KEY)).tls(Arc::new(config), "localhost").await?;
    connection.send_bytes(b"Who is there?").await?;
    Ok(String::from_utf8_lossy(&connection.recv_bytes().await?).into_owned())
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(PRIVATE_KEY));
        let config = ServerConfig::builder().with_no_client_auth();
        let config = config.with_single_cert(vec![CertificateDer::from(CERTIFICATE)], key).map_err(mp::Error::other)?;
        let listener = Listener::bind("127.0.0.1:0").authkey(KEY).tls(Arc::new(config)).await?;
        let client = Process::spawn(ask, (listener.local_addr(),))?;

        let connection = listener.accept().await?;
        println!("asked: {}", String::from_utf8_lossy(&connection.recv_bytes().await?));
        connection.send_bytes(b"A listener.").await?;
        println!("answered: {}", client.await??);
        Ok(())
    })
}
