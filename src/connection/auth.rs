//! Authentication: CPython's challenge and response, in both roles.
//!
//! Each step is one message of at most [`LONGEST`] bytes; K is the key, which never travels.
//!
//! ```text
//! challenger                                  responder
//! "#CHALLENGE#" M             ------------>
//!                             <------------   R, made of K and M
//! "#WELCOME#" or "#FAILURE#"  ------------>
//! ```
//!
//! The listener challenges first and answers only a client that has passed, so a stranger gets no answer from it. Then the
//! client challenges. M is `{sha256}` and 40 random bytes (CPython 3.12 and later), or 20 random bytes (up to
//! 3.11); R is the same prefix and the HMAC of the whole M, or, up to 3.11, a bare HMAC-MD5.
//! The responder chooses the digest; the challenger decides which ones it accepts.
//!
//! A peer without the key can reflect a challenge to the process that it comes from, on another connection, to have it
//! answered there. A client's challenge is for a listener, and the other way round. So a process never
//! answers a challenge for which it waits for an answer itself in the same role.

use super::frame::{FrameReader, FrameWriter};
use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::random;
use crate::os::sync::lock;
use hmac::{Hmac, KeyInit, Mac};
use md5::Md5;
use sha2::{Sha256, Sha384};
use std::collections::HashSet;
use std::sync::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use zeroize::{Zeroize, Zeroizing};

/// The longest message of the handshake.
pub(crate) const LONGEST: u64 = 256;

const CHALLENGE: &[u8] = b"#CHALLENGE#";
const WELCOME: &[u8] = b"#WELCOME#";
const FAILURE: &[u8] = b"#FAILURE#";
/// The beginning of a challenge; 40 random bytes follow.
const PREFIX: &[u8] = b"{sha256}";
const RANDOM: usize = 40;
/// The length of a challenge that asks for a bare HMAC-MD5, and the least there is.
const LEGACY: usize = 20;
const MD5_LEN: usize = 16;

/// The key that both ends must know, and which proofs are accepted. It is wiped when it is dropped, and never copied.
pub(crate) struct Key {
    pub(crate) bytes: Zeroizing<Box<[u8]>>,
    /// Whether HMAC-MD5 is accepted, the only digest of CPython up to 3.11.
    pub(crate) allow_md5: bool,
}

impl Key {
    pub(crate) fn new(bytes: &[u8], allow_md5: bool) -> Self {
        Self { bytes: Zeroizing::new(bytes.into()), allow_md5 }
    }
}

/// Which end this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    Listener,
    Client,
}

/// Proves to the other end that this one knows the key, and has it do the same.
///
/// Bytes that the other end sends after the handshake stay in `reader`. The caller sets the limit of `reader`.
pub(crate) async fn authenticate<R, W>(
    reader: &mut FrameReader<R>,
    writer: &mut FrameWriter<W>,
    key: &Key,
    role: Role,
) -> Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    match role {
        Role::Listener => {
            challenge(reader, writer, key, role).await?;
            answer(reader, writer, key, role).await
        }
        Role::Client => {
            answer(reader, writer, key, role).await?;
            challenge(reader, writer, key, role).await
        }
    }
}

/// Returns `true` if a message is the first one of a listener with a key.
pub(crate) fn is_challenge(message: &[u8]) -> bool {
    let body = message.strip_prefix(CHALLENGE);
    body.is_some_and(|body| message.len() as u64 <= LONGEST && (body.len() == LEGACY || Digest::named(body).is_some()))
}

async fn challenge<R, W>(reader: &mut FrameReader<R>, writer: &mut FrameWriter<W>, key: &Key, role: Role) -> Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let asked = Asked::at_random(role)?;
    writer.send(&[CHALLENGE, PREFIX, &asked.random].concat()).await.map_err(lost)?;
    let response = reader.recv().await.map_err(lost)?;
    let verdict = verify(key, &[PREFIX, &asked.random].concat(), &response);
    writer.send(if verdict.is_ok() { WELCOME } else { FAILURE }).await.map_err(lost)?;
    verdict
}

async fn answer<R, W>(reader: &mut FrameReader<R>, writer: &mut FrameWriter<W>, key: &Key, role: Role) -> Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let received = reader.recv().await.map_err(lost)?;
    let response = respond(key, role, &received)?;
    writer.send(&response).await.map_err(lost)?;
    match reader.recv().await.map_err(lost)? == WELCOME {
        true => Ok(()),
        false => Err(has_other_key("the other end has another key: it rejected our proof")),
    }
}

/// The proof that answers the challenge `received`.
fn respond(key: &Key, role: Role, received: &[u8]) -> Result<Vec<u8>> {
    let Some(challenge) = received.strip_prefix(CHALLENGE) else {
        return Err(has_other_key("the other end sent something other than a challenge: it may have no key"));
    };
    if challenge.len() < LEGACY {
        return Err(refused(&format!("a challenge of {} bytes is too short", challenge.len())));
    }
    if Asked::is_open(role, challenge) {
        return Err(refused("the other end sent a challenge of this process back to it"));
    }
    let (digest, prefix) = match challenge.len() {
        LEGACY => (Digest::Md5, &challenge[..0]),
        _ => Digest::named(challenge).ok_or_else(|| refused("a challenge for a digest that is not known here"))?,
    };
    if digest == Digest::Md5 && !key.allow_md5 {
        let why = "the other end asks for MD5 (CPython up to 3.11 does), which allow_md5(false) refuses";
        return Err(refused(why).explained_by(Topic::Md5Refused));
    }
    Ok([prefix, &digest.of(&key.bytes, challenge)].concat())
}

/// Whether `response` proves knowledge of the key.
fn verify(key: &Key, challenge: &[u8], response: &[u8]) -> Result<()> {
    let (digest, proof) = match response.len() {
        MD5_LEN | LEGACY => (Digest::Md5, response),
        _ => match Digest::named(response) {
            Some((digest, prefix)) => (digest, &response[prefix.len()..]),
            None => return Err(has_other_key("the other end sent no proof that it knows the key: it may have none")),
        },
    };
    if digest == Digest::Md5 && !key.allow_md5 {
        let why = "the other end answers with MD5 (CPython up to 3.11 does), which allow_md5(false) refuses";
        return Err(refused(why).explained_by(Topic::Md5Refused));
    }
    match digest.is_of(&key.bytes, challenge, proof) {
        true => Ok(()),
        false => Err(has_other_key("the other end has another key: its proof is wrong")),
    }
}

fn refused(why: &str) -> Error {
    Error::new(ErrorKind::Authentication, format!("authentication failed: {why}"))
}

fn has_other_key(why: &str) -> Error {
    refused(why).explained_by(Topic::WrongKey)
}

fn lost(error: Error) -> Error {
    let why = format!("the handshake was cut short: {}", error.text());
    refused(&why).explained_by(Topic::HandshakeCut).with_source(error)
}

/// The digest of a proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Digest {
    Md5,
    Sha256,
    Sha384,
}

impl Digest {
    /// The digest whose name `bytes` begin with, and its name as it stands there.
    fn named(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let names = [(Self::Md5, &b"{md5}"[..]), (Self::Sha256, b"{sha256}"), (Self::Sha384, b"{sha384}")];
        let (digest, name) = names.into_iter().find(|(_, name)| bytes.starts_with(name))?;
        Some((digest, &bytes[..name.len()]))
    }

    fn of(self, key: &[u8], message: &[u8]) -> Vec<u8> {
        match self {
            Self::Md5 => mac::<Hmac<Md5>>(key, message).finalize().into_bytes().to_vec(),
            Self::Sha256 => mac::<Hmac<Sha256>>(key, message).finalize().into_bytes().to_vec(),
            Self::Sha384 => mac::<Hmac<Sha384>>(key, message).finalize().into_bytes().to_vec(),
        }
    }

    /// In a time that does not depend on where `proof` differs.
    fn is_of(self, key: &[u8], message: &[u8], proof: &[u8]) -> bool {
        match self {
            Self::Md5 => mac::<Hmac<Md5>>(key, message).verify_slice(proof).is_ok(),
            Self::Sha256 => mac::<Hmac<Sha256>>(key, message).verify_slice(proof).is_ok(),
            Self::Sha384 => mac::<Hmac<Sha384>>(key, message).verify_slice(proof).is_ok(),
        }
    }
}

/// HMAC copies the key to the stack to fill it up to a block, and leaves it there.
#[inline(never)]
fn wipe_stack() {
    [0u8; 2048].zeroize();
}

fn mac<M: Mac + KeyInit>(key: &[u8], message: &[u8]) -> M {
    #[expect(clippy::expect_used, reason = "a key of another length is hashed or padded first, as HMAC says")]
    let mut mac = <M as KeyInit>::new_from_slice(key).expect("HMAC takes keys of any length");
    wipe_stack();
    mac.update(message);
    mac
}

/// A challenge that waits for its response: its random part, and the role of the challenger.
struct Asked {
    role: Role,
    random: [u8; RANDOM],
}

type Open = HashSet<(Role, [u8; RANDOM])>;

static OPEN: Mutex<Option<Open>> = Mutex::new(None);

impl Asked {
    fn at_random(role: Role) -> Result<Self> {
        let random = random::bytes().map_err(|error| Error::io("cannot make a challenge", error))?;
        let mut open = lock(&OPEN);
        open.get_or_insert_default().insert((role, random));
        Ok(Self { role, random })
    }

    /// Returns `true` if this process waits, in this role, for a response to `challenge`, under any prefix.
    fn is_open(role: Role, challenge: &[u8]) -> bool {
        let open = lock(&OPEN);
        let Some(open) = open.as_ref() else { return false };
        challenge.last_chunk().is_some_and(|random| open.contains(&(role, *random)))
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let mut open = lock(&OPEN);
        if let Some(open) = open.as_mut() {
            open.remove(&(self.role, self.random));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(allow_md5: bool) -> Key {
        Key::new(b"a key of both ends", allow_md5)
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn proofs_are_those_that_cpython_makes() {
        // hmac.new(b"a key of both ends", challenge, name).hexdigest() of CPython 3.13.0
        let challenge = b"{sha256}0123456789012345678901234567890123456789";
        let made =
            [Digest::Md5, Digest::Sha256, Digest::Sha384].map(|digest| hex(&digest.of(&key(true).bytes, challenge)));
        assert_eq!(
            made,
            [
                "32510458246db963b597c03aa221853c",
                "a1c1f70b5660a98487126b6739ba23f2d0fdfd4c26f222f23ae5789eff4ecd16",
                "1df57b2b6f5049702d3e0399ccf4568138cd4154c67950be3d41299bd08bcbfe3ec9461f9bdc7ff176493bb5ccf76d71",
            ]
        );
    }

    #[test]
    fn each_accepted_proof_passes_and_each_damaged_one_fails() {
        let challenge = [PREFIX, &[5; RANDOM]].concat();
        let (with, without) = (key(true), key(false));
        for (digest, name) in
            [(Digest::Md5, &b"{md5}"[..]), (Digest::Sha256, b"{sha256}"), (Digest::Sha384, b"{sha384}")]
        {
            let proof = digest.of(&with.bytes, &challenge);
            assert!(verify(&with, &challenge, &[name, &proof].concat()).is_ok());
            assert_eq!(verify(&without, &challenge, &[name, &proof].concat()).is_ok(), digest != Digest::Md5);
            assert_eq!(verify(&with, &challenge, &proof).is_ok(), digest == Digest::Md5, "bare");
            for cut in 0..proof.len() {
                assert!(verify(&with, &challenge, &[name, &proof[..cut]].concat()).is_err());
                let mut wrong = [name, &proof].concat();
                wrong[name.len() + cut] ^= 1;
                assert!(verify(&with, &challenge, &wrong).is_err());
            }
        }
    }

    /// `verify_slice` takes the same time wherever they differ; an operator would not. A clock could not show it in a test: the
    /// hash takes a hundred times longer than the comparison.
    #[test]
    fn proofs_are_compared_in_constant_time_only() {
        let source = include_str!("auth.rs").split("#[cfg(test)]").next().unwrap();
        let by_operator = source.lines().filter(|line| {
            let is_code = !line.trim_start().starts_with("//") && !line.contains(".len()");
            is_code && line.contains("proof") && [" == ", " != ", ".eq("].iter().any(|by| line.contains(by))
        });
        assert_eq!(by_operator.collect::<Vec<_>>(), Vec::<&str>::new());
        assert_eq!(source.matches("verify_slice(proof)").count(), 3);
    }

    #[test]
    fn a_challenge_is_not_answered_in_the_role_that_asked_it_and_only_while_it_is_open() {
        let asked = Asked::at_random(Role::Client).unwrap();
        let received = [CHALLENGE, PREFIX, &asked.random].concat();
        assert!(respond(&key(true), Role::Client, &received).is_err());
        assert!(respond(&key(true), Role::Listener, &received).is_ok());
        drop(asked);
        assert!(respond(&key(true), Role::Client, &received).is_ok());
    }

    #[test]
    fn any_bytes_are_answered_or_refused() {
        let state = &mut 88_172_645_463_325_252u64;
        let mut random = || {
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
            *state
        };
        let starts: [&[u8]; 6] = [b"", CHALLENGE, b"#CHALLENGE#{sha256}", b"#CHALLENGE#{md5}", b"{sha384}", b"{md5}"];
        let mut answered = 0;
        for _ in 0..20_000 {
            let mut bytes = starts[random() as usize % starts.len()].to_vec();
            bytes.extend((0..random() % 60).map(|_| 32 + (random() % 96) as u8));
            answered += usize::from(respond(&key(true), Role::Client, &bytes).is_ok());
            assert!(verify(&key(true), b"{sha256}of another", &bytes).is_err());
            is_challenge(&bytes);
        }
        assert!(answered > 0);
    }
}
