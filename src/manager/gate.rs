//! Clients from elsewhere: where they connect, and the first words with them.

use super::server::{Event, Id};
#[cfg(feature = "tls")]
use crate::connection::rustls;
use crate::connection::{ByteConnection, Listener};
use crate::error::{Error, ErrorKind, Result};
use crate::os::{image, memfd, named, timer};
use crate::wire::{self, Fd};
use std::os::fd::{AsFd, OwnedFd};
#[cfg(feature = "tls")]
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

/// In which a client from elsewhere must have said who it is, and one of this machine must have been let in.
pub(super) const GREETING_TIME: Duration = Duration::from_secs(10);

/// Where and how clients from elsewhere connect.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct Bind {
    address: String,
    key: Secret,
    /// Certificates and the key to them, in DER.
    #[cfg(feature = "tls")]
    tls: Option<(Vec<Vec<u8>>, Secret)>,
}

/// Bytes that go to the manager as memory of their own, past the fork server: what passes through its heap stays there, and
/// so comes to be in every later child.
#[derive(serde::Serialize, serde::Deserialize)]
struct Secret {
    memory: Fd<OwnedFd>,
    len: usize,
}

impl Secret {
    fn new(bytes: &[u8]) -> Result<Self> {
        let memory = memfd::create_with("multiprocess-secret", bytes, bytes.len() as u64, false);
        let memory = memory.map_err(|error| Error::io("cannot hand a key to the manager", error))?;
        Ok(Self { memory: Fd::new(memory), len: bytes.len() })
    }

    fn read(self) -> Result<Zeroizing<Vec<u8>>> {
        let mut bytes = Zeroizing::new(vec![0; self.len]);
        named::read(self.memory.into_inner().as_fd(), 0, &mut bytes)
            .map_err(|error| Error::io("cannot read a key", error))?;
        Ok(bytes)
    }
}

impl Bind {
    pub(super) fn new(address: String, key: &[u8]) -> Result<Self> {
        Ok(Self {
            address,
            key: Secret::new(key)?,
            #[cfg(feature = "tls")]
            tls: None,
        })
    }

    #[cfg(feature = "tls")]
    pub(super) fn with_tls(mut self, certificates: Vec<Vec<u8>>, key: &[u8]) -> Result<Self> {
        self.tls = Some((certificates, Secret::new(key)?));
        Ok(self)
    }

    pub(super) async fn listen(self) -> Result<Listener> {
        let bind = Listener::bind(&self.address).authkey(&*self.key.read()?).allow_md5(false);
        #[cfg(feature = "tls")]
        let bind = match self.tls {
            Some((certificates, key)) => bind.tls(tls(certificates, &key.read()?)?),
            None => bind,
        };
        bind.await
    }
}

#[cfg(feature = "tls")]
fn tls(certificates: Vec<Vec<u8>>, key: &[u8]) -> Result<Arc<rustls::ServerConfig>> {
    let unfit = |why: String| Error::new(ErrorKind::Other, format!("this certificate cannot be used: {why}"));
    let key = rustls::pki_types::PrivateKeyDer::try_from(key).map_err(|why| unfit(why.into()))?.clone_key();
    let certificates = certificates.into_iter().map(Into::into).collect();
    let config = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(certificates, key);
    config.map(Arc::new).map_err(|why| unfit(why.to_string()))
}

/// What a client from elsewhere is told; the number of the build follows it, which tells a client of another one, whatever
/// that makes of this.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct Welcome {
    pub(super) id: Id,
    pub(super) pid: u32,
}

/// The first words of a client from elsewhere, and of the manager to it.
pub(super) const GREETING: &[u8; 16] = b"multiprocess mgr";

/// Lets in who runs the same build.
pub(super) async fn greet(id: Id, peer: ByteConnection) -> Event {
    let greeted = async {
        let build = image::fingerprint();
        let theirs = peer.recv_bytes().await?;
        let Some(theirs) = theirs.strip_prefix(GREETING).and_then(|rest| <[u8; 8]>::try_from(rest).ok()) else {
            return Err(Error::new(ErrorKind::Decode, "the other end is no client of a manager"));
        };
        let welcome = Welcome { id, pid: std::process::id() };
        let message = wire::encode(&welcome)?;
        peer.send_bytes(&[&GREETING[..], message.payload(&welcome), &build.to_le_bytes()].concat()).await?;
        match u64::from_le_bytes(theirs) == build {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Decode, "it is another build of this program, or another program")),
        }
    };
    let greeted = timer::within(GREETING_TIME, greeted).await;
    let greeted = greeted.unwrap_or_else(|_| Err(Error::new(ErrorKind::Timeout, "it did not say who it is")));
    Event::Hello(greeted.map(|()| peer.split()))
}
