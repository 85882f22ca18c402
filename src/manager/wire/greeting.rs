//! The arguments of a manager's process, and the first messages with clients from elsewhere.

use crate::connection::Listener;
#[cfg(feature = "tls")]
use crate::connection::rustls;
#[cfg(feature = "tls")]
use crate::error::ErrorKind;
use crate::error::{Error, Result};
use crate::os::{memfd, named};
use crate::wire::Fd;
use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
#[cfg(feature = "tls")]
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

/// Names one server in the world.
pub(crate) type Id = (u64, u64);

/// The arguments of a server.
#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct Setup {
    pub(crate) id: Id,
    /// Where the ends of new clients arrive.
    pub(crate) intake: Fd<OwnedFd>,
    /// The clients' end, for handles that leave from here.
    pub(crate) connector: Fd<OwnedFd>,
    /// The entries that may be called; `None` is all.
    pub(crate) exposed: Option<HashSet<u64>>,
    /// Where clients from elsewhere connect.
    pub(crate) bind: Option<Bind>,
}

/// The time limit for the greeting of a client from elsewhere, and for connecting on this machine.
pub(crate) const GREETING_TIME: Duration = Duration::from_secs(10);

/// Where and how clients from elsewhere connect.
#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct Bind {
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
    pub(crate) fn new(address: String, key: &[u8]) -> Result<Self> {
        Ok(Self {
            address,
            key: Secret::new(key)?,
            #[cfg(feature = "tls")]
            tls: None,
        })
    }

    #[cfg(feature = "tls")]
    pub(crate) fn with_tls(mut self, certificates: Vec<Vec<u8>>, key: &[u8]) -> Result<Self> {
        self.tls = Some((certificates, Secret::new(key)?));
        Ok(self)
    }

    pub(crate) async fn listen(self) -> Result<Listener> {
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

/// The answer to the greeting of a client from elsewhere: the server's name and its pid. The number of the build follows it, which a client of another build
/// can read even if it cannot read this.
pub(crate) type Welcome = (Id, u32);

/// The first bytes of a client from elsewhere, and of the manager to it.
pub(crate) const GREETING: &[u8; 16] = b"multiprocess mgr";
