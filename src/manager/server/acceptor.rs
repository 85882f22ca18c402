//! The acceptor: the first messages with a client from elsewhere, after the authentication.

use crate::connection::ByteConnection;
use crate::error::{Error, ErrorKind, Result};
use crate::manager::wire::greeting::{GREETING, GREETING_TIME, Id, Welcome};
use crate::os::{image, timer};
use crate::wire;

/// Lets a client in that runs the same build.
pub(crate) async fn greet(id: Id, peer: &ByteConnection) -> Result<()> {
    let greeted = async {
        let build = image::fingerprint();
        let theirs = peer.recv_bytes().await?;
        let Some(theirs) = theirs.strip_prefix(GREETING).and_then(|rest| <[u8; 8]>::try_from(rest).ok()) else {
            return Err(Error::new(ErrorKind::Decode, "the other end is no client of a manager"));
        };
        let welcome: Welcome = (id, std::process::id());
        let message = wire::encode(&welcome)?;
        peer.send_bytes(&[&GREETING[..], message.payload(&welcome), &build.to_le_bytes()].concat()).await?;
        match u64::from_le_bytes(theirs) == build {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Decode, "it is another build of this program, or another program")),
        }
    };
    let greeted = timer::within(GREETING_TIME, greeted).await;
    greeted.unwrap_or_else(|_| Err(Error::new(ErrorKind::Timeout, "it sent no greeting")))
}
