//! The arguments of a manager's process, and the first messages with clients from elsewhere.

#[cfg(feature = "tls")]
use crate::connection::rustls;
use crate::connection::{ByteConnection, Listener};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::{image, memfd, named, timer};
use crate::wire::{self, Fd, Parcel};
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

/// Both in DER.
pub(crate) type CertificatesAndKey = (Vec<Vec<u8>>, Zeroizing<Vec<u8>>);

/// Where and how clients from elsewhere connect.
#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct Bind {
    address: String,
    key: Secret,
    /// Certificates and the key to them, in DER, for the feature `tls`.
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
    pub(crate) fn new(address: String, key: &[u8], tls: Option<CertificatesAndKey>) -> Result<Self> {
        let tls = tls.map(|(certificates, key)| Ok::<_, Error>((certificates, Secret::new(&key)?))).transpose()?;
        Ok(Self { address, key: Secret::new(key)?, tls })
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
type Welcome = (Id, u32);

/// The first bytes of a client from elsewhere, and of the manager to it.
const GREETING: &[u8; 16] = b"multiprocess mgr";

/// The outcome of `greeting`, or the error `late` that `topic` explains.
async fn in_time<T>(greeting: impl Future<Output = Result<T>>, late: &str, topic: Option<Topic>) -> Result<T> {
    let greeted = timer::within(GREETING_TIME, greeting).await;
    greeted.unwrap_or_else(|_| Err(Error::new(ErrorKind::Timeout, late).explained_by(topic)))
}

/// Greets the manager at the other end, after the authentication.
pub(crate) async fn greet(manager: &ByteConnection) -> Result<Welcome> {
    let greet = async {
        let build = image::fingerprint();
        manager.send_bytes(&[&GREETING[..], &build.to_le_bytes()].concat()).await?;
        let answer = manager.recv_bytes().await?;
        let peer = manager.peer_addr();
        let stranger =
            || Error::new(ErrorKind::Decode, format!("at {peer} is no manager")).explained_by(Topic::OtherProtocol);
        let (bytes, theirs) = answer.strip_prefix(GREETING).and_then(<[u8]>::split_last_chunk).ok_or_else(stranger)?;
        // Before the rest is read, which another build may write in another way.
        let theirs = u64::from_le_bytes(*theirs);
        if theirs != build {
            let why = format!(
                "the manager at {peer} is another build of this program, or another program ({theirs:016x}, and this is \
                 {build:016x}): run the same executable at both ends"
            );
            return Err(Error::new(ErrorKind::Decode, why).explained_by(Topic::OtherBuildOfManager));
        }
        wire::decode(Parcel { bytes: bytes.to_vec(), fds: Vec::new() }).map_err(|_| stranger())
    };
    in_time(greet, "the manager sent no greeting", Some(Topic::ManagerSilent)).await
}

/// Lets a client in that runs the same build.
pub(crate) async fn admit(id: Id, client: &ByteConnection) -> Result<()> {
    let admit = async {
        let build = image::fingerprint();
        let theirs = client.recv_bytes().await?;
        let Some(theirs) = theirs.strip_prefix(GREETING).and_then(|rest| <[u8; 8]>::try_from(rest).ok()) else {
            let why = "the other end is no client of a manager";
            return Err(Error::new(ErrorKind::Decode, why).explained_by(Topic::OtherProtocol));
        };
        let welcome: Welcome = (id, std::process::id());
        let message = wire::encode(&welcome)?;
        client.send_bytes(&[&GREETING[..], message.payload(&welcome), &build.to_le_bytes()].concat()).await?;
        match u64::from_le_bytes(theirs) == build {
            true => Ok(()),
            false => {
                let why = "it is another build of this program, or another program";
                Err(Error::new(ErrorKind::Decode, why).explained_by(Topic::OtherBuildOfManager))
            }
        }
    };
    in_time(admit, "it sent no greeting", None).await
}
